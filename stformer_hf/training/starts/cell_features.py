"""What the linear readers of a classifier read of cells: the log values of their genes, and their states (`[CLS]`)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property

import numpy as np
import torch
from scipy import sparse
from scipy.sparse.linalg import eigsh
from torch import nn

from ...batches.collate import pad
from ...batches.evaluating import evaluating, length_to_read
from ...evaluation.cell_baselines import log_normalise
from ...models.gene_bert.modeling_gene_bert import GeneBertForClassification
from ...models.gene_bert.tokenization_gene_bert import GeneTokenizer
from ...store.cell_store import CellStore
from .linear_readers import FoldFeatures
from .spectral_start import N_COMPONENTS, cell_embedding_of, count_blocks, set_views
from .spectral_views import SpectralViews, fit_spectral_views, pearson_residuals

Block = tuple[sparse.csr_array, sparse.csr_array]  # counts and log values of cells: (n, n_genes) each


class CellFeatures:
    """Features of the cells of a store, given by their rows: the log values and the states that a trained model reads.

    The encoder runs once on the cells that need states, `head_rows`.
    """

    def __init__(
        self,
        model: GeneBertForClassification,
        tokenizer: GeneTokenizer,
        cells: CellStore,
        head_rows: Sequence[np.ndarray],
    ):
        self.model, self.tokenizer, self.cells = model, tokenizer, cells
        self.all_blocks = count_blocks(cells, tokenizer)  # a ValueError if the tokenizer knows none of the genes
        self._head_rows = np.unique(np.concatenate([np.empty(0, np.int64), *head_rows]))

    @cached_property
    def _states(self) -> np.ndarray:
        return cell_states(self.model, self.tokenizer, self.cells.select(self._head_rows))

    def counts_of(self, rows: np.ndarray) -> Callable[[], Iterator[sparse.csr_array]]:
        """Return a function that reads the counts of cells in blocks."""
        return count_blocks(self.cells.select(rows), self.tokenizer, progress=False)

    def read(self, rows: np.ndarray) -> Iterator[Block]:
        """Read the counts and the log values of cells in blocks."""
        for counts in self.counts_of(rows)():
            yield counts, self.log_values(counts)

    def log_values(self, counts: sparse.csr_array) -> sparse.csr_array:
        """Compute ln(1 + 10,000 x / depth) as the model does: csr_array (n, n_genes).

        The depth is the total over the genes that the model has seen and the store measures, divided by their share of
        all counts: see `CellValues`.
        """
        shares = cell_embedding_of(self.model).statistics.shares.cpu().double().numpy()
        measured = np.zeros(len(shares), bool)
        found = self.tokenizer.find_genes(self.cells.gene_ids, self.cells.genes.symbols)
        measured[found[found >= 0]] = True
        known = measured & (shares > 0)
        seen = sparse.csr_array(counts @ sparse.diags_array(known.astype(np.float64)))
        seen.eliminate_zeros()
        depths = np.maximum(seen.sum(axis=1), 1e-12) / max(shares[known].sum(), 1e-6)
        return log_normalise(seen, depths)

    def of_both(self, blocks: Iterable[Block], head_rows: np.ndarray) -> tuple[sparse.csr_array, np.ndarray]:
        """Return the log values of blocks, and the states of `head_rows` among their cells, float64 (n, hidden)."""
        return stack([values for _, values in blocks]), self._states[self._head_rows.searchsorted(head_rows)]

    def in_folds(self, rows: np.ndarray, block: Block) -> FoldFeatures:
        """Return the states of cells that choose the readers, for the folds of cross-validation."""
        return unfitted(self._states[self._head_rows.searchsorted(rows)])

    def of_other_groups(self, rows: np.ndarray, states: np.ndarray) -> FoldFeatures:
        """Return the states of more cells, for folds of whole groups."""
        return unfitted(states)


class ViewFeatures(CellFeatures):
    """Features for a model whose embedding is set here, to spectral views of all cells."""

    def __init__(self, model: GeneBertForClassification, tokenizer: GeneTokenizer, cells: CellStore):
        super().__init__(model, tokenizer, cells, [])
        embedding = cell_embedding_of(model)
        self._half = embedding.genes.weight.shape[1] // 2
        self._views = self._fit(self.all_blocks)
        set_views(embedding, self._views, model.config.initializer_range)

    def _fit(self, blocks: Callable[[], Iterable[sparse.csr_array]]) -> SpectralViews:
        return fit_spectral_views(blocks, min(N_COMPONENTS, self._half))

    def _states_by(self, views: SpectralViews, blocks: Iterable[sparse.csr_array]) -> np.ndarray:
        states = [scaled(views.transform(counts), self._half) for counts in blocks]
        return np.concatenate([np.zeros((0, 2 * self._half)), *states])

    def log_values(self, counts: sparse.csr_array) -> sparse.csr_array:
        """Compute ln(1 + 10,000 x / total) over all genes."""
        return log_normalise(counts)

    def of_both(self, blocks: Iterable[Block], head_rows: np.ndarray) -> tuple[sparse.csr_array, np.ndarray]:
        """Return the features of blocks, whose cells are `head_rows`."""
        parts = [(values, self._states_by(self._views, [counts])) for counts, values in blocks]
        values, states = zip(*parts, strict=True)
        return stack(values), np.concatenate(states)

    def in_folds(self, rows: np.ndarray, block: Block) -> FoldFeatures:
        """Return states with axes fitted to training folds, computed from dot products of cells.

        Only the choice of genes of the views, and the shares of the genes, come from all cells.
        """
        views, (counts, values) = self._views, block
        genes = [np.flatnonzero(loadings.any(axis=1)) for loadings in views.loadings]
        residuals = pearson_residuals(counts, views.shares, views.n_cells, genes[1]).astype(np.float64)
        products = [matrix @ matrix.T for matrix in (values[:, genes[0]].toarray(), residuals)]

        def of_fold(train: np.ndarray, held_out: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            most = views.loadings[0].shape[1]
            of_train, of_held_out = zip(
                *(_principal_scores(of, train, held_out, most) for of in products), strict=True
            )
            return scaled(of_train, self._half), scaled(of_held_out, self._half)

        return of_fold

    def of_other_groups(self, rows: np.ndarray, states: np.ndarray) -> FoldFeatures:
        """Return states with axes that are fitted to the other groups, as those of a new group are."""

        def of_fold(train: np.ndarray, held_out: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            of_train, of_held_out = self.counts_of(rows[train]), self.counts_of(rows[held_out])
            axes = self._fit(of_train)
            return self._states_by(axes, of_train()), self._states_by(axes, of_held_out())

        return of_fold


def unfitted(states: np.ndarray) -> FoldFeatures:
    """Return states (n, hidden) that are not fitted to training folds."""
    return lambda train, held_out: (states[train], states[held_out])


def stack(blocks: Sequence[sparse.csr_array]) -> sparse.csr_array:
    """Stack blocks of cells."""
    return blocks[0] if len(blocks) == 1 else sparse.csr_array(sparse.vstack(blocks))


def scaled(views: Sequence[np.ndarray], half: int) -> np.ndarray:
    """Scale each view of a cell as in `[CLS]`, and concatenate them: float64 array (n, 2 half)."""
    states = np.zeros((len(views[0]), 2 * half))
    for i, scores in enumerate(views):
        norms = np.maximum(np.linalg.norm(scores, axis=1, keepdims=True), 1e-12)
        states[:, i * half : i * half + scores.shape[1]] = scores / norms * np.sqrt(half)
    return states


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
    if max(k, 1) > len(train) // 4 or not inner.any():  # ARPACK fails if nothing varies
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
    """Apply a function of a batch to cells, in batches: float64 array (n, d), in the order of the cells.

    `model` is a classifier, of which as few tokens are read as its pooled state needs.
    """
    device, found = next(model.parameters()).device, []
    max_length = length_to_read(model.base_model, tokenizer, model.config.classifier_pooling)
    with evaluating(model):
        for start in range(0, len(cells), batch_size):
            examples = cells.__getitems__(range(start, min(start + batch_size, len(cells))))
            batch = pad(tokenizer.encode_cells(examples, max_length=max_length), tokenizer)
            states = forward({name: value.to(device) for name, value in batch.items()})
            found.append(states.cpu().double().numpy())
    return np.concatenate(found)
