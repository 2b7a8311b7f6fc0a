"""CellBatch: rows of a store as flat arrays, and the collate function that makes tensors of them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch


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
    """

    indptr: np.ndarray
    genes: np.ndarray
    counts: np.ndarray
    cell_id: np.ndarray
    obs: dict[str, np.ndarray]
    categories: dict[str, list[str]]
    gene_ids: np.ndarray
    symbols: np.ndarray

    def __len__(self) -> int:
        return len(self.cell_id)


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
        `obs_<column>`: codes (int64, -1 where missing) of categorical columns, numbers as they are, lists of strings.
        `torch.sparse_csr_tensor(indptr.int(), genes.int(), counts.float(), (n, n_genes))` is the batch as a matrix.
    """
    tensors: dict[str, torch.Tensor | list] = {
        "indptr": torch.from_numpy(batch.indptr),
        "genes": torch.from_numpy(batch.genes),
        "counts": torch.from_numpy(batch.counts),
        "cell_id": torch.from_numpy(batch.cell_id),
    }
    for name, values in batch.obs.items():
        tensors[f"obs_{name}"] = torch.from_numpy(values) if values.dtype.kind in "iufb" else values.tolist()
    return tensors


__all__ = ["CellBatch", "collate_cells"]
