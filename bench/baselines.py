"""What deq is measured against. Every function solves the same problem to the same tolerance.

Each takes a :class:`~deq.bench.cases.Problem` and returns an :class:`Answer` with the gradient of W for the loss
gradient ``g``, or without it if ``backward=False``. All start at zero. None is handicapped: the torch loop is fused as
far as eager torch allows and bypasses autograd; torchdeq gets relative tolerances.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec

import torch
from torch import Tensor

from deq.solution import Solution
from deq.solve import solve

from .cases import TOL, Problem

MAX_ITER = 1000
BROYDEN_MAX_ITER = 100  # torchdeq allocates two (B, m, max_iter) buffers before it starts
COMPILED_STEPS = 10  # one compiled step costs 70 to 100 us a call and loses to eager torch
TORCHDEQ_SOLVERS = ("fixed_point_iter", "anderson", "broyden")


@dataclass(frozen=True, eq=False)
class Answer:
    """z (B, m), dW (m, m) or None, evaluations of the slowest sample or of every one; of the adjoint where told.

    ``converged`` (B,) bool where the solver says so itself. deq's own answer has its ``solution`` instead, which is
    read after the clock has stopped.
    """

    z: Tensor
    dW: Tensor | None
    evaluations: Tensor | int | None
    adjoint_evaluations: int | None = None
    converged: Tensor | None = None
    solution: Solution | None = None

    @property
    def counts(self) -> Tensor:
        """Evaluations, of every sample (B,) where known."""
        return torch.as_tensor(self.evaluations if self.solution is None else self.solution.iterations)

    @property
    def iterations(self) -> int:
        return int(self.counts.max())

    @property
    def said_to_converge(self) -> Tensor | None:
        return self.converged if self.solution is None else self.solution.converged

    @property
    def products(self) -> float | None:
        """Matrix products in the problem's own precision, forward: of the slowest sample, or for deq of a mean one, one
        an evaluation but the first, which starts at zero. Unknown where most are made in a lower precision."""
        if self.solution is None:
            return self.iterations
        if self.solution.plan.increments != "native" or not self.counts.numel():
            return None
        return float(self.counts.double().mean()) - 1


def make_engine(
    problem: Problem, backward: bool = True, solver: str = "plain", tol: float = TOL, on_failure: str = "raise"
) -> Callable[[], Answer]:
    """deq itself, through the public function and autograd, on leaves that share the problem's memory."""
    W, c = (t.detach().requires_grad_(backward) for t in (problem.W, problem.c))

    def engine() -> Answer:
        solution = solve(W, c, "relu", tol=tol, max_iter=MAX_ITER, solver=solver, on_failure=on_failure)
        dW = torch.autograd.grad(solution.z, (W, c), problem.g)[0] if backward else None
        return Answer(solution.z.detach(), dW, None, solution=solution)

    return engine


def engine(problem: Problem, backward: bool = True, solver: str = "plain") -> Answer:
    """One call of :func:`make_engine`."""
    return make_engine(problem, backward, solver)()


Maker = Callable[[float], Callable[[], Answer]]  # a tolerance -> a call that solves one problem to it


@torch.no_grad()
def torch_loop(problem: Problem, backward: bool = True, tol: float = TOL) -> Answer:
    """The loop a careful user writes: ``relu(addmm)``, per-sample residuals, one host read an iteration."""
    W, c, g = problem.W, problem.c, problem.g
    Wt = W.t()
    z = torch.zeros_like(c)
    forward, done = 0, False
    while not done and forward < MAX_ITER:
        forward += 1
        new = torch.relu_(torch.addmm(c, z, Wt))
        done = converged(z, new, tol).item()
        z = new
    if not backward:
        return Answer(z, None, forward)
    d = (z > 0).to(z.dtype)
    u = torch.zeros_like(g)
    adjoint, done = 0, False
    while not done and adjoint < MAX_ITER:
        adjoint += 1
        new = torch.addmm(g, u, W).mul_(d)
        done = converged(u, new, tol).item()
        u = new
    return Answer(z, u.t() @ z, forward, adjoint)


def converged(y: Tensor, fy: Tensor, tol: float) -> Tensor:
    """deq's rule, asked of the whole batch: ``||f(y) - y|| <= tol ||f(y)||`` for every sample. A bool tensor ()."""
    norm = torch.linalg.vector_norm
    return (norm(fy - y, dim=1) <= tol * norm(fy, dim=1)).all()


def has_compiler() -> bool:
    """Whether torch.compile finds a C++ compiler for the CPU."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        return False
    return True


def make_compiled_loop(tol: float = TOL) -> Callable[[Problem, bool], Answer]:
    """:func:`torch_loop` with ``COMPILED_STEPS`` evaluations and one residual in a graph of torch.compile, which cannot
    leave early. The first call compiles for the problem's shape and the number of threads: some seconds."""
    torch.compiler.reset()  # otherwise the ninth shape runs uncompiled

    def forward_steps(z: Tensor, c: Tensor, Wt: Tensor) -> tuple[Tensor, Tensor]:
        for _ in range(COMPILED_STEPS):
            last, z = z, torch.relu(torch.addmm(c, z, Wt))
        return z, converged(last, z, tol)

    def adjoint_steps(u: Tensor, g: Tensor, W: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
        for _ in range(COMPILED_STEPS):
            last, u = u, torch.addmm(g, u, W) * d
        return u, converged(last, u, tol)

    forward, adjoint = (torch.compile(steps, dynamic=False) for steps in (forward_steps, adjoint_steps))

    def repeat(steps: Callable[..., tuple[Tensor, Tensor]], y: Tensor, *constants: Tensor) -> tuple[Tensor, int]:
        count, done = 0, False
        while not done and count < MAX_ITER:
            y, flag = steps(y, *constants)
            done, count = flag.item(), count + COMPILED_STEPS
        return y, count

    @torch.no_grad()
    def compiled_loop(problem: Problem, backward: bool = True) -> Answer:
        zero = torch.zeros_like(problem.c)
        z, evaluations = repeat(forward, zero, problem.c, problem.W.t())
        if not backward:
            return Answer(z, None, evaluations)
        u, adjoint_evaluations = repeat(adjoint, zero, problem.g, problem.W, (z > 0).to(z.dtype))
        return Answer(z, u.t() @ z, evaluations, adjoint_evaluations)

    return compiled_loop


def make_gemm_only(problem: Problem, forward: int, adjoint: int) -> Callable[[], None]:
    """The matrix products of :func:`torch_loop` and nothing else: what a loop without any overhead would cost.

    forward, adjoint: the loop's evaluations, one product each, and one more for dW; none with ``adjoint=0``.
    """
    z, out, dW = torch.relu(problem.c), torch.empty_like(problem.c), torch.empty_like(problem.W)
    W, Wt, zt = problem.W, problem.W.t(), z.t()

    def gemm_only() -> None:
        for _ in range(forward):
            torch.mm(z, Wt, out=out)
        for _ in range(adjoint):
            torch.mm(z, W, out=out)
        if adjoint:
            torch.mm(zt, z, out=dW)

    return gemm_only


def has_torchdeq() -> bool:
    return find_spec("torchdeq") is not None


def make_torchdeq(solver: str, tol: float = TOL) -> Callable[..., Answer]:
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
        f_tol=tol,
        b_tol=tol,
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


def torchdeq_makers(problem: Problem, backward: bool = True) -> dict[str, Maker]:
    """Every solver of torchdeq, by label."""

    def maker(solver: str) -> Maker:
        return lambda tol: partial(make_torchdeq(solver, tol), problem, backward)

    return {f"torchdeq {solver}": maker(solver) for solver in TORCHDEQ_SOLVERS}
