"""ArrowRows: reads the rows of a store's shards straight from the buffers of Arrow files.

Local files are mapped to memory; of files on a server only the needed ranges are read.
"""

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
from .remote_batches import RemoteBatch, RemoteValues, read_column, read_headers
from .remote_files import Range, RemoteFile, fetched

Slice = memoryview | Range
_Runs = list[tuple[int, int, int]]  # entries of a batch: its number, the first one, and the one after the last


class ArrowRows:
    """Rows of shards, Arrow stream files in the order of the rows; an offset per file is added to its `neighbors`."""

    def __init__(self, files: Sequence[Path | RemoteFile], neighbor_shifts: Sequence[int], compact: bool):
        self._batches: list[pa.RecordBatch | RemoteBatch] = []
        self._files: list[MappedFile | None] = []  # of each batch
        shifts = []
        wanted: list[tuple[str, ...]] = [("genes", "counts")]
        if compact:
            wanted = [(compact_rows.CODES,), (compact_rows.LARGE,)]
        lists: list[list[_List]] = [[], []]
        remote = [file for file in files if isinstance(file, RemoteFile)]  # all or none
        self._are_remote = bool(remote)
        headers = read_headers(remote)
        for file, shift in zip(files, neighbor_shifts, strict=True):
            try:
                mapped = None if isinstance(file, RemoteFile) else MappedFile(file)
                for batch in next(headers) if mapped is None else pa.ipc.open_stream(mapped.buffer):
                    for of_batches, names in zip(lists, wanted, strict=False):
                        of_batches.append(_List(mapped, batch, names))
                    self._batches.append(batch)
                    self._files.append(mapped)
                    shifts.append(shift)
            except (OSError, ValueError, KeyError, pa.ArrowException) as error:
                if self._are_remote and isinstance(error, OSError):
                    raise  # of the network, or of the cache
                raise ValueError(f"{file} is damaged: {error}. Copy the store again, or rebuild it.") from error
        self._shifts = np.array(shifts, np.int64)
        self._starts = np.cumsum([0, *(batch.num_rows for batch in self._batches)])
        self._is_compact = compact
        self._cells, self._large = map(_Lists, lists)  # of compact rows: the codes, and the large counts
        self._ahead = ReadAhead()

    def __len__(self) -> int:
        return int(self._starts[-1])

    def lengths(self) -> np.ndarray:
        """Count the entries of every row: int64 array (n,)."""
        if not self._is_compact:
            return self._cells.lengths()
        chunks = [lengths.to_numpy() for lengths in self.chunks(compact_rows.LENGTH)]
        return np.concatenate([np.empty(0, np.int64), *chunks])

    def gather(self, rows: np.ndarray, gene_type: str, count_type: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return a copy of rows, int64 array (n,), in any order, in the types of the shards.

        Returns
        -------
        indptr : int64 array (n + 1,)
        genes, counts : arrays (nnz,)
        """
        if not self._is_compact:
            [(indptr, (genes, counts))] = self._gather(rows, (self._cells, (gene_type, count_type)))
            return indptr, genes, counts
        (bounds, (codes,)), (_, (large,)) = self._gather(rows, (self._cells, ("uint8",)), (self._large, (count_type,)))
        return compact_rows.decode(bounds, codes, large, gene_type, count_type)

    def read_ahead(self, rows: np.ndarray) -> None:
        """Ask the system to read rows, of local files; return at once."""
        for lists in (self._cells, self._large) if self._is_compact else (self._cells,):
            self._ahead.ask_now(lists.ranges(lists.find(rows)[1]))

    def neighbors(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the neighbours of rows: indptr int64 (n + 1,), row numbers int64 and weights float32 (nnz,)."""
        [(indptr, (numbers, weights))] = self._gather(rows, (self._neighbors, ("uint32", "float32")))
        shifts = self._shifts[self._starts.searchsorted(rows, side="right") - 1]
        return indptr, numbers + np.repeat(shifts, np.diff(indptr)), weights

    def _gather(
        self, rows: np.ndarray, *wanted: tuple[_Lists, Sequence[str]]
    ) -> list[tuple[np.ndarray, list[np.ndarray]]]:
        """Return the bounds of rows, and a copy of their entries in each column, for list columns and their types."""
        if not self._batches:
            return [(np.zeros(1, np.int64), [np.empty(0, kind) for kind in types]) for _, types in wanted]
        found = [(lists, *lists.find(rows)) for lists, _ in wanted]
        self._ahead.ask_for(lambda: chain.from_iterable(lists.ranges(runs) for lists, _, runs in found))
        slices: list = [column for lists, _, runs in found for column in lists.slices(runs)]
        if self._are_remote:
            slices = fetched(slices)
        # Joining slices of memoryviews as bytes costs half as much as np.concatenate of slices of arrays.
        joined = map(bytearray().join, slices)  # a bytearray is writable, bytes are not
        gathered = [
            (indptr, [np.frombuffer(next(joined), kind) for kind in types])
            for (_, indptr, _), (_, types) in zip(found, wanted, strict=True)
        ]
        self._ahead.look()
        return gathered

    @cached_property
    def _neighbors(self) -> _Lists:
        names = ("neighbors", "neighbor_weights")
        return _Lists([_List(file, batch, names) for file, batch in zip(self._files, self._batches, strict=True)])

    def column(self, name: str) -> np.ndarray:
        """Return another column of all rows; see `as_array`."""
        chunks = self.chunks(name)
        return as_array(pa.chunked_array(chunks)) if chunks else np.empty(0, object)

    def codes(self, name: str, n_classes: int) -> np.ndarray:
        """Return a categorical column of all rows, -1 where missing: the narrowest signed integers (n,)."""
        codes = np.empty(len(self), np.min_scalar_type(-max(n_classes, 1)))
        start = 0
        for chunk in self.chunks(name):
            codes[start : start + len(chunk)] = chunk.fill_null(-1).to_numpy()
            start += len(chunk)
        return codes

    def chunks(self, name: str) -> list[pa.Array]:
        """Return another column as it is stored, one array per record batch."""
        remote = [batch for batch in self._batches if isinstance(batch, RemoteBatch)]  # all or none
        return read_column(remote, name) if remote else [batch.column(name) for batch in self._batches]  # type: ignore


class _List:
    """List columns of a record batch; in every row they are equally long."""

    def __init__(self, file: MappedFile | None, batch: pa.RecordBatch | RemoteBatch, names: Sequence[str]):
        self.file = file
        self.places: list[tuple[int, int]] = []  # in a local file: where values begin, and the bytes of one
        self.bounds: np.ndarray | Range  # int32 array (n_rows + 1,), or where it is
        self.values: list[memoryview | RemoteValues]  # of each column
        if isinstance(batch, RemoteBatch):
            self.bounds, self.values = batch.offsets(names[0]), [batch.values(name) for name in names]
        else:
            columns = [batch.column(name) for name in names]
            self.bounds = columns[0].offsets.to_numpy()
            self.values = [memoryview(column.values.to_numpy()) for column in columns]
            assert file is not None  # it has the batch
            self.places = [(file.place(column.values), column.values.type.bit_width // 8) for column in columns]


class _Lists:
    """List columns of record batches."""

    def __init__(self, lists: Sequence[_List]):
        self._lists = lists
        [contents] = fetched([[of.bounds for of in lists]])
        bounds = [np.frombuffer(offsets, np.int32) for offsets in contents]
        self._stops = np.cumsum([len(offsets) - 1 for offsets in bounds], dtype=np.int64)  # last row + 1 of each batch
        # Row r of batch b has the entries _bounds[r + b]:_bounds[r + b + 1] of the batch's values.
        self._bounds = np.concatenate(bounds) if bounds else np.zeros(0, np.int32)
        self._values = list(zip(*(of.values for of in lists), strict=True))  # of each column, by batch

    def lengths(self) -> np.ndarray:
        """Count the entries of every row: int64 array (n,)."""
        start, n_rows = 0, len(self._bounds) - len(self._stops)
        lengths = np.empty(n_rows, np.int64)
        for batch, stop in enumerate(self._stops.tolist()):
            bounds = self._bounds[start + batch : stop + batch + 1]
            np.subtract(bounds[1:], bounds[:-1], out=lengths[start:stop])
            start = stop
        return lengths

    def find(self, rows: np.ndarray) -> tuple[np.ndarray, _Runs]:
        """Return the bounds of rows, int64 array (n + 1,), and the runs of entries: batches, starts and stops."""
        batches = self._stops.searchsorted(rows, side="right")
        at = rows + batches
        follows = at[1:] - at[:-1] == 1  # the next row of the same batch continues the run
        starts, stops = self._bounds[at], self._bounds[1:][at]
        indptr = np.zeros(len(rows) + 1, np.int64)
        (stops - starts).cumsum(out=indptr[1:])
        if np.count_nonzero(follows):  # takes a third of the time of any()
            begins, ends = np.flatnonzero(np.r_[True, ~follows]), np.flatnonzero(np.r_[~follows, True])
            batches, starts, stops = batches[begins], starts[begins], stops[ends]
        return indptr, list(zip(batches.tolist(), starts.tolist(), stops.tolist(), strict=True))

    def slices(self, runs: _Runs) -> list[list[Slice]]:
        """Return the entries of runs, for each column."""
        return [[values[batch][start:stop] for batch, start, stop in runs] for values in self._values]

    def ranges(self, runs: _Runs) -> Iterator[tuple[MappedFile, int, int]]:
        """Return the bytes that runs of entries take in their files."""
        for batch, start, stop in runs:
            of = self._lists[batch]
            if of.file is not None:
                for place, size in of.places:
                    yield of.file, place + start * size, place + stop * size
