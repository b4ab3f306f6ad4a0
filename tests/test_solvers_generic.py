"""The compiled steps against their definition in PyTorch, and the solvers against scipy on published maps."""

import math

import numpy
import pytest
import torch

from deq import Status, _library
from deq.solvers import generic
from deq.solvers.generic import Rule
from deq.solvers.generic.compiled_steps import CompiledSteps, serves
from deq.solvers.generic.torch_steps import TorchSteps

needs_library = pytest.mark.skipif(_library.compiled is None, reason=f"no compiled library: {_library.reason}")


def drive(steps, f, max_iter, keep=()):
    kept = []
    for k in range(1, max_iter + 1):
        steps.advance(f(steps.y))
        if k in keep:
            steps.collect()
            kept.append(steps.z.clone())
        if not steps.is_running():
            break
    steps.collect()
    return generic.Result.of(steps, []), kept


def maps(D, dtype):
    generator = torch.Generator().manual_seed(D)
    n = min(D, 300)
    W = torch.randn(n, n, generator=generator, dtype=torch.float64).to(dtype) * (0.4 / n**0.5)
    c = torch.randn(6, D, generator=generator, dtype=torch.float64).to(dtype)
    slow = torch.linspace(-1.2, 0.93, D, dtype=dtype)
    number = torch.arange(6).unsqueeze(1)

    def mixed(z):  # converge, grow, turn NaN, never come near, jump
        y = torch.tanh(z @ W.T + c)
        y = torch.where(number == 1, 2 * z.abs() + 1, y)
        y = torch.where((number == 2) & (z.abs().amax(1, keepdim=True) > 0.3), torch.nan, y)
        y = torch.where(number == 3, torch.where(z.sum(1, keepdim=True) > 0, -1 + 0 * z, 1 + 0 * z), y)
        return torch.where(number == 4, z.square() + 1, y)

    return {"contraction": lambda z: torch.relu(z @ W.T + c), "slow": lambda z: z * slow + c, "mixed": mixed}


@pytest.mark.parametrize("method", generic.METHODS)
@pytest.mark.parametrize("D", [1, 5])
def test_views_that_negate(method, D):
    """What torch negates when it reads it is negated: images, starting points and the shift of a linear map."""
    c = torch.full((1, D), 3.0, dtype=torch.float64)
    negated = lambda x: torch._neg_view(-x)  # noqa: E731  x, by another way
    expected = torch.full((1, D), 2.0, dtype=torch.float64)
    for affine in (False, True):
        rule = Rule(method, 1e-10, 200, affine=affine)
        f = lambda y: negated(-0.5 * y + c)  # noqa: E731
        result = generic.run(f, negated(0.1 * c), rule, first=f(0.1 * c))
        torch.testing.assert_close(result.z, expected)
    linear = lambda y: negated(-0.5 * y)  # noqa: E731
    for owned in (False, True):
        result = generic.run(linear, negated(c), rule, shift=negated(c), owned=owned)
        torch.testing.assert_close(result.z, expected)


@needs_library
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("D", [1, 17, 9001])
@pytest.mark.parametrize("name", ["contraction", "slow", "mixed"])
@pytest.mark.parametrize("method", ["plain", "anderson", "auto", "broyden"])
def test_compiled_steps(method, name, D, dtype):
    """Every step of both from the same point: next points, verdicts and best images agree."""
    if D > 1000 and name != "slow":
        pytest.skip("wide states take the diagonal map, which needs no matrix")
    f = maps(D, dtype)[name]
    rule = Rule(method, 1e-6, 40, depth=4, damping=0.8 if D == 17 else 1.0)
    start = torch.full((6, D), 0.1, dtype=dtype)
    ours, theirs = CompiledSteps(start, rule), TorchSteps(start, rule)
    eps = torch.finfo(dtype).eps
    for _ in range(40):
        fy = f(theirs.y)
        ours.y.copy_(theirs.y)  # so that rounding does not add up
        ours.advance(fy)
        theirs.advance(fy)
        ours.collect()
        assert torch.equal(ours.told.status, theirs.status) and torch.equal(ours.told.iterations, theirs.iterations)
        assert ours.is_running() == theirs.is_running()
        torch.testing.assert_close(ours.z, theirs.z, rtol=0, atol=0)
        torch.testing.assert_close(ours.norms, theirs.norms, rtol=50 * eps, atol=0, equal_nan=True)
        # Weights come out of normal equations, whose rounding may grow by the inverse of their regulariser, 10 eps.
        size = theirs.F.abs().nan_to_num(posinf=0).amax() if theirs.F.numel() else fy.abs().nan_to_num(posinf=0).amax()
        # Samples 1, 3 and 4 of "mixed" move along one direction: pairs are collinear, their weights rounding.
        rows = [0, 2, 5] if name == "mixed" and method in ("anderson", "auto") else slice(None)
        torch.testing.assert_close(ours.y[rows], theirs.y[rows], rtol=2e-2, atol=2e-2 * float(size))
        if not theirs.is_running():
            break


@needs_library
@pytest.mark.parametrize("method", ["plain", "anderson", "auto", "broyden"])
def test_whole_solves(method):
    for dtype, tol in ((torch.float32, 1e-5), (torch.float64, 1e-10)):
        f = maps(40, dtype)["slow" if method != "plain" else "contraction"]
        rule = Rule(method, tol, 200, depth=5)
        start = torch.zeros(6, 40, dtype=dtype)
        (ours, our_states), (theirs, states) = (
            drive(kind(start, rule), f, 200, keep=(3, 9)) for kind in (CompiledSteps, TorchSteps)
        )
        assert (ours.status == Status.CONVERGED).all() and (theirs.status == Status.CONVERGED).all()
        assert (ours.iterations - theirs.iterations).abs().max() <= 0.2 * theirs.iterations.max()
        torch.testing.assert_close(ours.z, theirs.z, rtol=50 * tol, atol=50 * tol)
        torch.testing.assert_close(our_states[0], states[0], rtol=1e-4, atol=1e-4)


@needs_library
@pytest.mark.parametrize("criterion", ["residual", "error", "absolute"])
@pytest.mark.parametrize("tol", [1e-6, 0.3])
def test_criteria_of_compiled_steps(criterion, tol):
    """A loose tolerance is met in the first steps: from which one on is the same."""
    f = maps(17, torch.float64)["contraction"]
    rule = Rule("plain", tol, 100, criterion=criterion)
    ours, theirs = (drive(kind(torch.zeros(6, 17).double(), rule), f, 100)[0] for kind in (CompiledSteps, TorchSteps))
    assert (ours.status == Status.CONVERGED).all() and torch.equal(ours.iterations, theirs.iterations)


@pytest.mark.parametrize("max_iter", [9, 500])
@pytest.mark.parametrize("criterion", ["residual", "absolute"])
@pytest.mark.parametrize("kind", [CompiledSteps, TorchSteps])
def test_a_sample_that_was_within_the_tolerance_has_converged(kind, criterion, max_iter):
    """Where f rounds off more than that, and nothing later comes as near: what it had reached then is its answer."""
    if kind is CompiledSteps and _library.compiled is None:
        pytest.skip(f"no compiled library: {_library.reason}")
    far, one, near, over, two, more = torch.tensor([0.999, 1, 1 + 9e-6, 1 + 21e-6, 2, 2.002], dtype=torch.float64)
    number = torch.tensor([[0], [1]])

    def f(z):  # of the first sample 0, far, one, near, over, near, over: of the second never nearer than 1e-3
        first = torch.where(z == near, over, torch.where(z < 0.9, far, torch.where(z < one, one, near)))
        return torch.where(number == 0, first, torch.where(z == two, more, two))

    rule = Rule("plain", 1e-5, max_iter, criterion=criterion)
    found, _ = drive(kind(torch.zeros(2, 1, dtype=torch.float64), rule), f, max_iter)
    assert found.status.tolist() == [Status.CONVERGED, Status.MAX_ITER if max_iter == 9 else Status.STALLED]
    assert found.z[0] == near and found.iterations[0] == 3 and 0 < found.residual[0] < 1e-5


@needs_library
def test_threads_and_pieces_change_nothing():
    """Bit for bit: sums are taken piece by piece in a fixed order."""
    f = maps(9001, torch.float32)["slow"]
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(generic.run(f, torch.zeros(6, 9001), Rule("anderson", 1e-6, 60)))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0].z, results[1].z) and torch.equal(results[0].residual, results[1].residual)


@needs_library
@pytest.mark.parametrize("power", [-500, 500])
def test_squares_out_of_range(power):
    """Norms whose squares leave the range of double are still norms."""
    c = torch.tensor([[1.0, -2.0], [0.5, 3.0]], dtype=torch.float64) * 2.0**power
    for method in ("plain", "anderson", "broyden"):
        result = generic.run(lambda z: 0.5 * z + c, torch.zeros_like(c), Rule(method, 1e-8, 100))
        assert (result.status == Status.CONVERGED).all()
        torch.testing.assert_close(result.z, 2 * c, rtol=1e-7, atol=0)


@needs_library
def test_what_is_served():
    y = torch.zeros(2, 3)
    assert serves(y, Rule("anderson", 1e-3, 9, depth=8)) and not serves(y, Rule("anderson", 1e-3, 9, depth=9))
    assert serves(y, Rule("broyden", 1e-3, 9, depth=32)) and not serves(y, Rule("broyden", 1e-3, 9, depth=33))
    assert not serves(y.half(), Rule("plain", 1e-3, 9)) and not serves(y.to("meta"), Rule("plain", 1e-3, 9))
    deep = generic.run(lambda z: 0.9 * z + 1, torch.zeros(2, 3), Rule("anderson", 1e-5, 99, depth=12))
    assert (deep.status == Status.CONVERGED).all()


@pytest.mark.parametrize(
    "rule, text",
    [
        (Rule("plain", 1e-3, 9), "plain, tol 0.001"),
        (Rule("anderson", 1e-5, 9), "Anderson(5), tol 1e-05"),
        (Rule("broyden", 1e-5, 9, 30, 0.5), "Broyden(30), tol 1e-05, damping 0.5"),
        (Rule("newton_krylov", 1e-5, 9, 20), "Newton-Krylov(20), tol 1e-05"),
        (Rule("auto", 1e-5, 9, criterion="error"), "plain, Anderson(5) on demand, tol 1e-05, error criterion"),
    ],
)
def test_rules_in_words(rule, text):
    lines = rule.explain().splitlines()
    assert str(rule) == lines[0] == text
    assert all(line.startswith("  ") for line in lines[1:]) and "after 9 evaluations" in lines[1]


def test_samples_without_elements():
    for shape in ((0, 3), (2, 0)):
        result = generic.run(lambda z: z, torch.zeros(shape), Rule("anderson", 1e-3, 9), keep=(2,))
        assert result.z.shape == shape and (result.status == 0).all() and len(result.trajectory) == 1


# Published test maps z = f(z) with a start: More, Garbow and Hillstrom 1981 ("MGH", as z - step F(z) or solved for z),
# the test set of Walker and Ni 2011 for Anderson acceleration, Kelley 1995, Ortega and Rheinboldt 1970, and textbooks.
def chandrasekhar(h):
    n, omega = len(h), 0.9
    mu = (torch.arange(n, dtype=h.dtype) + 0.5) / n
    kernel = mu.unsqueeze(1) / (mu.unsqueeze(1) + mu)
    return 1 / (1 - omega / (2 * n) * kernel @ h)


def broyden_tridiagonal(x, step=0.2):  # MGH 30
    left, right = torch.nn.functional.pad(x, (1, 1)).unfold(0, 3, 1)[:, [0, 2]].T
    return x - step * ((3 - 2 * x) * x - left - 2 * right + 1)


def discrete_boundary_value(x):  # MGH 28, solved for the diagonal
    n = len(x)
    h = 1 / (n + 1)
    t = (torch.arange(n, dtype=x.dtype) + 1) * h
    padded = torch.nn.functional.pad(x, (1, 1))
    return 0.5 * (padded[:-2] + padded[2:] - h * h * (x + t + 1) ** 3 / 2)


def discrete_integral(x):  # MGH 29
    n = len(x)
    h = 1 / (n + 1)
    t = (torch.arange(n, dtype=x.dtype) + 1) * h
    cube = (x + t + 1) ** 3
    below = torch.cumsum(t * cube, 0)
    above = ((1 - t) * cube).sum() - torch.cumsum((1 - t) * cube, 0)
    return -h / 2 * ((1 - t) * below + t * above)


def bratu(u):  # -u'' = e^u, solved for the diagonal of the difference quotient
    n = len(u)
    padded = torch.nn.functional.pad(u, (1, 1))
    return 0.5 * (padded[:-2] + padded[2:] + torch.exp(u) / (n + 1) ** 2)


def poisson_jacobi(u):
    n = len(u)
    padded = torch.nn.functional.pad(u, (1, 1))
    return 0.5 * (padded[:-2] + padded[2:] + 1 / (n + 1) ** 2)


def mixture_weights(p):  # Walker and Ni's EM example: proportions of three normals with known means
    data = torch.linspace(-2, 6, 60, dtype=p.dtype)
    means = torch.tensor([0.0, 2.0, 4.0], dtype=p.dtype)
    dense = torch.exp(-0.5 * (data.unsqueeze(1) - means) ** 2) * p
    return (dense / dense.sum(1, keepdim=True)).mean(0)


def pagerank(x):
    n = len(x)
    links = torch.zeros(n, n, dtype=x.dtype)
    for i in range(n):
        links[(2 * i) % n, i] += 0.5
        links[(i * i + 1) % n, i] += 0.5
    return 0.85 * links @ x + 0.15 / n


def ising(m):  # mean field with coupling 1.4 and field 0.1
    return torch.tanh(1.4 * m.mean() + 0.1 + 0 * m)


V = lambda *values: torch.tensor(values, dtype=torch.float64)  # noqa: E731
MAPS = {
    "cosine (Dottie)": (torch.cos, V(1.0)),
    "Babylonian square root": (lambda z: 0.5 * (z + 2 / z), V(1.0)),
    "exp(-z) (omega constant)": (lambda z: torch.exp(-z), V(0.5)),
    "Kepler's equation": (lambda E: 1.0 + 0.6 * torch.sin(E), V(1.0)),
    "Colebrook's friction": (lambda x: -2 * torch.log10(1e-4 / 3.7 + 2.51 / 1e5 * x), V(7.0)),
    "logistic map, r = 2.9": (lambda z: 2.9 * z * (1 - z), V(0.4)),
    "plastic number": (lambda z: (z + 1) ** (1 / 3), V(1.0)),
    "Conte and de Boor's pair": (
        lambda z: torch.stack(((z[0] ** 2 + z[1] ** 2 + 8) / 10, (z[0] * z[1] ** 2 + z[0] + 8) / 10)),
        V(0, 0),
    ),
    "Burden and Faires' triple": (
        lambda z: torch.stack(
            (
                torch.cos(z[1] * z[2]) / 3 + 1 / 6,
                torch.sqrt(z[0] ** 2 + torch.sin(z[2]) + 1.06) / 9 - 0.1,
                -torch.exp(-z[0] * z[1]) / 20 - (10 * math.pi - 3) / 60,
            )
        ),
        V(0.1, 0.1, -0.1),
    ),
    "Chandrasekhar's H-equation": (chandrasekhar, torch.ones(40, dtype=torch.float64)),
    "Burden and Faires' square root": (lambda z: torch.sqrt(10 / (z + 4)), V(1.5)),
    "Newton's cube root": (lambda z: z - (z**3 - 2) / (3 * z**2), V(1.0)),
    "MGH 28 discrete boundary value": (discrete_boundary_value, torch.zeros(8, dtype=torch.float64)),
    "MGH 29 discrete integral equation": (discrete_integral, torch.zeros(10, dtype=torch.float64)),
    "MGH 30 Broyden tridiagonal": (broyden_tridiagonal, torch.full((10,), -1.0, dtype=torch.float64)),
    "Bratu": (bratu, torch.zeros(9, dtype=torch.float64)),
    "Poisson by Jacobi": (poisson_jacobi, torch.zeros(9, dtype=torch.float64)),
    "mixture weights by EM": (mixture_weights, V(0.2, 0.3, 0.5)),
    "PageRank": (pagerank, torch.full((12,), 1 / 12, dtype=torch.float64)),
    "mean-field Ising": (ising, torch.full((3,), 0.5, dtype=torch.float64)),
}


@pytest.mark.parametrize("name", MAPS)
def test_published_maps(name):
    """scipy.optimize.root finds the same fixed point from the same start, and so does every solver here."""
    scipy = pytest.importorskip("scipy.optimize", reason="scipy is not installed (bench extra)")
    f, start = MAPS[name]

    def F(z):
        z = torch.from_numpy(z)
        return (f(z) - z).numpy()

    answer = scipy.root(F, start.numpy(), method="hybr", tol=1e-13)
    assert abs(answer.fun).max() < 1e-10, answer.message
    expected = torch.from_numpy(answer.x).unsqueeze(0)
    for method in ("plain", "anderson", "broyden", "newton_krylov", "auto"):
        rule = Rule(method, 1e-12, 5000, depth=5)
        result = generic.run(lambda z: f(z[0]).unsqueeze(0), start.unsqueeze(0), rule)
        assert int(result.status) == Status.CONVERGED, (method, result)
        torch.testing.assert_close(
            result.z, expected, rtol=1e-7, atol=1e-9, msg=lambda m, method=method: f"{method}: {m}"
        )


@pytest.mark.parametrize("name", MAPS)
def test_published_maps_in_jaxopt(name):
    """jaxopt's fixed-point iteration and Anderson acceleration end where the solvers here do."""
    jax = pytest.importorskip("jax", reason="jax is not installed")
    jaxopt = pytest.importorskip("jaxopt", reason="jaxopt is not installed")
    f, start = MAPS[name]
    with jax.enable_x64(True):

        def g(z):
            evaluate = lambda z: f(torch.from_numpy(numpy.array(z))).numpy()  # noqa: E731
            return jax.pure_callback(evaluate, jax.ShapeDtypeStruct(start.shape, "float64"), z)

        options = {"maxiter": 5000, "tol": 1e-11, "implicit_diff": False}
        kinds = jaxopt.FixedPointIteration(g, **options), jaxopt.AndersonAcceleration(g, history_size=2, **options)
        theirs = [torch.from_numpy(numpy.array(kind.run(start.numpy()).params)) for kind in kinds]
    for method, expected in zip(("plain", "anderson"), theirs, strict=True):
        result = generic.run(lambda z: f(z[0]).unsqueeze(0), start.unsqueeze(0), Rule(method, 1e-12, 5000))
        torch.testing.assert_close(result.z[0], expected, rtol=1e-7, atol=1e-9)


def adjoint_problem(dtype, B=6, D=40):
    """z = z A + g with a sample each of contraction 0.1 to 0.9, and its solution in float64."""
    generator = torch.Generator().manual_seed(1)
    A = torch.randn(D, D, generator=generator, dtype=torch.float64)
    A = A / torch.linalg.matrix_norm(A, 2)
    share = torch.linspace(0.1, 0.9, B, dtype=torch.float64).unsqueeze(1)
    g = torch.randn(B, D, generator=generator, dtype=torch.float64)
    exact = torch.stack([torch.linalg.solve(torch.eye(D) - s * A.T, row) for s, row in zip(share, g, strict=True)])
    A, share, g = (t.to(dtype) for t in (A, share, g))
    return (lambda z: share * (z @ A) + g), g, exact


@pytest.mark.parametrize("dtype, tol", [(torch.float32, 1e-3), (torch.float64, 1e-8)])
@pytest.mark.parametrize("kind", [CompiledSteps, TorchSteps])
def test_affine_equations_stop_at_the_residual_that_is_known(kind, dtype, tol):
    """An evaluation fewer than for a function that may be anything; what is said of the residual is true."""
    if kind is CompiledSteps and _library.compiled is None:
        pytest.skip(f"no compiled library: {_library.reason}")
    f, g, exact = adjoint_problem(dtype)
    known, judged = (drive(kind(g, Rule("anderson", tol, 200, depth=8, affine=a)), f, 200)[0] for a in (True, False))
    assert (known.status == int(Status.CONVERGED)).all() and (known.residual <= tol).all()
    saved = judged.iterations - known.iterations
    assert (saved >= 0).all() and (saved > 0).any(), (judged.iterations, known.iterations)
    residual = (f(known.z) - known.z).double().norm(dim=1) / known.z.double().norm(dim=1)
    assert (residual <= tol).all()
    error = (known.z - exact).norm(dim=1) / exact.norm(dim=1)
    assert (error <= tol / (1 - torch.linspace(0.1, 0.9, 6, dtype=torch.float64))).all()


@needs_library
def test_affine_steps_agree():
    f, g, _ = adjoint_problem(torch.float64)
    rule = Rule("anderson", 1e-8, 200, affine=True)
    ours, theirs = (drive(kind(g, rule), f, 200)[0] for kind in (CompiledSteps, TorchSteps))
    assert ours.iterations.tolist() == theirs.iterations.tolist()
    torch.testing.assert_close(ours.z, theirs.z, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(ours.residual, theirs.residual, rtol=1e-2, atol=0.0)


@pytest.mark.parametrize("method", ["plain", "anderson", "broyden", "newton_krylov"])
def test_a_shift_is_part_of_the_map(method):
    f, g, _ = adjoint_problem(torch.float64)
    rule = Rule(method, 1e-9, 400, affine=True)
    linear = generic.run(lambda u: f(u) - g, g, rule, shift=g)
    whole = generic.run(f, g, rule)
    assert linear.told.is_converged() and linear.iterations.tolist() == whole.iterations.tolist()
    torch.testing.assert_close(linear.z, whole.z, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_norm(dtype):
    x = torch.randn(7, 33, generator=torch.Generator().manual_seed(0)).to(dtype)
    for part in (x, x.T, x[:, ::2], x[:0]):
        assert generic.norm(part) == pytest.approx(float(part.double().norm()), rel=4 * torch.finfo(dtype).eps)
    assert not math.isfinite(generic.norm(x.index_fill(1, torch.tensor([3]), torch.nan)))


@pytest.mark.parametrize("kind", [CompiledSteps, TorchSteps])
def test_a_tolerance_below_the_rounding_of_the_mix_is_judged_by_evaluations(kind):
    if kind is CompiledSteps and _library.compiled is None:
        pytest.skip(f"no compiled library: {_library.reason}")
    f, g, _ = adjoint_problem(torch.float32)
    rules = (Rule("anderson", 3e-7, 60, affine=a) for a in (True, False))
    known, judged = (drive(kind(g, rule), f, 60)[0] for rule in rules)
    assert known.iterations.tolist() == judged.iterations.tolist() and torch.equal(known.z, judged.z)


@pytest.mark.parametrize("owned", [False, True])
def test_a_solve_inside_of_a_solve_of_the_same_kind(owned):
    rule, c = Rule("anderson", 1e-6, 60), torch.linspace(-1, 1, 12).view(3, 4)

    def f(z):
        inner = generic.run(lambda y: 0.5 * y + z / 4, torch.zeros_like(z), rule, owned=owned).z  # z / 2
        return torch.tanh(inner) + c

    start = torch.full((3, 4), 0.25)
    result = generic.run(f, start, rule, owned=owned)
    again = generic.run(f, torch.full((3, 4), 0.25), rule, owned=owned)
    exact = torch.zeros(3, 4, dtype=torch.float64)
    for _ in range(100):
        exact = torch.tanh(exact / 2) + c.double()
    assert result.told.is_converged()
    assert ((result.z - exact).norm(dim=1) <= 1e-5 * exact.norm(dim=1)).all()
    assert torch.equal(result.z, again.z)
    assert owned or torch.equal(start, torch.full((3, 4), 0.25))
