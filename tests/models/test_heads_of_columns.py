"""Heads with a softmax for each of several label columns."""

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, pipeline

from stformer_hf import GeneBertConfig, GeneBertForClassification, GeneTokenizer, annotate
from stformer_hf.inference import export
from stformer_hf.models.gene_bert.heads import (
    IGNORE,
    classification_loss,
    combine_readers,
    fields_of_columns,
    label_columns_of,
    output_names,
)
from stformer_hf.training.cell_heads import read_heads
from tests.models.test_whole_cell import randomise

CLASSES = {"tissue": ["gut", "lung"], "cell_type": ["B: cell", "T cell", "NK"]}  # not in alphabetical order
FIELDS = fields_of_columns(CLASSES)
OUTPUTS = {"cell_type": slice(0, 3), "tissue": slice(3, 5)}


@pytest.fixture
def saved(store, tmp_path):
    """A checkpoint of a classifier of both columns."""
    tokenizer = GeneTokenizer.from_store(store, bin_edges=[0.5], whole_cell=True, max_length=12)
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 16, "intermediate_size": 32}
    torch.manual_seed(0)
    readers = {"wide_head": True, "reader_weights": [1.0, 0.5, 0.25, 2.0], "temperature": [2.0, 0.5]}
    model = GeneBertForClassification(GeneBertConfig.from_tokenizer(tokenizer, **sizes, **readers, **FIELDS))
    randomise(model)
    model.save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    return tmp_path / "m"


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weights", [None, [0.5, 2.0, 1.0, 3.0, 0.25]])
def test_the_loss_is_the_mean_over_the_labels_that_are_there(weights, smoothing):
    config = GeneBertConfig(class_weights=weights, classifier_label_smoothing=smoothing, **FIELDS)
    torch.manual_seed(0)
    logits = torch.randn(6, 5).double()
    labels = torch.tensor([[0, 1], [2, IGNORE], [IGNORE, 0], [IGNORE, IGNORE], [1, 1], [2, 0]])
    losses = []
    for cell, of_cell in zip(logits, labels, strict=True):
        for label, outputs in zip(of_cell.tolist(), OUTPUTS.values(), strict=True):
            if label != IGNORE:
                own = torch.ones(5)[outputs] if weights is None else torch.tensor(weights)[outputs]
                log_p = cell[outputs].log_softmax(0)
                n = len(log_p)
                losses.append(-(1 - smoothing) * own[label] * log_p[label] - smoothing / n * (own * log_p).sum())
    assert len(losses) == 8
    loss = classification_loss(logits, labels, config)
    assert loss.item() == pytest.approx(sum(losses).item() / 8, rel=1e-6)
    assert classification_loss(logits, labels, config, 16).item() == pytest.approx(loss.item() / 2)
    assert classification_loss(logits, torch.full_like(labels, IGNORE), config) == 0
    with pytest.raises(ValueError, match=r"shape \(6,\) do not fit a head of 2 label columns \(cell_type, tissue\)"):
        classification_loss(logits, labels[:, 0], config)


def test_readers_are_combined_for_each_column():
    config = GeneBertConfig(reader_weights=[1.0, 0.5, 0.25, 2.0], temperature=[2.0, 0.5], **FIELDS)
    head, wide = torch.randn(2, 4, 5).unbind(0)
    found = combine_readers(head, wide, config)
    for (a, b), t, outputs in zip(((1.0, 0.5), (0.25, 2.0)), (2.0, 0.5), OUTPUTS.values(), strict=True):
        alone = GeneBertConfig(num_labels=3, reader_weights=[a, b], temperature=t)
        torch.testing.assert_close(found[:, outputs], combine_readers(head[:, outputs], wide[:, outputs], alone))


def test_a_configuration_keeps_the_columns_and_refuses_others(saved):
    config = AutoConfig.from_pretrained(saved)
    assert list(config.label_columns.items()) == [("cell_type", 3), ("tissue", 2)]
    assert config.id2label[0] == "cell_type: B: cell" and config.id2label[4] == "tissue: lung"
    for column in label_columns_of(config):
        assert column.outputs == OUTPUTS[column.name] and output_names(config, column) == CLASSES[column.name]
    for wrong, words in (
        ({"label_columns": {"cell_type": 3, "tissue": 3}}, "and 5 in all"),
        ({"label_columns": {"cell_type": 4, "tissue": 1}}, "at least two classes each"),
        ({"label_columns": {"cell_type": 2, "tissue": 3}}, "alphabetical order of the columns.*got cell_type: NK"),
        ({"id2label": {**FIELDS["id2label"], 1: "cell_type: NK"}}, "unique names"),
        ({"reader_weights": [1.0, 1.0]}, "two numbers per label column"),
        ({"temperature": [1.0]}, "one number per label column"),
        ({"temperature": [1.0, 0.0]}, "must be positive"),
    ):
        with pytest.raises(ValueError, match=words):
            GeneBertConfig(**{**FIELDS, **wrong})


def test_a_pipeline_names_the_classes_of_each_column(saved, adata):
    annotate(adata, saved, top_k=2)
    classify = pipeline("cell-classification", model=str(saved))
    found, two = classify(adata, batch_size=7), classify(adata, top_k=2)
    for column in OUTPUTS:
        labels = adata.obs[f"stformer_{column}_label"].astype(object)
        assert labels.nunique() > 1
        assert [of[column]["label"] for of in found] == labels.where(labels.notna(), None).tolist()
        scores = [of[column]["score"] for of in found]
        np.testing.assert_allclose(scores, adata.obs[f"stformer_{column}_score"], atol=1e-5)
        seconds = adata.obs[f"stformer_{column}_label_2"].dropna().tolist()
        assert [of[column][1]["label"] for of in two if of[column][1]["label"]] == seconds


def test_an_exported_model_names_and_compares_the_classes_of_each_column(saved):
    heads = read_heads(AutoModelForSequenceClassification.from_pretrained(saved))
    assert export._describe(heads) == {
        "problem_type": "single_label_classification",
        "label_columns": [["cell_type", CLASSES["cell_type"]], ["tissue", CLASSES["tissue"]]],
    }
    expected = np.array([[3.0, 1.0, 2.0, 0.0, 5.0], [0.0, 1.0, 0.0, 7.0, 5.0]])
    found = expected[:, [0, 1, 2, 4, 3]]  # the tissues are exchanged, and the highest of all is as in a type
    assert export._compare([expected], [found], heads)["same_labels"] == 0.5


def test_a_checkpoint_of_several_columns_is_loaded_by_its_auto_class(saved, adata):
    model = AutoModelForSequenceClassification.from_pretrained(saved).eval()
    tokens = GeneTokenizer.from_pretrained(saved)(adata[:5], padding=True, return_tensors="pt")
    labels = torch.tensor([[0, 1], [IGNORE, 0], [2, IGNORE], [IGNORE, IGNORE], [1, 1]])
    with torch.no_grad():
        outputs = model(**tokens, labels=labels)
    assert outputs.logits.shape == (5, 5)
    torch.testing.assert_close(outputs.loss, classification_loss(outputs.logits, labels, model.config))
