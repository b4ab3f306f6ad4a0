"""Fig. 2: heat-maps of features, their magnitude, and their density whatever the magnitude."""

import numpy as np
from matplotlib.figure import Figure

from ._boolean import TASKS, training_parts
from ._judge import beats
from ._result import CONDITIONAL, REPRODUCED, Claim, Result, Table, number, spread
from ._run import TRAINED, Choice, Experiment, Run

SHOWN = ("linear", "f1", "f2")
CONFIG = {
    "dimension": Choice(10, "of the cube: 2^10 points", quick=6, full=14),
    "steps": Choice(1500, "the seen part is fitted by then, as in gotu", quick=30, full=5000),
    "rate": Choice(3e-3, "Adam, as in gotu"),
}


def run_features(run: Run) -> Result:
    """The function of the registry entry."""
    config, width = run.config, run.settings.width
    parts = training_parts(run, SHOWN)
    values = run.parts([part for of_task in parts.values() for part in of_task])
    rows = {t: [values[part.key] for part in of_task] for t, of_task in parts.items()}
    claims = []
    for t, of_task in rows.items():
        setting = f"{TASKS[t].formula}; d = {config.dimension}, width {width}, {config.steps} steps"
        for deq in of_task[:2]:
            for key, what in (("norm", "magnitude"), ("participation", "density")):
                claim = beats(
                    f"{t}: {what} of features, {deq['model']} / feed-forward",
                    "Fig. 2",
                    deq,
                    of_task[2:],
                    key,
                    quick=run.settings.quick,
                    setting=setting,
                    larger=True,
                )
                if key == "norm" and claim.verdict == REPRODUCED:
                    note = f"{claim.note}; magnitude only: lighter maps do not show denser features"
                    claim = Claim(**{**vars(claim), "verdict": CONDITIONAL, "note": note})
                claims.append(claim)
    notes = [
        "Magnitude: 2-norm of the mean |feature| over the cube. Density: participation ratio (sum a)^2 / (n sum a^2) "
        "of it, 1 if all units are alike, 1 / n if one is left; no scale enters.",
        *(note for of_task in rows.values() for r in of_task for note in r["notes"]),
    ]
    return Result(claims, [_table(rows)], values, draw(rows), notes)


def _table(rows: dict[str, list[dict]]) -> Table:
    cells = [
        (t, r["model"], str(r["parameters"]), *(str(spread(r[k])) for k in ("seen", "norm", "participation")))
        for t, of_task in rows.items()
        for r in of_task
    ]
    columns = ("task", "model", "params", "seen error", "magnitude", "density")
    return Table("Features of trained nets: median [quartiles] over seeds", columns, cells)


def draw(rows: dict[str, list[dict]]) -> Figure:
    """Heat-maps on one colour scale, units by magnitude, a line a seed."""
    from . import _plot

    @_plot.styled
    def paint() -> Figure:
        fig, axes = _plot.figure(len(rows), (10, 4.2))
        features = [v for of_task in rows.values() for r in of_task for of_seed in r["features"] for v in of_seed]
        top = max((v for v in features if v is not None), default=1.0)  # None of a net that training lost
        for ax, (task, of_task) in zip(axes, rows.items(), strict=True):
            width = max(len(r["features"][0]) for r in of_task)
            y, ticks = 0.0, []
            for r in of_task:
                map_ = np.array(r["features"], dtype=float)
                image = ax.imshow(
                    map_, extent=(0, map_.shape[1], y + len(map_), y), vmin=0, vmax=top, cmap="magma", aspect="auto"
                )
                ticks.append(
                    (y + len(map_) / 2, f"{r['model'].split()[0]}\n{number(spread(r['participation']).median)}")
                )
                y += len(map_) + 0.6
            ax.set_xlim(0, width)
            ax.set_ylim(y - 0.6, 0)
            ax.set_yticks([t for t, _ in ticks], [label for _, label in ticks], fontsize=8)
            ax.tick_params(axis="y", length=0)
            ax.set_xlabel("unit, largest first")
            ax.set_title(f"{task} (number: density)")
        fig.colorbar(image, ax=axes[-1], label="mean |feature|, a row a seed", shrink=0.9)
        return fig

    return paint()


EXPERIMENT = Experiment(
    name="features",
    title="Heat-maps of features",
    claim="Features of diagonal and vanilla DEQs are denser than those of feed-forward nets: their maps are lighter.",
    function=run_features,
    width_means="neurons of the DEQs",
    holds=lambda width, seeds: TRAINED * seeds * width**2,
    width=(20, 8, 256),
    seeds=(8, 2, 32),
    config=CONFIG,
)
