"""What keeps equilibrium models trainable: estimates against dense algebra, guarantees against measured norms."""

import math

import pytest
import torch
from torch import nn

import deq


def test_jacobian_penalty():
    torch.manual_seed(0)
    W = torch.randn(6, 6, dtype=torch.float64, requires_grad=True)
    z = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    image = torch.tanh(z @ W.T)
    true = ((1 - image.square()).unsqueeze(2) * W).square().sum() / z.numel()
    estimate = deq.nn.jacobian_penalty(image, z, samples=3000)
    assert abs(float(estimate.detach() / true.detach()) - 1) < 0.1
    slope, exact = (torch.autograd.grad(t, W, retain_graph=True)[0] for t in (estimate, true))
    assert float((slope - exact).norm() / exact.norm()) < 0.2


@pytest.mark.parametrize("shape", [(0, 3), (3, 0)])
def test_jacobian_penalty_of_nothing(shape):
    """Zero, and so are its gradients."""
    w, z = (torch.ones(*size, requires_grad=True) for size in ((shape[1],), shape))
    penalty = deq.nn.jacobian_penalty(torch.tanh(w * z), z)
    assert float(penalty.detach()) == 0
    for grad, like in zip(torch.autograd.grad(penalty, (w, z)), (w, z), strict=True):
        assert torch.equal(grad, torch.zeros_like(like))
    with pytest.raises(ValueError, match="samples must be a positive integer; got 0"):
        deq.nn.jacobian_penalty(torch.tanh(w * z), z, samples=0)


def test_spectral_radius():
    """Real, complex and zero: the modulus of the largest eigenvalue of every sample's own Jacobian."""
    rotation = torch.tensor([[math.cos(1.3), -math.sin(1.3)], [math.sin(1.3), math.cos(1.3)]])
    matrices = torch.stack((0.9 * rotation, torch.diag(torch.tensor([0.3, -0.7])), torch.zeros(2, 2)))
    z = torch.zeros(3, 2, requires_grad=True)
    radius, vector = deq.nn.spectral_radius((matrices @ z.unsqueeze(2)).squeeze(2), z)
    torch.testing.assert_close(radius, torch.tensor([0.9, 0.7, 0.0]))
    assert vector.shape == z.shape
    for scale in (1e-25, 1e25):  # whose squares float32 does not hold
        radius, _ = deq.nn.spectral_radius((scale * matrices @ z.unsqueeze(2)).squeeze(2), z)
        torch.testing.assert_close(radius / scale, torch.tensor([0.9, 0.7, 0.0]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_jacobian_penalty_in_16_bits(dtype):
    """The sum of squares is beyond float16."""
    z = torch.ones(70000, 2, dtype=dtype, requires_grad=True)
    w = torch.ones((), dtype=dtype, requires_grad=True)
    penalty = deq.nn.jacobian_penalty(w * z, z)
    assert abs(float(penalty.detach()) - 1) < 0.05
    (grad,) = torch.autograd.grad(penalty, w)
    assert abs(float(grad) - 2) < 0.1


@pytest.mark.parametrize("iterations", [0, -1, 2.0])
def test_spectral_radius_by_no_iteration(iterations):
    z = torch.zeros(3, 2, requires_grad=True)
    with pytest.raises(ValueError, match="iterations must be a positive integer; got"):
        deq.nn.spectral_radius(0.5 * z, z, iterations)


def test_jacobian_of_an_image_that_does_not_depend_on_the_point():
    x, z = (torch.ones(3, 2, requires_grad=True) for _ in range(2))
    assert float(deq.nn.jacobian_penalty(torch.tanh(x), z).detach()) == 0
    radius, vector = deq.nn.spectral_radius(torch.tanh(x), z)
    assert torch.equal(radius, torch.zeros(3)) and torch.equal(vector, torch.zeros(3, 2))


def test_correction_loss():
    states = [torch.full((2, 2), float(k), requires_grad=True) for k in range(3)]
    loss = deq.nn.correction_loss(lambda z, y: (z - y).abs().sum(), states, torch.zeros(2, 2), decay=0.5)
    assert float(loss.detach()) == 4 * (0.25 * 0 + 0.5 * 1 + 2)
    loss.backward()
    assert states[1].grad.eq(0.5).all()
    with pytest.raises(ValueError, match="states must not be empty"):
        deq.nn.correction_loss(torch.sum, [])


def operator(f, shape):
    """The matrix of a linear map on tensors of that shape."""
    eye = torch.eye(math.prod(shape), dtype=torch.float64)
    return f(eye.reshape(-1, *shape)).reshape(len(eye), -1).T


@pytest.mark.parametrize(("channels", "kernel"), [(1, 3), (3, 3), (2, 1), (2, 5)])
def test_contractive_convolution(channels, kernel):
    torch.manual_seed(channels)
    layer = nn.Conv2d(channels, channels, kernel, padding=kernel // 2, bias=False, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.mul_(5)
    deq.nn.contractive_convolution(layer, 0.9)
    norm = torch.linalg.matrix_norm(operator(layer, (channels, 6, 6)).detach(), 2)
    assert 0.3 < norm <= 0.9 + 1e-12
    x = torch.randn(2, channels, 6, 6, dtype=torch.float64)
    solved = deq.nn.Equilibrium(lambda z, x: torch.relu(layer(z) + x), solver="plain", on_failure="raise")(x)
    solved.sum().backward()
    assert torch.isfinite(layer.parametrizations.weight.original.grad).all()
    with pytest.raises(ValueError, match="layer must have stride 1"):
        deq.nn.contractive_convolution(nn.Conv2d(2, 2, 3, stride=2))
    with pytest.raises(TypeError, match="layer must be a Conv2d; got Linear"):
        deq.nn.contractive_convolution(nn.Linear(2, 2))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_contractive_convolution_in_16_bits(dtype):
    torch.manual_seed(0)
    layer = nn.Conv2d(2, 2, 3, padding=1, bias=False)
    with torch.no_grad():
        layer.weight.mul_(5)
    layer = deq.nn.contractive_convolution(layer.to(dtype), 0.9)
    y = layer(torch.ones(1, 2, 4, 4, dtype=dtype))
    y.sum().backward()
    assert y.dtype == layer.weight.dtype == layer.parametrizations.weight.original.grad.dtype == dtype
    assert deq.nn.convolutions.convolution_norm_bound(layer.weight.detach()) <= 0.9 * (1 + torch.finfo(dtype).eps)


def test_contractive_convolution_that_begins_at_zero():
    """As the last layer of a block often does: it has a gradient."""
    layer = nn.Conv2d(2, 2, 3, padding=1)
    nn.init.zeros_(layer.weight)
    deq.nn.contractive_convolution(layer)
    layer(torch.ones(1, 2, 4, 4)).sum().backward()
    grad = layer.parametrizations.weight.original.grad
    assert torch.isfinite(grad).all() and grad.abs().sum() > 0


@pytest.mark.parametrize("kernel_size", [0, 2, -1, 3.0])
def test_monotone_convolution_of_no_such_kernel(kernel_size):
    with pytest.raises(ValueError, match="kernel_size must be odd and positive; got"):
        deq.nn.MonotoneConv2d(2, kernel_size)


@pytest.mark.parametrize("channels", [0, -1, 2.0])
def test_monotone_convolution_of_no_channels(channels):
    with pytest.raises(ValueError, match="channels must be a positive integer; got"):
        deq.nn.MonotoneConv2d(channels)


@pytest.mark.parametrize("mu", [0.1, 1.0])
def test_monotone_convolution(mu):
    torch.manual_seed(0)
    layer = deq.nn.MonotoneConv2d(2, 3, mu, dtype=torch.float64)
    with torch.no_grad():
        layer.A.add_(0.5 * torch.randn_like(layer.A))
        layer.B.add_(0.5 * torch.randn_like(layer.B))
    W = operator(layer, (2, 5, 5)).detach()
    least = torch.linalg.eigvalsh(torch.eye(50, dtype=torch.float64) - 0.5 * (W + W.T)).amin()
    assert least >= mu - 1e-10
    assert torch.linalg.matrix_norm(W, 2) > 1  # far from a contraction
    x = torch.randn(3, 2, 5, 5, dtype=torch.float64)
    solved = deq.nn.Equilibrium(lambda z, x: torch.relu(layer(z) + x), solver="newton_krylov", depth=60)(x)
    torch.testing.assert_close(solved, torch.relu(layer(solved) + x), rtol=1e-7, atol=1e-8)
