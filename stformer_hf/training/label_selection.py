"""Select the cells that can train a classifier: those with counts and labels."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..genes.wrong_names import must_have, some_of, warn_of_missing
from ..models.gene_bert.configuration_gene_bert import IGNORE
from ..store.cell_store import CellStore

logger = logging.getLogger(__name__)


def select_labelled(
    cells: CellStore, label_key: str | Sequence[str], problem_type: str | None
) -> tuple[CellStore, np.ndarray, str | list[str], dict[str, list[str]] | None, str]:
    """Select the cells with counts and labels; arguments as for `finetune`.

    Raise a ValueError if a column is missing or does not fit the problem, or if no cell has counts and a label.

    Returns
    -------
    cells : CellStore
    labels : int64 array of classes, or float32 array of labels or numbers, (n,), or (n, n_columns) for several columns
    key : the column, or the columns, those of classes in alphabetical order
    classes : the classes of each column, or None
    problem_type : str
    """
    columns = [label_key] if isinstance(label_key, str) else list(dict.fromkeys(label_key))
    several = not isinstance(label_key, str)
    if not columns:
        raise ValueError("label_key is empty: pass at least one column.")
    for name in columns:
        must_have(cells.obs, "obs", name)
    categorical = [name for name in columns if name in cells.categories]
    if problem_type is None and several and 0 < len(categorical) < len(columns):
        numeric = [name for name in columns if name not in categorical]
        raise ValueError(
            f"{', '.join(map(repr, categorical))} of the label columns hold categories, and "
            f"{', '.join(map(repr, numeric))} numbers. Classes and numbers "
            "cannot be learnt together: leave some out or, if the numbers stand for classes, make them categorical, "
            "adata.obs[key].astype('category')."
        )
    if problem_type is None:
        problem_type = "multi_label_classification" if several and not categorical else "single_label_classification"
    usable = cells.lengths > 0
    classes: dict[str, list[str]] | None = None
    if problem_type == "single_label_classification":
        columns = sorted(set(columns))
        several = len(columns) > 1
        found = {name: _class_codes(cells, name, usable) for name in columns}
        classes = {name: of_column for name, (_, of_column) in found.items()}
        labels = np.stack([codes for codes, _ in found.values()], axis=1)
        usable &= (labels != IGNORE).any(axis=1)
        if several:
            for name, n in zip(columns, (labels[usable] == IGNORE).sum(axis=0), strict=True):
                logger.info(f"{n} of {usable.sum()} cells have no {name!r}: they train the other columns only.")
    else:
        if categorical:
            raise ValueError(f"{problem_type} needs columns of numbers, but not all of {columns} are.")
        labels = cells.obs[columns].to_numpy(np.float32)
        usable &= np.isfinite(labels).all(axis=1)
    key = columns if several else columns[0]
    n_without = int((~usable & (cells.lengths > 0)).sum())
    if n_without:
        logger.warning(f"{n_without} of {len(cells)} cells have no label {key!r}: they are left out.")
    if not usable.any():
        raise ValueError(f"None of the {len(cells)} cells has counts and a {key!r}.")
    labels = (labels if several else labels[:, 0])[usable]
    if problem_type == "multi_label_classification":
        _check_zeros_and_ones(labels, columns)
    return (cells if usable.all() else cells.select(usable)), labels, key, classes, problem_type


def _check_zeros_and_ones(labels: np.ndarray, columns: Sequence[str]) -> None:
    """Raise a ValueError if multiple labels per cell, float32 (n,) or (n, n_columns), are not 0 or 1."""
    for name, of_column in zip(columns, labels.reshape(len(labels), -1).T, strict=True):
        wrong = of_column[(of_column != 0) & (of_column != 1)]
        if len(wrong):
            raise ValueError(
                f"{name!r} holds {wrong[0]:g}, but multiple labels per cell are columns of 0 and 1. To predict "
                "numbers, pass problem_type='regression'. To predict a class in each column, make them categorical, "
                "adata.obs[key].astype('category')."
            )


def _class_codes(cells: CellStore, name: str, usable: np.ndarray) -> tuple[np.ndarray, list[str]]:
    """Return the class of each cell in a column, int64 (n,) with -100 for none, and the classes of usable cells."""
    if name not in cells.categories:
        column = cells.obs[name]
        if column.isna().all():
            raise ValueError(f"None of the {len(cells)} cells has a {name!r}.")
        if column.dtype.kind not in "biuf" and column.nunique() == len(cells) > 1:
            raise ValueError(f"{name!r} is text with a different value for each cell: it names cells, not classes.")
        raise ValueError(
            f"{name!r} holds {kind_of_values(column.dtype)}, not categories. To predict numbers, pass "
            "problem_type='regression'. To predict classes, pass problem_type='single_label_classification' with an "
            "AnnData, build the store with classes=[…] (stformer-hf build --classes), or make them categorical, "
            "adata.obs[key].astype('category')."
        )
    names, codes = cells.categories[name], cells.obs[name].cat.codes.to_numpy().astype(np.int64)
    used = np.unique(codes[usable & (codes >= 0)])  # classes that only held-out cells have are left out
    classes = [names[i] for i in used]
    if not classes:
        raise ValueError(f"None of the {len(cells)} cells has counts and a {name!r}.")
    if len(classes) == 1:
        raise ValueError(
            f"{name!r} has only one class among the training cells, {classes[0]!r}: at least two are needed."
        )
    warn_of_missing(classes, repr(name))
    unused = [of for of in names if of not in classes]
    if unused:
        logger.warning(
            f"{len(unused)} classes of {name!r} have no training cell with counts, and the model does not "
            f"know them: {some_of(unused, 10)}."
        )
    return np.where(codes < 0, IGNORE, np.searchsorted(used, codes)), classes


def kind_of_values(dtype: Any) -> str:
    """Return what values of a numpy or pandas dtype are, for messages."""
    kinds = {"b": "booleans", "i": "whole numbers", "u": "whole numbers", "f": "numbers"}
    return kinds.get(dtype.kind, f"values of type {dtype}")
