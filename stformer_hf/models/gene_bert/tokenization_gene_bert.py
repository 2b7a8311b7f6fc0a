"""GeneTokenizer: rows of counts in, gene tokens out, whole batches at a time and without strings."""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from transformers import BatchEncoding, PreTrainedTokenizer
from transformers.utils import logging

logger = logging.get_logger(__name__)

VOCAB_FILES_NAMES = {"vocab_file": "gene_vocabulary.json"}
FORMAT_VERSION = 1
SPECIAL_TOKENS = ("[CLS]", "[EOS]", "[MASK]", "[PAD]")
DEFAULT_MAX_LENGTH = 2048
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
_VERSION = re.compile(r"^(ENS[A-Z]*G\d+)\.\d+$")


class TokenizedCells(NamedTuple):
    """Ragged tokens of n cells, as flat arrays.

    Attributes
    ----------
    input_ids, token_type_ids : int64 array (T,)
        Tokens of all cells, one after the other.
    indptr : int64 array (n + 1,)
        Cell i has the tokens `indptr[i]:indptr[i + 1]`.
    dropped_type_ids, dropped_cells : int64 array (D,)
        Token types of the expressed genes that truncation left out, and the cell of each.
    """

    input_ids: np.ndarray
    token_type_ids: np.ndarray
    indptr: np.ndarray
    dropped_type_ids: np.ndarray
    dropped_cells: np.ndarray


class GeneTokenizer(PreTrainedTokenizer):
    """Tokenizer of cells: an id says how much, or which phenotype; a token type says which gene, or which category.

    A cell becomes `[CLS]`, its phenotypes in the order of `included_phenotypes`, its expressed genes in the order of
    `genes`, `[EOS]`. Ids: `[CLS]` 0, `[EOS]` 1, `[MASK]` 2, `[PAD]` 3, then the phenotype tokens (categories sorted by
    name, values in the order given), then `bin_0` … `bin_n`. Types: 0 for special tokens, one a category (sorted),
    then one a gene. A value x gets bin i where `bin_edges[i - 1] <= x < bin_edges[i]`; genes of bin 0 are left out.

    Parameters
    ----------
    genes : sequence of str
        Gene ids (Ensembl ids without version where known). Their order fixes the token types.
    scheme : {"binned"}, default: "binned"
        How counts become ids.
    bin_edges : sequence of float, default: (0.1,)
        Strictly increasing, positive. One edge, 0.1, tells expressed genes from others (PerturbGene's setting).
    medians : None
        Belongs to the rank scheme; the binned scheme takes none.
    phenotypes : dict of str to sequence, optional
        Category -> its values.
    included_phenotypes : sequence of str, optional
        Categories that a cell's tokens start with, in this order. All of `phenotypes` by default.
    max_length : int, default: 2048
        Most tokens a cell may have. Longer cells keep their largest counts (ties by gene order) and always `[EOS]`.
    vocab_file : str, optional
        A `gene_vocabulary.json`, in place of all of the above (`from_pretrained` gives it).
    **kwargs
        As for `transformers.PreTrainedTokenizer`.

    Attributes
    ----------
    last_coverage : dict or None
        Of the last table of genes seen: `genes` and `counts`, the shares of it that are known to the tokenizer, and
        `vocabulary`, the share of the tokenizer's genes that it holds.
    min_coverage : float, default: 0.5
        Below this share of known counts, calling the tokenizer raises.

    Raises
    ------
    ValueError
        Unknown scheme; no genes, or one twice; edges not increasing; phenotypes that cannot be told apart; a maximum
        length without room for a gene.

    Notes
    -----
    Vocabulary and layout are PerturbGene's (`data_utils/tokenization.py` of its Code Organization). A value becomes a
    token as `"[" + value.replace(" ", "_").strip() + "]"`; where two categories share a value, or it reads like a
    special token, the later one becomes `"[category=value]"`, so that every id has a name of its own.
    """

    vocab_files_names = VOCAB_FILES_NAMES
    model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    padding_side = "right"
    _auto_class = "AutoTokenizer"

    def __init__(
        self,
        genes: Sequence[str] | None = None,
        *,
        scheme: str = "binned",
        bin_edges: Sequence[float] = (0.1,),
        medians: None = None,
        phenotypes: Mapping[str, Sequence[Any]] | None = None,
        included_phenotypes: Sequence[str] | None = None,
        max_length: int | None = None,
        vocab_file: str | os.PathLike | None = None,
        **kwargs,
    ):
        if vocab_file is not None:
            if genes is not None or phenotypes is not None or tuple(bin_edges) != (0.1,):
                raise ValueError(
                    f"genes, bin_edges and phenotypes are those of {vocab_file}; they cannot be given too."
                )
            saved = _read_vocabulary(vocab_file)
            genes, scheme, bin_edges = saved["genes"], saved["scheme"], saved["bin_edges"]
            phenotypes = saved["phenotypes"]
            if included_phenotypes is None:
                included_phenotypes = saved["included_phenotypes"]
            if max_length is None:
                max_length = kwargs.get("model_max_length", saved["max_length"])
        if scheme != "binned":
            raise ValueError(f'scheme is "binned", got {scheme!r}.')
        if medians is not None:
            raise ValueError("medians belong to the rank scheme; the binned scheme bins counts by bin_edges.")
        self.scheme = scheme
        self.genes = _check_genes(genes)
        self.bin_edges = _check_bin_edges(bin_edges)
        self.phenotypes = {
            category: [str(value) for value in values] for category, values in sorted((phenotypes or {}).items())
        }
        self._build_vocabulary()
        self.included_phenotypes = list(phenotypes or {}) if included_phenotypes is None else included_phenotypes

        self.last_coverage: dict[str, float] | None = None
        self.min_coverage = 0.5
        # Batches of a store share one array of gene ids: it is mapped once.
        self._last_table: tuple[np.ndarray, np.ndarray] | None = None
        self._told: set[str] = set()

        kwargs["model_max_length"] = DEFAULT_MAX_LENGTH if max_length is None else max_length
        for name, token in zip(("cls_token", "eos_token", "mask_token", "pad_token"), SPECIAL_TOKENS, strict=True):
            kwargs.setdefault(name, token)
        super().__init__(**kwargs)
        self._check_max_length(self.model_max_length)

    @classmethod
    def from_store(
        cls, store, scheme: str = "binned", *, phenotypes: Sequence[str] | Mapping | None = None, **kwargs
    ) -> "GeneTokenizer":
        """Make a tokenizer for the genes, and the chosen phenotypes, of a store.

        Parameters
        ----------
        store : CellStore
            Gives the genes in its order, and the values of its categorical columns.
        scheme : {"binned"}, default: "binned"
            As in the constructor.
        phenotypes : sequence of str, or dict, optional
            Columns of the store's obs that become phenotype categories, or the categories with their values.
        **kwargs
            As in the constructor.

        Returns
        -------
        GeneTokenizer

        Raises
        ------
        ValueError
            A phenotype is not a categorical column of the store.
        """
        if phenotypes is not None and not isinstance(phenotypes, Mapping):
            missing = [name for name in phenotypes if name not in store.categories]
            if missing:
                raise ValueError(
                    f"No categorical column {', '.join(map(repr, missing))} in the store; it has "
                    f"{', '.join(store.categories) or 'none'}. Build it with obs=[…] to keep more columns."
                )
            phenotypes = {name: store.categories[name] for name in phenotypes}
        return cls(store.gene_ids.tolist(), scheme=scheme, phenotypes=phenotypes, **kwargs)

    # ------------------------------------------------------------------ vocabulary

    def _build_vocabulary(self) -> None:
        tokens = list(SPECIAL_TOKENS)
        self._phenotype_ids: dict[str, dict[str, int]] = {}
        for category, values in self.phenotypes.items():
            ids = self._phenotype_ids[category] = {}
            seen: dict[str, str] = {}
            for value in values:
                token = "[" + value.replace(" ", "_").strip() + "]"
                if token in seen:
                    raise ValueError(
                        f"Values {seen[token]!r} and {value!r} of phenotype {category!r} both become {token}; "
                        "rename one, or list it once."
                    )
                seen[token] = value
                ids[value] = len(tokens)
                tokens.append(f"[{category}={token[1:-1]}]" if token in tokens else token)
        self._first_bin_id = len(tokens)
        tokens += [f"bin_{i}" for i in range(self.n_bins)]
        self._tokens = tokens
        self._token_to_id = {token: i for i, token in enumerate(tokens)}
        self._gene_to_index = {_strip_version(gene): i for i, gene in enumerate(self.genes)}

    @property
    def n_bins(self) -> int:
        """Number of bins, `bin_0` counted: one more than there are edges."""
        return len(self.bin_edges) + 1

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        return len(self._tokens)

    @property
    def gene_token_type_offset(self) -> int:
        """Token type of the first gene: 1 + number of phenotype categories."""
        return 1 + len(self.phenotypes)

    @property
    def type_vocab_size(self) -> int:
        """Number of token types."""
        return self.gene_token_type_offset + len(self.genes)

    @property
    def genes_start_ind(self) -> int:
        """Position of the first gene in a cell that has all included phenotypes."""
        return 1 + len(self.included_phenotypes)

    @property
    def first_bin_id(self) -> int:
        """Token id of `bin_0`."""
        return self._first_bin_id

    @property
    def max_length(self) -> int:
        """Most tokens a cell may have (`model_max_length` of any tokenizer)."""
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
                f"Unknown phenotype {', '.join(map(repr, unknown))}; the vocabulary has "
                f"{', '.join(self.phenotypes) or 'none'}."
            )
        if len(set(categories)) < len(categories):
            raise ValueError(f"included_phenotypes names a category twice: {list(categories)}.")
        self._included_phenotypes = list(categories)

    @property
    def fingerprint(self) -> str:
        """Hash of everything that gives ids and types their meaning; a model keeps it in its configuration."""
        meaning = json.dumps([self.scheme, self.bin_edges, self.genes, self.phenotypes])
        return hashlib.sha256(meaning.encode()).hexdigest()[:16]

    def get_vocab(self) -> dict[str, int]:
        """Token -> id."""
        return {**self._token_to_id, **self._added_tokens_encoder}

    def _tokenize(self, text: str, **kwargs) -> list[str]:
        return text.split()

    def _convert_token_to_id(self, token: str) -> int | None:
        return self._token_to_id.get(token)

    def _convert_id_to_token(self, index: int) -> str:
        return self._tokens[index]

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """Join tokens by spaces."""
        return " ".join(tokens)

    def convert_token_types_to_names(self, token_type_ids: Iterable[int]) -> list[str | None]:
        """Gene id or phenotype category of each token type; None for type 0."""
        names = [None, *self.phenotypes, *self.genes]
        return [names[int(i)] for i in token_type_ids]

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str]:
        """Write `gene_vocabulary.json`.

        Parameters
        ----------
        save_directory : str
            An existing folder.
        filename_prefix : str, optional
            Put before the file's name.

        Returns
        -------
        tuple of str
            The path written.
        """
        prefix = f"{filename_prefix}-" if filename_prefix else ""
        path = os.path.join(save_directory, prefix + VOCAB_FILES_NAMES["vocab_file"])
        vocabulary = {
            "format_version": FORMAT_VERSION,
            "scheme": self.scheme,
            "bin_edges": self.bin_edges,
            "max_length": self.max_length,
            "included_phenotypes": self.included_phenotypes,
            "phenotypes": self.phenotypes,
            "genes": self.genes,
        }
        with open(path, "w", encoding="utf-8") as file:
            json.dump(vocabulary, file, ensure_ascii=False, indent=0)
        return (path,)

    # ------------------------------------------------------------------ masks

    def get_special_tokens_mask(self, token_ids_0, token_ids_1=None, already_has_special_tokens: bool = False):
        """Tell special tokens from others.

        Parameters
        ----------
        token_ids_0 : list of int, array or Tensor
            Token ids.
        token_ids_1 : None
            A cell is one sequence.
        already_has_special_tokens : bool, default: False
            Whether the ids hold `[CLS]` and `[EOS]`; if not, the mask is of the ids with these added.

        Returns
        -------
        Same kind as `token_ids_0`
            1 for `[CLS]`, `[EOS]`, `[MASK]` and `[PAD]`, else 0; booleans for arrays and tensors.
        """
        if token_ids_1 is not None:
            raise ValueError("A cell is one sequence; token_ids_1 has no meaning.")
        if not already_has_special_tokens:
            token_ids_0 = self.build_inputs_with_special_tokens(token_ids_0)
        return _elementwise(token_ids_0, lambda ids: ids < len(SPECIAL_TOKENS))

    def build_inputs_with_special_tokens(self, token_ids_0: list[int], token_ids_1: None = None) -> list[int]:
        """`[CLS]`, the ids, `[EOS]`."""
        return [self.cls_token_id, *token_ids_0, self.eos_token_id]

    def get_phenotypic_tokens_mask(self, input_ids):
        """1 (or True) for ids of phenotype values, in the kind of `input_ids` (list, array, Tensor).

        A masked phenotype is a special token; its token type still names the category.
        """
        return _elementwise(input_ids, lambda ids: (ids >= len(SPECIAL_TOKENS)) & (ids < self._first_bin_id))

    def get_gene_tokens_mask(self, input_ids):
        """1 (or True) for ids of expression bins, in the kind of `input_ids` (list, array, Tensor)."""
        return _elementwise(input_ids, lambda ids: ids >= self._first_bin_id)

    # ------------------------------------------------------------------ cells to tokens

    def __call__(
        self,
        cells,
        *,
        genes: Sequence[str] | None = None,
        obs=None,
        layer: str | None = None,
        padding: bool | str = False,
        max_length: int | None = None,
        pad_to_multiple_of: int | None = None,
        return_tensors: str | None = None,
        return_attention_mask: bool = True,
    ) -> BatchEncoding:
        """Tokenize cells.

        Parameters
        ----------
        cells : AnnData, sparse or dense matrix (n, n_columns), or CellBatch
            Counts. An AnnData or a `CellBatch` (of `CellStore.__getitems__`) brings its own genes and obs.
        genes : sequence of str, optional
            Gene ids of a matrix's columns; the tokenizer's own genes, in order, by default.
        obs : DataFrame or dict of column to values, optional
            Phenotypes of a matrix's rows.
        layer : str, optional
            Layer of an AnnData to read instead of X.
        padding : bool, "longest" or "max_length", default: False
            Pad to the longest cell (True, "longest") or to `max_length`.
        max_length : int, optional
            In place of the tokenizer's own.
        pad_to_multiple_of : int, optional
            Round the padded length up to a multiple of this.
        return_tensors : {"pt", "np"}, optional
            Tensors or arrays (n, length) in place of lists. Needs padding, unless all cells are of one length.
        return_attention_mask : bool, default: True
            Whether to give `attention_mask`.

        Returns
        -------
        BatchEncoding
            `input_ids`, `token_type_ids` (and `attention_mask`): one list a cell, in the order of the cells.

        Raises
        ------
        ValueError
            Values that are not counts; fewer than `min_coverage` of the counts in known genes; shapes that do not
            fit; tensors of ragged cells without padding.
        TypeError
            Something that is not cells, such as text.
        """
        tokens = self.encode_cells(cells, genes=genes, obs=obs, layer=layer, max_length=max_length)
        lengths = np.diff(tokens.indptr)
        columns = {"input_ids": tokens.input_ids, "token_type_ids": tokens.token_type_ids}
        if return_attention_mask:
            columns["attention_mask"] = np.ones(len(tokens.input_ids), np.int64)

        if padding in (False, "do_not_pad"):
            if return_tensors is None:
                cuts = tokens.indptr.tolist()
                return BatchEncoding(
                    {
                        name: [flat[start:stop].tolist() for start, stop in zip(cuts, cuts[1:], strict=False)]
                        for name, flat in columns.items()
                    }
                )
            if len(np.unique(lengths)) > 1:
                raise ValueError("Cells have different numbers of tokens: pass padding=True to make tensors of them.")
        elif padding not in (True, "longest", "max_length"):
            raise ValueError(f'padding is True, False, "longest" or "max_length", got {padding!r}.')

        length = int(lengths.max(initial=0))
        if padding == "max_length":
            length = max_length or self.max_length
        if pad_to_multiple_of:
            length = -(-length // pad_to_multiple_of) * pad_to_multiple_of
        values = {"input_ids": self.pad_token_id, "token_type_ids": 0, "attention_mask": 0}
        padded = {
            name: pad_ragged(flat, tokens.indptr, length, values[name], self.padding_side)
            for name, flat in columns.items()
        }
        if return_tensors is None:
            return BatchEncoding({name: array.tolist() for name, array in padded.items()})
        return BatchEncoding(padded, tensor_type=return_tensors)

    def encode_cells(
        self,
        cells,
        *,
        genes: Sequence[str] | None = None,
        obs=None,
        layer: str | None = None,
        max_length: int | None = None,
    ) -> TokenizedCells:
        """Tokenize cells into flat arrays: the fast path under `__call__`, with its parameters and errors."""
        max_length = self.max_length if max_length is None else max_length
        self._check_max_length(max_length)
        if (genes is not None or obs is not None) and (is_cell_batch(cells) or hasattr(cells, "var_names")):
            raise ValueError(f"genes= and obs= go with a matrix; a {type(cells).__name__} brings its own.")
        if is_cell_batch(cells):
            indptr, columns, counts = cells.indptr, cells.genes, cells.counts
            names, obs = (cells.gene_ids, cells.symbols), cells
        elif hasattr(cells, "obs") and hasattr(cells, "var_names"):
            matrix = cells.X if layer is None else cells.layers[layer]
            if matrix is None:
                raise ValueError("The AnnData has no X; name the layer that holds the counts, as in layer='counts'.")
            indptr, columns, counts = _csr_arrays(matrix)
            names = (cells.var_names, *(cells.var[name] for name in GENE_COLUMNS if name in cells.var))
            obs = cells.obs
            _check_counts(counts, "X" if layer is None else f"layer {layer!r}", cells.layers)
        elif hasattr(cells, "shape") and len(cells.shape) == 2:
            indptr, columns, counts = _csr_arrays(cells)
            if genes is None:
                genes = getattr(cells, "columns", self.genes)  # a DataFrame names its genes
            names = (genes,)
            if len(names[0]) != cells.shape[1]:
                raise ValueError(
                    f"The matrix has {cells.shape[1]} columns, and there are {len(names[0])} gene ids for them."
                    " Pass genes=[…], the gene ids of its columns."
                )
            _check_counts(counts, "the matrix", {})
        else:
            raise TypeError(
                f"GeneTokenizer takes an AnnData, a matrix of counts or a CellBatch, not {type(cells).__name__}. "
                "For token strings use convert_tokens_to_ids."
            )

        n_cells = len(indptr) - 1
        if self._last_table is not None and is_cell_batch(cells) and self._last_table[0] is cells.gene_ids:
            column_genes = self._last_table[1]
        else:
            column_genes = self._map_columns(names, columns, counts)
            self._last_table = (cells.gene_ids, column_genes) if is_cell_batch(cells) else None
        indptr, genes_, counts = _map_genes(indptr, columns, counts, column_genes)
        phenotypes = self._phenotype_tokens(obs, n_cells)
        return self._lay_out(indptr, genes_, counts, phenotypes, max_length)

    def _lay_out(
        self, indptr: np.ndarray, genes: np.ndarray, counts: np.ndarray, phenotypes: np.ndarray, max_length: int
    ) -> TokenizedCells:
        """Bin, truncate and write out the tokens of canonical CSR rows over the tokenizer's genes."""
        bins = self._bin(counts)
        indptr, (genes, counts, bins) = _keep(bins > 0, indptr, genes, counts, bins)

        has_phenotype = phenotypes >= 0
        n_phenotypes = has_phenotype.sum(axis=1)
        room = max_length - 2 - n_phenotypes
        dropped_types = dropped_cells = np.empty(0, np.int64)
        if (np.diff(indptr) > room).any():
            kept = _strongest(indptr, counts, room)
            cells = np.repeat(np.arange(len(indptr) - 1), np.diff(indptr))
            dropped_types, dropped_cells = genes[~kept] + self.gene_token_type_offset, cells[~kept]
            indptr, (genes, bins) = _keep(kept, indptr, genes, bins)

        n_genes = np.diff(indptr)
        out = np.zeros(len(indptr), np.int64)
        np.cumsum(n_genes + n_phenotypes + 2, out=out[1:])
        ids = np.empty(out[-1], np.int64)
        types = np.zeros(out[-1], np.int64)
        starts = out[:-1]
        ids[starts] = self.cls_token_id
        ids[out[1:] - 1] = self.eos_token_id

        cell, which = np.nonzero(has_phenotype)
        at = starts[cell] + has_phenotype.cumsum(axis=1)[cell, which]
        ids[at] = phenotypes[cell, which]
        sorted_categories = list(self.phenotypes)
        types[at] = np.array([1 + sorted_categories.index(name) for name in self._included_phenotypes], np.int64)[
            which
        ]

        at = np.arange(len(genes)) + np.repeat(starts + 1 + n_phenotypes - indptr[:-1], n_genes)
        ids[at] = bins + self._first_bin_id
        types[at] = genes + self.gene_token_type_offset
        return TokenizedCells(ids, types, out, dropped_types.astype(np.int64), dropped_cells)

    def _bin(self, counts: np.ndarray) -> np.ndarray:
        edges = np.asarray(self.bin_edges, np.float64)
        if counts.dtype in (np.uint8, np.uint16):  # few distinct values: look the bins up
            return np.searchsorted(edges, np.arange(np.iinfo(counts.dtype).max + 1), side="right")[counts]
        return np.searchsorted(edges, counts, side="right")

    def _map_columns(self, names: tuple, columns: np.ndarray, counts: np.ndarray) -> np.ndarray:
        """Gene index of each input column, -1 where unknown, by the kind of name that most columns are known by."""
        candidates = [
            np.array([self._gene_to_index.get(_strip_version(str(name)), -1) for name in candidate], np.int64)
            for candidate in names
        ]
        mapped = max(candidates, key=lambda candidate: (candidate >= 0).sum())
        known = mapped >= 0
        total = counts.sum(dtype=np.float64)
        known_genes = float(known.mean()) if len(known) else 0.0
        share = counts[known[columns]].sum(dtype=np.float64) / total if total else known_genes
        self.last_coverage = {
            "genes": known_genes,
            "counts": float(share),
            "vocabulary": len(np.unique(mapped[mapped >= 0])) / len(self.genes),
        }
        if share < self.min_coverage:
            raise ValueError(
                f"Only {share:.1%} of the counts are in genes that the tokenizer knows (at least "
                f"{self.min_coverage:.0%} are needed). The input names genes like {_sample(names[0])}; the tokenizer "
                f"like {_sample(self.genes)}. Give ids of the same kind, species and release, or lower "
                "tokenizer.min_coverage."
            )
        if known_genes < 1:
            logger.warning(
                f"{(mapped >= 0).sum()} of {len(mapped)} genes of the input are known to the tokenizer "
                f"({share:.1%} of its counts); the others are left out."
            )
        return mapped

    def _phenotype_tokens(self, obs, n_cells: int) -> np.ndarray:
        """Token id of each included phenotype of each cell (n_cells, n_included), -1 where there is none."""
        tokens = np.full((n_cells, len(self._included_phenotypes)), -1, np.int64)
        for i, category in enumerate(self._included_phenotypes):
            ids = self._phenotype_ids[category]
            if is_cell_batch(obs) and category in obs.categories:  # codes, -1 where missing, and their names
                names = obs.categories[category]
                tokens[:, i] = np.array([*(ids.get(str(name), -1) for name in names), -1])[obs.obs[category]]
            elif not is_cell_batch(obs) and obs is not None and category in obs:
                values = obs[category]
                if len(values) != n_cells:
                    raise ValueError(f"obs has {len(values)} rows for {n_cells} cells.")
                if hasattr(values, "cat"):  # by its categories: beside a missing value, whole numbers become 1.0, 2.0
                    of_code = [*(ids.get(str(name), -1) for name in values.cat.categories), -1]
                    tokens[:, i] = np.array(of_code)[values.cat.codes]
                else:
                    tokens[:, i] = [-1 if _is_missing(value) else ids.get(str(value), -1) for value in values]
            n_missing = int((tokens[:, i] < 0).sum())
            if n_missing and category not in self._told:
                self._told.add(category)
                logger.warning(
                    f"{n_missing} of {n_cells} cells have no known value of phenotype {category!r}; it is left out of "
                    "their tokens. (Told once.)"
                )
        return tokens

    def _check_max_length(self, max_length: int) -> None:
        needed = 3 + len(self._included_phenotypes)
        if max_length < needed:
            raise ValueError(
                f"max_length {max_length} leaves no room for a gene: [CLS], [EOS], {needed - 3} phenotypes and one "
                f"gene need {needed}."
            )


def is_cell_batch(cells) -> bool:
    """Whether `cells` is what `CellStore.__getitems__` gives: CSR rows with the gene ids of their columns."""
    return hasattr(cells, "indptr") and hasattr(cells, "gene_ids")


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
    lengths = np.diff(indptr)[:, None]
    column = np.arange(length)
    padded = np.full((len(lengths), length), value, flat.dtype)
    padded[column < lengths if side == "right" else column >= length - lengths] = flat
    return padded


# ---------------------------------------------------------------------- helpers


def _read_vocabulary(path: str | os.PathLike) -> dict:
    with open(path, encoding="utf-8") as file:
        saved = json.load(file)
    if saved.get("format_version", 0) > FORMAT_VERSION:
        raise ValueError(
            f"{path} has format version {saved['format_version']}; this tokenizer reads up to {FORMAT_VERSION}. "
            "Update stformer_hf."
        )
    return saved


def _check_genes(genes: Sequence[str] | None) -> list[str]:
    if genes is None or len(genes) == 0:
        raise ValueError("GeneTokenizer needs genes: a list of gene ids, as CellStore.gene_ids holds them.")
    genes = [str(gene) for gene in genes]
    seen: set[str] = set()
    twice = [gene for gene in genes if (name := _strip_version(gene)) in seen or seen.add(name)]
    if twice:
        raise ValueError(f"{len(twice)} gene ids occur twice (versions do not count): {_sample(twice)}.")
    return genes


def _check_bin_edges(bin_edges: Sequence[float]) -> list[float]:
    edges = [float(edge) for edge in bin_edges]
    if not edges or edges[0] <= 0 or not np.isfinite(edges).all() or (np.diff(edges) <= 0).any():
        raise ValueError(f"bin_edges are positive, finite and strictly increasing numbers, got {list(bin_edges)}.")
    return edges


def _strip_version(gene: str) -> str:
    match = _VERSION.match(gene)
    return match.group(1) if match else gene


def _sample(names: Iterable[str], n: int = 3) -> str:
    return ", ".join(str(name) for name in list(names)[:n]) or "(none)"


def _is_missing(value) -> bool:
    return value is None or value != value


def _elementwise(ids, test):
    if isinstance(ids, (list, tuple)):
        return test(np.asarray(ids, np.int64)).astype(int).tolist()
    return test(ids)


def _csr_arrays(matrix) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Row pointer, columns and values of a sparse, dense or backed matrix; columns ascending, each once."""
    if hasattr(matrix, "to_memory"):
        matrix = matrix.to_memory()
    if hasattr(matrix, "tocsr"):
        if matrix.format not in ("csr", "csc"):
            matrix = _widen(matrix)  # tocsr sums duplicates
        csr = matrix.tocsr()
        if not csr.has_canonical_format:
            csr = _widen(csr)
            csr.sum_duplicates()
        return csr.indptr.astype(np.int64), csr.indices, csr.data
    dense = np.asarray(matrix)
    rows, columns = np.nonzero(dense)
    indptr = np.zeros(dense.shape[0] + 1, np.int64)
    np.cumsum(np.bincount(rows, minlength=dense.shape[0]), out=indptr[1:])
    return indptr, columns, dense[rows, columns]


def _widen(matrix):
    """Copy a sparse matrix to values of 64 bits: sums of narrow ones would wrap."""
    return matrix.astype(np.float64 if matrix.dtype.kind == "f" else np.int64, copy=True)


def _is_counts(values: np.ndarray) -> bool:
    if values.dtype.kind in "ub":
        return True
    if values.dtype.kind == "i":
        return values.size == 0 or values.min() >= 0
    return bool(np.isfinite(values).all() and (values >= 0).all() and (values == np.rint(values)).all())


def _check_counts(values: np.ndarray, where: str, layers) -> None:
    if _is_counts(values):
        return
    found = "NaN or infinite" if not np.isfinite(values).all() else "negative" if (values < 0).any() else "fractional"
    holders = [name for name in layers if _is_counts(_csr_arrays(layers[name])[2])]
    remedy = f"layer={holders[0]!r} holds counts: pass it." if holders else "Pass the layer that holds raw counts."
    raise ValueError(f"Counts are needed, and {where} holds {found} values. {remedy}")


def _map_genes(
    indptr: np.ndarray, columns: np.ndarray, counts: np.ndarray, column_genes: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rename columns to the tokenizer's genes: unknown ones dropped, genes ascending, equal ones summed."""
    genes = column_genes[columns]
    known = column_genes[column_genes >= 0]
    if len(known) < len(column_genes):
        indptr, (genes, counts) = _keep(genes >= 0, indptr, genes, counts)
    if len(known) < 2 or (np.diff(known) > 0).all():
        return indptr, genes, counts
    n_genes = int(known.max()) + 1
    cells = np.repeat(np.arange(len(indptr) - 1), np.diff(indptr))
    keys = cells * n_genes + genes
    order = np.argsort(keys, kind="stable")
    keys, counts = keys[order], counts[order]
    first = np.ones(len(keys), bool)
    np.not_equal(keys[1:], keys[:-1], out=first[1:])
    if not first.all():
        wide = np.float64 if counts.dtype.kind == "f" else np.int64
        counts = np.add.reduceat(counts, np.flatnonzero(first), dtype=wide)
        indptr, (keys,) = _keep(first, indptr, keys)
    return indptr, keys % n_genes, counts


def _keep(mask: np.ndarray, indptr: np.ndarray, *arrays: np.ndarray) -> tuple[np.ndarray, tuple[np.ndarray, ...]]:
    """Drop the entries of CSR rows where the mask is False."""
    kept = np.zeros(len(mask) + 1, np.int64)
    np.cumsum(mask, out=kept[1:])
    return kept[indptr], tuple(array[mask] for array in arrays)


def _strongest(indptr: np.ndarray, counts: np.ndarray, room: np.ndarray) -> np.ndarray:
    """Mask of the `room[i]` largest counts of each row i; of equal counts the earlier ones."""
    lengths = np.diff(indptr)
    cells = np.repeat(np.arange(len(lengths)), lengths)
    order = np.lexsort((-counts.astype(np.float64), cells))  # stable: ties stay in gene order
    rank = np.empty(len(order), np.int64)
    rank[order] = np.arange(len(order)) - np.repeat(indptr[:-1], lengths)
    return rank < room[cells]


__all__ = ["GeneTokenizer", "TokenizedCells", "is_cell_batch", "pad_ragged"]
