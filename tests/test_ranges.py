"""Ranges: what is recorded, that it changes nothing, and that it costs nothing where nobody listens."""

import os
import subprocess
import sys
import threading
import time
import timeit

import pytest
import torch
from problems import gaussian

import deq
from deq import _library
from deq.profiling import phase, ranges, record, timeline

needs_library = pytest.mark.skipif(_library.compiled is None, reason=f"no compiled library: {_library.reason}")


def step(W, c, **options):
    solution = deq.solve(W, c, **options)
    return solution, torch.autograd.grad(solution.z.sum(), (W, c))


def leaves(m, B):
    W, c, _ = gaussian(m, B)
    return W.requires_grad_(), c.requires_grad_()


def test_a_step_has_its_ranges():
    W, c = leaves(16, 5)
    with record() as recorder:
        solution, _ = step(W, c)
    assert [event.name for event in recorder.events] == ["solve", "adjoint", "dW"]
    solve, adjoint, dW = recorder.events
    assert solve.shape == adjoint.shape == dW.shape == (5, 16) and solve.dtype == torch.float32
    assert torch.equal(solve.iterations, solution.iterations) and adjoint.iterations.shape == (5,)
    assert solve.plan == solution.plan and dW.iterations is None
    assert all(event.start < event.end for event in recorder.events)
    assert not ranges.listening
    step(W, c)
    assert len(recorder.events) == 3
    assert (
        repr(recorder) == "Recorder(1 solve, 1 adjoint, 1 dW)"
        and repr(ranges.Recorder()) == "Recorder(nothing recorded)"
    )


def test_recording_changes_no_bit():
    W, c = leaves(33, 9)
    plain, gradients = step(W, c)
    with record(inside=True):
        recorded, others = step(W, c)
    assert torch.equal(plain.z, recorded.z) and all(map(torch.equal, gradients, others))


def test_recorders_nest_and_see_all_threads():
    W, c = leaves(8, 3)
    with record() as outer:
        with record() as inner:
            deq.solve(W, c)
        thread = threading.Thread(target=lambda: deq.solve(W.detach(), c.detach()))
        thread.start()
        thread.join()
    assert len(inner.events) == 1 and len(outer.events) == 2
    assert len({event.thread for event in outer.events}) == 2


def test_recorders_of_several_threads_do_not_lose_each_other():
    lost = []

    def use(name):
        for _ in range(3000):
            with record() as recorder, phase(name):
                pass
            lost.extend(name for _ in range(sum(event.name == name for event in recorder.events) != 1))

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=use, args=(str(i),)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(before)
    assert not lost and not ranges._recorders and not ranges.listening


def test_a_range_ends_where_a_solve_raises():
    W, c = leaves(8, 3)
    with record() as recorder, pytest.raises(deq.ConvergenceError):
        deq.solve(W, c, max_iter=1, on_failure="raise")
    assert [event.name for event in recorder.events] == ["solve"] and not ranges.listening


@needs_library
def test_structured_weights_have_a_range():
    for W in (deq.weights.LowerTriangular(torch.eye(6) / 2), deq.weights.Diagonal(torch.full((6,), 0.5))):
        with record() as recorder:
            deq.solve(W, torch.ones(2, 6, requires_grad=True)).z.sum().backward()
        solve, adjoint = recorder.events
        assert (solve.name, solve.iterations.tolist()) == ("solve", [1, 1])
        assert (adjoint.name, adjoint.shape, adjoint.iterations) == ("adjoint", (2, 6), None)


def test_a_direct_method_that_is_not_taken_has_no_range():
    W, c = leaves(64, 2)
    with record() as recorder:
        step(W, c, activation="identity")  # few samples of a weight that is trained are iterated
    assert [event.name for event in recorder.events] == ["solve", "adjoint", "dW"]
    layer = deq.nn.EquilibriumLinear(3, 24, weight="diagonal_low_rank")  # so small that it is iterated
    with record() as recorder:
        layer(torch.ones(4, 3)).sum().backward()
    assert [event.name for event in recorder.events] == ["solve", "adjoint", "dW"]


def test_a_solve_in_a_compiled_graph_has_a_range():
    W, c = leaves(6, 3)
    solve = torch.compile(lambda W, c: deq.solve(W, c).z, backend="aot_eager", fullgraph=True)
    with record() as recorder:
        solve(W, c).sum().backward()
    assert [event.name for event in recorder.events if event.name != "dW"] == ["solve", "adjoint"]
    assert recorder.events[0].iterations.tolist() == deq.solve(W, c).iterations.tolist()


@needs_library
def test_inside_the_compiled_library():
    W, c = leaves(128, 40)
    _library.compiled.deq_cpu_clear_cache()
    with record(inside=True) as recorder:
        solution = deq.solve(W.detach(), c.detach(), solver="anderson")
    inside = [event for event in recorder.events if event.payload is not None]
    (solve,) = (event for event in recorder.events if event.name == "solve")
    assert all(solve.start <= event.start < event.end <= solve.end for event in inside)
    by = {name: [e.payload for e in inside if e.name == name] for name in ranges.INSIDE}
    assert by["pack"] == [128]
    assert sum(by["step"]) == int((solution.iterations - 1).sum())  # the rows of all steps
    assert len(by["Anderson"]) == int((solution.iterations - 2).sum()) and set(by["Anderson"]) <= {1, 2, 3, 4, 5}
    with record(inside=True) as recorder:
        deq.solve(W.detach(), c.detach(), solver="plain")
    assert not any(event.name in ("pack", "Anderson") for event in recorder.events)


@needs_library
def test_anchors_are_told_from_steps():
    if not deq.info().increments:
        pytest.skip("this CPU or build multiplies increments in float32 only")
    W, c = leaves(256, 32)
    with record(inside=True) as recorder:
        deq.solve(W.detach(), c.detach())
    names = {event.name for event in recorder.events}
    assert {"solve", "step", "anchor"} <= names


@needs_library
def test_timeline_is_text():
    W, c = leaves(64, 16)
    with record(inside=True) as recorder, phase("training"):
        step(W, c, solver="anderson")
    lines = timeline(recorder).splitlines()
    assert max(map(len, lines)) <= 80
    text = "\n".join(lines)
    assert "training" in text and "  solve 16 x 64" in text and "Anderson x" in text
    indent = {word: next(line for line in lines if word in line).index(word) for word in ("training", "solve", "dW")}
    assert indent["training"] + 2 == indent["solve"] == indent["dW"]
    assert timeline(ranges.Recorder()) == "nothing was recorded"
    with pytest.raises(TypeError, match=r"recorder must be what `with record\(\) as recorder:` gives; got"):
        timeline(record())


def best(statement, number=20_000, repeat=9):
    return min(timeit.repeat(statement, number=number, repeat=repeat)) / number


def test_a_range_costs_nothing_where_nobody_listens():
    """What the hot path does is to read one flag: less than 0.2 us, the time of two empty calls, on any machine."""
    assert not ranges.listening
    code = compile("if ranges.listening: pass", "range", "exec")
    empty = compile("pass", "empty", "exec")
    names = {"ranges": ranges}
    cost = best(lambda: exec(code, names)) - best(lambda: exec(empty, names))
    assert cost < 0.2e-6
    call = best(lambda: None)
    assert cost < 4 * call  # whatever the machine


@needs_library
def test_a_range_in_the_library_costs_nothing_where_nobody_listens():
    """By processor time, in turns with the same solve while all its ranges are recorded."""
    W, c, _ = gaussian(32, 64, scale=0.9)

    def seconds():
        start = time.thread_time()
        deq.solve(W, c, solver="anderson", on_failure="ignore")
        return time.thread_time() - start

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        silent, heard, spans = [], [], 0
        for _ in range(15):
            silent.append(seconds())
            with record(inside=True) as recorder:
                heard.append(seconds())
            spans = len(recorder.events)
    finally:
        torch.set_num_threads(before)
    assert spans > 100
    assert min(heard) - min(silent) < spans * 2e-6  # recording costs below 2 us a range; silence costs less still


def test_nvtx_is_asked_for_nothing_without_a_tool():
    nvtx = pytest.importorskip("nvtx", reason="ranges reach NVTX through its package")
    assert not ranges._has_tool and not isinstance(ranges._domain, nvtx.Domain)
    cost = best(lambda: (ranges._domain.push_range(None), ranges._domain.pop_range()), number=5000)
    assert cost < 2e-6


def test_ranges_without_the_nvtx_package():
    code = """
import sys
sys.modules["nvtx"] = None
import torch, deq
from deq.profiling import record
with record() as recorder:
    deq.solve(torch.eye(3) / 2, torch.ones(2, 3))
assert [event.name for event in recorder.events] == ["solve"]
"""
    path = os.pathsep.join(filter(None, sys.path))
    child = [sys.executable, *(["-S"] if sys.flags.no_site else []), "-c", code]
    done = subprocess.run(child, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
