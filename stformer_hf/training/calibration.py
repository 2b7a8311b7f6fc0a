"""Out-of-fold predictions of a classifier of cells: its calibration error, and what it needs to reject cells.

They are valid only for the weights that they were made for, of which a sketch is kept with them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from scipy.special import log_softmax
from torch import nn
from transformers.utils import cached_file

from ..evaluation.metrics import expected_calibration_error
from .loading import find_installed, is_model, unwrap

CALIBRATION_FILE = "out_of_fold.safetensors"
# bfloat16 changes the sketch of random weights by 0.0015 of their norm (standard deviation), and other machines, which
# merge adapters and add up in another order, by less than 0.0001.
_ROUNDING, _NOISE, _LEAST = 0.01, 1e-4, 1e-7
_SIGNS = np.random.RandomState(0).permutation(np.tile([-1.0, 1.0], 2049))  # the same in all versions of numpy

Sketch = dict[str, tuple[int, float, float, bool]]


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
    weights : dict of str to (int, float, float, bool), optional
        Sketch of the weights of the classifier, see `sketch_of`; None in files of earlier versions.
    """

    predictions: np.ndarray
    labels: np.ndarray
    rows: np.ndarray
    distances: np.ndarray | None = None
    centroids: np.ndarray | None = None
    weights: Sketch | None = None

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


def sketch_of(model: nn.Module) -> Sketch:
    """Return the size of each weight of a model, its norm, its sum with random signs, and if half precision holds it.

    Quantised weights are left out.
    """
    found = {}
    for name, tensor in model.state_dict().items():
        is_plain = type(tensor) is torch.Tensor and tensor.is_floating_point() and tensor.element_size() > 1
        if not is_plain or tensor.is_meta:
            continue
        weight = tensor.to("cpu", torch.float32)
        is_half = any(torch.equal(weight.to(dtype).float(), weight) for dtype in (torch.bfloat16, torch.float16))
        values = weight.numpy().ravel()
        whole = len(values) - len(values) % len(_SIGNS)
        sums = values[:whole].reshape(-1, len(_SIGNS)).sum(axis=0, dtype=np.float64)
        sums[: len(values) - whole] += values[whole:]
        found[name] = len(values), float(np.linalg.norm(values)), float(sums @ _SIGNS), is_half
    return found


def changed_weight(before: Sketch, model: nn.Module) -> str | None:
    """Return the name of a weight that differs from its sketch; None if none does.

    A weight that is, or was, in half precision may differ by as much as that rounds. Weights that are quantised now
    are not compared.
    """
    now = sketch_of(model)
    for name in filter(now.__contains__, before):
        (size, *numbers, was_half), (size_now, *numbers_now, is_half) = before[name], now[name]
        allowed = (_ROUNDING if was_half or is_half else _NOISE) * numbers[0] + _LEAST * np.sqrt(size)
        if size != size_now or not np.allclose(numbers_now, numbers, rtol=0, atol=allowed):
            return name
    return None


def sign(found: OutOfFold | Mapping[str, OutOfFold], model: nn.Module) -> None:
    """Keep a sketch of the weights of a model, whose adapters are merged, with its out-of-fold predictions."""
    sketch = sketch_of(model)
    for of in _parts(found):
        of.weights = sketch


def _parts(found: OutOfFold | Mapping[str, OutOfFold]) -> list[OutOfFold]:
    """Return the out-of-fold predictions of each label column, or those of the only one."""
    return [found] if isinstance(found, OutOfFold) else list(found.values())


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
    save_file(arrays, str(path), metadata={"weights": json.dumps(_parts(found)[0].weights)})


def load_out_of_fold(model: Any) -> OutOfFold | dict[str, OutOfFold] | None:
    """Return the out-of-fold predictions of a checkpoint (folder or name on the Hub) or a model; None if it has none.

    A model that `finetune` returned has them at `model.out_of_fold`. A model of several label columns has those of
    each.
    """
    if is_model(model):
        return getattr(unwrap(model), "out_of_fold", None)
    path = cached_file(
        find_installed(os.fspath(model)) or os.fspath(model),
        CALIBRATION_FILE,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    if path is None:
        return None
    with safe_open(path, framework="np") as file:
        weights = json.loads((file.metadata() or {}).get("weights", "null"))
    columns: dict[str, dict[str, np.ndarray]] = {}
    for key, array in load_file(path).items():
        column, _, name = key.rpartition("/")
        columns.setdefault(column, {})[name] = array
    found = {
        column: OutOfFold(
            *(of["predictions"], of["labels"], of["cell_id"], of.get("distances"), of.get("centroids"), weights)
        )
        for column, of in columns.items()
    }
    return found.get("", found)
