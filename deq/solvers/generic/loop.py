"""Evaluate, judge, step, until every sample is done."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .newton_krylov import newton_krylov
from .rule import Rule
from .torch_steps import TorchSteps

CHECK_EVERY = 4  # evaluations between two looks at a GPU's flag; on the CPU looking is free


@dataclass
class Result:
    """z (B, D): f at the best point of every sample; iterations (B,) int32, residual (B,) float64, status (B,) uint8.
    trajectory: z as it was after the evaluations asked for, None for those that were not reached."""

    z: Tensor
    iterations: Tensor
    residual: Tensor
    status: Tensor
    trajectory: list[Tensor | None] = field(default_factory=list)


def run(
    f: Callable[[Tensor], Tensor], y0: Tensor, rule: Rule, *, first: Tensor | None = None, keep: Sequence[int] = ()
) -> Result:
    """Fixed point of every row of y0 (B, D), float32 or float64, of f: (B, D) -> (B, D).

    first: f(y0), if it is known. keep: evaluations after which the best images are wanted, ascending.
    """
    with torch.no_grad():
        if y0.numel() == 0:
            return _empty(y0, keep)
        if rule.method == "newton_krylov":
            return _result(*newton_krylov(f, y0, rule, first=first, keep=keep))
        steps = TorchSteps(y0, rule)
        every = 1 if y0.device.type == "cpu" else CHECK_EVERY
        trajectory: list[Tensor | None] = [None] * len(keep)
        for k in range(1, rule.max_iter + 1):
            fy = f(steps.y) if first is None or k > 1 else first
            steps.advance(fy)
            if k in keep:
                trajectory[keep.index(k)] = steps.z.clone()
            if k % every == 0 and not steps.is_running():
                break
        return _result(steps, trajectory)


def _result(steps, trajectory: list[Tensor | None]) -> Result:
    return Result(steps.z, steps.iterations, steps.residual, steps.status, trajectory)


def _empty(y0: Tensor, keep: Sequence[int]) -> Result:
    """Of no samples, or samples without elements: they are at rest."""
    B = y0.shape[0]
    zeros = {name: y0.new_zeros(B, dtype=getattr(torch, name)) for name in ("int32", "float64", "uint8")}
    return Result(y0.clone(), zeros["int32"], zeros["float64"], zeros["uint8"], [y0.clone() for _ in keep])
