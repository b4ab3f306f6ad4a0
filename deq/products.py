"""Products of dense matrices: by the compiled kernels on a CPU, by torch elsewhere.

On a core of AMD torch's product is half as fast as the compiled one or less (float32, one thread, Zen 5: 113 to 231 of
283 GFLOP/s at 1024 x 1024, 109 to 231 at 128 x 128), and a row of the compiled one has the same bits whichever rows are
beside it.
"""

from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import _library
from .backward import backward_pass
from .cache import is_plain

DTYPES = (torch.float32, torch.float64)
# Flops of a linear layer's product from which it gains more than a Function in Python costs: 20 us of a training step.
LINEAR_FROM = 8e6


def serves(left: Tensor, right: Tensor) -> bool:
    """Whether the compiled kernels multiply these."""
    if left.dim() != right.dim() or left.dim() not in (2, 3) or not all(_fits(t, left.dtype) for t in (left, right)):
        return False
    return not (torch.is_grad_enabled() and (left.requires_grad or right.requires_grad))


def _fits(t: Tensor, dtype: torch.dtype) -> bool:
    """Whether t is of a kind and of the dtype that the compiled kernels multiply."""
    return _library.compiled is not None and t.is_cpu and t.dtype == dtype and dtype in DTYPES and is_plain(t)


def multiply(left: Tensor, right: Tensor, out: Tensor | None = None, factor: float = 1.0, adds: bool = False) -> Tensor:
    """``factor left right``, or with ``adds`` that added to ``out``.

    left (n, k) and right (k, m), or (S, n, k) and (S, k, m), any strides; out (n, m) or (S, n, m), its rows contiguous,
    must not overlap with them. Differentiable where no ``out`` is given.
    """
    if not serves(left, right):
        if out is None:
            product = torch.matmul(left, right)
            return product if factor == 1.0 else factor * product
        return (torch.addmm if out.dim() == 2 else torch.baddbmm)(
            out, left, right, beta=int(adds), alpha=factor, out=out
        )
    if out is None:
        out = left.new_empty((*left.shape[:-1], right.shape[-1]))
    torch.ops.deq.product_.default(left, right, out, factor, int(adds), 0)
    return out


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x W^T + b``, as :func:`torch.nn.functional.linear` and with its gradients to any order.

    x (..., n), weight (m, n), bias (m,). By the compiled kernels where torch's are slow, on CPUs of AMD, and the
    product is large; by torch itself in every other case, and wherever torch.func, torch.compile, autocast or the
    forward mode watch. Training steps of ``deq.nn.EquilibriumLinear`` by torch and by these, Zen 5: 1.16 at 1024 x 256
    with 1024 features, 1.12 to 1.16 at 256 x 256 with 256, 1.4 at 128 x 512 with 784.
    """
    if torch.compiler.is_compiling():  # sizes that are asked for are no longer dynamic
        return torch.nn.functional.linear(x, weight, bias)
    tensors = (x, weight) if bias is None else (x, weight, bias)
    fits = x.dim() > 0 and weight.shape[1:] == x.shape[-1:] and (bias is None or bias.shape == weight.shape[:1])
    is_large = fits and 2.0 * x.numel() * weight.shape[0] >= LINEAR_FROM
    watched = torch.is_autocast_enabled("cpu") or forward_ad._current_level >= 0
    if watched or not (is_large and _is_on_amd() and all(_fits(t, x.dtype) for t in tensors)):
        return torch.nn.functional.linear(x, weight, bias)
    y = _Linear.apply(x.reshape(-1, x.shape[-1]), weight, bias)
    return y.reshape(*x.shape[:-1], weight.shape[0])


@lru_cache(maxsize=1)
def _is_on_amd() -> bool:
    info = Path("/proc/cpuinfo")
    return info.is_file() and "AuthenticAMD" in info.read_text()


class _Linear(torch.autograd.Function):
    """(x (B, n), W (m, n), b (m,) or None) -> (B, m)."""

    @staticmethod
    def forward(ctx, x, W, b):
        ctx.save_for_backward(x, W)
        out = x.new_empty(len(x), len(W))
        if b is not None:
            out.copy_(b)
        return multiply(x, W.mT, out, adds=b is not None)

    @staticmethod
    @backward_pass
    def backward(ctx, g):
        x, W = ctx.saved_tensors
        needs_x, needs_W, needs_b = ctx.needs_input_grad
        dx = multiply(g, W) if needs_x else None
        dW = multiply(g.mT, x) if needs_W else None
        return dx, dW, g.sum(0) if needs_b else None
