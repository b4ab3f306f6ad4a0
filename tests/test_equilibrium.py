"""deq.nn.Equilibrium: the layer around any block."""

import copy
import io
import pickle
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import deq
from deq import cached_weights, members
from deq.torchdeq import get_deq


class Block(nn.Module):
    """A small convolutional block: ``relu(z / 2 + conv(relu(conv(z) + x)))``, normalised."""

    def __init__(self, channels: int = 4, dtype=torch.float64):
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1, dtype=dtype)
        self.second = nn.Conv2d(channels, channels, 3, padding=1, dtype=dtype)
        self.norm = nn.GroupNorm(2, channels, dtype=dtype)

    def forward(self, z, x):
        return torch.tanh(0.3 * self.norm(z + self.second(torch.relu(self.first(z) + x))))


@pytest.fixture
def block():
    torch.manual_seed(0)
    return Block()


@pytest.fixture
def x():
    return torch.randn(3, 4, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def unrolled(block, x, steps=200):
    z = torch.zeros_like(x)
    for _ in range(steps):
        z = block(z, x)
    return z


@pytest.mark.parametrize("solver", ["plain", "anderson", "broyden", "newton_krylov", "auto"])
def test_value_and_gradients(block, x, solver):
    x.requires_grad_()
    layer = deq.nn.Equilibrium(block, solver=solver, tol=1e-11, on_failure="raise")
    z = layer(x)
    expected = unrolled(block, x)
    torch.testing.assert_close(z, expected, rtol=1e-9, atol=1e-11)
    g = torch.randn_like(z)
    inputs = (x, *block.parameters())
    for ours, theirs in zip(torch.autograd.grad(z, inputs, g), torch.autograd.grad(expected, inputs, g), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-10)
    assert layer.solution.converged.all() and not layer.solution.z.requires_grad


def test_gradients_in_evaluation(block, x):
    layer = deq.nn.Equilibrium(block).eval()
    assert layer(x).requires_grad
    with torch.no_grad():
        assert not layer(x).requires_grad


def test_start(block, x):
    layer = deq.nn.Equilibrium(block)
    cold = layer(x)
    iterations = layer.solution.iterations
    assert torch.equal(layer(x, z0=torch.zeros_like(x)), cold)
    layer(x, z0=cold.detach())
    assert (layer.solution.iterations < iterations).all()
    wide = deq.nn.Equilibrium(
        lambda z, x: torch.tanh(0.5 * z + x.sum(1, keepdim=True)), init=lambda x: x.new_zeros(3, 6)
    )
    assert wide(torch.ones(3, 2)).shape == (3, 6)
    with pytest.raises(ValueError, match="z0 must be given, or init"):
        layer()


@pytest.mark.parametrize("z0", [3.0, "zeros", (), [1.0, 2.0], {"z": torch.zeros(3, 6)}])
def test_a_start_that_is_no_state(block, x, z0):
    with pytest.raises(TypeError, match=r"z0 must be a torch\.Tensor, or a tuple or list of them; got"):
        deq.nn.Equilibrium(block)(x, z0=z0)


def test_several_states_and_inputs():
    f = lambda z, x, y: (torch.tanh(0.3 * z[1] + x), torch.sin(0.5 * z[0] + y))  # noqa: E731
    layer = deq.nn.Equilibrium(f, init=lambda x, y: (torch.zeros_like(x), torch.zeros_like(y)), on_failure="raise")
    x, y = torch.randn(4, 3), torch.randn(4, 3)
    a, b = layer(x, y)
    torch.testing.assert_close(a, torch.tanh(0.3 * b + x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(b, torch.sin(0.5 * a + y), rtol=1e-4, atol=1e-5)


def test_copies_and_state(block, x):
    layer = deq.nn.Equilibrium(block, solver="plain")
    z = layer(x)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert twin.solution is None and torch.equal(twin(x), z)
    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    buffer.seek(0)
    other = deq.nn.Equilibrium(Block(), solver="plain")
    other.load_state_dict(torch.load(buffer))
    assert torch.equal(other(x), z)
    assert "solver='plain'" in repr(layer)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
@pytest.mark.parametrize("kind", ["layer", "function"])
def test_a_scripted_block(block, x, kind):
    scripted = torch.jit.script(block)
    if kind == "layer":
        ours, eager = (deq.nn.Equilibrium(f)(x) for f in (scripted, block))
    else:
        ours, eager = (deq.fixed_point(lambda z: f(z, x), torch.zeros_like(x)).z for f in (scripted, block))  # noqa: B023
    torch.testing.assert_close(ours, eager, rtol=1e-9, atol=1e-11)
    for a, b in zip(
        torch.autograd.grad(ours.sum(), list(scripted.parameters())),
        torch.autograd.grad(eager.sum(), list(block.parameters())),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


def test_unknown_option(block):
    with pytest.raises(TypeError, match=r"deq.nn.Equilibrium has no option f_tol=0.1; did you mean 'tol'\?"):
        deq.nn.Equilibrium(block, f_tol=0.1)
    with pytest.raises(TypeError, match="block must be a module or function; got int"):
        deq.nn.Equilibrium(3)


def test_autocast(block, x):
    """The block runs in the precision of its state, forward and backward."""
    block, x = block.float(), x.float()
    layer = deq.nn.Equilibrium(block, on_failure="raise")
    seen = []
    block.first.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    plain = torch.autograd.grad(layer(x).sum(), block.first.weight)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z = layer(x.bfloat16())
        gradient = torch.autograd.grad(z.sum(), block.first.weight)[0]
    assert set(seen) == {torch.float32} and z.dtype == torch.float32
    torch.testing.assert_close(gradient, plain, rtol=0.1, atol=0.02 * float(plain.abs().max()))  # x was rounded


def test_multiscale_block_behind_a_layer_under_autocast():
    torch.manual_seed(0)
    block, stem, x = deq.nn.MultiscaleBlock([4, 8]), nn.Conv2d(3, 4, 1), torch.randn(2, 3, 8, 8)
    layer = deq.nn.Equilibrium(block, init=block.start, on_failure="raise")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z = layer(stem(x))
    assert [part.dtype for part in z] == [torch.float32, torch.float32]
    torch.testing.assert_close(z, layer(stem(x)), rtol=0.05, atol=0.05)


def test_multiscale_classifier_of_digits():
    """Three resolutions solved together tell real handwritten digits apart after a few steps of training."""
    datasets = pytest.importorskip("sklearn.datasets", reason="scikit-learn is not installed (bench extra)")
    torch.manual_seed(0)
    digits = datasets.load_digits()
    images = torch.from_numpy(digits.images).float().unsqueeze(1)[:384] / 8 - 1
    labels = torch.from_numpy(digits.target)[:384]
    block = deq.nn.MultiscaleBlock((8, 8, 16))
    layer = deq.nn.Equilibrium(block, init=block.start, tol=1e-3)
    stem, head = nn.Conv2d(1, 8, 3, padding=1), nn.Linear(8 + 8 + 16, 10)

    def logits(x):
        return head(torch.cat([part.amax((2, 3)) for part in layer(stem(x))], 1))

    optimizer = torch.optim.Adam([*stem.parameters(), *layer.parameters(), *head.parameters()], lr=1e-2)
    losses = []
    for step in range(24):
        rows = slice(64 * (step % 5), 64 * (step % 5) + 64)
        loss = nn.functional.cross_entropy(logits(images[rows]), labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert layer.solution.converged.all() and [tuple(z.shape[1:]) for z in layer.solution.z] == [
        (8, 8, 8),
        (8, 4, 4),
        (16, 2, 2),
    ]
    with torch.no_grad():
        accuracy = (logits(images[320:]).argmax(1) == labels[320:]).float().mean()
    assert accuracy > 0.5 and losses[-1] < 0.6 * losses[0]
    with pytest.raises(ValueError, match="x must have height and width divisible by 4; got 6 and 8"):
        block.start(torch.zeros(1, 8, 6, 8))
    for shape in ((8, 8, 8), (1, 4, 8, 8)):
        with pytest.raises(ValueError, match=r"x must be \(B, 8, H, W\); got"):
            block.start(torch.zeros(shape))
    with pytest.raises(ValueError, match="channels must be multiples of groups"):
        deq.nn.MultiscaleBlock((6, 8))
    with pytest.raises(ValueError, match="groups must be a positive integer; got 0"):
        deq.nn.MultiscaleBlock((4, 8), groups=0)


class Switching(nn.Module):
    """``tanh(w z + x)`` with one of two weights, and what else is given to it between calls."""

    def __init__(self):
        super().__init__()
        self.weights = nn.ParameterList(nn.Parameter(torch.tensor(w, dtype=torch.float64)) for w in (0.5, -0.4))
        self.number, self.outside = 0, 0.0

    def forward(self, z, x):
        return torch.tanh(self.weights[self.number] * z + x + self.outside)


class TestWatchedOnce:
    """A block that uses nothing but its inputs and parameters is watched in the first call only."""

    @pytest.fixture
    def layer(self):
        return deq.nn.Equilibrium(Switching(), tol=1e-12)

    @pytest.fixture
    def x(self):
        return torch.linspace(-1, 1, 12, dtype=torch.float64).view(3, 4).requires_grad_()

    @staticmethod
    def check(layer, x, *tensors):
        expected = torch.autograd.grad(unrolled(layer.block, x).sum(), tensors)
        for ours, theirs in zip(torch.autograd.grad(layer(x).sum(), tensors), expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)

    def test_later_calls_make_no_graph_before_the_backward_pass(self, layer, x):
        graphs = []
        layer.block.register_forward_hook(lambda block, inputs, image: graphs.append(image.requires_grad))
        for expected in (1, 0, 0):
            graphs.clear()
            z = layer(x)
            assert sum(graphs) == expected
            z.sum().backward()
            assert sum(graphs) == expected + 1

    def test_another_parameter(self, layer, x):
        for number in (0, 1, 0):
            layer.block.number = number
            self.check(layer, x, x, layer.block.weights[number])

    def test_a_new_parameter_and_one_that_is_thawed(self, layer, x):
        layer.block.weights[0].requires_grad_(False)
        self.check(layer, x, x)
        layer.block.weights[0].requires_grad_()
        self.check(layer, x, x, layer.block.weights[0])
        layer.block.weights[0] = nn.Parameter(torch.tensor(0.3, dtype=torch.float64))
        self.check(layer, x, x, layer.block.weights[0])

    @pytest.mark.parametrize("leaf", [True, False])
    @pytest.mark.parametrize("twice", [True, False])
    def test_a_tensor_that_comes_in_later_is_refused_once_and_then_found(self, layer, x, leaf, twice):
        layer(x)
        source = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
        layer.block.outside = source if leaf else source.clone()
        with pytest.raises(RuntimeError, match="not seen to use"):
            torch.autograd.grad(layer(x).sum(), x, create_graph=twice)
        self.check(layer, x, x, source)
        self.check(layer, x, x, source)

    def test_a_block_without_gradients_is_watched_again(self, layer, x):
        layer.block.requires_grad_(False)
        assert not layer(x.detach()).requires_grad
        layer.block.outside = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
        self.check(layer, x.detach(), layer.block.outside)

    @pytest.mark.parametrize("kind", ["leaf", "parameter", "computed"])
    def test_parameters_that_were_exchanged_for_the_call_alone(self, layer, x, kind):
        """They are differentiated, and not the layer's own, which are back in the backward pass."""
        own = dict(layer.named_parameters())
        halves = {name: (p.detach() / 2).requires_grad_() for name, p in own.items()}
        if kind == "parameter":
            halves = {name: nn.Parameter(p) for name, p in halves.items()}
        used, unused = (f"block.weights.{i}" for i in (0, 1))
        twin = copy.deepcopy(layer.block)
        twin.load_state_dict({name.removeprefix("block."): p.detach() for name, p in halves.items()})
        expected = torch.autograd.grad(unrolled(twin, x).sum(), (x, twin.weights[0]))
        for twice in (False, True):
            others = {name: 1 * p for name, p in halves.items()} if kind == "computed" else halves
            z = torch.func.functional_call(layer, others, (x,))
            inputs = (x, halves[used], halves[unused], *layer.parameters())
            grads = torch.autograd.grad(z.sum(), inputs, create_graph=twice, allow_unused=True)
            torch.testing.assert_close(grads[:2], expected, rtol=1e-9, atol=1e-11)
            assert not any(grad.any() for grad in grads[2:] if grad is not None)
        assert all(p is own[name] for name, p in layer.named_parameters())


class Normed(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.utils.parametrizations.weight_norm(nn.Linear(6, 6))

    def forward(self, z, x):
        return torch.tanh(0.3 * self.linear(z) + x)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("kind", ["init", "z0", "linear"])
def test_a_start_that_autocast_made(kind, compiled):
    """It has 16 bits, and the block, which runs without autocast, float32."""
    torch.manual_seed(0)
    encoder, x = nn.Linear(6, 6), torch.randn(3, 6)
    layer = deq.nn.EquilibriumLinear(6, 6) if kind == "linear" else deq.nn.Equilibrium(Normed())
    if kind == "init":
        layer.init = encoder
    f = torch.compile(layer, fullgraph=True, backend="aot_eager") if compiled else layer
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z = f(x) if kind == "init" else f(x, z0=encoder(x).detach())
        expected = layer(x, z0=encoder(x).float())
    assert z.dtype == torch.float32
    torch.testing.assert_close(z, expected, rtol=1e-4, atol=1e-4)
    z.sum().backward()


@pytest.mark.parametrize("late", [False, True])
def test_hooks_of_parameters_that_a_block_does_not_use(late):
    """They are not called, as torch calls none of a tensor without a gradient; the others are, with theirs."""
    torch.manual_seed(0)
    block, x = Normed(), torch.randn(3, 6)
    block.spare = nn.Linear(6, 6)
    layer = deq.nn.Equilibrium(block)
    if late:  # when the layer already knows what its block uses
        layer(x).sum().backward()
        layer.zero_grad()
    for parameter in block.parameters():
        parameter.register_hook(lambda grad: grad.clamp(-1e-3, 1e-3))
    for _ in range(2):
        layer.zero_grad()
        layer(x).sum().backward()
        assert block.linear.bias.grad.abs().amax() == torch.tensor(1e-3) and block.spare.weight.grad is None


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("kind", ["module", "closure"])
def test_weights_that_a_caller_caches(kind, inside):
    """The caller's are computed once, before, between and after solves; the gradient is the same, wherever it is taken:
    in the context or, as torch's documentation does it, afterwards."""
    torch.manual_seed(0)
    block, x = Normed(), torch.randn(3, 6)
    layer = deq.nn.Equilibrium(block if kind == "module" else lambda z, x: block(z, x))
    parameters = list(block.parameters())
    expected = torch.autograd.grad(layer(x).sum() + layer(2 * x).sum(), parameters)
    with nn.utils.parametrize.cached():
        before = block.linear.weight
        z = layer(x).sum()
        assert block.linear.weight is before
        z = z + layer(2 * x).sum()
        assert block.linear.weight is before
        if inside:
            found = torch.autograd.grad(z, parameters)
    if not inside:
        found = torch.autograd.grad(z, parameters)
    assert block.linear.weight is not before
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("way", ["Equilibrium", "torchdeq"])
def test_an_interrupt_where_a_context_is_left(way, monkeypatch):
    """Python may see Ctrl-C before anything of ``__exit__`` has run: the next solve computes its weights all the same,
    and draws its dropout masks."""

    def interrupted(context, *_):
        raise KeyboardInterrupt

    torch.manual_seed(0)
    block, drop = Normed().double(), deq.nn.VariationalDropout(0.5)
    x = torch.randn(2, 6, dtype=torch.float64)
    layer = deq.nn.Equilibrium(lambda z, x: drop(block(z, x)), tol=1e-12)
    if way == "Equilibrium":
        solve = layer
    else:
        solver = get_deq(f_tol=1e-12, f_max_iter=200)
        solve = lambda x: solver(lambda z: drop(block(z, x)), torch.zeros_like(x))[0][-1]  # noqa: E731
    counts = cached_weights._entered, parametrize._cache_enabled
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(cached_weights.CachedWeights, "__exit__", interrupted)
        solve(x)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.mul_(0.5)
    mask = drop.mask
    z = solve(x)
    assert way == "torchdeq" or drop.mask is not mask
    torch.testing.assert_close(z, drop(block(z, x)), rtol=1e-10, atol=1e-11)
    assert torch.autograd.grad(z.sum(), list(block.parameters()))[0].any()
    cached_weights._entered, parametrize._cache_enabled = counts


@pytest.mark.parametrize("where", ["entered", "left"])
def test_an_interrupt_where_a_backward_pass_has_the_parameters_of_a_call(where, monkeypatch):
    """The module has its own again, and not those that functional_call gave it."""
    layer, x = deq.nn.Equilibrium(Normed()), torch.randn(2, 6)
    own = dict(layer.named_parameters())
    given = {name: (1.1 * parameter).detach().requires_grad_() for name, parameter in own.items()}
    loss = torch.func.functional_call(layer, given, (x,)).sum()

    def interrupted(context, *_):
        enter(context)
        raise KeyboardInterrupt

    enter = members.Exchanged.__enter__ if where == "entered" else lambda context: None
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(members.Exchanged, "__enter__" if where == "entered" else "__exit__", interrupted)
        loss.backward()
    assert all(parameter is own[name] for name, parameter in layer.named_parameters())
    assert members.enclosed.depth == 0


@pytest.mark.parametrize("way", ["fixed_point", "torchdeq"])
def test_an_interrupt_where_spectral_norms_go_on(way, monkeypatch):
    """They go on, and layers are not taken for parts of another one, whose masks they would keep."""

    def interrupted(context, *_):
        raise KeyboardInterrupt

    linear, x = nn.utils.spectral_norm(nn.Linear(4, 4)), torch.randn(2, 4)
    hooks = linear._forward_pre_hooks
    f = lambda z: torch.tanh(0.3 * linear(z) + x)  # noqa: E731
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(members.Exchanged, "__exit__", interrupted)
        deq.fixed_point(f, x) if way == "fixed_point" else get_deq()(f, x)
    assert linear._forward_pre_hooks is hooks
    assert members.enclosed.depth == 0


@pytest.mark.parametrize("name", ["autocast_increment_nesting", "_set_grad_enabled"])
def test_an_interrupt_right_after_a_mode_of_torch_was_changed(name):
    """Python may see Ctrl-C after any call: gradients are on as before, and no autocast is thought to be around."""
    layer, x = deq.nn.Equilibrium(Normed()), torch.randn(2, 6)

    def interrupt(frame, event, function):
        is_ours = frame.f_globals["__name__"].startswith("deq.")
        if event == "c_return" and function.__name__ == name and is_ours:
            sys.setprofile(None)
            raise KeyboardInterrupt

    before = sys.getprofile()
    try:
        sys.setprofile(interrupt)
        with suppress(KeyboardInterrupt):
            layer(x)
    finally:
        sys.setprofile(before)
        depth = [torch.autocast_increment_nesting(), torch.autocast_decrement_nesting()][1]
        grad = torch.is_grad_enabled()
        for _ in range(depth):
            torch.autocast_decrement_nesting()
        torch.set_grad_enabled(True)
    assert grad and depth == 0


def test_threads_that_train_a_parametrised_layer_keep_its_gradients():
    """What one thread remembers of a solve, computed without gradients, is not handed to another."""
    torch.manual_seed(0)
    layer, x = deq.nn.Equilibrium(Normed()), torch.randn(3, 6)
    parameters = list(layer.parameters())
    expected = torch.autograd.grad(layer(x).sum(), parameters)

    def work(_):
        found = torch.autograd.grad(layer(x).sum(), parameters, allow_unused=True)
        return all(g is not None and torch.allclose(g, e) for g, e in zip(found, expected, strict=True))

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    try:
        with ThreadPoolExecutor(4) as pool:
            assert all(pool.map(work, range(200)))
    finally:
        sys.setswitchinterval(interval)
    assert nn.utils.parametrize._cache_enabled == 0 and type(nn.utils.parametrize._cache) is dict


@pytest.mark.parametrize("around", ["nothing", "autocast"])
def test_a_block_whose_first_parameter_is_of_integers(around):
    """The state has the dtype of the first one that is not."""

    class Shuffled(nn.Module):
        def __init__(self):
            super().__init__()
            self.places = nn.Parameter(torch.arange(4), requires_grad=False)
            self.linear = nn.Linear(4, 4)

        def forward(self, z, x):
            return torch.tanh(0.3 * self.linear(z)[:, self.places] + x)

    x = torch.randn(3, 4)
    with torch.autocast("cpu", enabled=around == "autocast"):
        layer = deq.nn.Equilibrium(Shuffled() if around == "autocast" else Shuffled().double())
        z = layer(nn.Linear(4, 4)(x))
    assert z.dtype is layer.block.linear.weight.dtype
    z.sum().backward()
