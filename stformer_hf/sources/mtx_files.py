"""Files beside a Matrix Market file, and its rows."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from ..genes.text_files import read_columns
from .matrix_market import MtxMatrix


def file_of(path: Path, *names: str) -> Path | None:
    """Return a file with one of these names, gzipped or not: the path itself, or a file in this folder."""
    files = [name + end for name in names for end in ("", ".gz")]
    if path.name in files and path.is_file():
        return path
    return next((path / file for file in files if (path / file).is_file()), None)


def beside(file: Path, *names: str) -> Path:
    """Return the table that belongs to a matrix: the first of these names that exists, gzipped or not."""
    found = (file_of(file.parent, name) for name in names)
    table = next((table for table in found if table is not None), None)
    if table is None:
        raise ValueError(f"{file} has no {' or '.join(names)} beside it.")
    return table


def rows_of_mtx(file: Path, genes: pd.DataFrame, cells: pd.DataFrame, *, cells_in_rows: bool) -> MtxMatrix:
    """Open a Matrix Market file, and check that it matches the tables of its genes and cells."""
    matrix = MtxMatrix(file, cells_in_rows)
    n_cells, n_genes = wanted = len(cells), len(genes)
    if matrix.shape != wanted:
        hint = " Its rows and columns are swapped: transpose it." if matrix.shape == wanted[::-1] else ""
        if (n_cells - matrix.shape[0], n_genes - matrix.shape[1]) in ((0, 1), (1, 0), (1, 1)):
            hint = " A table with one extra line may have a header: remove it."
        raise ValueError(
            f"{file} has {matrix.shape[1]} features and {matrix.shape[0]} barcodes, but the tables beside it have "
            f"{n_genes} and {n_cells}.{hint}"
        )
    return matrix


def names_table(file: Path) -> pd.DataFrame:
    """Return a table without columns, indexed by the names in a file with one name per line."""
    return pd.DataFrame(index=pd.Index(read_columns(file)[0], dtype=object, name=None))
