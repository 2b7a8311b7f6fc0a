"""Find the table of a MuData or SpatialData that holds the cells: one rule for objects and files."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

from transformers.utils import logging

from .feature_types import are_genes

logger = logging.get_logger(__name__)


class CellTable(NamedTuple):
    """The table that holds the cells."""

    table: Any  # the AnnData itself, a modality of a MuData or a table of a SpatialData; not a copy
    obs: Any  # its obs, DataFrame; for a modality, joined with those columns of the MuData's obs that it lacks
    layer: str | None  # rest of `layer`: the name of a layer of the table
    name: str  # for errors, such as "MuData, modality 'rna'"


def is_mudata(cells: Any) -> bool:
    """Return whether `cells` is a MuData."""
    return hasattr(cells, "mod") and hasattr(cells, "obsmap")


def is_spatialdata(cells: Any) -> bool:
    """Return whether `cells` is a SpatialData."""
    return hasattr(cells, "tables") and hasattr(cells, "shapes")


def find_table(cells: Any, layer: str | None = None) -> CellTable:
    """Find the table of an AnnData, MuData or SpatialData that holds the cells; an AnnData is its own table.

    The rule, `layer` and the errors are those of `choose_table`.
    """
    if is_mudata(cells):
        kind, tables = "modality", cells.mod
    elif is_spatialdata(cells):
        kind, tables = "table", cells.tables
    else:
        return CellTable(cells, cells.obs, layer, "The AnnData")

    def var_of(name: str) -> Any:
        return tables[name].var

    source = type(cells).__name__
    name, layer = choose_table({name: partial(var_of, name) for name in tables}, layer, source, kind)
    table = tables[name]
    obs = join_obs(table.obs, cells.obs, name) if kind == "modality" else table.obs
    return CellTable(table, obs, layer, f"{source}, {kind} {name!r}")


def choose_table(
    tables: Mapping[str, Callable[[], Any]], layer: str | None, source: str, kind: str
) -> tuple[str, str | None]:
    """Choose the modality or table that holds the cells.

    This is the one that `layer` names; else the modality whose features are genes, or among several the one called
    `rna`; else the only table.

    Parameters
    ----------
    tables : mapping of str to callable
        Function per modality or table that reads its `var`.
    layer : str, optional
        Name of a modality or table (`prot`), or of a layer in it (`prot:counts`); any other name is a layer of the
        table that is chosen by default.
    source : str
        Name of the source, for errors.
    kind : {"modality", "measurement", "table"}
        Measurements are those of an experiment of TileDB-SOMA.

    Returns
    -------
    name : str
        The one chosen.
    layer : str or None
        The layer within it.

    Raises
    ------
    ValueError
        There is no table, or no modality whose features are genes; or there are several, and `layer` names none.
    """
    kinds = {"modality": "modalities", "measurement": "measurements", "table": "tables"}[kind]
    if not tables:
        remedy = " Create one from its elements, for example with sdata.aggregate." if kind == "table" else ""
        raise ValueError(f"{source} has no {kind}, so it has no counts of cells.{remedy}")
    for name in sorted(tables, key=len, reverse=True):
        if layer is not None and (layer == name or layer.startswith(f"{name}:")):
            return name, layer[len(name) + 1 :] or None
    there = ", ".join(map(repr, tables))
    found = list(tables)
    if kind != "table":
        genes = {name: are_genes(name, var()) for name, var in tables.items()}
        found = [name for name, known in genes.items() if known] or [
            name for name, known in genes.items() if known is None
        ]
        if not found:
            raise ValueError(
                f"{source} has no {kind} whose features are genes; it has {there}. To read one of them, name it: "
                f"layer={next(iter(tables))!r}."
            )
        found = [name for name in found if name.lower() == "rna"] or found
    if len(found) > 1:
        raise ValueError(
            f"{source} has {len(found)} {kinds} to choose from: {', '.join(map(repr, found))}. Name one: "
            f"layer={found[0]!r}, or a layer of it, such as layer='{found[0]}:counts'."
        )
    return found[0], layer


def join_obs(obs: Any, shared: Any, modality: str) -> Any:
    """Add the columns of a MuData's obs (`shared`) to those of a modality, DataFrame (n,), by cell name.

    The modality's own columns win over the MuData's copies of them (`rna:n_counts`). Cells that are not in the
    MuData's obs get missing values. `obs` itself is returned if there is nothing to add.
    """
    new = [name for name in shared.columns if str(name).removeprefix(f"{modality}:") not in obs.columns]
    if not new:
        return obs
    if not shared.index.is_unique:
        logger.warning(
            f"The MuData's obs columns {', '.join(map(repr, new))} are left out: its cell names are not unique. "
            "Call mdata.obs_names_make_unique()."
        )
        return obs
    n_unknown = int((~obs.index.isin(shared.index)).sum())
    if n_unknown:
        logger.warning(
            f"{n_unknown} of {len(obs)} cells of the modality {modality!r} are not in the MuData's obs, so its "
            "columns have missing values for them. Call mdata.update()."
        )
    joined = obs.copy()
    for name in new:
        joined[name] = shared[name].reindex(obs.index).array
    return joined
