"""What every experiment returns: claims with their verdicts, tables, raw values and a figure."""

import math
import operator
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PROVED = "proved"  # a theorem, checked here on numbers
VIOLATED = "violated"  # a theorem that the numbers contradict: a defect of this package
REPRODUCED = "reproduced"
CONDITIONAL = "reproduced under conditions"
NOT_REPRODUCED = "not reproduced"
CONFOUNDED = "confounded"  # explained by something else, or measured on a net that is not at its equilibrium
NOT_JUDGED = "not judged"  # a quick run, or too few seeds

EQUILIBRIUM = "equilibrium"
FINITE_DEPTH = "weight-tied, finite depth"  # its residual or its metric moves with ten times the steps

_RELATIONS = {"<=": operator.le, "<": operator.lt, ">=": operator.ge, ">": operator.gt, "==": operator.eq}


@dataclass(frozen=True)
class Claim:
    """One statement of the source and what was measured.

    statement: what is claimed, with the measured quantity first. source: where the claim comes from.
    measured, relation, required: the comparison in numbers. verdict: one of the words above.
    note: where the extreme value was met, or the conditions of the verdict. setting: models, sizes, data.
    seeds: networks per model, None where nothing is random. low, high: quartiles of ``measured`` over the seeds.
    kind: EQUILIBRIUM or FINITE_DEPTH where a trained DEQ takes part, by its ``evidence``: one dict for each such net,
    with its residual, its metric, and both again after ten times the solver steps.
    """

    statement: str
    source: str
    measured: float
    relation: str
    required: float
    verdict: str
    note: str = ""
    setting: str = ""
    seeds: int | None = None
    low: float | None = None
    high: float | None = None
    kind: str = ""
    evidence: Sequence[dict] = ()

    @property
    def holds(self) -> bool:
        return _RELATIONS[self.relation](self.measured, self.required)

    def sentence(self) -> str:
        """The comparison in words, for messages."""
        note = f" ({self.note})" if self.note else ""
        return (
            f"{self.source}: {self.statement}: measured {number(self.measured)}, "
            f"required {self.relation} {number(self.required)}{note}"
        )


def proved(
    statement: str, source: str, measured: float | None, relation: str, required: float, note: str = "", **more
) -> Claim:
    """A claim that must hold: its verdict is "proved", or "violated" when the numbers (NaN included, and None, which it
    becomes in what is kept on disk) disagree."""
    measured = math.nan if measured is None else measured
    verdict = PROVED if _RELATIONS[relation](measured, required) else VIOLATED
    return Claim(statement, source, measured, relation, required, verdict, note, **more)


def proved_for_all(
    statement: str,
    source: str,
    rows: Sequence[dict],
    value: Callable[[dict], float | None],
    relation: str,
    required: float,
    **more,
) -> Claim:
    """:func:`proved` on the least favourable of ``rows``, which the note names by its "case"."""

    def slack(row: dict) -> float:
        v = value(row)
        if v is None or math.isnan(v):
            return -math.inf
        return {"<": required - v, ">": v - required, "=": -abs(v - required)}[relation[0]]

    worst = min(rows, key=slack)
    return proved(statement, source, value(worst), relation, required, worst["case"], **more)


@dataclass(frozen=True)
class Table:
    """A short table: at most 80 characters wide when printed."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Result:
    """Outcome of an experiment. ``values`` is JSON: every number that a claim, table or figure was made from."""

    claims: Sequence[Claim]
    tables: Sequence[Table]
    values: dict
    figure: "Figure"
    notes: Sequence[str] = field(default=())

    @property
    def violated(self) -> list[Claim]:
        return [c for c in self.claims if c.verdict == VIOLATED]

    @property
    def verdict(self) -> str:
        """One line for the whole experiment: how many claims have which verdict, most frequent first."""
        checked = [c for c in self.claims if c.verdict in (PROVED, VIOLATED)]
        parts = [f"{len(checked) - len(self.violated)} of {len(checked)} proved claims hold"] if checked else []
        others = Counter(c.verdict for c in self.claims if c.verdict not in (PROVED, VIOLATED))
        if others:
            told = ", ".join(f"{n} {verdict}" for verdict, n in others.most_common())
            parts.append(f"{'other claims' if checked else 'claims'}: {told}")
        return "; ".join(parts)


@dataclass(frozen=True)
class Spread:
    """Median and quartiles over seeds."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{number(self.median)} [{number(self.low)}, {number(self.high)}]"


def spread(values: Sequence[float | None]) -> Spread:
    """Median and quartiles; a value that is missing or not finite counts as infinitely bad."""
    seen = sorted(v if v is not None and math.isfinite(v) else math.inf for v in values)
    if len(seen) == 1:
        return Spread(seen[0], seen[0], seen[0])
    return Spread(statistics.median(seen), _quantile(seen, 0.25), _quantile(seen, 0.75))


def _quantile(ordered: Sequence[float], q: float) -> float:
    at = q * (len(ordered) - 1)
    low, high = ordered[math.floor(at)], ordered[math.ceil(at)]
    return low if low == high else low + (at - math.floor(at)) * (high - low)  # inf - inf is not a number


def sign_test(wins: int, trials: int) -> float:
    """One-sided p-value of at least ``wins`` successes in ``trials`` fair coin flips."""
    return sum(math.comb(trials, k) for k in range(wins, trials + 1)) / 2**trials


def number(value: float | int | None, digits: int = 3) -> str:
    """A few significant digits, short."""
    if value is None:
        return "-"
    if isinstance(value, int) or (math.isfinite(value) and value == int(value) and abs(value) < 1e5):
        return str(int(value)) if abs(value) < 10**9 else f"{value:.2e}"
    if value and math.isfinite(value) and not 1e-2 <= abs(value) < 1e4:
        mantissa, exponent = f"{value:.{digits - 2}e}".split("e")
        return f"{mantissa}e{int(exponent)}"
    text = f"{value:.{digits}g}"
    return f"{value:.0f}" if "e" in text else text  # 1570, not 1.57e+03


def to_json(value: object) -> object:
    """Tuples to lists and non-finite numbers to None, which JSON has no name for."""
    if isinstance(value, dict):
        return {str(k): to_json(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
