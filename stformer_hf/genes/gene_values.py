"""Values of genes over cells, for their medians: all of them (`AllValues`), or one histogram per gene (`ValueSketch`).

Both accept blocks of cells, can be added, and have lengths and medians. A value is count / total counts of the cell;
the target sum is applied at the end.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from itertools import pairwise

import numpy as np
from scipy import sparse

RELATIVE_ERROR = 0.0075  # of a sketch: (r - 1) / (r + 1) for buckets of the ratio r = 2 ** (1 / 47), and a margin
_BUCKETS = 47  # number of buckets per doubling
_FRACTION_BITS = 12  # fraction bits of a logarithm, whose unit is a bucket
_FEW_COUNTS = 1 << 16  # logarithms of smaller integers are in a table
_SLICE = 1 << 16  # entries processed at once: their arrays stay in the processor's cache
_AT_ONCE = 1 << 22  # values sorted, or counts summed, at once for medians


class AllValues:
    """All counts of cells, and the cells' totals: medians of their values are exact."""

    def __init__(self, n_genes: int):
        self.n_genes = n_genes
        self.blocks: list[sparse.csr_array] = []  # counts in narrow types, (n_genes, n_cells) each
        self.totals: list[np.ndarray] = []  # of the cells of each block: float64 (n_cells,)
        self.n_bytes = 0  # memory of all of these

    def add(self, counts: sparse.csr_array, totals: np.ndarray) -> None:
        """Add cells: positive counts (n_cells, n_genes), each gene at most once per cell, and their float64 sums."""
        narrow = sparse.csr_array((_narrow(counts.data), counts.indices, counts.indptr), shape=counts.shape)
        self._append(narrow.T.tocsr(), totals)

    def _append(self, block: sparse.csr_array, totals: np.ndarray) -> None:
        self.blocks.append(block)
        self.totals.append(totals)
        self.n_bytes += sum(part.nbytes for part in (block.data, block.indices, block.indptr, totals))

    def lengths(self) -> np.ndarray:
        """Return the number of values per gene, int64 array (n_genes,)."""
        return sum((np.diff(block.indptr).astype(np.int64) for block in self.blocks), np.zeros(self.n_genes, np.int64))

    def medians(self, target_sum: float) -> np.ndarray:
        """Return the medians, float64 array (n_genes,); NaN where there are no values."""
        lengths = self.lengths()
        medians = np.full(self.n_genes, np.nan)
        totals = np.concatenate([np.empty(0), *self.totals])
        for first, last in _ranges(lengths, _AT_ONCE):
            if not lengths[first:last].any():
                continue
            rows = sparse.hstack([block[first:last] for block in self.blocks], format="csr")
            values = rows.data / totals[rows.indices]
            values *= target_sum
            for start, stop in pairwise(rows.indptr.tolist()):
                values[start:stop].sort()
            seen = np.flatnonzero(lengths[first:last])
            starts, n = rows.indptr[seen], lengths[first:last][seen]
            medians[first + seen] = (values[starts + (n - 1) // 2] + values[starts + n // 2]) / 2
        return medians

    def placed(self, at: np.ndarray, n_genes: int) -> AllValues:
        """Return the same values over more genes; the present genes become the rows `at`."""
        if n_genes == self.n_genes and np.array_equal(at, np.arange(n_genes)):
            return self
        source = np.full(n_genes, self.n_genes)  # all others are an empty row at the end
        source[at] = np.arange(self.n_genes)
        placed = AllValues(n_genes)
        for block, totals in zip(self.blocks, self.totals, strict=True):
            empty = sparse.csr_array((1, block.shape[1]), dtype=block.dtype)
            placed._append(sparse.vstack([block, empty], format="csr")[source], totals)
        return placed

    def plus(self, other: AllValues) -> AllValues:
        """Return the values of the cells of both, over the same genes."""
        both = AllValues(self.n_genes)
        for part in (self, other):
            for block, totals in zip(part.blocks, part.totals, strict=True):
                both._append(block, totals)
        return both

    def sketch(self) -> ValueSketch:
        """Return the sketch of these values."""
        sketch = ValueSketch(self.n_genes)
        for block, totals in zip(self.blocks, self.totals, strict=True):
            sketch.add(block.T.tocsr(), totals)
        return sketch

    def to_arrays(self) -> dict[str, np.ndarray]:
        """Return the arrays that `from_arrays` reads."""
        blocks = self.blocks or [sparse.csr_array((self.n_genes, 0), dtype=np.uint8)]
        rows = sparse.hstack(blocks, format="csr")
        totals = np.concatenate([np.empty(0), *self.totals])
        return {"indptr": rows.indptr, "cells": _narrow(rows.indices), "counts": rows.data, "totals": totals}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray], n_genes: int) -> AllValues:
        """Create an object from the arrays of `to_arrays`."""
        read = cls(n_genes)
        totals = arrays["totals"]
        rows = (arrays["counts"], arrays["cells"].astype(arrays["indptr"].dtype), arrays["indptr"])
        if len(totals):
            block = sparse.csr_array(rows, shape=(n_genes, len(totals)))
            block.check_format()  # invalid indices would read arbitrary memory
            read._append(block, totals)
        return read


class ValueSketch:
    """Number of values of each gene in buckets with a constant ratio of their bounds (DDSketch).

    Bucket i holds values from 2 ** (i / 47) to 2 ** ((i + 1) / 47), before multiplication by the target sum.
    """

    def __init__(self, n_genes: int):
        self.first = 0  # bucket of the first row
        # Number of values (n_buckets, n_genes); uint64 from 2 ** 32 cells on. Rows are buckets, because most counts of
        # a cell are 1, 2 or 3, so the numbers that it increases are close in memory.
        self.counts = np.zeros((0, n_genes), np.uint32)
        self.n_cells = 0

    def add(self, counts: sparse.csr_array, totals: np.ndarray) -> None:
        """Add cells; see `AllValues.add`."""
        lengths, indptr = np.diff(counts.indptr), counts.indptr
        of_totals = _log2(totals)
        low = (int(_log2(counts.data.min())) - int(of_totals.max())) >> _FRACTION_BITS
        high = (int(_log2(counts.data.max())) - int(of_totals.min())) >> _FRACTION_BITS
        self._make_room(low, min(high, 0), len(totals))  # a count is at most the total
        n_genes = self.counts.shape[1]
        one, flat = self.counts.dtype.type(1), self.counts.reshape(-1)
        shifts = -of_totals - (self.first << _FRACTION_BITS)
        is_few = counts.dtype.kind in "iu" and counts.data.max() < _FEW_COUNTS
        for start, stop in _ranges(lengths, _SLICE):
            entries = slice(indptr[start], indptr[stop])
            values = counts.data[entries]
            buckets = _few_log2().take(values.astype(np.intp)) if is_few else _log2(values)
            buckets += np.repeat(shifts[start:stop], lengths[start:stop])
            buckets >>= _FRACTION_BITS
            at = buckets.astype(np.intp)
            at *= n_genes
            at += counts.indices[entries]
            np.add.at(flat, at, one)

    def _make_room(self, low: int, high: int, n_cells: int) -> None:
        """Allocate rows for the buckets from low to high, and a type that can count `n_cells` more cells."""
        self.n_cells += n_cells
        wide = np.uint64 if self.n_cells > np.iinfo(np.uint32).max else self.counts.dtype
        stop = self.first + len(self.counts)
        if not len(self.counts):
            self.first = stop = low
        elif self.first <= low and high < stop and wide == self.counts.dtype:
            return
        if low < self.first:
            low -= _BUCKETS  # unused rows take no memory
        low, high = min(low, self.first), max(high + 1, stop)
        room = np.zeros((high - low, self.counts.shape[1]), wide)
        room[self.first - low : stop - low] = self.counts
        self.first, self.counts = low, room

    def lengths(self) -> np.ndarray:
        """Return the number of values per gene, int64 array (n_genes,)."""
        return self.counts.sum(axis=0, dtype=np.int64)

    def medians(self, target_sum: float) -> np.ndarray:
        """Return the medians, float64 array (n_genes,); NaN where there are no values."""
        lengths = self.lengths()
        lower, upper = np.zeros((2, len(lengths)), np.int64)
        step = max(1, _AT_ONCE // max(1, len(self.counts)))
        for start in range(0, len(lengths), step):
            genes = slice(start, start + step)
            up_to = np.cumsum(self.counts[:, genes], axis=0, dtype=np.int64)
            lower[genes] = (up_to <= (lengths[genes] - 1) // 2).sum(axis=0)
            upper[genes] = (up_to <= lengths[genes] // 2).sum(axis=0)
        ratio = 2 ** (1 / _BUCKETS)
        middle = 2 * ratio / (1 + ratio)  # of a bucket that begins at 1: equally far, in ratio, from both ends
        medians = (2 ** ((self.first + lower) / _BUCKETS) + 2 ** ((self.first + upper) / _BUCKETS)) / 2
        return np.where(lengths > 0, medians * middle * target_sum, np.nan)

    def placed(self, at: np.ndarray, n_genes: int) -> ValueSketch:
        """Return the same sketch over more genes; the present genes become the columns `at`."""
        if n_genes == self.counts.shape[1] and np.array_equal(at, np.arange(n_genes)):
            return self
        placed = ValueSketch(n_genes)
        placed.first, placed.n_cells = self.first, self.n_cells
        placed.counts = np.zeros((len(self.counts), n_genes), self.counts.dtype)
        placed.counts[:, at] = self.counts
        return placed

    def plus(self, other: ValueSketch) -> ValueSketch:
        """Return the sketch of the cells of both, over the same genes."""
        both = ValueSketch(self.counts.shape[1])
        for part in (self, other):
            both._make_room(part.first, part.first + len(part.counts) - 1, part.n_cells)
            start = part.first - both.first
            both.counts[start : start + len(part.counts)] += part.counts
        return both

    def sketch(self) -> ValueSketch:
        """Return itself, as `AllValues.sketch` returns a sketch."""
        return self

    def to_arrays(self) -> dict[str, np.ndarray]:
        """Return the arrays that `from_arrays` reads."""
        rows, genes = self.counts.nonzero()
        return {
            "first": np.array(self.first),
            "lengths": np.bincount(rows, minlength=len(self.counts)),
            "genes": _narrow(genes),
            "counts": _narrow(self.counts[rows, genes]),
        }

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray], n_genes: int) -> ValueSketch:
        """Create a sketch from the arrays of `to_arrays`; `n_cells` is the number of cells."""
        read = cls(n_genes)
        lengths, first = arrays["lengths"], arrays["first"].item()
        if len(lengths):
            read._make_room(first, first + len(lengths) - 1, arrays["n_cells"].item())
            read.counts[np.repeat(np.arange(len(lengths)), lengths), arrays["genes"]] = arrays["counts"]
        return read


def _log2(values: np.ndarray) -> np.ndarray:
    """Return logarithms in units of buckets, int32 with `_FRACTION_BITS` fraction bits, so that sums are exact."""
    return np.rint(np.log2(values, dtype=np.float64) * (_BUCKETS << _FRACTION_BITS)).astype(np.int32)


@cache
def _few_log2() -> np.ndarray:
    return _log2(np.arange(_FEW_COUNTS).clip(1))


def _ranges(lengths: np.ndarray, most: int) -> Iterator[tuple[int, int]]:
    """Split rows into ranges of at most `most` entries, but at least one row."""
    ends = np.cumsum(lengths, dtype=np.int64)
    start = 0
    while start < len(ends):
        done = ends[start] - lengths[start]
        stop = max(start + 1, int(ends.searchsorted(done + most, side="right")))
        yield start, stop
        start = stop


def _narrow(values: np.ndarray) -> np.ndarray:
    """Return non-negative integers in the narrowest type that holds them."""
    return values if values.dtype.kind == "f" else values.astype(np.min_scalar_type(values.max(initial=0)), copy=False)
