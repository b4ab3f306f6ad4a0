"""Triton kernels (kernels/): whole solves of float32 and 16-bit problems on a GPU, or in Triton's interpreter.

16-bit tensors are widened to float32 first and the result is rounded once. Every sample is scaled by a power of two
where it is far from 1, so that no square leaves the range of float32.
"""

import contextlib

import numpy
import torch
from torch import Tensor

from deq.kernels import cell

from .. import stats
from ..activations import ACTIVATIONS
from ..plan import Plan
from . import triton_resident, triton_streaming
from .outcome import Deferred, Outcome, Part
from .reference import evaluate, outer
from .triton_kind import PRECISION, Kind

__all__ = ["derivative", "evaluate", "is_deferred", "masked_linear", "outer", "solve"]

STATE_BYTES = 1 << 30  # of the iterates and windows that exist at a time; larger batches are solved in stretches


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
    return _run(Kind(False, reflected, ACTIVATIONS[activation], plan), W, c, None, z0, out)


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
    return _run(Kind(True, reflected, ACTIVATIONS["identity"], plan), A, g, d, u0, out)


def derivative(W: Tensor, c: Tensor, z: Tensor, activation: str) -> Tensor:
    if c.dim() == 3:
        return torch.stack([derivative(*part, activation) for part in zip(W, c, z, strict=True)])
    d = cell.derivative(z.float(), W.float(), c.float(), activation, precision=PRECISION)
    return d.to(c.dtype)


def is_deferred(c: Tensor) -> bool:
    """Whether reading what a solve reports would wait for the device."""
    return c.is_cuda


def _run(kind: Kind, W: Tensor, c: Tensor, d: Tensor | None, start: Tensor | None, out: Tensor | None) -> Outcome:
    z = torch.empty(c.shape, dtype=c.dtype, device=c.device) if out is None else out
    said = stats.allocate(z)
    report = Deferred(_write(kind, W, c, d, start, z, said), W)
    return Outcome(z, said, report if is_deferred(c) else report.read())


def _write(
    kind: Kind, W: Tensor, c: Tensor, d: Tensor | None, start: Tensor | None, z: Tensor, said: Tensor
) -> list[Part]:
    """Write z, of the shape of c, and what is said of its samples; the parts of a Deferred."""
    parts: list[Part] = []
    # The interpreter's numpy warns of overflows that the rule of judgement is there for.
    quiet = numpy.errstate(all="ignore") if cell.INTERPRETED.value else contextlib.nullcontext()
    with torch.no_grad(), torch.cuda.device_of(c), quiet:
        if c.dim() == 2:
            return _solve_matrix(kind, W, c, d, start, z, stats.Place(said, c.shape[0]))
        S, B, _ = c.shape
        for s in range(S):
            ds, starts = (None if t is None else t[s] for t in (d, start))
            parts += _solve_matrix(kind, W[s], c[s], ds, starts, z[s], stats.Place(said, S * B, s * B))
    return parts


def _solve_matrix(
    kind: Kind, W: Tensor, c: Tensor, d: Tensor | None, start: Tensor | None, z: Tensor, said: stats.Place
) -> list[Part]:
    """Write z (B, m) and what is said of its samples for one W (m, m); the parts of a Deferred."""
    B, m = c.shape
    W = cell.readable("W", W.float())
    each = 4 * m * (6 + (2 * kind.depth if kind.accelerates else 0))
    stretches = max(1, -(-B * each // STATE_BYTES))
    rows = -(-B // stretches) if B else 1
    parts = []
    for first in range(0, B, rows):
        here, cs, ds, starts, wide = said.after(first), c, d, start, z
        if stretches > 1:
            part = slice(first, first + rows)
            cs, ds, starts, wide = (None if t is None else t[part] for t in (c, d, start, z))
        out = wide
        cs, ds, starts = (None if t is None else cell.readable("c", t.float()) for t in (cs, ds, starts))
        if z.dtype != torch.float32 or not wide.is_contiguous():
            wide = torch.empty(cs.shape, dtype=torch.float32, device=c.device)
        largest = torch.finfo(z.dtype).max
        how = kind.gpu_plan(cs.shape[0], m, c.device)
        given = W, cs, ds, starts, wide, here, largest
        if how.regime == "resident":
            counters, failed = triton_resident.solve_rows(kind, how, *given), None
        else:
            counters, failed = triton_streaming.solve_rows(kind, how, *given)
        if kind.reflects and how.regime != "resident":  # z is the state; the value of the map is one evaluation away
            evaluate = cell.adjoint_cell if kind.masked else cell.cell
            end = {"d": ds, "g": cs} if kind.masked else {"c": cs, "activation": kind.activation.name}
            wide = evaluate(wide, W, **end, precision=PRECISION)[0].nan_to_num_().clamp_(-largest, largest)
        if wide is not out:
            out.copy_(wide)
        parts.append(Part(counters, here.first, cs.shape[0], failed))
    return parts
