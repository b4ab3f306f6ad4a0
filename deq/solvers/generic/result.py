"""What a solve of any function returns."""

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Told:
    """What is told of the samples: iterations (B,) int32, residual (B,) float64, status (B,) uint8."""

    iterations: Tensor
    residual: Tensor
    status: Tensor

    @classmethod
    def unjudged(cls, z: Tensor) -> "Told":
        """Of the rows of z, which count as converged."""
        zeros = (
            torch.zeros(z.shape[0], dtype=getattr(torch, t), device=z.device) for t in ("int32", "float64", "uint8")
        )
        return cls(*zeros)

    def is_converged(self) -> bool:
        """Whether all samples are; waits for the device."""
        return not bool(self.status.any())  # CONVERGED is 0


@dataclass
class Result:
    """z (B, D): f at the best point of every sample. told: :class:`Told`, or what has its attributes.
    trajectory: z as it was after the evaluations asked for, None for those that were not reached. trace:
    ``||f(y) - y||`` and ``||f(y)||`` of every evaluation, (evaluations, B, 2) float64, where asked for; a sample that
    is done repeats its last."""

    z: Tensor
    told: Told
    trajectory: list[Tensor | None] = field(default_factory=list)
    trace: Tensor | None = None

    @classmethod
    def of(cls, steps, trajectory: list[Tensor | None]) -> "Result":
        """The result of finished steps."""
        return cls(steps.z, steps.told, trajectory, steps.trace)

    @property
    def iterations(self) -> Tensor:
        return self.told.iterations

    @property
    def residual(self) -> Tensor:
        return self.told.residual

    @property
    def status(self) -> Tensor:
        return self.told.status
