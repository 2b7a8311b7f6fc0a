"""What the head of a model says of a cell: one reading of its outputs, for annotations, predictions and cards."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from transformers import PreTrainedModel

from ..models.gene_bert.heads import problem_of

_OF_CELLS = ("ForClassification", "ForSequenceClassification")  # how the classes end whose outputs are of cells


@dataclass
class CellHead:
    """The head of a model that predicts something of each cell.

    Attributes
    ----------
    kind : {"single_label_classification", "multi_label_classification", "regression"}
        One of several classes; several labels, each of them there or not; one or more numbers.
    names : list of str
        Name of each output: the classes, the labels or the numbers. A single number without a name is "value".
    """

    kind: str
    names: list[str]

    def predictions(self, logits: torch.Tensor) -> torch.Tensor:
        """Turn logits into what they say: probabilities of classes or labels, or numbers.

        Parameters
        ----------
        logits : Tensor (n, n_outputs)

        Returns
        -------
        float32 Tensor (n, n_outputs)

        Raises
        ------
        ValueError
            Logits of another shape.
        """
        if logits.ndim != 2 or logits.shape[1] != len(self.names):
            raise ValueError(
                f"The model gives outputs of shape {tuple(logits.shape)}, and its configuration names "
                f"{len(self.names)} outputs per cell."
            )
        logits = logits.float()
        if self.kind == "regression":
            return logits
        return logits.sigmoid() if self.kind == "multi_label_classification" else logits.softmax(-1)

    def columns(self, predictions: np.ndarray, known: np.ndarray, prefix: str) -> dict[str, Any]:
        """Make columns of obs of predictions.

        Parameters
        ----------
        predictions : float array (n, n_outputs)
            As `predictions` gives them.
        known : bool array (n,)
            Which cells the model could read; of the others all values are missing.
        prefix : str
            What the names of the columns begin with.

        Returns
        -------
        dict of str to Categorical or float32 array (n,)
            Of classes `prefix_label`, the most probable, and `prefix_score`, its probability. Of several labels, and
            of numbers, one column `prefix_NAME` each.
        """
        if self.kind == "single_label_classification":
            codes = np.where(known, predictions.argmax(axis=1), -1)
            scores = np.where(known, predictions.max(axis=1), np.nan).astype(np.float32)
            return {f"{prefix}_label": pd.Categorical.from_codes(codes, self.names), f"{prefix}_score": scores}
        values = np.where(known[:, None], predictions, np.nan).astype(np.float32)
        return {f"{prefix}_{name}": values[:, i] for i, name in enumerate(self.names)}


def read_head(model: PreTrainedModel) -> CellHead:
    """Read what a model predicts of each cell.

    Parameters
    ----------
    model : PreTrainedModel

    Returns
    -------
    CellHead

    Raises
    ------
    ValueError
        A model that predicts nothing of a cell: a classifier of genes, a masked model, an encoder.
    """
    check_predicts_cells([type(model).__name__], "The model")
    config = model.config
    names = [str(config.id2label[i]) for i in range(config.num_labels)]
    kind = problem_of(config)
    if kind == "regression" and names == ["LABEL_0"]:
        names = ["value"]
    return CellHead(kind, names)


def predicts_cells(architectures: list[str]) -> bool:
    """Tell whether one of these classes of models predicts something of each cell, by their names."""
    return any(name.endswith(_OF_CELLS) for name in architectures)


def check_predicts_cells(architectures: list[str], what: str) -> None:
    """Refuse models that predict nothing of a cell, by the names of their classes.

    Raises
    ------
    ValueError
        None of the names is of a classifier of cells.
    """
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
    """Refuse outputs of a model that are no numbers.

    Parameters
    ----------
    outputs : float array (n, d)
    known : bool array (n,)
        Cells that the model could read.

    Raises
    ------
    ValueError
        NaN or infinity among the outputs of known cells.
    """
    n_wrong = int((~np.isfinite(outputs).all(axis=1) & known).sum())
    if n_wrong:
        raise ValueError(
            f"The model gives NaN or infinite outputs for {n_wrong} of {len(outputs)} cells: its weights are not "
            "finite (training diverged), or overflow in half precision. Nothing is written."
        )


__all__ = ["CellHead", "check_finite", "check_predicts_cells", "predicts_cells", "read_head"]
