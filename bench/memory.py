"""``deq bench memory``: how much a solve allocates beyond its inputs, in buffers of B x m elements.

Every measurement runs in a fresh process: the resident set's high-water mark is reset just before the solve, so neither
imports nor an allocator that kept earlier memory count. The result itself (z, and the gradient of c) does count.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial

import torch

from deq.profiling.memory import peak_of

from .baselines import engine, has_torchdeq, make_torchdeq, torch_loop
from .cases import MEMORY_MUST, Case

PASSES = ("forward", "forward + backward")


def competitors() -> list[str]:
    """Names of what can be measured here; "deq" is the plain map, "deq auto" what deq chooses by itself. torchdeq's
    Broyden is left out: it allocates 200 buffers before it starts."""
    torchdeq = ["torchdeq fixed_point_iter", "torchdeq anderson"] if has_torchdeq() else []
    return ["deq", "deq auto", "loop", *torchdeq]


def _make(name: str) -> Callable:
    package, _, solver = name.partition(" ")
    if package == "torchdeq":
        return make_torchdeq(solver)
    return {"deq": engine, "deq auto": partial(engine, solver="auto"), "loop": torch_loop}[name]


def measure(case: Case) -> Iterator[dict]:
    """One row a competitor and pass; ``buffers`` is the peak beyond the inputs in units of B x m elements. RuntimeError
    where a process fails, for want of memory say."""
    unit = case.B * case.m * torch.empty((), dtype=getattr(torch, case.dtype)).itemsize
    for name in competitors():
        for which in PASSES:
            peak = _in_fresh_process(name, case, which)
            must = MEMORY_MUST[which] if name.startswith("deq") else None
            yield {
                "case": case.name,
                "variant": name,
                "pass": which,
                "bytes": peak,
                "buffers": peak / unit,
                "must": must,
                "reached": None if must is None else peak / unit <= must,
            }


def _in_fresh_process(name: str, case: Case, which: str) -> int:
    arguments = json.dumps([name, asdict(case), which])
    program = f"import json; from {__name__} import _measure_here; print(_measure_here(*json.loads({arguments!r})))"
    path = os.pathsep.join(filter(None, sys.path))  # the same deq, wherever this one came from
    child = [sys.executable, "-c", program]
    done = subprocess.run(child, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True)
    if done.returncode != 0:  # of a signal where the system has no memory left
        said = done.stderr.strip().splitlines()
        raise RuntimeError(f"{name}, {which}, at {case.name}: {said[-1] if said else f'exit code {done.returncode}'}")
    return int(done.stdout)


def _measure_here(name: str, case: dict, which: str) -> int:
    torch.set_num_threads(1)
    case = Case(**case)
    run = _make(name)
    backward = which == "forward + backward"
    run(Case(case.m, 16, case.family, case.dtype).make(), backward)  # loads and starts everything that comes but once
    problem = case.make()
    return peak_of(lambda: run(problem, backward))
