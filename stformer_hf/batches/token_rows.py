"""Read rows of a tokenized dataset as Arrow tables, without converting tokens to Python lists."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
from datasets import ClassLabel
from datasets import Dataset as HuggingFaceDataset
from torch.utils.data import Dataset

from ..sources.obs_columns import ClassCode

CLASS_NAMES = b"class_names"


class TokenRows(Dataset):
    """A tokenized dataset, with a column `input_ids`, whose batches reach the collators as Arrow tables."""

    def __init__(self, dataset: HuggingFaceDataset):
        self.dataset = dataset
        self._tables = dataset.with_format("arrow")
        self.categories = class_names(dataset)
        self._metadata = {CLASS_NAMES: json.dumps(self.categories)}

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, row: int) -> dict[str, Any]:
        """Return a row; class codes carry their names."""
        example = self.dataset[row]
        known = {name: example[name] for name in self.categories if example[name] is not None}
        return {**example, **{name: ClassCode(code, self.categories[name]) for name, code in known.items()}}

    def __getitems__(self, rows: Sequence[int]) -> pa.Table:
        """Return rows in the requested order; the schema's metadata hold the names of `ClassLabel` columns."""
        return self._tables[rows].replace_schema_metadata(self._metadata)


def class_names(dataset: Any) -> dict[str, list[str]]:
    """Return the categories of the class columns of a store, a stream or a tokenized dataset."""
    features = getattr(dataset, "features", None) or {}
    found = {name: of.names for name, of in features.items() if isinstance(of, ClassLabel)}
    return found or dict(getattr(dataset, "categories", None) or {})
