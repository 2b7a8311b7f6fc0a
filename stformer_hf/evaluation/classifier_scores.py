"""Score a classifier on held-out cells, with intervals: over all classes, and for each class."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy import stats
from scipy.cluster.hierarchy import leaves_list, linkage, optimal_leaf_ordering

_LEVEL = 0.95


def score_predictions(
    true: Sequence | np.ndarray,
    predicted: Sequence | np.ndarray,
    classes: Sequence[str],
    *,
    n_draws: int = 1000,
    seed: int = 0,
) -> dict[str, float]:
    """Score the predicted classes (n,) of cells: `accuracy` and `macro_f1`, each with `…_low` and `…_high`, 95 %.

    The macro F1 averages over `classes`; use the same for all classifiers to compare. `n_draws` and `seed` are those
    of a bootstrap. Raise a ValueError if there are no cells, or a class is not among `classes`.

    Notes
    -----
    The interval of the accuracy is Wilson's (1927, JASA 22:209). That of the macro F1 is the 2.5th to 97.5th
    percentile of a bootstrap of the held-out cells within each true class, so that a rare class is in every draw. Both
    show how the score varies with other held-out cells, not with other training cells.
    """
    counts = _count(true, predicted, classes)
    low, high = share_interval(int(np.trace(counts)), int(counts.sum()))
    f1_low, f1_high = _percentiles(_f1(_resample(counts, n_draws, seed)).mean(axis=-1))
    return {
        "accuracy": float(np.trace(counts) / counts.sum()),
        "accuracy_low": low,
        "accuracy_high": high,
        "macro_f1": float(_f1(counts).mean()),
        "macro_f1_low": float(f1_low),
        "macro_f1_high": float(f1_high),
    }


def score_classes(
    true: Sequence | np.ndarray,
    predicted: Sequence | np.ndarray,
    classes: Sequence[str],
    *,
    n_draws: int = 1000,
    seed: int = 0,
) -> pd.DataFrame:
    """Score each class separately, with 95 % intervals; parameters and intervals are those of `score_predictions`.

    Returns
    -------
    DataFrame
        One row per class, in the order of `classes`: `n_cells`, `n_right`; `recall` with Wilson's interval, NaN
        without cells; `precision`, NaN if the class was never predicted; `f1` with the interval of the bootstrap.
    """
    counts = _count(true, predicted, classes)
    right, n_cells, n_predicted = np.diag(counts), counts.sum(axis=1), counts.sum(axis=0)
    recalls = [share_interval(int(hits), int(n)) for hits, n in zip(right, n_cells, strict=True)]
    f1_low, f1_high = _percentiles(_f1(_resample(counts, n_draws, seed)))
    with np.errstate(invalid="ignore"):
        recall, precision = right / n_cells, right / n_predicted
    return pd.DataFrame(
        {
            "n_cells": n_cells,
            "n_right": right,
            "recall": recall,
            "recall_low": [low for low, _ in recalls],
            "recall_high": [high for _, high in recalls],
            "precision": precision,
            "f1": _f1(counts),
            "f1_low": f1_low,
            "f1_high": f1_high,
        },
        index=pd.Index(classes, name="class"),
    )


def share_interval(hits: int, n: int) -> tuple[float, float]:
    """Compute Wilson's 95 % interval of a share, hits / n; NaN if n is 0."""
    if not n:
        return float("nan"), float("nan")
    found = stats.binomtest(hits, n).proportion_ci(_LEVEL, method="wilson")
    return float(found.low), float(found.high)


def order_classes(cells: np.ndarray, labels: Sequence[str]) -> list[str]:
    """Order classes so that similar ones are neighbours: the leaves of an average linkage of their mean cells.

    Means of an embedding (n, d), such as principal components, are compared by their Euclidean distance; leaves are
    ordered so that neighbours are as similar as the tree allows (Bar-Joseph et al. 2001).
    """
    names, codes = np.unique(np.asarray(labels, str), return_inverse=True)
    if len(names) < 3:
        return names.tolist()
    means = np.stack([cells[codes == code].mean(axis=0) for code in range(len(names))])
    return names[leaves_list(optimal_leaf_ordering(linkage(means, "average"), means))].tolist()


def _count(true: Sequence | np.ndarray, predicted: Sequence | np.ndarray, classes: Sequence[str]) -> np.ndarray:
    """Count the cells of each true (row) and predicted (column) class: int64 array (n_classes, n_classes)."""
    index = pd.Index(classes)
    rows, columns = index.get_indexer(pd.Index(np.asarray(true))), index.get_indexer(pd.Index(np.asarray(predicted)))
    if not len(rows):
        raise ValueError("There are no cells to score.")
    if len(rows) != len(columns):
        raise ValueError(f"{len(rows)} true classes, but {len(columns)} predicted ones.")
    unknown = [*map(str, np.asarray(true)[rows < 0]), *map(str, np.asarray(predicted)[columns < 0])]
    if unknown:
        raise ValueError(f"Not all labels are in classes, such as {min(unknown)}: add them.")
    n = len(index)
    return np.bincount(rows * n + columns, minlength=n * n).reshape(n, n)


def _resample(counts: np.ndarray, n_draws: int, seed: int) -> np.ndarray:
    """Resample the cells of each true class: int64 array (n_draws, n_classes, n_classes)."""
    rng, n_cells = np.random.default_rng(seed), counts.sum(axis=1)
    shares = counts / np.maximum(n_cells, 1)[:, None]
    shares[n_cells == 0, 0] = 1.0
    return np.stack(
        [rng.multinomial(n, share, size=n_draws) for n, share in zip(n_cells, shares, strict=True)], axis=1
    )


def _f1(counts: np.ndarray) -> np.ndarray:
    """Compute the F1 of each class, 2 right / (true + predicted); 0 for a class that is neither."""
    right = np.diagonal(counts, axis1=-2, axis2=-1)
    return 2 * right / np.maximum(counts.sum(axis=-1) + counts.sum(axis=-2), 1)


def _percentiles(draws: np.ndarray) -> np.ndarray:
    tail = 50 * (1 - _LEVEL)
    return np.percentile(draws, [tail, 100 - tail], axis=0)
