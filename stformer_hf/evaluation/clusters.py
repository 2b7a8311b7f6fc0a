"""Measure how well an embedding agrees with labels: Leiden clusters, and the silhouette of the labels."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
from scipy import sparse
from sklearn import config_context
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score, silhouette_samples
from sklearn.neighbors import NearestNeighbors

RESOLUTIONS = (0.1, 0.2, 0.4, 0.6, 0.8, 1.0, 1.4, 2.0)  # the grid of all rows
_N_NEIGHBORS = 15  # including the cell itself, as scanpy counts
_DISTANCES_MB = 64


def neighbor_graph(embedding: np.ndarray) -> sparse.csr_array:
    """Build the graph of 15 nearest neighbours with UMAP's weights (McInnes et al. 2018), as `scanpy.pp.neighbors`.

    The weight of a neighbour at distance d is exp(-(d - rho) / sigma), with rho the distance of the nearest other cell
    and sigma such that the weights of a cell sum to log2(15); the weights a and b of the two directions are combined
    as a + b - a b. Return a symmetric csr_array (n_cells, n_cells) for an embedding (n_cells, d).
    """
    n = len(embedding)
    n_others = min(_N_NEIGHBORS, n) - 1
    distances, others = nearest_others(embedding, n_others)
    apart = np.where(distances > 0, distances, np.inf).min(axis=1)
    nearest = np.where(np.isfinite(apart), apart, 0.0)  # among distances above 0
    beyond = np.maximum(distances - nearest[:, None], 0)
    wanted = np.log2(n_others + 1)
    sigma = find_by_bisection(lambda sigma: np.exp(-beyond / sigma[:, None]).sum(axis=1) > wanted, n, 64)
    # The mean includes the cell itself, at distance 0.
    mean = distances.sum(axis=1) / (n_others + 1)
    sigma = np.maximum(sigma, 1e-3 * np.where(nearest > 0, mean, mean.mean()))
    weights = np.exp(-beyond / np.maximum(sigma, np.finfo(float).tiny)[:, None])
    rows = np.repeat(np.arange(n), n_others)
    graph = sparse.csr_array((weights.ravel(), (rows, others.ravel())), shape=(n, n))
    return sparse.csr_array(graph + graph.T - graph * graph.T)


def find_by_bisection(is_above: Callable[[np.ndarray], np.ndarray], n: int, n_steps: int) -> np.ndarray:
    """Find n positive numbers, float64 (n,), by bisection; `is_above` says which of them are too large, bool (n,)."""
    low, high, found = np.zeros(n), np.full(n, np.inf), np.ones(n)
    for _ in range(n_steps):
        above = is_above(found)
        low, high = np.where(above, low, found), np.where(above, found, high)
        found = np.where(np.isinf(high), found * 2, (low + high) / 2)
    return found


def nearest_others(embedding: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Find the n nearest other cells of each: distances and rows, (n_cells, n) each."""
    return NearestNeighbors(n_neighbors=n).fit(embedding).kneighbors()


def leiden(graph: sparse.csr_array, resolution: float, seed: int) -> np.ndarray:
    """Cluster cells with the Leiden algorithm (Traag et al. 2019): modularity, two iterations, as scanpy with igraph.

    `graph` (n_cells, n_cells) has symmetric weights; a higher resolution gives more clusters. Return the cluster of
    each cell, int64 array (n_cells,).
    """
    try:
        import igraph
    except ImportError as error:
        raise ImportError(f"Leiden clusters need igraph: pip install 'stformer_hf[plots]' ({error}).") from error
    upper = sparse.triu(graph, 1).tocoo()
    network = igraph.Graph(n=graph.shape[0], edges=np.column_stack([upper.row, upper.col]).tolist())
    igraph.set_random_number_generator(random.Random(seed))
    try:
        found = network.community_leiden("modularity", weights=upper.data, resolution=resolution, n_iterations=2)
    finally:
        igraph.set_random_number_generator(random)
    return np.array(found.membership, np.int64)


def cluster_scores(embedding: np.ndarray, labels: np.ndarray, seed: int) -> dict[str, float]:
    """Compare the Leiden clusters of an embedding (n_cells, d) with labels (n_cells,).

    Return `leiden_ari` and `leiden_nmi` at resolution 1; and `leiden_ari_best` and `leiden_nmi_best`, the largest over
    `RESOLUTIONS`, with the resolution chosen by the labels, which a user does not know in practice.
    """
    graph = neighbor_graph(embedding)
    found = {resolution: agreement(labels, leiden(graph, resolution, seed)) for resolution in RESOLUTIONS}
    best = {f"{name}_best": max(of[name] for of in found.values()) for name in found[1.0]}
    return {**found[1.0], **best}


def agreement(labels: np.ndarray, clusters: np.ndarray) -> dict[str, float]:
    """Compute `leiden_ari` and `leiden_nmi`, the latter normalised by the arithmetic mean of the entropies."""
    return {
        "leiden_ari": float(adjusted_rand_score(labels, clusters)),
        "leiden_nmi": float(normalized_mutual_info_score(labels, clusters)),
    }


def silhouette(embedding: np.ndarray, labels: np.ndarray) -> float:
    """Compute the mean silhouette of the classes with Euclidean distances, -1 to 1 (not rescaled)."""
    return float(silhouettes(embedding, labels).mean())


def silhouettes(embedding: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Compute the silhouette of each cell, float array (n_cells,), with 64 MB of distances in memory at a time."""
    with config_context(working_memory=_DISTANCES_MB):  # by default a gigabyte
        return silhouette_samples(embedding, labels)
