"""What a backend returns."""

from typing import NamedTuple

from torch import Tensor


class Outcome(NamedTuple):
    """z or u (..., m); iterations, residual, status (...); report int64 (4,): samples that failed, then one plus the
    flat index of the first non-finite element of W, sample of c and sample of z0, 0 where there is none."""

    z: Tensor
    iterations: Tensor
    residual: Tensor
    status: Tensor
    report: Tensor
