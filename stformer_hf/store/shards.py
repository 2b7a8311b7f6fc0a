"""Shards: Arrow stream files with one row per cell. `RowFormat` defines their columns and types.

Pieces of sources are written to shards, widened to a common count type, and shuffled.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import xxhash
from scipy import sparse

from ..genes.text_files import naming
from ..genes.unite import FATES
from ..genes.whole_files import part_of, whole_file
from ..sources.matrices import Matrix
from ..sources.obs_columns import as_arrow
from ..sources.open_source import AlignedCounts
from ..sources.same_cells import describe, row_totals
from . import compact_rows

if TYPE_CHECKING:
    from datasets import Features

COUNT_TYPES = ("uint8", "uint16", "uint32", "float32")  # from narrow to wide
_WHOLE_IN_FLOAT32 = 1 << 24  # float32 holds every whole number up to here
_NO_COMMON_TYPE = (
    "There are fractions, and whole numbers elsewhere that float32 cannot hold exactly: build two stores, or round "
    "the fractions."
)


@dataclass
class RowFormat:
    """Columns of a store's rows, from which the Arrow schema and the Hugging Face features are made."""

    gene_type: str  # of `genes`
    count_type: str  # of `counts`
    neighbors: bool  # whether there are `neighbors` and `neighbor_weights`
    obs: dict[str, str]  # Arrow types of the obs columns
    categories: dict[str, list[str]]  # of the categorical columns, in the order of their codes
    compact: bool = False  # whether genes and counts are encoded, see `compact_rows`

    @property
    def types(self) -> dict[str, str]:
        """Types of genes and counts, as the records of shards hold them."""
        return {"gene_type": self.gene_type, "count_type": self.count_type}

    def fits(self, shard: dict) -> bool:
        """Return whether a shard, by its record, has these types."""
        return self.types.items() <= shard.items()

    def features(self) -> Features:
        """Hugging Face features of the rows."""
        from datasets import ClassLabel, Features, List, Value

        features: dict[str, Any] = {"genes": List(Value(self.gene_type)), "counts": List(Value(self.count_type))}
        if self.compact:
            features = {compact_rows.CODES: List(Value("uint8")), compact_rows.LARGE: List(Value(self.count_type))}
            features[compact_rows.LENGTH] = Value("int32")
        features["obs_name"] = Value("string")
        for name, kind in self.obs.items():
            if name in self.categories:
                features[name] = ClassLabel(names=self.categories[name])
            else:
                features[name] = Value(kind.replace("double", "float64"))
        if self.neighbors:
            features["neighbors"], features["neighbor_weights"] = List(Value("uint32")), List(Value("float32"))
        return Features(features)

    def schema(self) -> pa.Schema:
        """Arrow schema of the rows."""
        return self.features().arrow_schema

    def columns_of(self, block: sparse.csr_matrix) -> dict[str, pa.Array]:
        """Return the columns that hold the counts of cells, (n_cells, n_genes), genes ascending."""
        genes, counts = block.indices.astype(self.gene_type), block.data.astype(self.count_type)
        if not self.compact:
            return {"genes": _lists(block.indptr, genes), "counts": _lists(block.indptr, counts)}
        code_bounds, codes, large_bounds, large = compact_rows.encode(block.indptr, genes, counts)
        return {
            compact_rows.CODES: _lists(code_bounds, codes),
            compact_rows.LARGE: _lists(large_bounds, large),
            compact_rows.LENGTH: pa.array(np.diff(block.indptr), pa.int32()),
        }


def gene_type(n_genes: int) -> str:
    """Return the narrowest type that holds the row numbers of a gene table."""
    return "uint16" if n_genes <= 1 << 16 else "uint32"


def widest(count_types: Sequence[str]) -> str:
    """Return the narrowest type that holds all these types exactly (float32: as exactly as it can)."""
    return max(count_types, key=COUNT_TYPES.index, default=COUNT_TYPES[0])


def count_type_of(counts: np.ndarray, name: str) -> str:
    """Return the narrowest type that holds counts (whole numbers exactly, fractions to float32's precision).

    They must fit into 32 bits; `name` is that of their source.
    """
    largest = counts.max(initial=0)
    if counts.dtype.kind == "f" and (counts != np.rint(counts)).any():
        if largest > np.finfo(np.float32).max:
            raise ValueError(f"{name}: the value {largest:g} does not fit into float32.")
        if largest > _WHOLE_IN_FLOAT32:
            whole = counts[counts == np.rint(counts)]
            if (whole.astype(np.float32) != whole).any():
                raise ValueError(
                    f"{name}: there are fractions, and float32 cannot hold the value {whole.max():.0f} exactly."
                )
        return "float32"
    for count_type in COUNT_TYPES[:-1]:
        if largest <= np.iinfo(count_type).max:
            return count_type
    raise ValueError(f"{name}: the count {largest:g} does not fit into 32 bits.")


@dataclass
class Piece(AlignedCounts):
    """A range of cells of one source, and all that any process needs to write it."""

    record: Path  # exists once the piece is written; the names of its shards begin with its stem
    source: int
    start: int
    stop: int
    fates: np.ndarray  # of each column, see `genes.unite`
    n_genes: int  # length of the gene table
    obs_names: pa.Array | pa.ChunkedArray
    obs: dict[str, pa.Array | pa.ChunkedArray | None]
    neighbors: Matrix | None  # graph of the source's cells
    first_row: int  # of the source in the store; added to the numbers of its neighbours
    format: RowFormat  # writing starts with its count type
    rows_per_batch: int
    rows_per_shard: int
    describe: bool = False  # write descriptions of the cells, too, which find duplicates (`same_cells.describe`)

    def __len__(self) -> int:
        return self.stop - self.start

    @property
    def description(self) -> Path:
        """File with the descriptions of the cells."""
        return self.record.with_suffix(".npy")

    @property
    def is_written(self) -> bool:
        """Whether all files of the piece exist."""
        return self.record.exists() and (self.description.exists() or not self.describe)


def write_piece(piece: Piece, progress: Callable[[int], object] = lambda n_cells: None) -> dict:
    """Write a piece to shards, then write and return its record."""
    with told_when_full(piece.record.parent):
        with naming(piece.name):
            piece.matrix.prepare(piece.record.parent)
        writer = ShardWriter(piece.record.parent, piece.record.stem, piece.format, piece.rows_per_shard)
        columns = _columns_of(piece)
        per_fate, n_counts, n_empty = np.zeros(len(FATES)), 0, 0
        at, described = 0, [np.empty((0, 2), np.float32)]
        try:
            for block in piece.blocks(piece.rows_per_batch, piece.start, piece.stop):
                totals = row_totals(block) if piece.describe else block.data
                per_fate += _sums(block, piece.fates, totals)
                block = align(block, piece.genes, piece.n_genes)
                if piece.describe:
                    described.append(describe(totals, block.indptr))
                n = block.shape[0]
                own = {name: values[at : at + n] for name, values in columns.items()}
                if piece.neighbors is not None:
                    own |= _neighbors_of(piece, piece.neighbors, at, at + n)
                writer.write(block, own, _count_type_of(piece, block))
                n_counts += block.nnz
                n_empty += int((np.diff(block.indptr) == 0).sum())
                at += n
                progress(n)
        finally:
            writer.close()
            piece.matrix.close()
        record = {
            "source": piece.source,
            "cells": [piece.start, piece.stop],
            "n_counts": n_counts,
            "n_empty": n_empty,
            "total_counts": dict(zip(FATES, per_fate.tolist(), strict=True)),
            "shards": writer.shards,
        }
        if piece.describe:
            with whole_file(piece.description) as part, open(part, "wb") as file:
                np.save(file, np.concatenate(described))
        write_json(piece.record, record)
    return record


def _columns_of(piece: Piece) -> dict[str, pa.Array]:
    """Return names and obs of the cells, as they are stored."""
    schema, values = piece.format.schema(), {"obs_name": piece.obs_names, **piece.obs}
    return {
        name: as_arrow(values[name], schema.field(name).type, len(piece)) for name in ("obs_name", *piece.format.obs)
    }


def _neighbors_of(piece: Piece, graph: Matrix, start: int, stop: int) -> dict[str, pa.Array]:
    """Return the neighbours of cells of a piece, by their rows in the store."""
    rows = graph.rows(piece.start + start, piece.start + stop)
    rows.sort_indices()
    numbers = (rows.indices.astype(np.int64) + piece.first_row).astype(np.uint32)
    weights = rows.data.astype(np.float32)
    return {"neighbors": _lists(rows.indptr, numbers), "neighbor_weights": _lists(rows.indptr, weights)}


def _count_type_of(piece: Piece, block: sparse.csr_matrix) -> str:
    """Return `count_type_of` the counts of a block; compact rows hold no fractions."""
    count_type = count_type_of(block.data, piece.name)
    if piece.format.compact and count_type == "float32":
        raise ValueError(
            f"{piece.name}: {piece.counts_in} holds fractions, which compact rows cannot hold. Round the "
            "counts, or use a store without compact rows."
        )
    return count_type


def _sums(block: sparse.csr_matrix, fates: np.ndarray, totals: np.ndarray) -> np.ndarray:
    """Sum the counts of the columns of each fate; `totals` adds up to the sum of the block."""
    if len(fates) and (fates == fates[0]).all():  # most sources; sums per column cost as much as all else together
        return np.bincount(fates[:1], [totals.sum(dtype=np.float64)], len(FATES))
    return np.bincount(fates[block.indices], block.data, len(FATES))


class ShardWriter:
    """Writes rows to shards, in the narrowest count type that holds the counts so far; `stem` begins their names."""

    def __init__(self, folder: Path, stem: str, row_format: RowFormat, rows_per_shard: int):
        self.shards: list[dict] = []
        self._folder, self._stem, self._rows_per_shard = folder, stem, rows_per_shard
        self._format = row_format
        self._schema = row_format.schema()
        self._writer: pa.ipc.RecordBatchStreamWriter | None = None

    def write(self, block: sparse.csr_matrix, columns: dict[str, pa.Array], count_type: str) -> None:
        """Write cells: their counts, of any type that `count_type` can hold, and their other columns."""
        wider = widest([count_type, self._format.count_type]) != self._format.count_type
        if wider:
            self._format = replace(self._format, count_type=count_type)
            self._schema = self._format.schema()
        if wider or not self.shards or self.shards[-1]["rows"] >= self._rows_per_shard:
            self.open()
        if (count_type, self._format.count_type) == ("uint32", "float32"):
            if (block.data.astype(np.float32) != block.data).any():
                raise ValueError(_NO_COMMON_TYPE)
        columns = {**self._format.columns_of(block), **columns}
        batch = pa.record_batch([columns[name] for name in self._schema.names], schema=self._schema)
        assert self._writer is not None  # `open` was called before the first rows
        self._writer.write_batch(batch)
        self.shards[-1]["rows"] += batch.num_rows

    def open(self) -> None:
        """Start a new file."""
        self.close()
        file = f"{self._stem}-{len(self.shards):05d}.arrow"
        self.shards.append({"file": file, "rows": 0, **self._format.types})
        self._part = part_of(self._folder / file)
        self._file = open(self._part, "wb")
        self._writer = pa.ipc.new_stream(self._file, self._schema)

    def close(self) -> None:
        """Close the open file and sync it to disk, so that no record is written before its file."""
        if self._writer is not None:
            with self._file:
                self._writer.close()
                self._file.flush()
                os.fsync(self._file.fileno())
            self._writer = None
            self._part.replace(self._folder / self.shards[-1]["file"])


def _lists(bounds: np.ndarray, values: np.ndarray) -> pa.ListArray:
    return pa.ListArray.from_arrays(pa.array(bounds.astype(np.int32)), values)


def read_batches(file: Path) -> Iterator[pa.RecordBatch]:
    """Read the record batches of a shard from a memory map."""
    with pa.memory_map(str(file)) as source, pa.ipc.open_stream(source) as reader:
        yield from reader


def rewrite(file: Path, target: Path, row_format: RowFormat) -> None:
    """Rewrite a shard with the types of a format, one record batch at a time."""
    schema = row_format.schema()
    with whole_file(target) as part, pa.ipc.new_stream(str(part), schema) as writer:
        for batch in read_batches(file):
            try:
                writer.write_batch(pa.record_batch(batch.columns, batch.schema.remove_metadata()).cast(schema))
            except pa.ArrowInvalid as error:
                raise ValueError(_NO_COMMON_TYPE) from error


def align(block: sparse.csr_matrix, genes: np.ndarray, n_genes: int) -> sparse.csr_matrix:
    """Map the columns of a block to rows of the gene table, ascending; repeated ones are summed."""
    same = n_genes == block.shape[1] and np.array_equal(genes, np.arange(n_genes))
    if same and block.has_canonical_format:
        return block
    # Sums of narrow integers must not wrap.
    data = block.data.astype(np.int64) if block.data.dtype.kind in "iub" else block.data.astype(np.float64)
    aligned = sparse.csr_matrix((data, genes[block.indices], block.indptr.copy()), shape=(block.shape[0], n_genes))
    aligned.sum_duplicates()
    return aligned


@contextlib.contextmanager
def told_when_full(folder: Path, what: str = "the store", call: str = "build") -> Iterator[None]:
    """Add what to do to the error of a full disk; `folder` is the unfinished folder, which may be deleted."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        free = shutil.disk_usage(folder if folder.exists() else folder.parent).free
        raise OSError(
            error.errno,
            f"no space for {what}: {free / 1e6:,.0f} MB are left at {folder}. Free some space and call {call} again "
            "to resume, or delete this folder.",
        ) from error


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically."""
    with whole_file(path) as part, open(part, "w", encoding="utf-8") as file:
        json.dump(value, file, indent=1, ensure_ascii=False)
        file.flush()
        os.fsync(file.fileno())


def checksum(path: Path) -> str:
    """Return the xxh3_128 checksum of a file, as fast as the file is read; it detects damage, not malice."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()
