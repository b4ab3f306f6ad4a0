"""The layer ``z = block(z, x)`` around any module."""

import inspect
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..fixed_point import StateSolution, fixed_point, unknown_option
from ..state import State

OPTIONS = tuple(
    name
    for name, p in inspect.signature(fixed_point).parameters.items()
    if p.kind is p.KEYWORD_ONLY and name != "tensors"
)


class Equilibrium(nn.Module):
    """Maps x to the equilibrium z of ``z = block(z, x)``.

    block: any module or function ``block(z, *inputs)`` that returns a state like z; z is a tensor or a tuple of tensors
        whose first dimension counts samples.
    init: the starting point as a function of the inputs, ``init(*inputs)``; zeros like the first input if None.
    options: keyword arguments of :func:`deq.fixed_point`, used in every call.

    ``layer(*inputs, z0=None)`` solves from z0. Gradients reach the inputs, the parameters of block and whatever else it
    uses, and follow ``torch.is_grad_enabled()``, in training and evaluation alike. ``layer.solution`` is the last
    Solution, detached; it is neither saved nor copied with the layer. Under autocast the block runs in the precision of
    its state: inputs of lower precision are cast to it.

    Raises TypeError for an unknown option.
    """

    def __init__(self, block: Callable[..., State], init: Callable[..., State] | None = None, **options):
        super().__init__()
        if not callable(block):
            raise TypeError(f"block must be a module or function; got {type(block).__name__}")
        for item in options.items():
            if item[0] not in OPTIONS:
                raise TypeError(unknown_option("deq.nn.Equilibrium", item, OPTIONS))
        self.block = block
        self.init = init
        self.options = options
        self.solution: StateSolution | None = None

    def forward(self, *inputs: Tensor, z0: State | None = None) -> State:
        if z0 is None:
            z0 = self._start(inputs)
        if torch.is_autocast_enabled(_device_type(z0)):
            dtype = (z0 if isinstance(z0, Tensor) else z0[0]).dtype
            wide = lambda x: isinstance(x, Tensor) and x.is_floating_point()  # noqa: E731
            inputs = tuple(x.to(dtype) if wide(x) else x for x in inputs)
        solution = fixed_point(lambda z: self.block(z, *inputs), z0, **self.options)
        self.solution = solution.detach()
        return solution.z

    def _start(self, inputs: tuple[Tensor, ...]) -> State:
        if self.init is not None:
            return self.init(*inputs)
        if not inputs or not isinstance(inputs[0], Tensor):
            raise ValueError("z0 must be given, or init, where the first input is no tensor of the shape of z")
        dtype = inputs[0].dtype
        parameter = next(self.block.parameters(), None) if isinstance(self.block, nn.Module) else None
        if parameter is not None and parameter.is_floating_point():
            dtype = parameter.dtype
        return torch.zeros_like(inputs[0], dtype=dtype)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "solution": None}

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())


def _device_type(z0: State) -> str:
    return (z0 if isinstance(z0, Tensor) else z0[0]).device.type
