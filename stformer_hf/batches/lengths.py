"""The lengths of rows, which samplers that group by length need instead of the tokens: read, check and write them."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
from torch.utils.data import ConcatDataset, Subset

from ..models.gene_bert.legacy_files import load_pickle
from .parts import gather


def known_lengths(lengths: Any, column: str = "length") -> np.ndarray:
    """Return the lengths of rows without reading tokens.

    Parameters
    ----------
    lengths : sequence of int, int array (n,), CellStore, datasets.Dataset, or a Subset or ConcatDataset of such
        Lengths, or an object that has them: an attribute `lengths` (for a store, the number of expressed genes per
        cell), a column of lengths, or a dataset made of such.
    column : str, default: "length"
        Name of the column.

    Returns
    -------
    int64 array (n,)

    Raises
    ------
    ValueError
        The dataset has no lengths, or they are not non-negative integers.
    """
    if isinstance(lengths, (Subset, ConcatDataset)):
        return gather(lengths, partial(known_lengths, column=column))
    if hasattr(lengths, "lengths"):
        lengths = lengths.lengths
    elif hasattr(lengths, "column_names"):
        if not hasattr(lengths, "__len__"):
            raise ValueError("The lengths of a stream are not known before it is read: use TokenBudgetBuffer.")
        if column not in lengths.column_names:
            raise ValueError(
                f"The dataset has no column `{column}`; it has {', '.join(lengths.column_names)}. Add one "
                "(CellStore.tokenize writes it), or pass a list of lengths (load_example_lengths reads one)."
            )
        lengths = lengths.with_format("arrow")[column][:].to_numpy()
    try:
        values = np.asarray(lengths)
    except (TypeError, ValueError):  # ragged
        values = np.asarray(None)
    if values.shape == (0,):
        return np.empty(0, np.int64)
    if values.ndim != 1 or values.dtype.kind not in "iu" or values.min() < 0:
        raise ValueError(
            f"Lengths must be non-negative integers, one per row; got {type(lengths).__name__} "
            f"{np.array2string(values, threshold=5, edgeitems=2)}. Pass a list of them, a CellStore, or a dataset "
            "with a column `length`."
        )
    return values.astype(np.int64)


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
    try:
        return known_lengths(lengths).tolist()
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


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
        The suffix is not .json, the dataset has neither column, or lengths are not non-negative integers.
    """
    path = Path(file_path)
    if path.suffix != ".json":
        raise ValueError(f"{path}: lengths must be written as .json.")
    names = getattr(lengths, "column_names", ())
    if "input_ids" in names and "length" not in names:
        lengths = pc.list_value_length(lengths.with_format("arrow")["input_ids"][:]).to_numpy()
    path.write_text(json.dumps(known_lengths(lengths).tolist()))
