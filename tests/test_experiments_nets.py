"""Nets of many seeds and their trainer."""

import math
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deq import reference
from deq.bench import seeds, steep
from deq.experiments import _nets as nets
from deq.experiments._affine import affine
from deq.experiments._dense_nets import DenseDEQ, TiedNet
from deq.experiments._equilibria import evidence
from deq.experiments._filter_nets import FilterDEQ
from deq.experiments._fit import fit
from deq.experiments._judge import kind_of
from deq.experiments._lineup import feedforward, width_for_flops
from deq.experiments._nets import DiagonalDEQ, FeedForward, TriangularDEQ, feedforward_count, matching_width
from deq.experiments._result import EQUILIBRIUM, FINITE_DEPTH
from deq.experiments._sawtooth import widest
from deq.experiments._steep_trained import sample
from deq.experiments._train import cosine, square, train

F64 = torch.float64
few = settings(max_examples=40, deadline=None)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("kind", [DiagonalDEQ, TriangularDEQ])
def test_equilibrium_nets_match_the_reference(kind):
    net = kind(3, 4, 6, generator())
    x = torch.rand(3, 10, 4, dtype=F64, generator=generator(1))
    with torch.no_grad():
        c = net.injection(x)
        z, _, residual, _ = reference.solve(net.weight(), c, "relu", tol=1e-14, max_iter=20000)
        assert residual.max() <= 1e-14
        torch.testing.assert_close(net.closed_form(c), z, rtol=1e-11, atol=1e-12)
        torch.testing.assert_close(net.equilibrium(c), z, rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(net(x), (z @ net.a).squeeze(-1) + net.y0.squeeze(-1), rtol=1e-9, atol=1e-9)
    free = sum(p[0].numel() for p in net.parameters) - (6 * 7 // 2 if kind is TriangularDEQ else 0)
    assert net.count == free
    W, U, a = net.norms().unbind(1)
    torch.testing.assert_close(W, net.weight().abs().sum(-1).amax(-1).detach())
    torch.testing.assert_close(U, net.U.abs().sum(1).amax(-1).detach())
    torch.testing.assert_close(a, net.a.abs().sum((1, 2)).detach())


@pytest.mark.parametrize("compiled", [True, False])
def test_triangular_gradient_is_that_of_forward_substitution(monkeypatch, compiled):
    """With and without the compiled engine: True forces the solve, through whichever backend is here."""
    monkeypatch.setattr(nets, "engine_is_compiled", lambda device: compiled)
    net = TriangularDEQ(2, 3, 5, generator())
    x = torch.rand(2, 7, 3, dtype=F64, generator=generator(1))
    net(x).square().sum().backward()
    by_engine = [p.grad.clone() for p in net.parameters]
    for p in net.parameters:
        p.grad = None
    W, c, z = net.weight(), net.injection(x), []
    for t in range(5):
        fed = sum((W[:, t, i, None] * z[i] for i in range(t)), torch.zeros(2, 7, dtype=F64))
        z.append(torch.relu(c[..., t] + fed))
    net.readout(torch.stack(z, -1)).square().sum().backward()
    for p, grad in zip(net.parameters, by_engine, strict=True):
        torch.testing.assert_close(grad, p.grad, rtol=1e-9, atol=1e-10)


@few
@given(inputs=st.integers(1, 12), width=st.integers(1, 30), depth=st.integers(2, 5))
def test_feed_forward_count_and_matching_width(inputs, width, depth):
    net = FeedForward(2, inputs, width, depth, generator())
    assert net.count == feedforward_count(inputs, width, depth) == sum(p[0].numel() for p in net.parameters)
    n = matching_width(inputs, depth, net.count)
    assert n == width


def test_rivals_of_any_width_are_found_at_once():
    for depth, parameters in ((2, 10**14), (3, 10**25)):
        n = matching_width(10, depth, parameters)
        assert feedforward_count(10, n - 1, depth) < parameters <= feedforward_count(10, n, depth)
        n = width_for_flops(depth, parameters)
        assert 2 * (feedforward_count(1, n, depth) - n * (depth - 1) - 1) >= parameters
    assert sum(widest(1, 10**14)) == (10**14 - 1) // 3


def test_feed_forward_is_lipschitz_with_the_product_of_its_norms():
    net = FeedForward(4, 3, 8, 3, generator())
    x = torch.rand(4, 50, 3, dtype=F64, generator=generator(1), requires_grad=True)
    (slope,) = torch.autograd.grad(net(x).sum(), x)
    assert (slope.abs().sum(-1).amax(-1) <= net.norms().prod(1)).all()


def test_training_lowers_the_loss_and_keeps_seeds_apart():
    def run(disturbed: bool) -> tuple[list, list]:
        net, data, seen = FeedForward(2, 2, 8, 3, generator()), generator(1), []
        if disturbed:
            with torch.no_grad():
                net.weights[0][1] *= 3
        errors = []

        def observe(step: int) -> None:
            seen.append(step)
            x, y = sample(2, 512, 2, generator(2))
            errors.append((net(x) - y).square().mean(1).tolist())

        log = train(net, lambda: sample(2, 64, 2, data), steps=60, checkpoints=(0, 30, 60), observe=observe)
        assert log.overflowed == {} and seen == [0, 30, 60]
        return errors, [p[0].detach().clone() for p in net.parameters]

    errors, parameters = run(disturbed=False)
    assert all(after < 0.5 * before for before, after in zip(errors[0], errors[-1], strict=True))
    other_errors, other_parameters = run(disturbed=True)
    assert other_errors[0][1] != errors[0][1]
    assert [e[0] for e in other_errors] == [e[0] for e in errors]
    assert all(torch.equal(a, b) for a, b in zip(parameters, other_parameters, strict=True))


def test_a_gradient_that_overflows_is_dropped_and_reported():
    net, data = FeedForward(2, 2, 4, 2, generator()), generator(1)
    step = iter(range(100))

    def batch():
        x, y = sample(2, 16, 2, data)
        y = y.expand(2, -1).clone()
        if next(step) == 3:
            y[1] = math.inf
        return x, y

    assert train(net, batch, steps=6).overflowed == {1: 3}
    assert all(p.isfinite().all() for p in net.parameters)


@pytest.mark.parametrize("kind", ["contractive", "monotone", "free"])
def test_dense_equilibria_and_their_gradients_match_the_reference(kind):
    net = DenseDEQ(3, 2, 7, generator(), kind)
    x = torch.rand(3, 11, 2, dtype=F64, generator=generator(1))
    output = net(x)
    assert not net.failed().any()
    W, c = net.weight(), net.injection(x)
    z, *_ = reference.solve(W.detach(), c.detach(), "relu", tol=1e-14, max_iter=20000)
    torch.testing.assert_close(output, net.readout(z), rtol=1e-8, atol=1e-9)
    output.square().sum().backward()
    by_engine = [p.grad.clone() for p in net.parameters]
    for p in net.parameters:
        p.grad = None
    W, z = net.weight(), torch.zeros_like(c)  # a long unrolled iteration, differentiated step by step
    c = net.injection(x)
    for _ in range(400):
        z = torch.relu(torch.baddbmm(c, z, W.mT))
    net.readout(z).square().sum().backward()
    for p, grad in zip(net.parameters, by_engine, strict=True):
        torch.testing.assert_close(grad, p.grad, rtol=1e-6, atol=1e-7)
    assert net.flops() > 2 * (7 * 3 + 49)


def test_monotone_and_contractive_weights_stay_in_their_class():
    for scale in (1.0, 30.0):
        net = DenseDEQ(4, 1, 9, generator(), "monotone")
        with torch.no_grad():
            net.A.mul_(scale), net.B.mul_(scale)
            W = net.weight()
        smallest = torch.linalg.eigvalsh(torch.eye(9, dtype=F64) - (W + W.mT) / 2)[:, 0]
        assert (smallest >= 0.05 - 1e-9).all()
        net = DenseDEQ(4, 1, 9, generator(), "contractive")
        with torch.no_grad():
            net.V.mul_(scale)
            assert (net.weight().abs().sum(2) <= 0.95 + 1e-12).all()


def test_a_net_that_loses_its_equilibrium_is_reported_and_left_out():
    """z = relu(2 z + x) has none for x > 0: those samples are named, and give no gradient."""
    net = DenseDEQ(2, 1, 1, generator(), "free", max_iter=50)
    with torch.no_grad():
        net.V.copy_(torch.tensor([0.5, 2.0]).view(2, 1, 1)), net.U.fill_(1), net.b.zero_()
    x = torch.tensor([-1.0, 1.0], dtype=F64).view(1, 2, 1).expand(2, -1, -1)
    log = train(net, lambda: (x, torch.ones(2, 2, dtype=F64)), steps=1)
    assert list(log.ill_posed) == [1] and log.ill_posed[1]["step"] == 0 and log.ill_posed[1]["steps"] == 1
    assert log.ill_posed[1]["status"].startswith("1 ")
    assert "ill-posed in 1 seed(s), first at step 0 (seed 1: 1 " in log.sentences("net")[0]
    assert net.U.grad[1] == 0 and net.U.grad[0] != 0


def test_tied_net_is_the_iteration_cut_off():
    net = TiedNet(2, 3, 5, generator(), 4)
    x = torch.rand(2, 6, 3, dtype=F64, generator=generator(1))
    z = torch.zeros(2, 6, 5, dtype=F64)
    for _ in range(4):
        before, z = z, reference.cell(net.V, net.injection(x), z, "relu")
    torch.testing.assert_close(net(x), net.readout(z))
    output, residual = net.solved(x, 0.0, 4)
    torch.testing.assert_close(output, net.readout(z))
    torch.testing.assert_close(residual, (z - before).norm(dim=-1) / z.norm(dim=-1))


def test_evidence_tells_an_equilibrium_from_a_cut_off_iteration():
    x = torch.rand(2, 6, 1, dtype=F64, generator=generator(1))

    def measure(net):
        return evidence(partial(net.solved, x), lambda y: y.square().mean(1), net(x).square().mean(1), 50)

    with torch.no_grad():
        true, cut = measure(DenseDEQ(2, 1, 5, generator(), "contractive")), measure(TiedNet(2, 1, 5, generator(), 2))
    assert kind_of(true) == EQUILIBRIUM and true["residual_again"] <= 1e-13
    assert kind_of(cut) == FINITE_DEPTH and cut["moved"] > 1e-3


@few
@given(width=st.integers(2, 30), steps=st.integers(2, 12))
def test_lineup_matches_parameters_flops_and_memory(width, steps):
    depth = 3
    deq = DenseDEQ(1, 1, width, generator(), "free")
    cut = TiedNet(1, 1, width, generator(), steps)
    nets = {name: make(1, generator()) for name, make in feedforward(width, depth, 4.0, steps).items()}
    params, flops, memory = nets.values()
    assert params.count >= deq.count == cut.count == width * width + 3 * width + 1
    assert flops.flops() >= cut.flops()
    assert memory.memory >= deq.memory == width
    assert memory.memory < width + depth


def test_all_seeds_at_once_are_each_seed_alone():
    """Training S nets side by side is training each: same start, same losses."""
    whole = DenseDEQ(3, 1, 6, generator(), "contractive")
    x = torch.linspace(0, 1, 16, dtype=F64).view(1, -1, 1)
    y = torch.sin(7 * x[..., 0])
    alone = []
    for seed in range(3):
        net = DenseDEQ(1, 1, 6, generator(9), "contractive")
        with torch.no_grad():
            for mine, theirs in zip(net.parameters, whole.parameters, strict=True):
                mine.copy_(theirs[seed : seed + 1])
        train(net, lambda: (x, y), steps=25)
        alone.append(float((net(x) - y).detach().square().mean()))
    train(whole, lambda: (x.expand(3, -1, -1), y.expand(3, -1)), steps=25)
    together = (whole(x.expand(3, -1, -1)) - y).square().mean(1).tolist()
    assert together == pytest.approx(alone, rel=1e-6)


def test_the_seeds_benchmark_compares_equal_training():
    case = seeds.Case(seeds=3, width=5, batch=16, steps=15)
    together, alone = seeds.train_together(case), seeds.train_one_by_one(case)
    torch.testing.assert_close(together, alone, rtol=1e-3, atol=1e-5)
    row = seeds.measure(case, 1, rounds=1)
    assert row["difference"] < 1e-3 and row["ratio"] == pytest.approx(row["loop_seconds"] / row["seconds"])
    assert row["reached"] == (row["ratio"] >= row["must"])


def test_the_steep_benchmark_counts_the_products_of_its_step():
    row = steep.measure(steep.Case(width=24, batch=8), 1, rounds=1)
    assert 2 <= row["evaluations"] <= 24 + 1  # nilpotent: exact after 24, and one to see it
    assert row["ratio"] == row["seconds"] / row["gemm_seconds"]
    assert row["reached"] == (row["ratio"] <= row["most"])


@pytest.mark.parametrize(("inputs", "outputs", "batch"), [(1, 5, 7), (5, 1, 7), (1, 1, 3), (4, 3, 2), (1, 4, 0)])
def test_affine_is_baddbmm_with_its_gradients(inputs, outputs, batch):
    def leaf(*shape: int, seed: int) -> torch.Tensor:
        return torch.randn(shape, dtype=F64, generator=generator(seed)).requires_grad_()

    values = leaf(3, 1, outputs, seed=0), leaf(3, batch, inputs, seed=1), leaf(3, inputs, outputs, seed=2)
    g = torch.randn(3, batch, outputs, dtype=F64, generator=generator(3))
    mine, theirs = affine(*values), torch.baddbmm(*values)
    torch.testing.assert_close(mine, theirs)
    for a, b in zip(torch.autograd.grad(mine, values, g), torch.autograd.grad(theirs, values, g), strict=True):
        torch.testing.assert_close(a, b)
    if batch:
        assert torch.autograd.gradcheck(affine, values)


def test_thin_maps_with_samples_side_by_side_are_the_same():
    x, u, z = (torch.randn(3, 7, n, dtype=F64, generator=generator(n)) for n in (1, 4, 4))
    b, y0 = torch.randn(3, 1, 4, dtype=F64, generator=generator(5)), torch.zeros(3, 1, 1, dtype=F64)
    U, a, z = u[:, :1], u[:, :4, :1].contiguous(), z.requires_grad_()
    for side_by_side in (False, True):
        c = affine(b, x, U, side_by_side=side_by_side)
        (dz,) = torch.autograd.grad(affine(y0, z, a, side_by_side=side_by_side).sum(), z)
        torch.testing.assert_close(c, torch.baddbmm(b, x, U))
        torch.testing.assert_close(dz, a.mT.expand_as(z))
        assert [t.mT.is_contiguous() for t in (c, dz)] == [side_by_side] * 2


def test_the_trainer_takes_the_steps_of_torch():
    """Its Adam, the closed slope of the mean square and that of another loss, against autograd and torch.optim."""

    def absolute(output, target):
        return (output - target).abs() ** 1.5

    x = torch.rand(2, 9, 3, dtype=F64, generator=generator(1))
    y = x.sum(2)
    for loss in (square, absolute):
        mine, theirs = (FeedForward(2, 3, 5, 3, generator()) for _ in range(2))
        train(mine, lambda: (x, y), steps=5, rate=1e-2, loss=loss)
        optimiser = torch.optim.Adam(theirs.parameters)
        for step in range(5):
            optimiser.param_groups[0]["lr"] = 1e-2 * cosine()(step / 5)
            optimiser.zero_grad()
            loss(theirs(x), y).mean(1).sum().backward()
            optimiser.step()
        for a, b in zip(mine.parameters, theirs.parameters, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_a_weight_without_influence_has_a_gradient_of_zero():
    net = DiagonalDEQ(2, 1, 3, generator())
    unused = torch.ones(2, 1, requires_grad=True)
    net.parameters.append(unused)
    x = torch.rand(2, 5, 1, dtype=F64, generator=generator(1))
    unused.data = unused.data.double()
    train(net, lambda: (x, x[..., 0]), steps=2)
    assert unused.grad.abs().sum() == 0 and torch.equal(unused.detach(), torch.ones(2, 1, dtype=F64))


@pytest.mark.parametrize(
    "make",
    [
        lambda g: DenseDEQ(2, 1, 8, g, "contractive", torch.float32, 4.0, warm=True),
        lambda g: FilterDEQ(2, 8, g, "siren", 5.0),
    ],
    ids=["dense", "filter"],
)
def test_the_cost_of_a_net_is_that_of_a_solve_from_zero(make):
    """Where the test has as many points as a batch, its solve would start from what training solved last."""
    x = torch.linspace(0, 1, 32).view(1, -1, 1).expand(2, -1, -1)
    batch = x, torch.sin(7 * x[..., 0])
    run = SimpleNamespace(settings=SimpleNamespace(seeds=2), generator=lambda purpose: generator())
    net = make(generator())
    row = fit(run, "net", lambda S, g: net, lambda: batch, batch, lambda share: None, steps=20, rate=1e-3)
    with torch.no_grad():
        net.forget()
        net(x)
        assert row["flops"] == net.flops()
        net(x)  # from its own equilibrium
        assert row["flops"] > net.flops()
