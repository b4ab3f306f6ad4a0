"""The front door: check the arguments, plan, run, report."""

import difflib
import math
import numbers

import torch
from torch import Tensor

from . import _library, structured
from .activations import get_activation
from .implicit import Problem, equilibrium
from .plan import DEFAULT_TOL, make_plan
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
            "direct" solves without iterating on z: the identity activation with any W, and LowerTriangular, Diagonal
            and DiagonalLowRank of deq.weights (``z`` is then the point judged); "auto" does so where it pays, and
            otherwise iterates plainly and accelerates the samples that are seen to contract slowly.
        criterion: "residual" stops a sample at ``r = ||f(y) - y|| / ||f(y)|| <= tol``; "error" stops it at
            ``r q / (1 - q) <= tol`` with its measured contraction q, an estimate of the distance to the fixed point.
        backward: "implicit" is exact; "one_step" (JFB) differentiates one evaluation at the equilibrium, "phantom" five
            damped ones, "unrolled" the whole plain iteration.
        on_failure: "warn", "raise" (:class:`deq.ConvergenceError`) or "ignore" when samples do not converge.
        backend: "auto", "cpu" or "reference".

    Returns:
        Solution with ``z`` (..., m) and the iterations, residual and status (...) of every sample.

    Raises:
        ValueError, TypeError: naming the argument, what came and what is allowed; also for NaN or infinity in W, c, z0.
        ConvergenceError: with ``on_failure="raise"``, carrying the solution.
    """
    if unknown:
        raise TypeError(_unknown_option(next(iter(unknown.items()))))
    _check_tensors(W.like() if isinstance(W, Structure) else W, c, z0)
    _check_options(tol, max_iter, backward, on_failure)
    get_activation(activation)
    for name, value in (("solver", solver), ("criterion", criterion), ("backend", backend)):
        if not isinstance(value, str):
            raise TypeError(f"{name} must be a string; got {value!r}")
    plan = make_plan(
        dtype=_DTYPES[c.dtype],
        device=c.device.type,
        solver=solver,
        backend=backend,
        criterion=criterion,
        tol=tol,
        max_iter=max_iter,
        compiled=_library.compiled is not None,
    )
    if solver == "direct" and backward != "implicit":
        raise ValueError(f"solver='direct' has the exact gradient only, backward='implicit'; got backward={backward!r}")
    if solver in ("auto", "direct") and backward == "implicit":
        solution = structured.solve(W, c, z0, activation, plan, on_failure, forced=solver == "direct")
        if solution is not None:
            if solver == "direct":  # otherwise every sample has converged
                report_failures(solution, on_failure, plan.tol, "deq.solve")
            return solution
    W = W.dense() if isinstance(W, Structure) else W
    shape, samples = c.shape, c.shape[:-1]
    canonical = c.dim() == W.dim()
    if not canonical:  # one sample dimension, or none: W (m, m) with c (B, m), W (S, m, m) with c (S, B, m)
        flat = (*shape[: W.dim() - 2], math.prod(shape[W.dim() - 2 : -1]), shape[-1])
        c, z0 = c.reshape(flat), None if z0 is None else z0.reshape(flat)
    z, iterations, residual, status, report = equilibrium(W, c, z0, Problem(activation, plan, on_failure), backward)
    if not canonical:
        z, iterations = z.reshape(shape), iterations.reshape(samples)
        residual, status = residual.reshape(samples), status.reshape(samples)
    solution = Solution(z, iterations, residual, status, plan)
    if not torch.compiler.is_compiling():  # inside a compiled graph nothing can be raised from values
        failed, *bad = report.tolist()
        if any(bad):
            _refuse_non_finite(bad, W, samples)
        if failed:
            report_failures(solution, on_failure, plan.tol, "deq.solve")
    return solution


def _unknown_option(item: tuple[str, object]) -> str:
    name, value = item
    options = list(solve.__kwdefaults__)
    close = difflib.get_close_matches(name, options, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"deq.solve has no option {name}={value!r}; {hint}allowed are {', '.join(options)}"


def _check_tensors(W: object, c: object, z0: object) -> None:
    for name, value in (("W", W), ("c", c), ("z0", z0)):
        if not (isinstance(value, Tensor) or (name == "z0" and value is None)):
            kinds = "a torch.Tensor or a structure from deq.weights" if name == "W" else "a torch.Tensor"
            raise TypeError(f"{name} must be {kinds}; got {type(value).__name__}")
    if W.dim() not in (2, 3) or W.shape[-1] != W.shape[-2]:
        raise ValueError(f"W must be (m, m) or (S, m, m); got shape {tuple(W.shape)}")
    if W.shape[-1] == 0:
        raise ValueError(f"W must have width m of at least 1; got shape {tuple(W.shape)}")
    if c.dim() < W.dim() - 1 or c.shape[-1] != W.shape[-1] or (W.dim() == 3 and c.shape[0] != W.shape[0]):
        leading = "..., " if W.dim() == 2 else f"{W.shape[0]}, ..., "
        raise ValueError(f"c must be ({leading}{W.shape[-1]}) for W {tuple(W.shape)}; got shape {tuple(c.shape)}")
    if W.dtype not in _DTYPES:
        raise TypeError(f"W must be {', '.join(_DTYPES.values())}; got {W.dtype}")
    for name, value in (("c", c), ("z0", z0)):
        if value is None:
            continue
        if value.dtype != W.dtype:
            raise TypeError(f"{name} must have the dtype of W, {W.dtype}; got {value.dtype}")
        if value.device != W.device:
            raise ValueError(f"{name} must be on the device of W, {W.device}; got {value.device}")
    if z0 is not None and z0.shape != c.shape:
        raise ValueError(f"z0 must have the shape of c, {tuple(c.shape)}; got {tuple(z0.shape)}")


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
    weight, injection, start = (index - 1 for index in bad)
    if weight >= 0:
        raise ValueError(f"W must be finite; W{_position(weight, W.shape)} is {W.reshape(-1)[weight].item()}")
    name, sample = ("c", injection) if injection >= 0 else ("z0", start)
    raise ValueError(f"{name} must be finite; {name}{_position(sample, samples)} holds NaN or infinity")


def _position(index: int, shape: torch.Size) -> str:
    """[i, j] of a flat index; empty for a single sample."""
    place = []
    for size in reversed(shape):
        place.insert(0, index % size)
        index //= size
    return str(place) if place else ""
