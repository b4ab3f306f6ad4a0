"""Where the memory of a solve goes: by theory, and what the process really takes."""

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from .. import _library, cache, recycle

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
RESET_PEAK = "5"  # see proc(5): sets VmHWM to VmRSS


@dataclass(frozen=True)
class Solved:
    """One solve or adjoint: the shape (..., B, m) of its injection, its dtype, whether W is trained, and whether it
    has a Plan: of ``deq.fixed_point`` the shape is that of the state, and its memory is that of f."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    trains_weight: bool = False
    is_planned: bool = True

    @property
    def element(self) -> int:
        """Bytes of an element."""
        return self.dtype.itemsize

    @property
    def buffer(self) -> int:
        """Bytes of B x m elements."""
        return self._samples * self.shape[-1] * self.element

    @property
    def statistics(self) -> int:
        """Residual, iterations and status of every sample (deq/stats.py)."""
        return self._samples * ((8 if self.element == 8 else 4) + 4 + 1)

    @property
    def weight(self) -> int:
        stacked = self.shape[0] if len(self.shape) == 3 else 1
        return stacked * self.shape[-1] ** 2 * self.element

    @property
    def _samples(self) -> int:
        count = 1
        for size in self.shape[:-1]:
            count *= size
        return count


def forward_bytes(solves: Sequence[Solved]) -> int | None:
    """z and the statistics of every solve: what is allocated and what is kept for the backward pass. None where one has
    no theory."""
    if not all(s.is_planned for s in solves):
        return None
    return sum(s.buffer + s.statistics for s in solves)


def backward_bytes(solves: Sequence[Solved], adjoints: Sequence[Solved]) -> int | None:
    """The peak of both passes: every z, then u, which is the gradient of c, and the gradient of W. An adjoint's
    statistics are freed before the gradient of W is formed, and its u is kept."""
    held = most = forward_bytes(solves)
    if held is None or not all(s.is_planned for s in adjoints):
        return None
    for s in adjoints:
        held += s.buffer
        most = max(most, held + s.statistics, held + s.weight * s.trains_weight)
        held += s.weight * s.trains_weight
    return most


def packed_bytes() -> int:
    """Held between calls for weights seen lately: packed for the kernels, inverses, factorisations."""
    compiled = 0 if _library.compiled is None else _library.compiled.deq_cpu_cache_bytes()
    return compiled + cache.held()


def can_measure() -> bool:
    """Whether the peak of the process can be read (Linux)."""
    return CLEAR.exists()


def peak_of(run: Callable[[], object]) -> int:
    """Bytes by which the resident set grew at most while ``run`` ran. Linux only.

    What was kept of earlier work is given back first, so that it cannot serve ``run`` unnoticed.
    """
    recycle.clear()
    ctypes.CDLL(None).malloc_trim(0)
    CLEAR.write_text(RESET_PEAK)
    before = resident()
    result = run()
    peak = _status("VmHWM") - before
    del result
    return peak


def resident() -> int:
    """Bytes of the process that are in memory now. Linux only."""
    return _status("VmRSS")


def device_peak_of(run: Callable[[], object], device: torch.device) -> int:
    """The same on a GPU, by torch's allocator."""
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    result = run()
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device) - before
    del result
    return peak


def _status(field: str) -> int:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(field + ":"))
    return 1024 * int(line.split()[1])
