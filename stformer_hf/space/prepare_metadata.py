"""prepare_metadata: convert a table of cells, as atlases provide it, to the input of `CenterMaskSampler`."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from anndata import AnnData
from sklearn.preprocessing import LabelEncoder

from ..store.cell_store import CellStore
from .neighbor_index import NeighborIndex
from .spatial_metadata import as_names, column_of, read_points, read_sections, rows_of, warn_of_units

logger = logging.getLogger(__name__)


class PreparedMetadata(NamedTuple):
    """Result of `prepare_metadata`.

    Attributes
    ----------
    metadata : DataFrame
        DataFrame of the same library as the input: the columns of names (strings), of types, of sections, the integers
        `cell_type`, and `x`, `y` (and `z`), float64. The index is new.
    adata : AnnData or CellStore
        The same cells, in the same order: a view, or a selection.
    encoder : LabelEncoder
        Encoder of cell types; `encoder.classes_` are their names.
    n_without_expression, n_without_metadata : int
        Numbers of cells of metadata, and of `adata`, that were left out.
    """

    metadata: Any
    adata: AnnData | CellStore
    encoder: LabelEncoder
    n_without_expression: int
    n_without_metadata: int


def prepare_metadata(
    metadata: Any,
    adata: AnnData | CellStore,
    *,
    x: str = "x",
    y: str = "y",
    z: str | None = None,
    scale: float = 1.0,
    cell_id_colname: str = "cell_label",
    cell_type_colname: str = "cell_type",
    tissue_section_colname: str | None = "brain_section_label",
    encoder: LabelEncoder | None = None,
    patch_size: float | Sequence[float] | None = None,
) -> PreparedMetadata:
    """Prepare a table of cells for `CenterMaskSampler`, and keep the cells with both metadata and expression.

    Parameters
    ----------
    metadata : pandas or polars DataFrame
        One row per cell.
    adata : AnnData or CellStore
        Expression.
    x, y : str, default: "x", "y"
        Columns of coordinates.
    z : str, optional
        Column of the third coordinate.
    scale : float, default: 1.0
        Factor of the coordinates, such as 1,000 from mm to um.
    cell_id_colname : str, default: "cell_label"
        Column with the names of cells; compared as strings.
    cell_type_colname : str, default: "cell_type"
        Column of types. They are encoded in the column `cell_type`; if both are the same column, codes replace the
        names.
    tissue_section_colname : str or None, default: "brain_section_label"
        Column of sections; None means that all cells form one section.
    encoder : LabelEncoder, optional
        Encoder of other cells, such as another animal's, to get the same codes; by default one is fitted to the cells
        that are kept.
    patch_size : float or sequence of float, optional
        The sampler's patch size: a warning is logged if it cannot be in the units of the scaled coordinates.

    Returns
    -------
    PreparedMetadata
        Input of `CenterMaskSampler(prepared.metadata, prepared.adata, …)`, with the same names of columns, except
        `cell_type`, `x`, `y` and `z`.

    Raises
    ------
    ValueError
        A column is missing; a name occurs twice; no cell is in both tables; kept cells have coordinates that are not
        finite, or missing types or sections; the encoder does not know a type; the scale is not positive; a column of
        names, types or sections would get the name of another column of the result.
    """
    if not 0 < scale < np.inf:
        raise ValueError(f"scale={scale}: must be a positive number.")
    _check_colnames(cell_id_colname, cell_type_colname, tissue_section_colname, "xy" if z is None else "xyz")
    names = column_of(metadata, cell_id_colname)
    types = column_of(metadata, cell_type_colname)
    axes = [x, y] if z is None else [x, y, z]
    known = (adata.obs.index if isinstance(adata, CellStore) else adata.obs_names).to_numpy()
    rows = rows_of(names, known, cell_id_colname)
    kept = np.flatnonzero(rows >= 0)
    n_without_expression, n_without_metadata = len(rows) - len(kept), len(known) - len(kept)
    if not len(kept):
        examples = f"{_example(names)} and {_example(known)}"
        raise ValueError(f"No cell is in both tables, with names such as {examples}: choose the right column.")
    if n_without_expression or n_without_metadata:
        logger.warning(
            f"{len(kept)} cells are kept; {n_without_expression} without expression and {n_without_metadata} without "
            "metadata are left out."
        )
    table = pd.DataFrame({name: column_of(metadata, name)[kept] for name in axes})
    points = read_points(table, axes, names[kept]) * scale
    codes, encoder = _encode(types[kept], cell_type_colname, encoder)
    columns = {cell_id_colname: as_names(names[kept]).to_numpy(), cell_type_colname: types[kept]}
    if tissue_section_colname is not None:
        if tissue_section_colname in metadata.columns:
            columns[tissue_section_colname] = column_of(metadata, tissue_section_colname)[kept]
    columns |= {"cell_type": codes, **dict(zip("xyz", points.T.copy(), strict=False))}
    sections = read_sections(pd.DataFrame(columns), tissue_section_colname, names[kept])
    if patch_size is not None:
        warn_of_units(NeighborIndex(points, sections, patch_size), np.arange(len(points)), patch_size)
    return PreparedMetadata(
        type(metadata)(columns),
        adata.select(rows[kept]) if isinstance(adata, CellStore) else adata[rows[kept]],
        encoder,
        n_without_expression,
        n_without_metadata,
    )


def _check_colnames(of_ids: str, of_types: str, of_sections: str | None, axes: str) -> None:
    """Raise if two columns of the result would have the same name; codes may replace the types."""
    made = ["cell_type", *axes]
    for option, name in (("cell_id", of_ids), ("cell_type", of_types), ("tissue_section", of_sections)):
        if name in made and (option, name) != ("cell_type", "cell_type"):
            raise ValueError(
                f"{option}_colname={name!r}: the columns {', '.join(map(repr, made))} of the result are the codes of "
                "types and the coordinates; rename that column of metadata first."
            )
    if of_ids in (of_types, of_sections):
        other = "cell_type" if of_ids == of_types else "tissue_section"
        raise ValueError(f"cell_id_colname and {other}_colname are both {of_ids!r}: they need separate columns.")


def _example(names: Any) -> str:
    return repr(str(names[0])) if len(names) else "none"


def _encode(types: np.ndarray, name: str, encoder: LabelEncoder | None) -> tuple[np.ndarray, LabelEncoder]:
    """Encode types: int64 array (n_cells,)."""
    missing = pd.isna(types)
    if missing.any():
        raise ValueError(
            f"{missing.sum()} of {len(types)} cells have no type in {name!r}: fill it in, for example with 'unknown', "
            "or remove them from metadata first."
        )
    if types.dtype == object:
        types = types.astype(str)
    if encoder is None:
        encoder = LabelEncoder().fit(types)
    unknown = np.setdiff1d(types, encoder.classes_)
    if len(unknown):
        raise ValueError(
            f"The encoder does not know {len(unknown)} types of {name!r}, such as {str(unknown[0])!r}: remove their "
            "cells, or fit an encoder to the types of all cells (encoder=LabelEncoder().fit(…))."
        )
    return encoder.transform(types).astype(np.int64), encoder
