"""Writes a store: sources to Arrow shards, block by block, whole or not at all."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
from anndata import AnnData
from scipy import sparse
from tqdm.auto import tqdm

from ..genes.gene_table import GeneTable
from .sources import Source, open_source

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
ROWS_PER_BATCH = 2048  # rows of an Arrow record batch, and of a block read from a source
ROWS_PER_SHARD = 65_536
OWN_COLUMNS = ("genes", "counts", "obs_name")
_OTHER_FILES = ("genes.parquet", "manifest.json", "dataset_info.json", "state.json")
COUNT_TYPES = ("uint8", "uint16", "uint32", "float32")  # from narrow to wide


def write_store(
    path: Path,
    sources: list[AnnData | str | Path],
    *,
    obs: list[str],
    layer: str | None,
    fractional: bool,
    overwrite: bool,
    rows_per_batch: int,
    rows_per_shard: int,
) -> None:
    """Write a store; parameters and errors are those of `CellStore.build`."""
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} exists. Open it with CellStore({str(path)!r}), or pass overwrite=True.")
    if path.exists() and not (path / "manifest.json").exists():
        raise FileExistsError(f"{path} exists and is not a store; it is left as it is. Choose another path.")
    if path.exists():
        manifest = json.loads((path / "manifest.json").read_text())
        known = {shard["file"] for shard in manifest["shards"]} | set(_OTHER_FILES)
        foreign = sorted(file.name for file in path.iterdir() if file.name not in known)
        if foreign:
            raise FileExistsError(
                f"{path} holds more than a store ({', '.join(foreign[:3])}); it is left as it is. Move these away."
            )
    opened = [open_source(source, layer, fractional) for source in sources]
    if not opened:
        raise ValueError("No sources: give at least one AnnData or file.")
    genes = GeneTable.union([source.genes for source in opened])
    if not len(genes):
        raise ValueError(f"{opened[0].name} has no genes.")
    columns, categories = _unite_obs(opened, obs)

    building = path.with_name(f".{path.name}.building")
    plan = {
        "format_version": FORMAT_VERSION,
        "sources": [source.key for source in opened],
        "counts_in": [source.counts_in for source in opened],
        "obs": obs,
        # An AnnData in memory may have changed, and with it the numbers of genes and labels in the other sources.
        "genes": hashlib.sha256("\n".join(genes.gene_ids).encode()).hexdigest(),
        "categories": categories,
        "rows": [rows_per_batch, rows_per_shard],
        "fractional": fractional,
    }
    _prepare(building, plan)
    features = _features(columns, categories, gene_type(len(genes)))
    records = []
    with tqdm(total=sum(source.shape[0] for source in opened), desc="build", unit="cell", disable=None) as bar:
        for i, source in enumerate(opened):
            record = building / f"source-{i:05d}.json"
            if source.key is not None and record.exists():
                records.append(json.loads(record.read_text()))
                bar.update(source.shape[0])
                continue
            writer = _SourceWriter(building, i, features, rows_per_batch, rows_per_shard)
            records.append(writer.write(source, genes, columns[i], bar))
            _write_json(record, records[-1])

    _finish(building, features, genes, records, categories)
    old = path.with_name(f".{path.name}.old")
    if path.exists():
        shutil.rmtree(old, ignore_errors=True)
        path.rename(old)
    building.rename(path)
    shutil.rmtree(old, ignore_errors=True)


class _SourceWriter:
    """Writes the cells of one source to Arrow stream files, in the narrowest count type met so far."""

    def __init__(self, folder: Path, number: int, features, rows_per_batch: int, rows_per_shard: int):
        self.folder = folder
        self.number = number
        self.features = features
        self.rows_per_batch = rows_per_batch
        self.rows_per_shard = rows_per_shard
        self.shards: list[dict] = []
        self.count_type = COUNT_TYPES[0]
        self.writer: pa.ipc.RecordBatchStreamWriter | None = None

    def write(self, source: Source, genes: GeneTable, obs: dict[str, np.ndarray], bar: tqdm) -> dict:
        """Write all blocks; return the record that the manifest keeps of the source."""
        rows = pd.Index(genes.gene_ids).get_indexer(source.genes.gene_ids)
        n_duplicated = len(rows) - len(np.unique(rows))
        if n_duplicated:
            logger.warning(f"{source.name}: {n_duplicated} columns repeat a gene id; their counts are summed.")
        names = source.obs.index.astype(str).to_numpy(dtype=object)
        row_type = gene_type(len(genes))
        start = n_counts = n_empty = 0
        try:
            for block in source.blocks(self.rows_per_batch):
                block = _align(block, rows, len(genes))
                stop = start + block.shape[0]
                needed = _count_type(block.data, source.name)
                self._make_room(needed)
                offsets = pa.array(block.indptr.astype(np.int32))
                arrays = [
                    pa.ListArray.from_arrays(offsets, pa.array(block.indices.astype(row_type))),
                    pa.ListArray.from_arrays(offsets, pa.array(block.data.astype(self.count_type))),
                    pa.array(names[start:stop], pa.string()),
                    *(
                        pa.array(values[start:stop], self._schema().field(name).type, from_pandas=True)
                        for name, values in obs.items()
                    ),
                ]
                self.writer.write_batch(pa.record_batch(arrays, schema=self._schema()))
                self.shards[-1]["rows"] += block.shape[0]
                n_counts += block.nnz
                n_empty += int((np.diff(block.indptr) == 0).sum())
                start = stop
                bar.update(block.shape[0])
        finally:
            self._close()
        return {
            "name": Path(source.name).name,
            "counts_in": source.counts_in,
            "n_cells": source.shape[0],
            "n_columns": source.shape[1],
            "n_counts": n_counts,
            "n_empty": n_empty,
            "shards": self.shards,
        }

    def _schema(self) -> pa.Schema:
        return _arrow_schema(self.features, self.count_type)

    def _make_room(self, needed: str) -> None:
        """Open a new shard at the first block, when the last is full, or when counts outgrow its type."""
        wider = COUNT_TYPES.index(needed) > COUNT_TYPES.index(self.count_type)
        if wider:
            self.count_type = needed
        if not self.shards or wider or self.shards[-1]["rows"] >= self.rows_per_shard:
            self._close()
            file = f"source-{self.number:05d}-{len(self.shards):05d}.arrow"
            self.shards.append({"file": file, "rows": 0, "count_type": self.count_type})
            self.writer = pa.ipc.new_stream(str(self.folder / file), self._schema())

    def _close(self) -> None:
        if self.writer is not None:
            self.writer.close()
            self.writer = None


def _prepare(building: Path, plan: dict) -> None:
    """Make the folder of a build, or keep that of an interrupted one with the same plan."""
    plan_file = building / "plan.json"
    # Shards have their final names: the build was stopped in its last phase. Cells that came from memory may have
    # changed since, and are not told apart there.
    stale = None in plan["sources"] and any(building.glob("data-*"))
    if plan_file.exists() and json.loads(plan_file.read_text()) == plan and not stale:
        return
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(parents=True)
    _write_json(plan_file, plan)


def _finish(building: Path, features, genes: GeneTable, records: list[dict], categories: dict) -> None:
    """Give all shards one count type and their final names, and write what makes the folder a store."""
    shards = [shard for record in records for shard in record["shards"]]
    widest = max((shard["count_type"] for shard in shards), key=COUNT_TYPES.index, default=COUNT_TYPES[0])
    schema = _arrow_schema(features, widest)
    for i, shard in enumerate(shards):
        final = building / f"data-{i:05d}-of-{len(shards):05d}.arrow"
        # A build stopped while it was here goes on here: a shard that has its final name is done.
        if not final.exists():
            if shard["count_type"] != widest:
                _widen(building / shard["file"], schema)
            (building / shard["file"]).rename(final)
        shard.update(file=final.name, bytes=final.stat().st_size, sha256=sha256(final))
    for shard in shards:
        shard.pop("count_type")

    table = building / "genes.parquet"
    genes.to_parquet(table)
    fingerprint = hashlib.sha256("".join(shard["sha256"] for shard in shards).encode()).hexdigest()[:16]
    _write_dataset_files(building, features, widest, [shard["file"] for shard in shards], fingerprint)
    for leftover in [*building.glob("source-*"), building / "plan.json"]:
        leftover.unlink()
    _write_json(
        building / "manifest.json",
        {
            "format_version": FORMAT_VERSION,
            "n_cells": sum(record["n_cells"] for record in records),
            "n_genes": len(genes),
            "n_counts": sum(record["n_counts"] for record in records),
            "count_type": widest,
            "obs": [name for name in features if name not in OWN_COLUMNS],
            "categories": categories,
            "sources": [{k: v for k, v in record.items() if k != "shards"} for record in records],
            "shards": shards,
            "gene_table": {"file": table.name, "bytes": table.stat().st_size, "sha256": sha256(table)},
            "complete": True,
        },
    )


def _align(block: sparse.csr_matrix, rows: np.ndarray, n_genes: int) -> sparse.csr_matrix:
    """Rename the columns of a block to rows of the gene table; ascending, repeated ones summed."""
    # Sums of narrow integers must not wrap.
    data = block.data.astype(np.int64) if block.data.dtype.kind in "iub" else block.data.astype(np.float64)
    aligned = sparse.csr_matrix((data, rows[block.indices], block.indptr.copy()), shape=(block.shape[0], n_genes))
    aligned.sum_duplicates()
    return aligned


def _count_type(counts: np.ndarray, name: str) -> str:
    """Name the narrowest type that holds counts (whole numbers exactly, fractions to float32's precision)."""
    largest = counts.max(initial=0)
    if counts.dtype.kind == "f" and (counts != np.rint(counts)).any():
        if largest > np.finfo(np.float32).max:
            raise ValueError(f"{name}: the value {largest:g} does not fit float32.")
        return "float32"
    for count_type in COUNT_TYPES[:-1]:
        if largest <= np.iinfo(count_type).max:
            return count_type
    raise ValueError(f"{name}: the count {largest:g} does not fit 32 bits.")


def gene_type(n_genes: int) -> np.dtype:
    """Narrowest type of the row numbers of a gene table."""
    return np.dtype(np.uint16 if n_genes <= 1 << 16 else np.uint32)


def _unite_obs(sources: list[Source], names: list[str]) -> tuple[list[dict[str, np.ndarray]], dict[str, list[str]]]:
    """Values of the chosen columns, a source each, and the values of the categorical ones over all sources."""
    clash = set(names) & set(OWN_COLUMNS)
    if clash:
        raise ValueError(f"obs column {', '.join(sorted(clash))}: the store uses this name; rename the column.")
    columns: list[dict[str, np.ndarray]] = [{} for _ in sources]
    categories: dict[str, list[str]] = {}
    for name in names:
        series = []
        for source in sources:
            if name not in source.obs:
                raise ValueError(
                    f"{source.name} has no obs column {name!r}; it has {', '.join(map(str, source.obs.columns))}."
                )
            series.append(source.obs[name])
        if _are_labels(series):
            labels = [values.astype("category").cat.rename_categories(str) for values in series]
            union = list(dict.fromkeys(value for label in labels for value in label.cat.categories))
            categories[name] = union
            for column, label in zip(columns, labels, strict=True):
                codes = pd.Index(union, dtype=object).get_indexer(label.astype(object))
                column[name] = np.where(codes < 0, np.nan, codes)  # a missing label is null in the store
            continue
        types = {getattr(values.dtype, "kind", "O") for values in series}
        if len(types) > 1:
            raise ValueError(
                f"obs column {name!r} has other types in other sources: "
                f"{', '.join(sorted({str(values.dtype) for values in series}))}. Convert them to one."
            )
        for column, values in zip(columns, series, strict=True):
            column[name] = values.to_numpy()
    return columns, categories


def _are_labels(series: list[pd.Series]) -> bool:
    """Whether a column is of labels: categorical, or strings that repeat (as anndata decides when it writes)."""
    categorical = [isinstance(values.dtype, pd.CategoricalDtype) for values in series]
    strings = [pd.api.types.infer_dtype(values, skipna=True) in ("string", "empty") for values in series]
    if not all(c or s for c, s in zip(categorical, strings, strict=True)):
        return False
    return any(categorical) or pd.concat(series).nunique() < sum(map(len, series))


def _features(columns: list[dict[str, np.ndarray]], categories: dict[str, list[str]], gene_type: np.dtype):
    from datasets import ClassLabel, Features, List, Value

    features = Features(
        {"genes": List(Value(gene_type.name)), "counts": List(Value("uint8")), "obs_name": Value("string")}
    )
    for name in columns[0]:
        if name in categories:
            features[name] = ClassLabel(names=categories[name])
        else:
            values = np.concatenate([column[name] for column in columns])
            features[name] = Value(str(pa.array(values, from_pandas=True).type).replace("double", "float64"))
    return features


def _with_count_type(features, count_type: str):
    from datasets import List, Value

    features = features.copy()
    features["counts"] = List(Value(count_type))
    return features


def _arrow_schema(features, count_type: str) -> pa.Schema:
    return _with_count_type(features, count_type).arrow_schema


def _widen(file: Path, schema: pa.Schema) -> None:
    """Write a shard anew with wider counts, one record batch at a time."""
    wide = file.with_suffix(".wide")
    with pa.memory_map(str(file)) as source, pa.ipc.open_stream(source) as reader:
        with pa.ipc.new_stream(str(wide), schema) as writer:
            for batch in reader:
                writer.write_batch(pa.record_batch(batch.columns, batch.schema.remove_metadata()).cast(schema))
    wide.replace(file)


def _write_dataset_files(folder: Path, features, count_type: str, files: list[str], fingerprint: str) -> None:
    """Write the two files by which `datasets.load_from_disk` knows a folder of Arrow streams."""
    from datasets import DatasetInfo

    DatasetInfo(features=_with_count_type(features, count_type)).write_to_directory(str(folder))
    _write_json(
        folder / "state.json",
        {
            "_data_files": [{"filename": file} for file in files],
            "_fingerprint": fingerprint,
            "_format_columns": None,
            "_format_kwargs": {},
            "_format_type": None,
            "_output_all_columns": False,
            "_split": None,
        },
    )


def _write_json(path: Path, value) -> None:
    """Write a JSON file whole or not at all."""
    part = path.with_name(path.name + ".part")
    with open(part, "w", encoding="utf-8") as file:
        json.dump(value, file, indent=1, ensure_ascii=False)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def sha256(path: Path) -> str:
    """Checksum of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
