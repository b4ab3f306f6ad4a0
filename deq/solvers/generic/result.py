"""What a solve of any function returns."""

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Result:
    """z (B, D): f at the best point of every sample; iterations (B,) int32, residual (B,) float64, status (B,) uint8.
    trajectory: z as it was after the evaluations asked for, None for those that were not reached. trace:
    ``||f(y) - y||`` and ``||f(y)||`` of every evaluation, (evaluations, B, 2) float64, where asked for; a sample that
    is done repeats its last."""

    z: Tensor
    iterations: Tensor
    residual: Tensor
    status: Tensor
    trajectory: list[Tensor | None] = field(default_factory=list)
    trace: Tensor | None = None

    @classmethod
    def of(cls, steps, trajectory: list[Tensor | None], trace: list[Tensor]) -> "Result":
        """The result of finished steps."""
        told = torch.stack(trace) if trace else None
        return cls(steps.z, steps.iterations, steps.residual, steps.status, trajectory, told)
