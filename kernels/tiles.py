"""Shapes that the kernels are compiled in, as data: what a plan chooses among and bench/resources.py compiles.

No torch and no Triton here, so that a plan can be made and tested anywhere.
"""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Tiles:
    """A program computes ``samples`` x ``units`` of the output, ``depth`` of the inner dimension at a time, with so
    many warps and so many steps of ``depth`` in flight. registers: that a thread may have at most, where the launch of
    a step says so; None leaves it to the compiler."""

    samples: int
    units: int
    depth: int
    warps: int
    stages: int
    registers: int | None = None

    def __str__(self) -> str:
        return f"{self.samples}x{self.units}x{self.depth}"


MOST_REGISTERS = 255  # of a thread, if a block has eight warps at most

DTYPES = ("float32", "float64", "bfloat16", "float16")
PRECISIONS = ("ieee", "tf32x3", "tf32")  # of float32

# Largest first; chosen by what they compile to, not yet timed. The variants that bench/resources.py lists spill nothing
# and fit into the 99 kB of shared memory that every GPU since Ampere has. Hopper's wgmma takes 64 rows or more. The
# smallest tiles read long pieces of W, so that few programs have enough bytes in flight.
_HALF = (
    Tiles(128, 128, 64, 8, 3),
    Tiles(64, 128, 64, 4, 3),
    Tiles(64, 64, 64, 4, 4),
    Tiles(32, 64, 64, 4, 4),
    Tiles(16, 64, 128, 4, 3),
    Tiles(16, 32, 128, 4, 4),
)
TILES = {
    "bfloat16": _HALF,
    "float16": _HALF,
    "float32": (
        Tiles(64, 64, 16, 8, 3),
        Tiles(32, 64, 16, 8, 4),
        Tiles(16, 64, 64, 4, 3),
        Tiles(16, 32, 64, 4, 4),
    ),
    "tf32": (  # float32 multiplied on tensor cores
        Tiles(128, 64, 32, 8, 3),
        Tiles(64, 64, 32, 4, 3),
        Tiles(32, 64, 16, 8, 4),
        Tiles(16, 64, 64, 4, 3),
        Tiles(16, 32, 64, 4, 4),
    ),
    "float64": (
        Tiles(64, 32, 32, 8, 2),
        Tiles(32, 32, 16, 4, 3),
        Tiles(16, 32, 16, 4, 4),
    ),
}
# About half of the processors of an A100 or H200 draw all that its L2 cache can give; more programs on smaller tiles
# would read W more often and wait for it.
ENOUGH_PROGRAMS = 64
# Rows that start at multiples of this many elements are read in pieces of 16 bytes. Others are read element by element:
# each needs an address in a register, and tiles of more rows would spill.
ALIGNMENT = 16
RAGGED_SAMPLES = 32


def cell_tiles(B: int, m: int, dtype: str, precision: str = "ieee") -> Tiles:
    """The cell's tiles for B samples of width m: the largest that waste no row on samples that are not there and still
    make :data:`ENOUGH_PROGRAMS` programs, else the smallest.

    dtype: of :data:`DTYPES`; precision: of :data:`PRECISIONS`, for float32. The tiles decide the order of the sums, so
    that the last bits of a sample may differ between batch sizes; they do not depend on its place in the batch.
    """
    most = max(16, padded_power(B))
    if m % ALIGNMENT:
        most = min(most, RAGGED_SAMPLES)
    ladder = TILES[dtype if precision == "ieee" else "tf32"]
    for tiles in ladder:
        if tiles.samples <= most and programs(B, m, tiles) >= ENOUGH_PROGRAMS:
            return tiles
    return ladder[-1]


def programs(B: int, m: int, tiles: Tiles) -> int:
    """How many tiles an output (B, m) has."""
    return -(-B // tiles.samples) * -(-m // tiles.units)


def padded_power(n: int) -> int:
    """The power of two from n on."""
    return 1 << max(0, n - 1).bit_length()


# ---- whole solves (kernels/iteration.py, kernels/solve_resident.py) -------------------------------------------------

# Timed on an H200, the anchors of a solve with float8 increments: 128x64x32 by four warps 7.9 ms at 4096 x 4096, by
# eight of 128 registers 8.0, 128x32x32 by eight of 128 10.7, and of the 184 that they like 14.5, as one block is then
# seated where two were; 64x32x64 108 us at 1024 x 256, 64x64x32 183. What does not fit into registers is spilt where
# samples are judged, once a kernel. Those of fewer samples are not timed.
STEP_TILES = (
    Tiles(128, 64, 32, 4, 3, MOST_REGISTERS),
    Tiles(64, 32, 64, 4, 3, 168),
    *(replace(tiles, registers=MOST_REGISTERS) for tiles in TILES["tf32"][2:]),
)
# Of steps by increments, one for each number of samples of STEP_TILES: they share rows of tiles with their anchors.
DELTA_TILES = {
    "bfloat16": (
        Tiles(128, 64, 64, 8, 3),
        Tiles(64, 64, 64, 8, 4),
        *(replace(tiles, registers=MOST_REGISTERS) for tiles in TILES["bfloat16"][3:]),
    ),
    "float8": (
        Tiles(128, 64, 128, 4, 3, MOST_REGISTERS),  # steps 4.1 ms; by eight warps 5.2, of 128 4.6
        Tiles(64, 32, 128, 4, 4, 128),  # 119 us, 171 at 2048 x 256; 64x64x128: 131, 159
        Tiles(32, 64, 128, 4, 4, MOST_REGISTERS),
        Tiles(16, 64, 256, 4, 3, MOST_REGISTERS),
        Tiles(16, 32, 256, 4, 4, MOST_REGISTERS),
    ),
}
OLDEST, FLOAT8_FROM = (8, 0), (8, 9)  # compute capabilities: of all kernels, of those with float8
MOST_SPLITS = 8
LEAST_STEPS = 4  # of the inner dimension, for each split


def step_tiles(B: int, m: int) -> tuple[Tiles, int]:
    """The tiles and splits of a step for B samples of width m: as :func:`cell_tiles`, and where they make too few
    programs, the inner dimension is split among up to :data:`MOST_SPLITS`; of the fewest samples only, since larger
    tiles make enough."""
    tiles = STEP_TILES[TILES["tf32"].index(cell_tiles(B, m, "float32", "tf32x3"))]
    splits = 1
    while (
        tiles.samples == STEP_TILES[-1].samples
        and splits < MOST_SPLITS
        and splits * programs(B, m, tiles) <= ENOUGH_PROGRAMS
    ):
        if -(-m // tiles.depth) < 2 * splits * LEAST_STEPS:
            break
        splits *= 2
    return tiles, splits
