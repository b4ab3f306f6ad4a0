"""Gradients of deq.fixed_point: each kind against its definition, at any scale, of samples that failed."""

import weakref

import pytest
import torch
from fixed_points import SOLVERS, cell, solve
from problems import gaussian

import deq
import deq.torchdeq
from deq import Status


@pytest.mark.parametrize("backward", ["one_step", "phantom", "neumann", "unrolled"])
def test_other_gradients(backward):
    """Each against its definition, written out."""
    W, c, g = gaussian(15, 3, torch.float64)
    W = W.requires_grad_()
    options = {"backward_steps": 4, "backward_damping": 0.3, "tol": 1e-12}
    z = solve(W, c, solver="plain", backward=backward, **options).z
    (actual,) = torch.autograd.grad(z, W, g)
    star = solve(W, c, solver="plain", tol=1e-15, on_failure="ignore").z.detach()
    f = cell(W, c)
    if backward == "one_step":
        expected = torch.autograd.grad(f(star), W, g)[0]
    elif backward == "phantom":
        y = star
        for _ in range(4):
            y = 0.7 * y + 0.3 * f(y)
        expected = torch.autograd.grad(y, W, g)[0]
    elif backward == "neumann":
        h = star.clone().requires_grad_()
        image = f(h)
        u = g
        for _ in range(3):
            u = g + torch.autograd.grad(image, h, u, retain_graph=True)[0]
        expected = torch.autograd.grad(image, W, u)[0]
    else:
        y = torch.zeros_like(c)
        for _ in range(200):
            y = f(y)
        expected = torch.autograd.grad(y, W, g)[0]
    torch.testing.assert_close(actual, expected, rtol=1e-8, atol=1e-11)


def test_backward_options():
    """The adjoint has a solver and a tolerance of its own."""
    W, c, g = gaussian(40, 3, torch.float64)
    W = W.requires_grad_()
    reference = torch.autograd.grad(solve(W, c, tol=1e-13).z, W, g)[0]

    def error(**options):
        gradient = torch.autograd.grad(solve(W, c, tol=1e-13, **options).z, W, g)[0]
        return float((gradient - reference).norm() / reference.norm())

    assert error(backward_tol=1e-3) > 1e-6
    for solver in SOLVERS:
        assert error(backward_solver=solver) < 1e-10
    with pytest.warns(deq.ConvergenceWarning, match="the gradient of deq.fixed_point: 3 of 3"):
        error(backward_max_iter=2)


@pytest.mark.parametrize("loss_scale", [1e-30, 1e-6, 1e6, 1e30])
def test_gradient_is_linear_in_the_loss(loss_scale):
    W, c, g = gaussian(32, 8)
    W = W.requires_grad_()
    z = solve(W, c).z
    one = torch.autograd.grad(z, W, g, retain_graph=True)[0]
    scaled = torch.autograd.grad(z, W, g * loss_scale)[0]
    torch.testing.assert_close(scaled / loss_scale, one, rtol=1e-5, atol=1e-5 * float(one.abs().max()))


def test_a_nan_gradient_stays_in_its_sample():
    W, c, g = gaussian(8, 3, torch.float64)
    c = c.requires_grad_()
    g[1, 2] = torch.nan
    (dc,) = torch.autograd.grad(solve(W, c).z, c, g)
    assert torch.isnan(dc[1]).all() and torch.isfinite(dc[[0, 2]]).all()


def test_hooks_of_leaves_see_one_gradient():
    W, c, g = gaussian(12, 3, torch.float64)
    W = W.requires_grad_()
    seen = []
    W.register_hook(lambda grad: seen.append(grad) or 3 * grad)
    (grad,) = torch.autograd.grad(solve(W, c).z, W, g)
    assert len(seen) == 1
    torch.testing.assert_close(grad, 3 * seen[0])


def test_hooks_of_given_tensors_that_f_does_not_use_get_zeros():
    """Others of them could be used at other states: they stay in the graph, and torch would call hooks with None."""
    a, spare = torch.randn(4, requires_grad=True), torch.randn(4, requires_grad=True)
    for given in (spare, 2 * spare):
        given.register_hook(lambda grad: grad.clamp(-1.0, 1.0))
        z = deq.fixed_point(lambda z: torch.tanh(0.5 * z + a), torch.zeros(3, 4), tensors=[a, given]).z
        grads = torch.autograd.grad(z.sum(), (a, spare))
        assert grads[0].all() and not grads[1].any()


def test_no_gradient_no_graph():
    W, c, _ = gaussian(6, 3)
    assert not solve(W, c).z.requires_grad
    W = W.requires_grad_()
    with torch.no_grad():
        assert not solve(W, c).z.requires_grad
    assert solve(W, c).z.requires_grad
    assert not solve(W, c).detach().z.requires_grad


def test_memory_between_forward_and_backward():
    """Whatever the number of iterations, z and what f closes over are all that waits for the backward pass."""
    W, c, _ = gaussian(20, 4, torch.float64)
    W = W.requires_grad_()
    saved = []
    for tol in (1e-3, 1e-12):
        saved.clear()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.shape) or t, lambda t: t):
            z = solve(W, c, tol=tol).z
        assert saved == [(4, 20), (20, 20)]
        del z


@pytest.mark.parametrize("way", ["fixed_point", "Equilibrium", "torchdeq"])
def test_memory_after_the_backward_pass(way):
    """A loss that is kept, as in a list of all of them, keeps no input alive once its graph has been used."""
    W, c, _ = gaussian(20, 4, torch.float64)
    W.requires_grad_()
    z0 = torch.zeros_like(c)

    def solved():
        mine = c.clone().requires_grad_() * 1
        if way == "Equilibrium":
            return mine, deq.nn.Equilibrium(lambda z, c: torch.tanh(z @ W.mT + c))(mine)
        f = lambda z: torch.tanh(z @ W.mT + mine)  # noqa: E731
        return mine, deq.fixed_point(f, z0).z if way == "fixed_point" else deq.torchdeq.get_deq(ift=True)(f, z0)[0][-1]

    mine, z = solved()
    held, loss = weakref.ref(mine), z.square().sum()
    del mine, z
    first = torch.autograd.grad(loss, W, retain_graph=True)
    assert held() is not None
    again = torch.autograd.grad(loss, W)
    assert torch.allclose(*first, *again, rtol=1e-6, atol=1e-9)
    assert held() is None
    with pytest.raises(RuntimeError, match="a second time"):
        loss.backward()


@pytest.mark.parametrize("backward", ["one_step", "phantom", "unrolled"])
def test_inexact_gradients_of_failed_samples(backward):
    """z is finite where a solve's is, though f is not; nothing of it reaches the gradients of the others."""
    c = torch.tensor([[4.0], [1.0], [3.0]], dtype=torch.float64).expand(3, 4).clone().requires_grad_()
    options = {"solver": "plain", "backward": backward, "on_failure": "ignore"}

    def run(c, **options):
        solution = deq.fixed_point(lambda z: torch.sqrt(c - 1.5 * z), torch.zeros_like(c), **options)
        return solution, solution.z

    solution, z = run(c, **options)
    assert solution.status.tolist() == [Status.CONVERGED, Status.NONFINITE, Status.CONVERGED]
    with torch.no_grad():
        torch.testing.assert_close(z, run(c, **options)[1], rtol=1e-9, atol=0)
    grad = torch.autograd.grad(z.sum(), c)[0]
    mates = torch.autograd.grad(run(c[[0, 2]], **options)[1].sum(), c)[0]
    assert torch.isfinite(grad).all()
    torch.testing.assert_close(grad[[0, 2]], mates[[0, 2]], rtol=1e-9, atol=0)


@pytest.mark.parametrize("criterion", ["residual", "absolute"])
@pytest.mark.parametrize("damping", [1.0, 0.7])
def test_unrolled_returns_the_best_iterate(damping, criterion):
    """Samples that grow end with what they began with, those that only lack evaluations with their last."""
    rate = torch.tensor([[0.99], [3.5], [0.2]], dtype=torch.float64)
    c = torch.linspace(1, 2, 12, dtype=torch.float64).view(3, 4)
    x = c.clone().requires_grad_()
    options = {"solver": "plain", "damping": damping, "criterion": criterion, "max_iter": 30, "on_failure": "ignore"}
    plain, unrolled = (
        deq.fixed_point(lambda z: x - rate * z, torch.zeros_like(c), backward=backward, **options)
        for backward in ("implicit", "unrolled")
    )
    assert plain.status[1] != Status.CONVERGED and plain.status[2] == Status.CONVERGED
    torch.testing.assert_close(unrolled.z, plain.z, rtol=1e-12, atol=0)
    z = unrolled.z
    (grad,) = torch.autograd.grad(z.sum(), x)
    torch.testing.assert_close(grad * c, z.detach(), rtol=1e-9, atol=0)  # z is linear in x


@pytest.mark.parametrize("solver", ["anderson", "newton_krylov"])
@pytest.mark.parametrize("way", ["save_on_cpu", "checkpoint"])
def test_second_derivatives_and_newton_where_saved_tensors_have_hooks(way, solver):
    """Which torch.func refuses, and users have: to save memory, and in every checkpoint."""
    W, c, _ = gaussian(6, 3, torch.float64)
    c = c.requires_grad_()

    def loss(c):
        z = solve(W, c, solver=solver, tol=1e-13).z
        return torch.autograd.grad(z.square().sum(), c, create_graph=True)[0].square().sum()

    expected = torch.autograd.grad(loss(c), c)[0]
    if way == "checkpoint":
        total = torch.utils.checkpoint.checkpoint(loss, c, use_reentrant=False)
    else:
        with torch.autograd.graph.save_on_cpu():
            total = loss(c)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
        found = torch.autograd.grad(total, c)[0]
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-11)
