"""States of deq.fixed_point: several tensors, dtypes, strides, what counts as a sample, inference mode."""

import pytest
import torch
from close import assert_as_accurate
from fixed_points import SOLVERS, cell, solve
from problems import exact, gaussian, torch_loop

import deq
from deq.solvers.generic.newton_krylov import derives_in_inference_mode


@pytest.mark.parametrize("kind", [tuple, list])
def test_state_of_several_tensors(kind):
    """Two coupled tensors give what their concatenation gives."""
    W, c, g = gaussian(10, 4, torch.float64)
    W = W.requires_grad_()

    def f(z):
        assert type(z) is kind
        flat = torch.cat((z[0].reshape(4, 6), z[1]), 1)
        out = torch.tanh(flat @ W.mT + c)
        return out[:, :6].reshape(4, 2, 3), out[:, 6:]

    z0 = kind((torch.zeros(4, 2, 3, dtype=torch.float64), torch.zeros(4, 4, dtype=torch.float64)))
    solution = deq.fixed_point(f, z0)
    one = solve(W, c)
    assert type(solution.z) is kind and torch.equal(solution.iterations, one.iterations)
    joined = torch.cat((solution.z[0].reshape(4, 6), solution.z[1]), 1)
    assert torch.equal(joined, one.z)
    assert torch.equal(torch.autograd.grad(joined, W, g)[0], torch.autograd.grad(one.z, W, g)[0])


def test_what_counts_as_a_sample():
    f = lambda z: z.cos()  # noqa: E731
    assert deq.fixed_point(f, torch.zeros(5)).status.shape == ()
    assert deq.fixed_point(f, torch.tensor(0.3)).status.shape == ()
    assert deq.fixed_point(f, torch.zeros(5), batch_dims=1).status.shape == (5,)
    assert deq.fixed_point(f, torch.zeros(5, 2)).status.shape == (5,)
    assert deq.fixed_point(f, torch.zeros(5, 2, 3), batch_dims=2).status.shape == (5, 2)
    assert deq.fixed_point(f, torch.zeros(5, 2), batch_dims=0).status.shape == ()
    assert deq.fixed_point(f, torch.zeros(0, 3)).z.shape == (0, 3)
    assert deq.fixed_point(f, torch.zeros(2, 0)).converged.all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits(dtype):
    """f computes in 16 bits: the default tolerance is what that can reach, and gradients come in 16 bits."""
    W, c, g = gaussian(32, 4)
    W, c, g = W.to(dtype).requires_grad_(), c.to(dtype), g.to(dtype)
    solution = solve(W, c, on_failure="raise")
    assert solution.z.dtype == dtype
    with torch.no_grad():
        plain = torch_loop(W, c, "tanh", tol=3e-2 if dtype == torch.bfloat16 else 5e-3, max_iter=50)
        assert_as_accurate(solution.z, plain, exact(W, c, "tanh"))
    (dW,) = torch.autograd.grad(solution.z, W, g)
    assert dW.dtype == dtype and torch.isfinite(dW).all()


def test_noncontiguous_and_expanded_states():
    W, c, _ = gaussian(12, 5, torch.float64)
    expected = solve(W, c).z
    wide = torch.zeros(12, 5, dtype=torch.float64).T
    assert torch.equal(deq.fixed_point(cell(W, c), wide).z, expected)
    assert torch.equal(deq.fixed_point(cell(W, c), torch.zeros(1, 1, dtype=torch.float64).expand(5, 12)).z, expected)


@pytest.mark.parametrize("solver", SOLVERS)
def test_inference_mode(solver):
    W, c, _ = gaussian(8, 3, torch.float64)
    expected = solve(W, c, solver=solver)
    with torch.inference_mode():
        solution = solve(W, c, solver=solver)
        if solver == "newton_krylov" and not derives_in_inference_mode():
            torch.testing.assert_close(solution.z, expected.z, rtol=1e-9, atol=1e-9)
            assert (solution.iterations <= expected.iterations + 2).all()  # of quotients, not of no derivative at all
        else:
            assert torch.equal(solution.z, expected.z)
        assert torch.equal(deq.nn.Equilibrium(lambda z, c: cell(W, c)(z), solver=solver)(c), solution.z)


def test_a_start_made_in_inference_mode():
    W, c, g = gaussian(8, 3, torch.float64)
    c = c.requires_grad_()
    with torch.inference_mode():
        z0 = 0.1 * c
    z, cold = deq.fixed_point(cell(W, c), z0, tol=1e-12).z, solve(W, c, tol=1e-12).z
    grads = (torch.autograd.grad(z, c, g)[0] for z in (z, cold))
    torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-11)
