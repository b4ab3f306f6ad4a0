"""Regime "cell" of the Triton backend: one kernel an iteration, or steps by increments between anchors."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from deq.kernels import delta, ends, iteration, judge, records
from deq.kernels.tiles import MOST_REGISTERS, Tiles

from ..gpu_plan import GpuPlan
from . import chunks
from .triton_kind import PRECISION, Kind

FUSES = {"enable_fp_fusion": True}  # Triton is about to change its default, and warns of it
ROW = 1024  # elements of a row that start and finish look at at a time
MIX = (4, 256)  # samples and units of a tile of the next accelerated iterates
LEAST_CHUNK = 8  # turns between two looks at the samples at work
DELTA_CHUNK = 2  # the same of turns by increments, which are five kernels each
LOW_BYTES = {"native": 0, "bfloat16": 2, "float8": 1}  # of an increment, and of an element of the W that it meets


def solve_rows(
    kind: Kind,
    how: GpuPlan,
    W: Tensor,
    c: Tensor,
    d: Tensor | None,
    start: Tensor | None,
    z: Tensor,
    fields: list[Tensor],
    largest: float,
) -> tuple[Tensor, int | None]:
    """Write z (B, m) float32, contiguous, and residual, iterations, status (B,); returns the counters, and how many
    samples failed where the host has seen that."""
    (B, m), plan, device = c.shape, kind.plan, c.device
    by_increments = how.increments != "native"
    tiles, splits = iteration.step_tiles(B, m)
    if by_increments:  # rows of tiles of both are the same samples
        rows = how.tiles.samples
        tiles, splits = next(t for t in iteration.STEP_TILES if t.samples == rows), 1
        steps = _Grid(B, m, next(t for t in delta.DELTA_TILES[how.increments] if t.samples == rows))
    grid = _Grid(B, m, tiles)
    free_first = start is None and plan.acceleration != "anderson"
    given = {"W": W, "C": c, "D": d, "START": start, "OUT": z}
    given |= zip(("OUT_RESIDUAL", "OUT_ITERATIONS", "OUT_STATUS"), fields, strict=True)
    scratch, addresses, counters = _memory(kind, how.increments, grid, splits, given)
    rule = judge.rule(plan.tol, plan.max_iter, m)
    strides = {"stride_c": c.stride(0), "stride_d": 0 if d is None else d.stride(0)}
    stride_start = None if start is None else start.stride(0)
    step = {
        **kind.constants,
        "DEPTH": kind.depth,
        "PRECISION": PRECISION,
        "INCREMENTS": records.INCREMENTS[how.increments],
        "SPLITS": splits,
        **grid.options,
        "maxnreg": iteration.registers(tiles, how.increments),
    }
    key = (B, m, W.stride(), *strides.values(), stride_start, largest, *rule.values(), *step.values())
    loop = chunks.loop_of(key, device)
    advance = _delta_steps(kind, how.increments, steps, loop, strides["stride_d"], rule) if by_increments else None
    mix_grid = (triton.cdiv(B, MIX[0]) * triton.cdiv(m, MIX[1]),)

    def turn(t: int) -> None:
        if advance is not None:
            advance()
        iteration.step_kernel[(grid.programs * splits,)](loop.table, t, B, m, *W.stride(), **strides, **rule, **step)
        if kind.accelerates:
            iteration.mix_kernel[mix_grid](
                loop.table,
                t,
                B,
                m,
                DEPTH=kind.depth,
                INCREMENTS=step["INCREMENTS"],
                BLOCK_B=MIX[0],
                BLOCK_N=MIX[1],
                **FUSES,
            )

    row = min(ROW, triton.next_power_of_2(m))

    def begin() -> None:
        if by_increments:
            rows, columns = delta.LOW_TILE
            delta.low_kernel[(triton.cdiv(m, rows),)](
                loop.table,
                m,
                *W.stride(),
                INCREMENTS=step["INCREMENTS"],
                BLOCK_N=rows,
                BLOCK_K=columns,
                **FUSES,
            )
        ends.start_kernel[(B,)](
            loop.table,
            B,
            m,
            **strides,
            stride_start=stride_start or 0,
            **rule,
            **kind.constants,
            STARTS=start is not None,
            FREE_FIRST=free_first,
            INCREMENTS=step["INCREMENTS"],
            TILE_B=tiles.samples,
            BLOCK=row,
            maxnreg=MOST_REGISTERS,
            **FUSES,
        )

    def end() -> None:
        ends.finish_kernel[(B,)](
            loop.table, B, m, largest, HOMOGENEOUS=kind.homogeneous, MASKED=kind.masked, BLOCK=row, **FUSES
        )

    period = 2 * kind.depth if kind.depth % 2 else kind.depth
    chunk = DELTA_CHUNK if by_increments else -(-LEAST_CHUNK // period) * period
    failed = 0
    if B > 0:
        with loop.lock:
            loop.fill(addresses)
            turns = plan.max_iter - int(free_first)
            failed = loop.repeat(begin, turn, end, turns, period, chunk, counters[:2])
    del scratch  # until now: what is freed may be used again by what is launched from now on
    return counters, failed


@dataclass(frozen=True)
class _Grid:
    """The tiles of an output (B, m)."""

    B: int
    m: int
    tiles: Tiles

    @property
    def rows(self) -> int:
        return triton.cdiv(self.B, self.tiles.samples)

    @property
    def columns(self) -> int:
        return triton.cdiv(self.m, self.tiles.units)

    @property
    def programs(self) -> int:
        return self.rows * self.columns

    @property
    def options(self) -> dict[str, int | bool]:
        """What a kernel over these tiles is launched with."""
        return {
            "SLOTS": min(iteration.MOST_SLOTS, triton.next_power_of_2(self.columns)),
            "BLOCK_B": self.tiles.samples,
            "BLOCK_N": self.tiles.units,
            "BLOCK_K": self.tiles.depth,
            "num_warps": self.tiles.warps,
            "num_stages": self.tiles.stages,
            **FUSES,
        }


def _delta_steps(
    kind: Kind, increments: str, grid: _Grid, loop: chunks.Loop, stride_d: int, rule: dict
) -> Callable[[], None]:
    """What launches the steps by increments of a turn."""
    constants = {name: value for name, value in kind.constants.items() if name != "ACCELERATION"}
    constants["INCREMENTS"] = records.INCREMENTS[increments]

    def advance() -> None:
        for s in range(delta.STEPS):
            delta.delta_kernel[(grid.programs,)](
                loop.table,
                s,
                grid.B,
                grid.m,
                stride_d,
                **rule,
                **constants,
                **grid.options,
                maxnreg=grid.tiles.registers,
            )

    return advance


def _memory(
    kind: Kind,
    increments: str,
    grid: _Grid,
    splits: int,
    given: dict[str, Tensor | None],
) -> tuple[Tensor, list[int], Tensor]:
    """Memory that must live as long as the solve, the addresses of its tensors and of those given, in the order of the
    table (kernels/records.py), and the counters. One allocation and no views: an operator of torch takes the host 3 to
    7 us."""
    B, m, depth, device = grid.B, grid.m, kind.depth, given["C"].device
    most = -(-m // 32)  # columns of the narrowest tiles
    window = depth if kind.accelerates else 0
    low = LOW_BYTES[increments]
    wide = 4 if low else 0
    sizes = {  # in bytes
        "FRONT": 4 * B * m,
        "BACK": 4 * B * m,
        "BEST": 4 * B * m,
        "VALUES": 4 * window * B * m,
        "RESIDUALS": 4 * window * B * m,
        "WEIGHTS": 4 * window * B,
        "PARTS": 4 * splits * B * m if splits > 1 else 0,
        "SUMS": 4 * (2 + window) * max(most, grid.columns) * B,
        "RECORD": 4 * records.RECORDS * B,
        "GRAM": 8 * window * window * B,
        "MARKS": 4 * records.MARKINGS * B,
        "Y": wide * B * m,
        "X": wide * B * m,
        "EVEN": low * B * m,
        "ODD": low * B * m,
        "LOW": low * m * m,
        "ROW_SCALES": wide * m,
    }
    scratch = torch.empty(sum(map(_aligned, sizes.values())), dtype=torch.uint8, device=device)
    lists = records.HEADER + 2 * grid.rows + grid.programs
    counters = torch.zeros(lists, dtype=torch.int32, device=device)
    addresses = {name: tensor.data_ptr() for name, tensor in given.items() if tensor is not None}
    addresses["COUNTERS"] = counters.data_ptr()
    place = scratch.data_ptr()
    for name, size in sizes.items():
        addresses[name] = place
        place += _aligned(size)
    nowhere = addresses["C"]  # of what this solve never looks up
    return scratch, [addresses.get(name, nowhere) for name in records.TABLE], counters


def _aligned(size: int) -> int:
    return -(-size // 16) * 16
