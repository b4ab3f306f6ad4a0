"""Verdicts of statistical claims: by median and sign test over seeds, and only about nets at their equilibrium."""

import math
import statistics
from collections.abc import Sequence

from ._equilibria import MOVED
from ._result import (
    CONDITIONAL,
    CONFOUNDED,
    EQUILIBRIUM,
    FINITE_DEPTH,
    NOT_JUDGED,
    NOT_REPRODUCED,
    REPRODUCED,
    Claim,
    number,
    sign_test,
    spread,
)

SEEDS = 8  # fewer are not judged: seven of eight is the weakest sign test below SIGNIFICANT
SIGNIFICANT = 0.05
RESIDUAL = 1e-4  # relative; above it a net is not at its equilibrium


def kind_of(evidence: dict | None) -> str:
    """EQUILIBRIUM if in every seed the residual is small, also with ten times the steps, and the metric moves by MOVED
    at most with them; "" without evidence."""
    if evidence is None:
        return ""
    still = evidence["moved"] is not None and evidence["moved"] <= MOVED
    small = all(r is not None and r <= RESIDUAL for r in (evidence["residual"], evidence["residual_again"]))
    return EQUILIBRIUM if still and small else FINITE_DEPTH


def beats(
    statement: str,
    source: str,
    ours: dict,
    theirs: Sequence[dict],
    key: str = "mse",
    *,
    quick: bool,
    setting: str = "",
    conditions: str = "",
    about_equilibria: bool = True,
    larger: bool = False,
) -> Claim:
    """Is ``ours[key]`` below that of every row of ``theirs`` (above it if ``larger``)?

    Rows: {"model", key: one value a seed, "evidence"}. measured is the ratio of the medians, of the best of theirs over
    ours (ours over theirs if ``larger``), so that more than 1 is in favour of the statement. REPRODUCED needs that, and
    a sign test over seeds against every one of theirs; CONDITIONAL where ``conditions`` are named. A claim about
    equilibria whose net is at none is CONFOUNDED, whatever the numbers.
    """
    median = {r["model"]: spread(r[key]).median for r in (ours, *theirs)}
    if larger:
        median = {
            r["model"]: statistics.median(v if _finite(v) else -math.inf for v in r[key]) for r in (ours, *theirs)
        }
    best = (max if larger else min)(theirs, key=lambda r: median[r["model"]])
    ratios = sorted(_ratio(a, b, larger) for a, b in zip(ours[key], best[key], strict=True))
    measured = _ratio(median[ours["model"]], median[best["model"]], larger)
    seeds = len(ours[key])
    wins = {r["model"]: sum(_ratio(a, b, larger) > 1 for a, b in zip(ours[key], r[key], strict=True)) for r in theirs}
    p = max(sign_test(w, seeds) for w in wins.values())
    kind = kind_of(ours.get("evidence"))
    verdict = CONDITIONAL if conditions else REPRODUCED
    if not (measured > 1 and p <= SIGNIFICANT):
        verdict = NOT_REPRODUCED
    if about_equilibria and kind == FINITE_DEPTH:
        verdict = CONFOUNDED
    if quick or seeds < SEEDS:
        verdict = NOT_JUDGED
    won = ", ".join(f"{w} against {name}" for name, w in wins.items())
    note = f"{ours['model']} won, of {seeds} seeds: {won}; sign test p <= {number(p)}"
    return Claim(
        statement,
        source,
        measured,
        ">",
        1,
        verdict,
        f"{note}; {conditions}" if conditions else note,
        setting=setting,
        seeds=seeds,
        low=ratios[(seeds - 1) // 4],
        high=ratios[-1 - (seeds - 1) // 4],
        kind=kind,
        evidence=tuple({"model": r["model"]} | r["evidence"] for r in (ours, *theirs) if r.get("evidence")),
    )


def _finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _ratio(ours: float | None, theirs: float | None, larger: bool) -> float:
    """theirs / ours (ours / theirs if ``larger``) of nonnegative values; a failure is infinitely bad, two of them
    equal."""
    if not _finite(ours) or not _finite(theirs):
        return 1.0 if not _finite(ours) and not _finite(theirs) else 0.0 if not _finite(ours) else math.inf
    above, below = (ours, theirs) if larger else (theirs, ours)
    return 1.0 if above == below else math.inf if below == 0 else above / below
