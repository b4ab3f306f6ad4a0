"""The plan is pure Python: every decision without a tensor, but for one look at W."""

import pickle
import subprocess
import sys

import pytest
import torch

import deq
from deq import _library, indicators
from deq.activations import ACTIVATIONS
from deq.plan import (
    BOUNDED,
    DEFAULT_MAX_ITER,
    DEFAULT_TOL,
    LARGE_WEIGHT,
    NOT_MONOTONE,
    fit,
    forming_cost,
    is_cheap,
    make_plan,
)
from deq.solvers import ladder

needs_library = pytest.mark.skipif(_library.compiled is None, reason=f"no compiled library: {_library.reason}")


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
    assert fitted().rungs == ("cayley", "anderson", "tight cayley", "plain", "newton")
    assert fitted(batch=4).rungs == ("anderson", "cayley", "tight cayley", "plain", "newton")
    assert fitted(batch=64, frozen=True).rungs[0] == "cayley"
    assert fitted(increments="native").rungs == ("cayley", "tight cayley", "plain", "newton")
    for batch in (4, 4096):  # K is there whatever it cost
        assert fitted(batch=batch, large=True).rungs == ("tight cayley", "anderson", "plain", "newton")
    assert [fitted(activation=name).rungs[-1] for name in ("relu", "gelu", "tanh")] == ["newton", "newton", "homotopy"]
    assert plan(solver="plain").rungs == plan(solver="anderson").rungs == ()
    assert plan(solver="cayley").rungs == ("cayley", "tight cayley", "anderson")


def test_properties_of_activations_are_those_of_the_table():
    x = torch.linspace(-50, 50, 10001, dtype=torch.float64)
    far = torch.tensor([-1e30, 1e30], dtype=torch.float64)
    for name, entry in ACTIVATIONS.items():
        assert (name in NOT_MONOTONE) == bool((entry.value(x).diff() < 0).any())
        assert (name in BOUNDED) == bool((entry.value(far).abs() <= 1).all())


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


@needs_library
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("m", [1, 7, 100, 700])
@pytest.mark.parametrize("layout", ["rows", "columns", "apart", "stack"])
def test_the_engine_refuses_the_weights_that_are_large(dtype, m, layout):
    """As the torch expression tells them, and every bit of the answer is that of the plan made with open eyes."""
    torch.manual_seed(m)
    shape = (2, m, m) if layout == "stack" else (m, m)
    for size in (0.99 * LARGE_WEIGHT, 1.01 * LARGE_WEIGHT):
        W = torch.randn(shape, dtype=torch.float64)
        W = (W * size / W.square().sum(-1, keepdim=True).sqrt()).to(dtype)  # every row as large
        W = {"columns": W.mT.contiguous().mT, "apart": W.repeat_interleave(2, -1)[..., ::2]}.get(layout, W)
        c = torch.randn(*shape[:-2], 3, m).to(dtype)
        large = size > LARGE_WEIGHT
        assert indicators.is_large(W) == large
        general = make_plan(dtype=str(dtype).removeprefix("torch."), device="cpu", compiled=True, max_iter=3)
        chosen = deq.solve(W, c, max_iter=3, on_failure="ignore")
        assert chosen.plan.map == ("cayley" if large else "plain")
        told = indicators.fitted(general, W, c, True, large=large)
        z = ladder.solve(W, c, None, "relu", told).z
        assert torch.equal(z, chosen.z)


def test_a_plan_of_another_process_is_found_among_equals():
    """The hash that it keeps is of texts, which every process hashes in its own way."""
    code = "import pickle, sys; from deq.plan import make_plan; "
    code += "sys.stdout.buffer.write(pickle.dumps(make_plan(dtype='float32', device='cpu', compiled=True)))"
    other = pickle.loads(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True).stdout)
    assert other == plan() and hash(other) == hash(plan())
