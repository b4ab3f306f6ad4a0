"""What the CUDA kernels hold on the chip: csrc/cuda/capacity.h in Python, for plans made without the library.

W is rounded to bfloat16 and cut into tiles of 16 x 16. tests/test_cuda_capacity.py holds the two languages together.
"""

TILE, TILE_BYTES, INCREMENT_BYTES = 16, 512, 256  # a fragment of W, and one of the increments of eight samples
SLOTS = 8  # samples that one column tile of a product holds
SLOT_BYTES = 280 + 136 + 48  # Mixture, SlotControl and Action
NORMS_BYTES = 7 * 8  # of one slot and warp
ORDERS_BYTES = 16  # of a warp that judges
PLACES_BYTES = 64  # where the blocks of the grid exchange
JUDGES = 4  # such warps of a block of the grid

# (tiles of a warp, k-steps held in registers, warps that multiply at most)
BLOCK_KERNELS = ((1, 0, 8), (2, 0, 10), (2, 2, 11))
# (tiles of a block, eights of slots, k-steps of a warp held in registers)
GRID_KERNELS = ((1, 1, 0), (2, 4, 0), (4, 4, 0), (2, 1, 7))
GRID_WARPS = 8


def block_kernel(width: int, shared: int) -> int | None:
    """The kernel whose block holds W in ``shared`` bytes and in registers, None if none does."""
    tiles = -(-width // TILE)
    for i, (rows, held, most) in enumerate(BLOCK_KERNELS):
        warps = -(-tiles // rows)
        weights = tiles * (tiles - held) * TILE_BYTES
        states = tiles * INCREMENT_BYTES + warps * SLOTS * NORMS_BYTES + SLOTS * SLOT_BYTES + ORDERS_BYTES
        if tiles > held and warps <= most and weights + states <= shared:
            return i
    return None


def possible_groups(kernel: int, width: int, processors: int, shared: int) -> int:
    """The groups that ``processors`` multiprocessors of ``shared`` bytes have room for; 0 where they do not hold W."""
    rows, columns, held = GRID_KERNELS[kernel]
    steps = -(-width // TILE)
    weights = (steps - held * GRID_WARPS) * rows * TILE_BYTES
    sums = GRID_WARPS * (rows * TILE + 4) * columns * SLOTS * 4
    needed = weights + sums + columns * SLOTS * SLOT_BYTES + PLACES_BYTES + JUDGES * ORDERS_BYTES
    fits = steps // GRID_WARPS >= held and needed <= shared
    return processors // -(-steps // rows) if fits else 0


def grid_kernel(width: int, batch: int, processors: int, shared: int) -> int | None:
    """The kernel that spreads one W over some or all of ``processors`` blocks: the first that solves the batch at once,
    or else the most samples; None if none holds W."""
    best, most = None, 0
    for kernel, (_, columns, _) in enumerate(GRID_KERNELS):
        slots, groups = columns * SLOTS, possible_groups(kernel, width, processors, shared)
        if groups > 0 and groups >= -(-batch // slots):
            return kernel
        if groups * slots > most:
            best, most = kernel, groups * slots
    return best
