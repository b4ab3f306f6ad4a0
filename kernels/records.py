"""Where the kernels of an iteration find their tensors, and what they know of every sample.

Kernels take one table of addresses instead of a dozen pointers, so that a captured graph of them serves every solve of
its shape: ``bind_kernel`` writes the table. Its entries, and the layout of the records, are the constants below.
"""

import triton
import triton.language as tl

ENDINGS = {"value": 0, "adjoint": 1, "reflected": 2, "reflected adjoint": 3}
VALUE, ADJOINT, REFLECTED, REFLECTED_ADJOINT = (tl.constexpr(n) for n in range(4))
ACCELERATIONS = {"none": 0, "anderson": 1, "on_demand": 2}
NONE, ANDERSON, ON_DEMAND = (tl.constexpr(n) for n in range(3))

# The table of addresses (int64). W (m, m), C and D (B, m): weight, injection and mask; FRONT, BACK, BEST (B, m): two
# buffers and the best iterates saved; VALUES, RESIDUALS (DEPTH, B, m): the windows f(y) and f(y) - y; GRAM (DEPTH^2, B)
# float64; WEIGHTS (DEPTH, B) by ring position; PARTS (SPLITS, B, m); SUMS (2 + DEPTH, tiles, B); RECORD; MARKS int32;
# COUNTERS int32. With increments LOW (m, m) bfloat16, the W of their steps; Y, X (B, m): the iterate and its W y + c;
# EVEN, ODD (B, m) bfloat16: increments. All float32 but those.
TABLE = ("W", "C", "D", "FRONT", "BACK", "BEST", "VALUES", "RESIDUALS", "GRAM", "WEIGHTS", "PARTS", "SUMS", "RECORD")
TABLE += ("MARKS", "COUNTERS", "LOW", "Y", "X", "EVEN", "ODD")
W, C, D, FRONT, BACK, BEST, VALUES, RESIDUALS, GRAM, WEIGHTS, PARTS, SUMS, RECORD, MARKS, COUNTERS = (
    tl.constexpr(n) for n in range(15)
)
LOW, Y, X, EVEN, ODD = (tl.constexpr(n) for n in range(15, 20))
# Fields of RECORD (6, B): the last two steps, the smallest residual, the limit of divergence (before the first
# evaluation the norm of the start), the power of two that a sample is judged in, homogeneous ones also solved in, and
# the sum of the steps since the last anchor.
STEP, BEFORE, RESIDUAL, LIMIT, UNIT, MOVED = (tl.constexpr(n) for n in range(6))
RECORDS = 6
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
NEAR = tl.constexpr(2.0**20)  # magnitudes between 1 / NEAR and NEAR are left as they are


@triton.jit
def floats(table_ptr, which):
    return tl.multiple_of(tl.load(table_ptr + which).to(tl.pointer_type(tl.float32)), 16)


@triton.jit
def doubles(table_ptr, which):
    return tl.load(table_ptr + which).to(tl.pointer_type(tl.float64))


@triton.jit
def halves(table_ptr, which):
    return tl.multiple_of(tl.load(table_ptr + which).to(tl.pointer_type(tl.bfloat16)), 16)


@triton.jit
def ints(table_ptr, which):
    return tl.load(table_ptr + which).to(tl.pointer_type(tl.int32))


@triton.jit
def unit_of(largest):
    """The power of two that takes ``largest`` (float32, finite) near 1; 1 where it is near enough, or 0."""
    exponent = ((largest.to(tl.int32, bitcast=True) >> 23) & 0xFF) - 127
    exponent = tl.minimum(tl.maximum(-exponent, -126), 126)
    power = ((exponent + 127) << 23).to(tl.float32, bitcast=True)
    far = (largest > 0) & ((largest > NEAR) | (largest < 1.0 / NEAR))
    return tl.where(far, power, 1.0)


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
):
    """Fill the table, in the order of TABLE. Launched and not copied, so that no later solve can overtake it."""
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
