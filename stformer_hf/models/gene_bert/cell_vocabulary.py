"""The vocabulary of cells: which ids the special tokens, the phenotypes and the words of the expression have."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from .gene_columns import sample
from .gene_matcher import GeneMatcher
from .phenotype_tokens import name_phenotypes
from .tokenizer_settings import TokenizerSettings

SPECIAL_TOKENS = {"cls_token": "[CLS]", "eos_token": "[EOS]", "mask_token": "[MASK]", "pad_token": "[PAD]"}


class CellVocabulary:
    """What the vocabularies of the two schemes share.

    The settings of the special tokens are checked and completed here. `words` are the tokens of the expression: bins
    or genes.
    """

    tokens: list[str]  # the token of each id
    ids: dict[str, int]  # the id of each token
    special_ids: np.ndarray  # int64, ascending
    all_phenotype_ids: np.ndarray  # int64, ascending
    phenotype_ids: dict[str, dict[str, int]]  # category -> token of a value -> id
    expression_ids: np.ndarray  # int64 (n_words,), the id of each word
    gene_type: int  # token type of the first gene
    gene_types: list[str]  # the name of each token type of genes; set by the encoder of a scheme

    required_roles = frozenset(("mask_token", "pad_token"))  # of the special tokens
    words_first = False  # whether the ids of the words come before those of the phenotypes

    def __init__(self, settings: TokenizerSettings, words: list[str]):
        if not settings.neighborhood:
            settings.separator = None
        special = dict(SPECIAL_TOKENS if settings.special_tokens is None else settings.special_tokens)
        if settings.separator is not None:
            special.setdefault("sep_token", settings.separator)
        if not self.required_roles <= set(special) <= {*SPECIAL_TOKENS, "sep_token"}:
            raise ValueError(
                f"special_tokens has the roles {', '.join(special)}; {', '.join(sorted(self.required_roles))} are "
                f"required, and {', '.join(SPECIAL_TOKENS)} and sep_token are allowed."
            )
        for role, name in (("cls_token", "add_cls"), ("eos_token", "add_eos")):
            if getattr(settings, name) is None:
                setattr(settings, name, role in special)
            if getattr(settings, name) and role not in special:
                raise ValueError(f"The vocabulary has no {role}: set it in special_tokens, or do not add it.")
        if settings.whole_cell and not settings.add_cls:
            raise ValueError("whole_cell=True needs add_cls=True: the model initialises [CLS] with the whole cell.")
        settings.special_tokens, self.settings = special, settings

        taken = [*special.values(), *(words if self.words_first else [])]
        if len(set(taken)) < len(taken):
            raise ValueError("A gene has the name of a special token.")
        names = name_phenotypes(settings.phenotypes, taken)
        of_phenotypes = [token for of in names.values() for token in of.values()]
        tokens = [*taken, *of_phenotypes, *([] if self.words_first else words)]
        self.tokens = _order(tokens, settings.token_ids)
        self.ids = ids = {token: i for i, token in enumerate(self.tokens)}
        self.special_ids = np.sort([ids[token] for token in special.values()])
        self.phenotype_ids = {
            category: {value: ids[token] for value, token in of.items()} for category, of in names.items()
        }
        self.all_phenotype_ids = np.sort(np.array([ids[token] for token in of_phenotypes], np.int64))
        self.expression_ids = np.array([ids[token] for token in words], np.int64)
        self.gene_type = 1 + len(settings.phenotypes)

    def find(self, token: str, matcher: GeneMatcher) -> int | None:
        """Return the id of a token, None if it is unknown."""
        return self.ids.get(token)

    def meaning(self) -> dict[str, Any]:
        """Return the settings that define the tokens, as saved."""
        names = ("scheme", "special_tokens", "token_ids", "phenotypes", "genes", "symbols")
        return self.settings.select(*names) | ({"whole_cell": True} if self.settings.whole_cell else {})


def _order(tokens: list[str], token_ids: Mapping[str, int] | None) -> list[str]:
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
