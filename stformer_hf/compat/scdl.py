"""SingleCellMemMapDataset: a CellStore with the interface of BioNeMo-SCDL."""

from __future__ import annotations

import operator
import os
import shutil
from collections.abc import Sequence
from enum import StrEnum
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pandas as pd
import torch
from torch.utils.data import Dataset, get_worker_info

from ..store.cell_store import CellStore
from .scdl_building import (
    append,
    check_free,
    check_values,
    choose,
    convert,
    count_neighbors,
    exactly,
    number_below,
    unite,
    value_type,
)


class NeighborSamplingStrategy(StrEnum):
    """Choice of the sampled neighbour: uniformly at random, or the one with the lowest row number."""

    RANDOM = "random"
    FIRST = "first"

    @classmethod
    def _missing_(cls, value: object) -> NoReturn:
        raise ValueError(f"neighbor_sampling_strategy={value!r}: use one of {', '.join(map(repr, map(str, cls)))}.")


class SingleCellMemMapDataset(Dataset):
    """Cells on disk with the interface of BioNeMo-SCDL, as a map-style torch dataset: a view of a `CellStore`.

    The attribute `store` is that `CellStore`. The methods replace attributes of AnnData (`adata.n_obs` is
    `data.number_of_rows()`). Rows are copies: changing them does not change the data on disk, which are always
    valid, saved or not. Row and column numbers may be negative, as in Python; one that does not exist raises an
    IndexError.

    Parameters
    ----------
    data_path : str or Path
        Folder of the dataset.
    h5ad_path : str or Path, optional
        File to convert: `.h5ad`, or another format that `CellStore.build` reads. Without it, the dataset at
        `data_path` is opened.
    paginated_load_cutoff : int, default: 10_000
        No effect. SCDL reads files below this size (MB) as a whole; here files are always read in blocks.
    load_block_row_size : int, default: 1_000_000
        Maximum number of cells in memory at a time while a file is read; blocks never exceed 2,048 cells.
    load_neighbors : bool, default: False
        Store and use the neighbours of the cells.
    neighbor_key : str, default: "next_cell_ids"
        Key of the neighbours in the file, a matrix of weights in obsp. Explicit zeros are neighbours too.
    neighbor_sampling_strategy : NeighborSamplingStrategy or str, default: RANDOM
        Strategy of `sample_neighbor_index`.
    fallback_to_identity : bool, default: True
        Whether a cell without neighbours is its own neighbour.
    data_dtype : str or dtype, optional
        Type of the values of rows, such as `uint16`; float32 by default. All values must fit it exactly. (Fractions
        are stored with the precision of float32, whatever the type.)
    data_dtype_tolerance : float, default: 1e-8
        Maximum difference between a value and its conversion to `data_dtype`; beyond, it does not fit.
    use_X_not_raw : bool, default: False
        Read the counts from X, never from a raw matrix. By default raw is read if the file has it.
    interface : {"0.1.2", "0.1.3"}, optional
        Version of BioNeMo-SCDL that decides whether `get_row` and `get_row_padded` return two results, or three with
        the features of the cell. A call with a keyword of 0.1.3 (`return_var_features`, `var_feature_names`,
        `return_obs_features`, `obs_feature_names`) always returns three. The default is 0.1.3 for a dataset that is
        made or opened with a keyword that only 0.1.3 has (`data_dtype`, `data_dtype_tolerance`, `use_X_not_raw`), else
        0.1.2.
    seed : int, optional
        Seed for sampling neighbours; by default it differs each time. In workers of a `DataLoader` it is combined with
        the worker's own seed, which follows `torch.manual_seed` and differs between workers and epochs.

    Raises
    ------
    FileNotFoundError
        The file, or the dataset at the path, does not exist.
    FileExistsError
        A file is given, but `data_path` exists. A failed conversion leaves nothing there.
    ValueError
        The file cannot be read; values are negative, NaN, infinite, or do not fit `data_dtype`; neighbours are asked
        for, but the file has none.

    Notes
    -----
    Genes of concatenated files are united by id, so that there is always one block of rows with the same genes.
    Pickling passes the path, not the data, so that workers may be spawned.

    The page "From BioNeMo-SCDL" of the documentation lists what differs for code that was written for it.
    """

    def __init__(
        self,
        data_path: str | Path,
        h5ad_path: str | Path | None = None,
        *,
        paginated_load_cutoff: int = 10_000,
        load_block_row_size: int = 1_000_000,
        load_neighbors: bool = False,
        neighbor_key: str = "next_cell_ids",
        neighbor_sampling_strategy: NeighborSamplingStrategy | str = NeighborSamplingStrategy.RANDOM,
        fallback_to_identity: bool = True,
        data_dtype: str | np.dtype | None = None,
        data_dtype_tolerance: float | None = None,
        use_X_not_raw: bool | None = None,
        interface: str | None = None,
        seed: int | None = None,
    ):
        if interface not in (None, "0.1.2", "0.1.3"):
            raise ValueError(f'interface must be "0.1.2" or "0.1.3", got {interface!r}.')
        of_new = any(given is not None for given in (data_dtype, data_dtype_tolerance, use_X_not_raw))
        self.interface = interface or ("0.1.3" if of_new else "0.1.2")
        self.data_dtype_tolerance = 1e-8 if data_dtype_tolerance is None else data_dtype_tolerance
        self.data_path = Path(data_path)
        self.load_block_row_size = load_block_row_size
        self.load_neighbors = load_neighbors
        self.neighbor_key = neighbor_key
        self.neighbor_sampling_strategy = NeighborSamplingStrategy(neighbor_sampling_strategy)
        self.fallback_to_identity = fallback_to_identity
        self.data_dtype = value_type(data_dtype)
        self.use_X_not_raw = bool(use_X_not_raw)
        self.seed = seed
        self._generator: tuple[int, np.random.Generator] | None = None  # with the id of its process
        if h5ad_path is None:
            self.load(data_path)
        else:
            self.load_h5ad(h5ad_path)

    def load(self, stored_path: str | Path) -> None:
        """Open a dataset, which replaces the current one.

        Parameters
        ----------
        stored_path : str or Path
            Folder of the dataset.

        Raises
        ------
        FileNotFoundError
            The folder does not exist, or its conversion was interrupted.
        """
        try:
            store = CellStore(stored_path)
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"There is no dataset at {stored_path}, or its conversion was stopped. Make it with "
                f"SingleCellMemMapDataset({str(stored_path)!r}, h5ad_path=…). Archives of BioNeMo-SCDL are not "
                "supported: convert their source files."
            ) from error
        self._use(store)

    def load_h5ad(self, anndata_path: str | Path) -> None:
        """Convert a file to the dataset at `data_path`, one block of rows at a time; errors are those of the class."""
        store = convert(
            self.data_path,
            Path(anndata_path),
            use_X_not_raw=self.use_X_not_raw,
            neighbors=self.neighbor_key if self.load_neighbors else None,
            dtype=self.data_dtype,
            tolerance=self.data_dtype_tolerance,
            rows_per_block=self.load_block_row_size,
        )
        self._use(store)

    def save(self, output_path: str | Path | None = None) -> None:
        """Write a copy; without a path do nothing, since the data on disk are always valid.

        A path that exists raises a FileExistsError.
        """
        if output_path is not None:
            check_free(Path(output_path), "Choose another path, or delete it.")
            self.store.save(output_path)

    def _use(self, store: CellStore) -> None:
        self.store, self.data_path = store, store.path
        self.__dict__.pop("_gene_variables", None)

    def __getstate__(self) -> dict:
        state = {**self.__dict__, "_generator": None}
        state.pop("_gene_variables", None)
        return state

    def __repr__(self) -> str:
        n_rows, (n_variables,) = self.shape()
        return f"SingleCellMemMapDataset({str(self.data_path)!r}: {n_rows:,} rows, {n_variables:,} variables)"

    # ------------------------------------------------------------------ sizes

    def __len__(self) -> int:
        return len(self.store)

    def number_of_rows(self) -> int:
        """Count the cells."""
        return len(self.store)

    def number_of_variables(self) -> list[int]:
        """Count the genes of each block of rows with the same genes: a list of one int, as there is one block."""
        return [len(self.store.genes)]

    def number_of_values(self) -> int:
        """Count all values, including zeros: rows times variables."""
        return len(self.store) * len(self.store.genes)

    def number_nonzero_values(self) -> int:
        """Count the stored values, which exclude zeros."""
        return int(self.store.manifest["n_counts"])

    def sparsity(self) -> float:
        """Compute the share of zeros among all values; 0 if there are no values."""
        return 1 - self.number_nonzero_values() / self.number_of_values() if self.number_of_values() else 0.0

    def shape(self) -> tuple[int, list[int]]:
        """Return the number of rows, and `number_of_variables`."""
        return self.number_of_rows(), self.number_of_variables()

    def version(self) -> str:
        """Return the name and version of the software that wrote the dataset."""
        return self.store.manifest["written_by"]

    # ------------------------------------------------------------------ genes and cells

    def features(self) -> pd.DataFrame:
        """Return a copy of the gene table, DataFrame (n_variables, …): row j is column j of the values.

        It has `gene_id` and `symbol`, then the columns of var in the files.
        """
        return self.store.genes.frame.copy()

    def var_features(self) -> pd.DataFrame:
        """Return the gene table; see `features`."""
        return self.features()

    def obs_features(self) -> pd.DataFrame:
        """Return a copy of the cell table, DataFrame (n_rows, …), indexed by the names of the cells."""
        return self.store.obs.copy()

    @cached_property
    def _gene_variables(self) -> dict[str, np.ndarray]:
        """Columns of the gene table, read-only, since they are returned with every row without a copy."""
        frame = self.store.genes.frame
        columns = {name: frame[name].to_numpy().view() for name in frame.columns}
        for values in columns.values():
            values.flags.writeable = False
        return columns

    def _features(self, names: Sequence[str] | None) -> list[np.ndarray]:
        known = self._gene_variables
        if names is None:
            return [values for name, values in known.items() if name not in ("gene_id", "symbol")]
        return choose({"feature_id": known["gene_id"], **known}, names, "gene")  # SCDL's name for the index of var

    # ------------------------------------------------------------------ rows

    def get_row(
        self,
        index: int,
        return_features: bool = False,
        feature_vars: Sequence[str] | None = None,
        return_obs_features: bool | None = None,
        obs_feature_names: Sequence[str] | None = None,
        *,
        return_var_features: bool | None = None,
        var_feature_names: Sequence[str] | None = None,
    ) -> tuple:
        """Read a cell.

        Parameters
        ----------
        index : int
            Row number.
        return_features : bool, default: False
            Also return variables of the genes.
        feature_vars : sequence of str, optional
            Columns of `features()` to return, where `feature_id` stands for `gene_id` if there is no such column. All
            by default except `gene_id` and `symbol`, which the store adds to those of the file.
        return_obs_features : bool, optional
            Also return variables of the cell.
        obs_feature_names : sequence of str, optional
            Columns of `obs_features()` to return, where `obs_feature_id` stands for its index if there is no such
            column. All by default.
        return_var_features, var_feature_names : optional
            Names of `return_features` and `feature_vars` in 0.1.3.

        Returns
        -------
        (values, columns) : (array (nnz,) of `data_dtype`, int32 array (nnz,))
            The non-zero values, and their columns, ascending.
        features : list of array (n_variables,), or None
            One array per variable, for all genes: `features[0][columns]` is that of the row. They are read-only.
        obs_features : list, or None
            One value per variable. Only with the interface of 0.1.3, see the class.

        An unknown variable, or values that do not fit `data_dtype`, raise a ValueError.
        """
        of_new = (return_obs_features, obs_feature_names, return_var_features, var_feature_names)
        _, columns, values = self._read([operator.index(index)])
        with_features = return_features if return_var_features is None else return_var_features
        names = feature_vars if var_feature_names is None else var_feature_names
        row = exactly(values, self.data_dtype, self.data_dtype_tolerance), columns
        features = self._features(names) if with_features else None
        if self.interface == "0.1.2" and all(given is None for given in of_new):
            return row, features
        return row, features, self._obs_values(index, obs_feature_names) if return_obs_features else None

    def _obs_values(self, index: int, names: Sequence[str] | None) -> list:
        obs = self.store.obs
        number = number_below(index, len(obs), "rows")
        known = {"obs_feature_id": obs.index.to_series(), **{name: obs[name] for name in obs}}
        return [values.iloc[number] for values in choose(known, list(obs) if names is None else names, "cell")]

    def get_row_padded(self, index: int, *args: Any, **kwargs: Any) -> tuple:
        """Read a cell with its zeros: array (n_variables,) of `data_dtype`, and the features; as `get_row`."""
        row, *features = self.get_row(index, *args, **kwargs)
        return self._padded(*row), *features

    def get_row_column(self, index: int, column: int, impute_missing_zeros: bool = True) -> float | None:
        """Read one value; one that is not stored is 0.0, or None without `impute_missing_zeros`."""
        values, columns = self.get_row(index)[0]
        found = values[columns == number_below(column, len(self.store.genes), "variables")]
        if len(found):
            return float(found[0])
        return 0.0 if impute_missing_zeros else None

    def __getitem__(self, index: int) -> torch.Tensor:
        """Read a cell: float32 tensor (2, nnz), values and columns."""
        return self.__getitems__([operator.index(index)])[0]

    def __getitems__(self, index: Sequence[int]) -> list[torch.Tensor]:
        """Read many cells at once (called by torch's `DataLoader`): a list of float32 tensors (2, nnz).

        float32 holds column numbers up to 2**24 exactly.
        """
        indptr, columns, values = self._read(index)
        rows = np.empty((2, len(values)), np.float32)
        rows[0], rows[1] = exactly(values, np.dtype(np.float32)), columns
        return list(torch.from_numpy(rows).split(np.diff(indptr).tolist(), dim=1))

    def _read(self, index: Sequence[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Copy rows: indptr (n + 1,), columns int32 (nnz,), values (nnz,) in the store's dtype."""
        indptr, genes, counts = self.store._gather(self.store._row_numbers(index))
        return indptr, genes.astype(np.int32), counts

    def _padded(self, values: np.ndarray, columns: np.ndarray) -> np.ndarray:
        row = np.zeros(len(self.store.genes), self.data_dtype)
        row[columns] = values
        return row

    # ------------------------------------------------------------------ neighbours

    def get_row_with_neighbor(self, index: int, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Read a cell and one of its neighbours, chosen by `sample_neighbor_index`; arguments of `get_row`.

        Return `current_cell` and `next_cell`, (values, columns) as from `get_row`; `current_cell_index` and
        `next_cell_index`, their row numbers; `features`, which 0.1.3 calls `var_features`, and `obs_features`, or
        None. A dataset that was made or opened without neighbours raises a ValueError; other errors are those of
        `sample_neighbor_index` and `get_row`.
        """
        number = number_below(index, len(self), "rows")
        if not self.load_neighbors:
            raise ValueError(f"The neighbours of {self.data_path} are not loaded: open it with load_neighbors=True.")
        neighbor = self.sample_neighbor_index(number)
        current_cell, features, *of_cell = self.get_row(number, *args, **kwargs)  # 0.1.2: without of_cell
        return {
            "current_cell": current_cell,
            "next_cell": self.get_row(neighbor)[0],
            "current_cell_index": number,
            "next_cell_index": neighbor,
            "features": features,
            "var_features": features,
            "obs_features": of_cell[0] if of_cell else None,
        }

    def get_row_padded_with_neighbor(self, index: int, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Read as `get_row_with_neighbor`, but including zeros: cells are arrays (n_variables,)."""
        cells = self.get_row_with_neighbor(index, *args, **kwargs)
        padded = {name: self._padded(*cells[name]) for name in ("current_cell", "next_cell")}
        return {**cells, **padded}

    def get_neighbor_indices_for_cell(self, cell_index: int) -> np.ndarray:
        """Return the row numbers of the neighbours of a cell, int array (n_neighbors,), ascending.

        It is empty if there are none, or if neighbours are not loaded. A dataset that was opened with
        `load_neighbors`, but made without, raises a ValueError.
        """
        return self._neighbors(cell_index)[0]

    def get_neighbor_weights_for_cell(self, cell_index: int) -> np.ndarray:
        """Return the weights of the neighbours of a cell, float32 array; see `get_neighbor_indices_for_cell`."""
        return self._neighbors(cell_index)[1]

    def _neighbors(self, cell_index: int) -> tuple[np.ndarray, np.ndarray]:
        number = number_below(cell_index, len(self), "rows")
        if not self.load_neighbors:
            return np.empty(0, np.int64), np.empty(0, np.float32)
        found = self.store.neighbors([number])
        return found.indices, found.data

    def sample_neighbor_index(self, cell_index: int) -> int:
        """Choose a neighbour of a cell by `neighbor_sampling_strategy`, whatever the weights; return its row number.

        This is that of the cell itself if neighbours are not loaded, or if it has none and `fallback_to_identity` is
        True; if this is False, a cell without neighbours raises a ValueError. See also
        `get_neighbor_indices_for_cell`.
        """
        neighbors = self.get_neighbor_indices_for_cell(cell_index)
        if len(neighbors):
            first = self.neighbor_sampling_strategy is NeighborSamplingStrategy.FIRST
            return int(neighbors[0 if first else self._random().integers(len(neighbors))])
        if self.load_neighbors and not self.fallback_to_identity:
            raise ValueError(f"Cell {cell_index} has no neighbours, and fallback_to_identity is False.")
        return number_below(cell_index, len(self), "rows")

    def _random(self) -> np.random.Generator:
        # A forked process has a copy of its parent's generator, and must not draw the same numbers.
        if self._generator is None or self._generator[0] != os.getpid():
            worker = get_worker_info()
            seeds = [] if self.seed is None else [self.seed]
            seeds += [] if worker is None else [worker.seed]
            self._generator = os.getpid(), np.random.default_rng(seeds or None)
        return self._generator[1]

    def get_neighbor_stats(self) -> dict[str, bool | int | float]:
        """Count the neighbours.

        Return `has_neighbors`, and if it is True also `total_connections`, `min_neighbors_per_cell`,
        `max_neighbors_per_cell`, `avg_neighbors_per_cell` and `cells_with_no_neighbors`.
        """
        if not (self.load_neighbors and self.store.manifest["neighbors"]):
            return {"has_neighbors": False}
        n_neighbors = count_neighbors(self.store)
        return {
            "has_neighbors": True,
            "total_connections": int(n_neighbors.sum()),
            "min_neighbors_per_cell": int(n_neighbors.min()) if len(self) else 0,
            "max_neighbors_per_cell": int(n_neighbors.max(initial=0)),
            "avg_neighbors_per_cell": float(n_neighbors.mean()) if len(self) else 0.0,
            "cells_with_no_neighbors": int((n_neighbors == 0).sum()),
        }

    # ------------------------------------------------------------------ concatenation

    def concat(
        self,
        other_dataset: SingleCellMemMapDataset | Sequence[SingleCellMemMapDataset],
        output_path: str | Path | None = None,
        *,
        extend_copy_size: int | None = None,
        destroy_on_copy: bool = False,
    ) -> None:
        """Append the cells of other datasets; genes are united by id, and neighbours still refer to the same cells.

        Parameters
        ----------
        other_dataset : SingleCellMemMapDataset, or sequence of them
            They are not changed.
        output_path : str or Path, optional
            Path to write all of them to, with the obs columns of all; this object then refers to the new dataset, and
            the old one is kept on disk. By default the dataset at `data_path` grows, and keeps its obs columns.
        extend_copy_size : int, optional
            No effect.
        destroy_on_copy : bool, default: False
            Remove the copied datasets once everything is written: the others, and with `output_path` this one.

        Raises
        ------
        ValueError
            An object is not a dataset; values do not fit `data_dtype`; only some have neighbours; without
            `output_path`, another dataset lacks obs columns of this one.
        FileExistsError
            `output_path` exists.
        """
        others = other_dataset if isinstance(other_dataset, (list, tuple)) else [other_dataset]
        stores = []
        for other in others:
            if not isinstance(other, SingleCellMemMapDataset):
                raise ValueError(f"Expected a SingleCellMemMapDataset, got {type(other).__name__}.")
            check_values(other.store, self.data_dtype, self.data_dtype_tolerance)
            stores.append(other.store)
        copied = {store.path for store in (self.store, *stores)}
        if output_path is not None:
            self._use(unite(Path(output_path), [self.store, *stores]))
        elif stores:
            append(self.store, stores)
            self._use(self.store)
        if destroy_on_copy:
            for path in copied - {self.store.path}:
                shutil.rmtree(path)

    def cast_data_to_dtype(self, dtype: str | np.dtype) -> None:
        """Change the dtype of the values of rows; the data on disk, which hold them exactly, are not changed.

        A dtype that is not numeric, or that values do not fit, raises a ValueError.
        """
        wanted = value_type(dtype)
        check_values(self.store, wanted, self.data_dtype_tolerance)
        self.data_dtype = wanted
