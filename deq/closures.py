"""The tensors that a function closes over: found by watching it, and exchanged while it runs.

A function such as ``lambda z: torch.tanh(linear(z) + c)`` depends on tensors that no argument names. Gradients to them
need them as arguments: :func:`watched` finds them, :class:`Exchange` makes the function use others in their place.
Both are cheap where they can be: leaves are read off the graph of one evaluation, and need no exchange at all.
"""

import dis
import functools
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from types import CellType, CodeType, FunctionType

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode


def in_transform() -> bool:
    """Whether a transform of torch.func is active."""
    return torch._C._are_functorch_transforms_active()


def in_forward_mode() -> bool:
    """Whether tensors may carry a tangent."""
    return forward_ad._current_level >= 0


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
    which has the graph for it, by :func:`has_strangers`.
    """

    def __init__(self):
        self._key: tuple | None = None

    def recall(self, block: Callable, tensors: Sequence[Tensor]) -> list[Tensor] | None:
        """Those of ``tensors``, its inputs and parameters, that the block may use; None if it must be watched."""
        return _needing(tensors) if self._key == self._describe(block, tensors) else None

    def learn(self, block: Callable, tensors: Sequence[Tensor], found: list[Tensor]) -> list[Tensor]:
        """What the block may use, given its inputs and parameters and what it was seen to use."""
        self._key = None
        if not found or not {id(tensor) for tensor in found} <= {id(tensor) for tensor in tensors}:
            return found
        self._key = self._describe(block, tensors)
        return _needing(tensors)

    def forget(self) -> None:
        self._key = None

    def is_known(self) -> bool:
        return self._key is not None

    @staticmethod
    def _describe(block: Callable, tensors: Sequence[Tensor]) -> tuple:
        return getattr(block, "training", None), *[tensor.requires_grad for tensor in tensors]


def _needing(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Those that need gradients, each once."""
    return list({id(tensor): tensor for tensor in tensors if tensor.requires_grad}.values())


class Applied:
    """``z -> block(z, *inputs)`` with inputs that can be exchanged without :class:`Exchange`.

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


def watched(f: Callable[[Tensor], Tensor], z: Tensor, near: Sequence[Tensor] = ()) -> tuple[Tensor, list[Tensor]]:
    """``f(z)`` without gradients, and the tensors from outside that it used and that carry a gradient or a transform.

    near: tensors that f may use; those of them that are no leaves are found without watching f, at 2 us an operator
    instead of 15.
    """
    if not (in_transform() or in_forward_mode()):
        with _unseen_by_hooks():
            graph = _graph(f, z, _inner(near))
        if graph is not None:
            return graph.image.detach(), graph.leaves
    return _watched_closely(f, z)


def _watched_closely(f: Callable[[Tensor], Tensor], z: Tensor) -> tuple[Tensor, list[Tensor]]:
    with torch.no_grad(), _Calls() if in_transform() or in_forward_mode() else _Operators() as seen:
        return f(z), list(seen.found.values())


@dataclass(eq=False)
class Graph:
    """One evaluation of a function: its image at ``point``, of which the graph ends at ``point`` and ``leaves``."""

    image: Tensor | None
    point: Tensor
    leaves: list[Tensor]

    def take(self) -> Tensor | None:
        """The image, once, for a pass through its graph that frees it; None where hooks would tell somebody of it."""
        image, self.image = self.image, None
        return None if any(leaf._backward_hooks for leaf in self.leaves) else image


class Recording:
    """Evaluates ``make(f)``, f a function of a state and ``make(f)`` one of a matrix, and keeps the graph of the last
    evaluation.

    What f closes over and is no leaf is replaced by leaves in it.
    """

    def __init__(self, make: Callable[[Callable], Callable[[Tensor], Tensor]], f: Callable):
        self._map = make(f)
        self._old = _inner(held(f))
        self._new = [tensor.detach().requires_grad_() for tensor in self._old]
        free = with_others(f, self._old, self._new) if self._old else f
        self._free = None if free is None else make(free)
        self._last: tuple | None = None

    def __call__(self, z: Tensor) -> Tensor:
        """The image of z, without gradients. With weights that :mod:`torch.nn.utils.parametrize` has kept, which were
        made without gradients, it is of no other use."""
        if parametrize._cache:
            self._last = None
            return self._map(z)
        special = in_transform() or in_forward_mode() or torch.is_autocast_enabled(z.device.type) or _are_saves_hooked()
        point = image = None
        first = next_node()
        if self._free is not None and not special:
            point = z.detach().requires_grad_()
            image = _with_gradients(self._free, point)
        self._last = z, point, image, first
        return self._map(z) if image is None else image.detach()

    def forget(self) -> None:
        self._last = None

    def found(self) -> tuple[list[Tensor], Graph | None] | None:
        """The tensors that f used in the last evaluation, as :func:`watched` finds them, and the graph, whose leaves
        stand for them; None after :meth:`forget`.

        There is no graph where hooks on saved tensors, transforms or autocast make this evaluation another than the
        backward pass would make, or where it goes on to tensors that nobody knows.
        """
        if self._last is None:
            return None
        z, point, image, first = self._last
        self._last = None
        if image is None:
            return watched(self._map, z, self._old)[1], None
        found = _ends(image, first)
        if found is None:
            return _watched_closely(self._map, z)[1], None
        originals = {id(b): a for a, b in zip(self._old, self._new, strict=True)}
        leaves = [tensor for tensor in found if tensor is not point]
        return [originals.get(id(leaf), leaf) for leaf in leaves], Graph(image, point, leaves)


def _with_gradients(f: Callable[[Tensor], Tensor], point: Tensor) -> Tensor | None:
    """``f(point)`` with its graph; None where there is none."""
    try:
        with torch.enable_grad():
            image = f(point)
    except RuntimeError:  # what cannot be done with gradients may be possible without, or fails there again
        return None
    return image if image.requires_grad else None


def _graph(f: Callable[[Tensor], Tensor], z: Tensor, near: Sequence[Tensor] = ()) -> Graph | None:
    """One evaluation: None where its graph ends at a tensor that is neither a leaf nor in ``near``, since a graph knows
    its nodes but not their tensors."""
    point = z.detach().requires_grad_()
    first = next_node()
    image = _with_gradients(f, point)
    if image is None:
        return None
    found = _ends(image, first, near)
    return None if found is None else Graph(image, point, [tensor for tensor in found if tensor is not point])


def _inner(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Those that need gradients and are no leaves, each once."""
    return [tensor for tensor in _needing(tensors) if not tensor.is_leaf]


def next_node() -> int:
    """Nodes of graphs that are made from now on have this number or one above."""
    return torch._C._autograd._get_sequence_nr()


def _ends(image: Tensor, first: int, near: Sequence[Tensor] = ()) -> list[Tensor] | None:
    """The tensors at which the graph of ``image`` ends: leaves, and those of ``near``, which are none. None if it goes
    on to nodes made before node ``first``, whose tensors nobody knows."""
    edges = {_edge(tensor): tensor for tensor in near}
    found: dict[int, Tensor] = {}
    visited = set()
    stack = [(_edge(image) if image.grad_fn is None else (image.grad_fn, image.output_nr),)]
    while stack:
        for edge in stack.pop():
            node = edge[0]
            if edges and edge in edges:
                found[id(edges[edge])] = edges[edge]
            elif node is None or node in visited:
                continue
            elif type(node) is _Leaf:
                variable = node.variable
                found[id(variable)] = variable
            elif node._sequence_nr() < first:
                return None
            else:
                visited.add(node)
                stack.append(node.next_functions)
    return list(found.values())


def has_strangers(image: Tensor, first: int, known: Sequence[Tensor]) -> bool:
    """Whether the graph of ``image``, made since node ``first``, ends at a tensor that is none of ``known``."""
    found = _ends(image, first, [tensor for tensor in known if not tensor.is_leaf])
    return found is None or not {id(tensor) for tensor in found} <= {id(tensor) for tensor in known}


def _are_saves_hooked() -> bool:
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


def _unseen_by_hooks() -> AbstractContextManager:
    """Hooks on saved tensors do not see what is saved: of this graph only the nodes are wanted."""
    if not _are_saves_hooked():
        return nullcontext()
    return torch.autograd.graph.saved_tensors_hooks(lambda tensor: None, lambda nothing: nothing)


_Leaf = torch._C._functions.AccumulateGrad


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
        if type(value) in (tuple, list):
            return type(value)(exchange.get(id(item), item) for item in value)
        return exchange.get(id(value), value)

    def holds(cell: CellType) -> bool:
        with suppress(ValueError):
            content = cell.cell_contents
            return any(id(item) in exchange for item in (content if type(content) in (tuple, list) else (content,)))
        return False

    names, cells = f.__code__.co_freevars, f.__closure__ or ()
    touched = {name for name, cell in zip(names, cells, strict=True) if holds(cell)}
    if touched & _assigned(f.__code__):
        return None
    closure = tuple(
        CellType(other(cell.cell_contents)) if name in touched else cell
        for name, cell in zip(names, cells, strict=True)
    )
    defaults = None if f.__defaults__ is None else tuple(exchange.get(id(x), x) for x in f.__defaults__)
    g = FunctionType(f.__code__, f.__globals__, f.__name__, defaults, closure)
    if f.__kwdefaults__:
        g.__kwdefaults__ = {name: exchange.get(id(x), x) for name, x in f.__kwdefaults__.items()}
    return g


@functools.lru_cache(maxsize=256)
def _assigned(code: CodeType) -> frozenset[str]:
    """The variables of outer functions that a function, or one inside of it, assigns to or deletes."""
    inner = (_assigned(constant) for constant in code.co_consts if isinstance(constant, CodeType))
    own = {i.argval for i in dis.get_instructions(code) if i.opname in ("STORE_DEREF", "DELETE_DEREF")}
    return frozenset(own).union(*inner)


class _Operators(TorchDispatchMode):
    """Watches operators: sees what custom autograd functions and compiled code use as well.

    Without gradients nothing that f makes requires one, except views of what does: those are leaves with a base.
    """

    def __init__(self):
        super().__init__()
        self.found: dict[int, Tensor] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        for value in (*args, *kwargs.values()):
            if isinstance(value, Tensor):
                self._see(value)
            elif isinstance(value, (list, tuple)):
                for item in value:
                    if isinstance(item, Tensor):
                        self._see(item)
        return function(*args, **kwargs)

    def _see(self, tensor: Tensor) -> None:
        if tensor.requires_grad and not (
            tensor.is_leaf and tensor._base is not None and id(tensor._base) in self.found
        ):
            self.found[id(tensor)] = tensor


class _Calls(TorchFunctionMode):
    """Watches calls of torch's functions, where transforms still show: results of such calls are f's own."""

    def __init__(self):
        super().__init__()
        self.found: dict[int, Tensor] = {}
        self.made: dict[int, Tensor] = {}  # kept alive, so that no id is given twice

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        for value in pytree.tree_leaves((args, kwargs)):
            if isinstance(value, Tensor) and id(value) not in self.made and _is_special(value):
                self.found[id(value)] = value
        result = function(*args, **kwargs)
        for value in pytree.tree_leaves(result):
            if isinstance(value, Tensor) and id(value) not in self.found:
                self.made[id(value)] = value
        return result


def _is_special(tensor: Tensor) -> bool:
    if tensor.requires_grad or torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        return True
    return in_forward_mode() and not in_transform() and forward_ad.unpack_dual(tensor).tangent is not None


class Exchange(TorchFunctionMode):
    """While active, calls of torch's functions on one of ``old`` are made on its counterpart in ``new``."""

    def __init__(self, old: Sequence[Tensor], new: Sequence[Tensor]):
        super().__init__()
        self.new = {id(a): b for a, b in zip(old, new, strict=True)}

    def __torch_function__(self, function, types, args=(), kwargs=None):
        new = self.new

        def swap(value):
            return new.get(id(value), value) if isinstance(value, Tensor) else value

        args = [_swapped(value, swap) for value in args]
        kwargs = {name: _swapped(value, swap) for name, value in (kwargs or {}).items()}
        return function(*args, **kwargs)


def _swapped(value, swap):
    if isinstance(value, (list, tuple, dict)):
        return pytree.tree_map(swap, value)
    return swap(value)


def uncompiled() -> AbstractContextManager:
    """Compiled code runs as it was written: compiled, it would take its tensors past Exchange."""
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()


def strays(outputs: Sequence[Tensor], tensors: Sequence[Tensor]) -> list[int]:
    """Which of ``tensors`` the graph of ``outputs`` still reaches, though Exchange was to keep it from them.

    Custom autograd functions and compiled code take their tensors past Exchange. Raises RuntimeError where one of those
    found is computed from another: gradients of the two could not be told apart.
    """
    edges = {_edge(tensor): i for i, tensor in enumerate(tensors) if tensor.requires_grad}
    found = _reached([_edge(output)[0] for output in outputs if output.requires_grad], edges)
    inner = [_edge(tensors[i])[0] for i in found if not tensors[i].is_leaf]
    if len(found) > 1 and inner and _reached(inner, {_edge(tensors[i]): i for i in found}):
        raise RuntimeError(
            "f uses tensors inside a custom autograd function or compiled code of which one is computed from another; "
            "deq.fixed_point cannot separate their gradients: pass only one of them there"
        )
    return found


def reaches(output: Tensor, tensors: Sequence[Tensor]) -> bool:
    """Whether the graph of ``output`` holds one of ``tensors``."""
    edges = {_edge(tensor): i for i, tensor in enumerate(tensors) if tensor.requires_grad}
    return output.requires_grad and bool(_reached([_edge(output)[0]], edges))


def _edge(tensor: Tensor) -> tuple[object, int]:
    return tuple(torch.autograd.graph.get_gradient_edge(tensor)[:2])


def _reached(nodes: list, edges: dict) -> list[int]:
    """The values of those ``edges`` (node, number) that lie behind ``nodes``; nothing is searched behind an edge."""
    stack, visited, found = list(nodes), set(nodes), []
    while stack:
        for edge in stack.pop().next_functions:
            if edge in edges:
                if edges[edge] not in found:
                    found.append(edges[edge])
            elif edge[0] is not None and edge[0] not in visited:
                visited.add(edge[0])
                stack.append(edge[0])
    return found
