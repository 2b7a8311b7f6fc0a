"""Rows of a tokenized dataset, read as Arrow tables: no list of a cell's tokens becomes a Python list."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
from datasets import ClassLabel
from datasets import Dataset as HuggingFaceDataset
from torch.utils.data import Dataset

CLASS_NAMES = b"class_names"


class TokenRows(Dataset):
    """A tokenized dataset whose batches reach the collators of this package as Arrow tables.

    Parameters
    ----------
    dataset : datasets.Dataset
        With a column `input_ids`.
    """

    def __init__(self, dataset: HuggingFaceDataset):
        self.dataset = dataset
        self._tables = dataset.with_format("arrow")
        classes = {name: of.names for name, of in dataset.features.items() if isinstance(of, ClassLabel)}
        self._metadata = {CLASS_NAMES: json.dumps(classes)}

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, row: int) -> dict[str, Any]:
        return self.dataset[row]

    def __getitems__(self, rows: Sequence[int]) -> pa.Table:
        """Read rows, in the order asked for; the schema's metadata name the classes of `ClassLabel` columns."""
        return self._tables[rows].replace_schema_metadata(self._metadata)


__all__ = ["CLASS_NAMES", "TokenRows"]
