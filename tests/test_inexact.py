"""Gradients of deq.solve that are not exact: what is solved, what is returned, where they may be taken."""

import pytest
import torch
from close import close
from problems import contraction, gaussian
from torch.func import grad, jvp, vmap

import deq
from deq import Status, weights
from deq.activations import ACTIVATIONS

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
INEXACT = pytest.mark.parametrize("backward", ["one_step", "phantom", "unrolled"])


def slow(m, B):
    """Samples of a W whose plain iteration takes long or diverges, which other solvers bring home."""
    generator = torch.Generator().manual_seed(0)
    A, B_, c = (torch.randn(n, m, generator=generator) for n in (m, m, B))
    return weights.monotone(A / m**0.5, B_ / m**0.5, 0.1).requires_grad_(), c


@pytest.mark.parametrize("solver", ["auto", "anderson", "cayley"])
def test_an_unrolled_iteration_is_the_one_that_is_reported(solver):
    W, c = slow(64, 4)
    plain = deq.solve(W.detach(), c, solver="plain", on_failure="ignore")
    assert not plain.converged.any()
    with pytest.warns(deq.ConvergenceWarning, match="4 of 4 samples did not converge"):
        unrolled = deq.solve(W, c, solver=solver, backward="unrolled")
    assert torch.equal(unrolled.status, plain.status) and torch.equal(unrolled.iterations, plain.iterations)
    torch.testing.assert_close(unrolled.z, plain.z)
    (dW,) = torch.autograd.grad(unrolled.z.sum(), W)
    assert torch.isfinite(dW).all()
    assert "unrolled" in unrolled.plan.explain() and unrolled.plan.map == "plain"


@INEXACT
@pytest.mark.parametrize("shape", [(0, 6), (2, 0, 6)])
def test_no_samples_have_a_gradient(backward, shape):
    """The last batch of a data set may be filtered to nothing; unrolled it had no graph, and backward() failed."""
    W, c = torch.eye(6).mul(0.3).requires_grad_(), torch.zeros(shape, requires_grad=True)
    deq.solve(W, c, "tanh", backward=backward).z.sum().backward()
    assert c.grad.shape == shape and torch.equal(W.grad, torch.zeros(6, 6))


def test_an_unrolled_sample_that_failed_is_its_best_iterate():
    W, c = contraction(0.99)
    W = W * torch.tensor([1.0, -1.0], dtype=W.dtype)[:, None, None]  # a stack
    c = c.view(2, 3, -1)
    options = {"activation": "tanh", "max_iter": 7, "on_failure": "ignore"}
    best = deq.solve(W.detach(), c, solver="plain", **options)
    unrolled = deq.solve(W, c, backward="unrolled", **options)
    assert (best.status == Status.MAX_ITER).all()
    torch.testing.assert_close(unrolled.z, best.z)


@INEXACT
@pytest.mark.parametrize("activation", ["relu", "gelu", "leaky_relu"])
def test_what_grows_out_of_range_has_neither_nan_nor_its_gradient(backward, activation):
    W, c = (torch.eye(3) * 1e30).requires_grad_(), torch.tensor([[1.0, 2.0, 3.0], [-1.0, 1e9, 1.0]])
    z = deq.solve(W, c, activation, backward=backward, on_failure="ignore").z
    assert torch.isfinite(z).all() and torch.isfinite(torch.autograd.grad(z.sum(), W)[0]).all()


@INEXACT
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("compiled", [False, True])
def test_halves_are_evaluated_in_float32_and_rounded_once(backward, dtype, compiled):
    if compiled and backward == "unrolled":
        pytest.skip("not available inside torch.compile")
    W, c, _ = gaussian(64, 16, dtype)
    W = W.requires_grad_()

    def solve(W, c):
        return deq.solve(W, c, "tanh", backward=backward, on_failure="ignore").z

    run = torch.compile(solve, fullgraph=True, backend="aot_eager") if compiled else solve
    z = run(W, c)
    exact = deq.solve(W.detach().double(), c.double(), "tanh").z
    assert z.dtype == dtype and (z - exact).norm() <= 1.1 * (exact.to(dtype) - exact).norm()
    beyond = run((2 * torch.eye(64)).to(dtype).requires_grad_(), (c.abs() + 1) * 1e4)
    assert torch.isfinite(beyond).all()


@INEXACT
def test_transforms(backward):
    W, c, g = gaussian(5, 3, torch.float64, scale=0.4)

    def solve(W, c):
        return deq.solve(W, c, "tanh", tol=1e-13, backward=backward).z

    def gradient(W, c, g):
        leaf = W.clone().requires_grad_()
        return torch.autograd.grad((solve(leaf, c) * g).sum(), leaf)[0]

    each = vmap(grad(lambda W, c, g: (solve(W, c) * g).sum()), (None, 0, 0))(W, c, g)
    close(each, torch.stack([gradient(W, c[i : i + 1], g[i : i + 1]) for i in range(3)]))
    stack = torch.stack((W, 0.5 * W, -W))
    close(vmap(solve, (0, None))(stack, c), torch.stack([solve(w, c) for w in stack]))
    tangent = jvp(lambda W: solve(W, c), (W,), (W.T,))[1]
    close((tangent * g).sum(), (gradient(W, c, g) * W.T).sum())


@pytest.mark.parametrize("compiled", [False, True])
def test_an_inexact_tangent_is_that_of_one_evaluation(compiled):
    W, c, _ = gaussian(5, 3, torch.float64, scale=0.4)

    def f(W, c):
        return jvp(lambda W: deq.solve(W, c, "tanh", tol=1e-13, backward="one_step").z, (W,), (W.T,))

    z, tangent = (torch.compile(f, fullgraph=True, backend="aot_eager") if compiled else f)(W, c)
    close(tangent, ACTIVATIONS["tanh"].derivative_of_value(z) * (z @ W))


@INEXACT
def test_what_is_not_finite_is_refused_before_anything_is_evaluated(backward):
    W, c, _ = gaussian(5, 3)
    W[1, 2] = torch.inf
    for f in (
        lambda W: deq.solve(W, c, backward=backward).z,
        grad(lambda W: deq.solve(W, c, backward=backward).z.sum()),
    ):
        with pytest.raises(ValueError, match=r"^W must be finite; W\[1, 2\] is inf"):
            f(W.requires_grad_())
