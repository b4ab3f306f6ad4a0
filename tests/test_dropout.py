"""Dropout masks of equilibria: one for a call and its backward pass, new ones for the next."""

import copy
from functools import partial

import pytest
import torch
from blocks import Dropped
from torch import nn

import deq
from deq.torchdeq import get_deq


def test_dropout_in_an_equilibrium():
    """The mask is one through the solve and its gradient, and new at the next call; without it there is no solution."""
    torch.manual_seed(0)
    drop = deq.nn.VariationalDropout(0.3)
    inner = nn.Linear(8, 8)
    layer = deq.nn.Equilibrium(nn.ModuleDict({"drop": drop, "inner": inner}), on_failure="raise")
    layer.block.forward = lambda z, x: torch.tanh(drop(0.3 * inner(z)) + x)
    x = torch.randn(4, 8)
    first = layer(x)
    mask = drop.mask
    torch.testing.assert_close(first, torch.tanh(mask * 0.3 * inner(first) + x), rtol=1e-4, atol=1e-4)
    first.sum().backward()
    assert drop.mask is mask and inner.weight.grad is not None
    assert not torch.equal(layer(x), first)
    assert torch.equal(drop.eval()(x), x)
    with pytest.raises(ValueError, match=r"p must lie in \[0, 1\]"):
        deq.nn.VariationalDropout(1.5)
    with pytest.raises(TypeError, match="shared must be a sequence of dimensions; got 1"):
        deq.nn.VariationalDropout(0.5, shared=1)
    with pytest.raises(ValueError, match=r"x must have the dimensions that are shared, \(2,\); got \(3, 4\)"):
        deq.nn.VariationalDropout(0.5, shared=(2,))(torch.ones(3, 4))


@pytest.mark.parametrize("shape", [(1, 3), (2, 3), (3,), (2, 4, 3)])
def test_a_mask_that_was_drawn_for_another_shape(shape):
    """Not broadcast: the last batch of an epoch is smaller."""
    drop = deq.nn.VariationalDropout(0.5)
    drop(torch.ones(4, 3))
    with pytest.raises(ValueError, match=r"x must have the shape that the mask was drawn for, \(4, 3\), until"):
        drop(torch.ones(shape))
    deq.nn.reset_dropout(drop)
    assert drop(torch.ones(shape)).shape == shape


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")  # torch's forward mode
def test_dropout_in_gradients_of_every_sample():
    """torch.vmap of torch.func.grad, and forward mode: the mask belongs to none of them."""
    torch.manual_seed(0)
    layer, drop = nn.Linear(4, 4, dtype=torch.float64), deq.nn.VariationalDropout(0.5)
    equilibrium = deq.nn.Equilibrium(Dropped(layer, drop), tol=1e-12)
    x = torch.randn(3, 2, 4, dtype=torch.float64)
    loss = lambda x: equilibrium(x).square().sum()  # noqa: E731
    grads = torch.vmap(torch.func.grad(loss), randomness="same")(x)
    mask = drop.mask

    def of_that_mask(x):
        f = lambda z: torch.tanh(0.3 * mask * layer(z) + x)  # noqa: E731
        return deq.fixed_point(f, torch.zeros_like(x), tol=1e-12).z

    for i in range(3):
        expected = torch.func.grad(lambda x: of_that_mask(x).square().sum())(x[i])
        torch.testing.assert_close(grads[i], expected, rtol=1e-8, atol=1e-10)
    jacobian = torch.func.jacfwd(equilibrium, randomness="same")(x[0])
    mask = drop.mask
    torch.testing.assert_close(jacobian, torch.func.jacrev(of_that_mask)(x[0]), rtol=1e-8, atol=1e-10)
    assert equilibrium(x[0]).shape == (2, 4)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
def test_dropout_in_an_ensemble():
    """torch.vmap with different randomness: every member has a mask of its own, in its gradient too."""
    torch.manual_seed(0)
    layers = [deq.nn.Equilibrium(Dropped(nn.Linear(4, 4), deq.nn.VariationalDropout(0.5))).double() for _ in range(3)]
    parameters, _ = torch.func.stack_module_state(layers)
    base, x = copy.deepcopy(layers[0]).to("meta"), torch.randn(2, 4, dtype=torch.float64)

    def member(values):
        return torch.func.functional_call(base, values, (x,)), base.block.drop.mask

    z, masks = torch.vmap(member, randomness="different")(parameters)
    assert not torch.equal(masks[0], masks[1])
    grads = torch.autograd.grad(z.sum(), parameters["block.layer.weight"])[0]
    for layer, mask, own, grad in zip(layers, masks, z, grads, strict=True):
        f = lambda z: torch.tanh(0.3 * mask * layer.block.layer(z) + x)  # noqa: B023, E731
        expected = deq.fixed_point(f, torch.zeros_like(x)).z
        torch.testing.assert_close(own, expected, rtol=1e-8, atol=1e-10)
        expected = torch.autograd.grad(expected.sum(), layer.block.layer.weight)[0]
        torch.testing.assert_close(grad, expected, rtol=1e-7, atol=1e-9)


class Dropping(nn.Module):
    """``tanh(0.3 drop(linear(z)) + x)``, or the same of another equilibrium in place of z."""

    def __init__(self, inner=None):
        super().__init__()
        self.linear = nn.Linear(6, 6, dtype=torch.float64)
        self.drop = deq.nn.VariationalDropout(0.5)
        self.inner = inner

    def forward(self, z, x):
        z = z if self.inner is None else self.inner(0.3 * z)
        return torch.tanh(0.3 * self.drop(self.linear(z)) + x)


@pytest.mark.parametrize("way", ["closure", "method", "global", "nested", "nested in a module"])
def test_dropout_in_a_block_that_is_a_function(way):
    """As in one that is a module: new masks at every call, through the solve of an outer layer too, and those of the
    call in its backward pass."""
    torch.manual_seed(0)
    block = Dropping()
    if way == "method":
        f = block.forward
    elif way == "global":
        f, globals()["DROPPING"] = global_block, block
    else:
        f = lambda z, x: block(z, x)  # noqa: E731
    layer = deq.nn.Equilibrium(f, tol=1e-12, on_failure="raise")
    if way == "nested":
        inner = layer
        layer = deq.nn.Equilibrium(lambda z, x: 0.5 * inner(z + x), tol=1e-11, on_failure="raise")
    elif way == "nested in a module":
        layer = deq.nn.Equilibrium(Dropping(layer), tol=1e-11, on_failure="raise")
    W, x = block.linear.weight, torch.randn(3, 6, dtype=torch.float64)
    z = layer(x)
    mask = block.drop.mask
    expected = torch.autograd.grad(z.sum(), W, retain_graph=True)[0]
    assert layer(x[:2]).shape == (2, 6) and block.drop.mask is not mask and not torch.equal(layer(x), z)
    torch.testing.assert_close(torch.autograd.grad(z.sum(), W)[0], expected, rtol=1e-8, atol=1e-10)


class Trainer:
    """No module, but with one."""

    def __init__(self, net):
        self.net, self.nets = net, {"first": net}

    def block(self, z, x):
        return self.net(z, x)

    def closure(self):
        return lambda z, x: self.nets["first"](z, x)


WAYS = {
    "a default": lambda net: lambda z, x, net=net: net(z, x),
    "a list": lambda net: partial(lambda nets, z, x: nets[0](z, x), [net]),
    "a method": lambda net: Trainer(net).block,
    "an object": lambda net: Trainer(net).closure(),
}


@pytest.mark.parametrize("way", WAYS)
def test_dropout_of_a_module_that_a_function_has_as(way):
    """New masks at every call, and those of the call in its backward pass."""
    torch.manual_seed(0)
    net, x = Dropping(), torch.randn(3, 6, dtype=torch.float64)
    layer = deq.nn.Equilibrium(WAYS[way](net), tol=1e-12)
    z = layer(x)
    expected = torch.autograd.grad(z.sum(), net.linear.weight, retain_graph=True)[0]
    mask = net.drop.mask
    assert not torch.equal(layer(x), z) and net.drop.mask is not mask
    torch.testing.assert_close(torch.autograd.grad(z.sum(), net.linear.weight)[0], expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("between", ["reset", "call", "eval"])
@pytest.mark.parametrize("way", ["closure", "global"])
def test_the_backward_pass_of_a_function_has_the_masks_of_its_call(way, between):
    torch.manual_seed(0)
    block = globals()["DROPPING"] = Dropping()
    x, other = torch.randn(2, 3, 6, dtype=torch.float64)
    used = block if way == "closure" else global_block
    z = deq.fixed_point(lambda z: used(z, x), torch.zeros_like(x), tol=1e-12).z
    mask = block.drop.mask
    if between == "eval":
        block.eval()
    else:
        deq.nn.reset_dropout(block)
        after = block(x, other) if between == "call" else None
    actual = torch.autograd.grad(z.sum(), block.linear.weight)[0]
    assert between == "eval" or (block.drop.mask is None) == (after is None)
    f = lambda z: torch.tanh(0.3 * mask * block.linear(z) + x)  # noqa: E731
    expected = torch.autograd.grad(deq.fixed_point(f, torch.zeros_like(x), tol=1e-12).z.sum(), block.linear.weight)[0]
    torch.testing.assert_close(actual, expected, rtol=1e-8, atol=1e-10)


def global_block(z, x):
    return DROPPING(z, x)  # noqa: F821


@pytest.mark.parametrize("inner", ["module", "function"])
@pytest.mark.parametrize("way", ["fixed_point", "torchdeq"])
def test_dropout_of_a_layer_inside_of_a_function(way, inner):
    """One mask for a call and its backward pass, where every evaluation calls the layer: it drew one each time, and
    there was no solution."""
    torch.manual_seed(0)
    net, x = Dropping(), torch.randn(3, 6, dtype=torch.float64)
    layer = deq.nn.Equilibrium(net if inner == "module" else lambda z, x: net(z, x), tol=1e-13)
    f = lambda z: torch.tanh(0.3 * layer(z) + x)  # noqa: E731
    if way == "fixed_point":
        solve = lambda: deq.fixed_point(f, torch.zeros_like(x), tol=1e-12, on_failure="raise").z  # noqa: E731
    else:
        model = get_deq(ift=True, f_tol=1e-12, b_tol=1e-12, f_max_iter=100, b_max_iter=100)
        solve = lambda: model(f, torch.zeros_like(x))[0][-1]  # noqa: E731
    z = solve()
    mask = net.drop.mask
    solve()
    assert net.drop.mask is not mask
    y, own = torch.zeros_like(x), net.linear.weight
    for _ in range(40):
        u = torch.zeros_like(x)
        for _ in range(40):
            u = torch.tanh(0.3 * mask * net.linear(u) + y)
        y = torch.tanh(0.3 * u + x)
    torch.testing.assert_close(z, y, rtol=1e-9, atol=1e-10)
    found, expected = (torch.autograd.grad(t.sum(), own)[0] for t in (z, y))
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("between", ["call", "eval", "other size"])
@pytest.mark.parametrize("nested", [False, True])
def test_the_backward_pass_has_the_masks_of_its_call(between, nested):
    torch.manual_seed(0)
    block = Dropping(deq.nn.Equilibrium(Dropping(), tol=1e-13) if nested else None)
    layer = deq.nn.Equilibrium(block, tol=1e-12, on_failure="raise")
    drops = [module for module in layer.modules() if isinstance(module, deq.nn.VariationalDropout)]
    x, other = torch.randn(2, 3, 6, dtype=torch.float64)
    z = layer(x)
    masks = [drop.mask for drop in drops]
    if between == "eval":
        layer.eval()
    else:
        layer(other[: 2 if between == "other size" else 3])
        assert all(drop.mask is not mask for drop, mask in zip(drops, masks, strict=True))
    after = [drop.mask for drop in drops]
    weights = list(layer.parameters())
    grads = torch.autograd.grad(z.sum(), weights)
    assert all(drop.mask is mask for drop, mask in zip(drops, after, strict=True))
    layer.train()
    blocks = [module for module in layer.modules() if isinstance(module, Dropping)]

    def evaluate(block, z, x):
        y = z if block.inner is None else iterate(blocks[1], 0.3 * z)
        return torch.tanh(0.3 * block.linear(y) * masks[drops.index(block.drop)] + x)

    def iterate(block, x):
        z = torch.zeros_like(x)
        for _ in range(40):
            z = evaluate(block, z, x)
        return z

    expected = iterate(block, x)
    torch.testing.assert_close(z, expected, rtol=1e-9, atol=1e-10)
    expected = torch.autograd.grad(expected.sum(), weights)
    torch.testing.assert_close(grads, expected, rtol=1e-8, atol=1e-9)


def test_replicas_draw_masks_of_their_own():
    """As nn.DataParallel makes them, for other samples of the batch on other devices."""
    drop = deq.nn.VariationalDropout(0.5)
    mine = drop(torch.ones(4, 3))
    replicas = [drop._replicate_for_data_parallel() for _ in range(2)]
    assert [replica(torch.ones(n, 3)).shape[0] for replica, n in zip(replicas, (3, 2), strict=True)] == [3, 2]
    assert torch.equal(replicas[0](torch.ones(3, 3)), replicas[0].mask) and torch.equal(drop.mask, mine)
