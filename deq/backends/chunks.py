"""Repeats a turn of GPU kernels until the device says that it is done, without waiting for it.

A chunk of turns is captured once in a CUDA graph and replayed; what goes before is part of the first, what goes after a
graph of its own, since a launch by Triton takes the host ten times as long as a replay. After every chunk the numbers
of samples at work and of those that failed are copied to pinned memory, and the host looks at them one chunk later: the
device always has a chunk to go on with, and chunks beyond the last cost their empty kernels only. So the host learns
without further waiting whether all is well (deq/solvers/ladder.py). Inside a capture of the caller's own nothing can be
looked at, and all turns that are allowed are launched. Triton's interpreter works on the host, which then looks after
every turn.
"""

import ctypes
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from functools import partial

import torch
from torch import Tensor

from deq.kernels import records

KEPT = 64  # loops of different shapes, with graphs of some tens of kilobytes

_loops: OrderedDict[Hashable, "Loop"] = OrderedDict()
_lock = threading.Lock()
_streams: dict[torch.device, torch.cuda.Stream] = {}  # that graphs are captured on, one at a time
_capturing = threading.Lock()
_NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING: else what others launch on the default stream would end the capture


class Loop:
    """The captured chunks of a shape and what they need beyond the tensors of a solve.

    table: (32,) int64 on the device, the addresses that the captured kernels look up; lock: held from :meth:`fill` to
    the last launch, as the next solve of the shape fills it anew.
    """

    def __init__(self, device: torch.device):
        with torch.inference_mode(False):  # what was made in that mode could not be written to outside of it
            self.table = torch.zeros(32, dtype=torch.int64, device=device)
        self.lock = threading.Lock()
        self._graphs: dict[Hashable, torch.cuda.CUDAGraph] = {}
        self._seen: list[tuple[Tensor, torch.cuda.Event]] = []
        self._compiled: set[str] = set()

    def fill(self, addresses: list[int]) -> None:
        """Write the table: by a copy, in the order of the stream as kernels are, of memory that is read before it
        returns. In a capture, which would read that memory at every replay, and at first, so that it is compiled when a
        capture comes, by a kernel that is handed the addresses; it takes the host ten times as long."""
        if self._graphs and not torch.cuda.is_current_stream_capturing():
            self.table[: len(addresses)].copy_(torch.tensor(addresses, device="cpu"), non_blocking=True)
        else:
            records.bind_kernel[(1,)](self.table, *addresses, enable_fp_fusion=True)

    def repeat(
        self,
        begin: Callable[[], None],
        turn: Callable[[int], None],
        end: Callable[[], None],
        turns: int,
        period: int,
        chunk: int,
        counters: Tensor,
    ) -> int | None:
        """Launch ``begin()``, then ``turn(0)``, ``turn(1)``, ... until no sample is at work or ``turns`` were launched,
        and at most a chunk more, then ``end()``. Launches of turns that differ by ``period`` are the same: turn gets
        the remainder. All that they launch depends on nothing but what the loop was found by, and the table.

        counters (2,) int32: samples at work, and those that failed. Returns the latter after the last turn, None where
        they were not looked at.
        """
        if counters.device.type == "cpu":
            begin()
            for t in range(turns):
                if int(counters[0]) == 0:
                    break
                turn(t % period)
            failed = int(counters[1])
            end()
            return failed
        if turns <= chunk or torch.cuda.is_current_stream_capturing():
            _in_order(begin, turn, range(turns), period)
            end()
            return None
        if not self._seen:
            with torch.inference_mode(False):
                pinned = torch.empty(2, 2, dtype=torch.int32, device="cpu", pin_memory=True)
            self._seen = [(pinned[i], torch.cuda.Event()) for i in range(2)]
        stream = torch.cuda.current_stream(counters.device)
        chunks = -(-turns // chunk)
        failed = None
        for i in range(chunks + 1):
            if i < chunks:
                first, before = i * chunk % period, begin if i == 0 else None
                launch = partial(_in_order, before, turn, range(first, first + chunk), period)
                self._launch("turns", (i == 0, first), launch)
                numbers, event = self._seen[i % 2]
                numbers.copy_(counters, non_blocking=True)
                event.record(stream)
            if i > 0:
                numbers, event = self._seen[(i - 1) % 2]
                event.synchronize()
                working, at_fault = numbers.tolist()
                if working == 0:
                    failed = at_fault
                    break
        self._launch("end", "end", end)
        return failed

    def _launch(self, kind: str, key: Hashable, launch: Callable[[], None]) -> None:
        if key in self._graphs:
            self._graphs[key].replay()
        elif kind in self._compiled:
            self._graphs[key] = _captured(launch, self.table.device)
            self._graphs[key].replay()
        else:  # what is not compiled yet a capture could not load
            launch()
            self._compiled.add(kind)


def _in_order(begin: Callable[[], None] | None, turn: Callable[[int], None], turns: range, period: int) -> None:
    if begin is not None:
        begin()
    for t in turns:
        turn(t % period)


def _captured(launch: Callable[[], None], device: torch.device) -> torch.cuda.CUDAGraph:
    # torch.cuda.graph() would synchronise the device and empty its cache first.
    graph = torch.cuda.CUDAGraph()
    with _capturing, torch.cuda.stream(_own_stream(device)):
        graph.capture_begin(capture_error_mode="thread_local")
        try:
            launch()
        finally:
            graph.capture_end()
    return graph


def _own_stream(device: torch.device) -> torch.cuda.Stream:
    """A stream that nobody else has. torch.cuda.Stream hands out those of a pool, again and again, and what another
    thread launches meanwhile on one of them would become part of the graph, and not be done. One of them where the
    driver makes none."""
    if device not in _streams:
        stream = ctypes.c_void_p()
        error = ctypes.CDLL("libcuda.so.1").cuStreamCreate(ctypes.byref(stream), _NON_BLOCKING)
        own = None if error else torch.cuda.ExternalStream(stream.value, device=device)
        _streams[device] = own or torch.cuda.Stream(device)
    return _streams[device]


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
