"""What the engine is doing, for tools: NVTX ranges in one domain, "deq", and our own recorders.

``listening`` is false, and a range costs the reading of it, unless a tool such as Nsight Systems was attached when the
process started or a recorder is in use. Hot code asks before it calls::

    if ranges.listening:
        return ranges.call("solve", function, *arguments)
    return function(*arguments)

Range names: solve, adjoint (also of ``deq.fixed_point``), dW; in the compiled library pack, step, anchor, Anderson
(csrc/cpu/trace.h); of an experiment its phases (:func:`phase`). The message of a range holds m and B, its payload is B;
a mark after a solve has the most evaluations of any sample as payload, for tensors of the CPU: those of a GPU are not
waited for.
"""

import ctypes
import threading
import time
from collections import Counter as Tally
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TypeVar

import torch
from torch import Tensor

from .. import _library, stats
from ..plan import Plan
from ..solvers.generic.rule import Rule

try:
    import nvtx
except ImportError:  # ranges then reach recorders only
    nvtx = None

T = TypeVar("T")

INSIDE = ("pack", "step", "anchor", "Anderson")  # by number in csrc/cpu/trace.h
COLOURS = {"solve": "blue", "adjoint": "green", "dW": "yellow"}
_domain = nvtx.get_domain("deq") if nvtx else None
_has_tool = nvtx is not None and isinstance(_domain, nvtx.Domain)  # else a dummy that does nothing
_recorders: tuple["Recorder", ...] = ()
listening = _has_tool
_changing = threading.Lock()  # of the two: without it recorders of several threads lose each other, or stay for ever


@dataclass(frozen=True)
class Event:
    """One range that has ended. ``start`` and ``end`` in nanoseconds of time.perf_counter_ns; ``shape`` (..., B, m) of
    what was solved, or None, and its ``dtype``; ``iterations`` (...) of its samples, or None; ``plan`` of a solve, its
    Rule where it is one of any f; ``thread`` as threading.get_native_id; ``payload`` of a range in the compiled
    library: rows of a step or anchor, pairs of Anderson's window, m of what was packed."""

    name: str
    start: int
    end: int
    thread: int
    shape: tuple[int, ...] | None = None
    iterations: Tensor | None = None
    dtype: torch.dtype | None = None
    plan: Plan | Rule | None = None
    payload: int | None = None


@dataclass(repr=False)
class Recorder:
    """Collects events of all threads between :func:`record`'s entry and exit."""

    events: list[Event] = field(default_factory=list)

    def __repr__(self) -> str:
        """How many events there are of each name: an event shows its iterations and its plan, and there are many."""
        counted = ", ".join(f"{n} {name}" for name, n in Tally(event.name for event in self.events).items())
        return f"Recorder({counted or 'nothing recorded'})"


class _Span(ctypes.Structure):
    """DeqSpan of csrc/kernels.h."""

    _fields_ = (
        ("kind", ctypes.c_int32),
        ("thread", ctypes.c_int32),
        ("payload", ctypes.c_int64),
        ("start", ctypes.c_int64),
        ("end", ctypes.c_int64),
    )


@contextmanager
def record(inside: bool = False) -> Iterator[Recorder]:
    """Everything that is done inside, in any thread, is recorded; with ``inside`` what the compiled library does within
    a solve too, which then costs a microsecond a range. Of several at once only one may look inside."""
    global _recorders, listening
    library = _library.compiled if inside else None
    recorder = Recorder()
    with _changing:
        _recorders = (*_recorders, recorder)
        listening = True
    if library:
        library.deq_trace_start()
    try:
        yield recorder
    finally:
        if library:
            recorder.events += _spans(library)
        with _changing:
            _recorders = tuple(r for r in _recorders if r is not recorder)
            listening = _has_tool or bool(_recorders)


def _spans(library: ctypes.CDLL) -> list[Event]:
    spans = (_Span * library.deq_trace_stop())()
    library.deq_trace_read(ctypes.addressof(spans), len(spans))
    return [Event(INSIDE[s.kind], s.start, s.end, s.thread, payload=s.payload) for s in spans]


def call(name: str, function: Callable[..., T], *arguments) -> T:
    """``function(*arguments)`` inside a range. Its second argument is the injection, or the state that a solve of any
    f starts from; where it returns an Outcome of :mod:`deq.backends` or a Solution, alone or as the first of a tuple,
    or a Result of :mod:`deq.solvers.generic`, the range has iterations."""
    with _range(name, arguments[1]) as ended:
        result = function(*arguments)
        solved = result if hasattr(result, "stats") or not isinstance(result, tuple) else result[0]
        told, said = getattr(solved, "told", None), getattr(solved, "stats", None)
        if (told or said) is not None and not torch._C._are_functorch_transforms_active():
            ended["iterations"] = told.iterations if told else stats.iterations(solved.z, said)
            ended["plan"] = getattr(solved, "plan", None) or next(a for a in arguments if isinstance(a, (Plan, Rule)))
    return result


@contextmanager
def phase(name: str) -> Iterator[None]:
    """A range of an experiment or of user code."""
    if not listening:
        yield
        return
    with _range(name, None):
        yield


@contextmanager
def _range(name: str, injection: Tensor | None) -> Iterator[dict]:
    """Yields what its event will hold beside names and times."""
    about = {} if injection is None else {"shape": tuple(injection.shape), "dtype": injection.dtype}
    if _has_tool:
        _domain.push_range(_attributes(name, about.get("shape")))
    start = time.perf_counter_ns()
    try:
        yield about
    finally:
        end = time.perf_counter_ns()
        if _has_tool:
            _domain.pop_range()
            iterations = about.get("iterations")
            if iterations is not None and iterations.is_cpu and iterations.numel():
                most = int(iterations.max())
                _domain.mark(_domain.get_event_attributes(message=f"{name} iterations", payload=most))
        if _recorders:
            event = Event(name, start, end, threading.get_native_id(), **about)
            for recorder in _recorders:
                recorder.events.append(event)


@lru_cache(maxsize=1024)
def _attributes(name: str, shape: tuple[int, ...] | None):
    message, payload = name, None
    if shape is not None and len(shape) >= 2:
        message, payload = f"{name} m={shape[-1]} B={shape[-2]}", shape[-2]
    return _domain.get_event_attributes(message=message, color=COLOURS.get(name, "white"), payload=payload)
