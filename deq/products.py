"""Products of dense matrices: by the compiled kernels on a CPU, by torch elsewhere.

On a core of AMD torch's product is half as fast as the compiled one or less (float32, one thread, Zen 5: 113 to 231 of
283 GFLOP/s at 1024 x 1024, 109 to 231 at 128 x 128), and a row of the compiled one has the same bits whichever rows are
beside it.
"""

import torch
from torch import Tensor

from . import _library
from .cache import is_plain

DTYPES = (torch.float32, torch.float64)


def serves(left: Tensor, right: Tensor) -> bool:
    """Whether the compiled kernels multiply these."""
    if _library.compiled is None or not (left.is_cpu and right.is_cpu and left.dtype == right.dtype in DTYPES):
        return False
    if left.dim() != right.dim() or left.dim() not in (2, 3) or not (is_plain(left) and is_plain(right)):
        return False
    return not (torch.is_grad_enabled() and (left.requires_grad or right.requires_grad))


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
