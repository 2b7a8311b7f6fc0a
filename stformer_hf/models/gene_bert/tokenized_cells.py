"""Tokens of cells as flat arrays, and where the tokens of a cell go."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from .cell_counts import Cells, CountRows, keep, map_genes


class TokenizedCells(NamedTuple):
    """Ragged tokens of n cells, as flat arrays: cell i has the tokens `indptr[i]:indptr[i + 1]`."""

    input_ids: np.ndarray  # int64 (T,)
    token_type_ids: np.ndarray  # int64 (T,)
    indptr: np.ndarray  # int64 (n + 1,)
    # Binned scheme: token types of the expressed genes that truncation dropped, and the cell of each, int64 (D,).
    dropped_type_ids: np.ndarray
    dropped_cells: np.ndarray
    # With `values=True`: ln(1 + count) of each gene, or its normalised value; 0 for other tokens. float32 (T,).
    expression_values: np.ndarray | None = None
    # With `whole_cell=True`: the non-zero counts of all known genes of the n cells, including those that truncation
    # dropped; -1 for a gene that is hidden from the model (see `hide`).
    cells: CountRows | None = None
    # With `whole_cell=True`: which of the tokenizer's genes the input has, for all cells or per cell, bool (1 or n,
    # n_genes); None for all.
    measured: np.ndarray | None = None

    def measured_genes(self) -> dict[str, np.ndarray]:
        """Return `measured_genes`, bool array (n, n_genes), one row per cell; an empty dict if all are measured."""
        if self.measured is None:
            return {}
        shape = len(self.indptr) - 1, self.measured.shape[1]
        return {"measured_genes": np.broadcast_to(self.measured, shape).copy()}


class CellLayout(NamedTuple):
    """Tokens around the genes of n cells: `[CLS]`, phenotypes, genes (separator, genes of the neighbourhood), `[EOS]`.

    The ids are None for tokens that cells do not have.
    """

    cls: int | None
    separator: int | None
    eos: int | None
    phenotypes: np.ndarray  # ids, int64 (n, n_included), -1 for those that a cell does not have
    phenotype_types: np.ndarray  # int64 (n_included,)

    def room(self, max_length: int) -> np.ndarray:
        """Return how many genes each cell may have, int64 array (n,)."""
        n_special = sum(token is not None for token in (self.cls, self.separator, self.eos))
        return max_length - n_special - (self.phenotypes >= 0).sum(axis=1)

    def allocate(self, n_genes: Sequence[np.ndarray]) -> tuple:
        """Allocate ids and types, int64 arrays (T,), for these numbers of genes of the cells and their neighbourhoods.

        Also returns their indptr, and the start of the genes of each cell and of its neighbourhood: int64 arrays (n,).
        """
        n_front = (self.phenotypes >= 0).sum(axis=1) + (self.cls is not None)
        n_between = int(self.separator is not None)
        lengths = sum(n_genes) + n_front + n_between + (self.eos is not None)
        indptr = np.concatenate([[0], np.cumsum(lengths)])
        starts = [indptr[:-1] + n_front]
        if len(n_genes) > 1:
            starts.append(starts[0] + n_genes[0] + n_between)
        return np.empty(indptr[-1], np.int64), np.zeros(indptr[-1], np.int64), indptr, starts

    def fill(self, ids: np.ndarray, types: np.ndarray, indptr: np.ndarray, starts: Sequence[np.ndarray]) -> None:
        """Write the tokens around the genes."""
        for token, at in ((self.cls, indptr[:-1]), (self.eos, indptr[1:] - 1), (self.separator, starts[-1] - 1)):
            if token is not None:
                ids[at] = token
                types[at] = 0
        has_phenotype = self.phenotypes >= 0
        cell, which = np.nonzero(has_phenotype)
        at = indptr[cell] + has_phenotype.cumsum(axis=1)[cell, which] - 1 + (self.cls is not None)
        ids[at] = self.phenotypes[cell, which]
        types[at] = self.phenotype_types[which]


def with_whole_cells(
    tokens: TokenizedCells, cells: Cells, column_genes: np.ndarray | None, n_genes: int
) -> TokenizedCells:
    """Add the counts of all known genes of the cells, and which of the `n_genes` genes are among the columns."""
    indptr, genes, counts = map_genes(cells.rows, column_genes)
    if len(counts) and not counts.all():
        indptr, (genes, counts) = keep(counts > 0, indptr, genes, counts)
    measured = np.zeros((1, n_genes), bool)
    if column_genes is None:
        measured[:, : len(cells.names)] = True
    else:
        measured[:, column_genes[column_genes >= 0]] = True
    return tokens._replace(
        cells=CountRows(indptr, genes.astype(np.int64), counts.astype(np.float32)),
        measured=None if measured.all() else measured,
    )


def take(tokens: TokenizedCells, cells: np.ndarray) -> TokenizedCells:
    """Return some cells, int64 array (k,), in any order, without the genes that truncation dropped."""

    def chosen(indptr: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        lengths = np.diff(indptr)[cells]
        new = np.concatenate([[0], np.cumsum(lengths)])
        return new, np.arange(new[-1]) + np.repeat(indptr[cells] - new[:-1], lengths)

    indptr, at = chosen(tokens.indptr)
    rows = tokens.cells
    if rows is not None:
        cuts, entries = chosen(rows.indptr)
        rows = CountRows(cuts, rows.columns[entries], rows.counts[entries])
    nothing = np.empty(0, np.int64)
    return TokenizedCells(
        tokens.input_ids[at],
        tokens.token_type_ids[at],
        indptr,
        nothing,
        nothing,
        None if tokens.expression_values is None else tokens.expression_values[at],
        rows,
        tokens.measured if tokens.measured is None or len(tokens.measured) == 1 else tokens.measured[cells],
    )
