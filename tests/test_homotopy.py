"""The curve from act(c) to an equilibrium of a bounded activation, and its place on the ladder."""

import pytest
import torch
from close import worst_error

import deq
from deq import _library, reference
from deq.backends import get_backend
from deq.solution import Status
from deq.solvers import equations
from deq.solvers.homotopy import follow

BACKENDS = ["reference"] + (["cpu"] if _library.compiled is not None else [])
backends = pytest.mark.parametrize("backend", BACKENDS)


def chaotic(m: int, n: int, norm: float, dtype=torch.float32, seed: int = 1):
    """W of so large a norm that hardly an equilibrium attracts anything, and c (n, m)."""
    generator = torch.Generator().manual_seed(seed)
    W, c = (torch.randn(rows, m, generator=generator, dtype=torch.float64) for rows in (m, n))
    return (W / torch.linalg.matrix_norm(W, 2) * norm).to(dtype), c.to(dtype)


def orthogonal(m: int, n: int, norm: float, dtype=torch.float32):
    W, c = chaotic(m, n, 1.0, torch.float64)
    return (torch.linalg.qr(W)[0] * norm).to(dtype), c.to(dtype)


@backends
@pytest.mark.parametrize(
    ("activation", "make", "m", "norm"),
    [("tanh", chaotic, 48, 8.0), ("tanh", orthogonal, 48, 2.0), ("sigmoid", orthogonal, 48, 20.0)],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_every_sample_is_led_to_an_equilibrium(activation, make, m, norm, dtype, backend):
    W, c = make(m, 6, norm, dtype)
    tol = 1e-5 if dtype == torch.float32 else 1e-11
    z, systems, residual, status = follow(W, c, activation, tol, 2000, get_backend(backend))
    assert z.dtype == residual.dtype == dtype and systems.dtype == torch.int32 and status.dtype == torch.uint8
    assert (status == Status.CONVERGED).all() and (residual <= tol).all() and (systems > 10).all()
    f = reference.cell(W.double(), c.double(), z.double(), activation)
    assert worst_error(f, z.double()) <= tol * (1 + norm)  # z is the image of the point judged


@backends
@pytest.mark.parametrize("m", [1, 2, 17])
def test_where_there_is_one_equilibrium_it_is_that(m, backend):
    W, c = chaotic(m, 5, 0.9, torch.float64)
    z, *_, status = follow(W, c, "tanh", 1e-10, 500, get_backend(backend))
    assert (status == Status.CONVERGED).all()
    root = torch.zeros_like(c)
    for _ in range(2000):
        root = reference.cell(W, c, root, "tanh")
    torch.testing.assert_close(z, root, rtol=1e-9, atol=1e-9)


def test_what_it_may_take_is_bounded_and_said():
    W, c = chaotic(48, 4, 8.0)
    z, systems, residual, status = follow(W, c, "tanh", 1e-5, 20)
    assert (systems <= 20 + 5).all() and (status == Status.MAX_ITER).all() and (residual > 1e-5).all()
    assert z.isfinite().all() and (residual <= 1).all()
    first, second, *others = follow(W, c, "tanh", 1e-5, 1000, together=1)[1].tolist()
    assert first > 20 and second == others[0] == 0
    empty = follow(W, c[:0], "tanh", 1e-5, 20)
    assert [tuple(t.shape) for t in empty] == [(0, 48), (0,), (0,), (0,)] and empty[0].dtype == torch.float32
    W[0, 0] = 3e38
    z, systems, residual, status = follow(W, c, "tanh", 1e-5, 50)
    assert z.isfinite().all() and (status <= Status.MAX_ITER).all()


@pytest.mark.skipif(_library.compiled is None, reason=f"a minute in plain PyTorch: {_library.reason}")
def test_it_is_the_last_rung(monkeypatch):
    """What all other means leave is solved, with exact gradients; more samples than it may take on are left."""
    W, c = chaotic(64, 12, 8.0)
    with monkeypatch.context() as without:
        without.setattr(equations, "HOMOTOPY_FLOPS", 0.0)
        with pytest.warns(deq.ConvergenceWarning):
            left = ~deq.solve(W, c, "tanh", max_iter=5000).converged
    assert left.sum() >= 4
    W, c = W.requires_grad_(), c.requires_grad_()
    solution = deq.solve(W, c, "tanh", max_iter=5000, on_failure="raise")
    assert "homotopy" in solution.plan.explain()
    g = torch.randn(solution.z.shape, generator=torch.Generator().manual_seed(2))
    dW, dc = torch.autograd.grad(solution.z, (W, c), g)
    z = solution.detach().z.double()
    true_dW, true_dc = reference.implicit_gradient(W.detach().double(), c.detach().double(), z, g.double(), "tanh")
    assert worst_error(dc, true_dc) < 1e-3 and (dW - true_dW).norm() < 1e-3 * true_dW.norm()


@pytest.mark.skipif(_library.compiled is None, reason=f"a minute in plain PyTorch: {_library.reason}")
def test_batch_mates_do_not_matter():
    W, c = chaotic(64, 10, 8.0)
    together = deq.solve(W, c, "tanh", max_iter=5000)
    for i in range(0, 10, 3):
        alone = deq.solve(W, c[i], "tanh", max_iter=5000)
        assert torch.equal(alone.z, together.z[i]) and alone.iterations == together.iterations[i]
