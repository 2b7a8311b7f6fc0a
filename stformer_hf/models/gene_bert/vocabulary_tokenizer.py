"""The vocabulary of a GeneTokenizer as transformers sees it: names, text, masks, model inputs and files."""

import hashlib
import itertools
import json
import os
from collections.abc import Iterable, Sequence
from operator import attrgetter
from typing import Any, TypeVar, cast

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BatchEncoding, PreTrainedTokenizer

from .bin_encoder import BinEncoder
from .cell_counts import pad_ragged
from .gene_matcher import GeneMatcher
from .rank_encoder import RankEncoder
from .tokenized_cells import TokenizedCells
from .tokenizer_settings import FORMAT_VERSION, OF_MEANING, OF_READING, TokenizerSettings

VOCAB_FILES_NAMES = {"vocab_file": "gene_vocabulary.json"}

_Ids = TypeVar("_Ids", list[int], np.ndarray, torch.Tensor)


class VocabularyTokenizer(PreTrainedTokenizer):
    """A tokenizer with the vocabulary of an encoder; cells may be written as text, such as `[CLS] TP53 MYC [EOS]`."""

    vocab_files_names = VOCAB_FILES_NAMES
    model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    padding_side = "right"

    def __init__(self, settings: TokenizerSettings, encoder: BinEncoder | RankEncoder, **kwargs: Any):
        self.encoder = encoder
        for name in OF_READING:
            setattr(self, name, getattr(settings, name))
        self._matcher = GeneMatcher(self.genes, self.symbols, self.gene_weights)
        kwargs["model_max_length"] = self.max_length
        more = ["expression_values"] * self.values + ["cell_genes", "cell_counts"] * self.whole_cell
        if more:
            kwargs.setdefault("model_input_names", [*self.model_input_names, *more])
        for role, token in settings.special_tokens.items():
            kwargs.setdefault(role, token)
        super().__init__(**kwargs)

    # ------------------------------------------------------------------ ids and types

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        return len(self.encoder.tokens)

    @property
    def type_vocab_size(self) -> int:
        """Number of token types."""
        return self.encoder.gene_type + len(self.encoder.gene_types)

    @property
    def gene_token_type_offset(self) -> int:
        """Token type of the first gene (rank scheme: of all genes): 1 + number of phenotype categories."""
        return self.encoder.gene_type

    @property
    def gene_token_ids(self) -> np.ndarray:
        """Token id of each gene in the rank scheme, int64 array (n_genes,)."""
        return cast(RankEncoder, self.encoder).gene_token_ids

    @property
    def n_bins(self) -> int:
        """Number of bins including `bin_0`: one more than the number of edges (the largest over genes)."""
        return cast(BinEncoder, self.encoder).n_bins

    @property
    def first_bin_id(self) -> int:
        """Token id of `bin_0`."""
        return cast(BinEncoder, self.encoder).first_bin_id

    @property
    def max_length(self) -> int:
        """Maximum number of tokens per cell (`model_max_length` of any tokenizer)."""
        return self.model_max_length

    @max_length.setter
    def max_length(self, length: int) -> None:
        self.model_max_length = length

    @property
    def genes_start_ind(self) -> int:
        """Position of the first gene in a cell that has all included phenotypes."""
        return int(self.add_cls) + len(self._included_phenotypes)

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

    def phenotype_token_ids(self, category: str) -> np.ndarray:
        """Return the token ids of a category's values, int64 array; empty for an unknown category."""
        return np.array(list(self.encoder.phenotype_ids.get(category, {}).values()), np.int64)

    def gene_counters(self, genes: np.ndarray) -> np.ndarray:
        """Return the token types of genes (rank scheme: their token ids), int64 array (n,)."""
        return self.encoder.gene_counters(genes)

    def genes_of(self, input_ids: np.ndarray, token_type_ids: np.ndarray) -> np.ndarray:
        """Return the gene index of each gene token, int64 array (n,); the rank scheme reads it from the ids."""
        return self.encoder.genes_of(input_ids, token_type_ids)

    # ------------------------------------------------------------------ names

    def get_vocab(self) -> dict[str, int]:
        """Return the vocabulary as a dict of token to id."""
        return {**self.encoder.ids, **self._added_tokens_encoder}

    def _tokenize(self, text: str, **kwargs: Any) -> list[str]:
        return text.split()

    def _convert_token_to_id(self, token: str) -> int | None:
        return self.encoder.find(token, self._matcher)

    def _convert_id_to_token(self, index: int) -> str:
        return self.encoder.tokens[index]

    def convert_token_types_to_names(self, token_type_ids: Iterable[int]) -> list[str | None]:
        """Return the name of each token type: gene, category, `cell` or `neighborhood` (ranks); None for type 0."""
        names = [None, *self.phenotypes, *self.encoder.gene_types]
        return [names[int(i)] for i in token_type_ids]

    def find_genes(self, names: Iterable[str], symbols: Iterable[str] | None = None) -> np.ndarray:
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

    # ------------------------------------------------------------------ cells as text

    def build_inputs_with_special_tokens(
        self, token_ids_0: Iterable[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        """Return the ids between `[CLS]` and `[EOS]`."""
        return [self.cls_token_id] * self.add_cls + [*token_ids_0] + [self.eos_token_id] * self.add_eos

    def create_token_type_ids_from_sequences(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        """Return the token types of a cell written as text, with `[CLS]` and `[EOS]`; see `prepare_for_model`."""
        return self._types_of_text(self.build_inputs_with_special_tokens(token_ids_0, token_ids_1))

    def prepare_for_model(
        self,
        ids: list[int],
        pair_ids: list[int] | None = None,
        add_special_tokens: bool = True,
        *,
        return_tensors: str | None = None,
        prepend_batch_axis: bool = False,
        **kwargs: Any,
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
        self.encoder.check_text(ids)
        encoded = super().prepare_for_model(ids, None, add_special_tokens, **kwargs)
        if "token_type_ids" in encoded:
            encoded["token_type_ids"] = self._types_of_text(encoded["input_ids"])
        return BatchEncoding(dict(encoded), tensor_type=return_tensors, prepend_batch_axis=prepend_batch_axis)

    def _types_of_text(self, input_ids: Sequence[int]) -> list[int]:
        encoder = self.encoder
        encoder.check_text(input_ids)
        assert isinstance(encoder, RankEncoder)  # the other refuses text
        separator = None if self.separator is None else self.sep_token_id
        return encoder.types_of_text(input_ids, self.mask_token_id, separator, self._included_phenotypes)

    def pad(self, encoded_inputs: Any, *args: Any, **kwargs: Any) -> BatchEncoding:
        """Pad as any tokenizer does; refuse cells that are not tokenized, and what transformers' collators do not pad.

        They do not mask `expression_values` and `cell_counts` either.
        """
        first = encoded_inputs if hasattr(encoded_inputs, "keys") else next(iter(encoded_inputs), {})
        names = list(first.keys()) if hasattr(first, "keys") else [type(first).__name__]
        if names and "input_ids" not in names:
            raise ValueError(
                f"pad needs tokens (input_ids), but got {', '.join(map(str, names))}. Trainer pads the cells of a "
                "store if it has no collator: pass data_collator=DataCollatorForPhenotypicMLM(tokenizer), or another "
                "collator of stformer_hf, which tokenizes them."
            )
        found = [name for name in ("expression_values", "cell_counts") if name in first]
        if found:
            raise ValueError(
                f"pad cannot handle {found[0]}: use DataCollatorForPhenotypicMLM or another collator of stformer_hf."
            )
        return super().pad(encoded_inputs, *args, **kwargs)

    # ------------------------------------------------------------------ masks

    def get_special_tokens_mask(
        self, token_ids_0: _Ids, token_ids_1: list[int] | None = None, already_has_special_tokens: bool = False
    ) -> _Ids | list[int]:
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
        Same kind as `token_ids_0`, or a list if `[CLS]` and `[EOS]` are added
            1 for `[CLS]`, `[EOS]`, `[MASK]`, `[PAD]` and `[SEP]`, else 0; booleans for arrays and tensors.
        """
        if token_ids_1 is not None:
            raise ValueError("A cell is one sequence: token_ids_1 must be None.")
        if already_has_special_tokens:
            return _among(token_ids_0, self.encoder.special_ids)
        return _among(self.build_inputs_with_special_tokens(token_ids_0), self.encoder.special_ids)

    def get_phenotypic_tokens_mask(self, input_ids: _Ids) -> _Ids:
        """Return 1 (or True) for ids of phenotype values, as the type of `input_ids` (list, array, Tensor).

        A masked phenotype is a special token; its token type still shows the category.
        """
        return _among(input_ids, self.encoder.all_phenotype_ids)

    def get_gene_tokens_mask(self, input_ids: _Ids) -> _Ids:
        """Return 1 (or True) for ids of expression bins or genes, as the type of `input_ids` (list, array, Tensor)."""
        return _among(input_ids, self.encoder.expression_ids)

    # ------------------------------------------------------------------ model inputs

    def _ragged(self, tokens: TokenizedCells, with_attention_mask: bool) -> BatchEncoding:
        """Return the model inputs as one list per cell."""
        of_cells = self.cell_columns(tokens)
        both = [(self.columns(tokens, with_attention_mask), tokens.indptr)]
        if tokens.cells is not None:
            both.append((of_cells, tokens.cells.indptr))
        ragged = {
            name: [flat[start:stop].tolist() for start, stop in itertools.pairwise(indptr.tolist())]
            for some, indptr in both
            for name, (flat, _) in some.items()
        }
        measured = tokens.measured_genes() if of_cells else {}
        return BatchEncoding({**ragged, **{name: array.tolist() for name, array in measured.items()}})

    def pad_tokens(
        self, tokens: TokenizedCells, length: int | None = None, with_attention_mask: bool = True
    ) -> dict[str, np.ndarray]:
        """Return the model inputs as arrays with one row per cell, of a length or as long as the longest cell."""
        length = int(np.diff(tokens.indptr).max(initial=1)) if length is None else length
        padded = {
            name: pad_ragged(flat, tokens.indptr, length, value, self.padding_side)
            for name, (flat, value) in self.columns(tokens, with_attention_mask).items()
        }
        return {**padded, **self.pad_cells(tokens)}

    def columns(
        self, tokens: TokenizedCells, with_attention_mask: bool = False
    ) -> dict[str, tuple[np.ndarray, int | float]]:
        """Return the model inputs in `model_input_names` as flat arrays, each with its padding value.

        Raises
        ------
        ValueError
            The tokens have no expression values, but `model_input_names` has.
        """
        columns = {"input_ids": (tokens.input_ids, self.pad_token_id), "token_type_ids": (tokens.token_type_ids, 0)}
        if "expression_values" in self.model_input_names:
            if tokens.expression_values is None:
                raise ValueError(
                    "The model reads values, but the tokens have no expression_values: tokenize the cells with this "
                    "tokenizer, or train on the store."
                )
            columns["expression_values"] = (tokens.expression_values, 0.0)
        if with_attention_mask:
            columns["attention_mask"] = (np.ones(len(tokens.input_ids), np.int64), 0)
        return {name: column for name, column in columns.items() if name in self.model_input_names}

    def cell_columns(self, tokens: TokenizedCells) -> dict[str, tuple[np.ndarray, int | float]]:
        """Return the model inputs of whole cells as flat arrays over `tokens.cells`, each with its padding value."""
        if tokens.cells is None:
            return {}
        columns = {"cell_genes": (tokens.cells.columns, 0), "cell_counts": (tokens.cells.counts, 0.0)}
        return {name: column for name, column in columns.items() if name in self.model_input_names}

    def pad_cells(self, tokens: TokenizedCells) -> dict[str, np.ndarray]:
        """Return `cell_columns` as matrices, padded on the right to the largest cell, and `measured_genes`."""
        columns = self.cell_columns(tokens)
        if tokens.cells is None or not columns:
            return {}
        indptr = tokens.cells.indptr
        most = max(int(np.diff(indptr).max(initial=0)), 1)
        padded = {name: pad_ragged(flat, indptr, most, value) for name, (flat, value) in columns.items()}
        return {**padded, **tokens.measured_genes()}

    # ------------------------------------------------------------------ files

    @property
    def fingerprint(self) -> str:
        """Hash of everything that defines the meaning of ids and types; a model keeps it in its configuration."""
        other = ("symbols", "add_cls", "add_eos")
        meaning = {name: value for name, value in self.encoder.meaning().items() if name not in other}
        return hashlib.sha256(json.dumps(meaning).encode()).hexdigest()[:16]

    def saved_settings(self) -> dict[str, Any]:
        """Return the settings as `gene_vocabulary.json` holds them."""
        settings = {name: getattr(self, name) for name in OF_READING}
        if self.gene_weights is None:
            del settings["gene_weights"]
        else:
            weights = self.gene_weights.tolist()
            settings["gene_weights"] = [int(weight) if weight.is_integer() else weight for weight in weights]
        if self.match == "id":
            del settings["match"]
        return {**settings, **self.encoder.meaning()}

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
        with open(path, "w", encoding="utf-8") as file:
            # json.dump, and indents, take ten times as long.
            file.write(json.dumps({"format_version": FORMAT_VERSION, **self.saved_settings()}, ensure_ascii=False))
        words = Tokenizer(models.WordLevel(self.get_vocab()))
        words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        words.add_special_tokens(list(self.encoder.settings.special_tokens.values()))
        words_path = os.path.join(save_directory, prefix + "tokenizer.json")
        words.save(words_path)
        return path, words_path


# What tokens mean is fixed: these settings are read-only attributes, and None if they are of the other scheme.
for _name in OF_MEANING:
    setattr(VocabularyTokenizer, _name, property(attrgetter(f"encoder.settings.{_name}")))


def _among(ids: _Ids, wanted: np.ndarray) -> _Ids:
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
