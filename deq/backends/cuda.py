"""The compiled CUDA engine (csrc/cuda): whole solves of float32 and 16-bit problems whose weight stays on the chip.

Increments are multiplied in bfloat16 on tensor cores; samples are judged in float32 alone. 16-bit tensors are widened
first and the result is rounded once. Nothing here waits for the device. What the kernels do not hold, or what another
is expected to solve sooner (:mod:`deq.gpu_plan`), goes to the Triton backend; a launch that fails does too, with one
warning. What an automatic solve leaves unsolved is taken on by Newton's method, on the device too, whichever of the two
solved.
"""

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from ctypes import byref, c_double
from functools import lru_cache
from types import ModuleType

import torch
from torch import Tensor

from .. import _library, _triton, gpu_plan, gpu_times, stats
from ..activations import ACTIVATIONS
from ..gpu_device import device_at
from ..plan import Plan
from ..solution import Status, rounded
from . import reference
from .cpu import _options
from .outcome import Deferred, Outcome, unchanged
from .reference import evaluate, outer

__all__ = [
    "derivative",
    "evaluate",
    "masked_linear",
    "measure",
    "outer",
    "plan_launch",
    "regime_for",
    "solve",
    "substitute",
]

REPORT_BYTES = 32  # of four numbers, DeqReport of csrc/kernels.h
NOT_SUPPORTED = 3  # of DeqCudaError in csrc/cuda_kernels.h
REGIMES = {"block": 0, "grid": 1}  # DeqCudaRegime of csrc/cuda_kernels.h
PLANNED = {"resident cuda": "block", "grid": "grid"}  # by their names in deq.gpu_plan
UNRESCUED = "the CUDA engine could not take on the samples that failed"
_told: set[str] = set()  # reasons that were warned of


class Refused(RuntimeError):
    """The kernels cannot serve a problem; the message says why."""


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
    regime = None if reflected else _regime(c, plan)
    if regime is not None:
        try:
            with _device_of(c):
                return _run("cuda_solve_", W, (c,), z0, ACTIVATIONS[activation].number, plan, out, regime)
        except Refused as error:
            _tell(str(error))
    outcome = _elsewhere(c).solve(W, c, z0, activation, plan, out=out, reflected=reflected)
    return outcome if reflected else _rescued(outcome, W, (c,), ACTIVATIONS[activation].number, plan)


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
    regime = None if reflected else _regime(g, plan)
    number = -1 if value_of is None else ACTIVATIONS[value_of].number
    if regime is not None:
        try:
            with _device_of(g):
                return _run("cuda_masked_linear_", A, (g, d), u0, number, plan, out, regime)
        except Refused as error:
            _tell(str(error))
    aliased = out is not None and out is d  # then the mask is gone when the solve is done
    outcome = _elsewhere(g).masked_linear(A, g, d, value_of, plan, u0=u0, out=out, reflected=reflected)
    return outcome if reflected or aliased else _rescued(outcome, A, (g, d), number, plan)


def derivative(W: Tensor, c: Tensor, z: Tensor, activation: str) -> Tensor:
    return _elsewhere(c).derivative(W, c, z, activation)


def substitute(
    W: Tensor,
    c: Tensor,
    activation: str | None,
    *,
    mask: Tensor | None = None,
    strict: bool = False,
    upper: bool = False,
) -> tuple[Tensor, Tensor] | None:
    """``z = act(T z + c)``, or with ``mask`` s ``u = s * (T u + c)``; T is the lower triangle of W (m, m), with
    ``upper`` its upper one, either without its diagonal where ``strict``. None where the kernel cannot serve it.

    W, any strides, c and mask (B, m): float32 on one GPU. Returns z (B, m) and its residual (B,), NaN for a row that is
    not finite and infinity for one that leaves the range. ``1 - w act'`` must be positive for every diagonal element w.
    """
    if not c.is_cuda or c.dtype != torch.float32:
        return None
    try:
        with _device_of(c):
            return _substitute(W, c, activation, mask, strict, upper)
    except Refused as error:
        _tell(str(error))
        return None


def _substitute(
    W: Tensor, c: Tensor, activation: str | None, mask: Tensor | None, strict: bool, upper: bool
) -> tuple[Tensor, Tensor]:
    if not _library.has_cuda:
        raise Refused(_library.build.get("why_not_cuda") or _library.reason or "the library was built without CUDA")
    z = torch.empty_like(c, memory_format=torch.contiguous_format)
    residual = c.new_empty(c.shape[0])
    try:
        torch.ops.deq.cuda_substitute_.default(
            W.detach(),
            c,
            c.new_empty((0, 0)) if mask is None else mask,
            z,
            residual,
            0 if activation is None else ACTIVATIONS[activation].number,
            int(strict),
            int(upper),
        )
    except RuntimeError as error:
        raise Refused(str(error)) from error
    return z, residual


@lru_cache(maxsize=1024)
def regime_for(width: int, batch: int, device: int) -> str | None:
    """The regime that a solve runs in, or None where Triton's kernels are expected to be faster or W fits nowhere.

    device: index of the CUDA device.
    """
    constants = device_at(device)
    regimes = sorted(gpu_times.REGIMES, key=gpu_plan.ON_CUDA.__contains__)  # at the same time Triton's
    found = [option for regime in regimes if (option := gpu_plan.fastest(regime, width, batch, constants)) is not None]
    return PLANNED.get(min(found, key=lambda option: option.solve).regime)


@lru_cache(maxsize=1024)
def plan_launch(weights: int, batch: int, width: int, device: int, regime: str | None = None) -> _library.CudaPlan:
    """Kernel, grid and scratch memory for S weights of so many samples each; raises Refused where there is none.

    device: index of the CUDA device. regime: "block" (W in one multiprocessor), "grid" (in all of them together) or
    None for whichever serves.
    """
    if not _library.has_cuda:
        raise Refused(_library.build.get("why_not_cuda") or _library.reason or "the library was built without CUDA")
    chosen, number = _library.CudaPlan(), -1 if regime is None else REGIMES[regime]
    if _library.compiled.deq_cuda_plan(weights, batch, width, device, number, byref(chosen)):
        raise Refused(_library.compiled.deq_cuda_why().decode())
    return chosen


@lru_cache(maxsize=1024)
def plan_rescue(weights: int, batch: int, width: int, device: int) -> _library.CudaPlan | None:
    """Blocks and scratch memory of Newton's method for so many samples of S weights each, None where W is too wide for
    it; raises Refused where it cannot run."""
    chosen = _library.CudaPlan()
    code = _library.compiled.deq_cuda_rescue_plan(weights, batch, width, device, byref(chosen))
    if code and code != NOT_SUPPORTED:
        raise Refused(_library.compiled.deq_cuda_why().decode())
    return None if code else chosen


def measure(name: str, device: int = 0) -> float:
    """A constant of the device, measured: its names and units are those of deq_cuda_measure in csrc/cuda_kernels.h.

    Waits for the device. Raises Refused where it cannot be measured.
    """
    if not _library.has_cuda:
        raise Refused("the library was built without CUDA")
    result = c_double()
    if _library.compiled.deq_cuda_measure(name.encode(), device, byref(result)):
        raise Refused(_library.compiled.deq_cuda_why().decode())
    return result.value


class _Report(Deferred):
    """A report that is still on the GPU, behind what is said of the samples: one plus the least index of what is not
    finite, -1 where there is nothing."""

    samples: int = 0

    def __init__(self, samples: int, said: Tensor, W: Tensor):
        self.samples, self.said, self.weight = samples, said, unchanged(W)

    def failures(self) -> Tensor:
        *_, status = stats.Place(self.said, self.samples).views(self.samples)
        return (status != Status.CONVERGED).sum()

    def read(self) -> list[int]:
        _, *bad = self.said[-REPORT_BYTES:].view(torch.int64).tolist()
        return [int(self.failures()), *(max(place, 0) for place in bad)]


class _Rescued(Deferred):
    """The report of another backend, its count of failed samples taken after the rescue."""

    def __init__(self, solved: Deferred, status: Tensor):
        self.solved, self.status, self.weight = solved, status, solved.weight

    @property
    def samples(self) -> int:
        return self.status.numel()

    def failures(self) -> Tensor:
        return (self.status != Status.CONVERGED).sum()

    def read(self) -> list[int]:
        _, *bad = self.solved.read()
        return [int(self.failures()), *bad]


def _rescues(plan: Plan) -> bool:
    """Whether failed samples are Newton's: those of an automatic solve on the map itself, judged by their residual."""
    return plan.acceleration == "on_demand" and plan.map == "plain" and plan.criterion == "residual"


def _rescued(outcome: Outcome, W: Tensor, batch: tuple[Tensor, ...], number: int, plan: Plan) -> Outcome:
    """The outcome of another backend, with its failed samples taken on where it is of float32 on a GPU. Where the host
    knows already how many there are, that is the ladder's task (deq/solvers/ladder.py)."""
    z, said, report = outcome
    if not (_rescues(plan) and isinstance(report, Deferred) and z.dtype == torch.float32 and z.is_contiguous()):
        return outcome
    if report.failed is not None or not (z.is_cuda and z.numel() and _library.has_cuda):
        return outcome
    with _device_of(z):
        _rescue(
            W.detach().float().contiguous(),
            batch,
            number,
            z,
            said,
            torch.empty(4, dtype=torch.int64, device=z.device),
            plan,
        )
    return Outcome(z, said, _Rescued(report, stats.status(z, said)))


@lru_cache(maxsize=1024)
def _launch(weights: int, batch: int, width: int, device: int, regime: str | None, rescues: bool) -> tuple[int, ...]:
    """The last arguments of a solve's operator: regime, kernel, blocks, blocks of the rescue (0: none) and bytes of
    scratch memory. Raises Refused where there is no kernel."""
    sizes = weights, batch, width, device
    launch, rescue = plan_launch(*sizes, regime), None
    if rescues:
        try:
            rescue = plan_rescue(*sizes)
        except Refused as error:
            _tell(str(error), UNRESCUED)
    blocks, scratch = (0, 0) if rescue is None else (rescue.blocks, rescue.scratch)
    return launch.regime, launch.kernel, launch.blocks, blocks, max(launch.scratch, scratch)


@lru_cache(maxsize=2)
def _operator(name: str) -> Callable[..., None]:
    return getattr(torch.ops.deq, name).default


@lru_cache(maxsize=64)
def _none_of(device: torch.device, dims: int) -> Tensor:
    """Without elements: a tensor that there is not."""
    with torch.inference_mode(False):
        return torch.empty((0,) * dims, device=device)


def _rescue(
    W: Tensor, batch: tuple[Tensor, ...], number: int, z: Tensor, said: Tensor, report: Tensor, plan: Plan
) -> None:
    """Newton's method for the samples that ``said`` calls failed, in place. One that cannot be launched leaves them."""
    c, *mask = batch
    try:
        launch = plan_rescue(W.shape[0] if W.dim() == 3 else 1, *c.shape[-2:], c.device.index)
        if launch is None:
            return
        torch.ops.deq.cuda_rescue_.default(
            W,
            c,
            mask[0] if mask else _none_of(c.device, c.dim()),
            z,
            said,
            report,
            max(number, 0),
            int(bool(mask) and number >= 0),
            plan.tol,
            plan.max_iter,
            launch.blocks,
            launch.scratch,
        )
    except RuntimeError as error:  # Refused is one
        _tell(str(error), UNRESCUED)


def _regime(c: Tensor, plan: Plan) -> str | None:
    """None for what goes elsewhere: what Triton is expected to solve sooner, and the plain solver, whose path rounded
    increments would leave."""
    if plan.acceleration == "none" or c.numel() == 0 or c.dtype == torch.float64:
        return None
    return regime_for(c.shape[-1], c.shape[-2], c.device.index)


def _elsewhere(c: Tensor) -> ModuleType:
    if c.dtype == torch.float64 or _triton.why_not(str(c.device)):
        return reference
    from . import triton  # takes a second to import

    return triton


def _device_of(c: Tensor) -> AbstractContextManager:
    """Its GPU as the current one. The library leaves none behind as torch does, which gives a thread its device back
    without opening a context there: one takes half a gigabyte of a GPU that nobody uses."""
    here = not c.is_cuda or torch.cuda.current_device() == c.device.index
    return nullcontext() if here else torch.cuda.device(c.device)


def _tell(reason: str, what: str = "the CUDA engine could not run, another backend solves") -> None:
    if reason not in _told:
        _told.add(reason)
        warnings.warn(f"{what}: {reason}", RuntimeWarning, stacklevel=4)


def _run(
    operator: str,
    W: Tensor,
    batch: tuple[Tensor, ...],
    start: Tensor | None,
    number: int,
    plan: Plan,
    out: Tensor | None,
    regime: str | None,
) -> Outcome:
    """One call of an operator of csrc/torch_cuda_ops.cpp; raises Refused where it cannot be launched.

    Every operator of torch takes the host 2 to 5 us here, whether there is anything for it to do or not: so there are
    two, both of them allocations.
    """
    c, weight = batch[0], W
    launch = _launch(W.shape[0] if W.dim() == 3 else 1, *c.shape[-2:], c.device.index, regime, _rescues(plan))
    if c.dtype != torch.float32:
        W, start, *batch = (t if t is None else t.float() for t in (W, start, *batch))
    z = torch.empty_like(batch[0], memory_format=torch.contiguous_format)
    said = stats.allocate(z, REPORT_BYTES)
    try:
        _operator(operator)(
            W.detach() if W.requires_grad else W,
            *batch,
            _none_of(c.device, c.dim()) if start is None else start,
            z,
            said,
            number,
            *_options(plan, False),
            *launch,
        )
    except RuntimeError as error:
        raise Refused(str(error)) from error
    if c.dtype != torch.float32:
        z = rounded(z, said, c.dtype)[0]
    return Outcome(z if out is None else out.copy_(z), said, _Report(z.numel() // z.shape[-1], said, weight))
