"""What the training verbs share: the arguments, the cells, the split, the run itself."""

from __future__ import annotations

import math
import resource
import signal
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from transformers import TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from ..data.cell_store import CellStore
from ..training.cell_trainer import CellTrainer
from ..training.checkpoints import last_whole_checkpoint


def training_arguments(output: Path, settings: dict, overwrite: bool) -> TrainingArguments:
    """Make the arguments of a run, and refuse to replace a model that is there, unless asked to or resuming.

    Raises
    ------
    FileExistsError
        The output folder holds a model, or checkpoints of an interrupted run.
    ValueError
        Nothing to resume from.
    """
    settings = {"dataloader_pin_memory": torch.cuda.is_available(), **settings}
    arguments = TrainingArguments(output_dir=str(output), **settings)
    if str(arguments.resume_from_checkpoint).lower() == "true":
        whole = last_whole_checkpoint(output)
        if whole is None:
            raise ValueError(f"{output} holds no checkpoint to resume from.")
        arguments.resume_from_checkpoint = str(whole)
    if overwrite or arguments.resume_from_checkpoint:
        return arguments
    if (output / "config.json").exists():
        raise FileExistsError(f"{output} holds a model. Choose another --output, or pass --overwrite.")
    if output.is_dir() and get_last_checkpoint(str(output)):
        raise FileExistsError(
            f"{output} holds checkpoints. Go on with --resume_from_checkpoint true, choose another --output, or pass "
            "--overwrite."
        )
    return arguments


def refuse_flags_of_a_new_model(args, names: tuple[str, ...]) -> None:
    """Refuse flags that `--model` leaves without effect: a checkpoint brings its own size and tokenizer.

    Raises
    ------
    ValueError
        Flags that differ from their defaults beside `--model`.
    """
    defaults = type(args)(**{field.name: None for field in fields(args) if field.default is field.default_factory})
    given = [name for name in names if getattr(args, name) != getattr(defaults, name)]
    if args.model and given:
        raise ValueError(
            f"{', '.join('--' + name for name in given)}: of a new model only; the one at {args.model} has its own."
        )


def open_cells(
    data: list[str], arguments: TrainingArguments, obs: list[str] | None, layer: str | None, overwrite: bool
) -> CellStore:
    """Open the store that `data` names, or build one of its files in the output folder (in one process of many)."""
    if len(data) == 1 and (Path(data[0]) / "manifest.json").exists():
        return CellStore(data[0])
    path = Path(arguments.output_dir) / "store"
    with arguments.main_process_first(local=False, desc="build"):
        if arguments.process_index == 0 and not (arguments.resume_from_checkpoint and path.exists()):
            if path.exists() and not overwrite:
                raise FileExistsError(f"{path} exists: pass it as --data, or pass --overwrite to build it anew.")
            return CellStore.build(path, data, obs=obs, layer=layer, overwrite=overwrite)
        return CellStore(path)


def split(
    store: CellStore, held_out: float, seed: int, label: str | None = None
) -> tuple[CellStore, CellStore | None]:
    """Split cells with counts (and a label) at random; by the seed, and with like shares of each class.

    Raises
    ------
    ValueError
        A share outside [0, 1); no cells left to train on.
    """
    from sklearn.model_selection import train_test_split

    if not 0 <= held_out < 1:
        raise ValueError(f"held_out is a share of the cells, at least 0 and below 1; got {held_out}.")
    usable = store.lengths > 0
    codes = None
    if label is not None:
        codes = store.obs[label].cat.codes.to_numpy()
        usable &= codes >= 0
    cells = np.flatnonzero(usable)
    n_test = math.ceil(held_out * len(cells))
    if len(cells) - n_test < 1:
        raise ValueError(f"{len(cells)} usable cells: none is left to train on.")
    if not n_test:
        return store.select(cells), None
    strata = None if codes is None else codes[cells]
    if strata is not None and (n_test < len(np.unique(strata)) or np.bincount(strata)[np.unique(strata)].min() < 2):
        strata = None  # too few cells of a class to have some on both sides
    train, test = train_test_split(cells, test_size=n_test, random_state=seed, stratify=strata)
    return store.select(np.sort(train)), store.select(np.sort(test))


def finish(trainer: CellTrainer) -> dict[str, float]:
    """Train, save model, tokenizer and state, and gather the figures of the run.

    Raises
    ------
    SystemExit
        The run was told to end (SIGTERM); its last checkpoint is written.
    """
    result = trainer.train(resume_from_checkpoint=trainer.args.resume_from_checkpoint)
    if trainer.interrupted:
        print(
            f"Stopped by SIGTERM after step {trainer.state.global_step}, which is saved; go on with the same command "
            "and --resume_from_checkpoint true.",
            file=sys.stderr,
        )
        raise SystemExit(128 + signal.SIGTERM)
    trainer.save_model()
    trainer.save_state()
    metrics = {
        "train_loss": result.training_loss,
        "steps_per_second": result.metrics["train_steps_per_second"],
        "cells_per_second": result.metrics["train_samples_per_second"],
        # ru_maxrss is in KiB, on macOS in bytes.
        "peak_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        / (2**20 if sys.platform == "darwin" else 2**10),
    }
    if trainer.eval_dataset is not None:
        evaluated = trainer.evaluate()
        metrics.update({name: evaluated[name] for name in evaluated if name in _EVALUATION})
    return metrics


_EVALUATION = ("eval_loss", "eval_accuracy", "eval_macro_f1")


def print_figures(output: str, figures: dict[str, float]) -> None:
    """Print the figures of a run, in one process of many."""
    if PartialState().is_main_process:
        print(f"{output}: " + ", ".join(f"{name} {value:.4g}" for name, value in figures.items()))
