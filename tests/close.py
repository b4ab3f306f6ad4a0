"""The one accuracy rule of the suite: never a hand-set tolerance."""

import torch
from torch import Tensor


def worst_error(actual: Tensor, exact: Tensor) -> float:
    """Largest relative 2-norm error of any row against the float64 ``exact``; absolute where the exact row is zero."""
    error = (actual.double() - exact).flatten(end_dim=-2).norm(dim=-1)
    size = exact.flatten(end_dim=-2).norm(dim=-1)
    return float((error / torch.where(size > 0, size, 1.0)).max()) if error.numel() else 0.0


def assert_as_accurate(actual: Tensor, plain: Tensor, exact: Tensor) -> None:
    """The worst row is at most twice as wrong as the worst row of plain PyTorch in the same dtype, plus 2 ulp."""
    assert actual.shape == plain.shape == exact.shape
    ours, theirs = worst_error(actual, exact), worst_error(plain, exact)
    assert ours <= 2 * theirs + 2 * torch.finfo(actual.dtype).eps, f"worst error {ours:.2e}, plain PyTorch {theirs:.2e}"


def close(actual, expected):
    """Equal up to the rounding of float64."""
    torch.testing.assert_close(actual, expected, rtol=1e-8, atol=1e-10)
