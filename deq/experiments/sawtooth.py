"""Fig. 1a, d and 3: can a DEQ be trained to the sawtooth that it can represent?"""

from collections.abc import Callable

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from .. import weights
from ..solve import solve
from ._attempts import LONGER, Attempt, attempt_claims, attempt_table, attempts
from ._fit import FIT_COLUMNS, Make, fit, fit_table_rows
from ._lineup import F32, equilibria, feedforward, judge, tied
from ._nets import SeededNet, TriangularDEQ
from ._result import Claim, Result, Table, proved_for_all, spread
from ._run import TRAINED, Choice, Experiment, Part, Run, Tick
from ._train import cosine, train

F64 = torch.float64
SOURCE = "Fig. 1a, d; Fig. 3"
TRIVIAL = 1 / 12  # mean squared error of the best constant
CONFIG = {
    "pieces": Choice((5,), "n of the sawtooth with 2^n pieces that all models are trained on", quick=(3,), full=(3, 5)),
    "others": Choice(
        (1, 3, 10), "n for one model of each kind: 2^1 is easy for all, none learns 2^10", quick=(), full=(1, 10, 15)
    ),
    "steps": Choice(2000, "of Adam; three times as many change no verdict", quick=15, full=20000),
    "rate": Choice(1e-2, "Adam; 3e-3 learns the same in three times the steps, 3e-2 loses seeds"),
    "clip": Choice(10.0, "2-norm of a seed's gradient: free weights near a bifurcation have gradients without bound"),
    "grid": Choice(512, "midpoints in a full batch, 16 to a piece at n = 5", full=4096),
    "kinks": Choice(4.0, "scale of first-layer slopes, kinks uniform in [0, 1]: resolves 2^3 pieces at the start"),
    "noise": Choice((0.05, 0.2), "relative noise on the construction's weights, where training starts near it"),
}


def triangle(x: Tensor, n: int) -> Tensor:
    """Sawtooth of 2^n pieces on [0, 1] with range [0, 1]: (1 + s_(n+1)) / 2 of the tent map s' = 1 - 2 |s|."""
    s = 2 * x - 1
    for _ in range(n):
        s = 1 - 2 * s.abs()
    return (1 + s) / 2


class NearConstruction(TriangularDEQ):
    """Starts at Theorem 1's DEQ of n neurons and one for the input itself, with relative noise on every parameter.

    Neurons are rescaled by 2^-t, so that W is -2 below the diagonal: Adam's steps are the same size for every weight.
    """

    def __init__(self, seeds: int, n: int, noise: float, generator: torch.Generator):
        super().__init__(seeds, 1, n + 1, generator, dtype=F32)
        t = torch.arange(n + 1, dtype=F32)
        below = torch.full((n + 1, n + 1), -2.0).tril(-1)
        below[:, 0] = 0  # neuron 0 is relu(x), seen by the readout alone
        a = torch.where(t == 0, 2.0**n, -(2.0 ** (n + 1)))
        start = {
            "full": below,
            "U": torch.ones(1, n + 1),
            "b": torch.where(t == 0, 0.0, -(0.5**t))[None],
            "a": a[:, None],
        }
        with torch.no_grad():
            for name, value in start.items():
                p = getattr(self, name)
                jitter = torch.randn(p.shape, generator=generator, device=p.device)
                p.copy_(value.to(p) * (1 + noise * jitter))


def run_sawtooth(run: Run) -> Result:
    """The function of the registry entry."""
    config, width, depth = run.config, run.settings.width, run.settings.depth
    nets = [(n, name, make) for n in config.pieces for name, make in _models(run, width, depth).items()]
    last = max(config.pieces)
    tried = _attempts(run, width, last)
    few = ("monotone", "tied", "feed-forward")
    nets += [
        (n, name, make)
        for n in config.others
        for name, make in _models(run, width, depth).items()
        if name.startswith(few) and "memory" not in name and "FLOPs" not in name
    ]
    parts = [Part("built", "Theorem 1's DEQ with a linear readout", lambda tick: _built())]
    entries = run.settings.seeds * config.grid * width
    parts += [
        Part(f"{n}/{name}", f"train {name}, 2^{n} pieces", training(run, n, name, Attempt(make)), entries)
        for n, name, make in nets
    ]
    parts += [
        Part(f"tried/{name}", f"train {name}", training(run, last, name, attempt), entries)
        for name, attempt in tried.items()
    ]
    values = run.parts(parts)
    trained = {n: [values[f"{n}/{name}"] for k, name, _ in nets if k == n] for n in (*config.pieces, *config.others)}
    more = [values[f"tried/{name}"] for name in tried]
    by_name = {r["model"]: r for r in (*trained[last], *more)}
    claims = _claims(run, values["built"], trained)
    claims += attempt_claims(
        tried,
        by_name,
        lambda model: f"2^{last} pieces: MSE feed-forward / {model}",
        SOURCE,
        quick=run.settings.quick,
        setting=f"2^{last} pieces, {config.steps} steps, {config.grid} points",
    )
    tables = [_table(f"2^{n} pieces", rows) for n, rows in trained.items()]
    tables.append(attempt_table(f"2^{last} pieces", tried, by_name, by_name[f"contractive DEQ {width}"]))
    notes = [
        f"MSE of the best constant: {TRIVIAL:.4f}. x10: median MSE, solved again with ten times the steps.",
        *(note for rows in (*trained.values(), more) for r in rows for note in r["notes"]),
    ]
    return Result(claims, tables, values, draw(trained, more, last), notes)


def _models(run: Run, width: int, depth: int) -> dict[str, Make]:
    kinks = run.config.kinks
    return equilibria(width, kinks) | tied(width, kinks) | feedforward(width, depth, kinks)


def _attempts(run: Run, width: int, n: int) -> dict[str, Attempt]:
    """The usual ones, a curriculum of ever finer sawtooths for triangular weights too, and starts near the
    construction."""
    config, x = run.config, _points(run, n)

    def climb(net: SeededNet, tick: Tick) -> None:
        for y in coarser:
            steps = max(1, config.steps // 4)
            train(net, lambda y=y: (x, y), steps=steps, rate=config.rate, clip=config.clip, schedule=cosine(0.3))

    coarser = [triangle(x[..., 0], k) for k in range(1, n)]
    nets = feedforward(width, run.settings.depth, config.kinks)
    rival = next(name for name in nets if "(params)" in name)
    easier = [(x, y) for y in coarser]
    usual = x, triangle(x[..., 0], n)
    made = attempts(run, 1, config.kinks, usual, easier, (rival, nets[rival]), run.settings.depth)
    name = f"triangular DEQ {width}"
    against = rival, f"{rival}, {LONGER} x the steps", f"{rival}, curriculum"
    made[f"{name}, curriculum"] = Attempt(equilibria(width, config.kinks)[name], prepare=climb, against=against)
    for noise in config.noise:
        made[f"construction, noise {noise}"] = Attempt(
            lambda S, g, noise=noise: NearConstruction(S, n, noise, g),
            against=(rival,),
            conditions="training starts near the construction of Theorem 1",
        )
    return made


def _points(run: Run, n: int) -> Tensor:
    """x (S, B, 1) to train on 2^n pieces."""
    config = run.config
    x = ((torch.arange(config.grid, dtype=F32, device=run.device) + 0.5) / config.grid).view(1, -1, 1)
    if 2**n > config.grid / 8:  # midpoints of a grid would alias: 2^10 pieces are constant on 512 of them
        x = torch.rand(x.shape, generator=run.generator("points"), device=run.device)
    return x.expand(run.settings.seeds, -1, -1)


def training(run: Run, n: int, name: str, attempt: Attempt) -> Callable[[Tick], dict]:
    """A part that trains one model on 2^n pieces."""

    def compute(tick: Tick) -> dict:
        config, x = run.config, _points(run, n)
        # Random test points: a grid of them would alias with 2^10 pieces.
        test = torch.rand(1, 4096, 1, generator=run.generator("test"), device=run.device)
        test, y = test.expand(run.settings.seeds, -1, -1), triangle(x[..., 0], n)

        def best(net: SeededNet) -> dict:
            """What the seed with the smallest error on the training points has learned."""
            output = net(x)
            seed = int((output - y).square().mean(1).nan_to_num(torch.inf).argmin())
            return {"shown": [round(v, 4) for v in output[seed, :: max(1, config.grid // 512)].tolist()]}

        return fit(
            run,
            name,
            attempt.make,
            lambda: (x, y),
            (test, triangle(test[..., 0], n)),
            tick,
            steps=config.steps * attempt.longer,
            rate=config.rate,
            clip=config.clip,
            prepare=attempt.prepare,
            inspect=best if n <= 5 else None,
        )

    return compute


def _built() -> list[dict]:
    """Error of Theorem 1's (W, U, b), n neurons and relu(x), read out by T_n = 2^n x - sum 2^(n-i+1) z_i, at inputs of
    30 bits. The engine solves it by forward substitution."""
    rows = []
    for n in (5, 10, 14, 20):
        t = torch.arange(1, n + 1, dtype=F64)
        W = -torch.exp2(t[:, None] - t + 1).tril(-1)
        k = torch.arange(0, 2**30, 2**30 // 4001, dtype=F64)
        x = k / 2**30
        z = solve(weights.LowerTriangular(W, strict=True), x[:, None] * torch.exp2(t) - 1, "relu", solver="direct").z
        y = 2**n * x - z @ torch.exp2(n - t + 1)
        rows.append({"case": f"n = {n}", "error": float((y - triangle(x, n)).abs().max())})
    return rows


def _claims(run: Run, built: list[dict], trained: dict[int, list[dict]]) -> list[Claim]:
    quick = run.settings.quick
    claims = [
        proved_for_all("sup error of Theorem 1's DEQ with a readout", "Thm. 1", built, lambda r: r["error"], "==", 0)
    ]
    for n, rows in trained.items():
        setting = f"2^{n} pieces, width {run.settings.width}, {run.config.steps} steps, {run.config.grid} points"
        claims += judge(
            rows,
            lambda what, model, n=n: f"2^{n} pieces, equal {what}: MSE feed-forward / {model}",
            SOURCE,
            quick=quick,
            setting=setting,
        )
    return claims


def _table(title: str, rows: list[dict]) -> Table:
    return Table(f"{title}: median [quartiles] over seeds", FIT_COLUMNS, fit_table_rows(rows))


def draw(trained: dict[int, list[dict]], more: list[dict], last: int) -> Figure:
    """Every seed's error by model, and the best seed of a true equilibrium, of the tied net and of a feed-forward
    net."""
    from . import _plot

    @_plot.styled
    def paint() -> Figure:
        fig, (errors, shapes) = _plot.figure(2, (10, 5.6), width_ratios=(1.25, 1))
        rows = [*trained[last], *more]
        _plot.strip(errors, [(r["model"], r["mse"], _plot.kind_colour(r)) for r in rows])
        errors.axvline(TRIVIAL, color=_plot.GREY, ls="--", lw=1)
        errors.set_xlabel("test MSE of every seed, and median; dashed: best constant")
        errors.set_title(f"$\\mathbf{{2^{{{last}}}}}$ pieces")
        x = np.linspace(0, 1, len(rows[0]["shown"]))
        chosen = [
            min((r for r in rows if r["kind"] == "equilibrium"), key=lambda r: spread(r["mse"]).median, default=None)
        ]
        chosen += [next(r for r in rows if r["model"].startswith("tied"))]
        chosen += [next(r for r in rows if "(params)" in r["model"])]
        for level, r in enumerate(v for v in chosen if v is not None):
            shapes.plot(x, np.array(r["shown"], dtype=float) - 1.6 * level, color=_plot.kind_colour(r), lw=1)
            shapes.text(0, 1.12 - 1.6 * level, f"{r['model']}, best seed", color=_plot.kind_colour(r), fontsize=9)
        shapes.set_yticks([])
        shapes.spines["left"].set_visible(False)
        shapes.set_xlabel("x")
        shapes.set_title("What was learned")
        return fig

    return paint()


EXPERIMENT = Experiment(
    name="sawtooth",
    title="Sawtooths of 2^n pieces, trained",
    claim="Trained on a sawtooth of 2^5 or 2^10 linear pieces, a DEQ reaches a smaller error than feed-forward nets.",
    function=run_sawtooth,
    width_means="neurons of the DEQs",
    holds=lambda width, seeds: TRAINED * seeds * width**2,
    width=(20, 8, 256),
    depth=(3, 3, 3),
    depth_means="weight matrices of the feed-forward net with the DEQ's parameters; two more at equal FLOPs",
    seeds=(8, 2, 32),
    config=CONFIG,
)
