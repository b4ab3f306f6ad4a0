"""The kernels for weights of known structure, in the interpreter, against deq/direct/roots.py."""

import pytest
import torch
from close import assert_as_accurate
from problems import gaussian

import deq
from deq.activations import ACTIVATIONS
from deq.direct import methods, roots
from deq.kernels import diagonal, triangular


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_diagonal(activation):
    _, x, _ = gaussian(37, 3)
    x = 3 * x
    d = torch.linspace(-0.8, 0.8, 37)
    z, residual, slope = diagonal.solve_diagonal(d, x, activation, derives=True)
    plain, p = roots.scalar_root(d, x, activation)
    exact, point = roots.scalar_root(d.double(), x.double(), activation)
    assert_as_accurate(z, plain, exact)
    entry = ACTIVATIONS[activation]
    assert_as_accurate(slope, entry.derivative(p), entry.derivative(point))
    assert (residual < 1e-6).all()


def test_diagonal_far_from_one_and_not_finite():
    x = torch.tensor([[1e30, -1e30], [1e-30, 2e-30], [float("nan"), 1.0]])
    for activation in ("relu", "gelu"):
        z, residual, _ = diagonal.solve_diagonal(torch.tensor([0.5, -0.5]), x, activation)
        assert (residual[:2] < 1e-5).all() and z[:2].isfinite().all()
        assert residual[2].isnan()


@pytest.mark.parametrize("upper", [False, True])
@pytest.mark.parametrize(("m", "B"), [(1, 1), (35, 5)])
@pytest.mark.parametrize("strict", [False, True])
def test_triangular(m, B, strict, upper):
    W, c, g = gaussian(m, B)
    W.diagonal().clamp_(-0.5, 0.5)
    T = (torch.triu if upper else torch.tril)(W, diagonal=(1 if upper else -1) * int(strict))
    s = torch.rand(B, m, generator=torch.Generator().manual_seed(0))
    u, residual = triangular.substitute(W, g, None, mask=s, strict=strict, upper=upper)
    plain = roots.substitute_masked(T, s, g, upper=upper)
    exact = roots.substitute_masked(T.double(), s.double(), g.double(), upper=upper)
    assert_as_accurate(u, plain, exact)
    assert (residual < 1e-6).all()
    if not upper:
        z, residual = triangular.substitute(W, c, "tanh", strict=strict)
        assert_as_accurate(z, roots.substitute(T, c, "tanh"), roots.substitute(T.double(), c.double(), "tanh"))
        assert (residual < 1e-6).all()


def test_structured_weights_are_solved_by_the_kernels(monkeypatch):
    """As on a GPU: forward and gradient through deq.solve."""
    monkeypatch.setattr(methods, "has_kernels", lambda like: like.dtype == torch.float32)
    W, c, g = gaussian(9, 2)
    W.diagonal().clamp_(-0.5, 0.5)
    for structure in (deq.weights.LowerTriangular, lambda W: deq.weights.Diagonal(W.diagonal().clone())):
        found = []
        for dtype in (torch.float32, torch.float64):
            weight, injection = (t.clone().to(dtype).requires_grad_() for t in (W, c))
            z = deq.solve(structure(weight), injection, "silu", solver="direct").z
            z.backward(g.to(dtype))
            found.append((z.detach(), injection.grad, weight.grad))
        for ours, exact in zip(*found, strict=True):
            torch.testing.assert_close(ours, exact.float())
