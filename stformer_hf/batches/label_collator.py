"""Collator of labelled cells: the class of each, its labels, or a number."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import torch

from ..models.gene_bert.cell_counts import is_cell_batch
from ..models.gene_bert.configuration_gene_bert import IGNORE
from ..models.gene_bert.tokenization_gene_bert import GeneTokenizer, TokenizedCells
from ..sources.obs_columns import ClassCode
from ..store.cell_batch import as_cell_batch
from .collate import CellCollator, labels_per_cell
from .fixed_size import fill_labels
from .token_rows import CLASS_NAMES

_TRUTH = {"0": 0, "1": 1, "false": 0, "true": 1}


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
        if labels.dtype == object:  # booleans, where others of the store are missing
            labels = pd.Series(labels).infer_objects().to_numpy()
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
            f"{name!r} is {IGNORE} for {n_cells} cells. transformers ignores cells with this value: remove them, or "
            "rescale the numbers."
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
