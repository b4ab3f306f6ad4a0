"""The tensors that a function holds: replaced in a copy of it, and given their gradients."""

import functools

import pytest
import torch

import deq
from deq.held import frozen, with_others
from deq.members import may_train


def holders(x, y):
    """Functions of z that hold x, and their value at z: ``0.3 z + 2 x + y``."""

    def nested(z):
        def inner():
            return 0.3 * z + x

        return inner() + x + y

    def pair(z, values=(x, x)):  # defaults are taken as they are: a tuple in them is not looked into
        return 0.3 * z + sum(values) + y

    several = [x, x]

    def mutual(z):
        return nested(z)

    def assigning(z):
        nonlocal x
        x = x + 0
        return 0.3 * z + 2 * x + y

    return {
        "closure": lambda z: 0.3 * z + 2 * x + y,
        "nested": nested,
        "list": lambda z: 0.3 * z + sum(several) + y,
        "default": lambda z, x=x: 0.3 * z + 2 * x + y,
        "keyword": lambda z, *, x=x: 0.3 * z + 2 * x + y,
        "pair": pair,
        "behind": mutual,
        "assigning": assigning,
    }


@pytest.mark.parametrize("kind", holders(torch.zeros(1), torch.zeros(1)))
def test_exchange_of_what_a_function_holds(kind):
    """A copy of it that holds another tensor, where it is the function itself that holds it; f is left as it was."""
    x, y, new, z = (torch.randn(3, generator=torch.Generator().manual_seed(i)) for i in range(4))
    f = holders(x, y)[kind]
    g = with_others(f, [x], [new])
    possible = kind not in ("pair", "behind", "assigning")
    assert (g is not None) == possible
    if possible:
        torch.testing.assert_close(g(z), 0.3 * z + 2 * new + y)
        torch.testing.assert_close(f(z), 0.3 * z + 2 * x + y)


@pytest.mark.parametrize("kind", [kind for kind in holders(torch.zeros(1), torch.zeros(1)) if kind != "assigning"])
def test_gradients_whatever_holds_the_tensor(kind):
    """To a leaf that f uses itself and through a tensor computed from it. One that assigns is no function of z: what
    it assigns without gradients has none."""
    c = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    z = deq.fixed_point(holders(3 * c, c)[kind], torch.zeros_like(c), tol=1e-13).z
    (grad,) = torch.autograd.grad(z.sum(), c)
    torch.testing.assert_close(z, 10 * c, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(grad, torch.full_like(c, 10.0), rtol=1e-11, atol=1e-11)


def test_a_frozen_function_keeps_what_it_held():
    """Its variables, and those of functions that it holds; but not those that are assigned to by one of them."""
    count, total = 0, 0

    def step(z):
        nonlocal total
        total += 1
        return a * z + b[0]

    def f(z):
        nonlocal count
        count += 1
        return (f if z < 0 else step)(abs(z)) + count + total + missing

    a, b = torch.tensor(2.0), (torch.tensor(3.0),)
    g = frozen(f)
    a, b = None, None
    missing = 0  # not yet there when f was frozen
    assert g(1.0) == 5 + 1 + 1 and (count, total) == (1, 1)
    with pytest.raises(TypeError):
        f(1.0)
    plain = lambda z: z  # noqa: E731
    assert frozen(plain) is plain and frozen(torch.cos) is torch.cos


PROGRAM = """
def step(z):
    return torch.tanh(z @ weight.mT + x)

def by_function(z):
    return step(z)

def by_index(z):
    return torch.tanh(z @ weight.mT + xs[i])

def by_module(z):
    return torch.tanh(shift(z @ weight.mT))

by_partial = functools.partial(lambda shift, z: step(z) + shift, 0.0)

def by_activation(z):
    return activation(z @ weight.mT + (0 if x is None else x))

def by_comprehension(z):
    return torch.tanh(z @ weight.mT + sum([value + 0 * i for value in (x,)]))

def counting(z):
    global count
    count += 1
    return torch.tanh(z @ weight.mT + x)

def layer(z, y):
    return step(z) + 0 * y

class Block(torch.nn.Module):
    def forward(self, z, y):
        return step(z) + 0 * y
"""


@pytest.mark.parametrize("twice", [False, True])
@pytest.mark.parametrize(
    "name",
    [
        "step",
        "by_function",
        "by_index",
        "by_module",
        "by_partial",
        "by_activation",
        "by_comprehension",
        "counting",
        "layer",
        "Block",
    ],
)
def test_global_variables_that_change_before_the_backward_pass(name, twice):
    """As those of a loop at the top level of a program, or of a notebook: a backward pass has those of its call."""
    weight = 0.3 * torch.randn(3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    space = {"torch": torch, "functools": functools, "count": 0, "weight": weight.requires_grad_()}
    exec(PROGRAM, space)
    space["xs"] = torch.randn(3, 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).unbind()

    def shift_by(x):
        module = torch.nn.Module()
        module.forward = lambda z: z + x
        return module

    def total(solve):
        loss = 0
        for i, x in enumerate(space["xs"]):
            space.update(i=i, x=x, shift=shift_by(x), activation=(torch.tanh, torch.sin, torch.cos)[i])
            loss = loss + solve(space[name]).square().sum()
        del space["x"]
        space.update(i=None, shift=None)
        grad = torch.autograd.grad(loss, weight, create_graph=twice)[0]
        if twice:
            grad = torch.autograd.grad(grad.square().sum(), weight)[0]
        assert "x" not in space and space["i"] is space["shift"] is None
        return grad

    def solve(f):
        zeros = torch.zeros(2, 3, dtype=torch.float64)
        if name in ("layer", "Block"):
            return deq.nn.Equilibrium(f() if name == "Block" else f, tol=1e-13)(zeros)
        return deq.fixed_point(f, zeros, tol=1e-13).z

    def unrolled(f):
        f = f() if name == "Block" else f
        z = torch.zeros(2, 3, dtype=torch.float64)
        for _ in range(100):
            z = f(z, z) if name in ("layer", "Block") else f(z)
        return z

    torch.testing.assert_close(total(solve), total(unrolled), rtol=1e-9, atol=1e-11)
    assert space["count"] > 0 or name != "counting"


def test_global_data_that_is_overwritten_before_the_backward_pass():
    space = {
        "torch": torch,
        "functools": functools,
        "weight": torch.full((3, 3), 0.1).requires_grad_(),
        "x": torch.ones(2, 3),
    }
    exec(PROGRAM, space)
    z = deq.fixed_point(space["by_function"], torch.zeros(2, 3)).z
    space["x"].mul_(2)
    with pytest.raises(RuntimeError, match=r"modified by an inplace operation: the one of shape \(2, 3\)"):
        z.sum().backward()


def test_what_a_function_without_gradients_is_searched_for():
    """Modules in training, however it has them; those in evaluation are not worth the time."""
    trained, still, x = torch.nn.Linear(3, 3), torch.nn.Linear(3, 3).eval(), torch.ones(3)
    assert may_train(lambda z: trained(z) + x) and may_train(trained) and may_train(trained.forward)
    assert may_train(lambda z, layers=(trained,): layers[0](z)) and may_train(functools.partial(trained))
    assert not may_train(lambda z: torch.tanh(still(z) + x)) and not may_train(still)
