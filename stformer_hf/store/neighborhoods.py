"""Sum the counts of groups of cells, such as the neighbours of each cell."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

_GROUPS_AT_ONCE = 64  # groups that are read at once; few, since neighbourhoods may be large


def sum_groups(
    gather: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray, np.ndarray]],
    bounds: np.ndarray,
    cells: np.ndarray,
    n_genes: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sum the counts of groups of cells: group i consists of `cells[bounds[i]:bounds[i + 1]]`.

    `gather` reads cells by number and returns indptr, genes and counts, flat; counts are positive.

    Returns
    -------
    indptr : int64 array (n_groups + 1,)
    genes : array (nnz,) of the type that `gather` returns
        Ascending in each group.
    counts : int64 or float64 array (nnz,)
        Non-zero sums.

    Notes
    -----
    One dense row per group stays in the processor's cache, which is four times as fast as a sparse product, whose
    columns must be sorted. Sums are exact up to 2**53.
    """
    all_genes, all_counts = [], []
    for start in range(0, len(bounds) - 1, _GROUPS_AT_ONCE):
        own = bounds[start : start + _GROUPS_AT_ONCE + 1]
        indptr, genes, counts = gather(cells[own[0] : own[-1]])
        sum_type = np.float64 if counts.dtype.kind == "f" else np.int64
        ends = indptr[own - own[0]].tolist()
        for first, last in zip(ends, ends[1:], strict=False):
            sums = np.bincount(genes[first:last], counts[first:last], n_genes)
            found = np.flatnonzero(sums > 0)
            all_genes.append(found.astype(genes.dtype))
            all_counts.append(sums.take(found).astype(sum_type))
    if not all_genes:
        _, genes, counts = gather(cells[:0])
        return np.zeros(1, np.int64), genes, counts.astype(np.float64 if counts.dtype.kind == "f" else np.int64)
    indptr = np.cumsum([0, *map(len, all_genes)])
    return indptr, np.concatenate(all_genes), np.concatenate(all_counts)
