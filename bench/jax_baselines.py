"""jaxopt and optimistix, where they are installed. XLA runs on all cores, whatever torch is told, and cannot be changed
within a process: both are compared only where torch and deq have all cores too.

Both judge the whole batch by one norm. Their tolerances are set so that it means ``TOL`` relative to the norm of the
solution: looser than per sample, in their favour; errors stand beside the times.
"""

import os
from collections.abc import Callable
from importlib.util import find_spec

import torch
from torch import Tensor

from .baselines import MAX_ITER, Answer, Maker
from .cases import Problem

PACKAGES = ("jaxopt", "optimistix")
ANDERSON_DEPTH = 5
GMRES_OPTIONS = {"restart": 60, "stagnation_iters": 60, "max_steps": MAX_ITER}


def why_not(package: str, threads: int) -> str | None:
    """Why a package cannot be measured with so many threads; None if it can."""
    if find_spec(package) is None:
        return "not installed"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return None if threads == cores else f"XLA uses all {cores} cores"


def makers(package: str, problem: Problem, backward: bool, size: float) -> dict[str, Maker]:
    """The package's solvers by label. size: 2-norm of the whole solution (B, m), which absolute tolerances refer to."""
    return {
        f"{package} {label}": lambda tol, solver=solver: _make(solver, problem, backward, tol, size)
        for label, solver in _SOLVERS[package].items()
    }


def _make(solver: Callable, problem: Problem, backward: bool, tol: float, size: float) -> Callable[[], Answer]:
    """One jitted call; tensors cross without a copy, since both sides hold row-major CPU memory."""
    import jax
    import jax.numpy as jnp

    def step(z, W, c):
        return jax.nn.relu(z @ W.T + c)

    def solve(W, c):
        return solver(step, jnp.zeros_like(c), (W, c), tol, size)

    def with_gradient(W, c, g):
        z, pull, count = jax.vjp(solve, W, c, has_aux=True)
        return z, pull(g)[0], count

    arguments = (problem.W, problem.c, problem.g) if backward else (problem.W, problem.c)
    compiled = jax.jit(with_gradient if backward else solve)
    compiled = compiled.lower(*(jnp.from_dlpack(t) for t in arguments)).compile()

    def run() -> Answer:
        result = jax.block_until_ready(compiled(*(jnp.from_dlpack(t) for t in arguments)))
        z, *dW, count = result
        return Answer(_tensor(z), _tensor(dW[0]) if dW else None, int(count))

    return run


def _tensor(array) -> Tensor:
    return torch.from_dlpack(array)


def _jaxopt_plain(step, z0, parameters, tol, size):
    from jaxopt import FixedPointIteration

    z, state = FixedPointIteration(step, maxiter=MAX_ITER, tol=tol * size).run(z0, *parameters)
    return z, state.iter_num


def _jaxopt_anderson(step, z0, parameters, tol, size):
    from jaxopt import AndersonAcceleration

    solver = AndersonAcceleration(step, history_size=ANDERSON_DEPTH, maxiter=MAX_ITER, tol=tol * size)
    z, state = solver.run(z0, *parameters)
    return z, state.iter_num


def _optimistix_plain(step, z0, parameters, tol, size):
    import lineax
    import optimistix

    rms = size / z0.size**0.5
    solution = optimistix.fixed_point(
        lambda z, parameters: step(z, *parameters),
        optimistix.FixedPointIteration(rtol=0.0, atol=tol * rms, norm=optimistix.rms_norm),
        z0,
        parameters,
        max_steps=MAX_ITER,
        throw=False,
        # The default adjoint factorises one matrix of B m rows; a shorter restart stagnates on half of the problems.
        adjoint=optimistix.ImplicitAdjoint(lineax.GMRES(rtol=tol, atol=1e-2 * tol, **GMRES_OPTIONS)),
    )
    return solution.value, solution.stats["num_steps"]


_SOLVERS = {
    "jaxopt": {"fixed point": _jaxopt_plain, "anderson": _jaxopt_anderson},
    "optimistix": {"fixed point": _optimistix_plain},
}
