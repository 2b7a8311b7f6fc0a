"""Test the effects of perturbations: matched genes, donors, intervals, false discovery rates."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy import stats

from .gene_edits import Perturbation

N_PERMUTATIONS = 9999
_AT_ONCE = 256  # perturbations whose permutations are in memory together: 20 MB
_LEAST_REFERENCE = 10  # perturbations that a centre and a spread are computed from
_NORMAL_MAD = float(stats.norm.ppf(0.75))  # median absolute deviation of a standard normal


class ShardScores(NamedTuple):
    """Scores of p perturbations in all cells."""

    numbers: np.ndarray  # int64 (p,), of the perturbations
    n_changed: np.ndarray  # int64 (p,), number of cells that each changes
    values: np.ndarray  # float32 (p, n_scores, n_cells), 0 for cells that a perturbation does not change
    changed: np.ndarray  # bool (p, n_cells), which cells it changes
    directions: np.ndarray  # float64 (p, d), mean change of the cells' states of length 1, over all cells


class DonorGroups(NamedTuple):
    """Samples: the cells of one donor in one of the two groups."""

    states: np.ndarray  # mean of the cells' states, each of length 1 before: float64 (n_samples, d)
    donors: np.ndarray  # int64 (n_samples,)
    is_goal: np.ndarray  # whether the cells are of the goal group: bool (n_samples,)


def make_table(
    perturbations: Sequence[Perturbation],
    shards: Callable[[], Iterator[ShardScores]],
    names: Sequence[str],
    donors: np.ndarray | None,
    groups: DonorGroups | None,
    seed: int = 0,
) -> pd.DataFrame:
    """Summarise the scores of perturbations over cells or donors, and compare them with matched ones.

    Parameters
    ----------
    perturbations : sequence of Perturbation
        Rows of the table, see `perturb`.
    shards : callable
        Returns an iterator over the scores, which is used twice, so that those of all genes are never in memory.
    names : sequence of str (n_scores,)
        Name of each score; the first is the one that is tested.
    donors : int64 array (n_cells,), optional
        Donor of each perturbed cell.
    groups, seed
        For `permute_donors`.
    """
    rows: dict[int, dict[str, float]] = {}
    projections = np.zeros((len(perturbations), 0 if groups is None else len(groups.states)))
    for shard in shards():
        if groups is not None:
            projections[shard.numbers] = shard.directions.astype(np.float64) @ groups.states.T
        for i, number in enumerate(shard.numbers.tolist()):
            rows[number] = {"n_changed": int(shard.n_changed[i])}
            for name, values in zip(names, shard.values[i], strict=True):
                mean, low, high = interval(values, donors)
                rows[number] |= {name: mean, f"{name}_low": low, f"{name}_high": high}
    table = pd.DataFrame([rows[number] for number in range(len(perturbations))])
    table.index = pd.Index([each.name for each in perturbations], name="perturbation")
    table.insert(0, "matched", [each.matched for each in perturbations])
    table.insert(0, "null", [each.is_null for each in perturbations])
    tested = names[0]
    centre = _centre_per_changed_cell(table, tested)
    wilcoxon = np.full(len(table), np.nan)
    for shard in shards():
        for i, number in enumerate(shard.numbers.tolist()):
            wilcoxon[number] = _wilcoxon(shard.values[i, 0], shard.changed[i], donors, centre[number])
    changed = table["n_changed"].to_numpy() > 0  # the others cannot be compared, nor be a comparison
    if groups is not None:
        table["p_donors"] = np.nan
        table.loc[changed, "p_donors"] = permute_donors(projections[changed], groups, seed)
    compared = table.loc[changed]
    for name in names:
        z, p = np.full((2, len(table)), np.nan)
        z[changed], p[changed] = compare(*(compared[column].to_numpy() for column in (name, "matched", "null")))
        of = "" if name == tested else f"{name}_"
        table[f"{of}z"], table[f"{of}p_matched"] = z, p
    table["p_wilcoxon"] = wilcoxon
    table["p"] = table["p_matched"]
    if "p_donors" in table:
        table["p"] = table[["p_matched", "p_donors"]].max(axis=1, skipna=False)
    asked = ~table["null"].to_numpy()
    for name in names:
        of, tests = ("", "p") if name == tested else (f"{name}_", f"{name}_p_matched")
        table[f"{of}fdr"] = np.nan
        table.loc[asked, f"{of}fdr"] = benjamini_hochberg(table.loc[asked, tests].to_numpy())
    return table


def interval(values: np.ndarray, units: np.ndarray | None = None) -> tuple[float, float, float]:
    """Return the mean over cells, and its 95 % interval over units, by Student's t; NaN bounds for a single unit.

    With the donors of the cells as units (int64), the interval is that of the mean of the donors' means, moved to the
    mean over cells. By default each cell is a unit, and the interval says nothing about other donors.
    """
    values = np.asarray(values, np.float64)
    mean = float(values.mean())
    of_units = values if units is None else _means(values, units)
    if len(of_units) < 2:
        return mean, np.nan, np.nan
    half = stats.t.ppf(0.975, len(of_units) - 1) * of_units.std(ddof=1) / np.sqrt(len(of_units))
    return mean, float(mean - half), float(mean + half)


def compare(effects: np.ndarray, matched: np.ndarray, is_null: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Compare effects (n,) with those of matched perturbations, an empirical null (Efron 2004, JASA 99:96).

    Perturbations are compared with those of the same value of `matched` that were drawn for the null (`is_null`).
    Where there are none, all with this value are the reference: the panel's own genes, most of which are assumed to do
    nothing particular.

    Returns
    -------
    z : float array (n,)
        Distance to the median of the reference, in units of its spread: median absolute deviation / 0.6745, times
        a factor, common to all, of at least 1, that puts 90 % of the reference within 1.645.
    p : float array (n,)
        Two-sided, by the normal distribution. NaN with fewer than 10 perturbations in the reference.
    """
    z = np.full(len(effects), np.nan)
    in_reference = np.zeros(len(effects), bool)
    for value in np.unique(matched):
        of = matched == value
        reference = of & is_null if (of & is_null).any() else of
        if reference.sum() < _LEAST_REFERENCE:
            continue
        centre = np.median(effects[reference])
        spread = np.median(np.abs(effects[reference] - centre)) / _NORMAL_MAD
        if spread > 0:
            z[of] = (effects[of] - centre) / spread
            in_reference |= reference
    if in_reference.any():
        z /= max(1.0, np.quantile(np.abs(z[in_reference]), 0.9) / stats.norm.ppf(0.95))
    return z, 2 * stats.norm.sf(np.abs(z))


def permute_donors(projections: np.ndarray, groups: DonorGroups, seed: int) -> np.ndarray:
    """Test shifts towards the goal by permuting which donors are the goal's.

    Donors of both groups swap them with probability 1/2, and the groups of the others are permuted. Cells are never
    permuted: those of one donor resemble one another. The effect of a perturbation is the mean change of the cells'
    states along the goal's mean states of donors, each less the mean of what it is permuted with.

    Effects are divided by their standard deviation over all permutations. This makes those of different perturbations
    comparable, so that they share one null: the permuted effects of all of them.

    Parameters
    ----------
    projections : float array (p, n_samples)
        Mean change of the cells' states along the state of each sample of `groups`.
    groups : DonorGroups
    seed : int

    Returns
    -------
    float array (p,)
        Two-sided p-values: the share of the effects of all perturbations in 9,999 permutations and in the observed
        groups that are at least as large. NaN where no permutation has an effect.

    Notes
    -----
    The p-value of one perturbation alone cannot be lower than 2 / (number of different permutations). That of one
    among many can, unless all move the cells the same way. If the groups do not differ, at most a share a of the
    perturbations have p <= a, on average over permutations of the groups.

    For two separate groups, and for pairs, the order of the effects is that of Student's t over donors.

    References
    ----------
    Tusher, Tibshirani and Chu 2001, PNAS 98:5116, for a null that is pooled over genes.
    """
    rng = np.random.default_rng(seed)
    n_of_donor = np.bincount(groups.donors)
    paired = n_of_donor[groups.donors] == 2
    labels = np.repeat(groups.is_goal[None], N_PERMUTATIONS + 1, axis=0)
    swaps = rng.random((N_PERMUTATIONS, len(n_of_donor))) < 0.5
    labels[1:, paired] ^= swaps[:, groups.donors[paired]]
    labels[1:, ~paired] = rng.permuted(labels[1:, ~paired], axis=1)
    labels = labels.T.astype(np.float64)

    block_of = np.where(paired, groups.donors, -1)  # a donor of both groups, or all the others
    blocks = (block_of[:, None] == np.unique(block_of)).astype(np.float64)
    size, n_goal = blocks.sum(axis=0), groups.is_goal @ blocks
    of_squares = blocks @ (n_goal * (size - n_goal) / (size * np.maximum(size - 1, 1)))  # variance of a sum
    to_centre = np.eye(len(blocks)) - (blocks / size) @ blocks.T

    def effects(first: int) -> np.ndarray:
        found = projections[first : first + _AT_ONCE]
        least = 1e-9 * np.abs(found).max(axis=1, initial=0)  # rounding
        found = found @ to_centre
        scale = np.sqrt(found**2 @ of_squares)
        scale[scale <= least] = np.nan
        return np.abs(found @ labels) / scale[:, None]

    parts = range(0, len(projections), _AT_ONCE)
    observed = np.concatenate([np.zeros(0), *(effects(first)[:, 0] for first in parts)]) * (1 - 1e-9)
    n_larger, n_all = np.zeros(len(observed), np.int64), 0
    for first in parts:
        null = effects(first)
        null = np.sort(null[~np.isnan(null)])
        n_larger += len(null) - np.searchsorted(null, observed)
        n_all += len(null)
    return np.where(np.isnan(observed), np.nan, n_larger / max(n_all, 1))


def benjamini_hochberg(p: np.ndarray) -> np.ndarray:
    """Return false discovery rates (Benjamini and Hochberg 1995); NaN stays NaN, and does not count as a test."""
    fdr, known = np.full(len(p), np.nan), ~np.isnan(p)
    if known.any():
        fdr[known] = stats.false_discovery_control(p[known])
    return fdr


def _centre_per_changed_cell(table: pd.DataFrame, tested: str) -> np.ndarray:
    """Return the ratio of the matched perturbations' median effect to their median number of changed cells."""
    centre = np.zeros(len(table))
    for value, rows in table.groupby("matched"):
        reference = rows[rows["null"]] if rows["null"].any() else rows
        reference = reference[reference["n_changed"] > 0]
        if len(reference) >= _LEAST_REFERENCE:
            centre[table["matched"] == value] = (reference[tested] / reference["n_changed"]).median()
    return centre


def _wilcoxon(values: np.ndarray, changed: np.ndarray, donors: np.ndarray | None, centre: float) -> float:
    """Signed-rank test of the changed cells, or of the donors' means over them, against the matched perturbations."""
    if not changed.any():
        return np.nan
    found = values[changed].astype(np.float64) - centre * len(values)
    if donors is not None:
        found = _means(found, donors[changed])
    return float(stats.wilcoxon(found).pvalue) if len(found) > 1 and found.any() else np.nan


def _means(values: np.ndarray, units: np.ndarray) -> np.ndarray:
    """Return the mean of each unit that has values."""
    _, codes = np.unique(units, return_inverse=True)
    return np.bincount(codes, weights=values) / np.bincount(codes)


__all__ = ["DonorGroups", "ShardScores", "benjamini_hochberg", "compare", "interval", "make_table", "permute_donors"]
