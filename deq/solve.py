"""The front door: check the arguments, plan, run, report."""

import difflib
import math
import numbers
from functools import lru_cache, partial

import torch
from torch import Tensor

from . import _cuda, _library, _triton, direct
from .activations import get_activation
from .backends import Deferred
from .implicit import Problem, equilibrium, report_gradients
from .indicators import fitted
from .plan import DEFAULT_TOL, LargeWeight, make_plan
from .profiling import ranges
from .solution import Solution, report_failures
from .weights import Structure

BACKWARDS = ("implicit", "phantom", "one_step", "unrolled")
ON_FAILURE = ("warn", "raise", "ignore")
_DTYPES = {getattr(torch, name): name for name in DEFAULT_TOL}


def solve(
    W: Tensor | Structure,
    c: Tensor,
    activation: str = "relu",
    *,
    z0: Tensor | None = None,
    tol: float | None = None,
    max_iter: int | None = None,
    solver: str = "auto",
    criterion: str = "residual",
    backward: str = "implicit",
    on_failure: str = "warn",
    backend: str = "auto",
    **unknown,
) -> Solution:
    """Equilibrium ``z = act(W z + c)`` of every sample, with exact gradients for W and c.

    Args:
        W: (m, m), a structure from :mod:`deq.weights`, or batched (S, m, m) with ``c`` (S, ..., m). float32, float64,
            bfloat16 or float16; 16-bit problems are solved in float32 and rounded once.
        c: (..., m) injection ``U x + b``, dtype and device of W. Any strides.
        activation: a name of :data:`deq.activations.ACTIVATIONS`.
        z0: starting point, shape of c; zero if None. No gradient flows to it.
        tol: relative tolerance; 1e-5 in float32, 1e-10 in float64, 1e-4 in 16 bits if None. Serves the gradient too.
        max_iter: evaluations allowed for each sample, and for its gradient.
        solver: "plain" iterates ``z <- act(W z + c)`` strictly; "anderson" accelerates every sample from the start;
            "cayley" iterates the reflected map of :mod:`deq.solvers.cayley`, which converges for every monotone W;
            "direct" solves without iterating on z: the identity activation with any W, and LowerTriangular, Diagonal
            and DiagonalLowRank of deq.weights (``z`` is then the point judged); "auto" chooses, and takes samples that
            are slow or fail to other means (:mod:`deq.solvers.ladder`).
        criterion: "residual" stops a sample at ``r = ||f(y) - y|| / ||f(y)|| <= tol``; "error" stops it at
            ``r q / (1 - q) <= tol`` with its measured contraction q, an estimate of the distance to the fixed point.
        backward: "implicit" is exact; "one_step" (JFB) differentiates one evaluation at the equilibrium, "phantom" five
            damped ones, "unrolled" the whole plain iteration.
        on_failure: "warn", "raise" (:class:`deq.ConvergenceError`) or "ignore" when samples do not converge.
        backend: "auto"; "cpu", the compiled engine; "triton", kernels for NVIDIA GPUs, or for CPU tensors in Triton's
            interpreter; "cuda", compiled kernels that keep W on the chip, and Triton's for what they do not hold;
            "reference", plain PyTorch.

    Returns:
        Solution with ``z`` (..., m) and the iterations, residual and status (...) of every sample.

    Raises:
        ValueError, TypeError: naming the argument, what came and what is allowed; also for NaN or infinity in W, c, z0.
        ConvergenceError: with ``on_failure="raise"``, carrying the solution.
    """
    if unknown:
        raise TypeError(_unknown_option(next(iter(unknown.items()))))
    is_structure = isinstance(W, Structure)
    _check_tensors(W.like() if is_structure else W, c, z0)
    options = activation, tol, max_iter, solver, criterion, backward, on_failure, backend
    device = "cpu" if c.is_cpu else c.device.type
    # The types, because 1, 1.0 and True are one key and not one option.
    given = *options, c.dtype, device, _library.compiled is not None, type(tol), type(max_iter)
    try:
        problem = _make_problem(*given)
    except TypeError:
        problem = None
    if problem is None:  # an option that cannot be a key, or a wrong one: its own error
        problem = _make_problem.__wrapped__(*given)
    if (is_structure or activation == "identity" or solver == "direct") and solver in ("auto", "direct"):
        arguments = W, c, z0, problem, backward, solver == "direct"
        found = ranges.call("solve", direct.solve, *arguments) if ranges.listening else direct.solve(*arguments)
        if found is not None:
            solution, report = found
            if report is not None:
                solution.when_read = partial(_report_deferred, report, on_failure)
            return solution
    if is_structure:
        W = W.dense()
    shape, dims = c.shape, W.dim()
    canonical = len(shape) == dims
    if not canonical:  # one sample dimension, or none: W (m, m) with c (B, m), W (S, m, m) with c (S, B, m)
        flat = (*shape[: dims - 2], math.prod(shape[dims - 2 : -1]), shape[-1])
        c, z0 = c.reshape(flat), None if z0 is None else z0.reshape(flat)
    if problem.plan.adapts:
        general = problem
        problem = Problem(activation, fitted(general.plan, W, c), on_failure)
    try:
        z, stats, report = equilibrium(W, c, z0, problem, backward)
    except LargeWeight:
        problem = Problem(activation, fitted(general.plan, W, c, large=True), on_failure)
        z, stats, report = equilibrium(W, c, z0, problem, backward)
    solution = Solution(z if canonical else z.reshape(shape), stats, problem.plan)
    if isinstance(report, Deferred):
        solution.when_read = partial(_report_deferred, report, on_failure)
    elif report is not None and any(report):
        _refuse_non_finite(report[1:], W, shape[:-1])
        report_failures(solution, on_failure, problem.plan.tol, "deq.solve")
    return solution


def _report_deferred(deferred: Deferred, on_failure: str, solution: Solution) -> None:
    """What the front door says of a solve that was still on the GPU when it returned."""
    failed, *bad = deferred.read()
    _refuse_non_finite(bad, deferred.weight(), solution.z.shape[:-1])
    if failed and deferred.rescue is not None:
        deferred.rescue()
    report_failures(solution, on_failure, solution.plan.tol, "deq.solve")
    report_gradients(solution)


@lru_cache(maxsize=256)  # a training run asks the same thing at every step
def _make_problem(
    activation: str,
    tol: float | None,
    max_iter: int | None,
    solver: str,
    criterion: str,
    backward: str,
    on_failure: str,
    backend: str,
    dtype: torch.dtype,
    device: str,
    compiled: bool,
    *_types: type,
) -> Problem:
    """Checks the options of a solve and plans it."""
    _check_options(tol, max_iter, backward, on_failure)
    get_activation(activation)
    for name, value in (("solver", solver), ("criterion", criterion), ("backend", backend)):
        if not isinstance(value, str):
            raise TypeError(f"{name} must be a string; got {value!r}")
    plan = make_plan(
        dtype=_DTYPES[dtype],
        device=device,
        activation=activation,
        solver=solver,
        backend=backend,
        criterion=criterion,
        tol=tol,
        max_iter=max_iter,
        compiled=compiled,
        why_no_triton=_triton.why_not(device) if backend == "triton" or device != "cpu" else "",
        why_no_cuda=_cuda.why_not(device),
    )
    return Problem(activation, plan, on_failure)


def _unknown_option(item: tuple[str, object]) -> str:
    name, value = item
    options = list(solve.__kwdefaults__)
    close = difflib.get_close_matches(name, options, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"deq.solve has no option {name}={value!r}; {hint}allowed are {', '.join(options)}"


def _check_tensors(W: object, c: object, z0: object) -> None:
    if not isinstance(W, Tensor):
        raise TypeError(f"W must be a torch.Tensor or a structure from deq.weights; got {type(W).__name__}")
    if not isinstance(c, Tensor):
        raise TypeError(f"c must be a torch.Tensor; got {type(c).__name__}")
    weight, injection = W.shape, c.shape
    dims = len(weight)
    if dims not in (2, 3) or weight[-1] != weight[-2]:
        raise ValueError(f"W must be (m, m) or (S, m, m); got shape {tuple(weight)}")
    m = weight[-1]
    if m == 0:
        raise ValueError(f"W must have width m of at least 1; got shape {tuple(weight)}")
    if len(injection) < dims - 1 or injection[-1] != m or (dims == 3 and injection[0] != weight[0]):
        leading = "..., " if dims == 2 else f"{weight[0]}, ..., "
        raise ValueError(f"c must be ({leading}{m}) for W {tuple(weight)}; got shape {tuple(injection)}")
    if W.layout is not torch.strided:
        raise TypeError(f"W must be dense; got layout {W.layout}")
    if W.dtype not in _DTYPES:
        raise TypeError(f"W must be {', '.join(_DTYPES.values())}; got {W.dtype}")
    _check_like("c", c, W)
    if z0 is not None:
        if not isinstance(z0, Tensor):
            raise TypeError(f"z0 must be a torch.Tensor; got {type(z0).__name__}")
        _check_like("z0", z0, W)
        if z0.shape != injection:
            raise ValueError(f"z0 must have the shape of c, {tuple(injection)}; got {tuple(z0.shape)}")


def _check_like(name: str, value: Tensor, W: Tensor) -> None:
    if value.dtype != W.dtype:
        raise TypeError(f"{name} must have the dtype of W, {W.dtype}; got {value.dtype}")
    if value.layout is not torch.strided:
        raise TypeError(f"{name} must be dense; got layout {value.layout}")
    if not (value.is_cpu and W.is_cpu) and value.device != W.device:
        raise ValueError(f"{name} must be on the device of W, {W.device}; got {value.device}")


def _check_options(tol: object, max_iter: object, backward: object, on_failure: object) -> None:
    if tol is not None:
        if not isinstance(tol, numbers.Real) or isinstance(tol, bool):
            raise TypeError(f"tol must be a number; got {tol!r}")
        if not 0 < tol < math.inf:
            raise ValueError(f"tol must be positive and finite; got {tol!r}")
    if max_iter is not None:
        if not isinstance(max_iter, numbers.Integral) or isinstance(max_iter, bool):
            raise TypeError(f"max_iter must be an integer; got {max_iter!r}")
        if not 1 <= max_iter < 2**31:
            raise ValueError(f"max_iter must be at least 1 and below 2**31; got {max_iter!r}")
    if backward not in BACKWARDS:
        raise ValueError(f"backward must be one of {', '.join(map(repr, BACKWARDS))}; got {backward!r}")
    if on_failure not in ON_FAILURE:
        raise ValueError(f"on_failure must be one of {', '.join(map(repr, ON_FAILURE))}; got {on_failure!r}")


def _refuse_non_finite(bad: list[int], W: Tensor, samples: torch.Size) -> None:
    """``bad``: one plus an index in W, c and z0, 0 where all is finite."""
    weight, injection, start = (index - 1 for index in bad)
    if weight >= 0:
        raise ValueError(f"W must be finite; W{_position(weight, W.shape)} is {W.reshape(-1)[weight].item()}")
    for name, sample in (("c", injection), ("z0", start)):
        if sample >= 0:
            raise ValueError(f"{name} must be finite; {name}{_position(sample, samples)} holds NaN or infinity")


def _position(index: int, shape: torch.Size) -> str:
    """[i, j] of a flat index; empty for a single sample."""
    place = []
    for size in reversed(shape):
        place.insert(0, index % size)
        index //= size
    return str(place) if place else ""
