"""Open the files of a store: their format is readable, and none is missing, truncated or damaged."""

from __future__ import annotations

import io
import json
import time
from pathlib import Path
from typing import Any

from ..genes.gene_table import GeneTable
from .arrow_rows import ArrowRows
from .manifest import COMPACT_FORMAT_VERSION, FORMAT_VERSION
from .remote_files import RemoteFolder
from .replacing import building_of, recover


def read_manifest(path: Path | RemoteFolder) -> dict[str, Any]:
    """Read the manifest of a store, and check that its format is readable."""
    manifest = json.loads(_remote_manifest(path) if isinstance(path, RemoteFolder) else _local_manifest(path))
    readable = (FORMAT_VERSION, COMPACT_FORMAT_VERSION)
    if manifest["format_version"] not in readable:
        remedy = "Update stformer_hf." if manifest["format_version"] > max(readable) else "Rebuild it."
        raise ValueError(
            f"{path} has store format {manifest['format_version']}; this version reads {FORMAT_VERSION} and "
            f"{COMPACT_FORMAT_VERSION}. {remedy}"
        )
    return manifest


def _remote_manifest(path: RemoteFolder) -> bytes:
    try:
        return (path / "manifest.json").read_bytes()
    except FileNotFoundError as error:
        raise FileNotFoundError(f"There is no CellStore at {path}: it has no manifest.json.") from error


def _local_manifest(path: Path) -> bytes:
    file = path / "manifest.json"
    if not path.exists() and path.with_name(f".{path.name}.old").exists():
        time.sleep(0.2)  # another process may be replacing it just now
        recover(path)
    if not file.exists():
        if building_of(path).exists():
            raise FileNotFoundError(
                f"{path} is incomplete: its build was interrupted. Call CellStore.build again to resume it."
            )
        raise FileNotFoundError(f"There is no CellStore at {path}; create one with CellStore.build.")
    return file.read_bytes()


def open_files(path: Any, manifest: dict[str, Any]) -> tuple[GeneTable, ArrowRows]:
    """Open the gene table and the shards of the store at a Path or RemoteFolder; those on a server are pinned."""
    shards = manifest["shards"]
    files = [manifest["gene_table"], *shards]
    is_remote = isinstance(path, RemoteFolder)
    if is_remote:
        path.pin(files)
    for listed in files:
        file = path / listed["file"]
        size = file.size if is_remote else file.stat().st_size if file.exists() else 0
        if size != listed["bytes"]:
            raise ValueError(
                f"{file} has {size} bytes instead of {listed['bytes']}: it was truncated or replaced. "
                "Copy the store again, or rebuild it."
            )
    # Read now: if the store were replaced while it is open, its old rows would get the new names.
    table = (path / "genes.parquet").read_bytes()
    try:
        genes = GeneTable.from_parquet(io.BytesIO(table))
    except (OSError, ValueError) as error:  # Arrow's errors are subclasses of these
        raise ValueError(f"{path / 'genes.parquet'} is damaged: {error}. Copy the store again.") from error
    shifts = [shard["neighbor_shift"] for shard in shards]
    return genes, ArrowRows([path / shard["file"] for shard in shards], shifts, manifest.get("compact", False))
