"""Aliases: other names of genes in the sources, read from mappings, tables and files."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq

from ..models.gene_bert.gene_columns import clean_names, sample, strip_versions
from .gene_files import ID_COLUMNS, SYMBOL_COLUMNS, plain_name, whole_numbers
from .text_files import existing_file, naming, open_text, read_text_table, suffix_of

logger = logging.getLogger(__name__)

_TEXT = (".csv", ".tsv", ".txt")
_FILES = (".json", *_TEXT, ".parquet")
_WORDS = set("old new from to alias prev previous current name key value id symbol gene ensembl entrez hgnc".split())
_LITTLE = 0.1  # share of the aliases, or of the genes if these are fewer, below which a warning is logged


def read_aliases(aliases: Mapping[str, str] | pd.DataFrame | str | Path | None) -> dict[str, str]:
    """Read a table of old ids (or names) and new ones.

    Parameters
    ----------
    aliases : mapping, DataFrame or file, optional
        Old -> new. A DataFrame, or a csv, tsv, txt or parquet file, has them in its first two columns, or in its index
        and its only column; an unnamed column of row numbers, as written by `to_csv` and `write.csv`, is skipped. In
        text files, the first line is a header if it begins with an empty field, or if both fields are column names
        (`old`, `new`, `gene_id`, `symbol`, …); otherwise it is a pair like the lines below. A json file is one object.
        Text and json may be compressed with gzip.

    Returns
    -------
    dict of str to str
        Names unchanged, ids without version. Old names with multiple new ones are left out, as are pairs without a new
        name (empty, missing, R's `NA`), with a warning.

    Raises
    ------
    ValueError
        The file has another format, or no pairs; a column may hold row numbers or names.
    """
    if aliases is None:
        return {}
    if isinstance(aliases, (str, Path)):
        path = Path(aliases)
        if suffix_of(path) not in _FILES:
            raise ValueError(f"{path}: aliases must be in one of {', '.join(_FILES)} files.")
        with naming(path, "aliases"):
            pairs = _read_file(existing_file(path))
        if not pairs:
            raise ValueError(f"{path} has no aliases.")
        return _unique(pairs, str(path))
    pairs = _pairs(aliases, named=True) if isinstance(aliases, pd.DataFrame) else list(aliases.items())
    return _unique(pairs, "aliases")


def warn_of_few_matches(aliases: Mapping[str, str], gene_ids: Iterable[str]) -> None:
    """Log a warning if none or few of the aliases, as `read_aliases` returns them, are genes of the sources."""
    if not aliases:
        return
    gene_ids = set(gene_ids)
    n = sum(old in gene_ids for old in aliases)
    if n < _LITTLE * min(len(aliases), len(gene_ids)):
        logger.warning(
            f"{n} of {len(aliases)} aliases are genes of the sources. The aliases are for names like "
            f"{sample(map(repr, aliases))}, but the {len(gene_ids)} genes have ids like "
            f"{sample(map(repr, sorted(gene_ids)))}: aliases must be {{id, or name if there is no id: new id}}."
        )


def _read_file(path: Path) -> list[tuple[Any, Any]]:
    if suffix_of(path) == ".parquet":
        return _pairs(pq.read_table(path).to_pandas(), named=True)
    if suffix_of(path) == ".json":
        with open_text(path) as file:
            content = json.loads(file.read(), object_pairs_hook=tuple)  # a name may be repeated
        if not isinstance(content, tuple) or not all(isinstance(new, str | int | None) for _, new in content):
            raise ValueError("it must be one object {old: new}.")
        return list(content)
    table = read_text_table(path, header=False)
    named = len(table) > 0 and _is_header(table.iloc[0, :2].tolist())
    if named:
        table = table[1:].set_axis(table.iloc[0].tolist(), axis=1).reset_index(drop=True)
    return _pairs(table, named)


def _is_header(fields: Sequence[str]) -> bool:
    words = [plain_name(field) for field in fields]
    usual = {*ID_COLUMNS, *SYMBOL_COLUMNS}
    return fields[0].strip() == "" or all(word in usual or set(word.split("_")) <= _WORDS for word in words)


def _pairs(table: pd.DataFrame, named: bool) -> list[tuple[Any, Any]]:
    """Return pairs from the columns of old and new names; `named` is whether the table's columns have names."""
    if table.shape[1] == 1 and not isinstance(table.index, pd.RangeIndex):
        table = table.reset_index()
    if table.shape[1] > 2 and _is_numbering(table.iloc[:, 0]):
        if not named:
            raise ValueError("its first column may be row numbers or names: add a first line with column names.")
        if str(table.columns[0]) in ("", "Unnamed: 0"):
            table = table.iloc[:, 1:]
    if table.shape[1] < 2:
        raise ValueError("a table of aliases needs two columns, old id and new id.")
    return list(zip(*(whole_numbers(table.iloc[:, i]).tolist() for i in (0, 1)), strict=True))


def _is_numbering(column: pd.Series) -> bool:
    names = list(map(str, column))
    return len(names) > 0 and names in ([str(i + first) for i in range(len(names))] for first in (0, 1))


def _unique(pairs: list[tuple[Any, Any]], name: str) -> dict[str, str]:
    old, new = (np.array([_text(pair[side]) for pair in pairs], object) for side in (0, 1))
    missing = [o == "" or n in ("", "NA") for o, n in zip(old, new, strict=True)]
    found: dict[str, set[str]] = {}
    cleaned = clean_names(old)
    cleaned[cleaned == ""] = old[cleaned == ""]  # such as "NA", a gene name in older releases
    for o, n, absent in zip(cleaned, strip_versions(new), missing, strict=True):
        if not absent:
            found.setdefault(o, set()).add(n)
    several = [o for o, names in found.items() if len(names) > 1]
    if any(missing):
        logger.warning(f"{name}: {sum(missing)} of {len(missing)} pairs lack the old or new name and are left out.")
    if several:
        logger.warning(
            f"{name}: {len(several)} old names have more than one new name, such as {several[0]} "
            f"({', '.join(sorted(found[several[0]]))}); they are not renamed."
        )
    return {o: next(iter(names)) for o, names in found.items() if len(names) == 1 and o not in names}


def _text(name: Any) -> str:
    if not pd.api.types.is_scalar(name):
        raise ValueError(f"aliases must be {{old: new}}, one name each, got {name!r}.")
    return "" if pd.isna(name) else str(name).strip()
