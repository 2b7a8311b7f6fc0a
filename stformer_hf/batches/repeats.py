"""Rows that are drawn several times in an epoch, each time with different masks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
from torch.utils.data import Dataset, Sampler

from ..store.cell_batch import REPEAT, Cell, CellBatch


class NumberedRepeats(Sampler[list[int]]):
    """Batches whose row numbers say how often a row was drawn before: row + k * n_rows after k times in the epoch.

    They are the batches of all ranks in turn, so that all processes count the same.
    """

    def __init__(self, batches: Any, n_rows: int):
        self.batches, self.n_rows = batches, n_rows

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[int]]:
        n_times = np.zeros(self.n_rows, np.int64)
        for batch in self.batches:
            rows = np.asarray(batch, np.int64)
            yield (rows + self.n_rows * (n_times[rows] + _times_before(rows))).tolist()
            np.add.at(n_times, rows, 1)

    @property
    def sampler(self) -> NumberedRepeats:
        """Itself, as of `TokenBudgetBatchSampler`."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the batches; call it before the epoch begins."""
        self.batches.set_epoch(epoch)


class RepeatedRows(Dataset):
    """A dataset whose rows are read by the numbers of `NumberedRepeats`.

    A cell that comes again has another `cell_id`, by a multiple of 2**40, from which the collators draw other masks.
    Rows without a `cell_id` are the same every time. The length is the number of rows of an epoch, `n_drawn`.
    """

    def __init__(self, dataset: Any, n_drawn: int):
        self.dataset, self._n_drawn = dataset, n_drawn

    def __len__(self) -> int:
        return self._n_drawn

    def __getitems__(self, numbers: Sequence[int]) -> Any:
        """Read the rows of a batch."""
        repeats, rows = np.divmod(np.asarray(numbers, np.int64), len(self.dataset))
        rows = rows.tolist()
        if hasattr(self.dataset, "__getitems__"):
            examples = self.dataset.__getitems__(rows)
        else:
            examples = [self.dataset[row] for row in rows]
        return _renumbered(examples, repeats) if repeats.any() else examples


def _renumbered(examples: Any, repeats: np.ndarray) -> Any:
    """Return the rows of a batch with the `cell_id` of their repeats, int64 array (n,)."""
    if isinstance(examples, CellBatch):
        return replace(examples, cell_id=examples.cell_id + REPEAT * repeats)
    if isinstance(examples, pa.Table):
        if "cell_id" not in examples.column_names:
            return examples
        at = examples.column_names.index("cell_id")
        ids = examples.column(at).to_numpy() + REPEAT * repeats
        return examples.set_column(at, "cell_id", pa.array(ids, pa.int64()))
    if isinstance(examples, list):
        return [_one(example, k) for example, k in zip(examples, repeats.tolist(), strict=True)]
    return examples  # neighbourhoods, which are not masked at random


def _one(example: Any, k: int) -> Any:
    if isinstance(example, Cell):
        return Cell({**example, "cell_id": example["cell_id"] + REPEAT * k}, _renumbered(example.batch, np.array([k])))
    if isinstance(example, dict) and "cell_id" in example:
        return {**example, "cell_id": example["cell_id"] + REPEAT * k}
    return example


def _times_before(rows: np.ndarray) -> np.ndarray:
    """Count how often each row comes earlier in the array: int64 array (n,)."""
    order = np.argsort(rows, kind="stable")
    ranked = rows[order]
    times = np.empty(len(rows), np.int64)
    times[order] = np.arange(len(rows)) - ranked.searchsorted(ranked)
    return times
