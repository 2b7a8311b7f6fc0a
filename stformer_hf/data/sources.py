"""Sources: where counts come from. Each is opened to a gene table, obs, and blocks of CSR rows of counts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
from anndata import AnnData
from anndata.io import read_elem
from scipy import sparse

from ..genes.gene_table import GeneTable

READERS: dict[str, Callable[[Path], list[Matrix]]] = {}
_PROBE_ROWS = 200
_EMPTY = "only zeros where it was looked at"


@dataclass
class Matrix:
    """One matrix of a source that may hold counts.

    Attributes
    ----------
    name : str
        `X`, `raw`, or the name of a layer.
    shape : (int, int)
        Cells, genes.
    rows : callable (start, stop) -> csr_matrix
        Reads a range of rows.
    var, obs : callable () -> DataFrame
        Read the genes of its columns and the table of its rows.
    """

    name: str
    shape: tuple[int, int]
    rows: Callable[[int, int], sparse.csr_matrix]
    var: Callable[[], pd.DataFrame]
    obs: Callable[[], pd.DataFrame]


@dataclass
class Source:
    """Counts of one file or AnnData.

    Attributes
    ----------
    name : str
        Path of the file, or `AnnData`.
    counts_in : str
        Where the counts were found: `X`, `raw`, or the name of a layer.
    genes : GeneTable
        One row a column of the matrix; an id may occur twice.
    obs : DataFrame
        One row a cell, indexed by the cells' names.
    key : dict or None
        Path, size and time of the file, by which an interrupted build knows it again; None in memory.
    """

    name: str
    counts_in: str
    genes: GeneTable
    obs: pd.DataFrame
    key: dict | None
    _matrix: Matrix
    _fractional: bool

    @property
    def shape(self) -> tuple[int, int]:
        """Cells, columns."""
        return self._matrix.shape

    def blocks(self, rows: int) -> Iterator[sparse.csr_matrix]:
        """Read the counts in order, `rows` cells at a time.

        Yields
        ------
        csr_matrix (at most rows, n_columns)
            Without explicit zeros.

        Raises
        ------
        ValueError
            Values that are not counts.
        """
        for start in range(0, self.shape[0], rows):
            block = self._matrix.rows(start, min(start + rows, self.shape[0]))
            problem = _problem(block.data, self._fractional)
            if problem:
                raise ValueError(
                    f"{self.name}: counts are needed, and {self.counts_in} holds {problem} in the cells {start} to "
                    f"{start + block.shape[0] - 1}. Name the layer that holds raw counts, as in layer='counts'."
                )
            if not block.data.all():
                block = block.copy()  # it may be a view of the user's matrix
                block.eliminate_zeros()
            yield block


def open_source(source: AnnData | str | Path, layer: str | None = None, fractional: bool = False) -> Source:
    """Open a file or an AnnData and find its counts.

    Parameters
    ----------
    source : AnnData, str or Path
        An AnnData in memory or backed, or a file of a format in `READERS`.
    layer : str, optional
        Where the counts are: `X`, `raw`, or the name of a layer. By default the first of X, raw and the layer
        `counts` that holds counts.
    fractional : bool, default: False
        Whether counts may be fractions (RSEM, SoupX).

    Returns
    -------
    Source

    Raises
    ------
    ValueError
        No counts found; the layer does not exist; a format that is not read; a file that is damaged.
    FileNotFoundError
        No such file.
    """
    if isinstance(source, AnnData):
        if source.isbacked:
            if source.is_view:
                raise ValueError("A view of a backed AnnData is not read: pass view.to_memory(), or the whole file.")
            matrices = _h5ad_matrices(Path(source.filename))
            for matrix in matrices:  # the tables of the object, which may differ from the file's
                matrix.obs = lambda: source.obs
                if matrix.name != "raw":
                    matrix.var = lambda: source.var
        else:
            matrices = _anndata_matrices(source)
        name, key = "AnnData", None
    else:
        path = Path(source)
        if not path.exists():
            raise FileNotFoundError(f"No such file: {path}")
        reader = READERS.get(path.suffix.lower())
        if reader is None or path.is_dir():
            raise ValueError(f"{path}: only {', '.join(sorted(READERS))} files and AnnData objects are read.")
        stat = path.stat()
        name, matrices = str(path), reader(path)
        key = {"path": str(path.resolve()), "bytes": stat.st_size, "modified_ns": stat.st_mtime_ns}

    matrix = _find_counts(matrices, layer, fractional, name)
    return Source(
        name=name,
        counts_in=matrix.name,
        genes=GeneTable.from_var(matrix.var()),
        obs=matrix.obs(),
        key=key,
        _matrix=matrix,
        _fractional=fractional,
    )


def _find_counts(matrices: list[Matrix], layer: str | None, fractional: bool, name: str) -> Matrix:
    by_name = {matrix.name: matrix for matrix in matrices}
    if layer is not None:
        if layer not in by_name:
            raise ValueError(f"{name} has no layer {layer!r}; it has {', '.join(by_name) or 'no matrix'}.")
        return by_name[layer]
    problems = {}
    for candidate in ("X", "raw", "counts"):
        if candidate in by_name:
            problems[candidate] = _probe(by_name[candidate], fractional)
            if problems[candidate] is None:
                return by_name[candidate]
    if _EMPTY in problems.values():  # no counts, and none elsewhere
        return by_name[next(name for name, problem in problems.items() if problem == _EMPTY)]
    holders = [matrix.name for matrix in matrices if matrix.name not in problems and not _probe(matrix, fractional)]
    found = "; ".join(f"{where} holds {problem}" for where, problem in problems.items()) or "it has no X"
    if holders:
        remedy = f"Layer {holders[0]!r} holds counts: pass layer={holders[0]!r}."
    else:
        remedy = "Keep the raw counts in X, raw or a layer, and name it with layer=…"
    raise ValueError(f"{name}: no counts found: {found}. {remedy}")


def _probe(matrix: Matrix, fractional: bool) -> str | None:
    """Look at some rows of the beginning, the middle and the end; say what is wrong with them."""
    n_rows, n_values = matrix.shape[0], 0
    for start in sorted({0, n_rows // 2, max(0, n_rows - _PROBE_ROWS)}):
        values = matrix.rows(start, min(start + _PROBE_ROWS, n_rows)).data
        problem = _problem(values, fractional)
        if problem:
            return problem
        n_values += np.count_nonzero(values)
    return None if n_values else _EMPTY


def _problem(values: np.ndarray, fractional: bool) -> str | None:
    if values.dtype.kind in "ub" or not len(values):
        return None
    if values.dtype.kind not in "if":
        return f"values of type {values.dtype}"
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        return f"{int((~np.isfinite(values)).sum())} NaN or infinite values"
    if values.min() < 0:
        return f"negative values (as low as {values.min():g})"
    if values.dtype.kind == "f" and not fractional:
        whole = values == np.rint(values)
        if not whole.all():
            return f"fractional values (such as {values[~whole][0]:g})"
    return None


# ---------------------------------------------------------------------- formats


def _anndata_matrices(adata: AnnData) -> list[Matrix]:
    def matrix(name: str, values, var: pd.DataFrame) -> Matrix:
        by_rows = values.tocsr() if getattr(values, "format", "") == "csc" else values

        def rows(start: int, stop: int) -> sparse.csr_matrix:
            return sparse.csr_matrix(by_rows[start:stop])

        return Matrix(name, values.shape, rows, lambda: var, lambda: adata.obs)

    found = [] if adata.X is None else [matrix("X", adata.X, adata.var)]
    if adata.raw is not None:
        found.append(matrix("raw", adata.raw.X, adata.raw.var))
    return found + [matrix(name, adata.layers[name], adata.var) for name in adata.layers]


def _h5ad_matrices(path: Path) -> list[Matrix]:
    try:
        file = h5py.File(path, "r")
    except OSError as error:
        raise ValueError(f"{path} is not a readable HDF5 file, or is cut short: {error}") from error
    for name in ("obs", "var"):
        if name not in file:
            raise ValueError(f"{path} is not an h5ad file: it has no {name}.")
        if not isinstance(file[name], h5py.Group):
            raise ValueError(
                f"{path} has a layout older than anndata 0.7. Write it anew: "
                "anndata.read_h5ad(path).write_h5ad(new_path)."
            )

    def matrix(name: str, key: str, var: str) -> Matrix:
        return _h5_matrix(path, name, file[key], lambda: read_elem(file[var]), lambda: read_elem(file["obs"]))

    found = [matrix("X", "X", "var")] if "X" in file else []
    if "raw" in file and "X" in file["raw"]:
        found.append(matrix("raw", "raw/X", "raw/var"))
    return found + [matrix(name, f"layers/{name}", "var") for name in file.get("layers", {})]


def _h5_matrix(path: Path, name: str, node: h5py.Group | h5py.Dataset, var: Callable, obs: Callable) -> Matrix:
    """Read a matrix of an HDF5 file by rows: CSR, or dense."""
    if isinstance(node, h5py.Dataset):

        def dense_rows(start: int, stop: int) -> sparse.csr_matrix:
            return sparse.csr_matrix(node[start:stop])

        return Matrix(name, node.shape, dense_rows, var, obs)

    shape = tuple(int(n) for n in node.attrs.get("shape", node.attrs.get("h5sparse_shape")))
    encoding = str(node.attrs.get("encoding-type", node.attrs.get("h5sparse_format", "")))

    def sparse_rows(start: int, stop: int) -> sparse.csr_matrix:
        if not encoding.startswith("csr"):
            raise ValueError(
                f"{path}: {name} is stored as {encoding or 'an unknown format'}; only CSR and dense are read. "
                "Write it by rows: adata.X = adata.X.tocsr(); adata.write_h5ad(new_path)."
            )
        indptr = node["indptr"][start : stop + 1].astype(np.int64)
        data = node["data"][indptr[0] : indptr[-1]]
        indices = node["indices"][indptr[0] : indptr[-1]]
        if len(indices) and (indices.min() < 0 or indices.max() >= shape[1]):
            raise ValueError(f"{path}: {name} is damaged: it has columns outside its {shape[1]} genes.")
        return sparse.csr_matrix((data, indices, indptr - indptr[0]), shape=(stop - start, shape[1]))

    return Matrix(name, shape, sparse_rows, var, obs)


READERS[".h5ad"] = _h5ad_matrices

__all__ = ["READERS", "Source", "open_source"]
