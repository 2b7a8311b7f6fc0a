"""Intervals against their formulas, and how often they cover the truth."""

import numpy as np
import pytest
from scipy import stats

from stformer_hf.evaluation.intervals import of_all_cells, of_folds


def test_the_corrected_interval_is_the_t_test_with_a_larger_variance():
    values = np.array([0.1, 0.3, 0.2, 0.25, 0.05])
    plain = of_folds(values, 0.0)
    expected = stats.ttest_1samp(values, 0)
    assert plain.p == pytest.approx(expected.pvalue)
    assert (plain.low, plain.high) == pytest.approx(tuple(expected.confidence_interval(0.95)))
    corrected = of_folds(values, 0.25)
    assert corrected.estimate == plain.estimate == pytest.approx(0.18)
    assert corrected.se == pytest.approx(np.sqrt((1 / 5 + 0.25) * values.var(ddof=1)))
    assert corrected.p > plain.p


def test_equal_rows_differ_by_nothing():
    assert of_folds(np.zeros(5), 0.25) == (0, 0, 0, 0, 1)
    assert of_folds(np.full(5, 0.1), 0.25).p == 0
    assert of_all_cells(0.0, np.zeros(5), 5).p == 1


def test_the_jackknife_of_a_mean_is_the_standard_error_of_the_mean_of_folds():
    folds = np.random.default_rng(0).normal(size=(5, 40))
    without = [np.delete(folds, fold, axis=0).mean() for fold in range(5)]
    found = of_all_cells(folds.mean(), without, 5)
    assert found.se == pytest.approx(folds.mean(axis=1).std(ddof=1) / np.sqrt(5))
    assert found.high - found.low == pytest.approx(2 * stats.t.ppf(0.975, 4) * found.se)
    # Repeats make it steadier, not narrower.
    assert of_all_cells(folds.mean(), without * 3, 5).se == pytest.approx(found.se)
    assert np.isnan(of_all_cells(1.0, np.array([]), 5)[1:]).all()
