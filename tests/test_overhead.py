"""The fixed cost of a solve and its gradient, counted instead of timed: operators, Python calls and objects."""

import gc
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from problems import gaussian
from recorder import Recorder

import deq
from deq import _library
from deq.backends import cpu

pytestmark = pytest.mark.skipif(_library.compiled is None, reason=f"no compiled library: {_library.reason}")


def solve(W, c):
    return deq.solve(W, c, solver="plain", tol=1e-5, max_iter=1000, on_failure="raise")


def step(W, c, g):
    return torch.autograd.grad(solve(W, c).z, (W, c), g)


@pytest.fixture
def problem():
    W, c, g = gaussian(16, 8)
    W, c = W.requires_grad_(), c.requires_grad_()
    step(W, c, g)  # the first call plans
    return W, c, g


def test_operators_of_a_solve(problem):
    W, c, _ = problem
    with Recorder() as recorder, torch.no_grad():
        solve(W, c)
    assert recorder.names == ["aten::empty_like", "aten::new_empty", "deq::solve_"]


def test_operators_of_a_solve_and_its_gradient(problem):
    with Recorder() as recorder:
        step(*problem)
    names = [name for name in recorder.names if name != "aten::detach"]  # torch's own: saved and captured tensors
    assert names == [
        "aten::empty_like",
        "aten::new_empty",
        "deq::solve_",
        "aten::transpose.int",
        "aten::empty_like",
        "aten::new_empty",
        "deq::masked_linear_",
        "aten::new_empty",
        "deq::product_",
    ]
    assert len(recorder.names) <= len(names) + 3


def test_statistics_cost_nothing_until_they_are_read(problem):
    W, c, _ = problem
    solution = solve(W.detach(), c.detach())
    with Recorder() as recorder:
        detached = solution.detach()
    assert recorder.names == ["aten::detach"]
    assert detached.iterations.data_ptr() == solution.iterations.data_ptr()


def test_python_calls_of_a_step(problem):
    """Functions of this package that Python enters: each costs 0.1 us, a microsecond where caches are cold."""
    entered = []

    def note(frame, event, _):
        if event == "call" and frame.f_globals.get("__name__", "").startswith("deq"):
            entered.append(frame.f_code.co_name)

    sys.setprofile(note)
    try:
        step(*problem)
    finally:
        sys.setprofile(None)
    assert len(entered) <= 33, entered


def test_no_reference_cycles(problem):
    """Memory of a step is free at once: nothing waits for Python's cyclic collector."""
    while gc.collect():  # what torch.compile leaves behind takes several turns
        pass
    gc.disable()
    try:
        before = len(gc.get_objects())
        for _ in range(50):
            step(*problem)
        assert len(gc.get_objects()) - before < 50
        assert gc.collect() == 0
    finally:
        gc.enable()


@pytest.mark.parametrize(
    ("first", "second"),
    [({"tol": 1.0}, {"tol": True}), ({"max_iter": 1}, {"max_iter": True}), ({"max_iter": 1}, {"max_iter": 1.0})],
)
def test_an_option_remembered_is_not_its_equal_of_another_type(first, second):
    W, c, _ = gaussian(4, 2)
    deq.solve(W, c, on_failure="ignore", **first)
    with pytest.raises(TypeError, match=f"{next(iter(second))} must be"):
        deq.solve(W, c, on_failure="ignore", **second)


@pytest.mark.parametrize("name", ["activation", "solver", "criterion", "backward", "on_failure", "backend", "tol"])
def test_an_option_that_cannot_be_remembered_is_named(name):
    W, c, _ = gaussian(4, 2)
    with pytest.raises((TypeError, ValueError), match=rf"{name} must be .*; got \['x'\]"):
        deq.solve(W, c, **{name: ["x"]})


def test_a_failed_solve_does_not_disturb_the_next():
    """The report of a call is read from memory that the next call uses again."""
    W, c, _ = gaussian(6, 3)
    expected = deq.solve(W, c).z
    bad = c.clone()
    bad[1, 2] = float("nan")
    for _ in range(3):
        with pytest.raises(ValueError, match=r"c\[1\] holds NaN"):
            deq.solve(W, bad)
        with pytest.raises(deq.ConvergenceError):
            deq.solve(W, c, max_iter=2, on_failure="raise")
        assert torch.equal(deq.solve(W, c, on_failure="raise").z, expected)


def test_tensors_that_outlive_their_transform(problem):
    """torch.func leaves wrappers behind; a solve of one is a solve of the tensor inside."""
    W, c, g = problem
    kept = []

    def keep(x):
        kept.append(x)
        return x.sum()

    torch.func.grad(keep)(c.detach())
    assert torch.equal(torch.autograd.grad(solve(W, kept[0]).z, W, g)[0], step(W, c, g)[0])


@pytest.mark.parametrize("context", [torch.inference_mode, lambda: torch.device("meta")], ids=["inference", "meta"])
def test_what_a_context_leaves_behind(problem, context):
    """Memory that calls share is neither made on a default device nor bound to inference mode."""
    W, c, g = problem
    expected = step(W, c, g)
    cpu._reports.clear()
    with context():
        z = solve(W, c).z
    assert z.device.type == "cpu" and torch.equal(z, solve(W, c).z)
    assert all(map(torch.equal, step(W, c, g), expected))


def test_threads_do_not_share_a_report():
    """Solves that fail beside solves that do not, on four Python threads at once."""
    W, c, _ = gaussian(32, 64)

    def fails(max_iter):
        try:
            deq.solve(W, c, max_iter=max_iter, on_failure="raise")
        except deq.ConvergenceError:
            return True
        return False

    limits = [2, None, 3, None] * 40
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(fails, limits)) == [limit is not None for limit in limits]
