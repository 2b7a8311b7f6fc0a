"""Feature types of the columns of a matrix, as in 10x files: which are genes, and which proteins, peaks or guides."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from transformers.utils import logging

from .gene_columns import as_text, listed, plain_name

logger = logging.get_logger(__name__)
_FEATURE_COLUMNS = ("featuretypes", "featuretype", "modality")
GENES = "Gene Expression"  # the feature type of genes in 10x files
_GENE_TYPES = frozenset(("gene expression", "gene", "genes", "gex", "rna", "mrna", "expression"))
_OTHER_TYPES = frozenset(
    (
        *("antibody capture", "crispr guide capture", "multiplexing capture", "antigen capture", "custom", "peaks"),
        *("vdj", "vdj-t", "vdj-b", "chromatin accessibility", "atac", "adt", "hto", "prot", "protein", "cite"),
        *("negative control probe", "negative control codeword", "blank codeword", "unassigned codeword"),
        *("deprecated codeword", "genomic control", "guide", "grna", "hashtag", "antibody"),
    )
)
_OTHER_WORDS = frozenset(("antibody", "blank", "codeword", "control", "crispr", "guide", "hashtag", "peak", "peaks"))


def feature_types(columns: Mapping[str, Sequence[Any]] | None) -> np.ndarray | None:
    """Return the feature type of each column of a matrix, as in 10x files: object array of str (n,).

    This is `Gene Expression`, or another type as written, from the column `feature_types`, `feature_type` or
    `modality` of `var`. A blank among known types is a gene. None if all are genes, also if no type is known (but
    biotypes, or blanks).
    """
    found = _read_types(columns)
    if found is None:
        return None
    values, types, genes = found
    if genes == set(types.values()):
        return None
    return np.array([GENES if types[value] in genes else types[value] for value in values], object)


def are_genes(modality: str, columns: Mapping[str, Sequence[Any]] | None) -> bool | None:
    """Return whether genes are among the features of a modality, None if that is unknown.

    The feature types in the columns of its `var` show it, else its name, such as `rna`, `prot` or `atac`.
    """
    found = _read_types(columns)
    if found is not None:
        return bool(found[2])
    name = modality.lower().replace("_", " ")
    return True if name in _GENE_TYPES else False if name in _OTHER_TYPES else None


def _read_types(columns: Mapping[str, Sequence[Any]] | None) -> tuple[list, dict[Any, str], set[str]] | None:
    """Read the column of feature types: its values, each value as text, and which of these are genes.

    None if there is no such column, or it holds no known type.
    """
    columns = {} if columns is None else columns
    for name in columns:
        if plain_name(name) not in _FEATURE_COLUMNS:
            continue
        values = listed(columns[name])
        types = {value: as_text(value) for value in set(values)}
        plain = {kind: kind.lower().replace("_", " ") for kind in types.values()}
        others = {
            kind
            for kind, word in plain.items()
            if word in _OTHER_TYPES or not _OTHER_WORDS.isdisjoint(re.split(r"[^a-z]+", word))
        }
        unknown = {kind for kind, word in plain.items() if word and word not in _GENE_TYPES and kind not in others}
        if unknown:
            logger.warning(
                f"var[{name!r}] holds unknown feature types, {', '.join(sorted(unknown)[:3])}: treated as genes."
            )
        if unknown != {kind for kind, word in plain.items() if word}:
            return values, types, set(plain) - others
    return None
