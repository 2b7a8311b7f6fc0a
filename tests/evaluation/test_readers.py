"""What is fitted on training cells, against scikit-learn and scanpy."""

import numpy as np
import pytest
from conftest import make_adata
from scipy import sparse
from sklearn.linear_model import LogisticRegression

from stformer_hf.evaluation.cell_baselines import log_normalise
from stformer_hf.evaluation.readers import fit_knn, fit_pca, fit_probe, fit_scaler, variable_genes


@pytest.fixture
def cells() -> sparse.csr_array:
    return log_normalise(make_adata(200, 300).X)


def test_variable_genes_are_those_of_scanpy(cells):
    scanpy = pytest.importorskip("scanpy")
    from anndata import AnnData

    adata = AnnData(sparse.csr_matrix(cells))
    scanpy.pp.highly_variable_genes(adata, n_top_genes=50)
    assert np.array_equal(variable_genes(cells, 50), np.flatnonzero(adata.var["highly_variable"]))


def test_fewer_genes_than_asked_for_are_all_that_vary(cells):
    cells = cells.tolil()
    cells[:, 7] = 0
    assert np.array_equal(variable_genes(sparse.csr_array(cells), 2000), np.delete(np.arange(300), 7))


def test_components_are_those_of_the_dense_covariance(cells):
    found = fit_pca(cells, seed=0)
    projected = found(cells)
    assert projected.shape == (200, 50)
    dense = cells.toarray() - cells.toarray().mean(axis=0)
    left, values, _ = np.linalg.svd(dense, full_matrices=False)
    np.testing.assert_allclose(np.abs(projected), np.abs(left[:, :50] * values[:50]), atol=1e-6)
    assert fit_pca(cells[:8], seed=0)(cells).shape == (200, 7)
    with pytest.raises(ValueError, match="0 genes vary among 200 cells"):
        fit_pca(cells * 0, seed=0)


def test_a_scaler_keeps_the_shape_and_not_the_units():
    cells = np.random.default_rng(0).normal(3, [1.0, 5.0], (100, 2))
    scaled = fit_scaler(cells)(cells)
    assert scaled.mean(axis=0) == pytest.approx([0, 0]) and (scaled**2).mean() == pytest.approx(1)
    assert scaled.std(axis=0)[1] / scaled.std(axis=0)[0] == pytest.approx(cells[:, 1].std() / cells[:, 0].std())
    np.testing.assert_allclose(fit_scaler(1000 * cells)(1000 * cells), scaled)
    assert (fit_scaler(np.ones((5, 2)))(np.ones((5, 2))) == 0).all()


def test_the_probe_of_genes_is_logistic_regression_on_them(cells):
    labels = np.array(make_adata(200, 300).obs["cell_type"].astype(str))
    labels[::7] = "other"
    train, test = cells[:60], cells[60:]
    found = fit_probe(train, labels[:60])
    plain = LogisticRegression(max_iter=2000, tol=1e-8).fit(train, labels[:60])
    np.testing.assert_allclose(found.coef_, plain.coef_, atol=2e-3)
    assert np.mean(found.predict(test) == plain.predict(test)) > 0.99
    assert fit_probe(cells[:, :100], labels).coef_.shape[1] == 100  # more cells than genes
    assert (
        fit_probe(cells[:4] * 0 + train[:4], ["a", "a", "b", "b"]).predict(train[:4]) == ["a", "a", "b", "b"]
    ).all()


def test_fifteen_neighbours_vote():
    cells = np.arange(40.0)[:, None]
    labels = np.where(np.arange(40) < 20, "a", "b")
    # Of the 15 nearest to 21.1, 14 to 28, eight are of b when the border lies at 20.
    assert fit_knn(cells, labels).predict([[20.1], [18.9]]).tolist() == ["b", "a"]
