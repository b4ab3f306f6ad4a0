"""Plain PyTorch (deq/reference.py) behind the backend interface: any device, halves computed in float32."""

import torch
from torch import Tensor

from .. import reference, stats
from ..activations import ACTIVATIONS
from ..plan import Plan
from ..solution import Status
from .outcome import Outcome, first_bad


def _wide(plan: Plan, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    dtype = getattr(torch, plan.precision)
    return tuple(None if t is None else t.to(dtype) for t in tensors)


def _options(plan: Plan) -> dict:
    names = ("tol", "max_iter", "acceleration", "depth", "criterion")
    return {name: getattr(plan, name) for name in names}


def _outcome(
    z: Tensor, iterations: Tensor, residual: Tensor, status: Tensor, dtype: torch.dtype, bad: list[int]
) -> Outcome:
    # A value that leaves the range of the caller's dtype is held at its largest number and said to have diverged.
    largest = torch.finfo(dtype).max
    status = torch.where((z.abs() > largest).any(-1), int(Status.DIVERGED), status).to(torch.uint8)
    failed = int((status != Status.CONVERGED).sum())
    return Outcome(z.clamp(-largest, largest).to(dtype), stats.pack(iterations, residual, status), [failed, *bad])


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
    bad = [first_bad(~torch.isfinite(W)), first_bad(~torch.isfinite(c).all(-1))]
    bad.append(0 if z0 is None else first_bad(~torch.isfinite(z0).all(-1)))
    W, wide, z0 = _wide(plan, W, c, z0)
    run = reference.reflected if reflected else reference.solve
    outcome = _outcome(*run(W, wide, activation, z0, **_options(plan)), c.dtype, bad)
    return outcome if out is None else outcome._replace(z=out.copy_(outcome.z))


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
    dtype, finite = g.dtype, torch.isfinite(g).all(-1, keepdim=True)
    bad = [first_bad(~torch.isfinite(A)), first_bad(~finite), 0]
    A, g, d, u0 = _wide(plan, A, g, d, u0)
    if value_of is not None:
        d = ACTIVATIONS[value_of].derivative_of_value(d)
    run = reference.reflected_masked if reflected else reference.masked_linear
    u, iterations, residual, status = run(A, d, torch.where(finite, g, 0.0), u0, **_options(plan))
    status = torch.where(finite.squeeze(-1), status, int(Status.NONFINITE))
    outcome = _outcome(u, iterations, residual, status, dtype, bad)
    u = torch.where(finite, outcome.z, torch.nan)
    return outcome._replace(z=u if out is None else out.copy_(u))


def evaluate(W: Tensor, c: Tensor, z: Tensor, activation: str) -> Tensor:
    return ACTIVATIONS[activation].value(torch.matmul(z, W.mT).add_(c))


def derivative(W: Tensor, c: Tensor, z: Tensor, activation: str) -> Tensor:
    wide = torch.float64 if c.dtype == torch.float64 else torch.float32
    return reference.derivative(W.to(wide), c.to(wide), z.to(wide), activation).to(c.dtype)


def outer(u: Tensor, z: Tensor) -> Tensor:
    return torch.matmul(u.mT, z)
