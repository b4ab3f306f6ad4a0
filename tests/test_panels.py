"""Threads that share the columns of a step (csrc/cpu/threads.h): no bit of an answer tells how many there were."""

import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from close import assert_as_accurate
from problems import exact, gaussian, torch_loop

from deq import _library, stats
from deq.backends import cpu
from deq.plan import INCREMENTS, make_plan

pytestmark = pytest.mark.skipif(_library.compiled is None, reason=f"no compiled library: {_library.reason}")
LOW = [n for n, i in INCREMENTS.items() if i and _library.compiled and _library.compiled.deq_cpu_has_precision(i)]
WIDTHS = [512, 1100, 2048]  # 2, 4 and 8 segments; the columns of 1100 end in half a vector
DTYPES = {torch.float32: "float32", torch.float64: "float64"}


@pytest.fixture
def with_threads():
    """``with_threads(n, f)``: f() with n threads."""
    before = torch.get_num_threads()

    def run(threads, f):
        torch.set_num_threads(threads)
        return f()

    yield run
    torch.set_num_threads(before)


def plan(dtype, increments="native", solver="plain"):
    made = make_plan(dtype=DTYPES[dtype], device="cpu", solver=solver, backend="cpu", compiled=True)
    return replace(made, increments=increments)


def answer(outcome):
    """Everything a solve says about every sample."""
    return outcome.z, *(read(outcome.z, outcome.stats) for read in (stats.iterations, stats.residual, stats.status))


def assert_shared(with_threads, run, batch):
    """run(rows) for a slice of a batch: the same bits for B = 1, 2, 3, 5 on 1 to 5 threads as in the whole batch."""
    expected = with_threads(1, lambda: run(slice(0, batch)))
    assert (expected[3] == 0).all()  # all have converged
    for threads in (1, 2, 3, 5):
        for b in (1, 2, 3, 5):
            rows = slice(batch - b, batch)
            actual = with_threads(threads, lambda rows=rows: run(rows))
            for one, other in zip(actual, expected, strict=True):
                assert torch.equal(one, other[rows]), f"{b} samples on {threads} threads"


@pytest.mark.parametrize("m", WIDTHS)
@pytest.mark.parametrize("activation", ["relu", "tanh"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_solve(m, activation, dtype, isa, with_threads):
    W, c, _ = gaussian(m, 9, dtype)
    made = plan(dtype)
    assert_shared(with_threads, lambda rows: answer(cpu.solve(W, c[rows], None, activation, made)), 9)


@pytest.mark.parametrize("m", WIDTHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_adjoint(m, dtype, isa, with_threads):
    W, c, g = gaussian(m, 9, dtype)
    d = (c > 0).to(dtype)
    made = plan(dtype)
    assert_shared(with_threads, lambda rows: answer(cpu.masked_linear(W.mT, g[rows], d[rows], None, made)), 9)


@pytest.mark.parametrize("reflected", [False, True])
@pytest.mark.parametrize("solver", ["auto", "anderson"])
def test_reflected_and_accelerated(reflected, solver, isa, with_threads):
    W, c, g = gaussian(700, 9, scale=0.9)
    W = W / (4 if reflected else 1)
    d, made = torch.rand_like(g), plan(torch.float32, solver=solver)
    for run in (
        lambda rows: answer(cpu.solve(W, c[rows], None, "relu", made, reflected=reflected)),
        lambda rows: answer(cpu.solve(W, c[rows], c[rows], "tanh", made, reflected=reflected)),
        lambda rows: answer(cpu.masked_linear(W.mT, g[rows], d[rows], None, made, reflected=reflected)),
    ):
        assert_shared(with_threads, run, 9)


@pytest.mark.parametrize("m", WIDTHS)
@pytest.mark.parametrize("activation", ["relu", "tanh"])
def test_increments(m, activation, isa, with_threads):
    here = [n for n in LOW if _library.compiled.deq_cpu_has_precision(INCREMENTS[n])]
    if not here:
        pytest.skip(f"no increments go with {isa}")
    W, c, g = gaussian(m, 9, scale=0.7)
    d = (c > 0).float()
    for increments in here:
        made = plan(torch.float32, increments)
        assert_shared(with_threads, lambda rows: answer(cpu.solve(W, c[rows], None, activation, made)), 9)  # noqa: B023
        assert_shared(with_threads, lambda rows: answer(cpu.masked_linear(W.mT, g[rows], d[rows], None, made)), 9)  # noqa: B023


def test_several_weights(with_threads):
    """Fewer matrices than threads: each in turn, with all threads."""
    parts = [gaussian(520, 3, seed=s) for s in range(2)]
    W, c = (torch.stack([p[i] for p in parts]) for i in (0, 1))
    made = plan(torch.float32)
    together = with_threads(3, lambda: cpu.solve(W, c, None, "relu", made).z)
    for s, (Ws, cs, _) in enumerate(parts):
        assert torch.equal(together[s], with_threads(1, lambda: cpu.solve(Ws, cs, None, "relu", made).z))  # noqa: B023


def test_accuracy(with_threads):
    for m in WIDTHS:
        W, c, _ = gaussian(m, 2)
        z = with_threads(2, lambda: cpu.solve(W, c, None, "relu", plan(torch.float32)).z)  # noqa: B023
        assert_as_accurate(z, torch_loop(W, c), exact(W, c))


@pytest.mark.parametrize("increments", ["native", *LOW[:1]])
def test_busy_cores_do_not_hang_it(increments, with_threads):
    """Threads lose their cores in the middle of steps: every solve ends, with the same bits."""
    W, c, _ = gaussian(1024, 2)
    made = plan(torch.float32, increments)
    solve = lambda: answer(cpu.solve(W, c, None, "relu", made))  # noqa: E731
    expected = with_threads(1, solve)
    count = 2 * torch.get_num_threads() + 2
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(min(count, 8))]
    try:
        end = time.monotonic() + 4
        solved = 0
        while time.monotonic() < end or solved < 5:
            for threads in (2, 4):
                actual = with_threads(threads, solve)
                assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
                solved += 1
            assert time.monotonic() < end + 60
    finally:
        for process in busy:
            process.kill()
            process.wait()
