"""How long an iteration of a solve takes on a GPU, by formulas: capacities and expected times of every regime.

A time is counted from the constants of the device (deq/gpu_device.py): bytes over bandwidths, products over rates,
launches and barriers, and from what solves on an H200 took beyond that. It is that of one iteration of the whole batch;
that samples leave is not counted. What the regimes are is told in deq/gpu_plan.py, which chooses among them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import ceil
from typing import NamedTuple

from .cuda_capacity import GRID_KERNELS, block_kernel, grid_kernel
from .gpu_device import Device
from .kernels.tiles import DELTA_TILES, FLOAT8_FROM, Tiles, cell_tiles, padded_power, step_tiles

ITERATIONS = 20  # of the solve whose time decides: what loading W on chip costs is spread over as many
# Iterations of which about one is an anchor, where increments are multiplied in a lower precision. Simulated for
# Gaussian W of norms 0.9, 1.4 and 1.8: 4.7, 6.7 and 9.7 with bfloat16, 4.7, 5.4 and 7.8 with float8.
ANCHOR_EVERY = {"bfloat16": 6, "float16": 6, "float8": 5}

# Of a resident program: the widest W in 16 bits, the widest in float32, and its samples; more of any of them spill.
TRITON_WIDEST, TRITON_WHOLE, TRITON_SAMPLES = 256, 64, 16
TRITON_WARPS = {16: 4, 32: 4, 64: 8, 128: 8, 256: 8}  # by the padded width; each thread takes all the registers it may
WARP_REGISTERS = {"resident": 32 * 256 * 4, "resident cuda": 32 * 168 * 4}  # bytes
L2_BYTES_PER_CLOCK = 64  # that one multiprocessor can read
CUDA_PAD, CUDA_SAMPLES = 16, 8  # of mma.sync: W is padded to multiples of 16, samples come by 8
# What is not bytes and products, from whole solves of 13 to 16 iterations on an H200 (tests/test_gpu_plan.py has them).
# Of an iteration, the latency of what depends on each other: states, sums, judgement; of a streamed one, that of every
# unit of the inner dimension too, where operands are split between two products; on the grid, that of every block of a
# group and of every element of a block.
LATENCY = {"resident": 1.3e-6, "resident cuda": 2.6e-6, "grid": 1.8e-6, "cell": 8e-6}
DEPTH_LATENCY = {"tf32x3": 19e-9}
LEAST_DEPTH_LATENCY = 1.5e-9
GRID_BLOCK_LATENCY, GRID_ELEMENT_LATENCY = 27e-9, 2.4e-9
# So many times the shared memory's own time for reading W: Triton's programs wait for every piece.
READ_SLOWDOWN = {"resident": 11.0, "resident cuda": 1.0}
# An anchor on chip streams W with few loads under way: so many times what the multiprocessor could read. On the grid it
# begins with a barrier, and of reading W once for eight samples so much is not hidden.
ANCHOR_SLOWDOWN = {"resident": 3.8, "resident cuda": 4.6}
GRID_ANCHOR, GRID_ANCHOR_READ, GRID_ANCHORED = 3.5e-6, 0.39, 8
# Of the library's rate, what the kernel of an iteration reaches at 4096 x 4096: anchors 52 TFLOP/s, float8 305. That of
# bfloat16 is not measured; were it 0.4, as without the rest of the step, it would be chosen before float8.
FUSED_SHARE = {"tf32x3": 0.4, "float8": 0.21, "bfloat16": 0.25, "float16": 0.25}
# Operators of torch that take the host as long as the clock shows beyond the device: solves on the H200 took 36 to 51
# us more by the CUDA kernels, 200 to 240 by a Triton kernel, 280 to 380 streamed.
HOST_OPERATORS = {"resident": 29, "resident cuda": 6, "grid": 6, "cell": 43}


@dataclass(frozen=True)
class Precision:
    """How W is kept and multiplied: bytes of an element, tensor core products for one product, and their rate."""

    size: int
    products: int
    rate: str

    def of(self, device: Device) -> float | None:
        """FLOP/s of the whole device in products that were asked for; None where it has no such units."""
        whole = getattr(device, self.rate)
        return None if whole is None else whole / self.products

    def of_processor(self, device: Device) -> float:
        """The same of one multiprocessor by mma.sync, which the on-chip regimes use."""
        peak = device.tensor_flops_per_clock * device.clock
        return device.mma_share * peak * self.of(device) / device.matmul_bfloat16


PRECISIONS = {
    "float8": Precision(1, 1, "matmul_float8"),
    "bfloat16": Precision(2, 1, "matmul_bfloat16"),
    "float16": Precision(2, 1, "matmul_bfloat16"),
    "tf32": Precision(4, 1, "matmul_tf32"),
    "tf32x3": Precision(4, 3, "matmul_tf32"),
    "ieee": Precision(4, 1, "matmul_float32"),
    "float64": Precision(8, 1, "matmul_float64"),
}


# ---- capacity: the largest width, and the tiles of a width that fits ------------------------------------------------


def resident_tiles(m: int, B: int, device: Device, size: int) -> Tiles | None:
    """Regime "resident" in Triton: W padded to a power of two and two buffers of states in one block's shared memory.
    None where that does not fit."""
    p = max(16, padded_power(m))
    widest = TRITON_WIDEST if size <= 2 else TRITON_WHOLE
    if p > widest or resident_shared(p, size) > device.shared_per_block:
        return None
    return Tiles(TRITON_SAMPLES, p, p, TRITON_WARPS[p], 1)


def resident_shared(p: int, size: int) -> int:
    """Bytes of shared memory that a resident program needs at most: W (p, p) and two buffers (p, samples)."""
    return p * p * size + 2 * TRITON_SAMPLES * p * size


def resident_cuda_tiles(m: int, B: int, device: Device, size: int) -> Tiles | None:
    """The same in CUDA, in bfloat16, where W is padded to a multiple of 16 only: m <= 336 with 227 KiB."""
    if size != 2 or block_kernel(m, device.shared_per_block) is None:
        return None
    p = ceil(m / CUDA_PAD) * CUDA_PAD
    return Tiles(CUDA_SAMPLES, p, p, min(8, p // CUDA_PAD + 1), 1)


def grid_tiles(m: int, B: int, device: Device, size: int) -> Tiles | None:
    """Regime "grid": multiprocessors keep equal parts of the rows, in shared memory and registers."""
    kernel = grid_kernel(m, B, device.processors, device.shared_per_block) if size == 2 else None
    if kernel is None:
        return None
    rows, columns, _ = GRID_KERNELS[kernel]
    return Tiles(columns * CUDA_SAMPLES, rows * CUDA_PAD, m, 8, 1)


class Groups(NamedTuple):
    """Regime "grid": how many groups of so many blocks hold a W each, the samples that one of them solves at once, and
    how often it does."""

    count: int
    blocks: int
    samples: int
    turns: int


def groups_of(m: int, B: int, device: Device, tiles: Tiles) -> Groups:
    """Those of a batch."""
    blocks = ceil(m / tiles.units)
    count = min(device.processors // blocks, max(1, B))
    each = ceil(max(1, B) / count)
    return Groups(count, blocks, min(tiles.samples, each), ceil(each / tiles.samples))


# ---- expected seconds of one iteration of the whole batch ------------------------------------------------------------


def resident_time(m: int, B: int, device: Device, precision: Precision, tiles: Tiles, regime: str) -> float:
    """Every program reads W from shared memory and multiplies its samples; two sums over the block judge them. Programs
    that share a multiprocessor share its rates and hide each other's waits."""
    weight = tiles.units * tiles.depth
    read = READ_SLOWDOWN[regime] * precision.size * weight / device.shared_bandwidth
    multiply = 2 * weight * tiles.samples / precision.of_processor(device)
    together, waves = _residents(B, device, precision, tiles, regime)
    return waves * (together * max(read, multiply) + 2 * device.block_reduction + LATENCY[regime])


def _residents(B: int, device: Device, precision: Precision, tiles: Tiles, regime: str) -> tuple[int, int]:
    """Programs that a multiprocessor runs together, by its shared memory and registers, and how often it does."""
    by_shared = device.shared_per_block // (precision.size * tiles.units * (tiles.depth + 2 * tiles.samples))
    by_registers = device.registers_per_processor // (tiles.warps * WARP_REGISTERS[regime])
    most, each = max(1, min(by_shared, by_registers)), max(1, ceil(ceil(B / tiles.samples) / device.processors))
    return min(most, each), ceil(each / most)


def grid_time(m: int, B: int, device: Device, precision: Precision, tiles: Tiles) -> float:
    """Every multiprocessor reads and multiplies its rows of W, and all states of its group come through L2; samples
    that find no slot wait for those that do."""
    groups, weight = groups_of(m, B, device, tiles), tiles.units * m
    read = precision.size * weight / device.shared_bandwidth
    multiply = 2 * weight * tiles.samples / precision.of_processor(device)
    states = groups.count * groups.blocks * m * tiles.samples * precision.size / device.l2
    barrier = device.grid_barrier * groups.blocks / device.processors
    waits = GRID_BLOCK_LATENCY * groups.blocks + GRID_ELEMENT_LATENCY * tiles.units * tiles.samples
    return groups.turns * (max(read, multiply) + states + barrier + device.block_reduction + LATENCY["grid"] + waits)


def cell_time(m: int, B: int, device: Device, precision: Precision, share: float = 1.0) -> float:
    """One kernel: W from L2 or memory or the products, whichever takes longer; z, c and the output; a launch. share: of
    the library's rate that the products are made at."""
    weight = precision.size * m * m
    bandwidth = device.l2 if weight < device.l2_bytes else device.copy
    body = max(weight / bandwidth, 2 * m * m * B / (share * precision.of(device)))
    return body + device.graph_kernel + 3 * m * B * precision.size / device.l2


def fused_time(m: int, B: int, device: Device, precision: str) -> float:
    """The kernel of an iteration in regime "cell"."""
    latency = LATENCY["cell"] + DEPTH_LATENCY.get(precision, LEAST_DEPTH_LATENCY) * m
    return cell_time(m, B, device, PRECISIONS[precision], FUSED_SHARE.get(precision, 1.0)) + latency


def anchor_time(regime: str, m: int, B: int, device: Device, precision: str, tiles: Tiles) -> float:
    """What forming y in full precision takes, for which W is streamed, in "resident" by every block."""
    if regime == "cell":
        return fused_time(m, B, device, precision)
    kind = PRECISIONS[precision]
    if regime == "grid":
        return _grid_anchor_time(m, B, device, kind, tiles)
    weight, blocks = kind.size * m * m, ceil(B / tiles.samples)
    alone = ANCHOR_SLOWDOWN[regime] * weight / (L2_BYTES_PER_CLOCK * device.clock)
    return max(alone * max(1, ceil(blocks / device.processors)), blocks * weight / device.l2)


def _grid_anchor_time(m: int, B: int, device: Device, kind: Precision, tiles: Tiles) -> float:
    """Every group reads W, so many times as there are eights of samples that are anchored in the same iteration."""
    groups, weight = groups_of(m, B, device, tiles), kind.size * m * m
    read = weight / device.copy if weight > device.l2_bytes else groups.count * weight / device.l2
    read = max(read, kind.size * tiles.units * m / (L2_BYTES_PER_CLOCK * device.clock))
    anchored = groups.samples / ANCHOR_EVERY["bfloat16"] / anchored_share("grid", m, B, device, tiles, "bfloat16")
    return groups.turns * (GRID_ANCHOR + GRID_ANCHOR_READ * read * max(1, anchored / GRID_ANCHORED))


def anchored_share(regime: str, m: int, B: int, device: Device, tiles: Tiles, increments: str) -> float:
    """Of the iterations, those in which an anchor is among them: one in so many of a sample's, and on chip whatever the
    samples that are solved together need, since each has its own."""
    share = 1 / ANCHOR_EVERY[increments]
    if regime == "cell":
        return share
    if regime == "grid":
        together = groups_of(m, B, device, tiles).samples
    else:  # Triton's programs are filled one after the other, CUDA's blocks all at once
        together = min(tiles.samples, ceil(B / device.processors) if regime == "resident cuda" else B)
    return 1 - (1 - share) ** max(1, together)


def loop_time(m: int, B: int, device: Device, graphed: bool, precision: str = "bfloat16") -> float:
    """What an iteration takes without fused kernels: a library product, then addition, activation, difference and two
    norms; captured in a graph, or launched from Python with one ``.item()``."""
    size = PRECISIONS[precision].size
    pointwise = 4 * (device.graph_kernel + 3 * m * B * size / device.l2)
    graph = cell_time(m, B, device, PRECISIONS[precision]) + pointwise
    return graph if graphed else max(graph, 7 * device.eager_op) + device.item


def tiles_of(regime: str, m: int, B: int, device: Device, precision: str) -> Tiles | None:
    """Those of one program, with W kept and multiplied in ``precision``; None where the regime cannot hold it."""
    if regime != "cell":
        return ON_CHIP[regime][0](m, B, device, PRECISIONS[precision].size)
    if precision == "tf32x3":
        return step_tiles(B, m)[0]
    if PRECISIONS[precision].size >= 4:
        return cell_tiles(B, m, *(("float64",) if precision == "float64" else ("float32", precision)))
    samples = cell_tiles(B, m, "bfloat16").samples
    ladder = DELTA_TILES.get(precision, DELTA_TILES["bfloat16"])
    return next(tiles for tiles in ladder if tiles.samples == samples)


def time_of(regime: str, m: int, B: int, device: Device, precision: str) -> float | None:
    """Seconds of one iteration with W kept and multiplied in ``precision``; None where the regime cannot hold it or the
    device cannot multiply so."""
    kind, tiles = PRECISIONS[precision], tiles_of(regime, m, B, device, precision)
    if kind.of(device) is None or tiles is None:
        return None
    return fused_time(m, B, device, precision) if regime == "cell" else ON_CHIP[regime][1](m, B, device, kind, tiles)


def loading_time(regime: str, m: int, B: int, device: Device, precision: str) -> float:
    """Seconds until W is on chip: from memory once, and through L2 into every block that keeps all of it."""
    if regime == "cell":
        return 0.0
    weight = PRECISIONS[precision].size * m * m
    tiles = tiles_of(regime, m, B, device, precision)
    blocks = groups_of(m, B, device, tiles).count if regime == "grid" else ceil(B / tiles.samples)
    return weight / device.copy + min(device.processors, blocks) * weight / device.l2


ON_CHIP: dict[str, tuple[Callable[..., Tiles | None], Callable[..., float]]] = {
    "resident": (resident_tiles, partial(resident_time, regime="resident")),
    "resident cuda": (resident_cuda_tiles, partial(resident_time, regime="resident cuda")),
    "grid": (grid_tiles, grid_time),
}
REGIMES = (*ON_CHIP, "cell")


@dataclass(frozen=True)
class Expected:
    """Seconds of one iteration of the whole batch, and of a solve of :data:`ITERATIONS` of them, host included."""

    regime: str
    precision: str
    increments: str
    iteration: float
    solve: float


def expected(
    regime: str, m: int, B: int, device: Device, precision: str, increments: str = "native"
) -> Expected | None:
    """With increments an iteration is the mean over them and the anchors in ``precision``. None where that cannot run,
    and where the chip holds W in ``precision`` itself, which leaves increments nothing to save. Only the streamed cell
    has kernels for float8: on chip it would save half of a read that is less than the anchors cost."""
    if increments == "float8" and (regime != "cell" or device.capability < FLOAT8_FROM):
        return None
    kept = precision if increments == "native" else increments
    iteration = time_of(regime, m, B, device, kept)
    if iteration is None or PRECISIONS[precision].of(device) is None:
        return None
    if increments != "native":
        if regime == "resident" and time_of(regime, m, B, device, precision) is not None:
            return None
        tiles = tiles_of(regime, m, B, device, kept)
        anchor = anchor_time(regime, m, B, device, precision, tiles)
        if regime == "cell":  # in place of a step; on chip the rest of a step goes on
            anchor -= iteration
        iteration += anchor * anchored_share(regime, m, B, device, tiles, increments)
    solve = device.graph_launch + loading_time(regime, m, B, device, kept) + ITERATIONS * iteration
    solve += HOST_OPERATORS[regime] * device.eager_op
    return Expected(regime, precision, increments, iteration, solve)
