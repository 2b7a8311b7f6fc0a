"""Read and check coordinates, sections, types and names in tables of cells."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

logger = logging.getLogger(__name__)

# Usual names of section columns in obs: in squidpy, brainformr, the Allen atlases, and so on.
_SECTION_NAMES = {"section", "section_id", "tissue_section", "brain_section_label", "slice", "slice_id"}
_SECTION_NAMES |= {"slide", "slide_id", "library_id"}


def warn_of_sections(obs: pd.DataFrame) -> None:
    """Log a warning if obs has a column of sections but none was chosen: cells of all sections would be neighbours.

    Parameters
    ----------
    obs : DataFrame
        One row per cell.
    """
    for name in obs:
        if str(name).lower() in _SECTION_NAMES and (n_sections := obs[name].nunique()) > 1:
            logger.warning(
                f"obs[{name!r}] has {n_sections} values, but all cells are treated as one section, so that cells of "
                "different ones may be neighbours: if these are tissue sections, pass "
                f"section_key={name!r} (or --section_key)."
            )
            return


def column_of(metadata: Any, name: str) -> np.ndarray:
    """Return a column of a pandas or polars DataFrame: array (n_cells,).

    Raises
    ------
    ValueError
        The column is missing.
    """
    if name not in metadata.columns:
        raise ValueError(f"metadata has no column {name!r}; it has {', '.join(map(repr, metadata.columns))}.")
    return np.asarray(metadata[name])


def read_points(metadata: Any, axes: Sequence[str], names: np.ndarray) -> np.ndarray:
    """Read coordinates: float64 array (n_cells, n_axes).

    Parameters
    ----------
    metadata : DataFrame
    axes : sequence of str
        Columns.
    names : array (n_cells,)
        Names of the cells, for errors.

    Raises
    ------
    ValueError
        A column is missing; coordinates are not numbers, or are missing or infinite.
    """
    columns = [column_of(metadata, axis) for axis in axes]
    try:
        points = np.column_stack([column.astype(np.float64) for column in columns])
    except (TypeError, ValueError) as error:
        raise ValueError(f"The columns {', '.join(map(repr, axes))} do not hold numbers: {error}.") from error
    wrong = np.flatnonzero(~np.isfinite(points).all(axis=1))
    if len(wrong):
        raise ValueError(
            f"{len(wrong)} of {len(points)} cells have no finite coordinates in {', '.join(map(repr, axes))}, such as "
            f"{names[wrong[0]]}: remove them first."
        )
    return points


def read_sections(metadata: Any, name: str | None, names: np.ndarray) -> np.ndarray:
    """Read the section of each cell as a number: int64 array (n_cells,); zeros if `name` is None.

    Parameters
    ----------
    metadata : DataFrame
    name : str or None
        Column.
    names : array (n_cells,)
        Names of the cells, for errors.

    Raises
    ------
    ValueError
        The column is missing; a cell has no section.
    """
    if name is None:
        return np.zeros(len(names), np.int64)
    if name not in metadata.columns:
        raise ValueError(
            f"metadata has no column {name!r} of tissue sections; it has {', '.join(map(repr, metadata.columns))}. "
            "Pass the right one as tissue_section_colname, or None if all cells are in one section."
        )
    codes, _ = pd.factorize(column_of(metadata, name))
    wrong = np.flatnonzero(codes < 0)
    if len(wrong):
        raise ValueError(
            f"{len(wrong)} of {len(codes)} cells have no section in {name!r}, such as {names[wrong[0]]}: remove them "
            "first."
        )
    return codes.astype(np.int64)


def read_types(metadata: Any, name: str) -> np.ndarray:
    """Read cell types: int64 array (n_cells,).

    Raises
    ------
    ValueError
        The column is missing, or does not hold integers from 0.
    """
    types = column_of(metadata, name)
    if types.dtype.kind == "O" and pd.api.types.infer_dtype(types, skipna=False) == "integer":
        types = types.astype(np.int64)
    if types.dtype.kind not in "iu":
        missing = ", some missing" if pd.isna(types).any() else ""
        raise ValueError(
            f"The column {name!r} holds values of type {types.dtype}{missing}; cell types must be integers from 0, as "
            "prepare_metadata makes them."
        )
    if types.min(initial=0) < 0:
        raise ValueError(f"The column {name!r} holds {types.min()}; cell types must be integers from 0.")
    return types.astype(np.int64)


def as_names(names: Any) -> pd.Index:
    """Return names of cells as strings."""
    return pd.Index([str(name) for name in np.asarray(names)], dtype=object)


def rows_of(names: Any, known: Any, cell_id_colname: str) -> np.ndarray:
    """Return the row of expression of each cell of metadata: int64 array (n_cells,), -1 if it has none.

    Parameters
    ----------
    names, known : array
        Names in metadata, and names with expression; compared as strings.
    cell_id_colname : str
        For errors.

    Raises
    ------
    ValueError
        A name occurs twice in metadata, or in two rows of expression.
    """
    names, known = as_names(names), as_names(known)
    if not names.is_unique:
        raise ValueError(
            f"{names[names.duplicated()][0]!r} occurs twice in the column {cell_id_colname!r}: a cell needs one row "
            "of metadata."
        )
    repeats = known.duplicated()
    ambiguous = known[repeats].intersection(names)
    if len(ambiguous):
        raise ValueError(f"{ambiguous[0]!r} is the name of two rows of expression: make the names unique.")
    first = np.append(np.flatnonzero(~repeats), -1)  # the last entry is for cells without expression
    return first[known[~repeats].get_indexer(names)]


def match_cells(names: Any, known: Any, cell_id_colname: str) -> np.ndarray:
    """Return the row of expression of each cell of metadata, as `rows_of`; all must have one.

    Raises
    ------
    ValueError
        As for `rows_of`; a cell has no expression.
    """
    rows = rows_of(names, known, cell_id_colname)
    missing = np.flatnonzero(rows < 0)
    if len(missing):
        has = f"has names such as {str(known[0])!r}" if len(known) else "has no cells"
        raise ValueError(
            f"{len(missing)} of {len(rows)} cells of metadata have no expression, such as {str(names[missing[0]])!r} "
            f"(column {cell_id_colname!r}); expression {has}. prepare_metadata leaves out cells of only one table."
        )
    return rows


__all__ = [
    "as_names",
    "column_of",
    "match_cells",
    "read_points",
    "read_sections",
    "read_types",
    "rows_of",
    "warn_of_sections",
]
