"""The next iterate of accelerated samples: a mixture of their windows, of weights that :mod:`.advance` has found."""

import triton
import triton.language as tl

from .compilation import Compilation
from .judge import LIVE
from .records import FRONT, HELD, MARKS, STATUS, VALUES, WEIGHTS, Y, floats, ints


@triton.jit(do_not_specialize=["turn", "B"])
def mix_kernel(
    table_ptr,
    turn,
    B,
    m,
    DEPTH: tl.constexpr,
    INCREMENTS: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The next iterate of accelerated samples, ``sum_r weight_r f(y_r)``; a (BLOCK_B, BLOCK_N) tile of it."""
    tiles_n = tl.cdiv(m, BLOCK_N)
    tile_b = tl.program_id(0) // tiles_n
    tile_n = tl.program_id(0) % tiles_n
    in_b = tl.arange(0, BLOCK_B) < B - tile_b * BLOCK_B
    b = tile_b.to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    marks = ints(table_ptr, MARKS) + b
    mixes = in_b & (tl.load(marks + STATUS * B, mask=in_b, other=0) == LIVE)
    mixes = mixes & (tl.load(marks + HELD * B, mask=mixes, other=0) > 1)  # 1: nothing in the window yet
    if tl.max(mixes.to(tl.int32)) == 0:
        return
    n = (tile_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N))[None, :]
    inside = mixes[:, None] & (n < m)
    at = b[:, None] * m + n
    area = (tile_b.to(tl.int64) * 0 + B) * m
    y = tl.zeros((BLOCK_B, BLOCK_N), tl.float32)
    for r in tl.static_range(DEPTH):
        weight = tl.load(floats(table_ptr, WEIGHTS) + r * B + b, mask=mixes, other=0.0)[:, None]
        y += weight * tl.load(floats(table_ptr, VALUES) + r * area + at, mask=inside & (weight != 0.0), other=0.0)
    tl.store(floats(table_ptr, Y if INCREMENTS else FRONT + (turn + 1) % 2) + at, y, mask=inside)


def compilations() -> list[Compilation]:
    compiled = Compilation(
        name="mix, 4x256",
        group="mix, 4x256",
        function="mixing:mix_kernel",
        types={"table_ptr": "*i64", "turn": "i32", "B": "i32", "m": "i32"},
        constants={"DEPTH": 5, "INCREMENTS": 0, "BLOCK_B": 4, "BLOCK_N": 256},
        aligned=("table_ptr", "m"),
        warps=4,
        stages=3,
    )
    return [compiled]
