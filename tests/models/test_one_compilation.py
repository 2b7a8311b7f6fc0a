"""A packed training step of one size: compiled once, and without a shape that depends on data."""

from contextlib import nullcontext

import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters
from transformers.utils import find_labels

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
from stformer_hf.models.gene_bert import packed_attention

SIZE = (300, 20)
needs_varlen = pytest.mark.skipif(not packed_attention.HAS_VARLEN, reason="varlen attention came with torch 2.10")


@pytest.fixture
def collators(store):
    """Collators of bins, of ranks, and of bins with whole cells."""
    settings = {"phenotypes": ["cell_type"], "max_length": 40}
    ranks = GeneTokenizer.from_store(store, "rank", medians=estimate_gene_medians(store), **settings)
    bins, whole = (
        GeneTokenizer.from_store(store, bin_edges=[0.5, 1.5], whole_cell=whole, **settings) for whole in (False, True)
    )
    masked = {"packing": True, "pad_packed_to": SIZE}
    return {
        "ranks": DataCollatorForGeneRankMLM(ranks, **masked),
        "bins": DataCollatorForPhenotypicMLM(bins, **masked),
        "whole cells": DataCollatorForPhenotypicMLM(whole, **masked),
    }


def model_of(collator, **changes):
    shape = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 32, "intermediate_size": 32}
    config = GeneBertConfig.from_tokenizer(
        collator.tokenizer, **{**shape, "attention_probs_dropout_prob": 0.0, **changes}
    )
    torch.manual_seed(0)
    return GeneBertForPhenotypicMLM(config).train()


def batches_of(store, collator, n_batches):
    rng = np.random.default_rng(0)
    for _ in range(n_batches):
        yield collator(store.__getitems__(rng.choice(np.arange(4, 60), rng.integers(3, 8), replace=False)))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ranks", "bins", "whole cells"])
def test_one_compilation_serves_fifty_packed_batches(store, collators, kind):
    torch._dynamo.reset()
    counters.clear()
    model = model_of(collators[kind], loss_weights={"genes": 2.0})
    compiled = torch.compile(model, fullgraph=True, dynamic=False, backend="aot_eager")
    lengths = set()
    for number, batch in enumerate(batches_of(store, collators[kind], 50)):
        lengths.add(tuple(batch["cu_seq_lens_q"].diff().tolist()))
        model.zero_grad()
        torch.manual_seed(number)
        loss = compiled(**batch, num_items_in_batch=(batch["labels"] != -100).sum()).loss
        loss.backward()
        assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    assert len(lengths) == 50
    assert counters["stats"]["unique_graphs"] == counters["aot_autograd"]["total"] == 1
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(compiled(**batch).loss, model(**batch).loss, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["ranks", "bins", "whole cells"])
@needs_varlen
def test_a_packed_step_never_asks_for_a_value(store, collators, kind, monkeypatch):
    """Tensors on the meta device have no values: what would wait for a GPU raises.

    The attention is torch's varlen, as in half precision on a GPU. What still waits, in other steps: labels without
    `predicted_positions`, whose number is unknown; attention with one call per cell, which needs their lengths
    (float32, or dropout on attention weights); transformers' look at the mask of a padded batch, which may be all
    ones; the copy of `class_weights` to the GPU.
    """
    monkeypatch.setattr(packed_attention, "_varlen_serves", lambda *_: True)
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # which the meta device lacks
    batch = next(batches_of(store, collators[kind], 1))
    batch = {name: value.to("meta") if torch.is_tensor(value) else value for name, value in batch.items()}
    model = model_of(collators[kind], loss_weights={"genes": 2.0}).to("meta", torch.bfloat16)
    output = model(**batch, num_items_in_batch=(batch["labels"] != -100).sum())
    output.loss.backward()
    assert output.loss.device.type == "meta" and all(parameter.grad is not None for parameter in model.parameters())
    without = {name: value for name, value in batch.items() if name != "predicted_positions"}
    with pytest.raises((NotImplementedError, RuntimeError), match="nonzero"):
        model(**without)
    monkeypatch.setattr(packed_attention, "_varlen_serves", lambda *_: False)
    with pytest.raises((NotImplementedError, RuntimeError), match="tolist|item|meta"):
        model(**batch)


@needs_varlen
def test_neither_does_a_classifier_of_numbers(store, monkeypatch):
    monkeypatch.setattr(packed_attention, "_varlen_serves", lambda *_: True)
    tokenizer = GeneTokenizer.from_store(store, bin_edges=[0.5, 1.5], max_length=40)
    collate = DataCollatorForCellClassification(tokenizer, "age", packing=True, pad_packed_to=SIZE)
    batch = collate(store.__getitems__(range(10, 16)))
    assert len(batch["labels"]) == len(batch["cu_seq_lens_q"]) - 1 > 6
    shape = {"num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 32, "intermediate_size": 32}
    config = GeneBertConfig.from_tokenizer(tokenizer, **shape, num_labels=1, attention_probs_dropout_prob=0.0)
    model = GeneBertForClassification(config)
    batch = {name: value.to("meta") if torch.is_tensor(value) else value for name, value in batch.items()}
    model.to("meta", torch.bfloat16)(**batch).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_trainer_takes_only_the_labels_for_labels():
    """It would not compute the loss of a batch without one of them."""
    assert find_labels(GeneBertForPhenotypicMLM) == ["labels"]
