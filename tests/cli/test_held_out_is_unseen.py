"""Held-out cells are poisoned - other counts, other classes - and nothing that is fitted changes."""

import logging

import numpy as np
import pandas as pd
import pytest
import torch
from anndata import AnnData
from conftest import make_adata

from stformer_hf import CellStore
from stformer_hf.cli import finetune, pretrain, pretrain_neighborhood
from stformer_hf.cli.runs import split, training_arguments

pytestmark = pytest.mark.usefixtures("two_folds")

QUIET = {"report_to": "none", "disable_tqdm": True, "use_cpu": True, "save_strategy": "no"}


def make_cells() -> AnnData:
    adata = make_adata(120, 30, seed=4)
    adata.obs["donor"] = np.resize(["d0", "d1", "d2", "d3", "d4", "d5"], 120)
    adata.obs["cell_type"] = adata.obs["cell_type"].astype(str)
    adata.obsm["spatial"] = np.random.default_rng(0).uniform(0, 10, (120, 2))
    return adata


def poison(adata: AnnData, held_out: np.ndarray) -> AnnData:
    """Multiply the counts of the held-out cells, and give them classes of their own, first by name."""
    adata = adata.copy()
    counts = adata.X.toarray()
    counts[held_out, ::2] *= 50
    adata.X = counts
    adata.obs.loc[held_out, "cell_type"] = "A poisoned type"
    return adata


def build(adata: AnnData, path) -> CellStore:
    adata = adata.copy()
    for name in ("cell_type", "donor"):
        adata.obs[name] = pd.Categorical(adata.obs[name])
    adata.obs[["x", "y"]] = adata.obsm["spatial"]
    return CellStore.build(path, adata, obs=["cell_type", "donor", "x", "y"], report=False)


def weights_of(model) -> dict[str, np.ndarray]:
    return {name: value.detach().float().numpy() for name, value in model.state_dict().items()}


def are_equal(one: dict, other: dict) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        np.testing.assert_array_equal(value, other[name], err_msg=name)


SETTINGS = {
    "quantiles": {"tokenizer_config": {"bin_edges": "quantile"}},
    "quantiles of each gene, normalised": {
        "tokenizer_config": {"bin_edges": "gene_quantile", "normalize": "log1p_cp10k"}
    },
    "medians": {"scheme": "rank"},
    "reference": {"whole_cell": False, "tokenizer_config": {"bin_edges": "quantile"}},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_pretraining(tmp_path, name):
    def fit(adata, folder):
        build(adata, tmp_path / folder)
        args = pretrain.PretrainArguments(
            data=[str(tmp_path / folder)],
            output=str(tmp_path / f"{folder}_out"),
            phenotypes=["cell_type"],
            held_out=0.2,
            max_length=16,
            **SETTINGS[name],
        )
        run = pretrain.prepare(args, training_arguments(tmp_path / f"{folder}_out", QUIET, False))
        torch.manual_seed(0)
        return run, pretrain.make_model(args, run)

    clean = make_cells()
    run, model = fit(clean, "clean")
    held_out = np.zeros(120, bool)
    held_out[run.held_out_cells.cell_ids] = True
    assert 20 <= held_out.sum() <= 24
    other, poisoned = fit(poison(clean, held_out), "poisoned")
    assert np.array_equal(other.held_out_cells.cell_ids, run.held_out_cells.cell_ids)
    assert other.tokenizer.phenotypes == {"cell_type": ["B cell", "T cell"]}
    assert other.tokenizer.fingerprint == run.tokenizer.fingerprint  # edges, medians, genes, phenotypes
    are_equal(weights_of(model), weights_of(poisoned))  # which begins at the cells
    # The test can fail: the same poison in training cells shows.
    seen, changed = fit(poison(clean, np.arange(120) % 5 == 0), "seen")
    assert seen.tokenizer.fingerprint != run.tokenizer.fingerprint


@pytest.mark.parametrize("name", ["quantiles of each gene, normalised", "medians"])
def test_genes_of_evaluation_data(tmp_path, name, caplog):
    cells = make_cells()
    train, evaluated = cells[:80, :25].copy(), cells[80:, 3:].copy()  # five genes are only in the latter
    for part, file in ((train, "train.h5ad"), (evaluated, "evaluated.h5ad")):
        part.write_h5ad(tmp_path / file)

    def tokenizer(folder, **flags):
        args = pretrain.PretrainArguments(
            data=[str(tmp_path / "train.h5ad")],
            output=str(tmp_path / folder),
            max_length=16,
            **SETTINGS[name],
            **flags,
        )
        return pretrain.prepare(args, training_arguments(tmp_path / folder, QUIET, False)).tokenizer

    with_others = tokenizer("with", eval_data=[str(tmp_path / "evaluated.h5ad")])
    assert len(with_others.genes) <= 25 and "5 genes are only in eval_data" in caplog.text
    alone = tokenizer("alone", held_out=0.0)
    assert with_others.fingerprint == alone.fingerprint
    np.testing.assert_array_equal(with_others.gene_weights, alone.gene_weights)
    assert with_others.genes == list(train.var_names[np.isin(train.var_names, with_others.genes)])


@pytest.mark.parametrize("whole_cell", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_finetuning(tmp_path, whole_cell, caplog):
    def fit(adata, folder):
        build(adata, tmp_path / folder)
        args = finetune.FinetuneArguments(
            data=[str(tmp_path / folder)],
            label_key=["cell_type"],
            output=str(tmp_path / f"{folder}_out"),
            held_out=0.3,
            split_by="donor",
            whole_cell=whole_cell,
            max_length=16,
            class_weights="balanced",
        )
        settings = {**QUIET, "num_train_epochs": 0 if whole_cell else 1, "learning_rate": 1e-3}
        settings |= {name: value for name, value in finetune.FINETUNING.items() if name not in settings}
        figures = finetune.run(args, settings)
        from transformers import AutoModelForSequenceClassification

        return figures, AutoModelForSequenceClassification.from_pretrained(args.output)

    clean = make_cells()
    _, model = fit(clean, "clean")
    _, held = split(build(clean, tmp_path / "again"), 0.3, 42, ["cell_type"], split_by="donor")
    held_out = clean.obs["donor"].isin(held.obs["donor"].unique()).to_numpy()
    assert 20 <= held_out.sum() <= 60
    some = held_out & (np.arange(120) % 3 > 0)  # or no held-out cell could be evaluated
    with caplog.at_level(logging.WARNING):
        figures, poisoned = fit(poison(clean, some), "poisoned")
    assert poisoned.config.id2label == model.config.id2label == {0: "B cell", 1: "T cell"}
    assert poisoned.config.class_weights == model.config.class_weights
    are_equal(weights_of(model), weights_of(poisoned))
    assert "1 classes of 'cell_type' have no training cell" in caplog.text
    assert "or a value that no training cell has (A poisoned type)" in caplog.text
    assert 0 <= figures["eval_accuracy"] <= 1


def test_neighbourhoods(tmp_path, caplog):
    def fit(adata, folder):
        build(adata, tmp_path / folder)
        args = pretrain_neighborhood.PretrainNeighborhoodArguments(
            data=[str(tmp_path / folder)],
            output=str(tmp_path / f"{folder}_out"),
            cell_type_key="cell_type",
            patch_size=4.0,
            held_out=0.2,
        )
        settings = {**pretrain_neighborhood.TRAINING_DEFAULTS, **QUIET, "max_steps": 2, "eval_strategy": "no"}
        pretrain_neighborhood.run(args, settings)
        from stformer_hf import CellNeighborhoodForMaskedCell

        return CellNeighborhoodForMaskedCell.from_pretrained(args.output)

    clean = make_cells()
    model = fit(clean, "clean")
    places = clean.obsm["spatial"]
    with_counts = np.asarray(clean.X.sum(axis=1)).ravel() > 0
    along = places[with_counts][:, np.ptp(places[with_counts], axis=0).argmax()]
    held_out = np.zeros(120, bool)
    held_out[np.flatnonzero(with_counts)[np.argsort(along)[-20:]]] = True
    poisoned = fit(poison(clean, held_out), "poisoned")
    assert model.config.cell_types == ["B cell", "T cell"]
    assert poisoned.config.cell_types == ["B cell", "T cell", "A poisoned type"]  # a name, so that it can embed them
    table = poisoned.get_input_embeddings()
    table.weight = torch.nn.Parameter(table.weight[:2])
    are_equal(weights_of(model), weights_of(poisoned))
    assert "20 held-out cells are not evaluated: no training cell has their types, such as A poisoned" in caplog.text
