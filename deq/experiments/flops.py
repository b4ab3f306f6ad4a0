"""Rebuttal Table 1: the sawtooth of 2^5 pieces by nets of similar FLOPs."""

from matplotlib.figure import Figure

from ._attempts import Attempt
from ._fit import Make
from ._judge import beats
from ._lineup import F32, FINITE, TIED_STEPS, equilibria, tied, width_for_flops
from ._nets import FeedForward
from ._result import Claim, Result, Table, number, spread
from ._run import TRAINED, Choice, Experiment, Part, Run
from .sawtooth import CONFIG as SAWTOOTH
from .sawtooth import TRIVIAL, training

CONFIG = {
    **{name: SAWTOOTH[name] for name in ("steps", "rate", "clip", "grid", "kinks")},
    "pieces": Choice(5, "n of the sawtooth with 2^n pieces", quick=3),
    "depths": Choice((3, 4, 6, 12), "weight matrices of the feed-forward nets", quick=(3, 6), full=(2, 3, 4, 6, 12)),
    "levels": Choice((1, 4), "FLOPs of the feed-forward nets, in units of the iteration cut off after ten steps"),
}


def run_flops(run: Run) -> Result:
    """The function of the registry entry."""
    nets = _models(run)
    entries = run.settings.seeds * run.config.grid * run.settings.width
    values = run.parts(
        [
            Part(name, f"train {name}", training(run, run.config.pieces, name, Attempt(make)), entries)
            for name, make in nets.items()
        ]
    )
    rows = list(values.values())
    for r in rows:
        r.pop("shown", None)
    notes = [
        "FLOPs: of products with weights, a sample's forward pass and a training step; a DEQ's by the evaluations that "
        "it needed, its adjoint's taken to be as many. Memory: numbers kept a sample for the backward pass.",
        *(note for r in rows for note in r["notes"]),
    ]
    return Result(_claims(run, rows), [_table(run, rows)], values, draw(rows), notes)


def _models(run: Run) -> dict[str, Make]:
    width, kinks = run.settings.width, run.config.kinks
    budget = 2 * (2 * width + (TIED_STEPS - 1) * width * width)
    made = equilibria(width, kinks) | tied(width, kinks)
    for level in run.config.levels:
        for depth in run.config.depths:
            n = width_for_flops(depth, level * budget)
            made[f"feed-forward {n}x{depth}"] = lambda S, g, n=n, depth=depth: FeedForward(
                S, 1, n, depth, g, F32, kinks
            )
    return made


def _claims(run: Run, rows: list[dict]) -> list[Claim]:
    """Each DEQ against feed-forward nets of the lowest level not below its FLOPs, or of the highest."""
    nets = [r for r in rows if r["evidence"] is None]
    size = len(run.config.depths)
    levels = [nets[i : i + size] for i in range(0, len(nets), size)]
    claims = []
    for r in rows:
        if r["evidence"] is None:
            continue
        rivals = next((level for level in levels if level[0]["flops"] >= r["flops"]), levels[-1])
        finite = r["model"].startswith("tied")
        claims.append(
            beats(
                f"similar FLOPs: MSE of the best feed-forward net / {r['model']}",
                "rebuttal Table 1",
                r,
                rivals,
                quick=run.settings.quick,
                setting=f"2^{run.config.pieces} pieces, {run.config.steps} steps; {number(r['flops'])} FLOPs against "
                f"{number(rivals[0]['flops'])} and more",
                conditions=FINITE if finite else "",
                about_equilibria=not finite,
            )
        )
    return claims


def _table(run: Run, rows: list[dict]) -> Table:
    cells = [
        (
            r["model"],
            str(r["parameters"]),
            number(r["flops"]),
            number(r["training"]),
            str(r["memory"]),
            str(spread(r["mse"])),
            "" if r["evidence"] is None else number(spread(r["evidence"]["metric_again"]).median),
        )
        for r in rows
    ]
    columns = ("model", "params", "forward", "training", "memory", "MSE", "MSE x10")
    return Table(f"2^{run.config.pieces} pieces, FLOPs a sample: median [quartiles] over seeds", columns, cells)


def _short(model: str) -> str:
    kind, *_, size = model.split()
    return size if kind == "feed-forward" else kind


def draw(rows: list[dict]) -> Figure:
    """Median error against FLOPs and against parameters."""
    from . import _plot

    @_plot.styled
    def paint() -> Figure:
        fig, axes = _plot.figure(2, (10, 4), sharey=True)
        for ax, key, label in zip(axes, ("flops", "parameters"), ("forward FLOPs a sample", "parameters"), strict=True):
            for r in rows:
                s = spread(r["mse"])
                colour = _plot.kind_colour(r)
                ax.errorbar(
                    r[key], s.median, [[s.median - s.low], [s.high - s.median]], fmt="o", color=colour, ms=5, lw=1
                )
            ax.axhline(TRIVIAL, color=_plot.GREY, ls="--", lw=1)
            ax.set_xscale("log")
            ax.set_yscale("log")
            ax.set_xlabel(label)
            _plot.sparse_ticks(ax.xaxis)
        _plot.plain_ticks(axes[0].yaxis)
        axes[0].set_ylabel("test MSE, median and quartiles")
        axes[0].set_title("Blue: equilibrium; purple: finite depth")
        axes[1].set_title("Red: feed-forward, width x depth")
        fig.draw_without_rendering()  # the layout, which says which labels are close
        for ax, key in zip(axes, ("flops", "parameters"), strict=True):
            _plot.label(ax, [(r[key], spread(r["mse"]).median, _short(r["model"]), _plot.kind_colour(r)) for r in rows])
        return fig

    return paint()


EXPERIMENT = Experiment(
    name="flops",
    title="Sawtooth at similar FLOPs",
    claim="At similar FLOPs per iteration, a DEQ of width 10 fits the sawtooth of 2^5 pieces better than other nets.",
    function=run_flops,
    width_means="neurons of the DEQs",
    holds=lambda width, seeds: TRAINED * seeds * width**2,
    width=(10, 6, 64),
    seeds=(8, 2, 32),
    config=CONFIG,
)
