"""``deq bench digits``: a classifier of scikit-learn's handwritten digits, trained with deq and with torchdeq.

Same initial weights, optimiser, batches and tolerance; epochs of the two alternate in one process, so that neither
meets a quieter machine. Both follow the same path up to the tolerance, which their test accuracies show.
"""

import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.util import find_spec

import torch
from torch import Tensor, nn

from deq.nn import EquilibriumLinear
from deq.solution import ConvergenceWarning

from .baselines import BROYDEN_MAX_ITER, MAX_ITER, has_torchdeq
from .cases import TOL
from .timing import threads as use_threads

WIDTH, FEATURES, CLASSES, BATCH = 256, 64, 10, 128
LEARNING_RATE = 1e-3
TEST_SHARE = 5  # every fifth image
SOLVERS = ("fixed_point_iter", "anderson")  # torchdeq's; its Broyden costs ten times as much here


def has_sklearn() -> bool:
    return find_spec("sklearn") is not None


@dataclass(frozen=True, eq=False)
class Data:
    """Images (N, 64) of mean 0 and std 1, and their digits (N,)."""

    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


def load() -> Data:
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images, dtype=torch.float32), torch.tensor(labels)
    test = torch.arange(len(x)) % TEST_SHARE == 0
    mean, std = x[~test].mean(), x[~test].std()
    x = (x - mean) / std
    return Data((x[~test], y[~test]), (x[test], y[test]))


class Model(nn.Module):
    """x (B, 64) -> logits (B, 10) through an equilibrium of width 256."""

    def __init__(self):
        super().__init__()
        self.layer = EquilibriumLinear(FEATURES, WIDTH, tol=TOL, max_iter=MAX_ITER)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits, and per sample the solve's evaluations and whether it failed."""
        z = self.layer(x)
        return self.head(z), self.layer.solution.iterations, ~self.layer.solution.converged


class TorchdeqModel(Model):
    """The same with the equilibrium found by a solver of torchdeq."""

    def __init__(self, solver: str):
        from torchdeq import get_deq

        super().__init__()
        limit = BROYDEN_MAX_ITER if solver == "broyden" else MAX_ITER
        options = {
            f"{side}_{name}": value
            for side in "fb"
            for name, value in (("solver", solver), ("max_iter", limit), ("tol", TOL), ("stop_mode", "rel"))
        }
        self.deq = get_deq(core="sliced", ift=True, **options)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        W, c = self.layer.weight().dense(), self.layer.injection(x)
        states, info = self.deq(lambda z: torch.relu(torch.addmm(c, z, W.mT)), torch.zeros_like(c))
        return self.head(states[-1]), info["nstep"], info["rel_lowest"].reshape(-1) > TOL


@dataclass
class Run:
    """One training: what it has measured so far. ``warnings`` counts the solves of any kind
    that said they failed."""

    model: Model
    optimizer: torch.optim.Optimizer
    seconds: list[float] = field(default_factory=list)  # of each epoch
    accuracy: list[float] = field(default_factory=list)  # on the test images, after each epoch
    iterations: list[float] = field(default_factory=list)  # mean over the epoch's samples
    solves: int = 0
    failed: int = 0
    warnings: int = 0

    def epoch(self, data: Data, order: Tensor) -> None:
        x, y = data.train
        total = 0.0
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", ConvergenceWarning)
            start = time.perf_counter()
            for rows in order.split(BATCH):
                logits, iterations, failed = self.model(x[rows])
                self.optimizer.zero_grad()
                nn.functional.cross_entropy(logits, y[rows]).backward()
                self.optimizer.step()
                total += float(iterations.sum()) * len(rows) / iterations.numel()
                self.solves, self.failed = self.solves + len(rows), self.failed + int(failed.sum())
            self.seconds.append(time.perf_counter() - start)
            with torch.no_grad():
                logits, *_ = self.model(data.test[0])
        self.warnings += sum(issubclass(w.category, ConvergenceWarning) for w in caught)
        self.iterations.append(total / len(order))
        self.accuracy.append(float((logits.argmax(1) == data.test[1]).float().mean()))


def competitors() -> dict[str, Callable[[], Model]]:
    found: dict[str, Callable[[], Model]] = {"deq": Model}
    if has_torchdeq():
        found |= {f"torchdeq {solver}": lambda solver=solver: TorchdeqModel(solver) for solver in SOLVERS}
    return found


def measure(
    epochs: int, threads: int, seed: int = 0, progress: Callable[[int], object] = lambda epoch: None
) -> list[dict]:
    """One row a competitor; ``ratio`` is its training time over deq's, evaluation apart. An epoch of each in turns."""
    data = load()
    runs = {}
    with use_threads(threads):
        for name, make in competitors().items():
            torch.manual_seed(seed)  # the same initial weights
            model = make()
            runs[name] = Run(model, torch.optim.Adam(model.parameters(), lr=LEARNING_RATE))
        names = list(runs)
        for epoch in range(epochs):
            order = torch.randperm(len(data.train[0]), generator=torch.Generator().manual_seed(seed + epoch))
            first = epoch % len(names)
            for name in names[first:] + names[:first]:
                runs[name].epoch(data, order)
            progress(epoch + 1)
    return [
        {
            "case": f"digits-m{WIDTH}-B{BATCH}-float32",
            "variant": name,
            "threads": threads,
            "epochs": epochs,
            "seconds": sum(run.seconds),
            "ratio": sum(run.seconds) / sum(runs["deq"].seconds),
            "accuracy": run.accuracy[-1],
            "accuracies": run.accuracy,
            "mean_iterations": run.iterations,
            "failed": run.failed / run.solves,
            "warnings": run.warnings,
            "must": 0.0 if name == "deq" else None,
            "reached": run.failed == run.warnings == 0 if name == "deq" else None,
        }
        for name, run in runs.items()
    ]
