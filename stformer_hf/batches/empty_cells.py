"""Cells without counts are left out of what a model learns from or is scored on."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch.utils.data import Subset

from ..store.cell_store import CellStore
from .parts import as_selection, bases, gather


def without_empty_cells(dataset: Any) -> Any:
    """Leave the cells without counts out of stores, and of Subsets and ConcatDatasets of them.

    Parameters
    ----------
    dataset : any dataset
        What to train on; rows of other kinds than cells of a store all stay.

    Returns
    -------
    The dataset, as a selection of the store where it is a Subset (`as_selection`).
    """
    dataset = as_selection(dataset)
    if not any(isinstance(base, CellStore) for base in bases(dataset)):
        return dataset
    full = gather(dataset, lambda base: base.lengths > 0 if isinstance(base, CellStore) else np.ones(len(base), bool))
    return dataset if full.all() else as_selection(Subset(dataset, np.flatnonzero(full)))


__all__ = ["without_empty_cells"]
