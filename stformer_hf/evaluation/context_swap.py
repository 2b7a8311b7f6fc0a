"""Test whether a model uses the context: the loss of masked genes in their own cell, and in that of another cell."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

from ..batches.collate import CellCollator, read_tokens
from ..batches.evaluating import evaluating
from ..models.gene_bert.configuration_gene_bert import IGNORE
from .gene_baselines import masked_genes, open_rows, read_rows
from .metrics import masked_nll


def context_swap(
    model: nn.Module,
    held_out: Any,
    collator: CellCollator,
    *,
    batch_size: int = 16,
    max_cells: int | None = None,
    seed: int = 0,
) -> dict[str, float]:
    """Score masked genes in their own context, and in the context of another cell.

    Masked positions, their labels and the other tokens (`[CLS]`, phenotypes, `[EOS]`) are the same in both; only the
    visible genes differ. A model that ignores them has a gap of 0.

    Parameters
    ----------
    model : PreTrainedModel
        Model of masked tokens; it is put into evaluation mode meanwhile.
    held_out, collator
        As for `masked_gene_baselines`; at least two cells.
    batch_size : int, default: 16
        Cells per batch; the partner of a cell is in the same batch.
    max_cells : int, optional
        Score a random subset of this many cells if there are more.
    seed : int, default: 0
        Seed of the subset and of the batches.

    Returns
    -------
    dict of str to float
        `own_context_nll` and `swapped_context_nll`, mean negative log likelihood in nats at the same positions;
        `context_swap_gap`, the second minus the first. Empty if no position can be scored: with one bin edge all
        visible bins are equal, and there is nothing to swap.

    Raises
    ------
    ValueError
        There are fewer than two cells; the cells are a stream.

    Notes
    -----
    Cells are batched at random; within a batch, cells of similar length are partners.

    Ranks: at each rank where both cells have a gene, the visible gene is replaced by the partner's (before masking).
    Higher ranks are attended to in neither context, and not scored. Genes that the partner shows are not scored
    either: a model that has learnt that a gene occurs once would lose there without using more of the context. The
    scored genes are thus those that the partner lacks or has masked, so the losses differ from those of an evaluation.
    Since neighbours in rank bracket the median of a gene, a gap proves that the model uses its context, not that it
    has learnt more than the medians: see B3 of `masked_gene_baselines`.

    Bins: the visible genes are kept, with the bins that they have in the partner. Genes that the partner does not
    express, or lost to truncation, are attended to in neither context: `bin_0` is never visible.
    """
    collator, held_out = collator.for_evaluation(), open_rows(held_out)
    if len(held_out) < 2:
        raise ValueError(f"A context swap needs at least two cells, got {len(held_out)}.")
    if collator.tokenizer.scheme == "binned" and collator.tokenizer.n_bins < 3:
        return {}
    batch_size = max(batch_size, 2)
    rows = np.random.default_rng(seed).permutation(len(held_out))[:max_cells]
    if len(rows) % batch_size == 1 and len(rows) > 1:
        rows = rows[:-1]  # a cell without a partner
    swap = _swap_ranks if collator.tokenizer.scheme == "rank" else _swap_bins
    device = next(model.parameters()).device
    totals = np.zeros(3)
    with evaluating(model):
        for examples in read_rows(held_out, rows, batch_size, "context swap"):
            totals += _score(model, *_own_and_swapped(examples, collator, swap), device)
    if not totals[2]:
        return {}
    own, swapped = (totals[:2] / totals[2]).tolist()
    return {"own_context_nll": own, "swapped_context_nll": swapped, "context_swap_gap": swapped - own}


@torch.no_grad()
def _score(model: nn.Module, own: dict, swapped: dict, device: torch.device) -> np.ndarray:
    """Sum the losses of both contexts, and count the positions: float64 array (3,)."""
    sums, options = [], {}
    if "sparse_prediction" in inspect.signature(getattr(model, "module", model).forward).parameters:
        options["sparse_prediction"] = True  # only logits of the labelled positions are needed
    for batch in (own, swapped):
        batch = {name: torch.from_numpy(values).to(device) for name, values in batch.items()}
        sums.append(masked_nll(model(**batch, **options).logits, batch["labels"]).cpu().double().sum().item())
    return np.array([*sums, np.count_nonzero(own["labels"] != IGNORE)])


def _own_and_swapped(examples: Any, collator: CellCollator, swap: Callable) -> tuple[dict, dict]:
    """Collate the cells in both contexts."""
    tokenizer = collator.tokenizer
    own = {name: tensor.numpy() for name, tensor in collator(examples).items()}
    tokens = read_tokens(examples, tokenizer, collator.epoch)
    found = masked_genes(own, tokenizer)
    own["attention_mask"] = own.get("attention_mask", (own["input_ids"] != tokenizer.pad_token_id).astype(np.int64))
    # Partners are pairs of neighbours in length; with an odd number, the last takes the one before it.
    order = np.argsort(np.diff(tokens.indptr), kind="stable")
    partner = np.empty(len(order), np.int64)
    other = np.arange(len(order)) ^ 1
    other[other == len(order)] -= 2
    partner[order] = order[other]

    swapped, attended, scored = swap(own, found, tokens, partner, tokenizer)
    for batch in (own, swapped):
        batch["attention_mask"] = own["attention_mask"] & attended
        batch["labels"] = np.where(scored & attended, own["labels"], IGNORE)
    return own, swapped


def _swap_ranks(
    own: dict, found: Any, tokens: Any, partner: np.ndarray, tokenizer: Any
) -> tuple[dict, np.ndarray, np.ndarray]:
    """Put the partner's genes at the ranks that both have; a segment is the cell's genes, or its neighbourhood's.

    Return the batch in the other context, and which tokens are attended to and scored, bool arrays (n, length).
    """
    ids = own["input_ids"]
    n_cells, length = ids.shape
    n_segments = 1 + bool(getattr(tokenizer, "neighborhood", False))
    n_tokens = tokenizer.vocab_size

    def segments(cells: np.ndarray, types: np.ndarray) -> np.ndarray:
        return cells * n_segments + (types - tokenizer.gene_token_type_offset if n_segments > 1 else 0)

    # Rank of each gene of the batch in its segment. Genes chosen for masking keep their rank.
    gene = tokenizer.get_gene_tokens_mask(ids) | found.scored
    cells, columns = np.nonzero(gene)
    types = own.get("token_type_ids", np.zeros_like(ids))
    of = segments(cells, types[gene])
    ranks = np.arange(len(of)) - np.searchsorted(of, of)
    # Genes of all cells before masking, by segment.
    is_gene = tokenizer.get_gene_tokens_mask(tokens.input_ids)
    all_cells = np.repeat(np.arange(n_cells), np.diff(tokens.indptr))[is_gene]
    all_of = segments(all_cells, tokens.token_type_ids[is_gene])
    starts = np.searchsorted(all_of, np.arange(n_cells * n_segments + 1))
    theirs = partner[of // n_segments] * n_segments + of % n_segments
    both = ranks < np.minimum(np.diff(starts)[of], np.diff(starts)[theirs])
    new = tokens.input_ids[is_gene][np.where(both, starts[theirs] + ranks, 0)]

    attended = np.ones(ids.shape, bool)
    attended[cells, columns] = both
    swapped = dict(own, input_ids=ids.copy())
    change = both & ~found.scored[gene]
    swapped["input_ids"][cells[change], columns[change]] = new[change]
    shown = np.unique(of[change] * n_tokens + new[change])
    scored = np.zeros(ids.shape, bool)
    scored[gene] = found.scored[gene] & ~np.isin(of * n_tokens + own["labels"][gene], shown)
    return swapped, attended, scored


def _swap_bins(
    own: dict, found: Any, tokens: Any, partner: np.ndarray, tokenizer: Any
) -> tuple[dict, np.ndarray, np.ndarray]:
    """Replace the bins of visible genes by the partner's; return values are those of `_swap_ranks`."""
    n_types = tokenizer.type_vocab_size
    is_gene = np.flatnonzero(tokenizer.get_gene_tokens_mask(tokens.input_ids))
    all_cells = np.repeat(np.arange(len(partner)), np.diff(tokens.indptr))[is_gene]
    keys = all_cells * n_types + tokens.token_type_ids[is_gene]
    order = np.argsort(keys, kind="stable")
    keys, is_gene = keys[order], is_gene[order]

    cells, columns = np.nonzero(found.visible)
    wanted = partner[cells] * n_types + own["token_type_ids"][found.visible]
    at = np.minimum(np.searchsorted(keys, wanted), max(len(keys) - 1, 0))
    there = keys[at] == wanted
    cells, columns, at = cells[there], columns[there], is_gene[at[there]]
    attended = ~found.visible
    attended[cells, columns] = True
    swapped = dict(own, input_ids=own["input_ids"].copy())
    swapped["input_ids"][cells, columns] = tokens.input_ids[at]
    if "expression_values" in own:
        swapped["expression_values"] = own["expression_values"].copy()
        swapped["expression_values"][cells, columns] = tokens.expression_values[at]
    return swapped, attended, found.scored
