"""Collators: masked or labelled batches from cells or tokens, without a Python loop over tokens."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch

from ..models.gene_bert.cell_counts import is_cell_batch
from ..models.gene_bert.configuration_gene_bert import IGNORE
from ..models.gene_bert.tokenization_gene_bert import GeneTokenizer, TokenizedCells
from ..sources.obs_columns import ClassCode
from ..store.cell_batch import CellBatch, as_cell_batch
from ..store.worker_slots import CollatedBatch
from .collate import CellCollator, check_probability, labels_per_cell, pack, pad, read_tokens
from .fixed_size import fill_labels
from .gene_swaps import unexpressed_genes
from .token_rows import CLASS_NAMES

# Streams of `uniforms`, one per decision.
_MASK_GENE, _SWAP_SEQUENCE, _SWAP_GENE, _NEW_GENE, _KIND_OF_MASK, _RANDOM_GENE = 0, 1, 2, 3, 7, 8
_SEQUENCE_SWAP_PROB = 0.9
_TRUTH = {"0": 0, "1": 1, "false": 0, "true": 1}


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

    def collate(examples: Any) -> dict[str, torch.Tensor]:
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

    collate.tokenizer = tokenizer  # type: ignore[attr-defined]  # read by checks against the model's tokenizer
    return collate


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
        super().__init__(tokenizer, gene_dropout, pad_to_multiple_of, seed, packing, max_tokens, pad_packed_to)
        if tokenizer.scheme != "binned":
            raise ValueError(
                "DataCollatorForPhenotypicMLM masks expression bins, but the tokenizer has the rank scheme: use "
                "DataCollatorForGeneRankMLM."
            )
        check_probability("mlm_probability", mlm_probability)
        check_probability("phenotype_mask_prob", phenotype_mask_prob)
        self._measured: tuple | None = None
        self.mlm = mlm
        self.mlm_probability = mlm_probability
        self.phenotype_mask_prob = phenotype_mask_prob

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
        super().__init__(tokenizer, gene_dropout, pad_to_multiple_of, seed, packing, max_tokens, pad_packed_to)
        if tokenizer.scheme != "rank":
            raise ValueError(
                "DataCollatorForGeneRankMLM masks ranked genes, but the tokenizer has the binned scheme: use "
                "DataCollatorForPhenotypicMLM."
            )
        check_probability("mlm_probability", mlm_probability)
        check_probability("phenotype_mask_prob", phenotype_mask_prob)
        self.mlm_probability = mlm_probability
        self.phenotype_mask_prob = phenotype_mask_prob

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


class DataCollatorForCellClassification(CellCollator):
    """Pads cells and returns the class of each, for `GeneBertForClassification`.

    Parameters
    ----------
    tokenizer : GeneTokenizer
        Tokenizes a `CellBatch`; defines the padding. It must not include the label in the cell's own tokens.
    label : str or list of str, default: "labels"
        Obs column of the store, or column of the examples, with the label: a categorical column for classes, or
        numbers for regression (`problem_type="regression"`). A list of columns of 0 and 1, or of numbers, for multiple
        labels per cell; of categorical columns, for a class in each of them (`config.label_columns`).
    label2id : dict of str to int, optional
        Index of each class by name, for cells that know the names of their codes (from a store, a stream, a tokenized
        dataset); by default their own order, which `CellTrainer` replaces by the model's. Without `CellTrainer`, pass
        `model.config.label2id` if several datasets are read, such as one for evaluation. With a list of columns, the
        index of each column in the labels; for a class in each, a dict of such dicts, one per column, in the order of
        the labels. A cell without a class in a column, or with one that has no index, then has the label -100 there.
    seed : int, default: 0
        Seed of the gene dropout.
    pad_to_multiple_of, gene_dropout, packing, max_tokens, pad_packed_to
        As in `DataCollatorForPhenotypicMLM`.

    Raises
    ------
    ValueError
        The label is one of the tokenizer's included phenotypes; `label2id` lacks a label column; a batch
        has cells without a label, numbers that are -100, or values other than 0 and 1 in one of the label columns;
        without `label2id`, the classes of a batch are not those of the first one.
    """

    def __init__(
        self,
        tokenizer: GeneTokenizer,
        label: str | Sequence[str] = "labels",
        label2id: dict[str, Any] | None = None,
        pad_to_multiple_of: int | None = None,
        seed: int = 0,
        gene_dropout: float = 0.0,
        packing: bool = False,
        max_tokens: int | None = None,
        pad_packed_to: tuple[int, int] | None = None,
    ):
        super().__init__(tokenizer, gene_dropout, pad_to_multiple_of, seed, packing, max_tokens, pad_packed_to)
        included = {label} if isinstance(label, str) else set(label)
        included &= set(tokenizer.included_phenotypes)
        if included:
            raise ValueError(
                f"The tokenizer includes {', '.join(map(repr, included))} in the tokens, so the model would read the "
                "answer: remove it from tokenizer.included_phenotypes."
            )
        self.label = label
        self.label2id = label2id
        # A checksum of the classes of the first batch, in shared memory for the workers of all loaders; 0 before it.
        self._classes = torch.zeros((), dtype=torch.int64).share_memory_()

    def __call__(self, examples: Any) -> dict[str, torch.Tensor]:
        """Return a batch with labels from a `CellBatch` or from examples.

        Returns
        -------
        dict of Tensor
            As from `DataCollatorForPhenotypicMLM`, with `labels`: int64 (n,) for classes, (n, n_columns) for several
            columns of classes, float32 (n,) for numbers, or float32 (n, n_labels).
        """
        examples = as_cell_batch(examples)
        tokens = self._tokens(examples)[0]
        self._check_tokens(examples, tokens)
        batch = self._batch(tokens)
        if isinstance(self.label, str):
            labels = self._labels(examples, self.label)
        else:
            labels = np.stack([self._labels(examples, name) for name in self._columns()], axis=1)
            labels = labels.astype(np.int64 if self._of_columns else np.float32)
        batch["labels"] = torch.from_numpy(labels)
        if self.pad_packed_to is not None:
            batch["labels"] = fill_labels(batch["labels"], batch)
        return batch

    def _check_tokens(self, examples: Any, tokens: TokenizedCells) -> None:
        """Refuse cells without tokens, and precomputed tokens that include the label."""
        empty = int((np.diff(tokens.indptr) == 0).sum())
        if empty:
            raise ValueError(f"{empty} cells of the batch have no tokens to classify; leave them out.")
        if not is_cell_batch(examples):
            for name in [self.label] if isinstance(self.label, str) else self.label:
                answers = self.tokenizer.phenotype_token_ids(name)
                if len(answers) and np.isin(tokens.input_ids, answers).any():
                    raise ValueError(
                        f"The examples have tokens of {name!r}, so the model would read the answer: tokenize them "
                        "without it (tokenizer.included_phenotypes)."
                    )

    @property
    def _of_columns(self) -> bool:
        """Whether each of several label columns holds classes."""
        return isinstance(self.label2id, Mapping) and any(isinstance(of, Mapping) for of in self.label2id.values())

    def _columns(self) -> list[str]:
        """Return the label columns in the order of `label2id`."""
        if self.label2id is None:
            return list(self.label)
        if self._of_columns and set(self.label) == set(self.label2id):
            return list(self.label2id)
        if set(self.label) != set(self.label2id) or sorted(self.label2id.values()) != list(range(len(self.label))):
            raise ValueError(
                f"label2id has {', '.join(map(repr, self.label2id))}, but the labels are the columns "
                f"{', '.join(map(repr, self.label))}: map each column to its index, 0 to {len(self.label) - 1}."
            )
        return sorted(self.label, key=self.label2id.__getitem__)

    def _labels(self, examples: Any, name: str) -> np.ndarray:
        """Return one label per cell: int64 classes, or float32 numbers."""
        names = None
        if is_cell_batch(examples):
            if name not in examples.obs:
                raise ValueError(f"The store has no obs column {name!r}; it has {', '.join(examples.obs) or 'none'}.")
            labels, names = examples.obs[name], examples.categories.get(name)
            classes = names is not None
        else:
            labels = labels_per_cell(examples, name, missing=-1 if self._of_columns else None)
            classes = np.issubdtype(labels.dtype, np.integer)
            if isinstance(examples, pa.Table):
                names = json.loads((examples.schema.metadata or {}).get(CLASS_NAMES, b"{}")).get(name)
            elif any(isinstance(example[name], ClassCode) for example in examples):
                may_differ = self.label2id is not None or not isinstance(self.label, str)
                labels, names = _united(name, [example[name] for example in examples], may_differ)
        if isinstance(self.label, str):
            label2id = self.label2id
        else:
            label2id = (self.label2id or {})[name] if self._of_columns else _zero_or_one(name, names)
        if is_cell_batch(examples) and labels.dtype == object and label2id is not None:
            # By name, for cells of stores whose classes are in other orders.
            labels, names, classes = np.array([label2id.get(of, -1) for of in labels]), list(label2id), True
        elif names is not None and label2id is not None:
            labels = np.array([*(label2id.get(of, -1) for of in names), -1])[labels]
        elif names is not None:
            self._check_classes(name, names)
        if not np.issubdtype(labels.dtype, np.number) and labels.dtype != bool:
            raise ValueError(f"{name!r} must hold categories or numbers, got {labels[0]!r}.")
        if self._of_columns and classes:
            return np.where(labels < 0, IGNORE, labels)
        unknown = labels < 0 if classes else ~np.isfinite(labels.astype(np.float64))
        if unknown.any():
            hint = "" if names is not None else " (integers are classes; numbers to predict must be floats)"
            raise ValueError(f"{unknown.sum()} cells of the batch have no known {name!r}{hint}; leave them out.")
        if not classes:
            refuse_minus_100(name, labels)
        if not isinstance(self.label, str) and classes and labels.max(initial=0) > 1:
            raise ValueError(f"{name!r} has more than two classes: with several labels per cell, each must be 0 or 1.")
        return labels.astype(np.int64 if classes else np.float32)

    def _check_classes(self, name: str, names: Sequence[str]) -> None:
        """Refuse classes that are not those of the first batch, whose numbers would mean others."""
        found = 1 + zlib.crc32("\0".join(map(str, names)).encode())
        if not self._classes:
            self._classes.fill_(found)
        if self._classes != found:
            raise ValueError(
                f"The classes of {name!r} are {', '.join(map(repr, names[:5]))}{', …' * (len(names) > 5)}; those of "
                "an earlier batch were others, so that equal numbers would mean different classes: pass "
                "label2id=model.config.label2id, or use CellTrainer."
            )


def refuse_minus_100(name: str, numbers: np.ndarray) -> None:
    """Raise a ValueError if a number to predict is -100, by which `transformers.Trainer` counts and skips labels."""
    n_cells = int((numbers.astype(np.float32) == IGNORE).sum())  # the dtype that the model gets
    if n_cells:
        raise ValueError(
            f"{name!r} is {IGNORE} for {n_cells} cells. This value means that there is no label, so these cells would "
            "be ignored: leave them out, or rescale the numbers."
        )


def _united(name: str, codes: Sequence[ClassCode], may_differ: bool) -> tuple[np.ndarray, list[str]]:
    """Return codes over one common list of names, for cells of datasets with different orders."""
    unnamed = sum(not isinstance(code, ClassCode) for code in codes)
    if unnamed:
        raise ValueError(f"{unnamed} cells of the batch have no known {name!r}; leave them out.")
    names = codes[0].names
    if all(code.names is names or code.names == names for code in codes):
        return np.array(codes, np.int64), names
    if not may_differ:
        raise ValueError(
            f"The cells of the batch come from datasets with different codes for the classes of {name!r}: pass "
            "label2id, the index of each class."
        )
    names = sorted({of for code in codes for of in code.names})
    return np.array([-1 if code.name is None else names.index(code.name) for code in codes], np.int64), names


def _zero_or_one(name: str, names: Sequence[str] | None) -> dict[str, int] | None:
    """Return the categories of one of multiple label columns as 0 and 1; None if the column holds numbers."""
    if names is None:
        return None
    if not all(of.lower() in _TRUTH for of in names):
        raise ValueError(
            f"{name!r} has the categories {', '.join(map(repr, names[:5]))}: with several labels per cell, each must "
            "be 0 or 1. Convert it, for example with (adata.obs[key] == name).astype(int)."
        )
    return {of: _TRUTH[of.lower()] for of in names}
