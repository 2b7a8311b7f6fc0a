"""CellStore: cells on disk as a Hugging Face dataset, read straight from its Arrow buffers."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from anndata import AnnData
from scipy import sparse
from tqdm.auto import tqdm

from ..genes.gene_table import GeneTable
from ..sources.formats import Layer, is_source, reads, store_layers
from ..sources.same_cells import find_twins_of_store, join_groups
from .arrow_rows import ArrowRows
from .cell_batch import Cell, CellBatch
from .join import join_stores
from .neighborhoods import sum_groups
from .replacing import building_of, recover
from .shards import checksum
from .token_writer import ROWS_PER_SHARD as TOKEN_ROWS_PER_SHARD
from .token_writer import write_tokens
from .writer import FORMAT_VERSION, ROWS_PER_BATCH, ROWS_PER_SHARD, BuildSettings, coverage, write_store

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

_MOST_SOURCES_PRINTED = 20


class CellStore:
    """Cells on disk: a saved Hugging Face dataset of one row a cell, with a gene table and a manifest beside it.

    `datasets.load_from_disk(path)` opens it without this package: `genes` (row of the gene table, ascending) and
    `counts` (the narrowest type that holds them exactly), then `obs_name` and the chosen obs columns. As a map-style
    torch dataset it gives dictionaries for single rows and a `CellBatch` for many (`__getitems__`).

    Attributes
    ----------
    path : Path
    genes : GeneTable
        Row j is the gene that the column `genes` calls j.
    manifest : dict
        Sources, shards, types and checksums, as `manifest.json` holds them.

    Parameters
    ----------
    path : str or Path
        A folder that `CellStore.build` made.

    Raises
    ------
    FileNotFoundError
        There is no store at the path, or its build did not end.
    ValueError
        The store has another format, or a shard is cut short.

    Notes
    -----
    Rows are copied out of the memory map: nothing done to them changes the store. Pickling a store (spawned workers)
    passes its path, and of a selection the row numbers.
    """

    def __init__(self, path: str | Path):
        self.path = Path(os.path.abspath(path))
        self.manifest: dict[str, Any] = _read_manifest(self.path)
        self._index: np.ndarray | None = None  # of a selection: its rows in the whole store
        self._gives_neighborhoods = False
        self._open()

    def _open(self) -> None:
        for shard in [self.manifest["gene_table"], *self.manifest["shards"]]:
            file = self.path / shard["file"]
            if not file.exists() or file.stat().st_size != shard["bytes"]:
                size = file.stat().st_size if file.exists() else 0
                raise ValueError(
                    f"{file} has {size} bytes instead of {shard['bytes']}: it was cut short or replaced. "
                    "Copy the store again, or build it again."
                )
        shards = self.manifest["shards"]
        # Read now: a store that is replaced while it is open would give its old rows new names.
        try:
            self.genes = GeneTable.from_parquet(self.path / "genes.parquet")
        except (OSError, ValueError) as error:  # Arrow's errors are of these
            raise ValueError(f"{self.path / 'genes.parquet'} is damaged: {error}. Copy the store again.") from error
        self._rows = ArrowRows(
            [self.path / shard["file"] for shard in shards], [shard["neighbor_shift"] for shard in shards]
        )

    def __getstate__(self) -> dict:
        kept = ("path", "manifest", "_index", "_gives_neighborhoods")
        return {name: getattr(self, name) for name in kept}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._open()

    def __len__(self) -> int:
        return len(self._rows) if self._index is None else len(self._index)

    def __repr__(self) -> str:
        columns = ", ".join(self.manifest["obs"]) or "none"
        cells = f"{len(self):,} cells" if self._index is None else f"{len(self):,} of {len(self._rows):,} cells"
        return f"CellStore({str(self.path)!r}: {cells}, {len(self.genes):,} genes, obs: {columns})"

    # ------------------------------------------------------------------ what is in it

    @property
    def gene_ids(self) -> np.ndarray:
        """Ids of the gene table, object array (n_genes,)."""
        return self.genes.gene_ids

    @property
    def is_selection(self) -> bool:
        """Whether it has some of the cells of the store at its path."""
        return self._index is not None

    @property
    def cell_ids(self) -> np.ndarray:
        """Row number of each cell in the whole store, int64 array (n,): the `cell_id` of its batches."""
        return self._row_numbers(slice(None))

    @property
    def categories(self) -> dict[str, list[str]]:
        """Values of each categorical obs column, in the order of its codes."""
        return self.manifest["categories"]

    @property
    def coverage(self) -> pd.DataFrame:
        """For each source, how its columns were matched to genes, and the share of the counts in them."""
        return coverage(self.manifest["sources"])

    @cached_property
    def lengths(self) -> np.ndarray:
        """Number of expressed genes of each cell, int64 array (n,); from the list offsets alone."""
        lengths = self._rows.lengths()
        return lengths if self._index is None else lengths[self._index]

    @property
    def obs_names(self) -> np.ndarray:
        """Names of the cells, object array (n,)."""
        names = self._rows.column("obs_name")
        return names if self._index is None else names[self._index]

    @cached_property
    def obs(self) -> pd.DataFrame:
        """The chosen obs columns, one row a cell, indexed by the cells' names."""
        columns = {}
        for name, values in self._columns.items():
            if name in self.categories:
                values = pd.Categorical.from_codes(values, self.categories[name])
            columns[name] = values
        obs = pd.DataFrame(columns, index=pd.Index(self._rows.column("obs_name"), dtype=object))
        return obs if self._index is None else obs.iloc[self._index]

    @cached_property
    def dataset(self):
        """The store as a `datasets.Dataset`, memory-mapped."""
        from datasets import load_from_disk

        self.must_be_unchanged()
        dataset = load_from_disk(str(self.path))
        return dataset if self._index is None else dataset.select(self._index)

    @cached_property
    def _columns(self) -> dict[str, np.ndarray]:
        """Obs columns of the whole store; of categorical ones the codes, -1 where missing."""
        columns = {}
        for name in self.manifest["obs"]:
            values = self._rows.column(name)
            if name in self.categories:
                values = np.where(pd.isna(values), -1, values).astype(np.int64)
            columns[name] = values
        return columns

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
        return _csr(indptr, genes, counts, len(self.genes))

    def neighbors(self, index) -> sparse.csr_array:
        """Read the neighbours of cells.

        Parameters
        ----------
        index : int, slice, sequence of int, or boolean mask (n,)
            Row numbers, as for `rows`.

        Returns
        -------
        csr_array (n_rows, n_cells)
            Weights, float32; a weight of 0 is a neighbour too. Neighbours outside a selection, or outside a part that
            is not joined yet, are left out.

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
        """Tell which row numbers of the whole store are those of cells here: bool array (n,)."""
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
        """Read one cell, a mapping of `genes`, `counts`, `cell_id`, `obs_name` and its obs values."""
        if not isinstance(row, (int, np.integer)):
            raise TypeError(f"A store is indexed by a row number, got {type(row).__name__}; for many use rows(index).")
        row = int(row)
        batch = self.__getitems__([row])
        cell = {"genes": batch.genes, "counts": batch.counts, "cell_id": int(batch.cell_id[0])}
        cell["obs_name"] = self.obs.index[row]
        return Cell({**cell, **{name: self.obs[name].iat[row] for name in self.obs}}, batch)

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
            path=self.path,
            names_key=self._names_key,
            neighborhood=self._neighborhoods(rows) if self._gives_neighborhoods else None,
        )

    def _neighborhoods(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Sum the counts of the neighbours of rows of the whole store; see `CellBatch.neighborhood`."""
        indptr, numbers, _ = self._rows.neighbors(rows)
        cells = np.repeat(np.arange(len(rows)), np.diff(indptr))
        others = self._holds(numbers) & (numbers != rows[cells])
        pairs = np.unique(cells[others] * len(self._rows) + numbers[others])  # each neighbour once
        cells, numbers = np.divmod(pairs, max(len(self._rows), 1))
        return sum_groups(self._gather, cells.searchsorted(np.arange(len(rows) + 1)), numbers, len(self.genes))

    def _row_numbers(self, index) -> np.ndarray:
        """Turn what `rows` takes into row numbers of the whole store."""
        if isinstance(index, slice):
            rows = np.arange(*index.indices(len(self)), dtype=np.int64)
        else:
            rows = np.atleast_1d(np.asarray(index))
            if rows.ndim > 1:
                raise IndexError(f"Row numbers are one list, got an array of shape {rows.shape}.")
            if rows.dtype == bool:
                if len(rows) != len(self):
                    raise IndexError(f"The mask has {len(rows)} values, the store {len(self)} cells.")
                rows = np.flatnonzero(rows)
            elif rows.dtype.kind not in "iu" and len(rows):
                raise IndexError(f"Row numbers are integers, got {rows.dtype}.")
            elif len(rows):
                if rows.dtype == np.uint64 and rows.max() >= len(self):
                    raise IndexError(f"Row {rows.max()} is outside the store of {len(self)} cells.")
                rows = rows.astype(np.int64, copy=False)
                if not (rows.view(np.uint64) < len(self)).all():  # some are negative, or outside
                    outside = rows[(rows < -len(self)) | (rows >= len(self))]
                    if len(outside):
                        raise IndexError(f"Row {outside[0]} is outside the store of {len(self)} cells.")
                    rows = np.where(rows < 0, rows + len(self), rows)
        return rows.astype(np.int64, copy=False) if self._index is None else self._index[rows.astype(np.int64)]

    def _gather(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return self._rows.gather(rows, self.manifest["gene_type"], self.manifest["count_type"])

    # ------------------------------------------------------------------ parts of it

    def select(self, index) -> CellStore:
        """Choose cells, without copying.

        Parameters
        ----------
        index : slice, sequence of int, or boolean mask (n,)
            Which, as for `rows`.

        Returns
        -------
        CellStore
            Over these cells, in this order. Their `cell_id`, by which masks are drawn, stays that of the whole store.
        """
        return self._like(self._row_numbers(index), self._gives_neighborhoods)

    def with_neighborhoods(self) -> CellStore:
        """Give each cell's neighbourhood with it: the sums of its neighbours' counts.

        Returns
        -------
        CellStore
            Of the same cells, whose batches (`__getitems__`, a `DataLoader`) have `CellBatch.neighborhood`, as
            `GeneTokenizer(neighborhood=True)` needs. Its selections do so too. Neighbours outside a selection are left
            out: what is held out is not seen.

        Raises
        ------
        ValueError
            The store was built without neighbours.
        """
        self._must_have_neighbors()
        return self._like(self._index, True)

    def _like(self, rows: np.ndarray | None, gives_neighborhoods: bool) -> CellStore:
        other = object.__new__(CellStore)
        other.path, other.manifest, other.genes, other._rows = self.path, self.manifest, self.genes, self._rows
        other._index, other._gives_neighborhoods = rows, gives_neighborhoods
        return other

    def train_test_split(
        self, test_size: float = 0.1, *, by: str | None = None, seed: int = 0
    ) -> dict[str, CellStore]:
        """Split at random into training and held-out cells.

        Cells that are in the store twice, by barcode and counts, are on one side; their number is logged.

        Parameters
        ----------
        test_size : float, default: 0.1
            Share of the cells that are held out; with `by`, of the groups.
        by : str, optional
            Obs column, such as `donor`, whose groups are not divided: no group has cells on both sides. Groups that
            share a cell count as one.
        seed : int, default: 0
            Of the choice.

        Returns
        -------
        dict
            `train` and `test`, each a selection in the order of this store.

        Raises
        ------
        ValueError
            No such column, cells without a value in it, or under two groups.
        """
        from sklearn.model_selection import GroupShuffleSplit, ShuffleSplit  # a second of imports

        twins = self.twins()
        if by is None:
            firsts, of_cell = np.unique(twins, return_index=True, return_inverse=True)[1:]
            _, chosen = next(ShuffleSplit(1, test_size=test_size, random_state=seed).split(firsts))
            held_out = np.isin(of_cell, chosen)
            train, test = np.flatnonzero(~held_out), np.flatnonzero(held_out)
        else:
            if by not in self.obs:
                raise ValueError(f"No obs column {by!r}; there are {', '.join(self.obs.columns) or 'none'}.")
            groups = self.obs[by]
            if groups.isna().any():
                raise ValueError(f"{int(groups.isna().sum())} cells have no {by!r}: leave them out with select first.")
            if groups.nunique() < 2:
                raise ValueError(f"All cells have the same {by!r}: nothing to hold out.")
            groups = groups.astype(str).to_numpy()
            if len(np.unique(twins)) < len(twins):
                groups = join_groups(groups, twins)
                if len(np.unique(groups)) < 2:
                    raise ValueError(f"All groups of {by!r} share cells, by barcode and counts: drop them first.")
            splitter = GroupShuffleSplit(1, test_size=test_size, random_state=seed)
            train, test = next(splitter.split(np.arange(len(self)), groups=groups))
        return {"train": self.select(np.sort(train)), "test": self.select(np.sort(test))}

    def twins(self) -> np.ndarray:
        """Find cells that are here twice: of equal barcode and equal counts.

        Returns
        -------
        int64 array (n,)
            One number per cell; cells with the same number are twins. Without twins 0, 1, 2, … Their number is logged.
        """
        twins = find_twins_of_store(self.obs_names, self.lengths, self.rows)
        n_twins = len(twins) - len(np.unique(twins))
        if n_twins:
            logger.warning(
                f"{n_twins} of {len(twins)} cells have barcode and counts of another one: they are kept on its side "
                "of a split, and a model that learns from them learns from these cells twice."
            )
        return twins

    def block_shuffle(self, block_size: int = 16, *, seed: int = 0, epoch: int = 0) -> np.ndarray:
        """Order the rows at random, but for blocks of rows that stay together and are read at once.

        Parameters
        ----------
        block_size : int, default: 16
            Rows a block; 1 gives a full shuffle. What lies together on disk is learnt from together, so a small
            block, or a store that was built with `shuffle=True`, keeps batches mixed.
        seed, epoch : int, default: 0
            The order is a function of them.

        Returns
        -------
        int64 array (n,)
            Every row once.
        """
        return block_order(len(self), block_size, seed, epoch)

    def verify(self) -> None:
        """Compare every shard, and the gene table, with its checksum.

        Raises
        ------
        ValueError
            A shard or the gene table is damaged; the message names it.
        """
        files = [self.manifest["gene_table"], *self.manifest["shards"]]
        for shard in tqdm(files, desc="verify", unit="file", disable=None):
            if checksum(self.path / shard["file"]) != shard["checksum"]:
                raise ValueError(f"{self.path / shard['file']} is damaged: its checksum does not fit.")

    # ------------------------------------------------------------------ building

    @classmethod
    def build(
        cls,
        path: str | Path,
        sources: AnnData | CellStore | str | Path | Iterable[AnnData | CellStore | str | Path],
        *,
        obs: Sequence[str] | str | None = None,
        classes: Sequence[str] | str = (),
        layer: str | None = None,
        fractional: bool = False,
        neighbors: str | None = None,
        aliases: Mapping[str, str] | pd.DataFrame | str | Path | None = None,
        unify: str | None = None,
        species: str | None = None,
        shuffle: bool = False,
        seed: int = 0,
        part: tuple[int, int] | None = None,
        workers: int = 1,
        overwrite: bool = False,
        allow_duplicates: bool = False,
        report: bool = True,
        rows_per_batch: int = ROWS_PER_BATCH,
        rows_per_shard: int = ROWS_PER_SHARD,
    ) -> CellStore:
        """Write a store from files and AnnData objects, block by block.

        The cells keep the order of the sources; the genes are united by id. Everything is written under
        `.<name>.building` beside the path and renamed when whole. A build that was stopped goes on with the first
        piece of a file that was not done, if it is called again with the same sources and settings.

        Parameters
        ----------
        path : str or Path
            Folder to make.
        sources : AnnData, MuData, SpatialData, CellStore, str, Path, or several of them
            AnnData objects (in memory or backed, views too), MuData and SpatialData objects, other stores, and files:
            `.h5ad`, `.h5mu`, `.zarr`, 10x `.h5` and `.mtx` folders, `.loom`, folders of Parse, kb-python and
            alevin-fry, csv files of BD Rhapsody. A folder gives all such files in it; a pattern such as
            `data/*.h5ad` all that fit.
        obs : sequence of str, or "all", optional
            Columns of obs to keep. Categorical and repeated string columns become class labels.
        classes : str or sequence of str, optional
            Columns of obs to keep as class labels though their values are integers (such as the numbers of clusters)
            or booleans.
        layer : str, optional
            Where the counts are, in every source: `X`, `raw` or a layer; of 10x files also a feature type or a genome;
            of a MuData or SpatialData also the modality or table, as `prot` or `prot:counts`. By default the first of
            X, raw and the layer `counts` that holds counts.
        fractional : bool, default: False
            Allow fractions (RSEM, SoupX); they are stored as float32.
        neighbors : str, optional
            Key of obsp, such as `spatial_connectivities`, whose graph is kept; see `neighbors`.
        aliases : mapping, DataFrame or file, optional
            Old gene id (or name) -> new id, ids with or without version. A csv, tsv, txt or parquet file has them in
            its first two columns, a json file is one object. Where few of them are genes of the sources, a warning
            says how many.
        unify : "symbol", optional
            Take genes of different sources that have one symbol under different ids for one.
        species : str, optional
            What all sources must be of, such as `human`; by default they must agree where their Ensembl ids tell.
        shuffle : bool, default: False
            Put all cells in a random order, out of core.
        seed : int, default: 0
            Of the shuffle.
        part : (int, int), optional
            (i, n): write only the i-th of n equal parts of the cells, on one of n machines; see `join`.
        workers : int, default: 1
            Processes that read files. AnnData objects in memory are read by this process. Needs, as all of
            multiprocessing, a script's main part under `if __name__ == "__main__":`.
        overwrite : bool, default: False
            Replace a store at the path, once the new one is whole.
        allow_duplicates : bool, default: False
            Take sources that hold the same cells: the raw and the filtered matrix of one run, or a source of which at
            least 90 % of the cells agree with cells of another in barcode, total and number of genes.
        report : bool, default: True
            Print what became of the columns of each source; it is in `coverage` as well.
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
            No sources; values that are not counts; a missing obs column, or one whose types do not agree; sources of
            different species; sources that hold the same cells. The parts already written are kept beside the path,
            and a call with `allow_duplicates=True` resumes from them.
        OSError
            No space is left; what was there before is unharmed.
        """
        settings = BuildSettings(
            obs=obs,
            classes=classes,
            layer=layer,
            fractional=fractional,
            neighbors=neighbors,
            aliases=aliases,
            unify=unify,
            species=species,
            shuffle=shuffle,
            seed=seed,
            part=part,
            workers=workers,
            rows_per_batch=rows_per_batch,
            rows_per_shard=rows_per_shard,
            allow_duplicates=allow_duplicates,
        )
        write_store(Path(path), _listed(sources), settings, overwrite=overwrite)
        store = cls(path)
        if report:
            store._report(store.manifest["sources"])
        return store

    def append(
        self,
        sources: AnnData | CellStore | str | Path | Iterable[AnnData | CellStore | str | Path],
        *,
        layer: str | None = None,
        fractional: bool = False,
        neighbors: str | None = None,
        aliases: Mapping[str, str] | pd.DataFrame | str | Path | None = None,
        unify: str | None = None,
        workers: int = 1,
        allow_duplicates: bool = False,
    ) -> None:
        """Add the cells of other sources behind those that are there; new genes come behind the known ones.

        The shards that are there are linked, not copied, and the store at the path is replaced once the new one is
        whole. Cells, genes and labels keep their numbers. Parameters and errors are those of `build`; the obs columns
        are those of the store.

        Raises
        ------
        ValueError
            This is a selection, or a joined store; obs columns of other types; neighbours that one has and the other
            has not.
        """
        self._must_be_whole("append to")
        self.must_be_unchanged()
        if (neighbors is not None) != self.manifest["neighbors"]:
            has = "has" if self.manifest["neighbors"] else "has no"
            raise ValueError(f"{self.path} {has} neighbours; what is added must have the same (neighbors=…).")
        settings = BuildSettings(
            obs=list(self.manifest["obs"]),
            layer=layer,
            fractional=fractional,
            neighbors=neighbors,
            aliases=aliases,
            unify=unify,
            workers=workers,
            allow_duplicates=allow_duplicates,
        )
        write_store(self.path, _listed(sources), settings, base=self)
        n_sources = len(self.manifest["sources"])
        self.__dict__ = {**CellStore(self.path).__dict__, "_gives_neighborhoods": self._gives_neighborhoods}
        self._report(self.manifest["sources"][n_sources:])

    @classmethod
    def join(cls, path: str | Path, paths: Sequence[str | Path], *, overwrite: bool = False) -> CellStore:
        """Make one store of several without copying them: a manifest, and links to their shards.

        Parameters
        ----------
        path : str or Path
            Folder to make.
        paths : sequence of str or Path
            Stores with the same genes, obs columns and labels, such as the parts that `build(part=(i, n))` made of
            the same sources. Parts are put in their order; others keep the order given. They stay as they are.
        overwrite : bool, default: False
            Replace a store at the path.

        Returns
        -------
        CellStore

        Raises
        ------
        ValueError
            Stores that differ in genes, obs columns or labels; a part that is missing, or of another build.
        """
        join_stores(Path(path), [cls(part) for part in paths], overwrite)
        return cls(path)

    def save(self, path: str | Path, *, overwrite: bool = False) -> CellStore:
        """Write these cells as a store of their own, such as a selection, or a copy of a joined store.

        Parameters
        ----------
        path : str or Path
            Folder to make.
        overwrite : bool, default: False
            Replace a store at the path.

        Returns
        -------
        CellStore
        """
        return CellStore.build(
            path,
            self,
            obs=list(self.manifest["obs"]),
            fractional=True,
            neighbors="neighbors" if self.manifest["neighbors"] else None,
            overwrite=overwrite,
            report=False,
        )

    def tokenize(
        self,
        tokenizer: Any,
        path: str | Path,
        *,
        obs: Sequence[str] | str | None = None,
        workers: int = 1,
        rows_per_shard: int = TOKEN_ROWS_PER_SHARD,
        overwrite: bool = False,
    ) -> Dataset:
        """Write the tokens of these cells as a Hugging Face dataset, which opens without this package.

        The rows are the cells, in their order; memory is a batch's. As in `build`, everything is written under
        `.<name>.building` beside the path and renamed when whole, and a call that was stopped goes on with the shards
        that were not done, if it is made again with the same cells, tokenizer and settings.

        Parameters
        ----------
        tokenizer : GeneTokenizer
            One that adds neighbourhoods needs `with_neighborhoods()` of the store. `truncation="random"` chooses as in
            epoch 0.
        path : str or Path
            Folder to make.
        obs : sequence of str, or "all", optional
            Columns of obs to copy.
        workers : int, default: 1
            Processes that tokenize. Needs, as all of multiprocessing, a script's main part under
            `if __name__ == "__main__":`.
        rows_per_shard : int, default: 16,384
            Cells of a file.
        overwrite : bool, default: False
            Replace a tokenized dataset at the path, once the new one is whole.

        Returns
        -------
        Dataset
            `input_ids` (lists of uint16, or of uint32 where the vocabulary is larger), `token_type_ids` (lists of the
            narrowest unsigned type), `length` (int32, number of tokens), `cell_id` (int64, row number in the whole
            store), and the obs columns. Beside it are `lengths.json` (the list of lengths), `manifest.json` and the
            folder `tokenizer`, from which `from_pretrained` loads it.

        Raises
        ------
        FileExistsError
            There is something at the path, and not `overwrite`.
        ValueError
            No such obs column; cells that the tokenizer refuses.
        OSError
            No space is left; what was there before is unharmed.
        """
        from datasets import load_from_disk

        self.must_be_unchanged()
        write_tokens(
            self,
            self._index,
            tokenizer,
            Path(path),
            obs=obs,
            workers=workers,
            rows_per_shard=rows_per_shard,
            overwrite=overwrite,
        )
        return load_from_disk(str(path))

    def push_to_hub(self, repo_id: str, **kwargs) -> None:
        """Upload these cells by `datasets.Dataset.push_to_hub`, and the gene table beside them (`genes.parquet`).

        Parameters
        ----------
        repo_id : str
            `user/name` of a dataset on the Hub.
        **kwargs
            For `push_to_hub`, such as `private`, `token` or `revision`.
        """
        from huggingface_hub import HfApi

        self.dataset.push_to_hub(repo_id, **kwargs)
        HfApi(token=kwargs.get("token")).upload_file(
            path_or_fileobj=self.path / "genes.parquet",
            path_in_repo="genes.parquet",
            repo_id=repo_id,
            repo_type="dataset",
            revision=kwargs.get("revision"),
        )

    def _must_have_neighbors(self) -> None:
        if not self.manifest["neighbors"]:
            raise ValueError(
                f"{self.path} was built without neighbours: call spatial_neighbors(adata), and then "
                "CellStore.build(…, neighbors='spatial_connectivities')."
            )

    def must_be_unchanged(self) -> None:
        """Raise ValueError where the store at the path is not the one that was opened."""
        if _read_manifest(self.path) != self.manifest:
            raise ValueError(f"{self.path} was replaced since this object opened it: open it again.")

    @cached_property
    def _names_key(self) -> str:
        """Tells the names of genes and categories apart from those of a store that takes this one's place."""
        categories = hashlib.sha256(json.dumps(self.categories).encode()).hexdigest()  # the same in every process
        return self.manifest["gene_table"]["checksum"] + categories

    def _must_be_whole(self, to_do: str) -> None:
        if self._index is not None:
            raise ValueError(f"This is a selection of {self.path}: {to_do} the whole store, or save the selection.")
        if any(os.path.dirname(shard["file"]) for shard in self.manifest["shards"]):
            raise ValueError(f"{self.path} is joined from others: {to_do} a saved copy of it (store.save).")

    def _report(self, sources: Sequence[Mapping[str, Any]]) -> None:
        """Print how the genes of sources were matched, and say which cells are empty."""
        table = coverage(sources)
        table["counts kept"] = table["counts kept"].map("{:.1%}".format)
        table["counts mapped"] = table["counts mapped"].map("{:.1%}".format)
        table["counts unmapped"] = table["counts unmapped"].map("{:.1%}".format)
        print(table.head(_MOST_SOURCES_PRINTED).to_string())
        if len(table) > _MOST_SOURCES_PRINTED:
            print(f"… and {len(table) - _MOST_SOURCES_PRINTED} more sources: see store.coverage")
        repeated = sum(source["n_columns"] - source["n_genes"] for source in sources)
        if repeated:
            logger.warning(f"{repeated} columns repeat a gene id; their counts are summed.")
        n_empty = sum(source["n_empty"] for source in sources)
        if n_empty:
            logger.warning(f"{n_empty} of {len(self)} cells have no counts; they are kept, and training skips them.")


def block_order(n: int, block_size: int, seed: int, epoch: int) -> np.ndarray:
    """Order n rows at random by blocks; see `CellStore.block_shuffle`."""
    if block_size < 1:
        raise ValueError(f"block_size={block_size}: a block has at least one row.")
    starts = np.random.default_rng([seed, epoch]).permutation(-(-n // block_size)) * block_size
    rows = (starts[:, None] + np.arange(block_size)).ravel()
    return rows[rows < n]


def _csr(indptr: np.ndarray, columns: np.ndarray, values: np.ndarray, n_columns: int) -> sparse.csr_array:
    index_type = np.int64 if max(len(columns), n_columns) > np.iinfo(np.int32).max else np.int32
    indices = (values, columns.astype(index_type), indptr.astype(index_type))
    return sparse.csr_array(indices, shape=(len(indptr) - 1, n_columns))


def _listed(sources) -> list:
    return [sources] if is_source(sources) else list(sources)


def _read_manifest(path: Path) -> dict:
    file = path / "manifest.json"
    if not path.exists() and path.with_name(f".{path.name}.old").exists():
        time.sleep(0.2)  # it may be replaced just now
        recover(path)
    if not file.exists():
        if building_of(path).exists():
            raise FileNotFoundError(
                f"{path} is not whole: its build was stopped. Call CellStore.build again; it goes on where it was."
            )
        raise FileNotFoundError(f"There is no CellStore at {path}; make one with CellStore.build.")
    manifest = json.loads(file.read_text())
    if manifest["format_version"] != FORMAT_VERSION:
        remedy = "Update stformer_hf." if manifest["format_version"] > FORMAT_VERSION else "Build it again."
        raise ValueError(
            f"{path} has store format {manifest['format_version']}; this version reads {FORMAT_VERSION}. {remedy}"
        )
    return manifest


@reads("CellStore", lambda path: (path / "manifest.json").exists() and (path / "dataset_info.json").exists())
def _read_store(path: Path) -> list[Layer]:
    return store_layers(CellStore(path))


__all__ = ["CellStore", "block_order"]
