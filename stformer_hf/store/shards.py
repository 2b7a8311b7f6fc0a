"""Shards: Arrow stream files with one row per cell. `RowFormat` defines their columns and types.

Pieces of sources are written to shards, widened to a common count type, and shuffled.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

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

logger = logging.getLogger(__name__)

COUNT_TYPES = ("uint8", "uint16", "uint32", "float32")  # from narrow to wide
_WHOLE_IN_FLOAT32 = 1 << 24  # float32 holds every whole number up to here
_NO_COMMON_TYPE = (
    "There are fractions, and whole numbers elsewhere that float32 cannot hold exactly: build two stores, or round "
    "the fractions."
)
_MAX_BUCKETS = 512  # files that a shuffle has open at once
_ROWS_PER_BUCKET = 16_384


@dataclass
class RowFormat:
    """Columns of a store's rows, from which the Arrow schema and the Hugging Face features are made.

    Attributes
    ----------
    gene_type, count_type : str
        Types of `genes` and `counts`.
    neighbors : bool
        Whether there are `neighbors` and `neighbor_weights`.
    obs : dict of str to str
        Arrow types of the obs columns.
    categories : dict of str to list of str
        Categories of the categorical columns, in the order of their codes.
    compact : bool
        Whether genes and counts are encoded; see `compact_rows`.
    """

    gene_type: str
    count_type: str
    neighbors: bool
    obs: dict[str, str]
    categories: dict[str, list[str]]
    compact: bool = False

    def features(self):
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

    def with_count_type(self, count_type: str) -> RowFormat:
        """Return the format with another count type."""
        return replace(self, count_type=count_type)

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

    Raises
    ------
    ValueError
        A count does not fit into 32 bits.
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
        per_fate = np.zeros(len(FATES))
        n_counts = n_empty = 0
        names = as_arrow(piece.obs_names, pa.string(), len(piece))
        obs = {
            name: as_arrow(piece.obs[name], kind, piece.stop - piece.start)
            for name, kind in _obs_types(piece.format).items()
        }
        at, described = 0, [np.empty((0, 2), np.float32)]
        try:
            for block in piece.blocks(piece.rows_per_batch, piece.start, piece.stop):
                totals = row_totals(block) if piece.describe else block.data
                per_fate += _sums(block, piece.fates, totals)
                block = align(block, piece.genes, piece.n_genes)
                if piece.describe:
                    described.append(describe(totals, block.indptr))
                n = block.shape[0]
                columns = {
                    "obs_name": names[at : at + n],
                    **{name: values[at : at + n] for name, values in obs.items()},
                }
                if piece.neighbors is not None:
                    graph = piece.neighbors.rows(piece.start + at, piece.start + at + n)
                    graph.sort_indices()
                    numbers = (graph.indices.astype(np.int64) + piece.first_row).astype(np.uint32)
                    columns["neighbors"] = _lists(graph.indptr, numbers)
                    columns["neighbor_weights"] = _lists(graph.indptr, graph.data.astype(np.float32))
                count_type = count_type_of(block.data, piece.name)
                if piece.format.compact and count_type == "float32":
                    raise ValueError(
                        f"{piece.name}: {piece.counts_in} holds fractions, which compact rows cannot hold. Round the "
                        "counts, or use a store without compact rows."
                    )
                writer.write(block, columns, count_type)
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


def _sums(block: sparse.csr_matrix, fates: np.ndarray, totals: np.ndarray) -> np.ndarray:
    """Sum the counts of the columns of each fate; `totals` adds up to the sum of the block."""
    if len(fates) and (fates == fates[0]).all():  # most sources; sums per column cost as much as all else together
        return np.bincount(fates[:1], [totals.sum(dtype=np.float64)], len(FATES))
    return np.bincount(fates[block.indices], block.data, len(FATES))


def _obs_types(row_format: RowFormat) -> dict[str, pa.DataType]:
    schema = row_format.schema()
    return {name: schema.field(name).type for name in row_format.obs}


class ShardWriter:
    """Writes rows to shards, in the narrowest count type that holds the counts so far.

    Parameters
    ----------
    folder : Path
    stem : str
        Beginning of the file names.
    row_format : RowFormat
    rows_per_shard : int
    """

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
            self._format = self._format.with_count_type(count_type)
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
        self.shards.append({"file": file, "rows": 0, **_types(self._format)})
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


def _types(row_format: RowFormat) -> dict[str, str]:
    return {"gene_type": row_format.gene_type, "count_type": row_format.count_type}


def has_types(shard: dict, row_format: RowFormat) -> bool:
    """Return whether a shard has the types of a format."""
    return {name: shard[name] for name in ("gene_type", "count_type")} == _types(row_format)


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


def shuffle(
    folder: Path,
    shards: list[dict],
    row_format: RowFormat,
    order: np.ndarray,
    rows_per_batch: int,
    rows_per_shard: int,
) -> list[dict]:
    """Rewrite all rows in another order, out of core.

    Each row is first written to a bucket file that covers a range of the new order; each bucket is then sorted in
    memory.

    Parameters
    ----------
    folder : Path
        Folder of the shards.
    shards : list of dict
        Their records, in the order of the rows.
    row_format : RowFormat
        Format of the new shards.
    order : int array (n_rows,)
        Old number of each new row.
    rows_per_batch, rows_per_shard : int
        Cells per record batch, and per file.

    Returns
    -------
    list of dict
        Records of the new shards.
    """
    n_rows = len(order)
    new_number = np.empty(n_rows, np.int64)
    new_number[order] = np.arange(n_rows)
    n_buckets = min(max(1, -(-n_rows // _ROWS_PER_BUCKET)), _MAX_BUCKETS)
    rows_per_bucket = max(1, -(-n_rows // n_buckets))
    schema = row_format.schema()
    numbered = schema.append(pa.field("row", pa.int64()))
    files = [folder / f"bucket-{bucket:05d}" for bucket in range(n_buckets)]
    with contextlib.ExitStack() as stack:
        writers = [stack.enter_context(pa.ipc.new_stream(str(file), numbered)) for file in files]
        first = 0
        for shard in shards:
            for batch in read_batches(folder / shard["file"]):
                batch = pa.record_batch(batch.columns, batch.schema.remove_metadata()).cast(schema)
                numbers = new_number[first : first + batch.num_rows]
                first += batch.num_rows
                if row_format.neighbors:
                    batch = _renumber(batch, new_number)
                batch = pa.record_batch([*batch.columns, pa.array(numbers)], schema=numbered)
                bucket = numbers // rows_per_bucket
                by_bucket = np.argsort(bucket, kind="stable")
                ends = np.cumsum(np.bincount(bucket, minlength=n_buckets))
                for writer, start, stop in zip(writers, [0, *ends[:-1]], ends, strict=True):
                    if stop > start:
                        writer.write_batch(batch.take(pa.array(by_bucket[start:stop])))
    shuffled: list[dict[str, Any]] = []
    writer = None
    for file in files:
        rows = pa.Table.from_batches(read_batches(file), numbered)
        rows = rows.take(pa.array(np.argsort(rows["row"].to_numpy()))).drop_columns("row").combine_chunks()
        for batch in rows.to_batches(max_chunksize=rows_per_batch):
            if writer is None or shuffled[-1]["rows"] >= rows_per_shard:
                if writer is not None:
                    writer.close()
                shuffled.append({"file": f"shuffled-{len(shuffled):05d}.arrow", "rows": 0, **_types(row_format)})
                writer = pa.ipc.new_stream(str(folder / shuffled[-1]["file"]), schema)
            writer.write_batch(batch)
            shuffled[-1]["rows"] += batch.num_rows
        file.unlink()
    if writer is not None:
        writer.close()
    return shuffled


def _renumber(batch: pa.RecordBatch, new_number: np.ndarray) -> pa.RecordBatch:
    at = batch.schema.get_field_index("neighbors")
    lists = batch.column(at)
    numbers = pa.array(new_number[lists.flatten().to_numpy()].astype(np.uint32))
    offsets = lists.offsets.to_numpy()
    return batch.set_column(
        at, batch.schema.field(at), pa.ListArray.from_arrays(pa.array(offsets - offsets[0]), numbers)
    )


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


def write_json(path: Path, value) -> None:
    """Write a JSON file atomically."""
    with whole_file(path) as part, open(part, "w", encoding="utf-8") as file:
        json.dump(value, file, indent=1, ensure_ascii=False)
        file.flush()
        os.fsync(file.fileno())


def checksum(path: Path) -> str:
    """Return the xxh3_128 checksum of a file, as fast as the file is read; it detects damage, not malice."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()
