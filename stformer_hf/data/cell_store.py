"""CellStore: cells on disk as a Hugging Face dataset, read straight from its Arrow buffers."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

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
COUNT_TYPES = ("uint8", "uint16", "uint32", "float32")  # from narrow to wide


@dataclass
class CellBatch:
    """Rows of a store, as flat arrays: what a collator gets from a `DataLoader` over a `CellStore`.

    Attributes
    ----------
    indptr : int64 array (n + 1,)
        Cell i has the entries `indptr[i]:indptr[i + 1]` of `genes` and `counts`.
    genes : uint16 or uint32 array (nnz,)
        Rows of the gene table, ascending in each cell.
    counts : uint8, uint16, uint32 or float32 array (nnz,)
        Counts, none of them 0.
    cell_id : int64 array (n,)
        Row numbers in the store.
    obs : dict of str to array (n,)
        The obs columns; of categorical ones the codes, -1 where missing.
    categories : dict of str to list of str
        Names of the codes of the categorical columns.
    gene_ids, symbols : object array (n_genes,)
        Of the gene table; the same arrays in every batch of a store.
    """

    indptr: np.ndarray
    genes: np.ndarray
    counts: np.ndarray
    cell_id: np.ndarray
    obs: dict[str, np.ndarray]
    categories: dict[str, list[str]]
    gene_ids: np.ndarray
    symbols: np.ndarray

    def __len__(self) -> int:
        return len(self.cell_id)


class CellStore:
    """Cells on disk: a saved Hugging Face dataset of one row a cell, with a gene table and a manifest beside it.

    `datasets.load_from_disk(path)` opens it without this package: `genes` (row of the gene table, ascending) and
    `counts` (the narrowest type that holds them exactly), then `obs_name` and the chosen obs columns. As a map-style
    torch dataset it gives dictionaries for single rows and a `CellBatch` for many (`__getitems__`).

    Parameters
    ----------
    path : str or Path
        A folder that `CellStore.build` made.

    Raises
    ------
    FileNotFoundError
        There is no store at the path, or its build did not end.
    ValueError
        The store has a newer format, or a shard is cut short.

    Notes
    -----
    Rows are copied out of the memory map: nothing done to them changes the store. Pickling a store (spawned workers)
    passes its path only.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.manifest: dict[str, Any] = _read_manifest(self.path)
        self._open()

    def _open(self) -> None:
        self._genes: list[np.ndarray] = []
        self._counts: list[np.ndarray] = []
        self._offsets: list[np.ndarray] = []
        self._batches: list[pa.RecordBatch] = []
        starts = [0]
        for shard in self.manifest["shards"]:
            file = self.path / shard["file"]
            if not file.exists() or file.stat().st_size != shard["bytes"]:
                size = file.stat().st_size if file.exists() else 0
                raise ValueError(
                    f"Shard {file} has {size} bytes instead of {shard['bytes']}: it was cut short or replaced. "
                    "Copy the store again, or build it again."
                )
            with pa.memory_map(str(file)) as source, pa.ipc.open_stream(source) as reader:
                for batch in reader:
                    genes, counts = batch.column("genes"), batch.column("counts")
                    self._batches.append(batch)
                    self._genes.append(genes.values.to_numpy())
                    self._counts.append(counts.values.to_numpy())
                    self._offsets.append(genes.offsets.to_numpy())
                    starts.append(starts[-1] + batch.num_rows)
        self._starts = np.array(starts, np.int64)

    def __getstate__(self) -> dict:
        return {"path": self.path, "manifest": self.manifest}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._open()

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __repr__(self) -> str:
        columns = ", ".join(self.manifest["obs"]) or "none"
        return f"CellStore({str(self.path)!r}: {len(self):,} cells, {len(self.genes):,} genes, obs: {columns})"

    # ------------------------------------------------------------------ what is in it

    @cached_property
    def genes(self) -> GeneTable:
        """The gene table: row j is the gene that `genes` calls j."""
        return GeneTable.from_parquet(self.path / "genes.parquet")

    @property
    def gene_ids(self) -> np.ndarray:
        """Ids of the gene table, object array (n_genes,)."""
        return self.genes.gene_ids

    @property
    def categories(self) -> dict[str, list[str]]:
        """Values of each categorical obs column, in the order of its codes."""
        return self.manifest["categories"]

    @cached_property
    def lengths(self) -> np.ndarray:
        """Number of expressed genes of each cell, int64 array (n,); from the list offsets alone."""
        return np.concatenate([np.empty(0, np.int64), *(np.diff(offsets) for offsets in self._offsets)])

    @cached_property
    def obs(self) -> pd.DataFrame:
        """The chosen obs columns, one row a cell, indexed by the cells' names."""
        index = pd.Index(self._column("obs_name"), dtype=object)
        columns = {}
        for name in self.manifest["obs"]:
            values = self._columns[name]
            if name in self.categories:
                values = pd.Categorical.from_codes(values, self.categories[name])
            columns[name] = values
        return pd.DataFrame(columns, index=index)

    @cached_property
    def dataset(self):
        """The store as a `datasets.Dataset`, memory-mapped."""
        from datasets import load_from_disk

        return load_from_disk(str(self.path))

    @cached_property
    def _columns(self) -> dict[str, np.ndarray]:
        columns = {}
        for name in self.manifest["obs"]:
            values = self._column(name)
            if name in self.categories:
                values = np.where(pd.isna(values), -1, values).astype(np.int64)
            columns[name] = values
        return columns

    def _column(self, name: str) -> np.ndarray:
        """Read an obs column of all cells; missing values are NaN or None."""
        chunks = [batch.column(name) for batch in self._batches]
        return pa.chunked_array(chunks).to_pandas().to_numpy() if chunks else np.empty(0, object)

    # ------------------------------------------------------------------ rows out

    def rows(self, index) -> sparse.csr_array:
        """Read cells.

        Parameters
        ----------
        index : int, slice, sequence of int, or boolean mask (n,)
            Row numbers, in any order, repeats allowed; negative ones count from the end.

        Returns
        -------
        csr_array (n_rows, n_genes)
            Counts, in the order asked for, in the store's own count type. A copy.

        Raises
        ------
        IndexError
            A row number beyond the store, or a mask of another length.
        """
        rows = self._row_numbers(index)
        indptr, genes, counts = self._gather(rows)
        indices = genes.astype(np.int64 if len(genes) > np.iinfo(np.int32).max else np.int32)
        return sparse.csr_array((counts, indices, indptr.astype(indices.dtype)), shape=(len(rows), len(self.genes)))

    def __getitem__(self, row: int) -> dict[str, Any]:
        """Read one cell: `genes`, `counts`, `cell_id`, `obs_name` and its obs values."""
        if not isinstance(row, (int, np.integer)):
            raise TypeError(f"A store is indexed by a row number, got {type(row).__name__}; for many use rows(index).")
        (number,) = self._row_numbers(int(row))
        _, genes, counts = self._gather(np.array([number]))
        cell = {"genes": genes, "counts": counts, "cell_id": int(number), "obs_name": self.obs.index[number]}
        return {**cell, **self.obs.iloc[number].to_dict()}

    def __getitems__(self, index: Sequence[int]) -> CellBatch:
        """Read many cells for a collator (torch's `DataLoader` calls this with the row numbers of a batch)."""
        rows = self._row_numbers(index)
        indptr, genes, counts = self._gather(rows)
        return CellBatch(
            indptr=indptr,
            genes=genes,
            counts=counts,
            cell_id=rows,
            obs={name: values[rows] for name, values in self._columns.items()},
            categories=self.categories,
            gene_ids=self.gene_ids,
            symbols=self.genes.symbols,
        )

    def _row_numbers(self, index) -> np.ndarray:
        if isinstance(index, slice):
            return np.arange(*index.indices(len(self)), dtype=np.int64)
        rows = np.atleast_1d(np.asarray(index))
        if rows.dtype == bool:
            if len(rows) != len(self):
                raise IndexError(f"The mask has {len(rows)} values, the store {len(self)} cells.")
            return np.flatnonzero(rows)
        if rows.dtype.kind not in "iu" and len(rows):
            raise IndexError(f"Row numbers are integers, got {rows.dtype}.")
        rows = rows.astype(np.int64)
        outside = (rows < -len(self)) | (rows >= len(self))
        if outside.any():
            raise IndexError(f"Row {rows[outside][0]} is outside the store of {len(self)} cells.")
        return np.where(rows < 0, rows + len(self), rows)

    def _gather(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        batches = np.searchsorted(self._starts, rows, side="right") - 1
        genes, counts, lengths = [], [], [0]
        for batch, row in zip(batches.tolist(), (rows - self._starts[batches]).tolist(), strict=True):
            start, stop = self._offsets[batch][row : row + 2].tolist()
            genes.append(self._genes[batch][start:stop])
            counts.append(self._counts[batch][start:stop])
            lengths.append(stop - start)
        if not genes:
            return np.zeros(1, np.int64), np.empty(0, self._gene_type), np.empty(0, self.manifest["count_type"])
        return np.cumsum(lengths, dtype=np.int64), np.concatenate(genes), np.concatenate(counts)

    @property
    def _gene_type(self) -> np.dtype:
        return _gene_type(self.manifest["n_genes"])

    def verify(self) -> None:
        """Compare every shard with its checksum.

        Raises
        ------
        ValueError
            A shard is damaged; the message names it.
        """
        for shard in tqdm(self.manifest["shards"], desc="verify", unit="shard", disable=None):
            if _sha256(self.path / shard["file"]) != shard["sha256"]:
                raise ValueError(f"Shard {self.path / shard['file']} is damaged: its checksum does not fit.")

    # ------------------------------------------------------------------ building

    @classmethod
    def build(
        cls,
        path: str | Path,
        sources: AnnData | str | Path | Iterable[AnnData | str | Path],
        *,
        obs: Sequence[str] | None = None,
        layer: str | None = None,
        fractional: bool = False,
        overwrite: bool = False,
        rows_per_batch: int = ROWS_PER_BATCH,
        rows_per_shard: int = ROWS_PER_SHARD,
    ) -> CellStore:
        """Write a store from files and AnnData objects, block by block.

        The cells keep the order of the sources; the genes are united by id. Everything is written under
        `.<name>.building` beside the path and renamed when whole. A build that was stopped goes on with the first
        file that was not done, if it is called again with the same sources and settings.

        Parameters
        ----------
        path : str or Path
            Folder to make.
        sources : AnnData, str, Path, or several of them
            `.h5ad` files (X by rows, sparse or dense) and AnnData objects.
        obs : sequence of str, optional
            Columns of obs to keep. Categorical and repeated string columns become class labels.
        layer : str, optional
            Where the counts are (`X`, `raw` or a layer), in every source. By default the first of X, raw and the
            layer `counts` that holds counts.
        fractional : bool, default: False
            Allow fractions (RSEM, SoupX); they are stored as float32.
        overwrite : bool, default: False
            Replace a store at the path, once the new one is whole.
        rows_per_batch, rows_per_shard : int
            Cells of an Arrow record batch (and of a block in memory), and of a file.

        Returns
        -------
        CellStore

        Raises
        ------
        FileExistsError
            There is something at the path, and not `overwrite`.
        ValueError
            No sources; values that are not counts; a missing obs column, or one whose types do not agree.
        """
        path = Path(path)
        if path.exists() and not overwrite:
            raise FileExistsError(f"{path} exists. Open it with CellStore({str(path)!r}), or pass overwrite=True.")
        if path.exists() and not (path / "manifest.json").exists():
            raise FileExistsError(f"{path} exists and is not a store; it is left as it is. Choose another path.")
        if isinstance(sources, (AnnData, str, Path)):
            sources = [sources]
        opened = [open_source(source, layer, fractional) for source in sources]
        if not opened:
            raise ValueError("No sources: give at least one AnnData or file.")
        genes = GeneTable.union([source.genes for source in opened])
        if not len(genes):
            raise ValueError(f"{opened[0].name} has no genes.")
        columns, categories = _unite_obs(opened, list(obs or []))

        building = path.with_name(f".{path.name}.building")
        plan = {
            "format_version": FORMAT_VERSION,
            "sources": [source.key for source in opened],
            "counts_in": [source.counts_in for source in opened],
            "obs": list(obs or []),
            "rows": [rows_per_batch, rows_per_shard],
            "fractional": fractional,
        }
        _prepare(building, plan)
        features = _features(columns, categories, _gene_type(len(genes)))
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
        if path.exists():
            old = path.with_name(f".{path.name}.old")
            shutil.rmtree(old, ignore_errors=True)
            path.rename(old)
            building.rename(path)
            shutil.rmtree(old)
        else:
            building.rename(path)
        store = cls(path)
        n_empty = sum(record["n_empty"] for record in records)
        if n_empty:
            logger.warning(f"{n_empty} of {len(store)} cells have no counts; they are kept, and training skips them.")
        return store


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
        gene_type = _gene_type(len(genes))
        start = n_counts = n_empty = 0
        try:
            for block in source.blocks(self.rows_per_batch):
                block = _align(block, rows, len(genes))
                stop = start + block.shape[0]
                needed = _count_type(block.data, source.name)
                self._make_room(needed)
                offsets = pa.array(block.indptr.astype(np.int32))
                arrays = [
                    pa.ListArray.from_arrays(offsets, pa.array(block.indices.astype(gene_type))),
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
    if plan_file.exists() and json.loads(plan_file.read_text()) == plan:
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
        shard.update(file=final.name, bytes=final.stat().st_size, sha256=_sha256(final))
    for shard in shards:
        shard.pop("count_type")

    genes.to_parquet(building / "genes.parquet")
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


def _gene_type(n_genes: int) -> np.dtype:
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


def _read_manifest(path: Path) -> dict:
    file = path / "manifest.json"
    if not file.exists():
        if path.with_name(f".{path.name}.building").exists():
            raise FileNotFoundError(
                f"{path} is not whole: its build was stopped. Call CellStore.build again; it goes on where it was."
            )
        raise FileNotFoundError(f"There is no CellStore at {path}; make one with CellStore.build.")
    manifest = json.loads(file.read_text())
    if manifest["format_version"] > FORMAT_VERSION:
        raise ValueError(
            f"{path} has store format {manifest['format_version']}; this version reads up to {FORMAT_VERSION}. "
            "Update stformer_hf."
        )
    return manifest


def _write_json(path: Path, value) -> None:
    """Write a JSON file whole or not at all."""
    part = path.with_name(path.name + ".part")
    with open(part, "w", encoding="utf-8") as file:
        json.dump(value, file, indent=1, ensure_ascii=False)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


__all__ = ["CellBatch", "CellStore"]
