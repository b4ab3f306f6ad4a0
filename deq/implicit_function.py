"""Exact gradients of the fixed point of any function, by the implicit function theorem.

At ``z = f(z, t)`` with Jacobian ``J = df/dz`` and the loss gradient ``g``, the adjoint ``u = g + J^T u`` is again a
fixed point, solved by the same means, and ``dL/dt = (df/dt)^T u``. A tangent ``dt`` of t gives
``dz = (df/dt) dt + J dz``. Both are equilibria themselves, differentiated in the same way when a gradient of a gradient
is wanted. Between forward and backward nothing is kept but z, the tensors of t, and a graph of f where one is given.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial, wraps

import torch
from torch import Tensor

from .backward import backward_pass, saved_primals, tangent_pass
from .cached_weights import CachedWeights, of_thread, uncached
from .closures import (
    Exchange,
    Graph,
    exchanged,
    exchanges,
    has_strangers,
    in_forward_mode,
    in_transform,
    next_node,
    reaches,
    strays,
    uncompiled,
    within,
)
from .held import Call, Exchanged, enclosed
from .modes import apart_from_autocast, vjp
from .profiling import ranges
from .solvers import generic
from .solvers.generic import Rule

Map = Callable[[Tensor], Tensor]
Solver = Callable[[Map, Tensor, Tensor | None], generic.Result]


@dataclass(eq=False)  # not frozen: that costs each call 4 us where caches are cold
class Equation:
    """``z = f(z, t)`` for states (B, D).

    bind: the tensors t -> the map ``z -> f(z, t)``, differentiable in z and t.
    rule, adjoint: how it is solved, and how its linear equations are: a Rule, of the latter an affine one, or a
        function (f, z0, f(z0) or None) -> Result that does it.
    terms: None, or how many terms of the Neumann series stand in for the adjoint's solution.
    report: told the result of every solve.
    direct: the tensors t -> the map as far as f takes them as arguments, or None; what it takes otherwise stays in it.
    owns_start: whether :func:`fixed_point` may overwrite z0.
    constant: whether the solution is to carry no gradient, under any transform.
    graph: None, or an evaluation of f near the solution whose leaves stand for t: the first backward pass uses it
        instead of evaluating f.
    stranger: None, or raises: called where the backward pass meets a tensor that f uses and that t lacks, though there
        should be none.
    call: what backward passes, which evaluate f again, need to know of the call, or None.
    """

    bind: Callable[..., Map]
    rule: Rule | Solver
    adjoint: Rule | Solver
    terms: int | None = None
    keep: tuple[int, ...] = ()
    report: Callable[[generic.Result, Rule, str], None] = field(default=lambda result, rule, what: None)
    what: str = "deq.fixed_point"
    direct: Callable[..., Map | None] = field(default=lambda *tensors: None)
    stranger: Callable[[], None] | None = None
    owns_start: bool = False
    constant: bool = False
    graph: Graph | None = None
    call: Call | None = None

    def linear(self, bind: Callable[..., Map]) -> "Equation":
        """One of the linear equations that derivatives need."""
        rule = self.adjoint
        return Equation(bind, rule, rule, self.terms, report=self.report, what=self._named_gradient, call=self.call)

    @property
    def is_watched(self) -> bool:
        """Whether f was seen to use the tensors, and is to use them in backward passes as well."""
        return self.call is not None and self.call.watched and self.rule is not self.adjoint

    @property
    def _named_gradient(self) -> str:
        return f"the gradient of {self.what.split()[-1]}"

    def solve_adjoint(self, product: Map, g: Tensor) -> generic.Result:
        """``u = g + product(u)``, product linear."""
        if self.terms is not None or callable(self.adjoint):
            return self.linear(lambda: lambda u: g + product(u)).solve(g)
        result = _run("adjoint", product, g, self.adjoint, shift=g)
        self.report(result, self.adjoint, self._named_gradient)
        return result

    def solve(self, z0: Tensor, *tensors: Tensor, first: Tensor | None = None, owned: bool = False) -> generic.Result:
        """The solution from z0, which may be overwritten if it is ``owned``."""
        f = self.bind(*tensors)
        if self.terms is not None and self.rule is self.adjoint:
            z = z0
            for _ in range(self.terms - 1):
                z = f(z)
            return generic.Result(z, generic.Told.unjudged(z))
        if callable(self.rule):
            return self.rule(f, z0, first)
        before = of_thread.evaluates, of_thread.weights
        try:
            with uncached() if in_transform() else CachedWeights():  # weights are computed once a solve
                name = "adjoint" if self.rule is self.adjoint else "solve"
                result = _run(name, f, z0, self.rule, first=first, keep=self.keep, owned=owned)
        finally:
            of_thread.evaluates, of_thread.weights = before
        self.report(result, self.rule, self.what)
        return result


def _run(name: str, f: Map, z0: Tensor, rule: Rule, **options) -> generic.Result:
    if ranges.listening:
        return ranges.call(name, partial(generic.run, **options), f, z0, rule)
    return generic.run(f, z0, rule, **options)


def closed_over(
    f: Callable[[Tensor], Tensor], tensors: Sequence[Tensor], call: Call | None = None
) -> Callable[..., Map]:
    """``bind`` of a function that closes over ``tensors``; ``call`` is told which of them f uses.

    A solve inside of another function whose tensors are exchanged goes on with that in its backward pass, which may
    come when the exchange is over.
    """
    names = list(tensors)  # all that calls of torch's functions may know the tensors by
    if outer := exchanges():
        f = partial(within, outer, f)
        names = [exchanged(tensor, outer) for tensor in tensors] + names

    def bind(*new: Tensor) -> Map:
        if all(a is b for a, b in zip(tensors, new, strict=True)):
            return f

        def with_new(z: Tensor) -> Tensor:
            exchange = Exchange(names, new * (len(names) // len(new)))
            with exchange, uncompiled():
                image = f(z)
            if call is not None:
                call.tell(exchange.met)
            return image

        return with_new

    return bind


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
    pullback = _differentiable_pullback if torch.is_grad_enabled() or in_transform() else _pullback
    again = nullcontext() if ctx.equation.call is None else ctx.equation.call.again()
    depth = enclosed.depth
    try:
        with again, uncached(), apart_from_autocast(z.device.type):
            found = pullback(ctx.equation, z, tensors, g, wanted)
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


# torch.autograd.grad without its checks of arguments, which are known to hold here, and its care for logging and the
# compiler's threads, taken already by the call that this one is part of: 20 us a product where caches are cold.
_run_backward = torch.autograd.Variable._execution_engine.run_backward


def _pullback(equation: Equation, z: Tensor, tensors: list[Tensor], g: Tensor, wanted: Sequence[bool]) -> tuple:
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
