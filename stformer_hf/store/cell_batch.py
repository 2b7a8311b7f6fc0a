"""CellBatch: rows of a store as flat arrays, and the collate function that converts them to tensors."""

from __future__ import annotations

import hashlib
import io
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch

from ..genes.gene_table import GeneTable
from ..sources.obs_columns import as_objects
from .remote_files import RemoteFolder
from .worker_slots import CollatedBatch

# The k-th repeat of a cell in an epoch (`batches.repeats`) has the cell_id + k * REPEAT, for masks of its own.
REPEAT = 1 << 40


_Rows = tuple[np.ndarray, np.ndarray, np.ndarray]  # indptr, genes, counts
_Cells = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, np.ndarray]]  # rows, cell_id, obs


@dataclass
class CellBatch:
    """Rows of a store as flat arrays: the batch that a `DataLoader` over a `CellStore` passes to its collator.

    Attributes
    ----------
    indptr : int64 array (n + 1,)
        Cell i has the entries `indptr[i]:indptr[i + 1]` of `genes` and `counts`.
    genes : uint16 or uint32 array (nnz,)
        Rows of the gene table, ascending in each cell.
    counts : uint8, uint16, uint32 or float32 array (nnz,)
        Non-zero counts.
    cell_id : int64 array (n,)
        Row numbers in the whole store, also for batches of a selection. In a trainer with `sampling`, a cell that
        comes again in an epoch has this plus a multiple of 2**40, so that it is masked anew.
    obs : dict of str to array (n,)
        The obs columns; categorical ones as codes, -1 where missing.
    categories : dict of str to list of str
        Categories of the categorical columns, in the order of their codes.
    gene_ids, symbols : object array (n_genes,)
        Those of the gene table; the same arrays in every batch of a store.
    path : Path or RemoteFolder, optional
        Path of the store, from which another process reads the names of genes and categories; they are not sent with
        the cells.
    names_key : str
        A checksum of these names.
    neighborhood : (indptr, genes, counts), optional
        Sum of the counts of each cell's neighbours, laid out like the cells' own counts: indptr int64 (n + 1,), genes
        ascending, counts int64 (float64 if there are fractions), all non-zero. A cell is not its own neighbour, and
        each neighbour counts once, whatever its weight. Set by `CellStore.with_neighborhoods`.
    """

    indptr: np.ndarray
    genes: np.ndarray
    counts: np.ndarray
    cell_id: np.ndarray
    obs: dict[str, np.ndarray]
    categories: dict[str, list[str]]
    gene_ids: np.ndarray
    symbols: np.ndarray
    path: Path | RemoteFolder | None = None
    names_key: str = ""
    neighborhood: _Rows | None = None

    def __len__(self) -> int:
        return len(self.cell_id)

    def __iter__(self) -> Iterator[CellBatch]:
        """Iterate over the cells, as batches of one cell, which the collators join again."""
        return (self._cell(i) for i in range(len(self)))

    def _cell(self, i: int) -> CellBatch:
        def row(indptr: np.ndarray, genes: np.ndarray, counts: np.ndarray) -> _Rows:
            own = slice(indptr[i], indptr[i + 1])
            return indptr[i : i + 2] - indptr[i], genes[own], counts[own]

        indptr, genes, counts = row(self.indptr, self.genes, self.counts)
        return replace(
            self,
            indptr=indptr,
            genes=genes,
            counts=counts,
            cell_id=self.cell_id[i : i + 1],
            obs={name: values[i : i + 1] for name, values in self.obs.items()},
            neighborhood=None if self.neighborhood is None else row(*self.neighborhood),
        )

    def __getitem__(self, cell: int) -> NoReturn:
        """Raise TypeError: the collate functions of torch and transformers would take the first item of a list."""
        raise TypeError(
            "A CellBatch is not a list of cells: pass the DataLoader over a CellStore collate_fn=collate_cells, or a "
            "tokenizer's collator, such as DataCollatorForPhenotypicMLM(tokenizer)."
        )

    def __reduce__(self) -> tuple[Any, ...]:
        if self.path is None:
            return CellBatch, tuple(getattr(self, field.name) for field in fields(self))
        # Names of genes and categories are the same in every batch, and larger than the cells: the process that
        # receives a worker's batches reads them once.
        cells = (self.indptr, self.genes, self.counts, self.cell_id, self.obs)
        return _batch_of, (self.path, self.names_key, self.neighborhood, cells)


class Cell(Mapping):
    """A cell of a store, as `store[row]` returns it: a mapping that collators can tokenize.

    It is not a `dict`, because stock Trainer would remove all keys that the model's forward does not name. `batch` is
    the cell as a batch of one, which has the names of its genes.
    """

    def __init__(self, values: dict[str, Any], batch: CellBatch):
        self._values, self.batch = values, batch

    def __getitem__(self, name: str) -> Any:
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __repr__(self) -> str:
        return f"Cell({self._values!r})"


def as_cell_batch(examples: Any) -> Any:
    """Join single cells of stores into a `CellBatch`; return anything else unchanged.

    Cells come one by one from a `ConcatDataset` of stores, or through stock Trainer's removal of columns. Their stores
    must have the same genes and obs columns; where categories differ, columns hold names, not codes.
    """
    if isinstance(examples, CellBatch) or not isinstance(examples, (list, tuple)) or not len(examples):
        return examples
    parts = [example.batch if isinstance(example, Cell) else example for example in examples]
    if not all(isinstance(part, CellBatch) for part in parts):
        return examples
    first = parts[0]
    for part in parts:
        same_genes = part.gene_ids is first.gene_ids or np.array_equal(part.gene_ids, first.gene_ids)
        if not same_genes or list(part.obs) != list(first.obs):
            raise ValueError(
                f"Cells of {first.path} and {part.path} are in one batch, but the stores differ in their "
                f"{'obs columns' if same_genes else 'genes'}: merge them with CellStore.build(path, stores)."
            )
    neighborhoods = [part.neighborhood for part in parts if part.neighborhood is not None]
    if len(neighborhoods) not in (0, len(parts)):
        raise ValueError("Only some cells of the batch have neighbourhoods: see CellStore.with_neighborhoods.")
    obs, categories = _joined_obs(parts)
    indptr, genes, counts = _joined_rows([(part.indptr, part.genes, part.counts) for part in parts])
    return replace(
        first,
        indptr=indptr,
        genes=genes,
        counts=counts,
        cell_id=np.concatenate([part.cell_id for part in parts]),
        obs=obs,
        categories=categories,
        path=first.path if len({part.names_key for part in parts}) == 1 else None,
        neighborhood=_joined_rows(neighborhoods) if neighborhoods else None,
    )


def _joined_rows(rows: list[_Rows]) -> _Rows:
    indptrs, genes, counts = zip(*rows, strict=True)
    lengths = np.concatenate([np.diff(indptr) for indptr in indptrs])
    return np.concatenate([[0], np.cumsum(lengths)]), np.concatenate(genes), np.concatenate(counts)


def _joined_obs(parts: list[CellBatch]) -> tuple[dict[str, np.ndarray], dict[str, list[str]]]:
    """Return the obs columns of batches, and the categories of those that have the same everywhere."""
    obs, categories = {}, {}
    for name in parts[0].obs:
        named = [part.categories.get(name) for part in parts]
        same = all(of == named[0] for of in named)
        obs[name] = np.concatenate([part.obs[name] if same else _names_of(part, name) for part in parts])
        if same and named[0] is not None:
            categories[name] = named[0]
    return obs, categories


def _names_of(cells: CellBatch, column: str) -> np.ndarray:
    """Return the values of a column by name, None where missing: object array (n,)."""
    if column not in cells.categories:
        return cells.obs[column].astype(object)
    return np.array([*cells.categories[column], None], object)[cells.obs[column]]


def _batch_of(path: Path | RemoteFolder, names_key: str, neighborhood: _Rows | None, cells: _Cells) -> CellBatch:
    return CellBatch(*cells, *_names(path, names_key), path, names_key, neighborhood)


@lru_cache(maxsize=8)
def _names(path: Path | RemoteFolder, key: str) -> tuple[dict[str, list[str]], np.ndarray, np.ndarray]:
    genes = GeneTable.from_parquet(io.BytesIO((path / "genes.parquet").read_bytes()))
    manifest = json.loads((path / "manifest.json").read_bytes())
    if names_key(manifest) != key:
        raise ValueError(f"{path} was replaced after its cells were read: open it again.")
    return manifest["categories"], genes.gene_ids, genes.symbols


def names_key(manifest: Mapping[str, Any]) -> str:
    """Return a checksum of the names of genes and categories, to detect that another store took one's place."""
    categories = hashlib.sha256(json.dumps(manifest["categories"]).encode()).hexdigest()  # the same in every process
    return manifest["gene_table"]["checksum"] + categories


def collate_cells(batch: CellBatch) -> dict[str, torch.Tensor | list]:
    """Convert a batch to tensors, without a loop over cells and without dense rows.

    Parameters
    ----------
    batch : CellBatch, or list of Cell
        The batch that a `DataLoader` over a `CellStore`, or over a `ConcatDataset` of stores, passes to its collate
        function.

    Returns
    -------
    dict
        `indptr` and `cell_id`: int64 (n + 1,) and (n,). `genes` (nnz,), rows of the gene table, and `counts` (nnz,),
        in the narrow types of the store: fewer bytes go to the GPU, where `.long()` and `.float()` widen them.
        `obs_<column>`: codes (int64, -1 where missing) of categorical columns, numbers unchanged, strings and dates
        as lists.
        `torch.sparse_csr_tensor(indptr.int(), genes.int(), counts.float(), (n, n_genes))` is the batch as a matrix.
        `neighborhood_indptr`, `neighborhood_genes` and `neighborhood_counts`, if the batch has them.

    Raises
    ------
    TypeError
        The input is not cells of a store.
    ValueError
        The stores of the cells differ in their genes or obs columns.
    """
    batch = as_cell_batch(batch)
    if not isinstance(batch, CellBatch):
        raise TypeError(f"collate_cells takes cells of a CellStore, got {type(batch).__name__}.")
    tensors: dict[str, torch.Tensor | list] = {
        "indptr": torch.from_numpy(batch.indptr),
        "genes": torch.from_numpy(batch.genes),
        "counts": torch.from_numpy(batch.counts),
        "cell_id": torch.from_numpy(batch.cell_id),
    }
    if batch.neighborhood is not None:
        for name, values in zip(("indptr", "genes", "counts"), batch.neighborhood, strict=True):
            tensors[f"neighborhood_{name}"] = torch.from_numpy(values)
    for name, values in batch.obs.items():
        tensors[f"obs_{name}"] = torch.from_numpy(values) if values.dtype.kind in "iufb" else as_objects(values)
    return CollatedBatch(tensors)


def small_batches(batches: Iterable[dict[str, Any]], batch_size: int) -> Iterator[dict[str, Any]]:
    """Split the batches of `collate_cells` into smaller ones, without copying them.

    Getting a batch from a worker takes about as long as reading 64 cells, so small batches are best read several at a
    time: a loader of 512 cells, split by 64, gives the batches of a loader of 64. Without workers nothing is gained.

    Parameters
    ----------
    batches : iterable of dict
        Batches of `collate_cells`, such as a `DataLoader` over a `CellStore`.
    batch_size : int
        Cells per small batch. If it does not divide the size of the large ones, the last part of each is smaller.

    Returns
    -------
    iterator of dict
        See `collate_cells`.

    Raises
    ------
    ValueError
        `batch_size` is below 1.

    Examples
    --------
    >>> loader = DataLoader(store, 512, shuffle=True, collate_fn=collate_cells, num_workers=2)
    >>> for batch in small_batches(loader, 64):
    ...     ...
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
    return _split(batches, batch_size)  # a generator, which runs only when it is read


def _split(batches: Iterable[dict[str, Any]], batch_size: int) -> Iterator[dict[str, Any]]:
    for batch in batches:
        prefixes = [name.removesuffix("indptr") for name in batch if name in ("indptr", "neighborhood_indptr")]
        n_cells = len(batch["cell_id"])
        cuts = [*range(0, n_cells, batch_size), n_cells]
        bounds = {prefix: batch[f"{prefix}indptr"][cuts].tolist() for prefix in prefixes}
        for i, (start, stop) in enumerate(itertools.pairwise(cuts)):
            small = {name: values[start:stop] for name, values in batch.items()}
            for prefix, at in bounds.items():
                small[f"{prefix}indptr"] = batch[f"{prefix}indptr"][start : stop + 1] - at[i]
                for name in (f"{prefix}genes", f"{prefix}counts"):
                    small[name] = batch[name][at[i] : at[i + 1]]
            yield small
