"""Convolutional nets of many seeds: a multiscale equilibrium and a residual net. Images are (S, B, 1, H, W)."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..fixed_point import fixed_point
from ._dense_nets import ROW_SUM
from ._nets import SeededNet, uniform

F32 = torch.float32
MEAN, SCALE = 0.3, 0.25  # of the images, about: with inputs that are all positive neither net learns in 400 steps


def convolve(x: Tensor, weight: Tensor, stride: int = 1) -> Tensor:
    """x (B, S I, H, W), every seed's channels in its own group; weight (S, O, I, k, k)."""
    S, _, _, k, _ = weight.shape
    return F.conv2d(x, weight.flatten(0, 1), stride=stride, padding=k // 2, groups=S)


class ConvNet(SeededNet):
    """Stem of two convolutions, the second with stride 2, features in one or more resolutions, and a linear head on
    their means: (S, B, classes)."""

    def __init__(self, seeds: int, channels: int, classes: int, scales: int, generator: torch.Generator):
        self.seeds, self.channels, self.scales = seeds, channels, scales
        self.generator = generator
        self.stem, self.second_stem = self.draw(channels, 1, 5), self.draw(channels, channels, 3)
        self.first_shift = torch.zeros(seeds, channels, dtype=F32, device=generator.device, requires_grad=True)
        self.shift = torch.zeros(seeds, channels, dtype=F32, device=generator.device, requires_grad=True)
        self.head = uniform((seeds, scales * channels, classes), scales * channels, generator, math.sqrt(3), F32)
        self.bias = torch.zeros(seeds, 1, classes, dtype=F32, device=generator.device, requires_grad=True)
        self.parameters = [self.stem, self.second_stem, self.first_shift, self.shift, self.head, self.bias]

    def draw(self, out: int, into: int, kernel: int, gain: float = math.sqrt(6)) -> Tensor:
        """Trainable kernels, He et al. 2015 for the usual gain."""
        return uniform((self.seeds, out, into, kernel, kernel), into * kernel**2, self.generator, gain, F32)

    @property
    def count(self) -> int:
        return sum(p[0].numel() for p in self.parameters)

    def injection(self, x: Tensor) -> Tensor:
        """(B, S C, H / 2, W / 2)."""
        grouped = (x.squeeze(2).transpose(0, 1) - MEAN) / SCALE
        h = torch.relu(convolve(grouped, self.stem) + self.first_shift.reshape(1, -1, 1, 1))
        return convolve(h, self.second_stem, 2) + self.shift.reshape(1, -1, 1, 1)

    def maps(self, x: Tensor) -> tuple[Tensor, ...]:
        """Feature maps, one a resolution, each (B, S C, h, w)."""
        raise NotImplementedError  # abstract: every subclass has its own

    def logits(self, maps: tuple[Tensor, ...]) -> Tensor:
        means = [m.mean((2, 3)).unflatten(1, (self.seeds, self.channels)) for m in maps]
        return torch.baddbmm(self.bias, torch.cat(means, 2).transpose(0, 1), self.head)

    def __call__(self, x: Tensor) -> Tensor:
        return self.logits(self.maps(x))


class ResidualNet(ConvNet):
    """Blocks h <- relu(h + conv relu conv h), the second convolution starting at zero (Zhang et al. 2019)."""

    def __init__(self, seeds: int, channels: int, classes: int, blocks: int, generator: torch.Generator):
        super().__init__(seeds, channels, classes, 1, generator)
        self.first = [self.draw(channels, channels, 3) for _ in range(blocks)]
        self.second = [self.draw(channels, channels, 3, 0.1) for _ in range(blocks)]
        self.parameters += [*self.first, *self.second]

    def maps(self, x: Tensor) -> tuple[Tensor, ...]:
        h = torch.relu(self.injection(x))
        for first, second in zip(self.first, self.second, strict=True):
            h = torch.relu(h + convolve(torch.relu(convolve(h, first)), second))
        return (h,)


class MultiscaleDEQ(ConvNet):
    """Equilibrium of two resolutions: z1 = relu(A11 z1 + up A12 z2 + i1), z2 = relu(A22 z2 + A21 down z1 + i2).

    Kernels are scaled so that each output channel's absolute weights sum to ROW_SUM at most: with nearest upsampling
    and average pooling the joint map is a contraction in the largest entry, so that there is exactly one equilibrium.
    """

    def __init__(self, seeds: int, channels: int, classes: int, generator: torch.Generator):
        super().__init__(seeds, channels, classes, 2, generator)
        self.A11, self.A22, self.A21 = (self.draw(channels, channels, 3) for _ in range(3))
        self.A12 = self.draw(channels, channels, 1)
        self.parameters += [self.A11, self.A12, self.A22, self.A21]
        self.solution = None

    def kernels(self) -> tuple[Tensor, ...]:
        def contractive(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
            sums = (a.abs().sum((2, 3, 4)) + b.abs().sum((2, 3, 4)))[..., None, None, None]
            scale = (ROW_SUM / sums).clamp(max=1)
            return a * scale, b * scale

        return (*contractive(self.A11, self.A12), *contractive(self.A22, self.A21))

    def solve(self, x: Tensor, tol: float | None = None, max_iter: int = 200):
        fine = self.injection(x)
        coarse = F.avg_pool2d(fine, 2)
        A11, A12, A22, A21 = self.kernels()

        def f(z: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            up = F.interpolate(convolve(z[1], A12), scale_factor=2)
            down = F.avg_pool2d(z[0], 2)
            return torch.relu(convolve(z[0], A11) + up + fine), torch.relu(
                convolve(z[1], A22) + convolve(down, A21) + coarse
            )

        start = (torch.zeros_like(fine), torch.zeros_like(coarse))
        return fixed_point(f, start, solver="anderson", tol=tol, max_iter=max_iter, on_failure="ignore"), f

    def maps(self, x: Tensor) -> tuple[Tensor, ...]:
        self.solution, _ = self.solve(x)
        return tuple(self.solution.z)

    def failed(self) -> Tensor:
        return (~self.solution.converged).expand(self.seeds, -1)

    def status(self) -> Tensor:
        return self.solution.status.expand(self.seeds, -1)

    def residual(self, f, z: tuple[Tensor, ...]) -> Tensor:
        """(S, B) relative residual over both resolutions, of every seed by itself."""

        def by_seed(part: Tensor) -> Tensor:
            return part.unflatten(1, (self.seeds, self.channels)).flatten(2).square().sum(2)

        again = f(z)
        moved = sum(by_seed(a - b) for a, b in zip(again, z, strict=True))
        size = sum(by_seed(a) for a in again).clamp(min=torch.finfo(F32).tiny)
        return (moved / size).sqrt().T


def grad_cam(net: ConvNet, maps: tuple[Tensor, ...], classes: Tensor, size: int) -> Tensor:
    """(S, B, size, size) Grad-CAM of the logits of ``classes`` (S, B) at the given feature maps, largest entry 1.

    Selvaraju et al. 2017: relu of the maps weighted by the mean gradient of the logit; the head alone is
    differentiated, at the equilibrium of a DEQ. Resolutions are upsampled and added.
    """
    with torch.enable_grad():
        leaves = tuple(m.detach().requires_grad_() for m in maps)
        chosen = net.logits(leaves).gather(2, classes.unsqueeze(2)).sum()
        gradients = torch.autograd.grad(chosen, leaves)
    cam = 0.0
    for m, g in zip(leaves, gradients, strict=True):
        weighted = (m.detach() * g.mean((2, 3), keepdim=True)).unflatten(1, (net.seeds, net.channels)).sum(2)
        cam = cam + F.interpolate(torch.relu(weighted), size=(size, size), mode="bilinear", align_corners=False)
    cam = cam.transpose(0, 1)
    return cam / cam.amax((2, 3), keepdim=True).clamp(min=1e-12)
