"""Scores of predicted classes and their intervals."""

import numpy as np
import pytest
from sklearn.metrics import f1_score, precision_recall_fscore_support

from stformer_hf.evaluation.classifier_scores import order_classes, score_classes, score_predictions, share_interval


@pytest.fixture
def predictions():
    rng = np.random.default_rng(0)
    true = rng.choice(["a", "b", "c"], 90, p=[0.7, 0.25, 0.05])
    predicted = np.where(rng.random(90) < 0.7, true, rng.choice(["a", "b", "c"], 90))
    return true, predicted


def test_scores_are_scikit_learns_and_lie_within_their_intervals(predictions):
    true, predicted = predictions
    classes = ["c", "a", "b"]
    found = score_predictions(true, predicted, classes)
    assert found["accuracy"] == pytest.approx(np.mean(true == predicted))
    assert found["macro_f1"] == pytest.approx(f1_score(true, predicted, labels=classes, average="macro"))
    for name in ("accuracy", "macro_f1"):
        assert 0 <= found[f"{name}_low"] < found[name] < found[f"{name}_high"] <= 1
    assert score_predictions(true, predicted, classes) == found
    table = score_classes(true, predicted, classes)
    precision, recall, f1, n = precision_recall_fscore_support(true, predicted, labels=classes)
    assert table.index.tolist() == classes and table["n_cells"].tolist() == n.tolist()
    for name, values in (("precision", precision), ("recall", recall), ("f1", f1)):
        np.testing.assert_allclose(table[name], values)
    assert (table["f1_low"] <= table["f1"]).all() and (table["f1"] <= table["f1_high"]).all()


def test_all_rows_are_scored_over_the_same_classes():
    # "c" is a class that no held-out cell has and nobody predicts: it counts all the same.
    found = score_predictions(["a", "b"], ["a", "b"], ["a", "b", "c"])
    assert found["accuracy"] == 1 and found["macro_f1"] == pytest.approx(2 / 3)
    table = score_classes(["a", "b"], ["a", "a"], ["a", "b", "c"])
    assert table["n_cells"].tolist() == [1, 1, 0]
    assert np.isnan(table.loc["c", "recall"]) and np.isnan(table.loc["b", "precision"])
    with pytest.raises(ValueError, match="Not all labels are in classes, such as b"):
        score_predictions(["a"], ["b"], ["a"])
    with pytest.raises(ValueError, match="no cells"):
        score_predictions([], [], ["a"])
    with pytest.raises(ValueError, match="2 true classes, but 1 predicted"):
        score_predictions(["a", "a"], ["a"], ["a"])


def test_the_interval_of_a_share_is_wilsons():
    n, hits, z = 40, 33, 1.959963984540054
    centre = (hits + z**2 / 2) / (n + z**2)
    half = z / (n + z**2) * np.sqrt(hits * (n - hits) / n + z**2 / 4)
    assert share_interval(hits, n) == pytest.approx((centre - half, centre + half))
    assert share_interval(5, 5)[1] == 1 and share_interval(5, 5)[0] > 0.5
    assert np.isnan(share_interval(0, 0)).all()


def test_intervals_of_macro_f1_cover_the_figure_of_all_cells():
    # Samples of 100 cells of a population whose macro F1 is known: nineteen intervals of twenty should hold it.
    confusion = np.array([[0.45, 0.1, 0.05], [0.05, 0.2, 0.05], [0.0, 0.02, 0.08]])
    truth = np.mean(2 * np.diag(confusion) / (confusion.sum(axis=0) + confusion.sum(axis=1)))
    rng, covered = np.random.default_rng(1), 0
    for _ in range(200):
        rows, columns = np.divmod(rng.choice(9, 100, p=confusion.ravel()), 3)
        found = score_predictions(rows, columns, [0, 1, 2], n_draws=300)
        covered += found["macro_f1_low"] <= truth <= found["macro_f1_high"]
    assert 175 <= covered <= 199


def test_like_classes_are_neighbours():
    rng = np.random.default_rng(0)
    centres = {"x1": 0.0, "y1": 10.0, "x2": 1.0, "y2": 11.5, "x3": 2.5}
    labels = np.repeat(list(centres), 20)
    cells = np.array([centres[name] for name in labels])[:, None] + 0.01 * rng.normal(size=(100, 3))
    found = order_classes(cells, labels)
    assert found in (["x3", "x2", "x1", "y1", "y2"], ["x1", "x2", "x3", "y1", "y2"], ["y2", "y1", "x3", "x2", "x1"])
    assert order_classes(cells[:40], labels[:40]) == ["x1", "y1"]
