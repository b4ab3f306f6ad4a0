"""Anderson's history on a GPU: one pass measures and remembers, one pass mixes.

Between them the weights, a few numbers a sample, are found by torch (deq/solvers/generic/torch_steps.py). ``measure``
moves depth + 3 states: it reads y, f(y) and the older residuals, and writes the new pair; ``mix`` moves depth + 1. No
atomics, so the same input gives the same bits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .compilation import Compilation

BLOCK = 1024  # elements of a row that a program holds at a time


@triton.jit
def _measure(
    y,  # (B, D) points
    fy,  # (B, D) f(y)
    images,  # (B, depth, D)
    residuals,  # (B, depth, D)
    slots,  # (B,) int64: where the new pair goes, or -1 for none
    norms,  # (B, 3) float64: squares of |fy - y|, |fy| and |y|
    dots,  # (B, depth) float64: products of fy - y with every residual, itself included
    D,
    depth: tl.constexpr,
    padded: tl.constexpr,  # depth, to the next power of two
    block: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + row)
    step = tl.zeros((block,), tl.float64)
    size = tl.zeros((block,), tl.float64)
    start = tl.zeros((block,), tl.float64)
    products = tl.zeros((padded, block), tl.float64)
    pair = tl.arange(0, padded)
    first = 0
    while first < D:  # the interpreter of Triton 3.6 has no run-time range
        i = first + tl.arange(0, block)
        inside = i < D
        point = tl.load(y + row * D + i, mask=inside, other=0.0)
        image = tl.load(fy + row * D + i, mask=inside, other=0.0)
        g = image - point
        wide = g.to(tl.float64)
        step += wide * wide
        size += image.to(tl.float64) * image.to(tl.float64)
        start += point.to(tl.float64) * point.to(tl.float64)
        if slot >= 0:
            at = (row * depth + slot) * D + i
            tl.store(images + at, image, mask=inside)
            tl.store(residuals + at, g, mask=inside)
            older = (pair < depth) & (pair != slot)
            places = (row * depth + pair[:, None]) * D + i[None, :]
            old = tl.load(residuals + places, mask=older[:, None] & inside[None, :], other=0.0).to(tl.float64)
            products += tl.where((pair == slot)[:, None], wide[None, :], old) * wide[None, :]
        first += block
    tl.store(norms + row * 3, tl.sum(step))
    tl.store(norms + row * 3 + 1, tl.sum(size))
    tl.store(norms + row * 3 + 2, tl.sum(start))
    if slot >= 0:
        tl.store(dots + row * depth + pair, tl.sum(products, axis=1), mask=pair < depth)


@triton.jit
def _mix(
    images,  # (B, depth, D)
    residuals,  # (B, depth, D)
    a,  # (B, depth) float64: weights of the images
    b,  # (B, depth) float64: weights of the residuals, read where damped
    mixing,  # (B,) bool: rows that are written
    out,  # (B, D)
    D,
    depth: tl.constexpr,
    damped: tl.constexpr,
    block: tl.constexpr,
):
    pieces = tl.cdiv(D, block)
    row = (tl.program_id(0) // pieces).to(tl.int64)
    i = tl.program_id(0) % pieces * block + tl.arange(0, block)
    inside = i < D
    if tl.load(mixing + row):
        total = tl.zeros((block,), tl.float64)
        for j in range(depth):
            at = (row * depth + j) * D + i
            weight = tl.load(a + row * depth + j)
            if weight != 0:
                total += weight * tl.load(images + at, mask=inside, other=0.0).to(tl.float64)
                if damped:
                    total += tl.load(b + row * depth + j) * tl.load(residuals + at, mask=inside, other=0.0).to(
                        tl.float64
                    )
        tl.store(out + row * D + i, total.to(out.dtype.element_ty), mask=inside)


def measure(y: Tensor, fy: Tensor, images: Tensor, residuals: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
    """Norms (B, 3) of fy - y, fy and y, and dots (B, depth) of fy - y with the residuals, both float64.

    y, fy (B, D) and images, residuals (B, depth, D) contiguous, of one floating dtype. Rows with a slot >= 0 get the
    new pair there; the dots of the others are zero.
    """
    B, D = y.shape
    depth = images.shape[1]
    norms = torch.empty(B, 3, dtype=torch.float64, device=y.device)
    dots = torch.zeros(B, depth, dtype=torch.float64, device=y.device)
    padded = triton.next_power_of_2(max(depth, 1))
    if B:
        with torch.cuda.device_of(y):
            _measure[(B,)](y, fy, images, residuals, slots, norms, dots, D, depth, padded, _block(D, padded))
    return norms.sqrt(), dots


def mix(images: Tensor, residuals: Tensor, a: Tensor, b: Tensor | None, mixing: Tensor, out: Tensor) -> Tensor:
    """``out = sum_j a_j images_j + b_j residuals_j`` for the rows where ``mixing`` (B,) is true; others stay.

    images, residuals (B, depth, D), out (B, D) contiguous; a, b (B, depth) float64, b None for zero.
    """
    B, depth, D = images.shape
    if B:
        grid = (B * triton.cdiv(D, BLOCK),)  # of a second dimension CUDA has 65535 at most
        with torch.cuda.device_of(images):
            _mix[grid](images, residuals, a, a if b is None else b, mixing, out, D, depth, b is not None, BLOCK)
    return out


def _block(D: int, padded: int) -> int:
    """Elements at a time: the products of all pairs must fit into registers."""
    return min(max(BLOCK // padded, 32), triton.next_power_of_2(max(D, 1)))


def compilations() -> list[Compilation]:
    """Both kernels at the default depth and the deepest, for wide float32 and float64 states."""
    return [
        variant
        for kind in ("fp32", "fp64")
        for depth in (5, 8)
        for variant in (_measure_variant(kind, depth), _mix_variant(kind, depth))
    ]


def _measure_variant(kind: str, depth: int) -> Compilation:
    states = dict.fromkeys(("y", "fy", "images", "residuals"), f"*{kind}")
    padded = triton.next_power_of_2(depth)
    return Compilation(
        name=f"history, measure, {kind}, depth {depth}",
        group=f"history, measure, {kind}",
        function="history:_measure",
        types=states | {"slots": "*i64", "norms": "*fp64", "dots": "*fp64", "D": "i32"},
        constants={"depth": depth, "padded": padded, "block": _block(BLOCK, padded)},
        aligned=(*states, "slots", "norms", "dots", "D"),
        warps=4,
        stages=3,
    )


def _mix_variant(kind: str, depth: int) -> Compilation:
    states = dict.fromkeys(("images", "residuals", "out"), f"*{kind}")
    return Compilation(
        name=f"history, mix, {kind}, depth {depth}",
        group=f"history, mix, {kind}",
        function="history:_mix",
        types=states | {"a": "*fp64", "b": "*fp64", "mixing": "*i1", "D": "i32"},
        constants={"depth": depth, "damped": False, "block": BLOCK},
        aligned=(*states, "a", "b", "mixing", "D"),
        warps=4,
        stages=3,
    )
