"""``deq bench gpu``: whole solves on a GPU against the loops and libraries that PyTorch users have, and the roofline.

As in bench/versus.py competitors take turns at the same tolerance, each judged against float64. A call is timed to the
end of its last kernel, host included, backward passes in the calling thread; ``device_median`` is what it takes the
device alone. Shares count useful products and necessary bytes only, over ceilings that were measured just before.
Everything runs on the CPU too, where loops are not captured: so the code is tested.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import perf_counter

import numpy as np
import torch

from deq.gpu_device import Device, device_at, find_device
from deq.gpu_plan import TRITON_INCREMENTS, choose
from deq.gpu_times import loop_time

from . import constants
from .baselines import has_torchdeq, torch_loop, torchdeq_makers
from .cases import GPU_CASES, Case
from .constants import Sizes
from .device import clock, device_seconds
from .goals import GPU_GOALS, judge, judge_share
from .graphed import graphed_makers
from .quality import Truth
from .record import device_name, environment, folder, write
from .run import Results, Selection
from .timing import Timing, interleave
from .timing import threads as use_threads
from .versus import Rival, compiled_loop, deq_at, fastest_solver, gemm_only, rows_of, solver

MIN_TURNS = 3
COMPILED = ((256, 256), (1024, 256), (4096, 4096))  # shapes with the compiled loop: ten seconds each
ROUNDS, ROUND_SECONDS = 3, 2e-3  # of timing the device alone
ALONE = ("deq", "graphed", "gemm")  # competitors that do not wait for the device


@dataclass(frozen=True)
class Ceilings:
    """Bytes per second of a copy, and FLOP per second of a bfloat16 product, as measured here."""

    copy: float
    product: float


def ceilings(sizes: Sizes) -> Ceilings:
    """Of this device, in about a second."""
    return Ceilings(constants.copy_rate(sizes), constants.bfloat16_rate(sizes))


def measure(
    case: Case, passes: Sequence[str], device: torch.device, seconds: float, limits: Ceilings, plans: Device
) -> Iterator[list[dict]]:
    """The rows of one case for every pass, deq's first. seconds: of timing, for each pass. plans: the constants that
    plans are made from, for what they expect."""
    problem = case.make().to(device)
    truth = Truth(problem, *problem.exact())
    for which in passes:
        backward = which == "training"
        # Autograd has a thread for every GPU. Handing it a backward pass, whoever's, and coming back takes 0.06 to 0.6
        # ms; a program that can do without says so as is done here.
        with use_threads(1), torch.autograd.set_multithreading_enabled(False):
            competitors = {"deq": solver("deq", partial(deq_at, problem, backward), truth)}
            competitors |= find_rivals(case, truth, backward)
            turns = {name: rival.run for name, rival in competitors.items() if rival.run and rival.why is None}
            turns["deq"] = competitors["deq"].run
            prepare = problem.changer() if backward else lambda: None
            timings = interleave(turns, seconds, prepare=prepare, clock=clock(device), min_turns=MIN_TURNS)
            # In training W would have to change between the calls.
            names = () if backward else [name for name in ALONE if name in turns]
            alone = {name: _alone(turns[name], timings[name], device) for name in names}
        rows = rows_of(case, which, 1, competitors, timings, {}, GPU_GOALS)
        yield [row | _device_fields(row, case, alone, limits) | _expected(row, case, plans) for row in rows]


def find_rivals(case: Case, truth: Truth, backward: bool) -> dict[str, Rival]:
    """The baselines; one that runs out of memory says so."""
    problem = truth.problem
    loop = _within_memory(
        "torch loop", lambda: solver("torch loop", lambda tol: partial(torch_loop, problem, backward, tol), truth)
    )
    rivals = {
        "graphed": _within_memory("graphed loop", lambda: fastest_solver(graphed_makers(problem, backward), truth)),
        "loop": loop,
        "torchdeq": Rival("torchdeq", why="not installed"),
    }
    if has_torchdeq():
        makers = torchdeq_makers(problem, backward)
        rivals["torchdeq"] = _within_memory("torchdeq", lambda: fastest_solver(makers, truth))
    if compiled := compiled_loop(case, truth, backward, COMPILED):
        rivals["compiled"] = compiled
    rivals["gemm"] = gemm_only(problem, loop)
    return rivals


def _within_memory(label: str, make: Callable[[], Rival]) -> Rival:
    try:
        return make()
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return Rival(label, why="out of memory")


def _alone(run: Callable[[], object], timing: Timing, device: torch.device) -> float:
    calls = min(20, max(1, round(ROUND_SECONDS / timing.median)))
    return float(np.median([device_seconds(run, device, calls) for _ in range(ROUNDS)]))


def _device_fields(row: dict, case: Case, alone: dict[str, float], limits: Ceilings) -> dict:
    seconds = alone.get(row["baseline"])
    fields = {"device_median": seconds, "device_ratio": None if seconds is None else seconds / alone["deq"]}
    if row["baseline"] != "deq" or seconds is None:
        return fields | dict.fromkeys(("flop_share", "byte_share", "roofline_share"))
    flops = 2 * case.m**2 * case.B * row["mean_iterations"]
    moved = getattr(torch, case.dtype).itemsize * (case.m**2 + 2 * case.B * case.m)
    shares = flops / limits.product / seconds, moved / limits.copy / seconds
    return fields | {"flop_share": shares[0], "byte_share": shares[1], "roofline_share": max(shares)}


def _expected(row: dict, case: Case, plans: Device) -> dict:
    """Microseconds of an iteration, as measured in the forward pass and as the plan's formulas have it."""
    m, B = case.m, case.B
    expected = {
        "deq": lambda: choose(m, B, dtype=case.dtype, device=plans, increments=TRITON_INCREMENTS).expected_us,
        "graphed": lambda: 1e6 * loop_time(m, B, plans, True, "ieee"),
        "loop": lambda: 1e6 * loop_time(m, B, plans, False, "ieee"),
    }
    if row["baseline"] not in expected or row["median"] is None or row["pass"] != "forward":
        return dict.fromkeys(("iteration_us", "expected_us"))
    return {
        "iteration_us": 1e6 * row["median"] / row["mean_iterations"],
        "expected_us": expected[row["baseline"]](),
    }


class GpuRun:
    """Iterate over ``steps()``; ``results`` and the file at ``path`` hold whatever is finished, whenever that stops.

    device: "cuda", or "cpu" to try the benchmark out. budget: seconds after which no case is begun that would end too
    late; None for all. resume: keep the rows that the file holds of this commit, and measure the cases it lacks.
    Raises ValueError for a new shape that its family does not have.
    """

    def __init__(
        self,
        selection: Selection,
        out: Path,
        device: str = "cuda",
        budget: float | None = None,
        resume: bool = False,
        sizes: Sizes | None = None,
    ):
        self.selection, self.out, self.device, self.budget = selection, out, device, budget
        self.sizes = sizes or Sizes(torch.device(device))
        self.where = environment(device)
        self.path = folder(out, device) / "gpu.json"
        self.results = Results([], [], [], [], [])
        self.cases = selection.pick(GPU_CASES) + selection.added(GPU_CASES)
        for case in self.cases:
            if (case.m, case.B) in selection.shapes:
                case.make()
        if resume and self.path.exists():
            rows = json.loads(self.path.read_text())
            self.results.auto = [r for r in rows if "baseline" in r and r["commit"] == self.where["commit"]]
            self._judge()
        self.skipped: list[Case] = []
        self.plans = device_at(torch.device(device)) if device == "cuda" else find_device(device_name(device), (9, 0))

    def __len__(self) -> int:
        return 1 + len(self._left())

    def _left(self) -> list[tuple[Case, str]]:
        done = {(row["case"], row["pass"]) for row in self.results.auto}
        return [(c, p) for c in self.cases for p in self.selection.passes if (c.name, p) not in done]

    def steps(self) -> Iterator[str]:
        """Before every measurement, what it will be."""
        start = perf_counter()
        yield "ceilings: a large copy and a large product"
        limits = ceilings(self.sizes)
        longest = 0.0
        left = self._left()
        for case in dict.fromkeys(case for case, _ in left):
            passes = [which for other, which in left if other == case]
            now = perf_counter()
            if self.budget is not None and now - start + longest > self.budget:
                self.skipped.append(case)
                continue
            measured = measure(case, passes, self.sizes.device, self.selection.seconds, limits, self.plans)
            for which in passes:
                yield f"{case.name}, {which}"
                self._keep(next(measured), limits)
            longest = max(longest, perf_counter() - now)

    def _keep(self, rows: list[dict], limits: Ceilings) -> None:
        extra = self.where | {"copy_ceiling": limits.copy, "product_ceiling": limits.product}
        self.results.auto += [row | extra for row in rows]
        self._judge()
        write(self.results.rows(), self.out, "gpu", self.device)

    def _judge(self) -> None:
        measured = self.results.auto
        cases = {name: Case.named(name) for name in dict.fromkeys(row["case"] for row in measured)}
        verdicts = [*judge(cases.values(), measured, GPU_GOALS), *judge_share(measured)]
        self.results.goals = [row | self.where for row in verdicts]
