"""Packed batches of one size: the same numbers as without the dead tokens."""

import numpy as np
import pytest
import torch
from conftest import of_epoch

from stformer_hf import (
    DataCollatorForCellClassification,
    DataCollatorForGeneRankMLM,
    DataCollatorForPhenotypicMLM,
    GeneBertConfig,
    GeneBertForClassification,
    GeneBertForPhenotypicMLM,
    GeneTokenizer,
    estimate_gene_medians,
)
from stformer_hf.batches import fixed_size

SIZE = (400, 20)
DRAWS = [list(range(10, 24)), [30, 31], list(range(20, 40))]


@pytest.fixture
def tokenizers(store):
    settings = {"phenotypes": ["cell_type"], "max_length": 30}
    medians = estimate_gene_medians(store)
    return {
        "bins": GeneTokenizer.from_store(store, bin_edges=[0.5, 1.5], **settings),
        "whole cells": GeneTokenizer.from_store(store, bin_edges=[0.5, 1.5], whole_cell=True, **settings),
        "ranks": GeneTokenizer.from_store(store, "rank", medians=medians, **settings),
    }


def collators(tokenizer, **settings):
    kind = DataCollatorForGeneRankMLM if tokenizer.scheme == "rank" else DataCollatorForPhenotypicMLM
    return [of_epoch(kind(tokenizer, packing=True, pad_packed_to=size, **settings)) for size in (None, SIZE)]


def model_of(model_class, tokenizer, **settings):
    torch.manual_seed(0)
    shape = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 16, "intermediate_size": 32}
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = GeneBertConfig.from_tokenizer(tokenizer, **shape, **dropout, **settings)
    model = model_class(config).train()
    with torch.no_grad():  # branches that start at zero would hide a difference
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def step(model, batch):
    model.zero_grad()
    output = model(**batch)
    output.loss.backward()
    return output, torch.cat([p.grad.ravel() for p in model.parameters()])


@pytest.mark.parametrize("kind", ["bins", "whole cells", "ranks"])
@pytest.mark.parametrize("backend", ["sdpa", "eager"])
def test_loss_logits_and_gradients_are_those_of_the_plain_row(store, tokenizers, kind, backend):
    model = model_of(GeneBertForPhenotypicMLM, tokenizers[kind], loss_weights={"genes": 2.0})
    model.set_attn_implementation(backend)
    plain, fixed = collators(tokenizers[kind], mlm_probability=0.4)
    shapes = set()
    for rows in DRAWS:
        batches = [collate(store.__getitems__(rows)) for collate in (plain, fixed)]
        (expected, gradients), (found, found_gradients) = (step(model, batch) for batch in batches)
        torch.testing.assert_close(found.loss, expected.loss, atol=1e-5, rtol=0)
        torch.testing.assert_close(found.class_statistics, expected.class_statistics, atol=1e-4, rtol=1e-5)
        assert torch.equal(found.class_statistics[:, 1:], expected.class_statistics[:, 1:])
        torch.testing.assert_close(found.logits[: len(expected.logits)], expected.logits, atol=1e-5, rtol=0)
        torch.testing.assert_close(found_gradients, gradients, atol=1e-5, rtol=1e-5)
        shapes.add(str({name: getattr(value, "shape", value) for name, value in batches[1].items()}))
    assert len(shapes) == 1


@pytest.mark.parametrize("pooling", ["cls", "mean"])
@pytest.mark.parametrize("problem", ["single_label_classification", "regression"])
def test_classes_and_their_loss_are_those_of_the_plain_row(store, tokenizers, pooling, problem):
    tokenizer = tokenizers["whole cells"]
    tokenizer.included_phenotypes = []
    n_labels = 1 if problem == "regression" else 2
    model = model_of(
        GeneBertForClassification, tokenizer, num_labels=n_labels, classifier_pooling=pooling, problem_type=problem
    )
    column = "age" if problem == "regression" else "cell_type"
    plain, fixed = (
        DataCollatorForCellClassification(tokenizer, column, packing=True, pad_packed_to=size) for size in (None, SIZE)
    )
    for rows in DRAWS:
        results = [step(model, collate(store.__getitems__(rows))) for collate in (plain, fixed)]
        (expected, gradients), (found, found_gradients) = results
        torch.testing.assert_close(found.logits[: len(rows)], expected.logits, atol=1e-5, rtol=0)
        torch.testing.assert_close(found.loss, expected.loss, atol=1e-5, rtol=1e-6)
        torch.testing.assert_close(found_gradients, gradients, atol=1e-5, rtol=1e-4)


def test_a_full_row_keeps_its_last_cell(store, tokenizers, monkeypatch):
    """Even then the last token is dead: the empty segments write into it."""
    monkeypatch.setattr(fixed_size, "_MULTIPLE", 1)
    tokenizer, cells = tokenizers["whole cells"], store.__getitems__(range(10, 24))
    model = model_of(GeneBertForPhenotypicMLM, tokenizer)
    plain, fixed = collators(tokenizer)
    batch = plain(cells)
    fixed.pad_packed_to = batch["input_ids"].shape[1], 20
    filled = fixed(cells)
    assert filled["input_ids"].shape[1] == batch["input_ids"].shape[1] + 1
    torch.testing.assert_close(model(**filled).loss, model(**batch).loss, atol=1e-5, rtol=0)


def test_dead_tokens_are_of_no_cell(store, tokenizers):
    _, fixed = collators(tokenizers["whole cells"])
    batch = fixed(store.__getitems__([10, 11]))
    n_tokens = int(batch["cu_seq_lens_q"][2])
    alive = torch.arange(batch["input_ids"].shape[1]) < n_tokens
    assert torch.equal(batch["seq_idx"][0] >= 0, alive)
    assert (batch["input_ids"][0, ~alive] == fixed.tokenizer.pad_token_id).all()
    assert (batch["labels"][0, ~alive] == -100).all()
    lengths = batch["cu_seq_lens_q"].diff()
    assert lengths.sum() == batch["input_ids"].shape[1] and lengths.max() == batch["max_length_q"] == 30
    assert not batch["cell_counts"][0, batch["cell_indptr"][2] :].any()
    labelled = (batch["labels"][0] != -100).nonzero()[:, 0].tolist()
    assert batch["predicted_positions"].unique().tolist() == [*labelled, len(alive) - 1]


def test_too_many_cells_or_tokens_raise(store, tokenizers):
    _, fixed = collators(tokenizers["bins"])
    for size in ((400, 3), (20, 20)):
        fixed.pad_packed_to = size
        with pytest.raises(ValueError, match="more than pad_packed_to"):
            fixed(store.__getitems__([10, 11, 12, 13]))
    with pytest.raises(ValueError, match="packing=True"):
        DataCollatorForPhenotypicMLM(tokenizers["bins"], pad_packed_to=SIZE)
    evaluating = collators(tokenizers["bins"])[1].for_evaluation()
    assert len(evaluating(store.__getitems__([10, 11]))["input_ids"]) == 2


def test_predicted_positions_have_one_size_for_nearly_every_draw(store, tokenizers):
    _, fixed = collators(tokenizers["ranks"])
    rng = np.random.default_rng(0)
    sizes = {len(fixed(store.__getitems__(rng.integers(5, 50, 12)))["predicted_positions"]) for _ in range(20)}
    assert len(sizes) == 1
