"""Graph and clusters against scanpy's."""

import random
import tracemalloc

import numpy as np
import pytest
from sklearn.metrics import adjusted_rand_score, silhouette_samples

from stformer_hf.evaluation.clusters import (
    RESOLUTIONS,
    cluster_scores,
    leiden,
    neighbor_graph,
    silhouette,
    silhouettes,
)

pytest.importorskip("igraph")


def blobs(n: int = 240, apart: float = 12.0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    labels = np.arange(n) % 4
    return rng.normal(size=(n, 8)) + apart * np.eye(8)[labels], labels.astype(str)


@pytest.mark.usefixtures("compiled_umap")
def test_the_graph_is_that_of_scanpy():
    scanpy = pytest.importorskip("scanpy")
    from anndata import AnnData

    cells = blobs(apart=1.0)[0].astype(np.float32)
    adata = AnnData(cells)
    scanpy.pp.neighbors(adata, n_neighbors=15, use_rep="X")
    expected = adata.obsp["connectivities"]
    found = neighbor_graph(cells)
    assert abs(found - expected).max() < 1e-4
    assert abs(found - found.T).max() == 0


def test_twins_are_tied_as_tightly_as_can_be():
    cells = blobs(apart=1.0)[0]
    cells[100:120] = cells[:20]
    graph = neighbor_graph(cells)
    assert all(graph[100 + i, i] == 1 for i in range(20))
    assert neighbor_graph(np.ones((40, 3))).max() == 1  # cells that are all alike


def test_leiden_finds_blobs_and_leaves_the_random_state_of_python_alone():
    cells, labels = blobs()
    graph = neighbor_graph(cells)
    random.seed(5)
    expected = random.random()
    random.seed(5)
    found = leiden(graph, 0.2, seed=0)
    assert random.random() == expected
    assert adjusted_rand_score(found, labels) == 1
    assert np.array_equal(leiden(graph, 2.0, seed=3), leiden(graph, 2.0, seed=3))
    assert leiden(graph, 2.0, seed=0).max() > found.max()


def test_scores_are_best_where_clusters_are_the_classes():
    cells, labels = blobs()
    found = cluster_scores(cells, labels, seed=0)
    assert found["leiden_ari_best"] == found["leiden_nmi_best"] == pytest.approx(1)
    assert found["leiden_ari"] <= found["leiden_ari_best"] and 1.0 in RESOLUTIONS
    shuffled = np.random.default_rng(1).permutation(labels)
    assert abs(cluster_scores(cells, shuffled, seed=0)["leiden_ari_best"]) < 0.05
    assert silhouette(cells, labels) > 0.6 > 0.01 > silhouette(cells, shuffled)


def test_silhouettes_need_a_part_of_the_distances_at_a_time():
    cells, labels = blobs(4000, apart=1.0)
    expected = silhouette_samples(cells, labels)
    tracemalloc.start()
    try:
        found = silhouettes(cells, labels)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    assert silhouette(cells, labels) == pytest.approx(expected.mean(), rel=1e-12)
    assert peak < 90e6  # all distances take 128 MB
