"""Shapes that the kernels are compiled in, as data: what a plan chooses among and bench/resources.py compiles.

No torch and no Triton here, so that a plan can be made and tested anywhere.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Tiles:
    """A program computes ``samples`` x ``units`` of the output, ``depth`` of the inner dimension at a time, with so
    many warps and so many steps of ``depth`` in flight."""

    samples: int
    units: int
    depth: int
    warps: int
    stages: int

    @property
    def registers(self) -> int | None:
        """What a step by increments says that a thread may have: all of them with four warps, where the compiler else
        spills a few to seat one more block."""
        return MOST_REGISTERS if self.warps <= 4 else None

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

# Those of the cell, with more warps or narrower where the sums and the judgement of a step would spill.
STEP_TILES = (Tiles(128, 32, 32, 8, 3), Tiles(64, 64, 32, 8, 3), *TILES["tf32"][2:])
# Of steps by increments, one for each number of samples of STEP_TILES: they share rows of tiles with their anchors.
DELTA_TILES = {
    "bfloat16": (Tiles(128, 64, 64, 8, 3), Tiles(64, 64, 64, 8, 4), *TILES["bfloat16"][3:]),
    "float8": (
        Tiles(128, 64, 128, 8, 3),
        Tiles(64, 64, 128, 4, 4),
        Tiles(32, 64, 128, 4, 4),
        Tiles(16, 64, 256, 4, 3),
        Tiles(16, 32, 256, 4, 4),
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
