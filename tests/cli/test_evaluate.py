"""`stformer-hf evaluate`, as a user types it."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import make_adata

from stformer_hf import GeneBertConfig, GeneBertForPhenotypicMLM, GeneTokenizer
from stformer_hf.cli import main


@pytest.fixture
def files(tmp_path) -> dict[str, str]:
    """A file of cells, and a model that knows their label as a phenotype."""
    adata = make_adata(120)
    adata.obs["cell_type"] = adata.obs["cell_type"].sample(frac=1, random_state=0).set_axis(adata.obs_names)
    adata.obsm["noise"] = np.random.default_rng(0).normal(size=(120, 4))
    adata.write_h5ad(tmp_path / "cells.h5ad")
    tokenizer = GeneTokenizer(
        adata.var_names.tolist(), bin_edges=[0.5, 1.5], phenotypes={"cell_type": ["B cell", "T cell"]}
    )
    torch.manual_seed(0)
    config = GeneBertConfig.from_tokenizer(
        tokenizer, num_hidden_layers=1, num_attention_heads=2, hidden_size=16, intermediate_size=32
    )
    GeneBertForPhenotypicMLM(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return {"--data": str(tmp_path / "cells.h5ad"), "--label_key": "cell_type", "--n_splits": "3"}


def command(files, output, *more) -> list[str]:
    return ["evaluate", *(word for pair in files.items() for word in pair), "--output", str(output), *more]


def test_keys_of_a_file_beside_the_baselines(files, tmp_path, capsys):
    output = tmp_path / "found"
    assert main(command(files, output, "--keys", "noise")) == 0
    printed = capsys.readouterr().out
    assert "noise - PCA of genes" in printed and "* best in its column." in printed
    assert {path.name for path in output.iterdir()} >= {"evaluation.json", "evaluation.csv", "evaluation.md"}
    read = json.loads((output / "evaluation.json").read_text())
    assert read["settings"]["keys"] == ["noise"] and read["settings"]["n_splits"] == 3
    assert "noise" in set(pd.read_csv(output / "evaluation.csv")["row"])
    assert (output / "evaluation.md").read_text().startswith("## Evaluation of embeddings")
    # What is there is not replaced unless asked.
    assert main(command(files, output, "--keys", "noise")) == 1
    assert "evaluation.json exists" in capsys.readouterr().err
    assert main(command(files, output, "--keys", "noise", "--baselines", "pca", "--overwrite")) == 0
    assert "LR on genes" not in (output / "evaluation.md").read_text()


def test_a_model_embeds_first_and_does_not_see_the_label(files, tmp_path):
    output = tmp_path / "found"
    assert main(command(files, output, "--model", str(tmp_path / "model"), "--keys", "noise")) == 0
    lines = pd.read_csv(output / "evaluation.csv").set_index(["row", "metric"])["value"]
    # The labels are shuffled: a model that reads them would name them all.
    assert lines["X_stformer", "probe_all"] < 0.7
    assert lines["X_stformer", "knn_accuracy"] < 0.7


def test_errors_say_what_is_wrong(files, tmp_path, capsys):
    def error(*more, output=tmp_path / "found") -> str:
        assert main(command(files, output, *more)) == 1
        return capsys.readouterr().err

    assert "no obsm['X_pca']" in error("--keys", "X_pca")
    assert "no obs['site']" in error("--keys", "noise", "--split_by", "site")
    assert "rename the one in the file" in error("--keys", "X_stformer", "--model", str(tmp_path / "model"))
    (tmp_path / "file").write_text("mine")
    assert "is a file; pass a folder" in error("--keys", "noise", output=tmp_path / "file")
    assert not (tmp_path / "found").exists()
