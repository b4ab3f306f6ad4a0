"""The cases of ``deq bench cpu`` for pytest-benchmark: ``pytest bench``, ``--benchmark-compare`` between commits."""

import pytest
import torch

from deq.bench.baselines import engine, make_gemm_only, torch_loop
from deq.bench.cases import CPU_CASES


@pytest.fixture(scope="module", params=CPU_CASES, ids=lambda case: case.name)
def problem(request):
    return request.param.make()


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("variant", ["deq", "loop", "gemm"])
def test_forward_and_backward(benchmark, problem, variant, threads):
    benchmark.group = f"m{problem.c.shape[1]} B{problem.c.shape[0]} {problem.c.dtype} {threads} threads"
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        if variant == "gemm":
            answer = torch_loop(problem)
            benchmark(make_gemm_only(problem, answer.iterations, answer.adjoint_evaluations))
        else:
            benchmark({"deq": engine, "loop": torch_loop}[variant], problem)
    finally:
        torch.set_num_threads(before)
