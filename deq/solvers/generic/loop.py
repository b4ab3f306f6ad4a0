"""Evaluate, judge, step, until every sample is done."""

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from . import compiled_steps, triton_steps
from .compiled_steps import CompiledSteps
from .newton_krylov import newton_krylov
from .result import Result, Told
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
    shift: Tensor | None = None,
    keep: Sequence[int] = (),
    traced: bool = False,
) -> Result:
    """Fixed point of every row of y0 (B, D), float32 or float64, of f: (B, D) -> (B, D).

    first: f(y0), if it is known. shift: (B, D), what is to be added to f(y), where f is the linear part of an affine
    map; not together with first. keep: evaluations after which the best images are wanted, ascending. traced: whether
    the result is to have a trace.
    """
    with torch.no_grad():
        if y0.numel() == 0:
            return _empty(y0, keep)
        kind = _kind(y0, rule)
        if kind is CompiledSteps:
            kind = functools.partial(CompiledSteps, shift=shift)
        elif shift is not None:
            linear, f = f, lambda y: linear(y) + shift
        if rule.method == "newton_krylov":
            return newton_krylov(f, y0, rule, first=first, keep=keep, traced=traced)
        steps = kind(y0, rule)
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
    return Result(y0.clone(), Told.unjudged(y0), [y0.clone() for _ in keep])
