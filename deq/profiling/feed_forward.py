"""The feed-forward net beside an equilibrium: what the same resources buy without iterating.

A net of depth L and width w is ``z <- act(W_l z + b_l)``, l = 1..L. An equilibrium of width m has m^2 + m parameters,
costs 2 m^2 FLOPs a sample and iteration, and keeps one activation for its backward pass whatever the iterations.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..activations import ACTIVATIONS

FIT_STEPS = 6  # of the width that takes as much memory
CLOSE = 0.01


@dataclass(frozen=True)
class Sizing:
    """A net of ``depth`` layers of ``width``, and what it has in common with the equilibrium."""

    equal: str
    depth: int
    width: int

    @property
    def parameters(self) -> int:
        return self.depth * self.width * (self.width + 1)


def sizings(m: int, depth: int, peak: int, peak_of: Callable[[Sizing], int]) -> list[Sizing]:
    """The nets of ``depth`` layers to compare with an equilibrium of width m whose training takes ``peak`` bytes.

    "parameters": as many; "FLOPs / iteration": a layer costs what an iteration costs, so w = m; "memory": training it
    takes the same, as ``peak_of`` measures it.
    """
    by_parameters = (math.sqrt(1 + 4 * (m * m + m) / depth) - 1) / 2
    width = by_parameters
    for _ in range(FIT_STEPS):
        taken = peak_of(Sizing("memory", depth, max(1, round(width))))
        if abs(taken - peak) <= CLOSE * peak:
            break
        width *= math.sqrt(peak / taken) if taken else 1.0  # memory grows with w or w^2: never beyond the goal
    return [
        Sizing("parameters", depth, max(1, round(by_parameters))),
        Sizing("FLOPs / iteration", depth, m),
        Sizing("memory", depth, max(1, round(width))),
    ]


class FeedForward(nn.Module):
    """The net; ``forward(x)`` takes and returns (B, width)."""

    def __init__(self, sizing: Sizing, activation: str, dtype: torch.dtype, device: torch.device):
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Linear(sizing.width, sizing.width, dtype=dtype, device=device) for _ in range(sizing.depth)
        )
        self.activation = ACTIVATIONS[activation].value

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = self.activation(layer(x))
        return x
