"""Several resolutions as one equilibrium (Bai, Koltun and Kolter 2020, "Multiscale deep equilibrium models")."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class _Branch(nn.Module):
    """A residual block at one resolution: two convolutions."""

    def __init__(self, channels: int):
        super().__init__()
        self.first, self.second = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))

    def forward(self, z: Tensor) -> Tensor:
        return z + self.second(torch.relu(self.first(z)))


class MultiscaleBlock(nn.Module):
    """``block(z, x)`` for a state of feature maps at halving resolutions, fused with each other.

    channels: of every resolution, the finest first; the i-th map of z is (B, channels[i], H / 2^i, W / 2^i). x (B,
    channels[0], H, W) enters the finest, normalised in groups. H and W must be divisible by ``2^(len(channels) - 1)``.
    gain, in (0, 1]: what the mean over the resolutions is multiplied by before the last activation, tanh; smaller
    contracts more. Unlike the paper's block this one does not normalise the state: a norm's derivative grows as what it
    normalises shrinks, and with random weights 63 of 64 images of digits then had no equilibrium that was found.

    ``deq.nn.Equilibrium(block, init=block.start)`` solves for all resolutions together.
    """

    def __init__(self, channels: Sequence[int], groups: int = 4, gain: float = 0.5):
        super().__init__()
        if not isinstance(groups, int) or groups < 1:
            raise ValueError(f"groups must be a positive integer; got {groups!r}")
        if not channels or any(c < 1 or c % groups for c in channels):
            raise ValueError(f"channels must be multiples of groups = {groups}; got {tuple(channels)}")
        if not 0 < gain <= 1:
            raise ValueError(f"gain must lie in (0, 1]; got {gain!r}")
        self.channels, self.gain = tuple(channels), gain
        self.branches = nn.ModuleList(_Branch(c) for c in channels)
        n = len(self.channels)
        self.fusions = nn.ModuleList(nn.ModuleList(self._path(j, i) for j in range(n)) for i in range(n))  # [to][from]
        self.norm = nn.GroupNorm(groups, channels[0])

    def _path(self, source: int, target: int) -> nn.Module:
        into, out = self.channels[source], self.channels[target]
        if source == target:
            return nn.Identity()
        if source > target:  # coarser: fewer pixels, repeated
            scale = 2 ** (source - target)
            return nn.Sequential(nn.Conv2d(into, out, 1, bias=False), nn.Upsample(scale_factor=scale, mode="nearest"))
        steps = [
            nn.Conv2d(into if k == 0 else out, out, 3, stride=2, padding=1, bias=False) for k in range(target - source)
        ]
        return nn.Sequential(*steps)

    def start(self, x: Tensor) -> tuple[Tensor, ...]:
        """Zeros of the shapes of the state for x, in the dtype of the parameters: under autocast x may have another."""
        if x.dim() != 4 or x.shape[1] != self.channels[0]:
            raise ValueError(f"x must be (B, {self.channels[0]}, H, W); got {tuple(x.shape)}")
        B, _, H, W = x.shape
        coarsest = 2 ** (len(self.channels) - 1)
        if H % coarsest or W % coarsest:
            raise ValueError(f"x must have height and width divisible by {coarsest}; got {H} and {W}")
        dtype = self.norm.weight.dtype
        return tuple(x.new_zeros(B, c, H >> i, W >> i, dtype=dtype) for i, c in enumerate(self.channels))

    def forward(self, z: tuple[Tensor, ...], x: Tensor) -> tuple[Tensor, ...]:
        maps = [branch(part) for branch, part in zip(self.branches, z, strict=True)]
        fused = []
        for i, paths in enumerate(self.fusions):
            mean = sum(path(part) for path, part in zip(paths, maps, strict=True)) / len(maps)
            fused.append(torch.tanh(self.gain * mean + (self.norm(x) if i == 0 else 0.0)))
        return tuple(fused)
