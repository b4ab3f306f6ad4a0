"""Which measurements ``deq bench cpu`` makes, one after the other, and the file that grows with them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from . import cpu, families, scaling, versus
from .cases import AUTO_CASES, CPU_CASES, KERNEL_CASES, SCALING_CASES, Case
from .goals import PASSES, judge
from .record import environment, write


@dataclass(frozen=True)
class Selection:
    """What was asked for; everything where a tuple is empty. ``seconds`` per case and number of threads."""

    shapes: tuple[tuple[int, int], ...]
    families: tuple[str, ...]
    passes: tuple[str, ...]
    threads: tuple[int, ...]
    seconds: float

    @property
    def everything(self) -> bool:
        return not self.shapes and not self.families

    def pick(self, cases: Sequence[Case]) -> list[Case]:
        """Those of the cases that were asked for. A family without its number means all of its name."""

        def wanted(case: Case) -> bool:
            shaped = not self.shapes or (case.m, case.B) in self.shapes
            return shaped and (not self.families or any(_is_of(case, name) for name in self.families))

        return [case for case in cases if wanted(case)]

    def added(self, cases: Sequence[Case] = CPU_CASES + AUTO_CASES) -> list[Case]:
        """A case for every shape and family that were asked for together and have none; of a shape alone that has none,
        the Gaussian one."""
        shaped = {shape: [case for case in cases if (case.m, case.B) == shape] for shape in self.shapes}
        if not self.families:
            return [Case(*shape) for shape, known in shaped.items() if not known]
        return [
            Case(*shape, name)
            for shape, known in shaped.items()
            for name in dict.fromkeys(self.families)
            if not any(_is_of(case, name) for case in known)
        ]


def _is_of(case: Case, family: str) -> bool:
    return family in (case.family, families.split(case.family)[0])


@dataclass
class Results:
    """Rows by kind, in the order of the file."""

    plain: list[dict]
    auto: list[dict]
    goals: list[dict]
    scaling: list[dict]
    kernel: list[dict]

    def required(self) -> list[dict]:
        """The rows that say whether a goal is reached; single cases of what deq chooses count within their group."""
        return self.plain + self.goals + self.scaling + self.kernel

    def rows(self) -> list[dict]:
        return self.plain + self.auto + self.goals + self.scaling + self.kernel


class Run:
    """Iterate over ``steps()``; ``results`` and the file at ``path`` hold whatever is finished, whenever that stops.

    Raises ValueError for a new shape that its family does not have.
    """

    def __init__(self, selection: Selection, out: Path):
        self.selection = selection
        self.out = out
        self.results = Results([], [], [], [], [])
        self.path: Path | None = None
        added = selection.added()
        for case in added:
            case.make()
        contracting = [case for case in added if case.family == "gaussian"]  # for the plain map
        self.plain = selection.pick(CPU_CASES) + contracting if "training" in selection.passes else []
        self.auto = selection.pick(AUTO_CASES) + added
        self.scaling = selection.pick(SCALING_CASES) if max(selection.threads) > 1 else []
        self.where = environment()

    def __len__(self) -> int:
        kernel = 1 if self.selection.everything else 0
        per_case = len(self.selection.threads) * len(self.selection.passes)
        return len(self.plain) * len(self.selection.threads) + len(self.auto) * per_case + len(self.scaling) + kernel

    def steps(self) -> Iterator[str]:
        """Before every measurement, what it will be."""
        chosen, results = self.selection, self.results
        for case in self.plain:
            for threads in chosen.threads:
                yield f"{case.name}, plain, {threads} threads"
                self._keep(results.plain, cpu.measure(case, threads, chosen.seconds))
        for case in self.auto:
            measured = versus.measure(case, chosen.passes, chosen.threads, chosen.seconds / len(PASSES))
            for which in chosen.passes:
                for threads in chosen.threads:
                    yield f"{case.name}, {which}, {threads} threads"
                    self._keep(results.auto, next(measured))
        for case in self.scaling:
            yield f"{case.name}, from 1 to 2 threads"
            self._keep(results.scaling, scaling.measure(case, chosen.passes, chosen.seconds / len(PASSES)))
        if chosen.everything:
            yield "kernel"
            self._keep(results.kernel, cpu.measure_kernel(KERNEL_CASES, chosen.seconds))

    def _keep(self, kind: list[dict], rows: list[dict]) -> None:
        kind += [row | self.where for row in rows]
        self.results.goals = [row | self.where for row in judge(self.auto, self.results.auto)]
        self.path = write(self.results.rows(), self.out, "cpu")
