"""Weights of known structure: the equilibrium without iterating on it, and its exact gradient.

    identity activation   any W: (I - W)^-1 c, one factorisation for all samples
    lower triangular      forward substitution
    diagonal              a scalar equation an element
    diagonal + rank r     a fixed point in R^r

The methods are in :mod:`deq.direct.methods` and :mod:`deq.direct.low_rank`; here they are chosen, differentiated and
reported. The adjoint ``u = D (g + W^T u)`` of a solve is again a problem of the same structure; the gradient of c is u,
that of the structure's own tensors is the one of ``<u, W z>``: nothing of size m x m for a diagonal.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor

from .. import stats, weights
from ..activations import ACTIVATIONS
from ..backends import Counted, Deferred, Outcome
from ..backward import backward_pass
from ..implicit import Problem, report_later
from ..plan import Plan
from ..profiling import ranges
from ..solution import Solution, Status, report_failures
from ..solvers import ladder
from . import methods
from .low_rank import LowRank
from .methods import Diagonal, Linear, Result, Triangular, is_compiled, is_finite

Method = Linear | Triangular | Diagonal | LowRank

HAVE_A_DIRECT_METHOD = (
    "it serves the identity activation with any W, and deq.weights.LowerTriangular, Diagonal and DiagonalLowRank with "
    "every activation"
)
# m^2 B below which a low rank is not worth its fixed cost of 0.3 ms (64 x 256, rank 8: half the dense engine's speed,
# 256 x 64: 1.8 times).
REDUCING_PAYS_FROM = 2e6
# Width up to which plain PyTorch substitutes too, on a CPU and elsewhere: exact where large entries make the iterates
# grow, in a tenth of the time or less (100 x 16 to 1024 x 16); where they do not, in a third of it at 64 x 64 and at
# 512 x 256, in 2 to 10 times of it at 512 x 16 on a quiet machine. A GPU has ten launches and more to wait for a unit.
SUBSTITUTED_IN_PYTORCH = {True: 1024, False: 64}
FACTOR_PAYS_BELOW = 8  # m / B; one LU costs 14 products W z at m = 512, B = 64, iterating about ten and more


def solve(
    W: Tensor | weights.Structure,
    c: Tensor,
    z0: Tensor | None,
    problem: Problem,
    backward: str,
    forced: bool,
    frozen: bool,
) -> tuple[Solution, Deferred | None] | Tensor | None:
    """The equilibrium by the direct method of W, or None where it has none or that is not the way to go; where some
    samples are beyond the tolerance, z (..., m), finite, to start the iteration from.

    On a GPU with the report that is still there, and no sample is looked at here.

    Arguments as checked by ``deq.solve``; the plan says precision, tolerance and backend. With ``forced``
    (solver="direct") the method is used whether it pays or not, and samples beyond the tolerance are reported STALLED.
    Raises ValueError for NaN or infinity in W, d, P, Q or c, and with ``forced`` saying why there is no direct method.
    """
    if backward != "implicit":
        if forced:
            raise ValueError(f"solver='direct' has the exact gradient alone, backward='implicit'; got {backward!r}")
        return None
    method, why_not = _choose(W, c, problem.activation, problem.plan, forced, frozen)
    if method is None:
        return _declined(why_not, forced)
    arguments = method, c, z0, problem, _flat(W, c), forced
    return ranges.call("solve", _solve, *arguments) if ranges.listening else _solve(*arguments)


def _declined(why_not: str, forced: bool) -> None:
    if forced:
        raise ValueError(f"solver='direct' cannot solve this: {why_not}; {HAVE_A_DIRECT_METHOD}")


def _solve(
    method: Method, c: Tensor, z0: Tensor | None, problem: Problem, flat: tuple[int, ...], forced: bool
) -> tuple[Solution, Deferred | None] | Tensor | None:
    """:func:`solve` by the method; ``flat``: the canonical shape of c."""
    activation, plan, on_failure = problem
    deferred = method.defers and methods.is_deferred(c)
    if not deferred and z0 is not None and not is_finite(z0):
        return _declined("z0 is not finite", forced)
    if (why_not := method.why_not(activation)) is not None:
        return _declined(why_not, forced)
    plan = _plan_of(plan, method.name, method.what)
    precision = getattr(torch, plan.precision)
    start = None if z0 is None else z0.detach().reshape(flat).to(precision)
    z, residual, iterations = _run(method, activation, plan, on_failure, start, c.reshape(flat).to(precision))
    finite = torch.isfinite(c.detach()).all(-1) if deferred else None
    is_last = forced or isinstance(method, Triangular | Diagonal)  # exact to rounding: no iteration makes it better
    judged = residual
    if c.dtype != precision:
        largest = torch.finfo(c.dtype).max
        judged = torch.where(z.detach().abs().amax(-1) <= largest, residual, torch.inf)  # what leaves it has diverged
        z = z.clamp(-largest, largest).to(c.dtype)
    converged = judged <= plan.tol
    if deferred:
        f = ACTIVATIONS[activation].value(c.detach().reshape(z.shape))
        z = torch.where(torch.isfinite(z).all(-1, keepdim=True), z, f)  # a singular system: its only iterate is f(0)
        status = _status(converged, judged).masked_fill_(~finite.reshape(residual.shape), int(Status.NONFINITE))
    elif bool(converged.all()):
        status = torch.zeros(residual.shape, dtype=torch.uint8, device=c.device)
    else:
        if not is_finite(c):
            _refuse_non_finite_samples(c)
        if not is_last:
            return torch.where(torch.isfinite(z).all(-1, keepdim=True), z.detach(), 0.0).reshape(c.shape)
        if not is_finite(z):  # a singular system: its only iterate is f(0)
            z = torch.where(torch.isfinite(z).all(-1, keepdim=True), z, ACTIVATIONS[activation].value(c.reshape(flat)))
        status = _status(converged, judged)
    z = z if z.shape == c.shape else z.reshape(c.shape)
    solution = Solution(z, stats.pack(iterations, residual, status), plan)
    if deferred:
        report = Counted(stats.status(z, solution.stats), method.parts[0])
        if isinstance(method, Linear) and not forced:  # what it does not solve is iterated, when that is known
            outcome = Outcome(z.detach().reshape(flat), solution.stats, report)
            ladder.postpone(outcome, method.W, c.reshape(flat), activation, plan)
        return solution, report
    if is_last:  # otherwise every sample has converged
        report_failures(solution, on_failure, plan.tol, "deq.solve")
    return solution, None


def gradients(
    W: Tensor | weights.Structure,
    c: Tensor | None,
    z: Tensor,
    g: Tensor,
    of_parts: bool,
    problem: Problem,
    forced: bool,
    frozen: bool,
) -> tuple[Tensor, list[Tensor]] | None:
    """The gradients of c and with ``of_parts`` of W's own tensors for the gradient g of the equilibrium z, all
    (..., m), by the direct method of W; None where :func:`solve` would not have taken it for its shape. c where z alone
    does not give the derivative.
    """
    activation, plan, on_failure = problem
    if not isinstance(W, weights.Structure) and activation != "identity":
        return None
    method, why_not = _choose(W, z, activation, plan, forced, frozen)
    if why_not is not None or method.why_not(activation) is not None:
        return None
    dtype, precision = z.dtype, getattr(torch, plan.precision)
    method = method.of(*(part.to(precision) for part in method.parts))
    c, z, g = (None if x is None else x.reshape(_flat(W, x)).to(precision) for x in (c, z, g))
    u = _adjoint(method, activation, plan, on_failure, z, c, None, g)
    return u.to(dtype), [t.to(dtype) for t in _outer(method, u, z)] if of_parts else []


def _flat(W: Tensor | weights.Structure, c: Tensor) -> tuple[int, ...]:
    batch = W.shape[:1] if isinstance(W, Tensor) and W.dim() == 3 else ()
    return (*batch, math.prod(c.shape[len(batch) : -1]), c.shape[-1])


def _status(converged: Tensor, residual: Tensor) -> Tensor:
    status = torch.where(residual < torch.inf, int(Status.STALLED), int(Status.DIVERGED))
    return torch.where(converged, int(Status.CONVERGED), status).to(torch.uint8)


@lru_cache(maxsize=64)
def _plan_of(plan: Plan, name: str, what: str) -> Plan:
    why = (what, *(reason for reason in plan.why if not reason.startswith("on demand")))
    return replace(plan, map=name, acceleration="none", adapts=False, reflects=False, why=why)


def _run(method: Method, activation: str, plan: Plan, on_failure: str, start: Tensor | None, c: Tensor) -> tuple:
    """z, residual and iterations of canonical rows, in the precision of the plan."""
    looks = not (is_compiled(c) and method.refuses_samples) and not (method.defers and methods.is_deferred(c))
    if looks and not is_finite(c):
        return torch.full_like(c, torch.nan), c.new_full(c.shape[:-1], torch.nan), None  # and the caller says which
    parts = tuple(part.to(c.dtype) for part in method.parts)
    if torch.is_grad_enabled() and any(t.requires_grad for t in (c, *parts)):
        return _Direct.apply(method, activation, plan, on_failure, start, c, *parts)
    result = _forward(method.of(*parts), c, activation, start)
    return result.z, result.residual, _counts(result, c)


def _forward(method: Method, c: Tensor, activation: str, start: Tensor | None) -> Result:
    """``method.solve`` with the rows near 1 where a factor changes nothing else."""
    scale = None
    if not method.refuses_samples and ACTIVATIONS[activation].homogeneous:
        scale = _far_from_one(c)
    if scale is not None and activation == "relu" and not methods.is_deferred(c):
        scale = _far_from_one(c.relu())  # beside what relu ends the others would be lost
    if scale is None:
        return method.solve(c, activation, start)
    least = torch.finfo(c.dtype).min
    result = method.solve((c * scale).clamp(min=least), activation, None if start is None else start * scale)
    return _held_in_range(result._replace(z=result.z / scale))


def _held_in_range(result: Result) -> Result:
    """A row that leaves the range of its dtype ends at the edge, with an infinite residual."""
    largest = torch.finfo(result.z.dtype).max
    held = result.z.clamp(-largest, largest)
    leaves = (result.z != held).any(-1) & ~result.z.isnan().any(-1)
    return result._replace(z=held, residual=torch.where(leaves, torch.inf, result.residual))


def _counts(result: Result, c: Tensor) -> Tensor:
    if isinstance(result.iterations, Tensor):
        return result.iterations
    return torch.full(c.shape[:-1], result.iterations, dtype=torch.int32, device=c.device)


def _choose(
    W: Tensor | weights.Structure, c: Tensor, activation: str, plan: Plan, forced: bool, frozen: bool
) -> tuple[Method | None, str | None]:
    """The method of W, or why there is none."""
    if torch._C._are_functorch_transforms_active():
        return None, "torch.func transforms need the iteration"
    if torch.autograd.forward_ad._current_level >= 0:
        return None, "forward-mode differentiation needs the iteration"
    if isinstance(W, weights.Dense):
        W = W.W
    if isinstance(W, Tensor):
        if activation != "identity":
            return None, f"W is dense and the activation is {activation!r}"
        m, B = W.shape[-1], c.numel() // max(1, c.shape[-1] * math.prod(W.shape[:-2]))
        if not forced and not frozen and m > FACTOR_PAYS_BELOW * B:
            return None, "a factorisation for few samples costs more than iterating"
        # A weight that is trained is inverted for one step only, which pays from B = m on (float32: 5.8 products at
        # m = B = 256 against 1.4 for the LU, but 1 instead of 3 for each of the two solves).
        inverts = m <= B or (frozen and m <= FACTOR_PAYS_BELOW * B)
        return Linear(W, inverts, tol=plan.tol), None
    if isinstance(W, weights.LowerTriangular):
        if not forced and plan.backend == "reference" and W.width > SUBSTITUTED_IN_PYTORCH[c.is_cpu]:
            return None, "in plain PyTorch substitution takes longer than iterating"
        return Triangular(W.W, W.strict, backend=plan.backend), None
    if isinstance(W, weights.Diagonal):
        return Diagonal(W.d), None
    if isinstance(W, weights.DiagonalLowRank):
        if not forced and 2 * W.rank > W.width:
            return None, "the rank is above half of the width"
        if not forced and W.width * c.numel() < REDUCING_PAYS_FROM:
            return None, "so small a problem is iterated in less time than it is reduced"
        if plan.criterion == "error":
            return None, "criterion='error' is not estimated in R^r"
        return LowRank(W.d, W.P, W.Q, plan.tol, plan.max_iter), None
    return None, f"{type(W).__name__} has no direct method"


class _Direct(torch.autograd.Function):
    """(method, ..., c, *parts of the weight) -> z, residual, iterations; z is differentiable in c and the parts."""

    @staticmethod
    def forward(ctx, method, activation, plan, on_failure, start, c, *parts):
        result = _forward(method.of(*parts), c, activation, start)
        z, iterations = result.z, _counts(result, c)
        entry = ACTIVATIONS[activation]
        keep = (None, None) if entry.derivative_of_value else (c, result.derivative)
        ctx.save_for_backward(z, *keep, *parts)
        ctx.mark_non_differentiable(result.residual, iterations)
        ctx.set_materialize_grads(False)
        ctx.settings = method.of(*(None for _ in parts)), activation, plan, on_failure
        return z, result.residual, iterations

    @staticmethod
    @backward_pass
    def backward(ctx, g, *_):
        if g is None:
            return (None,) * (6 + len(ctx.settings[0].parts))
        z, c, derivative, *parts = ctx.saved_tensors
        method, activation, plan, on_failure = ctx.settings
        method = method.of(*parts)
        entry = ACTIVATIONS[activation]
        if torch.is_grad_enabled():  # create_graph: the gradient must itself be differentiable
            s = entry.derivative_of_value(z) if entry.derivative_of_value else entry.derivative(method.apply(z) + c)
            u = _Masked.apply(method.T, plan, on_failure, s, g, *method.T.parts)
        else:
            u = _adjoint(method, activation, plan, on_failure, z, c, derivative, g)
        outer = _outer(method, u, z) if any(ctx.needs_input_grad[6:]) else (None,) * len(parts)
        return None, None, None, None, None, u, *_needed(outer, ctx.needs_input_grad[6:])


def _adjoint(
    method: Method,
    activation: str,
    plan: Plan,
    on_failure: str,
    z: Tensor,
    c: Tensor | None,
    derivative: Tensor | None,
    g: Tensor,
) -> Tensor:
    """``u = D (g + W^T u)`` at z; c where z alone does not give D, or the derivative if it is known."""
    entry = ACTIVATIONS[activation]
    if isinstance(method, Triangular) and entry.derivative_of_value and plan.backend == "cpu":
        derivative = None
        masked = lambda g: method.T.masked_of_value(z, activation, g)  # noqa: E731
    else:
        if derivative is None:
            derivative = entry.derivative_of_value(z) if c is None else entry.derivative(method.apply(z) + c)
        masked = lambda g: method.T.masked(derivative, g)  # noqa: E731
    arguments = masked, g, plan, on_failure, derivative
    return ranges.call("adjoint", _solve_masked, *arguments) if ranges.listening else _solve_masked(*arguments)


class _Masked(torch.autograd.Function):
    """``u = s * (W u + g)``. Its gradient is one more such solve: differentiable for ever."""

    @staticmethod
    def forward(ctx, method, plan, on_failure, s, g, *parts):
        u = _solve_masked(lambda g: method.of(*parts).masked(s, g), g, plan, on_failure, s)
        ctx.save_for_backward(s, g, u, *parts)
        ctx.settings = method.of(*(None for _ in parts)), plan, on_failure
        return u

    @staticmethod
    @backward_pass
    def backward(ctx, h):
        s, g, u, *parts = ctx.saved_tensors
        method, plan, on_failure = ctx.settings
        method = method.of(*parts)
        q = _Masked.apply(method.T, plan, on_failure, s, h, *method.T.parts)
        ds = (h + method.T.apply(q)) * (method.apply(u) + g) if ctx.needs_input_grad[3] else None
        outer = method.outer(q, u) if any(ctx.needs_input_grad[5:]) else (None,) * len(parts)
        return None, None, None, ds, q, *_needed(outer, ctx.needs_input_grad[5:])


def _outer(method: Method, u: Tensor, z: Tensor) -> tuple[Tensor, ...]:
    """``method.outer`` without NaN where terms of a sum left the range to both sides: their sum, or infinity."""
    outer = method.outer(u, z)
    if torch.is_grad_enabled() or methods.is_deferred(u) or not any(bool(t.sum().isnan()) for t in outer):
        return outer
    exponents = [int(torch.frexp(t.double().abs().amax()).exponent) if u.dtype == torch.float64 else 0 for t in (u, z)]
    near = (torch.ldexp(t.double(), torch.tensor(-e)) for t, e in zip((u, z), exponents, strict=True))
    again = method.of(*(part.double() for part in method.parts)).outer(*near)
    for e in exponents:
        again = [torch.ldexp(t, torch.tensor(e)) for t in again]
    return tuple(torch.where(t.isnan(), a.to(t.dtype), t) for t, a in zip(outer, again, strict=True))


def _needed(gradients: tuple, needs: tuple[bool, ...]) -> tuple:
    return tuple(gradient if need else None for gradient, need in zip(gradients, needs, strict=True))


def _solve_masked(
    masked: Callable[[Tensor], Result],
    g: Tensor,
    plan: Plan,
    on_failure: str,
    s: Tensor | None = None,
) -> Tensor:
    """u of every row of g, NaN where g is not finite (a loss scaler looks for it). Reports residuals beyond tol. s: the
    derivative; None where ``masked`` looks at samples and at their scale itself."""
    finite = scale = None
    deferred = methods.is_deferred(g)
    if s is not None:
        if deferred or not is_finite(g):
            finite = torch.isfinite(g).all(-1, keepdim=True)
            g = torch.where(finite, g, 0.0)
        scale = _far_from_one(g)  # u is linear in g
        if scale is not None and not deferred:  # beside what s ends the others would be lost
            g = g * (s != 0)
            scale = _far_from_one(g)
    result = masked(g) if scale is None else masked(g * scale)
    if scale is not None:
        result = _held_in_range(result._replace(z=result.z / scale))
    u, residual = result.z, result.residual
    if s is not None and (deferred or not bool((residual <= plan.tol).all())):
        # What is singular or overflows has the value at zero for its only iterate, as in a solve, and did not converge.
        lost = ~torch.isfinite(u).all(-1)
        u = torch.where(lost.unsqueeze(-1), (s * g).nan_to_num(), u)
        residual = torch.where(lost | residual.isnan(), torch.inf, residual)
    if deferred and on_failure != "ignore":
        status = _status((residual <= plan.tol) | residual.isnan(), residual)
        report_later(Counted(status, g), on_failure, u)
    elif on_failure != "ignore" and not bool(((residual <= plan.tol) | residual.isnan()).all()):
        status = torch.where(residual <= plan.tol, int(Status.CONVERGED), int(Status.STALLED)).to(torch.uint8)
        solution = Solution(u, stats.pack(_counts(result, g), residual, status), plan)
        report_failures(solution, on_failure, plan.tol, "the gradient of deq.solve")
    return u if finite is None else torch.where(finite, u, torch.nan)


def _far_from_one(rows: Tensor) -> Tensor | None:
    """Powers of two (..., 1) that take the largest element of every row near 1; None if all are near enough."""
    if rows.numel() == 0:
        return None
    largest = rows.abs().amax(-1, keepdim=True)
    near = (largest == 0) | ((largest > 2.0**-20) & (largest < 2.0**20))
    if not methods.is_deferred(rows) and bool(near.all()):
        return None
    limit = 126 if rows.dtype == torch.float32 else 1022
    return torch.where(
        near, 1.0, torch.ldexp(torch.ones_like(largest), -torch.frexp(largest).exponent.clamp(-limit, limit))
    )


def _refuse_non_finite_samples(c: Tensor) -> None:
    place = (~torch.isfinite(c.detach())).any(-1).nonzero()[0].tolist()
    raise ValueError(f"c must be finite; c{place if place else ''} holds NaN or infinity")
