"""A checksum of the cells of a training set."""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np
from datasets import Dataset as HuggingFaceDataset
from torch.utils.data import ConcatDataset, Subset

from ..batches.iterable_ann_dataset import IterableAnnDataset
from ..evaluation.gene_baselines import spread_rows
from ..store.cell_store import CellStore

MOST = 64  # cells, or files, whose values are read


def describe_cells(dataset: Any) -> str | None:
    """Describe cells by their number and a checksum, which other cells, or another order of them, do not share.

    The description depends on the cells, not on their location: moving or copying a store does not change it. For a
    store, the checksum is over all cell ids and lengths, the genes, and the counts of up to 64 cells; for a stream,
    over the numbers of cells and the first cells of up to 64 files; for a `datasets.Dataset`, over the columns
    `cell_id` and `length`, and up to 64 rows. A dataset with a method `describe_cells`, such as `CenterMaskSampler`,
    describes itself. Other datasets have a number of rows; None if even that is unknown.
    """
    if isinstance(dataset, CellStore):
        rows = dataset.rows(spread_rows(len(dataset), MOST))
        values = [dataset.gene_ids.tolist(), dataset.cell_ids, dataset.lengths, rows.indices, rows.data]
        return f"{len(dataset)} cells (checksum {checksum(*values)})"
    if isinstance(dataset, IterableAnnDataset):
        n_cells = dataset.n_cells_of_files
        heads = [dataset.first_cells(int(file), 8) for file in spread_rows(len(n_cells), MOST)]
        values = [n_cells, dataset.gene_ids.tolist(), *(part for head in heads for part in (head.indices, head.data))]
        return f"{n_cells.sum()} cells of {len(n_cells)} files (checksum {checksum(*values)})"
    if isinstance(dataset, HuggingFaceDataset):
        plain = dataset.with_format(None)
        columns = [plain[name][:] for name in ("cell_id", "length") if name in plain.column_names]
        rows = [plain[int(row)] for row in spread_rows(len(plain), MOST)]
        return f"{len(plain)} cells (checksum {checksum(columns, rows)})"
    if hasattr(dataset, "describe_cells"):
        return dataset.describe_cells()
    if isinstance(dataset, Subset):
        rows = f"{len(dataset)} rows (checksum {checksum(np.asarray(dataset.indices))})"
        return f"{rows} of {describe_cells(dataset.dataset)}"
    if isinstance(dataset, ConcatDataset):
        return "; ".join(map(str, map(describe_cells, dataset.datasets)))
    return f"{len(dataset)} rows" if hasattr(dataset, "__len__") else None


def checksum(*values: Any) -> str:
    """Return the CRC-32 of arrays and other values, as hexadecimal digits."""
    found = 0
    for value in values:
        if isinstance(value, np.ndarray):
            value = np.ascontiguousarray(value, np.float64 if value.dtype.kind == "f" else np.int64).tobytes()
        else:
            value = repr(value).encode()
        found = zlib.crc32(value, found)
    return f"{found:08x}"
