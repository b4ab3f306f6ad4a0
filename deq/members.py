"""The modules behind a function: found, and what they hold kept for later evaluations, or exchanged."""

import functools
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import TypeVar

from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.compiler import is_compiling

from . import variables
from .applied import Applied
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
