"""Weights of low-precision increments: used as they lie, or packed; new ones in old memory; planes of any size."""

import pytest
import torch
from close import assert_as_accurate
from increments import LOW, every, on_such_cpus, on_threads, solve
from problems import exact, gaussian, torch_loop

from deq import Status, _library
from deq.profiling.counter import Work

pytestmark = on_such_cpus

COLUMNS = [(256, 1), (257, 3), (300, 8), (333, 16), (527, 4), (1030, 9), (1100, 2)]
ROWS = [(640, 4), (641, 1), (643, 8), (777, 16), (1030, 9), (650, 3), (650, 17), (700, 32), (1670, 5)]


@every
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("order", "m", "B"), [("columns", *p) for p in COLUMNS] + [("rows", *p) for p in ROWS])
def test_weights_that_are_new_are_used_in_place(order, m, B, threads, increments):
    """A W whose columns or rows are contiguous is not packed for a few samples before it is seen again, nor then at the
    widths where reading it in place is faster; no answer shows it."""
    parts = [gaussian(m, 40, seed=s) for s in range(2)]
    wide, c = torch.zeros(2, m, m + 7), torch.stack([p[1] for p in parts])
    W = wide[..., 3 : m + 3] if order == "rows" else wide[..., 3 : m + 3].mT
    W.copy_(torch.stack([p[0] for p in parts]))
    library = _library.compiled
    if order == "rows" and library.deq_cpu_isa() != b"avx512":
        B = min(B, 16)  # two vectors of samples
    few = c[:, :B]
    stays = 1664 <= m <= 2304 if order == "rows" else m >= 640

    def run():
        library.deq_cpu_clear_cache()
        new = solve(W, few, "tanh", increments)
        held = library.deq_cpu_cache_bytes()
        known = solve(W, few, "tanh", increments)
        if not stays:
            assert library.deq_cpu_cache_bytes() >= held + W.numel() * W.element_size()
        else:
            assert library.deq_cpu_cache_bytes() == held
        library.deq_cpu_clear_cache()
        return new, known, solve(W, c, "tanh", increments)

    ((new, known, packed),) = on_threads([threads], run)
    for name in ("z", "iterations", "residual", "status"):
        assert torch.equal(getattr(new, name), getattr(known, name))
        assert torch.equal(getattr(new, name), getattr(packed, name)[:, :B])
    assert_as_accurate(new.z[1], torch_loop(W[1], few[1], "tanh"), exact(W[1], few[1], "tanh"))
    for at in ((0, m - 1, 0), (1, 5, m - 1)):
        for value in (float("nan"), float("-inf")):
            bad = W.clone() if order == "rows" else W.mT.clone().mT
            bad[at] = value
            assert solve(bad, few, "tanh", increments).report[1] == 1 + (at[0] * m + at[1]) * m + at[2]


@every
@pytest.mark.parametrize("order", ["columns", "rows"])
def test_planes_larger_than_caches(order, increments):
    """The second one is written past them, whichever way it is made; corrections, which read it, find it there."""
    m = 2060
    W, c, _ = gaussian(m, 40)
    W = W if order == "rows" else W.mT.contiguous().mT

    def run():
        _library.compiled.deq_cpu_clear_cache()
        return [solve(W, rows, "tanh", increments) for rows in (c[:3], c)]  # in place, and packed

    for few, many in on_threads([1, 2], run):
        assert Work.last().correction_rows > 0 or increments == "bfloat16"  # which needs none here
        for name in ("z", "iterations", "residual", "status"):
            assert torch.equal(getattr(few, name), getattr(many, name)[:3])
    residual = (torch.tanh(many.z.double() @ W.double().mT + c) - many.z).norm(dim=-1) / many.z.norm(dim=-1)
    assert (many.status == Status.CONVERGED).all() and float(residual.max()) < 1.1e-5


@every
def test_new_weights_in_old_memory_are_new_weights(increments):
    W, c, _ = gaussian(64, 10)
    for seed in range(3):
        fresh, _, _ = gaussian(64, 10, seed=seed)
        W.data.copy_(fresh)
        assert_as_accurate(solve(W, c, increments=increments).z, torch_loop(W, c), exact(W, c))
    _library.compiled.deq_cpu_clear_cache()
    solve(W, c, increments="native")
    native = _library.compiled.deq_cpu_cache_bytes()
    solve(W, c, increments=increments)
    assert _library.compiled.deq_cpu_cache_bytes() > native
    _library.compiled.deq_cpu_clear_cache()
    assert _library.compiled.deq_cpu_cache_bytes() == 0


@pytest.mark.parametrize("increments", ["native", *LOW])
def test_other_shapes_in_old_memory(increments):
    """(4, 48, 48) and (96, 96) have packed forms of one size: the memory of one must not be taken for the other's."""
    memory, c, _ = gaussian(96, 24, seed=5)
    stacked, parts = memory.view(4, 48, 48), c.view(4, 12, 48)
    for _ in range(2):
        assert_as_accurate(solve(memory, c, increments=increments).z, torch_loop(memory, c), exact(memory, c))
        solved = solve(stacked, parts, increments=increments)
        for s in range(4):
            plain, truth = torch_loop(stacked[s], parts[s]), exact(stacked[s], parts[s])
            assert_as_accurate(solved.z[s], plain, truth)
        memory.mul_(0.9)
