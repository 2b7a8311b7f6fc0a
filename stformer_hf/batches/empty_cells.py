"""Leave cells without counts out of training and evaluation."""

from __future__ import annotations

from typing import Any

from torch.utils.data import Subset

from ..store.cell_store import CellStore


def without_empty_cells(dataset: Any) -> Any:
    """Return a store, or a subset of one, without the cells that have no counts; other datasets are not changed.

    Parameters
    ----------
    dataset : CellStore, torch.utils.data.Subset of one, or anything else
        Dataset to train on.

    Returns
    -------
    The dataset itself, if it has no empty cells or is not a store, else a selection of the store.
    """
    if isinstance(dataset, Subset) and isinstance(dataset.dataset, CellStore):
        dataset = dataset.dataset.select(dataset.indices)
    if not isinstance(dataset, CellStore):
        return dataset
    full = dataset.lengths > 0
    return dataset if full.all() else dataset.select(full)


__all__ = ["without_empty_cells"]
