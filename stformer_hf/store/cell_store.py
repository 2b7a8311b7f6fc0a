"""CellStore: cells on disk as a Hugging Face dataset, read straight from its Arrow buffers."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from anndata import AnnData

from ..genes.wrong_names import must_have
from ..sources.formats import local_path
from ..sources.same_cells import find_twins_of_store
from .block_order import block_order
from .coverage import print_coverage
from .hub import push_files
from .join import join_stores
from .reader import StoreReader
from .splits import split_cells, split_groups
from .token_writer import ROWS_PER_SHARD as TOKEN_ROWS_PER_SHARD
from .token_writer import write_tokens
from .writer import ROWS_PER_BATCH, ROWS_PER_SHARD, BuildSettings, write_store

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)


class CellStore(StoreReader):
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

    @property
    def _is_joined(self) -> bool:  # with shards in other folders
        return any(os.path.dirname(shard["file"]) for shard in self.manifest["shards"])

    def _must_be_whole(self, to_do: str) -> None:
        if self._index is not None:
            raise ValueError(f"This is a selection of {self.path}: {to_do} the whole store, or save the selection.")
        if self._is_joined:
            raise ValueError(f"{self.path} is joined from others: {to_do} a saved copy of it (store.save).")
