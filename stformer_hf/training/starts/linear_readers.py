"""Linear models of cells (readers), with regularisation and weights chosen by inner cross-validation."""

from __future__ import annotations

import itertools
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypedDict

import numpy as np
import torch
from scipy import sparse, special
from scipy.optimize import minimize_scalar
from scipy.spatial.distance import cdist
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.model_selection import GroupKFold, KFold, StratifiedGroupKFold, StratifiedKFold
from threadpoolctl import threadpool_limits
from tqdm.auto import tqdm

from ..log_lines import log_wait

# (training rows, validation rows) -> features of both, fitted to the training rows.
FoldFeatures = Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]


class _Settings(TypedDict):
    """What `choose_readers` chooses; see `ReaderChoice`."""

    head: float
    wide: float
    weights: tuple[float, float]


N_FOLDS = 5
PENALTIES: dict[str, tuple[float, ...]] = {"head": (0.1, 1.0), "wide": (0.1, 1.0)}  # C of scikit-learn
WEIGHTS = ((1.0, 1.0), (1.0, 0.5), (0.5, 1.0), (1.0, 0.0), (0.0, 1.0))  # of head and wide
# Kept unless another choice is clearly better: the genes at half the weight, since from few labels a reader of
# thousands of genes learns less than one of 100 components.
PREFERRED: _Settings = {"head": 1.0, "wide": 1.0, "weights": (1.0, 0.5)}
_TEMPERATURES = (0.5, 0.7, 1.0, 1.4, 2.0, 2.8)  # for the choice of the other settings
_TOLERANCES = {"choice": 1e-3, "final": 1e-4}  # of lbfgs
_LOWEST = -15.0  # logit of a class that a training fold lacks
_SMALL = 1000  # with fewer cells, cross-validation is repeated


@dataclass
class Linear:
    """A linear map from features to classes: `features @ weight + bias`."""

    weight: np.ndarray  # float64 (n_features, n_outputs)
    bias: np.ndarray  # float64 (n_outputs,)

    def __call__(self, features: np.ndarray) -> np.ndarray:
        """Map features (n, n_features) to (n, n_outputs)."""
        return features @ self.weight + self.bias


@dataclass
class ReaderChoice:
    """Settings chosen by inner cross-validation.

    Attributes
    ----------
    head, wide : float
        C of the reader of `[CLS]`, and of the genes.
    weights : tuple of float
        Weights of both readers.
    temperature : float
    loss, score : float
        Mean out-of-fold log loss in nats (squared error for regression), and accuracy (R^2); NaN without predictions.
    out_of_fold : float32 array (n_cells, n_outputs)
        Out-of-fold predictions, the mean over repeats: log probabilities of classes, logits of multiple labels per
        cell, or numbers for regression.
        NaN for a label, of multiple ones, that no model which has not seen the cell knows.
    rows : int64 array (n_cells,)
        Rows of these cells among those that the choice was made by, ascending.
    distances : float32 array (n_cells,), optional
        Distance of each cell to the nearest of the centroids of the classes in its training folds, in the features of
        the head; the mean over repeats. Only for classes.
    """

    head: float
    wide: float
    weights: tuple[float, float]
    temperature: float
    loss: float
    score: float
    out_of_fold: np.ndarray
    rows: np.ndarray
    distances: np.ndarray | None = None


class Problem:
    """A prediction problem (classes, multiple labels per cell, or numbers), and the fit of a linear reader for it.

    `kind` is that of `config.problem_type`, `n_outputs` the number of classes, labels or numbers per cell; with
    `balanced`, all classes have the same weight in a fit, whatever their number of cells.
    """

    def __init__(self, kind: str, n_outputs: int, balanced: bool = False):
        self.kind, self.n_outputs, self.balanced = kind, n_outputs, balanced

    def fit(
        self, features: np.ndarray | sparse.csr_array, labels: np.ndarray, penalty: float, purpose: str = "final"
    ) -> Linear:
        """Fit a logistic regression, one per label if there are multiple, or a ridge regression with alpha = 1 / C.

        Fits with the purpose "choice" stop earlier than a "final" one.
        """
        n_features = features.shape[1]
        if self.kind == "regression":
            found = Ridge(alpha=1 / penalty).fit(features, labels.reshape(len(labels), -1))
            return Linear(found.coef_.reshape(-1, n_features).T, np.atleast_1d(found.intercept_))
        if self.kind == "multi_label_classification":
            columns = [self._logistic(features, of, 2, penalty, purpose) for of in labels.T.astype(np.int64)]
            weight = np.stack([one.weight[:, 1] - one.weight[:, 0] for one in columns], axis=1)
            return Linear(weight, np.array([one.bias[1] - one.bias[0] for one in columns]))
        return self._logistic(features, labels, self.n_outputs, penalty, purpose)

    def _logistic(
        self,
        features: np.ndarray | sparse.csr_array,
        labels: np.ndarray,
        n_classes: int,
        penalty: float,
        purpose: str,
    ) -> Linear:
        weight, bias = np.zeros((features.shape[1], n_classes)), np.full(n_classes, _LOWEST)
        present = np.unique(labels)
        if len(present) < 2:
            bias[present] = 0.0
            return Linear(weight, bias)
        class_weight = "balanced" if self.balanced else None
        found = LogisticRegression(C=penalty, max_iter=500, tol=_TOLERANCES[purpose], class_weight=class_weight)
        found.fit(features, labels)
        if len(present) == 2:
            weight[:, present] = found.coef_.T * [-0.5, 0.5]
            bias[present] = found.intercept_ * [-0.5, 0.5]
        else:
            weight[:, present], bias[present] = found.coef_.T, found.intercept_
        return Linear(weight, bias)

    def combine(self, head: np.ndarray, wide: np.ndarray, weights: tuple[float, float]) -> np.ndarray:
        """Combine the outputs of both readers, as the model's `combine_readers` does at a temperature of 1."""
        if self.kind == "regression":
            return (weights[0] * head + weights[1] * wide) / sum(weights)
        if self.kind == "single_label_classification":
            head, wide = special.log_softmax(head, axis=1), special.log_softmax(wide, axis=1)
        return weights[0] * head + weights[1] * wide

    def loss(self, outputs: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """Compute the loss of each cell, log loss in nats or squared error: float64 array (n,).

        Of multiple labels, those that are NaN do not count; nor do they in a score.
        """
        if self.kind == "regression":
            return ((outputs - labels.reshape(outputs.shape)) ** 2).mean(axis=1)
        if self.kind == "multi_label_classification":
            return np.nanmean(np.logaddexp(0, outputs) - labels * outputs, axis=1)
        return -special.log_softmax(outputs, axis=1)[np.arange(len(labels)), labels]

    def cell_scores(self, outputs: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """Compute the score of each cell, higher is better: float64 array (n,).

        The score is 1 for a correct class, else 0; for multiple labels the share that is correct; for regression the
        negative squared error.
        """
        if self.kind == "regression":
            return -self.loss(outputs, labels)
        if self.kind == "multi_label_classification":
            return np.nanmean(np.where(np.isnan(labels), np.nan, (outputs > 0) == (labels > 0.5)), axis=1)
        return (outputs.argmax(axis=1) == labels).astype(np.float64)

    def that_count(self, known: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return which of some cells count in a test of a model that was fitted to known labels, and their labels.

        A cell counts if its class is among the known ones. With multiple labels, it counts if a known cell has the
        same value, 0 or 1, of any label; values that no known cell has become NaN.

        Returns
        -------
        counts : bool array (n,)
        labels : array (n, …), as `labels`
        """
        if self.kind == "regression":
            return np.ones(len(labels), bool), labels
        if self.kind == "multi_label_classification":
            learnt = np.stack([np.isin(of, of_known) for of_known, of in zip(known.T, labels.T, strict=True)], axis=1)
            return np.asarray(learnt.any(axis=1)), np.where(learnt, labels, np.float32(np.nan))
        return np.asarray(np.isin(labels, known)), labels

    def score(self, outputs: np.ndarray, labels: np.ndarray) -> float:
        """Compute the accuracy, for multiple labels the mean over labels, or R^2 for regression."""
        if self.kind == "regression":
            labels = labels.reshape(outputs.shape)
            return float(1 - ((outputs - labels) ** 2).sum() / max(((labels - labels.mean(axis=0)) ** 2).sum(), 1e-12))
        return float(self.cell_scores(outputs, labels).mean())


@contextmanager
def quick_fits() -> Iterator[None]:
    """Fit readers in this context without BLAS threads, which slow down products of few columns."""
    with warnings.catch_warnings(), threadpool_limits(1, "blas"):
        # The last digits of a fit that stops at max_iter do not change predictions.
        warnings.simplefilter("ignore", ConvergenceWarning)
        yield


def inner_folds(
    problem: Problem,
    labels: np.ndarray,
    groups: np.ndarray | None,
    seed: int,
    twins: np.ndarray | None = None,
) -> list[tuple[np.ndarray, np.ndarray, int]]:
    """Split cells with `labels` (n, …) into folds with similar shares of each class, and each group in one fold only.

    `groups` (n,) are those of the cells, such as donors. Classes in several columns, (n, n_columns), are not
    stratified. Without groups, copies of a cell (equal numbers in `twins`, (n,)) are in one fold; groups with a copy
    in common must be joined before.

    Returns
    -------
    list of (training rows, validation rows, repeat)
        5 folds (fewer if there are fewer groups, or fewer cells in the largest class), twice for fewer than 1,000
        cells.

    Raises
    ------
    ValueError
        There are fewer than two groups.
    """
    if twins is not None and groups is None:
        firsts, of_cell = np.unique(twins, return_index=True, return_inverse=True)[1:]
        folds = inner_folds(problem, labels[firsts], None, seed)

        def rows(part: np.ndarray) -> np.ndarray:
            return np.flatnonzero(np.isin(of_cell, part))

        return [(rows(train), rows(held_out), repeat) for train, held_out, repeat in folds]
    n, single = len(labels), problem.kind == "single_label_classification" and labels.ndim == 1
    most = int(np.bincount(labels).max()) if single else n
    single = single and most > 1  # nothing to stratify
    n_folds = max(min(N_FOLDS, most), 2)
    if groups is not None:
        n_groups = len(np.unique(groups))
        if n_groups < 2:
            raise ValueError(f"Cross-validation by groups needs at least two groups, got {n_groups}.")
        n_folds = min(n_folds, n_groups)
    folds = []
    for repeat in range(2 if n < _SMALL and groups is None else 1):
        random = {"shuffle": True, "random_state": seed + repeat}
        if groups is None:
            cutter = StratifiedKFold(n_folds, **random) if single else KFold(n_folds, **random)
        else:
            cutter = StratifiedGroupKFold(n_folds, **random) if single else GroupKFold(n_folds)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # classes with fewer cells than folds
            folds += [(*cut, repeat) for cut in cutter.split(np.zeros(n), labels if single else None, groups)]
    return folds


def centroids(states: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Compute the mean of each class that has cells: float64 array (n_classes, d)."""
    return np.stack([states[labels == label].mean(axis=0) for label in np.unique(labels)])


def fit_temperature(problem: Problem, outputs: np.ndarray, labels: np.ndarray) -> float:
    """Fit the temperature with the lowest mean loss of out-of-fold outputs, between 0.25 and 8.

    It is 1 for regression, and without cells. `outputs`, float (n, n_outputs), are those at a temperature of 1.
    """
    if problem.kind == "regression" or not len(labels):
        return 1.0
    found = minimize_scalar(
        lambda log: float(problem.loss(outputs / np.exp(log), labels).mean()),
        bounds=np.log([0.25, 8]),
        method="bounded",
    )
    return float(np.exp(found.x))


def choose_readers(
    problem: Problem,
    labels: np.ndarray,
    folds: Sequence[tuple[np.ndarray, np.ndarray, int]],
    head_features: FoldFeatures,
    gene_features: np.ndarray | sparse.csr_array,
    needs_head: bool = False,
    earlier: ReaderChoice | None = None,
) -> ReaderChoice:
    """Fit readers with all settings in all folds, and choose settings and a temperature by their out-of-fold loss.

    The preferred settings (`PREFERRED`, or those of an earlier choice) are kept unless the mean loss of the best other
    settings is lower by more than the standard error of the difference over cells (the one-standard-error rule of
    Breiman et al. 1984), since the best of many choices is partly so by chance. The loss is log loss in nats, or for
    regression the squared error, at the best temperature of the settings. Unlike accuracy, it differs between readers
    that are right about the same cells. The temperature is that of `fit_temperature`.

    A cell whose class its training fold lacks, such as one of a class of a single cell or donor, counts in none of
    this: all readers are wrong about it, and the loss would favour those, and a temperature, that are never sure. Nor
    does one of its multiple labels that the fold lacks, while the others count. If no cell counts, the preferred
    settings are kept, at the temperature of a mean of both readers.

    Parameters
    ----------
    problem, labels, folds
        As for `inner_folds`, and its result.
    head_features : callable
        (training rows, validation rows) -> features of both, fitted to the training rows.
    gene_features : float array or csr_array (n, d)
        Features of the wide reader: from `rotate_genes`, or the log values of the genes.
    needs_head : bool, default: False
        Whether the weight of the head must be above 0.
    earlier : ReaderChoice, optional
        Choice from fewer cells: its regularisation is kept.

    Returns
    -------
    ReaderChoice
        Its `out_of_fold` and `distances` are those of the cells in a validation fold that count.
    """
    preferred, penalties = PREFERRED, PENALTIES
    if earlier is not None:
        preferred = {"head": earlier.head, "wide": earlier.wide, "weights": earlier.weights}
        penalties = {"head": (earlier.head,), "wide": (earlier.wide,)}
    gene_features = gene_features.astype(np.float32)  # twice as fast, and the last digits do not change a choice
    n_repeats = 1 + max(repeat for _, _, repeat in folds)
    tested = np.unique(np.concatenate([held_out for _, held_out, _ in folds]))
    every = np.concatenate([labels[tested]] * n_repeats)
    shape = (len(every), problem.n_outputs)
    heads, wides = ({penalty: np.zeros(shape) for penalty in penalties[reader]} for reader in ("head", "wide"))
    of_classes = problem.kind == "single_label_classification"
    distances = np.zeros(len(every)) if of_classes else None
    counts = np.zeros(len(every), bool)

    def fit_fold(fold: tuple[np.ndarray, np.ndarray, int]) -> None:
        train, held_out, repeat = fold
        of_train, of_held_out = head_features(train, held_out)
        at = repeat * len(tested) + tested.searchsorted(held_out)
        counts[at], every[at] = problem.that_count(labels[train], labels[held_out])
        of_both = ((heads, of_train, of_held_out), (wides, gene_features[train], gene_features[held_out]))
        for readers, known, others in of_both:
            for penalty, outputs in readers.items():
                outputs[at] = problem.fit(known, labels[train], penalty, "choice")(others)
        if distances is not None:
            distances[at] = cdist(of_held_out, centroids(of_train, labels[train])).min(axis=1)

    n_threads, began = min(torch.get_num_threads(), len(folds)), time.monotonic()
    with quick_fits(), ThreadPoolExecutor(n_threads) as pool:
        fits = pool.map(fit_fold, folds)
        for i, _ in enumerate(tqdm(fits, "choose linear models", len(folds), unit="fold", disable=None)):
            if i == 0:
                seconds = (time.monotonic() - began) * len(folds) / n_threads
                log_wait(f"Choosing linear models for {len(labels):,} cells", seconds)

    every, heads, wides = every[counts], *({of: out[counts] for of, out in some.items()} for some in (heads, wides))
    # The repeats of a cell are not independent: what is compared is its mean over them.
    rows, of_row = np.unique(np.tile(tested, n_repeats)[counts], return_inverse=True)

    def mean_of_cells(values: np.ndarray) -> np.ndarray:
        sums, n_known = np.zeros((2, len(rows), *values.shape[1:]))
        known = ~np.isnan(values)
        np.add.at(sums, of_row, np.where(known, values, 0))
        np.add.at(n_known, of_row, known)
        return np.where(n_known > 0, sums / np.maximum(n_known, 1), np.nan)

    temperatures = (1.0,) if problem.kind == "regression" else _TEMPERATURES
    chosen = preferred
    if len(rows):
        tried: list[tuple[np.ndarray, _Settings]] = []
        for head, wide, weights in itertools.product(heads, wides, WEIGHTS):
            if weights[0] > 0 or not needs_head:
                both = problem.combine(heads[head], wides[wide], weights)
                losses = [mean_of_cells(problem.loss(both / t, every)) for t in temperatures]
                tried.append((min(losses, key=np.mean), {"head": head, "wide": wide, "weights": weights}))
        best = min(tried, key=lambda one: one[0].mean())
        usual = next(one for one in tried if one[1] == preferred)
        gain = usual[0] - best[0]
        if gain.mean() > gain.std(ddof=1) / np.sqrt(len(gain)):
            chosen = best[1]
    both = problem.combine(heads[chosen["head"]], wides[chosen["wide"]], chosen["weights"])
    temperature = fit_temperature(problem, both, every) if len(rows) else float(sum(chosen["weights"]))
    outputs = both / temperature
    loss = float(problem.loss(outputs, every).mean()) if len(rows) else np.nan
    if of_classes:
        outputs = special.log_softmax(outputs, axis=1)
    elif problem.kind == "multi_label_classification":
        outputs = np.where(np.isnan(every), np.nan, outputs)
    score, outputs = problem.score(outputs, every) if len(rows) else np.nan, mean_of_cells(outputs)
    # Means of log probabilities are not normalised.
    outputs = special.log_softmax(outputs, axis=1) if of_classes else outputs
    return ReaderChoice(
        **chosen,
        temperature=temperature,
        loss=loss,
        score=score,
        out_of_fold=outputs.astype(np.float32),
        rows=rows,
        distances=None if distances is None else mean_of_cells(distances[counts]).astype(np.float32),
    )
