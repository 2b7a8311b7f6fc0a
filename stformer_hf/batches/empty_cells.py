"""Leave cells without counts out of training and evaluation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from torch.utils.data import Subset

from ..store.cell_store import CellStore
from .draws import check_sampling
from .parts import as_selection, bases, gather


def without_empty_cells(dataset: Any) -> Any:
    """Return a dataset without the cells of stores that have no counts; other rows are all kept.

    A Subset of a store becomes a selection of it; see `as_selection`.
    """
    dataset = as_selection(dataset)
    if not any(isinstance(base, CellStore) for base in bases(dataset)):
        return dataset
    full = have_counts(dataset)
    return dataset if full.all() else as_selection(Subset(dataset, np.flatnonzero(full)))


def have_counts(dataset: Any) -> np.ndarray:
    """Return which rows `without_empty_cells` keeps: bool array (n,)."""
    return gather(dataset, lambda base: base.lengths > 0 if isinstance(base, CellStore) else np.ones(len(base), bool))


def sampling_of_full_cells(sampling: Mapping[str, Any] | None, dataset: Any) -> dict[str, Any] | None:
    """Check the names of `sampling`; an array of weights loses those of the cells without counts, as the cells do."""
    if sampling is None:
        return None
    check_sampling(sampling)
    weights = sampling.get("weights")
    if weights is None or isinstance(weights, str) or not hasattr(dataset, "__len__"):
        return dict(sampling)
    if len(weights) != len(dataset):
        raise ValueError(f"sampling: {len(weights)} weights for {len(dataset)} rows: one is needed for each.")
    return {**sampling, "weights": np.asarray(weights)[have_counts(as_selection(dataset))]}
