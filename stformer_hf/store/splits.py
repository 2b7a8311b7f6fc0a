"""Split cells at random into training and held-out ones; duplicates and groups stay on one side."""

from __future__ import annotations

import numpy as np
import pandas as pd

from ..sources.same_cells import join_groups


def split_cells(twins: np.ndarray, test_size: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return training and held-out cells, int64 arrays, ascending; cells with the same number in `twins` are one."""
    from sklearn.model_selection import ShuffleSplit  # a second of imports

    firsts, of_cell = np.unique(twins, return_index=True, return_inverse=True)[1:]
    _, chosen = next(ShuffleSplit(1, test_size=test_size, random_state=seed).split(firsts))
    held_out = np.isin(of_cell, chosen)
    return np.flatnonzero(~held_out), np.flatnonzero(held_out)


def split_groups(twins: np.ndarray, column: pd.Series, test_size: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return training and held-out cells, as `split_cells`, whose values of an obs column are not shared.

    Groups with a cell in common count as one.
    """
    from sklearn.model_selection import GroupShuffleSplit

    by = column.name
    if column.isna().any():
        raise ValueError(f"{int(column.isna().sum())} cells have no {by!r}: remove them with select first.")
    if column.nunique() < 2:
        raise ValueError(
            f"All {len(column)} cells to split have the same {by!r}, {column.iloc[0]!r}: no other can be held out."
        )
    groups = column.astype(str).to_numpy()
    if len(np.unique(twins)) < len(twins):
        groups = join_groups(groups, twins)
        if len(np.unique(groups)) < 2:
            raise ValueError(f"All groups of {by!r} share cells (same barcode and counts): remove duplicates first.")
    splitter = GroupShuffleSplit(1, test_size=test_size, random_state=seed)
    train, test = next(splitter.split(np.arange(len(twins)), groups=groups))
    return np.sort(train), np.sort(test)
