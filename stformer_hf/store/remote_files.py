"""RemoteFolder: read ranges of files on a server through fsspec, with a local cache and retries."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from io import UnsupportedOperation
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import fsspec
import xxhash
from fsspec.core import url_to_fs
from fsspec.registry import known_implementations

from . import block_cache
from .block_cache import BlockCache

logger = logging.getLogger(__name__)

T = TypeVar("T")

WAITS = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0)  # seconds before each new attempt
_BLOCKS_AT_ONCE = 16  # adjacent blocks that one request fetches
_CONNECTIONS = 32
_DEFAULT_CACHE_GB = 20.0
_SECONDS_TO_CONNECT, _SECONDS_WITHOUT_DATA = 30, 60
# What servers say by which two versions of a file differ: http, S3, Google, Azure, and fsspec's other file systems.
_VERSION = (
    *("size", "ETag", "etag", "e_tag", "Content-MD5", "content_md5", "Digest", "Last-Modified", "LastModified"),
    *("last_modified", "mtime", "modified", "updated", "created", "generation", "md5Hash", "crc32c", "VersionId"),
)
_OF_A_BUSY_SERVER = (408, 425, 429)  # statuses below 500 after which a request may be repeated


class RemoteFolder:
    """A folder on a server, whose files are read by ranges.

    Files are read in blocks of 256 KiB, which are kept in a local cache. Missing blocks are fetched over up to 32
    connections. A request that fails is repeated up to six times, after 0.5, 1, 2, 4, 8 and 16 seconds.

    Parameters
    ----------
    address : str
        `https://…`, `s3://…`, `gs://…`, `hf://datasets/user/name` or any other address of fsspec. `s3://` needs the
        package s3fs, and `gs://` gcsfs.
    storage_options : mapping, optional
        Arguments of the file system of fsspec, such as `{"anon": True}` for a public bucket on S3, or `{"token": …}`.
    cache_dir : str or Path, optional
        Folder of the cache, which any number of processes may share. By default that of the environment variable
        `STFORMER_HF_CACHE`, else `stformer_hf` in the cache folder of Hugging Face (`HF_HOME`).
    cache_bytes : int, optional
        Limit of the cache; the least recently used blocks are removed. By default `STFORMER_HF_CACHE_GB` (of 1e9
        bytes), else 20 GB.

    Raises
    ------
    ImportError
        The package that reads such addresses is not installed.
    ValueError
        There is no file system for such addresses.

    Notes
    -----
    `pin` notes the version of files: size, ETag or time of change, as the server states them. After each fetch, and
    before anything of it is used or kept, the versions are compared, and they are part of the key of the cache: blocks
    of two versions are never mixed. A repository of the Hub is read at the commit at which it was opened instead.

    The caches of fsspec do less: `blockcache`, `filecache` and `simplecache` have no size limit, processes overwrite
    each other's list of blocks in the first, and over http none notices a changed file.
    """

    def __init__(
        self,
        address: str,
        storage_options: Mapping[str, Any] | None = None,
        cache_dir: str | Path | None = None,
        cache_bytes: int | None = None,
    ):
        from huggingface_hub.constants import HF_HOME

        self.address = address.rstrip("/")
        self._options = dict(storage_options or {})
        folder = cache_dir or os.environ.get("STFORMER_HF_CACHE") or Path(HF_HOME) / "stformer_hf"
        if cache_bytes is None:
            cache_bytes = int(float(os.environ.get("STFORMER_HF_CACHE_GB", _DEFAULT_CACHE_GB)) * 1e9)
        self.cache = BlockCache(Path(os.path.abspath(folder)), cache_bytes)
        self._opened: tuple[int, fsspec.AbstractFileSystem, ThreadPoolExecutor] | None = None
        self.versions: dict[str, Version] = {}
        self._root, self._is_pinned = self._find_root()

    def _find_root(self) -> tuple[str, bool]:
        """Return the path of the folder in its file system, and whether its files cannot change: a commit."""
        fs, root = self._connect()
        if "hf" in fs.protocol:
            at = self.retry(lambda _: fs.resolve_path(root), "")
            if hasattr(at, "revision"):
                from huggingface_hub import HfApi

                api = HfApi(endpoint=fs.endpoint, token=fs.token)
                info = self.retry(
                    lambda _: api.repo_info(at.repo_id, repo_type=at.repo_type, revision=at.revision), ""
                )
                return replace(at, revision=info.sha, _raw_revision=None).unresolve(), True
        return root.rstrip("/"), False

    def _connect(self) -> tuple[fsspec.AbstractFileSystem, str]:
        protocol = self.address.split("://")[0].lower()
        options = self._options
        if protocol in ("http", "https") and "client_kwargs" not in options:
            from aiohttp import ClientTimeout

            timeout = ClientTimeout(None, sock_connect=_SECONDS_TO_CONNECT, sock_read=_SECONDS_WITHOUT_DATA)
            options = {**options, "client_kwargs": {"timeout": timeout}}
        try:
            return url_to_fs(self.address, **options)
        except ImportError as error:
            package = known_implementations[protocol]["class"].split(".")[0]
            raise ImportError(
                f"{self.address}: to read {protocol}:// addresses, install the package {package}: "
                f"pip install {package}."
            ) from error
        except ValueError as error:
            raise ValueError(f"{self.address} cannot be read: {error}.") from error

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_opened": None, "versions": {}}

    def __str__(self) -> str:
        return self.address

    def __repr__(self) -> str:
        return f"RemoteFolder({self.address!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RemoteFolder) and (self._root, self.address) == (other._root, other.address)

    def __hash__(self) -> int:
        return hash((self._root, self.address))

    def __truediv__(self, name: str) -> RemoteFile:
        return RemoteFile(self, name)

    @property
    def name(self) -> str:
        """Last part of the address."""
        return self.address.rsplit("/", 1)[-1]

    def now(self) -> RemoteFolder:
        """Return the folder as it is now, without the versions and the commit that this object reads."""
        return RemoteFolder(self.address, self._options, self.cache.folder, self.cache.limit)

    # ------------------------------------------------------------------ versions

    def pin(self, files: Sequence[Mapping[str, Any]]) -> None:
        """Note the versions of files, which are read from then on; those noted before are kept.

        Each has `file` (name), `bytes` and `checksum`, as a manifest lists them.
        """
        new = [file for file in files if file["file"] not in self.versions]
        all_stated = self._pool.map(lambda file: self.retry(self._stated, file["file"]), new)
        for file, stated in zip(new, all_stated, strict=True):
            size = stated.get("size", file["bytes"])
            key = json.dumps([self._root, file["file"], stated, file["checksum"], block_cache.BLOCK_BYTES])
            self.versions[file["file"]] = Version(size, hashlib.sha256(key.encode()).hexdigest()[:32], stated)

    def _stated(self, name: str) -> dict[str, str | int]:
        """Return what the server states about the version of a file; nothing for one of a commit."""
        if self._is_pinned:
            return {}
        self._fs.invalidate_cache(self._path(name))
        stated = self._fs.info(self._path(name))
        return {
            key: stated[key] if isinstance(stated[key], int) else str(stated[key])
            for key in _VERSION
            if stated.get(key) is not None
        }

    def _must_be_unchanged(self, name: str) -> None:
        if self._stated(name) != self.versions[name].stated:
            raise ValueError(
                f"{self / name} was replaced after this object opened it: open the store again. Nothing of the new "
                "file was used."
            )

    # ------------------------------------------------------------------ reading

    def read(self, ranges: Sequence[Range]) -> list[Any]:
        """Read ranges of pinned files, in any order, which may overlap: list of bytes or memoryview.

        Raises
        ------
        ConnectionError
            The connection was lost, and six more attempts failed.
        ValueError
            A file was replaced on the server, or the server does not read ranges.
        """
        size = block_cache.BLOCK_BYTES
        contents = [self.cache.read(self.versions[file.name].key, start, stop) for file, start, stop in ranges]
        parts: dict[int, list[Any]] = {}  # of the ranges that are not, or not at one place, in the cache
        missing: dict[tuple[str, int], list[tuple[int, int, int, int]]] = {}
        for number in (number for number, content in enumerate(contents) if content is None):
            file, start, stop = ranges[number]
            parts[number] = []
            for block in range(start // size, -(-stop // size)):
                first, last = max(start, block * size), min(stop, (block + 1) * size)
                part = self.cache.read(self.versions[file.name].key, first, last)
                if part is None:
                    place = (number, len(parts[number]), first - block * size, last - block * size)
                    missing.setdefault((file.name, block), []).append(place)
                parts[number].append(part)
        for block_of, content in self._fetch(list(missing)):
            for number, i, first, last in missing[block_of]:
                parts[number][i] = content[first:last]
        for number, of_range in parts.items():
            contents[number] = b"".join(of_range)
        return contents

    def _fetch(self, blocks: list[tuple[str, int]]) -> Iterator[tuple[tuple[str, int], memoryview]]:
        """Fetch blocks of files, and add them to the cache; adjacent ones are fetched at once."""
        size = block_cache.BLOCK_BYTES
        runs: list[list[tuple[str, int]]] = []
        for name, block in sorted(blocks):
            if runs and runs[-1][-1] == (name, block - 1) and len(runs[-1]) < _BLOCKS_AT_ONCE:
                runs[-1].append((name, block))
            else:
                runs.append([(name, block)])
        requests = [(run[0][0], run[0][1] * size, (run[-1][1] + 1) * size) for run in runs]
        contents = list(self._pool.map(lambda request: self._get(*request), requests))
        # Before anything is used; after it has arrived, so that it was all of this version.
        list(self._pool.map(lambda name: self.retry(self._must_be_unchanged, name), sorted({of for of, _ in blocks})))
        for run, content in zip(runs, contents, strict=True):
            for i, (name, block) in enumerate(run):
                part = memoryview(content)[i * size : (i + 1) * size]
                self.cache.add(self.versions[name].key, block, part)
                yield (name, block), part

    def _get(self, name: str, start: int, stop: int) -> bytes:
        """Fetch a range of a file, up to its end."""
        stop = min(stop, self.versions[name].size)

        def get(name: str) -> bytes:
            try:
                content = self._cat(name, start, stop)
            except Exception as error:
                if _status(error) == 416:  # the file has become shorter
                    self._must_be_unchanged(name)
                raise
            if len(content) > stop - start:
                raise UnsupportedOperation(
                    f"{self / name}: the server sends {len(content)} bytes for a range of {stop - start}, so it does "
                    "not support range requests. Download the store, or choose another server."
                )
            if len(content) < stop - start:
                self._must_be_unchanged(name)
                raise ConnectionError(f"{len(content)} of {stop - start} bytes arrived")
            return content

        return self.retry(get, name)

    def _cat(self, name: str, start: int | None = None, stop: int | None = None) -> bytes:
        # File systems without asynchronous requests open the file, and would read ahead.
        options = {} if self._fs.async_impl else {"cache_type": "none"}
        # By name: in the file system of S3, the second argument is the version.
        return self._fs.cat_file(self._path(name), start=start, end=stop, **options)

    def whole(self, name: str) -> bytes:
        """Read a file: its pinned version, or what is there now, past the cache."""
        if name in self.versions:
            return bytes((self / name).read(0, self.versions[name].size))
        return self.retry(self._cat, name)

    def checksum(self, name: str) -> str:
        """Download a pinned file, past the cache, and return its xxh3_128 checksum."""
        step = block_cache.BLOCK_BYTES * _BLOCKS_AT_ONCE
        starts = range(0, self.versions[name].size, step)
        found = xxhash.xxh3_128()
        for i in range(0, len(starts), _CONNECTIONS):  # at most so many parts are in memory
            parts = starts[i : i + _CONNECTIONS]
            for content in self._pool.map(lambda start: self._get(name, start, start + step), parts):
                found.update(content)
        self.retry(self._must_be_unchanged, name)
        return found.hexdigest()

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    # ------------------------------------------------------------------ connections

    @property
    def _fs(self) -> fsspec.AbstractFileSystem:
        return self._of_this_process()[0]

    @property
    def _pool(self) -> ThreadPoolExecutor:
        return self._of_this_process()[1]

    def _of_this_process(self) -> tuple[fsspec.AbstractFileSystem, ThreadPoolExecutor]:
        """Return file system and threads; neither survives a fork."""
        if self._opened is None or self._opened[0] != os.getpid():
            self._opened = (os.getpid(), self._connect()[0], ThreadPoolExecutor(_CONNECTIONS, "remote"))
        return self._opened[1:]

    def retry(self, call: Callable[[str], T], name: str) -> T:
        """Call a function with the name of a file, or "" for the folder, again after failures of the network.

        ConnectionError is raised if all attempts failed; FileNotFoundError and PermissionError at once.
        """
        what = f"{self.address}/{name}".rstrip("/")
        for wait in (*WAITS, None):
            try:
                return call(name)
            except Exception as error:
                cause, status = _cause(error), _status(error)
                if isinstance(cause, PermissionError) or status in (401, 403):
                    raise PermissionError(
                        f"{what}: the server refuses access ({cause}). Log in (`hf auth login` for the Hub), or pass "
                        "storage_options of fsspec to RemoteFolder."
                    ) from error
                if isinstance(cause, FileNotFoundError) or status in (404, 410):
                    raise FileNotFoundError(f"There is no file {what}, or it was removed.") from error
                lasting = isinstance(cause, (ValueError, TypeError, NotImplementedError, ImportError, MemoryError))
                if lasting or (isinstance(status, int) and status < 500 and status not in _OF_A_BUSY_SERVER):
                    raise
                problem = str(cause) or type(cause).__name__
                if wait is None:
                    raise ConnectionError(
                        f"{what}: the connection was lost {len(WAITS) + 1} times, last with: {problem}. Check the "
                        "network and the address, and try again: what arrived so far is in the cache."
                    ) from error
                logger.warning(f"{what}: {problem}; trying again in {wait:g} s.")
                time.sleep(wait)
        raise AssertionError  # the last attempt returns or raises


def _cause(error: BaseException) -> BaseException:
    """Return why a call failed: the file system of http raises FileNotFoundError for any failure, from its cause."""
    return error.__cause__ or error if isinstance(error, FileNotFoundError) else error


def _status(error: BaseException) -> int | None:
    """Return the status of http of a failed call, of aiohttp, httpx or botocore; None if there was no answer."""
    cause = _cause(error)
    answer = getattr(cause, "response", None) or getattr(cause.__cause__, "response", None)  # s3fs: the cause has it
    if isinstance(answer, dict):
        return answer.get("ResponseMetadata", {}).get("HTTPStatusCode")
    return getattr(cause, "status", getattr(answer, "status_code", None))


class Version(NamedTuple):
    """Version of a file: its size, the key of its blocks in the cache, and what the server states."""

    size: int
    key: str
    stated: dict[str, str | int]


class RemoteFile:
    """A file of a `RemoteFolder`; `name` is its path in it."""

    def __init__(self, folder: RemoteFolder, name: str):
        self.folder, self.name = folder, name

    def __str__(self) -> str:
        return f"{self.folder}/{self.name}"

    def __reduce__(self) -> tuple[Any, ...]:
        return RemoteFile, (self.folder, self.name)

    @property
    def size(self) -> int:
        """Size in bytes of a pinned file."""
        return self.folder.versions[self.name].size

    def read(self, start: int, stop: int) -> Any:
        """Read a range of a pinned file: bytes, or a memoryview."""
        return self.folder.read([Range(self, start, stop)])[0]

    def read_bytes(self) -> bytes:
        """Read the file; see `RemoteFolder.whole`."""
        return self.folder.whole(self.name)


class Range(NamedTuple):
    """A range of bytes of a file, to be read with others at once by `fetched`."""

    file: RemoteFile
    start: int
    stop: int


def fetched(slices: list[list]) -> list[list]:
    """Return lists of slices with the bytes of ranges of remote files, read all at once; memory as it is."""
    first = next((contents[0] for contents in slices if contents), None)
    if not isinstance(first, Range):
        return slices
    found = iter(first.file.folder.read([content for contents in slices for content in contents]))
    return [[next(found) for _ in contents] for contents in slices]
