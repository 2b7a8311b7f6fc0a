"""Check, fit and read the parts of a tokenizer: genes, bin edges, medians, symbols, and token ids."""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from transformers.utils import logging

from .cell_counts import CountRows, row_sums
from .gene_columns import describe, strip_version
from .gene_order import log1p_cp10k
from .legacy_files import load_mapping

logger = logging.get_logger(__name__)

FORMAT_VERSION = 2
_CELLS_TO_FIT = 10_000
_BELOW_ANY_COUNT = 1e-9  # cells that the edges were not fitted on may have smaller values
_LITTLE = 0.1  # share of the smaller of a gene table and the tokenizer's genes; less is logged
_SCALE = (1e-100, 1e100)  # medians and target sums whose scores neither overflow nor vanish
# Names of the special tokens in existing vocabularies, by role.
NAMES_OF_ROLES = {
    "cls_token": ("<cls>", "[CLS]"),
    "eos_token": ("<eos>", "[EOS]"),
    "mask_token": ("<mask>", "[MASK]"),
    "pad_token": ("<pad>", "[PAD]"),
    "sep_token": ("<sep>", "[SEP]"),
}


def read_vocabulary(path: str | os.PathLike) -> dict[str, Any]:
    """Read a `gene_vocabulary.json`."""
    with open(path, encoding="utf-8") as file:
        saved = json.load(file)
    if saved.get("format_version", 0) > FORMAT_VERSION:
        raise ValueError(
            f"{path} has format version {saved['format_version']}; this tokenizer reads up to {FORMAT_VERSION}. "
            "Update stformer_hf."
        )
    return saved


# ---------------------------------------------------------------------- genes


def check_genes(genes: Sequence[str] | None) -> list[str]:
    """Check gene ids, which must be unique; return them as a list."""
    if genes is None or len(genes) == 0:
        raise ValueError("GeneTokenizer needs genes: a list of gene ids, such as CellStore.gene_ids.")
    genes = [str(gene) for gene in genes]
    seen: set[str] = set()
    twice = [gene for gene in genes if (name := strip_version(gene)) in seen or seen.add(name)]
    if twice:
        raise ValueError(f"{len(twice)} gene ids are repeated (versions are ignored): {sample(twice)}.")
    return genes


def check_symbols(symbols: Any, genes: Sequence[str]) -> dict[str, str]:
    """Return other names of the genes, symbol -> gene, without ambiguous ones."""
    if symbols is None:
        return {}
    if hasattr(symbols, "gene_ids"):
        pairs = zip(symbols.symbols, symbols.gene_ids, strict=True)
    else:
        pairs = load_mapping(symbols).items()
    known = {strip_version(gene): gene for gene in genes}
    found: dict[str, set[str]] = {}
    for symbol, gene in pairs:
        found.setdefault(str(symbol), set()).add(strip_version(str(gene)))
    n = sum(not known.keys().isdisjoint(of) for of in found.values())
    if n < _LITTLE * min(len(found), len(known)):
        turned = sum(strip_version(symbol) in known for symbol in found) > n
        logger.warning(
            f"{n} of {len(found)} symbols belong to genes of the tokenizer. They belong to genes like "
            f"{sample(gene for of in found.values() for gene in of)}; the tokenizer has genes like {sample(genes)}."
            + " Pass {symbol: gene}, not {gene: symbol}."
            * turned
        )
    single = {symbol: known.get(next(iter(of))) for symbol, of in found.items() if len(of) == 1 and symbol}
    return {symbol: gene for symbol, gene in single.items() if gene not in (None, symbol)}


def read_medians(medians: Any) -> tuple[Any, float | None]:
    """Return the medians in an object, and the target sum that they were estimated with, if it is known."""
    if medians is None:
        raise ValueError("The rank scheme needs medians: pass medians=estimate_gene_medians(store).")
    if isinstance(medians, (str, os.PathLike)):
        medians = load_mapping(medians)
    target_sum = getattr(medians, "target_sum", None)
    medians = getattr(medians, "medians", medians)  # a GeneStatistics
    if isinstance(medians, Mapping) and isinstance(medians.get("medians"), Mapping):  # a gene_medians.json
        medians, target_sum = medians["medians"], medians.get("target_sum")
    if isinstance(medians, Mapping):
        wrong = [value for value in medians.values() if isinstance(value, (str, list, dict))]
        if wrong:
            raise ValueError(f"Medians must be numbers, got {wrong[0]!r}: pass {{gene: median}}.")
    return medians, target_sum


def check_target_sum(target_sum: float) -> float:
    """Check a sum that scores are scaled to."""
    if not _SCALE[0] <= target_sum <= _SCALE[1]:
        raise ValueError(f"target_sum must be a positive number, got {target_sum}.")
    return float(target_sum)


def check_medians(medians: Any, genes: Sequence[str]) -> np.ndarray:
    """Return one median per gene, float64 array (n_genes,); NaN where there is none."""
    hint = ""
    if isinstance(medians, Mapping):
        of = {strip_version(str(gene)): value for gene, value in medians.items()}
        n = sum(strip_version(gene) in of for gene in genes)
        if n < _LITTLE * min(len(of), len(genes)):
            hint = f" {n} of {len(of)} medians belong to genes of the tokenizer: they are for {describe(of)}."
        medians = [of.get(strip_version(gene)) for gene in genes]
    if len(medians) != len(genes):
        raise ValueError(f"There are {len(medians)} medians for {len(genes)} genes.")
    values = np.array([np.nan if value is None else value for value in medians], np.float64)
    wrong = np.flatnonzero((values < _SCALE[0]) | (values > _SCALE[1]))
    if len(wrong):
        raise ValueError(
            f"{len(wrong)} medians are not positive numbers, such as {values[wrong[0]]} of {genes[wrong[0]]}."
        )
    n_missing = int(np.isnan(values).sum())
    if n_missing == len(values):
        raise ValueError(f"None of the genes has a median. The genes are like {describe(genes)}.{hint}")
    if n_missing:
        logger.warning(f"{n_missing} of {len(values)} genes have no median, and never become tokens.{hint}")
    return values


def check_gene_weights(weights: Any, genes: Sequence[str]) -> np.ndarray | None:
    """Return one non-negative weight per gene, float64 array (n_genes,); None for equal weights."""
    if weights is None:
        return None
    values = np.asarray(weights, np.float64)
    if values.shape != (len(genes),):
        raise ValueError(f"gene_weights has the shape {values.shape} for {len(genes)} genes.")
    if not np.isfinite(values).all() or (values < 0).any():
        raise ValueError("gene_weights must be numbers of at least 0.")
    return values if values.any() else None


def fit_gene_weights(store) -> np.ndarray:
    """Count the cells of a store, at most 10,000 evenly spread, that express each gene: int64 array (n_genes,)."""
    expressed = np.zeros(len(store.gene_ids), np.int64)
    for some in _blocks_of_cells(store):
        expressed += np.bincount(store.rows(some).indices, minlength=len(expressed))
    return expressed


def _blocks_of_cells(store) -> list[np.ndarray]:
    """Choose at most 10,000 cells of a store, evenly spread, in blocks of at most 1,000 row numbers."""
    cells = np.unique(np.linspace(0, len(store) - 1, min(len(store), _CELLS_TO_FIT)).astype(np.int64))
    return np.array_split(cells, -(-len(cells) // 1000) or 1)


# ---------------------------------------------------------------------- bin edges


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


def edge_array(bin_edges: list[float] | dict[str, list[float]]) -> np.ndarray:
    """Return an array of edges: (n_edges,), or (n_genes, n_edges) padded with infinity."""
    if not isinstance(bin_edges, dict):
        return np.array(bin_edges)
    edges = np.full((len(bin_edges), max(map(len, bin_edges.values()))), np.inf)
    for row, values in zip(edges, bin_edges.values(), strict=True):
        row[: len(values)] = values
    return edges


def fit_bin_edges(store, how: str, n_bins: int, normalize: str | None) -> list[float] | dict[str, list[float]]:
    """Compute edges as quantiles of a store's counts; see `GeneTokenizer.from_store`."""
    if how not in ("quantile", "gene_quantile"):
        raise ValueError(f'bin_edges must be numbers, "quantile" or "gene_quantile", got {how!r}.')
    if n_bins < 1:
        raise ValueError(f"n_bins={n_bins}: must be at least 1.")
    genes, values = [np.empty(0, np.int64)], [np.empty(0)]
    for some in _blocks_of_cells(store):
        matrix = store.rows(some)
        rows = CountRows(matrix.indptr.astype(np.int64), matrix.indices, matrix.data)
        genes.append(rows.columns)
        values.append(rows.counts if normalize is None else log1p_cp10k(rows, row_sums(rows)))
    genes, values = np.concatenate(genes), np.concatenate(values).astype(np.float64)
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


# ---------------------------------------------------------------------- tokens


def phenotype_token(value: str) -> str:
    """Return the token of a phenotype's value, as in PerturbGene."""
    return "[" + value.replace(" ", "_").strip() + "]"


def name_phenotypes(phenotypes: Mapping[str, Sequence[str]], taken: Iterable[str]) -> dict[str, dict[str, str]]:
    """Name the values of categories: category -> token of the value -> token of the vocabulary."""
    taken = set(taken)
    names: dict[str, dict[str, str]] = {}
    for category, values in phenotypes.items():
        names[category] = {}
        seen: dict[str, str] = {}
        for value in values:
            token = phenotype_token(value)
            if token in seen:
                raise ValueError(
                    f"Values {seen[token]!r} and {value!r} of phenotype {category!r} both become {token}; "
                    "rename one, or list it once."
                )
            seen[token] = value
            names[category][token] = f"[{category}={token[1:-1]}]" if token in taken else token
            if names[category][token] in taken:
                raise ValueError(f"Two values become the token {names[category][token]}: rename one.")
            taken.add(names[category][token])
    return names


def order_tokens(tokens: list[str], token_ids: Mapping[str, int] | None) -> list[str]:
    """Sort tokens by id; those without an id come after, and gaps become `[unused_i]`."""
    if token_ids is None:
        return tokens
    known = set(tokens)
    unknown = [token for token in token_ids if token not in known]
    if unknown:
        raise ValueError(f"token_ids has {sample(unknown)}, which is not a gene, phenotype or special token.")
    ordered: dict[int, str] = {}
    for token, i in token_ids.items():
        if i < 0 or i in ordered:
            raise ValueError(f"The id {i} of {token!r} is negative, or shared with {ordered.get(i)!r}.")
        ordered[i] = token
    n_known = max(ordered, default=-1) + 1
    if n_known > 2 * len(ordered) + 1000:
        raise ValueError(f"token_ids has only {len(ordered)} tokens, but ids up to {n_known - 1}.")
    names = [ordered.get(i, f"[unused_{i}]") for i in range(n_known)]
    return names + [token for token in tokens if token not in token_ids]


def read_token_dictionary(
    token_dictionary: Mapping[str, int] | str | os.PathLike,
) -> tuple[dict[str, int], dict[str, str], list[str]]:
    """Read a vocabulary of STFormer or Geneformer: ids by token, special tokens by role, genes by ascending id."""
    ids = {}
    for token, value in load_mapping(token_dictionary).items():
        if isinstance(value, (bool, str)) or value is None or value != int(value):
            raise ValueError(f"The id of {token!r} must be an integer, got {value!r}.")
        ids[token] = int(value)
    special_tokens = {role: name for role, names in NAMES_OF_ROLES.items() for name in names if name in ids}
    if not {"pad_token", "mask_token"} <= set(special_tokens):
        raise ValueError("The token dictionary lacks <pad> or <mask>.")
    genes = sorted(ids.keys() - {name for names in NAMES_OF_ROLES.values() for name in names}, key=ids.__getitem__)
    return ids, special_tokens, genes


def sample(names: Iterable[str], n: int = 3) -> str:
    """Return a few of the names, for messages."""
    return ", ".join(str(name) for name in list(names)[:n]) or "(none)"


__all__ = [
    "FORMAT_VERSION",
    "check_bin_edges",
    "check_gene_weights",
    "check_genes",
    "check_medians",
    "check_symbols",
    "check_target_sum",
    "edge_array",
    "fit_bin_edges",
    "fit_gene_weights",
    "name_phenotypes",
    "order_tokens",
    "phenotype_token",
    "read_medians",
    "read_token_dictionary",
    "read_vocabulary",
    "sample",
]
