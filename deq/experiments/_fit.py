"""Trains one model of a comparison for all seeds and writes its row: metric, size, cost, evidence of an equilibrium."""

from collections.abc import Callable

import torch
from torch import Tensor

from ._equilibria import evidence
from ._judge import kind_of
from ._nets import EquilibriumNet, SeededNet
from ._result import number, spread
from ._run import Run, Tick
from ._train import Loss, Schedule, cosine, square, train

Make = Callable[[int, torch.Generator], SeededNet]
SOLVED = 256  # test points at which a DEQ is solved again and again, about
STEPS = 2000  # evaluations of a DEQ's first solve; the second has ten times as many


def mean_square(target: Tensor) -> Callable[[Tensor], Tensor]:
    """Metric of an output (S, B): mean squared error of every seed, infinite where it is not finite."""
    return lambda output: (output - target).square().mean(1).nan_to_num(nan=torch.inf)


def fit(
    run: Run,
    name: str,
    make: Make,
    batch: Callable[[], tuple[Tensor, Tensor]],
    test: tuple[Tensor, Tensor],
    tick: Tick,
    *,
    steps: int,
    rate: float,
    clip: float | None = None,
    loss: Loss = square,
    schedule: Schedule | None = None,
    after: Callable[[SeededNet], None] | None = None,
    inspect: Callable[[SeededNet], dict] | None = None,
    prepare: Callable[[SeededNet, Tick], None] | None = None,
) -> dict:
    """Train ``make``'s net on ``batch`` and test it on ``test``, x (S, B, d) and y (S, B): a row of numbers.

    schedule: of the learning rate, a cosine to 1 % if None. after(net): called after every update.
    inspect(net): more entries for the row. prepare(net, tick): trains beforehand, on easier targets.
    flops: of a forward pass of one sample, a DEQ's with the evaluations that it needed from zero; training: the same of
    a training step, with the backward pass. memory: numbers kept a sample for the backward pass. evidence: None for
    feed-forward.
    """
    net = make(run.settings.seeds, run.generator(f"init/{name}"))
    x, y = test
    if prepare is not None:
        prepare(net, tick)
    shown = range(0, steps, max(1, steps // 20))
    log = train(
        net,
        batch,
        steps=steps,
        rate=rate,
        clip=clip,
        loss=loss,
        schedule=schedule or cosine(0.01),
        after=None if after is None else lambda: after(net),
        checkpoints=shown,
        observe=lambda step: tick(step / steps),
    )
    row = {"model": name, "parameters": net.count, "memory": net.memory, "notes": log.sentences(name)}
    row |= {"ill_posed": {str(k): v for k, v in log.ill_posed.items()}}
    net.forget()  # what was trained on last may be as many points as the test has, or be the test
    with torch.no_grad():
        row |= {
            "mse": mean_square(y)(net(x)).tolist(),
            "flops": net.flops(),
            "training": net.training_flops(),
            "evidence": None,
        }
        if isinstance(net, EquilibriumNet):
            row["evidence"] = _evidence(net, *(v[:, :: max(1, x.shape[1] // SOLVED)] for v in test))
        if inspect is not None:
            row |= inspect(net)
    return row | {"kind": kind_of(row["evidence"]), "summary": vars(spread(row["mse"]))}


def _evidence(net: EquilibriumNet, x: Tensor, y: Tensor) -> dict:
    """Of the mean squared error on some of the test points: solves to 1e-13 are dear where equilibria are slow."""
    twin, metric = net.double(), mean_square(y)
    trivial = float(metric(y.mean(1, keepdim=True).expand_as(y)).max())
    steps = getattr(net, "steps", STEPS)
    return evidence(lambda tol, most: twin.solved(x.double(), tol, most), metric, metric(net(x)), steps, trivial)


def fit_table_rows(rows: list[dict]) -> list[tuple[str, ...]]:
    """Cells of a comparison: model, parameters, FLOPs, memory, metric, residual, metric with ten times the steps."""
    cells = []
    for r in rows:
        e = r["evidence"]
        again = ("", "") if e is None else (number(e["residual_again"]), number(spread(e["metric_again"]).median))
        size = (str(r["parameters"]), number(r["flops"]), str(r["memory"]))
        cells.append((r["model"], *size, str(spread(r["mse"])), *again))
    return cells


FIT_COLUMNS = ("model", "params", "FLOPs", "memory", "MSE", "residual", "MSE x10")
