"""BlockCache: blocks of files on a server, in a local folder of limited size."""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

_KEPT = 0.9  # share of the limit that is left when blocks are removed, so that not every new block removes one
_UNSEEN = 0.05  # share of the limit after which a process looks again at what other processes have added
_SECONDS_OF_A_PART = 3600  # after which it is no longer being written


class BlockCache:
    """Blocks of files, each in a file of its own; the least recently used ones are removed.

    Any number of threads and processes may share a folder. A block is written under a temporary name and renamed,
    and never changes; one that another process removes is missing, and is fetched again.

    Parameters
    ----------
    folder : Path
        Created when the first block is added.
    limit : int
        Bytes of all blocks. Of several processes each may exceed it by 5 % for a moment.

    Notes
    -----
    A sparse copy of each file, as the `blockcache` of fsspec has, could be mapped to memory. But to free a part of it
    one has to punch a hole, which every process that has mapped it reads as zeros.
    """

    def __init__(self, folder: Path, limit: int):
        self.folder, self.limit = Path(folder), limit
        self._lock = threading.Lock()
        self._total: int | None = None  # bytes in the folder when it was last looked at
        self._unseen = 0  # bytes that this process has added since then

    def __reduce__(self):
        return BlockCache, (self.folder, self.limit)

    def read(self, key: str, block: int, pieces: Sequence[tuple[int, int]]) -> list[bytes] | None:
        """Read pieces of a block.

        Parameters
        ----------
        key : str
            Name of a version of a file.
        block : int
            Number of the block in the file.
        pieces : sequence of (int, int)
            Ranges of bytes of the block.

        Returns
        -------
        list of bytes or None
            None if the block is missing.
        """
        path = self._path(key, block)
        try:
            with open(path, "rb", buffering=0) as file:
                found = []
                for start, stop in pieces:
                    file.seek(start)
                    found.append(file.read(stop - start))
        except FileNotFoundError:
            return None
        with suppress(FileNotFoundError):  # removed just now
            os.utime(path)
        if any(len(content) != stop - start for content, (start, stop) in zip(found, pieces, strict=True)):
            return None  # the machine stopped before the block was on disk
        return found

    def add(self, key: str, block: int, content: bytes | memoryview) -> None:
        """Add a block, and remove others if all are larger than the limit.

        Raises
        ------
        OSError
            The disk is full.
        """
        path = self._path(key, block)
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f"{block}.{os.getpid()}-{threading.get_ident()}.part")
        try:
            part.write_bytes(content)
        except OSError as error:
            part.unlink(missing_ok=True)
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise OSError(
                error.errno,
                f"no space for the cache of remote files at {self.folder}. Free some space, or pass another cache_dir, "
                "or a smaller cache_bytes, to RemoteFolder.",
            ) from error
        part.replace(path)
        with self._lock:
            self._unseen += len(content)
            if self._total is None or self._total + self._unseen > self.limit or self._unseen > _UNSEEN * self.limit:
                self._remove_old()

    def _path(self, key: str, block: int) -> Path:
        return self.folder / key / str(block)

    def _files(self) -> Iterator[tuple[int, int, str]]:
        """Return time of last use, size and path of all blocks, and of parts that a killed process left."""
        for file in (file for folder in os.scandir(self.folder) for file in os.scandir(folder)):
            with suppress(FileNotFoundError):  # removed, or renamed
                stat = file.stat()
                if not file.name.endswith(".part") or stat.st_mtime < time.time() - _SECONDS_OF_A_PART:
                    yield stat.st_mtime_ns, stat.st_size, file.path

    def _remove_old(self) -> None:
        """Look at the folder again, and remove the oldest blocks if it is too large."""
        files = sorted(self._files())
        self._total, self._unseen = sum(size for _, size, _ in files), 0
        is_full = self._total > self.limit
        for _, size, path in files:
            if not is_full or self._total <= _KEPT * self.limit:
                break
            with suppress(FileNotFoundError, PermissionError):  # removed by another process; on Windows: in use
                os.unlink(path)
            self._total -= size


__all__ = ["BlockCache"]
