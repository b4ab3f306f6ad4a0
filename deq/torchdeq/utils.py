"""torchdeq's helpers: checkpointing and the half-Gaussian start."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def mem_gc(func: Callable, in_args: tuple | None = None):
    """``func(*in_args)`` without keeping what its backward pass needs: that is computed again there."""
    return checkpoint(func, *(in_args or ()), use_reentrant=False)


def mixed_init(z_shape: tuple[int, ...], device: torch.device | str | None = None) -> Tensor:
    """Standard normal where a fair coin says so, else zero: a start for path independence (Anil et al. 2022)."""
    return torch.randn(*z_shape, device=device) * torch.empty(*z_shape, device=device).bernoulli_(0.5)


__all__ = ["mem_gc", "mixed_init"]
