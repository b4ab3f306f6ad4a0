"""Where the kernels of an iteration find their tensors, and what they know of every sample.

Kernels take one table of addresses instead of a dozen pointers, so that a captured graph of them serves every solve of
its shape: the table is written before. Its entries, and the layout of the records, are the constants below.
"""

import triton
import triton.language as tl

ENDINGS = {"value": 0, "adjoint": 1, "reflected": 2, "reflected adjoint": 3}
VALUE, ADJOINT, REFLECTED, REFLECTED_ADJOINT = (tl.constexpr(n) for n in range(4))
ACCELERATIONS = {"none": 0, "anderson": 1, "on_demand": 2}
NONE, ANDERSON, ON_DEMAND = (tl.constexpr(n) for n in range(3))
INCREMENTS = {
    "native": 0,
    "bfloat16": 1,
    "float8": 2,
}  # what steps between anchors multiply (delta.py); native: no such
NATIVE, BFLOAT16, FLOAT8 = (tl.constexpr(n) for n in range(3))

# The table of addresses (int64). W (m, m), C and D (B, m): weight, injection and mask; FRONT, BACK, BEST (B, m): two
# buffers and the best iterates saved; VALUES, RESIDUALS (DEPTH, B, m): the windows f(y) and f(y) - y; GRAM (DEPTH^2, B)
# float64; WEIGHTS (DEPTH, B) by ring position; PARTS (SPLITS, B, m); SUMS (2 + DEPTH, tiles, B); RECORD; MARKS int32;
# COUNTERS int32. With increments LOW (m, m), the W of their steps; Y, X (B, m): the iterate and its W y + c; EVEN, ODD
# (B, m): increments, like LOW in bfloat16 or float8 (e4m3), for which ROW_SCALES (m,) are the units of the rows of LOW.
# START (B, m) of the caller; OUT (B, m), OUT_RESIDUAL (B,), OUT_ITERATIONS (B,) int32 and OUT_STATUS (B,) uint8: handed
# out. These five may begin anywhere, all others are aligned to 16 bytes. All float32 but those.
TABLE = ("W", "C", "D", "FRONT", "BACK", "BEST", "VALUES", "RESIDUALS", "GRAM", "WEIGHTS", "PARTS", "SUMS", "RECORD")
TABLE += ("MARKS", "COUNTERS", "LOW", "Y", "X", "EVEN", "ODD", "ROW_SCALES")
TABLE += ("START", "OUT", "OUT_RESIDUAL", "OUT_ITERATIONS", "OUT_STATUS")
W, C, D, FRONT, BACK, BEST, VALUES, RESIDUALS, GRAM, WEIGHTS, PARTS, SUMS, RECORD, MARKS, COUNTERS = (
    tl.constexpr(n) for n in range(15)
)
LOW, Y, X, EVEN, ODD, ROW_SCALES = (tl.constexpr(n) for n in range(15, 21))
START, OUT, OUT_RESIDUAL, OUT_ITERATIONS, OUT_STATUS = (tl.constexpr(n) for n in range(21, 26))
# Fields of RECORD (8, B): the last two steps, the smallest residual, the limit of divergence (before the first
# evaluation the norm of the start), the power of two that a sample is judged in, homogeneous ones also solved in, and
# the sum of the steps since the last anchor; the units of the float8 increment to be read next and of the one to be
# written.
STEP, BEFORE, RESIDUAL, LIMIT, UNIT, MOVED, SCALE, NEXT_SCALE = (tl.constexpr(n) for n in range(8))
RECORDS = 8
# Fields of MARKS (7, B). PLACE of the best iterate: 0 FRONT, 1 BACK, 2 BEST, 3 + r ring position r. HELD: 0 where not
# accelerated, else the pairs in the window, the one that the next step adds included. RUN: steps since the last anchor;
# DUE: whether the next evaluation must be one.
STATUS, ITERATION, BEST_AT, PLACE, HELD, RUN, DUE = (tl.constexpr(n) for n in range(7))
MARKINGS = 7
SAVED, RING = tl.constexpr(2), tl.constexpr(3)
# COUNTERS: samples not done; samples that failed; B less the index of the first sample whose injection is not finite,
# and of the first whose start is not, 0 for none; from LISTS on, the samples not done of every row of tiles, the tiles
# of it that have arrived, then the splits of every tile that have.
LIVE_SAMPLES, FAILED, BAD_INJECTION, BAD_START = (tl.constexpr(n) for n in range(4))
HEADER = 4
LISTS = tl.constexpr(HEADER)
FLOAT8_MOST = tl.constexpr(448.0)
NEAR = tl.constexpr(2.0**20)  # magnitudes between 1 / NEAR and NEAR are left as they are
FAR_EXPONENT, FAR = tl.constexpr(32), tl.constexpr(2.0**32)  # a start that far from an injection has no digit of it


@triton.jit
def floats(table_ptr, which):
    return tl.multiple_of(tl.load(table_ptr + which).to(tl.pointer_type(tl.float32)), 16)


@triton.jit
def of_caller(table_ptr, which):
    """START, OUT and OUT_RESIDUAL."""
    return tl.load(table_ptr + which).to(tl.pointer_type(tl.float32))


@triton.jit
def doubles(table_ptr, which):
    return tl.load(table_ptr + which).to(tl.pointer_type(tl.float64))


@triton.jit
def lows(table_ptr, which, INCREMENTS: tl.constexpr):
    """LOW, EVEN and ODD."""
    if INCREMENTS == FLOAT8:
        return tl.multiple_of(tl.load(table_ptr + which).to(tl.pointer_type(tl.float8e4nv)), 16)
    else:
        return tl.multiple_of(tl.load(table_ptr + which).to(tl.pointer_type(tl.bfloat16)), 16)


@triton.jit
def ints(table_ptr, which):
    return tl.load(table_ptr + which).to(tl.pointer_type(tl.int32))


@triton.jit
def exponent_of(x):
    """floor(log2(x)) of float32 x > 0; -127 for subnormals."""
    return ((x.to(tl.int32, bitcast=True) >> 23) & 0xFF) - 127


@triton.jit
def power_of_two(exponent):
    """Float32; the exponent is held within what it and its inverse have."""
    exponent = tl.minimum(tl.maximum(exponent, -126), 126)
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def unit_of(largest):
    """The power of two that takes ``largest`` (float32, finite) near 1; 1 where it is near enough, or 0."""
    far = (largest > 0) & ((largest > NEAR) | (largest < 1.0 / NEAR))
    return tl.where(far, power_of_two(-exponent_of(largest)), 1.0)


@triton.jit
def near_start(c, value, start, HOMOGENEOUS: tl.constexpr):
    """The power of two that a start is multiplied by, and what the unit is of; from the largest magnitudes of the
    injection, of f(0) and of the start. Beside a larger start squares of the last steps would leave float32 below, and
    pass for none. So far from the injection f of 2^-k times a start is 2^-k times its f."""
    least = tl.maximum(c, value)
    if not HOMOGENEOUS:  # where it bends
        least = tl.maximum(least, 1.0)
    exponent = exponent_of(start) - exponent_of(least) - FAR_EXPONENT
    nearer = tl.where((least > 0) & (exponent > 0), power_of_two(-exponent), 1.0)
    start = start * nearer
    beside = (value > 0) & (start > value * NEAR)
    low = tl.where(beside, start * (1.0 / FAR), start)
    return nearer, tl.maximum(value, low)


@triton.jit
def scale_of(size):
    """The unit of a float8 increment, from the 2-norm of the one before it or a bound of its elements: in it they are
    below 64, so that e4m3, which ends at 448 and resolves 2^-9, has room on both sides. What it cuts off all the same
    is in the next increment."""
    return power_of_two(exponent_of(size) - 5)


@triton.jit
def rounded(step, scale, INCREMENTS: tl.constexpr):
    """The increment (n, k) as it is kept; scale (n,), of float8."""
    if INCREMENTS == FLOAT8:
        held = step * (1.0 / scale)[:, None]
        return tl.minimum(tl.maximum(held, -FLOAT8_MOST), FLOAT8_MOST).to(tl.float8e4nv)
    else:
        return step.to(tl.bfloat16)


@triton.jit(do_not_specialize=[f"address_{n}" for n in range(len(TABLE))])
def bind_kernel(
    table_ptr,
    address_0,
    address_1,
    address_2,
    address_3,
    address_4,
    address_5,
    address_6,
    address_7,
    address_8,
    address_9,
    address_10,
    address_11,
    address_12,
    address_13,
    address_14,
    address_15,
    address_16,
    address_17,
    address_18,
    address_19,
    address_20,
    address_21,
    address_22,
    address_23,
    address_24,
    address_25,
):
    """Fill the table, in the order of TABLE, inside of a capture: the graph then needs no memory of the host."""
    tl.store(table_ptr + 0, address_0)
    tl.store(table_ptr + 1, address_1)
    tl.store(table_ptr + 2, address_2)
    tl.store(table_ptr + 3, address_3)
    tl.store(table_ptr + 4, address_4)
    tl.store(table_ptr + 5, address_5)
    tl.store(table_ptr + 6, address_6)
    tl.store(table_ptr + 7, address_7)
    tl.store(table_ptr + 8, address_8)
    tl.store(table_ptr + 9, address_9)
    tl.store(table_ptr + 10, address_10)
    tl.store(table_ptr + 11, address_11)
    tl.store(table_ptr + 12, address_12)
    tl.store(table_ptr + 13, address_13)
    tl.store(table_ptr + 14, address_14)
    tl.store(table_ptr + 15, address_15)
    tl.store(table_ptr + 16, address_16)
    tl.store(table_ptr + 17, address_17)
    tl.store(table_ptr + 18, address_18)
    tl.store(table_ptr + 19, address_19)
    tl.store(table_ptr + 20, address_20)
    tl.store(table_ptr + 21, address_21)
    tl.store(table_ptr + 22, address_22)
    tl.store(table_ptr + 23, address_23)
    tl.store(table_ptr + 24, address_24)
    tl.store(table_ptr + 25, address_25)
