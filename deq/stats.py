"""What a solve says of every sample, in one buffer: one allocation and one argument a call.

A buffer is uint8 (n_bytes,) on the device of z, for n samples: the report, four int64; the residuals, n float32, or
float64 where z is; the iterations, n int32; the statuses, n uint8. csrc/torch_ops.cpp knows the same layout. z gives
the number and the shape of the samples, so that the buffer of a flattened batch serves the batch as it came.

The report: samples that failed, then one plus the flat index of the first non-finite element of W, sample of c and
sample of z0, 0 where there is none.
"""

import ctypes
import math

import torch
from torch import Tensor

REPORT_BYTES = 32
_Report = ctypes.c_int64 * 4


def allocate(z: Tensor) -> Tensor:
    """An unwritten buffer for the samples of z (..., m)."""
    return torch.empty(REPORT_BYTES + math.prod(z.shape[:-1]) * (_residual_bytes(z) + 5), dtype=torch.uint8)


def pack(iterations: Tensor, residual: Tensor, status: Tensor, report: Tensor) -> Tensor:
    """The buffer of iterations, residual (float32 or float64), status (uint8), all (...), and report int64 (4,)."""
    parts = (report.to(status.device), residual, iterations.to(torch.int32), status)
    return torch.cat([part.reshape(-1).view(torch.uint8) for part in parts])


def read_report(stats: Tensor) -> list[int]:
    """The four numbers of the report; waits for them where stats is not on the CPU."""
    if stats.is_cpu and not torch._C._are_functorch_transforms_active():
        return _Report.from_address(stats.data_ptr())[:]  # 0.4 us, views and tolist() 2 us
    return stats[:REPORT_BYTES].view(torch.int64).tolist()


def residual(z: Tensor, stats: Tensor) -> Tensor:
    """(...) float32 or float64 view."""
    dtype = torch.float64 if z.dtype == torch.float64 else torch.float32
    return _field(z, stats, 0, _residual_bytes(z), dtype)


def iterations(z: Tensor, stats: Tensor) -> Tensor:
    """(...) int32 view."""
    return _field(z, stats, _residual_bytes(z), 4, torch.int32)


def status(z: Tensor, stats: Tensor) -> Tensor:
    """(...) uint8 view."""
    return _field(z, stats, _residual_bytes(z) + 4, 1, torch.uint8)


def _residual_bytes(z: Tensor) -> int:
    return 8 if z.dtype == torch.float64 else 4


def _field(z: Tensor, stats: Tensor, bytes_before: int, size: int, dtype: torch.dtype) -> Tensor:
    samples = z.shape[:-1]
    n = math.prod(samples)
    first = REPORT_BYTES + n * bytes_before
    return stats[first : first + n * size].view(dtype).view(samples)
