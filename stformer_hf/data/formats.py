"""Formats: what is read, one function each. A reader gives the matrices of a file, and reads nothing else yet."""

from __future__ import annotations

import errno
import gzip
import logging
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd
from anndata import AnnData
from anndata.io import read_elem, read_h5ad
from scipy import sparse

from ..genes.gene_table import GeneTable
from .matrices import (
    ColumnMatrix,
    CompressedMatrix,
    DenseMatrix,
    FileHandle,
    Matrix,
    MemoryMatrix,
    ScatteredMatrix,
    Selection,
)

logger = logging.getLogger(__name__)

GENES = "Gene Expression"  # the feature type of genes in 10x files
_LOOM_CELLS = ("CellID", "Cell_id", "cell_id", "obs_names")
_LOOM_GENES = ("Gene", "gene_names", "GeneName", "var_names")


@dataclass
class Layer:
    """One matrix of a source that may hold counts.

    Attributes
    ----------
    name : str
        `X`, `raw`, the name of a layer; in 10x files a feature type or a genome.
    matrix : Matrix
        Cells by genes.
    genes : callable () -> GeneTable
        Reads the genes of its columns.
    obs : callable () -> DataFrame
        Reads the table of its rows.
    neighbors : callable (key) -> Matrix, optional
        Opens a graph of its cells (`obsp`); KeyError where there is none of that name.
    """

    name: str
    matrix: Matrix
    genes: Callable[[], GeneTable]
    obs: Callable[[], pd.DataFrame]
    neighbors: Callable[[str], Matrix] | None = None


@dataclass(frozen=True)
class Format:
    """A format: its name, how its files are known, and its reader."""

    name: str
    matches: Callable[[Path], bool]
    read: Callable[[Path], list[Layer]]


FORMATS: list[Format] = []


def reads(name: str, matches: Callable[[Path], bool]):
    """Register the decorated function as the reader of a format."""

    def register(read: Callable[[Path], list[Layer]]) -> Callable[[Path], list[Layer]]:
        FORMATS.append(Format(name, matches, read))
        return read

    return register


def find_format(path: Path) -> Format | None:
    """Find the format of a file or folder; None where it has none of those registered."""
    return next((known for known in FORMATS if known.matches(path)), None)


def read_layers(path: str | Path) -> list[Layer]:
    """Open a file or folder and give its matrices.

    Raises
    ------
    FileNotFoundError
        No such file.
    ValueError
        A format that is not read; a file that is damaged.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"No such file: {path}")
    known = find_format(path)
    if known is None:
        raise _unknown(path)
    return known.read(path)


def _unknown(path: Path) -> ValueError:
    names = ", ".join(known.name for known in FORMATS)
    return ValueError(f"{path}: none of the formats that are read ({names}), and no AnnData.")


def expand(sources: Iterator[Any]) -> list[Any]:
    """Put files in place of folders and patterns.

    Parameters
    ----------
    sources : iterable of AnnData, CellStore, str or Path
        A path may be a file or folder of a known format, another folder (all such files in it, however deep, in
        alphabetical order) or a pattern such as `data/*.h5ad`.

    Returns
    -------
    list
        Objects as they were; paths of a known format.

    Raises
    ------
    FileNotFoundError
        Nothing is there.
    ValueError
        A file of a format that is not read.
    """
    found = []
    for source in sources:
        if not isinstance(source, (str, Path)):
            found.append(source)
            continue
        path = Path(source)
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
    elif path.is_dir() and path.resolve() not in above:  # a link to a folder above would go round for ever
        for inside in sorted(path.iterdir()):
            if inside.name.lower().endswith((".h5ad.gz", ".h5.gz", ".loom.gz")):
                logger.warning(f"{inside} is left out: it is compressed. Unpack it (gunzip), or move it away.")
            elif not inside.name.startswith("."):
                yield from _walk(inside, (*above, path.resolve()))


# ---------------------------------------------------------------------- AnnData


def anndata_layers(adata: AnnData) -> list[Layer]:
    """Give the matrices of an AnnData: in memory or backed, whole or a view."""

    def layer(name: str, matrix: Matrix, var: pd.DataFrame) -> Layer:
        return Layer(name, matrix, lambda: GeneTable.from_var(var), lambda: adata.obs, neighbors)

    def neighbors(key: str) -> Matrix:
        return MemoryMatrix(adata.obsp[key])

    if adata.isbacked:
        rows = columns = None
        if adata.is_view:  # which rows of the file these are, anndata keeps to itself
            parent = adata._adata_ref
            rows, columns = np.arange(parent.n_obs)[adata._oidx], np.arange(parent.n_vars)[adata._vidx]
        return [
            layer(
                found.name,
                Selection(found.matrix, rows, None if found.name == "raw" else columns),
                adata.raw.var if found.name == "raw" else adata.var,
            )
            for found in read_anndata_file(Path(adata.filename))
        ]
    found = [] if adata.X is None else [layer("X", MemoryMatrix(adata.X), adata.var)]
    if adata.raw is not None:
        found.append(layer("raw", MemoryMatrix(adata.raw.X), adata.raw.var))
    return found + [layer(name, MemoryMatrix(adata.layers[name]), adata.var) for name in adata.layers]


def _open_hdf5(path: Path) -> h5py.File:
    try:
        return h5py.File(path, "r")
    except BlockingIOError as error:
        raise ValueError(f"{path} is open for writing elsewhere. Close it, or open it with backed='r'.") from error
    except OSError as error:
        if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOENT):
            raise  # the file is not to blame
        raise ValueError(f"{path} is not a readable HDF5 file, or is cut short: {error}") from error


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
def _read_h5ad(path: Path) -> list[Layer]:
    return read_anndata_file(path)


@reads("zarr", _is_zarr)
def _read_zarr(path: Path) -> list[Layer]:
    try:
        return read_anndata_file(path, _open_zarr)
    except (OSError, KeyError) as error:
        raise ValueError(f"{path} is not a readable zarr group: {error}") from error


def read_anndata_file(path: Path, opener: Callable[[Path], Any] = _open_hdf5) -> list[Layer]:
    """Give the matrices of an AnnData on disk, in HDF5 or zarr, of any age."""
    handle = FileHandle(path, opener)
    for name in ("obs", "var"):
        if name not in handle.file:
            raise ValueError(f"{path} is not a file of an AnnData: it has no {name}.")
    if hasattr(handle["obs"], "dtype"):  # one compound array: anndata < 0.7
        return _legacy_layers(handle)

    def table(key: str) -> pd.DataFrame:
        return _read_obs(handle) if key == "obs" else read_elem(handle[key])

    def neighbors(key: str) -> Matrix:
        return _on_disk(handle, f"obsp/{key}")

    def layer(name: str, key: str, var: str) -> Layer:
        return Layer(
            name, _on_disk(handle, key), lambda: GeneTable.from_var(table(var)), lambda: table("obs"), neighbors
        )

    found = [layer("X", "X", "var")] if "X" in handle.file and not _is_null(handle["X"]) else []
    if "raw" in handle.file and "X" in handle["raw"]:
        found.append(layer("raw", "raw/X", "raw/var"))
    layers = list(handle["layers"]) if "layers" in handle.file else []
    return found + [layer(name, f"layers/{name}", "var") for name in layers]


def _read_obs(handle: FileHandle) -> pd.DataFrame:
    """Read the table of the cells; a column that cannot be read is left out, and named."""
    node = handle["obs"]
    try:
        return read_elem(node)
    except Exception:  # whatever anndata, h5py, zarr or pandas make of it
        if (node.attrs.get("encoding-type"), node.attrs.get("encoding-version")) != ("dataframe", "0.2.0"):
            raise
    index = read_elem(node[node.attrs["_index"]])
    columns = {}
    for name in node.attrs["column-order"]:
        try:
            columns[name] = pd.Series(read_elem(node[name]), index)
        except Exception as error:
            logger.warning(f"{handle.path}: the obs column {name!r} cannot be read, and is left out: {error}")
    return pd.DataFrame(columns, index)


def _legacy_layers(handle: FileHandle) -> list[Layer]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the file is old
        adata = read_h5ad(handle.path, backed="r")
    obs, var = adata.obs, adata.var
    raw_var = None if adata.raw is None else adata.raw.var
    adata.file.close()

    def layer(name: str, key: str, var: pd.DataFrame) -> Layer:
        return Layer(name, _on_disk(handle, key), lambda: GeneTable.from_var(var), lambda: obs)

    found = [layer("X", "X", var)] if "X" in handle.file else []
    return found + ([layer("raw", "raw.X", raw_var)] if "raw.X" in handle.file else [])


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
        raise ValueError(f"{handle.path}: {key} is stored as {encoding or 'an unknown layout'}, which is not read.")
    return (CompressedMatrix if encoding.startswith("csr") else ColumnMatrix)(handle, key, shape)


# ---------------------------------------------------------------------- 10x


@reads("10x h5", lambda path: path.suffix.lower() == ".h5" and path.is_file())
def _read_tenx_h5(path: Path) -> list[Layer]:
    """Read a Cell Ranger or Space Ranger file: v3 (`matrix`, features of several types) or v2 (a group a genome)."""
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
        return _by_feature_type(matrix("matrix"), features, obs("matrix"))
    genomes = [name for name, node in handle.file.items() if isinstance(node, h5py.Group) and "barcodes" in node]
    if not genomes:
        raise ValueError(
            f"{path} is neither a 10x file (it has no group matrix, and none of a genome) nor an AnnData."
        )

    def genes(genome: str) -> Callable[[], GeneTable]:
        return lambda: GeneTable.from_var(
            pd.DataFrame({"gene_symbol": strings(f"{genome}/gene_names")}, index=strings(f"{genome}/genes"))
        )

    name = "X" if len(genomes) == 1 else None
    return [Layer(name or genome, matrix(genome), genes(genome), obs(genome)) for genome in genomes]


def _by_feature_type(matrix: Matrix, features: pd.DataFrame, obs: Callable[[], pd.DataFrame]) -> list[Layer]:
    """Split the columns of a 10x matrix: genes are `X`; antibodies and the like are layers of their own."""

    def genes(var: pd.DataFrame) -> Callable[[], GeneTable]:
        return lambda: GeneTable.from_var(var)

    types = features.get("feature_type", pd.Series(GENES, index=features.index))
    if (types == GENES).all():
        return [Layer("X", matrix, genes(features), obs)]
    layers = []
    for kind in sorted(types.unique(), key=lambda kind: kind != GENES):
        columns = np.flatnonzero(types == kind)
        name = "X" if kind == GENES else str(kind)
        layers.append(Layer(name, Selection(matrix, None, columns), genes(features.iloc[columns]), obs))
    return layers


def _matrix_file(path: Path) -> Path | None:
    """Find the matrix.mtx of a 10x folder; the path may be the folder or the matrix itself."""
    if path.is_dir():
        found = sorted(path.glob("*matrix.mtx")) or sorted(path.glob("*matrix.mtx.gz"))
        return found[0] if len(found) == 1 else None
    return path if path.name.endswith(("matrix.mtx", "matrix.mtx.gz")) else None


@reads("10x mtx", lambda path: _matrix_file(path) is not None)
def _read_tenx_mtx(path: Path) -> list[Layer]:
    """Read a Cell Ranger folder: matrix.mtx, barcodes.tsv, and features.tsv (v3) or genes.tsv (v2); gzipped or not."""
    file = _matrix_file(path)
    prefix = file.name[: file.name.index("matrix.mtx")]

    def read_table(*names: str) -> pd.DataFrame:
        for name in names:
            for table in (file.with_name(prefix + name), file.with_name(prefix + name + ".gz")):
                if table.exists():
                    return pd.read_csv(table, sep="\t", header=None, dtype=str, keep_default_na=False, quoting=3)
        raise ValueError(f"{file} has no {' or '.join(prefix + name for name in names)} beside it.")

    features, barcodes = read_table("features.tsv", "genes.tsv"), read_table("barcodes.tsv")
    matrix = MtxMatrix(file)
    if matrix.shape != (len(barcodes), len(features)):
        raise ValueError(
            f"{file} has {matrix.shape[1]} features and {matrix.shape[0]} barcodes; the tables beside it have "
            f"{len(features)} and {len(barcodes)}."
        )
    names = ["gene_symbol", "feature_type"][: features.shape[1] - 1]
    columns = {name: features[i + 1].to_numpy(object) for i, name in enumerate(names)}
    var = pd.DataFrame(columns, index=pd.Index(features[0], dtype=object))
    return _by_feature_type(matrix, var, lambda: pd.DataFrame(index=pd.Index(barcodes[0], dtype=object)))


class MtxMatrix(ScatteredMatrix):
    """A Matrix Market file of features by barcodes, read as barcodes by features.

    Parameters
    ----------
    file : Path
        Coordinate format, gzipped or not.

    Raises
    ------
    ValueError
        Another format; fewer entries than the header says; entries outside the matrix.
    """

    def __init__(self, file: Path):
        super().__init__()
        self._file = file
        with self._open() as lines:
            header = lines.readline().lower().split()
            line = lines.readline()
            self._n_header = 2
            while line.startswith("%"):
                line = lines.readline()
                self._n_header += 1
        sizes = line.split()
        good = header[:3] == ["%%matrixmarket", "matrix", "coordinate"] and header[4:5] == ["general"]
        if not good or len(sizes) != 3 or not all(size.isdigit() for size in sizes):
            raise ValueError(f"{file} is not a Matrix Market file of coordinates.")
        n_features, n_barcodes, self._n_entries = map(int, sizes)
        self._field = header[3]
        self.shape = (n_barcodes, n_features)

    def _open(self):
        return gzip.open(self._file, "rt") if self._file.suffix == ".gz" else open(self._file)

    def size(self) -> tuple[int, np.dtype]:
        """Entries of the header; whole numbers where the header says so."""
        return self._n_entries, np.dtype(np.float64 if self._field == "real" else np.int64)

    def entries(self) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Give barcodes, features and values, a buffer at a time."""
        names = ["feature", "barcode"] + ([] if self._field == "pattern" else ["value"])
        n_entries = 0
        try:
            parts = pd.read_csv(
                self._file,
                sep=r"\s+",
                header=None,
                names=names,
                skiprows=self._n_header,
                dtype={"feature": np.int64, "barcode": np.int64, "value": self.size()[1]},
                chunksize=1 << 20,
            )
            for part in parts:
                if not len(part):
                    continue
                features, barcodes = part["feature"].to_numpy() - 1, part["barcode"].to_numpy() - 1
                if features.min() < 0 or features.max() >= self.shape[1] or barcodes.min() < 0:
                    raise ValueError("entries outside the matrix")
                if barcodes.max() >= self.shape[0]:
                    raise ValueError("entries outside the matrix")
                n_entries += len(part)
                values = part["value"].to_numpy() if "value" in part else np.ones(len(part), np.int64)
                yield barcodes, features, values
        except pd.errors.EmptyDataError:
            pass
        except (ValueError, OSError, EOFError) as error:
            raise ValueError(f"{self._file} is damaged: {error}") from error
        if n_entries != self._n_entries:
            raise ValueError(f"{self._file} is cut short: {n_entries} entries of {self._n_entries}.")


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
            if node.ndim == 1:
                strings = h5py.check_string_dtype(node.dtype) is not None
                columns[name] = node.asstr()[:].astype(object) if strings else node[:]
        frame = pd.DataFrame(columns).rename(columns={"Accession": "gene_ids"})
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


@reads("CellStore", lambda path: (path / "manifest.json").exists() and (path / "dataset_info.json").exists())
def _read_store(path: Path) -> list[Layer]:
    from .cell_store import CellStore

    return store_layers(CellStore(path))


def store_layers(store) -> list[Layer]:
    """Give a `CellStore`, or a selection of one, as a source."""
    return [Layer("X", StoreMatrix(store), lambda: store.genes, lambda: store.obs, lambda key: NeighborMatrix(store))]


class StoreMatrix(Matrix):
    """The counts of a `CellStore`."""

    def __init__(self, store):
        self._store = store
        self.shape = (len(store), len(store.genes))

    def rows(self, start: int, stop: int) -> sparse.csr_matrix:
        """Read a range of rows."""
        return sparse.csr_matrix(self._store.rows(slice(start, stop)))

    def sample(self) -> Iterator[np.ndarray]:
        """Give nothing: what is in a store was checked when it was built."""
        yield np.ones(1, np.uint8)


class NeighborMatrix(StoreMatrix):
    """The neighbours of the cells of a `CellStore`."""

    def __init__(self, store):
        super().__init__(store)
        self.shape = (len(store), len(store))

    def rows(self, start: int, stop: int) -> sparse.csr_matrix:
        """Read a range of rows."""
        return sparse.csr_matrix(self._store.neighbors(slice(start, stop)))


__all__ = [
    "FORMATS",
    "Format",
    "Layer",
    "anndata_layers",
    "expand",
    "find_format",
    "read_layers",
    "reads",
    "store_layers",
]
