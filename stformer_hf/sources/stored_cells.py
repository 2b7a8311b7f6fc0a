"""A `CellStore` as a source of counts."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import pandas as pd
import pyarrow as pa
from scipy import sparse

from ..genes.gene_table import GeneTable
from .matrices import Matrix
from .registry import Layer


class StoredCells(Protocol):
    """The part of `CellStore`'s interface by which it is read as a source."""

    path: Any  # Path, or RemoteFolder
    manifest: dict[str, Any]
    genes: GeneTable

    @property
    def obs(self) -> pd.DataFrame:
        """Obs columns of the cells."""

    @property
    def cell_ids(self) -> np.ndarray:
        """Row number of each cell in the whole store, int64 array (n_cells,)."""

    @property
    def is_selection(self) -> bool:
        """Whether it holds a selection of the cells of the store at its path."""

    def obs_table(self, names: Sequence[str]) -> pa.Table:
        """Return obs columns as they are stored."""

    def __len__(self) -> int: ...

    def rows(self, index: Any) -> sparse.csr_array:
        """Return the counts of cells, (n_cells, n_genes)."""

    def neighbors(self, index: Any) -> sparse.csr_array:
        """Return the weights of the neighbours of cells, (n_cells, len(self))."""


def store_layers(store: StoredCells) -> list[Layer]:
    """Return the layers of a `CellStore`, or of a selection of one."""
    counts = StoreMatrix(store)
    return [Layer("X", counts, lambda: store.genes, lambda: store.obs, lambda key: StoreMatrix(store, True))]


class StoreMatrix(Matrix):
    """The counts of a `CellStore`, or the weights of the neighbours of its cells."""

    def __init__(self, store: StoredCells, of_neighbors: bool = False):
        self._store, self._read = store, store.neighbors if of_neighbors else store.rows
        self.shape = (len(store), len(store) if of_neighbors else len(store.genes))

    @property
    def key(self) -> dict[str, Any]:
        """Path and checksums of the store, and of the selection, by which an interrupted build recognises it."""
        shards = self._store.manifest["shards"]
        key = {"path": str(self._store.path), "checksums": [shard["checksum"] for shard in shards]}
        if self._store.is_selection:
            key["cells"] = hashlib.sha256(self._store.cell_ids.astype("<i8").tobytes()).hexdigest()
        return key

    @property
    def obs_names(self) -> pa.ChunkedArray:
        """Names of the cells as Arrow strings (n_cells,), mapped from the store's files."""
        return self._store.obs_table(["obs_name"])["obs_name"]

    def rows(self, start: int, stop: int) -> sparse.csr_matrix:
        """Read a range of rows."""
        return sparse.csr_matrix(self._read(slice(start, stop)))

    def sample(self) -> Iterator[np.ndarray]:
        """Return nothing, since the counts of a store were checked when it was built."""
        yield np.ones(1, np.uint8)
