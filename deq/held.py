"""The tensors that a function holds, in its closure and defaults or as inputs: listed, and replaced in a copy of it."""

import dis
import functools
from collections.abc import Callable, Sequence
from contextlib import suppress
from types import CellType, CodeType, FunctionType

from torch import Tensor, nn


def parameters_of(block: Callable) -> list[Tensor]:
    """As ``list(block.parameters())`` in a fifth of the time; a shared one comes as often as it is used. None of a
    function."""
    if not isinstance(block, nn.Module):
        return []
    found, stack = [], [block]
    while stack:
        module = stack.pop()
        if module._parameters:
            found += [parameter for parameter in module._parameters.values() if parameter is not None]
        if module._modules:
            stack += [child for child in reversed(module._modules.values()) if child is not None]
    return found


class Uses:
    """Whether a block was seen to use no tensors that need gradients but its inputs and its parameters.

    It is then not watched again, which takes up to 5 % of a training step of a small block, as long as it stays in the
    same mode and the same tensors need gradients. That nothing else came in meanwhile is checked in the backward pass,
    which has the graph for it, by :func:`~deq.closures.has_strangers`.
    """

    def __init__(self):
        self._key: tuple | None = None

    def recall(self, block: Callable, tensors: Sequence[Tensor]) -> list[Tensor] | None:
        """Those of ``tensors``, its inputs and parameters, that the block may use; None if it must be watched."""
        return needing(tensors) if self._key == self._describe(block, tensors) else None

    def learn(self, block: Callable, tensors: Sequence[Tensor], found: list[Tensor]) -> list[Tensor]:
        """What the block may use, given its inputs and parameters and what it was seen to use."""
        self._key = None
        if not found or not {id(tensor) for tensor in found} <= {id(tensor) for tensor in tensors}:
            return found
        self._key = self._describe(block, tensors)
        return needing(tensors)

    def forget(self) -> None:
        self._key = None

    def is_known(self) -> bool:
        return self._key is not None

    @staticmethod
    def _describe(block: Callable, tensors: Sequence[Tensor]) -> tuple:
        return getattr(block, "training", None), *[tensor.requires_grad for tensor in tensors]


class Applied:
    """``z -> block(z, *inputs)`` with inputs that can be exchanged without :class:`~deq.closures.Exchange`.

    uses: what is known of the tensors that the block uses. parameters: the block's, where there are uses.
    """

    def __init__(
        self, block: Callable, inputs: Sequence[object], uses: Uses | None = None, parameters: Sequence[Tensor] = ()
    ):
        self.block, self.inputs, self.uses = block, tuple(inputs), uses
        self._parameters = parameters

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
        return [*(value for value in self.inputs if isinstance(value, Tensor)), *self._parameters]


def held(f: Callable) -> list[Tensor]:
    """The tensors that a function holds itself: in its closure and its defaults, or as inputs of :class:`Applied`."""
    if isinstance(f, Applied):
        values = f.inputs
    else:
        values = [*(getattr(f, "__defaults__", None) or ()), *(getattr(f, "__kwdefaults__", None) or {}).values()]
        for cell in getattr(f, "__closure__", None) or ():
            with suppress(ValueError):  # an empty cell
                content = cell.cell_contents
                values += content if isinstance(content, (tuple, list)) else (content,)
    return [value for value in values if isinstance(value, Tensor)]


def with_others(f: Callable, old: Sequence[Tensor], new: Sequence[Tensor]) -> Callable | None:
    """f with the ``new`` tensors in place of those of the ``old`` ones that it holds itself, see :func:`held`; None if
    it holds others in ways that are not known here, or assigns to a variable that holds them."""
    if isinstance(f, Applied):
        return f.to(old, new)
    if type(f) is not FunctionType:
        return None
    exchange = {id(a): b for a, b in zip(old, new, strict=True) if a is not b}
    if not exchange.keys() <= {id(tensor) for tensor in held(f)}:
        return None

    def other(value: object) -> object:
        if type(value) in (tuple, list) and any(id(item) in exchange for item in value):
            return type(value)(exchange.get(id(item), item) for item in value)
        return exchange.get(id(value), value)

    assigned, closure = _assigned(f.__code__), list(f.__closure__ or ())
    for i, name in enumerate(f.__code__.co_freevars):
        with suppress(ValueError):  # an empty cell
            content = closure[i].cell_contents
            if (new_content := other(content)) is not content:
                if name in assigned:
                    return None
                closure[i] = CellType(new_content)
    defaults = None if f.__defaults__ is None else tuple(exchange.get(id(x), x) for x in f.__defaults__)
    g = FunctionType(f.__code__, f.__globals__, f.__name__, defaults, tuple(closure))
    if f.__kwdefaults__:
        g.__kwdefaults__ = {name: exchange.get(id(x), x) for name, x in f.__kwdefaults__.items()}
    return g


@functools.lru_cache(maxsize=256)
def _assigned(code: CodeType) -> frozenset[str]:
    """The variables of outer functions that a function, or one inside of it, assigns to or deletes."""
    inner = (_assigned(constant) for constant in code.co_consts if isinstance(constant, CodeType))
    own = {i.argval for i in dis.get_instructions(code) if i.opname in ("STORE_DEREF", "DELETE_DEREF")}
    return frozenset(own).union(*inner)


def needing(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Those that need gradients, each once."""
    return list({id(tensor): tensor for tensor in tensors if tensor.requires_grad}.values())
