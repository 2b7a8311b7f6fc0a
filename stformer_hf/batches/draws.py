"""Draws: which rows an epoch reads, before a sampler puts them into an order or into batches."""

from __future__ import annotations

import hashlib
import logging
import operator
from abc import ABC, abstractmethod
from collections.abc import Mapping
from functools import partial
from itertools import count
from typing import Any

import numpy as np
import pandas as pd
from torch.utils.data import IterableDataset

from ..genes.wrong_names import closest, some_of
from ..store.cell_store import CellStore
from .parts import bases, gather
from .token_rows import class_names

logger = logging.getLogger(__name__)
SAMPLING = ("by", "temperature", "shares", "weights", "n_draws", "replacement")  # names of a trainer's `sampling`
_MOST_NAMES = 10  # in a message


class Draw(ABC):
    """The rows of an epoch, as a function of a generator of random numbers.

    The samplers pass a generator of (seed, epoch), the same on all ranks, and divide or group the rows that it
    returns, so that any draw works with any order.

    Attributes
    ----------
    n_rows : int
        Number of rows of the dataset.
    same_rows : bool
        Whether every epoch has the same rows, each once.
    """

    n_rows: int
    same_rows: bool

    @abstractmethod
    def __len__(self) -> int:
        """Return the number of rows of an epoch."""

    @abstractmethod
    def __call__(self, rng: np.random.Generator) -> np.ndarray:
        """Return the rows of an epoch: int64 array (len(self),), in a random order."""

    @abstractmethod
    def mean(self, values: np.ndarray) -> float:
        """Return the mean of values, array (n_rows,), over the rows that are drawn."""

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """Return what the draw depends on, as plain values for the state of a sampler."""


class Permutation(Draw):
    """Every row once, in a random order."""

    same_rows = True

    def __init__(self, n_rows: int):
        self.n_rows = n_rows

    def __len__(self) -> int:
        return self.n_rows

    def __call__(self, rng: np.random.Generator) -> np.ndarray:
        """Return a permutation of the rows."""
        return rng.permutation(self.n_rows)

    def mean(self, values: np.ndarray) -> float:
        """Return the mean over all rows."""
        return float(values.mean())

    def settings(self) -> dict[str, Any]:
        """Return nothing: the samplers' states have the number of rows."""
        return {}


class WeightedDraw(Draw):
    """Rows drawn in proportion to weights.

    Parameters
    ----------
    weights : array (n,)
        Non-negative weight of each row; only their ratios matter, and rows of weight 0 are never drawn.
    n_draws : int, optional
        Number of rows of an epoch; by default as many as there are weights. Needed without replacement.
    replacement : bool, default: True
        Whether a row can be drawn several times. Each row is then drawn independently of the others, with a
        probability in proportion to its weight. Without replacement, rows are drawn one after another from those that
        are left, so that no row comes twice. The more rows are drawn, the less weights matter: not at all if all are.

    Raises
    ------
    ValueError
        Weights are not one finite, non-negative number per row, or all are 0; there are fewer rows with a positive
        weight than are drawn without replacement, or `n_draws` is missing there.

    Notes
    -----
    With replacement, the inverse of the cumulative distribution is taken at uniform numbers. Without, the rows with
    the smallest E / weight are taken, E being independent standard exponential numbers (Efraimidis and Spirakis 2006).

    Examples
    --------
    >>> draw = WeightedDraw.from_dataset(store, by="cell_type")  # as many cells of each type
    >>> loader = DataLoader(store, 64, sampler=RowSampler(draw), collate_fn=collator)
    >>> batches = TokenBudgetBatchSampler(lengths, 16_384, draw=draw)
    """

    def __init__(self, weights: Any, n_draws: int | None = None, replacement: bool = True):
        weights = _checked_weights(weights)
        self.n_rows, self.replacement = len(weights), bool(replacement)
        if not weights.any():
            raise ValueError(f"weights: all {len(weights)} are 0, so no row can be drawn.")
        weights = weights / weights.max()
        self._rows = np.flatnonzero(weights)
        self._weights = weights[self._rows]
        if n_draws is None and not replacement:
            raise ValueError(
                "replacement=False needs n_draws, the number of rows of an epoch: if all rows were drawn, their "
                "weights would not matter."
            )
        self._n_draws = len(weights) if n_draws is None else operator.index(n_draws)
        if self._n_draws < 1:
            raise ValueError(f"n_draws={n_draws}: an epoch needs at least one row.")
        if not replacement and self._n_draws > len(self._rows):
            raise ValueError(
                f"n_draws={n_draws}, but only {len(self._rows)} of {len(weights)} rows have a positive weight: draw "
                "fewer, or with replacement."
            )
        self.same_rows = not replacement and self._n_draws == len(self._rows)
        self._checksum = hashlib.sha256(weights.astype("<f8").tobytes()).hexdigest()[:16]

    @classmethod
    def from_dataset(
        cls,
        dataset: Any,
        by: str | None = None,
        *,
        temperature: float | None = None,
        shares: Mapping[str, float] | None = None,
        weights: Any = None,
        n_draws: int | None = None,
        replacement: bool = True,
    ) -> WeightedDraw:
        """Make the draw of a dataset: balanced over the groups of a column, mixed by shares, or by given weights.

        Parameters
        ----------
        dataset : CellStore, datasets.Dataset, or a Subset or ConcatDataset of such
            Weights that are an array need only a length.
        by : str, optional
            Column of obs (of a tokenized dataset: column) with the group of each row, such as the cell type or the
            batch. With `temperature` or `shares` but without `by`, groups are the parts of a ConcatDataset, named
            after their stores (0, 1, … if names repeat), else the files of a store.
            Rows without a value are never drawn, which is logged.
        temperature : float, optional
            See `group_weights`; infinite by default with `by`, so that groups are balanced.
        shares : mapping of str to float, optional
            Share of each group, instead of a temperature; see `group_weights`.
        weights : array (n,) or str, optional
            Weights of the rows, or the column that has them, instead of groups.
        n_draws, replacement
            As for the class. Shares are exact in expectation with replacement.

        Returns
        -------
        WeightedDraw
            All rows have the same weight if there is none of `by`, `temperature`, `shares` and `weights`.

        Raises
        ------
        ValueError
            The dataset is a stream; a column or group is unknown; arguments contradict each other.
        """
        if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
            raise ValueError(
                f"{type(dataset).__name__}: a stream is read in its own order, without sampling. Build a CellStore."
            )
        grouped = by is not None or temperature is not None or shares is not None
        if grouped and weights is not None:
            raise ValueError("weights and by, temperature or shares both decide how often a row is drawn: pass one.")
        if grouped:
            groups = _parts(dataset) if by is None else gather(dataset, partial(_column, name=by))
            n_without = int(pd.isna(groups).sum())
            if n_without:
                logger.warning(f"{n_without} of {len(groups)} cells have no {by!r}: they are never drawn.")
            weights = group_weights(groups, temperature=temperature, shares=shares)
        elif weights is None:
            weights = np.ones(len(dataset))
        elif isinstance(weights, str):
            weights = gather(dataset, partial(_column, name=weights))
        if len(weights) != len(dataset):
            raise ValueError(f"{len(weights)} weights for {len(dataset)} rows: one is needed for each.")
        return cls(weights, n_draws, replacement)

    def __len__(self) -> int:
        return self._n_draws

    def __call__(self, rng: np.random.Generator) -> np.ndarray:
        """Draw the rows of an epoch: int64 array (n_draws,)."""
        if self.replacement:
            cumulative = np.cumsum(self._weights)
            cumulative /= cumulative[-1]
            return self._rows[np.searchsorted(cumulative, rng.random(self._n_draws), side="right")]
        keys = np.log(rng.standard_exponential(len(self._rows))) - np.log(self._weights)
        return rng.permutation(self._rows[np.argsort(keys)[: self._n_draws]])  # else large weights would come first

    def mean(self, values: np.ndarray) -> float:
        """Return the mean over rows in proportion to their weights."""
        return float(values[self._rows] @ self._weights / self._weights.sum())

    def settings(self) -> dict[str, Any]:
        """Return the checksum of the weights, the number of rows, and whether they can repeat."""
        return {"weights": self._checksum, "n_draws": self._n_draws, "replacement": self.replacement}


def draw_of(draw: Draw | None, n_rows: int) -> Draw:
    """Return the given draw, or else a permutation; raise ValueError if it has another number of rows."""
    if draw is None:
        return Permutation(n_rows)
    if draw.n_rows != n_rows:
        raise ValueError(f"The draw has weights for {draw.n_rows} rows, but there are {n_rows}.")
    return draw


def group_weights(
    groups: Any, *, temperature: float | None = None, shares: Mapping[str, float] | None = None
) -> np.ndarray:
    """Compute row weights that draw groups in given proportions, and the rows of a group equally often.

    Parameters
    ----------
    groups : array (n,)
        Group of each row, such as a column of obs. Rows without one (None, NaN) get weight 0.
    temperature : float, optional
        Groups of n_g rows are drawn in proportion to n_g ** (1 / temperature): 1 keeps the proportions, infinity (the
        default) balances the groups, and values between them draw rare groups more often.
    shares : mapping of str to float, optional
        Share of each group by its name, instead of a temperature. They need not sum to 1. A share of 0 leaves a
        group out; none may be missing.

    Returns
    -------
    float64 array (n,)
        Weights that sum to 1.

    Raises
    ------
    ValueError
        The temperature is not above 0; a share is missing, negative or not finite, or names no group; no row has a
        group; both are given.

    Notes
    -----
    The temperature is that of multilingual models (Arivazhagan et al. 2019).

    Examples
    --------
    >>> group_weights(["B", "B", "B", "T"])
    array([0.16666667, 0.16666667, 0.16666667, 0.5       ])
    """
    codes, found = pd.factorize(groups if isinstance(groups, pd.Categorical) else np.asarray(groups, object))
    if not len(found):
        raise ValueError(f"None of the {len(codes)} rows has a group.")
    sizes = np.bincount(codes[codes >= 0], minlength=len(found))
    if shares is None:
        temperature = np.inf if temperature is None else float(temperature)
        if not temperature > 0:
            raise ValueError(
                f"temperature={temperature}: must be above 0; 1 keeps the proportions, inf balances them."
            )
        of_groups = np.exp((np.log(sizes) - np.log(sizes.max())) / temperature)
    elif temperature is not None:
        raise ValueError("temperature and shares both set the proportions of the groups: pass one of them.")
    else:
        of_groups = _shares([str(name) for name in found], sizes, shares)
    weights = np.append(of_groups / sizes, 0.0)[codes]
    return weights / weights.sum()


def check_sampling(sampling: Mapping[str, Any] | None) -> None:
    """Raise ValueError for an unknown name in the `sampling` of a trainer."""
    for name in sampling or {}:
        if name not in SAMPLING:
            raise ValueError(
                f"sampling: unknown name {name!r}{closest(name, SAMPLING)}. Names are {', '.join(SAMPLING)}."
            )


def sampling_columns(sampling: Mapping[str, Any] | None) -> list[str]:
    """Return the columns that the `sampling` of a trainer reads."""
    found = [(sampling or {}).get(name) for name in ("by", "weights")]
    return [name for name in found if isinstance(name, str)]


def _checked_weights(weights: Any) -> np.ndarray:
    """Return weights as float64 array (n,)."""
    weights = np.asarray(weights)
    if weights.dtype == object:  # of columns
        weights = pd.to_numeric(pd.Series(weights), errors="coerce").to_numpy()
    if weights.ndim != 1 or weights.dtype.kind not in "biuf":
        raise ValueError(f"weights must be one number per row, got {weights.dtype} of shape {weights.shape}.")
    weights = weights.astype(np.float64)
    wrong = np.flatnonzero(~(np.isfinite(weights) & (weights >= 0)))
    if len(wrong):
        raise ValueError(
            f"weights: {len(wrong)} of {len(weights)} are negative, missing or not finite, such as "
            f"{weights[wrong[0]]} of row {wrong[0]}."
        )
    return weights


def _shares(names: list[str], sizes: np.ndarray, shares: Mapping[str, float]) -> np.ndarray:
    """Return the share of each group: float64 array (n_groups,)."""
    shares = {str(name): float(share) for name, share in shares.items()}
    without = [f"{name} ({size} rows)" for name, size in zip(names, sizes, strict=True) if name not in shares]
    if without:
        raise ValueError(f"shares: none for {some_of(without, _MOST_NAMES)}. Name every group; 0 leaves it out.")
    unknown = [name for name in shares if name not in names]
    if unknown:
        raise ValueError(
            f"shares: no row belongs to {some_of(unknown, _MOST_NAMES)}; groups are {some_of(names, _MOST_NAMES)}."
        )
    values = np.array([shares[name] for name in names])
    if not (np.isfinite(values) & (values >= 0)).all() or not values.any():
        raise ValueError(f"shares must be finite, at least 0, and not all 0, got {shares}.")
    return values


def _column(dataset: Any, name: str) -> np.ndarray:
    """Return a column of a dataset by values, None where missing: object array (n,)."""
    if hasattr(dataset, "obs"):
        columns = list(dataset.obs)
        if name in columns:
            return _objects(dataset.obs[name])
    elif hasattr(dataset, "column_names"):
        columns = dataset.column_names
        if name in columns:
            values = pd.Series(dataset.with_format(None)[name][:])
            names = class_names(dataset).get(name)
            if names is None:
                return _objects(values)
            return np.array([*names, None], object)[values.fillna(-1).astype(np.int64)]
    else:
        raise ValueError(f"{type(dataset).__name__} has no columns to read {name!r} from: pass weights as an array.")
    raise ValueError(f"The cells have no column {name!r}; columns are {some_of(columns, _MOST_NAMES) or 'none'}.")


def _objects(values: pd.Series) -> np.ndarray:
    values = values.astype(object)
    return values.where(values.notna(), None).to_numpy()


def _parts(dataset: Any) -> pd.Categorical:
    """Return which part of a ConcatDataset, or which file of a store, each row is of."""
    parts = bases(dataset)
    if len(parts) > 1:
        numbers = count()
        codes = gather(dataset, lambda part: np.full(len(part), next(numbers)))
        return pd.Categorical.from_codes(codes, _names([getattr(part, "path", None) for part in parts]))
    if not isinstance(parts[0], CellStore):
        raise ValueError(
            f"The sources of the rows of a {type(parts[0]).__name__} are not known: pass by, a column with groups, or "
            "a ConcatDataset of several datasets."
        )
    return gather(dataset, _files)


def _files(store: CellStore) -> np.ndarray:
    sources = store.manifest["sources"]
    if store.manifest["shuffled"] and len(sources) > 1:
        raise ValueError(
            "The rows of the store were shuffled when it was built, so the file of a cell is not known: pass by, a "
            "column that names it."
        )
    starts = np.cumsum([source["n_cells"] for source in sources])[:-1]
    names = _names([source["name"] for source in sources])
    return np.array(names, object)[np.searchsorted(starts, store.cell_ids, "right")]


def _names(paths: list[Any]) -> list[str]:
    """Return the last parts of paths if these differ, else their numbers."""
    names = [str(path).replace("\\", "/").rpartition("/")[2] for path in paths]
    return names if len(set(names)) == len(names) and None not in paths else [str(i) for i in range(len(names))]
