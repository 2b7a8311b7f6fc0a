"""How the columns of sources were matched to genes, as a table and in words."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from ..genes.unite import FATES

logger = logging.getLogger(__name__)

_MOST_SOURCES_PRINTED = 20


def coverage(sources: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """Tabulate how the columns of each source, and the counts in them, were matched to genes.

    Returns
    -------
    DataFrame
        One row per source: `cells`, `columns`, `genes` (rows of the gene table), then for each fate the number of
        columns and their share of all counts: `kept` (its own Ensembl id), `mapped` (by `aliases` or symbol),
        `unmapped` (no Ensembl id; kept under its name).
    """
    rows = []
    for source in sources:
        total = sum(source["total_counts"].values()) or 1.0
        row = {"source": source["name"], "cells": source["n_cells"], "columns": source["n_columns"]}
        row["genes"] = source["n_genes"]
        for fate in FATES:
            row[fate] = source["columns"][fate]
            row[f"counts {fate}"] = source["total_counts"][fate] / total
        rows.append(row)
    return pd.DataFrame(rows).set_index("source")


def print_coverage(sources: Sequence[Mapping[str, Any]], n_cells: int) -> None:
    """Print how the genes of sources were matched, and log how many of all `n_cells` are empty cells of theirs."""
    table = coverage(sources)
    for row in table.head(_MOST_SOURCES_PRINTED).reset_index().to_dict("records"):
        print(f"{row['source']}: {row['cells']:,} cells, {row['genes']:,} genes, {_in_words(row)}")
    if len(table) > _MOST_SOURCES_PRINTED:
        print(f"… and {len(table) - _MOST_SOURCES_PRINTED} more sources: see store.coverage")
    repeated = sum(source["n_columns"] - source["n_genes"] for source in sources)
    if repeated:
        logger.warning(f"{repeated} columns repeat the gene id of another; their counts are summed.")
    n_empty = sum(source["n_empty"] for source in sources)
    if n_empty:
        logger.warning(f"{n_empty} of {n_cells} cells have no counts; they are kept, and training skips them.")


def _in_words(row: Mapping[str, Any]) -> str:
    """Return how the columns of a source were matched to genes; `row` is one of `coverage`."""
    ways = {
        "kept": "by Ensembl id",
        "mapped": "mapped to the ids of other sources or of aliases",
        "unmapped": "kept under their names: no Ensembl id in the file",
    }
    found = [fate for fate in ways if row[fate]]
    if len(found) < 2:
        return ways[found[0]] if found else "no columns"
    return "; ".join(f"{row[fate]:,} ({row[f'counts {fate}']:.1%} of the counts) {ways[fate]}" for fate in found)
