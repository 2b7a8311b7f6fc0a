"""Compact rows: about 1.2 to 1.7 bytes per expressed gene instead of 3 or 4, decoded with a few passes of numpy.

A cell is a list of bytes (`cell_codes`), in the order of its genes: byte = 4 * gap + kind, where gap is the number of
genes between this gene and the one before (0 to 62), and kind is the count minus 1, or 3 if the count is 4 or more.
Those counts follow, in order, in a list of their own (`large_counts`). A longer gap begins with bytes of 252, each of
which passes over 63 genes. `n_expressed` is the number of expressed genes.
"""

from __future__ import annotations

import numpy as np
import torch

CODES, LARGE, LENGTH = "cell_codes", "large_counts", "n_expressed"  # columns of the rows
_GAP = 63  # genes that a skip passes over; shorter gaps fit beside a kind
_SKIP = np.uint8(4 * _GAP)
_LARGE = 3  # kind of the counts that are listed


def encode(
    indptr: np.ndarray, genes: np.ndarray, counts: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Encode cells: their bounds (n + 1,), genes (nnz,), unsigned and ascending in a cell, and whole counts above 0.

    Returns
    -------
    code_bounds : int64 array (n + 1,)
    codes : uint8 array (n_codes,)
    large_bounds : int64 array (n + 1,)
    large : array (n_large,)
        Counts of at least 4, in their type.
    """
    indptr = indptr.astype(np.int64)
    gaps = np.empty_like(genes)
    np.subtract(genes[1:], genes[:-1], out=gaps[1:])
    gaps -= np.ones(1, genes.dtype)
    firsts = indptr[:-1][np.diff(indptr) > 0]
    gaps[firsts] = genes[firsts]
    far = np.flatnonzero(gaps >= _GAP)
    skips, gaps[far] = np.divmod(gaps[far], genes.dtype.type(_GAP))
    kinds = np.minimum(counts, _LARGE + 1).astype(np.uint8) - np.uint8(1)
    codes = np.insert((gaps.astype(np.uint8) << 2) | kinds, np.repeat(far, skips), _SKIP)
    skipped = np.concatenate([[0], np.cumsum(skips, dtype=np.int64)])
    at = np.flatnonzero(kinds == _LARGE)
    return indptr + skipped[far.searchsorted(indptr)], codes, at.searchsorted(indptr), counts[at]


def decode(
    bounds: np.ndarray, codes: np.ndarray, large: np.ndarray, gene_type: str, count_type: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Decode cells: the bounds of their codes, int64 (n + 1,), the codes, uint8, and the counts of at least 4.

    Returns
    -------
    indptr : int64 array (n + 1,)
        Bounds of the cells.
    genes, counts : arrays (nnz,), of the given types
    """
    is_skip = codes == _SKIP
    steps = (codes >> 2) + np.uint8(1) - is_skip.view(np.uint8)
    # torch sums twice as fast as numpy. Sums wrap around, and the difference to the sum before a cell is right again.
    wide = gene_type != "uint16"
    sums = torch.cumsum(torch.from_numpy(steps), 0, dtype=torch.int32 if wide else torch.int16).numpy()
    genes = sums.view(gene_type)
    before = np.zeros(len(bounds) - 1, gene_type)
    begun = bounds[:-1] > 0
    before[begun] = genes[bounds[:-1][begun] - 1]
    kinds = codes & np.uint8(3)
    counts = (kinds + np.uint8(1)).astype(count_type)
    counts[np.flatnonzero(kinds == _LARGE)] = large
    skips = np.flatnonzero(is_skip)
    if len(skips):
        kept = ~is_skip
        if 8 * len(skips) > len(codes):  # numpy selects by a mask fast only where it rarely changes
            kept = np.flatnonzero(kept)
        genes, counts = genes[kept], counts[kept]
    indptr = bounds - skips.searchsorted(bounds)
    genes -= np.repeat(before, np.diff(indptr))
    genes -= np.ones(1, gene_type)
    return indptr, genes, counts
