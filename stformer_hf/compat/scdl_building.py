"""Build and check the stores of `SingleCellMemMapDataset`."""

from __future__ import annotations

import operator
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..sources.formats import find_layers
from ..sources.registry import find_format
from ..store.cell_store import CellStore
from ..store.writer import ROWS_PER_BATCH

_ROWS_AT_ONCE = 16_384  # when all rows are read


def convert(
    path: Path,
    file: Path,
    *,
    use_X_not_raw: bool,
    neighbors: str | None,
    dtype: np.dtype,
    tolerance: float,
    rows_per_block: int,
) -> CellStore:
    """Build a store from a file; parameters and errors are those of `SingleCellMemMapDataset`."""
    check_free(path, "Open it without h5ad_path, choose another data_path, or delete it.")
    if rows_per_block < 1:
        raise ValueError(f"load_block_row_size={rows_per_block}: must be at least 1.")
    store = CellStore.build(
        path,
        file,
        obs="all",
        layer=_layer(file, use_X_not_raw),
        fractional=True,
        neighbors=neighbors,
        rows_per_batch=min(rows_per_block, ROWS_PER_BATCH),
        report=False,
    )
    try:
        check_values(store, dtype, tolerance)
    except ValueError as error:
        shutil.rmtree(path)  # as if the build had failed
        raise ValueError(f"{file}: {error}") from error
    return store


def unite(path: Path, stores: Sequence[CellStore]) -> CellStore:
    """Concatenate stores, in their order, with the genes and obs columns of all; all or none have neighbours."""
    check_free(path, "Choose another path, or delete it.")
    return CellStore.build(
        path,
        stores,
        obs="all",
        fractional=True,
        neighbors=_common_neighbors(stores),
        allow_duplicates=True,  # BioNeMo's concat accepts a store twice
    )


def append(store: CellStore, others: Sequence[CellStore]) -> None:
    """Append the cells of other stores to a store, which keeps its obs columns; all or none have neighbours."""
    for other in others:
        lacking = [name for name in store.manifest["obs"] if name not in other.manifest["obs"]]
        if lacking:
            raise ValueError(
                f"{other.path} lacks obs columns that {store.path} has ({', '.join(lacking)}): write both to an "
                "output_path, where columns may be missing in some."
            )
    neighbors = _common_neighbors([store, *others])
    store.append(others, fractional=True, neighbors=neighbors, allow_duplicates=True)


def _common_neighbors(stores: Sequence[CellStore]) -> str | None:
    """Return the argument of `CellStore.build` that keeps the neighbours of stores; None if there are none."""
    have = {store.manifest["neighbors"]: store.path for store in stores}
    if len(have) > 1:
        raise ValueError(
            f"{have[True]} has neighbours but {have[False]} has none: make all or none of them with load_neighbors."
        )
    return "neighbors" if True in have else None


def check_free(path: Path, remedy: str) -> None:
    """Raise a FileExistsError if a path exists."""
    if path.exists():
        raise FileExistsError(f"{path} exists. {remedy}")


def _layer(file: Path, use_X_not_raw: bool) -> str | None:
    """Return the name of the matrix to read: raw before X, or X before raw; None if the file has neither."""
    if not file.exists():
        raise FileNotFoundError(f"No such file: {file}")
    known = find_format(file)
    if known is None:
        raise ValueError(f"{file} has an unsupported format; for a folder of files use SingleCellCollection.")
    names = set()
    for layer in find_layers(file).layers:
        names.add(layer.name)
        layer.matrix.close()
    if use_X_not_raw and "raw" in names and "X" not in names:
        raise ValueError(f"{file} has no X, only raw: leave use_X_not_raw out to read raw.")
    order = ("X",) if use_X_not_raw else ("raw", "X")
    return next((name for name in order if name in names), None)


def value_type(name: str | np.dtype | None) -> np.dtype:
    """Return `data_dtype` as a dtype, float32 for None; raise a ValueError if it is not numeric."""
    try:
        dtype = np.dtype(np.float32 if name is None else name)
    except TypeError:
        dtype = np.dtype(object)
    if dtype.kind not in "iuf":
        raise ValueError(f"data_dtype={name!r}: use a numeric type, such as 'float32' or 'uint16'.")
    return dtype


def exactly(values: np.ndarray, dtype: np.dtype, tolerance: float = 0.0) -> np.ndarray:
    """Convert values to a dtype; raise a ValueError if one changes by more than a tolerance."""
    if np.can_cast(values.dtype, dtype):
        return values.astype(dtype, copy=False)
    with np.errstate(invalid="ignore", over="ignore"):
        converted = values.astype(dtype)
    wrong = ~(np.abs(converted.astype(np.float64) - values) <= tolerance)
    if wrong.any():
        raise ValueError(
            f"The value {values[wrong][0].item()} does not fit {dtype} exactly. Use data_dtype="
            f"{str(values.dtype)!r} and get_row; tensors of rows are float32."
        )
    return converted


def check_values(store: CellStore, dtype: np.dtype, tolerance: float = 0.0) -> None:
    """Raise a ValueError if a value of a store does not fit a dtype; values are read only if one might not."""
    if np.can_cast(store.manifest["count_type"], dtype):
        return
    for start in range(0, len(store), _ROWS_AT_ONCE):
        exactly(store.rows(slice(start, start + _ROWS_AT_ONCE)).data, dtype, tolerance)


def count_neighbors(store: CellStore) -> np.ndarray:
    """Count the neighbours of every cell: int array (n,)."""
    blocks = range(0, len(store), _ROWS_AT_ONCE)
    counts = [np.diff(store.neighbors(slice(start, start + _ROWS_AT_ONCE)).indptr) for start in blocks]
    return np.concatenate([np.zeros(0, np.int64), *counts])


def choose(known: Mapping[str, Any], names: Sequence[str], of: str) -> list:
    """Return the variables of genes or cells with these names; raise a ValueError if one does not exist."""
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"No {of} variable {unknown[0]!r}; variables are {', '.join(known)}.")
    return [known[name] for name in names]


def number_below(index: int, n: int, what: str) -> int:
    """Convert an index that may be negative to a number below n; raise an IndexError if it is outside."""
    number = operator.index(index)
    if not -n <= number < n:
        raise IndexError(f"{number} is outside the {n} {what}.")
    return number % n
