"""GeneStatistics: medians, means and detection rates of genes, computed block by block, on one machine or on many."""

from __future__ import annotations

import json
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import sparse

from .gene_values import RELATIVE_ERROR, AllValues, ValueSketch
from .whole_files import whole_file

FORMAT_VERSION = 1
MAX_MEMORY = 1_000_000_000
_METHODS = ("auto", "exact", "sketch")
_COLUMNS = ("mean", "detection_rate", "total")


class GeneStatistics:
    """Statistics of genes over cells, computed block by block; statistics of parts of the cells can be merged.

    Parameters
    ----------
    gene_ids : sequence of str (n_genes,)
        Unique gene ids.
    symbols : sequence of str (n_genes,), optional
    target_sum : float, default: 10,000
        Sum of the values of a cell: a value is count / total counts of the cell * target_sum.
    method : {"auto", "exact", "sketch"}, default: "auto"
        `exact` keeps every count. `sketch` keeps one histogram per gene, whose memory does not grow with the cells;
        its medians are off by at most 0.75 %. `auto` is exact while the counts fit into `max_memory`, then a sketch.
    max_memory : int, default: 1 GB
        Limit for the counts that `auto` keeps, in bytes.

    Attributes
    ----------
    gene_ids : object array (n_genes,)
    symbols : object array (n_genes,) or None
    target_sum : float
    n_cells : int
        Number of cells with counts; cells without counts are skipped.
    method : {"exact", "sketch"}
        How the medians are computed now.

    Raises
    ------
    ValueError
        Ids repeat; the target sum is not positive; the method is unknown; `max_memory` is negative.

    Notes
    -----
    The median of a gene is that of its non-zero values (Geneformer, Theodoris et al. 2023; STFormer). The sketch is
    DDSketch (Masson et al. 2019, doi:10.14778/3352063.3352135): buckets with a constant ratio of their bounds, 47 per
    doubling, so that sketches of parts add up to the sketch of the whole. It takes about 4 kB per gene.
    """

    _read_method: str  # of statistics that were read from a JSON file

    def __init__(
        self,
        gene_ids: Iterable[str],
        symbols: Iterable[str] | None = None,
        *,
        target_sum: float = 1e4,
        method: str = "auto",
        max_memory: int = MAX_MEMORY,
    ):
        if method not in _METHODS:
            raise ValueError(f"method={method!r}: must be one of {', '.join(_METHODS)}.")
        if not 0 < target_sum < np.inf:
            raise ValueError(f"target_sum={target_sum}: must be positive.")
        if max_memory < 0:
            raise ValueError(f"max_memory={max_memory}: must be a number of bytes.")
        self.gene_ids = np.array([str(gene) for gene in gene_ids], dtype=object)
        repeated = pd.Index(self.gene_ids).duplicated()
        if repeated.any():
            raise ValueError(f"{int(repeated.sum())} gene ids are repeated, such as {self.gene_ids[repeated][0]}.")
        self.symbols = None if symbols is None else np.array([str(symbol) for symbol in symbols], dtype=object)
        if self.symbols is not None and len(self.symbols) != len(self.gene_ids):
            raise ValueError(f"There are {len(self.symbols)} symbols for {len(self.gene_ids)} genes.")
        self.target_sum = float(target_sum)
        self.n_cells = 0
        self._limit = {"exact": np.inf, "sketch": 0.0, "auto": float(max_memory)}[method]
        self._values: AllValues | ValueSketch | None = (AllValues if self._limit else ValueSketch)(len(self.gene_ids))
        self._sums = np.zeros((len(self.gene_ids), 2))  # sums of the counts, and of the values
        self._table: pd.DataFrame | None = None

    def __len__(self) -> int:
        return len(self.gene_ids)

    def __repr__(self) -> str:
        return f"GeneStatistics({len(self):,} genes, {self.n_cells:,} cells, {self.method})"

    # ------------------------------------------------------------------ adding cells

    def add(self, counts: sparse.csr_matrix | sparse.csr_array, columns: np.ndarray | None = None) -> None:
        """Add cells.

        Parameters
        ----------
        counts : csr_matrix or csr_array (n_cells, n_columns)
            Raw counts. Repeated entries are summed; zeros and cells without counts are skipped.
        columns : int array (n_columns,), optional
            Gene index of each column; columns of the same gene are summed. By default the columns are the genes.

        Raises
        ------
        ValueError
            The number of columns is wrong; values are not counts; the statistics were read from a JSON file.
        """
        values = self._whole_values()
        counts = _clean(counts, columns, len(self))
        if not counts.shape[0]:
            return
        with np.errstate(over="ignore"):  # an error is raised below
            totals = np.add.reduceat(counts.data, counts.indptr[:-1], dtype=np.float64)
        if not np.isfinite(totals).all():
            raise ValueError("The counts of a cell add up to more than a float64 holds.")
        self._sums += counts.T @ np.stack([np.ones(len(totals)), self.target_sum / totals], axis=1)
        values.add(counts, totals)
        self.n_cells += len(totals)
        self._settle()

    @contextmanager
    def as_one_part(self) -> Iterator[None]:
        """Add what is added in the block as one part: the results equal, bit for bit, those of a merged part."""
        before, self._sums = self._sums, np.zeros_like(self._sums)
        try:
            yield
        finally:
            self._sums += before

    def merge(self, other: GeneStatistics) -> GeneStatistics:
        """Return the statistics of the cells of both, over the genes of both.

        Two sketches become the sketch of all cells; kept counts are concatenated; one of each becomes a sketch.

        Parameters
        ----------
        other : GeneStatistics
            Statistics of other cells, which are not changed. Genes that are only in `other` are appended.

        Raises
        ------
        ValueError
            The target sums differ, or statistics were read from a JSON file.
        """
        if self.target_sum != other.target_sum:
            raise ValueError(
                f"The target sums are {self.target_sum:g} and {other.target_sum:g}: estimate both with the same one."
            )
        parts = (self, other)
        genes = pd.Index(self.gene_ids, dtype=object).append(pd.Index(other.gene_ids, dtype=object)).unique()
        merged = GeneStatistics(genes, _united_symbols(genes, parts), target_sum=self.target_sum)
        merged._limit = max(part._limit for part in parts)
        merged.n_cells = sum(part.n_cells for part in parts)
        placed = []
        for part in parts:
            at = genes.get_indexer(part.gene_ids)
            merged._sums[at] += part._sums
            placed.append(part._whole_values().placed(at, len(genes)))
        first, second = placed
        if isinstance(first, AllValues) and isinstance(second, AllValues):
            merged._values = first.plus(second)
        else:
            merged._values = first.sketch().plus(second.sketch())
        merged._settle()
        return merged

    def _settle(self) -> None:
        """Clear cached results, and convert counts that are too many to be kept to a sketch."""
        self._table = None
        if isinstance(self._values, AllValues) and self._values.n_bytes > self._limit:
            self._values = self._values.sketch()

    def _whole_values(self) -> AllValues | ValueSketch:
        if self._values is None:
            raise ValueError(
                "These statistics were read from a JSON file, which holds only results: save and load .npz files "
                "to add cells or merge parts."
            )
        return self._values

    # ------------------------------------------------------------------ results

    @property
    def method(self) -> str:
        """How the medians are computed: `exact` or `sketch`."""
        if self._values is None:
            return self._read_method
        return "exact" if isinstance(self._values, AllValues) else "sketch"

    @property
    def relative_error(self) -> float:
        """Bound of the relative error of a median: 0, or 0.0075 for a sketch."""
        return 0.0 if self.method == "exact" else RELATIVE_ERROR

    @property
    def medians(self) -> dict[str, float]:
        """Median of the non-zero values of each expressed gene, for `GeneTokenizer(medians=…)`."""
        seen = self.table[["gene_id", "median"]].dropna()
        return dict(zip(seen["gene_id"].tolist(), seen["median"].tolist(), strict=True))

    @property
    def table(self) -> pd.DataFrame:
        """All statistics, one row per gene.

        The columns are `gene_id`; `symbol`, if known; `median` of the non-zero values, NaN for a gene without counts;
        `mean` of the values over all cells; `detection_rate`, the share of the cells with a count; `total`, the sum of
        the counts.
        """
        if self._table is None:
            n_cells, values = max(self.n_cells, 1), self._whole_values()
            self._table = pd.DataFrame(
                {
                    "gene_id": self.gene_ids,
                    **({} if self.symbols is None else {"symbol": self.symbols}),
                    "median": values.medians(self.target_sum),
                    "mean": self._sums[:, 1] / n_cells,
                    "detection_rate": values.lengths() / n_cells,
                    "total": self._sums[:, 0],
                }
            )
        return self._table.copy()

    # ------------------------------------------------------------------ files

    def save(self, path: str | Path) -> None:
        """Write a file atomically.

        Parameters
        ----------
        path : str or Path
            `.json` holds the results, for people and programs: `medians` is one object gene id -> median. `.npz` holds
            everything, so that parts can be merged and cells added.

        Raises
        ------
        ValueError
            The file has another suffix, or is an `.npz` of statistics that were read from a JSON file.
        """
        path = _checked_path(path)
        if path.suffix == ".json":
            with whole_file(path) as part:
                part.write_bytes(self._to_json().encode())
        else:
            arrays = self._to_arrays()
            with whole_file(path) as part, open(part, "wb") as file:
                np.savez(file, **arrays)  # type: ignore[arg-type]  # mypy takes an array for allow_pickle

    @classmethod
    def load(cls, path: str | Path) -> GeneStatistics:
        """Read a file that `save` wrote.

        Parameters
        ----------
        path : str or Path
            `.json`, which has only the results, so that nothing can be added to them; or `.npz`.

        Raises
        ------
        FileNotFoundError
            The file does not exist.
        ValueError
            The file has another suffix or format version, or is damaged.
        """
        path = _checked_path(path)
        of_json = path.suffix == ".json"
        try:
            found = json.loads(path.read_text(encoding="utf-8")) if of_json else _read_arrays(path)
            version = int(found["format_version"])
            if version == FORMAT_VERSION:
                return cls._from_json(found) if of_json else cls._from_arrays(found)
        except (ValueError, TypeError, LookupError, AttributeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise ValueError(f"{path} does not hold gene statistics, or is damaged: {error}.") from error
        remedy = "Update stformer_hf." if version > FORMAT_VERSION else "Estimate the statistics again."
        raise ValueError(f"{path} has format version {version}; this version reads {FORMAT_VERSION}. {remedy}")

    def _to_json(self) -> str:
        table = self.table
        found = {
            "format_version": FORMAT_VERSION,
            "target_sum": self.target_sum,
            "n_cells": self.n_cells,
            "method": self.method,
            "relative_error": self.relative_error,
            "medians": self.medians,
            "gene_id": self.gene_ids.tolist(),
            "symbol": None if self.symbols is None else self.symbols.tolist(),
            **{name: table[name].tolist() for name in _COLUMNS},
        }
        return json.dumps(found, indent=1, ensure_ascii=False, allow_nan=False) + "\n"

    @classmethod
    def _from_json(cls, found: dict[str, Any]) -> GeneStatistics:
        read = cls(found["gene_id"], found["symbol"], target_sum=found["target_sum"])
        read.n_cells = found["n_cells"]
        medians = [found["medians"].get(gene, np.nan) for gene in read.gene_ids]
        read._table = read.table.assign(median=medians, **{name: found[name] for name in _COLUMNS})
        read._values, read._read_method = None, found["method"]
        return read

    def _to_arrays(self) -> dict[str, np.ndarray]:
        values = self._whole_values()
        return {
            "format_version": np.array(FORMAT_VERSION),
            "target_sum": np.array(self.target_sum),
            "n_cells": np.array(self.n_cells),
            "limit": np.array(self._limit),
            "method": np.array(self.method),
            "gene_ids": self.gene_ids.astype(str),
            **({} if self.symbols is None else {"symbols": self.symbols.astype(str)}),
            "sums": self._sums,
            **values.to_arrays(),
        }

    @classmethod
    def _from_arrays(cls, arrays: dict[str, np.ndarray]) -> GeneStatistics:
        read = cls(arrays["gene_ids"], arrays.get("symbols"), target_sum=arrays["target_sum"].item())
        read.n_cells, read._limit = arrays["n_cells"].item(), arrays["limit"].item()
        read._sums[:] = arrays["sums"]
        kind = AllValues if arrays["method"].item() == "exact" else ValueSketch
        read._values = kind.from_arrays(arrays, len(read))
        return read


# ---------------------------------------------------------------------- checks of counts and files


def _clean(counts: Any, columns: np.ndarray | None, n_genes: int) -> sparse.csr_array:
    """Check counts; sum repeated entries, drop zeros and empty cells, and map columns to genes."""
    counts = sparse.csr_array(counts)
    if counts.ndim != 2 or counts.dtype.kind not in "buif":
        raise ValueError(f"Counts must be a matrix of numbers, got shape {counts.shape}, type {counts.dtype}.")
    n_cells, n_columns = counts.shape
    columns = np.arange(n_columns) if columns is None else np.asarray(columns)
    if len(columns) != n_columns or not ((columns >= 0) & (columns < n_genes)).all():
        raise ValueError(f"{n_columns} columns do not fit {n_genes} genes: pass the gene of each column, columns=….")
    data = counts.data
    if len(data) and data.dtype.kind in "if" and not 0 <= data.min() <= data.max() < np.inf:
        wrong = data[~((data >= 0) & (data < np.inf))]
        raise ValueError(f"Counts must be finite and not negative, got {wrong[0]}. Pass raw counts.")
    indices = counts.indices
    if not np.array_equal(columns, np.arange(n_genes)):
        indices = columns.astype(indices.dtype)[indices]
    if not counts.has_canonical_format or np.bincount(columns).max(initial=0) > 1:
        data = data.astype(np.float64 if data.dtype.kind == "f" else np.uint64)  # sums of narrow types would overflow
        counts = sparse.csr_array((data, indices.copy(), counts.indptr.copy()), (n_cells, n_genes))
        counts.sum_duplicates()
    elif indices is not counts.indices or data.dtype.kind == "b":
        data = data.view(np.uint8) if data.dtype.kind == "b" else data
        counts = sparse.csr_array((data, indices, counts.indptr), (n_cells, n_genes))
    if not counts.data.all():
        counts = counts.copy()
        counts.eliminate_zeros()
    filled = np.diff(counts.indptr) > 0
    if filled.all():
        return counts
    indptr = np.concatenate([counts.indptr[:1], counts.indptr[1:][filled]])
    return sparse.csr_array((counts.data, counts.indices, indptr), (len(indptr) - 1, n_genes))


def _united_symbols(genes: pd.Index, parts: Sequence[GeneStatistics]) -> np.ndarray | None:
    """Return the symbols of the genes of all parts; the id if none is known."""
    known: dict[str, str] = {}
    for part in reversed(parts):
        if part.symbols is not None:
            known.update(zip(part.gene_ids, part.symbols, strict=True))
    return np.array([known.get(gene, gene) for gene in genes], dtype=object) if known else None


def _checked_path(path: str | Path) -> Path:
    path = Path(path)
    if path.suffix not in (".json", ".npz"):
        raise ValueError(f"{path}: gene statistics must be .json (results only) or .npz (everything, for merging).")
    return path


def _read_arrays(path: Path) -> dict[str, np.ndarray]:
    with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:  # numpy leaves a damaged file open
        return dict(arrays)
