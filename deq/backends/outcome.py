"""What a backend returns."""

from typing import NamedTuple

from torch import Tensor


class Outcome(NamedTuple):
    """z or u (..., m); what is said of its samples, a buffer of :mod:`deq.stats`; and the report of the call, four
    numbers: samples that failed, then one plus the flat index of the first non-finite element of W, sample of c and
    sample of z0, 0 where there is none. No report where nothing can be read: inside a compiled graph."""

    z: Tensor
    stats: Tensor
    report: list[int] | None
