"""What every backward pass of an equilibrium starts with, whatever its function: a batch of gradients is taken apart
(``torch.autograd.grad(is_grads_batched=True)``, ``torch.autograd.functional.jacobian(vectorize=True)``), and autocast,
which would round products to 16 bits, is off. And every tangent of forward mode: it has tangents itself."""

from collections.abc import Callable
from functools import wraps

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction as SingleLevelFunction

from .modes import has_autocast

# Whether the gradient of a backward pass is such a batch: a tensor of torch's older vmap, which has no rule for our
# operators and asks no torch.autograd.Function for one.
is_batch_of_gradients = torch._C._functorch.is_legacy_batchedtensor


def one_gradient_at_a_time(function: Callable[..., object], ctx, *given: Tensor | None) -> object:
    """``function(ctx, *given)``, the ``backward`` or ``jvp`` of a torch.autograd.Function, where some of ``given`` are
    batches of gradients or tangents: its results, batched."""
    level = torch._C._vmapmode_increment_nesting() - 1
    torch._C._vmapmode_decrement_nesting()
    batches = [
        torch._remove_batch_dim(t, level, 0, 0) if t is not None and is_batch_of_gradients(t) else None for t in given
    ]
    size = next(len(batch) for batch in batches if batch is not None)
    found = [
        function(ctx, *(t if batch is None else batch[i] for t, batch in zip(given, batches, strict=True)))
        for i in range(size)
    ]

    def batched(*each: Tensor | None) -> Tensor | None:
        return None if each[0] is None else torch._add_batch_dim(torch.stack(each), 0, level)

    return batched(*found) if isinstance(found[0], Tensor) else tuple(map(batched, *found))


def at_one_level(function: type[SingleLevelFunction], *inputs: object) -> object:
    """``function.apply`` inside of an operator's own autograd kernel: of nested transforms of torch.func it is called
    for one, and what it calls below goes on to the next. A torch.autograd.Function would start with the outermost."""
    with enable_single_level_autograd_function():
        return function.apply(*inputs)


def backward_pass(backward: Callable[..., tuple]) -> Callable[..., tuple]:
    """The ``backward`` of a torch.autograd.Function whose first output alone has a gradient: 0.1 us a call."""

    @wraps(backward)
    def run(ctx, g: Tensor | None, *others) -> tuple:
        if g is not None:
            if is_batch_of_gradients(g):
                return one_gradient_at_a_time(backward, ctx, g, *others)
            device = "cpu" if g.is_cpu else g.device.type
            if has_autocast(device):
                with torch.autocast(device, enabled=False):
                    return backward(ctx, g, *others)
        return backward(ctx, g, *others)

    return run


def tangent_pass(jvp: Callable[..., object]) -> Callable[..., object]:
    """The ``jvp`` of a torch.autograd.Function, right inside of further torch.func.jvp too: torch switches forward mode
    off around it, and the tangents that its operators pass on to transforms further out would be zero, in silence. What
    it saved it must read by :func:`saved_primals`."""

    @wraps(jvp)
    def run(ctx, *tangents) -> object:
        with forward_ad._set_fwd_grad_enabled(True):
            if any(t is not None and is_batch_of_gradients(t) for t in tangents):
                return one_gradient_at_a_time(jvp, ctx, *tangents)
            return jvp(ctx, *tangents)

    return run


def tangent_of(t: Tensor) -> Tensor | None:
    """The tangent of the innermost forward mode, if there is one: also where torch.compile traces, and Python's count
    of levels knows nothing of it."""
    return torch._VF._unpack_dual(t, level=0)[1]


def saved_primals(ctx) -> list[Tensor | None]:
    """``ctx.saved_tensors`` without the tangents that :func:`tangent_pass` is there to make something of."""
    return [None if t is None else torch._VF._unpack_dual(t, level=0)[0] for t in ctx.saved_tensors]
