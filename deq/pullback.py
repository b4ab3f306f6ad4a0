"""Gradients of what a solved function closes over, once: the adjoint's products and sources by one graph of f."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .closures import has_strangers, next_node, reaches, strays
from .equation import Equation
from .solvers import generic

# torch.autograd.grad without its checks of arguments, which are known to hold here, and its care for logging and the
# compiler's threads, taken already by the call that this one is part of: 20 us a product where caches are cold.
_run_backward = torch.autograd.Variable._execution_engine.run_backward


def pullback(equation: Equation, z: Tensor, tensors: list[Tensor], g: Tensor, wanted: Sequence[bool]) -> tuple:
    """Gradients of ``tensors`` for the gradient g of z; one graph of f serves every product J^T u."""
    g, finite, scale = _normalised(g)
    graph, watched = equation.graph, equation.is_watched
    image = None if graph is None else graph.take()
    if image is not None:
        point, leaves, missed = graph.point, graph.leaves, []
        begin = 0  # every node is one of this graph
    else:  # where the graph was, if there was one: the same gradients once more
        point, begin = (z if graph is None else graph.point).detach().requires_grad_(), next_node()
        image, leaves, missed = _image(equation, point, tensors, wanted)
        if not image.requires_grad:
            if watched:
                equation.call.refuse()
            return (None,) * len(tensors)
        if equation.stranger is not None and has_strangers(image, begin, [point, *leaves, *tensors]):
            equation.stranger()

    images, points = (image,), (point,)

    def product(u: Tensor) -> Tensor:
        (v,) = _run_backward(images, (u,), True, False, points, allow_unreachable=True, accumulate_grad=False)
        return torch.zeros_like(u) if v is None else v

    u = equation.solve_adjoint(product, g).z
    if finite is not None:
        u = torch.where(finite, u, torch.nan)
    if scale is not None:
        u = u * scale
    sources = [leaf for leaf, want in zip(leaves, wanted, strict=True) if want] + [tensors[i] for i in missed]
    if sources:
        found = _run_backward(images, (u,), False, False, tuple(sources), allow_unreachable=True, accumulate_grad=False)
    else:
        found = ()
    if watched and any(grad is None for grad in found):
        there = [*leaves, *(tensors[i] for i in missed)]
        if not reaches(image, there) or has_strangers(image, begin, [point, *there, *tensors]):
            equation.call.refuse()
    found = iter(found)
    grads = [next(found) if want else None for want in wanted]
    for i in missed:
        more = next(found)
        grads[i] = more if grads[i] is None else grads[i] + more
    return tuple(grads)


def _image(
    equation: Equation, point: Tensor, tensors: list[Tensor], wanted: Sequence[bool]
) -> tuple[Tensor, list[Tensor], list[int]]:
    """f at ``point`` with its graph, what stands for every one of ``tensors`` there, and which of them are there
    themselves, though they were to be replaced.

    A leaf may stay: no other tensor is behind it, and without hooks nobody sees that it is differentiated twice. Others
    are replaced, so that the gradient ends at them: as arguments of f where they are nothing else, which costs nothing,
    or by watching f, which costs 15 us an operator.
    """
    stays = [t.is_leaf and not t._backward_hooks for t in tensors]
    if all(stays):
        with torch.enable_grad():
            return equation.bind(*tensors)(point), tensors, []
    replaced = [t for t, stay in zip(tensors, stays, strict=True) if not stay]
    pairs = list(zip(tensors, wanted, strict=True))
    if any(stays):
        leaves = [t if stay else t.detach().requires_grad_(want) for (t, want), stay in zip(pairs, stays, strict=True)]
        f = equation.direct(*leaves)
        if f is not None:
            with torch.enable_grad():
                image = f(point)
            if not reaches(image, replaced):
                return image, leaves, []
    leaves = [t.detach().requires_grad_(want) for t, want in pairs]
    with torch.enable_grad():
        image = equation.bind(*leaves)(point)
    return image, leaves, strays([image], tensors) if image.requires_grad else []


def _normalised(g: Tensor) -> tuple[Tensor, Tensor | None, Tensor | float | None]:
    """g (B, D) scaled by a power of two, which rounds nothing, with zeros for rows that are not finite; which rows are
    finite (B, 1), None if all are; and what undoes the scaling, None for 1.

    Where looking at a number costs nothing, a g that can be used as it is is left alone.
    """
    looking = g.device.type == "cpu" and type(g) is Tensor
    if looking and 2.0**-20 < generic.norm(g) < 2.0**20:
        return g, None, None
    finite = torch.isfinite(g).all(1, keepdim=True)
    scale = _power_of_two(g)
    return torch.where(finite, g * (1 / scale), 0.0), finite, scale


def _power_of_two(g: Tensor) -> Tensor:
    """The power of two that brings the largest finite element of g near 1."""
    if g.numel() == 0:
        return torch.ones((), dtype=g.dtype, device=g.device)
    largest = torch.where(torch.isfinite(g), g, 0.0).abs().amax()
    limit = 100.0 if g.dtype == torch.float32 else 1000.0
    exponent = torch.where(largest > 0, largest.log2().round(), 0.0).clamp(-limit, limit)
    return torch.exp2(exponent)
