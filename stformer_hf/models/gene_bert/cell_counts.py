"""Read the counts of cells from any container as flat CSR arrays, and find where the counts of an AnnData are."""

import itertools
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from transformers.utils import logging

from .cell_tables import find_table, is_mudata, is_spatialdata
from .feature_types import GENES, feature_types
from .gene_columns import ColumnNames, GeneNames, SharedNames

logger = logging.get_logger(__name__)

NEIGHBORS = "spatial_connectivities"  # where squidpy keeps the graph of the cells
NO_COUNTS = "only zeros in the part that was checked"


class CountRows(NamedTuple):
    """Counts of n cells: cell i has the entries `indptr[i]:indptr[i + 1]`."""

    indptr: np.ndarray  # int64 (n + 1,)
    columns: np.ndarray  # int (nnz,), ascending in each cell, without duplicates
    counts: np.ndarray  # (nnz,); zeros are allowed


class Cells(NamedTuple):
    """Cells to tokenize."""

    rows: CountRows
    names: ColumnNames | SharedNames  # of the columns
    obs: Any  # a DataFrame, CellBatch, dict or None, with the phenotypes
    ids: np.ndarray | None  # int64 (n,), from which random choices are drawn, else from checksums of the counts
    neighborhood: CountRows | None  # summed counts of each cell's neighbours, over the same columns


def is_cell_batch(cells: Any) -> bool:
    """Return whether `cells` is a batch of `CellStore.__getitems__`: CSR rows with the gene ids of their columns."""
    return hasattr(cells, "indptr") and hasattr(cells, "gene_ids")


def read_cells(
    cells: Any,
    genes: Sequence[str] | tuple[GeneNames, GeneNames] | None,
    obs: Any,
    layer: str | None,
    neighborhood: Any,
    own_genes: Sequence[str],
    with_neighborhood: bool,
    fractional: bool = False,
) -> Cells:
    """Read the counts of an AnnData, a matrix or a CellBatch; see `GeneTokenizer.__call__`."""
    has_tables = is_mudata(cells) or is_spatialdata(cells)
    brings_its_own = has_tables or is_cell_batch(cells) or hasattr(cells, "var_names")
    if brings_its_own and not (genes is None and obs is None and neighborhood is None):
        raise ValueError(f"genes=, obs= and neighborhood= are for a matrix; a {type(cells).__name__} has its own.")
    if is_cell_batch(cells):
        around = getattr(cells, "neighborhood", None)
        if with_neighborhood and around is None:
            raise ValueError(
                "The tokenizer adds each cell's neighbourhood, but these cells have none: take them from "
                "store.with_neighborhoods()."
            )
        return Cells(
            CountRows(cells.indptr, cells.genes, cells.counts),
            SharedNames(cells.gene_ids, cells.symbols),
            cells,
            cells.cell_id,
            CountRows(*around) if with_neighborhood and around is not None else None,
        )
    around = None
    if has_tables or (hasattr(cells, "obs") and hasattr(cells, "var_names")):
        adata, obs, layer, name = find_table(cells, layer)
        matrix, rows, var = _find_counts(adata, layer, fractional, name)
        names: ColumnNames | SharedNames = ColumnNames(var.index, var)
        if with_neighborhood:
            if NEIGHBORS not in adata.obsp:
                raise ValueError(
                    f"The tokenizer adds each cell's neighbourhood, but {name} has no obsp[{NEIGHBORS!r}]: compute "
                    "it with stformer_hf.spatial_neighbors(adata), or with squidpy.gr.spatial_neighbors."
                )
            around = csr_rows(sum_of_neighbors(adata.obsp[NEIGHBORS], matrix))
    elif hasattr(cells, "shape") and len(cells.shape) == 2:
        if with_neighborhood and neighborhood is None:
            raise ValueError(
                "The tokenizer adds each cell's neighbourhood: pass its neighbours' summed counts, neighborhood=…"
            )
        if with_neighborhood:
            around = csr_rows(neighborhood)
            _require_counts(around.counts, "neighborhood", fractional)
        rows = csr_rows(cells)
        if genes is None:
            genes = getattr(cells, "columns", None)  # a DataFrame names its genes
        genes = (own_genes, own_genes) if genes is None else genes
        names = SharedNames(*genes) if isinstance(genes, tuple) else ColumnNames(genes)
        if len(names) != cells.shape[1]:
            raise ValueError(
                f"The matrix has {cells.shape[1]} columns, but there are {len(names)} gene ids for them."
                " Pass genes=[…], the gene ids of its columns."
            )
        _require_counts(rows.counts, "the matrix", fractional)
    else:
        raise TypeError(
            f"GeneTokenizer takes an AnnData, MuData or SpatialData, a matrix of counts or a CellBatch, got "
            f"{type(cells).__name__}. "
            "For token strings use convert_tokens_to_ids."
        )
    return Cells(rows, names, obs, None, around)


def sum_of_neighbors(graph: Any, matrix: Any) -> Any:
    """Sum the counts of each cell's neighbours, sparse or dense (n, n_columns) as `matrix`, in a 64-bit type.

    Every stored entry of `graph`, a sparse matrix (n, n), is a neighbour, whatever its weight; a cell is not its own
    neighbour.
    """
    if not hasattr(graph, "tocoo"):
        raise ValueError(f"The graph of the cells must be a sparse matrix, got {type(graph).__name__}.")
    graph = graph.tocoo()
    others = graph.row != graph.col
    graph = type(graph)((np.ones(others.sum()), (graph.row[others], graph.col[others])), shape=graph.shape).tocsr()
    graph.sum_duplicates()
    graph.data = np.ones(len(graph.data), np.int64)
    matrix = _in_memory(matrix)
    return graph @ _widen(matrix)


def csr_rows(matrix: Any) -> CountRows:
    """Return the rows of a sparse, dense or backed matrix, with columns ascending and without duplicates."""
    matrix = _in_memory(matrix)
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
    indptr = np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=dense.shape[0]))])
    return CountRows(indptr, columns, dense[rows, columns])


def _widen(matrix: Any) -> Any:
    """Copy a matrix with values of 64 bits: sums of narrow ones would overflow."""
    return matrix.astype(np.float64 if matrix.dtype.kind == "f" else np.int64)


def row_sums(rows: CountRows) -> np.ndarray:
    """Return the total of each cell, float64 array (n,)."""
    wide = np.float64 if rows.counts.dtype.kind == "f" else np.int64
    cuts = rows.indptr.tolist()
    sums = [rows.counts[start:stop].sum(dtype=wide) for start, stop in zip(cuts, cuts[1:], strict=False)]
    return np.array(sums, np.float64)


def keep(mask: np.ndarray, indptr: np.ndarray, *arrays: np.ndarray) -> tuple[np.ndarray, tuple[np.ndarray, ...]]:
    """Drop the entries of CSR rows where the mask is False."""
    kept = np.zeros(len(mask) + 1, np.int64)
    np.cumsum(mask, out=kept[1:])
    return kept[indptr], tuple(array[mask] for array in arrays)


def checksums(rows: CountRows) -> np.ndarray:
    """Compute a checksum of the non-zero counts of each cell, int64 array (n,), independent of their types."""
    indptr, (genes, counts) = keep(rows.counts != 0, rows.indptr, rows.columns, rows.counts)
    return row_checksums(np.stack([genes.astype(np.float64), counts.astype(np.float64)], axis=1), indptr)


def row_checksums(values: np.ndarray, indptr: np.ndarray) -> np.ndarray:
    """Compute a checksum of the values of each cell, `values[indptr[i]:indptr[i + 1]]`: int64 array (n,)."""
    cuts = itertools.pairwise(indptr.tolist())
    return np.array([zlib.crc32(values[start:stop].tobytes()) for start, stop in cuts], np.int64)


def hide(rows: CountRows, cells: np.ndarray, genes: np.ndarray, n_genes: int) -> CountRows:
    """Return counts in which pairs of cell and gene, int64 arrays (k,), are hidden from the model.

    Their counts are -1, and those not expressed get an entry of -1. The genes of `rows`, of `n_genes` in all, are
    ascending in each cell, and stay so.
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


def pad_ragged(flat: np.ndarray, indptr: np.ndarray, length: int, value: float, side: str = "right") -> np.ndarray:
    """Write ragged rows, `flat[indptr[i]:indptr[i + 1]]`, into a matrix (n, length) of their dtype.

    No row may be longer. It is padded with `value` on the "right" or "left" side.
    """
    n_rows = len(indptr) - 1
    padded = np.full((n_rows, length), value, flat.dtype)
    to, rows = padded.reshape(-1), np.arange(n_rows)
    # Copying row by row takes half the time of an assignment by a mask.
    begins = rows * length if side == "right" else (rows + 1) * length - np.diff(indptr)
    for start, stop, begin in zip(indptr.tolist(), indptr[1:].tolist(), begins.tolist(), strict=False):
        to[begin : begin + stop - start] = flat[start:stop]
    return padded


# ---------------------------------------------------------------------- where the counts are


def split_features(var: Any, whole_var: Any = None) -> dict[str, np.ndarray] | None:
    """Return the columns of each feature type, a dict to int64 arrays, "Gene Expression" first; None if all are genes.

    For raw, which often has no feature types of its own, they are looked up by name in `whole_var`, the var of X.
    """
    types = feature_types(var)
    if types is None and whole_var is not None and (known := feature_types(whole_var)) is not None:
        of_name = dict(zip(_numbered(whole_var.index), known, strict=True))
        types = np.array([of_name.get(name, GENES) for name in _numbered(var.index)], object)
    if types is None:
        return None
    kinds = sorted(set(types), key=lambda kind: (kind != GENES, kind))
    return {kind: np.flatnonzero(types == kind) for kind in kinds}


def _numbered(names: Iterable[str]) -> list[tuple[str, int]]:
    """Return names with a running number for repeats, such as those of a gene and of its protein's antibody."""
    seen: Counter[Any] = Counter()
    numbered = []
    for name in names:
        numbered.append((name, seen[name]))
        seen[name] += 1
    return numbered


def _find_counts(adata: Any, layer: str | None, fractional: bool, name: str) -> tuple[Any, CountRows, Any]:
    """Find the counts of an AnnData in memory by the rule of `choose_counts`: matrix, its rows, and its `var`."""
    found = {}
    for key, holder in (("X", adata), ("raw", getattr(adata, "raw", None))):
        if holder is not None and holder.X is not None:
            found[key] = (lambda holder=holder: holder.X), holder.var
    for key in filter(None, adata.layers):  # from anndata 0.13 on, X is among them, as None
        found[key] = (lambda key=key: adata.layers[key]), adata.var
    for key, (matrix, var) in list(found.items()):
        columns = split_features(var, adata.var if key == "raw" else None)
        if columns is None:
            continue
        for kind, some in columns.items():
            part = (lambda matrix=matrix, some=some: _in_memory(matrix())[:, some]), var.iloc[some]
            if kind == GENES:
                found[key] = part
            elif key == "X":
                found[kind] = part
        if GENES not in columns:
            del found[key]
    read: dict[str, tuple[Any, CountRows]] = {}

    def problem_in(key: str, fractional: bool) -> str | None:
        if key not in read:
            matrix = found[key][0]()
            read[key] = matrix, csr_rows(matrix)
        values = read[key][1].counts
        return check_counts(values, fractional)[1] or (None if values.any() else NO_COUNTS)

    chosen = choose_counts({key: partial(problem_in, key) for key in found}, layer, fractional, name)
    problem = problem_in(chosen, fractional)
    if problem not in (None, NO_COUNTS):
        raise ValueError(f"{name}: counts are needed, but {chosen} holds {problem}. {_REMEDY}")
    if fractional:
        warn_of_logarithms(read[chosen][1].indptr, read[chosen][1].counts, f"{name}: {chosen}")
    return *read[chosen], found[chosen][1]


_PARTS = {"spliced", "unspliced", "ambiguous", "mature", "nascent"}  # layers of velocity, which sum to the counts
_REMEDY = "Put the raw counts into X, raw or a layer, and name it with layer=…; estimated counts need fractional=True."


def choose_counts(
    problems: Mapping[str, Callable[[bool], str | None]], layer: str | None, fractional: bool, source: str
) -> str:
    """Choose the matrix that holds the counts: the requested one, else the first of X, raw and counts that does.

    Logarithms look like fractional counts, so a matrix of whole numbers is preferred, wherever it is.

    Parameters
    ----------
    problems : mapping of str to callable
        Function per matrix that returns what is wrong with its values, None if nothing is, `NO_COUNTS` if all are 0;
        its argument is whether they may be fractional.
    layer : str, optional
        `X`, `raw`, the name of a layer, or a feature type.
    fractional : bool
        Whether counts may be fractional.
    source : str
        Name of the source, for errors.

    Returns
    -------
    str

    Raises
    ------
    ValueError
        The requested matrix does not exist, or none of the three holds counts.
    """
    if layer is not None:
        if layer not in problems:
            raise ValueError(f"{source} has no layer {layer!r}; available: {', '.join(problems) or 'no matrix'}.")
        return layer
    found: dict[str, str | None] = {}
    for allowed in (False, True) if fractional else (False,):
        for candidate in ("X", "raw", "counts"):
            if candidate in problems:
                found[candidate] = problems[candidate](allowed)
                if found[candidate] is None:
                    return candidate
    if NO_COUNTS in found.values():  # no counts, and none elsewhere
        return next(name for name, problem in found.items() if problem == NO_COUNTS)
    holders = [name for name, problem in problems.items() if name not in found and problem(fractional) is None]
    said = "; ".join(f"{where} holds {problem}" for where, problem in found.items()) or "it has no X"
    whole, parts = ([name for name in holders if (name.lower() in _PARTS) == part] for part in (False, True))
    remedy = _REMEDY
    if whole:
        remedy = f"Counts are in {', '.join(map(repr, whole))}: pass layer={whole[0]!r}."
    elif parts:
        remedy = (
            f"{', '.join(map(repr, parts))}: each is a part of the counts, as for RNA velocity. Put their sum into X, "
            "or name one of them with layer=…"
        )
    raise ValueError(f"{source}: no counts found: {said}. {remedy}")


def check_counts(values: np.ndarray, fractional: bool) -> tuple[np.ndarray, str | None]:
    """Check that values, array (nnz,), are counts; return them (whole floats as narrow integers) and what is wrong.

    This is None if nothing is. Fractions can be allowed (estimates of alevin, RSEM, SoupX, CellBender).
    """
    kind = values.dtype.kind
    if kind in "ub" or not len(values):
        return values, None
    if kind not in "if":
        return values, f"values of type {values.dtype}"
    least, most = values.min(), values.max()
    if not (np.isfinite(least) and np.isfinite(most)):
        return values, f"{int((~np.isfinite(values)).sum())} NaN or infinite values"
    if least < 0:
        return values, f"negative values (as low as {least:g})"
    if kind == "i" or fractional or float(most) >= 2**53:  # too large for any store: writing raises
        return values, None
    whole = values.astype(np.uint8 if most < 256 else np.uint16 if most < 65_536 else np.uint64)
    if not np.array_equal(whole, values):
        return values, f"fractional values (such as {values[whole != values][0]!s})"
    return whole, None


def warn_of_logarithms(indptr: np.ndarray, values: np.ndarray, where: str) -> None:
    """Log a warning if the values of cells, CSR rows, are ln(1 + x) of counts scaled to one total.

    They are if exp(value) - 1 sums to the same total in every cell, to within 0.1 %, but neither the values themselves
    nor the largest ones, which alone can make up that total, are the same. See `telling_cells` for those looked at.
    """
    cells = telling_cells(indptr)
    if values.dtype.kind != "f" or not len(cells):
        return
    of_cells = [values[indptr[i] : indptr[i + 1]].astype(np.float64) for i in cells]
    with np.errstate(over="ignore", invalid="ignore"):
        exact = np.array([np.expm1(of).sum() for of in of_cells])
        if not np.isfinite(exact).all():  # a value above 709 is not the logarithm of a count
            return
        others = [np.array([of.sum() for of in of_cells]), np.array([of.max() for of in of_cells])]
        alike = [np.ptp(found) <= 1e-3 * found.max() for found in (exact, *others)]
    if alike == [True, False, False]:
        logger.warning(
            f"{where} holds logarithms, not counts: exp(x) - 1 sums to {exact[0]:,.0f} in every cell. They are read "
            "as if they were counts, which is wrong for models of counts: name the layer that holds the raw counts."
        )


def telling_cells(indptr: np.ndarray) -> np.ndarray:
    """Return the first 32 cells with several values, which tell logarithms from counts; none if there are under 3."""
    cells = np.flatnonzero(np.diff(indptr) > 1)[:32]
    return cells if len(cells) > 2 else cells[:0]


def _require_counts(values: np.ndarray, where: str, fractional: bool) -> None:
    problem = check_counts(values, fractional)[1]
    if problem:
        raise ValueError(f"Counts are needed, but {where} holds {problem}.")


def _in_memory(matrix: Any) -> Any:
    return matrix.to_memory() if hasattr(matrix, "to_memory") else matrix


# ---------------------------------------------------------------------- columns to genes


def map_genes(rows: CountRows, column_genes: np.ndarray | None) -> CountRows:
    """Return counts over genes instead of columns: unknown ones are dropped, duplicates summed, genes ascending.

    `column_genes` is the gene of each column, int array (n_columns,), -1 if unknown; None if column j is gene j.
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
