"""Interpret the outputs of a cell-level head, for annotations, predictions and model cards."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import torch
from transformers import PreTrainedConfig, PreTrainedModel

from ..models.gene_bert.heads import label_columns_of, output_names, problem_of

_OF_CELLS = ("ForClassification", "ForSequenceClassification")  # endings of the names of classes that predict cells


@dataclass
class CellHead:
    """The head of a model with outputs for each cell; a model of several label columns has one for each.

    Attributes
    ----------
    kind : {"single_label_classification", "multi_label_classification", "regression"}
        One class; multiple labels, each present or not; one or more numbers.
    names : list of str
        Name of each output: the classes, the labels or the numbers. A single number without a name is "value".
    column : str, optional
        Label column, if the model has several.
    outputs : slice
        Its outputs among those of the model; all by default.
    """

    kind: str
    names: list[str]
    column: str | None = None
    outputs: slice = field(default_factory=lambda: slice(None))

    def named(self, prefix: str) -> str:
        """Return a prefix of names with that of the label column, if the model has several."""
        return prefix if self.column is None else f"{prefix}_{self.column}"

    def predictions(self, logits: torch.Tensor) -> torch.Tensor:
        """Convert logits (n, num_labels) to probabilities of classes or labels, or to numbers: float32 (n, n_outputs).

        Raise a ValueError if the logits have another shape.
        """
        logits = logits[:, self.outputs] if logits.ndim == 2 else logits
        if logits.ndim != 2 or logits.shape[1] != len(self.names):
            raise ValueError(
                f"The model returns outputs of shape {tuple(logits.shape)}, but its configuration names "
                f"{len(self.names)} outputs per cell."
            )
        logits = logits.float()
        if self.kind == "regression":
            return logits
        return logits.sigmoid() if self.kind == "multi_label_classification" else logits.softmax(-1)

    def columns(self, predictions: np.ndarray, known: np.ndarray, prefix: str, top_k: int = 1) -> dict[str, Any]:
        """Convert predictions to columns of obs.

        `predictions` (n, n_outputs) are those of the method; cells that the model could not read, by `known`, bool
        (n,), have missing values.

        Returns
        -------
        dict of str to Categorical or float32 array (n,)
            For classes, `prefix_label`, the most probable one, `prefix_score`, its probability, and `prefix_margin`,
            how much higher that is than the next one (for two classes or more); then `prefix_label_2` and
            `prefix_score_2`, the next one, up to the `top_k`-th. For multiple labels and for numbers, one column
            `prefix_NAME` each.
        """
        if self.kind == "single_label_classification":
            order = np.argsort(-predictions, axis=1, kind="stable")
            best = np.where(known[:, None], np.take_along_axis(predictions, order, axis=1), np.nan).astype(np.float32)
            found = {}
            for i in range(min(top_k, len(self.names))):
                rank = f"_{i + 1}" if i else ""
                codes = np.where(known, order[:, i], -1)
                found[f"{prefix}_label{rank}"] = pd.Categorical.from_codes(codes, self.names)
                found[f"{prefix}_score{rank}"] = best[:, i]
                if i == 0 and len(self.names) > 1:
                    found[f"{prefix}_margin"] = best[:, 0] - best[:, 1]
            return found
        values = np.where(known[:, None], predictions, np.nan).astype(np.float32)
        return {f"{prefix}_{name}": values[:, i] for i, name in enumerate(self.names)}


def read_heads(model: PreTrainedModel) -> list[CellHead]:
    """Read the heads of a model that predicts cells: one for each of its label columns, else one.

    Raise a ValueError for other models: classifiers of genes, masked models and encoders.
    """
    check_predicts_cells([type(model).__name__], "The model")
    config = model.config
    kind, heads = problem_of(config), []
    for column in label_columns_of(config):
        names = output_names(config, column)
        if kind == "regression" and names == ["LABEL_0"]:
            names = ["value"]
        heads.append(CellHead(kind, names, column.name, column.outputs))
    return heads


def read_numbers(config: PreTrainedConfig) -> dict[str, int] | None:
    """Return the number of each output of a head by its name; None if its outputs have no names.

    The names are those of `id2label`. If they are all the default ones of transformers (LABEL_0, …), they are those of
    `label2id`.
    """
    ordered = {int(number): str(name) for number, name in (config.id2label or {}).items()}
    by_name = {name: number for number, name in ordered.items()}
    for numbers in (by_name, {str(name): int(number) for name, number in (config.label2id or {}).items()}):
        if any(name != _default_name(number) for name, number in numbers.items()):
            return numbers
    return None


def name_outputs(config: PreTrainedConfig, numbers: Mapping[str, int]) -> dict[str, int]:
    """Name the outputs of a head, and return the number of each by its name.

    Those without a name in `numbers` keep the default one of transformers.
    """
    names = {int(number): str(name) for name, number in numbers.items()}
    config.id2label = {number: names.get(number, _default_name(number)) for number in range(config.num_labels)}
    config.label2id = {name: number for number, name in config.id2label.items()}
    return dict(config.label2id)


def _default_name(number: int) -> str:
    return f"LABEL_{number}"


def predicts_cells(architectures: list[str]) -> bool:
    """Return whether one of these model classes, given by name, predicts cells."""
    return any(name.endswith(_OF_CELLS) for name in architectures)


def check_predicts_cells(architectures: list[str], what: str) -> None:
    """Raise a ValueError if none of these model classes, given by name, predicts cells."""
    if predicts_cells(architectures):
        return
    found = ", ".join(architectures) or "no model"
    if any("TokenClassification" in name for name in architectures):
        raise ValueError(
            f"{what} is {found}, which classifies the genes of a cell, not the cell: call it yourself, or make a "
            "classifier of cells with stformer-hf finetune."
        )
    raise ValueError(
        f"{what} is {found}, not a classifier of cells: make one with stformer-hf finetune, or embed the cells with "
        "stformer-hf embed."
    )


def check_finite(outputs: np.ndarray, known: np.ndarray) -> None:
    """Raise a ValueError if outputs (n, d) of cells that the model could read, `known`, bool (n,), are not finite."""
    n_wrong = int((~np.isfinite(outputs).all(axis=1) & known).sum())
    if n_wrong:
        raise ValueError(
            f"The model returns NaN or infinite outputs for {n_wrong} of {len(outputs)} cells: its weights are not "
            "finite (training diverged), or overflow in half precision. Nothing was written."
        )
