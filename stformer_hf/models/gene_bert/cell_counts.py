"""Counts of cells, whatever holds them, as flat CSR arrays; and which gene of a vocabulary each column is."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from transformers.utils import logging

logger = logging.get_logger(__name__)

# Columns of `AnnData.var` that may name the genes when the index does not.
GENE_COLUMNS = (
    "gene_id",
    "gene_ids",
    "ensembl_id",
    "feature_id",
    "gene_symbol",
    "gene_symbols",
    "gene_name",
    "feature_name",
    "symbol",
)
NEIGHBORS = "spatial_connectivities"  # where squidpy keeps the graph of the cells
_ENSEMBL = re.compile(r"^ENS([A-Z]*)G\d{11}(\.\d+)?$")
_VERSION = re.compile(r"^(ENS[A-Z]*G\d+)\.\d+$")
_SPECIES = {"": "human", "MUS": "mouse", "RNO": "rat", "DAR": "zebrafish", "MMU": "macaque", "SSC": "pig"}


class CountRows(NamedTuple):
    """Counts of n cells.

    Attributes
    ----------
    indptr : int64 array (n + 1,)
        Cell i has the entries `indptr[i]:indptr[i + 1]`.
    columns : int array (nnz,)
        Columns, ascending in each cell, each once.
    counts : array (nnz,)
        Counts; zeros are allowed.
    """

    indptr: np.ndarray
    columns: np.ndarray
    counts: np.ndarray


class Cells(NamedTuple):
    """Cells to tokenize.

    Attributes
    ----------
    rows : CountRows
        Their counts.
    names : tuple of sequences (n_columns,)
        Kinds of names that the columns go by, such as ids and symbols.
    obs : DataFrame, CellBatch, dict or None
        Where phenotypes are looked up.
    ids : int64 array (n,)
        By which random choices are drawn.
    neighborhood : CountRows or None
        For each cell, the sum of its neighbours' counts, over the same columns.
    """

    rows: CountRows
    names: tuple
    obs: Any
    ids: np.ndarray
    neighborhood: CountRows | None


def is_cell_batch(cells) -> bool:
    """Whether `cells` is what `CellStore.__getitems__` gives: CSR rows with the gene ids of their columns."""
    return hasattr(cells, "indptr") and hasattr(cells, "gene_ids")


def read_cells(
    cells,
    genes: Sequence[str] | None,
    obs,
    layer: str | None,
    neighborhood,
    own_genes: Sequence[str],
    with_neighborhood: bool,
) -> Cells:
    """Read the counts of an AnnData, a matrix or a CellBatch; see `GeneTokenizer.__call__`."""
    brings_its_own = is_cell_batch(cells) or hasattr(cells, "var_names")
    if brings_its_own and not (genes is None and obs is None and neighborhood is None):
        raise ValueError(f"genes=, obs= and neighborhood= go with a matrix; a {type(cells).__name__} brings its own.")
    if is_cell_batch(cells):
        around = getattr(cells, "neighborhood", None)
        if with_neighborhood and around is None:
            raise ValueError(
                "The tokenizer adds each cell's neighbourhood, and these cells come without: take them from "
                "store.with_neighborhoods()."
            )
        return Cells(
            CountRows(cells.indptr, cells.genes, cells.counts),
            (cells.gene_ids, cells.symbols),
            cells,
            cells.cell_id,
            CountRows(*around) if with_neighborhood else None,
        )
    around = None
    if hasattr(cells, "obs") and hasattr(cells, "var_names"):
        matrix = cells.X if layer is None else cells.layers[layer]
        if matrix is None:
            raise ValueError("The AnnData has no X; name the layer that holds the counts, as in layer='counts'.")
        rows = csr_rows(matrix)
        names = (cells.var_names, *(cells.var[name] for name in GENE_COLUMNS if name in cells.var))
        obs = cells.obs
        check_counts(rows.counts, "X" if layer is None else f"layer {layer!r}", cells.layers)
        if with_neighborhood:
            if NEIGHBORS not in cells.obsp:
                raise ValueError(
                    f"The tokenizer adds each cell's neighbourhood, and the AnnData has no obsp[{NEIGHBORS!r}]: make "
                    "it with stformer_hf.spatial_neighbors(adata), or with squidpy.gr.spatial_neighbors."
                )
            around = csr_rows(sum_of_neighbors(cells.obsp[NEIGHBORS], matrix))
    elif hasattr(cells, "shape") and len(cells.shape) == 2:
        if with_neighborhood and neighborhood is None:
            raise ValueError(
                "The tokenizer adds each cell's neighbourhood: pass the sums of its neighbours' counts, neighborhood=…"
            )
        if with_neighborhood:
            around = csr_rows(neighborhood)
            check_counts(around.counts, "neighborhood", {})
        rows = csr_rows(cells)
        if genes is None:
            genes = getattr(cells, "columns", own_genes)  # a DataFrame names its genes
        names = (genes,)
        if len(genes) != cells.shape[1]:
            raise ValueError(
                f"The matrix has {cells.shape[1]} columns, and there are {len(genes)} gene ids for them."
                " Pass genes=[…], the gene ids of its columns."
            )
        check_counts(rows.counts, "the matrix", {})
    else:
        raise TypeError(
            f"GeneTokenizer takes an AnnData, a matrix of counts or a CellBatch, not {type(cells).__name__}. "
            "For token strings use convert_tokens_to_ids."
        )
    return Cells(rows, names, obs, np.arange(len(rows.indptr) - 1), around)


def sum_of_neighbors(graph, matrix):
    """Sum the counts of each cell's neighbours.

    Parameters
    ----------
    graph : sparse matrix (n, n)
        What is stored is a neighbour, whatever its weight; a cell is not its own.
    matrix : sparse or dense matrix (n, n_columns)
        Counts.

    Returns
    -------
    sparse or dense matrix (n, n_columns)
        64 bits.
    """
    if not hasattr(graph, "tocoo"):
        raise ValueError(f"The graph of the cells is a {type(graph).__name__}; a sparse matrix is needed.")
    graph = graph.tocoo()
    others = graph.row != graph.col
    graph = type(graph)((np.ones(others.sum()), (graph.row[others], graph.col[others])), shape=graph.shape).tocsr()
    graph.sum_duplicates()
    graph.data = np.ones(len(graph.data), np.int64)
    if hasattr(matrix, "to_memory"):
        matrix = matrix.to_memory()
    return graph @ _widen(matrix)


def csr_rows(matrix) -> CountRows:
    """Rows of a sparse, dense or backed matrix; columns ascending, each once."""
    if hasattr(matrix, "to_memory"):
        matrix = matrix.to_memory()
    if hasattr(matrix, "tocsr"):
        if matrix.format not in ("csr", "csc"):
            matrix = _widen(matrix)  # tocsr sums duplicates
        csr = matrix.tocsr()
        if not csr.has_canonical_format:
            csr = _widen(csr)
            csr.sum_duplicates()
        return CountRows(csr.indptr.astype(np.int64), csr.indices, csr.data)
    dense = np.asarray(matrix)
    rows, columns = np.nonzero(dense)
    indptr = np.zeros(dense.shape[0] + 1, np.int64)
    np.cumsum(np.bincount(rows, minlength=dense.shape[0]), out=indptr[1:])
    return CountRows(indptr, columns, dense[rows, columns])


def _widen(matrix):
    """Copy a matrix to values of 64 bits: sums of narrow ones would wrap."""
    return matrix.astype(np.float64 if matrix.dtype.kind == "f" else np.int64)


def row_sums(rows: CountRows) -> np.ndarray:
    """Total of each cell: float64 array (n,)."""
    wide = np.float64 if rows.counts.dtype.kind == "f" else np.int64
    cuts = rows.indptr.tolist()
    sums = [rows.counts[start:stop].sum(dtype=wide) for start, stop in zip(cuts, cuts[1:], strict=False)]
    return np.array(sums, np.float64)


def keep(mask: np.ndarray, indptr: np.ndarray, *arrays: np.ndarray) -> tuple[np.ndarray, tuple[np.ndarray, ...]]:
    """Drop the entries of CSR rows where the mask is False."""
    kept = np.zeros(len(mask) + 1, np.int64)
    np.cumsum(mask, out=kept[1:])
    return kept[indptr], tuple(array[mask] for array in arrays)


def hide(rows: CountRows, cells: np.ndarray, genes: np.ndarray, n_genes: int) -> CountRows:
    """Hide genes of cells from the model: their counts become -1, and those not expressed get an entry of -1.

    Parameters
    ----------
    rows : CountRows
        Over genes, ascending in each cell; it stays as it is.
    cells, genes : int64 array (k,)
        What to hide, in any order.
    n_genes : int
        Number of all genes.

    Returns
    -------
    CountRows
    """
    n_cells = len(rows.indptr) - 1
    keys = np.repeat(np.arange(n_cells), np.diff(rows.indptr)) * n_genes + rows.columns
    wanted = np.unique(cells * n_genes + genes)
    at = np.searchsorted(keys, wanted)
    there = keys.take(np.minimum(at, len(keys) - 1)) == wanted if len(keys) else np.zeros(len(wanted), bool)
    counts = rows.counts.copy()
    counts[at[there]] = -1
    new = wanted[~there]
    lengths = np.diff(rows.indptr) + np.bincount(new // n_genes, minlength=n_cells)
    return CountRows(
        np.concatenate([[0], np.cumsum(lengths)]),
        np.insert(rows.columns, at[~there], new % n_genes),
        np.insert(counts, at[~there], -1),
    )


def pad_ragged(flat: np.ndarray, indptr: np.ndarray, length: int, value: int, side: str = "right") -> np.ndarray:
    """Write ragged rows into a padded matrix.

    Parameters
    ----------
    flat : array (T,)
        The rows, one after the other.
    indptr : int array (n + 1,)
        Row i is `flat[indptr[i]:indptr[i + 1]]`.
    length : int
        Number of columns; no row may be longer.
    value : int
        What to pad with.
    side : {"right", "left"}, default: "right"
        Where the padding goes.

    Returns
    -------
    array (n, length) of the dtype of `flat`
    """
    n_rows = len(indptr) - 1
    padded = np.full((n_rows, length), value, flat.dtype)
    to, rows = padded.reshape(-1), np.arange(n_rows)
    # A copy a row takes half the time of an assignment by a mask.
    begins = rows * length if side == "right" else (rows + 1) * length - np.diff(indptr)
    for start, stop, begin in zip(indptr.tolist(), indptr[1:].tolist(), begins.tolist(), strict=False):
        to[begin : begin + stop - start] = flat[start:stop]
    return padded


# ---------------------------------------------------------------------- are they counts


def _is_counts(values: np.ndarray) -> bool:
    if values.dtype.kind in "ub":
        return True
    if values.dtype.kind == "i":
        return values.size == 0 or values.min() >= 0
    return bool(np.isfinite(values).all() and (values >= 0).all() and (values == np.rint(values)).all())


def check_counts(values: np.ndarray, where: str, layers) -> None:
    """Raise if values are not counts; name the layer that holds them."""
    if _is_counts(values):
        return
    found = "NaN or infinite" if not np.isfinite(values).all() else "negative" if (values < 0).any() else "fractional"
    holders = [name for name in layers if _is_counts(csr_rows(layers[name]).counts)]
    remedy = f"layer={holders[0]!r} holds counts: pass it." if holders else "Pass the layer that holds raw counts."
    raise ValueError(f"Counts are needed, and {where} holds {found} values. {remedy}")


# ---------------------------------------------------------------------- which gene is a column


def strip_version(gene: str) -> str:
    """Cut the version of an Ensembl gene id."""
    match = _VERSION.match(gene) if "." in gene else None
    return match.group(1) if match else gene


class GeneMatcher:
    """Finds the genes of a vocabulary among the columns of an input, and tells how many there are.

    Parameters
    ----------
    genes : sequence of str
        The vocabulary.
    symbols : dict of symbol to gene
        Other names of the genes.

    Attributes
    ----------
    last_coverage : dict or None
        Of the last table of genes seen: `genes` and `counts`, the shares of it that are known, and `vocabulary`, the
        share of the vocabulary that it holds.
    """

    def __init__(self, genes: Sequence[str], symbols: Mapping[str, str]):
        self._genes = genes
        self._index = {strip_version(gene): i for i, gene in enumerate(genes)}
        self._symbols = {symbol: self._index[strip_version(gene)] for symbol, gene in symbols.items()}
        self._last: tuple[Any, np.ndarray | None] | None = None
        self.last_coverage: dict[str, float] | None = None
        self._known_counts = self._all_counts = 0.0

    def find(self, names: Iterable[str]) -> np.ndarray:
        """Find genes by id, else by symbol: int32 array (n_names,), -1 where unknown."""
        index, symbols = self._index, self._symbols
        return np.array([index.get(strip_version(str(name)), symbols.get(str(name), -1)) for name in names], np.int32)

    def match(
        self, names: Sequence[Sequence[str]], rows: CountRows, min_coverage: float, key: np.ndarray | None
    ) -> np.ndarray | None:
        """Find the gene of each column: by the kind of name that most columns are known by, else by another.

        Parameters
        ----------
        names : sequence of sequences (n_columns,)
            Kinds of names.
        rows : CountRows
            Counts, for the share that is known.
        min_coverage : float
            Least share of the counts.
        key : array, optional
            The batches of a store share it: they are matched once, and their shares are those of all so far.

        Returns
        -------
        int32 array (n_columns,) or None
            -1 where unknown; None where column j is gene j.

        Raises
        ------
        ValueError
            Less than `min_coverage` of the counts are in known genes.
        """
        own = hash(tuple(map(tuple, names))) if key is None else key
        seen = self._last is not None and type(self._last[0]) is type(own)
        seen = seen and (self._last[0] is own if key is not None else self._last[0] == own)
        if seen:
            mapped = self._last[1]
            if mapped is None and key is not None:
                return None  # all is known
        else:
            mapped = self.find(names[0])
            if (mapped < 0).any():
                kinds = sorted([mapped, *map(self.find, names[1:])], key=lambda found: -(found >= 0).sum())
                mapped = kinds[0]
                for other in kinds[1:]:
                    mapped = np.where(mapped < 0, other, mapped)
            mapped = None if np.array_equal(mapped, np.arange(len(mapped))) else mapped
        if not (seen and key is not None):
            self._known_counts = self._all_counts = 0.0
        self._measure(mapped, names, rows, min_coverage, tell=not seen)
        self._last = (own, mapped)
        return mapped

    def _measure(self, mapped, names, rows: CountRows, min_coverage: float, tell: bool) -> None:
        n_columns = len(names[0])
        known = np.ones(n_columns, bool) if mapped is None else mapped >= 0
        self._all_counts += float(rows.counts.sum(dtype=np.float64))
        self._known_counts += float(rows.counts[known.take(rows.columns)].sum(dtype=np.float64))
        known_columns = float(known.mean()) if n_columns else 0.0
        share = self._known_counts / self._all_counts if self._all_counts else known_columns
        n_found = n_columns if mapped is None else len(np.unique(mapped[known]))
        self.last_coverage = {
            "genes": known_columns,
            "counts": float(share),
            "vocabulary": n_found / len(self._genes),
        }
        if share < min_coverage:
            more = "" if self._symbols else ", or the genes' symbols (symbols=GeneTable.from_table(…))"
            raise ValueError(
                f"Only {share:.1%} of the counts are in genes that the tokenizer knows (at least "
                f"{min_coverage:.0%} are needed). The input names genes like {describe(names[0])}. The tokenizer "
                f"wants genes like {describe(self._genes)}. Give ids of the same kind, species and release{more}; or "
                "lower tokenizer.min_coverage."
            )
        if tell and known_columns < 1:
            logger.warning(
                f"{known.sum()} of {n_columns} genes of the input are known to the tokenizer ({share:.1%} of its "
                "counts); the others are left out."
            )


def map_genes(rows: CountRows, column_genes: np.ndarray | None) -> CountRows:
    """Rename columns to genes: unknown ones dropped, genes ascending, equal ones summed.

    Parameters
    ----------
    rows : CountRows
    column_genes : int array (n_columns,) or None
        Gene of each column, -1 where unknown; None where column j is gene j.

    Returns
    -------
    CountRows
        Over the genes.
    """
    if column_genes is None:
        return rows
    indptr, columns, counts = rows
    genes = column_genes[columns]
    if len(genes) and genes.min() < 0:
        indptr, (genes, counts) = keep(genes >= 0, indptr, genes, counts)
    known = column_genes[column_genes >= 0]
    if (known[1:] > known[:-1]).all():
        return CountRows(indptr, genes, counts)
    n_genes = int(known.max()) + 1
    keys = np.repeat(np.arange(len(indptr) - 1), np.diff(indptr)) * n_genes + genes
    order = np.argsort(keys, kind="stable")
    keys, counts = keys[order], counts[order]
    first = np.ones(len(keys), bool)
    np.not_equal(keys[1:], keys[:-1], out=first[1:])
    if not first.all():
        wide = np.float64 if counts.dtype.kind == "f" else np.int64
        counts = np.add.reduceat(counts, np.flatnonzero(first), dtype=wide)
        indptr, (keys,) = keep(first, indptr, keys)
    return CountRows(indptr, keys % n_genes, counts)


def describe(names: Iterable[str]) -> str:
    """Name some genes, and guess what kind of names they are."""
    names = [str(name) for name in names]
    sample = ", ".join(names[:3]) or "(none)"
    matches = [match for name in names if (match := _ENSEMBL.match(name))]
    if len(matches) > len(names) / 2:
        prefix = max({match.group(1) for match in matches}, key=[match.group(1) for match in matches].count)
        versions = " with versions" if any(match.group(2) for match in matches) else ""
        return f"{sample}: these look like Ensembl ids of {_SPECIES.get(prefix, 'ENS' + prefix)}{versions}"
    if names and all(name.isdigit() for name in names):
        return f"{sample}: these look like row numbers or Entrez ids"
    words = [name for name in names if len(name) > 1 and name[0].isalpha()]
    if len(words) > len(names) / 2:
        for kind, write in (("human", str.upper), ("mouse", str.capitalize)):
            if sum(write(word) == word for word in words) > len(words) / 2:
                return f"{sample}: these look like {kind} symbols"
        return f"{sample}: these look like symbols"
    return sample


__all__ = [
    "NEIGHBORS",
    "Cells",
    "CountRows",
    "GeneMatcher",
    "check_counts",
    "csr_rows",
    "describe",
    "hide",
    "is_cell_batch",
    "keep",
    "map_genes",
    "pad_ragged",
    "read_cells",
    "row_sums",
    "sum_of_neighbors",
    "strip_version",
]
