"""annotate(parents=…): a rejected cell gets the nearest ancestor that accepts it."""

import numpy as np
import pandas as pd
import pytest
import torch
from anndata import read_h5ad
from scipy.special import log_softmax

from stformer_hf import GeneBertConfig, GeneBertForClassification, GeneTokenizer, annotate
from stformer_hf.cli import main
from stformer_hf.inference.ancestors import ancestors_of, climb, read_parents
from stformer_hf.training.calibration import OutOfFold, replace_out_of_fold

CLASSES = ["CD4/naive", "CD4/memory", "CD8", "B cell", "monocyte"]
PARENTS = {
    "CD4/naive": "CD4",
    "CD4/memory": "CD4",
    "CD4": "T cell",
    "CD8": "T cell",
    "T cell": "lymphocyte",
    "B cell": "lymphocyte",
    "lymphocyte": "leukocyte",
    "monocyte": "leukocyte",
}
CHAINS = [
    ["CD4", "T cell", "lymphocyte"],
    ["CD4", "T cell", "lymphocyte"],
    ["T cell", "lymphocyte"],
    ["lymphocyte"],
    [],
]


@pytest.fixture
def classifier(store):
    """A classifier of five classes, with out-of-fold predictions that are made up."""
    torch.manual_seed(0)
    genes = GeneTokenizer.from_store(store, bin_edges=[0.5, 1.5], max_length=50)
    config = GeneBertConfig.from_tokenizer(genes, size="tiny", id2label=dict(enumerate(CLASSES)))
    model = GeneBertForClassification(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
        model.classifier.bias.zero_()
    model.tokenizer = genes
    rng = np.random.default_rng(1)
    known = log_softmax(rng.normal(size=(400, 5)) * 2, axis=1).astype(np.float32)
    model.out_of_fold = OutOfFold(known, rng.integers(0, 5, 400), np.arange(400))
    return model.eval()


def p_values(known, cells):
    return np.array([(1 + (known <= cell).sum()) / (1 + len(known)) for cell in cells])


def accepts(name, own, probabilities, distance, found, reject):
    """Judge one cell by one ancestor, from the definition."""
    members = [i for i, chain in enumerate(CHAINS) if name in (CLASSES[i], *chain)]
    known = np.exp(found.predictions.astype(float))
    rows = np.flatnonzero(np.isin(known.argmax(1), members))
    sums = known[rows][:, members].sum(1).round(6)
    k = int(reject * (len(rows) + 1))
    if k == 0:
        return False
    total = round(float(probabilities[members].astype(float).sum()), 6)
    typical, of_known = np.log(p_values(sums, [total])), np.log(p_values(sums, sums))
    if found.distances is not None:
        far = -found.distances[rows]
        typical, of_known = typical + np.log(p_values(far, [-distance])), of_known + np.log(p_values(far, far))
    return typical[0] >= np.sort(of_known)[k - 1] - 1e-12


@pytest.mark.parametrize("with_distances", [False, True])
def test_the_label_is_that_of_the_nearest_ancestor_that_accepts_the_cell(classifier, adata, tmp_path, with_distances):
    found, distances, reject = classifier.out_of_fold, np.zeros(60), 0.6
    if with_distances:
        rng = np.random.default_rng(0)
        with torch.no_grad():
            tokens = [classifier.tokenizer(adata[i], return_tensors="pt") for i in range(60)]
            states = np.stack([classifier.base_model(**of).last_hidden_state[0, 0].numpy() for of in tokens])
        found.centroids = states[:3] + rng.normal(size=(3, states.shape[1])).astype(np.float32)
        distances = np.linalg.norm(states[:, None] - found.centroids, axis=2).min(1)
        found.distances = rng.normal(distances.mean(), distances.std(), 400).astype(np.float32)
    flat = adata.copy()
    annotate(flat, classifier, reject=reject)
    probabilities = flat.obsm["stformer_probabilities"]
    expected = np.array(flat.obs["stformer_label"], object)
    for cell in np.flatnonzero(expected == "unknown"):
        own = int(probabilities[cell].argmax())
        for name in CHAINS[own]:
            if accepts(name, own, probabilities[cell], distances[cell], found, reject):
                expected[cell] = name
                break
    annotate(adata, classifier, reject=reject, parents=PARENTS)
    labels = adata.obs["stformer_label"]
    assert labels.astype(object).equals(pd.Series(expected, labels.index, object))
    counts = labels.value_counts()
    assert counts["unknown"] > 0 and counts[["CD4", "T cell", "lymphocyte"]].sum() > 0
    assert list(labels.cat.categories) == [*CLASSES, "CD4", "T cell", "lymphocyte", "unknown"]
    np.testing.assert_array_equal(adata.obs["stformer_score"], flat.obs["stformer_score"])
    adata.write_h5ad(tmp_path / "a.h5ad")
    table = read_h5ad(tmp_path / "a.h5ad").uns["stformer_annotation"]["parents"]
    assert dict(zip(table["child"], table["parent"], strict=True)) == PARENTS


def test_the_nearest_of_several_accepting_ancestors_is_taken():
    known = np.random.default_rng(0).dirichlet(np.ones(5), 400)
    cells = np.array([[0.50, 0.48, 0.02, 0, 0], [0.02, 0.02, 0.94, 0.02, 0], [0.02, 0.01, 0.50, 0.47, 0]])
    found = climb(CLASSES, CHAINS, cells.argmax(1), cells, None, known, None, 0.5)
    assert found.tolist() == ["CD4", "T cell", "lymphocyte"]  # lymphocyte accepts all three


def test_an_ancestor_of_few_known_cells_labels_none(classifier, adata):
    """At 0.05, 19 cells are needed. The two CD4 classes have 18 here, and T cell has them and those of CD8."""
    found = classifier.out_of_fold
    is_cd4 = found.predictions.argmax(1) < 2
    rows = np.sort(np.concatenate([np.flatnonzero(is_cd4)[:18], np.flatnonzero(~is_cd4)]))
    classifier.out_of_fold = OutOfFold(found.predictions[rows], found.labels[rows], rows)
    classifier.config.temperature = 1.0
    with torch.no_grad():
        classifier.classifier.weight.zero_()
        classifier.classifier.bias.copy_(torch.tensor([1.0, 0.99, -3.0, 0.5, 0.5]))
    annotate(adata, classifier, reject=0.3, parents=PARENTS)
    assert adata.obs["stformer_label"].dropna().unique().tolist() == ["CD4"]
    annotate(adata, classifier, reject=0.05, parents=PARENTS)
    assert "CD4" not in adata.obs["stformer_label"].dropna().unique().tolist()


def test_chains_are_nearest_first_without_the_root():
    assert ancestors_of(CLASSES, read_parents(PARENTS)) == CHAINS
    own = {"CD8": "T cell", "CD4": "T cell"}  # a class that is a parent of others
    assert ancestors_of(["T cell", "CD8", "B"], own) == [[], ["T cell"], []]
    assert ancestors_of(["T cell", "CD8"], own) == [[], []]


def test_labels_at_the_top_may_have_no_parent(tmp_path):
    (tmp_path / "parents.csv").write_text("child,parent\nCD8,T cell\nT cell,\nB cell,\n")
    for parents in (tmp_path / "parents.csv", {"CD8": "T cell", "T cell": None, "B cell": np.nan}):
        assert read_parents(parents) == {"CD8": "T cell"}


def test_tables_that_cannot_be_used_are_refused(classifier, adata, tmp_path):
    (tmp_path / "wrong.csv").write_text("label,above\nCD8,T cell\n")
    for parents, message in (
        ({"CD8": "T", "T": "CD8"}, "its own ancestor"),
        ({"CD8": "CD8"}, "'CD8' is its own ancestor"),
        ({"CD8": "unknown"}, "cannot be in the table"),
        ({"NK": "lymphocyte"}, "None of the model's classes has a parent"),
        (tmp_path / "wrong.csv", "columns child and parent; it has label, above"),
    ):
        with pytest.raises(ValueError, match=message):
            annotate(adata, classifier, reject=0.3, parents=parents)
    (tmp_path / "two.csv").write_text("child,parent\nCD8,T cell\nCD8,lymphocyte\n")
    with pytest.raises(ValueError, match="'CD8' has two parents, 'T cell' and 'lymphocyte'"):
        read_parents(tmp_path / "two.csv")
    with pytest.raises(FileNotFoundError, match="There is no file"):
        read_parents(tmp_path / "none.csv")
    with pytest.raises(ValueError, match="pass reject too"):
        annotate(adata, classifier, parents=PARENTS)
    assert not adata.obsm


def test_the_command_reads_the_table(classifier, adata, tmp_path):
    classifier.save_pretrained(tmp_path / "m")
    classifier.tokenizer.save_pretrained(tmp_path / "m")
    replace_out_of_fold(tmp_path / "m", classifier.out_of_fold)
    adata.write_h5ad(tmp_path / "in.h5ad")
    pd.Series(PARENTS).rename_axis("child").rename("parent").to_csv(tmp_path / "parents.csv")
    where = ["--data", str(tmp_path / "in.h5ad"), "--model", str(tmp_path / "m"), "--output", str(tmp_path / "o.h5ad")]
    assert main(["annotate", *where, "--reject", "0.6", "--parents", str(tmp_path / "parents.csv")]) == 0
    annotate(adata, classifier, reject=0.6, parents=PARENTS)
    found = read_h5ad(tmp_path / "o.h5ad").obs["stformer_label"]
    assert found.astype(object).equals(adata.obs["stformer_label"].astype(object))
