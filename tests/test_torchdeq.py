"""Programs written for torchdeq 0.1.0 run on deq.torchdeq by changing the import; where it is wrong, ours is right."""

import argparse
import copy
import importlib
import math
import pickle
import warnings
from importlib.util import find_spec

import pytest
import torch
from problems import contraction
from torch import nn
from torch.nn import functional as F

import deq
import deq.torchdeq as ours

needs_torchdeq = pytest.mark.skipif(find_spec("torchdeq") is None, reason="torchdeq is not installed (bench extra)")


def library(name: str):
    return importlib.import_module({"ours": "deq.torchdeq", "theirs": "torchdeq"}[name])


# ---- programs, each taking the library as its import would ----------------------------------------------------------


def quick_start(lib, command="--ift --f_solver fixed_point_iter --f_tol 1e-6 --f_stop_mode rel --b_tol 1e-8"):
    """The README's quick start: argparse, three coupled tensors, states to be used as any tensors."""
    torch.manual_seed(0)
    parser = argparse.ArgumentParser()
    parser.add_argument("--lr", type=float, default=0.1)
    lib.add_deq_args(parser)
    args = parser.parse_args(command.split())
    model = lib.get_deq(args)
    layers = nn.ModuleList(nn.Linear(6, 6, dtype=torch.float64) for _ in range(3))
    x = torch.randn(5, 6, dtype=torch.float64)

    def fn(a, b, c):
        return torch.tanh(0.4 * layers[0](b) + x), torch.tanh(0.4 * layers[1](c)), torch.tanh(0.4 * layers[2](a) - x)

    zeros = torch.zeros(5, 6, dtype=torch.float64)
    states, info = model(fn, (zeros, zeros, zeros))
    loss = sum(part.square().sum() for part in states[-1])
    loss.backward()
    return loss, [p.grad for p in layers.parameters()], info


class SineLayer(nn.Module):
    def __init__(self, inputs, outputs, omega):
        super().__init__()
        self.omega = omega
        self.linear = nn.Linear(inputs, outputs, dtype=torch.float64)
        nn.init.uniform_(self.linear.weight, -1 / inputs, 1 / inputs)

    def forward(self, x):
        return torch.sin(self.omega * self.linear(x))


def implicit_representation(lib, steps=4):
    """A DEQ-INR: a sine network over coordinates, fitted to a signal with the implicit gradient."""
    torch.manual_seed(1)
    inject, inner = SineLayer(1, 16, 8.0), SineLayer(16, 16, 0.6)
    head = nn.Linear(16, 1, dtype=torch.float64)
    model = lib.get_deq(
        f_solver="anderson", f_max_iter=30, f_tol=1e-7, b_max_iter=30, b_tol=1e-7, ift=True, core="indexing"
    )
    parameters = [*inject.parameters(), *inner.parameters(), *head.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=0.05)
    x = torch.linspace(-1, 1, 40, dtype=torch.float64).unsqueeze(1)
    y = torch.cos(3 * x)
    losses = []
    for _ in range(steps):
        u = inject(x)
        states, info = model(lambda z, u=u: inner(z) * 0.5 + u, torch.zeros_like(u))
        loss = F.mse_loss(head(states[-1]), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses), [p.detach() for p in parameters], info


def two_tensors(lib):
    """A multiscale pair of feature maps of different resolutions."""
    torch.manual_seed(2)
    fine, coarse = nn.Conv2d(3, 3, 3, padding=1).double(), nn.Conv2d(4, 4, 3, padding=1).double()
    up, down = nn.Conv2d(4, 3, 1).double(), nn.Conv2d(3, 4, 1).double()
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)

    def f(a, b):
        wide = F.interpolate(up(b), scale_factor=2.0)
        return torch.tanh(0.3 * (fine(a) + wide) + x), torch.tanh(0.3 * (coarse(b) + down(F.avg_pool2d(a, 2))))

    model = lib.get_deq(ift=True, f_solver="broyden", f_max_iter=40, f_tol=1e-9, f_stop_mode="rel", b_tol=1e-9)
    states, info = model(f, [torch.zeros_like(x), torch.zeros(2, 4, 4, 4, dtype=torch.float64)])
    a, b = states[-1]
    loss = a.sum() + b.square().sum()
    loss.backward()
    return loss, [p.grad for m in (fine, coarse, up, down) for p in m.parameters()], info


def weight_norm_and_phantom(lib):
    """Weight norm, phantom gradients, a correction loss over sampled states, Jacobian regularisation."""
    torch.manual_seed(3)
    f = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh()).double()
    lib.apply_norm(f, "weight_norm", filter_out=["2"])
    model = lib.get_deq(f_max_iter=60, f_tol=1e-12, n_states=2, core="sliced", grad=[2, 4], tau=0.7)
    x = torch.randn(6, 8, dtype=torch.float64)
    y = torch.randn(6, 8, dtype=torch.float64)
    lib.reset_norm(f)
    states, info = model(lambda z: f(0.5 * z) + x, torch.zeros_like(x))
    loss = lib.fp_correction(F.mse_loss, (states, y), gamma=0.9)
    point = states[-1].detach().requires_grad_()
    torch.manual_seed(4)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)  # theirs draws its probes in it
    loss = loss + 0.1 * lib.jac_reg(f(0.5 * point), point)
    torch.set_default_dtype(default)
    loss.backward()
    return loss, [p.grad for _, p in sorted(((p.shape, p.grad.norm()), p) for p in f.parameters())], info


PROGRAMS = (quick_start, implicit_representation, two_tensors, weight_norm_and_phantom)


@needs_torchdeq
@pytest.mark.parametrize("program", PROGRAMS)
def test_programs(program):
    """The same answers within the solvers' tolerances, in the shapes that the program reads."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch's, about torchdeq's use of it
        loss, grads, info = program(library("theirs"))
    our_loss, our_grads, our_info = program(library("ours"))
    torch.testing.assert_close(our_loss, loss, rtol=1e-5, atol=1e-7)
    assert len(our_grads) == len(grads)
    for a, b in zip(our_grads, grads, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-4, atol=2e-6)
    assert set(our_info) == set(info)
    for name in ("abs_lowest", "rel_lowest", "nstep"):
        assert our_info[name].shape == info[name].shape


@needs_torchdeq
@pytest.mark.parametrize("solver", ["fixed_point_iter", "anderson", "broyden", "simple_fixed_point_iter"])
def test_solver_functions(solver):
    W = torch.randn(7, 7, generator=torch.Generator().manual_seed(0)) * 0.15
    c = torch.randn(4, 7, generator=torch.Generator().manual_seed(1))

    def f(z, tau=1.0):
        return torch.lerp(z, torch.tanh(z @ W.T + c), tau)

    results = [
        library(n).get_solver(solver)(f, torch.zeros(4, 7), max_iter=30, tol=1e-5, indexing=[2, 4])
        for n in ("theirs", "ours")
    ]
    (z, states, info), (our_z, our_states, our_info) = results
    torch.testing.assert_close(our_z, z, rtol=1e-4, atol=2e-5)
    assert len(our_states) == 2 and our_states[0].shape == (4, 7)
    if solver in ("fixed_point_iter", "simple_fixed_point_iter"):
        for a, b in zip(our_states, states, strict=True):
            torch.testing.assert_close(a, b)
    assert our_info["abs_trace"].shape[0] == info["abs_trace"].shape[0] == 4
    assert (our_info["abs_lowest"] <= 2e-5).all()


def test_same_options_as_torchdeq():
    """Names, types and defaults of the command line."""
    parser = argparse.ArgumentParser()
    ours.add_deq_args(parser)
    mine = vars(parser.parse_args([]))
    assert mine["f_max_iter"] == 40 and mine["grad"] == [1] and mine["ift"] is False
    if find_spec("torchdeq") is not None:
        theirs = argparse.ArgumentParser()
        library("theirs").add_deq_args(theirs)
        assert vars(theirs.parse_args([])) == mine
        assert {a.dest: a.nargs for a in theirs._actions} == {a.dest: a.nargs for a in parser._actions}


@needs_torchdeq
def test_every_public_name():
    theirs = library("theirs")
    public = {name for name, value in vars(theirs).items() if not name.startswith("_") and callable(value)}
    assert public <= set(ours.__all__)
    for module, names in {
        "loss": ("fp_correction", "jac_reg", "power_method", "register_weight_func"),
        "norm": ("apply_norm", "reset_norm", "remove_norm"),
        "utils": ("mem_gc",),
        "solver": ("get_solver", "register_solver"),
        "core": ("get_deq", "DEQSliced", "DEQIndexing"),
    }.items():
        assert all(hasattr(importlib.import_module(f"deq.torchdeq.{module}"), name) for name in names)


# ---- where torchdeq is wrong ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_gradient_at_any_loss_scale(scale):
    """Default tolerances: theirs is absolute, so that a loss of 1e-6 gets the one-step gradient, 26 % off."""
    W, c = contraction()
    model = ours.get_deq(ift=True, f_max_iter=400, f_tol=1e-10, b_max_iter=400)
    z = model(lambda z: torch.tanh(z @ W.T + c), torch.zeros_like(c))[0][-1]
    gradient = torch.autograd.grad(scale * z.sum(), W)[0] / scale
    exact = torch.autograd.grad(deq.fixed_point(lambda z: torch.tanh(z @ W.T + c), torch.zeros_like(c)).z.sum(), W)[0]
    assert float((gradient - exact).norm() / exact.norm()) < 1e-5


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_scaled_problems(scale):
    """Anderson's regulariser is relative: the same steps for the same problem in other units."""
    W, c = contraction()
    solver = ours.get_solver("anderson")
    with torch.no_grad():
        info = solver(
            lambda z: torch.relu(z @ W.T + scale * c), torch.zeros_like(c), max_iter=60, tol=1e-6, stop_mode="rel"
        )[2]
        one = solver(lambda z: torch.relu(z @ W.T + c), torch.zeros_like(c), max_iter=60, tol=1e-6, stop_mode="rel")[2]
    assert (info["rel_lowest"] <= 1e-6).all()
    assert (info["nstep"] - one["nstep"]).abs().max() <= 1


def test_anderson_at_tight_tolerance():
    W, c = contraction(0.95)
    with torch.no_grad():
        steps = {
            name: ours.get_solver(name)(lambda z: z @ W.T + c, torch.zeros_like(c), max_iter=1000, tol=1e-10)[2][
                "nstep"
            ].max()
            for name in ("anderson", "fixed_point_iter")
        }
    assert steps["anderson"] < steps["fixed_point_iter"]


@pytest.mark.parametrize("max_iter", [1, 2])
def test_few_iterations(max_iter):
    """Theirs returns the start after two evaluations."""
    f = lambda z: 0.5 * z + 1  # noqa: E731
    z = ours.get_solver("anderson")(f, torch.zeros(3, 2), max_iter=max_iter)[0]
    assert torch.equal(z, torch.full((3, 2), (1.0, 1.5 if max_iter == 2 else 1.0)[max_iter - 1]))


def test_depth_one():
    W, c = contraction()
    with torch.no_grad():
        z, _, info = ours.get_solver("anderson")(
            lambda z: torch.tanh(z @ W.T + c), torch.zeros_like(c), m=1, max_iter=300
        )
    assert (info["abs_lowest"] < 1e-3).all() and torch.isfinite(z).all()


def test_nan_and_divergence_beside_good_samples():
    rate = torch.tensor([[0.5], [0.5], [3.0], [0.2]])

    def f(z):
        y = rate * z + 1
        return torch.where((torch.arange(4).unsqueeze(1) == 1) & (z > 0.9), torch.nan, y)

    for solver in ("fixed_point_iter", "anderson", "broyden", "newton_krylov"):
        z, _, info = ours.get_solver(solver)(f, torch.zeros(4, 3), max_iter=60, tol=1e-5)
        torch.testing.assert_close(z[[0, 3]], (1 / (1 - rate))[[0, 3]].expand(2, 3), rtol=1e-4, atol=1e-4)
        assert torch.isfinite(z).all() and not (info["abs_lowest"][[0, 3]] > 1e-5).any()


@pytest.mark.parametrize("solver", ["fixed_point_iter", "anderson", "broyden", "newton_krylov"])
def test_results_whose_memory_cannot_be_read(solver):
    run = ours.get_solver(solver)
    with pytest.raises(ValueError, match="f's result must be on the device of z0, cpu; got meta"):
        run(lambda z: (0.5 * z + 1).to("meta"), torch.zeros(4, 3))
    with pytest.raises(TypeError, match="f's result must be dense; got layout torch"):
        run(lambda z: (0.5 * z + 1).to_sparse(), torch.zeros(4, 3))


@pytest.mark.parametrize("options", [{}, {"grad": 3, "tau": 0.5}, {"ift": True}])
@pytest.mark.parametrize("several", [False, True])
def test_gradient_steps_leave_a_sample_where_it_was_finite(options, several):
    """From its best iterate one sample has no finite image: its mates get the gradients that they get without it."""
    c = torch.tensor([[4.0], [1.0], [3.0]], dtype=torch.float64).expand(3, 4).clone().requires_grad_()
    w = torch.full((3, 1), 1.5, dtype=torch.float64, requires_grad=True)
    good = [0, 2]

    def run(c, w):
        f = lambda z: torch.sqrt(c - w * z)  # noqa: E731
        zeros = torch.zeros_like(c)
        model = ours.get_deq(**options)
        if several:
            return model(lambda a, b: (f(b), f(a)), (zeros, zeros))[0][-1][0]
        return model(f, zeros)[0][-1]

    z, mates = run(c, w), run(c[good], w[good])
    assert torch.isfinite(z).all() and torch.equal(z[1], torch.ones(4, dtype=torch.float64))
    torch.testing.assert_close(z[good], mates, rtol=1e-3, atol=0)
    (dw,), (expected,) = (torch.autograd.grad(z.sum(), w) for z in (z, mates))
    torch.testing.assert_close(dw[good], expected[good], rtol=1e-2, atol=0)
    assert torch.isfinite(dw).all() or "ift" in options


def test_double_backward():
    w = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    model = ours.get_deq(ift=True, f_max_iter=400, f_tol=1e-13, b_tol=1e-13, b_max_iter=400)

    def value(w):
        return model(lambda z: torch.tanh(w * z + 0.5), torch.zeros(1, 1, dtype=torch.float64))[0][-1].sum()

    assert torch.autograd.gradcheck(value, w) and torch.autograd.gradgradcheck(value, w)


@pytest.mark.parametrize("core", ["indexing", "sliced"])
def test_trajectories(core):
    """As many states as were asked for, the last solved and with its exact gradient, even where it converges early."""
    W, c = contraction(0.5)
    model = ours.get_deq(core=core, n_states=4, f_max_iter=200, f_tol=1e-9, ift=True, b_tol=1e-9)
    states, _ = model(lambda z: torch.tanh(z @ W.T + c), torch.zeros_like(c))
    assert len(states) == 4 and all(state.requires_grad for state in states)
    exact = deq.fixed_point(lambda z: torch.tanh(z @ W.T + c), torch.zeros_like(c)).z
    torch.testing.assert_close(states[-1], exact, rtol=1e-8, atol=1e-9)
    if core == "indexing":
        torch.testing.assert_close(
            torch.autograd.grad(states[-1].sum(), W)[0], torch.autograd.grad(exact.sum(), W)[0], rtol=1e-6, atol=1e-8
        )
    wide = ours.get_deq(core="indexing", indexing=[1, 3], f_max_iter=50, f_tol=1e-9)
    states, _ = wide(lambda z: torch.tanh(z @ W.T + c), torch.zeros_like(c))
    one = torch.tanh(torch.tanh(c) @ W.T + c)  # one evaluation, then the gradient step
    torch.testing.assert_close(states[0], one)
    assert len(states) == 3
    places = ours.get_deq(grad=5, sup_loc=[2, 5])(lambda z: torch.tanh(z @ W.T + c), torch.zeros_like(c))[0]
    assert len(places) == 2
    assert len(ours.get_deq(grad=5, sup_gap=2)(lambda z: torch.tanh(z @ W.T + c), torch.zeros_like(c))[0]) == 3


@pytest.mark.parametrize("core", ["indexing", "sliced"])
@pytest.mark.parametrize(
    "options", [{"n_states": 5, "grad": [1, 1, 2, 2, 3]}, {"indexing": [20, 10], "grad": [1, 2, 3]}]
)
def test_fewer_evaluations_in_one_call(core, options):
    """The same states, within the evaluations of the call, and the last still has its implicit gradient."""
    W, c = contraction(0.5)
    calls = []

    def f(z):
        calls.append(1)
        return torch.tanh(z @ W.T + c)

    exact = {"ift": True, "b_tol": 1e-10, "b_max_iter": 200}
    model = ours.get_deq(core=core, f_max_iter=40, f_tol=0.0, **options, **exact)
    states, _ = model(f, torch.zeros_like(c), solver_kwargs={"f_max_iter": 3})
    assert len(states) == len(model.grad) and len(calls) == 3 + sum(model.grad[:-1]) + 1
    (gradient,) = torch.autograd.grad(states[-1].sum(), W)
    one = ours.get_deq(f_max_iter=3, f_tol=0.0, **exact)(f, torch.zeros_like(c))[0][-1]
    (expected,) = torch.autograd.grad(one.sum(), W)
    far = 0.2 if core == "sliced" else 1e-6  # there the states before have brought it nearer to the solution
    assert (gradient - expected).norm() < far * expected.norm()


def test_gradient_in_evaluation():
    W, c = contraction(0.5)
    model = ours.get_deq(f_tol=1e-8).eval()
    f = lambda z: torch.tanh(z @ W.T + c)  # noqa: E731
    torch.manual_seed(0)  # the power iteration starts at random
    states, info = model(f, torch.zeros_like(c), sradius_mode=True)
    assert torch.autograd.grad(states[0].sum(), W)[0].abs().sum() > 0
    z = states[0].detach()
    J = (1 - torch.tanh(z @ W.T + c).square()).unsqueeze(-1) * W
    true = torch.linalg.eigvals(J).abs().amax(1)
    torch.testing.assert_close(info["sradius"], true.detach(), rtol=0.05, atol=0)
    with torch.no_grad():
        assert not model(f, torch.zeros_like(c))[0][0].requires_grad


def test_power_method_on_a_rotation():
    """A complex pair: their Rayleigh quotient says 0."""
    angle = 1.3
    R = 0.9 * torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    z = torch.zeros(3, 2, requires_grad=True)
    vector, radius = ours.power_method(z @ R.T, z)
    assert vector.shape == (3, 2)
    torch.testing.assert_close(radius, torch.full((3,), 0.9))


def test_jac_reg_is_unbiased():
    W = torch.randn(5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    z = torch.zeros(4, 5, dtype=torch.float64, requires_grad=True)
    torch.manual_seed(0)
    estimate = ours.jac_reg(z @ W.T, z, vecs=4000)
    assert abs(float(estimate) / float(W.square().sum() / 5) - 1) < 0.05


def test_backward_writer():
    W, c = contraction(0.5)
    seen = []
    states, _ = ours.get_deq(ift=True)(
        lambda z: torch.tanh(z @ W.T + c), torch.zeros_like(c), backward_writer=seen.append
    )
    states[-1].sum().backward()
    assert len(seen) == 1 and (seen[0]["rel_lowest"] <= 1e-6).all() and seen[0]["nstep"].shape == (6,)


def test_statistics_of_the_last_step_in_16_bits():
    """No norm overflows, and the steps are counted exactly."""
    z = torch.full((2, 40000), 300.0, dtype=torch.float16)
    info = ours.solver_stat_from_final_step(z, 2 * z, 4097)
    assert (info["abs_lowest"] - 6e4).abs().max() < 10 and (info["rel_lowest"] - 0.5).abs().max() < 1e-4
    assert info["nstep"].tolist() == [4097, 4097]


def test_norms():
    """Copies, pickles and trains; the spectral norm is right from the start; nothing needs a reset."""
    torch.manual_seed(0)
    for kind in ("weight_norm", "spectral_norm"):
        model = nn.Sequential(nn.Linear(6, 6), nn.Conv1d(3, 4, 3), nn.ConvTranspose1d(4, 3, 3))
        before = model[0].weight.detach().clone()
        ours.apply_norm(model, kind, prefix_filter_out=["1"])
        ours.reset_norm(model)
        if kind == "weight_norm":
            torch.testing.assert_close(model[0].weight, before)
        else:
            assert abs(float(torch.linalg.matrix_norm(model[0].weight.detach(), 2)) - 1) < 1e-3
        assert type(model[1]) is nn.Conv1d
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model.state_dict())) and copy.deepcopy(model)):
            torch.testing.assert_close(twin[0].weight, model[0].weight, rtol=1e-4, atol=1e-5)
        model[0](torch.ones(2, 6)).sum().backward()
        assert all(p.grad is not None for p in model[0].parameters())
        ours.remove_norm(model)
        assert type(model[0].weight) is nn.Parameter
    fixed = nn.Linear(4, 4)
    ours.apply_norm(fixed, args=argparse.Namespace(norm_no_scale=True, norm_target_norm=0.5, norm_type="weight_norm"))
    torch.testing.assert_close(fixed.weight.norm(dim=1), torch.full((4,), 0.5))
    with pytest.raises(TypeError, match="apply_norm has no option norm_type='weightnorm'"):
        ours.apply_norm(nn.Linear(2, 2), "weightnorm")
    with pytest.raises(TypeError, match="apply_norm has no option lern_scale"):
        ours.apply_norm(nn.Linear(2, 2), lern_scale=True)


def test_a_dropout_whose_rate_follows_a_schedule():
    """A program sets the attribute that torchdeq's layers have."""
    layer = ours.VariationalDropout1d(0.5)
    layer.dropout = 0.0
    x = torch.ones(2, 3, 4)
    assert torch.equal(layer(x), x) and layer.dropout == 0.0


@pytest.mark.parametrize("name", [n for n in ours.__all__ if n.startswith("VariationalDrop")])
def test_dropouts(name):
    kind = getattr(ours, name)
    spatial = int(name[-2]) if name[-1] == "d" else 0
    shape = (4, *(3,) * spatial, 50) if spatial else (4, 50)
    x = torch.ones(shape, dtype=torch.float16)
    layer = kind(0.5)
    once = layer(x)
    assert torch.equal(layer(x), once) and once.dtype == torch.float16
    ours.reset_dropout(layer)
    assert not torch.equal(layer(x), once) and set(once.unique().tolist()) == {0.0, 2.0}
    if spatial:
        varying = "token" if "Token" in name else "feature"
        flat = once.flatten(1, -2)
        assert torch.equal(flat, flat[:, :1].expand_as(flat) if varying == "feature" else flat[..., :1].expand_as(flat))
    assert torch.equal(kind(1.0)(x), torch.zeros_like(x)) and torch.equal(kind(0.5).eval()(x), x)
    assert kind(0.5)(torch.ones(shape, device="meta")).device.type == "meta"


def test_mem_gc():
    block = nn.Sequential(nn.Linear(3, 3), nn.Tanh())
    x = torch.randn(2, 3, requires_grad=True)
    expected = torch.autograd.grad(block(x).sum(), (x, *block.parameters()))
    actual = torch.autograd.grad(ours.mem_gc(block, (x,)).sum(), (x, *block.parameters()))
    assert all(map(torch.equal, actual, expected))
