"""What only a GPU can show: no synchronisation, no allocation that grows with the iterations, captures, streams."""

import pytest
import torch
from close import assert_as_accurate
from problems import exact, gaussian, torch_adjoint, torch_loop

import deq
from deq import _triton, reference
from deq.kernels import cell

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or bool(_triton.why_not("cuda")) or cell.INTERPRETED.value,
    reason="needs a CUDA device, and Triton's interpreter off",
)
SHAPES = [(64, 33), (256, 100), (333, 7), (1024, 64), (1024, 700)]
shapes = pytest.mark.parametrize(("m", "B"), SHAPES)


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
    solution = deq.solve(W, c, solver=solver)
    assert solution.plan.backend == "triton" and solution.converged.all()
    allowed = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    plain = torch_loop(W, c)
    torch.backends.cuda.matmul.allow_tf32 = allowed
    assert_as_accurate(solution.z.cpu(), plain.cpu(), exact(W.cpu(), c.cpu()))


@shapes
def test_gradients_against_float64_on_the_cpu(m, B):
    W, c, g = on_gpu(m, B)
    weight, injection = W.clone().requires_grad_(), c.clone().requires_grad_()
    deq.solve(weight, injection, "tanh", tol=1e-6).z.backward(g)
    W, c, g = (t.cpu() for t in (W, c, g))
    z = torch_loop(W, c, "tanh", tol=1e-6)
    u = torch_adjoint(W, c, z, g, "tanh", tol=1e-6)
    truth = exact(W, c, "tanh")
    few = slice(0, 8)  # the closed form is O(B m^3)
    _, dc = reference.implicit_gradient(W.double(), c[few].double(), truth[few], g[few].double(), "tanh")
    assert_as_accurate(injection.grad.cpu()[few], u[few], dc)
    assert weight.grad.isfinite().all()


@shapes
def test_no_synchronisation(m, B, no_sync):
    W, c, g = on_gpu(m, B)
    W.requires_grad_()
    deq.solve(W, c).z.backward(g)  # compiles and captures
    torch.cuda.synchronize()
    no_sync()
    solution = deq.solve(W, c)
    solution.z.backward(g)
    torch.cuda.set_sync_debug_mode("default")
    assert solution.converged.all()


@shapes
def test_nothing_is_allocated_by_an_iteration(m, B):
    W, c, _ = on_gpu(m, B, scale=0.9)

    def allocations(tol):
        before = torch.cuda.memory_stats()["allocation.all.allocated"]
        solution = deq.solve(W, c, "tanh", tol=tol, solver="plain")
        return torch.cuda.memory_stats()["allocation.all.allocated"] - before, int(solution.iterations.max())

    for tol in (1e-2, 1e-5):
        allocations(tol)
    (few, short), (more, long) = allocations(1e-2), allocations(1e-5)
    assert long > short
    assert more == few


@shapes
def test_same_bits_every_time(m, B):
    W, c, _ = on_gpu(m, B)
    one, other = deq.solve(W, c), deq.solve(W, c)
    assert torch.equal(one.z, other.z) and torch.equal(one.iterations, other.iterations)


def test_in_a_stream_of_the_caller():
    W, c, _ = on_gpu(333, 20)
    expected = deq.solve(W, c).z
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        z = deq.solve(W, c).z
    torch.cuda.current_stream().wait_stream(stream)
    assert torch.equal(z, expected)


@pytest.mark.parametrize(("m", "B"), [(64, 10), (333, 10)])
def test_in_a_capture_of_the_caller(m, B):
    W, c, _ = on_gpu(m, B)
    expected = deq.solve(W, c, max_iter=60).z
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        z = deq.solve(W, c, max_iter=60).z
    z.zero_()
    graph.replay()
    assert torch.equal(z, expected)


@pytest.mark.parametrize(("m", "B"), [(64, 40), (333, 40)])
def test_failures_surface_when_the_status_is_read(m, B):
    _, c, _ = on_gpu(m, B)
    with torch.no_grad():
        solution = deq.solve(3.0 * torch.eye(m, device="cuda"), c.abs(), solver="plain")
    with pytest.warns(deq.ConvergenceWarning, match=f"{B} of {B} samples"):
        assert (solution.status == deq.Status.DIVERGED).all()
    assert solution.z.isfinite().all()


def test_double_precision_goes_to_the_reference():
    W, c, _ = on_gpu(6, 3, dtype=torch.float64)
    W, c = (0.5 * W).requires_grad_(), c.requires_grad_()
    assert deq.solve(W, c).plan.backend == "reference"
    assert torch.autograd.gradcheck(lambda W, c: deq.solve(W, c, "tanh", tol=1e-12).z, (W, c))
