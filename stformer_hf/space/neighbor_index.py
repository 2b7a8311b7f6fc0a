"""NeighborIndex: find the cells of a section in a box or disc around a cell, or nearest to it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import numpy as np
from scipy.spatial import cKDTree

_SLACK = 1e-9  # of the tree's candidates; the coordinates decide


class NeighborIndex:
    """Exact neighbours of cells, for many cells at once.

    A cell j is in the box around cell i if |x_j - x_i| <= width / 2, in float64, on each axis; it is in the disc if
    the sum of the squared differences is at most the squared radius. Borders are included. A cell is not its own
    neighbour, but other cells at its place are; cells of other sections never are.

    Parameters
    ----------
    points : float64 array (n, 2 or 3)
        Finite coordinates.
    sections : int64 array (n,)
        Section of each cell, from 0.
    patch_size, shape, k_nearest, discretize
        As for `CenterMaskSampler`; rounded borders are halves to even.
    candidates : int64 array (n_candidates,), optional
        Cells that may be neighbours, ascending; all by default. `query` accepts only these cells.
    keys : array (n,), optional
        Break ties between equally distant cells, the lowest first; their numbers by default.

    Notes
    -----
    One KD-tree holds all sections in separate branches: the number of the section is an additional coordinate, with
    steps larger than the reach of any query.
    """

    def __init__(
        self,
        points: np.ndarray,
        sections: np.ndarray,
        patch_size: float | Sequence[float] | None,
        *,
        shape: str = "box",
        k_nearest: int | None = None,
        discretize: bool = False,
        candidates: np.ndarray | None = None,
        keys: np.ndarray | None = None,
    ):
        if shape not in ("box", "disc"):
            raise ValueError(f"shape={shape!r}: must be 'box' or 'disc'.")
        if k_nearest is not None and (k_nearest != int(k_nearest) or k_nearest < 1):
            raise ValueError(f"k_nearest={k_nearest}: must be an integer of at least 1.")
        if patch_size is None and k_nearest is None:
            raise ValueError("Pass patch_size, or k_nearest, or both.")
        if discretize and (shape == "disc" or patch_size is None):
            raise ValueError("discretize=True rounds the borders of a box: it needs shape='box' and a patch_size.")
        self._points, self._sections = points, sections
        self._keys = np.arange(len(points)) if keys is None else keys
        # Scaling by a power of 2 keeps squares from over- or underflowing, and changes no digits, so no ties.
        _, self._exponent = np.frexp(np.abs(points).max(initial=0))
        self._even = points if k_nearest is None else np.ldexp(points, -self._exponent)  # read with k_nearest alone
        self._disc, self._discretize = shape == "disc", discretize
        self._k = None if k_nearest is None else int(k_nearest)
        self._half = None if patch_size is None else _half_sides(patch_size, points.shape[1], shape, discretize)
        self._disc_exponent = np.frexp(self._half[0])[1] if self._disc and self._half is not None else 0
        self._norm = 2.0 if self._disc or self._half is None else np.inf
        places = self._scaled()
        self._reach = 1 + _SLACK + 8 * np.finfo(float).eps * np.abs(places).max(initial=0)
        if self._half is None:
            self._reach *= 1 + np.linalg.norm(np.ptp(places, axis=0)) if len(places) else 1  # over any section
        self._places = np.column_stack([places, 3 * self._reach * sections])
        # Cells of a branch are adjacent in memory, so that queries cost nearly the same among many cells.
        rows = np.arange(len(points)) if candidates is None else candidates
        self._rows = rows[cKDTree(self._places[rows]).indices]
        self._tree = cKDTree(self._places[self._rows])
        self._axes = np.ldexp(points[self._rows].T.copy(), -self._disc_exponent)

    def _scaled(self) -> np.ndarray:
        """Return the centred coordinates, in units of half a side, or of a power of 2."""
        points = self._even if self._half is None else self._points
        if not len(points):
            return points
        centred = points - (points.min(axis=0) / 2 + points.max(axis=0) / 2)
        if self._half is None:
            return centred
        # Rounding moves a border by at most half a unit.
        return centred / (self._half + 0.5 if self._discretize else self._half)

    def query(self, cells: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Find the neighbours of cells, int64 array (n_cells,).

        Returns
        -------
        indptr : int64 array (n_cells + 1,)
            `cells[i]` has the neighbours `found[indptr[i]:indptr[i + 1]]`.
        found : int64 array (indptr[-1],)
            Numbers of cells, ascending for each cell.
        """
        reach = self._reach if self._half is not None else self._distances(cells)
        lists = self._tree.query_ball_point(self._places[cells], reach, p=self._norm, return_sorted=False)
        sizes = np.fromiter(map(len, lists), np.int64, len(cells))
        near = np.fromiter(chain.from_iterable(lists), np.int64, int(sizes.sum()))
        owners = np.repeat(np.arange(len(cells)), sizes)
        rows = self._rows[near]
        inside = self._is_inside(cells, sizes, near) & (rows != cells[owners])
        keys = owners[inside] * len(self._points) + rows[inside]
        keys.sort()
        owners = owners[inside]
        found = keys - owners * len(self._points)
        if self._k is not None:
            away = ((self._even[found] - self._even[cells[owners]]) ** 2).sum(axis=1)
            kept = first_of_each(owners, away, len(cells), self._k, self._keys[found])
            owners, found = owners[kept], found[kept]
        return np.concatenate([[0], np.cumsum(np.bincount(owners, minlength=len(cells)))]), found

    def _is_inside(self, cells: np.ndarray, sizes: np.ndarray, near: np.ndarray) -> np.ndarray:
        """Return which candidates of the tree, `sizes` for each of `cells`, are in its box or disc."""
        if self._half is None:
            return self._sections[self._rows[near]] == np.repeat(self._sections[cells], sizes)
        inside, away = np.ones(len(near), bool), np.zeros(len(near))
        middles = np.ldexp(self._points[cells].T, -self._disc_exponent)
        halves = np.ldexp(self._half, -self._disc_exponent)
        for values, middle, half in zip(self._axes, middles, halves, strict=True):
            there = values[near]
            if self._discretize:
                inside &= np.repeat(np.rint(middle - half), sizes) <= there
                inside &= there <= np.repeat(np.rint(middle + half), sizes)
            elif self._disc:
                away += (there - np.repeat(middle, sizes)) ** 2
            else:
                inside &= np.abs(there - np.repeat(middle, sizes)) <= half
        return away <= halves[0] ** 2 if self._disc else inside

    def _distances(self, cells: np.ndarray) -> np.ndarray:
        """Return slightly more than the distance to the last of the nearest neighbours, for each cell."""
        assert self._k is not None
        k = min(self._k + 1, self._tree.n)
        away = self._tree.query(self._places[cells], [k])[0][:, 0]
        margin = 8 * np.finfo(float).eps * np.abs(self._places[cells, :-1]).max(axis=1, initial=0)
        return np.minimum(away * (1 + _SLACK) + margin, self._reach)  # cells of other sections are beyond it

    def count(self, cells: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Count neighbours without finding them, approximately on borders; `k_nearest` is ignored.

        This needs a patch_size.

        Returns
        -------
        n_inside, n_others : int64 array (n_cells,)
            Cells in the box or disc, and in the whole section, without the cell itself.
        """
        inside = self._tree.query_ball_point(self._places[cells], self._reach, p=self._norm, return_length=True)
        return inside - 1, np.bincount(self._sections[self._rows])[self._sections[cells]] - 1

    def nearest_distances(self, cells: np.ndarray) -> np.ndarray:
        """Return the distance to the nearest other cell of the section: float64 (n_cells,), infinite if none."""
        other = NeighborIndex(self._points, self._sections, None, k_nearest=1, candidates=np.sort(self._rows))
        indptr, found = other.query(cells)
        away = np.full(len(cells), np.inf)
        there = np.diff(indptr) > 0
        away[there] = np.linalg.norm(other._even[found] - other._even[cells[there]], axis=1)
        return np.ldexp(away, self._exponent)


def first_of_each(
    owners: np.ndarray, values: np.ndarray, n_owners: int, most: int, keys: np.ndarray | None = None
) -> np.ndarray:
    """Choose the elements with the lowest values of each owner, at most `most`: bool array (n,).

    `owners` are ascending; ties are broken by `keys`, or by order.
    """
    order = np.lexsort((values, owners) if keys is None else (keys, values, owners))
    starts = np.searchsorted(owners, np.arange(n_owners))
    kept = np.zeros(len(owners), bool)
    kept[order] = np.arange(len(owners)) - starts[owners] < most  # `owners` is sorted, so ranks are in its order
    return kept


def _half_sides(patch_size: float | Sequence[float], n_dimensions: int, shape: str, discretize: bool) -> np.ndarray:
    """Return half of each side: float64 (n_dimensions,)."""
    sides = np.asarray(patch_size, np.float64)
    if sides.ndim == 0:
        sides = np.full(n_dimensions, sides)
    if sides.shape != (n_dimensions,):
        raise ValueError(
            f"patch_size={patch_size} for {n_dimensions}-D coordinates: pass one number, or {n_dimensions} of them."
        )
    if not (np.isfinite(sides) & (sides > 0)).all():
        raise ValueError(f"patch_size={patch_size}: sides must be positive, in the units of the coordinates.")
    if shape == "disc" and (sides != sides[0]).any():
        raise ValueError(f"patch_size={patch_size}: a disc has one diameter; pass one number.")
    if discretize:
        sides = np.floor(sides)
        if not sides.all():
            raise ValueError(
                f"patch_size={patch_size} is truncated to 0 by discretize=True: leave discretize out, or scale the "
                "coordinates."
            )
    return sides / 2
