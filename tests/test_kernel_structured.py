"""The kernels for weights of known structure, in the interpreter, against deq/direct/roots.py."""

import contextlib
from collections import defaultdict

import pytest
import torch
from close import assert_as_accurate
from problems import gaussian

import deq
from deq import cache
from deq.activations import ACTIVATIONS
from deq.direct import methods, roots
from deq.direct.methods import relative_residual
from deq.kernels import diagonal, triangular


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_diagonal(activation):
    _, x, _ = gaussian(37, 3)
    x = 3 * x
    d = torch.linspace(-0.8, 0.8, 37)
    z, residual, slope = diagonal.solve_diagonal(d, x, activation, derives=True)
    plain, p = roots.scalar_root(d, x, activation)
    exact, point = roots.scalar_root(d.double(), x.double(), activation)
    assert_as_accurate(z, plain, exact)
    entry = ACTIVATIONS[activation]
    assert_as_accurate(slope, entry.derivative(p), entry.derivative(point))
    assert (residual < 1e-6).all()


@pytest.mark.filterwarnings("ignore:overflow encountered")
def test_diagonal_far_from_one_and_not_finite():
    x = torch.tensor([[1e30, -1e30], [1e-30, 2e-30], [float("nan"), 1.0]])
    for activation in ("relu", "gelu"):
        z, residual, _ = diagonal.solve_diagonal(torch.tensor([0.5, -0.5]), x, activation)
        assert (residual[:2] < 1e-5).all() and z[:2].isfinite().all()
        assert residual[2].isnan()


@pytest.mark.parametrize("upper", [False, True])
@pytest.mark.parametrize(("m", "B"), [(1, 1), (35, 5)])
@pytest.mark.parametrize("strict", [False, True])
def test_triangular(m, B, strict, upper):
    W, c, g = gaussian(m, B)
    W.diagonal().clamp_(-0.5, 0.5)
    T = (torch.triu if upper else torch.tril)(W, diagonal=(1 if upper else -1) * int(strict))
    s = torch.rand(B, m, generator=torch.Generator().manual_seed(0))
    u, residual = triangular.substitute(W, g, None, mask=s, strict=strict, upper=upper)
    plain = roots.substitute_masked(T, s, g, upper=upper)
    exact = roots.substitute_masked(T.double(), s.double(), g.double(), upper=upper)
    assert_as_accurate(u, plain, exact)
    assert (residual < 1e-6).all()
    if not upper:
        z, residual = triangular.substitute(W, c, "tanh", strict=strict)
        assert_as_accurate(z, roots.substitute(T, c, "tanh"), roots.substitute(T.double(), c.double(), "tanh"))
        assert (residual < 1e-6).all()


@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered")
@pytest.mark.parametrize("activation", ["tanh", "gelu", "softplus"])
def test_residuals_of_a_triangle_far_from_one(activation):
    """Of a saturated tanh they were 0 beside any large c, whatever z was, and of gelu NaN from 1e30 on."""
    W, c, _ = gaussian(40, 6)
    W = torch.tril(0.5 * W)
    c *= torch.tensor([1e10, 1e25, 1e32, 1e34, 1e36, 1e-34]).unsqueeze(-1)
    z, residual = triangular.substitute(W, c, activation)
    exact = relative_residual(ACTIVATIONS[activation].value(z.double() @ W.double().mT + c.double()), z.double())
    assert (residual <= 1e-6).all() and (exact <= 1e-6).all()
    if activation == "tanh":  # a value whose last bit shows, alone and beside one that is saturated
        W, c = torch.diag(torch.tensor([0.0, -0.7])), torch.tensor([[1e25, 0.33]])
        alone = triangular.substitute(W[1:, 1:].contiguous(), c[:, 1:].contiguous(), activation)[1]
        assert triangular.substitute(W, c, activation)[1] > 0.1 * alone > 0


def test_places_in_a_large_triangle(monkeypatch):
    """From 8 GB on they take 64 bits."""
    generator = torch.Generator().manual_seed(3)
    W, c = (0.1 * torch.randn(n, 40, generator=generator) for n in (40, 3))
    narrow = [triangular.substitute(W, c, "tanh", upper=upper)[0] for upper in (False, True)]
    monkeypatch.setattr(triangular, "WIDE_FROM", 0)
    for upper in (False, True):
        assert torch.equal(triangular.substitute(W, c, "tanh", upper=upper)[0], narrow[upper])
    monkeypatch.undo()
    launched = []
    launch = lambda *_, **options: launched.append(options["WIDE"])  # noqa: E731
    monkeypatch.setattr(triangular, "substitute_kernel", defaultdict(lambda: launch))
    for m, stride in ((46_340, 46_340), (46_341, 46_341), (3000, 1 << 20)):
        W = torch.empty_strided((m, m), (stride, 1), device="meta")
        triangular.substitute(W.mT, torch.empty(2, m, device="meta"), "tanh")
    assert launched == [False, True, True]


@pytest.fixture
def as_on_gpu(monkeypatch):
    """Nothing of a sample may be read before the solution is asked; ``as_on_gpu()`` begins that."""
    monkeypatch.setattr(methods, "is_deferred", lambda like: True)
    monkeypatch.setattr(cache, "remembered", cache.by_version)

    def refuse(self, *_):
        raise AssertionError("this would wait for the device")

    @contextlib.contextmanager
    def nothing_is_read():
        with monkeypatch.context() as patch:
            for name in ("__bool__", "__int__", "__float__", "item", "tolist", "nonzero"):
                patch.setattr(torch.Tensor, name, refuse)
            yield

    return nothing_is_read


@pytest.mark.parametrize("inverts", [True, False])
def test_linear_without_waiting(inverts, as_on_gpu):
    W, c, g = gaussian(12, 12 if inverts else 1)
    found = []
    for dtype in (torch.float32, torch.float64):
        weight, injection = (t.clone().to(dtype).requires_grad_() for t in (W, c))
        with as_on_gpu():
            solution = deq.solve(weight, injection, "identity", solver="direct")
            solution.z.backward(g.to(dtype))
        assert solution.converged.all() and solution.plan.map == "direct"
        found.append((solution.z.detach(), injection.grad, weight.grad))
    eye = torch.eye(12)
    plain = torch.linalg.solve(eye - W, c.mT).mT, torch.linalg.solve((eye - W).mT, g.mT).mT
    for ours, theirs, exact in zip(found[0], (*plain, plain[1].mT @ plain[0]), found[1], strict=True):
        assert_as_accurate(ours, theirs, exact)


def test_linear_failures_surface_when_the_status_is_read(as_on_gpu):
    W, c, _ = gaussian(6, 6)
    with as_on_gpu():
        singular = deq.solve(torch.eye(6), c, "identity", solver="direct")
    with pytest.warns(deq.ConvergenceWarning, match="6 of 6 samples did not converge"):
        singular.status  # noqa: B018
    assert singular.z.isfinite().all()
    c[4, 1] = float("inf")
    with as_on_gpu():
        wrong = deq.solve(W, c, "identity", solver="direct")
    with pytest.raises(ValueError, match=r"c must be finite; c\[4\]"):
        wrong.status  # noqa: B018


def test_in_a_capture_not_even_the_weight_is_read(as_on_gpu, monkeypatch):
    """Of a new one, or one that a captured training step changes, the bounds are not known."""
    W = gaussian(7, 3)[0]
    monkeypatch.setattr(methods, "is_captured", lambda like: True)
    with as_on_gpu():
        for weight in (methods.Triangular(W, False), methods.Triangular(W, True), methods.Diagonal(W[0])):
            assert weight.why_not("tanh") is None


@pytest.mark.parametrize("structure", [deq.weights.LowerTriangular, deq.weights.Diagonal])
def test_structured_weights_without_looking_at_samples(structure, as_on_gpu, monkeypatch):
    """The weight's bounds are read once; afterwards nothing is, forward and backward, with torch's own operations."""
    W, c, g = gaussian(9, 2)
    W.diagonal().clamp_(-0.5, 0.5)
    weight, c = structure(W if structure is deq.weights.LowerTriangular else W.diagonal().clone()), c.requires_grad_()
    monkeypatch.setattr(methods, "has_kernels", lambda like: True)
    expected = deq.solve(weight, c, "tanh", backend="reference").z
    solution = deq.solve(weight, c, "tanh", solver="direct")
    assert solution.converged.all()
    torch.testing.assert_close(solution.z, expected, rtol=1e-4, atol=1e-5)
    solution.z.backward(g)
    assert c.grad.isfinite().all()


def test_structured_weights_are_solved_by_the_kernels(monkeypatch):
    """As on a GPU: forward and gradient through deq.solve."""
    monkeypatch.setattr(methods, "has_kernels", lambda like: like.dtype == torch.float32)
    W, c, g = gaussian(9, 2)
    W.diagonal().clamp_(-0.5, 0.5)
    for structure in (deq.weights.LowerTriangular, lambda W: deq.weights.Diagonal(W.diagonal().clone())):
        found = []
        for dtype in (torch.float32, torch.float64):
            weight, injection = (t.clone().to(dtype).requires_grad_() for t in (W, c))
            z = deq.solve(structure(weight), injection, "silu", solver="direct").z
            z.backward(g.to(dtype))
            found.append((z.detach(), injection.grad, weight.grad))
        for ours, exact in zip(*found, strict=True):
            torch.testing.assert_close(ours, exact.float())
