"""Shuffle the rows of a store out of core."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from .shards import RowFormat, read_batches

_MAX_BUCKETS = 512  # files that are open at once
_ROWS_PER_BUCKET = 16_384
_ROW = pa.field("row", pa.int64())  # the new number of a row in a bucket


def shuffle(
    folder: Path,
    shards: list[dict],
    row_format: RowFormat,
    order: np.ndarray,
    rows_per_batch: int,
    rows_per_shard: int,
) -> list[dict]:
    """Rewrite the rows of shards, given by their records, in another order; return the records of the new shards.

    `order`, int array (n_rows,), is the old number of each new row. Each row is first written to a bucket file that
    covers a range of the new order; each bucket is then sorted in memory.
    """
    schema = row_format.schema()
    shuffled: list[dict[str, Any]] = []
    writer = None
    for file in _to_buckets(folder, shards, row_format, order):
        rows = pa.Table.from_batches(read_batches(file), schema.append(_ROW))
        rows = rows.take(pa.array(np.argsort(rows["row"].to_numpy()))).drop_columns("row").combine_chunks()
        for batch in rows.to_batches(max_chunksize=rows_per_batch):
            if writer is None or shuffled[-1]["rows"] >= rows_per_shard:
                if writer is not None:
                    writer.close()
                shuffled.append({"file": f"shuffled-{len(shuffled):05d}.arrow", "rows": 0, **row_format.types})
                writer = pa.ipc.new_stream(str(folder / shuffled[-1]["file"]), schema)
            writer.write_batch(batch)
            shuffled[-1]["rows"] += batch.num_rows
        file.unlink()
    if writer is not None:
        writer.close()
    return shuffled


def _to_buckets(folder: Path, shards: list[dict], row_format: RowFormat, order: np.ndarray) -> list[Path]:
    """Write each row, with its new number, to the file of the range of numbers that holds it."""
    n_rows = len(order)
    new_number = np.empty(n_rows, np.int64)
    new_number[order] = np.arange(n_rows)
    n_buckets = min(max(1, -(-n_rows // _ROWS_PER_BUCKET)), _MAX_BUCKETS)
    rows_per_bucket = max(1, -(-n_rows // n_buckets))
    schema = row_format.schema()
    numbered = schema.append(_ROW)
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
    return files


def _renumber(batch: pa.RecordBatch, new_number: np.ndarray) -> pa.RecordBatch:
    at = batch.schema.get_field_index("neighbors")
    lists = batch.column(at)
    numbers = pa.array(new_number[lists.flatten().to_numpy()].astype(np.uint32))
    offsets = lists.offsets.to_numpy()
    return batch.set_column(
        at, batch.schema.field(at), pa.ListArray.from_arrays(pa.array(offsets - offsets[0]), numbers)
    )
