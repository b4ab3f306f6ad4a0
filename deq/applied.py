"""A block with its inputs, as a function of the state, and what is known of the tensors that it uses."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from .members import Members


class Uses:
    """Whether a block was seen to use no tensors that need gradients but its inputs and its parameters.

    It is then not watched again, which takes up to 5 % of a training step of a small block, as long as it stays in the
    same mode and the same tensors need gradients and have hooks. That nothing else came in meanwhile is checked in the
    backward pass, which has the graph for it, by :func:`~deq.closures.has_strangers`.
    """

    def __init__(self):
        self._key: tuple | None = None

    def recall(self, block: Callable, tensors: Sequence[Tensor]) -> list[Tensor] | None:
        """Those of ``tensors``, its inputs and parameters, that the block may use; None if it must be watched."""
        return needing(tensors) if self._key == self._describe(block, tensors) else None

    def learn(self, block: Callable, tensors: Sequence[Tensor], found: list[Tensor]) -> list[Tensor]:
        """What the block may use, given its inputs and parameters and what it was seen to use."""
        self._key = None
        used = {id(tensor) for tensor in found}
        if not found or not used <= {id(tensor) for tensor in tensors}:
            return found
        if any(tensor._backward_hooks and id(tensor) not in used for tensor in needing(tensors)):
            return found  # torch would call the hooks of the others too, with None
        self._key = self._describe(block, tensors)
        return needing(tensors)

    def forget(self) -> None:
        self._key = None

    def is_known(self) -> bool:
        return self._key is not None

    @staticmethod
    def _describe(block: Callable, tensors: Sequence[Tensor]) -> tuple:
        needs = [tensor.requires_grad and (2 if tensor._backward_hooks else 1) for tensor in tensors]
        return getattr(block, "training", None), *needs


class Applied:
    """``z -> block(z, *inputs)`` with inputs that can be exchanged without :class:`~deq.closures.Exchange`.

    uses: what is known of the tensors that the block uses. members: the block's, if it is a module.
    """

    def __init__(
        self, block: Callable, inputs: Sequence[object], uses: Uses | None = None, members: "Members | None" = None
    ):
        self.block, self.inputs, self.uses, self.members = block, tuple(inputs), uses, members

    def __call__(self, z):
        return self.block(z, *self.inputs)

    def to(self, old: Sequence[Tensor], new: Sequence[Tensor]) -> "Applied | None":
        """The same of the ``new`` inputs in place of the ``old`` ones; None if some of those are no inputs."""
        exchange = {id(a): b for a, b in zip(old, new, strict=True) if a is not b}
        if not exchange.keys() <= {id(x) for x in self.inputs}:
            return None
        return Applied(self.block, [exchange.get(id(x), x) for x in self.inputs])

    def is_known(self) -> bool:
        """Whether the block was seen to use no tensors that need gradients but its inputs and its parameters."""
        return self.uses is not None and self.uses.is_known()

    def recall(self) -> list[Tensor] | None:
        """The tensors that the block may use and that need gradients, if they are known without watching it."""
        return None if self.uses is None else self.uses.recall(self.block, self._candidates())

    def learn(self, found: list[Tensor]) -> list[Tensor]:
        """The tensors that the block may use and that need gradients, given those that it was seen to use."""
        return found if self.uses is None else self.uses.learn(self.block, self._candidates(), found)

    def _candidates(self) -> list[Tensor]:
        parameters = () if self.members is None else self.members.parameters
        return [*(value for value in self.inputs if isinstance(value, Tensor)), *parameters]


def needing(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Those that need gradients, each once."""
    return list({id(tensor): tensor for tensor in tensors if tensor.requires_grad}.values())
