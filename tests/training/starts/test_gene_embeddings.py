"""Embeddings of genes from files: the right rows, scaled, and what does not fit is told."""

import numpy as np
import pandas as pd
import pytest
import torch

from stformer_hf import (
    GeneBertConfig,
    GeneBertForPhenotypicMLM,
    GeneBertModel,
    GeneTokenizer,
    load_gene_embeddings,
)

GENES = [f"ENSG{i:011d}" for i in range(6)]
SYMBOLS = {"TP53": GENES[2]}


def model_of(scheme, model_class=GeneBertModel, **kwargs):
    settings = {"medians": np.ones(6)} if scheme == "rank" else {}
    tokenizer = GeneTokenizer(GENES, scheme=scheme, symbols=SYMBOLS, phenotypes={"t": ["a"]}, **settings)
    torch.manual_seed(0)
    sizes = {"hidden_size": 4, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 8}
    return model_class(GeneBertConfig.from_tokenizer(tokenizer, **{**sizes, **kwargs})), tokenizer


def rows_of(model, tokenizer):
    embeddings = getattr(model, "gene_bert", model).embeddings
    if tokenizer.scheme == "rank":
        return embeddings.word_embeddings.weight.detach().clone(), tokenizer.gene_token_ids
    weight = embeddings.token_type_embeddings.weight.detach().clone()
    return weight, tokenizer.gene_token_type_offset + np.arange(6)


@pytest.mark.parametrize("scheme", ["binned", "rank"])
@pytest.mark.parametrize("kind", ["parquet", "csv", "tsv", "gene2vec", "word2vec", "npz", "dict"])
def test_each_gene_gets_its_row_and_nothing_else_changes(scheme, kind, tmp_path):
    model, tokenizer = model_of(scheme, GeneBertForPhenotypicMLM)
    names = [GENES[4], "TP53", "unknown", f"{GENES[0]}.12", "TP53"]  # in another order, one of them twice
    values = np.random.default_rng(0).normal(3, 5, (5, 4))
    table = pd.DataFrame(values, index=names, columns=[f"d{i}" for i in range(4)])
    path = tmp_path / "embeddings"
    if kind == "parquet":
        path = path.with_suffix(".parquet")
        table.to_parquet(path)
    elif kind in ("csv", "tsv"):
        path = path.with_suffix(f".{kind}")
        table.to_csv(path, sep="," if kind == "csv" else "\t")
    elif kind in ("gene2vec", "word2vec"):
        path = path.with_suffix(".txt")
        lines = [f"{name}\t{' '.join(map(repr, row))} " for name, row in zip(names, values.tolist(), strict=True)]
        path.write_text("\n".join((["5 4"] if kind == "word2vec" else []) + lines).replace("\t", " "))
    elif kind == "npz":
        path = path.with_suffix(".npz")
        np.savez(path, **dict(zip(names[:4], values, strict=False)))
    else:
        path = dict(zip(names[:4], values, strict=False))
    before, rows = rows_of(model, tokenizer)
    assert load_gene_embeddings(model, tokenizer, path) == 3 / 6
    after, _ = rows_of(model, tokenizer)
    chosen = values[[3, 1, 0]] - values[[3, 1, 0]].mean(0)
    expected = chosen / chosen.std() * model.config.initializer_range
    np.testing.assert_allclose(after[rows[[0, 2, 4]]], expected, atol=1e-6)
    untouched = np.setdiff1d(np.arange(len(after)), rows[[0, 2, 4]])
    assert torch.equal(after[untouched], before[untouched])
    assert model.mlm_head.decoder.weight is model.get_input_embeddings().weight


def test_wide_tables_keep_their_distances_and_narrow_ones_leave_the_rest():
    model, tokenizer = model_of("binned")
    rng = np.random.default_rng(1)
    flat = rng.normal(size=(6, 3)) @ rng.normal(size=(3, 50))  # of rank 3: four components hold all of it
    load_gene_embeddings(model, tokenizer, pd.DataFrame(flat, index=GENES))
    weight, rows = rows_of(model, tokenizer)
    found, wide = weight[rows].double().numpy(), flat - flat.mean(0)
    ratio = np.linalg.norm(found[1:] - found[0], axis=1) / np.linalg.norm(wide[1:] - wide[0], axis=1)
    np.testing.assert_allclose(ratio, ratio[0], rtol=1e-5)
    assert found.std() == pytest.approx(model.config.initializer_range, rel=1e-3)
    model, tokenizer = model_of("binned")
    before, _ = rows_of(model, tokenizer)
    load_gene_embeddings(model, tokenizer, pd.DataFrame(flat[:, :2], index=GENES))
    after, _ = rows_of(model, tokenizer)
    assert torch.equal(after[rows, 2:], before[rows, 2:]) and not torch.equal(after[rows, :2], before[rows, :2])


def test_what_is_wrong_is_told(tmp_path):
    model, tokenizer = model_of("binned")
    with pytest.raises(ValueError, match="The tokenizer knows none of the 2 genes of the embeddings, such as x, y;"):
        load_gene_embeddings(model, tokenizer, {"x": np.ones(4), "y": np.ones(4)})
    with pytest.raises(ValueError, match=r"the same length; found \[3, 4\]"):
        load_gene_embeddings(model, tokenizer, {GENES[0]: np.ones(4), GENES[1]: np.ones(3)})
    with pytest.raises(ValueError, match="1 values that are NaN"):
        load_gene_embeddings(model, tokenizer, {GENES[0]: [1.0, np.nan, 0.0, 0.0]})
    with pytest.raises(ValueError, match="not numbers"):
        load_gene_embeddings(model, tokenizer, pd.DataFrame({"a": ["x"]}, index=[GENES[0]]))
    with pytest.raises(ValueError, match=r"a .parquet, .csv, .tsv, .txt or .npz file"):
        load_gene_embeddings(model, tokenizer, tmp_path / "genes.pkl")
