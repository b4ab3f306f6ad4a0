"""How much faster deq becomes with a second thread: turns with one and with two alternate in one process."""

from collections.abc import Callable, Sequence

import torch

from .baselines import make_engine
from .cases import Case
from .goals import SCALING_MUST
from .timing import interleave

THREADS = (1, 2)


def measure(case: Case, passes: Sequence[str], seconds: float) -> list[dict]:
    """One row a pass; ``ratio`` is the shortest call with one thread over the shortest with two, by the clock: others'
    load can only lengthen a call, and a core taken away halves the speed of two threads."""
    problem = case.make()
    before = torch.get_num_threads()
    rows = []
    for which in passes:
        backward = which == "training"
        run = make_engine(problem, backward, "auto", on_failure="ignore")
        turns = {str(count): _with_threads(run, count) for count in THREADS}
        try:
            timings = interleave(turns, seconds, prepare=problem.changer() if backward else lambda: None)
        finally:
            torch.set_num_threads(before)
        one, two = (timings[str(count)].best for count in THREADS)
        rows.append(
            {
                "case": case.name,
                "variant": "deq, 1 to 2 threads",
                "solver": "auto",
                "pass": which,
                "best_1": one,
                "best_2": two,
                "turns": len(timings["1"].turns),
                "ratio": one / two,
                "must": SCALING_MUST,
                "reached": one / two >= SCALING_MUST,
            }
        )
    return rows


def _with_threads(run: Callable[[], object], count: int) -> Callable[[], None]:
    def call() -> None:
        torch.set_num_threads(count)
        run()

    return call
