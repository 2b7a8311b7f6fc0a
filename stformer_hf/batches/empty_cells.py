"""Cells without counts are left out of what a model learns from or is scored on."""

from __future__ import annotations

from typing import Any

from torch.utils.data import Subset

from ..store.cell_store import CellStore


def without_empty_cells(dataset: Any) -> Any:
    """Leave the cells without counts out of a store, or of a subset of one; other datasets are returned as they are.

    Parameters
    ----------
    dataset : CellStore, torch.utils.data.Subset of one, or anything else
        What to train on.

    Returns
    -------
    The dataset itself, if it has no empty cell or is no store, else a selection of the store.
    """
    if isinstance(dataset, Subset) and isinstance(dataset.dataset, CellStore):
        dataset = dataset.dataset.select(dataset.indices)
    if not isinstance(dataset, CellStore):
        return dataset
    full = dataset.lengths > 0
    return dataset if full.all() else dataset.select(full)


__all__ = ["without_empty_cells"]
