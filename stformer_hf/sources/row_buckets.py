"""RowBuckets: regroup the entries of a matrix by row, through temporary files."""

from __future__ import annotations

import os
import shutil
import tempfile
import weakref
from io import BufferedWriter
from pathlib import Path

import numpy as np
from scipy import sparse

_BUCKET_ENTRIES = 1 << 22  # entries per bucket: about 50 MB on disk
_MAX_BUCKETS = 512  # files that are open at once
_ENTRIES_AT_ONCE = 1 << 21


class RowBuckets:
    """Entries of a matrix, written to one file per range of rows, and read back as rows.

    Only a buffer is in memory, whatever the size of the matrix. The expected `n_entries` set the number of files,
    which are deleted with the object. They are in the folder `scratch`, by default the system's (`TMPDIR`).
    """

    def __init__(
        self, shape: tuple[int, int], n_entries: int, value_type: np.dtype, scratch: str | Path | None = None
    ):
        self.shape = shape
        value_type = np.dtype(np.float32 if value_type == np.float16 else value_type).newbyteorder("=")
        self._entry = np.dtype([("row", np.uint32), ("column", np.uint32), ("value", value_type)])
        n_buckets = min(max(1, -(-n_entries // _BUCKET_ENTRIES)), _MAX_BUCKETS, max(1, shape[0]))
        self._rows_per_bucket = max(1, -(-shape[0] // n_buckets))
        folder = tempfile.mkdtemp(prefix="by-row-", dir=scratch)
        weakref.finalize(self, _remove, folder, os.getpid())
        self._files = [Path(folder, str(bucket)) for bucket in range(n_buckets)]
        self._open = [open(file, "wb") for file in self._files]
        weakref.finalize(self, _close, self._open)  # before the removal: the last finalizer runs first

    def add(self, rows: np.ndarray, columns: np.ndarray, values: np.ndarray) -> None:
        """Write entries; values of repeated pairs of row and column are summed in reading."""
        entries = np.empty(len(rows), self._entry)
        entries["row"], entries["column"], entries["value"] = rows, columns, values
        bucket = (rows // self._rows_per_bucket).astype(np.uint16)
        entries = entries[np.argsort(bucket, kind="stable")]
        stops = np.cumsum(np.bincount(bucket, minlength=len(self._files)))
        for file, start, stop in zip(self._open, [0, *stops[:-1]], stops, strict=True):
            entries[start:stop].tofile(file)

    def close(self) -> None:
        """Finish writing; rows can be read from here on."""
        _close(self._open)

    def rows(self, start: int, stop: int) -> sparse.csr_matrix:
        """Return rows; only these rows and a buffer are in memory."""
        names = ("row", "column", "value")
        found: dict[str, list[np.ndarray]] = {name: [np.empty(0, self._entry[name])] for name in names}
        for file in self._files[start // self._rows_per_bucket : -(-stop // self._rows_per_bucket)]:
            if not file.stat().st_size:
                continue
            entries = np.memmap(file, self._entry, "r")
            for first in range(0, len(entries), _ENTRIES_AT_ONCE):
                part = entries[first : first + _ENTRIES_AT_ONCE]
                inside = (part["row"] >= start) & (part["row"] < stop)
                for name, parts in found.items():
                    parts.append(part[name][inside])
        rows = (np.concatenate(found.pop("row")) - np.uint32(start)).astype(np.int32)
        coordinates = (rows, np.concatenate(found.pop("column")).astype(np.int32))
        values = np.concatenate(found.pop("value"))
        if values.dtype.kind in "iub":
            values = values.astype(np.int64)  # sums of narrow integers must not overflow
        return sparse.coo_matrix((values, coordinates), shape=(stop - start, self.shape[1])).tocsr()


def _close(files: list[BufferedWriter]) -> None:
    """Close files, also if an error interrupted writing."""
    while files:
        files.pop().close()


def _remove(folder: str, process: int) -> None:
    """Remove the files, except in a forked process, whose parent still reads them."""
    if os.getpid() == process:
        shutil.rmtree(folder, ignore_errors=True)
