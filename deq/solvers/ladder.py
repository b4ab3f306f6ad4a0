"""Runs a plan and takes the samples that it does not bring home up a ladder of other means.

The first rung is the plan itself, on the plain or the Cayley map. Samples that it hands over or fails on go, one rung
after the other and only as long as they fail, to

- the Cayley map with Anderson acceleration, first where its matrix K is cheap beside the batch (:func:`deq.plan.fit`);
- the plain map with Anderson acceleration, from the best iterate so far;
- the Cayley map with a tighter tolerance, at once where the first rung was the Cayley map;
- the plain iteration from z0, as ``solver="plain"`` runs it: where the curve of f nearly touches the diagonal, far from
  the equilibrium, whatever makes the residual smaller stays, and the plain iteration goes on (9 to 16 of 512 samples
  of gelu and silu with a mode of 0.97, c between -0.3 and 1, failed without);
- semi-smooth Newton, sample by sample, within a bound on its arithmetic;
- for tanh and sigmoid, whose equilibria it can always lead to, homotopy, within such a bound too.

Whatever ran, a sample is converged only on the residual of the equation itself in the precision of its input, or with a
bound on what int8 increments leave out of it counted in, and the evaluations of all rungs are added up. Which means a
sample gets is decided by its own numbers, by W and by the shapes, never by its batch mates: each has its own number of
evaluations left, and one that took more beside others is taken again with those. Newton and homotopy alone look at how
many there are.

On a GPU nothing waits for the device to learn that all is well. A solve of many launches sees on the way how many
samples failed (deq/backends/chunks.py), and takes them up the ladder at once. One whose host has not seen it (a single
launch, the CUDA kernels) is rescued when its status is first read: what the rungs reach is then written into z, and who
used z before has used the best iterates of the samples that failed. The gradient's adjoint is rescued at once or not at
all, and nothing is inside a capture of the caller's.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from .. import stats
from ..backends import Deferred, Outcome, Settled, get_backend
from ..backends.outcome import first_bad, version_of
from ..cache import forget_captured
from ..modes import is_captured, no_autocast
from ..plan import Plan, varied
from ..solution import Status
from .equations import Adjoint, Equation, Equilibria

# The Cayley map is left at this share of the tolerance; the first product with W then nearly always finds the
# equation's own residual below the tolerance. The second number is for samples with which it did not.
TIGHTER = (1.5, 0.1)
CHUNK = 2048  # rows whose shifted injection exists at a time: bounds the memory of the Cayley map
FAR = 0.1  # residual above which an iterate is no better a start than zero


def solve(W: Tensor, c: Tensor, z0: Tensor | None, activation: str, plan: Plan) -> Outcome:
    """Outcome of :mod:`deq.backends` for ``z = act(W z + c)``, canonical tensors.

    Raises ValueError where ``solver="cayley"`` was asked for and ``2 I - W`` has no inverse.
    """
    backend, outcome = get_backend(plan.backend), None
    if plan.map == "plain":
        outcome = backend.solve(W, c, z0, activation, plan)
        if _is_final(outcome, plan):  # nearly always: what the rungs need is not even made, 8 us less
            waits = isinstance(outcome.report, Deferred)
            return postpone(outcome, W, c, activation, plan, z0) if waits else outcome
    problem = Equilibria(W, c, activation, backend)
    return postpone(_climb(problem, z0, plan, outcome), W, c, activation, plan, z0)


def masked_linear(
    A: Tensor,
    g: Tensor,
    d: Tensor,
    value_of: str | None,
    activation: str,
    plan: Plan,
    *,
    out: Tensor | None = None,
    recompute: Callable[[], Tensor] | None = None,
) -> Outcome:
    """Outcome for the adjoint ``u = d * (A u + g)`` of an equation with ``activation``, A the transpose of its W.

    ``recompute()`` gives d anew where ``out`` is d itself.
    """
    backend, outcome = get_backend(plan.backend), None
    if plan.map == "plain":
        outcome = backend.masked_linear(A, g, d, value_of, plan, out=out)
        if _is_final(outcome, plan):
            return outcome

    problem = Adjoint(A, g, lambda: d, value_of, activation, backend, A.mT)
    return _climb(problem, None, plan, outcome, out, recompute)


def _is_final(outcome: Outcome, plan: Plan) -> bool:
    report = outcome.report
    if not plan.rungs or report is None:
        return True
    return not (report.failed if isinstance(report, Deferred) else report[0])


def postpone(outcome: Outcome, W: Tensor, c: Tensor, activation: str, plan: Plan, z0: Tensor | None = None) -> Outcome:
    """The outcome, canonical; where its host does not know yet whether samples failed, with their rescue for later."""
    report = outcome.report
    if not plan.rungs or not isinstance(report, Deferred) or report.failed is not None:
        return outcome
    if is_captured(c):
        forget_captured(W)
        return outcome
    # Without their graphs, which a solution that is kept must not keep; z with a version of its own, as it is saved for
    # the gradient, which is that at the equilibrium reached.
    W, c = (t.detach() if t.requires_grad else t for t in (W, c))
    z, said, versions = outcome.z.data, outcome.stats, (version_of(W), version_of(c))

    def rescue() -> None:
        if (version_of(W), version_of(c)) == versions:  # else that equation is gone
            # In inference mode tensors made in that mode may be written to as well; who reads a status may do so
            # under autocast.
            with torch.inference_mode(), no_autocast(c.device.type):
                problem = Equilibria(W, c, activation, get_backend(plan.backend))
                _rescue_all(problem, z0, Outcome(z, said, None), plan)

    report.rescue = rescue
    return outcome


def _climb(
    problem: Equation,
    start: Tensor | None,
    plan: Plan,
    outcome: Outcome | None,
    out: Tensor | None = None,
    recompute: Callable[[], Tensor] | None = None,
) -> Outcome:
    """``outcome`` is that of the plain map, None where the plan begins with the Cayley map."""
    plan = varied(plan, unless_large=False)  # that was about W; K is as large as it has to be
    if outcome is None:
        outcome = _first_by_cayley(problem, start, plan, out)
    if outcome is None:
        outcome = problem.plain(start, plan, out)
        missing = not plan.adapts and plan.max_iter > 1
        bad_input = isinstance(outcome.report, list) and any(outcome.report[1:])  # not finite, and said so
        if missing and not bad_input:
            raise ValueError("solver='cayley' needs an inverse of 2 I - W, and W has none; try 'auto' or 'anderson'")
    if _is_final(outcome, plan):
        return outcome
    report, deferred = outcome.report, isinstance(outcome.report, Deferred)
    numbers = report.read() if deferred else report
    if recompute is not None:
        problem = replace(problem, d=recompute)
    if not numbers[1]:  # of a W that is not finite the front door has more to say than the rungs
        _rescue_all(problem, start, outcome, plan)
    status = _read(outcome)[2]
    numbers = [int((status != Status.CONVERGED).sum()), *numbers[1:]]
    return outcome._replace(report=Settled(numbers, status.numel(), report.weight()) if deferred else numbers)


def _first_by_cayley(problem: Equation, start: Tensor | None, plan: Plan, out: Tensor | None) -> Outcome | None:
    """The Cayley map for the whole batch, in the precision computed in; None where K does not exist."""
    injection = problem.injection
    dtype, wide = injection.dtype, _computed_in(injection.dtype)
    problem, start = problem.widened(wide), None if start is None else start.to(wide)
    outcome = _by_cayley(problem, start, plan, TIGHTER[0])
    if outcome is None and plan.adapts and injection.dim() == 3 and plan.max_iter > 1:
        outcome = _each_by_its_map(problem, start, plan)
    if outcome is None or (dtype == wide and out is None):
        return outcome
    largest = torch.finfo(dtype).max
    z = outcome.z.clamp(-largest, largest)
    iterations, residual, status = _read(outcome)
    status = torch.where((outcome.z == z).all(-1) | (status == Status.NONFINITE), status, int(Status.DIVERGED))
    report = outcome.report
    if isinstance(report, list):
        report = [int((status != Status.CONVERGED).sum()), *report[1:]]
    return Outcome(z.to(dtype) if out is None else out.copy_(z), stats.pack(iterations, residual, status), report)


def _each_by_its_map(problem: Equation, start: Tensor | None, plan: Plan) -> Outcome | None:
    """Of a stack in which not every weight has a K: those that have one by the Cayley map, the others by the plain one.
    None where none has one, or where a weight is not finite, of which the backend tells."""
    if not torch.isfinite(problem.W).all():
        return None
    found, mapped = [], False
    for s in range(problem.injection.shape[0]):
        part, own = problem.of_weight(s), None if start is None else start[s]
        outcome = _by_cayley(part, own, plan, TIGHTER[0])
        mapped = mapped or outcome is not None
        found.append(part.plain(own, plan) if outcome is None else outcome)
    if not mapped:
        return None
    reports, batch = [outcome.report for outcome in found], problem.injection.shape[1]
    bad = [next((s * batch + r[kind] for s, r in enumerate(reports) if r[kind]), 0) for kind in (2, 3)]
    iterations, residual, status = (torch.stack(each) for each in zip(*map(_read, found), strict=True))
    z = torch.stack([outcome.z for outcome in found])
    return Outcome(z, stats.pack(iterations, residual, status), [sum(r[0] for r in reports), 0, *bad])


def _computed_in(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _rescue_all(problem: Equation, start: Tensor | None, outcome: Outcome, plan: Plan) -> None:
    if outcome.z.dim() == 2:
        _rescue(problem, start, outcome, plan)
    else:
        for s in range(outcome.z.shape[0]):
            _rescue(problem.of_weight(s), None if start is None else start[s], outcome, plan, s)


def _rescue(problem: Equation, z0: Tensor | None, outcome: Outcome, plan: Plan, s: int | None = None) -> None:
    """Take the failed samples of ``outcome`` (of its s-th W), begun at z0, up the rungs, and write what they reach into
    it."""
    z, iterations, residual, status = (t if s is None else t[s] for t in (outcome.z, *_read(outcome)))
    wide = _computed_in(z.dtype)
    native = varied(plan, increments="native")

    def by_cayley(part, index, start, most, share=TIGHTER[0]):
        warm = torch.where((residual[index] < FAR).unsqueeze(-1), start, 0.0)
        plan = varied(native, acceleration="anderson", max_iter=most)
        return _by_cayley(part, warm, plan, share, is_apart=True)

    def by_tight_cayley(part, index, start, most):
        return by_cayley(part, index, start, most, TIGHTER[1])

    def by_anderson(part, index, start, most):
        return part.plain(start, varied(native, acceleration="on_demand", max_iter=most))

    def by_plain(part, index, start, most):
        first = None if z0 is None else z0[index].to(wide)
        return part.plain(first, varied(native, acceleration="none", max_iter=most))

    def by_newton(part, index, start, most):
        return part.newton(start, varied(plan, max_iter=most))

    def by_homotopy(part, index, start, most):
        return part.homotopy(varied(plan, max_iter=most))

    means = {
        "cayley": by_cayley,
        "tight cayley": by_tight_cayley,
        "anderson": by_anderson,
        "plain": by_plain,
        "newton": by_newton,
        "homotopy": by_homotopy,
    }

    def attempt(name: str, index: Tensor, budget: Tensor, most: int) -> Tensor:
        """Those of the samples ``index`` that took more than their budget, for which nothing has been written."""
        answer = means[name](problem.part(index).widened(wide), index, z[index].to(wide), most)
        if answer is None:
            return torch.zeros_like(budget, dtype=torch.bool)
        more, now, how = _read(answer)
        in_time = more <= budget
        iterations[index] += torch.where(in_time, more, 0)
        fits = in_time & (answer.z.abs() <= torch.finfo(z.dtype).max).all(-1)  # 16 bits may not hold it
        converged = (how == Status.CONVERGED) & fits
        better = converged | ((now < residual[index]) & fits)
        z[index[better]] = answer.z[better].to(z.dtype)
        residual[index[better]] = now[better]
        final = fits if name == "anderson" else converged
        status[index[final]] = how[final]
        return ~in_time

    for name in plan.rungs:
        index = ((status != Status.CONVERGED) & (status != Status.NONFINITE)).nonzero().squeeze(-1)
        if index.numel() == 0:
            return
        left = plan.max_iter - iterations[index]
        if name != plan.rungs[-1]:  # a rung that uses up all evaluations must not keep a sample from the next one
            left = left - left // 4
        may = left > 0
        index, left = index[may], left[may]
        if index.numel() == 0:
            continue
        budget = _rounded_down(left)
        late = attempt(name, index, budget, int(budget.max()))
        if late.any():  # what a sample reaches with a mate's evaluations does not count
            for most in budget[late].unique().tolist():
                own = late & (budget == most)
                attempt(name, index[own], budget[own], most)


def _rounded_down(count: Tensor) -> Tensor:
    """To four binary digits: of a thousand counts there are 61 such numbers."""
    mantissa, exponent = torch.frexp(count.double())
    return torch.ldexp(torch.floor(mantissa * 16.0), exponent - 4).to(count.dtype)


def _by_cayley(
    problem: Equation, start: Tensor | None, plan: Plan, share: float, is_apart: bool = False
) -> Outcome | None:
    """Reflected iteration to ``share`` of the tolerance, then one evaluation of the equation itself that judges.

    None where K does not exist. ``plan`` says how to iterate; is_apart: without what has no influence on the others.
    """
    K, alpha = problem.K() if plan.max_iter > 1 else (None, 1.0)  # one evaluation at least to iterate, one to judge
    if K is None:
        return None
    iterate = varied(plan, tol=share * plan.tol, max_iter=plan.max_iter - 1)
    judge = varied(plan, acceleration="none", increments="native", max_iter=1)
    c = problem.injection
    z = torch.empty_like(c, memory_format=torch.contiguous_format)
    pieces, reports, bad_start = [], [], 0
    chunk = CHUNK if c.is_cpu else max(c.shape[-2], 1)  # a GPU is better filled than spared
    for first in range(0, max(c.shape[-2], 1), chunk):
        rows = (..., slice(first, first + chunk), slice(None))
        part = problem.part(rows) if c.shape[-2] > chunk else problem
        near = part.of_influence() if is_apart or part.ends_exactly else part
        shifted = part.backend.evaluate(K, near.injection, near.injection, "identity")
        if alpha != 1.0:
            shifted *= alpha
        if start is None:
            near = part  # the injection is in `shifted`: no buffer for it
        x = near.reflected(K, shifted, None if start is None else start[rows], alpha, iterate)
        point = x.z
        if isinstance(x.report, list) and x.report[0]:  # some failed: what is not finite is no point to judge at
            point = torch.where(torch.isfinite(point).all(-1, keepdim=True), point, 0.0)
            bad_start = bad_start or x.report[3]
        judged = part.plain(point, judge)
        z[rows] = judged.z
        said = _read(judged)
        pieces.append((_read(x)[0] + said[0], *said[1:]))
        reports.append(judged.report)
    iterations, residual, status = (torch.cat(piece, dim=-1) for piece in zip(*pieces, strict=True))
    if isinstance(reports[0], Deferred):
        return Outcome(z, stats.pack(iterations, residual, status), reports[0])
    report = [sum(r[0] for r in reports), *reports[0][1:]]
    if len(reports) > 1 and any(r[2] for r in reports):  # the first sample that is not finite, of all chunks
        report[2] = first_bad(~torch.isfinite(c).all(-1))
    if bad_start and start is not None:  # that of the reflected map, to which a finite start may be too large
        report[3] = first_bad(~torch.isfinite(start).all(-1))
    return Outcome(z, stats.pack(iterations, residual, status), report)


def _read(outcome: Outcome) -> tuple[Tensor, Tensor, Tensor]:
    """Iterations, residual and status of every sample."""
    z, said, _ = outcome
    return stats.iterations(z, said), stats.residual(z, said), stats.status(z, said)
