"""Low-precision increments (csrc/cpu/delta.cpp): as accurate as float32, and every promise of the row engine kept."""

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from close import assert_as_accurate, worst_error
from increments import LOW, adjoint, every, on_such_cpus, on_threads, solve
from problems import exact, gaussian, torch_adjoint, torch_loop

from deq import Status
from deq.activations import ACTIVATIONS
from deq.profiling.counter import Work

pytestmark = on_such_cpus


@every
@pytest.mark.parametrize("B", [16, 64])
def test_float32_evaluations_multiply_no_more_than_the_units_of_relu_that_are_active(B, increments):
    """What rounding leaves of a unit that has become zero is not multiplied: it was a tenth of all products here, and
    with slow modes so many that none were skipped."""
    W, c, _ = gaussian(192, B, scale=0.9)
    (solved,) = on_threads([1], lambda: solve(W, c, increments=increments))
    work = Work.last()
    assert solved.converged.all() and work.native_rows >= 2 * B
    active = (solved.z > 0).double().mean()
    assert work.native_products <= 1.02 * float(active) * work.native_rows * 192**2


@every
@pytest.mark.parametrize("scale", [0.45, 0.9])
@pytest.mark.parametrize(("m", "B"), [(1, 1), (3, 2), (17, 5), (64, 256), (130, 3), (333, 7), (512, 64), (1024, 20)])
def test_as_accurate_as_a_torch_loop(m, B, scale, increments):
    W, c, _ = gaussian(m, B, scale=scale)
    solved = solve(W, c, increments=increments)
    assert solved.converged.all() and (solved.residual <= 1e-5).all()
    assert_as_accurate(solved.z, torch_loop(W, c), exact(W, c))


@every
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation(activation, increments):
    W, c, g = gaussian(70, 30)
    solved = solve(W, c, activation, increments)
    z64 = exact(W, c, activation)
    assert solved.converged.all()
    assert_as_accurate(solved.z, torch_loop(W, c, activation), z64)
    d = ACTIVATIONS[activation].derivative(z64 @ W.double().mT + c.double()).float()
    back = adjoint(W.mT, g, d, increments)
    u64 = torch_adjoint(W.double(), c.double(), z64, g.double(), activation, tol=4e-15)
    assert back.converged.all()
    assert_as_accurate(back.z, torch_adjoint(W, c, z64.float(), g, activation), u64)
    if ACTIVATIONS[activation].derivative_of_value:
        of_value = adjoint(W.mT, g, z64.float(), increments, value_of=activation)
        assert_as_accurate(of_value.z, torch_adjoint(W, c, z64.float(), g, activation), u64)


@every
@pytest.mark.parametrize("tol", [1e-2, 1e-3, 1e-4, 1e-6])
@pytest.mark.parametrize("criterion", ["residual", "error"])
def test_any_tolerance(tol, criterion, increments):
    W, c, _ = gaussian(100, 50, scale=0.7)
    solved = solve(W, c, increments=increments, tol=tol, criterion=criterion)
    assert solved.converged.all()
    native = solve(W, c, increments="native", tol=tol, criterion=criterion)
    # Steps are a few more than in float32, never many: rounding is fed back.
    assert solved.iterations.double().mean() <= 1.25 * native.iterations.double().mean() + 2
    if criterion == "residual":
        assert (solved.residual <= tol).all()
        assert_as_accurate(solved.z, torch_loop(W, c, tol=tol), exact(W, c))
    else:
        assert worst_error(solved.z, exact(W, c)) <= 1.2 * tol


@every
def test_error_criterion_bounds_the_distance_of_slow_modes(increments):
    W, c, _ = gaussian(40, 30, torch.float64)
    W = W @ W.mT  # eigenvalues in [0, 0.95]: the error of a slow mode is q / (1 - q) = 19 steps
    W = (0.95 * W / torch.linalg.matrix_norm(W, 2)).float()
    truth = torch.linalg.solve(torch.eye(40, dtype=torch.float64) - W.double(), c.mT).mT
    solved = solve(W, c.float(), "identity", increments, criterion="error", tol=1e-4)
    assert solved.converged.all() and worst_error(solved.z, truth) <= 1.2e-4


@every
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_problems_are_computed_in_float32(dtype, increments):
    W, c, g = gaussian(40, 9, dtype)
    solved = solve(W, c, increments=increments)
    assert solved.z.dtype == dtype and solved.residual.dtype == torch.float32 and solved.converged.all()
    assert_as_accurate(solved.z, torch_loop(W, c, tol=1e-2), exact(W, c))
    back = adjoint(W.mT, g, solved.z, increments, value_of="tanh")
    assert back.z.dtype == dtype and back.converged.all()


def monotone(m, B, seed=0):
    """W with sym(W) < 1/2 whose plain iteration diverges, and its K and c' (deq/solvers/cayley.py)."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    A, S, c, g = draw(m, m) / m**0.5, draw(m, m) / m**0.5, draw(B, m), draw(B, m)
    eye = torch.eye(m, dtype=torch.float64)
    W = 0.5 * eye - A.mT @ A + S - S.mT
    V = torch.linalg.inv(2 * eye - W)
    return W, c, g, V @ W, V


def reflected_loop(K, c, value, tol):
    """The plain iteration of s = 2 value(y) - y, y = K s + c; returns value(y)."""
    s = torch.zeros_like(c)
    for _ in range(5000):
        y = s @ K.mT + c
        s, old = 2 * value(y) - y, s
        if ((s - old).norm(dim=-1) <= tol * s.norm(dim=-1)).all():
            break
    return value(y)


@every
@pytest.mark.parametrize("activation", ["relu", "tanh", "sigmoid", "softplus"])
def test_reflected_map(activation, increments):
    W, c, _, K, V = monotone(90, 40)
    K, c2 = K.float(), (2 * c @ V.mT).float()
    value = ACTIVATIONS[activation].value
    solved = solve(K, c2, activation, increments, reflected=True)
    assert solved.converged.all()
    truth = reflected_loop(K.double(), c2.double(), value, 1e-14)
    assert_as_accurate(solved.z, reflected_loop(K, c2, value, 1e-5), truth)
    # It is the equilibrium of the map that the plain iteration cannot find.
    f = value(truth @ W.mT + c)
    assert ((f - truth).norm(dim=1) / f.norm(dim=1)).max() < 1e-5


@every
def test_reflected_adjoint(increments):
    W, _, g, K, V = monotone(90, 40)
    d = (torch.rand(40, 90, generator=torch.Generator().manual_seed(3), dtype=torch.float64) > 0.5).double()
    K, g2 = K.mT.contiguous().float(), (2 * g @ V).float()
    solved = adjoint(K, g2, d.float(), increments, reflected=True)
    assert solved.converged.all()
    truth = reflected_loop(K.double(), g2.double(), lambda y: d * y, 1e-14)
    assert_as_accurate(solved.z, reflected_loop(K, g2, lambda y: d.float() * y, 1e-5), truth)
    eye = torch.eye(90, dtype=torch.float64)
    closed = torch.linalg.solve(eye - d.unsqueeze(-1) * W.mT, (d * g).unsqueeze(-1)).squeeze(-1)
    assert worst_error(truth, closed) < 1e-4  # K and g2 are rounded


@every
@pytest.mark.parametrize("activation", ["relu", "tanh"])
@pytest.mark.parametrize("m", [40, 300, 520])
def test_a_sample_does_not_depend_on_its_batch_mates(m, activation, increments):
    W, c, _ = gaussian(m, 150, scale=0.8)
    together = solve(W, c, activation, increments)
    order = torch.randperm(150, generator=torch.Generator().manual_seed(1))
    shuffled = solve(W, c[order], activation, increments)
    assert torch.equal(shuffled.z, together.z[order]) and torch.equal(shuffled.iterations, together.iterations[order])
    for b in range(0, 150, 7):
        alone = solve(W, c[b : b + 1], activation, increments)
        assert torch.equal(alone.z[0], together.z[b]) and alone.residual == together.residual[b]


@every
def test_anchors_of_a_wide_matrix_are_taken_together(increments):
    """Samples that contract at different rates want their anchors at different times. W is read for several at once,
    and every sample evaluates what it evaluates alone."""
    W, c, _ = gaussian(600, 8, scale=0.85)
    c = c * torch.linspace(-1, 4, 8).unsqueeze(1).exp() + torch.linspace(0, 2, 8).unsqueeze(
        1
    )  # other shares of units are live
    (together,) = on_threads([1], lambda: solve(W, c, "tanh", increments))
    shared = Work.last()
    alone = 0
    for b in range(8):
        (single,) = on_threads([1], lambda b=b: solve(W, c[b : b + 1], "tanh", increments))
        assert torch.equal(single.z[0], together.z[b])
        alone += Work.last().native_sweeps
    assert len(together.iterations.unique()) > 1
    assert shared.native_rows == alone and shared.native_sweeps <= alone / 3


@pytest.mark.skipif("int8" not in LOW, reason="this CPU or build multiplies no int8 increments")
@pytest.mark.parametrize("activation", ["relu", "tanh"])
def test_the_last_evaluation_is_one_of_increments_where_a_bound_proves_it(activation):
    """One float32 evaluation a sample, and a second one where the distance to the fixed point is estimated."""
    W, c, g = gaussian(512, 20, scale=0.45)
    solved = solve(W, c, activation)
    assert Work.last().native_rows == 20 and solved.converged.all()
    truth = exact(W, c, activation)
    assert_as_accurate(solved.z, torch_loop(W, c, activation), truth)
    d = ACTIVATIONS[activation].derivative(truth @ W.double().mT + c.double()).float()
    back = adjoint(W.mT, g, d)
    assert Work.last().native_rows == 20 and back.converged.all()
    assert (solve(W, c, activation, criterion="error").converged).all()
    assert Work.last().native_rows >= 40


@every
@pytest.mark.parametrize("activation", ["relu", "tanh"])
def test_weights_of_which_rounding_leaves_nothing_are_not_judged_by_it(activation, increments):
    """A column that meets a zero sets the scale of every row: their other weights, by which the solution contracts
    slowly enough to need twenty evaluations, are rounded away, and no step changes anything."""
    W, c, _ = gaussian(128, 20, scale=0.6)
    c = c.abs()
    W[0], W[:, 0], c[:, 0] = 0, 1e8, 0
    solved = solve(W, c, activation, increments)
    assert solved.converged.all()
    z, x = solved.z.double(), c.double()
    image = ACTIVATIONS[activation].value(z @ W.double().mT + x)
    assert ((image - z).norm(dim=1) <= 1e-5 * image.norm(dim=1)).all()


@every
def test_thread_count_does_not_matter(increments):
    W, c, _ = gaussian(200, 130)
    first, *others = on_threads((1, 2, 3, 2), lambda: solve(W, c, increments=increments).z)
    assert all(torch.equal(first, z) for z in others)


@every
@pytest.mark.parametrize("activation", ["relu", "tanh"])
@pytest.mark.parametrize(("m", "B"), [(31, 9), (40, 20), (65, 70), (100, 30), (130, 3), (333, 40), (520, 7), (1030, 3)])
def test_slow_samples_go_on_in_sweeps(m, B, activation, increments):
    """One stage of a sweep, two, three and four; samples shared by threads, and columns by teams."""
    scale = 0.9 if activation == "relu" else 0.7
    W, c, g = gaussian(m, B, scale=scale)
    solved, *others = on_threads((1, 2, 3), lambda: solve(W, c, activation, increments))
    assert solved.converged.all() and (solved.residual <= 1e-5).all()
    truth = exact(W, c, activation)
    assert_as_accurate(solved.z, torch_loop(W, c, activation), truth)
    for other in others:
        assert torch.equal(other.z, solved.z) and torch.equal(other.iterations, solved.iterations)
    alone = solve(W, c[1:2], activation, increments)
    assert torch.equal(alone.z[0], solved.z[1]) and alone.iterations == solved.iterations[1]
    d = ACTIVATIONS[activation].derivative(truth @ W.double().mT + c.double()).float()
    back, other = on_threads((1, 2), lambda: adjoint(W.mT, g, d, increments))
    assert back.converged.all() and torch.equal(back.z, other.z)
    wanted = torch_adjoint(W.double(), c.double(), truth, g.double(), activation, tol=4e-15)
    assert_as_accurate(back.z, torch_adjoint(W, c, truth.float(), g, activation), wanted)


@every
def test_sweeps_are_fewer_than_steps(increments):
    W, c, _ = gaussian(256, 40, scale=1.1)
    native = solve(W, c, increments="native").iterations.double().mean()
    assert solve(W, c, increments=increments).iterations.double().mean() < 0.85 * native


@every
def test_sweeps_of_growing_increments(increments):
    """A W far from normal: increments grow by thousands before they shrink, past any scale guessed from the last."""
    m = 40
    W = 0.3 * torch.eye(m) + torch.diag(torch.full((m - 1,), 0.9), 1)  # against the order of the sweeps
    c = torch.zeros(5, m)
    c[:, -1] = torch.arange(1.0, 6.0)
    for matrix, injection in ((W, c), (W.flip(0, 1), c.flip(1))):
        solved = solve(matrix, injection, increments=increments)
        assert solved.converged.all()
        z = solved.z.double()
        f = (z @ matrix.double().mT + injection.double()).relu()
        assert ((f - z).norm(dim=1) <= 1e-5 * f.norm(dim=1)).all()


@every
@pytest.mark.parametrize("activation", ["relu", "leaky_relu", "identity"])
def test_scale_invariance(activation, increments):
    W, c, _ = gaussian(60, 30)
    one = solve(W, c, activation, increments)
    for exponent in (-100, -40, 40, 100):
        scaled = solve(W, c * 2.0**exponent, activation, increments)
        assert torch.equal(scaled.iterations, one.iterations) and torch.equal(scaled.z * 2.0**-exponent, one.z)
    for factor in (1e-30, 1e30):  # rounds c itself
        scaled = solve(W, c * factor, activation, increments)
        assert scaled.converged.all() and ((scaled.iterations - one.iterations).abs() <= 2).all()
        assert_as_accurate((scaled.z.double() / factor).float(), torch_loop(W, c, activation), exact(W, c, activation))


@pytest.mark.parametrize("scale", [1e-30, 1e-20])
@every
def test_tiny_equilibria_of_bounded_activations(scale, increments):
    """tanh(x) = x there, and squares of float32 underflow: such samples are computed in float32 throughout."""
    W, c, _ = gaussian(30, 20)
    solved = solve(W, c * scale, "tanh", increments)
    assert solved.converged.all()
    assert_as_accurate(solved.z / scale, torch_loop(W, c, "identity"), exact(W, c, "identity"))


@every
def test_warm_start(increments):
    W, c, _ = gaussian(80, 16, scale=0.9)
    cold = solve(W, c, increments=increments)
    warm = solve(W, c, increments=increments, z0=cold.z)
    assert warm.converged.all() and (warm.iterations <= 3).all()
    far = solve(W, c, increments=increments, z0=1e6 * torch.ones_like(c))
    assert far.converged.all() and (far.iterations > cold.iterations).all()
    assert_as_accurate(far.z, torch_loop(W, c), exact(W, c))


@every
def test_strides_batches_and_stacks(increments):
    parts = [gaussian(45, 6, seed=s) for s in range(4)]
    W, c = (torch.stack([p[i] for p in parts]) for i in (0, 1))
    stacked = solve(W, c, increments=increments)
    for s in range(4):
        single = solve(W[s], c[s], increments=increments)
        assert torch.equal(single.z, stacked.z[s])
        wide, columns = torch.zeros(6, 90), torch.zeros(45, 50)
        wide[:, ::2], columns[:, 5:] = c[s], W[s].mT
        strided = solve(columns[:, 5:].mT, wide[:, ::2], increments=increments)
        assert torch.equal(strided.z, single.z)
    one = solve(W[0], c[0, :1].expand(9, 45), increments=increments)
    assert torch.equal(one.z, solve(W[0], c[0, :1], increments=increments).z.expand(9, 45))
    assert solve(W[0], c[0, :0], increments=increments).z.shape == (0, 45)


@every
def test_weights_of_very_different_sizes(increments):
    """A scale for every row of W: a row of 1e-6 keeps its digits, one of 1e-37 counts as zero until an anchor."""
    W, c, _ = gaussian(50, 20, torch.float64)
    rows = 10.0 ** torch.linspace(-37, 0, 50, dtype=torch.float64)
    W, c = (W * rows[:, None]).float(), (c * torch.where(rows > 1e-20, rows, 0.0)).float()
    for activation in ("identity", "tanh"):
        solved = solve(W, c, activation, increments)
        assert solved.converged.all()
        assert_as_accurate(solved.z, torch_loop(W, c, activation), exact(W, c, activation))


# ---- failures -------------------------------------------------------------------------------------------------------


@every
def test_what_diverges_is_said_to_diverge(increments):
    W, c, _ = gaussian(60, 20)
    c[:10] = -c[:10].abs() - 1  # relu gives zero at once, and W >= 0 below keeps the others growing
    W = W.abs() * 3
    solved = solve(W, c.where(torch.arange(20)[:, None] < 10, c.abs()), increments=increments)
    assert solved.converged[:10].all() and (solved.z[:10] == 0).all()
    assert (solved.status[10:] == Status.DIVERGED).all() and torch.isfinite(solved.z).all()
    assert solved.report[0] == 10


@every
@pytest.mark.parametrize("max_iter", [1, 2, 5, 9])
def test_out_of_iterations(max_iter, increments):
    W, c, _ = gaussian(60, 20, scale=0.9)
    solved = solve(W, c, increments=increments, max_iter=max_iter)
    native = solve(W, c, increments="native", max_iter=max_iter)
    assert (solved.status == Status.MAX_ITER).all() and (solved.iterations == max_iter).all()
    # The best iterate, and the float32 residual of its point: about as good as that many steps in float32.
    f = torch.relu(solved.z @ W.mT + c)
    residual = (f - solved.z).norm(dim=1) / f.norm(dim=1)
    assert (residual <= 1.5 * solved.residual).all() and (solved.residual <= 1.5 * native.residual + 1e-3).all()


@every
def test_a_tolerance_below_float32_stalls_at_the_floor(increments):
    W, c, _ = gaussian(60, 20)
    solved = solve(W, c, increments=increments, tol=1e-9)
    native = solve(W, c, increments="native", tol=1e-9)
    assert not solved.converged[~native.converged].any() or (solved.residual[solved.converged] <= 1e-9).all()
    assert torch.isin(solved.status, torch.tensor([Status.CONVERGED, Status.STALLED])).all()
    assert (solved.residual < 1e-6).all() and (solved.iterations < 400).all()
    assert_as_accurate(solved.z, native.z, exact(W, c))


@every
def test_bad_input_is_refused_and_stays_alone(increments):
    W, c, g = gaussian(33, 9)
    good = solve(W, c, increments=increments)
    broken = c.clone()
    broken[4, 7] = torch.nan
    solved = solve(W, broken, increments=increments)
    others = torch.arange(9) != 4
    assert solved.status[4] == Status.NONFINITE and solved.report[2] == 5
    assert torch.equal(solved.z[others], good.z[others])
    g[2, 3] = torch.inf
    back = adjoint(W.mT, g, torch.ones_like(g), increments)
    assert torch.isnan(back.z[2]).all() and torch.isfinite(back.z[3:]).all()
    W[1, 2] = torch.inf
    assert solve(W, c, increments=increments).report[1] == 33 + 2 + 1


@hypothesis.settings(deadline=None, max_examples=60, derandomize=True)
@hypothesis.given(
    m=st.integers(1, 70),
    B=st.integers(0, 20),
    activation=st.sampled_from(list(ACTIVATIONS)),
    increments=st.sampled_from(LOW or ["native"]),
    scale=st.floats(0.0, 6.0),
    magnitude=st.sampled_from([1e-30, 1e-3, 1.0, 1e3, 1e30]),
    seed=st.integers(0, 10**6),
)
def test_never_nan_and_always_an_honest_status(m, B, activation, increments, scale, magnitude, seed):
    W, c, _ = gaussian(m, B, seed=seed, scale=scale)
    solved = solve(W, c * magnitude, activation, increments, max_iter=300)
    assert torch.isfinite(solved.z).all() and (solved.iterations <= 300).all()
    z, c64 = solved.z.double(), (c * magnitude).double()
    f = ACTIVATIONS[activation].value(z @ W.double().mT + c64)
    residual = (f - z).norm(dim=1) / f.norm(dim=1).clamp(min=1e-30)  # float32 ends at 1e-38
    # z is one evaluation past the judged point: its residual may exceed that by W's expansion, and by rounding.
    expansion = max(1.0, ACTIVATIONS[activation].lipschitz * float(torch.linalg.matrix_norm(W.double(), 2)))
    floor = 4e-6 * (1 + scale) * (1 + expansion)
    assert (residual[solved.converged] <= 1e-5 * expansion + floor).all()
