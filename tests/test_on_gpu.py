"""The contract of a solve on the device at hand: ``TRITON_INTERPRET=0 python -m pytest tests/test_on_gpu.py`` on a GPU.

Elsewhere the same tests run with the compiled CPU engine, so that they are known to be right; what only a GPU can show
is skipped.
"""

import random

import pytest
import torch
import triton
from close import assert_as_accurate
from problems import exact, gaussian, sample_adjoint, sample_loop, torch_loop

import deq
from deq import _library, reference
from deq.bench.small_cases import backends

GPU = torch.cuda.is_available() and not triton.knobs.runtime.interpret
DEVICE = "cuda" if GPU else "cpu"
needs_gpu = pytest.mark.skipif(not GPU, reason="needs a GPU and TRITON_INTERPRET=0")
# A kernel is compiled for each: few of them leave time for many shapes.
ACTIVATIONS = ("tanh", "tanh", "relu", "tanh", "gelu")
SOLVERS = ("plain", "plain", "plain", "auto")


@pytest.fixture(params=backends(DEVICE) or ["none"])
def backend(request):
    if request.param == "none":
        pytest.skip(f"no backend for {DEVICE} tensors is usable here: {_library.reason}")
    return request.param


def shapes(count):
    """Widths and batches of every magnitude, most of them ragged."""
    draw = random.Random(0)
    sizes = [(1, 1), (17, 5), (64, 256), (256, 1), (300, 64)]
    while len(sizes) < count:
        sizes.append((round(2 ** draw.uniform(0, 9)), round(2 ** draw.uniform(0, 9))))
    return sizes[:count]


@pytest.mark.parametrize("place", range(300 if GPU else 12))
def test_forward_and_gradients(place, backend):
    m, B = shapes(place + 1)[place]
    activation = ACTIVATIONS[place % len(ACTIVATIONS)]
    W, c, g = (t.to(DEVICE) for t in gaussian(m, B, seed=place))
    weight, injection = W.clone().requires_grad_(), c.clone().requires_grad_()
    solution = deq.solve(weight, injection, activation, backend=backend, tol=1e-6, solver=SOLVERS[place % 4])
    solution.z.backward(g)
    assert solution.converged.all() and (solution.iterations > 0).all()
    z, true_z = sample_loop(W, c, activation, tol=1e-6), exact(W, c, activation)
    assert_as_accurate(solution.z.detach(), z, true_z)
    if activation != "relu":  # where a unit that flips its mask within the tolerance moves the gradient
        plain = sample_adjoint(W, c, z, g, activation, tol=1e-6)
        dW, dc = reference.implicit_gradient(W.double(), c.double(), true_z, g.double(), activation)
        assert_as_accurate(injection.grad, plain, dc)
        # As one whole, since the rows of dW are units and no samples, and beside all that is summed up: of the single
        # number of m = 1 much cancels.
        mass = (plain.abs().mT @ z.abs()).double().norm()
        ours, theirs = ((found.double() - dW).norm() / mass for found in (weight.grad, plain.mT @ z))
        assert ours <= 2 * theirs + 2 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_are_solved_in_float32_and_rounded_once(dtype, backend):
    W, c, _ = (t.to(DEVICE) for t in gaussian(65, 33, dtype))
    solution = deq.solve(W, c, "tanh", backend=backend)
    assert solution.converged.all()
    plain = torch_loop(W.float(), c.float(), "tanh", tol=1e-4).to(dtype)
    assert_as_accurate(solution.z, plain, exact(W, c, "tanh"))


@pytest.mark.parametrize("shape", [(0, 7), (2, 3, 7), (7,)])
def test_shapes_and_strides(shape, backend):
    W, c, _ = (t.to(DEVICE) for t in gaussian(7, 6))
    c = c.mT.contiguous().mT.flatten()[: torch.Size(shape).numel()].view(shape)
    solution = deq.solve(W.mT, c, "relu", backend=backend)
    assert solution.z.shape == (*solution.status.shape, 7) == shape
    if c.numel():
        rows = c.reshape(-1, 7)
        assert_as_accurate(solution.z.reshape(-1, 7), torch_loop(W.mT, rows), exact(W.mT, rows))


def test_same_bits_every_time_and_in_every_company(backend):
    W, c, _ = (t.to(DEVICE) for t in gaussian(96, 64))
    options = {"backend": backend, "solver": "plain"}
    once = deq.solve(W, c, **options)
    again = deq.solve(W, c, **options)
    assert torch.equal(once.z, again.z) and torch.equal(once.iterations, again.iterations)
    turned = deq.solve(W, c.flip(0), **options)
    assert torch.equal(turned.z.flip(0), once.z)


def test_failures_are_each_samples_own(backend):
    W = torch.zeros(20, 20)
    W[0, 0], W[1, 1], W[2, 3], W[3, 2], W[4, 4] = 0.9, 0.5, -1.0, -1.0, 4.0
    c = torch.zeros(4, 20)
    c[range(4), (0, 1, 2, 4)] = 1.0
    options = {"solver": "plain", "on_failure": "ignore", "max_iter": 200}
    solution = deq.solve(W.to(DEVICE), c.to(DEVICE), backend=backend, **options)
    expected = deq.solve(W, c, backend="reference", **options)
    assert solution.status.cpu().tolist() == expected.status.tolist()
    assert torch.isfinite(solution.z).all()
    c[1, 5] = float("nan")
    with pytest.raises(ValueError, match=r"c must be finite; c\[1\]"):
        deq.solve(W.to(DEVICE), c.to(DEVICE), backend=backend, **options).status  # noqa: B018


@needs_gpu
def test_nothing_waits_for_the_device(backend):
    W, c, g = (t.to(DEVICE) for t in gaussian(128, 64))
    W.requires_grad_()
    deq.solve(W, c, backend=backend).z.backward(g)  # compiles and captures
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        solution = deq.solve(W, c, backend=backend)
        solution.z.backward(g)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert solution.converged.all()


@needs_gpu
def test_allocations_do_not_grow_with_iterations(backend):
    W, c, _ = (t.to(DEVICE) for t in gaussian(128, 64, scale=0.9))
    counts = []
    for tol in (1e-1, 1e-2, 1e-6):  # the first compiles
        deq.solve(W, c, "tanh", backend=backend, tol=tol, max_iter=1000).status  # noqa: B018
        before = torch.cuda.memory_stats()["allocation.all.allocated"]
        solution = deq.solve(W, c, "tanh", backend=backend, tol=tol, max_iter=1000)
        counts.append((int(solution.iterations.max()), torch.cuda.memory_stats()["allocation.all.allocated"] - before))
    assert counts[2][0] > counts[1][0] and counts[2][1] == counts[1][1]
