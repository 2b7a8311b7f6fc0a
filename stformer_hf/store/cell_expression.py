"""CellExpression: reads rows of expression, in any order, from an AnnData (in memory or backed) or a CellStore."""

from __future__ import annotations

from typing import Any

import numpy as np
from anndata import AnnData
from scipy import sparse

from ..sources.anndata_files import anndata_layers
from ..sources.matrices import Matrix
from .cell_store import CellStore


class CellExpression:
    """Reads rows of expression, sparse if they are stored sparse, and checks the values.

    X of an AnnData is read; each process opens its file for itself. With `normalize="log1p"` the values are
    ln(1 + count), with None they are unchanged. `names` are those of the rows.
    """

    def __init__(self, adata: AnnData | CellStore, normalize: str | None):
        if normalize not in (None, "log1p"):
            raise ValueError(f"normalize={normalize!r}: must be 'log1p' or None.")
        self._normalize = normalize
        if isinstance(adata, CellStore):
            self._matrix, self.names, self.n_genes = adata, adata.obs.index.to_numpy(), len(adata.genes)
        elif isinstance(adata, AnnData):
            self._matrix, self.names, self.n_genes = _x_of(adata), adata.obs_names.to_numpy(), adata.n_vars
        else:
            raise TypeError(f"Expression is read from an AnnData or a CellStore, got {type(adata).__name__}.")

    def read(self, rows: np.ndarray) -> sparse.csr_matrix | sparse.csr_array | np.ndarray:
        """Return a copy of rows, int64 array (n,) in any order, as float32 (n, n_genes).

        Sparse matrices have no duplicate entries. Values must be finite, and counts if they are to be normalized.
        """
        if isinstance(self._matrix, CellStore):
            block = self._matrix.rows(rows)
        elif isinstance(self._matrix, Matrix):
            block = self._matrix.take(rows)
            block.sum_duplicates()
        else:
            block = self._matrix[rows]
        if not sparse.issparse(block):
            return self._checked(block)
        block.data = self._checked(block.data)
        return block

    def _checked(self, values: np.ndarray) -> np.ndarray:
        with np.errstate(all="ignore"):
            may_be_infinite = values.dtype.kind == "f" and not np.isfinite(values.sum())  # or their sum overflows
        if may_be_infinite and not np.isfinite(values).all():
            raise ValueError(f"X holds {(~np.isfinite(values)).sum()} NaN or infinite values in the rows read.")
        if self._normalize is None:
            return values.astype(np.float32, copy=False)
        if values.dtype.kind not in "ub":
            wrong = (values < 0) | (values != np.rint(values))
            if wrong.any():
                raise ValueError(
                    f"normalize='log1p' takes counts, but X holds {values[wrong][0]:g}: is it normalized already? "
                    "Pass normalize=None, or put raw counts into X."
                )
        return np.log1p(values, dtype=np.float32)


def _x_of(adata: AnnData) -> Any:
    if adata.isbacked:
        layers = {layer.name: layer.matrix for layer in anndata_layers(adata)}
        if "X" in layers:
            layers["X"].prepare(None)
            if layers["X"].seekable:  # the other matrices would lose what was prepared
                layers["X"].close()
            return layers["X"]
    elif adata.X is not None:
        if not sparse.issparse(adata.X):
            return np.asarray(adata.X)
        rows = sparse.csr_matrix(adata.X)
        if not rows.has_canonical_format:
            rows = rows.copy()
            rows.sum_duplicates()
        return rows
    there = ", ".join(layer.name for layer in anndata_layers(adata)) or "no matrix"
    raise ValueError(f"There is no X (found: {there}). Put the expression into X.")
