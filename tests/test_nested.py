"""An equilibrium whose function solves another one: gradients reach what either closes over."""

import pytest
import torch
from torch import nn

import deq
from deq.torchdeq import get_deq

EXACT = ("implicit", "phantom", "neumann", "unrolled")  # phantom with enough steps of its own


def unrolled(f, z):
    for _ in range(40):
        z = f(z)
    return z


def by(backward):
    """deq.fixed_point with as many steps as the exact gradient needs."""
    options = {"tol": 1e-13, "backward": backward, "backward_steps": 40, "backward_damping": 1.0}
    return lambda f, z, **more: deq.fixed_point(f, z, **options, **more).z


def by_torchdeq(f, z):
    limits = {"f_tol": 1e-13, "f_max_iter": 100, "b_tol": 1e-13, "b_max_iter": 100}
    return get_deq(ift=True, f_solver="anderson", b_solver="anderson", **limits)(f, z)[0][-1]


@pytest.fixture
def parts():
    torch.manual_seed(0)
    return nn.Linear(4, 4).double(), nn.Linear(4, 4).double(), torch.randn(3, 4, dtype=torch.float64)


class Inner(nn.Module):
    """``tanh(0.3 linear(w) + 0.3 z + context)``, the context an attribute that somebody sets."""

    def __init__(self):
        super().__init__()
        self.linear, self.context = nn.Linear(4, 4).double(), None

    def forward(self, w, z):
        return torch.tanh(0.3 * self.linear(w) + 0.3 * z + self.context)


class Outer(nn.Module):
    def __init__(self, decoder, **options):
        super().__init__()
        self.decoder, self.layer = decoder, deq.nn.Equilibrium(Inner(), **options)
        self.unrolled = False

    def forward(self, z, x):
        block = self.layer.block
        w = unrolled(lambda w: block(w, z), torch.zeros_like(z)) if self.unrolled else self.layer(z)
        return torch.tanh(0.4 * self.decoder(w) + 0.1 * z + x)


@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize("outside", [*map(by, EXACT), by_torchdeq])
@pytest.mark.parametrize("inside", [*map(by, EXACT), by_torchdeq])
def test_inner_function_that_closes_over_a_tensor_with_a_history(parts, inside, outside, alone):
    """alone: it is all that needs a gradient."""
    encoder, decoder, x = parts
    decoder.requires_grad_(not alone)
    wanted = [p for p in (*encoder.parameters(), *decoder.parameters()) if p.requires_grad]
    zeros = torch.zeros_like(x)

    def run(inner, outer):
        c = encoder(x)

        def f(z):
            w = inner(lambda w: torch.tanh(0.3 * w + 0.3 * z + c), zeros)
            return torch.tanh(0.25 * decoder(w) + 0.1 * z)

        return torch.autograd.grad(outer(f, zeros).sum(), wanted)

    torch.testing.assert_close(run(inside, outside), run(unrolled, unrolled), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("known", [False, True])
def test_inner_function_that_finds_a_tensor_elsewhere(parts, known):
    """In an attribute, or named as tensors=."""
    encoder, decoder, x = parts
    zeros, holder = torch.zeros_like(x), nn.Module()

    def run(inner, outer):
        holder.c = encoder(x)

        def f(z):
            more = {"tensors": (z, holder.c)} if known and inner is not unrolled else {}
            w = inner(lambda w: torch.tanh(0.3 * w + 0.3 * z + holder.c), zeros, **more)
            return torch.tanh(0.25 * decoder(w) + 0.1 * z)

        return torch.autograd.grad(outer(f, zeros).sum(), (*encoder.parameters(), *decoder.parameters()))

    exact = by("implicit")
    torch.testing.assert_close(run(exact, exact), run(unrolled, unrolled), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("twice", [False, True])
@pytest.mark.parametrize("backward", EXACT)
def test_layer_in_a_layer_with_a_context(parts, backward, twice):
    """In several steps: what was learned of a layer in one holds in the next."""
    encoder, decoder, x = parts
    options = {"tol": 1e-13, "backward": backward, "backward_steps": 40, "backward_damping": 1.0}
    outer = Outer(decoder, **options)
    layer = deq.nn.Equilibrium(outer, **options)
    parameters = [*encoder.parameters(), *layer.parameters()]

    def gradients(solve):
        outer.layer.block.context = encoder(x)
        first = torch.autograd.grad(solve().sin().sum(), parameters, create_graph=twice)
        if not twice:
            return first
        return torch.autograd.grad(sum(g.square().sum() for g in first), parameters)

    for _ in range(2):
        actual = gradients(lambda: layer(x))
        outer.unrolled = True
        expected = gradients(lambda: unrolled(lambda z: outer(z, x), torch.zeros_like(x)))
        outer.unrolled = False
        torch.testing.assert_close(actual, expected, rtol=1e-8, atol=1e-10)
