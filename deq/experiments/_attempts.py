"""What else is tried with a true equilibrium where the usual training does not reproduce a claim."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from ._dense_nets import DenseDEQ
from ._fit import FIT_COLUMNS, Make, fit_table_rows
from ._judge import beats
from ._lineup import F32
from ._nets import FeedForward, SeededNet, matching_width
from ._result import Claim, Table, number, spread
from ._run import Run, Tick
from ._train import cosine, train

LOOSE = 1e-2  # tolerance of the solves of early training: a few evaluations where 1e-5 takes ten
LONGER, WIDER = 3, 3  # times the steps, times the width
Batch = tuple[Tensor, Tensor]  # x (S, B, d) and y (S, B)


@dataclass(frozen=True)
class Attempt:
    """make: the net. longer: times the usual steps. prepare(net, tick): trains beforehand. against: names of the nets
    that it is compared with: of its parameters, and trained as long and on the same curriculum where it was.
    conditions: of a claim about it."""

    make: Make
    longer: int = 1
    prepare: Callable[[SeededNet, Tick], None] | None = None
    against: tuple[str, ...] = ()
    conditions: str = ""


def attempts(
    run: Run,
    inputs: int,
    kinks: float | None,
    usual: Batch,
    easier: Sequence[Batch],
    rival: tuple[str, Make],
    depth: int = 3,
) -> dict[str, Attempt]:
    """By name: more steps, loose solves first, solves from zero, a curriculum, a wider weight; in full runs a wider
    monotone one, whose equilibria take minutes. And the feed-forward nets that they are compared with.

    usual: what is trained on. easier: what the curriculum begins with, easiest first; every stage has a quarter of the
    usual steps. rival: the feed-forward net of the usual DEQ's parameters, ``depth`` weight matrices.
    """
    width, config = run.settings.width, run.config
    wide, (name, net) = WIDER * width, rival

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

    n = matching_width(inputs, depth, wide * (wide + inputs + 2) + 1)
    longer, larger = f"{name}, {LONGER} x the steps", f"feed-forward {n}x{depth} (params of {wide})"
    taught = f"{name}, curriculum"
    both, usually = (name, longer), f"contractive DEQ {width}"
    tried = {
        f"{usually}, {LONGER} x the steps": Attempt(deq(), LONGER, against=both),
        f"{usually}, loose solves first": Attempt(deq(), prepare=loosely, against=both),
        f"{usually}, solved from zero": Attempt(deq(warm=False), against=(name,)),
        f"{usually}, curriculum": Attempt(deq(), prepare=climb, against=(*both, taught)),
        f"contractive DEQ {wide}": Attempt(deq(m=wide), against=(larger,)),
    }
    if run.settings.level == "full":
        tried[f"monotone DEQ {wide}"] = Attempt(deq("monotone", wide), against=(larger,))
    return tried | {
        longer: Attempt(net, LONGER),
        taught: Attempt(net, prepare=climb),
        larger: Attempt(lambda S, g: FeedForward(S, inputs, n, depth, g, F32, kinks)),
    }


def attempt_claims(
    tried: Mapping[str, Attempt],
    rows: Mapping[str, dict],
    statement: Callable[[str], str],
    source: str,
    key: str = "mse",
    **of,
) -> list[Claim]:
    """Of every attempt against its rivals. rows: by name, the rivals' too. statement(model): the sentence.
    of: quick and setting of ``beats``."""
    return [
        beats(
            statement(name),
            source,
            rows[name],
            [rows[rival] for rival in attempt.against],
            key,
            conditions=attempt.conditions,
            **of,
        )
        for name, attempt in tried.items()
        if attempt.against
    ]


def attempt_table(
    title: str, tried: Mapping[str, Attempt], rows: Mapping[str, dict], usual: dict, key: str = "mse"
) -> Table:
    """The attempts, with the medians of the usual training and of the best of their rivals over theirs: more than 1 is
    better."""

    def median(r: dict) -> float:
        return spread(r[key]).median

    def over(reference: float, r: dict) -> str:
        return number(reference / median(r)) if median(r) else "inf"

    cells = []
    for row, (name, attempt) in zip(fit_table_rows([rows[name] for name in tried]), tried.items(), strict=True):
        best = min((median(rows[rival]) for rival in attempt.against), default=None)
        compared = ("", "") if best is None else (over(median(usual), rows[name]), over(best, rows[name]))
        cells.append((*row, *compared))
    columns = (*FIT_COLUMNS, "usual / it", "rival / it")
    return Table(f"{title}, what else was tried with true equilibria", columns, cells)
