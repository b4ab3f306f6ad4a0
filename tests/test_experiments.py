"""The pieces of the experiments: constructions and their laws, counting, nets, trainer, verdicts."""

import itertools
import json
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deq import reference
from deq.experiments import REGISTRY, SettingsError
from deq.experiments import _nets as nets
from deq.experiments import _sawtooth as sawtooth
from deq.experiments import regions as regions_module
from deq.experiments._equilibria import difference_over_bound, moved, solve_twice
from deq.experiments._nets import DiagonalDEQ, FeedForward, TriangularDEQ, feedforward_count, matching_width
from deq.experiments._result import (
    INCONCLUSIVE,
    PROVED,
    REPRODUCED,
    VIOLATED,
    number,
    proved,
    proved_for_all,
    sign_test,
    spread,
    to_json,
)
from deq.experiments._run import KeptParts
from deq.experiments._steep_built import check_scalar_state, check_self_loops, solve_built
from deq.experiments._steep_target import ScalarState, SelfLoops, binding_point, bisection_steps, floor, inputs, target
from deq.experiments._steep_trained import models, sample
from deq.experiments._train import train
from deq.experiments.regions import last_pieces, needed, solve_midpoints, summary

F64 = torch.float64
few = settings(max_examples=40, deadline=None)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# --- Theorem 2 -------------------------------------------------------------------------------------------------------


@few
@given(d=st.integers(1, 30), K=st.integers(1, 100))
def test_construction_a_obeys_its_laws(d, K):
    row = check_self_loops(d, K)
    delta = 2.0**-d
    exact = (1 - math.sqrt(delta / (1 + delta))) ** 2 / K**2  # the theorem's own value, below 1 / K^2
    assert row["A_error"] <= 1 / K**2
    assert row["A_error"] == pytest.approx(exact, rel=1e-6)
    assert row["A_weight"] <= 1
    assert row["A_width"] == K


@few
@given(d=st.integers(1, 30), K=st.integers(1, 100))
def test_construction_b_obeys_its_laws(d, K):
    row = check_scalar_state(d, K)
    assert row["B_error"] <= 1 / K
    assert row["B_weight"] <= K
    assert row["B_width"] == K + 3
    assert row["B_rise"] > 0
    assert row["B_bisection"] is not None and row["B_bisection"] <= 2 / K
    assert row["lemma1"] <= 1 and row["lemma1_rank"] == 1


@few
@given(d=st.integers(1, 20), K=st.integers(1, 64), scale=st.sampled_from([1.0, None]))
def test_root_of_construction_b_is_the_only_fixed_point(d, K, scale):
    net = ScalarState.build(2.0**-d, K, scale or 1 / K)
    t = torch.linspace(0, 1, 7, dtype=F64)
    root = net.root(t)
    assert ((net.step(root, t) - root).abs() <= net.rounding(root, t)).all()
    offset = 4 * net.rounding(root, t) / (net.scale * net.slopes.min()) + 1e-9
    assert (net.step(root + offset, t) < root + offset).all()  # the state falls above the root
    assert (net.step(root - offset, t) > root - offset).all()  # and rises below it


@pytest.mark.parametrize("K, steps", [(1, 1), (2, 2), (3, 3), (4, 3), (5, 4), (64, 7), (65, 8)])
def test_bisection_steps_are_ceil_log2_plus_one(K, steps):
    assert bisection_steps(K) == steps


def test_equilibrium_of_construction_a_is_a_fixed_point():
    net = SelfLoops.build(2.0**-8, 12)
    t = inputs(2.0**-8, net.knots, 50)
    c, z = net.injection(t), net.equilibrium(t)
    torch.testing.assert_close(reference.cell(net.weight, c, z, "relu"), z, rtol=1e-14, atol=1e-14)


def test_inputs_cover_both_ends_and_the_worst_point_of_every_piece():
    delta = 2.0**-10
    knots = torch.tensor([1.0, 0.1, 0.01, 0.0], dtype=F64)
    t = inputs(delta, knots, 10)
    assert t[0] == 0 and t[-1] == 1 and (t.diff() > 0).all()
    for a, b in itertools.pairwise(knots.tolist()):
        worst = math.sqrt((delta + a) * (delta + b)) - delta
        assert (t - worst).abs().min() < 1e-15


@few
@given(d=st.integers(1, 20), log2_lipschitz=st.floats(-10, 25))
def test_floor_is_the_best_of_all_pairs_of_points(d, log2_lipschitz):
    delta, lipschitz = 2.0**-d, 2.0**log2_lipschitz
    t = np.concatenate(([0.0], np.geomspace(delta * 1e-3, 1, 4000)))
    tried = max(0.0, ((1 - delta / (delta + t) - lipschitz * t) / 2).max())
    assert tried <= floor(lipschitz, delta) <= tried + 1e-4
    if delta / (1 + delta) ** 2 <= lipschitz <= 1 / delta:
        assert floor(lipschitz, delta) == pytest.approx((1 - math.sqrt(lipschitz * delta)) ** 2 / 2, abs=1e-12)
    assert 0 <= binding_point(lipschitz, delta) <= 1


def test_floor_is_attained_by_the_best_lipschitz_function():
    """f = max(g(t*) + e, 1 - e - L t) has the floor as its error: the bound is tight."""
    delta, lipschitz = 2.0**-10, 100.0
    e, t = floor(lipschitz, delta), torch.logspace(-6, 0, 5000, dtype=F64)
    f = 1 - e - lipschitz * t
    g = target(t, delta)
    near = t <= binding_point(lipschitz, delta)
    assert (f - g)[near].abs().max() <= e + 1e-12


def test_engine_reaches_both_constructions():
    for row in solve_built(5):
        assert row["law"] <= 1 and row["difference"] <= 1 and row["unconverged"] == 0
        assert row["residual"] <= 1e-10 and row["residual_again"] <= 1e-13 and moved(row) < 1e-9


def test_a_wrong_equilibrium_exceeds_its_bound():
    net = SelfLoops.build(2.0**-4, 4)
    t = torch.linspace(0, 1, 5, dtype=F64)
    row, z = solve_twice(net.weight, net.injection(t), lambda z: float(z.sum()))
    exact = net.equilibrium(t)
    assert difference_over_bound(net.weight, net.injection(t), z, exact) <= 1
    assert difference_over_bound(net.weight, net.injection(t), z, exact + 1e-6) > 1
    assert row["evaluations_again"] >= row["evaluations"]


# --- nets and trainer ------------------------------------------------------------------------------------------------


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


def test_feed_forward_is_lipschitz_with_the_product_of_its_norms():
    net = FeedForward(4, 3, 8, 3, generator())
    x = torch.rand(4, 50, 3, dtype=F64, generator=generator(1), requires_grad=True)
    (slope,) = torch.autograd.grad(net(x).sum(), x)
    assert (slope.abs().sum(-1).amax(-1) <= net.norms().prod(1)).all()


def test_models_have_comparable_parameters():
    for d, width in ((6, 20), (10, 20), (10, 1), (6, 64)):
        counts = {name: make(1, generator()).count for name, make in models(width, d).items()}
        feedforward = [n for name, n in counts.items() if "feed" in name]
        assert len(feedforward) == 3
        assert all(n >= max(v for name, v in counts.items() if "DEQ" in name) for n in feedforward)


def test_samples_are_dense_where_the_target_rises():
    x, y = sample(3, 256, 10, generator())
    t = 1 - x[..., 0]
    assert x.shape == (3, 256, 10) and y.shape == (3, 256)
    assert ((x >= 0) & (x <= 1)).all()
    assert ((t == 0).sum(1) == 8).all()
    assert ((y > 0.1) & (y < 0.9)).sum() > 100  # uniform points would give about 3 of 768
    torch.testing.assert_close(y, 2.0**-10 / (2.0**-10 + t))


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

        overflowed = train(net, lambda: sample(2, 64, 2, data), steps=60, checkpoints=(0, 30, 60), observe=observe)
        assert overflowed == {} and seen == [0, 30, 60]
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

    assert train(net, batch, steps=6) == {1: 3}
    assert all(p.isfinite().all() for p in net.parameters)


# --- Theorem 1 -------------------------------------------------------------------------------------------------------


def rational_states(m: int, x: Fraction) -> list[Fraction]:
    """z of the DEQ's own equation, written out independently."""
    z: list[Fraction] = []
    for t in range(1, m + 1):
        z.append(max(Fraction(0), Fraction(2) ** t * x - 1 - sum(2 ** (t - i) * 2 * z[i - 1] for i in range(1, t))))
    return z


@pytest.mark.parametrize("m", range(1, 6))
def test_counts_agree_with_rational_arithmetic(m):
    n = 8 * 2**m  # eight cells a region
    z = np.array([rational_states(m, Fraction(k, n)) for k in range(n + 1)], dtype=object)
    slopes = np.diff(z, axis=0)
    kinks = [k for k in range(1, n) if (slopes[k] != slopes[k - 1]).any()]
    assert kinks == list(range(8, n, 8))
    found = regions_module._counting(m)(lambda share: None)
    assert found["regions"] == len(kinks) + 1 == 2**m
    assert found["pieces_last"] == 1 + sum(slopes[k][-1] != slopes[k - 1][-1] for k in range(1, n)) == last_pieces(m)
    assert found["pieces_sum"] == found["pieces_staircase"] == 2**m
    assert found["evaluations"] == m
    assert all(found[name] == 0 for name in ("misplaced", "bent", "unlike_gray", "unlike_tent", "moved"))


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 64])
def test_counts_do_not_depend_on_the_chunk(monkeypatch, chunk):
    expected = regions_module._counting(5)(lambda share: None)
    monkeypatch.setattr(regions_module, "CHUNK", chunk)
    assert regions_module._counting(5)(lambda share: None) == expected


@few
@given(m=st.integers(1, 80), data=st.data())
def test_sampled_regions_agree_in_any_width(m, data):
    """int64 below 30, Python integers above: the same exact answers, and Gray code patterns."""
    j = data.draw(st.integers(0, 2**m - 2 if m > 1 else 0))
    k = sawtooth.grid(m, [[2 * j, 2 * j + 1, 2 * j + 2]])
    pieces = sawtooth.examine(m, k)
    found = summary(pieces, sawtooth.moved_from_answer(m, k))
    assert all(found[name] == 0 for name in ("misplaced", "bent", "unlike_gray", "unlike_tent", "moved"))
    assert sawtooth.evaluations_to_fixed_point(m, k) <= m


def test_a_wrong_map_is_noticed(monkeypatch):
    """One folded neuron less: neurons 3 and 4 agree, so patterns repeat, kinks are missing and the tent map fails."""
    right = sawtooth.iterate

    def broken(m, k, z=None):
        s = right(m, k, z)
        return [*s[:3], s[2], *s[4:]]

    monkeypatch.setattr(sawtooth, "iterate", broken)
    pieces = sawtooth.examine(4, sawtooth.grid(4, np.arange(33))[None])
    assert pieces.kinks == 7 and pieces.misplaced == 8 and pieces.unlike_gray > 0 and pieces.unlike_tent > 0


def test_off_grid_kinks_are_noticed(monkeypatch):
    """A neuron that switches inside a cell makes the cell bent, so that no kink can hide between grid points."""
    monkeypatch.setattr(sawtooth, "iterate", lambda m, k, z=None: [2 * k - 2 ** (m + 1) + 1])
    assert sawtooth.examine(1, sawtooth.grid(1, np.arange(5))[None]).bent == 1


@pytest.mark.parametrize("name, dtype, limit", [("float32", torch.float32, 23), ("float64", torch.float64, 52)])
def test_midpoints_are_exact_up_to_the_precision_of_the_dtype(name, dtype, limit):
    for m in (1, 2, 10, limit):
        regions = sorted({0, 2**m - 1, 2**m // 3, 2**m // 2})
        row = solve_midpoints(m, regions, dtype)
        assert row["wrong"] == row["wrong_again"] == row["unconverged"] == row["unconverged_from_answer"] == 0
        assert row["residual"] == 0 and row["evaluations"] <= m + 1
    beyond = solve_midpoints(limit + 1, [2 ** (limit + 1) - 1, 2 ** (limit + 1) - 2], dtype)
    assert beyond["wrong"] > 0  # those midpoints need one bit more than the dtype has


@few
@given(neurons=st.integers(1, 9), depth=st.integers(1, 4))
def test_even_widths_maximise_the_bound(neurons, depth):
    if depth > neurons:
        return
    best = max(
        sawtooth.piece_bound(list(w))
        for w in itertools.product(range(1, neurons + 1), repeat=depth)
        if sum(w) == neurons
    )
    chosen = sawtooth.spread_neurons(neurons, depth)
    assert sum(chosen) == neurons and sawtooth.piece_bound(chosen) == best
    assert best <= 2**neurons and (best == 2**neurons) == (depth == neurons)


@few
@given(depth=st.integers(1, 6), budget=st.integers(1, 400))
def test_widest_net_uses_its_budget(depth, budget):
    net = sawtooth.widest(depth, budget)
    if net is None:
        assert sawtooth.parameters([1] * depth) > budget
        return
    assert sawtooth.parameters(net) <= budget
    assert sawtooth.parameters(sawtooth.spread_neurons(sum(net) + 1, depth)) > budget


@pytest.mark.parametrize("m, depth, width", [(1, 2, "1"), (10, 2, "31"), (10, 1, "1023"), (5, 2, "5"), (80, 2, "2^40")])
def test_needed_width(m, depth, width):
    assert needed(m, depth) == width


# --- verdicts and records --------------------------------------------------------------------------------------------


def test_proved_for_all_names_the_worst_case():
    rows = [{"case": f"case {v}", "v": v} for v in (0.1, 0.9, 0.5)]
    claim = proved_for_all("x", "Thm.", rows, lambda r: r["v"], "<=", 1)
    assert (claim.measured, claim.note, claim.verdict) == (0.9, "case 0.9", PROVED)
    claim = proved_for_all("x", "Thm.", rows, lambda r: r["v"], ">=", 0.2)
    assert (claim.measured, claim.verdict) == (0.1, VIOLATED)
    assert claim.sentence() == "Thm.: x: measured 0.1, required >= 0.2 (case 0.1)"
    assert proved_for_all("x", "Thm.", rows, lambda r: r["v"], "==", 0.1).measured == 0.9


def test_nan_violates_every_claim():
    rows = [{"case": "fine", "v": 0.0}, {"case": "nan", "v": math.nan}]
    for relation in ("<=", "<", ">=", ">", "=="):
        assert proved("x", "Thm.", math.nan, relation, 0).verdict == VIOLATED
        assert proved_for_all("x", "Thm.", rows, lambda r: r["v"], relation, 0).note == "nan"


def test_spread_counts_failures_as_infinitely_bad():
    assert vars(spread([3.0, 1.0, 2.0])) == {"median": 2.0, "low": 1.5, "high": 2.5}
    assert spread([1.0, None, math.nan]).median == math.inf
    assert spread([1.0, 2.0, 3.0, None]).median == 2.5
    assert str(spread([0.5])) == "0.5 [0.5, 0.5]"


def test_sign_test_counts_coin_flips():
    assert sign_test(8, 8) == 1 / 256
    assert sign_test(0, 8) == 1
    assert sign_test(7, 8) == 9 / 256


@pytest.mark.parametrize(
    "value, text",
    [(0, "0"), (1.0, "1"), (0.12345, "0.123"), (1e-5, "1.0e-5"), (123456.7, "1.2e5"), (16384, "16384"), (None, "-")],
)
def test_numbers_are_short(value, text):
    assert number(value) == text


def test_json_has_no_word_for_nan():
    assert to_json({1: (math.nan, math.inf, 1.5, 2, True, "a", None)}) == {"1": [None, None, 1.5, 2, True, "a", None]}


def test_below_floor_needs_more_than_half_of_the_seeds():
    from deq.experiments.steep import _below_floor

    deq = {"model": "diagonal DEQ 2", "equilibrium": {"metric": 1.0, "metric_again": 1.0}}
    few_below = _below_floor(10, [deq | {"norms": [10.0] * 8, "sup": [0.3] * 5 + [0.6] * 3}], quick=False)
    assert few_below.verdict == INCONCLUSIVE and few_below.measured > 1
    all_below = _below_floor(10, [deq | {"norms": [10.0] * 8, "sup": [0.3] * 8}], quick=False)
    assert all_below.verdict == REPRODUCED


def test_kept_parts_are_for_one_fingerprint(tmp_path):
    path = tmp_path / "x.parts.json"
    kept = KeptParts(path, "a")
    assert kept.keep("one", {"v": (1.5, math.nan)}) == {"v": [1.5, None]}
    assert KeptParts(path, "a").values == {"one": {"v": [1.5, None]}}
    assert KeptParts(path, "b").values == {} and not path.exists()
    for broken in ("", "{", "[]", '{"fingerprint": "a"}'):
        path.write_text(broken)
        assert KeptParts(path, "a").values == {}
        assert not path.exists()


def test_settings_take_defaults_and_refuse_what_cannot_run():
    steep, regions = REGISTRY["steep"], REGISTRY["regions"]
    assert steep.settings().seeds == 8 and steep.settings(quick=True).seeds == 3
    assert steep.settings(width=7).width == 7
    for options in ({"width": 0}, {"seeds": 0}, {"seed": -1}):
        with pytest.raises(SettingsError, match=next(iter(options))):
            steep.settings(**options)
    with pytest.raises(SettingsError, match="at most 1000; got 1001"):
        regions.settings(width=1001)
    assert json.dumps(vars(steep.settings()))


def test_the_registry_is_named_after_itself():
    assert list(REGISTRY) == ["steep", "regions"]
    assert all(name == e.name and e.title and e.claim.endswith(".") for name, e in REGISTRY.items())
