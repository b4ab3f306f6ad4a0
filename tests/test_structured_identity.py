"""The identity activation: one factorisation of I - W solves every sample."""

import pytest
import torch
from close import assert_as_accurate
from problems import exact, torch_loop
from structures import check_solution, injection, parts

import deq
from deq import weights


@pytest.mark.parametrize("m, B", [(1, 1), (17, 5), (64, 200), (100, 20), (333, 5), (333, 400)])
def test_identity_with_a_dense_weight(m, B):
    for dtype in (torch.float32, torch.float64):
        (W,), c = parts("dense", m, dtype), injection(m, B, dtype)
        solution = check_solution(weights.Dense(W), c, "identity")
        assert "direct" in str(solution.plan) and "I - W" in solution.plan.explain()
        again = deq.solve(W, c, "identity")
        assert torch.equal(again.z, solution.z)
        with torch.enable_grad():
            trained = deq.solve(W.clone().requires_grad_(), c, "identity", solver="direct")
        assert_as_accurate(trained.z.detach(), torch_loop(W, c, "identity"), exact(W, c, "identity"))


def test_identity_with_many_weights():
    W = torch.stack([parts("dense", 20, seed=s)[0] for s in range(3)])
    c = torch.stack([injection(20, 7) + s for s in range(3)])
    solution = deq.solve(W, c, "identity", solver="direct", on_failure="raise")
    for s in range(3):
        assert_as_accurate(solution.z[s], torch_loop(W[s], c[s], "identity"), exact(W[s], c[s], "identity"))
    assert deq.solve(W[:0], c[:0], "identity", solver="direct").z.shape == (0, 7, 20)


def test_singular_systems_are_iterated_or_reported():
    c = torch.rand(4, 10) + 0.5
    with pytest.warns(deq.ConvergenceWarning):
        solution = deq.solve(torch.eye(10), c, "identity", max_iter=50)
    assert solution.plan.map == "plain" and not solution.converged.any()
    with pytest.warns(deq.ConvergenceWarning, match="4 of 4 samples did not converge"):
        forced = deq.solve(torch.eye(10), c, "identity", solver="direct")
    assert not forced.converged.any() and torch.isfinite(forced.z).all()


@pytest.mark.parametrize("m", [150, 200])
@pytest.mark.parametrize("trained", [False, True])
def test_stacks_of_linear_systems(m, trained):
    """Which torch's batches of them fail in, or never return from, once the number of threads was set."""
    torch.set_num_threads(torch.get_num_threads())
    W = torch.randn(2, m, m, generator=torch.Generator().manual_seed(m)) / m**0.5
    c = injection(m, 9).expand(2, 9, m).clone().requires_grad_()
    solution = deq.solve(W.requires_grad_(trained), c, "identity", solver="direct")
    expected = torch.stack([torch.linalg.solve(torch.eye(m) - A, b.mT).mT for A, b in zip(W, c, strict=True)])
    torch.testing.assert_close(solution.z, expected, rtol=1e-3, atol=1e-3)
    assert torch.autograd.grad(solution.z.sum(), c)[0].isfinite().all()


@pytest.mark.parametrize("solver", ["auto", "direct"])
def test_identity_with_a_diagonal_on_both_sides_of_one(solver):
    d, c = torch.linspace(0.5, 1.6, 10, dtype=torch.float64), injection(10, 4, torch.float64)
    strict = torch.tril(torch.randn(10, 10, dtype=torch.float64) * 0.1, -1)
    for W in (weights.Diagonal(d), weights.LowerTriangular(torch.diag(d) + strict)):
        solution = deq.solve(W, c, "identity", solver=solver)
        exact = torch.linalg.solve(torch.eye(10, dtype=torch.float64) - W.dense(), c.mT).mT
        torch.testing.assert_close(solution.z, exact)
    with pytest.raises(ValueError, match="more than one root, or none"):
        deq.solve(weights.Diagonal(torch.tensor([0.5, 1.0, 3.0])), torch.ones(2, 3), "identity", solver="direct")


def test_an_answer_out_of_range_has_diverged():
    c = torch.full((2, 5), 1e37)
    with pytest.warns(deq.ConvergenceWarning, match="DIVERGED"):
        solution = deq.solve(0.999 * torch.eye(5), c, "identity")
    assert solution.z.isfinite().all() and not solution.converged.any()
    leaf = torch.ones(2, 5, requires_grad=True)
    z = deq.solve(0.999 * torch.eye(5), leaf, "identity").z
    with pytest.warns(deq.ConvergenceWarning, match="the gradient of deq.solve"):
        (g,) = torch.autograd.grad(z, leaf, c)
    assert g.isfinite().all()


def test_identity_is_solved_whether_its_weight_is_trained_or_not():
    """Few samples of a W that is trained are iterated first, stable or not."""
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        W = 2 * torch.randn(63, 63, generator=generator, dtype=torch.float64) / 63**0.5
        c = torch.randn(7, 63, generator=generator, dtype=torch.float64)
        frozen, trained = deq.solve(W, c, "identity"), deq.solve(W.requires_grad_(), c, "identity")
        assert frozen.converged.all() and trained.converged.all()
        torch.testing.assert_close(trained.z, frozen.z, rtol=1e-6, atol=1e-8)


def test_the_gradient_of_a_singular_system_is_reported():
    W, c = torch.eye(4), torch.ones(2, 4, requires_grad=True)
    with pytest.warns(deq.ConvergenceWarning, match="deq.solve: 2 of 2"):
        z = deq.solve(W, c, "identity", solver="direct").z
    with pytest.warns(deq.ConvergenceWarning, match="the gradient of deq.solve: 2 of 2"):
        (gradient,) = torch.autograd.grad(z.sum(), c)
    assert torch.equal(gradient, torch.ones(2, 4))  # the value at zero, as z is; it was NaN
