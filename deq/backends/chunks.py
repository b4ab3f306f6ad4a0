"""Repeats a turn of GPU kernels until the device says that it is done, without waiting for it.

A chunk of turns is captured once in a CUDA graph and replayed. After every chunk the numbers of samples at work and of
those that failed are copied to pinned memory, and the host looks at them one chunk later: the device always has a chunk
to go on with, and chunks beyond the last cost their empty kernels only. So the host learns without further waiting
whether all is well (deq/solvers/ladder.py). Inside a capture of the caller's own nothing can be looked at, and
all turns that are allowed are launched. Triton's interpreter works on the host, which then looks after every turn.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable

import torch
from torch import Tensor

KEPT = 64  # loops of different shapes, with graphs of some tens of kilobytes

_loops: OrderedDict[Hashable, "Loop"] = OrderedDict()
_lock = threading.Lock()


class Loop:
    """The captured chunks of a shape and what they need beyond the tensors of a solve.

    table: (32,) int64 on the device, the addresses that the captured kernels look up; lock: held from the filling of
    the table to the last launch, as the next solve of the shape fills it anew.
    """

    def __init__(self, device: torch.device):
        self.table = torch.zeros(32, dtype=torch.int64, device=device)
        self.lock = threading.Lock()
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}  # by the first turn
        self._seen: list[tuple[Tensor, torch.cuda.Event]] = []
        self._is_compiled = False

    def repeat(self, turn: Callable[[int], None], turns: int, period: int, chunk: int, counters: Tensor) -> int | None:
        """Launch ``turn(0)``, ``turn(1)``, ... until no sample is at work or ``turns`` were launched, and at most a
        chunk more. Launches of turns that differ by ``period`` are the same: turn gets the remainder.

        counters (2,) int32: samples at work, and those that failed. Returns the latter in the end, None where they were
        not looked at.
        """
        if counters.device.type == "cpu":
            for t in range(turns):
                if int(counters[0]) == 0:
                    break
                turn(t % period)
            return int(counters[1])
        if turns <= chunk or torch.cuda.is_current_stream_capturing():
            for t in range(turns):
                turn(t % period)
            return None
        if not self._seen:
            pinned = torch.empty(2, 2, dtype=torch.int32, pin_memory=True)
            self._seen = [(pinned[i], torch.cuda.Event()) for i in range(2)]
        chunks = -(-turns // chunk)
        for i in range(chunks + 1):
            if i < chunks:
                self._launch(turn, i * chunk % period, period, chunk)
                numbers, event = self._seen[i % 2]
                numbers.copy_(counters, non_blocking=True)
                event.record()
            if i > 0:
                numbers, event = self._seen[(i - 1) % 2]
                event.synchronize()
                working, failed = numbers.tolist()
                if working == 0:
                    return failed
        return None

    def _launch(self, turn: Callable[[int], None], first: int, period: int, chunk: int) -> None:
        def launch() -> None:
            for t in range(first, first + chunk):
                turn(t % period)

        if not self._is_compiled:  # what is not compiled yet a capture could not load
            launch()
            self._is_compiled = True
            return
        if first not in self._graphs:
            self._graphs[first] = _captured(launch, self.table.device)
        self._graphs[first].replay()


def _captured(launch: Callable[[], None], device: torch.device) -> torch.cuda.CUDAGraph:
    # torch.cuda.graph() would synchronise the device and empty its cache first.
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(torch.cuda.Stream(device)):
        graph.capture_begin(capture_error_mode="thread_local")
        try:
            launch()
        finally:
            graph.capture_end()
    return graph


def loop_of(key: Hashable, device: torch.device) -> Loop:
    """The loop of a shape (and of everything else that its launches depend on) on the current stream."""
    if device.type == "cuda":
        if torch.cuda.is_current_stream_capturing():  # the caller's graph keeps the table for itself
            return Loop(device)
        key = (key, torch.cuda.current_stream(device).cuda_stream)
    key = (device, threading.get_ident() if device.type == "cpu" else 0, key)
    with _lock:
        loop = _loops.pop(key, None) or Loop(device)
        _loops[key] = loop
        while len(_loops) > KEPT:
            _loops.popitem(last=False)
    return loop
