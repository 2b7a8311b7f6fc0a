"""Unites chosen obs columns of many sources: one type a column, one list of categories."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import pyarrow as pa

from .open_source import Source

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
        For each source, its values, of any type that Arrow casts to the column's; of categorical columns the codes,
        NaN where missing. None: the source has none.
    categories : dict of str to list of str
        Of the categorical columns, the names of the codes.
    types : dict of str to str
        Arrow type of every column, in the order of the columns.
    """

    values: list[dict[str, np.ndarray | None]]
    categories: dict[str, list[str]]
    types: dict[str, str]


def unite_obs(
    sources: Sequence[Source],
    names: Sequence[str] | str | None,
    known: Mapping[str, list[str]] | None = None,
    types: Mapping[str, str] | None = None,
    classes: Sequence[str] | str = (),
) -> ObsColumns:
    """Unite obs columns, by their values: a column that is all missing in a source fits any type of the others.

    Parameters
    ----------
    sources : sequence of Source
        Where the columns are.
    names : sequence of str, `"all"` or None
        Columns that every source must have; or all columns of any source, missing where a source has none.
    known : mapping of str to list of str, optional
        Categories that keep their codes, for a store that is added to.
    types : mapping of str to str, optional
        Arrow types that columns should have, where their values allow it.
    classes : sequence of str
        Columns that become class labels though their values are integers or booleans; they are kept as well.

    Returns
    -------
    ObsColumns

    Raises
    ------
    ValueError
        A column that a source does not have, whose values have no common type that holds them exactly, or whose name
        the store uses itself; fractions in a column of classes.
    """
    known, types = known or {}, types or {}
    everything = names == "all"
    if everything:
        names = list(dict.fromkeys(str(name) for source in sources for name in source.obs.columns))
        dropped = [name for name in names if name in OWN_COLUMNS]
        names = [name for name in names if name not in OWN_COLUMNS]
        if dropped:
            logger.warning(f"obs column {', '.join(dropped)} is left out: the store uses this name.")
    names = [] if names is None else [names] if isinstance(names, str) else list(names)
    classes = [classes] if isinstance(classes, str) else list(classes)
    names = list(dict.fromkeys([*names, *classes]))
    clash = set(names) & set(OWN_COLUMNS)
    if clash:
        raise ValueError(f"obs column {', '.join(sorted(clash))}: the store uses this name; rename the column.")
    united = ObsColumns([{} for _ in sources], {}, {})
    for name in names:
        try:
            series = [_column(source, name, everything) for source in sources]
            if name in types or any(_has_values(values) for values in series):
                series = [values if _has_values(values) else None for values in series]
            if name in classes:
                _check_classes(name, series)
            if name in known or (name not in types and (name in classes or _are_labels(series))):
                _add_labels(united, name, series, known.get(name, []))
            else:
                _add_values(united, name, series, types.get(name))
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


def _has_values(values: pd.Series | None) -> bool:
    return values is not None and bool(values.notna().any())


def _are_labels(series: Sequence[pd.Series | None]) -> bool:
    """Whether a column is of labels: categorical, or strings that repeat (as anndata decides when it writes)."""
    there = [values for values in series if values is not None]
    categorical = [isinstance(values.dtype, pd.CategoricalDtype) for values in there]
    strings = [pd.api.types.infer_dtype(values, skipna=True) in ("string", "empty") for values in there]
    if not there or not all(c or s for c, s in zip(categorical, strings, strict=True)):
        return False
    return any(categorical) or pd.concat(there).nunique() < pd.concat(there).count()


def _check_classes(name: str, series: Sequence[pd.Series | None]) -> None:
    """Refuse floats as classes, but for integers that a missing value beside them has made floats."""
    for values in series:
        if values is not None and pd.api.types.is_float_dtype(values.dtype):
            there = values.dropna()
            if len(there) == len(values) or (there % 1 != 0).any():
                raise ValueError(
                    f"obs column {name!r} holds numbers such as {there.iloc[0]}, which are no classes. If they number "
                    f"classes, convert them: adata.obs[{name!r}] = adata.obs[{name!r}].astype('category'). To predict "
                    "numbers, pass problem_type='regression' to finetune (--problem_type regression)."
                )


def _add_labels(united: ObsColumns, name: str, series: Sequence[pd.Series | None], known: Sequence[str]) -> None:
    labels = [None if values is None else values.astype("category") for values in series]
    for i, label in enumerate(labels):
        names = [] if label is None else _printed(label.cat.categories)
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


def _printed(labels: pd.Index) -> list[str]:
    """Write labels; numbers as whole ones where they are: a missing value makes floats of the others."""
    # Not iterated: pandas would give Python's floats, which print the 0.1 of float32 as 0.10000000149011612.
    values = labels.to_numpy() if labels.dtype.kind == "f" else labels
    floats = (float, np.floating)
    return [str(int(value)) if isinstance(value, floats) and value.is_integer() else str(value) for value in values]


def _add_values(united: ObsColumns, name: str, series: Sequence[pd.Series | None], wanted: str | None) -> None:
    arrays = [None if values is None else _exact(values) for values in series]
    try:
        there = [pa.array(array, from_pandas=True) for array in arrays if array is not None]
    except (pa.ArrowException, OverflowError) as error:
        raise ValueError(f"obs column {name!r} holds values that cannot be stored: {error}.") from error
    if not there:  # all missing, and added to a store that has a type for it
        there = [pa.nulls(0, pa.type_for_alias(wanted))]
    try:
        common = _common_type([array.type for array in there])
    except pa.ArrowException as error:
        found = ", ".join(sorted({str(values.dtype) for values in series if values is not None}))
        raise ValueError(
            f"obs column {name!r} has other types in other sources: {found}. Convert them to one."
        ) from error
    kinds = [common, pa.float64()] if _is_number(common) else [common]
    if wanted is not None:
        kinds = [kind for kind in [pa.type_for_alias(wanted)] if _is_of_kind(common, kind)] + kinds
    kind = next((kind for kind in kinds if all(_fits(array, kind) for array in there)), None)
    if kind is None:
        raise ValueError(
            f"obs column {name!r} holds numbers that {common}, the type that all share, does not hold exactly. "
            "Convert them, such as to strings."
        )
    if str(kind) not in _STORED:
        raise ValueError(f"obs column {name!r} is of type {kind}, which is not stored. Convert it.")
    for column, array in zip(united.values, arrays, strict=True):
        column[name] = array
    united.types[name] = str(kind)


def _exact(values: pd.Series) -> np.ndarray:
    """Return values as an array that loses nothing: pandas makes floats of integers beside missing ones."""
    if pd.api.types.is_extension_array_dtype(values.dtype) and values.isna().any():
        return values.astype(object).where(values.notna(), None).to_numpy()
    return values.to_numpy()


def _common_type(types: Sequence[pa.DataType]) -> pa.DataType:
    schemas = [pa.schema([("values", kind)]) for kind in types]
    return pa.unify_schemas(schemas, promote_options="permissive").field("values").type


def _is_number(kind: pa.DataType) -> bool:
    return pa.types.is_integer(kind) or pa.types.is_floating(kind)


def _is_of_kind(kind: pa.DataType, wanted: pa.DataType) -> bool:
    """Whether values of a type may be stored as another: numbers as any numbers, times in any unit."""
    try:
        return bool(_common_type([kind, wanted]))
    except pa.ArrowException:
        return False


def _fits(array: pa.Array | pa.ChunkedArray, kind: pa.DataType) -> bool:
    """Whether a type holds all values exactly."""
    try:
        return array.cast(kind).cast(array.type).equals(array)
    except pa.ArrowException:
        return False


def as_arrow(values: np.ndarray | None, kind: pa.DataType, n_cells: int) -> pa.Array:
    """Return an obs column of one source, of `ObsColumns.values`, as Arrow stores it."""
    return pa.nulls(n_cells, kind) if values is None else pa.array(values, kind, from_pandas=True)


def as_array(column: pa.ChunkedArray) -> np.ndarray:
    """Return an obs column as an array (n,); missing values are NaN, NaT or None.

    Integers beside missing ones become float64 where that holds all of them, else Python's.
    """
    if pa.types.is_integer(column.type) and column.null_count:
        return column.to_pandas(integer_object_nulls=not _fits(column, pa.float64())).to_numpy()
    return column.to_pandas().to_numpy()


def as_objects(values: np.ndarray) -> list:
    """List the values of an obs column: Python's own numbers and strings; dates as pandas' `Timestamp`."""
    return pd.Series(values).tolist()


class ClassCode(int):
    """The code of a class in a single cell, which knows the names of the codes; -1 where the class is missing.

    Attributes
    ----------
    names : list of str
        In the order of the codes.
    """

    names: list[str]

    def __new__(cls, code: int, names: list[str]) -> ClassCode:
        """Make a code."""
        self = super().__new__(cls, code)
        self.names = names
        return self

    def __reduce__(self):
        return ClassCode, (int(self), self.names)

    @property
    def name(self) -> str | None:
        """Name of the class; None where it is missing."""
        return self.names[self] if self >= 0 else None


__all__ = ["OWN_COLUMNS", "ClassCode", "ObsColumns", "as_array", "as_arrow", "as_objects", "unite_obs"]
