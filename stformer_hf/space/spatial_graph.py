"""spatial_neighbors: build the graph of neighbouring cells in tissue sections, in `obsp`."""

from __future__ import annotations

import contextlib

import numpy as np
import pandas as pd
from anndata import AnnData
from scipy import sparse
from scipy.spatial import Delaunay, QhullError, cKDTree

from ..genes.wrong_names import must_have
from ..sources.read_anndata import coordinates_of, find_placed_table, section_of
from .spatial_metadata import warn_of_sections

_METHODS = ("delaunay", "knn", "radius")
_N_NEIGHBORS = 6  # as in squidpy
_MOST_CELLS_A_PLACE = 1000  # all are neighbours of each other: the number of edges grows with the square


def spatial_neighbors(
    adata: AnnData,
    method: str | None = None,
    *,
    spatial_key: str = "spatial",
    section_key: str | None = None,
    key_added: str = "spatial",
    n_neighbors: int | None = None,
    radius: float | None = None,
    layer: str | None = None,
) -> None:
    """Find the neighbours of cells or spots by their coordinates.

    By default, two cells are neighbours if an edge of the Delaunay triangulation of their section joins them. Cells at
    the same place are neighbours of each other, and share the neighbours of the place.

    Parameters
    ----------
    adata : AnnData, MuData or SpatialData
        Changed as by `squidpy.gr.spatial_neighbors`: `obsp["spatial_connectivities"]` is a symmetric CSR matrix of
        float32 ones without a diagonal; `obsp["spatial_distances"]` (float64, in the units of the coordinates) has the
        same entries, including zeros between cells at the same place; the settings are in `uns["spatial_neighbors"]`.
        For a MuData, the gene modality is changed; for a SpatialData the table, which also gets coordinates if it has
        none, see `add_coordinates`.
    method : {"delaunay", "knn", "radius"}, optional
        By default "knn" if `n_neighbors` is given, "radius" if `radius` is given, else "delaunay".
    spatial_key : str, default: "spatial"
        Key of obsm: coordinates, (n_cells, 2) or (n_cells, 3).
    section_key : str, optional
        Column of obs; cells of different sections are never neighbours. By default the regions of a SpatialData's
        table are the sections, and otherwise all cells form one section.
    key_added : str, default: "spatial"
        Prefix of the keys.
    n_neighbors : int, optional
        For "knn", 6 by default: join each cell with this many nearest ones (or all, if there are fewer), and with
        those for which it is one of the nearest. Ties in distance are broken arbitrarily.
    radius : float, optional
        For "radius", which needs it: join all cells that are at most this far apart.
    layer : str, optional
        Modality of a MuData, or table of a SpatialData.

    Raises
    ------
    ValueError
        A key in obsm or column in obs is missing; coordinates have another shape, or are missing or infinite; cells
        have no section; over 1,000 cells are at one place; the method is unknown; `n_neighbors` or `radius` is given
        for another method, both are given, or one is not positive; "radius" has no `radius`.

    Notes
    -----
    Each edge occurs once; STFormer counts edges shared by two triangles twice. Points on one line are joined into a
    chain; flat 3-D coordinates are triangulated in their plane. If more than three points lie on an empty circle, as
    in a square grid, there are multiple triangulations, and Qhull chooses one.

    References
    ----------
    Barber, Dobkin and Huhdanpaa (1996), The Quickhull algorithm for convex hulls.
    """
    if method is None:
        if n_neighbors is not None and radius is not None:
            raise ValueError("n_neighbors= and radius= exclude each other: pass one of them.")
    elif method not in _METHODS:
        raise ValueError(f"method={method!r} is not one of {', '.join(map(repr, _METHODS))}.")
    if method in ("delaunay", "radius") and n_neighbors is not None:
        raise ValueError(f"n_neighbors={n_neighbors} needs method='knn', not {method!r}: leave it out.")
    if method in ("delaunay", "knn") and radius is not None:
        raise ValueError(f"radius={radius} needs method='radius', not {method!r}: leave it out.")
    if method == "radius" and radius is None:
        raise ValueError("method='radius' needs a radius=, in the units of the coordinates.")
    if method == "knn" and n_neighbors is None:
        n_neighbors = _N_NEIGHBORS
    if n_neighbors is not None and (n_neighbors < 1 or n_neighbors != int(n_neighbors)):
        raise ValueError(f"n_neighbors={n_neighbors}: must be an integer of at least 1.")
    if radius is not None and not 0 < radius < np.inf:
        raise ValueError(f"radius={radius}: must be a positive distance.")
    found = find_placed_table(adata, layer)
    adata, section_key = found.table, section_key or section_of(found.table)
    if section_key is None:
        warn_of_sections(adata.obs)
    coordinates = coordinates_of(adata, spatial_key)
    # Scale to at most 1, so that squares do not overflow; a power of 2 changes no digits.
    _, exponent = np.frexp(np.abs(coordinates).max(initial=0))
    points = np.ldexp(coordinates, -exponent)
    radius_of_points = None if radius is None else np.ldexp(radius, -exponent)
    pairs = [np.empty((0, 2), np.int64)]
    for cells in _sections(found.obs, section_key):
        pairs.append(cells[_pairs(points[cells], n_neighbors, radius_of_points)])
    connectivities, distances = _graph(np.concatenate(pairs), points)
    distances.data = np.ldexp(distances.data, exponent)
    adata.obsp[f"{key_added}_connectivities"] = connectivities
    adata.obsp[f"{key_added}_distances"] = distances
    params = {"n_neighbors": n_neighbors, "radius": radius, "spatial_key": spatial_key, "section_key": section_key}
    adata.uns[f"{key_added}_neighbors"] = {
        "connectivities_key": f"{key_added}_connectivities",
        "distances_key": f"{key_added}_distances",
        "params": {name: value for name, value in params.items() if value is not None},
    }


def _sections(obs: pd.DataFrame, key: str | None) -> list[np.ndarray]:
    """Return the cells of each section."""
    if key is None:
        return [np.arange(len(obs))]
    must_have(obs, "obs", key)
    codes, names = pd.factorize(obs[key])
    if (codes < 0).any():
        raise ValueError(f"{(codes < 0).sum()} of {len(codes)} cells have no value in obs[{key!r}].")
    bounds = np.cumsum(np.bincount(codes, minlength=len(names)))[:-1]
    return np.split(np.argsort(codes, kind="stable"), bounds)


def _pairs(points: np.ndarray, n_neighbors: int | None, radius: float | None) -> np.ndarray:
    """Find the edges between points: int array (n_edges, 2); edges may occur in both directions."""
    if len(points) < 2:
        return np.empty((0, 2), np.int64)
    order = np.lexsort(points.T)
    is_new = np.concatenate([[True], (np.diff(points[order], axis=0) != 0).any(axis=1)])
    places = points[order[is_new]]
    n_cells = np.diff(np.append(np.flatnonzero(is_new), len(points)))
    if n_cells.max() > _MOST_CELLS_A_PLACE:
        raise ValueError(f"{n_cells.max()} cells are at one place: these cannot be coordinates of cells.")
    if n_neighbors is not None:
        return _nearest(points, int(n_neighbors))
    if radius is not None:
        return cKDTree(points).query_pairs(radius, output_type="ndarray")
    return _spread(_triangulate(places), order, n_cells)


def _nearest(points: np.ndarray, n_neighbors: int) -> np.ndarray:
    n = len(points)
    k = min(n_neighbors, n - 1)
    _, found = cKDTree(points).query(points, k + 1)
    others = found != np.arange(n)[:, None]
    others[others.all(axis=1), -1] = False  # among points at one place, a point may not find itself
    return np.column_stack([np.repeat(np.arange(n), k), found[others]])


def _triangulate(places: np.ndarray) -> np.ndarray:
    """Find the edges of a Delaunay triangulation of distinct points: int array (n_edges, 2)."""
    centred = places - (places.min(axis=0) + places.max(axis=0)) / 2  # Qhull's precision is that of the largest value
    _, _, axes = np.linalg.svd(centred - centred.mean(axis=0), full_matrices=False)
    for n_dimensions in range(places.shape[1], 1, -1):
        flat = centred if n_dimensions == places.shape[1] else centred @ axes[:n_dimensions].T
        with contextlib.suppress(QhullError):  # too few points, or all on one plane or line
            return _qhull_edges(flat)
    order = np.argsort(centred @ axes[0], kind="stable")
    return np.column_stack([order[:-1], order[1:]])


def _qhull_edges(places: np.ndarray) -> np.ndarray:
    triangulation = Delaunay(places)
    corners = triangulation.simplices
    edges = [corners[:, [i, j]] for i in range(corners.shape[1]) for j in range(i)]
    # Points that are too close to another to be corners.
    return np.concatenate([*edges, triangulation.coplanar[:, [0, 2]]])


def _spread(edges: np.ndarray, cells: np.ndarray, n_cells: np.ndarray) -> np.ndarray:
    """Convert edges between places to edges between all their cells, and join the cells of each place.

    `cells` are sorted by place, and `n_cells` are the numbers of cells of each place.
    """
    crowded = np.flatnonzero(n_cells > 1)
    if not len(crowded):
        return cells[edges]
    edges = np.unique(np.sort(edges, axis=1), axis=0)
    first, second = np.concatenate([edges, np.column_stack([crowded, crowded])]).T
    starts = np.cumsum(n_cells) - n_cells
    n_pairs = n_cells[first] * n_cells[second]
    number = np.arange(n_pairs.sum()) - np.repeat(np.cumsum(n_pairs) - n_pairs, n_pairs)
    width = np.repeat(n_cells[second], n_pairs)
    one = cells[np.repeat(starts[first], n_pairs) + number // width]
    other = cells[np.repeat(starts[second], n_pairs) + number % width]
    return np.column_stack([one, other])[one != other]


def _graph(pairs: np.ndarray, points: np.ndarray) -> tuple[sparse.csr_matrix, sparse.csr_matrix]:
    """Return symmetric matrices of edges: ones, and distances."""
    n = len(points)
    both = np.concatenate([pairs, pairs[:, ::-1]])
    graph = sparse.csr_matrix((np.ones(len(both), np.float32), (both[:, 0], both[:, 1])), shape=(n, n))
    graph.sum_duplicates()
    graph.data[:] = 1
    rows = np.repeat(np.arange(n), np.diff(graph.indptr))
    lengths = np.linalg.norm(points[rows] - points[graph.indices], axis=1)
    return graph, sparse.csr_matrix((lengths, graph.indices.copy(), graph.indptr.copy()), shape=(n, n))
