"""deq.fixed_point against closed forms and float64 references: every solver, every gradient, every way to fail."""

from types import SimpleNamespace

import pytest
import torch
from close import assert_as_accurate
from problems import exact, gaussian, torch_adjoint, torch_loop

import deq
from deq import Status, implicit_function
from deq.held import Applied

SOLVERS = ("plain", "anderson", "broyden", "newton_krylov", "auto")


def cell(W, c):
    return lambda z: torch.tanh(z @ W.mT + c)


def solve(W, c, **options):
    return deq.fixed_point(cell(W, c), torch.zeros_like(c), **options)


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
    assert cold.trajectory[2] is None
    distance = [(state - cold.z).norm() for state in cold.trajectory[:2]]
    assert 0 < distance[1] < distance[0]
    warm = deq.fixed_point(cell(W, c), cold.z)
    assert (warm.iterations < cold.iterations).all()


@pytest.mark.parametrize("kind", [tuple, list])
def test_state_of_several_tensors(kind):
    """Two coupled tensors give what their concatenation gives."""
    W, c, g = gaussian(10, 4, torch.float64)
    W = W.requires_grad_()

    def f(z):
        assert type(z) is kind
        flat = torch.cat((z[0].reshape(4, 6), z[1]), 1)
        out = torch.tanh(flat @ W.mT + c)
        return out[:, :6].reshape(4, 2, 3), out[:, 6:]

    z0 = kind((torch.zeros(4, 2, 3, dtype=torch.float64), torch.zeros(4, 4, dtype=torch.float64)))
    solution = deq.fixed_point(f, z0)
    one = solve(W, c)
    assert type(solution.z) is kind and torch.equal(solution.iterations, one.iterations)
    joined = torch.cat((solution.z[0].reshape(4, 6), solution.z[1]), 1)
    assert torch.equal(joined, one.z)
    assert torch.equal(torch.autograd.grad(joined, W, g)[0], torch.autograd.grad(one.z, W, g)[0])


def test_what_counts_as_a_sample():
    f = lambda z: z.cos()  # noqa: E731
    assert deq.fixed_point(f, torch.zeros(5)).status.shape == ()
    assert deq.fixed_point(f, torch.tensor(0.3)).status.shape == ()
    assert deq.fixed_point(f, torch.zeros(5), batch_dims=1).status.shape == (5,)
    assert deq.fixed_point(f, torch.zeros(5, 2)).status.shape == (5,)
    assert deq.fixed_point(f, torch.zeros(5, 2, 3), batch_dims=2).status.shape == (5, 2)
    assert deq.fixed_point(f, torch.zeros(5, 2), batch_dims=0).status.shape == ()
    assert deq.fixed_point(f, torch.zeros(0, 3)).z.shape == (0, 3)
    assert deq.fixed_point(f, torch.zeros(2, 0)).converged.all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits(dtype):
    """f computes in 16 bits: the default tolerance is what that can reach, and gradients come in 16 bits."""
    W, c, g = gaussian(32, 4)
    W, c, g = W.to(dtype).requires_grad_(), c.to(dtype), g.to(dtype)
    solution = solve(W, c, on_failure="raise")
    assert solution.z.dtype == dtype
    with torch.no_grad():
        plain = torch_loop(W, c, "tanh", tol=3e-2 if dtype == torch.bfloat16 else 5e-3, max_iter=50)
        assert_as_accurate(solution.z, plain, exact(W, c, "tanh"))
    (dW,) = torch.autograd.grad(solution.z, W, g)
    assert dW.dtype == dtype and torch.isfinite(dW).all()


def test_noncontiguous_and_expanded_states():
    W, c, _ = gaussian(12, 5, torch.float64)
    expected = solve(W, c).z
    wide = torch.zeros(12, 5, dtype=torch.float64).T
    assert torch.equal(deq.fixed_point(cell(W, c), wide).z, expected)
    assert torch.equal(deq.fixed_point(cell(W, c), torch.zeros(1, 1, dtype=torch.float64).expand(5, 12)).z, expected)


@pytest.mark.parametrize("backward", ["one_step", "phantom", "neumann", "unrolled"])
def test_other_gradients(backward):
    """Each against its definition, written out."""
    W, c, g = gaussian(15, 3, torch.float64)
    W = W.requires_grad_()
    options = {"backward_steps": 4, "backward_damping": 0.3, "tol": 1e-12}
    z = solve(W, c, solver="plain", backward=backward, **options).z
    (actual,) = torch.autograd.grad(z, W, g)
    star = solve(W, c, solver="plain", tol=1e-15, on_failure="ignore").z.detach()
    f = cell(W, c)
    if backward == "one_step":
        expected = torch.autograd.grad(f(star), W, g)[0]
    elif backward == "phantom":
        y = star
        for _ in range(4):
            y = 0.7 * y + 0.3 * f(y)
        expected = torch.autograd.grad(y, W, g)[0]
    elif backward == "neumann":
        h = star.clone().requires_grad_()
        image = f(h)
        u = g
        for _ in range(3):
            u = g + torch.autograd.grad(image, h, u, retain_graph=True)[0]
        expected = torch.autograd.grad(image, W, u)[0]
    else:
        y = torch.zeros_like(c)
        for _ in range(200):
            y = f(y)
        expected = torch.autograd.grad(y, W, g)[0]
    torch.testing.assert_close(actual, expected, rtol=1e-8, atol=1e-11)


def test_backward_options():
    """The adjoint has a solver and a tolerance of its own."""
    W, c, g = gaussian(40, 3, torch.float64)
    W = W.requires_grad_()
    reference = torch.autograd.grad(solve(W, c, tol=1e-13).z, W, g)[0]

    def error(**options):
        gradient = torch.autograd.grad(solve(W, c, tol=1e-13, **options).z, W, g)[0]
        return float((gradient - reference).norm() / reference.norm())

    assert error(backward_tol=1e-3) > 1e-6
    for solver in SOLVERS:
        assert error(backward_solver=solver) < 1e-10
    with pytest.warns(deq.ConvergenceWarning, match="the gradient of deq.fixed_point: 3 of 3"):
        error(backward_max_iter=2)


@pytest.mark.parametrize("loss_scale", [1e-30, 1e-6, 1e6, 1e30])
def test_gradient_is_linear_in_the_loss(loss_scale):
    W, c, g = gaussian(32, 8)
    W = W.requires_grad_()
    z = solve(W, c).z
    one = torch.autograd.grad(z, W, g, retain_graph=True)[0]
    scaled = torch.autograd.grad(z, W, g * loss_scale)[0]
    torch.testing.assert_close(scaled / loss_scale, one, rtol=1e-5, atol=1e-5 * float(one.abs().max()))


def test_a_nan_gradient_stays_in_its_sample():
    W, c, g = gaussian(8, 3, torch.float64)
    c = c.requires_grad_()
    g[1, 2] = torch.nan
    (dc,) = torch.autograd.grad(solve(W, c).z, c, g)
    assert torch.isnan(dc[1]).all() and torch.isfinite(dc[[0, 2]]).all()


def test_gradients_reach_what_f_closes_over():
    """Parameters, tensors with a history of which one depends on another, tensors inside custom functions."""
    torch.manual_seed(0)
    linear = torch.nn.Linear(6, 6).double()
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)

    class Scale(torch.autograd.Function):
        @staticmethod
        def forward(z, s):
            return z * s

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.save_for_backward(*inputs)

        @staticmethod
        def backward(ctx, g):
            z, s = ctx.saved_tensors
            return g * s, (g * z).sum()

    s = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)

    def run(x, s, weight, bias, solve):
        c = torch.nn.functional.linear(x, weight, bias)  # depends on weight, which f uses as well
        return solve(lambda z: Scale.apply(torch.tanh(z @ weight.T + c), s), torch.zeros_like(c))

    def unrolled(f, z):
        for _ in range(100):
            z = f(z)
        return z

    inputs = (x, s, linear.weight, linear.bias)
    ours = run(*inputs, lambda f, z: deq.fixed_point(f, z, tol=1e-13).z)
    expected = run(*inputs, unrolled)
    for a, b in zip(torch.autograd.grad(ours.sum(), inputs), torch.autograd.grad(expected.sum(), inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
    with pytest.raises(RuntimeError, match="differentiates it once, not twice"):
        z = run(*inputs, lambda f, z: deq.fixed_point(f, z, tol=1e-13).z)
        torch.autograd.grad(z.sum(), s, create_graph=True)


@pytest.mark.parametrize("kind", ["leaves", "input", "closure", "attribute"])
def test_every_evaluation_is_used(kind, monkeypatch):
    """Finding what f closes over costs no evaluation where that are leaves, or within reach; a gradient does not watch
    an f that closes over leaves, or holds the rest itself."""
    W, c, g = gaussian(12, 3, torch.float64)
    W, c = W.requires_grad_(), c.requires_grad_()
    x = c if kind == "leaves" else 2 * c
    calls, exchanges = [], []

    def cell(z, x):
        calls.append(z)
        return torch.tanh(z @ W.mT + x)

    class Exchange(implicit_function.Exchange):
        def __init__(self, old, new):
            exchanges.append(old)
            super().__init__(old, new)

    monkeypatch.setattr(implicit_function, "Exchange", Exchange)
    holder = SimpleNamespace(x=x)
    kinds = {"input": Applied(cell, (x,)), "attribute": lambda z: cell(z, holder.x)}
    solution = deq.fixed_point(kinds.get(kind, lambda z: cell(z, x)), torch.zeros_like(c), tol=1e-12)
    assert len(calls) == int(solution.iterations.max()) + (kind == "attribute")
    calls.clear()
    grads = torch.autograd.grad(solution.z, (W, c), g, retain_graph=True)
    assert len(calls) == 1 and bool(exchanges) == (kind == "attribute")
    expected = torch.autograd.grad(deq.solve(W, x, "tanh", tol=1e-12).z, (W, c), g)
    torch.testing.assert_close(grads, expected, rtol=1e-8, atol=1e-9)


def test_an_input_that_f_takes_twice():
    """As its argument and from elsewhere: the gradient has both parts."""
    W, c, g = gaussian(12, 3, torch.float64)
    c = c.requires_grad_()
    x = 2 * c
    z = deq.nn.Equilibrium(lambda z, y: torch.tanh(z @ W.mT + y + 0.5 * x), tol=1e-12)(x)
    expected = deq.solve(W, 1.5 * x, "tanh", tol=1e-12).z
    torch.testing.assert_close(
        *(torch.autograd.grad(z, c, g, retain_graph=True)[0] for z in (z, expected)), rtol=1e-8, atol=1e-9
    )


def test_hooks_of_leaves_see_one_gradient():
    W, c, g = gaussian(12, 3, torch.float64)
    W = W.requires_grad_()
    seen = []
    W.register_hook(lambda grad: seen.append(grad) or 3 * grad)
    (grad,) = torch.autograd.grad(solve(W, c).z, W, g)
    assert len(seen) == 1
    torch.testing.assert_close(grad, 3 * seen[0])


@pytest.mark.parametrize("kind", ["tensor", "index", "module", "behind"])
@pytest.mark.parametrize("twice", [False, True])
def test_variables_that_a_loop_gives_other_values(kind, twice):
    """The backward pass, after the loop, has f with those of its own turn."""
    W, x, _ = gaussian(6, 9, torch.float64)
    W, xs = W.requires_grad_(), x.split(3)
    modules = [Shift(x) for x in xs]

    def total(solve):
        loss = 0
        for i, x in enumerate(xs):
            module = modules[i]

            def step(z):
                return torch.tanh(z @ W.mT + x)  # noqa: B023

            f = {
                "tensor": lambda z: torch.tanh(z @ W.mT + x),  # noqa: B023
                "index": lambda z: torch.tanh(z @ W.mT + xs[i]),  # noqa: B023
                "module": lambda z: torch.tanh(module(z @ W.mT)),  # noqa: B023
                "behind": lambda z: step(z),
            }
            loss = loss + solve(f[kind]).square().sum()
        return torch.autograd.grad(loss, W, create_graph=twice)[0]

    def unrolled(f):
        z = torch.zeros_like(xs[0])
        for _ in range(150):
            z = f(z)
        return z

    expected = total(unrolled)
    ours = total(lambda f: deq.fixed_point(f, torch.zeros_like(xs[0]), tol=1e-13).z)
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-11)


class Shift(torch.nn.Module):
    def __init__(self, shift):
        super().__init__()
        self.shift = shift

    def forward(self, z):
        return z + self.shift


@pytest.mark.parametrize("kind", ["closure", "layer"])
def test_data_that_is_overwritten_before_the_backward_pass(kind):
    """Refused, as by torch; what f itself writes is not."""
    W, x, _ = gaussian(6, 3, torch.float64)
    W, calls = W.requires_grad_(), torch.zeros((), dtype=torch.int64)
    block = torch.nn.Module()
    block.forward = lambda z, x: torch.tanh(z @ W.mT + x)

    def f(z):
        calls.add_(1)
        return block(z, x)

    def run():
        return deq.nn.Equilibrium(block)(x) if kind == "layer" else deq.fixed_point(f, torch.zeros_like(x)).z

    z = run()
    torch.autograd.grad(z.sum(), W, retain_graph=True)
    torch.autograd.grad(z.sum(), W)
    z = run()
    x.mul_(0.5)
    with pytest.raises(RuntimeError, match=r"modified by an inplace operation: the one of shape \(3, 6\)"):
        z.sum().backward()


def test_no_gradient_no_graph():
    W, c, _ = gaussian(6, 3)
    assert not solve(W, c).z.requires_grad
    W = W.requires_grad_()
    with torch.no_grad():
        assert not solve(W, c).z.requires_grad
    assert solve(W, c).z.requires_grad
    assert not solve(W, c).detach().z.requires_grad


def test_memory_between_forward_and_backward():
    """Whatever the number of iterations, z and what f closes over are all that waits for the backward pass."""
    W, c, _ = gaussian(20, 4, torch.float64)
    W = W.requires_grad_()
    saved = []
    for tol in (1e-3, 1e-12):
        saved.clear()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.shape) or t, lambda t: t):
            z = solve(W, c, tol=tol).z
        assert saved == [(4, 20), (20, 20)]
        del z


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"stop_mode": "rel"}, TypeError, "has no option stop_mode='rel'"),
        ({"solvr": "plain"}, TypeError, "did you mean 'solver'"),
        ({"solver": "newton"}, ValueError, "solver must be one of 'plain', 'anderson'"),
        ({"tol": 0.0}, ValueError, "tol must lie between 0"),
        ({"tol": True}, TypeError, "tol must be a number; got True"),
        ({"max_iter": 2.0}, TypeError, "max_iter must be an integer; got 2.0"),
        ({"max_iter": 0}, ValueError, "max_iter must be at least 1"),
        ({"depth": 0}, ValueError, "depth must be at least 1"),
        ({"damping": 2.5}, ValueError, "damping must lie between 0 and 2"),
        ({"backward": "ift"}, ValueError, "backward must be one of"),
        ({"criterion": "rel"}, ValueError, "criterion must be one of"),
        ({"on_failure": "warning"}, ValueError, "on_failure must be one of"),
        ({"batch_dims": 3}, ValueError, r"batch_dims must lie in 0..2"),
        ({"keep": (0,)}, ValueError, "keep must be at least 1"),
        ({"keep": 3}, TypeError, "keep must be a sequence of integers; got 3"),
        ({"keep": [1, 2.5]}, TypeError, "keep must be a sequence of integers; got one with 2.5"),
        ({"keep": (1, 2.5)}, TypeError, "keep must be an integer; got 2.5"),
        ({"tensors": 5}, TypeError, "tensors must be a sequence of tensors; got 5"),
        ({"tensors": [torch.zeros(2), None]}, TypeError, "tensors must be a sequence of tensors; got one with None"),
    ],
)
def test_wrong_options(options, error, message):
    with pytest.raises(error, match=message):
        deq.fixed_point(torch.cos, torch.zeros(2, 3), **options)


def test_wrong_states():
    with pytest.raises(TypeError, match=r"z0 must be a torch\.Tensor, or a tuple or list of them; got int"):
        deq.fixed_point(torch.cos, 3)
    with pytest.raises(TypeError, match="z0 must be dense; got layout"):
        deq.fixed_point(lambda z: z, torch.eye(3).to_sparse())
    with pytest.raises(TypeError, match="z0 must be float32, float64"):
        deq.fixed_point(torch.cos, torch.zeros(2, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match="z0 must be finite; sample 1 holds NaN"):
        deq.fixed_point(torch.cos, torch.tensor([[0.0], [torch.nan]]))
    with pytest.raises(ValueError, match="must agree in its first 1 dimension"):
        deq.fixed_point(lambda z: z, (torch.zeros(2, 3), torch.zeros(3, 3)))
    with pytest.raises(ValueError, match=r"f's result must be a tensor of the shape of z0, \(2, 3\); got .* \(2, 4\)"):
        deq.fixed_point(lambda z: torch.zeros(2, 4), torch.zeros(2, 3))
    with pytest.raises(TypeError, match="f's result must be tensors of"):
        deq.fixed_point(lambda z: z[0], (torch.zeros(2, 3), torch.zeros(2, 1)))
    with pytest.raises(TypeError, match="f's result must be dense; got layout torch"):
        deq.fixed_point(lambda z: z.to_sparse(), torch.zeros(2, 3))
    for dtype in (torch.complex64, torch.int32, torch.bool):
        with pytest.raises(
            TypeError, match=f"f's result must be of the dtype of z0 or another floating one; got {dtype}"
        ):
            deq.fixed_point(lambda z, dtype=dtype: z.to(dtype), torch.zeros(2, 3))
    with pytest.raises(ValueError, match="f's result must be on the device of z0, cpu; got meta"):
        deq.fixed_point(lambda z: (z[0], z[1].to("meta")), (torch.zeros(2, 3), torch.zeros(2, 1)))
    with pytest.raises(RuntimeError, match="f must not modify its argument in place"):
        deq.fixed_point(lambda z: z.add_(1), torch.zeros(2, 3))
    with pytest.raises(TypeError, match="f must be callable"):
        deq.fixed_point(None, torch.zeros(2, 3))


def test_raise_carries_the_solution():
    with pytest.raises(deq.ConvergenceError, match="2 DIVERGED") as caught:
        deq.fixed_point(lambda z: 3 * z + 1, torch.zeros(2, 3), solver="plain", on_failure="raise")
    assert caught.value.solution.z.shape == (2, 3)


@pytest.mark.parametrize("solver", SOLVERS)
def test_inference_mode(solver):
    W, c, _ = gaussian(8, 3, torch.float64)
    expected = solve(W, c, solver=solver).z
    with torch.inference_mode():
        assert torch.equal(solve(W, c, solver=solver).z, expected)
        assert torch.equal(deq.nn.Equilibrium(lambda z, c: cell(W, c)(z), solver=solver)(c), expected)


def test_a_start_made_in_inference_mode():
    W, c, g = gaussian(8, 3, torch.float64)
    c = c.requires_grad_()
    with torch.inference_mode():
        z0 = 0.1 * c
    z, cold = deq.fixed_point(cell(W, c), z0, tol=1e-12).z, solve(W, c, tol=1e-12).z
    grads = (torch.autograd.grad(z, c, g)[0] for z in (z, cold))
    torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("grad", [False, True])
def test_a_result_on_another_device(solver, grad):
    """Is named, where its memory would be read."""
    w = torch.ones(3, requires_grad=grad)
    with pytest.raises(ValueError, match="f's result must be on the device of z0, cpu; got meta"):
        deq.fixed_point(lambda z: (0.5 * z + w).to("meta"), torch.zeros(2, 3), solver=solver)


@pytest.mark.parametrize("backward", ["one_step", "phantom", "unrolled"])
def test_inexact_gradients_of_failed_samples(backward):
    """z is finite where a solve's is, though f is not; nothing of it reaches the gradients of the others."""
    c = torch.tensor([[4.0], [1.0], [3.0]], dtype=torch.float64).expand(3, 4).clone().requires_grad_()
    options = {"solver": "plain", "backward": backward, "on_failure": "ignore"}

    def run(c, **options):
        solution = deq.fixed_point(lambda z: torch.sqrt(c - 1.5 * z), torch.zeros_like(c), **options)
        return solution, solution.z

    solution, z = run(c, **options)
    assert solution.status.tolist() == [Status.CONVERGED, Status.NONFINITE, Status.CONVERGED]
    with torch.no_grad():
        torch.testing.assert_close(z, run(c, **options)[1], rtol=1e-9, atol=0)
    grad = torch.autograd.grad(z.sum(), c)[0]
    mates = torch.autograd.grad(run(c[[0, 2]], **options)[1].sum(), c)[0]
    assert torch.isfinite(grad).all()
    torch.testing.assert_close(grad[[0, 2]], mates[[0, 2]], rtol=1e-9, atol=0)


@pytest.mark.parametrize("criterion", ["residual", "absolute"])
@pytest.mark.parametrize("damping", [1.0, 0.7])
def test_unrolled_returns_the_best_iterate(damping, criterion):
    """Samples that grow end with what they began with, those that only lack evaluations with their last."""
    rate = torch.tensor([[0.99], [3.5], [0.2]], dtype=torch.float64)
    c = torch.linspace(1, 2, 12, dtype=torch.float64).view(3, 4)
    x = c.clone().requires_grad_()
    options = {"solver": "plain", "damping": damping, "criterion": criterion, "max_iter": 30, "on_failure": "ignore"}
    plain, unrolled = (
        deq.fixed_point(lambda z: x - rate * z, torch.zeros_like(c), backward=backward, **options)
        for backward in ("implicit", "unrolled")
    )
    assert plain.status[1] != Status.CONVERGED and plain.status[2] == Status.CONVERGED
    torch.testing.assert_close(unrolled.z, plain.z, rtol=1e-12, atol=0)
    z = unrolled.z
    (grad,) = torch.autograd.grad(z.sum(), x)
    torch.testing.assert_close(grad * c, z.detach(), rtol=1e-9, atol=0)  # z is linear in x


def test_tensors_that_are_known():
    """Named one by one, or the only one by itself."""
    W, c, g = gaussian(8, 3, torch.float64)
    W, c = W.requires_grad_(), c.requires_grad_()
    expected = torch.autograd.grad(solve(W, c, tol=1e-12).z, (W, c), g)
    known = solve(W, c, tol=1e-12, tensors=(t for t in (W, c))).z
    torch.testing.assert_close(torch.autograd.grad(known, (W, c), g), expected, rtol=1e-9, atol=1e-11)
    only = solve(W, c.detach(), tol=1e-12, tensors=W).z
    torch.testing.assert_close(torch.autograd.grad(only, W, g)[0], expected[0], rtol=1e-9, atol=1e-11)
