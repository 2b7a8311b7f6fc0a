"""Write files and folders whole or not at all."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def part_of(path: Path) -> Path:
    """Return the path at which this process writes a file, before renaming it to `path`.

    No other process has it, also on another machine: a task that was lost and runs again does not write into the same
    file as the lost one, if that is still alive.
    """
    return path.with_name(f".{path.name}.{platform.node()}-{os.getpid()}.part")


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield a path to write a file or folder to, which is renamed to `path` at the end; after an error it is removed.

    What was at `path` is replaced; a folder there has another name for a moment.
    """
    part = part_of(path)
    old = part.with_suffix(".old")
    try:
        yield part
        if path.is_dir():
            path.rename(old)
        part.replace(path)
    finally:
        if old.exists() and not path.exists():
            old.rename(path)
        for left in (part, old):
            shutil.rmtree(left) if left.is_dir() else left.unlink(missing_ok=True)
