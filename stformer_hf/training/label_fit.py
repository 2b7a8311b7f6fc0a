"""Check before the first step that the labels of cells fit the head."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
from datasets import ClassLabel
from datasets import Dataset as HuggingFaceDataset
from torch.utils.data import ConcatDataset, Subset

from ..batches.iterable_ann_dataset import IterableAnnDataset
from ..batches.label_collator import DataCollatorForCellClassification, refuse_minus_100
from ..genes.wrong_names import some_of
from ..models.gene_bert.heads import label_columns_of, output_names, problem_of
from ..store.cell_store import CellStore
from .cell_heads import predicts_cells, read_numbers
from .label_selection import kind_of_values
from .loading import unwrap


@dataclass
class _Labels:
    """A column of labels: its values, and the names of its classes if it is categorical."""

    values: np.ndarray
    names: list[str] | None
    of_store: bool
    other_order: list[str] | None = None  # of a dataset that is put together with one that has `names` at the start

    @property
    def missing(self) -> np.ndarray:
        """Which cells have no label, bool array (n,)."""
        if self.names is not None:
            return self.values < 0
        return ~np.isfinite(self.values) if self.values.dtype.kind == "f" else np.zeros(len(self.values), bool)

    @property
    def what(self) -> str:
        return kind_of_values(self.values.dtype) if self.names is None else f"classes ({_some(self.names)})"


def fit_head_to_labels(model: Any, collator: Any, dataset: Any, all_read: bool = True) -> None:
    """Raise a ValueError if labels of cells do not fit a head, or are missing; set a missing `config.problem_type`.

    `fit_classes` names the outputs. Nothing is checked of models that are not classifiers of cells, or with a collator
    that is not a `DataCollatorForCellClassification`; labels can be read from a store, a stream, a `datasets.Dataset`,
    and a Subset or ConcatDataset of such. `all_read` says whether all cells are read, so that each needs a label; a
    draw may leave some out.
    """
    if not isinstance(collator, DataCollatorForCellClassification):
        return
    try:
        model = unwrap(model)
    except TypeError:  # not a transformers model
        return
    if not predicts_cells([type(model).__name__]):
        return
    config, several = model.config, not isinstance(collator.label, str)
    columns = [collator.label] if isinstance(collator.label, str) else list(collator.label)
    found = {name: _read(dataset, name) for name in columns}
    if getattr(config, "label_columns", None):
        _check_columns(found, config, all_read)
        return
    kind, numbers = problem_of(config), read_numbers(config)
    if config.problem_type is None and several and config.num_labels > 1:
        kind = "multi_label_classification"
    if kind == "single_label_classification":
        if several:
            raise ValueError(
                f"The head predicts one of {config.num_labels} classes, but {len(columns)} label columns were "
                f"passed ({_some(columns)}): pass one, or make it with problem_type='multi_label_classification' or "
                "with label_columns (finetune does)."
            )
        of_classes = found[columns[0]]
        if of_classes is not None:
            _check_classes(columns[0], of_classes, config.num_labels, numbers)
            names, other_order = of_classes.names, of_classes.other_order
            if names is not None and other_order is not None and numbers is None and collator.label2id is None:
                raise ValueError(
                    f"The combined datasets number the classes of {columns[0]!r} in different ways: "
                    f"{_some(names)}, and {_some(other_order)}. Pass the model or the collator the number of each "
                    "class, label2id={…}."
                )
    else:
        _check_numbers(found, config, kind)
    for name, labels in found.items():
        n_without = 0 if labels is None else int(labels.missing.sum())
        if labels is not None and all_read and n_without:
            raise ValueError(
                f"{n_without} of {len(labels.values)} cells have no {name!r}: leave them out, for example with "
                f"store.select(store.obs[{name!r}].notna())."
            )
    config.problem_type = kind


def _check_columns(found: dict[str, _Labels | None], config: Any, all_read: bool) -> None:
    """Check the classes in several label columns; a cell needs a label in one of them."""
    columns = {column.name: output_names(config, column) for column in label_columns_of(config)}
    if set(found) != set(columns):
        raise ValueError(f"The head predicts a class in each of {_some(list(columns))}, but got {_some(list(found))}.")
    missing = []
    for name, labels in found.items():
        if labels is None:
            return
        numbers = {of: i for i, of in enumerate(columns[name])}
        _check_classes(name, labels, len(numbers), numbers)
        missing.append(labels.missing)
    n_without = int(np.all(missing, axis=0).sum()) if all_read else 0
    if n_without:
        raise ValueError(f"{n_without} of {len(missing[0])} cells have none of {_some(list(found))}: leave them out.")


def _check_classes(name: str, labels: _Labels, n_classes: int, numbers: dict[str, int] | None) -> None:
    head = f"the head has {n_classes} classes"
    if numbers is not None:
        by_number = sorted(numbers, key=numbers.__getitem__)
        head += f" ({_some(by_number)})"
    if labels.names is None and (labels.of_store or labels.values.dtype.kind not in "iu"):
        raise ValueError(
            f"{name!r} holds {labels.what}, but {head}. Classes need a categorical column: "
            f"CellStore.build(…, classes=[{name!r}]) or adata.obs[{name!r}].astype('category'). To predict numbers, "
            "make the model with num_labels=1 and problem_type='regression'."
        )
    used = np.unique(labels.values[labels.values >= 0]).astype(np.int64)
    if labels.names is not None and numbers is not None:
        unknown = [labels.names[i] for i in used if labels.names[i] not in numbers]
        if unknown:
            raise ValueError(
                f"{name!r} has classes that the head does not know: {_some(unknown)}; {head}. Remove their cells, or "
                "make a model with these classes (id2label, label2id)."
            )
    elif len(used) and used[-1] >= n_classes:
        has = f"has {len(labels.names)} {labels.what}" if labels.names is not None else f"goes up to {used[-1]}"
        raise ValueError(f"{name!r} {has}, but {head}: make the model with num_labels={used[-1] + 1}.")


def _check_numbers(found: dict[str, _Labels | None], config: Any, kind: str) -> None:
    of_numbers = kind == "regression"
    head = f"the head predicts {config.num_labels} {'numbers' if of_numbers else 'labels'} per cell ({kind})"
    if len(found) != config.num_labels:
        raise ValueError(f"{len(found)} columns of labels are given ({_some(list(found))}), but {head}.")
    for name, labels in found.items():
        if labels is None:
            continue
        if of_numbers and labels.names is not None:
            raise ValueError(
                f"{name!r} holds {len(labels.names)} {labels.what}, but {head}: make the model with "
                f"num_labels={len(labels.names)} and problem_type='single_label_classification'."
            )
        if labels.values.dtype.kind not in "biuf":
            raise ValueError(f"{name!r} holds {labels.what}, but {head}.")
        if of_numbers:
            refuse_minus_100(name, labels.values)
        if not of_numbers:
            there = labels.values[~labels.missing]
            if len(there) and (there.min() < 0 or there.max() > 1):
                raise ValueError(
                    f"{name!r} holds {labels.what} from {there.min()} to {there.max()}, but {head}, each 0 or 1."
                )


def _read(dataset: Any, name: str) -> _Labels | None:
    """Read a column of labels; None if the dataset lacks it, or its columns cannot be read as a whole.

    Raise a ValueError if a store or a stream lacks it, or if it holds classes in one part and numbers in another.
    """
    if isinstance(dataset, Subset):
        labels = _read(dataset.dataset, name)
        return labels and replace(labels, values=labels.values[np.asarray(dataset.indices, np.int64)])
    if isinstance(dataset, ConcatDataset):
        parts = [part for part in (_read(part, name) for part in dataset.datasets) if part is not None]
        return _joined(name, parts) if len(parts) == len(dataset.datasets) else None
    if isinstance(dataset, (CellStore, IterableAnnDataset)):
        of_store = isinstance(dataset, CellStore)
        if name not in dataset.obs:
            raise ValueError(
                f"The {'store' if of_store else 'stream'} has no obs column {name!r}; it has "
                f"{', '.join(dataset.obs) or 'none'}. Name it where it is made, obs=[{name!r}]."
            )
        values: Any = dataset.obs[name]
        if name not in dataset.categories:
            # Booleans are objects where others of the store are missing.
            return _Labels(pd.Series(np.asarray(values)).infer_objects().to_numpy(), None, of_store)
        codes = values.cat.codes.to_numpy() if of_store else values
        return _Labels(codes, list(dataset.categories[name]), of_store)
    if isinstance(dataset, HuggingFaceDataset) and name in dataset.column_names:
        feature = dataset.features[name]
        if getattr(feature, "dtype", None) is None or feature.dtype == "string":
            return None
        values = np.array([-1 if label is None else label for label in dataset.with_format(None)[name][:]])
        return _Labels(values, feature.names if isinstance(feature, ClassLabel) else None, False)
    return None


def _joined(name: str, parts: list[_Labels]) -> _Labels:
    """Join the labels of several datasets; classes by their names, of which those of the first dataset come first."""
    orders = [part.names for part in parts if part.names is not None]
    of_store = any(part.of_store for part in parts)
    if not orders:
        return _Labels(np.concatenate([part.values for part in parts]), None, of_store)
    if len(orders) < len(parts):
        classes, numbers = (
            next(of.what for of in parts if (of.names is None) == numeric) for numeric in (False, True)
        )
        raise ValueError(
            f"{name!r} holds {classes} in one of the combined datasets, and {numbers} in another: merge them with "
            "CellStore.build(path, stores)."
        )
    names = list(dict.fromkeys(of for order in orders for of in order))
    values = [np.array([*map(names.index, order), -1])[part.values] for part, order in zip(parts, orders, strict=True)]
    others = [order for order in orders if order != orders[0]]
    return _Labels(np.concatenate(values), names, of_store, others[0] if others else parts[0].other_order)


def _some(names: Iterable[str | None]) -> str:
    return some_of(map(repr, names))
