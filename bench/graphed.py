"""The strongest loop that PyTorch gives a careful user on a GPU: library products in a captured CUDA graph.

A chunk of evaluations is captured once; its replays are queued without waiting, and whether every sample has converged
is read from pinned memory while the next chunk runs. On the CPU the same code runs uncaptured.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from .baselines import MAX_ITER, Answer, Maker, _converged
from .cases import TOL, Problem
from .device import capture

CHUNK = 8  # evaluations of one graph; an even number, so that a chunk ends in the buffer that it began in
EVERY = (1, 4)  # evaluations between two residuals: each costs time, and what runs past the tolerance does too


class Chunks:
    """``y <- f(y)`` from zero until ``||f(y) - y|| <= tol ||f(y)||`` for every sample, looked at every ``every``-th
    evaluation. f(y, out) writes into out; like: a tensor of y's shape. ``y`` holds the result."""

    def __init__(self, f: Callable[[Tensor, Tensor], object], like: Tensor, tol: float, every: int):
        self.f, self.tol, self.every = f, tol, every
        self.y, self.other = torch.zeros_like(like), torch.zeros_like(like)
        self.done = torch.zeros((), dtype=torch.bool, device=like.device)
        self.count = torch.zeros((), dtype=torch.int32, device=like.device)  # evaluations until done
        self.seen = torch.zeros(2, dtype=torch.bool, pin_memory=like.is_cuda)
        self.copied = [torch.cuda.Event() for _ in range(2)] if like.is_cuda else []
        self.replay = capture(self._chunk, like.device)

    def _chunk(self) -> None:
        for k in range(1, CHUNK + 1):
            self.f(self.y, self.other)
            if k % self.every == 0:
                self.count += self.every * ~self.done
                self.done |= _converged(self.y, self.other, self.tol)
            self.y, self.other = self.other, self.y

    def run(self) -> None:
        for t in (self.y, self.done, self.count):
            t.zero_()
        for chunk in range(MAX_ITER // CHUNK):
            self.replay()
            self.seen[chunk % 2].copy_(self.done, non_blocking=True)
            if self.copied:
                self.copied[chunk % 2].record()
            if chunk > 0 and self._saw((chunk - 1) % 2):
                break

    def _saw(self, slot: int) -> bool:
        if self.copied:
            self.copied[slot].synchronize()
        return bool(self.seen[slot])


@torch.no_grad()
def make_graphed_loop(
    problem: Problem, backward: bool = True, tol: float = TOL, every: int = 1
) -> Callable[[], Answer]:
    """:func:`~deq.bench.baselines.torch_loop` in captured chunks; capturing is not part of a call."""
    W, c, g = problem.W, problem.c, problem.g
    Wt, d = W.t(), torch.zeros_like(c)
    forward = Chunks(lambda z, out: torch.addmm(c, z, Wt, out=out).relu_(), c, tol, every)
    adjoint = Chunks(lambda u, out: torch.addmm(g, u, W, out=out).mul_(d), c, tol, every) if backward else None

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
    """By label, for the fastest to be chosen."""

    def maker(every: int) -> Maker:
        return lambda tol: make_graphed_loop(problem, backward, tol, every)

    return {f"graphed loop, a residual every {every}": maker(every) for every in EVERY}
