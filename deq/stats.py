"""What a solve says of every sample, in one buffer: one allocation and one argument a call.

A buffer is uint8 (n_bytes,) on the device of z, for n samples: the residuals, n float32, or float64 where z is; the
iterations, n int32; the statuses, n uint8. csrc/torch_ops.cpp knows the same layout. z gives the number and the shape
of the samples, so that the buffer of a flattened batch serves the batch as it came.
"""

from typing import NamedTuple

import torch
from torch import Tensor


def allocate(z: Tensor, more: int = 0) -> Tensor:
    """An unwritten buffer for the samples of z (..., m); with ``more`` bytes behind it, from the next multiple of 8."""
    size = z.numel() // z.shape[-1] * ((8 if z.dtype == torch.float64 else 4) + 4 + 1)
    return z.new_empty(-(-size // 8) * 8 + more if more else size, dtype=torch.uint8)


def pack(iterations: Tensor, residual: Tensor, status: Tensor) -> Tensor:
    """The buffer of iterations, residual (float32 or float64) and status, all (...)."""
    parts = (residual, iterations.to(torch.int32), status.to(torch.uint8))
    return torch.cat([as_type(part.reshape(-1), torch.uint8) for part in parts])


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


class Place(NamedTuple):
    """Where something is said of some samples: from the ``first`` on, of ``samples`` in a buffer of float32."""

    stats: Tensor
    samples: int
    first: int = 0

    def after(self, count: int) -> "Place":
        """That of the samples so many further on."""
        return self._replace(first=self.first + count)

    @property
    def _offsets(self) -> tuple[int, int, int]:
        return 4 * self.first, 4 * (self.samples + self.first), 8 * self.samples + self.first

    def addresses(self) -> list[int]:
        """Of residual, iterations and status of the first sample."""
        base = self.stats.data_ptr()
        return [base + offset for offset in self._offsets]

    def views(self, count: int) -> list[Tensor]:
        """(count,) residuals float32, iterations int32 and statuses uint8."""
        fields = zip(self._offsets, (4, 4, 1), (torch.float32, torch.int32, torch.uint8), strict=True)
        return [self.stats[at : at + size * count].view(dtype) for at, size, dtype in fields]


def _residual_bytes(z: Tensor) -> int:
    return 8 if z.dtype == torch.float64 else 4


def _field(z: Tensor, stats: Tensor, bytes_before: int, size: int, dtype: torch.dtype) -> Tensor:
    n = z.numel() // z.shape[-1]
    return as_type(stats[n * bytes_before : n * (bytes_before + size)], dtype).view(z.shape[:-1])


def as_type(part: Tensor, dtype: torch.dtype) -> Tensor:
    """``part.view(dtype)``, which torch 2.10 and 2.11 do not know of the batches of torch.vmap."""
    if torch._C._are_functorch_transforms_active():
        return torch.ops.deq.as_type.default(part, dtype)
    return part.view(dtype)


def _as_type(part: Tensor, dtype: torch.dtype) -> Tensor:
    if part.numel() == 0:  # whose strides torch takes for those of an element
        return part.new_empty((*part.shape[:-1], part.shape[-1] * part.element_size() // dtype.itemsize), dtype=dtype)
    return part.clone(memory_format=torch.contiguous_format).view(dtype)  # of a batch the pieces may not be aligned


def _as_type_vmap(info, in_dims, part, dtype):
    return torch.ops.deq.as_type.default(part.movedim(in_dims[0], 0), dtype), 0


_operators = torch.library.Library("deq", "FRAGMENT")
_operators.define("as_type(Tensor part, ScalarType dtype) -> Tensor", tags=torch.Tag.pt2_compliant_tag)
_operators.impl("as_type", _as_type, "CompositeExplicitAutograd")
torch.library.register_vmap("deq::as_type", _as_type_vmap, lib=_operators)
