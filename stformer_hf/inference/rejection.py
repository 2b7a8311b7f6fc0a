"""Conformal rejection: thresholds of a score that reject a known share of known cells."""

from __future__ import annotations

import logging
from numbers import Real

import numpy as np

logger = logging.getLogger(__name__)

UNKNOWN = "unknown"  # label of a rejected cell


def check_reject(reject: float | None, classes: list[str]) -> None:
    """Raise a ValueError for a share that is not between 0 and 1, and for a class called "unknown"."""
    if reject is None:
        return
    if isinstance(reject, bool) or not isinstance(reject, Real) or not 0 < reject < 1:
        raise ValueError(f"reject={reject!r}: must be a share of the known cells between 0 and 1, such as 0.05.")
    if UNKNOWN in classes:
        raise ValueError(f"One of the classes is {UNKNOWN!r}, as rejected cells are: rename it, or leave out reject=…")


def rejection_thresholds(scores: np.ndarray, groups: np.ndarray, n_groups: int, reject: float) -> np.ndarray:
    """Compute the score below which a cell is rejected, for each group: float64 array (n_groups,).

    `scores` (n,) are those of cells of known types that the model has not seen; higher is more typical. `groups` (n,),
    int, are the groups of these cells, such as their classes. `reject` is the share of them that may be rejected.

    The threshold is the k-th lowest of n scores, k = floor(reject (n + 1)): a further cell of the group is below it
    with a probability of at most k / (n + 1), if it is exchangeable with the n cells (Vovk et al. 2005). Groups with
    k = 0 (fewer than 19 cells at 0.05) get the threshold of all cells together; if these are too few as well, it is
    -inf, which is logged.
    """
    pooled = kth_lowest(scores, reject)
    if pooled is None:
        fewest = int(np.ceil(1 / reject - 1e-9)) - 1
        logger.warning(
            f"No cell is rejected: reject={reject:g} needs at least {fewest} known cells to compare with, and there "
            f"are {len(scores)}."
        )
    found = np.full(n_groups, -np.inf if pooled is None else pooled)
    for group in range(n_groups):
        own = kth_lowest(scores[groups == group], reject)
        if own is not None:
            found[group] = own
    return found


def typicality(known: np.ndarray, cells: np.ndarray) -> np.ndarray:
    """Combine measures of how typical each of m cells is: the sum of the logs of its conformal p-values (Fisher).

    `known` (n, n_measures) are those of cells of known types that the model has not seen; higher is more typical. The
    sum, at most 0, is of ln((1 + number of known cells that are as atypical or more) / (1 + n)).
    """
    found = np.zeros(len(cells))
    for one, others in zip(known.T, cells.T, strict=True):
        found += np.log1p(np.searchsorted(np.sort(one), others, side="right")) - np.log1p(len(one))
    return found


def kth_lowest(scores: np.ndarray, reject: float) -> float | None:
    """Return the conformal threshold of one group, see `rejection_thresholds`; None if it has too few cells."""
    k = int(np.floor(reject * (len(scores) + 1) + 1e-9))  # 0.05 x 20 is 1, whatever the last digit
    return float(np.partition(scores, k - 1)[k - 1]) if k else None
