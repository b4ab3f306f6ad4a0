"""What PyTorch does to functions, done to equilibria: torch.func, forward mode, vmap, nested solves."""

from functools import partial

import pytest
import torch
from close import close
from problems import gaussian
from torch import nn
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

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
@pytest.mark.parametrize("modes", [(jacfwd, jacfwd), (jacfwd, jacfwd, jacrev), (jacrev, jacfwd, jacfwd), (jacfwd,) * 3])
def test_forward_mode_inside_of_forward_mode(solve, modes, problem):
    _, c, _ = problem
    W = 0.5 * c[:, :3]

    def derivative(f):
        g = lambda W: f(W, c[:2, :3]).square().sum()  # noqa: E731
        for mode in modes:
            g = mode(g)
        return g(W)

    close(derivative(solve), derivative(unrolled))


@pytest.mark.parametrize("activation", ["tanh", "gelu"])
@pytest.mark.parametrize("modes", [(jacfwd,), (jacfwd, jacfwd), (jacfwd, jacrev), (jacrev, jacfwd)])
@pytest.mark.parametrize("kind", ["dense", "diagonal_low_rank", "lower_triangular"])
def test_forward_mode_inside_of_graphs(kind, modes, activation, problem):
    torch.compiler.reset()
    W, c, _ = problem
    make = {
        "dense": lambda W: W,
        "diagonal_low_rank": lambda W: deq.weights.DiagonalLowRank(W[0], W[:, :2], W[:, 2:4]),
        "lower_triangular": deq.weights.LowerTriangular,
    }[kind]

    def derivatives(W, c):
        for first in (0, 1):  # of W and c in turns: torch.compile of torch 2.12 takes no jacfwd in both
            f = lambda W, c: deq.solve(make(W), c, activation, tol=1e-13).z[0].square().sum()  # noqa: E731
            for k, mode in enumerate(modes):
                f = mode(f, (first + k) % 2)
            yield f(W, c)

    compiled = torch.compile(lambda W, c: tuple(derivatives(W, c)), fullgraph=True, backend="aot_eager")
    close(compiled(W, c), tuple(derivatives(W, c)))


@pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node:UserWarning")
@pytest.mark.parametrize("backward", ["implicit", "one_step"])
@pytest.mark.parametrize("kind", ["dense", "diagonal_low_rank"])
def test_linearize(kind, backward, problem):
    """It writes the tangent's operators into a graph, that of make_fx."""
    W, c, g = problem
    low_rank = lambda W: deq.weights.DiagonalLowRank(W[0], W[:, :2], W[:, 2:4])  # noqa: E731

    def f(W, c):
        return deq.solve(low_rank(W) if kind != "dense" else W, c, "gelu", tol=1e-13, backward=backward).z

    z, along = torch.func.linearize(f, W, c)
    expected = jvp(f, (W, c), (W.T, g))
    close((z, along(W.T, g)), expected)


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


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(("dim", "stack"), [(0, ()), (1, ()), (-1, ()), (0, (2,)), (1, (2,)), (-1, (2,))])
def test_vmap_over_any_dimension_of_weights(dim, stack, compiled):
    """The batch may be as long as the weight is wide, and then looks like one."""
    torch.compiler.reset()
    generator = torch.Generator().manual_seed(0)
    weights = [0.2 * torch.randn(*stack, 5, 5, dtype=torch.float64, generator=generator) for _ in range(5)]
    c = torch.randn(5, *stack, 3, 5, dtype=torch.float64, generator=generator)
    f = vmap(linear, (dim, 0))
    z = (torch.compile(f, fullgraph=True, backend="aot_eager") if compiled else f)(torch.stack(weights, dim), c)
    close(z, torch.stack([linear(W, c) for W, c in zip(weights, c, strict=True)]))


@pytest.mark.parametrize("backward", ["implicit", "one_step"])
@pytest.mark.parametrize("name", ["W", "c", "z0"])
def test_vmap_refuses_what_is_not_finite(name, backward, problem):
    given = dict(zip(("W", "c", "z0"), problem, strict=True))
    given[name] = given[name].clone()
    given[name][1, 2] = float("nan")
    with pytest.raises(ValueError, match=rf"^{name} must be finite; {name}\[1"):
        vmap(lambda c, z0: deq.solve(given["W"], c, z0=z0, backward=backward, on_failure="ignore").z)(
            given["c"], given["z0"]
        )
    weights = torch.stack((problem[0], given["W"]))
    with pytest.raises(ValueError, match=rf"^{name} must be finite; {name}\[\d, \d"):
        vmap(lambda W: deq.solve(W, given["c"], z0=given["z0"], backward=backward, on_failure="ignore").z)(weights)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(("samples", "stack"), [((0,), ()), ((2, 0), (2,)), ((0, 4), (0,))])
@pytest.mark.parametrize("of_weight", [None, 0])
def test_vmap_of_no_samples(samples, stack, of_weight, compiled):
    torch.compiler.reset()
    W, c = torch.zeros(*stack, 5, 5), torch.zeros(3, *samples, 5)

    def solve(W, c):
        solution = deq.solve(W, c)
        return solution.z, solution.iterations, solution.residual, solution.status

    f = vmap(solve, (of_weight, 0))
    given = (W if of_weight is None else W.expand(3, *W.shape)), c
    z, *said = (torch.compile(f, fullgraph=True, backend="aot_eager") if compiled else f)(*given)
    assert z.shape == c.shape and all(t.shape == (3, *samples) for t in said)


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
        nested = [holder]
        f = {
            "closure": lambda z: self.cell(z, x),
            "method": partial(self.cell, x=x),
            "behind": lambda z: step(z),
            "list": lambda z: holder[0].cell(z, x),
            "nested": lambda z: nested[0][0].cell(z, x),
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


@pytest.mark.parametrize("kind", ["closure", "method", "behind", "list", "layer"])
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
    model, values, x = exchanged("nested")
    run = lambda values: torch.func.functional_call(model, values, (x,)).sum()  # noqa: E731
    with pytest.raises(RuntimeError, match="functional_call"):
        grad(run)(values)
    leaves = {name: t.requires_grad_() for name, t in values.items()}
    for frozen in (False, True):
        model.requires_grad_(not frozen)
        for twice in (False, True):
            with pytest.raises(RuntimeError, match="functional_call"):
                torch.autograd.grad(run(leaves), list(leaves.values()), create_graph=twice)


def test_a_parametrised_weight_that_cannot_be_given_back_is_refused():
    """A solve computes it once: its other evaluations do not use what it is made of."""
    model, _, x = exchanged("nested")
    nn.utils.parametrizations.weight_norm(model.linear)
    name = "linear.parametrizations.weight.original1"
    W = 0.7 * model.get_parameter(name).detach()
    with pytest.raises(RuntimeError, match="functional_call"):
        grad(lambda W: torch.func.functional_call(model, {name: W}, (x,)).sum())(W)


@pytest.mark.parametrize("solver", ["anderson", "newton_krylov"])
def test_parametrised_weights_under_transforms(solver):
    """Computed once in a solve, but for one that belongs to a gradient: of that the next evaluation knows nothing."""
    torch.manual_seed(0)
    block = deq.nn.normalise(Normed(nn.Linear(4, 4, dtype=torch.float64)))
    layer = deq.nn.Equilibrium(block, tol=1e-13, solver=solver)
    values = {name: 0.7 * parameter.detach() for name, parameter in layer.named_parameters()}
    x = torch.randn(2, 3, 4, dtype=torch.float64)

    def ours(values, x):
        return torch.func.functional_call(layer, values, (x,)).square().sum()

    def unrolled(values, x):
        z, values = torch.zeros_like(x), {name.removeprefix("block."): value for name, value in values.items()}
        for _ in range(60):
            z = torch.func.functional_call(layer.block, values, (z, x))
        return z.square().sum()

    many = {name: torch.stack((value, -value)) for name, value in values.items()}
    close(vmap(ours)(many, x), vmap(unrolled)(many, x))
    leaves = lambda f: list(vmap(grad(f), (None, 0))(values, x).values())  # noqa: E731
    close(leaves(ours), leaves(unrolled))
    leaves = lambda f: list(vmap(grad(f))(many, x).values())  # noqa: E731
    close(leaves(ours), leaves(unrolled))
    close(hessian(ours, 1)(values, x[0]), hessian(unrolled, 1)(values, x[0]))


class Normed(nn.Module):
    def __init__(self, linear):
        super().__init__()
        self.linear = linear

    def forward(self, z, x):
        return torch.tanh(0.5 * self.linear(z) + x)


def test_integers_and_masks_of_every_sample():
    """Transforms exchange them as any tensor that belongs to one, and differentiate the others."""
    torch.manual_seed(0)
    W = 0.2 * torch.randn(3, 3, dtype=torch.float64)
    x = torch.randn(4, 2, 3, dtype=torch.float64)
    index, mask = torch.stack([torch.randperm(3) for _ in range(4)]), torch.rand(4, 3) > 0.5

    def loss(solve, W, x, index, mask):
        f = lambda z: torch.tanh(torch.where(mask, z[:, index], z) @ W + x)  # noqa: E731
        return solve(f, torch.zeros_like(x)).square().sum()

    def unrolled(f, z):
        for _ in range(60):
            z = f(z)
        return z

    ours = partial(loss, lambda f, z: deq.fixed_point(f, z, tol=1e-13).z)
    for transform in (grad, hessian):
        of_each = lambda f: vmap(transform(f), (None, 0, 0, 0))(W, x, index, mask)  # noqa: B023, E731
        close(of_each(ours), of_each(partial(loss, unrolled)))
    leaf = W.clone().requires_grad_()
    f = lambda z: torch.tanh(z[:, index[0]] @ leaf + x[0])  # noqa: E731
    found = [
        torch.autograd.grad(deq.fixed_point(f, x[0], tol=1e-13, tensors=tensors).z.sum(), leaf, create_graph=True)[0]
        for tensors in ([leaf], [leaf, index])
    ]
    close(*found)


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
