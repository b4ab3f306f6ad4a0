"""The roofline figure: what each pass reaches, below what this machine can do (Williams, Waterman, Patterson 2009)."""

from pathlib import Path

import numpy as np

from .report import Report

PRECISION_COLOURS = {
    "float32": "#0072b2",
    "float64": "#56b4e9",
    "bfloat16": "#e69f00",
    "float16": "#cc79a7",
    "int8": "#d55e00",
}
PASS_MARKS = {"forward": "o", "backward": "s"}
LINES = ("-", "--", ":")


def draw(report: Report, path: Path) -> None:
    """Executed FLOP/s over executed FLOPs a byte (of the model): a mark a pass, a slope for every level that data come
    from, a roof for every precision that was used, and a tick for the roof of each pass's own mixture."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 5.2), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    found = report.ceilings
    points = [
        (one, one.executed / max(1, one.counts.bytes), one.executed / one.seconds.median) for one in report.passes
    ]
    without = [one.name for one, x, _ in points if not x]  # no place on a logarithmic axis
    points = [point for point in points if point[1]]
    used = [name for name in found.flops if any(one.counts.executed[name] for one in report.passes)]
    highest = max((found.flops[name] for name in used), default=max(found.flops.values()))
    slowest = min(found.bandwidth.values())
    left = min([0.5, *(x / 4 for _, x, _ in points)])
    right = max([4 * highest / slowest, *(4 * x for _, x, _ in points)])
    intensity = np.geomspace(left, right, 200)
    for line, (name, rate) in zip(LINES, found.bandwidth.items(), strict=False):
        axis.plot(
            intensity,
            np.minimum(intensity * rate, highest) / 1e9,
            line,
            color="0.45",
            linewidth=1.2,
            label=f"{name}: {rate / 1e9:.0f} GB/s",
        )
    for name in used:
        roof = found.flops[name]
        axis.plot(
            [roof / max(found.bandwidth.values()), right],
            [roof / 1e9] * 2,
            color=PRECISION_COLOURS[name],
            linewidth=1.6,
            label=f"{name}: {roof / 1e9:.0f} GFLOP/s",
        )
    for one, x, y in points:
        roof = one.arithmetic_ceiling(found)
        axis.plot([x * 0.85, x * 1.18], [roof / 1e9] * 2, color="black", linewidth=1.2)
        axis.plot([x, x], [y / 1e9, roof / 1e9], color="black", linewidth=0.7)
        share = one.arithmetic_share(found)
        mark = PASS_MARKS.get(one.name, "o")
        label = f"{one.name}: {y / 1e9:.3g} GFLOP/s, {share:.0%} of the roof of its mixture"
        axis.plot(x, y / 1e9, mark, color="black", markersize=7, label=label)
    for name in without:
        axis.plot([], [], " ", label=f"{name}: no FLOPs")
    axis.set_xscale("log")
    axis.set_yscale("log")
    for ticks in (axis.xaxis, axis.yaxis):
        ticks.set_major_formatter(lambda value, _: f"{value:g}")
        ticks.set_minor_formatter(lambda value, _: "")
    axis.set_xlim(left, right)
    axis.set_ylim(top=2.2 * highest / 1e9)
    axis.grid(which="major", color="0.9", linewidth=0.6)
    axis.set_axisbelow(True)
    axis.set_xlabel("executed FLOPs a byte moved (model)")
    axis.set_ylabel("GFLOP/s")
    shape = " x ".join(map(str, report.shapes[0])) if report.shapes else ""
    axis.set_title(f"{report.what} {shape} on {found.device}, {found.threads} threads", fontsize=11)
    # Below the axes: inside, it would lie on the marks of slow passes.
    figure.legend(fontsize=8, frameon=False, loc="outside lower center", ncols=2)
    figure.savefig(path, dpi=120)
