"""The compiled row engine (csrc/cpu): the whole solve in one call."""

import torch
from torch import Tensor

from ..activations import ACTIVATIONS
from ..plan import Plan
from .outcome import Outcome

_ACCELERATION = {"none": 0, "anderson": 1, "on_demand": 2}
_CRITERION = {"residual": 0, "error": 1}
_INCREMENTS = {"native": 0, "int8": 1, "bfloat16": 2}  # native where this CPU or build has no such kernels


def _options(plan: Plan, reflected: bool = False) -> tuple:
    return (
        _ACCELERATION[plan.acceleration],
        plan.depth,
        _CRITERION[plan.criterion],
        plan.tol,
        plan.max_iter,
        _INCREMENTS[plan.increments],
        int(reflected),
    )


def _allocate(like: Tensor) -> tuple[Tensor, ...]:
    per_sample = like.shape[:-1]
    return (
        torch.empty(per_sample, dtype=torch.int32),
        torch.empty(per_sample, dtype=torch.float64 if like.dtype == torch.float64 else torch.float32),
        torch.empty(per_sample, dtype=torch.uint8),
        torch.empty(4, dtype=torch.int64),
    )


def solve(W: Tensor, c: Tensor, z0: Tensor | None, activation: str, plan: Plan) -> Outcome:
    z = torch.empty(c.shape, dtype=c.dtype)
    stats = _allocate(c)
    start = c[..., :0] if z0 is None else z0
    torch.ops.deq.solve_.default(W, c, start, z, *stats, ACTIVATIONS[activation].number, *_options(plan))
    return Outcome(z, *stats)


def masked_linear(
    A: Tensor, g: Tensor, d: Tensor, value_of: str | None, plan: Plan, out: Tensor | None = None
) -> Outcome:
    u = torch.empty(g.shape, dtype=g.dtype) if out is None else out
    stats = _allocate(g)
    number = -1 if value_of is None else ACTIVATIONS[value_of].number
    torch.ops.deq.masked_linear_.default(A, g, d, u, *stats, number, *_options(plan))
    return Outcome(u, *stats)


def derivative(W: Tensor, c: Tensor, z: Tensor, activation: str) -> Tensor:
    d = torch.empty(c.shape, dtype=c.dtype)
    torch.ops.deq.derivative_.default(W, c, z, d, ACTIVATIONS[activation].number)
    return d
