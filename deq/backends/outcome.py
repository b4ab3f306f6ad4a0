"""What a backend returns."""

from typing import NamedTuple

from torch import Tensor


class Outcome(NamedTuple):
    """z or u (..., m), and what is said of its samples, a buffer of :mod:`deq.stats`."""

    z: Tensor
    stats: Tensor
