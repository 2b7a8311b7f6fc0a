"""Nearest cells against all distances, computed in plain numpy."""

import sys

import numpy as np
import pytest
import torch

from stformer_hf import GeneBertModel, map_to_reference
from stformer_hf.inference.nearest_cells import NearestCells


def all_distances(queries: np.ndarray, embedding: np.ndarray) -> np.ndarray:
    return np.sqrt(((queries[:, None].astype(float) - embedding[None].astype(float)) ** 2).sum(axis=2))


def make_embedding(n_cells: int) -> np.ndarray:
    """Cells around 20 centres, each cell of the first tenth twice."""
    rng = np.random.default_rng(0)
    found = 3 * rng.normal(size=(20, 8))[rng.integers(20, size=n_cells)] + rng.normal(size=(n_cells, 8))
    found[: n_cells // 10] = found[n_cells // 10 : n_cells // 10 * 2]
    return found.astype(np.float32)


@pytest.mark.parametrize("approximate", [False, True])
@pytest.mark.parametrize("n_cells", [30, 1500])
def test_the_nearest_cells_are_those_by_distance(n_cells, approximate, capfd):
    if approximate:
        pytest.importorskip("faiss")
    embedding, n = make_embedding(n_cells), 10
    queries = embedding[::3] + np.float32(0.1)
    index = NearestCells(embedding, n, approximate)
    expected = all_distances(queries, embedding)
    distances, rows = index.nearest(queries)
    np.testing.assert_allclose(distances, np.take_along_axis(expected, rows, axis=1), rtol=1e-4)
    assert (np.diff(distances, axis=1) >= 0).all() and all(len(set(row)) == n for row in rows.tolist())
    nearest = np.sort(expected, axis=1)[:, n - 1 : n]
    share = (distances <= nearest * (1 + 1e-4)).mean()
    assert share == 1 if n_cells == 30 or not approximate else share > 0.98

    own = all_distances(embedding, embedding)
    np.fill_diagonal(own, np.inf)
    distances, rows = index.nearest_others()
    np.testing.assert_allclose(distances, np.take_along_axis(own, rows, axis=1), rtol=1e-4, atol=1e-6)
    assert (distances <= np.sort(own, axis=1)[:, n - 1 : n] * (1 + 1e-4)).mean() > 0.98
    assert "WARNING" not in capfd.readouterr().err  # of faiss, about few cells


@pytest.mark.parametrize("approximate", [False, True])
def test_equal_cells_that_hide_a_cell_from_itself(approximate):
    if approximate:
        pytest.importorskip("faiss")
    embedding = np.zeros((800, 2), np.float32)
    distances, rows = NearestCells(embedding, 3, approximate).nearest_others()
    assert distances.shape == rows.shape == (800, 3) and not distances.any()
    assert (rows != np.arange(800)[:, None]).all()


def test_clusters_with_few_cells_are_not_the_only_ones_searched():
    pytest.importorskip("faiss")
    embedding = make_embedding(4000)
    embedding[0] = 1000  # a cluster of its own
    _, rows = NearestCells(embedding, 3900, approximate=True).nearest(embedding[:1])
    assert rows[0, 0] == 0 and len(set(rows[0].tolist())) == 3900 and rows.min() >= 0


def test_labels_are_those_of_exact_neighbours(config, tokenizer, adata, tmp_path):
    pytest.importorskip("faiss")
    torch.manual_seed(0)
    tokenizer.included_phenotypes = []
    config.initializer_range = 0.3
    model = GeneBertModel(config)
    found = []
    for approximate in (False, True):
        cells = adata.copy()
        options = {"label_key": "cell_type", "reject": 0.1, "tokenizer": tokenizer}
        map_to_reference(cells, adata[:50].copy(), model, approximate=approximate, **options)
        assert cells.uns["mapped"]["approximate"] == approximate
        found.append(cells.obs["mapped_label"].astype(str).tolist())
    assert found[0] == found[1] and len(set(found[0])) > 1


def test_what_is_missing_is_named_at_the_door(adata, monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ImportError, match=r"pip install 'stformer_hf\[faiss\]'"):
        map_to_reference(adata, adata, "no such model", label_key="cell_type", approximate=True)
