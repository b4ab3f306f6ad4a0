"""Gradient flow of the diagonal family, its minimisers, and generalisation on the unseen."""

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deq.experiments import REGISTRY
from deq.experiments._flow import F64, Family, integrate, off_row_space, problem
from deq.experiments._result import CONDITIONAL, CONFOUNDED, NOT_REPRODUCED, REPRODUCED
from deq.experiments.bias import DEQ, _descending, run_bias
from deq.experiments.density import CONFIG, FITTED, MODELS, _dense_claims, _fits, _solve, has_positive_solution
from deq.experiments.gotu import _start_claims, root

few = settings(max_examples=15, deadline=None)


@pytest.mark.parametrize("width", [8, 9, 20, 25, 1500])
def test_the_width_is_the_largest_dimension(width):
    """9 to 19 and 21 to 39 were left out, and widths below 8 were 8."""
    shapes = []
    run = SimpleNamespace(settings=REGISTRY["bias"].settings(width=width), config=SimpleNamespace(samples=4))

    def parts(every):
        shapes.extend(tuple(map(int, part.key.split("/")[1:])) for part in every if part.key.startswith("flow/"))
        raise InterruptedError

    run.parts = parts
    with pytest.raises(InterruptedError):
        run_bias(run)
    assert max(shapes)[0] == width and len(set(shapes)) == len(shapes) and all(d >= N for d, N in shapes)


def test_integrator_follows_an_exponential():
    times = []
    u, t = integrate(
        lambda u: -u, torch.ones(3, dtype=F64), done=lambda u: float(u.max()) < 1e-3, visit=lambda t, u: times.append(t)
    )
    torch.testing.assert_close(u, torch.full((3,), math.exp(-t), dtype=F64), rtol=1e-8, atol=0)
    assert times == sorted(times) and times[-1] == t
    with pytest.raises(RuntimeError, match="within 5 steps"):
        integrate(lambda u: -u, torch.ones(1, dtype=F64), done=lambda u: False, most=5)


@few
@given(L=st.sampled_from([-2, -1, 1, 2, 3]), seed=st.integers(0, 100), start=st.floats(0.3, 2))
def test_flow_minimiser_and_dual_agree(L, seed, start):
    family, (X, y, _) = Family(L), problem(3, 9, seed)
    beta0 = torch.full((9,), start, dtype=F64)
    dual, newton = family.limit(X, y, beta0), family.minimiser(X, y, beta0)
    torch.testing.assert_close(dual, newton, rtol=1e-7, atol=1e-9)  # what the claim asks for
    flow = family.flow(X, y, beta0, tol=1e-7, rtol=1e-9)
    torch.testing.assert_close(flow, dual, rtol=1e-4, atol=1e-5)
    assert off_row_space(X, family.gradient(dual, beta0)) < 1e-7


def test_the_curvature_is_the_derivative_of_the_gradient():
    beta = torch.tensor([0.3, 1.0, 2.5], dtype=F64, requires_grad=True)
    beta0 = torch.full((3,), 0.7, dtype=F64)
    for L in (-2, -1, 1, 2, 3):
        (slope,) = torch.autograd.grad(Family(L).gradient(beta, beta0).sum(), beta)
        torch.testing.assert_close(slope, Family(L).curvature(beta.detach()))
    negative = Family(-1, sign=-1.0)
    (slope,) = torch.autograd.grad(negative.gradient(-beta, -beta0).sum(), beta)
    torch.testing.assert_close(-slope, negative.curvature(-beta.detach()))


def test_the_potential_of_the_deq_has_the_plus_sign():
    """q' = -beta^-3 + beta0^-3 of 1 / (2 beta^2) + beta0^-3 beta, up to the factor 3 of the family."""
    beta, beta0 = torch.tensor([0.5, 2.0], dtype=F64), torch.tensor([1.0, 3.0], dtype=F64)
    torch.testing.assert_close(3 * DEQ.gradient(beta, beta0), beta0**-3 - beta**-3)
    torch.testing.assert_close(3 * DEQ.gradient(beta, beta0, -1.0), -(beta0**-3) - beta**-3)


@few
@given(L=st.sampled_from([-1, 2, 3]), total=st.floats(-2, 4), beta0=st.floats(0.05, 2))
def test_root_solves_its_equation(L, total, beta0):
    family = Family(L)
    beta = root(family, total, beta0)
    q = float(family.gradient(torch.tensor(beta, dtype=F64), torch.tensor(beta0, dtype=F64)))
    assert beta > 0 and beta + q / L**2 == pytest.approx(total, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize(
    "customary, equal, verdicts",
    [
        (4.0, 0.5, [CONFOUNDED, NOT_REPRODUCED]),
        (4.0, 2.0, [REPRODUCED, CONDITIONAL]),
        (0.5, 2.0, [NOT_REPRODUCED, CONDITIONAL]),
    ],
)
def test_errors_from_each_start_decide_about_the_unseen(customary, equal, verdicts):
    """``customary`` and ``equal``: how many times as large an error the diagonal nets make as the DEQ."""
    rows = [
        {"start": start, "f0": 0.0, "ck": ck, "model": model, "gotu": error}
        for start, ratio in (("beta0 = 1.0", equal), ("customary", customary))
        for ck in (1.0, 2.0)
        for model, error in (("DEQ", 0.1), ("depth 2", 0.1 * ratio), ("depth 3", 0.2 * ratio))
    ]
    claims = _start_claims(rows)
    assert [c.verdict for c in claims] == verdicts
    assert [c.measured for c in claims] == pytest.approx([customary, equal])


def test_problems_without_a_positive_solution_contradict_no_theorem():
    """Of width 16 every seventh sparse target is the only solution without negative entries."""
    config = SimpleNamespace(**{name: choice.at("quick") for name, choice in CONFIG.items()})
    run = SimpleNamespace(settings=SimpleNamespace(width=16, seeds=2, seed=2), config=config)
    rows = {r["model"]: r for r in _solve(run, "sparse", "customary", lambda share: None)}
    assert rows["DEQ"]["fit"][1] > FITTED and rows["DEQ"]["met"] == [True, False]
    assert all(row["fit"] <= FITTED for row in _fits({("sparse", "customary"): rows})) and set(rows) == set(MODELS)
    (X, _, true), (clear, _, also) = (problem(8, 16, seed, 4) for seed in (3, 0))
    assert not has_positive_solution(X, true) and has_positive_solution(clear, also)
    assert has_positive_solution(*problem(8, 16, 3)[::2])
    rows["DEQ"]["met"] = [True, True]  # one that has such a solution and is not fitted is told
    assert max(row["fit"] for row in _fits({("sparse", "customary"): rows})) > FITTED


def test_models_that_are_all_alike_are_no_evidence_of_density():
    alike = {model: {"model": model, "error": [0.5] * 8} for model in ("DEQ", "depth 2", "depth 3")}
    run = SimpleNamespace(config=SimpleNamespace(share=0.5), settings=SimpleNamespace(quick=False))
    rows = {("dense", start): alike for start in ("customary", "equal")}
    claims = _dense_claims(run, rows, "error", "distance", False, "")
    assert [(c.measured, c.verdict) for c in claims] == [(1, NOT_REPRODUCED)] * 2


@pytest.mark.parametrize("seed", [0, 49])
def test_gradient_descent_is_judged_where_it_stays_in_its_domain(seed):
    """From seed 49 a rate of 0.05 leaves w < 1, where there is no flow to follow: that broke no theorem."""
    run = SimpleNamespace(config=SimpleNamespace(rates=(0.05, 0.02)), settings=SimpleNamespace(seed=seed))
    found = _descending(run)(lambda share: None)
    assert [row["rate"] for row in found["rows"]] == [rate / (2 if seed else 1) for rate in (0.05, 0.02)]
    assert found["violations"] == 0 and found["order"] >= 0.8
