"""Simple baselines that every evaluation prints beside the model."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import sparse
from sklearn.dummy import DummyClassifier
from sklearn.linear_model import LogisticRegression


def predict_majority(train_labels: Sequence, n_test: int) -> np.ndarray:
    """Predict the most frequent training class for every cell.

    Parameters
    ----------
    train_labels : sequence (n_train,)
        Classes of the training cells.
    n_test : int
        Number of cells to label.

    Returns
    -------
    array (n_test,)
    """
    empty = np.zeros((len(train_labels), 1))
    return DummyClassifier(strategy="most_frequent").fit(empty, train_labels).predict(np.zeros((n_test, 1)))


def predict_logistic_regression(
    train_counts: sparse.sparray | np.ndarray, train_labels: Sequence, test_counts: sparse.sparray | np.ndarray
) -> np.ndarray:
    """Predict by logistic regression on log-normalised counts, ln(1 + 10,000 count / total), C = 1.

    Parameters
    ----------
    train_counts, test_counts : sparse or dense (n_train, n_genes), (n_test, n_genes)
        Raw counts, of the same genes.
    train_labels : sequence (n_train,)
        Classes of the training cells.

    Returns
    -------
    array (n_test,)
    """
    classifier = LogisticRegression(max_iter=2000)
    return classifier.fit(log_normalise(train_counts), train_labels).predict(log_normalise(test_counts))


def log_normalise(counts: sparse.sparray | np.ndarray) -> sparse.csr_array:
    """Compute ln(1 + 10,000 count / total of the cell), float64 (n, n_genes); a cell without counts stays 0."""
    counts = sparse.csr_array(counts).astype(np.float64)
    totals = counts.sum(axis=1)
    scaled = sparse.diags_array(1e4 / np.where(totals > 0, totals, 1)) @ counts
    return sparse.csr_array(scaled).log1p()


__all__ = ["log_normalise", "predict_logistic_regression", "predict_majority"]
