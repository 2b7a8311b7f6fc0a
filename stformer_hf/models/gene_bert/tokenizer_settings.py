"""The settings of a GeneTokenizer: what is checked, saved and read."""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from transformers.utils import logging

from .gene_columns import sample, strip_version
from .gene_matcher import MIN_COVERAGE, WARN_COVERAGE
from .gene_order import TRUNCATIONS
from .legacy_files import load_mapping

logger = logging.get_logger(__name__)

FORMAT_VERSION = 2
SEPARATOR = "[SEP]"
DEFAULT_MAX_LENGTH = 2048
FEW = 0.1  # share of the smaller of a gene table and the tokenizer's genes; less is logged
_CELLS_TO_FIT = 10_000
# Settings that apply to one scheme only.
_ONLY_OF = {
    "binned": ("bin_edges", "normalize", "totals", "values"),
    "rank": ("medians", "target_sum", "neighborhood", "add_cls", "add_eos"),
}


@dataclass
class TokenizerSettings:
    """The parameters of `GeneTokenizer`, which describes them; None stands for the default.

    Those that both schemes have are checked here. The encoder of the scheme checks and completes its own. The types
    are those of complete settings.
    """

    genes: list[str]
    scheme: str
    bin_edges: Sequence[float] | Mapping[str, Sequence[float]] | None
    normalize: str | None
    totals: str | None
    values: bool
    whole_cell: bool
    medians: Any
    target_sum: float | None
    neighborhood: bool
    separator: str | None
    add_cls: bool
    add_eos: bool
    phenotypes: Mapping[str, Sequence[str]]
    included_phenotypes: Sequence[str]
    symbols: dict[str, str]
    max_length: int
    truncation: str
    seed: int
    min_coverage: float
    warn_coverage: float
    gene_weights: np.ndarray | None
    match: str
    special_tokens: Mapping[str, str]
    token_ids: Mapping[str, int] | None

    def __post_init__(self) -> None:
        self.scheme = self.scheme or "binned"
        self.genes = _check_genes(self.genes)
        if self.scheme not in _ONLY_OF:
            raise ValueError(f'scheme must be "binned" or "rank", got {self.scheme!r}.')
        for scheme, names in _ONLY_OF.items():
            wrong = [name for name in names if getattr(self, name) is not None]
            if wrong and scheme != self.scheme:
                raise ValueError(f'{", ".join(wrong)}: only for the {scheme} scheme, but scheme="{self.scheme}".')
        self.values, self.whole_cell = bool(self.values), bool(self.whole_cell)
        self.neighborhood = bool(self.neighborhood)
        given = self.phenotypes or {}
        for name, values in given.items():
            if isinstance(values, str):
                raise ValueError(f"phenotypes[{name!r}] must be a list of values, got {values!r}.")
        self.phenotypes = {name: [str(value) for value in values] for name, values in sorted(given.items())}
        if self.included_phenotypes is None:
            self.included_phenotypes = list(given)
        self.symbols = check_symbols(self.symbols, self.genes)
        self.gene_weights = _check_gene_weights(self.gene_weights, self.genes)
        self.max_length = DEFAULT_MAX_LENGTH if self.max_length is None else self.max_length
        self.truncation = self.truncation or "top"
        if self.truncation not in TRUNCATIONS:
            raise ValueError(f"truncation must be one of {', '.join(TRUNCATIONS)}, got {self.truncation!r}.")
        self.seed = self.seed or 0
        self.min_coverage = MIN_COVERAGE if self.min_coverage is None else self.min_coverage
        self.warn_coverage = WARN_COVERAGE if self.warn_coverage is None else self.warn_coverage
        self.match = self.match or "id"
        if self.match not in ("id", "symbol"):
            raise ValueError(f'match must be "id" or "symbol", got {self.match!r}.')

    def select(self, *names: str) -> dict[str, Any]:
        """Return some of the settings."""
        return {name: getattr(self, name) for name in names}

    @classmethod
    def read(cls, path: str | os.PathLike, given: Mapping[str, Any]) -> "TokenizerSettings":
        """Read a `gene_vocabulary.json`; given settings of how cells are read are preferred, others are refused."""
        given = {**given, "separator": None if given["separator"] == SEPARATOR else given["separator"]}
        twice = [name for name in OF_MEANING if given[name] is not None]
        if twice:
            raise ValueError(f"{', '.join(twice)}: read from {path}, so do not pass them too.")
        with open(path, encoding="utf-8") as file:
            saved = json.load(file)
        if saved.get("format_version", 0) > FORMAT_VERSION:
            raise ValueError(
                f"{path} has format version {saved['format_version']}; this tokenizer reads up to {FORMAT_VERSION}. "
                "Update stformer_hf."
            )
        if saved.get("normalize") is not None:
            saved.setdefault("totals", "columns")
        if "warn_coverage" not in saved and saved.get("min_coverage") == 0.5:
            del saved["min_coverage"]  # before `warn_coverage` existed, 0.5 was the default of another rule
        return cls(**{name: saved.get(name) if value is None else value for name, value in given.items()})


# How cells are read, which may be changed; the other settings say what tokens mean.
OF_READING = (
    *("max_length", "included_phenotypes", "truncation", "seed", "min_coverage", "warn_coverage"),
    *("gene_weights", "match"),
)
OF_MEANING = tuple(field.name for field in fields(TokenizerSettings) if field.name not in OF_READING)


def _check_genes(genes: Sequence[str] | None) -> list[str]:
    """Check gene ids, which must be unique; return them as a list."""
    if genes is None or len(genes) == 0:
        raise ValueError("GeneTokenizer needs genes: a list of gene ids, such as CellStore.gene_ids.")
    genes = [str(gene) for gene in genes]
    first: dict[str, int] = {}
    twice = [gene for i, gene in enumerate(genes) if first.setdefault(strip_version(gene), i) != i]
    if twice:
        raise ValueError(f"{len(twice)} gene ids are repeated (versions are ignored): {sample(twice)}.")
    return genes


def check_symbols(symbols: Any, genes: Sequence[str]) -> dict[str, str]:
    """Return other names of the genes, symbol -> gene, without ambiguous ones."""
    if symbols is None:
        return {}
    if hasattr(symbols, "gene_ids"):
        pairs: Iterable[tuple[Any, Any]] = zip(symbols.symbols, symbols.gene_ids, strict=True)
    else:
        pairs = load_mapping(symbols).items()
    known = {strip_version(gene): gene for gene in genes}
    found: dict[str, set[str]] = {}
    for symbol, gene in pairs:
        found.setdefault(str(symbol), set()).add(strip_version(str(gene)))
    n = sum(not known.keys().isdisjoint(of) for of in found.values())
    if n < FEW * min(len(found), len(known)):
        turned = sum(strip_version(symbol) in known for symbol in found) > n
        logger.warning(
            f"{n} of {len(found)} symbols belong to genes of the tokenizer. They belong to genes like "
            f"{sample(gene for of in found.values() for gene in of)}; the tokenizer has genes like {sample(genes)}."
            + " Pass {symbol: gene}, not {gene: symbol}."
            * turned
        )
    single = {symbol: known.get(next(iter(of))) for symbol, of in found.items() if len(of) == 1 and symbol}
    return {symbol: gene for symbol, gene in single.items() if gene not in (None, symbol)}


def _check_gene_weights(weights: Any, genes: Sequence[str]) -> np.ndarray | None:
    """Return one non-negative weight per gene, float64 array (n_genes,); None for equal weights."""
    if weights is None:
        return None
    values = np.asarray(weights, np.float64)
    if values.shape != (len(genes),):
        raise ValueError(f"gene_weights has the shape {values.shape} for {len(genes)} genes.")
    if not np.isfinite(values).all() or (values < 0).any():
        raise ValueError("gene_weights must be numbers of at least 0.")
    return values if values.any() else None


def fit_gene_weights(store: Any) -> np.ndarray:
    """Count the cells of a store, at most 10,000 evenly spread, that express each gene: int64 array (n_genes,)."""
    expressed = np.zeros(len(store.gene_ids), np.int64)
    for some in blocks_of_cells(store):
        expressed += np.bincount(store.rows(some).indices, minlength=len(expressed))
    return expressed


def blocks_of_cells(store: Any) -> list[np.ndarray]:
    """Choose at most 10,000 cells of a store, evenly spread, in blocks of at most 1,000 row numbers."""
    cells = np.unique(np.linspace(0, len(store) - 1, min(len(store), _CELLS_TO_FIT)).astype(np.int64))
    return np.array_split(cells, -(-len(cells) // 1000) or 1)
