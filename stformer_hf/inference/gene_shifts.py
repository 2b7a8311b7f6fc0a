"""Measure how far perturbations move the states of the other genes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch

from .gene_edits import Perturbation

_LEAST_CELLS = 3  # cells that a mean shift is computed from
_LEAST_REFERENCE = 10  # perturbations that a mean and a standard deviation are computed from
_PENDING = 4_000_000  # shifts of single cells that are in memory together


class GeneStates:
    """States of the genes of some cells, of length 1; the cells are read batch by batch.

    Attributes
    ----------
    keys : int64 array (k,)
        Cell x number of genes + gene, ascending.
    states : float32 tensor (k, d)
    """

    def __init__(self, n_genes: int):
        self._n_genes = n_genes
        self._read: list[tuple[np.ndarray, torch.Tensor]] = []

    def add(self, cells: np.ndarray, genes: np.ndarray, states: torch.Tensor) -> None:
        """Add the states (k, d) of genes, int64 (k,), in cells, int64 (k,)."""
        self._read.append((cells * self._n_genes + genes, unit_length(states)))

    def sort(self) -> GeneStates:
        """Return itself, complete."""
        keys = np.concatenate([keys for keys, _ in self._read])
        order = np.argsort(keys)
        self.keys = keys[order]
        states = torch.cat([states for _, states in self._read])
        self.states = states[torch.from_numpy(order).to(states.device)]
        self._read.clear()
        return self

    def shifts(self, cells: np.ndarray, genes: np.ndarray, states: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
        """Return which of the given states, bool (k,), are here too, and the cosine distances of these, float64."""
        wanted = cells * self._n_genes + genes
        at = np.searchsorted(self.keys, wanted).clip(max=len(self.keys) - 1)
        here = self.keys[at] == wanted
        device = self.states.device
        before = self.states[torch.from_numpy(at[here]).to(device)]
        after = unit_length(states[torch.from_numpy(here).to(device)])
        return here, 0.5 * (after - before).square().sum(dim=1).cpu().numpy().astype(np.float64)


def unit_length(states: torch.Tensor) -> torch.Tensor:
    """Scale states (n, d) to length 1, in float32."""
    return torch.nn.functional.normalize(states.float(), dim=-1)


class ShardGenes(NamedTuple):
    """Mean shifts of genes, one row per perturbation and gene."""

    of_perturbation: np.ndarray  # int64 (k,), ascending number of the perturbation
    genes: np.ndarray  # int64 (k,), of the tokenizer
    n_cells: np.ndarray  # int64 (k,), changed cells where the gene is a token before and after the edit
    shifts: np.ndarray  # float64 (k,), mean over these cells


class ShiftSums:
    """Sums of the shifts of genes over cells, for the perturbations of a shard.

    Parameters
    ----------
    numbers : range
        The perturbations.
    n_genes : int
    edited : list of int64 array
        Genes that each of them edits, and which are left out.
    """

    def __init__(self, numbers: range, n_genes: int, edited: Sequence[np.ndarray]):
        self._numbers, self._n_genes = numbers, n_genes
        self._edited = np.concatenate([genes + i * n_genes for i, genes in enumerate(edited)])
        self._parts: list[tuple[np.ndarray, ...]] = []
        self._pending = 0

    def add(self, of_pair: np.ndarray, genes: np.ndarray, shifts: np.ndarray) -> None:
        """Add the shifts (k,) of genes (k,) by the perturbations at `of_pair` (k,), a row per cell."""
        keys = of_pair * self._n_genes + genes
        others = ~np.isin(keys, self._edited)
        self._parts.append((keys[others], np.ones(others.sum(), np.int64), shifts[others]))
        self._pending += len(keys)
        if self._pending > _PENDING:
            self._sum()

    def _sum(self) -> tuple[np.ndarray, ...]:
        keys, n_cells, sums = (np.concatenate(each) for each in zip(*self._parts, strict=True))
        keys, codes = np.unique(keys, return_inverse=True)
        found = (
            keys,
            np.bincount(codes, n_cells, len(keys)).astype(np.int64),
            np.bincount(codes, sums, len(keys)),
        )
        self._parts, self._pending = [found], 0
        return found

    def means(self) -> ShardGenes:
        """Return the means over cells."""
        if not self._parts:
            none = np.zeros(0, np.int64)
            return ShardGenes(none, none, none, np.zeros(0))
        keys, n_cells, sums = self._sum()
        numbers, genes = np.divmod(keys, self._n_genes)
        return ShardGenes(numbers + self._numbers.start, genes, n_cells, sums / n_cells)


def make_gene_table(
    perturbations: Sequence[Perturbation],
    shards: Callable[[], Iterator[ShardGenes]],
    gene_ids: np.ndarray,
    symbols: np.ndarray,
    n_most: int,
) -> pd.DataFrame:
    """Return the genes that each perturbation moves most, beside how far matched perturbations move them.

    Parameters
    ----------
    perturbations : sequence of Perturbation
    shards : callable
        Returns an iterator over the shifts, which is used twice, so that they are never all in memory.
    gene_ids, symbols : object arrays (n_genes,)
        Of the tokenizer's genes.
    n_most : int
        Number of genes per perturbation.

    Returns
    -------
    DataFrame
        `perturbation`, `gene_id`, `symbol`, `n_cells`, `shift`, `matched_shift` and `z`, the largest `z` first
        (without one, the largest shift), for genes in at least 3 cells. `matched_shift` is the mean shift of the gene
        by the perturbations of the null with the same value of `matched`, or by all with this value if none was
        drawn, and `z` the distance to it in standard deviations; both are NaN for fewer than 10 of them.
    """
    groups, of_group = np.unique([each.matched for each in perturbations], return_inverse=True)
    is_null = np.array([each.is_null for each in perturbations])
    with_null = np.zeros(len(groups), bool)
    with_null[of_group[is_null]] = True
    is_reference = is_null | ~with_null[of_group]
    n, sums, squares = np.zeros((3, len(groups), len(gene_ids)))
    for shard in shards():
        kept = is_reference[shard.of_perturbation] & (shard.n_cells >= _LEAST_CELLS)
        at = of_group[shard.of_perturbation[kept]], shard.genes[kept]
        for total, values in ((n, 1.0), (sums, shard.shifts[kept]), (squares, shard.shifts[kept] ** 2)):
            np.add.at(total, at, values)
    with np.errstate(divide="ignore", invalid="ignore"):
        means = sums / n
        spread = np.sqrt(np.maximum(squares - sums * means, 0) / (n - 1))
    means[n < _LEAST_REFERENCE] = np.nan
    spread[spread <= 1e-6 * means] = np.nan  # rounding

    parts = []
    for shard in shards():
        kept = ~is_null[shard.of_perturbation] & (shard.n_cells >= _LEAST_CELLS)
        number, gene, n_cells, shift = (each[kept] for each in shard)
        matched = means[of_group[number], gene]
        found = pd.DataFrame(
            {
                "perturbation": np.array([each.name for each in perturbations], object)[number],
                "gene_id": gene_ids[gene],
                "symbol": symbols[gene],
                "n_cells": n_cells,
                "shift": shift,
                "matched_shift": matched,
                "z": (shift - matched) / spread[of_group[number], gene],
            }
        )
        order = np.lexsort((-shift, -found["z"].fillna(-np.inf), number))
        parts.append(found.iloc[order].groupby("perturbation", sort=False).head(n_most))
    return pd.concat(parts, ignore_index=True)
