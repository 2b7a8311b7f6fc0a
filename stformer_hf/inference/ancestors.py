"""Labels above the classes of a model, such as "T cell" above "CD4 T cell", for cells whose own class is rejected."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd

from ..genes.text_files import existing_file, naming
from .rejection import UNKNOWN, kth_lowest, typicality


def read_parents(parents: Mapping[str, str] | str | Path) -> dict[str, str]:
    """Return the parent of each label; see `annotate`. A label at the top may have a missing or empty parent."""
    if isinstance(parents, Mapping):
        pairs = [(str(child), "" if pd.isna(parent) else str(parent)) for child, parent in parents.items()]
    else:
        path = existing_file(os.fspath(parents))
        with naming(path, "a table"):
            table = pd.read_csv(path, dtype=str, keep_default_na=False)
        if not {"child", "parent"} <= set(table):
            raise ValueError(f"{path} must have the columns child and parent; it has {', '.join(table) or 'none'}.")
        pairs = list(zip(table["child"], table["parent"], strict=True))
    found: dict[str, str] = {}
    for child, parent in pairs:
        if not parent:
            continue
        if found.setdefault(child, parent) != parent:
            raise ValueError(f"{child!r} has two parents, {found[child]!r} and {parent!r}: keep one of them.")
        if UNKNOWN in (child, parent):
            raise ValueError(f"{UNKNOWN!r} is the label of rejected cells, and cannot be in the table of parents.")
    for child in found:
        _chain(child, found)
    return found


def ancestors_of(classes: list[str], parents: Mapping[str, str]) -> list[list[str]]:
    """Return the ancestors of each class, the nearest first, without those that all classes share, which say nothing.

    One of the classes must have a parent.
    """
    chains = [_chain(name, parents) for name in classes]
    if not any(chains):
        raise ValueError(
            f"None of the model's classes has a parent. The classes are {', '.join(classes[:5])}; the children in the "
            f"table are {', '.join(list(parents)[:5]) or 'none'}."
        )
    of_all = {
        name
        for chain in chains
        for name in chain
        if all(name in (own, *others) for own, others in zip(classes, chains, strict=True))
    }
    return [[name for name in chain if name not in of_all] for chain in chains]


def _chain(label: str, parents: Mapping[str, str]) -> list[str]:
    chain: list[str] = []
    at = label
    while at in parents:
        at = parents[at]
        if at == label or at in chain:
            raise ValueError(f"{at!r} is its own ancestor in the table of parents.")
        chain.append(at)
    return chain


def climb(
    classes: list[str],
    ancestors: list[list[str]],
    predicted: np.ndarray,
    probabilities: np.ndarray,
    distances: np.ndarray | None,
    known_probabilities: np.ndarray,
    known_distances: np.ndarray | None,
    reject: float,
) -> np.ndarray:
    """Find the nearest ancestor that accepts each cell: object array (n,) of names, "" where none accepts it.

    Parameters
    ----------
    ancestors : list of list of str (n_classes,)
        As returned by `ancestors_of`.
    predicted : int array (n,)
        Most probable class of each cell.
    probabilities, distances : float array (n, n_classes), (n,)
        Distances, if any, are those to the nearest centroid of a class.
    known_probabilities, known_distances : float array (m, n_classes), (m,)
        The same of cells of known types that the model has not seen.
    reject : float
        Share of the known cells of each ancestor that it may reject.

    Notes
    -----
    An ancestor is judged as a class is: by the sum of the probabilities of its classes, and the distance. Its
    threshold is that of the known cells whose most probable class is one of them. With too few of these (fewer than
    19 at 0.05), it accepts no cell.
    """
    known_predicted = known_probabilities.argmax(axis=1)
    found = np.full(len(predicted), "", object)
    judged: dict[str, np.ndarray] = {}

    def judge(name: str) -> np.ndarray:
        members = [i for i, own in enumerate(classes) if name in (own, *ancestors[i])]
        of = np.isin(known_predicted, members)
        known = _measures(known_probabilities, known_distances, members)[of]
        threshold = kth_lowest(typicality(known, known), reject)
        if threshold is None:
            return np.zeros(len(predicted), bool)
        return typicality(known, _measures(probabilities, distances, members)) >= threshold

    for depth in range(max(map(len, ancestors))):
        names = np.array([chain[depth] if len(chain) > depth else "" for chain in ancestors], object)
        for name in dict.fromkeys(name for name in names if name):
            if name not in judged:
                judged[name] = judge(name)
            found[(names[predicted] == name) & judged[name] & (found == "")] = name
    return found


def _measures(probabilities: np.ndarray, distances: np.ndarray | None, members: list[int]) -> np.ndarray:
    total = probabilities[:, members].sum(axis=1, dtype=np.float64).round(6)  # sums that should be 1 are equal
    return total[:, None] if distances is None else np.column_stack([total, -distances])
