"""One training step of the experiment ``steep`` at a large width against its matrix products alone."""

import time
from dataclasses import dataclass
from statistics import median

import torch

from deq.experiments._nets import TriangularDEQ
from deq.experiments._steep_trained import BATCH, sample

D = 10  # dimension of the target


@dataclass(frozen=True)
class Case:
    """width: of the triangular DEQ, one seed, float64 as in the experiment. most: times the products allowed."""

    width: int = 4096
    batch: int = BATCH
    most: float = 1.5


def measure(case: Case, threads: int, rounds: int = 3) -> dict:
    """Median seconds of forward + backward and of as many torch products, in turns, and their ratio.

    The products are those of a loop that stops the whole batch together: one a batch-wide evaluation, forward (from
    zero, so that the first multiplies nothing) and for the adjoint (as many), and the gradient of W.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        generator = torch.Generator().manual_seed(0)
        net = TriangularDEQ(1, D, case.width, generator)
        x, y = sample(1, case.batch, D, generator)
        counted = net.solution(net.injection(x).detach())
        evaluations = int(counted.iterations.max())
        W, z = net.weight()[0].detach(), counted.z[0].detach()
        out, dW = torch.empty_like(z), torch.empty_like(W)

        def step() -> None:
            for p in net.parameters:
                p.grad = None
            (net(x) - y).square().mean().backward()

        def products() -> None:
            for _ in range(evaluations - 1):
                torch.mm(z, W.mT, out=out)
            for _ in range(evaluations - 1):
                torch.mm(z, W, out=out)
            torch.mm(out.mT, z, out=dW)

        seconds: tuple[list[float], list[float]] = ([], [])
        step(), products()
        for _ in range(rounds):
            for times, run in zip(seconds, (step, products), strict=True):
                began = time.perf_counter()
                run()
                times.append(time.perf_counter() - began)
    finally:
        torch.set_num_threads(before)
    ours, gemm = map(median, seconds)
    return {
        "case": f"steep-m{case.width}-B{case.batch}-{threads} threads",
        "variant": "training step of steep",
        "threads": threads,
        "seconds": ours,
        "gemm_seconds": gemm,
        "evaluations": evaluations,
        "ratio": ours / gemm,
        "most": case.most,
        "reached": ours / gemm <= case.most,
    }
