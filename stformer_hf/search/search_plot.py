"""Plot a search: scores in the order of the trials, and against each hyperparameter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from .search_space import SearchSpace

_PANELS_A_ROW = 3
_DONE, _PRUNED, _BEST = "#2b6cb0", "#9aa5b1", "#c05621"


def plot_trials(
    table: pd.DataFrame,
    space: SearchSpace,
    path: str | Path,
    *,
    metric: str = "eval_loss",
    direction: str = "minimize",
) -> None:
    """Plot the scores by trial with the best so far, and one panel per hyperparameter, into one file.

    Pruned trials are open circles at their last evaluation; trials without a score are left out. A logarithmic
    hyperparameter has a logarithmic axis. The axis of the scores shows up to ten times the range of the better half:
    trials beyond it are triangles at its edge. The table is that of `search`, and so are `metric` and `direction`.
    """
    from matplotlib.figure import Figure

    scored = table[table["score"].notna() & np.isfinite(table["score"].astype(float))]
    score, edge = _within(scored["score"].to_numpy(float), direction)
    complete = (scored["state"] == "COMPLETE").to_numpy()
    n_rows = -(-(len(list(space)) + _PANELS_A_ROW) // _PANELS_A_ROW)
    figure = Figure(figsize=(3.6 * _PANELS_A_ROW, 3.0 * n_rows), layout="constrained")
    grid = figure.add_gridspec(n_rows, _PANELS_A_ROW)

    axes = figure.add_subplot(grid[0, :])
    trial = scored["trial"].to_numpy()
    _scatter(axes, trial, score, complete, edge)
    ends = scored["score"].where(scored["state"] == "COMPLETE")
    best = ends.cummin() if direction == "minimize" else ends.cummax()
    axes.step(trial, best.ffill().to_numpy(float), where="post", color=_BEST, label="best so far")
    axes.set(xlabel="trial", ylabel=metric)
    axes.locator_params("x", integer=True)
    axes.legend(frameon=False, fontsize=8)

    for place, name in enumerate(space, _PANELS_A_ROW):
        axes = figure.add_subplot(grid[divmod(place, _PANELS_A_ROW)])
        values, distribution = scored[name], space.distributions[name]
        if not hasattr(distribution, "choices"):
            x = values.to_numpy(float)
            if distribution.log:
                axes.set_xscale("log")
            elif name in space.integers():
                axes.locator_params("x", integer=True)
        else:  # side by side, so that equal values do not hide each other
            choices = distribution.choices
            x = np.array([choices.index(value) for value in values], float)
            x += 0.12 * (values.groupby(values, sort=False).cumcount().to_numpy() % 3 - 1)
            axes.set_xticks(range(len(choices)), [str(choice) for choice in choices])
            axes.set_xlim(-0.5, len(choices) - 0.5)
        _scatter(axes, x, score, complete, edge)
        axes.set(xlabel=name, ylabel=metric)
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def _within(score: np.ndarray, direction: str) -> tuple[np.ndarray, np.ndarray]:
    """Move scores far from the better half to the edge; return the scores, and which were moved."""
    if len(score) < 4:
        return score, np.zeros(len(score), bool)
    sign = 1 if direction == "minimize" else -1
    best, median = np.min(sign * score), np.median(sign * score)
    limit = best + 10 * (median - best)
    edge = (sign * score > limit) & (median > best)
    return np.where(edge, sign * limit, score), edge


def _scatter(axes: Any, x: np.ndarray, score: np.ndarray, complete: np.ndarray, edge: np.ndarray) -> None:
    for which, marker, face, colour, label in (
        (complete & ~edge, "o", _DONE, _DONE, "complete"),
        (~complete & ~edge, "o", "none", _PRUNED, "pruned"),
        (edge, "^", "none", _PRUNED, "beyond the axis"),
    ):
        if which.any():
            axes.scatter(x[which], score[which], marker=marker, facecolor=face, edgecolor=colour, s=30, label=label)
