"""Batches of gradients: torch.autograd.grad(is_grads_batched=True), torch.autograd.functional(vectorize=True)."""

import pytest
import torch
from close import close
from problems import gaussian

import deq
import deq.torchdeq

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")


@pytest.mark.parametrize("activation", ["identity", "tanh", "gelu"])
@pytest.mark.parametrize("kind", ["dense", "lower_triangular", "diagonal", "diagonal_low_rank", "contractive"])
def test_batches_of_gradients(kind, activation):
    """Of torch.autograd.grad(is_grads_batched=True) and torch.autograd.functional(vectorize=True)."""
    W, c, _ = gaussian(5, 3, torch.float64, scale=0.4)
    make = {
        "dense": lambda W: W,
        "lower_triangular": deq.weights.LowerTriangular,
        "diagonal": lambda W: deq.weights.Diagonal(W.diagonal()),
        "diagonal_low_rank": lambda W: deq.weights.DiagonalLowRank(W[0], W[:, :2], W[:, 2:4]),
        "contractive": deq.weights.contractive,
    }[kind]
    has_direct = activation == "identity" or kind not in ("dense", "contractive")
    for solver in ("auto", "direct") if has_direct else ("auto",):
        f = lambda W, c: deq.solve(make(W), c, activation, tol=1e-13, solver=solver, on_failure="ignore").z  # noqa: E731, B023
        one_by_one = torch.autograd.functional.jacobian(f, (W, c))
        for ours, theirs in zip(torch.autograd.functional.jacobian(f, (W, c), vectorize=True), one_by_one, strict=True):
            close(ours, theirs)
        if solver != "direct":  # which has no forward mode
            forward = torch.autograd.functional.jacobian(f, (W, c), vectorize=True, strategy="forward-mode")
            for ours, theirs in zip(forward, one_by_one, strict=True):
                close(ours, theirs)
        leaves = [t.clone().requires_grad_() for t in (W, c)]
        g = torch.randn(7, 3, 5, dtype=torch.float64)
        z = f(*leaves)
        found = torch.autograd.grad(z, leaves, g, is_grads_batched=True, retain_graph=True)
        each = [torch.autograd.grad(z, leaves, one, retain_graph=True) for one in g]
        for ours, theirs in zip(found, zip(*each, strict=True), strict=True):
            close(ours, torch.stack(theirs))


def test_hessians_from_batches_of_gradients():
    W, c, _ = gaussian(4, 2, torch.float64, scale=0.4)
    for weight in (W, deq.weights.Diagonal(W.diagonal()), deq.weights.LowerTriangular(W)):
        total = lambda c: deq.solve(weight, c, "tanh", tol=1e-13).z.square().sum()  # noqa: E731, B023
        close(torch.autograd.functional.hessian(total, c, vectorize=True), torch.autograd.functional.hessian(total, c))


@pytest.mark.parametrize("backward", ["implicit", "neumann", "phantom", "one_step", "unrolled"])
@pytest.mark.parametrize("kind", ["fixed_point", "Equilibrium", "get_deq"])
def test_batches_of_gradients_of_functions(kind, backward):
    W, c, _ = gaussian(4, 3, torch.float64, scale=0.4)
    leaves = [t.requires_grad_() for t in (W, c)]

    def f(W, c):
        if kind == "Equilibrium":
            return deq.nn.Equilibrium(lambda z, x: torch.tanh(z @ W.mT + x), tol=1e-13, backward=backward)(c)
        step, start = lambda z: torch.tanh(z @ W.mT + c), torch.zeros_like(c)
        if kind == "fixed_point":
            return deq.fixed_point(step, start, tol=1e-13, backward=backward).z
        exact = {"f_tol": 1e-13, "b_tol": 1e-13, "f_stop_mode": "rel", "f_max_iter": 200, "b_max_iter": 200}
        return deq.torchdeq.get_deq(ift=backward == "implicit", grad=3, **exact)(step, start)[0][-1]

    g = torch.randn(5, 3, 4, dtype=torch.float64)
    z = f(*leaves)
    each = [torch.autograd.grad(z, leaves, one, retain_graph=True) for one in g]
    for twice in (False, True):
        found = torch.autograd.grad(z, leaves, g, is_grads_batched=True, retain_graph=True, create_graph=twice)
        for ours, theirs in zip(found, zip(*each, strict=True), strict=True):
            close(ours.detach(), torch.stack(theirs))
    total = lambda c: f(W.detach(), c).square().sum()  # noqa: E731
    inputs = tuple(leaf.detach() for leaf in leaves)
    one_by_one = torch.autograd.functional.jacobian(f, inputs)
    for strategy in ("reverse-mode", "forward-mode"):
        batched = torch.autograd.functional.jacobian(f, inputs, vectorize=True, strategy=strategy)
        for ours, theirs in zip(batched, one_by_one, strict=True):
            close(ours, theirs)
    hessian = torch.autograd.functional.hessian
    close(hessian(total, inputs[1], vectorize=True), hessian(total, inputs[1]))
