"""Ensembl gene ids: which names are some, of which species they are, and what they are without a version."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

_ENSEMBL = r"^(?P<prefix>ENS[A-Z]*)G\d{11}(?P<version>\.\d+)?$"
_SPECIES = {  # prefixes of Ensembl gene ids
    "ENS": "human",
    "ENSMUS": "mouse",
    "ENSRNO": "rat",
    "ENSDAR": "zebrafish",
    "ENSMMU": "macaque",
    "ENSPTR": "chimpanzee",
    "ENSSSC": "pig",
    "ENSBTA": "cow",
    "ENSGAL": "chicken",
    "ENSCJA": "marmoset",
}


def is_ensembl(names: np.ndarray) -> np.ndarray:
    """Tell which names are Ensembl gene ids, with or without a version: bool array (n,)."""
    return pc.match_substring_regex(pa.array(names, pa.string()), _ENSEMBL).to_numpy(zero_copy_only=False)


def mostly_ensembl(names: np.ndarray) -> bool:
    """Tell whether over half of the names are Ensembl gene ids."""
    return bool(is_ensembl(names).sum() > len(names) / 2)


def guess_species(gene_ids: np.ndarray) -> str | None:
    """Tell the species of Ensembl ids by their prefix: a name such as `human`, or the prefix of one not listed here.

    None where there are no Ensembl ids, and where under nine in ten of them agree (mixed species).
    """
    found = pc.extract_regex(pa.array(gene_ids, pa.string()), _ENSEMBL).drop_null()
    if not len(found):
        return None
    prefixes = pd.Series(found.field("prefix").to_pandas()).value_counts()
    if prefixes.iloc[0] < 0.9 * len(found):
        return None
    return _SPECIES.get(prefixes.index[0], prefixes.index[0])


def strip_versions(names: np.ndarray) -> np.ndarray:
    """Cut the versions of the Ensembl ids among names: object array (n,)."""
    ids = np.array(names, dtype=object)
    versioned = np.flatnonzero(is_ensembl(ids))
    ids[versioned] = [name.partition(".")[0] for name in ids[versioned]]
    return ids


__all__ = ["guess_species", "is_ensembl", "mostly_ensembl", "strip_versions"]
