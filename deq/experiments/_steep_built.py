"""Checks of the two DEQs that are built for the steep target: their laws, and their equilibria by the engine."""

from collections.abc import Callable

import torch
from torch import Tensor

from ..reference import cell
from ._equilibria import difference_over_bound, rounding, solve_twice
from ._steep_target import F64, ScalarState, SelfLoops, bisection_steps, inputs, target

EPS = torch.finfo(F64).eps
POINTS = 500  # inputs spread over all scales, besides those where the error is largest
DENSE = 1024  # largest width whose vanilla form, a dense (K + 3, K + 3) weight, is written out
SOLVED = 8  # width K of the constructions that the engine solves


def check_self_loops(d: int, K: int, device: torch.device | None = None) -> dict:
    """Construction A at delta = 2^-d: sup error of its exact equilibrium, width, largest weight, product of norms."""
    delta = 2.0**-d
    net = SelfLoops.build(delta, K, device)
    t = inputs(delta, torch.cat((net.knots, net.knots.new_zeros(1))), POINTS)
    error = _by_chunks(lambda t: (net.readout(net.equilibrium(t)) - target(t, delta)).abs(), t, K)
    return {
        "A_error": float(error.max()),
        "A_weight": net.largest_weight(),
        "A_width": net.injection(t[:1]).shape[-1],
        "A_norms": net.norms(),
    }


def check_scalar_state(d: int, K: int, device: torch.device | None = None) -> dict:
    """Construction B at delta = 2^-d.

    B_error: sup error of the root in closed form. B_bisection: the same after ceil(log2 K) + 1 halvings, None where
    float64 cannot tell the two sides of the root apart to 1 / K. B_rise: the smallest slope of f that the network's own
    weights give; positive means one root. lemma1, lemma1_rank: see :func:`check_vanilla`.
    """
    delta = 2.0**-d
    net = ScalarState.build(delta, K, device=device)
    V = net.layers()[0]
    t = inputs(delta, net.below.clamp(max=1), POINTS)
    row = {
        "B_error": float((net.root(t) - target(t, delta)).abs().max()),
        "B_bisection": None,
        "B_weight": net.largest_weight(),
        "B_width": len(V),
        "B_rise": float((-V[1 : K + 1]).cumsum(0).min()),
    }
    one = t.new_ones(1)
    uncertain = float(net.rounding(one, 1 - one).max() / net.slopes.min())
    if uncertain <= 1 / K:
        some = t[:: max(1, len(t) * K // 2**22)]
        halved = _by_chunks(lambda t: net.bisect(t, bisection_steps(K)), some, K)
        row["B_bisection"] = float((halved - target(some, delta)).abs().max())
    return row | check_vanilla(ScalarState.build(delta, K, 1 / K, device), t[:: max(1, len(t) // 64)])


def check_vanilla(net: ScalarState, t: Tensor) -> dict:
    """Lemma 1 at the closed-form root: the larger of |relu(W V h + c) - h| and |V h - z|, over the rounding error of
    evaluating them, and the rank of W V. None for widths above DENSE."""
    if net.K > DENSE:
        return {"lemma1": None, "lemma1_rank": None}
    V = net.layers()[0]
    z = net.root(t)
    h = net.hidden(z, t)
    W, c = net.vanilla(t)
    residual = ((cell(W, c, h, "relu") - h).abs() / rounding(W, c, h).clamp(min=EPS)).amax(-1)
    state = (h @ V - z).abs() / net.rounding(z, t)
    return {"lemma1": float(torch.maximum(residual, state).max()), "lemma1_rank": int(torch.linalg.matrix_rank(W))}


def solve_built(d: int, device: torch.device | None = None) -> list[dict]:
    """Both constructions at delta = 2^-d from zero by the engine, B as Lemma 1's vanilla DEQ.

    law: sup error times K^2 (A) or K (B). difference: from the closed form, over the bound that the residual implies.
    """
    delta, K = 2.0**-d, SOLVED
    a = SelfLoops.build(delta, K, device)
    t = inputs(delta, a.knots, 60)
    W, c = a.weight, a.injection(t)
    row_a, z = solve_twice(W, c, lambda z: _sup(a.readout(z), t, delta))
    row_a |= {"net": "construction A", "law": row_a["metric"] * K**2}
    row_a["difference"] = difference_over_bound(W, c, z, a.equilibrium(t))

    b = ScalarState.build(delta, K, 1 / K, device)
    V = b.layers()[0]
    row_b, h = solve_twice(*b.vanilla(t), lambda h: _sup(h @ V, t, delta))
    row_b |= {"net": "construction B", "law": row_b["metric"] * K}
    state = h @ V
    # z - step(z) rises at least as fast as s times the smallest slope of f
    bound = ((b.step(state, t) - state).abs() + b.rounding(state, t)) / (b.scale * b.slopes.min())
    row_b["difference"] = float(((state - b.root(t)).abs() / bound).max())
    return [row | {"d": d, "case": f"{row['net']}, d = {d}"} for row in (row_a, row_b)]


def _sup(y: Tensor, t: Tensor, delta: float) -> float:
    return float((y - target(t, delta)).abs().max())


def _by_chunks(f: Callable[[Tensor], Tensor], t: Tensor, K: int) -> Tensor:
    """f on pieces of t small enough that (piece, K) arrays stay below 32 MiB."""
    return torch.cat([f(piece) for piece in t.split(max(1, 2**22 // K))])
