"""The figure of ``deq run steep``."""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from . import _plot
from ._result import spread

DEQ_COLOURS = {"diagonal": _plot.BLUE, "triangular": _plot.SKY}
DEPTH_COLOURS = {2: "#F5A66B", 3: _plot.VERMILION, 4: "#8C3A00"}  # one hue: the depth of feed-forward nets
MARKS = ("o", "s", "^", "D", "v", "P")


@_plot.styled
def draw(built: list[dict], trained: list[dict]) -> Figure:
    """Error laws of the constructions, what training reaches, and the floor under feed-forward nets."""
    fig, (laws, learned, floor) = _plot.figure(3, (10, 4), width_ratios=(1, 1.15, 1.15))
    _draw_laws(laws, built)
    _draw_learned(learned, trained)
    d = max(r["d"] for r in trained)
    _draw_floor(floor, [r for r in trained if r["d"] == d], [r for r in built if r["d"] == d], d)
    return fig


def _draw_laws(ax: Axes, built: list[dict]) -> None:
    K = np.array(sorted({r["K"] for r in built}), dtype=float)
    ds = sorted({r["d"] for r in built})
    for key, power, colour in (("A_error", 2, _plot.BLUE), ("B_error", 1, _plot.GREEN)):
        ax.plot(K, K**-power, color=colour, lw=1)
        for d, mark in zip(ds, MARKS, strict=False):
            errors = [r[key] for r in built if r["d"] == d]
            ax.plot(K, errors, mark, color=colour, ms=4, alpha=0.55, mew=0)
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    ticks = [k for k in K if np.log2(k).is_integer()]
    ticks = ticks[:: 1 + len(ticks) // 7]
    ax.set_xticks(ticks, [f"{k:g}" for k in ticks])
    ax.minorticks_off()
    ax.set_xlabel("width K of the DEQ")
    ax.set_ylabel("sup error")
    ax.set_title("DEQs built by hand")
    ax.text(0.98, 0.82, "B: law 1/K", color=_plot.GREEN, ha="right", transform=ax.transAxes)
    ax.text(0.98, 0.44, "A: law 1/K²", color=_plot.BLUE, ha="right", transform=ax.transAxes)
    note = f"marks: d = {ds[0]} (lowest) … {ds[-1]}"
    ax.text(0.03, 0.02, note, color=_plot.GREY, fontsize=8, transform=ax.transAxes)
    _draw_target(ax.inset_axes((0.07, 0.17, 0.28, 0.20)))


def _draw_target(ax: Axes) -> None:
    x = 1 - np.geomspace(1e-4, 1, 200)
    for d, shade in ((4, 0.4), (6, 0.7), (10, 1.0)):
        ax.plot(x, 2.0**-d / (2.0**-d + 1 - x), color=_plot.BLACK, alpha=shade, lw=1)
    ax.set_xticks([0, 1])
    ax.set_yticks([0, 1])
    ax.tick_params(labelsize=8, length=2, pad=1)
    ax.set_title("target g", fontsize=8, fontweight="normal", pad=2)
    ax.set_xlabel("$x_1$", fontsize=8, labelpad=-6)


def _colour(row: dict) -> str:
    return DEQ_COLOURS[row["model"].split()[0]] if "equilibrium" in row else DEPTH_COLOURS[_depth(row)]


def _depth(row: dict) -> int:
    return int(row["model"].rpartition("x")[2])


def _label(row: dict) -> str:
    return row["model"].rpartition(" ")[0] if "equilibrium" in row else f"feed-forward\ndepth {_depth(row)}"


def _draw_learned(ax: Axes, trained: list[dict]) -> None:
    ds = sorted({r["d"] for r in trained})
    rows = [r for r in trained if r["d"] == ds[0]]
    for d, side, fill in zip(ds, (0.2, 0.8), ("white", None), strict=True):
        of_d = [r for r in trained if r["d"] == d]
        for y, row in enumerate(of_d):
            errors = [v for v in row["mse"] if v is not None]
            jitter = y + np.linspace(-0.22, 0.22, len(errors)) if len(errors) > 1 else [y] * len(errors)
            ax.plot([spread(row["mse"]).median] * 2, [y - 0.36, y + 0.36], color=_colour(row), lw=2.5)
            ax.plot(errors, jitter, "o", color=_colour(row), mfc=fill or _colour(row), ms=4, mew=0.9)
        ax.plot(side - 0.11, 0.965, "o", color="#222222", mfc=fill, ms=4.5, mew=0.9, transform=ax.transAxes)
        ax.text(side - 0.08, 0.965, f"d = {d}", va="center", color="#222222", transform=ax.transAxes)
    ax.set_xscale("log")
    low, high = ax.get_xlim()
    ax.set_xlim(min(low, 0.9 * 10 ** np.floor(np.log10(high))), high)  # at least one decade's tick
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.set_yticks(range(len(rows)), [_label(r) for r in rows])
    for tick, row in zip(ax.get_yticklabels(), rows, strict=True):
        tick.set_color(_colour(row))
    ax.set_ylim(len(rows) - 0.5, -1.1)
    ax.tick_params(axis="y", length=0)
    ax.spines["left"].set_visible(False)
    ax.grid(axis="x", color="#E5E5E5", lw=0.8)
    ax.set_axisbelow(True)
    ax.set_xlabel("test MSE of every seed, and median")
    ax.set_title("Trained at similar size")


def _draw_floor(ax: Axes, trained: list[dict], built: list[dict], d: int) -> None:
    delta = 2.0**-d
    x = np.append(np.geomspace(1e-3, 0.999, 300), 1)
    ax.fill_between(x, 1e-5, (1 - np.sqrt(x)) ** 2 / 2, color="#EBEBEB", lw=0)
    for row in trained:
        if "equilibrium" in row:
            continue
        norms = np.array([h["norms"] for h in row["history"]], dtype=float) * delta
        sup = np.array([h["sup"] for h in row["history"]], dtype=float)
        ax.plot(np.median(norms, 1), np.median(sup, 1), color=_colour(row), lw=1)
        ax.plot(norms[-1], sup[-1], "o", color=_colour(row), ms=4, mew=0)
    for row in trained:
        if "equilibrium" in row:
            norms, sup = (np.array(row["history"][-1][key], dtype=float) for key in ("norms", "sup"))
            ax.plot(norms * delta, sup, "o", color=_colour(row), ms=4, mew=0)
            if row["model"].startswith("diagonal"):
                ax.text(
                    max(norms.min() * delta, 1.2e-3),
                    0.85 * sup.min(),
                    "diagonal DEQ, trained",
                    color=_colour(row),
                    va="top",
                )
    ax.plot([r["A_norms"] * delta for r in built], [r["A_error"] for r in built], "*-", color=_plot.BLUE, lw=0.8, ms=7)
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set_xlim(1e-3, 1.5)
    ax.set_ylim(1e-4, 3)
    ax.text(1.3, 2.6, "feed-forward nets in training", color=DEPTH_COLOURS[3], ha="right", va="top")
    ax.text(0.0012, 0.006, "DEQ A,\nbuilt", color=_plot.BLUE, va="top")
    ax.text(0.014, 0.05, "no feed-forward\nnet can be here", color=_plot.GREY, va="top", ha="left")
    ax.set_xlabel(f"product of weight norms / slope $2^{{{d}}}$")
    ax.set_ylabel("sup error")
    ax.set_title(f"Feed-forward floor, d = {d}")
