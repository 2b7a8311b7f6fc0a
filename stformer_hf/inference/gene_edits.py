"""Edit the counts of genes in cells: delete, inhibit, activate, overexpress; and choose matched genes for a null."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import NamedTuple

import numpy as np
from scipy import sparse

from ..genes.wrong_names import closest
from ..models.gene_bert.tokenization_gene_bert import GeneTokenizer

# Quantile of the expressing cells that each kind sets a gene to; the names and quartiles are those of Geneformer's
# in-silico perturbation (Theodoris et al. 2023), which moves a gene in the order of ranks instead.
QUANTILES = {"delete": None, "inhibit": 0.25, "activate": 0.75, "overexpress": 0.99}
_MOST_BINS = 10  # of mean counts
_GENES_PER_BIN = 30  # at least, for a centre and a spread


class Perturbation(NamedTuple):
    """Genes that are edited together."""

    name: str
    columns: tuple[int, ...]  # of the counts, ascending
    matched: str = ""  # perturbations with the same value have genes of similar mean counts
    is_null: bool = False  # drawn for comparison, not asked for


class Panel:
    """Genes of the cells that a model knows, one column each.

    `gene_ids` and `symbols` (object arrays of str) name all columns, of which `merge` keeps some. The attributes of
    the same names are those of the kept columns, and so are `names`: symbols, or ids where the symbol is missing or
    repeated. `known`, an int64 array, are the kept columns of genes that the model knows. `index` has further names of
    all columns, by which genes are found last.
    """

    def __init__(self, gene_ids: np.ndarray, symbols: np.ndarray, tokenizer: GeneTokenizer, index: Sequence[str] = ()):
        genes = tokenizer.find_genes(gene_ids, symbols)
        # The first column of each gene, and every column that the model does not know: it counts in totals.
        keys = np.where(genes >= 0, genes, -1 - np.arange(len(genes)))
        _, first, self._kept_of = np.unique(keys, return_index=True, return_inverse=True)
        order = np.argsort(first)
        self._kept_of = np.argsort(order)[self._kept_of]
        kept = first[order]
        self.gene_ids, self.symbols = gene_ids[kept], symbols[kept]
        self.known = np.flatnonzero(genes[kept] >= 0)
        values, n_columns = np.unique(self.symbols.astype(str), return_counts=True)
        repeated = set(values[n_columns > 1]) | {""}
        pairs = zip(self.gene_ids, self.symbols, strict=True)
        self.names = np.array([i if str(s) in repeated else s for i, s in pairs], object)
        self._column_of_gene = {int(genes[kept][column]): int(column) for column in self.known}
        self._column_of_name = {str(self.names[column]): int(column) for column in self.known}
        known = set(self.known.tolist())
        self._column_of_index = {
            str(name): column for name, column in zip(index, self._kept_of.tolist(), strict=False) if column in known
        }
        self._tokenizer = tokenizer

    def merge(self, counts: sparse.csr_matrix) -> sparse.csr_matrix:
        """Sum the columns of each gene: int32 counts, or fractional ones as they are, (n_cells, n_kept)."""
        if counts.dtype.kind != "f":
            counts = counts.astype(np.int32)  # an edit may need more than the narrow type of the file
        n_columns, n_kept = len(self._kept_of), len(self.names)
        if n_kept < n_columns:
            ones = np.ones(n_columns, counts.dtype)
            counts = counts @ sparse.csr_matrix((ones, (np.arange(n_columns), self._kept_of)), (n_columns, n_kept))
        counts = sparse.csr_matrix(counts)
        counts.sort_indices()
        return counts

    def column(self, name: str) -> int:
        """Return the column of a gene, which the model must know and the cells measure."""
        if name in self._column_of_name:
            return self._column_of_name[name]
        gene = int(self._tokenizer.find_genes([name])[0])
        if gene in self._column_of_gene:
            return self._column_of_gene[gene]
        if name in self._column_of_index:
            return self._column_of_index[name]
        if gene >= 0:
            raise ValueError(f"The model knows the gene {name!r}, but the cells have no column for it.")
        known = [*self._column_of_name, *self._tokenizer.genes]
        raise ValueError(f"The model does not know the gene {name!r}{closest(name, known)}.")


class GeneEdits:
    """The changes that one kind of perturbation makes to the counts of cells; `kind` and `quantile` as for `perturb`.

    The counts (n_cells, n_columns) have sorted columns and no explicit zeros. `cells` are the rows to perturb; the
    others only show at which level a gene is expressed that none of these express.
    """

    def __init__(self, counts: sparse.csr_matrix, cells: np.ndarray, kind: str, quantile: float | None):
        self._all_counts, self.counts, self.kind, self.quantile = counts, counts[cells], kind, quantile
        self.by_gene = self.counts.tocsc()
        self.by_gene.sort_indices()
        self.totals = _totals(self.counts)

    @property
    def expression(self) -> np.ndarray:
        """Mean count of each gene, float64 array (n_columns,)."""
        return np.asarray(self.counts.mean(axis=0, dtype=np.float64)).ravel()

    def change(self, column: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the cells whose count of a gene changes, ascending, and their new counts: arrays (k,)."""
        part = slice(self.by_gene.indptr[column], self.by_gene.indptr[column + 1])
        expressing, counts = self.by_gene.indices[part].astype(np.int64), self.by_gene.data[part]
        shares = counts / self.totals[expressing]
        if not len(expressing) and self.kind in ("activate", "overexpress"):
            shares = self._shares_of_all_cells(column)
        if self.kind == "delete" or not len(shares):
            return expressing, np.zeros(len(expressing), counts.dtype)
        assert self.quantile is not None  # of all kinds but "delete"
        targets = np.quantile(shares, self.quantile) * self.totals
        if self.counts.dtype.kind != "f":
            targets = np.maximum(np.rint(targets), 1)
        old = np.zeros(len(self.totals))
        old[expressing] = counts
        new = np.minimum(old, targets) if self.kind == "inhibit" else np.maximum(old, targets)
        new[self.totals == 0] = 0  # an empty cell has no depth to express a gene at
        new = new.astype(self.counts.dtype)
        cells = np.flatnonzero(new != old)
        return cells, new[cells]

    def _shares_of_all_cells(self, column: int) -> np.ndarray:
        """Return the share of a gene in the counts of all cells that express it: float64 array (k,)."""
        by_gene, totals = self._all_by_gene
        part = slice(by_gene.indptr[column], by_gene.indptr[column + 1])
        return by_gene.data[part] / totals[by_gene.indices[part]]

    @cached_property
    def _all_by_gene(self) -> tuple[sparse.csc_matrix, np.ndarray]:
        return self._all_counts.tocsc(), _totals(self._all_counts)

    def changes(self, perturbation: Perturbation) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Return the cells that a perturbation changes, and its edits.

        Returns
        -------
        cells : int64 array (m,)
            Ascending.
        rows, columns, values : arrays (k,)
            Count `columns` of cell `cells[rows]` becomes `values`.
        """
        found = [self.change(column) for column in perturbation.columns]
        cells = np.unique(np.concatenate([of for of, _ in found]))
        rows = np.concatenate([np.searchsorted(cells, of) for of, _ in found])
        columns = np.repeat(perturbation.columns, [len(of) for of, _ in found])
        return cells, rows, columns, np.concatenate([new for _, new in found])

    def edited(
        self, cells: np.ndarray, rows: np.ndarray, columns: np.ndarray, values: np.ndarray
    ) -> sparse.csr_matrix:
        """Return the counts of cells after edits, csr_matrix (m, n_columns); a cell may come several times.

        Parameters
        ----------
        cells : int64 array (m,)
        rows, columns, values : arrays (k,)
            Count `columns` of row `rows` of the result becomes `values`.
        """
        found = self.counts[cells]
        n_columns = found.shape[1]
        keys = np.repeat(np.arange(len(cells)), np.diff(found.indptr)) * n_columns + found.indices
        wanted = rows * n_columns + columns
        order = np.argsort(wanted)
        wanted, values = wanted[order], values[order]
        at = np.searchsorted(keys, wanted)
        there = keys.take(np.minimum(at, len(keys) - 1)) == wanted if len(keys) else np.zeros(len(wanted), bool)
        data = found.data.copy()
        data[at[there]] = values[there]
        keys = np.insert(keys, at[~there], wanted[~there])
        data = np.insert(data, at[~there], values[~there])
        keys, data = keys[data > 0], data[data > 0]
        indptr = np.concatenate([[0], np.cumsum(np.bincount(keys // n_columns, minlength=len(cells)))])
        return sparse.csr_matrix((data, keys % n_columns, indptr), found.shape)


def _totals(counts: sparse.csr_matrix) -> np.ndarray:
    """Return the total of each cell, float64 array (n_cells,)."""
    return np.asarray(counts.sum(axis=1, dtype=np.float64)).ravel()


def choose_perturbations(
    genes: Sequence[str | Sequence[str]] | Mapping[str, Sequence[str]] | None,
    panel: Panel,
    expression: np.ndarray,
    n_null: int,
    seed: int,
) -> list[Perturbation]:
    """Find the genes of the perturbations, and draw genes of similar expression for the null.

    Parameters
    ----------
    genes, n_null, seed
        See `perturb`.
    expression : float64 array (n_columns,)
        Mean count of each gene. Unlike the share of cells that express a gene, it also separates genes that all
        cells express.

    Returns
    -------
    list of Perturbation
        Those asked for, in their order, then those of the null.
    """
    expressed = panel.known[expression[panel.known] > 0]
    named: list[tuple[str, tuple[int, ...]]]
    if genes is None:
        named = [(str(panel.names[column]), (int(column),)) for column in expressed]
    else:
        named = [(name, _columns_of(name, of, panel)) for name, of in _named(genes)]
    if not named:
        raise ValueError("There are no genes to perturb: pass genes=[…].")
    names = [name for name, _ in named]
    repeated = {name for name in names if names.count(name) > 1} if len(set(names)) < len(names) else set()
    if repeated:
        raise ValueError(f"The perturbation {min(repeated)!r} is repeated.")
    name_of: dict[tuple[int, ...], str] = {}
    for name, columns in named:
        if name_of.setdefault(columns, name) != name:
            raise ValueError(f"The perturbations {name_of[columns]!r} and {name!r} edit the same genes: keep one.")

    n_bins = min(_MOST_BINS, max(1, len(expressed) // _GENES_PER_BIN))
    edges = np.unique(np.quantile(expression[expressed], np.linspace(0, 1, n_bins + 1)[1:-1]))
    bins = np.searchsorted(edges, expression, side="left")
    asked = {column for _, columns in named for column in columns}
    of_bin: dict[int, list[int]] = {}
    for column in sorted(expressed.tolist(), key=lambda column: str(panel.gene_ids[column])):
        of_bin.setdefault(int(bins[column]), [])
        if column not in asked:
            of_bin[int(bins[column])].append(column)
    found, null, done = [], [], set()
    for name, columns in named:
        ids = "+".join(sorted(str(panel.gene_ids[column]) for column in columns))
        matched = f"bin {bins[columns[0]]}" if len(columns) == 1 else f"like {ids}"
        found.append(Perturbation(name, columns, matched))
        if matched in done:
            continue
        done.add(matched)
        rng = np.random.default_rng([seed, zlib.crc32(matched.encode())])
        candidates = [of_bin[int(bins[column])] for column in sorted(columns, key=lambda c: str(panel.gene_ids[c]))]
        for drawn in _draw(candidates, n_null, rng):
            null.append(Perturbation("+".join(str(panel.names[c]) for c in drawn), drawn, matched, True))
    null.sort(key=lambda each: (each.matched, each.name))
    return found + null


def _named(genes: Sequence | Mapping) -> list[tuple[str, list[str]]]:
    """Return the name and the genes of each perturbation."""
    if isinstance(genes, str):
        raise ValueError(f"genes must be a list, got the string {genes!r}: pass [{genes!r}].")
    if isinstance(genes, Mapping):
        return [(str(name), [of] if isinstance(of, str) else [str(gene) for gene in of]) for name, of in genes.items()]
    groups = [[each] if isinstance(each, str) else [str(gene) for gene in each] for each in genes]
    return [("+".join(group), group) for group in groups]


def _columns_of(name: str, genes: list[str], panel: Panel) -> tuple[int, ...]:
    columns = sorted({panel.column(gene) for gene in genes})
    if not columns:
        raise ValueError(f"The group {name!r} has no genes.")
    return tuple(columns)


def _draw(candidates: list[list[int]], n: int, rng: np.random.Generator) -> list[tuple[int, ...]]:
    """Draw up to n different groups, one gene from each list of candidates."""
    if len(candidates) == 1:
        drawn = rng.permutation(np.array(candidates[0], np.int64))[:n]
        return [(int(column),) for column in drawn]
    if not all(candidates):
        return []
    draws = [tuple(sorted(int(rng.choice(of)) for of in candidates)) for _ in range(2 * n)]
    different = dict.fromkeys(draw for draw in draws if len(set(draw)) == len(draw))
    return list(different)[:n]
