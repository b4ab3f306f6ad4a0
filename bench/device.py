"""What differs between a GPU and the CPU when something is timed.

On the CPU everything here is the plain thing, so that a benchmark for GPUs runs there too, from end to end.
"""

import time
from collections.abc import Callable

import torch

WARM_UPS = 3  # before a capture: libraries choose their algorithms and allocate in the first calls
SPIN_CYCLES = 40_000_000  # 20 ms or so, in which the host runs ahead


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all that was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def clock(device: torch.device) -> Callable[[], float]:
    """A clock in seconds that waits for the device: a call between two readings is timed to its end."""

    def read() -> float:
        synchronize(device)
        return time.perf_counter()

    return read


def capture(run: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """``run`` as one CUDA graph, captured after a few warm-up calls; ``run`` itself on the CPU.

    run must not wait for the device, and reads and writes the same tensors each time.
    """
    if device.type != "cuda":
        return run
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for _ in range(WARM_UPS):
            run()
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def device_seconds(run: Callable[[], object], device: torch.device, calls: int) -> float:
    """Seconds a call takes the device alone: the host queues the calls while the device spins. On the CPU, and for a
    ``run`` that waits for the device, the time of the calls by the clock."""
    if device.type != "cuda":
        start = time.perf_counter()
        for _ in range(calls):
            run()
        return (time.perf_counter() - start) / calls
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    torch.cuda._sleep(SPIN_CYCLES)
    first.record()
    for _ in range(calls):
        run()
    last.record()
    torch.cuda.synchronize(device)
    return first.elapsed_time(last) / 1e3 / calls
