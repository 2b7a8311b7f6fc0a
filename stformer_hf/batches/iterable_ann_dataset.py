"""IterableAnnDataset: cells streamed from files, each once an epoch whatever the number of workers and ranks."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa
import torch
from anndata import AnnData
from scipy import sparse
from torch.utils.data import IterableDataset, get_worker_info

from ..genes.gene_table import GeneTable
from ..genes.unite import unite
from ..sources.formats import expand, is_source
from ..sources.matrices import Matrix
from ..sources.obs_columns import ClassCode, as_array, as_arrow, as_objects, unite_obs
from ..sources.open_source import Source, checked_blocks, open_source
from ..sources.same_cells import check_names
from ..store.cell_batch import CellBatch
from ..store.shards import align, count_type_of, gene_type

if TYPE_CHECKING:
    from ..store.cell_store import CellStore

_OWN_COLUMNS = {"cell_id", "input_ids", "token_type_ids", "expression_values"}
_OWN_COLUMNS |= {"cell_genes", "cell_counts", "measured_genes"}
_ROWS_PER_BLOCK = 512  # cells read, and tokenized, at once


class _File(NamedTuple):
    """What reading a source needs, without what cannot go to another process."""

    name: str
    counts_in: str
    matrix: Matrix
    genes: np.ndarray  # row of the gene table of each column


class IterableAnnDataset(IterableDataset):
    """Cells streamed from files, tokenized on the way, with no more than a buffer of them in memory.

    The order of an epoch is a function of (seed, epoch). It is cut into one contiguous range for each worker of each
    rank, of sizes that differ by at most one: every cell comes exactly once an epoch, with more workers than files
    too. Where cells are read many times, a `CellStore` is faster and shuffles fully.

    Parameters
    ----------
    filenames : str, Path, AnnData, MuData, SpatialData, CellStore, or several of them
        All that `CellStore.build` takes as sources: files, folders and patterns such as `data/*.h5ad`. Their genes are
        united by id.
    tokenizer : GeneTokenizer, optional
        Makes tokens of the cells. Obs needs the columns of its `included_phenotypes`.
    obs : sequence of str or str, optional
        Columns of obs to give with each cell.
    categories : mapping of str to list of str, optional
        Known values of obs columns, such as `train.categories` for a test set: they keep their codes, others come
        behind. By default values are numbered as the files name them.
    layer : str, optional
        Where the counts are, in every file: `X`, `raw` or a layer. By default the first of X, raw and the layer
        `counts` that holds counts.
    fractional : bool, default: False
        Allow fractions (RSEM, SoupX).
    aliases : mapping, DataFrame or file, optional
        Old gene id (or name) -> new id.
    unify : "symbol", optional
        Take genes of different files that have one symbol under different ids for one.
    shuffle : bool, default: False
        Permute the files, and then the cells in each window of `buffer_size`.
    buffer_size : int, default: 4096
        Cells that are read, and mixed, at once; a worker holds so many (at 2,000 genes a cell, 65 MB).
    seed : int, default: 0
        Of the order.
    rank, world_size : int, default: 0, 1
        Which of how many equal parts this process reads. Not taken from `torch.distributed`: accelerate, and so
        Trainer, lets the main process read an iterable dataset for all, which needs 0 and 1. Give them where each
        process has a loader of its own that accelerate does not prepare.
    allow_duplicates : bool, default: False
        Read files that hold the same cells by their names, such as raw and filtered ones of one run.

    Attributes
    ----------
    genes : GeneTable
        Every gene of the files once.
    categories : dict of str to list of str
        Names of the codes of the categorical columns in `obs`.

    Yields
    ------
    dict
        Without a tokenizer as `CellStore.__getitem__`: `genes` (rows of `genes`, ascending; uint16, or uint32 over
        65,536 genes), `counts` (uint32; float32 where fractional), `cell_id`, `obs_name` and the obs values. With
        one, what the package's collators take: `input_ids` and `token_type_ids` (int64), with `values` also
        `expression_values`, with `whole_cell` also `cell_genes`, `cell_counts` and, where the files lack genes,
        `measured_genes`, then `cell_id` and the obs values, of categorical columns the codes (-1 where missing; a
        `ClassCode`, which knows the names). `cell_id` is the number of the cell in the files in the order given, so
        that masks do not depend on who reads the cell. With `truncation="random"` each epoch draws other genes, those
        that a store's cells of the same `cell_id` have in this epoch.

    Raises
    ------
    ValueError
        No files; no counts in one; a missing obs column; sources of different species; a rank, window or seed that
        cannot be. While reading: values that are not counts.
    FileNotFoundError
        No such file.

    Notes
    -----
    `GeneTokenizer.from_store` takes a dataset without tokenizer in place of a store.

    Each worker's last batch may be smaller, so a DataLoader of w workers gives up to w - 1 batches more than its
    length says; Trainer ends the epoch at that length, and leaves them out. Ranks differ by up to one cell. Cells
    without counts are not left out. A matrix that is stored by columns is regrouped, in temporary files, by every
    worker that reads of it, in every epoch: build a store of it.

    Examples
    --------
    >>> cells = IterableAnnDataset("atlas/*.h5ad", obs=["cell_type"])
    >>> tokenizer = GeneTokenizer.from_store(cells, phenotypes=["cell_type"])
    >>> dataset = IterableAnnDataset("atlas/*.h5ad", tokenizer, shuffle=True)
    >>> loader = DataLoader(dataset, 32, collate_fn=DataCollatorForPhenotypicMLM(tokenizer), num_workers=4)
    """

    def __init__(
        self,
        filenames: AnnData | CellStore | str | Path | Iterable[AnnData | CellStore | str | Path],
        tokenizer=None,
        *,
        obs: Sequence[str] | str | None = None,
        categories: Mapping[str, list[str]] | None = None,
        layer: str | None = None,
        fractional: bool = False,
        aliases: Mapping[str, str] | pd.DataFrame | str | Path | None = None,
        unify: str | None = None,
        shuffle: bool = False,
        buffer_size: int = 4096,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        allow_duplicates: bool = False,
    ):
        if not 0 <= rank < world_size:
            raise ValueError(f"rank={rank} of world_size={world_size}: ranks are 0 to world_size - 1.")
        if buffer_size < 1 or seed < 0:
            raise ValueError(f"buffer_size={buffer_size}, seed={seed}: a buffer holds a cell, and seeds start at 0.")
        filenames = [filenames] if is_source(filenames) else filenames
        found = expand(filenames)
        if not allow_duplicates:
            check_names(found)
        sources = [open_source(source, layer, fractional) for source in found]
        if not sources:
            raise ValueError("No files: give at least one file, folder, pattern, AnnData or store.")
        self.tokenizer = tokenizer
        self.fractional, self.shuffle, self.buffer_size, self.seed = fractional, shuffle, buffer_size, seed
        self.rank, self.world_size = rank, world_size

        names = [source.name for source in sources]
        united = unite([source.genes for source in sources], names, aliases=aliases, unify=unify)
        self.genes: GeneTable = united.genes
        shared: dict[bytes, np.ndarray] = {}  # most files have the same genes: one array for all of them
        rows = [shared.setdefault(genes.tobytes(), genes) for genes in united.rows]
        self._files = [
            _File(source.name, source.counts_in, source.matrix, genes)
            for source, genes in zip(sources, rows, strict=True)
        ]
        self._n_cells = np.array([source.shape[0] for source in sources])
        self._first_cell = np.cumsum(self._n_cells) - self._n_cells

        obs = [obs] if isinstance(obs, str) else list(obs or ())
        clash = sorted(_OWN_COLUMNS & set(obs))
        if clash:
            raise ValueError(f"obs column {', '.join(clash)}: the dataset uses this name; rename the column.")
        self._obs, self.categories = _read_obs(sources, obs, categories)
        self._phenotypes, self._phenotype_values = {}, {}
        self._obs_names = None
        if tokenizer is None:  # as Arrow strings, which are small and quickly sent to a worker
            self._obs_names = pa.concat_arrays(
                [pa.array(source.obs.index.astype(str), pa.large_string()) for source in sources]
            )
        else:
            self._phenotypes, self._phenotype_values = _read_obs(
                sources, tokenizer.included_phenotypes, tokenizer.phenotypes
            )

        # In shared memory: workers that outlive an epoch see the next one, and tell this process that they read.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        self._read_by_workers = torch.zeros((), dtype=torch.bool).share_memory_()
        self._progress: dict[str, Any] | None = None
        self._resumed_by: torch.Tensor | None = None

    @property
    def gene_ids(self) -> np.ndarray:
        """Ids of the gene table, object array (n_genes,)."""
        return self.genes.gene_ids

    @property
    def n_cells_of_files(self) -> np.ndarray:
        """Number of cells of each file, int array (n_files,)."""
        return self._n_cells

    def first_cells(self, file: int, n: int) -> sparse.csr_matrix:
        """Read the counts of the first cells of a file: (at most n, n_genes)."""
        return self._read([(file, 0, int(min(n, self._n_cells[file])))])

    def __len__(self) -> int:
        """Count the cells of an epoch of this rank, in all of its workers together."""
        start, stop = self._range(0, 1)
        return stop - start

    @property
    def epoch(self) -> int:
        """The epoch whose order is read."""
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Read in the order of another epoch; call it before the epoch's first cell. Reaches the workers of a loader.

        A position within another epoch, read or loaded, is forgotten.
        """
        if epoch != self.epoch:
            self._progress = self._resumed_by = None
            self._read_by_workers.fill_(False)
        self._epoch.fill_(epoch)

    @property
    def obs(self) -> dict[str, np.ndarray]:
        """The obs columns of all cells, in the order of the files: arrays (n_cells,), codes of categorical ones."""
        return dict(self._obs)

    # ------------------------------------------------------------------ state

    def state_dict(self) -> dict[str, Any]:
        """Tell where the reading is, in this process.

        Returns
        -------
        dict
            Plain numbers, strings, lists and dictionaries, for `load_state_dict`.

        Raises
        ------
        RuntimeError
            Workers of a DataLoader read: only the loader knows what it delivered (see `state_after`).
        """
        info = get_worker_info()
        if info is None and self._read_by_workers:
            raise RuntimeError(
                "Workers of a DataLoader read this dataset, ahead of what the loader has delivered: ask "
                "state_after(n_batches, batch_size, num_workers)."
            )
        progress = self._progress
        if progress is None or progress["epoch"] != self.epoch:
            progress = self._beginning(1 if info is None else info.num_workers)
        return {**progress, "taken": list(progress["taken"]), "settings": self._settings()}

    def state_after(
        self, n_batches: int, batch_size: int, num_workers: int = 0, drop_last: bool = False
    ) -> dict[str, Any]:
        """Tell where the reading is when a DataLoader has delivered so many batches of the epoch.

        Parameters
        ----------
        n_batches : int
            Batches of this epoch that were used, those before a resumption included.
        batch_size, num_workers, drop_last
            Those of the DataLoader (batch_size 1 where it does not batch); `in_order=False` is not covered. The
            loader that goes on must have the same.

        Returns
        -------
        dict
            For `load_state_dict`; a new loader over that dataset gives the remaining batches, in the same order.

        Raises
        ------
        ValueError
            The epoch has fewer batches.
        """
        n_workers = max(1, num_workers)
        n_cells = np.diff([self._range(worker, n_workers) for worker in range(n_workers)]).ravel()
        n_of_worker = n_cells // batch_size if drop_last else -(-n_cells // batch_size)
        if not 0 <= n_batches <= n_of_worker.sum():
            raise ValueError(f"n_batches={n_batches}: an epoch has {n_of_worker.sum()} batches of {batch_size} cells.")
        # The loader takes a batch of each worker in turn and passes over those that are done, whose numbers of
        # batches differ by at most one: only in the last round is anyone passed over.
        n_rounds, n_more = divmod(n_batches, n_workers)
        ahead = np.flatnonzero(n_of_worker > n_rounds)[:n_more]
        taken = np.full(n_workers, n_rounds)
        taken[ahead] += 1
        return {
            "epoch": self.epoch,
            "taken": np.minimum(taken * batch_size, n_cells).tolist(),
            "turn": int(ahead[-1] + 1) % n_workers if n_more else 0,
            "settings": self._settings(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where a state was taken: the next iteration gives the rest of its epoch, later ones whole epochs.

        Workers that run already (`persistent_workers`) do not learn of it: make a new DataLoader.

        Parameters
        ----------
        state : dict
            From `state_dict` (read on in one process) or `state_after` (with a DataLoader of as many workers).

        Raises
        ------
        ValueError
            The state is of other files (by their numbers of cells) or settings. While reading: of another number of
            workers.
        """
        settings, saved = self._settings(), state.get("settings", {})
        other = [name for name in settings if saved.get(name) != settings[name]]
        if other:
            found = ", ".join(f"{name} {saved.get(name)!r} instead of {settings[name]!r}" for name in other)
            raise ValueError(f"The state is of another dataset: {found}. Open the same files, with the same settings.")
        self._epoch.fill_(state["epoch"])
        self._progress = {"epoch": state["epoch"], "taken": list(state["taken"]), "turn": state["turn"]}
        self._resumed_by = torch.full((len(state["taken"]),), -1, dtype=torch.int64).share_memory_()
        self._read_by_workers.fill_(False)

    def _settings(self) -> dict[str, Any]:
        """Tell what the order depends on, but for the epoch; `files` stands for their numbers of cells."""
        return {
            "files": hashlib.sha256(self._n_cells.astype("<i8").tobytes()).hexdigest()[:16],
            "seed": self.seed,
            "shuffle": self.shuffle,
            "buffer_size": self.buffer_size,
            "world_size": self.world_size,
        }

    def _beginning(self, n_workers: int) -> dict[str, Any]:
        """Give the position at the beginning of an epoch.

        `taken` are the cells that were taken of each range of this rank, and `turn` is the range that the first
        worker reads: the one whose batch comes next.
        """
        return {"epoch": self.epoch, "taken": [0] * n_workers, "turn": 0}

    def _begin(self, worker: int, n_workers: int, loader: int) -> dict[str, Any]:
        """Give the position to read from: that of a loaded state once, to one loader; else the beginning.

        The process that loaded the state does not see its workers read, so they leave a mark in shared memory, their
        loader's number: workers of a second loader begin anew.
        """
        by = self._resumed_by
        if by is not None and self._progress["epoch"] == self.epoch and bool(((by < 0) | (by == loader)).all()):
            if len(by) != n_workers:
                raise ValueError(
                    f"The state was taken with {len(by)} workers reading, and now there are {n_workers}. Make the "
                    "DataLoader with as many as before (none and one are the same)."
                )
            if by[worker] < 0:
                by[worker] = loader
                return self._progress
        return self._beginning(n_workers)

    # ------------------------------------------------------------------ cells

    def __iter__(self) -> Iterator[dict[str, Any]]:
        info = get_worker_info()
        worker, n_workers, loader = (0, 1, 0) if info is None else (info.id, info.num_workers, info.seed - info.id)
        self._read_by_workers.fill_(info is not None)
        progress = self._progress = self._begin(worker, n_workers, loader)
        part = (worker + progress["turn"]) % n_workers
        pieces = []
        try:
            for pieces, order in self._windows(*self._range(part, n_workers), progress["taken"][part]):
                for example in self._examples(pieces, order):
                    progress["taken"][part] += 1
                    yield example
        finally:
            for file, _, _ in pieces[-1:]:
                self._files[file].matrix.close()

    def _range(self, part: int, n_parts: int) -> tuple[int, int]:
        """Give the range of the epoch's order that one of `n_parts` workers of this rank reads."""
        reader, n_readers = self.rank * n_parts + part, self.world_size * n_parts
        n_cells = int(self._n_cells.sum())
        return reader * n_cells // n_readers, (reader + 1) * n_cells // n_readers

    def _windows(self, start: int, stop: int, taken: int) -> Iterator[tuple[list[tuple[int, int, int]], np.ndarray]]:
        """Cut a range of the epoch's order into windows, without those whose cells are taken; reads nothing.

        Yields pieces (file, first row, last row + 1) of a window, and the order in which its cells come: positions in
        the pieces, without those that are taken.
        """
        key = [self.seed, self.epoch]
        n_files = len(self._files)
        files = np.random.default_rng(key).permutation(n_files) if self.shuffle else np.arange(n_files)
        lasts = np.cumsum(self._n_cells[files])
        firsts = lasts - self._n_cells[files]
        for first in range(start + taken // self.buffer_size * self.buffer_size, stop, self.buffer_size):
            last = min(first + self.buffer_size, stop)
            within = range(np.searchsorted(lasts, first, side="right"), np.searchsorted(firsts, last))
            pieces = [
                (int(files[i]), int(max(first - firsts[i], 0)), int(min(last, lasts[i]) - firsts[i]))
                for i in within
                if firsts[i] < lasts[i]
            ]
            order = np.arange(last - first)
            if self.shuffle:  # first + 1: a zero at its end would leave the key that of the files
                order = np.random.default_rng([*key, first + 1]).permutation(last - first)
            order = order[max(0, start + taken - first) :]
            if len(order):
                yield pieces, order

    def _cell_ids(self, pieces: list[tuple[int, int, int]]) -> np.ndarray:
        return np.concatenate([self._first_cell[file] + np.arange(start, stop) for file, start, stop in pieces])

    def _examples(self, pieces: list[tuple[int, int, int]], order: np.ndarray) -> Iterator[dict[str, Any]]:
        """Read a window and give its cells in an order."""
        counts, cell_ids = self._read(pieces), self._cell_ids(pieces)
        give = self._cells if self.tokenizer is None else self._tokens
        for first in range(0, len(order), _ROWS_PER_BLOCK):
            rows = order[first : first + _ROWS_PER_BLOCK]
            yield from give(counts[rows], cell_ids[rows])

    def _read(self, pieces: list[tuple[int, int, int]]) -> sparse.csr_matrix:
        blocks = []
        for number, start, stop in pieces:
            file = self._files[number]
            for block in checked_blocks(
                file.matrix, file.name, file.counts_in, self.fractional, _ROWS_PER_BLOCK, start, stop
            ):
                block = align(block, file.genes, len(self.genes))
                count_type_of(block.data, file.name)  # raises where they do not fit 32 bits
                blocks.append(block.astype(np.float32 if self.fractional else np.uint32))
            if stop == self._n_cells[number]:  # no window goes on with it
                file.matrix.close()
        return blocks[0] if len(blocks) == 1 else sparse.vstack(blocks, format="csr")

    def _cells(self, counts: sparse.csr_matrix, cell_ids: np.ndarray) -> Iterator[dict[str, Any]]:
        genes = counts.indices.astype(gene_type(len(self.genes)))
        names = self._obs_names.take(pa.array(cell_ids)).to_pylist()
        obs = {name: values[cell_ids] for name, values in self._obs.items()}
        for name in set(obs) & set(self.categories):
            obs[name] = np.array([*self.categories[name], np.nan], object)[obs[name]]
        obs = {name: as_objects(values) for name, values in obs.items()}
        for i, cell_id in enumerate(cell_ids.tolist()):
            own = slice(*counts.indptr[i : i + 2])
            yield {
                "genes": genes[own].copy(),  # not a view, which would hold on to the whole block
                "counts": counts.data[own].copy(),
                "cell_id": cell_id,
                "obs_name": names[i],
                **{name: values[i] for name, values in obs.items()},
            }

    def _tokens(self, counts: sparse.csr_matrix, cell_ids: np.ndarray) -> Iterator[dict[str, Any]]:
        cells = CellBatch(
            indptr=counts.indptr.astype(np.int64),
            genes=counts.indices,
            counts=counts.data,
            cell_id=cell_ids,
            obs={name: values[cell_ids] for name, values in self._phenotypes.items()},
            categories=self._phenotype_values,
            gene_ids=self.genes.gene_ids,  # the same array every time, which the tokenizer maps once
            symbols=self.genes.symbols,
        )
        tokens = self.tokenizer.encode_cells(cells, epoch=self.epoch)
        obs = {name: as_objects(values[cell_ids]) for name, values in self._obs.items()}
        for name in set(obs) & set(self.categories):
            obs[name] = [ClassCode(code, self.categories[name]) for code in obs[name]]
        for i, cell_id in enumerate(cell_ids.tolist()):
            own = slice(*tokens.indptr[i : i + 2])
            yield {
                "input_ids": tokens.input_ids[own].copy(),
                "token_type_ids": tokens.token_type_ids[own].copy(),
                **(
                    {}
                    if tokens.expression_values is None
                    else {"expression_values": tokens.expression_values[own].copy()}
                ),
                **_whole_cell(tokens, i),
                "cell_id": cell_id,
                **{name: values[i] for name, values in obs.items()},
            }


def _whole_cell(tokens: Any, cell: int) -> dict[str, np.ndarray]:
    """Return the counts of a cell of `TokenizedCells` with `whole_cell`, and what its files measure, if not all."""
    if tokens.cells is None:
        return {}
    own = slice(*tokens.cells.indptr[cell : cell + 2])
    counts = {"cell_genes": tokens.cells.columns[own].copy(), "cell_counts": tokens.cells.counts[own].copy()}
    return counts if tokens.measured is None else {**counts, "measured_genes": tokens.measured[0]}


def _read_obs(
    sources: Sequence[Source], names: Sequence[str], known: Mapping[str, list[str]] | None
) -> tuple[dict[str, np.ndarray], dict[str, list[str]]]:
    """Give obs columns of all sources, one after the other (n_cells,), and the names of the codes of labels.

    Labels are int32 codes, -1 where missing.
    """
    united = unite_obs(sources, names, known)
    columns = {}
    for name, kind in united.types.items():
        parts = [
            as_arrow(values[name], pa.type_for_alias(kind), source.shape[0])
            for source, values in zip(sources, united.values, strict=True)
        ]
        columns[name] = as_array(pa.chunked_array(parts))
    for name in united.categories:
        columns[name] = np.where(np.isnan(columns[name]), -1, columns[name]).astype(np.int32)
    return columns, united.categories


__all__ = ["IterableAnnDataset"]
