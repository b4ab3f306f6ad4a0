"""Steps by increments: ``x = W y + c`` is kept, and a step adds ``W q`` of the rounded increment q of y.

    x <- x + low(W) q,   y <- y + q,   q <- low(f(x) - y)

low is bfloat16, or float8 (e4m3): W in a power of two for every row, increments in one for every sample, found from the
norm of the step before. What rounding leaves of an increment, and what its range cuts off, is part of the next one, so
that y follows f; x drifts from ``W y + c`` by the error of the rounded W. A sample whose step would drown in that
drift, or be small enough to leave by, is due: it waits for the next anchor, a :func:`.iteration.step_kernel` that forms
``W y + c`` itself, in full precision, and alone judges. Whether a sample is due depends on nothing but itself; rows of
tiles none of whose samples want a step exit at once.

A turn is STEPS such steps and one anchor. Step s of a turn reads its increments from EVEN if s is even, else from ODD,
and writes the other; an anchor writes EVEN.
"""

import triton
import triton.language as tl

from deq.activations import ACTIVATIONS

from .advance import advance_scales, is_last, total_of
from .cell import INTERPRETED, multiply_add, tile_of
from .compilation import RULE_TYPES, Compilation
from .iteration import ending
from .judge import ERROR, LIVE, judge
from .records import (
    BEFORE,
    BEST_AT,
    COUNTERS,
    DUE,
    ENDINGS,
    EVEN,
    FLOAT8,
    INCREMENTS,
    ITERATION,
    LIMIT,
    LISTS,
    LOW,
    MARKS,
    MOVED,
    NEXT_SCALE,
    RECORD,
    RESIDUAL,
    ROW_SCALES,
    RUN,
    SCALE,
    STATUS,
    STEP,
    SUMS,
    UNIT,
    D,
    W,
    X,
    Y,
    exponent_of,
    floats,
    ints,
    lows,
    power_of_two,
    rounded,
)
from .tiles import DELTA_TILES, FLOAT8_FROM, OLDEST, RAGGED_SAMPLES, Tiles

STEPS = 4  # in a turn; even, so that the next turn begins with EVEN

# A sample is due where its step is below SAFE of the tolerance, below DRIFT of all that was moved since its last
# anchor, or after LONGEST steps. Simulated (relu, m = 1024, Gaussian W of norms 0.9, 1.4, 1.8 and 2.2): with 2^-6 for
# float8 3.0, 4.0, 4.0 and 4.7 anchors a sample, and 1, 3, 5 and 6 % more steps than W itself would take; with 2^-4,
# about what e4m3 resolves, no more steps but 4.0, 5.1, 6.0 and 7.5 anchors. bfloat16: 3.0, 3.0, 3.0 and 4.1.
SAFE, LONGEST = tl.constexpr(2.0), tl.constexpr(12)
DRIFT = tl.constexpr(2.0**-7)
DRIFT_FLOAT8 = tl.constexpr(2.0**-6)
FLOAT8_EXPONENT = tl.constexpr(8)
LOW_TILE = (16, 128)  # rows of W and elements of them that a program of low_kernel has at a time


@triton.jit
def low_kernel(
    table_ptr,
    m,
    stride_wn,
    stride_wk,
    INCREMENTS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """LOW, what steps multiply, of BLOCK_N rows of W; for float8 ROW_SCALES too, the powers of two in which no element
    of a row reaches 2^FLOAT8_EXPONENT."""
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    w_ptrs = floats(table_ptr, W) + n[:, None] * stride_wn
    unit = tl.full((BLOCK_N,), 1.0, tl.float32)
    if INCREMENTS == FLOAT8:
        largest = tl.zeros((BLOCK_N,), tl.float32)
        first = 0
        while first < m:
            k = first + tl.arange(0, BLOCK_K).to(tl.int64)
            inside = (n < m)[:, None] & (k < m)[None, :]
            w = tl.load(w_ptrs + k[None, :] * stride_wk, mask=inside, other=0.0)
            largest = tl.maximum(largest, tl.max(tl.abs(w), axis=1))
            first += BLOCK_K
        unit = tl.where(largest > 0, power_of_two(exponent_of(largest) + (1 - FLOAT8_EXPONENT)), unit)
        tl.store(floats(table_ptr, ROW_SCALES) + n, unit, mask=n < m)
    first = 0
    while first < m:
        k = first + tl.arange(0, BLOCK_K).to(tl.int64)
        inside = (n < m)[:, None] & (k < m)[None, :]
        w = tl.load(w_ptrs + k[None, :] * stride_wk, mask=inside, other=0.0)
        tl.store(
            lows(table_ptr, LOW, INCREMENTS) + n[:, None] * m + k[None, :], rounded(w, unit, INCREMENTS), mask=inside
        )
        first += BLOCK_K


@triton.jit
def is_due(step, size, ratio, moved, run, k, limit, tol, leave, max_iter, DRIFT: tl.constexpr, CRITERION: tl.constexpr):
    """Whether an anchor is called for, at which a step of ``step`` and f of norm ``size`` are expected, (n,) samples.
    ratio: of the last step to the one before, at most 1; moved: the steps since the last anchor; run: how many."""
    goal = leave
    if CRITERION == ERROR:
        goal = tol * (1.0 - ratio) / tl.maximum(ratio, 1e-3)
    due = (step <= goal * SAFE * size) | (step <= moved * DRIFT) | (run >= LONGEST)
    return due | (k + 1 >= max_iter) | ((step < float("inf")) == 0) | ((size <= limit) == 0)


@triton.jit(do_not_specialize=["step_of_turn", "B", "max_iter", "patience"])
def delta_kernel(
    table_ptr,
    step_of_turn,
    B,
    m,
    stride_d,
    tol,
    leave,
    max_iter,
    patience,
    ENDING: tl.constexpr,
    ACTIVATION: tl.constexpr,
    HOMOGENEOUS: tl.constexpr,
    CRITERION: tl.constexpr,
    INCREMENTS: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One (BLOCK_B, BLOCK_N) tile of one step of the samples that are not due. LOW (m, m) is contiguous."""
    tiles_b = tl.cdiv(B, BLOCK_B)
    tiles_n = tl.cdiv(m, BLOCK_N)
    tile_b, tile_n = tile_of(tl.program_id(0), tiles_b, tiles_n)
    counters = ints(table_ptr, COUNTERS)
    if tl.load(counters + LISTS + tile_b) == 0:
        return
    in_b = tl.arange(0, BLOCK_B) < B - tile_b * BLOCK_B
    b = tile_b.to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    marks = ints(table_ptr, MARKS) + b
    steps = in_b & (tl.load(marks + STATUS * B, mask=in_b, other=0) == LIVE)
    steps = steps & (tl.load(marks + DUE * B, mask=steps, other=1) == 0)
    if tl.max(steps.to(tl.int32)) == 0:
        return

    in_n = (tl.arange(0, BLOCK_N) < m - tile_n * BLOCK_N)[None, :]
    inside = steps[:, None] & in_n
    n = (tile_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N))[None, :]
    at = b[:, None] * m + n
    q_ptr = lows(table_ptr, EVEN + step_of_turn % 2, INCREMENTS)
    k = tl.arange(0, BLOCK_K).to(tl.int64)
    q_ptrs = q_ptr + b[:, None] * m + k[None, :]
    w_ptrs = lows(table_ptr, LOW, INCREMENTS) + n * m + k[:, None]
    x = tl.zeros((BLOCK_B, BLOCK_N), tl.float32)
    if INTERPRETED:  # see cell_kernel
        done = 0
        while done < m:
            x = multiply_add(x, q_ptrs, w_ptrs, steps, in_n, m - done, "ieee", BLOCK_K)
            q_ptrs += BLOCK_K
            w_ptrs += BLOCK_K
            done += BLOCK_K
    else:
        for done in range(0, m, BLOCK_K):
            x = multiply_add(x, q_ptrs, w_ptrs, steps, in_n, m - done, "ieee", BLOCK_K)
            q_ptrs += BLOCK_K
            w_ptrs += BLOCK_K

    record = floats(table_ptr, RECORD) + b
    q = tl.load(q_ptr + at, mask=inside, other=0.0).to(tl.float32)
    next_scale = 1.0
    if INCREMENTS == FLOAT8:
        scale = tl.load(record + SCALE * B, mask=steps, other=1.0)[:, None]
        next_scale = tl.load(record + NEXT_SCALE * B, mask=steps, other=1.0)
        q = q * scale
        x = x * scale * tl.load(floats(table_ptr, ROW_SCALES) + n, mask=in_n, other=1.0)
    y = q + tl.load(floats(table_ptr, Y) + at, mask=inside, other=0.0)
    tl.store(floats(table_ptr, Y) + at, y, mask=inside)
    x += tl.load(floats(table_ptr, X) + at, mask=inside, other=0.0)
    tl.store(floats(table_ptr, X) + at, x, mask=inside)
    out = ending(x, floats(table_ptr, D) + b[:, None] * stride_d + n, inside, ENDING, ACTIVATION)
    out = tl.where(in_n, out, 0.0)  # act(0) need not be zero
    step = out - y
    next_ptr = lows(table_ptr, EVEN + (step_of_turn + 1) % 2, INCREMENTS)
    tl.store(next_ptr + at, rounded(step, next_scale, INCREMENTS), mask=inside)

    if not HOMOGENEOUS:
        unit = tl.load(record + UNIT * B, mask=steps, other=1.0)[:, None]
        step, out = step * unit, out * unit
    sums = floats(table_ptr, SUMS) + tile_n.to(tl.int64) * B + b
    field = (tile_n.to(tl.int64) * 0 + tiles_n) * B
    tl.store(sums, tl.sum(step * step, axis=1), mask=steps)
    tl.store(sums + field, tl.sum(out * out, axis=1), mask=steps)
    if is_last(counters + LISTS + tiles_b + tile_b, tiles_n):
        _watch(
            table_ptr, B, tiles_n, b, steps, field, tol, leave, max_iter, patience,
            HOMOGENEOUS, CRITERION, INCREMENTS, SLOTS,
        )  # fmt: skip


@triton.jit
def _watch(
    table_ptr,
    B,
    tiles_n,
    b,
    steps,
    field,
    tol,
    leave,
    max_iter,
    patience,
    HOMOGENEOUS: tl.constexpr,
    CRITERION: tl.constexpr,
    INCREMENTS: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """Write down the step of samples b (n,), and whether they are due. A sample that is due is evaluated once more at
    the same point, by the anchor; its steps before are then those before this one."""
    record = floats(table_ptr, RECORD) + b
    marks = ints(table_ptr, MARKS) + b
    sums = floats(table_ptr, SUMS)
    step = tl.sqrt(total_of(sums, tiles_n, B, b, steps, SLOTS))
    size = tl.sqrt(total_of(sums + field, tiles_n, B, b, steps, SLOTS))
    k = tl.load(marks + ITERATION * B, mask=steps, other=0) + 1
    previous = tl.load(record + STEP * B, mask=steps, other=1.0)
    before = tl.load(record + BEFORE * B, mask=steps, other=1.0)
    best = tl.load(record + RESIDUAL * B, mask=steps, other=1.0)
    best_at = tl.load(marks + BEST_AT * B, mask=steps, other=0)
    limit = tl.load(record + LIMIT * B, mask=steps, other=1.0)
    moved = tl.load(record + MOVED * B, mask=steps, other=0.0) + step
    run = tl.load(marks + RUN * B, mask=steps, other=0) + 1
    _status, _better, _best, _best_at, limit, slow = judge(
        step, size, k, previous, before, best, best_at, limit, tol, leave, max_iter, patience, CRITERION
    )
    ratio = tl.where(previous < float("inf"), tl.minimum(step / previous, 1.0), 1.0)
    drift: tl.constexpr = DRIFT_FLOAT8 if INCREMENTS == FLOAT8 else DRIFT
    due = slow | is_due(step, size, ratio, moved, run, k, limit, tol, leave, max_iter, drift, CRITERION)
    goes_on = steps & (due == 0)
    if INCREMENTS == FLOAT8:
        advance_scales(record, B, step, HOMOGENEOUS, goes_on, steps)
    tl.store(record + STEP * B, step, mask=goes_on)
    tl.store(record + BEFORE * B, previous, mask=goes_on)
    tl.store(record + LIMIT * B, limit, mask=goes_on)
    tl.store(record + MOVED * B, moved, mask=goes_on)
    tl.store(marks + RUN * B, run, mask=goes_on)
    tl.store(marks + ITERATION * B, k, mask=goes_on)
    tl.store(marks + DUE * B, 1, mask=steps & due)


def compilations() -> list[Compilation]:
    """Every tile that a step can be launched with, plain and with the dearest activation, ragged with the latter."""
    found = []
    for increments, ladder in DELTA_TILES.items():
        for tiles in ladder:
            for kind in (("value", "relu"), ("value", "gelu"), ("adjoint", "identity")):
                found.append(_compilation(increments, tiles, *kind, "aligned"))
            if tiles.samples <= RAGGED_SAMPLES:
                found.append(_compilation(increments, tiles, "value", "gelu", "ragged"))
        found += [_low_compilation(increments, weight) for weight in ("rows", "columns")]
    return found


def _low_compilation(increments: str, weight: str) -> Compilation:
    unit, across = ("stride_wk", "stride_wn") if weight == "rows" else ("stride_wn", "stride_wk")
    return Compilation(
        name=f"low weight, {increments}, by {weight}",
        group=f"low weight, {increments}",
        function="delta:low_kernel",
        types={"table_ptr": "*i64", "m": "i32", across: "i32"},
        constants={unit: 1, "INCREMENTS": INCREMENTS[increments], "BLOCK_N": LOW_TILE[0], "BLOCK_K": LOW_TILE[1]},
        aligned=("table_ptr", "m", across),
        warps=4,
        stages=3,
        oldest=FLOAT8_FROM if increments == "float8" else OLDEST,
    )


def _compilation(increments: str, tiles: Tiles, end: str, activation: str, width: str) -> Compilation:
    group = f"delta step, {increments}, {tiles}"
    return Compilation(
        name=f"{group}, {end} of {activation}, {width}",
        group=group,
        function="delta:delta_kernel",
        types={
            "table_ptr": "*i64",
            **dict.fromkeys(("step_of_turn", "B", "m", "stride_d"), "i32"),
            **RULE_TYPES,
        },
        constants={
            "ENDING": ENDINGS[end],
            "ACTIVATION": ACTIVATIONS[activation].number,
            "HOMOGENEOUS": int(end == "adjoint" or ACTIVATIONS[activation].homogeneous),
            "CRITERION": 0,
            "INCREMENTS": INCREMENTS[increments],
            "SLOTS": 32,
            "BLOCK_B": tiles.samples,
            "BLOCK_N": tiles.units,
            "BLOCK_K": tiles.depth,
        },
        aligned=("table_ptr", "m", "stride_d") if width == "aligned" else ("table_ptr",),
        warps=tiles.warps,
        stages=tiles.stages,
        registers=tiles.registers,
        oldest=FLOAT8_FROM if increments == "float8" else OLDEST,
    )
