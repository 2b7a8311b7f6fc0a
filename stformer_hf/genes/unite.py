"""Merge the genes of many sources into one table, and record how each source's columns were matched."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from ..models.gene_bert.gene_columns import are_ids, guess_species
from .aliases import read_aliases, warn_of_few_matches
from .gene_table import GeneTable

logger = logging.getLogger(__name__)

KEPT, MAPPED, UNMAPPED = range(3)  # fate of a column: see `UnitedGenes.fates`
FATES = ("kept", "mapped", "unmapped")


@dataclass
class UnitedGenes:
    """Merged genes of many sources; `rows` and `fates` are of the columns of each source.

    The fate of a column is 0 if it is kept under its own Ensembl id, 1 if it is mapped to another id by `aliases` or
    by symbol, 2 if it is unmapped (no Ensembl id, kept under its name).
    """

    genes: GeneTable  # every gene once, in the order of the sources
    rows: list[np.ndarray]  # row of `genes` for each column: int64 (n_columns,)
    fates: list[np.ndarray]  # uint8 (n_columns,)


def unite(
    tables: Sequence[GeneTable],
    names: Sequence[str],
    *,
    aliases: Mapping[str, str] | pd.DataFrame | str | Path | None = None,
    unify: str | None = None,
    species: str | None = None,
) -> UnitedGenes:
    """Merge gene tables, one per source, by id; ids may repeat in a table. `names` are those of the sources.

    Parameters
    ----------
    aliases : mapping, DataFrame or file, optional
        Old id (or name) -> new id; see `read_aliases`.
    unify : "symbol", optional
        Merge genes of different sources that have the same symbol under different ids. The id of the merged gene is
        the first Ensembl id among them. Symbols that one source has under more than one id are not merged.
    species : str, optional
        Species of all sources, such as `human`; by default the species that their Ensembl ids show must agree.

    Raises
    ------
    ValueError
        Species differ; `unify` is unknown; aliases cannot be read.
    """
    if unify not in (None, "symbol"):
        raise ValueError(f"unify={unify!r}: must be 'symbol' or None.")
    # Sources that share a table share its arrays.
    first = {id(table): i for i, table in reversed(list(enumerate(tables)))}
    which = list(first.values())
    if len(which) < len(tables):
        which.sort()
        found = unite(
            [tables[i] for i in which], [names[i] for i in which], aliases=aliases, unify=unify, species=species
        )
        place = [which.index(first[id(table)]) for table in tables]
        return UnitedGenes(found.genes, [found.rows[i] for i in place], [found.fates[i] for i in place])
    renamed = read_aliases(aliases)
    warn_of_few_matches(renamed, (gene for table in tables for gene in table.gene_ids))
    ids = [_rename(table.gene_ids, renamed) for table in tables]
    _check_species(ids, names, species)
    same_symbol = _same_symbol(ids, [table.symbols for table in tables])
    if same_symbol and unify:
        ids = [_rename(source, same_symbol) for source in ids]
    elif same_symbol:
        old, new = next(iter(same_symbol.items()))
        logger.warning(
            f"{len(same_symbol)} genes have one symbol under different ids in different sources, such as {old} and "
            f"{new}; they are kept separate. Merge them with unify='symbol', or with aliases={{old: new}}."
        )
    frames, fates = [], []
    for table, source in zip(tables, ids, strict=True):
        frames.append(table.frame.assign(gene_id=source).astype({"gene_id": object}))
        fates.append(np.where(are_ids(source), KEPT, UNMAPPED).astype(np.uint8))
        fates[-1][source != table.gene_ids] = MAPPED
    genes = GeneTable.union([GeneTable(frame) for frame in _distinct(frames)])
    index = pd.Index(genes.gene_ids)
    return UnitedGenes(genes, [index.get_indexer(source) for source in ids], fates)


def _rename(ids: np.ndarray, names: Mapping[str, str]) -> np.ndarray:
    if not names:
        return ids
    return np.array([names.get(gene, gene) for gene in ids], dtype=object)


def _check_species(ids: list[np.ndarray], names: Sequence[str], wanted: str | None) -> None:
    found: dict[str, str] = {}
    for source, name in zip(ids, names, strict=True):
        guess = guess_species(source)
        if guess is not None:
            found.setdefault(guess, name)
    wrong = {guess: name for guess, name in found.items() if wanted is not None and guess != wanted}
    if wrong:
        guess, name = next(iter(wrong.items()))
        raise ValueError(f"{name} has {guess} genes, by the prefix of their ids, but species={wanted!r}.")
    if len(found) > 1:
        (first, first_name), (second, second_name) = list(found.items())[:2]
        raise ValueError(
            f"{first_name} has {first} genes and {second_name} has {second} genes, by the prefix of their ids. Build "
            "one store per species, or map one to the other with aliases={old: new}."
        )


def _distinct(frames: list[pd.DataFrame]) -> list[pd.DataFrame]:
    """Return the distinct tables; most sources share their genes."""
    seen, distinct = set(), []
    for frame in frames:
        key = (tuple(frame["gene_id"]), tuple(frame["symbol"]))
        if key not in seen:
            seen.add(key)
            distinct.append(frame)
    return distinct


def _same_symbol(ids: list[np.ndarray], symbols: list[np.ndarray]) -> dict[str, str]:
    """Find genes with one symbol under different ids in different sources: id -> id to merge it with."""
    pairs_of = zip(ids, symbols, strict=True)
    frames = [pd.DataFrame({"gene_id": source, "symbol": names}, dtype=object) for source, names in pairs_of]
    frames = [frame.drop_duplicates() for frame in _distinct(frames)]
    if len(frames) < 2:
        return {}
    everywhere = pd.concat(frames, keys=range(len(frames)), names=["source", "row"]).reset_index("source")
    pairs = everywhere[everywhere["symbol"] != ""]
    # A symbol with two ids in one source: two genes.
    ambiguous = pairs.loc[pairs.duplicated(["source", "symbol"]), "symbol"].unique()
    pairs = pairs[~pairs["symbol"].isin(ambiguous)]
    groups = pairs.drop_duplicates(["symbol", "gene_id"])
    groups = groups[groups.duplicated("symbol", keep=False)]
    if groups.empty:
        return {}
    # One source has both ids of a symbol: two genes, between which the symbol moved.
    both = groups[["symbol", "gene_id"]].merge(everywhere[["source", "gene_id"]].drop_duplicates(), on="gene_id")
    both = both.loc[both.duplicated(["source", "symbol"]), "symbol"].unique()
    groups = groups[~groups["symbol"].isin(both)]
    groups = groups.assign(by_name=~are_ids(groups["gene_id"].to_numpy()))
    groups = groups.sort_values("by_name", kind="stable")  # ids first, then in the order of the sources
    first = groups.groupby("symbol", sort=False)["gene_id"].transform("first")
    other = groups["gene_id"] != first
    found = dict(zip(groups.loc[other, "gene_id"], first[other], strict=True))
    return {old: new for old, new in found.items() if new not in found}  # an id is renamed once
