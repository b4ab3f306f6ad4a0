"""Tensors are made where and as they are needed, whatever torch's default device and dtype are."""

from contextlib import contextmanager
from importlib import import_module

import pytest
import torch
from problems import gaussian

import deq
from deq import _library
from deq.function_options import BACKWARDS
from deq.profiling import Ceilings
from deq.solvers.generic import METHODS


@contextmanager
def default_device():
    with torch.device("meta"):
        yield


@contextmanager
def default_dtype():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@pytest.fixture(params=[default_device, default_dtype])
def defaults(request):
    return request.param


@pytest.fixture
def problem():
    W, c, g = gaussian(12, 3)
    return W.requires_grad_(), c.requires_grad_(), g


def assert_unchanged(run, defaults):
    expected = run()
    with defaults():
        actual = run()
    for ours, theirs in zip(actual, expected, strict=True):
        assert ours.device == theirs.device and ours.dtype == theirs.dtype and torch.equal(ours, theirs)


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("backward", BACKWARDS)
@pytest.mark.parametrize("solver", METHODS)
def test_fixed_point(problem, defaults, solver, backward, compiled, monkeypatch):
    if not compiled:
        monkeypatch.setattr(_library, "compiled", None)
    W, c, g = problem
    z0 = torch.zeros_like(c)

    def run():
        options = {"solver": solver, "backward": backward, "keep": (1, 2)}
        solution = deq.fixed_point(lambda z: torch.tanh(z @ W.mT + c), z0, **options)
        grads = torch.autograd.grad(solution.z, (W, c), g)
        return solution.z, solution.iterations, solution.residual, solution.status, *solution.trajectory, *grads

    assert_unchanged(run, defaults)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")  # torch's forward mode
def test_derivatives_of_derivatives(problem, defaults):
    W, c, g = problem

    def equilibrium(c):
        return deq.fixed_point(lambda z: torch.tanh(z @ W.mT + c), torch.zeros_like(c)).z

    def run():
        first = torch.autograd.grad(equilibrium(c), c, g, create_graph=True)
        tangent = torch.func.jvp(equilibrium, (c.detach(),), (g,))[1]
        return torch.autograd.grad(first[0].sum(), W)[0], tangent

    assert_unchanged(run, defaults)


@pytest.mark.parametrize("solver", ["auto", "plain", "cayley"])
def test_solve(problem, defaults, solver):
    W, c, g = problem

    def run():
        with torch.no_grad():  # what is known of a weight is kept by its content
            frozen = deq.solve(W, c, solver=solver).z
        z = deq.solve(W, c, solver=solver).z
        return frozen, z, *torch.autograd.grad(z, (W, c), g)

    assert_unchanged(run, defaults)


@pytest.mark.parametrize("solver", ["auto", "direct"])
@pytest.mark.parametrize("activation", ["relu", "tanh", "identity"])
@pytest.mark.parametrize("structure", ["LowerTriangular", "Diagonal", "DiagonalLowRank"])
def test_structures(problem, defaults, structure, activation, solver):
    W, c, g = problem
    d = W.diagonal().detach().clone().requires_grad_()
    P, Q = (x[:, :2].detach().clone().requires_grad_() for x in (W, W.mT))
    parts = {"LowerTriangular": (W,), "Diagonal": (d,), "DiagonalLowRank": (d, P, Q)}[structure]

    def run():
        z = deq.solve(getattr(deq.weights, structure)(*parts), c, activation, solver=solver).z
        return z, *torch.autograd.grad(z, (*parts, c), g)

    assert_unchanged(run, defaults)


def test_profile(problem, defaults):
    """The gradients that it draws, the nets beside and what their ceilings read lie where they always do."""
    W, c, _ = problem

    def run():
        flops = Ceilings("cpu", 1, {"float32": 1e11}, {}, {"memory": 3e10}, {"memory": 1 << 28})
        report = deq.profile(deq.solve, W, c, seconds=1e-3, feed_forward=2, against=flops)
        counted = [one.counts.flops for one in report.passes] + [net.peak for net in report.beside]
        return (torch.tensor(counted, device="cpu"),)

    assert_unchanged(run, defaults)


def test_ceilings_read_the_bytes_that_they_count(defaults, monkeypatch):
    ceilings = import_module("deq.profiling.ceilings")  # whose name in deq.profiling is that of its function
    monkeypatch.setattr(_library, "compiled", None)
    monkeypatch.setattr(ceilings, "WORKING_SETS", {"cache": 1 << 12})
    read = []
    monkeypatch.setattr(ceilings, "_rate", lambda run, amount, wait=None: read.append((run, amount)) or 1.0)
    with defaults():
        ceilings._cpu.__wrapped__(1, "")
    run, amount = read[-1]
    assert run.__self__.device.type == "cpu" and run.__self__.nbytes == amount == 1 << 12


@pytest.mark.parametrize(
    ("m", "dtype", "solver"),  # in one program, and streamed
    [(12, torch.float32, "anderson"), (12, torch.bfloat16, "anderson"), (270, torch.bfloat16, "plain")],
)
def test_triton(defaults, m, dtype, solver):
    """Its scratch memory was of torch's default dtype: in 16 bits half of what the kernels write to."""
    W, c, _ = (t.to(dtype) for t in gaussian(m, 2))
    assert_unchanged(lambda: [deq.solve(W, c, backend="triton", solver=solver, tol=1e-2).z], defaults)
