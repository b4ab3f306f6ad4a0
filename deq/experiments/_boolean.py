"""Boolean functions with an unseen part of the cube: generalisation on the unseen (Abbe et al. 2023)."""

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from ._dense_nets import DenseDEQ
from ._fit import Make, fit
from ._nets import DiagonalDEQ, FeedForward, SeededNet, matching_width
from ._run import Part, Run, Tick

F32 = torch.float32


@dataclass(frozen=True)
class Task:
    """f and the unseen part of {-1, 1}^d, with the error of the interpolator of lowest degree."""

    name: str
    f: Callable[[Tensor], Tensor]
    unseen: Callable[[Tensor], Tensor]
    lowest: Callable[[Tensor], Tensor]
    formula: str


def _linear(x: Tensor) -> Tensor:
    return 1.2 * x.sum(-1) + 0.3 * x[..., 0]


TASKS = {
    task.name: task
    for task in (
        Task(
            "f1",
            lambda x: x[..., 0] * x[..., 1] - 1.25 * x[..., 1] * x[..., 2] + 1.5 * x[..., 2] * x[..., 0],
            lambda x: x[..., 0] * x[..., 1] * x[..., 2] < 0,
            lambda x: x[..., 2] - 1.25 * x[..., 0] + 1.5 * x[..., 1],
            "x0 x1 - 1.25 x1 x2 + 1.5 x2 x0, unseen x0 x1 x2 = -1",
        ),
        Task(
            "f2",
            lambda x: x[..., 0] * x[..., 1],
            lambda x: (x[..., 0] < 0) & (x[..., 1] < 0),
            lambda x: x[..., 0] + x[..., 1] - 1,
            "x0 x1, unseen x0 = x1 = -1",
        ),
        Task(
            "f2 half",
            lambda x: x[..., 0] * x[..., 1],
            lambda x: x[..., 0] < 0,
            lambda x: x[..., 1],
            "x0 x1, unseen x0 = -1",
        ),
        Task(
            "linear",
            _linear,
            lambda x: x[..., 0] < 0,
            lambda x: _linear(x) - 1.5 * x[..., 0] + 1.5,
            "1.5 x0 + 1.2 (x1 + x2 + ...), unseen x0 = -1",
        ),
    )
}


def cube(d: int, device: torch.device | None = None) -> Tensor:
    """(2^d, d) of -1 and 1."""
    return torch.tensor(list(itertools.product((-1.0, 1.0), repeat=d)), device=device)


def models(width: int, d: int) -> dict[str, Make]:
    """Diagonal and full-weight DEQ, and a feed-forward net of depth 3 with the parameters of the latter."""
    n = matching_width(d, 3, width * (width + d + 2) + 1)
    return {
        "diagonal DEQ": lambda S, g: DiagonalDEQ(S, d, width, g, dtype=F32),
        "vanilla DEQ": lambda S, g: DenseDEQ(S, d, width, g, "contractive", F32, warm=True),
        f"feed-forward {n}x3": lambda S, g: FeedForward(S, d, n, 3, g, F32),
    }


def training_parts(run: Run, tasks: Iterable[str]) -> dict[str, list[Part]]:
    """By task: every model of :func:`models` trained on its seen part, with the experiment's own ``dimension``,
    ``steps`` and ``rate``."""
    config, width = run.config, run.settings.width
    return {
        t: [
            Part(
                f"{t}/{name}",
                f"train {name} on {t}",
                lambda tick, t=t, name=name, make=make: train_on_seen(
                    run, TASKS[t], config.dimension, name, make, tick, steps=config.steps, rate=config.rate
                ),
                run.settings.seeds * 2**config.dimension * width,
            )
            for name, make in models(width, config.dimension).items()
        ]
        for t in tasks
    }


def seen_part(run: Run, task: Task, d: int, most: int | None = None) -> tuple[Tensor, Tensor]:
    """x (S, B, d) and f(x) of the seen part; with ``most``, of its points with so many -1 at most."""
    x = cube(d, run.device)
    kept = ~task.unseen(x)
    if most is not None:
        kept &= (x < 0).sum(-1) <= most
    x = x[kept].expand(run.settings.seeds, -1, -1)
    return x, task.f(x)


def train_on_seen(
    run: Run,
    task: Task,
    d: int,
    name: str,
    make: Make,
    tick: Tick,
    *,
    steps: int,
    rate: float,
    prepare: Callable[[SeededNet, Tick], None] | None = None,
) -> dict:
    """Full-batch training on the seen part; "mse" is the error on the unseen part, "seen" that on the seen one.

    features: mean |feature| of every unit over the whole cube, largest first, of every seed.
    """
    x = cube(d, run.device)
    hidden = task.unseen(x)
    S = run.settings.seeds
    (seen, y), unseen = seen_part(run, task, d), x[hidden].expand(S, -1, -1)

    def inspect(net) -> dict:
        size = net.features(x.expand(S, -1, -1)).abs().mean(1)
        return {
            "seen": (net(seen) - y).square().mean(1).tolist(),
            "features": size.sort(1, descending=True).values.tolist(),
            "norm": size.norm(dim=1).tolist(),
            "participation": (size.sum(1).square() / (size.shape[1] * size.square().sum(1))).tolist(),
        }

    return fit(
        run,
        name,
        make,
        lambda: (seen, y),
        (unseen, task.f(unseen)),
        tick,
        steps=steps,
        rate=rate,
        clip=5.0,
        inspect=inspect,
        prepare=prepare,
    ) | {"task": task.name, "lowest": float((task.lowest(x) - task.f(x))[hidden].square().mean())}
