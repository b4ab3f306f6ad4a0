"""Regime "resident" of the Triton backend: one launch a solve."""

import torch
from torch import Tensor

from deq.kernels import judge, records, solve_resident
from deq.kernels.triangular import WIDE_FROM

from .. import stats
from ..gpu_plan import GpuPlan
from .triton_kind import PRECISION, Kind


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
) -> Tensor:
    """Write z (B, m) float32, contiguous, and what is said of the samples; returns the counters."""
    (B, m), plan = c.shape, kind.plan
    width, block = solve_resident.padded(m), solve_resident.BLOCK_B
    programs = -(-B // block)
    counters = torch.zeros(records.HEADER, dtype=torch.int32, device=c.device)
    by_increments = how.increments != "native"
    each = solve_resident.scratch_floats(m, kind.depth if kind.accelerates else 0)
    scratch = torch.empty(programs * each, dtype=torch.float32, device=c.device)
    if m < width:
        W = torch.nn.functional.pad(W, (0, width - m, 0, width - m))
    elif m * max(W.stride()) >= WIDE_FROM:  # the kernel counts places in W by 32 bits
        W = W.contiguous()
    if B > 0:
        solve_resident.solve_kernel[(programs,)](
            W,
            W.to(torch.bfloat16, memory_format=torch.contiguous_format) if by_increments else None,
            c,
            d,
            start,
            z,
            *said.views(B),
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
            INCREMENTS=by_increments,
            SCRATCH=each,
            M=width,
            BLOCK_B=block,
            num_warps=solve_resident.WARPS[width],
            num_stages=1,
            enable_fp_fusion=True,
        )
    return counters
