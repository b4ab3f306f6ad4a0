"""Anderson's mixing weights of every sample, ``argmin ||sum_i a_i g_i||`` subject to ``sum_i a_i = 1``, in registers.

The normal equations of each sample are scaled to unit diagonal, so that the regulariser is relative to every residual,
and factored by Cholesky in float64: one sample a lane, no loop over memory. The newest residual comes first: the factor
of the newest n residuals is the leading part of the whole one, so that dropping the oldest until the equations can be
trusted costs a back substitution each. Rule and numbers are those of ``csrc/anderson.h`` and ``deq/reference.py``.
"""

import triton
import triton.language as tl

from deq import reference

_MAX_WEIGHT = tl.constexpr(reference.MAX_WEIGHT)
_REGULARISER = tl.constexpr(10 * 2.0**-23)


@triton.constexpr_function
def _triangle(i, j):
    return i * (i + 1) // 2 + j


@triton.jit
def ring(newest, AGE: tl.constexpr, DEPTH: tl.constexpr):
    """Where the residual that is AGE evaluations older than the newest lies in its ring of DEPTH."""
    return (newest + DEPTH - AGE) % DEPTH


@triton.jit
def entry(p, q, DEPTH: tl.constexpr):
    """Where <g_p, g_q> lies in a Gram matrix of which one triangle is kept; p and q are ring positions."""
    return tl.maximum(p, q) * DEPTH + tl.minimum(p, q)


@triton.jit
def _product_of(gram_ptrs, stride, mask, newest, ONE: tl.constexpr, OTHER: tl.constexpr, DEPTH: tl.constexpr):
    """<g_p, g_q> of the residuals that are ONE and OTHER evaluations older than the newest; loaded here and not before,
    because registers are few."""
    place = entry(ring(newest, ONE, DEPTH), ring(newest, OTHER, DEPTH), DEPTH)
    return tl.load(gram_ptrs + place * stride, mask=mask, other=0.0, volatile=True)


@triton.jit
def mixing_weights(gram_ptrs, stride, mask, count, newest, DEPTH: tl.constexpr):
    """Weights of the samples whose Gram matrices start at gram_ptrs (n,), entries ``stride`` elements apart (float64).

    mask (n,): the samples to read; count (n,): residuals that each holds, the one at ring position ``newest`` included.
    Returns a tuple of DEPTH blocks (n,) float64, newest first: 1, 0, 0, ... where no two residuals can be trusted, a
    residual is zero or not finite, or a pivot is too small; absent residuals weigh exactly 0.
    """
    zero = tl.zeros(count.shape, tl.float64)
    sound = count > 0
    scale, factor, inverse, known, forward = (), (), (), (), ()
    for i in tl.static_range(DEPTH):  # newest first
        present = mask & (i < count)
        square = _product_of(gram_ptrs, stride, present, newest, i, i, DEPTH)
        usable = square > 0
        scale = scale + (tl.where(usable, 1.0 / tl.sqrt(tl.where(usable, square, 1.0)), 0.0),)
        right = scale[i]
        for j in tl.static_range(i + 1):
            if i == j:
                rest = square * scale[i] * scale[i] + _REGULARISER
            else:
                rest = _product_of(gram_ptrs, stride, present, newest, i, j, DEPTH) * scale[i] * scale[j]
            for k in tl.static_range(j):
                rest -= factor[_triangle(i, k)] * factor[_triangle(j, k)]
            if i == j:
                sound = sound & usable & (rest > 0)
                pivot = tl.sqrt(tl.where(sound, rest, 1.0))
                factor = factor + (pivot,)
                inverse = inverse + (1.0 / pivot,)
            else:
                factor = factor + (rest * inverse[j],)
                right -= factor[_triangle(i, j)] * forward[j]
        known = known + (sound,)
        forward = forward + (right * inverse[i],)

    found = count < 2
    weights = (zero + 1.0,)
    for _ in tl.static_range(DEPTH - 1):
        weights = weights + (zero,)
    for dropped in tl.static_range(DEPTH - 1):
        back = ()  # of the newest DEPTH - dropped, oldest first
        total, absolute = zero, zero
        for n in tl.static_range(DEPTH - dropped):
            a = forward[DEPTH - dropped - 1 - n]
            for k in tl.static_range(n):
                a -= factor[_triangle(DEPTH - dropped - 1 - k, DEPTH - dropped - 1 - n)] * back[k]
            back = back + (a * inverse[DEPTH - dropped - 1 - n],)
            total += back[n] * scale[DEPTH - dropped - 1 - n]
            absolute += tl.abs(back[n] * scale[DEPTH - dropped - 1 - n])
        trusted = known[DEPTH - dropped - 1] & (absolute < tl.abs(total) * _MAX_WEIGHT)  # false for NaN
        use = trusted & (found == 0)
        unit = 1.0 / tl.where(use, total, 1.0)
        chosen = ()
        for i in tl.static_range(DEPTH):
            if i < DEPTH - dropped:
                chosen = chosen + (tl.where(use, back[DEPTH - dropped - 1 - i] * scale[i] * unit, weights[i]),)
            else:
                chosen = chosen + (tl.where(use, 0.0, weights[i]),)
        weights = chosen
        found = found | use
    return weights
