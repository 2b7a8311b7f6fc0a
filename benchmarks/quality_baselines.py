"""The baselines of `benchmarks quality`: what is fitted sees training cells only, and test cells are projected.

"trial" is a plain form, of scikit-learn's parts, of what the model starts at: logistic regression on two spectral
views of a cell (principal components of log-normalised variable genes and of analytic Pearson residuals), logistic
regression on the log-normalised genes, and the sum of their log probabilities.
"""

from __future__ import annotations

import warnings
from functools import cached_property

import numpy as np
from anndata import AnnData
from scipy import sparse
from sklearn.linear_model import LogisticRegression
from sklearn.utils.extmath import randomized_svd

THETA = 100.0  # inverse dispersion of the residuals, as in scanpy
N_VARIABLE = 2_000
N_COMPONENTS = 50
MIN_CELLS = 3  # that express a gene of the residuals
ROWS = ("majority", "lr", "pca50_lr", "trial_k30", "trial_k50")


def log_normalise(counts: sparse.csr_matrix) -> sparse.csr_matrix:
    """Compute ln(1 + 10,000 count / total of the cell), float32 (n, n_genes); a cell without counts stays 0."""
    totals = np.asarray(counts.sum(axis=1), np.float64).ravel()
    scaled = sparse.csr_matrix(sparse.diags_array(1e4 / np.maximum(totals, 1)) @ counts, dtype=np.float32)
    return scaled.log1p()


class _Components:
    """Principal components of rows, which others are projected on."""

    def __init__(self, rows: np.ndarray) -> None:
        self.mean = rows.mean(axis=0)
        k = min(N_COMPONENTS, *rows.shape)
        self.loadings = randomized_svd(rows - self.mean, k, n_iter=4, random_state=0)[2].T

    def project(self, rows: np.ndarray) -> np.ndarray:
        return (rows - self.mean) @ self.loadings


class LogView:
    """Principal components of the log-normalised counts of 2,000 variable genes (scanpy's default choice of them).

    Parameters
    ----------
    counts : csr_matrix (n, n_genes)
        Those of the cells to fit on.
    """

    def __init__(self, counts: sparse.csr_matrix) -> None:
        import scanpy as sc

        logged = AnnData(log_normalise(counts))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            sc.pp.highly_variable_genes(logged, n_top_genes=min(N_VARIABLE, logged.n_vars - 1))
        self.genes = np.flatnonzero(logged.var["highly_variable"].to_numpy())
        self.components = _Components(logged.X[:, self.genes].toarray())

    def project(self, counts: sparse.csr_matrix) -> np.ndarray:
        """Compute the components of cells, float32 (n, 50)."""
        return self.components.project(log_normalise(counts)[:, self.genes].toarray())


class ResidualView:
    """Principal components of analytic Pearson residuals of the 2,000 genes where these vary most.

    (x - mu) / sqrt(mu + mu^2 / 100), mu = total of the cell x share of the gene among the counts of the fitted cells,
    clipped at the square root of their number (Lause, Berens, Kobak 2021).

    Parameters
    ----------
    counts : csr_matrix (n, n_genes)
        Those of the cells to fit on.
    """

    def __init__(self, counts: sparse.csr_matrix) -> None:
        per_gene = np.asarray(counts.sum(axis=0), np.float64).ravel()
        self.shares = per_gene / per_gene.sum()
        self.clip = np.sqrt(counts.shape[0])
        self.genes = np.flatnonzero(counts.getnnz(axis=0) >= MIN_CELLS)
        residuals = self._residuals(counts)
        variable = np.sort(np.argsort(-residuals.var(axis=0), kind="stable")[:N_VARIABLE])
        self.genes = self.genes[variable]
        self.components = _Components(residuals[:, variable])

    def project(self, counts: sparse.csr_matrix) -> np.ndarray:
        """Compute the components of cells, float32 (n, 50)."""
        return self.components.project(self._residuals(counts))

    def _residuals(self, counts: sparse.csr_matrix) -> np.ndarray:
        totals = np.asarray(counts.sum(axis=1), np.float32).ravel()
        mean = np.outer(totals, self.shares[self.genes].astype(np.float32))
        residuals = counts[:, self.genes].toarray() - mean
        mean += mean**2 / np.float32(THETA)
        np.sqrt(mean, out=mean)
        # A cell without counts has residuals 0.
        np.divide(residuals, mean, out=residuals, where=mean > 0)
        return np.clip(residuals, -self.clip, self.clip, out=residuals)


class Baselines:
    """All baselines of one split, each part fitted once when it is first needed.

    Parameters
    ----------
    counts : csr_matrix (n, n_genes), float32
        Those of the labelled cells.
    labels : array of str (n,)
    unlabelled : csr_matrix (n_unlabelled, n_genes), float32
        Further cells for what needs no labels (the components); may have no rows.
    """

    def __init__(self, counts: sparse.csr_matrix, labels: np.ndarray, unlabelled: sparse.csr_matrix) -> None:
        self.counts, self.labels = counts, labels
        self._all = sparse.vstack([counts, unlabelled], format="csr")
        self._expressed = np.flatnonzero(counts.getnnz(axis=0))  # other genes get coefficients of 0

    def predict(self, row: str, counts: sparse.csr_matrix) -> np.ndarray:
        """Predict the class of each cell by the baseline that is named, array of str (n,)."""
        return np.unique(self.labels)[self.log_probabilities(row, counts).argmax(axis=1)]

    def log_probabilities(self, row: str, counts: sparse.csr_matrix) -> np.ndarray:
        """Compute log probabilities (for the trial: a sum of two) of the sorted classes, float (n, n_classes)."""
        if row == "majority":
            shares = np.unique(self.labels, return_counts=True)[1] / len(self.labels)
            return np.tile(np.log(shares), (counts.shape[0], 1))
        if row == "lr":
            return self._on_genes.predict_log_proba(self._dense(counts))
        if row == "pca50_lr":
            return self._on_components.predict_log_proba(self._log_view.project(counts))
        if row in ("trial_k30", "trial_k50"):
            k = int(row.removeprefix("trial_k"))
            views = self._on_views(k).predict_log_proba(self._views(counts, k))
            return views + self.log_probabilities("lr", counts)
        raise ValueError(f"No baseline {row!r}; there are {', '.join(ROWS)}.")

    @cached_property
    def _log_view(self) -> LogView:
        return LogView(self._all)

    @cached_property
    def _residual_view(self) -> ResidualView:
        return ResidualView(self._all)

    @cached_property
    def _on_genes(self) -> LogisticRegression:
        return logistic().fit(self._dense(self.counts), self.labels)

    @cached_property
    def _on_components(self) -> LogisticRegression:
        return logistic().fit(self._log_view.project(self.counts), self.labels)

    def _on_views(self, k: int) -> LogisticRegression:
        return logistic().fit(self._views(self.counts, k), self.labels)

    def _dense(self, counts: sparse.csr_matrix) -> np.ndarray:
        """Log-normalised genes; with many classes, dense float32 takes half of the time that sparse takes."""
        return log_normalise(counts)[:, self._expressed].toarray()

    def _views(self, counts: sparse.csr_matrix, k: int) -> np.ndarray:
        """Both views side by side, each of unit length times sqrt(k)."""
        views = [view.project(counts)[:, :k] for view in (self._log_view, self._residual_view)]
        return np.hstack(
            [np.sqrt(k) * view / np.maximum(np.linalg.norm(view, axis=1)[:, None], 1e-9) for view in views]
        )


def logistic() -> LogisticRegression:
    """Return the logistic regression of all baselines: C = 1."""
    return LogisticRegression(C=1.0, max_iter=2_000)
