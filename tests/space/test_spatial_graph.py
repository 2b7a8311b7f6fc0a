"""Spatial neighbours: the triangulation, the nearest and the near cells, against all pairs and all triangles."""

from fractions import Fraction
from itertools import combinations

import numpy as np
import pandas as pd
import pytest
from anndata import AnnData, read_h5ad
from hypothesis import given
from hypothesis import strategies as st
from scipy import sparse
from scipy.spatial import Delaunay

from stformer_hf import spatial_neighbors
from stformer_hf.space import spatial_graph


def section(points, **obs) -> AnnData:
    points = np.asarray(points, np.float64)
    names = pd.Index([f"cell{i}" for i in range(len(points))])
    return AnnData(
        np.zeros((len(points), 1), np.float32), obs=pd.DataFrame(obs, index=names), obsm={"spatial": points}
    )


def graph_of(points, **options) -> np.ndarray:
    """The graph of points as a boolean matrix; that the two matrices are as documented is asserted on the way."""
    adata = section(points)
    spatial_neighbors(adata, **options)
    graph, distances = adata.obsp["spatial_connectivities"], adata.obsp["spatial_distances"]
    assert sparse.issparse(graph) and graph.format == distances.format == "csr"
    assert graph.dtype == np.float32 and distances.dtype == np.float64
    assert (graph.data == 1).all() and graph.has_canonical_format  # each edge once
    dense = graph.toarray()
    assert (dense == dense.T).all() and not dense.diagonal().any()
    np.testing.assert_array_equal(graph.indptr, distances.indptr)
    np.testing.assert_array_equal(graph.indices, distances.indices)
    points = np.asarray(points, np.float64)
    for i, j in zip(*graph.nonzero(), strict=True):
        np.testing.assert_allclose(distances[i, j], np.sqrt(((points[i] - points[j]) ** 2).sum()), rtol=1e-12)
    return dense.astype(bool)


def edges_of(graph: np.ndarray) -> set[tuple[int, int]]:
    return {(int(i), int(j)) for i, j in np.argwhere(np.triu(graph))}


def left_of(a, b, c) -> int:
    return (b[0] - a[0]) * (c[1] - a[1]) - (b[1] - a[1]) * (c[0] - a[0])


def empty_circles(points: list[tuple[int, int]], i: int, j: int) -> tuple[bool, bool]:
    """Whether a circle through i and j has no other point in it; and whether one has none on it either. Exact.

    The centres are m + t n, with m the middle and n the normal of the edge; each other point bounds t on one side.
    """
    (ax, ay), (bx, by) = points[i], points[j]
    middle, normal = (Fraction(ax + bx, 2), Fraction(ay + by, 2)), (ay - by, bx - ax)
    lower, upper = [], []
    for k, (x, y) in enumerate(points):
        if k in (i, j):
            continue
        dx, dy = x - middle[0], y - middle[1]
        slope = 2 * (normal[0] * dx + normal[1] * dy)
        room = dx * dx + dy * dy - Fraction((ax - bx) ** 2 + (ay - by) ** 2, 4)  # it is outside where t slope <= room
        if slope == 0 and room < 0:
            return False, False  # it lies between them
        if slope:
            (upper if slope > 0 else lower).append(room / slope)
    if not lower or not upper:
        return True, True
    return max(lower) <= min(upper), max(lower) < min(upper)


def check_triangulation(places: list[tuple[int, int]], edges: set[tuple[int, int]]) -> None:
    """Every edge has an empty circle, those that only one triangulation can have are there, and it is a whole one."""
    for pair in combinations(range(len(places)), 2):
        may_be, must_be = empty_circles(places, *pair)
        assert must_be <= (pair in edges) <= may_be, (places, pair)
    if all(left_of(places[0], places[1], c) == 0 for c in places[2:]):
        assert len(edges) == len(places) - 1
        return
    on_hull = sum(
        any(all(left_of(p, q, r) >= 0 for r in places) for q in places if q != p)
        or any(all(left_of(p, q, r) <= 0 for r in places) for q in places if q != p)
        for p in places
    )
    assert len(edges) == 3 * len(places) - 3 - on_hull
    for (a, b), (c, d) in combinations(edges, 2):
        if len({a, b, c, d}) == 4:
            a, b, c, d = (places[k] for k in (a, b, c, d))
            crosses = left_of(a, b, c) * left_of(a, b, d) < 0 and left_of(c, d, a) * left_of(c, d, b) < 0
            assert not crosses


whole = st.integers(-6, 6)
point_lists = st.lists(st.tuples(whole, whole), max_size=14)


@given(points=point_lists, flat=st.booleans(), shift=st.sampled_from([(0, 0), (5_000, -70_000), (10**9, -(10**10))]))
def test_the_triangulation_of_any_points_has_empty_circles(points, flat, shift):
    points = [(x + shift[0], y * (not flat) + shift[1]) for x, y in points]
    graph = graph_of(np.array(points).reshape(-1, 2))
    places = sorted(set(points))
    between = np.array([[points[i] == points[j] for j in range(len(points))] for i in range(len(points))], bool)
    if points:
        np.testing.assert_array_equal(graph[between], ~np.eye(len(points), dtype=bool)[between])  # of one place
    # All cells of a place have the same neighbours elsewhere.
    of = [places.index(point) for point in points]
    first = [of.index(place) for place in range(len(places))]
    for i, j in combinations(range(len(points)), 2):
        if of[i] != of[j]:
            assert graph[i, j] == graph[first[of[i]], first[of[j]]]
    if len(places) > 1:
        check_triangulation(places, edges_of(graph[np.ix_(first, first)]))


def spheres(points: np.ndarray) -> set[tuple[int, int]]:
    """Edges of all tetrahedra (triangles) whose circumscribed sphere (circle) is empty; no five (four) are on one."""
    d = points.shape[1]
    edges = set()
    for corners in combinations(range(len(points)), d + 1):
        a, rest = points[corners[0]], points[list(corners[1:])]
        centre = np.linalg.solve(2 * (rest - a), (rest**2).sum(1) - (a**2).sum())
        away = np.linalg.norm(points - centre, axis=1)
        if (np.delete(away, corners) > away[corners[0]]).all():
            edges |= set(combinations(corners, 2))
    return edges


@pytest.mark.parametrize("n_dimensions", [2, 3])
@pytest.mark.parametrize("n", [2, 3, 4, 5, 14])
def test_points_in_general_position(n, n_dimensions):
    points = np.random.default_rng(n).normal(size=(n, n_dimensions)) * 50 + 1000
    edges = edges_of(graph_of(points))
    few = n <= n_dimensions
    assert edges == (set(combinations(range(n), 2)) if few else spheres(points))
    if n_dimensions == 2 and not few:
        flat = np.column_stack([points, np.full(n, 7.0)])
        assert edges_of(graph_of(flat)) == edges  # 3-D coordinates of one height
        tilted = np.column_stack([points[:, 0] * 0.6, points[:, 1], points[:, 0] * 0.8])
        assert edges_of(graph_of(tilted)) == edges


@pytest.mark.parametrize("direction", [(1, 0), (0, 1), (0.1, 0.3), (1, 0, 0), (0.1, -0.7, 0.3)])
@pytest.mark.parametrize("scale", [1.0, 1e-200, 1e200])
def test_points_on_a_line_are_a_chain(direction, scale):
    steps = np.random.default_rng(0).permutation(30)
    points = (steps[:, None] + 3) * np.array(direction) * scale
    adata = section(points)
    spatial_neighbors(adata)
    assert edges_of(adata.obsp["spatial_connectivities"].toarray()) == {
        tuple(sorted((int(np.flatnonzero(steps == i)[0]), int(np.flatnonzero(steps == i + 1)[0])))) for i in range(29)
    }
    np.testing.assert_allclose(adata.obsp["spatial_distances"].data, np.linalg.norm(direction) * scale)


def test_rounding_does_not_bend_a_line():
    steps = np.random.default_rng(0).permutation(2000)
    for points in (
        np.column_stack([steps, np.random.default_rng(1).random(2000) * 1e-14]),
        np.column_stack([np.random.default_rng(1).random(2000) * 1e-14, steps, steps / 3]),
        steps[:, None] * np.array([np.pi, np.e, 1 / 3]),
        np.array([[0, 0, 0], [1, 1e-16, 0], [3, 0, 0], [2, 0, 0]]),
    ):
        adata = section(points)
        spatial_neighbors(adata)
        rows, columns = adata.obsp["spatial_connectivities"].nonzero()
        along = points.max(axis=1)
        places = along.argsort().argsort()
        assert len(rows) == 2 * (len(points) - 1)
        assert (abs(places[rows] - places[columns]) == 1).all()


@pytest.mark.parametrize("n_dimensions", [2, 3])
@pytest.mark.parametrize(
    ("method", "given", "plain"),
    [
        ("delaunay", {}, {}),
        ("knn", {}, {"n_neighbors": 6}),
        ("knn", {"n_neighbors": 3}, {"n_neighbors": 3}),
        ("radius", {"radius": 0.3}, {"radius": 0.3}),
    ],
)
def test_methods_by_name(method, given, plain, n_dimensions):
    points = np.random.default_rng(0).random((40, n_dimensions))
    by_name, by_argument, positional = section(points), section(points), section(points)
    spatial_neighbors(by_name, method=method, **given)
    spatial_neighbors(by_argument, **plain)
    spatial_neighbors(positional, method, **given)
    assert by_argument.obsp["spatial_connectivities"].nnz
    for adata in (by_name, positional):
        for key in ("spatial_connectivities", "spatial_distances"):
            assert (adata.obsp[key] != by_argument.obsp[key]).nnz == 0
        assert adata.uns == by_argument.uns


def test_arguments_of_another_method_raise():
    adata = section(np.random.default_rng(0).random((9, 2)))
    for message, method, options in [
        ("method='voronoi' is not one of 'delaunay', 'knn', 'radius'", "voronoi", {}),
        ("n_neighbors=3 needs method='knn', not 'delaunay'", "delaunay", {"n_neighbors": 3}),
        ("radius=0.5 needs method='radius', not 'delaunay'", "delaunay", {"radius": 0.5}),
        ("radius=0.5 needs method='radius', not 'knn'", "knn", {"radius": 0.5}),
        ("n_neighbors=3 needs method='knn', not 'radius'", "radius", {"n_neighbors": 3, "radius": 0.5}),
        ("method='radius' needs a radius=", "radius", {}),
        ("n_neighbors=0: must be an integer", "knn", {"n_neighbors": 0}),
        ("radius=0: must be a positive distance", "radius", {"radius": 0}),
    ]:
        with pytest.raises(ValueError, match=message):
            spatial_neighbors(adata, method=method, **options)
    assert not adata.obsp


@pytest.mark.parametrize("n", [0, 1, 2])
@pytest.mark.parametrize("options", [{}, {"n_neighbors": 3}, {"radius": 10.0}])
def test_few_cells(n, options):
    assert graph_of(np.arange(3.0 * n).reshape(n, 3), **options).sum() == (2 if n == 2 else 0)


def test_cells_that_nearly_share_a_place_are_not_lost():
    rng = np.random.default_rng(0)
    points = rng.random((40, 2)) * 1e6
    points = np.concatenate([points, points[:20] + rng.random((20, 2)) * 1e-9])
    graph = graph_of(points)
    assert graph.any(axis=1).all()
    assert sparse.csgraph.connected_components(graph)[0] == 1


@given(points=point_lists, k=st.integers(1, 8))
def test_the_nearest_cells(points, k):
    graph = graph_of(np.array(points, np.float64).reshape(-1, 2), n_neighbors=k)
    n = len(points)
    away = np.array([[(a - c) ** 2 + (b - d) ** 2 for c, d in points] for a, b in points]).reshape(n, n)
    last = [sorted(np.delete(away[i], i))[min(k, n - 1) - 1] for i in range(n)] if n > 1 else [0] * n
    for i, j in combinations(range(n), 2):
        must_be = away[i, j] < last[i] or away[i, j] < last[j]
        may_be = away[i, j] <= last[i] or away[i, j] <= last[j]
        assert must_be <= graph[i, j] <= may_be
    assert (graph.sum(axis=1) >= min(k, n - 1)).all()
    assert graph.sum() <= 2 * n * k


@pytest.mark.parametrize("n_dimensions", [2, 3])
@pytest.mark.parametrize("k", [1, 6, 40])
def test_the_nearest_cells_where_no_two_are_as_near(n_dimensions, k):
    points = np.random.default_rng(k).random((30, n_dimensions))
    away = np.linalg.norm(points[:, None] - points[None], axis=2)
    np.fill_diagonal(away, np.inf)
    expected = np.zeros((30, 30), bool)
    for i in range(30):
        expected[i, np.argsort(away[i])[: min(k, 29)]] = True
    np.testing.assert_array_equal(graph_of(points, n_neighbors=k), expected | expected.T)


@given(points=point_lists, radius=st.integers(1, 9), factor=st.sampled_from([1.0, 2.0**700, 2.0**-700]))
def test_cells_in_reach(points, radius, factor):
    adata = section(np.array(points, np.float64).reshape(-1, 2) * factor)
    spatial_neighbors(adata, radius=radius * factor)
    n = len(points)
    expected = [[(a - c) ** 2 + (b - d) ** 2 <= radius**2 for c, d in points] for a, b in points]
    expected = np.array(expected, bool).reshape(n, n) & ~np.eye(n, dtype=bool)
    np.testing.assert_array_equal(adata.obsp["spatial_connectivities"].toarray() == 1, expected)


@pytest.mark.parametrize("kind", ["category", "object", "int64"])
@pytest.mark.parametrize("options", [{}, {"n_neighbors": 4}, {"radius": 0.4}])
def test_sections_are_apart(kind, options):
    rng = np.random.default_rng(1)
    points = rng.random((60, 2))
    sections = pd.Series(rng.choice([10, 20, 30, 30, 30], 60)).astype(kind if kind != "object" else str).astype(kind)
    adata = section(points, section=sections.to_numpy() if kind != "category" else pd.Categorical(sections))
    spatial_neighbors(adata, section_key="section", key_added="near", **options)
    expected = np.zeros((60, 60), bool)
    for name in set(sections):
        cells = np.flatnonzero(sections == name)
        expected[np.ix_(cells, cells)] = graph_of(points[cells], **options)
    np.testing.assert_array_equal(adata.obsp["near_connectivities"].toarray() == 1, expected)
    assert set(adata.obsp) == {"near_connectivities", "near_distances"}


def test_what_cannot_be_used_raises():
    adata = section(np.random.default_rng(0).random((5, 2)), section=["a", "a", None, "b", "b"])
    adata.obsm["X_pca"] = np.zeros((5, 10))
    adata.obsm["name"] = np.full((5, 2), "x")
    with pytest.raises(ValueError, match=r"no obsm\['xy'\]; obsm has 'spatial', 'X_pca', 'name'"):
        spatial_neighbors(adata, spatial_key="xy")
    with pytest.raises(ValueError, match=r"obsm\['X_pca'\] has the shape \(5, 10\)"):
        spatial_neighbors(adata, spatial_key="X_pca")
    with pytest.raises(ValueError, match="does not hold numbers"):
        spatial_neighbors(adata, spatial_key="name")
    with pytest.raises(ValueError, match=r"no obs\['slide'\]; obs has 'section'"):
        spatial_neighbors(adata, section_key="slide")
    with pytest.raises(ValueError, match=r"1 of 5 cells have no value in obs\['section'\]"):
        spatial_neighbors(adata, section_key="section")
    with pytest.raises(ValueError, match="pass one"):
        spatial_neighbors(adata, n_neighbors=3, radius=1.0)
    for n_neighbors in (0, -1, 2.5):
        with pytest.raises(ValueError, match="integer of at least 1"):
            spatial_neighbors(adata, n_neighbors=n_neighbors)
    for radius in (0, -1.0, np.inf, np.nan):
        with pytest.raises(ValueError, match="positive distance"):
            spatial_neighbors(adata, radius=radius)
    adata.obsm["spatial"][3, 1] = np.nan
    adata.obsm["spatial"][4, 0] = np.inf
    with pytest.raises(ValueError, match="2 of 5 cells have no finite coordinates .*such as cell3"):
        spatial_neighbors(adata)
    assert not adata.obsp


@pytest.mark.parametrize("options", [{}, {"n_neighbors": 4}, {"radius": 0.4}])
def test_a_heap_of_cells_raises(monkeypatch, options):
    monkeypatch.setattr(spatial_graph, "_MOST_CELLS_A_PLACE", 5)
    assert graph_of([[0, 0]] * 5, **options).any()
    with pytest.raises(ValueError, match="6 cells are at one place"):
        spatial_neighbors(section([[0, 0]] * 6 + [[1, 1]]), **options)


def test_it_is_written_as_squidpy_writes_it(tmp_path):
    adata = section(np.random.default_rng(0).random((50, 2)))
    adata.obsm["spatial"] = pd.DataFrame(adata.obsm["spatial"], index=adata.obs_names, columns=["x", "y"])
    spatial_neighbors(adata, n_neighbors=6)
    adata.write_h5ad(tmp_path / "s.h5ad")
    back = read_h5ad(tmp_path / "s.h5ad")
    for key in ("spatial_connectivities", "spatial_distances"):
        assert (back.obsp[key] != adata.obsp[key]).nnz == 0
    settings = back.uns["spatial_neighbors"]
    assert back.obsp[settings["connectivities_key"]].nnz == back.obsp[settings["distances_key"]].nnz > 0
    assert settings["params"] == {"n_neighbors": 6, "spatial_key": "spatial"}


def test_starmap(shared_data):
    adata = read_h5ad(shared_data / "starmap_cortex.h5ad")
    before = adata.obsm["spatial"].copy()
    spatial_neighbors(adata, section_key="section")
    np.testing.assert_array_equal(adata.obsm["spatial"], before)
    edges = set()
    for triangle in Delaunay(before).simplices.tolist():
        edges |= {tuple(sorted(pair)) for pair in combinations(triangle, 2)}
    assert edges_of(adata.obsp["spatial_connectivities"].toarray()) == edges
    assert 5.5 < adata.obsp["spatial_connectivities"].nnz / adata.n_obs < 6
