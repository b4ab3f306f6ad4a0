"""The compiled row engine (csrc/cpu): the whole solve in one call."""

import torch
from torch import Tensor

from .. import _library, stats
from ..activations import ACTIVATIONS
from ..plan import INCREMENTS, Plan
from .outcome import Outcome

_ACCELERATION = {"none": 0, "anderson": 1, "on_demand": 2}
_CRITERION = {"residual": 0, "error": 1}
_ZERO = {dim: torch.empty((0,) * dim) for dim in (2, 3)}  # the operator's z0 without elements: start at zero
_reports: list[Tensor] = []  # those not in use; a list, whose pop and append are safe between threads


def increments_here() -> str:
    """The increments that go with the instruction set in use: "int8", "bfloat16", or "native" for none."""
    if _library.compiled is not None:
        for name in ("int8", "bfloat16"):
            if _library.compiled.deq_cpu_has_precision(INCREMENTS[name]):
                return name
    return "native"


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
    z = torch.empty_like(c, memory_format=torch.contiguous_format) if out is None else out
    start = _ZERO[c.dim()] if z0 is None else z0
    number = ACTIVATIONS[activation].number
    return _run(torch.ops.deq.solve_.default, (W, c, start), z, number, plan, reflected)


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
    u = torch.empty_like(g, memory_format=torch.contiguous_format) if out is None else out
    start = _ZERO[g.dim()] if u0 is None else u0
    number = -1 if value_of is None else ACTIVATIONS[value_of].number
    return _run(torch.ops.deq.masked_linear_.default, (A, g, d, start), u, number, plan, reflected)


def derivative(W: Tensor, c: Tensor, z: Tensor, activation: str) -> Tensor:
    d = torch.empty_like(c, memory_format=torch.contiguous_format)
    torch.ops.deq.derivative_.default(W, c, z, d, ACTIVATIONS[activation].number)
    return d


def _options(plan: Plan, reflected: bool) -> tuple:
    return (
        _ACCELERATION[plan.acceleration],
        plan.depth,
        _CRITERION[plan.criterion],
        plan.tol,
        plan.max_iter,
        INCREMENTS[plan.increments],
        int(reflected),
    )


def _run(operator, inputs: tuple[Tensor, ...], out: Tensor, number: int, plan: Plan, reflected: bool) -> Outcome:
    said = stats.allocate(out)
    options = _options(plan, reflected)
    if torch.compiler.is_compiling():
        operator(*inputs, out, said, _new_report(), number, *options)
        return Outcome(out, said, None)
    try:  # a report is read at once and used again: 2 us less than a new one, 10 us where caches are cold
        report = _reports.pop()
    except IndexError:
        report = _new_report()
    operator(*inputs, out, said, report, number, *options)
    numbers = report.tolist()
    _reports.append(report)
    return Outcome(out, said, numbers)


def _new_report() -> Tensor:
    return torch.empty(4, dtype=torch.int64, device="cpu")
