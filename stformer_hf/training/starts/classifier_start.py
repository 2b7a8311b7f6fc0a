"""Start a classifier at linear readers of the whole cell and of all its genes."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from scipy import sparse
from scipy.sparse.linalg import eigsh
from sklearn.model_selection import train_test_split
from torch import nn

from ...batches.collate import pad, read_tokens
from ...batches.evaluating import evaluating
from ...evaluation.readers import rotate_genes
from ...models.gene_bert.modeling_gene_bert import GeneBertForClassification
from ...models.gene_bert.tokenization_gene_bert import GeneTokenizer
from ...store.cell_store import CellStore
from .linear_readers import Problem, ReaderChoice, centroids, choose_readers, inner_folds, quick_fits
from .spectral_start import cell_embedding_of, count_blocks, set_views
from .spectral_views import SpectralViews, fit_spectral_views, log_values, pearson_residuals

logger = logging.getLogger(__name__)

N_COMPONENTS = (20, 30, 50)  # per view, to choose from
MOST_CELLS_TO_CHOOSE = 3000
MOST_CELLS_TO_FIT = 10_000
_ROTATED = 3000  # up to this many cells, genes are rotated before a fit


Rotated = tuple[np.ndarray, Callable[[np.ndarray], np.ndarray]]


@dataclass
class ClassifierStart:
    """The start of a classifier.

    Attributes
    ----------
    choice : ReaderChoice
        Choice of inner cross-validation on training cells.
    rows : int64 array (n,)
        Rows in the store of the cells used for the choice.
    labels : array (n, …)
        Labels of these cells.
    rotated : (features, callable)
        Output of `rotate_genes` for these cells.
    centroids : float32 array (n_classes, d), optional
        Mean state of the training cells of each class: inputs of the head. Only for classes.
    """

    choice: ReaderChoice
    rows: np.ndarray
    labels: np.ndarray
    rotated: Rotated
    centroids: np.ndarray | None = None


def start_classifier(
    model: GeneBertForClassification,
    tokenizer: GeneTokenizer,
    cells: CellStore,
    labels: np.ndarray,
    *,
    groups: np.ndarray | None = None,
    new_embedding: bool = True,
    seed: int = 0,
    balanced: bool = False,
    choice: ReaderChoice | None = None,
    rotated: Rotated | None = None,
) -> ClassifierStart | None:
    """Start a classifier at linear readers of its training cells.

    The head becomes the regularised logistic (ridge) regression on `[CLS]`, the wide head the one on the log values
    of all genes. Regularisation, components of the views, the weights of both readers and a temperature are chosen by
    inner cross-validation, in which the axes of the views and the readers are fitted without the validation cells;
    then everything is fitted to all cells.

    Parameters
    ----------
    model : GeneBertForClassification
        Model with `cell_embedding`, a linear head and `wide_head`; changed in place.
    tokenizer : GeneTokenizer
        Tokenizer of the model.
    cells : CellStore
        Training cells, all with counts.
    labels : array
        int64 (n,) classes, float (n, k) labels of 0 and 1, or float (n,) or (n, k) numbers, by `config.problem_type`.
    groups : array (n,), optional
        Cells of one group, such as a donor, are never in both training and validation.
    new_embedding : bool, default: True
        Also fit the spectral views to these cells. False keeps the embedding, of a pretrained model or one that was
        started on more cells.
    seed : int, default: 0
        Seed of the folds, and of the subsets of many cells.
    balanced : bool, default: False
        Whether all classes have the same weight, whatever their number of cells.
    choice : ReaderChoice, optional
        An earlier choice; by default it is made here.
    rotated : (features, callable), optional
        Output of `rotate_genes` for these cells, or these and others; computed here by default. A rotation carries no
        information from the other cells: the fitted readers are the same.

    Returns
    -------
    ClassifierStart or None
        None if there is only one class, which the model then always predicts.

    Notes
    -----
    Starting the head at the linear solution: Kumar et al. 2022 (LP-FT). With more than 3,000 cells, a stratified
    subset is used for the choice, and with more than 10,000 one for fitting the readers; the views are always fitted
    to all cells.
    """
    config, embedding = model.config, cell_embedding_of(model)
    problem = Problem(config.problem_type, config.num_labels, balanced)
    blocks = count_blocks(cells, tokenizer)
    half = embedding.genes.weight.shape[1] // 2
    components = sorted({min(n, half, max(len(cells) - 1, 1)) for n in N_COMPONENTS})
    if choice is not None:
        components = [min(choice.n_components, components[-1])]
    views = fit_spectral_views(blocks, components[-1]) if new_embedding else None
    if problem.kind == "single_label_classification" and len(np.unique(labels)) < 2:
        if views is not None:
            set_views(embedding, views, config.initializer_range)
        _write(model, Problem.fit(problem, np.zeros((len(labels), 1)), labels, 1.0), None)
        config.reader_weights, config.temperature = [1.0, 0.0], 1.0
        return None

    def read(rows: np.ndarray) -> sparse.csr_array:
        chosen = cells.select(rows)
        return sparse.csr_array(sparse.vstack(list(count_blocks(chosen, tokenizer, progress=False)())))

    rows = _subset(problem, labels, MOST_CELLS_TO_CHOOSE, seed)
    counts, of = read(rows), labels[rows]
    values = log_values(counts) if views is not None else _log_values_of(model, tokenizer, cells, counts)
    gene_features, to_genes = rotated or rotate_genes(values)
    if views is None:
        states = cell_states(model, tokenizer, cells.select(rows))
        components = [half]

        def features(train: np.ndarray, held_out: np.ndarray) -> Callable:
            return lambda n_components: (states[train], states[held_out])

    else:
        features = _ViewsOfFolds(counts, values, views, half)
    if choice is None:
        folds = inner_folds(problem, of, None if groups is None else groups[rows], seed)
        choice = choose_readers(problem, of, folds, features, gene_features, components)
    if views is not None:
        kept = min(choice.n_components, components[-1])
        views.loadings = [loadings[:, :kept] for loadings in views.loadings]
        set_views(embedding, views, config.initializer_range)

    to_fit = _subset(problem, labels, MOST_CELLS_TO_FIT, seed)
    if len(to_fit) < len(labels):
        logger.warning(f"The readers are fitted to {len(to_fit):,} of {len(labels):,} training cells.")
    if views is None:
        states = states if np.array_equal(to_fit, rows) else cell_states(model, tokenizer, cells.select(to_fit))
    else:
        states = scaled(views.transform(counts if np.array_equal(to_fit, rows) else read(to_fit)), half)
    with quick_fits():
        head = problem.fit(states, labels[to_fit], choice.head)
    if np.array_equal(to_fit, rows) and len(rows) <= _ROTATED:
        with quick_fits():
            wide = problem.fit(gene_features, of, choice.wide)
        wide.weight = to_genes(wide.weight)
    else:
        counts = read(to_fit)
        values = log_values(counts) if views is not None else _log_values_of(model, tokenizer, cells, counts)
        with quick_fits():
            wide = problem.fit(values, labels[to_fit], choice.wide)
    _write(model, head, wide)
    config.reader_weights, config.temperature = [float(w) for w in choice.weights], float(choice.temperature)
    means = None
    if problem.kind == "single_label_classification":
        means = centroids(states, labels[to_fit]).astype(np.float32)
    return ClassifierStart(choice, rows, of, (gene_features, to_genes), means)


def _log_values_of(
    model: GeneBertForClassification, tokenizer: GeneTokenizer, cells: CellStore, counts: sparse.csr_array
) -> sparse.csr_array:
    """Compute the log values read by a model that has its own statistics: csr_array (n, n_genes).

    They are ln(1 + 10,000 x / depth). The depth is the total over the genes that the model has seen and the store
    measures, divided by their share of all counts: see `CellValues`.
    """
    shares = cell_embedding_of(model).statistics.shares.cpu().double().numpy()
    measured = np.zeros(len(shares), bool)
    found = tokenizer.find_genes(cells.gene_ids, cells.genes.symbols)
    measured[found[found >= 0]] = True
    known = measured & (shares > 0)
    seen = sparse.csr_array(counts @ sparse.diags_array(known.astype(np.float64)))
    seen.eliminate_zeros()
    depths = np.maximum(seen.sum(axis=1), 1e-12) / max(shares[known].sum(), 1e-6)
    seen.data = np.log1p(1e4 * seen.data / np.repeat(depths, np.diff(seen.indptr)))
    return seen


def _subset(problem: Problem, labels: np.ndarray, most: int, seed: int) -> np.ndarray:
    """Choose a subset of cells, stratified if each class has at least two: int64 array, ascending."""
    if len(labels) <= most:
        return np.arange(len(labels))
    single = problem.kind == "single_label_classification"
    stratify = labels if single and np.bincount(labels)[np.unique(labels)].min() > 1 else None
    return np.sort(train_test_split(np.arange(len(labels)), train_size=most, random_state=seed, stratify=stratify)[0])


def scaled(views: list[np.ndarray], half: int) -> np.ndarray:
    """Scale each view of a cell as in `[CLS]`, and concatenate them: float64 array (n, 2 half)."""
    states = np.zeros((len(views[0]), 2 * half))
    for i, scores in enumerate(views):
        norms = np.maximum(np.linalg.norm(scores, axis=1, keepdims=True), 1e-12)
        states[:, i * half : i * half + scores.shape[1]] = scores / norms * np.sqrt(half)
    return states


class _ViewsOfFolds:
    """States of cells with axes fitted to training folds, computed from dot products of cells.

    Only the choice of genes of the views, and the shares of the genes, come from all cells given.
    """

    def __init__(self, counts: sparse.csr_array, values: sparse.csr_array, views: SpectralViews, half: int):
        self.half = half
        genes = [np.flatnonzero(loadings.any(axis=1)) for loadings in views.loadings]
        matrices = (
            values[:, genes[0]].toarray(),
            pearson_residuals(counts, views.shares, views.n_cells, genes[1]).astype(np.float64),
        )
        self._products = [matrix @ matrix.T for matrix in matrices]
        self._most = views.loadings[0].shape[1]

    def __call__(self, train: np.ndarray, held_out: np.ndarray) -> Callable[[int], tuple[np.ndarray, np.ndarray]]:
        of_views = [_principal_scores(products, train, held_out, self._most) for products in self._products]
        return lambda n: tuple(scaled([scores[part][:, :n] for scores in of_views], self.half) for part in (0, 1))


def _principal_scores(
    products: np.ndarray, train: np.ndarray, held_out: np.ndarray, k: int
) -> tuple[np.ndarray, np.ndarray]:
    """Compute the principal component scores of training and other cells from dot products of cells.

    Parameters
    ----------
    products : float64 array (n, n)
        Dot products of all cells, not centred.
    train, held_out : int64 array
        Rows; the mean and the axes are fitted to the training rows.
    k : int
        Number of components, at most that of the training cells - 1.

    Returns
    -------
    of_train (n_train, k), of_held_out (n_held_out, k)
    """
    inner = products[np.ix_(train, train)]
    means, mean = inner.mean(axis=0), inner.mean()
    inner = inner - means - means[:, None] + mean
    outer = products[np.ix_(held_out, train)]
    outer = outer - outer.mean(axis=1, keepdims=True) - means + mean
    k = min(k, len(train) - 1)
    if k > len(train) // 4:
        spread, vectors = np.linalg.eigh(inner)
    else:
        spread, vectors = eigsh(inner, k, v0=np.ones(len(train)) + np.arange(len(train)) / len(train))
    order = np.argsort(-spread)[:k]
    scale, vectors = np.sqrt(np.maximum(spread[order], 1e-9)), vectors[:, order]
    return vectors * scale, outer @ vectors / scale


def cell_states(model: nn.Module, tokenizer: GeneTokenizer, cells: CellStore, batch_size: int = 256) -> np.ndarray:
    """Compute the input of the head for each cell: float64 array (n, hidden), in the order of the cells.

    Parameters
    ----------
    model : GeneBertForClassification
    tokenizer : GeneTokenizer
    cells : CellStore
    batch_size : int, default: 256
    """

    def pooled(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        hidden = model.base_model(**batch).last_hidden_state
        return model.pool(hidden, batch["token_type_ids"], batch["attention_mask"])

    return run_cells(model, tokenizer, cells, pooled, batch_size)


@torch.no_grad()
def run_cells(
    model: nn.Module, tokenizer: GeneTokenizer, cells: CellStore, forward: Callable, batch_size: int
) -> np.ndarray:
    """Apply a function of a batch to cells, in batches: float64 array (n, d), in the order of the cells."""
    device, found = next(model.parameters()).device, []
    with evaluating(model):
        for start in range(0, len(cells), batch_size):
            examples = cells.__getitems__(range(start, min(start + batch_size, len(cells))))
            batch = pad(read_tokens(examples, tokenizer), tokenizer)
            states = forward({name: value.to(device) for name, value in batch.items()})
            found.append(states.cpu().double().numpy())
    return np.concatenate(found)


@torch.no_grad()
def _write(model: GeneBertForClassification, head, wide) -> None:
    """Write linear readers into the heads of a model."""
    for layer, reader in ((model.classifier, head), (model.wide_head, wide)):
        bias = layer.bias
        if layer is model.classifier:
            layer.weight.zero_()
            if reader.weight.shape[0] == layer.weight.shape[1]:
                layer.weight.copy_(torch.from_numpy(reader.weight.T.copy()))
            bias.copy_(torch.from_numpy(reader.bias))
        elif reader is None:
            layer.genes.weight.zero_()
            bias.zero_()
        else:
            means = cell_embedding_of(model).statistics.means[0].cpu().double().numpy()
            layer.genes.weight.copy_(torch.from_numpy(reader.weight))
            bias.copy_(torch.from_numpy(reader.bias + means @ reader.weight))  # the wide head reads centred values


__all__ = ["ClassifierStart", "cell_states", "run_cells", "scaled", "start_classifier"]
