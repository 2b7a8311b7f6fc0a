"""Join stores through a manifest that points to their shards."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .manifest import write_manifest
from .reader import StoreReader
from .replacing import STORE, check_free, recover, written_at
from .shards import RowFormat, checksum, rewrite, widest


def join_stores(path: Path, stores: Sequence[StoreReader], overwrite: bool) -> None:
    """Write the joined store; parameters and errors are those of `CellStore.join`.

    Shards are linked (by hard links, or by path across file systems). Only those with a narrower count type than
    others are rewritten, since a Hugging Face dataset has one type per column.
    """
    path = path.resolve()
    recover(path)
    check_free(path, STORE, overwrite)
    stores = _in_order(stores)
    first = stores[0].manifest
    for store in stores[1:]:
        _check_alike(stores[0], store)
    row_format = RowFormat(
        gene_type=first["gene_type"],
        count_type=widest([store.manifest["count_type"] for store in stores]),
        neighbors=first["neighbors"],
        obs=first["obs"],
        categories=first["categories"],
        compact=stores[0].is_compact,
    )
    with written_at(path, STORE, overwrite) as building:
        _write(path, building, stores, row_format)
        for store in stores:
            store.must_be_unchanged()  # else the links would point to the shards of a store that took its place


def _write(path: Path, building: Path, stores: Sequence[StoreReader], row_format: RowFormat) -> None:
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(parents=True)
    shards: list[dict[str, Any]] = []
    n_cells = 0
    for store in stores:
        for shard in store.manifest["shards"]:
            file = (store.path / shard["file"]).resolve()
            shard = {**shard, "neighbor_shift": shard["neighbor_shift"] + n_cells}
            own = building / f"joined-{len(shards):05d}.arrow"
            if row_format.fits(shard):
                shard["file"] = own.name
                try:
                    os.link(file, own)
                except OSError:  # on another file system: refer to it by its path
                    shard["file"] = os.path.relpath(file, path)
            else:
                rewrite(file, own, row_format)
                shard.update(file=own.name, bytes=own.stat().st_size, checksum=checksum(own))
                shard["count_type"] = row_format.count_type
            shards.append(shard)
        n_cells += len(store)
    facts = {"n_cells": n_cells, "part": None, "build": None, "sources": _sources(stores)}
    facts["shuffled"] = any(store.manifest["shuffled"] for store in stores)
    write_manifest(building, facts, stores[0].genes, row_format, shards)


def _in_order(stores: Sequence[StoreReader]) -> list[StoreReader]:
    """Sort parts of one build; other stores keep their order."""
    parts = [store.manifest["part"] for store in stores]
    if not parts:
        raise ValueError("No stores to join.")
    if all(part is None for part in parts):
        return list(stores)
    other = next((store for store in stores if store.manifest["build"] != stores[0].manifest["build"]), None)
    if None in parts or other is not None:
        other = other or stores[parts.index(None)]
        raise ValueError(f"{stores[0].path} and {other.path} are not parts of one build: sources or settings differ.")
    n_parts = {n for _, n in parts}
    found = sorted(i for i, _ in parts)
    if len(n_parts) > 1 or found != list(range(parts[0][1])):
        missing = sorted(set(range(parts[0][1])) - set(found))
        raise ValueError(
            f"Got the parts {', '.join(f'{i} of {n}' for i, n in parts)}: every part of a build is needed exactly once"
            f"{f'; {missing} missing' if missing else ''}."
        )
    return sorted(stores, key=lambda store: store.manifest["part"][0])


def _check_alike(first: StoreReader, other: StoreReader) -> None:
    if list(first.gene_ids) != list(other.gene_ids):
        raise ValueError(
            f"{other.path} has other genes than {first.path}, or another gene order. Parts of one build, "
            "CellStore.build(…, part=(i, n)), have the same; merge other stores with CellStore.build(path, stores)."
        )
    if first.is_compact != other.is_compact:
        raise ValueError(
            f"One of {first.path} and {other.path} has compact rows: merge them with CellStore.build(path, stores)."
        )
    for name in ("obs", "categories", "neighbors"):
        if first.manifest[name] != other.manifest[name]:
            raise ValueError(
                f"{other.path} has other {name} than {first.path}. Parts of one build have the same; merge other "
                "stores with CellStore.build(path, stores)."
            )


def _sources(stores: Sequence[StoreReader]) -> list[dict]:
    """Return the sources listed in the manifests; for parts, which share their sources, with the numbers summed."""
    if stores[0].manifest["part"] is None:
        return [source for store in stores for source in store.manifest["sources"]]
    merged = []
    for same in zip(*(store.manifest["sources"] for store in stores), strict=True):
        total = dict(same[0])
        for name in ("n_cells", "n_counts", "n_empty"):
            total[name] = sum(source[name] for source in same)
        total["total_counts"] = {
            fate: sum(source["total_counts"][fate] for source in same) for fate in total["total_counts"]
        }
        merged.append(total)
    return merged
