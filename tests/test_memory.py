"""The promise "lean": what solves take of the process's memory, against the theory, and that nothing leaks.

Peaks are read from the system, in a fresh process each, so that they hold whatever allocates: tensors, the engine's
workspace, torch's own. Theory: deq/profiling/memory.py, and m x m for the packed W where it is seen first.
"""

import ctypes
import gc
import json
import os
import subprocess
import sys

import pytest
import torch
from problems import gaussian

import deq
from deq import _library, cache
from deq.bench.timing import threads
from deq.profiling import memory

pytestmark = [
    pytest.mark.skipif(_library.compiled is None, reason=f"no compiled library: {_library.reason}"),
    pytest.mark.skipif(not memory.can_measure(), reason="peaks are read from Linux's /proc"),
]

PROGRAM = """
import json, sys
import torch
import deq
from deq import _library, recycle
from deq.profiling import memory
m, B, solver, trains = json.loads(sys.argv[1])
torch.set_num_threads(2)

def leaves(B):
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(m, m, generator=generator).mul_(0.45 / m**0.5)
    c = torch.randn(B, m, generator=generator)
    return (W.requires_grad_(), c.requires_grad_()) if trains else (W, c)

def run(W, c, g):
    solution = deq.solve(W, c, solver=solver, on_failure="raise")
    return solution, torch.autograd.grad(solution.z, (W, c), g) if trains else ()

W, c = leaves(32)
run(W, c, torch.ones_like(c))  # starts the threads, loads what is loaded but once
torch.mm(torch.ones(B, m).mT, torch.ones(B, m))  # the product of dW has 2 MB of its own, which MKL keeps
recycle.empty_like(torch.empty(2 * recycle.LEAST_BYTES))  # numpy's part in it is loaded now
W, c = leaves(B)
g = torch.full_like(c, 1 / B)
_library.compiled.deq_cpu_clear_cache()
packed = _library.compiled.deq_cpu_cache_bytes()
peak = memory.peak_of(lambda: run(W, c, g))
packed = _library.compiled.deq_cpu_cache_bytes() - packed
solved = memory.Solved((B, m), torch.float32, trains)
theory = memory.backward_bytes([solved], [solved]) if trains else memory.forward_bytes([solved])
print(json.dumps([peak, theory, packed]))
"""


def in_fresh_process(*settings):
    path = os.pathsep.join(filter(None, sys.path))
    child = [sys.executable, *(["-S"] if sys.flags.no_site else []), "-c", PROGRAM, json.dumps(settings)]
    done = subprocess.run(child, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("trains", [False, True], ids=["forward", "forward + backward"])
@pytest.mark.parametrize("solver", ["auto", "plain"])
@pytest.mark.parametrize("shape", [(256, 16384), (4096, 64)], ids=str)
def test_peak_is_the_theory_within_5_percent(shape, solver, trains):
    peak, theory, packed = in_fresh_process(*shape, solver, trains)
    assert peak == pytest.approx(theory + packed, rel=0.05), (peak, theory, packed)


def test_packed_weights_are_a_few_matrices():
    """W and its transpose, each in float32 and in the two planes of the increments: 1.5 m x m at most, not counting
    what pads a row to the width of vectors, nor the five numbers that a plane holds of every row."""
    *_, plain = in_fresh_process(512, 64, "plain", True)
    *_, auto = in_fresh_process(512, 64, "auto", True)
    matrix = 512 * 512 * 4
    assert 2 * matrix <= plain <= 2.02 * matrix
    assert plain <= auto <= 3.04 * matrix


@pytest.mark.parametrize("options", [{}, {"solver": "anderson"}, {"solver": "cayley"}], ids=str)
def test_a_thousand_steps_leak_nothing(options):
    """Weights change at every step, as in training. What is remembered of them is bounded, and forgotten here before
    the process is looked at."""
    W, c, g = gaussian(48, 24)
    W, c = W.requires_grad_(), c.requires_grad_()

    def steps(count):
        for _ in range(count):
            z = deq.solve(W, c, on_failure="raise", **options).z
            dW, _ = torch.autograd.grad(z, (W, c), g)
            with torch.no_grad():
                W.sub_(dW, alpha=1e-6)

    def held():
        _library.compiled.deq_cpu_clear_cache()
        cache.clear()
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        return len(gc.get_objects()), memory.packed_bytes(), memory.resident()

    with threads(1):
        steps(1000)  # as many: the Cayley map's matrices lie between other things while they are remembered
        after = held()
        for _ in range(3):  # a leak grows every time; an allocator that spreads over more pages does not
            before = after
            steps(1000)
            after = held()
            if after[2] - before[2] < 1 << 20:
                break
    assert after[0] - before[0] < 20
    assert after[1] == before[1] == 0
    assert after[2] - before[2] < 1 << 20  # one row of 24 floats a step with its tensor would be half of it


def test_running_out_is_an_error_that_says_so():
    """Beside 64 MB of panels there is no room for the float32 copy that a 16-bit weight is packed from."""
    program = """
import resource, torch, deq
torch.set_num_threads(1)
deq.solve(torch.eye(4) / 2, torch.ones(2, 4), solver="plain")
W, c = (torch.zeros(n, 4096, dtype=torch.bfloat16) for n in (4096, 1))
with open("/proc/self/statm") as file:
    now = int(file.read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (now + (90 << 20), -1))
try:
    deq.solve(W, c, solver="plain", backend="cpu")
except RuntimeError as error:
    print(error)
resource.setrlimit(resource.RLIMIT_AS, (-1, -1))
print(bool(deq.solve(W, c, solver="plain", backend="cpu").converged))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["deq::solve_: not enough memory", "True"]
