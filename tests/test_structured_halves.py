"""Structured weights of 16 bits: solved in float32 and rounded once, directly or in the dense way."""

import pytest
import torch
from close import worst_error
from problems import exact
from structures import KINDS, injection, parts, structure

import deq
from deq import weights
from deq.solution import Status

HALVES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])


def low_rank(dtype, m=64, r=4, B=16, norm=0.9):
    """d, P, Q of a W of that 2-norm, and an injection."""
    generator = torch.Generator().manual_seed(0)
    d, P, Q, c = (torch.randn(*shape, generator=generator) for shape in ((m,), (m, r), (m, r), (B, m)))
    d = 0.1 * torch.tanh(d)
    PQ = P @ Q.mT
    P = P * ((norm - 0.1) / torch.linalg.matrix_norm(PQ, 2))
    return [t.to(dtype) for t in (d, P, Q, c)]


@HALVES
@pytest.mark.parametrize("solver", ["plain", "anderson", "auto"])
def test_a_low_rank_weight_is_formed_in_float32(dtype, solver):
    d, P, Q, c = low_rank(dtype)
    D = torch.diag(d.double()) + P.double() @ Q.double().mT
    z = exact(D, c, "tanh")
    solution = deq.solve(weights.DiagonalLowRank(d, P, Q), c, "tanh", solver=solver, tol=1e-6)
    assert solution.z.dtype == dtype and solution.converged.all() and solution.residual.dtype == torch.float32
    assert worst_error(solution.z, z) <= 1.01 * worst_error(z.to(dtype), z)  # that of rounding the answer once


@HALVES
def test_its_gradients_have_their_dtypes(dtype):
    leaves = [t.requires_grad_() for t in low_rank(dtype)]
    wide = [t.detach().double().requires_grad_() for t in leaves]
    for (d, P, Q, c), tol in ((leaves, 1e-6), (wide, 1e-12)):
        deq.solve(weights.DiagonalLowRank(d, P, Q), c, "tanh", solver="plain", tol=tol).z.sum().backward()
    for leaf, other in zip(leaves, wide, strict=True):
        assert leaf.grad.dtype == dtype
        error = (leaf.grad.double() - other.grad).norm() / other.grad.norm()
        assert error <= 2 * torch.finfo(dtype).eps


def loss(d, P, Q, c):
    tol = 1e-12 if c.dtype == torch.float64 else 1e-6
    z = deq.solve(weights.DiagonalLowRank(d, P, Q), c, "tanh", solver="plain", tol=tol).z
    return z.to(torch.promote_types(z.dtype, torch.float32)).square().sum()


def by_func(*leaves):
    return torch.func.grad(loss, argnums=(0, 1, 2, 3))(*leaves)


def by_graph(*leaves):
    leaves = [t.clone().requires_grad_() for t in leaves]
    return torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(*leaves), leaves)


def by_func_in_a_graph(*leaves):
    return torch.compile(by_func, fullgraph=True, backend="aot_eager")(*leaves)


def by_samples_in_a_graph(d, P, Q, c):
    """The weight and the samples are both of the batch."""
    each = torch.vmap(torch.func.grad(loss, argnums=(0, 1, 2, 3)))
    many = [t.expand(len(c), *t.shape) for t in (d, P, Q)]
    dd, dP, dQ, dc = torch.compile(each, fullgraph=True, backend="aot_eager")(*many, c)
    return dd.float().sum(0).to(d.dtype), dP.float().sum(0).to(d.dtype), dQ.float().sum(0).to(d.dtype), dc


@HALVES
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
@pytest.mark.parametrize("means", [by_func, by_graph, by_func_in_a_graph, by_samples_in_a_graph])
def test_transforms_and_graphs_form_it_in_float32(means, dtype):
    """Rounded to 16 bits its diagonal comes nearer to 1, by a part of its distance that shows."""
    torch.compiler.reset()
    P = 0.04 * torch.eye(4).repeat(16, 1).to(dtype)
    leaves = torch.full((64,), 0.98828).to(dtype), P, -P, 0.01 * low_rank(dtype)[3]
    wide = [t.double().requires_grad_() for t in leaves]
    exact_gradients = torch.autograd.grad(loss(*wide), wide)
    for ours, other in zip(means(*leaves), exact_gradients, strict=True):
        assert ours.dtype == dtype
        assert (ours.double() - other).norm() / other.norm() <= 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("solver", ["plain", "direct"])
def test_an_equilibrium_beyond_16_bits_has_diverged(solver):
    m = 8
    d, factor = torch.full((m,), 0.9).half(), torch.zeros(m, 1).half()
    c = torch.tensor([[1.0], [6e4]]).half().expand(2, m)
    for W in (weights.Diagonal(d), weights.LowerTriangular(torch.diag(d)), weights.DiagonalLowRank(d, factor, factor)):
        with pytest.warns(deq.ConvergenceWarning, match=r"1 of 2 samples did not converge \(1 DIVERGED\)"):
            solution = deq.solve(W, c, solver=solver)
        assert solution.status.tolist() == [Status.CONVERGED, Status.DIVERGED] and solution.z.isfinite().all()
    if solver == "direct":  # which torch.func has not
        return
    each = torch.func.vmap(lambda c: deq.solve(W, c, solver="plain").status)(c)
    assert each.tolist() == solution.status.tolist()


@pytest.mark.parametrize("solver", ["plain", "direct"])
def test_autocast_rounds_no_factor(solver):
    d, P, Q, c = low_rank(torch.float32)
    W = weights.DiagonalLowRank(d, P, Q)
    want = deq.solve(W, c, "tanh", solver=solver).z
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(deq.solve(W, c, "tanh", solver=solver).z, want)
        dense = W.dense()
    assert torch.equal(dense, W.dense())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_halves_are_solved_in_float32_and_rounded_once(dtype):
    for kind in KINDS:
        tensors, c = parts(kind, 40, dtype), injection(40, 8, dtype)
        half = deq.solve(structure(kind, *tensors), c, "tanh", solver="direct")
        wide = deq.solve(structure(kind, *(t.float() for t in tensors)), c.float(), "tanh", solver="direct", tol=1e-4)
        assert half.z.dtype == dtype and torch.equal(half.z, wide.z.to(dtype)) and half.residual.dtype == torch.float32
        leaves = [t.clone().requires_grad_() for t in tensors]
        deq.solve(structure(kind, *leaves), c, "tanh").z.sum().backward()
        assert all(leaf.grad.dtype == dtype and torch.isfinite(leaf.grad).all() for leaf in leaves)
