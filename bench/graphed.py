"""The strongest loop that PyTorch gives a careful user on a GPU: library products in a captured CUDA graph.

A chunk of evaluations is captured once and replayed until a flag in pinned memory says that every sample has converged.
On the CPU the same code runs uncaptured.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .baselines import MAX_ITER, Answer, Maker, converged
from .cases import TOL, Problem
from .device import capture


class Chunk(NamedTuple):
    """How a loop is captured: evaluations of one graph, an even number so that it ends in the buffer that it began in;
    evaluations between two residuals, each of which costs time; and whether the host reads of a chunk only while the
    next one runs, which costs a chunk at the end, or waits for every one."""

    length: int
    every: int
    late: bool

    def __str__(self) -> str:
        read = "late" if self.late else "at once"
        return f"{self.length} evaluations a graph, a residual every {self.every}, read {read}"


# Which is the fastest depends on what an evaluation, a residual and a wait take.
CHUNKS = (Chunk(4, 1, True), Chunk(4, 4, True), Chunk(8, 8, True), Chunk(4, 4, False), Chunk(8, 8, False))


class Loop:
    """``y <- f(y)`` from zero until ``||f(y) - y|| <= tol ||f(y)||`` for every sample.

    f(y, out) writes into out; like: a tensor of y's shape. After :meth:`run`, ``y`` holds the result and ``count`` the
    evaluations until it was seen to be one.
    """

    def __init__(self, f: Callable[[Tensor, Tensor], object], like: Tensor, tol: float, chunk: Chunk):
        self.f, self.tol, self.chunk = f, tol, chunk
        self.y, self.other = torch.zeros_like(like), torch.zeros_like(like)
        self.done = torch.zeros((), dtype=torch.bool, device=like.device)
        self.count = torch.zeros((), dtype=torch.int32, device=like.device)
        self.seen = torch.zeros(2, dtype=torch.bool, pin_memory=like.is_cuda)
        self.copied = [torch.cuda.Event() for _ in range(2)] if like.is_cuda else []
        self.replay = capture(self._evaluate, like.device)

    def _evaluate(self) -> None:
        every = self.chunk.every
        for k in range(1, self.chunk.length + 1):
            self.f(self.y, self.other)
            if k % every == 0:
                self.count += every * ~self.done
                self.done |= converged(self.y, self.other, self.tol)
            self.y, self.other = self.other, self.y

    def run(self) -> None:
        for t in (self.y, self.done, self.count):
            t.zero_()
        for i in range(MAX_ITER // self.chunk.length):
            self.replay()
            self.seen[i % 2].copy_(self.done, non_blocking=True)
            if self.copied:
                self.copied[i % 2].record()
            if i >= self.chunk.late and self._saw((i - self.chunk.late) % 2):
                break

    def _saw(self, slot: int) -> bool:
        if self.copied:
            self.copied[slot].synchronize()
        return bool(self.seen[slot])


@torch.no_grad()
def make_graphed_loop(
    problem: Problem, backward: bool = True, tol: float = TOL, chunk: Chunk = CHUNKS[0]
) -> Callable[[], Answer]:
    """:func:`~deq.bench.baselines.torch_loop` in captured chunks; capturing is not part of a call."""
    W, c, g = problem.W, problem.c, problem.g
    Wt, d = W.t(), torch.zeros_like(c)
    forward = Loop(lambda z, out: torch.addmm(c, z, Wt, out=out).relu_(), c, tol, chunk)
    adjoint = Loop(lambda u, out: torch.addmm(g, u, W, out=out).mul_(d), c, tol, chunk) if backward else None

    @torch.no_grad()
    def graphed_loop() -> Answer:
        forward.run()
        z = forward.y.clone()
        if adjoint is None:
            return Answer(z, None, forward.count.clone())
        d.copy_(z > 0)
        adjoint.run()
        return Answer(z, adjoint.y.t() @ z, forward.count.clone())

    return graphed_loop


def graphed_makers(problem: Problem, backward: bool = True) -> dict[str, Maker]:
    """Every one of CHUNKS, by label."""

    def maker(chunk: Chunk) -> Maker:
        return lambda tol: make_graphed_loop(problem, backward, tol, chunk)

    return {f"graphed loop, {chunk}": maker(chunk) for chunk in CHUNKS}
