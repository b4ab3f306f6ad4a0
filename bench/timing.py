"""Interleaved timing: competitors take turns in one process, and only ratios within a turn are believed."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

MIN_TURNS, MAX_TURNS = 7, 400
TURN_SECONDS = 2e-3  # a competitor is called again until its turn has lasted this long


@dataclass(frozen=True)
class Timing:
    """Seconds per call of one competitor, one number a turn (the median of the turn's calls)."""

    turns: tuple[float, ...]

    @property
    def median(self) -> float:
        return float(np.median(self.turns))

    def percentile(self, q: float) -> float:
        return float(np.percentile(self.turns, q))

    def ratio(self, other: "Timing") -> float:
        """How many times longer than ``other`` this took: the median over turns, each divided by the same turn's."""
        return float(np.median(np.divide(self.turns, other.turns)))


def interleave(
    competitors: Mapping[str, Callable[[], object]],
    seconds: float,
    *,
    prepare: Callable[[], object] = lambda: None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Timing]:
    """Time the competitors in turns for about ``seconds``, at least ``MIN_TURNS`` turns each.

    prepare: called before every call, not timed. clock: seconds, such as ``time.process_time`` for one thread, which
    does not count what other processes take. The order rotates so that nobody always follows the same competitor.
    """
    calls = {}
    for name, run in competitors.items():
        best = min(_time(run, prepare, clock) for _ in range(3))  # also warms up
        calls[name] = min(100, max(1, round(TURN_SECONDS / max(best, 1e-9))))
    names = list(competitors)
    turns: dict[str, list[float]] = {name: [] for name in names}
    end = time.perf_counter() + seconds
    for turn in range(MAX_TURNS):
        if turn >= MIN_TURNS and time.perf_counter() >= end:
            break
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            samples = [_time(competitors[name], prepare, clock) for _ in range(calls[name])]
            turns[name].append(float(np.median(samples)))
    return {name: Timing(tuple(values)) for name, values in turns.items()}


def _time(run: Callable[[], object], prepare: Callable[[], object], clock: Callable[[], float]) -> float:
    prepare()
    start = clock()
    run()
    return clock() - start
