"""Networks of many seeds side by side: every parameter has a leading dimension S, every output is (S, B)."""

import copy
import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from .. import _library
from ..plan import make_plan
from ..solution import Solution, Status
from ..solve import solve
from ._affine import affine

F64 = torch.float64


class SeededNet:
    """A net with scalar output for S seeds. ``parameters`` are leaf tensors (S, ...); ``count`` is per seed."""

    parameters: list[Tensor]
    count: int
    memory: int  # numbers kept a sample for the backward pass, beside the input

    def flops(self) -> float:
        """Multiplications and additions of a forward pass of one sample, products with weights only."""
        raise NotImplementedError  # abstract: every subclass has its own

    def training_flops(self) -> float:
        """The same of a training step: twice as much again for the gradients of inputs and of weights."""
        return 3 * self.flops()

    def failed(self) -> Tensor | None:
        """(S, B) samples of the last call whose equilibrium was not found; None where that cannot happen."""
        status = self.status()
        return None if status is None else status != Status.CONVERGED

    def status(self) -> Tensor | None:
        """(S, B) of :class:`deq.Status`, of the last call; None where there is no solver."""
        return None

    def forget(self) -> None:
        """Let the next call solve from zero, where a net would start from the equilibrium of the call before."""

    def double(self) -> "SeededNet":
        """A copy in float64 that shares nothing and is not trained."""
        twin = copy.copy(self)
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                setattr(twin, name, value.detach().double())
            elif isinstance(value, list):
                setattr(twin, name, [v.detach().double() for v in value])
        return twin

    def __call__(self, x: Tensor) -> Tensor:
        """(S, B, d) -> (S, B)."""
        raise NotImplementedError  # abstract: every subclass has its own

    def norms(self) -> Tensor:
        """(S, number of weight matrices) infinity norms: the largest absolute row sums."""
        raise NotImplementedError  # abstract: every subclass has its own


class FeedForward(SeededNet):
    """ReLU net of ``depth`` weight matrices and ``width`` hidden units a layer; uniform(-1, 1) / sqrt(fan in)."""

    def __init__(
        self,
        seeds: int,
        inputs: int,
        width: int,
        depth: int,
        generator: torch.Generator,
        dtype: torch.dtype = F64,
        kinks: float | None = None,
    ):
        """kinks: see :func:`kinked`; hidden layers are then drawn after He et al. 2015, in keeping with it."""
        self.sizes = [inputs] + [width] * (depth - 1) + [1]
        gain = 1.0 if kinks is None else math.sqrt(6)
        self.weights = [uniform((seeds, i, o), i, generator, gain, dtype) for i, o in pairwise(self.sizes)]
        self.biases = [uniform((seeds, 1, o), i, generator, 1.0, dtype) for i, o in pairwise(self.sizes)]
        if kinks is not None:
            self.weights[0], self.biases[0] = kinked(seeds, width, kinks, generator, dtype)
        self.parameters = [*self.weights, *self.biases]
        self.count = feedforward_count(inputs, width, depth)
        self.memory = width * (depth - 1)

    def flops(self) -> float:
        return 2.0 * sum(i * o for i, o in pairwise(self.sizes))

    def __call__(self, x: Tensor) -> Tensor:
        return affine(self.biases[-1], self.features(x), self.weights[-1]).squeeze(-1)

    def features(self, x: Tensor) -> Tensor:
        """(S, B, width) of the last hidden layer."""
        h = x
        for weight, bias in zip(self.weights[:-1], self.biases[:-1], strict=True):
            h = torch.relu(affine(bias, h, weight))
        return h

    def norms(self) -> Tensor:
        return torch.stack([w.detach().abs().sum(1).amax(1) for w in self.weights], 1)


def feedforward_count(inputs: int, width: int, depth: int) -> int:
    """Parameters of :class:`FeedForward`."""
    return sum((i + 1) * o for i, o in pairwise([inputs] + [width] * (depth - 1) + [1]))


def matching_width(inputs: int, depth: int, parameters: int) -> int:
    """The smallest width that gives a :class:`FeedForward` of this depth at least so many parameters."""
    return smallest(lambda width: feedforward_count(inputs, width, depth) >= parameters)


def smallest(enough: Callable[[int], bool], least: int = 1) -> int:
    """The smallest integer from ``least`` on that is enough, where every larger one is too: by doubling and halving, as
    it is 10^13 for some widths that can be asked for."""
    above, step = least, 1
    while not enough(above):
        least, above, step = above + 1, above + step, 2 * step
    while least < above:
        middle = (least + above) // 2
        least, above = (least, middle) if enough(middle) else (middle + 1, above)
    return least


class EquilibriumNet(SeededNet):
    """z = relu(W z + U x + b), y = a z + y0, with a W whose equilibrium exists, is unique and has a closed form."""

    def __init__(
        self,
        seeds: int,
        inputs: int,
        width: int,
        generator: torch.Generator,
        dtype: torch.dtype = F64,
        kinks: float | None = None,
    ):
        """kinks: see :func:`kinked`, for scalar inputs."""
        self.width = self.memory = width
        self.inputs = inputs
        if kinks is None:
            self.U = uniform((seeds, inputs, width), inputs, generator, 1.0, dtype)
            self.b = uniform((seeds, 1, width), inputs, generator, 1.0, dtype)
        else:
            self.U, self.b = kinked(seeds, width, kinks, generator, dtype)
        self.a = uniform((seeds, width, 1), width, generator, 1.0 if kinks is None else math.sqrt(3), dtype)
        self.y0 = torch.zeros(seeds, 1, 1, dtype=dtype, device=generator.device, requires_grad=True)
        self.parameters = [self.U, self.b, self.a, self.y0]
        self.count = width * (inputs + 2) + 1

    def flops(self) -> float:
        return 2.0 * (self.width * (self.inputs + 1) + self.products())

    def products(self) -> float:
        """Multiplications with W that the equilibrium of one sample takes."""
        raise NotImplementedError  # abstract: every subclass has its own

    def weight(self) -> Tensor:
        """(S, m, m) W."""
        raise NotImplementedError  # abstract: every subclass has its own

    def closed_form(self, c: Tensor) -> Tensor:
        """The equilibrium of injections c (S, B, m), without a solver."""
        raise NotImplementedError  # abstract: every subclass has its own

    def equilibrium(self, c: Tensor) -> Tensor:
        """The equilibrium as it is trained: the faster of the engine and the closed form."""
        raise NotImplementedError  # abstract: every subclass has its own

    def injection(self, x: Tensor) -> Tensor:
        return affine(self.b, x, self.U, side_by_side=x.is_cpu)

    def readout(self, z: Tensor) -> Tensor:
        return affine(self.y0, z, self.a, side_by_side=z.is_cpu).squeeze(-1)

    def __call__(self, x: Tensor) -> Tensor:
        return self.readout(self.equilibrium(self.injection(x)))

    def features(self, x: Tensor) -> Tensor:
        """(S, B, m)."""
        return self.equilibrium(self.injection(x))

    def solved(self, x: Tensor, tol: float, max_iter: int) -> tuple[Tensor, Tensor]:
        """Output and residual (S, B), solved from zero."""
        sol = solve(self.weight(), self.injection(x), "relu", tol=tol, max_iter=max_iter, on_failure="ignore")
        return self.readout(sol.z), sol.residual

    def norms(self) -> Tensor:
        U, a = (p.detach().abs().sum(1).amax(1) for p in (self.U, self.a))
        return torch.stack((self.weight().detach().abs().sum(2).amax(1), U, a), 1)


class DiagonalDEQ(EquilibriumNet):
    """W = diag(sigmoid(theta)): every unit listens to itself, z = relu(c) / (1 - w)."""

    def __init__(self, seeds: int, inputs: int, width: int, generator: torch.Generator, **kinds):
        super().__init__(seeds, inputs, width, generator, **kinds)
        theta = torch.randn((seeds, 1, width), dtype=self.U.dtype, device=generator.device, generator=generator)
        self.theta = theta.requires_grad_()
        self.parameters.append(self.theta)
        self.count += width

    def products(self) -> float:
        return self.width

    def weight(self) -> Tensor:
        return torch.diag_embed(torch.sigmoid(self.theta.squeeze(1)))

    def closed_form(self, c: Tensor) -> Tensor:
        return torch.relu(c) * (1 + torch.exp(self.theta))  # 1 / (1 - sigmoid(theta)) = 1 + e^theta

    equilibrium = closed_form


class TriangularDEQ(EquilibriumNet):
    """W strictly lower triangular: nilpotent, so the plain iteration is exact after m steps whatever its norm."""

    def __init__(self, seeds: int, inputs: int, width: int, generator: torch.Generator, **kinds):
        super().__init__(seeds, inputs, width, generator, **kinds)
        self.full = uniform((seeds, width, width), width, generator, math.sqrt(3), self.U.dtype)  # variance 1 / m
        self.parameters.append(self.full)
        self.count += width * (width - 1) // 2

    def products(self) -> float:
        return self.width * (self.width - 1) / 2

    def weight(self) -> Tensor:
        return torch.tril(self.full, -1)

    def closed_form(self, c: Tensor) -> Tensor:
        W, z = self.weight(), [torch.relu(c[..., 0])]
        for t in range(1, self.width):
            fed = torch.stack(z, -1) @ W[:, t, :t].unsqueeze(-1)
            z.append(torch.relu(c[..., t] + fed.squeeze(-1)))
        return torch.stack(z, -1)

    def equilibrium(self, c: Tensor) -> Tensor:
        if not engine_is_compiled(c.device):  # its reference in PyTorch takes each seed in turn, ten times as long
            return self.closed_form(c)
        return self.solution(c).z

    def solution(self, c: Tensor) -> Solution:
        """By the engine's plain iteration."""
        return solve(self.weight(), c, "relu", solver="plain", max_iter=self.width + 2)


def engine_is_compiled(device: torch.device) -> bool:
    """Whether :func:`deq.solve` runs compiled code for float64 tensors on this device."""
    return make_plan(dtype="float64", device=device.type, compiled=_library.compiled is not None).backend != "reference"


def uniform(
    shape: Sequence[int], fan_in: int, generator: torch.Generator, gain: float = 1.0, dtype: torch.dtype = F64
) -> Tensor:
    """Trainable uniform(-1, 1) * gain / sqrt(fan_in)."""
    values = torch.rand(tuple(shape), dtype=dtype, device=generator.device, generator=generator) * 2 - 1
    return (values * (gain / math.sqrt(fan_in))).requires_grad_()


def kinked(
    seeds: int, width: int, scale: float, generator: torch.Generator, dtype: torch.dtype = F64
) -> tuple[Tensor, Tensor]:
    """Trainable U (S, 1, m) and b (S, 1, m) of neurons relu(u x + b) with |u| in scale [1/2, 3/2] whose kinks are
    uniform in [0, 1]: inputs of one dimension are then resolved everywhere from the start, by every net alike."""

    def draw() -> Tensor:
        return torch.rand((seeds, 1, width), dtype=dtype, device=generator.device, generator=generator)

    U = torch.where(draw() < 0.5, -scale, scale) * (0.5 + draw())
    return U.requires_grad_(), (-U.detach() * draw()).requires_grad_()
