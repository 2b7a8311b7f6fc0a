"""AnnDataset: the cells of an AnnData, in memory or on disk, as a map-style torch dataset of dense rows."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from torch.utils.data import DataLoader, Dataset, default_collate

from ..genes.text_files import naming
from ..sources.formats import find_layers, is_source
from ..sources.registry import Layer
from ..store.cell_store import CellStore
from ..store.row_numbers import row_numbers
from .transforms import Transform, check_transform

_NUMBERS = {"boolean", "floating", "integer", "mixed-integer-float"}  # as pandas calls what a column holds


class AnnDataset(Dataset):
    """Cells of an AnnData, one item per cell: its row of X, dense, and its obs.

    Any `DataLoader` reads the rows of a batch at once, in ascending order, and gets them in the order asked for
    (`__getitems__`). X is returned unchanged, whether it holds counts or not.

    Parameters
    ----------
    adata_or_path : AnnData, MuData, SpatialData, str or Path
        An AnnData in memory or backed, a view of either, or a file of a known format, such as `.h5ad`.
        For a MuData the gene modality is read, for a SpatialData its table.
    layer : str, default: "X"
        `X` unchanged, whatever its values and the types of its features; `raw`, or the name of a layer; for a MuData
        or SpatialData also the modality or table, such as `prot` or `prot:counts`.
    transform : Transform, optional
        Applied to each item.
    obs_subset : int array, boolean mask (n_obs,) or slice, optional
        The cells of the dataset, in this order; negative numbers count from the end. All by default.
    chunk_size : int, default: 6000
        Number of rows read and made dense at a time; larger requests are read in pieces.

    Raises
    ------
    TypeError
        `transform` is not a `Transform`; neither an AnnData nor a path is given.
    ValueError
        The layer does not exist; the file is damaged, or its format is not supported; an obs column occurs twice;
        `chunk_size` is less than 1.
    IndexError
        `obs_subset` holds numbers outside the cells, or values that are not integers, or is a mask of another length.
    FileNotFoundError
        The file does not exist.

    Notes
    -----
    An item is `{"X": float32 tensor (n_vars,), "obs_<column>": …}`. Columns of numbers or booleans, including nullable
    ones and numeric categories, are tensors () of the column's type; if integers or booleans are missing, the column
    is float64 with NaN. All other columns are str, with the empty string for missing values. Changing an item does not
    change the AnnData. Obs is copied when the dataset is made; X is read whenever a cell is requested.

    Each process opens a file separately, and spawned workers receive its path, or a copy of an X in memory. An X that
    is stored by columns is regrouped by rows once, in temporary files, when the dataset is made (and again in each
    spawned worker).
    """

    def __init__(
        self,
        adata_or_path: AnnData | str | Path,
        *,
        layer: str = "X",
        transform: Transform | None = None,
        obs_subset: Sequence[int] | np.ndarray | slice | None = None,
        chunk_size: int = 6000,
    ):
        if transform is not None:
            check_transform(transform)
        if chunk_size < 1:
            raise ValueError(f"chunk_size={chunk_size}: must be at least 1.")
        self.transform, self.chunk_size = transform, chunk_size
        self._name, found = _find_matrix(adata_or_path, layer)
        self._matrix = found.whole or found.matrix
        with naming(self._name):
            obs = found.obs()
        if len(obs) != self._matrix.shape[0]:
            raise ValueError(f"{self._name} is damaged: {layer} has {self._matrix.shape[0]} rows, obs has {len(obs)}.")
        self._rows = row_numbers(slice(None) if obs_subset is None else obs_subset, len(obs), "dataset")
        self._columns = _read_obs(obs, self._rows)
        self._matrix.prepare(None)
        if self._matrix.seekable:  # others would lose the prepared state
            self._matrix.close()

    @property
    def shape(self) -> tuple[int, int]:
        """Numbers of cells of the dataset, and of genes."""
        return len(self._rows), self._matrix.shape[1]

    def __len__(self) -> int:
        return len(self._rows)

    def __repr__(self) -> str:
        columns = ", ".join(key.removeprefix("obs_") for key in self._columns) or "none"
        return f"AnnDataset({self._name}: {self.shape[0]:,} cells, {self.shape[1]:,} genes, obs: {columns})"

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Read one cell; a negative index counts from the end."""
        return self.__getitems__([index])[0]

    def __getitems__(self, index: Sequence[int]) -> list[dict[str, Any]]:
        """Read many cells (torch's `DataLoader` calls this with the indices of a batch).

        Cells may come in any order, with repeats, and negative numbers count from the end; items are returned in this
        order. An index that is not an integer raises a TypeError, one outside the dataset an IndexError.
        """
        cells = np.array([self._position(number) for number in index], np.int64)
        values = {"X": self._read_x(self._rows[cells])}
        for key, (numbers, labels) in self._columns.items():
            found = numbers[cells]
            values[key] = torch.from_numpy(found).unbind() if labels is None else labels[found].tolist()
        items = [dict(zip(values, cell, strict=True)) for cell in zip(*values.values(), strict=True)]
        if self.transform is None:
            return items
        changed = [self.transform(item) for item in items]
        for item in changed:
            if not isinstance(item, dict):
                raise TypeError(f"{self.transform!r} returned {type(item).__name__} instead of the dictionary.")
        return changed

    def _position(self, index: int) -> int:
        try:
            position = operator.index(index)
        except TypeError:
            position = None
        if position is None or isinstance(index, bool):
            raise TypeError(f"A cell index must be an integer, got {index!r} ({type(index).__name__}).")
        if not -len(self) <= position < len(self):
            raise IndexError(f"Cell {position} is outside the dataset of {len(self)} cells.")
        return position

    def _read_x(self, rows: np.ndarray) -> list[torch.Tensor]:
        """Read rows of X in ascending order; return one float32 tensor (n_vars,) per row, in the order asked for."""
        found: list[Any] = [None] * len(rows)
        order = np.argsort(rows)
        for start in range(0, len(rows), self.chunk_size):
            places = order[start : start + self.chunk_size]
            with naming(self._name):
                block = self._matrix.take(rows[places])
            block = block.astype(np.float32, copy=False).toarray()
            for place, values in zip(places, torch.from_numpy(block), strict=True):
                found[place] = values
        return found

    def get_collate_fn(self) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
        """Return the collate function, for a custom `DataLoader`; it can be pickled.

        It stacks tensors to (n, …) and lists strings, and raises a ValueError if items differ in their keys.
        """
        return _collate

    def get_optimized_dataloader(self, *, seed: int | None = None, **kwargs: Any) -> DataLoader:
        """Make a `DataLoader` with this dataset and its collate function.

        Parameters
        ----------
        seed : int, optional
            Seed of the shuffle: the same seed gives the same batches in each run, with any number of workers.
        **kwargs
            Arguments of `torch.utils.data.DataLoader`, such as `batch_size`, `shuffle` and `num_workers`.

        Raises
        ------
        ValueError
            Both `seed` and `generator` are given.
        """
        if seed is not None:
            if kwargs.get("generator") is not None:
                raise ValueError("Pass a seed or a generator, not both: the generator has its own seed.")
            kwargs["generator"] = torch.Generator().manual_seed(seed)
        return DataLoader(self, **{"collate_fn": self.get_collate_fn(), **kwargs})


def _collate(items: list[dict[str, Any]]) -> dict[str, Any]:
    for item in items:
        if item.keys() != items[0].keys():
            differing = ", ".join(map(repr, sorted(item.keys() ^ items[0].keys())))
            raise ValueError(
                f"{differing} is missing in some cells of a batch: a transform must return equal keys for all cells."
            )
    return default_collate(items)


def _find_matrix(adata_or_path: AnnData | str | Path, wanted: str) -> tuple[str, Layer]:
    """Return the name of a source, and one of its layers."""
    if not is_source(adata_or_path) or isinstance(adata_or_path, CellStore):
        raise TypeError(f"An AnnDataset needs an AnnData or a path, got {type(adata_or_path).__name__}.")
    name, table, layers, layer = find_layers(adata_or_path, wanted)
    name, wanted = name + table, layer or "X"
    by_name = {layer.name: layer for layer in layers}
    parts_of_x = [layer for layer in layers if layer.whole is not None and layer.name not in ("raw", "counts")]
    if "X" not in by_name and parts_of_x:  # for example, antibodies only
        by_name["X"] = parts_of_x[0]
    if wanted not in by_name:
        raise ValueError(
            f"{name} has no {wanted}; it has {', '.join(by_name) or 'no matrix'}: choose one with layer=…."
        )
    return name, by_name[wanted]


def _read_obs(obs: pd.DataFrame, rows: np.ndarray) -> dict[str, tuple[np.ndarray, np.ndarray | None]]:
    """Return for each column numbers (n,) and None; or codes (n,), and their strings (n_labels + 1,), the last one "".

    The type of a column is that of all its rows, so that training and test subsets agree.
    """
    columns = {}
    for place, name in enumerate(obs.columns):
        key = f"obs_{name}"
        if key in columns:
            raise ValueError(f"The obs column {name!r} occurs twice; rename one.")
        numbers, labels = _read_column(obs.iloc[:, place])
        columns[key] = numbers[rows], labels
    return columns


def _read_column(column: pd.Series) -> tuple[np.ndarray, np.ndarray | None]:
    if isinstance(column.dtype, pd.CategoricalDtype):
        codes, categories = column.cat.codes.to_numpy(), pd.Series(column.cat.categories)
        if _as_numbers(categories) is None:
            return codes, np.array([*map(str, categories), ""], object)
        column = categories.reindex(codes)  # a missing value has the code -1, which no category has
    numbers = _as_numbers(column)
    if numbers is not None:
        return numbers, None
    missing = column.isna()
    texts = np.array([None if absent else str(value) for value, absent in zip(column, missing, strict=True)], object)
    codes, labels = pd.factorize(texts)
    return codes, np.array([*labels, ""], object)


def _as_numbers(column: pd.Series) -> np.ndarray | None:
    """Return numbers or booleans in a type of torch, with NaN if missing; None if the column holds other values."""
    if pd.api.types.infer_dtype(column, skipna=True) not in _NUMBERS:
        return None
    values = column.to_numpy()
    if values.dtype == object:  # integers and booleans with missing values, or Python objects
        missing = column.isna().any()
        values = column.to_numpy(np.float64, na_value=np.nan) if missing else np.array(column.tolist())
    if values.dtype.kind not in "biuf":  # integers too large for any type
        return None
    native = np.float64 if values.dtype.itemsize > 8 else values.dtype.newbyteorder("=")
    return values.astype(native, copy=False)
