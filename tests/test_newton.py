"""Newton's method as the last rung, and the direct adjoint, against plain PyTorch and closed forms."""

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from close import assert_as_accurate, worst_error
from problems import exact, gaussian, torch_adjoint, torch_loop
from test_cayley import monotone_problem

import deq
from deq import reference
from deq.activations import ACTIVATIONS
from deq.solution import Status
from deq.solvers import newton as newton_module
from deq.solvers.newton import masked_solve, newton

TIGHT = {torch.float32: 1e-6, torch.float64: 1e-13}


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", TIGHT)
def test_as_accurate_as_a_torch_loop(activation, dtype):
    W, c, _ = gaussian(37, 11, dtype, scale=0.8)
    z, iterations, residual, status = newton(W, c, None, activation, TIGHT[dtype])
    assert z.dtype == residual.dtype == dtype and iterations.dtype == torch.int32 and status.dtype == torch.uint8
    assert (status == Status.CONVERGED).all() and (iterations <= 12).all()
    assert_as_accurate(z, torch_loop(W, c, activation, tol=TIGHT[dtype]), exact(W, c, activation))


@pytest.mark.parametrize(("m", "n"), [(1, 3), (2, 0), (1, 0), (33, 1), (300, 5)])
def test_shapes_and_strides(m, n):
    W, c, g = gaussian(m, n, torch.float64)
    wide = torch.zeros(n, 2 * m, dtype=torch.float64)
    wide[:, ::2] = c
    z, *_, status = newton(W.mT.contiguous().mT, wide[:, ::2], g, "relu", 1e-12)
    assert z.shape == (n, m) and (status == Status.CONVERGED).all()
    assert_as_accurate(z, torch_loop(W, c, tol=1e-12), exact(W, c))


def test_memory_is_bounded_by_chunks(monkeypatch):
    W, c, g = gaussian(40, 23, torch.float64)
    d = reference.derivative(W, c, exact(W, c), "tanh")
    whole, direct = newton(W, c, None, "tanh", 1e-12), masked_solve(W, d, g, 1e-12)
    monkeypatch.setattr(newton_module, "JACOBIAN_BYTES", 5 * 16 * 40 * 40 + 1)
    assert [s.stop - s.start for s in newton_module._chunks(23, 40)] == [5, 5, 5, 5, 3]
    assert len(newton_module._chunks(3, 10000)) == 3  # one sample at least
    for before, after in ((whole, newton(W, c, None, "tanh", 1e-12)), (direct, masked_solve(W, d, g, 1e-12))):
        assert_as_accurate(after[0], before[0], before[0])
        assert torch.equal(after[3], before[3])


@pytest.mark.parametrize("activation", ["gelu", "silu"])
def test_narrow_places(activation):
    """Where z = act(0.97 z + c) nearly has a root the residual is small, and rises for long on the way to the root."""
    W, c = torch.tensor([[0.97]]), torch.linspace(0.15, 0.24, 64).unsqueeze(-1)
    for start in (None, torch.full_like(c, 0.7)):
        *_, iterations, _, status = newton(W, c, start, activation, 1e-5)
        assert (status == Status.CONVERGED).sum() >= 62 and iterations.float().mean() <= 25


@pytest.mark.parametrize(("activation", "w"), [("softplus", 1.0), ("relu", 1.0), ("elu", 1.0)])
def test_an_equilibrium_at_infinity_is_none(activation, w):
    """``z = act(z + 1)`` has no solution; only very far away would its residual, relative to z, be small."""
    z, _, residual, status = newton(w * torch.eye(10), torch.ones(3, 10), None, activation, 1e-5)
    assert (status == Status.MAX_ITER).all() and (residual > 1e-4).all() and torch.isfinite(z).all()


@pytest.mark.parametrize("mu", [0.1, 1.0])
@pytest.mark.parametrize("activation", ["relu", "tanh", "softplus"])
def test_monotone_weights(mu, activation):
    W, c, _ = monotone_problem(64, mu)
    z, iterations, residual, status = newton(W, c, None, activation, 1e-12)
    assert (status == Status.CONVERGED).all() and (residual <= 1e-12).all() and (iterations <= 15).all()
    assert worst_error(reference.cell(W, c, z, activation), z) <= 1e-12


def test_solves_what_the_iterations_do_not():
    """Spectral radius 1.4: eight of these samples end no Anderson iteration, and seven no plain one."""
    W, c, _ = gaussian(200, 24, torch.float64, scale=1.4)
    best, _, _, status = reference.solve(W, c, "relu", tol=1e-6, max_iter=300, acceleration="anderson")
    stuck = status != Status.CONVERGED
    *_, plain = reference.solve(W, c[stuck], "relu", tol=1e-6, max_iter=300)
    assert stuck.sum() >= 5 and (plain != Status.CONVERGED).sum() >= 5
    for start in (None, best[stuck]):
        z, iterations, residual, status = newton(W, c[stuck], start, "relu", 1e-6)
        assert (status == Status.CONVERGED).all() and (iterations <= 60).all() and (residual <= 1e-6).all()
        assert worst_error(reference.cell(W, c[stuck], z, "relu"), z) <= 1e-6


@pytest.mark.parametrize("dtype", TIGHT)
def test_no_equilibrium_is_not_invented(dtype):
    W, c = torch.tensor([[2.0]], dtype=dtype), torch.tensor([[1.0], [-1.0]], dtype=dtype)  # z = relu(2 z + 1) has none
    z, iterations, residual, status = newton(W, c, None, "relu", 1e-5, max_iter=20)
    assert torch.isfinite(z).all() and status.tolist() == [Status.MAX_ITER, Status.CONVERGED]
    assert iterations.tolist() == [20, 0] and residual[0] > 0.4 and residual[1] == 0 and z[1] == 0
    one = torch.ones(1, 1, dtype=dtype)  # z = z + 1: the Jacobian is singular
    z, _, residual, status = newton(one, one, None, "relu", 1e-5)
    assert torch.isfinite(z).all() and status.item() == Status.MAX_ITER and residual > 0


def test_the_best_iterate_is_returned():
    W, c, _ = gaussian(24, 16, torch.float64, seed=2, scale=1.35)
    stuck = newton(W, c, None, "relu", 1e-10)[3] != Status.CONVERGED
    assert stuck.any()  # most of these have no equilibrium
    start = reference.solve(W, c[stuck], "relu", tol=1e-10, max_iter=100)[0]
    image = reference.cell(W, c[stuck], start, "relu")
    at_start = (image - start).norm(dim=-1) / image.norm(dim=-1)
    assert (newton(W, c[stuck], start, "relu", 1e-10, max_iter=7)[2] <= at_start).all()
    *_, residual, status = newton(W, c[stuck], start, "relu", 1e-10, max_iter=0)
    torch.testing.assert_close(residual, at_start.clamp(max=1.0))
    assert (status == Status.MAX_ITER).all()


@hypothesis.given(
    seed=st.integers(0, 10**6),
    m=st.integers(1, 6),
    size=st.sampled_from([1e-30, 1.0, 3.0, 1e4, 1e30]),
    injection=st.sampled_from([0.0, 1e-30, 1.0, 1e30]),
    activation=st.sampled_from(sorted(ACTIVATIONS)),
    dtype=st.sampled_from(sorted(TIGHT, key=str)),
)
@hypothesis.settings(max_examples=50, deadline=None)
def test_never_nan(seed, m, size, injection, activation, dtype):
    W, c, g = gaussian(m, 4, dtype, seed=seed, scale=size)
    c = injection * c
    for start in (None, g):
        z, _, residual, status = newton(W, c, start, activation, 1e-5, max_iter=12)
        assert torch.isfinite(z).all() and torch.isfinite(residual).all()
        assert torch.equal(status == Status.CONVERGED, residual <= 1e-5)
    u, _, residual, status = masked_solve(W, torch.rand(4, m).to(dtype), injection * g, 1e-5)
    assert torch.isfinite(u).all() and torch.isfinite(residual).all()
    assert torch.equal(status == Status.CONVERGED, residual <= 1e-5)


# ---- the direct adjoint


@pytest.mark.parametrize("activation", ["relu", "tanh", "gelu"])
@pytest.mark.parametrize("dtype", TIGHT)
def test_adjoint_is_as_accurate_as_a_torch_loop(activation, dtype):
    W, c, g = gaussian(50, 9, dtype, scale=0.8)
    z = exact(W, c, activation)
    d = reference.derivative(W.double(), c.double(), z, activation).to(dtype)
    u, iterations, _, status = masked_solve(W.mT, d, g, TIGHT[dtype])
    assert (status == Status.CONVERGED).all() and (iterations == 1).all() and u.dtype == dtype
    plain = torch_adjoint(W, c, z.to(dtype), g, activation, tol=TIGHT[dtype])
    assert_as_accurate(u, plain, reference.implicit_gradient(W.double(), c.double(), z, g.double(), activation)[1])


def test_adjoint_that_no_iteration_solves():
    W, c, g = monotone_problem(64, 0.1)
    z = newton(W, c, None, "relu", 1e-13)[0]
    u, _, residual, status = masked_solve(W.mT, reference.derivative(W, c, z, "relu"), g, 1e-12)
    assert (status == Status.CONVERGED).all() and (residual <= 1e-12).all()
    d = reference.derivative(W, c, z, "relu")
    again = masked_solve(W.mT.float(), d.float(), g.float(), 1e-5)[0]
    system = torch.eye(64) - (d.unsqueeze(-1) * W.mT).float()
    assert_as_accurate(again, torch.linalg.solve(system, (d * g).float()), u)
    torch.testing.assert_close(u, reference.implicit_gradient(W, c, z, g, "relu")[1])


@pytest.mark.parametrize("dtype", TIGHT)
def test_singular_adjoints(dtype):
    """``u = d (u + g)``: no solution for d = g = 1, one for d = 1/2, all u for d = 1 and g = 0."""
    d = torch.tensor([[1.0], [0.5], [1.0]], dtype=dtype)
    g = torch.tensor([[1.0], [1.0], [0.0]], dtype=dtype)
    u, _, residual, status = masked_solve(torch.ones(1, 1, dtype=dtype), d, g, 1e-5)
    assert status.tolist() == [Status.STALLED, Status.CONVERGED, Status.CONVERGED]
    assert u[1:, 0].tolist() == [1.0, 0.0] and residual[0] > 0.1 and torch.isfinite(u).all()
    A = torch.tensor(
        [[1.0, 0.0], [0.0, 0.5]], dtype=dtype
    )  # consistent and singular: (0, u_2) is the shortest solution
    u, _, _, status = masked_solve(A, torch.ones(1, 2, dtype=dtype), torch.tensor([[0.0, 1.0]], dtype=dtype), 1e-5)
    assert status.item() == Status.CONVERGED and u.tolist() == [[0.0, 2.0]]


def test_an_adjoint_system_that_overflows_fails_alone():
    """gelu's slope of up to 1.13 takes a finite element of W out of the range of float64."""
    A = torch.full((3, 3), 1.7e308, dtype=torch.float64)
    d = torch.tensor([[1.1] * 3, [0.0] * 3], dtype=torch.float64)
    u, _, residual, status = masked_solve(A, d, torch.ones_like(d), 1e-12)
    assert torch.equal(u, d) and residual.tolist() == [1.0, 0.0]
    assert status.tolist() == [Status.STALLED, Status.CONVERGED]


def test_many_large_systems_after_the_thread_count_was_set():
    """torch's batched LU fails there (torch 2.13 with MKL, m >= 200)."""
    W, c, _ = gaussian(210, 6, torch.float64, scale=0.9)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
        z, *_, status = newton(W, c, None, "relu", 1e-10)
    finally:
        torch.set_num_threads(before)
    assert (status == Status.CONVERGED).all()
    assert worst_error(reference.cell(W, c, z, "relu"), z) <= 1e-9


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_an_equilibrium_out_of_range_is_not_called_solved(backend):
    """The norm of what overflows is infinite, and no step is small beside that."""
    for size in (3e36, 5e37):
        W, c = torch.full((200, 200), 0.9 / 200), torch.full((1, 200), size)
        solution = deq.solve(W, c, on_failure="ignore", backend=backend)
        assert solution.z.isfinite().all()
        if solution.converged.all():
            torch.testing.assert_close(solution.z, 10 * c, rtol=1e-3, atol=0)
