"""``W = diag(d) + P Q^T``: the equilibrium by an iteration in R^r.

With ``q = Q^T z`` the elements decouple: z is the root of ``z = act(d z + P q + c)``. What is left is a fixed point in
q, whose evaluation costs 4 r m flops a sample instead of 2 m^2. Between q and ``q' = Q^T z(q)`` the residual of the
original equation is at most ``L ||P (q' - q)||``, L the Lipschitz constant of act: known in R^r, without a pass over z.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from .. import cache, recycle
from ..activations import ACTIVATIONS
from ..reference import _History, solve_each
from .methods import (
    Result,
    is_compiled,
    is_finite,
    refuse_non_finite,
    relative_residual,
    row_norm,
    rows_contiguous,
    solve_diagonal,
    why_not_diagonal,
)

ANDERSON_DEPTH = 5
SLOW = 0.5  # measured contraction above which Anderson takes over: in R^r it costs a fraction of an evaluation
MARGIN = 0.3  # a sample leaves below this share of tol, unless it gains little by one more evaluation
GAIN = 0.8
GIVE_UP_AFTER = 60  # evaluations; what has not converged then is left to Newton's method
NEWTON_STEPS, HALVINGS = 30, 8
CHUNK = 1 << 22  # elements of the largest intermediate of a Newton step


class Problem(NamedTuple):
    """``z(q)``, for the given rows (None for all)."""

    z: Callable[[Tensor, Tensor | None], Tensor]
    slope: Callable[[Tensor, Tensor | None], Tensor]  # dz / d(P q), elementwise
    start: (
        Callable[["_Reduced", int], Tensor] | None
    )  # iterates all rows plainly while they contract well; None: no kernel
    advance: Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor]]  # Q^T z(q) and ||z(q)||
    last: Callable[
        [Tensor, Tensor], tuple[Tensor, Tensor]
    ]  # all rows, given q and q' = Q^T z(q): z(q) or z(q'), residual of z(q)


@dataclass(frozen=True, eq=False)
class LowRank:
    """d (m,), P and Q (m, r); the interface of :mod:`deq.direct.methods`."""

    d: Tensor
    P: Tensor
    Q: Tensor
    tol: float
    max_iter: int

    name: ClassVar[str] = "reduced to R^r"
    refuses_samples: ClassVar[bool] = False
    defers: ClassVar[bool] = False

    @property
    def what(self) -> str:
        m, r = self.P.shape
        return f"reduced to R^{r}: q = Q^T z is iterated instead of z in R^{m}, whose elements then decouple"

    @property
    def parts(self) -> tuple[Tensor, ...]:
        return self.d, self.P, self.Q

    def of(self, d: Tensor, P: Tensor, Q: Tensor) -> "LowRank":
        return LowRank(d, P, Q, self.tol, self.max_iter)

    @property
    def T(self) -> "LowRank":
        return LowRank(self.d, self.Q, self.P, self.tol, self.max_iter)

    def apply(self, z: Tensor) -> Tensor:
        return torch.addmm(self.d * z, z @ self.Q, self.P.mT)

    def outer(self, u: Tensor, z: Tensor) -> tuple[Tensor, ...]:
        return (u * z).sum(0), u.mT @ (z @ self.Q), z.mT @ (u @ self.P)

    def why_not(self, activation: str) -> str | None:
        for name, factor in (("P", self.P), ("Q", self.Q)):
            if not is_finite(factor):
                refuse_non_finite(name, factor)
        return why_not_diagonal(self.d, activation)

    def solve(self, c: Tensor, activation: str, start: Tensor | None = None) -> Result:
        entry = ACTIVATIONS[activation]
        d, P, Q = (part.detach() for part in self.parts)

        def z(q: Tensor, rows: Tensor | None) -> Tensor:
            return solve_diagonal(d, torch.addmm(_of(c, rows), q, P.mT), activation).z

        def slope(q: Tensor, rows: Tensor | None) -> Tensor:
            s = solve_diagonal(d, torch.addmm(_of(c, rows), q, P.mT), activation, derives=True).derivative
            return s / (1 - d * s)

        def f(z: Tensor, rows: Tensor | None) -> Tensor:
            return entry.value(self.of(d, P, Q).apply(z).add_(_of(c, rows)))

        problem = Problem(z, slope, *_evaluations(z, f, d, P, Q, c, None, entry.number))
        q = c.new_zeros(c.shape[0], P.shape[1]) if start is None else start @ Q
        return self._solve(problem, q, entry.lipschitz)

    def masked(self, s: Tensor, g: Tensor) -> Result:
        d, P, Q = (part.detach() for part in self.parts)
        e = s / (1 - s * d)

        def u(q: Tensor, rows: Tensor | None) -> Tensor:
            return torch.addmm(_of(g, rows), q, P.mT).mul_(_of(e, rows))

        def f(u: Tensor, rows: Tensor | None) -> Tensor:
            return self.of(d, P, Q).apply(u).add_(_of(g, rows)).mul_(_of(s, rows))

        problem = Problem(u, lambda q, rows: _of(e, rows), *_evaluations(u, f, d, P, Q, g, e, 0))
        steepest = float(s.abs().amax()) if s.numel() else 0.0
        return self._solve(problem, g.new_zeros(g.shape[0], P.shape[1]), steepest)

    def _solve(self, problem: Problem, q: Tensor, lipschitz: float) -> Result:
        """The fixed point in R^r: plainly, by Anderson where that is slow, by Newton where neither gets there."""
        reduced = _Reduced(problem, self.P.detach(), self.Q.detach(), lipschitz, self.tol, q)
        left = reduced.iterate(min(self.max_iter, GIVE_UP_AFTER))
        if left.numel():
            reduced.newton(left, self.max_iter)
        z, residual = problem.last(reduced.q, reduced.following)
        if (rows := reduced.accelerated).numel():
            z[rows] = problem.z(reduced.q[rows], rows)
        return Result(z, residual, reduced.iterations)


def _of(t: Tensor, rows: Tensor | None) -> Tensor:
    return t if rows is None else t[rows]


def _evaluations(
    z: Callable, f: Callable, d: Tensor, P: Tensor, Q: Tensor, c: Tensor, e: Tensor | None, activation: int
) -> tuple[Callable | None, Callable, Callable]:
    """``start``, ``advance`` and ``last`` of the Problem: fused where the kernels are compiled, so that only the last z
    is ever written."""
    if not is_compiled(c):

        def advance(q: Tensor, rows: Tensor | None) -> tuple[Tensor, Tensor]:
            now = z(q, rows)
            return now @ Q, row_norm(now)

        def last(q: Tensor, following: Tensor) -> tuple[Tensor, Tensor]:
            now = z(q, None)
            return now, relative_residual(f(now, None), now)

        return None, advance, last

    panels, d, none = (_panels(P), _panels(Q)), d.contiguous(), c.new_empty(0)
    every = rows_contiguous(c), none if e is None else rows_contiguous(e)
    own, of_rows = every, None

    def advance(q: Tensor, rows: Tensor | None) -> tuple[Tensor, Tensor]:
        nonlocal own, of_rows
        if rows is not of_rows:
            own, of_rows = (c[rows], none if e is None else e[rows]), rows
        following, size = q.new_empty(q.shape), q.new_empty(q.shape[0])
        torch.ops.deq.reduced_.default(*panels, d, *own, rows_contiguous(q), following, size, none, activation)
        size = size.double()
        if (lost := _lost(size)).numel():
            size[lost] = row_norm(z(q[lost], lost if rows is None else rows[lost]))
        return following, size

    def last(q: Tensor, following: Tensor) -> tuple[Tensor, Tensor]:
        out, residual = recycle.empty_like(c), c.new_empty(c.shape[0])
        torch.ops.deq.reduced_.default(*panels, d, *every, rows_contiguous(q), following, residual, out, activation)
        if (lost := _lost(residual)).numel():
            now = z(q[lost], lost)
            residual[lost] = relative_residual(f(now, lost), now)
        return out, residual

    def start(reduced: "_Reduced", limit: int) -> Tensor:
        residual = c.new_empty(c.shape[0])
        torch.ops.deq.reduced_iterate_.default(
            *panels,
            d,
            *every,
            reduced.gram,
            reduced.q,
            reduced.following,
            residual,
            reduced.iterations,
            activation,
            reduced.tol,
            MARGIN * reduced.tol,
            SLOW,
            limit,
        )
        return residual

    return start, advance, last


def _lost(numbers: Tensor) -> Tensor:
    """The rows whose squares left the range of the dtype in the kernels, which then say NaN."""
    return numbers.isnan().nonzero().squeeze(-1)


def _panels(factor: Tensor) -> Tensor:
    """(m, r) as panels of 8 rows, transposed: (ceil(m / 8), r, 8)."""
    m, r = factor.shape

    def make() -> Tensor:
        return torch.nn.functional.pad(factor, (0, 0, 0, -m % 8)).reshape(-1, 8, r).mT.contiguous()

    return cache.remembered(factor, "panels", make)


class _Reduced:
    """q, ``q' = Q^T z(q)`` and the evaluations of every row so far."""

    def __init__(self, problem: Problem, P: Tensor, Q: Tensor, lipschitz: float, tol: float, q: Tensor):
        self.problem, self.P, self.Q, self.tol = problem, P, Q, tol
        self.q, self.following = q.contiguous(), torch.zeros(q.shape, dtype=q.dtype, device=q.device)
        gram = (lipschitz * P).mT @ (lipschitz * P)
        # The rounding of the Gram matrix must not hide a step in a weak direction of P.
        slack = 4 * torch.finfo(P.dtype).eps * gram.diagonal().sum()
        self.gram = (gram + slack * torch.eye(P.shape[1], dtype=P.dtype, device=P.device)).double()
        self.iterations = torch.zeros(q.shape[0], dtype=torch.int32, device=q.device)
        # Rows that left the plain iteration of the kernels. The map need not contract where others end, and the value
        # one evaluation after what was judged may be worse.
        self.accelerated = torch.arange(0, device=q.device)

    def residual(self, dq: Tensor, size: Tensor) -> Tensor:
        """Upper bound of ``||f(z) - z|| / ||f(z)||`` from ``q' - q`` and ``||z||``; infinity where it is not finite."""
        dq = dq.double()
        step = ((dq @ self.gram) * dq).sum(-1).clamp(min=0).sqrt()
        bound = torch.where(step > 0, step / (size - step).clamp(min=0), step)
        return torch.where(torch.isfinite(size), bound, torch.inf).nan_to_num(nan=torch.inf)

    def iterate(self, limit: int) -> Tensor:
        """Rows that did not converge within ``limit`` evaluations."""
        q, rows = self.q, torch.arange(self.q.shape[0], device=self.q.device)
        own = None  # the rows that the problem is asked about: None for all
        if self.problem.start is not None:
            left = ~(self.problem.start(self, limit) <= self.tol)
            self.accelerated = rows[left]
            if not bool(left.any()):
                return rows[:0]
            rows = own = rows[left]
            q = self.following[left]
            q = torch.where(torch.isfinite(q), q, 0.0)
        live = torch.ones_like(rows, dtype=torch.bool)
        slow = torch.zeros_like(live)
        before = torch.full((2, q.shape[0]), torch.inf, dtype=torch.float64, device=q.device)
        history, failed = None, []
        while True:
            spent = live & (self.iterations[rows] >= limit)
            if bool(spent.any()):
                ended, at = rows[spent], q[spent]
                self.q[ended], self.following[ended] = at, self.problem.advance(at, ended)[0]
                failed.append(ended)
                live = live & ~spent
            if not bool(live.any()):
                break
            following, size = self.problem.advance(q, own)
            r = self.residual(following - q, size)
            self.iterations[rows] += live
            done = live & ((r <= MARGIN * self.tol) | ((r <= self.tol) & (r > GAIN * before[0])))
            lost = live & ~torch.isfinite(r)
            settled = rows[done]
            self.q[settled], self.following[settled] = q[done], following[done]
            slow = slow | (torch.minimum(r / before[0], before[0] / before[1]) > SLOW)
            before = torch.stack((r, before[0]))
            live = live & ~done & ~lost
            failed.append(rows[lost])
            remaining = int(live.sum())
            if remaining and bool((slow & live).any()):
                history = history or _History(q.shape[0], ANDERSON_DEPTH, q.shape[1], q)
                following = history.mix(q, following, slow & live)
            q = following
            if remaining == 0 or 4 * remaining <= 3 * rows.numel():
                rows, q, slow, before = rows[live], q[live], slow[live], before[:, live]
                if history is not None:
                    history.keep(live)
                live, own = live[live], rows
        return torch.cat((*failed, rows[:0]))

    def newton(self, rows: Tensor, limit: int) -> None:
        """Semismooth Newton on ``F(q) = q - Q^T z(q)`` with a line search on ``||F||``, an r x r system a row; steps
        are evaluations, of which a row has ``limit`` in all."""
        rows = rows[self.iterations[rows] < limit]
        q = self.q[rows]
        eye = torch.eye(q.shape[1], dtype=q.dtype, device=q.device)
        for _ in range(NEWTON_STEPS):
            if rows.numel() == 0:
                return
            following, size = self.problem.advance(q, rows)
            F, before = q - following, (q - following).norm(dim=-1)
            self.iterations[rows] += 1
            on = ~(self.residual(F, size) <= MARGIN * self.tol)
            slope = self.problem.slope(q, rows)
            step = solve_each(eye - self._coupling(slope), F)[0].nan_to_num(0.0, 0.0, 0.0)
            t = torch.ones_like(F[:, :1])
            for _ in range(HALVINGS):
                trial = q - t * step
                now = (trial - self.problem.advance(trial, rows)[0]).norm(dim=-1)
                worse = on & ~(now <= (1 - 1e-4 * t.squeeze(-1)) * before)
                if not bool(worse.any()):
                    break
                t = torch.where(worse.unsqueeze(-1), 0.5 * t, t)
            self.q[rows], self.following[rows] = q, following
            on &= self.iterations[rows] < limit
            rows, q = rows[on], trial[on]

    def _coupling(self, e: Tensor) -> Tensor:
        """``Q^T diag(e) P`` of every row, (n, r, r)."""
        n, m = e.shape
        r = self.P.shape[1]
        out = e.new_empty(n, r, r)
        count = max(1, CHUNK // (r * m))
        for first in range(0, n, count):
            part = slice(first, first + count)
            out[part] = (self.Q.mT * e[part].unsqueeze(1)) @ self.P
        return out
