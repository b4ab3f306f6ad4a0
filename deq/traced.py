"""A solve as an operator, for torch.compile, torch.export and whatever else writes operators into a graph.

A solve decides by its numbers when to stop and what to try next, which no graph can hold. In a graph it is the operator
``deq::solve``, and its gradient ``deq::solve_gradient``: opaque, they do what :func:`deq.solve` does outside of one, by
the same plan and means, with the same warnings and errors. Their arguments say all there is to say, so that an exported
program serves in any process that imports deq. A gradient that is itself differentiated and a tangent (``torch.func``
inside of the graph) are made of ``deq::masked_linear`` and torch's own operators.

On a GPU nobody in a graph waits to learn that samples failed: ``solution.status`` tells, and nothing warns.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils import _pytree as pytree

from . import _library, direct, stats
from .activations import ACTIVATIONS
from .backends import get_backend
from .backward import SingleLevelFunction, at_one_level, backward_pass, saved_primals, tangent_of, tangent_pass
from .batch import Batch
from .implicit import Problem, adjoint, approximate, derivative_at, masked_tangent, solve_masked
from .indicators import fitted, is_large
from .modes import no_autocast
from .options import check_backward, problem_of
from .run import canonical_shape, run
from .solution import Solution, rounded
from .weights import Dense, Diagonal, DiagonalLowRank, LowerTriangular, Structure

_OPTIONS = (
    "str activation, float? tol, int? max_iter, str solver, str criterion, str on_failure, str backend, bool frozen"
)
_SOLVE = f"solve(Tensor[] parts, str structure, Tensor c, Tensor? z0, {_OPTIONS}) -> (Tensor, Tensor)"
_GRADIENT = (  # with c where z alone does not give the derivative; of c and with of_parts of the parts
    f"solve_gradient(Tensor[] parts, str structure, Tensor? c, Tensor z, Tensor g, bool of_parts, {_OPTIONS})"
    " -> Tensor[]"
)
_MASKED = f"masked_linear(Tensor A, Tensor d, Tensor g, {_OPTIONS}) -> Tensor"
_STRUCTURES = {kind.structure: kind for kind in (Dense, LowerTriangular, Diagonal, DiagonalLowRank)}
_STRICT = "strictly_lower_triangular"


def solve(
    W: Tensor | Structure,
    c: Tensor,
    z0: Tensor | None,
    activation: str,
    tol: float | None,
    max_iter: int | None,
    solver: str,
    criterion: str,
    backward: str,
    on_failure: str,
    backend: str,
    frozen: bool,
) -> Solution:
    """:func:`deq.solve` inside of a graph; its plan is not known there."""
    check_backward(backward)
    if backward == "unrolled":
        raise ValueError("backward='unrolled' is not available inside torch.compile, other graphs and without numbers")
    options = activation, tol, max_iter, solver, criterion, on_failure, backend, frozen
    z0 = None if z0 is None else z0.detach()
    parts, structure = _parts_of(W)
    if backward == "implicit":
        return Solution(*torch.ops.deq.solve.default(parts, structure, c, z0, *options))
    with torch.no_grad():  # without tangents either: what is differentiated is evaluated below
        z, said = torch.ops.deq.solve.default([part.detach() for part in parts], structure, c.detach(), z0, *options)
    if torch.is_grad_enabled() or torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        with no_autocast(c.device.type):
            W = _formed(parts, structure)
            flat = canonical_shape(W.dim(), c.shape)
            z = approximate(W, c.reshape(flat), z.reshape(flat), activation, backward).reshape(c.shape)
    return Solution(z, said)


def _parts_of(W: Tensor | Structure) -> tuple[list[Tensor], str]:
    """What a weight consists of, and the name of its structure."""
    if isinstance(W, Tensor):
        return [W], Dense.structure
    if isinstance(W, LowerTriangular) and W.strict:
        return [W.W], _STRICT
    if W.structure in _STRUCTURES:
        return list(W.parts), W.structure
    return [W.dense()], Dense.structure


def _weight_of(parts: Sequence[Tensor], structure: str) -> Tensor | Structure:
    if structure == Dense.structure:  # (m, m), or a stack, which is no structure
        return parts[0]
    return LowerTriangular(parts[0], strict=True) if structure == _STRICT else _STRUCTURES[structure](*parts)


def _formed(parts: Sequence[Tensor], structure: str) -> Tensor:
    """The matrix, of float32 where 16 bits would round what they are formed to."""
    W = _weight_of(parts, structure)
    return W if isinstance(W, Tensor) else W.formed()


def _as(W: Tensor, *given: Tensor | None) -> tuple[Tensor | None, ...]:
    return tuple(x if x is None or x.dtype == W.dtype else x.to(W.dtype) for x in given)


def _problem(c: Tensor, activation, tol, max_iter, solver, criterion, on_failure, backend) -> Problem:
    given = activation, tol, max_iter, solver, criterion, "implicit", on_failure, backend
    place = str(c.device) if c.device.type == "cuda" else c.device.type
    return problem_of(*given, c.dtype, place, _library.compiled is not None)


def _fitted(problem: Problem, A: Tensor, c: Tensor, frozen: bool) -> Problem:
    """The problem as the solve has it that this one is a gradient of; A is its W or the transpose."""
    activation, plan, on_failure = problem
    if plan.adapts:
        plan = fitted(plan, A, c, frozen, large=plan.reflects and is_large(A))
    return Problem(activation, plan, on_failure)


# ---- the solve ------------------------------------------------------------------------------------------------------


def _solve(parts, structure, c, z0, activation, tol, max_iter, solver, criterion, on_failure, backend, frozen):
    problem = _problem(c, activation, tol, max_iter, solver, criterion, on_failure, backend)
    solution = run(_weight_of(parts, structure), c, z0, problem, solver, "implicit", frozen)
    return solution.z.contiguous(), solution.stats


def _solve_fake(parts, structure, c, z0, activation, tol, max_iter, solver, criterion, on_failure, backend, frozen):
    _problem(c, activation, tol, max_iter, solver, criterion, on_failure, backend)  # wrong options are refused here
    z = torch.empty_like(c, memory_format=torch.contiguous_format)
    return z, stats.allocate(z)


def _solve_vmap(info, in_dims, parts, structure, c, z0, *options):
    of_parts, _, of_c, of_z0, *_ = in_dims
    if structure != Dense.structure and any(dim is not None for dim in of_parts):
        each = [
            (part,) * info.batch_size if dim is None else part.unbind(dim)
            for part, dim in zip(parts, of_parts, strict=True)
        ]
        parts = [torch.stack([_formed(some, structure) for some in zip(*each, strict=True)])]
        of_parts, structure = [0], Dense.structure
    W = _formed(parts, structure)
    many = Batch(info.batch_size, of_parts[0], W)

    def samples(x: Tensor, dim: int | None) -> Tensor:
        x = x.expand(info.batch_size, *x.shape) if dim is None else x.movedim(dim, 0)
        return many.samples(x.reshape(info.batch_size, *canonical_shape(3 if many.stacked else 2, x.shape[1:])), 0)

    shape = (info.batch_size, *(c.shape if of_c is None else c.movedim(of_c, 0).shape[1:]))
    z0 = None if z0 is None else samples(z0, of_z0)
    parts = [many.weight(W)] if structure == Dense.structure else parts
    z, said = torch.ops.deq.solve.default(parts, structure, *_as(parts[0], samples(c, of_c), z0), *options)
    if z.dtype != c.dtype:
        z, said = rounded(z, said, c.dtype)
    return (many.apart(z).reshape(shape), many.stats(z, said)), (0, 0)


class _Solve(SingleLevelFunction):
    """(structure, options, c, z0, *parts) -> z, what is said of its samples."""

    @staticmethod
    def forward(ctx, structure, options, c, z0, *parts):
        with _below_autograd():
            z, said = torch.ops.deq.solve.default(list(parts), structure, c, z0, *options)
        ctx.structure, ctx.options = structure, options
        ctx.mark_non_differentiable(said)
        saved = z, None if ACTIVATIONS[options[0]].derivative_of_value else c, *parts
        ctx.save_for_backward(*saved)
        ctx.save_for_forward(*saved)
        return z, said

    @staticmethod
    @backward_pass
    def backward(ctx, g, _):
        z, c, *parts = ctx.saved_tensors
        if torch.is_grad_enabled():  # the gradient must itself be differentiable
            u, grads = _differentiable_gradient(parts, ctx.structure, c, z, g, ctx.options)
        else:
            of_parts = any(ctx.needs_input_grad[4:])
            u, *grads = torch.ops.deq.solve_gradient.default(parts, ctx.structure, c, z, g, of_parts, *ctx.options)
        return None, None, u, None, *(grads or [None] * len(parts))

    @staticmethod
    @tangent_pass
    def jvp(ctx, _structure, _options, dc, _z0, dW):  # the structure is dense
        z, c, W = saved_primals(ctx)
        flat = canonical_shape(W.dim(), z.shape)
        c, dc, rows = (None if x is None else x.reshape(flat) for x in (c, dc, z))
        g = torch.zeros_like(rows) if dc is None else dc
        if dW is not None:
            g = g + rows @ dW.mT
        dz = torch.ops.deq.masked_linear.default(W, derivative_at(W, c, rows, ctx.options[0]), g, *ctx.options)
        return dz.reshape(z.shape), None


def _solve_autograd(parts, structure, c, z0, *options):
    if any(tangent_of(t) is not None for t in (c, *parts)):
        W = _formed(parts, structure)
        z, said = at_one_level(_Solve, Dense.structure, options, *_as(W, c, z0), W)
        return (z, said) if z.dtype == c.dtype else rounded(z, said, c.dtype)
    if not (torch.is_grad_enabled() and (c.requires_grad or any(part.requires_grad for part in parts))):
        with torch._C._AutoDispatchBelowAutograd():  # as a graph is run: a third of what the call costs the host
            return torch.ops.deq.solve.default(parts, structure, c, z0, *options)
    return at_one_level(_Solve, structure, options, c, z0, *parts)


def _differentiable_gradient(parts, structure, c, z, g, options):
    W, shape = _formed(parts, structure), g.shape
    flat, dtype = canonical_shape(W.dim(), shape), g.dtype
    c, z, g = _as(W, *(None if x is None else x.reshape(flat) for x in (c, z, g)))
    u = torch.ops.deq.masked_linear.default(W.mT, derivative_at(W, c, z, options[0]), g, *options)
    grads = [torch.matmul(u.mT, z)]
    if structure != Dense.structure:
        grads = list(torch.func.vjp(lambda *parts: _formed(parts, structure), *parts)[1](grads[0]))
    return u.reshape(shape).to(dtype), grads


# ---- its gradient ----------------------------------------------------------------------------------------------------


def _gradient(
    parts, structure, c, z, g, of_parts, activation, tol, max_iter, solver, criterion, on_failure, backend, frozen
):
    problem = _problem(z, activation, tol, max_iter, solver, criterion, on_failure, backend)
    W, shape = _weight_of(parts, structure), z.shape
    found = direct.gradients(W, c, z, g, of_parts, problem, solver == "direct", frozen)
    if found is None:
        W = _formed(parts, structure)
        flat, dtype = canonical_shape(W.dim(), shape), g.dtype
        c, z, g = _as(W, *(None if x is None else x.reshape(flat) for x in (c, z, g)))
        problem = _fitted(problem, W, z, frozen)
        u, grads = adjoint(W, z, c, g, problem), []
        if of_parts:
            dW = get_backend(problem.plan.backend).outer(u, z)
            grads = [dW] if structure == Dense.structure else _pulled(parts, structure, dW)
        found = u.to(dtype), grads
    u, grads = found
    return [u.reshape(shape).contiguous(), *(t.contiguous() for t in grads)]


def _gradient_fake(parts, structure, c, z, g, of_parts, *options):
    return [torch.empty_like(t, memory_format=torch.contiguous_format) for t in (g, *(parts if of_parts else ()))]


def _pulled(parts: Sequence[Tensor], structure: str, dW: Tensor) -> Sequence[Tensor]:
    """The gradients of a structure's own tensors."""
    with included(), torch.enable_grad():
        leaves = [part.detach().requires_grad_() for part in parts]
        return torch.autograd.grad(_formed(leaves, structure), leaves, dW)


AUTOGRAD = (torch._C.DispatchKey.AutogradFunctionality, torch._C.DispatchKey.ADInplaceOrView)


@contextmanager
def included(keys: Sequence[torch._C.DispatchKey] = AUTOGRAD) -> Iterator[None]:
    """While active, what torch's dispatch keys stand for is there; an operator is run without :data:`AUTOGRAD`."""
    before = [torch._C._dispatch_tls_is_dispatch_key_excluded(key) for key in keys]
    try:
        for key in keys:
            torch._C._dispatch_tls_set_dispatch_key_excluded(key, False)
        yield
    finally:
        for key, excluded in zip(keys, before, strict=True):
            torch._C._dispatch_tls_set_dispatch_key_excluded(key, excluded)


# ---- u = d * (A u + g), canonical, differentiable for ever -----------------------------------------------------------


def _masked(A, d, g, activation, tol, max_iter, solver, criterion, on_failure, backend, frozen):
    problem = _problem(g, activation, tol, max_iter, solver, criterion, on_failure, backend)
    return solve_masked(A, g, d, None, _fitted(problem, A, g, frozen)).contiguous()


def _masked_fake(A, d, g, *options):
    return torch.empty_like(g, memory_format=torch.contiguous_format)


def _masked_vmap(info, in_dims, A, d, g, *options):
    many = Batch(info.batch_size, in_dims[0], A)
    d, g = many.samples(d, in_dims[1]), many.samples(g, in_dims[2])
    return many.apart(torch.ops.deq.masked_linear.default(many.weight(A), d, g, *options)), 0


class _MaskedLinear(SingleLevelFunction):
    """(A, d, g, *options) -> u."""

    @staticmethod
    def forward(ctx, A, d, g, *options):
        with _below_autograd():
            u = torch.ops.deq.masked_linear.default(A, d, g, *options)
        ctx.options = options
        ctx.save_for_backward(A, d, g, u)
        ctx.save_for_forward(A, d, g, u)
        return u

    @staticmethod
    @backward_pass
    def backward(ctx, h):
        A, d, g, u = ctx.saved_tensors
        q = torch.ops.deq.masked_linear.default(A.mT, d, h, *ctx.options)
        dA, dd = torch.matmul(q.mT, u), (h + q @ A) * (u @ A.mT + g)
        return dA, dd, q, *(None for _ in ctx.options)

    @staticmethod
    @tangent_pass
    def jvp(ctx, dA, dd, dg, *_):
        A, d, g, u = saved_primals(ctx)
        t = masked_tangent(A, d, g, u, dA, dd, dg)
        return t + torch.ops.deq.masked_linear.default(A, d, t @ A.mT, *ctx.options)


def _masked_autograd(*inputs):
    return at_one_level(_MaskedLinear, *inputs)


@contextmanager
def _below_autograd() -> Iterator[None]:
    """For what a function's forward calls: the next transform of torch.func below this one may be a gradient too, which
    must not find gradients switched off, nor may a further tangent find forward mode so."""
    with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True), torch._C._AutoDispatchBelowAutograd():
        yield


def _outside_of_modes(kernel):
    """The kernel without gradients, tangents and tracing, and without autocast, which would round its products to 16
    bits."""

    def run(*given):
        if forward_ad._current_level >= 0:
            given = pytree.tree_map_only(Tensor, Tensor.detach, given)
        tracing = torch._C._get_tracing_state()
        if tracing is not None:  # torch.jit.trace makes tensors of sizes, and would write down what the kernel does
            torch._C._set_tracing_state(None)
        try:
            with torch.no_grad(), no_autocast((given[0] if isinstance(given[0], Tensor) else given[0][0]).device.type):
                return kernel(*given)
        finally:
            if tracing is not None:
                torch._C._set_tracing_state(tracing)

    return run


# Not by torch.library.custom_op, whose gradients torch.func refuses.
_operators = torch.library.Library("deq", "FRAGMENT")
for _schema, _kernel, _fake in (
    (_SOLVE, _solve, _solve_fake),
    (_GRADIENT, _gradient, _gradient_fake),
    (_MASKED, _masked, _masked_fake),
):
    _name = _schema.partition("(")[0]
    _operators.define(_schema, tags=torch.Tag.pt2_compliant_tag)
    _operators.impl(_name, _outside_of_modes(_kernel), "CompositeExplicitAutograd")
    torch.library.register_fake(f"deq::{_name}", _fake, lib=_operators)
_operators.impl("solve", _solve_autograd, "Autograd")
_operators.impl("masked_linear", _masked_autograd, "Autograd")
torch.library.register_vmap("deq::solve", _solve_vmap, lib=_operators)
torch.library.register_vmap("deq::masked_linear", _masked_vmap, lib=_operators)
