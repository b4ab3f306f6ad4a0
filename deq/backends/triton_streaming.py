"""Regime "cell" of the Triton backend: one kernel an iteration, or steps by increments between anchors."""

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from deq.kernels import delta, ends, iteration, judge, mixing, records
from deq.kernels.tiles import MOST_REGISTERS, Tiles, padded_power

from .. import stats
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
    said: stats.Place,
    largest: float,
) -> tuple[Tensor, int | None]:
    """Write z (B, m) float32, contiguous, and what is said of the samples; returns the counters, and how many samples
    failed where the host has seen that."""
    (B, m), plan, device = c.shape, kind.plan, c.device
    shape = _shape(kind, how.increments, how.tiles.samples if how.increments != "native" else None, B, m)
    tiles, grid, step, rule = shape.grid.tiles, shape.grid, shape.step, shape.rule
    free_first = start is None and plan.acceleration != "anderson"
    given = {"W": W.data_ptr(), "C": c.data_ptr(), "OUT": z.data_ptr()}
    given |= zip(("OUT_RESIDUAL", "OUT_ITERATIONS", "OUT_STATUS"), said.addresses(), strict=True)
    for name, tensor in (("D", d), ("START", start)):
        if tensor is not None:
            given[name] = tensor.data_ptr()
    scratch, counters, addresses = shape.memory(given, device)
    strides = {"stride_c": c.stride(0), "stride_d": 0 if d is None else d.stride(0)}
    stride_start = None if start is None else start.stride(0)
    key = (shape, W.stride(), *strides.values(), stride_start, largest)
    loop = chunks.loop_of(key, device)

    def turn(t: int) -> None:
        if shape.steps is not None:
            shape.advance(loop, strides["stride_d"])
        iteration.step_kernel[(grid.programs * shape.splits,)](
            loop.table, t, B, m, *W.stride(), **strides, **rule, **step
        )
        if kind.accelerates:
            mixing.mix_kernel[(-(-B // MIX[0]) * -(-m // MIX[1]),)](
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

    row = min(ROW, padded_power(m))

    def begin() -> None:
        if shape.steps is not None:
            rows, columns = delta.LOW_TILE
            delta.low_kernel[(-(-m // rows),)](
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
    chunk = DELTA_CHUNK if shape.steps is not None else -(-LEAST_CHUNK // period) * period
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
        return -(-self.B // self.tiles.samples)

    @property
    def columns(self) -> int:
        return -(-self.m // self.tiles.units)

    @property
    def programs(self) -> int:
        return self.rows * self.columns

    @property
    def options(self) -> dict[str, int | bool]:
        """What a kernel over these tiles is launched with."""
        return {
            "SLOTS": min(iteration.MOST_SLOTS, padded_power(self.columns)),
            "BLOCK_B": self.tiles.samples,
            "BLOCK_N": self.tiles.units,
            "BLOCK_K": self.tiles.depth,
            "num_warps": self.tiles.warps,
            "num_stages": self.tiles.stages,
            **FUSES,
        }


@dataclass(eq=False)
class _Shape:
    """What a solve of (B, m) needs beyond its tensors, made once: whatever is computed in Python at every call, the
    host computes while the device waits. Two shapes are the same object or different, as keys of loops."""

    kind: Kind
    grid: _Grid
    splits: int
    steps: _Grid | None  # of increments
    step: dict
    rule: dict
    bytes: int
    places: dict[str, int]  # of what lies in the scratch memory

    def memory(self, given: dict[str, int], device: torch.device) -> tuple[Tensor, Tensor, list[int]]:
        """Memory that must live as long as the solve, the counters, and the addresses of all that is there and of what
        is given, in the order of the table (kernels/records.py). Two allocations and a view: an operator of torch takes
        the host 3 to 7 us."""
        scratch = torch.empty(self.bytes, dtype=torch.uint8, device=device)
        lists = records.HEADER + 2 * self.grid.rows + self.grid.programs
        counters = torch.zeros(lists, dtype=torch.int32, device=device)
        base = scratch.data_ptr()
        addresses = {name: base + place for name, place in self.places.items()} | given
        addresses["COUNTERS"] = counters.data_ptr()
        nowhere = given["C"]  # of what this solve never looks up
        return scratch, counters, [addresses.get(name, nowhere) for name in records.TABLE]

    def advance(self, loop: chunks.Loop, stride_d: int) -> None:
        """Launch the steps by increments of a turn."""
        constants = {name: value for name, value in self.kind.constants.items() if name != "ACCELERATION"}
        constants["INCREMENTS"] = self.step["INCREMENTS"]
        for s in range(delta.STEPS):
            delta.delta_kernel[(self.steps.programs,)](
                loop.table,
                s,
                self.steps.B,
                self.steps.m,
                stride_d,
                **self.rule,
                **constants,
                **self.steps.options,
                maxnreg=self.steps.tiles.registers,
            )


@lru_cache(maxsize=256)
def _shape(kind: Kind, increments: str, rows: int | None, B: int, m: int) -> _Shape:
    """rows: samples of a tile where steps are by increments."""
    steps, (tiles, splits) = None, iteration.step_tiles(B, m)
    if rows is not None:  # rows of tiles of both are the same samples
        tiles, splits = next(t for t in iteration.STEP_TILES if t.samples == rows), 1
        steps = _Grid(B, m, next(t for t in delta.DELTA_TILES[increments] if t.samples == rows))
    grid = _Grid(B, m, tiles)
    step = {
        **kind.constants,
        "DEPTH": kind.depth,
        "PRECISION": PRECISION,
        "INCREMENTS": records.INCREMENTS[increments],
        "SPLITS": splits,
        **grid.options,
        "maxnreg": iteration.registers(tiles, increments),
    }
    rule = judge.rule(kind.plan.tol, kind.plan.max_iter, m)
    most = -(-m // 32)  # columns of the narrowest tiles
    window = kind.depth if kind.accelerates else 0
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
    places, place = {}, 0
    for name, size in sizes.items():
        places[name] = place
        place += _aligned(size)
    return _Shape(kind, grid, splits, steps, step, rule, place, places)


def _aligned(size: int) -> int:
    return -(-size // 16) * 16
