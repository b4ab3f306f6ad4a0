"""Norms of weights, those of deq.nn.normalise and torch, and that they stay for a solve and its gradient."""

import copy
import pickle

import pytest
import torch
from blocks import Dropped
from torch import nn
from torch.nn.utils import parametrize, prune

import deq
from deq.torchdeq import get_deq


@pytest.mark.parametrize("kind", ["weight", "spectral"])
def test_normalised_equilibria(kind):
    """An equilibrium of a normalised block: one weight for the whole solve, exact gradients, plain again afterwards."""
    torch.manual_seed(0)
    inner = nn.Linear(6, 6, dtype=torch.float64)
    deq.nn.normalise(inner, kind, target=0.8, learned=kind == "weight")
    x = torch.randn(4, 6, dtype=torch.float64)
    reads = []
    parametrized = inner.parametrizations.weight[0]
    parametrized.register_forward_hook(lambda *_: reads.append(1))
    layer = deq.nn.Equilibrium(lambda z, x: torch.tanh(0.5 * inner(z) + x), on_failure="raise")
    z = layer(x)
    assert len(reads) <= 2 < int(layer.solution.iterations.max())
    inner.eval()
    gradient = torch.autograd.grad(layer(x).sum(), list(inner.parameters()))
    y = torch.zeros_like(x)
    for _ in range(100):
        y = torch.tanh(0.5 * inner(y) + x)
    for a, b in zip(gradient, torch.autograd.grad(y.sum(), list(inner.parameters())), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)
    if kind == "spectral":
        assert abs(float(torch.linalg.matrix_norm(inner.weight.detach(), 2)) - 0.8) < 1e-2
    twin = pickle.loads(pickle.dumps(copy.deepcopy(inner).state_dict()))
    assert set(twin) == set(inner.state_dict())
    value = inner.weight.detach().clone()
    deq.nn.denormalise(inner)
    assert not parametrize.is_parametrized(inner) and torch.equal(inner.weight, value)
    del z
    with pytest.raises(ValueError, match="kind must be one of 'weight', 'spectral'"):
        deq.nn.normalise(inner, "batch")


def test_normalised_injection_of_a_layer():
    layer = deq.nn.EquilibriumLinear(5, 8)
    before = layer(torch.ones(3, 5)).detach()
    deq.nn.normalise(layer, "spectral", target=0.5)
    assert torch.nn.utils.parametrize.is_parametrized(layer.injection, "weight")
    after = layer(torch.ones(3, 5))
    after.sum().backward()
    assert not torch.allclose(before, after)
    assert all(p.grad is not None for p in layer.injection.parametrizations.parameters())


def test_clipped_norm():
    layer = nn.Linear(4, 4)
    with torch.no_grad():
        layer.weight.mul_(0.01)
    before = layer.weight.detach().clone()
    deq.nn.normalise(layer, "weight", learned=False, target=1.0, clip=1.0)
    torch.testing.assert_close(layer.weight, before)  # a factor above 1 is cut


@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 0.0), (torch.float32, 1e-25), (torch.float16, 0.0)])
def test_spectral_norm_of_a_weight_that_starts_at_nothing(dtype, size):
    """Its singular vectors are found once it has some, and at any scale."""
    torch.manual_seed(0)
    layer = nn.Linear(4, 4, bias=False, dtype=dtype)
    with torch.no_grad():
        layer.weight.mul_(size)
    deq.nn.normalise(layer, "spectral", learned=False, iterations=30)
    if size:
        assert abs(float(torch.linalg.matrix_norm(layer.weight.detach(), 2)) - 1) < 1e-3
    assert torch.isfinite(layer.weight).all()
    with torch.no_grad():
        layer.parametrizations.weight.original.copy_(5 * torch.eye(4))
    assert abs(float(torch.linalg.matrix_norm(layer.weight.detach().float(), 2)) - 1) < 1e-2


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors is a no-op")
@pytest.mark.parametrize("kind", ["weight", "spectral"])
@pytest.mark.parametrize("sizes", [(4, 0), (0, 4)])
def test_norm_of_a_layer_without_elements(kind, sizes):
    layer = deq.nn.normalise(nn.Linear(*sizes), kind)
    out = layer(torch.ones(2, sizes[0]))
    assert torch.equal(out, layer.bias.expand(2, sizes[1]))
    out.sum().backward()


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
def test_spectral_norm_in_training_under_torch_func():
    """What iterates for the norm belongs to the module, not to a transform, and the gradient is that of autograd."""
    torch.manual_seed(0)
    block = deq.nn.normalise(Dropped(nn.Linear(4, 4), nn.Identity()).double(), "spectral", iterations=200)
    layer, x = deq.nn.Equilibrium(block, tol=1e-12), torch.randn(3, 4, dtype=torch.float64)
    norm = block.layer.parametrizations.weight[0]
    values = {name: parameter.detach() for name, parameter in layer.named_parameters()}
    loss = lambda values, x: torch.func.functional_call(layer, values, (x,)).square().sum()  # noqa: E731
    with torch.no_grad():
        values["block.layer.parametrizations.weight.original0"].add_(0.3 * torch.randn(4, 4))  # the layer's own
    before = norm.v.clone()
    grads = torch.func.grad(loss)(values, x)
    assert not torch.equal(norm.v, before) and not torch._C._functorch.is_functorch_wrapped_tensor(norm.v)
    expected = torch.autograd.grad(layer(x).square().sum(), list(layer.parameters()))
    for grad, one in zip(grads.values(), expected, strict=True):
        torch.testing.assert_close(grad, one, rtol=1e-8, atol=1e-10)
    tangent = torch.func.jvp(lambda x: loss(values, x), (x,), (x,))[1]
    assert abs(float(tangent - (torch.func.grad(loss, 1)(values, x) * x).sum())) < 1e-9
    of_samples = torch.vmap(torch.func.grad(loss), (None, 0))(values, x.unsqueeze(1))
    for grad, one in zip(of_samples.values(), expected, strict=True):
        torch.testing.assert_close(grad.sum(0), one, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("kind", ["module", "closure", "global", "fixed_point", "torchdeq", "compiled"])
def test_spectral_norm_of_two_calls_before_a_backward_pass(kind):
    """The gradient of the first is one of the weight that it had: the second iterates for the norm."""
    torch.manual_seed(0)
    block = deq.nn.normalise(Dropped(nn.Linear(4, 4), nn.Identity()).double(), "spectral")
    with torch.no_grad():
        block.layer.parametrizations.weight.original0.add_(0.3 * torch.randn(4, 4))
    x = torch.randn(3, 4, dtype=torch.float64)
    grads = []
    for again in (False, True):
        own = copy.deepcopy(block)
        f = own if kind == "module" else lambda z, x, own=own: own(z, x)
        if kind == "global":  # a function of a script, whose modules are global variables
            exec("def f(z, x): return own(z, x)", space := {"own": own})
            f = space["f"]
        layer = deq.nn.Equilibrium(own if kind == "compiled" else f, tol=1e-12)
        if kind == "compiled":
            layer = torch.compile(layer, fullgraph=True, backend="aot_eager")
        elif kind == "fixed_point":
            layer = lambda x, f=f: deq.fixed_point(lambda z: f(z, x), torch.zeros_like(x), tol=1e-12).z  # noqa: E731
        elif kind == "torchdeq":
            model = get_deq(f_tol=1e-12, b_tol=1e-12, f_max_iter=100, b_max_iter=100).double()
            layer = lambda x, f=f, model=model: model(lambda z: f(z, x), torch.zeros_like(x))[0][-1]  # noqa: E731
        loss = layer(x).square().sum()
        if again:
            own(torch.zeros_like(x), x)
            layer(2 * x)
        grads.append(torch.autograd.grad(loss, list(own.parameters())))
    assert all(map(torch.equal, *grads))


@pytest.mark.parametrize("norm", [nn.utils.spectral_norm, nn.utils.parametrizations.spectral_norm])
@pytest.mark.parametrize("kind", ["module", "function", "fixed_point", "torchdeq", "compiled"])
def test_spectral_norms_of_torch_in_training(norm, kind):
    """One step of the power iteration a call, whose weight the gradient has too, whatever is called in between."""
    torch.manual_seed(0)
    block = Dropped(norm(nn.Linear(4, 4)).double(), nn.Identity())
    weight, bias = sorted(block.layer.parameters(), key=torch.Tensor.dim, reverse=True)
    u, _ = block.layer.buffers()
    with torch.no_grad():
        weight.normal_()
    x = torch.randn(3, 4, dtype=torch.float64)
    once = copy.deepcopy(block)
    expected = torch.zeros_like(x)
    once(expected, x)  # takes the step
    once.eval()
    for _ in range(2000):
        expected = once(expected, x)
    layer = deq.nn.Equilibrium(block if kind in ("module", "compiled") else lambda z, x: block(z, x), tol=1e-12)
    if kind == "compiled":
        layer = torch.compile(layer, fullgraph=True, backend="aot_eager")
    elif kind == "fixed_point":
        layer = lambda x: deq.fixed_point(lambda z: block(z, x), torch.zeros_like(x), tol=1e-12).z  # noqa: E731
    elif kind == "torchdeq":
        model = get_deq(ift=True, f_tol=1e-12, b_tol=1e-12, f_max_iter=100, b_max_iter=100).double()
        layer = lambda x: model(lambda z: block(z, x), torch.zeros_like(x))[0][-1]  # noqa: E731
    z = layer(x)
    torch.testing.assert_close(z, expected, rtol=1e-10, atol=1e-10)
    assert all(map(torch.equal, block.buffers(), once.buffers()))
    block(x, x)  # another step
    block.eval()
    found = torch.autograd.grad(z.square().sum(), (weight, bias))
    assert block.layer.training is False and not torch.equal(u, next(once.layer.buffers()))
    layer = deq.nn.Equilibrium(once, tol=1e-12)
    own = sorted(once.layer.parameters(), key=torch.Tensor.dim, reverse=True)
    for grad, one in zip(found, torch.autograd.grad(layer(x).square().sum(), own), strict=True):
        torch.testing.assert_close(grad, one, rtol=1e-8, atol=1e-10)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
@pytest.mark.parametrize("norm", [nn.utils.spectral_norm, nn.utils.parametrizations.spectral_norm])
@pytest.mark.parametrize(
    "kind", ["no_grad", "inference", "torchdeq", "compiled function", "vmap", "grad", "vjp", "samples", "hessian"]
)
def test_spectral_norms_of_torch_step_once_a_call(norm, kind):
    """Without gradients, in the transforms of torch.func and in a graph whose block is a function as well."""
    torch.manual_seed(0)
    block = Dropped(norm(nn.Linear(4, 4)).double(), nn.Identity())
    x = torch.randn(3, 4, dtype=torch.float64)
    once = copy.deepcopy(block)
    once(x, x)  # takes the step
    still = deq.nn.Equilibrium(once.eval(), tol=1e-13)
    layer = deq.nn.Equilibrium(block, tol=1e-13)
    f = lambda z: block(z, x)  # noqa: E731
    loss = lambda layer, x: layer(x).square().sum()  # noqa: E731
    grad = torch.func.grad(loss, 1)
    if kind in ("no_grad", "inference"):
        with torch.inference_mode() if kind == "inference" else torch.no_grad():
            found, expected = deq.fixed_point(f, torch.zeros_like(x), tol=1e-13).z, still(x)
    elif kind == "torchdeq":
        with torch.no_grad():
            found, expected = get_deq(f_tol=1e-13, f_max_iter=100).eval()(f, torch.zeros_like(x))[0][-1], still(x)
    elif kind == "compiled function":
        layer = deq.nn.Equilibrium(lambda z, x: block(z, x), tol=1e-13)
        layer = torch.compile(layer, fullgraph=True, backend="aot_eager")
        leaf = x.clone().requires_grad_()
        found, expected = torch.autograd.grad(loss(layer, leaf), leaf)[0], grad(still, x)
    elif kind == "vmap":
        found, expected = torch.vmap(layer)(x.unsqueeze(1)).squeeze(1), still(x)
    elif kind == "vjp":
        image, pull = torch.func.vjp(layer, x)
        once.load_state_dict(block.state_dict())
        block(x, x)  # another step
        found, expected = pull(2 * image)[0], grad(still, x)
        block.load_state_dict(once.state_dict())
    else:
        transform = {
            "grad": lambda layer: grad(layer, x),
            "samples": lambda layer: torch.vmap(grad, (None, 0))(layer, x.unsqueeze(1)),
            "hessian": lambda layer: torch.func.hessian(loss, 1)(layer, x),
        }[kind]
        found, expected = transform(layer), transform(still)
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)
    assert all(map(torch.equal, block.buffers(), once.buffers()))
    assert not any(map(torch._C._functorch.is_functorch_wrapped_tensor, block.buffers()))


@pytest.mark.parametrize("norm", [nn.utils.spectral_norm, nn.utils.parametrizations.spectral_norm])
@pytest.mark.parametrize("kind", ["fixed_point", "module", "compiled"])
def test_spectral_norms_of_torch_in_a_layer_inside_whose_block_is_a_function(norm, kind):
    """They stay for the outer solve."""
    torch.manual_seed(0)
    linear, x = norm(nn.Linear(4, 4)).double(), torch.randn(3, 4, dtype=torch.float64)
    inner = deq.nn.Equilibrium(lambda u, z: torch.tanh(0.3 * linear(u) + z), tol=1e-13)
    seen = []
    inner.register_forward_hook(lambda *_: seen.append(next(linear.buffers()).clone()))
    outer = Dropped(inner, nn.Identity())
    if kind == "fixed_point":
        deq.fixed_point(lambda z: outer(z, x), torch.zeros_like(x), tol=1e-12)
    else:
        layer = deq.nn.Equilibrium(outer, tol=1e-12)
        (torch.compile(layer, fullgraph=True, backend="aot_eager") if kind == "compiled" else layer)(x)
    assert len(seen) > 3 and all(torch.equal(u, seen[0]) for u in seen)


def test_spectral_norms_of_torch_of_one_module():
    """Both hooks stay for a solve and its gradient, and go on afterwards."""
    torch.manual_seed(0)
    layer = nn.Linear(4, 4).double()
    layer.other = nn.Parameter(torch.randn(4, 4, dtype=torch.float64))
    for name in ("weight", "other"):
        nn.utils.spectral_norm(layer, name)
    x = torch.randn(3, 4, dtype=torch.float64)
    weights = []

    def f(z):
        image = 0.3 * torch.tanh(layer(z) + z @ layer.other + x)
        weights.append((layer.weight.detach(), layer.other.detach()))
        return image

    hooks, buffers = layer._forward_pre_hooks, list(layer.buffers())
    deq.fixed_point(f, torch.zeros_like(x)).z.sum().backward()
    assert len(weights) > 3
    for weight in weights:
        assert all(map(torch.equal, weight, weights[0]))
    assert layer._forward_pre_hooks is hooks and all(hook.n_power_iterations == 1 for hook in hooks.values())
    assert all(a is b for a, b in zip(layer.buffers(), buffers, strict=True))


def test_spectral_norm_in_a_graph():
    torch.manual_seed(0)
    model = deq.nn.normalise(nn.Linear(4, 4), "spectral")
    other, x = copy.deepcopy(model), torch.randn(3, 4)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for _ in range(2):  # each of which iterates once more
        assert torch.equal(compiled(x), other(x))
        assert all(map(torch.equal, model.buffers(), other.buffers()))


@pytest.mark.parametrize("learned", [True, False])
@pytest.mark.parametrize("kind", ["weight", "spectral"])
def test_normalised_weights_that_layers_share(kind, learned):
    """They are one weight through normalisation, copies, training and the way back."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False), nn.Embedding(4, 4))
    weight = model[1].weight = model[2].weight = model[0].weight
    deq.nn.normalise(model, kind, learned=learned, clip=0.5)
    assert any(parameter is weight for parameter in model[0].parametrizations.parameters())  # and the embedding's
    model = copy.deepcopy(model)
    optimiser = torch.optim.SGD(model.parameters(), 0.1)
    model[1](model[0](torch.randn(3, 4))).square().sum().backward()
    optimiser.step()
    model.eval()
    value = model[0].weight.detach().clone()
    assert torch.equal(model[1].weight, value)
    torch.func.functional_call(model[:2], dict(model[:2].named_parameters()), (torch.randn(3, 4),))
    assert torch.equal(model[1].weight, value) and len(list(model.parameters())) == 1 + learned
    deq.nn.denormalise(model)
    assert model[0].weight is model[1].weight and torch.equal(model[0].weight, value)


@pytest.mark.parametrize("norm", [nn.utils.spectral_norm, lambda layer: prune.identity(layer, "weight")])
def test_normalise_refuses_weights_of_hooks(norm):
    """By the layer's name, and before it has changed others."""
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    norm(model[1])
    with pytest.raises(ValueError, match="that of '1' is computed by a hook"):
        deq.nn.normalise(model)
    assert not parametrize.is_parametrized(model[0])
    deq.nn.normalise(model, skip="1")
    assert parametrize.is_parametrized(model[0])


@pytest.mark.parametrize("learned", [True, False])
@pytest.mark.parametrize("how", ["frozen", "no_grad", "inference"])
def test_denormalised_weights_are_parameters(how, learned):
    """Without gradients too, and where they were frozen, which they stay."""
    model = deq.nn.normalise(nn.Linear(3, 3).requires_grad_(how != "frozen"), learned=learned)
    expected = model.weight.detach().clone()
    with torch.inference_mode(how == "inference"), torch.set_grad_enabled(how == "frozen"):
        deq.nn.denormalise(model)
    assert sorted(dict(model.named_parameters())) == ["bias", "weight"] and not list(model.buffers())
    assert torch.equal(model.weight, expected) and model.weight.requires_grad == (how != "frozen")
    assert not model.weight.is_inference()


@pytest.mark.parametrize("kind", ["weight", "spectral"])
def test_denormalised_copies_leave_the_others_normalised(kind):
    """To export a copy of a model that goes on training; and of layers that are copies each is made plain."""
    torch.manual_seed(0)
    layer, x = deq.nn.normalise(nn.Linear(4, 4), kind).eval(), torch.randn(3, 4)
    expected = layer(x)
    copies = nn.ModuleList(copy.deepcopy(layer) for _ in range(2))
    deq.nn.denormalise(copies)
    assert [type(each) for each in copies] == [nn.Linear, nn.Linear] and parametrize.is_parametrized(layer)
    for each in (layer, *copies, copy.deepcopy(layer)):
        torch.testing.assert_close(each(x), expected)
    deq.nn.denormalise(layer)
    assert type(layer) is nn.Linear


def test_a_single_name_to_skip():
    model = nn.ModuleDict({"body": nn.Linear(2, 2), "head": nn.Linear(2, 2)})
    deq.nn.normalise(model, skip="head")
    assert [parametrize.is_parametrized(layer) for layer in model.values()] == [True, False]
