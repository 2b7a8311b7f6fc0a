"""IterableAnnDataset: cells streamed from files, each once per epoch for any number of workers and ranks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pyarrow as pa
import torch
from anndata import AnnData
from scipy import sparse
from torch.utils.data import IterableDataset, get_worker_info

from ..genes.gene_table import GeneTable
from ..genes.unite import unite
from ..models.gene_bert.cell_counts import telling_cells
from ..sources.formats import expand
from ..sources.obs_columns import ClassCode, as_array, as_arrow, as_objects, unite_obs
from ..sources.open_source import Source, open_source
from ..sources.same_cells import check_names
from ..store.cell_batch import CellBatch
from ..store.shards import align, count_type_of, gene_type
from .length_sampler import check_rank, check_settings, check_sizes, checksum, values_of

if TYPE_CHECKING:
    from ..store.cell_store import CellStore

_OWN_COLUMNS = {"cell_id", "input_ids", "token_type_ids", "expression_values"}
_OWN_COLUMNS |= {"cell_genes", "cell_counts", "measured_genes"}
_ROWS_PER_BLOCK = 512  # cells read, and tokenized, at once


class IterableAnnDataset(IterableDataset):
    """Cells streamed from files, tokenized on the fly, with only a buffer of cells in memory.

    The order of an epoch is a function of (seed, epoch). It is split into one contiguous range per worker of each
    rank, with sizes that differ by at most one, so every cell comes exactly once per epoch, even with more workers
    than files. If cells are read many times, a `CellStore` is faster and shuffles fully.

    Parameters
    ----------
    filenames : str, Path, AnnData, MuData, SpatialData, CellStore, or an iterable of them
        Sources as for `CellStore.build`: files, folders and patterns such as `data/*.h5ad`. Their genes are merged by
        id.
    tokenizer : GeneTokenizer, optional
        Tokenizes the cells. Obs must have the columns of its `included_phenotypes`.
    obs : sequence of str or str, optional
        Columns of obs to return with each cell.
    categories : mapping of str to list of str, optional
        Known categories of obs columns, such as `train.categories` for a test set: they keep their codes, and new ones
        are appended. By default categories are numbered in the order of the files.
    layer : str, optional
        Where the counts are, in every file: `X`, `raw` or a layer. By default the first of X, raw and the layer
        `counts` that holds counts.
    fractional : bool, default: False
        Allow fractional counts (RSEM, SoupX).
    aliases : mapping, DataFrame or file, optional
        Old gene id (or name) -> new id.
    unify : "symbol", optional
        Merge genes of different files that have the same symbol under different ids.
    shuffle : bool, default: False
        Permute the files, and then the cells in each window of `buffer_size`.
    buffer_size : int, default: 4096
        Number of cells that are read and mixed at once, and that a worker holds in memory (65 MB at 2,000 genes per
        cell).
    seed : int, default: 0
        Seed of the order.
    rank, world_size : int, default: 0, 1
        Which of how many equal parts this process reads; not taken from `torch.distributed`. By default `CellTrainer`
        reads the whole stream in each process, so that a step has the same cells on any number of processes. Pass the
        numbers of this process and of all of them if each process should read only its part, with `CellTrainer` or in
        a loop of your own. transformers' Trainer, and a loader that accelerate prepares, need 0 and 1: their main
        process reads for all.
    allow_duplicates : bool, default: False
        Accept files that hold the same cells by name, such as the raw and filtered files of one run.

    Attributes
    ----------
    genes : GeneTable
        Every gene of the files once.
    categories : dict of str to list of str
        Categories of the categorical columns in `obs`, in the order of their codes.
    sources, source_settings : list, dict
        What is read and how, so that `CellStore.build(path, stream.sources, **stream.source_settings)` holds the same
        cells in the order of the files. Copies, such as those of workers, have no `sources` (None).

    Yields
    ------
    dict
        Without a tokenizer as from `CellStore.__getitem__`: `genes` (rows of `genes`, ascending; uint16, or uint32 for
        over 65,536 genes), `counts` (uint32; float32 if fractional), `cell_id`, `obs_name` and the obs values. With a
        tokenizer, the inputs of the package's collators: `input_ids` and `token_type_ids` (int64); with `values` also
        `expression_values`; with `whole_cell` also `cell_genes`, `cell_counts` and, if the files lack genes,
        `measured_genes`; then `cell_id` and the obs values, with codes for categorical columns (-1 where missing; a
        `ClassCode`, which has the names). `cell_id` is the number of the cell in the files in the order given, so that
        masks do not depend on the process that reads the cell. With `truncation="random"` each epoch draws other
        genes, the same as for a store's cell with the same `cell_id` in that epoch.

    Raises
    ------
    ValueError
        There are no files; a file has no counts; an obs column is missing; sources are of different species; rank,
        buffer size or seed are invalid. While reading: values are not counts.
    FileNotFoundError
        A file does not exist.

    Notes
    -----
    `GeneTokenizer.from_store` accepts a dataset without a tokenizer instead of a store.

    The last batch of each worker may be smaller, so a DataLoader with w workers returns up to w - 1 more batches than
    its length; Trainer ends the epoch at that length, and skips them. Ranks differ by up to one cell. Cells without
    counts are not left out. A matrix that is stored by columns is regrouped, in temporary files, by every worker that
    reads from it, in every epoch: build a store from it.

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
        tokenizer: Any = None,
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
        check_rank(rank, world_size, seed)
        check_sizes(buffer_size=buffer_size)
        found = expand(filenames)
        if not allow_duplicates:
            check_names(found)
        self.sources: list[Any] | None = found
        self.source_settings: dict[str, Any] = {
            **{"layer": layer, "fractional": fractional, "aliases": aliases, "unify": unify},
            "allow_duplicates": allow_duplicates,
        }
        sources = [open_source(source, layer, fractional) for source in found]
        if not sources:
            raise ValueError("No files: pass at least one file, folder, pattern, AnnData or store.")
        self.tokenizer = tokenizer
        self.fractional, self.shuffle, self.buffer_size, self.seed = fractional, shuffle, buffer_size, seed
        self.rank, self.world_size = rank, world_size

        names = [source.name for source in sources]
        united = unite([source.genes for source in sources], names, aliases=aliases, unify=unify)
        self.genes: GeneTable = united.genes
        shared: dict[bytes, np.ndarray] = {}  # most files have the same genes: share one array
        rows = [shared.setdefault(genes.tobytes(), genes) for genes in united.rows]
        self._files = [source.align(genes) for source, genes in zip(sources, rows, strict=True)]
        self._n_cells = np.array([source.shape[0] for source in sources])
        self._first_cell = np.cumsum(self._n_cells) - self._n_cells

        obs = [obs] if isinstance(obs, str) else list(obs or ())
        clash = sorted(_OWN_COLUMNS & set(obs))
        if clash:
            raise ValueError(f"obs column {', '.join(clash)}: the dataset uses this name; rename the column.")
        self._obs, self.categories = _read_obs(sources, obs, categories)
        self._phenotypes: dict[str, np.ndarray] = {}
        self._phenotype_values: dict[str, list[str]] = {}
        self._obs_names: pa.Array | None = None
        if tokenizer is None:  # as Arrow strings, which are small and fast to send to a worker
            names = [as_arrow(source.obs_names, pa.large_string(), source.shape[0]) for source in sources]
            self._obs_names = pa.concat_arrays(names)
        else:
            self._phenotypes, self._phenotype_values = _read_obs(
                sources, tokenizer.included_phenotypes, tokenizer.phenotypes
            )

        # In shared memory: persistent workers see the next epoch, and this process sees that they read.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        self._read_by_workers = torch.zeros((), dtype=torch.bool).share_memory_()
        self._is_known = torch.zeros(len(sources), dtype=torch.bool).share_memory_()  # files whose first cells told
        self._progress: dict[str, Any] | None = None
        self._resumed_by: torch.Tensor | None = None

    @property
    def gene_ids(self) -> np.ndarray:
        """Gene ids of the gene table, object array (n_genes,)."""
        return self.genes.gene_ids

    @property
    def n_cells_of_files(self) -> np.ndarray:
        """Number of cells of each file, int array (n_files,)."""
        return self._n_cells

    def first_cells(self, file: int, n: int) -> sparse.csr_matrix:
        """Return the counts of the first cells of a file, (at most n, n_genes)."""
        return self._read([(file, 0, int(min(n, self._n_cells[file])))])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "sources": None}  # workers read from `_files`, and open files cannot be sent

    def __len__(self) -> int:
        """Return the number of cells of this rank in an epoch, over all of its workers."""
        start, stop = self._range(0, 1)
        return stop - start

    @property
    def epoch(self) -> int:
        """Epoch whose order is read."""
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, also for the workers of a loader; call it before the epoch's first cell.

        A position within another epoch is discarded.
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
        """Return the reading position in this process, as plain values for `load_state_dict`.

        Raises
        ------
        RuntimeError
            Workers of a DataLoader read, so only the loader knows what it delivered (see `state_after`).
        """
        info = get_worker_info()
        if info is None and self._read_by_workers:
            raise RuntimeError(
                "Workers of a DataLoader read this dataset ahead of the batches that the loader delivered: use "
                "state_after(n_batches, batch_size, num_workers)."
            )
        progress = self._progress
        if progress is None or progress["epoch"] != self.epoch:
            progress = self._beginning(1 if info is None else info.num_workers)
        return {**progress, "taken": list(progress["taken"]), "settings": self._settings()}

    def state_after(
        self, n_batches: int, batch_size: int, num_workers: int = 0, drop_last: bool = False
    ) -> dict[str, Any]:
        """Return the reading position after a DataLoader has delivered a number of batches of the epoch.

        Parameters
        ----------
        n_batches : int
            Number of batches of this epoch that were used, including those before a resumption.
        batch_size, num_workers, drop_last
            Settings of the DataLoader (batch_size 1 if it does not batch); `in_order=False` is not supported. The
            loader that resumes must have the same.

        Returns
        -------
        dict
            State for `load_state_dict`; a new loader over that dataset then returns the remaining batches, in the same
            order. An epoch of fewer batches raises a ValueError.
        """
        n_workers = max(1, num_workers)
        n_cells = np.diff([self._range(worker, n_workers) for worker in range(n_workers)]).ravel()
        n_of_worker = n_cells // batch_size if drop_last else -(-n_cells // batch_size)
        if not 0 <= n_batches <= n_of_worker.sum():
            raise ValueError(f"n_batches={n_batches}: an epoch has {n_of_worker.sum()} batches of {batch_size} cells.")
        # The loader takes one batch from each worker in turn and skips finished workers. Their numbers of batches
        # differ by at most one, so workers are skipped only in the last round.
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
        """Resume from a state: the next iteration returns the rest of its epoch, later ones whole epochs.

        Running workers (`persistent_workers`) do not see it: make a new DataLoader.

        Parameters
        ----------
        state : dict
            From `state_dict` (to resume in one process) or `state_after` (for a DataLoader with as many workers).

        Raises
        ------
        ValueError
            The state belongs to other files (by their numbers of cells) or settings. While reading: the number of
            workers differs.
        """
        check_settings(self._settings(), state, "dataset")
        self._epoch.fill_(state["epoch"])
        self._progress = {"epoch": state["epoch"], "taken": list(state["taken"]), "turn": state["turn"]}
        self._resumed_by = torch.full((len(state["taken"]),), -1, dtype=torch.int64).share_memory_()
        self._read_by_workers.fill_(False)

    def _settings(self) -> dict[str, Any]:
        """Return what the order depends on, except the epoch; `files` stands for their numbers of cells."""
        return {"files": checksum(self._n_cells), **values_of(self, "seed", "shuffle", "buffer_size", "world_size")}

    def _beginning(self, n_workers: int) -> dict[str, Any]:
        """Return the position at the beginning of an epoch.

        `taken` is the number of cells taken from each range of this rank, and `turn` is the range that the first
        worker reads: the one whose batch comes next.
        """
        return {"epoch": self.epoch, "taken": [0] * n_workers, "turn": 0}

    def _begin(self, worker: int, n_workers: int, loader: int) -> dict[str, Any]:
        """Return the position to read from: that of a loaded state once, for one loader; else the beginning.

        The process that loaded the state does not see its workers read, so they write their loader's number into
        shared memory: workers of a second loader start at the beginning.
        """
        by, progress = self._resumed_by, self._progress
        if by is None or progress is None:
            return self._beginning(n_workers)
        if progress["epoch"] == self.epoch and bool(((by < 0) | (by == loader)).all()):
            if len(by) != n_workers:
                raise ValueError(
                    f"The state was taken with {len(by)} workers, but now there are {n_workers}. Make the DataLoader "
                    "with as many as before (0 and 1 are the same)."
                )
            if by[worker] < 0:
                by[worker] = loader
                return progress
        return self._beginning(n_workers)

    # ------------------------------------------------------------------ cells

    def __iter__(self) -> Iterator[dict[str, Any]]:
        info = get_worker_info()
        worker, n_workers, loader = (0, 1, 0) if info is None else (info.id, info.num_workers, info.seed - info.id)
        self._read_by_workers.fill_(info is not None)
        progress = self._progress = self._begin(worker, n_workers, loader)
        part = (worker + progress["turn"]) % n_workers
        pieces: list[tuple[int, int, int]] = []
        try:
            for pieces, order in self._windows(*self._range(part, n_workers), progress["taken"][part]):
                for example in self._examples(pieces, order):
                    progress["taken"][part] += 1
                    yield example
        finally:
            for file, _, _ in pieces[-1:]:
                self._files[file].matrix.close()

    def _range(self, part: int, n_parts: int) -> tuple[int, int]:
        """Return the range of the epoch's order that one of `n_parts` workers of this rank reads."""
        reader, n_readers = self.rank * n_parts + part, self.world_size * n_parts
        n_cells = int(self._n_cells.sum())
        return reader * n_cells // n_readers, (reader + 1) * n_cells // n_readers

    def _windows(self, start: int, stop: int, taken: int) -> Iterator[tuple[list[tuple[int, int, int]], np.ndarray]]:
        """Split a range of the epoch's order into windows, without those whose cells are taken; read nothing.

        Yields pieces (file, first row, last row + 1) of a window, and the order of its cells: positions in the pieces,
        without those that are taken.
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
            if self.shuffle:  # first + 1: with a trailing zero the key would equal that of the files
                order = np.random.default_rng([*key, first + 1]).permutation(last - first)
            order = order[max(0, start + taken - first) :]
            if len(order):
                yield pieces, order

    def _cell_ids(self, pieces: list[tuple[int, int, int]]) -> np.ndarray:
        return np.concatenate([self._first_cell[file] + np.arange(start, stop) for file, start, stop in pieces])

    def _examples(self, pieces: list[tuple[int, int, int]], order: np.ndarray) -> Iterator[dict[str, Any]]:
        """Read a window and yield its cells in the given order."""
        counts, cell_ids = self._read(pieces), self._cell_ids(pieces)
        examples_of = self._cells if self.tokenizer is None else self._tokens
        for first in range(0, len(order), _ROWS_PER_BLOCK):
            rows = order[first : first + _ROWS_PER_BLOCK]
            yield from examples_of(counts[rows], cell_ids[rows])

    def _read(self, pieces: list[tuple[int, int, int]]) -> sparse.csr_matrix:
        blocks = []
        for number, start, stop in pieces:
            file = self._files[number]
            is_known = bool(self._is_known[number])
            for first, block in enumerate(file.blocks(_ROWS_PER_BLOCK, start, stop, is_known), start):
                if first == 0:
                    self._is_known[number] |= len(telling_cells(block.indptr)) > 0
                block = align(block, file.genes, len(self.genes))
                count_type_of(block.data, file.name)  # raises if they do not fit into 32 bits
                blocks.append(block.astype(np.float32 if self.fractional else np.uint32))
            if stop == self._n_cells[number]:  # no later window reads this file
                file.matrix.close()
        return blocks[0] if len(blocks) == 1 else sparse.vstack(blocks, format="csr")

    def _cells(self, counts: sparse.csr_matrix, cell_ids: np.ndarray) -> Iterator[dict[str, Any]]:
        genes = counts.indices.astype(gene_type(len(self.genes)))
        assert self._obs_names is not None  # there is no tokenizer
        names = self._obs_names.take(pa.array(cell_ids)).to_pylist()
        obs = {name: values[cell_ids] for name, values in self._obs.items()}
        for name in set(obs) & set(self.categories):
            obs[name] = np.array([*self.categories[name], np.nan], object)[obs[name]]
        obs = {name: as_objects(values) for name, values in obs.items()}
        for i, cell_id in enumerate(cell_ids.tolist()):
            own = slice(*counts.indptr[i : i + 2])
            yield {
                "genes": genes[own].copy(),  # not a view, which would keep the whole block alive
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
            gene_ids=self.genes.gene_ids,  # the same array every time: the tokenizer maps it once
            symbols=self.genes.symbols,
        )
        tokens = self.tokenizer.encode_cells(cells, epoch=self.epoch)
        obs = {name: as_objects(values[cell_ids]) for name, values in self._obs.items()}
        for name in set(obs) & set(self.categories):
            obs[name] = [ClassCode(code, self.categories[name]) for code in obs[name]]
        flat = {name: getattr(tokens, name) for name in ("input_ids", "token_type_ids", "expression_values")}
        flat = {name: values for name, values in flat.items() if values is not None}
        for i, cell_id in enumerate(cell_ids.tolist()):
            own = slice(*tokens.indptr[i : i + 2])
            yield {
                **{name: values[own].copy() for name, values in flat.items()},
                **_whole_cell(tokens, i),
                "cell_id": cell_id,
                **{name: values[i] for name, values in obs.items()},
            }


def _whole_cell(tokens: Any, cell: int) -> dict[str, np.ndarray]:
    """Return the counts of a cell of `TokenizedCells` with `whole_cell`, and its measured genes, if not all."""
    if tokens.cells is None:
        return {}
    own = slice(*tokens.cells.indptr[cell : cell + 2])
    counts = {"cell_genes": tokens.cells.columns[own].copy(), "cell_counts": tokens.cells.counts[own].copy()}
    return counts if tokens.measured is None else {**counts, "measured_genes": tokens.measured[0]}


def _read_obs(
    sources: Sequence[Source], names: Sequence[str], known: Mapping[str, list[str]] | None
) -> tuple[dict[str, np.ndarray], dict[str, list[str]]]:
    """Return the obs columns of all sources, concatenated (n_cells,), and the categories of labels.

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
