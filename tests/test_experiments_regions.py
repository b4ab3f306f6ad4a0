"""Theorem 1: counting, precision, bounds."""

import itertools
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deq.experiments import _sawtooth as sawtooth
from deq.experiments import regions as regions_module
from deq.experiments.regions import last_pieces, needed, solve_midpoints, summary

F64 = torch.float64
few = settings(max_examples=40, deadline=None)


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
