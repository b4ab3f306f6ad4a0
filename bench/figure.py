"""The figure of ``deq bench cpu`` and ``deq bench gpu``: how many times faster than each baseline, by case."""

from collections.abc import Sequence
from pathlib import Path

COLOURS = {
    "torchdeq": "#d55e00",
    "loop": "#0072b2",
    "gemm": "#009e73",
    "graphed": "#cc79a7",
    "compiled": "#e69f00",
}
LABELS = {
    "torchdeq": "best torchdeq solver",
    "loop": "torch loop",
    "gemm": "GEMM-only bound",
    "graphed": "loop in a CUDA graph",
    "compiled": "compiled loop",
}


def draw(rows: Sequence[dict], path: Path) -> None:
    """One panel a pass from rows of bench/versus.py, of the most threads measured: a dot a baseline and case at the
    same tolerance, a ring at the same error, and a tick for what it must be."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    threads = max(row["threads"] for row in rows)
    rows = [row for row in rows if row["threads"] == threads]
    passes = list(dict.fromkeys(row["pass"] for row in rows))
    cases = list(dict.fromkeys(row["case"] for row in rows))
    figure = Figure(figsize=(4.6 + 3.0 * len(passes), 1.9 + 0.26 * len(cases)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(passes), sharey=True, squeeze=False)[0]
    for axis, which in zip(axes, passes, strict=True):
        for row in rows:
            if row["pass"] != which or row["baseline"] not in COLOURS or row["ratio"] is None:
                continue
            y, colour = cases.index(row["case"]), COLOURS[row["baseline"]]
            axis.plot(row["ratio"], y, "o", color=colour, markersize=5)
            if row["matched_ratio"] is not None:
                axis.plot(
                    row["matched_ratio"], y, "o", color=colour, markersize=8, fillstyle="none", markeredgewidth=0.8
                )
            if row["must"] is not None:
                axis.plot([row["must"]] * 2, [y - 0.38, y + 0.38], color=colour, linewidth=1.4, alpha=0.6)
        axis.axvline(1, color="black", linewidth=0.8)
        axis.set_xscale("log")
        axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}x")
        axis.grid(axis="both", color="0.9", linewidth=0.6)
        axis.set_axisbelow(True)
        axis.set_title({"forward": "inference", "training": "forward + backward, new W"}[which], fontsize=11)
        axis.set_xlabel("time of the baseline / time of deq")
    axes[0].set_yticks(range(len(cases)), [_label(case) for case in cases], fontsize=9)
    axes[0].set_ylim(len(cases) - 0.4, -0.6)
    drawn = {row["baseline"] for row in rows if row["ratio"] is not None}
    names = [name for name in COLOURS if name in drawn]
    handles = [Line2D([], [], marker="o", linestyle="", color=COLOURS[name], label=LABELS[name]) for name in names]
    if any(row["matched_ratio"] is not None for row in rows):
        handles.append(
            Line2D(
                [], [], marker="o", linestyle="", color="0.4", fillstyle="none", markersize=8, label="at the same error"
            )
        )
    handles.append(
        Line2D([], [], marker="|", linestyle="", color="0.4", markersize=10, markeredgewidth=1.6, label="must")
    )
    figure.legend(
        handles=handles, loc="outside upper center", ncols=len(handles), frameon=False, fontsize=9, handletextpad=0.3
    )
    figure.savefig(path, dpi=110)


def _label(case: str) -> str:
    family, m, B, _ = case.split("-")
    return f"{family} {m[1:]} × {B[1:]}"
