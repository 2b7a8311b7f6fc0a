"""The cells that have a label in each label column of a classifier."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedConfig

from ...models.gene_bert.configuration_gene_bert import IGNORE
from ...models.gene_bert.heads import label_columns_of
from .linear_readers import Problem


@dataclass
class LabelledCells:
    """Cells with a label in one column, and the problem of predicting it.

    Attributes
    ----------
    column : str or None
        None if the model has one problem; its cells are then all cells.
    outputs : slice
        Outputs of the column among those of the model.
    problem : Problem
    rows : int64 array (n,)
        Rows of the cells, ascending.
    labels : array (n, …)
    """

    column: str | None
    outputs: slice
    problem: Problem
    rows: np.ndarray
    labels: np.ndarray

    def labels_of(self, rows: np.ndarray) -> np.ndarray:
        """Return the labels of some of the cells, by their rows."""
        return self.labels[np.searchsorted(self.rows, rows)]

    def named(self, name: str) -> str:
        """Return a name with that of the column before it, if the model has several."""
        return name if self.column is None else f"{self.column}_{name}"


def labelled_cells(config: PreTrainedConfig, labels: np.ndarray, balanced: bool = False) -> list[LabelledCells]:
    """Split the labels of cells, array (n, …), by the label columns of a configuration.

    With `config.label_columns`, the labels are int64 (n, n_columns), -100 where there is none.
    """
    if config.label_columns is None:
        problem = Problem(config.problem_type, config.num_labels, balanced)
        return [LabelledCells(None, slice(None), problem, np.arange(len(labels)), labels)]
    found = []
    for column, of_column in zip(label_columns_of(config), labels.T, strict=True):
        rows = np.flatnonzero(of_column != IGNORE)
        problem = Problem(config.problem_type, config.label_columns[column.name], balanced)
        found.append(LabelledCells(column.name, column.outputs, problem, rows, of_column[rows]))
    return found
