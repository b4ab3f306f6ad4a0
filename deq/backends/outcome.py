"""What a backend returns."""

from __future__ import annotations

import weakref
from typing import NamedTuple

import torch
from torch import Tensor


class Outcome(NamedTuple):
    """z or u (..., m); what is said of its samples, a buffer of :mod:`deq.stats`; and the report of the call, four
    numbers: samples that failed, then one plus the flat index of the first non-finite element of W, sample of c and
    sample of z0, 0 where there is none. A GPU's report is not read before it is asked for; and there is none where
    nothing can be read: inside a compiled graph."""

    z: Tensor
    stats: Tensor
    report: list[int] | Deferred | None


class Deferred:
    """A report that is still on a GPU.

    parts: for every stretch of samples (its counters, see kernels/records.py; index of its first sample; its samples).
    W: (m, m) or (S, m, m); not kept alive, so that a weight that is gone when the report is read passes for finite.
    """

    def __init__(self, parts: list[tuple[Tensor, int, int]], W: Tensor):
        self.parts, self.weight = parts, weakref.ref(W)

    def read(self) -> list[int]:
        """The four numbers; waits for the device."""
        W = self.weight()
        bad = [0 if W is None else first_bad(~torch.isfinite(W)), 0, 0]
        failed = 0
        for counters, first, samples in self.parts:
            _, failures, *places = counters[:4].tolist()
            failed += failures
            for i, place in enumerate(places, 1):
                if place and not bad[i]:
                    bad[i] = first + samples - place + 1
        return [failed, *bad]


def first_bad(bad: Tensor) -> int:
    """One plus the flat index of the first true element, 0 if there is none."""
    index = bad.reshape(-1).nonzero()
    return int(index[0]) + 1 if index.numel() else 0
