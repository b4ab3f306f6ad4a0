"""The figure of ``deq run regions``."""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from . import _plot
from ._sawtooth import grid, iterate, relu

SHOWN = 5  # width of the DEQ whose map is drawn
DEPTHS = {1: "#F5A66B", 2: "#E98141", 4: _plot.VERMILION, 8: "#8C3A00"}


@_plot.styled
def draw(counted: list[dict], bounds: list[dict]) -> Figure:
    """Regions against width, and the map of one DEQ with the neurons that are active in each region."""
    fig, (growth, shape) = _plot.figure(2, (10, 4), width_ratios=(1, 1.25))
    _draw_growth(growth, counted, bounds)
    _draw_map(shape)
    return fig


def _draw_growth(ax: Axes, counted: list[dict], bounds: list[dict]) -> None:
    m = [r["m"] for r in counted]
    for depth, colour in DEPTHS.items():
        for kind, style in (("same_neurons", "-"), ("same_parameters", ":")):
            line = [(b["m"], b[kind][depth]) for b in bounds if depth in b[kind]]
            if not line:
                continue
            ax.plot(*zip(*line, strict=True), style, color=colour, lw=1.3)
            if kind == "same_neurons":
                ax.annotate(f"depth {depth}", line[-1], (5, 0), textcoords="offset points", color=colour, va="center")
    ax.plot(m, [2**v for v in m], color=_plot.BLUE, lw=1)
    ax.plot(m, [r["regions"] for r in counted], "o", color=_plot.BLUE, ms=4.5, mew=0)
    ax.annotate("DEQ: 2$^m$", (m[-1], 2 ** m[-1]), (5, 0), textcoords="offset points", color=_plot.BLUE, va="center")
    ax.set_yscale("log", base=2)
    ax.set_xlim(0.5, m[-1] * 1.2)
    ax.xaxis.get_major_locator().set_params(integer=True)
    ax.set_xlabel("neurons m of the DEQ")
    ax.set_ylabel("linear regions")
    ax.set_title("DEQ counted; feed-forward bound")
    legend = "feed-forward with as many\nneurons (solid)\nparameters (dotted)"
    ax.text(0.03, 0.97, legend, color=_plot.VERMILION, transform=ax.transAxes, va="top", linespacing=1.25)


def _draw_map(ax: Axes) -> None:
    k = grid(SHOWN, np.arange(2 ** (SHOWN + 1) + 1))
    states = iterate(SHOWN, k)
    x = k / 2 ** (SHOWN + 1)
    height = sum(relu(states)) / 2 ** (SHOWN + 1)
    scale = SHOWN / height.max()
    ax.plot(x, scale * height, color=_plot.BLUE, lw=1.3)
    ax.plot(x[::2], scale * height[::2], "o", color=_plot.BLUE, ms=2.5, mew=0)
    for t in range(SHOWN):
        active = states[t][1::2] > 0
        bottom = -1.9 - 0.9 * t
        for j in np.nonzero(active)[0]:
            ax.fill_between(
                [j / 2**SHOWN, (j + 1) / 2**SHOWN], bottom, bottom + 0.75, color=_plot.BLUE, lw=0, alpha=0.8
            )
    for j in range(2**SHOWN + 1):
        ax.axvline(j / 2**SHOWN, color="#DDDDDD", lw=0.5, zorder=0)
    rows = [-1.9 - 0.9 * t + 0.375 for t in range(SHOWN)]
    ax.set_yticks([SHOWN / 2, *rows], ["sum of z", "neuron 1", *(f"{t}" for t in range(2, SHOWN + 1))])
    ax.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "1/4", "1/2", "3/4", "1"])
    ax.tick_params(axis="y", length=0)
    ax.spines["left"].set_visible(False)
    ax.set_xlim(0, 1)
    ax.set_xlabel("input x")
    ax.set_title(f"DEQ with m = {SHOWN}: {2**SHOWN} regions, one pattern each")
