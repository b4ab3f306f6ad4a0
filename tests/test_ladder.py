"""Automatic solves: what is chosen, what happens to samples that fail, and that neither changes the answer."""

import pytest
import torch
from close import assert_as_accurate, worst_error
from problems import exact, gaussian, torch_adjoint, torch_loop

import deq
from deq import _library, reference, stats
from deq.activations import ACTIVATIONS
from deq.backends import get_backend
from deq.solvers import equations, ladder

BACKENDS = ["reference"] + (["cpu"] if _library.compiled is not None else [])
backends = pytest.mark.parametrize("backend", BACKENDS)
needs_library = pytest.mark.skipif(_library.compiled is None, reason=f"no compiled library: {_library.reason}")


def monotone(m: int, B: int, mu: float, dtype=torch.float32, seed: int = 0):
    """W with ``sym(I - W) >= mu I`` on which the plain iteration diverges, c and g (B, m)."""
    generator = torch.Generator().manual_seed(seed)
    A, S, c, g = (torch.randn(n, m, generator=generator, dtype=torch.float64) for n in (m, m, B, B))
    A, S = A / m**0.5, S / m**0.5
    W = (1 - mu) * torch.eye(m, dtype=torch.float64) - A.mT @ A + S - S.mT
    return W.to(dtype), c.to(dtype), g.to(dtype)


def slow(m: int, B: int, r: float = 0.985, dtype=torch.float32):
    """One slow positive mode in a mild W: what training leaves."""
    W, c, g = gaussian(m, B, torch.float64, scale=0.3)
    v = torch.ones(m, dtype=torch.float64) / m**0.5
    return (W + r * torch.outer(v, v)).to(dtype), (c + 0.5).to(dtype), g.to(dtype)


def truth(W, c, g, activation="relu"):
    """Equilibrium and gradients in float64, by the Cayley map to rounding."""
    W, c, g = W.double(), c.double(), g.double()
    z, _, residual, _ = reference.cayley_solve(W, c, activation, tol=1e-13, max_iter=5000, acceleration="on_demand")
    assert residual.max() < 1e-11
    return z, *reference.implicit_gradient(W, c, z, g, activation)


def solve_with_gradients(W, c, g, activation="relu", **options):
    W, c = W.clone().requires_grad_(), c.clone().requires_grad_()
    solution = deq.solve(W, c, activation, **options)
    return solution.detach(), *torch.autograd.grad(solution.z, (W, c), g)


@backends
@pytest.mark.parametrize("mu", [0.1, 1.0])
@pytest.mark.parametrize("m", [64, 130, 256])
def test_monotone_weights_are_solved_where_the_plain_map_diverges(m, mu, backend):
    W, c, g = monotone(m, 40, mu)
    assert not deq.solve(W, c, solver="plain", backend=backend, on_failure="ignore").converged.any()
    solution, dW, dc = solve_with_gradients(W, c, g, backend=backend, on_failure="raise")
    assert solution.plan.map == "cayley" and "cayley" in str(solution.plan)
    assert solution.iterations.float().mean() <= 30 and solution.iterations.max() <= 36
    residual = (torch.relu(solution.z @ W.mT + c) - solution.z).norm(dim=1) / solution.z.norm(dim=1)
    assert residual.max() <= 1e-5 * (1 + torch.linalg.matrix_norm(W, 2))  # of z, one expanding evaluation on
    z, true_dW, true_dc = truth(W, c, g)
    bound = 1e-5 / mu * 3  # an error is at most the residual over the modulus
    assert worst_error(solution.z, z) < bound and worst_error(dc, true_dc) < 10 * bound
    assert (dW.double() - true_dW).norm() < 10 * bound * true_dW.norm()


@backends
@pytest.mark.parametrize("activation", ["relu", "leaky_relu", "elu", "tanh", "sigmoid", "softplus"])
def test_cayley_by_name_is_exact_for_every_monotone_activation(activation, backend):
    W, c, g = monotone(40, 9, 0.5, torch.float64)
    solution, dW, dc = solve_with_gradients(W, c, g, activation, solver="cayley", backend=backend, tol=1e-11)
    z, true_dW, true_dc = truth(W, c, g, activation)
    assert solution.converged.all() and solution.plan.map == "cayley"
    torch.testing.assert_close(solution.z, z, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(dc, true_dc, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(dW, true_dW, rtol=1e-8, atol=1e-8)


@backends
def test_gradients_of_the_cayley_map_are_differentiable(backend):
    W, c, _ = monotone(5, 3, 0.5, torch.float64)
    run = lambda W, c: deq.solve(W, c, "tanh", solver="cayley", backend=backend, tol=1e-13).z  # noqa: E731
    leaves = (W.requires_grad_(), c.requires_grad_())
    assert torch.autograd.gradcheck(run, leaves)
    assert torch.autograd.gradgradcheck(run, leaves)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@backends
def test_a_unit_that_is_switched_off_is_no_hindrance_to_the_cayley_map(backend, dtype):
    """K carries the rounding of c there into the others: from -1e3 on no sample of float32 converged."""
    W, c, _ = monotone(40, 9, 0.5, dtype)
    alone = W.double().clone()
    alone[3] = 0.0
    c[:, 3] = -1.0
    z, _, _, _ = reference.cayley_solve(alone, c.double(), "relu", tol=1e-13, max_iter=5000)
    for off in (-1e3, -1e9, torch.finfo(dtype).min):
        c[:, 3] = off
        solution = deq.solve(W, c, solver="cayley", backend=backend)
        assert solution.converged.all() and worst_error(solution.z, z) < 10 * solution.plan.tol
    W, c = -10.0 * torch.eye(3, dtype=dtype), torch.full((1, 3), 1.0, dtype=dtype)
    W[2, 0], c[0, 2] = 1e3, -50.0  # switched off it seems, and is not
    assert deq.solve(W, c, backend=backend, on_failure="raise").z[0, 2] > 0


@pytest.mark.parametrize("solver", ["auto", "cayley"])
@backends
def test_gradients_at_units_that_relu_ends_do_not_reach_the_others(backend, solver):
    """K carries their rounding there, and no means brought it home where the gradient is far larger."""
    W, c, g = monotone(40, 9, 0.5)
    z = deq.solve(W, c.requires_grad_(), solver=solver, backend=backend, on_failure="ignore").z
    options = {"retain_graph": True}
    (want,) = torch.autograd.grad(z, c, torch.where(z > 0, g, 0.0), **options)
    for huge, tiny in ((1e5, 1.0), (1e20, 1e-30)):
        (found,) = torch.autograd.grad(z, c, torch.where(z > 0, tiny * g, huge * g), **options)
        assert worst_error(found / tiny, want.double()) < 1e-4
    gradient = torch.where(z > 0, g, torch.nan)[:1].expand_as(g)  # which a loss scaler looks for
    assert torch.autograd.grad(z, c, gradient)[0].isnan().all()


@pytest.mark.parametrize("value_of", ["relu", None])
@backends
def test_gradients_at_units_that_relu_ends_take_no_evaluation_more(backend, value_of):
    W, c, g = monotone(64, 9, 1.0)
    solution = deq.solve(W, c, solver="cayley", backend=backend)
    z = solution.z
    d = z if value_of else (z > 0).float()

    def adjoint(g):
        outcome = ladder.masked_linear(W.mT, g, d, value_of, "relu", solution.plan)
        return outcome.z, stats.iterations(outcome.z, outcome.stats)

    u, iterations = adjoint(torch.where(z > 0, g, 0.0))
    for ended in (3.0, 100.0):
        found, needed = adjoint(torch.where(z > 0, g, ended * g))
        assert torch.equal(needed, iterations) and torch.equal(found, u)


@backends
def test_cayley_stacks_strides_shapes_and_starts(backend):
    parts = [monotone(20, 6, 0.3, seed=s) for s in range(3)]
    W, c = (torch.stack([p[i] for p in parts]) for i in (0, 1))
    stacked = deq.solve(W, c.reshape(3, 2, 3, 20), solver="cayley", backend=backend)
    assert stacked.converged.all()
    for s, (A, b, _) in enumerate(parts):
        alone = deq.solve(A.mT.contiguous().mT, b, solver="cayley", backend=backend)
        torch.testing.assert_close(stacked.z[s].reshape(6, 20), alone.z, rtol=1e-4, atol=1e-4)
        warm = deq.solve(A, b, z0=alone.z, solver="cayley", backend=backend)
        assert warm.converged.all() and (warm.iterations < alone.iterations).all()
        single = deq.solve(A, b[0], solver="cayley", backend=backend)
        assert single.z.shape == (20,) and single.converged
    assert deq.solve(W[0], c.new_empty(0, 20), solver="cayley", backend=backend).z.shape == (0, 20)


@backends
@pytest.mark.parametrize("activation", ["tanh", "sigmoid"])
def test_cayley_beside_units_that_are_far_saturated(activation, backend):
    """Its own residual is relative to their pre-activations: every sample ended short of the tolerance."""
    W, c, _ = gaussian(64, 20, scale=0.9)
    c[:, ::2] *= 1e3
    solution = deq.solve(W, c, activation, solver="cayley", on_failure="raise", backend=backend)
    assert_as_accurate(solution.z, torch_loop(W, c, activation), exact(W, c, activation))


def radius(m: int, B: int, size: float, dtype=torch.float32):
    """A Gaussian W of so large a spectral radius that some samples are Newton's."""
    W, c, g = gaussian(m, B, torch.float64, scale=1.0, seed=3)
    return (size * W / torch.linalg.eigvals(W).abs().max()).to(dtype), c.to(dtype), g.to(dtype)


@backends
@pytest.mark.parametrize("activation", list(ACTIVATIONS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_one_evaluation(activation, dtype, backend):
    W, c, g = gaussian(70, 9, dtype)
    evaluate, value = get_backend(backend).evaluate, ACTIVATIONS[activation].value
    exact_value = value(g.double() @ W.double().mT + c.double())
    assert_as_accurate(evaluate(W, c, g, activation), value(g @ W.mT + c), exact_value)
    large = torch.finfo(dtype).max
    g[2, 5], c[4, 1], g[6] = torch.nan, torch.inf, large
    lost = evaluate(W * 1e3, c, g, "softplus").isfinite().all(-1).logical_not()
    assert lost.nonzero().flatten().tolist() == [2, 4, 6]
    W[3, 3] = torch.nan
    assert evaluate(W, c, g, activation).isnan().any()


@backends
@pytest.mark.parametrize("activation", ["identity", "relu", "leaky_relu"])
@pytest.mark.parametrize("m", [8, 70])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_one_evaluation_is_that_of_the_point_however_far_it_is(dtype, m, activation, backend):
    """A solve may begin nearer, where the injection still counts."""
    W, c, z = gaussian(m, 9, dtype)
    z *= 1e13
    value = ACTIVATIONS[activation].value
    exact_value = value(z.double() @ W.double().mT + c.double())
    assert_as_accurate(get_backend(backend).evaluate(W, c, z, activation), value(z @ W.mT + c), exact_value)


@backends
def test_an_equilibrium_far_beyond_its_injection_is_found_by_other_means(backend):
    """Units that only the Cayley map and Newton's method solve, and others that read them with weights of 1e11."""
    generator = torch.Generator().manual_seed(9)
    A, S = torch.randn(2, 5, 5, generator=generator, dtype=torch.float64)
    W = torch.zeros(10, 10, dtype=torch.float64)
    W[:5, :5] = 0.5 * torch.eye(5) - A.mT @ A / 5 + 0.9 * (S - S.mT)
    W[5:, :5] = 1e11 * torch.rand(5, 5, generator=generator, dtype=torch.float64)
    W, c = W.float(), torch.randn(8, 10, generator=generator)
    solution = deq.solve(W, c, backend=backend)
    assert solution.converged.all()


@needs_library
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("activation", ["relu", "tanh", "softplus"])
@pytest.mark.parametrize(
    ("problem", "options"),
    [
        (lambda dtype: monotone(150, 40, 0.3, dtype), {}),
        (lambda dtype: monotone(33, 40, 0.3, dtype), {"solver": "cayley"}),
        (lambda dtype: slow(150, 40, dtype=dtype), {}),
        (lambda dtype: slow(150, 40, dtype=dtype), {"max_iter": 60}),
        (lambda dtype: radius(64, 40, 1.5, dtype), {}),
        (lambda dtype: radius(130, 40, 1.4, dtype), {}),
        (lambda dtype: radius(64, 40, 1.3, dtype), {"max_iter": 150}),
        (lambda dtype: radius(130, 40, 1.1, dtype), {"max_iter": 300}),
    ],
    ids=[
        "monotone",
        "by name",
        "slow",
        "slow, few evaluations",
        "newton",
        "newton one by one",
        "few evaluations",
        "wide, few evaluations",
    ],
)
def test_no_means_show_a_sample_its_batch_mates(problem, options, activation, dtype):
    """To the last bit: the answer, how it was reached, and the gradient of the injection."""
    W, c, g = problem(dtype)
    start = (c[:, :1] * torch.ones_like(c)).contiguous()
    for z0 in (None, start):
        together, _, dc = solve_with_gradients(W, c, g, activation, z0=z0, on_failure="ignore", **options)
        for rows in ([7], [39, 2], list(range(5, 38))):
            some = None if z0 is None else z0[rows]
            part, _, some_dc = solve_with_gradients(
                W, c[rows], g[rows], activation, z0=some, on_failure="ignore", **options
            )
            if part.plan != together.plan:  # by the shapes: K does not pay for so few
                continue
            assert torch.equal(part.z, together.z[rows]) and torch.equal(part.residual, together.residual[rows])
            assert torch.equal(part.iterations, together.iterations[rows])
            assert torch.equal(part.status, together.status[rows])
            assert torch.equal(some_dc, dc[rows])


@needs_library
def test_large_batches_of_the_cayley_map_are_cut_into_chunks():
    W, c, _ = monotone(24, 2 * ladder.CHUNK + 77, 0.5)
    whole = deq.solve(W, c, solver="cayley", on_failure="raise")
    for rows in (slice(0, 5), slice(ladder.CHUNK - 2, ladder.CHUNK + 3), slice(-4, None)):
        part = deq.solve(W, c[rows], solver="cayley")
        torch.testing.assert_close(whole.z[rows], part.z, rtol=1e-4, atol=1e-5)
    c[ladder.CHUNK + 5, 3] = torch.nan
    with pytest.raises(ValueError, match=rf"c must be finite; c\[{ladder.CHUNK + 5}\]"):
        deq.solve(W, c, solver="cayley")


@backends
def test_cayley_needs_what_it_needs(backend):
    c = torch.ones(2, 4)
    with pytest.raises(ValueError, match="nondecreasing activation; gelu is not"):
        deq.solve(torch.eye(4) / 2, c, "gelu", solver="cayley", backend=backend)
    with pytest.raises(ValueError, match="inverse of 2 I - W"):
        deq.solve(2 * torch.eye(4), c, solver="cayley", backend=backend)
    W = torch.eye(4)
    W[1, 2] = torch.inf
    with pytest.raises(ValueError, match=r"W must be finite; W\[1, 2\] is inf"):
        deq.solve(W, c, solver="cayley", backend=backend)


@backends
@pytest.mark.parametrize(("m", "r"), [(40, 0.95), (150, 0.993)])
def test_slow_samples_are_taken_on_and_gradients_stay_exact(m, r, backend):
    W, c, g = slow(m, 24, r)
    plain = deq.solve(W, c, solver="plain", backend=backend)
    solution, dW, dc = solve_with_gradients(W, c, g, backend=backend, on_failure="raise")
    assert solution.iterations.float().mean() < plain.iterations.float().mean() / 2
    z, true_dW, true_dc = truth(W, c, g)
    assert_as_accurate(solution.z, plain.z, z)
    u = reference.masked_linear(W.mT, (solution.z > 0).float(), g, tol=1e-5, max_iter=5000)[0]
    assert_as_accurate(dc, u, true_dc)
    assert_as_accurate(dW, u.mT @ plain.z, true_dW)


@needs_library
@pytest.mark.parametrize("activation", ["relu", "tanh", "gelu", "softplus", "leaky_relu"])
@pytest.mark.parametrize("m", [100, 257])
def test_automatic_solves_are_as_accurate_as_a_torch_loop(m, activation, isa):
    W, c, g = gaussian(m, 50)
    solution, dW, dc = solve_with_gradients(W, c, g, activation, on_failure="raise")
    assert solution.plan.increments == _library.increments()
    z, true = torch_loop(W, c, activation), exact(W, c, activation)
    assert_as_accurate(solution.z, z, true)
    if (
        activation != "leaky_relu" and activation != "relu"
    ):  # one unit that flips its mask moves dW by more than the rule
        u = torch_adjoint(W, c, z, g, activation)
        true_dW, true_dc = reference.implicit_gradient(W.double(), c.double(), true, g.double(), activation)
        assert_as_accurate(dc, u, true_dc)
        assert_as_accurate(dW, u.mT @ z, true_dW)


@pytest.mark.parametrize("solver", ["auto", "cayley"])
@pytest.mark.parametrize("family", [gaussian, slow, monotone])
@pytest.mark.parametrize("m", [30, 130])
@backends
def test_scale_invariance(family, solver, m, backend):
    """Multiply c and the loss by anything: same iterations, same relative error, forward and backward."""
    W, c, g = family(m, 20, 0.1) if family is monotone else family(m, 20)
    one, dW, dc = solve_with_gradients(W, c, g, solver=solver, backend=backend)
    z, true_dW, true_dc = truth(W, c, g)
    for factor in (2.0**-20, 2.0**20, 2.0**-90):
        scaled, sW, sc = solve_with_gradients(W, c * factor, g * factor, solver=solver, backend=backend)
        assert torch.equal(scaled.iterations, one.iterations) and torch.equal(scaled.status, one.status)
        assert worst_error(scaled.z.double() / factor, z) <= 2 * worst_error(one.z, z) + 1e-6
        assert worst_error(sc.double() / factor, true_dc) <= 2 * worst_error(dc, true_dc) + 1e-6
        if factor > 2.0**-60:  # dW scales with the square, which float32 cannot hold below
            error = lambda d: float((d - true_dW).norm() / true_dW.norm())  # noqa: E731
            assert error(sW.double() / factor**2) <= 2 * error(dW.double()) + 1e-6


@needs_library
@pytest.mark.parametrize("m", [40, 150])
def test_batch_mates_do_not_matter(m):
    W, c, _ = slow(m, 60, r=0.9)
    c[::7] += 4  # some samples are much slower than others
    together = deq.solve(W, c)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(0))
    shuffled = deq.solve(W, c[order])
    assert (shuffled.iterations - together.iterations[order]).abs().max() <= 1
    assert_as_accurate(shuffled.z, together.z[order], exact(W, c)[order])


@needs_library
def test_newton_has_the_last_word():
    """At a spectral radius of 1.4 some samples end no fixed-point iteration at all."""
    W, c, _ = gaussian(200, 24, torch.float64, scale=1.4)
    bare = deq.solve(W, c, solver="anderson", tol=1e-6, max_iter=400, on_failure="ignore")
    assert not bare.converged.all()
    c = c[~bare.converged]
    solution = deq.solve(W, c, tol=1e-6)
    f = torch.relu(solution.z @ W.mT + c)
    assert solution.converged.all() and ((f - solution.z).norm(dim=1) <= 1e-5 * f.norm(dim=1)).all()


def narrow(m: int, mode: float = 0.97):
    """W and c of ``t = act(0.97 t + c)`` in every unit, whose curve nearly touches the diagonal far from its root."""
    return torch.full((m, m), mode / m), torch.linspace(-0.3, 1, 512).unsqueeze(-1).expand(512, m).contiguous()


@pytest.mark.parametrize("activation", ["gelu", "silu"])
@pytest.mark.parametrize("m", [1, 16, 200])
def test_narrow_places_are_passed(m, activation):
    """What makes the residual smaller at every step stays there (solver="anderson" does with 12 and more)."""
    W, c = narrow(m)
    solution = deq.solve(W, c, activation, on_failure="raise")
    f = lambda t: ACTIVATIONS[activation].value(0.97 * t + c[:, :1].double())  # noqa: E731
    z = solution.z.double()
    assert ((f(z) - z).abs() <= 1.2e-5 * z.abs()).all()
    low, high = torch.zeros(512, 1, dtype=torch.float64), torch.full((512, 1), 50.0, dtype=torch.float64)
    for _ in range(1500):
        low, high = f(low), f(high)
    only = ((high - low).abs() < 1e-9).squeeze(-1)  # elsewhere there are three
    slope = 0.97 * ACTIVATIONS[activation].derivative(0.97 * low + c[:, :1].double())
    bound = 1.2e-5 / (1 - slope) * low.abs()  # the residual over the slope of z - f(z)
    assert only.sum() > 250 and ((z - low).abs() <= bound)[only].all()
    stack = deq.solve(torch.stack([W, W / 2]), torch.stack([c, c]), activation, on_failure="raise")
    assert torch.equal(stack.z[0], solution.z)


@needs_library
def test_the_plain_rung_does_what_plain_does():
    """From z0, to the last bit: whichever sample nothing before has solved."""
    W, c = narrow(1)
    for z0 in (None, torch.full_like(c, 0.3)):
        accelerated = deq.solve(W, c, "gelu", z0=z0, solver="anderson", on_failure="ignore")
        plain = deq.solve(W, c, "gelu", z0=z0, solver="plain", on_failure="ignore")
        solution = deq.solve(W, c, "gelu", z0=z0)
        last = ~accelerated.converged & plain.converged & (solution.iterations > plain.iterations + 100)
        assert last.sum() >= 8 and torch.equal(solution.z[last], plain.z[last])


@backends
def test_no_equilibrium_is_said_and_leaves_batch_mates_alone(backend):
    W = torch.tensor([[2.0, 0.0], [0.0, 0.5]])
    c = torch.tensor([[1.0, 1.0], [-1.0, 1.0], [-1.0, -1.0]])  # relu(2 z + 1) = z has no solution
    with pytest.warns(deq.ConvergenceWarning, match="1 of 3 samples did not converge"):
        solution = deq.solve(W, c, backend=backend)
    assert solution.converged.tolist() == [False, True, True] and torch.isfinite(solution.z).all()
    torch.testing.assert_close(solution.z[1:], torch.tensor([[0.0, 2.0], [0.0, 0.0]]), rtol=1e-4, atol=1e-4)


@backends
def test_iterations_are_bounded_by_max_iter(backend):
    W, c, _ = slow(50, 12, r=0.99)
    for limit in (1, 3, 17, 40):
        solution = deq.solve(W, c, max_iter=limit, backend=backend, on_failure="ignore")
        assert solution.iterations.max() <= limit
        assert torch.isfinite(solution.z).all()


@backends
def test_half_precision_is_rescued_in_float32(backend):
    W, c, _ = monotone(40, 8, 0.5, torch.float32)
    for dtype in (torch.bfloat16, torch.float16):
        w, b = W.to(dtype), c.to(dtype)
        solution = deq.solve(w, b, backend=backend, on_failure="raise")
        assert solution.z.dtype == dtype
        torch.testing.assert_close(solution.z, truth(w, b, b)[0].to(dtype), rtol=2 * torch.finfo(dtype).eps, atol=1e-3)


def test_rescue_of_stacked_weights():
    W, c, _ = (torch.stack(t) for t in zip(slow(30, 10), gaussian(30, 10), slow(30, 10, r=0.9), strict=True))
    solution = deq.solve(W, c, on_failure="raise")
    for s in range(3):
        assert_as_accurate(solution.z[s], deq.solve(W[s], c[s], solver="plain").z, exact(W[s], c[s]))


@pytest.mark.parametrize("B", [2, 64])
@pytest.mark.parametrize("m", [40, 128])
@backends
def test_units_that_are_far_below_zero_cost_a_few_evaluations_more(backend, m, B):
    """The Cayley map, whose iterate holds them, ends short of the tolerance there, and not far from it."""
    W, c, _ = monotone(m, B, 1.0)
    few = deq.solve(W, c, backend=backend).iterations.max()
    for far in (torch.where(c < 0, 10 * c, c), torch.cat([c[:, :3], torch.full_like(c[:, :1], -100.0), c[:, 4:]], 1)):
        solution = deq.solve(W, far, backend=backend)
        assert solution.converged.all() and solution.iterations.max() <= 1.5 * few


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@backends
def test_a_weight_without_a_cayley_map_takes_it_from_nobody(backend, dtype):
    """Others of a stack, and their gradients, begin with their own."""
    W, c, _ = (torch.stack(t) for t in zip(monotone(40, 10, 1.0), monotone(40, 10, 1.0), strict=True))
    W[0] = 2 * torch.eye(40)
    W, c = W.to(dtype), c.to(dtype).requires_grad_()
    both = deq.solve(W, c, "tanh", backend=backend)
    alone = deq.solve(W[1], c[1], "tanh", backend=backend)
    assert both.converged.all()
    assert torch.equal(both.iterations[1], alone.iterations) and torch.equal(both.z[1], alone.z)
    grad, own = (torch.autograd.grad(z.sum(), c)[0][1] for z in (both.z, alone.z))
    assert torch.equal(grad, own)
    bad = c.detach().clone()
    bad[1, 3, 5] = torch.nan
    with pytest.raises(ValueError, match=r"c\[1, 3\]"):
        deq.solve(W, bad, "tanh", backend=backend)


@backends
def test_gradients_of_a_stack_have_the_cayley_map_of_each_weight(backend, monkeypatch):
    """Also where another weight of it has none, as 2 I."""
    W, c, g = monotone(64, 20, 0.1)
    c = 0.1 * c
    W, c, g = torch.stack([2 * torch.eye(64), W]), torch.stack([torch.full_like(c, 5.0), c]), torch.stack([g, g])
    z0 = deq.solve(W, c, "tanh", tol=1e-6, backend=backend).z
    z = deq.solve(W, c.requires_grad_(), "tanh", z0=z0, backend=backend).z
    monkeypatch.setattr(equations, "NEWTON_FLOPS", 0.0)
    (dc,) = torch.autograd.grad(z, c, g)  # no warning
    D = (1 - z.detach().double() ** 2).unsqueeze(-1)
    u = torch.linalg.solve(torch.eye(64) - D * W.mT.double().unsqueeze(1), D * g.double().unsqueeze(-1)).squeeze(-1)
    assert worst_error(dc[1], u[1]) < 1e-3
