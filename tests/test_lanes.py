"""The lane engine (csrc/cpu/lanes.cpp), for widths up to three vectors, 48 at most: the row engine's answers."""

import pytest
import torch
from close import assert_as_accurate
from problems import exact, gaussian, torch_adjoint, torch_loop

import deq
from deq import Status, _library, stats
from deq.backends import cpu
from deq.plan import make_plan
from deq.profiling.counter import Work

pytestmark = pytest.mark.skipif(_library.compiled is None, reason="no compiled library is loaded")

WIDEST = 48


def outlier(m: int, B: int, dtype=torch.float32, r: float = 0.95):
    """A slow mode that relu leaves whole, so that samples are accelerated; injections of many sizes of that mode."""
    W, c, g = gaussian(m, B, torch.float64, seed=m)
    u = torch.linspace(0.5, 1.5, m, dtype=torch.float64)
    u /= u.norm()
    W = W + torch.outer(r * u - W @ u, u)
    c = c + 2.0 * torch.arange(B, dtype=torch.float64)[:, None] / B
    return W.to(dtype), c.to(dtype), g.to(dtype)


@pytest.mark.parametrize(("m", "B"), [(1, 5), (7, 1), (16, 16), (23, 17), (33, 40), (WIDEST, 35)])
@pytest.mark.parametrize("activation", ["relu", "tanh", "gelu"])
def test_forward_and_adjoint_are_as_accurate_as_a_torch_loop(m, B, activation, isa):
    for dtype in (torch.float32, torch.float64):
        W, c, g = gaussian(m, B, dtype, seed=m, scale=0.3)
        W.requires_grad_(), c.requires_grad_()
        solution = deq.solve(W, c, activation, backend="cpu", solver="plain")
        (u,) = torch.autograd.grad(solution.z, c, g)
        W, c, tol = W.detach(), c.detach(), solution.plan.tol
        z = exact(W, c, activation)
        plain = torch_loop(W, c, activation, tol=tol)
        assert solution.converged.all()
        assert_as_accurate(solution.z.detach(), plain, z)
        if activation != "relu":  # whose mask an error of the tolerance may flip
            exact_u = torch_adjoint(W.double(), c.double(), z, g.double(), activation, tol=4e-15)
            assert_as_accurate(u, torch_adjoint(W, c, plain, g, activation, tol=tol), exact_u)


@pytest.mark.parametrize("m", [5, 16, 40])
@pytest.mark.parametrize("activation", ["relu", "softplus"])
def test_the_row_engine_takes_the_same_steps(m, activation, isa):
    """A weight beyond the lanes' width whose other rows and columns are zero: every iterate has the same bits."""
    W, c, _ = gaussian(m, 37, seed=m)
    wide_W, wide_c = torch.zeros(WIDEST + 1, WIDEST + 1), torch.zeros(37, WIDEST + 1)
    wide_W[:m, :m], wide_c[:, :m] = W, c
    options = {"backend": "cpu", "solver": "plain", "tol": 1e-30, "on_failure": "ignore", "max_iter": 9}
    lanes, rows = deq.solve(W, c, activation, **options), deq.solve(wide_W, wide_c, activation, **options)
    assert torch.equal(lanes.iterations, rows.iterations) and lanes.iterations.max() == 9
    assert torch.equal(lanes.z, rows.z[:, :m])


def _alone(W, c, g, **options):
    """z, the gradient of c, iterations and status, solved together, one by one, and in another order."""

    def run(rows):
        b = c[rows].clone().requires_grad_()
        solution = deq.solve(W, b, backend="cpu", on_failure="ignore", max_iter=300, **options)
        (u,) = torch.autograd.grad(solution.z, b, g[rows])
        return solution.z.detach(), u, solution.iterations, solution.residual, solution.status

    together = run(slice(None))
    one_by_one = [torch.cat(parts) for parts in zip(*(run(slice(i, i + 1)) for i in range(len(c))), strict=True)]
    order = torch.randperm(len(c), generator=torch.Generator().manual_seed(0))
    return together, one_by_one, run(order), order


@pytest.mark.parametrize("m", [9, 32, WIDEST])  # from 24 on the last samples of a group are multiplied row by row
@pytest.mark.parametrize("solver", ["plain", "anderson", "auto"])
def test_a_sample_does_not_know_its_batch_mates(m, solver, isa):
    W, c, g = outlier(m, 37)
    c[3], c[20] = 0.0, 1e30 * c[20]
    together, one_by_one, shuffled, order = _alone(W, c, g, solver=solver)
    for batch, single, permuted in zip(together, one_by_one, shuffled, strict=True):
        assert torch.equal(batch, single)
        assert torch.equal(batch[order], permuted)


def _layouts(t: torch.Tensor) -> dict[str, torch.Tensor]:
    """The same numbers in other strides."""
    wide = torch.zeros(*t.shape[:-1], 2 * t.shape[-1], dtype=t.dtype)
    wide[..., ::2] = t
    longer = torch.zeros(t.shape[0], t.shape[1] + 3, t.shape[2], dtype=t.dtype)
    longer[:, 2:-1] = t
    return {"side by side": t.mT.contiguous().mT, "every other": wide[..., ::2], "part of a batch": longer[:, 2:-1]}


@pytest.mark.parametrize(("m", "B"), [(1, 3), (5, 16), (20, 37), (33, 18)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_a_block_of_samples_is_read_in_any_layout(m, B, dtype, isa):
    problems = [gaussian(m, B, torch.float32, seed=s, scale=0.4) for s in range(3)]
    W, c, g = (torch.stack(part).to(dtype) for part in zip(*problems, strict=True))
    start = 0.1 * c.flip(1)

    def run(c, g, start):
        c = c.detach().requires_grad_()
        z = deq.solve(W, c, z0=start, backend="cpu").z
        return z.detach(), torch.autograd.grad(z, c, g)[0]

    expected = run(c, g, start)
    others = zip(*(_layouts(t).values() for t in (c, g, start)), strict=True)
    for layout in others:
        assert all(torch.equal(a, b) for a, b in zip(run(*layout), expected, strict=True))
    same = run(c[:, :1].expand_as(c), g[:, :1].expand_as(g), start[:, :1].expand_as(start))
    assert all(
        torch.equal(t, t[:, :1].expand_as(t)) and torch.equal(t[:, :1], e[:, :1])
        for t, e in zip(same, expected, strict=True)
    )


@pytest.mark.parametrize("m", [12, 40])  # 12 is served by lanes of any vector
def test_elements_that_are_zero_in_every_lane_change_nothing(m, isa):
    """Samples in order share their zeros, which sweeps leave out; among others in random order they do not."""
    W, c, g = gaussian(m, 300, seed=m, scale=0.5)
    c = c[:1] + torch.linspace(-1, 1, 300)[:, None] * c[1:2]
    order = torch.randperm(300, generator=torch.Generator().manual_seed(1))

    def run(rows):
        b = c[rows].clone().requires_grad_()
        solution = deq.solve(W, b, backend="cpu")
        forward = Work.last().native_products
        (u,) = torch.autograd.grad(solution.z, b, g[rows])
        products = torch.tensor([forward, Work.last().native_products])
        return products, (solution.z.detach(), u, solution.iterations, solution.residual)

    fewer, in_order = run(torch.arange(300))
    more, shuffled = run(order)
    assert (fewer < 0.9 * more).all() or m > 12
    for a, b in zip(in_order, shuffled, strict=True):
        assert torch.equal(a[order], b)


@pytest.mark.parametrize("threads", [1, 2])
def test_acceleration_saves_most_of_the_iterations_at_a_slow_mode(threads, isa):
    W, c, _ = outlier(40, 50)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        plain = deq.solve(W, c, solver="plain", backend="cpu")
        solution = deq.solve(W, c, backend="cpu")
    finally:
        torch.set_num_threads(before)
    assert plain.converged.all() and solution.converged.all()
    assert solution.iterations.double().mean() < 0.5 * plain.iterations.double().mean()
    assert_as_accurate(solution.z, torch_loop(W, c), exact(W, c))


def test_a_sample_that_fails_returns_its_best_iterate(isa):
    """Half of the samples excite a mode that grows; those that do not must not notice."""
    m = 20
    W, c, _ = gaussian(m, 24, scale=0.2)
    W[0], W[:, 0] = 0.0, 0.0
    W[0, 0] = 1.5
    c[:, 0] = -1.0
    fine = deq.solve(W, c, solver="plain", backend="cpu")
    assert fine.converged.all()
    c[::2, 0] = 1.0
    mixed = deq.solve(W, c, solver="plain", backend="cpu", on_failure="ignore")
    assert (mixed.status[::2] == Status.DIVERGED).all() and (mixed.status[1::2] == Status.CONVERGED).all()
    assert torch.equal(mixed.z[1::2], fine.z[1::2])
    assert mixed.z.isfinite().all()
    residual = (torch.relu(mixed.z @ W.mT + c) - mixed.z).norm(dim=1)
    assert (mixed.residual[::2] < 1).all() and residual.isfinite().all()


@pytest.mark.parametrize("activation", ["relu", "tanh"])
def test_the_reflected_map(activation, isa):
    """A monotone W on which the plain map diverges."""
    generator = torch.Generator().manual_seed(0)
    m, B = 30, 21
    A, S, c = (torch.randn(*size, m, generator=generator, dtype=torch.float64) for size in ((m,), (m,), (B,)))
    W = 0.5 * torch.eye(m, dtype=torch.float64) - A.mT @ A / m + (S - S.mT) / m**0.5
    solution = deq.solve(W.float(), c.float(), activation, solver="cayley", backend="cpu")
    assert solution.converged.all()
    act = torch.relu if activation == "relu" else torch.tanh
    f = act(solution.z.double() @ W.float().double().mT + c.float().double())
    residual = (f - solution.z.double()).norm(dim=1) / f.norm(dim=1)
    assert residual.max() <= solution.plan.tol + 2 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("m", [12, 60, 300])  # lanes, rows
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_reflected_start_whose_evaluation_overflows(m, dtype, isa):
    """It is handed out as the pre-activation that it comes close to, and not what another sample has left there."""
    plan = make_plan(dtype=dtype, device="cpu", solver="plain", backend="cpu", compiled=True, max_iter=3)
    K, c, _ = gaussian(m, 40, getattr(torch, dtype))
    K[0] = 3.0
    start = c.flip(0)
    start[[3, 39]] = torch.finfo(c.dtype).max * c[[3, 39]].sign()
    outcome = cpu.solve(K, c, start, "tanh", plan, reflected=True)
    assert (stats.status(outcome.z, outcome.stats)[[3, 39]] == Status.DIVERGED).all()
    torch.testing.assert_close(outcome.z[[3, 39]], start[[3, 39]].tanh())
