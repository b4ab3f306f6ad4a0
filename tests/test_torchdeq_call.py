"""A call of deq.torchdeq: what is evaluated, kept for the backward pass and told."""

import copy
import pickle

import pytest
import torch
from problems import contraction
from torch import nn

import deq
import deq.torchdeq as ours


@pytest.mark.parametrize("solver", ["fixed_point_iter", "anderson", "broyden"])
def test_one_evaluation_is_differentiated(solver):
    """The one after the solve, whose graph serves the backward pass; a second backward pass has the same gradients."""
    W, c = contraction(0.6)
    linear = nn.Linear(12, 12, dtype=torch.float64)
    x = linear(c)  # no leaf
    calls = []

    def f(z):
        calls.append(torch.is_grad_enabled())
        return torch.tanh(z @ W.T + x)

    model = ours.get_deq(ift=True, f_solver=solver, f_tol=1e-9, b_tol=1e-10, f_stop_mode="rel", f_max_iter=100)
    states, info = model(f, torch.zeros_like(c))
    assert len(calls) == info["nstep"].max() + 1 and calls[-1] and calls.count(True) == 1
    assert states[-1].grad_fn is not None and (info["rel_lowest"] <= 1e-9).all()
    wanted = (W, *linear.parameters())
    first = torch.autograd.grad(states[-1].sum(), wanted, retain_graph=True)
    assert len(calls) == info["nstep"].max() + 1
    again = torch.autograd.grad(states[-1].sum(), wanted, retain_graph=True)
    assert all(map(torch.equal, first, again))
    z = deq.fixed_point(lambda z: torch.tanh(z @ W.T + x), torch.zeros_like(c), tol=1e-12).z
    torch.testing.assert_close(states[-1], z, rtol=1e-7, atol=1e-8)
    for a, b in zip(first, torch.autograd.grad(z.sum(), wanted), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-8)


def test_gradients_beside_the_kept_graph():
    """Hooks of leaves see one gradient; checkpoints, autocast, cached weights and what nobody holds go without it."""
    W, c = contraction(0.6)
    model = ours.get_deq(ift=True, f_tol=1e-10, b_tol=1e-11, f_stop_mode="rel", f_max_iter=100)
    f = lambda z: torch.tanh(z @ W.T + c)  # noqa: E731
    solve = lambda: model(f, torch.zeros_like(c))[0][-1]  # noqa: E731
    (expected,) = torch.autograd.grad(solve().sum(), W)
    seen = []
    hook = W.register_hook(lambda g: seen.append(g) or 2 * g)
    (doubled,) = torch.autograd.grad(solve().sum(), W)
    hook.remove()
    assert len(seen) == 1
    torch.testing.assert_close(doubled, 2 * expected)
    point = torch.utils.checkpoint.checkpoint(solve, use_reentrant=False)
    torch.testing.assert_close(torch.autograd.grad(point.sum(), W)[0], expected, rtol=1e-6, atol=1e-8)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t):
        z = solve()
    torch.testing.assert_close(torch.autograd.grad(z.sum(), W)[0], expected, rtol=1e-6, atol=1e-8)

    class Block(nn.Module):
        def forward(self, z):
            return torch.tanh(z @ self.weight.T + c)

    block = Block()
    block.weight = 1 * W  # neither a parameter nor held by the function
    z = model(block, torch.zeros_like(c))[0][-1]
    torch.testing.assert_close(torch.autograd.grad(z.sum(), W)[0], expected, rtol=1e-6, atol=1e-8)

    linear = nn.Linear(12, 12, bias=False, dtype=torch.float64)
    nn.utils.parametrizations.weight_norm(linear)
    z = model(lambda z: torch.tanh(0.3 * linear(z) + c), torch.zeros_like(c))[0][-1]
    exact = deq.fixed_point(lambda z: torch.tanh(0.3 * linear(z) + c), torch.zeros_like(c), tol=1e-12).z
    wanted = list(linear.parameters())
    for a, b in zip(torch.autograd.grad(z.sum(), wanted), torch.autograd.grad(exact.sum(), wanted), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("options", [{"ift": True, "f_solver": "anderson"}, {}])
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # the compiler's own
def test_inside_of_compiled_code(options):
    """A graph break: the same bits, and nothing for the compiler to complain of."""
    W, c = contraction(0.6)
    model = ours.get_deq(**options, f_tol=1e-9, f_stop_mode="rel", f_max_iter=100)

    def loss(c):
        x = 2 * c
        return model(lambda z: torch.tanh(z @ W.T + x), torch.zeros_like(c))[0][-1].sum()

    expected = loss(c)
    actual = torch.compile(loss, backend="eager")(c)
    assert torch.equal(actual, expected)
    assert torch.equal(*(torch.autograd.grad(value, W)[0] for value in (actual, expected)))


def test_a_sample_that_fails_keeps_the_gradients_of_the_others():
    """One that diverges takes no part in what flows back to them."""
    rate = torch.tensor([[0.5], [2.0], [0.2]], requires_grad=True)
    good = rate.detach()[[0, 2]].requires_grad_()
    exact = deq.fixed_point(lambda z: torch.tanh(good * z) + 0.1 * good, torch.zeros(2, 2)).z
    (expected,) = torch.autograd.grad(exact.sum(), good)
    for solver in ("fixed_point_iter", "anderson"):
        model = ours.get_deq(ift=True, f_solver=solver, f_max_iter=40, f_tol=1e-6, f_stop_mode="rel", b_max_iter=60)
        z = model(lambda z: torch.tanh(rate * z) + 0.1 * rate + (rate > 1) * z, torch.zeros(3, 2))[0][-1]
        (actual,) = torch.autograd.grad(z[[0, 2]].sum(), rate)
        torch.testing.assert_close(actual[[0, 2]], expected, rtol=1e-4, atol=1e-4)


def test_statistics_are_a_dict():
    """Made when they are first read, in whatever way."""
    names = {"abs_lowest", "rel_lowest", "nstep", "sradius", "abs_trace", "rel_trace"}
    solver = ours.get_solver("anderson")

    def info() -> dict:
        return solver(lambda z: 0.5 * z + 1, torch.zeros(3, 2), max_iter=5)[2]

    views = {
        "iteration": set,
        "keyword arguments": lambda info: set({**info}),
        "dict": lambda info: set(dict(info)),
        "keys": lambda info: set(info.keys()),
        "items": lambda info: {name for name, _ in info.items()},
        "copy": lambda info: set(copy.copy(info)),
        "deepcopy": lambda info: set(copy.deepcopy(info)),
        "pickle": lambda info: set(pickle.loads(pickle.dumps(info))),
        "reversed": lambda info: set(reversed(info)),
        "or": lambda info: set(info | {}),
        "ror": lambda info: set({} | info),
        "contains": lambda info: {name for name in names if name in info},
    }
    for read in views.values():
        assert read(info()) == names
    assert isinstance(info(), dict) and len(info()) == 6 and "nstep" in repr(info())
    assert torch.equal(info()["nstep"], info().get("nstep")) and torch.equal(info().pop("nstep"), info()["nstep"])
    written = info()
    written["sradius"] = torch.ones(3)
    assert torch.equal(written["sradius"], torch.ones(3)) and set(written) == names
    shorter = info()
    del shorter["sradius"]
    assert set(shorter) == names - {"sradius"}
    cleared = info()
    cleared.clear()
    assert not cleared


@pytest.mark.parametrize(
    "solver", ["anderson", "broyden", "fixed_point_iter", "newton_krylov", "simple_fixed_point_iter"]
)
def test_a_model_is_pickled_with_its_solvers(solver):
    """As a whole, as torch.save does it, and to processes that are spawned."""
    model = ours.get_deq(f_solver=solver, b_solver=solver)
    twin = pickle.loads(pickle.dumps(model))
    assert twin.f_solver is twin.b_solver is model.f_solver and twin.args == model.args


@pytest.mark.parametrize("solver", ["anderson", "broyden", "fixed_point_iter", "newton_krylov"])
def test_the_final_state_of_no_samples(solver):
    z, _, _ = ours.get_solver(solver)(lambda z: 0.5 * z + 1, torch.zeros(0, 3), return_final=True)
    assert z.shape == (0, 3)
