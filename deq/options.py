"""The options of a solve: checked, and made into what is run."""

import difflib
import math
import numbers
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

import torch

from . import _cuda, _triton
from .activations import get_activation
from .implicit import Problem
from .plan import DEFAULT_TOL, make_plan

BACKWARDS = ("implicit", "phantom", "one_step", "unrolled")
ON_FAILURE = ("warn", "raise", "ignore")
DTYPES = {getattr(torch, name): name for name in DEFAULT_TOL}


@lru_cache(maxsize=256, typed=True)  # a training run asks the same thing at every step; 1, 1.0 and True are not one
def problem_of(
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
) -> Problem:
    """What the options of :func:`deq.solve` ask for, for an injection of that dtype on that device.

    compiled: whether the compiled library is loaded. Raises ValueError or TypeError that name the option.
    """
    check(tol, max_iter, backward, on_failure)
    get_activation(activation)
    for name, value in (("solver", solver), ("criterion", criterion), ("backend", backend)):
        if not isinstance(value, str):
            raise TypeError(f"{name} must be a string; got {value!r}")
    is_unrolled = backward == "unrolled" and solver in ("auto", "anderson", "cayley")
    plan = make_plan(
        dtype=DTYPES[dtype],
        device=device,
        activation=activation,
        solver="plain" if is_unrolled else solver,
        backend=backend,
        criterion=criterion,
        tol=tol,
        max_iter=max_iter,
        compiled=compiled,
        why_no_triton=_triton.why_not(device) if backend == "triton" or device != "cpu" else "",
        why_no_cuda=_cuda.why_not(device),
    )
    if is_unrolled:
        plan = replace(plan, why=(*plan.why, "plain: backward='unrolled' differentiates the plain iteration"))
    return Problem(activation, plan, on_failure)


def check_backward(backward: object) -> None:
    """Raise ValueError for one that there is not."""
    if backward not in BACKWARDS:
        raise ValueError(f"backward must be one of {', '.join(map(repr, BACKWARDS))}; got {backward!r}")


def check(tol: object, max_iter: object, backward: object, on_failure: object) -> None:
    """Raise ValueError or TypeError for one that cannot be, whatever is solved."""
    if tol is not None:
        if not isinstance(tol, numbers.Real) or isinstance(tol, bool):
            raise TypeError(f"tol must be a number; got {tol!r}")
        if not 0 < as_float(tol) < math.inf:
            raise ValueError(f"tol must be positive and finite; got {tol!r}")
    if max_iter is not None:
        if not isinstance(max_iter, numbers.Integral) or isinstance(max_iter, bool):
            raise TypeError(f"max_iter must be an integer; got {max_iter!r}")
        if not 1 <= max_iter < 2**31:
            raise ValueError(f"max_iter must be at least 1 and below 2**31; got {max_iter!r}")
    check_backward(backward)
    if on_failure not in ON_FAILURE:
        raise ValueError(f"on_failure must be one of {', '.join(map(repr, ON_FAILURE))}; got {on_failure!r}")


def as_float(value: numbers.Real) -> float:
    """The nearest float; infinite for an integer or a fraction that is beyond all of them."""
    try:
        return float(value)
    except OverflowError:
        return math.copysign(math.inf, value > 0 or -1)


def unknown_option(function: str, item: tuple[str, object], options: Sequence[str]) -> str:
    """What to say of an option that ``function`` does not have."""
    name, value = item
    close = difflib.get_close_matches(name, list(options), n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{function} has no option {name}={value!r}; {hint}allowed are {', '.join(options)}"
