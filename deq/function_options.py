"""The options of a fixed point of any function: checked, and made into rules of how to solve."""

import inspect
import math
import numbers
from collections.abc import Iterable, Sequence
from functools import lru_cache

import torch

from .options import ON_FAILURE, as_float, unknown_option
from .solvers.generic import CRITERIA, METHODS, Rule

BACKWARDS = ("implicit", "phantom", "one_step", "neumann", "unrolled")
# Relative tolerances by the coarsest dtype of the state: as deq.solve's, but 16-bit states are computed by f itself in
# 16 bits, whose rounding no residual can get below.
DEFAULT_TOL = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 3e-2}
DEFAULT_MAX_ITER = 500
DEFAULT_DEPTH = {"plain": 1, "anderson": 5, "auto": 5, "broyden": 12, "newton_krylov": 20}


@lru_cache(maxsize=256, typed=True)  # 25 us of checks that would be the same in every step of a training
def rules_of(
    dtype: torch.dtype,
    *,
    solver: str,
    tol: float | None,
    max_iter: int | None,
    criterion: str,
    depth: int | None,
    damping: float,
    backward: str,
    backward_solver: str | None,
    backward_tol: float | None,
    backward_max_iter: int | None,
    backward_steps: int,
    backward_damping: float,
    keep: tuple[int, ...],
    on_failure: str,
    **unknown,
) -> tuple[Rule, Rule, tuple[int, ...]]:
    """The options, checked: how the fixed point and how its adjoint equation are solved, and what to keep."""
    if unknown:
        raise TypeError(unknown_option("deq.fixed_point", next(iter(unknown.items())), OPTIONS))
    _check_choice("solver", solver, METHODS)
    _check_choice("criterion", criterion, CRITERIA)
    _check_choice("backward", backward, BACKWARDS)
    _check_choice("on_failure", on_failure, ON_FAILURE)
    backward_solver = ("anderson" if solver == "plain" else solver) if backward_solver is None else backward_solver
    _check_choice("backward_solver", backward_solver, METHODS)
    damping = check_number("damping", damping, 0, 2)
    check_number("backward_damping", backward_damping, 0, 2)
    default = DEFAULT_TOL[dtype]
    tol = default if tol is None else check_number("tol", tol, 0, math.inf)
    backward_tol = (tol if criterion != "absolute" else default) if backward_tol is None else backward_tol
    backward_tol = check_number("backward_tol", backward_tol, 0, math.inf)
    max_iter = DEFAULT_MAX_ITER if max_iter is None else check_count("max_iter", max_iter)
    backward_max_iter = max_iter if backward_max_iter is None else check_count("backward_max_iter", backward_max_iter)
    check_count("backward_steps", backward_steps)
    depth = DEFAULT_DEPTH[solver] if depth is None else check_count("depth", depth)
    if backward == "unrolled":
        solver = "plain"
    rule = Rule(solver, tol, max_iter, depth, damping, criterion)
    adjoint = Rule(backward_solver, backward_tol, backward_max_iter, DEFAULT_DEPTH[backward_solver], affine=True)
    return rule, adjoint, tuple(sorted({check_count("keep", k) for k in keep}))


OPTIONS = (*list(inspect.signature(rules_of).parameters)[1:-1], "batch_dims", "tensors")  # of deq.fixed_point


def listed(name: str, value: object, kind: type, kinds: str) -> list:
    if not isinstance(value, Iterable):
        raise TypeError(f"{name} must be a sequence of {kinds}; got {value!r}")
    items = list(value)
    for item in items:
        if not isinstance(item, kind):
            raise TypeError(f"{name} must be a sequence of {kinds}; got one with {item!r}")
    return items


def _check_choice(name: str, value: object, allowed: Sequence[str]) -> None:
    if not isinstance(value, str):
        raise TypeError(f"{name} must be a string; got {value!r}")
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}; got {value!r}")


def check_number(name: str, value: object, low: float, high: float) -> float:
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number; got {value!r}")
    number = as_float(value)
    if not low < number < high:
        raise ValueError(f"{name} must lie between {low} and {high}; got {value!r}")
    return number


def check_count(name: str, value: object) -> int:
    if not isinstance(value, numbers.Integral) or isinstance(value, bool):
        raise TypeError(f"{name} must be an integer; got {value!r}")
    if not 1 <= value < 2**31:
        raise ValueError(f"{name} must be at least 1 and below 2**31; got {value!r}")
    return int(value)
