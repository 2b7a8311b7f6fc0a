"""GeneTokenizer: converts rows of counts to gene tokens, whole batches at a time and without strings."""

import hashlib
import itertools
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BatchEncoding, PreTrainedTokenizer
from transformers.utils import logging

from .cell_counts import (
    CountRows,
    checksums,
    is_cell_batch,
    keep,
    map_genes,
    pad_ragged,
    read_cells,
    row_sums,
)
from .gene_columns import MIN_COVERAGE, WARN_COVERAGE, ColumnNames, GeneMatcher
from .gene_order import TRUNCATIONS, Binner, choose, log1p_cp10k, write_ranks
from .gene_vocabulary import (
    FORMAT_VERSION,
    check_bin_edges,
    check_gene_weights,
    check_genes,
    check_medians,
    check_symbols,
    check_target_sum,
    edge_array,
    fit_bin_edges,
    fit_gene_weights,
    name_phenotypes,
    order_tokens,
    phenotype_token,
    read_medians,
    read_token_dictionary,
    read_vocabulary,
    sample,
)
from .legacy_files import load_mapping

logger = logging.get_logger(__name__)

VOCAB_FILES_NAMES = {"vocab_file": "gene_vocabulary.json"}
SPECIAL_TOKENS = {"cls_token": "[CLS]", "eos_token": "[EOS]", "mask_token": "[MASK]", "pad_token": "[PAD]"}
SEPARATOR = "[SEP]"
DEFAULT_MAX_LENGTH = 2048
# Settings that apply to one scheme only.
_ONLY_OF = {
    "binned": ("bin_edges", "normalize", "totals", "values"),
    "rank": ("medians", "target_sum", "neighborhood", "add_cls", "add_eos"),
}


class TokenizedCells(NamedTuple):
    """Ragged tokens of n cells, as flat arrays.

    Attributes
    ----------
    input_ids, token_type_ids : int64 array (T,)
        Tokens of all cells, concatenated.
    indptr : int64 array (n + 1,)
        Cell i has the tokens `indptr[i]:indptr[i + 1]`.
    dropped_type_ids, dropped_cells : int64 array (D,)
        Binned scheme: token types of the expressed genes that truncation dropped, and the cell of each.
    expression_values : float32 array (T,), optional
        With `values=True`: ln(1 + count) of each gene, or its normalised value; 0 for other tokens.
    cells : CountRows, optional
        With `whole_cell=True`: the non-zero counts of all known genes of the n cells, including those that truncation
        dropped; -1 for a gene that is hidden from the model (see `hide`).
    measured : bool array (1 or n, n_genes), optional
        With `whole_cell=True`: which of the tokenizer's genes the input has, for all cells or per cell; None for all.
    """

    input_ids: np.ndarray
    token_type_ids: np.ndarray
    indptr: np.ndarray
    dropped_type_ids: np.ndarray
    dropped_cells: np.ndarray
    expression_values: np.ndarray | None = None
    cells: CountRows | None = None
    measured: np.ndarray | None = None


class _Frame(NamedTuple):
    """Allocated arrays for the tokens of n cells.

    Attributes
    ----------
    ids, types : int64 array (T,)
    indptr : int64 array (n + 1,)
        Cell i has the tokens `indptr[i]:indptr[i + 1]`.
    starts : list of int64 array (n,)
        Start of the genes of each cell; second, start of the genes of its neighbourhood.
    """

    ids: np.ndarray
    types: np.ndarray
    indptr: np.ndarray
    starts: list[np.ndarray]


class _Logged(set):
    """Warnings already logged; not pickled, so that calls do not change the hash by which `datasets` caches."""

    def __reduce__(self):
        return type(self), ()


class GeneTokenizer(PreTrainedTokenizer):
    """Tokenizer of cells, with two schemes.

    `scheme="binned"` (PerturbGene): a token id is an expression bin or a phenotype value; its token type is the gene
    or the phenotype category. A cell becomes `[CLS]`, its phenotypes in the order of `included_phenotypes`, its
    expressed genes in the order of `genes`, `[EOS]`. Ids: `[CLS]` 0, `[EOS]` 1, `[MASK]` 2, `[PAD]` 3, then the
    phenotype tokens (categories sorted by name, values in the order given), then `bin_0` … `bin_n`. Types: 0 for
    special tokens, then one per category (sorted), then one per gene. A value x gets bin i if
    `bin_edges[i - 1] <= x < bin_edges[i]`; genes in bin 0 are left out.

    `scheme="rank"` (STFormer, Geneformer): a token id is a gene. A cell becomes `[CLS]`, its phenotypes, its expressed
    genes by descending count / total * target_sum / median of the gene (ties by id), `[EOS]`. With `neighborhood`, a
    separator and the genes of its neighbours' summed counts, ranked in the same way, come before `[EOS]`. Ids: the
    special tokens, the genes, then the phenotype tokens. Types: 0 for special tokens, then one per category (sorted),
    one for the cell's genes, one for those of its neighbourhood.

    Parameters
    ----------
    genes : sequence of str
        Gene ids (Ensembl ids without version where known). Their order fixes the token types, or the token ids.
    scheme : {"binned", "rank"}, default: "binned"
        How counts become tokens.
    bin_edges : sequence of float, or dict of gene to sequence, default: (0.1,)
        Binned scheme only: strictly increasing, positive bin edges, for all genes or per gene. A single edge, 0.1,
        separates expressed genes from others (PerturbGene's setting).
    normalize : {None, "log1p_cp10k"}, default: None
        Binned scheme only: bin the counts (None), or ln(1 + count / total * 10,000).
    totals : {"genes", "columns"}, default: "genes"
        Binned scheme with `normalize` only: compute a cell's total over the genes that the tokenizer knows, or over
        all columns of the input. Tokenizers saved before this setting existed use "columns".
    values : bool, default: False
        Binned scheme only: whether to return `expression_values` too, ln(1 + count) of each gene (or its normalised
        value), for a model with `value_embedding`.
    whole_cell : bool, default: False
        Whether to return `cell_genes` and `cell_counts` too, the counts of all known genes of a cell regardless of
        `max_length`, for a model with `cell_embedding`; and `measured_genes`, if the input lacks some genes.
    medians : GeneStatistics, dict of gene to float, path of a .json or .pkl, or sequence (n_genes,)
        Rank scheme only: non-zero medians, as `estimate_gene_medians` returns them. Genes without a median never
        become tokens.
    target_sum : float, default: 10,000
        Rank scheme only: the target sum with which the medians were estimated.
    neighborhood : bool, default: False
        Rank scheme only: whether the genes of the neighbours follow the cell's own. Each gets half of the length.
    separator : str or None, default: "[SEP]"
        Token between the two; None for STFormer's layout.
    add_cls, add_eos : bool, default: True
        Rank scheme only: whether a cell begins with `[CLS]`, and ends with `[EOS]`.
    phenotypes : dict of str to sequence, optional
        Category -> its values.
    included_phenotypes : sequence of str, optional
        Categories that a cell's tokens start with, in this order. All of `phenotypes` by default.
    symbols : dict of symbol to gene, or GeneTable, optional
        Other names of the genes, to match columns with unknown ids. Symbols shared by multiple genes are not used.
    max_length : int, default: 2048
        Maximum number of tokens per cell. `[CLS]`, `[EOS]` and phenotypes are never cut.
    truncation : {"top", "head", "random"}, default: "top"
        Which genes of longer cells are kept, in the scheme's order: the strongest (largest counts, ties by gene order;
        with ranks the first ones), the first in the scheme's order (PerturbGene), or a random subset, a function of
        (`seed`, epoch, cell).
    seed : int, default: 0
        Seed of `truncation="random"`. Cells of a store are identified by their row in it, others by a checksum of
        their counts, independent of their row in the call.
    min_coverage : float, default: 0.1
        Calling the tokenizer raises if the columns cover less than this fraction of its genes, weighted by
        `gene_weights`.
    warn_coverage : float, default: 0.5
        Calling the tokenizer logs a warning below this fraction.
    gene_weights : sequence of float (n_genes,), optional
        Weight of each gene in the coverage; `from_store` takes the number of cells that express it. Equal by default.
    match : {"id", "symbol"}, default: "id"
        How columns are matched to genes: by id, else by symbol; or by symbol alone, as is needed for cells of another
        species, whose ids are refused otherwise.
    special_tokens : dict of role to token, optional
        Names of the special tokens, in the order of their ids, such as `{"pad_token": "<pad>"}`. Roles: `cls_token`,
        `eos_token`, `mask_token`, `pad_token` and, with a separator, `sep_token`.
    token_ids : dict of str to int, optional
        Ids of tokens in an existing vocabulary; tokens that are not in it get the ids after.
    vocab_file : str, optional
        A `gene_vocabulary.json`, in place of all of the above (passed by `from_pretrained`).
    **kwargs
        As for `transformers.PreTrainedTokenizer`.

    Attributes
    ----------
    last_coverage : dict or None
        Coverage of the last input: `genes` and `counts`, the fractions of its genes and counts that the tokenizer
        knows; `vocabulary`, the fraction of the tokenizer's genes that it has, and `weight`, the same weighted by
        `gene_weights`.
    gene_weights : float64 array (n_genes,) or None

    Raises
    ------
    ValueError
        The scheme is unknown, or a setting belongs to the other one; there are no genes, or duplicates; edges do not
        increase; medians are missing; phenotype tokens are ambiguous; the maximum length leaves no room for a gene.

    Notes
    -----
    The binned vocabulary and layout are PerturbGene's (`data_utils/tokenization.py` of its Code Organization). A value
    becomes a token as `"[" + value.replace(" ", "_").strip() + "]"`; if two categories share a value, or it equals
    another token, the later one becomes `"[category=value]"`, so that every id has a unique name. The ranks are
    Geneformer's (Theodoris et al. 2023).
    """

    vocab_files_names = VOCAB_FILES_NAMES
    model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    padding_side = "right"
    _auto_class = "AutoTokenizer"

    def __init__(
        self,
        genes: Sequence[str] | None = None,
        *,
        scheme: str | None = None,
        bin_edges: Sequence[float] | Mapping[str, Sequence[float]] | None = None,
        normalize: str | None = None,
        totals: str | None = None,
        values: bool | None = None,
        whole_cell: bool | None = None,
        medians: Any = None,
        target_sum: float | None = None,
        neighborhood: bool | None = None,
        separator: str | None = SEPARATOR,
        add_cls: bool | None = None,
        add_eos: bool | None = None,
        phenotypes: Mapping[str, Sequence[Any]] | None = None,
        included_phenotypes: Sequence[str] | None = None,
        symbols: Any = None,
        max_length: int | None = None,
        truncation: str | None = None,
        seed: int | None = None,
        min_coverage: float | None = None,
        warn_coverage: float | None = None,
        gene_weights: Sequence[float] | None = None,
        match: str | None = None,
        special_tokens: Mapping[str, str] | None = None,
        token_ids: Mapping[str, int] | None = None,
        vocab_file: str | os.PathLike | None = None,
        **kwargs,
    ):
        given = {
            "genes": genes,
            "scheme": scheme,
            "bin_edges": bin_edges,
            "normalize": normalize,
            "totals": totals,
            "values": values or None,
            "whole_cell": whole_cell or None,
            "medians": medians,
            "target_sum": target_sum,
            "neighborhood": neighborhood,
            "separator": None if separator == SEPARATOR else separator,
            "add_cls": add_cls,
            "add_eos": add_eos,
            "phenotypes": phenotypes,
            "symbols": symbols,
            "special_tokens": special_tokens,
            "token_ids": token_ids,
        }
        if vocab_file is not None:
            twice = [name for name, value in given.items() if value is not None]
            if twice:
                raise ValueError(f"{', '.join(twice)}: read from {vocab_file}, so do not pass them too.")
            saved = read_vocabulary(vocab_file)
            given = {name: saved.get(name) for name in given}
            if given["normalize"] is not None and given["totals"] is None:
                given["totals"] = "columns"
            separator = saved.get("separator")
            included_phenotypes = saved["included_phenotypes"] if included_phenotypes is None else included_phenotypes
            truncation = saved.get("truncation") if truncation is None else truncation
            seed = saved.get("seed") if seed is None else seed
            # In files from before `warn_coverage` existed, 0.5 is the default of another rule.
            of_old_rule = "warn_coverage" not in saved and saved.get("min_coverage") == 0.5
            if min_coverage is None and not of_old_rule:
                min_coverage = saved.get("min_coverage")
            warn_coverage = saved.get("warn_coverage") if warn_coverage is None else warn_coverage
            gene_weights = saved.get("gene_weights") if gene_weights is None else gene_weights
            match = saved.get("match") if match is None else match
            if max_length is None:
                max_length = kwargs.get("model_max_length", saved["max_length"])
        self.scheme = given["scheme"] or "binned"
        self.genes = check_genes(given["genes"])
        self._set_scheme(given, separator)
        phenotypes = given["phenotypes"] or {}
        for name, values in phenotypes.items():
            if isinstance(values, str):
                raise ValueError(f"phenotypes[{name!r}] must be a list of values, got {values!r}.")
        self.phenotypes = {name: [str(value) for value in values] for name, values in sorted(phenotypes.items())}
        self.symbols = check_symbols(given["symbols"], self.genes)
        self.gene_weights = check_gene_weights(gene_weights, self.genes)
        self._matcher = GeneMatcher(self.genes, self.symbols, self.gene_weights)
        self._token_ids = given["token_ids"]
        self._build_vocabulary(given["special_tokens"])
        self.add_cls = ("cls_token" in self._special_tokens) if given["add_cls"] is None else given["add_cls"]
        self.add_eos = ("eos_token" in self._special_tokens) if given["add_eos"] is None else given["add_eos"]
        for role, wanted in (("cls_token", self.add_cls), ("eos_token", self.add_eos)):
            if wanted and role not in self._special_tokens:
                raise ValueError(f"The vocabulary has no {role}: set it in special_tokens, or do not add it.")
        if self.whole_cell and not self.add_cls:
            raise ValueError("whole_cell=True needs add_cls=True: the model initialises [CLS] with the whole cell.")
        self.included_phenotypes = list(phenotypes) if included_phenotypes is None else included_phenotypes
        self.truncation = truncation or "top"
        if self.truncation not in TRUNCATIONS:
            raise ValueError(f"truncation must be one of {', '.join(TRUNCATIONS)}, got {truncation!r}.")
        self.seed = seed or 0

        self.min_coverage = MIN_COVERAGE if min_coverage is None else min_coverage
        self.warn_coverage = WARN_COVERAGE if warn_coverage is None else warn_coverage
        self.match = match or "id"
        if self.match not in ("id", "symbol"):
            raise ValueError(f'match must be "id" or "symbol", got {match!r}.')
        self._logged = _Logged()

        kwargs["model_max_length"] = DEFAULT_MAX_LENGTH if max_length is None else max_length
        more = ["expression_values"] * self.values + ["cell_genes", "cell_counts"] * self.whole_cell
        if more:
            kwargs.setdefault("model_input_names", [*self.model_input_names, *more])
        for role, token in self._special_tokens.items():
            kwargs.setdefault(role, token)
        super().__init__(**kwargs)
        self._check_max_length(self.model_max_length)

    def _set_scheme(self, given: Mapping[str, Any], separator: str | None) -> None:
        """Set the settings of the scheme, and refuse those of the other."""
        if self.scheme not in _ONLY_OF:
            raise ValueError(f'scheme must be "binned" or "rank", got {self.scheme!r}.')
        other = "rank" if self.scheme == "binned" else "binned"
        wrong = [name for name in _ONLY_OF[other] if given[name] is not None]
        if wrong:
            raise ValueError(f'{", ".join(wrong)}: only for the {other} scheme, but scheme="{self.scheme}".')
        self.normalize, self.neighborhood, self.separator = given["normalize"], bool(given["neighborhood"]), None
        self.values, self.whole_cell = bool(given["values"]), bool(given["whole_cell"])
        if self.scheme == "binned":
            self.totals = given["totals"] or "genes"
            if self.totals not in ("genes", "columns"):
                raise ValueError(f'totals must be "genes" or "columns", got {given["totals"]!r}.')
            if self.normalize not in (None, "log1p_cp10k"):
                raise ValueError(f'normalize must be None or "log1p_cp10k", got {self.normalize!r}.')
            edges = given["bin_edges"]
            self.bin_edges = check_bin_edges((0.1,) if edges is None else edges, self.genes)
            self._binner = Binner(edge_array(self.bin_edges))
        else:
            if given["separator"] is not None and not self.neighborhood:
                raise ValueError("separator needs neighborhood=True.")
            self.separator = separator if self.neighborhood else None
            medians, scale = read_medians(given["medians"])
            scale = 1e4 if scale is None else scale
            self.target_sum = check_target_sum(scale if given["target_sum"] is None else given["target_sum"])
            self.medians = check_medians(medians, self.genes)
            self._some_without_median = bool(np.isnan(self.medians).any())

    @classmethod
    def from_store(
        cls,
        store,
        scheme: str = "binned",
        *,
        phenotypes: Sequence[str] | Mapping | None = None,
        bin_edges: Any = None,
        n_bins: int = 10,
        medians: Any = None,
        genes: Sequence[str] | None = None,
        **kwargs,
    ) -> "GeneTokenizer":
        """Create a tokenizer for the genes, and the chosen phenotypes, of a store.

        Parameters
        ----------
        store : CellStore
            Source of the genes, in its order, with their symbols, and of the values of categorical columns (for a
            selection only those of its cells, so held-out cells are not seen).
        scheme : {"binned", "rank"}, default: "binned"
            As in the constructor.
        phenotypes : sequence of str, or dict, optional
            Columns of the store's obs that become phenotype categories, or the categories with their values.
        bin_edges : sequence, dict, "quantile" or "gene_quantile", optional
            Edges, or how to compute them: as quantiles of the non-zero (normalised) counts of at most 10,000 cells,
            evenly spread over the store, over all genes or per gene.
        n_bins : int, default: 10
            Number of quantile bins without `bin_0`; fewer if quantiles coincide.
        medians : GeneStatistics, dict of gene to float, or path of a .json or .pkl
            Rank scheme only: from `estimate_gene_medians`. Genes without a median are left out of the vocabulary.
        genes : sequence of str, optional
            Gene ids of the store to have in the vocabulary; all by default.
        **kwargs
            As in the constructor.

        Returns
        -------
        GeneTokenizer

        Raises
        ------
        ValueError
            A phenotype is not a categorical column of the store, or medians are missing.
        """
        if phenotypes is not None and not isinstance(phenotypes, Mapping):
            missing = [name for name in phenotypes if name not in store.categories]
            if missing:
                raise ValueError(
                    f"No categorical column {', '.join(map(repr, missing))} in the store; it has "
                    f"{', '.join(store.categories) or 'none'}. Build it with obs=[…] to keep more columns."
                )
            phenotypes = {name: _values_of(store, name) for name in phenotypes}
        rows = {gene: row for row, gene in enumerate(store.gene_ids.tolist())}
        genes = list(rows if genes is None else genes)
        unknown = [gene for gene in genes if gene not in rows]
        if unknown:
            raise ValueError(f"{len(unknown)} genes are not in the store, such as {sample(unknown)}.")
        rows = np.array([rows[gene] for gene in genes], np.int64)
        if scheme == "rank":
            medians, target_sum = read_medians(medians)
            values = check_medians(medians, genes)
            known = np.flatnonzero(~np.isnan(values))
            genes, kwargs["medians"] = [genes[i] for i in known], values[known]
            kwargs.setdefault("gene_weights", fit_gene_weights(store)[rows[known]])
            kwargs.setdefault("target_sum", target_sum)
        elif medians is not None:
            kwargs["medians"] = medians  # refused by the constructor
        if isinstance(bin_edges, str):
            bin_edges = fit_bin_edges(store, bin_edges, n_bins, kwargs.get("normalize"))
        kwargs.setdefault("symbols", store.genes)
        if kwargs.get("gene_weights") is None and hasattr(store, "rows"):  # a stream is read once
            kwargs["gene_weights"] = fit_gene_weights(store)[rows]
        return cls(genes, scheme=scheme, phenotypes=phenotypes, bin_edges=bin_edges, **kwargs)

    @classmethod
    def from_token_dictionary(
        cls,
        token_dictionary: Mapping[str, int] | str | os.PathLike,
        medians: Any,
        *,
        symbols: Any = None,
        **kwargs,
    ) -> "GeneTokenizer":
        """Create a rank tokenizer from the vocabulary of STFormer or Geneformer, with the same genes and ids.

        Parameters
        ----------
        token_dictionary : dict, or path of a .pkl, .json or vocab.txt
            Token -> id. `<pad>` and `<mask>` are required; if it has `<cls>` and `<eos>` (Geneformer V2), cells begin
            and end with them.
        medians : GeneStatistics, dict of gene to float, or path of a .pkl or .json
            Non-zero medians.
        symbols : dict, or path of a .pkl or .json, or GeneTable, optional
            Symbol -> gene.
        **kwargs
            As in the constructor.

        Returns
        -------
        GeneTokenizer

        Raises
        ------
        ValueError
            A pickle holds more than data; ids are not integers, or not unique; `<pad>` or `<mask>` is missing.
        """
        ids, special_tokens, genes = read_token_dictionary(token_dictionary)
        if "sep_token" in special_tokens and kwargs.get("neighborhood"):
            kwargs.setdefault("separator", special_tokens["sep_token"])
        if isinstance(symbols, (str, os.PathLike)):
            symbols = load_mapping(symbols)
        return cls(
            genes,
            scheme="rank",
            medians=medians,
            symbols=symbols,
            special_tokens=special_tokens,
            token_ids=ids,
            **kwargs,
        )

    @classmethod
    def from_perturbgene(
        cls,
        vocabulary: Mapping[str, Sequence[str]] | str | os.PathLike,
        bin_edges: Sequence[float] | Mapping[str, Sequence[float]],
        genes: Sequence[str],
        **kwargs,
    ) -> "GeneTokenizer":
        """Create a binned tokenizer from PerturbGene's vocabulary, with the same ids and types.

        Parameters
        ----------
        vocabulary : dict, or path of a .json
            Category -> its tokens, such as `"[B_cell]"`.
        bin_edges : sequence of float, or dict of gene to sequence
            As in the constructor.
        genes : sequence of str
            Genes in the order of the columns that its models were trained on; PerturbGene did not save them.
        **kwargs
            As in the constructor; `truncation="head"` is PerturbGene's.

        Returns
        -------
        GeneTokenizer

        Raises
        ------
        ValueError
            A value is not a phenotype token.
        """
        phenotypes = {}
        for category, tokens in load_mapping(vocabulary).items():
            wrong = [token for token in tokens if not (token.startswith("[") and token.endswith("]"))]
            if wrong:
                raise ValueError(f"{category!r} lists {wrong[0]!r}; expected a phenotype token such as '[B_cell]'.")
            phenotypes[category] = [token[1:-1] for token in tokens]
        return cls(genes, scheme="binned", bin_edges=bin_edges, phenotypes=phenotypes, **kwargs)

    # ------------------------------------------------------------------ vocabulary

    def _build_vocabulary(self, special_tokens: Mapping[str, str] | None) -> None:
        if special_tokens is None:
            special_tokens = SPECIAL_TOKENS
        special_tokens = dict(special_tokens)
        if self.separator is not None:
            special_tokens.setdefault("sep_token", self.separator)
        required = set(SPECIAL_TOKENS) if self.scheme == "binned" else {"mask_token", "pad_token"}
        if not required <= set(special_tokens) <= {*SPECIAL_TOKENS, "sep_token"}:
            raise ValueError(
                f"special_tokens has the roles {', '.join(special_tokens)}; {', '.join(sorted(required))} are "
                f"required, and {', '.join(SPECIAL_TOKENS)} and sep_token are allowed."
            )
        self._special_tokens = special_tokens
        tokens = list(special_tokens.values())
        if self.scheme == "rank":
            tokens += self.genes
        if len(set(tokens)) < len(tokens):
            raise ValueError("A gene has the name of a special token.")
        names = name_phenotypes(self.phenotypes, tokens)
        tokens += [token for of in names.values() for token in of.values()]
        if self.scheme == "binned":
            tokens += [f"bin_{i}" for i in range(self.n_bins)]
        self._tokens = order_tokens(tokens, self._token_ids)
        self._token_to_id = {token: i for i, token in enumerate(self._tokens)}
        ids = self._token_to_id
        self._special_ids = np.sort([ids[token] for token in special_tokens.values()])
        self._phenotype_ids = {
            category: {value: ids[token] for value, token in of.items()} for category, of in names.items()
        }
        all_ids = [i for of in self._phenotype_ids.values() for i in of.values()]
        self._all_phenotype_ids = np.sort(np.array(all_ids, np.int64))
        of_genes = self.genes if self.scheme == "rank" else [f"bin_{i}" for i in range(self.n_bins)]
        # Rank scheme: the id of each gene; binned scheme: the id of each bin.
        self._expression_ids = np.array([ids[token] for token in of_genes], np.int64)
        if self.scheme == "rank":
            self._gene_of_id = np.full(len(self._tokens), -1)
            self._gene_of_id[self._expression_ids] = np.arange(len(self.genes))

    @property
    def last_coverage(self) -> dict[str, float] | None:
        """Coverage of the last input; see the class."""
        return self._matcher.last_coverage

    @property
    def n_bins(self) -> int:
        """Number of bins including `bin_0`: one more than the number of edges (the largest over genes)."""
        edges = self.bin_edges
        return 1 + (max(map(len, edges.values())) if isinstance(edges, dict) else len(edges))

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        return len(self._tokens)

    @property
    def gene_token_type_offset(self) -> int:
        """Token type of the first gene (rank scheme: of all genes): 1 + number of phenotype categories."""
        return 1 + len(self.phenotypes)

    @property
    def type_vocab_size(self) -> int:
        """Number of token types."""
        return self.gene_token_type_offset + (len(self.genes) if self.scheme == "binned" else 1 + self.neighborhood)

    def phenotype_token_ids(self, category: str) -> np.ndarray:
        """Return the token ids of a category's values, int64 array; empty for an unknown category."""
        return np.array(list(self._phenotype_ids.get(category, {}).values()), np.int64)

    @property
    def genes_start_ind(self) -> int:
        """Position of the first gene in a cell that has all included phenotypes."""
        return int(self.add_cls) + len(self.included_phenotypes)

    @property
    def gene_token_ids(self) -> np.ndarray:
        """Token id of each gene, int64 array (n_genes,)."""
        if self.scheme != "rank":
            raise AttributeError("In the binned scheme, genes are token types: see gene_token_type_offset.")
        return self._expression_ids

    def gene_counters(self, genes: np.ndarray) -> np.ndarray:
        """Return the token types of genes (rank scheme: their token ids), int64 array (n,)."""
        return self._expression_ids[genes] if self.scheme == "rank" else genes + self.gene_token_type_offset

    def genes_of(self, input_ids: np.ndarray, token_type_ids: np.ndarray) -> np.ndarray:
        """Return the gene index of each gene token, int64 array (n,); the rank scheme reads it from the ids."""
        if self.scheme == "binned":
            return token_type_ids - self.gene_token_type_offset
        return self._gene_of_id[input_ids]

    @property
    def first_bin_id(self) -> int:
        """Token id of `bin_0`."""
        if self.scheme != "binned":
            raise AttributeError("A rank tokenizer has no bins.")
        return int(self._expression_ids[0])

    @property
    def max_length(self) -> int:
        """Maximum number of tokens per cell (`model_max_length` of any tokenizer)."""
        return self.model_max_length

    @property
    def included_phenotypes(self) -> list[str]:
        """Categories that a cell's tokens start with, in this order."""
        return list(self._included_phenotypes)

    @included_phenotypes.setter
    def included_phenotypes(self, categories: Sequence[str]) -> None:
        unknown = [name for name in categories if name not in self.phenotypes]
        if unknown:
            raise ValueError(
                f"Unknown phenotype {', '.join(map(repr, unknown))}; available: "
                f"{', '.join(self.phenotypes) or 'none'}."
            )
        if len(set(categories)) < len(categories):
            raise ValueError(f"included_phenotypes names a category twice: {list(categories)}.")
        self._included_phenotypes = list(categories)

    @property
    def fingerprint(self) -> str:
        """Hash of everything that defines the meaning of ids and types; a model keeps it in its configuration."""
        other = ("symbols", "add_cls", "add_eos")
        meaning = {name: value for name, value in self._vocabulary().items() if name not in other}
        return hashlib.sha256(json.dumps(meaning).encode()).hexdigest()[:16]

    def _vocabulary(self) -> dict[str, Any]:
        """Return the settings that define the tokens, as saved in the file."""
        vocabulary = {
            "scheme": self.scheme,
            "special_tokens": self._special_tokens,
            "token_ids": self._token_ids,
            "phenotypes": self.phenotypes,
            "genes": self.genes,
            "symbols": self.symbols,
            **({"whole_cell": True} if self.whole_cell else {}),
        }
        if self.scheme == "binned":
            # Left out if as in files from before these settings existed, whose fingerprints must not change.
            more = {"values": True} if self.values else {}
            if self.normalize is not None and self.totals != "columns":
                more["totals"] = self.totals
            return {**vocabulary, "bin_edges": self.bin_edges, "normalize": self.normalize, **more}
        return {
            **vocabulary,
            "medians": [None if median != median else median for median in self.medians.tolist()],
            "target_sum": self.target_sum,
            "neighborhood": self.neighborhood,
            "separator": self.separator,
            "add_cls": self.add_cls,
            "add_eos": self.add_eos,
        }

    def get_vocab(self) -> dict[str, int]:
        """Return the vocabulary as a dict of token to id."""
        return {**self._token_to_id, **self._added_tokens_encoder}

    def _tokenize(self, text: str, **kwargs) -> list[str]:
        return text.split()

    def _convert_token_to_id(self, token: str) -> int | None:
        found = self._token_to_id.get(token)
        if found is None and self.scheme == "rank":  # another version of the id, or a symbol
            at = self._matcher.find([token])[0]
            found = None if at < 0 else int(self._expression_ids[at])
        return found

    def _convert_id_to_token(self, index: int) -> str:
        return self._tokens[index]

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """Join tokens with spaces."""
        return " ".join(tokens)

    def convert_token_types_to_names(self, token_type_ids: Iterable[int]) -> list[str | None]:
        """Return the name of each token type: gene, category, `cell` or `neighborhood` (ranks); None for type 0."""
        names = [None, *self.phenotypes, *(self.genes if self.scheme == "binned" else ["cell", "neighborhood"])]
        return [names[int(i)] for i in token_type_ids]

    def find_genes(self, names: Sequence[str], symbols: Sequence[str] | None = None) -> np.ndarray:
        """Find genes by name.

        Parameters
        ----------
        names : sequence of str (n,)
            Ids, with or without version, or symbols.
        symbols : sequence of str (n,), optional
            Symbols of the same genes, for those whose id is unknown; as for the columns of an AnnData.

        Returns
        -------
        int64 array (n,)
            Index in `genes`; -1 for unknown names.
        """
        if symbols is None:
            return self._matcher.find(list(names)).astype(np.int64)
        return self._matcher.find_columns(list(names), list(symbols), self.match).astype(np.int64)

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str, ...]:
        """Write `gene_vocabulary.json`, and `tokenizer.json`, with which any process converts token names to ids.

        Parameters
        ----------
        save_directory : str
            An existing folder.
        filename_prefix : str, optional
            Prefix of the file names.

        Returns
        -------
        tuple of str
            The paths written.
        """
        prefix = f"{filename_prefix}-" if filename_prefix else ""
        path = os.path.join(save_directory, prefix + VOCAB_FILES_NAMES["vocab_file"])
        vocabulary = {
            "format_version": FORMAT_VERSION,
            "max_length": self.max_length,
            "included_phenotypes": self.included_phenotypes,
            "truncation": self.truncation,
            "seed": self.seed,
            "min_coverage": self.min_coverage,
            "warn_coverage": self.warn_coverage,
            **({} if self.gene_weights is None else {"gene_weights": _whole(self.gene_weights)}),
            **({} if self.match == "id" else {"match": self.match}),
            **self._vocabulary(),
        }
        with open(path, "w", encoding="utf-8") as file:
            file.write(json.dumps(vocabulary, ensure_ascii=False))  # json.dump, and indents, take ten times as long
        words = Tokenizer(models.WordLevel(self.get_vocab()))
        words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        words.add_special_tokens(list(self._special_tokens.values()))
        words_path = os.path.join(save_directory, prefix + "tokenizer.json")
        words.save(words_path)
        return path, words_path

    def pad(self, encoded_inputs, *args, **kwargs) -> BatchEncoding:
        """Pad as any tokenizer does; refuse `expression_values`, which transformers' collators do not pad or mask."""
        first = encoded_inputs if hasattr(encoded_inputs, "keys") else next(iter(encoded_inputs), {})
        found = [name for name in ("expression_values", "cell_counts") if name in first]
        if found:
            raise ValueError(
                f"pad cannot handle {found[0]}: use DataCollatorForPhenotypicMLM or another collator of stformer_hf."
            )
        return super().pad(encoded_inputs, *args, **kwargs)

    # ------------------------------------------------------------------ masks

    def get_special_tokens_mask(self, token_ids_0, token_ids_1=None, already_has_special_tokens: bool = False):
        """Return a mask of the special tokens.

        Parameters
        ----------
        token_ids_0 : list of int, array or Tensor
            Token ids.
        token_ids_1 : None
            Unused, since a cell is one sequence.
        already_has_special_tokens : bool, default: False
            Whether the ids include `[CLS]` and `[EOS]`; if not, these are added first.

        Returns
        -------
        Same kind as `token_ids_0`
            1 for `[CLS]`, `[EOS]`, `[MASK]`, `[PAD]` and `[SEP]`, else 0; booleans for arrays and tensors.
        """
        if token_ids_1 is not None:
            raise ValueError("A cell is one sequence: token_ids_1 must be None.")
        if not already_has_special_tokens:
            token_ids_0 = self.build_inputs_with_special_tokens(token_ids_0)
        return _among(token_ids_0, self._special_ids)

    def build_inputs_with_special_tokens(self, token_ids_0: list[int], token_ids_1: None = None) -> list[int]:
        """Return the ids between `[CLS]` and `[EOS]`."""
        return [self.cls_token_id] * self.add_cls + [*token_ids_0] + [self.eos_token_id] * self.add_eos

    # ------------------------------------------------------------------ text to tokens

    def create_token_type_ids_from_sequences(self, token_ids_0: list[int], token_ids_1: None = None) -> list[int]:
        """Return the token types of a cell written as text, with `[CLS]` and `[EOS]`; see `prepare_for_model`."""
        return self._types_of_text(self.build_inputs_with_special_tokens(token_ids_0, token_ids_1))

    def prepare_for_model(
        self,
        ids: list[int],
        pair_ids: None = None,
        add_special_tokens: bool = True,
        *,
        return_tensors: str | None = None,
        prepend_batch_axis: bool = False,
        **kwargs,
    ) -> BatchEncoding:
        """Prepare the tokens of a ranked cell as any tokenizer does, with the token types that its counts would get.

        A `[MASK]` stands for a gene, or at the front, in place of an included phenotype, for that phenotype.

        Raises
        ------
        ValueError
            The scheme is binned, where genes are token types, which text does not have; there is a second sequence;
            the tokenizer adds neighbourhoods without a separator; there are words that are neither genes nor tokens.
        """
        if pair_ids is not None:
            raise ValueError("A cell is one sequence: pair_ids must be None.")
        self._check_text(ids)
        encoded = super().prepare_for_model(ids, None, add_special_tokens, **kwargs)
        types = self._types_of_text(encoded["input_ids"])
        if "token_type_ids" in encoded:
            encoded["token_type_ids"] = types
        return BatchEncoding(dict(encoded), tensor_type=return_tensors, prepend_batch_axis=prepend_batch_axis)

    def _check_text(self, ids: Sequence[int | None]) -> None:
        """Refuse text that is not a ranked cell; the id of an unknown word is None."""
        if self.scheme == "binned":
            raise ValueError(
                "In the binned scheme, the gene of a token is its token type, which text does not have: tokenize "
                "counts, as in tokenizer(adata)."
            )
        if self.neighborhood and self.separator is None:
            raise ValueError(
                "Without a separator, text does not show where the neighbourhood begins: tokenize counts."
            )
        if None in ids:
            raise ValueError(
                f"{sum(i is None for i in ids)} of the {len(ids)} words of the text are neither genes nor tokens of "
                f"this tokenizer; the first is word {list(ids).index(None) + 1}."
            )

    def _types_of_text(self, input_ids: Sequence[int]) -> list[int]:
        """Return the token types that the counts of a cell of these tokens would get."""
        self._check_text(input_ids)
        category_of = {i: name for name, ids in self._phenotype_ids.items() for i in ids.values()}
        categories, special = list(self.phenotypes), set(self._special_ids.tolist())
        types, gene_type, n_phenotypes, in_front = [], self.gene_token_type_offset, 0, True
        for i in input_ids:
            masked = i == self.mask_token_id
            if masked and in_front and n_phenotypes < len(self._included_phenotypes):
                types.append(1 + categories.index(self._included_phenotypes[n_phenotypes]))
                n_phenotypes += 1
            elif i in category_of:
                types.append(1 + categories.index(category_of[i]))
                n_phenotypes += 1
            elif i in special and not masked:
                gene_type += self.separator is not None and i == self.sep_token_id
                types.append(0)
            else:
                types.append(gene_type)
                in_front = False
        return types

    def get_phenotypic_tokens_mask(self, input_ids):
        """Return 1 (or True) for ids of phenotype values, as the type of `input_ids` (list, array, Tensor).

        A masked phenotype is a special token; its token type still shows the category.
        """
        return _among(input_ids, self._all_phenotype_ids)

    def get_gene_tokens_mask(self, input_ids):
        """Return 1 (or True) for ids of expression bins or genes, as the type of `input_ids` (list, array, Tensor)."""
        return _among(input_ids, self._expression_ids)

    # ------------------------------------------------------------------ cells to tokens

    def __call__(
        self,
        cells,
        *,
        genes: Sequence[str] | None = None,
        obs=None,
        layer: str | None = None,
        fractional: bool = False,
        neighborhood=None,
        padding: bool | str = False,
        max_length: int | None = None,
        pad_to_multiple_of: int | None = None,
        return_tensors: str | None = None,
        return_attention_mask: bool = True,
    ) -> BatchEncoding:
        """Tokenize cells.

        Parameters
        ----------
        cells : AnnData, MuData, SpatialData, sparse or dense matrix (n, n_columns), or CellBatch
            Counts. An AnnData or a `CellBatch` (from `CellStore.__getitems__`) has its own genes and obs.
        genes : sequence of str, optional
            Gene ids of a matrix's columns; by default the tokenizer's own genes, in order.
        obs : DataFrame or dict of column to values, optional
            Phenotypes of a matrix's rows.
        layer : str, optional
            Where the counts of an AnnData are: `X`, `raw`, the name of a layer, or a feature type. By default the
            first of X, raw and the layer `counts` that holds counts. For MuData and SpatialData also the modality or
            table, as in `prot` or `prot:counts`; by default the modality of genes, or the only table.
        fractional : bool, default: False
            Whether counts may be fractional, as estimates are (alevin, RSEM, SoupX, CellBender).
        neighborhood : sparse or dense matrix (n, n_columns), optional
            Summed counts of each row's neighbours, if cells are a matrix and the tokenizer adds neighbourhoods.
        padding : bool, "longest" or "max_length", default: False
            Pad to the longest cell (True, "longest") or to `max_length`.
        max_length : int, optional
            Overrides the tokenizer's own.
        pad_to_multiple_of : int, optional
            Round the padded length up to a multiple of this.
        return_tensors : {"pt", "np"}, optional
            Return tensors or arrays (n, length) instead of lists. Needs padding, unless all cells have one length.
        return_attention_mask : bool, default: True
            Whether to return `attention_mask`.

        Returns
        -------
        BatchEncoding
            Those of `input_ids`, `token_type_ids`, `attention_mask`, `expression_values`, `cell_genes` and
            `cell_counts` that are in `model_input_names`: one list per cell, in the order of the cells. With
            `whole_cell`, also `measured_genes` (n, n_genes), if the input lacks some of the tokenizer's genes.

        Raises
        ------
        ValueError
            Values are not counts; the columns cover less than `min_coverage` of the tokenizer's genes, by weight;
            genes are of another species, or named by row numbers; shapes do not match; tensors of cells of different
            lengths are requested without padding.
        TypeError
            The input is not cells, but for example text.
        """
        tokens = self.encode_cells(
            cells,
            genes=genes,
            obs=obs,
            layer=layer,
            fractional=fractional,
            neighborhood=neighborhood,
            max_length=max_length,
        )
        lengths = np.diff(tokens.indptr)
        columns, of_cells = self.columns(tokens), self.cell_columns(tokens)
        if return_attention_mask and "attention_mask" in self.model_input_names:
            columns["attention_mask"] = (np.ones(len(tokens.input_ids), np.int64), 0)
        more = {}
        if of_cells and tokens.measured is not None:
            more["measured_genes"] = np.repeat(tokens.measured, len(lengths), axis=0)

        if padding in (False, "do_not_pad"):
            if return_tensors is None:
                ragged = {
                    name: [flat[start:stop].tolist() for start, stop in itertools.pairwise(indptr.tolist())]
                    for some, indptr in ((columns, tokens.indptr), (of_cells, tokens.cells and tokens.cells.indptr))
                    for name, (flat, _) in some.items()
                }
                return BatchEncoding({**ragged, **{name: array.tolist() for name, array in more.items()}})
            if len(np.unique(lengths)) > 1:
                raise ValueError("Cells have different numbers of tokens: pass padding=True to return tensors.")
        elif padding not in (True, "longest", "max_length"):
            raise ValueError(f'padding must be True, False, "longest" or "max_length", got {padding!r}.')

        length = int(lengths.max(initial=0))
        if padding == "max_length":
            length = max_length or self.max_length
        if pad_to_multiple_of:
            length = -(-length // pad_to_multiple_of) * pad_to_multiple_of
        padded = {
            name: pad_ragged(flat, tokens.indptr, length, value, self.padding_side)
            for name, (flat, value) in columns.items()
        }
        padded.update(self.pad_cells(tokens), **more)
        if return_tensors is None:
            return BatchEncoding({name: array.tolist() for name, array in padded.items()})
        return BatchEncoding(padded, tensor_type=return_tensors)

    def columns(self, tokens: TokenizedCells) -> dict[str, tuple[np.ndarray, int | float]]:
        """Return the model inputs in `model_input_names` as flat arrays, each with its padding value.

        The attention mask is not included, since it follows from the padding.
        """
        columns = {
            "input_ids": (tokens.input_ids, self.pad_token_id),
            "token_type_ids": (tokens.token_type_ids, 0),
            "expression_values": (tokens.expression_values, 0.0),
        }
        return {name: column for name, column in columns.items() if name in self.model_input_names}

    def cell_columns(self, tokens: TokenizedCells) -> dict[str, tuple[np.ndarray, int | float]]:
        """Return the model inputs of whole cells as flat arrays over `tokens.cells`, each with its padding value."""
        if tokens.cells is None:
            return {}
        columns = {"cell_genes": (tokens.cells.columns, 0), "cell_counts": (tokens.cells.counts, 0.0)}
        return {name: column for name, column in columns.items() if name in self.model_input_names}

    def pad_cells(self, tokens: TokenizedCells) -> dict[str, np.ndarray]:
        """Return `cell_columns` as matrices (n, largest number of genes), padded on the right."""
        columns = self.cell_columns(tokens)
        if not columns:
            return {}
        indptr = tokens.cells.indptr
        most = max(int(np.diff(indptr).max(initial=0)), 1)
        return {name: pad_ragged(flat, indptr, most, value) for name, (flat, value) in columns.items()}

    def encode_cells(
        self,
        cells,
        *,
        genes: Sequence[str] | tuple[Sequence[str], Sequence[str]] | None = None,
        obs=None,
        layer: str | None = None,
        fractional: bool = False,
        neighborhood=None,
        max_length: int | None = None,
        epoch: int = 0,
        for_inference: bool = False,
    ) -> TokenizedCells:
        """Tokenize cells into flat arrays: the fast path of `__call__`, with the same parameters and errors.

        `truncation="random"` chooses other genes in each `epoch`. With `for_inference`, the tokens of a cell depend on
        its counts alone: every included phenotype is `[MASK]`, regardless of obs, and `truncation="random"` becomes
        "top". `genes` may also be a pair of gene ids and symbols, as `resolve_genes` returns it.
        """
        max_length = self.max_length if max_length is None else max_length
        self._check_max_length(max_length)
        found = read_cells(cells, genes, obs, layer, neighborhood, self.genes, self.neighborhood, fractional)
        key = found.names[0] if isinstance(found.names, tuple) else None
        rows = found.rows
        column_genes = self._matcher.match(
            found.names, rows.columns, rows.counts, self.min_coverage, key, self.match, self.warn_coverage
        )
        n_cells = len(found.rows.indptr) - 1
        if for_inference:
            phenotypes = np.full((n_cells, len(self._included_phenotypes)), self.mask_token_id, np.int64)
        else:
            phenotypes = self._phenotype_tokens(found.obs, n_cells)
        truncation = "top" if for_inference and self.truncation == "random" else self.truncation
        room = max_length - self.add_cls - self.add_eos - (phenotypes >= 0).sum(axis=1)
        if self.scheme == "binned":
            tokens = self._encode_bins(found.rows, column_genes, phenotypes, room, found.ids, epoch, truncation)
        else:
            parts = [found.rows]
            if self.neighborhood:
                parts.append(found.neighborhood)
                room = (room - (self.separator is not None)) // 2
            tokens = self._encode_ranks(parts, column_genes, phenotypes, room, found.ids, epoch, truncation)
        if not self.whole_cell:
            return tokens
        return tokens._replace(
            cells=self._whole_cells(found.rows, column_genes), measured=self._measured(found.names, column_genes)
        )

    def _whole_cells(self, rows: CountRows, column_genes: np.ndarray | None) -> CountRows:
        """Return the counts of all known genes: int64 genes, ascending, and float32 non-zero counts."""
        indptr, genes, counts = map_genes(rows, column_genes)
        if len(counts) and not counts.all():
            indptr, (genes, counts) = keep(counts > 0, indptr, genes, counts)
        return CountRows(indptr, genes.astype(np.int64), counts.astype(np.float32))

    def _measured(self, names: ColumnNames | tuple, column_genes: np.ndarray | None) -> np.ndarray | None:
        """Return which genes are among the columns, bool array (1, n_genes); None for all."""
        measured = np.zeros((1, len(self.genes)), bool)
        if column_genes is None:
            measured[:, : len(names if isinstance(names, ColumnNames) else names[0])] = True
        else:
            measured[:, column_genes[column_genes >= 0]] = True
        return None if measured.all() else measured

    def tokenize_store(self, store, path: str | os.PathLike, **kwargs) -> Any:
        """Write the tokens of all cells of a store as a Hugging Face dataset: `store.tokenize(self, path, **kwargs)`.

        Parameters
        ----------
        store : CellStore
            The cells; pass `store.with_neighborhoods()` if the tokenizer adds neighbourhoods.
        path : str or Path
            Folder to create.
        **kwargs
            Arguments of `CellStore.tokenize`, such as `workers` and `obs`.

        Returns
        -------
        datasets.Dataset
        """
        return store.tokenize(self, path, **kwargs)

    def _encode_bins(
        self,
        rows: CountRows,
        column_genes: np.ndarray | None,
        phenotypes: np.ndarray,
        room: np.ndarray,
        cell_ids: np.ndarray | None,
        epoch: int,
        truncation: str,
    ) -> TokenizedCells:
        totals = row_sums(rows) if self.normalize is not None and self.totals == "columns" else None
        rows = map_genes(rows, column_genes)
        if cell_ids is None:  # only random choices read them
            cell_ids = checksums(rows) if truncation == "random" else np.zeros(len(rows.indptr) - 1, np.int64)
        if self.normalize is not None and totals is None:
            totals = row_sums(rows)
        measured = rows.counts if totals is None else log1p_cp10k(rows, totals)
        bins = self._binner(rows.columns, measured)
        indptr, genes, counts = rows
        if len(bins) and not bins.min():
            indptr, (genes, counts, bins, measured) = keep(bins > 0, indptr, genes, counts, bins, measured)
        lengths = np.diff(indptr)
        frame = self._frame(phenotypes, [np.minimum(lengths, room)])
        ids, types = frame.ids, frame.types
        values = np.zeros(len(ids), np.float32) if self.values else None
        if self.values and totals is None:
            measured = np.log1p(measured, dtype=np.float32)
        dropped, n_dropped = [np.empty(0, np.int64)], np.maximum(lengths - room, 0)
        cuts = zip(indptr.tolist(), indptr[1:].tolist(), frame.starts[0].tolist(), room.tolist(), strict=False)
        for cell, (start, stop, to, most) in enumerate(cuts):
            of, at, chosen = bins[start:stop], genes[start:stop], slice(None)
            if stop - start > most and truncation == "head":
                chosen = slice(most)
                dropped.append(at[most:])
                of, at = of[:most], at[:most]
            elif stop - start > most:
                chosen = choose(truncation, most, counts[start:stop], at, self.seed, epoch, cell_ids[cell])
                dropped.append(at.take(np.flatnonzero(~chosen)))
                chosen = np.flatnonzero(chosen)
                of, at = of.take(chosen), at.take(chosen)
            ids[to : to + len(of)] = of
            types[to : to + len(of)] = at
            if values is not None:
                values[to : to + len(of)] = measured[start:stop][chosen]
        ids += self._expression_ids[0]
        types += self.gene_token_type_offset
        self._fill(frame, phenotypes)
        dropped_types = np.concatenate(dropped).astype(np.int64) + self.gene_token_type_offset
        dropped_cells = np.repeat(np.arange(len(lengths)), n_dropped)
        return TokenizedCells(ids, types, frame.indptr, dropped_types, dropped_cells, values)

    def _encode_ranks(
        self,
        parts: list[CountRows],
        column_genes: np.ndarray | None,
        phenotypes: np.ndarray,
        room: np.ndarray,
        cell_ids: np.ndarray | None,
        epoch: int,
        truncation: str,
    ) -> TokenizedCells:
        mapped = [map_genes(rows, column_genes) for rows in parts]
        usable = [self._usable(rows) for rows in mapped]
        # Totals are over all columns; if no column was left out, they equal the totals of the genes.
        subset = truncation == "random"
        if subset and cell_ids is None:
            cell_ids = checksums(mapped[0])
        pairs = zip(parts, usable, strict=True)
        all_totals = [None if some is rows and not subset else row_sums(rows) for rows, some in pairs]
        parts = [self._subset(rows, room, cell_ids, epoch) for rows in usable] if subset else usable
        frame = self._frame(phenotypes, [np.minimum(np.diff(rows.indptr), room) for rows in parts])
        for rows, totals, starts in zip(parts, all_totals, frame.starts, strict=True):
            write_ranks(frame.ids, starts, room, rows, totals, self.medians, self.target_sum, self._expression_ids)
        if self.neighborhood:
            n_genes = np.minimum(np.diff(parts[1].indptr), room)
            at = np.arange(n_genes.sum()) + np.repeat(frame.starts[1] - np.cumsum(n_genes) + n_genes, n_genes)
            frame.types[at] = 1
        types = frame.types
        types += self.gene_token_type_offset
        self._fill(frame, phenotypes)
        nothing = np.empty(0, np.int64)
        return TokenizedCells(frame.ids, frame.types, frame.indptr, nothing, nothing)

    def _subset(self, rows: CountRows, room: np.ndarray, cell_ids: np.ndarray, epoch: int) -> CountRows:
        """Drop random genes of cells that are longer than their room."""
        indptr, genes, counts = rows
        chosen = np.ones(len(genes), bool)
        for cell in np.flatnonzero(np.diff(indptr) > room):
            part = slice(indptr[cell], indptr[cell + 1])
            chosen[part] = choose("random", room[cell], counts[part], genes[part], self.seed, epoch, cell_ids[cell])
        indptr, (genes, counts) = keep(chosen, indptr, genes, counts)
        return CountRows(indptr, genes, counts)

    def _usable(self, rows: CountRows) -> CountRows:
        """Drop counts of 0, and genes without a median."""
        usable = rows.counts > 0
        if self._some_without_median:
            usable &= ~np.isnan(self.medians)[rows.columns]
        if usable.all():
            return rows
        indptr, (genes, counts) = keep(usable, rows.indptr, rows.columns, rows.counts)
        return CountRows(indptr, genes, counts)

    def _frame(self, phenotypes: np.ndarray, n_genes: list[np.ndarray]) -> "_Frame":
        """Allocate arrays for `[CLS]`, phenotypes, genes (and separator and genes of the neighbourhood), `[EOS]`."""
        n_front = (phenotypes >= 0).sum(axis=1) + int(self.add_cls)
        n_between = int(self.separator is not None)
        indptr = np.zeros(len(n_front) + 1, np.int64)
        np.cumsum(sum(n_genes) + n_front + n_between + int(self.add_eos), out=indptr[1:])
        starts = [indptr[:-1] + n_front]
        if len(n_genes) > 1:
            starts.append(starts[0] + n_genes[0] + n_between)
        return _Frame(np.empty(indptr[-1], np.int64), np.zeros(indptr[-1], np.int64), indptr, starts)

    def _fill(self, frame: "_Frame", phenotypes: np.ndarray) -> None:
        """Write the special and phenotype tokens around the genes."""
        ids, types, indptr, starts = frame
        special = []
        if self.add_cls:
            special.append((indptr[:-1], self.cls_token_id))
        if self.add_eos:
            special.append((indptr[1:] - 1, self.eos_token_id))
        if self.separator is not None:
            special.append((starts[1] - 1, self.sep_token_id))
        for at, token in special:
            ids[at] = token
            types[at] = 0
        has_phenotype = phenotypes >= 0
        cell, which = np.nonzero(has_phenotype)
        at = indptr[cell] + has_phenotype.cumsum(axis=1)[cell, which] - 1 + int(self.add_cls)
        ids[at] = phenotypes[cell, which]
        categories = list(self.phenotypes)
        of = [1 + categories.index(name) for name in self._included_phenotypes]
        types[at] = np.array(of, np.int64)[which]

    def _phenotype_tokens(self, obs, n_cells: int) -> np.ndarray:
        """Return the token id of each included phenotype of each cell (n_cells, n_included), -1 if it is missing."""
        tokens = np.full((n_cells, len(self._included_phenotypes)), -1, np.int64)
        for i, category in enumerate(self._included_phenotypes):
            ids = self._phenotype_ids[category]

            def token(value, ids=ids) -> int:
                if _is_missing(value):
                    return -1
                found = ids.get(phenotype_token(str(value)), -1)
                if found < 0 and isinstance(value, (float, np.floating)) and value == np.rint(value):
                    found = ids.get(phenotype_token(str(int(value))), -1)  # integers beside missing values are floats
                return found

            if is_cell_batch(obs) and category in obs.categories:  # codes, -1 where missing, and their names
                tokens[:, i] = np.array([*map(token, obs.categories[category]), -1])[obs.obs[category]]
            elif obs is not None and category in (table := obs.obs if is_cell_batch(obs) else obs):
                values = table[category]
                if len(values) != n_cells:
                    raise ValueError(f"obs has {len(values)} rows for {n_cells} cells.")
                if hasattr(values, "cat"):  # by category: values would turn integers beside missing ones into floats
                    tokens[:, i] = np.array([*map(token, _exact(values.cat.categories)), -1])[values.cat.codes]
                else:
                    tokens[:, i] = [token(value) for value in _exact(values)]
            n_missing = int((tokens[:, i] < 0).sum())
            if n_missing and category not in self._logged:
                self._logged.add(category)
                logger.warning(
                    f"{n_missing} of {n_cells} cells have no known value of phenotype {category!r}; it is left out of "
                    "their tokens. (Logged once.)"
                )
        return tokens

    def _check_max_length(self, max_length: int) -> None:
        n_parts = 1 + self.neighborhood
        n_special = self.add_cls + self.add_eos + (self.separator is not None)
        needed = n_special + len(self._included_phenotypes) + n_parts
        if max_length < needed:
            raise ValueError(
                f"max_length={max_length} leaves no room for a gene: {n_special} special tokens, "
                f"{len(self._included_phenotypes)} phenotypes and {n_parts} genes need {needed}."
            )


def _whole(weights: np.ndarray) -> list[float]:
    """Return weights as a list, whole numbers as int."""
    return [int(weight) if weight.is_integer() else weight for weight in weights.tolist()]


def _values_of(store, name: str) -> list[str]:
    """Return the categories of an obs column of a store, in order; for a selection those of its cells only."""
    values = store.categories[name]
    if getattr(store, "is_selection", False):
        codes = store.obs[name].cat.codes.to_numpy()
        values = [values[code] for code in np.unique(codes[codes >= 0])]
    return values


def _exact(values: Sequence) -> Sequence:
    """Return floats as numpy scalars: pandas iterates Python floats, which print a float32 0.1 as 0.10000000149."""
    array = np.asarray(values)
    return array if array.dtype.kind == "f" else values


def _is_missing(value) -> bool:
    try:
        return value is None or bool(value != value)
    except TypeError:  # pandas.NA
        return True


def _among(ids, wanted: np.ndarray):
    """Return whether each id is wanted, as the type of `ids`: a list of 0 and 1, or booleans."""
    if isinstance(ids, (list, tuple)):
        return _among(np.asarray(ids, np.int64), wanted).astype(int).tolist()
    if not len(wanted):
        return ids != ids
    lowest, highest = int(wanted.min()), int(wanted.max())
    if highest - lowest + 1 == len(wanted):
        return (ids >= lowest) & (ids <= highest)
    if isinstance(ids, torch.Tensor):
        return torch.isin(ids, torch.as_tensor(wanted, device=ids.device))
    return np.isin(ids, wanted)


__all__ = ["GeneTokenizer", "TokenizedCells"]
