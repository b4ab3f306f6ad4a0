"""``deq bench cpu``: what deq chooses by itself, against every rival, at the same tolerance and at the same error.

``forward`` is inference: W stays, and whatever deq keeps of it is there. In ``training`` W changes before every call,
so that all of that is formed anew inside the time, and the gradient of W is asked for. With one thread a ratio is the
median over turns, with several that of the shortest calls: one in which another process takes a core measures that.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch

from deq.profiling.counter import Counter

from . import jax_baselines
from .baselines import (
    Answer,
    Maker,
    has_compiler,
    has_torchdeq,
    make_compiled_loop,
    make_engine,
    make_gemm_only,
    torch_loop,
    torchdeq_makers,
)
from .cases import TOL, Case, Problem
from .goals import GOALS, Goal, must
from .quality import Quality, Truth, fastest
from .timing import Timing, interleave, thread_clock
from .timing import threads as use_threads

MIN_TURNS = 3  # the slowest cases take a second a turn, over which noise averages out
COMPILED = ((64, 256), (256, 256), (512, 64), (1024, 4))  # Gaussian cases with the compiled loop
TIGHTER = tuple(TOL * 2 ** (-k / 2) for k in range(12))  # down to 2.2e-7, where float32 ends
LOOSER = tuple(TOL * 2 ** (k / 2) for k in range(21))  # up to 1e-2


@dataclass(frozen=True, eq=False)
class Rival:
    """A baseline ready to be timed, or the reason why it is not. ``maker`` None: it has but one tolerance, or none.
    ``flops`` and ``bytes`` of one call, where :func:`counted`."""

    label: str
    run: Callable[[], object] | None = None
    maker: Maker | None = None
    answer: Answer | None = None
    quality: Quality | None = None
    why: str | None = None
    attempts: dict | None = None
    flops: int | None = None
    bytes: int | None = None


def measure(case: Case, passes: Sequence[str], thread_counts: Sequence[int], seconds: float) -> Iterator[list[dict]]:
    """The rows of one case for every pass and thread count, one list after the other. The tolerances at which deq's and
    a rival's errors match and the fastest solver of torchdeq are found once a pass, with the fewest threads."""
    problem = case.make()
    truth = Truth(problem, *problem.exact())
    for which in passes:
        with use_threads(min(thread_counts)):
            backward = which == "training"
            ours = counted(solver("deq", partial(deq_at, problem, backward), truth))
            rivals = {name: counted(rival) for name, rival in find_rivals(case, truth, backward).items()}
            matches = {
                name: match(ours, rival, truth) for name, rival in rivals.items() if rival.maker and rival.why is None
            }
        for count in thread_counts:
            with use_threads(count):
                for name, rival in find_rivals_for_threads(case, truth, backward, count).items():
                    rivals[name] = rival
                    matches.pop(name, None)  # that of another number of threads, which may have served it
                    if rival.maker and rival.why is None:
                        matches[name] = match(ours, rival, truth)
                turns = {"deq": ours.run}
                turns |= {name: rival.run for name, rival in rivals.items() if rival.run and rival.why is None}
                for name, (our_tol, tol) in matches.items():
                    turns |= {} if our_tol == TOL else {f"deq {our_tol:g}": ours.maker(our_tol)}
                    turns |= {} if tol == TOL else {f"{name} {tol:g}": rivals[name].maker(tol)}
                prepare = problem.changer() if backward else lambda: None
                timings = interleave(turns, seconds, prepare=prepare, clock=thread_clock(count), min_turns=MIN_TURNS)
            yield rows_of(case, which, count, {"deq": ours} | rivals, timings, matches)


def deq_at(problem: Problem, backward: bool, tol: float) -> Callable[[], Answer]:
    """What deq chooses by itself."""
    return make_engine(problem, backward, "auto", tol, on_failure="ignore")


def solver(label: str, maker: Maker, truth: Truth) -> Rival:
    """A rival that is made for a tolerance, at ``TOL``."""
    run = maker(TOL)
    return _judged(label, run, maker, answer := run(), truth.judge(answer))


def _judged(label: str, run: Callable[[], Answer], maker: Maker | None, answer: Answer, quality: Quality) -> Rival:
    count = round(quality.failed * len(answer.z))
    why = f"does not solve {count} of {len(answer.z)} samples" if count else None
    return Rival(label, run, maker, answer, quality, why)


def counted(rival: Rival) -> Rival:
    """The rival with the useful FLOPs and the bytes of one call, as :class:`deq.profiling.counter.Counter` counts them
    for every competitor alike: an operator reads its inputs and writes its outputs once."""
    if rival.run is None or rival.why is not None:
        return rival
    with Counter() as counter:
        rival.run()
    return replace(rival, flops=counter.counts.flops, bytes=counter.counts.bytes)


def find_rivals(case: Case, truth: Truth, backward: bool) -> dict[str, Rival]:
    """The baselines that serve any number of threads: loop, the fastest solver of torchdeq, and GEMM-only."""
    problem = truth.problem
    rivals = {"loop": solver("torch loop", lambda tol: partial(torch_loop, problem, backward, tol), truth)}
    if has_torchdeq():
        rivals["torchdeq"] = fastest_solver(torchdeq_makers(problem, backward), truth)
    else:
        rivals["torchdeq"] = Rival("torchdeq", why="not installed")
    rivals["gemm"] = gemm_only(problem, rivals["loop"])
    return rivals


def gemm_only(problem: Problem, loop: Rival) -> Rival:
    """The products of the loop and nothing else."""
    if loop.why is not None:
        return Rival("GEMM-only", why=f"has the loop's count, which {loop.why}")
    return Rival("GEMM-only", make_gemm_only(problem, loop.answer.iterations, loop.answer.adjoint_evaluations or 0))


def fastest_solver(makers: dict[str, Maker], truth: Truth) -> Rival:
    """The one of several by :func:`~deq.bench.quality.fastest`."""
    best = fastest(makers, truth)
    rival = _judged(best.label, best.run, makers[best.label], best.answer, best.quality)
    return replace(rival, attempts=best.attempts)


def find_rivals_for_threads(case: Case, truth: Truth, backward: bool, threads: int) -> dict[str, Rival]:
    """The baselines that are made for a number of threads: the compiled loop, jaxopt and optimistix."""
    rivals = {}
    if compiled := compiled_loop(case, truth, backward):
        rivals["compiled"] = compiled
    for package in jax_baselines.PACKAGES:
        if why := jax_baselines.why_not(package, threads):
            rivals[package] = Rival(package, why=why)
            continue
        size = float(torch.linalg.vector_norm(truth.z))
        try:
            rivals[package] = fastest_solver(jax_baselines.makers(package, truth.problem, backward, size), truth)
        except RuntimeError as error:  # what XLA raises when a solver gives up
            rivals[package] = Rival(package, why=f"fails: {str(error).splitlines()[0]}")
    return rivals


def compiled_loop(
    case: Case, truth: Truth, backward: bool, shapes: Sequence[tuple[int, int]] = COMPILED
) -> Rival | None:
    """Anew for every thread count, which is compiled in. Only for some cases: 2 to 7 seconds a graph."""
    if case.family != "gaussian" or (case.m, case.B) not in shapes:
        return None
    label = "compiled ten-step loop"
    if truth.z.device.type == "cpu" and not has_compiler():
        return Rival(label, why="torch.compile finds no C++ compiler")
    try:
        run = partial(make_compiled_loop(), truth.problem, backward)
        return _judged(label, run, None, answer := run(), truth.judge(answer))
    except torch._dynamo.exc.TorchDynamoException as error:
        return Rival(label, why=f"does not compile: {str(error).splitlines()[0]}")


def match(ours: Rival, rival: Rival, truth: Truth) -> tuple[float, float]:
    """Tolerances (deq's, the rival's) at which deq's errors are no worse than the rival's: ours is tightened or, where
    float32 does not allow that, the rival's loosened until it is no better than deq at ``TOL``."""

    def enough(k: int) -> bool:
        return truth.judge(ours.maker(TIGHTER[k])()).no_worse_than(rival.quality)

    def loose_enough(k: int) -> bool:
        return ours.quality.no_worse_than(truth.judge(rival.maker(LOOSER[k])()))

    if ours.quality.no_worse_than(rival.quality):
        return TOL, TOL
    k = first(enough, len(TIGHTER))
    if k is not None:
        return TIGHTER[k], TOL
    k = first(loose_enough, len(LOOSER))
    return TOL, LOOSER[-1 if k is None else k]


def first(holds: Callable[[int], bool], end: int) -> int | None:
    """The smallest k in [1, end) that holds, by bisection, if all after it hold. None if the last does not."""
    if not holds(end - 1):
        return None
    low, high = 0, end - 1  # does not hold, holds
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high


def rows_of(
    case: Case,
    which: str,
    threads: int,
    competitors: dict[str, Rival],
    timings: dict[str, Timing],
    matches: dict[str, tuple[float, float]],
    goals: Sequence[Goal] = GOALS,
) -> list[dict]:
    """One row a competitor, deq's first; ``goals`` say what ratios must be."""
    rows = []
    for name, rival in competitors.items():
        timing, quality, answer = timings.get(name), rival.quality, rival.answer
        ratio = timing and _ratio(timing, timings["deq"], threads)
        required = None if timing is None else must(case, name, which, goals)
        our_tol, tol = matches.get(name, (None, None))
        matched = None
        if our_tol is not None:
            over = timings["deq" if our_tol == TOL else f"deq {our_tol:g}"]
            matched = _ratio(timings[name if tol == TOL else f"{name} {tol:g}"], over, threads)
        rows.append(
            {
                "case": case.name,
                "solver": "auto",
                "pass": which,
                "threads": threads,
                "baseline": name,
                "variant": str(answer.solution.plan) if name == "deq" else rival.label,
                "why": rival.why,
                "attempts": rival.attempts,
                **_times(timing),
                "ratio": ratio,
                "must": required,
                "reached": None if required is None else ratio >= required,
                "matched_ratio": matched,
                "matched_tol": our_tol,
                "baseline_tol": tol,
                **_counts(answer),
                "flops": rival.flops,
                "bytes": rival.bytes,
                **_errors(quality),
            }
        )
    return rows


def _ratio(theirs: Timing, ours: Timing, threads: int) -> float:
    return theirs.ratio(ours) if threads == 1 else theirs.best / ours.best


def _times(timing: Timing | None) -> dict:
    if timing is None:
        return dict.fromkeys(("median", "p20", "p80", "best", "turns"))
    return {
        "median": timing.median,
        "p20": timing.percentile(20),
        "p80": timing.percentile(80),
        "best": timing.best,
        "turns": len(timing.turns),
    }


def _counts(answer: Answer | None) -> dict:
    if answer is None:
        return dict.fromkeys(("iterations", "mean_iterations", "products"))
    return {
        "iterations": answer.iterations,
        "mean_iterations": float(answer.counts.double().mean()),
        "products": answer.products,
    }


def _errors(quality: Quality | None) -> dict:
    if quality is None:
        return dict.fromkeys(("error", "gradient_error", "failed", "elsewhere"))
    gradient = quality.gradient_error
    return {
        "error": quality.error if math.isfinite(quality.error) else None,
        "gradient_error": gradient if gradient is not None and math.isfinite(gradient) else None,
        "failed": quality.failed,
        "elsewhere": quality.elsewhere,
    }
