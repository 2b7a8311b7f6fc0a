"""Matrices in files and in memory, read by rows for any layout: CSR, CSC, dense, or entries in any order."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from scipy import sparse

from .row_buckets import RowBuckets

_VALUES_AT_ONCE = 1 << 22  # values of a dense matrix: 32 MB of float64
_ENTRIES_AT_ONCE = 1 << 21
_SAMPLE = 100_000  # values checked at the beginning, the middle and the end of a matrix


class PerProcess:
    """What is opened at first use in each process, and reopened after it was closed; `path` is its place.

    Open files must not cross a fork and cannot be pickled; this object can do both. `opener` is picklable.
    """

    def __init__(self, path: Any, opener: Callable[[Any], Any]):
        self.path, self._opener = path, opener
        self._file: Any = None
        self._process: int | None = None

    @property
    def file(self) -> Any:
        """What is open in this process."""
        if self._file is None or self._process != os.getpid():
            self._file, self._process = self._opener(self.path), os.getpid()
        return self._file

    def close(self) -> None:
        """Close it, if this process opened it."""
        if self._file is not None and self._process == os.getpid():
            closing = self._file if hasattr(self._file, "close") else self._file.store  # zarr groups have no close
            closing.close()
        self._file = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_file": None, "_process": None}


class FileHandle(PerProcess):
    """A file whose keys all begin with `root`, such as `mod/rna/`: the location of an AnnData in the file."""

    def __init__(self, path: Path, opener: Callable[[Path], Any], root: str = ""):
        super().__init__(Path(os.path.abspath(path)), opener)
        self.root = root

    def __getitem__(self, key: str) -> Any:
        return self.file[self.root + key]

    def __contains__(self, key: str) -> bool:
        return self.root + key in self.file

    def inside(self, root: str) -> FileHandle:
        """Return a separate handle to a location in the file."""
        return FileHandle(self.path, self._opener, self.root + root)


class Matrix(ABC):
    """A matrix that is read by rows.

    Attributes
    ----------
    shape : (int, int)
        Rows, columns.
    seekable : bool
        Whether reading any rows costs the same as reading the first ones.
    """

    shape: tuple[int, int]
    seekable = True

    @abstractmethod
    def rows(self, start: int, stop: int) -> sparse.csr_matrix:
        """Return a range of rows, csr_matrix (stop - start, n_columns)."""

    def sample(self) -> Iterator[np.ndarray]:
        """Yield some of the values, from multiple places."""
        n_rows = max(1, _SAMPLE // max(1, self.shape[1]))
        for start in _places(self.shape[0], n_rows):
            yield self.rows(start, min(start + n_rows, self.shape[0])).data

    def take(self, rows: np.ndarray) -> sparse.csr_matrix:
        """Return any rows: runs of adjacent rows are read at once, in ascending order, and then reordered."""
        wanted, back = np.unique(rows, return_inverse=True)
        if not len(wanted):
            return self.rows(0, 0)
        edges = np.flatnonzero(np.diff(wanted) > 1) + 1
        starts, stops = wanted[[0, *edges]], wanted[[*(edges - 1), -1]] + 1
        found = self._runs(list(zip(starts.tolist(), stops.tolist(), strict=True)))
        return found if np.array_equal(back, np.arange(len(wanted))) else found[back]

    def _runs(self, runs: list[tuple[int, int]]) -> sparse.csr_matrix:
        """Return ranges of rows, concatenated."""
        found = [self.rows(start, stop) for start, stop in runs]
        return found[0] if len(found) == 1 else sparse.vstack(found, format="csr")

    def prepare(self, scratch: Path | None) -> None:  # noqa: B027  (most layouts need nothing)
        """Prepare reading by rows, once; `scratch` is the folder for large temporary files."""

    def close(self) -> None:  # noqa: B027
        """Close files; reading the matrix reopens them."""


class MemoryMatrix(Matrix):
    """A matrix in memory, dense or sparse."""

    def __init__(self, values: Any):
        self.shape = tuple(values.shape)
        # A view of an AnnData's matrix would be pickled with its parent.
        self._values = sparse.csr_matrix(values) if sparse.issparse(values) else _native(np.asarray(values))

    def rows(self, start: int, stop: int) -> sparse.csr_matrix:
        return sparse.csr_matrix(self._values[start:stop])

    def take(self, rows: np.ndarray) -> sparse.csr_matrix:
        return sparse.csr_matrix(self._values[rows])


class DenseMatrix(Matrix):
    """A dense matrix in a file; `transposed` if it is stored as genes by cells, as in loom files."""

    def __init__(self, handle: FileHandle, key: str, transposed: bool = False):
        self._handle, self._key, self._transposed = handle, key, transposed
        self.shape = _as_stored(handle[key].shape[::-1] if transposed else handle[key].shape)

    def rows(self, start: int, stop: int) -> sparse.csr_matrix:
        node = self._handle[self._key]
        step = max(1, _VALUES_AT_ONCE // max(1, self.shape[1]))
        parts = []
        for first in range(start, stop, step):
            last = min(first + step, stop)
            values = node[:, first:last].T if self._transposed else node[first:last]
            parts.append(sparse.csr_matrix(_native(values)))
        if not parts:
            return sparse.csr_matrix((0, self.shape[1]), dtype=node.dtype)
        return parts[0] if len(parts) == 1 else sparse.vstack(parts, format="csr")

    def close(self) -> None:
        self._handle.close()


class CompressedMatrix(Matrix):
    """A matrix stored by rows (CSR) in a file: `data`, `indices`, `indptr` in the group `key`; they are checked."""

    def __init__(self, handle: FileHandle, key: str, shape: Iterable[int]):
        self._handle, self._key = handle, key
        self.shape = _as_stored(shape)
        _check_compressed(handle, key, self.shape[0])
        self._indptr: np.ndarray | None = None

    def rows(self, start: int, stop: int) -> sparse.csr_matrix:
        return self._runs([(start, stop)])

    def _runs(self, runs: list[tuple[int, int]]) -> sparse.csr_matrix:
        node = self._handle[self._key]
        all_data, all_indices = node["data"], node["indices"]
        indptr = node["indptr"]
        if len(runs) > 1:  # for scattered rows, read all of indptr once; a range needs only its own part
            if self._indptr is None:
                self._indptr = indptr[:]
            indptr = self._indptr
        ends = [indptr[start : stop + 1].astype(np.int64) for start, stop in runs]
        lengths = np.concatenate([np.diff(run) for run in ends])
        both = ([values[run[0] : run[-1]] for run in ends] for values in (all_data, all_indices))
        data, indices = (parts[0] if len(parts) == 1 else np.concatenate(parts) for parts in both)
        if (lengths < 0).any() or len(data) != lengths.sum() or len(indices) != len(data):
            raise ValueError(f"{self._handle.path}: {self._key} is damaged: its arrays do not match each other.")
        if len(indices) and (indices.min() < 0 or indices.max() >= self.shape[1]):
            raise ValueError(
                f"{self._handle.path}: {self._key} is damaged: it has columns outside its {self.shape[1]} genes."
            )
        indptr = np.concatenate([[0], np.cumsum(lengths)])
        return sparse.csr_matrix((_native(data), indices, indptr), shape=(len(lengths), self.shape[1]))

    def sample(self) -> Iterator[np.ndarray]:
        return _sample_stored(self._handle[self._key]["data"])

    def close(self) -> None:
        self._handle.close()
        self._indptr = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_indptr": None}


class ScatteredMatrix(Matrix):
    """A matrix whose entries are not sorted by row: regrouped once, out of core, before the first rows are read.

    Subclasses set `shape` and implement `entries`.
    """

    seekable = False

    def __init__(self) -> None:
        self._buckets: RowBuckets | None = None

    @abstractmethod
    def size(self) -> tuple[int, np.dtype]:
        """Return the number of entries and their type."""

    @abstractmethod
    def entries(self) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Yield rows, columns and values of all entries, buffer by buffer."""

    def prepare(self, scratch: Path | None) -> None:
        if self._buckets is None:
            buckets = RowBuckets(self.shape, *self.size(), scratch)
            for rows, columns, values in self.entries():
                buckets.add(rows, columns, values)
            buckets.close()
            self._buckets = buckets

    def rows(self, start: int, stop: int) -> sparse.csr_matrix:
        self.prepare(None)
        assert self._buckets is not None
        return self._buckets.rows(start, stop)

    def sample(self) -> Iterator[np.ndarray]:
        for _, _, values in self.entries():
            yield values[:_SAMPLE]
            return

    def close(self) -> None:
        self._buckets = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_buckets": None}


class ColumnMatrix(ScatteredMatrix):
    """A matrix stored by columns (CSC) in a file, otherwise as `CompressedMatrix`."""

    def __init__(self, handle: FileHandle, key: str, shape: Iterable[int]):
        super().__init__()
        self._handle, self._key = handle, key
        self.shape = _as_stored(shape)
        _check_compressed(handle, key, self.shape[1])

    def size(self) -> tuple[int, np.dtype]:
        data = self._handle[self._key]["data"]
        return data.shape[0], data.dtype

    def entries(self) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        node = self._handle[self._key]
        indptr = node["indptr"][:].astype(np.int64)
        n_entries = node["data"].shape[0]
        for start in range(0, n_entries, _ENTRIES_AT_ONCE):
            stop = min(start + _ENTRIES_AT_ONCE, n_entries)
            rows = node["indices"][start:stop].astype(np.int64)
            if rows.min() < 0 or rows.max() >= self.shape[0]:
                raise ValueError(
                    f"{self._handle.path}: {self._key} is damaged: it has rows outside its {self.shape[0]} cells."
                )
            lengths = np.diff(np.clip(indptr, start, stop))
            yield rows, np.repeat(np.arange(len(lengths)), lengths), node["data"][start:stop]

    def sample(self) -> Iterator[np.ndarray]:
        return _sample_stored(self._handle[self._key]["data"])

    def close(self) -> None:
        super().close()
        self._handle.close()


class Selection(Matrix):
    """Some rows and columns of another matrix, given by indices, such as a view of a backed AnnData."""

    def __init__(self, matrix: Matrix, rows: np.ndarray | None = None, columns: np.ndarray | None = None):
        self._matrix, self._rows, self._columns = matrix, rows, columns
        self.seekable = matrix.seekable
        n_rows, n_columns = matrix.shape
        self.shape = (n_rows if rows is None else len(rows), n_columns if columns is None else len(columns))

    def rows(self, start: int, stop: int) -> sparse.csr_matrix:
        block = self._matrix.rows(start, stop) if self._rows is None else self._matrix.take(self._rows[start:stop])
        return block if self._columns is None else block[:, self._columns]

    def prepare(self, scratch: Path | None) -> None:
        self._matrix.prepare(scratch)

    def close(self) -> None:
        self._matrix.close()


def _native(values: np.ndarray) -> np.ndarray:
    """Return values in a type that scipy supports, which excludes float16 and other byte orders."""
    if values.dtype == np.float16:
        return values.astype(np.float32)
    return values if values.dtype.isnative else values.astype(values.dtype.newbyteorder("="))


def _as_stored(shape: Iterable[int]) -> tuple[int, int]:
    """Return the shape in a file; that of a damaged file may be of another length, which opening it refuses."""
    return tuple(int(n) for n in shape)  # type: ignore[return-value]


def _places(n: int, size: int) -> list[int]:
    """Return the starts of up to three samples of n values: at the beginning, the middle and the end."""
    return sorted({0, n // 2, max(0, n - size)}) if n else []


def _sample_stored(data: Any) -> Iterator[np.ndarray]:
    for start in _places(data.shape[0], _SAMPLE):
        yield data[start : start + _SAMPLE]


def _check_compressed(handle: FileHandle, key: str, n_major: int) -> None:
    node = handle[key]
    sizes = {name: node[name].shape[0] for name in ("data", "indices", "indptr")}
    if sizes["indptr"] != n_major + 1 or sizes["data"] != sizes["indices"] or int(node["indptr"][-1]) != sizes["data"]:
        raise ValueError(
            f"{handle.path}: {key} is damaged: {sizes['data']} values, {sizes['indices']} indices and "
            f"{sizes['indptr']} row ends do not fit {n_major} rows."
        )
