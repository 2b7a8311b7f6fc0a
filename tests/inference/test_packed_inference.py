"""Packed batches at inference: the same numbers as padded ones, for the same rows."""

import numpy as np
import pytest
import torch
from conftest import make_adata
from transformers import BertConfig, BertModel

from stformer_hf import (
    GeneBertConfig,
    GeneBertForClassification,
    GeneBertModel,
    GeneTokenizer,
    annotate,
    embed,
    map_to_reference,
    perturb,
)
from stformer_hf.inference import batches, perturb_reader
from stformer_hf.models.gene_bert.tokenized_cells import take

CELLS = make_adata(50, 30, seed=2)  # of different lengths; the fourth has no counts


def make_tokenizer(scheme: str, **settings) -> GeneTokenizer:
    genes = CELLS.var_names.tolist()
    own = {"medians": dict.fromkeys(genes, 1.0)} if scheme == "rank" else {"bin_edges": [0.5, 1.5, 3.5]}
    whole = {"whole_cell": scheme == "whole"} if scheme != "rank" else {}
    scheme = "rank" if scheme == "rank" else "binned"
    return GeneTokenizer(genes, scheme=scheme, max_length=12, **own, **whole, **settings)


def make_model(tokenizer, kind=GeneBertModel, backend="sdpa", **fields):
    torch.manual_seed(0)
    small = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 16, "intermediate_size": 32}
    config = GeneBertConfig.from_tokenizer(tokenizer, **small, initializer_range=0.3, residual_init="normal", **fields)
    config._attn_implementation = backend
    model = kind(config).eval()
    model.tokenizer = tokenizer
    return model


@pytest.fixture
def both(monkeypatch):
    """Call a function with padded and with packed batches, on copies of the cells; check which the model read."""

    def call(function, model, *args, cells=CELLS, **kwargs):
        seen, found = [], []
        encoder = getattr(model, "gene_bert", model)
        hook = encoder.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append("cu_seq_lens_q" in kwargs), with_kwargs=True
        )
        for packed in (False, True):
            for module in (batches, perturb_reader):
                monkeypatch.setattr(module, "packs", lambda model, packed=packed: packed)
            seen.clear()
            read = cells.copy()
            table = function(read, *args, **kwargs)
            assert seen and any(seen) == packed
            found.append(read if table is None else table)
        hook.remove()
        return found

    return call


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
@pytest.mark.parametrize("scheme", ["rank", "binned", "whole"])
@pytest.mark.parametrize(("pooling", "hidden_layer"), [("cls", -1), ("mean", -1), ("mean", 1)])
def test_a_packed_embedding_is_the_padded_one(both, scheme, pooling, hidden_layer, backend):
    tokenizer = make_tokenizer(scheme, **({"add_cls": True} if scheme == "rank" else {}))
    model = make_model(tokenizer, backend=backend)
    padded, packed = both(embed, model, model, pooling=pooling, hidden_layer=hidden_layer, batch_size=7)
    assert np.ptp(padded.obsm["X_stformer"], axis=0).max() > 0.1  # the rows can be told from one another
    np.testing.assert_allclose(packed.obsm["X_stformer"], padded.obsm["X_stformer"], atol=1e-5)


@pytest.mark.parametrize("position", ["learned", "rotary"])
def test_positions_start_anew_in_each_packed_cell(both, position):
    tokenizer = make_tokenizer("rank", padding_side="left")
    model = make_model(tokenizer, position_embedding_type=position, pooling="mean")
    padded, packed = both(embed, model, model, batch_size=7)
    np.testing.assert_allclose(packed.obsm["X_stformer"], padded.obsm["X_stformer"], atol=1e-5)


@pytest.mark.parametrize("scheme", ["binned", "whole"])
@pytest.mark.parametrize("problem", ["single_label_classification", "multi_label_classification", "regression"])
def test_packed_predictions_are_the_padded_ones(both, scheme, problem):
    tokenizer = make_tokenizer(scheme)
    model = make_model(tokenizer, GeneBertForClassification, problem_type=problem, num_labels=3)
    padded, packed = both(annotate, model, model, batch_size=7)
    columns = padded.uns["stformer_annotation"]["columns"]
    for column in columns:
        values = [cells.obs[column] for cells in (padded, packed)]
        if column == "stformer_label":
            assert values[0].nunique() > 1 and values[1].equals(values[0])
        else:
            np.testing.assert_allclose(values[1], values[0], atol=1e-5)
    assert padded.obs[columns[0]].isna().sum() == packed.obs[columns[0]].isna().sum() == 1  # the cell without counts


def test_a_packed_query_is_mapped_as_a_padded_one(both):
    model = make_model(make_tokenizer("whole"))
    reference = make_adata(40, 30, seed=3)
    padded, packed = both(map_to_reference, model, reference, model, label_key="cell_type")
    assert packed.obs["mapped_label"].equals(padded.obs["mapped_label"])
    np.testing.assert_allclose(packed.obs["mapped_distance"], padded.obs["mapped_distance"], atol=1e-4)
    assert (packed.obsm["mapped_neighbors"] == padded.obsm["mapped_neighbors"]).all(axis=None)


def test_packed_perturbations_are_the_padded_ones(both):
    model = make_model(make_tokenizer("rank"), pooling="mean")
    genes = CELLS.var_names[:4].tolist()
    padded, packed = both(perturb, model, model, genes, n_null=0, max_tokens=40)
    assert (padded["shift"] > 1e-4).all()
    np.testing.assert_allclose(packed["shift"], padded["shift"], atol=1e-5)


def test_cells_without_a_token_are_packed_beside_others(both):
    tokenizer = make_tokenizer("rank", add_cls=False, add_eos=False)
    model = make_model(tokenizer, pooling="mean")
    cells = CELLS.copy()
    cells.X = cells.X.multiply(np.arange(50)[:, None] < 10).tocsr()  # batches of both, and of empty cells alone
    padded, packed = both(embed, model, model, batch_size=7, cells=cells)
    np.testing.assert_allclose(packed.obsm["X_stformer"], padded.obsm["X_stformer"], atol=1e-5)
    assert not packed.obsm["X_stformer"][10:].any() and packed.obsm["X_stformer"][:3].any()


@pytest.mark.parametrize(
    ("backend", "packed"), [("sdpa", True), ("eager", False), ("flex_attention", False), ("flash_attention_2", True)]
)
def test_the_backend_decides_whether_batches_are_packed(backend, packed):
    model = make_model(make_tokenizer("rank"))
    model.config._attn_implementation = backend
    assert batches.packs(model) == packed
    bert = BertModel(BertConfig(num_hidden_layers=1, hidden_size=8, num_attention_heads=1, intermediate_size=8))
    assert not batches.packs(bert)


def test_cells_of_one_length_are_not_packed():
    tokenizer = make_tokenizer("rank")
    tokens = tokenizer.encode_cells(CELLS)
    lengths = np.diff(tokens.indptr)
    full, rows = np.flatnonzero(lengths == lengths.max())[:3], np.array([5, 6, 7])
    batch = batches.make_batch(take(tokens, full), rows, tokenizer, packed=True)
    assert batch.inputs["attention_mask"].all() and batch.inputs["input_ids"].shape == (3, lengths.max())
    mixed = np.append(full[:2], np.flatnonzero(lengths < lengths.max())[0])
    batch = batches.make_batch(take(tokens, mixed), rows, tokenizer, packed=True)
    assert batch.inputs["input_ids"].shape == (1, lengths[mixed].sum())
    assert np.array_equal(batch.n_genes, lengths[mixed] - 2)  # without [CLS] and [EOS]
