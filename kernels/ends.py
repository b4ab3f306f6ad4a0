"""Before and after the iteration: the first iterate and record of every sample, and what is handed out for it."""

import triton
import triton.language as tl

from deq.activations import ACTIVATIONS

from .compilation import RULE_TYPES, Compilation
from .iteration import ending
from .judge import CONVERGED, DIVERGED, LIVE, NONFINITE, judge
from .records import (
    ACCELERATIONS,
    ANDERSON,
    BAD_INJECTION,
    BAD_START,
    BEFORE,
    BEST_AT,
    COUNTERS,
    DUE,
    ENDINGS,
    EVEN,
    FAILED,
    FLOAT8,
    FRONT,
    HELD,
    INCREMENTS,
    ITERATION,
    LIMIT,
    LISTS,
    LIVE_SAMPLES,
    MARKS,
    MOVED,
    NEXT_SCALE,
    OUT,
    OUT_ITERATIONS,
    OUT_RESIDUAL,
    OUT_STATUS,
    PLACE,
    RECORD,
    RESIDUAL,
    RING,
    RUN,
    SCALE,
    START,
    STATUS,
    STEP,
    UNIT,
    VALUES,
    C,
    D,
    X,
    Y,
    floats,
    ints,
    lows,
    near_start,
    of_caller,
    rounded,
    scale_of,
    unit_of,
)
from .tiles import FLOAT8_FROM, MOST_REGISTERS, OLDEST


@triton.jit(do_not_specialize=["B", "max_iter", "patience"])
def start_kernel(
    table_ptr,
    B,
    m,
    stride_c,
    stride_d,
    stride_start,
    tol,
    leave,
    max_iter,
    patience,
    ENDING: tl.constexpr,
    ACTIVATION: tl.constexpr,
    HOMOGENEOUS: tl.constexpr,
    ACCELERATION: tl.constexpr,
    CRITERION: tl.constexpr,
    STARTS: tl.constexpr,
    FREE_FIRST: tl.constexpr,
    INCREMENTS: tl.constexpr,
    TILE_B: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One sample: is it finite, what is its unit, its first iterate and its record. It begins at zero, or where
    STARTS at START; with FREE_FIRST the first evaluation, of zero, is made here, where it costs no product."""
    sample = tl.program_id(0)
    b = sample.to(tl.int64)
    c_ptr = floats(table_ptr, C) + b * stride_c
    d_ptr = floats(table_ptr, D) + b * stride_d
    start_ptr = of_caller(table_ptr, START) + b * stride_start
    reach, bad, bad_start = 0.0, 0, 0  # reach: of the values; where relu or a mask ends it, c may be any size
    reach_c, reach_start = 0.0, 0.0
    at = 0
    while at < m:
        j = at + tl.arange(0, BLOCK)
        c = tl.load(c_ptr + j, mask=j < m, other=0.0)
        bad = tl.maximum(bad, tl.max(tl.where(tl.abs(c) < float("inf"), 0, 1)))
        value = tl.where(j < m, ending(c, d_ptr + j, j < m, ENDING, ACTIVATION), 0.0)
        reach = tl.maximum(reach, tl.max(tl.abs(value)))
        if STARTS:
            start = tl.load(start_ptr + j, mask=j < m, other=0.0)
            bad_start = tl.maximum(bad_start, tl.max(tl.where(tl.abs(start) < float("inf"), 0, 1)))
            reach_start = tl.maximum(reach_start, tl.max(tl.abs(start)))
            reach_c = tl.maximum(reach_c, tl.max(tl.abs(c)))
        at += BLOCK
    finite = (bad == 0) & (bad_start == 0)
    reach = tl.where(finite, reach, 1.0)
    unit = unit_of(reach)
    if STARTS:
        reach_start = tl.where(finite, reach_start, 1.0)
        nearer, judged = near_start(reach_c, reach, reach_start, HOMOGENEOUS)
        unit = unit_of(judged)
        reach = tl.maximum(reach, reach_start * nearer)
    scale = scale_of(reach * unit if HOMOGENEOUS else reach)  # of a first increment, whose norm is not known yet

    front_ptr = floats(table_ptr, FRONT) + b * m
    total = 0.0
    at = 0
    while at < m:
        j = at + tl.arange(0, BLOCK)
        if FREE_FIRST:
            c = tl.load(c_ptr + j, mask=j < m, other=0.0)
            if HOMOGENEOUS:
                c = c * unit
            y = tl.where(j < m, ending(c, d_ptr + j, j < m, ENDING, ACTIVATION), 0.0)
        elif STARTS:
            y = tl.load(start_ptr + j, mask=j < m, other=0.0) * nearer
            if HOMOGENEOUS:
                y = y * unit
        else:
            y = tl.zeros((BLOCK,), tl.float32)
        y = tl.where(finite, y, 0.0)
        tl.store(front_ptr + j, y, mask=j < m)
        if INCREMENTS:
            if FREE_FIRST:  # f(0) is the first increment, and c is W 0 + c
                c = tl.where(finite, c, 0.0)
                tl.store(floats(table_ptr, X) + b * m + j, c, mask=j < m)
                tl.store(floats(table_ptr, Y) + b * m + j, tl.zeros((BLOCK,), tl.float32), mask=j < m)
                low = tl.reshape(rounded(y[None, :], tl.full((1,), 1.0, tl.float32) * scale, INCREMENTS), (BLOCK,))
                tl.store(lows(table_ptr, EVEN, INCREMENTS) + b * m + j, low, mask=j < m)
            else:
                tl.store(floats(table_ptr, Y) + b * m + j, y, mask=j < m)
        if not HOMOGENEOUS:
            y = y * unit
        total += tl.sum(y * y)
        at += BLOCK
    size = tl.sqrt(total)

    infinity = size * 0.0 + float("inf")
    k = bad * 0
    status, step, best, best_at, limit = k + LIVE, infinity, infinity, k, size
    if FREE_FIRST:
        k = k + 1
        step = size
        status, _better, best, best_at, limit, _slow = judge(
            size, size, k, infinity, infinity, infinity, k * 0, size * 0.0, tol, leave, max_iter, patience, CRITERION
        )
    status = tl.where(finite, status, NONFINITE)
    record_ptr = floats(table_ptr, RECORD) + b
    tl.store(record_ptr + STEP * B, step)
    tl.store(record_ptr + BEFORE * B, infinity)
    tl.store(record_ptr + RESIDUAL * B, tl.where(finite, best, float("inf")))
    tl.store(record_ptr + LIMIT * B, limit)
    tl.store(record_ptr + UNIT * B, unit)
    marks_ptr = ints(table_ptr, MARKS) + b
    tl.store(marks_ptr + STATUS * B, status)
    tl.store(marks_ptr + ITERATION * B, tl.where(finite, k, 0))
    tl.store(marks_ptr + BEST_AT * B, best_at)
    tl.store(marks_ptr + PLACE * B, 0)
    tl.store(marks_ptr + HELD * B, 1 if ACCELERATION == ANDERSON else 0)
    if INCREMENTS:
        tl.store(record_ptr + MOVED * B, tl.where(step < float("inf"), step, 0.0))
        tl.store(marks_ptr + RUN * B, 0)
        tl.store(marks_ptr + DUE * B, 0 if FREE_FIRST else 1)
        if INCREMENTS == FLOAT8:
            tl.store(record_ptr + SCALE * B, scale)
            tl.store(
                record_ptr + NEXT_SCALE * B, scale_of(size if HOMOGENEOUS else size / unit) if FREE_FIRST else scale
            )
    counters = ints(table_ptr, COUNTERS)
    if status == LIVE:
        tl.atomic_add(counters + LIVE_SAMPLES, 1)
        tl.atomic_add(counters + LISTS + sample // TILE_B, 1)
    else:
        if status != CONVERGED:
            tl.atomic_add(counters + FAILED, 1)
    # The first sample has the largest distance from the end.
    if bad > 0:
        tl.atomic_max(counters + BAD_INJECTION, B - sample)
    if bad_start > 0:
        tl.atomic_max(counters + BAD_START, B - sample)


@triton.jit(do_not_specialize=["B"])
def finish_kernel(
    table_ptr,
    B,
    m,
    largest,
    HOMOGENEOUS: tl.constexpr,
    MASKED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One sample's best iterate, held within ``largest`` (beyond it has diverged), and its record. A sample that was
    not finite is zero, with MASKED NaN, where a loss scaler looks for it."""
    b = tl.program_id(0).to(tl.int64)
    record = floats(table_ptr, RECORD) + b
    marks = ints(table_ptr, MARKS) + b
    place = tl.load(marks + PLACE * B)
    status = tl.load(marks + STATUS * B)
    source = floats(table_ptr, tl.where(place < RING, FRONT + place, VALUES))
    source += (tl.maximum(place - RING, 0).to(tl.int64) * B + b) * m
    unit = tl.load(record + UNIT * B)
    beyond = place * 0
    first = 0
    while first < m:
        j = first + tl.arange(0, BLOCK)
        z = tl.load(source + j, mask=j < m, other=0.0)
        if HOMOGENEOUS:
            z = z * (1.0 / unit)
        beyond = tl.maximum(beyond, tl.max((tl.abs(z) > largest).to(tl.int32)))
        z = tl.minimum(tl.maximum(z, -largest), largest)
        if MASKED:
            z = tl.where(status == NONFINITE, float("nan"), z)
        tl.store(of_caller(table_ptr, OUT) + b * m + j, z, mask=j < m)
        first += BLOCK
    if beyond > 0:
        if status == CONVERGED:
            tl.atomic_add(ints(table_ptr, COUNTERS) + FAILED, 1)
        status = status * 0 + DIVERGED
    tl.store(of_caller(table_ptr, OUT_RESIDUAL) + b, tl.load(record + RESIDUAL * B))
    tl.store(ints(table_ptr, OUT_ITERATIONS) + b, tl.load(marks + ITERATION * B))
    tl.store(tl.load(table_ptr + OUT_STATUS).to(tl.pointer_type(tl.uint8)) + b, status.to(tl.uint8))


def compilations() -> list[Compilation]:
    """The start with every kind of increments and from a point of the caller's, with the dearest activation and as an
    adjoint; the finish of both."""
    found = [
        _start_compilation(end, activation, increments, starts)
        for end, activation in (("value", "gelu"), ("adjoint", "identity"))
        for increments in INCREMENTS
        for starts in (False, True)
    ]
    return [*found, _finish_compilation(False), _finish_compilation(True)]


def _start_compilation(end: str, activation: str, increments: str, starts: bool) -> Compilation:
    return Compilation(
        name=f"start, {increments}, {end} of {activation}, {'from a point' if starts else 'from zero'}",
        group=f"start, {increments}",
        function="ends:start_kernel",
        types={
            "table_ptr": "*i64",
            **dict.fromkeys(("B", "m", "stride_c", "stride_d", "stride_start"), "i32"),
            **RULE_TYPES,
        },
        constants={
            "ENDING": ENDINGS[end],
            "ACTIVATION": ACTIVATIONS[activation].number,
            "HOMOGENEOUS": int(end == "adjoint" or ACTIVATIONS[activation].homogeneous),
            "ACCELERATION": ACCELERATIONS["on_demand"],
            "CRITERION": 0,
            "STARTS": int(starts),
            "FREE_FIRST": int(not starts),
            "INCREMENTS": INCREMENTS[increments],
            "TILE_B": 16,
            "BLOCK": 1024,
        },
        aligned=("table_ptr", "m", "stride_c", "stride_d", "stride_start"),
        warps=4,
        stages=3,
        registers=MOST_REGISTERS,
        oldest=FLOAT8_FROM if increments == "float8" else OLDEST,
    )


def _finish_compilation(masked: bool) -> Compilation:
    return Compilation(
        name=f"finish, {'adjoint' if masked else 'value'}",
        group="finish",
        function="ends:finish_kernel",
        types={
            "table_ptr": "*i64",
            "B": "i32",
            "m": "i32",
            "largest": "fp32",
        },
        constants={"HOMOGENEOUS": int(masked), "MASKED": int(masked), "BLOCK": 1024},
        aligned=("table_ptr", "m"),
        warps=4,
        stages=3,
    )
