"""Nets whose weight norms are compared: every weight matrix has a trainable scale, or a bound on its norm."""

import torch
from torch import Tensor

from ..solve import solve
from ._nets import F64, EquilibriumNet, FeedForward, uniform


def scales(seeds: int, count: int, device: torch.device) -> list[Tensor]:
    return [torch.zeros(seeds, 1, 1, dtype=F64, device=device, requires_grad=True) for _ in range(count)]


def cut_rows_(weight: Tensor, largest: Tensor | float, dim: int) -> None:
    """Shrink every row of ``weight`` (sums over ``dim``) to an absolute sum of at most ``largest``, in place."""
    weight.mul_((largest / weight.abs().sum(dim, keepdim=True).clamp(min=1e-300)).clamp(max=1))


class ScaledFeedForward(FeedForward):
    """:class:`FeedForward` with weights e^g W, g a scalar of each matrix: norms can grow as fast as Adam's steps in
    g."""

    def __init__(self, seeds: int, inputs: int, width: int, depth: int, generator: torch.Generator):
        super().__init__(seeds, inputs, width, depth, generator)
        self.base, self.g = self.weights, scales(seeds, depth, generator.device)
        self.parameters += self.g
        self.count += depth

    def features(self, x: Tensor) -> Tensor:
        self.weights = [torch.exp(g) * W for g, W in zip(self.g, self.base, strict=True)]
        return super().features(x)

    @torch.no_grad()
    def cap_(self, largest: float) -> None:
        """Shrink weights so that no matrix has an infinity norm above ``largest``."""
        for g, W in zip(self.g, self.base, strict=True):
            cut_rows_(W, largest * torch.exp(-g), 1)
        self.weights = [torch.exp(g) * W for g, W in zip(self.g, self.base, strict=True)]


class SelfLoopDEQ(EquilibriumNet):
    """W = e^g0 (strictly lower) + diag(sigmoid(theta)), the first half of the neurons without bias.

    Its shape is that of construction A of Theorem 2, which is its diagonal part. z_t = relu(c_t + sum_{i<t} w_ti z_i) /
    (1 - w_tt), so that with G = 1 / (1 - w_tt) = 1 + e^theta the equilibrium is G times that of the nilpotent W' G:
    exact after m evaluations, where the plain iteration would take about 1 / (1 - w_tt) of them, 2^d for a slope of
    2^d.
    """

    def __init__(self, seeds: int, inputs: int, width: int, generator: torch.Generator):
        super().__init__(seeds, inputs, width, generator)
        self.full = uniform((seeds, width, width), 1, generator)
        theta = torch.randn((seeds, 1, width), dtype=F64, device=generator.device, generator=generator)
        self.theta = theta.requires_grad_()
        self.g = scales(seeds, 3, generator.device)
        self.with_bias = (torch.arange(width, device=generator.device) >= width // 2).to(F64)
        self.parameters += [self.full, self.theta, *self.g]
        self.count += width * (width + 1) // 2 + 3 - width // 2

    def below(self) -> Tensor:
        return torch.exp(self.g[0]) * self.full.tril(-1)

    def weight(self) -> Tensor:
        return self.below() + torch.diag_embed(torch.sigmoid(self.theta.squeeze(1)))

    def products(self) -> float:
        return self.width * (self.width + 1) / 2

    def injection(self, x: Tensor) -> Tensor:
        return torch.baddbmm(self.b * self.with_bias, x, torch.exp(self.g[1]) * self.U)

    def readout(self, z: Tensor) -> Tensor:
        return torch.baddbmm(self.y0, z, torch.exp(self.g[2]) * self.a).squeeze(-1)

    def equilibrium(self, c: Tensor) -> Tensor:
        G = 1 + torch.exp(self.theta)
        options = {"solver": "plain", "max_iter": self.width + 2, "on_failure": "ignore"}
        return solve(self.below() * G, c, "relu", **options).z * G

    def solved(self, x: Tensor, tol: float, max_iter: int) -> tuple[Tensor, Tensor]:
        """The equilibrium of the nilpotent form, judged by the net's own equation z = relu(W z + c)."""
        G, c = 1 + torch.exp(self.theta), self.injection(x)
        z = solve(self.below() * G, c, "relu", solver="plain", tol=tol, max_iter=max_iter, on_failure="ignore").z * G
        again = torch.relu(torch.baddbmm(c, z, self.weight().mT))
        size = again.norm(dim=-1).clamp(min=torch.finfo(F64).tiny)
        return self.readout(z), (again - z).norm(dim=-1) / size

    def norms(self) -> Tensor:
        U, a = ((torch.exp(g) * p).detach().abs().sum(1).amax(1) for g, p in ((self.g[1], self.U), (self.g[2], self.a)))
        return torch.stack((self.weight().detach().abs().sum(2).amax(1), U, a), 1)

    @torch.no_grad()
    def cap_(self, largest: float) -> None:
        """Shrink weights so that neither W, U nor the readout has an infinity norm above ``largest``."""
        room = largest - torch.sigmoid(self.theta).mT  # beside the diagonal
        self.full.tril_(-1)
        cut_rows_(self.full, room * torch.exp(-self.g[0]), 2)
        cut_rows_(self.U, largest * torch.exp(-self.g[1]), 1)
        cut_rows_(self.a, largest * torch.exp(-self.g[2]), 1)


def largest_norm(net: FeedForward | SelfLoopDEQ) -> Tensor:
    """(S,) the largest infinity norm of a weight matrix."""
    return net.norms().amax(1)
