"""The scalar equation ``z = act(d z + c)``: right to rounding or said not to be, at any size of d and c."""

from functools import cache

import mpmath
import pytest
import torch
from structures import injection

import deq
from deq import _library, weights
from deq.activations import ACTIVATIONS, LEAKY_SLOPE
from deq.direct import methods, roots
from deq.kernels import diagonal

SIZES = [sign * 2.0**k for k in range(-100, 101, 20) for sign in (-1, 1)]  # 10^-30 to 10^30
MOST_UNITS = 4  # of the rounding that d and c themselves carry


def exact_value(activation: str, p):
    """act(p) and act'(p)."""
    e = mpmath.exp(-abs(p))
    if activation in ("identity", "relu", "leaky_relu"):
        slope = 1 if p > 0 or activation == "identity" else 0 if activation == "relu" else mpmath.mpf(LEAKY_SLOPE)
        return slope * p, slope
    if activation == "elu":
        return (p, 1) if p > 0 else (mpmath.expm1(p), e)
    if activation == "tanh":
        return mpmath.tanh(p), mpmath.sech(p) ** 2
    if activation == "gelu":
        cdf = mpmath.erfc(-p / mpmath.sqrt(2)) / 2
        return p * cdf, cdf + p * mpmath.exp(-p * p / 2) / mpmath.sqrt(2 * mpmath.pi)
    sigmoid = (1 if p > 0 else e) / (1 + e)
    if activation == "sigmoid":
        return sigmoid, e / (1 + e) ** 2
    if activation == "silu":
        return p * sigmoid, sigmoid * (1 + p * (1 - sigmoid))
    return max(p, 0) + mpmath.log1p(e), sigmoid


@cache
def exact_roots(activation: str) -> torch.Tensor:
    """Rows d, c, z and the condition of z: by how much it moves for a relative change of 1 in d and in c."""
    rows = []
    with mpmath.workdps(80):
        for d in SIZES:
            if not roots.has_unique_root(activation, d, d):
                continue
            for c in SIZES:
                low, high = mpmath.mpf(-400), mpmath.mpf(400)  # of t in p = 1e-100 sinh(t): every size of p is near
                for _ in range(180):
                    t = (low + high) / 2
                    p = mpmath.sinh(t) * mpmath.mpf(10) ** -100
                    z, slope = exact_value(activation, p)
                    is_above = (p - d * z - c) * (1 - d * slope) > 0  # identity has its one root for d > 1 too
                    low, high = (low, t) if is_above else (t, high)
                condition = slope * (abs(d * z) + abs(c)) / abs(1 - d * slope)
                rows.append([d, c, float(z), float(condition)])
    return torch.tensor(rows, dtype=torch.float64)


def units(z: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Errors in units of the rounding of z, d and c."""
    kind = torch.finfo(z.dtype)
    return (z.double() - table[:, 2]).abs() / (kind.eps * (table[:, 2].abs() + table[:, 3]) + kind.tiny)


def check(activation: str, dtype: torch.dtype) -> None:
    table = exact_roots(activation)
    for d in table[:, 0].unique():
        rows = table[table[:, 0] == d]
        W, c = weights.Diagonal(d.to(dtype)[None]), rows[:, 1:2].to(dtype)
        solution = deq.solve(W, c, activation, solver="direct", on_failure="ignore")
        error = units(solution.z[:, 0], rows)
        assert error.max() <= MOST_UNITS, f"d = {d:g}, c = {rows[error.argmax(), 1]:g}: {error.max():g} units"
        f = ACTIVATIONS[activation].value(d * solution.z.double() + c.double())
        f, z = f[:, 0], solution.z[:, 0].double()
        honest = (f - z).abs() <= 2 * solution.plan.tol * f.abs()
        assert honest[solution.converged].all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_size_of_d_and_c(activation, dtype, isa):
    check(activation, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_size_of_d_and_c_in_plain_torch(activation, dtype, monkeypatch):
    monkeypatch.setattr(methods, "is_compiled", lambda like: False)
    monkeypatch.setattr(_library, "compiled", None)
    check(activation, dtype)


@pytest.mark.filterwarnings("ignore:overflow encountered", "ignore:invalid value encountered")
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_size_of_d_and_c_in_the_triton_kernels(activation):
    """In the interpreter, every row of the table at once: d differs from element to element."""
    table = exact_roots(activation)
    d, c = table[:, :2].float().unbind(1)
    z, _, slope = diagonal.solve_diagonal(d, c[None], activation, derives=True)
    assert units(z[0], table).max() <= MOST_UNITS
    assert slope.isfinite().all()


@pytest.mark.parametrize("plain", [False, True])
def test_what_is_far_below_the_injection_is_judged_in_its_own_unit(plain, monkeypatch):
    """z is 7e-29, whose square float32 does not hold, beside c = 1."""
    if plain:
        monkeypatch.setattr(methods, "is_compiled", lambda like: False)
    W, c = weights.Diagonal(torch.tensor([-1e30])), torch.ones(1, 1)
    solution = deq.solve(W, c, "softplus", solver="direct", on_failure="ignore")
    assert abs(float(solution.z) / 6.588957e-29 - 1) <= 1e-6
    f = torch.nn.functional.softplus(W.d.double() * solution.z.double() + 1)
    residual = float((f - solution.z.double()).abs() / f)
    assert 0.1 * residual <= float(solution.residual) <= 10 * residual


@pytest.mark.parametrize("activation", ["elu", "gelu", "silu", "tanh", "sigmoid", "softplus"])
def test_a_root_does_not_depend_on_those_beside_it(activation, isa):
    generator = torch.Generator().manual_seed(0)
    for dtype in (torch.float32, torch.float64):
        for d in (-0.1, -3.0):
            W = torch.randn(70, 70, generator=generator, dtype=dtype) * 0.1 + d * torch.eye(70, dtype=dtype)
            c = 2 * torch.randn(65, 70, generator=generator, dtype=dtype)
            c[1::2] = torch.linspace(-100, 100, 32 * 70, dtype=dtype).reshape(32, 70)  # the ends of the activations
            options = {"solver": "direct", "on_failure": "ignore"}
            for weight in (weights.LowerTriangular(W), weights.Diagonal(W.diagonal().contiguous())):
                z = deq.solve(weight, c, activation, **options).z
                alone = torch.cat([deq.solve(weight, row[None], activation, **options).z for row in c])
                assert torch.equal(z, alone)


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


@pytest.mark.filterwarnings("ignore::deq.ConvergenceWarning")
@pytest.mark.parametrize("size", [1e3, 1e4, 1e6])
def test_what_rounding_keeps_from_the_tolerance_is_still_the_answer(size):
    """The residual of a large d is d times the rounding of z; z itself is as good as ever."""
    d, c = -size * (1 + torch.rand(30)), injection(30, 4)
    exact = deq.solve(weights.Diagonal(d.double()), c.double(), "tanh", solver="direct", on_failure="ignore").z
    z = deq.solve(weights.Diagonal(d), c, "tanh").z.double()
    assert ((z - exact).norm(dim=-1) <= 1e-3 * exact.norm(dim=-1)).all()
