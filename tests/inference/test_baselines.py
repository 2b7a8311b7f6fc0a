"""Baselines and metrics against their definitions."""

import numpy as np
import pytest
from scipy import sparse

from stformer_hf.inference.baselines import log_normalise, predict_logistic_regression, predict_majority
from stformer_hf.training.metrics import classification_metrics


def test_log_normalise_is_its_formula():
    counts = np.array([[1, 3, 0], [0, 0, 0], [0, 10, 10]])
    expected = np.log(1 + counts / np.array([[4], [1], [20]]) * 1e4)
    np.testing.assert_allclose(log_normalise(sparse.csr_matrix(counts)).toarray(), expected)


def test_majority_and_logistic_regression(adata):
    labels = adata.obs["cell_type"].astype(str)
    assert set(predict_majority(["a", "b", "b"], 4)) == {"b"}
    predicted = predict_logistic_regression(adata.X[:40], labels[:40], adata.X[40:])
    assert (predicted == labels[40:]).mean() > 0.7


def test_macro_f1_is_the_mean_over_classes():
    true, predicted = ["a", "a", "a", "b", "c"], ["a", "a", "b", "b", "a"]
    f1 = [2 * 2 / (3 + 3), 2 * 1 / (2 + 1), 0]
    metrics = classification_metrics(true, predicted)
    assert metrics == pytest.approx({"accuracy": 0.6, "macro_f1": sum(f1) / 3})
    wider = classification_metrics(true, predicted, ["a", "b", "c", "d"])
    assert wider["macro_f1"] == pytest.approx(sum(f1) / 4)
