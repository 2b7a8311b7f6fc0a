"""Spatial domains: groups of like embeddings, numbered by size."""

import builtins
import logging

import numpy as np
import pandas as pd
import pytest
from anndata import AnnData, read_h5ad

from stformer_hf.space import domains
from stformer_hf.space.domains import spatial_domains

SIZES = (20, 50, 30)


@pytest.fixture
def blobs() -> AnnData:
    """Three groups of cells, far from each other, in a random order."""
    rng = np.random.default_rng(0)
    groups = rng.permutation(np.repeat([0, 1, 2], SIZES))
    adata = AnnData(obs=pd.DataFrame({"group": groups}, index=[f"cell{i}" for i in range(100)]))
    adata.obsm["X_neighborhood"] = (10 * np.eye(3, 5)[groups] + rng.normal(size=(100, 5))).astype(np.float32)
    return adata


def check_groups(adata, key="domain") -> None:
    column = adata.obs[key]
    assert isinstance(column.dtype, pd.CategoricalDtype)
    assert column.cat.categories.tolist() == ["0", "1", "2"]
    assert column.tolist() == [{1: "0", 2: "1", 0: "2"}[group] for group in adata.obs["group"]]


@pytest.mark.parametrize("many", [False, True])
def test_kmeans_finds_the_groups_and_numbers_them_by_size(blobs, many, monkeypatch):
    if many:
        monkeypatch.setattr(domains, "_MOST_CELLS", 99)
        monkeypatch.setattr(domains, "KMeans", None)
    spatial_domains(blobs, 3)
    check_groups(blobs)
    settings = blobs.uns["domain"]
    assert (settings["method"], settings["n_domains"], settings["use_rep"]) == ("kmeans", 3, "X_neighborhood")


def test_a_whole_number_of_any_type_is_taken(blobs):
    for number in (3.0, np.float32(3), np.int8(3)):
        spatial_domains(blobs, number)
        check_groups(blobs)


def test_the_seed_decides(blobs):
    blobs.obsm["noise"] = np.random.default_rng(1).normal(size=(100, 4))
    for key, seed in (("a", 0), ("b", 0), ("c", 1)):
        spatial_domains(blobs, use_rep="noise", key_added=key, seed=seed)
    assert blobs.obs["a"].nunique() == 10
    assert blobs.obs["a"].tolist() == blobs.obs["b"].tolist() != blobs.obs["c"].tolist()
    sizes = blobs.obs["a"].value_counts()[[str(i) for i in range(10)]].tolist()
    assert sizes == sorted(sizes, reverse=True)


@pytest.mark.usefixtures("compiled_umap")
def test_leiden_finds_the_groups_and_leaves_the_graph_that_is_there(blobs, tmp_path):
    sc = pytest.importorskip("scanpy")
    pytest.importorskip("igraph")
    blobs.obsm["other"] = np.random.default_rng(1).normal(size=(100, 4))
    sc.pp.neighbors(blobs, use_rep="other")
    before = blobs.obsp["connectivities"].copy()
    spatial_domains(blobs, method="leiden", resolution=0.1, key_added="place")
    check_groups(blobs, "place")
    assert "leiden" not in blobs.obs and "leiden" not in blobs.uns
    assert (blobs.obsp["connectivities"] != before).nnz == 0
    assert blobs.uns["neighbors"]["params"]["use_rep"] == "other"
    assert blobs.uns["place_neighbors"]["params"]["use_rep"] == "X_neighborhood"
    assert blobs.uns["place"]["resolution"] == 0.1
    # What scanpy itself gives on this graph, but for the numbers.
    sc.tl.leiden(blobs, 3.0, neighbors_key="place_neighbors", flavor="igraph", n_iterations=2, directed=False)
    spatial_domains(blobs, method="leiden", resolution=3.0, key_added="place")
    table = pd.crosstab(blobs.obs["place"], blobs.obs["leiden"])
    assert len(table) > 3 and ((table > 0).sum(axis=0) == 1).all() and ((table > 0).sum(axis=1) == 1).all()
    blobs.write_h5ad(tmp_path / "out.h5ad")
    assert read_h5ad(tmp_path / "out.h5ad").uns["place"]["method"] == "leiden"


def test_few_distinct_embeddings_give_few_domains(blobs, caplog):
    blobs.obsm["X_neighborhood"] = 10 * np.eye(3, 5)[blobs.obs["group"]]
    with caplog.at_level(logging.WARNING):
        spatial_domains(blobs, 7)
    check_groups(blobs)
    assert "There are 3 domains instead of 7" in caplog.text and blobs.uns["domain"]["n_domains"] == 3


def test_bad_input_is_refused_and_nothing_is_written(blobs, monkeypatch):
    blobs.obsm["same"] = np.ones((100, 3))
    blobs.obsm["nan"] = np.where(np.arange(300).reshape(100, 3) < 6, np.nan, 1.0)

    def refuses(words, *args, error=ValueError, **options):
        with pytest.raises(error, match=words):
            spatial_domains(blobs, *args, **options)

    refuses("no obsm\\['X_pca'\\]; obsm has 'X_neighborhood', 'same', 'nan'. embed_neighborhoods", use_rep="X_pca")
    refuses("the same for all 100 cells", use_rep="same")
    refuses("2 of 100 cells have NaN", use_rep="nan")
    refuses("101 domains for 100 cells", 101)
    refuses("n_domains=0", 0)
    refuses("n_domains=2.5", 2.5)
    refuses("method='louvain'", method="louvain")
    refuses("Leiden chooses the number of domains itself", 5, method="leiden")
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "igraph":
            raise ImportError("No module named 'igraph'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    refuses(r"pip install \"scanpy\[leiden\]\"", method="leiden", error=ImportError)
    assert set(blobs.obs) == {"group"} and not blobs.uns
