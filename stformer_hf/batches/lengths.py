"""Read and write the lengths of examples, which samplers that group by length need instead of the tokens."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from ..models.gene_bert.legacy_files import load_pickle


def load_example_lengths(file_path: str | Path) -> list[int]:
    """Read a list of lengths.

    Parameters
    ----------
    file_path : str or Path
        A .json file, or a pickle of older runs (.pkl, .pickle) that holds only data.

    Returns
    -------
    list of int

    Raises
    ------
    ValueError
        The file is not a list of non-negative integers, or a pickle holds more than data.
    """
    path = Path(file_path)
    if path.suffix in (".pkl", ".pickle"):
        lengths = load_pickle(path)
    else:
        try:
            lengths = json.loads(path.read_text())
        except ValueError as error:
            raise ValueError(f"{path} is not JSON: {error}. The name of a pickle must end in .pkl.") from error
    return _checked(lengths, str(path))


def write_example_lengths(lengths: Any, file_path: str | Path) -> None:
    """Write lengths as a JSON list.

    Parameters
    ----------
    lengths : sequence of int, CellStore, or datasets.Dataset
        Lengths; or a store (its number of expressed genes per cell); or a dataset with a column `length`, or else
        `input_ids`, whose offsets are read.
    file_path : str or Path
        Path that ends in .json.

    Raises
    ------
    ValueError
        The suffix is not .json, the dataset has neither column, or lengths are not integers.
    """
    path = Path(file_path)
    if path.suffix != ".json":
        raise ValueError(f"{path}: lengths must be written as .json.")
    if hasattr(lengths, "lengths"):
        lengths = lengths.lengths
    elif hasattr(lengths, "column_names"):
        lengths = _lengths_of(lengths)
    path.write_text(json.dumps(_checked(lengths, "lengths")))


def _lengths_of(dataset) -> np.ndarray:
    if "length" in dataset.column_names:
        return dataset.with_format("arrow")["length"][:].to_numpy()
    if "input_ids" not in dataset.column_names:
        raise ValueError(f"The dataset has neither length nor input_ids; it has {', '.join(dataset.column_names)}.")
    import pyarrow.compute as pc

    return pc.list_value_length(dataset.with_format("arrow")["input_ids"][:]).to_numpy()


def _checked(lengths: Iterable, name: str) -> list[int]:
    try:
        values = list(lengths) if not isinstance(lengths, (dict, str)) else None
        array = None if values is None else np.asarray(values)
    except (TypeError, ValueError):
        array = None
    if array is not None and array.shape == (0,):
        return []
    if array is None or array.ndim != 1 or array.dtype.kind not in "iu" or array.min() < 0:
        raise ValueError(f"{name}: must be a list of non-negative integers.")
    return array.tolist()


__all__ = ["load_example_lengths", "write_example_lengths"]
