"""What deq is measured against. Every function solves the same problem to the same tolerance.

Each takes a :class:`~deq.bench.cases.Problem` and returns an :class:`Answer` with the gradient of W for the loss
gradient ``g``, or without it if ``backward=False``. All start at zero. None is handicapped: the torch loop is fused as
far as eager torch allows and bypasses autograd; torchdeq gets relative tolerances.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec

import torch
from torch import Tensor

from deq.solve import solve

from .cases import TOL, Problem

MAX_ITER = 1000
BROYDEN_MAX_ITER = 100  # torchdeq allocates two (B, m, max_iter) buffers before it starts
TORCHDEQ_SOLVERS = ("fixed_point_iter", "anderson", "broyden")


@dataclass(frozen=True, eq=False)
class Answer:
    """z (B, m), dW (m, m) or None, evaluations of the slowest sample or of every one; of the adjoint where told."""

    z: Tensor
    dW: Tensor | None
    evaluations: Tensor | int
    adjoint_evaluations: int | None = None

    @property
    def iterations(self) -> int:
        return int(torch.as_tensor(self.evaluations).max())


def make_engine(problem: Problem, backward: bool = True, solver: str = "plain") -> Callable[[], Answer]:
    """deq itself, through the public function and autograd, on leaves that share the problem's memory."""
    W, c = (t.detach().requires_grad_(backward) for t in (problem.W, problem.c))

    def engine() -> Answer:
        solution = solve(W, c, "relu", tol=TOL, max_iter=MAX_ITER, solver=solver, on_failure="raise")
        dW = torch.autograd.grad(solution.z, (W, c), problem.g)[0] if backward else None
        return Answer(solution.z.detach(), dW, solution.iterations)

    return engine


def engine(problem: Problem, backward: bool = True, solver: str = "plain") -> Answer:
    """One call of :func:`make_engine`."""
    return make_engine(problem, backward, solver)()


@torch.no_grad()
def torch_loop(problem: Problem, backward: bool = True) -> Answer:
    """The loop a careful user writes: ``relu(addmm)``, per-sample residuals, one host read an iteration."""
    W, c, g = problem.W, problem.c, problem.g
    Wt = W.t()
    z = torch.zeros_like(c)
    forward, done = 0, False
    while not done and forward < MAX_ITER:
        forward += 1
        new = torch.relu_(torch.addmm(c, z, Wt))
        done = _converged(z, new)
        z = new
    if not backward:
        return Answer(z, None, forward)
    d = (z > 0).to(z.dtype)
    u = torch.zeros_like(g)
    adjoint, done = 0, False
    while not done and adjoint < MAX_ITER:
        adjoint += 1
        new = torch.addmm(g, u, W).mul_(d)
        done = _converged(u, new)
        u = new
    return Answer(z, u.t() @ z, forward, adjoint)


def _converged(y: Tensor, fy: Tensor) -> bool:
    """deq's rule, asked of the whole batch: ``||f(y) - y|| <= tol ||f(y)||`` for every sample."""
    norm = torch.linalg.vector_norm
    return (norm(fy - y, dim=1) <= TOL * norm(fy, dim=1)).all().item()


def make_gemm_only(problem: Problem, forward: int, adjoint: int) -> Callable[[], None]:
    """The matrix products of :func:`torch_loop` and nothing else: what a loop without any overhead would cost.

    forward, adjoint: the loop's evaluations, one product each.
    """
    z, out, dW = torch.relu(problem.c), torch.empty_like(problem.c), torch.empty_like(problem.W)
    W, Wt, zt = problem.W, problem.W.t(), z.t()

    def gemm_only() -> None:
        for _ in range(forward):
            torch.mm(z, Wt, out=out)
        for _ in range(adjoint):
            torch.mm(z, W, out=out)
        torch.mm(zt, z, out=dW)

    return gemm_only


def has_torchdeq() -> bool:
    return find_spec("torchdeq") is not None


def make_torchdeq(solver: str) -> Callable[..., Answer]:
    """torchdeq with one of its solvers on both sides, implicit gradients and the tolerance relative, as ours is."""
    from torchdeq import get_deq

    limit = BROYDEN_MAX_ITER if solver == "broyden" else MAX_ITER
    model = get_deq(
        core="sliced",
        ift=True,
        f_solver=solver,
        b_solver=solver,
        f_max_iter=limit,
        b_max_iter=limit,
        f_tol=TOL,
        b_tol=TOL,
        f_stop_mode="rel",
        b_stop_mode="rel",
    )

    def torchdeq(problem: Problem, backward: bool = True) -> Answer:
        model.train(backward)  # in evaluation it runs the solver alone, without a graph
        W, c = (t.detach().requires_grad_(backward) for t in (problem.W, problem.c))
        with torch.set_grad_enabled(backward):
            states, info = model(lambda z: torch.relu(torch.addmm(c, z, W.t())), torch.zeros_like(c))
        z = states[-1]
        dW = torch.autograd.grad(z, (W, c), problem.g)[0] if backward else None
        return Answer(z.detach(), dW, info["nstep"])

    return torchdeq
