"""The table of activations: formulas against torch and autograd, and the compiled copies against the table."""

import pytest
import torch
import torch.nn.functional as F

import deq
from deq.activations import ACTIVATIONS, get_activation
from deq.backends import cpu

TORCH = {
    "identity": lambda x: x,
    "relu": F.relu,
    "leaky_relu": F.leaky_relu,
    "elu": F.elu,
    "gelu": F.gelu,
    "silu": F.silu,
}
TORCH |= {"tanh": torch.tanh, "sigmoid": torch.sigmoid, "softplus": lambda x: F.softplus(x, threshold=40.0)}
names = pytest.mark.parametrize("name", ACTIVATIONS)


def points(dtype=torch.float64):
    dense = torch.linspace(-30, 30, 4001, dtype=torch.float64)
    fine = torch.logspace(-12, 0, 500, dtype=torch.float64)
    return torch.cat((dense, fine, -fine, torch.tensor([20.0, 20.001, 39.9, 40.1, -87.0, 88.0, 1e4, -1e4]))).to(dtype)


@names
def test_table_against_torch_and_autograd(name):
    entry = ACTIVATIONS[name]
    x = points().requires_grad_()
    y = entry.value(x)
    torch.testing.assert_close(y, TORCH[name](x), rtol=1e-14, atol=1e-15)
    (slope,) = torch.autograd.grad(TORCH[name](x).sum(), x)
    torch.testing.assert_close(entry.derivative(x), slope, rtol=1e-12, atol=1e-15)
    if entry.derivative_of_value is not None:
        torch.testing.assert_close(entry.derivative_of_value(y), slope, rtol=1e-8, atol=3e-15)
    assert slope.abs().max() <= entry.lipschitz * (1 + 1e-6) and slope.abs().max() >= entry.lipschitz * 0.98
    if entry.homogeneous:
        torch.testing.assert_close(entry.value(8 * x), 8 * y)


def compiled(name, x):
    """With W = 0 the first evaluation is act(c), and derivative_ is act'(c)."""
    W, c = torch.zeros(1, 1, dtype=x.dtype), x.unsqueeze(1)
    value = deq.solve(W, c, name, backend="cpu", on_failure="ignore").z
    return value.squeeze(1), cpu.derivative(W, c, torch.zeros_like(c), name).squeeze(1)


@names
def test_compiled_float32(name, isa):
    """At most twice the relative error of the same formula in torch, plus 2 ulp, at every point down to 1e-30."""
    entry, x = ACTIVATIONS[name], points(torch.float32)
    value, slope = compiled(name, x)
    exact, exact_slope = entry.value(x.double()), entry.derivative(x.double())
    ulp = torch.finfo(torch.float32).eps

    def worst(actual, truth, floor):
        return ((actual.double() - truth).abs() / truth.abs().clamp(min=floor))[truth.abs() > 1e-30].max()

    assert worst(value, exact, 1e-30) <= 2 * worst(entry.value(x), exact, 1e-30) + 2 * ulp
    # Derivatives cancel in torch and here alike: judged against the largest derivative, which is about 1.
    assert worst(slope, exact_slope, 1.0) <= 2 * worst(entry.derivative(x), exact_slope, 1.0) + 2 * ulp


@names
def test_compiled_float64(name, isa):
    """No wider type to judge by: 16 ulp of torch's own float64."""
    entry, x = ACTIVATIONS[name], points()
    value, slope = compiled(name, x)
    torch.testing.assert_close(value, entry.value(x), rtol=16 * 2.2e-16, atol=1e-16)
    torch.testing.assert_close(slope, entry.derivative(x), rtol=16 * 2.2e-16, atol=4 * 2.2e-16)


def test_numbers_are_unique_and_unknown_names_are_refused():
    assert sorted(entry.number for entry in ACTIVATIONS.values()) == list(range(len(ACTIVATIONS)))
    for wrong in ("Relu", "", None, ["relu"]):
        with pytest.raises(ValueError, match="activation must be one of identity, relu, leaky_relu"):
            get_activation(wrong)
