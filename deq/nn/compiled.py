"""An equilibrium layer as one operator, for torch.compile and torch.export.

A solve decides by its numbers when to stop, which no graph can hold: in a compiled graph it is the opaque operator
``deq::equilibrium``, its gradient another. They know their layer by a number that is good for this process.
"""

import itertools
import weakref
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..traced import autograd_inside

_numbers = itertools.count()
_layers: "weakref.WeakValueDictionary[int, nn.Module]" = weakref.WeakValueDictionary()


def register(layer: nn.Module) -> int:
    """The number by which the operators find ``layer`` as long as it lives."""
    number = next(_numbers)
    _layers[number] = layer
    return number


def _layer(number: int) -> nn.Module:
    try:
        return _layers[number]
    except KeyError:
        raise RuntimeError(
            "deq::equilibrium: its layer is gone; a compiled or exported graph serves while the layer that it was made "
            "from lives in the same process"
        ) from None


def _function(layer: nn.Module, inputs: list[Tensor], parameters: list[Tensor]) -> Callable:
    block = layer.block
    if not isinstance(block, nn.Module):
        return lambda z: block(z, *inputs)
    values = dict(zip((name for name, _ in block.named_parameters()), parameters, strict=True))
    return lambda z: torch.func.functional_call(block, values, (z, *inputs))


def _as_state(parts: list[Tensor], is_tuple: bool) -> Tensor | tuple[Tensor, ...]:
    return tuple(parts) if is_tuple else parts[0]


def _as_parts(state: Tensor | tuple[Tensor, ...]) -> list[Tensor]:
    parts = (state,) if isinstance(state, Tensor) else state
    return [part.clone(memory_format=torch.contiguous_format) for part in parts]


@torch.library.custom_op("deq::equilibrium", mutates_args=())
def equilibrium(
    layer: int, is_tuple: bool, start: list[Tensor], inputs: list[Tensor], parameters: list[Tensor]
) -> list[Tensor]:
    """The equilibrium of a registered layer from ``start``, its parts."""
    module = _layer(layer)
    solution = module.solve(_function(module, inputs, parameters), _as_state(start, is_tuple))
    return _as_parts(solution.z)


@equilibrium.register_fake
def _(layer, is_tuple, start, inputs, parameters):
    return [torch.empty_like(part, memory_format=torch.contiguous_format) for part in start]


@torch.library.custom_op("deq::equilibrium_backward", mutates_args=())
def equilibrium_backward(
    layer: int, is_tuple: bool, z: list[Tensor], inputs: list[Tensor], parameters: list[Tensor], g: list[Tensor]
) -> list[Tensor]:
    """Gradients of the inputs and the parameters: the solve is taken up at its end, and differentiated there."""
    module = _layer(layer)
    with autograd_inside(), torch.enable_grad():
        leaves = [t.detach().requires_grad_(t.is_floating_point()) for t in (*inputs, *parameters)]
        f = _function(module, leaves[: len(inputs)], leaves[len(inputs) :])
        solution = module.solve(f, _as_state(z, is_tuple))
        parts = [solution.z] if isinstance(solution.z, Tensor) else list(solution.z)
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        found = iter(torch.autograd.grad(parts, wanted, g, allow_unused=True) if wanted else ())
    grads = [next(found) if leaf.requires_grad else None for leaf in leaves]
    # In contiguous memory, which is what the compiler was told.
    return [
        torch.zeros(leaf.shape, dtype=leaf.dtype, device=leaf.device)
        if grad is None
        else grad.clone(memory_format=torch.contiguous_format)
        for leaf, grad in zip(leaves, grads, strict=True)
    ]


@equilibrium_backward.register_fake
def _(layer, is_tuple, z, inputs, parameters, g):
    return [torch.empty_like(t, memory_format=torch.contiguous_format) for t in (*inputs, *parameters)]


def _setup_context(ctx, inputs, output):
    ctx.layer, ctx.is_tuple, _, x, parameters = inputs
    ctx.counts = len(output), len(x)
    ctx.save_for_backward(*output, *x, *parameters)


def _backward(ctx, g):
    n, m = ctx.counts
    saved = list(ctx.saved_tensors)
    z, x, parameters = saved[:n], saved[n : n + m], saved[n + m :]
    grads = equilibrium_backward(ctx.layer, ctx.is_tuple, z, x, parameters, list(g))
    floating = [grad if t.is_floating_point() else None for grad, t in zip(grads, (*x, *parameters), strict=True)]
    return None, None, [None] * n, floating[:m], floating[m:]


equilibrium.register_autograd(_backward, setup_context=_setup_context)
