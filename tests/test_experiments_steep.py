"""Theorem 2: constructions and their laws, floor, samples."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure

from deq import reference
from deq.experiments._equilibria import difference_over_bound, moved, solve_twice
from deq.experiments._result import (
    CONFOUNDED,
    EQUILIBRIUM,
    FINITE_DEPTH,
    NOT_JUDGED,
    NOT_REPRODUCED,
    REPRODUCED,
)
from deq.experiments._steep_built import check_scalar_state, check_self_loops, solve_built
from deq.experiments._steep_figure import _draw_learned
from deq.experiments._steep_target import ScalarState, SelfLoops, binding_point, bisection_steps, floor, inputs, target
from deq.experiments._steep_trained import models, sample

F64 = torch.float64
few = settings(max_examples=40, deadline=None)


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


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


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


def test_below_floor_needs_more_than_half_of_the_seeds():
    from deq.experiments.steep import _below_floor

    solved = {"metric": 1.0, "metric_again": 1.0, "residual": 1e-10, "residual_again": 1e-13}
    deq = {"model": "diagonal DEQ 2", "d": 10, "parameters": 7, "mse": [0.1] * 8, "equilibrium": solved}
    few_below = _below_floor(10, [deq | {"norms": [10.0] * 8, "sup": [0.3] * 5 + [0.6] * 3}], quick=False)
    assert few_below.verdict == NOT_REPRODUCED and few_below.measured > 1
    all_below = _below_floor(10, [deq | {"norms": [10.0] * 8, "sup": [0.3] * 8}], quick=False)
    assert all_below.verdict == REPRODUCED
    halves = _below_floor(10, [deq | {"norms": [10.0] * 8, "sup": [0.3] * 4 + [0.6] * 4}], quick=False)
    assert halves.measured == pytest.approx(0.75 * all_below.measured)  # the median, between both halves


def test_verdicts_about_a_trained_equilibrium_are_those_of_every_experiment():
    """At an equilibrium the residual is small and the metric stays, in steep as elsewhere; a quick run judges none."""
    from deq.experiments.steep import _below_floor, _learned_better

    solved = {"metric": 1.0, "metric_again": 1.0, "residual": 1e-10, "residual_again": 1e-13}
    deq = {"model": "diagonal DEQ 2", "d": 10, "parameters": 7, "mse": [0.1] * 8, "norms": [10.0] * 8, "sup": [0.3] * 8}
    rival = {"model": "feed-forward", "mse": [0.2] * 8}

    def verdicts(quick: bool = False, **changed) -> list[tuple[str, str]]:
        rows = [deq | {"equilibrium": solved | changed}, rival]
        claims = [judge(10, rows, quick) for judge in (_learned_better, _below_floor)]
        return [(c.verdict, c.kind) for c in claims]

    assert verdicts() == [(REPRODUCED, EQUILIBRIUM)] * 2
    for changed in ({"residual": 1.0}, {"residual_again": None}, {"metric_again": 1.1}, {"metric_again": None}):
        assert verdicts(**changed) == [(CONFOUNDED, FINITE_DEPTH)] * 2, changed
        assert verdicts(quick=True, **changed) == [(NOT_JUDGED, FINITE_DEPTH)] * 2


def test_a_figure_of_a_net_that_training_lost():
    """No seed of it has an error that can be drawn: its line stays empty."""
    nets = [{"d": d, "model": "feed-forward 3x2", "mse": [None, None]} for d in (6, 10)]
    ax = Figure().add_subplot()
    _draw_learned(ax, nets)
    assert [len(line.get_xdata()) for line in ax.lines if line.get_marker() == "o"] == [0, 1, 0, 1]  # and the legend
