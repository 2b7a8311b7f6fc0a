"""Shared parts of the commands that train: arguments, cells, the split, the run."""

from __future__ import annotations

import logging
import math
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from anndata import AnnData
from transformers import TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint
from transformers.utils.logging import disable_progress_bar

from ..genes.wrong_names import must_have, some_of
from ..sources.formats import expand
from ..sources.read_anndata import is_anndata_file, read_anndata
from ..space.spatial_graph import spatial_neighbors
from ..store.cell_store import CellStore
from ..store.splits import split_groups
from ..training.cell_trainer import CellTrainer
from ..training.checkpoints import checkpoint_to_resume, last_whole_checkpoint
from ..training.loading import holds_model
from .files import holds_store, writing

logger = logging.getLogger(__name__)


def training_arguments(output: Path, settings: dict, overwrite: bool) -> TrainingArguments:
    """Make the arguments of a run, and refuse to replace a model or checkpoints unless asked to or resuming."""
    disable_progress_bar()  # of each file of weights; that of the steps stays
    settings = {"dataloader_pin_memory": torch.cuda.is_available(), **settings}
    arguments = TrainingArguments(output_dir=str(output), **settings)
    if str(arguments.resume_from_checkpoint).lower() == "true":
        whole = last_whole_checkpoint(output) if overwrite else checkpoint_to_resume(output)
        if whole is None:
            logger.warning(f"{output} holds no checkpoint to resume from: starting a new run.")
        arguments.resume_from_checkpoint = True if whole is None else str(whole)
        if whole is None and holds_model(output):
            arguments.resume_from_checkpoint = None  # --overwrite replaces the model
    elif str(arguments.resume_from_checkpoint).lower() == "false":
        arguments.resume_from_checkpoint = None
    if arguments.resume_from_checkpoint:
        return arguments
    if overwrite:
        if arguments.process_index == 0:  # else a later resumption would continue the replaced run
            for checkpoint in output.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
                shutil.rmtree(checkpoint)
        return arguments
    if holds_model(output):
        raise FileExistsError(f"{output} holds a model. Choose another --output, or pass --overwrite.")
    if output.is_dir() and get_last_checkpoint(str(output)):
        raise FileExistsError(
            f"{output} holds checkpoints. Resume with --resume_from_checkpoint true, choose another --output, or pass "
            "--overwrite."
        )
    return arguments


@contextmanager
def removing_store(arguments: TrainingArguments) -> Iterator[None]:
    """Remove the store in the output folder if it was built within the context, and the context fails.

    Used before training starts: the store would block the corrected command.
    """
    path = Path(arguments.output_dir) / "store"
    was_there = path.exists()
    try:
        yield
    except Exception:
        if not was_there and path.exists() and arguments.process_index == 0:
            shutil.rmtree(path)
        raise


def is_store(data: list[str] | list[AnnData]) -> bool:
    """Return whether `data` is the folder of a store."""
    return len(data) == 1 and isinstance(data[0], str) and holds_store(data[0])


def open_cells(
    data: list[str] | list[AnnData],
    arguments: TrainingArguments,
    obs: list[str] | None,
    layer: str | None,
    overwrite: bool,
    fractional: bool = False,
    neighbors: str | None = None,
    section: str | None = None,
    eval_data: list[str] | None = None,
    classes: tuple[str, ...] = (),
) -> CellStore:
    """Open the store at `data`, or build one from its files in the output folder (in one process).

    The cells of `eval_data` come last, for `split`. Columns of obs in `classes` become class labels, whatever their
    type.

    With `neighbors`, a key of obsp, cells are returned with their neighbourhoods. For h5ad files without that graph,
    it is built from the coordinates obsm["spatial"], within the sections of the obs column `section`.
    """
    if not eval_data and is_store(data):
        store = CellStore(data[0])
        return store if neighbors is None else store.with_neighborhoods()
    path = Path(arguments.output_dir) / "store"
    with arguments.main_process_first(local=False, desc="build"):
        whole = (path / "manifest.json").exists()
        if arguments.process_index == 0 and not (arguments.resume_from_checkpoint and whole):
            if path.exists() and not overwrite:
                raise FileExistsError(f"{path} exists: pass it as --data, or pass --overwrite to rebuild it.")
            sources = [*data, *(eval_data or [])]
            if neighbors is not None:
                found = [_with_graph(source, neighbors, section, layer) for source in sources]
                sources, layer = [source for source, _ in found], one_layer([own for _, own in found], layer)
            store = CellStore.build(
                path,
                sources,
                obs=obs,
                classes=classes,
                layer=layer,
                fractional=fractional,
                neighbors=neighbors,
                overwrite=overwrite,
            )
        else:
            store = CellStore(path)
    return store if neighbors is None else store.with_neighborhoods()


def genes_of_training(store: CellStore, eval_data: list[str] | None) -> list[str]:
    """Return the ids of a store's genes that a new model learns: those that only `eval_data` measures are left out."""
    genes = store.gene_ids.tolist()
    if not eval_data:
        return genes
    last = store.manifest["sources"][-len(expand(eval_data)) - 1]
    learnt = last.get("n_genes_so_far", len(genes))  # which a store of an earlier version does not know
    if learnt < len(genes):
        logger.warning(f"{len(genes) - learnt} genes are only in eval_data, and a new model does not learn them.")
    return genes[:learnt]


def one_layer(layers: list[str | None], asked: str | None) -> str | None:
    """Return the layer to read in all sources; if a modality or table was requested, each source has resolved it."""
    if len(set(layers)) > 1:
        raise ValueError(f"--layer {asked} is a modality or table in some sources only.")
    return layers[0] if layers else asked


def _with_graph(source: str, key: str, section: str | None, layer: str | None) -> tuple[AnnData | str, str | None]:
    """Return a file without a graph of its cells as an AnnData with one, others unchanged; and the layer to read."""
    if not is_anndata_file(Path(source)):
        return source, layer
    adata, own = read_anndata(source, layer, backed=True)
    if key in adata.obsp:
        if own != layer:
            return adata, own
        if adata.isbacked:
            adata.file.close()
        return source, layer
    if "spatial" not in adata.obsm:
        raise ValueError(
            f"{source} has no graph obsp[{key!r}] and no coordinates obsm['spatial']: cannot compute neighbours."
        )
    spatial_neighbors(adata, section_key=section, key_added=key.removesuffix("_connectivities"))
    if key not in adata.obsp:
        raise ValueError(f"{source} has no graph obsp[{key!r}]; to build one, its name must end in _connectivities.")
    return adata, own


def split(
    store: CellStore,
    held_out: float,
    seed: int,
    labels: Sequence[str] = (),
    eval_data: list[str] | None = None,
    split_by: str | None = None,
) -> tuple[CellStore, CellStore | None]:
    """Split cells with counts (and a label) at random, determined by the seed and stratified by class.

    With several label columns, a cell needs a label in one of them, and combinations of their classes are strata.
    Duplicate cells (see `CellStore.twins`) stay on one side. A class with one cell is in training; if fewer cells are
    held out than there are classes, the smallest classes are stratified as one. With `split_by`, a column of obs,
    whole groups are held out. With `eval_data`, the last sources of the store, their cells are held out instead of a
    share, and their copies are left out of training. Cells that are left out are logged.
    """
    if not 0 <= held_out < 1:
        raise ValueError(f"held_out must be a share of the cells, at least 0 and below 1; got {held_out}.")
    usable = store.lengths > 0
    codes = None
    if labels:
        codes = np.stack([store.obs[name].cat.codes.to_numpy() for name in labels], axis=1)
        labelled = (codes >= 0).any(axis=1)
        n_without = int((usable & ~labelled).sum())
        if n_without:
            label = " and ".join(map(repr, labels))
            logger.warning(f"{n_without} of {len(store)} cells have no label {label}: they are left out.")
        usable &= labelled
    cells = np.flatnonzero(usable)
    if eval_data:
        twins = store.select(cells).twins()
        n_last = sum(source["n_cells"] for source in store.manifest["sources"][-len(expand(eval_data)) :])
        held = cells >= len(store) - n_last
        in_both = ~held & np.isin(twins, twins[held])
        if in_both.any():
            logger.warning(f"{in_both.sum()} training cells are also in eval_data, and are left out of training.")
        train, test = cells[~held & ~in_both], cells[held]
        if not (len(train) and len(test)):
            raise ValueError(f"{len(train)} usable cells to train on, and {len(test)} in eval_data: both are needed.")
        return store.select(train), store.select(test)
    n_test = math.ceil(held_out * len(cells))
    if len(cells) - n_test < 1:
        raise ValueError(f"{len(cells)} usable cells: none would be left to train on.")
    if not n_test:
        return store.select(cells), None
    twins = store.select(cells).twins()
    if split_by is not None:
        must_have(store.obs, "obs", split_by)
        groups = store.obs[split_by].iloc[cells].astype(object).map(str)
        held = np.isin(np.arange(len(cells)), split_groups(twins, groups, held_out, seed)[1])
    else:
        held = _hold_out_cells(store, labels, None if codes is None else codes[cells], twins, held_out, seed)
    return store.select(cells[~held]), store.select(cells[held])


def _hold_out_cells(
    store: CellStore, labels: Sequence[str], codes: np.ndarray | None, twins: np.ndarray, held_out: float, seed: int
) -> np.ndarray:
    """Choose cells to hold out, all twins of each, stratified by class: bool array (n_cells,).

    `codes` (n_cells, n_columns) are those of the classes in the label columns, -1 for none.
    """
    from sklearn.model_selection import train_test_split

    firsts, of_cell = np.unique(twins, return_index=True, return_inverse=True)[1:]
    kinds, n_test = np.arange(len(firsts)), math.ceil(held_out * len(firsts))  # of cells, each once
    strata = None
    if codes is not None:
        label = " and ".join(map(repr, labels))
        classes, strata = np.unique(codes[firsts], axis=0, return_inverse=True)
        strata = strata.reshape(-1)  # numpy 2.0 returns a column
        n_like = np.bincount(strata)[strata]
        alone = np.unique(strata[n_like < 2])
        if len(alone):
            names = [_names_of(store, labels, classes[i]) for i in alone]
            logger.warning(
                f"Classes of {label} with only one cell, which is used for training, are not evaluated: "
                f"{some_of(names, 10)}."
            )
        kinds = kinds[n_like > 1]  # a class of one cell cannot be on both sides
        strata = _like_shares(strata[kinds], min(n_test, max(len(kinds) - n_test, 1)), label)
    if len(kinds) <= n_test:
        raise ValueError(
            f"Only {len(kinds)} cells are in classes with at least two: none is left beside {n_test} held out."
        )
    _, test = train_test_split(kinds, test_size=n_test, random_state=seed, stratify=strata)
    return np.isin(of_cell, test)


def _names_of(store: CellStore, labels: Sequence[str], codes: np.ndarray) -> str:
    """Return the classes of a cell in some columns, without those that it lacks."""
    return " and ".join(store.categories[name][code] for name, code in zip(labels, codes, strict=True) if code >= 0)


def _like_shares(codes: np.ndarray, most: int, label: str) -> np.ndarray:
    """Return the strata of a split: the classes, with the smallest merged into one if there are more than `most`."""
    classes, n_cells = np.unique(codes, return_counts=True)
    if most >= len(classes):
        return codes
    smallest = classes[np.argsort(-n_cells, kind="stable")[most - 1 :]]
    logger.warning(
        f"One side of the split has {most} cells, fewer than the {len(classes)} classes of {label}: the "
        f"{len(smallest)} smallest are stratified as one, and some of them may be on one side only."
    )
    return np.where(np.isin(codes, smallest), -1, codes)


def finish(trainer: CellTrainer, card: dict | None = None) -> dict[str, float]:
    """Train, save model, tokenizer and state, collect the metrics, write the card, and push it if asked to.

    `card` has arguments of `write_model_card` that the trainer does not know, such as `settings`, `store` and
    `base_model`. Return `train_loss`, `steps_per_second`, `peak_memory_mb` (resident, of this process), the figures
    of `Throughput` for the whole run, and those of the evaluation.

    Raises
    ------
    SystemExit
        The run was stopped by SIGTERM or Ctrl-C, after saving a checkpoint.
    """
    from transformers.trainer_callback import PrinterCallback, ProgressCallback

    from ..training.log_lines import LogLines
    from ..training.throughput import peak_resident_memory

    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    trainer.add_callback(LogLines())
    trainer.card_facts.update(card or {})
    result = trainer.train(resume_from_checkpoint=trainer.args.resume_from_checkpoint)
    if trainer.interrupted:
        print(
            f"Stopped by {trainer.interrupted.name} after step {trainer.state.global_step}; a checkpoint is saved. "
            "Resume with the same command and --resume_from_checkpoint true.",
            file=sys.stderr,
        )
        raise SystemExit(128 + trainer.interrupted)
    trainer.save_model(_internal_call=True)  # pushed below, when the card has its metrics
    trainer.save_state()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    no_step = not result.metrics["train_steps_per_second"]  # the resumed run was finished
    of_training = {
        "train_loss": float(np.mean(losses)) if no_step and losses else result.training_loss,
        "steps_per_second": result.metrics["train_steps_per_second"],
    }
    metrics = {
        **(of_training if trainer.state.global_step else {}),  # a classifier may be left at its start
        **{name: result.metrics[f"train_{name}"] for name in _SPEED if f"train_{name}" in result.metrics},
        "peak_memory_mb": peak_resident_memory() / 2**20,
    }
    if trainer.eval_dataset is not None:
        evaluated = trainer.evaluate()
        metrics.update({name: value for name, value in evaluated.items() if _is_figure(name, value)})
    if trainer.args.push_to_hub:
        trainer.push_to_hub()
    else:
        trainer.create_model_card()
    return metrics


_SPEED = ("tokens_per_second", "cells_per_second", "padding_share", "data_wait_share", "peak_memory_gb", "mfu")


def _is_figure(name: str, value: object) -> bool:
    of_speed = name.endswith(("_runtime", "_per_second", "_preparation_time"))
    return name.startswith("eval_") and isinstance(value, (int, float)) and not of_speed


def run_and_print(output: str, run: Callable[[], dict[str, float]]) -> None:
    """Train, with no other command at work in the output folder, and print the main metrics in the main process."""
    from ..training.log_lines import without_details

    with writing(output):
        figures = run()
    if PartialState().is_main_process:
        shown = without_details({name: value for name, value in figures.items() if name not in _DETAILS})
        if PartialState().device.type == "cuda" and "peak_memory_gb" in figures:  # it is that of the GPU
            shown["peak_gpu_memory_gb"] = figures["peak_memory_gb"]
        print(f"{output}: " + ", ".join(f"{name} {value:.4g}" for name, value in shown.items()))


_DETAILS = ("steps_per_second", "tokens_per_second", "padding_share", "data_wait_share")  # which the log has
