"""What the host does around Triton's kernels: which backend it takes, what it launches, when it reads a status."""

import warnings
from collections import defaultdict
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch
import triton
from problems import gaussian

import deq
from deq import _cuda, _library, _triton, implicit, options, stats
from deq.activations import ACTIVATIONS
from deq.backends import chunks, get_backend, triton_resident
from deq.backends.triton_kind import Kind
from deq.kernels import records, solve_resident
from deq.plan import make_plan
from deq.solvers.generic import Rule, triton_steps


def test_without_interpreter_and_gpu_the_error_says_so(monkeypatch):
    W, c, _ = gaussian(4, 2)
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    _triton._why_not.cache_clear()
    options.problem_of.cache_clear()
    with pytest.raises(ValueError, match=r"backend='triton' cannot solve cpu tensors here: .*interpreter"):
        deq.solve(W, c, backend="triton")
    monkeypatch.undo()
    _triton._why_not.cache_clear()


def test_where_nothing_can_build_its_launcher_a_gpu_is_left_to_the_reference(monkeypatch):
    """As in a runtime image without a C compiler."""

    class Nothing:
        @property
        def active(self):
            raise RuntimeError("Failed to find C compiler")

    for name, value in (("is_available", True), ("device_count", 1), ("get_device_capability", (9, 0))):
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    monkeypatch.setattr(triton.runtime, "driver", Nothing())
    for cached in (_triton._why_not, _triton.why_not_launch):
        cached.cache_clear()
    try:
        assert _triton.why_not("cuda") == "Triton cannot launch kernels here: Failed to find C compiler"
        assert not triton_steps.serves(SimpleNamespace(is_cuda=True), Rule("anderson", 1e-4, 9))
    finally:
        monkeypatch.undo()
        for cached in (_triton._why_not, _triton.why_not_launch):
            cached.cache_clear()


def test_a_gpu_that_is_too_old_keeps_the_kernels_from_itself_alone(monkeypatch):
    capabilities = [(9, 0), (7, 5)]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: capabilities[i])
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(_triton, "why_not_launch", lambda: "")
    monkeypatch.setattr(_library, "has_cuda", True)
    asked = (_triton._why_not, _cuda.why_not, options.problem_of)
    for cached in asked:
        cached.cache_clear()
    try:
        for why_not in (_triton.why_not, _cuda.why_not):
            assert [why_not(device) for device in ("cuda:0", "cuda")] == ["", ""]
            assert why_not("cuda:1") == "its kernels need compute capability 8.0; it has 7.5"
            assert why_not("cuda:2") == "torch sees no such device"
        given = ("tanh", None, None, "auto", "residual", "implicit", "warn", "auto", torch.float32)
        plans = [options.problem_of(*given, device, True).plan for device in ("cuda:0", "cuda:1")]
        assert [plan.backend for plan in plans] == ["cuda", "reference"]
    finally:
        monkeypatch.undo()
        for cached in asked:
            cached.cache_clear()


def test_float64_goes_to_the_reference_and_says_why():
    W, c, _ = gaussian(4, 2, torch.float64)
    plan = deq.solve(W, c, backend="triton").plan
    assert plan.backend == "reference" and any("float64" in reason for reason in plan.why)


def test_a_gradient_in_a_capture_is_not_read_before_it_runs(monkeypatch):
    monkeypatch.setattr(get_backend("triton"), "is_deferred", lambda c: True)
    W, c, g = gaussian(4, 3)
    solution = deq.solve(W.requires_grad_(), c, backend="triton", max_iter=30)
    with monkeypatch.context() as capture:
        capture.setattr(implicit, "is_captured", lambda u: True)
        solution.z.backward(g)
    assert not implicit._unread


def test_a_weight_that_was_changed_since_is_not_blamed(monkeypatch):
    """As by the step of an optimiser that ends in NaN: the solve before it was of another weight."""
    monkeypatch.setattr(get_backend("triton"), "is_deferred", lambda c: True)
    W, c = 0.3 * torch.eye(4), torch.ones(3, 4)
    before = deq.solve(W, c, backend="triton")
    W[1, 2] = torch.nan
    assert before.converged.all()
    after = deq.solve(W, c, backend="triton")
    with pytest.raises(ValueError, match=r"W must be finite; W\[1, 2\] is nan"):
        after.status  # noqa: B018


def test_gradients_are_read_on_the_stream_that_computes_them(monkeypatch):
    """Whoever reads a status may work on another, where nothing waits for them: what is read is not written yet."""
    now, read = ["one"], []

    class Report:
        samples = 1

        def read(self):
            read.append(now[-1])
            return [0, 0, 0, 0]

    @contextmanager
    def on(stream):
        now.append(stream)
        yield
        now.pop()

    monkeypatch.setattr(implicit, "_tallies", {torch.device("cuda:0"): None})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: now[-1])
    monkeypatch.setattr(torch.cuda, "stream", on)
    u = SimpleNamespace(is_cuda=True, device=torch.device("cuda:0"))
    with on("another"):
        implicit.report_later(Report(), "warn", u)
    implicit.report_later(Report(), "warn", u)
    implicit.report_gradients(SimpleNamespace(z=torch.zeros(1)))
    assert read == ["another", "one"]


def test_a_gradient_in_a_capture_that_fails_is_told_of_once_it_has_run(monkeypatch):
    """At the next status that is read, with those of all replays since."""
    monkeypatch.setattr(get_backend("triton"), "is_deferred", lambda c: True)
    slow, one = torch.tensor([[0.99]]).requires_grad_(), torch.ones(2, 1)

    def solve(on_failure="warn"):
        options = {"backend": "triton", "solver": "plain", "max_iter": 5, "on_failure": on_failure}
        return deq.solve(slow, one, z0=100 * one, **options)

    solve("ignore").z.backward(one)
    with monkeypatch.context() as capture:
        capture.setattr(implicit, "is_captured", lambda u: True)
        solve().z.backward(one)  # without a warm-up there is nowhere to count
        assert not implicit._replayed
    solve().z.backward(one)
    implicit._unread.clear()
    with monkeypatch.context() as capture:
        capture.setattr(implicit, "is_captured", lambda u: True)
        for _ in range(2):
            solve().z.backward(one)
    assert not implicit._unread
    with pytest.warns(deq.ConvergenceWarning, match="gradient of deq.solve: 4 samples did not converge in replays"):
        solve().status  # noqa: B018
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        solve().status  # noqa: B018
    with monkeypatch.context() as capture:
        capture.setattr(implicit, "is_captured", lambda u: True)
        solve("raise").z.backward(one)
    with pytest.raises(deq.ConvergenceError, match="2 samples did not converge in replays"):
        solve().status  # noqa: B018


def test_a_deferred_report_surfaces_when_the_status_is_read(monkeypatch):
    """As on a GPU, where nothing is read before."""
    monkeypatch.setattr(get_backend("triton"), "is_deferred", lambda c: True)
    W, c, _ = gaussian(4, 3)
    grows = deq.solve(5 * torch.eye(4), c.abs(), backend="triton", solver="plain")
    with pytest.warns(deq.ConvergenceWarning, match="3 of 3 samples did not converge"):
        assert (grows.status == deq.Status.DIVERGED).all()
    assert (grows.status == deq.Status.DIVERGED).all()  # and says so once
    c[2, 1] = float("nan")
    wrong = deq.solve(W, c, backend="triton")
    with pytest.raises(ValueError, match=r"c must be finite; c\[2\]"):
        wrong.converged  # noqa: B018
    slow, one = torch.tensor([[0.99]]).requires_grad_(), torch.ones(1, 1)
    short = deq.solve(slow, one, z0=100 * one, backend="triton", solver="plain", max_iter=5, on_failure="warn")
    short.z.backward(one)
    with pytest.warns(deq.ConvergenceWarning, match="the gradient of deq.solve: 1 of 1 samples did not converge"):
        short.status  # noqa: B018
    raises = deq.solve(5 * torch.eye(4), c[:1].abs(), backend="triton", solver="plain", on_failure="raise").detach()
    with pytest.raises(deq.ConvergenceError):
        raises.status  # noqa: B018


def test_what_is_launched_on_a_device_and_in_which_order(monkeypatch):
    """The part of a loop that only a GPU runs, with its streams, events and graphs replaced: four turns are needed."""
    launched, left = [], [0]

    class Graph:
        def __init__(self, launch):
            launched.append("capture")
            self.replay = launch

    class Copy:  # in pinned memory
        def copy_(self, counters, non_blocking):
            self.read = left[0]

        def tolist(self):
            return [self.read, 7]

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(chunks, "_captured", lambda launch, device: Graph(launch))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "this one")
    recorded = []
    event = SimpleNamespace(record=recorded.append, synchronize=lambda: None)
    loop = chunks.Loop(torch.device("cpu"))
    loop._seen = [(Copy(), event), (Copy(), event)]

    def begin():
        launched.append("begin")
        left[0] = 4

    def turn(t):
        launched.append(t)
        left[0] -= 1

    counters = SimpleNamespace(device=SimpleNamespace(type="cuda"))
    for expected in (
        ["begin", 0, 1, "capture", 2, 3, "capture", 4, 5, "end"],  # at first nothing is compiled
        ["capture", "begin", 0, 1, 2, 3, 4, 5, "capture", "end"],
        ["begin", 0, 1, 2, 3, 4, 5, "end"],
    ):
        launched.clear()
        assert loop.repeat(begin, turn, lambda: launched.append("end"), 40, 6, 2, counters) == 7
        assert launched == expected
    launched.clear()
    assert loop.repeat(begin, turn, lambda: launched.append("end"), 2, 6, 2, counters) is None
    assert launched == ["begin", 0, 1, "end"] and set(recorded) == {"this one"}


def test_graphs_are_captured_on_a_stream_that_nobody_else_has(monkeypatch):
    """Those of torch.cuda.Stream come from a pool, and another thread may work on the same one."""
    made, used = [], []

    def create(at, flags):
        made.append(flags)
        at._obj.value = 77
        return 0

    class Graph:
        def capture_begin(self, capture_error_mode):
            used.append(capture_error_mode)

        def capture_end(self):
            used.append("end")

    monkeypatch.setattr(chunks, "_streams", {})
    monkeypatch.setattr(chunks.ctypes, "CDLL", lambda name: SimpleNamespace(cuStreamCreate=create))
    monkeypatch.setattr(torch.cuda, "ExternalStream", lambda stream, device: (stream, device))
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: "of the pool")
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: used.append(stream) or nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    device = torch.device("cuda", 1)
    for _ in range(2):
        chunks._captured(lambda: used.append("launch"), device)
    assert used == 2 * [(77, device), "thread_local", "launch", "end"] and made == [1]
    used.clear()
    with pytest.raises(RuntimeError, match="no room"):
        chunks._captured(lambda: (_ for _ in ()).throw(RuntimeError("no room")), device)
    assert used == [(77, device), "thread_local", "end"] and not chunks._capturing.locked()


def test_the_table_is_written_either_way(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)  # which needs a CUDA build
    loop = chunks.Loop(torch.device("cpu"))
    loop.fill(list(range(100, 100 + len(records.TABLE))))
    by_kernel = loop.table.clone()
    loop.table.zero_()
    loop._graphs["any"] = None
    loop.fill(list(range(100, 100 + len(records.TABLE))))
    assert torch.equal(loop.table, by_kernel) and by_kernel[len(records.TABLE) - 1] == 99 + len(records.TABLE)


def test_places_in_a_weight_of_far_rows(monkeypatch):
    """A resident program counts them by 32 bits: rows that lie 2^25 elements apart are brought together first."""
    launched = []
    monkeypatch.setattr(
        solve_resident, "solve_kernel", defaultdict(lambda: lambda W, *_, **options: launched.append(W.stride()))
    )
    plan = make_plan(dtype="float32", device="cpu", compiled=False)
    kind = Kind(False, False, ACTIVATIONS["relu"], plan)
    c = torch.empty(3, 64, device="meta")
    place = stats.Place(stats.allocate(c), 3)
    for stride in (1 << 24, 1 << 25):
        W = torch.empty_strided((64, 64), (stride, 1), device="meta")
        for given in (W, W.mT):
            triton_resident.solve_rows(kind, SimpleNamespace(increments="native"), given, c, None, None, c, place, 1.0)
    assert launched == [(1 << 24, 1), (1, 1 << 24), (64, 1), (64, 1)]
