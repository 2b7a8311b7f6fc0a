"""Two views of each cell, and the batches of them."""

from __future__ import annotations

import json
import zlib
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import stats

from ...batches.collate import join
from ...batches.collators import DataCollatorForGeneRankMLM, DataCollatorForPhenotypicMLM
from ...models.gene_bert.cell_counts import is_cell_batch, keep
from ...models.gene_bert.randomness import happens, uniforms
from ...store.cell_batch import CellBatch, as_cell_batch
from ...store.cell_store import CellStore

VIEWS = ("disjoint", "thinning")
# What a batch of views has beside what the model reads.
OF_PAIRS = ("view_totals", "twins", "sources")
_FIRST_PANEL, _THIN = 9, 10  # streams of `uniforms`; batches/collate.py and collators.py have 0 to 8


def first_panel(seed: int, epoch: int, n_genes: int) -> np.ndarray:
    """Divide the genes into two halves: bool array (n_genes,), True in the first; a function of (seed, epoch, gene).

    All cells of an epoch have the same halves. Were they drawn for each cell, the two views of a cell could be matched
    by their genes alone, which complement each other, whatever the counts.
    """
    return happens(0.5, seed, epoch, _FIRST_PANEL, np.zeros(1), np.arange(n_genes), np.zeros(n_genes, np.int64))


def thin(
    counts: np.ndarray, genes: np.ndarray, cells: np.ndarray, cell_ids: np.ndarray, seed: int, epoch: int
) -> np.ndarray:
    """Draw Binomial(count, 1/2) for each entry, as a function of (seed, epoch, cell, gene).

    Parameters
    ----------
    counts : array (nnz,)
        Whole numbers.
    genes, cells : int64 array (nnz,)
        Gene of each entry, and the position of its cell in `cell_ids`.
    cell_ids : int64 array (n,)
    seed, epoch : int

    Returns
    -------
    array (nnz,) of the dtype of `counts`
        The smallest k with P(at most k) >= u, for the uniform number u of the entry.

    Raises
    ------
    ValueError
        Fractional counts.
    """
    drawn = uniforms(seed, epoch, _THIN, cell_ids, genes, cells)
    thinned = np.empty_like(counts)
    for count in np.unique(counts):
        if count != np.rint(count):
            raise ValueError(f"Thinning draws from whole numbers, and the store has {count}: use disjoint views.")
        at = np.flatnonzero(counts == count)
        thinned[at] = np.searchsorted(_half_binomial(int(count)), drawn[at])
    return thinned


@lru_cache(maxsize=4096)
def _half_binomial(count: int) -> np.ndarray:
    """Distribution function of Binomial(count, 1/2): float64 array (count + 1,); the last value is 1."""
    return stats.binom.cdf(np.arange(count + 1), count, 0.5)


class ViewCollator:
    """Makes a batch of two views of each cell; no count is in both of them.

    Views
    -----
    disjoint
        Half of the genes each (`first_panel`). The genes of the other view are not measured: they are in no total, and
        the shares of the others are renormalised.
    thinning
        Binomial(count, 1/2) of each count, and what is left of it. All genes are measured in both.

    Views are functions of (seed, epoch, `cell_id`). The first n rows of a batch, or the first n cells of a packed one,
    are the first views of its n cells, the next n the second views. Each is tokenized and masked as a cell of its own,
    with its own total; in the second view masks are drawn for `~cell_id`.

    Beside what the collator gives, a batch has `measured_genes`, bool (2n, n_genes), and for the objectives
    (`OF_PAIRS`) `view_totals`, float32 (2n,), counts of known genes before masking; `twins`, int64 (n,), equal where
    cells have equal counts; and `sources`, int64 (n,), equal where cells are of one batch.

    Parameters
    ----------
    collator : DataCollatorForPhenotypicMLM or DataCollatorForGeneRankMLM
        With a tokenizer of whole cells; masks the views.
    view : {"disjoint", "thinning"}, default: "disjoint"
    batch_key : str, optional
        Obs column of the store whose values are the batches; the files that the store was built of by default.

    Raises
    ------
    ValueError
        Another view; a collator that masks no cells; a tokenizer without whole cells. While collating: cells that are
        not of a store; no such column, or cells without a value.

    Notes
    -----
    Disjoint panels: scConcept. Thinning: Svensson 2026 (`scvi.external.JointEmbeddingSCVI` of scvi-tools 1.5), which
    thins one view to a random total; here both are halves, so that each can be predicted from the other.
    """

    def __init__(self, collator: Any, view: str = "disjoint", batch_key: str | None = None):
        if view not in VIEWS:
            raise ValueError(f"view is {' or '.join(map(repr, VIEWS))}, got {view!r}.")
        if not isinstance(collator, (DataCollatorForPhenotypicMLM, DataCollatorForGeneRankMLM)):
            raise ValueError(
                "Two views of a cell need DataCollatorForPhenotypicMLM or DataCollatorForGeneRankMLM, got "
                f"{type(collator).__name__}."
            )
        if not collator.tokenizer.whole_cell:
            raise ValueError("Objectives on [CLS] read whole cells: make the tokenizer with whole_cell=True.")
        self.collator, self.view, self.batch_key = collator, view, batch_key
        self._genes: tuple[np.ndarray, np.ndarray] | None = None

    @property
    def packing(self) -> bool:
        """Whether batches are packed."""
        return self.collator.packing

    @property
    def epoch(self) -> int:
        """The epoch that views and masks are drawn for."""
        return self.collator.epoch

    def set_epoch(self, epoch: int) -> None:
        """Draw for another epoch; call it before the epoch's first batch."""
        self.collator.set_epoch(epoch)

    def for_evaluation(self) -> ViewCollator:
        """Make a collator that draws the same views and masks at every evaluation, those of epoch 0; it pads."""
        return ViewCollator(self.collator.for_evaluation(), self.view, self.batch_key)

    def __call__(self, cells: Any) -> dict[str, torch.Tensor | int]:
        """Make a batch of a `CellBatch`."""
        cells = as_cell_batch(cells)
        if not is_cell_batch(cells):
            raise ValueError(
                "Two views of a cell are made of its counts: train and evaluate on a CellStore, not on tokens or a "
                "stream of them."
            )
        cells = self._known(cells)
        views, panels = self._views(cells)
        parts = [self.collator.masked(of, panel) for of, panel in zip(views, panels, strict=True)]
        first, second = (part.tokens for part in parts)
        shift = first.indptr[-1]
        tokens = join([first, second])
        labels = tuple(np.concatenate(each) for each in zip(*(part.labels for part in parts), strict=True))
        labels[0][len(parts[0].labels[0]) :] += shift
        nothing = np.empty(0, np.int64)
        left_out = [nothing if part.left_out is None else part.left_out for part in parts]
        batch = self.collator._batch(tokens, labels, np.concatenate([left_out[0], left_out[1] + shift]))
        if first.measured is not None:
            panels = [first.measured if panel is None else panel & first.measured for panel in panels]
        if panels[0] is not None:
            batch["measured_genes"] = torch.from_numpy(np.repeat(np.stack(panels), len(cells), axis=0))
        batch["view_totals"] = torch.from_numpy(np.concatenate([_totals(view) for view in views]).astype(np.float32))
        batch["twins"] = torch.from_numpy(_checksums(cells))
        batch["sources"] = torch.from_numpy(sources_of(cells, self.batch_key))
        return batch

    def _known(self, cells: CellBatch) -> CellBatch:
        """Drop the columns that the tokenizer does not know."""
        known = self._gene_of_column(cells)[cells.genes] >= 0
        if known.all():
            return cells
        indptr, (genes, counts) = keep(known, cells.indptr, cells.genes, cells.counts)
        return replace(cells, indptr=indptr, genes=genes, counts=counts)

    def _gene_of_column(self, cells: CellBatch) -> np.ndarray:
        """Find the gene of each column of the store: int64 array, -1 where unknown."""
        if self._genes is None or self._genes[0] is not cells.gene_ids:  # one array for all batches of a store
            self._genes = cells.gene_ids, self.collator.tokenizer.find_genes(cells.gene_ids, cells.symbols)
        return self._genes[1]

    def _views(self, cells: CellBatch) -> tuple[list[CellBatch], list[np.ndarray | None]]:
        """Divide the counts of cells, and say which genes each view measures (None: as the store)."""
        seed, epoch = self.collator.seed, self.epoch
        genes = self._gene_of_column(cells)[cells.genes]
        panels: list[np.ndarray | None] = [None, None]
        if self.view == "disjoint":
            panel = first_panel(seed, epoch, len(self.collator.tokenizer.genes))
            panels = [panel, ~panel]
            counts = np.where(panel[genes], cells.counts, cells.counts.dtype.type(0))
        else:
            of = np.repeat(np.arange(len(cells)), np.diff(cells.indptr))
            counts = thin(cells.counts, genes, of, cells.cell_id, seed, epoch)
        views = []
        for of_view, ids in ((counts, cells.cell_id), (cells.counts - counts, ~cells.cell_id)):
            indptr, (columns, kept) = keep(of_view > 0, cells.indptr, cells.genes, of_view)
            views.append(replace(cells, indptr=indptr, genes=columns, counts=kept, cell_id=ids))
        return views, panels


def _totals(cells: CellBatch) -> np.ndarray:
    """Sum the counts of each cell: float64 array (n,)."""
    of = np.repeat(np.arange(len(cells)), np.diff(cells.indptr))
    return np.bincount(of, weights=cells.counts.astype(np.float64), minlength=len(cells))


def _checksums(cells: CellBatch) -> np.ndarray:
    """Tell cells of different counts apart: int64 array (n,)."""
    cuts = cells.indptr.tolist()
    return np.array(
        [
            zlib.crc32(cells.genes[a:b].tobytes()) << 31 | zlib.crc32(cells.counts[a:b].tobytes()) >> 1
            for a, b in zip(cuts, cuts[1:], strict=False)
        ],
        np.int64,
    )


def sources_of(cells: CellBatch | CellStore, batch_key: str | None) -> np.ndarray:
    """Tell which batch each cell is of.

    Parameters
    ----------
    cells : CellBatch or CellStore
    batch_key : str, optional
        A categorical obs column; by default the files that the store was built of.

    Returns
    -------
    int64 array (n,)

    Raises
    ------
    ValueError
        No such column, one without categories, or cells without a value.
    """
    whole = isinstance(cells, CellStore)
    if batch_key is None:
        ids = cells.cell_ids if whole else cells.cell_id
        return (
            np.zeros(len(ids), np.int64) if cells.path is None else _file_starts(cells.path).searchsorted(ids, "right")
        )
    if batch_key not in cells.categories:
        raise ValueError(
            f"batch_key={batch_key!r} is no categorical obs column of the store; there are "
            f"{', '.join(cells.categories) or 'none'}."
        )
    codes = cells.obs[batch_key].cat.codes.to_numpy() if whole else cells.obs[batch_key]
    if (codes < 0).any():
        raise ValueError(f"{(codes < 0).sum()} cells have no {batch_key!r}: leave them out, or fill the column.")
    return codes.astype(np.int64)


@lru_cache(maxsize=8)
def _file_starts(path: Path) -> np.ndarray:
    """Row of a store where each of its files but the first begins: int64 array."""
    sizes = [source["n_cells"] for source in json.loads((path / "manifest.json").read_text())["sources"]]
    return np.cumsum(sizes, dtype=np.int64)[:-1]


__all__ = ["OF_PAIRS", "VIEWS", "ViewCollator", "first_panel", "sources_of", "thin"]
