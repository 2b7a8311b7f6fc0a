"""Simple baselines of cell classification."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData
from scipy import sparse
from sklearn.dummy import DummyClassifier
from sklearn.linear_model import LogisticRegression

from ..store.cell_store import CellStore
from .metrics import classification_metrics

logger = logging.getLogger(__name__)

_ROWS_PER_BLOCK = 4096
# Of a linear model of all genes: values to read (about 1 GB), and times its outputs (about a minute).
_MOST_VALUES, _MOST_PRODUCTS = 40_000_000, 2_000_000_000
_FEW_CELLS = 10_000  # are always read


def most_cells_to_fit(lengths: np.ndarray, n_outputs: int) -> int:
    """Return how many cells a linear model of all genes is fitted to, so that memory and time are bounded.

    `lengths` (n,) are the numbers of expressed genes of all cells.
    """
    values = min(_MOST_VALUES, _MOST_PRODUCTS / max(n_outputs, 1))
    return max(_FEW_CELLS, int(values / max(lengths.mean(), 1)))


def classification_baselines(
    train: CellStore, held_out: CellStore, label: str, *, max_train_cells: int | None = None, seed: int = 0
) -> dict[str, float]:
    """Score simple classifiers of cells, for comparison with a model on the same cells.

    Both stores have the same genes, and the categorical column `label`; cells without a label are left out. If there
    are more than `max_train_cells` training cells (default: `most_cells_to_fit`), a random subset of `seed` is used,
    and a warning is logged.

    Returns
    -------
    dict of str to float
        `majority_accuracy` and `majority_macro_f1`, of the most frequent training class;
        `logistic_regression_accuracy` and `logistic_regression_macro_f1`, see `predict_logistic_regression`. The macro
        F1 is the mean over the classes of the held-out cells, the same for all classifiers; with one training class,
        the logistic regression is the majority.

    Raises
    ------
    ValueError
        There are no labelled cells, or no such column; the stores have different genes.
    """
    for cells in (train, held_out):
        if label not in cells.categories:
            raise ValueError(f"No categorical column {label!r}; those are {', '.join(cells.categories) or 'none'}.")
    if not np.array_equal(train.gene_ids, held_out.gene_ids):
        raise ValueError("The stores have different genes: build one store from both, and select the cells.")
    rows, test_rows = (np.flatnonzero(cells.obs[label].cat.codes.to_numpy() >= 0) for cells in (train, held_out))
    if not len(rows) or not len(test_rows):
        raise ValueError(
            f"{len(rows)} training and {len(test_rows)} held-out cells have a {label!r}: both are needed."
        )
    labels, true = (
        cells.obs[label].astype(str).to_numpy()[of] for cells, of in ((train, rows), (held_out, test_rows))
    )
    predicted = {"majority": predict_majority(labels, len(true))}
    if max_train_cells is None:
        max_train_cells = most_cells_to_fit(train.lengths[rows], len(np.unique(labels)))
    if len(rows) > max_train_cells:
        logger.warning(f"The baselines are fitted to {max_train_cells:,} of {len(rows):,} training cells.")
        chosen = np.sort(np.random.default_rng(seed).choice(len(rows), max_train_cells, replace=False))
        rows, labels = rows[chosen], labels[chosen]
    predicted["logistic_regression"] = predicted["majority"]
    if len(np.unique(labels)) > 1:
        classifier = LogisticRegression(max_iter=2000)
        classifier.fit(sparse.vstack(list(_blocks(train, rows)), format="csr"), labels)
        # There may be many held-out cells: predict block by block.
        predicted["logistic_regression"] = np.concatenate(
            [classifier.predict(block) for block in _blocks(held_out, test_rows)]
        )
    return {
        f"{name}_{figure}": value
        for name, classes in predicted.items()
        for figure, value in classification_metrics(true, classes, np.unique(true)).items()
    }


def _blocks(store: CellStore, rows: np.ndarray) -> Iterator[sparse.csr_array]:
    """Read log-normalised cells in blocks of some thousands."""
    for start in range(0, len(rows), _ROWS_PER_BLOCK):
        yield log_normalise(store.rows(rows[start : start + _ROWS_PER_BLOCK]))


def predict_majority(train_labels: Sequence, n_test: int) -> np.ndarray:
    """Predict the most frequent training class for every cell: array (n_test,)."""
    empty = np.zeros((len(train_labels), 1))
    return DummyClassifier(strategy="most_frequent").fit(empty, train_labels).predict(np.zeros((n_test, 1)))


def predict_logistic_regression(
    train_counts: sparse.sparray | np.ndarray, train_labels: Sequence, test_counts: sparse.sparray | np.ndarray
) -> np.ndarray:
    """Predict with a logistic regression on log-normalised counts, ln(1 + 10,000 count / total), C = 1.

    Parameters
    ----------
    train_counts, test_counts : sparse or dense (n_train, n_genes), (n_test, n_genes)
        Raw counts of the same genes.
    train_labels : sequence (n_train,)
        Classes of the training cells.

    Returns
    -------
    array (n_test,)
    """
    classifier = LogisticRegression(max_iter=2000)
    return classifier.fit(log_normalise(train_counts), train_labels).predict(log_normalise(test_counts))


def log_normalise(counts: sparse.sparray | np.ndarray, totals: np.ndarray | None = None) -> sparse.csr_array:
    """Compute ln(1 + 10,000 count / total of the cell): float64 (n, n_genes); a cell without counts stays 0.

    The totals (n,) are the sums of the counts by default.
    """
    values = sparse.csr_array(counts, dtype=np.float64, copy=True)
    values.sum_duplicates()
    totals = values.sum(axis=1) if totals is None else totals
    values.data = np.log1p(1e4 * values.data / np.repeat(np.where(totals > 0, totals, 1), np.diff(values.indptr)))
    return values


def import_scvi() -> Any:
    """Return the module scvi; an ImportError says how to install it."""
    try:
        import scvi
    except ImportError as error:
        raise ImportError(f"The baseline scvi needs its extra: pip install 'stformer_hf[scvi]' ({error}).") from error
    return scvi


def scvi_embedding(counts: sparse.csr_array, batches: np.ndarray | None, seed: int) -> np.ndarray:
    """Train scVI (Lopez et al. 2018) with its defaults, batches included: float64 array (n_cells, d)."""
    scvi = import_scvi()
    scvi.settings.seed = seed
    cells = AnnData(sparse.csr_matrix(counts).astype(np.float32))
    if batches is not None:
        cells.obs["batch"] = pd.Categorical(batches)
    scvi.model.SCVI.setup_anndata(cells, batch_key=None if batches is None else "batch")
    model = scvi.model.SCVI(cells)
    model.train()
    return np.asarray(model.get_latent_representation(), np.float64)
