"""Write a store: sources to Arrow shards, piece by piece, atomically."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from ..genes.gene_table import GeneTable
from ..genes.unite import FATES, UnitedGenes, unite
from ..genes.whole_files import whole_file
from ..sources.formats import expand
from ..sources.matrices import MemoryMatrix
from ..sources.obs_columns import ObsColumns, as_arrow, as_names, unite_obs
from ..sources.open_source import Source, open_source
from ..sources.same_cells import SameCells, check_names, describe, row_totals
from ..sources.stored_cells import StoredCells
from .engines import check_engine, run_tasks, runs_here
from .replacing import STORE, check_free, recover, written_at
from .shards import (
    COUNT_TYPES,
    Piece,
    RowFormat,
    ShardWriter,
    checksum,
    count_type_of,
    gene_type,
    has_types,
    rewrite,
    shuffle,
    told_when_full,
    widest,
    write_json,
    write_piece,
)

if TYPE_CHECKING:
    from datasets import Features


logger = logging.getLogger(__name__)

FORMAT_VERSION = 2
COMPACT_FORMAT_VERSION = 3  # of stores with compact rows, so that versions that cannot read them say so
ROWS_PER_BATCH = 2048  # rows of an Arrow record batch, and of a block read from a source
ROWS_PER_SHARD = 65_536
_OF_SOURCE = ("matrix", "genes", "fates", "neighbors")  # what all pieces of a source share; sent to a process once


@dataclass
class BuildSettings:
    """How a store is built; see `CellStore.build`."""

    obs: Sequence[str] | str | None = None
    classes: Sequence[str] | str = ()
    layer: str | None = None
    fractional: bool = False
    neighbors: str | None = None
    aliases: Any = None
    unify: str | None = None
    species: str | None = None
    compact: bool = False
    shuffle: bool = False
    seed: int = 0
    part: tuple[int, int] | None = None
    workers: int = 1
    engine: str = "local"
    rows_per_batch: int = ROWS_PER_BATCH
    rows_per_shard: int = ROWS_PER_SHARD
    allow_duplicates: bool = False


def write_store(
    path: Path,
    sources: Any,
    settings: BuildSettings,
    *,
    overwrite: bool = False,
    base: StoredCells | None = None,
) -> None:
    """Write a store; parameters and errors are those of `CellStore.build`.

    `base` is the store at `path` to append to, if any; its shards are linked, not copied.
    """
    path = path.resolve()
    recover(path)
    _check_settings(settings)
    if settings.shuffle and settings.part and settings.neighbors:
        raise ValueError("neighbors: a shuffled part cannot keep them. Build the parts without shuffle.")
    overwrite = overwrite or base is not None
    check_free(path, STORE, overwrite)
    found = [source for source in expand(sources) if not (isinstance(source, Path) and source.resolve() == path)]
    if not settings.allow_duplicates:
        check_names(found)
    opened = list(_open(found, settings))
    if not opened:
        raise ValueError("No sources: pass at least one AnnData, store or file.")
    same = _same_cells(opened, settings, path, base)
    tables, names = [source.genes for source in opened], [source.name for source in opened]
    if base is not None:
        tables, names = [base.genes, *tables], [str(path), *names]
    united = unite(tables, names, aliases=settings.aliases, unify=settings.unify, species=settings.species)
    if not len(united.genes):
        raise ValueError(f"{opened[0].name} has no genes.")
    if base is not None:
        if united.genes.gene_ids[: len(base.genes)].tolist() != base.gene_ids.tolist():
            raise ValueError(
                f"aliases or unify would rename genes of {path}. Reverse the aliases (new id -> the store's id), or "
                "build a new store from this one and the sources."
            )
        united.rows, united.fates = united.rows[1:], united.fates[1:]
    categories, known = (None, None) if base is None else (base.categories, base.manifest["obs"])
    obs = unite_obs(opened, settings.obs, categories, known, settings.classes, settings.compact)
    for source in opened:
        source.keep_obs([])
    if known is not None and obs.types != known:
        new = obs.types
        changed = [f"{name!r} ({known[name]} there, {new[name]} here)" for name in new if new[name] != known[name]]
        raise ValueError(f"obs column {', '.join(changed)} has another type than in {path}. Convert it first.")
    row_format = RowFormat(
        gene_type=gene_type(len(united.genes)),
        count_type=widest([_likely_count_type(source) for source in opened]),
        neighbors=settings.neighbors is not None,
        obs=obs.types,
        categories=obs.categories,
        compact=settings.compact,
    )
    with written_at(path, STORE, overwrite) as building, told_when_full(building):
        if base is not None:
            base.must_be_unchanged()  # else cells appended in the meantime would be lost
        plan = _plan(opened, settings, united, row_format, base)
        prepare(building, plan, stale=_may_be_stale(building, plan))
        pieces = list(_pieces(building, opened, settings, united, obs, row_format, same))
        written = _watch(same, pieces, opened, path, base)
        records = _base_records(building, base) + _write_pieces(pieces, opened, settings, written)
        if same is not None:
            _warn_of_shared(same, opened, path)
        _finish(building, opened, settings, united, row_format, records, base)


def _check_settings(settings: BuildSettings) -> None:
    check_engine(settings.engine, settings.workers)
    for name in ("rows_per_batch", "rows_per_shard"):
        if getattr(settings, name) < 1:
            raise ValueError(f"{name}={getattr(settings, name)}: must be at least 1.")
    if settings.seed < 0:
        raise ValueError(f"seed={settings.seed}: must be at least 0.")
    settings.rows_per_batch = min(settings.rows_per_batch, settings.rows_per_shard)
    _range_of_part(settings.part, 0)


def _open(found: list[Any], settings: BuildSettings) -> Iterator[Source]:
    """Open sources, keeping little of each in memory: the names of its cells, and the obs columns to store."""
    genes = None
    for path in found:
        source = open_source(path, settings.layer, settings.fractional)
        if genes is not None and source.genes.frame.equals(genes.frame):
            source.genes = genes  # most files have the genes of the last one
        genes = source.genes
        if settings.obs != "all":
            source.keep_obs(list(dict.fromkeys([*as_names(settings.obs), *as_names(settings.classes)])))
        yield source


def _same_cells(
    sources: list[Source], settings: BuildSettings, path: Path, base: StoredCells | None
) -> SameCells | None:
    """Find the sources whose cells must be compared, including those of the base store; see `SameCells`.

    Return None if there are none, or if duplicates are allowed.
    """
    if settings.allow_duplicates:
        return None
    names = [source.obs_names for source in sources]
    same = SameCells(names if base is None else [*names, base.obs_table(["obs_name"])["obs_name"]])
    if same.pairs and settings.part is not None:  # the cells to compare may lie in different parts
        i, j = same.pairs[0]
        logger.warning(
            f"{_called(sources, i, path)} and {_called(sources, j, path)} have the same barcodes, and one part alone "
            "cannot show whether they hold the same cells."
        )
        return None
    return same if same.alike and settings.part is None else None


def _called(sources: list[Source], number: int, path: Path) -> str:
    """Return the name of a source for a message; the base store comes after all sources."""
    if number == len(sources):
        return str(path)
    name = sources[number].name
    return name if sum(source.name == name for source in sources) == 1 else f"{name} (source {number + 1})"


def _watch(
    same: SameCells | None, pieces: list[Piece], sources: list[Source], path: Path, base: StoredCells | None
) -> Callable[[Piece], None]:
    """Return a function to call with each written piece, which raises once two sources hold the same cells."""
    if same is None:
        return lambda piece: None
    left = Counter(piece.source for piece in pieces)

    def written(piece: Piece) -> None:
        left[piece.source] -= 1
        if left[piece.source] or not piece.describe:
            return
        parts = [np.load(other.description) for other in pieces if other.source == piece.source]
        found = same.add(piece.source, np.concatenate(parts))
        if found:
            share, i, j = found
            first, second = _called(sources, i, path), _called(sources, j, path)
            raise ValueError(
                f"{first} holds the same cells as {second}: {share:.0%} of its cells have the barcode and (nearly) "
                "the counts of a cell there. Pass only one of the two (the filtered rather than the raw matrix), or "
                "pass allow_duplicates=True."
            )

    if base is not None and len(sources) in same:
        others = [source for pair in same.alike for source in pair if source < len(sources)]
        same.add(len(sources), _describe_rows(base, same.in_another(len(sources), others)))
    return written


def _warn_of_shared(same: SameCells, sources: list[Source], path: Path) -> None:
    shared = same.shared()
    if shared:
        n, i, j = shared[0]
        more = f" {len(shared) - 1} more pairs of sources share cells." if len(shared) > 1 else ""
        logger.warning(
            f"{n} cells of {_called(sources, i, path)} have the barcode, the total and the number of genes of a cell "
            f"of {_called(sources, j, path)}: they are in the store twice.{more} train_test_split and held_out keep "
            "such cells on one side."
        )


def _describe_rows(store: StoredCells, which: np.ndarray) -> np.ndarray:
    """Describe the cells of a store where `which`, bool (n,), is True: float32 array (n, 2), else zeros."""
    described = np.zeros((len(store), 2), np.float32)
    rows = np.flatnonzero(which)
    for start in range(0, len(rows), ROWS_PER_BATCH):
        numbers = rows[start : start + ROWS_PER_BATCH]
        block = store.rows(numbers)
        described[numbers] = describe(row_totals(block), block.indptr)
    return described


def _likely_count_type(source: Source) -> str:
    """Return the count type of some of the values, so that shards rarely need widening; writing checks the values."""
    samples = [count_type_of(values[np.isfinite(values)], source.name) for values in source.matrix.sample()]
    source.matrix.close()
    return widest(samples)


def _plan(
    sources: list[Source],
    settings: BuildSettings,
    united: UnitedGenes,
    row_format: RowFormat,
    base: StoredCells | None,
) -> dict:
    """Describe a build, to resume an interrupted one only if the descriptions are equal."""
    genes = hashlib.sha256("\n".join(united.genes.gene_ids).encode())
    for rows in united.rows:
        genes.update(rows.tobytes())
    return {
        "format_version": FORMAT_VERSION,
        "sources": [source.key for source in sources],
        "counts_in": [source.counts_in for source in sources],
        "genes": genes.hexdigest(),
        # An AnnData in memory may have changed, and with it the label codes of the other sources.
        "categories": row_format.categories,
        "obs": row_format.obs,
        "settings": {
            name: getattr(settings, name)
            for name in ("fractional", "neighbors", "compact", "shuffle", "seed", "rows_per_batch", "rows_per_shard")
        },
        "part": None if settings.part is None else list(settings.part),
        "base": None if base is None else [shard["checksum"] for shard in base.manifest["shards"]],
    }


def prepare(building: Path, plan: dict, stale: bool = False) -> None:
    """Create the folder of a build, or keep that of an interrupted one with the same plan, unless it is stale."""
    plan_file = building / "plan.json"
    if plan_file.exists() and json.loads(plan_file.read_text()) == plan and not stale:
        return
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(parents=True)
    write_json(plan_file, plan)


def _may_be_stale(building: Path, plan: dict) -> bool:
    """Return whether an interrupted build may hold outdated cells of an AnnData in memory.

    This is so if a source was in memory and the build was stopped in its last phase, which renames the shards.
    """
    return None in plan["sources"] and any([*building.glob("data-*"), *building.glob("shuffled.json")])


def _base_records(building: Path, base: StoredCells | None) -> list[dict]:
    """Link the shards of the base store; they count as a finished piece."""
    if base is None:
        return []
    shards = []
    for i, shard in enumerate(base.manifest["shards"]):
        linked = building / f"base-{i:05d}.arrow"
        if not linked.exists() and not any(building.glob(f"data-{i:05d}-of-*")):
            file = (base.path / shard["file"]).resolve()
            try:
                os.link(file, linked)
            except OSError:  # another file system, or one without links
                with whole_file(linked) as part:
                    shutil.copy2(file, part)
        shards.append({**shard, "file": linked.name})
    return [{"source": -1, "shards": shards}]


# ---------------------------------------------------------------------- pieces


def _write_pieces(
    pieces: list[Piece], sources: list[Source], settings: BuildSettings, written: Callable[[Piece], None]
) -> list[dict]:
    """Write the missing pieces; return the records of all pieces, in the order of the cells."""
    here = runs_here(settings.engine, settings.workers)
    elsewhere: list[Piece] = []
    records: dict[Path, dict] = {}
    with tqdm(total=sum(map(len, pieces)), desc="build", unit="cell", disable=None) as bar:
        for piece in pieces:
            in_memory = sources[piece.source].key is None
            if piece.is_written and not in_memory:
                records[piece.record] = json.loads(piece.record.read_text())
                bar.update(len(piece))
            elif here or in_memory:
                records[piece.record] = write_piece(piece, bar.update)
            else:
                elsewhere.append(piece)
                continue
            written(piece)
        if elsewhere:
            of_sources = {piece.source: {name: getattr(piece, name) for name in _OF_SOURCE} for piece in elsewhere}
            with run_tasks(
                _write, map(_own_part, elsewhere), shared=of_sources, workers=settings.workers, engine=settings.engine
            ) as results:
                for number, record in results:
                    piece = elsewhere[number]
                    records[piece.record] = record
                    bar.update(len(piece))
                    written(piece)
    return [records[piece.record] for piece in pieces]


def _own_part(piece: Piece) -> Piece:
    """Return what a piece does not share with the others of its source."""
    n = len(piece)
    names = as_arrow(piece.obs_names, piece.obs_names.type, n)  # copies: Arrow pickles slices with the whole array
    obs = {name: None if of is None else as_arrow(of, of.type, n) for name, of in piece.obs.items()}
    of_source: dict[str, Any] = dict.fromkeys(_OF_SOURCE)  # `_write` fills them in
    return replace(piece, obs_names=names, obs=obs, **of_source)


def _write(of_sources: dict[int, dict[str, Any]], piece: Piece) -> dict:
    return write_piece(replace(piece, **of_sources[piece.source]))


def _pieces(
    building: Path,
    sources: list[Source],
    settings: BuildSettings,
    united: UnitedGenes,
    obs: ObsColumns,
    row_format: RowFormat,
    same: SameCells | None,
) -> Iterator[Piece]:
    """Cut the sources into pieces: one shard each if rows can be read at any position, else one source each."""
    n_cells = sum(source.shape[0] for source in sources)
    first, last = _range_of_part(settings.part, n_cells)
    start_of_source = 0
    for i, source in enumerate(sources):
        start = max(0, first - start_of_source)
        stop = min(source.shape[0], last - start_of_source)
        # A source that other processes cannot read is not cut.
        whole = not source.matrix.seekable or isinstance(source.matrix, MemoryMatrix)
        step = max(1, stop - start) if whole else settings.rows_per_shard
        graph = None if settings.neighbors is None else source.neighbors(settings.neighbors)
        for piece_start in range(start, stop, step):
            piece_stop = min(piece_start + step, stop)
            cells = slice(piece_start, piece_stop)
            yield Piece(
                record=building / f"source-{i:05d}-{piece_start:09d}.json",
                source=i,
                name=source.name,
                counts_in=source.counts_in,
                matrix=source.matrix,
                start=piece_start,
                stop=piece_stop,
                genes=united.rows[i],
                fates=united.fates[i],
                n_genes=len(united.genes),
                obs_names=source.obs_names[cells],
                obs={name: None if values is None else values[cells] for name, values in obs.values[i].items()},
                neighbors=graph,
                first_row=start_of_source,
                format=row_format,
                fractional=settings.fractional,
                rows_per_batch=settings.rows_per_batch,
                rows_per_shard=settings.rows_per_shard,
                describe=same is not None and i in same,
            )
        start_of_source += source.shape[0]


def _range_of_part(part: tuple[int, int] | None, n_cells: int) -> tuple[int, int]:
    if part is None:
        return 0, n_cells
    i, n = part
    if not 0 <= i < n:
        raise ValueError(f"part={part}: part (i, n) needs 0 <= i < n.")
    return i * n_cells // n, (i + 1) * n_cells // n


# ---------------------------------------------------------------------- finishing


def _finish(
    building: Path,
    sources: list[Source],
    settings: BuildSettings,
    united: UnitedGenes,
    row_format: RowFormat,
    records: list[dict],
    base: StoredCells | None,
) -> None:
    """Convert all shards to one type, rename them, and write the files that make the folder a store."""
    shards = [shard for record in records for shard in record["shards"]]
    row_format = row_format.with_count_type(widest([shard["count_type"] for shard in shards]))
    if settings.shuffle:
        shards = _shuffled(building, shards, row_format, settings)
    if not shards:  # no cells: a Hugging Face dataset still needs one file
        writer = ShardWriter(building, "source-none", row_format, 1)
        writer.open()
        writer.close()
        shards = writer.shards
    n_rows = 0
    for i, shard in enumerate(shards):
        final = building / f"data-{i:05d}-of-{len(shards):05d}.arrow"
        # A build interrupted here resumes here: a shard with its final name is done.
        if not final.exists():
            if has_types(shard, row_format):
                (building / shard["file"]).rename(final)
            else:
                rewrite(building / shard["file"], final, row_format)
                (building / shard["file"]).unlink()
        known = shard.get("checksum") if has_types(shard, row_format) else None
        shard.update(
            file=final.name,
            bytes=final.stat().st_size,
            checksum=known or checksum(final),
            gene_type=row_format.gene_type,
            count_type=row_format.count_type,
            neighbor_shift=shard.get("neighbor_shift", 0),
        )
        n_rows += shard["rows"]
    first, _ = _range_of_part(settings.part, sum(source.shape[0] for source in sources))
    for shard in shards[0 if base is None else len(base.manifest["shards"]) :]:
        shard["neighbor_shift"] = 0 if settings.shuffle else len(base) if base is not None else -first

    manifest = {
        "n_cells": n_rows,
        "part": None if settings.part is None else list(settings.part),
        "build": None if settings.part is None else _build_id(building, sources),
        "shuffled": settings.shuffle,
        "sources": ([] if base is None else base.manifest["sources"])
        + [_describe(source, i, united, records, base) for i, source in enumerate(sources)],
    }
    write_manifest(building, manifest, united.genes, row_format, shards)
    for leftover in building.iterdir():
        if leftover.name.startswith(("source-", "base-", "shuffled", "plan", "by-row-")) or leftover.suffix == ".part":
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()


def _build_id(building: Path, sources: list[Source]) -> str:
    """Return an id that all parts of one build share, wherever their files are."""
    plan = json.loads((building / "plan.json").read_text())
    plan["sources"] = [[Path(source.name).name, *source.shape] for source in sources]
    plan.pop("part")
    return hashlib.sha256(json.dumps(plan, sort_keys=True).encode()).hexdigest()[:16]


def _shuffled(building: Path, shards: list[dict], row_format: RowFormat, settings: BuildSettings) -> list[dict]:
    record = building / "shuffled.json"
    if not record.exists():
        for leftover in [*building.glob("shuffled-*"), *building.glob("bucket-*")]:
            leftover.unlink()
        order = np.random.default_rng([settings.seed, 0x5F1E]).permutation(sum(shard["rows"] for shard in shards))
        done = shuffle(building, shards, row_format, order, settings.rows_per_batch, settings.rows_per_shard)
        write_json(record, done)
    return json.loads(record.read_text())


def _describe(source: Source, number: int, united: UnitedGenes, records: list[dict], base: StoredCells | None) -> dict:
    """Describe a source for the manifest: where its counts were, and how its columns were matched."""
    own = [record for record in records if record["source"] == number]
    rows = united.rows[number]
    columns = np.bincount(united.fates[number], minlength=len(FATES)).tolist()
    return {
        "name": Path(source.name).name,
        "counts_in": source.counts_in,
        "n_cells": sum(record["cells"][1] - record["cells"][0] for record in own),
        "n_columns": len(rows),
        "n_genes": len(np.unique(rows)),
        # The genes of this source and of those before it are so many of the first ones of the table.
        "n_genes_so_far": max(
            0 if base is None else len(base.genes), *(int(of.max(initial=-1)) + 1 for of in united.rows[: number + 1])
        ),
        "n_counts": sum(record["n_counts"] for record in own),
        "n_empty": sum(record["n_empty"] for record in own),
        "columns": dict(zip(FATES, columns, strict=True)),
        "total_counts": {fate: sum(record["total_counts"][fate] for record in own) for fate in FATES},
    }


def write_manifest(
    folder: Path, facts: Mapping[str, Any], genes: GeneTable, row_format: RowFormat, shards: list[dict]
) -> None:
    """Write the files that make a folder of shards a store, the manifest last."""
    table = folder / "genes.parquet"
    genes.to_parquet(table)
    write_dataset_files(folder, row_format.features(), shards)
    write_json(
        folder / "manifest.json",
        {
            "format_version": COMPACT_FORMAT_VERSION if row_format.compact else FORMAT_VERSION,
            "written_by": f"stformer_hf {version('stformer_hf')}",
            **facts,
            "n_genes": len(genes),
            "n_counts": sum(source["n_counts"] for source in facts["sources"]),
            "gene_type": row_format.gene_type,
            "count_type": row_format.count_type,
            "compact": row_format.compact,
            "neighbors": row_format.neighbors,
            "obs": row_format.obs,
            "categories": row_format.categories,
            "shards": shards,
            "gene_table": {"file": table.name, "bytes": table.stat().st_size, "checksum": checksum(table)},
            "complete": True,
        },
    )


def write_dataset_files(folder: Path, features: Features, shards: list[dict]) -> None:
    """Write the files that make a folder of shards a saved Hugging Face dataset."""
    from datasets import DatasetInfo

    DatasetInfo(features=features).write_to_directory(str(folder))
    fingerprint = hashlib.sha256("".join(shard["checksum"] for shard in shards).encode()).hexdigest()[:16]
    write_json(
        folder / "state.json",
        {
            "_data_files": [{"filename": shard["file"]} for shard in shards],
            "_fingerprint": fingerprint,
            "_format_columns": None,
            "_format_kwargs": {},
            "_format_type": None,
            "_output_all_columns": False,
            "_split": None,
        },
    )


def coverage(sources: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """Tabulate how the columns of each source, and the counts in them, were matched to genes.

    Returns
    -------
    DataFrame
        One row per source: `cells`, `columns`, `genes` (rows of the gene table), then for each fate the number of
        columns and their share of all counts: `kept` (its own Ensembl id), `mapped` (by `aliases` or symbol),
        `unmapped` (no Ensembl id; kept under its name).
    """
    rows = []
    for source in sources:
        total = sum(source["total_counts"].values()) or 1.0
        row = {"source": source["name"], "cells": source["n_cells"], "columns": source["n_columns"]}
        row["genes"] = source["n_genes"]
        for fate in FATES:
            row[fate] = source["columns"][fate]
            row[f"counts {fate}"] = source["total_counts"][fate] / total
        rows.append(row)
    return pd.DataFrame(rows).set_index("source")


__all__ = ["COUNT_TYPES", "FORMAT_VERSION", "BuildSettings", "coverage", "write_manifest", "write_store"]
