"""Gradients of a fixed point that are not exact: of one evaluation, of a few damped ones, of the whole iteration."""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from .batch import largest
from .closures import in_transform
from .solution import Status
from .solvers import generic
from .solvers.generic import Rule
from .solvers.generic.torch_steps import norm as norms


def differentiated(
    evaluate: Callable[[Tensor], Tensor],
    start: Tensor,
    result: generic.Result,
    rule: Rule,
    backward: str,
    steps: int,
    backward_damping: float,
    is_judged: bool,
) -> Tensor:
    """The fixed point with a gradient that is not exact, or unrolled; of a sample that failed its best iterate.

    is_judged: whether the result tells which samples failed.
    """
    if backward == "unrolled":
        return _unrolled(evaluate, start, result, rule)
    if in_transform() or not is_judged or not result.told.is_converged():
        evaluate = functools.partial(_where_finite, evaluate, start)
    if backward == "one_step":
        return evaluate(result.z)
    z = result.z
    for _ in range(steps):
        z = torch.lerp(z, evaluate(z), backward_damping)
    return z


def _where_finite(evaluate: Callable[[Tensor], Tensor], start: Tensor, z: Tensor) -> Tensor:
    """f(z), but z in the rows where that is not finite."""
    image = evaluate(z)
    finite = torch.isfinite(image).all(1, keepdim=True)
    if not in_transform() and bool(finite.all()):
        return image
    # Evaluated elsewhere in those rows: the derivative there times a gradient of zero would be NaN.
    return torch.where(finite, evaluate(torch.where(finite, z, start)), z)


def _unrolled(evaluate: Callable[[Tensor], Tensor], start: Tensor, result: generic.Result, rule: Rule) -> Tensor:
    """The plain iteration once more, all of it in the graph."""
    is_converged = not in_transform() and result.told.is_converged()
    converged = (result.status == int(Status.CONVERGED)).unsqueeze(1)
    # The last evaluation of use: where f is not finite it has no derivative either.
    last = (result.iterations - (result.status == int(Status.NONFINITE)).int()).unsqueeze(1)
    best = torch.full_like(last, torch.inf, dtype=torch.float64)
    y, z = start, result.z
    for k in range(1, max(1, largest(last)) + 1):
        image = evaluate(y)
        take = last == k
        if not is_converged:  # those that failed return their best image, as they do from a solve
            measure = _measure(y.detach(), image.detach(), rule)
            better = (measure < best) & (last >= k)
            best = torch.where(better, measure, best)
            take = torch.where(converged, take, better)
        z = torch.where(take, image, z)
        step = image if rule.damping == 1.0 else torch.lerp(y, image, rule.damping)
        y = torch.where(last > k, step, start)
    return z


def _measure(y: Tensor, image: Tensor, rule: Rule) -> Tensor:
    """By what a solve compares the images of points y: (B, 1) float64."""
    step = norms(image - y)
    return (step if rule.criterion == "absolute" else torch.where(step > 0, step / norms(image), step)).unsqueeze(1)
