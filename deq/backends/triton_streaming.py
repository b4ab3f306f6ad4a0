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
    state, addresses = _memory(kind, how.increments, grid, splits, W, c, d)
    rule = judge.rule(plan.tol, plan.max_iter, m)
    strides = {"stride_c": c.stride(0), "stride_d": 0 if d is None else d.stride(0)}
    step = {
        **kind.constants,
        "DEPTH": kind.depth,
        "PRECISION": PRECISION,
        "INCREMENTS": records.INCREMENTS[how.increments],
        "SPLITS": splits,
        **grid.options,
    }
    key = (B, m, W.stride(), *strides.values(), *rule.values(), *step.values())
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
    period = 2 * kind.depth if kind.depth % 2 else kind.depth
    chunk = DELTA_CHUNK if by_increments else -(-LEAST_CHUNK // period) * period
    failed = 0
    with loop.lock:
        records.bind_kernel[(1,)](loop.table, *addresses, **FUSES)
        if B > 0:
            ends.start_kernel[(B,)](
                loop.table,
                start,
                B,
                m,
                **strides,
                stride_start=0 if start is None else start.stride(0),
                **rule,
                **kind.constants,
                FREE_FIRST=free_first,
                INCREMENTS=step["INCREMENTS"],
                TILE_B=tiles.samples,
                BLOCK=row,
                maxnreg=MOST_REGISTERS,
                **FUSES,
            )
            failed = loop.repeat(turn, plan.max_iter - int(free_first), period, chunk, state["COUNTERS"][:2])
            ends.finish_kernel[(B,)](
                loop.table,
                z,
                *fields,
                B,
                m,
                largest,
                HOMOGENEOUS=kind.homogeneous,
                MASKED=kind.masked,
                BLOCK=row,
                **FUSES,
            )
    return state["COUNTERS"], failed


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
    kind: Kind, increments: str, grid: _Grid, splits: int, W: Tensor, c: Tensor, d: Tensor | None
) -> tuple[dict[str, Tensor], list[int]]:
    """The tensors of a solve (kernels/records.py) by name, and their addresses in the order of the table."""
    B, m, depth = grid.B, grid.m, kind.depth
    new = {"device": c.device}
    most = -(-m // 32)  # columns of the narrowest tiles
    held = depth if kind.accelerates else 0
    sizes = {
        "FRONT": B * m,
        "BACK": B * m,
        "BEST": B * m,
        "VALUES": held * B * m,
        "RESIDUALS": held * B * m,
        "WEIGHTS": held * B,
        "PARTS": splits * B * m if splits > 1 else 0,
        "SUMS": (2 + held) * max(most, grid.columns) * B,
        "RECORD": records.RECORDS * B,
    }
    if increments != "native":
        sizes |= {"Y": B * m, "X": B * m}
    starts, total = {}, 0
    for name, size in sizes.items():
        starts[name] = total
        total += -(-size // 4) * 4  # each at a multiple of 16 bytes
    floats = torch.empty(total, **new)
    lists = records.HEADER + 2 * grid.rows + grid.programs
    state = {name: floats[first : first + sizes[name]] for name, first in starts.items()}
    state |= {
        "W": W,
        "C": c,
        "D": c if d is None else d,
        "GRAM": torch.empty(held * held * B, dtype=torch.float64, **new),
        "MARKS": torch.empty(records.MARKINGS * B, dtype=torch.int32, **new),
        "COUNTERS": torch.zeros(lists, dtype=torch.int32, **new),
    }
    if increments != "native":
        low, units = delta.low_weight(W, increments)
        state |= {"LOW": low, "EVEN": c.new_empty(B * m, dtype=low.dtype), "ODD": c.new_empty(B * m, dtype=low.dtype)}
        if units is not None:
            state["ROW_SCALES"] = units
    nowhere = c.data_ptr()  # of what this solve never looks up
    return state, [state[name].data_ptr() if name in state else nowhere for name in records.TABLE]
