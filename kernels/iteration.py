"""One kernel an iteration: the cell, its residual, and the judgement of every sample, for any width and batch.

``step_kernel`` computes a tile of ``out = f(y)`` and its share of what samples are judged by; the last program of a
row of tiles to finish (:mod:`.advance`) adds the shares in a fixed order, judges the samples of the row, updates their
records and, where they are accelerated, finds their mixing weights. :mod:`.mixing` then writes the next iterate of the
accelerated ones. Rows of tiles whose samples are all done exit at once, and nothing is read on the host. What goes
before and after is in :mod:`.ends`; a step ends in one of four ways:

    value               out = act(y W^T + c)
    adjoint             out = d * (y A^T + c), c the gradient of the loss
    reflected           out = 2 act(x) - x,   x = y K^T + c
    reflected adjoint   out = (2 d - 1) * x,  x = y K^T + c

All is float32; float32 is multiplied as PRECISION says (see :mod:`.cell`). Where programs are few, SPLITS of them share
the inner dimension of a tile, and the last to arrive adds their parts in a fixed order and goes on. No float atomics:
the same input gives the same bits.

A sample's evaluation of turn t (from 0) reads buffer ``t % 2`` and writes buffer ``(t + 1) % 2`` (:mod:`.records`);
accelerated samples write to the ring position ``t % DEPTH`` of their window instead. Nothing of a sample that is done
is written any more, so that its best iterate stays where its PLACE says.
"""

from itertools import product

import triton
import triton.language as tl

from deq.activations import ACTIVATIONS

from . import activations
from .advance import advance, is_last, overwritten
from .cell import INTERPRETED, multiply_add, tile_of
from .compilation import RULE_TYPES, Compilation
from .judge import LIVE
from .records import (
    ACCELERATIONS,
    ADJOINT,
    BEST,
    COUNTERS,
    DUE,
    ENDINGS,
    EVEN,
    FLOAT8,
    FRONT,
    HELD,
    INCREMENTS,
    LISTS,
    MARKS,
    NEXT_SCALE,
    NONE,
    PARTS,
    PLACE,
    RECORD,
    REFLECTED,
    RESIDUALS,
    RING,
    STATUS,
    SUMS,
    UNIT,
    VALUE,
    VALUES,
    C,
    D,
    W,
    X,
    Y,
    floats,
    ints,
    lows,
    rounded,
)
from .tiles import DELTA_TILES, FLOAT8_FROM, MOST_SPLITS, OLDEST, RAGGED_SAMPLES, STEP_TILES, Tiles, step_tiles

__all__ = ["compilations", "ending", "registers", "step_kernel", "step_tiles"]

MOST_SLOTS = 64  # partial sums of a sample that are loaded at a time


@triton.jit
def ending(x, d_ptrs, mask, ENDING: tl.constexpr, ACTIVATION: tl.constexpr):
    """``f`` from ``x = y W^T + c``; the mask d is loaded where the ending has one."""
    if ENDING == VALUE:
        out = activations.value(x, ACTIVATION)
    elif ENDING == REFLECTED:
        out = 2.0 * activations.value(x, ACTIVATION) - x
    else:
        d = tl.load(d_ptrs, mask=mask, other=0.0)
        if ENDING == ADJOINT:
            out = d * x
        else:
            out = (2.0 * d - 1.0) * x
    return out


@triton.jit(do_not_specialize=["turn", "B", "max_iter", "patience"])
def step_kernel(
    table_ptr,
    turn,
    B,
    m,
    stride_wn,
    stride_wk,
    stride_c,
    stride_d,
    tol,
    leave,
    max_iter,
    patience,
    ENDING: tl.constexpr,
    ACTIVATION: tl.constexpr,
    HOMOGENEOUS: tl.constexpr,
    ACCELERATION: tl.constexpr,
    DEPTH: tl.constexpr,
    CRITERION: tl.constexpr,
    PRECISION: tl.constexpr,
    INCREMENTS: tl.constexpr,
    SPLITS: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One (BLOCK_B, BLOCK_N) tile of one evaluation, or with SPLITS a share of it; see the head of the file. With
    INCREMENTS it is an anchor of :mod:`.delta`: of the samples that are due, from Y, and leaving X and an increment."""
    tiles_b = tl.cdiv(B, BLOCK_B)
    tiles_n = tl.cdiv(m, BLOCK_N)
    program = tl.program_id(0)
    tile_b, tile_n = tile_of(program // SPLITS, tiles_b, tiles_n)
    counters = ints(table_ptr, COUNTERS)
    if tl.load(counters + LISTS + tile_b) == 0:
        return

    in_b = tl.arange(0, BLOCK_B) < B - tile_b * BLOCK_B
    b = tile_b.to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    marks = ints(table_ptr, MARKS) + b
    live = in_b & (tl.load(marks + STATUS * B, mask=in_b, other=0) == LIVE)
    if INCREMENTS:
        live = live & (tl.load(marks + DUE * B, mask=live, other=0) != 0)
        if tl.max(live.to(tl.int32)) == 0:
            return
    in_n = (tl.arange(0, BLOCK_N) < m - tile_n * BLOCK_N)[None, :]
    inside = in_b[:, None] & in_n
    n = (tile_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N))[None, :]
    at = b[:, None] * m + n
    area = (tile_b.to(tl.int64) * 0 + B) * m
    source = floats(table_ptr, Y if INCREMENTS else FRONT + turn % 2)
    target = floats(table_ptr, FRONT + (turn + 1) % 2)

    share = tl.cdiv(tl.cdiv(m, BLOCK_K), SPLITS) * BLOCK_K
    first = program % SPLITS * share
    last = tl.minimum(first + share, m)
    k = first.to(tl.int64) + tl.arange(0, BLOCK_K)
    y_ptrs = source + b[:, None] * m + k[None, :]
    w_ptrs = floats(table_ptr, W) + n * stride_wn + k[:, None] * stride_wk
    next_k = tl.full((), BLOCK_K, tl.int64)
    x = tl.zeros((BLOCK_B, BLOCK_N), tl.float32)
    if INTERPRETED:  # see cell_kernel
        done = first
        while done < last:
            x = multiply_add(x, y_ptrs, w_ptrs, in_b, in_n, m - done, PRECISION, BLOCK_K)
            y_ptrs += BLOCK_K
            w_ptrs += next_k * stride_wk
            done += BLOCK_K
    else:
        for done in range(first, last, BLOCK_K):
            x = multiply_add(x, y_ptrs, w_ptrs, in_b, in_n, m - done, PRECISION, BLOCK_K)
            y_ptrs += BLOCK_K
            w_ptrs += next_k * stride_wk
    if SPLITS > 1:
        parts = floats(table_ptr, PARTS) + at
        tl.store(parts + program % SPLITS * area, x, mask=inside)
        if not is_last(counters + LISTS + 2 * tiles_b + tile_b * tiles_n + tile_n, SPLITS):
            return
        x = tl.zeros((BLOCK_B, BLOCK_N), tl.float32)
        for part in tl.static_range(SPLITS):
            x += tl.load(parts + part * area, mask=inside, other=0.0, cache_modifier=".cg")

    record = floats(table_ptr, RECORD) + b
    unit = tl.load(record + UNIT * B, mask=in_b, other=1.0)[:, None]
    c = tl.load(floats(table_ptr, C) + b[:, None] * stride_c + n, mask=inside, other=0.0)
    if HOMOGENEOUS:
        c = c * unit
    d_ptrs = floats(table_ptr, D) + b[:, None] * stride_d + n
    x += c
    if INCREMENTS:
        tl.store(floats(table_ptr, X) + at, x, mask=inside & live[:, None])
    out = ending(x, d_ptrs, inside, ENDING, ACTIVATION)
    out = tl.where(in_n, out, 0.0)  # act(0) need not be zero
    step = out - tl.load(source + at, mask=inside, other=0.0)

    held = tl.load(marks + HELD * B, mask=live, other=0)
    place = tl.load(marks + PLACE * B, mask=live, other=0)
    saves = live & overwritten(place, turn, DEPTH)
    if tl.max(saves.to(tl.int32)) > 0:  # the best iterate so far
        kept = tl.load(target + at, mask=inside & (saves & (place < RING))[:, None], other=0.0)
        if ACCELERATION != NONE:
            newest_ptr = floats(table_ptr, VALUES) + turn % DEPTH * area
            kept += tl.load(newest_ptr + at, mask=inside & (saves & (place >= RING))[:, None], other=0.0)
        tl.store(floats(table_ptr, BEST) + at, kept, mask=inside & saves[:, None])
        tl.debug_barrier()  # read before any thread overwrites it

    sums = floats(table_ptr, SUMS) + tile_n.to(tl.int64) * B + b
    field = (tile_n.to(tl.int64) * 0 + tiles_n) * B
    written = inside & live[:, None]
    scaled, size = step, out
    if not HOMOGENEOUS:
        scaled, size = step * unit, out * unit
    if ACCELERATION != NONE:
        windowed = inside & (held > 0)[:, None]
        written = written & (held == 0)[:, None]
        if tl.max(held) > 0:
            newest = turn % DEPTH
            tl.store(floats(table_ptr, VALUES) + newest * area + at, out, mask=windowed)
            tl.store(floats(table_ptr, RESIDUALS) + newest * area + at, step, mask=windowed)
            for r in tl.static_range(DEPTH):
                age = (newest + DEPTH - r) % DEPTH
                present = windowed & (held > tl.where(age == 0, DEPTH, age))[:, None]
                other = tl.load(floats(table_ptr, RESIDUALS) + r * area + at, mask=present, other=0.0)
                if not HOMOGENEOUS:
                    other = other * unit
                other = tl.where(age == 0, scaled, other)
                tl.store(sums + (2 + r) * field, tl.sum(scaled * other, axis=1), mask=held > 0)
    tl.store(target + at, out, mask=written)
    if INCREMENTS:
        scale = tl.load(record + NEXT_SCALE * B, mask=live, other=1.0) if INCREMENTS == FLOAT8 else 1.0
        tl.store(lows(table_ptr, EVEN, INCREMENTS) + at, rounded(step, scale, INCREMENTS), mask=written)
    tl.store(sums, tl.sum(scaled * scaled, axis=1), mask=live)
    tl.store(sums + field, tl.sum(size * size, axis=1), mask=live)
    if is_last(counters + LISTS + tiles_b + tile_b, tiles_n):
        advance(
            table_ptr, turn, B, tile_b, tiles_n, b, live, tol, leave, max_iter, patience,
            HOMOGENEOUS, ACCELERATION, DEPTH, CRITERION, INCREMENTS, SLOTS,
        )  # fmt: skip


# Ending, activation, and the direction in which W is contiguous; reflected endings are little more than these.
_KINDS = (("value", "relu", "rows"), ("value", "gelu", "rows"), ("adjoint", "identity", "columns"))


def registers(tiles: Tiles, increments: str) -> int | None:
    """That a thread of a step may have: those of the tiles, but of few samples and without increments what the compiler
    likes, which seats more blocks."""
    return tiles.registers if increments != "native" or tiles.samples > RAGGED_SAMPLES else None


def compilations() -> list[Compilation]:
    """Every tile with every ending and kind of acceleration; split, ragged and anchoring ones with the dearest."""
    found = []
    for tiles in STEP_TILES:
        found += [
            _step_compilation(tiles, 1, *kind, acceleration, "aligned", "native")
            for kind, acceleration in product(_KINDS, ("none", "on_demand"))
        ]
        dearest = (*_KINDS[1], "on_demand")
        found += [_step_compilation(tiles, 1, *dearest, "aligned", increments) for increments in DELTA_TILES]
        if tiles.samples <= RAGGED_SAMPLES:
            found.append(_step_compilation(tiles, 1, *dearest, "ragged", "native"))
        if tiles.samples <= 16:
            found.append(_step_compilation(tiles, MOST_SPLITS, *dearest, "aligned", "native"))
    return found


def _step_compilation(
    tiles: Tiles,
    splits: int,
    ending: str,
    activation: str,
    weight: str,
    acceleration: str,
    width: str,
    increments: str,
) -> Compilation:
    unit, across = ("stride_wk", "stride_wn") if weight == "rows" else ("stride_wn", "stride_wk")
    accelerates = acceleration != "none"
    constants = {
        unit: 1,
        "ENDING": ENDINGS[ending],
        "ACTIVATION": ACTIVATIONS[activation].number,
        "HOMOGENEOUS": int("adjoint" in ending or ACTIVATIONS[activation].homogeneous),
        "ACCELERATION": ACCELERATIONS[acceleration],
        "DEPTH": 5 if accelerates else 1,
        "CRITERION": 0,
        "PRECISION": "tf32x3",
        "INCREMENTS": INCREMENTS[increments],
        "SPLITS": splits,
        "SLOTS": 32,
        "BLOCK_B": tiles.samples,
        "BLOCK_N": tiles.units,
        "BLOCK_K": tiles.depth,
    }
    what = "step, " if increments == "native" else f"anchor, {increments}, "
    what += "accelerated, " if accelerates else ""
    group = f"{what}{splits} split{'s' if splits > 1 else ''}, {tiles}"
    return Compilation(
        name=f"{group}, {ending} of {activation}, W by {weight}, {width}",
        group=group,
        function="iteration:step_kernel",
        types={
            "table_ptr": "*i64",
            **dict.fromkeys(("turn", "B", "m", across, "stride_c", "stride_d"), "i32"),
            **RULE_TYPES,
        },
        constants=constants,
        aligned=("table_ptr", "m", across, "stride_c", "stride_d") if width == "aligned" else ("table_ptr",),
        warps=tiles.warps,
        stages=tiles.stages,
        registers=registers(tiles, increments),
        oldest=FLOAT8_FROM if increments == "float8" else OLDEST,
    )
