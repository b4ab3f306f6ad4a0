"""Exact gradients of an equilibrium, by the implicit function theorem.

At ``z = act(W z + c)`` with ``D = diag(act'(W z + c))`` and the loss gradient ``g = dL/dz``, the adjoint
``u = D (g + W^T u)`` is again a fixed point of the engine's kind: transposed, masked by D instead of activated. Then
``dL/dc = u`` and ``dL/dW = sum over samples of u z^T``. Its residual is relative: a gradient is as exact for a loss of
1e-6 as for one of 1e6.
"""

from collections import deque
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch._C._functorch import unwrap_if_dead
from torch.autograd import forward_ad

from . import stats as layout
from .activations import ACTIVATIONS
from .backends import Deferred, Outcome, get_backend
from .backward import backward_pass, saved_primals, tangent_pass
from .batch import Batch, largest
from .modes import is_captured
from .plan import Plan
from .profiling import ranges
from .reference import _norm
from .solution import ConvergenceError, Solution, Status, refuse_non_finite, report_failures, warn
from .solvers import ladder

# Reports of gradients that are still on a GPU: nobody holds them, so they wait for the next status that is read.
# With on_failure, and the stream that the gradient is computed on: who reads the status may work on another.
_unread: deque[tuple[Deferred, str, torch.cuda.Stream | None]] = deque(maxlen=64)


class _Tally(NamedTuple):
    """counts (2,) int64: samples of captured gradients that failed, in all replays, by _TOLD; told: those told of."""

    counts: Tensor
    told: list[int]


_TOLD = ("warn", "raise")
_tallies: dict[torch.device, _Tally] = {}
_replayed: set[torch.device] = set()  # with gradients in captures

PHANTOM_STEPS, PHANTOM_DAMPING = 5, 0.5  # Geng et al. 2021 use a handful of damped steps


class Problem(NamedTuple):
    """What a solve is asked for, apart from its tensors."""

    activation: str
    plan: Plan
    on_failure: str


def equilibrium(W: Tensor, c: Tensor, z0: Tensor | None, problem: Problem, backward: str) -> tuple:
    """Solve canonical tensors (see deq.backends) with the gradient that ``backward`` names: an Outcome's fields."""
    if not _is_differentiated(W, c):
        return _run(W, c, z0, problem)
    if backward == "implicit":
        return _apply(_Equilibrium, W, c, z0, problem)
    with torch.no_grad():  # without tangents either: what is differentiated is evaluated below
        tensors = (None if t is None else t.detach() for t in (W, c, z0))
        in_transform = torch._C._are_functorch_transforms_active()
        solved, stats, report = _apply(_Equilibrium, *tensors, problem) if in_transform else _run(*tensors, problem)
    if isinstance(report, list) and any(report[1:]):  # not finite, which the caller refuses; nothing was solved
        return solved, stats, report
    if backward == "unrolled":
        return _unrolled(W, c, z0, solved, stats, problem.activation), stats, report
    return approximate(W, c, solved, problem.activation, backward), stats, report


def approximate(W: Tensor, c: Tensor, solved: Tensor, activation: str, backward: str) -> Tensor:
    """The equilibrium ``solved`` with the gradient of one evaluation there ("one_step"), or a few damped ones.

    Canonical tensors; computed in float32 where they are of 16 bits, and rounded once.
    """
    W, c, z = _widened(W, c, solved)
    if backward == "one_step":
        z = _evaluate(W, c, z, activation)[0]
    else:
        for _ in range(PHANTOM_STEPS):
            z = (1 - PHANTOM_DAMPING) * z + PHANTOM_DAMPING * _evaluate(W, c, z, activation)[0]
    return _narrowed(z, solved.dtype)


def _unrolled(W: Tensor, c: Tensor, z0: Tensor | None, solved: Tensor, stats: Tensor, activation: str) -> Tensor:
    """The plain iteration that led to ``solved`` once more, all of it in the graph; of a sample that failed the best
    iterate."""
    converged = (layout.status(solved, stats) == Status.CONVERGED.value).unsqueeze(-1)
    last = layout.iterations(solved, stats).unsqueeze(-1)
    W, c, z = _widened(W, c, solved)
    y = start = torch.zeros_like(c) if z0 is None else z0.detach().to(c.dtype)
    best = torch.full_like(last, torch.inf, dtype=c.dtype)
    for k in range(1, max(1, largest(last)) + 1):  # no samples have a graph too
        image, finite = _evaluate(W, c, y, activation)
        step, size = (_norm(t.detach()).unsqueeze(-1) for t in (image - y, image))
        better = (last >= k) & finite & ((residual := torch.where(step > 0, step / size, step)) < best)
        best = torch.where(better, residual, best)
        z = torch.where(torch.where(converged, last == k, better), image, z)
        y = torch.where(last > k, image, start)
    return _narrowed(z, solved.dtype)


def _evaluate(W: Tensor, c: Tensor, z: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """``act(W z + c)`` and the rows (..., 1) in which it is finite; the others are those of z and have no gradient."""
    x = z @ W.mT + c
    finite = torch.isfinite(x).all(-1, keepdim=True)
    # The derivative at a number that is not finite times a gradient of zero would be NaN.
    return torch.where(finite, ACTIVATIONS[activation].value(torch.where(finite, x, 0.0)), z), finite


def _widened(*tensors: Tensor) -> list[Tensor]:
    return [t.to(torch.promote_types(t.dtype, torch.float32)) for t in tensors]


def _narrowed(z: Tensor, dtype: torch.dtype) -> Tensor:
    """z in ``dtype``, held in its range."""
    if z.dtype == dtype:
        return z
    most = torch.finfo(dtype).max
    return z.clamp(-most, most).to(dtype)


def _is_differentiated(W: Tensor, c: Tensor) -> bool:
    reverse = torch.is_grad_enabled() and (W.requires_grad or c.requires_grad)
    # Inside a dual level tensors may carry a tangent.
    return reverse or forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()


def _run(W: Tensor, c: Tensor, z0: Tensor | None, problem: Problem) -> Outcome:
    if ranges.listening:
        return ranges.call("solve", ladder.solve, W, c, z0, problem.activation, problem.plan)
    return ladder.solve(W, c, z0, problem.activation, problem.plan)


class _Equilibrium(torch.autograd.Function):
    """(W, c, z0, problem) -> an Outcome; only its z is differentiable, and z0 has no influence on an equilibrium."""

    @staticmethod
    def forward(W, c, z0, problem):
        return tuple(_run(W, c, z0, problem))

    @staticmethod
    def setup_context(ctx, inputs, output):
        W, c, _, ctx.problem = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        # c is kept only where z alone does not give the derivative.
        keep = (W, output[0], None if ACTIVATIONS[ctx.problem.activation].derivative_of_value else c)
        _save(ctx, *keep)

    @staticmethod
    @backward_pass
    def backward(ctx, g, *_):
        if g is None:
            return None, None, None, None
        W, z, c = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph: the gradient must itself be differentiable
            u = _apply(_MaskedLinear, W.mT, derivative_at(W, c, z, ctx.problem.activation), g, ctx.problem)
        else:
            u = adjoint(W, z, c, g, ctx.problem)
        dW = _outer(u, z, ctx.problem.plan.backend) if ctx.needs_input_grad[0] else None
        return dW, u, None, None

    @staticmethod
    @tangent_pass
    def jvp(ctx, dW, dc, *_):
        W, z, c = saved_primals(ctx)
        g = torch.zeros_like(z) if dc is None else dc
        if dW is not None:
            g = g + z @ dW.mT
        dz = _apply(_MaskedLinear, W, derivative_at(W, c, z, ctx.problem.activation), g, ctx.problem)
        return dz, None, None

    @staticmethod
    def vmap(info, in_dims, W, c, z0, problem):
        many = Batch(info.batch_size, in_dims[0], W)
        W, c = many.weight(W), many.samples(c, in_dims[1])
        z0 = None if z0 is None else many.samples(z0, in_dims[2])
        z, stats, report = _apply(_Equilibrium, W, c, z0, problem)
        if isinstance(report, list) and any(report):
            refuse_non_finite(report[1:], W, z.shape[:-1])
            solution = Solution(z, stats, problem.plan)
            report_failures(solution, problem.on_failure, problem.plan.tol, "deq.solve")
        return (many.apart(z), many.stats(z, stats), None), (0, 0, None)


class _MaskedLinear(torch.autograd.Function):
    """(A, d, g, problem) -> ``u = d * (A u + g)``. Its gradient is one more such solve: differentiable for ever."""

    @staticmethod
    def forward(A, d, g, problem):
        return solve_masked(A, g, d, None, problem)

    @staticmethod
    def setup_context(ctx, inputs, output):
        A, d, g, ctx.problem = inputs
        _save(ctx, A, d, g, output)

    @staticmethod
    @backward_pass
    def backward(ctx, h):
        A, d, g, u = ctx.saved_tensors
        q = _apply(_MaskedLinear, A.mT, d, h, ctx.problem)
        dA = _outer(q, u, ctx.problem.plan.backend) if ctx.needs_input_grad[0] else None
        dd = (h + q @ A) * (u @ A.mT + g) if ctx.needs_input_grad[1] else None
        return dA, dd, q, None

    @staticmethod
    @tangent_pass
    def jvp(ctx, dA, dd, dg, _):
        A, d, g, u = saved_primals(ctx)
        t = masked_tangent(A, d, g, u, dA, dd, dg)
        return t + _apply(_MaskedLinear, A, d, t @ A.mT, ctx.problem)

    @staticmethod
    def vmap(info, in_dims, A, d, g, problem):
        many = Batch(info.batch_size, in_dims[0], A)
        d, g = many.samples(d, in_dims[1]), many.samples(g, in_dims[2])
        return many.apart(_apply(_MaskedLinear, many.weight(A), d, g, problem)), 0


def masked_tangent(
    A: Tensor, d: Tensor, g: Tensor, u: Tensor, dA: Tensor | None, dd: Tensor | None, dg: Tensor | None
) -> Tensor:
    """t of the tangent ``du = d * (A du) + t`` of ``u = d * (A u + g)``: ``du - t`` is ``v = d * (A v + A t)``."""
    t = torch.zeros_like(u) if dg is None else d * dg
    if dA is not None:
        t = t + d * (u @ dA.mT)
    return t if dd is None else t + dd * (u @ A.mT + g)


def _save(ctx, *tensors: Tensor | None) -> None:
    ctx.save_for_backward(*tensors)
    if forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active():
        ctx.save_for_forward(*tensors)


def _eager_apply(function):
    """What ``function.apply`` comes to outside torch.func and torch.compile, without its 20 microseconds of Python: the
    newer form of a Function binds its arguments to an inspected signature at every call. The one thing left to the
    caller are the wrappers of a torch.func transform that has ended."""

    def forward(ctx, *inputs):
        output = function.forward(*inputs)
        function.setup_context(ctx, inputs, output)
        return output

    members = {"forward": staticmethod(forward), "setup_context": torch.autograd.Function.setup_context}
    eager = type(function.__name__, (function,), members)
    return super(torch.autograd.Function, eager).apply


_EAGER = {function: _eager_apply(function) for function in (_Equilibrium, _MaskedLinear)}


def _apply(function, first: Tensor, second: Tensor, third: Tensor | None, problem: Problem):
    if torch._C._are_functorch_transforms_active():
        return function.apply(first, second, third, problem)
    third = None if third is None else unwrap_if_dead(third)
    return _EAGER[function](unwrap_if_dead(first), unwrap_if_dead(second), third, problem)


def derivative_at(W: Tensor, c: Tensor | None, z: Tensor, activation: str) -> Tensor:
    """``act'(W z + c)`` at the equilibrium, differentiable; c where z alone does not give it."""
    entry = ACTIVATIONS[activation]
    return entry.derivative_of_value(z) if c is None else entry.derivative(z @ W.mT + c)


def adjoint(W: Tensor, z: Tensor, c: Tensor | None, g: Tensor, problem: Problem) -> Tensor:
    """u with one buffer of its size: the derivative is formed inside the engine, or in the buffer of u."""
    if c is None:
        return solve_masked(W.mT, g, z, problem.activation, problem)

    def derivative() -> Tensor:
        return get_backend(problem.plan.backend).derivative(W, c, z, problem.activation)

    d = derivative()
    return solve_masked(W.mT, g, d, None, problem, out=d, recompute=derivative)


def solve_masked(A: Tensor, g: Tensor, d: Tensor, value_of: str | None, problem: Problem, **memory) -> Tensor:
    arguments = A, g, d, value_of, problem.activation, problem.plan
    if ranges.listening:
        u, stats, report = ranges.call("adjoint", partial(ladder.masked_linear, **memory), *arguments)
    else:
        u, stats, report = ladder.masked_linear(*arguments, **memory)
    if isinstance(report, Deferred):
        if problem.on_failure != "ignore":
            report_later(report, problem.on_failure, u)
    elif report is not None and report[0]:
        report_failures(
            Solution(u, stats, problem.plan), problem.on_failure, problem.plan.tol, "the gradient of deq.solve"
        )
    return u


def report_later(report: Deferred, on_failure: str, u: Tensor) -> None:
    """Tell what became of the gradient u when a status is read next. Of one in a CUDA graph's capture there is nothing
    to be read before the graph runs, and then its memory is the next replay's: failures are added up beside it, if a
    gradient outside of a capture was there before, as a warm-up is."""
    captured = is_captured(u)
    if not captured:
        _unread.append((report, on_failure, torch.cuda.current_stream(u.device) if u.is_cuda else None))
    if u.device not in _tallies and not captured:
        with torch.inference_mode(False):
            _tallies[u.device] = _Tally(torch.zeros(2, dtype=torch.int64, device=u.device), [0, 0])
    if captured and u.device in _tallies:
        tally = _tallies[u.device]
        tally.counts[_TOLD.index(on_failure)].add_(report.failures())
        _replayed.add(u.device)


def report_gradients(solution: Solution) -> None:
    """Warn or raise for the gradients computed on a GPU that did not converge; called where a status is read."""
    while _unread:
        report, on_failure, stream = _unread.popleft()
        with torch.cuda.stream(stream):
            failed = report.read()[0]
        if failed:
            _tell(f"{failed} of {report.samples} samples did not converge", on_failure, solution)
    for device in () if is_captured(solution.z) else list(_replayed):
        tally = _tallies[device]
        counts = tally.counts.tolist()
        before, tally.told[:] = list(tally.told), counts
        for on_failure, now, then in zip(_TOLD, counts, before, strict=True):
            if now > then:
                _tell(f"{now - then} samples did not converge in replays of CUDA graphs", on_failure, solution)


def _tell(what: str, on_failure: str, solution: Solution) -> None:
    message = f"the gradient of deq.solve: {what}"
    if on_failure == "raise":
        raise ConvergenceError(message, solution)
    warn(f"{message}; pass on_failure='ignore' to silence this.")


def _outer(u: Tensor, z: Tensor, backend: str) -> Tensor:
    """The sum over samples of ``u z^T``, in the shape of W."""
    if torch.is_grad_enabled() or torch._C._are_functorch_transforms_active():
        return torch.matmul(u.mT, z)  # not @, which finds its way in 4 us more where caches are cold
    outer = get_backend(backend).outer
    return ranges.call("dW", outer, u, z) if ranges.listening else outer(u, z)
