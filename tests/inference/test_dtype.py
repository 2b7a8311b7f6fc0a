"""Embeddings computed in half precision, in Python and on the command line."""

import numpy as np
import pytest
import torch
from anndata import read_h5ad

from stformer_hf import GeneBertModel, embed
from stformer_hf.cli import main


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
