"""Which table of a MuData or a SpatialData holds the cells: the one rule, for objects and for files."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from transformers.utils import logging

from .gene_columns import are_genes

logger = logging.get_logger(__name__)


class CellTable(NamedTuple):
    """The table that holds the cells.

    Attributes
    ----------
    table : AnnData
        The AnnData itself, a modality of a MuData or a table of a SpatialData; not a copy.
    obs : DataFrame
        Its obs; for a modality, with the columns of the MuData's obs that it does not have itself.
    layer : str or None
        What is left of `layer`: the name of a layer of the table.
    name : str
        For errors, such as `MuData, modality 'rna'`.
    """

    table: Any
    obs: Any
    layer: str | None
    name: str


def is_mudata(cells) -> bool:
    """Whether `cells` is a MuData."""
    return hasattr(cells, "mod") and hasattr(cells, "obsmap")


def is_spatialdata(cells) -> bool:
    """Whether `cells` is a SpatialData."""
    return hasattr(cells, "tables") and hasattr(cells, "shapes")


def find_table(cells, layer: str | None = None) -> CellTable:
    """Find the table that holds the cells, as `choose_table` says; an AnnData is its own.

    Parameters
    ----------
    cells : AnnData, MuData or SpatialData
    layer : str, optional
        See `choose_table`.

    Returns
    -------
    CellTable

    Raises
    ------
    ValueError
        No table, or several and no choice; see `choose_table`.
    """
    if is_mudata(cells):
        kind, tables = "modality", cells.mod
    elif is_spatialdata(cells):
        kind, tables = "table", cells.tables
    else:
        return CellTable(cells, cells.obs, layer, "The AnnData")
    source = type(cells).__name__
    name, layer = choose_table({name: lambda name=name: tables[name].var for name in tables}, layer, source, kind)
    table = tables[name]
    obs = join_obs(table.obs, cells.obs, name) if kind == "modality" else table.obs
    return CellTable(table, obs, layer, f"{source}, {kind} {name!r}")


def choose_table(
    tables: Mapping[str, Callable[[], Any]], layer: str | None, source: str, kind: str
) -> tuple[str, str | None]:
    """Choose the modality or table that holds the cells.

    The one that `layer` names. Otherwise, of modalities, the one whose features are genes; of several such, the one
    called `rna`. Otherwise, of tables, the only one.

    Parameters
    ----------
    tables : mapping of str to callable
        For each modality or table, reads its `var`.
    layer : str, optional
        The name of one (`prot`), or of a layer of it (`prot:counts`); anything else is a layer of the table that is
        chosen without it.
    source : str
        Named in errors.
    kind : {"modality", "table"}

    Returns
    -------
    name : str
        The one chosen.
    layer : str or None
        The layer within it.

    Raises
    ------
    ValueError
        There is none, or no modality whose features are genes; several, and `layer` names none of them.
    """
    kinds = {"modality": "modalities", "table": "tables"}[kind]
    if not tables:
        remedy = " Make one of its elements, as sdata.aggregate does." if kind == "table" else ""
        raise ValueError(f"{source} has no {kind}, and so no counts of cells.{remedy}")
    for name in sorted(tables, key=len, reverse=True):
        if layer is not None and (layer == name or layer.startswith(f"{name}:")):
            return name, layer[len(name) + 1 :] or None
    there = ", ".join(map(repr, tables))
    found = list(tables)
    if kind == "modality":
        genes = {name: are_genes(name, var()) for name, var in tables.items()}
        found = [name for name, known in genes.items() if known] or [
            name for name, known in genes.items() if known is None
        ]
        if not found:
            raise ValueError(
                f"{source} has no modality whose features are genes; it has {there}. If one is meant, name it: "
                f"layer={next(iter(tables))!r}."
            )
        found = [name for name in found if name.lower() == "rna"] or found
    if len(found) > 1:
        raise ValueError(
            f"{source} has {len(found)} {kinds} that may be meant: {', '.join(map(repr, found))}. Name one: "
            f"layer={found[0]!r}, or a layer of it, such as layer='{found[0]}:counts'."
        )
    return found[0], layer


def join_obs(obs, shared, modality: str):
    """Add the columns of a MuData's obs to those of a modality, by the names of the cells.

    Parameters
    ----------
    obs : DataFrame (n,)
        Of the modality. Its own columns stay, under the MuData's name for them (`rna:n_counts`) too.
    shared : DataFrame
        Of the MuData.
    modality : str

    Returns
    -------
    DataFrame (n,)
        `obs` itself where there is nothing to add. Cells that the MuData does not know have missing values.
    """
    new = [name for name in shared.columns if str(name).removeprefix(f"{modality}:") not in obs.columns]
    if not new:
        return obs
    if not shared.index.is_unique:
        logger.warning(
            f"The MuData's obs columns {', '.join(map(repr, new))} are left out: its names of cells are not unique. "
            "Call mdata.obs_names_make_unique()."
        )
        return obs
    n_unknown = int((~obs.index.isin(shared.index)).sum())
    if n_unknown:
        logger.warning(
            f"{n_unknown} of {len(obs)} cells of the modality {modality!r} are not in the MuData's obs, so that its "
            "columns are missing for them. Call mdata.update()."
        )
    joined = obs.copy()
    for name in new:
        joined[name] = shared[name].reindex(obs.index).array
    return joined


__all__ = ["CellTable", "choose_table", "find_table", "is_mudata", "is_spatialdata", "join_obs"]
