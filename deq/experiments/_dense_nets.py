"""Nets with a full weight: equilibria found by the engine, and the same net cut off after K steps."""

import math
import warnings

import torch
from torch import Tensor

from ..solution import ConvergenceWarning, Solution, Status
from ..solve import solve
from ._nets import F64, EquilibriumNet, uniform

ROW_SUM = 0.95  # bound on ||W||_inf of a contractive weight
MU = 0.05  # sym(I - W) >= MU of a monotone weight: slow modes gain up to 1 / MU
PARAMETRISATIONS = ("contractive", "monotone", "free")


class DenseDEQ(EquilibriumNet):
    """y = a z + y0 at the equilibrium z = relu(W z + U x + b), implicit gradient, exact to the engine's tolerance.

    parametrisation of W: "contractive": rows of V scaled to ||W||_inf <= ROW_SUM; "monotone": (1 - mu) I - A^T A + B -
    B^T (Winston and Kolter 2020), the largest known class with one equilibrium for every input; "free": W = V, which
    may lose its equilibrium in training: ``failed()`` then says where. With ``warm`` a solve starts from the last
    equilibrium, for batches that are the same at every step.
    """

    def __init__(
        self,
        seeds: int,
        inputs: int,
        width: int,
        generator: torch.Generator,
        parametrisation: str = "contractive",
        dtype: torch.dtype = F64,
        kinks: float | None = None,
        warm: bool = False,
        max_iter: int = 500,
    ):
        super().__init__(seeds, inputs, width, generator, dtype, kinks)
        self.parametrisation = parametrisation
        shape, gain = (seeds, width, width), math.sqrt(3)  # entries of variance 1 / m
        if parametrisation == "monotone":
            # A close to a multiple of I cancels the identity in W: what is left starts as small as a contractive W.
            noise = 0.25 * uniform(shape, width, generator, gain, dtype).detach()
            A = noise + math.sqrt(1 - MU) * torch.eye(width, dtype=dtype, device=generator.device)
            self.A = A.requires_grad_()
            self.B = (0.25 * uniform(shape, width, generator, gain, dtype)).detach().requires_grad_()
            self.parameters += [self.A, self.B]
        else:
            self.V = (0.5 * uniform(shape, width, generator, gain, dtype)).detach().requires_grad_()
            self.parameters.append(self.V)
        self.count += width * width  # A and B together reach a set of dimension m^2
        self.warm, self.max_iter = warm, max_iter
        self.tol: float | None = None  # of the solves; the engine's own if None
        self.last: Solution | None = None

    def weight(self) -> Tensor:
        if self.parametrisation == "monotone":
            eye = torch.eye(self.width, dtype=self.A.dtype, device=self.A.device)
            return (1 - MU) * eye - self.A.mT @ self.A + self.B - self.B.mT
        if self.parametrisation == "contractive":
            return _BoundedRows.apply(self.V)
        return self.V

    def products(self) -> float:
        """With the mean number of evaluations of the last call, the first of which multiplies nothing."""
        evaluations = 1.0 if self.last is None else float(self.last.iterations.double().mean())
        return (evaluations - 1) * self.width**2

    def training_flops(self) -> float:
        """The adjoint takes about as many evaluations as the forward solve, and dW is one more product."""
        outside = 3 * 2 * self.width * (self.inputs + 1)
        return outside + 2 * (2 * self.products() + self.width**2)

    def equilibrium(self, c: Tensor) -> Tensor:
        start = self.last.z if self.warm and self.last is not None and self.last.z.shape == c.shape else None
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore", ConvergenceWarning
            )  # failed() tells; the adjoint's own warning is not muted
            sol = solve(self.weight(), c, "relu", z0=start, tol=self.tol, max_iter=self.max_iter)
        self.last = sol.detach()
        return sol.z

    def forget(self) -> None:
        self.last = None

    def status(self) -> Tensor:
        return self.last.status


class _BoundedRows(torch.autograd.Function):
    """V (S, m, m) with every row scaled to an absolute sum r of ROW_SUM at most. In eight small operators, where the
    same by autograd takes twenty: a tenth of a training step of 16 seeds of width 20 on 64 samples."""

    @staticmethod
    def forward(ctx, V):
        sums = V.abs().sum(2, keepdim=True)
        scale = (ROW_SUM / sums).clamp_(max=1)
        ctx.save_for_backward(V, sums, scale)
        return V * scale

    @staticmethod
    def backward(ctx, g):
        """Of a row that is scaled: ROW_SUM / r (g - sign(V) <g, V> / r)."""
        V, sums, scale = ctx.saved_tensors
        inner = (g * V).sum(2, keepdim=True).div(sums).masked_fill(scale == 1, 0)
        return torch.addcmul(g, V.sign(), inner, value=-1) * scale


class TiedNet(EquilibriumNet):
    """The plain iteration cut off after K steps and trained through all of them: z_K of z <- relu(W z + U x + b).

    A feed-forward net of K layers that share their weights and see the input again: it is no equilibrium model, and
    nothing says that z_K is near a fixed point, or that there is one.
    """

    def __init__(
        self,
        seeds: int,
        inputs: int,
        width: int,
        generator: torch.Generator,
        steps: int,
        dtype: torch.dtype = F64,
        kinks: float | None = None,
    ):
        super().__init__(seeds, inputs, width, generator, dtype, kinks)
        self.V = uniform((seeds, width, width), width, generator, math.sqrt(3), dtype)
        self.parameters.append(self.V)
        self.count += width * width
        self.steps, self.memory = steps, steps * width

    def weight(self) -> Tensor:
        return self.V

    def products(self) -> float:
        return (self.steps - 1) * self.width**2

    def equilibrium(self, c: Tensor) -> Tensor:
        return self.iterate(c, self.steps)[0]

    def iterate(self, c: Tensor, steps: int) -> tuple[Tensor, Tensor]:
        """z after so many steps from zero, and the one before it."""
        c = c.contiguous()
        W, before, z = self.V.mT, torch.zeros_like(c), torch.relu(c)
        for _ in range(steps - 1):
            before, z = z, torch.relu(torch.baddbmm(c, z, W))
        return z, before

    def solved(self, x: Tensor, tol: float, max_iter: int) -> tuple[Tensor, Tensor]:
        z, before = self.iterate(self.injection(x), max_iter)
        size = torch.linalg.vector_norm(z, dim=-1).clamp(min=torch.finfo(z.dtype).tiny)
        return self.readout(z), torch.linalg.vector_norm(z - before, dim=-1) / size


def statuses(status: Tensor, failed: Tensor) -> str:
    """Names and counts of the statuses of failed samples."""
    kinds = torch.bincount(status[failed].long(), minlength=len(Status)).tolist()
    return ", ".join(f"{n} {Status(k).name}" for k, n in enumerate(kinds) if n)
