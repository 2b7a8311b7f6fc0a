"""CellStore: cells on disk as a Hugging Face dataset, read straight from its Arrow buffers."""

from __future__ import annotations

import json
import logging
import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pyarrow as pa
from anndata import AnnData
from scipy import sparse
from tqdm.auto import tqdm

from ..genes.wrong_names import must_have
from ..sources.formats import local_path, remote_folder
from ..sources.same_cells import find_twins_of_store
from .block_order import block_order
from .cell_batch import Cell, CellBatch, names_key
from .coverage import coverage, print_coverage
from .hub import push_files
from .join import join_stores
from .neighborhoods import sum_groups
from .opening import open_files, read_manifest
from .remote_files import RemoteFolder
from .row_numbers import row_numbers
from .shards import checksum
from .splits import split_cells, split_groups
from .token_writer import ROWS_PER_SHARD as TOKEN_ROWS_PER_SHARD
from .token_writer import write_tokens
from .writer import ROWS_PER_BATCH, ROWS_PER_SHARD, BuildSettings, write_store

if TYPE_CHECKING:
    from datasets import Dataset, Features

logger = logging.getLogger(__name__)


class CellStore:
    """Cells on disk: a saved Hugging Face dataset with one row per cell, a gene table and a manifest.

    `datasets.load_from_disk(path)` opens it without this package. Its columns are `genes` (row of the gene table,
    ascending), `counts` (the narrowest type that holds them exactly), `obs_name` and the chosen obs columns; see
    `build` for compact rows. As a map-style torch dataset it returns a dictionary for one row and a `CellBatch` for
    many (`__getitems__`).

    Attributes
    ----------
    path : Path or RemoteFolder
    genes : GeneTable
        Row j is the gene that has number j in the column `genes`.
    manifest : dict
        Sources, shards, types and checksums, as `manifest.json` holds them.

    Parameters
    ----------
    path : str, Path or RemoteFolder
        A folder that `CellStore.build` made, or the address of one: `hf://datasets/user/name`, `https://…`, `s3://…`,
        `gs://…`. Only the needed parts of remote files are fetched, and kept in a local cache; `RemoteFolder` takes
        credentials, and folder and limit of the cache.

    Raises
    ------
    FileNotFoundError
        There is no store at the path, or its build did not finish.
    ValueError
        The store has another format version, or a shard is truncated; a remote file was replaced while it was read.
    ConnectionError
        The connection to a server was lost, also after several attempts.

    Notes
    -----
    Rows are copied out of the memory map, so changing them does not change the store. Pickling a store (as for
    spawned workers) passes only its path and, for a selection, the row numbers; if another store has taken its place,
    unpickling raises a ValueError.
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
        return f"CellStore({str(self.path)!r}: {cells}, {len(self.genes):,} genes, obs: {columns})"

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
    def dataset(self):
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

    def rows(self, index) -> sparse.csr_array:
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

    def neighbors(self, index) -> sparse.csr_array:
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

    def _row_numbers(self, index) -> np.ndarray:
        """Convert an index, as `rows` takes it, to row numbers of the whole store."""
        if isinstance(index, pd.Series) and pd.api.types.is_bool_dtype(index) and len(index) == len(self):
            numbered = index.index.equals(pd.RangeIndex(len(self)))
            if not numbered and not np.array_equal(index.index, self.obs_names):  # it would select other cells
                raise IndexError(
                    "The mask is a Series with another index than obs: pass mask.loc[store.obs.index], or "
                    "mask.to_numpy() if it is in the order of the cells."
                )
        rows = row_numbers(index, len(self), "store")
        return rows if self._index is None else self._index[rows]

    def _gather(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return self._rows.gather(rows, self.manifest["gene_type"], self.manifest["count_type"])

    # ------------------------------------------------------------------ selections

    def select(self, index) -> CellStore:
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

    def with_neighborhoods(self) -> CellStore:
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

    def _like(self, rows: np.ndarray | None, gives_neighborhoods: bool) -> CellStore:
        other = object.__new__(CellStore)
        other.path, other.manifest, other.genes, other._rows = self.path, self.manifest, self.genes, self._rows
        other._index, other._gives_neighborhoods = rows, gives_neighborhoods
        return other

    def train_test_split(
        self, test_size: float = 0.1, *, by: str | None = None, seed: int = 0
    ) -> dict[str, CellStore]:
        """Split at random into training and held-out cells.

        Cells that are in the store twice (same barcode and counts) are kept on one side; their number is logged.

        Parameters
        ----------
        test_size : float, default: 0.1
            Fraction of the cells to hold out; with `by`, fraction of the groups.
        by : str, optional
            Obs column, such as `donor`, whose groups are kept whole: no group has cells on both sides. Groups that
            share a cell count as one.
        seed : int, default: 0
            Seed of the split.

        Returns
        -------
        dict
            `train` and `test`, each a selection in the order of this store.

        Raises
        ------
        ValueError
            The column does not exist, cells have no value in it, or it has fewer than two groups.
        """
        twins = self.twins()
        if by is None:
            train, test = split_cells(twins, test_size, seed)
        else:
            must_have(self.obs, "obs", by)
            train, test = split_groups(twins, self.obs[by], test_size, seed)
        return {"train": self.select(train), "test": self.select(test)}

    def twins(self) -> np.ndarray:
        """Find duplicated cells: those with equal barcode and equal counts.

        The number of duplicates is logged.

        Returns
        -------
        int64 array (n,)
            One number per cell; cells with the same number are duplicates. Without duplicates it is 0, 1, 2, …
        """
        twins = find_twins_of_store(self.obs_names, self.lengths, self.rows)
        n_twins = len(twins) - len(np.unique(twins))
        if n_twins:
            logger.warning(
                f"{n_twins} of {len(twins)} cells have the barcode and counts of another cell: a split keeps them on "
                "the same side, and a model trained on them sees these cells twice."
            )
        return twins

    def read_ahead(self, index) -> None:
        """Ask the system to read rows from the disk, and return at once; does nothing for a remote store.

        Parameters
        ----------
        index : slice, or array of int or bool
            Rows that will be read soon.
        """
        self._rows.read_ahead(self._row_numbers(index))

    def block_shuffle(self, block_size: int = 16, *, seed: int = 0, epoch: int = 0, window: int = 1) -> np.ndarray:
        """Return a random order of blocks of rows; the rows of a block stay together and are read at once.

        Parameters
        ----------
        block_size : int, default: 16
            Rows per block; 1 is a full shuffle. Rows that are adjacent on disk end up in the same batch, so use small
            blocks, a `window`, or a store built with `shuffle=True`, to keep batches mixed.
        window : int, default: 1
            Number of consecutive blocks whose rows are shuffled together.
        seed, epoch : int, default: 0
            The order is a function of these two.

        Returns
        -------
        int64 array (n,)
            Every row once.
        """
        return block_order(len(self), block_size, seed, epoch, window=window)

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
        compact: bool = False,
        shuffle: bool = False,
        seed: int = 0,
        part: tuple[int, int] | None = None,
        workers: int = 1,
        engine: str = "local",
        overwrite: bool = False,
        allow_duplicates: bool = False,
        report: bool = True,
        rows_per_batch: int = ROWS_PER_BATCH,
        rows_per_shard: int = ROWS_PER_SHARD,
    ) -> CellStore:
        """Write a store from files and AnnData objects, block by block.

        The cells keep the order of the sources; the gene tables are merged by id. Everything is written under
        `.<name>.building` beside the path and renamed when complete. An interrupted build resumes at the first
        unfinished piece of a file when it is called again with the same sources and settings. Pieces of AnnData
        objects are written again, and so are those of open experiments of TileDB-SOMA, unless these are opened with
        the same `tiledb_timestamp`.

        Parameters
        ----------
        path : str or Path
            Folder to create.
        sources : AnnData, MuData, SpatialData, CellStore, str, Path, or an iterable of them
            AnnData objects (in memory or backed, views too), MuData and SpatialData objects, other stores, and files:
            `.h5ad`, `.h5mu`, `.zarr`, 10x `.h5` and `.mtx` folders, `.loom`, folders of Parse, kb-python and
            alevin-fry, csv files of BD Rhapsody. A folder stands for all such files in it, a pattern such as
            `data/*.h5ad` for all that match.
        obs : sequence of str, or "all", optional
            Columns of obs to keep. Categorical columns, and string columns with repeated values, become class labels.
        classes : str or sequence of str, optional
            Columns of obs to keep as class labels although their values are integers (such as cluster numbers) or
            booleans.
        layer : str, optional
            Where the counts are, in every source: `X`, `raw` or a layer; for 10x files also a feature type or a
            genome; for MuData and SpatialData also the modality or table, as in `prot` or `prot:counts`. By default
            the first of X, raw and the layer `counts` that holds counts.
        fractional : bool, default: False
            Allow fractional counts (RSEM, SoupX); they are stored as float32.
        neighbors : str, optional
            Key of obsp, such as `spatial_connectivities`, whose graph is kept; see `neighbors`.
        aliases : mapping, DataFrame or file, optional
            Old gene id (or name) -> new id, ids with or without version. A csv, tsv, txt or parquet file has them in
            its first two columns; a json file is one object. If few of them are genes of the sources, a warning
            states how many.
        unify : "symbol", optional
            Merge genes of different sources that have the same symbol under different ids.
        species : str, optional
            Species of all sources, such as `human`; by default the species that their Ensembl ids show must agree.
        compact : bool, default: False
            Write about 1.2 to 1.7 bytes per expressed gene instead of 3 or 4. Reading from a slow disk becomes
            faster, and reading from memory slower. The Hugging Face dataset then holds codes instead of `genes` and
            `counts`; `compact_rows` documents them.
        shuffle : bool, default: False
            Put all cells in a random order, out of core.
        seed : int, default: 0
            Seed of the shuffle.
        part : (int, int), optional
            (i, n): write only the i-th of n equal parts of the cells, on one of n machines; see `join`.
        workers : int, default: 1
            Number of processes that read files and stores, `rows_per_shard` cells at a time; AnnData objects in memory
            are read by this process. As always with multiprocessing, the main part of a script must be under
            `if __name__ == "__main__":`.
        engine : {"local", "ray"}, default: "local"
            Where these processes run: on this machine, or as tasks on a Ray cluster whose machines see the files under
            the same paths. A task whose worker is killed runs again. The result is the same, byte for byte.
        overwrite : bool, default: False
            Replace a store at the path once the new one is complete.
        allow_duplicates : bool, default: False
            Accept sources that hold the same cells: the raw and the filtered matrix of one run, or a source in which
            at least 90 % of the cells match cells of another in barcode, total and number of genes.
        report : bool, default: True
            Print how the columns of each source were matched; `coverage` holds the same table.
        rows_per_batch, rows_per_shard : int
            Cells per Arrow record batch (and per block in memory), and cells per file.

        Returns
        -------
        CellStore

        Raises
        ------
        FileExistsError
            The path exists, and `overwrite` is False.
        ValueError
            There are no sources; values are not counts; an obs column is missing, or its types do not agree; sources
            are of different species, or hold the same cells. The parts already written are kept beside the path,
            and a call with `allow_duplicates=True` resumes from them.
        OSError
            The disk is full; what was there before is unharmed.
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
            compact=compact,
            shuffle=shuffle,
            seed=seed,
            part=part,
            workers=workers,
            engine=engine,
            rows_per_batch=rows_per_batch,
            rows_per_shard=rows_per_shard,
            allow_duplicates=allow_duplicates,
        )
        write_store(local_path(path), sources, settings, overwrite=overwrite)
        store = cls(path)
        if report:
            print_coverage(store.manifest["sources"], len(store))
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
        engine: str = "local",
        allow_duplicates: bool = False,
    ) -> None:
        """Append the cells of other sources; new genes are appended to the gene table.

        The existing shards are linked, not copied, and the store at the path is replaced once the new one is
        complete. Cells, genes and labels keep their numbers. Parameters and errors are those of `build`; the obs
        columns are those of the store.

        Raises
        ------
        ValueError
            This is a selection or a joined store; obs columns have other types; only one of the two has neighbours.
        """
        self._must_be_local("changed")
        self._must_be_whole("append to")
        self.must_be_unchanged()
        if (neighbors is not None) != self.manifest["neighbors"]:
            has = "has" if self.manifest["neighbors"] else "has no"
            raise ValueError(f"{self.path} {has} neighbours; the sources to append must match (neighbors=…).")
        settings = BuildSettings(
            obs=list(self.manifest["obs"]),
            layer=layer,
            fractional=fractional,
            neighbors=neighbors,
            aliases=aliases,
            unify=unify,
            compact=self.is_compact,
            workers=workers,
            engine=engine,
            allow_duplicates=allow_duplicates,
        )
        write_store(self.path, sources, settings, base=self)
        n_sources = len(self.manifest["sources"])
        self.__dict__ = {**CellStore(self.path).__dict__, "_gives_neighborhoods": self._gives_neighborhoods}
        print_coverage(self.manifest["sources"][n_sources:], len(self))

    @classmethod
    def join(cls, path: str | Path, paths: Sequence[str | Path], *, overwrite: bool = False) -> CellStore:
        """Join stores into one without copying them: a manifest, and links to their shards.

        Parameters
        ----------
        path : str or Path
            Folder to create.
        paths : sequence of str or Path
            Stores with the same genes, obs columns and labels, such as the parts that `build(part=(i, n))` wrote from
            the same sources. Parts are put in their order; other stores keep the order given. They are not changed.
        overwrite : bool, default: False
            Replace a store at the path.

        Returns
        -------
        CellStore

        Raises
        ------
        ValueError
            The stores differ in genes, obs columns or labels; a part is missing, or belongs to another build.
        """
        stores = [cls(part) for part in paths]
        for store in stores:
            store._must_be_local("joined")
        join_stores(local_path(path), stores, overwrite)
        return cls(path)

    def save(self, path: str | Path, *, overwrite: bool = False) -> CellStore:
        """Write these cells as a new store, for example a selection, or a copy of a joined store.

        Parameters
        ----------
        path : str or Path
            Folder to create.
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
            compact=self.is_compact,
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
        engine: str = "local",
        rows_per_shard: int = TOKEN_ROWS_PER_SHARD,
        overwrite: bool = False,
    ) -> Dataset:
        """Write the tokens of these cells as a Hugging Face dataset, which opens without this package.

        The rows are the cells, in order; only one batch is in memory at a time. As in `build`, everything is written
        under `.<name>.building` beside the path and renamed when complete, and an interrupted call resumes with the
        unfinished shards when it is made again with the same cells, tokenizer and settings.

        Parameters
        ----------
        tokenizer : GeneTokenizer
            If it adds neighbourhoods, call this on `store.with_neighborhoods()`. `truncation="random"` chooses genes
            as in epoch 0.
        path : str or Path
            Folder to create.
        obs : sequence of str, or "all", optional
            Columns of obs to copy.
        workers : int, default: 1
            Number of processes that tokenize. As always with multiprocessing, the main part of a script must be under
            `if __name__ == "__main__":`.
        engine : {"local", "ray"}, default: "local"
            Where these processes run; as in `build`.
        rows_per_shard : int, default: 16,384
            Cells per file.
        overwrite : bool, default: False
            Replace a tokenized dataset at the path once the new one is complete.

        Returns
        -------
        Dataset
            `input_ids` (lists of uint16, or of uint32 if the vocabulary is larger), `token_type_ids` (lists of the
            narrowest unsigned type), `length` (int32, number of tokens), `cell_id` (int64, row number in the whole
            store), and the obs columns. Its folder also holds `lengths.json` (the list of lengths), `manifest.json`
            and the folder `tokenizer`, which `from_pretrained` loads.

        Raises
        ------
        FileExistsError
            The path exists, and `overwrite` is False.
        ValueError
            An obs column does not exist, or the tokenizer refuses cells.
        OSError
            The disk is full; what was there before is unharmed.
        """
        from datasets import load_from_disk

        self.must_be_unchanged()
        write_tokens(
            self,
            self._index,
            tokenizer,
            local_path(path),
            obs=obs,
            workers=workers,
            engine=engine,
            rows_per_shard=rows_per_shard,
            overwrite=overwrite,
        )
        return load_from_disk(str(path))

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        commit_message: str = "Upload cells",
    ) -> str:
        """Upload the files of this store, in one commit, as a dataset of the Hub.

        `CellStore("hf://datasets/user/name")` reads it there, and so do `datasets.load_dataset("user/name")` and the
        dataset viewer: the card lists the Arrow files as its data. Shards of an earlier store there are removed. A
        selection, or a store whose shards are elsewhere, is first copied to a temporary folder.

        Parameters
        ----------
        repo_id : str
            `user/name` of a dataset on the Hub, which is created if there is none.
        private : bool, optional
            Whether a new dataset is private.
        token : str or bool, optional
            Token of the Hub; by default that of `hf auth login`.
        revision : str, optional
            Branch, which must exist; by default `main`.
        commit_message : str, default: "Upload cells"

        Returns
        -------
        str
            Address of the commit.

        Raises
        ------
        ValueError
            The store is on a server.
        """
        self._must_be_local("uploaded")
        self.must_be_unchanged()
        if self._index is not None or self._is_joined:
            with tempfile.TemporaryDirectory() as folder:
                copy = self.save(Path(folder) / "store")
                return copy.push_to_hub(
                    repo_id, private=private, token=token, revision=revision, commit_message=commit_message
                )
        names = [shard["file"] for shard in self.manifest["shards"]]
        return push_files(self.path, names, repo_id, private, token, revision, commit_message)

    def _must_have_neighbors(self) -> None:
        if not self.manifest["neighbors"]:
            raise ValueError(
                f"{self.path} was built without neighbours: call spatial_neighbors(adata), then "
                "CellStore.build(…, neighbors='spatial_connectivities')."
            )

    def must_be_unchanged(self) -> None:
        """Raise ValueError if the store at the path is no longer the one that was opened."""
        if read_manifest(self.path.now() if self.is_remote else self.path) != self.manifest:
            raise ValueError(f"{self.path} was replaced after this object opened it: open it again.")

    @cached_property
    def _names_key(self) -> str:
        return names_key(self.manifest)

    def _must_be_local(self, to_be: str) -> None:
        if self.is_remote:
            raise ValueError(
                f"{self.path} is on a server and cannot be {to_be}: copy it first, "
                f"CellStore({str(self.path)!r}).save('copy')."
            )

    @property
    def _is_joined(self) -> bool:  # with shards in other folders
        return any(os.path.dirname(shard["file"]) for shard in self.manifest["shards"])

    def _must_be_whole(self, to_do: str) -> None:
        if self._index is not None:
            raise ValueError(f"This is a selection of {self.path}: {to_do} the whole store, or save the selection.")
        if self._is_joined:
            raise ValueError(f"{self.path} is joined from others: {to_do} a saved copy of it (store.save).")


def _csr(indptr: np.ndarray, columns: np.ndarray, values: np.ndarray, n_columns: int) -> sparse.csr_array:
    index_type = np.int64 if max(len(columns), n_columns) > np.iinfo(np.int32).max else np.int32
    indices = (values, columns.astype(index_type), indptr.astype(index_type))
    return sparse.csr_array(indices, shape=(len(indptr) - 1, n_columns))


__all__ = ["CellStore"]
