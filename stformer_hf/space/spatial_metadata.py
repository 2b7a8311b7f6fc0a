"""Read and check coordinates, sections, types, names and all else that a sampler is made of."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from .neighbor_index import NeighborIndex

logger = logging.getLogger(__name__)

# Usual names of section columns in obs: in squidpy, brainformr, the Allen atlases, and so on.
_SECTION_NAMES = {"section", "section_id", "tissue_section", "brain_section_label", "slice", "slice_id"}
_SECTION_NAMES |= {"slide", "slide_id", "library_id"}
_CELLS_LOOKED_AT = 256  # to check units
_FEWEST_CELLS = 20  # per section, to check units
_NEARLY_ALL = 0.95


def warn_of_sections(obs: pd.DataFrame) -> None:
    """Log a warning if obs has a column of sections but none was chosen: cells of all sections would be neighbours."""
    for name in obs:
        if str(name).lower() in _SECTION_NAMES and (n_sections := obs[name].nunique()) > 1:
            logger.warning(
                f"obs[{name!r}] has {n_sections} values, but all cells are treated as one section, so that cells of "
                "different ones may be neighbours: if these are tissue sections, pass "
                f"section_key={name!r} (or --section_key)."
            )
            return


def warn_of_units(index: NeighborIndex, cells: np.ndarray, patch_size: Any) -> None:
    """Warn if nearly no cell has a neighbour in its box, or if boxes hold nearly all cells of their sections.

    A part of `cells`, int64 array, is checked; `patch_size` is for the message.
    """
    cells = cells[:: max(1, len(cells) // _CELLS_LOOKED_AT)]
    n_inside, n_others = index.count(cells)
    judged = n_others + 1 >= _FEWEST_CELLS
    if judged.sum() < _FEWEST_CELLS:
        return
    cells, n_inside, n_others = cells[judged], n_inside[judged], n_others[judged]
    alone = (n_inside == 0).mean()
    if alone >= _NEARLY_ALL:
        nearest = np.median(index.nearest_distances(cells))
        logger.warning(
            f"{alone:.0%} of the checked cells have no neighbour with patch_size={patch_size}; the nearest cell is "
            f"{nearest:.3g} away (median): patch_size and the coordinates may be in different units."
        )
    elif (n_inside >= _NEARLY_ALL * n_others).mean() >= _NEARLY_ALL:
        logger.warning(
            f"Neighbourhoods with patch_size={patch_size} hold nearly all cells of their section (median "
            f"{np.median(n_inside):.0f} of {np.median(n_others):.0f}): patch_size and the coordinates may be in "
            "different units."
        )


def column_of(metadata: Any, name: str) -> np.ndarray:
    """Return a column of a pandas or polars DataFrame, array (n_cells,); it must exist."""
    if name not in metadata.columns:
        raise ValueError(f"metadata has no column {name!r}; it has {', '.join(map(repr, metadata.columns))}.")
    return np.asarray(metadata[name])


def read_points(metadata: Any, axes: Sequence[str], names: np.ndarray) -> np.ndarray:
    """Read coordinates, float64 array (n_cells, n_axes), which must be finite; `names` of cells are for errors."""
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
    """Read the section of each cell as a number, int64 array (n_cells,); zeros if `name` is None.

    All cells must have a section; their `names` are for errors.
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
    """Read cell types, int64 array (n_cells,), which must be integers from 0."""
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


def read_embeds(embeds: np.ndarray, n: int) -> np.ndarray:
    """Check the embeddings of n cells: float32 array (n, d)."""
    embeds = np.asarray(embeds, np.float32)
    if embeds.ndim != 2 or len(embeds) != n:
        raise ValueError(
            f"cell_embeds has the shape {embeds.shape}, but one row is needed for each of the {n} rows of metadata."
        )
    wrong = ~np.isfinite(embeds).all(axis=1)
    if wrong.any():
        raise ValueError(f"cell_embeds: {wrong.sum()} of {n} cells have NaN or infinite values.")
    return embeds


def as_names(names: Any) -> pd.Index:
    """Return names of cells as strings."""
    return pd.Index([str(name) for name in np.asarray(names)], dtype=object)


def rows_of(names: Any, known: Any, cell_id_colname: str) -> np.ndarray:
    """Return the row of expression of each cell of metadata: int64 array (n_cells,), -1 if it has none.

    `names` (in metadata) and `known` (with expression) are compared as strings. A name must not occur twice in
    metadata, nor in two rows of expression.
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
    """Return the row of expression of each cell of metadata, as `rows_of`; all must have one."""
    rows = rows_of(names, known, cell_id_colname)
    missing = np.flatnonzero(rows < 0)
    if len(missing):
        has = f"has names such as {str(known[0])!r}" if len(known) else "has no cells"
        raise ValueError(
            f"{len(missing)} of {len(rows)} cells of metadata have no expression, such as {str(names[missing[0]])!r} "
            f"(column {cell_id_colname!r}); expression {has}. prepare_metadata leaves out cells of only one table."
        )
    return rows
