"""Read torch's Subset (`random_split`) and ConcatDataset like the datasets that they combine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from datasets import Dataset as HuggingFaceDataset
from torch.utils.data import ConcatDataset, Subset

from .token_rows import TokenRows


def as_selection(dataset: Any) -> Any:
    """Return a dataset in which every Subset whose base has `select` is `base.select(indices)`, with the same rows.

    Such bases are a CellStore, a `datasets.Dataset` and a CenterMaskSampler. A dataset without such Subsets is
    returned as it is.
    """
    if isinstance(dataset, ConcatDataset):
        parts = [as_selection(part) for part in dataset.datasets]
        unchanged = all(part is before for part, before in zip(parts, dataset.datasets, strict=True))
        return dataset if unchanged else ConcatDataset(parts)
    if isinstance(dataset, Subset):
        base = as_selection(dataset.dataset)
        if hasattr(base, "select"):
            return base.select(np.asarray(dataset.indices, np.int64))
        return dataset if base is dataset.dataset else Subset(base, dataset.indices)
    return dataset


def as_token_rows(dataset: Any) -> Any:
    """Read the tokenized datasets that a dataset is made of as `TokenRows`, so that their rows know their classes."""
    dataset = as_selection(dataset)
    if isinstance(dataset, HuggingFaceDataset):
        return TokenRows(dataset)
    if not any(isinstance(base, HuggingFaceDataset) for base in bases(dataset)):
        return dataset
    if isinstance(dataset, Subset):
        return Subset(as_token_rows(dataset.dataset), dataset.indices)
    if isinstance(dataset, ConcatDataset):
        return ConcatDataset([as_token_rows(part) for part in dataset.datasets])
    return dataset


def bases(dataset: Any) -> list[Any]:
    """List the datasets that a dataset combines, or the dataset itself; an empty list for None."""
    if isinstance(dataset, ConcatDataset):
        return [base for part in dataset.datasets for base in bases(part)]
    if isinstance(dataset, (Subset, TokenRows)):
        return bases(dataset.dataset)
    return [] if dataset is None else [dataset]


def gather(dataset: Any, read: Callable[[Any], np.ndarray]) -> np.ndarray:
    """Return a value per row of a dataset, array (n, …), from those that `read` returns for the rows of each base."""
    if isinstance(dataset, ConcatDataset):
        return np.concatenate([gather(part, read) for part in dataset.datasets])
    if isinstance(dataset, Subset):
        return gather(dataset.dataset, read)[np.asarray(dataset.indices, np.int64)]
    return read(dataset)
