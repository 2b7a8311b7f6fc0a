"""Padded or packed batches from cells or tokens, and the base class of the collators."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from ..models.gene_bert.cell_counts import CountRows, hide, is_cell_batch, pad_ragged, row_checksums
from ..models.gene_bert.configuration_gene_bert import IGNORE
from ..models.gene_bert.randomness import happens, uniforms
from ..models.gene_bert.tokenization_gene_bert import GeneTokenizer, TokenizedCells
from ..store.worker_slots import CollatedBatch
from .fixed_size import FixedSize, to_fixed_size

_MASK_PHENOTYPE, _DROP_PHENOTYPE, _DROP_GENE = 4, 5, 6  # streams of `uniforms`; collators.py has 0 to 3, and 7 on
_PHENOTYPE_DROP_PROB = 0.1


class CellCollator(ABC):
    """Base class of the collators: seed, epoch, gene dropout, padding or packing.

    Random numbers are a function of (seed, epoch, `cell_id`) once `set_epoch` was called, as `CellTrainer` does.
    Before, each batch draws a number from torch's global generator in place of the epoch, so that masks change from
    epoch to epoch in loops that do not know of `set_epoch`.
    """

    def __init__(
        self,
        tokenizer: GeneTokenizer,
        gene_dropout: float,
        pad_to_multiple_of: int | None,
        seed: int,
        packing: bool,
        max_tokens: int | None,
        pad_packed_to: tuple[int, int] | None = None,
        mlm_probability: float = 0.0,
        phenotype_mask_prob: float = 0.0,
    ):
        check_probability("gene_dropout", gene_dropout)
        check_probability("mlm_probability", mlm_probability)
        check_probability("phenotype_mask_prob", phenotype_mask_prob)
        if packing and pad_to_multiple_of:
            raise ValueError("A packed batch is not padded: do not set pad_to_multiple_of.")
        if pad_packed_to is not None and not packing:
            raise ValueError("pad_packed_to is for packed batches: set packing=True.")
        self.tokenizer = tokenizer
        self.mlm_probability, self.phenotype_mask_prob = mlm_probability, phenotype_mask_prob  # shares that are masked
        self.gene_dropout = gene_dropout
        self.pad_to_multiple_of = pad_to_multiple_of
        self.seed = seed
        self.packing = packing
        self.max_tokens = max_tokens
        self.pad_packed_to = pad_packed_to
        # In shared memory, so that persistent workers see the next epoch.
        self._epoch = torch.full((), -1, dtype=torch.int64).share_memory_()

    @abstractmethod
    def __call__(self, examples: Any) -> dict[str, torch.Tensor]:
        """Return a batch of cells of a store, or of tokenized cells."""

    @property
    def epoch(self) -> int:
        """Epoch for which random numbers are drawn; -1 if it was never set."""
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch; call it before the first batch of the epoch."""
        self._epoch.fill_(epoch)

    def epoch_of_batch(self) -> int:
        """Return the epoch; if it was never set, a new number from torch's global generator."""
        epoch = self.epoch
        return int(torch.randint(2**62, ())) if epoch < 0 else epoch

    def for_evaluation(self) -> CellCollator:
        """Return a collator that draws the same masks at every evaluation, those of epoch 0, and drops no genes.

        It pads, so that predictions have one row per cell.
        """
        other = copy.copy(self)
        other.gene_dropout, other.packing, other.max_tokens, other.pad_packed_to = 0.0, False, None, None
        other._epoch = torch.zeros_like(self._epoch)
        return other

    def _uniforms(
        self, stream: int, cell_ids: np.ndarray, counters: Any = 0, cells: np.ndarray | None = None
    ) -> np.ndarray:
        return uniforms(self.seed, self.epoch, stream, cell_ids, counters, cells)

    def _happens(
        self, share: float, stream: int, cell_ids: np.ndarray, counters: Any = 0, cells: np.ndarray | None = None
    ) -> np.ndarray:
        return happens(share, self.seed, self.epoch, stream, cell_ids, counters, cells)

    def _tokens(self, examples: Any) -> tuple[TokenizedCells, np.ndarray]:
        """Return tokens, after gene dropout, and the ids for which masks are drawn, as writable arrays."""
        draws = self.mlm_probability or self.phenotype_mask_prob or self.gene_dropout
        is_new = self.epoch < 0 and bool(draws or getattr(self.tokenizer, "truncation", None) == "random")
        epoch = self.epoch_of_batch() if is_new else max(self.epoch, 0)
        tokens = read_tokens(examples, self.tokenizer, epoch)
        cell_ids = _cell_ids(examples, tokens)
        if is_new:
            cell_ids = cell_ids ^ epoch  # which is of this batch alone
        if not self.gene_dropout:
            return tokens, cell_ids
        ids, types = tokens.input_ids, tokens.token_type_ids
        cells = np.repeat(np.arange(len(cell_ids)), np.diff(tokens.indptr))
        genes = types if self.tokenizer.scheme == "binned" else ids
        drop = self._happens(self.gene_dropout, _DROP_GENE, cell_ids, genes, cells)
        drop &= self.tokenizer.get_gene_tokens_mask(ids)
        kept = select(tokens, ~drop)
        if tokens.cells is not None:
            kept = kept._replace(cells=self._drop_from_cells(tokens.cells, cell_ids))
        return kept._replace(
            dropped_type_ids=np.concatenate([tokens.dropped_type_ids, types[drop]]),
            dropped_cells=np.concatenate([tokens.dropped_cells, cells[drop]]),
        ), cell_ids

    def _drop_from_cells(self, rows: CountRows, cell_ids: np.ndarray) -> CountRows:
        """Hide the genes that gene dropout leaves out from the whole cells, whether they are tokens or not.

        Genes that `max_length` cut are drawn like the others; a draw depends on the gene alone.
        """
        cells = np.repeat(np.arange(len(cell_ids)), np.diff(rows.indptr))
        counters = self.tokenizer.gene_counters(rows.columns)
        drop = self._happens(self.gene_dropout, _DROP_GENE, cell_ids, counters, cells)
        return rows._replace(counts=np.where(drop, np.float32(-1), rows.counts))

    def _hide(self, tokens: TokenizedCells, positions: np.ndarray, genes: np.ndarray) -> TokenizedCells:
        """Hide genes (indices, int64 array (k,)) from the whole cells of the tokens at `positions`."""
        if tokens.cells is None:
            return tokens
        cells = np.searchsorted(tokens.indptr, positions, side="right") - 1
        return tokens._replace(cells=hide(tokens.cells, cells, genes, len(self.tokenizer.genes)))

    def _mask_phenotypes(
        self, tokens: TokenizedCells, cell_ids: np.ndarray, share: float
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Mask a share of the phenotypes, in place; one in ten of them is left out instead.

        Returns the positions of the masked, ascending, and their original ids, int64 arrays (k,), and the positions of
        those left out.
        """
        ids = tokens.input_ids
        at = np.flatnonzero(self.tokenizer.get_phenotypic_tokens_mask(ids))
        cells = np.searchsorted(tokens.indptr, at, side="right") - 1
        position = at - tokens.indptr[cells]
        hit = self._happens(share, _MASK_PHENOTYPE, cell_ids, position, cells)
        drop = hit & self._happens(_PHENOTYPE_DROP_PROB, _DROP_PHENOTYPE, cell_ids, position, cells)
        masked, left_out = at[hit & ~drop], at[drop]
        labels = ids[masked]
        ids[masked] = self.tokenizer.mask_token_id
        ids[left_out] = self.tokenizer.pad_token_id
        tokens.token_type_ids[left_out] = 0
        return masked, labels, left_out

    def _batch(
        self,
        tokens: TokenizedCells,
        labels: tuple[np.ndarray, np.ndarray] | None = None,
        left_out: np.ndarray | None = None,
    ) -> CollatedBatch:
        """Make a padded or a packed batch from tokens; see `pad` and `pack`."""
        batch: dict[str, Any]
        if self.packing:
            batch = pack(tokens, self.tokenizer, labels, left_out)
        else:
            batch = pad(tokens, self.tokenizer, self.pad_to_multiple_of, labels, left_out)
        n_tokens = batch["input_ids"].numel()
        if self.max_tokens is not None and n_tokens > self.max_tokens:
            raise ValueError(
                f"A batch of {len(tokens.indptr) - 1} cells has {n_tokens} tokens, more than "
                f"max_tokens={self.max_tokens}: use fewer cells per batch, or truncate them (tokenizer.max_length)."
            )
        if self.pad_packed_to is not None:
            batch = to_fixed_size(batch, self._fixed_size(*self.pad_packed_to))
        return CollatedBatch(batch)

    def _fixed_size(self, n_tokens: int, n_cells: int) -> FixedSize:
        """Return the size of a full batch, with the labels that masking is expected to make."""
        tokenizer = self.tokenizer
        n_phenotypes = n_cells * len(tokenizer.included_phenotypes)
        n_labels = n_tokens * self.mlm_probability + n_phenotypes * self.phenotype_mask_prob
        return FixedSize(n_tokens, n_cells, tokenizer.max_length, n_labels, tokenizer.pad_token_id)


def check_probability(name: str, value: float) -> None:
    """Raise ValueError for a number outside [0, 1]."""
    if not 0 <= value <= 1:
        raise ValueError(f"{name} must be a probability, got {value}.")


def read_tokens(examples: Any, tokenizer: GeneTokenizer, epoch: int = 0) -> TokenizedCells:
    """Return the flat tokens of a CellBatch, of an Arrow table of tokenized cells, or of a list of examples."""
    if is_cell_batch(examples):
        return tokenizer.encode_cells(examples, epoch=epoch)
    names = examples.column_names if isinstance(examples, pa.Table) else list(examples[0])
    if "input_ids" not in names:
        raise ValueError(
            f"The examples have no input_ids; they have {', '.join(names) or 'nothing'}: pass cells of a CellStore, "
            "or tokenize them first."
        )
    ids, indptr = _flat_column(examples, "input_ids", np.int64)

    def column(name: str, dtype: type) -> np.ndarray:
        flat, cuts = _flat_column(examples, name, dtype)
        if not np.array_equal(cuts, indptr):
            raise ValueError(f"There are {len(flat)} {name} for {indptr[-1]} tokens.")
        return flat

    if "token_type_ids" in names:
        types = column("token_type_ids", np.int64)
    elif "token_type_ids" in tokenizer.model_input_names:
        raise ValueError(f"The examples have no token_type_ids; they have {', '.join(names)}.")
    else:
        types = np.zeros(len(ids), np.int64)
    nothing = np.empty(0, np.int64)
    values = column("expression_values", np.float32) if "expression_values" in names else None
    tokens = TokenizedCells(ids, types, indptr, nothing, nothing, values)
    if "cell_genes" in names:
        genes, cuts = _flat_column(examples, "cell_genes", np.int64)
        counts, same = _flat_column(examples, "cell_counts", np.float32)
        if not np.array_equal(cuts, same):
            raise ValueError(f"There are {len(counts)} cell_counts for {len(genes)} cell_genes.")
        measured = _measured_column(examples, len(cuts) - 1, len(tokenizer.genes))
        return tokens._replace(cells=CountRows(cuts, genes, counts), measured=measured)
    if "cell_genes" in tokenizer.model_input_names:
        raise ValueError(
            f"The model reads whole cells, but the examples have no cell_genes and cell_counts; they have "
            f"{', '.join(names)}. Tokenize them with this tokenizer, or train on the store."
        )
    return tokens


def _flat_column(examples: Any, name: str, dtype: type) -> tuple[np.ndarray, np.ndarray]:
    """Return a copy of all values of a list column (one list per cell), and the start of each cell's values."""
    if isinstance(examples, pa.Table):
        lists = examples.column(name).combine_chunks()
        if isinstance(lists, pa.ChunkedArray):  # without rows, or too long for one array
            lists = pa.concat_arrays(lists.chunks) if lists.num_chunks else pa.array([], lists.type)
        offsets = lists.offsets.to_numpy().astype(np.int64)
        return lists.values.to_numpy()[offsets[0] : offsets[-1]].astype(dtype), offsets - offsets[0]
    rows: list[np.ndarray] = [np.asarray(example[name], dtype) for example in examples]
    return np.concatenate(rows), np.cumsum([0, *map(len, rows)])


def _measured_column(examples: Any, n_cells: int, n_genes: int) -> np.ndarray | None:
    """Return which genes are measured in each cell's file, bool array (n_cells, n_genes); None for all."""
    name, rows = "measured_genes", []
    if isinstance(examples, pa.Table):
        if name in examples.column_names:
            lists = [row.values for row in examples.column(name)]
            rows = [None if row is None else row.to_numpy(zero_copy_only=False) for row in lists]
    else:
        rows = [example.get(name) for example in examples]
    if all(row is None for row in rows):
        return None
    measured = np.ones((n_cells, n_genes), bool)
    for row, of in zip(measured, rows, strict=True):
        row[:] = True if of is None else of
    return measured


def labels_per_cell(examples: Any, name: str, missing: int | None = None) -> np.ndarray:
    """Return a column with one value per cell from a table or from examples, with `missing` where there is none."""
    if isinstance(examples, pa.Table):
        column = examples.column(name)
        return (column if missing is None else column.fill_null(missing)).to_numpy()
    if name not in examples[0]:
        raise ValueError(
            f"The examples have no {name!r}; they have {', '.join(examples[0])}. Trainer removes columns that "
            "the model does not read: TrainingArguments(remove_unused_columns=False) keeps them."
        )
    return np.array([missing if example[name] is None else example[name] for example in examples])


def _cell_ids(examples: Any, tokens: TokenizedCells) -> np.ndarray:
    if is_cell_batch(examples):
        return examples.cell_id
    if "cell_id" in (examples.column_names if isinstance(examples, pa.Table) else examples[0]):
        return labels_per_cell(examples, "cell_id").astype(np.int64)
    return row_checksums(np.stack([tokens.input_ids, tokens.token_type_ids], axis=1), tokens.indptr)


def select(tokens: TokenizedCells, kept: np.ndarray) -> TokenizedCells:
    """Return the tokens of all cells where `kept`, bool array (T,), is True."""
    return tokens._replace(
        input_ids=tokens.input_ids[kept],
        token_type_ids=tokens.token_type_ids[kept],
        indptr=np.concatenate([[0], np.cumsum(kept)])[tokens.indptr],
        expression_values=None if tokens.expression_values is None else tokens.expression_values[kept],
    )


def join(parts: Sequence[TokenizedCells]) -> TokenizedCells:
    """Concatenate the cells of multiple parts, all of which measure all genes."""

    def cuts(indptrs: Sequence[np.ndarray]) -> np.ndarray:
        return np.concatenate([[0], np.cumsum(np.concatenate([np.diff(indptr) for indptr in indptrs]))])

    def joined(name: str) -> np.ndarray:
        return np.concatenate([getattr(part, name) for part in parts])

    before = np.cumsum([0, *(len(part.indptr) - 1 for part in parts)])
    whole = None
    rows = [part.cells for part in parts if part.cells is not None]
    if rows:
        assert len(rows) == len(parts)  # they are of one tokenizer
        columns, counts = (np.concatenate([getattr(of, name) for of in rows]) for name in ("columns", "counts"))
        whole = CountRows(cuts([of.indptr for of in rows]), columns, counts)
    return TokenizedCells(
        joined("input_ids"),
        joined("token_type_ids"),
        cuts([part.indptr for part in parts]),
        joined("dropped_type_ids"),
        np.concatenate([part.dropped_cells + shift for part, shift in zip(parts, before[:-1], strict=True)]),
        None if parts[0].expression_values is None else joined("expression_values"),
        whole,
    )


def pad(
    tokens: TokenizedCells,
    tokenizer: GeneTokenizer,
    multiple: int | None = None,
    labels: tuple[np.ndarray, np.ndarray] | None = None,
    left_out: np.ndarray | None = None,
) -> dict[str, torch.Tensor]:
    """Make a padded batch: the tokens of each cell in one row.

    Parameters
    ----------
    tokens : TokenizedCells
        T tokens of n cells.
    tokenizer : GeneTokenizer
        Defines the model inputs, their padding values, and the padding side.
    multiple : int, optional
        Round the length up to a multiple of this.
    labels : (positions, labels), int64 arrays (k,), optional
        Labels of some tokens; -100 for the others.
    left_out : int64 array, optional
        Positions of tokens that are not attended to.

    Returns
    -------
    dict of str to Tensor (n, length)
        The inputs in `tokenizer.model_input_names`, and `labels`.
    """
    length = int(np.diff(tokens.indptr).max(initial=1))  # models do not read batches without a column
    if multiple:
        length = -(-length // multiple) * multiple
    columns = tokenizer.columns(tokens, with_attention_mask=True)
    if left_out is not None and "attention_mask" in columns:
        columns["attention_mask"][0][left_out] = 0
    if labels is not None:
        columns["labels"] = _of_all_tokens(labels, tokens), IGNORE
    batch = {
        name: pad_ragged(flat, tokens.indptr, length, value, tokenizer.padding_side)
        for name, (flat, value) in columns.items()
    }
    if tokens.cells is not None:
        batch.update(tokenizer.pad_cells(tokens))
    return {name: torch.from_numpy(array) for name, array in batch.items()}


def _of_all_tokens(labels: tuple[np.ndarray, np.ndarray], tokens: TokenizedCells) -> np.ndarray:
    """Return the label of each token, int64 array (T,), from positions and their labels; -100 for the others."""
    of_all = np.full(len(tokens.input_ids), IGNORE, np.int64)
    of_all[labels[0]] = labels[1]
    return of_all


def pack(
    tokens: TokenizedCells,
    tokenizer: GeneTokenizer,
    labels: tuple[np.ndarray, np.ndarray] | None = None,
    left_out: np.ndarray | None = None,
) -> dict[str, torch.Tensor | int]:
    """Make a packed batch: the tokens of all cells in one row, with the boundaries of the cells.

    Parameters
    ----------
    tokens, tokenizer, labels
        As in `pad`.
    left_out : int64 array, optional
        Positions of tokens to leave out of the row.

    Returns
    -------
    dict
        `input_ids`, `token_type_ids`, `labels`: int64 Tensor (1, T). `cu_seq_lens_q`, `cu_seq_lens_k`: int32 Tensor
        (n + 1,). `max_length_q`, `max_length_k`: int. `seq_idx`: int32 Tensor (1, T), the cell of each token. These
        are the names that transformers' flash attention reads. With labels, `predicted_positions`: int64 Tensor (k,),
        the positions with a label, ascending, so that the model does not wait for a GPU to find them.
    """
    of_all = None if labels is None else _of_all_tokens(labels, tokens)
    if left_out is not None and len(left_out):
        kept = np.ones(len(tokens.input_ids), bool)
        kept[left_out] = False
        tokens = select(tokens, kept)
        of_all = None if of_all is None else of_all[kept]
    columns = {name: flat for name, (flat, _) in tokenizer.columns(tokens).items()}
    if of_all is not None:
        columns["labels"] = of_all
    if tokens.cells is not None:
        columns.update({name: flat for name, (flat, _) in tokenizer.cell_columns(tokens).items()})
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
        **({} if of_all is None else {"predicted_positions": torch.from_numpy(np.flatnonzero(of_all != IGNORE))}),
        **({} if tokens.cells is None else {"cell_indptr": torch.from_numpy(tokens.cells.indptr)}),
        **{name: torch.from_numpy(of) for name, of in tokens.measured_genes().items()},
    }
