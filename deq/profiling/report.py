"""What a profile found: numbers, a text table, JSON, and the roofline figure."""

import math
from collections import Counter as Tally
from dataclasses import asdict, dataclass, field
from io import StringIO
from pathlib import Path
from typing import NamedTuple

from .ceilings import Ceilings
from .counter import Counts

WIDTH = 80
STEP = "step"  # the pass of a call that differentiates by itself


class Seconds(NamedTuple):
    """Of one pass: median, 20th and 80th percentile over the calls."""

    median: float
    p20: float
    p80: float


@dataclass
class Pass:
    """Forward or backward: what was counted, the iterations of every sample solved, and how long a call takes."""

    name: str
    counts: Counts
    iterations: list[int] = field(default_factory=list)
    seconds: Seconds | None = None

    @property
    def executed(self) -> int:
        return sum(self.counts.executed.values())

    @property
    def intensity(self) -> float:
        """Useful FLOPs a byte."""
        return self.counts.flops / max(1, self.counts.bytes)

    @property
    def rate(self) -> float:
        """Useful FLOP/s."""
        return self.counts.flops / self.seconds.median

    def arithmetic_share(self, ceilings: Ceilings) -> float:
        """The time that the executed FLOPs take at the ceilings of their precisions, as a share of the time taken.
        Those without a ceiling, of complex numbers say, take none."""
        return self._at(ceilings)[1] / self.seconds.median

    def arithmetic_ceiling(self, ceilings: Ceilings) -> float:
        """FLOP/s of this pass's mixture of precisions at their ceilings."""
        flops, least = self._at(ceilings)
        return flops / least if least else max(ceilings.flops.values())

    def _at(self, ceilings: Ceilings) -> tuple[int, float]:
        """Executed FLOPs that have a ceiling, and the seconds that they take there."""
        known = {name: flops for name, flops in self.counts.executed.items() if name in ceilings.flops}
        return sum(known.values()), sum(flops / ceilings.flops[name] for name, flops in known.items())


@dataclass
class Memory:
    """Bytes beyond the inputs. ``buffer``: of B x m elements of the first solve; ``model``: the theory
    (deq/profiling/memory.py), which counts the solves alone, and is None for those of any f, for gradients that are not
    implicit, and for what a step retains; ``tensors``: all tensors made; ``process``: of the resident set or of the
    GPU, None where the system does not tell; ``retained``: by the result and its graph after the forward pass;
    ``packed``: held for weights seen lately, of every size."""

    buffer: int
    model_forward: int | None
    model_both: int | None
    model_retained: int | None
    tensors_forward: int
    tensors_both: int
    retained: int
    process_forward: int | None
    process_both: int | None
    packed: int


@dataclass
class Beside:
    """A feed-forward net with as much of ``equal`` as the equilibrium has."""

    equal: str
    depth: int
    width: int
    parameters: int
    flops: dict[str, int]
    seconds: dict[str, float]
    retained: int
    peak: int


@dataclass
class Report:
    """Everything that :func:`deq.profile` found. ``shapes`` of the injections solved; ``plans``: for every different
    solve what was chosen and why; ``first_call``: seconds of all passes with nothing remembered of the weights."""

    what: str
    device: str
    shapes: list[tuple[int, ...]]
    plans: list[list[str]]
    passes: list[Pass]
    memory: Memory
    first_call: float
    ceilings: Ceilings
    beside: list[Beside]

    def as_dict(self) -> dict:
        """The same as plain Python values, ready for JSON."""
        passes = []
        for one in self.passes:
            counts = one.counts
            passes.append(
                {
                    "pass": one.name,
                    "seconds": one.seconds._asdict(),
                    "iterations": dict(sorted(Tally(one.iterations).items())),
                    "flops": counts.flops,
                    "flops_by_operator": dict(counts.by_operator),
                    "executed": dict(counts.executed),
                    "rows": dict(counts.rows),
                    "bytes": counts.bytes,
                    "intensity": one.intensity,
                    "flops_per_second": one.rate,
                    "bytes_per_second": counts.bytes / one.seconds.median,
                    "share_of_arithmetic": one.arithmetic_share(self.ceilings),
                    "share_of_bandwidth": self.bandwidth_share(one)[1],
                    "operators": dict(counts.operators),
                    "host_reads": counts.host_reads,
                }
            )
        return {
            "what": self.what,
            "device": self.device,
            "shapes": [list(shape) for shape in self.shapes],
            "plans": self.plans,
            "passes": passes,
            "first_call_seconds": self.first_call,
            "memory": asdict(self.memory),
            "ceilings": self.ceilings.as_dict(),
            "feed_forward": [asdict(net) for net in self.beside],
        }

    def bandwidth_share(self, one: Pass) -> tuple[str, float]:
        """Where W comes from, and the share of what can be read from there. Of 16 bits W is multiplied in float32."""
        shape = self.shapes[0] if self.shapes else (1,)
        element = max(4, self.memory.buffer // max(1, math.prod(shape)))
        name, ceiling = self.ceilings.bandwidth_for(element * shape[-1] ** 2)
        return name, one.counts.bytes / one.seconds.median / ceiling

    def draw(self, path: Path | str) -> None:
        """The roofline figure, a PNG or whatever the suffix says."""
        from .roofline import draw

        draw(self, Path(path))

    def __rich_console__(self, console, options):
        from .tables import tables

        yield from tables(self, options.ascii_only)

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(file=StringIO(), width=WIDTH, force_terminal=False)
        console.print(self)
        return console.file.getvalue()
