"""Exact gradients of the fixed point of any function, by the implicit function theorem.

At ``z = f(z, t)`` with Jacobian ``J = df/dz`` and the loss gradient ``g``, the adjoint ``u = g + J^T u`` is again a
fixed point, solved by the same means, and ``dL/dt = (df/dt)^T u``. A tangent ``dt`` of t gives
``dz = (df/dt) dt + J dz``. Both are equilibria themselves, differentiated in the same way when a gradient of a gradient
is wanted. Between forward and backward nothing is kept but z, the tensors of t, and a graph of f where one is given.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import wraps

import torch
from torch import Tensor

from .backward import backward_pass, saved_primals, tangent_pass
from .cached_weights import uncached
from .closures import has_strangers, in_forward_mode, in_transform, next_node, reaches, strays
from .equation import Equation, Map
from .members import Exchanged, enclosed
from .modes import apart_from_autocast, vjp
from .pullback import pullback
from .solvers import generic


def attached(equation: Equation, z: Tensor, tensors: Sequence[Tensor]) -> Tensor:
    """z, which is known to solve the equation, with a gradient to ``tensors``."""
    if in_transform() or in_forward_mode():
        known = replace(equation, rule=lambda f, z0, first: generic.Result(z0, generic.Told.unjudged(z0)))
        return _FixedPoint.apply(known, z, None, *tensors)[0]
    return _solved(equation, z, *tensors)


def fixed_point(equation: Equation, z0: Tensor, tensors: Sequence[Tensor], first: Tensor | None) -> generic.Result:
    """The solution, its z with a gradient to ``tensors``; z0 is overwritten where ``equation.owns_start``."""
    if in_transform() or in_forward_mode():
        z, *rest = _FixedPoint.apply(equation, z0, first, *tensors)
        return generic.Result(z, generic.Told(*rest[:3]), rest[3:])
    result = equation.solve(z0, *tensors, first=first, owned=equation.owns_start)
    trajectory = [result.z if state is None else state for state in result.trajectory]
    return generic.Result(_solved(equation, result.z, *tensors), result.told, trajectory)


def _gives_back(backward: Callable[..., tuple]) -> Callable[..., tuple]:
    """The ``backward`` of an equation's solution, which lets go of the equation as torch does of what is saved: a loss
    that somebody keeps, with the graph already used, would keep f and all that it holds."""

    @wraps(backward)
    def run(ctx, *g):
        found = backward(ctx, *g)
        if not torch._C._autograd._get_current_graph_task_keep_graph():
            ctx.equation = None
        return found

    return run


class _Solved(torch.autograd.Function):
    """(equation, its solution, *t) -> z: as _FixedPoint outside of transforms, at a third of torch's cost of a call."""

    @staticmethod
    def forward(ctx, equation, z, *tensors):
        z = z.detach()
        ctx.equation = equation
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(z, *tensors)
        return z

    @staticmethod
    @_gives_back
    @backward_pass
    def backward(ctx, g):
        return None, None, *_gradients(ctx, g, ctx.needs_input_grad[2:])


# _Solved.apply without what torch.autograd.Function does for transforms, which are not active here: 20 us where caches
# are cold.
_solved = super(torch.autograd.Function, _Solved).apply


class _FixedPoint(torch.autograd.Function):
    """(equation, z0, f(z0) or None, *t) -> z, iterations, residual, status, *trajectory; only z is differentiable."""

    @staticmethod
    def forward(equation, z0, first, *tensors):
        result = equation.solve(z0, *tensors, first=first)
        last = result.z
        trajectory = [last if state is None else state for state in result.trajectory]
        z = result.z
        if z is z0 or z is first:  # what comes in may not go out and be saved, and a view has no tangent of its own
            z = z.clone()
        return (z, result.iterations, result.residual, result.status, *(t.clone() for t in trajectory))

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.equation, _, _, *tensors = inputs
        ctx.mark_non_differentiable(*output[0 if ctx.equation.constant else 1 :])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(output[0], *tensors)
        ctx.save_for_forward(output[0], *tensors)

    @staticmethod
    @_gives_back
    @backward_pass
    def backward(ctx, g, *_):
        return None, None, None, *_gradients(ctx, g, ctx.needs_input_grad[3:])

    @staticmethod
    @tangent_pass
    def jvp(ctx, _equation, _z0, _first, *tangents):
        others = (None,) * (3 + len(ctx.equation.keep))
        if ctx.equation.constant:
            return (None, *others)
        with uncached():
            return (_tangent(ctx.equation, *saved_primals(ctx), tangents=tangents), *others)

    @staticmethod
    def vmap(info, in_dims, equation, z0, first, *tensors):
        """The batch of equations is one equation with more samples."""
        N = info.batch_size
        z0 = z0.expand(N, *z0.shape) if in_dims[1] is None else z0.movedim(in_dims[1], 0)
        B, D = z0.shape[1:]
        dims = in_dims[3:]

        def bind(*tensors: Tensor) -> Map:
            def evaluate(z: Tensor, *tensors: Tensor) -> Tensor:
                return equation.bind(*tensors)(z)

            each = torch.vmap(evaluate, (0, *dims), randomness=info.randomness)
            return lambda z: each(z.reshape(N, B, D), *tensors).reshape(N * B, D)

        many = replace(equation, bind=bind, direct=lambda *tensors: None)
        z, *rest = _FixedPoint.apply(many, z0.reshape(N * B, D), None, *tensors)
        outputs = (z.view(N, B, D), *(t.view(N, B) for t in rest[:3]), *(t.view(N, B, D) for t in rest[3:]))
        return outputs, (0,) * len(outputs)


def _tangent(equation: Equation, z: Tensor, *tensors: Tensor, tangents: Sequence[Tensor | None]) -> Tensor:
    """That of the solution z, for those of ``tensors``."""
    moving = [i for i, tangent in enumerate(tangents) if tangent is not None]
    along = _along(equation, z, tensors, moving)
    t = _jvp(along, [tensors[i] for i in moving], [tangents[i] for i in moving])

    def bind(t: Tensor, z: Tensor, *tensors: Tensor) -> Map:
        f = equation.bind(*tensors)
        return lambda v: t + _jvp(f, [z], [v])

    return _FixedPoint.apply(equation.linear(bind), t, None, t, z, *tensors)[0]


def _along(equation: Equation, z: Tensor, tensors: Sequence[Tensor], moving: Sequence[int]) -> Callable[..., Tensor]:
    """f at z as a function of those of ``tensors`` that move, given by number; integers, for one, do not."""

    def along(*some: Tensor) -> Tensor:
        new = list(tensors)
        for i, tensor in zip(moving, some, strict=True):
            new[i] = tensor
        return equation.bind(*new)(z)

    return along


def _gradients(ctx, g: Tensor | None, wanted: Sequence[bool]) -> tuple:
    """What flows back to the tensors of ``ctx.equation``."""
    z, *tensors = ctx.saved_tensors
    if g is None:
        return (None,) * len(tensors)
    pull = _differentiable_pullback if torch.is_grad_enabled() or in_transform() else pullback
    again = nullcontext() if ctx.equation.call is None else ctx.equation.call.again()
    depth = enclosed.depth
    try:
        with again, uncached(), apart_from_autocast(z.device.type):
            found = pull(ctx.equation, z, tensors, g, wanted)
    finally:
        enclosed.depth = depth
        if isinstance(again, Exchanged):
            again.put_back()
    if any(grad is None for grad in found):  # of a tensor that f does not use: torch would call its hooks with None
        found = [
            torch.zeros_like(t) if grad is None and want and t._backward_hooks else grad
            for grad, want, t in zip(found, wanted, tensors, strict=True)
        ]
    return tuple(found)


def _differentiable_pullback(
    equation: Equation, z: Tensor, tensors: list[Tensor], g: Tensor, wanted: Sequence[bool]
) -> tuple:
    """The same gradients as differentiable functions of z, the tensors and g, to any order and under any transform."""

    def bind(g: Tensor, z: Tensor, *tensors: Tensor) -> Map:
        _, pull = vjp(equation.bind(*tensors), z)
        return lambda u: g + pull(u)[0]

    _refuse_strays(equation, z, tensors)
    u = _FixedPoint.apply(equation.linear(bind), g, None, g, z, *tensors)[0]
    moving = [i for i, want in enumerate(wanted) if want]
    _, pull = vjp(_along(equation, z, tensors, moving), *(tensors[i] for i in moving))
    found = dict(zip(moving, pull(u), strict=True))
    return tuple(found.get(i) for i in range(len(tensors)))


def _refuse_strays(equation: Equation, z: Tensor, tensors: list[Tensor]) -> None:
    wrapped = torch._C._functorch.is_functorch_wrapped_tensor
    if in_transform() or any(wrapped(t) for t in tensors) or not any(t.requires_grad for t in tensors):
        return
    leaves = [t.detach().requires_grad_(t.requires_grad) for t in tensors]
    point, begin = z.detach().requires_grad_(), next_node()
    with torch.enable_grad():
        image = equation.bind(*leaves)(point)
    known = [point, *leaves, *tensors]
    if equation.stranger is not None and image.requires_grad and has_strangers(image, begin, known):
        equation.stranger()
    missed = strays([image], tensors) if image.requires_grad else []
    if equation.is_watched and not missed and not reaches(image, leaves):
        equation.call.refuse()
    if missed:
        raise RuntimeError(
            "f uses a tensor that requires a gradient inside a custom autograd function or compiled code: "
            "deq.fixed_point differentiates it once, not twice"
        )


def _jvp(f: Callable[..., Tensor], primals: list[Tensor], tangents: list[Tensor]) -> Tensor:
    """The product of f's Jacobian with tangents, by two reverse passes: forward mode cannot be nested in itself."""
    out, pull = vjp(f, *primals)
    _, push = vjp(pull, torch.zeros_like(out))
    return push(tuple(tangents))[0]
