"""Equilibria of the last time as starting points: frames of a video, steps of a sequence, epochs over a data set."""

from collections import OrderedDict
from collections.abc import Hashable, Sequence

import torch
from torch import Tensor, nn

from ..state import State


class WarmStart(nn.Module):
    """Calls ``layer(*inputs, z0=...)`` with what it returned for the same samples before.

    layer: takes ``z0`` and returns a state, such as :class:`deq.nn.Equilibrium` and :class:`deq.nn.EquilibriumLinear`.
    capacity: samples remembered at most; the ones used longest ago are forgotten.

    ``warm(*inputs, keys=None)``: keys names the samples of the batch; without, the i-th sample follows the i-th of the
    last call. A sample that is not known starts at zero. Where a map has several equilibria, a warm start may find
    another one than a cold start. The memory holds no graph, is not saved, and :meth:`forget` empties it.
    """

    def __init__(self, layer: nn.Module, capacity: int = 65536):
        super().__init__()
        if not isinstance(capacity, int) or capacity < 1:
            raise ValueError(f"capacity must be a positive integer; got {capacity!r}")
        self.layer, self.capacity = layer, capacity
        self._memory: OrderedDict[Hashable, list[Tensor]] = OrderedDict()
        self._kind: type = Tensor

    def forget(self) -> None:
        """Begin a new sequence."""
        self._memory.clear()

    def forward(self, *inputs: Tensor, keys: Sequence[Hashable] | None = None) -> State:
        n = inputs[0].shape[0]
        names = range(n) if keys is None else keys
        if len(names) != n:
            raise ValueError(f"keys must name {n} samples; got {len(names)}")
        z = self.layer(*inputs, z0=self._start(names))
        self._remember(names, z)
        return z

    def _start(self, names: Sequence[Hashable]) -> State | None:
        known = [self._memory.get(name) for name in names]
        model = next((parts for parts in known if parts is not None), None)
        if model is None:
            return None
        fits = lambda parts: [p.shape for p in parts] == [p.shape for p in model]  # noqa: E731
        rows = [parts if parts and fits(parts) else [torch.zeros_like(p) for p in model] for parts in known]
        columns = [torch.stack(column) for column in zip(*rows, strict=True)]
        return columns[0] if self._kind is Tensor else self._kind(columns)

    def _remember(self, names: Sequence[Hashable], z: State) -> None:
        self._kind = Tensor if isinstance(z, Tensor) else type(z)
        parts = [z] if isinstance(z, Tensor) else list(z)
        rows = zip(*(part.detach().unbind(0) for part in parts), strict=True)
        for name, row in zip(names, rows, strict=True):
            self._memory[name] = [part.clone() for part in row]
            self._memory.move_to_end(name)
        while len(self._memory) > self.capacity:
            self._memory.popitem(last=False)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_memory": OrderedDict()}
