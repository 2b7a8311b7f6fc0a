"""Folders of shards at a path: written by one process at a time, whole or not at all, and never over another's."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import IO

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

logger = logging.getLogger(__name__)

_NOT_OURS = (".*", "cache-*.arrow")  # hidden files, and what `datasets` keeps beside a dataset that was mapped


@dataclass(frozen=True)
class Contents:
    """What a folder with a manifest of shards holds.

    Attributes
    ----------
    what : str
        Such as `a store`, for messages.
    opened_by : str
        The function that opens it.
    other_files : tuple of str
        What is beside the shards.
    """

    what: str
    opened_by: str
    other_files: tuple[str, ...]


STORE = Contents("a store", "CellStore", ("genes.parquet", "manifest.json", "dataset_info.json", "state.json"))


def building_of(path: Path) -> Path:
    """Return where a folder is written before it gets its name."""
    return path.with_name(f".{path.name}.building")


def _old_of(path: Path) -> Path:
    return path.with_name(f".{path.name}.old")


@contextmanager
def written_at(path: Path, contents: Contents, overwrite: bool) -> Iterator[Path]:
    """Lock a path and look at it again; the folder that the body fills gets its name at the end.

    Callers call `check_free` before, at the door: opening sources takes time, in which another process may finish.

    Parameters
    ----------
    path : Path
        Resolved.
    contents : Contents
    overwrite : bool
        Whether the folder at the path may be replaced.

    Yields
    ------
    Path
        The folder to fill, which may not exist yet, or hold what an interrupted call left.

    Raises
    ------
    BlockingIOError
        Another process writes there.
    FileExistsError
        There is something at the path that may not be replaced.
    """
    with locked(path):
        _give_name_back(path)
        check_free(path, contents, overwrite)
        building = building_of(path)
        yield building
        replace_folder(path, building, overwrite)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Let one process at a time write at a path.

    Raises
    ------
    BlockingIOError
        Another process writes there.
    """
    if fcntl is None:
        yield
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.with_name(f".{path.name}.lock")
    lock = _take(file)
    if lock is None:
        raise BlockingIOError(f"Another process builds {path} now. Wait for it, or choose another path.")
    try:
        yield
    finally:
        file.unlink(missing_ok=True)
        lock.close()


def _take(file: Path) -> IO | None:
    """Open and lock a file; None where another process has the lock."""
    while True:
        lock = open(file, "w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            return None
        except OSError:  # a file system without locks, as some clusters have
            logger.debug(f"No lock could be taken on {file}.")
            return lock
        # The process that had the lock may have removed the file between the two calls: then this lock is of no file.
        try:
            if os.path.samestat(os.fstat(lock.fileno()), os.stat(file)):
                return lock
        except FileNotFoundError:
            pass
        lock.close()


def check_free(path: Path, contents: Contents, overwrite: bool) -> None:
    """Raise FileExistsError where a folder must not be written.

    Something is there, and not `overwrite`; or it is not `contents`, or more than that.
    """
    if not path.exists():
        return
    if not overwrite:
        raise FileExistsError(
            f"{path} exists. Open it with {contents.opened_by}({str(path)!r}), or pass overwrite=True."
        )
    if not (path / "manifest.json").exists():
        raise FileExistsError(f"{path} exists and is not {contents.what}; it is left as it is. Choose another path.")
    try:
        shards = json.loads((path / "manifest.json").read_text())["shards"]
        known = {shard["file"] for shard in shards} | set(contents.other_files)
    except (ValueError, TypeError, KeyError) as error:
        raise FileExistsError(
            f"{path} is left as it is: its manifest.json is damaged, or not of {contents.what}. Choose another path, "
            "or delete it."
        ) from error
    foreign = sorted(file.name for file in path.iterdir() if file.name not in known and not _is_harmless(file))
    if foreign:
        raise FileExistsError(
            f"{path} holds more than {contents.what} ({', '.join(foreign[:3])}); it is left as it is. Move these away."
        )


def _is_harmless(file: Path) -> bool:
    return any(fnmatch(file.name, pattern) for pattern in _NOT_OURS)


def replace_folder(path: Path, building: Path, overwrite: bool) -> None:
    """Give a finished folder its name; an older one there goes, but for harmless files that are not ours."""
    if not overwrite:
        try:
            building.rename(path)  # fails over a folder that holds something: also where there are no locks
        except OSError as error:
            if path.exists():
                raise FileExistsError(
                    f"{path} was written by another process meanwhile; it is left as it is."
                ) from error
            raise
        return
    old = _old_of(path)
    if path.exists():
        shutil.rmtree(old, ignore_errors=True)  # left by a process that was stopped once its new folder was whole
        for file in filter(_is_harmless, path.iterdir()):
            _link(file, building / file.name)
        path.rename(old)
    building.rename(path)
    shutil.rmtree(old, ignore_errors=True)


def _link(file: Path, target: Path) -> None:
    """Give a file, or all files of a folder, a second name; copied where links cannot be made."""
    if target.is_dir() and not target.is_symlink():
        shutil.rmtree(target)
    target.unlink(missing_ok=True)
    if file.is_dir() and not file.is_symlink():
        target.mkdir()
        for inside in file.iterdir():
            _link(inside, target / inside.name)
        return
    try:
        os.link(file, target, follow_symlinks=False)
    except OSError:  # another file system, or one without links
        shutil.copy2(file, target, follow_symlinks=False)


def recover(path: Path) -> None:
    """Give a folder its name back, if replacing it was stopped between the two renames of `replace_folder`.

    Nothing is done while another process writes there: the folder gets its name from that one.
    """
    if not path.exists() and _old_of(path).exists():
        try:
            with locked(path):
                _give_name_back(path)
        except BlockingIOError:
            pass


def _give_name_back(path: Path) -> None:
    old = _old_of(path)
    if not path.exists() and (old / "manifest.json").exists():
        old.rename(path)


__all__ = ["STORE", "Contents", "building_of", "check_free", "recover", "written_at"]
