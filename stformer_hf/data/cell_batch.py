"""CellBatch: rows of a store as flat arrays, and the collate function that makes tensors of them."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import NoReturn

import numpy as np
import torch
from torch.utils.data import get_worker_info

from ..genes.gene_table import GeneTable
from .obs_columns import as_objects
from .worker_slots import SharedArrays


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
        Row numbers in the store (of a selection: in the whole store).
    obs : dict of str to array (n,)
        The obs columns; of categorical ones the codes, -1 where missing.
    categories : dict of str to list of str
        Names of the codes of the categorical columns.
    gene_ids, symbols : object array (n_genes,)
        Of the gene table; the same arrays in every batch of a store.
    path : Path, optional
        The store; by it another process finds the names of genes and categories, which are not sent with the cells.
    names_key : str
        Changes with these names.
    neighborhood : (indptr, genes, counts), optional
        For each cell the sum of its neighbours' counts, as the cells' own: indptr int64 (n + 1,), genes ascending,
        counts int64 (float64 where there are fractions), none of them 0. A cell is not its own neighbour, and each
        neighbour counts once, whatever its weight. There from `CellStore.with_neighborhoods`.
    """

    indptr: np.ndarray
    genes: np.ndarray
    counts: np.ndarray
    cell_id: np.ndarray
    obs: dict[str, np.ndarray]
    categories: dict[str, list[str]]
    gene_ids: np.ndarray
    symbols: np.ndarray
    path: Path | None = None
    names_key: str = ""
    neighborhood: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None

    def __len__(self) -> int:
        return len(self.cell_id)

    def __getitem__(self, cell: int) -> NoReturn:
        """Raise TypeError: torch's and transformers' own collate functions take the first item of a list here."""
        raise TypeError(
            "A CellBatch is not a list of cells: give the DataLoader over a CellStore a function that makes tensors "
            "of it, collate_fn=collate_cells, or a collator of a tokenizer, DataCollatorForPhenotypicMLM(tokenizer)."
        )

    def __reduce__(self):
        if self.path is None:
            return CellBatch, tuple(getattr(self, field.name) for field in fields(self))
        # Names of genes and categories are the same in every batch, and larger than the cells: read once by the
        # process that a worker sends its batches to.
        cells = (self.indptr, self.genes, self.counts, self.cell_id, self.obs)
        return _batch_of, (self.path, self.names_key, self.neighborhood, *cells)


def _batch_of(path: Path, names_key: str, neighborhood: tuple | None, *cells) -> CellBatch:
    return CellBatch(*cells, *_names(path, names_key), path, names_key, neighborhood)


@lru_cache(maxsize=8)
def _names(path: Path, key: str) -> tuple[dict[str, list[str]], np.ndarray, np.ndarray]:
    genes = GeneTable.from_parquet(path / "genes.parquet")
    categories = json.loads((path / "manifest.json").read_text())["categories"]
    return categories, genes.gene_ids, genes.symbols


class _Tensors(dict):
    """Tensors that go from a worker to its loader through one slot of shared memory."""

    def __reduce__(self):
        tensors = [value for value in self.values() if isinstance(value, torch.Tensor)]
        if any(tensor.device.type != "cpu" or tensor.dtype == torch.bfloat16 for tensor in tensors):
            return dict, (dict(self),)
        arrays = {name: value.numpy() for name, value in self.items() if isinstance(value, torch.Tensor)}
        others = {name: value for name, value in self.items() if name not in arrays}
        return _tensors, (arrays if get_worker_info() is None else SharedArrays(arrays), others)


def _tensors(arrays: dict[str, np.ndarray], others: dict[str, list]) -> _Tensors:
    return _Tensors({**{name: torch.from_numpy(array) for name, array in arrays.items()}, **others})


def collate_cells(batch: CellBatch) -> dict[str, torch.Tensor | list]:
    """Make tensors of a batch, without a loop over cells and without dense rows.

    Parameters
    ----------
    batch : CellBatch
        What a `DataLoader` over a `CellStore` gives its collate function.

    Returns
    -------
    dict
        `indptr` and `cell_id`: int64 (n + 1,) and (n,). `genes` (nnz,), rows of the gene table, and `counts` (nnz,),
        in the narrow types of the store: fewer bytes to a GPU, where `.long()` and `.float()` widen them.
        `obs_<column>`: codes (int64, -1 where missing) of categorical columns, numbers as they are, lists of strings
        and of dates.
        `torch.sparse_csr_tensor(indptr.int(), genes.int(), counts.float(), (n, n_genes))` is the batch as a matrix.
        `neighborhood_indptr`, `neighborhood_genes` and `neighborhood_counts`, where the batch has them.

    Raises
    ------
    TypeError
        A list of single cells.
    """
    if not isinstance(batch, CellBatch):
        raise TypeError(
            f"collate_cells takes a CellBatch, which a CellStore gives for many rows at once, not a "
            f"{type(batch).__name__}. Single cells (of a ConcatDataset, say) do not bring the names of their genes: "
            "make one store of several with CellStore.join, or CellStore.build(path, stores)."
        )
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
    return _Tensors(tensors)


__all__ = ["CellBatch", "collate_cells"]
