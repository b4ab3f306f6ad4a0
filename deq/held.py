"""The tensors that a function holds, in its closure and defaults or as inputs: listed, kept for backward passes, and
replaced in a copy of it."""

import functools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from types import CellType, FunctionType

from torch import Tensor, nn

from . import variables
from .applied import Applied
from .cached_weights import are_weights_kept
from .members import Exchanged, Members, Unsteady, modules_of, modules_used


class Call:
    """A call of a solver, as far as its backward passes, which evaluate f again, need to know of it.

    f, tensors: the function and the tensors that it uses. watched: whether it was seen to use them: it is then an error
    if it does not do so in a backward pass. has_graph: whether the backward pass has a graph of f, with torch's checks
    of the data in it. members: those of f, where they are known.
    """

    def __init__(
        self,
        f: Callable,
        tensors: Sequence[Tensor],
        watched: bool,
        has_graph: bool = False,
        members: Members | None = None,
    ):
        own = held(f)
        self._members, self.watched = _members(f, tensors, own) if members is None else members, watched
        self._globals = variables.globals_read(f.block if isinstance(f, Applied) else f)
        self._used: set[int] = set()
        self._is_over = False
        # The data that f holds itself, which must be the same in the backward pass.
        data = () if has_graph else [*own, *(t for _, _, t in self._globals if isinstance(t, Tensor))]
        self._data = [(t, t._version) for t in data if not (t.requires_grad or t.is_inference())]

    def end(self) -> None:
        """What f changed in the call is its own business."""
        if self._members is not None:
            self._members.settle()
        self._data = [note for note in self._data if note[0]._version == note[1]]

    def again(self) -> AbstractContextManager:
        """While active, as a backward pass is, modules have the members that they had in the call, and global variables
        their values.

        Raises RuntimeError where data has changed since.
        """
        self._is_over = True
        for tensor, version in self._data:
            if tensor._version != version:
                raise RuntimeError(
                    "a tensor that f uses, needed for the gradient of deq.fixed_point, has been modified by an inplace "
                    f"operation: the one of shape {tuple(tensor.shape)} is at version {tensor._version}; expected "
                    f"version {version}. The backward pass evaluates f again: give f a copy of it"
                )
        others = [entry for entry in self._globals if entry[0].get(entry[1]) is not entry[2]]
        if self._members is not None:
            others += self._members.others()
        has_masks = self._members is not None and self._members.has_masks
        return Exchanged(others) if others or has_masks else nullcontext()

    def tell(self, used: set[int]) -> None:
        """One evaluation of f used these tensors, given by number. Of those of the call the last counts, with all
        before it where a weight is not computed again."""
        if not self._is_over:
            self._used = used | self._used if are_weights_kept() else used
        elif self.watched and not self._used <= used:
            self.refuse()

    @staticmethod
    def refuse() -> None:
        raise RuntimeError(
            "the backward pass of deq.fixed_point, which evaluates f again, does not use the tensors that f was seen "
            "to use: their gradients would be lost. Parameters that torch.func.functional_call exchanged are back by "
            "then: let f hold them, or the module that they were given to. If f uses other tensors at other states, "
            "list all of them as tensors="
        )


def _members(f: Callable, tensors: Sequence[Tensor], own: Sequence[Tensor]) -> Members | None:
    """Those of the modules behind f, where these may have dropout masks, or ``tensors``, which f uses, may be some that
    modules have for this call alone: they are no parameters, and not its ``own``, which it holds itself."""
    if isinstance(f, Applied) and f.members is not None:
        return f.members
    numbers = {id(tensor) for tensor in own}
    if Unsteady.exist:
        return Members(modules_used(f))
    if all([type(tensor) is nn.Parameter or id(tensor) in numbers for tensor in tensors]):
        return None
    return Members(modules_of(f))


def held(f: Callable) -> list[Tensor]:
    """The tensors that a function holds itself: in its closure and its defaults, as arguments of functools.partial, or
    as inputs of :class:`Applied`."""
    if isinstance(f, Applied):
        values = f.inputs
    elif type(f) is functools.partial:
        values = [*held(f.func), *f.args, *f.keywords.values()]
    else:
        values = variables.defaults(f)
        for content in variables.contents(f):
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

    written, cells = variables.assigned(f.__code__), list(f.__closure__ or ())
    for i, name in enumerate(f.__code__.co_freevars):
        with suppress(ValueError):  # an empty cell
            content = cells[i].cell_contents
            if (new_content := other(content)) is not content:
                if name in written:
                    return None
                cells[i] = CellType(new_content)
    g = variables.copied(f, cells)
    if f.__defaults__ is not None:
        g.__defaults__ = tuple(exchange.get(id(x), x) for x in f.__defaults__)
    if f.__kwdefaults__:
        g.__kwdefaults__ = {name: exchange.get(id(x), x) for name, x in f.__kwdefaults__.items()}
    return g


def frozen(f: Callable) -> Callable:
    """A copy of f that goes on with what variables of outer functions hold now, see :func:`variables.frozen`."""
    if isinstance(f, Applied):
        f.block = variables.frozen(f.block)
        return f
    return variables.frozen(f)
