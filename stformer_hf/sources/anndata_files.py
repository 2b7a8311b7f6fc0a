"""AnnData in memory, and the files that hold one: h5ad, h5mu and zarr."""

from __future__ import annotations

import errno
import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd
from anndata import AnnData
from anndata.io import read_elem, read_h5ad

from ..genes.gene_table import GeneTable
from ..models.gene_bert.cell_counts import split_features
from ..models.gene_bert.cell_tables import choose_table, join_obs
from ..models.gene_bert.feature_types import GENES
from .matrices import ColumnMatrix, CompressedMatrix, DenseMatrix, FileHandle, Matrix, MemoryMatrix, Selection
from .registry import Layer, reads

logger = logging.getLogger(__name__)

_NOT_HDF5 = {  # first bytes of files that are not HDF5, and the remedy
    b"\x1f\x8b": "It is compressed with gzip: unpack it.",
    b"PK\x03\x04": "It is a zip archive: unpack it.",
    b"version https://git-lfs": "It is a pointer of Git LFS: fetch the file itself (git lfs pull).",
    b"<": "It is a web page, as left by a failed download: download the file again.",
}
_SPATIAL = ("tables", "table", "images", "labels", "shapes", "points")  # groups of a SpatialData


def _read_table(handle: FileHandle, key: str) -> pd.DataFrame:
    """Read obs or var of an AnnData file, and close it."""
    if key not in handle:
        raise ValueError(f"{handle.path} is damaged: it has no {handle.root}{key}.")
    found = _read_obs(handle) if key == "obs" else read_elem(handle[key])
    handle.close()
    return found


@dataclass(frozen=True)
class Tables:
    """The modalities of a MuData file, or the tables of a SpatialData file; one of them is read."""

    kind: str  # "modality" or "table"
    places: dict[str, FileHandle]  # of the AnnData of each
    obs: Callable[[], pd.DataFrame] | None = None  # reads the obs of the MuData

    def choose(self, layer: str | None, source: str) -> tuple[str, str | None]:
        """Choose a modality or table, and the layer in it; see `choose_table`."""
        try:
            tables = {name: partial(_read_table, place, "var") for name, place in self.places.items()}
            return choose_table(tables, layer, source, self.kind)
        finally:
            for place in self.places.values():
                place.close()

    def layers(self, name: str) -> list[Layer]:
        """Return the matrices of a modality or table."""
        return anndata_layers_at(self.places[name], lambda obs: self.join(obs, name))

    def join(self, obs: pd.DataFrame, name: str) -> pd.DataFrame:
        """Add the columns of the MuData to the obs of a modality."""
        return obs if self.obs is None else join_obs(obs, self.obs(), name)


def anndata_layers(adata: AnnData, obs: pd.DataFrame | None = None) -> list[Layer]:
    """Return the matrices of an AnnData (in memory or backed, whole or a view), optionally with another obs."""

    def layer(name: str, matrix: Matrix, var: pd.DataFrame) -> list[Layer]:
        return by_feature_type(name, matrix, var, lambda: adata.obs if obs is None else obs, neighbors, adata.var)

    def neighbors(key: str) -> Matrix:
        return MemoryMatrix(adata.obsp[key])

    if adata.isbacked:
        rows = columns = None
        if adata.is_view:  # anndata does not expose which rows of the file these are
            parent = adata._adata_ref
            rows, columns = np.arange(parent.n_obs)[adata._oidx], np.arange(parent.n_vars)[adata._vidx]
        # A modality of a MuData is not at the root of the file.
        handle = FileHandle(Path(adata.filename), open_hdf5, adata.file["obs"].name.removeprefix("/")[: -len("obs")])
        return [
            part
            for name, key in _matrices(handle)
            for part in layer(
                name,
                Selection(_on_disk(handle, key), rows, None if name == "raw" else columns),
                adata.raw.var if name == "raw" else adata.var,
            )
        ]
    found = [] if adata.X is None else layer("X", MemoryMatrix(adata.X), adata.var)
    if adata.raw is not None:
        found += layer("raw", MemoryMatrix(adata.raw.X), adata.raw.var)
    for name in filter(None, adata.layers):  # from anndata 0.13 on, X is among them, as None
        found += layer(name, MemoryMatrix(adata.layers[name]), adata.var)
    return found


def by_feature_type(
    name: str,
    matrix: Matrix,
    var: pd.DataFrame,
    obs: Callable[[], pd.DataFrame],
    neighbors: Callable[[str], Matrix] | None = None,
    whole_var: pd.DataFrame | None = None,
) -> list[Layer]:
    """Return the genes of a matrix as one layer; for X also one layer per other feature type, such as antibodies."""
    columns = split_features(var, whole_var if name == "raw" else None)
    if columns is None:
        return [Layer(name, matrix, lambda: GeneTable.from_var(var), obs, neighbors)]

    def part(kind: str, some: np.ndarray) -> Layer:
        own = Selection(matrix, None, some)
        return Layer(kind, own, lambda: GeneTable.from_var(var.iloc[some]), obs, neighbors, matrix)

    return [
        part(name if kind == GENES else kind, some) for kind, some in columns.items() if kind == GENES or name == "X"
    ]


def open_hdf5(path: Path) -> h5py.File:
    """Open an HDF5 file; the error for another file says what it is."""
    try:
        return h5py.File(path, "r")
    except BlockingIOError as error:
        raise ValueError(f"{path} is open for writing elsewhere. Close it, or open it with backed='r'.") from error
    except OSError as error:
        if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOENT):
            raise  # not the file's fault
        with open(path, "rb") as file:
            begin = file.read(32).lstrip()
        hint = next((f" {hint}" for known, hint in _NOT_HDF5.items() if begin.startswith(known)), "")
        raise ValueError(f"{path} is not a readable HDF5 file, or is truncated: {error}.{hint}") from error


def _open_zarr(path: Path) -> Any:
    import zarr

    if path.is_dir():
        return zarr.open_group(str(path), mode="r")
    return zarr.open_group(zarr.storage.ZipStore(path, mode="r"), mode="r")


def _is_zarr(path: Path) -> bool:
    is_zarr = path.name.endswith((".zarr", ".zarr.zip")) or any(
        (path / name).exists() for name in (".zgroup", "zarr.json")
    )
    return is_zarr and not _is_collection(path)


def _is_collection(path: Path) -> bool:
    """Return whether a zarr group holds whole AnnData, as annbatch's collections do; it is read as any folder is."""
    return path.is_dir() and not (path / "obs").exists() and any(map(_has_tables, path.iterdir()))


def _has_tables(path: Path) -> bool:
    return (path / "obs").exists() and (path / "var").exists()  # the tables of a SpatialData may have one such name


@reads("h5mu", lambda path: path.suffix.lower() == ".h5mu" and path.is_file())
@reads("h5ad", lambda path: path.suffix.lower() == ".h5ad" and path.is_file())
def read_anndata_file(path: Path, opener: Callable[[Path], Any] = open_hdf5) -> list[Layer] | Tables:
    """Return the matrices of an AnnData on disk (HDF5 or zarr, any version), or the tables of a MuData or SpatialData.

    Each modality of a MuData is an AnnData in `mod`, and each table of a SpatialData one in `tables`, or a single one
    in `table`, so counts are read block by block without the packages that wrote them.
    """
    handle = FileHandle(path, opener)
    if "mod" in handle:
        return Tables("modality", _places(handle, "mod/"), lambda: _read_table(handle, "obs"))
    if "obs" not in handle and any(name in handle for name in _SPATIAL):
        kept = next((f"{name}/" for name in ("tables", "table") if name in handle), None)
        return Tables("table", {} if kept is None else _places(handle, kept))
    for name in ("obs", "var"):
        if name not in handle:
            raise ValueError(f"{path} is not an AnnData file: it has no {name}.")
    return anndata_layers_at(handle)


@reads("zarr", _is_zarr)
def _read_zarr(path: Path) -> list[Layer] | Tables:
    return read_anndata_file(path, _open_zarr)


def _places(handle: FileHandle, group: str) -> dict[str, FileHandle]:
    places = {name: handle.inside(f"{group}{name}/") for name in sorted(handle[group.rstrip("/")])}
    handle.close()
    return places


def anndata_layers_at(
    handle: FileHandle, join: Callable[[pd.DataFrame], pd.DataFrame] = lambda obs: obs
) -> list[Layer]:
    """Return the matrices of the AnnData at a location in a file; `join` adds columns to its obs."""
    if hasattr(handle["obs"], "dtype"):  # one compound array: anndata < 0.7
        return _legacy_layers(handle)

    def obs() -> pd.DataFrame:
        return join(_read_obs(handle))

    def neighbors(key: str) -> Matrix:
        return _on_disk(handle, f"obsp/{key}")

    found, var = [], read_elem(handle["var"])
    for name, key in _matrices(handle):
        own = read_elem(handle["raw/var"]) if name == "raw" else var
        found += by_feature_type(name, _on_disk(handle, key), own, obs, neighbors, var)
    return found


def _matrices(handle: FileHandle) -> list[tuple[str, str]]:
    """Return the matrices of an AnnData file: names and keys."""
    if hasattr(handle["obs"], "dtype"):  # one compound array: anndata < 0.7
        return [(name, key) for name, key in (("X", "X"), ("raw", "raw.X")) if key in handle]
    x = handle["X"] if "X" in handle else None
    is_null = x is None or x.attrs.get("encoding-type") == "null" or getattr(x, "shape", ()) is None
    found = [] if is_null else [("X", "X")]
    if "raw" in handle and "X" in handle["raw"]:
        found.append(("raw", "raw/X"))
    return found + [(name, f"layers/{name}") for name in (handle["layers"] if "layers" in handle else [])]


def _read_obs(handle: FileHandle) -> pd.DataFrame:
    """Read obs; columns that cannot be read are left out, with a warning."""
    node = handle["obs"]
    try:
        return read_elem(node)
    except Exception:  # any error of anndata, h5py, zarr or pandas
        if (node.attrs.get("encoding-type"), node.attrs.get("encoding-version")) != ("dataframe", "0.2.0"):
            raise
    index = read_elem(node[node.attrs["_index"]])
    columns = {}
    for name in node.attrs["column-order"]:
        try:
            columns[name] = pd.Series(read_elem(node[name]), index)
        except Exception as error:
            logger.warning(f"{handle.path}: the obs column {name!r} cannot be read and is left out: {error}")
    return pd.DataFrame(columns, index)


def _legacy_layers(handle: FileHandle) -> list[Layer]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the old file format
        adata = read_h5ad(handle.path, backed="r")
    obs, var = adata.obs, adata.var
    raw_var = None if adata.raw is None else adata.raw.var
    adata.file.close()

    found = []
    for name, key in _matrices(handle):
        own = raw_var if name == "raw" else var
        found += by_feature_type(name, _on_disk(handle, key), own, lambda: obs, None, var)
    return found


def _on_disk(handle: FileHandle, key: str) -> Matrix:
    """Open a matrix of an AnnData file by its layout."""
    node = handle[key]
    if hasattr(node, "dtype"):
        return DenseMatrix(handle, key)
    shape = node.attrs.get("shape", node.attrs.get("h5sparse_shape"))
    encoding = str(node.attrs.get("encoding-type", node.attrs.get("h5sparse_format", "")))
    if shape is None or not encoding.startswith(("csr", "csc")):
        raise ValueError(f"{handle.path}: {key} is stored as {encoding or 'an unknown layout'}: not supported.")
    return (CompressedMatrix if encoding.startswith("csr") else ColumnMatrix)(handle, key, shape)
