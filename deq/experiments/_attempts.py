"""What else is tried with a true equilibrium where the usual training does not reproduce a claim."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from ._dense_nets import DenseDEQ
from ._fit import FIT_COLUMNS, Make, fit_table_rows
from ._judge import beats
from ._lineup import F32
from ._nets import SeededNet
from ._result import Claim, Table, number, spread
from ._run import Run, Tick
from ._train import cosine, train

LOOSE = 1e-2  # tolerance of the solves of early training: a few evaluations where 1e-5 takes ten
LONGER, WIDER = 3, 3  # times the steps, times the width
Batch = tuple[Tensor, Tensor]  # x (S, B, d) and y (S, B)


@dataclass(frozen=True)
class Attempt:
    """make: the net. longer: times the usual steps. prepare(net, tick): trains beforehand."""

    make: Make
    longer: int = 1
    prepare: Callable[[SeededNet, Tick], None] | None = None


def attempts(run: Run, inputs: int, kinks: float | None, usual: Batch, easier: Sequence[Batch]) -> dict[str, Attempt]:
    """By name: more steps, loose solves first, solves from zero, a curriculum, a wider weight; in full runs a wider
    monotone one, whose equilibria take minutes.

    usual: what is trained on. easier: what the curriculum begins with, easiest first; every stage has a quarter of the
    usual steps.
    """
    width, config = run.settings.width, run.config

    def deq(kind: str = "contractive", m: int = width, warm: bool = True) -> Make:
        return lambda S, g: DenseDEQ(S, inputs, m, g, kind, F32, kinks, warm=warm)

    def teach(net: SeededNet, batch: Batch) -> None:
        steps = max(1, config.steps // 4)
        train(net, lambda: batch, steps=steps, rate=config.rate, clip=config.clip, schedule=cosine(0.3))

    def loosely(net: DenseDEQ, tick: Tick) -> None:
        net.tol = LOOSE
        teach(net, usual)
        net.tol = None

    def climb(net: SeededNet, tick: Tick) -> None:
        for batch in easier:
            teach(net, batch)

    name = f"contractive DEQ {width}"
    tried = {
        f"{name}, {LONGER} x the steps": Attempt(deq(), longer=LONGER),
        f"{name}, loose solves first": Attempt(deq(), prepare=loosely),
        f"{name}, solved from zero": Attempt(deq(warm=False)),
        f"{name}, curriculum": Attempt(deq(), prepare=climb),
        f"contractive DEQ {WIDER * width}": Attempt(deq(m=WIDER * width)),
    }
    if run.settings.level == "full":
        tried[f"monotone DEQ {WIDER * width}"] = Attempt(deq("monotone", WIDER * width))
    return tried


def attempt_claims(
    rows: Sequence[dict], rival: dict, statement: Callable[[str], str], source: str, key: str = "mse", **of
) -> list[Claim]:
    """Of every attempt against ``rival``; statement(model): the sentence; ``of``: quick and setting of ``beats``."""
    return [beats(statement(r["model"]), source, r, [rival], key, **of) for r in rows]


def attempt_table(title: str, rows: Sequence[dict], usual: dict, rival: dict, key: str = "mse") -> Table:
    """The attempts, with the medians of the usual training and of ``rival`` over theirs: more than 1 is better."""

    def over(reference: dict, r: dict) -> str:
        ours = spread(r[key]).median
        return number(spread(reference[key]).median / ours) if ours else "inf"

    cells = [(*row, over(usual, r), over(rival, r)) for row, r in zip(fit_table_rows(list(rows)), rows, strict=True)]
    columns = (*FIT_COLUMNS, "usual / it", "feed-forward / it")
    return Table(f"{title}, what else was tried with true equilibria", columns, cells)
