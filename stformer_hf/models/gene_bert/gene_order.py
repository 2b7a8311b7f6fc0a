"""Select and order the genes of a cell that become tokens, and truncate long cells."""

import itertools
from typing import NamedTuple

import numpy as np

from .cell_counts import CountRows, checksums
from .randomness import uniforms

TRUNCATIONS = ("top", "head", "random")
_TRUNCATE = 64  # stream of `uniforms`; the collators have those below
_ENTRIES_AT_A_TIME = 1 << 13


def write_ranks(
    ids: np.ndarray,
    starts: np.ndarray,
    room: np.ndarray,
    rows: CountRows,
    totals: np.ndarray | None,
    medians: np.ndarray,
    target_sum: float,
    tokens: np.ndarray,
) -> None:
    """Write the tokens of the genes of cells by descending count / total * target_sum / median, ties by token.

    Parameters
    ----------
    ids : int64 array (T,)
        Output array.
    starts, room : int64 array (n,)
        Start of the genes of each cell in `ids`, and their maximum number.
    rows : CountRows
        Positive counts over the genes.
    totals : float64 array (n,) or None
        Total of all counts of each cell, if some of them are not in `rows`.
    medians : float64 array (n_genes,)
        Positive medians.
    target_sum : float
    tokens : int64 array (n_genes,)
        Token of each gene.

    Notes
    -----
    The order of the operations, in float64, is Geneformer's: another one would round, and possibly rank, differently.

    Positive float64 numbers keep their order when their bits are read as integers. Inverted, and with the low bits
    replaced by the token, they are keys that one integer sort puts into descending order, ties by token. Scores that
    differ only in the replaced bits are sorted afterwards. Few cells are processed at a time, so that their arrays
    stay in the processor's cache.
    """
    indptr, genes, counts = rows
    token_bits = np.uint64((1 << int(tokens.max(initial=1)).bit_length()) - 1)
    in_order = len(tokens) and tokens[-1] - tokens[0] + 1 == len(tokens) and (tokens[1:] > tokens[:-1]).all()
    first, n_cells = 0, len(indptr) - 1
    while first < n_cells:
        last = max(first + 1, int(np.searchsorted(indptr, indptr[first] + _ENTRIES_AT_A_TIME, side="right")) - 1)
        begin, end = indptr[first], indptr[last]
        some, of = genes[begin:end].astype(np.int64), counts[begin:end]
        cells = list(itertools.pairwise((indptr[first : last + 1] - begin).tolist()))
        scores = of.astype(np.float64)
        for cell, (start, stop) in enumerate(cells, first):
            scores[start:stop] /= scores[start:stop].sum() if totals is None else totals[cell]
        scores *= target_sum
        scores /= medians.take(some)
        keys = scores.view(np.uint64)
        np.invert(keys, out=keys)
        keys &= ~token_bits
        some_tokens = some + tokens[0] if in_order else tokens.take(some)
        keys |= some_tokens.view(np.uint64)
        for start, stop in cells:
            keys[start:stop].sort()
        if len(keys) > 1 and (gaps := keys[1:] - keys[:-1]).min() <= token_bits:
            near = np.flatnonzero(gaps <= token_bits)
            for cell in np.unique(np.searchsorted([stop for _, stop in cells], near, side="right")):
                part = slice(*cells[cell])
                exact = of[part].astype(np.float64)
                exact /= exact.sum() if totals is None else totals[first + cell]
                exact *= target_sum
                exact /= medians[some[part]]
                keys[part] = some_tokens[part][np.lexsort((some_tokens[part], -exact))]
        keys &= token_bits
        found = keys.view(np.int64)
        for cell, (start, stop) in enumerate(cells, first):
            n = min(stop - start, room[cell])
            ids[starts[cell] : starts[cell] + n] = found[start : start + n]
        first = last


def strongest(values: np.ndarray, room: int) -> np.ndarray:
    """Choose the `room` largest values, the first among equal ones; return a bool array (n,)."""
    threshold = np.sort(values)[len(values) - room]  # faster than numpy.partition, for narrow types
    chosen = values > threshold
    missing = room - np.count_nonzero(chosen)
    chosen[np.flatnonzero(values == threshold)[:missing]] = True
    return chosen


class Truncation(NamedTuple):
    """How cells are cut that have more genes than there is room for.

    The largest counts are kept (`how="top"`, ties in the order of the genes), the first genes ("head"), or a random
    subset, a function of (seed, epoch, cell) ("random").
    """

    max_length: int  # in tokens
    how: str
    seed: int
    epoch: int

    def cell_ids(self, ids: np.ndarray | None, rows: CountRows) -> np.ndarray:
        """Return the ids of cells, int64 array (n,), from which random subsets are drawn: checksums without `ids`."""
        if ids is None:
            return checksums(rows) if self.how == "random" else np.zeros(len(rows.indptr) - 1, np.int64)
        return ids

    def choose(self, room: int, counts: np.ndarray, genes: np.ndarray, cell_id: int) -> np.ndarray:
        """Choose `room` of the genes of a cell that has more, the strongest or a random subset: bool array (n,)."""
        if self.how == "top":
            return strongest(counts, room)
        numbers = uniforms(self.seed, self.epoch, _TRUNCATE, np.array([cell_id]), genes, np.zeros(len(genes), int))
        return strongest(numbers, room)
