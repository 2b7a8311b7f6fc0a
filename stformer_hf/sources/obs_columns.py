"""Merge chosen obs columns of many sources: one type and one list of categories per column."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

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
OF_COMPACT_ROWS = ("cell_codes", "large_counts", "n_expressed")  # own columns of a compact store


@dataclass
class ObsColumns:
    """Obs columns of a store to be built."""

    # Per source, (n_cells,), in any type that Arrow can cast to the column's: codes for categorical columns. None if
    # the source lacks the column.
    values: list[dict[str, pa.Array | pa.ChunkedArray | None]]
    categories: dict[str, list[str]]  # of the categorical columns, in the order of their codes
    types: dict[str, str]  # Arrow type of every column, in the order of the columns


def unite_obs(
    sources: Sequence[Source],
    names: Sequence[str] | str | None,
    known: Mapping[str, list[str]] | None = None,
    types: Mapping[str, str] | None = None,
    classes: Sequence[str] | str = (),
    compact: bool = False,
) -> ObsColumns:
    """Merge obs columns by their values: a column of only missing values in a source matches any type in the others.

    Parameters
    ----------
    sources : sequence of Source
    names : sequence of str, `"all"` or None
        Columns that every source must have; or all columns of any source, with missing values where a source lacks
        them.
    known, types : mapping, optional
        Categories that keep their codes, and Arrow types that columns should have if their values allow it.
    classes : sequence of str
        Columns that become class labels although their values are integers or booleans; they are kept as well.
    compact : bool, default: False
        Whether the store has compact rows, which use other names themselves.

    Raises
    ------
    ValueError
        A source lacks a column; no common type holds the values of a column exactly; the store uses the name of a
        column itself; a column of classes has fractions.
    """
    known, types = known or {}, types or {}
    own = (*OWN_COLUMNS, *OF_COMPACT_ROWS) if compact else OWN_COLUMNS
    everything = names == "all"
    if everything:
        names = list(dict.fromkeys(str(name) for source in sources for name in source.obs.columns))
        dropped = [name for name in names if name in own]
        names = [name for name in names if name not in own]
        if dropped:
            logger.warning(f"obs column {', '.join(dropped)} is left out: the store uses this name.")
    classes = as_names(classes)
    names = list(dict.fromkeys([*as_names(names), *classes]))
    clash = set(names) & set(own)
    if clash:
        raise ValueError(f"obs column {', '.join(sorted(clash))}: the store uses this name; rename the column.")
    united = ObsColumns([{} for _ in sources], {}, {})
    for name in names:
        try:
            series = [None if everything and name not in source.obs else source.obs_column(name) for source in sources]
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


def as_names(names: Sequence[str] | str | None) -> list[str]:
    """Return names as a list; a single one may come alone."""
    return [] if names is None else [names] if isinstance(names, str) else list(names)


def _has_values(values: pd.Series | None) -> bool:
    return values is not None and bool(values.notna().any())


def _are_labels(series: Sequence[pd.Series | None]) -> bool:
    """Return whether a column holds labels: categorical, or repeated strings (anndata's rule in writing)."""
    there = [values for values in series if values is not None]
    categorical = [isinstance(values.dtype, pd.CategoricalDtype) for values in there]
    strings = [pd.api.types.infer_dtype(values, skipna=True) in ("string", "empty") for values in there]
    if not there or not all(c or s for c, s in zip(categorical, strings, strict=True)):
        return False
    return any(categorical) or pd.concat(there).nunique() < pd.concat(there).count()


def _check_classes(name: str, series: Sequence[pd.Series | None]) -> None:
    """Refuse floats as classes, except integers that are floats because other values are missing."""
    for values in series:
        if values is not None and pd.api.types.is_float_dtype(values.dtype):
            there = values.dropna()
            if len(there) == len(values) or (there % 1 != 0).any():
                raise ValueError(
                    f"obs column {name!r} holds numbers such as {there.iloc[0]}, which are not classes. If they are "
                    f"codes, convert them: adata.obs[{name!r}] = adata.obs[{name!r}].astype('category'). To predict "
                    "numbers, pass problem_type='regression' to finetune (--problem_type regression)."
                )


def _add_labels(united: ObsColumns, name: str, series: Sequence[pd.Series | None], known: Sequence[str]) -> None:
    labels = [None if values is None else pd.Categorical(values) for values in series]
    printed = [[] if label is None else _printed(label.categories) for label in labels]
    if any(len(set(names)) < len(names) for names in printed):
        raise ValueError(f"obs column {name!r} has different labels with the same text, such as 1 and '1'.")
    united.categories[name] = list(dict.fromkeys([*known, *itertools.chain.from_iterable(printed)]))
    united.types[name] = "int64"
    index = pd.Index(united.categories[name], dtype=object)
    kind = np.min_scalar_type(len(index))
    for column, label, names in zip(united.values, labels, printed, strict=True):
        if label is None:
            column[name] = None
        else:
            codes = np.append(index.get_indexer(names), -1)[label.codes]
            column[name] = pa.array(codes.clip(0).astype(kind), mask=codes < 0)


def _printed(labels: pd.Index) -> list[str]:
    """Return labels as text; whole floats as integers, since missing values turn integers into floats."""
    # Not iterated: pandas would return Python floats, which print a float32 0.1 as 0.10000000149011612.
    values = labels.to_numpy() if labels.dtype.kind == "f" else labels
    floats = (float, np.floating)
    return [str(int(value)) if isinstance(value, floats) and value.is_integer() else str(value) for value in values]


def _add_values(united: ObsColumns, name: str, series: Sequence[pd.Series | None], wanted: str | None) -> None:
    arrays = [None if values is None else _exact(values) for values in series]
    try:
        there = [pa.array(array, from_pandas=True) for array in arrays if array is not None]
    except (pa.ArrowException, OverflowError) as error:
        raise ValueError(f"obs column {name!r} holds values that cannot be stored: {error}.") from error
    types = [array.type for array in there] or [pa.type_for_alias(wanted)]  # of the store to append to
    try:
        common = _common_type(types)
    except pa.ArrowException as error:
        found = ", ".join(sorted({str(values.dtype) for values in series if values is not None}))
        raise ValueError(
            f"obs column {name!r} has different types in different sources: {found}. Convert them to one type."
        ) from error
    kinds = [common, pa.float64()] if _is_number(common) else [common]
    if wanted is not None:
        kinds = [kind for kind in [pa.type_for_alias(wanted)] if _is_of_kind(common, kind)] + kinds
    kind = next((kind for kind in kinds if all(_fits(array, kind) for array in there)), None)
    if kind is None:
        raise ValueError(
            f"obs column {name!r} holds numbers that {common}, the common type of all sources, cannot hold exactly. "
            "Convert them, for example to strings."
        )
    if str(kind) not in _STORED:
        raise ValueError(
            f"obs column {name!r} has type {kind}, which cannot be stored. Convert it (bytes: "
            f"obs[{name!r}].str.decode('utf-8'))."
        )
    stored = iter(there)
    for column, array in zip(united.values, arrays, strict=True):
        column[name] = None if array is None else next(stored)
    united.types[name] = str(kind)


def _exact(values: pd.Series) -> np.ndarray:
    """Return values as an array without loss: pandas converts integers beside missing values to floats."""
    if pd.api.types.is_extension_array_dtype(values.dtype) and values.isna().any():
        return values.astype(object).where(values.notna(), None).to_numpy()
    return values.to_numpy()


def _common_type(types: Sequence[pa.DataType]) -> pa.DataType:
    schemas = [pa.schema([("values", kind)]) for kind in types]
    return pa.unify_schemas(schemas, promote_options="permissive").field("values").type


def _is_number(kind: pa.DataType) -> bool:
    return pa.types.is_integer(kind) or pa.types.is_floating(kind)


def _is_of_kind(kind: pa.DataType, wanted: pa.DataType) -> bool:
    """Return whether values of a type may be stored as another: numbers as any numbers, times in any unit."""
    try:
        return bool(_common_type([kind, wanted]))
    except pa.ArrowException:
        return False


def _fits(array: pa.Array | pa.ChunkedArray, kind: pa.DataType) -> bool:
    """Return whether a type holds all values exactly."""
    try:
        return array.cast(kind).cast(array.type).equals(array)
    except pa.ArrowException:
        return False


def as_arrow(values: pa.Array | pa.ChunkedArray | None, kind: pa.DataType, n_cells: int) -> pa.Array:
    """Return a copy of an obs column of one source, or of a part of it, of `ObsColumns.values`, as Arrow stores it.

    A slice would be written with padding from what follows it, so files would depend on the place of their cells.
    """
    if values is None or not n_cells:
        return pa.nulls(n_cells, kind)
    values = values.cast(kind)
    return pa.concat_arrays(values.chunks if isinstance(values, pa.ChunkedArray) else [values])


def as_array(column: pa.ChunkedArray) -> np.ndarray:
    """Return an obs column as an array (n,); missing values are NaN, NaT or None.

    Integers beside missing values become float64 if that holds all of them exactly, else Python integers.
    """
    if pa.types.is_integer(column.type) and column.null_count:
        return column.to_pandas(integer_object_nulls=not _fits(column, pa.float64())).to_numpy()
    return column.to_pandas().to_numpy()


def as_objects(values: np.ndarray) -> list[Any]:
    """Return the values of an obs column as a list of Python numbers and strings; dates as pandas `Timestamp`."""
    return pd.Series(values).tolist()


class ClassCode(int):
    """Class code of a single cell, -1 if the class is missing, with the names of all codes in their order."""

    names: list[str]

    def __new__(cls, code: int, names: list[str]) -> ClassCode:
        """Create a code."""
        self = super().__new__(cls, code)
        self.names = names
        return self

    def __reduce__(self) -> tuple[type, tuple[int, Sequence[str]]]:
        return ClassCode, (int(self), self.names)

    @property
    def name(self) -> str | None:
        """Name of the class; None if it is missing."""
        return self.names[self] if self >= 0 else None
