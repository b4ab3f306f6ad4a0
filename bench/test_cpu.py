"""The cases of ``deq bench cpu`` for pytest-benchmark: ``pytest bench --benchmark-only``, under five minutes on two
cores; ``--benchmark-autosave`` stores, ``--benchmark-compare`` compares with what is stored.

No case is timed that deq does not solve: its answer is judged first (bench/quality.py), and one that fails is an error
of the case's timings.
"""

from functools import lru_cache, partial

import pytest

from deq.bench.baselines import engine, make_engine, make_gemm_only, torch_loop
from deq.bench.cases import AUTO_CASES, CPU_CASES, Case
from deq.bench.goals import PASSES
from deq.bench.quality import Truth
from deq.bench.timing import threads as use_threads

LEAST_ROUNDS, SECONDS = 3, 0.25  # of a timing: there are 150
SLOWEST_ROUNDS = 5


@lru_cache(maxsize=1)  # a case's tests follow each other
def solved(case: Case):
    """The problem of a case, once deq's answers to it are found right."""
    problem = case.make()
    truth = Truth(problem, *problem.exact())
    for solver in ("plain", "auto") if case in CPU_CASES else ("auto",):
        quality = truth.judge(make_engine(problem, True, solver, on_failure="ignore")())
        assert quality.failed == 0, f"{case.name}, solver {solver}: {quality.failed:.0%} of the samples are not solved"
    return problem


@pytest.mark.benchmark(max_time=SECONDS, min_rounds=LEAST_ROUNDS)
@pytest.mark.parametrize("case", CPU_CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("variant", ["deq", "loop", "gemm"])
def test_forward_and_backward(benchmark, case, variant, threads):
    problem = solved(case)
    benchmark.group = f"{case.name} {threads} threads"
    with use_threads(threads):
        run = partial({"deq": engine, "loop": torch_loop, "gemm": torch_loop}[variant], problem)
        answer = run()
        benchmark.extra_info["iterations"] = answer.iterations
        if variant == "gemm":
            run = make_gemm_only(problem, answer.iterations, answer.adjoint_evaluations)
        if case.new_weights:
            benchmark.pedantic(run, setup=problem.changer(), rounds=SLOWEST_ROUNDS, warmup_rounds=1)
        else:
            benchmark(run)


@pytest.mark.parametrize("case", AUTO_CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("which", PASSES)
def test_what_deq_chooses(benchmark, case, which, threads):
    """Inference with all caches warm; training on weights that have changed."""
    problem = solved(case)
    backward = which == "training"
    benchmark.group = f"{case.name} {which} {threads} threads"
    with use_threads(threads):
        run = make_engine(problem, backward, "auto", on_failure="ignore")
        benchmark.extra_info["iterations"] = run().iterations
        setup = problem.changer() if backward else None
        benchmark.pedantic(run, setup=setup, rounds=SLOWEST_ROUNDS, warmup_rounds=1)
