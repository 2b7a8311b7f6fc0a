"""Neighbourhoods of cells: neighbours, types and expression against a loop over all pairs of cells."""

import logging
import pickle
from fractions import Fraction

import numpy as np
import pandas as pd
import pytest
import torch
from anndata import AnnData, read_h5ad
from hypothesis import given
from hypothesis import strategies as st
from scipy import sparse, stats
from torch.utils.data import DataLoader, Subset

from stformer_hf import CellStore
from stformer_hf.models.gene_bert.randomness import uniforms
from stformer_hf.space.center_mask_sampler import CenterMaskSampler, NeighborhoodMetadata
from stformer_hf.space.neighbor_index import NeighborIndex
from stformer_hf.space.neighborhood_collator import collate

LOGGER = "stformer_hf.space.center_mask_sampler"


def make_section(n_cells=200, n_genes=12, n_sections=3, side=30, seed=0) -> tuple[pd.DataFrame, AnnData]:
    """Cells on a grid of quarters, some at one place; rows of the two tables in different orders."""
    rng = np.random.default_rng(seed)
    names = np.array([f"cell{i}" for i in range(n_cells)])
    metadata = pd.DataFrame(
        {
            "cell_label": names,
            "cell_type": rng.integers(0, 5, n_cells),
            "x": rng.integers(0, 4 * side, n_cells) / 4,
            "y": rng.integers(0, 4 * side, n_cells) / 4,
            "z": rng.integers(0, 12, n_cells) / 4,
            "brain_section_label": rng.choice([f"s{i}" for i in range(n_sections)], n_cells),
        }
    )
    order = rng.permutation(n_cells)
    counts = rng.poisson(0.7, (n_cells, n_genes)).astype(np.float32)
    counts[5] = 0
    adata = AnnData(sparse.csr_matrix(counts[order]), obs=pd.DataFrame(index=names[order]))
    adata.var_names = [f"ENSG{i:011d}" for i in range(n_genes)]
    return metadata, adata


def keys_of(names) -> np.ndarray:
    """What decides between cells: hashes of their names."""
    return pd.util.hash_array(np.array(list(map(str, names)), object), categorize=False)


def plain_neighbors(points, sections, cell, sides=None, disc=False, k=None, among=None, keys=None) -> list[int]:
    """Look at every cell. `points` are tuples of exact numbers."""
    found = []
    for other in range(len(points)) if among is None else sorted(set(among)):
        apart = [abs(a - b) for a, b in zip(points[cell], points[other], strict=True)]
        if other == cell or sections[other] != sections[cell]:
            continue
        away = sum(d * d for d in apart)
        if sides is not None:
            if disc and 4 * away > sides[0] * sides[0]:
                continue
            if not disc and any(2 * d > side for d, side in zip(apart, sides, strict=True)):
                continue
        found.append((away, other if keys is None else keys[other], other))
    return sorted(other for *_, other in sorted(found)[:k])


def check_neighbors(sampler, points, sections, **options) -> None:
    indptr, found = sampler.neighbors(range(len(sampler)))
    assert len(indptr) == len(sampler) + 1 and indptr.dtype == found.dtype == np.int64
    for item, cell in enumerate(sampler.indices.tolist()):
        expected = plain_neighbors(points, sections, cell, **options)
        assert found[indptr[item] : indptr[item + 1]].tolist() == expected
        assert sampler.neighbors([item])[1].tolist() == expected


def check_items(sampler, metadata, adata, cells=None) -> None:
    """Every item holds the types and the expression of its neighbours, by name."""
    rows = pd.Series(np.arange(adata.n_obs), index=adata.obs_names)
    expression = adata.X.toarray() if sparse.issparse(adata.X) else np.asarray(adata.X)
    names, types = metadata["cell_label"].astype(str).tolist(), metadata["cell_type"].tolist()
    items = range(len(sampler)) if cells is None else cells
    batch = sampler.__getitems__(items)
    assert len(batch) == len(items)
    indptr, found = sampler.neighbors(items)
    for i, item in enumerate(items):
        neighbors, cell = found[indptr[i] : indptr[i + 1]].tolist(), int(sampler.indices[item])
        for one in (batch[i], sampler[item]):
            assert isinstance(one, NeighborhoodMetadata)
            assert one.num_cells_obs == len(neighbors)
            assert one.observed_expression.shape == (len(neighbors), adata.n_vars)
            assert one.masked_expression.shape == (1, adata.n_vars)
            assert one.observed_expression.dtype == one.masked_expression.dtype == np.float32
            assert one.observed_cell_type.dtype == one.masked_cell_type.dtype == np.int64
            np.testing.assert_array_equal(one.masked_expression[0], expression[rows[names[cell]]])
            for row, neighbor in zip(one.observed_expression, neighbors, strict=True):
                np.testing.assert_array_equal(row, expression[rows[names[neighbor]]])
            assert one.observed_cell_type.tolist() == [types[neighbor] for neighbor in neighbors]
            assert one.masked_cell_type.tolist() == [types[cell]]


def as_table(points, sections) -> tuple[pd.DataFrame, AnnData]:
    n = len(points)
    names = [str(i) for i in range(n)]
    metadata = pd.DataFrame({"cell_label": names, "cell_type": np.arange(n) % 3, "brain_section_label": sections})
    for axis, values in zip("xyz", zip(*points, strict=True), strict=False):
        metadata[axis] = np.array(values, np.float64)
    return metadata, AnnData(np.arange(n, dtype=np.float32)[:, None], obs=pd.DataFrame(index=pd.Index(names)))


# ---------------------------------------------------------------------- which cells are neighbours

quarters = st.integers(-6, 6)


@given(data=st.data(), n_axes=st.sampled_from([2, 3]), shape=st.sampled_from(["box", "disc"]))
def test_neighbours_of_any_points(data, n_axes, shape):
    cells = data.draw(st.lists(st.tuples(*[quarters] * n_axes, st.sampled_from("abc")), min_size=1, max_size=25))
    sides = data.draw(st.tuples(*[st.integers(1, 14)] * n_axes))
    sides = sides[:1] * n_axes if shape == "disc" else sides
    k = data.draw(st.none() | st.integers(1, 6))
    bounded = k is None or data.draw(st.booleans())
    indices = data.draw(st.none() | st.lists(st.integers(0, len(cells) - 1), max_size=12))
    own = data.draw(st.booleans())
    shift = data.draw(st.sampled_from([0, 40_000, 4 * 10**9]))
    scale = data.draw(st.sampled_from([0.25, 2.0**-40, 2.0**30]))  # borders are exact at every scale
    points = [tuple(value + shift for value in cell[:-1]) for cell in cells]
    sections = [cell[-1] for cell in cells]
    metadata, adata = as_table([tuple(value * scale for value in point) for point in points], sections)
    sampler = CenterMaskSampler(
        metadata,
        adata,
        [side * scale for side in sides] if bounded else None,
        indices=indices,
        shape=shape,
        k_nearest=k,
        neighbors_from="indices" if own else "all",
        z="z" if n_axes == 3 else None,
    )
    assert sampler.indices.tolist() == (list(range(len(cells))) if indices is None else indices)
    check_neighbors(
        sampler,
        points,
        sections,
        sides=sides if bounded else None,
        disc=shape == "disc",
        k=k,
        among=indices if own else None,
        keys=keys_of(metadata["cell_label"]),
    )


@given(seed=st.integers(0, 10**6), n_axes=st.sampled_from([2, 3]), scale=st.sampled_from([1e-7, 1.0, 1e8]))
def test_neighbours_of_points_anywhere(seed, n_axes, scale):
    rng = np.random.default_rng(seed)
    points, sides = rng.random((80, n_axes)) * scale, rng.random(n_axes) * scale * 0.7
    points[40:60] = points[:20]
    points[60:70] = points[0] + sides / 2 * rng.choice([-1, 1], (10, n_axes))  # on the corners, but for rounding
    sections = rng.integers(0, 2, 80).tolist()
    sampler = CenterMaskSampler(*as_table(points.tolist(), sections), sides, z="z" if n_axes == 3 else None)
    inside = (np.abs(points[:, None] - points[None]) <= sides / 2).all(axis=2)
    inside &= (np.array(sections)[:, None] == sections) & ~np.eye(80, dtype=bool)
    np.testing.assert_array_equal(inside, inside.T)
    indptr, found = sampler.neighbors(range(80))
    assert found.tolist() == np.nonzero(inside)[1].tolist()
    assert indptr.tolist() == [0, *np.cumsum(inside.sum(axis=1))]


def test_borders_are_inside():
    points = [(0, 0), (4.5, 0), (-4.5, 0), (4.5, 2.5), (4.5 + 1e-9, 0), (0, -2.5), (0, 2.5000001), (0, 0)]
    metadata, adata = as_table(points, ["a"] * 8)
    assert CenterMaskSampler(metadata, adata, (9, 5)).neighbors([0])[1].tolist() == [1, 2, 3, 5, 7]
    assert CenterMaskSampler(metadata, adata, 9, shape="disc").neighbors([0])[1].tolist() == [1, 2, 5, 6, 7]


def test_a_fraction_of_a_unit_is_a_size():
    points = [(0.0, 0), (0.45, 0.45), (0.46, 0), (-0.3, 0.1), (0, -0.5)]
    metadata, adata = as_table(points, ["a"] * 5)
    sampler = CenterMaskSampler(metadata, adata, (0.9, 0.9))
    assert sampler.neighbors([0])[1].tolist() == [1, 3]
    with pytest.raises(ValueError, match="0.9.* is truncated to 0 by discretize=True"):
        CenterMaskSampler(metadata, adata, (0.9, 0.9), discretize=True)


def test_discretize_rounds_the_borders():
    metadata, adata = make_section(300, n_sections=2, side=12)
    sampler = CenterMaskSampler(metadata, adata, (5.7, 4.2), discretize=True)
    points, sections = metadata[["x", "y"]].to_numpy(), metadata["brain_section_label"].to_numpy()
    differs = 0
    for item in range(300):
        low, high = np.round(points[item] - [2.5, 2]), np.round(points[item] + [2.5, 2])
        expected = [
            j
            for j in range(300)
            if j != item and sections[j] == sections[item] and (low <= points[j]).all() and (points[j] <= high).all()
        ]
        assert sampler.neighbors([item])[1].tolist() == expected
        differs += expected != plain_neighbors(points.tolist(), sections, item, sides=(5.7, 4.2))
    assert differs > 100


def test_which_of_equally_near_ones_are_the_nearest_depends_on_their_names_alone():
    points = [(0, 0), (0, 2), (2, 0), (-2, 0), (1, 0), (0, 0)]
    metadata, adata = as_table(points, ["a"] * 6)
    by_key = [5, 4, *(np.array([1, 2, 3])[np.argsort(keys_of("123"))])]
    for k in (1, 2, 3, 4, 9):
        for rows in (np.arange(6), np.array([3, 1, 0, 5, 2, 4])):
            sampler = CenterMaskSampler(metadata.iloc[rows], adata, None, k_nearest=k)
            assert sorted(rows[sampler.neighbors([int(np.flatnonzero(rows == 0)[0])])[1]]) == sorted(by_key[:k])
    assert CenterMaskSampler(metadata, adata, 3.0, k_nearest=4).neighbors([0])[1].tolist() == [4, 5]


@pytest.mark.parametrize("name", ["starmap_cortex", "xenium_breast", "visium_breast"])
@pytest.mark.parametrize("shape", ["box", "disc"])
def test_real_sections(shared_data, name, shape, tmp_path):
    adata = read_h5ad(shared_data / f"{name}.h5ad")
    points = adata.obsm["spatial"].astype(np.float64)
    rng = np.random.default_rng(0)
    # So large that a box holds about 20 cells.
    side = (20 / len(points) * np.ptp(points, axis=0).prod()) ** 0.5
    cell_type_key = "cell_type" if "cell_type" in adata.obs else None
    sampler = CenterMaskSampler.from_anndata(
        adata, side, shape=shape, section_key="section", cell_type_key=cell_type_key
    )
    cells = rng.choice(len(points), 200, replace=False)
    apart = points[cells][:, None] - points[None]
    inside = (apart**2).sum(axis=2) <= (side / 2) ** 2 if shape == "disc" else (np.abs(apart) <= side / 2).all(axis=2)
    inside[np.arange(200), cells] = False
    indptr, found = sampler.neighbors(cells)
    assert found.tolist() == np.nonzero(inside)[1].tolist()
    assert 5 < len(found) / 200 < 60
    types = adata.obs["cell_type"].cat.codes if cell_type_key else np.zeros(len(points), int)
    metadata = pd.DataFrame({"cell_label": adata.obs_names, "cell_type": np.asarray(types)})
    check_items(sampler, metadata, adata, cells[:30].tolist())
    store = CellStore.build(tmp_path / "store", adata, report=False)
    metadata = metadata.assign(x=points[:, 0], y=points[:, 1]).sample(frac=1, random_state=0)
    shuffled = CenterMaskSampler(metadata, store, side, tissue_section_colname=None, shape=shape)
    if not (adata.X.sum(axis=0) == 0).any():
        check_items(shuffled, metadata, adata, list(range(30)))


# ---------------------------------------------------------------------- where expression comes from


@pytest.mark.parametrize(
    "kind", ["csr", "csc", "dense", "int", "view", "backed", "backed csc", "backed view", "store"]
)
def test_expression_is_found_by_name(kind, tmp_path):
    metadata, adata = make_section()
    source = adata.copy()
    if kind == "csc" or kind == "backed csc":
        source.X = sparse.csc_matrix(source.X)
    elif kind == "dense":
        source.X = source.X.toarray()
    elif kind == "int":
        source.X = source.X.astype(np.int64)
    elif kind == "view":
        source = source[::-1]
    if kind.startswith("backed"):
        source.write_h5ad(tmp_path / "cells.h5ad")
        source = read_h5ad(tmp_path / "cells.h5ad", backed="r")
        source = source[np.arange(len(source))[::-1]] if kind == "backed view" else source
    elif kind == "store":
        source = CellStore.build(tmp_path / "store", source, report=False).select(np.arange(200)[::-1])
    sampler = CenterMaskSampler(metadata, source, (6.5, 8))
    assert sampler.n_genes == 12 and sampler.n_cell_types == 5
    check_items(sampler, metadata, adata)
    check_items(pickle.loads(pickle.dumps(sampler)), metadata, adata, [3, 100, 3, 5])


def test_the_expression_stays_sparse():
    metadata, adata = make_section()
    assert sparse.issparse(CenterMaskSampler(metadata, adata, 9).__getitems__([1, 2]).expression)


def test_nothing_done_to_an_item_changes_the_data():
    metadata, adata = make_section()
    for source in (adata, AnnData(adata.X.toarray(), obs=adata.obs)):
        before = adata.X.toarray()
        sampler = CenterMaskSampler(metadata, source, None, k_nearest=3)
        item = sampler[0]
        for values in item[:4]:
            values[:] = 99
        collate(sampler.__getitems__([0, 1]))["observed_expression"].fill_(99)
        assert np.array_equal(source.X.toarray() if sparse.issparse(source.X) else source.X, before)
        assert (sampler[0].observed_expression != 99).all() and (sampler[0].masked_cell_type != 99).all()


def test_numbers_as_names():
    metadata, adata = make_section(50)
    renamed = adata.copy()
    renamed.obs_names = [name.removeprefix("cell") for name in adata.obs_names]
    numbered = metadata.assign(cell_label=np.arange(50))
    check_items(CenterMaskSampler(numbered, renamed, 9), numbered, renamed)


def test_polars():
    polars = pytest.importorskip("polars", reason="polars is not installed")
    metadata, adata = make_section()
    table = polars.DataFrame(metadata.to_dict("list"))
    sampler = CenterMaskSampler(table, adata, (6.5, 8))
    check_items(sampler, metadata, adata)
    table = table.with_columns(polars.col("brain_section_label").cast(polars.Categorical))
    np.testing.assert_array_equal(
        CenterMaskSampler(table, adata, (6.5, 8)).neighbors(range(200))[1], sampler.neighbors(range(200))[1]
    )
    holes = table.with_columns(polars.when(polars.col("x") > 15).then(polars.col("x")))
    with pytest.raises(ValueError, match="cells have no finite coordinates in 'x', 'y'"):
        CenterMaskSampler(holes, adata, 9)


@pytest.mark.parametrize("kind", ["category", "Int64", "uint8", "object", "category of str"])
def test_types_of_columns(kind):
    metadata, adata = make_section()
    expected = CenterMaskSampler(metadata, adata, 9)
    other = metadata.copy()
    if kind == "category of str":
        other["brain_section_label"] = other["brain_section_label"].astype("category")
        other["cell_label"] = other["cell_label"].astype("category")
    else:
        other["cell_type"] = other["cell_type"].astype(kind)
        other["x"] = other["x"].astype("Float64")
    found = CenterMaskSampler(other.set_index(np.arange(200)[::-1]), adata, 9)  # the index plays no part
    for one, two in zip(found.__getitems__(range(200)), expected.__getitems__(range(200)), strict=True):
        for ours, theirs in zip(one, two, strict=True):
            np.testing.assert_array_equal(ours, theirs)


# ---------------------------------------------------------------------- which items there are


def test_it_is_a_sequence():
    metadata, adata = make_section(20)
    sampler = CenterMaskSampler(metadata, adata, 9, indices=[4, -1, 4])
    assert len(sampler) == 3 and sampler.indices.tolist() == [4, 19, 4]
    assert [int(item.masked_cell_type[0]) for item in sampler] == metadata["cell_type"][[4, 19, 4]].tolist()
    assert sampler[-1].masked_cell_type == sampler[2].masked_cell_type
    for wrong in (3, -4):
        with pytest.raises(IndexError, match=f"Item {wrong} is outside the dataset of 3 cells"):
            sampler[wrong]
    with pytest.raises(TypeError):
        sampler["cell4"]
    assert "3 of 20 cells, 12 genes" in repr(sampler)
    mask = np.arange(20) % 3 == 0
    assert CenterMaskSampler(metadata, adata, 9, indices=mask).indices.tolist() == np.flatnonzero(mask).tolist()
    assert len(CenterMaskSampler(metadata, adata, 9, indices=[])) == 0
    batch = sampler.__getitems__([])
    assert len(batch) == 0 and list(batch) == []


def test_no_cells():
    metadata, adata = make_section(20)
    sampler = CenterMaskSampler(metadata[:0], adata, 9)
    assert len(sampler) == 0 and len(sampler.__getitems__([])) == 0


def test_held_out_cells_are_seen_only_where_asked():
    metadata, adata = make_section()
    train = np.arange(0, 200, 2)
    everything = CenterMaskSampler(metadata, adata, 12, indices=train).neighbors(range(100))[1]
    own = CenterMaskSampler(metadata, adata, 12, indices=train, neighbors_from="indices").neighbors(range(100))[1]
    assert (everything % 2 == 1).any() and (own % 2 == 0).all()
    assert own.tolist() == everything[everything % 2 == 0].tolist()


def test_lonely_cells_can_be_left_out(caplog):
    metadata, adata = make_section()
    whole = CenterMaskSampler(metadata, adata, 4)
    sizes = np.diff(whole.neighbors(range(200))[0])
    with caplog.at_level(logging.INFO, LOGGER):
        sampler = CenterMaskSampler(metadata, adata, 4, min_neighbors=2, indices=np.arange(199, -1, -1))
    assert sampler.indices.tolist() == np.flatnonzero(sizes >= 2)[::-1].tolist()
    assert 0 < len(sampler) < 200
    assert f"{200 - len(sampler)} of 200 cells have fewer than 2 neighbours" in caplog.text
    with pytest.raises(ValueError, match="None of 200 cells has 100 neighbours"):
        CenterMaskSampler(metadata, adata, 4, min_neighbors=100)


# ---------------------------------------------------------------------- random subsets


def test_a_subset_is_a_function_of_seed_epoch_and_cell():
    metadata, adata = make_section()
    whole = CenterMaskSampler(metadata, adata, 20)
    sampler = CenterMaskSampler(metadata, adata, 20, max_num_cells=7, seed=3)
    indptr, found = sampler.neighbors(range(200))
    sizes = np.diff(whole.neighbors(range(200))[0])
    assert np.diff(indptr).tolist() == np.minimum(sizes, 7).tolist()
    assert (sizes > 7).any() and (sizes < 7).any()
    by_cell = {cell: found[indptr[cell] : indptr[cell + 1]].tolist() for cell in range(200)}
    for cell, neighbors in by_cell.items():
        box = whole.neighbors([cell])[1].tolist()
        assert set(neighbors) <= set(box) and neighbors == sorted(neighbors)
        keys = keys_of(metadata["cell_label"])
        draws = uniforms(3, 0, 0x5AB, keys[[cell]], keys[box], np.zeros(len(box), int))
        assert neighbors == sorted(np.array(box)[np.argsort(draws)[:7]].tolist())
    some = CenterMaskSampler(metadata, adata, 20, max_num_cells=7, seed=3, indices=[150, 20, 3])
    assert [some.neighbors([item])[1].tolist() for item in range(3)] == [by_cell[cell] for cell in (150, 20, 3)]
    sampler.set_epoch(1)
    assert sampler.epoch == 1 and sampler.neighbors(range(200))[1].tolist() != found.tolist()
    sampler.set_epoch(0)
    assert sampler.neighbors(range(200))[1].tolist() == found.tolist()
    other = CenterMaskSampler(metadata, adata, 20, max_num_cells=7, seed=4).neighbors(range(200))[1]
    assert other.tolist() != found.tolist()
    check_items(sampler, metadata, adata)


def test_subsets_are_uniform():
    metadata, adata = as_table([(i, 0) for i in range(12)], ["a"] * 12)
    sampler = CenterMaskSampler(metadata, adata, 100, max_num_cells=3)
    seen = np.zeros((12, 12))
    for epoch in range(600):
        sampler.set_epoch(epoch)
        indptr, found = sampler.neighbors(range(12))
        seen[np.repeat(np.arange(12), np.diff(indptr)), found] += 1
    assert (seen.sum(axis=1) == 1800).all() and not seen.diagonal().any()
    for row, counts in enumerate(seen):
        assert stats.chisquare(np.delete(counts, row)).pvalue > 1e-4
    assert (CenterMaskSampler(metadata, adata, 100, max_num_cells=0)[3].observed_expression.shape) == (0, 1)


# ---------------------------------------------------------------------- loaders


def same(one: dict, two: dict) -> None:
    assert one.keys() == two.keys()
    for name in one:
        if isinstance(one[name], torch.Tensor):
            assert torch.equal(one[name], two[name]), name
        else:
            assert one[name] == two[name]


def loader_of(dataset, **options) -> DataLoader:
    order = np.random.default_rng(1).permutation(len(dataset)).tolist()
    return DataLoader(dataset, batch_size=16, sampler=order, collate_fn=collate, **options)


@pytest.mark.parametrize(("context", "n_workers"), [("fork", 2), pytest.param("spawn", 1, marks=pytest.mark.slow)])
def test_workers_give_the_same_batches(context, n_workers, tmp_path):
    metadata, adata = make_section()
    adata.write_h5ad(tmp_path / "cells.h5ad")
    backed = read_h5ad(tmp_path / "cells.h5ad", backed="r")
    sampler = CenterMaskSampler(metadata, backed, 20, max_num_cells=5)
    in_memory = CenterMaskSampler(metadata, adata, 20, max_num_cells=5)
    loader = loader_of(sampler, num_workers=n_workers, multiprocessing_context=context, persistent_workers=True)
    plain = loader_of(in_memory)
    before = None
    for epoch in range(2):
        sampler.set_epoch(epoch)  # workers that outlive an epoch see the next one
        in_memory.set_epoch(epoch)
        batches = list(loader)
        for one, two in zip(batches, plain, strict=True):
            same(one, two)
        assert before is None or not torch.equal(batches[0]["observed_expression"], before)
        before = batches[0]["observed_expression"].clone()


def test_a_part_of_a_dataset():
    metadata, adata = make_section()
    sampler = CenterMaskSampler(metadata, adata, 9)
    part = next(iter(DataLoader(Subset(sampler, [5, 9, 2]), batch_size=3, collate_fn=collate)))
    same(part, collate([sampler[5], sampler[9], sampler[2]]))


# ---------------------------------------------------------------------- from an AnnData alone


def test_from_anndata():
    metadata, adata = make_section()
    adata = adata[metadata["cell_label"]].copy()
    adata.obsm["spatial"] = metadata[["x", "y", "z"]].to_numpy()
    names = np.array(["Ex", "In", "As", "Mi", "OPC"])
    adata.obs["kind"] = pd.Categorical(names[metadata["cell_type"]], categories=names)
    adata.obs["slide"] = metadata["brain_section_label"].to_numpy()
    sampler = CenterMaskSampler.from_anndata(
        adata, (9, 8, 1.5), section_key="slide", cell_type_key="kind", indices=[7, 3], max_num_cells=2, seed=5
    )
    expected = CenterMaskSampler(metadata, adata, (9, 8, 1.5), z="z", indices=[7, 3], max_num_cells=2, seed=5)
    assert sampler.cell_types == names.tolist()
    check_items(sampler, metadata, adata)
    assert sampler.neighbors([0, 1])[1].tolist() == expected.neighbors([0, 1])[1].tolist()
    adata.obs["kind"] = adata.obs["kind"].astype(str)
    assert CenterMaskSampler.from_anndata(adata, 9, cell_type_key="kind").cell_types == sorted(names)
    alone = CenterMaskSampler.from_anndata(adata, None, k_nearest=2)
    assert alone.n_cell_types == 1 and alone[0].observed_cell_type.tolist() == [0, 0]
    with pytest.raises(ValueError, match=r"no obsm\['xy'\]; obsm has 'spatial'"):
        CenterMaskSampler.from_anndata(adata, 9, spatial_key="xy")
    with pytest.raises(ValueError, match=r"no obs\['section'\]; obs has 'kind', 'slide'"):
        CenterMaskSampler.from_anndata(adata, 9, section_key="section")
    adata.obs["kind"] = adata.obs["kind"].where(np.arange(200) > 2).astype("category")
    with pytest.raises(
        ValueError, match=r"3 of 200 cells have no type in obs\['kind'\]: remove them, or fill it in, .*'unknown'"
    ):
        CenterMaskSampler.from_anndata(adata, 9, cell_type_key="kind")
    adata.obsm["spatial"] = np.zeros((200, 5))
    with pytest.raises(ValueError, match=r"has the shape \(200, 5\)"):
        CenterMaskSampler.from_anndata(adata, 9)


# ---------------------------------------------------------------------- normalization


def test_log1p_of_counts():
    metadata, adata = make_section()
    for X in (adata.X, adata.X.toarray(), adata.X.astype(np.uint16)):
        item = CenterMaskSampler(metadata, AnnData(X, obs=adata.obs), 20, normalize="log1p")[0]
        plain = CenterMaskSampler(metadata, adata, 20)[0]
        np.testing.assert_allclose(item.observed_expression, np.log1p(plain.observed_expression.astype(float)), 1e-6)
        np.testing.assert_allclose(item.masked_expression, np.log1p(plain.masked_expression.astype(float)), 1e-6)


@pytest.mark.parametrize("value", [0.25, -3.0])
@pytest.mark.parametrize("as_sparse", [True, False])
def test_normalized_data_are_not_normalized_again(value, as_sparse):
    metadata, adata = make_section()
    X = adata.X.toarray()
    X[17, 3] = value
    adata.X = sparse.csr_matrix(X) if as_sparse else X
    with pytest.raises(ValueError, match=f"takes counts, but X holds {value:g}"):
        CenterMaskSampler(metadata, adata, 9, normalize="log1p")
    CenterMaskSampler(metadata, adata, 9)


def test_what_was_not_looked_at_is_checked_when_it_is_read():
    metadata, adata = make_section(3000)
    X = adata.X.toarray()
    cell = int(np.flatnonzero(adata.obs_names == "cell7")[0])
    for value, normalize, message in [
        (0.5, "log1p", "takes counts, but X holds 0.5"),
        (np.nan, None, "1 NaN or infinite values"),
        (-np.inf, None, "1 NaN or infinite values"),
    ]:
        X[cell, 3] = value
        sampler = CenterMaskSampler(metadata, AnnData(X, obs=adata.obs), 3, normalize=normalize)
        sampler[8]
        with pytest.raises(ValueError, match=message):
            sampler[7]


def test_huge_values_are_values():
    metadata, adata = make_section(30)
    adata.X = np.full(adata.shape, 3e38, np.float32)
    assert CenterMaskSampler(metadata, adata, 9)[0].masked_expression.max() == np.float32(3e38)


# ---------------------------------------------------------------------- what cannot be right


def test_units_that_leave_cells_alone_are_told(caplog):
    metadata, adata = make_section(400, n_sections=1)
    CenterMaskSampler(metadata, adata, (5, 5))
    assert not caplog.records
    wrong = metadata.assign(x=metadata["x"] * 1000 + np.arange(400), y=metadata["y"] * 1000)
    CenterMaskSampler(wrong, adata, (5, 5))
    assert "of the checked cells have no neighbour with patch_size=(5, 5); the nearest cell is" in caplog.text
    assert len(caplog.records) == 1


def test_units_that_put_all_cells_into_a_box_are_told(caplog):
    metadata, adata = make_section(400, n_sections=2)
    CenterMaskSampler(metadata.assign(x=metadata["x"] / 1000, y=metadata["y"] / 1000), adata, (17, 17))
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "hold nearly all cells of their section" in record.getMessage()


def test_units_of_real_data(shared_data, caplog):
    adata = read_h5ad(shared_data / "xenium_breast.h5ad")
    CenterMaskSampler.from_anndata(adata, 50)
    assert not caplog.records
    CenterMaskSampler.from_anndata(adata, 0.05)
    assert "have no neighbour" in caplog.text
    caplog.clear()
    CenterMaskSampler.from_anndata(adata, 50_000)
    assert "nearly all cells" in caplog.text


def test_tables_that_do_not_fit():
    metadata, adata = make_section()

    def raises(message, error=ValueError, of=metadata, source=adata, size=9, **options):
        with pytest.raises(error, match=message):
            CenterMaskSampler(of, source, size, **options)

    raises(
        "no column 'brain_section_label' of tissue sections.*None if all",
        of=metadata.drop(columns="brain_section_label"),
    )
    raises("no column 'x'; it has 'cell_label', 'cell_type'", of=metadata.drop(columns="x"))
    raises("no column 'depth'", z="depth")
    raises("no column 'name'", cell_id_colname="name")
    raises("no column 'class'", cell_type_colname="class")
    raises(
        "2 of 200 cells of metadata have no expression, such as 'a0'",
        of=metadata.replace({"cell0": "a0", "cell9": "b"}),
    )
    raises("200 of 200 cells .* expression has names such as", of=metadata.assign(cell_label=np.arange(200)))
    raises("'cell0' occurs twice in the column 'cell_label'", of=metadata.replace({"cell9": "cell0"}))
    twice = adata.copy()
    twice.obs_names = twice.obs_names.where(twice.obs_names != "cell9", "cell0")
    raises("'cell0' is the name of two rows", source=twice, of=metadata.drop(index=9))
    unnamed = metadata.drop(index=[0, 9]).reset_index(drop=True)
    check_items(CenterMaskSampler(unnamed, twice, 9), unnamed, adata)  # nobody asks for these
    for wrong in (np.nan, np.inf):
        raises(
            "1 of 200 cells have no finite coordinates in 'x', 'y', such as cell4",
            of=metadata.assign(y=metadata["y"].where(metadata.index != 4, wrong)),
        )
    raises("do not hold numbers", of=metadata.assign(x="left"))
    raises(
        "1 of 200 cells have no section .*such as cell4",
        of=metadata.assign(brain_section_label=metadata["brain_section_label"].where(metadata.index != 4)),
    )
    raises("'cell_type' holds values of type object; .*prepare_metadata", of=metadata.assign(cell_type="Ex"))
    raises(
        "type float64, some missing", of=metadata.assign(cell_type=metadata["cell_type"].where(metadata.index != 4))
    )
    raises("holds -1; cell types must be integers from 0", of=metadata.assign(cell_type=metadata["cell_type"] - 1))
    raises(
        "There is no X .found: counts",
        source=AnnData(None, obs=adata.obs, layers={"counts": adata.X}, var=adata.var),
    )
    raises("is read from an AnnData or a CellStore, got DataFrame", TypeError, source=adata.to_df())


@pytest.mark.parametrize(
    ("message", "options"),
    [
        ("sides must be positive", {"patch_size": 0}),
        ("sides must be positive", {"patch_size": (9, -1)}),
        ("sides must be positive", {"patch_size": (9, np.nan)}),
        ("2-D coordinates: pass one number, or 2", {"patch_size": (9, 9, 9)}),
        ("3-D coordinates: pass one number, or 3", {"patch_size": (9, 9), "z": "z"}),
        ("a disc has one diameter", {"patch_size": (9, 8), "shape": "disc"}),
        ("'box' or 'disc'", {"shape": "hexagon"}),
        ("Pass patch_size, or k_nearest", {"patch_size": None}),
        ("k_nearest=0: must be an integer", {"k_nearest": 0}),
        ("needs shape='box'", {"shape": "disc", "discretize": True}),
        ("max_num_cells=-1: must be an integer", {"max_num_cells": -1}),
        ("neighbors_from='train'", {"neighbors_from": "train"}),
        ("normalize='log2'", {"normalize": "log2"}),
    ],
)
def test_options_that_do_not_fit(message, options):
    with pytest.raises(ValueError, match=message):
        CenterMaskSampler(*make_section(20), **{"patch_size": 9, **options})


def test_indices_that_do_not_fit():
    metadata, adata = make_section(20)
    for message, indices in [
        ("Row 20 is outside the metadata of 20 cells", [0, 20]),
        ("mask has 3 values, but the metadata has 20 cells", np.ones(3, bool)),
        ("must be integers, got float64", [0.5]),
        (r"shape \(1, 2\)", [[0, 1]]),
    ]:
        with pytest.raises(IndexError, match=message):
            CenterMaskSampler(metadata, adata, 9, indices=indices)


def test_a_mask_in_another_order_than_metadata_is_refused():
    metadata, adata = make_section(20)
    metadata.index = [f"row{i}" for i in range(20)]
    mask = pd.Series(np.arange(20) < 5, metadata.index)
    for fits in (mask, mask.reset_index(drop=True), mask.to_numpy()):
        np.testing.assert_array_equal(CenterMaskSampler(metadata, adata, 9, indices=fits).indices, range(5))
    with pytest.raises(IndexError, match=r"another index than metadata: pass mask.loc\[metadata.index\]"):
        CenterMaskSampler(metadata, adata, 9, indices=mask[::-1])


@given(data=st.data(), exponent=st.sampled_from([-1060, -700, -565, 0, 520, 700, 1015]))
def test_neighbours_at_scales_whose_squares_are_no_numbers(data, exponent):
    """Of exact numbers, so that there are ties and borders; 2.0**±700 is about 1e±211."""
    cells = data.draw(st.lists(st.tuples(quarters, quarters), min_size=1, max_size=20))
    side = data.draw(st.none() | st.integers(1, 14))
    k = data.draw(st.integers(1, 6)) if side is None else data.draw(st.none() | st.integers(1, 6))
    disc = side is not None and data.draw(st.booleans())
    sections = data.draw(st.lists(st.integers(0, 1), min_size=len(cells), max_size=len(cells)))
    index = NeighborIndex(
        np.ldexp(np.array(cells, np.float64), exponent),
        np.array(sections),
        None if side is None else np.ldexp(float(side), exponent),
        shape="disc" if disc else "box",
        k_nearest=k,
    )
    indptr, found = index.query(np.arange(len(cells)))
    for cell in range(len(cells)):
        expected = plain_neighbors(cells, sections, cell, sides=None if side is None else (side, side), disc=disc, k=k)
        assert found[indptr[cell] : indptr[cell + 1]].tolist() == expected


@pytest.mark.parametrize("scale", [1e-200, 1.0, 1e200])
def test_the_nearest_cell_at_any_scale(scale):
    points = np.random.default_rng(0).random((60, 2))
    exact = [tuple(map(Fraction, point)) for point in (points * scale).tolist()]
    sections = [0] * 60
    index = NeighborIndex(points * scale, np.zeros(60, np.int64), None, k_nearest=5)
    found = index.query(np.arange(60))[1].reshape(60, 5)
    for cell in range(60):
        assert found[cell].tolist() == plain_neighbors(exact, sections, cell, k=5)
    apart = np.linalg.norm(points[:, None] - points[None], axis=2) + np.diag(np.full(60, np.inf))
    box = NeighborIndex(points * scale, np.zeros(60, np.int64), 0.1 * scale)
    np.testing.assert_allclose(box.nearest_distances(np.arange(60)), apart.min(axis=1) * scale, rtol=1e-9)


@pytest.mark.parametrize("exponent", [-700, 0, 700])
def test_the_border_of_a_disc_is_exact_at_any_scale(exponent):
    points = np.ldexp([[0, 0], [3, 4], [3, 4 + 2.0**-40], [-5, 0], [0, -5 - 2.0**-40], [0, 1]], exponent)
    index = NeighborIndex(points, np.zeros(6, np.int64), np.ldexp(10.0, exponent), shape="disc")
    assert index.query(np.array([0]))[1].tolist() == [1, 3, 5]
