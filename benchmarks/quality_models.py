"""The models of `benchmarks quality`: all calls of `finetune`, `annotate` and `embed` are here.

A model gets cells with counts, the label where it is to learn, and the groups where these are held out whole; the
cells to be labelled or embedded have an empty obs.
"""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from anndata import AnnData

from .quality_data import GROUP, LABEL, load_others

if TYPE_CHECKING:
    from stformer_hf import GeneBertModel

ROWS = ("start", "finetuned", "random_start", "reference")
FEW_ROWS = ("start", "random_start", "start_elsewhere", "pretrained_elsewhere")
# Settings of `finetune`. "start" is step 0 of "finetuned", whose number of epochs an inner cross-validation chooses.
SETTINGS: dict[str, dict[str, Any]] = {
    "start": {"num_train_epochs": 0},
    "finetuned": {},
    "random_start": {"init": "random"},
}
# The reference configuration: binned tokens, mean pooling, MLP head (that of the demo before spectral starts).
REFERENCE: dict[str, Any] = {
    "bin_edges": [0.5, 1.5, 2.5, 4.5, 8.5],
    "pooling": "mean",
    "gene_dropout": 0.5,
    "held_out": 0.0,
}
REFERENCE_STEPS = {
    "num_train_epochs": 8,
    "learning_rate": 1e-3,
    "per_device_train_batch_size": 8,
    "save_strategy": "no",
    "report_to": "none",
}


def classify(row: str, train: AnnData, test: AnnData, seed: int) -> np.ndarray:
    """Fine-tune on labelled cells, and label others.

    Parameters
    ----------
    row : str
        In `ROWS`.
    train : AnnData (n_train, n_genes)
        With `obs["label"]`, and `obs["group"]` where groups are held out whole.
    test : AnnData (n_test, n_genes)
    seed : int

    Returns
    -------
    array of str (n_test,)
    """
    if row == "reference":
        return _classify_by_reference(train, test, seed)
    import stformer_hf

    groups = GROUP if GROUP in train.obs else None
    model = stformer_hf.finetune(train, LABEL, seed=seed, split_by=groups, **SETTINGS[row])
    return _annotate(test, model)


def classify_few(
    row: str, labelled: AnnData, unlabelled: AnnData, test: AnnData, seed: int, folder: Path | None = None
) -> np.ndarray:
    """As `classify`, from few labelled cells.

    "start" has its spectral start on these and on the cells without labels; "start_elsewhere" on cells of other data
    sets (see `load_others`) in `folder`, and "pretrained_elsewhere" continues from there as in
    `recipes/cell_tiny_cpu.yaml`.
    """
    import anndata

    import stformer_hf

    if row == "start":
        cells = anndata.concat([AnnData(labelled.X, obs=labelled.obs[[]], var=labelled.var), unlabelled])
        model = stformer_hf.finetune(labelled, LABEL, seed=seed, model=spectral_start(cells, seed), num_train_epochs=0)
    elif row.endswith("elsewhere"):
        encoder = (_started_elsewhere if row == "start_elsewhere" else _pretrained_elsewhere)(folder)
        model = stformer_hf.finetune(labelled, LABEL, seed=seed, model=encoder, num_train_epochs=0)
    else:
        model = stformer_hf.finetune(labelled, LABEL, seed=seed, **SETTINGS[row])
    return _annotate(test, model)


def embed(cells: AnnData, seed: int) -> np.ndarray:
    """Embed cells by a spectral start on them, which sees no labels; float32 (n, n_dimensions)."""
    import stformer_hf

    model, cells = spectral_start(cells, seed), cells.copy()
    stformer_hf.embed(cells, model, tokenizer=model.tokenizer)
    return np.asarray(cells.obsm["X_stformer"])


@functools.cache
def _started_elsewhere(folder: Path) -> GeneBertModel:
    return spectral_start(load_others(folder), seed=0)


@functools.cache
def _pretrained_elsewhere(folder: Path) -> GeneBertModel:
    """Pretrain by the recipe, whose start is that of `_started_elsewhere`."""
    from stformer_hf import GeneBertModel, GeneTokenizer
    from stformer_hf.cli import main

    with tempfile.TemporaryDirectory() as temporary:
        data, output = f"{temporary}/others.h5ad", f"{temporary}/model"
        load_others(folder).write_h5ad(data)
        coverage = ["--tokenizer_config", "{min_coverage: 0.05}"]  # the demo's cells have 765 genes
        if main(["pretrain", "--config", "cell_tiny_cpu", "--data", data, "--output", output, *coverage]):
            raise RuntimeError("Pretraining failed.")
        model = GeneBertModel.from_pretrained(output)
        model.tokenizer = GeneTokenizer.from_pretrained(output)
    return model


def spectral_start(cells: AnnData, seed: int) -> GeneBertModel:
    """Make an encoder with a spectral start on cells, with its tokenizer."""
    import torch

    from stformer_hf import GeneBertConfig, GeneBertModel, GeneTokenizer, initialise_from_store

    symbols = dict(zip(cells.var["gene_symbol"], cells.var_names, strict=True)) if "gene_symbol" in cells.var else None
    tokenizer = GeneTokenizer(cells.var_names.tolist(), symbols=symbols, whole_cell=True, max_length=8)
    tokenizer.min_coverage = 0.05  # the demo's cells have 765 genes
    torch.manual_seed(seed)
    model = GeneBertModel(GeneBertConfig.from_tokenizer(tokenizer, size="tiny"))
    initialise_from_store(model, tokenizer, cells)
    model.tokenizer = tokenizer
    return model


def _annotate(test: AnnData, model: GeneBertModel) -> np.ndarray:
    import stformer_hf

    test = test.copy()
    stformer_hf.annotate(test, model, tokenizer=model.tokenizer, key_added="stformer")
    return test.obs["stformer_label"].astype(str).to_numpy()


def _classify_by_reference(train: AnnData, test: AnnData, seed: int) -> np.ndarray:
    import stformer_hf
    from stformer_hf.cli import finetune
    from stformer_hf.training.defaults import FINETUNING

    with tempfile.TemporaryDirectory() as folder:
        data, output = f"{folder}/train.h5ad", f"{folder}/model"
        train.write_h5ad(data)
        args = finetune.FinetuneArguments(data=[data], label_key=[LABEL], output=output, whole_cell=False, **REFERENCE)
        finetune.run(args, {**FINETUNING, **REFERENCE_STEPS, "seed": seed})
        test = test.copy()
        stformer_hf.annotate(test, output)
    return test.obs["stformer_label"].astype(str).to_numpy()
