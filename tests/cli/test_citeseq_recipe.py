"""recipes/citeseq_types.py: the gates against a plain loop, and a run of two folds."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from stformer_hf import CellStore, GeneBertConfig, GeneBertForPhenotypicMLM, GeneTokenizer, initialise_from_store

PATH = Path(__file__).parents[2] / "recipes" / "citeseq_types.py"


@pytest.fixture(scope="module")
def recipe():
    spec = importlib.util.spec_from_file_location("citeseq_types", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_gates(recipe, shared_data, tmp_path):
    data = shared_data / "tenx" / "1K_pbmc_citeseq.h5"
    cells = recipe.labelled_cells(str(data), tmp_path)
    antibodies = CellStore(tmp_path / "antibodies")
    names = list(antibodies.genes.symbols)
    assert len(names) == 10 and all(name.startswith("ENSG") for name in cells.var_names)  # no antibody among them
    types = []
    for row in range(len(antibodies)):
        level = dict(zip(names, np.log1p(antibodies.rows([row]).toarray()[0]), strict=True))
        has = {name: level[name] > valley for name, valley in recipe.VALLEYS.items()}
        t, b, monocyte = has["CD3"], has["CD19"], has["CD14"]
        found = []
        if b and not t and not monocyte:
            found.append("B")
        if monocyte and not t and not b:
            found.append("CD14 monocyte")
        if t and not monocyte and not b and has["CD4"] != has["CD8"]:
            found.append("CD4 T" if has["CD4"] else "CD8 T")
        if (has["CD16"] or has["CD56"]) and not t and not monocyte and not b:
            found.append("NK")
        if len(found) == 1:
            types.append(found[0])
    assert cells.obs["cell_type"].tolist() == types and len(types) == 742
    assert cells.X.sum(axis=1).min() > 0


@pytest.mark.slow
def test_folds(recipe, shared_data, tmp_path):
    data = str(shared_data / "tenx" / "1K_pbmc_citeseq.h5")
    store = CellStore.build(tmp_path / "store", data, layer="X")
    tokenizer = GeneTokenizer.from_store(store, bin_edges=[0.5, 1.5], max_length=32, whole_cell=True)
    config = GeneBertConfig.from_tokenizer(tokenizer, size="tiny", num_hidden_layers=1, hidden_size=16)
    model = GeneBertForPhenotypicMLM(config)
    initialise_from_store(model, tokenizer, store)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    flags = ["--num_train_epochs", "0", "--use_cpu", "true"]
    table = recipe.run(data, str(tmp_path / "model"), tmp_path / "out", flags, folds=2, seed=0)
    assert table["start"].tolist() == ["new", "pretrained"] * 2 and table["fold"].tolist() == [0, 0, 1, 1]
    assert table["eval_logistic_regression_accuracy"].min() > 0.9
    # Both begin at linear readers, of more than 16 dimensions or of 16, and of all genes.
    assert table["eval_accuracy"].min() > 0.9
