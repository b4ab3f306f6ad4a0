"""Modules that own the raw parameters of a weight and return it as a structure of :mod:`deq.weights`.

All start with ``W z`` adding about a fifth to the variance of c and the plain iteration gaining a factor of about 0.4 a
step. A Gaussian matrix with entries of variance ``gain^2 / m``, gain = 0.45, does: its spectral radius is the gain and
its 2-norm twice that. In small widths both scatter, so the norm is cut at ``gain (2 - 1 / sqrt(m))``, which is the gain
at m = 1. Gain and bounds are divided by the activation's Lipschitz constant where that is above 1 (gelu, silu).
"""

import torch
from torch import Tensor, nn

from ..weights import (
    EXACT_UP_TO,
    Dense,
    Diagonal,
    DiagonalLowRank,
    LowerTriangular,
    Structure,
    bounded,
    bounded_triangular,
    contractive,
    monotone,
)

GAIN = 0.45
BOUND = 0.95


class WeightModule(nn.Module):
    """Base of the weights: ``module()`` is the structure, ``module.width`` its m.

    lipschitz: sup |act'| of the activation that the weight is meant for; the limits below are divided by it if above 1.
    """

    def __init__(self, width: int, lipschitz: float = 1.0):
        super().__init__()
        if not isinstance(width, int) or width < 1:
            raise ValueError(f"width must be a positive integer; got {width!r}")
        self.width = width
        self.gain = GAIN / max(1.0, lipschitz)
        self.bound = BOUND / max(1.0, lipschitz)

    def reset_parameters(self) -> None:
        """Draw the parameters afresh from torch's global generator."""
        raise NotImplementedError  # abstract: every subclass has its own

    def forward(self) -> Structure:
        raise NotImplementedError  # abstract: every subclass has its own

    def extra_repr(self) -> str:
        return f"width={self.width}"

    def _gaussian_(self, V: Tensor) -> None:
        V.normal_(0.0, self.gain / self.width**0.5)
        V.mul_(self._shrink(V))

    def _shrink(self, *terms: Tensor) -> Tensor | float:
        """Factor of at most 1 that takes the sum of the terms' norms below the limit of small widths."""
        if self.width > EXACT_UP_TO:
            return 1.0
        limit = self.gain * (2.0 - self.width**-0.5)
        return (limit / sum(map(_norm, terms))).clamp(max=1.0)


class DenseWeight(WeightModule):
    """``W`` itself: anything may become of it in training."""

    def __init__(self, width: int, lipschitz: float = 1.0, device=None, dtype=None):
        super().__init__(width, lipschitz)
        self.W = nn.Parameter(torch.empty(width, width, device=device, dtype=dtype))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        self._gaussian_(self.W)

    def forward(self) -> Dense:
        return Dense(self.W)


class ContractiveWeight(WeightModule):
    """``W = contractive(V)``: ||W||_2 <= bound, one equilibrium for every activation."""

    def __init__(self, width: int, lipschitz: float = 1.0, device=None, dtype=None):
        super().__init__(width, lipschitz)
        self.V = nn.Parameter(torch.empty(width, width, device=device, dtype=dtype))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        self._gaussian_(self.V)

    def forward(self) -> Dense:
        return Dense(contractive(self.V, self.bound))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, bound={self.bound:.4g}"


class MonotoneWeight(WeightModule):
    """``W = monotone(A, B, mu)``: one equilibrium for every activation of the table but gelu and silu."""

    def __init__(self, width: int, lipschitz: float = 1.0, device=None, dtype=None, mu: float = 0.1):
        super().__init__(width, lipschitz)
        if not 0.0 < mu <= 1.0:
            raise ValueError(f"mu must lie in (0, 1]; got {mu!r}")
        self.mu = mu
        self.A = nn.Parameter(torch.empty(width, width, device=device, dtype=dtype))
        self.B = nn.Parameter(torch.empty(width, width, device=device, dtype=dtype))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """``A = sqrt(1 - mu) I + E`` cancels the identity: what is left of W is Gaussian to first order in E and B."""
        root = (1.0 - self.mu) ** 0.5
        std = 0.5 * self.gain / self.width**0.5
        wide = torch.promote_types(self.A.dtype, torch.float32)
        E, B = (torch.empty_like(p, dtype=wide).normal_(0.0, std) for p in (self.A, self.B))
        shrink = self._shrink(B - B.mT - root * (E + E.mT), E.mT @ E)
        E, B = shrink * E, shrink * B
        self.A.copy_(E + root * torch.eye(self.width, dtype=wide, device=E.device))
        self.B.copy_(B)

    def forward(self) -> Dense:
        return Dense(monotone(self.A, self.B, self.mu))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, mu={self.mu:.4g}"


class LowerTriangularWeight(WeightModule):
    """``W = bounded_triangular(V)``: one equilibrium for every activation."""

    def __init__(self, width: int, lipschitz: float = 1.0, device=None, dtype=None):
        super().__init__(width, lipschitz)
        self.V = nn.Parameter(torch.empty(width, width, device=device, dtype=dtype))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        self._gaussian_(self.V)
        self.V.tril_()

    def forward(self) -> LowerTriangular:
        return LowerTriangular(bounded_triangular(self.V, self.bound))


class DiagonalWeight(WeightModule):
    """``W = diag(bounded(v))``: one equilibrium for every activation."""

    def __init__(self, width: int, lipschitz: float = 1.0, device=None, dtype=None):
        super().__init__(width, lipschitz)
        self.v = nn.Parameter(torch.empty(width, device=device, dtype=dtype))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        self.v.uniform_(-self.gain, self.gain)

    def forward(self) -> Diagonal:
        return Diagonal(bounded(self.v, self.bound))


class DiagonalLowRankWeight(WeightModule):
    """``W = diag(bounded(v)) + P Q^T`` with P and Q (m, rank): anything may become of the second term in training."""

    def __init__(self, width: int, lipschitz: float = 1.0, device=None, dtype=None, rank: int = 16):
        super().__init__(width, lipschitz)
        if not isinstance(rank, int) or rank < 1:
            raise ValueError(f"rank must be a positive integer; got {rank!r}")
        self.rank = min(rank, width)
        self.v = nn.Parameter(torch.empty(width, device=device, dtype=dtype))
        self.P = nn.Parameter(torch.empty(width, self.rank, device=device, dtype=dtype))
        self.Q = nn.Parameter(torch.empty(width, self.rank, device=device, dtype=dtype))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        self.v.uniform_(-0.5 * self.gain, 0.5 * self.gain)
        for factor in (self.P, self.Q):
            factor.normal_()
            factor.mul_((0.5 * self.gain) ** 0.5 / _norm(factor))

    def forward(self) -> DiagonalLowRank:
        return DiagonalLowRank(bounded(self.v, self.bound), self.P, self.Q)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rank={self.rank}"


WEIGHTS = {
    "dense": DenseWeight,
    "contractive": ContractiveWeight,
    "monotone": MonotoneWeight,
    "lower_triangular": LowerTriangularWeight,
    "diagonal": DiagonalWeight,
    "diagonal_low_rank": DiagonalLowRankWeight,
}


def _norm(V: Tensor) -> Tensor:
    """||V||_2, also of half precision."""
    return torch.linalg.matrix_norm(V.to(torch.promote_types(V.dtype, torch.float32)), 2)
