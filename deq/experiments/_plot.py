"""One style for every figure."""

import math
import statistics
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter, NullFormatter
from PIL import Image

# Okabe and Ito's palette: told apart with every common colour vision.
BLACK, ORANGE, SKY, GREEN, YELLOW = "#000000", "#E69F00", "#56B4E9", "#009E73", "#F0E442"
BLUE, VERMILION, PURPLE, GREY = "#0072B2", "#D55E00", "#CC79A7", "#7A7A7A"

_STYLE = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#444444",
    "axes.linewidth": 0.8,
    "axes.labelcolor": "#222222",
    "xtick.color": "#444444",
    "ytick.color": "#444444",
    "xtick.major.width": 0.8,
    "ytick.major.width": 0.8,
    "lines.linewidth": 1.5,
    "figure.facecolor": "white",
}


styled = matplotlib.rc_context(_STYLE)  # decorator: artists read the style when they are made


def figure(columns: int, size: tuple[float, float] = (10, 4), **grid) -> tuple[Figure, list[Axes]]:
    """A figure with ``columns`` panels side by side. No pyplot: no global state, no display."""
    fig = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(fig)
    fig.get_layout_engine().set(wspace=0.04)
    return fig, list(fig.subplots(1, columns, **grid))


def save(fig: Figure, path: Path) -> None:
    """Write a PNG that is the same for the same figure, in few colours: a report of all experiments stays small."""
    buffer = BytesIO()
    fig.savefig(buffer, dpi=120, metadata={"Software": None})
    image = (
        Image.open(buffer).convert("RGB").quantize(200, Image.Quantize.MEDIANCUT, kmeans=4, dither=Image.Dither.NONE)
    )
    image.save(path, optimize=True)


def kind_colour(row: dict) -> str:
    """Of a trained model: equilibrium, weight-tied net of finite depth, feed-forward."""
    if row["evidence"] is None:
        return VERMILION
    return BLUE if row["kind"] == "equilibrium" else PURPLE


def strip(ax: Axes, rows: Sequence[tuple[str, Sequence[float | None], str]]) -> None:
    """A line a model: every seed's value, and the median, on a logarithmic axis. rows: (label, values, colour)."""
    for y, (_, values, colour) in enumerate(rows):
        shown = sorted(v for v in values if v is not None and math.isfinite(v))
        if shown:
            ax.plot(shown, [y] * len(shown), "o", color=colour, ms=4, mew=0, alpha=0.6)
            ax.plot([statistics.median(shown)] * 2, [y - 0.36, y + 0.36], color=colour, lw=2.2)
    ax.set_xscale("log")
    sparse_ticks(ax.xaxis)
    ax.set_yticks(range(len(rows)), [label for label, *_ in rows], fontsize=8)
    for tick, (*_, colour) in zip(ax.get_yticklabels(), rows, strict=True):
        tick.set_color(colour)
    ax.set_ylim(len(rows) - 0.5, -0.5)
    ax.tick_params(axis="y", length=0)
    ax.spines["left"].set_visible(False)
    ax.grid(axis="x", color="#E5E5E5", lw=0.8)
    ax.set_axisbelow(True)


def sparse_ticks(axis: Axis) -> None:
    """Numbers at powers of ten alone on a logarithmic axis, of which it then shows at least one or two."""
    axis.set_minor_formatter(NullFormatter())
    low, high = axis.get_view_interval()
    if low > 0 and math.floor(math.log10(high)) < math.ceil(math.log10(low)) + 1:
        limits = (0.9 * 10 ** math.floor(math.log10(low)), high)
        (axis.axes.set_xlim if axis.axis_name == "x" else axis.axes.set_ylim)(limits)  # axes that share it follow


class _PlainFormatter(LogFormatter):
    """Labels the ticks that matplotlib chooses, by their numbers as they are."""

    def __call__(self, x: float, pos: int | None = None) -> str:
        return f"{x:g}" if super().__call__(x, pos) else ""


def plain_ticks(axis: Axis) -> None:
    """Numbers without powers of ten on a logarithmic axis of few decades: 2.5 instead of 2.5 x 10^0."""
    axis.set_major_formatter(_PlainFormatter())
    axis.set_minor_formatter(_PlainFormatter())


def label(ax: Axes, points: Sequence[tuple[float, float, str, str]]) -> None:
    """A label beside every point, of equilibria to the right and of others to the left, lower where it would lie on
    another. points: (x, y, text, colour). The layout of the figure has to be done."""
    taken: list[tuple[bool, float, float]] = []
    for x, y, text, colour in sorted(points, key=lambda point: -point[1]):
        left = colour != BLUE
        across, height = ax.transData.transform((x, y)) * 72 / ax.figure.dpi
        lift = 3.0
        while any(side == left and abs(across - a) < 36 and abs(height + lift - h) < 8 for side, a, h in taken):
            lift -= 1
        taken.append((left, across, height + lift))
        offset, align = ((-6, lift), "right") if left else ((6, lift), "left")
        ax.annotate(text, (x, y), offset, textcoords="offset points", ha=align, fontsize=7, color=colour)
