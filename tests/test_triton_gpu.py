"""What only a GPU can show: no synchronisation, no allocation that grows with the iterations, captures, streams."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from close import assert_as_accurate
from problems import exact, gaussian, sample_adjoint, sample_loop

import deq
from deq import _triton, reference
from deq.backends import get_backend
from deq.kernels import cell
from deq.kernels.tiles import FLOAT8_FROM
from deq.solvers import ladder

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or bool(_triton.why_not("cuda")) or cell.INTERPRETED.value,
    reason="needs a CUDA device, and Triton's interpreter off",
)
SHAPES = [(64, 33), (256, 100), (333, 7), (1024, 64), (1024, 700)]
shapes = pytest.mark.parametrize(("m", "B"), SHAPES)


solve = partial(deq.solve, backend="triton")


def on_gpu(m, B, **options):
    return tuple(t.cuda() for t in gaussian(m, B, **options))


@pytest.fixture
def no_sync():
    """Any operation that waits for the device raises."""
    before = torch.cuda.get_sync_debug_mode()

    def on():
        torch.cuda.set_sync_debug_mode("error")

    yield on
    torch.cuda.set_sync_debug_mode(before)


@shapes
@pytest.mark.parametrize("solver", ["plain", "auto", "anderson"])
def test_as_accurate_as_a_torch_loop(m, B, solver):
    W, c, _ = on_gpu(m, B)
    solution = solve(W, c, solver=solver)
    assert solution.converged.all()
    allowed = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    plain = sample_loop(W, c)
    torch.backends.cuda.matmul.allow_tf32 = allowed
    assert_as_accurate(solution.z.cpu(), plain.cpu(), exact(W.cpu(), c.cpu()))


@shapes
def test_gradients_against_float64_on_the_cpu(m, B):
    W, c, g = on_gpu(m, B)
    weight, injection = W.clone().requires_grad_(), c.clone().requires_grad_()
    solve(weight, injection, "tanh", tol=1e-6).z.backward(g)
    W, c, g = (t.cpu() for t in (W, c, g))
    z = sample_loop(W, c, "tanh", tol=1e-6)
    u = sample_adjoint(W, c, z, g, "tanh", tol=1e-6)
    truth = exact(W, c, "tanh")
    few = slice(0, 8)  # the closed form is O(B m^3)
    _, dc = reference.implicit_gradient(W.double(), c[few].double(), truth[few], g[few].double(), "tanh")
    assert_as_accurate(injection.grad.cpu()[few], u[few], dc)
    assert weight.grad.isfinite().all()


@shapes
def test_no_synchronisation(m, B, no_sync):
    W, c, g = on_gpu(m, B)
    W.requires_grad_()
    solve(W, c).z.backward(g)  # compiles and captures
    torch.cuda.synchronize()
    no_sync()
    solution = solve(W, c)
    solution.z.backward(g)
    torch.cuda.set_sync_debug_mode("default")
    assert solution.converged.all()


@shapes
def test_nothing_is_allocated_by_an_iteration(m, B):
    W, c, _ = on_gpu(m, B, scale=0.9)

    def allocations(tol):
        before = torch.cuda.memory_stats()["allocation.all.allocated"]
        solution = solve(W, c, "tanh", tol=tol, solver="plain")
        return torch.cuda.memory_stats()["allocation.all.allocated"] - before, int(solution.iterations.max())

    for tol in (1e-2, 1e-5):
        allocations(tol)
    (few, short), (more, long) = allocations(1e-2), allocations(1e-5)
    assert long > short
    assert more == few


@shapes
def test_same_bits_every_time(m, B):
    W, c, _ = on_gpu(m, B)
    one, other = solve(W, c), solve(W, c)
    assert torch.equal(one.z, other.z) and torch.equal(one.iterations, other.iterations)


def test_in_a_stream_of_the_caller():
    W, c, _ = on_gpu(333, 20)
    expected = solve(W, c).z
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        z = solve(W, c).z
    torch.cuda.current_stream().wait_stream(stream)
    assert torch.equal(z, expected)


@pytest.mark.parametrize(("m", "B"), [(64, 10), (333, 10)])
def test_in_a_capture_of_the_caller(m, B):
    W, c, _ = on_gpu(m, B)
    expected = solve(W, c, max_iter=60).z
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        z = solve(W, c, max_iter=60).z
    z.zero_()
    graph.replay()
    assert torch.equal(z, expected)


@pytest.mark.parametrize(("m", "B"), [(64, 40), (333, 40)])
def test_failures_surface_when_the_status_is_read(m, B):
    _, c, _ = on_gpu(m, B)
    with torch.no_grad():
        solution = solve(3.0 * torch.eye(m, device="cuda"), c.abs(), solver="plain")
    with pytest.warns(deq.ConvergenceWarning, match=f"{B} of {B} samples"):
        assert (solution.status == deq.Status.DIVERGED).all()
    assert solution.z.isfinite().all()


@pytest.mark.parametrize(("m", "B"), [(333, 40), (1024, 700)])
@pytest.mark.parametrize("increments", ["bfloat16", "float8"])
def test_forced_increments(m, B, increments):
    if increments == "float8" and torch.cuda.get_device_capability() < FLOAT8_FROM:
        pytest.skip(f"float8 needs compute capability 8.9; this GPU has {torch.cuda.get_device_capability()}")
    W, c, _ = on_gpu(m, B)
    plan = replace(solve(W, c).plan, increments=increments)
    outcome = get_backend("triton").solve(W, c, None, "relu", plan)
    assert outcome.report.read() == [0, 0, 0, 0]
    assert_as_accurate(outcome.z.cpu(), sample_loop(W.cpu(), c.cpu()), exact(W.cpu(), c.cpu()))


@pytest.mark.parametrize("m", [40, 333])
def test_samples_on_which_the_plain_map_cycles_are_rescued(m):
    """At m = 333 at once, at 40 when the status is read (deq/solvers/ladder.py)."""
    _, c, _ = on_gpu(m, 9)
    W = -1.5 * torch.eye(m, device="cuda")
    plan = replace(solve(W, c).plan, acceleration="none")
    outcome = ladder.solve(W, c, None, "relu", plan)
    assert (outcome.report.failed is None) == (m == 40)
    if m == 40:
        assert outcome.report.read()[0] == 9
        outcome.report.rescue()
    torch.testing.assert_close(outcome.z, c.relu() / 2.5, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("B", [8, 300])
def test_linear_solves_do_not_wait(B, no_sync):
    W, c, g = on_gpu(256, B)
    W.requires_grad_()
    deq.solve(W, c, "identity", solver="direct").z.backward(g)
    torch.cuda.synchronize()
    no_sync()
    solution = deq.solve(W, c, "identity", solver="direct")
    solution.z.backward(g)
    torch.cuda.set_sync_debug_mode("default")
    assert solution.converged.all() and solution.plan.map == "direct"


def test_double_precision_goes_to_the_reference():
    W, c, _ = on_gpu(6, 3, dtype=torch.float64)
    W, c = (0.5 * W).requires_grad_(), c.requires_grad_()
    assert solve(W, c).plan.backend == "reference"
    assert torch.autograd.gradcheck(lambda W, c: deq.solve(W, c, "tanh", tol=1e-12).z, (W, c))
