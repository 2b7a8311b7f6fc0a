"""Write folders of shards atomically, by one process at a time, and never over files that are not ours."""

from __future__ import annotations

import json
import logging
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import IO

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

logger = logging.getLogger(__name__)

_NOT_OURS = (".*", "cache-*.arrow")  # hidden files, and the cache files of `datasets.Dataset.map`


@dataclass(frozen=True)
class Contents:
    """Kind of contents of a folder with shards and a manifest."""

    what: str  # name for messages, such as `a store`
    opened_by: str  # the function that opens it
    other_files: tuple[str, ...]  # beside the shards


STORE = Contents("a store", "CellStore", ("genes.parquet", "manifest.json", "dataset_info.json", "state.json"))


def building_of(path: Path) -> Path:
    """Return the temporary path at which a folder is written."""
    return path.with_name(f".{path.name}.building")


def _old_of(path: Path) -> Path:
    return path.with_name(f".{path.name}.old")


@contextmanager
def written_at(path: Path, contents: Contents, overwrite: bool) -> Iterator[Path]:
    """Lock a path and check it again; rename the folder that the body fills to it at the end.

    The folder to fill, which is yielded, may not exist yet, or hold the files of an interrupted call. `path` is
    resolved. Callers call `check_free` first, before they open sources, which takes time in which another process may
    finish.
    """
    with locked(path):
        _give_name_back(path)
        check_free(path, contents, overwrite)
        building = building_of(path)
        yield building
        replace_folder(path, building, overwrite)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Let only one process at a time write at a path; raise BlockingIOError in others.

    Missing folders above the path are made. After an error, folders that were not there before, the path and those
    above it, are removed if they are empty. A path that cannot be written is an OSError: the root of a file system, or
    one below a file.
    """
    if not path.name:
        raise IsADirectoryError(f"{path} cannot be replaced: pass the path of a file or folder in it.")
    for above in path.parents:
        if above.exists() and not above.is_dir():
            raise NotADirectoryError(f"{path} cannot be written, since {above} is a file: choose another path.")
    missing = [folder for folder in path.parents if not folder.exists()]
    is_new = not path.exists()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        inside = path.is_dir() and not os.access(path.parent, os.W_OK)  # such as a folder that is mounted
        with _lock(path / ".lock" if inside else path.with_name(f".{path.name}.lock"), path):
            try:
                yield
            except BaseException:
                if is_new:
                    _remove_empty(path)  # before the next process may make it
                raise
    except BaseException:
        for folder in missing:
            _remove_empty(folder)
        raise


def _remove_empty(folder: Path) -> None:
    with suppress(OSError):  # it is not empty, or not there
        folder.rmdir()


@contextmanager
def _lock(file: Path, path: Path) -> Iterator[None]:
    """Lock a file, and remove it at the end. The lock ends with the process, in whichever way."""
    lock = _open_locked(file)
    if lock is None:
        raise BlockingIOError(f"Another process is writing {path}. Wait for it, or choose another path.")
    try:
        yield
    finally:
        if sys.platform == "win32":  # removes no open files, also not those that the next process has opened
            lock.close()
            with suppress(PermissionError):
                file.unlink(missing_ok=True)
        else:
            file.unlink(missing_ok=True)
            lock.close()


def _open_locked(file: Path) -> IO | None:
    """Open and lock a file; return None if another process holds the lock."""
    while True:
        lock = open(file, "a")
        try:
            if sys.platform == "win32":
                msvcrt.locking(lock.fileno(), msvcrt.LK_NBLCK, 1)
            else:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):  # the latter on Windows
            lock.close()
            return None
        except OSError:  # a file system without locks, as some clusters have
            logger.debug(f"Could not lock {file}.")
            return lock
        # The process that held the lock may have removed the file between the two calls: then this lock is useless.
        try:
            if os.path.samestat(os.fstat(lock.fileno()), os.stat(file)):
                return lock
        except FileNotFoundError:
            pass
        lock.close()


def check_free(path: Path, contents: Contents, overwrite: bool) -> None:
    """Raise FileExistsError if a folder must not be written.

    This is so if the path exists and `overwrite` is False, or if it holds anything other than `contents`.
    """
    if not path.exists():
        return
    if not overwrite:
        raise FileExistsError(
            f"{path} exists. Open it with {contents.opened_by}({str(path)!r}), or pass overwrite=True."
        )
    if not (path / "manifest.json").exists():
        raise FileExistsError(f"{path} exists and is not {contents.what}; nothing was changed. Choose another path.")
    try:
        shards = json.loads((path / "manifest.json").read_text())["shards"]
        known = {shard["file"] for shard in shards} | set(contents.other_files)
    except (ValueError, TypeError, KeyError) as error:
        raise FileExistsError(
            f"{path} was not replaced: its manifest.json is damaged, or is not that of {contents.what}. "
            "Choose another path, or delete it."
        ) from error
    foreign = sorted(file.name for file in path.iterdir() if file.name not in known and not _is_harmless(file))
    if foreign:
        raise FileExistsError(
            f"{path} holds more than {contents.what} ({', '.join(foreign[:3])}); nothing was changed. "
            "Move these files away first."
        )


def _is_harmless(file: Path) -> bool:
    return any(fnmatch(file.name, pattern) for pattern in _NOT_OURS)


def replace_folder(path: Path, building: Path, overwrite: bool) -> None:
    """Rename a finished folder to `path`, replacing an older one; harmless files that are not ours are kept."""
    if not overwrite:
        try:
            building.rename(path)  # fails if the folder there is not empty, also on file systems without locks
        except OSError as error:
            if path.exists():
                raise FileExistsError(
                    f"Another process has written {path} in the meantime; nothing was changed."
                ) from error
            raise
        return
    old = _old_of(path)
    if path.exists():
        shutil.rmtree(old, ignore_errors=True)  # left by a process that was stopped after its new folder was complete
        for file in filter(_is_harmless, path.iterdir()):
            _link(file, building / file.name)
        path.rename(old)
    building.rename(path)
    shutil.rmtree(old, ignore_errors=True)


def _link(file: Path, target: Path) -> None:
    """Hard-link a file, or all files of a folder; copy them where links cannot be made."""
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
    """Restore a folder's name if replacing it was stopped between the two renames of `replace_folder`.

    Nothing is done while another process is writing there, since that process restores the name.
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
