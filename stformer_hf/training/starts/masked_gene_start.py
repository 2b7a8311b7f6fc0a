"""Start a model of masked genes at the frequencies of tokens, and a model of ranks also at the order of genes."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from scipy import sparse
from sklearn.utils.extmath import randomized_svd
from transformers import PreTrainedModel

from ...batches.collate import read_tokens
from ...evaluation.gene_baselines import open_rows, read_rows, spread_rows
from ...models.gene_bert.cell_counts import CountRows, is_cell_batch, map_genes
from ...models.gene_bert.rank_prior import LEVEL_UNIT, N_BINS, RankPrior
from ...models.gene_bert.tokenization_gene_bert import GeneTokenizer

_MOST_CELLS = 20_000
_CELLS_AT_A_TIME = 512
_MOST_COUNT = 1000  # higher counts have no level
_LEAST_SHARE = 0.01  # of a count among all counts of its gene
_MOST_COUNTS = 64  # per gene
_PRIOR = 2.0  # pseudo-cells that shrink a gene's shares of the counts 1 to 8 to those of all genes
_MOST_AXES = 64
_SHRINKAGE = 20.0  # cells
_PRIOR_COUNTS = np.arange(1, 9)


@torch.no_grad()
def start_mlm_bias(model: PreTrainedModel, tokenizer: GeneTokenizer, train_cells: Any) -> None:
    """Start an MLM head at the log frequencies of the tokens, its predictions before training.

    The bias of the last layer is set to the log frequencies, and the gain and bias of the norm before it to 0, so that
    the encoder adds nothing to the logits at first; it has a gradient from the second step on.

    Parameters
    ----------
    model : GeneBertForPhenotypicMLM
        Changed in place.
    tokenizer : GeneTokenizer
    train_cells : CellStore, datasets.Dataset with `input_ids`, or Subset of one
        At most 20,000, evenly spaced, are read.

    Notes
    -----
    For ranks, the frequency of a token that occurs n times among N tokens is (n + 1) / (N + V), with V tokens in the
    vocabulary: B1 of `masked_gene_baselines`. For bins, it is the same, times 1 - 1 / n_bins, and 1 / n_bins for
    `bin_0`, the share that `DataCollatorForPhenotypicMLM` has of it among the labels.
    """
    _set_bias(model, tokenizer, _Statistics(tokenizer, train_cells).tokens)


@torch.no_grad()
def start_rank_model(model: PreTrainedModel, tokenizer: GeneTokenizer, train_cells: Any, seed: int = 0) -> None:
    """Start a model of ranked genes at the frequencies of the genes and their order in a cell.

    Its first predictions add the log frequencies (`start_mlm_bias`) and the log odds of `RankPrior`, which also knows
    which genes occur together. They are better than B3 of `masked_gene_baselines`, and training starts from there.

    Parameters
    ----------
    model : GeneBertForPhenotypicMLM
        Changed in place: `config.rank_prior_sizes` and `mlm_head.rank_prior` are set.
    tokenizer : GeneTokenizer
        Tokenizer of the rank scheme, without neighbourhoods.
    train_cells : CellStore
        At most 20,000, evenly spaced, are read.
    seed : int, default: 0
        Seed of the random projections.

    Raises
    ------
    ValueError
        The tokenizer has bins or neighbourhoods; the cells have no integer counts, such as tokenized cells.
    """
    if tokenizer.scheme != "rank" or tokenizer.neighborhood:
        found = "neighbourhoods" if tokenizer.scheme == "rank" else "bins"
        raise ValueError(f"start_rank_model needs a tokenizer of a cell's own ranked genes; this one has {found}.")
    statistics = _Statistics(tokenizer, train_cells, with_counts=True)
    _set_bias(model, tokenizer, statistics.tokens)
    _set_rank_prior(model, tokenizer, statistics, seed)


class _Statistics:
    """Frequencies of tokens in training cells, and of the counts of their genes.

    Attributes
    ----------
    tokens : int64 array (V,)
        Number of occurrences of each token; 0 for special tokens.
    pairs, n_pairs : int64 arrays (k,)
        token x 1,001 + count (1,000 for higher ones), ascending; and their numbers of occurrences.
    cells : sparse float32 matrix (n_cells, V)
        1 if the cell has the gene.
    """

    def __init__(self, tokenizer: GeneTokenizer, train_cells: Any, with_counts: bool = False):
        cells = open_rows(train_cells)
        rows = spread_rows(len(cells), _MOST_CELLS)
        self.tokens = np.zeros(len(tokenizer), np.int64)
        self.pairs = self.n_pairs = np.empty(0, np.int64)
        found, lengths = [], []
        for examples in read_rows(cells, rows, _CELLS_AT_A_TIME, "start"):
            tokens = read_tokens(examples, tokenizer)
            special = tokens.token_type_ids == 0
            self.tokens += np.bincount(tokens.input_ids[~special], minlength=len(self.tokens))
            if with_counts:
                gene = tokenizer.get_gene_tokens_mask(tokens.input_ids)
                found.append(tokens.input_ids[gene].astype(np.int32))
                lengths.append(np.diff(np.concatenate([[0], np.cumsum(gene)])[tokens.indptr]))
                pairs = np.concatenate([self.pairs, _token_counts(examples, tokens, tokenizer)])
                n_pairs = np.concatenate([self.n_pairs, np.ones(len(pairs) - len(self.pairs), np.int64)])
                self.pairs, inverse = np.unique(pairs, return_inverse=True)
                self.n_pairs = np.bincount(inverse, n_pairs).astype(np.int64)
        if with_counts:
            indptr = np.concatenate([[0], np.cumsum(np.concatenate(lengths))])
            columns = np.concatenate(found)
            has_gene = np.ones(len(columns), np.float32)
            self.cells = sparse.csr_matrix((has_gene, columns, indptr), (len(rows), len(self.tokens)))


def _token_counts(examples: Any, tokens: Any, tokenizer: GeneTokenizer) -> np.ndarray:
    """Find the counts of the gene tokens of cells: int64 array (n,) of token x 1,001 + count."""
    if not is_cell_batch(examples):
        raise ValueError("The order of genes is estimated from counts, which tokens do not have: pass a CellStore.")
    column_genes = tokenizer.find_genes(examples.gene_ids, examples.symbols)
    rows = map_genes(CountRows(examples.indptr, examples.genes, examples.counts), column_genes)
    if rows.counts.dtype.kind == "f" and (rows.counts != np.rint(rows.counts)).any():
        raise ValueError("The order of genes is estimated from integer counts, but these have fractions.")
    n_tokens = len(tokenizer)

    def keys(indptr: np.ndarray, ids: np.ndarray) -> np.ndarray:
        return np.repeat(np.arange(len(indptr) - 1), np.diff(indptr)) * n_tokens + ids

    known = keys(rows.indptr, tokenizer.gene_token_ids[rows.columns])
    order = np.argsort(known, kind="stable")
    wanted = keys(tokens.indptr, tokens.input_ids)[tokenizer.get_gene_tokens_mask(tokens.input_ids)]
    counts = rows.counts[order[np.searchsorted(known[order], wanted)]]
    return wanted % n_tokens * (_MOST_COUNT + 1) + np.minimum(counts.astype(np.int64), _MOST_COUNT)


def _set_bias(model: PreTrainedModel, tokenizer: GeneTokenizer, n: np.ndarray) -> None:
    frequency = (n + 1) / (n.sum() + len(n))
    if tokenizer.scheme == "binned":
        bins = tokenizer.first_bin_id + np.arange(tokenizer.n_bins)
        of_genes = frequency[bins].sum()
        frequency[bins[1:]] *= of_genes / frequency[bins[1:]].sum() * (1 - 1 / tokenizer.n_bins)
        frequency[bins[0]] = of_genes / tokenizer.n_bins
    head = model.mlm_head
    head.decoder.bias.copy_(torch.from_numpy(np.log(frequency)))
    head.layer_norm.weight.zero_()
    if getattr(head.layer_norm, "bias", None) is not None:
        head.layer_norm.bias.zero_()


def _set_rank_prior(model: PreTrainedModel, tokenizer: GeneTokenizer, statistics: _Statistics, seed: int) -> None:
    """Estimate the shares of each gene's counts, and the axes, and set them in the head."""
    n_of_count = np.bincount(statistics.pairs % (_MOST_COUNT + 1), statistics.n_pairs, _MOST_COUNT + 1)
    usual = _PRIOR * n_of_count[_PRIOR_COUNTS] / max(n_of_count.sum(), 1)
    known = tokenizer.gene_token_ids[~np.isnan(tokenizer.medians)]
    pairs = (known[:, None] * (_MOST_COUNT + 1) + _PRIOR_COUNTS).ravel()
    pairs, inverse = np.unique(np.concatenate([statistics.pairs, pairs]), return_inverse=True)
    n = np.bincount(inverse, np.concatenate([statistics.n_pairs, np.tile(usual, len(known))]))
    tokens, counts = pairs // (_MOST_COUNT + 1), pairs % (_MOST_COUNT + 1)
    share = n / (statistics.tokens[tokens] + _PRIOR)

    order = np.lexsort((-share, tokens))
    order = order[((share >= _LEAST_SHARE) & (counts < _MOST_COUNT))[order]]
    order = order[np.arange(len(order)) - np.searchsorted(tokens[order], tokens[order]) < _MOST_COUNTS]
    tokens, counts, share = tokens[order], counts[order], share[order]

    medians = np.full(len(tokenizer), np.nan)
    medians[tokenizer.gene_token_ids] = tokenizer.medians
    level = np.rint((np.log(counts) - np.log(medians[tokens])) / LEVEL_UNIT).astype(np.int32)
    mass = (statistics.tokens[tokens] + 1) * share
    order = np.argsort(-level, kind="stable")
    bins = np.empty(len(level), np.int32)
    bins[order] = np.minimum(np.cumsum(mass[order]) / mass.sum() * N_BINS, N_BINS - 1)

    axes = _gene_axes(statistics.cells, seed)
    model.config.rank_prior_sizes = [len(tokens), *axes.shape]
    prior = RankPrior(model.config)
    for name, values in {"token": tokens, "level": level, "bin": bins, "share": share, "axes": axes}.items():
        getattr(prior, name).copy_(torch.from_numpy(values))
    model.mlm_head.rank_prior = prior.to(model.mlm_head.decoder.weight.device)


def _gene_axes(cells: sparse.csr_matrix, seed: int) -> np.ndarray:
    """Compute standard coordinates of the genes by correspondence analysis: float32 array (V, n_axes).

    With P the shares of genes in cells and f the frequencies of genes, the axes are V / sqrt(f), from the singular
    value decomposition U D V' of D_r^-1/2 P D_f^-1/2 without its first, constant, axis (Greenacre 1984). A gene in n
    cells counts as if it were in n + 20, which shrinks the axes of rare genes. An axis is scaled by the square root of
    the share of its variance that exceeds the sampling noise, 1 / (genes of a cell), and left out if none does.
    """
    n_genes = cells.sum(axis=1).A1
    cells, n_genes = cells[n_genes > 0], n_genes[n_genes > 0]
    n_axes = min(_MOST_AXES + 1, min(cells.shape) - 1)
    if n_axes < 2:
        return np.zeros((cells.shape[1], 1), np.float32)
    frequency = (cells.sum(axis=0).A1 + _SHRINKAGE) / n_genes.sum()
    scaled = sparse.diags(n_genes**-0.5) @ cells @ sparse.diags((frequency * n_genes.sum()) ** -0.5)
    _, values, vectors = randomized_svd(scaled.astype(np.float32), n_axes, n_iter=4, random_state=seed)
    values, vectors = values[1:] ** 2, vectors[1:]
    signal = np.maximum(1 - (1 / n_genes).mean() / values.clip(1e-12), 0)
    axes = (vectors * np.sqrt(signal)[:, None] / np.sqrt(frequency)).T[:, signal > 0]
    return (axes if axes.shape[1] else np.zeros((cells.shape[1], 1))).astype(np.float32)
