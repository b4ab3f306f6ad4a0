"""Structures are the matrices they stand for; parametrisations keep what they promise, checked in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import deq.weights
from deq.weights import (
    Dense,
    Diagonal,
    DiagonalLowRank,
    LowerTriangular,
    bounded,
    bounded_triangular,
    contractive,
    monotone,
    spectral_norm_bound,
)

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def gaussian(*shape, seed=0, dtype=torch.float64, scale=1.0):
    return (scale * torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))).to(dtype)


def family(name: str, m: int) -> torch.Tensor:
    V = gaussian(m, m, seed=m) / m**0.5
    return {
        "gaussian": lambda: 3 * V,
        "small": lambda: 0.1 * V,
        "orthogonal": lambda: torch.linalg.qr(V).Q,
        "symmetric": lambda: V + V.mT,
        "rank one": lambda: 5 * torch.outer(V[0], V[-1]),
        "outlier": lambda: V + 4 * torch.full((m, m), 1 / m, dtype=V.dtype),
        "close pair": lambda: torch.diag(torch.linspace(2 - 1e-9, 2, m, dtype=V.dtype)),
        "zero": lambda: 0 * V,
    }[name]()


FAMILIES = ["gaussian", "small", "orthogonal", "symmetric", "rank one", "outlier", "close pair", "zero"]


def norm2(W: torch.Tensor) -> float:
    return float(torch.linalg.matrix_norm(W.double(), 2))


class TestStructures:
    def test_dense_is_the_matrix(self):
        W = gaussian(3, 3)
        assert Dense(W).dense() is W

    def test_lower_triangular_ignores_the_rest(self):
        W = torch.arange(1.0, 10.0).reshape(3, 3)
        assert LowerTriangular(W).dense().tolist() == [[1, 0, 0], [4, 5, 0], [7, 8, 9]]
        assert LowerTriangular(W, strict=True).dense().tolist() == [[0, 0, 0], [4, 0, 0], [7, 8, 0]]

    def test_diagonal(self):
        assert Diagonal(torch.tensor([1.0, 2.0])).dense().tolist() == [[1, 0], [0, 2]]

    def test_diagonal_low_rank(self):
        d, P, Q = torch.tensor([1.0, 2.0]), torch.tensor([[3.0], [4.0]]), torch.tensor([[5.0], [6.0]])
        weight = DiagonalLowRank(d, P, Q)
        assert weight.dense().tolist() == [[16, 18], [20, 26]]
        assert weight.rank == 1

    def test_dense_is_differentiable_in_every_field(self):
        W, d, P, Q = (gaussian(*s).requires_grad_() for s in ((4, 4), (4,), (4, 2), (4, 2)))
        assert torch.autograd.gradcheck(lambda W: LowerTriangular(W).dense(), W)
        assert torch.autograd.gradcheck(lambda W: LowerTriangular(W, strict=True).dense(), W)
        assert torch.autograd.gradcheck(lambda d: Diagonal(d).dense(), d)
        assert torch.autograd.gradcheck(lambda d, P, Q: DiagonalLowRank(d, P, Q).dense(), (d, P, Q))

    def test_common_properties(self):
        W, d, P = torch.zeros(5, 5).bfloat16(), torch.zeros(5).bfloat16(), torch.zeros(5, 2).bfloat16()
        for weight, name in (
            (Dense(W), "dense"),
            (LowerTriangular(W), "lower_triangular"),
            (Diagonal(d), "diagonal"),
            (DiagonalLowRank(d, P, P), "diagonal_low_rank"),
        ):
            assert (weight.structure, weight.width, weight.dtype) == (name, 5, torch.bfloat16)
            assert weight.device == torch.device("cpu")
            assert weight.dense().shape == (5, 5)
            assert weight.dense().dtype == torch.bfloat16

    def test_fields_cannot_be_replaced(self):
        with pytest.raises(AttributeError):
            Dense(torch.zeros(2, 2)).W = torch.zeros(3, 3)

    @pytest.mark.parametrize(
        ("make", "error", "message"),
        [
            (lambda: Dense([[1.0]]), TypeError, r"W must be a tensor .* got list"),
            (lambda: Dense(torch.zeros(2, 2, dtype=torch.int64)), TypeError, r"W must have a floating.*int64"),
            (lambda: Dense(torch.zeros(2, 3)), ValueError, r"W must be square.*\(2, 3\)"),
            (lambda: Dense(torch.zeros(2)), ValueError, r"W must have shape \(m, m\); got \(2,\)"),
            (lambda: Dense(torch.zeros(0, 0)), ValueError, r"W must not be empty"),
            (lambda: LowerTriangular(torch.zeros(2, 2), strict=1), TypeError, r"strict must be True or False; got 1"),
            (lambda: LowerTriangular(torch.zeros(3, 2)), ValueError, r"W must be square"),
            (
                lambda: LowerTriangular(torch.eye(3).to_sparse()),
                TypeError,
                r"W must be dense; got layout torch.sparse_coo",
            ),
            (lambda: Diagonal(torch.ones(3).to_sparse()), TypeError, r"d must be dense"),
            (lambda: Diagonal(torch.zeros(2, 2)), ValueError, r"d must have shape \(m,\); got \(2, 2\)"),
            (lambda: Diagonal(torch.zeros(0)), ValueError, r"d must not be empty"),
            (
                lambda: DiagonalLowRank(torch.zeros(3), torch.zeros(2, 1), torch.zeros(3, 1)),
                ValueError,
                r"P must be \(m, r\) with m = 3.*\(2, 1\)",
            ),
            (
                lambda: DiagonalLowRank(torch.zeros(3), torch.zeros(3, 1), torch.zeros(3, 2)),
                ValueError,
                r"same rank.*\(3, 1\).*\(3, 2\)",
            ),
            (
                lambda: DiagonalLowRank(torch.zeros(3), torch.zeros(3, 1), torch.zeros(3, 1).double()),
                ValueError,
                r"Q must have the dtype.*float32.*got torch.float64",
            ),
        ],
    )
    def test_bad_fields_are_named(self, make, error, message):
        with pytest.raises(error, match=message):
            make()


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
class TestContractive:
    @pytest.mark.parametrize("m", [1, 2, 17, 192, 193, 256])
    @pytest.mark.parametrize("name", FAMILIES)
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_norm_is_at_most_the_bound(self, m, name, dtype):
        V = family(name, m).to(dtype)
        for bound in (0.95, 0.3):
            W = contractive(V, bound)
            assert W.dtype == dtype
            assert norm2(W) <= bound

    @pytest.mark.parametrize("m", [1, 17, 192, 193, 400])
    @pytest.mark.parametrize("name", ["gaussian", "orthogonal", "outlier"])
    def test_bound_is_tight(self, m, name):
        slack = deq.weights.CERTIFICATE_SLACK if m > deq.weights.EXACT_UP_TO else 1.0
        V = 2 * family(name, m)
        s = norm2(V)
        assert s <= float(spectral_norm_bound(V)) <= s * slack * (1 + 1e-9)

    def test_leaves_a_small_weight_exactly_alone(self):
        for m in (3, 193):
            V = gaussian(m, m, dtype=torch.float32)
            V = V * (0.5 / norm2(V))
            assert torch.equal(contractive(V), V)

    @given(
        m=st.integers(1, 12),
        seed=st.integers(0, 10**6),
        exponent=st.integers(-37, 37),
        bound=st.floats(0.01, 0.999),
    )
    @settings(max_examples=60, deadline=None)
    def test_norm_at_any_scale(self, m, seed, exponent, bound):
        V = gaussian(m, m, seed=seed, dtype=torch.float32, scale=10.0**exponent)
        assert norm2(contractive(V, bound)) <= bound

    @pytest.mark.parametrize("scale", [1e-300, 1e-160, 1e160, 1e300])
    def test_gram_matrix_does_not_overflow(self, scale):
        V = scale * gaussian(5, 5)
        W = contractive(V)
        assert norm2(W) <= 0.95
        assert torch.equal(W, V) if scale < 1 else norm2(W) > 0.949

    def test_a_wrong_estimate_is_caught_by_the_certificate(self, monkeypatch):
        """The guarantee must not rest on the Krylov estimate: feed it the worst vector there is."""
        V = family("outlier", 200)
        smallest = torch.linalg.svd(V).Vh[-1]
        monkeypatch.setattr(deq.weights, "_krylov_estimate", lambda G: smallest)
        s = norm2(V)
        assert s <= float(spectral_norm_bound(V)) <= s * (1 + 1e-9)

    def test_gradient(self):
        for V in (3 * gaussian(5, 5), 0.1 * gaussian(5, 5, seed=1), gaussian(1, 1)):
            assert torch.autograd.gradcheck(contractive, V.requires_grad_())

    @pytest.mark.parametrize("m", [192, 200])
    def test_gradient_of_the_norm_is_that_of_the_largest_singular_value(self, m):
        V = family("gaussian", m).requires_grad_()
        bound = spectral_norm_bound(V)
        (ours,) = torch.autograd.grad(bound, V)
        (exact,) = torch.autograd.grad(torch.linalg.matrix_norm(V, 2), V)
        torch.testing.assert_close(ours, exact * (bound.item() / norm2(V.detach())))

    def test_gradient_is_finite_at_zero_and_at_a_double_singular_value(self):
        for V in (torch.zeros(3, 3), 2 * torch.eye(3)):
            V.requires_grad_()
            contractive(V).sum().backward()
            assert V.grad.isfinite().all()

    @pytest.mark.parametrize("m", [5, deq.weights.EXACT_UP_TO + 8])
    def test_transforms(self, m):
        V, direction, g = (gaussian(m, m).double() for _ in range(3))
        loss = lambda V: (contractive(V) * g).sum()  # noqa: E731
        tangent = torch.func.jvp(contractive, (V,), (direction,))[1]
        gradient = torch.func.grad(loss)(V)
        torch.testing.assert_close((tangent * g).sum(), (gradient * direction).sum())
        stack = torch.stack((V, V / 100, direction))
        for function in (contractive, torch.func.grad(loss)):
            each = torch.stack([function(one) for one in stack])
            torch.testing.assert_close(torch.func.vmap(function)(stack), each)
            torch.testing.assert_close(torch.func.vmap(function, 2)(stack.movedim(0, 2)), each)

    def test_jacobians(self):
        V = 3 * gaussian(4, 4).double()
        want = torch.autograd.functional.jacobian(contractive, V)
        torch.testing.assert_close(torch.func.jacrev(contractive)(V), want)
        torch.testing.assert_close(torch.func.jacfwd(contractive)(V), want)
        torch.testing.assert_close(torch.autograd.functional.jacobian(contractive, V, vectorize=True), want)

    @pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
    @pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning")
    @pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node:UserWarning")
    def test_graphs(self):
        """Its numbers decide: in an exported program there was memory that nobody had written to instead."""

        class Scaled(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.V = torch.nn.Parameter(3 * gaussian(6, 6))

            def forward(self, x):
                return x @ contractive(self.V)

        module, x = Scaled(), gaussian(2, 6)
        want = module(x), *torch.autograd.grad(module(x).sin().sum(), module.V)
        graphs = {
            "export": torch.export.export(module, (x,), strict=False).module(),
            "strict export": torch.export.export(module, (x,), strict=True).module(),
            "compile": torch.compile(module, fullgraph=True, backend="aot_eager"),
        }
        for name, graph in graphs.items():
            got = graph(x), *torch.autograd.grad(graph(x).sin().sum(), list(graph.parameters()))
            assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True)), name
        V = module.V.detach()
        primal, tangent = torch.func.linearize(contractive, V)
        assert torch.equal(primal, contractive(V))
        direction = gaussian(6, 6, seed=1)
        torch.testing.assert_close(tangent(direction), torch.func.jvp(contractive, (V,), (direction,))[1])

    def test_second_derivative_says_that_it_does_not_exist(self):
        V = (3 * gaussian(4, 4)).requires_grad_()
        loss = lambda V: contractive(V).square().sum()  # noqa: E731
        (g,) = torch.autograd.grad(loss(V), V, create_graph=True)
        for second in (
            lambda: g.sum().backward(),
            lambda: torch.autograd.grad(g.sum(), V),
            lambda: torch.func.jacrev(torch.func.grad(loss))(V.detach()),
            lambda: torch.func.hessian(loss)(V.detach()),
            lambda: torch.func.jacfwd(torch.func.jacfwd(loss))(V.detach()),
            lambda: torch.func.jacrev(torch.func.jacfwd(loss))(V.detach()),
        ):
            with pytest.raises(RuntimeError, match="differentiable once"):
                second()
        inside = (V.detach() / 100).requires_grad_()  # where the bound is not reached W is V
        (g,) = torch.autograd.grad(loss(inside), inside, create_graph=True)
        torch.testing.assert_close(g, 2 * inside)

    @pytest.mark.parametrize(
        ("V", "bound", "error", "message"),
        [
            (torch.zeros(2, 3), 0.95, ValueError, r"V must be square, \(m, m\); got \(2, 3\)"),
            (torch.full((2, 2), torch.nan), 0.95, ValueError, "V must be finite"),
            (torch.full((2, 2), torch.inf), 0.95, ValueError, "V must be finite"),
            (torch.zeros(2, 2), 1.0, ValueError, "bound must lie strictly between 0 and 1; got 1.0"),
            (torch.zeros(2, 2), 0.0, ValueError, "bound must lie"),
        ],
    )
    def test_bad_arguments(self, V, bound, error, message):
        with pytest.raises(error, match=message):
            contractive(V, bound)


class TestMonotone:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize(("m", "rank"), [(1, 1), (5, 2), (64, 64), (65, 70)])
    @pytest.mark.parametrize("mu", [0.1, 1.0])
    def test_symmetric_part(self, dtype, m, rank, mu):
        A, B = gaussian(rank, m, dtype=dtype), gaussian(m, m, seed=1, dtype=dtype)
        W = monotone(A, B, mu)
        assert W.dtype == dtype
        lowest = float(torch.linalg.eigvalsh(torch.eye(m, dtype=torch.float64) - (W + W.mT).double() / 2)[0])
        # A rounded inner product of n terms is off by at most n eps |a|.|b|, the sum and the final rounding by 3 eps.
        A, B = A.double().abs(), B.double().abs()
        magnitude = torch.eye(m, dtype=torch.float64) + A.mT @ A + B + B.mT
        work = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
        rounding = (rank + 3) * work + torch.finfo(dtype).eps
        assert lowest >= mu - rounding * norm2(magnitude)

    def test_reaches_every_such_weight(self):
        m, mu = 6, 0.2
        W = gaussian(m, m) - 4 * torch.eye(m, dtype=torch.float64)
        symmetric = torch.eye(m, dtype=torch.float64) * (1 - mu) - (W + W.mT) / 2
        A = torch.linalg.cholesky(symmetric).mT
        torch.testing.assert_close(monotone(A, (W - W.mT) / 4, mu), W)

    def test_autocast_rounds_no_product(self):
        A, B = (gaussian(32, 32, seed=seed, dtype=torch.float32) for seed in (0, 1))
        with torch.autocast("cpu", torch.bfloat16):
            W = monotone(A, B)
        assert torch.equal(W, monotone(A, B))

    def test_gradient(self):
        A, B = gaussian(3, 4).requires_grad_(), gaussian(4, 4).requires_grad_()
        assert torch.autograd.gradcheck(monotone, (A, B))
        assert torch.autograd.gradgradcheck(monotone, (A, B))

    @pytest.mark.parametrize(
        ("A", "B", "mu", "message"),
        [
            (torch.zeros(2, 3), torch.zeros(2, 3), 0.1, r"B must be square"),
            (torch.zeros(2, 3), torch.zeros(2, 2), 0.1, r"A must be \(r, 2\).*\(2, 3\)"),
            (torch.zeros(2, 2), torch.zeros(2, 2).double(), 0.1, r"A must be .*float64.*float32"),
            (torch.zeros(2, 2), torch.zeros(2, 2, device="meta"), 0.1, r"A must be .* on meta .* on cpu"),
            (torch.zeros(2, 2), torch.zeros(2, 2), 0.0, r"mu must lie in \(0, 1\]; got 0.0"),
            (torch.zeros(2, 2), torch.zeros(2, 2), 1.5, r"mu must lie"),
        ],
    )
    def test_bad_arguments(self, A, B, mu, message):
        with pytest.raises(ValueError, match=message):
            monotone(A, B, mu)


class TestBounded:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("bound", [0.3, 0.95, 0.9999])
    def test_range(self, dtype, bound):
        v = torch.tensor([-1e4, -3.0, -0.1, 0.0, 0.1, 3.0, 1e4], dtype=torch.float64).to(dtype)
        w = bounded(v, bound)
        assert w.dtype == dtype
        assert (w.abs() < 1).all()
        assert (w.abs() <= bound * (1 + torch.finfo(dtype).eps)).all()
        assert torch.equal(w, -bounded(-v, bound))
        assert (w.diff() >= 0).all()

    def test_is_the_identity_near_zero(self):
        v = torch.tensor([0.0, 1e-6, -1e-6], dtype=torch.float64)
        torch.testing.assert_close(
            bounded(v), v, rtol=1e-11, atol=0
        )  # bound tanh(v / bound) = v (1 - v^2 / (3 bound^2) ..)

    def test_gradient(self):
        assert torch.autograd.gradcheck(bounded, gaussian(7).requires_grad_())
        assert torch.autograd.gradcheck(bounded_triangular, gaussian(4, 4).requires_grad_())

    def test_triangular(self):
        V = 10 * gaussian(5, 5)
        W = bounded_triangular(V, 0.5)
        assert torch.equal(W.tril(-1), V.tril(-1))
        assert torch.equal(W.diagonal(), bounded(V.diagonal(), 0.5))
        assert torch.equal(W.triu(1), torch.zeros_like(W))

    @pytest.mark.parametrize("bound", [0.0, 1.0, -0.5])
    def test_bad_bound(self, bound):
        with pytest.raises(ValueError, match="bound must lie strictly between 0 and 1"):
            bounded(torch.zeros(2), bound)

    @pytest.mark.parametrize("v", [torch.ones(2, dtype=torch.int64), [1.0]])
    def test_other_types_are_named(self, v):
        with pytest.raises(TypeError, match=r"v must be a floating-point tensor; got (torch.int64|list)"):
            bounded(v)
