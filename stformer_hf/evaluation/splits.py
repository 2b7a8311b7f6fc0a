"""Folds that keep twins (copies of a cell) and groups such as donors together, and draws of a few labelled cells."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from sklearn.model_selection import StratifiedKFold

from ..sources.same_cells import find_twins, join_groups

_SPREADS = 100


class Fold(NamedTuple):
    """One split of the cells; rows ascend."""

    repeat: int
    number: int  # within the repeat
    train: np.ndarray  # int64
    test: np.ndarray  # int64


def make_folds(
    labels: np.ndarray,
    twins: np.ndarray,
    *,
    n_splits: int,
    n_repeats: int,
    seed: int,
    groups: np.ndarray | None = None,
) -> list[Fold]:
    """Split cells into folds stratified by class (`labels`), with new folds, of the next seed, in each repeat.

    Twins, int array (n_cells,) of `find_twins`, are never on both sides, nor are `groups`, such as the donors of the
    cells; groups that share twins count as one.

    Raises
    ------
    ValueError
        There are fewer groups than folds; repeats are requested, but each fold is one group.
    """
    if groups is not None:
        groups = join_groups(groups, twins)
        n_groups = len(np.unique(groups))
        if n_groups < n_splits:
            raise ValueError(f"{n_groups} groups of cells cannot make {n_splits} folds: pass fewer (n_splits).")
        if n_groups == n_splits and n_repeats > 1:
            raise ValueError(
                f"Folds of one group each are the same in every repeat: pass n_repeats=1, not {n_repeats}."
            )
    firsts, twin_of_cell = np.unique(twins, return_index=True, return_inverse=True)[1:]
    folds = []
    for repeat in range(n_repeats):
        if groups is None:
            splitter = StratifiedKFold(n_splits, shuffle=True, random_state=seed + repeat)
            number_of_twin = np.empty(len(firsts), np.int64)
            for number, (_, test) in enumerate(splitter.split(firsts, labels[firsts])):
                number_of_twin[test] = number
            number_of_cell = number_of_twin[twin_of_cell]
        else:
            number_of_cell = _spread_groups(labels, groups, n_splits, np.random.default_rng(seed + repeat))
        for number in range(n_splits):
            here = number_of_cell == number
            folds.append(Fold(repeat, number, np.flatnonzero(~here), np.flatnonzero(here)))
    return folds


def _spread_groups(labels: np.ndarray, groups: np.ndarray, n_splits: int, rng: np.random.Generator) -> np.ndarray:
    """Assign groups to folds by the most even of 100 random assignments; return the fold of each cell.

    scikit-learn's StratifiedGroupKFold processes the groups in a fixed order, and makes the same folds in each repeat.
    """
    sizes = pd.crosstab(groups, labels).to_numpy()  # (n_groups, n_classes), groups in ascending order
    best, least = np.empty(0, np.int64), np.inf
    for _ in range(_SPREADS):
        folds = rng.permutation(np.arange(len(sizes)) % n_splits)
        by_fold = np.stack([sizes[folds == number].sum(axis=0) for number in range(n_splits)])
        unevenness = ((by_fold - sizes.sum(axis=0) / n_splits) ** 2 / sizes.sum(axis=0)).sum()
        if unevenness < least:
            best, least = folds, unevenness
    return best[np.unique(groups, return_inverse=True)[1]]


def draw_labelled(
    labels: np.ndarray, train: np.ndarray, classes: Sequence, n: int, rng: np.random.Generator
) -> np.ndarray:
    """Draw `n` training cells of each class: int64 array (n * n_classes,) of rows, without repetition."""
    return np.concatenate([rng.choice(train[labels[train] == name], n, replace=False) for name in classes])


__all__ = ["Fold", "draw_labelled", "find_twins", "make_folds"]
