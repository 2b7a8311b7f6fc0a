"""Draw genes that a cell certainly does not express, to be swapped for masked ones."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ..models.gene_bert.tokenization_gene_bert import TokenizedCells


def unexpressed_genes(
    tokens: TokenizedCells,
    n_genes: int,
    offset: int,
    at: np.ndarray,
    cells: np.ndarray,
    uniforms: Callable[[np.ndarray, np.ndarray], np.ndarray],
    measured: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Draw, for each token to swap, the type of a gene that its cell does not express; distinct within a cell.

    Parameters
    ----------
    tokens : TokenizedCells
        Tokens of the binned scheme, before masking.
    n_genes, offset : int
        Number of genes, and the token type of the first.
    at, cells : int array (k,)
        Tokens to swap, and the cell of each.
    uniforms : callable
        (counters, cells) -> numbers in [0, 1).
    measured : int array, optional
        Genes that may be drawn, ascending, including the expressed ones; all by default.

    Returns
    -------
    types : int array (k,)
    given : bool array (k,)
        Which tokens got a gene: at most half of the unexpressed genes of a cell are drawn.
    """
    # Expressed genes of all cells, ascending in each; those dropped by truncation are expressed too.
    is_gene = np.flatnonzero(tokens.token_type_ids >= offset)
    first, expressed = np.searchsorted(is_gene, tokens.indptr), tokens.token_type_ids[is_gene] - offset
    dropped = tokens.dropped_type_ids - offset
    if measured is not None:  # genes are indices into `measured`
        expressed, dropped, n_genes = (*(np.searchsorted(measured, of) for of in (expressed, dropped)), len(measured))
    gaps = _gaps(expressed, first, n_genes)
    if len(tokens.dropped_cells) or (gaps[1:] < gaps[:-1]).any():  # genes are missing, out of order, or repeated
        cells_of = np.repeat(np.arange(len(first) - 1), np.diff(first))
        keys = np.concatenate([cells_of * n_genes + expressed, tokens.dropped_cells * n_genes + dropped])
        keys = np.sort(keys)  # np.unique hashes, which takes twice as long
        keys = keys[np.diff(keys, prepend=-1) > 0]
        first = np.searchsorted(keys, np.arange(len(first)) * n_genes)
        gaps = _gaps(keys % n_genes, first, n_genes)
    n_unexpressed = n_genes - np.diff(first)

    order = np.argsort(cells, kind="stable")
    place = np.empty(len(cells), np.int64)
    place[order] = np.arange(len(cells)) - np.searchsorted(cells[order], cells[order])
    given = place < n_unexpressed[cells] // 2

    rank = np.zeros(len(cells), np.int64)
    pending = np.flatnonzero(given)
    attempt = 0
    while len(pending):  # each round settles at least half of the tokens in expectation
        draw = uniforms(tokens.token_type_ids[at[pending]] + attempt * (offset + n_genes), cells[pending])
        rank[pending] = (draw * n_unexpressed[cells[pending]]).astype(np.int64)
        pending = pending[_repeats(cells, rank, given, pending)]
        attempt += 1
    genes = rank + np.searchsorted(gaps, cells * (n_genes + 1) + rank, side="right") - first[cells]
    return (genes if measured is None else measured[genes.clip(max=n_genes - 1)]) + offset, given


def _gaps(expressed: np.ndarray, first: np.ndarray, n_genes: int) -> np.ndarray:
    """Count for each expressed gene the unexpressed genes of its cell before it; cells are offset by n_genes + 1.

    The r-th unexpressed gene of a cell is r + the number of its expressed genes with at most r such genes before them.
    """
    cells = np.arange(len(first) - 1)
    gaps = np.repeat(cells * (n_genes + 1) + first[:-1], np.diff(first))
    gaps += expressed
    gaps -= np.arange(len(expressed))
    return gaps


def _repeats(cells: np.ndarray, ranks: np.ndarray, settled: np.ndarray, pending: np.ndarray) -> np.ndarray:
    """Return which pending draws repeat a settled or earlier draw of their cell."""
    mine = np.flatnonzero(settled)
    waiting = np.zeros(len(cells), bool)
    waiting[pending] = True
    # Settled draws sort before waiting ones of the same key, so the first of each key stays.
    order = mine[np.lexsort((mine, waiting[mine], ranks[mine], cells[mine]))]
    repeat = np.zeros(len(cells), bool)
    repeat[order[1:]] = (cells[order][1:] == cells[order][:-1]) & (ranks[order][1:] == ranks[order][:-1])
    return repeat[pending]
