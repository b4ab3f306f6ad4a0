"""Nets with an equilibrium inside, in torch.compile, torch.export, autocast and checkpoints."""

import copy

import pytest
import torch
from problems import gaussian
from torch import nn
from torch.func import grad, jvp
from torch.utils.checkpoint import checkpoint

import deq
from deq.torchdeq import get_deq

pytestmark = [
    pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`:UserWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch"),
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning"),
]


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 6)
        self.norm = nn.LayerNorm(6)

    def forward(self, z, x):
        return torch.tanh(0.5 * self.norm(self.linear(z) + x))


class Net(nn.Module):
    """An equilibrium between two layers."""

    def __init__(self, kind):
        super().__init__()
        self.encoder = nn.Linear(3, 6)
        self.equilibrium = (
            deq.nn.Equilibrium(Block(), tol=1e-6) if kind == "any" else deq.nn.EquilibriumLinear(6, 6, "tanh", tol=1e-6)
        )
        self.head = nn.Linear(6, 2)

    def forward(self, x):
        return self.head(self.equilibrium(torch.relu(self.encoder(x))))


@pytest.fixture(params=["any", "linear"])
def net(request):
    torch.manual_seed(0)
    return Net(request.param)


def gradients(net, z):
    return torch.autograd.grad(z.square().sum(), list(net.parameters()))


def test_compile(net):
    """fullgraph, with gradients, trained for two steps so that weights change between calls."""
    x = torch.randn(5, 3)
    twin = copy.deepcopy(net)
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        expected, z = twin(x), compiled(x)
        torch.testing.assert_close(z, expected, rtol=1e-5, atol=1e-6)
        for a, b in zip(gradients(net, z), gradients(twin, expected), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        with torch.no_grad():
            for p, q in zip(net.parameters(), twin.parameters(), strict=True):
                p.mul_(0.9)
                q.mul_(0.9)
            torch.testing.assert_close(compiled(x), twin(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_compile_for_any_number_of_samples(activation):
    """The second number is compiled for as one of any, which no result may be compared with, large or small."""
    layer = deq.nn.EquilibriumLinear(3, 64, activation)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for samples in (5, 9, 40000):
        x = torch.randn(samples, 3)
        expected, z = layer(x), compiled(x)
        torch.testing.assert_close(z, expected, rtol=1e-4, atol=1e-5)
        for a, b in zip(gradients(layer, z), gradients(layer, expected), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * samples)


def test_compile_of_several_states():
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, z, x, y):
            return torch.tanh(0.4 * self.linear(z[1]) + x), torch.sin(0.5 * z[0] + y)

    layer = deq.nn.Equilibrium(Pair(), init=lambda x, y: (torch.zeros_like(x), torch.zeros_like(y)), tol=1e-6)
    x, y = torch.randn(3, 4), torch.randn(3, 4, requires_grad=True)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, y), layer(x, y), rtol=1e-5, atol=1e-6)
    ours, theirs = (torch.autograd.grad(f(x, y)[0].sum(), (y, *layer.parameters())) for f in (compiled, layer))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_fixed_point_in_compiled_code():
    """A graph break, and with fullgraph an error that says what to use."""
    x = torch.randn(3, 4)
    run = lambda x: deq.fixed_point(lambda z: torch.tanh(0.5 * z + x), torch.zeros_like(x)).z + 1  # noqa: E731
    torch.testing.assert_close(torch.compile(run, backend="aot_eager")(x), run(x))
    torch.compiler.reset()
    with pytest.raises(Exception, match=r"deq\.nn\.Equilibrium"):
        torch.compile(run, fullgraph=True, backend="aot_eager")(x)


def test_torch_func_of_a_layer_in_a_graph():
    """The solution that the layer keeps would belong to a transform that is over."""
    layer, x = deq.nn.EquilibriumLinear(3, 6, "tanh"), torch.randn(4, 3)
    values = {name: 0.9 * value.detach() for name, value in layer.named_parameters()}
    loss = lambda values, x: torch.func.functional_call(layer, values, (x,)).square().sum()  # noqa: E731
    found = torch.compile(torch.func.grad(loss), fullgraph=True, backend="aot_eager")(values, x)
    assert layer.solution is None
    torch.testing.assert_close(found, torch.func.grad(loss)(values, x))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # torch 2.14 asks for it, and says nothing itself
def test_compiled_block():
    """What is inside of an equilibrium may be compiled by itself, gradients included."""
    block = Block()
    x = torch.randn(4, 6, requires_grad=True)
    ours, theirs = (
        torch.autograd.grad(deq.nn.Equilibrium(f, tol=1e-6)(x).sum(), (x, *block.parameters()))
        for f in (torch.compile(block, backend="aot_eager"), block)
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_export(net):
    x = torch.randn(5, 3)
    net.eval()
    program = torch.export.export(net, (x,))
    torch.testing.assert_close(program.module()(x), net(x), rtol=1e-5, atol=1e-6)
    other = torch.randn(5, 3)
    torch.testing.assert_close(program.module()(other), net(other), rtol=1e-5, atol=1e-6)


def test_autocast(net):
    """The rest of the net runs in bfloat16, the solve to its own tolerance."""
    x = torch.randn(5, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z = net(x)
        assert z.dtype == torch.bfloat16
        grads = gradients(net, z.float())
    assert net.equilibrium.solution.converged.all() and net.equilibrium.solution.residual.max() <= 1e-6
    for a, b in zip(grads, gradients(net, net(x)), strict=True):
        torch.testing.assert_close(a, b, rtol=0.05, atol=0.05 * float(b.abs().max()))


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("backward", ["implicit", "one_step", "phantom", "unrolled"])
def test_autocast_rounds_nothing_of_a_solve(backend, backward):
    W, c, g = gaussian(32, 5)
    W = W.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z = deq.solve(W, c, "tanh", backend=backend, backward=backward).z
    expected = deq.solve(W, c, "tanh", backend=backend, backward=backward).z
    torch.testing.assert_close(z, expected)
    torch.testing.assert_close(torch.autograd.grad(z, W, g), torch.autograd.grad(expected, W, g))


def solution(W, c):
    return deq.solve(W, c, "tanh", backward="one_step").z


def tangent(W, c):
    return jvp(lambda W, c: deq.solve(W, c, "tanh").z, (W, c), (W.flip(0), c.flip(0)))[1]


def gradients_inside(W, c):
    return grad(lambda W, c: deq.solve(W, c, "tanh").z.square().sum(), (0, 1))(W, c)


@pytest.mark.parametrize(("f", "compiled"), [(solution, True), (tangent, False), (gradients_inside, True)])
def test_autocast_around_graphs_and_transforms(f, compiled):
    W, c, _ = gaussian(32, 5)
    W = W.requires_grad_(f is solution)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        given = (torch.compile(f, fullgraph=True, backend="aot_eager") if compiled else f)(W, c)
    torch.testing.assert_close(given, f(W, c), rtol=1e-5, atol=1e-6)


def test_autocast_around_any_function():
    W, c, _ = gaussian(8, 3)
    seen = []

    def f(z):
        y = torch.tanh(z @ W.mT + c)
        seen.append((z @ W.mT).dtype)
        return y

    W = W.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z = deq.fixed_point(f, torch.zeros_like(c), on_failure="raise").z
        torch.autograd.grad(z.sum(), W)
    assert set(seen) == {torch.float32}


def with_options(**options):
    return lambda f, c: deq.fixed_point(f, torch.zeros_like(c), tol=1e-2, **options).z


def with_torchdeq(is_training, **options):
    model = get_deq(f_tol=1e-6, f_solver="anderson", **options).train(is_training)
    return lambda f, c: model(f, torch.zeros_like(c))[0][-1]


@pytest.mark.parametrize(
    "solve",
    [
        with_options(),
        with_options(solver="newton_krylov"),
        with_options(backward="phantom"),
        with_torchdeq(True, ift=True),
        with_torchdeq(True, grad=3),
        with_torchdeq(False),
    ],
)
@pytest.mark.parametrize("own", [False, True])
def test_autocast_changes_nothing_of_a_function(solve, own):
    """Neither its values, gradients and tangents nor, where it has an autocast of its own, what that has cached."""
    W, c, _ = gaussian(8, 3)
    W = W.requires_grad_()

    def f(z, c=c):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=own):
            y = z @ W.mT
        return torch.tanh(y.float() + c)

    def run():
        with torch.no_grad():
            solve(f, c)
        z = solve(f, c)
        return z, jvp(lambda c: solve(lambda z: f(z, c), c), (c,), (c,))[1]

    expected = run()
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            found = run()
        assert all(map(torch.equal, found, expected))
        assert torch.equal(*(torch.autograd.grad(z.sum(), W, retain_graph=True)[0] for z, _ in (found, expected)))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint(net, use_reentrant):
    x = torch.randn(5, 3, requires_grad=True)
    expected = torch.autograd.grad(net(x).square().sum(), x)[0]
    parameters = gradients(net, net(x))
    z = checkpoint(net, x, use_reentrant=use_reentrant)
    z.square().sum().backward()
    torch.testing.assert_close(x.grad, expected)
    for p, g in zip(net.parameters(), parameters, strict=True):
        torch.testing.assert_close(p.grad, g, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["dense", "lower", "low rank"])
@pytest.mark.parametrize("create_graph", [False, True])
def test_a_backward_pass_inside_autocast_keeps_its_precision(kind, create_graph):
    torch.manual_seed(0)
    parts = {"dense": 1, "lower": 1, "low rank": 3}[kind]
    W = [torch.rand(32) * 0.5, *(torch.randn(2, 32, 3) * 0.1)] if parts == 3 else [torch.randn(32, 32) * 0.1]
    make = {"dense": lambda W: W, "lower": deq.weights.LowerTriangular, "low rank": deq.weights.DiagonalLowRank}[kind]
    leaves, c = [t.requires_grad_() for t in W], torch.randn(80, 32, requires_grad=True)
    z = deq.solve(make(*leaves), c, "gelu", solver="auto" if kind == "dense" else "direct").z
    outside = torch.autograd.grad(z.square().sum(), (*leaves, c), create_graph=create_graph, retain_graph=True)
    loss = z.square().sum()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = torch.autograd.grad(loss, (*leaves, c), create_graph=create_graph)
    for a, b in zip(inside, outside, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("needed", [False, True])
def test_checkpoint_of_a_layer_alone(needed):
    """Its inputs and parameters come back as other objects than those that its block has."""
    torch.manual_seed(0)
    layer = deq.nn.Equilibrium(Block(), tol=1e-6)
    x = torch.randn(3, 6, requires_grad=needed)
    inputs = [*layer.parameters(), *([x] if needed else [])]
    expected = torch.autograd.grad(layer(x).sum(), inputs)
    checkpoint(layer, x, use_reentrant=False).sum().backward()
    torch.testing.assert_close([t.grad for t in inputs], list(expected), rtol=1e-5, atol=1e-6)
