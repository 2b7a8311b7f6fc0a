"""CellStore: cells on disk as a Hugging Face dataset, read straight from its Arrow buffers."""

from __future__ import annotations

import json
import logging
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
from .store_writer import FORMAT_VERSION, ROWS_PER_BATCH, ROWS_PER_SHARD, gene_type, sha256, write_store

logger = logging.getLogger(__name__)


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
        for shard in [self.manifest["gene_table"], *self.manifest["shards"]]:
            file = self.path / shard["file"]
            if not file.exists() or file.stat().st_size != shard["bytes"]:
                size = file.stat().st_size if file.exists() else 0
                raise ValueError(
                    f"{file} has {size} bytes instead of {shard['bytes']}: it was cut short or replaced. "
                    "Copy the store again, or build it again."
                )
        for shard in self.manifest["shards"]:
            file = self.path / shard["file"]
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
        return gene_type(self.manifest["n_genes"])

    def verify(self) -> None:
        """Compare every shard, and the gene table, with its checksum.

        Raises
        ------
        ValueError
            A shard or the gene table is damaged; the message names it.
        """
        files = [self.manifest["gene_table"], *self.manifest["shards"]]
        for shard in tqdm(files, desc="verify", unit="file", disable=None):
            if sha256(self.path / shard["file"]) != shard["sha256"]:
                raise ValueError(f"{self.path / shard['file']} is damaged: its checksum does not fit.")

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
        write_store(
            Path(path),
            [sources] if isinstance(sources, (AnnData, str, Path)) else list(sources),
            obs=[obs] if isinstance(obs, str) else list(obs or []),
            layer=layer,
            fractional=fractional,
            overwrite=overwrite,
            rows_per_batch=rows_per_batch,
            rows_per_shard=rows_per_shard,
        )
        store = cls(path)
        n_empty = int((store.lengths == 0).sum())
        if n_empty:
            logger.warning(f"{n_empty} of {len(store)} cells have no counts; they are kept, and training skips them.")
        return store


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


__all__ = ["CellBatch", "CellStore"]
