"""A multiscale equilibrium, one of a single resolution, and the same block cut off, trained on handwritten digits."""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor, nn

from ..fixed_point import StateSolution
from ..nn import Equilibrium, MultiscaleBlock
from ._equilibria import evidence
from ._judge import beats, kind_of
from ._nets import smallest
from ._result import Result, Table, number, spread
from ._run import TRAINED, Choice, Experiment, Part, Run, Tick
from ._train import cosine

CLASSES, SIZE = 10, 8
CONFIG = {
    "steps": Choice(100, "of Adam: two passes over the training images", quick=3, full=600),
    "rate": Choice(1e-2, "Adam, falling on a cosine"),
    "batch": Choice(32, "images a step, drawn afresh for every seed", quick=8, full=64),
    "tests": Choice(359, "test images, of the 360 that are every fifth of the 1797", quick=32),
    "tol": Choice(1e-4, "relative tolerance of a training step, forward and backward"),
    "cut": Choice(3, "evaluations of the block that is cut off; the equilibrium takes three times as many"),
}


class Digits:
    """scikit-learn's 8 x 8 digits in [-1, 1]; every fifth is kept for tests."""

    def __init__(self, device: torch.device):
        from sklearn.datasets import load_digits

        digits = load_digits()
        x = torch.tensor(digits.images / 8 - 1, dtype=torch.float32, device=device).unsqueeze(1)
        labels = torch.tensor(digits.target, device=device)
        kept = torch.arange(len(x), device=device) % 5 == 0
        self.train, self.test = (x[~kept], labels[~kept]), (x[kept], labels[kept])


class Classifier(nn.Module):
    """Image -> convolution -> equilibrium of a multiscale block -> largest value of every map -> linear layer.

    cut: None, or how many evaluations from zero stand in for the equilibrium.
    """

    def __init__(self, channels: Sequence[int], tol: float, cut: int | None):
        super().__init__()
        self.stem = nn.Conv2d(1, channels[0], 3, padding=1)
        self.block = MultiscaleBlock(channels, groups=math.gcd(4, *channels))
        self.layer = Equilibrium(self.block, init=self.block.start, tol=tol)
        self.head = nn.Linear(sum(channels), CLASSES)
        self.cut = cut

    def forward(self, images: Tensor) -> Tensor:
        x = self.stem(images)
        if self.cut is None:
            return self.logits(self.layer(x))
        z = self.block.start(x)
        for _ in range(self.cut):
            z = self.block(z, x)
        return self.logits(z)

    def logits(self, z: Sequence[Tensor]) -> Tensor:
        return self.head(torch.cat([part.amax((2, 3)) for part in z], 1))

    def solve(self, images: Tensor, tol: float, steps: int) -> StateSolution:
        """The equilibrium, whatever the net was trained with."""
        x = self.stem(images)
        layer = Equilibrium(self.block, init=self.block.start, tol=tol, max_iter=steps, on_failure="ignore")
        layer(x)
        return layer.solution


def run_multiscale(run: Run) -> Result:
    """The function of the registry entry."""
    c = run.settings.width
    channels = (c, c, 2 * c)
    alone = (_matching(channels),)
    nets = {
        f"multiscale DEQ {c}": (channels, None),
        f"one resolution {alone[0]}": (alone, None),
        f"cut off, K = {run.config.cut}": (channels, run.config.cut),
    }
    entries = run.config.batch * c * SIZE**2
    values = run.parts([Part(name, f"train {name}", _training(run, name, *net), entries) for name, net in nets.items()])
    rows = list(values.values())
    setting = f"8 x 8 digits, {c} channels, {run.config.steps} steps"
    claims = [
        beats(
            f"error on test images: {rival['model']} / multiscale DEQ",
            source,
            rows[0],
            [rival],
            "error",
            quick=run.settings.quick,
            setting=setting,
            conditions="small nets on 8 x 8 digits, in place of CIFAR-10",
        )
        for rival, source in zip(rows[1:], ("Bai et al. 2020", "Bai et al. 2019"), strict=True)
    ]
    notes = [
        f"Of {alone[0]} channels the single resolution has the closest number of parameters from above.",
        *(note for r in rows for note in r["notes"]),
    ]
    return Result(claims, [_table(rows)], values, draw(rows), notes)


def _matching(channels: Sequence[int]) -> int:
    """The fewest channels with which one resolution has no fewer parameters than these resolutions."""
    wanted = _count(MultiscaleBlock(channels, groups=1))
    return smallest(lambda n: _count(MultiscaleBlock((n,), groups=1)) >= wanted, channels[0])


def _count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _training(run: Run, name: str, channels: Sequence[int], cut: int | None) -> Callable[[Tick], dict]:
    def compute(tick: Tick) -> dict:
        config, seeds = run.config, run.settings.seeds
        digits = Digits(run.device)
        x, labels = (t[: config.tests] for t in digits.test)
        nets, losses, failures = [], [], 0
        for seed in range(seeds):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(int(torch.randint(2**31, (), generator=run.generator(f"init/{seed}", "cpu"))))
                net = Classifier(channels, config.tol, cut).to(run.device)
            data = run.generator(f"data/{seed}")
            curve, failed = _train(net, digits, config, data, lambda share, at=seed: tick((at + share) / seeds))
            nets.append(net)
            losses.append(curve)
            failures += failed
        with torch.no_grad():
            error = [float((net(x).argmax(1) != labels).float().mean()) for net in nets]
            row = {"model": name, "parameters": _count(nets[0]), "error": error, "loss": losses, "notes": []}
            row["evaluations"] = cut or int(max(net.layer.solution.iterations.max() for net in nets))
            row["evidence"] = _evidence(nets, x, labels, torch.tensor(error))
        if failures:
            row["notes"].append(f"{name}: in {failures} step(s) a sample's equilibrium was not found to tolerance.")
        return row | {"kind": kind_of(row["evidence"])}

    return compute


def _train(net: Classifier, digits: Digits, config, data: torch.Generator, tick: Tick) -> tuple[list[float], int]:
    """The loss of every step, and in how many of them a sample's equilibrium was not found."""
    optimiser = torch.optim.Adam(net.parameters(), lr=config.rate)
    decay = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: cosine()(step / config.steps))
    net.layer.options["on_failure"] = "ignore"
    images, labels = digits.train
    curve, failed = [], 0
    for step in range(config.steps):
        tick(step / config.steps)
        rows = torch.randint(len(images), (config.batch,), generator=data, device=images.device)
        loss = F.cross_entropy(net(images[rows]), labels[rows])
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 5.0)
        optimiser.step()
        decay.step()
        curve.append(loss.item())
        failed += net.cut is None and not bool(net.layer.solution.converged.all())
    return curve, failed


def _evidence(nets: Sequence[Classifier], x: Tensor, labels: Tensor, used: Tensor) -> dict:
    """Test errors of the equilibria, with the residual of every seed; float32, so that the second tolerance is 1e-6."""

    def solved(tol: float, most: int) -> tuple[Tensor, Tensor]:
        solutions = [net.solve(x, 1e-6 if tol < 1e-10 else 1e-5, most) for net in nets]
        logits = [net.logits(s.z) for net, s in zip(nets, solutions, strict=True)]
        return torch.stack(logits), torch.stack([s.residual for s in solutions])

    def error(logits: Tensor) -> Tensor:
        return (logits.argmax(2) != labels).float().mean(1)

    return evidence(solved, error, used, 200, trivial=1 - 1 / CLASSES)


def _table(rows: list[dict]) -> Table:
    cells = [
        (
            r["model"],
            str(r["parameters"]),
            str(r["evaluations"]),
            str(spread(r["error"])),
            str(spread([curve[-1] for curve in r["loss"]])),
            number(r["evidence"]["residual_again"]),
        )
        for r in rows
    ]
    columns = ("model", "params", "evaluations", "test error", "last loss", "residual")
    return Table("Handwritten digits: median [quartiles] over seeds", columns, cells)


def draw(rows: list[dict]) -> Figure:
    """The median loss in training, and the test error of every seed."""
    from . import _plot

    @_plot.styled
    def paint() -> Figure:
        fig, (left, right) = _plot.figure(2, (10, 3.6), width_ratios=(1.4, 1))
        for r, style in zip(rows, ("-", "--", ":"), strict=True):  # a cut-off net may be at an equilibrium: same colour
            median = torch.tensor(r["loss"]).median(0).values.tolist()
            left.plot(range(1, len(median) + 1), median, style, color=_plot.kind_colour(r), label=r["model"])
        left.set_yscale("log")
        _plot.plain_ticks(left.yaxis)
        left.xaxis.set_major_locator(MaxNLocator(integer=True))
        left.set_xlabel("step")
        left.set_title("cross entropy, median over seeds")
        left.legend()
        for at, r in enumerate(rows):
            right.plot([at] * len(r["error"]), r["error"], "o", color=_plot.kind_colour(r), ms=4, mew=0, alpha=0.6)
            right.plot([at - 0.25, at + 0.25], [spread(r["error"]).median] * 2, color=_plot.kind_colour(r), lw=2)
        right.set_xticks(range(len(rows)), [r["model"].split(",")[0].replace(" ", "\n", 1) for r in rows])
        right.set_xlim(-0.6, len(rows) - 0.4)
        right.set_ylim(0, 1.1 * max(max(r["error"]) for r in rows) or 1)
        right.set_title("error on test images, by seed")
        return fig

    return paint()


EXPERIMENT = Experiment(
    name="multiscale",
    title="Several resolutions as one equilibrium",
    claim="Solving several resolutions as one equilibrium classifies images better than one resolution of equal size.",
    function=run_multiscale,
    width_means="channels of the finest resolution",
    holds=lambda width, seeds: TRAINED * 9 * width**2,  # one seed after the other
    width=(8, 4, 16),
    seeds=(8, 1, 8),
    config=CONFIG,
    needs=("scikit-learn",),
)
