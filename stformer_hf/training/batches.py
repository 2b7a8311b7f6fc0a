"""From cells or tokens to padded or packed batches, and what all collators share."""

from __future__ import annotations

import copy
import zlib
from typing import Any

import numpy as np
import torch

from ..models.gene_bert.cell_counts import is_cell_batch, pad_ragged
from ..models.gene_bert.randomness import uniforms
from ..models.gene_bert.tokenization_gene_bert import GeneTokenizer, TokenizedCells

IGNORE = -100
_MASK_PHENOTYPE, _DROP_PHENOTYPE, _DROP_GENE = 4, 5, 6  # streams of `uniforms`; collators.py has 0 to 3, and 7 on
_PHENOTYPE_DROP_PROB = 0.1


class CellCollator:
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
        check_probability("gene_dropout", gene_dropout)
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

    def for_evaluation(self) -> CellCollator:
        """Make a collator that draws the same masks at every evaluation, those of epoch 0, and drops no genes.

        It pads, so that predictions have a row a cell.
        """
        other = copy.copy(self)
        other.gene_dropout, other.packing, other.max_tokens = 0.0, False, None
        other._epoch = torch.zeros_like(self._epoch)
        return other

    def _uniforms(self, stream: int, cell_ids: np.ndarray, counters=0, cells: np.ndarray | None = None) -> np.ndarray:
        return uniforms(self.seed, self.epoch, stream, cell_ids, counters, cells)

    def _tokens(self, examples: Any) -> tuple[TokenizedCells, np.ndarray]:
        """Tokens and ids of the cells, after gene dropout; the arrays may be written to."""
        tokens = read_tokens(examples, self.tokenizer, self.epoch)
        cell_ids = _cell_ids(examples, tokens)
        if not self.gene_dropout:
            return tokens, cell_ids
        ids, types = tokens.input_ids, tokens.token_type_ids
        cells = np.repeat(np.arange(len(cell_ids)), np.diff(tokens.indptr))
        genes = types if self.tokenizer.scheme == "binned" else ids
        draw = self._uniforms(_DROP_GENE, cell_ids, genes, cells)
        drop = (draw < self.gene_dropout) & self.tokenizer.get_gene_tokens_mask(ids)
        kept = select(tokens, ~drop)
        return kept._replace(
            dropped_type_ids=np.concatenate([tokens.dropped_type_ids, types[drop]]),
            dropped_cells=np.concatenate([tokens.dropped_cells, cells[drop]]),
        ), cell_ids

    def _mask_phenotypes(
        self, tokens: TokenizedCells, labels: np.ndarray, attended: np.ndarray, cell_ids: np.ndarray, share: float
    ) -> None:
        """Mask a share of the phenotypes, in place; one in ten of them is dropped instead."""
        ids, types = tokens.input_ids, tokens.token_type_ids
        at = np.flatnonzero(self.tokenizer.get_phenotypic_tokens_mask(ids))
        cells = np.searchsorted(tokens.indptr, at, side="right") - 1
        position = at - tokens.indptr[cells]
        hit = self._uniforms(_MASK_PHENOTYPE, cell_ids, position, cells) < share
        drop = hit & (self._uniforms(_DROP_PHENOTYPE, cell_ids, position, cells) < _PHENOTYPE_DROP_PROB)
        mask = hit & ~drop
        labels[at[mask]] = ids[at[mask]]
        ids[at[mask]] = self.tokenizer.mask_token_id
        ids[at[drop]] = self.tokenizer.pad_token_id
        types[at[drop]] = 0
        attended[at[drop]] = 0

    def _batch(
        self, tokens: TokenizedCells, labels: np.ndarray | None = None, attended: np.ndarray | None = None
    ) -> dict[str, torch.Tensor | int]:
        """Make a padded or a packed batch of tokens, with labels a token; see `pack`."""
        if self.packing:
            batch = pack(tokens, self.tokenizer, labels, attended)
        else:
            batch = pad(tokens, self.tokenizer, self.pad_to_multiple_of, labels, attended)
        n_tokens = batch["input_ids"].numel()
        if self.max_tokens is not None and n_tokens > self.max_tokens:
            raise ValueError(
                f"A batch of {len(tokens.indptr) - 1} cells has {n_tokens} tokens, more than "
                f"max_tokens={self.max_tokens}: put fewer cells into a batch, or shorten them (tokenizer.max_length)."
            )
        return batch


def check_probability(name: str, value: float) -> None:
    """Raise ValueError for a number outside [0, 1]."""
    if not 0 <= value <= 1:
        raise ValueError(f"{name} is a probability, got {value}.")


def read_tokens(examples: Any, tokenizer: GeneTokenizer, epoch: int = 0) -> TokenizedCells:
    """Give the flat tokens of a CellBatch, or of a list of examples."""
    if is_cell_batch(examples):
        return tokenizer.encode_cells(examples, epoch=epoch)
    ids = [np.asarray(example["input_ids"], np.int64) for example in examples]
    indptr = np.zeros(len(ids) + 1, np.int64)
    np.cumsum([len(row) for row in ids], out=indptr[1:])

    def column(name: str, dtype: type) -> np.ndarray:
        flat = np.concatenate([np.asarray(example[name], dtype) for example in examples])
        if len(flat) != indptr[-1]:
            raise ValueError(f"{len(flat)} {name} for {indptr[-1]} tokens.")
        return flat

    if "token_type_ids" in examples[0]:
        types = column("token_type_ids", np.int64)
    elif "token_type_ids" in tokenizer.model_input_names:
        raise ValueError(f"The examples have no token_type_ids; they have {', '.join(examples[0])}.")
    else:
        types = np.zeros(indptr[-1], np.int64)
    nothing = np.empty(0, np.int64)
    values = column("expression_values", np.float32) if "expression_values" in examples[0] else None
    return TokenizedCells(np.concatenate(ids), types, indptr, nothing, nothing, values)


def _cell_ids(examples: Any, tokens: TokenizedCells) -> np.ndarray:
    if is_cell_batch(examples):
        return examples.cell_id
    if "cell_id" in examples[0]:
        return np.array([example["cell_id"] for example in examples], np.int64)
    both = np.stack([tokens.input_ids, tokens.token_type_ids], axis=1)
    cuts = tokens.indptr.tolist()
    return np.array([zlib.crc32(both[a:b].tobytes()) for a, b in zip(cuts, cuts[1:], strict=False)], np.int64)


def select(tokens: TokenizedCells, kept: np.ndarray) -> TokenizedCells:
    """Keep some tokens, bool array (T,), of all cells."""
    return tokens._replace(
        input_ids=tokens.input_ids[kept],
        token_type_ids=tokens.token_type_ids[kept],
        indptr=np.concatenate([[0], np.cumsum(kept)])[tokens.indptr],
        expression_values=None if tokens.expression_values is None else tokens.expression_values[kept],
    )


def pad(
    tokens: TokenizedCells,
    tokenizer: GeneTokenizer,
    multiple: int | None = None,
    labels: np.ndarray | None = None,
    attended: np.ndarray | None = None,
) -> dict[str, torch.Tensor]:
    """Put the tokens of each cell into a row, and fill the rows up.

    Parameters
    ----------
    tokens : TokenizedCells
        T tokens of n cells.
    tokenizer : GeneTokenizer
        Says what a model reads, what pads it, and on which side.
    multiple : int, optional
        Round the length up to a multiple of this.
    labels : int64 array (T,), optional
        A label a token; -100 is filled in.
    attended : int array (T,), optional
        0 for tokens that are not to be attended to.

    Returns
    -------
    dict of str to Tensor (n, length)
        What `tokenizer.model_input_names` says, and `labels`.
    """
    length = int(np.diff(tokens.indptr).max(initial=0))
    if multiple:
        length = -(-length // multiple) * multiple
    columns = tokenizer.columns(tokens)
    if attended is not None:
        columns["attention_mask"] = (attended, 0)
    if labels is not None:
        columns["labels"] = (labels, IGNORE)
    return {
        name: torch.from_numpy(pad_ragged(flat, tokens.indptr, length, value, tokenizer.padding_side))
        for name, (flat, value) in columns.items()
    }


def pack(
    tokens: TokenizedCells,
    tokenizer: GeneTokenizer,
    labels: np.ndarray | None = None,
    attended: np.ndarray | None = None,
) -> dict[str, torch.Tensor | int]:
    """Put the tokens of cells into one row, and say where each cell begins.

    Parameters
    ----------
    tokens : TokenizedCells
        T tokens of n cells.
    tokenizer : GeneTokenizer
        Says what a model reads.
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
    if attended is not None and not attended.all():
        kept = attended.astype(bool)
        tokens = select(tokens, kept)
        labels = None if labels is None else labels[kept]
    columns = {name: flat for name, (flat, _) in tokenizer.columns(tokens).items() if name != "attention_mask"}
    if labels is not None:
        columns["labels"] = labels
    lengths = np.diff(tokens.indptr)
    cuts, longest = torch.from_numpy(tokens.indptr.astype(np.int32)), int(lengths.max(initial=0))
    cells = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)
    return {
        **{name: torch.from_numpy(flat)[None] for name, flat in columns.items()},
        "cu_seq_lens_q": cuts,
        "cu_seq_lens_k": cuts,
        "max_length_q": longest,
        "max_length_k": longest,
        "seq_idx": torch.from_numpy(cells)[None],
    }


__all__ = ["IGNORE", "CellCollator", "check_probability", "pack", "pad", "read_tokens"]
