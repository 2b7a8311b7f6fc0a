"""Registry of file formats, with one reader function each, which opens the matrices of a file without reading them."""

from __future__ import annotations

import errno
import logging
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import h5py
import numpy as np
import pandas as pd
from anndata import AnnData
from anndata.io import read_elem, read_h5ad
from scipy import sparse

from ..genes.gene_table import GeneTable
from ..genes.text_files import naming, read_columns, read_text_table
from ..models.gene_bert.cell_counts import split_features
from ..models.gene_bert.cell_tables import choose_table, find_table, is_mudata, is_spatialdata, join_obs
from ..models.gene_bert.gene_columns import GENES
from .matrices import (
    ColumnMatrix,
    CompressedMatrix,
    DenseMatrix,
    FileHandle,
    Matrix,
    MemoryMatrix,
    Selection,
)
from .matrix_market import MtxMatrix
from .text_matrix import TextMatrix

logger = logging.getLogger(__name__)

_BD_FILE = re.compile(r"_MolsPerCell(_Unfiltered)?\.csv(\.gz)?$", re.IGNORECASE)
_REMOTE = re.compile(r"([a-z][a-z0-9+.-]+):/+", re.IGNORECASE)
_NOT_HDF5 = {  # first bytes of files that are not HDF5, and the remedy
    b"\x1f\x8b": "It is compressed with gzip: unpack it.",
    b"PK\x03\x04": "It is a zip archive: unpack it.",
    b"version https://git-lfs": "It is a pointer of Git LFS: fetch the file itself (git lfs pull).",
    b"<": "It is a web page, as left by a failed download: download the file again.",
}
_SPATIAL = ("tables", "table", "images", "labels", "shapes", "points")  # groups of a SpatialData
_LOOM_CELLS = ("CellID", "Cell_id", "cell_id", "obs_names")
_LOOM_GENES = ("Gene", "gene_names", "GeneName", "var_names")


@dataclass
class Layer:
    """One matrix of a source that may hold counts.

    Attributes
    ----------
    name : str
        `X`, `raw` or the name of a layer; in 10x files a feature type or a genome.
    matrix : Matrix
        Cells by genes.
    genes : callable () -> GeneTable
        Reads the genes of its columns.
    obs : callable () -> DataFrame
        Reads the table of its rows.
    neighbors : callable (key) -> Matrix, optional
        Opens a graph of its cells (`obsp`); KeyError if there is none of that name.
    whole : Matrix, optional
        The matrix with all its columns, if this layer has only those of one feature type.
    """

    name: str
    matrix: Matrix
    genes: Callable[[], GeneTable]
    obs: Callable[[], pd.DataFrame]
    neighbors: Callable[[str], Matrix] | None = None
    whole: Matrix | None = None


@dataclass(frozen=True)
class Tables:
    """The modalities of a MuData file, or the tables of a SpatialData file; one of them is read.

    Attributes
    ----------
    kind : {"modality", "table"}
    places : dict of str to FileHandle
        Location of the AnnData of each.
    obs : callable () -> DataFrame, optional
        Reads the obs of the MuData.
    """

    kind: str
    places: dict[str, FileHandle]
    obs: Callable[[], pd.DataFrame] | None = None

    def choose(self, layer: str | None, source: str) -> tuple[str, str | None]:
        """Choose a modality or table, and the layer in it; see `choose_table`."""
        try:
            tables = {name: partial(_read_table, place, "var") for name, place in self.places.items()}
            return choose_table(tables, layer, source, self.kind)
        finally:
            for place in self.places.values():
                place.close()

    def join(self, obs: pd.DataFrame, name: str) -> pd.DataFrame:
        """Add the columns of the MuData to the obs of a modality."""
        return obs if self.obs is None else join_obs(obs, self.obs(), name)


@dataclass(frozen=True)
class Format:
    """A format: its name, a function that recognises its files, and its reader."""

    name: str
    matches: Callable[[Path], bool]
    read: Callable[[Path], list[Layer] | Tables]


class StoredCells(Protocol):
    """The part of `CellStore`'s interface that other modules use. The store registers its own format."""

    path: Path
    manifest: dict[str, Any]
    genes: GeneTable
    gene_ids: np.ndarray
    obs: pd.DataFrame
    obs_names: np.ndarray
    categories: dict[str, list[str]]
    dataset: Any

    def __len__(self) -> int: ...

    def __getitems__(self, index: Sequence[int]) -> Any:
        """Return a `CellBatch` of cells."""

    def rows(self, index: Any) -> sparse.csr_array:
        """Return the counts of cells, (n_cells, n_genes)."""

    def neighbors(self, index: Any) -> sparse.csr_array:
        """Return the weights of the neighbours of cells, (n_cells, len(self))."""

    def must_be_unchanged(self) -> None:
        """Raise a RuntimeError if the store was replaced since it was opened."""


FORMATS: list[Format] = []


def reads(name: str, matches: Callable[[Path], bool]):
    """Register the decorated function as the reader of a format."""

    def register(read: Callable[[Path], list[Layer] | Tables]) -> Callable[[Path], list[Layer] | Tables]:
        FORMATS.append(Format(name, matches, read))
        return read

    return register


def find_format(path: Path) -> Format | None:
    """Return the format of a file or folder; None if it has no registered format."""
    return next((known for known in FORMATS if known.matches(path)), None)


class Found(NamedTuple):
    """The matrices of a source.

    Attributes
    ----------
    name : str
        Name of the source, for errors.
    table : str
        Name of the chosen modality or table, for errors; empty if there is no choice.
    layers : list of Layer
    layer : str or None
        The requested layer.
    """

    name: str
    table: str
    layers: list[Layer]
    layer: str | None


def is_source(value: Any) -> bool:
    """Return whether a value is a single source, not an iterable of sources."""
    return (
        isinstance(value, (AnnData, str, Path))
        or hasattr(value, "manifest")
        or is_mudata(value)
        or is_spatialdata(value)
    )


def find_layers(source: Any, layer: str | None = None) -> Found:
    """Open a source of any kind and return its matrices.

    Parameters
    ----------
    source : AnnData, MuData, SpatialData, CellStore, str or Path
    layer : str, optional
        The requested layer; for MuData and SpatialData also the modality or table, see `choose_table`.

    Raises
    ------
    FileNotFoundError
        The file does not exist.
    ValueError
        The file format is not supported; the file is damaged; no table of a MuData or SpatialData can be chosen.
    """
    if isinstance(source, (str, Path)):
        name, found = str(source), read_layers(source)
        if not isinstance(found, Tables):
            return Found(name, "", found, layer)
        with naming(name):
            table, layer = found.choose(layer, name)
            place = found.places[table]
            layers = _anndata_layers_at(place, lambda obs: found.join(obs, table))
        return Found(name, f", {found.kind} {table!r}", layers, layer)
    if hasattr(source, "manifest"):
        return Found(str(source.path), "", store_layers(source), layer)
    if not is_source(source):
        raise ValueError(
            f"A source must be a path, an AnnData, MuData, SpatialData or CellStore, got {type(source).__name__}."
        )
    chosen = find_table(source, layer)
    name = str(chosen.table.filename) if chosen.table.isbacked else type(source).__name__
    said = "" if chosen.table is source else chosen.name.removeprefix(type(source).__name__)
    return Found(name, said, anndata_layers(chosen.table, chosen.obs), chosen.layer)


def read_layers(path: str | Path) -> list[Layer] | Tables:
    """Open a file or folder and return its matrices, or its tables if it can hold multiple AnnData.

    Raises
    ------
    FileNotFoundError
        The file does not exist.
    ValueError
        The file format is not supported, or the file is damaged.
    """
    path = local_path(path)
    if not path.exists():
        raise FileNotFoundError(f"No such file: {path}")
    known = find_format(path)
    if known is None:
        raise _unknown(path)
    with naming(path):
        return known.read(path)


def local_path(path: str | Path) -> Path:
    """Return the path of a local file; refuse remote addresses.

    Raises
    ------
    ValueError
        The path is an address such as `s3://…` or `https://…`.
    """
    remote = _REMOTE.match(str(path))
    if remote is None or Path(path).exists():
        return Path(path)
    if remote[1].lower() == "file":
        raise ValueError(f"{path}: pass the path alone, without {remote[1]}://.")
    address = f"{remote[1]}://{str(path)[remote.end() :]}"  # a Path has one slash
    if ".zarr" in address:
        way = f"pass the AnnData that anndata.io.read_zarr({address!r}) reads"
    else:
        way = f"use fsspec.open_local('simplecache::{address}', simplecache={{'same_names': True}})"
    raise ValueError(f"{address}: only local files can be read. Download it and pass its path, or {way}.")


def _unknown(path: Path) -> ValueError:
    names = ", ".join(known.name for known in FORMATS)
    return ValueError(
        f"{path}: unsupported file format (supported: {names}). Read it into an AnnData, for example with "
        "anndata.io.read_mtx(path).T or anndata.io.read_csv(path), and pass that or an h5ad of it."
    )


def expand(sources: Iterator[Any]) -> list[Any]:
    """Replace folders and patterns by the files that they stand for.

    Parameters
    ----------
    sources : iterable of AnnData, MuData, SpatialData, CellStore, str or Path
        A path may be a file or folder of a known format, another folder (for all such files in it, at any depth, in
        alphabetical order) or a pattern such as `data/*.h5ad`.

    Returns
    -------
    list
        Objects unchanged, and paths of a known format.

    Raises
    ------
    FileNotFoundError
        A path does not exist, or a pattern matches nothing.
    ValueError
        A file has an unsupported format.
    """
    found = []
    for source in sources:
        if not isinstance(source, (str, Path)):
            found.append(source)
            continue
        path = local_path(source)
        paths = (
            [path] if path.exists() else sorted(Path().glob(str(source)) if not path.is_absolute() else _glob(path))
        )
        if not paths:
            raise FileNotFoundError(f"No such file: {path}")
        for path in paths:
            inside = list(_walk(path))
            if not inside:
                raise _unknown(path)
            found += inside
    return found


def _glob(pattern: Path) -> Iterator[Path]:
    return Path(pattern.anchor).glob(str(pattern.relative_to(pattern.anchor)))


def _walk(path: Path, above: tuple[Path, ...] = ()) -> Iterator[Path]:
    if find_format(path):
        yield path
    elif path.is_dir() and path.resolve() not in above:  # a link to a parent folder would loop forever
        for inside in sorted(path.iterdir()):
            if inside.name.lower().endswith((".h5ad.gz", ".h5mu.gz", ".h5.gz", ".loom.gz")):
                logger.warning(f"{inside} is left out: it is compressed. Unpack it (gunzip), or move it away.")
            elif not inside.name.startswith("."):
                yield from _walk(inside, (*above, path.resolve()))


# ---------------------------------------------------------------------- AnnData


def anndata_layers(adata: AnnData, obs: pd.DataFrame | None = None) -> list[Layer]:
    """Return the matrices of an AnnData (in memory or backed, whole or a view), optionally with another obs."""

    def layer(name: str, matrix: Matrix, var: pd.DataFrame) -> list[Layer]:
        return _by_feature_type(name, matrix, var, lambda: adata.obs if obs is None else obs, neighbors, adata.var)

    def neighbors(key: str) -> Matrix:
        return MemoryMatrix(adata.obsp[key])

    if adata.isbacked:
        rows = columns = None
        if adata.is_view:  # anndata does not expose which rows of the file these are
            parent = adata._adata_ref
            rows, columns = np.arange(parent.n_obs)[adata._oidx], np.arange(parent.n_vars)[adata._vidx]
        # A modality of a MuData is not at the root of the file.
        handle = FileHandle(Path(adata.filename), _open_hdf5, adata.file["obs"].name.removeprefix("/")[: -len("obs")])
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
    for name in adata.layers:
        found += layer(name, MemoryMatrix(adata.layers[name]), adata.var)
    return found


def _by_feature_type(
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
    return [
        Layer(
            name if kind == GENES else kind,
            Selection(matrix, None, some),
            lambda some=some: GeneTable.from_var(var.iloc[some]),
            obs,
            neighbors,
            matrix,
        )
        for kind, some in columns.items()
        if kind == GENES or name == "X"
    ]


def _open_hdf5(path: Path) -> h5py.File:
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


def _open_zarr(path: Path):
    import zarr

    if path.is_dir():
        return zarr.open_group(str(path), mode="r")
    return zarr.open_group(zarr.storage.ZipStore(path, mode="r"), mode="r")


def _is_zarr(path: Path) -> bool:
    return path.name.endswith((".zarr", ".zarr.zip")) or any(
        (path / name).exists() for name in (".zgroup", "zarr.json")
    )


@reads("h5ad", lambda path: path.suffix.lower() == ".h5ad" and path.is_file())
def _read_h5ad(path: Path) -> list[Layer] | Tables:
    return read_anndata_file(path)


@reads("h5mu", lambda path: path.suffix.lower() == ".h5mu" and path.is_file())
def _read_h5mu(path: Path) -> list[Layer] | Tables:
    return read_anndata_file(path)


@reads("zarr", _is_zarr)
def _read_zarr(path: Path) -> list[Layer] | Tables:
    return read_anndata_file(path, _open_zarr)


def read_anndata_file(path: Path, opener: Callable[[Path], Any] = _open_hdf5) -> list[Layer] | Tables:
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
    return _anndata_layers_at(handle)


def _places(handle: FileHandle, group: str) -> dict[str, FileHandle]:
    places = {name: handle.inside(f"{group}{name}/") for name in sorted(handle[group.rstrip("/")])}
    handle.close()
    return places


def _read_table(handle: FileHandle, key: str) -> pd.DataFrame:
    """Read obs or var of an AnnData file, and close it."""
    if key not in handle:
        raise ValueError(f"{handle.path} is damaged: it has no {handle.root}{key}.")
    found = _read_obs(handle) if key == "obs" else read_elem(handle[key])
    handle.close()
    return found


def _anndata_layers_at(
    handle: FileHandle, join: Callable[[pd.DataFrame], pd.DataFrame] = lambda obs: obs
) -> list[Layer]:
    """Return the matrices of the AnnData at a location in a file; `join` adds columns to its obs."""
    if hasattr(handle["obs"], "dtype"):  # one compound array: anndata < 0.7
        return _legacy_layers(handle)

    def table(key: str) -> pd.DataFrame:
        return join(_read_obs(handle)) if key == "obs" else read_elem(handle[key])

    def neighbors(key: str) -> Matrix:
        return _on_disk(handle, f"obsp/{key}")

    found, vars_read = [], {"var": table("var")}
    for name, key in _matrices(handle):
        where = "raw/var" if name == "raw" else "var"
        if where not in vars_read:
            vars_read[where] = table(where)
        found += _by_feature_type(
            name, _on_disk(handle, key), vars_read[where], lambda: table("obs"), neighbors, vars_read["var"]
        )
    return found


def _matrices(handle: FileHandle) -> list[tuple[str, str]]:
    """Return the matrices of an AnnData file: names and keys."""
    if hasattr(handle["obs"], "dtype"):  # one compound array: anndata < 0.7
        return [(name, key) for name, key in (("X", "X"), ("raw", "raw.X")) if key in handle]
    found = [("X", "X")] if "X" in handle and not _is_null(handle["X"]) else []
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
        found += _by_feature_type(
            name, _on_disk(handle, key), raw_var if name == "raw" else var, lambda: obs, None, var
        )
    return found


def _is_null(node) -> bool:
    return node.attrs.get("encoding-type") == "null" or getattr(node, "shape", ()) is None


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


# ---------------------------------------------------------------------- 10x


@reads("10x h5", lambda path: path.suffix.lower() == ".h5" and path.is_file())
def _read_tenx_h5(path: Path) -> list[Layer]:
    """Read a Cell Ranger or Space Ranger file: v3 (`matrix`, multiple feature types) or v2 (one group per genome)."""
    handle = FileHandle(path, _open_hdf5)
    if {"obs", "var"} <= set(handle.file):
        return read_anndata_file(path)

    def strings(key: str) -> np.ndarray:
        return handle[key].asstr()[:].astype(object)

    def obs(group: str) -> Callable[[], pd.DataFrame]:
        return lambda: pd.DataFrame(index=pd.Index(strings(f"{group}/barcodes"), dtype=object))

    def matrix(group: str) -> CompressedMatrix:  # stored by barcode
        return CompressedMatrix(handle, group, tuple(handle[group]["shape"][:][::-1]))

    if "matrix" in handle.file:
        names = {"gene_symbol": "name", "feature_type": "feature_type", "genome": "genome"}
        columns = {
            column: strings(f"matrix/features/{name}")
            for column, name in names.items()
            if name in handle["matrix/features"]
        }
        features = pd.DataFrame(columns, index=strings("matrix/features/id"))
        return _by_feature_type("X", matrix("matrix"), features, obs("matrix"))
    genomes = [name for name, node in handle.file.items() if isinstance(node, h5py.Group) and "barcodes" in node]
    if not genomes:
        raise ValueError(f"{path} is neither a 10x file (it has no group `matrix` or of a genome) nor an AnnData.")

    def genes(genome: str) -> Callable[[], GeneTable]:
        return lambda: GeneTable.from_var(
            pd.DataFrame({"gene_symbol": strings(f"{genome}/gene_names")}, index=strings(f"{genome}/genes"))
        )

    name = "X" if len(genomes) == 1 else None
    return [Layer(name or genome, matrix(genome), genes(genome), obs(genome)) for genome in genomes]


def _matrix_file(path: Path) -> Path | None:
    """Return the matrix.mtx of a 10x folder; the path may be the folder or the matrix itself."""
    if path.is_dir():
        found = sorted(path.glob("*matrix.mtx")) or sorted(path.glob("*matrix.mtx.gz"))
        return found[0] if len(found) == 1 else None
    return path if path.name.endswith(("matrix.mtx", "matrix.mtx.gz")) else None


def _file_of(path: Path, *names: str) -> Path | None:
    """Return a file with one of these names, gzipped or not: the path itself, or a file in this folder."""
    names = [name + end for name in names for end in ("", ".gz")]
    if path.name in names and path.is_file():
        return path
    return next((path / name for name in names if (path / name).is_file()), None)


def _beside(file: Path, *names: str) -> Path:
    """Return the table that belongs to a matrix: the first of these names that exists, gzipped or not."""
    found = (_file_of(file.parent, name) for name in names)
    table = next((table for table in found if table is not None), None)
    if table is None:
        raise ValueError(f"{file} has no {' or '.join(names)} beside it.")
    return table


def _rows_of_mtx(file: Path, genes: pd.DataFrame, cells: pd.DataFrame, *, cells_in_rows: bool) -> MtxMatrix:
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


@reads("Parse", lambda path: _parse_file(path) is not None)
def _read_parse(path: Path) -> list[Layer]:
    """Read a folder of Parse Biosciences: count_matrix.mtx or DGE.mtx, all_genes.csv and cell_metadata.csv."""
    file = _parse_file(path)

    def read_table(name: str, index: str) -> pd.DataFrame:
        table = read_text_table(_beside(file, name))
        if index not in table:
            raise ValueError(f"{name} beside {file} has no column {index}; it has {', '.join(map(str, table))}.")
        return table.set_index(index).rename_axis(index=None)

    genes, cells = read_table("all_genes.csv", "gene_id"), read_table("cell_metadata.csv", "bc_wells")
    matrix = _rows_of_mtx(file, genes, cells, cells_in_rows=True)
    return [Layer("X", matrix, lambda: GeneTable.from_var(genes), lambda: cells.apply(_whole_numbers))]


def _parse_file(path: Path) -> Path | None:
    file = _file_of(path, "count_matrix.mtx", "DGE.mtx")
    return file if file is not None and _file_of(file.parent, "all_genes.csv") else None


def _whole_numbers(column: pd.Series) -> pd.Series:
    """Convert text to numbers if all values are integers in their usual form; `01` and `1e5` are labels."""
    usual = column.str.fullmatch(r"0|-?[1-9]\d{0,17}")
    return column.astype(np.int64) if usual.all() else column


@reads("kb-python", lambda path: bool(_kallisto_files(path)))
def _read_kallisto(path: Path) -> list[Layer]:
    """Read a folder of kb-python: cells_x_genes.mtx, or one matrix per kind of molecule (mature, nascent, …)."""
    files = _kallisto_files(path)
    genes = _names_table(_beside(files[0], "cells_x_genes.genes.txt"))
    symbols = _file_of(files[0].parent, "cells_x_genes.genes.names.txt")
    if symbols is not None:
        names = read_columns(symbols)[0].to_numpy(object)
        if len(names) != len(genes):
            raise ValueError(f"{symbols} has {len(names)} lines, but there are {len(genes)} genes.")
        genes["gene_symbol"] = names
    cells = _names_table(_beside(files[0], "cells_x_genes.barcodes.txt"))
    return [
        Layer(
            file.name.removesuffix(".gz").removesuffix(".mtx").removeprefix("cells_x_genes").strip(".") or "X",
            _rows_of_mtx(file, genes, cells, cells_in_rows=True),
            lambda: GeneTable.from_var(genes),
            lambda: cells,
        )
        for file in files
    ]


def _kallisto_files(path: Path) -> list[Path]:
    names = ("cells_x_genes*.mtx", "cells_x_genes*.mtx.gz")
    if path.is_dir():
        return sorted(file for name in names for file in path.glob(name))
    return [path] if any(path.match(name) for name in names) else []


def _names_table(file: Path) -> pd.DataFrame:
    """Return a table without columns, indexed by the names in a file with one name per line."""
    return pd.DataFrame(index=pd.Index(read_columns(file)[0], dtype=object, name=None))


@reads("alevin-fry", lambda path: _file_of(path, "quants_mat.mtx") is not None)
def _read_alevin_fry(path: Path) -> list[Layer]:
    """Read the folder `alevin` of alevin-fry: quants_mat.mtx, quants_mat_cols.txt and quants_mat_rows.txt.

    In USA mode each gene has three columns: `gene`, `gene-U` and `gene-A`. Which of them should be counted depends on
    the experiment, so there is no X: `spliced+ambiguous` is usual for cells, all three for nuclei.
    """
    file = _file_of(path, "quants_mat.mtx")
    genes, cells = (_names_table(_beside(file, f"quants_mat_{kind}.txt")) for kind in ("cols", "rows"))
    matrix = _rows_of_mtx(file, genes, cells, cells_in_rows=True)
    n, names = len(genes) // 3, genes.index.to_numpy(object)
    if (
        len(genes) % 3
        or not n
        or any((names[:n] + end != names[i * n :][:n]).any() for i, end in ((1, "-U"), (2, "-A")))
    ):
        return [Layer("X", matrix, lambda: GeneTable.from_var(genes), lambda: cells)]
    parts = dict(zip(("spliced", "unspliced", "ambiguous"), np.arange(3 * n).reshape(3, n), strict=True))

    def layer(*kinds: str) -> Layer:  # columns of the same gene are summed, as everywhere
        columns = np.concatenate([parts[kind] for kind in kinds])
        var = genes.iloc[columns % n]
        return Layer("+".join(kinds), Selection(matrix, None, columns), lambda: GeneTable.from_var(var), lambda: cells)

    return [layer("spliced", "ambiguous"), layer(*parts), *map(layer, parts)]


@reads("10x mtx", lambda path: _matrix_file(path) is not None)
def _read_tenx_mtx(path: Path) -> list[Layer]:
    """Read a Cell Ranger folder: matrix.mtx, barcodes.tsv, and features.tsv (v3) or genes.tsv (v2); gzipped or not."""
    file = _matrix_file(path)
    prefix = file.name[: file.name.index("matrix.mtx")]
    genes = _read_features(_beside(file, prefix + "features.tsv", prefix + "genes.tsv"))
    cells = _names_table(_beside(file, prefix + "barcodes.tsv"))
    return _by_feature_type("X", _rows_of_mtx(file, genes, cells, cells_in_rows=False), genes, lambda: cells)


def _read_features(file: Path) -> pd.DataFrame:
    """Read features.tsv or genes.tsv: ids, and if lines have more fields, `gene_symbol` and `feature_type`."""
    table = read_columns(file, 3)
    genes = pd.DataFrame(index=pd.Index(table[0], dtype=object, name=None))
    for column, name in ((1, "gene_symbol"), (2, "feature_type")):
        if column in table and (table[column] != "").any():
            genes[name] = table[column].to_numpy(object)
    return genes


# ---------------------------------------------------------------------- BD Rhapsody


@reads("BD Rhapsody csv", lambda path: _BD_FILE.search(path.name) is not None and path.is_file())
def _read_rhapsody(path: Path) -> list[Layer]:
    """Read the molecule table of BD Rhapsody: cells by genes, dense; names of antibodies end in pAbO."""
    matrix = TextMatrix(path)
    names = pd.Series(matrix.columns, dtype=object)
    kinds = np.where(names.str.endswith("pAbO"), "Antibody Capture", GENES).astype(object)
    # Genes are named by symbol, in targeted panels by `symbol|transcript|kind`.
    genes = np.where(kinds == GENES, names.str.partition("|")[0], names).astype(object)
    var = pd.DataFrame({"feature_type": kinds}, index=pd.Index(genes, dtype=object))
    return _by_feature_type("X", matrix, var, lambda: pd.DataFrame(index=pd.Index(matrix.index, dtype=object)))


# ---------------------------------------------------------------------- loom and stores


@reads("loom", lambda path: path.suffix.lower() == ".loom" and path.is_file())
def _read_loom(path: Path) -> list[Layer]:
    """Read a loom file: genes by cells, dense, with attributes of both."""
    handle = FileHandle(path, _open_hdf5)
    if not {"matrix", "row_attrs", "col_attrs"} <= set(handle.file):
        raise ValueError(f"{path} is not a loom file: it has no matrix, row_attrs or col_attrs.")

    def attributes(key: str, index: tuple[str, ...]) -> pd.DataFrame:
        columns = {}
        for name, node in handle[key].items():
            if node.ndim == 1 and node.dtype.names is None:  # SCope stores embeddings as compound attributes
                strings = h5py.check_string_dtype(node.dtype) is not None
                columns[name] = node.asstr()[:].astype(object) if strings else node[:]
        frame = pd.DataFrame(columns)
        for name in index:
            if name in frame:
                return frame.set_index(frame[name].astype(str).to_numpy(object)).drop(columns=name)
        return frame.set_index(frame.index.astype(str))

    def layer(name: str, key: str) -> Layer:
        return Layer(
            name,
            DenseMatrix(handle, key, transposed=True),
            lambda: GeneTable.from_var(attributes("row_attrs", _LOOM_GENES)),
            lambda: attributes("col_attrs", _LOOM_CELLS),
        )

    layers = list(handle["layers"]) if "layers" in handle.file else []
    return [layer("X", "matrix")] + [layer(name, f"layers/{name}") for name in layers]


def store_layers(store: StoredCells) -> list[Layer]:
    """Return the layers of a `CellStore`, or of a selection of one."""
    return [Layer("X", StoreMatrix(store), lambda: store.genes, lambda: store.obs, lambda key: NeighborMatrix(store))]


class StoreMatrix(Matrix):
    """The counts of a `CellStore`."""

    def __init__(self, store: StoredCells):
        self._store = store
        self.shape = (len(store), len(store.genes))

    def rows(self, start: int, stop: int) -> sparse.csr_matrix:
        """Read a range of rows."""
        return sparse.csr_matrix(self._store.rows(slice(start, stop)))

    def sample(self) -> Iterator[np.ndarray]:
        """Return nothing, since the counts of a store were checked when it was built."""
        yield np.ones(1, np.uint8)


class NeighborMatrix(StoreMatrix):
    """The neighbours of the cells of a `CellStore`."""

    def __init__(self, store: StoredCells):
        super().__init__(store)
        self.shape = (len(store), len(store))

    def rows(self, start: int, stop: int) -> sparse.csr_matrix:
        """Read a range of rows."""
        return sparse.csr_matrix(self._store.neighbors(slice(start, stop)))


__all__ = [
    "FORMATS",
    "Format",
    "Found",
    "Layer",
    "StoredCells",
    "Tables",
    "anndata_layers",
    "expand",
    "find_format",
    "find_layers",
    "is_source",
    "local_path",
    "read_layers",
    "reads",
    "store_layers",
]
