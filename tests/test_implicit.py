"""Gradients: exact, at any scale of the loss, to any order, in every mode of differentiation."""

import pytest
import torch
from close import assert_as_accurate, worst_error
from problems import exact, gaussian, torch_adjoint, torch_loop

import deq
from deq import _library, reference
from deq.activations import ACTIVATIONS

BACKENDS = ["reference"] + (["cpu"] if _library.compiled is not None else [])
backends = pytest.mark.parametrize("backend", BACKENDS)
# torch's forward mode compiles its own decompositions with torch.jit.script, which is deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
SMOOTH = [name for name in ACTIVATIONS if name not in ("relu", "leaky_relu")]
DTYPES = [torch.float32, torch.float64]


def gradients(W, c, g, **options):
    W, c = W.clone().requires_grad_(), c.clone().requires_grad_()
    deq.solve(W, c, **options).z.backward(g)
    return W.grad, c.grad


def with_margin(m, B, dtype, seed=0):
    """A ReLU problem whose pre-activations all keep away from the kink: no unit may flip within the tolerance."""
    W, c, g = gaussian(m, B, torch.float64, seed)
    z = exact(W, c)
    s = z @ W.mT + c
    c = c + torch.where(s > 0, 1e-2, -1e-2)  # moves the pre-activations out by about as much
    W, c, g = W.to(dtype), c.to(dtype), g.to(dtype)
    s = exact(W, c) @ W.double().mT + c.double()
    c = torch.where(s.abs() < 1e-3, c + torch.sign(s).to(dtype) * 0.1, c)
    return W, c, g


@pytest.mark.parametrize(("m", "B"), [(1, 1), (17, 5), (64, 256), (333, 7), (512, 64), (1024, 256), (2048, 3)])
@pytest.mark.parametrize("dtype", DTYPES)
@backends
def test_as_accurate_as_a_torch_loop(m, B, dtype, backend):
    if backend == "reference" and m * m * B > 1e8:
        pytest.skip("the reference is the torch loop itself at this size; minutes for nothing new")
    W, c, g = with_margin(m, B, dtype)
    tol = {torch.float32: 1e-5, torch.float64: 1e-10}[dtype]
    dW, dc = gradients(W, c, g, solver="plain", backend=backend)
    z = torch_loop(W, c, tol=tol)
    u = torch_adjoint(W, c, z, g, tol=tol)
    z64 = exact(W, c)
    u64 = torch_adjoint(W.double(), c.double(), z64, g.double(), tol=4e-15)
    assert_as_accurate(dc, u, u64)
    assert_as_accurate(dW.reshape(1, -1), (u.mT @ z).reshape(1, -1), (u64.mT @ z64).reshape(1, -1))


@backends
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_closed_form(backend, activation):
    W, c, g = with_margin(23, 9, torch.float64)
    dW, dc = gradients(W, c, g, activation=activation, backend=backend, tol=1e-13)
    z = exact(W, c, activation)
    dW_exact, dc_exact = reference.implicit_gradient(W, c, z, g, activation)
    assert worst_error(dc, dc_exact) < 1e-11 and worst_error(dW, dW_exact) < 1e-11


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_activation_on_every_instruction_set(activation, dtype, isa):
    W, c, g = with_margin(37, 11, dtype)
    _, dc = gradients(W, c, g, activation=activation, backend="cpu", tol=1e-6)
    z = torch_loop(W, c, activation, tol=1e-6)
    z64 = exact(W, c, activation)
    u64 = torch_adjoint(W.double(), c.double(), z64, g.double(), activation, tol=4e-15)
    assert_as_accurate(dc, torch_adjoint(W, c, z, g, activation, tol=1e-6), u64)


@backends
@pytest.mark.parametrize("activation", ["tanh", "relu"])
def test_linear_in_the_loss(backend, activation):
    W, c, g = with_margin(30, 12, torch.float32)
    dW, dc = gradients(W, c, g, activation=activation, backend=backend)
    for exponent in (-100, -20, 20, 100):
        scaled_W, scaled_c = gradients(W, c, g * 2.0**exponent, activation=activation, backend=backend)
        assert torch.equal(scaled_c, dc * 2.0**exponent)
        torch.testing.assert_close(scaled_W * 2.0**-exponent, dW, rtol=1e-6, atol=0)


@pytest.mark.parametrize("m", [24, 64, 130])  # lanes, rows, increments
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@backends
def test_gradients_at_units_that_relu_ends_say_nothing_of_the_scale(backend, dtype, m):
    """The others were zero beside them."""
    W, c, g = with_margin(m, 5, dtype)
    z = deq.solve(W, c.requires_grad_(), backend=backend).z
    (want,) = torch.autograd.grad(z, c, g, retain_graph=True)
    for huge, tiny in ((1e20, 1e-30), (1e36, 1.0), (1.0, 1e-20)):
        (found,) = torch.autograd.grad(z, c, torch.where(z > 0, tiny * g, huge * g), retain_graph=True)
        assert worst_error(found / tiny, want.double()) < 10 * torch.finfo(dtype).eps ** 0.7


@backends
@pytest.mark.parametrize("activation", SMOOTH)
@pytest.mark.parametrize("stacked", [False, True])
def test_gradcheck_and_gradgradcheck(backend, activation, stacked):
    if stacked and backend == "reference":
        pytest.skip("the reference runs stacked weights one by one: the same computation, at 20 s a case")
    shapes = [gaussian(3, 2, torch.float64, seed, scale=0.3) for seed in range(2)]
    W, c = (torch.stack([s[i] for s in shapes]) if stacked else shapes[0][i] for i in (0, 1))
    W, c = W.requires_grad_(), c.requires_grad_()

    def f(W, c):
        return deq.solve(W, c, activation, tol=1e-13, backend=backend).z

    assert torch.autograd.gradcheck(f, (W, c), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(f, (W, c))


@backends
def test_gradcheck_of_relu_away_from_its_kinks(backend):
    W, c, _ = with_margin(4, 3, torch.float64)
    W, c = W.requires_grad_(), c.requires_grad_()

    def f(W, c):
        return deq.solve(W, c, tol=1e-13, backend=backend).z

    assert torch.autograd.gradcheck(f, (W, c), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(f, (W, c))


@backends
def test_third_derivative(backend):
    w, x = torch.tensor([[0.4]], dtype=torch.float64), torch.tensor([[0.3]], dtype=torch.float64, requires_grad=True)
    y = deq.solve(w, x, "tanh", tol=1e-15, backend=backend, on_failure="ignore").z
    for _ in range(3):
        (y,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    # z = tanh(w z + x): with t = z and s = 1 - t^2, z' = s / (1 - w s); differentiated twice more by a float64 stencil.
    h = 3e-4

    def slope(x0):
        z = 0.0
        for _ in range(500):
            z = torch.tanh(w * z + x0)
        s = 1 - z * z
        return s / (1 - w * s)

    third = (slope(x.detach() + h) - 2 * slope(x.detach()) + slope(x.detach() - h)) / h**2
    assert torch.allclose(y, third, rtol=1e-4)


@backends
def test_gradients_reach_the_layers_inputs(backend):
    generator = torch.Generator().manual_seed(0)
    W, _, _ = gaussian(5, 3, torch.float64)
    U, b, x = (
        torch.randn(*s, generator=generator, dtype=torch.float64).requires_grad_() for s in ((5, 2), (5,), (3, 2))
    )
    assert torch.autograd.gradcheck(
        lambda W, U, b, x: deq.solve(W, x @ U.mT + b, "tanh", tol=1e-13, backend=backend).z,
        (W.requires_grad_(), U, b, x),
    )


@backends
@pytest.mark.parametrize("shape", [(20,), (2, 3, 20), (0, 20)])
def test_sample_dimensions(backend, shape):
    W, _, _ = gaussian(20, 1)
    generator = torch.Generator().manual_seed(0)
    c, g = torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)
    dW, dc = gradients(W, c, g, activation="tanh", backend=backend)
    flat_W, flat_c = gradients(W, c.reshape(-1, 20), g.reshape(-1, 20), activation="tanh", backend=backend)
    torch.testing.assert_close(dW, flat_W)
    torch.testing.assert_close(dc, flat_c.reshape(shape))


@backends
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("activation", ["tanh", "gelu"])
def test_half_precision(backend, dtype, activation):
    W, c, g = gaussian(24, 6, dtype)
    dW, dc = gradients(W, c, g, activation=activation, backend=backend)
    assert dW.dtype == dc.dtype == dtype
    z64 = exact(W, c, activation)
    u64 = torch_adjoint(W.double(), c.double(), z64, g.double(), activation, tol=4e-15)
    z = torch_loop(W, c, activation, tol=1e-2)
    assert_as_accurate(dc, torch_adjoint(W, c, z, g, activation, tol=1e-2), u64)


@backends
def test_only_what_is_asked_for(backend):
    W, c, g = gaussian(10, 4)
    z = deq.solve(W, c.requires_grad_(), backend=backend).z
    z.backward(g)
    assert c.grad is not None and W.grad is None
    z = deq.solve(W.requires_grad_(), c.detach(), backend=backend).z
    z.backward(g)
    assert W.grad is not None
    with torch.no_grad():
        assert not deq.solve(W, c, backend=backend).z.requires_grad
    z0 = torch.zeros_like(c, requires_grad=True)
    deq.solve(W, c, z0=z0, backend=backend).z.sum().backward()
    assert z0.grad is None


@backends
def test_a_nan_in_the_incoming_gradient_stays_with_its_sample(backend):
    """Loss scalers look for it; it must neither raise nor spread."""
    W, c, g = gaussian(12, 5)
    g[2, 3] = float("nan")
    c.requires_grad_()
    z = deq.solve(W, c, backend=backend, on_failure="ignore").z
    (dc,) = torch.autograd.grad(z, c, g)
    bad = torch.isnan(dc).all(dim=1)
    assert bad.tolist() == [False, False, True, False, False] and torch.isfinite(dc[~bad]).all()


@backends
def test_inexact_gradients_on_request(backend):
    W, c, g = with_margin(16, 6, torch.float64)
    options = {"activation": "tanh", "backend": backend, "tol": 1e-12}
    truth = gradients(W, c, g, **options)[0]
    z = exact(W, c, "tanh")
    s = 1 - z * z
    one_step = (s * g).mT @ z
    torch.testing.assert_close(gradients(W, c, g, backward="one_step", **options)[0], one_step)
    torch.testing.assert_close(gradients(W, c, g, backward="unrolled", **options)[0], truth, rtol=1e-6, atol=1e-9)
    phantom = gradients(W, c, g, backward="phantom", **options)[0]
    cosine = torch.nn.functional.cosine_similarity
    assert cosine(phantom.reshape(1, -1), truth.reshape(1, -1)) > cosine(one_step.reshape(1, -1), truth.reshape(1, -1))


@backends
def test_an_adjoint_that_does_not_converge_says_so(backend):
    W, c, g = gaussian(16, 4, torch.float64)
    c.requires_grad_()
    z = deq.solve(W, c, backend=backend, max_iter=40, tol=1e-9, on_failure="raise").z
    # The gradient gets the iterations of the solve: one more digit is asked of a second solve with too few.
    z = deq.solve(W, c, z0=z.detach(), backend=backend, max_iter=3, tol=1e-9, on_failure="warn").z
    with pytest.warns(deq.ConvergenceWarning, match="the gradient of deq.solve: 4 of 4 samples did not converge"):
        z.backward(g)


def test_func_transforms():
    W, c, g = gaussian(6, 4, torch.float64)

    def loss(W, c):
        return (deq.solve(W, c, "tanh", tol=1e-12).z * g).sum()

    dW, dc = torch.func.grad(loss, argnums=(0, 1))(W, c)
    expected = gradients(W, c, g, activation="tanh", tol=1e-12)
    torch.testing.assert_close((dW, dc), expected)
    _, tangent = torch.func.jvp(lambda c: deq.solve(W, c, "tanh", tol=1e-12).z, (c,), (g,))
    torch.testing.assert_close(
        (tangent * g).sum(), (torch.func.vjp(lambda c: deq.solve(W, c, "tanh", tol=1e-12).z, c)[1](g)[0] * g).sum()
    )
