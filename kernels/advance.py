"""After an evaluation the last program of a row of tiles judges its samples and says what happens to them next.

Every program has stored its share of the sums that samples are judged by; :func:`is_last` tells who arrived last, and
:func:`total_of` adds the shares in a fixed order, so that the same input gives the same bits.
"""

import triton
import triton.language as tl

from .anderson import entry, mixing_weights, ring
from .judge import CONVERGED, LIVE, judge
from .records import (
    BEFORE,
    BEST_AT,
    COUNTERS,
    DUE,
    FAILED,
    FLOAT8,
    GRAM,
    HELD,
    ITERATION,
    LIMIT,
    LISTS,
    LIVE_SAMPLES,
    MARKS,
    MOVED,
    NEXT_SCALE,
    NONE,
    ON_DEMAND,
    PLACE,
    RECORD,
    RESIDUAL,
    RING,
    RUN,
    SAVED,
    SCALE,
    STATUS,
    STEP,
    SUMS,
    UNIT,
    WEIGHTS,
    doubles,
    floats,
    ints,
    scale_of,
)


@triton.jit
def overwritten(place, turn, DEPTH: tl.constexpr):
    """Whether a turn writes to the PLACE."""
    return (place == (turn + 1) % 2) | (place == turn % DEPTH + RING)


@triton.jit
def is_last(arrived_ptr, programs):
    """Whether this program is the last of so many to get here; then it sees what the others stored before, if it loads
    past the first cache, and the counter is ready for the next time."""
    tl.debug_barrier()
    is_last = tl.atomic_add(arrived_ptr, 1, sem="acq_rel") == programs - 1
    if is_last:
        tl.store(arrived_ptr, 0)
    return is_last


@triton.jit
def total_of(sums_ptr, tiles_n, B, b, mask, SLOTS: tl.constexpr):
    """The sum over tiles of one field of SUMS for the samples b (n,), always in the same order."""
    total = tl.zeros(b.shape, tl.float32)
    first = 0
    while first < tiles_n:
        slot = (first + tl.arange(0, SLOTS))[None, :]
        inside = mask[:, None] & (slot < tiles_n)
        parts = tl.load(sums_ptr + slot.to(tl.int64) * B + b[:, None], mask=inside, other=0.0, cache_modifier=".cg")
        total += tl.sum(parts, axis=1)
        first += SLOTS
    return total


@triton.jit
def advance(
    table_ptr,
    turn,
    B,
    tile_b,
    tiles_n,
    b,
    live,
    tol,
    leave,
    max_iter,
    patience,
    HOMOGENEOUS: tl.constexpr,
    ACCELERATION: tl.constexpr,
    DEPTH: tl.constexpr,
    CRITERION: tl.constexpr,
    INCREMENTS: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """Judge the evaluation of the live samples b (n,) of a row of tiles, and say what happens to them next."""
    record = floats(table_ptr, RECORD) + b
    marks = ints(table_ptr, MARKS) + b
    sums = floats(table_ptr, SUMS)
    field = (tile_b.to(tl.int64) * 0 + tiles_n) * B
    step = tl.sqrt(total_of(sums, tiles_n, B, b, live, SLOTS))
    size = tl.sqrt(total_of(sums + field, tiles_n, B, b, live, SLOTS))
    k = tl.load(marks + ITERATION * B, mask=live, other=0) + 1
    previous = tl.load(record + STEP * B, mask=live, other=1.0)
    before = tl.load(record + BEFORE * B, mask=live, other=1.0)
    best = tl.load(record + RESIDUAL * B, mask=live, other=1.0)
    best_at = tl.load(marks + BEST_AT * B, mask=live, other=0)
    limit = tl.load(record + LIMIT * B, mask=live, other=1.0)
    place = tl.load(marks + PLACE * B, mask=live, other=0)
    held = tl.load(marks + HELD * B, mask=live, other=0)
    status, better, best, best_at, limit, slow = judge(
        step, size, k, previous, before, best, best_at, limit, tol, leave, max_iter, patience, CRITERION
    )
    here = tl.where(held > 0, turn % DEPTH + RING, (turn + 1) % 2)
    place = tl.where(better, here, tl.where(overwritten(place, turn, DEPTH), SAVED, place))
    goes_on = live & (status == LIVE)
    if ACCELERATION != NONE:
        mixes = goes_on & (held > 0)
        if tl.max(mixes.to(tl.int32)) > 0:
            newest = turn % DEPTH
            gram = doubles(table_ptr, GRAM) + b
            for r in tl.static_range(DEPTH):
                dots = total_of(sums + (2 + r) * field, tiles_n, B, b, mixes, SLOTS)
                present = mixes & ((newest + DEPTH - r) % DEPTH < held)
                tl.store(gram + entry(newest, r, DEPTH) * B, dots.to(tl.float64), mask=present)
            tl.debug_barrier()
            weights = mixing_weights(gram, B, mixes, held, newest, DEPTH)
            for i in tl.static_range(DEPTH):
                slot = floats(table_ptr, WEIGHTS) + ring(newest, i, DEPTH) * B + b
                tl.store(slot, weights[i].to(tl.float32), mask=mixes)
        held = tl.where(mixes, tl.minimum(held + 1, DEPTH), held)
        if ACCELERATION == ON_DEMAND:
            held = tl.where((held == 0) & slow, 1, held)
        tl.store(marks + HELD * B, held, mask=live)
    if INCREMENTS:
        if INCREMENTS == FLOAT8:
            advance_scales(record, B, step, HOMOGENEOUS, live, live)
        tl.store(record + MOVED * B, step, mask=live)
        tl.store(marks + RUN * B, 0, mask=live)
        tl.store(marks + DUE * B, (held > 0).to(tl.int32), mask=live)  # an accelerated one goes from anchor to anchor
    tl.store(record + STEP * B, step, mask=live)
    tl.store(record + BEFORE * B, previous, mask=live)
    tl.store(record + RESIDUAL * B, best, mask=live)
    tl.store(record + LIMIT * B, limit, mask=live)
    tl.store(marks + STATUS * B, status, mask=live)
    tl.store(marks + ITERATION * B, k, mask=live)
    tl.store(marks + BEST_AT * B, best_at, mask=live)
    tl.store(marks + PLACE * B, place, mask=live)
    left = tl.sum((live & (status != LIVE)).to(tl.int32))
    if left > 0:
        counters = ints(table_ptr, COUNTERS)
        tl.atomic_add(counters + LISTS + tile_b, -left)
        tl.atomic_add(counters + LIVE_SAMPLES, -left)
        tl.atomic_add(counters + FAILED, tl.sum((live & (status != LIVE) & (status != CONVERGED)).to(tl.int32)))


@triton.jit
def advance_scales(record, B, step, HOMOGENEOUS: tl.constexpr, read, written):
    """After an evaluation whose step has the norm ``step``, as judged: where ``read``, what it wrote is read next; the
    unit of what is ``written`` after it is known."""
    if not HOMOGENEOUS:
        step = step * (1.0 / tl.load(record + UNIT * B, mask=written, other=1.0))
    scale = tl.load(record + NEXT_SCALE * B, mask=read, other=1.0)
    tl.store(record + SCALE * B, scale, mask=read)
    tl.store(record + NEXT_SCALE * B, scale_of(step), mask=written)
