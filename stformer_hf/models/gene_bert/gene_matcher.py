"""Find the genes of a vocabulary among the columns of an input, and refuse an input that lacks too many."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from transformers.utils import logging

from .gene_columns import ColumnNames, GeneNames, SharedNames, describe, guess_species, is_id, strip_version

logger = logging.get_logger(__name__)

# Shares of a model's genes, weighted by training expression, below which an input is refused or a warning is logged.
MIN_COVERAGE, WARN_COVERAGE = 0.1, 0.5


class GeneMatcher:
    """Finds the genes of a vocabulary among the columns of an input, and measures the coverage.

    The parameters, and the attribute `last_coverage`, are `genes`, `symbols`, `gene_weights` and `last_coverage` of
    `GeneTokenizer`.
    """

    def __init__(self, genes: Sequence[str], symbols: Mapping[str, str], weights: np.ndarray | None = None):
        self._genes = genes
        self._weights = None if weights is None or not np.any(weights) else np.asarray(weights, np.float64)
        self._index = {strip_version(gene): i for i, gene in enumerate(genes)}
        self._symbols = {symbol: self._index[strip_version(gene)] for symbol, gene in symbols.items()}
        self.species = guess_species(genes)
        self.forget()

    def forget(self) -> None:
        """Forget the last input."""
        self._last: tuple[Any, tuple, np.ndarray | None] | None = None  # key of the names, settings, result
        self.last_coverage: dict[str, float] | None = None
        self._known_counts = self._all_counts = 0.0

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_last": None, "last_coverage": None, "_known_counts": 0.0, "_all_counts": 0.0}

    def find(self, names: Iterable[str]) -> np.ndarray:
        """Find genes by id, else by symbol: int32 array (n_names,), -1 if unknown.

        A gene on Y (`_PAR_Y`) that is not in the vocabulary is matched to its copy on X.
        """
        return np.array([self._find(str(name)) for name in names], np.int32)

    def _find(self, name: str) -> int:
        found = self._index.get(strip_version(name))
        if found is None and name.endswith("_PAR_Y"):
            found = self._index.get(strip_version(name).removesuffix("_PAR_Y")) if is_id(name) else None
        return self._symbols.get(name, -1) if found is None else found

    def find_columns(self, gene_ids: GeneNames, symbols: GeneNames, match: str = "id") -> np.ndarray:
        """Find the gene of each column, int32 array (n_columns,), -1 if unknown.

        A gene is found by its id, else by its symbol, unless another column has that gene's id. `match="symbol"` uses
        symbols alone, as for cells of another species than the vocabulary's, whose ids raise a ValueError otherwise.
        """
        if match == "symbol":
            return self.find(symbols)
        found = self.find(gene_ids)
        unknown = np.flatnonzero(found < 0)
        if not len(unknown):
            return found
        if self.species is not None and 2 * len(unknown) > len(found):
            species = guess_species(gene_ids)
            if species not in (None, self.species):
                raise ValueError(
                    f"The input has genes of {species} ({', '.join(map(str, gene_ids[:3]))}), but the tokenizer's are "
                    f"of {self.species} ({', '.join(self._genes[:3])}). To match genes by symbol nevertheless, set "
                    "tokenizer.match = 'symbol'."
                )
        by_symbol = self.find([symbols[i] for i in unknown.tolist()])
        by_symbol[np.isin(by_symbol, found[found >= 0])] = -1
        found[unknown] = by_symbol
        return found

    def match(
        self,
        names: ColumnNames | SharedNames,
        columns: np.ndarray,
        counts: np.ndarray,
        min_coverage: float,
        match: str,
        warn_coverage: float,
    ) -> np.ndarray | None:
        """Find the gene of each column, and measure the coverage of the vocabulary and of the input.

        The coverage of the vocabulary decides. A model of a gene panel knows few counts of a whole transcriptome, but
        all of its genes are there; a model of a whole transcriptome knows all counts of a panel, but lacks most of the
        genes that it was trained on.

        Parameters
        ----------
        names : ColumnNames or SharedNames (n_columns,)
            The batches of a store are matched once: their coverage is that of all batches so far.
        columns, counts : array (nnz,)
            The counts and the column of each, for the share of known counts.
        min_coverage, warn_coverage : float
            Shares of the vocabulary's weight below which a ValueError is raised, or a warning is logged, once per gene
            table.
        match : {"id", "symbol"}
            As for `find_columns`, whose errors are raised too.

        Returns
        -------
        int32 array (n_columns,) or None
            Gene of each column, -1 if unknown; None if column j is gene j.
        """
        shared, how = isinstance(names, SharedNames), (match, min_coverage, warn_coverage)
        last = self._last
        if last is not None and not (last[1] == how and names.are_of(last[0])):
            last = None
        if last is not None:
            mapped = last[2]
            if mapped is None and shared:
                return None  # all columns are known
        else:
            mapped = self.find_columns(*names.resolve(), match)
            mapped = None if np.array_equal(mapped, np.arange(len(mapped))) else mapped
        if last is None or not shared:
            self._known_counts = self._all_counts = 0.0
        self._measure(mapped, names, columns, counts, (min_coverage, warn_coverage), is_new=last is None)
        self._last = (names.key, how, mapped)
        return mapped

    def _measure(
        self,
        mapped: np.ndarray | None,
        names: ColumnNames | SharedNames,
        columns: np.ndarray,
        counts: np.ndarray,
        limits: tuple[float, float],
        is_new: bool,
    ) -> None:
        n_columns = len(names)
        known = np.ones(n_columns, bool) if mapped is None else mapped >= 0
        self._all_counts += float(counts.sum(dtype=np.float64))
        self._known_counts += float(counts[known.take(columns)].sum(dtype=np.float64))
        known_columns = float(known.mean()) if n_columns else 0.0
        share = self._known_counts / self._all_counts if self._all_counts else known_columns
        coverage = {"genes": known_columns, "counts": float(share)}
        if not is_new and self.last_coverage is not None:  # same genes as in the last call
            self.last_coverage = {**self.last_coverage, **coverage}
            return
        found = np.arange(n_columns) if mapped is None else np.unique(mapped[known])
        self.last_coverage = coverage | coverage_of(found, len(self._genes), self._weights)
        input_genes = names.resolve()[0]
        check_coverage(self.last_coverage, len(found), self._genes, input_genes, *limits, self._symbols or None)
        if known_columns < 1:
            logger.warning(
                f"The tokenizer knows {known.sum()} of {n_columns} genes of the input ({share:.1%} of its counts); "
                f"the others are left out. The input has {len(found)} of the tokenizer's {len(self._genes)} genes."
            )


def coverage_of(found: np.ndarray, n_genes: int, weights: np.ndarray | None = None) -> dict[str, float]:
    """Return the share of a vocabulary that an input has: `vocabulary`, of its genes, and `weight`, of their weights.

    `found`, int array (n_found,), are the genes of the vocabulary that the input has, without duplicates. The weights
    (n_genes,) are equal by default.
    """
    share = len(found) / n_genes
    return {"vocabulary": share, "weight": share if weights is None else float(weights[found].sum() / weights.sum())}


def check_coverage(
    coverage: Mapping[str, float],
    n_found: int,
    genes: Sequence[str],
    input_genes: Iterable[str],
    min_coverage: float,
    warn_coverage: float,
    symbols: Collection[str] | None = (),
    adjustable: bool = True,
) -> None:
    """Raise ValueError for an input that lacks nearly all genes of a model, and warn if it lacks many.

    `coverage` has `weight`, which decides, and `vocabulary` from `coverage_of`, and `counts`, the known share of the
    input's counts. The input has `n_found` of the model's genes, whose `symbols` the model knows; None if it
    could be given them. `adjustable` says whether the caller can lower `min_coverage`.
    """
    weight = coverage["weight"]
    if weight >= max(min_coverage, warn_coverage):
        return
    weighted = "" if weight == coverage["vocabulary"] else " weighted by their expression in training"
    both = (
        f"The input has {n_found} of the model's {len(genes)} genes ({weight:.1%}{weighted}; at least "
        f"{min_coverage if weight < min_coverage else warn_coverage:.0%}"
    )
    counts = f"{coverage['counts']:.1%} of the input's counts are in known genes"
    if weight >= min_coverage:
        logger.warning(f"{both} are recommended); {counts}. The results are based on these genes alone.")
        return
    more = "" if symbols is not None else ", or the genes' symbols (symbols=GeneTable.from_table(…))"
    input_genes = list(input_genes)
    n_alike = len({name.lower() for name in input_genes} & {name.lower() for name in (*genes, *(symbols or ()))})
    case = f" If upper and lower case were the same, it would have {n_alike}." if n_alike > 2 * n_found else ""
    raise ValueError(
        f"{both} are needed); {counts}.{case} The input has genes like {describe(input_genes)}. The model needs genes "
        f"like {describe(genes)}. Pass ids of the same kind, species and release{more}"
        + "; or, if these genes are enough, lower min_coverage (tokenizer.min_coverage, --min_coverage)" * adjustable
        + "."
    )


__all__ = ["MIN_COVERAGE", "WARN_COVERAGE", "GeneMatcher", "check_coverage", "coverage_of"]
