"""Start a classifier at linear models (readers) of the whole cell and of all its genes."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy import sparse
from sklearn.model_selection import train_test_split

from ...evaluation.cell_baselines import most_cells_to_fit
from ...evaluation.readers import rotate_genes
from ...models.gene_bert.modeling_gene_bert import GeneBertForClassification
from ...models.gene_bert.tokenization_gene_bert import GeneTokenizer
from ...store.cell_store import CellStore
from ..calibration import OutOfFold
from .cell_features import CellFeatures, ViewFeatures, stack, unfitted
from .labelled_cells import LabelledCells, labelled_cells
from .linear_readers import FoldFeatures, Linear, ReaderChoice, centroids, choose_readers, inner_folds, quick_fits
from .spectral_start import cell_embedding_of

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
    out_of_fold : OutOfFold
        Predictions of the cells used for the choice.
    rotated : (features, callable), optional
        Output of `rotate_genes` for the cells that chose the regularisation; None for an earlier choice from some of
        the cells.
    """

    choice: ReaderChoice
    out_of_fold: OutOfFold
    rotated: Rotated | None = None


def start_classifier(
    model: GeneBertForClassification,
    tokenizer: GeneTokenizer,
    cells: CellStore,
    labels: np.ndarray,
    *,
    groups: np.ndarray | None = None,
    twins: np.ndarray | None = None,
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
    model, tokenizer : GeneBertForClassification, GeneTokenizer
        Model with `cell_embedding`, a linear head and `wide_head`, changed in place, and its tokenizer.
    cells : CellStore
        Training cells, all with counts.
    labels : array
        int64 (n,) classes, float (n, k) labels of 0 and 1, or float (n,) or (n, k) numbers, by `config.problem_type`;
        with `config.label_columns`, int64 (n, n_columns) classes, -100 where there is none.
    groups : array (n,), optional
        Cells of one group, such as a donor, are never in both training and validation.
    twins : int array (n,), optional
        Copies of a cell have equal numbers, see `CellStore.twins`; without groups, they are never in both either.
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
    columns = labelled_cells(model.config, labels, balanced)
    learnt = [
        _Column(of, cells, new_embedding, seed, twins)
        for of in columns
        if of.problem.kind != _OF_CLASSES or len(np.unique(of.labels)) > 1  # else all cells have the same class
    ]
    if new_embedding:
        features: CellFeatures = ViewFeatures(model, tokenizer, cells)
    else:
        head_rows = [rows for of in learnt for rows in (of.to_choose, of.head)]
        features = CellFeatures(model, tokenizer, cells, head_rows)
    for i, column in enumerate(learnt):
        if choices is None or column.chosen_by_all:
            alike = (of.known for of in learnt[:i] if of.known and np.array_equal(of.to_choose, column.to_choose))
            its_rotated = None if rotated is None else rotated[column.name]
            column.known = next(alike, None) or _Known(features, column.to_choose, its_rotated, choices is None)
    for column in learnt:
        column.choice = column.choose(groups, seed, to_train) if choices is None else choices[column.name]
    for column in learnt:
        if column.known is not None:
            column.known.states = None  # it holds matrices
    readers: dict[str | None, tuple[Linear, Linear]] = {}
    starts: dict[str | None, ClassifierStart] = {}
    for column in learnt:
        values, states = column.read(features)
        if choices is None and len(column.head) > len(column.to_choose):
            in_folds = unfitted(states) if groups is None else features.of_other_groups(column.head, states)
            column.choose_again(in_folds, values, groups, seed, to_train)
        readers[column.name] = column.fit(values, states)
        starts[column.name] = column.start(states)
    _write(model, columns, readers, starts)
    return starts


class _Column:
    """A label column, the rows that its readers are chosen by and fitted to, and the choice."""

    choice: ReaderChoice

    def __init__(
        self, labelled: LabelledCells, cells: CellStore, new_embedding: bool, seed: int, twins: np.ndarray | None
    ):
        self.twins = twins
        self.name, self.problem, self.labels_of = labelled.column, labelled.problem, labelled.labels_of
        self.n_cells = len(labelled.rows)
        most = most_cells_to_fit(cells.lengths[labelled.rows], self.problem.n_outputs)
        self.to_choose = self._subset(labelled.rows, MOST_CELLS_TO_CHOOSE, seed)
        self.tested = self.to_choose  # rows of the out-of-fold predictions
        self.genes = self._subset(labelled.rows, most, seed)
        self.head = self._subset(self.genes, most if new_embedding else min(most, MOST_CELLS_TO_RUN), seed)
        self.known: _Known | None = None  # what was read of the cells `to_choose`

    @property
    def chosen_by_all(self) -> bool:
        """Whether the cells that choose are all that the reader of genes is fitted to."""
        return len(self.genes) == len(self.to_choose)

    def _subset(self, rows: np.ndarray, most: int, seed: int) -> np.ndarray:
        """Choose a subset of cells, int64 array, ascending.

        It is stratified if each class has at least two cells, and there are as many cells inside and outside as
        classes.
        """
        if len(rows) <= most:
            return rows
        stratify = None
        if self.problem.kind == _OF_CLASSES:
            labels = self.labels_of(rows)
            counts = np.unique(labels, return_counts=True)[1]
            if counts.min() > 1 and len(counts) <= min(most, len(rows) - most):
                stratify = labels
        return np.sort(train_test_split(rows, train_size=most, random_state=seed, stratify=stratify)[0])

    def choose(self, groups: np.ndarray | None, seed: int, needs_head: bool) -> ReaderChoice:
        """Choose regularisation, weights and temperature by the cells `to_choose`."""
        assert self.known is not None and self.known.states is not None  # read before a choice
        folds = self._folds(self.to_choose, groups, seed)
        labels = self.labels_of(self.to_choose)
        choice = choose_readers(
            self.problem, labels, folds, self.known.states, self.known.rotated[0], needs_head=needs_head
        )
        self.tested = self.to_choose[choice.rows]
        return choice

    def choose_again(
        self,
        states: FoldFeatures,
        values: sparse.csr_array,
        groups: np.ndarray | None,
        seed: int,
        needs_head: bool,
    ) -> None:
        """Choose the weights of the readers and the temperature for readers that are fitted to more cells.

        They are fitted to four fifths of the cells of the head, and predict the others, of which 3,000 are enough; by
        groups, all five fifths are predicted. The earlier choice, from fewer cells, has a temperature that is too low.
        """
        if len(self.head) < len(self.genes):
            values = values[self.genes.searchsorted(self.head)]
        folds = self._folds(self.head, groups, seed)
        if groups is None:
            folds = folds[: math.ceil(len(folds) * MOST_CELLS_TO_CHOOSE / len(self.head))]
        self.choice = choose_readers(
            *(self.problem, self.labels_of(self.head), folds, states, values),
            needs_head=needs_head,
            earlier=self.choice,
        )
        self.tested = self.head[self.choice.rows]

    def _folds(self, rows: np.ndarray, groups: np.ndarray | None, seed: int) -> list:
        groups, twins = (None if of is None else of[rows] for of in (groups, self.twins))
        return inner_folds(self.problem, self.labels_of(rows), groups, seed, twins)

    def read(self, features: CellFeatures) -> tuple[sparse.csr_array, np.ndarray]:
        """Return the log values of the cells `genes`, and the states of the cells `head`."""
        for what, rows in (("genes", self.genes), ("[CLS]", self.head)):
            if len(rows) < self.n_cells:
                n_cells = f"{len(rows):,} of {self.n_cells:,} training cells"
                logger.warning(f"The linear model of {what} is fitted to {n_cells}.")
        if self.known is not None and self.chosen_by_all:
            return features.of_both([self.known.block], self.head)
        return features.of_both(features.read(self.genes), self.head)

    def fit(self, values: sparse.csr_array, states: np.ndarray) -> tuple[Linear, Linear]:
        """Fit the readers of `[CLS]` and of the genes."""
        problem, labels = self.problem, self.labels_of(self.genes)
        with quick_fits():
            head = problem.fit(states, self.labels_of(self.head), self.choice.head)
            if self.known is None or not self.chosen_by_all or len(self.genes) > _ROTATED:
                return head, problem.fit(values, labels, self.choice.wide)
            features, to_genes = self.known.rotated
            wide = problem.fit(features, labels, self.choice.wide)
            wide.weight = to_genes(wide.weight)
            return head, wide

    def start(self, states: np.ndarray) -> ClassifierStart:
        """Return the start, with the centroids of the states of the cells `head`."""
        means = None
        if self.problem.kind == _OF_CLASSES:
            means = centroids(states, self.labels_of(self.head)).astype(np.float32)
        choice, labels = self.choice, self.labels_of(self.tested)
        if self.problem.kind == "multi_label_classification":
            labels = np.where(np.isnan(choice.out_of_fold), np.float32(np.nan), labels)
        out_of_fold = OutOfFold(choice.out_of_fold, labels, self.tested, choice.distances, means)
        return ClassifierStart(choice, out_of_fold, None if self.known is None else self.known.rotated)


class _Known:
    """What was read of the cells that choose the readers of a column."""

    def __init__(self, features: CellFeatures, rows: np.ndarray, rotated: Rotated | None, choose: bool):
        counts, values = map(stack, zip(*features.read(rows), strict=True))
        self.block = counts, values
        self.rotated = rotate_genes(values) if rotated is None else rotated
        self.states: FoldFeatures | None = features.in_folds(rows, self.block) if choose else None


def _constant_readers(column: LabelledCells, model: GeneBertForClassification) -> tuple[Linear, Linear]:
    """Return the head and the wide head for a column of one class, or of none."""
    n_genes, width = cell_embedding_of(model).genes.weight.shape
    n_outputs = column.problem.n_outputs
    bias = column.problem.fit(np.zeros((len(column.labels), 1)), column.labels, 1.0).bias
    return Linear(np.zeros((width, n_outputs)), bias), Linear(np.zeros((n_genes, n_outputs)), np.zeros(n_outputs))


@torch.no_grad()
def _write(
    model: GeneBertForClassification,
    columns: Sequence[LabelledCells],
    readers: Mapping[str | None, tuple[Linear, Linear]],
    starts: Mapping[str | None, ClassifierStart],
) -> None:
    """Write the readers of each label column beside those of the others, their weights and temperatures."""
    pairs = [readers[of.column] if of.column in readers else _constant_readers(of, model) for of in columns]
    (weight, bias), (wide, wide_bias) = (
        (np.concatenate([of.weight for of in part], axis=1), np.concatenate([of.bias for of in part]))
        for part in zip(*pairs, strict=True)
    )
    means = cell_embedding_of(model).statistics.means[0].cpu().double().numpy()
    for parameter, values in (
        (model.classifier.weight, weight.T.copy()),
        (model.classifier.bias, bias),
        (model.wide_head.genes.weight, wide),
        (model.wide_head.bias, wide_bias + means @ wide),  # the wide head reads centred values
    ):
        parameter.copy_(torch.from_numpy(values))
    found, config = [starts.get(of.column) for of in columns], model.config
    weights = [(1.0, 0.0) if start is None else start.choice.weights for start in found]
    temperatures = [1.0 if start is None else float(start.choice.temperature) for start in found]
    config.reader_weights = [float(weight) for pair in weights for weight in pair]
    config.temperature = temperatures if config.label_columns else temperatures[0]
