"""What a backend returns."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..solution import Status


class Outcome(NamedTuple):
    """z or u (..., m); what is said of its samples, a buffer of :mod:`deq.stats`; and the report of the call, four
    numbers: samples that failed, then one plus the flat index of the first non-finite element of W, sample of c and
    sample of z0, 0 where there is none. A GPU's report is not read before it is asked for, and there is none out of
    torch.func.vmap, nor of a rung that tells every sample by itself."""

    z: Tensor
    stats: Tensor
    report: list[int] | Deferred | None


class Part(NamedTuple):
    """What a GPU says of a stretch of samples.

    counters: see kernels/records.py. first: index of the first sample. samples: how many. failed: those that failed,
    where the host has seen it on the way, None where it would have to wait to know.
    """

    counters: Tensor
    first: int
    samples: int
    failed: int | None


class Deferred:
    """A report that is still on a GPU.

    parts: of all samples. W: (m, m) or (S, m, m); not kept alive, so that a weight that is gone when the report is
    read, or was written to by then, as by an optimiser, passes for finite. rescue: None, or what takes the samples that
    failed to other means, once (deq/solvers/ladder.py).
    """

    parts: Sequence[Part] = ()
    weight: Callable[[], Tensor | None] = staticmethod(lambda: None)
    rescue: Callable[[], None] | None = None

    def __init__(self, parts: Sequence[Part], W: Tensor):
        self.parts, self.weight = parts, unchanged(W)

    @property
    def samples(self) -> int:
        return sum(part.samples for part in self.parts)

    @property
    def failed(self) -> int | None:
        """Samples that failed, None where that is not known without waiting."""
        known = [part.failed for part in self.parts]
        return None if None in known or not known else sum(known)

    def failures(self) -> Tensor:
        """Samples that failed, on the device, without waiting for it."""
        return torch.stack([part.counters[1] for part in self.parts]).sum()

    def read(self) -> list[int]:
        """The four numbers; waits for the device."""
        W = self.weight()
        bad = [0 if W is None else first_bad(~torch.isfinite(W)), 0, 0]
        failed = 0
        for counters, first, samples, _ in self.parts:
            _, failures, *places = counters[:4].tolist()
            failed += failures
            for i, place in enumerate(places, 1):
                if place and not bad[i]:
                    bad[i] = first + samples - place + 1
        return [failed, *bad]


class Settled(Deferred):
    """The report of a solve on a GPU that had to be read there: it is told where others are, with the status."""

    def __init__(self, numbers: list[int], samples: int, W: Tensor):
        super().__init__([], W)
        self._numbers, self._samples = numbers, samples

    @property
    def samples(self) -> int:
        return self._samples

    @property
    def failed(self) -> int:
        return self._numbers[0]

    def read(self) -> list[int]:
        return self._numbers


class Counted(Deferred):
    """The report of a direct method, read from the statuses (...) on the GPU: a sample that is not finite says so."""

    def __init__(self, status: Tensor, W: Tensor):
        super().__init__([], W)
        self._status = status

    @property
    def samples(self) -> int:
        return self._status.numel()

    def failures(self) -> Tensor:
        return (self._status != Status.CONVERGED).sum()

    def read(self) -> list[int]:
        W = self.weight()
        failed = int(self.failures())
        bad = 0 if W is None or not failed else first_bad(~torch.isfinite(W))
        return [failed, bad, first_bad(self._status == Status.NONFINITE) if failed else 0, 0]


def unchanged(W: Tensor) -> Callable[[], Tensor | None]:
    """What gives W as long as it is there and nobody has written to it."""
    found, version = weakref.ref(W), version_of(W)

    def weight() -> Tensor | None:
        W = found()
        return W if W is not None and version_of(W) == version else None

    return weight


def version_of(t: Tensor) -> int:
    """How often it was written to; tensors of inference mode do not count."""
    return 0 if t.is_inference() else t._version


def first_bad(bad: Tensor) -> int:
    """One plus the flat index of the first true element, 0 if there is none."""
    index = bad.reshape(-1).nonzero()
    return int(index[0]) + 1 if index.numel() else 0
