"""Estimate the score that noise allows at half the depth: one half of each cell's counts predicts the other."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy import sparse

from .cell_baselines import log_normalise
from .clusters import agreement, leiden, neighbor_graph
from .readers import fit_knn, fit_pca, fit_probe


class Ceiling(NamedTuple):
    """Predictions for one half of every cell, by readers fitted to the other half and its label."""

    knn: np.ndarray  # predicted class of each cell (n_cells,)
    probe: np.ndarray
    halves: tuple[np.ndarray, np.ndarray]  # components of each, fitted on its own: float64 (n_cells, n_components)


def split_counts(counts: sparse.csr_array, rng: np.random.Generator) -> tuple[sparse.csr_array, sparse.csr_array]:
    """Divide counts at random into two halves: csr_arrays (n_cells, n_genes) that sum to `counts`.

    For Poisson counts, the halves are independent given the cell's expression (binomial thinning; Neufeld et al.
    2024).
    """
    first = counts.copy()
    first.data = rng.binomial(counts.data.astype(np.int64), 0.5)
    second = counts.copy()
    second.data = counts.data.astype(np.int64) - first.data
    first.eliminate_zeros()
    second.eliminate_zeros()
    return first, second


def measure_ceiling(counts: sparse.csr_array, labels: np.ndarray, seed: int) -> Ceiling:
    """Fit the baselines on one half of every cell's counts, and predict the other halves of the same cells.

    The readers have seen each cell and its label with other noise: what they miss is lost in the noise of the counts
    (cell-eval's `--ceiling` has the same aim, but splits resampled cells, not counts). It is not a strict bound: a
    half has half the depth, so a reader of whole cells may exceed it, and so may a better reader than these.

    `counts` (n_cells, n_genes) are integers; `seed` is that of the split and of the PCA.
    """
    first, second = map(log_normalise, split_counts(counts, np.random.default_rng(seed)))
    pca = fit_pca(first, seed)
    return Ceiling(
        knn=fit_knn(pca(first), labels).predict(pca(second)),
        probe=fit_probe(first, labels).predict(second),
        halves=(pca(first), fit_pca(second, seed)(second)),
    )


def cluster_agreement(halves: tuple[np.ndarray, np.ndarray], seed: int) -> dict[str, float]:
    """Compare the Leiden clusters of both halves at resolution 1: `leiden_ari` and `leiden_nmi`."""
    return agreement(*(leiden(neighbor_graph(half), 1.0, seed) for half in halves))
