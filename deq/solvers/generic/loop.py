"""Evaluate, judge, step, until every sample is done."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from . import compiled_steps, triton_steps
from .compiled_steps import CompiledSteps
from .newton_krylov import newton_krylov
from .result import Result
from .rule import Rule
from .torch_steps import TorchSteps
from .triton_steps import TritonSteps

CHECK_EVERY = 4  # evaluations between two looks at a GPU's flag; on the CPU looking is free


def run(
    f: Callable[[Tensor], Tensor],
    y0: Tensor,
    rule: Rule,
    *,
    first: Tensor | None = None,
    keep: Sequence[int] = (),
    traced: bool = False,
) -> Result:
    """Fixed point of every row of y0 (B, D), float32 or float64, of f: (B, D) -> (B, D).

    first: f(y0), if it is known. keep: evaluations after which the best images are wanted, ascending.
    traced: whether the result is to have a trace.
    """
    with torch.no_grad():
        if y0.numel() == 0:
            return _empty(y0, keep)
        if rule.method == "newton_krylov":
            return newton_krylov(f, y0, rule, first=first, keep=keep, traced=traced)
        steps = _kind(y0, rule)(y0, rule)
        every = 1 if y0.device.type == "cpu" else CHECK_EVERY
        trajectory: list[Tensor | None] = [None] * len(keep)
        trace: list[Tensor] = []
        for k in range(1, rule.max_iter + 1):
            fy = f(steps.y) if first is None or k > 1 else first
            steps.advance(fy)
            if traced:
                trace.append(steps.norms.clone())
            if k in keep:
                steps.collect()
                trajectory[keep.index(k)] = steps.z.clone()
            if k % every == 0 and not steps.is_running():
                break
        steps.collect()
        steps.release()
        return Result.of(steps, trajectory, trace)


def _kind(y0: Tensor, rule: Rule) -> type:
    if compiled_steps.serves(y0, rule):
        return CompiledSteps
    return TritonSteps if triton_steps.serves(y0, rule) else TorchSteps


def _empty(y0: Tensor, keep: Sequence[int]) -> Result:
    """Of no samples, or samples without elements: they are at rest."""
    B = y0.shape[0]
    zeros = {name: y0.new_zeros(B, dtype=getattr(torch, name)) for name in ("int32", "float64", "uint8")}
    return Result(y0.clone(), zeros["int32"], zeros["float64"], zeros["uint8"], [y0.clone() for _ in keep])
