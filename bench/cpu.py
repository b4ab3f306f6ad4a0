"""``deq bench cpu``: forward + backward times against baselines, errors beside them, and the kernel's share of peak."""

from collections.abc import Callable, Sequence

from deq import _library
from deq.profiling.counter import Counter

from .baselines import engine, has_torchdeq, make_engine, make_gemm_only, torch_loop, torchdeq_makers
from .cases import KERNEL_MUST, Case
from .quality import Truth, fastest, relative_error, worst_error
from .timing import interleave, thread_clock
from .timing import threads as use_threads

FLOAT32 = 0  # DeqType in csrc/kernels.h


def measure(case: Case, threads: int, seconds: float) -> list[dict]:
    """Rows of one case: deq first, then loop, torchdeq (its fastest solver) and gemm, with ``ratio`` over deq's time.

    One thread is timed by its own processor time, several by the wall clock.
    """
    with use_threads(threads):
        problem = case.make()
        z, dW = problem.exact()
        answers = {"deq": engine(problem), "loop": torch_loop(problem)}
        competitors: dict[str, Callable[[], object]] = {
            "deq": make_engine(problem),
            "loop": lambda: torch_loop(problem),
        }
        labels = {}
        if has_torchdeq():
            best = fastest(torchdeq_makers(problem), Truth(problem, z, dW))
            labels["torchdeq"], answers["torchdeq"], competitors["torchdeq"] = best.label, best.answer, best.run
        evaluations = answers["loop"].iterations, answers["loop"].adjoint_evaluations
        competitors["gemm"] = make_gemm_only(problem, *evaluations)
        prepare = problem.changer() if case.new_weights else lambda: None
        timings = interleave(competitors, seconds, prepare=prepare, clock=thread_clock(threads))
        counts = {}
        for name, run in competitors.items():
            with Counter() as counter:
                run()
            counts[name] = counter.counts
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
                "best": timing.best,
                "turns": len(timing.turns),
                "ratio": (ratio := timing.ratio(timings["deq"])),
                "must": (must := case.must.get(name)),
                "reached": None if must is None else ratio >= must,
                "iterations": answer.iterations if answer else evaluations[0],
                "flops": counts[name].flops,
                "bytes": counts[name].bytes,
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
