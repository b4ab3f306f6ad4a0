"""How well an answer solves its problem, and which of several solvers is the fastest that solves it."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .baselines import Answer, Maker
from .cases import TOL, Problem
from .device import clock

# A returned z is usually f(y) for the y that was judged: its own residual is larger by up to the norm of W.
SOLVED = 10 * TOL
TINY = torch.finfo(torch.float64).tiny
ELSEWHERE = 1e-2  # a solved sample further from the true z than this is at another equilibrium, if W admits several


@dataclass(frozen=True)
class Quality:
    """error: the worst relative error of a sample that is not at another equilibrium. gradient_error: relative, of dW.
    failed: share of samples that are not solved. elsewhere: samples that are solved, at another equilibrium."""

    error: float
    gradient_error: float | None
    failed: float
    elsewhere: int

    def no_worse_than(self, other: "Quality") -> bool:
        """In z; two units in the last place of float32 are no difference. Not in dW: one unit out of B x m whose sign
        only rounding decides moves dW by up to 1e-2, whoever solves and however well."""
        return self.error <= max(other.error, 2 * torch.finfo(torch.float32).eps)


@dataclass(frozen=True, eq=False)
class Truth:
    """A problem and its solution in float64: z (B, m), dW (m, m)."""

    problem: Problem
    z: Tensor
    dW: Tensor

    def judge(self, answer: Answer) -> Quality:
        problem, z, norm = self.problem, answer.z.double(), torch.linalg.vector_norm
        fz = torch.relu(torch.addmm(problem.c.double(), z, problem.W.double().mT))
        solved = norm(fz - z, dim=1) <= SOLVED * norm(fz, dim=1)  # false for NaN
        if (said := answer.said_to_converge) is not None:
            solved &= said
        elsewhere = solved & (norm(z - self.z, dim=1) > ELSEWHERE * norm(self.z, dim=1))
        here = ~elsewhere
        return Quality(
            error=_finite(worst_error(z[here], self.z[here])) if here.any() else 0.0,
            gradient_error=None if answer.dW is None else _finite(relative_error(answer.dW, self.dW)),
            failed=float((~solved).double().mean()),
            elsewhere=int(elsewhere.sum()),
        )


def worst_error(z: Tensor, exact: Tensor) -> float:
    """The largest relative error of a sample; 0 of a zero that is met."""
    norm = torch.linalg.vector_norm
    return float((norm(z.double() - exact, dim=1) / norm(exact, dim=1).clamp(min=TINY)).max())


def relative_error(a: Tensor, exact: Tensor) -> float:
    norm = torch.linalg.vector_norm
    return float(norm(a.double() - exact) / norm(exact).clamp(min=TINY))


def _finite(error: float) -> float:
    return error if math.isfinite(error) else math.inf


class Fastest(NamedTuple):
    """The chosen solver, and the evaluations and the share of failed samples of every one, by label."""

    label: str
    run: Callable[[], Answer]
    answer: Answer
    quality: Quality
    attempts: dict[str, dict]


def fastest(makers: Mapping[str, Maker], truth: Truth) -> "Fastest":
    """Of the solvers that solve every sample to ``TOL`` the one whose second call is the fastest. If none does, the one
    that fails least. One whose first call takes twice the best time gets no second."""
    tried = []
    for label, maker in makers.items():
        run = maker(TOL)
        seconds, answer = _timed(run, truth.z.device)
        quality = truth.judge(answer)
        if quality.failed == 0.0 and seconds < 2 * min((entry[1] for entry in tried if not entry[0]), default=math.inf):
            seconds = _timed(run, truth.z.device)[0]
        tried.append((quality.failed, seconds, label, run, answer, quality))
    attempts = {label: {"iterations": answer.iterations, "failed": failed} for failed, _, label, _, answer, _ in tried}
    return Fastest(*min(tried, key=lambda entry: entry[:2])[2:], attempts)


def _timed(run: Callable[[], Answer], device: torch.device) -> tuple[float, Answer]:
    read = clock(device)
    start = read()
    answer = run()
    return read() - start, answer
