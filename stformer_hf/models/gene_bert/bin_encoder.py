"""The binned scheme: a token id is an expression bin, its token type the gene (PerturbGene)."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .cell_counts import Cells, CountRows, keep, map_genes, row_sums
from .cell_vocabulary import SPECIAL_TOKENS, CellVocabulary
from .gene_columns import sample, strip_version
from .gene_order import Truncation
from .tokenized_cells import CellLayout, TokenizedCells
from .tokenizer_settings import TokenizerSettings, blocks_of_cells

_BELOW_ANY_COUNT = 1e-9  # cells that the edges were not fitted on may have smaller values


class BinEncoder(CellVocabulary):
    """Bins the counts of cells; `n_bins` and `first_bin_id` are those of the tokenizer."""

    required_roles = frozenset(SPECIAL_TOKENS)

    def __init__(self, settings: TokenizerSettings):
        settings.totals = settings.totals or "genes"
        if settings.totals not in ("genes", "columns"):
            raise ValueError(f'totals must be "genes" or "columns", got {settings.totals!r}.')
        if settings.normalize not in (None, "log1p_cp10k"):
            raise ValueError(f'normalize must be None or "log1p_cp10k", got {settings.normalize!r}.')
        settings.bin_edges = check_bin_edges(
            (0.1,) if settings.bin_edges is None else settings.bin_edges, settings.genes
        )
        edges = _edge_array(settings.bin_edges)
        self.n_bins, self._binner = 1 + edges.shape[-1], Binner(edges)
        super().__init__(settings, [f"bin_{i}" for i in range(self.n_bins)])
        self.first_bin_id, self.gene_types = int(self.expression_ids[0]), settings.genes

    @staticmethod
    def fit(
        store: Any, genes: list[str], *, bin_edges: Any, n_bins: int, normalize: str | None, medians: Any
    ) -> tuple[list[str], dict[str, Any]]:
        """Return the genes of a store that have tokens, and the settings that follow from its cells."""
        if isinstance(bin_edges, str):
            bin_edges = _fit_bin_edges(store, bin_edges, n_bins, normalize)
        return genes, {"bin_edges": bin_edges, "medians": medians}  # medians are refused by the settings

    def meaning(self) -> dict[str, Any]:
        """Return the settings that define the tokens, as saved."""
        settings = self.settings
        # Left out if as in files from before these settings existed, whose fingerprints must not change.
        more: dict[str, Any] = {"values": True} if settings.values else {}
        if settings.normalize is not None and settings.totals != "columns":
            more["totals"] = settings.totals
        return {**super().meaning(), "bin_edges": settings.bin_edges, "normalize": settings.normalize, **more}

    def gene_counters(self, genes: np.ndarray) -> np.ndarray:
        """Return the token types of genes, int64 array (n,)."""
        return genes + self.gene_type

    def genes_of(self, input_ids: np.ndarray, token_type_ids: np.ndarray) -> np.ndarray:
        """Return the gene index of each gene token, int64 array (n,)."""
        return token_type_ids - self.gene_type

    def check_text(self, ids: Sequence[int | None]) -> None:
        """Refuse cells written as text."""
        raise ValueError(
            "In the binned scheme, the gene of a token is its token type, which text does not have: tokenize "
            "counts, as in tokenizer(adata)."
        )

    def encode(
        self, cells: Cells, column_genes: np.ndarray | None, layout: CellLayout, truncation: Truncation
    ) -> TokenizedCells:
        """Return the tokens of cells; `column_genes` are those of `map_genes`."""
        settings, rows = self.settings, map_genes(cells.rows, column_genes)
        cell_ids = truncation.cell_ids(cells.ids, rows)
        measured = rows.counts
        if settings.normalize is not None:
            measured = _log1p_cp10k(rows, row_sums(cells.rows if settings.totals == "columns" else rows))
        bins = self._binner(rows.columns, measured)
        indptr, genes, counts = rows
        if len(bins) and not bins.min():
            indptr, (genes, counts, bins, measured) = keep(bins > 0, indptr, genes, counts, bins, measured)
        lengths, room = np.diff(indptr), layout.room(truncation.max_length)
        ids, types, token_indptr, starts = layout.allocate([np.minimum(lengths, room)])
        values = np.zeros(len(ids), np.float32) if settings.values else None
        if settings.values and settings.normalize is None:
            measured = np.log1p(measured, dtype=np.float32)
        dropped, n_dropped = [np.empty(0, np.int64)], np.maximum(lengths - room, 0)
        cuts = zip(indptr.tolist(), indptr[1:].tolist(), starts[0].tolist(), room.tolist(), strict=False)
        for cell, (start, stop, to, most) in enumerate(cuts):
            of, at = bins[start:stop], genes[start:stop]
            chosen: slice | np.ndarray = slice(None)
            if stop - start > most and truncation.how == "head":
                chosen = slice(most)
                dropped.append(at[most:])
                of, at = of[:most], at[:most]
            elif stop - start > most:
                kept = truncation.choose(most, counts[start:stop], at, cell_ids[cell])
                dropped.append(at.take(np.flatnonzero(~kept)))
                chosen = np.flatnonzero(kept)
                of, at = of.take(chosen), at.take(chosen)
            ids[to : to + len(of)] = of
            types[to : to + len(of)] = at
            if values is not None:
                values[to : to + len(of)] = measured[start:stop][chosen]
        ids += self.expression_ids[0]
        types += self.gene_type
        layout.fill(ids, types, token_indptr, starts)
        dropped_types = np.concatenate(dropped).astype(np.int64) + self.gene_type
        dropped_cells = np.repeat(np.arange(len(lengths)), n_dropped)
        return TokenizedCells(ids, types, token_indptr, dropped_types, dropped_cells, values)


# ---------------------------------------------------------------------- bins


class Binner:
    """Assigns values to bins: x is in bin i if `edges[i - 1] <= x < edges[i]`.

    The edges, float64, are those of all genes (n_edges,), or one row per gene, padded with infinity.
    """

    def __init__(self, edges: np.ndarray):
        self._edges = edges
        self._type = np.min_scalar_type(edges.shape[-1])
        self._tables: dict[np.dtype, np.ndarray] = {}

    def __reduce__(self) -> tuple[type, tuple[np.ndarray]]:
        # Without the tables: calls must not change the hash by which `datasets` caches.
        return type(self), (self._edges,)

    def __call__(self, genes: np.ndarray, values: np.ndarray) -> np.ndarray:
        """Return the bin of each value, narrow unsigned array (nnz,)."""
        if self._edges.ndim == 2:
            bins = np.zeros(len(values), self._type)
            for edge in self._edges.T:
                bins += values >= edge.take(genes)
            return bins
        if values.dtype not in (np.uint8, np.uint16):
            return np.searchsorted(self._edges, values, side="right").astype(self._type)
        if values.dtype not in self._tables:  # few distinct values: use a lookup table
            every = np.arange(np.iinfo(values.dtype).max + 1)
            self._tables[values.dtype] = np.searchsorted(self._edges, every, side="right").astype(self._type)
        return self._tables[values.dtype].take(values)


def _log1p_cp10k(rows: CountRows, totals: np.ndarray) -> np.ndarray:
    """Return ln(1 + count / total * 10,000), float64 array (nnz,)."""
    totals = np.where(totals > 0, totals, 1.0)  # a cell without counts may store zeros
    return np.log1p(rows.counts / np.repeat(totals, np.diff(rows.indptr)) * 1e4)


# ---------------------------------------------------------------------- edges


def check_bin_edges(bin_edges: Any, genes: Sequence[str]) -> list[float] | dict[str, list[float]]:
    """Check bin edges, for all genes or per gene."""
    if not isinstance(bin_edges, Mapping):
        return _check_edges(bin_edges, "bin_edges")
    of = {strip_version(str(gene)): values for gene, values in bin_edges.items()}
    missing = [gene for gene in genes if strip_version(gene) not in of]
    if missing:
        raise ValueError(f"bin_edges has no edges for {len(missing)} genes, such as {sample(missing)}.")
    return {gene: _check_edges(of[strip_version(gene)], f"bin_edges of {gene}") for gene in genes}


def _check_edges(bin_edges: Sequence[float], what: str) -> list[float]:
    edges = [float(edge) for edge in bin_edges]
    if not edges or edges[0] <= 0 or not np.isfinite(edges).all() or (np.diff(edges) <= 0).any():
        raise ValueError(f"{what} must be positive, finite and strictly increasing numbers, got {list(bin_edges)}.")
    return edges


def _edge_array(bin_edges: list[float] | dict[str, list[float]]) -> np.ndarray:
    """Return an array of edges: (n_edges,), or (n_genes, n_edges) padded with infinity."""
    if not isinstance(bin_edges, dict):
        return np.array(bin_edges)
    edges = np.full((len(bin_edges), max(map(len, bin_edges.values()))), np.inf)
    for row, values in zip(edges, bin_edges.values(), strict=True):
        row[: len(values)] = values
    return edges


def _fit_bin_edges(store: Any, how: str, n_bins: int, normalize: str | None) -> list[float] | dict[str, list[float]]:
    """Compute edges as quantiles of a store's counts; see `GeneTokenizer.from_store`."""
    if how not in ("quantile", "gene_quantile"):
        raise ValueError(f'bin_edges must be numbers, "quantile" or "gene_quantile", got {how!r}.')
    if n_bins < 1:
        raise ValueError(f"n_bins={n_bins}: must be at least 1.")
    parts = [(np.empty(0, np.int64), np.empty(0))]
    for some in blocks_of_cells(store):
        matrix = store.rows(some)
        rows = CountRows(matrix.indptr.astype(np.int64), matrix.indices, matrix.data)
        parts.append((rows.columns, rows.counts if normalize is None else _log1p_cp10k(rows, row_sums(rows))))
    genes, values = map(np.concatenate, zip(*parts, strict=True))
    values = values.astype(np.float64)
    if not len(values):
        raise ValueError("The store has no counts to compute bin_edges from.")
    everywhere = _quantiles(np.sort(values), n_bins)
    if how == "quantile":
        return everywhere
    order = np.lexsort((values, genes))
    values = values[order]
    bounds = np.searchsorted(genes[order], np.arange(len(store.gene_ids) + 1))
    return {
        gene: _quantiles(values[start:stop], n_bins) if stop > start else everywhere  # seen in none of the cells
        for gene, start, stop in zip(store.gene_ids, bounds[:-1], bounds[1:], strict=True)
    }


def _quantiles(ascending: np.ndarray, n_bins: int) -> list[float]:
    """Return the distinct lower ends of n_bins equal parts; the first is replaced by a value below any count."""
    least = np.unique(ascending[np.arange(n_bins) * len(ascending) // n_bins])
    return [_BELOW_ANY_COUNT, *least[least > ascending[0]].tolist()]
