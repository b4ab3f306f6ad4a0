"""Dropout whose mask stays the same through a solve: otherwise there would be no fixed point."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..closures import outside_of_gradients
from ..function_options import listed
from ..members import Unsteady, modules_with_masks


class VariationalDropout(nn.Module):
    """Multiplies x (B, ...) by a Bernoulli mask over its expectation, drawn once and kept until :meth:`reset_mask`.

    p: probability of zero, in [0, 1]; 1 gives zeros. shared: dimensions of x along which the mask is constant, such as
    (1,) to drop whole features of (B, tokens, features). In evaluation, and for p = 0, x itself is returned.

    :class:`deq.nn.Equilibrium` draws new masks at every call, one inside of another or of a function that is solved
    with that, and its backward pass has those of the call; in a loop of your own call :func:`reset_dropout`. The mask
    is the module's: threads cannot train the same one. Raises ValueError for an x of another shape than the mask was
    drawn for.
    """

    def __init__(self, p: float = 0.5, shared: Sequence[int] = ()):
        super().__init__()
        if not 0 <= p <= 1:
            raise ValueError(f"p must lie in [0, 1]; got {p!r}")
        self.p = p
        self.shared = tuple(listed("shared", shared, int, "dimensions"))
        self._dropout_draw: list[Tensor] = []  # the mask, once there is one: a call that is over keeps its own list

    def __new__(cls, *args, **kwargs):
        Unsteady.exist = True
        return super().__new__(cls)

    @property
    def mask(self) -> Tensor | None:
        return self._dropout_draw[0] if self._dropout_draw else None

    @mask.setter
    def mask(self, mask: Tensor | None) -> None:
        self._dropout_draw = [] if mask is None else [mask]

    def reset_mask(self) -> None:
        """Forget the mask: the next call draws one for its shape, dtype and device."""
        self.mask = None

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return x
        if not self._dropout_draw:
            shape = list(x.shape)
            for dim in self.shared:
                if not -x.dim() <= dim < x.dim():
                    raise ValueError(f"x must have the dimensions that are shared, {self.shared}; got {tuple(x.shape)}")
                shape[dim] = 1
            keep = 1 - self.p
            # Not in place, so that torch.vmap(randomness="different") can make a batch of it.
            mask = torch.full(shape, keep, dtype=torch.float32, device=x.device).bernoulli().to(x.dtype)
            mask = mask / keep if keep else mask
            self._dropout_draw.append(outside_of_gradients(mask))
        mask = self._dropout_draw[0]
        if mask.dim() != x.dim() or any(m not in (1, n) for m, n in zip(mask.shape, x.shape, strict=True)):
            raise ValueError(
                f"x must have the shape that the mask was drawn for, {tuple(mask.shape)}, until reset_dropout forgets "
                f"it; got {tuple(x.shape)}"
            )
        return x * mask

    def _replicate_for_data_parallel(self) -> "VariationalDropout":
        """A list of its own for every replica, whose samples and device are others."""
        replica = super()._replicate_for_data_parallel()
        replica.reset_mask()
        return replica

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_dropout_draw": []}

    def extra_repr(self) -> str:
        return f"p={self.p}" + (f", shared={self.shared}" if self.shared else "")


def reset_dropout(model: nn.Module) -> None:
    """Forget the masks of every VariationalDropout in ``model``, and in functions that are blocks of its layers."""
    for module in modules_with_masks(model):
        for each in module.modules():
            if isinstance(each, VariationalDropout):
                each.reset_mask()
