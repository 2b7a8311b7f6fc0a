"""Record batches of Arrow stream files on a server: where their buffers are, from the headers of their messages."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from .remote_files import Range, RemoteFile, fetched

_FILES_AT_ONCE = 16
_HEADER_BYTES = 4096  # more than most headers have; they lie in one block anyway


def read_headers(files: Sequence[RemoteFile]) -> Iterator[list[RemoteBatch]]:
    """Read the headers of the record batches of files, several files at once; a damaged one raises in its turn."""
    with ThreadPoolExecutor(_FILES_AT_ONCE) as pool:
        yield from pool.map(_headers_of, files)


def _headers_of(file: RemoteFile) -> list[RemoteBatch]:
    # Arrow slices the buffers of a batch out of the bytes that follow its header, without reading them. So the headers
    # are put at their places in memory of the size of the file, the rest of which is never touched and costs nothing;
    # the address of a buffer then tells its place in the file.
    image = np.empty(file.size, np.uint8)
    source = pa.BufferReader(image)
    schema, batches, at = None, [], 0
    while at + 8 <= file.size:
        header = file.read(at, min(at + _HEADER_BYTES, file.size))
        mark, length = np.frombuffer(header, "<i4", 2).tolist()
        if mark != -1 or length < 0 or at + 8 + length > file.size:
            raise pa.ArrowInvalid(f"no message header at byte {at}")
        if length == 0:  # the end of the stream
            break
        if 8 + length > len(header):
            header = file.read(at, at + 8 + length)
        image[at : at + 8 + length] = np.frombuffer(header, np.uint8, 8 + length)
        source.seek(at)
        message = pa.ipc.read_message(source)
        at = source.tell()
        if schema is None:
            schema = pa.ipc.read_schema(message)
        else:
            batch = pa.ipc.read_record_batch(message, schema)
            columns = {name: _Column.of(batch.column(name), image) for name in schema.names}
            batches.append(RemoteBatch(file, batch.num_rows, columns))
    return batches


@dataclass(frozen=True)
class _Column:
    """A column of a record batch: its type, its number of missing values, and its buffers' places in the file."""

    type: pa.DataType
    null_count: int
    buffers: list[tuple[int, int] | None]

    @classmethod
    def of(cls, array: pa.Array, image: np.ndarray) -> _Column:
        places = []
        for buffer in array.buffers():
            if buffer is None or not buffer.size:
                places.append(None if buffer is None else (0, 0))
                continue
            start = buffer.address - image.ctypes.data
            if not 0 <= start <= len(image) - buffer.size:
                raise pa.ArrowInvalid("its buffers are compressed, which cannot be read by ranges")
            places.append((start, start + buffer.size))
        return cls(array.type, array.null_count, places)


@dataclass(frozen=True)
class RemoteBatch:
    """A record batch in a file on a server."""

    file: RemoteFile
    num_rows: int
    columns: dict[str, _Column]

    def offsets(self, name: str) -> Range:
        """Return where the offsets of a list column are: int32 (num_rows + 1,)."""
        return self._range(self.columns[name].buffers[1])

    def values(self, name: str) -> RemoteValues:
        """Return where the values of a list column are."""
        column = self.columns[name]
        return RemoteValues(self._range(column.buffers[3]), column.type.value_type.bit_width // 8)

    def _range(self, place: tuple[int, int] | None) -> Range:
        return Range(self.file, *(place or (0, 0)))


class RemoteValues:
    """An array in a file on a server; a slice of it is a `Range`, which `fetched` reads."""

    def __init__(self, place: Range, width: int):
        self._place, self._width = place, width

    def __getitem__(self, entries: slice) -> Range:
        file, start, _ = self._place
        return Range(file, start + entries.start * self._width, start + entries.stop * self._width)


def read_column(batches: Sequence[RemoteBatch], name: str) -> list[pa.Array]:
    """Read a column, which must not be of lists, of all batches at once."""
    columns = [batch.columns[name] for batch in batches]
    ranges = [
        Range(batch.file, *place)
        for batch, column in zip(batches, columns, strict=True)
        for place in column.buffers
        if place is not None
    ]
    [contents] = fetched([ranges])
    found = iter(contents)
    return [
        pa.Array.from_buffers(
            column.type,
            batch.num_rows,
            [None if place is None else pa.py_buffer(next(found)) for place in column.buffers],
            column.null_count,
        )
        for batch, column in zip(batches, columns, strict=True)
    ]
