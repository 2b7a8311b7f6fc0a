"""Read-ahead: ask the system for all pages of a batch at once, where they come from a disk.

A memory map reads one page after another, each when it is first touched, so that a disk that could serve many requests
at once waits for one. Asked for beforehand, the pages of a batch are read together.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

_libc: Any = None if resource is None else ctypes.CDLL(None)
_BATCHES = 128  # after a batch that waited for the disk, so many batches are asked for beforehand
_LOOKS_AT = 4  # off, one batch of so many is looked at


class MappedFile:
    """A memory-mapped file; `buffer` has its bytes."""

    def __init__(self, file: Path):
        # Unlike Python's mmap, it needs no open file: a store may have more files than a process may have open.
        with pa.memory_map(str(file)) as opened:
            self.buffer = opened.read_buffer()

    def place(self, values: pa.Array) -> int:
        """Return where in the file the values of an array of numbers begin, which lies there whole if it has any."""
        return values.buffers()[1].address - self.buffer.address

    def ask_for(self, start: int, stop: int) -> None:
        """Ask the system to read a range of bytes; return at once."""
        if start >= stop:
            return  # an array without values lies nowhere, see `place`
        start -= start % mmap.PAGESIZE
        _libc.madvise(ctypes.c_void_p(self.buffer.address + start), ctypes.c_size_t(stop - start), mmap.MADV_WILLNEED)


class ReadAhead:
    """Decides whether to ask for the pages of a batch: not where they are in memory, since asking costs time too.

    Off, it looks at every fourth batch; one during which the process waited for pages turns it on, for 128 batches.
    Threads may share it: they may then look at fewer batches.
    """

    def __init__(self) -> None:
        self._left = 1  # batches for which it stays on, plus 1; off, it counts on below 0
        self._waits: int | None = None  # before the batch that it looks at
        self._works = resource is not None and hasattr(mmap, "MADV_WILLNEED") and hasattr(_libc, "madvise")

    def ask_for(self, ranges: Callable[[], Iterable[tuple[MappedFile, int, int]]]) -> None:
        """Ask for the (file, start, stop) that ranges returns if it is on; call this before a batch, `look` after."""
        self._left -= 1
        if self._left > 0:
            self.ask_now(ranges())
        elif self._works and self._left % _LOOKS_AT == 0:
            self._waits = _waits()

    def ask_now(self, ranges: Iterable[tuple[MappedFile, int, int]]) -> None:
        """Ask for (file, start, stop) in any case."""
        if self._works:
            for file, start, stop in ranges:
                file.ask_for(start, stop)

    def look(self) -> None:
        """Turn it on if the batch that was just read had to wait."""
        before, self._waits = self._waits, None  # once: another thread may look at the same time
        if before is not None and _waits() > before:
            self._left = _BATCHES + 1


def _waits() -> int:
    """Count how often this thread (elsewhere than on Linux: this process) waited for a page."""
    who = getattr(resource, "RUSAGE_THREAD", resource.RUSAGE_SELF)
    return resource.getrusage(who).ru_majflt
