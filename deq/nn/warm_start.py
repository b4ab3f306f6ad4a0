"""Equilibria of the last time as starting points: frames of a video, steps of a sequence, epochs over a data set."""

from collections import OrderedDict
from collections.abc import Hashable, Sequence

import torch
from torch import Tensor, nn

from ..closures import graph_break, outside_of_gradients
from ..modes import lacks_numbers
from ..solution import Solution, Status
from ..state import State, parts_of


class WarmStart(nn.Module):
    """Calls ``layer(*inputs, z0=...)`` with what it returned for the same samples before.

    layer: takes ``z0`` and returns a state, such as :class:`deq.nn.Equilibrium` and :class:`deq.nn.EquilibriumLinear`.
    capacity: samples remembered at most; the ones used longest ago are forgotten.

    ``warm(*inputs, keys=None)``: keys names the samples of the batch, by hashable values or a tensor (B,) of numbers,
    for which a GPU is waited; without, the i-th sample follows the i-th of the last call. A sample that is not known,
    or only with inputs or parameters of another shape, dtype or device, starts where the layer does by itself, and so
    does one that diverged the last time: its status is read, for which a GPU is waited as well. Where a map has several
    equilibria, a warm start may find another one than a cold start. The memory holds no graph, is not saved, and
    :meth:`forget` empties it. Inside torch.compile it is a graph break. Raises ValueError where keys are not as many as
    samples, TypeError where one has no hash.
    """

    def __init__(self, layer: nn.Module, capacity: int = 65536):
        super().__init__()
        if not isinstance(capacity, int) or capacity < 1:
            raise ValueError(f"capacity must be a positive integer; got {capacity!r}")
        self.layer, self.capacity = layer, capacity
        self._memory: OrderedDict[Hashable, tuple[tuple, list[Tensor]]] = OrderedDict()  # :meth:`_like`, the state
        self._kind: type = Tensor

    def forget(self) -> None:
        """Begin a new sequence."""
        self._memory.clear()

    def forward(self, *inputs: Tensor, keys: Sequence[Hashable] | Tensor | None = None) -> State:
        if torch.compiler.is_compiling():
            return _outside_of_graphs(self, inputs, keys)
        return self._solve(inputs, keys)

    def _solve(self, inputs: tuple[Tensor, ...], keys: Sequence[Hashable] | Tensor | None) -> State:
        if not inputs or not isinstance(inputs[0], Tensor) or inputs[0].dim() == 0:
            raise TypeError("the first input must be a tensor whose first dimension counts samples")
        n = inputs[0].shape[0]
        names = range(n) if keys is None else _names(keys)
        if len(names) != n:
            raise ValueError(f"keys must name {n} samples; got {len(names)}")
        like = self._like(inputs)
        z = self.layer(*inputs, z0=self._start(names, like, inputs))
        self._remember(names, like, z)
        return z

    def _start(self, names: Sequence[Hashable], like: tuple, inputs: tuple[Tensor, ...]) -> State | None:
        known = [self._memory.get(name) for name in names]
        known = [entry[1] if entry is not None and entry[0] == like else None for entry in known]
        model = next((parts for parts in known if parts is not None), None)
        if model is None:
            return None
        init = self._of_layer("init")
        if init is None or all(parts is not None for parts in known):
            cold = [[torch.zeros_like(part) for part in model]] * len(known)
        else:
            cold = list(zip(*(part.detach().unbind(0) for part in parts_of(init(*inputs))), strict=True))
        rows = [own if parts is None else parts for own, parts in zip(cold, known, strict=True)]
        columns = [torch.stack(column) for column in zip(*rows, strict=True)]
        return columns[0] if self._kind is Tensor else self._kind(columns)

    def _remember(self, names: Sequence[Hashable], like: tuple, z: State) -> None:
        parts = [outside_of_gradients(part.detach()) for part in parts_of(z)]
        if any(map(torch._C._functorch.is_functorch_wrapped_tensor, parts)):
            return
        if any(len(part) != len(names) for part in parts):
            shapes = ", ".join(str(tuple(part.shape)) for part in parts)
            raise ValueError(f"the layer must return {len(names)} samples, as many as its first input; got {shapes}")
        self._kind = Tensor if isinstance(z, Tensor) else type(z)
        rows = zip(*(part.unbind(0) for part in parts), strict=True)
        for name, row, is_lost in zip(names, rows, self._lost(parts[0]), strict=True):
            if is_lost:
                self._memory.pop(name, None)
                continue
            self._memory[name] = like, [part.clone() for part in row]
            self._memory.move_to_end(name)
        while len(self._memory) > self.capacity:
            self._memory.popitem(last=False)

    def _lost(self, z: Tensor) -> list[bool]:
        """Of every sample, whether it left for infinity: from where it got to it might never come back."""
        solution = self._of_layer("solution")
        if not isinstance(solution, Solution) or lacks_numbers(z) or len(z) == 0:
            return [False] * len(z)
        status = solution.status
        if status.dim() == 0 or len(status) != len(z):
            return [False] * len(z)
        lost = (status == int(Status.DIVERGED)) | (status == int(Status.NONFINITE))
        return lost.flatten(1).any(1).tolist() if lost.dim() > 1 else lost.tolist()

    def _of_layer(self, name: str) -> object:
        """An attribute of the layer, which may lie in a DistributedDataParallel or AveragedModel; None without."""
        layer = self.layer
        while not hasattr(layer, name) and isinstance(getattr(layer, "module", None), nn.Module):
            layer = layer.module
        return getattr(layer, name, None)

    def _like(self, inputs: Sequence[object]) -> tuple:
        """What decides on the shape, dtype and device of a sample's state: those of its inputs and of the layer."""
        tensors = [x for x in inputs if isinstance(x, Tensor)]
        weight = next(self.layer.parameters(), None)
        layer = None if weight is None else (weight.dtype, weight.device)
        return layer, *[(x.shape[1:], x.dtype, x.device) for x in tensors]

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_memory": OrderedDict()}


_outside_of_graphs = graph_break(
    WarmStart._solve, "what a warm start remembers changes with every call: a graph of it would be compiled anew"
)


def _names(keys: Sequence[Hashable] | Tensor) -> list[Hashable]:
    """Numbers in place of tensors, which are equal only to themselves."""
    if isinstance(keys, Tensor) and keys.dim() == 0:
        raise ValueError("keys must name every sample of the batch; got a tensor without dimensions")
    names = keys.tolist() if isinstance(keys, Tensor) else [k.tolist() if isinstance(k, Tensor) else k for k in keys]
    for name in names:
        if not isinstance(name, Hashable):
            raise TypeError(f"keys must be hashable, or one number a sample; got {name!r}")
    return names
