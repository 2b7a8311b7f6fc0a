"""Neighbourhoods as `CenterMaskSampler` returns them: one as dense arrays, or many as flat ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy import sparse


class NeighborhoodMetadata(NamedTuple):
    """A masked cell, and the n observed cells around it; G genes.

    Attributes
    ----------
    observed_expression : float32 array (n, G)
    masked_expression : float32 array (1, G)
    observed_cell_type : int64 array (n,)
    masked_cell_type : int64 array (1,)
    num_cells_obs : int
        n, which may be 0.
    """

    observed_expression: np.ndarray
    masked_expression: np.ndarray
    observed_cell_type: np.ndarray
    masked_cell_type: np.ndarray
    num_cells_obs: int


@dataclass
class NeighborhoodBatch(Sequence[NeighborhoodMetadata]):
    """Neighbourhoods as flat arrays, with expression as stored: the input of a collate function in a `DataLoader`.

    As a sequence, its items are the `NeighborhoodMetadata` of each.

    Attributes
    ----------
    indptr : int64 array (B + 1,)
        The neighbours of item i are the rows `indptr[i]:indptr[i + 1]` of the N observed cells.
    expression : csr_matrix, csr_array or array (N + B, G) float32
        Rows of the observed cells, followed by those of the masked cells; sparse ones have no duplicate entries.
    observed_cell_type : int64 array (N,)
    masked_cell_type : int64 array (B,)
    cell_embeds : float32 array (N, d), optional
        Embeddings of the observed cells; single items do not include them.
    """

    indptr: np.ndarray
    expression: sparse.csr_matrix | sparse.csr_array | np.ndarray
    observed_cell_type: np.ndarray
    masked_cell_type: np.ndarray
    cell_embeds: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.masked_cell_type)

    def __getitem__(self, item: int) -> NeighborhoodMetadata:  # type: ignore[override]  # slices are not needed
        item = range(len(self))[item]
        start, stop = self.indptr[item : item + 2].tolist()
        masked = self.indptr[-1] + item
        return NeighborhoodMetadata(
            observed_expression=self._dense(start, stop),
            masked_expression=self._dense(masked, masked + 1),
            observed_cell_type=self.observed_cell_type[start:stop],
            masked_cell_type=self.masked_cell_type[item : item + 1],
            num_cells_obs=stop - start,
        )

    def _dense(self, start: int, stop: int) -> np.ndarray:
        if isinstance(self.expression, np.ndarray):
            return self.expression[start:stop].copy()
        ends = self.expression.indptr[start : stop + 1]
        own = slice(ends[0], ends[-1])
        rows = np.zeros((stop - start, self.expression.shape[1]), np.float32)
        cells, genes = np.repeat(np.arange(stop - start), np.diff(ends)), self.expression.indices[own]
        rows[cells, genes] = self.expression.data[own]
        return rows
