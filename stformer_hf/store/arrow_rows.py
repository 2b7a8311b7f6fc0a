"""ArrowRows: reads the rows of a store's shards straight from the buffers of Arrow files.

Local files are mapped to memory; of files on a server only the needed ranges are read.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa

from ..sources.obs_columns import as_array
from .remote_batches import RemoteBatch, RemoteValues, read_column, read_headers
from .remote_files import Range, RemoteFile, fetched
from .shards import read_batches

Offsets = np.ndarray | Range
Values = memoryview | RemoteValues


class ArrowRows:
    """Rows of shards.

    Parameters
    ----------
    files : sequence of Path, or of RemoteFile
        Arrow stream files, in the order of the rows.
    neighbor_shifts : sequence of int
        Offset per file, added to the row numbers in its `neighbors`.

    Raises
    ------
    ValueError
        A file is damaged.
    """

    def __init__(self, files: Sequence[Any], neighbor_shifts: Sequence[int]):
        self._batches: list[Any] = []  # pa.RecordBatch, or RemoteBatch
        lists, shifts = [], []
        self._are_remote = bool(files) and isinstance(files[0], RemoteFile)
        headers = read_headers(files) if self._are_remote else None
        for file, shift in zip(files, neighbor_shifts, strict=True):
            try:
                for batch in read_batches(file) if headers is None else next(headers):
                    lists.append(_flat(batch, "genes", "counts"))
                    self._batches.append(batch)
                    shifts.append(shift)
            except (OSError, KeyError, pa.ArrowException) as error:
                if self._are_remote and isinstance(error, OSError):
                    raise  # of the network, or of the cache
                raise ValueError(f"{file} is damaged: {error}. Copy the store again, or rebuild it.") from error
        self._shifts = np.array(shifts, np.int64)
        self._cells = _Lists(lists)

    def __len__(self) -> int:
        return int(self._cells.starts[-1])

    def lengths(self) -> np.ndarray:
        """Count the entries of every row: int64 array (n,)."""
        return self._cells.lengths()

    def gather(self, rows: np.ndarray, gene_type: str, count_type: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return a copy of rows.

        Parameters
        ----------
        rows : int64 array (n,)
            Row numbers, in any order.
        gene_type, count_type : str
            Types of the results, which are those of the shards.

        Returns
        -------
        indptr : int64 array (n + 1,)
        genes, counts : arrays (nnz,)
        """
        return self._cells.gather(rows, gene_type, count_type)

    def neighbors(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the neighbours of rows: indptr int64 (n + 1,), row numbers int64 and weights float32 (nnz,)."""
        indptr, numbers, weights = self._neighbors.gather(rows, "uint32", "float32")
        shifts = self._shifts[self._neighbors.batches_of(rows)]
        return indptr, numbers + np.repeat(shifts, np.diff(indptr)), weights

    @cached_property
    def _neighbors(self) -> _Lists:
        return _Lists([_flat(batch, "neighbors", "neighbor_weights") for batch in self._batches])

    def column(self, name: str) -> np.ndarray:
        """Return another column of all rows; see `as_array`."""
        chunks = self.chunks(name)
        return as_array(pa.chunked_array(chunks)) if chunks else np.empty(0, object)

    def chunks(self, name: str) -> list[pa.Array]:
        """Return another column as it is stored, one array per record batch."""
        batches = self._batches
        return read_column(batches, name) if self._are_remote else [batch.column(name) for batch in batches]


def _flat(batch: pa.RecordBatch | RemoteBatch, first: str, second: str) -> tuple[Offsets, Values, Values]:
    """Return the offsets of two list columns, and their values."""
    if isinstance(batch, RemoteBatch):
        return batch.offsets(first), batch.values(first), batch.values(second)
    columns = batch.column(first), batch.column(second)
    return columns[0].offsets.to_numpy(), *(memoryview(column.values.to_numpy()) for column in columns)


class _Lists:
    """Two list columns of record batches, the second as long as the first in every row.

    Parameters
    ----------
    lists : sequence of (offsets, first values, second values)
        One entry per record batch.

    Attributes
    ----------
    starts : int64 array (n_batches + 1,)
        First row of each batch, and the number of rows.
    """

    def __init__(self, lists: Sequence[tuple[Offsets, Values, Values]]):
        (offsets,) = fetched([offsets for offsets, _, _ in lists])
        bounds = [np.frombuffer(of, np.int32) for of in offsets]
        self.starts = np.cumsum([0, *(len(offsets) - 1 for offsets in bounds)])
        # Row r of batch b has the entries _bounds[r + b]:_bounds[r + b + 1] of the batch's values.
        self._bounds = np.concatenate(bounds) if bounds else np.zeros(0, np.int32)
        self._first = [first for _, first, _ in lists]
        self._second = [second for _, _, second in lists]

    def batches_of(self, rows: np.ndarray) -> np.ndarray:
        """Return the batch that holds each row."""
        return self.starts.searchsorted(rows, side="right") - 1

    def lengths(self) -> np.ndarray:
        """Count the entries of every row: int64 array (n,)."""
        rows = np.arange(self.starts[-1])
        rows += np.repeat(np.arange(len(self._first)), np.diff(self.starts))
        return self._bounds[rows + 1].astype(np.int64) - self._bounds[rows]

    def gather(self, rows: np.ndarray, first_type: str, second_type: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return a copy of the entries of rows: indptr, and the two columns, flat."""
        batches = self.batches_of(rows)
        at = rows + batches
        starts, stops = self._bounds[at], self._bounds[at + 1]
        indptr = np.zeros(len(rows) + 1, np.int64)
        np.cumsum(stops - starts, out=indptr[1:])
        if not indptr[-1]:
            return indptr, np.empty(0, first_type), np.empty(0, second_type)
        follows = np.diff(at) == 1  # the next row of the same batch continues the run
        if follows.any():
            begins, ends = np.flatnonzero(np.r_[True, ~follows]), np.flatnonzero(np.r_[~follows, True])
            batches, starts, stops = batches[begins], starts[begins], stops[ends]
        # Joining slices of memoryviews as bytes costs half as much as np.concatenate of slices of arrays.
        all_first, all_second = self._first, self._second
        first, second = [], []
        for batch, start, stop in zip(batches.tolist(), starts.tolist(), stops.tolist(), strict=True):
            first.append(all_first[batch][start:stop])
            second.append(all_second[batch][start:stop])
        first, second = fetched(first, second)
        join = bytearray().join  # a bytearray is writable, bytes are not
        return indptr, np.frombuffer(join(first), first_type), np.frombuffer(join(second), second_type)


__all__ = ["ArrowRows"]
