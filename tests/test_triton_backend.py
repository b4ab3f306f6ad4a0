"""The Triton backend in the interpreter, against the reference: the contract of a solve on small sizes."""

from dataclasses import replace

import pytest
import torch
import triton
from close import assert_as_accurate
from problems import exact, gaussian, torch_adjoint, torch_loop

import deq
from deq import _triton, reference, stats
from deq.backends import get_backend
from deq.kernels import cell, iteration
from deq.solve import _make_problem

SMALL = cell.Tiles(16, 16, 16, 4, 2)  # several tiles in every direction at sizes that the interpreter can bear


@pytest.fixture
def small_tiles(monkeypatch):
    """``small_tiles(splits)`` makes every step use tiles of 16 and so many splits."""
    return lambda splits: monkeypatch.setattr(iteration, "step_tiles", lambda B, m: (SMALL, splits))


@pytest.mark.parametrize(("m", "B", "splits"), [(1, 1, 1), (17, 5, 1), (18, 17, 1), (33, 3, 2)])
@pytest.mark.parametrize("solver", ["plain", "anderson"])
def test_as_accurate_as_a_torch_loop(m, B, splits, solver, small_tiles):
    small_tiles(splits)
    W, c, _ = gaussian(m, B)
    solution = deq.solve(W, c, solver=solver, backend="triton")
    assert solution.plan.backend == "triton" and solution.converged.all()
    assert_as_accurate(solution.z, torch_loop(W, c), exact(W, c))


@pytest.mark.parametrize(("acceleration", "splits"), [("none", 2), ("on_demand", 1)])
def test_every_sample_goes_the_way_of_the_reference(acceleration, splits, small_tiles):
    """Iterations and status one by one: fast, slow, zero, cycling and diverging samples in one row of tiles."""
    small_tiles(splits)
    W = torch.zeros(20, 20)
    W[0, 0], W[1, 1], W[2, 3], W[3, 2], W[4, 4] = 0.9, 0.5, -1.0, -1.0, 4.0
    c = torch.zeros(6, 20)
    c[range(6), (0, 1, 2, 4, 10, 19)] = torch.arange(1.0, 7.0)
    c[5] = -1.0
    plan = deq.solve(W, c[:1], solver="plain", max_iter=40, on_failure="ignore").plan
    plan = replace(plan, backend="triton", acceleration=acceleration, increments="native")
    expected = get_backend("reference").solve(W, c, None, "relu", plan)
    outcome = get_backend("triton").solve(W, c, None, "relu", plan)
    status = stats.status(outcome.z, outcome.stats)
    assert status.tolist() == stats.status(expected.z, expected.stats).tolist()
    assert set(status.tolist()) >= {deq.Status.CONVERGED, deq.Status.DIVERGED}
    assert outcome.report == expected.report
    if acceleration == "none":  # an accelerated one begins one evaluation later than the reference
        read = stats.iterations(outcome.z, outcome.stats)
        assert read.tolist() == stats.iterations(expected.z, expected.stats).tolist()


def test_gradients(small_tiles):
    small_tiles(1)
    W, c, g = gaussian(24, 7)
    for activation in ("tanh", "gelu"):
        weight, injection = W.clone().requires_grad_(), c.clone().requires_grad_()
        solution = deq.solve(weight, injection, activation, backend="triton", tol=1e-6)
        solution.z.backward(g)
        z = torch_loop(W, c, activation, tol=1e-6)
        plain = torch_adjoint(W, c, z, g, activation, tol=1e-6)
        true_z = exact(W, c, activation)
        dW, dc = reference.implicit_gradient(W.double(), c.double(), true_z, g.double(), activation)
        assert_as_accurate(injection.grad, plain, dc)
        assert_as_accurate(weight.grad, plain.mT @ z, dW)


def test_without_interpreter_and_gpu_the_error_says_so(monkeypatch):
    W, c, _ = gaussian(4, 2)
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    _triton.why_not.cache_clear()
    _make_problem.cache_clear()
    with pytest.raises(ValueError, match=r"backend='triton' cannot solve cpu tensors here: .*interpreter"):
        deq.solve(W, c, backend="triton")
    monkeypatch.undo()
    _triton.why_not.cache_clear()


def test_float64_goes_to_the_reference_and_says_why():
    W, c, _ = gaussian(4, 2, torch.float64)
    plan = deq.solve(W, c, backend="triton").plan
    assert plan.backend == "reference" and any("float64" in reason for reason in plan.why)
