"""The two equations that the rungs of the ladder solve, forward and backward: what every one of them asks of either."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from types import ModuleType

import torch
from torch import Tensor

from .. import stats
from ..activations import ACTIVATIONS
from ..backends import Outcome
from ..backends import reference as torch_backend
from ..cache import remembered
from ..plan import Plan
from . import cayley, homotopy, newton

SWITCHED_OFF = -8.0  # times the largest injection: with less relu's unit is taken to be without influence
NEWTON_STEPS = 60
NEWTON_FLOPS = 1e12  # of the systems solved, were all steps needed: about ten seconds of one core
HOMOTOPY_SYSTEMS = 1000  # of a sample; most take 50 to 400
HOMOTOPY_FLOPS = 5e10  # after which no sample is begun: about ten seconds of one core
SYSTEM_FLOPS = 5e5  # in whose time a system is set up


@dataclass(frozen=True)
class Equilibria:
    """``z = act(W z + c)`` for the rows of c (B, m) or (S, B, m), in the precision computed in."""

    W: Tensor
    c: Tensor
    activation: str
    backend: ModuleType
    ends_exactly = False  # of_influence is a guess

    @property
    def injection(self) -> Tensor:
        return self.c

    def K(self) -> tuple[Tensor | None, float]:
        """The Cayley matrix of W, None where there is none, and its alpha."""
        return _cayley_matrix(self.W, self.activation)

    def part(self, index) -> "Equilibria":
        """Some rows of c."""
        return replace(self, c=self.c[index])

    def of_weight(self, s: int) -> "Equilibria":
        """Those of the s-th W of a stack."""
        return replace(self, W=self.W[s], c=self.c[s])

    def widened(self, dtype: torch.dtype) -> "Equilibria":
        """The same in the precision computed in."""
        return self if self.c.dtype == dtype else replace(self, W=self.W.to(dtype), c=self.c.to(dtype))

    def of_influence(self) -> "Equilibria":
        """The same but for injections far below what makes relu's values: K would carry their rounding into the others.
        A guess, for a unit that W might lift from there: the equation itself judges."""
        if self.activation != "relu":
            return self
        return replace(self, c=self.c.maximum(SWITCHED_OFF * self.c.amax(-1, keepdim=True).relu()))

    def plain(self, start: Tensor | None, plan: Plan, out: Tensor | None = None) -> Outcome:
        """By the plain map, from ``start``."""
        return self.backend.solve(self.W, self.c, start, self.activation, plan, out=out)

    def reflected(self, K: Tensor, shifted: Tensor, start: Tensor | None, alpha: float, plan: Plan) -> Outcome:
        """By the Cayley map of K, whose injection is ``shifted``, from the point that stands for ``start`` there."""
        if start is not None:
            evaluate = self.backend.evaluate
            x = u = evaluate(self.W, self.c, start, "identity")
            value = torch.relu(u) if self.activation == "relu" else evaluate(self.W, self.c, start, self.activation)
            if alpha != 1.0:  # relu
                x = (1.0 - alpha) * value + alpha * u
                value = torch.relu(x)
            start = 2.0 * value - x
        return self.backend.solve(K, shifted, start, self.activation, plan, reflected=True)

    def newton(self, start: Tensor, plan: Plan) -> Outcome | None:
        """None where its systems would take too long, as below."""
        if not _may_use_newton(start):
            return None
        steps = min(plan.max_iter, NEWTON_STEPS)
        if self.activation == "identity":  # one linear system, whether the iteration is stable or not
            found = newton.masked_solve(self.W, torch.ones_like(self.c), self.c, plan.tol, self.backend)
        else:
            found = newton.newton(self.W, self.c, start, self.activation, plan.tol, steps, self.backend)
        return _outcome(found)

    def homotopy(self, plan: Plan) -> Outcome | None:
        """On the CPU: one sample after the other, whose every step is looked at."""
        backend = self.backend if self.c.is_cpu else torch_backend
        steps = min(plan.max_iter, HOMOTOPY_SYSTEMS)
        together = HOMOTOPY_FLOPS / ((2 / 3) * (self.c.shape[-1] + 1) ** 3 + SYSTEM_FLOPS)
        found = homotopy.follow(self.W.cpu(), self.c.cpu(), self.activation, plan.tol, steps, backend, together)
        return _outcome([t.to(self.c.device) for t in found])


@dataclass(frozen=True)
class Adjoint:
    """``u = d * (A u + g)`` for the rows of g; ``d()`` is the derivative, or with ``value_of`` the activation at z.

    activation: that of the equation whose adjoint it is; W: its weight, of which A is the transpose in the precision
    computed in.
    """

    A: Tensor
    g: Tensor
    d: Callable[[], Tensor]
    value_of: str | None
    activation: str
    backend: ModuleType
    W: Tensor

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

    def K(self) -> tuple[Tensor | None, float]:
        K, alpha = _cayley_matrix(self.W, self.activation)
        return None if K is None else K.mT.to(self.A.dtype), alpha

    def part(self, index) -> "Adjoint":
        return replace(self, g=self.g[index], d=lambda: self.d()[index])

    def of_weight(self, s: int) -> "Adjoint":
        # By itself, as forward: another weight that has no K takes it from nobody.
        return replace(self, A=self.A[s], g=self.g[s], d=lambda: self.d()[s], W=self.W[s])

    def widened(self, dtype: torch.dtype) -> "Adjoint":
        if self.g.dtype == dtype:
            return self
        return replace(self, A=self.A.to(dtype), g=self.g.to(dtype), d=lambda: self.d().to(dtype))

    def of_influence(self) -> "Adjoint":
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

    def newton(self, start: Tensor, plan: Plan) -> Outcome | None:
        if not _may_use_newton(start):
            return None
        return _outcome(newton.masked_solve(self.A, self._derivative(self.d()), self.g, plan.tol, self.backend))

    def homotopy(self, plan: Plan) -> None:
        """Newton has solved what is linear."""


Equation = Equilibria | Adjoint


def _cayley_matrix(W: Tensor, activation: str) -> tuple[Tensor | None, float]:
    """K of W and its alpha; None where it does not exist. Remembered: forward, backward and later solves share it."""

    def make() -> tuple[Tensor | None, float]:
        alpha = cayley.choose_alpha(W, activation)
        return cayley.cayley_matrix(W, alpha), alpha

    return remembered(W, ("cayley", activation == "relu"), make)


def _may_use_newton(x: Tensor) -> bool:
    return NEWTON_STEPS * x.shape[0] * (2 / 3) * x.shape[-1] ** 3 <= NEWTON_FLOPS


def _outcome(found: Sequence[Tensor]) -> Outcome:
    """Of x (B, m), and steps, residual and status (B,)."""
    x, steps, residual, status = found
    return Outcome(x, stats.pack(steps, residual.to(x.dtype), status), None)
