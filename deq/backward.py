"""What every backward pass of an equilibrium starts with, whatever its function: a batch of gradients is taken apart
(``torch.autograd.grad(is_grads_batched=True)``, ``torch.autograd.functional.jacobian(vectorize=True)``), and autocast,
which would round products to 16 bits, is off."""

from collections.abc import Callable
from functools import wraps

import torch
from torch import Tensor

from .modes import has_autocast

# Whether the gradient of a backward pass is such a batch: a tensor of torch's older vmap, which has no rule for our
# operators and asks no torch.autograd.Function for one.
is_batch_of_gradients = torch._C._functorch.is_legacy_batchedtensor


def one_gradient_at_a_time(backward: Callable[..., tuple], ctx, g: Tensor, *others) -> tuple:
    """``backward(ctx, g, *others)`` of a torch.autograd.Function for a batch g of gradients: its results, batched."""
    level = torch._C._vmapmode_increment_nesting() - 1
    torch._C._vmapmode_decrement_nesting()
    found = [backward(ctx, one, *others) for one in torch._remove_batch_dim(g, level, 0, 0)]
    return tuple(
        None if grads[0] is None else torch._add_batch_dim(torch.stack(grads), 0, level)
        for grads in zip(*found, strict=True)
    )


def backward_pass(backward: Callable[..., tuple]) -> Callable[..., tuple]:
    """The ``backward`` of a torch.autograd.Function whose first output alone has a gradient: 0.1 us a call."""

    @wraps(backward)
    def run(ctx, g: Tensor | None, *others) -> tuple:
        if g is not None:
            if is_batch_of_gradients(g):
                return one_gradient_at_a_time(backward, ctx, g, *others)
            if has_autocast(g.device.type):
                with torch.autocast(g.device.type, enabled=False):
                    return backward(ctx, g, *others)
        return backward(ctx, g, *others)

    return run
