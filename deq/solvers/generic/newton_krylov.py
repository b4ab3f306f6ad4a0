"""Newton's method with GMRES on Jacobian products, every sample on its own.

At y the step s solves ``(I - J) s = f(y) - y``, J the Jacobian of f there, to a share of the residual that shrinks as
Newton converges (Eisenstat and Walker 1996, choice 2); a step that does not reduce the residual is halved. Products
with J are two reverse passes over one graph of f; of an affine f they are differences of f itself.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ...solution import Status
from .result import Result
from .rule import Rule
from .torch_steps import RUNNING, TorchSteps, norm

SMALLEST_STEP = 2.0**-6  # a step halved further is taken as it is
FORCING, GROSSEST = 0.9, 0.1  # gamma of choice 2, and the share of the residual that a solve may leave at most


def newton_krylov(
    f: Callable[[Tensor], Tensor],
    y0: Tensor,
    rule: Rule,
    *,
    first: Tensor | None = None,
    keep: Sequence[int] = (),
    traced: bool = False,
) -> Result:
    """See :func:`deq.solvers.generic.run`; products count as evaluations, but have no place in the trace."""
    steps = TorchSteps(y0, replace(rule, method="plain", damping=1.0))
    trajectory: list[Tensor | None] = [None] * len(keep)
    point, direction = y0.clone(), torch.zeros_like(y0)
    best = torch.full_like(steps.residual, torch.inf)  # measure at point
    share = torch.zeros_like(best)  # of the direction that was taken; none before the first
    forcing = torch.full_like(best, GROSSEST)
    zero = f(torch.zeros_like(y0)) if rule.affine else None
    products = int(rule.affine)
    charged = torch.full_like(steps.iterations, products)  # to every sample that ran while they were made
    while True:
        trial = steps.y
        # A trial without a finite image is a step too long, not an end, as long as it can be halved.
        steps.count = torch.where(share > SMALLEST_STEP, 2, 0)
        steps.restarted_at.fill_(-1)
        image = f(trial) if first is None or steps.evaluations else first
        steps.advance(image)
        if traced:
            steps.note()
        for i, k in enumerate(keep):
            if trajectory[i] is None and steps.evaluations + products >= k:
                trajectory[i] = steps.z.clone()
        running = steps.status == RUNNING
        if not bool(running.any()) or steps.evaluations + products >= rule.max_iter:
            break
        g = image - trial
        measure = norm(g)
        good = measure < (1 - 1e-4 * share) * best
        accept = running & (good | ((share <= SMALLEST_STEP) & torch.isfinite(measure)))
        ratio = torch.where(torch.isfinite(best), (measure / best).square() * FORCING, GROSSEST)
        forcing = torch.where(accept, ratio.clamp(1e-3, GROSSEST), forcing)
        point = torch.where(accept.unsqueeze(1), trial, point)
        best = torch.where(accept, measure, best)
        share = torch.where(accept, 1.0, share / 2)
        if bool(accept.any()):
            product = _product(f, trial, zero, g)
            left = rule.max_iter - steps.evaluations - products - 1
            right = torch.where(accept.unsqueeze(1), g, 0.0)
            s, used = gmres(product, right, forcing, max(1, min(rule.depth, left)))
            products += used
            charged += torch.where(running, used, 0).to(torch.int32)
            direction = torch.where(accept.unsqueeze(1), s, direction)
        following = point + share.to(y0.dtype).unsqueeze(1) * direction
        steps.y = torch.where(running.unsqueeze(1), following, steps.y)
    steps.status = torch.where(steps.status == RUNNING, int(Status.MAX_ITER), steps.status)
    steps.iterations += charged
    return Result.of(steps, trajectory)


def _product(f, y: Tensor, zero: Tensor | None, g: Tensor) -> Callable[[Tensor], Tensor]:
    """``v -> v - J v`` at y."""
    if zero is not None:
        size = norm(g).to(g.dtype).unsqueeze(1)
        size = torch.where(size > 0, size, 1.0)
        return lambda v: v - (f(size * v) - zero) / size
    image, pull = torch.func.vjp(f, y)
    _, push = torch.func.vjp(lambda u: pull(u)[0], torch.zeros_like(image))
    return lambda v: v - push(v)[0]


def gmres(product: Callable[[Tensor], Tensor], b: Tensor, forcing: Tensor, depth: int) -> tuple[Tensor, int]:
    """x (B, D) with ``||b - A x|| <= forcing ||b||`` for every sample, or after depth products; and the products.

    Arnoldi with two passes of Gram-Schmidt; the Hessenberg matrices are triangularised by rotations in float64.
    """
    B, D = b.shape
    wide = {"dtype": torch.float64, "device": b.device}
    size = norm(b)
    live = size > 0
    V = b.new_zeros(B, depth + 1, D)
    V[:, 0] = b / torch.where(live, size, 1.0).to(b.dtype).unsqueeze(1)
    R = torch.zeros(B, depth, depth, **wide)
    cos, sin = torch.zeros(B, depth, **wide), torch.zeros(B, depth, **wide)
    t = torch.zeros(B, depth + 1, **wide)
    t[:, 0] = size
    used = 0
    for k in range(depth):
        w = product(V[:, k])
        used = k + 1
        h = torch.zeros(B, k + 1, **wide)
        for _ in range(2):
            dots = (V[:, : k + 1] @ w.unsqueeze(2)).squeeze(2)
            w = w - (dots.unsqueeze(1) @ V[:, : k + 1]).squeeze(1)
            h += dots
        length = norm(w)
        V[:, k + 1] = w / torch.where(length > 0, length, 1.0).to(b.dtype).unsqueeze(1)
        for j in range(k):
            h[:, j], h[:, j + 1] = (
                cos[:, j] * h[:, j] + sin[:, j] * h[:, j + 1],
                cos[:, j] * h[:, j + 1] - sin[:, j] * h[:, j],
            )
        radius = torch.hypot(h[:, k], length)
        safe = torch.where(radius > 0, radius, 1.0)
        cos[:, k] = torch.where(radius > 0, h[:, k] / safe, 1.0)
        sin[:, k] = length / safe
        h[:, k] = radius
        R[:, : k + 1, k] = h
        t[:, k], t[:, k + 1] = cos[:, k] * t[:, k], -sin[:, k] * t[:, k]
        if not bool((live & (t[:, k + 1].abs() > forcing * size)).any()):
            break
    # A singular direction is left out: its pivot is made infinite.
    R = R[:, :used, :used]
    pivot = R.diagonal(dim1=1, dim2=2)
    largest = pivot.abs().amax(1, keepdim=True)
    usable = torch.isfinite(pivot) & (pivot.abs() > 1e-14 * largest)
    R = torch.diagonal_scatter(R, torch.where(usable, pivot, torch.inf), dim1=1, dim2=2)
    x = torch.linalg.solve_triangular(R, t[:, :used].unsqueeze(2), upper=True)
    x = torch.where(torch.isfinite(x), x, 0.0).to(b.dtype)
    return (x.transpose(1, 2) @ V[:, :used]).squeeze(1), used
