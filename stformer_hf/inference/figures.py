"""What all plots share: new axes, and writing a figure."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes


MISSING = "lightgray"  # colour of missing values


def new_axes(width: float, height: float) -> Axes:
    """Return the axes of a new figure, whose size is in inches."""
    import matplotlib.pyplot as plt

    return plt.subplots(figsize=(width, height), layout="constrained")[1]


def save_figure(ax: Axes, save: str | Path | None) -> Axes:
    """Write and close the figure if `save` is given; otherwise it stays open for a notebook to show."""
    if save is not None:
        import matplotlib.pyplot as plt
        from matplotlib.figure import Figure

        figure = ax.figure
        assert isinstance(figure, Figure)  # made by these plots, and no part of another
        figure.savefig(save, dpi=120)
        plt.close(figure)
    return ax
