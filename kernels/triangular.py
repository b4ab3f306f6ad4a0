"""Lower triangular W: ``z = act(W z + c)`` by one blocked forward substitution, or the same of the adjoint.

A program takes BLOCK_B samples through all outputs, BLOCK at a time. What earlier blocks contribute to a block is a
product on tensor cores, of outputs read back from memory; within the block the outputs follow one by one, each a scalar
root (:func:`.diagonal.root`) or, with a mask s, ``u = s (x + g) / (1 - s w)``. The transpose of a lower triangular
matrix is solved from the last output to the first.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from deq.activations import ACTIVATIONS, get_activation

from . import activations
from .compilation import Compilation
from .diagonal import root

BLOCK_B = 16
BLOCK = 32
WIDE_FROM = 1 << 31  # elements that W reaches over, of which 32 bits cannot tell the last; wider places cost registers


def substitute(
    W: Tensor,
    c: Tensor,
    activation: str | None,
    *,
    mask: Tensor | None = None,
    strict: bool = False,
    upper: bool = False,
) -> tuple[Tensor, Tensor]:
    """``z = act(T z + c)``, or with ``mask`` s ``u = s * (T u + c)``; T is the lower triangle of W (m, m), with
    ``upper`` its upper one, either without its diagonal where ``strict``.

    W (m, m), any strides, c and mask (B, m): float32. Returns z (B, m) and its residual (B,), NaN for a row that is not
    finite. ``1 - w act'`` must be positive for every diagonal element w.
    """
    number = 0 if activation is None else get_activation(activation).number
    B, m = c.shape
    W, c = W.resolve_neg(), c.resolve_neg().contiguous()
    mask = None if mask is None else mask.resolve_neg().contiguous()
    z = torch.empty_like(c)
    residual = c.new_empty(B)
    if B > 0:
        with torch.cuda.device_of(c):
            substitute_kernel[(triton.cdiv(B, BLOCK_B),)](
                W,
                c,
                mask,
                z,
                residual,
                B,
                m,
                *W.stride(),
                ACTIVATION=number,
                STRICT=strict,
                UPPER=upper,
                WIDE=m * max(W.stride()) >= WIDE_FROM,
                BLOCK_B=BLOCK_B,
                BLOCK=BLOCK,
                enable_fp_fusion=True,
            )
    return z, residual


@triton.jit(do_not_specialize=["B"])
def substitute_kernel(
    w_ptr,
    c_ptr,
    mask_ptr,
    z_ptr,
    residual_ptr,
    B,
    m,
    stride_wn,
    stride_wk,
    ACTIVATION: tl.constexpr,
    STRICT: tl.constexpr,
    UPPER: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """BLOCK_B samples; outputs are counted in the order in which they are solved, and :func:`_place` says where they
    lie."""
    b = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    in_b = b < B
    rows = (b * m)[:, None]
    # In double, as squares of float32 leave its range: those of a tanh beside a large c below.
    step2 = tl.zeros((BLOCK_B,), tl.float64)
    size2 = tl.zeros((BLOCK_B,), tl.float64)
    first = 0
    while first < m:
        n = first + tl.arange(0, BLOCK)
        inside = in_b[:, None] & (n < m)[None, :]
        at = rows + _place(n, m, UPPER)[None, :]
        x = tl.zeros((BLOCK_B, BLOCK), tl.float32)
        before = 0
        while before < first:
            k = before + tl.arange(0, BLOCK)
            earlier = tl.load(z_ptr + rows + _place(k, m, UPPER)[None, :], mask=in_b[:, None], other=0.0)
            w = tl.load(
                w_ptr + _row(n, m, UPPER, WIDE)[None, :] * stride_wn + _row(k, m, UPPER, WIDE)[:, None] * stride_wk,
                mask=(n < m)[None, :],
                other=0.0,
            )
            x = tl.dot(earlier, w, x, input_precision="tf32x3")
            before += BLOCK
        x += tl.load(c_ptr + at, mask=inside, other=0.0)
        if mask_ptr is not None:
            s = tl.load(mask_ptr + at, mask=inside, other=0.0)
        z = tl.zeros((BLOCK_B, BLOCK), tl.float32)
        i = 0
        while (i < BLOCK) & (first + i < m):
            here = (tl.arange(0, BLOCK) == i)[None, :]
            own = tl.sum(tl.where(here, x, 0.0), axis=1)
            place = _row(first + i, m, UPPER, WIDE)
            w = own * 0.0
            if not STRICT:
                w += tl.load(w_ptr + place * stride_wn + place * stride_wk)
            if mask_ptr is not None:
                slope = tl.sum(tl.where(here, s, 0.0), axis=1)
                value = slope * own / (1.0 - slope * w)
                f = slope * (w * value + own)
            else:
                value = root(w, own, ACTIVATION)[0]
                f = activations.value(w * value + own, ACTIVATION)
            step, size = f.to(tl.float64) - value.to(tl.float64), f.to(tl.float64)
            step2 += step * step
            size2 += size * size
            z = tl.where(here, value[:, None], z)
            later = (tl.arange(0, BLOCK) > i) & (n < m)
            column = tl.load(w_ptr + _row(n, m, UPPER, WIDE) * stride_wn + place * stride_wk, mask=later, other=0.0)
            x += value[:, None] * column[None, :]
            i += 1
        tl.store(z_ptr + at, z, mask=inside)
        tl.debug_barrier()  # the next blocks read it
        first += BLOCK
    residual = tl.where(step2 == 0.0, 0.0, tl.sqrt(step2 / tl.where(size2 == 0.0, 1.0, size2)))
    tl.store(residual_ptr + b, residual.to(tl.float32), mask=in_b)


@triton.jit
def _place(n, m, UPPER: tl.constexpr):
    """The output that is solved n-th."""
    if UPPER:
        n = tl.maximum(m - 1 - n, 0)
    return n


@triton.jit
def _row(n, m, UPPER: tl.constexpr, WIDE: tl.constexpr):
    """The same, as a row or column of W."""
    place = _place(n, m, UPPER)
    if WIDE:
        place = tl.full((), 1, tl.int64) * place
    return place


def compilations() -> list[Compilation]:
    """The substitution with a closed root and with Newton's method, and the adjoint of a transposed weight."""
    return [_compilation("relu", False), _compilation("gelu", False), _compilation("identity", True)]


def _compilation(activation: str, masked: bool) -> Compilation:
    pointers = ("w_ptr", "c_ptr", "z_ptr", "residual_ptr", *(("mask_ptr",) if masked else ()))
    unit, across = ("stride_wn", "stride_wk") if masked else ("stride_wk", "stride_wn")
    return Compilation(
        name=f"substitution, {'adjoint' if masked else activation}",
        group=f"substitution, {'adjoint' if masked else activation}",
        function="triangular:substitute_kernel",
        types=dict.fromkeys(pointers, "*fp32") | dict.fromkeys(("B", "m", across), "i32"),
        constants={
            unit: 1,
            "ACTIVATION": ACTIVATIONS[activation].number,
            "STRICT": 0,
            "UPPER": int(masked),
            "WIDE": 0,
            "BLOCK_B": BLOCK_B,
            "BLOCK": BLOCK,
        }
        | ({} if masked else {"mask_ptr": None}),
        aligned=(*pointers, "m", across),
        warps=4,
        stages=3,
    )
