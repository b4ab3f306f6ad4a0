"""What PyTorch does to functions, done to equilibria: torch.func, forward mode, compile, export, autocast and more."""

import copy
from functools import partial

import pytest
import torch
from problems import gaussian
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.utils.checkpoint import checkpoint

import deq
from deq.torchdeq import get_deq

pytestmark = [
    pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`:UserWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch"),
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning"),
]


def any_function(W, c):
    return deq.fixed_point(lambda z: torch.tanh(z @ W.mT + c), torch.zeros_like(c), tol=1e-13).z


def linear(W, c):
    return deq.solve(W, c, "tanh", tol=1e-13).z


SOLVES = pytest.mark.parametrize("solve", [any_function, linear])


@pytest.fixture
def problem():
    W, c, g = gaussian(5, 3, torch.float64, scale=0.4)
    return W, c, g


def unrolled(W, c):
    z = torch.zeros_like(c)
    for _ in range(80):
        z = torch.tanh(z @ W.mT + c)
    return z


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-8, atol=1e-10)


@SOLVES
def test_grad_vjp_jvp(solve, problem):
    W, c, g = problem
    loss = lambda f: lambda W, c: (f(W, c) * g).sum()  # noqa: E731
    close(grad(loss(solve), (0, 1))(W, c), grad(loss(unrolled), (0, 1))(W, c))
    close(vjp(solve, W, c)[1](g), vjp(unrolled, W, c)[1](g))
    close(jvp(solve, (W, c), (c.T @ c, g)), jvp(unrolled, (W, c), (c.T @ c, g)))


@SOLVES
def test_jacobians_and_hessians(solve, problem):
    W, c, _ = problem
    close(jacrev(solve, 0)(W, c), jacrev(unrolled, 0)(W, c))
    close(jacfwd(solve, 1)(W, c), jacfwd(unrolled, 1)(W, c))
    total = lambda f: lambda c: f(W, c[None]).square().sum()  # noqa: E731
    close(hessian(total(solve))(c[0]), hessian(total(unrolled))(c[0]))


@SOLVES
def test_vmap(solve, problem):
    """Over samples, over weights, of gradients, and nested."""
    W, c, g = problem
    one = solve  # a state of one dimension is one sample
    close(vmap(one, (None, 0))(W, c), unrolled(W, c))
    weights = torch.stack((W, 0.5 * W, -W))
    close(vmap(one, (0, None))(weights, c), torch.stack([unrolled(w, c) for w in weights]))
    close(vmap(vmap(one, (None, 0)), (0, None))(weights, c), torch.stack([unrolled(w, c) for w in weights]))
    each = vmap(grad(lambda W, c, g: (one(W, c) * g).sum()), (None, 0, 0))(W, c, g)
    close(each, torch.stack([grad(lambda W, i=i: (unrolled(W, c[i : i + 1]) * g[i]).sum())(W) for i in range(3)]))
    close(grad(lambda W: vmap(one, (None, 0))(W, c).sum())(W), grad(lambda W: unrolled(W, c).sum())(W))


@pytest.mark.parametrize("kind", ["tuple", "parameters"])
def test_transforms_of_modules_and_tuples(kind):
    torch.manual_seed(0)
    layer = nn.Linear(4, 4, dtype=torch.float64)
    x = torch.randn(3, 4, dtype=torch.float64)

    def run(parameters, solve):
        f = lambda a: torch.tanh(0.4 * torch.func.functional_call(layer, parameters, (a,)) + x)  # noqa: E731
        if kind == "parameters":
            return solve(f, torch.zeros_like(x))
        return solve(lambda z: (f(z[1]), 0.5 * f(z[0])), (torch.zeros_like(x), torch.zeros_like(x)))[0]

    def iterate(f, z):
        for _ in range(120):
            z = f(z)
        return z

    parameters = dict(layer.named_parameters())
    ours = jacrev(run)(parameters, lambda f, z: deq.fixed_point(f, z, tol=1e-13).z)
    close(ours, jacrev(run)(parameters, iterate))


class Holding(nn.Module):
    """``z = tanh(0.3 linear(z) + x)`` in a forward of its own, where f holds the module as ``kind`` says."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.linear = nn.Linear(4, 4, dtype=torch.float64)
        self.register_buffer("gain", torch.tensor(0.3, dtype=torch.float64))

    def cell(self, z, x):
        return torch.tanh(self.gain * self.linear(z) + x)

    def forward(self, x):
        def step(z):
            return self.cell(z, x)

        holder = [self]
        f = {
            "closure": lambda z: self.cell(z, x),
            "method": partial(self.cell, x=x),
            "behind": lambda z: step(z),
            "list": lambda z: holder[0].cell(z, x),
        }
        return deq.fixed_point(f[self.kind], torch.zeros_like(x), tol=1e-13).z


def exchanged(kind):
    """A model for functional_call, its parameters and buffers, other than its own, and inputs."""
    torch.manual_seed(0)
    model = Holding(kind) if kind != "layer" else deq.nn.Equilibrium(nn.Module(), tol=1e-13)
    if kind == "layer":
        model.block = Holding(kind)
        model.block.forward = model.block.cell
    values = {name: 0.7 * t.detach() for name, t in (*model.named_parameters(), *model.named_buffers())}
    return model, values, torch.randn(3, 4, dtype=torch.float64)


@pytest.mark.parametrize("kind", ["closure", "method", "behind", "layer"])
def test_functional_call_of_a_model(kind):
    """It exchanges parameters for the call alone: the backward pass has them as well."""
    model, values, x = exchanged(kind)
    name = next(iter(name for name in values if name.endswith("weight")))
    constants = {key: t for key, t in values.items() if key != name}

    def ours(W, x=x):
        return torch.func.functional_call(model, {**constants, name: W}, (x,))

    def unrolled(W, x=x):
        gain, bias = (next(t for key, t in values.items() if key.endswith(end)) for end in ("gain", "bias"))
        z = torch.zeros_like(x)
        for _ in range(80):
            z = torch.tanh(gain * (z @ W.mT + bias) + x)
        return z

    W = values[name]
    close(jacrev(ours)(W), jacrev(unrolled)(W))
    total = lambda f: lambda W, x: f(W, x[None]).square().sum()  # noqa: E731
    close(vmap(grad(total(ours)), (None, 0))(W, x), vmap(grad(total(unrolled)), (None, 0))(W, x))
    close(hessian(total(ours))(W, x[0]), hessian(total(unrolled))(W, x[0]))
    weights = torch.stack((W, -W))
    close(vmap(ours)(weights), torch.stack([unrolled(w) for w in weights]))
    leaf = W.clone().requires_grad_()
    close(torch.autograd.grad(ours(leaf).sum(), leaf), torch.autograd.grad(unrolled(leaf).sum(), leaf))


def test_parameters_that_cannot_be_given_back_are_refused():
    """Where f reaches the module by ways that are not known: an error, and never a gradient of zero."""
    model, values, x = exchanged("list")
    run = lambda values: torch.func.functional_call(model, values, (x,)).sum()  # noqa: E731
    with pytest.raises(RuntimeError, match="functional_call"):
        grad(run)(values)
    leaves = {name: t.requires_grad_() for name, t in values.items()}
    for frozen in (False, True):
        model.requires_grad_(not frozen)
        for twice in (False, True):
            with pytest.raises(RuntimeError, match="functional_call"):
                torch.autograd.grad(run(leaves), list(leaves.values()), create_graph=twice)


def test_the_start_has_no_gradient():
    """Also where f closes over nothing at all."""
    z = torch.ones(2, 3, dtype=torch.float64)
    assert not grad(lambda z: deq.fixed_point(torch.cos, z).z.sum())(z).any()


@SOLVES
def test_forward_mode(solve, problem):
    W, c, g = problem
    with forward_ad.dual_level():
        z = solve(forward_ad.make_dual(W, W.T.contiguous()), forward_ad.make_dual(c, g))
        tangent = forward_ad.unpack_dual(z).tangent
    close(tangent, jvp(unrolled, (W, c), (W.T.contiguous(), g))[1])


@SOLVES
def test_gradcheck(solve, problem):
    W, c, _ = problem
    W, c = W.requires_grad_(), c.requires_grad_()
    assert torch.autograd.gradcheck(solve, (W, c), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(solve, (W, c))


@pytest.mark.parametrize("solver", ["broyden", "newton_krylov"])
def test_gradgradcheck_of_other_solvers(solver, problem):
    W, c, _ = problem
    W, c = W.requires_grad_(), c[:1].requires_grad_()

    def run(W, c):
        f = lambda z: torch.tanh(z @ W.mT + c)  # noqa: E731
        return deq.fixed_point(f, torch.zeros_like(c), tol=1e-13, solver=solver).z

    assert torch.autograd.gradcheck(run, (W, c)) and torch.autograd.gradgradcheck(run, (W, c))


def inexact(backward):
    options = {"backward": backward, "backward_steps": 3, "tol": 1e-12, "solver": "plain"}
    return lambda W, c: deq.fixed_point(lambda z: torch.tanh(z @ W.mT + c), torch.zeros_like(c), **options).z


def torchdeq(ift):
    model = get_deq(ift=ift, f_tol=1e-13, b_tol=1e-13, f_max_iter=200, b_max_iter=200, grad=3, tau=0.5)
    return lambda W, c: model(lambda z: torch.tanh(z @ W.mT + c), torch.zeros_like(c))[0][-1]


INEXACT = {name: inexact(name) for name in ("one_step", "phantom", "unrolled")} | {"torchdeq": torchdeq(False)}


@pytest.mark.parametrize("name", INEXACT)
def test_inexact_gradients(name, problem):
    """Under a transform as by autograd: what is not differentiated there is constant here."""
    W, c, g = problem
    solve = INEXACT[name]
    leaves = [t.clone().requires_grad_() for t in (W, c)]
    expected = torch.autograd.grad((solve(*leaves) * g).sum(), leaves, create_graph=True)
    loss = lambda W, c: (solve(W, c) * g).sum()  # noqa: E731
    close(grad(loss, (0, 1))(W, c), expected)
    directions = c.T @ c, g
    along = sum((a * b).sum() for a, b in zip(expected, directions, strict=True))
    close(jvp(loss, (W, c), directions)[1], along)
    with forward_ad.dual_level():
        dual = loss(*(forward_ad.make_dual(a, b) for a, b in zip((W, c), directions, strict=True)))
        close(forward_ad.unpack_dual(dual).tangent, along)
    each = vmap(grad(lambda W, c, g: (solve(W, c) * g).sum(), 1), (None, 0, 0))(W, c, g)
    close(each, expected[1])
    twice = torch.autograd.grad(sum(part.square().sum() for part in expected), leaves)
    squares = lambda W, c: sum(part.square().sum() for part in grad(loss, (0, 1))(W, c))  # noqa: E731
    close(grad(squares, (0, 1))(W, c), twice)


def test_exact_gradients_of_torchdeq(problem):
    W, c, g = problem
    solve = torchdeq(True)
    loss = lambda f: lambda W, c: (f(W, c) * g).sum()  # noqa: E731
    close(grad(loss(solve), (0, 1))(W, c), grad(loss(unrolled), (0, 1))(W, c))
    close(jvp(solve, (W, c), (c.T @ c, g)), jvp(unrolled, (W, c), (c.T @ c, g)))
    close(vmap(solve, (None, 0))(W, c), unrolled(W, c))
    total = lambda f: lambda c: f(W, c[None]).square().sum()  # noqa: E731
    close(hessian(total(solve))(c[0]), hessian(total(unrolled))(c[0]))
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(solve(W, forward_ad.make_dual(c, g))).tangent
    close(tangent, jvp(unrolled, (W, c), (torch.zeros_like(W), g))[1])


@SOLVES
def test_reverse_mode_of_reverse_mode(solve, problem):
    W, c, g = problem

    def pulled(f):
        return lambda c: vjp(lambda c: f(W, c), c)[1](g)[0]

    def pushed(f):
        _, pull = vjp(lambda c: f(W, c), c)
        return vjp(lambda u: pull(u)[0], torch.zeros_like(c))[1](g)[0]

    close(vjp(pulled(solve), c)[1](g), vjp(pulled(unrolled), c)[1](g))
    close(jvp(pulled(solve), (c,), (g,)), jvp(pulled(unrolled), (c,), (g,)))
    close(pushed(solve), pushed(unrolled))


@pytest.mark.parametrize("solver", ["anderson", "newton_krylov"])
def test_an_equilibrium_inside_of_another(solver, problem):
    W, c, _ = problem

    def nested(W, solve):
        inner = lambda v: solve(lambda y: torch.tanh(0.3 * y + v), torch.zeros_like(c))  # noqa: E731
        return solve(lambda z: torch.tanh(0.4 * inner(0.3 * z @ W) + c), torch.zeros_like(c))

    def iterate(f, z):
        for _ in range(60):
            z = f(z)
        return z

    ours = lambda W: nested(W, lambda f, z: deq.fixed_point(f, z, solver=solver, tol=1e-13).z)  # noqa: E731
    close(ours(W), nested(W, iterate))
    expected = grad(lambda W: nested(W, iterate).sum())(W)
    close(grad(lambda W: ours(W).sum())(W), expected)
    leaf = W.clone().requires_grad_()
    close(torch.autograd.grad(ours(leaf).sum(), leaf)[0], expected)


def test_a_start_that_alone_belongs_to_a_transform():
    starts = torch.linspace(0.1, 0.9, 6, dtype=torch.float64).view(3, 2)
    z = vmap(lambda z0: deq.fixed_point(torch.cos, z0, tol=1e-13).z)(starts)
    close(z, torch.full_like(starts, 0.7390851332151607))
    assert not grad(lambda z0: deq.fixed_point(torch.cos, z0).z.sum())(starts).any()


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


def without_numbers(W, c, **options):
    leaves = [t.requires_grad_() for t in (W, c)]
    solution = deq.solve(W, c, "gelu", **options)
    assert solution.z.shape == c.shape and solution.z.dtype == c.dtype and solution.z.device == c.device
    assert solution.status.shape == solution.residual.shape == solution.iterations.shape == c.shape[:-1]
    for leaf, found in zip(leaves, torch.autograd.grad(solution.z.sum(), leaves), strict=True):
        assert found.shape == leaf.shape and found.dtype == leaf.dtype and found.device == leaf.device


@pytest.mark.parametrize("backward", ["implicit", "one_step", "phantom"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_shapes_without_numbers(dtype, backward):
    for batch in ((), (3,), (2, 0), (2, 5)):
        W, c = (torch.empty(*shape, 4, dtype=dtype, device="meta") for shape in ((4,), batch))
        without_numbers(W, c, backward=backward)
        with FakeTensorMode():
            without_numbers(torch.empty(4, 4, dtype=dtype), torch.empty(*batch, 4, dtype=dtype), backward=backward)


def test_structured_weights_without_numbers():
    W, c = (torch.empty(*shape, device="meta", requires_grad=True) for shape in ((6, 6), (5, 6)))
    kinds = deq.weights
    for weight in (
        kinds.LowerTriangular(W),
        kinds.Diagonal(W[0]),
        kinds.DiagonalLowRank(W[0], W[:, :2], W[:, 2:4]),
        kinds.monotone(W[:2], W),
    ):
        for backward in ("implicit", "one_step"):
            solution = deq.solve(weight, c, "tanh", backward=backward)
            assert solution.z.shape == c.shape and solution.z.is_meta
            assert all(
                g.shape == t.shape
                for g, t in zip(torch.autograd.grad(solution.z.sum(), (W, c), retain_graph=True), (W, c), strict=True)
            )
    with pytest.raises(ValueError, match="solver must be one of"):
        deq.solve(W, c, solver="guess")
    with pytest.raises(ValueError, match="c must be on the device of W, meta; got cpu"):
        deq.solve(W, torch.ones(5, 6))


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
