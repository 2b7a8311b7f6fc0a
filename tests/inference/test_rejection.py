"""Rejection of cells, calibration, and what annotate writes beside the label."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from anndata import read_h5ad
from scipy.special import log_softmax

from stformer_hf import GeneBertConfig, GeneBertForClassification, GeneTokenizer, annotate
from stformer_hf.cli import main
from stformer_hf.evaluation.metrics import expected_calibration_error
from stformer_hf.inference.annotate import majority
from stformer_hf.inference.rejection import rejection_thresholds, typicality
from stformer_hf.training.calibration import OutOfFold, replace_out_of_fold
from stformer_hf.training.model_card import write_model_card
from stformer_hf.training.starts.linear_readers import Problem, fit_temperature


@pytest.fixture
def classifier(store, adata):
    """A classifier of three classes, with out-of-fold predictions that are made up."""
    torch.manual_seed(0)
    genes = GeneTokenizer.from_store(store, bin_edges=[0.5, 1.5], max_length=50)
    names = {0: "a", 1: "b", 2: "c"}
    model = GeneBertForClassification(GeneBertConfig.from_tokenizer(genes, size="tiny", id2label=names))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
        model.classifier.bias.zero_()
    model.tokenizer = genes
    return model.eval()


@pytest.mark.parametrize("reject", [0.02, 0.05, 0.3])
def test_the_share_of_rejected_cells_is_the_nominal_one(reject):
    """Cells exchangeable with the calibration cells; each group has scores of its own."""
    rng = np.random.default_rng(0)
    n_new, rejected = 200, np.zeros(3, int)
    for _ in range(200):
        groups = np.repeat([0, 1, 2], [150, 60, 400])
        known = rng.normal(groups * 3.0, 1 + groups)
        thresholds = rejection_thresholds(known, groups, 3, reject)
        for group in range(3):
            rejected[group] += (rng.normal(group * 3.0, 1 + group, n_new) < thresholds[group]).sum()
    n = 200 * n_new
    for group, size in enumerate((150, 60, 400)):
        share = np.floor(reject * (size + 1)) / (size + 1)  # exact for continuous scores, and at most `reject`
        # A threshold is drawn 200 times: the share below it is Beta(k, size + 1 - k) distributed.
        spread = 4 * np.sqrt(share * (1 - share) * (1 / (size + 2) / 200 + 1 / n))
        assert share - spread < rejected[group] / n < share + spread, (group, rejected[group] / n, share)


def test_a_group_of_few_cells_has_the_threshold_of_all(caplog):
    scores, groups = np.arange(60.0), np.repeat([0, 1, 2], [19, 18, 23])
    first, second, third = rejection_thresholds(scores, groups, 3, 0.05)
    assert (first, second, third) == (0.0, 2.0, 37.0)  # the lowest of 19; the third of 60; the lowest of 23
    assert not caplog.records
    assert (rejection_thresholds(scores[:18], groups[:18], 3, 0.05) == -np.inf).all()
    assert "reject=0.05 needs at least 19 known cells to compare with, and there are 18." in caplog.text


def test_a_cell_as_atypical_as_a_known_one_counts_that_one():
    known, cells = np.array([[1.0, 5.0], [2.0, 5.0], [3.0, 9.0]]), np.array([[2.0, 5.0], [0.0, 10.0]])
    np.testing.assert_allclose(typicality(known, cells), [np.log(3 / 4) + np.log(3 / 4), np.log(1 / 4)])


def p_values(known, cells):
    return np.array([(1 + (known <= cell).sum()) / (1 + len(known)) for cell in cells])


@pytest.mark.parametrize("with_distances", [False, True])
def test_rejected_cells_are_those_below_the_threshold_of_their_label(classifier, adata, tmp_path, with_distances):
    rng = np.random.default_rng(0)
    known = log_softmax(rng.normal(size=(300, 3)) * 2, axis=1).astype(np.float32)
    classifier.out_of_fold = OutOfFold(known, rng.integers(0, 3, 300), np.arange(300))
    plain = adata.copy()
    annotate(plain, classifier)
    scores, labels = plain.obs["stformer_score"].to_numpy(), plain.obs["stformer_label"]
    best = np.exp(known.max(axis=1))
    typical, of_known = np.log(p_values(best, scores)), np.log(p_values(best, best))
    if with_distances:
        with torch.no_grad():
            tokens = [classifier.tokenizer(adata[i], return_tensors="pt") for i in range(60)]
            hidden = [classifier.base_model(**of).last_hidden_state[0] for of in tokens]
        states = np.stack([of[0].numpy() for of in hidden])
        centroids = states[[0, 1, 2]] + rng.normal(size=(3, states.shape[1])).astype(np.float32)
        distances = np.array([min(np.linalg.norm(state - mean) for mean in centroids) for state in states])
        seen = rng.normal(distances.mean(), distances.std(), 300).astype(np.float32)
        typical, of_known = typical + np.log(p_values(-seen, -distances)), of_known + np.log(p_values(-seen, -seen))
        classifier.out_of_fold = OutOfFold(known, np.zeros(300, int), np.arange(300), seen, centroids)
    annotate(adata, classifier, reject=0.3, top_k=9)
    expected = labels.astype(object)
    for code, name in enumerate("abc"):
        own = np.sort(of_known[known.argmax(axis=1) == code])
        threshold = own[int(0.3 * (len(own) + 1)) - 1]
        expected[(labels == name).to_numpy() & (typical < threshold - 1e-9)] = "unknown"
    assert adata.obs["stformer_label"].astype(object).equals(expected)
    assert 0 < (expected == "unknown").sum() < 59 and adata.obs["stformer_label"].isna().sum() == 1
    read = ~labels.isna().to_numpy()
    np.testing.assert_allclose(adata.obs["stformer_typicality"][read], typical[read], rtol=1e-5)
    np.testing.assert_array_equal(adata.obs["stformer_score"], scores)
    np.testing.assert_array_equal(adata.obsm["stformer_probabilities"], plain.obsm["stformer_probabilities"])
    assert adata.uns["stformer_annotation"]["reject"] == 0.3

    order = np.argsort(-plain.obsm["stformer_probabilities"][~labels.isna()], axis=1)
    for rank, column in enumerate(("stformer_label_2", "stformer_label_3"), 1):
        assert adata.obs[column].dropna().tolist() == [list("abc")[row[rank]] for row in order]
    assert "stformer_label_4" not in adata.obs
    np.testing.assert_allclose(
        adata.obs["stformer_score"] - adata.obs["stformer_score_2"], adata.obs["stformer_margin"], atol=1e-6
    )
    adata.write_h5ad(tmp_path / "a.h5ad")
    back = read_h5ad(tmp_path / "a.h5ad")
    assert list(back.uns["stformer_annotation"]["classes"]) == ["a", "b", "c"]


def test_the_label_of_a_cluster_is_its_most_frequent_one():
    labels = pd.Categorical(["a", "b", "b", "a", "unknown", None, "a"], ["a", "b", "unknown"])
    clusters = pd.Series(["0", "0", "0", "1", "1", "2", None], dtype="category")
    assert list(majority(labels, clusters).astype(object))[:5] == ["b", "b", "b", "a", "a"]  # a tie: the first
    assert majority(labels, clusters).isna().tolist()[5:] == [True, True]
    assert majority(labels, pd.Series([None] * 7)).isna().all()


def test_options_are_checked_before_the_cells_are_read(classifier, adata, tmp_path, caplog):
    before = list(adata.obs)
    for options, message in (
        ({"over": "leiden"}, r"no obs\['leiden'\]; obs has 'cell_type', 'age'.* scanpy.tl.leiden"),
        ({"top_k": 0}, "top_k=0: must be at least 1"),
        ({"reject": 5}, "reject=5: must be a share"),
        ({"reject": "0.1"}, "reject='0.1': must be a share"),
        ({"reject": 0.05}, "no out-of-fold predictions"),
    ):
        with pytest.raises(ValueError, match=message):
            annotate(adata, classifier, **options)
    classifier.config.id2label[2] = "Nan"
    annotate(adata.copy(), classifier)
    assert "The model has the class 'Nan', like any other class" in caplog.text
    classifier.config.id2label[2] = "unknown"
    with pytest.raises(ValueError, match="One of the classes is 'unknown'"):
        annotate(adata, classifier, reject=0.05)
    classifier.config.problem_type = "regression"
    with pytest.raises(ValueError, match="are for classes, and the model is for regression"):
        annotate(adata, classifier, over="cell_type")
    assert list(adata.obs) == before and not adata.obsm


def test_the_command_has_the_same_options(classifier, adata, tmp_path):
    rng = np.random.default_rng(0)
    classifier.save_pretrained(tmp_path / "m")
    classifier.tokenizer.save_pretrained(tmp_path / "m")
    known = log_softmax(rng.normal(size=(300, 3)) * 2, axis=1).astype(np.float32)
    classifier.out_of_fold = OutOfFold(known, rng.integers(0, 3, 300), np.arange(300))
    replace_out_of_fold(tmp_path / "m", classifier.out_of_fold)
    adata.write_h5ad(tmp_path / "in.h5ad")
    flags = ["--reject", "0.3", "--over", "cell_type", "--top_k", "2"]
    where = ["--data", str(tmp_path / "in.h5ad"), "--model", str(tmp_path / "m"), "--output", str(tmp_path / "o.h5ad")]
    assert main(["annotate", *where, *flags]) == 0
    annotate(adata, classifier, reject=0.3, over="cell_type", top_k=2)
    found = read_h5ad(tmp_path / "o.h5ad")
    assert found.obs["stformer_label"].astype(object).equals(adata.obs["stformer_label"].astype(object))
    majorities = pd.crosstab(found.obs["cell_type"], found.obs["stformer_label"]).idxmax(axis=1)
    assert (found.obs["stformer_majority"].astype(str) == found.obs["cell_type"].map(majorities).astype(str)).all()
    annotate(found, classifier)  # no column of the former call stays
    assert list(found.obs) == ["cell_type", "age", "stformer_label", "stformer_score", "stformer_margin"]


def test_the_calibration_error_is_that_of_its_definition():
    rng = np.random.default_rng(0)
    probabilities = rng.dirichlet(np.ones(4) * 0.4, 500)
    labels = rng.integers(0, 4, 500)
    expected = 0.0
    for low in np.arange(15) / 15:
        inside = (probabilities.max(1) >= low) & (probabilities.max(1) < low + 1 / 15)
        if inside.any():
            accuracy = (probabilities.argmax(1) == labels)[inside].mean()
            expected += inside.mean() * abs(accuracy - probabilities.max(1)[inside].mean())
    assert expected_calibration_error(probabilities, labels) == pytest.approx(expected)


def test_the_temperature_undoes_that_of_the_outputs():
    """Labels drawn from probabilities whose logits were multiplied: the temperature is that factor."""
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(20_000, 3)) * 2
    labels = (np.exp(log_softmax(logits, axis=1)).cumsum(axis=1) > rng.random((20_000, 1))).argmax(axis=1)
    problem = Problem("single_label_classification", 3)
    assert fit_temperature(problem, logits * 1.7, labels) == pytest.approx(1.7, rel=0.05)
    facts = OutOfFold(log_softmax(logits, axis=1).astype(np.float32), labels, np.arange(20_000)).facts(1.7)
    assert facts["calibration_error"] < 0.015 < 0.05 < facts["calibration_error_without_temperature"]


def test_the_card_says_what_the_calibration_holds_for(classifier, tmp_path):
    results = sorted((Path(__file__).parents[2] / "benchmarks" / "results").glob("annotate_*.json"))[-1]
    found = json.loads(results.read_text())
    rows = [of for of in found["rejection"] if (of["set"], of["method"]) == ("geact_plates", "annotate")]
    shares = [row["known_rejected"] for row in rows]
    most = max(of["rejected"] for row in rows for of in row["per_class"].values() if of["n"] >= 20)
    across = max(of["known_rejected"] or 0 for of in found["mapping"] if of["set"] == "demo onto citeseq")
    of_benchmark = (
        f"rejected {min(shares):.0%} to {max(shares):.0%} of the known cells of other plates, and up to {most:.0%} of "
        f"a class; `map_to_reference` rejected {across:.0%} of the known cells of another experiment."
    ).replace("%", " %")
    for settings, told in (({"calibration_error": 0.02}, True), ({}, False)):
        write_model_card(tmp_path, model=classifier, tokenizer=classifier.tokenizer, settings=settings)
        text = (tmp_path / "README.md").read_text()
        assert ("another donor, plate or protocol are not" in text) == told
        assert ("| calibration_error | 0.02 |" in text) == told
        assert (of_benchmark in text) == told
