"""The rung after Newton, for activations of bounded range: the way to an equilibrium round all folds.

The equilibria of ``z = act(t W z + c)`` are curves over t. At t = 0 there is one point, act(c). For almost every c the
curve through it is smooth, does not leave the range of act, and neither ends nor comes back to t = 0: it reaches t = 1
(Chow, Mallet-Paret, Yorke 1978, Math. Comp. 32). On the way t may fall for a while, so the curve is followed by its
length: a step along the tangent, then Newton's method across it.

Of 183 samples of tanh and sigmoid that Newton's method leaves (width 2 to 100, norm of W 2 to 20) 179 are solved within
1000 linear systems of m + 1 unknowns, on average in 150: 25 ms.
"""

import math
from types import ModuleType

import torch
from torch import Tensor

from ..backends import reference as torch_backend
from ..solution import Status
from .newton import Best, Map

FIRST, LEAST = 0.1, 1e-7  # length of a step: of the first one, and where the curve is given up
CORRECTIONS = 5  # of a step, at most; each is half as long as the one before, or the step was too long
CLOSE = 1e-4  # length of the last one, and at t = 1 what is enough for the tolerance: what is left is about its square
# Share of the step that its first correction may take; the next step is as long as that allows. With 0.1 177 of the 183
# take 1.3 times as many systems, with 0.35 and more some leave their curve for one that never ends.
BENT = 0.2
SHORTER, LONGER = 0.5, 3.0  # than the step before


@torch.no_grad()
def follow(
    W: Tensor,
    c: Tensor,
    activation: str,
    tol: float,
    max_iter: int,
    backend: ModuleType = torch_backend,
    together: float = math.inf,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Equilibria ``z = act(W z + c)`` of a few samples, one after the other; ``activation`` is bounded.

    W (m, m), c (n, m), float32 or float64. Returns as :func:`deq.solvers.newton.newton`: z = f(y) (n, m), iterations
    (n,) int32 (linear systems solved), residual (n,) of y in the dtype of c, status (n,): CONVERGED, or MAX_ITER where
    ``max_iter`` systems or the shortest step did not lead to t = 1, or those before it took ``together``.
    """
    found, used = [], 0
    wide = W.double()
    for row in c.unsqueeze(1):
        f = Map(W, row, activation, backend)
        start = f.value(torch.zeros_like(row))
        best = Best(f, start, start)
        z, systems = None, 0
        if used < together:
            z, systems = _end(_Curve(Map(wide, row.double(), activation, backend)), tol, max_iter)
            used += systems
        if z is not None:
            best.judge(torch.zeros(1, dtype=torch.int64, device=c.device), z)
        found.append((best.image, best.iterations + systems, best.residual))
    if not found:
        return c.clone(), c.new_empty(0, dtype=torch.int32), c.new_empty(0), c.new_empty(0, dtype=torch.uint8)
    z, iterations, residual = (torch.cat(parts) for parts in zip(*found, strict=True))
    status = torch.where(residual <= tol, int(Status.CONVERGED), int(Status.MAX_ITER)).to(torch.uint8)
    return z, iterations, residual, status


def _end(curve: "_Curve", tol: float, max_iter: int) -> tuple[Tensor | None, int]:
    """z (1, m) where the curve reaches t = 1, None if it does not; systems solved, up to ``CORRECTIONS`` too many."""
    systems, length = 0, FIRST
    along_t = torch.zeros_like(curve.start)
    along_t[-1] = 1.0
    point, tangent = curve.start, along_t
    while systems < max_iter and length >= LEAST:
        tangent = curve.solve(point, tangent, along_t)
        systems += 1
        tangent = tangent / torch.linalg.vector_norm(tangent)
        t, rise = float(point[-1]), float(tangent[-1])
        if not math.isfinite(rise):
            break
        ends = rise > 0 and t + length * rise >= 1
        if ends:
            length = (1 - t) / rise
        trial, across, sizes = point + length * tangent, along_t if ends else tangent, [length]
        close = min(CLOSE, 0.1 * math.sqrt(tol)) if ends else CLOSE
        while len(sizes) <= CORRECTIONS:
            step = curve.solve(trial, across, None)
            systems += 1
            trial = trial + step
            sizes.append(float(torch.linalg.vector_norm(step)))
            if sizes[-1] <= close or not sizes[-1] <= 0.5 * sizes[-2]:
                break
        if not sizes[-1] <= close or (trial[-1] > 1 and not ends):
            length *= SHORTER
            continue
        point = trial
        if ends:
            return curve.z(point), systems
        length *= min(max(math.sqrt(BENT * length / max(sizes[1], 1e-300)), SHORTER), LONGER)
    return None, systems


class _Curve:
    """The curve of one sample in the points (z / sqrt(m), t), m + 1 numbers of one size."""

    def __init__(self, f: Map):
        self.f, self.unit = f, f.c.shape[-1] ** 0.5
        self.linear = Map(f.W, torch.zeros_like(f.c), "identity", f.backend)
        start = f.value(torch.zeros_like(f.c)).squeeze(0) / self.unit
        self.start = torch.cat((start, start.new_zeros(1)))

    def z(self, point: Tensor) -> Tensor:
        return (point[:-1] * self.unit).unsqueeze(0)

    def solve(self, point: Tensor, across: Tensor, right: Tensor | None) -> Tensor:
        """``A x = right`` for the Jacobian A of (z - act(t W z + c)) / sqrt(m) at a point, and below it the row
        ``across``; None: Newton's step, orthogonal to ``across``."""
        z, t = self.z(point), float(point[-1])
        slope = self.f.derivative(t * z).squeeze(0)
        A = point.new_empty(len(point), len(point))
        torch.mul(self.f.W, (-t * slope).unsqueeze(-1), out=A[:-1, :-1])
        A[:-1, :-1].diagonal().add_(1.0)
        A[:-1, -1] = -slope * self.linear.value(z).squeeze(0) / self.unit
        A[-1] = across
        if right is None:
            right = torch.cat(((self.f.value(t * z) - z).squeeze(0) / self.unit, point.new_zeros(1)))
        return torch.linalg.solve_ex(A, right)[0]
