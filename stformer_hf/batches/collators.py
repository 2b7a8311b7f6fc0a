"""Collators: masked batches from cells or tokens, without a Python loop over tokens."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch

from ..models.gene_bert.cell_counts import is_cell_batch
from ..models.gene_bert.tokenization_gene_bert import GeneTokenizer, TokenizedCells
from ..store.cell_batch import CellBatch, as_cell_batch
from ..store.worker_slots import CollatedBatch
from .collate import CellCollator, pack, pad, read_tokens
from .gene_swaps import unexpressed_genes
from .label_collator import DataCollatorForCellClassification

# Streams of `uniforms`, one per decision.
_MASK_GENE, _SWAP_SEQUENCE, _SWAP_GENE, _NEW_GENE, _KIND_OF_MASK, _RANDOM_GENE = 0, 1, 2, 3, 7, 8
_SEQUENCE_SWAP_PROB = 0.9


class MaskedCells(NamedTuple):
    """Masked tokens of a batch, before padding or packing."""

    tokens: TokenizedCells  # masked ones are `[MASK]`
    labels: tuple[np.ndarray, np.ndarray]  # positions to predict and their original ids, int64 (k,)
    left_out: np.ndarray | None  # positions of tokens that are not attended to, int64


def collate_fn_wrapper(
    tokenizer: GeneTokenizer, pad_to_multiple_of: int | None = None, packing: bool = False
) -> Callable[[Any], dict[str, torch.Tensor]]:
    """Return a collate function that pads examples to the longest, or packs them (the name is PerturbGene's).

    Parameters
    ----------
    tokenizer : GeneTokenizer
        Defines the padding, and tokenizes cells of a store.
    pad_to_multiple_of : int, optional
        Round the length up to a multiple of this.
    packing : bool, default: False
        Return one row of tokens without padding, with the boundaries of its cells; see `pack`.

    Returns
    -------
    callable
        Takes a `CellBatch`, or a list of examples with `input_ids`, `token_type_ids` and optionally `labels` (one
        label per cell or one per token). Returns int64 tensors `input_ids` (padded with `[PAD]`), `token_type_ids` (0)
        and `attention_mask` (0) of shape (n, length), and `labels` (-100) if the examples have them.
    """
    # A closure could not be sent to workers that are spawned, as on macOS and Windows.
    collate = partial(_pad_or_pack, tokenizer=tokenizer, pad_to_multiple_of=pad_to_multiple_of, packing=packing)
    collate.tokenizer = tokenizer  # type: ignore[attr-defined]  # read by checks against the model's tokenizer
    return collate


def _pad_or_pack(
    examples: Any, tokenizer: GeneTokenizer, pad_to_multiple_of: int | None, packing: bool
) -> dict[str, torch.Tensor]:
    """Return a batch as `collate_fn_wrapper` says."""
    examples = as_cell_batch(examples)
    tokens = read_tokens(examples, tokenizer)
    labels = None
    if not is_cell_batch(examples) and "labels" in examples[0]:
        labels = [np.asarray(example["labels"]) for example in examples]
    of_tokens = None
    if labels is not None and labels[0].ndim:
        of_tokens = np.arange(tokens.indptr[-1]), np.concatenate(labels)
        if not np.issubdtype(of_tokens[1].dtype, np.integer):
            raise ValueError(f"Labels of tokens must be integers, got {of_tokens[1].dtype}.")
        if len(of_tokens[1]) != tokens.indptr[-1]:
            raise ValueError(f"There are {len(of_tokens[1])} labels for {tokens.indptr[-1]} tokens.")
    if packing:
        batch = pack(tokens, tokenizer, of_tokens)
    else:
        batch = pad(tokens, tokenizer, pad_to_multiple_of, of_tokens)
    if labels is not None and of_tokens is None:
        batch["labels"] = torch.from_numpy(np.stack(labels))
    return CollatedBatch(batch)


class DataCollatorForPhenotypicMLM(CellCollator):
    """Masks expression bins and phenotypes for `GeneBertForPhenotypicMLM`.

    Each gene is masked with probability `mlm_probability`: it becomes `[MASK]`, and its bin is the label. In 9 of 10
    cells each masked gene is, with probability 1 / n_bins / 0.9, swapped for a gene that the cell does not express,
    with label `bin_0`, so that `bin_0` is 1 / n_bins of the gene labels of a batch (`n_bins` includes `bin_0`). Each
    phenotype is chosen with `phenotype_mask_prob`: it becomes `[MASK]`, and its id is the label; one in ten of the
    chosen is dropped instead (`[PAD]`, type 0, no label, not attended to).

    The masks are a function of (seed, epoch, `cell_id`), independent of batch, worker and rank, once `set_epoch` was
    called, as `CellTrainer` does. Until then, each batch draws them from torch's global generator, as transformers'
    collators do.

    Parameters
    ----------
    tokenizer : GeneTokenizer
        Tokenizes a `CellBatch`; defines ids and padding.
    mlm : bool, default: True
        Whether to mask; if False, `labels` are all -100.
    mlm_probability : float, default: 0.15
        Fraction of the genes to mask.
    phenotype_mask_prob : float, default: 0.5
        Fraction of the phenotypes to mask.
    pad_to_multiple_of : int, optional
        Round the padded length up to a multiple of this.
    seed : int, default: 0
        Seed of the masks.
    gene_dropout : float, default: 0.0
        Fraction of a cell's genes to leave out, drawn again in each epoch. It regularises training on few cells, and
        makes steps cheaper. `CellTrainer` evaluates without it; transformers' Trainer has one collator for training
        and evaluation, and evaluates with it.
    packing : bool, default: False
        Return one row of tokens without padding, with the boundaries of its cells, instead of a padded matrix; see
        `pack`.
    max_tokens : int, optional
        Maximum number of tokens per batch, including padding; a larger batch raises an error.
    pad_packed_to : (n_tokens, n_cells), optional
        With `packing`, fill every batch up to one size with tokens that no cell reads and no loss counts, so that a
        compiled model is compiled once; see `to_fixed_size`. More tokens or cells raise an error.

    Raises
    ------
    ValueError
        A probability is outside [0, 1], or the tokenizer has the rank scheme.

    Notes
    -----
    This is PerturbGene's masking ("DataCollatorForPhenotypicMLM" of its Code Organization), with these differences.
    Genes are swapped for distinct genes that are certainly not expressed, at most half of those that the cell does not
    express: genes dropped by truncation are known to be expressed, and genes that a store does not measure are left
    out. In an example tokenized beforehand to the tokenizer's full `max_length`, whose dropped genes are unknown, no
    genes are swapped, so tokenize with the same `max_length`. Dropped phenotypes are not attended to. Masks do not
    depend on the global generator.

    Examples without `cell_id` are identified by a checksum of their tokens.
    """

    def __init__(
        self,
        tokenizer: GeneTokenizer,
        mlm: bool = True,
        mlm_probability: float = 0.15,
        phenotype_mask_prob: float = 0.5,
        pad_to_multiple_of: int | None = None,
        seed: int = 0,
        gene_dropout: float = 0.0,
        packing: bool = False,
        max_tokens: int | None = None,
        pad_packed_to: tuple[int, int] | None = None,
    ):
        settings = gene_dropout, pad_to_multiple_of, seed, packing, max_tokens, pad_packed_to
        super().__init__(tokenizer, *settings, mlm_probability, phenotype_mask_prob)
        if tokenizer.scheme != "binned":
            raise ValueError(
                "DataCollatorForPhenotypicMLM masks expression bins, but the tokenizer has the rank scheme: use "
                "DataCollatorForGeneRankMLM."
            )
        self._measured: tuple[np.ndarray, np.ndarray | None] | None = None
        self.mlm = mlm

    def __call__(self, examples: Any) -> dict[str, torch.Tensor]:
        """Return a masked batch.

        Parameters
        ----------
        examples : CellBatch, or list of dict
            Cells of a store, or examples with `input_ids` and `token_type_ids` (and `cell_id`).

        Returns
        -------
        dict of Tensor int64 (n, length)
            `input_ids`, `token_type_ids`, `attention_mask`, `labels`; with `packing`, the output of `pack`.
        """
        return self._batch(*self.masked(examples))

    def masked(self, examples: Any, panel: np.ndarray | None = None) -> MaskedCells:
        """Mask cells as `__call__` does, and hide masked genes from their counts.

        `panel`, bool array (n_genes,), are the genes that may be swapped in; by default all that the store measures.
        """
        examples = as_cell_batch(examples)
        tokens, cell_ids = self._tokens(examples)
        if not self.mlm:
            nothing = np.empty(0, np.int64)
            return MaskedCells(tokens, (nothing, nothing), None)
        masked, labels, left_out = self._mask_phenotypes(tokens, cell_ids, self.phenotype_mask_prob)
        measured: np.ndarray | None = None
        if tokens.measured is not None:
            measured = np.flatnonzero(tokens.measured.all(axis=0))
        elif is_cell_batch(examples):
            measured = self._measured_genes(examples)
        if panel is not None:
            measured = np.flatnonzero(panel) if measured is None else measured[panel[measured]]
        types = tokens.token_type_ids.copy()
        genes, gene_labels = self._mask_genes(tokens, cell_ids, is_cell_batch(examples), measured)
        # A gene that is swapped in is hidden too: its absence would reveal that it is bin_0. So is the gene that it
        # replaces: a gene with a count but without a token would reveal the swap.
        for of in (types, tokens.token_type_ids):
            tokens = self._hide(tokens, genes, of[genes] - self.tokenizer.gene_token_type_offset)
        both = np.concatenate([masked, genes]), np.concatenate([labels, gene_labels])
        return MaskedCells(tokens, both, left_out)

    def _measured_genes(self, cells: CellBatch) -> np.ndarray | None:
        """Return the indices of the tokenizer's genes that a store measures, ascending; None for all of them."""
        if self._measured is None or self._measured[0] is not cells.gene_ids:  # one array for all batches of a store
            found = np.unique(self.tokenizer.find_genes(cells.gene_ids, cells.symbols))
            found = found[found >= 0]
            self._measured = cells.gene_ids, None if len(found) == len(self.tokenizer.genes) else found
        return self._measured[1]

    def _mask_genes(
        self, tokens: TokenizedCells, cell_ids: np.ndarray, all_genes_known: bool, measured: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Mask genes in place, and swap some; return their positions and labels."""
        tokenizer, types = self.tokenizer, tokens.token_type_ids
        n_bins = tokenizer.n_bins
        cells = np.repeat(np.arange(len(cell_ids)), np.diff(tokens.indptr))
        # Draws use the type of a gene, so that they do not depend on the tokens around it.
        hit = self._happens(self.mlm_probability, _MASK_GENE, cell_ids, types, cells)
        hit &= tokenizer.get_gene_tokens_mask(tokens.input_ids)
        masked = np.flatnonzero(hit)
        cells = cells[masked]
        labels = tokens.input_ids[masked]
        tokens.input_ids[masked] = tokenizer.mask_token_id
        if tokens.expression_values is not None:
            tokens.expression_values[masked] = 0

        swapping = self._happens(_SEQUENCE_SWAP_PROB, _SWAP_SEQUENCE, cell_ids)
        if not all_genes_known:
            dropped = np.bincount(tokens.dropped_cells, minlength=len(cell_ids))
            swapping &= np.diff(tokens.indptr) + dropped < tokenizer.max_length
        swap = swapping[cells] & self._happens(
            1 / n_bins / _SEQUENCE_SWAP_PROB, _SWAP_GENE, cell_ids, types[masked], cells
        )
        new_types, given = unexpressed_genes(
            tokens,
            len(tokenizer.genes),
            tokenizer.gene_token_type_offset,
            masked[swap],
            cells[swap],
            lambda counters, of: self._uniforms(_NEW_GENE, cell_ids, counters, of),
            measured,
        )
        swapped = np.flatnonzero(swap)[given]
        types[masked[swapped]] = new_types[given]
        labels[swapped] = tokenizer.first_bin_id
        return masked, labels


class DataCollatorForGeneRankMLM(CellCollator):
    """Masks genes and phenotypes of ranked cells.

    Genes are masked as in BERT: each is chosen with probability `mlm_probability`, and its id is the label; of the
    chosen, 80 % become `[MASK]`, 10 % a random gene of the vocabulary, and 10 % are unchanged. Phenotypes are masked
    as in `DataCollatorForPhenotypicMLM`: each is chosen with `phenotype_mask_prob` and becomes `[MASK]`; one in ten of
    the chosen is left out instead.

    The masks are drawn as those of `DataCollatorForPhenotypicMLM`: a function of (seed, epoch, `cell_id`) once
    `set_epoch` was called.

    Parameters
    ----------
    tokenizer : GeneTokenizer or STFormerPreCollator
        Tokenizer with the rank scheme.
    mlm_probability : float, default: 0.15
        Fraction of the genes to predict.
    phenotype_mask_prob : float, default: 0.5
        Fraction of the phenotypes to mask.
    pad_to_multiple_of, seed, gene_dropout, packing, max_tokens, pad_packed_to
        As in `DataCollatorForPhenotypicMLM`.

    Raises
    ------
    ValueError
        A probability is outside [0, 1], or the tokenizer has the binned scheme.

    Notes
    -----
    This is the masking of Devlin et al. 2019, which STFormer and Geneformer use. transformers'
    `DataCollatorForLanguageModeling` replaces genes by any random token, even `[PAD]` and `[MASK]`; this one only by
    genes.
    """

    def __init__(
        self,
        tokenizer: GeneTokenizer,
        mlm_probability: float = 0.15,
        phenotype_mask_prob: float = 0.5,
        pad_to_multiple_of: int | None = None,
        seed: int = 0,
        gene_dropout: float = 0.0,
        packing: bool = False,
        max_tokens: int | None = None,
        pad_packed_to: tuple[int, int] | None = None,
    ):
        settings = gene_dropout, pad_to_multiple_of, seed, packing, max_tokens, pad_packed_to
        super().__init__(tokenizer, *settings, mlm_probability, phenotype_mask_prob)
        if tokenizer.scheme != "rank":
            raise ValueError(
                "DataCollatorForGeneRankMLM masks ranked genes, but the tokenizer has the binned scheme: use "
                "DataCollatorForPhenotypicMLM."
            )

    def __call__(self, examples: Any) -> dict[str, torch.Tensor]:
        """Return a masked batch, as `DataCollatorForPhenotypicMLM` does."""
        return self._batch(*self.masked(examples))

    def masked(self, examples: Any, panel: np.ndarray | None = None) -> MaskedCells:
        """Mask cells as `DataCollatorForPhenotypicMLM.masked`, but with random genes of the whole vocabulary."""
        tokenizer = self.tokenizer
        tokens, cell_ids = self._tokens(as_cell_batch(examples))
        ids = tokens.input_ids
        cells = np.repeat(np.arange(len(cell_ids)), np.diff(tokens.indptr))
        # A gene may be in a cell and in its neighbourhood; apart from that, a draw depends on the gene alone.
        genes = ids + tokens.token_type_ids * tokenizer.vocab_size
        chosen = self._happens(self.mlm_probability, _MASK_GENE, cell_ids, genes, cells)
        chosen &= tokenizer.get_gene_tokens_mask(ids)
        masked = np.flatnonzero(chosen)
        cells, genes, labels = cells[masked], genes[masked], ids[masked]
        if tokens.cells is not None:
            own = tokens.token_type_ids[masked] == tokenizer.gene_token_type_offset  # not those of the neighbourhood
            genes_of_own = tokenizer.genes_of(labels[own], tokens.token_type_ids[masked[own]])
            tokens = self._hide(tokens, masked[own], genes_of_own)
        kind = self._uniforms(_KIND_OF_MASK, cell_ids, genes, cells)
        random = (self._uniforms(_RANDOM_GENE, cell_ids, genes, cells) * len(tokenizer.gene_token_ids)).astype(
            np.int64
        )
        becomes = [tokenizer.mask_token_id, tokenizer.gene_token_ids[random]]
        ids[masked] = np.select([kind < 0.8, kind < 0.9], becomes, labels)
        phenotypes, values, left_out = self._mask_phenotypes(tokens, cell_ids, self.phenotype_mask_prob)
        both = np.concatenate([masked, phenotypes]), np.concatenate([labels, values])
        return MaskedCells(tokens, both, left_out)


__all__ = [
    "DataCollatorForCellClassification",
    "DataCollatorForGeneRankMLM",
    "DataCollatorForPhenotypicMLM",
    "MaskedCells",
    "collate_fn_wrapper",
]
