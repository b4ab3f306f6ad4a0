"""The compiled CUDA engine (csrc/cuda): whole solves of float32 and 16-bit problems whose weight stays on the chip.

Increments are multiplied in bfloat16 on tensor cores; samples are judged in float32 alone. 16-bit tensors are widened
first and the result is rounded once. Nothing here waits for the device.
"""

from functools import lru_cache

import torch
from torch import Tensor

from .. import _library, stats
from ..activations import ACTIVATIONS
from ..plan import Plan
from . import reference
from .cpu import _options
from .outcome import Outcome

REGIMES = {"block": 0, "grid": 1}  # DeqCudaRegime of csrc/cuda_kernels.h


class Refused(RuntimeError):
    """The kernels cannot serve a problem; the message says why."""


@lru_cache(maxsize=1024)
def plan_launch(weights: int, batch: int, width: int, device: int, regime: str | None = None) -> _library.CudaPlan:
    """Kernel, grid and scratch memory for S weights of so many samples each; raises Refused where there is none.

    device: index of the CUDA device. regime: "block" (W in one multiprocessor), "grid" (in all of them together) or
    None for whichever serves.
    """
    library = _library.compiled
    if not _library.has_cuda:
        raise Refused(_library.build.get("why_not_cuda") or _library.reason or "the library was built without CUDA")
    chosen = _library.CudaPlan()
    number = -1 if regime is None else REGIMES[regime]
    if library.deq_cuda_plan(weights, batch, width, device, number, chosen):
        raise Refused(library.deq_cuda_why().decode())
    return chosen


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
    number = ACTIVATIONS[activation].number
    return _run(torch.ops.deq.cuda_solve_.default, W, (c,), z0, number, plan, out, reflected)


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
    number = -1 if value_of is None else ACTIVATIONS[value_of].number
    return _run(torch.ops.deq.cuda_masked_linear_.default, A, (g, d), u0, number, plan, out, reflected)


def derivative(W: Tensor, c: Tensor, z: Tensor, activation: str) -> Tensor:
    return reference.derivative(W, c, z, activation)


def _run(
    operator,
    W: Tensor,
    batch: tuple[Tensor, ...],
    start: Tensor | None,
    number: int,
    plan: Plan,
    out: Tensor | None,
    reflected: bool,
) -> Outcome:
    c = batch[0]
    weights = W.shape[0] if W.dim() == 3 else 1
    samples, m = c.shape[-2:]
    wide = torch.empty_like(c, dtype=torch.float32, memory_format=torch.contiguous_format)
    said = stats.allocate(wide)
    report = torch.full((4,), -1, dtype=torch.int64, device=c.device)
    if weights * samples:
        launch = plan_launch(weights, samples, m, c.device.index)
        operator(
            W.float().contiguous(),
            *(t.float() for t in batch),
            wide.new_empty((0,) * c.dim()) if start is None else start.float(),
            wide,
            said,
            report,
            torch.empty(launch.scratch, dtype=torch.uint8, device=c.device),
            number,
            *_options(plan, reflected),
            launch.regime,
            launch.kernel,
            launch.blocks,
        )
    z, said = _rounded(wide, said, c.dtype)
    return Outcome(z if out is None else out.copy_(z), said, report)


def _rounded(z: Tensor, said: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """z in the dtype of the injection; a sample that leaves its range is held at its edge and has diverged."""
    if dtype == torch.float32:
        return z, said
    status, largest = stats.status(z, said), torch.finfo(dtype).max
    held = z.clamp(-largest, largest)
    status.masked_fill_((held != z).any(-1) & z.isfinite().all(-1), 3)
    return held.to(dtype), said
