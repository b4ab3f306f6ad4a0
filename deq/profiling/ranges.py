"""What the engine is doing, for tools: NVTX ranges in one domain, "deq", and our own recorders.

``listening`` is false, and a range costs the reading of it, unless a tool such as Nsight Systems was attached when the
process started or a recorder is in use. Hot code asks before it calls::

    if ranges.listening:
        return ranges.call("solve", function, *arguments)
    return function(*arguments)

Range names: solve, adjoint, dW; in the compiled library pack, step, anchor, Anderson (csrc/cpu/trace.h); of an
experiment its phases (:func:`phase`). The message of a range holds m and B, its payload is B; a mark after a solve has
the most evaluations of any sample as payload, for tensors of the CPU: those of a GPU are not waited for.
"""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TypeVar

import torch
from torch import Tensor

from .. import stats
from ..plan import Plan

try:
    import nvtx
except ImportError:  # ranges then reach recorders only
    nvtx = None

T = TypeVar("T")

COLOURS = {"solve": "blue", "adjoint": "green", "dW": "yellow"}
_domain = nvtx.get_domain("deq") if nvtx else None
_has_tool = nvtx is not None and isinstance(_domain, nvtx.Domain)  # else a dummy that does nothing
_recorders: tuple["Recorder", ...] = ()
listening = _has_tool


@dataclass(frozen=True)
class Event:
    """One range that has ended. ``start`` and ``end`` in nanoseconds of time.perf_counter_ns; ``shape`` (..., B, m) of
    what was solved, or None, and ``element``, bytes of an element of it; ``iterations`` (...) of its samples, or None;
    ``plan`` of a solve; ``thread`` as threading.get_native_id; ``depth``: ranges of the same thread around it."""

    name: str
    start: int
    end: int
    thread: int
    depth: int
    shape: tuple[int, ...] | None = None
    iterations: Tensor | None = None
    element: int = 0
    plan: Plan | None = None


@dataclass
class Recorder:
    """Collects events of all threads between :func:`record`'s entry and exit."""

    events: list[Event] = field(default_factory=list)


@contextmanager
def record() -> Iterator[Recorder]:
    """Everything that is done inside, in any thread, is recorded."""
    global _recorders, listening
    recorder = Recorder()
    _recorders = (*_recorders, recorder)
    listening = True
    try:
        yield recorder
    finally:
        _recorders = tuple(r for r in _recorders if r is not recorder)
        listening = _has_tool or bool(_recorders)


_depth = threading.local()


def call(name: str, function: Callable[..., T], *arguments) -> T:
    """``function(*arguments)`` inside a range. Its second argument is the injection; where it returns an Outcome of
    :mod:`deq.backends` or a Solution, the range has iterations."""
    if torch.compiler.is_compiling():
        return function(*arguments)
    with _range(name, arguments[1]) as ended:
        result = function(*arguments)
        if hasattr(result, "stats") and not torch._C._are_functorch_transforms_active():
            ended["iterations"] = stats.iterations(result.z, result.stats)
            ended["plan"] = getattr(result, "plan", None) or next(a for a in arguments if isinstance(a, Plan))
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
    depth = getattr(_depth, "value", 0)
    _depth.value = depth + 1
    about = {} if injection is None else {"shape": tuple(injection.shape), "element": injection.element_size()}
    if _has_tool:
        _domain.push_range(_attributes(name, about.get("shape")))
    start = time.perf_counter_ns()
    try:
        yield about
    finally:
        end = time.perf_counter_ns()
        _depth.value = depth
        if _has_tool:
            _domain.pop_range()
            iterations = about.get("iterations")
            if iterations is not None and iterations.is_cpu and iterations.numel():
                most = int(iterations.max())
                _domain.mark(_domain.get_event_attributes(message=f"{name} iterations", payload=most))
        if _recorders:
            event = Event(name, start, end, threading.get_native_id(), depth, **about)
            for recorder in _recorders:
                recorder.events.append(event)


@lru_cache(maxsize=1024)
def _attributes(name: str, shape: tuple[int, ...] | None):
    message, payload = name, None
    if shape is not None and len(shape) >= 2:
        message, payload = f"{name} m={shape[-1]} B={shape[-2]}", shape[-2]
    return _domain.get_event_attributes(message=message, color=COLOURS.get(name, "white"), payload=payload)
