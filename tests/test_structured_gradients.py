"""Gradients of direct methods, in the tensors of the structure."""

import pytest
import torch
from close import assert_as_accurate, worst_error
from problems import exact, gaussian, torch_adjoint, torch_loop
from structures import BACKENDS, KINDS, injection, needs_library, parts, structure
from torch.autograd import gradcheck, gradgradcheck

import deq
from deq import weights


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("activation", ["identity", "tanh", "gelu", "softplus", "sigmoid"])
@pytest.mark.parametrize("kind", (*KINDS, "dense"))
def test_gradcheck(kind, activation, backend):
    if kind == "dense" and activation != "identity":
        pytest.skip("a dense weight is direct for the identity alone")
    inputs = [*parts(kind, 5, torch.float64), injection(5, 3, torch.float64)]

    def z(*tensors):
        W = structure(kind, *tensors[:-1])
        return deq.solve(W, tensors[-1], activation, solver="direct", backend=backend, tol=1e-13, on_failure="ignore").z

    every = [t.clone().requires_grad_() for t in inputs]
    assert gradcheck(z, every)
    assert gradgradcheck(z, every)
    for i in range(len(inputs)):
        assert gradcheck(z, [t.clone().requires_grad_(i == j) for j, t in enumerate(inputs)])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("activation", ["relu", "tanh", "gelu"])
def test_gradient_of_c_is_as_accurate(kind, activation, isa):
    for m, B in ((1, 1), (17, 5), (100, 65), (333, 7)):
        for dtype in (torch.float32, torch.float64):
            W, c, g = structure(kind, *parts(kind, m, dtype)), injection(m, B, dtype), gaussian(m, B, dtype, seed=9)[2]
            D, z = W.dense(), exact(W.dense(), c, activation)
            if activation == "relu":  # units that a tolerance could flip are pushed away from zero
                pre = z @ D.double().mT + c.double()
                c = c + torch.where(pre.abs() < 1e-3, 1e-2, 0.0).to(dtype)
                z = exact(D, c, activation)
            leaf = c.clone().requires_grad_()
            deq.solve(W, leaf, activation, solver="direct", backend="cpu", on_failure="raise").z.backward(g)
            want = torch_adjoint(D.double(), c.double(), z, g.double(), activation, tol=4e-15)
            plain = torch_adjoint(D, c, torch_loop(D, c, activation), g, activation)
            assert_as_accurate(leaf.grad, plain, want)


@needs_library
def test_gradients_stay_in_the_structure():
    """A diagonal of width 20000 would have a matrix of 1.6 GB."""
    m = 20000
    d = torch.linspace(-0.5, 0.5, m).requires_grad_()
    c = injection(1, m).T.contiguous().expand(3, m).clone().requires_grad_()
    deq.solve(weights.Diagonal(d), c).z.sum().backward()
    s = (c > 0).float() / (1 - d)
    assert torch.allclose(c.grad, s.detach()) and d.grad.shape == (m,)
    P, Q = (torch.full((m, 2), 1e-3).requires_grad_() for _ in range(2))
    deq.solve(weights.DiagonalLowRank(d, P, Q), c).z.sum().backward()
    assert P.grad.shape == Q.grad.shape == (m, 2) and torch.isfinite(P.grad).all()


def test_gradients_are_those_of_the_dense_matrix():
    for kind in KINDS:
        for dtype in (torch.float32, torch.float64):
            mine, theirs = ([t.clone().requires_grad_() for t in parts(kind, 40, dtype)] for _ in range(2))
            c = injection(40, 30, dtype)
            tol = 1e-6 if dtype == torch.float32 else 1e-13
            deq.solve(structure(kind, *mine), c, "tanh", tol=tol, solver="direct").z.square().sum().backward()
            deq.solve(structure(kind, *theirs).dense(), c, "tanh", tol=tol).z.square().sum().backward()
            for a, b in zip(mine, theirs, strict=True):
                assert float((a.grad - b.grad).norm()) <= 10 * tol * float(b.grad.norm())


@pytest.mark.parametrize("kind", (*KINDS, "dense"))
def test_any_scale(kind):
    activation = "identity" if kind == "dense" else "relu"
    tensors, c, g = parts(kind, 30), injection(30, 6), gaussian(30, 6)[2]

    def run(c_scale, g_scale):
        leaves = [t.clone().requires_grad_() for t in (*tensors, c * c_scale)]
        W = structure(kind, *leaves[:-1])
        solution = deq.solve(W, leaves[-1], activation, solver="direct", on_failure="raise")
        solution.z.backward(g * g_scale)
        return solution, leaves[-1].grad

    plain, gradient = run(1, 1)
    for scale in (2.0**100, 2.0**-100):
        scaled, same = run(scale, 1)
        assert torch.equal(scaled.z / scale, plain.z) and torch.equal(scaled.iterations, plain.iterations)
        assert torch.equal(same, gradient)
        assert torch.equal(run(1, scale)[1] / scale, gradient)
    for scale in (1e30, 1e-30):
        assert (
            worst_error(run(scale, 1)[0].z.detach() / scale, plain.z.detach().double())
            <= 20 * torch.finfo(torch.float32).eps
        )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_units_that_relu_ends_say_nothing_of_the_scale(kind, backend):
    """Gradients there, and injections that switch them off: the others were lost beside them."""
    W, c, g = structure(kind, *parts(kind, 30)), injection(30, 20), gaussian(30, 20)[2]
    z = deq.solve(W, c.requires_grad_(), solver="direct", backend=backend).z
    (want,) = torch.autograd.grad(z, c, torch.where(z > 0, g, 0.0), retain_graph=True)
    (found,) = torch.autograd.grad(z, c, torch.where(z > 0, 1e-30 * g, 1e20 * g))
    assert worst_error(found / 1e-30, want.double()) < 1e-6
    off = c.detach().clone()
    off[:, 3] = -1.0
    far = torch.where(off == -1.0, torch.finfo(torch.float32).min, 1e-10 * off)
    small = torch.where(off == -1.0, -1.0, 1e-10 * off)
    a, b = (deq.solve(W, x, solver="direct", backend=backend, on_failure="raise").z for x in (far, small))
    assert worst_error(a, b.double()) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_of_a_weight_that_leave_the_range_are_not_nan(backend, dtype):
    """Of two samples whose terms overflow to both sides: their sum where that is in range, else infinity."""
    big = torch.finfo(dtype).max ** 0.75
    entries = torch.tensor([[0.0, 0.0], [0.5, 0.0]], dtype=dtype, requires_grad=True)
    d = torch.zeros(2, dtype=dtype, requires_grad=True)
    c = big * torch.tensor([[1.0, 1.0], [1.0, 2.0], [2.0, 1.0]], dtype=dtype)
    g = big * torch.tensor([[0.0, 1.0], [0.0, 1.0], [0.0, -1.0]], dtype=dtype)
    for W, of in ((weights.LowerTriangular(entries), entries), (weights.Diagonal(d), d)):
        solution = deq.solve(W, c, "identity", solver="direct", backend=backend)
        (grad,) = torch.autograd.grad(solution.z, of, g)
        assert not grad.isnan().any()
        if of is entries:
            assert grad[1, 0] == 0 and grad[1, 1] == torch.inf
        else:
            assert grad[0] == 0 and grad[1] == torch.inf


def test_gradient_that_is_not_finite_is_nan_for_its_sample():
    for kind in (*KINDS, "dense"):
        c = injection(12, 4).requires_grad_()
        activation = "identity" if kind == "dense" else "relu"
        z = deq.solve(structure(kind, *parts(kind, 12)), c, activation, solver="direct").z
        g = torch.ones_like(z)
        g[1, 3], g[2, 0] = torch.nan, torch.inf
        z.backward(g)
        assert torch.isfinite(c.grad[[0, 3]]).all() and torch.isnan(c.grad[[1, 2]]).all()


def test_follows_grad_mode():
    W = weights.Diagonal(torch.full((3,), 0.5, requires_grad=True))
    assert deq.solve(W, torch.ones(2, 3)).z.requires_grad
    with torch.no_grad():
        assert not deq.solve(W, torch.ones(2, 3)).z.requires_grad
