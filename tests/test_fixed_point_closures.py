"""What the function of deq.fixed_point closes over: found, kept for the backward pass, and given its gradient."""

import functools
from concurrent.futures import ThreadPoolExecutor
from types import MethodType, SimpleNamespace

import pytest
import torch
from fixed_points import solve
from problems import gaussian

import deq
from deq import equation
from deq.applied import Applied


def test_gradients_reach_what_f_closes_over():
    """Parameters, tensors with a history of which one depends on another, tensors inside custom functions."""
    torch.manual_seed(0)
    linear = torch.nn.Linear(6, 6).double()
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)

    class Scale(torch.autograd.Function):
        @staticmethod
        def forward(z, s):
            return z * s

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.save_for_backward(*inputs)

        @staticmethod
        def backward(ctx, g):
            z, s = ctx.saved_tensors
            return g * s, (g * z).sum()

    s = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)

    def run(x, s, weight, bias, solve):
        c = torch.nn.functional.linear(x, weight, bias)  # depends on weight, which f uses as well
        return solve(lambda z: Scale.apply(torch.tanh(z @ weight.T + c), s), torch.zeros_like(c))

    def unrolled(f, z):
        for _ in range(100):
            z = f(z)
        return z

    inputs = (x, s, linear.weight, linear.bias)
    ours = run(*inputs, lambda f, z: deq.fixed_point(f, z, tol=1e-13).z)
    expected = run(*inputs, unrolled)
    for a, b in zip(torch.autograd.grad(ours.sum(), inputs), torch.autograd.grad(expected.sum(), inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
    with pytest.raises(RuntimeError, match="differentiates it once, not twice"):
        z = run(*inputs, lambda f, z: deq.fixed_point(f, z, tol=1e-13).z)
        torch.autograd.grad(z.sum(), s, create_graph=True)


@pytest.mark.parametrize("kind", ["leaves", "input", "closure", "attribute"])
def test_every_evaluation_is_used(kind, monkeypatch):
    """Finding what f closes over costs no evaluation where that are leaves, or within reach; a gradient does not watch
    an f that closes over leaves, or holds the rest itself."""
    W, c, g = gaussian(12, 3, torch.float64)
    W, c = W.requires_grad_(), c.requires_grad_()
    x = c if kind == "leaves" else 2 * c
    calls, exchanges = [], []

    def cell(z, x):
        calls.append(z)
        return torch.tanh(z @ W.mT + x)

    class Exchange(equation.Exchange):
        def __init__(self, old, new):
            exchanges.append(old)
            super().__init__(old, new)

    monkeypatch.setattr(equation, "Exchange", Exchange)
    holder = SimpleNamespace(x=x)
    kinds = {"input": Applied(cell, (x,)), "attribute": lambda z: cell(z, holder.x)}
    solution = deq.fixed_point(kinds.get(kind, lambda z: cell(z, x)), torch.zeros_like(c), tol=1e-12)
    assert len(calls) == int(solution.iterations.max()) + (kind == "attribute")
    calls.clear()
    grads = torch.autograd.grad(solution.z, (W, c), g, retain_graph=True)
    assert len(calls) == 1 and bool(exchanges) == (kind == "attribute")
    expected = torch.autograd.grad(deq.solve(W, x, "tanh", tol=1e-12).z, (W, c), g)
    torch.testing.assert_close(grads, expected, rtol=1e-8, atol=1e-9)


def test_a_tensor_with_a_history_made_in_another_thread():
    """It is found, and its own graph left to others: threads number their graphs' nodes each by themselves."""
    torch.manual_seed(0)
    weight, x = torch.randn(6, 6, requires_grad=True), torch.randn(3, 6)
    y = weight
    for _ in range(100):
        y = 1.0 * y  # the numbers of a thread that begins are below
    holder = SimpleNamespace(c=torch.tanh(x @ weight))
    run = lambda: deq.fixed_point(lambda z: torch.cos(0.3 * z + holder.c), torch.zeros(3, 6)).z  # noqa: E731
    expected = torch.autograd.grad(run().sum(), weight, retain_graph=True)
    with ThreadPoolExecutor(1) as pool:
        z = pool.submit(run).result()
    torch.testing.assert_close(torch.autograd.grad(z.sum(), weight, retain_graph=True), expected)
    holder.c.sum().backward()


def test_an_input_that_f_takes_twice():
    """As its argument and from elsewhere: the gradient has both parts."""
    W, c, g = gaussian(12, 3, torch.float64)
    c = c.requires_grad_()
    x = 2 * c
    z = deq.nn.Equilibrium(lambda z, y: torch.tanh(z @ W.mT + y + 0.5 * x), tol=1e-12)(x)
    expected = deq.solve(W, 1.5 * x, "tanh", tol=1e-12).z
    torch.testing.assert_close(
        *(torch.autograd.grad(z, c, g, retain_graph=True)[0] for z in (z, expected)), rtol=1e-8, atol=1e-9
    )


@pytest.mark.parametrize(
    "kind",
    [
        *("tensor", "index", "module", "behind", "partial", "partial in a closure", "method", "default", "argument"),
        *("activation", "name", "missing"),
    ],
)
@pytest.mark.parametrize("twice", [False, True])
def test_variables_that_a_loop_gives_other_values(kind, twice):
    """The backward pass, after the loop, has f with those of its own turn."""
    W, x, _ = gaussian(6, 9, torch.float64)
    W, xs = W.requires_grad_(), x.split(3)
    modules = [Shift(x) for x in xs]

    def total(solve):
        loss = 0
        for i, x in enumerate(xs):
            module, name, missing = modules[i], ("tanh", "sin", "cos")[i], (None, None, x)[i]
            activation = getattr(torch, name)

            def step(z, _=None):
                return torch.tanh(z @ W.mT + x)  # noqa: B023

            by_partial = functools.partial(step, _=None)
            f = {
                "tensor": lambda z: torch.tanh(z @ W.mT + x),  # noqa: B023
                "index": lambda z: torch.tanh(z @ W.mT + xs[i]),  # noqa: B023
                "module": lambda z: torch.tanh(module(z @ W.mT)),  # noqa: B023
                "behind": lambda z: step(z),
                "partial": by_partial,
                "partial in a closure": lambda z: by_partial(z),  # noqa: B023
                "method": MethodType(lambda self, z: torch.tanh(z @ W.mT + x + self), 0),  # noqa: B023
                "default": lambda z, step=step: step(z),
                "argument": functools.partial(call, step),
                "activation": lambda z: activation(z @ W.mT + x),  # noqa: B023
                "name": lambda z: getattr(torch, name)(z @ W.mT + x),  # noqa: B023
                "missing": lambda z: torch.tanh(z @ W.mT + x if missing is None else missing),  # noqa: B023
            }
            loss = loss + solve(f[kind]).square().sum()
        return torch.autograd.grad(loss, W, create_graph=twice)[0]

    def unrolled(f):
        z = torch.zeros_like(xs[0])
        for _ in range(150):
            z = f(z)
        return z

    expected = total(unrolled)
    ours = total(lambda f: deq.fixed_point(f, torch.zeros_like(xs[0]), tol=1e-13).z)
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-11)


def call(f, z):
    return f(z)


class Shift(torch.nn.Module):
    def __init__(self, shift):
        super().__init__()
        self.shift = shift

    def forward(self, z):
        return z + self.shift


@pytest.mark.parametrize("kind", ["closure", "layer", "partial"])
def test_data_that_is_overwritten_before_the_backward_pass(kind):
    """Refused, as by torch; what f itself writes is not."""
    W, x, _ = gaussian(6, 3, torch.float64)
    W, calls = W.requires_grad_(), torch.zeros((), dtype=torch.int64)
    block = torch.nn.Module()
    block.forward = lambda z, x: torch.tanh(z @ W.mT + x)

    def f(z):
        calls.add_(1)
        return block(z, x)

    def run():
        if kind == "layer":
            return deq.nn.Equilibrium(block)(x)
        g = functools.partial(lambda shift, z: torch.tanh(z @ W.mT + shift), x) if kind == "partial" else f
        return deq.fixed_point(g, torch.zeros_like(x)).z

    z = run()
    torch.autograd.grad(z.sum(), W, retain_graph=True)
    torch.autograd.grad(z.sum(), W)
    z = run()
    x.mul_(0.5)
    with pytest.raises(RuntimeError, match=r"modified by an inplace operation: the one of shape \(3, 6\)"):
        z.sum().backward()


def test_tensors_that_are_known():
    """Named one by one, or the only one by itself."""
    W, c, g = gaussian(8, 3, torch.float64)
    W, c = W.requires_grad_(), c.requires_grad_()
    expected = torch.autograd.grad(solve(W, c, tol=1e-12).z, (W, c), g)
    known = solve(W, c, tol=1e-12, tensors=(t for t in (W, c))).z
    torch.testing.assert_close(torch.autograd.grad(known, (W, c), g), expected, rtol=1e-9, atol=1e-11)
    only = solve(W, c.detach(), tol=1e-12, tensors=W).z
    torch.testing.assert_close(torch.autograd.grad(only, W, g)[0], expected[0], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("kind", ["halves", "slices", "rows", "leaf"])
@pytest.mark.parametrize("twice", [False, True])
def test_views_of_views_that_nobody_holds(kind, twice):
    """f takes views of what is a view itself, out of an object: watched, they are no tensors of others."""
    W, c, _ = gaussian(6, 3, torch.float64)
    W = W.requires_grad_()
    make = {
        "halves": lambda: W.split(3),
        "slices": lambda: (W[:3], W[3:]),
        "rows": lambda: W.unbind(),
        "leaf": lambda: (W.detach().clone()[:3].requires_grad_(), W[3:]),  # a leaf that is a view of what is none
    }[kind]
    holder = SimpleNamespace(parts=make())

    def f(z):
        return torch.tanh(torch.cat([z @ part.reshape(-1, 6).T for part in holder.parts], 1) + c)

    wanted = (W, holder.parts[0]) if kind == "leaf" else (W,)
    z = torch.zeros_like(c)
    for _ in range(150):
        z = f(z)
    ours = deq.fixed_point(f, torch.zeros_like(c), tol=1e-13).z
    for a, b in zip(
        torch.autograd.grad(ours.square().sum(), wanted, create_graph=twice, retain_graph=True),
        torch.autograd.grad(z.square().sum(), wanted),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_a_tensor_that_is_named_twice():
    W, c, g = gaussian(8, 3, torch.float64)
    W = W.requires_grad_()
    f = lambda z: torch.tanh(z @ W.mT + c)  # noqa: E731
    once, twice = (deq.fixed_point(f, torch.zeros_like(c), tensors=t).z for t in (W, [W, W]))
    torch.testing.assert_close(torch.autograd.grad(twice, W, g), torch.autograd.grad(once, W, g))
