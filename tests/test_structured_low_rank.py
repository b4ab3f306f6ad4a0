"""A diagonal and a low rank: the iteration in R^r."""

import pytest
import torch
from structures import injection, needs_library, parts, structure

import deq
from deq import weights


def test_start_of_a_low_rank_iteration():
    W, c = structure("diagonal_low_rank", *parts("diagonal_low_rank", 40)), injection(40, 6)
    cold = deq.solve(W, c, "tanh", solver="direct")
    warm = deq.solve(W, c, "tanh", solver="direct", z0=cold.z)
    assert (warm.iterations <= cold.iterations).all() and (warm.iterations <= 2).all()


def expanding(scale, dtype, m=200, r=8):
    """``diag(d) + P Q^T`` of a monotone W on which q -> Q^T z(q) expands ``scale`` times."""
    torch.manual_seed(0)
    P = torch.randn(m, r, dtype=dtype) / m**0.5
    return torch.zeros(m, dtype=dtype), P, -scale * P


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [3.0, 8.0, 20.0])
@pytest.mark.parametrize("activation", ["tanh", "relu", "identity"])
def test_low_rank_where_the_iteration_expands(activation, scale, dtype):
    """Exact methods need no contraction: the residual is that of the z returned, and so are the gradients."""
    d, P, Q = (t.requires_grad_() for t in expanding(scale, dtype))
    c = injection(200, 64, dtype)
    solution = deq.solve(weights.DiagonalLowRank(d, P, Q), c, activation, solver="direct")
    assert solution.converged.all()
    W = (torch.diag(d) + P @ Q.mT).detach().double()
    act = {"tanh": torch.tanh, "relu": torch.relu, "identity": lambda x: x}[activation]
    z = solution.z.detach().double()
    f = act(z @ W.mT + c.double())
    residual = ((f - z).norm(dim=-1) / f.norm(dim=-1)).max()
    eps = torch.finfo(dtype).eps
    assert residual <= 2 * solution.residual.max() + 50 * eps * (1 + torch.linalg.matrix_norm(W, 2))
    ours = torch.autograd.grad(solution.z.square().sum(), (d, P, Q))
    exact = [t.detach().double().requires_grad_() for t in (d, P, Q)]
    z = deq.solve(weights.Dense(torch.diag(exact[0]) + exact[1] @ exact[2].mT), c.double(), activation).z
    theirs = torch.autograd.grad(z.square().sum(), exact)
    for a, b in zip(ours, theirs, strict=True):
        assert (a.double() - b).norm() <= (3e-3 if dtype == torch.float32 else 1e-6) * b.norm()


@needs_library
@pytest.mark.parametrize("max_iter", [3, 10, 61, 65])
def test_low_rank_keeps_to_its_evaluations(max_iter):
    d, P, Q = expanding(8.0, torch.float64)
    W = weights.DiagonalLowRank(d, P, Q)
    c = injection(200, 40, torch.float64) * torch.logspace(-3, 3, 40, dtype=torch.float64)[:, None]
    options = {"solver": "direct", "max_iter": max_iter, "on_failure": "ignore"}
    together = deq.solve(W, c, "tanh", **options)
    assert together.iterations.max() <= max_iter
    alone = torch.cat([deq.solve(W, row[None], "tanh", **options).status for row in c])
    assert torch.equal(together.status, alone)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("activation", ["tanh", "gelu", "elu", "softplus"])
@pytest.mark.parametrize("size", [-60, -30, 60])
def test_squares_of_a_reduced_solve_that_leave_the_range(activation, dtype, size):
    """Below 1e-20 an underflown residual of 0 passed for one; above 1e19 what was solved passed for diverged."""
    torch.manual_seed(0)
    m, scale = 96, 2.0 ** (size if dtype == torch.float32 else 8 * size)
    d = 0.3 * torch.rand(m, dtype=dtype)
    P, Q = (torch.randn(2, m, 4, dtype=dtype) * 0.8 / m**0.5).unbind()
    W, c = weights.DiagonalLowRank(d, P, Q), torch.randn(20, m, dtype=dtype) * scale
    options = {"solver": "direct", "on_failure": "ignore"}
    if activation in ("tanh", "elu", "gelu") and size < 0:
        early = deq.solve(W, c, activation, max_iter=1, tol=1e-5, **options)
        assert not early.converged.any() and float(early.residual.min()) > 1e-5
    solution = deq.solve(W, c, activation, tol=1e-5, **options)
    f = deq.activations.ACTIVATIONS[activation].value(solution.z @ W.dense().mT + c)
    assert bool(solution.converged.all())
    largest = f.abs().amax(-1, keepdim=True)
    assert float((((f - solution.z) / largest).norm(dim=-1) / (f / largest).norm(dim=-1)).max()) < 1e-5


@pytest.mark.parametrize("activation", ["relu", "elu", "identity"])
def test_a_reduced_adjoint_that_overflows_is_no_nan(activation):
    """Its iterates grew to infinity, and NaN was the gradient without a word."""
    generator = torch.Generator().manual_seed(0)
    P, Q = (1000 * torch.randn(16, 2, generator=generator) for _ in range(2))
    c = torch.randn(4, 16, generator=generator).requires_grad_()
    parts = [t.requires_grad_() for t in (torch.zeros(16), P, Q)]
    z = deq.solve(weights.DiagonalLowRank(*parts), c, activation, solver="direct", on_failure="ignore").z
    gradients = torch.autograd.grad(z, (c, *parts), torch.ones_like(z))
    assert all(torch.isfinite(gradient).all() for gradient in gradients)
