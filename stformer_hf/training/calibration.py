"""Out-of-fold predictions of a classifier of cells: its calibration error, and what it needs to reject cells."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file
from scipy.special import log_softmax
from transformers.utils import cached_file

from ..evaluation.metrics import expected_calibration_error
from .loading import find_installed

CALIBRATION_FILE = "out_of_fold.safetensors"


@dataclass
class OutOfFold:
    """Predictions of training cells, each by a classifier that has not seen the cell.

    Attributes
    ----------
    predictions : float32 array (n, n_outputs)
        Log probabilities of classes, logits of multiple labels per cell, or numbers.
    labels : array (n, …)
        Classes, labels or numbers of these cells.
    rows : int64 array (n,)
        Their rows in the store.
    distances : float32 array (n,), optional
        Distance of the state of each cell to the nearest centroid of a class, by a model that has not seen it.
    centroids : float32 array (n_classes, d), optional
        Mean states of the classes, for the distances of other cells.
    """

    predictions: np.ndarray
    labels: np.ndarray
    rows: np.ndarray
    distances: np.ndarray | None = None
    centroids: np.ndarray | None = None

    def facts(self, temperature: float) -> dict[str, float]:
        """Return the temperature of a classifier of classes, and its calibration error without and with it."""
        outputs = self.predictions.astype(np.float64)
        errors = [
            expected_calibration_error(np.exp(log_softmax(outputs * scale, axis=1)), self.labels)
            for scale in (temperature, 1.0)
        ]
        return {
            "temperature": round(temperature, 3),
            "calibration_error_without_temperature": round(errors[0], 4),
            "calibration_error": round(errors[1], 4),
        }


def replace_out_of_fold(folder: str | Path, found: OutOfFold | Mapping[str, OutOfFold] | None) -> None:
    """Write the out-of-fold predictions of a model, by label column if it has several, into its folder.

    Those of an earlier model are removed.
    """
    path = Path(folder) / CALIBRATION_FILE
    path.unlink(missing_ok=True)
    if found is None:
        return
    arrays: dict[str, np.ndarray] = {}
    for column, of in ({"": found} if isinstance(found, OutOfFold) else found).items():
        prefix = f"{column}/" if column else ""
        fields: dict[str, Any] = dict(predictions=of.predictions, labels=of.labels, cell_id=of.rows.astype(np.int64))
        fields |= {} if of.distances is None else {"distances": of.distances, "centroids": of.centroids}
        arrays |= {prefix + name: np.ascontiguousarray(array) for name, array in fields.items()}
    save_file(arrays, str(path))


def load_out_of_fold(model: Any) -> OutOfFold | dict[str, OutOfFold] | None:
    """Return the out-of-fold predictions of a checkpoint (folder or name on the Hub) or a model; None if it has none.

    A model that `finetune` returned has them at `model.out_of_fold`. A model of several label columns has those of
    each.
    """
    if not isinstance(model, (str, os.PathLike)):
        return getattr(model, "out_of_fold", None)
    path = cached_file(
        find_installed(os.fspath(model)) or os.fspath(model),
        CALIBRATION_FILE,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    if path is None:
        return None
    columns: dict[str, dict[str, np.ndarray]] = {}
    for key, array in load_file(path).items():
        column, _, name = key.rpartition("/")
        columns.setdefault(column, {})[name] = array
    found = {
        column: OutOfFold(of["predictions"], of["labels"], of["cell_id"], of.get("distances"), of.get("centroids"))
        for column, of in columns.items()
    }
    return found.get("", found)
