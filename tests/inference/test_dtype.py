"""Embeddings computed in half precision, in Python and on the command line."""

import json

import numpy as np
import pytest
import torch
from anndata import read_h5ad
from safetensors.numpy import load_file

from stformer_hf import GeneBertForClassification, GeneBertModel, annotate, embed, map_to_reference, perturb
from stformer_hf.cli import main
from stformer_hf.inference.map_to_reference import save_reference


def test_half_precision_is_near_and_leaves_the_weights(config, tokenizer, adata, tmp_path, capsys):
    torch.manual_seed(0)
    tokenizer.included_phenotypes = []
    config.initializer_range = 0.3
    model = GeneBertModel(config)
    model.tokenizer = tokenizer
    embed(adata, model)
    exact = adata.obsm.pop("X_stformer")
    embed(adata, model, dtype="bfloat16", device="cpu")
    near = adata.obsm["X_stformer"]
    assert near.dtype == np.float32 and model.dtype == torch.float32
    assert 1e-4 < np.abs(near - exact).max() < 0.1
    with pytest.raises(ValueError, match='dtype must be "float32"'):
        embed(adata, model, dtype="int8")
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    del adata.obsm["X_stformer"]
    adata.write_h5ad(tmp_path / "cells.h5ad")
    files = ["--data", str(tmp_path / "cells.h5ad"), "--output", str(tmp_path / "out.h5ad")]
    assert main(["embed", *files, "--model", str(tmp_path / "model"), "--dtype", "bfloat16", "--device", "cpu"]) == 0
    np.testing.assert_allclose(read_h5ad(tmp_path / "out.h5ad").obsm["X_stformer"], near, atol=1e-6)


def test_a_query_is_embedded_as_the_saved_reference_was(config, tokenizer, adata, tmp_path, caplog):
    torch.manual_seed(0)
    tokenizer.included_phenotypes = []
    config.initializer_range = 0.3
    model = GeneBertModel(config)
    model.tokenizer = tokenizer
    states, asked = {}, (None, "float32", "bfloat16")
    for dtype in asked:
        embed(adata, model, dtype=dtype)
        states[dtype] = adata.obsm["X_stformer"]
    for saved in asked:
        save_reference(adata, model, tmp_path / f"{saved}", "cell_type", dtype=saved)
        for dtype in asked:
            query = adata.copy()
            caplog.clear()
            map_to_reference(query, tmp_path / f"{saved}", model, dtype=dtype)
            np.testing.assert_array_equal(query.obsm["X_stformer"], states[saved if dtype is None else dtype])
            differ = dtype is not None and (saved == "bfloat16") != (dtype == "bfloat16")
            assert ("was embedded in" in caplog.text) == differ
    file = tmp_path / "bfloat16" / "reference.json"
    facts = json.loads(file.read_text())
    assert facts.pop("dtype") == "bfloat16"
    file.write_text(json.dumps(facts))  # of an earlier version
    map_to_reference(query, tmp_path / "bfloat16", model, dtype="float32")
    assert "was embedded in" not in caplog.text


def test_other_functions_compute_in_half_precision_too(config, tokenizer, adata, tmp_path):
    """And the shifts of a perturbation are near."""
    torch.manual_seed(0)
    tokenizer.included_phenotypes = []
    config.initializer_range, config.num_labels = 0.3, 3
    classifier, encoder = GeneBertForClassification(config), GeneBertModel(config)
    found = {}
    for dtype in (None, "bfloat16"):
        cells = adata.copy()
        annotate(cells, classifier, tokenizer=tokenizer, dtype=dtype)
        save_reference(
            cells[::2].copy(), encoder, tmp_path / str(dtype), "cell_type", tokenizer=tokenizer, dtype=dtype
        )
        map_to_reference(cells, tmp_path / str(dtype), encoder, tokenizer=tokenizer, dtype=dtype)
        table = perturb(cells, encoder, cells.var_names[:4].tolist(), tokenizer=tokenizer, n_null=0, dtype=dtype)
        found[dtype] = (
            cells.obsm["stformer_probabilities"],
            cells.obsm["X_stformer"],
            cells.obs["mapped_distance"],
            table["shift"],
        )
    for exact, near in zip(*found.values(), strict=True):
        assert 1e-7 < np.nanmax(np.abs(near - exact)) < 0.1
    embedding = [load_file(tmp_path / name / "reference.safetensors")["embedding"] for name in ("None", "bfloat16")]
    assert 1e-4 < np.abs(embedding[0] - embedding[1]).max() < 0.1
    with pytest.raises(ValueError, match='dtype must be "float32"'):
        perturb(adata, encoder, tokenizer=tokenizer, output=tmp_path / "p", dtype="int8")
    assert not (tmp_path / "p").exists()
