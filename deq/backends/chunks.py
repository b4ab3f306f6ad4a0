"""Repeats a turn of GPU kernels until the device says that it is done, without waiting for it.

Turns are captured once, CHUNK of them in a CUDA graph, and replayed. After every chunk the number of samples at work is
copied to pinned memory, and the host looks at it one chunk later: the device always has a chunk to go on with, and
chunks beyond the last cost their empty kernels only. Inside a capture of the caller's own nothing can be looked at, and
all turns that are allowed are launched. Triton's interpreter works on the host, which then looks after every turn.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable

import torch
from torch import Tensor

KEPT = 64  # graphs of different shapes, each some tens of kilobytes
LEAST_CHUNK = 8

_loops: OrderedDict[Hashable, "Loop"] = OrderedDict()
_lock = threading.Lock()


class Loop:
    """One captured chunk and what it needs beyond the tensors of a solve.

    table: (16,) int64 on the device, the addresses that the captured kernels look up; lock: held from the filling of
    the table to the last launch, as the next solve of the shape fills it anew.
    """

    def __init__(self, device: torch.device):
        self.table = torch.zeros(16, dtype=torch.int64, device=device)
        self.lock = threading.Lock()
        self._graph: torch.cuda.CUDAGraph | None = None
        self._seen: list[tuple[Tensor, torch.cuda.Event]] = []

    def repeat(self, turn: Callable[[int], None], turns: int, period: int, working: Tensor) -> None:
        """Launch ``turn(0)``, ``turn(1)``, ... until ``working`` (int32, one element) is 0 or ``turns`` were launched.

        Launches of turns that differ by ``period`` must be the same.
        """
        device = self.table.device
        if device.type == "cpu":
            for t in range(turns):
                if int(working) == 0:
                    return
                turn(t % period)
            return
        chunk = -(-LEAST_CHUNK // period) * period
        if turns <= chunk or torch.cuda.is_current_stream_capturing():
            for t in range(turns):
                turn(t % period)
            return
        if not self._seen:
            pinned = torch.empty(2, dtype=torch.int32, pin_memory=True)
            self._seen = [(pinned[i : i + 1], torch.cuda.Event()) for i in range(2)]
        for i in range(-(-turns // chunk)):
            if i == 0 and self._graph is None:  # compiles what is not compiled yet, which a capture cannot
                for t in range(chunk):
                    turn(t % period)
            else:
                if self._graph is None:
                    self._graph = _capture(turn, chunk, period, device)
                self._graph.replay()
            number, event = self._seen[i % 2]
            number.copy_(working, non_blocking=True)
            event.record()
            if i > 0:
                number, event = self._seen[(i - 1) % 2]
                event.synchronize()
                if int(number) == 0:
                    return


def _capture(turn: Callable[[int], None], chunk: int, period: int, device: torch.device) -> torch.cuda.CUDAGraph:
    # torch.cuda.graph() would synchronise the device and empty its cache first.
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(torch.cuda.Stream(device)):
        graph.capture_begin(capture_error_mode="thread_local")
        try:
            for t in range(chunk):
                turn(t % period)
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
