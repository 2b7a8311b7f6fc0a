"""GeneTokenizer: converts rows of counts to gene tokens, whole batches at a time and without strings."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from transformers import BatchEncoding
from transformers.utils import logging

from .bin_encoder import BinEncoder
from .cell_counts import read_cells
from .gene_columns import sample
from .gene_order import Truncation
from .legacy_files import load_mapping, read_token_dictionary
from .phenotype_tokens import phenotype_ids, values_in_store
from .rank_encoder import RankEncoder
from .tokenized_cells import CellLayout, TokenizedCells, with_whole_cells
from .tokenizer_settings import OF_MEANING, OF_READING, SEPARATOR, TokenizerSettings, fit_gene_weights
from .vocabulary_tokenizer import VocabularyTokenizer

logger = logging.get_logger(__name__)

_ENCODERS: dict[str, type[BinEncoder] | type[RankEncoder]] = {"binned": BinEncoder, "rank": RankEncoder}


class _Logged(set):
    """Warnings already logged; not pickled, so that calls do not change the hash by which `datasets` caches."""

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return type(self), ()


class GeneTokenizer(VocabularyTokenizer):
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
        A `gene_vocabulary.json`, instead of all of the above (passed by `from_pretrained`).
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
        **kwargs: Any,
    ):
        given = locals().copy()
        given = {name: given[name] for name in (*OF_MEANING, *OF_READING)}
        given["values"], given["whole_cell"] = values or None, whole_cell or None  # False is the default
        if vocab_file is None:
            settings = TokenizerSettings(**given)
        else:
            given["max_length"] = kwargs.get("model_max_length") if max_length is None else max_length
            settings = TokenizerSettings.read(vocab_file, given)
        self._logged = _Logged()
        super().__init__(settings, _ENCODERS[settings.scheme](settings), **kwargs)
        self._check_max_length(self.max_length)

    @classmethod
    def from_store(
        cls,
        store: Any,
        scheme: str = "binned",
        *,
        phenotypes: Sequence[str] | Mapping | None = None,
        bin_edges: Any = None,
        n_bins: int = 10,
        medians: Any = None,
        genes: Sequence[str] | None = None,
        **kwargs: Any,
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

        Raises
        ------
        ValueError
            A phenotype is not a categorical column of the store, or medians are missing.
        """
        if phenotypes is not None and not isinstance(phenotypes, Mapping):
            phenotypes = values_in_store(store, phenotypes)
        rows = {gene: row for row, gene in enumerate(store.gene_ids.tolist())}
        genes = list(rows if genes is None else genes)
        unknown = [gene for gene in genes if gene not in rows]
        if unknown:
            raise ValueError(f"{len(unknown)} genes are not in the store, such as {sample(unknown)}.")
        fit = _ENCODERS.get(scheme, BinEncoder).fit  # the constructor refuses an unknown scheme
        genes, fitted = fit(
            store, genes, bin_edges=bin_edges, n_bins=n_bins, normalize=kwargs.get("normalize"), medians=medians
        )
        kwargs.setdefault("symbols", store.genes)
        if kwargs.get("gene_weights") is None and hasattr(store, "rows"):  # a stream is read once
            kwargs["gene_weights"] = fit_gene_weights(store)[[rows[gene] for gene in genes]]
        return cls(genes, scheme=scheme, phenotypes=phenotypes, **{**fitted, **kwargs})

    @classmethod
    def from_token_dictionary(
        cls,
        token_dictionary: Mapping[str, int] | str | os.PathLike,
        medians: Any,
        *,
        symbols: Any = None,
        **kwargs: Any,
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
        **kwargs: Any,
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

    # ------------------------------------------------------------------ cells to tokens to a batch

    @property
    def last_coverage(self) -> dict[str, float] | None:
        """Coverage of the last input; see the class."""
        return self._matcher.last_coverage

    def __call__(
        self,
        cells: Any,
        *,
        genes: Sequence[str] | None = None,
        obs: Any = None,
        layer: str | None = None,
        fractional: bool = False,
        neighborhood: Any = None,
        padding: bool | str = False,
        truncation: bool | str = True,
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
        truncation : bool or str, default: True
            True, or "longest_first", as other tokenizers of transformers take it: cells are always truncated to
            `max_length`, in the way of the tokenizer's own setting.
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
            lengths are requested without padding; `truncation` is not True.
        TypeError
            The input is not cells, but for example text.
        """
        if truncation not in (True, "longest_first", "only_first"):
            raise ValueError(
                f"truncation={truncation!r}: cells are always truncated to max_length, as the tokenizer's own "
                f"setting ({self.truncation!r}) says. Pass a larger max_length to keep more genes."
            )
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
        if padding in (False, "do_not_pad"):
            if return_tensors is None:
                return self._ragged(tokens, return_attention_mask)
            if len(np.unique(lengths)) > 1:
                raise ValueError("Cells have different numbers of tokens: pass padding=True to return tensors.")
        elif padding not in (True, "longest", "max_length"):
            raise ValueError(f'padding must be True, False, "longest" or "max_length", got {padding!r}.')

        length = int(lengths.max(initial=0))
        if padding == "max_length":
            length = max_length or self.max_length
        if pad_to_multiple_of:
            length = -(-length // pad_to_multiple_of) * pad_to_multiple_of
        padded = self.pad_tokens(tokens, length, return_attention_mask)
        if return_tensors is None:
            return BatchEncoding({name: array.tolist() for name, array in padded.items()})
        return BatchEncoding(padded, tensor_type=return_tensors)

    def encode_cells(
        self,
        cells: Any,
        *,
        genes: Sequence[str] | tuple[Sequence[str] | np.ndarray, Sequence[str] | np.ndarray] | None = None,
        obs: Any = None,
        layer: str | None = None,
        fractional: bool = False,
        neighborhood: Any = None,
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
        cells = read_cells(cells, genes, obs, layer, neighborhood, self.genes, self.neighborhood, fractional)
        column_genes = self._matcher.match(
            cells.names, cells.rows.columns, cells.rows.counts, self.min_coverage, self.match, self.warn_coverage
        )
        layout = self._layout(cells.obs, len(cells.rows.indptr) - 1, for_inference)
        how = "top" if for_inference and self.truncation == "random" else self.truncation
        truncation = Truncation(max_length, how, self.seed, epoch)
        tokens = self.encoder.encode(cells, column_genes, layout, truncation)
        return with_whole_cells(tokens, cells, column_genes, len(self.genes)) if self.whole_cell else tokens

    def _layout(self, obs: Any, n_cells: int, for_inference: bool) -> CellLayout:
        """Return the tokens around the genes of cells, with their phenotypes, or `[MASK]` in place of each."""
        categories = list(self.phenotypes)
        shape = (n_cells, len(self._included_phenotypes))
        phenotypes = np.full(shape, self.mask_token_id if for_inference else -1, np.int64)
        for i, category in enumerate([] if for_inference else self._included_phenotypes):
            phenotypes[:, i] = phenotype_ids(obs, category, self.encoder.phenotype_ids[category], n_cells)
            n_missing = int((phenotypes[:, i] < 0).sum())
            if n_missing and category not in self._logged:
                self._logged.add(category)
                logger.warning(
                    f"{n_missing} of {n_cells} cells have no known value of phenotype {category!r}; it is left out of "
                    "their tokens. (Logged once.)"
                )
        return CellLayout(
            self.cls_token_id if self.add_cls else None,
            None if self.separator is None else self.sep_token_id,
            self.eos_token_id if self.add_eos else None,
            phenotypes,
            np.array([1 + categories.index(name) for name in self._included_phenotypes], np.int64),
        )

    def _check_max_length(self, max_length: int) -> None:
        n_parts = 1 + self.neighborhood
        n_special = self.add_cls + self.add_eos + (self.separator is not None)
        needed = n_special + len(self._included_phenotypes) + n_parts
        if max_length < needed:
            raise ValueError(
                f"max_length={max_length} leaves no room for a gene: {n_special} special tokens, "
                f"{len(self._included_phenotypes)} phenotypes and {n_parts} genes need {needed}."
            )

    def tokenize_store(self, store: Any, path: str | os.PathLike, **kwargs: Any) -> Any:
        """Write the tokens of all cells of a store as a Hugging Face dataset: `store.tokenize(self, path, **kwargs)`.

        Pass `store.with_neighborhoods()` if the tokenizer adds neighbourhoods.
        """
        return store.tokenize(self, path, **kwargs)


__all__ = ["GeneTokenizer", "TokenizedCells"]
