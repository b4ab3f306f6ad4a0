"""Weights of known structure, of every kind: exact solutions at any size, and what they depend on."""

import warnings

import pytest
import torch
from close import assert_as_accurate
from problems import exact, torch_loop
from structures import BACKENDS, KINDS, WORDS, check_solution, injection, needs_library, parts, structure

import deq
from deq import weights
from deq.activations import ACTIVATIONS
from deq.nn import EquilibriumLinear
from deq.solution import Status


@pytest.mark.parametrize("m", [1, 2, 17, 33, 100, 333])
@pytest.mark.parametrize("kind", KINDS)
def test_sizes(kind, m, isa):
    for B in (0, 1, 5, 65):
        for dtype in (torch.float32, torch.float64):
            W, c = structure(kind, *parts(kind, m, dtype)), injection(m, B, dtype)
            for activation in ("relu", "tanh"):
                solution = check_solution(W, c, activation, "cpu")
                assert WORDS[kind] in str(solution.plan)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_activations(kind, activation, isa):
    for dtype in (torch.float32, torch.float64):
        W, c = structure(kind, *parts(kind, 33, dtype)), injection(33, 19, dtype)
        check_solution(W, c, activation, "cpu")
        check_solution(W, 30 * c, activation, "cpu")


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_without_the_library(kind, activation):
    for dtype in (torch.float32, torch.float64):
        W, c = structure(kind, *parts(kind, 17, dtype)), injection(17, 9, dtype)
        check_solution(W, c, activation, "reference")


def test_sample_shapes():
    for kind in KINDS:
        W = structure(kind, *parts(kind, 12))
        c = injection(12, 30)
        flat = deq.solve(W, c, "tanh", solver="direct")
        shaped = deq.solve(W, c.reshape(2, 3, 5, 12), "tanh", solver="direct")
        assert shaped.status.shape == (2, 3, 5) and shaped.z.shape == (2, 3, 5, 12)
        assert torch.allclose(shaped.z.reshape(30, 12), flat.z, rtol=1e-5)
        assert deq.solve(W, c[0], "tanh", solver="direct").z.shape == (12,)


@needs_library
def test_a_sample_does_not_depend_on_its_batch(isa):
    for kind in ("lower_triangular", "diagonal"):
        W, c = structure(kind, *parts(kind, 70)), injection(70, 65)
        for activation in ("relu", "gelu", "tanh"):
            z = deq.solve(W, c, activation, solver="direct").z
            for b in (0, 31, 32, 64):
                assert torch.equal(deq.solve(W, c[b : b + 1], activation, solver="direct").z, z[b : b + 1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_where_the_iteration_diverges(backend):
    """Exact methods need no contraction, only a unique solution."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    c = draw(9, 30)
    cases = [
        (weights.Dense(3 * draw(30, 30)), "identity"),
        (weights.LowerTriangular(draw(30, 30).tril(-1) - torch.diag(5 + draw(30) ** 2)), "relu"),
        (weights.Diagonal(-10 * draw(30) ** 2 - 2), "tanh"),
        (weights.DiagonalLowRank(-(draw(30) ** 2) - 2, 2 * draw(30, 3), -2 * draw(30, 3)), "identity"),
    ]
    P = draw(30, 3)
    cases.append((weights.DiagonalLowRank(-(draw(30) ** 2) - 2, P, -2 * P), "relu"))  # monotone
    for W, activation in cases:
        solution = deq.solve(W, c, activation, backend=backend, solver="direct", on_failure="raise")
        f = ACTIVATIONS[activation].value(solution.z @ W.dense().mT + c)
        assert ((f - solution.z).norm(dim=-1) <= 1e-10 * f.norm(dim=-1)).all()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert not deq.solve(W, c, activation, solver="plain", backend=backend).converged.all()


def test_a_solution_beyond_the_range_of_the_dtype_is_said_to_have_diverged():
    W = weights.LowerTriangular(torch.full((60, 60), 10.0).tril(-1))
    c = torch.ones(3, 60)
    solution = deq.solve(W, c, solver="direct", on_failure="ignore")
    assert (solution.status == Status.DIVERGED).all() and torch.isfinite(solution.z).all()
    half = deq.solve(
        weights.Diagonal(torch.full((5,), 0.99).half()), torch.full((2, 5), 6e4).half(), on_failure="ignore"
    )
    assert torch.isfinite(half.z).all() and not half.converged.any()


@pytest.mark.parametrize("kind", ["lower_triangular", "diagonal", "diagonal_low_rank"])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_layers(kind, activation):
    torch.manual_seed(0)
    layer = EquilibriumLinear(8, 40, activation, kind)
    x = torch.randn(20, 8)
    z = layer(x)
    W, c = layer.weight().dense().detach(), layer.injection(x).detach()
    assert_as_accurate(z.detach(), torch_loop(W, c, activation), exact(W, c, activation))
    assert layer.solution.converged.all()
    z.square().mean().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in layer.parameters())
