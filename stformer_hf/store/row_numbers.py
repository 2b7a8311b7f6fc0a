"""Convert an index (row numbers, a slice or a mask) to row numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd


def check_mask(index: Any, n_rows: int, names: Callable[[], Any], table: str) -> None:
    """Raise IndexError for a boolean Series in another order than the rows, which would select other ones.

    `names` returns the index of `table`, and is called only if needed; 0 to n_rows - 1 is an order, too. Anything else
    passes.
    """
    if not isinstance(index, pd.Series) or not pd.api.types.is_bool_dtype(index) or len(index) != n_rows:
        return
    if not index.index.equals(pd.RangeIndex(n_rows)) and not np.array_equal(index.index, names()):
        raise IndexError(
            f"The mask is a Series with another index than {table.rpartition('.')[2]}: pass mask.loc[{table}.index], "
            "or mask.to_numpy() if it is in the order of the cells."
        )


def row_numbers(index: Any, n_rows: int, of: str) -> np.ndarray:
    """Convert an index to row numbers, int64 array (n,), or raise IndexError.

    It is an int, a slice, a sequence of int in any order, with repeats and negative ones, or a boolean mask; `of` is
    what has the rows, for messages.
    """
    if isinstance(index, slice):
        return np.arange(*index.indices(n_rows), dtype=np.int64)
    rows = np.atleast_1d(np.asarray(index))
    if rows.ndim > 1:
        raise IndexError(f"Row numbers must be one-dimensional, got an array of shape {rows.shape}.")
    if rows.dtype == bool:
        if len(rows) != n_rows:
            raise IndexError(f"The mask has {len(rows)} values, but the {of} has {n_rows} cells.")
        return np.flatnonzero(rows)
    if not len(rows):
        return np.empty(0, np.int64)
    if rows.dtype.kind not in "iu":
        raise IndexError(f"Row numbers must be integers, got {rows.dtype}.")
    if rows.dtype == np.uint64 and rows.max() >= n_rows:
        raise IndexError(f"Row {rows.max()} is outside the {of} of {n_rows} cells.")
    rows = rows.astype(np.int64, copy=False)
    if rows.view(np.uint64).max() >= n_rows:  # some are negative, or outside
        outside = rows[(rows < -n_rows) | (rows >= n_rows)]
        if len(outside):
            raise IndexError(f"Row {outside[0]} is outside the {of} of {n_rows} cells.")
        rows = np.where(rows < 0, rows + n_rows, rows)
    return rows
