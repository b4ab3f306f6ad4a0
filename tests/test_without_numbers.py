"""Solves of tensors without numbers: the meta device and FakeTensorMode."""

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode

import deq
from deq.nn.weight_modules import WEIGHTS


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weight", WEIGHTS)
def test_layers_on_the_meta_device(weight, dtype):
    layer = deq.nn.EquilibriumLinear(3, 5, weight=weight, device="meta", dtype=dtype)
    z = layer(torch.empty(2, 3, device="meta", dtype=dtype))
    assert z.is_meta and z.shape == (2, 5) and z.dtype == dtype and layer.solution.status.shape == (2,)
    z.sum().backward()
    assert all(p.grad.shape == p.shape and p.grad.dtype == dtype for p in layer.parameters())


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(5, 5)
        self.calls = 0

    def forward(self, z, x):
        self.calls += 1
        return torch.tanh(self.linear(z) + x)


@pytest.mark.parametrize("mode", [lambda: torch.device("meta"), FakeTensorMode])
@pytest.mark.parametrize(
    "options", [{}, {"backward": "one_step"}, {"backward": "unrolled"}, {"solver": "newton_krylov"}, {"keep": (3,)}]
)
def test_functions_are_evaluated_once(mode, options):
    with mode():
        block = Block()
        layer, x = deq.nn.Equilibrium(block, **options), torch.empty(2, 5, requires_grad=True)
        z = layer(x)
        assert z.shape == x.shape and z.device == x.device and layer.solution.residual.shape == (2,)
        z.sum().backward()
        assert block.calls == 1 and x.grad.shape == x.shape and block.linear.weight.grad.shape == (5, 5)
        state = (torch.empty(2, 5), torch.empty(2, 3, 3, dtype=torch.float64))
        solution = deq.fixed_point(lambda s: (torch.tanh(s[0]), 0.5 * s[1]), state, **options | {"keep": (1, 9)})
        for found in (solution.z, *solution.trajectory):
            assert [(t.shape, t.dtype, t.device) for t in found] == [(t.shape, t.dtype, t.device) for t in state]
        assert len(solution.trajectory) == 2
        with pytest.raises(ValueError, match="a tensor of the shape of z0"):
            deq.fixed_point(lambda z: z[:, :2], x, **options)
        with pytest.raises(ValueError, match="solver must be one of"):
            deq.fixed_point(torch.tanh, x, solver="guess")


@torch.no_grad()  # for gradients a CPU build of torch lacks the device
def test_fake_tensors_of_a_device_that_is_not_there():
    with FakeTensorMode():
        for shape in ((4, 4), (3, 4, 4)):
            W, c = torch.empty(*shape, device="cuda"), torch.empty(*shape[:-2], 2, 4, device="cuda")
            z = deq.solve(W, c).z
            assert z.shape == c.shape and z.device == c.device
