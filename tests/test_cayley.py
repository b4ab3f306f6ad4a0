"""The Cayley map: its matrix against the pivoted inverse, its fixed points and adjoints against closed forms."""

import gc
import math
import weakref

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from close import assert_as_accurate, worst_error
from problems import exact, gaussian, torch_loop

from deq import reference
from deq.activations import ACTIVATIONS
from deq.solution import Status
from deq.solvers.cayley import cayley_matrix, choose_alpha, is_certified
from deq.weights import monotone

DTYPES = [torch.float32, torch.float64]
MONOTONE = [name for name in ACTIVATIONS if name not in ("gelu", "silu")]


def monotone_problem(m, mu, B=8, dtype=torch.float64):
    """W of the monotone parametrisation with Gaussian factors: norm about 4, the plain iteration diverges."""
    A, c, _ = gaussian(m, B, torch.float64, seed=m, scale=1.0)
    S, _, g = gaussian(m, B, torch.float64, seed=m + 1, scale=1.0)
    return monotone(A, S, mu).to(dtype), c.to(dtype), g.to(dtype)


def equilibrium(W, c, z, activation):
    """Newton's method in float64 from a z that is nearly there, to the rounding of the arithmetic."""
    W, c, z = W.double(), c.double(), z.double()
    act = ACTIVATIONS[activation]
    for _ in range(4):
        u = z @ W.mT + c
        J = torch.eye(W.shape[0], dtype=W.dtype) - act.derivative(u).unsqueeze(-1) * W
        z = z - torch.linalg.solve(J, z - act.value(u))
    return z


def inverse_product(K, W, alpha):
    """``((1 + alpha) I - alpha W) V`` of a K, the identity if all is exact."""
    eye = torch.eye(W.shape[-1], dtype=torch.float64)
    return ((1 + alpha) * eye - alpha * W.double()) @ (K.double() + eye) / 2


# ---- the matrix


@pytest.mark.parametrize("m", [1, 2, 17, 32, 33, 64, 65, 100, 333, 512])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("alpha", [0.4, 1.0, 2.5])
def test_matrix_is_as_accurate_as_the_pivoted_inverse(m, dtype, alpha):
    W = monotone_problem(m, 0.5)[0].to(dtype)
    eye = torch.eye(m, dtype=dtype)
    pivoted = 2 * torch.linalg.inv((1 + alpha) * eye - alpha * W) - eye
    K = cayley_matrix(W, alpha)
    assert K.dtype == dtype and K.is_contiguous()
    product, plain = inverse_product(K, W, alpha), inverse_product(pivoted, W, alpha)
    ours, theirs = worst_error(product, eye.double()), worst_error(plain, eye.double())
    assert ours <= 2 * theirs + 2 * torch.finfo(dtype).eps
    if dtype == torch.float32:  # in float64 the pivoted inverse is no better a judge
        assert_as_accurate(K, pivoted, cayley_matrix(W.double(), alpha))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 2, 15, 16, 33, 64])
def test_block_is_as_accurate_as_the_pivoted_inverse(n, dtype, isa):
    A = 2 * torch.eye(n, dtype=dtype) - monotone_problem(n, 0.5)[0].to(dtype)
    frame = torch.full((n + 2, n + 5), 7.0, dtype=dtype)
    block = frame[1:-1, 2:-3]
    block.copy_(A)
    torch.ops.deq.invert_(block)
    eye, pivoted = torch.eye(n, dtype=torch.float64), torch.linalg.inv(A)
    assert_as_accurate(A.double() @ block.double(), A.double() @ pivoted.double(), eye)
    block.fill_(7.0)
    assert (frame == 7.0).all()


def test_any_strides_stacks_and_halves():
    W, _, _ = gaussian(70, 1)
    K = cayley_matrix(W)
    padded = torch.zeros(90, 140)
    padded[5:75, 60:130] = W
    assert torch.equal(cayley_matrix(padded[5:75, 60:130]), K)
    assert torch.equal(cayley_matrix(W.mT.contiguous().mT), K)
    stack = torch.stack((W, 0.3 * W, -W))
    assert torch.equal(cayley_matrix(stack), torch.stack([cayley_matrix(A) for A in stack]))
    assert torch.equal(cayley_matrix(W.expand(2, 70, 70)), K.expand(2, 70, 70))
    assert cayley_matrix(W.new_empty(0, 5, 5)).shape == (0, 5, 5)
    for dtype in (torch.bfloat16, torch.float16):
        half = cayley_matrix(W.to(dtype))
        assert half.dtype == torch.float32 and torch.equal(half, cayley_matrix(W.to(dtype).float()))


def test_no_matrix_waits_for_the_garbage_collector():
    """Training makes one a step, and the collector counts objects, not bytes."""
    W = monotone_problem(200, 0.5)[0]
    gc.disable()
    try:
        K = weakref.ref(cayley_matrix(W))
        assert K() is None
    finally:
        gc.enable()


def test_matrix_is_outside_autograd():
    W = gaussian(40, 1)[0].requires_grad_()
    before = W.detach().clone()
    assert not cayley_matrix(W).requires_grad
    assert torch.equal(W, before)


@pytest.mark.parametrize("dtype", DTYPES)
def test_pivoted_inverse_takes_over(dtype):
    """2 I - W = [[0, -I], [-I, 2 I]]: its leading block is singular, the matrix itself is well conditioned."""
    eye = torch.eye(64, dtype=dtype)
    W = torch.cat((torch.cat((2 * eye, eye), 1), torch.cat((eye, 0 * eye), 1)))
    K = cayley_matrix(W)
    assert worst_error(inverse_product(K, W, 1.0), torch.eye(128).double()) <= 8 * torch.finfo(dtype).eps


@pytest.mark.parametrize("m", [1, 31, 64, 100])
def test_no_matrix_where_there_is_no_inverse(m):
    eye = torch.eye(m)
    for W in (2 * eye, torch.full((m, m), math.nan), torch.full((m, m), math.inf), math.nan * eye):
        assert cayley_matrix(W) is None
        assert cayley_matrix(torch.stack((0 * eye, W))) is None
    assert cayley_matrix(3 * eye, 0.5) is None and cayley_matrix(2 * eye, 0.5) is not None


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ((torch.zeros(3, 4),), ValueError, r"W must be \(m, m\).*\(3, 4\)"),
        ((torch.zeros(0, 0),), ValueError, r"at least 1; got shape \(0, 0\)"),
        ((torch.zeros(3),), ValueError, r"got shape \(3,\)"),
        ((torch.zeros(3, 3, dtype=torch.int64),), TypeError, "floating-point.*int64"),
        (([[1.0]],), TypeError, "got list"),
        ((torch.zeros(3, 3), 0.0), ValueError, "alpha must be a positive number; got 0.0"),
        ((torch.zeros(3, 3), math.nan), ValueError, "alpha.*nan"),
    ],
)
def test_bad_arguments_are_named(arguments, error, words):
    with pytest.raises(error, match=words):
        cayley_matrix(*arguments)


# ---- the certificate


@pytest.mark.parametrize("m", [1, 9, 80])
@pytest.mark.parametrize("dtype", DTYPES)
def test_certificate_at_the_boundary(m, dtype):
    Q = torch.linalg.qr(gaussian(m, 1, torch.float64)[0])[0]
    S = gaussian(m, 1, torch.float64, seed=1)[0]
    spectrum = torch.linspace(-3.0, 1.0, m, dtype=torch.float64) if m > 1 else torch.ones(1, dtype=torch.float64)
    on_it = Q @ torch.diag(spectrum) @ Q.mT + S - S.mT
    eye, gap = torch.eye(m, dtype=torch.float64), 1e-5
    assert is_certified((on_it - gap * eye).to(dtype))
    assert not is_certified((on_it + gap * eye).to(dtype))
    assert not is_certified(torch.stack((on_it - gap * eye, on_it + gap * eye)).to(dtype))


@hypothesis.given(seed=st.integers(0, 10**6), m=st.integers(1, 24), scale=st.floats(0.01, 3.0), alpha=st.floats(0.1, 4))
@hypothesis.settings(max_examples=60, deadline=None)
def test_certified_means_a_contraction(seed, m, scale, alpha):
    W = gaussian(m, 1, torch.float64, seed=seed, scale=scale)[0]
    if is_certified(W):
        assert torch.linalg.matrix_norm(cayley_matrix(W, alpha), 2) < 1
    else:
        assert torch.linalg.eigvalsh((W + W.mT) / 2)[-1] > 1 - 1e-9


def test_certificate_is_not_given_to_what_is_merely_invertible():
    W = 1.5 * torch.eye(3)
    torch.testing.assert_close(cayley_matrix(W), 3 * torch.eye(3))
    assert not is_certified(W) and not is_certified(torch.full((2, 2), math.nan)) and is_certified(-1e30 * W)


# ---- its fixed points


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_fixed_point_is_that_of_the_equation(activation, dtype):
    W, c, _ = gaussian(37, 11, dtype, scale=0.8)
    tol = {torch.float32: 1e-6, torch.float64: 1e-13}[dtype]
    z, _, residual, status = reference.cayley_solve(W, c, activation, tol=tol, max_iter=500)
    assert (status == Status.CONVERGED).all() and (residual <= tol).all()
    assert_as_accurate(z, torch_loop(W, c, activation, tol=tol), exact(W, c, activation))


@pytest.mark.parametrize("alpha", [0.3, 0.7, 1.0, 1.6])
def test_relu_has_one_fixed_point_for_every_alpha(alpha):
    """To the rounding of float32: the iterations run until they no longer improve."""
    W, c, g = gaussian(30, 9, scale=0.8)
    floor = {"tol": 1e-17, "max_iter": 500}
    z = reference.cayley_solve(W, c, "relu", alpha=alpha, **floor)[0]
    exact = equilibrium(W.double(), c.double(), z.double(), "relu")
    assert_as_accurate(z, reference.solve(W, c, "relu", **floor)[0], exact)
    d = reference.derivative(W, c, z, "relu")
    u = reference.cayley_adjoint(W.mT, d, g, alpha=alpha, **floor)[0]
    exact = reference.implicit_gradient(W.double(), c.double(), z.double(), g.double(), "relu")[1]
    assert_as_accurate(u, reference.masked_linear(W.mT, d, g, **floor)[0], exact)


@pytest.mark.parametrize(("activation", "alpha"), [("tanh", 1.0), ("gelu", 1.0), ("relu", 0.6)])
def test_a_step_by_the_residual_of_the_equation_is_the_same_step(activation, alpha):
    W, c, x = gaussian(40, 6, torch.float64)
    K, z = cayley_matrix(W, alpha), ACTIVATIONS[activation].value(x)
    step = (2 * z - x) @ K.mT + alpha * (c + c @ K.mT)
    residual = (1 - alpha) * z + alpha * (z @ W.mT + c) - x
    torch.testing.assert_close(x + residual + residual @ K.mT, step, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("activation", MONOTONE)
@pytest.mark.parametrize("mu", [0.1, 1.0])
def test_monotone_weights_and_their_gradients_in_every_activation(activation, mu):
    W, c, g = monotone_problem(64, mu)
    assert is_certified(W)
    tol = 1e-14
    z, _, _, status = reference.cayley_solve(W, c, activation, tol=tol, max_iter=2000)
    found = equilibrium(W, c, z, activation)
    # An error of tol |z| in the residual is one of at most tol |z| / mu in z: sym(I - W) >= mu I.
    assert (status == Status.CONVERGED).all() and worst_error(z, found) <= 2 * tol * 5 / mu
    d = reference.derivative(W, c, found, activation)
    u, _, _, status = reference.cayley_adjoint(W.mT, d, g, tol=tol, max_iter=2000)
    expected = reference.implicit_gradient(W, c, found, g, activation)[1]
    assert (status == Status.CONVERGED).all() and worst_error(u, expected) <= 2 * tol * 5 / mu


@pytest.mark.parametrize("m", [64, 128, 256])
@pytest.mark.parametrize("mu", [0.1, 1.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_where_the_plain_map_diverges_thirty_evaluations_are_enough(m, mu, dtype):
    W, c, g = monotone_problem(m, mu, B=16, dtype=dtype)
    *_, plain = reference.solve(W, c, "relu", tol=1e-5, max_iter=200)
    assert (plain != Status.CONVERGED).all()
    options = {"alpha": choose_alpha(W, "relu"), "tol": 1e-5, "max_iter": 30, "acceleration": "anderson", "depth": 3}
    z, iterations, _, status = reference.cayley_solve(W, c, "relu", **options)
    assert (status == Status.CONVERGED).all() and (iterations <= 30).all()
    assert worst_error(reference.cell(W.double(), c.double(), z.double(), "relu"), z.double()) <= 1.1e-5
    d = reference.derivative(W, c, z, "relu")
    u, _, _, status = reference.cayley_adjoint(W.mT, d, g, **options | {"max_iter": 34})
    assert (status == Status.CONVERGED).all()
    assert worst_error(d.double() * (u.double() @ W.double() + g.double()), u.double()) <= 1.1e-5


def test_start_stacks_and_empty_batches():
    W, c, _ = gaussian(20, 6, torch.float64)
    stack, injections = torch.stack((W, W.mT)), torch.stack((c, 2 * c))
    options = {"tol": 1e-12, "max_iter": 200}
    z, iterations, residual, status = reference.cayley_solve(stack, injections, "tanh", **options)
    for s in range(2):
        for ours, alone in zip(
            (z, iterations, residual, status),
            reference.cayley_solve(stack[s], injections[s], "tanh", **options),
            strict=True,
        ):
            torch.testing.assert_close(ours[s], alone)
    for alpha in (0.6, 1.0):
        cold = reference.cayley_solve(W, c, "relu", alpha=alpha, **options)
        warm = reference.cayley_solve(W, c, "relu", cold[0], alpha=alpha, **options)
        assert (warm[1] <= 2).all() and (cold[1] > 8).all()
    assert reference.cayley_solve(W, c[:0], "relu", **options)[0].shape == (0, 20)
    assert reference.cayley_solve(W, c[0], "relu", **options)[0].shape == (20,)


@pytest.mark.parametrize("factor", [2.0**-20, 2.0**20])
def test_scaling_changes_nothing(factor):
    W, c, g = gaussian(48, 8, scale=0.9)
    options = {"tol": 1e-5, "max_iter": 200, "alpha": choose_alpha(W, "relu")}
    for run, argument in (
        (lambda x: reference.cayley_solve(W, x, "relu", **options), c),
        (lambda x: reference.cayley_adjoint(W.mT, (c > 0).float(), x, **options), g),
    ):
        one, scaled = run(argument), run(factor * argument)
        assert torch.equal(scaled[0], factor * one[0])
        assert all(torch.equal(a, b) for a, b in zip(one[1:], scaled[1:], strict=True))


# ---- the choices


def test_alpha():
    W, _, _ = gaussian(64, 1, scale=0.9)
    assert choose_alpha(W, "relu") == 1.0
    far = monotone_problem(64, 1.0)[0]
    eye = torch.eye(64, dtype=torch.float64)
    assert choose_alpha(far, "relu") == pytest.approx(1.5 * 8 / float(torch.linalg.matrix_norm(eye - far)))
    assert all(choose_alpha(far, name) == 1.0 for name in ACTIVATIONS if name != "relu")
    for dtype in (torch.float32, torch.float16):
        largest = torch.full((4, 4), torch.finfo(dtype).max, dtype=dtype)
        assert 0 < choose_alpha(-largest, "relu") < 1e-3
    assert choose_alpha(torch.eye(5), "relu") == choose_alpha(torch.zeros(2, 3, 3), "relu") == 1.0
