"""Halves of counts, and what one tells of the other."""

import numpy as np
import pytest
from conftest import make_adata
from scipy import sparse

from stformer_hf.evaluation.ceiling import cluster_agreement, measure_ceiling, split_counts


@pytest.fixture
def counts() -> sparse.csr_array:
    return sparse.csr_array(make_adata(80, 60, density=0.9).X).astype(np.int64)


def test_halves_sum_to_the_counts_and_share_nothing_else(counts):
    first, second = split_counts(counts, np.random.default_rng(0))
    assert (first + second != counts).nnz == 0
    assert first.data.min() > 0 and second.data.min() > 0
    assert first.sum() / counts.sum() == pytest.approx(0.5, abs=0.02)
    # Of Poisson counts the halves are independent given the mean.
    poisson = sparse.csr_array(np.random.default_rng(1).poisson(4.0, (400, 50)))
    halves = [half.toarray().ravel() for half in split_counts(poisson, np.random.default_rng(2))]
    assert abs(np.corrcoef(*halves)[0, 1]) < 0.03


def test_the_ceiling_lies_at_what_the_depth_allows(counts):
    labels = np.array(make_adata(80, 60, density=0.9).obs["cell_type"].astype(str))
    deep = measure_ceiling(counts * 50, labels, seed=0)
    few = sparse.csr_array(np.random.default_rng(0).poisson(0.03 * counts.toarray()))
    shallow = measure_ceiling(few, labels, seed=0)
    assert np.mean(deep.probe == labels) == 1 > np.mean(shallow.probe == labels)
    again = measure_ceiling(counts * 50, labels, seed=0)
    assert all(np.array_equal(getattr(deep, name), getattr(again, name)) for name in ("knn", "probe"))
    # Readers of one half that know the cells do better on shuffled labels than chance: they know the cell itself.
    shuffled = np.random.default_rng(0).permutation(labels)
    assert np.mean(measure_ceiling(counts * 50, shuffled, seed=0).probe == shuffled) > 0.9


def test_clusters_of_the_halves_agree_more_in_deep_cells(counts):
    pytest.importorskip("igraph")
    labels = np.repeat(["a", "b"], 40)
    deep = cluster_agreement(measure_ceiling(counts * 50, labels, seed=0).halves, seed=0)
    shallow = sparse.csr_array(np.random.default_rng(0).poisson(0.5, counts.shape))
    noise = cluster_agreement(measure_ceiling(shallow, labels, seed=0).halves, seed=0)
    assert deep["leiden_ari"] > 0.5 > 0.2 > noise["leiden_ari"]
