"""What a layer's solution says after the transform of torch.func that it was called in."""

import copy

import pytest
import torch

import deq


@pytest.mark.parametrize("kind", ["linear", "tensor", "tuple"])
def test_the_solution_of_a_layer_after_a_transform(kind):
    """Batches of torch.vmap are its first dimensions; inside of the transform it belongs to that."""
    torch.manual_seed(0)
    x = torch.randn(3, 2, 4, dtype=torch.float64)
    if kind == "linear":
        layer = deq.nn.EquilibriumLinear(4, 5, dtype=torch.float64)
    elif kind == "tensor":
        layer = deq.nn.Equilibrium(lambda z, x: 0.3 * torch.tanh(z) + x)
    else:
        start = lambda x: (torch.zeros_like(x),) * 2  # noqa: E731
        layer = deq.nn.Equilibrium(lambda z, x: (0.3 * torch.tanh(z[1]) + x, 0.2 * z[0]), init=start)
    first = lambda z: z[0] if isinstance(z, tuple) else z  # noqa: E731
    told = []
    for sample in x:
        layer(sample)
        told.append((layer.solution.iterations, layer.solution.residual, first(layer.solution.z)))
    z, residual = torch.vmap(lambda x: (layer(x), layer.solution.residual))(x)
    solution = layer.solution
    found = solution.iterations, solution.residual, first(solution.z)
    for actual, expected in zip(found, zip(*told, strict=True), strict=True):
        torch.testing.assert_close(actual, torch.stack(expected))
    assert torch.equal(solution.residual, residual) and torch.equal(first(solution.z), first(z))
    assert solution.converged.all() and "converged=6/6" in repr(copy.deepcopy(solution))
    torch.vmap(torch.vmap(lambda x: first(layer(x)).sum()), out_dims=1)(x.unsqueeze(2))
    assert layer.solution.status.shape == (3, 2, 1)
    torch.func.grad(lambda x: first(layer(x)).sum())(x)
    assert layer.solution.converged.all()
