"""Solves of tensors without numbers: the meta device and FakeTensorMode."""

import pytest
import torch
from torch._subclasses import FakeTensorMode

import deq


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
