"""deq.fixed_point by every solver: accuracy, promises of every sample, options."""

import pytest
import torch
from close import assert_as_accurate
from fixed_points import SOLVERS, cell, solve
from problems import exact, gaussian, torch_adjoint, torch_loop

import deq
from deq import Status


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("m", "B"), [(1, 5), (17, 1), (33, 5), (7, 0)])
@pytest.mark.parametrize("solver", SOLVERS)
def test_accuracy(solver, m, B, dtype):
    W, c, g = gaussian(m, B, dtype)
    tol = 1e-5 if dtype == torch.float32 else 1e-10
    W, c = W.requires_grad_(), c.requires_grad_()
    solution = solve(W, c, solver=solver, on_failure="raise", tol=tol)
    assert solution.converged.all() and solution.status.shape == (B,)
    with torch.no_grad():
        true = exact(W, c, "tanh")
        assert_as_accurate(solution.z, torch_loop(W, c, "tanh", tol), true)
        assert (solution.residual <= tol).all()
        u = torch_adjoint(W.double(), c.double(), true, g.double(), "tanh", 4e-15)
        plain_z = torch_loop(W, c, "tanh", tol)
        plain_u = torch_adjoint(W, c, plain_z, g, "tanh", tol)
    dW, dc = torch.autograd.grad(solution.z, (W, c), g)
    assert_as_accurate(dc, plain_u, u)
    assert_as_accurate(*(t.reshape(1, -1) for t in (dW, plain_u.mT @ plain_z, u.mT @ true)))


@pytest.mark.parametrize("solver", SOLVERS)
def test_residual_is_that_of_the_last_point(solver):
    """``z = f(y)`` with ``||f(y) - y|| / ||f(y)||`` reported: one more evaluation changes z by no more than that."""
    W, c, _ = gaussian(40, 6, torch.float64)
    solution = solve(W, c, solver=solver, tol=1e-6)
    change = (cell(W, c)(solution.z) - solution.z).norm(dim=1) / solution.z.norm(dim=1)
    assert (change <= solution.residual).all() and (solution.residual <= 1e-6).all()


@pytest.mark.parametrize("power", [-90, 90])
@pytest.mark.parametrize("solver", SOLVERS)
def test_scale_invariance(solver, power):
    """A power of two in front of the injection or of the loss changes nothing but the exponent."""
    W, c, g = gaussian(24, 4, torch.float64)
    scale = 2.0**power

    def run(c, g):
        c = c.clone().requires_grad_()
        f = lambda z: torch.relu(z @ W.mT + c)  # noqa: E731
        solution = deq.fixed_point(f, torch.zeros_like(c), solver=solver)
        return solution, torch.autograd.grad(solution.z, c, g)[0]

    one, gradient = run(c, g)
    scaled, scaled_gradient = run(c * scale, g * scale)
    assert torch.equal(scaled.iterations, one.iterations)
    assert torch.equal(scaled.z, one.z * scale)
    assert torch.equal(scaled_gradient, gradient * scale)


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_sample_does_not_see_its_mates(solver):
    W, c, _ = gaussian(16, 6, torch.float64)
    f = lambda c: lambda z: torch.tanh((W * z.unsqueeze(1)).sum(-1) + c)  # noqa: E731  same rounding for any batch
    together = deq.fixed_point(f(c), torch.zeros_like(c), solver=solver, tol=1e-8)
    for i in range(6):
        alone = deq.fixed_point(f(c[i : i + 1]), torch.zeros(1, 16, dtype=c.dtype), solver=solver, tol=1e-8)
        assert int(alone.status) == int(together.status[i]) == Status.CONVERGED
        assert torch.equal(alone.z[0], together.z[i])
        assert int(alone.iterations) == int(together.iterations[i])


@pytest.mark.parametrize("max_iter", [1, 2, 3, 17, 30, 500])
def test_newton_krylov_of_a_sample_with_a_hard_mate(max_iter):
    """Which takes twice the products: each counts its own, and none has more than it may."""
    torch.manual_seed(0)
    A = torch.randn(60, 60, dtype=torch.float64)
    A *= 2 / torch.linalg.matrix_norm(A, 2)
    rate, c = torch.tensor([[0.09], [1.0]], dtype=torch.float64), torch.randn(2, 60, dtype=torch.float64)
    options = {"solver": "newton_krylov", "max_iter": max_iter, "on_failure": "ignore", "keep": (2, 12)}

    def run(rows):
        f = lambda z: torch.tanh(rate[rows] * (z.unsqueeze(1) * A).sum(2) + c[rows])  # noqa: E731
        return deq.fixed_point(f, torch.zeros_like(c[rows]), **options)

    together = run(slice(0, 2))
    assert (together.iterations <= max_iter).all()
    for i in range(2):
        alone = run(slice(i, i + 1))
        assert torch.equal(alone.z[0], together.z[i]) and torch.equal(alone.residual[0], together.residual[i])
        assert (int(alone.status), int(alone.iterations)) == (int(together.status[i]), int(together.iterations[i]))
        for state, of_all in zip(alone.trajectory, together.trajectory, strict=True):
            assert state is None or torch.equal(state[0], of_all[i])
    if max_iter == 500:
        assert together.converged.all() and together.iterations[1] > 1.5 * together.iterations[0]


@pytest.mark.parametrize("solver", SOLVERS)
def test_failures_leave_the_others_alone(solver):
    """One sample grows, one becomes NaN, one has no fixed point; the rest converge, and nothing returned is NaN."""
    rate = torch.tensor([0.5, 3.0, 0.5, 0.5, -0.3], dtype=torch.float64).unsqueeze(1)
    shift = torch.ones(5, 4, dtype=torch.float64)

    def f(z):
        grows = z.square() + 1e3  # no fixed point, and every step takes it further
        nan = torch.where(z.abs() > 0.5, torch.nan, 0.9 - z * 0)
        y = rate * z + shift
        y = torch.where(torch.arange(5).unsqueeze(1) == 1, grows, y)
        return torch.where(torch.arange(5).unsqueeze(1) == 2, nan, y)

    with pytest.warns(deq.ConvergenceWarning, match="2 of 5 samples did not converge"):
        solution = deq.fixed_point(f, torch.zeros(5, 4, dtype=torch.float64), solver=solver)
    good = [0, 3, 4]
    assert (solution.status[good] == Status.CONVERGED).all()
    torch.testing.assert_close(solution.z[good], (shift / (1 - rate))[good], rtol=1e-9, atol=0)
    assert solution.status[1] in (Status.DIVERGED, Status.STALLED, Status.MAX_ITER)
    assert solution.status[2] == Status.NONFINITE
    assert torch.isfinite(solution.z).all()


@pytest.mark.parametrize("solver", SOLVERS)
def test_max_iter(solver):
    W, c, _ = gaussian(30, 3, torch.float64)
    W = 2 * W
    for max_iter in (1, 2, 5):
        solution = solve(W, c, solver=solver, tol=1e-12, max_iter=max_iter, on_failure="ignore")
        assert (solution.status == Status.MAX_ITER).all()
        if solver != "newton_krylov":
            assert (solution.iterations == max_iter).all()
    assert torch.equal(solve(W, c, max_iter=1, on_failure="ignore").z, torch.tanh(c))


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("solver", ["anderson", "broyden", "newton_krylov"])
def test_depth(solver, depth):
    W, c, _ = gaussian(30, 3, torch.float64)
    solution = solve(W, c, solver=solver, depth=depth, on_failure="raise")
    deeper = solve(W, c, solver=solver, depth=8, on_failure="raise")
    if solver != "newton_krylov":  # whose outer steps ask for more products than they need
        assert (deeper.iterations <= solution.iterations).all()
    if depth == 1 and solver == "anderson":
        assert torch.equal(solution.iterations, solve(W, c, solver="plain").iterations)


def test_anderson_at_tight_tolerance():
    """Its regulariser is relative: at 1e-13 it still takes far fewer evaluations than the plain iteration."""
    W, c, _ = gaussian(50, 4, torch.float64, scale=0.45)
    W = W * (0.97 / torch.linalg.eigvals(W).abs().max())
    f = lambda z: z @ W.mT + c  # noqa: E731
    plain, anderson = (
        deq.fixed_point(f, torch.zeros_like(c), solver=s, tol=1e-13, max_iter=3000, on_failure="raise")
        for s in ("plain", "anderson")
    )
    assert (3 * anderson.iterations <= plain.iterations).all()


@pytest.mark.parametrize("solver", ["anderson", "broyden", "newton_krylov", "auto"])
def test_converges_where_plain_diverges(solver):
    c = torch.linspace(-1, 1, 12, dtype=torch.float64).view(3, 4)
    f = lambda z: -1.5 * z + c  # noqa: E731
    solution = deq.fixed_point(f, torch.zeros_like(c), solver=solver, on_failure="raise")
    torch.testing.assert_close(solution.z, c / 2.5, rtol=1e-9, atol=0)
    with pytest.warns(deq.ConvergenceWarning, match="3 DIVERGED"):
        deq.fixed_point(f, torch.zeros_like(c), solver="plain")


def test_criteria():
    """f contracts by exactly 0.9: the distance to the fixed point is r 9 in units of it."""
    c = torch.ones(2, 3, dtype=torch.float64)
    f = lambda z: 0.9 * z + c  # noqa: E731
    zero = torch.zeros_like(c)
    by_residual, by_error = (
        deq.fixed_point(f, zero, solver="plain", tol=1e-4, criterion=name) for name in ("residual", "error")
    )
    assert (by_error.iterations > by_residual.iterations).all()
    # z is one evaluation better than the point that was judged.
    assert ((by_error.z - 10).abs() / 10 <= 1.01e-4).all() and ((by_residual.z - 10).abs() / 10 > 1.01e-4).all()
    absolute = deq.fixed_point(f, zero, solver="plain", tol=1e-2, criterion="absolute")
    step = 0.9 ** (absolute.iterations.double() - 1) * 3**0.5  # ||f(y) - y|| at the last y
    assert (step <= 1e-2).all()


def test_damping():
    c = torch.ones(2, 3, dtype=torch.float64)
    f = lambda z: -1.5 * z + c  # noqa: E731
    solution = deq.fixed_point(f, torch.zeros_like(c), solver="plain", damping=0.5, on_failure="raise")
    torch.testing.assert_close(solution.z, c / 2.5, rtol=1e-9, atol=0)
    mixed = deq.fixed_point(f, torch.zeros_like(c), solver="anderson", damping=0.5, on_failure="raise")
    torch.testing.assert_close(mixed.z, c / 2.5, rtol=1e-9, atol=0)


def test_warm_start_and_trajectory():
    W, c, _ = gaussian(20, 3, torch.float64)
    cold = solve(W, c, keep=(1, 4, 400))
    assert torch.equal(cold.trajectory[0], torch.tanh(c))
    assert torch.equal(cold.trajectory[2], cold.z)  # which was reached before
    other = solve(W, c.clone().requires_grad_(), keep=(1, 4, 400))
    assert all(map(torch.equal, other.trajectory, cold.trajectory)) and not other.trajectory[2].requires_grad
    distance = [(state - cold.z).norm() for state in cold.trajectory[:2]]
    assert 0 < distance[1] < distance[0]
    warm = deq.fixed_point(cell(W, c), cold.z)
    assert (warm.iterations < cold.iterations).all()
