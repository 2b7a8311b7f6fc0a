"""Collators: cells or tokens in, padded batches out; masking without a Python loop over tokens."""

from __future__ import annotations

import copy
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from ..models.gene_bert.cell_counts import is_cell_batch, pad_ragged
from ..models.gene_bert.randomness import uniforms
from ..models.gene_bert.tokenization_gene_bert import GeneTokenizer, TokenizedCells

# Streams of `uniforms`, one a decision.
_MASK_GENE, _SWAP_SEQUENCE, _SWAP_GENE, _NEW_GENE, _MASK_PHENOTYPE, _DROP_PHENOTYPE, _DROP_GENE = range(7)
_SEQUENCE_SWAP_PROB = 0.9
_PHENOTYPE_DROP_PROB = 0.1
_IGNORE = -100


def collate_fn_wrapper(
    tokenizer: GeneTokenizer, pad_to_multiple_of: int | None = None
) -> Callable[[Any], dict[str, torch.Tensor]]:
    """Make a collate function that pads examples to the longest (PerturbGene's name).

    Parameters
    ----------
    tokenizer : GeneTokenizer
        Gives the padding, and tokenizes cells of a store.
    pad_to_multiple_of : int, optional
        Round the length up to a multiple of this.

    Returns
    -------
    callable
        Takes a `CellBatch`, or a list of examples with `input_ids`, `token_type_ids` and perhaps `labels` (a label a
        cell or a label a token). Gives int64 tensors `input_ids` (`[PAD]`), `token_type_ids` (0), `attention_mask`
        (0) of shape (n, length), and `labels` (-100) if the examples have them.
    """

    def collate(examples: Any) -> dict[str, torch.Tensor]:
        tokens = _tokens(examples, tokenizer)
        batch = _pad(tokens, tokenizer, pad_to_multiple_of)
        if not is_cell_batch(examples) and "labels" in examples[0]:
            labels = [np.asarray(example["labels"]) for example in examples]
            if labels[0].ndim:
                length = batch["input_ids"].shape[1]
                flat = np.concatenate(labels)
                if len(flat) != tokens.indptr[-1]:
                    raise ValueError(f"{len(flat)} labels for {tokens.indptr[-1]} tokens.")
                padded = pad_ragged(flat, tokens.indptr, length, _IGNORE, tokenizer.padding_side)
                batch["labels"] = torch.from_numpy(padded)
            else:
                batch["labels"] = torch.from_numpy(np.stack(labels))
        return batch

    return collate


class _CellCollator:
    """What the collators share: a seed, an epoch, genes left out anew in each epoch, padding or packing."""

    def __init__(
        self,
        tokenizer: GeneTokenizer,
        gene_dropout: float,
        pad_to_multiple_of: int | None,
        seed: int,
        packing: bool,
        max_tokens: int | None,
    ):
        _check_probability("gene_dropout", gene_dropout)
        if packing and pad_to_multiple_of:
            raise ValueError("A packed batch is not padded: leave pad_to_multiple_of out.")
        self.tokenizer = tokenizer
        self.gene_dropout = gene_dropout
        self.pad_to_multiple_of = pad_to_multiple_of
        self.seed = seed
        self.packing = packing
        self.max_tokens = max_tokens
        # In shared memory: workers that outlive an epoch see the next one.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    @property
    def epoch(self) -> int:
        """The epoch that random numbers are drawn for."""
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Draw for another epoch; call it before the epoch's first batch."""
        self._epoch.fill_(epoch)

    def for_evaluation(self) -> _CellCollator:
        """Make a collator that draws the same masks at every evaluation, those of epoch 0, and drops no genes."""
        other = copy.copy(self)
        other.gene_dropout = 0.0
        other._epoch = torch.zeros_like(self._epoch)
        return other

    def _batch(
        self, tokens: TokenizedCells, labels: np.ndarray | None = None, attended: np.ndarray | None = None
    ) -> dict[str, torch.Tensor | int]:
        """Make a padded or a packed batch of tokens, with labels a token; see `pack`."""
        if self.packing:
            batch = pack(tokens, labels, attended)
        else:
            batch = _pad(tokens, self.tokenizer, self.pad_to_multiple_of, attended)
            if labels is not None:
                length, side = batch["input_ids"].shape[1], self.tokenizer.padding_side
                batch["labels"] = torch.from_numpy(pad_ragged(labels, tokens.indptr, length, _IGNORE, side))
        if self.max_tokens is not None and batch["input_ids"].numel() > self.max_tokens:
            raise ValueError(
                f"A batch of {len(tokens.indptr) - 1} cells has {batch['input_ids'].numel()} tokens, more than "
                f"max_tokens={self.max_tokens}: put fewer cells into a batch, or shorten them (tokenizer.max_length)."
            )
        return batch

    def _uniforms(self, stream: int, cell_ids: np.ndarray, counters=0, cells: np.ndarray | None = None) -> np.ndarray:
        return uniforms(self.seed, self.epoch, stream, cell_ids, counters, cells)

    def _tokens(self, examples: Any) -> tuple[TokenizedCells, np.ndarray]:
        """Tokens and ids of the cells, after gene dropout."""
        tokens = _tokens(examples, self.tokenizer, self.epoch)
        cell_ids = _cell_ids(examples, tokens)
        if not self.gene_dropout:
            return tokens, cell_ids
        ids, types, indptr = tokens.input_ids, tokens.token_type_ids, tokens.indptr
        cells = np.repeat(np.arange(len(cell_ids)), np.diff(indptr))
        genes = types if self.tokenizer.scheme == "binned" else ids
        draw = self._uniforms(_DROP_GENE, cell_ids, genes, cells)
        drop = (draw < self.gene_dropout) & self.tokenizer.get_gene_tokens_mask(ids)
        kept = np.concatenate([[0], np.cumsum(~drop)])
        return TokenizedCells(
            ids[~drop],
            types[~drop],
            kept[indptr],
            np.concatenate([tokens.dropped_type_ids, types[drop]]),
            np.concatenate([tokens.dropped_cells, cells[drop]]),
        ), cell_ids


class DataCollatorForPhenotypicMLM(_CellCollator):
    """Masks expression bins and phenotypes for `GeneBertForPhenotypicMLM`.

    Genes: each is masked with `mlm_probability`; a masked one becomes `[MASK]` and its bin is its label. In 9 of 10
    cells each masked gene is, with probability 1 / n_bins / 0.9, swapped for a gene that the cell does not express
    and labelled `bin_0`: over a batch `bin_0` is 1 / n_bins of the gene labels (`n_bins` counts `bin_0`). Phenotypes:
    each is chosen with `phenotype_mask_prob` and becomes `[MASK]`, labelled with itself; one in ten of the chosen is
    dropped instead: `[PAD]`, type 0, no label, not attended to.

    All of it is a function of (seed, epoch, `cell_id`), whatever the batch, the worker or the rank.

    Parameters
    ----------
    tokenizer : GeneTokenizer
        Tokenizes a `CellBatch`; gives ids and padding.
    mlm : bool, default: True
        Whether to mask; without, `labels` are all -100.
    mlm_probability : float, default: 0.15
        Share of the genes to mask.
    phenotype_mask_prob : float, default: 0.5
        Share of the phenotypes to mask.
    pad_to_multiple_of : int, optional
        Round the padded length up to a multiple of this.
    seed : int, default: 0
        Of the masks.
    gene_dropout : float, default: 0.0
        Share of a cell's genes to leave out, chosen anew in each epoch: it regularises where cells are few, and makes
        steps cheaper.
    packing : bool, default: False
        Give one row of tokens without padding, and where its cells begin, in place of a padded matrix; see `pack`.
    max_tokens : int, optional
        Most tokens a batch may have, padding included; one with more raises.

    Raises
    ------
    ValueError
        A probability outside [0, 1]; a tokenizer of the rank scheme.

    Notes
    -----
    PerturbGene's masking ("DataCollatorForPhenotypicMLM" of its Code Organization). Differences: the swap takes
    distinct genes that are certainly not expressed (genes lost to truncation are known to be, and an example of full
    the tokenizer's `max_length`, whose cut genes are not known, swaps none: tokenize examples with that length), at
    most half of those that the cell does not express; dropped phenotypes are not attended to; masks do not depend on
    the global generator.

    Examples without `cell_id` are known by a checksum of their tokens.
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
    ):
        super().__init__(tokenizer, gene_dropout, pad_to_multiple_of, seed, packing, max_tokens)
        if tokenizer.scheme != "binned":
            raise ValueError(
                "DataCollatorForPhenotypicMLM masks expression bins, and the tokenizer gives ranks: use "
                "transformers.DataCollatorForLanguageModeling."
            )
        _check_probability("mlm_probability", mlm_probability)
        _check_probability("phenotype_mask_prob", phenotype_mask_prob)
        self.mlm = mlm
        self.mlm_probability = mlm_probability
        self.phenotype_mask_prob = phenotype_mask_prob

    def __call__(self, examples: Any) -> dict[str, torch.Tensor]:
        """Make a batch.

        Parameters
        ----------
        examples : CellBatch, or list of dict
            Cells of a store, or examples with `input_ids` and `token_type_ids` (and `cell_id`).

        Returns
        -------
        dict of Tensor int64 (n, length)
            `input_ids`, `token_type_ids`, `attention_mask`, `labels`; packed, what `pack` gives.
        """
        tokens, cell_ids = self._tokens(examples)
        ids, types = tokens.input_ids.copy(), tokens.token_type_ids.copy()
        labels = np.full(len(ids), _IGNORE, np.int64)
        attended = np.ones(len(ids), np.int64)
        if self.mlm:
            self._mask_phenotypes(tokens, ids, types, labels, attended, cell_ids)
            self._mask_genes(examples, tokens, ids, types, labels, cell_ids)
        return self._batch(tokens._replace(input_ids=ids, token_type_ids=types), labels, attended)

    def _mask_phenotypes(self, tokens, ids, types, labels, attended, cell_ids) -> None:
        at = np.flatnonzero(self.tokenizer.get_phenotypic_tokens_mask(tokens.input_ids))
        cells = np.searchsorted(tokens.indptr, at, side="right") - 1
        position = at - tokens.indptr[cells]
        hit = self._uniforms(_MASK_PHENOTYPE, cell_ids, position, cells) < self.phenotype_mask_prob
        drop = hit & (self._uniforms(_DROP_PHENOTYPE, cell_ids, position, cells) < _PHENOTYPE_DROP_PROB)
        mask = hit & ~drop
        labels[at[mask]] = ids[at[mask]]
        ids[at[mask]] = self.tokenizer.mask_token_id
        ids[at[drop]] = self.tokenizer.pad_token_id
        types[at[drop]] = 0
        attended[at[drop]] = 0

    def _mask_genes(self, examples, tokens, ids, types, labels, cell_ids) -> None:
        tokenizer = self.tokenizer
        n_bins = tokenizer.n_bins
        genes = np.flatnonzero(tokenizer.get_gene_tokens_mask(tokens.input_ids))
        cells = np.repeat(np.arange(len(cell_ids)), np.diff(tokens.indptr))[genes]
        # A gene is known by its type, so that its fate does not depend on the tokens around it.
        hit = self._uniforms(_MASK_GENE, cell_ids, types[genes], cells) < self.mlm_probability
        at, cells = genes[hit], cells[hit]
        labels[at] = ids[at]
        ids[at] = tokenizer.mask_token_id

        swapping = self._uniforms(_SWAP_SEQUENCE, cell_ids) < _SEQUENCE_SWAP_PROB
        if not is_cell_batch(examples):
            dropped = np.bincount(tokens.dropped_cells, minlength=len(cell_ids))
            swapping &= np.diff(tokens.indptr) + dropped < tokenizer.max_length
        swap = swapping[cells] & (
            self._uniforms(_SWAP_GENE, cell_ids, types[at], cells) < 1 / n_bins / _SEQUENCE_SWAP_PROB
        )
        at, cells = at[swap], cells[swap]
        new_types, given = self._unexpressed_genes(tokens, at, cells, cell_ids)
        types[at[given]] = new_types[given]
        labels[at[given]] = tokenizer.first_bin_id

    def _unexpressed_genes(self, tokens, at, cells, cell_ids) -> tuple[np.ndarray, np.ndarray]:
        """Draw, for each token to swap, the type of a gene that its cell does not express; distinct in a cell.

        Returns the types (k,), and which of them were given: a cell gives at most half of its unexpressed genes.
        """
        offset, n_genes = self.tokenizer.gene_token_type_offset, len(self.tokenizer.genes)
        n_cells = len(cell_ids)
        # Expressed genes of all cells, ascending in each; those that were dropped are expressed too.
        is_gene = tokens.token_type_ids >= offset
        owner = np.repeat(np.arange(n_cells), np.diff(tokens.indptr))[is_gene]
        expressed = tokens.token_type_ids[is_gene] - offset
        if len(tokens.dropped_cells):
            owner = np.concatenate([owner, tokens.dropped_cells])
            expressed = np.concatenate([expressed, tokens.dropped_type_ids - offset])
        keys = owner * n_genes + expressed
        if (np.diff(keys) <= 0).any():
            keys = np.unique(keys)
            owner, expressed = keys // n_genes, keys % n_genes
        first = np.searchsorted(owner, np.arange(n_cells + 1))
        n_unexpressed = n_genes - np.diff(first)
        # The r-th unexpressed gene of a cell is r + the number of its expressed genes g with g - rank(g) <= r.
        gaps = owner * (n_genes + 1) + expressed - (np.arange(len(keys)) - first[owner])

        order = np.argsort(cells, kind="stable")
        place = np.empty(len(cells), np.int64)
        place[order] = np.arange(len(cells)) - np.searchsorted(cells[order], cells[order])
        given = place < n_unexpressed[cells] // 2

        rank = np.zeros(len(cells), np.int64)
        pending = np.flatnonzero(given)
        attempt = 0
        while len(pending):  # each round settles at least half of the tokens in expectation
            counters = tokens.token_type_ids[at[pending]] + attempt * (offset + n_genes)
            draw = self._uniforms(_NEW_GENE, cell_ids, counters, cells[pending])
            rank[pending] = (draw * n_unexpressed[cells[pending]]).astype(np.int64)
            pending = pending[_repeats(cells, rank, given, pending)]
            attempt += 1
        genes = rank + np.searchsorted(gaps, cells * (n_genes + 1) + rank, side="right") - first[cells]
        return genes + offset, given


class DataCollatorForCellClassification(_CellCollator):
    """Pads cells and gives the class of each, for `GeneBertForClassification`.

    Parameters
    ----------
    tokenizer : GeneTokenizer
        Tokenizes a `CellBatch`; gives the padding. It must not put the label into the cell's own tokens.
    label : str, default: "labels"
        Categorical obs column of the store, or column of the examples, that holds the class.
    label2id : dict of str to int, optional
        Class of each name of a store's column; its own order of names by default.
    pad_to_multiple_of : int, optional
        Round the padded length up to a multiple of this.
    seed : int, default: 0
        Of the gene dropout.
    gene_dropout : float, default: 0.0
        Share of a cell's genes to leave out, chosen anew in each epoch: it regularises where cells are few, and makes
        steps cheaper.
    packing : bool, default: False
        Give one row of tokens without padding, and where its cells begin, in place of a padded matrix; see `pack`.
    max_tokens : int, optional
        Most tokens a batch may have, padding included; one with more raises.

    Raises
    ------
    ValueError
        The label is one of the tokenizer's included phenotypes; a batch has cells without a label.
    """

    def __init__(
        self,
        tokenizer: GeneTokenizer,
        label: str = "labels",
        label2id: dict[str, int] | None = None,
        pad_to_multiple_of: int | None = None,
        seed: int = 0,
        gene_dropout: float = 0.0,
        packing: bool = False,
        max_tokens: int | None = None,
    ):
        super().__init__(tokenizer, gene_dropout, pad_to_multiple_of, seed, packing, max_tokens)
        if label in tokenizer.included_phenotypes:
            raise ValueError(
                f"The tokenizer puts {label!r} into the tokens, and the model would read the answer: take it out of "
                "tokenizer.included_phenotypes."
            )
        self.label = label
        self.label2id = label2id

    def __call__(self, examples: Any) -> dict[str, torch.Tensor]:
        """Make a batch of a `CellBatch` or of examples.

        Returns
        -------
        dict of Tensor int64
            `input_ids`, `token_type_ids`, `attention_mask` (n, length), and `labels` (n,).
        """
        batch = self._batch(self._tokens(examples)[0])
        if is_cell_batch(examples):
            if self.label not in examples.categories:
                raise ValueError(
                    f"The store has no categorical column {self.label!r}; it has {', '.join(examples.categories)}."
                )
            labels = examples.obs[self.label]
            if self.label2id is not None:
                names = examples.categories[self.label]
                labels = np.array([*(self.label2id.get(name, -1) for name in names), -1])[labels]
        else:
            labels = np.array([example[self.label] for example in examples], np.int64)
        if (labels < 0).any():
            raise ValueError(f"{(labels < 0).sum()} cells of the batch have no known {self.label!r}; leave them out.")
        batch["labels"] = torch.from_numpy(labels)
        return batch


def _check_probability(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise ValueError(f"{name} is a probability, got {value}.")


def _tokens(examples: Any, tokenizer: GeneTokenizer, epoch: int = 0) -> TokenizedCells:
    """Flat tokens of a CellBatch or of a list of examples."""
    if is_cell_batch(examples):
        return tokenizer.encode_cells(examples, epoch=epoch)
    ids = [np.asarray(example["input_ids"], np.int64) for example in examples]
    indptr = np.zeros(len(ids) + 1, np.int64)
    np.cumsum([len(row) for row in ids], out=indptr[1:])
    types = np.concatenate([np.asarray(example["token_type_ids"], np.int64) for example in examples])
    nothing = np.empty(0, np.int64)
    return TokenizedCells(np.concatenate(ids), types, indptr, nothing, nothing)


def _cell_ids(examples: Any, tokens: TokenizedCells) -> np.ndarray:
    if is_cell_batch(examples):
        return examples.cell_id
    if "cell_id" in examples[0]:
        return np.array([example["cell_id"] for example in examples], np.int64)
    both = np.stack([tokens.input_ids, tokens.token_type_ids], axis=1)
    cuts = tokens.indptr.tolist()
    return np.array([zlib.crc32(both[a:b].tobytes()) for a, b in zip(cuts, cuts[1:], strict=False)], np.int64)


def _pad(
    tokens: TokenizedCells, tokenizer: GeneTokenizer, multiple: int | None, attended: np.ndarray | None = None
) -> dict[str, torch.Tensor]:
    length = int(np.diff(tokens.indptr).max(initial=0))
    if multiple:
        length = -(-length // multiple) * multiple
    if attended is None:
        attended = np.ones(len(tokens.input_ids), np.int64)
    columns = {
        "input_ids": (tokens.input_ids, tokenizer.pad_token_id),
        "token_type_ids": (tokens.token_type_ids, 0),
        "attention_mask": (attended, 0),
    }
    return {
        name: torch.from_numpy(pad_ragged(flat, tokens.indptr, length, value, tokenizer.padding_side))
        for name, (flat, value) in columns.items()
    }


def pack(
    tokens: TokenizedCells, labels: np.ndarray | None = None, attended: np.ndarray | None = None
) -> dict[str, torch.Tensor | int]:
    """Put the tokens of cells into one row, and say where each cell begins.

    Parameters
    ----------
    tokens : TokenizedCells
        T tokens of n cells.
    labels : int64 array (T,), optional
        A label a token.
    attended : int array (T,), optional
        0 for tokens to leave out.

    Returns
    -------
    dict
        `input_ids`, `token_type_ids`, `labels`: int64 Tensor (1, T). `cu_seq_lens_q`, `cu_seq_lens_k`: int32 Tensor
        (n + 1,). `max_length_q`, `max_length_k`: int. `seq_idx`: int32 Tensor (1, T), the cell of each token. These
        are the names that transformers' flash attention reads.
    """
    columns = {"input_ids": tokens.input_ids, "token_type_ids": tokens.token_type_ids}
    if labels is not None:
        columns["labels"] = labels
    indptr = tokens.indptr
    if attended is not None and not attended.all():
        kept = attended.astype(bool)
        indptr = np.concatenate([[0], np.cumsum(kept)])[indptr]
        columns = {name: flat[kept] for name, flat in columns.items()}
    lengths = np.diff(indptr)
    cuts, longest = torch.from_numpy(indptr.astype(np.int32)), int(lengths.max(initial=0))
    cells = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)
    return {
        **{name: torch.from_numpy(flat)[None] for name, flat in columns.items()},
        "cu_seq_lens_q": cuts,
        "cu_seq_lens_k": cuts,
        "max_length_q": longest,
        "max_length_k": longest,
        "seq_idx": torch.from_numpy(cells)[None],
    }


def _repeats(cells: np.ndarray, ranks: np.ndarray, settled: np.ndarray, pending: np.ndarray) -> np.ndarray:
    """Which of the pending draws repeat one of their cell that is settled, or that came before."""
    mine = np.flatnonzero(settled)
    waiting = np.zeros(len(cells), bool)
    waiting[pending] = True
    # Settled draws sort before waiting ones of the same key, so the first of each key stays.
    order = mine[np.lexsort((mine, waiting[mine], ranks[mine], cells[mine]))]
    repeat = np.zeros(len(cells), bool)
    repeat[order[1:]] = (cells[order][1:] == cells[order][:-1]) & (ranks[order][1:] == ranks[order][:-1])
    return repeat[pending]


__all__ = ["DataCollatorForCellClassification", "DataCollatorForPhenotypicMLM", "collate_fn_wrapper", "pack"]
