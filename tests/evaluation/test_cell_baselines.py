"""Baselines and metrics against their definitions."""

import numpy as np
import pytest
from conftest import make_adata
from scipy import sparse
from sklearn.metrics import accuracy_score, f1_score
from transformers import EvalPrediction

from stformer_hf import CellStore
from stformer_hf.evaluation.cell_baselines import (
    classification_baselines,
    log_normalise,
    predict_logistic_regression,
    predict_majority,
)
from stformer_hf.evaluation.metrics import classification_metrics, compute_classification_metrics

pytestmark = pytest.mark.usefixtures("two_folds")


def test_log_normalise_is_its_formula():
    counts = np.array([[1, 3, 0], [0, 0, 0], [0, 10, 10]])
    expected = np.log(1 + counts / np.array([[4], [1], [20]]) * 1e4)
    np.testing.assert_allclose(log_normalise(sparse.csr_matrix(counts)).toarray(), expected)
    np.testing.assert_allclose(
        log_normalise(counts, np.array([8, 1, 40])).toarray(), np.log(1 + np.expm1(expected) / 2)
    )


def test_log_normalise_of_repeated_and_stored_zeros():
    """The entries of a sparse matrix at one place are parts of one count."""
    counts = sparse.csr_array(([1.0, 2.0, 0.0, 0.0], [0, 0, 1, 2], [0, 3, 4]), shape=(2, 3))
    np.testing.assert_allclose(log_normalise(counts).toarray(), [[np.log(1 + 1e4), 0, 0], [0, 0, 0]])
    assert counts.nnz == 4


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


def test_baselines_of_a_store_are_those_of_its_matrix(tmp_path, caplog, monkeypatch):
    adata = make_adata(200, 30, seed=2)
    adata.obs["cell_type"] = adata.obs["cell_type"].cat.add_categories(["none of them"])
    adata.obs.iloc[150, 0] = None  # without a label: in neither figure
    store = CellStore.build(tmp_path / "store", adata, obs=["cell_type", "age"])
    train, held_out = store.select(range(120)), store.select(range(120, 200))
    monkeypatch.setattr("stformer_hf.evaluation.cell_baselines._ROWS_PER_BLOCK", 32)
    found = classification_baselines(train, held_out, "cell_type")
    rest = [i for i in range(120, 200) if i != 150]
    labels = adata.obs["cell_type"].astype(str).to_numpy()
    for name, predicted in (
        ("majority", predict_majority(labels[:120], len(rest))),
        ("logistic_regression", predict_logistic_regression(adata.X[:120], labels[:120], adata.X[rest])),
    ):
        assert found[f"{name}_accuracy"] == accuracy_score(labels[rest], predicted)
        assert found[f"{name}_macro_f1"] == pytest.approx(f1_score(labels[rest], predicted, average="macro"))
    assert found["logistic_regression_accuracy"] > found["majority_accuracy"] + 0.1
    fewer = classification_baselines(train, held_out, "cell_type", max_train_cells=12)
    assert "12 of 120 training cells" in caplog.text
    assert fewer["majority_accuracy"] == found["majority_accuracy"]
    assert fewer["logistic_regression_accuracy"] != found["logistic_regression_accuracy"]
    one = train.select(np.flatnonzero(train.obs["cell_type"] == "T cell"))
    alike = classification_baselines(one, held_out, "cell_type")
    assert alike["logistic_regression_accuracy"] == alike["majority_accuracy"]
    with pytest.raises(ValueError, match="No categorical column 'age'"):
        classification_baselines(train, held_out, "age")
    with pytest.raises(ValueError, match="1 training and 0 held-out cells"):
        classification_baselines(store.select([0]), store.select([150]), "cell_type")


def test_macro_f1_of_all_classifiers_is_over_the_classes_of_the_held_out_cells(tmp_path):
    """Whatever other classes a classifier predicts: else those of two classifiers are means over other classes."""
    adata = make_adata(200, 30, seed=2)
    store = CellStore.build(tmp_path / "store", adata, obs=["cell_type"])
    labels = adata.obs["cell_type"].astype(str).to_numpy()
    rest = 120 + np.flatnonzero(labels[120:] != "T cell")
    found = classification_baselines(store.select(range(120)), store.select(rest), "cell_type")
    classes = np.unique(labels[rest])
    predicted = predict_logistic_regression(adata.X[:120], labels[:120], adata.X[rest])
    assert set(predicted) - set(classes)  # else this shows nothing
    expected = f1_score(labels[rest], predicted, labels=classes, average="macro")
    assert found["logistic_regression_macro_f1"] == pytest.approx(expected)
    names = np.unique(labels)
    logits = (predicted[:, None] == names).astype(float)  # a model that predicts the same
    of_model = compute_classification_metrics(EvalPrediction(logits, np.searchsorted(names, labels[rest])))
    assert of_model["macro_f1"] == pytest.approx(expected)


def test_fine_tuning_reports_baselines_and_draws_a_confusion_matrix(tmp_path):
    pytest.importorskip("matplotlib")
    from stformer_hf.cli import finetune
    from stformer_hf.training.defaults import FINETUNING

    CellStore.build(tmp_path / "store", make_adata(), obs=["cell_type"])
    args = finetune.FinetuneArguments([str(tmp_path / "store")], ["cell_type"], str(tmp_path / "model"), held_out=0.3)
    found = finetune.run(args, {**FINETUNING, "max_steps": 2, "use_cpu": True, "disable_tqdm": True})
    names = [f"{who}_{what}" for who in ("majority", "logistic_regression") for what in ("accuracy", "macro_f1")]
    assert {f"eval_{name}" for name in [*names, "accuracy", "macro_f1"]} <= found.keys()
    assert (tmp_path / "model" / "confusion.png").stat().st_size > 1000
    assert "logistic regression" in (tmp_path / "model" / "README.md").read_text()
