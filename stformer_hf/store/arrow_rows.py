"""ArrowRows: reads the rows of a store's shards straight from the buffers of memory-mapped Arrow files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import chain
from pathlib import Path

import numpy as np
import pyarrow as pa

from ..sources.obs_columns import as_array
from . import compact_rows
from .read_ahead import MappedFile, ReadAhead


class ArrowRows:
    """Rows of shards, read from their memory maps.

    Parameters
    ----------
    files : sequence of Path
        Arrow stream files, in the order of the rows.
    neighbor_shifts : sequence of int
        Offset per file, added to the row numbers in its `neighbors`.

    Raises
    ------
    ValueError
        A file is damaged.
    """

    def __init__(self, files: Sequence[Path], neighbor_shifts: Sequence[int]):
        self._batches: list[pa.RecordBatch] = []
        self._files: list[MappedFile] = []  # of each batch
        shifts = []
        wanted: list[tuple[str, ...]] = [("genes", "counts")]
        lists: list[list[_List]] = [[], []]
        for file, shift in zip(files, neighbor_shifts, strict=True):
            try:
                mapped = MappedFile(file)
                for batch in pa.ipc.open_stream(mapped.buffer):
                    if not self._batches and compact_rows.CODES in batch.schema.names:
                        wanted = [(compact_rows.CODES,), (compact_rows.LARGE,)]
                    for of_batches, names in zip(lists, wanted, strict=False):
                        of_batches.append(_List(mapped, batch, names))
                    self._batches.append(batch)
                    self._files.append(mapped)
                    shifts.append(shift)
            except (OSError, ValueError, KeyError, pa.ArrowException) as error:
                raise ValueError(f"{file} is damaged: {error}. Copy the store again, or rebuild it.") from error
        self._shifts = np.array(shifts, np.int64)
        self._starts = np.cumsum([0, *(batch.num_rows for batch in self._batches)])
        self._is_compact = len(wanted) == 2
        self._cells, self._large = map(_Lists, lists)  # of compact rows: the codes, and the large counts
        self._ahead = ReadAhead()

    def __len__(self) -> int:
        return int(self._starts[-1])

    def lengths(self) -> np.ndarray:
        """Count the entries of every row: int64 array (n,)."""
        if self._is_compact:
            return self._n_expressed.astype(np.int64)
        return self._cells.lengths()

    @cached_property
    def _n_expressed(self) -> np.ndarray:
        return np.concatenate([batch.column(compact_rows.LENGTH).to_numpy() for batch in self._batches])

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
        if not self._is_compact:
            [(indptr, (genes, counts))] = self._gather(rows, (self._cells, (gene_type, count_type)))
            return indptr, genes, counts
        (bounds, (codes,)), (_, (large,)) = self._gather(rows, (self._cells, ("uint8",)), (self._large, (count_type,)))
        lengths = self._n_expressed[rows]
        indptr = np.zeros(len(rows) + 1, np.int64)
        np.cumsum(lengths, out=indptr[1:])
        return indptr, *compact_rows.decode(bounds, codes, lengths, large, gene_type, count_type)

    def neighbors(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the neighbours of rows: indptr int64 (n + 1,), row numbers int64 and weights float32 (nnz,)."""
        [(indptr, (numbers, weights))] = self._gather(rows, (self._neighbors, ("uint32", "float32")))
        shifts = self._shifts[self._starts.searchsorted(rows, side="right") - 1]
        return indptr, numbers + np.repeat(shifts, np.diff(indptr)), weights

    def _gather(
        self, rows: np.ndarray, *wanted: tuple[_Lists, Sequence[str]]
    ) -> list[tuple[np.ndarray, list[np.ndarray]]]:
        """Return the bounds of rows, and a copy of their entries in each column, for list columns and their types."""
        found = [lists.find(rows) for lists, _ in wanted]
        self._ahead.ask_for(
            chain.from_iterable(lists.ranges(runs) for (lists, _), (_, runs) in zip(wanted, found, strict=True))
        )
        read = [
            (indptr, lists.copy(runs, types)) for (lists, types), (indptr, runs) in zip(wanted, found, strict=True)
        ]
        self._ahead.look()
        return read

    @cached_property
    def _neighbors(self) -> _Lists:
        names = ("neighbors", "neighbor_weights")
        return _Lists([_List(file, batch, names) for file, batch in zip(self._files, self._batches, strict=True)])

    def column(self, name: str) -> np.ndarray:
        """Return another column of all rows; see `as_array`."""
        chunks = [batch.column(name) for batch in self._batches]
        return as_array(pa.chunked_array(chunks)) if chunks else np.empty(0, object)


class _List:
    """List columns of a record batch; in every row they are equally long.

    Attributes
    ----------
    file : MappedFile
    bounds : int32 array (n_rows + 1,)
    values : list of memoryview
        Values of each column.
    places : list of int
        Where they begin in the file.
    """

    def __init__(self, file: MappedFile, batch: pa.RecordBatch, names: Sequence[str]):
        columns = [batch.column(name) for name in names]
        self.file = file
        self.bounds = columns[0].offsets.to_numpy()
        self.values = [memoryview(column.values.to_numpy()) for column in columns]
        self.places = [file.place(column.values) for column in columns]


class _Lists:
    """List columns of record batches."""

    def __init__(self, lists: Sequence[_List]):
        self._lists = lists
        self._starts = np.cumsum([0, *(len(of.bounds) - 1 for of in lists)])
        # Row r of batch b has the entries _bounds[r + b]:_bounds[r + b + 1] of the batch's values.
        self._bounds = np.concatenate([of.bounds for of in lists]) if lists else np.zeros(0, np.int32)
        self._values = list(zip(*(of.values for of in lists), strict=True))  # of each column, by batch

    def lengths(self) -> np.ndarray:
        """Count the entries of every row: int64 array (n,)."""
        rows = np.arange(self._starts[-1])
        rows += np.repeat(np.arange(len(self._starts) - 1), np.diff(self._starts))
        return self._bounds[rows + 1].astype(np.int64) - self._bounds[rows]

    def find(self, rows: np.ndarray) -> tuple[np.ndarray, list[tuple[int, int, int]]]:
        """Return the bounds of rows, int64 array (n + 1,), and the runs of entries: (batch, start, stop)."""
        batches = self._starts.searchsorted(rows, side="right") - 1
        at = rows + batches
        starts, stops = self._bounds[at], self._bounds[at + 1]
        indptr = np.zeros(len(rows) + 1, np.int64)
        np.cumsum(stops - starts, out=indptr[1:])
        follows = np.diff(at) == 1  # the next row of the same batch continues the run
        if follows.any():
            begins, ends = np.flatnonzero(np.r_[True, ~follows]), np.flatnonzero(np.r_[~follows, True])
            batches, starts, stops = batches[begins], starts[begins], stops[ends]
        return indptr, list(zip(batches.tolist(), starts.tolist(), stops.tolist(), strict=True))

    def copy(self, runs: Sequence[tuple[int, int, int]], types: Sequence[str]) -> list[np.ndarray]:
        """Return a copy of the entries of runs, flat, for each column, which have these types."""
        if not runs:
            return [np.empty(0, kind) for kind in types]
        # Joining slices of memoryviews as bytes costs half as much as np.concatenate of slices of arrays.
        join = bytearray().join  # a bytearray is writable, bytes are not
        columns = [join([values[batch][start:stop] for batch, start, stop in runs]) for values in self._values]
        return [np.frombuffer(column, kind) for column, kind in zip(columns, types, strict=True)]

    def ranges(self, runs: Sequence[tuple[int, int, int]]) -> Iterator[tuple[MappedFile, int, int]]:
        """Return the bytes that runs of entries take in their files."""
        for batch, start, stop in runs:
            of = self._lists[batch]
            for values, place in zip(of.values, of.places, strict=True):
                yield of.file, place + start * values.itemsize, place + stop * values.itemsize


__all__ = ["ArrowRows"]
