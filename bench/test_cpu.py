"""The cases of ``deq bench cpu`` for pytest-benchmark: ``pytest bench``, ``--benchmark-compare`` between commits."""

import pytest

from deq.bench.baselines import engine, make_engine, make_gemm_only, torch_loop
from deq.bench.cases import AUTO_CASES, CPU_CASES
from deq.bench.goals import PASSES
from deq.bench.timing import threads as use_threads


@pytest.fixture(scope="module", params=CPU_CASES, ids=lambda case: case.name)
def problem(request):
    return request.param.make()


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("variant", ["deq", "loop", "gemm"])
def test_forward_and_backward(benchmark, problem, variant, threads):
    benchmark.group = f"m{problem.c.shape[1]} B{problem.c.shape[0]} {problem.c.dtype} {threads} threads"
    with use_threads(threads):
        if variant == "gemm":
            answer = torch_loop(problem)
            benchmark(make_gemm_only(problem, answer.iterations, answer.adjoint_evaluations))
        else:
            benchmark({"deq": engine, "loop": torch_loop}[variant], problem)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("which", PASSES)
@pytest.mark.parametrize("case", AUTO_CASES, ids=lambda case: case.name)
def test_what_deq_chooses(benchmark, case, which, threads):
    """Inference with all caches warm; training on weights that have changed."""
    problem = case.make()
    backward = which == "training"
    benchmark.group = f"{case.name} {which} {threads} threads"
    with use_threads(threads):
        run = make_engine(problem, backward, "auto", on_failure="ignore")
        run()
        setup = problem.changer() if backward else None
        benchmark.pedantic(run, setup=setup, rounds=20, warmup_rounds=1)
