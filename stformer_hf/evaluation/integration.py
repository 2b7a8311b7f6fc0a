"""How well an embedding mixes batches: the metrics of scib-metrics where it is installed, else plain forms of them."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

import numpy as np
from scipy import sparse
from scipy.sparse.csgraph import connected_components
from sklearn.metrics import silhouette_samples
from sklearn.neighbors import NearestNeighbors

_N_CONNECTED = 15  # the cell itself among them
_N_MIXED = 30  # the perplexity of LISI, here a plain number of neighbours
_N_LISI, _N_KBET = 90, 50  # of scib-metrics, the cell itself among them


def integration_source() -> str:
    """Name what computes the integration metrics: scib-metrics with its version, or the plain forms."""
    try:
        return f"scib-metrics {version('scib-metrics')}"
    except PackageNotFoundError:
        return "plain forms (scib-metrics is not installed)"


def integration_scores(embedding: np.ndarray, labels: np.ndarray, batches: np.ndarray) -> dict[str, float]:
    """Score the mixing of batches, 0 to 1, larger is better; see Luecken et al. 2022, Nature Methods 19:41.

    A high score is no merit where batches differ in biology: constant or random embeddings mix perfectly.

    Parameters
    ----------
    embedding : array (n_cells, d)
    labels, batches : array (n_cells,)
        Class, and batch, of each cell; at least two batches.

    Returns
    -------
    dict of str to float
        `batch_silhouette`: 1 - |silhouette of the batches| within a class, mean of the classes. `batch_ilisi`: median
        over cells of the inverse Simpson index of the batches around it, scaled to 0 to 1. `batch_pcr`: 1 - share of
        the embedding's variance between the means of the batches (principal component regression). `connectivity`:
        share of a class in the largest part of its graph of 15 neighbours, mean of the classes. With scib-metrics
        also `batch_kbet`, and LISI weighs 90 neighbours by distance to a perplexity of 30; the plain form counts the
        30 nearest. NaN where no class has two batches (silhouette).
    """
    try:
        import scib_metrics
    except ImportError:
        return {
            "batch_silhouette": batch_silhouette(embedding, labels, batches),
            "batch_ilisi": batch_ilisi(embedding, batches),
            "batch_pcr": batch_pcr(embedding, batches),
            "connectivity": connectivity(embedding, labels),
        }
    from scib_metrics.nearest_neighbors import NeighborsResults
    from scib_metrics.utils import principal_component_regression

    embedding = np.asarray(embedding, np.float32)
    distances, cells = _neighbors(embedding, min(_N_LISI, len(embedding)) - 1)
    itself = np.arange(len(embedding))[:, None]
    found = NeighborsResults(
        indices=np.hstack([itself, cells]), distances=np.hstack([np.zeros_like(distances[:, :1]), distances])
    )

    def nearest(n: int) -> NeighborsResults:
        return found.subset_neighbors(min(n, found.n_neighbors))

    return {
        "batch_silhouette": float(scib_metrics.silhouette_batch(embedding, labels, batches)),
        "batch_ilisi": float(scib_metrics.ilisi_knn(found, batches)),
        "batch_pcr": 1 - float(principal_component_regression(embedding, batches, categorical=True)),
        "connectivity": float(scib_metrics.graph_connectivity(nearest(_N_CONNECTED), labels)),
        "batch_kbet": float(scib_metrics.kbet_per_label(nearest(_N_KBET), batches, labels)),
    }


def batch_silhouette(embedding: np.ndarray, labels: np.ndarray, batches: np.ndarray) -> float:
    """Compute 1 - |silhouette of the batches| within each class, the mean of the classes with two batches or more."""
    scores = []
    for name in np.unique(labels):
        here = labels == name
        n_batches = len(np.unique(batches[here]))
        if 1 < n_batches < here.sum():
            scores.append(np.mean(1 - np.abs(silhouette_samples(embedding[here], batches[here]))))
    return float(np.mean(scores)) if scores else float("nan")


def batch_ilisi(embedding: np.ndarray, batches: np.ndarray) -> float:
    """Compute the median inverse Simpson index of the batches of the 30 nearest cells, scaled to 0 to 1."""
    names, codes = np.unique(batches, return_inverse=True)
    around = codes[_neighbors(embedding, min(_N_MIXED, len(embedding) - 1))[1]]
    shares = np.stack([(around == code).mean(axis=1) for code in range(len(names))])
    return float((np.median(1 / (shares**2).sum(axis=0)) - 1) / (len(names) - 1))


def batch_pcr(embedding: np.ndarray, batches: np.ndarray) -> float:
    """Compute 1 - share of the variance that lies between the means of the batches; NaN for a constant embedding.

    Principal component regression weighs the R^2 of each component by its variance: summed over all components that
    is the share of the whole variance, and needs no components.
    """
    centred = embedding - embedding.mean(axis=0)
    total = (centred**2).sum()
    between = sum(
        (batches == name).sum() * (centred[batches == name].mean(axis=0) ** 2).sum() for name in set(batches)
    )
    return float(1 - between / total) if total > 0 else float("nan")


def connectivity(embedding: np.ndarray, labels: np.ndarray) -> float:
    """Compute the share of each class in the largest strongly connected part of its neighbours, mean of the classes."""
    n_others = min(_N_CONNECTED, len(embedding)) - 1
    cells = _neighbors(embedding, n_others)[1]
    rows = np.repeat(np.arange(len(embedding)), n_others)
    graph = sparse.csr_array((np.ones(cells.size), (rows, cells.ravel())), shape=(len(embedding),) * 2)
    shares = []
    for name in np.unique(labels):
        here = np.flatnonzero(labels == name)
        parts = connected_components(graph[here][:, here], connection="strong")[1]
        shares.append(np.bincount(parts).max() / len(here))
    return float(np.mean(shares))


def _neighbors(embedding: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Find the n nearest other cells: distances and rows, (n_cells, n) each."""
    return NearestNeighbors(n_neighbors=n).fit(embedding).kneighbors()


__all__ = ["integration_scores", "integration_source"]
