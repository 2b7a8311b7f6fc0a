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
_LEAST_CHANGED = 3  # cells that a perturbation must change to be tested
_LEAST_P = 1e-16  # of the normal distribution; how far out it is beyond that says nothing


class ShardScores(NamedTuple):
    """Scores of p perturbations in all cells."""

    numbers: np.ndarray  # int64 (p,), of the perturbations
    n_changed: np.ndarray  # int64 (p,), number of cells that each changes
    values: np.ndarray  # float32 (p, n_scores, n_cells), 0 for cells that a perturbation does not change
    changed: np.ndarray  # bool (p, n_cells), which cells it changes
    directions: np.ndarray  # float64 (p, d), mean change of the cells' states of length 1, over all cells


class CellGroups(NamedTuple):
    """The two groups as cells, each with a state of length 1; the first are the perturbed ones, the second the goal's.

    The statistics of both are those of `cell_statistics`.
    """

    perturbed: tuple[int, np.ndarray, np.ndarray]
    goal: tuple[int, np.ndarray, np.ndarray]


def cell_statistics(states: np.ndarray) -> tuple[int, np.ndarray, np.ndarray]:
    """Return the number n of states (n, d), their mean (d,), and their covariance (d, d)."""
    spread = np.cov(states, rowvar=False, ddof=1) if len(states) > 1 else np.zeros((states.shape[1],) * 2)
    return len(states), states.mean(axis=0), spread


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
    groups: CellGroups | DonorGroups | None,
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
    groups : CellGroups or DonorGroups, optional
        Perturbed cells and goal, as cells or as donors.
    seed : int, default: 0
        Seed of the permutations of donors.
    """
    rows: dict[int, dict[str, float]] = {}
    of_donors = isinstance(groups, DonorGroups)
    projections = np.zeros((len(perturbations), len(groups.states) if isinstance(groups, DonorGroups) else 0))
    p_cells = np.full(len(perturbations), np.nan)
    for shard in shards():
        if isinstance(groups, DonorGroups):
            projections[shard.numbers] = shard.directions @ groups.states.T
        elif groups is not None:
            p_cells[shard.numbers] = compare_groups(shard.directions, groups)
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
    changed = table["n_changed"].to_numpy() >= _LEAST_CHANGED  # the others cannot be tested, nor be a comparison
    of_groups = "p_donors" if of_donors else "p_cells"
    if groups is not None:
        table[of_groups] = np.where(changed, p_cells, np.nan)
    if isinstance(groups, DonorGroups):
        table.loc[changed, of_groups] = permute_donors(projections[changed], groups, seed)
    compared = table.loc[changed]
    for name in names:
        z, p = np.full((2, len(table)), np.nan)
        z[changed], p[changed] = compare(*(compared[column].to_numpy() for column in (name, "matched", "null")))
        of = "" if name == tested else f"{name}_"
        table[f"{of}z"], table[f"{of}p_matched"] = z, p
    table["p_wilcoxon"] = wilcoxon
    both = ["p_matched", *[of_groups] * (groups is not None)]
    table["p"] = table[both].max(axis=1, skipna=False)
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
    """Compare effects (n,) with those of matched perturbations.

    Perturbations are compared with those of the same value of `matched` that were drawn for the null (`is_null`).
    Where there are none, all with this value are the reference: the panel's own genes, most of which are assumed to do
    nothing particular.

    Returns
    -------
    z : float array (n,)
        Distance to the median of the reference, in units of its spread. With a null that was drawn, 90 % of it are
        within 1.645. Otherwise the spread is the median absolute deviation / 0.6745, times a factor, common to all, of
        at least 1, that puts 90 % of the reference within 1.645.
    p : float array (n,)
        Two-sided. NaN with fewer than 10 perturbations in the reference. If n were drawn for the null, the share of
        1 + n that is at least as far out, itself included: no effect, however large, has a p below 1 / (1 + n). The
        null of all values of `matched` is pooled, and each of its z is the distance to the others. Otherwise by the
        normal distribution, an empirical null.

    Notes
    -----
    The effects of random genes have far heavier tails than a normal distribution, since a few move a cell much further
    than others, in any direction. The first p holds for any distribution of effects that, but for centre and spread,
    is the same for all values of `matched`: since their null is pooled, it is too small for the genes of a value with
    heavier tails, if most genes asked for have this value. The second is too small for genes that move cells far.

    References
    ----------
    Bates et al. 2023, Annals of Statistics 51:149, for p-values by rank among a reference, and their false discovery
    rates. Efron 2004, JASA 99:96, for the empirical null.
    """
    z, of_null = np.full(len(effects), np.nan), np.zeros(0)
    drawn, by_itself = np.zeros((2, len(effects)), bool)  # compared with a null that was drawn, or with one another
    for value in np.unique(matched):
        of = matched == value
        reference = effects[of & is_null] if (of & is_null).any() else effects[of]
        if len(reference) < _LEAST_REFERENCE:
            continue
        was_drawn = (of & is_null).any()
        centre, spread = _centre_and_spread(reference, 0.9 if was_drawn else 0.5)
        if spread == 0:
            continue
        z[of] = (effects[of] - centre) / spread
        if was_drawn:
            drawn |= of
            of_null = np.append(of_null, _distances_to_others(reference))
        else:
            by_itself |= of
    p = np.full(len(effects), np.nan)
    if drawn.any():
        n_farther = len(of_null) - np.searchsorted(np.sort(np.abs(of_null)), np.abs(z[drawn]))
        p[drawn] = (1 + n_farther) / (1 + len(of_null))
    if by_itself.any():
        z[by_itself] /= max(1.0, np.quantile(np.abs(z[by_itself]), 0.9) / stats.norm.ppf(0.95))
        p[by_itself] = np.maximum(2 * stats.norm.sf(np.abs(z[by_itself])), _LEAST_P)
    return z, p


def _centre_and_spread(values: np.ndarray, share: float) -> tuple[float, float]:
    """Return the median, and the distance to it of a share of the values, divided by that of a normal distribution."""
    centre = np.median(values)
    return centre, np.quantile(np.abs(values - centre), share) / stats.norm.ppf((1 + share) / 2)


def _distances_to_others(values: np.ndarray) -> np.ndarray:
    """Return the z of each value among the others, of which the spread is not 0: float array (at most n,)."""
    found = []
    for i, value in enumerate(values):
        centre, spread = _centre_and_spread(np.delete(values, i), 0.9)
        if spread > 0:
            found.append((value - centre) / spread)
    return np.array(found)


def compare_groups(directions: np.ndarray, groups: CellGroups) -> np.ndarray:
    """Test whether the cells of the two groups differ along the shift of each perturbation, by Welch's t-test.

    If they do not, a perturbation cannot move cells from one group to the other, however far it moves them. The units
    are cells, those of one donor are not independent, and nothing follows for other donors.

    Parameters
    ----------
    directions : float64 array (p, d)
        Mean change of the cells' states.
    groups : CellGroups

    Returns
    -------
    float array (p,)
        Two-sided p-values; NaN where a group has a single cell, or no cell differs from the others.
    """
    (n_start, of_start, spread_start), (n_goal, of_goal, spread_goal) = groups
    if min(n_start, n_goal) < 2:
        return np.full(len(directions), np.nan)
    variances = [
        np.einsum("pd,de,pe->p", directions, spread, directions, optimize=True) / n
        for n, spread in ((n_start, spread_start), (n_goal, spread_goal))
    ]
    with np.errstate(divide="ignore", invalid="ignore"):
        t = directions @ (of_goal - of_start) / np.sqrt(sum(variances))
        freedom = sum(variances) ** 2 / (variances[0] ** 2 / (n_start - 1) + variances[1] ** 2 / (n_goal - 1))
    return np.maximum(2 * stats.t.sf(np.abs(t), freedom), _LEAST_P)


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
