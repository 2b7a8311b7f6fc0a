"""Experiments of TileDB-SOMA, such as those of the CELLxGENE Census, and queries of them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import sparse

from ..models.gene_bert.cell_tables import choose_table
from .anndata_files import by_feature_type
from .matrices import Matrix, PerProcess
from .registry import Layer, reads

_ID = "soma_joinid"
# Columns of names: those of tiledbsoma.io, then those of the Census, whose obs has none.
_CELL_NAMES, _GENE_NAMES = ("obs_id",), ("var_id", "feature_id")
_REMEDY = "Name a sparse one with layer=…, or write this one again with tiledbsoma.SparseNDArray."


@dataclass(frozen=True)
class SomaPlace:
    """The address of an experiment, from which each process opens it; open handles cannot be passed on."""

    uri: str  # path or address
    config: dict[str, Any] = field(repr=False)  # TileDB's settings, such as the region of a bucket, or passwords
    timestamp: int | None  # the experiment as it was then, in milliseconds since 1970

    @classmethod
    def of(cls, experiment: Any) -> SomaPlace:
        """Return the place of an open experiment."""
        return cls(experiment.uri, dict(experiment.context.tiledb_config), experiment.tiledb_timestamp_ms)

    def open(self) -> Any:
        """Open the experiment for reading."""
        soma = _import_soma()
        context = soma.SOMATileDBContext(tiledb_config=self.config)
        return soma.Experiment.open(self.uri, context=context, tiledb_timestamp=self.timestamp)


class SomaMatrix(Matrix):
    """A matrix at a location in an experiment, such as `("ms", "RNA", "X", "raw")`, read by its rows.

    `rows` and `columns` are their ids (`soma_joinid`), int64 arrays, ascending.
    """

    def __init__(self, place: SomaPlace, key: tuple[str, ...], rows: np.ndarray, columns: np.ndarray):
        self.shape = (len(rows), len(columns))
        self._experiment = PerProcess(place, SomaPlace.open)
        self._key, self._row_ids, self._column_ids = key, rows, columns

    def rows(self, start: int, stop: int) -> sparse.csr_matrix:
        """Return a range of rows, csr_matrix (stop - start, n_columns)."""
        ids = self._row_ids[start:stop]
        if not len(ids) or not self.shape[1]:
            return sparse.csr_matrix((len(ids), self.shape[1]), dtype=np.float32)
        found = self._array().read((_as_slice(ids), _as_slice(self._column_ids))).tables().concat()
        rows, columns, values = (found[name].to_numpy() for name in ("soma_dim_0", "soma_dim_1", "soma_data"))
        places = np.searchsorted(ids, rows), np.searchsorted(self._column_ids, columns)
        return sparse.csr_matrix((values, places), shape=(len(ids), self.shape[1]))

    def _array(self) -> Any:
        """Return the open array, which must be sparse."""
        found = self._experiment.file
        for name in self._key:
            found = found[name]
        if not found.is_sparse:
            raise ValueError(f"{'/'.join(self._key)} is a dense array, and only sparse ones are read. {_REMEDY}")
        return found

    def close(self) -> None:
        """Close the experiment; reading reopens it."""
        self._experiment.close()


def _as_slice(ids: np.ndarray) -> Any:
    """Return consecutive ids as a slice with its end included, which TileDB reads fastest; return others unchanged."""
    return slice(int(ids[0]), int(ids[-1])) if ids[-1] - ids[0] == len(ids) - 1 else ids


@dataclass(frozen=True)
class Measurements:
    """The measurements of an experiment. One of them is read, as one modality of a MuData is."""

    place: SomaPlace
    kind = "measurement"

    def choose(self, layer: str | None, source: str) -> tuple[str, str | None]:
        """Choose a measurement, and the layer in it; see `choose_table`."""
        with self.place.open() as experiment:
            tables = {name: partial(_var_of, found) for name, found in experiment.ms.items()}
            return choose_table(tables, layer, source, self.kind)

    def layers(self, name: str) -> list[Layer]:
        """Return the matrices of a measurement."""
        with self.place.open() as experiment:
            measurement = experiment.ms[name]
            rows = np.sort(experiment.obs.read(column_names=[_ID]).concat()[_ID].to_numpy())
            var = measurement.var.read().concat().to_pandas()
            return _layers(self.place, measurement, name, rows, lambda: _obs_of(self._read_obs()), var)

    def _read_obs(self) -> pd.DataFrame:
        with self.place.open() as experiment:
            return experiment.obs.read().concat().to_pandas()


def is_soma(value: Any) -> bool:
    """Return whether a value is an open experiment of TileDB-SOMA, or a query of one (`experiment.axis_query`)."""
    return hasattr(value, "axis_query") or _is_query(value)


def _is_query(value: Any) -> bool:
    return hasattr(value, "obs_joinids") and hasattr(value, "measurement_name")


def find_soma(source: Any) -> tuple[str, list[Layer] | Measurements]:
    """Return the address of an experiment and its measurements; for a query, the matrices of its cells and genes."""
    if not _is_query(source):
        return source.uri, Measurements(SomaPlace.of(source))
    experiment, name = source.experiment, source.measurement_name
    found, var = (read().concat().to_pandas() for read in (source.obs, source.var))
    rows, obs = np.sort(found[_ID].to_numpy()), _obs_of(found)
    return experiment.uri, _layers(SomaPlace.of(experiment), experiment.ms[name], name, rows, lambda: obs, var)


def soma_key(source: Any) -> dict[str, Any]:
    """Describe the cells of an experiment or of a query, by which an interrupted build recognises them.

    What an experiment held at a time does not change, so only one that is opened at the same time is the same.
    """
    is_query = _is_query(source)
    experiment = source.experiment if is_query else source
    ids = [source.obs_joinids(), source.var_joinids()] if is_query else []
    return {
        "path": experiment.uri,
        "timestamp": experiment.tiledb_timestamp_ms,
        "measurement": source.measurement_name if is_query else None,
        "ids": [hashlib.sha256(np.sort(found.to_numpy()).tobytes()).hexdigest() for found in ids],
    }


def _is_experiment(path: Path) -> bool:
    """Return whether a folder is an experiment; other groups of TileDB are read as any folder is."""
    return (path / "__tiledb_group.tdb").exists() and _import_soma().Experiment.exists(str(path.resolve()))


@reads("TileDB-SOMA", _is_experiment)
def _read_soma(path: Path) -> Measurements:
    with _import_soma().Experiment.open(str(path.resolve())) as experiment:
        return Measurements(SomaPlace.of(experiment))


def _var_of(measurement: Any) -> pd.DataFrame:
    return _named(measurement.var.read().concat().to_pandas(), _GENE_NAMES)


def _named(table: pd.DataFrame, names: tuple[str, ...]) -> pd.DataFrame:
    """Sort a table by its ids, and index it by the first column of names that it has, else by its ids."""
    table = table.sort_values(_ID)
    name = next((name for name in names if name in table), _ID)
    index = table[name].astype(str).to_numpy(object)
    return (table if name == _ID else table.drop(columns=name)).set_index(index)


def _obs_of(table: pd.DataFrame) -> pd.DataFrame:
    """Return the obs of some cells, with the categories that these cells have."""
    obs = _named(table, _CELL_NAMES).drop(columns=_ID)
    for column in obs.select_dtypes("category"):
        obs[column] = obs[column].cat.remove_unused_categories()
    return obs


def _layers(
    place: SomaPlace,
    measurement: Any,
    name: str,
    rows: np.ndarray,
    obs: Callable[[], pd.DataFrame],
    var: pd.DataFrame,
) -> list[Layer]:
    """Return the matrices of a measurement, of the cells with these ids and the genes of a table."""
    var = _named(var, _GENE_NAMES)
    columns = var.pop(_ID).to_numpy()

    def neighbors(key: str) -> Matrix:
        if key not in graphs:
            raise KeyError(key)
        return SomaMatrix(place, ("ms", name, "obsp", key), rows, rows)

    graphs = list(measurement.obsp.keys()) if "obsp" in measurement else []
    found: list[Layer] = []
    keys = list(measurement.X.keys())
    for key in keys:
        matrix = SomaMatrix(place, ("ms", name, "X", key), rows, columns)
        layer = "X" if key == "data" and "X" not in keys else key  # tiledbsoma.io writes X as `data`
        found += by_feature_type(layer, matrix, var, obs, neighbors)
    return found


def _import_soma() -> Any:
    try:
        import tiledbsoma
    except ImportError as error:
        raise ImportError('Experiments of TileDB-SOMA need tiledbsoma: pip install "stformer_hf[soma]"') from error
    return tiledbsoma
