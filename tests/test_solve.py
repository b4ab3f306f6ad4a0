"""deq.solve against plain PyTorch and float64: accuracy, every kind of input, every promise about samples."""

import itertools

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from close import assert_as_accurate, worst_error
from problems import exact, gaussian, torch_loop

import deq
from deq import _library
from deq.activations import ACTIVATIONS
from deq.backends import get_backend

BACKENDS = ["reference"] + (["cpu"] if _library.compiled is not None else [])
SHAPES = [(1, 1), (17, 5), (64, 256), (333, 7), (512, 64), (1024, 256), (2048, 3)]
backends = pytest.mark.parametrize("backend", BACKENDS)


@pytest.mark.parametrize(("m", "B"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@backends
def test_as_accurate_as_a_torch_loop(m, B, dtype, backend):
    if backend == "reference" and m * m * B > 1e8:
        pytest.skip("the reference is the torch loop itself at this size; minutes for nothing new")
    W, c, _ = gaussian(m, B, dtype)
    solution = deq.solve(W, c, solver="plain", backend=backend)
    assert solution.converged.all()
    assert_as_accurate(solution.z, torch_loop(W, c, tol=solution.plan.tol), exact(W, c))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_activation_and_instruction_set(activation, dtype, isa):
    W, c, _ = gaussian(37, 11, dtype, scale=0.8)
    c = 3 * c  # into the tails
    tol = {torch.float32: 1e-6, torch.float64: 1e-12}[dtype]  # tight: errors of the arithmetic show
    solution = deq.solve(W, c, activation, solver="plain", backend="cpu", tol=tol)
    assert solution.converged.all()
    assert_as_accurate(solution.z, torch_loop(W, c, activation, tol=tol), exact(W, c, activation))


@pytest.mark.parametrize(
    ("m", "B"), [(1, 3), (2, 1), (15, 9), (16, 8), (31, 2), (33, 70), (100, 65), (333, 12), (600, 3)]
)
def test_ragged_shapes_on_every_instruction_set(m, B, isa):
    for dtype in (torch.float32, torch.float64):
        W, c, _ = gaussian(m, B, dtype, seed=m)
        solution = deq.solve(W, c, backend="cpu")
        assert_as_accurate(solution.z, torch_loop(W, c, tol=solution.plan.tol), exact(W, c))


@backends
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_solved_in_float32(dtype, backend):
    W, c, _ = gaussian(40, 9, dtype)
    solution = deq.solve(W, c, backend=backend)
    assert solution.z.dtype == dtype and solution.residual.dtype == torch.float32
    assert_as_accurate(solution.z, torch_loop(W, c, tol=1e-2), exact(W, c))
    torch.testing.assert_close(solution.z, exact(W, c).to(dtype), rtol=2 * torch.finfo(dtype).eps, atol=1e-4)


def test_strides_do_not_matter(isa):
    W, c, _ = gaussian(24, 6)
    expected = deq.solve(W, c, backend="cpu").z
    wide = torch.zeros(6, 48)
    wide[:, ::2] = c
    padded = torch.zeros(24, 30)
    padded[:, 3:27] = W
    sparse = torch.zeros(48, 48)
    sparse[::2, ::2] = W
    for A in (W, W.mT.contiguous().mT, padded[:, 3:27], sparse[::2, ::2]):
        for b in (c, c.mT.contiguous().mT, wide[:, ::2]):
            assert torch.equal(deq.solve(A, b, backend="cpu").z, expected)
    assert torch.equal(deq.solve(W, c[:1].expand(6, 24), backend="cpu").z, expected[:1].expand(6, 24))


@backends
def test_sample_dimensions(backend):
    W, c, _ = gaussian(20, 12)
    flat = deq.solve(W, c, backend=backend)
    for shape in ((3, 4, 20), (2, 1, 6, 20), (12, 1, 20)):
        solution = deq.solve(W, c.reshape(shape), backend=backend)
        assert torch.equal(solution.z, flat.z.reshape(shape))
        assert solution.iterations.shape == solution.residual.shape == solution.status.shape == shape[:-1]
    single = deq.solve(W, c[0], backend=backend)
    assert single.z.shape == (20,) and single.iterations.shape == ()
    assert torch.allclose(single.z, flat.z[0], rtol=1e-5)
    for shape in ((0, 20), (3, 0, 20)):
        empty = deq.solve(W, c.new_empty(shape), backend=backend)
        assert empty.z.shape == shape and empty.converged.all()


@backends
@pytest.mark.parametrize("threads", [1, 2])
def test_batched_weights(backend, threads):
    parts = [gaussian(18, 10, seed=s) for s in range(5)]
    W, c = (torch.stack([p[i] for p in parts]) for i in (0, 1))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        solution = deq.solve(W, c, backend=backend)
        deep = deq.solve(W, c.reshape(5, 2, 5, 18), backend=backend)
    finally:
        torch.set_num_threads(before)
    for s, (Ws, cs, _) in enumerate(parts):
        assert_as_accurate(solution.z[s], torch_loop(Ws, cs), exact(Ws, cs))
    assert torch.equal(deep.z.reshape(5, 10, 18), solution.z)


@backends
@pytest.mark.parametrize("solver", ["plain", "anderson", "cayley", "auto"])
def test_no_weights_at_all(backend, solver):
    W, c = torch.ones(0, 4, 4, requires_grad=True), torch.ones(0, 3, 4, requires_grad=True)
    solution = deq.solve(W, c, backend=backend, solver=solver)
    assert solution.z.shape == (0, 3, 4) and solution.status.shape == solution.residual.shape == (0, 3)
    grads = torch.autograd.grad(solution.z.sum(), (W, c))
    assert [g.shape for g in grads] == [W.shape, c.shape]


@backends
def test_per_sample_convergence_and_true_residual(backend):
    W, c, _ = gaussian(50, 40, torch.float64, scale=0.9)
    c[3] = 0  # relu(0) = 0: an equilibrium at zero converges
    solution = deq.solve(W, c, backend=backend, solver="plain", tol=1e-6)
    assert solution.converged.all() and solution.iterations.unique().numel() > 3
    assert solution.iterations[3] == 1 and solution.residual[3] == 0 and (solution.z[3] == 0).all()
    f = torch.relu(solution.z @ W.mT + c)
    true = (f - solution.z).norm(dim=1) / f.norm(dim=1).clamp(min=1e-300)
    assert (true <= 1e-6).all() and (solution.residual <= 1e-6).all()


def test_backends_take_the_same_path():
    if "cpu" not in BACKENDS:
        pytest.skip("no compiled library: nothing to compare")
    for solver in ("plain", "anderson", "auto"):
        for scale in (0.45, 1.0):
            W, c, _ = gaussian(40, 30, torch.float64, scale=scale)
            a = deq.solve(W, c, solver=solver, backend="cpu", on_failure="ignore")
            b = deq.solve(W, c, solver=solver, backend="reference", on_failure="ignore")
            assert torch.equal(a.status, b.status)
            # Anderson divides by small numbers: rounding moves its path, but not far. On demand the compiled backend
            # holds fewer pairs of some samples (csrc/anderson.h), the reference always all.
            slack = {"plain": 0.0, "anderson": 0.2, "auto": 0.3}[solver]
            assert ((a.iterations - b.iterations).abs() <= slack * b.iterations).all()
            assert_as_accurate(a.z, b.z, exact(W, c))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_batch_mates_do_not_matter(dtype, isa):
    W, c, _ = gaussian(70, 150, dtype, scale=0.8)
    together = deq.solve(W, c, solver="plain", backend="cpu")
    order = torch.randperm(150, generator=torch.Generator().manual_seed(1))
    shuffled = deq.solve(W, c[order], solver="plain", backend="cpu")
    assert torch.equal(shuffled.z, together.z[order]) and torch.equal(shuffled.iterations, together.iterations[order])
    for b in range(0, 150, 7):
        alone = deq.solve(W, c[b], solver="plain", backend="cpu")
        assert torch.equal(alone.z, together.z[b]) and alone.residual == together.residual[b]


@pytest.mark.parametrize("m", [70, 257, 513, 1100])  # one chunk of the sums over k, and several
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_skipping_zeros_changes_no_bit(m, dtype, isa):
    """A batch of mostly zero rows skips products, one of dense rows does not, and a sample must not notice."""
    W, c, g = gaussian(m, 24, dtype, scale=0.6)
    sparse, dense = c[:4] - 2, c + 2  # about 5 % and 95 % of the equilibrium is not zero
    W, batches = W.requires_grad_(), [torch.cat((sparse, c[:2], other)) for other in (sparse, dense)]
    results = []
    for batch in batches:
        batch = batch.clone().requires_grad_()
        solution = deq.solve(W, batch, solver="plain", backend="cpu")
        z = solution.z
        (dc,) = torch.autograd.grad(z, batch, g[:1].expand_as(z))
        results.append((z.detach()[:6], dc[:6]))
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])
    W, c = W.detach(), batches[0][:6]
    assert_as_accurate(results[0][0], torch_loop(W, c, tol=solution.plan.tol), exact(W, c))


def test_thread_count_does_not_matter():
    """Two runs agree bit for bit, and so do thread counts: a sample never sees its neighbours."""
    W, c, _ = gaussian(90, 64)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 1, 2):
            torch.set_num_threads(threads)
            results.append(deq.solve(W, c).z)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], z) for z in results)


@backends
@pytest.mark.parametrize("activation", ["relu", "leaky_relu", "identity"])
def test_scale_invariance(backend, activation):
    W, c, _ = gaussian(30, 20)
    one = deq.solve(W, c, activation, backend=backend)
    for exponent in (-100, -60, 60, 100):
        scaled = deq.solve(W, c * 2.0**exponent, activation, backend=backend)
        assert torch.equal(scaled.iterations, one.iterations) and torch.equal(scaled.status, one.status)
        assert_as_accurate(scaled.z * 2.0**-exponent, one.z, exact(W, c, activation))


@pytest.mark.parametrize("m", [24, 64, 200])  # lanes, rows, increments
def test_scale_of_a_start_without_injection(m):
    """Iterates of relu shrink to nothing then: in as many evaluations wherever they began."""
    W, c, _ = gaussian(m, 9, scale=0.95)
    c[4] = 0.0
    start = torch.rand(9, m, generator=torch.Generator().manual_seed(1))
    one = deq.solve(W, c, z0=start, solver="plain", on_failure="ignore")
    assert one.converged.sum() >= 8
    for exponent in (-20, -19, 20, 60, -60):
        factor = 2.0**exponent
        scaled = deq.solve(W, c * factor, z0=start * factor, solver="plain", on_failure="ignore")
        assert torch.equal(scaled.iterations, one.iterations) and torch.equal(scaled.status, one.status)


@pytest.mark.parametrize("m", [24, 64, 130])  # lanes, rows, increments
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@backends
def test_units_that_are_switched_off_say_nothing_of_the_scale(backend, dtype, m):
    """By the least number there is, as masks of attention do it: the others were lost, and had converged."""
    W, c, _ = gaussian(m, 5, dtype)
    least = torch.finfo(dtype).min
    small = c * 1e-10
    small[:, 3] = c[:, 3] = least
    alone = W.clone()
    alone[3] = 0.0
    for injection, scale in ((c, 1.0), (small, 1e-10)):
        start = 0.1 * injection.abs().clamp(max=scale)
        for z0 in (None, start):
            solution = deq.solve(W, injection, z0=z0, backend=backend)
            assert solution.converged.all()
            expected = exact(alone, (injection / scale).clamp(min=-1.0))
            assert worst_error(solution.z / scale, expected) < 10 * solution.plan.tol


@pytest.mark.parametrize("m", [24, 64, 130])  # lanes, rows, increments
@pytest.mark.parametrize("activation", ["relu", "leaky_relu"])
@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 1e-30), (torch.float64, 1e-170)], ids=str)
def test_starts_that_are_far_too_large(dtype, size, activation, m, isa):
    """The injection was lost beside them, or squares of float64 were, and any iterate passed for converged."""
    W, c, _ = gaussian(m, 5, dtype)
    for solver in ("auto", "plain"):
        solution = deq.solve(W, c * size, activation, z0=c.flip(0) / size, solver=solver)
        assert solution.converged.all()
        assert worst_error(solution.z / size, exact(W, c, activation)) < 10 * solution.plan.tol


@pytest.mark.parametrize("m", [24, 64, 130])  # lanes, rows, increments
@pytest.mark.parametrize("activation", ["tanh", "sigmoid"])
@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 1e25), (torch.float64, 1e160)], ids=str)
def test_starts_from_which_the_square_of_the_first_step_leaves_the_range(dtype, size, activation, m, isa):
    """They come back into the range of the activation at once, and had diverged with that step."""
    W, c, _ = gaussian(m, 5, dtype)
    for solver in ("plain", "auto", "anderson"):
        solution = deq.solve(W, c, activation, z0=size * c.flip(0), solver=solver)
        assert solution.converged.all() and (solution.iterations > 2).all()
        assert worst_error(solution.z, exact(W, c, activation)) < 10 * solution.plan.tol
    assert torch.isfinite(get_backend("cpu").evaluate(W, c, size * c, activation)).all()


@pytest.mark.parametrize("m", [24, 64, 130])  # lanes, rows, increments
@pytest.mark.parametrize("solver", ["auto", "plain", "anderson", "cayley"])
@pytest.mark.parametrize("weight", [0.0, 0.01])
@backends
def test_a_value_of_zero_at_the_start(backend, m, solver, weight):
    """A residual with nothing to divide by is no reason to give up, or to return what was never written."""
    W, c, _ = gaussian(m, 3)
    W, start = torch.triu(torch.full((m, m), weight), 1), -torch.ones(3, m)
    c[0] = 0.0
    solution = deq.solve(W, c, z0=start, solver=solver, backend=backend, on_failure="raise")
    assert (solution.z[0] == 0).all() and solution.residual[0] == 0
    assert_as_accurate(solution.z, torch_loop(W, c, "relu"), exact(W, c, "relu"))


@pytest.mark.parametrize("m", [5, 64, 130])
@pytest.mark.parametrize("solver", ["auto", "plain", "anderson", "cayley"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16], ids=str)
@backends
def test_what_leaves_the_range_is_not_nan(backend, m, solver, dtype):
    """Weights, injections and starts so large that their first products overflow."""
    largest = torch.finfo(dtype).max
    for size, activation in itertools.product((largest, -largest, largest**0.5), ("relu", "softplus", "tanh")):
        W = torch.full((m, m), size, dtype=dtype)
        for c, start in itertools.product((1.0, largest), (1.0, largest)):
            c, start = (torch.full((2, m), value, dtype=dtype) for value in (c, start))
            options = {"z0": start, "solver": solver, "backend": backend, "max_iter": 60, "on_failure": "ignore"}
            try:
                assert torch.isfinite(deq.solve(W, c, activation, **options).z).all()
            except ValueError as error:
                assert "inverse" in str(error)  # solver="cayley": 2 I - W has none


@pytest.mark.parametrize("m", [5, 60, 128, 700])  # lanes, rows, increments, sums of two chunks
@pytest.mark.parametrize("solver", ["auto", "plain"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_sum_that_overflows_both_ways_is_no_zero(m, solver, dtype, isa):
    """W z + c is infinity less infinity there: relu must not make an equilibrium of that."""
    W, c = torch.zeros(m, m, dtype=dtype), torch.full((3, m), 2.0, dtype=dtype)
    W[2, 0], W[2, -1] = 0.9 * torch.finfo(dtype).max, -0.9 * torch.finfo(dtype).max
    solution = deq.solve(W, c, "relu", solver=solver, max_iter=20, on_failure="ignore")
    assert torch.isfinite(solution.z).all() and not solution.converged.any()


@pytest.mark.parametrize("m", [5, 130])
@pytest.mark.parametrize("solver", ["auto", "plain", "anderson", "cayley"])
@backends
def test_a_start_that_is_not_finite_is_named(backend, m, solver):
    W, c = -3 * torch.eye(m), torch.ones(3, m)
    start = torch.ones(3, m)
    start[1, 2] = torch.nan
    with pytest.raises(ValueError, match=r"z0 must be finite; z0\[1\] holds NaN or infinity"):
        deq.solve(W, c, z0=start, solver=solver, backend=backend)


@pytest.mark.parametrize("scale", [1e-30, 1e-20])
@backends
def test_tiny_equilibria_of_bounded_activations(backend, scale):
    """tanh(x) = x there: squares of float32 underflow, and the solve must not call that converged."""
    W, c, _ = gaussian(30, 20)
    solution = deq.solve(W, c * scale, "tanh", backend=backend)
    assert_as_accurate(solution.z / scale, torch_loop(W, c, "identity"), exact(W, c, "identity"))


# Where squares leave the range of float64 the activation is a line: gelu and silu x / 2 near zero, relu far away.
@pytest.mark.parametrize("solver", ["auto", "plain"])
@pytest.mark.parametrize("m", [6, 150])  # lanes, and rows
@pytest.mark.parametrize(
    ("activation", "scale", "line"),
    [("tanh", 1e-200, "identity"), ("elu", 1e-300, "identity"), ("gelu", 1e-160, "half"), ("silu", 1e-100, "half")]
    + [(name, scale, "relu") for name in ("gelu", "silu") for scale in (1e160, 1e300)],
)
@backends
def test_samples_whose_squares_leave_the_range_of_float64(backend, activation, scale, line, m, solver):
    W, c, _ = gaussian(m, 5, torch.float64, seed=m)
    c = c / c.abs().amax()
    half = 0.5 if line == "half" else 1.0
    expected = exact(half * W, half * c, "relu" if line == "relu" else "identity")
    mates = torch.cat([scale * c, c])  # of an ordinary size
    for start in (None, torch.cat([0.3 * scale * c.flip(0), c])):
        solution = deq.solve(W, mates, activation, z0=start, solver=solver, backend=backend)
        assert solution.converged.all()
        assert worst_error(solution.z[:5] / scale, expected) < 1e-8
        alone = deq.solve(
            W, scale * c, activation, z0=None if start is None else start[:5], solver=solver, backend=backend
        )
        if backend == "cpu":
            assert torch.equal(alone.z, solution.z[:5]) and torch.equal(alone.iterations, solution.iterations[:5])


@backends
def test_warm_start(backend):
    W, c, _ = gaussian(40, 16, torch.float64, scale=0.9)
    cold = deq.solve(W, c, backend=backend)
    warm = deq.solve(W, c, z0=cold.z, backend=backend)
    assert (warm.iterations <= 2).all() and warm.converged.all()
    far = deq.solve(W, c, z0=1e6 * torch.ones_like(c), backend=backend)
    assert far.converged.all() and (far.iterations > cold.iterations).all()
    torch.testing.assert_close(far.z, cold.z, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("backend", [*BACKENDS, "triton"])
def test_the_error_criterion_waits_for_two_ratios(backend):
    """Against the first step, that from a far start, any second one seems to contract."""
    W, c, _ = gaussian(10, 3)
    solution = deq.solve(W, c, "tanh", z0=1e6 * c.flip(1), criterion="error", solver="plain", backend=backend)
    torch.testing.assert_close(solution.z.double(), exact(W, c, "tanh"), rtol=0, atol=3e-5)


@backends
def test_error_criterion_bounds_the_distance(backend):
    W, c, _ = gaussian(40, 30, torch.float64)
    W = W @ W.mT  # eigenvalues in [0, 0.97]: the error of a slow mode is q / (1 - q) = 32 steps
    W = 0.97 * W / torch.linalg.matrix_norm(W, 2)
    for tol in (1e-3, 1e-5, 1e-7):
        solution = deq.solve(W, c, "identity", criterion="error", tol=tol, solver="plain", backend=backend)
        truth = torch.linalg.solve(torch.eye(40, dtype=torch.float64) - W, c.mT).mT
        error = (solution.z - truth).norm(dim=1) / truth.norm(dim=1)
        assert solution.converged.all() and (error <= 1.2 * tol).all()  # an estimate: q still rises a little
    loose = deq.solve(W, c, "identity", criterion="residual", tol=1e-5, solver="plain", backend=backend)
    assert ((loose.z - truth).norm(dim=1) / truth.norm(dim=1)).max() > 2e-5  # what the criterion is for


@backends
def test_anderson_is_faster_on_slow_modes(backend):
    W, c, _ = gaussian(60, 20, torch.float64)
    v = torch.ones(60, dtype=torch.float64) / 60**0.5
    W = 0.3 * W + 0.97 * torch.outer(v, v)
    c = c + 3
    plain, fast, auto = (deq.solve(W, c, solver=s, backend=backend) for s in ("plain", "anderson", "auto"))
    assert plain.converged.all() and fast.converged.all() and auto.converged.all()
    assert fast.iterations.double().mean() < plain.iterations.double().mean() / 5
    assert auto.iterations.double().mean() < plain.iterations.double().mean() / 5
    # Same tolerance: at contraction q the plain residual leaves q / (1 - q) times as much error.
    truth = exact(W, c)
    assert_as_accurate(fast.z, plain.z, truth)
    assert_as_accurate(auto.z, plain.z, truth)


@pytest.mark.parametrize("solver", ["anderson", "cayley"])
@pytest.mark.parametrize("m", [6, 40, 70])  # lanes, and rows
@pytest.mark.parametrize(
    ("dtype", "scale"),
    [(torch.float32, s) for s in (1e-20, 1e-22, 1e-36)] + [(torch.float64, s) for s in (1e-75, 1e-160, 1e-300)],
)
@backends
def test_anderson_is_faster_where_squares_leave_the_range(backend, dtype, scale, m, solver):
    """Of injections as small as that with tanh, a line there, products of steps underflow."""
    torch.manual_seed(m)
    Q = torch.linalg.qr(torch.randn(m, m, dtype=dtype))[0]
    W = Q * torch.linspace(-0.9, 0.985, m, dtype=dtype) @ Q.mT
    c = torch.randn(5, m, dtype=dtype)
    options = {"solver": solver, "backend": backend}
    tiny, ordinary = deq.solve(W, c * scale, "tanh", **options), deq.solve(W, c, "identity", **options)
    assert tiny.converged.all()
    assert tiny.iterations.max() < 1.5 * ordinary.iterations.max()


@backends
@pytest.mark.parametrize("solver", ["anderson", "auto"])
def test_anderson_survives_dead_samples_and_exact_convergence(backend, solver):
    W, c, _ = gaussian(20, 12, torch.float64, scale=0.95)
    c[:4] = -c[:4].abs()  # relu gives zero at once
    c[4] = 0
    solution = deq.solve(W, c, solver=solver, backend=backend)
    assert solution.converged.all() and torch.isfinite(solution.z).all()
    identity = deq.solve(torch.zeros(20, 20, dtype=torch.float64), c, "identity", solver=solver, backend=backend)
    assert torch.equal(identity.z, c) and identity.converged.all()


@hypothesis.settings(deadline=None, max_examples=40, derandomize=True)
@hypothesis.given(
    m=st.integers(1, 40),
    B=st.integers(0, 20),
    activation=st.sampled_from(list(ACTIVATIONS)),
    solver=st.sampled_from(["plain", "anderson", "auto"]),
    scale=st.floats(0.0, 6.0),
    magnitude=st.sampled_from([1e-30, 1e-3, 1.0, 1e3, 1e30]),
    seed=st.integers(0, 10**6),
)
def test_never_nan_and_always_an_honest_status(m, B, activation, solver, scale, magnitude, seed):
    W, c, _ = gaussian(m, B, seed=seed, scale=scale)
    solution = deq.solve(W, c * magnitude, activation, solver=solver, max_iter=300, on_failure="ignore")
    assert torch.isfinite(solution.z).all() and (solution.iterations <= 300).all()
    z, c64 = solution.z.double(), (c * magnitude).double()
    f = ACTIVATIONS[activation].value(z @ W.double().mT + c64)
    residual = (f - z).norm(dim=1) / f.norm(dim=1).clamp(min=1e-30)  # float32 ends at 1e-38
    # z is one evaluation past the judged point: its residual may exceed that by W's expansion, and by rounding.
    expansion = max(1.0, ACTIVATIONS[activation].lipschitz * float(torch.linalg.matrix_norm(W.double(), 2)))
    floor = 4e-6 * (1 + scale) * (1 + expansion)
    assert (residual[solution.converged] <= 1e-5 * expansion + floor).all()


@pytest.mark.parametrize("contraction", [0.9, 0.99])
def test_the_error_criterion_holds_for_the_plain_iteration(contraction):
    """On the slowest of modes, where the residual is far below the distance."""
    m = 300
    W = torch.full((m, m), contraction / m, dtype=torch.float64)
    c = gaussian(m, 16, torch.float64)[1] * 10.0 ** -(torch.arange(16, dtype=torch.float64)[:, None] / 4)
    z = deq.solve(W, c, "tanh", tol=1e-13, max_iter=100000, solver="anderson", on_failure="ignore").z
    solution = deq.solve(W, c, "tanh", tol=1e-5, max_iter=20000, criterion="error", solver="plain")
    assert worst_error(solution.z, z) <= 1.1e-5 and solution.residual.max() < 1e-5


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
def test_a_solution_without_numbers_can_be_printed():
    W, c, _ = gaussian(4, 2)
    shown = []
    torch.func.vmap(lambda c: shown.append(repr(deq.solve(W, c))) or c)(c)
    shown.append(repr(deq.solve(W.to("meta"), c[0].to("meta"))))
    assert all(text.startswith("Solution(z=(4,), plan=") for text in shown) and len(shown) == 2
