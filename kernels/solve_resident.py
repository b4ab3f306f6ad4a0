"""A whole solve in one program, for widths up to 256: W stays on chip, samples leave by their own residual.

A program takes BLOCK_B samples and holds their iterates transposed, (M, BLOCK_B) with M the width rounded up to a power
of two, so that W is the left operand of every product. Each turn of its loop evaluates ``f`` once for the samples that
are not done; the loop ends with the last of them. Nothing is shared between programs.

Up to 64 the product is one of float32 operands that are loaded once. Above, W as float32 takes more registers than
there are, and steps go by increments: with ``x = W y + c`` at hand and q the step from y to ``f(x)`` in bfloat16,

    y <- y + q,   x <- x + bfloat16(W) q,

where what rounding leaves of a step is part of the next one. x drifts by the error of the rounded W; a sample whose
next step would drown in that drift, that is expected to be done, or that is accelerated gets an anchor instead: the
product itself, W streamed from the L2 cache. Samples are judged at anchors alone, by a residual in full precision, and
which of its turns are anchors depends on nothing but the sample.

Endings, units, judgement and Anderson acceleration are those of :mod:`.iteration`. The window of accelerated samples is
in global memory (SCRATCH, for each program), as are the best iterates, and y for the streamed product.

Ahead-of-time compilation: :func:`compilations`.
"""

from itertools import product

import triton
import triton.language as tl

from deq.activations import ACTIVATIONS

from . import activations
from .anderson import entry, mixing_weights, ring
from .cell import INTERPRETED
from .compilation import Compilation
from .delta import DRIFT, is_due
from .judge import CONVERGED, DIVERGED, LIVE, NONFINITE, judge
from .records import (
    ACCELERATIONS,
    ADJOINT,
    ANDERSON,
    BAD_INJECTION,
    BAD_START,
    ENDINGS,
    FAILED,
    NONE,
    ON_DEMAND,
    REFLECTED,
    REFLECTED_ADJOINT,
    VALUE,
    near_start,
    unit_of,
)

WHOLE = tl.constexpr(64)
BLOCK_B = 16  # samples of a program: the least that tensor cores multiply
WARPS = {16: 4, 32: 4, 64: 8, 128: 8, 256: 8}  # by M; with four warps 64 spills
_STREAMED = tl.constexpr(16)  # columns of W at a time in a streamed product


def padded(m: int) -> int:
    """M of a width."""
    return max(16, triton.next_power_of_2(m))


def scratch_floats(m: int, depth: int) -> int:
    """Float32 of scratch memory that a program needs: y, the best iterates, the window of values and residuals, the
    Gram matrices, the weights and the counts."""
    M = padded(m)
    return BLOCK_B * (M * (2 + 2 * depth) + 2 * depth * (depth + 1) + 2)


@triton.jit
def _ending(x, d, ENDING: tl.constexpr, ACTIVATION: tl.constexpr):
    if ENDING == VALUE:
        out = activations.value(x, ACTIVATION)
    elif ENDING == REFLECTED:
        out = 2.0 * activations.value(x, ACTIVATION) - x
    elif ENDING == ADJOINT:
        out = d * x
    else:
        out = (2.0 * d - 1.0) * x
    return out


@triton.jit
def _streamed(w_ptr, y_ptr, m, stride_wn, stride_wk, M: tl.constexpr, BLOCK_B: tl.constexpr, PRECISION: tl.constexpr):
    """``W y`` with W and y (its samples M apart) read from memory, a few columns of W at a time."""
    j = tl.arange(0, M)[:, None]
    b = tl.arange(0, BLOCK_B)[None, :]
    x = tl.zeros((M, BLOCK_B), tl.float32)
    first = 0
    while first < m:
        k = first + tl.arange(0, _STREAMED)
        w = tl.load(w_ptr + j * stride_wn + k[None, :] * stride_wk)
        y = tl.load(y_ptr + b * M + k[:, None])
        x = tl.dot(w, y, x, input_precision=PRECISION)
        first += _STREAMED
    return x


# The last three pointers are views of one buffer: how they are aligned depends on B, and nothing gains by it.
@triton.jit(do_not_specialize=["B", "max_iter", "patience", "residual_ptr", "iterations_ptr", "status_ptr"])
def solve_kernel(
    w_ptr,
    low_ptr,
    c_ptr,
    d_ptr,
    start_ptr,
    out_ptr,
    residual_ptr,
    iterations_ptr,
    status_ptr,
    counters_ptr,
    scratch_ptr,
    B,
    m,
    stride_wn,
    stride_wk,
    stride_c,
    stride_d,
    stride_start,
    tol,
    leave,
    max_iter,
    patience,
    largest,
    ENDING: tl.constexpr,
    ACTIVATION: tl.constexpr,
    HOMOGENEOUS: tl.constexpr,
    ACCELERATION: tl.constexpr,
    DEPTH: tl.constexpr,
    CRITERION: tl.constexpr,
    PRECISION: tl.constexpr,
    INCREMENTS: tl.constexpr,
    SCRATCH: tl.constexpr,
    M: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    """BLOCK_B samples from start to finish. W is (M, M), zero beyond m; low is the same in bfloat16, contiguous, with
    INCREMENTS. Rows of c, d, start (None for zero) and out (B, m) are contiguous."""
    MASKED: tl.constexpr = (ENDING == ADJOINT) | (ENDING == REFLECTED_ADJOINT)
    program = tl.program_id(0).to(tl.int64)
    b = program * BLOCK_B + tl.arange(0, BLOCK_B)
    in_b = b < B
    j = tl.arange(0, M)[:, None]
    inside = (j < m) & in_b[None, :]
    y_ptr = scratch_ptr + program * SCRATCH
    best_ptr = y_ptr + M * BLOCK_B  # best iterates: not in registers, of which there are too few
    values_ptr = best_ptr + M * BLOCK_B
    residuals_ptr = values_ptr + DEPTH * M * BLOCK_B
    gram_ptr = (residuals_ptr + DEPTH * M * BLOCK_B).to(tl.pointer_type(tl.float64))
    own = tl.arange(0, BLOCK_B)  # places of the samples in the scratch memory
    at = own[None, :] * M + j
    z_ptrs = best_ptr + at

    c = tl.load(c_ptr + b[None, :] * stride_c + j, mask=inside, other=0.0)
    d = c
    if MASKED:
        d = tl.load(d_ptr + b[None, :] * stride_d + j, mask=inside, other=0.0)
    bad = tl.max(tl.where(tl.abs(c) < float("inf"), 0, 1), axis=0)
    bad_start = bad * 0
    y = tl.zeros((M, BLOCK_B), tl.float32)
    if start_ptr is not None:
        y = tl.load(start_ptr + b[None, :] * stride_start + j, mask=inside, other=0.0)
        bad_start = tl.max(tl.where(tl.abs(y) < float("inf"), 0, 1), axis=0)
    finite = in_b & (bad + bad_start == 0)
    c = tl.where(finite[None, :], c, 0.0)
    y = tl.where(finite[None, :], y, 0.0)
    # Of the values: where relu or a mask ends it, c may be any size.
    reach = tl.where(inside, _ending(c, d, ENDING, ACTIVATION), 0.0)
    unit = unit_of(tl.max(tl.abs(reach), axis=0))
    if start_ptr is not None:
        reaches = tl.max(tl.abs(c), axis=0), tl.max(tl.abs(reach), axis=0), tl.max(tl.abs(y), axis=0)
        nearer, reach_judged = near_start(reaches[0], reaches[1], reaches[2], HOMOGENEOUS)
        y = y * nearer[None, :]
        unit = unit_of(reach_judged)
    judged = unit * 0.0 + 1.0  # squares are of iterates times this
    if HOMOGENEOUS:
        c = c * unit[None, :]
        y = y * unit[None, :]
    else:
        judged = unit

    status = tl.where(finite, LIVE, NONFINITE)
    iterations = tl.zeros((BLOCK_B,), tl.int32)
    infinity = tl.full((BLOCK_B,), float("inf"), tl.float32)
    previous, before, best = infinity, infinity, infinity
    best_at = iterations
    limit = tl.sqrt(tl.sum(y * y, axis=0)) * judged
    held = iterations
    if ACCELERATION == ANDERSON:
        held = held + 1
    tl.store(z_ptrs, y)
    columns = tl.arange(0, M)[None, :]
    if INCREMENTS:
        # Of its own: 256 x 256 float32 on their way to bfloat16 would take all registers.
        w = tl.load(low_ptr + j * M + columns)
    elif M <= WHOLE:
        w = tl.load(w_ptr + j * stride_wn + columns * stride_wk)
    else:
        w = 0.0
    x = c
    if start_ptr is not None:
        x = c + _product(w, w_ptr, y, y_ptr + at, y_ptr, m, stride_wn, stride_wk, M, BLOCK_B, PRECISION)
    exact = finite  # whether x is W y + c in full precision
    moved, run = infinity * 0.0, iterations
    turn = 0
    going = tl.max(finite.to(tl.int32))
    while going > 0:
        live = status == LIVE
        out = tl.where(j < m, _ending(x, d, ENDING, ACTIVATION), 0.0)
        step_of = out - y
        step = tl.sqrt(_dot(step_of, step_of, judged, HOMOGENEOUS))
        size = tl.sqrt(_dot(out, out, judged, HOMOGENEOUS))
        k = iterations + 1
        verdict, better, best_now, best_at_now, limit, slow = judge(
            step, size, k, previous, before, best, best_at, limit, tol, leave, max_iter, patience, CRITERION
        )
        decided = live & exact
        better = better & decided
        tl.store(z_ptrs, out, mask=better[None, :])
        best = tl.where(better, best_now, best)
        best_at = tl.where(better, best_at_now, best_at)
        status = tl.where(decided, verdict, status)
        iterations = tl.where(live, k, iterations)
        live = status == LIVE

        onward = out
        if ACCELERATION != NONE:
            mixes = live & (held > 0)
            if tl.max(mixes.to(tl.int32)) > 0:
                onward = _mixed(
                    out, step_of, judged, mixes, held, turn % DEPTH, values_ptr + at, residuals_ptr + at,
                    gram_ptr + own, HOMOGENEOUS, DEPTH, M, BLOCK_B,
                )  # fmt: skip
            held = tl.where(mixes, tl.minimum(held + 1, DEPTH), held)
            if ACCELERATION == ON_DEMAND:
                held = tl.where(live & slow & (held == 0), 1, held)

        if INCREMENTS:
            ratio = tl.where(previous < float("inf"), tl.minimum(step / previous, 1.0), 1.0)
            moved = tl.where(exact, 0.0, moved) + step
            run = tl.where(exact, 0, run) + 1
            anchors = is_due(step * ratio, size, ratio, moved, run, k, limit, tol, leave, max_iter, DRIFT, CRITERION)
            anchors = anchors | (held > 0)
            q = (onward - y).to(tl.bfloat16)
            if INTERPRETED:  # it would multiply the bit patterns of bfloat16
                x += tl.dot(w.to(tl.float32), q.to(tl.float32), input_precision="ieee")
            else:
                x = tl.dot(w, q, x)
            y = tl.where((live & anchors)[None, :], onward, tl.where(live[None, :], y + q.to(tl.float32), y))
            exact = live & anchors
            if tl.max(exact.to(tl.int32)) > 0:
                anchor = _product(w, w_ptr, y, y_ptr + at, y_ptr, m, stride_wn, stride_wk, M, BLOCK_B, PRECISION)
                c = tl.load(c_ptr + b[None, :] * stride_c + j, mask=inside & finite[None, :], other=0.0)
                if HOMOGENEOUS:
                    c = c * unit[None, :]
                x = tl.where(exact[None, :], anchor + c, x)
        else:
            y = tl.where(live[None, :], onward, y)
            x = c + _product(w, w_ptr, y, y_ptr + at, y_ptr, m, stride_wn, stride_wk, M, BLOCK_B, PRECISION)
        before = previous
        previous = step
        turn += 1
        going = tl.max(live.to(tl.int32))

    tl.debug_barrier()
    z = tl.load(z_ptrs)
    if (ENDING == REFLECTED) | (ENDING == REFLECTED_ADJOINT):  # one evaluation of the equation's own map
        x = c + _product(w, w_ptr, z, y_ptr + at, y_ptr, m, stride_wn, stride_wk, M, BLOCK_B, PRECISION)
        z = tl.where(j < m, _ending(x, d, ADJOINT if MASKED else VALUE, ACTIVATION), 0.0)
    if HOMOGENEOUS:
        z = z * (1.0 / unit)[None, :]
    beyond = tl.max(tl.where(tl.abs(z) <= largest, 0, 1), axis=0) > 0  # true for NaN
    z = tl.where(z == z, tl.minimum(tl.maximum(z, -largest), largest), 0.0)
    if MASKED:
        z = tl.where((status == NONFINITE)[None, :], float("nan"), z)
    status = tl.where(beyond & (status != NONFINITE), DIVERGED, status)
    tl.store(out_ptr + b[None, :] * m + j, z, mask=inside)
    tl.store(residual_ptr + b, best, mask=in_b)
    tl.store(iterations_ptr + b, iterations, mask=in_b)
    tl.store(status_ptr + b, status.to(tl.uint8), mask=in_b)
    failed = tl.sum((in_b & (status != CONVERGED)).to(tl.int32))
    if failed > 0:
        tl.atomic_add(counters_ptr + FAILED, failed)
        left = (B - b).to(tl.int32)  # the first sample has the most left
        tl.atomic_max(counters_ptr + BAD_INJECTION, tl.max(tl.where(in_b & (bad > 0), left, 0)))
        tl.atomic_max(counters_ptr + BAD_START, tl.max(tl.where(in_b & (bad_start > 0), left, 0)))


@triton.jit
def _dot(left, right, judged, HOMOGENEOUS: tl.constexpr):
    """The inner product of every sample, of vectors times ``judged``; homogeneous ones are scaled as they are."""
    if HOMOGENEOUS:
        return tl.sum(left * right, axis=0)
    return tl.sum((left * judged[None, :]) * (right * judged[None, :]), axis=0)


@triton.jit
def _product(
    w, w_ptr, y, y_ptrs, y_ptr, m, stride_wn, stride_wk, M: tl.constexpr, BLOCK_B: tl.constexpr, PRECISION: tl.constexpr
):
    """``W y`` in full precision."""
    if M <= WHOLE:
        x = tl.dot(w, y, input_precision=PRECISION)
    else:
        tl.debug_barrier()  # other threads may still read the last y
        tl.store(y_ptrs, y)
        tl.debug_barrier()
        x = _streamed(w_ptr, y_ptr, m, stride_wn, stride_wk, M, BLOCK_B, PRECISION)
    return x


@triton.jit
def _mixed(
    out,
    step_of,
    judged,
    mixes,
    held,
    newest,
    values_ptrs,
    residuals_ptrs,
    gram_ptrs,
    HOMOGENEOUS: tl.constexpr,
    DEPTH: tl.constexpr,
    M: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    """The next iterate: for samples that mix, of the pair just evaluated and those of their window; otherwise out."""
    tl.store(values_ptrs + newest * (M * BLOCK_B), out, mask=mixes[None, :])
    tl.store(residuals_ptrs + newest * (M * BLOCK_B), step_of, mask=mixes[None, :])
    # Loops, and not unrolled: the whole window at once would take all registers.
    r = 0
    while r < DEPTH:
        age = (newest + DEPTH - r) % DEPTH
        present = mixes & (held > tl.where(age == 0, DEPTH, age))
        other = tl.load(residuals_ptrs + r * (M * BLOCK_B), mask=present[None, :], other=0.0)
        other = tl.where(age == 0, step_of, other)
        dots = _dot(step_of, other, judged, HOMOGENEOUS)
        tl.store(gram_ptrs + entry(newest, r, DEPTH) * BLOCK_B, dots.to(tl.float64), mask=mixes & (age < held))
        r += 1
    # The counts go through memory to come back one sample a thread: as they lie here, a thread has four, and would need
    # the registers of four factorisations.
    weights_ptrs = gram_ptrs + DEPTH * DEPTH * BLOCK_B
    count_ptrs = (weights_ptrs + DEPTH * BLOCK_B).to(tl.pointer_type(tl.int64))
    tl.store(count_ptrs, tl.where(mixes, held, 0).to(tl.int64))
    tl.debug_barrier()
    count = tl.load(count_ptrs).to(tl.int32)
    weights = mixing_weights(gram_ptrs, BLOCK_B, count > 0, count, newest, DEPTH)
    for i in tl.static_range(DEPTH):
        tl.store(weights_ptrs + ring(newest, i, DEPTH) * BLOCK_B, weights[i], mask=count > 0)
    tl.debug_barrier()
    mixed = tl.zeros((M, BLOCK_B), tl.float32)
    r = 0
    while r < DEPTH:
        weight = tl.load(weights_ptrs + r * BLOCK_B, mask=mixes, other=0.0).to(tl.float32)
        value = tl.load(values_ptrs + r * (M * BLOCK_B), mask=(mixes & (weight != 0.0))[None, :], other=0.0)
        mixed += weight[None, :] * value
        r += 1
    tl.debug_barrier()  # read before any thread overwrites it
    return tl.where(mixes[None, :], mixed, out)


# Ending, activation, and the direction in which W is contiguous; reflected endings are little more than these.
_KINDS = (("value", "relu", "rows"), ("value", "gelu", "rows"), ("adjoint", "identity", "columns"))


def compilations() -> list[Compilation]:
    """Every width with every ending and kind of acceleration, ragged with the dearest."""
    found = []
    for M in WARPS:
        found += [_compilation(M, *kind, how, "aligned") for kind, how in product(_KINDS, ("none", "on_demand"))]
        found.append(_compilation(M, *_KINDS[1], "on_demand", "ragged"))
    return found


def _compilation(M: int, ending: str, activation: str, weight: str, acceleration: str, width: str) -> Compilation:
    unit, across = ("stride_wk", "stride_wn") if weight == "rows" else ("stride_wn", "stride_wk")
    masked, accelerates = "adjoint" in ending, acceleration != "none"
    depth = 5 if accelerates else 1
    increments = "native" if WHOLE.value >= M else "bfloat16"
    constants = {
        "start_ptr": None,
        unit: 1,
        "ENDING": ENDINGS[ending],
        "ACTIVATION": ACTIVATIONS[activation].number,
        "HOMOGENEOUS": int(masked or ACTIVATIONS[activation].homogeneous),
        "ACCELERATION": ACCELERATIONS[acceleration],
        "DEPTH": depth,
        "CRITERION": 0,
        "PRECISION": "tf32x3",
        "INCREMENTS": int(increments == "bfloat16"),
        "SCRATCH": scratch_floats(M, depth),
        "M": M,
        "BLOCK_B": BLOCK_B,
    }
    if not masked:
        constants["d_ptr"] = None
    if increments == "native":
        constants["low_ptr"] = None
    floats = ("w_ptr", "c_ptr", "d_ptr", "out_ptr", "residual_ptr", "scratch_ptr")
    types = dict.fromkeys(floats, "*fp32") | dict.fromkeys(("tol", "leave", "largest"), "fp32")
    types |= {"low_ptr": "*bf16", "iterations_ptr": "*i32", "status_ptr": "*u8", "counters_ptr": "*i32"}
    integers = ("B", "m", across, "stride_c", "stride_d", "stride_start", "max_iter", "patience")
    types |= dict.fromkeys(integers, "i32")
    types = {name: kind for name, kind in types.items() if name not in constants}
    multiples = (across, *(("m", "stride_c", "stride_d") if width == "aligned" else ()))
    group = f"resident solve, {'accelerated, ' if accelerates else ''}{increments}, {M}x{BLOCK_B}"
    return Compilation(
        name=f"{group}, {ending} of {activation}, W by {weight}, {width}",
        group=group,
        function="solve_resident:solve_kernel",
        types=types,
        constants=constants,
        aligned=(*(name for name, kind in types.items() if kind in ("*fp32", "*bf16")), *multiples),
        warps=WARPS[M],
        stages=1,
    )
