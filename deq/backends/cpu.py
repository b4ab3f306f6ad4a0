"""The compiled row engine (csrc/cpu): the whole solve in one call."""

import math
from array import array

import torch
from torch import Tensor

from .. import products, recycle, stats
from ..activations import ACTIVATIONS
from ..plan import INCREMENTS, LARGE_WEIGHT, LargeWeight, Plan
from ..recycle import LEAST_BYTES
from ..solution import Status
from .outcome import Outcome

_ACCELERATION = {"none": 0, "anderson": 1, "on_demand": 2}
_CRITERION = {"residual": 0, "error": 1}
# acceleration, depth, criterion, tol, max_iter, precision, reflected: of an operator that multiplies once. Whatever is
# finite has converged, so that the report tells whether anything is not.
_ONE_EVALUATION = (_ACCELERATION["none"], 1, _CRITERION["residual"], 1e15, 1, INCREMENTS["native"], 0)
# The operator's z0 without elements: start at zero.
_ZERO = {dim: torch.empty((0,) * dim, device="cpu") for dim in (2, 3)}
_reports: list[tuple[Tensor, array]] = []  # those not in use; a list, whose pop and append are safe between threads


def solve(
    W: Tensor,
    c: Tensor,
    z0: Tensor | None,
    activation: str,
    plan: Plan,
    *,
    out: Tensor | None = None,
    reflected: bool = False,
) -> Outcome:
    start = _ZERO[c.dim()] if z0 is None else z0
    number = ACTIVATIONS[activation].number
    options = *_options(plan, reflected), LARGE_WEIGHT if plan.unless_large else 0.0
    outcome = _run(torch.ops.deq.solve_.default, (W, c, start), out, number, options)
    if plan.unless_large and outcome.report[1] < 0:
        raise LargeWeight
    return outcome


def masked_linear(
    A: Tensor,
    g: Tensor,
    d: Tensor,
    value_of: str | None,
    plan: Plan,
    *,
    u0: Tensor | None = None,
    out: Tensor | None = None,
    reflected: bool = False,
) -> Outcome:
    start = _ZERO[g.dim()] if u0 is None else u0
    number = -1 if value_of is None else ACTIVATIONS[value_of].number
    return _run(torch.ops.deq.masked_linear_.default, (A, g, d, start), out, number, _options(plan, reflected))


def evaluate(W: Tensor, c: Tensor, z: Tensor, activation: str) -> Tensor:
    number = ACTIVATIONS[activation].number
    y, said, report = _run(torch.ops.deq.solve_.default, (W, c, z), None, number, (*_ONE_EVALUATION, 0.0))
    if any(report):  # a solve refuses what is not finite, and keeps what was finite before
        lost = stats.status(y, said) >= Status.DIVERGED
        y.masked_fill_((lost | bool(report[1])).unsqueeze(-1), torch.nan)
    return y


def derivative(W: Tensor, c: Tensor, z: Tensor, activation: str) -> Tensor:
    d = recycle.empty_like(c)
    torch.ops.deq.derivative_.default(W, c, z, d, ACTIVATIONS[activation].number)
    return d


def outer(u: Tensor, z: Tensor) -> Tensor:
    if not type(u) is type(z) is Tensor:
        return torch.matmul(u.mT, z)
    m = u.shape[-1]
    shape = *u.shape[:-2], m, m
    out = recycle.empty(u, shape) if math.prod(shape) * u.element_size() >= LEAST_BYTES else None
    if u.dtype not in products.DTYPES:
        return torch.matmul(u.mT, z, out=out)
    if out is None:
        out = u.new_empty(shape)
    torch.ops.deq.product_.default(u, z, out, 1.0, 0, 1)
    return out


def _options(plan: Plan, reflected: bool) -> tuple:
    found = plan.kept.get(reflected)
    if found is None:
        found = plan.kept[reflected] = (
            _ACCELERATION[plan.acceleration],
            plan.depth,
            _CRITERION[plan.criterion],
            plan.tol,
            plan.max_iter,
            INCREMENTS[plan.increments],
            int(reflected),
        )
    return found


def _run(operator, inputs: tuple[Tensor, ...], out: Tensor | None, number: int, options: tuple) -> Outcome:
    """Its second input is the injection, whose shape the result has where there is no memory for it."""
    injection = inputs[1]
    if out is None:
        if injection.nbytes < LEAST_BYTES:  # without a call: it costs a microsecond where caches are cold
            out = torch.empty_like(injection, memory_format=torch.contiguous_format)
        else:
            out = recycle.empty_like(injection)
    said = stats.allocate(out)
    try:  # a report is read at once and used again: 2 us less than a new one, 10 us where caches are cold
        report = _reports.pop()
    except IndexError:
        report = _new_report()
    operator(*inputs, out, said, report[0], number, *options)
    numbers = report[1].tolist()
    _reports.append(report)
    return Outcome(out, said, numbers)


def _new_report() -> tuple[Tensor, array]:
    """A tensor and its numbers as Python reads them in 0.1 us; through the tensor it takes 2, and 8 where caches are
    cold."""
    numbers = array("q", [0] * 4)
    return torch.frombuffer(numbers, dtype=torch.int64), numbers
