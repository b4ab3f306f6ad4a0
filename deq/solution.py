"""What a solve returns: the equilibrium and, for every sample, how it was reached."""

import enum
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import stats as layout
from .modes import lacks_numbers


class Status(enum.IntEnum):
    """How one sample's solve ended. Only CONVERGED carries the promise ``residual <= tol``."""

    CONVERGED = 0
    MAX_ITER = 1  # still making progress when the iterations ran out
    STALLED = 2  # the residual stopped falling: a limit cycle, or the floor of the precision
    DIVERGED = 3  # the iterates grew until nothing of the injection was left in them
    NONFINITE = 4  # the function returned NaN or infinity


class ConvergenceWarning(RuntimeWarning):
    """Some samples did not converge; their best iterates were returned."""


class ConvergenceError(RuntimeError):
    """Some samples did not converge and ``on_failure="raise"``; ``solution`` holds what was computed."""

    def __init__(self, message: str, solution: "Solution"):
        super().__init__(message)
        self.solution = solution

    def __reduce__(self) -> tuple:
        """With both arguments: exceptions are copied, and sent from one process to another, by their message alone."""
        return type(self), (*self.args, self.solution), self.__dict__


@dataclass(eq=False)  # not frozen: that would cost each call 4 us where caches are cold
class Solution:
    """Equilibria of a batch.

    z: (..., m) equilibrium in the dtype of the injection; carries the gradient.
    iterations: (...) int32, evaluations of ``f`` that the sample needed, the free first one ``f(0) = act(c)`` included.
    residual: (...) float32 or float64, ``||f(y) - y|| / ||f(y)||`` (2-norm) at the last point ``y`` judged; ``z`` is
        ``f(y)``, one evaluation better. For a sample that failed, ``y`` is the point with the smallest residual.
    status: (...) uint8, values of :class:`Status`.
    plan: what was run and why; None in a compiled graph, where it is not known yet.
    stats: the buffer (:mod:`deq.stats`) that iterations, residual and status are views of, made when they are read.
    when_read: called once with the solution when the status is first read; a solve on a GPU, which waits for nothing,
        warns or raises there.
    """

    z: Tensor
    stats: Tensor
    plan: Any = None
    when_read: Callable[["Solution"], None] | None = None

    @property
    def iterations(self) -> Tensor:
        return layout.iterations(self.z, self.stats)

    @property
    def residual(self) -> Tensor:
        return layout.residual(self.z, self.stats)

    @property
    def status(self) -> Tensor:
        if self.when_read is not None:
            when_read, self.when_read = self.when_read, None
            when_read(self)
        return layout.status(self.z, self.stats)

    @property
    def converged(self) -> Tensor:
        """(...) bool, true where ``status`` is CONVERGED."""
        return self.status == Status.CONVERGED.value  # a compiled graph compares nothing with an enum

    def detach(self) -> "Solution":
        """The same solution without its autograd graph."""
        inside = torch._C._are_functorch_transforms_active() and not torch.compiler.is_compiling()
        kind = SolutionOfTransform if inside else Solution
        return kind(self.z.detach(), self.stats, self.plan, self.when_read)

    def __getstate__(self) -> dict:
        """Of a copy, or of what goes to another process: what was to be said when the status is read is said first."""
        if self.when_read is not None:
            _ = self.status
        return self.__dict__

    def __repr__(self) -> str:
        if lacks_numbers(self.z) or torch._C._functorch.is_functorch_wrapped_tensor(self.z):
            return f"Solution(z={tuple(self.z.shape)}, plan={self.plan})"  # there are no numbers to read, or not yet
        done = int(self.converged.sum())
        total = self.status.numel()
        most = int(self.iterations.max()) if total else 0
        worst = float(self.residual.max()) if total else 0.0
        return (
            f"Solution(z={tuple(self.z.shape)}, converged={done}/{total}, "
            f"iterations<={most}, residual<={worst:.1e}, plan={self.plan})"
        )


class SolutionOfTransform(Solution):
    """Of a call inside of torch.func, for who reads it when that is over: batches of torch.vmap are dimensions then,
    the first ones."""

    @property
    def z(self) -> Tensor:
        if torch._C._functorch.is_functorch_wrapped_tensor(self._z) and not torch._C._are_functorch_transforms_active():
            (self._z, self._batches), (self.stats, _) = map(outside_of_transforms, (self._z, self.stats))
        return self._z

    @z.setter
    def z(self, z: Tensor) -> None:
        self._z, self._batches = z, 0

    @property
    def iterations(self) -> Tensor:
        return self._said(layout.iterations)

    @property
    def residual(self) -> Tensor:
        return self._said(layout.residual)

    @property
    def status(self) -> Tensor:
        return self._said(layout.status) if self.when_read is None else super().status

    def __getstate__(self) -> dict:
        _ = self.z
        return super().__getstate__()

    def _said(self, field: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        z = self.z
        for _ in range(self._batches):
            field = torch.vmap(field)
        return field(z, self.stats)


def outside_of_transforms(t: Tensor) -> tuple[Tensor, int]:
    """The numbers of a tensor of transforms of torch.func that are over, and how many of the first dimensions are
    batches of torch.vmap, the outermost first."""
    if not torch._C._functorch.is_functorch_wrapped_tensor(t):
        return t, 0
    inner, batches = outside_of_transforms(torch._C._functorch.get_unwrapped(t))
    if not torch._C._functorch.is_batchedtensor(t):
        return inner, batches
    return inner.movedim(batches + torch._C._functorch.maybe_get_bdim(t), batches), batches + 1


def rounded(z: Tensor, stats: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """z (..., m) in the dtype of the injection, and what is said of its samples, in the same buffer but for transforms
    of torch.func; a sample that leaves the range is held at its edge and has diverged."""
    largest = torch.finfo(dtype).max
    held = z.clamp(-largest, largest)
    leaves = ((held != z) & z.isfinite()).any(-1)
    status = layout.status(z, stats).masked_fill_(leaves, int(Status.DIVERGED))
    if torch._C._are_functorch_transforms_active():  # where that was no view of the buffer
        stats = layout.pack(layout.iterations(z, stats), layout.residual(z, stats), status)
    return held.to(dtype), stats


def report_failures(solution: Solution, on_failure: str, tol: float, what: str) -> None:
    """Warn or raise once for all samples that did not converge; silent for ``on_failure="ignore"``."""
    if on_failure == "ignore" or solution.status.numel() == 0:
        return
    failed = ~solution.converged
    count = int(failed.sum())
    if count == 0:
        return
    kinds = torch.bincount(solution.status[failed].reshape(-1).long(), minlength=len(Status)).tolist()
    named = ", ".join(f"{n} {Status(k).name}" for k, n in enumerate(kinds) if n)
    worst = float(solution.residual[failed].max())
    message = (
        f"{what}: {count} of {solution.status.numel()} samples did not converge ({named}); "
        f"worst residual {worst:.1e}, tol {tol:.1e}. Their best iterates"
    )
    if on_failure == "raise":
        raise ConvergenceError(f"{message} are in `solution` of this error.", solution)
    silence = "pass on_failure='ignore' to silence this"
    warn(f"{message} were returned; {silence}.")


def warn(message: str) -> None:
    """A ConvergenceWarning at the line of the caller's program: the last one before those of deq and torch, which has
    modules, the backward pass and the code of its graphs between, which belongs to no module."""
    frame, level = sys._getframe(), 1
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] in ("deq", "torch", ""):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, ConvergenceWarning, stacklevel=level)


def refuse_non_finite(bad: list[int], W: Tensor | None, samples: torch.Size) -> None:
    """Raise ValueError for ``bad``: one plus an index in W, c and z0, 0 where all is finite. W: None where it is gone.
    samples: their shape."""
    weight, injection, start = (index - 1 for index in bad)
    if weight >= 0 and W is None:
        raise ValueError("W must be finite; what was solved with held NaN or infinity")
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
