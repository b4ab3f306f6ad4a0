"""deq.nn.Equilibrium inside of graphs of torch.compile and torch.export: what it does outside of them."""

import io
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

import deq
from deq.torchdeq import get_deq

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch"),
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning"),
]
SOLVERS = ("plain", "anderson", "broyden", "newton_krylov", "auto")


class Block(nn.Module):
    def __init__(self, dropout=0.0):
        super().__init__()
        self.linear, self.dropout = nn.Linear(6, 6).double(), deq.nn.VariationalDropout(dropout)
        with torch.no_grad():
            self.linear.weight.mul_(0.5)

    def forward(self, z, x):
        return torch.tanh(self.dropout(self.linear(z)) + x)


@pytest.fixture(autouse=True)
def afresh():
    torch.compiler.reset()
    torch.manual_seed(0)


@pytest.fixture
def x():
    return torch.randn(4, 6, dtype=torch.float64).requires_grad_()


def compiled(f, backend="aot_eager"):
    return torch.compile(f, fullgraph=True, backend=backend)


def value_and_gradients(f, x, tensors):
    z = f(x)
    return z, *torch.autograd.grad(z.sin().sum(), tensors)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("backward", ["implicit", "phantom", "one_step", "neumann"])
@pytest.mark.parametrize("solver", SOLVERS)
def test_value_and_gradients(x, solver, backward, backend):
    layer = deq.nn.Equilibrium(Block(), solver=solver, backward=backward, tol=1e-12)
    tensors = x, *layer.parameters()
    actual, expected = (value_and_gradients(f, x, tensors) for f in (compiled(layer, backend), layer))
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("backward_solver", SOLVERS)
def test_solvers_of_the_backward_pass(x, backward_solver):
    layer = deq.nn.Equilibrium(Block(), backward_solver=backward_solver, tol=1e-12)
    tensors = x, *layer.parameters()
    actual, expected = (value_and_gradients(f, x, tensors) for f in (compiled(layer), layer))
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_a_call_keeps_its_dropout_masks(x, backend):
    """In its backward pass too, and has others than the calls before and after it."""
    layer = deq.nn.Equilibrium(Block(0.5), tol=1e-12)
    block, seen = layer.block, []
    block.dropout.register_forward_hook(lambda module, inputs, output: seen.append(module.mask))
    f, masks = compiled(layer, backend), []
    for _ in range(3):
        seen.clear()
        z = f(x)
        masks.append(seen[-1])
        f(x)
        actual = z, *torch.autograd.grad(z.sin().sum(), (x, block.linear.weight))
        state = torch.zeros_like(x)
        for _ in range(100):
            state = torch.tanh(block.linear(state) * masks[-1] + x)
        expected = state, *torch.autograd.grad(state.sin().sum(), (x, block.linear.weight))
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-11)
    assert not torch.equal(masks[0], masks[1]) and not torch.equal(masks[1], masks[2])
    layer.eval()
    torch.testing.assert_close(compiled(layer, backend)(x), layer(x), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_evaluation_between_a_call_and_its_backward_pass(x, backend):
    """The backward pass evaluates the block in the mode of the call, masks and all."""
    layer = deq.nn.Equilibrium(Block(0.5), tol=1e-12)
    block, seen = layer.block, []
    block.dropout.register_forward_hook(lambda module, inputs, output: seen.append(module.mask))
    z = compiled(layer, backend)(x)
    mask = seen[-1]
    layer.eval()
    actual = torch.autograd.grad(z.sin().sum(), (x, block.linear.weight))
    state = torch.zeros_like(x)
    for _ in range(100):
        state = torch.tanh(block.linear(state) * mask + x)
    expected = torch.autograd.grad(state.sin().sum(), (x, block.linear.weight))
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-11)
    assert not any(module.training for module in layer.modules())


@pytest.mark.parametrize("inner", [False, True])
def test_dropout_of_a_block_that_is_a_function(x, inner):
    """New masks at every call, and those of the call in its backward pass."""
    torch.manual_seed(0)
    block = Block(0.5)
    f = lambda z, x: block(z, x)  # noqa: E731
    if inner:
        within = deq.nn.Equilibrium(f, tol=1e-13)
        outer = nn.ModuleDict({"within": within})
        outer.forward = lambda z, x: torch.tanh(0.3 * within(z) + x)
        layer = deq.nn.Equilibrium(outer, tol=1e-12, on_failure="raise")
    else:
        layer = deq.nn.Equilibrium(f, tol=1e-12, on_failure="raise")
    seen = []
    block.dropout.register_forward_hook(lambda module, *_: seen.append(module.mask))
    layer = torch.compile(layer, fullgraph=True, backend="aot_eager")
    given = x.detach().clone().requires_grad_()
    z = layer(given)
    mask = seen[-1]
    assert not torch.equal(layer(x), z) and not torch.equal(seen[-1], mask)
    seen.clear()
    found = torch.autograd.grad(z.sum(), given)[0]
    assert all(torch.equal(other, mask) for other in seen)
    own = x.detach().clone().requires_grad_()
    step = lambda z, x: torch.tanh(mask * block.linear(z) + x)  # noqa: E731
    exact = lambda x: deq.fixed_point(lambda z: step(z, x), torch.zeros_like(x), tol=1e-13).z  # noqa: E731
    y = deq.fixed_point(lambda z: torch.tanh(0.3 * exact(z) + own), x, tol=1e-12).z if inner else exact(own)
    torch.testing.assert_close(z, y, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(found, torch.autograd.grad(y.sum(), own)[0], rtol=1e-8, atol=1e-9)


def test_dropout_of_an_inner_layer():
    """Masks are of the outer call."""

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = deq.nn.Equilibrium(Block(0.5), tol=1e-12)

        def forward(self, z, x):
            return torch.tanh(0.3 * self.layer(z) + x)

    layer, x = deq.nn.Equilibrium(Outer(), tol=1e-12, on_failure="raise"), torch.randn(4, 6, dtype=torch.float64)
    x.requires_grad_()
    direction = torch.randn_like(x)
    f = compiled(layer)

    def value(x):
        torch.manual_seed(7)  # the same masks
        return f(x).sin().sum()

    (grad,) = torch.autograd.grad(value(x), x)
    with torch.no_grad():
        difference = (value(x + 1e-5 * direction) - value(x - 1e-5 * direction)) / 2e-5
    torch.testing.assert_close((grad * direction).sum(), difference, rtol=1e-6, atol=0)


def test_one_graph_serves_any_number_of_layers(x):
    """As many as one has, without that torch compiles it anew for each."""
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    for _ in range(12):
        layer = deq.nn.Equilibrium(Block(), tol=1e-12)
        layer.compile(fullgraph=True, backend=counter)
        torch.testing.assert_close(layer(x), deq.nn.Equilibrium(layer.block, tol=1e-12)(x), rtol=1e-10, atol=1e-12)
    assert counter.frame_count == 1


def test_failed_samples_are_solved_and_told_of_once(x):
    """The backward pass goes on from where the solve ended."""
    layer = deq.nn.Equilibrium(Block(), max_iter=2, backward_max_iter=500, tol=1e-12)
    calls = []
    layer.block.forward = lambda z, x, forward=layer.block.forward: calls.append(1) or forward(z, x)
    f = compiled(layer)
    with pytest.warns(deq.ConvergenceWarning, match="4 of 4 samples did not converge"):
        z = f(x)
    calls.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        grads = torch.autograd.grad(z.sin().sum(), (x, *layer.parameters()))
    assert len(calls) == 1 and (layer.solution.status == deq.Status.MAX_ITER).all()
    layer.options["on_failure"] = "ignore"
    torch.testing.assert_close(grads, value_and_gradients(layer, x, (x, *layer.parameters()))[1:])


@pytest.mark.parametrize("backward", ["implicit", "phantom", "one_step", "neumann"])
def test_failed_samples_leave_the_gradients_of_the_others(backward):
    c = torch.tensor([[4.0], [1.0], [3.0]], dtype=torch.float64).expand(3, 4).clone().requires_grad_()
    options = {"solver": "plain", "backward": backward, "on_failure": "ignore", "tol": 1e-12}
    layer = deq.nn.Equilibrium(lambda z, c: torch.sqrt(c - 1.5 * z), **options)
    z, eager = compiled(layer)(c), layer(c)
    torch.testing.assert_close(z, eager)
    ours, theirs = (torch.autograd.grad(t.sum(), c)[0] for t in (z, eager))
    torch.testing.assert_close(ours[[0, 2]], theirs[[0, 2]])


def test_a_block_with_views_that_conjugate_or_negate(x):
    def f(z, x):
        return torch.complex(torch.zeros_like(z), 0.5 * torch.tanh(z) + x).conj().imag

    layer = deq.nn.Equilibrium(f, tol=1e-12)
    torch.testing.assert_close(*(value_and_gradients(g, x, (x,)) for g in (compiled(layer), layer)))


def test_a_module_that_a_block_has_twice(x):
    """Its parameters are its own again after a call."""

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = self.second = nn.Linear(6, 6, dtype=torch.float64)

        def forward(self, z, x):
            return torch.tanh(0.3 * self.second(self.first(z)) + x)

    layer = deq.nn.Equilibrium(Twice(), tol=1e-12)
    tensors = x, *layer.parameters()
    for _ in range(2):
        actual, expected = (value_and_gradients(f, x, tensors) for f in (compiled(layer), layer))
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)
        assert all(a is b for a, b in zip(layer.parameters(), tensors[1:], strict=True))


def test_threads_that_share_a_compiled_layer(x):
    """None finds in the block what another has put there."""
    layer = deq.nn.Equilibrium(Block(), tol=1e-12)
    program, tensors = compiled(layer), (x, *layer.parameters())
    expected = value_and_gradients(program, x, tensors)

    def work(_):
        found = value_and_gradients(program, x, tensors)
        return all(map(torch.equal, found, expected))

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(4) as pool:
            assert all(pool.map(work, range(40)))
    finally:
        sys.setswitchinterval(interval)
    assert all(a is b for a, b in zip(layer.parameters(), tensors[1:], strict=True))


@pytest.mark.parametrize("kind", [tuple, list])
def test_states_of_several_tensors(x, kind):
    """They are of the kind of the start, for the block and for the caller."""

    def f(z, x):
        assert type(z) is kind
        return kind((torch.tanh(0.3 * z[1] + x), torch.sin(z[0])))

    layer = deq.nn.Equilibrium(f, init=lambda x: kind((torch.zeros_like(x), torch.zeros_like(x))), tol=1e-12)
    actual, expected = compiled(layer)(x), layer(x)
    assert type(actual) is type(expected) is kind
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)
    grads = [torch.autograd.grad((z[0] * z[1]).sum(), x)[0] for z in (actual, expected)]
    torch.testing.assert_close(*grads, rtol=1e-10, atol=1e-12)


def test_complex_parameters_and_inputs(x):
    """They have gradients as real ones do."""

    class Filter(nn.Module):
        def __init__(self):
            super().__init__()
            self.gain = nn.Parameter(torch.randn(6, dtype=torch.complex128))

        def forward(self, z, x, shift):
            return torch.tanh(0.1 * torch.fft.ifft(torch.fft.fft(z) * (self.gain + shift)).real + x)

    torch.manual_seed(0)
    layer = deq.nn.Equilibrium(Filter(), tol=1e-12)
    tensors = x, torch.randn(6, dtype=torch.complex128, requires_grad=True), layer.block.gain
    actual, expected = (torch.autograd.grad(f(*tensors[:2]).sin().sum(), tensors) for f in (compiled(layer), layer))
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("backward", ["implicit", "phantom", "one_step", "neumann"])
def test_a_block_that_uses_no_tensor(x, backward):
    layer = deq.nn.Equilibrium(lambda z, x: torch.cos(z), backward=backward)
    assert not torch.autograd.grad(compiled(layer)(x).sum(), x)[0].any()


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_without_gradients(x, dropout):
    layer = deq.nn.Equilibrium(Block(dropout), tol=1e-12)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            z = compiled(layer)(x.detach())
            assert torch.isfinite(z).all() and not z.requires_grad


@pytest.mark.filterwarnings("ignore:The given buffer is not writable:UserWarning")  # of torch 2.11
def test_export(x):
    """The exported program finds its layer, saved and loaded in the same process too."""
    layer, x = deq.nn.Equilibrium(Block(), tol=1e-12).eval(), x.detach()
    program, file = torch.export.export(layer, (x,)), io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    for found in (program, torch.export.load(file)):
        torch.testing.assert_close(found.module()(x), layer(x), rtol=1e-10, atol=1e-12)


def test_tangents_are_refused(x):
    """torch drops those of operators that have no rule for them."""
    layer, x = deq.nn.Equilibrium(Block()), x.detach()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="forward mode is not available for"):
        compiled(lambda x: torch.func.jvp(layer, (x,), (x,))[1])(x)


@pytest.mark.parametrize("mode", ["real", "fake"])
@pytest.mark.parametrize("kind", ["fixed_point", "Equilibrium", "get_deq"])
def test_a_trace_is_refused(x, kind, mode):
    """Its numbers would be those of the trace, or none at all."""
    x = x.detach()
    f = {
        "fixed_point": lambda x: deq.fixed_point(lambda z: torch.tanh(0.3 * z + x), torch.zeros_like(x)).z,
        "Equilibrium": deq.nn.Equilibrium(lambda z, x: torch.tanh(0.3 * z + x)),
        "get_deq": lambda x: get_deq()(lambda z: torch.tanh(0.3 * z + x), torch.zeros_like(x))[0][-1],
    }[kind]
    for trace in (lambda: make_fx(f, tracing_mode=mode)(x), lambda: torch.func.linearize(f, x)):
        with pytest.raises(RuntimeError, match=r"torch\.func\.linearize cannot trace a fixed point of a function"):
            trace()


@pytest.mark.filterwarnings("ignore:`torch.jit.trace:DeprecationWarning")
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("kind", ["Equilibrium", "get_deq"])
def test_a_trace_of_torchscript_is_refused(x, kind, grad):
    """With gradients the process would end there, without them the numbers would be those of the trace."""
    f = {
        "Equilibrium": deq.nn.Equilibrium(lambda z, x: torch.tanh(0.3 * z + x)),
        "get_deq": lambda x: get_deq()(lambda z: torch.tanh(0.3 * z + x), torch.zeros_like(x))[0][-1],
    }[kind]
    with torch.set_grad_enabled(grad), pytest.raises(RuntimeError, match=r"torch\.jit\.trace cannot trace a fixed"):
        torch.jit.trace(f, x)
