"""Open sources of counts: each has a gene table, obs, and blocks of CSR rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pyarrow as pa
from anndata import AnnData
from scipy import sparse

from ..genes.gene_table import GeneTable
from ..genes.text_files import naming
from ..models.gene_bert.cell_counts import NO_COUNTS, check_counts, choose_counts, warn_of_logarithms
from .formats import find_layers
from .matrices import Matrix
from .registry import Layer
from .soma import is_soma, soma_key
from .stored_cells import StoredCells, StoreMatrix

if TYPE_CHECKING:
    from mudata import MuData
    from spatialdata import SpatialData


@dataclass
class Counts:
    """Counts of a source, and all that any process needs to read and check them.

    Attributes
    ----------
    name : str
        Path of the file, or `AnnData`.
    counts_in : str
        Where the counts are: `X`, `raw`, or the name of a layer.
    matrix : Matrix
        The counts, unchecked; `blocks` checks them.
    fractional : bool
        Whether counts may be fractional.
    """

    name: str
    counts_in: str
    matrix: Matrix
    fractional: bool

    @property
    def shape(self) -> tuple[int, int]:
        """Numbers of cells and columns."""
        return self.matrix.shape

    def blocks(
        self, rows: int, start: int = 0, stop: int | None = None, is_known: bool = False
    ) -> Iterator[sparse.csr_matrix]:
        """Read the counts in order, `rows` cells at a time, from cell `start` to before `stop`; all by default.

        If the first cells hold logarithms, a warning is logged, unless the values `is_known` from an earlier reading.

        Yields
        ------
        csr_matrix (at most rows, n_columns)
            Counts without explicit zeros, one entry per cell and column, columns ascending; whole numbers that were
            stored as floats are unsigned integers.

        Raises
        ------
        ValueError
            Values are not counts.
        """
        stop = self.shape[0] if stop is None else stop
        for first in range(start, stop, rows):
            with naming(self.name):
                block = self.matrix.rows(first, min(first + rows, stop))
            if not block.has_canonical_format:  # a copy, of 64 bits: sums of narrow values would overflow
                block = block.astype(np.float64 if block.dtype.kind == "f" else np.int64)
                block.sum_duplicates()
            values, problem = check_counts(block.data, self.fractional)
            if problem:
                raise ValueError(
                    f"{self.name}: counts are needed, but {self.counts_in} holds {problem} in cells {first} to "
                    f"{first + block.shape[0] - 1}. Name the layer that holds raw counts, as in layer='counts'."
                )
            if self.fractional and not first and not is_known:
                warn_of_logarithms(block.indptr, values, f"{self.name}: {self.counts_in}")
            if values is not block.data:
                block = sparse.csr_matrix((values, block.indices, block.indptr), shape=block.shape)
                block.has_canonical_format = True
            if not values.all():
                block = block.copy()  # it may be a view of the user's matrix
                block.eliminate_zeros()
            yield block


@dataclass
class AlignedCounts(Counts):
    """Counts whose columns are rows of a gene table: `genes`, int array (n_columns,)."""

    genes: np.ndarray


@dataclass
class Source(Counts):
    """Counts of one file, AnnData or store, its genes, and its obs.

    Attributes
    ----------
    genes : GeneTable
        One row per column of the matrix; ids may repeat.
    key : dict or None
        Path, size and time of the file, path and checksums of a store, or address, time and cells of an experiment of
        TileDB-SOMA, and the modality or measurement if there may be several, by which an interrupted build recognises
        it; None for an AnnData.
    is_part : bool
        Whether the matrix holds one of multiple feature types.
    """

    genes: GeneTable
    key: dict[str, Any] | None
    is_part: bool
    _read_obs: Callable[[], pd.DataFrame]
    _open_neighbors: Callable[[str], Matrix] | None

    @cached_property
    def obs(self) -> pd.DataFrame:
        """Table with one row per cell, indexed by cell name; that of a store is read when it is needed."""
        obs = self._read_obs()
        return obs.set_axis(obs.columns.astype(str), axis=1)

    @cached_property
    def obs_names(self) -> pa.Array | pa.ChunkedArray:
        """Names of the cells as Arrow strings (n_cells,), which take a fifth of the memory of Python's."""
        if isinstance(self.matrix, StoreMatrix):
            return self.matrix.obs_names
        return pa.array(self.obs.index.astype(str), pa.string())

    def obs_column(self, name: str) -> pd.Series:
        """Return a column of obs, of which there must be one."""
        if name not in self.obs:
            columns = ", ".join(map(str, self.obs.columns))
            raise ValueError(f"{self.name} has no obs column {name!r}; it has {columns}.")
        if isinstance(self.obs[name], pd.DataFrame):
            raise ValueError(f"{self.name} has two obs columns {name!r}.")
        return self.obs[name]

    def keep_obs(self, columns: Sequence[str]) -> None:
        """Forget all of obs but `obs_names` and some columns, so that many sources can be open at once."""
        kept = {name: self.obs_column(name).reset_index(drop=True) for name in columns}
        self.obs_names  # noqa: B018  (read before the index is forgotten)
        self.obs = pd.DataFrame(kept, index=pd.RangeIndex(self.shape[0]))

    def align(self, genes: np.ndarray) -> AlignedCounts:
        """Return the counts alone, with the row of a gene table for each column, int array (n_columns,)."""
        return AlignedCounts(self.name, self.counts_in, self.matrix, self.fractional, genes)

    def neighbors(self, key: str) -> Matrix:
        """Open a graph of the cells (`obsp[key]`), a matrix (n_cells, n_cells) of weights; it must exist."""
        try:
            if self._open_neighbors is None:
                raise KeyError(key)
            graph = self._open_neighbors(key)
        except KeyError:
            raise ValueError(f"{self.name} has no obsp[{key!r}].") from None
        graph.close()
        if graph.shape != (self.shape[0], self.shape[0]):
            raise ValueError(
                f"{self.name}: obsp[{key!r}] has the shape {graph.shape}, but there are {self.shape[0]} cells."
            )
        return graph


def open_source(
    source: AnnData | MuData | SpatialData | StoredCells | str | Path,
    layer: str | None = None,
    fractional: bool = False,
) -> Source:
    """Open a file, an AnnData or a store, and find its counts.

    Parameters
    ----------
    source : AnnData, MuData, SpatialData, CellStore, Experiment or ExperimentAxisQuery of TileDB-SOMA, str or Path
        An AnnData in memory or backed, or another object; or a file of one of the `registry.FORMATS`.
    layer : str, optional
        Where the counts are: `X`, `raw`, or the name of a layer; for 10x files also a feature type (such as
        `Antibody Capture`) or, if there are multiple, a genome; for MuData and SpatialData also the modality or
        table, as in `prot` or `prot:counts`, see `choose_table`. By default the first of X, raw and the layer
        `counts` that holds counts; with `fractional`, the first that holds whole counts, if one does.
    fractional : bool, default: False
        Whether counts may be fractional (RSEM, SoupX).

    Returns
    -------
    Source
        The source. Its file is closed; reading reopens it.

    Raises
    ------
    ValueError
        There are no counts; the layer does not exist; the file format is not supported; the file is damaged.
    FileNotFoundError
        The file does not exist.
    """
    name, table, layers, layer = find_layers(source, layer)
    with naming(name):
        by_name = {found.name: found for found in layers}
        problems = {name: partial(_probe, found) for name, found in by_name.items()}
        found = by_name[choose_counts(problems, layer, fractional, name + table)]
        key = None
        if isinstance(found.matrix, StoreMatrix):
            key = found.matrix.key
        elif isinstance(source, (str, Path)):
            key = _key(Path(source))
        elif is_soma(source):
            key = soma_key(source)
        if key is not None and table:
            key = {**key, "table": table}  # another modality of the same file may have the same genes
        opened = Source(
            name=name,
            counts_in=found.name,
            genes=found.genes(),
            key=key,
            matrix=found.matrix,
            fractional=fractional,
            is_part=found.whole is not None,
            _read_obs=found.obs,  # not the whole layer, which holds var: many sources may be open
            _open_neighbors=found.neighbors,
        )
        # The names of the cells of a store may take more memory than all that is computed from their counts.
        n_cells = opened.shape[0] if isinstance(found.matrix, StoreMatrix) else len(opened.obs)
        found.matrix.close()
    n_nameless = int((opened.genes.gene_ids == "").sum())
    if n_nameless:
        raise ValueError(f"{name}: {n_nameless} columns have no gene name; remove them, or name them.")
    if opened.shape != (n_cells, len(opened.genes)):
        raise ValueError(
            f"{name} is damaged: {found.name} has the shape {opened.shape}, but there are {n_cells} cells and "
            f"{len(opened.genes)} genes."
        )
    return opened


def _key(path: Path) -> dict[str, Any]:
    stats = [file.stat() for file in (path.rglob("*") if path.is_dir() else [path]) if file.is_file()]
    return {
        "path": str(path.resolve()),
        "bytes": sum(stat.st_size for stat in stats),
        "modified_ns": max(stat.st_mtime_ns for stat in stats),
    }


def _probe(layer: Layer, fractional: bool) -> str | None:
    """Check some values at the beginning, the middle and the end; return what is wrong with them, or None."""
    n_values = 0
    for values in layer.matrix.sample():
        _, problem = check_counts(values, fractional)
        if problem:
            return problem
        n_values += int(np.count_nonzero(values))
    return None if n_values else NO_COUNTS
