"""When is a sample done? The rule of ``deq/reference.py`` (iterate) for a block of samples at once, in norms.

:func:`judge` is called after each evaluation. The numbers are those of the reference, imported and not repeated.
"""

import triton
import triton.language as tl

from deq import reference
from deq.solution import Status

CONVERGED = tl.constexpr(int(Status.CONVERGED))
MAX_ITER = tl.constexpr(int(Status.MAX_ITER))
STALLED = tl.constexpr(int(Status.STALLED))
DIVERGED = tl.constexpr(int(Status.DIVERGED))
NONFINITE = tl.constexpr(int(Status.NONFINITE))
LIVE = tl.constexpr(255)  # not done yet
RESIDUAL, ERROR = tl.constexpr(0), tl.constexpr(1)  # criterion
CRITERIA = {"residual": RESIDUAL.value, "error": ERROR.value}

_EPS = tl.constexpr(2.0**-23)
_SLOW_AFTER = tl.constexpr(reference.SLOW_AFTER)
_SLOW = tl.constexpr(reference.SLOW_CONTRACTION)
_FLOOR = tl.constexpr(reference.FLOOR_EPS * 2.0**-23)
_PATIENCE_AT_FLOOR = tl.constexpr(reference.PATIENCE_AT_FLOOR)


def rule(tol: float, max_iter: int, width: int) -> dict[str, float | int]:
    """The arguments of :func:`judge` that are common to all samples of a solve, by name."""
    return {
        "tol": float(tol),
        "leave": float(reference.leaves_at(tol)),
        "max_iter": int(max_iter),
        "patience": max(reference.PATIENCE, width),
    }


@triton.jit
def judge(
    step, size, k, previous, before, best, best_at, limit, tol, leave, max_iter, patience, CRITERION: tl.constexpr
):
    """Judge evaluation number k (from 1) of f at y; blocks (n,) of float32, of int32 for k and best_at.

    step: ||f(y) - y||, size: ||f(y)||; previous, before: the last two steps, infinite where there were none; best,
    best_at: the smallest residual so far and its k; limit: ||y|| at k = 1, afterwards the limit returned.
    Returns status (int32; LIVE where the sample goes on), whether this is the iterate to keep, best, best_at, limit,
    and whether the sample contracts slowly enough to be accelerated.
    """
    residual = tl.where(step > 0, step / size, step)
    finite = (step < float("inf")) & (size < float("inf"))
    limit = tl.where(k == 1, tl.maximum(size, limit) / (_EPS * _EPS), limit)
    # Without two earlier steps there is no ratio of them, 0 / inf below; and q = 1: the first says little of a start.
    now = step / previous
    ago = tl.where(before < float("inf"), previous / before, 0.0)
    if CRITERION == RESIDUAL:
        done = (residual <= tol) & ((residual <= leave) | (step > previous * _SLOW) | (k >= max_iter))
    else:
        q = tl.where(k <= 2, 1.0, tl.maximum(now, ago))
        done = (step == 0) | ((q < 1) & (residual * q <= tol * (1 - q)))
    done = done & finite
    better = done | (finite & (residual < best))
    best = tl.where(better, residual, best)
    best_at = tl.where(better, k, best_at)
    waited = k - best_at
    stalled = (waited >= patience) | ((waited >= _PATIENCE_AT_FLOOR) & (best <= _FLOOR))
    diverged = (finite == 0) | (size > limit)
    status = tl.where(k >= max_iter, MAX_ITER, LIVE)
    status = tl.where(stalled, STALLED, status)
    status = tl.where(diverged, DIVERGED, status)
    status = tl.where(done, CONVERGED, status)
    slow = (k >= _SLOW_AFTER) & (tl.minimum(now, ago) > _SLOW)
    return status, better, best, best_at, limit, slow
