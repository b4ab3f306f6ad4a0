"""Implicit representations with filters: an equilibrium driven by g(x), and its explicit counterpart of equal size.

"siren": z = sin(W z + a(x)), a = s A x + b. "fourier" and "gabor" (multiplicative filter networks, Fathony et al. 2021,
made implicit by Huang et al. 2021): z = g(x) * (W z + b) with g = sin(s A x + p), for gabor times a Gaussian window in
x. All have |dz/dz| <= ||W||_inf <= ROW_SUM: one equilibrium, where the plain iteration leads.
"""

import math

import torch
from torch import Tensor

from ..fixed_point import fixed_point
from ._dense_nets import ROW_SUM
from ._nets import EquilibriumNet, SeededNet, uniform

F32 = torch.float32
FILTERS = ("siren", "fourier", "gabor")


class FilterParameters(SeededNet):
    """What both kinds share: filter A, p (and window c, w for gabor), W, b and a linear readout, for scalar x."""

    def __init__(self, seeds: int, width: int, generator: torch.Generator, filter: str, scale: float):
        self.width, self.filter, self.scale = width, filter, scale

        def draw(*shape: int, gain: float = 1.0, fan_in: int = 1) -> Tensor:
            return uniform((seeds, *shape), fan_in, generator, gain, F32)

        # A is trained in units of the scale, so that Adam's steps are small against the frequencies.
        self.A, self.p = draw(1, width), draw(1, width, gain=math.pi)
        self.V, self.b = draw(width, width, gain=1.5, fan_in=width), draw(1, width)
        self.a, self.y0 = (
            draw(width, 1, gain=math.sqrt(3), fan_in=width),
            torch.zeros(seeds, 1, 1, dtype=F32).to(generator.device).requires_grad_(),
        )
        self.parameters = [self.A, self.p, self.V, self.b, self.a, self.y0]
        if filter == "gabor":
            self.c, self.w = draw(1, width), draw(1, width)
            self.parameters += [self.c, self.w]
        self.count = sum(p[0].numel() for p in self.parameters)
        self.memory = 2 * width

    def drive(self, x: Tensor) -> Tensor:
        """(S, B, m): the phase of siren, the factor of the others."""
        phase = torch.baddbmm(self.p, x, self.scale * self.A)
        if self.filter == "siren":
            return phase
        g = torch.sin(phase)
        if self.filter == "gabor":
            g = g * torch.exp(-0.5 * (torch.exp(1 + self.w) * (x - self.c)).square())
        return g

    def cell(self, W: Tensor, drive: Tensor, z: Tensor) -> Tensor:
        inner = torch.baddbmm(self.b, z, W.mT)
        return torch.sin(inner + drive) if self.filter == "siren" else drive * inner

    def readout(self, z: Tensor) -> Tensor:
        return torch.baddbmm(self.y0, z, self.a).squeeze(-1)


class FilterDEQ(FilterParameters, EquilibriumNet):
    """The equilibrium, implicit gradient; a solve starts from the last equilibrium, for a batch that is always the
    same."""

    def __init__(self, seeds: int, width: int, generator: torch.Generator, filter: str, scale: float):
        super().__init__(seeds, width, generator, filter, scale)
        self.last, self.solution = None, None

    def weight(self) -> Tensor:
        return self.V * (ROW_SUM / self.V.abs().sum(2, keepdim=True)).clamp(max=1)

    def products(self) -> float:
        return 1.0 if self.solution is None else float(self.solution.iterations.double().mean()) * self.width**2

    def flops(self) -> float:
        return 2.0 * (2 * self.width + self.products())

    def solve(self, x: Tensor, start: Tensor | None, tol: float | None, max_iter: int):
        W, drive = self.weight(), self.drive(x)
        S, B, m = drive.shape
        z0 = torch.zeros_like(drive) if start is None or start.shape != drive.shape else start
        # Samples come first for the solver: S seeds of B points are S B of them.
        return fixed_point(
            lambda z: self.cell(W, drive, z.view(S, B, m)).reshape(S * B, m),
            z0.detach().reshape(S * B, m),
            solver="plain",
            tol=tol,
            max_iter=max_iter,
            on_failure="ignore",
        )

    def __call__(self, x: Tensor) -> Tensor:
        self.solution = sol = self.solve(x, self.last, None, 200)
        z = sol.z.view(*x.shape[:2], self.width)
        self.last = z.detach()
        return self.readout(z)

    def forget(self) -> None:
        self.last = None

    def failed(self) -> Tensor:
        return ~self.solution.converged.view(self.last.shape[:2])

    def status(self) -> Tensor:
        return self.solution.status.view(self.last.shape[:2])

    def solved(self, x: Tensor, tol: float, max_iter: int) -> tuple[Tensor, Tensor]:
        sol = self.solve(x, None, tol, max_iter)
        return self.readout(sol.z.view(*x.shape[:2], self.width)), sol.residual.view(x.shape[:2])


class FilterNet(FilterParameters):
    """The explicit counterpart with the same parameters: the filter, then one more layer through W."""

    def flops(self) -> float:
        return 2.0 * (2 * self.width + self.width**2)

    def __call__(self, x: Tensor) -> Tensor:
        drive = self.drive(x)
        first = torch.sin(drive) if self.filter == "siren" else drive
        return self.readout(self.cell(self.V, torch.zeros_like(drive) if self.filter == "siren" else drive, first))
