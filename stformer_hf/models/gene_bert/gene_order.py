"""Which genes of a cell become tokens, in which order, and which of them where there is no room for all."""

import numpy as np

from .cell_counts import CountRows
from .randomness import uniforms

TRUNCATIONS = ("top", "head", "random")
_TRUNCATE = 64  # stream of `uniforms`; the collators have those below


def bin_counts(rows: CountRows, edges: np.ndarray, values: np.ndarray | None) -> np.ndarray:
    """Give each count its bin: `edges[i - 1] <= x < edges[i]` gives i.

    Parameters
    ----------
    rows : CountRows
        Over the genes.
    edges : float64 array (n_edges,) or (n_genes, n_edges)
        Ascending; of all genes, or a row a gene, padded with infinity.
    values : float64 array (nnz,), optional
        What is binned, where it is not the counts themselves.

    Returns
    -------
    int array (nnz,)
    """
    if edges.ndim == 1:
        if values is None and rows.counts.dtype in (np.uint8, np.uint16):  # few distinct values: look the bins up
            table = np.searchsorted(edges, np.arange(np.iinfo(rows.counts.dtype).max + 1), side="right")
            return table.astype(np.min_scalar_type(len(edges)))[rows.counts]
        return np.searchsorted(edges, rows.counts if values is None else values, side="right")
    values = rows.counts if values is None else values
    bins = np.zeros(len(values), np.min_scalar_type(edges.shape[1]))
    for edge in edges.T:
        bins += values >= edge[rows.columns]
    return bins


def log1p_cp10k(rows: CountRows, totals: np.ndarray) -> np.ndarray:
    """Give ln(1 + count / total * 10,000): float64 array (nnz,)."""
    return np.log1p(rows.counts / np.repeat(totals, np.diff(rows.indptr)) * 1e4)


def scores(rows: CountRows, totals: np.ndarray, medians: np.ndarray, target_sum: float) -> np.ndarray:
    """Give count / total * target_sum / median, in this order of operations: float64 array (nnz,).

    The order is Geneformer's; another one rounds otherwise, and may rank otherwise.
    """
    found = rows.counts / np.repeat(totals, np.diff(rows.indptr))
    found *= target_sum
    found /= medians[rows.columns]
    return found


def strongest_first(indptr: np.ndarray, values: np.ndarray, room: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Order the entries of each row by descending value, equal ones as they stand.

    Parameters
    ----------
    indptr : int64 array (n + 1,)
        Rows of `values`.
    values : float64 array (nnz,)
        Positive.
    room : int array (n,)
        Most entries a row may keep.

    Returns
    -------
    indptr : int64 array (n + 1,)
        Rows of what is kept.
    at : int64 array
        Positions in `values`.

    Notes
    -----
    A positive float64 read as an integer has the same order. Inverted, with its low bits replaced by the place in the
    row, it is a key that one sort of plain integers puts into descending order, ties by place; it takes a fifth of the
    time of `numpy.lexsort`. Values that differ only in the bits replaced are put right afterwards.
    """
    lengths = np.diff(indptr)
    place_bits = int(lengths.max(initial=1) - 1).bit_length()
    place_mask = np.uint64((1 << place_bits) - 1)
    places = np.arange(len(values), dtype=np.uint64)
    places -= np.repeat(indptr[:-1].astype(np.uint64), lengths)
    keys = ~values.astype(np.float64, copy=False).view(np.uint64)
    keys &= ~place_mask
    keys |= places
    cuts = indptr.tolist()
    for start, stop in zip(cuts, cuts[1:], strict=False):
        keys[start:stop].sort()
    kept = np.minimum(lengths, room)
    out = np.zeros(len(indptr), np.int64)
    np.cumsum(kept, out=out[1:])
    if (kept < lengths).any():
        taken = np.arange(out[-1]) + np.repeat(indptr[:-1] - out[:-1], kept)
    else:
        taken = slice(None)
    at = (keys & place_mask).astype(np.int64)
    at += np.repeat(indptr[:-1], lengths)
    _settle_near_ties(keys, at, values, place_mask, indptr)
    return out, at[taken]


def _settle_near_ties(
    keys: np.ndarray, at: np.ndarray, values: np.ndarray, place_mask: np.uint64, indptr: np.ndarray
) -> None:
    """Sort rows again, in full, that hold values whose difference the keys did not show."""
    if len(keys) < 2:
        return
    same = (keys[1:] ^ keys[:-1]) <= place_mask
    same[indptr[1:-1][(indptr[1:-1] > 0) & (indptr[1:-1] < len(keys))] - 1] = False  # the next row
    same = np.flatnonzero(same)
    wrong = same[values[at[same]] != values[at[same + 1]]]
    for row in np.unique(np.searchsorted(indptr, wrong, side="right") - 1):
        start, stop = indptr[row], indptr[row + 1]
        at[start:stop] = start + np.argsort(-values[start:stop], kind="stable")


def choose(
    rows: CountRows,
    room: np.ndarray,
    truncation: str,
    seed: int,
    epoch: int,
    cell_ids: np.ndarray,
) -> np.ndarray | None:
    """Choose entries of rows that are too long.

    Parameters
    ----------
    rows : CountRows
        Over the genes.
    room : int array (n,)
        Most entries a row may keep.
    truncation : {"top", "head", "random"}
        The largest counts (ties by gene order), the first genes, or a random subset.
    seed, epoch : int
        Of the random subset.
    cell_ids : int64 array (n,)
        Of the cells, for the random subset.

    Returns
    -------
    bool array (nnz,) or None
        Which stay; None where all do.
    """
    indptr = rows.indptr
    lengths = np.diff(indptr)
    if (lengths <= room).all():
        return None
    if truncation == "head":
        place = np.arange(indptr[-1]) - np.repeat(indptr[:-1], lengths)
        return place < np.repeat(room, lengths)
    if truncation == "top":
        values = rows.counts.astype(np.float64)
    else:
        cells = np.repeat(np.arange(len(lengths)), lengths)
        values = 1 - uniforms(seed, epoch, _TRUNCATE, cell_ids, rows.columns, cells)  # in (0, 1]
    _, at = strongest_first(indptr, values, room)
    chosen = np.zeros(len(values), bool)
    chosen[at] = True
    return chosen


__all__ = ["TRUNCATIONS", "bin_counts", "choose", "log1p_cp10k", "scores", "strongest_first"]
