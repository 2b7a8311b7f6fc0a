"""Parts fitted to training cells: variable genes with their components, and models that predict labels (readers)."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy import linalg, sparse
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from threadpoolctl import threadpool_limits

N_GENES = 2000
N_COMPONENTS = 50
N_NEIGHBORS = 15
_N_BINS = 20  # of the mean of genes
_MOST_SPANNED = 4000  # with more cells, their span is not computed
_DENSE = 0.04  # share of entries above which dense products of cells are faster
_GENES_AT_ONCE = 2000


class GenePca(NamedTuple):
    """Principal components of variable genes, of their log-normalised values."""

    genes: np.ndarray  # columns of the variable genes, ascending: int64 (at most 2000,)
    pca: PCA

    def __call__(self, cells: sparse.csr_array) -> np.ndarray:
        """Project log-normalised cells (n, n_genes): float64 array (n, n_components)."""
        return self.pca.transform(cells[:, self.genes])


def variable_genes(cells: sparse.csr_array, n_genes: int = N_GENES) -> np.ndarray:
    """Choose genes by their dispersion among genes of similar mean (Satija et al. 2015; the default of scanpy).

    For values count / total x 10,000, the log of variance / mean is standardised within 20 bins of log mean; a gene
    alone in its bin gets 1. `cells` (n_cells, n_genes) are log-normalised; return the columns, ascending, as an int64
    array: all expressed genes if there are fewer.
    """
    values = cells.copy()
    values.data = np.expm1(values.data)
    n = values.shape[0]
    mean = np.asarray(values.mean(axis=0)).ravel()
    values.data **= 2
    variance = (np.asarray(values.mean(axis=0)).ravel() - mean**2) * n / max(n - 1, 1)
    expressed = np.flatnonzero((mean > 0) & (variance > 0))
    if len(expressed) <= n_genes:
        return expressed
    dispersion = pd.Series(np.log(variance[expressed] / mean[expressed]))
    of_bin = dispersion.groupby(pd.cut(np.log1p(mean[expressed]), _N_BINS), observed=True)
    centre, spread = of_bin.transform("mean"), of_bin.transform("std")
    score = ((dispersion - centre) / spread).where(spread.notna(), 1.0).to_numpy()
    return np.sort(expressed[np.argsort(-score, kind="stable")[:n_genes]])


def fit_pca(cells: sparse.csr_array, seed: int) -> GenePca:
    """Fit 50 principal components (fewer for few cells or genes) of 2,000 variable genes on log-normalised cells."""
    genes = variable_genes(cells)
    most = min(len(genes), cells.shape[0]) - 1
    if most < 1:
        raise ValueError(f"{len(genes)} genes vary among {cells.shape[0]} cells: a PCA needs at least two of each.")
    pca = PCA(min(N_COMPONENTS, most), svd_solver="arpack", random_state=seed)
    return GenePca(genes, pca.fit(cells[:, genes]))


class Scaler(NamedTuple):
    """Centre, and one scale for all dimensions, so that the C of a probe does not depend on the units."""

    mean: np.ndarray  # float64 (d,)
    scale: float  # root mean square of the centred values

    def __call__(self, cells: np.ndarray) -> np.ndarray:
        """Scale cells (n, d)."""
        return (cells - self.mean) / self.scale


def fit_scaler(cells: np.ndarray) -> Scaler:
    """Fit the centre and the scale of an embedding (n, d); constant embeddings have the scale 1."""
    mean = cells.mean(axis=0)
    return Scaler(mean, float(np.sqrt(((cells - mean) ** 2).mean())) or 1.0)


def rotate_genes(values: sparse.csr_array) -> tuple[np.ndarray, Callable[[np.ndarray], np.ndarray]]:
    """Rotate cells into their own span: at most as many dimensions as cells, with the same dot products.

    A reader with an L2 penalty has the same predictions and loss on these features as on the values, since its weights
    are a linear combination of cells; and it is fitted much faster if there are more genes than cells.

    Return the features of `values` (n, n_genes), float64 (n, at most n), and a function from the weights (d, k) of a
    reader of the features to its weights (n_genes, k) of genes.
    """
    # With more threads the basis, and what is fitted to few digits in it, would depend on their number.
    with threadpool_limits(1, "blas"):
        spread, vectors = linalg.eigh(_dot_products(values), overwrite_a=True)
    kept = spread > spread[-1] * 1e-10
    scale, vectors = np.sqrt(spread[kept]), vectors[:, kept]
    return vectors * scale, lambda weights: values.T @ (vectors @ (weights / scale[:, None]))


def _dot_products(values: sparse.csr_array) -> np.ndarray:
    """Compute the dot products of cells: float64 array (n, n)."""
    n, n_genes = values.shape
    if values.nnz < _DENSE * n * n_genes:
        return (values @ values.T).toarray()
    columns, products = sparse.csc_array(values), np.zeros((n, n))
    for start in range(0, n_genes, _GENES_AT_ONCE):
        block = columns[:, start : start + _GENES_AT_ONCE].toarray().astype(np.float64)
        products += block @ block.T
    return products


def fit_probe(cells: np.ndarray | sparse.csr_array, labels: np.ndarray) -> LogisticRegression:
    """Fit a logistic regression, C = 1; for few cells with many genes in the coordinates of `rotate_genes`."""
    classifier = LogisticRegression(max_iter=2000)
    if not sparse.issparse(cells) or cells.shape[0] > min(cells.shape[1], _MOST_SPANNED):
        return classifier.fit(cells, labels)
    features, to_genes = rotate_genes(cells)
    classifier.fit(features, labels)
    classifier.coef_, classifier.n_features_in_ = to_genes(classifier.coef_.T).T, cells.shape[1]
    return classifier


def fit_knn(cells: np.ndarray, labels: np.ndarray) -> KNeighborsClassifier:
    """Fit a vote of the 15 nearest cells by Euclidean distance."""
    return KNeighborsClassifier(N_NEIGHBORS).fit(cells, labels)
