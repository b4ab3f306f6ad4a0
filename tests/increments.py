"""Solves with low-precision increments (csrc/cpu/delta.cpp), as its tests use them."""

from dataclasses import replace

import pytest
import torch

from deq import Status, _library, stats
from deq.backends import cpu
from deq.plan import INCREMENTS, make_plan

LOW = [n for n, i in INCREMENTS.items() if i and _library.compiled and _library.compiled.deq_cpu_has_precision(i)]
on_such_cpus = pytest.mark.skipif(not LOW, reason="this CPU or build multiplies no low-precision increments")
every = pytest.mark.parametrize("increments", LOW)
DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


def plan(increments="int8", dtype=torch.float32, solver="plain", **options):
    made = make_plan(dtype=DTYPES[dtype], device="cpu", solver=solver, backend="cpu", compiled=True, **options)
    return replace(made, increments=increments)


class Solved:
    """An outcome with what each sample says."""

    def __init__(self, outcome):
        self.z = outcome.z
        self.report = outcome.report
        self.iterations, self.residual, self.status = (
            read(outcome.z, outcome.stats) for read in (stats.iterations, stats.residual, stats.status)
        )
        self.converged = self.status == Status.CONVERGED


def solve(W, c, activation="relu", increments="int8", z0=None, reflected=False, **options):
    made = plan(increments, c.dtype, **options)
    return Solved(cpu.solve(W, c, z0, activation, made, reflected=reflected))


def adjoint(W, g, d, increments="int8", value_of=None, reflected=False, **options):
    return Solved(cpu.masked_linear(W, g, d, value_of, plan(increments, g.dtype, **options), reflected=reflected))


def on_threads(counts, run):
    before = torch.get_num_threads()
    try:
        for threads in counts:
            torch.set_num_threads(threads)
            yield run()
    finally:
        torch.set_num_threads(before)
