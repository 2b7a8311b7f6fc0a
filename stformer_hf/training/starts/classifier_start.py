"""Start a classifier at linear models (readers) of the whole cell and of all its genes."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy import sparse
from scipy.sparse.linalg import eigsh
from sklearn.model_selection import train_test_split
from torch import nn

from ...batches.collate import pad, read_tokens
from ...batches.evaluating import evaluating
from ...evaluation.cell_baselines import most_cells_to_fit
from ...evaluation.readers import rotate_genes
from ...models.gene_bert.modeling_gene_bert import GeneBertForClassification
from ...models.gene_bert.tokenization_gene_bert import GeneTokenizer
from ...store.cell_store import CellStore
from .labelled_cells import LabelledCells, labelled_cells
from .linear_readers import (
    FoldFeatures,
    Linear,
    Problem,
    ReaderChoice,
    centroids,
    choose_readers,
    inner_folds,
    quick_fits,
)
from .spectral_start import N_COMPONENTS, cell_embedding_of, count_blocks, set_views
from .spectral_views import SpectralViews, fit_spectral_views, log_values, pearson_residuals

logger = logging.getLogger(__name__)

MOST_CELLS_TO_CHOOSE = 3000
MOST_CELLS_TO_RUN = 10_000  # through the layers of a trained encoder
_OF_CLASSES = "single_label_classification"
_ROTATED = 3000  # up to this many cells, genes are rotated before a fit

Rotated = tuple[np.ndarray, Callable[[np.ndarray], np.ndarray]]


@dataclass
class ClassifierStart:
    """The start of a classifier, or of one of its label columns.

    Attributes
    ----------
    choice : ReaderChoice
        Choice of inner cross-validation on training cells.
    rows : int64 array (n,)
        Rows in the store of the cells used for the choice.
    labels : array (n, …)
        Labels of these cells.
    rotated : (features, callable), optional
        Output of `rotate_genes` for the cells that chose the regularisation; None for an earlier choice from some of
        the cells.
    centroids : float32 array (n_classes, d), optional
        Mean state of the training cells of each class: inputs of the head. Only for classes.
    """

    choice: ReaderChoice
    rows: np.ndarray
    labels: np.ndarray
    rotated: Rotated | None = None
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
    to_train: bool = False,
    choices: Mapping[str | None, ReaderChoice] | None = None,
    rotated: Mapping[str | None, Rotated] | None = None,
) -> dict[str | None, ClassifierStart]:
    """Start a classifier at linear models (readers) of its training cells.

    The head becomes the regularised logistic (ridge) regression on `[CLS]`, the wide head the one on the log values
    of all genes. Regularisation, the weights of both readers and a temperature are chosen by inner cross-validation,
    in which the axes of the views (50 each, fewer for a smaller model or fewer cells) and the readers are fitted
    without the validation cells; then everything is fitted to all cells. For several label columns, all this is done
    for each of them with the cells that have its label, and the axes of the views are fitted to all cells.

    Parameters
    ----------
    model : GeneBertForClassification
        Model with `cell_embedding`, a linear head and `wide_head`; changed in place.
    tokenizer : GeneTokenizer
        Tokenizer of the model.
    cells : CellStore
        Training cells, all with counts.
    labels : array
        int64 (n,) classes, float (n, k) labels of 0 and 1, or float (n,) or (n, k) numbers, by `config.problem_type`;
        with `config.label_columns`, int64 (n, n_columns) classes, -100 where there is none.
    groups : array (n,), optional
        Cells of one group, such as a donor, are never in both training and validation.
    new_embedding : bool, default: True
        Also fit the spectral views to these cells. False keeps the embedding, of a pretrained model or one that was
        started on more cells.
    seed : int, default: 0
        Seed of the folds, and of the subsets of many cells.
    balanced : bool, default: False
        Whether all classes have the same weight, whatever their number of cells.
    to_train : bool, default: False
        Whether the model is trained beyond this start: then the head has a weight above 0, without which the encoder
        would have no gradient.
    choices : mapping of str to ReaderChoice, optional
        Earlier choices by label column; by default they are made here.
    rotated : mapping of str to (features, callable), optional
        Output of `rotate_genes` for the cells of each label column, or these and others; computed here by default. A
        rotation carries no information from the other cells: the fitted readers are the same.

    Returns
    -------
    dict of str to ClassifierStart
        By label column (None if there are not several). A column whose cells all have one class has none: the model
        then always predicts this class.

    Notes
    -----
    Starting the head at the linear solution: Kumar et al. 2022 (LP-FT). With more than 3,000 cells, a stratified
    subset is used for the choice of the regularisation, and then for the other choices the readers are fitted to four
    fifths of more cells. The axes of the views are then those of all cells, but by groups those of the other groups:
    axes that know a group put its cells farther from the centroids than those of a new group would be. The readers
    are fitted to all cells, or to as many as `most_cells_to_fit` allows (about 47,000 with 850 expressed genes each);
    the head of a trained encoder to at most 10,000, since the encoder must run on each. The views are always fitted
    to all cells.
    """
    config, embedding = model.config, cell_embedding_of(model)
    columns = labelled_cells(config, labels, balanced)
    blocks = count_blocks(cells, tokenizer)
    half = embedding.genes.weight.shape[1] // 2
    views = fit_spectral_views(blocks, min(N_COMPONENTS, half)) if new_embedding else None

    learnt = {column.column: column for column in columns if not _is_constant(column)}
    to_choose: dict[str | None, np.ndarray] = {}
    to_fit, to_fit_head = dict(to_choose), dict(to_choose)
    for name, column in learnt.items():
        most = most_cells_to_fit(cells.lengths[column.rows], column.problem.n_outputs)
        most_of_head = most if views is not None else min(most, MOST_CELLS_TO_RUN)
        for rows_of, n in ((to_choose, MOST_CELLS_TO_CHOOSE), (to_fit, most)):
            rows_of[name] = column.rows[_subset(column.problem, column.labels, n, seed)]
        of = column.labels_of(to_fit[name])
        to_fit_head[name] = to_fit[name][_subset(column.problem, of, most_of_head, seed)]
    if views is None and learnt:
        in_states = np.unique(np.concatenate([*to_choose.values(), *to_fit_head.values()]))
        states = cell_states(model, tokenizer, cells.select(in_states))

    def read(rows: np.ndarray) -> Iterator[tuple[sparse.csr_array, sparse.csr_array]]:
        for counts in count_blocks(cells.select(rows), tokenizer, progress=False)():
            known = views is not None
            yield counts, log_values(counts) if known else _log_values_of(model, tokenizer, cells, counts)

    def read_all(blocks: Iterable[tuple[sparse.csr_array, sparse.csr_array]]) -> tuple[sparse.csr_array, np.ndarray]:
        values, of_cells = [], [np.zeros((0, 2 * half))]
        for counts, of_block in blocks:
            values.append(of_block)
            if views is not None:
                of_cells.append(scaled(views.transform(counts), half))
        return _stack(values), np.concatenate(of_cells)

    def states_by(rows: np.ndarray, of_rows: np.ndarray) -> FoldFeatures:
        """Return the states of rows; by groups with axes of the other groups, as those of a new group are."""
        if groups is None or views is None:
            return lambda train, held_out: (of_rows[train], of_rows[held_out])

        def of_fold(train: np.ndarray, held_out: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            of_train, of_held_out = (
                count_blocks(cells.select(rows[of]), tokenizer, progress=False) for of in (train, held_out)
            )
            axes = fit_spectral_views(of_train, min(N_COMPONENTS, half))
            first, second = (
                np.concatenate([scaled(axes.transform(counts), half) for counts in blocks()])
                for blocks in (of_train, of_held_out)
            )
            return first, second

        return of_fold

    parts: dict[str | None, _Part] = {}
    for name, rows in to_choose.items():
        if choices is not None and len(to_fit[name]) > len(rows):
            continue  # nothing is chosen, and other cells are fitted
        alike = next((of for of in parts if np.array_equal(to_choose[of], rows)), name)
        if alike != name:
            parts[name] = parts[alike]
            continue
        counts, values = map(_stack, zip(*read(rows), strict=True))
        parts[name] = part = _Part(counts, values, rotate_genes(values) if rotated is None else rotated[name])
        if views is None:
            of_rows = states[np.searchsorted(in_states, rows)]
            part.features = lambda train, held_out, of=of_rows: (of[train], of[held_out])
        elif choices is None:
            part.features = _features_of_views(counts, values, views, half)

    chooses = choices is None
    choices = dict(choices or {})
    if chooses:
        for name, column in learnt.items():
            problem, part, rows = column.problem, parts[name], to_choose[name]
            of = column.labels_of(rows)
            folds = inner_folds(problem, of, None if groups is None else groups[rows], seed)
            assert part.features is not None  # set above, where the choice is to be made
            choices[name] = choose_readers(problem, of, folds, part.features, part.rotated[0], needs_head=to_train)
        for part in parts.values():
            part.features = None  # it holds matrices
    if views is not None:
        set_views(embedding, views, config.initializer_range)

    starts: dict[str | None, ClassifierStart] = {}
    readers = []
    for column in columns:
        name, problem = column.column, column.problem
        if name not in learnt:
            readers.append((*_constant_readers(column, model), (1.0, 0.0), 1.0))
            continue
        rows, fitted, of_head, known = to_choose[name], to_fit[name], to_fit_head[name], parts.get(name)
        for what, fewer in (("genes", fitted), ("[CLS]", of_head)):
            if len(fewer) < len(column.rows):
                n_cells = f"{len(fewer):,} of {len(column.rows):,} training cells"
                logger.warning(f"The linear model of {what} is fitted to {n_cells}.")
        all_read = known if len(fitted) == len(rows) else None
        values, of_cells = read_all(read(fitted) if all_read is None else [(all_read.counts, all_read.values)])
        if views is None:
            of_cells = states[in_states.searchsorted(of_head)]
        if chooses and len(of_head) > len(rows):
            of_both = values if len(of_head) == len(fitted) else values[fitted.searchsorted(of_head)]
            rows, choices[name] = _choose_again(
                column, of_head, states_by(of_head, of_cells), of_both, groups, seed, to_train, choices[name]
            )
        choice = choices[name]
        with quick_fits():
            head = problem.fit(of_cells, column.labels_of(of_head), choice.head)
            if all_read is not None and len(fitted) <= _ROTATED:
                features, to_genes = all_read.rotated
                wide = problem.fit(features, column.labels_of(fitted), choice.wide)
                wide.weight = to_genes(wide.weight)
            else:
                wide = problem.fit(values, column.labels_of(fitted), choice.wide)
        readers.append((head, wide, choice.weights, choice.temperature))
        means = centroids(of_cells, column.labels_of(of_head)) if problem.kind == _OF_CLASSES else None
        means = None if means is None else means.astype(np.float32)
        starts[name] = ClassifierStart(
            choice, rows, column.labels_of(rows), None if known is None else known.rotated, means
        )
    heads, wides, weights, temperatures = zip(*readers, strict=True)
    _write(model, heads, wides)
    config.reader_weights = [float(weight) for pair in weights for weight in pair]
    config.temperature = [float(of) for of in temperatures] if config.label_columns else float(temperatures[0])
    return starts


def _choose_again(
    column: LabelledCells,
    rows: np.ndarray,
    features: FoldFeatures,
    values: sparse.csr_array,
    groups: np.ndarray | None,
    seed: int,
    needs_head: bool,
    earlier: ReaderChoice,
) -> tuple[np.ndarray, ReaderChoice]:
    """Choose the weights of the readers and the temperature for readers that are fitted to more cells.

    They are fitted to four fifths of the cells, and predict the others, of which 3,000 are enough; by groups, all five
    fifths are predicted. The earlier choice, from fewer cells, has a temperature that is too low. Return the rows that
    were predicted, and the choice.
    """
    labels = column.labels_of(rows)
    folds = inner_folds(column.problem, labels, None if groups is None else groups[rows], seed)
    if groups is None:
        folds = folds[: math.ceil(len(folds) * MOST_CELLS_TO_CHOOSE / len(rows))]
    choice = choose_readers(column.problem, labels, folds, features, values, needs_head=needs_head, earlier=earlier)
    return rows[np.unique(np.concatenate([held_out for _, held_out, _ in folds]))], choice


@dataclass
class _Part:
    """Cells to choose the readers of a column by: counts, log values, rotated genes, and features for the head."""

    counts: sparse.csr_array
    values: sparse.csr_array
    rotated: Rotated
    features: FoldFeatures | None = None


def _stack(blocks: Sequence[sparse.csr_array]) -> sparse.csr_array:
    return blocks[0] if len(blocks) == 1 else sparse.csr_array(sparse.vstack(blocks))


def _is_constant(column: LabelledCells) -> bool:
    """Return whether all cells of a column have the same class."""
    return column.problem.kind == _OF_CLASSES and len(np.unique(column.labels)) < 2


def _constant_readers(column: LabelledCells, model: GeneBertForClassification) -> tuple[Linear, Linear]:
    """Return the head and the wide head for a column of one class, or of none."""
    n_genes, width = cell_embedding_of(model).genes.weight.shape
    n_outputs = column.problem.n_outputs
    bias = column.problem.fit(np.zeros((len(column.labels), 1)), column.labels, 1.0).bias
    return Linear(np.zeros((width, n_outputs)), bias), Linear(np.zeros((n_genes, n_outputs)), np.zeros(n_outputs))


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
    """Choose a subset of cells, int64 array, ascending.

    It is stratified if each class has at least two cells, and there are as many cells inside and outside as classes.
    """
    if len(labels) <= most:
        return np.arange(len(labels))
    stratify = None
    if problem.kind == _OF_CLASSES:
        counts = np.unique(labels, return_counts=True)[1]
        if counts.min() > 1 and len(counts) <= min(most, len(labels) - most):
            stratify = labels
    return np.sort(train_test_split(np.arange(len(labels)), train_size=most, random_state=seed, stratify=stratify)[0])


def scaled(views: Sequence[np.ndarray], half: int) -> np.ndarray:
    """Scale each view of a cell as in `[CLS]`, and concatenate them: float64 array (n, 2 half)."""
    states = np.zeros((len(views[0]), 2 * half))
    for i, scores in enumerate(views):
        norms = np.maximum(np.linalg.norm(scores, axis=1, keepdims=True), 1e-12)
        states[:, i * half : i * half + scores.shape[1]] = scores / norms * np.sqrt(half)
    return states


def _features_of_views(
    counts: sparse.csr_array, values: sparse.csr_array, views: SpectralViews, half: int
) -> FoldFeatures:
    """Return the states of cells with axes fitted to training folds, computed from dot products of cells.

    Only the choice of genes of the views, and the shares of the genes, come from all cells given.
    """
    genes = [np.flatnonzero(loadings.any(axis=1)) for loadings in views.loadings]
    matrices = (
        values[:, genes[0]].toarray(),
        pearson_residuals(counts, views.shares, views.n_cells, genes[1]).astype(np.float64),
    )
    products, most = [matrix @ matrix.T for matrix in matrices], views.loadings[0].shape[1]

    def of_fold(train: np.ndarray, held_out: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        of_train, of_held_out = zip(*(_principal_scores(of, train, held_out, most) for of in products), strict=True)
        return scaled(of_train, half), scaled(of_held_out, half)

    return of_fold


def _principal_scores(
    products: np.ndarray, train: np.ndarray, held_out: np.ndarray, k: int
) -> tuple[np.ndarray, np.ndarray]:
    """Compute k principal component scores of training and other cells from their dot products (n, n), not centred.

    The mean and the axes are fitted to the training rows; there are at most as many components as these - 1. Return
    arrays (n_train, k) and (n_held_out, k).
    """
    inner = products[np.ix_(train, train)]
    means, mean = inner.mean(axis=0), inner.mean()
    inner = inner - means - means[:, None] + mean
    outer = products[np.ix_(held_out, train)]
    outer = outer - outer.mean(axis=1, keepdims=True) - means + mean
    k = min(k, len(train) - 1)
    if max(k, 1) > len(train) // 4:
        spread, vectors = np.linalg.eigh(inner)
    else:
        spread, vectors = eigsh(inner, k, v0=np.ones(len(train)) + np.arange(len(train)) / len(train))
    order = np.argsort(-spread)[:k]
    scale, vectors = np.sqrt(np.maximum(spread[order], 1e-9)), vectors[:, order]
    return vectors * scale, outer @ vectors / scale


def cell_states(model: nn.Module, tokenizer: GeneTokenizer, cells: CellStore) -> np.ndarray:
    """Compute the input of the head for each cell: float64 array (n, hidden), in the order of the cells."""

    def pooled(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        hidden = model.base_model(**batch).last_hidden_state
        return model.pool(hidden, batch["token_type_ids"], batch["attention_mask"])

    return run_cells(model, tokenizer, cells, pooled, 256)


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
def _write(model: GeneBertForClassification, heads: Sequence[Linear], wides: Sequence[Linear]) -> None:
    """Write linear readers, those of each label column beside those of the others, into the heads of a model."""
    (weight, bias), (wide, wide_bias) = (
        (np.concatenate([of.weight for of in readers], axis=1), np.concatenate([of.bias for of in readers]))
        for readers in (heads, wides)
    )
    means = cell_embedding_of(model).statistics.means[0].cpu().double().numpy()
    for parameter, values in (
        (model.classifier.weight, weight.T.copy()),
        (model.classifier.bias, bias),
        (model.wide_head.genes.weight, wide),
        (model.wide_head.bias, wide_bias + means @ wide),  # the wide head reads centred values
    ):
        parameter.copy_(torch.from_numpy(values))


__all__ = ["ClassifierStart", "cell_states", "run_cells", "scaled", "start_classifier"]
