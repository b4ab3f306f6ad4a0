"""``deq bench guard``: what the code does, counted, against golden numbers: the same on a busy machine as on an idle.

- instructions of whole solves, packing included and without, avx2 and portable kernels (bench/instructions.py);
- evaluations, products by precision, FLOPs, operators called, host reads, bytes of tensors and of packed weights, of a
  forward and a backward pass (deq/profiling), with avx2 kernels, and of the increments that this CPU has beside it.

More than the golden number, by more than the tolerance, fails. The numbers are in tests/guard.json, with the compiler
whose code they count: another one's instructions are allowed ``OTHER_COMPILER``. ``deq bench guard --update`` writes
them anew; that the numbers rise in a change is then for its reviewer to see.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

import deq
from deq import _library, cache
from deq.files import replace_text
from deq.profiling.counter import Counter, Live

from . import instructions
from .cases import COUNT_CASES, INSTRUCTION_CASES, INSTRUCTION_ISAS
from .timing import threads

GOLDEN = Path(__file__).resolve().parents[1] / "tests" / "guard.json"
# Runs of the same library differ by less than 0.1 %: by what ctypes and the allocator do.
SAME_COMPILER, OTHER_COMPILER = 0.02, 0.25
# Rounding decides when a sample leaves: another CPU's increments, another compiler's sums may cost an evaluation in 50.
COUNTS = 0.02
COUNTED_ISA = "avx2"


@dataclass(frozen=True)
class Finding:
    """A quantity that is not what it was. ``limit`` is the largest value allowed."""

    case: str
    quantity: str
    golden: float
    now: float
    limit: float

    @property
    def fails(self) -> bool:
        return self.now > self.limit

    def __str__(self) -> str:
        change = f"{self.now / self.golden - 1:+.1%}" if self.golden else f"+{self.now:g}"
        return f"{self.case}: {self.quantity} was {self.golden:g}, is {self.now:g} ({change})"


def measure() -> dict:
    """All numbers, in the form of the golden file. RuntimeError where something cannot be counted here."""
    if _library.compiled is None:
        raise RuntimeError(f"there is nothing to count without the compiled library: {_library.reason}")
    return {
        "compiler": _library.build.get("compiler", ""),
        "instructions": {isa: count_instructions(isa) for isa in INSTRUCTION_ISAS},
        "counts": count_steps(),
    }


def count_instructions(isa: str, library: Path | None = None) -> dict[str, dict[str, int]]:
    """By case: instructions of the first solve, of the same again, and evaluations."""
    counted = instructions.count(library or _library.path, isa, list(INSTRUCTION_CASES.values()))
    return dict(zip(INSTRUCTION_CASES, counted, strict=True))


def count_steps() -> dict[str, dict[str, int]]:
    """By case and kernels: what a forward and a backward pass do, on one thread with nothing remembered."""
    counted = {}
    deq.solve(torch.zeros(1, 1), torch.ones(1, 1))  # the first solve of a process makes what all later ones use
    for increments in ("native", *deq.info().increments[:1]):
        with _kernels(COUNTED_ISA if increments == "native" else "auto"), threads(1):
            for name, (m, B, activation, solver) in COUNT_CASES.items():
                if increments == "native" or solver == "auto":
                    counted[f"{name}, {increments}"] = _step(m, B, activation, solver)
    return counted


@contextmanager
def _kernels(isa: str) -> Iterator[None]:
    before = _library.compiled.deq_cpu_isa().decode()
    if not _library.use_isa(isa):
        raise RuntimeError(f"this CPU or build has no {isa} kernels")
    try:
        yield
    finally:
        _library.use_isa(before)


def _step(m: int, B: int, activation: str, solver: str) -> dict[str, int]:
    generator = torch.Generator().manual_seed(0)
    W = (torch.randn(m, m, generator=generator, dtype=torch.float64) * (0.6 / m**0.5)).float().requires_grad_()
    c = torch.randn(B, m, generator=generator, dtype=torch.float64).float().requires_grad_()
    g = torch.randn(B, m, generator=generator, dtype=torch.float64).float()
    _library.compiled.deq_cpu_clear_cache()
    cache.clear()
    live = Live()
    with Counter(live) as forward:
        solution = deq.solve(W, c, activation, solver=solver, on_failure="raise")
    with Counter(live) as backward:
        gradients = torch.autograd.grad(solution.z, (W, c), g)
    packed = _library.compiled.deq_cpu_cache_bytes()
    del gradients
    counted = {"evaluations": int(solution.iterations.sum()), "packed bytes": packed}
    for name, mode in (("forward", forward), ("backward", backward)):
        counts = mode.counts
        counted |= {
            f"{name}: FLOPs": counts.flops,
            f"{name}: executed FLOPs": sum(counts.executed.values()),
            f"{name}: operators": sum(counts.operators.values()),
            f"{name}: host reads": counts.host_reads,
            f"{name}: peak bytes": counts.peak,
        }
        counted |= {f"{name}: products in {precision}": rows for precision, rows in counts.rows.items()}
    return counted


def compare(golden: dict, measured: dict) -> list[Finding]:
    """Every quantity that differs, those that fail first. A case that this machine cannot count is left out."""
    same = golden["compiler"] == measured["compiler"]
    findings = []
    tables = [(golden["counts"], measured["counts"], COUNTS, "")]
    for isa, cases in golden["instructions"].items():
        tolerance = SAME_COMPILER if same else OTHER_COMPILER
        tables.append((cases, measured["instructions"].get(isa, {}), tolerance, f"{isa}, "))
    for before, now, tolerance, prefix in tables:
        for case in before.keys() & now.keys():
            for quantity in before[case].keys() | now[case].keys():
                old, new = before[case].get(quantity, 0), now[case].get(quantity, 0)
                if old != new:
                    findings.append(Finding(f"{prefix}{case}", quantity, old, new, old * (1 + tolerance)))
    return sorted(findings, key=lambda f: (not f.fails, f.case, f.quantity))


def read(path: Path = GOLDEN) -> dict:
    return json.loads(path.read_text())


def write(measured: dict, path: Path = GOLDEN) -> None:
    replace_text(path, json.dumps(measured, indent=1) + "\n")
