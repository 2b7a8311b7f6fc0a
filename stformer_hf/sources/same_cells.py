"""Find duplicated cells: sources of a build with the same cells, and twins (copies) among the cells of a store."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
from scipy import sparse
from scipy.sparse.csgraph import connected_components
from scipy.special import bdtrc
from xxhash import xxh3_128_digest

SHARE = 0.9  # share of a source's cells that match cells of another, from which it holds the same cells
PART = 0.05  # share of a source's barcodes that are in another, from which its cells are compared with those there
_KAPPA = 0.5
_LEAST_SHARED = 50  # smallest number of cells for a correlation of their totals
_CORRELATION = 0.95  # of log totals; it is far lower for sections and lanes that share barcodes
_EXPECTED = 1e-3  # expected number of pairs of sources in which as many cells match by chance
_RAW_OR_FILTERED = re.compile(r"(?<![a-z])(raw|unfiltered|filtered)(?![a-z])", re.IGNORECASE)
_COUNTED_TWICE = re.compile(r"(?<=/)Gene(?:Full\w*)?(?=/)|(?<=/square_)\d{3}um(?=/)")  # STARsolo, Visium HD
_FORMAT = re.compile(r"(\.h5|/matrix\.mtx|/matrix\.mtx\.gz)$", re.IGNORECASE)
_BASES = re.compile("[ACGT]{12,}")
_NUCLEOTIDES = re.compile(r"[ACGTN]{8,}")
_SUFFIX = re.compile(r"(-\d+)+$")  # suffix that anndata appends to repeated names
_ROWS_AT_A_TIME = 4096
_NAMES_AT_A_TIME = 1 << 16
_REMEDY = "or pass allow_duplicates=True."


def check_names(sources: Sequence[Any]) -> None:
    """Raise ValueError if file names show the same cells: a repeated file, or raw and filtered files of one run.

    These are Cell Ranger's `raw_feature_bc_matrix` and `filtered_feature_bc_matrix`, as folders or `.h5`, STARsolo's
    `raw` and `filtered`, and any other two paths that differ only in such a word; STARsolo's `Gene` and `GeneFull`,
    and the bins of 2, 8 and 16 um of Visium HD.
    """
    seen: dict[str, Path] = {}
    for source in sources:
        if not isinstance(source, Path):
            continue
        key = source.resolve().as_posix()
        bare = _FORMAT.sub("", key)
        if _RAW_OR_FILTERED.search(bare.rsplit("/", 1)[-1]):  # the h5 and the folder of one matrix are the same
            key = bare
        key = _COUNTED_TWICE.sub("*", _RAW_OR_FILTERED.sub("*", key))
        other = seen.setdefault(key, source)
        if other is source:
            continue
        if other.resolve() == source.resolve():
            raise ValueError(f"{source} is repeated. Pass it once, {_REMEDY}")
        kept = min(other, source, key=lambda path: (_is_raw(path), str(path)))
        raise ValueError(
            f"{other} and {source} hold the same cells of one run. Pass only one of them, such as {kept}, {_REMEDY}"
        )


def _is_raw(path: Path) -> bool:
    return (_RAW_OR_FILTERED.findall(path.as_posix()) or ["filtered"])[-1].lower() != "filtered"


def row_totals(block: sparse.csr_matrix) -> np.ndarray:
    """Return the total of each cell, array (n_cells,); narrow counts in 32 bits, as fast as one sum over all."""
    kind = np.uint32 if block.dtype.itemsize <= 2 else np.float64 if block.dtype == np.float32 else block.dtype
    totals = np.zeros(block.shape[0], kind)
    there = np.flatnonzero(np.diff(block.indptr))  # reduceat does not accept empty ranges
    if len(there):
        totals[there] = np.add.reduceat(block.data, block.indptr[there], dtype=kind)
    return totals


def describe(totals: np.ndarray, indptr: np.ndarray) -> np.ndarray:
    """Return total and number of genes of each cell, to compare cells with one barcode: float32 (n_cells, 2)."""
    return np.stack([totals, np.diff(indptr)], axis=1).astype(np.float32)


class SameCells:
    """Pairs of sources with similar barcodes, and whether their cells are the same.

    Barcodes alone do not decide: lanes draw them from one list, and the spots of all sections share them. So for the
    sources of such a pair, total and number of genes of each cell are kept while they are written, 16 bytes with the
    hash of the barcode. Cells without counts are skipped.

    A source holds the same cells as another if at least 90 % of its cells match a cell there in all three, and chance
    does not explain it. Chance is the probability that a cell there has the total and number of genes of a cell here:
    Cohen's kappa [1]_, (share - chance) / (1 - chance), must be over 0.5, and no pair with as many matching cells may
    be expected. This excludes droplets of two lanes with one or two molecules, and very small sources, which match by
    chance. A source also holds the same cells if at least 90 % have the barcode of a cell there, and the logarithms of
    their totals correlate by over 0.95, as for a matrix with and without ambient counts.

    The cells that other sources share are counted (`shared`): of sources of which at least 5 % have the barcode of a
    cell in the other, if kappa among these cells is over 0.5, and chance does not explain it.

    References
    ----------
    .. [1] Cohen, A coefficient of agreement for nominal scales, Educational and Psychological Measurement 20, 1960.

    Parameters
    ----------
    names : sequence of Arrow string arrays (n_cells,)
        Names of the cells of each source.

    Attributes
    ----------
    pairs : list of (int, int)
        The barcodes of at least 90 % of the cells of the first source are in the second.
    alike : list of (int, int)
        Those of at least 5 %.
    """

    def __init__(self, names: Sequence[pa.Array | pa.ChunkedArray]):
        self._barcodes = [_hash_barcodes(of) for of in names] if len(names) > 1 else []
        shared = _count_shared(self._barcodes).tocoo()
        counted = [(int(i), int(j), n) for i, j, n in zip(*shared.coords, shared.data, strict=True) if i != j]
        self.pairs = [(i, j) for i, j, n in counted if n >= SHARE * len(names[i])]
        self.alike = [(i, j) for i, j, n in counted if n >= PART * len(names[i])]
        self._cells: dict[int, np.ndarray] = {}

    def __contains__(self, source: int) -> bool:
        """Return whether the cells of a source must be described."""
        return any(source in pair for pair in self.alike)

    def add(self, source: int, cells: np.ndarray) -> tuple[float, int, int] | None:
        """Add the output of `describe` for all cells of a source; return None, or what earlier one has the same cells.

        This is the share of the cells of a first source that are in a second, and both sources; the largest share if
        there are several.
        """
        self._cells[source] = cells
        known = [(i, j) for i, j in self.pairs if source in (i, j) and i in self._cells and j in self._cells]
        found = [(share, i, j) for i, j in known if (share := self._share(i, j)) is not None]
        return max(found, default=None)

    def in_another(self, source: int, others: Sequence[int]) -> np.ndarray:
        """Return which cells of a source have the barcode of a cell of other sources, bool array (n_cells,)."""
        return np.isin(self._barcodes[source], np.concatenate([self._barcodes[other] for other in others]))

    def shared(self) -> list[tuple[int, int, int]]:
        """Return how many cells of a first source are in a second, and both sources, the most first."""
        pairs = sorted({(min(pair), max(pair)) for pair in self.alike if self._cells.keys() >= set(pair)})
        found = [(self._n_shared(i, j), i, j) for i, j in pairs]
        return sorted((of for of in found if of[0]), key=lambda of: -of[0])

    def _n_shared(self, i: int, j: int) -> int:
        """Return the number of cells of a source that are in another, or 0 if they may be by chance."""
        (contents, keys), (others, other_keys) = self._keys(i), self._keys(j)
        first, second = (self._barcodes[source][self._cells[source][:, 1] > 0] for source in (i, j))
        n, n_alike = int(np.isin(keys, other_keys).sum()), int(np.isin(first, second).sum())
        if not n:
            return 0
        chance = _chance(contents, others)
        beyond_chance = n / n_alike - chance > _KAPPA * (1 - chance)
        return n if beyond_chance and len(self.alike) * bdtrc(n - 1, n_alike, chance) < _EXPECTED else 0

    def _keys(self, source: int) -> tuple[np.ndarray, np.ndarray]:
        """Return what tells the cells of a source with counts apart, without and with their barcodes: uint64 (n,)."""
        there = self._cells[source][:, 1] > 0
        contents = np.ascontiguousarray(self._cells[source][there]).view(np.uint64).ravel()
        return contents, pd.util.hash_array(contents) ^ self._barcodes[source][there]

    def _share(self, i: int, j: int) -> float | None:
        (contents, keys), (others, other_keys) = self._keys(i), self._keys(j)
        if not len(keys) or not len(other_keys):
            return None
        share, chance = np.isin(keys, other_keys).mean(), _chance(contents, others)
        n_same = share * len(keys)
        beyond_chance = share - chance > _KAPPA * (1 - chance) and len(self.pairs) * chance**n_same < _EXPECTED
        if share >= SHARE and beyond_chance:
            return float(share)
        return self._share_of_like_totals(i, j)

    def _share_of_like_totals(self, i: int, j: int) -> float | None:
        """Return the share of cells with the barcode of a cell in the other source, if their totals correlate.

        They do for a matrix with and without ambient counts, or with fewer genes.
        """
        totals = [
            pd.Series(np.log1p(self._cells[source][:, 0]), self._barcodes[source])[self._cells[source][:, 1] > 0]
            for source in (i, j)
        ]
        first, second = (of[~of.index.duplicated(keep=False)] for of in totals)
        shared = first.index.intersection(second.index)
        if len(shared) < max(_LEAST_SHARED, SHARE * len(first)):
            return None
        correlation = np.corrcoef(first[shared], second[shared])[0, 1]
        return len(shared) / len(first) if correlation > _CORRELATION else None


def _chance(contents: np.ndarray, others: np.ndarray) -> float:
    """Return the probability that a cell of another source has the total and number of genes of a cell of one."""
    kinds, inverse = np.unique(np.concatenate([contents, others]), return_inverse=True)
    n = len(contents)
    first, second = (np.bincount(of, minlength=len(kinds)) for of in (inverse[:n], inverse[n:]))
    return float((first / first.sum()) @ (second / second.sum()))


def _hash_barcodes(names: pa.Array | pa.ChunkedArray) -> np.ndarray:
    """Hash the barcodes of cells, uint64 array (n,): the first long run of bases in a name, or the whole name."""
    hashes = np.empty(len(names), np.uint64)
    for start in range(0, len(names), _NAMES_AT_A_TIME):
        some = names[start : start + _NAMES_AT_A_TIME].to_pylist()
        found = [(match := _BASES.search(name)) and match[0] or name for name in some]
        hashes[start : start + len(found)] = pd.util.hash_array(np.array(found, object), categorize=False)
    return hashes


def _count_shared(keys: Sequence[np.ndarray]) -> sparse.csr_array:
    """Count the cells of each source whose key is in another, (n_sources, n_sources); the diagonal has no meaning."""
    n = len(keys)
    if n < 2:
        return sparse.csr_array((n, n), dtype=np.int64)
    of_sources = np.concatenate([np.unique(of) for of in keys])
    of_sources.sort()
    shared = np.unique(of_sources[1:][of_sources[1:] == of_sources[:-1]])  # often few, so only these are counted
    rows, columns = [], []
    for source, of in enumerate(keys):
        of = of[np.isin(of, shared)]
        columns.append(shared.searchsorted(of).astype(np.int32))
        rows.append(np.full(len(of), source, np.int32))
    places = np.concatenate(rows), np.concatenate(columns)
    cells = sparse.coo_array((np.ones(len(places[0]), np.int64), places), shape=(n, len(shared))).tocsr()
    cells.sum_duplicates()
    there = sparse.csr_array((np.ones_like(cells.data), cells.indices, cells.indptr), shape=cells.shape)
    return cells @ there.T


# ---------------------------------------------------------------------- twins


def find_twins(names: Iterable[str], counts: sparse.csr_array) -> np.ndarray:
    """Find cells with equal barcode and equal counts, such as a cell that is in two files: int64 array (n_cells,).

    Cells with the same number are twins. The barcode consists of the name's runs of eight or more nucleotide letters;
    for a name without them, it is the name up to a trailing "-1", "-1-2", … `counts`, csr_array (n_cells, n_genes),
    have sorted indices and no explicit zeros.
    """
    barcodes = [_barcode(str(name)) for name in names]
    keys: list[Any] = list(range(len(barcodes)))
    for row in np.flatnonzero(_repeated(barcodes)):
        keys[row] = (barcodes[row], _digest(counts, counts.indptr[row], counts.indptr[row + 1]))
    return np.asarray(pd.factorize(pd.Series(keys, dtype=object))[0], np.int64)


def _barcode(name: str) -> str:
    return "_".join(_NUCLEOTIDES.findall(name)) or _SUFFIX.sub("", name)


def _repeated(keys: Sequence[Any]) -> np.ndarray:
    return pd.Series(keys, dtype=object).duplicated(keep=False).to_numpy()


def find_twins_of_store(
    names: Iterable[str], n_genes: np.ndarray, read: Callable[[np.ndarray], sparse.csr_array]
) -> np.ndarray:
    """Find twins as `find_twins` does, reading only cells that share barcode and number of genes with others.

    Cells have `n_genes` expressed genes, int array (n_cells,); those without counts are not twins. `read` returns the
    counts of rows, int64 array, as csr_array.
    """
    barcodes = [_barcode(str(name)) for name in names]
    rows = np.flatnonzero(_repeated(list(zip(barcodes, n_genes.tolist(), strict=True))))
    keys: list[Any] = list(range(len(barcodes)))
    for start in range(0, len(rows), _ROWS_AT_A_TIME):
        some = rows[start : start + _ROWS_AT_A_TIME]
        counts = read(some)
        for row, begin, end in zip(some, counts.indptr[:-1], counts.indptr[1:], strict=True):
            if end > begin:
                keys[row] = (barcodes[row], _digest(counts, begin, end))
    return np.asarray(pd.factorize(pd.Series(keys, dtype=object))[0], np.int64)


def _digest(counts: sparse.csr_array, begin: int, end: int) -> bytes:
    values = counts.indices[begin:end].astype(np.int64).tobytes() + counts.data[begin:end].astype(np.float64).tobytes()
    return xxh3_128_digest(values)


def join_groups(groups: np.ndarray, twins: np.ndarray) -> np.ndarray:
    """Return a number per group, int array (n_cells,); groups connected by twins get the same number."""
    codes, _ = pd.factorize(groups)
    n = codes.max() + 1
    links = sparse.csr_array((np.ones(len(codes)), (codes, n + twins)), shape=(n + twins.max() + 1,) * 2)
    return connected_components(links, directed=False)[1][codes]
