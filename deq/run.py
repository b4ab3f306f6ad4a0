"""Runs a problem whose arguments are checked: by the means that serve it, and tells what became of its samples."""

import math
from functools import partial

import torch
from torch import Tensor

from . import direct
from . import stats as layout
from .backends import Deferred
from .implicit import Problem, equilibrium, report_gradients
from .indicators import fitted
from .plan import LargeWeight
from .solution import Solution, Status, refuse_non_finite, report_failures, rounded
from .weights import Structure


def run(
    W: Tensor | Structure, c: Tensor, z0: Tensor | None, problem: Problem, solver: str, backward: str, frozen: bool
) -> Solution:
    """The solution of ``z = act(W z + c)``, with the gradient that ``backward`` names.

    c (..., m), W and z0 as in :func:`deq.solve`; frozen: whether W is not being trained.
    Raises ValueError for NaN or infinity in W, c or z0, and ConvergenceError with ``on_failure="raise"``.
    """
    activation, general, on_failure = problem
    is_structure = isinstance(W, Structure)
    if (is_structure or activation == "identity" or solver == "direct") and solver in ("auto", "direct"):
        found = direct.solve(W, c, z0, problem, backward, solver == "direct", frozen)
        if isinstance(found, Tensor):
            z0 = found
        elif found is not None:
            solution, report = found
            if report is not None:
                solution.when_read = partial(_report_deferred, report, on_failure)
            return solution
    shape, dtype = c.shape, c.dtype
    if is_structure:
        W = W.formed()
        if W.dtype != dtype:  # W has more digits than 16 bits hold: solved as its dtype, and z is rounded once
            c, z0 = c.to(W.dtype), None if z0 is None else z0.to(W.dtype)
    is_canonical = len(shape) == W.dim()
    if not is_canonical:
        flat = canonical_shape(W.dim(), shape)
        c, z0 = c.reshape(flat), None if z0 is None else z0.reshape(flat)
    if general.adapts:
        problem = Problem(activation, fitted(general, W, c, frozen), on_failure)
    try:
        z, stats, report = equilibrium(W, c, z0, problem, backward)
    except LargeWeight:
        problem = Problem(activation, fitted(general, W, c, frozen, large=True), on_failure)
        z, stats, report = equilibrium(W, c, z0, problem, backward)
    if z.dtype != dtype:
        z, stats, report = _rounded(z, stats, report, dtype)
    solution = Solution(z if is_canonical else z.reshape(shape), stats, problem.plan)
    if isinstance(report, Deferred):
        solution.when_read = partial(_report_deferred, report, on_failure)
    elif report is not None and any(report):
        refuse_non_finite(report[1:], W, shape[:-1])
        report_failures(solution, on_failure, problem.plan.tol, "deq.solve")
    return solution


def _rounded(z: Tensor, stats: Tensor, report: list[int] | Deferred | None, dtype: torch.dtype) -> tuple:
    """z in a dtype of 16 bits, and what is said of that."""
    narrow, said = rounded(z, stats, dtype)
    if isinstance(report, Deferred):
        if report.rescue is not None:
            rescue, found, given = report.rescue, z.data, narrow.data

            def rescue_and_round() -> None:
                rescue()
                given.copy_(rounded(found, stats, dtype)[0])

            report.rescue = rescue_and_round
    elif report is not None:
        report = [int((layout.status(z, said) != Status.CONVERGED).sum()), *report[1:]]
    return narrow, said, report


def canonical_shape(dims: int, shape: torch.Size) -> tuple[int, ...]:
    """The shape of samples (..., m) as the engine takes them: (B, m) with a W (m, m), of two ``dims``, (S, B, m) with a
    W (S, m, m)."""
    return *shape[: dims - 2], math.prod(shape[dims - 2 : -1]), shape[-1]


def _report_deferred(deferred: Deferred, on_failure: str, solution: Solution) -> None:
    """What the front door says of a solve that was still on the GPU when it returned."""
    failed, *bad = deferred.read()
    refuse_non_finite(bad, deferred.weight(), solution.z.shape[:-1])
    if failed and deferred.rescue is not None:
        deferred.rescue()
    report_failures(solution, on_failure, solution.plan.tol, "deq.solve")
    report_gradients(solution)
