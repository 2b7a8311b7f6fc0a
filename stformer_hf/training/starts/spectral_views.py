"""Two spectral views of cells: principal components of log-normalised counts and of analytic Pearson residuals."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import linalg, sparse
from scipy.sparse.linalg import eigsh

from ...evaluation.cell_baselines import log_normalise
from ...models.gene_bert.whole_cell import OVERDISPERSION

N_VARIABLE_GENES = 2000
_MIN_CELLS = 3  # a gene in fewer cells is not variable
_N_BINS = 20  # of mean expression, as scanpy.pp.highly_variable_genes has
_ENTRIES = 1 << 23  # of a dense block: 32 MB in float32
_DENSE_EIGH = 500  # up to this many genes, all eigenvectors are computed


@dataclass
class SpectralViews:
    """Parameters of two spectral views of cells.

    Attributes
    ----------
    shares : float64 array (n_genes,)
        Share of each gene in all counts of the cells.
    means : float64 array (2, n_genes)
        Mean log value, and mean Pearson residual, of each gene.
    n_cells : int
        Cells with counts.
    loadings : list of float64 array (n_genes, k)
        Principal axes of the log values, and of the residuals, by descending variance; 0 for genes not chosen.
    variances : list of float64 array (k,)
        Variance of the cells along each axis.
    """

    shares: np.ndarray
    means: np.ndarray
    n_cells: int
    loadings: list[np.ndarray]
    variances: list[np.ndarray]

    def transform(self, counts: sparse.csr_array) -> list[np.ndarray]:
        """Project cells on the axes of both views, without scaling: two float64 arrays (n, k).

        The values equal those of `CellEmbedding.view_sums` for a model that starts at these views, if all genes are
        measured and none is hidden.
        """
        used = [np.flatnonzero(loadings.any(axis=1)) for loadings in self.loadings]
        scores: list[list[np.ndarray]] = [[], []]
        for block in _cut(counts):
            for view, values in enumerate(_dense_views(block, self.shares, self.n_cells, used)):
                scores[view].append((values - self.means[view, used[view]]) @ self.loadings[view][used[view]])
        return [np.concatenate(some) for some in scores]


def fit_spectral_views(
    blocks: Callable[[], Iterable[sparse.csr_array]],
    n_components: int,
    *,
    batches: np.ndarray | None = None,
    n_variable: int = N_VARIABLE_GENES,
) -> SpectralViews:
    """Fit the principal components of both views, block by block.

    Parameters
    ----------
    blocks : callable
        Returns an iterator over CSR arrays (n, n_genes) of counts, the same at each of three calls.
    n_components : int
        Maximum number of components per view; limited by the variable genes, and by the number of cells minus that of
        batches (1 without `batches`).
    batches : int array (n_cells,), optional
        Batch of each cell, 0 to n_batches - 1: the components are those of the variance within batches.
    n_variable : int, default: 2000
        Number of genes of each view.

    Raises
    ------
    ValueError
        There are fewer than two cells with counts, or no batch has two.

    Notes
    -----
    Log values are ln(1 + 10,000 x / total); their genes are chosen by normalised dispersion, as in
    `scanpy.pp.highly_variable_genes(flavor="seurat")` (Satija et al. 2015). Residuals follow Lause, Berens and Kobak
    2021, with theta = 100, clipped at the square root of the number of cells; their genes are those with the largest
    residual variance. Genes in fewer than 3 cells are in neither view.

    Three passes over the cells compute the sums of the genes, the variances of the residuals, and the covariances
    (2000, 2000) of the chosen genes, whose eigenvectors are exact. Memory is that of a block and of the covariances,
    whatever the number of cells.
    """
    sums = _sum_genes(blocks())
    n_cells = int(sums["n_cells"])
    if n_cells < 2:
        raise ValueError(f"A spectral start needs at least two cells with counts, got {n_cells}.")
    shares = sums["counts"] / sums["counts"].sum()
    often = sums["expressed"] >= min(_MIN_CELLS, n_cells)
    means = np.zeros((2, len(shares)))
    means[0] = sums["log"] / n_cells
    means[1], variances = _residual_moments(blocks(), shares, n_cells)
    chosen = [_largest(of, often, n_variable) for of in (_dispersion(sums, n_cells, often), variances)]
    covariances, n_batches = _covariances(blocks(), shares, n_cells, chosen, batches)
    if n_batches == n_cells:
        raise ValueError(
            f"Each of the {n_cells} cells with counts is the only one of its batch: nothing varies within batches."
        )
    loadings, spread = [], []
    for genes, covariance in zip(chosen, covariances, strict=True):
        values, vectors = _leading(covariance, min(n_components, len(genes), n_cells - n_batches))
        loadings.append(np.zeros((len(shares), len(values))))
        loadings[-1][genes] = vectors
        spread.append(values)
    return SpectralViews(shares, means, n_cells, loadings, spread)


def pearson_residuals(
    counts: sparse.csr_array, shares: np.ndarray, n_cells: int, genes: np.ndarray | None = None
) -> np.ndarray:
    """Compute (x - mu) / sqrt(mu + mu^2 / 100), mu = total x share, clipped at +- sqrt(n_cells): float32 array (n, k).

    `counts` (n, n_genes) of all genes give the totals; `shares` (n_genes,) are those of the genes in the counts of the
    `n_cells` cells. With `genes`, int (k,), only their residuals are computed.
    """
    totals = counts.sum(axis=1, dtype=np.float64)
    if genes is not None:
        counts, shares = counts[:, genes], shares[genes]
    with np.errstate(divide="ignore"):  # a zero total or share means mu = 0, and a residual of 0
        residuals = np.multiply.outer((1 / totals).astype(np.float32), (1 / shares).astype(np.float32))
    residuals += np.float32(1 / OVERDISPERSION)
    np.sqrt(residuals, out=residuals)
    np.divide(-1, residuals, out=residuals)  # where x is 0: -mu / sqrt(mu + mu^2 / 100) = -1 / sqrt(1 / mu + 1 / 100)
    cells = np.repeat(np.arange(len(totals)), np.diff(counts.indptr))
    mu = np.maximum(totals[cells] * shares[counts.indices], 1e-30)
    residuals[cells, counts.indices] *= (1 - counts.data / mu).astype(np.float32)
    bound = np.float32(np.sqrt(n_cells))
    return np.clip(residuals, -bound, bound, out=residuals)


# ---------------------------------------------------------------------- passes over the cells


def _cut(counts: sparse.csr_array) -> Iterator[sparse.csr_array]:
    """Split cells into blocks that are small enough to be dense."""
    step = max(_ENTRIES // max(counts.shape[1], 1), 1)
    for start in range(0, counts.shape[0], step):
        yield counts[start : start + step]


def _dense_views(
    block: sparse.csr_array, shares: np.ndarray, n_cells: int, genes: list[np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """Compute the log values (float64) and the residuals (float32) of some genes each: arrays (n, k)."""
    values = log_normalise(block[:, genes[0]], block.sum(axis=1))
    return values.toarray(), pearson_residuals(block, shares, n_cells, genes[1])


def _sum_genes(blocks: Iterable[sparse.csr_array]) -> dict[str, Any]:
    """Sum over cells for each gene: counts, expressing cells, log values, scaled counts and their squares."""
    sums: dict[str, Any] = {}
    for block in blocks:
        totals = block.sum(axis=1, dtype=np.float64)
        scaled = 1e4 * block.data / np.repeat(np.maximum(totals, 1e-12), np.diff(block.indptr))
        values = {"counts": block.data, "expressed": block.data > 0, "log": np.log1p(scaled)}
        values.update(scaled=scaled, squared=scaled * scaled)
        found: dict[str, Any] = {name: np.bincount(block.indices, of, block.shape[1]) for name, of in values.items()}
        found["n_cells"] = np.count_nonzero(totals)
        sums = {name: value + sums.get(name, 0) for name, value in found.items()}
    return sums or {"n_cells": 0}


def _dispersion(sums: dict[str, np.ndarray], n_cells: int, often: np.ndarray) -> np.ndarray:
    """Compute the normalised dispersion of each gene: float64 array (n_genes,)."""
    mean = np.maximum(sums["scaled"] / n_cells, 1e-12)
    variance = np.maximum(sums["squared"] / n_cells - mean**2, 0) * n_cells / (n_cells - 1)
    dispersion = np.log(np.maximum(variance, 1e-12) / mean)
    mean = np.log1p(mean)
    edges = np.linspace(mean[often].min(), mean[often].max(), _N_BINS + 1)
    bins = np.clip(np.searchsorted(edges, mean, side="right") - 1, 0, _N_BINS - 1)
    found = np.full(len(mean), -np.inf)
    for i in range(_N_BINS):
        inside = often & (bins == i)
        of = dispersion[inside]
        # A gene alone in its bin ranks one standard deviation above the mean.
        found[inside] = (of - of.mean()) / max(of.std(ddof=1), 1e-12) if len(of) > 1 else 1.0
    return found


def _largest(values: np.ndarray, often: np.ndarray, n: int) -> np.ndarray:
    """Return the n genes with the largest values, the first of equal ones: int64 array, ascending."""
    order = np.argsort(-np.where(often, values, -np.inf), kind="stable")
    return np.sort(order[: min(n, np.count_nonzero(often))])


def _residual_moments(
    blocks: Iterable[sparse.csr_array], shares: np.ndarray, n_cells: int
) -> tuple[np.ndarray, np.ndarray]:
    """Compute mean and variance of the residuals of each gene over cells with counts: float64 arrays (n_genes,)."""
    total, squares = np.zeros((2, len(shares)))
    genes = np.flatnonzero(shares > 0)
    for whole in blocks:
        for block in _cut(_with_counts(whole)):
            residuals = pearson_residuals(block, shares, n_cells, genes)
            total[genes] += residuals.sum(axis=0, dtype=np.float64)
            squares[genes] += np.einsum("ij,ij->j", residuals, residuals, dtype=np.float64)
    means = total / n_cells
    return means, squares / n_cells - means**2


def _covariances(
    blocks: Iterable[sparse.csr_array],
    shares: np.ndarray,
    n_cells: int,
    chosen: list[np.ndarray],
    batches: np.ndarray | None,
) -> tuple[list[np.ndarray], int]:
    """Compute the covariances of the chosen genes of both views, within batches: a float64 (k, k) for each.

    Return them, and the number of batches with counts.
    """
    n_batches = 1 if batches is None else int(batches.max()) + 1
    products = [np.zeros((len(genes), len(genes))) for genes in chosen]
    sums = [np.zeros((n_batches, len(genes))) for genes in chosen]
    sizes, first = np.zeros(n_batches), 0
    for whole in blocks:
        of_cells = np.zeros(whole.shape[0], np.int64) if batches is None else batches[first : first + whole.shape[0]]
        first += whole.shape[0]
        full = whole.sum(axis=1) > 0
        of_cells, start = of_cells[full], 0
        for block in _cut(_with_counts(whole)):
            of = of_cells[start : start + block.shape[0]]
            start += block.shape[0]
            member = sparse.csr_array((np.ones(len(of)), (of, np.arange(len(of)))), shape=(n_batches, len(of)))
            sizes += member.sum(axis=1)
            for view, values in enumerate(_dense_views(block, shares, n_cells, chosen)):
                values = values.astype(np.float32, copy=False)
                products[view] += values.T @ values
                sums[view] += member @ values.astype(np.float64)
    n_full, sizes = int(np.count_nonzero(sizes)), np.maximum(sizes, 1)[:, None]
    return [(product - of.T @ (of / sizes)) / n_cells for product, of in zip(products, sums, strict=True)], n_full


def _with_counts(block: sparse.csr_array) -> sparse.csr_array:
    full = block.sum(axis=1) > 0
    return block if full.all() else block[full]


def _leading(covariance: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Compute the k largest eigenvalues, descending, and eigenvectors, whose largest entries are positive."""
    n = len(covariance)
    if n <= _DENSE_EIGH or k > n // 4 or not covariance.any():  # ARPACK fails if nothing varies
        values, vectors = linalg.eigh(covariance, subset_by_index=[n - k, n - 1])
    else:
        values, vectors = eigsh(covariance, k, v0=np.ones(n) / np.sqrt(n))
    order = np.argsort(-values)
    values, vectors = values[order], vectors[:, order]
    signs = np.sign(vectors[np.abs(vectors).argmax(axis=0), np.arange(k)])
    return np.maximum(values, 0), vectors * np.where(signs == 0, 1, signs)
