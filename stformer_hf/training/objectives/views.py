"""Two views of each cell, and their batches."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import stats

from ...batches.collate import join
from ...batches.collators import DataCollatorForGeneRankMLM, DataCollatorForPhenotypicMLM
from ...models.gene_bert.cell_counts import is_cell_batch, keep, row_checksums
from ...models.gene_bert.randomness import happens, uniforms
from ...store.cell_batch import REPEAT, CellBatch, as_cell_batch
from ...store.cell_store import CellStore

VIEWS = ("disjoint", "thinning")
# Keys of a batch of views that the model does not read.
OF_PAIRS = ("view_totals", "twins", "sources")
_FIRST_PANEL, _THIN = 9, 10  # streams of `uniforms`; batches/collate.py and collators.py have 0 to 8


def first_panel(seed: int, epoch: int, n_genes: int) -> np.ndarray:
    """Divide the genes into two halves: bool array (n_genes,), True in the first; a function of (seed, epoch, gene).

    All cells of an epoch have the same halves. If they were drawn for each cell, the two views of a cell could be
    matched by their complementary genes, without the counts.
    """
    return happens(0.5, seed, epoch, _FIRST_PANEL, np.zeros(1), np.arange(n_genes), np.zeros(n_genes, np.int64))


def thin(
    counts: np.ndarray, genes: np.ndarray, cells: np.ndarray, cell_ids: np.ndarray, seed: int, epoch: int
) -> np.ndarray:
    """Draw Binomial(count, 1/2) for each entry, as a function of (seed, epoch, cell, gene): an array like `counts`.

    `counts` (nnz,) are whole numbers; `genes` and `cells`, int64 (nnz,), are the gene of each entry, and the position
    of its cell in `cell_ids`, int64 (n,). The result is the smallest k with P(at most k) >= u, for the uniform number
    u of the entry. Raise a ValueError if counts are fractional.
    """
    drawn = uniforms(seed, epoch, _THIN, cell_ids, genes, cells)
    thinned = np.empty_like(counts)
    for count in np.unique(counts):
        if count != np.rint(count):
            raise ValueError(f"Thinning needs integer counts, but the store has {count}: use disjoint views.")
        at = np.flatnonzero(counts == count)
        thinned[at] = np.searchsorted(_half_binomial(int(count)), drawn[at])
    return thinned


@lru_cache(maxsize=4096)
def _half_binomial(count: int) -> np.ndarray:
    """Compute the distribution function of Binomial(count, 1/2): float64 array (count + 1,); the last value is 1."""
    return stats.binom.cdf(np.arange(count + 1), count, 0.5)


class ViewCollator:
    """Collate two views of each cell, which share no counts.

    Views
    -----
    disjoint
        Half of the genes each (`first_panel`). The genes of the other view count as not measured: they are left out of
        totals, and the shares of the others are renormalised.
    thinning
        Binomial(count, 1/2) of each count, and the remainder. All genes are measured in both.

    Views are functions of (seed, epoch, `cell_id`). The first n rows of a batch, or the first n cells of a packed one,
    are the first views of its n cells, the next n the second views. Each view is tokenized and masked as a separate
    cell, with its own total; masks of the second view are drawn for `~cell_id`.

    In addition to the output of the collator, a batch has `measured_genes`, bool (2n, n_genes), and for the objectives
    (`OF_PAIRS`) `view_totals`, float32 (2n,), the counts of known genes before masking; `twins`, int64 (n,), equal for
    cells with equal counts; and `sources`, int64 (n,), equal for cells of one source.

    Parameters
    ----------
    collator : DataCollatorForPhenotypicMLM or DataCollatorForGeneRankMLM
        Tokenizes and masks the views; needs a tokenizer of whole cells.
    view : {"disjoint", "thinning"}, default: "disjoint"
    batch_key : str, optional
        Obs column of the store with the source of each cell; by default, the file that the cell comes from.

    Raises
    ------
    ValueError
        The view is unknown; the collator does not mask cells; the tokenizer does not return whole cells. While
        collating: the cells are not from a store; the column is missing, or cells have no value in it.

    Notes
    -----
    Disjoint panels follow scConcept. Thinning follows Svensson 2026 (`scvi.external.JointEmbeddingSCVI` of scvi-tools
    1.5), which thins one view to a random total; here both are halves, so that each can be predicted from the other.
    """

    def __init__(self, collator: Any, view: str = "disjoint", batch_key: str | None = None):
        if view not in VIEWS:
            raise ValueError(f"view must be {' or '.join(map(repr, VIEWS))}, got {view!r}.")
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
        """The epoch for which views and masks are drawn."""
        return self.collator.epoch

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch; call it before the first batch of the epoch."""
        self.collator.set_epoch(epoch)

    def for_evaluation(self) -> ViewCollator:
        """Return a padding collator that draws the views and masks of epoch 0 at every evaluation."""
        return ViewCollator(self.collator.for_evaluation(), self.view, self.batch_key)

    def __call__(self, cells: Any) -> dict[str, torch.Tensor | int]:
        """Collate a `CellBatch`."""
        cells = as_cell_batch(cells)
        if not is_cell_batch(cells):
            raise ValueError(
                "Two views of a cell are made from its counts: train and evaluate on a CellStore, not on tokens or a "
                "stream of them."
            )
        genes = self._gene_of_column(cells)[cells.genes]
        if (genes < 0).any():  # of columns that the tokenizer does not know
            indptr, (genes, columns, counts) = keep(genes >= 0, cells.indptr, genes, cells.genes, cells.counts)
            cells = replace(cells, indptr=indptr, genes=columns, counts=counts)
        views, panels = self._views(cells, genes)
        parts = [self.collator.masked(of, panel) for of, panel in zip(views, panels, strict=True)]
        first, second = (part.tokens for part in parts)
        shift = first.indptr[-1]
        (places, labels), (more_places, more_labels) = (part.labels for part in parts)
        masked = np.concatenate([places, more_places + shift]), np.concatenate([labels, more_labels])
        of_first, of_second = (np.empty(0, np.int64) if of.left_out is None else of.left_out for of in parts)
        batch = self.collator._batch(join([first, second]), masked, np.concatenate([of_first, of_second + shift]))
        if first.measured is not None:
            panels = [first.measured if panel is None else panel & first.measured for panel in panels]
        measured = [panel for panel in panels if panel is not None]
        if measured:
            batch["measured_genes"] = torch.from_numpy(np.repeat(np.stack(measured), len(cells), axis=0))
        batch["view_totals"] = torch.from_numpy(np.concatenate([_totals(view) for view in views]).astype(np.float32))
        batch["twins"] = torch.from_numpy(_checksums(cells))
        batch["sources"] = torch.from_numpy(sources_of(cells, self.batch_key))
        return batch

    def _gene_of_column(self, cells: CellBatch) -> np.ndarray:
        """Return the gene of each column of the store: int64 array, -1 for unknown genes."""
        if self._genes is None or self._genes[0] is not cells.gene_ids:  # all batches of a store share one array
            self._genes = cells.gene_ids, self.collator.tokenizer.find_genes(cells.gene_ids, cells.symbols)
        return self._genes[1]

    def _views(self, cells: CellBatch, genes: np.ndarray) -> tuple[list[CellBatch], list[np.ndarray | None]]:
        """Divide the counts of cells; return the views, and the genes that each measures (None: as the store)."""
        seed, epoch = self.collator.seed, self.collator.epoch_of_batch()
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
    """Compute a checksum of the counts of each cell: int64 array (n,)."""
    return row_checksums(cells.genes, cells.indptr) << 31 | row_checksums(cells.counts, cells.indptr) >> 1


def sources_of(cells: CellBatch | CellStore, batch_key: str | None) -> np.ndarray:
    """Return the source of each cell, int64 array (n,): its category in an obs column, or the file that it comes from.

    Raises
    ------
    ValueError
        The column is missing or not categorical, or cells have no value in it; without one, the rows of several files
        were shuffled.
    """
    if batch_key is None:
        ids = cells.cell_ids if isinstance(cells, CellStore) else cells.cell_id % REPEAT
        starts = np.empty(0, np.int64) if cells.path is None else _file_starts(cells.path)
        return starts.searchsorted(ids, "right")
    if batch_key not in cells.categories:
        raise ValueError(
            f"batch_key={batch_key!r} is not a categorical obs column of the store; those are "
            f"{', '.join(cells.categories) or 'none'}."
        )
    codes = cells.obs[batch_key].cat.codes.to_numpy() if isinstance(cells, CellStore) else cells.obs[batch_key]
    if (codes < 0).any():
        raise ValueError(f"{(codes < 0).sum()} cells have no {batch_key!r}: remove them, or fill it in.")
    return codes.astype(np.int64)


@lru_cache(maxsize=8)
def _file_starts(path: Path) -> np.ndarray:
    """Return the first row of each file of a store, except the first file: int64 array."""
    manifest = json.loads((path / "manifest.json").read_text())
    sizes = [source["n_cells"] for source in manifest["sources"]]
    if manifest["shuffled"] and len(sizes) > 1:
        raise ValueError(
            "The rows of the store were shuffled when it was built, so the file of a cell is not known: pass "
            "batch_key, a categorical obs column of the batches."
        )
    return np.cumsum(sizes, dtype=np.int64)[:-1]
