"""``deq bench cpu``: forward + backward times against baselines, errors beside them, and the kernel's share of peak."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from deq import _library

from .baselines import (
    TORCHDEQ_SOLVERS,
    Answer,
    engine,
    has_torchdeq,
    make_engine,
    make_gemm_only,
    make_torchdeq,
    torch_loop,
)
from .cases import KERNEL_MUST, Case, Problem
from .timing import interleave

FLOAT32 = 0  # DeqType in csrc/kernels.h


def measure(case: Case, threads: int, seconds: float) -> list[dict]:
    """Rows of one case: deq first, then loop, torchdeq (its fastest solver) and gemm, with ``ratio`` over deq's time.

    One thread is timed by its own processor time, several by the wall clock.
    """
    with _threads(threads):
        problem = case.make()
        z, dW = problem.exact()
        answers = {"deq": engine(problem), "loop": torch_loop(problem)}
        competitors: dict[str, Callable[[], object]] = {
            "deq": make_engine(problem),
            "loop": lambda: torch_loop(problem),
        }
        labels = {}
        if has_torchdeq():
            solver, run, answers["torchdeq"] = _fastest_torchdeq(problem, z)
            labels["torchdeq"] = f"torchdeq {solver}"
            competitors["torchdeq"] = lambda: run(problem)
        counts = answers["loop"].iterations, answers["loop"].adjoint_evaluations
        competitors["gemm"] = make_gemm_only(problem, *counts)
        prepare = _weight_changer(problem.W) if case.new_weights else lambda: None
        clock = time.thread_time if threads == 1 else time.perf_counter
        timings = interleave(competitors, seconds, prepare=prepare, clock=clock)
    rows = []
    for name, timing in timings.items():
        answer = answers.get(name)
        rows.append(
            {
                "case": case.name,
                "variant": labels.get(name, name),
                "baseline": name,
                "threads": threads,
                "median": timing.median,
                "p20": timing.percentile(20),
                "p80": timing.percentile(80),
                "best": min(timing.turns),
                "turns": len(timing.turns),
                "ratio": (ratio := timing.ratio(timings["deq"])),
                "must": (must := case.must.get(name)),
                "reached": None if must is None else ratio >= must,
                "iterations": answer.iterations if answer else counts[0],
                "error": worst_error(answer.z, z) if answer else None,
                "gradient_error": relative_error(answer.dW, dW) if answer else None,
            }
        )
    return rows


def measure_kernel(shapes: Sequence[tuple[int, int]], seconds: float) -> list[dict]:
    """The micro-kernel alone on one core, (m, B) float32, as a share of the core's fused multiply-add peak.

    Both are the best of short bursts, taken in turns, since whatever else runs on the core can only lower them.
    """
    library = _library.compiled
    burst = max(0.01, seconds / (4 * len(shapes)))
    peak = 0.0
    best = dict.fromkeys(shapes, 0.0)
    for _ in range(3):
        for m, B in shapes:
            peak = max(peak, library.deq_cpu_peak_gflops(FLOAT32, burst / 4))
            best[m, B] = max(best[m, B], library.deq_cpu_kernel_gflops(FLOAT32, B, m, burst))
    return [
        {
            "case": f"kernel-m{m}-B{B}-float32",
            "variant": f"kernel {library.deq_cpu_isa().decode()}",
            "threads": 1,
            "gflops": rate,
            "peak": peak,
            "ratio": rate / peak,
            "must": KERNEL_MUST,
            "reached": rate / peak >= KERNEL_MUST,
        }
        for (m, B), rate in best.items()
    ]


def worst_error(z: Tensor, exact: Tensor) -> float:
    """The largest relative error of a sample."""
    norm = torch.linalg.vector_norm
    return float((norm(z.double() - exact, dim=1) / norm(exact, dim=1)).max())


def relative_error(a: Tensor, exact: Tensor) -> float:
    return float(torch.linalg.vector_norm(a.double() - exact) / torch.linalg.vector_norm(exact))


def _fastest_torchdeq(problem: Problem, z: Tensor) -> tuple[str, Callable[..., Answer], Answer]:
    """Of torchdeq's solvers that reach the solution, the one whose second call is the fastest."""
    tried = []
    for solver in TORCHDEQ_SOLVERS:
        run = make_torchdeq(solver)
        run(problem)
        start = time.perf_counter()
        answer = run(problem)
        tried.append((time.perf_counter() - start, solver, run, answer))
    solved = [entry for entry in tried if worst_error(entry[3].z, z) < 1e-3] or tried
    return min(solved, key=lambda entry: entry[0])[1:]


def _weight_changer(W: Tensor) -> Callable[[], None]:
    """Moves one entry of W by a few units in its last place, to a value that it never had before."""
    entry, step = W[0, 0].item(), torch.finfo(W.dtype).eps
    count = 0

    def change() -> None:
        nonlocal count
        count += 1
        W[0, 0] = entry * (1.0 + count * step)

    return change


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
