"""One style for every figure."""

from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

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
    """Write a PNG that is the same for the same figure."""
    fig.savefig(path, dpi=150, metadata={"Software": None})
