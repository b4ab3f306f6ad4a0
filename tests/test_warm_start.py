"""Warm starts: what a layer remembers of its samples, and when it forgets them."""

import copy

import pytest
import torch

import deq


def test_warm_start_after_a_change_of_dtype_or_shape():
    """Begins anew, as the layer does by itself; what is still known is used."""
    torch.manual_seed(0)
    layer = deq.nn.Equilibrium(lambda z, x: torch.tanh(0.8 * z.roll(1, 1) + x), on_failure="raise")
    warm = deq.nn.WarmStart(layer)
    x = torch.randn(4, 10)
    for other in (x, x.double(), x[:, :7], x):
        assert torch.equal(warm(other), layer(other))
    warm(x[:2].double(), keys=[0, 1])
    warm(x)
    assert (layer.solution.iterations[2:] < layer.solution.iterations[:2].min()).all()
    linear = deq.nn.EquilibriumLinear(3, 6)
    warm, x = deq.nn.WarmStart(linear), torch.randn(4, 3)
    assert warm(x).dtype == torch.float32
    linear.double()
    assert torch.equal(warm(x.double()), linear(x.double()))


def test_warm_start():
    torch.manual_seed(0)
    layer = deq.nn.Equilibrium(lambda z, x: torch.tanh(0.8 * z.roll(1, 1) + x), on_failure="raise")
    warm = deq.nn.WarmStart(layer, capacity=6)
    x = torch.randn(4, 10, dtype=torch.float64)
    cold = warm(x)
    steps = layer.solution.iterations
    torch.testing.assert_close(warm(x + 1e-6), layer(x + 1e-6), rtol=1e-8, atol=1e-8)
    warm(x + 1e-6)
    assert (layer.solution.iterations < steps).all()
    warm.forget()
    assert torch.equal(warm(x), cold)
    warm(x, keys=["a", "b", "c", "d"])
    warm(x[[3, 0]], keys=["d", "new"])
    assert layer.solution.iterations[0] < steps[3] and layer.solution.iterations[1] == steps[0]
    assert len(warm._memory) == 6
    assert len(copy.deepcopy(warm)._memory) == 0
    with pytest.raises(ValueError, match="keys must name 4 samples; got 1"):
        warm(x, keys=["a"])


def test_warm_start_of_a_new_sample_beside_a_known_one():
    """It starts at the layer's own start, where alone the function may be defined."""
    f = lambda z, x: 0.5 * z / z.norm(dim=1, keepdim=True) + x  # noqa: E731
    layer = deq.nn.Equilibrium(f, init=torch.ones_like, on_failure="raise")
    warm, x = deq.nn.WarmStart(layer), torch.randn(2, 3)
    warm(x[:1], keys=["a"])
    torch.testing.assert_close(warm(x, keys=["a", "b"]), layer(x), rtol=1e-4, atol=1e-4)


def test_warm_start_inside_of_compiled_code():
    """A graph break: a graph would hold what is remembered, and be compiled anew in every call."""
    calls, x = [], torch.ones(2, 3)
    counting = lambda graph, _: calls.append(1) or graph.forward  # noqa: E731
    layer = deq.nn.Equilibrium(lambda z, x: torch.cos(0.8 * z + x))
    warm, program = (
        deq.nn.WarmStart(layer),
        torch.compile(lambda warm, x, keys: warm(2 * x, keys=keys), backend=counting),
    )
    for k in range(5):
        z = program(warm, x, [k, k + 1])
        assert len(calls) <= min(k + 1, 2)  # torch 2.10 compiles once more to take any number for a key
    assert len(warm._memory) == 6
    torch.testing.assert_close(z, layer(2 * x))


@pytest.mark.parametrize("keys", [torch.tensor([7, 3]), [torch.tensor(7), torch.tensor(3)]])
def test_warm_start_with_tensors_as_keys(keys):
    """They are the numbers that they hold, whichever objects they are."""
    layer = deq.nn.Equilibrium(lambda z, x: torch.tanh(0.9 * z + x))
    warm, x = deq.nn.WarmStart(layer), torch.linspace(-1, 1, 8).view(2, 4)
    warm(x, keys=keys)
    for again in (keys, [7, 3]):
        warm(x, keys=again)
        assert layer.solution.iterations.tolist() == [1, 1]
    warm(x.flip(0), keys=[3, 7])
    assert layer.solution.iterations.tolist() == [1, 1]
    for wrong, error in ((torch.tensor(7), ValueError), (torch.zeros(2, 3), TypeError), ([[1], [2]], TypeError)):
        with pytest.raises(error, match="keys must"):
            warm(x, keys=wrong)


def test_warm_start_inside_of_transforms():
    """Nothing of a transform stays in the memory: that of a gradient is outside of it, that of a vmap nowhere."""
    layer = deq.nn.Equilibrium(lambda z, x: torch.tanh(0.9 * z + x))
    warm, x = deq.nn.WarmStart(layer), torch.linspace(-1, 1, 8).view(2, 4)
    torch.func.grad(lambda x: warm(x).sum())(x)
    warm(x)
    assert layer.solution.iterations.tolist() == [1, 1]
    warm.forget()
    torch.testing.assert_close(torch.vmap(warm)(x.view(2, 2, 2)).view(2, 4), layer(x))
    assert not warm._memory
    torch.vmap(torch.func.grad(lambda x: warm(x).sum()))(x.view(2, 2, 2))
    assert not warm._memory


@pytest.mark.parametrize("kind", ["Equilibrium", "EquilibriumLinear"])
def test_a_warm_start_forgets_a_sample_that_diverged(kind):
    """It starts anew, where it converges; its mates go on from what they had."""
    if kind == "Equilibrium":
        layer = deq.nn.Equilibrium(lambda z, x: z * z + x, solver="plain", on_failure="ignore")
        easy, hard = torch.full((2, 3), 0.2), torch.tensor([[0.2], [3.0]]).expand(2, 3)
    else:
        layer = deq.nn.EquilibriumLinear(3, 1, bias=False, solver="plain", on_failure="ignore")
        with torch.no_grad():
            layer.weight.W.fill_(2.0)
            layer.injection.weight.fill_(1.0)
        easy, hard = torch.full((2, 3), -1.0), torch.tensor([[-1.0], [1.0]]).expand(2, 3)
    warm = deq.nn.WarmStart(layer)
    expected = warm(easy)
    warm(hard)
    assert layer.solution.converged.tolist() == [True, False]
    torch.testing.assert_close(warm(easy), expected)
    assert layer.solution.converged.all()


def test_a_warm_start_of_a_wrapped_layer_starts_new_samples_where_the_layer_does():
    """In AveragedModel, as in DistributedDataParallel, whose module the layer is."""
    starts = []

    def block(z, x):
        starts.append(z.detach().clone())
        return torch.tanh(0.3 * z + x)

    layer = deq.nn.Equilibrium(block, init=lambda x: x + 1)
    warm, x = deq.nn.WarmStart(torch.optim.swa_utils.AveragedModel(layer)), torch.randn(3, 4)
    with torch.no_grad():
        z = warm(x[:2], keys=[0, 1])
        starts.clear()
        warm(x, keys=[0, 1, 2])
    torch.testing.assert_close(starts[0], torch.cat((z, x[2:] + 1)))


def test_warm_start_of_no_batch():
    linear = deq.nn.EquilibriumLinear(3, 6)
    with pytest.raises(ValueError, match=r"the layer must return 3 samples, as many as its first input; got \(6,\)"):
        deq.nn.WarmStart(linear)(torch.ones(3))
    for inputs in ((), (1.0,), (torch.tensor(1.0),)):
        with pytest.raises(TypeError, match="the first input must be a tensor whose first dimension counts samples"):
            deq.nn.WarmStart(linear)(*inputs)
