"""The last rung for samples that no iteration brings home: Newton's method, one linear system a sample and step.

A step costs (2/3) m^3 flops for every sample, m/3 of its evaluations: for a handful of samples, never for a batch.
All is computed in float64 and judged in the caller's precision; Jacobians take at most 64 MB at a time, or one sample.
"""

from dataclasses import dataclass, replace
from types import ModuleType

import torch
from torch import Tensor

from ..activations import get_activation
from ..backends import reference as torch_backend
from ..reference import _norm, leaves_at, solve_each
from ..solution import Status

JACOBIAN_BYTES = 64 * 2**20  # of the Jacobians and of their factors together
# (first pseudo-time step, exponent of its growth): briskly from z0, then patiently from act(c). Of 32 samples each at
# spectral radius 1.4 (m = 256), norm 2.2 (m = 64) and a net trained for 20 epochs (m = 128) the first pace solves 28,
# 32 and 31, both together 30, 32 and 32; Newton with a line search on the residual 17, 26 and 30, without 6, 30 and 31.
PACES = ((3.0, 1.5), (1.0, 0.75))
FIRST_SHARE = 3  # the first pace gets a third of the steps
GROWTH = 10.0  # of the pseudo-time step, at most, either way
# Where the linear model misses less than this share of the residual, the step grows even while the residual rises: past
# a narrow place, where the curve nearly touches the diagonal, it rises for long. Of 192 samples of gelu and silu there
# (z = act(0.97 mean(z) + c), c of 0.15 to 0.24) 191 are solved for 145, in half of the steps or fewer; of 896 others at
# norms of 1.4 to 4 one more. Only to this length: the way to an equilibrium at infinity is as straight, and z so large
# in the end that its residual, which is relative, passes.
MISSED, SHORT = 0.1, 10.0
SHORTEST, LONGEST = 1e-2, 1e14


@torch.no_grad()
def newton(
    W: Tensor,
    c: Tensor,
    z0: Tensor | None,
    activation: str,
    tol: float,
    max_iter: int = 60,
    backend: ModuleType = torch_backend,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Equilibria ``z = act(W z + c)`` of a few samples by semi-smooth Newton, globalised by pseudo-time.

    W (m, m), c and z0 (n, m), float32 or float64; z0 None starts at ``act(c)``. A step solves
    ``(I / delta + I - D W) dz = act(W z + c) - z``, an implicit Euler step of length delta along ``dz/dt = f(z) - z``;
    delta grows as the residual falls, so that the end is Newton's method (Kelley, Keyes 1998, SIAM J. Numer. Anal. 35),
    and where the step was nearly the linear one.
    With kinks (relu) D is any element of the generalised Jacobian (Qi, Sun 1993).
    Returns as :func:`deq.reference.iterate`: z = f(y) (n, m) of the best y met, iterations (n,) int32 (linear systems
    solved), residual (n,) of y in the dtype of c, status (n,): CONVERGED, MAX_ITER after max_iter steps. No claim that
    there is no equilibrium is made or can be.
    """
    get_activation(activation)
    n, m = c.shape
    z, residual = torch.empty_like(c), torch.empty(n, dtype=c.dtype, device=c.device)
    iterations = torch.zeros(n, dtype=torch.int32, device=c.device)
    wide, limit = W.double(), leaves_at(tol)
    first = -(-max_iter // FIRST_SHARE)
    for part in _chunks(n, m):
        b = c[part]
        f = Map(W, b, activation, backend)
        first_value = f.value(torch.zeros_like(b))
        start = first_value if z0 is None else z0[part]
        best = Best(f, first_value, start)
        for (delta, power), steps in zip(PACES, (first, max_iter - first), strict=True):
            rows = (~(best.residual <= limit)).nonzero().squeeze(-1)
            _march(Map(wide, b.double(), activation, backend), start, best, rows, delta, power, steps, limit)
            start = first_value
        z[part], residual[part], iterations[part] = best.image, best.residual, best.iterations
    status = torch.where(residual <= tol, int(Status.CONVERGED), int(Status.MAX_ITER)).to(torch.uint8)
    return z, iterations, residual, status


@dataclass(frozen=True)
class Map:
    """``act(W z + c)`` of some samples, by a backend."""

    W: Tensor
    c: Tensor
    activation: str
    backend: ModuleType

    def of(self, rows: Tensor) -> "Map":
        return replace(self, c=self.c[rows])

    def value(self, z: Tensor) -> Tensor:
        return self.backend.evaluate(self.W, self.c, z, self.activation)

    def derivative(self, z: Tensor) -> Tensor:
        """``act'(W z + c)``."""
        return self.backend.derivative(self.W, self.c, z, self.activation)


class Best:
    """The points with the smallest residual in the caller's precision, and the steps taken."""

    def __init__(self, f: Map, first_value: Tensor, start: Tensor):
        self.f = f
        self.iterations = torch.zeros(len(first_value), dtype=torch.int32, device=first_value.device)
        self.image = first_value.clone()  # of the point 0, finite whatever W is
        self.residual = (_norm(self.image) > 0).to(first_value.dtype)
        self.judge(torch.arange(len(first_value), device=first_value.device), start)

    def judge(self, rows: Tensor, y: Tensor) -> None:
        y = y.to(self.image.dtype)
        image = self.f.of(rows).value(y)
        r = _relative(image - y, image)
        better = r < self.residual[rows]
        self.image[rows[better]] = image[better]
        self.residual[rows[better]] = r[better]


def _march(f: Map, start, best, rows, delta, power, steps, limit) -> None:
    """Up to ``steps`` pseudo-time steps of the samples ``rows`` of f from ``start``, in float64."""
    z, f = start[rows].double(), f.of(rows)
    F = z - f.value(z)
    size = _norm(F)
    delta = torch.full_like(size, delta)
    for _ in range(steps):
        if rows.numel() == 0:
            return
        J = f.derivative(z).unsqueeze(-1) * -f.W
        J.diagonal(dim1=-2, dim2=-1).add_((1 + 1 / delta).unsqueeze(-1))
        step = -solve_each(J, F)[0]
        trial = z + step
        best.iterations[rows] += 1
        G = trial - f.value(trial)
        new, missed = _norm(G), _norm(G + step / delta.unsqueeze(-1))  # of a linear f the sum would be 0
        good = torch.isfinite(new)  # a singular J takes no step, but a shorter one next time
        z, F = (torch.where(good.unsqueeze(-1), a, b) for a, b in ((trial, z), (G, F)))
        growth = _power(size / new, power)
        straight = (MISSED * size / missed).sqrt().minimum(SHORT / delta)
        growth = torch.where(missed < MISSED * size, growth.maximum(straight), growth)
        growth = torch.where(good, growth, 1 / GROWTH).nan_to_num(nan=GROWTH)
        delta = (delta * growth.clamp(1 / GROWTH, GROWTH)).clamp(SHORTEST, LONGEST)
        size = torch.where(good, new, size)
        best.judge(rows, z)
        keep = ~(best.residual[rows] <= limit)
        if not keep.all():
            rows, z, F, size, delta = (t[keep] for t in (rows, z, F, size, delta))
            f = f.of(keep)


def _relative(step: Tensor, image: Tensor) -> Tensor:
    """``||step|| / ||image||`` (n,), NaN where anything is not finite."""
    step, size = _norm(step), _norm(image)
    return torch.where(step > 0, step / size, step).masked_fill_(~torch.isfinite(size), torch.nan)


def _power(x: Tensor, exponent: float) -> Tensor:
    """``x ** exponent`` for 1.5 and 0.75, by operations that round the same wherever an element lies: torch's power has
    one function for whole vectors and one for the rest."""
    power = x * x.sqrt()
    return power if exponent == 1.5 else power.sqrt()


@torch.no_grad()
def masked_solve(
    A: Tensor, d: Tensor, g: Tensor, tol: float, backend: ModuleType = torch_backend
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``u = d * (A u + g)`` of a few samples by one linear system each: ``(I - D A) u = D g``.

    A (m, m), d and g (n, m), float32 or float64. Where ``I - D A`` is singular, its solution of least squares and least
    norm, which solves the equation if anything does. Results as :func:`newton`, of one iteration; status CONVERGED or,
    with a residual above tol, STALLED.
    """
    n, m = g.shape
    u, residual = torch.empty_like(g), torch.empty(n, dtype=g.dtype, device=g.device)
    wide = A.double()
    for part in _chunks(n, m):
        D, b = d[part].double(), g[part].double()
        J = D.unsqueeze(-1) * -wide
        J.diagonal(dim1=-2, dim2=-1).add_(1.0)
        y, info = solve_each(J, D * b)
        failed = (info != 0) | ~torch.isfinite(y).all(-1)
        failed &= torch.isfinite(J).all(-1).all(-1)  # nothing solves what has overflowed, and an SVD of it is an error
        if failed.any():
            y[failed] = _least_squares(J[failed], (D * b)[failed])
        y = y.to(g.dtype)
        image = d[part] * backend.evaluate(A, g[part], y, "identity")
        r, zero = _relative(image - y, image), d[part] * g[part]
        usable = r <= 1  # else the point 0 and its image are better; false for NaN
        u[part] = torch.where(usable.unsqueeze(-1), image, zero)
        residual[part] = torch.where(usable, r, (_norm(zero) > 0).to(r.dtype))
    status = torch.where(residual <= tol, int(Status.CONVERGED), int(Status.STALLED)).to(torch.uint8)
    return u, torch.ones(n, dtype=torch.int32, device=g.device), residual, status


def _least_squares(J: Tensor, b: Tensor) -> Tensor:
    """Minimum-norm least squares, singular values below m epsilons of the largest taken as zero."""
    U, s, Vh = torch.linalg.svd(J)
    cut = s > J.shape[-1] * torch.finfo(s.dtype).eps * s[:, :1]
    x = torch.where(cut, (U.mT @ b.unsqueeze(-1)).squeeze(-1) / torch.where(cut, s, 1.0), 0.0)
    return (Vh.mT @ x.unsqueeze(-1)).squeeze(-1)


def _chunks(n: int, m: int) -> list[slice]:
    size = max(1, JACOBIAN_BYTES // (2 * 8 * m * m))
    return [slice(i, min(i + size, n)) for i in range(0, n, size)]
