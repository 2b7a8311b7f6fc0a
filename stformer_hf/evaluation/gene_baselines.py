"""Baselines for masked genes: the losses of simple predictors, to compare the loss of a model with."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from scipy.ndimage import convolve1d
from tqdm.auto import tqdm

from ..batches.collate import CellCollator, read_tokens
from ..batches.empty_cells import without_empty_cells
from ..batches.parts import as_token_rows
from ..models.gene_bert.cell_counts import is_cell_batch, pad_ragged
from ..models.gene_bert.configuration_gene_bert import IGNORE
from ..store.cell_batch import as_cell_batch

logger = logging.getLogger(__name__)

WIDTHS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2)  # of the kernel of B3, in units of ln median
_STEPS = 10  # ln medians are rounded to the width / 10
_RADIUS = 5  # widths beyond which the kernel is 0
_N_NEAREST = 8
_FLOOR = 0.1  # share of B2 in B3, so that a gene far from its neighbours has a finite loss
_CELLS_FOR_WIDTH = 256
_MASKED_CELLS = 20_000  # with fewer training cells, masks are redrawn up to _MOST_MASKS times
_MOST_MASKS = 8


class MaskedGenes(NamedTuple):
    """Tokens of a padded batch that are scored, and those that are visible: bool arrays (n, length)."""

    # Gene labels whose token is `[MASK]`. Chosen ranked genes that were kept, or replaced by another gene, are not
    # scored, since a predictor cannot see that they should be predicted.
    scored: np.ndarray
    # Genes of the cell, without random genes that replace others.
    visible: np.ndarray


def masked_gene_baselines(
    train: Any,
    held_out: Any,
    collator: CellCollator,
    *,
    batch_size: int = 64,
    max_train_cells: int | None = None,
    whole_cells: bool = False,
) -> dict[str, float]:
    """Compute the mean negative log likelihood, in nats, of masked genes of held-out cells under simple baselines.

    The positions are those that `collator.for_evaluation()` replaces by `[MASK]`, the same at every evaluation of a
    trainer with this collator; see `MaskedGenes`. Nothing is made dense, and memory is that of a batch.

    Parameters
    ----------
    train, held_out : CellStore, datasets.Dataset with `input_ids`, or Subset of one
        Cells; those without counts are left out.
    collator : DataCollatorForGeneRankMLM or DataCollatorForPhenotypicMLM
        Tokenizes and masks.
    batch_size : int, default: 64
        Cells to read at a time. It does not change the results.
    max_train_cells : int, optional
        Estimate from this many evenly spaced training cells if there are more.
    whole_cells : bool, default: False
        Whether genes cut off by `max_length` are visible too, as they are to a model that reads whole cells: B2 and B3
        exclude them, B3 places them at the ranks after the last token, and the cell's marginal counts their bins.
        Tokenized cells have lost them, for the model as well as for the baselines.

    Returns
    -------
    dict of str to float
        For ranks, `b0_nll`: all genes equally likely, ln V. `b1_nll`: frequency of the gene in the training cells,
        (n + 1) / (N + V). `b2_nll`: the same without the visible genes of the cell, renormalised. `b3_nll`: B2
        weighted by how close a gene's median is to those at the 8 nearest visible ranks, if the tokenizer has medians;
        `b3_width` is the chosen width.

        For bins, `uniform_nll`: all bins equally likely. `gene_marginal_nll`: share of the bin among the gene's
        labels. `cell_marginal_nll`: share of the bin among the visible bins of the cell.

    Raises
    ------
    ValueError
        A cell has a gene twice; no gene is masked; there are no cells; the cells are a stream.

    Notes
    -----
    B3 is 0.9 q + 0.1 B2, with q(g) proportional to B2(g) * sum over j of exp(-(ln m_g - ln m_j)^2 / (2 width^2)),
    where j are the 8 visible genes at the nearest ranks (at equal distance, the stronger first). ln m is rounded to a
    tenth of the width, and the kernel is 0 beyond 5 widths. The width is the best of `WIDTHS` for masked genes of at
    most 256 training cells. Rank tokens leak: where counts are equal, genes are ordered by their medians, which B3
    exploits without any biology. B3 does not exploit all of it: the order of `RankPrior`, which sums over the counts,
    is 2.2 nats below it on cells of pbmc_ifnb and geact_fetal (5.45 where B3 is 7.69). A model below B3 has therefore
    not necessarily learnt what genes do; compare it with its own start (`start_rank_model`).

    The marginal of a gene's bins is (n_gb + p_b) / (n_g + 1), from labels that the collator makes for the training
    cells, including genes swapped in as `bin_0`; p_b is the share of the bin among all labels, (n_b + 1) /
    (N + n_bins). The marginal of a cell is p_0 for `bin_0`, which is never visible, and (1 - p_0) (n_cb + p_b /
    (1 - p_0)) / (n_c + 1) for other bins.

    With neighbourhoods, the genes of the cell and those of its neighbours are treated separately.
    """
    collator = collator.for_evaluation()
    train, held_out = open_rows(train), open_rows(held_out)
    rows = spread_rows(len(train), max_train_cells)
    if len(rows) < len(train):
        logger.warning(f"Baselines are estimated from {len(rows):,} of {len(train):,} training cells.")
    kind = _RankBaselines if collator.tokenizer.scheme == "rank" else _BinBaselines
    baselines = kind(collator, train, rows, batch_size, whole_cells)
    totals: dict[str, float] = {}
    n_scored = 0
    for examples in read_rows(held_out, np.arange(len(held_out)), batch_size, "baselines"):
        batch = _masked(examples, collator, whole_cells)
        found = masked_genes(batch, collator.tokenizer)
        n_scored += int(np.count_nonzero(found.scored))
        for name, losses in baselines(batch, found).items():
            totals[name] = totals.get(name, 0.0) + losses.sum()
    if not n_scored:
        raise ValueError(f"None of the genes of {len(held_out)} held-out cells is masked: there is nothing to score.")
    return {**{name: float(total / n_scored) for name, total in totals.items()}, **baselines.settings}


# ---------------------------------------------------------------------- reading


def open_rows(dataset: Any) -> Any:
    """Return a dataset whose batches the collators can read, without the cells that have no counts."""
    dataset = as_token_rows(without_empty_cells(dataset))
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        raise ValueError(
            f"Baselines need cells that can be read by number, which a {type(dataset).__name__} does not support: "
            "pass a CellStore or a tokenized datasets.Dataset."
        )
    if not len(dataset):
        raise ValueError("There are no cells to estimate baselines from, or to score.")
    return dataset


def read_rows(dataset: Any, rows: np.ndarray, batch_size: int, desc: str | None = None) -> Iterator[Any]:
    """Read batches of rows of an `open_rows` dataset, with a progress bar if `desc` is given."""
    silent = True if desc is None else None
    for start in tqdm(range(0, len(rows), batch_size), desc=desc, unit="batch", disable=silent):
        some = rows[start : start + batch_size].tolist()
        read = dataset.__getitems__(some) if hasattr(dataset, "__getitems__") else [dataset[row] for row in some]
        yield as_cell_batch(read)


def masked_genes(batch: dict[str, np.ndarray], tokenizer: Any) -> MaskedGenes:
    """Find the scored and the visible genes in a padded batch with `labels`."""
    ids, labels = batch["input_ids"], batch["labels"]
    chosen = labels != IGNORE
    chosen[chosen] = tokenizer.get_gene_tokens_mask(labels[chosen])
    visible = tokenizer.get_gene_tokens_mask(ids) & (~chosen | (ids == labels))
    return MaskedGenes(chosen & (ids == tokenizer.mask_token_id), visible)


def _masked(examples: Any, collator: CellCollator, whole_cells: bool) -> dict[str, np.ndarray]:
    """Mask cells in a padded batch; for whole cells, append the genes that were cut off, as visible ones."""
    batch = {name: tensor.numpy() for name, tensor in collator(examples).items()}
    if not whole_cells or not is_cell_batch(examples):
        return batch
    tokenizer = collator.tokenizer
    kept, whole = tokenizer.encode_cells(examples), tokenizer.encode_cells(examples, max_length=np.iinfo(np.int32).max)

    def keys(tokens: Any) -> np.ndarray:
        cells = np.repeat(np.arange(len(tokens.indptr) - 1), np.diff(tokens.indptr))
        return (cells * tokenizer.type_vocab_size + tokens.token_type_ids) * tokenizer.vocab_size + tokens.input_ids

    cut = ~np.isin(keys(whole), keys(kept)) & tokenizer.get_gene_tokens_mask(whole.input_ids)
    indptr = np.concatenate([[0], np.cumsum(cut)])[whole.indptr]
    length = int(np.diff(indptr).max(initial=0))
    more = {
        "input_ids": pad_ragged(whole.input_ids[cut], indptr, length, tokenizer.pad_token_id, "right"),
        "token_type_ids": pad_ragged(whole.token_type_ids[cut], indptr, length, 0, "right"),
        "labels": np.full((len(indptr) - 1, length), IGNORE),
    }
    return {name: np.concatenate([batch[name], array], axis=1) for name, array in more.items() if name in batch}


def spread_rows(n: int, most: int | None = None) -> np.ndarray:
    """Choose at most `most` of n rows, evenly spaced: int64 array, ascending."""
    return np.unique(np.linspace(0, max(n - 1, 0), n if most is None else min(n, most)).astype(np.int64))


# ---------------------------------------------------------------------- ranks


class _RankBaselines:
    """B0 to B3 for masked ranked genes. A segment is the cell's genes, or its neighbourhood's; there are V genes."""

    def __init__(self, collator: CellCollator, train: Any, rows: np.ndarray, batch_size: int, whole_cells: bool):
        self.tokenizer = collator.tokenizer
        tokens = self.tokenizer.gene_token_ids
        self.gene_of_token = np.full(self.tokenizer.vocab_size, -1)
        self.gene_of_token[tokens] = np.arange(len(tokens))
        self.offset = getattr(self.tokenizer, "gene_token_type_offset", 0)
        self.n_segments = 1 + bool(getattr(self.tokenizer, "neighborhood", False))
        self.frequency = self._frequencies(train, rows, batch_size)
        self.medians, self.settings = getattr(self.tokenizer, "medians", None), {}
        if self.medians is None:
            return
        some = rows[spread_rows(len(rows), _CELLS_FOR_WIDTH)]
        kernels = [_Kernel(self.medians, self.frequency, width) for width in WIDTHS]
        totals = np.zeros(len(WIDTHS))
        for examples in read_rows(train, some, batch_size):
            batch = _masked(examples, collator, whole_cells)
            places = self._places(batch, masked_genes(batch, self.tokenizer))
            totals += [-np.log(self._near(places, kernel)).sum() for kernel in kernels]
        self.kernel = kernels[int(totals.argmin())]
        self.settings = {"b3_width": self.kernel.width}

    def _frequencies(self, train: Any, rows: np.ndarray, batch_size: int) -> np.ndarray:
        """Estimate the frequency of each gene in each segment: float64 array (n_segments, V)."""
        n_genes = len(self.tokenizer.gene_token_ids)
        counts = np.zeros(self.n_segments * n_genes)
        for examples in read_rows(train, rows, batch_size, "frequencies of genes"):
            tokens = read_tokens(examples, self.tokenizer)
            gene = self.tokenizer.get_gene_tokens_mask(tokens.input_ids)
            segments, genes = self._segments(tokens.token_type_ids[gene]), self.gene_of_token[tokens.input_ids[gene]]
            counts += np.bincount(segments * n_genes + genes, minlength=len(counts))
        of_segment = counts.reshape(self.n_segments, n_genes) + 1
        return of_segment / of_segment.sum(axis=1, keepdims=True)

    def _segments(self, types: np.ndarray) -> np.ndarray:
        return types - self.offset if self.n_segments > 1 else np.zeros(len(types), np.int64)

    def __call__(self, batch: dict[str, np.ndarray], found: MaskedGenes) -> dict[str, np.ndarray]:
        """Return the losses of the scored positions, one float64 array (k,) per baseline."""
        places = self._places(batch, found)
        losses = {
            "b0_nll": np.full(len(places.genes), np.log(self.frequency.shape[1])),
            "b1_nll": -np.log(places.frequency),
            "b2_nll": -np.log(places.unseen),
        }
        if self.medians is not None:
            losses["b3_nll"] = -np.log(self._near(places, self.kernel))
        return losses

    def _places(self, batch: dict[str, np.ndarray], found: MaskedGenes) -> _Places:
        n_genes = self.frequency.shape[1]
        length = found.scored.shape[1]
        types = batch.get("token_type_ids", np.zeros_like(batch["input_ids"]))

        def look(mask: np.ndarray, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
            at = np.flatnonzero(mask)
            groups = at // max(length, 1) * self.n_segments + self._segments(types.reshape(-1)[at])
            return at, groups, self.gene_of_token[ids.reshape(-1)[at]]

        seen_at, seen_groups, seen = look(found.visible, batch["input_ids"])
        at, groups, genes = look(found.scored, batch["labels"])
        keys = np.unique(seen_groups * n_genes + seen)
        if len(keys) < len(seen) or np.isin(groups * n_genes + genes, keys).any():
            raise ValueError(
                "A cell has a gene twice, so excluding its visible genes would exclude the masked one. Baselines need "
                "each gene at most once in a cell and once in its neighbourhood (GeneTokenizer(neighborhood=True) "
                "separates these)."
            )
        n_groups = len(found.scored) * self.n_segments
        seen_frequency = self.frequency[seen_groups % self.n_segments, seen]
        frequency = self.frequency[groups % self.n_segments, genes]
        shown = np.bincount(seen_groups, seen_frequency, minlength=n_groups)
        unseen, nearest = frequency / (1 - shown)[groups], _nearest(at, groups, seen_at, seen_groups)
        return _Places(genes, groups, frequency, unseen, seen, seen_groups, seen_frequency, nearest)

    def _near(self, places: _Places, kernel: _Kernel) -> np.ndarray:
        """Return the probabilities of the scored genes under B3: float64 array (k,)."""
        n_bins = kernel.unseen.shape[1]
        n_groups = int(max(places.groups.max(initial=-1), places.seen_groups.max(initial=-1))) + 1
        # Frequency of the genes not visible in a cell, by their medians; then the mass near each median.
        seen_bins = kernel.bins[places.seen]
        known = seen_bins >= 0
        shown = places.seen_groups[known] * n_bins + seen_bins[known]
        shown = np.bincount(shown, places.seen_frequency[known], n_groups * n_bins).reshape(n_groups, n_bins)
        unseen = np.maximum(kernel.unseen[np.arange(n_groups) % self.n_segments] - shown, 0)
        near = convolve1d(unseen, np.concatenate([kernel.weights[:0:-1], kernel.weights]), axis=1, mode="constant")

        bins, around = kernel.bins[places.genes][:, None], np.full(places.nearest.shape, -1)
        around[places.nearest >= 0] = seen_bins[places.nearest[places.nearest >= 0]]
        distance = np.minimum(np.abs(around - bins), len(kernel.weights) - 1)
        weights = np.where((around >= 0) & (bins >= 0), kernel.weights[distance], 0).sum(axis=1)
        mass = np.where(around >= 0, near[places.groups[:, None], np.maximum(around, 0)], 0).sum(axis=1)
        weighted = places.frequency * weights / np.where(mass > 0, mass, 1)
        return np.where(mass > 0, (1 - _FLOOR) * weighted + _FLOOR * places.unseen, places.unseen)


class _Kernel:
    """A Gaussian on ln median, rounded to tenths of its width."""

    def __init__(self, medians: np.ndarray, frequency: np.ndarray, width: float):
        self.width = width
        # ln median of each gene in tenths of the width, from 0; -1 without a median: int64 (V,).
        bins = np.rint(np.log(medians) * (_STEPS / width))
        self.bins = np.where(np.isnan(bins), -1, bins - np.nanmin(bins)).astype(np.int64)
        n_bins, known = int(self.bins.max()) + 1, self.bins >= 0
        # Weights of the distances 0, 1, … in bins; the last is 0, for all larger ones: float64 (52,).
        self.weights = np.append(np.exp(-0.5 * (np.arange(_RADIUS * _STEPS + 1) / _STEPS) ** 2), 0)
        # Frequency of all genes of a bin: float64 (n_segments, n_bins).
        self.unseen = np.stack([np.bincount(self.bins[known], of[known], n_bins) for of in frequency])


class _Places(NamedTuple):
    """Scored positions (k,) and visible ones (v,) of a batch; a group is a segment of a cell."""

    genes: np.ndarray  # int64 (k,)
    groups: np.ndarray  # int64 (k,)
    frequency: np.ndarray  # float64 (k,), probability of the gene under B1
    unseen: np.ndarray  # float64 (k,), under B2
    seen: np.ndarray  # int64 (v,), the visible genes
    seen_groups: np.ndarray  # int64 (v,)
    seen_frequency: np.ndarray  # float64 (v,)
    nearest: np.ndarray  # int64 (k, 8), visible genes at the nearest ranks; -1 if there are fewer


def _nearest(at: np.ndarray, groups: np.ndarray, seen_at: np.ndarray, seen_groups: np.ndarray) -> np.ndarray:
    """Find the visible tokens nearest to each scored one, in its group; positions are ascending."""
    candidates = np.searchsorted(seen_at, at)[:, None] + np.arange(-_N_NEAREST, _N_NEAREST)
    inside = (candidates >= 0) & (candidates < len(seen_at))
    candidates = np.where(inside, candidates, 0)
    if not len(seen_at):
        return np.full((len(at), _N_NEAREST), -1)
    inside &= seen_groups[candidates] == groups[:, None]
    distance = np.where(inside, np.abs(seen_at[candidates] - at[:, None]), np.iinfo(np.int64).max)
    order = np.argsort(distance, axis=1, kind="stable")[:, :_N_NEAREST]
    return np.where(np.take_along_axis(inside, order, 1), np.take_along_axis(candidates, order, 1), -1)


# ---------------------------------------------------------------------- bins


class _BinBaselines:
    """Marginals of the bins of masked genes."""

    def __init__(self, collator: CellCollator, train: Any, rows: np.ndarray, batch_size: int, whole_cells: bool):
        self.tokenizer = collator.tokenizer
        self.settings: dict[str, float] = {}
        n_genes, n_bins = len(self.tokenizer.genes), self.tokenizer.n_bins
        counts = np.zeros(n_genes * n_bins)
        n_masks = int(np.clip(_MASKED_CELLS // len(rows), 1, _MOST_MASKS))
        other = collator.for_evaluation()
        for epoch in range(n_masks):
            other.set_epoch(epoch)
            for examples in read_rows(train, rows, batch_size, "marginals of bins"):
                batch = {name: tensor.numpy() for name, tensor in other(examples).items()}
                genes, bins = self._labels(batch, masked_genes(batch, self.tokenizer).scored)
                counts += np.bincount(genes * n_bins + bins, minlength=len(counts))
        by_gene = counts.reshape(n_genes, n_bins)
        of_all = by_gene.sum(axis=0) + 1
        self.of_all = of_all / of_all.sum()
        self.of_gene = (by_gene + self.of_all) / (by_gene.sum(axis=1, keepdims=True) + 1)

    def _labels(self, batch: dict[str, np.ndarray], scored: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        genes = batch["token_type_ids"][scored] - self.tokenizer.gene_token_type_offset
        return genes, batch["labels"][scored] - self.tokenizer.first_bin_id

    def __call__(self, batch: dict[str, np.ndarray], found: MaskedGenes) -> dict[str, np.ndarray]:
        """Return the losses of the scored positions, one float64 array (k,) per baseline."""
        n_cells, n_bins = len(found.scored), len(self.of_all)
        genes, bins = self._labels(batch, found.scored)
        shown = np.nonzero(found.visible)[0] * n_bins + batch["input_ids"][found.visible]
        shown = np.bincount(shown - self.tokenizer.first_bin_id, minlength=n_cells * n_bins).reshape(n_cells, n_bins)
        absent = self.of_all[0]
        of_cell = (shown + self.of_all / (1 - absent)) / (shown.sum(axis=1, keepdims=True) + 1) * (1 - absent)
        of_cell[:, 0] = absent
        return {
            "uniform_nll": np.full(len(bins), np.log(n_bins)),
            "gene_marginal_nll": -np.log(self.of_gene[genes, bins]),
            "cell_marginal_nll": -np.log(of_cell[np.nonzero(found.scored)[0], bins]),
        }
