"""A state of :func:`deq.fixed_point`, a tensor or several, as one matrix (B, D): a row a sample."""

import functools
import math
import numbers
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TypeVar

import torch
from torch import Tensor

State = Tensor | tuple[Tensor, ...] | list[Tensor]
OneState = TypeVar("OneState", bound=State)  # what f takes is what it returns

HALVES = (torch.bfloat16, torch.float16)
DTYPES = (torch.float32, torch.float64, *HALVES)


@dataclass(frozen=True)
class Layout:
    """How a state lies in its matrix.

    kind: Tensor, tuple or list. shapes, dtypes, device: of its tensors. samples: the leading sizes that count samples,
    () for one sample. dtype: that of the matrix, float64 or float32.
    """

    kind: type
    shapes: tuple[torch.Size, ...]
    dtypes: tuple[torch.dtype, ...]
    samples: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @cached_property
    def batch(self) -> int:
        return math.prod(self.samples)

    @cached_property
    def widths(self) -> list[int]:
        return [math.prod(shape[len(self.samples) :]) for shape in self.shapes]

    @cached_property
    def is_view(self) -> bool:
        """Whether the state shares the memory of its matrix."""
        return all(dtype == self.dtype for dtype in self.dtypes)

    @cached_property
    def coarsest(self) -> torch.dtype:
        """The dtype of the state with the fewest digits: what f can resolve."""
        return max(self.dtypes, key=lambda dtype: torch.finfo(dtype).eps)

    def flatten(self, state: State, name: str = "f's result") -> Tensor:
        """(B, D); of one tensor a view where its strides allow. Raises TypeError and ValueError naming ``name``."""
        if self.fits(state) and self.dtypes[0] is self.dtype:
            return state.reshape(self.batch, self.widths[0])
        parts = (state,) if isinstance(state, Tensor) else state
        self._check(state, parts, name)
        batch = self.batch
        if len(parts) == 1:
            return parts[0].reshape(batch, self.widths[0]).to(self.dtype)
        return torch.cat([part.reshape(batch, n).to(self.dtype) for part, n in zip(parts, self.widths, strict=True)], 1)

    def fits(self, state: object) -> bool:
        """Whether ``state`` is one tensor, as the layout's, whose memory may be read as such."""
        return (
            type(state) is self.kind is Tensor
            and state.shape == self.shapes[0]
            and state.dtype is self.dtypes[0]
            and state.device == self.device
            and state.layout is torch.strided
        )

    def unflatten(self, flat: Tensor) -> State:
        """The state whose matrix is ``flat``: views of it, but for tensors of other dtypes."""
        if self.kind is Tensor:
            state = flat.view(self.shapes[0])
            return state if self.dtypes[0] == self.dtype else state.to(self.dtypes[0])
        pieces = flat.split(self.widths, dim=1)
        parts = [
            piece.reshape(shape).to(dtype) for piece, shape, dtype in zip(pieces, self.shapes, self.dtypes, strict=True)
        ]
        return self.kind(parts)

    def _check(self, state: object, parts: object, name: str) -> None:
        fits = isinstance(state, Tensor) if self.kind is Tensor else isinstance(state, (tuple, list))
        if not fits or not all(isinstance(part, Tensor) for part in parts):
            raise TypeError(f"{name} must be {self._wanted()}; got {_told(state)}")
        if len(parts) != len(self.shapes) or any(p.shape != s for p, s in zip(parts, self.shapes, strict=True)):
            raise ValueError(f"{name} must be {self._wanted()}; got {_told(state)}")
        for part in parts:
            if part.layout is not torch.strided:
                raise TypeError(f"{name} must be dense; got layout {part.layout}")
            if not part.dtype.is_floating_point:
                raise TypeError(f"{name} must be of the dtype of z0 or another floating one; got {part.dtype}")
            if part.device != self.device:
                raise ValueError(f"{name} must be on the device of z0, {self.device}; got {part.device}")

    def _wanted(self) -> str:
        shapes = [str(tuple(shape)) for shape in self.shapes]
        return f"a tensor of the shape of z0, {shapes[0]}" if self.kind is Tensor else f"tensors of {', '.join(shapes)}"


def layout_of(z0: object, batch_dims: int | None) -> Layout:
    """The layout of a starting point.

    batch_dims: how many leading dimensions count samples. None: one, or none where no tensor has two dimensions.
    Raises TypeError and ValueError naming z0 or batch_dims.
    """
    if type(z0) is Tensor and z0.layout is torch.strided and (batch_dims is None or type(batch_dims) is int):
        return _layout_of_tensor(z0.shape, z0.dtype, z0.device, batch_dims)
    return _layout_of(z0, batch_dims)


@functools.lru_cache(maxsize=256)
def _layout_of_tensor(shape: torch.Size, dtype: torch.dtype, device: torch.device, batch_dims: int | None) -> Layout:
    return replace(_layout_of(torch.empty(shape, dtype=dtype, device="meta"), batch_dims), device=device)


def _layout_of(z0: object, batch_dims: int | None) -> Layout:
    kind, parts = Tensor if isinstance(z0, Tensor) else type(z0), parts_of(z0)
    for part in parts:
        if part.layout is not torch.strided:
            raise TypeError(f"z0 must be dense; got layout {part.layout}")
        if part.dtype not in DTYPES:
            names = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
            raise TypeError(f"z0 must be {names}; got {part.dtype}")
        if part.device != parts[0].device:
            raise ValueError(f"z0 must be on one device; got {parts[0].device} and {part.device}")
    fewest = min(part.dim() for part in parts)
    if batch_dims is None:
        batch_dims = 1 if fewest >= 1 and max(part.dim() for part in parts) >= 2 else 0
    elif not isinstance(batch_dims, numbers.Integral) or isinstance(batch_dims, bool):
        raise TypeError(f"batch_dims must be an integer; got {batch_dims!r}")
    elif not 0 <= batch_dims <= fewest:
        raise ValueError(f"batch_dims must lie in 0..{fewest}, the dimensions of z0; got {batch_dims!r}")
    samples = tuple(parts[0].shape[:batch_dims])
    if any(tuple(part.shape[:batch_dims]) != samples for part in parts):
        raise ValueError(
            f"z0 must agree in its first {batch_dims} dimension(s), the samples; got {_told(z0)}. "
            "batch_dims=0 makes the whole state one sample"
        )
    dtypes = tuple(part.dtype for part in parts)
    dtype = torch.float64 if torch.float64 in dtypes else torch.float32
    return Layout(kind, tuple(part.shape for part in parts), dtypes, samples, dtype, parts[0].device)


def parts_of(z0: object) -> Sequence[Tensor]:
    """The tensors of a starting point. Raises TypeError naming z0."""
    parts = (z0,) if isinstance(z0, Tensor) else z0
    if type(parts) not in (tuple, list) or not parts or not all(isinstance(part, Tensor) for part in parts):
        raise TypeError(f"z0 must be a torch.Tensor, or a tuple or list of them; got {_told(z0)}")
    return parts


def _told(state: object) -> str:
    if isinstance(state, Tensor):
        return f"a tensor of shape {tuple(state.shape)}"
    if isinstance(state, (tuple, list)):
        return f"a {type(state).__name__} of " + (", ".join(map(_told, state)) or "nothing")
    return type(state).__name__
