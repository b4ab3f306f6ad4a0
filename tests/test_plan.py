"""The plan is pure Python: every decision without a tensor."""

import pytest

from deq.plan import DEFAULT_MAX_ITER, DEFAULT_TOL, fit, forming_cost, is_cheap, make_plan


def plan(**options):
    return make_plan(**{"dtype": "float32", "device": "cpu", "compiled": True, **options})


@pytest.mark.parametrize(
    ("options", "backend"),
    [
        ({}, "cpu"),
        ({"compiled": False}, "reference"),
        ({"device": "cuda"}, "reference"),
        ({"backend": "reference"}, "reference"),
    ],
)
def test_backend(options, backend):
    assert plan(**options).backend == backend


def test_precision_tolerance_and_iterations():
    assert plan().precision == "float32" and plan(dtype="float64").precision == "float64"
    for dtype, tol in DEFAULT_TOL.items():
        assert plan(dtype=dtype).tol == tol
    for half in ("bfloat16", "float16"):
        assert plan(dtype=half).precision == "float32" and any(half in reason for reason in plan(dtype=half).why)
    assert plan(tol=1e-3).tol == 1e-3 and plan(max_iter=7).max_iter == 7 and plan().max_iter == DEFAULT_MAX_ITER


def test_acceleration():
    assert [plan(solver=s).acceleration for s in ("plain", "anderson", "auto")] == ["none", "anderson", "on_demand"]


def fitted(solver="auto", *, width=256, batch=256, large=False, frozen=False, increments="int8", **options):
    return fit(plan(solver=solver, **options), width, batch, large, frozen, increments)


def test_increments_are_for_wide_weights_and_tolerances_that_they_serve():
    assert fitted().increments == "int8" and fitted(increments="bfloat16").increments == "bfloat16"
    assert fitted(width=64).increments == fitted(tol=1e-7).increments == "native"
    assert any("int8" in reason for reason in fitted().why)


def test_a_large_weight_goes_to_the_cayley_map_where_the_activation_can():
    assert fitted().map == "plain" and fitted(large=True).map == "cayley"
    assert fitted(large=True, activation="gelu").map == "plain"
    assert "cayley" not in " ".join(fitted(large=True, activation="gelu").rungs)


def test_rungs():
    """K is formed first where it is cheap beside the batch; the native plain map need not be tried twice."""
    assert fitted().rungs == ("cayley", "anderson", "tight cayley", "newton")
    assert fitted(batch=4).rungs == ("anderson", "cayley", "tight cayley", "newton")
    assert fitted(batch=64, frozen=True).rungs[0] == "cayley"
    assert fitted(increments="native").rungs == ("cayley", "tight cayley", "newton")
    assert plan(solver="plain").rungs == plan(solver="anderson").rungs == ()
    assert plan(solver="cayley").rungs == ("cayley", "tight cayley")


def test_k_is_cheaper_for_larger_batches_and_relatively_for_larger_widths():
    costs = [forming_cost(m) for m in (64, 128, 256, 512, 1024, 4096)]
    assert costs == sorted(costs, reverse=True) and 1 < costs[-1] < 1.05
    for frozen in (False, True):
        decisions = [is_cheap(256, B, frozen) for B in (1, 4, 16, 64, 256, 1024)]
        assert decisions == sorted(decisions) and not decisions[0] and decisions[-1]


def test_what_cannot_run_here_is_said():
    with pytest.raises(ValueError, match="backend='cpu' needs the compiled library"):
        plan(backend="cpu", compiled=False)
    with pytest.raises(ValueError, match="backend='cpu' solves CPU tensors; c is on cuda"):
        plan(backend="cpu", device="cuda")


def test_words():
    words = plan(solver="anderson", dtype="bfloat16").explain()
    assert "plain map, float32 on cpu, Anderson(5)" in words and "bfloat16" in words
