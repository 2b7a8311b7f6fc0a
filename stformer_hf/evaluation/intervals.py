"""Confidence intervals of means over folds, and of differences between rows on the same folds."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy import stats


class Interval(NamedTuple):
    """An estimate with its 95 % confidence interval; `p` is for the hypothesis that it is 0."""

    estimate: float
    se: float
    low: float
    high: float
    p: float


def of_folds(values: np.ndarray, test_to_train: float) -> Interval:
    """Compute the interval of a mean over folds by the corrected resampled t-test.

    Training sets of different folds share cells, so their scores are correlated and a plain t-test is overconfident.
    Its variance s^2 / J is replaced by s^2 (1 / J + n_test / n_train) (Nadeau & Bengio 2003, Machine Learning 52:239;
    for repeated cross-validation: Bouckaert & Frank 2004), with J - 1 degrees of freedom. Unlike a bootstrap of the
    test cells, it also accounts for the choice of the training cells.

    `values` (J,) are a score, or a difference of two, for each fold of all repeats; `test_to_train` is n_test /
    n_train.
    """
    values = np.asarray(values, np.float64)
    se = float(np.std(values, ddof=1) * np.sqrt(1 / len(values) + test_to_train))
    return _student(float(values.mean()), se, len(values) - 1)


def of_all_cells(value: float, without_a_fold: np.ndarray, n_splits: int) -> Interval:
    """Compute the interval of a metric over all cells by a jackknife that leaves out one fold at a time.

    The variance is (n_splits - 1) / n_splits times the sum over folds of the squared distance between the value
    without a fold and their mean (Efron & Tibshirani 1993, chapter 11), averaged over the repeats, with n_splits - 1
    degrees of freedom. It is approximate for the best of a grid, which is a maximum.

    `value` is that over all cells, or the difference of two such values; `without_a_fold` (n_repeats * n_splits,) are
    the same without the cells of each fold, in the order of the folds. If these are empty, the interval is NaN.
    """
    if not len(without_a_fold):
        return Interval(float(value), *[float("nan")] * 4)
    parts = np.asarray(without_a_fold, np.float64).reshape(-1, n_splits)
    spread = ((parts - parts.mean(axis=1, keepdims=True)) ** 2).sum(axis=1).mean()
    return _student(float(value), float(np.sqrt(spread * (n_splits - 1) / n_splits)), n_splits - 1)


def _student(estimate: float, se: float, df: int) -> Interval:
    half = float(stats.t.ppf(0.975, df)) * se
    p = float(2 * stats.t.sf(abs(estimate) / se, df)) if se > 0 else float(estimate == 0)
    return Interval(estimate, se, estimate - half, estimate + half, p)
