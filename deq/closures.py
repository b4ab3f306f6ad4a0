"""The tensors that a function closes over: found by watching it, and exchanged while it runs.

A function such as ``lambda z: torch.tanh(linear(z) + c)`` depends on tensors that no argument names. Gradients to them
need them as arguments: :func:`watched` finds them, :class:`Exchange` makes the function use others in their place.
Both are cheap where they can be: leaves are read off the graph of one evaluation, and need no exchange at all.
"""

import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from .applied import needing
from .cached_weights import uncached
from .held import held, with_others


def in_transform() -> bool:
    """Whether a transform of torch.func is active."""
    return torch._C._are_functorch_transforms_active()


def in_forward_mode() -> bool:
    """Whether tensors may carry a tangent."""
    return forward_ad._current_level >= 0


def outside_of_gradients(tensor: Tensor) -> Tensor:
    """The numbers of a tensor, out of gradients and tangents of torch.func: what is kept must not belong to a transform
    that is over. Inside of torch.vmap it may still be a batch."""
    while torch._C._functorch.is_gradtrackingtensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor


def watched(f: Callable[[Tensor], Tensor], z: Tensor, near: Sequence[Tensor] = ()) -> tuple[Tensor, list[Tensor]]:
    """``f(z)`` without gradients, and the tensors from outside that it used and that carry a gradient or a transform.

    near: tensors that f may use; those of them that are no leaves are found without watching f, at 2 us an operator
    instead of 15.
    """
    with uncached():
        if not (in_transform() or in_forward_mode()):
            with _unseen_by_hooks():
                graph = _graph(f, z, _inner(near))
            if graph is not None:
                return graph.image.detach(), graph.leaves
        return _watched_closely(f, z)


def _watched_closely(f: Callable[[Tensor], Tensor], z: Tensor) -> tuple[Tensor, list[Tensor]]:
    with torch.no_grad(), _Calls() if in_transform() or in_forward_mode() else _Operators() as seen:
        return f(z), [tensor for tensor in seen.found.values() if tensor is not z]


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


def recorded(
    make: Callable[[Callable], Callable[[Tensor], Tensor]], f: Callable, z: Tensor
) -> tuple[Tensor, list[Tensor], Graph | None]:
    """As :func:`watched` of ``make(f)``, f a function of a state and ``make(f)`` one of a matrix, and the graph of that
    evaluation, whose leaves stand for the tensors.

    What f closes over and is no leaf is replaced by leaves in it. There is no graph where hooks on saved tensors or
    transforms make this evaluation another than the backward pass would make, or where it goes on to tensors that
    nobody knows.
    """
    old = _inner(held(f))
    new = [tensor.detach().requires_grad_() for tensor in old]
    free = with_others(f, old, new) if old else f
    if free is None or in_transform() or in_forward_mode() or _are_saves_hooked():
        return *watched(make(f), z, old), None
    with uncached():
        graph = _graph(make(free), z)
        if graph is None:
            return *_watched_closely(make(f), z), None
    originals = {id(b): a for a, b in zip(old, new, strict=True)}
    return graph.image.detach(), [originals.get(id(leaf), leaf) for leaf in graph.leaves], graph


def _graph(f: Callable[[Tensor], Tensor], z: Tensor, near: Sequence[Tensor] = ()) -> Graph | None:
    """One evaluation: None where its graph ends at a tensor that is neither a leaf nor in ``near``, since a graph knows
    its nodes but not their tensors."""
    point = z.detach().requires_grad_()
    first = next_node()
    try:
        with torch.enable_grad():
            image = f(point)
    except RuntimeError:  # what cannot be done with gradients may be possible without, or fails there again
        return None
    if not image.requires_grad:
        return None
    found = _ends(image, first, near)
    return None if found is None else Graph(image, point, [tensor for tensor in found if tensor is not point])


def _inner(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Those that need gradients and are no leaves, each once."""
    return [tensor for tensor in needing(tensors) if not tensor.is_leaf]


def next_node() -> int:
    """Nodes of graphs that this thread makes from now on have this number or one above: every thread counts its own."""
    return torch._C._autograd._get_sequence_nr()


def _ends(image: Tensor, first: int, near: Sequence[Tensor] = ()) -> list[Tensor] | None:
    """The tensors at which the graph of ``image``, just made by this thread, ends: leaves, and those of ``near``, which
    are none. None if it goes on to nodes made before node ``first`` or by other threads, whose tensors nobody knows."""
    edges = {_edge(tensor): tensor for tensor in near}
    found: dict[int, Tensor] = {}
    visited = set()
    stack = [(_edge(image) if image.grad_fn is None else (image.grad_fn, image.output_nr),)]
    own = range(first, next_node())
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
            elif node._sequence_nr() not in own:
                return None
            else:
                visited.add(node)
                stack.append(node.next_functions)
    return list(found.values())


def has_strangers(image: Tensor, first: int, known: Sequence[Tensor]) -> bool:
    """Whether the graph of ``image``, made since node ``first``, ends at a tensor that is none of ``known``."""
    found = _ends(image, first, [tensor for tensor in known if not tensor.is_leaf])
    if found is None:
        return True
    numbers = {id(tensor) for tensor in known}
    others = [tensor for tensor in found if id(tensor) not in numbers]
    if not others:
        return False
    edges = {_edge(tensor) for tensor in known if tensor.requires_grad}  # checkpointing saves them as other objects
    return any(_edge(tensor) not in edges for tensor in others)


def _are_saves_hooked() -> bool:
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


def _unseen_by_hooks() -> AbstractContextManager:
    """Hooks on saved tensors do not see what is saved: of this graph only the nodes are wanted."""
    if not _are_saves_hooked():
        return nullcontext()
    return torch.autograd.graph.saved_tensors_hooks(lambda tensor: None, lambda nothing: nothing)


_Leaf = torch._C._functions.AccumulateGrad


class _Operators(TorchDispatchMode):
    """Watches operators: sees what custom autograd functions and compiled code use as well.

    Without gradients nothing that f makes requires one, except views of what does: those are leaves with a base that
    does, which none is that has a gradient of its own.
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
        if tensor.requires_grad and not (tensor.is_leaf and tensor._base is not None and tensor._base.requires_grad):
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
    """While active, calls of torch's functions on one of ``old`` are made on its counterpart in ``new``; ``met`` holds
    the numbers of those that there were."""

    def __init__(self, old: Sequence[Tensor], new: Sequence[Tensor]):
        super().__init__()
        self._old = old  # kept, so that nothing else gets their numbers
        self.new = {id(a): b for a, b in zip(old, new, strict=True)}
        self.met: set[int] = set()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        new, met = self.new, self.met

        def swap(value):
            if isinstance(value, Tensor) and (number := id(value)) in new:
                met.add(number)
                return new[number]
            return value

        args = [_swapped(value, swap) for value in args]
        kwargs = {name: _swapped(value, swap) for name, value in (kwargs or {}).items()}
        return function(*args, **kwargs)


def exchanges() -> list[Exchange]:
    """Those that are active: the last one sees a tensor first."""
    if not torch._C._len_torch_function_stack():
        return []
    return [mode for mode in _get_current_function_mode_stack() if isinstance(mode, Exchange)]


def exchanged(tensor: Tensor, by: Sequence[Exchange]) -> Tensor:
    """What calls of torch's functions take in place of ``tensor``."""
    for exchange in reversed(by):
        tensor = exchange.new.get(id(tensor), tensor)
    return tensor


def within(by: Sequence[Exchange], f: Callable[[Tensor], Tensor], z: Tensor) -> Tensor:
    """f(z) while the exchanges are active."""
    active = exchanges()
    with ExitStack() as stack:
        for exchange in by:
            if exchange not in active:
                stack.enter_context(exchange)
                stack.enter_context(uncompiled())
        return f(z)


def _swapped(value, swap):
    if isinstance(value, (list, tuple, dict)):
        return pytree.tree_map(swap, value)
    return swap(value)


def uncompiled() -> AbstractContextManager:
    """Compiled code runs as it was written: compiled, it would take its tensors past Exchange."""
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()


def graph_break(function: Callable, why: str) -> Callable:
    """``function`` for callers that are being compiled: it runs as it was written, outside of their graphs."""

    def outside(*arguments):
        return torch.compiler.disable(function)(*arguments)

    # What torch.compiler.disable would mark, without importing the compiler for those who do not compile.
    outside._torchdynamo_disable = True
    outside._torchdynamo_disable_msg = why
    return outside


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
