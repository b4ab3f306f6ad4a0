"""The frequency conjecture: does a DEQ learn high frequencies better? Error per tone of a sum of tones."""

import math
from collections.abc import Callable

import torch
from matplotlib.figure import Figure
from torch import Tensor

from ._attempts import Attempt, Batch, attempt_claims, attempt_table, attempts
from ._fit import FIT_COLUMNS, fit, fit_table_rows
from ._lineup import F32, equilibria, feedforward, judge, tied
from ._result import Claim, Result, Table, number, spread
from ._run import TRAINED, Choice, Experiment, Part, Run, Tick

TONES = (1, 2, 4, 8, 16)
TESTS = 2048  # points
CONFIG = {
    "steps": Choice(1500, "of Adam; the order of the models is that of 10 000", quick=15, full=20000),
    "rate": Choice(1e-2, "Adam, as for the sawtooth"),
    "clip": Choice(10.0, "2-norm of a seed's gradient"),
    "grid": Choice(256, "midpoints in a full batch, 16 to a period of the highest tone", full=2048),
    "kinks": Choice(4.0, "scale of first-layer slopes, kinks uniform in [0, 1]"),
}


def signal(x: Tensor, generator: torch.Generator, count: int = len(TONES)) -> Tensor:
    """Sum of the ``count`` lowest TONES with random phases; all together have unit variance."""
    phases = (2 * math.pi * torch.rand(len(TONES), generator=generator, device=x.device)).tolist()
    waves = (torch.sin(2 * math.pi * k * x + phase) for k, phase in zip(TONES[:count], phases, strict=False))
    return sum(waves) * math.sqrt(2 / len(TONES))


def run_spectrum(run: Run) -> Result:
    """The function of the registry entry."""
    width, depth, kinks = run.settings.width, run.settings.depth, run.config.kinks
    nets = equilibria(width, kinks) | tied(width, kinks) | feedforward(width, depth, kinks)
    entries = run.settings.seeds * run.config.grid * width
    (x, y), test = _data(run)
    easier = [(x, signal(x[..., 0], run.generator("phases"), count)) for count in range(1, len(TONES))]
    rival = next(name for name in nets if "(params)" in name)
    tried = attempts(run, 1, kinks, (x, y), easier, (rival, nets[rival]), depth)
    everything = {name: Attempt(make) for name, make in nets.items()} | tried
    values = run.parts(
        [
            Part(name, f"train {name}", _training(run, name, attempt, (x, y), test), entries)
            for name, attempt in everything.items()
        ]
    )
    rows, more = [values[name] for name in nets], [values[name] for name in tried]
    notes = [
        f"Error of a tone: |FFT of the residual|^2 / |FFT of the target|^2 there; tones {TONES}, x10: as in sawtooth.",
        *(note for r in (*rows, *more) for note in r["notes"]),
    ]
    claims = _claims(run, rows) + attempt_claims(
        tried,
        values,
        lambda model: f"tone {TONES[-1]}: error feed-forward / {model}",
        "conclusion",
        "highest",
        quick=run.settings.quick,
        setting=f"tones {TONES}, {run.config.steps} steps",
    )
    tables = [
        Table("Sum of five tones, unit variance: median [quartiles] over seeds", FIT_COLUMNS, fit_table_rows(rows)),
        _tone_table([*rows, *more]),
        attempt_table(f"Tone {TONES[-1]}", tried, values, values[f"contractive DEQ {width}"], "highest"),
    ]
    return Result(claims, tables, values, draw(rows), notes)


def _data(run: Run) -> tuple[Batch, Batch]:
    """Midpoints of two grids, and the signal there: to train on and to test on."""

    def on_grid(n: int) -> Batch:
        x = ((torch.arange(n, dtype=F32, device=run.device) + 0.5) / n).view(1, -1, 1)
        x = x.expand(run.settings.seeds, -1, -1)
        return x, signal(x[..., 0], run.generator("phases"))

    return on_grid(run.config.grid), on_grid(TESTS)


def _training(run: Run, name: str, attempt: Attempt, data: Batch, tests: Batch) -> Callable[[Tick], dict]:
    def compute(tick: Tick) -> dict:
        config, (test, truth) = run.config, tests

        def tones(net) -> dict:
            """Relative error at every tone, per seed."""
            power = torch.fft.rfft(truth.double()).abs().square()
            residual = torch.fft.rfft((net(test) - truth).double().nan_to_num(1e6)).abs().square()
            return {"tones": (residual / power)[:, list(TONES)].tolist()}

        row = fit(
            run,
            name,
            attempt.make,
            lambda: data,
            tests,
            tick,
            steps=config.steps * attempt.longer,
            rate=config.rate,
            clip=config.clip,
            inspect=tones,
            prepare=attempt.prepare,
        )
        return row | {"highest": [of_seed[-1] for of_seed in row["tones"]]}

    return compute


def _claims(run: Run, rows: list[dict]) -> list[Claim]:
    return judge(
        rows,
        lambda what, model: f"tone {TONES[-1]}, equal {what}: error feed-forward / {model}",
        "conclusion",
        "highest",
        quick=run.settings.quick,
        setting=f"tones {TONES}, width {run.settings.width}, {run.config.steps} steps",
    )


def _tone_table(rows: list[dict]) -> Table:
    cells = [
        (r["model"], *(number(spread([of_seed[i] for of_seed in r["tones"]]).median) for i in range(len(TONES))))
        for r in rows
    ]
    return Table("Relative error per tone, medians", ("model", *map(str, TONES)), cells)


def draw(rows: list[dict]) -> Figure:
    """Error per tone, and after ten times the solver steps."""
    from . import _plot

    @_plot.styled
    def paint() -> Figure:
        fig, (per_tone, again) = _plot.figure(2, (10, 4.4), width_ratios=(1, 1.1))
        marks = {"triangular": "s", "contractive": "v", "monotone": "o", "free": "^", "tied": "D", "feed-forward": "."}
        for r in rows:
            medians = [spread([of_seed[i] for of_seed in r["tones"]]).median for i in range(len(TONES))]
            mark = marks[r["model"].split()[0]]
            per_tone.plot(TONES, medians, mark + "-", color=_plot.kind_colour(r), ms=5, lw=1, alpha=0.8)
        per_tone.set_xscale("log", base=2)
        per_tone.set_yscale("log")
        _plot.sparse_ticks(per_tone.yaxis)
        per_tone.set_xticks(TONES, [str(k) for k in TONES])
        per_tone.set_xlabel("tone")
        per_tone.set_ylabel("relative error, median over seeds")
        per_tone.set_title("Error per tone")
        lines = []
        for r in rows:
            lines.append((r["model"], r["mse"], _plot.kind_colour(r)))
            if r["kind"] not in ("", "equilibrium"):
                lines.append(("same, ten times the steps", r["evidence"]["metric_again"], _plot.GREY))
        _plot.strip(again, lines)
        again.set_xlabel("MSE of every seed, and median")
        again.set_title("Blue: equilibrium; purple: finite depth")
        return fig

    return paint()


EXPERIMENT = Experiment(
    name="spectrum",
    title="Error per frequency band",
    claim="A DEQ has potential advantages in learning certain high-frequency components.",
    function=run_spectrum,
    width_means="neurons of the DEQs",
    holds=lambda width, seeds: TRAINED * seeds * width**2,
    width=(20, 8, 256),
    depth=(3, 3, 3),
    depth_means="weight matrices of the feed-forward net with the DEQ's parameters; two more at equal FLOPs",
    seeds=(8, 2, 32),
    config=CONFIG,
)
