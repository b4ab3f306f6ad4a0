"""The cell of a deep equilibrium model as one kernel: product with W, injection, activation and residual in one pass.

One template serves three epilogues on the product ``x = z W^T`` of a tile, still in registers:

    cell            out = act(x + c),   and ||out - z||, ||out|| of every sample
    adjoint_cell    out = d * (x + g),  and the same norms, with W = A and z = u
    derivative      out = act'(x + c)

Norms leave the kernel as one partial 2-norm per tile and sample, written to slots of their own and added by the caller
in a fixed order: no atomics, so the same input gives the same bits.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from deq.activations import get_activation
from torch import Tensor

from .activations import derivative as activation_derivative
from .activations import value as activation_value

PRECISIONS = ("ieee", "tf32x3", "tf32")
VALUE, ADJOINT, DERIVATIVE = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
# Triton decides at import whether kernels are compiled or interpreted; the interpreter needs two detours below.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@dataclass(frozen=True)
class Tiles:
    """How the (B, m) output is cut: one program computes ``samples`` x ``units`` of it in steps of ``depth`` along the
    product's inner dimension, with so many warps and so many steps in flight."""

    samples: int
    units: int
    depth: int
    warps: int
    stages: int


# Largest first. TODO measured reasons
TILES = {}


@triton.jit
def cell_kernel(
    z_ptr,
    w_ptr,
    c_ptr,
    d_ptr,
    out_ptr,
    step_ptr,
    size_ptr,
    B,
    M,
    stride_zb,
    stride_zm,
    stride_wn,
    stride_wk,
    stride_cb,
    stride_cm,
    stride_db,
    stride_dm,
    EPILOGUE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    # Programs that run together share few rows of W: a band of GROUP sample tiles goes through all unit tiles.
    tiles_b = tl.cdiv(B, BLOCK_B)
    tiles_n = tl.cdiv(M, BLOCK_N)
    program = tl.program_id(0)
    band = program // (GROUP * tiles_n)
    height = tl.minimum(tiles_b - band * GROUP, GROUP)
    within = program - band * GROUP * tiles_n
    tile_b = band * GROUP + within % height
    tile_n = within // height

    # 64-bit offsets: B * m passes 2**31 long before memory ends.
    rb = tile_b.to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    rn = tile_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    rk = tl.arange(0, BLOCK_K)
    in_b = (rb < B)[:, None]
    in_n = (rn < M)[None, :]
    z_ptrs = z_ptr + rb[:, None] * stride_zb + rk.to(tl.int64)[None, :] * stride_zm
    w_ptrs = w_ptr + rn[None, :] * stride_wn + rk.to(tl.int64)[:, None] * stride_wk
    advance = tl.full((), BLOCK_K, tl.int64)
    inside = in_b & in_n
    c = tl.load(c_ptr + rb[:, None] * stride_cb + rn[None, :] * stride_cm, mask=inside, other=0.0)
    if EPILOGUE != DERIVATIVE:
        z_old = tl.load(z_ptr + rb[:, None] * stride_zb + rn[None, :] * stride_zm, mask=inside, other=0.0)
    if EPILOGUE == ADJOINT:
        d = tl.load(d_ptr + rb[:, None] * stride_db + rn[None, :] * stride_dm, mask=inside, other=0.0)
    if z_ptr.dtype.element_ty == tl.float64:
        x = tl.zeros((BLOCK_B, BLOCK_N), tl.float64)
    else:
        x = tl.zeros((BLOCK_B, BLOCK_N), tl.float32)
    if INTERPRETED:  # Triton 3.6 cannot interpret a range with a run-time end, and compiles only `for` to a pipeline
        k = 0
        while k < M:
            x = _multiply_add(x, z_ptrs, w_ptrs, in_b, in_n, rk < M - k, PRECISION)
            z_ptrs += advance * stride_zm
            w_ptrs += advance * stride_wk
            k += BLOCK_K
    else:
        for k in range(0, M, BLOCK_K):
            x = _multiply_add(x, z_ptrs, w_ptrs, in_b, in_n, rk < M - k, PRECISION)
            z_ptrs += advance * stride_zm
            w_ptrs += advance * stride_wk

    x += c.to(x.dtype)
    if EPILOGUE == VALUE:
        out = activation_value(x, ACTIVATION)
    elif EPILOGUE == ADJOINT:
        out = d.to(x.dtype) * x
    else:
        out = activation_derivative(x, ACTIVATION)
    tl.store(out_ptr + rb[:, None] * M + rn[None, :], out.to(out_ptr.dtype.element_ty), mask=inside)
    if EPILOGUE != DERIVATIVE:
        # The residual is that of `out` before it is rounded to the dtype of the tensors.
        out = tl.where(inside, out, 0.0)  # act(0) may not be zero
        slot = tile_n.to(tl.int64) * B + rb
        tl.store(size_ptr + slot, _row_norms(out), mask=rb < B)
        tl.store(step_ptr + slot, _row_norms(out - z_old.to(x.dtype)), mask=rb < B)


@triton.jit
def _multiply_add(x, z_ptrs, w_ptrs, in_b, in_n, in_k, PRECISION: tl.constexpr):
    """``x + z W^T`` for one step along the inner dimension."""
    z = tl.load(z_ptrs, mask=in_b & in_k[None, :], other=0.0)
    w = tl.load(w_ptrs, mask=in_k[:, None] & in_n, other=0.0)
    if INTERPRETED:  # which multiplies the bit patterns of bfloat16
        z = z.to(x.dtype)
        w = w.to(x.dtype)
    return tl.dot(z, w, x, input_precision=PRECISION, out_dtype=x.dtype)


@triton.jit
def _row_norms(x):
    """2-norm of every row, scaled so that squares of large or small rows neither overflow nor vanish."""
    peak = tl.max(tl.abs(x), axis=1)
    if x.dtype == tl.float64:
        scale = tl.clamp(peak, 2.0**-1000, 2.0**1000)
    else:
        scale = tl.clamp(peak, 2.0**-126, 2.0**126)  # the range in which 1 / scale is a normal number
    y = x * (1.0 / scale)[:, None]
    return tl.sqrt(tl.sum(y * y, axis=1)) * scale
