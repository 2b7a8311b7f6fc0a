"""Nearest neighbours among the cells of a reference, exact or approximate."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import numpy as np
from sklearn.neighbors import NearestNeighbors

_LEAST_PER_CLUSTER = 39  # cells; with fewer, faiss warns that its k-means is unreliable
_LEAST_SEARCHED = 16  # clusters


class NearestCells:
    """Find the nearest cells by Euclidean distance.

    Parameters
    ----------
    embedding : float32 array (n_cells, d)
    n_neighbors : int
        At most n_cells - 1.
    approximate : bool, default: False
        Search only the nearest of 4 * sqrt(n_cells) clusters with an inverted file of faiss (extra `faiss`): 1 in 32,
        and at least 16. Cells that make no more clusters (fewer than 663) are searched exactly.

    Raises
    ------
    ImportError
        `approximate`, and faiss is not installed.
    """

    def __init__(self, embedding: np.ndarray, n_neighbors: int, approximate: bool = False):
        self._embedding, self._n_neighbors = embedding, n_neighbors
        self._search = (_inverted_file if approximate else _exact)(embedding)

    def nearest(self, queries: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return distances, float64 (m, n_neighbors), the nearest first, and rows, int64, of queries (m, d)."""
        return self._search(queries, self._n_neighbors)

    def nearest_others(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the same for the cells themselves, each without itself."""
        distances, rows = self._search(self._embedding, self._n_neighbors + 1)
        others = rows != np.arange(len(rows))[:, None]
        others[others.all(axis=1), -1] = False  # many equal cells hid it: the last one goes
        shape = len(rows), self._n_neighbors
        return distances[others].reshape(shape), rows[others].reshape(shape)


_Search = Callable[[np.ndarray, int], tuple[np.ndarray, np.ndarray]]


def _exact(embedding: np.ndarray) -> _Search:
    index = NearestNeighbors().fit(embedding.astype(np.float64))
    return lambda queries, n: index.kneighbors(queries.astype(np.float64), n)


def _inverted_file(embedding: np.ndarray) -> _Search:
    faiss = import_faiss()
    n_cells, d = embedding.shape
    n_clusters = min(int(4 * n_cells**0.5), n_cells // _LEAST_PER_CLUSTER)
    if n_clusters <= _LEAST_SEARCHED:  # all would be searched
        return _exact(embedding)
    index = faiss.IndexIVFFlat(faiss.IndexFlatL2(d), d, n_clusters)
    index.train(np.ascontiguousarray(embedding, np.float32))
    index.add(np.ascontiguousarray(embedding, np.float32))

    def search(queries: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
        queries = np.ascontiguousarray(queries, np.float32)
        index.nprobe = max(n_clusters // 32, _LEAST_SEARCHED)
        squares, rows = index.search(queries, n)
        few = (rows < 0).any(axis=1)  # the clusters that were searched hold fewer cells
        if few.any():
            index.nprobe = n_clusters
            squares[few], rows[few] = index.search(queries[few], n)
        return np.sqrt(squares.astype(np.float64)), rows

    return search


def import_faiss() -> ModuleType:
    """Return faiss, or raise an ImportError that says how to install it."""
    try:
        import faiss
    except ImportError as error:
        raise ImportError("Approximate neighbours need faiss: pip install 'stformer_hf[faiss]'.") from error
    return faiss
