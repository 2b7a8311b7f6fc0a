"""Neighbourhoods of a store: the sums of the neighbours' counts, against a loop over dense rows."""

import pickle

import numpy as np
import pytest
import torch
from anndata import AnnData, read_h5ad
from conftest import make_adata, with_genes
from hypothesis import given
from hypothesis import strategies as st
from scipy import sparse
from torch.utils.data import DataLoader

from stformer_hf import CellStore, GeneTokenizer, collate_cells, spatial_neighbors
from stformer_hf.store import neighborhoods


def plain_sums(counts, neighbors, rows, among=None) -> np.ndarray:
    """Sum the counts of each row's neighbours, one by one; `neighbors` are lists, `among` the cells that are there."""
    sums = np.zeros((len(rows), counts.shape[1]), object)
    for i, row in enumerate(rows):
        for neighbor in set(neighbors[row]) - {row}:
            if among is None or neighbor in among:
                for gene, count in enumerate(counts[neighbor].tolist()):
                    sums[i, gene] += count
    return sums.astype(np.float64)


def sums_of(batch) -> np.ndarray:
    """The batch's neighbourhoods as dense rows; that they are as documented is asserted on the way."""
    indptr, genes, counts = batch.neighborhood
    assert indptr.dtype == np.int64 and len(indptr) == len(batch) + 1
    assert genes.dtype == batch.genes.dtype
    assert counts.dtype == (np.float64 if batch.counts.dtype.kind == "f" else np.int64)
    assert (counts > 0).all()
    dense = np.zeros((len(batch), len(batch.gene_ids)))
    for i in range(len(batch)):
        own = slice(indptr[i], indptr[i + 1])
        assert (np.diff(genes[own].astype(int)) > 0).all()
        dense[i, genes[own]] = counts[own]
    assert indptr[-1] == len(genes) == len(counts)
    return dense


def make_section(n_cells=60, seed=0) -> AnnData:
    """Cells with neighbours, some of weight 0, some their own."""
    adata = make_adata(n_cells, 30, seed=seed)
    rng = np.random.default_rng(seed)
    graph = sparse.random(n_cells, n_cells, 0.08, "csr", np.float32, rng)
    graph.setdiag(rng.random(n_cells) < 0.5)
    graph = graph.tocsr()
    graph.data[::5] = 0
    adata.obsp["spatial_connectivities"] = graph
    return adata


def neighbors_of(adata: AnnData) -> list[list[int]]:
    graph = adata.obsp["spatial_connectivities"]
    return [graph.indices[graph.indptr[i] : graph.indptr[i + 1]].tolist() for i in range(len(adata))]


@pytest.fixture(scope="module")
def section() -> AnnData:
    return make_section()


@pytest.fixture(scope="module")
def store(section, tmp_path_factory) -> CellStore:
    path = tmp_path_factory.mktemp("section") / "s"
    return CellStore.build(path, section, obs="all", neighbors="spatial_connectivities", rows_per_batch=16)


@pytest.fixture(scope="module")
def counts(section) -> np.ndarray:
    return section.X.toarray()


@pytest.mark.parametrize("groups_at_once", [1, 7, 64])
def test_sums_of_the_neighbours(store, section, counts, monkeypatch, groups_at_once):
    monkeypatch.setattr(neighborhoods, "_GROUPS_AT_ONCE", groups_at_once)
    graph = section.obsp["spatial_connectivities"]
    assert (graph.data == 0).any() and (graph.diagonal() > 0).any()
    around = store.with_neighborhoods()
    for rows in (range(60), [5, 0, 5, -1, 3], [7], []):
        batch = around.__getitems__(rows)
        expected = plain_sums(counts, neighbors_of(section), [row % 60 for row in rows])
        np.testing.assert_array_equal(sums_of(batch), expected)
        own = sparse.csr_matrix((batch.counts, batch.genes, batch.indptr), shape=(len(rows), 30))
        np.testing.assert_array_equal(own.toarray(), counts[list(rows)])


def test_only_where_it_is_asked_for(store, tmp_path, adata):
    around = store.with_neighborhoods()
    assert store.__getitems__([0]).neighborhood is None
    assert around.__getitems__([0]).neighborhood is not None
    assert len(around) == len(store) and around.obs.equals(store.obs)
    without = CellStore.build(tmp_path / "s", adata)
    with pytest.raises(ValueError, match=r"without neighbours: .*spatial_neighbors\(adata\).*spatial_connectivities"):
        without.with_neighborhoods()


@pytest.mark.parametrize("passed_on", [lambda store: store, lambda store: pickle.loads(pickle.dumps(store))])
@pytest.mark.parametrize("first", ["select", "neighborhoods"])
def test_neighbours_outside_a_selection_are_left_out(store, section, counts, passed_on, first):
    index = [40, 3, 9, 3, 20, 21, 22, 0, *range(30, 38)]
    if first == "select":
        selected = store.select(index).with_neighborhoods()
    else:
        selected = store.with_neighborhoods().select(index)
    selected = passed_on(selected)
    batch = selected.__getitems__(range(len(index)))
    assert batch.cell_id.tolist() == index
    expected = plain_sums(counts, neighbors_of(section), index, among=set(index))
    assert expected.any() and (expected != plain_sums(counts, neighbors_of(section), index)).any()
    np.testing.assert_array_equal(sums_of(batch), expected)
    again = selected.select([2, 4, 6])
    expected = plain_sums(counts, neighbors_of(section), [9, 20, 22], among={9, 20, 22})
    np.testing.assert_array_equal(sums_of(again.__getitems__(range(3))), expected)
    assert store.select(index).__getitems__([0]).neighborhood is None


def test_a_split_keeps_neighbourhoods_apart(store, section, counts):
    for part in store.with_neighborhoods().train_test_split(0.4).values():
        batch = part.__getitems__(range(len(part)))
        cells = batch.cell_id.tolist()
        np.testing.assert_array_equal(
            sums_of(batch), plain_sums(counts, neighbors_of(section), cells, among=set(cells))
        )


@given(data=st.data(), n_cells=st.integers(1, 7), n_genes=st.integers(1, 4), fractional=st.booleans())
def test_sums_of_any_graph(tmp_path, data, n_cells, n_genes, fractional):
    value = st.sampled_from([0, 0, 1, 2, 255, 70_000, 4_294_967_295] if not fractional else [0, 0, 0.25, 1.5, 3])
    row = st.lists(value, min_size=n_genes, max_size=n_genes)
    counts = np.array(data.draw(st.lists(row, min_size=n_cells, max_size=n_cells)), np.float64)
    number = st.integers(0, n_cells - 1)
    neighbors = data.draw(st.lists(st.lists(number, max_size=6), min_size=n_cells, max_size=n_cells))
    ends = np.cumsum([0, *map(len, neighbors)]).tolist()
    numbers = np.array([number for row in neighbors for number in row], np.int32)
    weights = np.array(data.draw(st.lists(st.sampled_from([0.0, 1.0, -0.5]), min_size=ends[-1], max_size=ends[-1])))
    adata = with_genes(AnnData(sparse.csr_matrix(counts)))
    # Unsorted, and with neighbours that stand there several times.
    adata.obsp["graph"] = sparse.csr_matrix((weights, numbers, ends), shape=(n_cells, n_cells))
    store = CellStore.build(
        tmp_path / "s", adata, neighbors="graph", fractional=fractional, overwrite=True, report=False, rows_per_batch=3
    )
    rows = data.draw(st.lists(number, max_size=8))
    among = sorted(data.draw(st.sets(number, min_size=1)))
    np.testing.assert_array_equal(
        sums_of(store.with_neighborhoods().__getitems__(rows)), plain_sums(counts, neighbors, rows)
    )
    batch = store.with_neighborhoods().select(among).__getitems__(range(len(among)))
    np.testing.assert_array_equal(sums_of(batch), plain_sums(counts, neighbors, among, among=set(among)))


def test_no_cells_have_no_neighbours(tmp_path):
    adata = make_section()[:0].copy()
    store = CellStore.build(tmp_path / "s", adata, neighbors="spatial_connectivities")
    assert len(store) == 0
    sums_of(store.with_neighborhoods().__getitems__([]))


def test_shuffled_and_joined_cells_keep_their_neighbours(section, tmp_path):
    other = make_section(45, seed=1)
    other.obs_names = [f"other{i}" for i in range(45)]
    counts = np.vstack([section.X.toarray(), other.X.toarray()])
    neighbors = neighbors_of(section) + [[60 + i for i in row] for row in neighbors_of(other)]
    names = [*section.obs_names, *other.obs_names]
    options = {"neighbors": "spatial_connectivities", "rows_per_batch": 8, "rows_per_shard": 16, "report": False}
    shuffled = CellStore.build(tmp_path / "shuffled", [section, other], shuffle=True, **options)
    parts = [CellStore.build(tmp_path / f"{i}", [section, other], part=(i, 3), **options).path for i in range(3)]
    appended = CellStore.build(tmp_path / "appended", section, **options).with_neighborhoods()
    appended.append(other, neighbors="spatial_connectivities")
    for store in (shuffled, CellStore.join(tmp_path / "joined", parts), appended):
        cells = [names.index(name) for name in store.obs.index]
        store = store if store is appended else store.with_neighborhoods()
        batch = store.__getitems__(range(105))
        np.testing.assert_array_equal(sums_of(batch), plain_sums(counts, neighbors, cells))
    part = CellStore(parts[1]).with_neighborhoods()  # neighbours in the other parts are left out
    batch = part.__getitems__(range(35))
    np.testing.assert_array_equal(
        sums_of(batch), plain_sums(counts, neighbors, range(35, 70), among=set(range(35, 70)))
    )


def itself(batch):
    return batch


@pytest.mark.parametrize(("start", "n_workers"), [("fork", 2), pytest.param("spawn", 1, marks=pytest.mark.slow)])
def test_workers_send_neighbourhoods(store, section, counts, start, n_workers):
    loader = DataLoader(
        store.with_neighborhoods(),
        batch_size=25,
        collate_fn=itself,
        num_workers=n_workers,
        multiprocessing_context=start,
    )
    batches = list(loader)
    assert [len(batch) for batch in batches] == [25, 25, 10]
    np.testing.assert_array_equal(
        np.vstack([sums_of(batch) for batch in batches]), plain_sums(counts, neighbors_of(section), range(60))
    )
    plain = next(iter(DataLoader(store, batch_size=25, collate_fn=itself, num_workers=1)))
    assert plain.neighborhood is None and plain.gene_ids.tolist() == store.gene_ids.tolist()


@pytest.mark.parametrize("n_workers", [0, 2])
def test_tensors_of_neighbourhoods(store, section, counts, n_workers):
    loader = DataLoader(store.with_neighborhoods(), batch_size=30, collate_fn=collate_cells, num_workers=n_workers)
    rows = []
    for batch in loader:
        indptr, genes, sums = (batch[f"neighborhood_{name}"] for name in ("indptr", "genes", "counts"))
        dense = torch.zeros(30, 30, dtype=sums.dtype)
        dense[torch.arange(30).repeat_interleave(indptr.diff()), genes.long()] = sums
        rows.append(dense.numpy())
    np.testing.assert_array_equal(np.vstack(rows), plain_sums(counts, neighbors_of(section), range(60)))
    assert not any(name.startswith("neighborhood") for name in collate_cells(store.__getitems__([0])))


def test_the_tokenizer_reads_them_as_it_reads_the_graph_of_an_anndata(store, section):
    tokenizer = GeneTokenizer(
        list(section.var_names),
        scheme="rank",
        neighborhood=True,
        medians=np.random.default_rng(0).random(30) + 0.5,
        max_length=30,
    )
    around = store.with_neighborhoods()
    expected = tokenizer(section)
    for rows in (list(range(60)), [9, 2, 2]):
        tokens = tokenizer(around.__getitems__(rows))
        assert tokens["input_ids"] == [expected["input_ids"][row] for row in rows]
        assert tokens["token_type_ids"] == [expected["token_type_ids"][row] for row in rows]
    assert {1} <= set(sum(tokens["token_type_ids"], []))
    with pytest.raises(ValueError, match=r"store\.with_neighborhoods\(\)"):
        tokenizer(store.__getitems__([0]))


def test_starmap_from_coordinates_to_tokens(shared_data, tmp_path):
    adata = read_h5ad(shared_data / "starmap_cortex.h5ad")
    spatial_neighbors(adata, section_key="section")
    store = CellStore.build(tmp_path / "s", adata, obs=["cell_type"], neighbors="spatial_connectivities", report=False)
    graph = adata.obsp["spatial_connectivities"].toarray()
    batch = store.with_neighborhoods().__getitems__(range(len(store)))
    np.testing.assert_array_equal(sums_of(batch), graph.astype(np.float64) @ adata.X.toarray().astype(np.float64))
    tokenizer = GeneTokenizer.from_store(
        store, scheme="rank", neighborhood=True, medians=dict.fromkeys(store.gene_ids, 1.0), max_length=512
    )
    assert tokenizer(batch)["input_ids"] == tokenizer(adata)["input_ids"]
