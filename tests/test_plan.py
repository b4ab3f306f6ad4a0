"""The plan is pure Python: every decision without a tensor."""

import pytest

from deq.plan import DEFAULT_MAX_ITER, DEFAULT_TOL, make_plan


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


def test_what_cannot_run_here_is_said():
    with pytest.raises(ValueError, match="backend='cpu' needs the compiled library"):
        plan(backend="cpu", compiled=False)
    with pytest.raises(ValueError, match="backend='cpu' solves CPU tensors; c is on cuda"):
        plan(backend="cpu", device="cuda")


def test_words():
    words = plan(solver="anderson", dtype="bfloat16").explain()
    assert "plain map, float32 on cpu, Anderson(5)" in words and "bfloat16" in words
