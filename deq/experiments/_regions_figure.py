"""The figure of ``deq run regions``."""

from matplotlib.figure import Figure

from . import _plot


@_plot.styled
def draw(counted, bounds) -> Figure:
    fig, axes = _plot.figure(2)
    return fig
