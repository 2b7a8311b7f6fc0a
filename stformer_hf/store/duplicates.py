"""Refuse sources of a build that hold the same cells, and warn of cells that they share."""

from __future__ import annotations

import logging
from collections import Counter
from pathlib import Path

import numpy as np

from ..sources.open_source import Source
from ..sources.same_cells import SameCells, describe, row_totals
from .reader import StoreReader
from .shards import Piece

logger = logging.getLogger(__name__)

_ROWS_AT_A_TIME = 2048


class DuplicateCheck:
    """Compares the cells of sources with similar barcodes while they are written; see `SameCells`.

    Parameters
    ----------
    sources : list of Source
    path : Path
        Path of the store, for messages.
    base : CellStore, optional
        Store to append to, which is compared as one more source.
    allowed : bool
        Whether sources may hold the same cells: then nothing is compared.
    is_part : bool
        Whether this is one of several parts, which alone does not hold all cells to compare.
    """

    def __init__(self, sources: list[Source], path: Path, base: StoreReader | None, allowed: bool, is_part: bool):
        self._sources, self._path, self._base = sources, path, base
        names = [] if allowed else [source.obs_names for source in sources]
        if names and base is not None:
            names.append(base.obs_table(["obs_name"])["obs_name"])
        self._same = SameCells(names)
        if is_part:
            for i, j in self._same.pairs[:1]:
                logger.warning(
                    f"{self._name_of(i)} and {self._name_of(j)} have the same barcodes, and one part alone cannot "
                    "show whether they hold the same cells."
                )
            self._same = SameCells([])

    def __contains__(self, source: int) -> bool:
        """Return whether the cells of a source must be described."""
        return source in self._same

    def begin(self, pieces: list[Piece]) -> None:
        """Expect the pieces of the sources; describe the cells of the base store."""
        self._pieces, self._left = pieces, Counter(piece.source for piece in pieces)
        number = len(self._sources)
        if self._base is not None and number in self._same:
            others = [source for pair in self._same.alike for source in pair if source < number]
            self._same.add(number, _describe_rows(self._base, self._same.in_another(number, others)))

    def add(self, piece: Piece) -> None:
        """Note that a piece is written.

        Raises
        ------
        ValueError
            It is the last piece of a source that holds the same cells as an earlier one.
        """
        self._left[piece.source] -= 1
        if self._left[piece.source] or not piece.describe:
            return
        parts = [np.load(other.description) for other in self._pieces if other.source == piece.source]
        found = self._same.add(piece.source, np.concatenate(parts))
        if found:
            share, i, j = found
            raise ValueError(
                f"{self._name_of(i)} holds the same cells as {self._name_of(j)}: {share:.0%} of its cells have the "
                "barcode and (nearly) the counts of a cell there. Pass only one of the two (the filtered rather than "
                "the raw matrix), or pass allow_duplicates=True."
            )

    def warn_of_shared(self) -> None:
        """Log how many cells two sources share."""
        shared = self._same.shared()
        if shared:
            n, i, j = shared[0]
            more = f" {len(shared) - 1} more pairs of sources share cells." if len(shared) > 1 else ""
            logger.warning(
                f"{n} cells of {self._name_of(i)} have the barcode, the total and the number of genes of a cell of "
                f"{self._name_of(j)}: they are in the store twice.{more} train_test_split and held_out keep such "
                "cells on one side."
            )

    def _name_of(self, number: int) -> str:
        if number == len(self._sources):
            return str(self._path)
        name = self._sources[number].name
        is_unique = sum(source.name == name for source in self._sources) == 1
        return name if is_unique else f"{name} (source {number + 1})"


def _describe_rows(store: StoreReader, which: np.ndarray) -> np.ndarray:
    """Describe the cells of a store where `which`, bool (n,), is True: float32 array (n, 2), else zeros."""
    described = np.zeros((len(store), 2), np.float32)
    rows = np.flatnonzero(which)
    for start in range(0, len(rows), _ROWS_AT_A_TIME):
        numbers = rows[start : start + _ROWS_AT_A_TIME]
        block = store.rows(numbers)
        described[numbers] = describe(row_totals(block), block.indptr)
    return described
