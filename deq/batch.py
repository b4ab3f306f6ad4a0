"""A batch of problems of torch.vmap as one problem of deq: more samples of one weight, or more weights."""

import torch
from torch import Tensor

from . import stats as layout


class Batch:
    """N problems with weights (m, m) or (S, m, m) and samples (B, m) or (S, B, m), each of them batched or not."""

    def __init__(self, size: int, weight_dim: int | None, weight: Tensor):
        self.size, self.weight_dim = size, weight_dim
        self.stacked = weight.dim() - (weight_dim is not None) == 3

    def weight(self, W: Tensor) -> Tensor:
        """One weight for all, or a stack."""
        return W if self.weight_dim is None else W.movedim(self.weight_dim, 0).flatten(0, -3)

    def samples(self, c: Tensor, dim: int | None) -> Tensor:
        """The samples of all problems, where :meth:`weight` wants them."""
        c = c.expand(self.size, *c.shape) if dim is None else c.movedim(dim, 0)
        if self.weight_dim is not None:
            return c.flatten(0, -3)
        return c.transpose(0, 1).flatten(1, 2) if self.stacked else c.flatten(0, 1)

    def apart(self, t: Tensor) -> Tensor:
        """(N, ..., m) of the problems out of their common solution, or (N, ...) out of numbers of its samples."""
        if self.weight_dim is None:
            return t.unflatten(1, (self.size, -1)).transpose(0, 1) if self.stacked else t.unflatten(0, (self.size, -1))
        return t.unflatten(0, (self.size, -1)) if self.stacked else t

    def stats(self, z: Tensor, stats: Tensor) -> Tensor:
        """(N, bytes): every problem's buffer of :mod:`deq.stats`."""
        fields = (read(z, stats) for read in (layout.residual, layout.iterations, layout.status))
        parts = (self.apart(field).reshape(self.size, -1) for field in fields)
        return torch.cat([layout.as_type(part, torch.uint8) for part in parts], 1)


def largest(numbers: Tensor) -> int:
    """The largest of some integers, or 0: of all problems, where vmap shows one."""
    while torch._C._functorch.is_functorch_wrapped_tensor(numbers):
        numbers = torch._C._functorch.get_unwrapped(numbers)
    return int(numbers.max()) if numbers.numel() else 0
