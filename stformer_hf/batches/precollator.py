"""STFormerPreCollator: STFormer's stand-in for a tokenizer, for cells that are token ids already."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformers import BatchEncoding

from ..models.gene_bert.cell_counts import pad_ragged
from ..models.gene_bert.configuration_gene_bert import IGNORE
from ..models.gene_bert.legacy_files import read_token_dictionary
from ..models.gene_bert.tokenization_gene_bert import TokenizedCells

_PADDED_WITH = {"token_type_ids": 0, "attention_mask": 0, "special_tokens_mask": 1, "labels": IGNORE}


class STFormerPreCollator:
    """Pads token ids and names special tokens, for `DataCollatorForLanguageModeling` and `Trainer`.

    Parameters
    ----------
    token_dict : dict of str to int, or path of a .json or .pkl
        Token -> id, with `<pad>` and `<mask>`. A pickle may hold only data.

    Attributes
    ----------
    pad_token, mask_token : str
    pad_token_id, mask_token_id : int
    padding_side : str
        Always `right`.

    Raises
    ------
    ValueError
        `<pad>` or `<mask>` is missing; ids are not integers, or not unique.

    Notes
    -----
    STFormer's interface ("Pretraining"). Differences: `pad` respects its arguments and truncates; special tokens are
    marked regardless of `already_has_special_tokens`, because the masking collator passes True.
    `GeneTokenizer.from_token_dictionary` creates a tokenizer of cells from the same dictionary.
    """

    pad_token, mask_token, padding_side = "<pad>", "<mask>", "right"
    scheme, whole_cell, model_input_names = "rank", False, ["input_ids", "attention_mask"]

    def __init__(self, token_dict: Mapping[str, int] | str | Path):
        self.token_dict, special_tokens, _ = read_token_dictionary(token_dict)
        missing = {self.pad_token, self.mask_token} - self.token_dict.keys()
        if missing:
            raise ValueError(f"token_dict has no {' and no '.join(sorted(missing))}.")
        self._names = {i: token for token, i in self.token_dict.items()}
        if len(self._names) < len(self.token_dict) or min(self._names) < 0:
            raise ValueError("Two tokens of token_dict have the same id, or an id is negative.")
        self.pad_token_id, self.mask_token_id = self.token_dict[self.pad_token], self.token_dict[self.mask_token]
        self.all_special_ids = sorted(self.token_dict[token] for token in special_tokens.values())
        self.gene_token_ids = np.setdiff1d(list(self._names), self.all_special_ids)

    def __len__(self) -> int:
        return len(self.token_dict)

    @property
    def vocab_size(self) -> int:
        """Number of ids that a model needs: one more than the highest."""
        return max(self._names) + 1

    def get_gene_tokens_mask(self, input_ids: np.ndarray) -> np.ndarray:
        """Return a mask of gene ids, those that are not special: bool array."""
        return np.isin(input_ids, self.all_special_ids, invert=True)

    def get_phenotypic_tokens_mask(self, input_ids: np.ndarray) -> np.ndarray:
        """Return a mask of all False, since there are no phenotypes."""
        return np.zeros(np.shape(input_ids), bool)

    def columns(self, tokens: TokenizedCells, with_attention_mask: bool = False) -> dict[str, tuple[np.ndarray, int]]:
        """Return the model inputs as flat arrays, each with its padding value."""
        columns = {"input_ids": (tokens.input_ids, self.pad_token_id)}
        return {**columns, "attention_mask": (np.ones_like(tokens.input_ids), 0)} if with_attention_mask else columns

    def convert_tokens_to_ids(self, tokens: str | Sequence[str]) -> int | None | list[int | None]:
        """Return the ids of tokens; None for unknown tokens."""
        if isinstance(tokens, str):
            return self.token_dict.get(tokens)
        return [self.token_dict.get(token) for token in tokens]

    def convert_ids_to_tokens(self, ids: int | Sequence[int]) -> str | None | list[str | None]:
        """Return the tokens of ids; None for unknown ids."""
        if isinstance(ids, (int, np.integer)):
            return self._names.get(int(ids))
        return [self._names.get(int(i)) for i in ids]

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> BatchEncoding:
        """Put the token ids of examples into one batch, unpadded.

        Parameters
        ----------
        examples : sequence of dict
            Examples with `input_ids`.

        Returns
        -------
        BatchEncoding
            `input_ids`: a list of lists.
        """
        return BatchEncoding({"input_ids": [list(map(int, example["input_ids"])) for example in examples]})

    def pad(
        self,
        encoded_inputs: Mapping[str, Any] | Sequence[Mapping[str, Any]],
        padding: bool | str = True,
        max_length: int | None = None,
        pad_to_multiple_of: int | None = None,
        return_tensors: str | None = None,
        **kwargs: Any,
    ) -> BatchEncoding:
        """Pad, and truncate, to one length.

        Parameters
        ----------
        encoded_inputs : BatchEncoding, dict of lists, or sequence of dict
            Examples with `input_ids`; `token_type_ids`, `attention_mask`, `special_tokens_mask` and `labels` (one list
            per cell) are padded too, other columns are passed on.
        padding : bool or str, default: True
            True, "longest" or "max_length" pad to `max_length`, or to the longest if it is None; False or "do_not_pad"
            only truncate.
        max_length : int, optional
            Length to reach; longer cells lose their last tokens.
        pad_to_multiple_of : int, optional
            Round the length up to a multiple of this.
        return_tensors : {"pt", "np"}, optional
            Return tensors or arrays (n, length) instead of lists.
        **kwargs
            Arguments of other tokenizers; ignored.

        Returns
        -------
        BatchEncoding
            The columns, and `attention_mask`.

        Raises
        ------
        ValueError
            `padding` is unknown, or "max_length" without a length.
        """
        if padding not in (True, False, "longest", "max_length", "do_not_pad"):
            raise ValueError(f'padding must be True, False, "longest", "max_length" or "do_not_pad", got {padding!r}.')
        if padding == "max_length" and max_length is None:
            raise ValueError('padding="max_length" needs max_length.')
        if not len(encoded_inputs):
            raise ValueError("There are no examples to pad.")
        if not hasattr(encoded_inputs, "keys"):
            encoded_inputs = {name: [example[name] for example in encoded_inputs] for name in encoded_inputs[0]}
        columns = dict(encoded_inputs)
        if len(columns["input_ids"]) and np.ndim(columns["input_ids"][0]) == 0:
            raise ValueError("input_ids must be a list of cells, each a list of ids.")
        columns.setdefault("attention_mask", [np.ones(len(ids), np.int64) for ids in columns["input_ids"]])
        cut = slice(None) if max_length is None else slice(max_length)
        length = max((len(ids[cut]) for ids in columns["input_ids"]), default=0)
        if padding not in (False, "do_not_pad"):
            length = length if max_length is None else max_length
            length = -(-length // pad_to_multiple_of) * pad_to_multiple_of if pad_to_multiple_of else length
        batch = {}
        for name, values in columns.items():
            if name != "input_ids" and not (name in _PADDED_WITH and len(values) and np.ndim(values[0]) == 1):
                batch[name] = values
                continue
            rows = [np.asarray(row, np.int64)[cut] for row in values]
            if padding in (False, "do_not_pad"):
                batch[name] = [row.tolist() for row in rows]
            else:
                indptr = np.concatenate([[0], np.cumsum([len(row) for row in rows], dtype=np.int64)])
                flat = np.concatenate([np.empty(0, np.int64), *rows])
                padded = pad_ragged(flat, indptr, length, _PADDED_WITH.get(name, self.pad_token_id))
                batch[name] = padded if return_tensors else padded.tolist()
        return BatchEncoding(batch, tensor_type=return_tensors)

    def get_special_tokens_mask(
        self,
        token_ids_0: Sequence[int],
        token_ids_1: Sequence[int] | None = None,
        already_has_special_tokens: bool = False,
    ) -> list[int]:
        """Return 1 for `<pad>`, `<mask>`, `<cls>`, `<eos>` and `<sep>`, else 0."""
        return [int(i in self.all_special_ids) for i in [*token_ids_0, *(token_ids_1 or [])]]

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> tuple[str]:
        """Write the vocabulary as `token_dictionary.json` (`Trainer` calls this for each checkpoint)."""
        path = Path(save_directory)
        path.mkdir(parents=True, exist_ok=True)
        path = path / "token_dictionary.json"
        path.write_text(json.dumps(self.token_dict, indent=0))
        return (str(path),)
