"""Newton's method with GMRES on Jacobian products, every sample on its own.

At y the step s solves ``(I - J) s = f(y) - y``, J the Jacobian of f there, to a share of the residual that shrinks as
Newton converges (Eisenstat and Walker 1996, choice 2); a step that does not reduce the residual is halved. Products
with J are two reverse passes over one graph of f; of an affine f they are differences of f itself, and difference
quotients in inference mode where torch has no derivatives (2.10 and 2.11).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache

import torch
from torch import Tensor

from ...modes import vjp
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
    kept, reached = [y0.clone() for _ in keep], [torch.zeros_like(steps.status, dtype=torch.bool) for _ in keep]
    point, direction = y0.clone(), torch.zeros_like(y0)
    best = torch.full_like(steps.residual, torch.inf)  # measure at point
    share = torch.zeros_like(best)  # of the direction that was taken; none before the first
    forcing = torch.full_like(best, GROSSEST)
    zero = None  # f(0) of an affine f
    products = torch.zeros_like(steps.iterations)  # of every sample, f(0) with them
    while True:
        trial = steps.y
        # A trial without a finite image is a step too long, not an end, as long as it can be halved.
        steps.count = torch.where(share > SMALLEST_STEP, 2, 0)
        steps.restarted_at.fill_(-1)
        image = f(trial) if first is None or steps.evaluations else first
        steps.advance(image)
        if traced:
            steps.note()
        spent = steps.iterations + products
        for i, k in enumerate(keep):
            due = (spent >= k) & ~reached[i]
            kept[i] = torch.where(due.unsqueeze(1), steps.z, kept[i])
            reached[i] |= due
        steps.status = torch.where(
            (steps.status == RUNNING) & (spent >= rule.max_iter), _at_the_end(steps), steps.status
        )
        running = steps.status == RUNNING
        if not bool(running.any()):
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
            left = rule.max_iter - 1 - spent  # but for the evaluation of the next trial
            if rule.affine and zero is None:  # all samples that run are here for the first time
                left = left - 1
                if bool((accept & (left > 0)).any()):
                    zero = f(torch.zeros_like(y0))
                    products += running.to(products.dtype)
            limit = torch.where(accept, left.clamp(0, rule.depth), 0)
            right = torch.where(accept.unsqueeze(1), g, 0.0)
            s, used = gmres(_product(f, trial, zero, g), right, forcing, limit) if bool(limit.any()) else (g, 0)
            products += used
            s = torch.where((limit > 0).unsqueeze(1), s, g)  # no product left: a plain step
            direction = torch.where(accept.unsqueeze(1), s, direction)
        following = point + share.to(y0.dtype).unsqueeze(1) * direction
        steps.y = torch.where(running.unsqueeze(1), following, steps.y)
    steps.iterations += products
    trajectory = [
        torch.where(some.unsqueeze(1), z, steps.z) if bool(some.any()) else None
        for z, some in zip(kept, reached, strict=True)
    ]
    return Result.of(steps, trajectory)


def _at_the_end(steps: TorchSteps) -> Tensor:
    """The status of samples that may not be evaluated any more."""
    rule = steps.rule
    met = (steps.measure <= rule.tol) & (rule.criterion != "error")
    return torch.where(met, int(Status.CONVERGED), int(Status.MAX_ITER)).to(torch.uint8)


def _product(f, y: Tensor, zero: Tensor | None, g: Tensor) -> Callable[[Tensor], Tensor]:
    """``v -> v - J v`` at y."""
    if zero is not None:
        size = norm(g).to(g.dtype).unsqueeze(1)
        size = torch.where(size > 0, size, 1.0)
        return lambda v: v - (f(size * v) - zero) / size
    if torch.is_inference_mode_enabled() and not derives_in_inference_mode():
        image, size = y + g, torch.maximum(norm(y), norm(g))
        size = math.sqrt(torch.finfo(y.dtype).eps) * torch.where(size > 0, size, 1.0).to(y.dtype).unsqueeze(1)
        return lambda v: v - (f(y + size * v) - image) / size
    image, pull = vjp(f, y)
    _, push = vjp(lambda u: pull(u)[0], torch.zeros_like(image))
    return lambda v: v - push(v)[0]


@cache
def derives_in_inference_mode() -> bool:
    """torch before 2.12 says zero there."""
    with torch.inference_mode():
        x = torch.ones(1)
        return bool(torch.func.vjp(lambda x: 2 * x, x)[1](x)[0] == 2)


def gmres(product: Callable[[Tensor], Tensor], b: Tensor, forcing: Tensor, limit: Tensor) -> tuple[Tensor, Tensor]:
    """x (B, D) with ``||b - A x|| <= forcing ||b||`` for every sample, or after ``limit`` (B,) products, and how many
    each of them took: none where b is zero.

    Arnoldi with two passes of Gram-Schmidt; the Hessenberg matrices are triangularised by rotations in float64. The
    space of a sample grows until it has its x, whatever its mates do: what is added for them later are zeros, which
    have no pivot.
    """
    B, D = b.shape
    depth = int(limit.max())
    wide = {"dtype": torch.float64, "device": b.device}
    size = norm(b)
    grows = (size > 0) & (limit > 0)
    used = torch.zeros_like(limit)
    V = b.new_zeros(B, depth + 1, D)
    V[:, 0] = b / torch.where(size > 0, size, 1.0).to(b.dtype).unsqueeze(1)
    R = torch.zeros(B, depth, depth, **wide)
    cos, sin = torch.zeros(B, depth, **wide), torch.zeros(B, depth, **wide)
    t = torch.zeros(B, depth + 1, **wide)
    t[:, 0] = size
    for k in range(depth):
        w = torch.where(grows.unsqueeze(1), product(V[:, k]), 0.0)
        used += grows
        h = torch.zeros(B, k + 1, **wide)
        for _ in range(2):
            dots = (V[:, : k + 1] * w.unsqueeze(1)).sum(2)  # a product of matrices rounds by the number of samples
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
        grows = grows & (t[:, k + 1].abs() > forcing * size) & (limit > k + 1)
        if not bool(grows.any()):
            break
    return _combined(R, t, V, k + 1), used


def _combined(R: Tensor, t: Tensor, V: Tensor, n: int) -> Tensor:
    """``sum_j x_j V_j`` (B, D) with ``R x = t``, by columns: zeros that follow change no bit of it."""
    pivot = R.diagonal(dim1=1, dim2=2)
    # A singular direction is left out.
    usable = torch.isfinite(pivot) & (pivot.abs() > 1e-14 * pivot.abs().amax(1, keepdim=True))
    t, found = t.clone(), torch.zeros_like(V[:, 0])
    for j in reversed(range(n)):
        x = torch.where(usable[:, j], t[:, j] / pivot[:, j], 0.0)
        x = torch.where(torch.isfinite(x), x, 0.0)
        t[:, :n] -= R[:, :n, j] * x.unsqueeze(1)
        found += x.to(V.dtype).unsqueeze(1) * V[:, j]
    return found
