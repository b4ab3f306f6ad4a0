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
    owned: bool = False,
    keep: Sequence[int] = (),
    traced: bool = False,
) -> Result:
    """Fixed point of every row of y0 (B, D), float32 or float64, of f: (B, D) -> (B, D).

    f may have ``f.on(y)``, which makes a function that returns f of what y holds when it is called, in any shape of as
    many elements.

    first: f(y0), if it is known. shift: (B, D), what is to be added to f(y), where f is the linear part of an affine
    map; not together with first. owned: whether y0 may be overwritten. keep: evaluations after which the best images
    are wanted, ascending. traced: whether the result is to have a trace.
    """
    before = torch.is_grad_enabled()
    try:  # what is switched off is so inside: Ctrl-C may come right after it
        torch._C._set_grad_enabled(False)  # torch.no_grad in a tenth of its time, which is 20 us where caches are cold
        if y0.numel() == 0:
            return _empty(y0, keep)
        compiled = compiled_steps.serves(y0, rule)
        if shift is not None and not compiled:
            linear, f = f, lambda y: linear(y) + shift
        if rule.method == "newton_krylov":
            return newton_krylov(f, y0, rule, first=first, keep=keep, traced=traced)
        if compiled:
            steps = CompiledSteps(y0, rule, shift, owned)
            evaluate = f.on(steps.y) if hasattr(f, "on") else functools.partial(f, steps.y)
        else:
            steps = (TritonSteps if triton_steps.serves(y0, rule) else TorchSteps)(y0, rule)
            evaluate = lambda: f(steps.y)  # noqa: E731
        every = 1 if y0.device.type == "cpu" else CHECK_EVERY
        trajectory: list[Tensor | None] = [None] * len(keep)
        for k in range(1, rule.max_iter + 1):
            steps.advance(evaluate() if first is None or k > 1 else first)
            if traced:
                steps.note()
            if k in keep:
                steps.collect()
                trajectory[keep.index(k)] = steps.z.clone()
            if k % every == 0 and not steps.is_running():
                break
        steps.collect()
        steps.release()
        return Result.of(steps, trajectory)
    finally:
        torch._C._set_grad_enabled(before)


def _empty(y0: Tensor, keep: Sequence[int]) -> Result:
    """Of no samples, or samples without elements: they are at rest."""
    return Result(y0.clone(), Told.unjudged(y0), [y0.clone() for _ in keep])
