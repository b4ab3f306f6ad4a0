"""Triton kernels (kernels/): whole solves of float32 and 16-bit problems on a GPU, or in Triton's interpreter.

16-bit tensors are widened to float32 first and the result is rounded once. Every sample is scaled by a power of two
where it is far from 1, so that no square leaves the range of float32.
"""

import contextlib
from typing import NamedTuple

import numpy
import torch
import triton
from torch import Tensor

from deq.kernels import cell, ends, iteration, judge, records, solve_resident

from .. import stats
from ..activations import ACTIVATIONS, Activation
from ..plan import Plan
from . import chunks
from .outcome import Deferred, Outcome

STATE_BYTES = 1 << 30  # of the iterates and windows that exist at a time; larger batches are solved in stretches
PRECISION = "tf32x3"  # three products on tensor cores: as exact as float32 multiplied by itself
BLOCK = 1024  # elements of a row that start and finish look at at a time
MIX = (4, 256)  # samples and units of a tile of the next accelerated iterates


def solve(
    W: Tensor,
    c: Tensor,
    z0: Tensor | None,
    activation: str,
    plan: Plan,
    *,
    out: Tensor | None = None,
    reflected: bool = False,
) -> Outcome:
    return _run(_Kind(False, reflected, ACTIVATIONS[activation], plan), W, c, None, z0, out)


def masked_linear(
    A: Tensor,
    g: Tensor,
    d: Tensor,
    value_of: str | None,
    plan: Plan,
    *,
    u0: Tensor | None = None,
    out: Tensor | None = None,
    reflected: bool = False,
) -> Outcome:
    if value_of is not None:
        d = ACTIVATIONS[value_of].derivative_of_value(d.float())
    return _run(_Kind(True, reflected, ACTIVATIONS["identity"], plan), A, g, d, u0, out)


def derivative(W: Tensor, c: Tensor, z: Tensor, activation: str) -> Tensor:
    if c.dim() == 3:
        return torch.stack([derivative(*part, activation) for part in zip(W, c, z, strict=True)])
    d = cell.derivative(z.float(), W.float(), c.float(), activation, precision=PRECISION)
    return d.to(c.dtype)


def outer(u: Tensor, z: Tensor) -> Tensor:
    return torch.matmul(u.mT, z)


class _Kind(NamedTuple):
    """What is solved, apart from tensors."""

    masked: bool
    reflects: bool
    activation: Activation
    plan: Plan

    @property
    def ending(self) -> str:
        names = (("value", "reflected"), ("adjoint", "reflected adjoint"))
        return names[self.masked][self.reflects]

    @property
    def homogeneous(self) -> bool:
        return self.masked or self.activation.homogeneous

    @property
    def accelerates(self) -> bool:
        return self.plan.acceleration != "none" and self.plan.depth > 1  # of one residual there is nothing to mix

    @property
    def acceleration(self) -> str:
        return self.plan.acceleration if self.accelerates else "none"

    @property
    def constants(self) -> dict[str, int]:
        """What every kernel of a solve is compiled for."""
        return {
            "ENDING": records.ENDINGS[self.ending],
            "ACTIVATION": self.activation.number,
            "HOMOGENEOUS": self.homogeneous,
            "ACCELERATION": records.ACCELERATIONS[self.acceleration],
            "CRITERION": judge.CRITERIA[self.plan.criterion],
        }

    @property
    def depth(self) -> int:
        return self.plan.depth if self.accelerates else 1


def _run(kind: _Kind, W: Tensor, c: Tensor, d: Tensor | None, start: Tensor | None, out: Tensor | None) -> Outcome:
    z = torch.empty(c.shape, dtype=c.dtype, device=c.device) if out is None else out
    said = stats.allocate(z)
    parts: list[tuple[Tensor, int, int]] = []
    # The interpreter's numpy warns of overflows that the rule of judgement is there for.
    quiet = numpy.errstate(all="ignore") if cell.INTERPRETED.value else contextlib.nullcontext()
    with torch.no_grad(), torch.cuda.device_of(c), quiet:
        fields = [field(z, said) for field in (stats.residual, stats.iterations, stats.status)]
        if c.dim() == 2:
            parts += _solve_matrix(kind, W, c, d, start, z, fields)
        else:
            for s in range(c.shape[0]):
                ds, starts = (None if t is None else t[s] for t in (d, start))
                more = _solve_matrix(kind, W[s], c[s], ds, starts, z[s], [field[s] for field in fields])
                parts += [(counters, first + s * c.shape[1], samples) for counters, first, samples in more]
    report = Deferred(parts, W)
    return Outcome(z, said, report if c.is_cuda else report.read())


def _solve_matrix(
    kind: _Kind, W: Tensor, c: Tensor, d: Tensor | None, start: Tensor | None, z: Tensor, fields: list[Tensor]
) -> list[tuple[Tensor, int, int]]:
    """Write z (B, m) and what is said of its samples for one W (m, m); the parts of a Deferred."""
    B, m = c.shape
    W = cell.readable("W", W.float())
    each = 4 * m * (3 + (2 * kind.depth if kind.accelerates else 0))
    stretches = max(1, -(-B * each // STATE_BYTES))
    rows = -(-B // stretches) if B else 1
    parts = []
    for first in range(0, B, rows):
        part = slice(first, first + rows)
        cs, ds, starts = (None if t is None else cell.readable("c", t[part].float()) for t in (c, d, start))
        wide = z[part]
        if z.dtype != torch.float32 or not wide.is_contiguous():
            wide = torch.empty(cs.shape, device=c.device)
        largest = torch.finfo(z.dtype).max
        counters = _solve_rows(kind, W, cs, ds, starts, wide, [field[part] for field in fields], largest)
        if kind.reflects and not solve_resident.fits(m):  # z is the state; the value of the map is one evaluation away
            evaluate = cell.adjoint_cell if kind.masked else cell.cell
            end = {"d": ds, "g": cs} if kind.masked else {"c": cs, "activation": kind.activation.name}
            wide = evaluate(wide, W, **end, precision=PRECISION)[0].nan_to_num_().clamp_(-largest, largest)
        if wide.data_ptr() != z[part].data_ptr():
            z[part] = wide
        parts.append((counters, first, cs.shape[0]))
    return parts


def _solve_rows(
    kind: _Kind,
    W: Tensor,
    c: Tensor,
    d: Tensor | None,
    start: Tensor | None,
    z: Tensor,
    fields: list[Tensor],
    largest: float,
) -> Tensor:
    """Write z (B, m) float32, contiguous, and residual, iterations, status (B,); returns the counters."""
    run = _solve_resident if solve_resident.fits(c.shape[1]) else _solve_streaming
    return run(kind, W, c, d, start, z, fields, largest)


def _solve_resident(
    kind: _Kind,
    W: Tensor,
    c: Tensor,
    d: Tensor | None,
    start: Tensor | None,
    z: Tensor,
    fields: list[Tensor],
    largest: float,
) -> Tensor:
    (B, m), plan = c.shape, kind.plan
    M, block = solve_resident.padded(m), solve_resident.BLOCK_B
    programs = triton.cdiv(B, block)
    counters = torch.zeros(records.HEADER, dtype=torch.int32, device=c.device)
    increments = solve_resident.increments(m, plan.tol, kind.acceleration)
    each = solve_resident.scratch_floats(m, kind.depth if kind.accelerates else 0)
    scratch = torch.empty(programs * each, device=c.device)
    if m < M:
        W = torch.nn.functional.pad(W, (0, M - m, 0, M - m))
    if B > 0:
        solve_resident.solve_kernel[(programs,)](
            W,
            W.to(torch.bfloat16, memory_format=torch.contiguous_format) if increments else None,
            c,
            d,
            start,
            z,
            *fields,
            counters,
            scratch,
            B,
            m,
            *W.stride(),
            c.stride(0),
            0 if d is None else d.stride(0),
            0 if start is None else start.stride(0),
            **judge.rule(plan.tol, plan.max_iter, m),
            largest=largest,
            **kind.constants,
            DEPTH=kind.depth,
            PRECISION=PRECISION,
            INCREMENTS=increments,
            SCRATCH=each,
            M=M,
            BLOCK_B=block,
            num_warps=solve_resident.WARPS[M],
            num_stages=1,
            enable_fp_fusion=True,
        )
    return counters


def _solve_streaming(
    kind: _Kind,
    W: Tensor,
    c: Tensor,
    d: Tensor | None,
    start: Tensor | None,
    z: Tensor,
    fields: list[Tensor],
    largest: float,
) -> Tensor:
    (B, m), plan, device = c.shape, kind.plan, c.device
    tiles, splits = iteration.step_tiles(B, m)
    tiles_b, tiles_n = triton.cdiv(B, tiles.samples), triton.cdiv(m, tiles.units)
    depth, accelerates = kind.depth, kind.accelerates
    free_first = start is None and plan.acceleration != "anderson"
    state = _Floats(
        FRONT=B * m,
        BACK=B * m,
        BEST=B * m,
        VALUES=depth * B * m if accelerates else 0,
        RESIDUALS=depth * B * m if accelerates else 0,
        GRAM=2 * depth * depth * B if accelerates else 0,
        WEIGHTS=depth * B if accelerates else 0,
        PARTS=splits * B * m if splits > 1 else 0,
        SUMS=(2 + depth if accelerates else 2) * tiles_n * B,
        RECORD=records.RECORDS * B,
    )
    memory = torch.empty(state.size, device=device)
    lists = records.HEADER + 2 * tiles_b + tiles_b * tiles_n
    counters = torch.zeros(lists, dtype=torch.int32, device=device)
    marks = torch.empty(records.MARKINGS * B, dtype=torch.int32, device=device)
    tensors = {"W": W, "C": c, "D": c if d is None else d, "MARKS": marks, "COUNTERS": counters}
    addresses = [
        tensors[name].data_ptr() if name in tensors else memory.data_ptr() + 4 * state.first[name]
        for name in records.TABLE
    ]
    rule = judge.rule(plan.tol, plan.max_iter, m)
    strides = {"stride_c": c.stride(0), "stride_d": 0 if d is None else d.stride(0)}
    step = {
        **kind.constants,
        "DEPTH": depth,
        "PRECISION": PRECISION,
        "SPLITS": splits,
        "SLOTS": min(iteration.MOST_SLOTS, triton.next_power_of_2(tiles_n)),
        "BLOCK_B": tiles.samples,
        "BLOCK_N": tiles.units,
        "BLOCK_K": tiles.depth,
        "num_warps": tiles.warps,
        "num_stages": tiles.stages,
    }
    mix_grid = (triton.cdiv(B, MIX[0]) * triton.cdiv(m, MIX[1]),)
    block = min(BLOCK, triton.next_power_of_2(m))
    key = (B, m, W.stride(), *strides.values(), *rule.values(), *step.values())
    loop = chunks.loop_of(key, device)

    def turn(t: int) -> None:
        iteration.step_kernel[(tiles_b * tiles_n * splits,)](
            loop.table, t, B, m, *W.stride(), **strides, **rule, **step, enable_fp_fusion=True
        )
        if accelerates:
            iteration.mix_kernel[mix_grid](loop.table, t, B, m, DEPTH=depth, BLOCK_B=MIX[0], BLOCK_N=MIX[1])

    with loop.lock:
        records.bind_kernel[(1,)](loop.table, *addresses)
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
            TILE_B=tiles.samples,
            BLOCK=block,
        )
        period = 2 * depth if depth % 2 else depth
        loop.repeat(turn, plan.max_iter - int(free_first), period, counters[:1])
        ends.finish_kernel[(B,)](
            loop.table, z, *fields, B, m, largest, HOMOGENEOUS=kind.homogeneous, MASKED=kind.masked, BLOCK=block
        )
    return counters


class _Floats:
    """Places of named stretches of float32 in one allocation, each at a multiple of 16 bytes."""

    def __init__(self, **sizes: int):
        self.first, self.size = {}, 0
        for name, size in sizes.items():
            self.first[name] = self.size
            self.size += -(-size // 4) * 4
