"""What the engine must reach when it chooses by itself, as data: ratios over a baseline for whole groups of cases.

A group reaches its goal if its worst case does. Baselines that fail to solve a case are left out of its ratios; that
deq itself solves every sample is a goal of its own.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from .cases import Case

PASSES = ("forward", "training")
SCALING_MUST = 1.85  # from one thread to two
MONOTONE_ITERATIONS = 30  # at most, where the plain iteration diverges


@dataclass(frozen=True, eq=False)
class Goal:
    """Ratios (must, stretch) over ``baseline`` in each pass, for the cases that it ``holds_for``.

    ``matched``: the ratio at the same error instead of that at the same tolerance.
    """

    name: str
    baseline: str
    holds_for: Callable[[Case], bool]
    forward: tuple[float, float]
    training: tuple[float, float]
    matched: bool = False


GOALS = (
    Goal("torchdeq, m <= 128", "torchdeq", lambda c: c.m <= 128, (6, 20), (6, 20)),
    Goal("torchdeq, m >= 256", "torchdeq", lambda c: 256 <= c.m <= 2048, (2.5, 8), (3, 8)),
    Goal("loop, m <= 128", "loop", lambda c: c.m <= 128, (3, 8), (2, 6)),
    Goal("loop, m >= 256", "loop", lambda c: c.m >= 256, (2.5, 6), (2, 6)),
    Goal("GEMM-only, B >= 64", "gemm", lambda c: c.m >= 128 and c.B >= 64, (2, 4), (1.5, 3.5)),
    Goal("GEMM-only, B <= 16", "gemm", lambda c: c.m >= 1024 and c.B <= 16, (4, 8), (4, 8)),
    Goal("torchdeq, trained", "torchdeq", lambda c: c.family.startswith("trained"), (10, 25), (10, 25), matched=True),
)


# On an NVIDIA H200; what training must reach is four fifths of what inference must.
GPU_GOALS = tuple(
    Goal(f"{baseline}, {name}", baseline, holds_for, (must, stretch), (0.8 * must, 0.8 * stretch))
    for name, holds_for, ratios in (
        ("m <= 256", lambda c: c.m in (64, 256) and c.B <= 4096, {"graphed": (8, 10), "torchdeq": (40, 60)}),
        ("m = 300, B = 64", lambda c: (c.m, c.B) == (300, 64), {"graphed": (8, 9)}),
        ("m = 1024, B <= 256", lambda c: c.m == 1024 and c.B <= 256, {"graphed": (2.5, 5), "torchdeq": (10, 20)}),
        ("m = 1024, B = 4096", lambda c: (c.m, c.B) == (1024, 4096), {"graphed": (2, 2.5), "torchdeq": (4, 5)}),
        ("m = 2048, B <= 32", lambda c: c.m == 2048 and c.B <= 32, {"graphed": (4, 5)}),
        ("m = 4096, B <= 8", lambda c: c.m == 4096 and c.B <= 8, {"graphed": (4, 5)}),
        ("m = 4096, B = 4096", lambda c: (c.m, c.B) == (4096, 4096), {"graphed": (1.5, 2), "torchdeq": (2, 3)}),
    )
    for baseline, (must, stretch) in ratios.items()
)
GPU_SHARE = ((4096, 4096), 0.75)  # m, B, and what useful products must be of the bfloat16 ceiling


def must(case: Case, baseline: str, which: str, goals: Sequence[Goal] = GOALS) -> float | None:
    """The ratio at the same tolerance that a case has to reach over a baseline; None if it is in no group."""
    found = [getattr(g, which)[0] for g in goals if g.baseline == baseline and not g.matched and g.holds_for(case)]
    return max(found, default=None)


def judge(cases: Iterable[Case], rows: Sequence[dict], goals: Sequence[Goal] = GOALS) -> list[dict]:
    """One row a goal, pass and thread count from the rows of bench/versus.py: worst case, geometric mean, verdict."""
    by_name = {case.name: case for case in cases}
    verdicts = []
    for which, threads in dict.fromkeys((row["pass"], row["threads"]) for row in rows):
        measured = [row for row in rows if (row["pass"], row["threads"]) == (which, threads)]
        where = {"pass": which, "threads": threads}
        verdicts += [where | verdict for goal in goals if (verdict := _judge_ratios(goal, which, measured, by_name))]
        verdicts += [where | verdict for verdict in _judge_solutions(measured, by_name)]
    return verdicts


def _judge_ratios(goal: Goal, which: str, rows: Sequence[dict], by_name: dict[str, Case]) -> dict | None:
    field = "matched_ratio" if goal.matched else "ratio"
    ratios = {
        row["case"]: row[field]
        for row in rows
        if row["baseline"] == goal.baseline and row[field] is not None and goal.holds_for(by_name[row["case"]])
    }
    if not ratios:
        return None
    must, stretch = getattr(goal, which)
    worst = min(ratios, key=ratios.get)
    return {
        "case": worst,
        "variant": goal.name,
        "quantity": field,
        "cases": len(ratios),
        "ratio": ratios[worst],
        "mean": float(np.exp(np.mean(np.log(list(ratios.values()))))),
        "best": max(ratios.values()),
        "must": must,
        "stretch": stretch,
        "reached": ratios[worst] >= must,
    }


def judge_share(rows: Sequence[dict]) -> Iterator[dict]:
    """How near deq's forward pass comes to the products that the GPU can do, at the size where nothing else counts."""
    (m, B), limit = GPU_SHARE
    for row in rows:
        if row["baseline"] == "deq" and row["pass"] == "forward" and row["case"].split("-")[1:3] == [f"m{m}", f"B{B}"]:
            share = row["flop_share"]
            yield {
                "pass": row["pass"],
                "threads": row["threads"],
                "case": row["case"],
                "variant": "share of bfloat16 products",
                "quantity": "flop_share",
                "cases": 1,
                "value": share,
                "must": limit,
                "reached": share >= limit,
            }


def _judge_solutions(rows: Sequence[dict], by_name: dict[str, Case]) -> Iterator[dict]:
    """What deq's own rows must satisfy, times apart: at most ``must`` of a quantity."""
    ours = [row for row in rows if row["baseline"] == "deq"]
    monotone = [row for row in ours if by_name[row["case"]].family.startswith("monotone")]
    for name, quantity, limit, group in (
        ("samples not solved", "failed", 0.0, ours),
        ("evaluations, monotone", "iterations", MONOTONE_ITERATIONS, monotone),
    ):
        if group:
            worst = max(group, key=lambda row: row[quantity])
            yield {
                "case": worst["case"],
                "variant": name,
                "quantity": quantity,
                "cases": len(group),
                "value": worst[quantity],
                "must": limit,
                "reached": worst[quantity] <= limit,
            }
