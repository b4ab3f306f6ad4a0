"""Interleaved timing: competitors take turns in one process, and only ratios within a turn are believed."""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch

MIN_TURNS, MAX_TURNS = 7, 400
WARM_UP_SECONDS = 0.5
TURN_SECONDS = 2e-3  # a competitor is called again until its turn has lasted this long


@dataclass(frozen=True)
class Timing:
    """Seconds per call of one competitor: one number a turn (the median of the turn's calls), and the shortest call."""

    turns: tuple[float, ...]
    best: float

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
    min_turns: int = MIN_TURNS,
) -> dict[str, Timing]:
    """Time the competitors in turns for about ``seconds``, at least ``min_turns`` turns each.

    prepare: called before every call, not timed. clock: seconds, such as ``time.process_time`` for one thread, which
    does not count what other processes take. The order rotates so that nobody always follows the same competitor.
    """
    calls = {}
    for name, run in competitors.items():
        best = _warm_up(run, prepare, clock)
        calls[name] = min(100, max(1, round(TURN_SECONDS / max(best, 1e-9))))
    names = list(competitors)
    turns: dict[str, list[float]] = {name: [] for name in names}
    shortest = dict.fromkeys(names, math.inf)
    end = time.perf_counter() + seconds
    for turn in range(MAX_TURNS):
        if turn >= min_turns and time.perf_counter() >= end:
            break
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            samples = [_time(competitors[name], prepare, clock) for _ in range(calls[name])]
            turns[name].append(float(np.median(samples)))
            shortest[name] = min(shortest[name], *samples)
    return {name: Timing(tuple(values), shortest[name]) for name, values in turns.items()}


def _warm_up(run: Callable[[], object], prepare: Callable[[], object], clock: Callable[[], float]) -> float:
    """The best of three calls, fewer if they are long."""
    samples = []
    end = time.perf_counter() + WARM_UP_SECONDS
    while len(samples) < 3 and (not samples or time.perf_counter() < end):
        samples.append(_time(run, prepare, clock))
    return min(samples)


@contextmanager
def threads(count: int) -> Iterator[None]:
    """So many threads of torch and deq inside."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def thread_clock(count: int) -> Callable[[], float]:
    """One thread is timed by its own processor time, which other processes cannot take, several by the clock."""
    return time.thread_time if count == 1 else time.perf_counter


def _time(run: Callable[[], object], prepare: Callable[[], object], clock: Callable[[], float]) -> float:
    prepare()
    start = clock()
    run()
    return clock() - start
