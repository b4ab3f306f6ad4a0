"""Diagonal W: every element of ``z = act(d z + x)`` is a scalar equation, solved in one kernel with its residual."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from deq.activations import ACTIVATIONS, LEAKY_SLOPE, get_activation

from . import activations
from .activations import IDENTITY, LEAKY_RELU, RELU
from .compilation import Compilation
from .tiles import MOST_REGISTERS

BLOCK = 1024
_NEWTON_ALONE = tl.constexpr(8)  # steps; then it takes turns with bisection
_MOST_STEPS = tl.constexpr(8 + 2 * 32)  # a bracket that loses half of its numbers at every second one is used up
_EPS = tl.constexpr(torch.finfo(torch.float32).eps)
_LARGEST = tl.constexpr(torch.finfo(torch.float32).max)
_LEAKY = tl.constexpr(LEAKY_SLOPE)


@triton.jit
def root(d, x, ACTIVATION: tl.constexpr):
    """``z = act(p)`` and ``p = d z + x``, elementwise, float32; ``1 - d act'`` must be positive everywhere, as
    :func:`deq.direct.roots.has_unique_root` says. Closed for the piecewise linear activations, else Newton's method
    within a bracket, step by step as :func:`deq.direct.roots.scalar_root` does it and explains."""
    if ACTIVATION == IDENTITY:
        p = x / (1.0 - d)
        z = p
    elif ACTIVATION == RELU:
        p = tl.where(x > 0, x / (1.0 - d), x)
        z = activations.value(p, ACTIVATION)
    elif ACTIVATION == LEAKY_RELU:
        p = x / tl.where(x > 0, 1.0 - d, 1.0 - d * _LEAKY)
        z = activations.value(p, ACTIVATION)
    else:
        p = x
        z = activations.value(p, ACTIVATION)
        moved = d * z
        h = -moved
        reach = 1.01 * tl.abs(h) / activations.least_slope(d, ACTIVATION)
        low, high = tl.maximum(x - reach, -_LARGEST), tl.minimum(x + reach, _LARGEST)
        s, step, done = _judge(d, x, p, moved, h, ACTIVATION)
        n = 0
        while (n < _MOST_STEPS) & (tl.min(done.to(tl.int32)) == 0):
            low = tl.where(h < 0, p, low)
            high = tl.where(h > 0, p, high)
            following = p - step
            following = tl.where((following > low) & (following < high), following, 0.5 * low + 0.5 * high)
            if (n >= _NEWTON_ALONE) & (n % 2 == 0):
                following = _middle(low, high)
            p = tl.where(done, p, following)
            z = tl.where(done, z, activations.value(p, ACTIVATION))
            moved = d * z
            h = tl.where(done, h, p - moved - x)  # of the first p = x it has more digits
            s, step, done = _judge(d, x, p, moved, h, ACTIVATION)
            n += 1
        finite = tl.abs(step) < float("inf")
        p = tl.where(finite, p - step, p)
        z = tl.where(finite, z - s * step, z)
    return z, p


@triton.jit
def _judge(d, x, p, moved, h, ACTIVATION: tl.constexpr):
    """``act'(p)``, Newton's next step, and whether ``h = p - moved - x`` is its own rounding or that step would be
    changed by its curvature in less than p's."""
    s = activations.derivative(p, ACTIVATION)
    step = h / (1.0 - d * s)
    exact = tl.abs(h) <= (tl.abs(p) + tl.abs(moved) + tl.abs(x)) * (2.0 * _EPS)
    near = step * step <= tl.minimum(tl.abs(p), 1.0) * (0.25 * _EPS)
    done = (exact | (near & (tl.abs(step) <= 0.5 * tl.abs(p)))) & (tl.abs(h) < float("inf"))
    return s, step, done | ~(tl.abs(x) < float("inf"))


@triton.jit
def _middle(a, b):
    """The float32 in the middle between a and b, both finite, by counting the numbers there are."""
    i, k = _ordered(a.to(tl.int32, bitcast=True)), _ordered(b.to(tl.int32, bitcast=True))
    return _ordered((i & k) + ((i ^ k) >> 1)).to(tl.float32, bitcast=True)


@triton.jit
def _ordered(bits):
    """float32 bits to integers of the same order, and back."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def solve_diagonal(
    d: Tensor, x: Tensor, activation: str, derives: bool = False
) -> tuple[Tensor, Tensor, Tensor | None]:
    """``z = act(d z + x)`` of d (m,) and x (B, m), float32, any strides: z (B, m), the residual
    ``||act(d z + x) - z|| / ||act(d z + x)||`` (B,), and with ``derives`` also ``act'(d z + x)`` (B, m), else None.

    A row of x that is not finite has the residual NaN, but for infinity where the activation is flat, as tanh on both
    sides and relu below zero: who has to refuse it looks at x. Raises ValueError for wrong shapes, dtypes and devices.
    """
    number = get_activation(activation).number
    B, m = x.shape
    if d.shape != (m,) or d.dtype != torch.float32 or x.dtype != torch.float32 or d.device != x.device:
        raise ValueError(
            f"d must be ({m},) float32 on {x.device} beside x {tuple(x.shape)} float32; "
            f"got d {tuple(d.shape)} {d.dtype} on {d.device}, x {x.dtype}"
        )
    d, x = d.resolve_neg().contiguous(), x.resolve_neg().contiguous()
    z = torch.empty_like(x)
    residual = x.new_empty(B)
    slope = torch.empty_like(x) if derives else None
    if B > 0:
        with torch.cuda.device_of(x):
            block = min(BLOCK, triton.next_power_of_2(m))
            options = {"maxnreg": MOST_REGISTERS, "enable_fp_fusion": True}
            diagonal_kernel[(B,)](d, x, z, slope, residual, m, ACTIVATION=number, BLOCK=block, **options)
    return z, residual, slope


@triton.jit
def diagonal_kernel(d_ptr, x_ptr, z_ptr, slope_ptr, residual_ptr, m, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):
    """One row. Its sums are of elements times a power of two that brings the largest near 1."""
    row = tl.program_id(0).to(tl.int64) * m
    largest = 0.0
    at = 0
    while at < m:
        j = at + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + row + j, mask=j < m, other=0.0)
        z, p = root(tl.load(d_ptr + j, mask=j < m, other=0.0), x, ACTIVATION)
        tl.store(z_ptr + row + j, z, mask=j < m)
        if slope_ptr is not None:
            tl.store(slope_ptr + row + j, activations.derivative(p, ACTIVATION), mask=j < m)
        largest = tl.maximum(largest, tl.max(tl.where((tl.abs(x) < float("inf")) & (j < m), tl.abs(z), 0.0)))
        at += BLOCK
    tl.debug_barrier()
    unit = 1.0 / tl.maximum(largest, 1e-30)
    step2, size2 = 0.0, 0.0
    at = 0
    while at < m:
        j = at + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + row + j, mask=j < m, other=0.0)
        z = tl.load(z_ptr + row + j, mask=j < m, other=0.0)
        f = activations.value(tl.load(d_ptr + j, mask=j < m, other=0.0) * z + x, ACTIVATION)
        f = tl.where(j < m, f * unit, 0.0)
        step = f - tl.where(j < m, z * unit, 0.0)
        step2 += tl.sum(step * step)
        size2 += tl.sum(f * f)
        at += BLOCK
    residual = tl.where(step2 == 0.0, 0.0, tl.sqrt(step2 / tl.where(size2 == 0.0, 1.0, size2)))
    residual = tl.where((step2 > 0.0) & (size2 == 0.0), float("inf"), residual)
    tl.store(residual_ptr + tl.program_id(0), residual)


def compilations() -> list[Compilation]:
    """A closed form and Newton's method, with and without the derivative."""
    return [_compilation(activation, derives) for activation in ("relu", "gelu") for derives in (False, True)]


def _compilation(activation: str, derives: bool) -> Compilation:
    pointers = ("d_ptr", "x_ptr", "z_ptr", "residual_ptr", *(("slope_ptr",) if derives else ()))
    return Compilation(
        name=f"diagonal, {activation}{', with its derivative' if derives else ''}",
        group=f"diagonal, {activation}",
        function="diagonal:diagonal_kernel",
        types=dict.fromkeys(pointers, "*fp32") | {"m": "i32"},
        constants={"ACTIVATION": ACTIVATIONS[activation].number, "BLOCK": BLOCK}
        | ({} if derives else {"slope_ptr": None}),
        aligned=(*pointers, "m"),
        warps=4,
        stages=3,
        registers=MOST_REGISTERS,
    )
