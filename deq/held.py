"""The tensors that a function holds, in its closure and defaults or as inputs: listed, and replaced in a copy of it."""

import functools
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from types import BuiltinFunctionType, CellType, FunctionType, MethodType, ModuleType
from typing import TypeVar

from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.compiler import is_compiling

from . import variables
from .cached_weights import are_weights_kept
from .spectral_norms import TorchNorm, norms_of

T = TypeVar("T")


class Members:
    """The parameters, buffers, training flags and dropout masks of modules at this moment, for later evaluations.

    ``torch.func.functional_call`` exchanges them for a call alone, which is over before the backward pass evaluates the
    modules again.

    modules: these and all inside of them, and, but for parameters and in graphs, what functions use that are blocks of
    layers there. parameters: theirs, as ``list(module.parameters())`` in a fifth of the time; a shared one comes as
    often as it is used. has_masks: whether there is a :class:`deq.nn.VariationalDropout`.
    norms: the spectral norms of torch that iterate whenever they are read now.
    """

    def __init__(self, modules: Sequence[nn.Module]):
        self.parameters: list[Tensor] = []
        self.has_masks = False
        self._places: list[tuple[dict, str, object]] = []
        self._moving: list[dict] = []  # buffers of modules that write to them whenever training reads a weight
        self._moved: list[tuple[dict, str, Tensor, int, Tensor]] = []
        self.norms: list[TorchNorm] = []  # of torch, that move in training
        parameters, places, stack = self.parameters, self._places, list(reversed(modules))
        layers: list[nn.Module] = []  # inside, whose blocks are functions
        behind: list[nn.Module] = []  # what those use
        while stack or behind:
            if not stack:
                stack, behind, parameters = behind, [], []
            module = stack.pop()
            own = module.__dict__
            is_python = "training" in own  # one of TorchScript keeps its members elsewhere, for good
            if tensors := module._parameters:
                for name, tensor in tensors.items():
                    if tensor is not None:
                        parameters.append(tensor)
                        if is_python:
                            places.append((tensors, name, tensor))
            if is_python:
                places.append((own, "training", own["training"]))
                if "_dropout_draw" in own:
                    places.append((own, "_dropout_draw", own["_dropout_draw"]))
                    self.has_masks = True
                if "_moves_buffers" in own:
                    self._moving.append(own["_buffers"])
                if "_uses" in own and "block" in own and module not in layers and not is_compiling():
                    layers.append(module)
                    behind += modules_used(own["block"])
                self.norms += [norm for norm in norms_of(module) if norm.holder.training]
                if tensors := own["_buffers"]:
                    places += [(tensors, name, tensor) for name, tensor in tensors.items()]
            if children := module._modules:
                stack += [child for child in reversed(children.values()) if child is not None]

    def while_still(self, call: Callable[[], T]) -> T:
        """``call()`` with :meth:`still` around it, not by a context alone: Ctrl-C may come where Python leaves it."""
        still, depth = self.still(), enclosed.depth
        try:
            with still:
                return call()
        finally:
            enclosed.depth = depth
            still.put_back()

    def still(self) -> "Exchanged":
        """Spectral norms of torch take their step, and do not move while this is active nor in backward passes: they
        would iterate at every evaluation, and f would be another one each time."""
        places: list[tuple[dict, str, object]] = []
        for norm in set(self.norms):
            moves, found = norm.moves, norm.moved()
            places += found if moves else ()  # what another layer holds still, maybe in another thread, it lets go
            self._places += found
        return Exchanged(places)

    def settle(self) -> None:
        """What moving buffers hold now, at the end of a call, is what they held in it."""
        self._moved = [
            (buffers, name, tensor, tensor._version, tensor.clone())
            for buffers in self._moving
            for name, tensor in buffers.items()
            if type(tensor) is Tensor and not (tensor.is_inference() or is_functorch_wrapped_tensor(tensor))
        ]

    def others(self) -> list[tuple[dict, str, object]]:
        """Where modules have other members now: the dictionary, the name, and the member of then.

        Sharded ones are left alone: FSDP puts them in and out by itself.
        """
        others = [
            (place, name, then)
            for place, name, then in self._places
            if (now := place.get(name)) is not then and type(now) in _EXCHANGEABLE and type(then) in _EXCHANGEABLE
        ]
        others += [(place, name, copy) for place, name, then, version, copy in self._moved if then._version != version]
        return others


_EXCHANGEABLE = (Tensor, nn.Parameter, bool, int, list, OrderedDict, type(None))


class Unsteady:
    """Whether a :class:`deq.nn.VariationalDropout` or a spectral norm of :func:`deq.nn.normalise`, which changes as its
    weight is read, has ever been made: most programs have none, and search for none."""

    exist = False


class Enclosed(threading.local):
    """While active, layers are part of another one, whose dropout masks they keep."""

    depth = 0

    def __enter__(self) -> None:
        self.depth += 1

    def __exit__(self, *_) -> None:
        self.depth -= 1


enclosed = Enclosed()


_ABSENT = object()


class Exchanged:
    """While active, every (dictionary, name, value) holds, and layers are enclosed.

    Ctrl-C may come where Python enters or leaves it: who must not keep the values calls :meth:`put_back` afterwards.
    """

    def __init__(self, places: Sequence[tuple[dict, str, object]]):
        self._places, self._before = places, []

    def __enter__(self) -> None:
        self._before = [(place, name, place.get(name, _ABSENT)) for place, name, _ in self._places]
        for place, name, value in self._places:
            place[name] = value
        enclosed.depth += 1

    def __exit__(self, *_) -> None:
        enclosed.depth -= 1
        self.put_back()

    def put_back(self) -> None:
        for place, name, value in self._before:
            if value is _ABSENT:
                place.pop(name, None)
            else:
                place[name] = value
        self._before = []


def modules_of(f: Callable) -> list[nn.Module]:
    """The modules that f is, is a method of, or holds in closures and defaults, its own and those of functions in them:
    by themselves, as elements of a list, tuple or dictionary, or as attributes of an object that f names."""
    found, stack, visited = [], [f], set()
    while stack:
        value = stack.pop()
        if isinstance(value, nn.Module):
            found.append(value)
        elif type(value) is not Tensor and id(value) not in visited:
            visited.add(id(value))
            if isinstance(value, Applied):
                stack.append(value.block)
            elif isinstance(value, functools.partial):
                stack += [value.func, *value.args, *value.keywords.values()]
            elif isinstance(value, (FunctionType, MethodType)):
                own = [getattr(value, "__self__", None), *variables.contents(value), *variables.defaults(value)]
                stack += [getattr(value, "__func__", None), *own]
                names = getattr(getattr(value, "__code__", None), "co_names", ())
                stack += [
                    item
                    for each in own
                    if not isinstance(each, (nn.Module, Tensor, FunctionType))
                    for name, item in getattr(each, "__dict__", {}).items()
                    if name in names
                ]
            elif type(value) in _CONTAINERS:
                elements = value.values() if type(value) is dict else value
                found += [element for element in elements if isinstance(element, nn.Module)]
    return found


_CONTAINERS = (list, tuple, dict)


def modules_used(f: Callable) -> list[nn.Module]:
    """Those of :func:`modules_of`, and those that f, or a function that it finds there, finds in global variables."""
    read = [value for _, _, value in variables.globals_read(f)]
    used = [f, *(value for value in read if callable(value) or type(value) in _CONTAINERS)]
    return [module for each in used for module in modules_of(each)]


def may_train(f: Callable) -> bool:
    """Whether f may use modules in training: without gradients no others need be looked for, which takes longer than
    this. One in evaluation is not searched for parts that are not."""
    if type(f) is not FunctionType:
        return not isinstance(f, nn.Module) or f.training
    place, names = f.__globals__, variables.global_names(f.__code__)
    values = [*variables.contents(f), *variables.defaults(f), *[place.get(name) for name in names]]
    return any([value.training if isinstance(value, nn.Module) else type(value) not in _PLAIN for value in values])


_PLAIN = (Tensor, nn.Parameter, ModuleType, BuiltinFunctionType, type(None), int, float, bool)


def modules_with_masks(block: Callable) -> list[nn.Module]:
    """``block``, or the modules that it uses if it is a function, and those that functions use which are blocks of
    layers inside of these; none where no VariationalDropout is among them all."""
    if not Unsteady.exist:
        return []
    found, visited, has_masks = _used_by(block), set(), False
    for root in found:
        for module in root.modules():
            if module not in visited:
                visited.add(module)
                has_masks |= "_dropout_draw" in module.__dict__
                inner = module.__dict__.get("block")  # a module is elsewhere
                found += [each for each in _used_by(inner) if each not in visited] if callable(inner) else ()
    return found if has_masks else []


def _used_by(function: Callable) -> list[nn.Module]:
    return [function] if isinstance(function, nn.Module) else modules_used(function)


def members_of(f: Callable) -> Members:
    """Those of the modules that f uses. Layers among them, which keep their masks through the call, have new ones."""
    members = Members(modules_used(f))
    if not members.has_masks or enclosed.depth:
        return members
    for layer in (module for root in modules_with_masks(f) for module in root.modules() if "_uses" in module.__dict__):
        for each in (module for root in modules_with_masks(layer) for module in root.modules()):
            if "_dropout_draw" in each.__dict__:
                each.reset_mask()
    return Members(modules_used(f))


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
        self, block: Callable, inputs: Sequence[object], uses: Uses | None = None, members: Members | None = None
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


def needing(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Those that need gradients, each once."""
    return list({id(tensor): tensor for tensor in tensors if tensor.requires_grad}.values())
