"""What annotate writes is what the head of the model says, and a model without such a head is refused."""

import numpy as np
import pandas as pd
import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file

from stformer_hf import (
    GeneBertConfig,
    GeneBertForClassification,
    GeneBertForPhenotypicMLM,
    GeneBertForTokenClassification,
    GeneBertModel,
    GeneTokenizer,
    annotate,
    embed,
)
from stformer_hf.cli import main
from stformer_hf.training.cell_heads import check_finite, read_heads
from stformer_hf.training.model_card import write_model_card

LABELS = {"id2label": {0: "cycling", 1: "doublet"}, "label2id": {"cycling": 0, "doublet": 1}}
HEADS = {
    "classes": (
        {"num_labels": 3},
        ["stformer_label", "stformer_score", "stformer_margin"],
        "It assigns each cell to one of 3 classes: LABEL_0, LABEL_1",
    ),
    "labels": (
        {"problem_type": "multi_label_classification", **LABELS},
        ["stformer_cycling", "stformer_doublet"],
        "which of 2 labels each cell has, any number of them at once: cycling, doublet",
    ),
    "number": ({"num_labels": 1}, ["stformer_value"], "It predicts a number for each cell."),
    "named number": (
        {"id2label": {0: "age"}, "label2id": {"age": 0}, "problem_type": "regression"},
        ["stformer_age"],
        "It predicts a number for each cell: age.",
    ),
    "numbers": (
        {"problem_type": "regression", **LABELS},
        ["stformer_cycling", "stformer_doublet"],
        "It predicts 2 numbers for each cell: cycling, doublet.",
    ),
}


@pytest.fixture
def genes(store):
    return GeneTokenizer.from_store(store, bin_edges=[0.5, 1.5], max_length=50)


def make(kind, genes, **settings):
    torch.manual_seed(0)
    model = kind(GeneBertConfig.from_tokenizer(genes, size="tiny", **settings))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


@pytest.mark.parametrize("head", HEADS)
def test_a_head_is_read_as_what_it_is(genes, adata, head, tmp_path, capsys):
    settings, columns, card = HEADS[head]
    model = make(GeneBertForClassification, genes, **settings)
    model.save_pretrained(tmp_path / "m")
    genes.save_pretrained(tmp_path / "m")
    annotate(adata, tmp_path / "m", batch_size=7)
    assert list(adata.obs.columns) == ["cell_type", "age", *columns]
    assert list(adata.uns["stformer_annotation"]["columns"]) == columns
    with torch.no_grad():
        logits = model(**genes(adata, padding=True, return_tensors="pt")).logits.numpy()
    known = np.arange(60) != 3  # which has no counts
    if head == "classes":
        assert adata.obs["stformer_label"].cat.codes.tolist() == np.where(known, logits.argmax(1), -1).tolist()
        found, wanted = (
            adata.obs["stformer_score"].to_numpy()[:, None],
            torch.tensor(logits).softmax(1).amax(1)[:, None],
        )
        probabilities = adata.obsm["stformer_probabilities"]
        np.testing.assert_allclose(probabilities[known], torch.tensor(logits).softmax(1)[known], atol=1e-5)
        assert np.isnan(probabilities[3]).all()
        assert list(adata.uns["stformer_annotation"]["classes"]) == ["LABEL_0", "LABEL_1", "LABEL_2"]
        best = np.sort(probabilities[known], axis=1)
        np.testing.assert_allclose(adata.obs["stformer_margin"][known], best[:, -1] - best[:, -2], atol=1e-6)
    else:
        found = adata.obs[columns].to_numpy()
        wanted = 1 / (1 + np.exp(-logits)) if head == "labels" else logits
    np.testing.assert_allclose(found[known], wanted[known], atol=1e-5)
    assert np.isnan(found[3]).all()

    write_model_card(tmp_path / "m", model=model, tokenizer=genes)
    text = (tmp_path / "m" / "README.md").read_text()
    assert card in text and ("one of" in text) == (head == "classes")
    of_numbers = "regression" if "number" in head else "classification"
    assert ModelCard.load(tmp_path / "m" / "README.md").data.pipeline_tag == f"tabular-{of_numbers}"

    adata.write_h5ad(tmp_path / "cells.h5ad")
    argv = ["annotate", "--data", str(tmp_path / "cells.h5ad"), "--model", str(tmp_path / "m")]
    assert main([*argv, "--output", str(tmp_path / "out.h5ad")]) == 0
    said = capsys.readouterr().out
    assert (
        (said.endswith("59 of 60 cells labelled, 1 without a known gene\n"))
        if head == "classes"
        else columns[0] in said
    )


NO_HEADS = {
    GeneBertForTokenClassification: "GeneBertForTokenClassification, which classifies the genes of a cell, not the",
    GeneBertForPhenotypicMLM: "is GeneBertForPhenotypicMLM, not a classifier of cells",
    GeneBertModel: "is GeneBertModel, not a classifier of cells",
}


@pytest.mark.parametrize("kind", NO_HEADS)
def test_a_model_without_a_head_of_cells_is_refused_by_name(genes, adata, kind, tmp_path):
    model = make(kind, genes)
    model.save_pretrained(tmp_path)
    genes.save_pretrained(tmp_path)
    for given in (model, tmp_path):
        with pytest.raises(ValueError, match=NO_HEADS[kind]):
            annotate(adata, given, tokenizer=genes)
    assert list(adata.obs.columns) == ["cell_type", "age"] and not adata.uns


def test_a_head_that_the_checkpoint_does_not_hold_is_not_drawn_at_random(genes, adata, tmp_path):
    make(GeneBertForClassification, genes).save_pretrained(tmp_path)
    genes.save_pretrained(tmp_path)
    embed(adata, tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    for left_out, words in (
        ("classifier.weight", "does not hold the weights classifier.weight"),
        ("gene_bert.", "gene_bert."),
    ):
        kept = {name: weight for name, weight in weights.items() if not name.startswith(left_out)}
        save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ValueError, match=f"{words}.* would be random"):
            annotate(adata, tmp_path)
    with pytest.raises(ValueError, match="would be random"):
        embed(adata, tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_outputs_that_are_no_numbers_are_refused(genes, adata, value):
    model = make(GeneBertForClassification, genes, num_labels=1)
    with torch.no_grad():
        model.gene_bert.embeddings.token_type_embeddings.weight[1] = value  # of the first gene
    n_wrong = int((adata.X[:, 0].toarray() > 0).sum())
    assert 0 < n_wrong < 59
    for call in (annotate, embed):
        with pytest.raises(
            ValueError, match=f"NaN or infinite outputs for {n_wrong} of 60 cells.*Nothing was written"
        ):
            call(adata, model, tokenizer=genes)
    assert list(adata.obs.columns) == ["cell_type", "age"] and not adata.uns and not adata.obsm


def test_outputs_of_another_shape_than_the_configuration_names_are_refused(genes, adata):
    model = make(GeneBertForClassification, genes, num_labels=3)
    model.config.num_labels = 2
    with pytest.raises(ValueError, match=r"outputs of shape \(\d+, 3\), but its configuration names 2"):
        annotate(adata, model, tokenizer=genes)


def test_a_classifier_reads_the_phenotypes_that_it_was_trained_with(tokenizer, adata):
    model = make(GeneBertForClassification, tokenizer, num_labels=3)
    with torch.no_grad():
        logits = model(**tokenizer(adata, padding=True, return_tensors="pt")).logits
    annotate(adata, model, tokenizer=tokenizer)
    known = np.arange(60) != 3  # which has no counts
    found = adata.obsm["stformer_probabilities"][known]
    np.testing.assert_allclose(found, logits.softmax(1).numpy()[known], atol=1e-5)
    other = adata.copy()
    other.obs["cell_type"] = adata.obs["cell_type"].map({"T cell": "B cell", "B cell": "T cell"})
    annotate(other, model, tokenizer=tokenizer)
    assert np.abs(other.obsm["stformer_probabilities"][known] - found).max() > 1e-3


def test_cells_that_the_model_could_not_read_need_no_finite_outputs():
    outputs = np.array([[0.5], [np.nan]])
    check_finite(outputs, np.array([True, False]))
    with pytest.raises(ValueError, match="for 1 of 2 cells"):
        check_finite(outputs, np.array([True, True]))


def test_columns_of_predictions():
    """Classes and their names; a cell that the model could not read has none."""
    config = GeneBertConfig(vocab_size=9, type_vocab_size=9, id2label={0: "a", 1: "b"}, label2id={"a": 0, "b": 1})
    (head,) = read_heads(GeneBertForClassification(config))
    found = head.columns(np.array([[0.2, 0.8], [0.9, 0.1], [0.5, 0.5]]), np.array([True, True, False]), "x")
    assert pd.Series(found["x_label"]).tolist()[:2] == ["b", "a"] and pd.isna(found["x_label"][2])
    np.testing.assert_array_equal(found["x_score"], np.float32([0.8, 0.9, np.nan]))


def test_a_panel_of_few_of_the_models_genes_is_refused_and_one_of_under_half_is_told(genes, adata, caplog, tmp_path):
    model = make(GeneBertForClassification, genes, num_labels=3)
    model.save_pretrained(tmp_path / "m")
    genes.save_pretrained(tmp_path / "m")
    few = adata[:, :2].copy()
    with pytest.raises(ValueError, match="2 of the model's 40 genes .* 100.0% of the input's counts are"):
        annotate(few, model, tokenizer=genes)
    annotate(few, model, tokenizer=genes, min_coverage=0.01)
    assert genes.min_coverage == 0.1  # that of the tokenizer is left alone
    caplog.clear()
    annotate(adata[:, :15].copy(), model, tokenizer=genes)
    assert "15 of the model's 40 genes" in caplog.text and "at least 50% are recommended" in caplog.text
    few.write_h5ad(tmp_path / "few.h5ad")
    argv = ["--data", str(tmp_path / "few.h5ad"), "--model", str(tmp_path / "m"), "--output"]
    for verb in ("annotate", "embed"):
        out = str(tmp_path / f"{verb}.h5ad")
        assert main([verb, *argv, out]) == 1 and main([verb, *argv, out, "--min_coverage", "0.01"]) == 0
