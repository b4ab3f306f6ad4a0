"""The steps of :mod:`.torch_steps` in the compiled library (csrc/vector.h): CPU, float32 and float64, a call a step.

A call costs 2 us besides its memory traffic, where the same in torch operators costs 300 to 600 us.
"""

import ctypes
import itertools

import torch
from torch import Tensor

from ... import _library
from .rule import Rule
from .torch_steps import RUNNING

_METHODS = {"plain": 0, "anderson": 1, "auto": 2, "broyden": 3}
_MEASURES = {"residual": 0, "error": 1, "absolute": 2}
_DEEPEST = {"plain": 2**31, "anderson": 8, "auto": 8, "broyden": 32}


class _DeqSteps(ctypes.Structure):
    """DeqSteps of csrc/vector.h."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("batch", "width")),
        *((name, ctypes.c_int32) for name in ("type", "method", "measure", "depth", "threads", "affine")),
        *((name, ctypes.c_double) for name in ("damping", "tol", "leave")),
        *((name, ctypes.c_int64) for name in ("max_iter", "evaluations")),
        *((name, ctypes.c_void_p) for name in ("y", "z", "fy", "first", "second", "samples", "sums")),
        *((name, ctypes.c_void_p) for name in ("iterations", "residual", "norms", "status")),
    )


def serves(y: Tensor, rule: Rule) -> bool:
    """Whether the compiled library can run this solve."""
    return (
        _library.compiled is not None
        and y.device.type == "cpu"
        and type(y) is Tensor
        and y.dtype in (torch.float32, torch.float64)
        and rule.depth <= _DEEPEST.get(rule.method, 0)
    )


# The history of the last solve waits for the next: memory fresh from the system costs 0.25 ms a MB to touch, as much as
# a step of 16 samples of 8192 elements takes.
KEPT_BYTES = 16 * 2**20
_spare: list[Tensor] = []


def _take(size: int) -> Tensor:
    """So many bytes or more, of any content."""
    try:
        workspace = _spare.pop()
    except IndexError:
        workspace = None
    if workspace is None or workspace.numel() < size:
        workspace = torch.empty(size, dtype=torch.uint8)
    return workspace


class CompiledSteps:
    """As TorchSteps, but that ``z`` is complete only after :meth:`collect`."""

    def __init__(self, y: Tensor, rule: Rule):
        B, D = y.shape
        library = _library.compiled
        depth = 0 if rule.method == "plain" else rule.depth
        self.y = y.clone(memory_format=torch.contiguous_format)
        self.z = torch.empty_like(self.y)
        self.iterations = torch.empty(B, dtype=torch.int32)
        self.residual = torch.empty(B, dtype=torch.float64)
        self.norms = torch.empty(B, 2, dtype=torch.float64)
        self.status = torch.full((B,), RUNNING, dtype=torch.uint8)
        history = B * depth * D * y.element_size()
        sizes = {
            "samples": B * library.deq_cpu_sample_bytes(depth),
            "sums": 8 * library.deq_cpu_step_sums(B, D, depth),
            "first": history,
            "second": history if rule.method != "broyden" else 0,
        }
        steps = self._steps = _DeqSteps(B, D)
        steps.type = 1 if y.dtype == torch.float64 else 0
        steps.method, steps.measure, steps.depth = _METHODS[rule.method], _MEASURES[rule.criterion], depth
        steps.threads, steps.affine = torch.get_num_threads(), rule.affine
        steps.damping, steps.tol, steps.leave, steps.max_iter = rule.damping, rule.tol, rule.leave, rule.max_iter
        for name in ("y", "z", "iterations", "residual", "norms", "status"):
            setattr(steps, name, getattr(self, name).data_ptr())
        starts = [0, *itertools.accumulate(-(-size // 64) * 64 for size in sizes.values())]
        self._workspace = _take(starts[-1])
        base = self._workspace.data_ptr()
        for name, start in zip(sizes, starts, strict=False):
            setattr(steps, name, base + start)
        ctypes.memset(base, 0, sizes["samples"])
        self._pointer = ctypes.byref(steps)
        self._advance = library.deq_cpu_advance
        self._running = B

    def is_running(self) -> bool:
        return self._running > 0

    def advance(self, fy: Tensor) -> None:
        fy = fy.contiguous()
        self._steps.fy = fy.data_ptr()
        self._running = self._advance(self._pointer)
        if self._running < 0:
            raise RuntimeError("deq_cpu_advance refused its arguments")

    def release(self) -> None:
        """Give the history back; nothing can be advanced any more."""
        if self._workspace.numel() <= KEPT_BYTES:
            _spare[:] = [self._workspace]

    def collect(self) -> None:
        """Bring the best images into z."""
        _library.compiled.deq_cpu_collect(self._pointer)
