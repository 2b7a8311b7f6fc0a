"""Choose for how many epochs to train a classifier beyond its start, by inner cross-validation."""

from __future__ import annotations

import copy
import tempfile
import time
from dataclasses import replace
from typing import Any

import numpy as np
from tqdm.auto import tqdm
from transformers import PrinterCallback, TrainerCallback, TrainerState, TrainingArguments

from .calibration import OutOfFold
from .log_lines import log_wait
from .prepared_classifier import Finetuning, predict
from .starts.classifier_start import start_classifier
from .starts.labelled_cells import LabelledCells, labelled_cells
from .starts.linear_readers import inner_folds

MOST_EPOCHS = 3
N_FOLDS = 2
_STEPS_TIMED = 10
FEW_LABELS = 50  # cells of the median class: with fewer, fine-tuning lowers the start more often than not


def choose_epochs(
    prepared: Finetuning, labels: np.ndarray, groups: np.ndarray | None, arguments: TrainingArguments
) -> tuple[float, dict[str, Any], dict[str | None, OutOfFold] | None]:
    """Choose for how many epochs to train beyond the start, 0 included.

    In each of 2 inner folds the start is fitted to the fold's training cells, trained for 3 epochs, and scored on the
    fold's other cells at the start and after each epoch. The number of epochs with the best mean score is taken if
    training beats the start by more than the standard error of the difference over cells, else 0. That difference is
    cross-fitted: each fold is scored at the epoch that is best in the other fold, because the best of three epochs
    flatters training on the cells that chose it. If no epoch beats the start in the first fold, the result is 0
    without trying the second; if the median class has fewer than 50 cells, or there is only one class, it is 0 without
    trying. For several label columns, the score of a cell is the mean over its labels, and the median class of each
    column must have 50 cells.

    `prepared` is the classifier with its start, `labels` (n, …) are those of its cells; `groups` (n,) are as in
    `inner_folds`.

    Returns
    -------
    epochs : float
    facts : dict
        `fine_tuning`, the reason; `inner_scores`, the mean score at the start and after each epoch, if it was tried.
    out_of_fold : dict of str to OutOfFold, or None
        Outputs for the cells of the inner folds after that number of epochs, by label column; None if it is 0.

    Notes
    -----
    The regularisation and weights of the linear models may have been chosen on the same cells, and are kept in every
    fold; the models themselves, and the axes of the views, are fitted within each fold.
    """
    model = prepared.model
    if not prepared.start:
        return 0, {"fine_tuning": "none: there is only one class"}, None
    columns = labelled_cells(model.config, labels)
    for column in columns:
        of_classes = column.problem.kind == "single_label_classification"
        per_class = np.bincount(column.labels) if of_classes else np.array([len(labels)])
        median = int(np.median(per_class[per_class > 0]))
        if median < FEW_LABELS:
            which = "" if column.column is None else f" of {column.column}"
            why = f"none: the median class{which} has {median} cells, fewer than {FEW_LABELS}"
            return 0, {"fine_tuning": why}, None

    def cell_scores(outputs: np.ndarray, cells: np.ndarray) -> np.ndarray:
        total, n_labels = np.zeros((2, len(cells)))
        for column in columns:
            has = np.isin(cells, column.rows)
            total[has] += column.problem.cell_scores(outputs[has, column.outputs], column.labels_of(cells[has]))
            n_labels += has
        return total / n_labels

    folds = inner_folds(columns[0].problem, labels, groups, arguments.seed, prepared.twins)[:N_FOLDS]
    outputs, scores = [], []
    for train, held_out, _ in folds:
        outputs.append(_outputs_of_epochs(prepared, labels, train, held_out, arguments))
        scores.append(np.stack([cell_scores(of, held_out) for of in outputs[-1]], axis=1))
        if (scores[0].mean(axis=0)[1:] <= scores[0][:, 0].mean()).all():
            break
    overall = np.concatenate(scores).mean(axis=0)
    best = int(overall.argmax())
    facts: dict[str, Any] = {"inner_scores": [round(float(score), 4) for score in overall]}
    gain, error = _gain_over_start(*scores) if best else (0.0, 0.0)
    if gain <= error:
        return 0, {**facts, "fine_tuning": "none: it did not beat the start by more than its standard error"}, None
    facts["fine_tuning"] = f"{best} epochs: {gain:+.4f} over the start (standard error {error:.4f})"
    tried = [(train, held_out, of[best]) for (train, held_out, _), of in zip(folds, outputs, strict=True)]
    return best, facts, {column.column: _out_of_fold(column, tried) for column in columns}


def _out_of_fold(column: LabelledCells, tried: list[tuple[np.ndarray, np.ndarray, np.ndarray]]) -> OutOfFold:
    """Return the outputs of a label column for the held-out cells of folds: (training rows, held-out rows, outputs).

    Cells whose class the fold could not learn say nothing about calibration, and are left out; see `choose_readers`.
    """
    parts = []
    for train, held_out, outputs in tried:
        known, has = train[np.isin(train, column.rows)], np.isin(held_out, column.rows)
        rows = held_out[has]
        counts, labels = column.problem.that_count(column.labels_of(known), column.labels_of(rows))
        parts.append((outputs[has][counts, column.outputs], labels[counts], rows[counts]))
    predictions, labels, rows = map(np.concatenate, zip(*parts, strict=True))
    return OutOfFold(predictions, labels, rows)


def _gain_over_start(first: np.ndarray, second: np.ndarray) -> tuple[float, float]:
    """Return the mean gain of training over the start, and its standard error over the cells of two folds.

    Both take the scores of a fold's cells at the start and after each epoch, (n_cells, 1 + epochs). The epoch of one
    fold is the best of the other fold.
    """
    gains = [
        of[:, 1 + other[:, 1:].mean(axis=0).argmax()] - of[:, 0] for of, other in ((first, second), (second, first))
    ]
    gain = np.concatenate(gains)
    return float(gain.mean()), float(gain.std(ddof=1) / np.sqrt(len(gain)))


def _outputs_of_epochs(
    prepared: Finetuning, labels: np.ndarray, train: np.ndarray, held_out: np.ndarray, arguments: TrainingArguments
) -> np.ndarray:
    """Train on one part, and predict another at the start and after each epoch: (1 + epochs, n, n_outputs)."""
    model, start = copy.deepcopy(prepared.model), prepared.start
    assert start  # without one, choose_epochs tries nothing
    cells, others = prepared.cells.select(train), prepared.cells.select(held_out)
    fold = replace(prepared, model=model, cells=cells, num_train_epochs=MOST_EPOCHS)
    labelled = {of.column: of.rows for of in labelled_cells(model.config, labels)}
    rotated = {
        name: (of.rotated[0][np.isin(labelled[name], train)], of.rotated[1])
        for name, of in start.items()
        if of.rotated is not None and len(of.rotated[0]) == len(labelled[name])
    }
    start_classifier(
        model,
        prepared.tokenizer,
        cells,
        labels[train],
        new_embedding=prepared.new_embedding,
        seed=arguments.seed,
        balanced=prepared.balanced,
        choices={name: of.choice for name, of in start.items()},
        rotated=rotated if len(rotated) == len(start) else None,
    )

    class PredictEpochs(TrainerCallback):
        def on_train_begin(self, args: TrainingArguments, state: TrainerState, *_: Any, **__: Any) -> None:
            self.bar = tqdm(total=state.max_steps, desc="try fine-tuning", unit="step", disable=None)

        def on_step_end(self, args: TrainingArguments, state: TrainerState, *_: Any, **__: Any) -> None:
            self.bar.update()
            if state.global_step == 1:
                self.began = time.monotonic()  # the first step takes longer
            elif state.global_step == 1 + _STEPS_TIMED:
                seconds = (time.monotonic() - self.began) / _STEPS_TIMED * state.max_steps
                what = f"Trying {MOST_EPOCHS} epochs in one of {N_FOLDS} folds (num_train_epochs=0 skips this)"
                log_wait(what, seconds)

        def on_epoch_end(self, *_: Any, **__: Any) -> None:
            outputs.append(predict(fold.model, fold.tokenizer, others))

        def on_train_end(self, *_: Any, **__: Any) -> None:
            self.bar.close()

    with tempfile.TemporaryDirectory() as folder:
        inner = copy.copy(arguments)
        inner.output_dir, inner.max_steps = folder, -1
        inner.save_strategy = inner.eval_strategy = inner.logging_strategy = "no"
        inner.push_to_hub, inner.report_to, inner.disable_tqdm = False, [], True
        trainer = fold.trainer(inner, callbacks=[PredictEpochs()])
        trainer.remove_callback(PrinterCallback)  # its losses would look like those of the final model
        outputs = [predict(fold.model, fold.tokenizer, others)]
        trainer.train()
    return np.stack(outputs)
