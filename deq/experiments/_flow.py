"""Gradient flow of the diagonal family f(x) = beta . x, beta = u^L, and the convex potential that its limit minimises.

L = -1 with u = 1 - w is the diagonal linear DEQ, beta = 1 / (1 - w); L = 1, 2, 3 are linear nets of that depth. From
u' = -dL/du follows beta' = -L^2 beta^(2 - 2/L) X^T r, r = X beta - y, so L^-2 beta^(2/L - 2) beta' stays in the row
space of X: the limit minimises sum q(beta_i) over {X beta = y} with q' = (beta0^-e - beta^-e) / e, e = 1 - 2 / L, and
q' = log(beta / beta0) for L = 2. For the DEQ, e = 3 and 3 q = 1 / (2 x^2) + beta0^-3 x: Theorem 3, with the plus sign.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

F64 = torch.float64

# Dormand and Prince 1980: nodes are not needed for an autonomous equation.
_A = (
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
)
_ERROR = (71 / 57600, 0.0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40)


def integrate(
    f: Callable[[Tensor], Tensor],
    u: Tensor,
    *,
    done: Callable[[Tensor], bool],
    rtol: float = 1e-10,
    most: int = 200_000,
    visit: Callable[[float, Tensor], None] | None = None,
) -> tuple[Tensor, float]:
    """Follow u' = f(u) until ``done(u)``: the end and its time, by Dormand and Prince's pair of orders 5 and 4.

    rtol: error allowed per step, relative to the largest entry. visit(t, u): called after every accepted step. Raises
    RuntimeError if ``most`` steps do not get there.
    """
    t, slope = 0.0, f(u)
    h = 1e-3 * float(u.abs().max()) / max(float(slope.abs().max()), 1e-300)
    for _ in range(most):
        if done(u):
            return u, t
        slopes = [slope]
        for row in _A:
            stage = u + h * sum(a * k for a, k in zip(row, slopes, strict=True) if a)
            slopes.append(f(stage))
        error = h * float(sum(e * k for e, k in zip(_ERROR, slopes, strict=True) if e).abs().max())
        allowed = rtol * max(float(u.abs().max()), float(stage.abs().max()))
        if error <= allowed:  # NaN, from a stage outside the domain, is a refusal too
            u, slope, t = stage, slopes[-1], t + h
            if visit is not None:
                visit(t, u)
        h *= min(5.0, max(0.2, 0.9 * (allowed / max(error, 1e-300)) ** 0.2)) if error == error else 0.2
    raise RuntimeError(f"the flow did not arrive within {most} steps")


@dataclass(frozen=True)
class Family:
    """beta = sign * u^L, u > 0."""

    L: int
    sign: float = 1.0

    @property
    def e(self) -> float:
        return 1 - 2 / self.L

    def beta(self, u: Tensor) -> Tensor:
        return self.sign * u**self.L

    def start(self, beta0: Tensor) -> Tensor:
        return (self.sign * beta0) ** (1 / self.L)

    def flow(
        self,
        X: Tensor,
        y: Tensor,
        beta0: Tensor,
        *,
        rtol: float = 1e-11,
        tol: float = 1e-9,
        visit: Callable[[float, Tensor], None] | None = None,
        enough: Callable[[], bool] = lambda: False,
    ) -> Tensor:
        """beta at the end of the gradient flow of 1/2 |X beta - y|^2 on u, where |X beta - y| <= tol |y|, or earlier
        when ``enough()``."""
        size = float(y.norm())

        def slope(u: Tensor) -> Tensor:
            beta = self.beta(u)
            return -(X.mT @ (X @ beta - y)) * self.L * beta / u

        def done(u: Tensor) -> bool:
            return enough() or float((X @ self.beta(u) - y).norm()) <= tol * size

        see = None if visit is None else lambda t, u: visit(t, self.beta(u))
        return self.beta(integrate(slope, self.start(beta0), done=done, rtol=rtol, visit=see)[0])

    def gradient(self, beta: Tensor, beta0: Tensor, start_sign: float = 1.0) -> Tensor:
        """q' at beta; ``start_sign=-1`` turns the sign of the term of beta0, as one printed form of the theorem has
        it."""
        if self.L == 2:
            return (beta / beta0).log()
        # In u, so that a negative beta needs no root of its own: beta^-e = (sign u)^... of odd e is real.
        power = self.sign * (self.sign * beta) ** -self.e
        origin = self.sign * (self.sign * beta0) ** -self.e
        return (start_sign * origin - power) / self.e

    def curvature(self, beta: Tensor) -> Tensor:
        """q''."""
        return (self.sign * beta) ** (2 / self.L - 2)

    def minimiser(self, X: Tensor, y: Tensor, beta0: Tensor) -> Tensor:
        """argmin sum q(beta_i) subject to X beta = y and sign beta > 0, by Newton's method from beta0 on the optimality
        conditions q'(beta) = X^T nu, X beta = y; steps are cut so that no entry loses its sign. Knows of no flow."""
        beta, nu = beta0.clone(), y.new_zeros(len(y))

        def conditions(beta: Tensor, nu: Tensor) -> tuple[Tensor, Tensor]:
            return self.gradient(beta, beta0) - X.mT @ nu, X @ beta - y

        for _ in range(200):
            dual, primal = conditions(beta, nu)
            inverse = 1 / self.curvature(beta)
            schur = (X * inverse) @ X.mT
            step_nu = torch.linalg.solve(schur, X @ (inverse * dual) - primal)
            step = inverse * (X.mT @ step_nu - dual)
            share = 1.0
            shrink = step * self.sign < 0
            if self.L != 1 and bool(shrink.any()):
                share = min(1.0, 0.95 * float((-beta[shrink] / step[shrink]).min()))
            before = float(dual.norm() ** 2 + primal.norm() ** 2)
            for _ in range(40):
                tried = conditions(beta + share * step, nu + share * step_nu)
                if float(tried[0].norm() ** 2 + tried[1].norm() ** 2) < before:
                    break
                share /= 2
            else:
                break  # nothing better: rounding
            beta, nu = beta + share * step, nu + share * step_nu
        return beta

    def limit(self, X: Tensor, y: Tensor, beta0: Tensor) -> Tensor:
        """The same minimiser from the dual side, max y . nu - sum q*(X^T nu) with beta = q*'(X^T nu), for positive
        beta: it stays accurate where the start is tiny and the limit sparse. Newton's method with backtracking."""
        nu, e = y.new_zeros(len(y)), self.e

        def at(nu: Tensor) -> tuple[Tensor, float]:
            s = X.mT @ nu
            if self.L == 2:
                beta = beta0 * s.clamp(max=60).exp()
                return beta, float((beta - beta0).sum() - y @ nu)
            base = beta0**-e - e * s
            if self.L != 1 and not bool((base > 0).all()):
                return beta0, math.inf
            beta = base if self.L == 1 else base ** (-1 / e)
            potential = beta.square() / 2 if self.L == 1 else beta ** (1 - e) / (1 - e)
            return beta, float(potential.sum() - y @ nu)

        beta, value = at(nu)
        for _ in range(200):
            slope = X @ beta - y
            if float(slope.norm()) <= 1e-12 * float(y.norm()):
                break
            step = -torch.linalg.solve((X / self.curvature(beta)) @ X.mT, slope)
            share, decrease = 1.0, float(slope @ step)
            for _ in range(60):
                tried, reached = at(nu + share * step)
                if reached <= value + 1e-4 * share * decrease:
                    break
                share /= 2
            else:
                break  # nothing better: rounding
            nu, beta, value = nu + share * step, tried, reached
        return beta


def off_row_space(X: Tensor, gradient: Tensor) -> float:
    """2-norm of the part of ``gradient`` that no X^T nu cancels, relative to the whole: 0 at a stationary point."""
    Q = torch.linalg.qr(X.mT).Q
    return float((gradient - Q @ (Q.mT @ gradient)).norm() / gradient.norm())


def problem(N: int, d: int, seed: int, sparse: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """X (N, d) Gaussian of variance 1 / N, target beta (d,) uniform in [0.5, 2] or, ``sparse``, so many entries of 3
    and zeros; y = X beta."""
    g = torch.Generator().manual_seed(seed)
    X = torch.randn(N, d, dtype=F64, generator=g) / N**0.5
    beta = 0.5 + 1.5 * torch.rand(d, dtype=F64, generator=g)
    if sparse:
        beta = torch.where(torch.arange(d) < sparse, 3.0, 0.0).to(F64)
    return X, X @ beta, beta
