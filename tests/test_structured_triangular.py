"""Lower triangular weights: what of W is read, strides, what is remembered."""

import pytest
import torch
from structures import BACKENDS, injection, needs_library, parts, structure

import deq
from deq import cache, weights
from deq.solution import Status


def test_any_strides(isa):
    W, c = parts("lower_triangular", 50)[0], injection(50, 20)
    want = deq.solve(weights.LowerTriangular(W), c, solver="direct", backend="cpu").z
    storage = torch.zeros(100, 150)
    storage[::2, ::3] = W
    transposed = W.mT.contiguous().mT
    for same in (storage[::2, ::3], transposed):
        assert torch.equal(deq.solve(weights.LowerTriangular(same), c, solver="direct").z, want)
    wide = torch.zeros(40, 100)
    wide[::2, ::2] = c
    for same in (wide[::2, ::2], c.mT.contiguous().mT):
        assert torch.equal(deq.solve(weights.LowerTriangular(W), same, solver="direct").z, want)
    one = c[:1].expand(20, 50)
    assert torch.equal(deq.solve(weights.LowerTriangular(W), one, solver="direct").z, want[:1].expand(20, 50))


@pytest.mark.parametrize("backend", BACKENDS)
def test_entries_above_the_diagonal_are_ignored(backend):
    W, c = parts("lower_triangular", 20)[0], injection(20, 4)
    spoiled = W + torch.full_like(W, torch.nan).triu(1)
    clean, same = (deq.solve(weights.LowerTriangular(V), c, solver="direct", backend=backend).z for V in (W, spoiled))
    assert torch.equal(clean, same)
    spoiled = W.tril(-1) + torch.full_like(W, torch.inf).triu()
    strict = deq.solve(weights.LowerTriangular(spoiled.nan_to_num(), strict=True), c, solver="direct", backend=backend)
    assert strict.converged.all()


def test_a_tolerance_below_rounding_is_not_called_converged():
    W, c = structure("lower_triangular", *parts("lower_triangular", 100)), injection(100, 5)
    solution = deq.solve(W, c, "tanh", solver="direct", tol=1e-12, on_failure="ignore")
    assert (solution.status == Status.STALLED).all() and (solution.residual < 1e-6).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_large_entries_are_substituted_where_nothing_is_compiled_too(backend):
    """Theorem 1's weight: the plain iterates reach 2^m before they are right, and 48 of 4002 samples were given up."""
    m = 14
    t = torch.arange(1, m + 1, dtype=torch.float64)
    W = weights.LowerTriangular(-torch.exp2(t[:, None] - t + 1).tril(-1), strict=True)
    c = torch.linspace(0, 1, 401, dtype=torch.float64)[:, None] * torch.exp2(t) - 1
    solution = deq.solve(W, c, backend=backend)
    assert solution.converged.all() and torch.equal(solution.z, torch.relu(solution.z @ W.W.mT + c))


@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_wide_weights_with_large_entries_are_substituted(backend, activation):
    """In plain PyTorch too: iterating took 222 to 1467 evaluations."""
    torch.manual_seed(0)
    W = (30 * torch.randn(100, 100, dtype=torch.float64) / 10).tril(-1)
    solution = deq.solve(
        weights.LowerTriangular(W), torch.randn(5, 100, dtype=torch.float64), activation, backend=backend
    )
    assert solution.plan.map == "substitution" and solution.converged.all()


@needs_library
def test_new_weights_are_never_taken_for_old_ones():
    W, c = parts("lower_triangular", 30)[0], injection(30, 4)
    first = deq.solve(weights.LowerTriangular(W), c).z
    W.data[20, 3] += 1
    second = deq.solve(weights.LowerTriangular(W), c).z
    assert not torch.equal(first, second)
    cache.clear()
    assert torch.equal(deq.solve(weights.LowerTriangular(W), c).z, second)
