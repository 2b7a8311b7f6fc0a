"""Collate rows of a `SingleCellMemMapDataset` to sparse torch matrices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch


def collate_sparse_matrix_batch(batch: Sequence[torch.Tensor]) -> torch.Tensor:
    """Make a sparse matrix from rows.

    Parameters
    ----------
    batch : sequence of tensor (2, nnz)
        Values and columns of each row, as returned by a `SingleCellMemMapDataset`, on the CPU. Column numbers above
        2**24 are not exact in float32.

    Returns
    -------
    sparse CSR tensor (n_rows, n_columns)
        Matrix with the dtype of the rows, up to the last column that occurs (0 columns if none does).
    """
    rows = torch.cat(list(batch), dim=1)
    columns = rows[1].numpy().astype(np.int64)
    return _csr(rows[0], columns, [row.shape[1] for row in batch], _n_columns(columns))


def collate_neighbor_sparse_matrix_batch(batch: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Make sparse matrices from cells and their neighbours.

    Parameters
    ----------
    batch : sequence of dict
        Results of `SingleCellMemMapDataset.get_row_with_neighbor`.

    Returns
    -------
    dict
        `current_cells` and `next_cells`: float32 sparse CSR tensors (n_rows, n_columns), with the same columns, up to
        the last one that occurs in either; `current_cell_indices` and `next_cell_indices`: lists of row numbers;
        `batch_size`. Values above 2**24 are rounded to float32.
    """
    cells = [item[name] for name in ("current_cell", "next_cell") for item in batch]
    values = torch.from_numpy(np.concatenate([np.asarray(values, np.float32) for values, _ in cells]))
    columns = np.concatenate([np.asarray(columns, np.int64) for _, columns in cells])
    lengths = [len(values) for values, _ in cells]
    n_current, n_columns = sum(lengths[: len(batch)]), _n_columns(columns)
    return {
        "current_cells": _csr(values[:n_current], columns[:n_current], lengths[: len(batch)], n_columns),
        "next_cells": _csr(values[n_current:], columns[n_current:], lengths[len(batch) :], n_columns),
        "current_cell_indices": [item["current_cell_index"] for item in batch],
        "next_cell_indices": [item["next_cell_index"] for item in batch],
        "batch_size": len(batch),
    }


def _n_columns(columns: np.ndarray) -> int:
    return int(columns.max(initial=-1)) + 1


def _csr(values: torch.Tensor, columns: np.ndarray, lengths: Sequence[int], n_columns: int) -> torch.Tensor:
    indptr = torch.from_numpy(np.cumsum([0, *lengths]))
    shape = (len(lengths), n_columns)
    # Set explicitly, since torch warns otherwise; columns are below n_columns by construction.
    return torch.sparse_csr_tensor(indptr, torch.from_numpy(columns), values, shape, check_invariants=False)
