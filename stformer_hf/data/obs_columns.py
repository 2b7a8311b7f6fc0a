"""Unites chosen obs columns of many sources: one type a column, one list of categories."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import pyarrow as pa

from .sources import Source

logger = logging.getLogger(__name__)

_STORED = {
    *(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)),
    *("float", "double", "bool", "string", "large_string", "null"),
    *(f"timestamp[{unit}]" for unit in ("s", "ms", "us", "ns")),
}

OWN_COLUMNS = ("genes", "counts", "obs_name", "cell_id", "neighbors", "neighbor_weights")


@dataclass
class ObsColumns:
    """Obs columns of a store that is to be.

    Attributes
    ----------
    values : list of dict of str to array (n_cells,) or None
        For each source, its values; of categorical columns the codes, NaN where missing. None: the source has none.
    categories : dict of str to list of str
        Of the categorical columns, the names of the codes.
    types : dict of str to str
        Arrow type of every column, in the order of the columns.
    """

    values: list[dict[str, np.ndarray | None]]
    categories: dict[str, list[str]]
    types: dict[str, str]


def unite_obs(
    sources: Sequence[Source], names: Sequence[str] | str | None, known: Mapping[str, list[str]] | None = None
) -> ObsColumns:
    """Unite obs columns.

    Parameters
    ----------
    sources : sequence of Source
        Where the columns are.
    names : sequence of str, `"all"` or None
        Columns that every source must have; or all columns of any source, missing where a source has none.
    known : mapping of str to list of str, optional
        Categories that keep their codes, for a store that is added to.

    Returns
    -------
    ObsColumns

    Raises
    ------
    ValueError
        A column that a source does not have, whose types do not agree, or whose name the store uses itself.
    """
    everything = names == "all"
    if everything:
        names = list(dict.fromkeys(str(name) for source in sources for name in source.obs.columns))
        dropped = [name for name in names if name in OWN_COLUMNS]
        names = [name for name in names if name not in OWN_COLUMNS]
        if dropped:
            logger.warning(f"obs column {', '.join(dropped)} is left out: the store uses this name.")
    names = [] if names is None else [names] if isinstance(names, str) else list(names)
    clash = set(names) & set(OWN_COLUMNS)
    if clash:
        raise ValueError(f"obs column {', '.join(sorted(clash))}: the store uses this name; rename the column.")
    united = ObsColumns([{} for _ in sources], {}, {})
    for name in names:
        try:
            series = [_column(source, name, everything) for source in sources]
            if _are_labels(series) or name in (known or {}):
                _add_labels(united, name, series, (known or {}).get(name, []))
            else:
                _add_values(united, name, series)
        except ValueError as error:
            if not everything:
                raise
            logger.warning(f"{error} It is left out.")
    return united


def _column(source: Source, name: str, may_lack: bool) -> pd.Series | None:
    if name in source.obs:
        if isinstance(source.obs[name], pd.DataFrame):
            raise ValueError(f"{source.name} has two obs columns {name!r}.")
        return source.obs[name]
    if may_lack:
        return None
    raise ValueError(f"{source.name} has no obs column {name!r}; it has {', '.join(map(str, source.obs.columns))}.")


def _are_labels(series: Sequence[pd.Series | None]) -> bool:
    """Whether a column is of labels: categorical, or strings that repeat (as anndata decides when it writes)."""
    there = [values for values in series if values is not None]
    categorical = [isinstance(values.dtype, pd.CategoricalDtype) for values in there]
    strings = [pd.api.types.infer_dtype(values, skipna=True) in ("string", "empty") for values in there]
    if not there or not all(c or s for c, s in zip(categorical, strings, strict=True)):
        return False
    return any(categorical) or pd.concat(there).nunique() < pd.concat(there).count()


def _add_labels(united: ObsColumns, name: str, series: Sequence[pd.Series | None], known: Sequence[str]) -> None:
    labels = [None if values is None else values.astype("category") for values in series]
    for i, label in enumerate(labels):
        names = [] if label is None else [_label(value) for value in label.cat.categories]
        if len(set(names)) < len(names):
            raise ValueError(f"obs column {name!r} has labels that are written alike, such as 1 and '1'.")
        labels[i] = None if label is None else label.cat.rename_categories(names)
    named = [value for label in labels if label is not None for value in label.cat.categories]
    united.categories[name] = list(dict.fromkeys([*known, *named]))
    united.types[name] = "int64"
    index = pd.Index(united.categories[name], dtype=object)
    for column, label in zip(united.values, labels, strict=True):
        codes = None if label is None else index.get_indexer(label.astype(object))
        column[name] = None if codes is None else np.where(codes < 0, np.nan, codes)  # a missing label is null


def _label(value: object) -> str:
    """Write a label; numbers as whole ones where they are: a missing value makes floats of the others."""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _add_values(united: ObsColumns, name: str, series: Sequence[pd.Series | None]) -> None:
    there = [values for values in series if values is not None]
    kinds = {getattr(values.dtype, "kind", "O") for values in there}
    numeric = kinds <= set("iuf")
    if len(kinds) > 1 and not numeric:
        types = ", ".join(sorted({str(values.dtype) for values in there}))
        raise ValueError(f"obs column {name!r} has other types in other sources: {types}. Convert them to one.")
    arrays = [None if values is None else values.to_numpy() for values in series]
    try:
        whole = pa.array(np.concatenate([array for array in arrays if array is not None]), from_pandas=True)
    except pa.ArrowException as error:
        raise ValueError(f"obs column {name!r} holds values that cannot be stored: {error}.") from error
    if str(whole.type) not in _STORED:
        raise ValueError(f"obs column {name!r} is of type {whole.type}, which is not stored. Convert it.")
    for column, array in zip(united.values, arrays, strict=True):
        column[name] = array
    united.types[name] = str(whole.type)


__all__ = ["OWN_COLUMNS", "ObsColumns", "unite_obs"]
