"""ArrowRows: the rows of a store's shards, read straight from the buffers of memory-mapped Arrow files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from .shards import read_batches


class ArrowRows:
    """Rows of shards, as numpy views of their memory maps.

    Parameters
    ----------
    files : sequence of Path
        Arrow stream files, in the order of the rows.
    neighbor_shifts : sequence of int
        For each file, what is added to the row numbers in its `neighbors`.

    Raises
    ------
    ValueError
        A file that is damaged.
    """

    def __init__(self, files: Sequence[Path], neighbor_shifts: Sequence[int]):
        self._batches: list[pa.RecordBatch] = []
        self._genes: list[np.ndarray] = []
        self._counts: list[np.ndarray] = []
        self._shifts: list[int] = []
        bounds = []
        for file, shift in zip(files, neighbor_shifts, strict=True):
            try:
                for batch in read_batches(file):
                    genes = batch.column("genes")
                    self._batches.append(batch)
                    self._genes.append(genes.values.to_numpy())
                    self._counts.append(batch.column("counts").values.to_numpy())
                    self._shifts.append(shift)
                    bounds.append(genes.offsets.to_numpy())
            except (OSError, KeyError, pa.ArrowException) as error:
                raise ValueError(f"{file} is damaged: {error}. Copy the store again, or build it again.") from error
        # Row r of batch b has the entries _bounds[r + b]:_bounds[r + b + 1] of the batch's genes and counts.
        self._bounds = np.concatenate(bounds) if bounds else np.zeros(0, np.int32)
        self._starts = np.cumsum([0, *(len(offsets) - 1 for offsets in bounds)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def lengths(self) -> np.ndarray:
        """Count the entries of every row: int64 array (n,)."""
        rows = np.arange(len(self)) + np.repeat(np.arange(len(self._batches)), np.diff(self._starts))
        return self._bounds[rows + 1].astype(np.int64) - self._bounds[rows]

    def gather(self, rows: np.ndarray, gene_type: str, count_type: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Copy rows out.

        Parameters
        ----------
        rows : int64 array (n,)
            Row numbers, in any order.
        gene_type, count_type : str
            Types of the results where there are no rows.

        Returns
        -------
        indptr : int64 array (n + 1,)
        genes, counts : arrays (nnz,)
        """
        batches = self._starts.searchsorted(rows, side="right") - 1
        at = rows + batches
        starts, stops = self._bounds[at], self._bounds[at + 1]
        indptr = np.zeros(len(rows) + 1, np.int64)
        np.cumsum(stops - starts, out=indptr[1:])
        if not len(rows):
            return indptr, np.empty(0, gene_type), np.empty(0, count_type)
        follows = np.diff(at) == 1  # the next row of the same batch: one run
        if follows.any():
            firsts, lasts = np.flatnonzero(np.r_[True, ~follows]), np.flatnonzero(np.r_[~follows, True])
            batches, starts, stops = batches[firsts], starts[firsts], stops[lasts]
        runs = list(zip(batches.tolist(), starts.tolist(), stops.tolist(), strict=True))
        all_genes, all_counts = self._genes, self._counts
        genes = np.concatenate([all_genes[batch][start:stop] for batch, start, stop in runs])
        counts = np.concatenate([all_counts[batch][start:stop] for batch, start, stop in runs])
        return indptr, genes, counts

    def neighbors(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Copy the neighbours of rows out: indptr int64 (n + 1,), numbers int64 and weights float32 (nnz,)."""
        batches = self._starts.searchsorted(rows, side="right") - 1
        numbers, weights = [np.empty(0, np.int64)], [np.empty(0, np.float32)]
        for batch, row in zip(batches.tolist(), (rows - self._starts[batches]).tolist(), strict=True):
            lists = self._batches[batch].column("neighbors")[row]
            numbers.append(lists.values.to_numpy().astype(np.int64) + self._shifts[batch])
            weights.append(self._batches[batch].column("neighbor_weights")[row].values.to_numpy())
        indptr = np.cumsum([len(part) for part in numbers], dtype=np.int64)
        return indptr, np.concatenate(numbers), np.concatenate(weights)

    def column(self, name: str) -> np.ndarray:
        """Read another column of all rows: array (n,); missing values are NaN or None."""
        chunks = [batch.column(name) for batch in self._batches]
        return pa.chunked_array(chunks).to_pandas().to_numpy() if chunks else np.empty(0, object)


__all__ = ["ArrowRows"]
