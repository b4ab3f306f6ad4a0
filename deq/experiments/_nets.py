"""Networks of many seeds side by side: every parameter has a leading dimension S, every output is (S, B)."""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from .. import _library
from ..plan import make_plan
from ..solve import solve

F64 = torch.float64


class SeededNet:
    """A net with scalar output for S seeds. ``parameters`` are leaf tensors (S, ...); ``count`` is per seed."""

    parameters: list[Tensor]
    count: int

    def __call__(self, x: Tensor) -> Tensor:
        """(S, B, d) -> (S, B)."""
        raise NotImplementedError

    def norms(self) -> Tensor:
        """(S, number of weight matrices) infinity norms: the largest absolute row sums."""
        raise NotImplementedError


class FeedForward(SeededNet):
    """ReLU net of ``depth`` weight matrices and ``width`` hidden units a layer; uniform(-1, 1) / sqrt(fan in)."""

    def __init__(self, seeds: int, inputs: int, width: int, depth: int, generator: torch.Generator):
        sizes = [inputs] + [width] * (depth - 1) + [1]
        self.weights = [uniform((seeds, i, o), i, generator) for i, o in pairwise(sizes)]
        self.biases = [uniform((seeds, 1, o), i, generator) for i, o in pairwise(sizes)]
        self.parameters = [*self.weights, *self.biases]
        self.count = feedforward_count(inputs, width, depth)

    def __call__(self, x: Tensor) -> Tensor:
        h = x
        for layer, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            h = torch.baddbmm(bias, torch.relu(h) if layer else h, weight)
        return h.squeeze(-1)

    def norms(self) -> Tensor:
        return torch.stack([w.detach().abs().sum(1).amax(1) for w in self.weights], 1)


def feedforward_count(inputs: int, width: int, depth: int) -> int:
    """Parameters of :class:`FeedForward`."""
    return sum((i + 1) * o for i, o in pairwise([inputs] + [width] * (depth - 1) + [1]))


def matching_width(inputs: int, depth: int, parameters: int) -> int:
    """The smallest width that gives a :class:`FeedForward` of this depth at least so many parameters."""
    width = 1
    while feedforward_count(inputs, width, depth) < parameters:
        width += 1
    return width


class EquilibriumNet(SeededNet):
    """z = relu(W z + U x + b), y = a z + y0, with a W whose equilibrium exists, is unique and has a closed form."""

    def __init__(self, seeds: int, inputs: int, width: int, generator: torch.Generator):
        self.width = width
        self.U = uniform((seeds, inputs, width), inputs, generator)
        self.b = uniform((seeds, 1, width), inputs, generator)
        self.a = uniform((seeds, width, 1), width, generator)
        self.y0 = torch.zeros(seeds, 1, 1, dtype=F64, device=generator.device, requires_grad=True)
        self.parameters = [self.U, self.b, self.a, self.y0]
        self.count = width * (inputs + 2) + 1

    def weight(self) -> Tensor:
        """(S, m, m) W."""
        raise NotImplementedError

    def closed_form(self, c: Tensor) -> Tensor:
        """The equilibrium of injections c (S, B, m), without a solver."""
        raise NotImplementedError

    def equilibrium(self, c: Tensor) -> Tensor:
        """The equilibrium as it is trained: the faster of the engine and the closed form."""
        raise NotImplementedError

    def injection(self, x: Tensor) -> Tensor:
        return torch.baddbmm(self.b, x, self.U)

    def readout(self, z: Tensor) -> Tensor:
        return torch.baddbmm(self.y0, z, self.a).squeeze(-1)

    def __call__(self, x: Tensor) -> Tensor:
        return self.readout(self.equilibrium(self.injection(x)))

    def norms(self) -> Tensor:
        U, a = (p.detach().abs().sum(1).amax(1) for p in (self.U, self.a))
        return torch.stack((self.weight().detach().abs().sum(2).amax(1), U, a), 1)


class DiagonalDEQ(EquilibriumNet):
    """W = diag(sigmoid(theta)): every unit listens to itself, z = relu(c) / (1 - w)."""

    def __init__(self, seeds: int, inputs: int, width: int, generator: torch.Generator):
        super().__init__(seeds, inputs, width, generator)
        theta = torch.randn((seeds, 1, width), dtype=F64, device=generator.device, generator=generator)
        self.theta = theta.requires_grad_()
        self.parameters.append(self.theta)
        self.count += width

    def weight(self) -> Tensor:
        return torch.diag_embed(torch.sigmoid(self.theta.squeeze(1)))

    def closed_form(self, c: Tensor) -> Tensor:
        return torch.relu(c) * (1 + torch.exp(self.theta))  # 1 / (1 - sigmoid(theta)) = 1 + e^theta

    equilibrium = closed_form


class TriangularDEQ(EquilibriumNet):
    """W strictly lower triangular: nilpotent, so the plain iteration is exact after m steps whatever its norm."""

    def __init__(self, seeds: int, inputs: int, width: int, generator: torch.Generator):
        super().__init__(seeds, inputs, width, generator)
        self.full = uniform((seeds, width, width), width, generator, gain=math.sqrt(3))  # variance 1 / m
        self.parameters.append(self.full)
        self.count += width * (width - 1) // 2

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
        return solve(self.weight(), c, "relu", solver="plain", max_iter=self.width + 2).z


def engine_is_compiled(device: torch.device) -> bool:
    """Whether :func:`deq.solve` runs compiled code for float64 tensors on this device."""
    return make_plan(dtype="float64", device=device.type, compiled=_library.compiled is not None).backend != "reference"


def uniform(shape: Sequence[int], fan_in: int, generator: torch.Generator, gain: float = 1.0) -> Tensor:
    """Trainable uniform(-1, 1) * gain / sqrt(fan_in)."""
    values = torch.rand(tuple(shape), dtype=F64, device=generator.device, generator=generator) * 2 - 1
    return (values * (gain / math.sqrt(fan_in))).requires_grad_()
