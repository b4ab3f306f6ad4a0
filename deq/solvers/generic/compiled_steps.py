"""The steps of :mod:`.torch_steps` in the compiled library (csrc/vector.h): CPU, float32 and float64, a call a step.

A call costs 2 us besides its memory traffic, where the same in torch operators costs 300 to 600 us.
"""

import ctypes
import itertools

import torch
from torch import Tensor

from ... import _library
from .rule import Rule

_METHODS = {"plain": 0, "anderson": 1, "auto": 2, "broyden": 3}
_TYPES = {torch.float32: 0, torch.float64: 1}
_MEASURES = {"residual": 0, "error": 1, "absolute": 2}
_DEEPEST = {"plain": 2**31, "anderson": 8, "auto": 8, "broyden": 32}


class _DeqSteps(ctypes.Structure):
    """DeqSteps of csrc/vector.h."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("batch", "width")),
        *((name, ctypes.c_int32) for name in ("type", "method", "measure", "depth", "threads", "affine")),
        *((name, ctypes.c_double) for name in ("damping", "tol", "leave")),
        *((name, ctypes.c_int64) for name in ("max_iter", "evaluations")),
        *((name, ctypes.c_void_p) for name in ("y", "z", "fy", "shift", "image", "first", "second", "samples", "sums")),
        *((name, ctypes.c_void_p) for name in ("iterations", "residual", "norms", "status")),
        ("failed", ctypes.c_int64),
    )


def serves(y: Tensor, rule: Rule) -> bool:
    """Whether the compiled library can run this solve."""
    return (
        _library.compiled is not None
        and y.device.type == "cpu"
        and type(y) is Tensor
        and y.dtype in _TYPES
        and rule.depth <= _DEEPEST.get(rule.method, 0)
    )


def norm(x: Tensor) -> float:
    """The 2-norm of all elements: NaN or infinity where one of them is, or where it overflows.

    In the compiled library where that can: torch's costs 15 us where caches are cold.
    """
    dtype = _TYPES.get(x.dtype)
    plain = type(x) is Tensor and x.device.type == "cpu" and x.is_contiguous()
    if dtype is None or not plain or _library.compiled is None:
        return float(torch.linalg.vector_norm(x))
    return _library.compiled.deq_cpu_norm(x.data_ptr(), x.numel(), dtype)


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
        workspace = torch.empty(size, dtype=torch.uint8, device="cpu")  # whatever the default device is
    return workspace


class _Frame:
    """DeqSteps for solves of one kind, without what is different in each of them."""

    def __init__(self, B: int, D: int, dtype: torch.dtype, rule: Rule, shifted: bool, threads: int):
        self.places, self.size = _places(B, D, dtype.itemsize, rule, shifted)
        self._base = None  # of the workspace
        self.steps = _DeqSteps(
            B,
            D,
            _TYPES[dtype],
            _METHODS[rule.method],
            _MEASURES[rule.criterion],
            0 if rule.method == "plain" else rule.depth,
            threads,
            rule.affine,
            rule.damping,
            rule.tol,
            rule.leave,
            rule.max_iter,
        )
        self.pointer = ctypes.byref(self.steps)

    def use(self, workspace: Tensor) -> None:
        base = workspace.data_ptr()
        if base != self._base:
            self._base, steps = base, self.steps
            steps.image, steps.first, steps.second, steps.samples, steps.sums = (base + place for place in self.places)


# Those that no solve uses: to make one costs 30 us where caches are cold, twice in a training step.
_frames: dict[tuple, _Frame] = {}
MOST_FRAMES = 64


def _places(B: int, D: int, element: int, rule: Rule, shifted: bool) -> tuple[tuple[int, ...], int]:
    """Where image, first, second, samples and sums of DeqSteps begin in a workspace, and the bytes of all."""
    depth = 0 if rule.method == "plain" else rule.depth
    library, state = _library.compiled, B * D * element
    sizes = (
        state if shifted else 0,
        state * depth,
        state * depth if rule.method != "broyden" else 0,
        B * library.deq_cpu_sample_bytes(depth),
        8 * library.deq_cpu_step_sums(B, D, depth),
    )
    starts = tuple(itertools.accumulate((-(-size // 64) * 64 for size in sizes), initial=0))
    return starts[:-1], starts[-1]


class CompiledTold:
    """As Told, in one allocation of which views are made when they are read: each costs 5 us where caches are cold."""

    def __init__(self, B: int):
        self._batch, self._buffer = B, torch.empty(29 * B, dtype=torch.uint8, device="cpu")
        self.failed = 0  # samples that are done without having converged

    def is_converged(self) -> bool:
        return not self.failed

    def pointers(self) -> tuple[int, ...]:
        """Of iterations, residual, norms and status."""
        start, B = self._buffer.data_ptr(), self._batch
        return start + 24 * B, start, start + 8 * B, start + 28 * B

    @property
    def residual(self) -> Tensor:
        return self._part(torch.float64, 0, 8)

    @property
    def norms(self) -> Tensor:
        return self._part(torch.float64, 8, 24).view(-1, 2)

    @property
    def iterations(self) -> Tensor:
        return self._part(torch.int32, 24, 28)

    @property
    def status(self) -> Tensor:
        return self._part(torch.uint8, 28, 29)

    def _part(self, dtype: torch.dtype, start: int, end: int) -> Tensor:
        return self._buffer[start * self._batch : end * self._batch].view(dtype)


class CompiledSteps:
    """As TorchSteps, but that ``z`` is complete only after :meth:`collect`.

    shift: (B, D), what is missing in every f(y) that :meth:`advance` is given. owned: whether y may be overwritten.
    """

    def __init__(self, y: Tensor, rule: Rule, shift: Tensor | None = None, owned: bool = False):
        B, D = y.shape
        self.y = y = y.contiguous().resolve_neg() if owned else y.clone(memory_format=torch.contiguous_format)
        self.z = torch.empty_like(self.y)
        self.told = CompiledTold(B)
        self._key = key = B, D, y.dtype, rule, shift is not None, torch.get_num_threads()
        self._frame = frame = _frames.pop(key, None) or _Frame(*key)
        self._workspace = _take(frame.size)
        frame.use(self._workspace)
        self._shift = shift = None if shift is None else shift.contiguous().resolve_neg()
        self._steps = steps = frame.steps
        steps.evaluations = 0
        steps.y, steps.z = self.y.data_ptr(), self.z.data_ptr()
        steps.shift = None if shift is None else shift.data_ptr()
        steps.iterations, steps.residual, steps.norms, steps.status = self.told.pointers()
        self._pointer = frame.pointer
        self._advance = _library.compiled.deq_cpu_advance
        self._running = B
        self._trace: list[bytes] = []

    @property
    def norms(self) -> Tensor:
        return self.told.norms

    def is_running(self) -> bool:
        return self._running > 0

    def note(self) -> None:
        self._trace.append(ctypes.string_at(self._steps.norms, 16 * self._steps.batch))

    @property
    def trace(self) -> Tensor | None:
        if not self._trace:
            return None
        numbers = torch.frombuffer(bytearray(b"".join(self._trace)), dtype=torch.float64)
        return numbers.view(len(self._trace), -1, 2)

    def advance(self, fy: Tensor) -> None:
        fy = fy.contiguous()
        if fy.is_neg():  # a view that torch negates when it reads it; asking costs less than resolve_neg, in every step
            fy = fy.resolve_neg()
        self._running = self._advance(self._pointer, fy.data_ptr())
        if self._running < 0:
            raise RuntimeError("deq_cpu_advance refused its arguments")

    def release(self) -> None:
        """Give the history back; nothing can be advanced any more."""
        if self._workspace.numel() <= KEPT_BYTES:
            _spare[:] = [self._workspace]
        if len(_frames) >= MOST_FRAMES:
            _frames.clear()
        _frames[self._key] = self._frame

    def collect(self) -> None:
        """Bring the best images into z, and count who failed."""
        self.told.failed = self._steps.failed
        _library.compiled.deq_cpu_collect(self._pointer)
