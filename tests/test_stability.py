"""What keeps equilibrium models trainable: estimates against dense algebra, guarantees against measured norms."""

import copy
import math
import pickle

import pytest
import torch
from blocks import Dropped
from torch import nn
from torch.nn.utils import parametrize, prune

import deq
from deq.torchdeq import get_deq


def test_jacobian_penalty():
    torch.manual_seed(0)
    W = torch.randn(6, 6, dtype=torch.float64, requires_grad=True)
    z = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    image = torch.tanh(z @ W.T)
    true = ((1 - image.square()).unsqueeze(2) * W).square().sum() / z.numel()
    estimate = deq.nn.jacobian_penalty(image, z, samples=3000)
    assert abs(float(estimate.detach() / true.detach()) - 1) < 0.1
    slope, exact = (torch.autograd.grad(t, W, retain_graph=True)[0] for t in (estimate, true))
    assert float((slope - exact).norm() / exact.norm()) < 0.2


@pytest.mark.parametrize("shape", [(0, 3), (3, 0)])
def test_jacobian_penalty_of_nothing(shape):
    """Zero, and so are its gradients."""
    w, z = (torch.ones(*size, requires_grad=True) for size in ((shape[1],), shape))
    penalty = deq.nn.jacobian_penalty(torch.tanh(w * z), z)
    assert float(penalty.detach()) == 0
    for grad, like in zip(torch.autograd.grad(penalty, (w, z)), (w, z), strict=True):
        assert torch.equal(grad, torch.zeros_like(like))
    with pytest.raises(ValueError, match="samples must be a positive integer; got 0"):
        deq.nn.jacobian_penalty(torch.tanh(w * z), z, samples=0)


def test_spectral_radius():
    """Real, complex and zero: the modulus of the largest eigenvalue of every sample's own Jacobian."""
    rotation = torch.tensor([[math.cos(1.3), -math.sin(1.3)], [math.sin(1.3), math.cos(1.3)]])
    matrices = torch.stack((0.9 * rotation, torch.diag(torch.tensor([0.3, -0.7])), torch.zeros(2, 2)))
    z = torch.zeros(3, 2, requires_grad=True)
    radius, vector = deq.nn.spectral_radius((matrices @ z.unsqueeze(2)).squeeze(2), z)
    torch.testing.assert_close(radius, torch.tensor([0.9, 0.7, 0.0]))
    assert vector.shape == z.shape
    for scale in (1e-25, 1e25):  # whose squares float32 does not hold
        radius, _ = deq.nn.spectral_radius((scale * matrices @ z.unsqueeze(2)).squeeze(2), z)
        torch.testing.assert_close(radius / scale, torch.tensor([0.9, 0.7, 0.0]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_jacobian_penalty_in_16_bits(dtype):
    """The sum of squares is beyond float16."""
    z = torch.ones(70000, 2, dtype=dtype, requires_grad=True)
    w = torch.ones((), dtype=dtype, requires_grad=True)
    penalty = deq.nn.jacobian_penalty(w * z, z)
    assert abs(float(penalty.detach()) - 1) < 0.05
    (grad,) = torch.autograd.grad(penalty, w)
    assert abs(float(grad) - 2) < 0.1


@pytest.mark.parametrize("iterations", [0, -1, 2.0])
def test_spectral_radius_by_no_iteration(iterations):
    z = torch.zeros(3, 2, requires_grad=True)
    with pytest.raises(ValueError, match="iterations must be a positive integer; got"):
        deq.nn.spectral_radius(0.5 * z, z, iterations)


def test_correction_loss():
    states = [torch.full((2, 2), float(k), requires_grad=True) for k in range(3)]
    loss = deq.nn.correction_loss(lambda z, y: (z - y).abs().sum(), states, torch.zeros(2, 2), decay=0.5)
    assert float(loss.detach()) == 4 * (0.25 * 0 + 0.5 * 1 + 2)
    loss.backward()
    assert states[1].grad.eq(0.5).all()
    with pytest.raises(ValueError, match="states must not be empty"):
        deq.nn.correction_loss(torch.sum, [])


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


def operator(f, shape):
    """The matrix of a linear map on tensors of that shape."""
    eye = torch.eye(math.prod(shape), dtype=torch.float64)
    return f(eye.reshape(-1, *shape)).reshape(len(eye), -1).T


@pytest.mark.parametrize(("channels", "kernel"), [(1, 3), (3, 3), (2, 1), (2, 5)])
def test_contractive_convolution(channels, kernel):
    torch.manual_seed(channels)
    layer = nn.Conv2d(channels, channels, kernel, padding=kernel // 2, bias=False, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.mul_(5)
    deq.nn.contractive_convolution(layer, 0.9)
    norm = torch.linalg.matrix_norm(operator(layer, (channels, 6, 6)).detach(), 2)
    assert 0.3 < norm <= 0.9 + 1e-12
    x = torch.randn(2, channels, 6, 6, dtype=torch.float64)
    solved = deq.nn.Equilibrium(lambda z, x: torch.relu(layer(z) + x), solver="plain", on_failure="raise")(x)
    solved.sum().backward()
    assert torch.isfinite(layer.parametrizations.weight.original.grad).all()
    with pytest.raises(ValueError, match="layer must have stride 1"):
        deq.nn.contractive_convolution(nn.Conv2d(2, 2, 3, stride=2))
    with pytest.raises(TypeError, match="layer must be a Conv2d; got Linear"):
        deq.nn.contractive_convolution(nn.Linear(2, 2))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_contractive_convolution_in_16_bits(dtype):
    torch.manual_seed(0)
    layer = nn.Conv2d(2, 2, 3, padding=1, bias=False)
    with torch.no_grad():
        layer.weight.mul_(5)
    layer = deq.nn.contractive_convolution(layer.to(dtype), 0.9)
    y = layer(torch.ones(1, 2, 4, 4, dtype=dtype))
    y.sum().backward()
    assert y.dtype == layer.weight.dtype == layer.parametrizations.weight.original.grad.dtype == dtype
    assert deq.nn.convolutions.convolution_norm_bound(layer.weight.detach()) <= 0.9 * (1 + torch.finfo(dtype).eps)


def test_contractive_convolution_that_begins_at_zero():
    """As the last layer of a block often does: it has a gradient."""
    layer = nn.Conv2d(2, 2, 3, padding=1)
    nn.init.zeros_(layer.weight)
    deq.nn.contractive_convolution(layer)
    layer(torch.ones(1, 2, 4, 4)).sum().backward()
    grad = layer.parametrizations.weight.original.grad
    assert torch.isfinite(grad).all() and grad.abs().sum() > 0


@pytest.mark.parametrize("kernel_size", [0, 2, -1, 3.0])
def test_monotone_convolution_of_no_such_kernel(kernel_size):
    with pytest.raises(ValueError, match="kernel_size must be odd and positive; got"):
        deq.nn.MonotoneConv2d(2, kernel_size)


@pytest.mark.parametrize("channels", [0, -1, 2.0])
def test_monotone_convolution_of_no_channels(channels):
    with pytest.raises(ValueError, match="channels must be a positive integer; got"):
        deq.nn.MonotoneConv2d(channels)


@pytest.mark.parametrize("mu", [0.1, 1.0])
def test_monotone_convolution(mu):
    torch.manual_seed(0)
    layer = deq.nn.MonotoneConv2d(2, 3, mu, dtype=torch.float64)
    with torch.no_grad():
        layer.A.add_(0.5 * torch.randn_like(layer.A))
        layer.B.add_(0.5 * torch.randn_like(layer.B))
    W = operator(layer, (2, 5, 5)).detach()
    least = torch.linalg.eigvalsh(torch.eye(50, dtype=torch.float64) - 0.5 * (W + W.T)).amin()
    assert least >= mu - 1e-10
    assert torch.linalg.matrix_norm(W, 2) > 1  # far from a contraction
    x = torch.randn(3, 2, 5, 5, dtype=torch.float64)
    solved = deq.nn.Equilibrium(lambda z, x: torch.relu(layer(z) + x), solver="newton_krylov", depth=60)(x)
    torch.testing.assert_close(solved, torch.relu(layer(solved) + x), rtol=1e-7, atol=1e-8)


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


@pytest.mark.parametrize("kind", ["module", "closure", "fixed_point", "torchdeq", "compiled"])
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
