"""The figure of ``deq run steep``."""

from matplotlib.figure import Figure

from . import _plot


@_plot.styled
def draw(built, trained) -> Figure:
    fig, axes = _plot.figure(3)
    return fig
