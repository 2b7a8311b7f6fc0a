"""Write a store: sources to Arrow shards, piece by piece, atomically."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from ..genes.unite import FATES, UnitedGenes, unite
from ..genes.whole_files import whole_file
from ..sources.formats import expand
from ..sources.matrices import MemoryMatrix
from ..sources.obs_columns import ObsColumns, as_arrow, as_names, unite_obs
from ..sources.open_source import Source, open_source
from ..sources.same_cells import check_names
from .duplicates import DuplicateCheck
from .engines import check_engine, run_tasks, runs_here
from .manifest import FORMAT_VERSION, write_manifest
from .reader import StoreReader
from .replacing import STORE, check_free, recover, written_at
from .shards import (
    Piece,
    RowFormat,
    ShardWriter,
    checksum,
    count_type_of,
    gene_type,
    rewrite,
    told_when_full,
    widest,
    write_json,
    write_piece,
)
from .shuffle import shuffle

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
    base: StoreReader | None = None,
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
    duplicates = DuplicateCheck(opened, path, base, settings.allow_duplicates, settings.part is not None)
    united = _unite_genes(opened, settings, path, base)
    obs = _unite_obs(opened, settings, path, base)
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
        # In its last phase, which renames the shards, an interrupted build may hold outdated cells of an AnnData.
        stale = None in plan["sources"] and any([*building.glob("data-*"), *building.glob("shuffled.json")])
        prepare(building, plan, stale)
        pieces = list(_pieces(building, opened, settings, united, obs, row_format, duplicates))
        duplicates.begin(pieces)
        records = _base_records(building, base) + _write_pieces(pieces, opened, settings, duplicates)
        duplicates.warn_of_shared()
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


def _unite_genes(sources: list[Source], settings: BuildSettings, path: Path, base: StoreReader | None) -> UnitedGenes:
    """Merge the genes of the sources; those of the base store keep their numbers."""
    tables, names = [source.genes for source in sources], [source.name for source in sources]
    if base is not None:
        tables, names = [base.genes, *tables], [str(path), *names]
    united = unite(tables, names, aliases=settings.aliases, unify=settings.unify, species=settings.species)
    if not len(united.genes):
        raise ValueError(f"{sources[0].name} has no genes.")
    if base is not None:
        if united.genes.gene_ids[: len(base.genes)].tolist() != base.gene_ids.tolist():
            raise ValueError(
                f"aliases or unify would rename genes of {path}. Reverse the aliases (new id -> the store's id), or "
                "build a new store from this one and the sources."
            )
        united.rows, united.fates = united.rows[1:], united.fates[1:]
    return united


def _unite_obs(sources: list[Source], settings: BuildSettings, path: Path, base: StoreReader | None) -> ObsColumns:
    """Merge the obs columns of the sources, which then forget them; those of the base store keep their types."""
    categories, known = (None, None) if base is None else (base.categories, base.manifest["obs"])
    obs = unite_obs(sources, settings.obs, categories, known, settings.classes, settings.compact)
    for source in sources:
        source.keep_obs([])
    if known is not None and obs.types != known:
        new = obs.types
        changed = [f"{name!r} ({known[name]} there, {new[name]} here)" for name in new if new[name] != known[name]]
        raise ValueError(f"obs column {', '.join(changed)} has another type than in {path}. Convert it first.")
    return obs


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
    base: StoreReader | None,
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


def _base_records(building: Path, base: StoreReader | None) -> list[dict]:
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
    pieces: list[Piece], sources: list[Source], settings: BuildSettings, duplicates: DuplicateCheck
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
            duplicates.add(piece)
        if elsewhere:
            of_sources = {piece.source: {name: getattr(piece, name) for name in _OF_SOURCE} for piece in elsewhere}
            with run_tasks(
                _write, map(_own_part, elsewhere), shared=of_sources, workers=settings.workers, engine=settings.engine
            ) as results:
                for number, record in results:
                    piece = elsewhere[number]
                    records[piece.record] = record
                    bar.update(len(piece))
                    duplicates.add(piece)
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
    duplicates: DuplicateCheck,
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
                **vars(source.align(united.rows[i])),
                record=building / f"source-{i:05d}-{piece_start:09d}.json",
                source=i,
                start=piece_start,
                stop=piece_stop,
                fates=united.fates[i],
                n_genes=len(united.genes),
                obs_names=source.obs_names[cells],
                obs={name: None if values is None else values[cells] for name, values in obs.values[i].items()},
                neighbors=graph,
                first_row=start_of_source,
                format=row_format,
                rows_per_batch=settings.rows_per_batch,
                rows_per_shard=settings.rows_per_shard,
                describe=i in duplicates,
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
    base: StoreReader | None,
) -> None:
    """Convert all shards to one type, rename them, and write the files that make the folder a store."""
    shards = [shard for record in records for shard in record["shards"]]
    row_format = replace(row_format, count_type=widest([shard["count_type"] for shard in shards]))
    if settings.shuffle:
        shards = _shuffled(building, shards, row_format, settings)
    if not shards:  # no cells: a Hugging Face dataset still needs one file
        writer = ShardWriter(building, "source-none", row_format, 1)
        writer.open()
        writer.close()
        shards = writer.shards
    for i, shard in enumerate(shards):
        _give_final_name(building, shard, f"data-{i:05d}-of-{len(shards):05d}.arrow", row_format)
    first, _ = _range_of_part(settings.part, sum(source.shape[0] for source in sources))
    for shard in shards[0 if base is None else len(base.manifest["shards"]) :]:
        shard["neighbor_shift"] = 0 if settings.shuffle else len(base) if base is not None else -first

    manifest = {
        "n_cells": sum(shard["rows"] for shard in shards),
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


def _give_final_name(building: Path, shard: dict, name: str, row_format: RowFormat) -> None:
    """Rename a shard, or rewrite it if it has other types, and complete its record."""
    final = building / name
    # A build interrupted here resumes here: a shard with its final name is done.
    if not final.exists():
        if row_format.fits(shard):
            (building / shard["file"]).rename(final)
        else:
            rewrite(building / shard["file"], final, row_format)
            (building / shard["file"]).unlink()
    known = shard.get("checksum") if row_format.fits(shard) else None
    shard.update(
        file=name,
        bytes=final.stat().st_size,
        checksum=known or checksum(final),
        neighbor_shift=shard.get("neighbor_shift", 0),
        **row_format.types,
    )


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


def _describe(source: Source, number: int, united: UnitedGenes, records: list[dict], base: StoreReader | None) -> dict:
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
