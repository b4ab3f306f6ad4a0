"""What every row with a DEQ must show: its residual, and that its metric does not move when it is solved harder."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..plan import DEFAULT_MAX_ITER
from ..reference import cell
from ..solve import solve

HARDER = {"tol": 1e-13, "max_iter": 10 * DEFAULT_MAX_ITER}  # against 1e-10 and DEFAULT_MAX_ITER
MOVED = 1e-3  # relative change of a metric above which it was not measured at an equilibrium


def solve_twice(W: Tensor, c: Tensor, metric: Callable[[Tensor], float]) -> tuple[dict, Tensor]:
    """Solve from zero with the engine's defaults and again with :data:`HARDER`: a row of numbers, and the second z."""
    first = solve(W, c, "relu", on_failure="ignore")
    again = solve(W, c, "relu", on_failure="ignore", **HARDER)
    row = {
        "residual": float(first.residual.max()),
        "residual_again": float(again.residual.max()),
        "evaluations": int(first.iterations.max()),
        "evaluations_again": int(again.iterations.max()),
        "unconverged": int((~again.converged).sum()),
        "metric": metric(first.z),
        "metric_again": metric(again.z),
    }
    return row, again.z


def moved(row: dict) -> float:
    """Relative change of the metric, from where it was used ("metric_used", or the first solve) to the harder solve;
    infinite where one of the two is not finite."""
    used, again = row.get("metric_used", row["metric"]), row["metric_again"]
    if any(metric is None or not math.isfinite(metric) for metric in (used, again)):  # None in what was kept on disk
        return math.inf
    change = abs(again - used)
    return change / used if used else change


def rounding(W: Tensor, c: Tensor, z: Tensor) -> Tensor:
    """Bound on the rounding error of W z + c, any order of summation: (m + 2) eps (|W| |z| + |c|), with eps twice the
    unit roundoff to spare."""
    return (c.shape[-1] + 2) * torch.finfo(c.dtype).eps * (z.abs() @ W.abs().mT + c.abs())


def difference_over_bound(W: Tensor, c: Tensor, z: Tensor, exact: Tensor) -> float:
    """Largest |z - exact| over (I - |W|)^-1 (|f(z) - z| + rounding): at most 1 if ``exact`` is the equilibrium.

    For lower triangular W with |w_ii| < 1 (spectral radius of |W| below 1), |z - z*| <= |f(z) - z| + |W| |z - z*|.
    """
    eye = torch.eye(c.shape[-1], dtype=c.dtype, device=c.device)
    defect = (cell(W, c, z, "relu") - z).abs() + rounding(W, c, z)
    bound = torch.linalg.solve_triangular((eye - W.abs()).mT, defect, upper=True, left=False)
    return float(((z - exact).abs() / bound.clamp(min=torch.finfo(c.dtype).tiny)).max())


def evidence(
    solved: Callable[[float, int], tuple[Tensor, Tensor]],
    metric: Callable[[Tensor], Tensor],
    used: Tensor,
    steps: int,
    trivial: float = 0.0,
) -> dict:
    """What a trained net shows of its equilibrium, seed by seed.

    solved(tol, steps): output and relative residual (S, B) of the net solved from zero with so many steps at most.
    metric: (S,) of an output. used: the metric (S,) of the net as it was trained. steps: of the first solve.
    moved: the largest change from there to ten times the steps, relative to the larger of the two and 1 % of the
    ``trivial`` metric, that of a constant; below that, float32 alone moves an error that is almost zero.
    """
    row = {"steps": steps}
    for name, tol, most in (("", 1e-10, steps), ("_again", 1e-13, 10 * steps)):
        output, residual = solved(tol, most)
        row["residual" + name] = _largest(residual)
        row["metric" + name] = metric(output).tolist()
    pairs = list(zip(used.tolist(), row["metric_again"], strict=True))
    shifts = [abs(after - before) / max(abs(before), abs(after), 0.01 * trivial, 1e-30) for before, after in pairs]
    return row | {"metric_used": used.tolist(), "moved": max(shifts, key=lambda v: float("inf") if v != v else v)}


def _largest(values: Tensor) -> float:
    return float(values.nan_to_num(nan=float("inf")).max())
