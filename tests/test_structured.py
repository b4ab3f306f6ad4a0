"""Weights of known structure: exact solutions, gradients in the structure's own tensors, honest limits."""

import warnings

import pytest
import torch
from close import assert_as_accurate, worst_error
from problems import exact, gaussian, torch_adjoint, torch_loop
from torch.autograd import gradcheck, gradgradcheck

import deq
from deq import _library, cache, weights
from deq.activations import ACTIVATIONS
from deq.direct import roots
from deq.nn import EquilibriumLinear
from deq.solution import Status

needs_library = pytest.mark.skipif(_library.compiled is None, reason=f"no compiled library: {_library.reason}")
BACKENDS = ["reference", pytest.param("cpu", marks=needs_library)]
KINDS = ("lower_triangular", "strictly_lower", "diagonal", "diagonal_low_rank")
WORDS = {
    "lower_triangular": "substitution",
    "strictly_lower": "substitution",
    "diagonal": "closed form",
    "diagonal_low_rank": "reduced to R^",
    "dense": "direct",
}


def parts(kind: str, m: int, dtype=torch.float32, seed: int = 0, scale: float = 0.45) -> tuple[torch.Tensor, ...]:
    """The tensors of a structure whose plain iteration contracts."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    if kind in ("lower_triangular", "strictly_lower", "dense"):
        return ((draw(m, m) * (scale / m**0.5)).to(dtype),)
    d = (torch.rand(m, generator=generator, dtype=torch.float64) - 0.5) * scale
    if kind == "diagonal":
        return ((2 * d).to(dtype),)
    r = max(1, min(5, m // 2))
    factors = (draw(m, r) * (scale / (m**0.5 + r**0.5)) ** 0.5 / m**0.25 for _ in range(2))
    return tuple(t.to(dtype) for t in (d, *factors))


def structure(kind: str, *tensors: torch.Tensor):
    if kind == "strictly_lower":
        return weights.LowerTriangular(*tensors, strict=True)
    return {
        "lower_triangular": weights.LowerTriangular,
        "diagonal": weights.Diagonal,
        "diagonal_low_rank": weights.DiagonalLowRank,
        "dense": weights.Dense,
    }[kind](*tensors)


def injection(m: int, B: int, dtype=torch.float32) -> torch.Tensor:
    return gaussian(m, B, dtype, seed=m + B)[1]


def check_solution(W, c, activation, backend="auto", **options):
    solution = deq.solve(W, c, activation, solver="direct", backend=backend, on_failure="raise", **options)
    D = W.dense()
    assert_as_accurate(solution.z, torch_loop(D, c, activation), exact(D, c, activation))
    assert solution.converged.all() and solution.z.dtype == c.dtype
    assert (solution.residual <= solution.plan.tol).all()
    return solution


# ---- solutions ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("m", [1, 2, 17, 33, 100, 333])
@pytest.mark.parametrize("kind", KINDS)
def test_sizes(kind, m, isa):
    for B in (0, 1, 5, 65):
        for dtype in (torch.float32, torch.float64):
            W, c = structure(kind, *parts(kind, m, dtype)), injection(m, B, dtype)
            for activation in ("relu", "tanh"):
                solution = check_solution(W, c, activation, "cpu")
                assert WORDS[kind] in str(solution.plan)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_activations(kind, activation, isa):
    for dtype in (torch.float32, torch.float64):
        W, c = structure(kind, *parts(kind, 33, dtype)), injection(33, 19, dtype)
        check_solution(W, c, activation, "cpu")
        check_solution(W, 30 * c, activation, "cpu")


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_without_the_library(kind, activation):
    for dtype in (torch.float32, torch.float64):
        W, c = structure(kind, *parts(kind, 17, dtype)), injection(17, 9, dtype)
        check_solution(W, c, activation, "reference")


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_roots_near_the_limit_of_uniqueness(activation, isa):
    """Slopes of the map up to 1 - 1e-3, where iterating takes thousands of evaluations."""
    least, most = roots.slopes(activation)
    d = torch.linspace(-5.0, 0.999 / most, 101, dtype=torch.float64)
    d = d[d * least < 0.999]
    c = torch.linspace(-20, 20, 41, dtype=torch.float64).unsqueeze(-1) * torch.ones_like(d)
    for backend in ("cpu", "reference"):
        z = deq.solve(weights.Diagonal(d), c, activation, solver="direct", backend=backend, on_failure="raise").z
        f = ACTIVATIONS[activation].value(d * z + c)
        size = z.abs() + (d * z).abs() + c.abs()
        assert ((f - z).abs() <= 16 * torch.finfo(torch.float64).eps * size).all()


def test_any_strides(isa):
    W, c = parts("lower_triangular", 50)[0], injection(50, 20)
    want = deq.solve(weights.LowerTriangular(W), c, solver="direct", backend="cpu").z
    storage = torch.zeros(100, 150)
    storage[::2, ::3] = W
    transposed = W.mT.contiguous().mT
    for same in (storage[::2, ::3], transposed):
        assert torch.equal(deq.solve(weights.LowerTriangular(same), c, solver="direct").z, want)
    wide = torch.zeros(40, 100)
    wide[::2, ::2] = c
    for same in (wide[::2, ::2], c.mT.contiguous().mT):
        assert torch.equal(deq.solve(weights.LowerTriangular(W), same, solver="direct").z, want)
    one = c[:1].expand(20, 50)
    assert torch.equal(deq.solve(weights.LowerTriangular(W), one, solver="direct").z, want[:1].expand(20, 50))


def test_sample_shapes():
    for kind in KINDS:
        W = structure(kind, *parts(kind, 12))
        c = injection(12, 30)
        flat = deq.solve(W, c, "tanh", solver="direct")
        shaped = deq.solve(W, c.reshape(2, 3, 5, 12), "tanh", solver="direct")
        assert shaped.status.shape == (2, 3, 5) and shaped.z.shape == (2, 3, 5, 12)
        assert torch.allclose(shaped.z.reshape(30, 12), flat.z, rtol=1e-5)
        assert deq.solve(W, c[0], "tanh", solver="direct").z.shape == (12,)


@needs_library
def test_a_sample_does_not_depend_on_its_batch(isa):
    for kind in ("lower_triangular", "diagonal"):
        W, c = structure(kind, *parts(kind, 70)), injection(70, 65)
        for activation in ("relu", "gelu", "tanh"):
            z = deq.solve(W, c, activation, solver="direct").z
            for b in (0, 31, 32, 64):
                assert torch.equal(deq.solve(W, c[b : b + 1], activation, solver="direct").z, z[b : b + 1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_entries_above_the_diagonal_are_ignored(backend):
    W, c = parts("lower_triangular", 20)[0], injection(20, 4)
    spoiled = W + torch.full_like(W, torch.nan).triu(1)
    clean, same = (deq.solve(weights.LowerTriangular(V), c, solver="direct", backend=backend).z for V in (W, spoiled))
    assert torch.equal(clean, same)
    spoiled = W.tril(-1) + torch.full_like(W, torch.inf).triu()
    strict = deq.solve(weights.LowerTriangular(spoiled.nan_to_num(), strict=True), c, solver="direct", backend=backend)
    assert strict.converged.all()


@pytest.mark.parametrize("m, B", [(1, 1), (17, 5), (64, 200), (100, 20), (333, 5), (333, 400)])
def test_identity_with_a_dense_weight(m, B):
    for dtype in (torch.float32, torch.float64):
        (W,), c = parts("dense", m, dtype), injection(m, B, dtype)
        solution = check_solution(weights.Dense(W), c, "identity")
        assert "direct" in str(solution.plan) and "I - W" in solution.plan.explain()
        again = deq.solve(W, c, "identity")
        assert torch.equal(again.z, solution.z)
        with torch.enable_grad():
            trained = deq.solve(W.clone().requires_grad_(), c, "identity", solver="direct")
        assert_as_accurate(trained.z.detach(), torch_loop(W, c, "identity"), exact(W, c, "identity"))


def test_identity_with_many_weights():
    W = torch.stack([parts("dense", 20, seed=s)[0] for s in range(3)])
    c = torch.stack([injection(20, 7) + s for s in range(3)])
    solution = deq.solve(W, c, "identity", solver="direct", on_failure="raise")
    for s in range(3):
        assert_as_accurate(solution.z[s], torch_loop(W[s], c[s], "identity"), exact(W[s], c[s], "identity"))
    assert deq.solve(W[:0], c[:0], "identity", solver="direct").z.shape == (0, 7, 20)


@pytest.mark.parametrize("backend", BACKENDS)
def test_where_the_iteration_diverges(backend):
    """Exact methods need no contraction, only a unique solution."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    c = draw(9, 30)
    cases = [
        (weights.Dense(3 * draw(30, 30)), "identity"),
        (weights.LowerTriangular(draw(30, 30).tril(-1) - torch.diag(5 + draw(30) ** 2)), "relu"),
        (weights.Diagonal(-10 * draw(30) ** 2 - 2), "tanh"),
        (weights.DiagonalLowRank(-(draw(30) ** 2) - 2, 2 * draw(30, 3), -2 * draw(30, 3)), "identity"),
    ]
    P = draw(30, 3)
    cases.append((weights.DiagonalLowRank(-(draw(30) ** 2) - 2, P, -2 * P), "relu"))  # monotone
    for W, activation in cases:
        solution = deq.solve(W, c, activation, backend=backend, solver="direct", on_failure="raise")
        f = ACTIVATIONS[activation].value(solution.z @ W.dense().mT + c)
        assert ((f - solution.z).norm(dim=-1) <= 1e-10 * f.norm(dim=-1)).all()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert not deq.solve(W, c, activation, solver="plain", backend=backend).converged.all()


# ---- gradients ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("activation", ["identity", "tanh", "gelu", "softplus", "sigmoid"])
@pytest.mark.parametrize("kind", (*KINDS, "dense"))
def test_gradcheck(kind, activation, backend):
    if kind == "dense" and activation != "identity":
        pytest.skip("a dense weight is direct for the identity alone")
    inputs = [*parts(kind, 5, torch.float64), injection(5, 3, torch.float64)]

    def z(*tensors):
        W = structure(kind, *tensors[:-1])
        return deq.solve(W, tensors[-1], activation, solver="direct", backend=backend, tol=1e-13, on_failure="ignore").z

    every = [t.clone().requires_grad_() for t in inputs]
    assert gradcheck(z, every)
    assert gradgradcheck(z, every)
    for i in range(len(inputs)):
        assert gradcheck(z, [t.clone().requires_grad_(i == j) for j, t in enumerate(inputs)])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("activation", ["relu", "tanh", "gelu"])
def test_gradient_of_c_is_as_accurate(kind, activation, isa):
    for m, B in ((1, 1), (17, 5), (100, 65), (333, 7)):
        for dtype in (torch.float32, torch.float64):
            W, c, g = structure(kind, *parts(kind, m, dtype)), injection(m, B, dtype), gaussian(m, B, dtype, seed=9)[2]
            D, z = W.dense(), exact(W.dense(), c, activation)
            if activation == "relu":  # units that a tolerance could flip are pushed away from zero
                pre = z @ D.double().mT + c.double()
                c = c + torch.where(pre.abs() < 1e-3, 1e-2, 0.0).to(dtype)
                z = exact(D, c, activation)
            leaf = c.clone().requires_grad_()
            deq.solve(W, leaf, activation, solver="direct", backend="cpu", on_failure="raise").z.backward(g)
            want = torch_adjoint(D.double(), c.double(), z, g.double(), activation, tol=4e-15)
            plain = torch_adjoint(D, c, torch_loop(D, c, activation), g, activation)
            assert_as_accurate(leaf.grad, plain, want)


@needs_library
def test_gradients_stay_in_the_structure():
    """A diagonal of width 20000 would have a matrix of 1.6 GB."""
    m = 20000
    d = torch.linspace(-0.5, 0.5, m).requires_grad_()
    c = injection(1, m).T.contiguous().expand(3, m).clone().requires_grad_()
    deq.solve(weights.Diagonal(d), c).z.sum().backward()
    s = (c > 0).float() / (1 - d)
    assert torch.allclose(c.grad, s.detach()) and d.grad.shape == (m,)
    P, Q = (torch.full((m, 2), 1e-3).requires_grad_() for _ in range(2))
    deq.solve(weights.DiagonalLowRank(d, P, Q), c).z.sum().backward()
    assert P.grad.shape == Q.grad.shape == (m, 2) and torch.isfinite(P.grad).all()


def test_gradients_are_those_of_the_dense_matrix():
    for kind in KINDS:
        for dtype in (torch.float32, torch.float64):
            mine, theirs = ([t.clone().requires_grad_() for t in parts(kind, 40, dtype)] for _ in range(2))
            c = injection(40, 30, dtype)
            tol = 1e-6 if dtype == torch.float32 else 1e-13
            deq.solve(structure(kind, *mine), c, "tanh", tol=tol, solver="direct").z.square().sum().backward()
            deq.solve(structure(kind, *theirs).dense(), c, "tanh", tol=tol).z.square().sum().backward()
            for a, b in zip(mine, theirs, strict=True):
                assert float((a.grad - b.grad).norm()) <= 10 * tol * float(b.grad.norm())


@pytest.mark.parametrize("kind", (*KINDS, "dense"))
def test_any_scale(kind):
    activation = "identity" if kind == "dense" else "relu"
    tensors, c, g = parts(kind, 30), injection(30, 6), gaussian(30, 6)[2]

    def run(c_scale, g_scale):
        leaves = [t.clone().requires_grad_() for t in (*tensors, c * c_scale)]
        W = structure(kind, *leaves[:-1])
        solution = deq.solve(W, leaves[-1], activation, solver="direct", on_failure="raise")
        solution.z.backward(g * g_scale)
        return solution, leaves[-1].grad

    plain, gradient = run(1, 1)
    for scale in (2.0**100, 2.0**-100):
        scaled, same = run(scale, 1)
        assert torch.equal(scaled.z / scale, plain.z) and torch.equal(scaled.iterations, plain.iterations)
        assert torch.equal(same, gradient)
        assert torch.equal(run(1, scale)[1] / scale, gradient)
    for scale in (1e30, 1e-30):
        assert (
            worst_error(run(scale, 1)[0].z.detach() / scale, plain.z.detach().double())
            <= 20 * torch.finfo(torch.float32).eps
        )


def test_gradient_that_is_not_finite_is_nan_for_its_sample():
    for kind in (*KINDS, "dense"):
        c = injection(12, 4).requires_grad_()
        activation = "identity" if kind == "dense" else "relu"
        z = deq.solve(structure(kind, *parts(kind, 12)), c, activation, solver="direct").z
        g = torch.ones_like(z)
        g[1, 3], g[2, 0] = torch.nan, torch.inf
        z.backward(g)
        assert torch.isfinite(c.grad[[0, 3]]).all() and torch.isnan(c.grad[[1, 2]]).all()


def test_follows_grad_mode():
    W = weights.Diagonal(torch.full((3,), 0.5, requires_grad=True))
    assert deq.solve(W, torch.ones(2, 3)).z.requires_grad
    with torch.no_grad():
        assert not deq.solve(W, torch.ones(2, 3)).z.requires_grad


# ---- choice, limits, errors -----------------------------------------------------------------------------------------


@needs_library
def test_auto_takes_the_structure_and_says_so():
    for kind in KINDS:
        m, B = (330, 24) if kind == "diagonal_low_rank" else (24, 6)  # a small low-rank problem is iterated
        W, c = structure(kind, *parts(kind, m)), injection(m, B)
        solution, plain = deq.solve(W, c), deq.solve(W, c, solver="plain")
        assert WORDS[kind] in str(solution.plan) and WORDS[kind].split()[0] in solution.plan.explain().splitlines()[1]
        assert plain.plan.map == "plain"
        assert torch.allclose(plain.z, solution.z, atol=1e-4)
    c = injection(24, 6)
    assert deq.solve(structure("diagonal_low_rank", *parts("diagonal_low_rank", 24)), c).plan.map == "plain"
    assert "direct" in str(deq.solve(*parts("dense", 24), c, "identity").plan)
    assert deq.solve(*parts("dense", 24), c).plan.map == "plain"


@needs_library
def test_what_has_no_unique_root_is_iterated():
    c = -torch.rand(4, 10) - 0.5
    for W in (
        weights.Diagonal(torch.full((10,), 1.5)),
        weights.LowerTriangular(1.5 * torch.eye(10)),
        weights.DiagonalLowRank(torch.full((10,), 1.5), torch.zeros(10, 1), torch.zeros(10, 1)),
    ):
        solution = deq.solve(W, c)
        assert solution.plan.map == "plain" and solution.converged.all() and (solution.z == 0).all()
        with pytest.raises(ValueError, match=r"solver='direct' cannot solve this: .* more than one root.*\[1.5, 1.5\]"):
            deq.solve(W, c, solver="direct")


def test_singular_systems_are_iterated_or_reported():
    c = torch.rand(4, 10) + 0.5
    with pytest.warns(deq.ConvergenceWarning):
        solution = deq.solve(torch.eye(10), c, "identity", max_iter=50)
    assert solution.plan.map == "plain" and not solution.converged.any()
    with pytest.warns(deq.ConvergenceWarning, match="4 of 4 samples did not converge"):
        forced = deq.solve(torch.eye(10), c, "identity", solver="direct")
    assert not forced.converged.any() and torch.isfinite(forced.z).all()


def test_a_tolerance_below_rounding_is_not_called_converged():
    W, c = structure("lower_triangular", *parts("lower_triangular", 100)), injection(100, 5)
    solution = deq.solve(W, c, "tanh", solver="direct", tol=1e-12, on_failure="ignore")
    assert (solution.status == Status.STALLED).all() and (solution.residual < 1e-6).all()


def test_a_solution_beyond_the_range_of_the_dtype_is_said_to_have_diverged():
    W = weights.LowerTriangular(torch.full((60, 60), 10.0).tril(-1))
    c = torch.ones(3, 60)
    solution = deq.solve(W, c, solver="direct", on_failure="ignore")
    assert (solution.status == Status.DIVERGED).all() and torch.isfinite(solution.z).all()
    half = deq.solve(
        weights.Diagonal(torch.full((5,), 0.99).half()), torch.full((2, 5), 6e4).half(), on_failure="ignore"
    )
    assert torch.isfinite(half.z).all() and not half.converged.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_halves_are_solved_in_float32_and_rounded_once(dtype):
    for kind in KINDS:
        tensors, c = parts(kind, 40, dtype), injection(40, 8, dtype)
        half = deq.solve(structure(kind, *tensors), c, "tanh", solver="direct")
        wide = deq.solve(structure(kind, *(t.float() for t in tensors)), c.float(), "tanh", solver="direct", tol=1e-4)
        assert half.z.dtype == dtype and torch.equal(half.z, wide.z.to(dtype)) and half.residual.dtype == torch.float32
        leaves = [t.clone().requires_grad_() for t in tensors]
        deq.solve(structure(kind, *leaves), c, "tanh").z.sum().backward()
        assert all(leaf.grad.dtype == dtype and torch.isfinite(leaf.grad).all() for leaf in leaves)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_input_is_named(value, backend):
    for kind, names in (
        *((k, "W") for k in ("lower_triangular", "strictly_lower", "dense")),
        ("diagonal", "d"),
        ("diagonal_low_rank", "dPQ"),
    ):
        activation = "identity" if kind == "dense" else "relu"
        for i, name in enumerate(names):
            tensors, c = [t.clone() for t in parts(kind, 7)], injection(7, 5)
            place = (4,) if name == "d" else (5, 0)
            tensors[i][place] = value
            with pytest.raises(ValueError, match=rf"^{name} must be finite; {name}\[{', '.join(map(str, place))}\] is"):
                deq.solve(structure(kind, *tensors), c, activation, solver="direct", backend=backend)
        c = injection(7, 5)
        c[3, 2] = value
        with pytest.raises(ValueError, match=r"^c must be finite; c\[3\] holds NaN or infinity"):
            deq.solve(structure(kind, *parts(kind, 7)), c, activation, solver="direct", backend=backend)
    with pytest.raises(ValueError, match="z0 must be finite"):
        deq.solve(weights.Diagonal(torch.zeros(3)), torch.ones(2, 3), z0=torch.full((2, 3), value))


def test_what_direct_cannot_do_is_said():
    W, c = parts("dense", 5)[0], injection(5, 2)
    with pytest.raises(
        ValueError, match=r"W is dense and the activation is 'relu'; it serves the identity .* DiagonalLowRank"
    ):
        deq.solve(W, c, solver="direct")
    with pytest.raises(ValueError, match="backward='implicit'; got 'phantom'"):
        deq.solve(weights.Diagonal(torch.zeros(5)), c, solver="direct", backward="phantom")
    low_rank = structure("diagonal_low_rank", *parts("diagonal_low_rank", 5))
    with pytest.raises(ValueError, match=r"criterion='error' is not estimated"):
        deq.solve(low_rank, c, solver="direct", criterion="error")
    with pytest.raises(ValueError, match=r"torch\.func"):
        torch.func.vmap(lambda c: deq.solve(weights.Diagonal(torch.zeros(5)), c, solver="direct").z)(c)
    with pytest.raises(ValueError, match=r"c must be .* 5"):
        deq.solve(weights.Diagonal(torch.zeros(5)), c[:, :4])
    with pytest.raises(TypeError, match="c must have the dtype of W"):
        deq.solve(weights.Diagonal(torch.zeros(5)), c.double())


@pytest.mark.filterwarnings("ignore")  # torch.compile's own
def test_transforms_fall_back_to_the_iteration():
    (d,), c = parts("diagonal", 5), injection(5, 2)
    run = lambda d: deq.solve(weights.Diagonal(d), c, "tanh").z.sum()  # noqa: E731
    leaf = d.clone().requires_grad_()
    run(leaf).backward()
    assert torch.allclose(torch.func.grad(run)(d), leaf.grad, atol=1e-4)
    compiled = torch.compile(
        lambda d: deq.solve(weights.Diagonal(d), c, "tanh", on_failure="ignore").z, backend="eager"
    )
    assert torch.allclose(compiled(d), deq.solve(weights.Diagonal(d), c, "tanh").z, atol=1e-4)


def test_start_of_a_low_rank_iteration():
    W, c = structure("diagonal_low_rank", *parts("diagonal_low_rank", 40)), injection(40, 6)
    cold = deq.solve(W, c, "tanh", solver="direct")
    warm = deq.solve(W, c, "tanh", solver="direct", z0=cold.z)
    assert (warm.iterations <= cold.iterations).all() and (warm.iterations <= 2).all()


@needs_library
def test_new_weights_are_never_taken_for_old_ones():
    W, c = parts("lower_triangular", 30)[0], injection(30, 4)
    first = deq.solve(weights.LowerTriangular(W), c).z
    W.data[20, 3] += 1
    second = deq.solve(weights.LowerTriangular(W), c).z
    assert not torch.equal(first, second)
    cache.clear()
    assert torch.equal(deq.solve(weights.LowerTriangular(W), c).z, second)


@pytest.mark.parametrize("kind", ["lower_triangular", "diagonal", "diagonal_low_rank"])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_layers(kind, activation):
    torch.manual_seed(0)
    layer = EquilibriumLinear(8, 40, activation, kind)
    x = torch.randn(20, 8)
    z = layer(x)
    W, c = layer.weight().dense().detach(), layer.injection(x).detach()
    assert_as_accurate(z.detach(), torch_loop(W, c, activation), exact(W, c, activation))
    assert layer.solution.converged.all()
    z.square().mean().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in layer.parameters())


@pytest.mark.parametrize("m", [150, 200])
@pytest.mark.parametrize("trained", [False, True])
def test_stacks_of_linear_systems(m, trained):
    """Which torch's batches of them fail in, or never return from, once the number of threads was set."""
    torch.set_num_threads(torch.get_num_threads())
    W = torch.randn(2, m, m, generator=torch.Generator().manual_seed(m)) / m**0.5
    c = injection(m, 9).expand(2, 9, m).clone().requires_grad_()
    solution = deq.solve(W.requires_grad_(trained), c, "identity", solver="direct")
    expected = torch.stack([torch.linalg.solve(torch.eye(m) - A, b.mT).mT for A, b in zip(W, c, strict=True)])
    torch.testing.assert_close(solution.z, expected, rtol=1e-3, atol=1e-3)
    assert torch.autograd.grad(solution.z.sum(), c)[0].isfinite().all()


def expanding(scale, dtype, m=200, r=8):
    """``diag(d) + P Q^T`` of a monotone W on which q -> Q^T z(q) expands ``scale`` times."""
    torch.manual_seed(0)
    P = torch.randn(m, r, dtype=dtype) / m**0.5
    return torch.zeros(m, dtype=dtype), P, -scale * P


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [3.0, 8.0, 20.0])
@pytest.mark.parametrize("activation", ["tanh", "relu", "identity"])
def test_low_rank_where_the_iteration_expands(activation, scale, dtype):
    """Exact methods need no contraction: the residual is that of the z returned, and so are the gradients."""
    d, P, Q = (t.requires_grad_() for t in expanding(scale, dtype))
    c = injection(200, 64, dtype)
    solution = deq.solve(weights.DiagonalLowRank(d, P, Q), c, activation, solver="direct")
    assert solution.converged.all()
    W = (torch.diag(d) + P @ Q.mT).detach().double()
    act = {"tanh": torch.tanh, "relu": torch.relu, "identity": lambda x: x}[activation]
    z = solution.z.detach().double()
    f = act(z @ W.mT + c.double())
    residual = ((f - z).norm(dim=-1) / f.norm(dim=-1)).max()
    eps = torch.finfo(dtype).eps
    assert residual <= 2 * solution.residual.max() + 50 * eps * (1 + torch.linalg.matrix_norm(W, 2))
    ours = torch.autograd.grad(solution.z.square().sum(), (d, P, Q))
    exact = [t.detach().double().requires_grad_() for t in (d, P, Q)]
    z = deq.solve(weights.Dense(torch.diag(exact[0]) + exact[1] @ exact[2].mT), c.double(), activation).z
    theirs = torch.autograd.grad(z.square().sum(), exact)
    for a, b in zip(ours, theirs, strict=True):
        assert (a.double() - b).norm() <= (3e-3 if dtype == torch.float32 else 1e-6) * b.norm()


@needs_library
@pytest.mark.parametrize("max_iter", [3, 10, 61, 65])
def test_low_rank_keeps_to_its_evaluations(max_iter):
    d, P, Q = expanding(8.0, torch.float64)
    W = weights.DiagonalLowRank(d, P, Q)
    c = injection(200, 40, torch.float64) * torch.logspace(-3, 3, 40, dtype=torch.float64)[:, None]
    options = {"solver": "direct", "max_iter": max_iter, "on_failure": "ignore"}
    together = deq.solve(W, c, "tanh", **options)
    assert together.iterations.max() <= max_iter
    alone = torch.cat([deq.solve(W, row[None], "tanh", **options).status for row in c])
    assert torch.equal(together.status, alone)


@pytest.mark.parametrize("solver", ["auto", "direct"])
def test_identity_with_a_diagonal_on_both_sides_of_one(solver):
    d, c = torch.linspace(0.5, 1.6, 10, dtype=torch.float64), injection(10, 4, torch.float64)
    strict = torch.tril(torch.randn(10, 10, dtype=torch.float64) * 0.1, -1)
    for W in (weights.Diagonal(d), weights.LowerTriangular(torch.diag(d) + strict)):
        solution = deq.solve(W, c, "identity", solver=solver)
        exact = torch.linalg.solve(torch.eye(10, dtype=torch.float64) - W.dense(), c.mT).mT
        torch.testing.assert_close(solution.z, exact)
    with pytest.raises(ValueError, match="more than one root, or none"):
        deq.solve(weights.Diagonal(torch.tensor([0.5, 1.0, 3.0])), torch.ones(2, 3), "identity", solver="direct")


def test_an_answer_out_of_range_has_diverged():
    c = torch.full((2, 5), 1e37)
    with pytest.warns(deq.ConvergenceWarning, match="DIVERGED"):
        solution = deq.solve(0.999 * torch.eye(5), c, "identity")
    assert solution.z.isfinite().all() and not solution.converged.any()
    leaf = torch.ones(2, 5, requires_grad=True)
    z = deq.solve(0.999 * torch.eye(5), leaf, "identity").z
    with pytest.warns(deq.ConvergenceWarning, match="the gradient of deq.solve"):
        (g,) = torch.autograd.grad(z, leaf, c)
    assert g.isfinite().all()


def test_identity_is_solved_whether_its_weight_is_trained_or_not():
    """Few samples of a W that is trained are iterated first, stable or not."""
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        W = 2 * torch.randn(63, 63, generator=generator, dtype=torch.float64) / 63**0.5
        c = torch.randn(7, 63, generator=generator, dtype=torch.float64)
        frozen, trained = deq.solve(W, c, "identity"), deq.solve(W.requires_grad_(), c, "identity")
        assert frozen.converged.all() and trained.converged.all()
        torch.testing.assert_close(trained.z, frozen.z, rtol=1e-6, atol=1e-8)


@pytest.mark.filterwarnings("ignore::deq.ConvergenceWarning")
@pytest.mark.parametrize("size", [1e3, 1e4, 1e6])
def test_what_rounding_keeps_from_the_tolerance_is_still_the_answer(size):
    """The residual of a large d is d times the rounding of z; z itself is as good as ever."""
    d, c = -size * (1 + torch.rand(30)), injection(30, 4)
    exact = deq.solve(weights.Diagonal(d.double()), c.double(), "tanh", solver="direct", on_failure="ignore").z
    z = deq.solve(weights.Diagonal(d), c, "tanh").z.double()
    assert ((z - exact).norm(dim=-1) <= 1e-3 * exact.norm(dim=-1)).all()
