"""Runs a plan and takes the samples that it does not bring home up a ladder of other means.

The first rung is the plan itself, on the plain or the Cayley map. Samples that it hands over or fails on go, one rung
after the other and only as long as they fail, to

- the Cayley map with Anderson acceleration, first where its matrix K is cheap beside the batch (:func:`deq.plan.fit`);
- the plain map with Anderson acceleration, from the best iterate so far;
- the Cayley map with a tighter tolerance;
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
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from .. import stats
from ..activations import ACTIVATIONS
from ..backends import Deferred, Outcome, Settled, get_backend
from ..backends import reference as torch_backend
from ..backends.outcome import first_bad
from ..cache import remembered
from ..modes import no_autocast
from ..plan import Plan, varied
from ..solution import Status
from . import cayley, homotopy, newton

# The Cayley map is left at this share of the tolerance; the first product with W then nearly always finds the
# equation's own residual below the tolerance. The second number is for samples with which it did not.
TIGHTER = (1.5, 0.1)
CHUNK = 2048  # rows whose shifted injection exists at a time: bounds the memory of the Cayley map
SWITCHED_OFF = -8.0  # times the largest injection: with less relu's unit is taken to be without influence
FAR = 0.1  # residual above which an iterate is no better a start than zero
NEWTON_STEPS = 60
NEWTON_FLOPS = 1e12  # of the systems solved, were all steps needed: about ten seconds of one core
HOMOTOPY_SYSTEMS = 1000  # of a sample; most take 50 to 400
HOMOTOPY_FLOPS = 5e10  # after which no sample is begun: about ten seconds of one core
SYSTEM_FLOPS = 5e5  # in whose time a system is set up


@dataclass(frozen=True)
class _Equilibria:
    """``z = act(W z + c)`` for the rows of c (B, m) or (S, B, m), in the precision computed in."""

    W: Tensor
    c: Tensor
    activation: str
    backend: object
    K: Callable[[], tuple[Tensor | None, float]]  # made when it is needed: K or None, and alpha
    ends_exactly = False  # of_influence is a guess

    @property
    def injection(self) -> Tensor:
        return self.c

    def part(self, index) -> "_Equilibria":
        return replace(self, c=self.c[index])

    def of_influence(self) -> "_Equilibria":
        """The same but for injections far below what makes relu's values: K would carry their rounding into the others.
        A guess, for a unit that W might lift from there: the equation itself judges."""
        if self.activation != "relu":
            return self
        return replace(self, c=self.c.maximum(SWITCHED_OFF * self.c.amax(-1, keepdim=True).relu()))

    def plain(self, start: Tensor | None, plan: Plan, out: Tensor | None = None) -> Outcome:
        return self.backend.solve(self.W, self.c, start, self.activation, plan, out=out)

    def reflected(self, K: Tensor, shifted: Tensor, start: Tensor | None, alpha: float, plan: Plan) -> Outcome:
        if start is not None:
            evaluate = self.backend.evaluate
            x = u = evaluate(self.W, self.c, start, "identity")
            value = torch.relu(u) if self.activation == "relu" else evaluate(self.W, self.c, start, self.activation)
            if alpha != 1.0:  # relu
                x = (1.0 - alpha) * value + alpha * u
                value = torch.relu(x)
            start = 2.0 * value - x
        return self.backend.solve(K, shifted, start, self.activation, plan, reflected=True)

    def newton(self, start: Tensor, plan: Plan) -> tuple[Tensor, ...]:
        steps = min(plan.max_iter, NEWTON_STEPS)
        if self.activation == "identity":  # one linear system, whether the iteration is stable or not
            return newton.masked_solve(self.W, torch.ones_like(self.c), self.c, plan.tol, self.backend)
        return newton.newton(self.W, self.c, start, self.activation, plan.tol, steps, self.backend)

    def homotopy(self, plan: Plan) -> tuple[Tensor, ...]:
        """On the CPU: one sample after the other, whose every step is looked at."""
        backend = self.backend if self.c.is_cpu else torch_backend
        steps = min(plan.max_iter, HOMOTOPY_SYSTEMS)
        together = HOMOTOPY_FLOPS / ((2 / 3) * (self.c.shape[-1] + 1) ** 3 + SYSTEM_FLOPS)
        found = homotopy.follow(self.W.cpu(), self.c.cpu(), self.activation, plan.tol, steps, backend, together)
        return tuple(t.to(self.c.device) for t in found)


@dataclass(frozen=True)
class _Adjoint:
    """``u = d * (A u + g)`` for the rows of g; ``d()`` is the derivative, or with ``value_of`` the activation at z."""

    A: Tensor
    g: Tensor
    d: Callable[[], Tensor]
    value_of: str | None
    backend: object
    K: Callable[[], tuple[Tensor | None, float]]

    @property
    def ends_exactly(self) -> bool:
        """Whether D may end elements of g: that of relu, or a given one. The Cayley map is without them from the start.

        At 256 x 256 it takes 3.5 ms then, 0.04 of them to leave them out, whatever they are; with them 8.7 ms where
        they are three times as large as the others, 8 to 16 at thirty times (mu = 1, Zen 4, one thread).
        """
        return self.value_of in (None, "relu")

    @property
    def injection(self) -> Tensor:
        return self.g

    def part(self, index) -> "_Adjoint":
        return replace(self, g=self.g[index], d=lambda: self.d()[index])

    def of_influence(self) -> "_Adjoint":
        """The same without the elements of g that D ends: K would carry their rounding into the others."""
        d = self.d()
        return replace(self, g=self.g * ((d if self.ends_exactly else self._derivative(d)) != 0))

    def plain(self, start: Tensor | None, plan: Plan, out: Tensor | None = None) -> Outcome:
        return self.backend.masked_linear(self.A, self.g, self.d(), self.value_of, plan, u0=start, out=out)

    def reflected(self, K: Tensor, shifted: Tensor, start: Tensor | None, alpha: float, plan: Plan) -> Outcome:
        d = self.d()
        if start is not None:
            x = (1.0 - alpha) * start + alpha * self.backend.evaluate(self.A, self.g, start, "identity")
            start = (2.0 * self._derivative(d) - 1.0) * x
        return self.backend.masked_linear(K, shifted, d, self.value_of, plan, u0=start, reflected=True)

    def _derivative(self, d: Tensor) -> Tensor:
        return d if self.value_of is None else ACTIVATIONS[self.value_of].derivative_of_value(d)

    def newton(self, start: Tensor, plan: Plan) -> tuple[Tensor, ...]:
        return newton.masked_solve(self.A, self._derivative(self.d()), self.g, plan.tol, self.backend)

    homotopy = None  # Newton has solved what is linear


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
    problem = _Equilibria(W, c, activation, backend, partial(_matrix, W, activation))
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

    def transposed(s: int | None = None) -> tuple[Tensor | None, float]:
        # The s-th of a stack by itself, as forward: another that has no K takes it from nobody.
        K, alpha = _matrix(A.mT if s is None else A[s].mT, activation)
        return None if K is None else K.mT, alpha

    problem = _Adjoint(A, g, lambda: d, value_of, backend, transposed)
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
    if c.is_cuda and torch.cuda.is_current_stream_capturing():
        return outcome
    # Without their graphs, which a solution that is kept must not keep; z with a version of its own, as it is saved for
    # the gradient, which is that at the equilibrium reached.
    W, c = (t.detach() if t.requires_grad else t for t in (W, c))
    z, said, versions = outcome.z.data, outcome.stats, (_version(W), _version(c))

    def rescue() -> None:
        if (_version(W), _version(c)) == versions:  # else that equation is gone
            # In inference mode tensors made in that mode may be written to as well; who reads a status may do so
            # under autocast.
            with torch.inference_mode(), no_autocast(c.device.type):
                problem = _Equilibria(W, c, activation, get_backend(plan.backend), partial(_matrix, W, activation))
                _rescue_all(problem, z0, Outcome(z, said, None), plan)

    report.rescue = rescue
    return outcome


def _version(t: Tensor) -> int:
    return 0 if t.is_inference() else t._version


def _matrix(W: Tensor, activation: str) -> tuple[Tensor | None, float]:
    """K of W and its alpha; None where it does not exist. Remembered: forward, backward and later solves share it."""

    def make() -> tuple[Tensor | None, float]:
        alpha = cayley.choose_alpha(W, activation)
        return cayley.cayley_matrix(W, alpha), alpha

    return remembered(W, ("cayley", activation == "relu"), make)


def _climb(
    problem, start: Tensor | None, plan: Plan, outcome: Outcome | None, out: Tensor | None = None, recompute=None
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


def _first_by_cayley(problem, start: Tensor | None, plan: Plan, out: Tensor | None) -> Outcome | None:
    """The Cayley map for the whole batch, in the precision computed in; None where K does not exist."""
    injection = problem.injection
    dtype, wide = injection.dtype, _computed_in(injection.dtype)
    problem, start = _widened(problem, wide), None if start is None else start.to(wide)
    outcome = _by_cayley(problem, start, plan, TIGHTER[0])
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


def _computed_in(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _matrix_of_stack(problem, s: int):
    """The problem of the s-th W of a stack."""
    if isinstance(problem, _Equilibria):
        W = problem.W[s]
        return replace(problem, W=W, c=problem.c[s], K=partial(_matrix, W, problem.activation))
    return replace(problem, A=problem.A[s], g=problem.g[s], d=lambda: problem.d()[s], K=partial(problem.K, s))


def _rescue_all(problem, start: Tensor | None, outcome: Outcome, plan: Plan) -> None:
    if outcome.z.dim() == 2:
        _rescue(problem, start, outcome, plan)
    else:
        for s in range(outcome.z.shape[0]):
            _rescue(_matrix_of_stack(problem, s), None if start is None else start[s], outcome, plan, s)


def _rescue(problem, z0: Tensor | None, outcome: Outcome, plan: Plan, s: int | None = None) -> None:
    """Take the failed samples of ``outcome`` (of its s-th W), begun at z0, up the rungs, and write what they reach into
    it."""
    z, iterations, residual, status = (t if s is None else t[s] for t in (outcome.z, *_read(outcome)))
    wide, width = _computed_in(z.dtype), z.shape[-1]
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
        n = start.shape[0]
        if NEWTON_STEPS * n * (2 / 3) * width**3 > NEWTON_FLOPS:
            return None
        x, steps, r, how = part.newton(start, varied(plan, max_iter=most))
        return Outcome(x, stats.pack(steps, r.to(wide), how), None)

    def by_homotopy(part, index, start, most):
        if part.homotopy is None:
            return None
        x, steps, r, how = part.homotopy(varied(plan, max_iter=most))
        return Outcome(x, stats.pack(steps, r.to(wide), how), None)

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
        answer = means[name](_widened(problem.part(index), wide), index, z[index].to(wide), most)
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


def _widened(problem, dtype: torch.dtype):
    """The problem in the precision computed in."""
    if problem.injection.dtype == dtype:
        return problem
    if isinstance(problem, _Equilibria):
        W = problem.W.to(dtype)
        return replace(problem, W=W, c=problem.c.to(dtype), K=partial(_matrix, W, problem.activation))
    A = problem.A.to(dtype)

    def transposed() -> tuple[Tensor | None, float]:
        K, alpha = problem.K()
        return None if K is None else K.to(dtype), alpha

    return replace(problem, A=A, g=problem.g.to(dtype), d=lambda: problem.d().to(dtype), K=transposed)


def _by_cayley(problem, start: Tensor | None, plan: Plan, share: float, is_apart: bool = False) -> Outcome | None:
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
