"""The phenotypes of cells as tokens: what values are called, and which value a cell has."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from .cell_counts import is_cell_batch


def phenotype_token(value: str) -> str:
    """Return the token of a phenotype's value, as in PerturbGene."""
    return "[" + value.replace(" ", "_").strip() + "]"


def name_phenotypes(phenotypes: Mapping[str, Sequence[str]], taken: Iterable[str]) -> dict[str, dict[str, str]]:
    """Name the values of categories: category -> token of the value -> token of the vocabulary."""
    taken = set(taken)
    names: dict[str, dict[str, str]] = {}
    for category, values in phenotypes.items():
        names[category] = {}
        seen: dict[str, str] = {}
        for value in values:
            token = phenotype_token(value)
            if token in seen:
                raise ValueError(
                    f"Values {seen[token]!r} and {value!r} of phenotype {category!r} both become {token}; "
                    "rename one, or list it once."
                )
            seen[token] = value
            names[category][token] = f"[{category}={token[1:-1]}]" if token in taken else token
            if names[category][token] in taken:
                raise ValueError(f"Two values become the token {names[category][token]}: rename one.")
            taken.add(names[category][token])
    return names


def values_in_store(store: Any, categories: Sequence[str]) -> dict[str, list[str]]:
    """Return the values of categorical obs columns of a store, in order; for a selection those of its cells only."""
    missing = [name for name in categories if name not in store.categories]
    if missing:
        raise ValueError(
            f"No categorical column {', '.join(map(repr, missing))} in the store; it has "
            f"{', '.join(store.categories) or 'none'}. Build it with obs=[…] to keep more columns."
        )
    values = {name: store.categories[name] for name in categories}
    if getattr(store, "is_selection", False):
        for name, every in values.items():
            codes = store.obs[name].cat.codes.to_numpy()
            values[name] = [every[code] for code in np.unique(codes[codes >= 0])]
    return values


def phenotype_ids(obs: Any, category: str, ids: Mapping[str, int], n_cells: int) -> np.ndarray:
    """Return the id of the value of a category in each cell, int64 array (n_cells,); -1 if missing or unknown.

    `obs` is a CellBatch, a DataFrame, a dict of columns or None; `ids` has the id of the token of each value.
    """

    def find(value: Any) -> int:
        if _is_missing(value):
            return -1
        found = ids.get(phenotype_token(str(value)), -1)
        if found < 0 and isinstance(value, (float, np.floating)) and value == np.rint(value):
            found = ids.get(phenotype_token(str(int(value))), -1)  # integers beside missing values are floats
        return found

    if is_cell_batch(obs) and category in obs.categories:  # codes, -1 where missing, and their names
        return np.array([*map(find, obs.categories[category]), -1])[obs.obs[category]]
    table = obs.obs if is_cell_batch(obs) else obs
    if table is None or category not in table:
        return np.full(n_cells, -1)
    values = table[category]
    if len(values) != n_cells:
        raise ValueError(f"obs has {len(values)} rows for {n_cells} cells.")
    if hasattr(values, "cat"):  # by category: values would turn integers beside missing ones into floats
        return np.array([*map(find, _exact(values.cat.categories)), -1])[values.cat.codes]
    return np.array([find(value) for value in _exact(values)], np.int64)


def _exact(values: Sequence) -> Sequence | np.ndarray:
    """Return floats as numpy scalars: pandas iterates Python floats, which print a float32 0.1 as 0.10000000149."""
    array = np.asarray(values)
    return array if array.dtype.kind == "f" else values


def _is_missing(value: Any) -> bool:
    try:
        return value is None or bool(value != value)
    except TypeError:  # pandas.NA
        return True
