"""Appendix B.2: a sound as a function of time, by equilibria and by explicit nets of the same size."""

import math
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ._attempts import Attempt, Batch, attempt_claims, attempt_table, attempts
from ._filter_nets import FILTERS, FilterDEQ, FilterNet
from ._fit import FIT_COLUMNS, Make, fit, fit_table_rows
from ._judge import beats
from ._lineup import F32, FINITE, equilibria, feedforward, tied
from ._result import CONDITIONAL, REPRODUCED, Claim, Result, Table, spread
from ._run import TRAINED, Choice, Experiment, Part, Run, Tick
from ._sound import RATE, chord, read_wav

SMOOTHED = (16, 4, 1)  # stages of the curriculum: samples on either side of a mean
CONFIG = {
    "samples": Choice(256, "of sound, a thirty-second of a second of the synthesised chord", quick=128, full=8192),
    "steps": Choice(400, "of Adam on the full batch: filter equilibria take 30 ms each", quick=10, full=3000),
    "rate": Choice(5e-3, "Adam; 1e-3, as in published code, needs 3000 steps for the same"),
    "clip": Choice(10.0, "2-norm of a seed's gradient"),
    "scale": Choice(
        120.0, "of filter frequencies in rad per unit time: up to 20 periods in the window", quick=30, full=2000
    ),
    "kinks": Choice(8.0, "scale of first-layer slopes of ReLU nets, kinks uniform in time"),
}


def run_audio(run: Run) -> Result:
    """The function of the registry entry."""
    pairs, relu = _models(run)
    nets = {name: make for pair in pairs.values() for name, make in pair.items()} | relu
    sound = _sound(run)
    entries = run.settings.seeds * run.config.samples * run.settings.width
    x, y = _data(run, sound, 0.0)
    easier = [(x, _smoothed(y, n)) for n in SMOOTHED]
    rival = next(name for name in relu if "(params)" in name)
    tried = attempts(run, 1, run.config.kinks, (x, y), easier, (rival, relu[rival]), run.settings.depth)
    everything = {name: Attempt(make) for name, make in nets.items()} | tried
    values = run.parts(
        [
            Part(name, f"train {name}", _training(run, name, attempt, sound), entries)
            for name, attempt in everything.items()
        ]
    )
    rows, more = [values[name] for name in nets], [values[name] for name in tried]
    source = run.settings.input or f"a synthesised chord at {RATE} Hz"
    notes = [
        f"{run.config.samples} samples of {source}, largest amplitude 1. MSE -> dB: -10 log10 MSE. Explicit nets have "
        "the parameters of the equilibrium beside them.",
        *(note for r in (*rows, *more) for note in r["notes"]),
    ]
    claims = _claims(run, pairs, values, rows) + attempt_claims(
        tried,
        values,
        lambda model: f"sound: MSE of feed-forward / {model}",
        "App. B.2",
        quick=run.settings.quick,
        setting=f"{run.config.samples} samples, {run.config.steps} steps",
    )
    tables = [
        Table("Sound: median [quartiles] over seeds", (*FIT_COLUMNS, "dB"), _cells(rows)),
        attempt_table("Sound on raw time", tried, values, values[f"contractive DEQ {run.settings.width}"]),
    ]
    return Result(claims, tables, values, draw(rows, sound), notes)


def _data(run: Run, sound: torch.Tensor, low: float) -> Batch:
    """Times from ``low`` to 1 and the sound there."""
    y = sound.to(run.device, F32).expand(run.settings.seeds, -1)
    x = torch.linspace(low, 1, y.shape[1], dtype=F32, device=run.device)
    return x.view(1, -1, 1).expand(run.settings.seeds, -1, -1), y


def _smoothed(y: torch.Tensor, n: int) -> torch.Tensor:
    """Means over 2 n + 1 samples, fewer at the ends."""
    return F.avg_pool1d(y.unsqueeze(1), 2 * n + 1, 1, n, count_include_pad=False).squeeze(1)


def _cells(rows: list[dict]) -> list[tuple[str, ...]]:
    return [
        (*cells, f"{decibel(spread(r['mse']).median):.1f}") for cells, r in zip(fit_table_rows(rows), rows, strict=True)
    ]


def decibel(mse: float) -> float:
    """Peak signal-to-noise ratio at amplitude 1."""
    return -10 * math.log10(max(mse, 1e-30))


def _sound(run: Run) -> torch.Tensor:
    count = run.config.samples
    if run.settings.input:
        return read_wav(run.settings.input, count)
    sound = chord(RATE // 4 + count)[-count:] if count < RATE // 4 else chord(count)
    return sound / sound.abs().max()  # of the stretch, as of a file's: decibels are over an amplitude of 1


def _models(run: Run) -> tuple[dict[str, dict[str, Make]], dict[str, Make]]:
    """By filter, the equilibrium and the explicit net; and ReLU nets on raw time."""
    width, depth, scale, kinks = run.settings.width, run.settings.depth, run.config.scale, run.config.kinks
    pairs = {
        f: {
            f"{f} DEQ {width}": lambda S, g, f=f: FilterDEQ(S, width, g, f, scale),
            f"{f} explicit {width}": lambda S, g, f=f: FilterNet(S, width, g, f, scale),
        }
        for f in FILTERS
    }
    usual = equilibria(width, kinks)
    relu = {name: make for name, make in usual.items() if name.startswith(("contractive", "monotone"))}
    relu |= tied(width, kinks)
    relu |= {name: make for name, make in feedforward(width, depth, kinks).items() if "memory" not in name}
    return pairs, relu


def _training(run: Run, name: str, attempt: Attempt, sound: torch.Tensor) -> Callable[[Tick], dict]:
    def compute(tick: Tick) -> dict:
        config = run.config
        x, y = _data(run, sound, -1.0 if name.startswith(tuple(FILTERS)) else 0.0)

        def inspect(net) -> dict:
            return {"shown": net(x)[0].tolist()}

        return fit(
            run,
            name,
            attempt.make,
            lambda: (x, y),
            (x, y),
            tick,
            steps=config.steps * attempt.longer,
            rate=config.rate,
            clip=config.clip,
            inspect=inspect,
            prepare=attempt.prepare,
        )

    return compute


def _claims(run: Run, pairs: dict, values: dict, rows: list[dict]) -> list[Claim]:
    setting = f"{run.config.samples} samples, width {run.settings.width}, {run.config.steps} steps"
    matches = [(values[deq], values[net]) for deq, net in (tuple(p) for p in pairs.values())]
    rival = next(r for r in rows if "(params)" in r["model"])
    costly = next(r for r in rows if "(FLOPs)" in r["model"])
    relu = [r for r in rows if r["evidence"] is not None and r not in [m[0] for m in matches]]
    matches += [(r, rival) for r in relu] + [(r, costly) for r in relu if r["model"].startswith("tied")]
    claims = []
    for deq, net in matches:
        finite = deq["model"].startswith("tied")
        claim = beats(
            f"sound: MSE of {net['model']} / {deq['model']}",
            "App. B.2",
            deq,
            [net],
            quick=run.settings.quick,
            setting=setting,
            conditions=FINITE if finite else "",
            about_equilibria=not finite,
        )
        if claim.verdict == REPRODUCED:  # one filter, one sound: never without its conditions
            claim = Claim(
                **{**vars(claim), "verdict": CONDITIONAL, "note": f"{claim.note}; {deq['model'].split()[0]} alone"}
            )
        claims.append(claim)
    return claims


def draw(rows: list[dict], sound: torch.Tensor) -> Figure:
    """Every seed's error, and the sound with what one equilibrium and one explicit net make of it."""
    from . import _plot

    @_plot.styled
    def paint() -> Figure:
        fig, (errors, waves) = _plot.figure(2, (10, 4.6), width_ratios=(1.1, 1))
        _plot.strip(errors, [(r["model"], r["mse"], _plot.kind_colour(r)) for r in rows])
        errors.set_xlabel("MSE of every seed, and median")
        errors.set_title("Blue: equilibrium; purple: finite depth")
        t = np.arange(len(sound)) / RATE
        shown = [("sound", sound.tolist(), _plot.BLACK)]
        shown += [(r["model"], r["shown"], _plot.kind_colour(r)) for r in rows[:2]]
        shown += [(r["model"], r["shown"], _plot.kind_colour(r)) for r in rows if r["model"].startswith("monotone")]
        for level, (name, wave, colour) in enumerate(shown):
            waves.plot(t, np.array(wave, dtype=float) - 2.4 * level, color=colour, lw=0.8)
            waves.text(0, 1.05 - 2.4 * level, name, color=colour, fontsize=8)
        waves.set_yticks([])
        waves.spines["left"].set_visible(False)
        waves.set_ylim(top=1.9)  # and as far down as the last one reaches, which may be below -1
        waves.xaxis.set_major_locator(MaxNLocator(5))
        waves.set_xlabel(f"samples / {RATE}")
        waves.set_title("Seed 0")
        return fig

    return paint()


EXPERIMENT = Experiment(
    name="audio",
    title="Implicit representation of a sound",
    claim="A DEQ represents audio with a noticeably smaller error than a feed-forward net of the same size.",
    function=run_audio,
    width_means="neurons of the DEQs",
    holds=lambda width, seeds: TRAINED * seeds * width**2,
    width=(16, 8, 256),
    depth=(3, 3, 4),
    depth_means="weight matrices of the ReLU net with the DEQ's parameters; two more at equal FLOPs",
    seeds=(8, 2, 8),
    input_means="a PCM WAV file instead of the synthesised chord",
    config=CONFIG,
)
