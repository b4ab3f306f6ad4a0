"""deq.solve inside of graphs of torch.compile and torch.export: to the bit what it does outside of them."""

import subprocess
import sys
import warnings

import pytest
import torch
from problems import gaussian
from recorder import Recorder
from torch import nn
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jvp, vmap

import deq
from deq import _library, weights

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch"),
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning"),
]
BACKENDS = ["reference"] + (["cpu"] if _library.compiled is not None else [])


@pytest.fixture(autouse=True)
def afresh():
    torch.compiler.reset()


def compiled(f):
    return torch.compile(f, fullgraph=True, backend="aot_eager")


def monotone(m=48, B=5):
    """One that the plain iteration diverges on."""
    torch.manual_seed(3)
    A, S = torch.randn(2, m, m) / m**0.5
    return 0.9 * torch.eye(m) - 4 * A.mT @ A + S - S.mT, torch.randn(B, m)


def value_and_gradients(f, tensors):
    leaves = [t.clone().requires_grad_() for t in tensors]
    z = f(*leaves)
    return z.detach(), *torch.autograd.grad(z.square().sum(), leaves)


def same(f, tensors):
    for ours, eager in zip(value_and_gradients(compiled(f), tensors), value_and_gradients(f, tensors), strict=True):
        assert ours.dtype == eager.dtype and torch.equal(ours, eager)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("activation", ["relu", "gelu"])  # the derivative from z, or from one more product
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("samples", [(), (3,), (2, 3), (0,)])
def test_same_bits_as_outside(backend, activation, dtype, samples):
    W, c, _ = gaussian(17, 6, dtype)
    c = c[0] if samples == () else c[: 3 * (len(samples) - 1) + samples[-1]].reshape(*samples, 17)
    if samples == (0,):
        c = c[:0]
    same(lambda W, c: deq.solve(W, c, activation, backend=backend).z, (W, c))


def test_stacked_weights():
    W, c, _ = gaussian(12, 4)
    same(lambda W, c: deq.solve(W, c).z, (torch.stack((W, -W)), torch.stack((c, 2 * c))))


@pytest.mark.parametrize("samples", [5, 200])
@pytest.mark.parametrize("activation", ["relu", "gelu", "identity"])
@pytest.mark.parametrize("structure", ["lower", "strict", "diagonal", "low rank"])
def test_structures_keep_their_methods(structure, activation, samples):
    """5 samples of a low rank are iterated on the dense matrix, 200 reduced."""
    torch.manual_seed(0)
    m = 96
    parts = {
        "lower": lambda: (torch.randn(m, m) * 0.05,),
        "strict": lambda: (torch.randn(m, m) * 0.05,),
        "diagonal": lambda: (torch.rand(m) * 0.9,),
        "low rank": lambda: (torch.rand(m) * 0.5, *(torch.randn(2, m, 3) * 0.05)),
    }[structure]()
    make = {
        "lower": weights.LowerTriangular,
        "strict": lambda W: weights.LowerTriangular(W, strict=True),
        "diagonal": weights.Diagonal,
        "low rank": weights.DiagonalLowRank,
    }[structure]
    f = lambda c, *parts: deq.solve(make(*parts), c, activation).z  # noqa: E731
    tensors = torch.randn(samples, m), *parts
    for ours, eager in zip(value_and_gradients(compiled(f), tensors), value_and_gradients(f, tensors), strict=True):
        torch.testing.assert_close(ours, eager, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_samples_that_need_other_means_get_them(backend):
    W, c = monotone()
    assert not deq.solve(W, c, backend=backend, solver="plain", on_failure="ignore").converged.any()
    same(lambda W, c: deq.solve(W, c, backend=backend, on_failure="raise").z, (W, c))


def test_what_is_said_of_the_samples():
    W, c, _ = gaussian(20, 4)

    @compiled
    def run(W, c):
        solution = deq.solve(W, c)
        return solution.iterations, solution.residual, solution.status, solution.converged

    expected = deq.solve(W, c)
    assert torch.equal(run(W, c)[0], expected.iterations) and torch.equal(run(W, c)[1], expected.residual)
    assert torch.equal(run(W, c)[2], expected.status) and run(W, c)[3].all()


def test_failures_are_told():
    W, c, _ = gaussian(8, 3)
    run = lambda on_failure: compiled(lambda c: deq.solve(W, c, max_iter=2, on_failure=on_failure).z)(c)  # noqa: E731
    with pytest.warns(deq.ConvergenceWarning, match="3 of 3 samples did not converge"):
        run("warn")
    with pytest.raises(deq.ConvergenceError, match="3 of 3"):
        run("raise")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run("ignore")
    bad = c.clone().reshape(1, 3, 8)
    bad[0, 2, 1] = torch.nan
    with pytest.raises(ValueError, match=r"c must be finite; c\[0, 2\] holds NaN"):
        compiled(lambda c: deq.solve(W, c).z)(bad)


def test_nothing_for_the_compiler_to_complain_of():
    layer = deq.nn.EquilibriumLinear(3, 16)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        torch.compile(layer, fullgraph=True, backend="aot_eager")(torch.randn(4, 3)).sum().backward()


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"tol": -1.0}, "tol must be positive"),
        ({"solver": "newton"}, "solver must be one of"),
        ({"backward": "jfb"}, "backward must be one of"),
        ({"backward": "unrolled"}, "'unrolled' is not available inside torch.compile"),
        ({"solver": "direct"}, "solver='direct' cannot solve this"),
    ],
)
def test_wrong_options_are_named(option, message):
    W, c, _ = gaussian(4, 2)
    with pytest.raises(Exception, match=message):
        compiled(lambda W, c: deq.solve(W, c, **option).z)(W, c)


@pytest.mark.parametrize("backward", ["one_step", "phantom"])
def test_inexact_gradients(backward):
    W, c, _ = gaussian(9, 4)
    same(lambda W, c: deq.solve(W, c, "tanh", backward=backward).z, (W, c))


LOSS = lambda W, c: deq.solve(W, c, "tanh", tol=1e-12).z.square().sum()  # noqa: E731
TRANSFORMS = {
    "grad": grad(LOSS, (0, 1)),
    "grad of grad": grad(lambda W, c: grad(LOSS)(W, c).square().sum(), (0, 1)),
    "gradients of every sample": vmap(grad(LOSS, (0, 1)), (None, 0)),
    "gradients of every weight": vmap(grad(LOSS, (0, 1)), (0, None)),
    "solutions of every pair": vmap(lambda W, c: deq.solve(W, c, "tanh").z),
    "tangent": lambda W, c: jvp(LOSS, (W, c), (W, c))[1],
    "tangents of every weight": jacfwd(lambda W, c: deq.solve(W, c, "gelu").z, 0),
    "tangents of every sample": jacfwd(lambda W, c: deq.solve(W, c, "gelu").z, 1),
    "tangent of a gradient": lambda W, c: jvp(grad(LOSS, (0, 1)), (W, c), (W, c))[1],
    "tangent of a tangent": lambda W, c: jvp(lambda W, c: jvp(LOSS, (W, c), (W, c))[1], (W, c), (W, c))[1],
    "gradient of a tangent": grad(lambda W, c: jvp(LOSS, (W, c), (W, c))[1], (0, 1)),
    "hessian": hessian(LOSS, 1),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transforms_inside_of_a_graph(transform):
    W, c, _ = gaussian(6, 3, torch.float64)
    if transform in ("gradients of every weight", "solutions of every pair"):
        W = torch.stack((W, -W))
    if transform in ("gradients of every sample", "solutions of every pair"):
        c = torch.stack((c, 2 * c))
    f = TRANSFORMS[transform]
    ours, eager = compiled(f)(W, c), f(W, c)
    if isinstance(eager, torch.Tensor):
        ours, eager = (ours,), (eager,)
    for a, b in zip(ours, eager, strict=True):
        assert b.abs().max() > 0
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


def test_transforms_of_a_structure_inside_of_a_graph():
    torch.manual_seed(1)
    d, c = torch.rand(2, 7, dtype=torch.float64), torch.randn(3, 7, dtype=torch.float64)
    loss = lambda d, c: deq.solve(weights.Diagonal(d), c, "tanh", tol=1e-12).z.square().sum()  # noqa: E731
    f = vmap(grad(loss, (0, 1)), (0, None))
    for ours, eager in zip(compiled(f)(d, c), f(d, c), strict=True):
        torch.testing.assert_close(ours, eager, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("structure", ["lower_triangular", "diagonal", "diagonal_low_rank"])
def test_tangents_of_a_structure_inside_of_a_graph(structure):
    W, c, _ = gaussian(5, 3, torch.float64, scale=0.4)
    make = {
        "lower_triangular": weights.LowerTriangular,
        "diagonal": lambda W: weights.Diagonal(W.diagonal()),
        "diagonal_low_rank": lambda W: weights.DiagonalLowRank(W[0], W[:, :2], W[:, 2:4]),
    }[structure]
    f = lambda W, c: jvp(lambda W, c: deq.solve(make(W), c, "tanh", tol=1e-13).z, (W, c), (c[:1] * W, c))[1]  # noqa: E731
    torch.testing.assert_close(compiled(f)(W, c), f(W, c), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("transform", ["vmap", "jvp"])
def test_what_leaves_the_range_of_16_bits_inside_of_a_graph(transform):
    """It is solved with the dense matrix in float32, and what was rounded to infinity passed for converged."""
    d, factor = torch.full((2, 6), 0.99, dtype=torch.float16), torch.zeros(6, 2, dtype=torch.float16)
    c = torch.ones(3, 6, dtype=torch.float16)
    c[0] = 3000.0

    def f(d):
        solution = deq.solve(weights.DiagonalLowRank(d, factor, factor), c, on_failure="ignore")
        return solution.z, solution.status

    g = vmap(f) if transform == "vmap" else lambda d: jvp(f, (d[0],), (d[0],))[0]
    z, status = compiled(g)(d)
    assert bool(z.isfinite().all()) and torch.equal(z, g(d)[0])
    assert torch.equal(status, g(d)[1]) and status.reshape(-1, 3)[0].tolist() == [deq.Status.DIVERGED, 0, 0]


def test_tangents_of_inexact_gradients_inside_of_a_graph():
    W, c, _ = gaussian(5, 3, torch.float64)
    for backward in ("one_step", "phantom"):
        f = lambda c: jvp(lambda c: deq.solve(W, c, "tanh", backward=backward).z, (c,), (c,))[1]  # noqa: E731, B023
        torch.testing.assert_close(compiled(f)(c), f(c), rtol=1e-9, atol=1e-11)
        torch.compiler.reset()


def test_tangents_of_inexact_gradients_inside_of_a_graph_without_gradients():
    """They were zero: torch.no_grad is not about tangents."""
    W, c, _ = gaussian(8, 5)

    def f(c):
        with torch.no_grad():
            return jvp(lambda c: deq.solve(W, c, "tanh", backward="one_step").z, (c,), (c,))[1]

    assert torch.equal(compiled(f)(c), f(c)) and float(f(c).abs().min()) > 0


def test_a_compiled_function_of_a_tensor_with_a_tangent():
    W, c, _ = gaussian(5, 3, torch.float64)
    f = lambda c: deq.solve(W, c, "tanh").z  # noqa: E731
    with forward_ad.dual_level():
        try:
            ours, eager = (forward_ad.unpack_dual(g(forward_ad.make_dual(c, c))).tangent for g in (compiled(f), f))
        except torch._dynamo.exc.Unsupported as refusal:
            if "dual tensor" not in str(refusal):
                raise
            pytest.skip("from torch 2.14 on torch.compile itself takes no input that has a tangent")
    torch.testing.assert_close(ours, eager, rtol=1e-9, atol=1e-11)


def test_an_exported_program_serves_in_another_process(tmp_path):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.equilibrium = deq.nn.EquilibriumLinear(3, 24, weight="monotone")

        def forward(self, x):
            return self.equilibrium(x)

    torch.manual_seed(0)
    net, x = Net().eval(), torch.randn(5, 3)
    batch = torch.export.Dim("batch", min=2, max=1000)
    torch.export.save(torch.export.export(net, (x,), dynamic_shapes=({0: batch},)), tmp_path / "net.pt2")
    other = torch.randn(9, 3)
    torch.save((other, net(other).detach()), tmp_path / "expected.pt")
    code = (
        "import torch, deq, sys; f = torch.export.load(sys.argv[1]).module(); "
        "x, z = torch.load(sys.argv[2]); torch.testing.assert_close(f(x), z, rtol=1e-5, atol=1e-6)"
    )
    files = [str(tmp_path / name) for name in ("net.pt2", "expected.pt")]
    done = subprocess.run([sys.executable, "-c", code, *files], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.filterwarnings(
    "ignore:.*torch.jit:DeprecationWarning", "ignore::torch.jit.TracerWarning", "ignore:To copy"
)
@pytest.mark.parametrize("weight", ["dense", "contractive", "lower_triangular", "diagonal", "diagonal_low_rank"])
def test_a_trace_of_torchscript(weight):
    """It is as good as the layer for other batches and for training, traced with gradients or without."""
    torch.manual_seed(0)
    layer, x = deq.nn.EquilibriumLinear(3, 8, weight=weight), torch.randn(2, 3)
    wanted = [x.requires_grad_(), *layer.parameters()]
    with torch.no_grad():
        without = torch.jit.trace(layer, torch.randn(5, 3))
    for program in (without, torch.jit.trace(layer, torch.randn(5, 3))):
        torch.testing.assert_close(program(x), layer(x), rtol=0, atol=0)
        found, expected = (torch.autograd.grad(f(x).square().sum(), wanted) for f in (program, layer))
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b)


def test_increments_are_used_inside_of_a_graph():
    """A plan is made where the numbers are, not where the graph is drawn."""
    if _library.increments() == "native":
        pytest.skip("no increments with this instruction set")
    W, c, _ = gaussian(128, 40)
    assert deq.solve(W, c).plan.increments != "native"
    same(lambda W, c: deq.solve(W, c).z, (W, c))


def test_a_gradient_that_nobody_wants_is_not_computed():
    """With W frozen dW is no product of the graph, and for relu the injection is not kept."""
    W, c, _ = gaussian(12, 5)
    leaf, saved = c.clone().requires_grad_(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.shape) or t, lambda t: t):
        z = compiled(lambda c: deq.solve(W, c).z)(leaf)
    assert sorted(map(tuple, saved)) == [(5, 12), (12, 12)]
    with Recorder() as made:
        (g,) = torch.autograd.grad(z.sum(), leaf)
    assert "deq::product_" not in made.names
    assert torch.equal(g, torch.autograd.grad(deq.solve(W, leaf).z.sum(), leaf)[0])
