"""Measure how well an embedding mixes batches: the metrics of scib-metrics without it, and its kBET if installed."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

import numpy as np
from scipy import sparse
from scipy.sparse.csgraph import connected_components

from .clusters import find_by_bisection, nearest_others, silhouettes

_N_CONNECTED, _N_KBET, _N_LISI = 15, 50, 90  # neighbours including the cell itself, as in scib-metrics


def scib_version() -> str | None:
    """Return the version of scib-metrics; None if it is not installed."""
    try:
        return version("scib-metrics")
    except PackageNotFoundError:
        return None


def integration_scores(embedding: np.ndarray, labels: np.ndarray, batches: np.ndarray) -> dict[str, float]:
    """Score the mixing of batches, at most 1, larger is better; see Luecken et al. 2022, Nature Methods 19:41.

    A high score is not a merit if batches differ in biology: constant or random embeddings mix perfectly. The values
    equal those of scib-metrics, but do not need jax.

    `embedding` (n_cells, d) is that of cells with `labels` and `batches` (n_cells,), of which there are at least two.

    Returns
    -------
    dict of str to float
        `batch_silhouette`: 1 - |silhouette of the batches| within a class, mean over classes (NaN if no class has two
        batches). `batch_ilisi`: median over cells of the inverse Simpson index of the batches around them, scaled to
        0 to 1. `batch_pcr`: 1 - share of the embedding's variance between the means of the batches (principal
        component regression). `connectivity`: share of a class in the largest component of its graph of 15
        neighbours, mean over classes.
    """
    return {
        "batch_silhouette": batch_silhouette(embedding, labels, batches),
        "batch_ilisi": batch_ilisi(embedding, batches),
        "batch_pcr": batch_pcr(embedding, batches),
        "connectivity": connectivity(embedding, labels),
    }


def batch_kbet(embedding: np.ndarray, labels: np.ndarray, batches: np.ndarray) -> float:
    """Compute the acceptance rate of kBET within classes (Buettner et al. 2019) with scib-metrics; takes a minute."""
    try:
        import scib_metrics
        from scib_metrics.nearest_neighbors import NeighborsResults
    except ImportError as error:
        raise ImportError(f"kBET needs its extra: pip install 'stformer_hf[scib]' ({error}).") from error
    distances, cells = nearest_others(embedding, min(_N_KBET, len(embedding)) - 1)
    itself = np.arange(len(embedding))[:, None]
    found = NeighborsResults(
        indices=np.hstack([itself, cells]), distances=np.hstack([np.zeros_like(distances[:, :1]), distances])
    )
    return float(scib_metrics.kbet_per_label(found, batches, labels))


def batch_silhouette(embedding: np.ndarray, labels: np.ndarray, batches: np.ndarray) -> float:
    """Compute 1 - |silhouette of the batches| within each class, the mean over classes with at least two batches."""
    scores = []
    for name in np.unique(labels):
        here = labels == name
        n_batches = len(np.unique(batches[here]))
        if 1 < n_batches < here.sum():
            scores.append(np.mean(1 - np.abs(silhouettes(embedding[here], batches[here]))))
    return float(np.mean(scores)) if scores else float("nan")


def batch_ilisi(embedding: np.ndarray, batches: np.ndarray) -> float:
    """Compute the median inverse Simpson index of the batches around each cell (LISI), scaled to 0 to 1.

    The 89 nearest cells have weights exp(-beta distance), with beta such that the perplexity is 30 (Korsunsky et al.
    2019).
    """
    names, codes = np.unique(batches, return_inverse=True)
    n_counted = min(_N_LISI, len(embedding))
    distances, cells = nearest_others(embedding, n_counted - 1)
    wanted = np.log(n_counted // 3)
    beyond = distances - distances[:, :1]  # the same shares, and no underflow

    def is_narrow(beta: np.ndarray) -> np.ndarray:
        shares = np.exp(-beyond * beta[:, None])
        totals = shares.sum(axis=1)
        return ~(np.log(totals) + beta * (beyond * shares).sum(axis=1) / totals > wanted)  # the entropy

    beta = find_by_bisection(is_narrow, len(embedding), 60)
    shares = np.exp(-beyond * beta[:, None])
    of_batch = np.stack([(shares * (codes[cells] == code)).sum(axis=1) for code in range(len(names))])
    simpson = ((of_batch / of_batch.sum(axis=0)) ** 2).sum(axis=0)
    return float((np.median(1 / simpson) - 1) / (len(names) - 1))


def batch_pcr(embedding: np.ndarray, batches: np.ndarray) -> float:
    """Compute 1 - share of the variance that lies between the means of the batches; NaN for a constant embedding.

    Principal component regression weights the R^2 of each component by its variance. Summed over all components, this
    is the share of the whole variance, so the components are not needed.
    """
    centred = embedding - embedding.mean(axis=0)
    total = (centred**2).sum()
    parts = (centred[batches == name] for name in np.unique(batches))  # in an order that no hash seed changes
    between = sum(len(part) * (part.mean(axis=0) ** 2).sum() for part in parts)
    return float(1 - between / total) if total > 0 else float("nan")


def connectivity(embedding: np.ndarray, labels: np.ndarray) -> float:
    """Compute the share of a class in the largest strongly connected component of its graph, mean over classes."""
    n_others = min(_N_CONNECTED, len(embedding)) - 1
    cells = nearest_others(embedding, n_others)[1]
    rows = np.repeat(np.arange(len(embedding)), n_others)
    graph = sparse.csr_array((np.ones(cells.size), (rows, cells.ravel())), shape=(len(embedding),) * 2)
    shares = []
    for name in np.unique(labels):
        here = np.flatnonzero(labels == name)
        parts = connected_components(graph[here][:, here], connection="strong")[1]
        shares.append(np.bincount(parts).max() / len(here))
    return float(np.mean(shares))
