"""The layer ``z = block(z, x)`` around any module."""

import inspect
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..applied import Applied, Uses
from ..closures import in_forward_mode
from ..fixed_point import StateSolution, fixed_point, fixed_point_with
from ..members import Members, enclosed, modules_with_masks
from ..modes import has_autocast
from ..options import unknown_option
from ..state import State, parts_of
from .compiled import as_state, equilibrium, kind_of, modes_of, moving_of, new_seed, register
from .dropout import reset_dropout

OPTIONS = tuple(
    name
    for name, p in inspect.signature(fixed_point).parameters.items()
    if p.kind is p.KEYWORD_ONLY and name != "tensors"
)
_DEFAULTS = fixed_point.__kwdefaults__


class Equilibrium(nn.Module):
    """Maps x to the equilibrium z of ``z = block(z, x)``.

    block: any module or function ``block(z, *inputs)`` that returns a state like z; z is a tensor or a tuple of tensors
        whose first dimension counts samples.
    init: the starting point as a function of the inputs, ``init(*inputs)``; zeros like the first input if None.
    options: keyword arguments of :func:`deq.fixed_point`, used in every call.

    ``layer(*inputs, z0=None)`` solves from z0. Gradients reach the inputs, the parameters of block and whatever else it
    uses, and follow ``torch.is_grad_enabled()``, in training and evaluation alike. ``layer.solution`` is the last
    Solution, detached; it is neither saved nor copied with the layer. Under autocast the block runs in the precision of
    its state, which is that of its parameters where the start has that of autocast: floating inputs are cast to it.
    Under torch.compile(fullgraph=True) and torch.export the layer is one operator of its inputs and its block's
    parameters; what else the block uses gets no gradient there, forward mode and torch.func are errors, and an exported
    program serves in the process that made it.

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
        self._uses = Uses()
        self._number = register(self)

    def forward(self, *inputs: Tensor, z0: State | None = None) -> State:
        is_compiling = torch.compiler.is_compiling()
        if not (is_compiling or enclosed.depth):
            reset_dropout(self)
        is_module = isinstance(self.block, nn.Module)
        members = Members([self.block]) if is_module else None
        fresh = z0 is None and self.init is None
        if z0 is None:
            z0 = self._start(inputs, members)
        device = parts_of(z0)[0].device.type
        if has_autocast(device):
            z0 = _of_block(z0, torch.get_autocast_dtype(device), members)
            dtype = parts_of(z0)[0].dtype
            wide = lambda x: isinstance(x, Tensor) and x.is_floating_point()  # noqa: E731
            inputs = tuple(x.to(dtype) if wide(x) else x for x in inputs)
        if is_compiling:
            return self._compiled(inputs, z0)
        if len(modules := modules_with_masks(self.block)) > is_module:  # in functions, which may be methods of all
            own = members.parameters if is_module else []
            members = Members(modules)
            members.parameters = own
        f = Applied(self.block, inputs, self._uses, members)
        if members is None or not (members.has_masks or members.norms):
            return self.solve(f, z0, fresh).z
        depth = enclosed.depth
        try:  # no context: Ctrl-C may come where Python leaves one, and no mask would be drawn any more
            enclosed.depth = depth + 1
            return members.while_still(lambda: self.solve(f, z0, fresh)).z
        finally:
            enclosed.depth = depth

    def solve(self, f: Callable[[State], State], z0: State, fresh: bool = False) -> StateSolution:
        """:func:`deq.fixed_point` with the layer's options; ``solution`` keeps it, detached. fresh: as
        :func:`deq.fixed_point.fixed_point_with` says."""
        solution = fixed_point_with(f, z0, _DEFAULTS | self.options, fresh)
        self.__dict__["solution"] = solution.detach()  # not by nn.Module, which looks for parameters in it: 8 us
        return solution

    def attach(self, f: Callable[[State], State], z: State, tensors: list[Tensor]) -> State:
        """z, which :meth:`solve` returned, with its gradient to ``tensors``, all that f uses."""
        return fixed_point_with(f, z, _DEFAULTS | self.options | {"tensors": tensors}, solved=True).z

    def _compiled(self, inputs: tuple[Tensor, ...], z0: State) -> State:
        if self.options.get("backward") == "unrolled":
            raise ValueError("backward='unrolled' is not available inside torch.compile")
        if in_forward_mode():  # torch would drop the tangents without a word
            raise RuntimeError("forward mode is not available for deq.nn.Equilibrium inside torch.compile")
        if not all(isinstance(x, Tensor) for x in inputs):
            raise TypeError("inside torch.compile every input of deq.nn.Equilibrium must be a tensor")
        kind = kind_of(z0)
        parameters = list(self.block.parameters()) if isinstance(self.block, nn.Module) else []
        start = [part.detach() for part in parts_of(z0)]
        seed = new_seed(self.block)
        modes = modes_of(self.block)
        moving = moving_of(self.block)
        found = equilibrium(self._number, seed, modes, kind, start, list(inputs), parameters, moving)
        return as_state(found[: len(start)], kind)

    def _start(self, inputs: tuple[Tensor, ...], members: Members | None) -> State:
        if self.init is not None:
            return self.init(*inputs)
        if not inputs or not isinstance(inputs[0], Tensor):
            raise ValueError("z0 must be given, or init, where the first input is no tensor of the shape of z")
        return torch.zeros_like(inputs[0], dtype=_dtype_of(members) or inputs[0].dtype)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "solution": None, "_uses": Uses()}

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self._number = register(self)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())


def _dtype_of(members: Members | None) -> torch.dtype | None:
    """That of the block's parameters, if it is known: the first one that is no integer, as tables of indices are."""
    for parameter in () if members is None else members.parameters:
        if parameter.dtype.is_floating_point:
            return parameter.dtype
    return None


def _of_block(z0: State, rounded: torch.dtype, members: Members | None) -> State:
    """z0 with the dtype of the block's parameters where autocast may have given it the dtype ``rounded``, as it does to
    what a layer made: the block, which runs without autocast, would refuse it."""
    dtype = _dtype_of(members)
    if dtype is None or all(part.dtype != rounded for part in parts_of(z0)):
        return z0
    parts = [part.to(dtype) if part.dtype == rounded else part for part in parts_of(z0)]
    return as_state(parts, kind_of(z0))
