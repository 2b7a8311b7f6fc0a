"""BlockCache: blocks of files on a server, in a local folder of limited size."""

from __future__ import annotations

import errno
import mmap
import os
import re
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

BLOCK_BYTES = 1 << 18
SEGMENT_BLOCKS = 512  # blocks of one local file, 128 MiB
_MOST_MAPS = 256  # segments that a process has mapped; each takes a file descriptor
_KEPT = 0.9  # share of the limit that is left when segments are removed
_UNSEEN = 0.05  # share of the limit after which a process looks again at what other processes have added
_SEGMENT = re.compile(r"[0-9a-f]{32}-\d+")  # other files in the folder are not the cache's
_SECONDS = 1.0  # after which it is noted that a segment is in use, and whether it still exists


class BlockCache:
    """Blocks of files; the least recently used ones are removed.

    The blocks of a file are kept at their places in sparse local files, segments of 128 MiB, which are mapped to
    memory and removed as a whole. Any number of threads and processes may share a folder. A segment that another
    process removes stays readable for those that have mapped it.

    The folder is created when the first block is added; files of others in it do not count, and are left alone. Each
    of several processes may exceed the limit, in bytes, by 5 % for a moment.

    Notes
    -----
    A segment begins with one checksum per block, zero if it is missing, which is written after the block. Each process
    compares it once: what a power failure left, or a network file system has not brought yet, is a missing block.
    """

    def __init__(self, folder: Path, limit: int):
        self.folder, self.limit = Path(folder), limit
        self._lock = threading.Lock()
        self._segments: dict[str, _Segment] = {}
        self._total: int | None = None  # bytes in the folder when it was last looked at
        self._unseen = 0  # bytes that this process has added since then

    def __reduce__(self) -> tuple[Any, ...]:
        return BlockCache, (self.folder, self.limit)

    def read(self, key: str, start: int, stop: int) -> bytes | memoryview | None:
        """Return a range of bytes of a version of a file, `key`, 32 hexadecimal digits, without copying it.

        None is returned if a block is missing, or if the range lies in two segments: then ask block by block.
        """
        if start >= stop:
            return b""
        size = SEGMENT_BLOCKS * BLOCK_BYTES
        number = start // size
        if stop > (number + 1) * size:
            return None
        segment = self._segment(f"{key}-{number}")
        return None if segment is None else segment.read(start - number * size, stop - number * size)

    def add(self, key: str, block: int, content: bytes | memoryview) -> None:
        """Add a block, which is shorter at the end of a file; remove others if all are larger than the limit."""
        number, place = divmod(block, SEGMENT_BLOCKS)
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            n_bytes = _write(self.folder / f"{key}-{number}", place, content)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise OSError(
                error.errno,
                f"no space for the cache of remote files at {self.folder}. Free some space, or pass another cache_dir "
                "or a smaller cache_bytes to RemoteFolder.",
            ) from error
        with self._lock:
            self._unseen += n_bytes
            if self._total is None or self._total + self._unseen > self.limit or self._unseen > _UNSEEN * self.limit:
                self._remove_old()

    def _segment(self, name: str) -> _Segment | None:
        """Return a segment, mapped to memory; None if there is none."""
        segment, now = self._segments.get(name), time.monotonic()
        if segment is not None and now - segment.looked < _SECONDS:
            return segment
        path = self.folder / name
        try:
            if segment is None or os.stat(path).st_ino != segment.inode:  # or another process removed it
                segment = _Segment(path)
            os.utime(path)
        except FileNotFoundError:
            self._segments.pop(name, None)
            return None
        segment.looked = now
        with self._lock:
            self._segments[name] = segment
            while len(self._segments) > _MOST_MAPS:
                del self._segments[next(iter(self._segments))]
        return segment

    def _files(self) -> Iterator[tuple[int, int, str]]:
        """Return time of last use, size and name of all segments."""
        for file in os.scandir(self.folder):
            if not _SEGMENT.fullmatch(file.name):
                continue
            with suppress(FileNotFoundError):
                stat = file.stat()
                yield stat.st_mtime_ns, _disk_bytes(stat), file.name

    def _remove_old(self) -> None:
        """Look at the folder again, and remove the segments that were not used for longest if it is too large."""
        files = sorted(self._files())
        self._total, self._unseen = sum(size for _, size, _ in files), 0
        is_full = self._total > self.limit
        for _, size, name in files:
            if not is_full or self._total <= _KEPT * self.limit:
                break
            self._segments.pop(name, None)
            with suppress(FileNotFoundError, PermissionError):  # removed by another process; on Windows: in use
                os.unlink(self.folder / name)
            self._total -= size


def _head_bytes() -> int:
    return -(-8 * SEGMENT_BLOCKS // mmap.PAGESIZE) * mmap.PAGESIZE


def _checksum(content: bytes | memoryview) -> int:
    """Return the checksum of a block, which is not zero; what follows the end of a file counts as zeros."""
    found = xxhash.xxh3_64(content)
    found.update(bytes(BLOCK_BYTES - len(content)))
    return found.intdigest() or 1


def _disk_bytes(stat: os.stat_result) -> int:
    """Return how many bytes a sparse file takes; on Windows its size."""
    return getattr(stat, "st_blocks", stat.st_size // 512) * 512


def _write(path: Path, place: int, content: bytes | memoryview) -> int:
    """Write a block to a segment, which is created if there is none; return by how many bytes the file grew."""
    # Not through the map: writing to a page of a full disk would end the process.
    with open(os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o666), "r+b", buffering=0) as file:
        before, size = os.fstat(file.fileno()), _head_bytes() + SEGMENT_BLOCKS * BLOCK_BYTES
        if before.st_size < size:
            file.truncate(size)
        file.seek(_head_bytes() + place * BLOCK_BYTES)
        if file.write(content) != len(content):
            raise OSError(errno.ENOSPC, "no space left")
        file.seek(8 * place)
        file.write(np.uint64(_checksum(content)).tobytes())
        return _disk_bytes(os.fstat(file.fileno())) - _disk_bytes(before)


class _Segment:
    """A segment, mapped to memory: checksums, then blocks."""

    def __init__(self, path: Path):
        with open(path, "rb") as file:
            stat = os.fstat(file.fileno())
            if stat.st_size < _head_bytes() + SEGMENT_BLOCKS * BLOCK_BYTES:  # another process just creates it
                raise FileNotFoundError(path)
            self._memory = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        self.inode, self.looked, self._head = stat.st_ino, 0.0, _head_bytes()
        self._checksums = np.frombuffer(self._memory, np.uint64, SEGMENT_BLOCKS)
        self._compared: set[int] = set()

    def read(self, start: int, stop: int) -> memoryview | None:
        for place in range(start // BLOCK_BYTES, -(-stop // BLOCK_BYTES)):
            if place not in self._compared:
                stored, first = int(self._checksums[place]), self._head + place * BLOCK_BYTES
                if not stored or stored != _checksum(self._memory[first : first + BLOCK_BYTES]):
                    return None
                self._compared.add(place)
        return self._memory[self._head + start : self._head + stop]
