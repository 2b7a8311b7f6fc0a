"""Scores of `benchmarks quality`, and the intervals of their paired differences."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import stats
from sklearn.metrics import f1_score


def scores(true: np.ndarray, predicted: np.ndarray) -> dict[str, float]:
    """Compute accuracy, and macro F1 over the classes of the true labels: the same classes for every classifier."""
    f1 = f1_score(true, predicted, labels=np.unique(true), average="macro", zero_division=0)
    return {"accuracy": float(np.mean(true == predicted)), "macro_f1": float(f1)}


def interval(differences: Sequence[float] | np.ndarray, test_to_train: float = 0.0) -> tuple[float, float, float]:
    """Compute the mean of paired differences and its 95 % interval by Student's t.

    Parameters
    ----------
    differences : sequence of float (n,)
        One per split, at least two.
    test_to_train : float, default: 0
        Number of test cells / number of training cells. Folds share most of their training cells, so their
        differences are not independent: the variance of the mean is taken as (1/n + test_to_train) times the variance
        of the differences (Nadeau and Bengio 2003, the corrected resampled t-test). 0 is the plain paired t.

    Returns
    -------
    mean, low, high : float
    """
    n = len(differences)
    if n < 2:
        raise ValueError(f"An interval needs at least two splits, not {n}.")
    mean = float(np.mean(differences))
    half = stats.t.ppf(0.975, n - 1) * np.sqrt((1 / n + test_to_train) * np.var(differences, ddof=1))
    return mean, float(mean - half), float(mean + half)
