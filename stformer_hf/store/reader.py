"""StoreReader: the cells of a store, read straight from its Arrow buffers."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import pandas as pd
import pyarrow as pa
from scipy import sparse
from tqdm.auto import tqdm

from ..sources.formats import local_path, remote_folder
from .cell_batch import Cell, CellBatch, names_key
from .coverage import coverage
from .neighborhoods import sum_groups
from .opening import open_files, read_manifest
from .remote_files import RemoteFolder
from .row_numbers import check_mask, row_numbers
from .shards import checksum

if TYPE_CHECKING:
    from datasets import Dataset, Features


class StoreReader:
    """An open store, or a selection of its cells; `CellStore` describes it, and makes stores.

    It has all that other modules need of a store to read it, as `sources.stored_cells.StoredCells` lists it.
    """

    def __init__(self, path: str | Path | RemoteFolder):
        if not isinstance(path, RemoteFolder):
            address = remote_folder(path)
            path = Path(os.path.abspath(local_path(path))) if address is None else RemoteFolder(address)
        self.path: Any = path
        self.manifest: dict[str, Any] = read_manifest(self.path)
        self._index: np.ndarray | None = None  # for a selection: its rows in the whole store
        self._gives_neighborhoods = False
        self.genes, self._rows = open_files(self.path, self.manifest)

    def __getstate__(self) -> dict:
        kept = ("path", "manifest", "_index", "_gives_neighborhoods")
        return {**{name: getattr(self, name) for name in kept}, "versions": getattr(self.path, "versions", None)}

    def __setstate__(self, state: dict) -> None:
        versions = state.pop("versions")
        self.__dict__.update(state)
        if versions is not None:
            self.path.versions = versions
        else:
            self.must_be_unchanged()  # else cells of another store could be read in place of the selected ones
        self.genes, self._rows = open_files(self.path, self.manifest)

    def __len__(self) -> int:
        return len(self._rows) if self._index is None else len(self._index)

    def __repr__(self) -> str:
        columns = ", ".join(self.manifest["obs"]) or "none"
        cells = f"{len(self):,} cells" if self._index is None else f"{len(self):,} of {len(self._rows):,} cells"
        return f"{type(self).__name__}({str(self.path)!r}: {cells}, {len(self.genes):,} genes, obs: {columns})"

    # ------------------------------------------------------------------ contents

    @property
    def gene_ids(self) -> np.ndarray:
        """Gene ids of the gene table, object array (n_genes,)."""
        return self.genes.gene_ids

    @property
    def is_remote(self) -> bool:
        """Whether its files are on a server."""
        return isinstance(self.path, RemoteFolder)

    @property
    def is_selection(self) -> bool:
        """Whether it holds a selection of the cells of the store at its path."""
        return self._index is not None

    @property
    def is_compact(self) -> bool:
        """Whether its rows are compact, as `build(compact=True)` writes them."""
        return self.manifest.get("compact", False)

    @property
    def cell_ids(self) -> np.ndarray:
        """Row number of each cell in the whole store, int64 array (n,); batches hold it as `cell_id`."""
        return self._row_numbers(slice(None))

    @property
    def categories(self) -> dict[str, list[str]]:
        """Categories of each categorical obs column, in the order of their codes."""
        return self.manifest["categories"]

    @property
    def coverage(self) -> pd.DataFrame:
        """How the columns of each source were matched to genes, and which share of the counts they hold."""
        return coverage(self.manifest["sources"])

    @cached_property
    def lengths(self) -> np.ndarray:
        """Number of expressed genes per cell, int64 array (n,); read from the list offsets alone."""
        lengths = self._rows.lengths()
        return lengths if self._index is None else lengths[self._index]

    @property
    def obs_names(self) -> np.ndarray:
        """Names of the cells, object array (n,)."""
        names = self._rows.column("obs_name")
        return names if self._index is None else names[self._index]

    @cached_property
    def obs(self) -> pd.DataFrame:
        """The chosen obs columns, one row per cell, indexed by cell name."""
        columns = {}
        for name, values in self._columns.items():
            if name in self.categories:
                values = pd.Categorical.from_codes(values, self.categories[name])
            columns[name] = values
        obs = pd.DataFrame(columns, index=pd.Index(self._rows.column("obs_name"), dtype=object))
        return obs if self._index is None else obs.iloc[self._index]

    @cached_property
    def dataset(self) -> Dataset:
        """The store as a `datasets.Dataset`, memory-mapped."""
        from datasets import load_from_disk

        self._must_be_local("opened as a datasets.Dataset")
        self.must_be_unchanged()
        dataset = load_from_disk(str(self.path))
        return dataset if self._index is None else dataset.select(self._index)

    @cached_property
    def features(self) -> Features:
        """Columns of the rows as `datasets.Features`."""
        from datasets import DatasetInfo

        features = DatasetInfo.from_dict(json.loads((self.path / "dataset_info.json").read_bytes())).features
        assert features is not None  # the writer states them
        return features

    def obs_table(self, names: Sequence[str]) -> pa.Table:
        """Return obs columns as they are stored, one row per cell: categorical ones as codes."""
        chunks = {name: self._rows.chunks(name) for name in names}
        table = pa.table({name: pa.chunked_array(of, self.features[name].pa_type) for name, of in chunks.items()})
        return table if self._index is None else table.take(pa.array(self._index))

    @cached_property
    def _columns(self) -> dict[str, np.ndarray]:
        """Obs columns of the whole store; categorical ones as codes of few bytes, -1 where missing."""
        n_classes = {name: len(classes) for name, classes in self.categories.items()}
        return {
            name: self._rows.codes(name, n_classes[name]) if name in n_classes else self._rows.column(name)
            for name in self.manifest["obs"]
        }

    # ------------------------------------------------------------------ reading

    def rows(self, index: Any) -> sparse.csr_array:
        """Read the counts of cells.

        Parameters
        ----------
        index : int, slice, sequence of int, or boolean mask (n,)
            Row numbers, in any order, with repeats; negative ones count from the end.

        Returns
        -------
        csr_array (n_rows, n_genes)
            Counts in the requested order and in the store's count type; a copy.

        Raises
        ------
        IndexError
            A row number is outside the store, or a mask has another length.
        """
        return _csr(*self._gather(self._row_numbers(index)), len(self.genes))

    def neighbors(self, index: Any) -> sparse.csr_array:
        """Read the neighbours of cells.

        Parameters
        ----------
        index : int, slice, sequence of int, or boolean mask (n,)
            Row numbers, as for `rows`.

        Returns
        -------
        csr_array (n_rows, n_cells)
            Weights, float32; a stored weight of 0 is a neighbour too. Neighbours outside the selection, or outside a
            part that has not been joined yet, are left out.

        Raises
        ------
        ValueError
            The store was built without neighbours.
        """
        self._must_have_neighbors()
        indptr, numbers, weights = self._rows.neighbors(self._row_numbers(index))
        inside = self._holds(numbers)
        indptr, numbers = np.concatenate([[0], np.cumsum(inside)])[indptr], numbers[inside]
        if self._index is not None:
            position = np.empty(len(self._rows), np.int64)
            position[self._index] = np.arange(len(self._index))
            numbers = position[numbers]
        return _csr(indptr, numbers, weights[inside], len(self))

    def _holds(self, numbers: np.ndarray) -> np.ndarray:
        """Return which row numbers of the whole store belong to cells held here, bool array (n,)."""
        inside = (numbers >= 0) & (numbers < len(self._rows))
        if self._index is not None:
            inside[inside] = self._selected[numbers[inside]]
        return inside

    @cached_property
    def _selected(self) -> np.ndarray:
        selected = np.zeros(len(self._rows), bool)
        selected[self._index] = True
        return selected

    def __getitem__(self, row: int) -> Cell:
        """Return one cell as a mapping of `genes`, `counts`, `cell_id`, `obs_name` and its obs values."""
        if not isinstance(row, (int, np.integer)):
            raise TypeError(f"A store is indexed by a row number, got {type(row).__name__}; use rows(index) for many.")
        row = int(row)
        batch = self.__getitems__([row])
        cell = {"genes": batch.genes, "counts": batch.counts, "cell_id": int(batch.cell_id[0])}
        obs = {name: self.obs[name].iat[row] for name in self.obs}
        return Cell({**cell, "obs_name": self.obs.index[row], **obs}, batch)

    def __getitems__(self, index: Sequence[int] | np.ndarray) -> CellBatch:
        """Return a batch of cells for a collator (torch's `DataLoader` calls this with the row numbers of a batch)."""
        rows = self._row_numbers(index)
        indptr, genes, counts = self._gather(rows)
        obs = {name: values[rows] for name, values in self._columns.items()}
        return CellBatch(
            indptr=indptr,
            genes=genes,
            counts=counts,
            cell_id=rows,
            obs={name: of.astype(np.int64) if name in self.categories else of for name, of in obs.items()},
            categories=self.categories,
            gene_ids=self.gene_ids,
            symbols=self.genes.symbols,
            path=self.path,
            names_key=self._names_key,
            neighborhood=self._neighborhoods(rows) if self._gives_neighborhoods else None,
        )

    def _neighborhoods(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Sum the counts of the neighbours of each row of the whole store; see `CellBatch.neighborhood`."""
        indptr, numbers, _ = self._rows.neighbors(rows)
        cells = np.repeat(np.arange(len(rows)), np.diff(indptr))
        others = self._holds(numbers) & (numbers != rows[cells])
        pairs = np.unique(cells[others] * len(self._rows) + numbers[others])  # each neighbour once
        cells, numbers = np.divmod(pairs, max(len(self._rows), 1))
        return sum_groups(self._gather, cells.searchsorted(np.arange(len(rows) + 1)), numbers, len(self.genes))

    def _row_numbers(self, index: Any) -> np.ndarray:
        """Convert an index, as `rows` takes it, to row numbers of the whole store."""
        check_mask(index, len(self), lambda: self.obs_names, "store.obs")
        rows = row_numbers(index, len(self), "store")
        return rows if self._index is None else self._index[rows]

    def _gather(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return self._rows.gather(rows, self.manifest["gene_type"], self.manifest["count_type"])

    # ------------------------------------------------------------------ selections

    def select(self, index: Any) -> Self:
        """Return a selection of cells, without copying them.

        Parameters
        ----------
        index : slice, sequence of int, or boolean mask (n,)
            Row numbers, as for `rows`. A mask that is a Series must have the index of `obs`.

        Returns
        -------
        CellStore
            These cells, in this order. They keep their `cell_id` of the whole store, from which masks are drawn.
        """
        return self._like(self._row_numbers(index), self._gives_neighborhoods)

    def with_neighborhoods(self) -> Self:
        """Return the store with each cell's neighbourhood: the summed counts of its neighbours.

        Returns
        -------
        CellStore
            The same cells. Its batches (`__getitems__`, a `DataLoader`), and those of its selections, have
            `CellBatch.neighborhood`, which `GeneTokenizer(neighborhood=True)` needs. Neighbours outside a selection
            are left out, so held-out cells are not seen.

        Raises
        ------
        ValueError
            The store was built without neighbours.
        """
        self._must_have_neighbors()
        return self._like(self._index, True)

    def _like(self, rows: np.ndarray | None, gives_neighborhoods: bool) -> Self:
        other = object.__new__(type(self))
        other.path, other.manifest, other.genes, other._rows = self.path, self.manifest, self.genes, self._rows
        other._index, other._gives_neighborhoods = rows, gives_neighborhoods
        return other

    # ------------------------------------------------------------------ files

    def read_ahead(self, index: Any) -> None:
        """Ask the system to read rows from the disk, and return at once; does nothing for a remote store.

        Parameters
        ----------
        index : slice, or array of int or bool
            Rows that will be read soon.
        """
        self._rows.read_ahead(self._row_numbers(index))

    def verify(self) -> None:
        """Check every shard and the gene table against their checksums; remote files are downloaded for this.

        Raises
        ------
        ValueError
            A shard or the gene table is damaged; the message names it.
        """
        files = [self.manifest["gene_table"], *self.manifest["shards"]]
        for shard in tqdm(files, desc="verify", unit="file", disable=None):
            file = self.path / shard["file"]
            found = self.path.checksum(shard["file"]) if self.is_remote else checksum(file)
            if found != shard["checksum"]:
                raise ValueError(f"{file} is damaged: its checksum does not match.")

    def must_be_unchanged(self) -> None:
        """Raise ValueError if the store at the path is no longer the one that was opened."""
        if read_manifest(self.path.now() if self.is_remote else self.path) != self.manifest:
            raise ValueError(f"{self.path} was replaced after this object opened it: open it again.")

    @cached_property
    def _names_key(self) -> str:
        return names_key(self.manifest)

    def _must_have_neighbors(self) -> None:
        if not self.manifest["neighbors"]:
            raise ValueError(
                f"{self.path} was built without neighbours: call spatial_neighbors(adata), then "
                "CellStore.build(…, neighbors='spatial_connectivities')."
            )

    def _must_be_local(self, to_be: str) -> None:
        if self.is_remote:
            raise ValueError(
                f"{self.path} is on a server and cannot be {to_be}: copy it first, "
                f"CellStore({str(self.path)!r}).save('copy')."
            )


def _csr(indptr: np.ndarray, columns: np.ndarray, values: np.ndarray, n_columns: int) -> sparse.csr_array:
    index_type = np.int64 if max(len(columns), n_columns) > np.iinfo(np.int32).max else np.int32
    indices = (values, columns.astype(index_type), indptr.astype(index_type))
    return sparse.csr_array(indices, shape=(len(indptr) - 1, n_columns))
