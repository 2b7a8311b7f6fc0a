"""CellStore in parts: neighbours, shuffles, workers, parts and joins, what is added, chosen, split and saved."""

import json
import os
import pickle
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import make_adata
from datasets import load_from_disk
from hypothesis import given
from hypothesis import strategies as st
from scipy import sparse
from scipy.stats import chisquare, kstest
from torch.utils.data import DataLoader

from stformer_hf import BlockShuffleSampler, CellStore, collate_cells, small_batches
from stformer_hf.store import shuffle, worker_slots
from stformer_hf.store.block_order import block_order

SMALL = {"obs": "all", "neighbors": "spatial_connectivities", "rows_per_batch": 16, "rows_per_shard": 32}


def make_section(n_cells, seed):
    adata = make_adata(n_cells, 30, seed=seed)
    graph = sparse.random(n_cells, n_cells, 0.05, "csr", np.float32, np.random.default_rng(seed))
    graph.data[0] = 0  # a neighbour of weight 0 is one
    adata.obsp["spatial_connectivities"] = graph
    return adata


@pytest.fixture(scope="module")
def sections(tmp_path_factory):
    """Three files of cells with neighbours; their counts and their graph as dense arrays."""
    folder = tmp_path_factory.mktemp("sections")
    cells = [make_section(100 + i, i) for i in range(3)]
    for i, adata in enumerate(cells):
        adata.write_h5ad(folder / f"{i}.h5ad")
    counts = np.vstack([adata.X.toarray() for adata in cells])
    graph = sparse.block_diag([adata.obsp["spatial_connectivities"] for adata in cells]).toarray()
    return sorted(folder.iterdir()), counts, graph


@pytest.fixture(scope="module")
def whole(sections, tmp_path_factory):
    return CellStore.build(tmp_path_factory.mktemp("whole") / "s", sections[0], **SMALL)


def dense(store, index=slice(None)):
    return store.rows(index).toarray()


def graph_of(store):
    return store.neighbors(slice(None)).toarray()


def test_neighbours_are_numbered_in_the_store(whole, sections):
    files, counts, graph = sections
    np.testing.assert_array_equal(dense(whole), counts)
    np.testing.assert_array_equal(graph_of(whole), graph)
    given_graph = make_section(100, 0).obsp["spatial_connectivities"]
    assert whole.neighbors([0, 50]).nnz == np.diff(given_graph.indptr)[[0, 50]].sum()  # weights of 0 included
    row = load_from_disk(str(whole.path))[150]
    assert row["neighbors"] == np.flatnonzero(graph[150]).tolist() or 0 in row["neighbor_weights"]


def test_a_store_without_neighbours_says_so(store, tmp_path):
    with pytest.raises(ValueError, match="built without neighbours"):
        store.neighbors([0])
    with pytest.raises(ValueError, match=r"no obsp\['graph'\]"):
        CellStore.build(tmp_path / "s", make_adata(), neighbors="graph")


def test_a_shuffle_is_a_permutation_of_everything(whole, sections, tmp_path, monkeypatch):
    files, counts, graph = sections
    monkeypatch.setattr(shuffle, "_ROWS_PER_BUCKET", 50)  # several files
    shuffled = CellStore.build(tmp_path / "s", files, shuffle=True, seed=3, **SMALL)
    # Every cell is known by its age, its counts and its neighbours; find the permutation by the counts.
    order = [int(np.flatnonzero((counts == row).all(1))[0]) for row in dense(shuffled) if row.any()]
    full = np.flatnonzero(dense(shuffled).any(1))
    assert len(set(order)) == len(order) == (counts.any(1)).sum() and order != sorted(order)
    np.testing.assert_array_equal(graph_of(shuffled)[np.ix_(full, full)], graph[np.ix_(order, order)])
    np.testing.assert_array_equal(shuffled.obs["age"].iloc[full], whole.obs["age"].iloc[order])
    assert shuffled.obs.index[full].tolist() == whole.obs.index[order].tolist()
    shuffled.verify()
    again = CellStore.build(tmp_path / "again", files, shuffle=True, seed=3, **SMALL)
    np.testing.assert_array_equal(dense(again), dense(shuffled))
    other = CellStore.build(tmp_path / "other", files, shuffle=True, seed=4, **SMALL)
    assert (dense(other) != dense(shuffled)).any()
    # Cells of all files are mixed: a block of a third of the cells has about a third of each file.
    files_of = np.repeat([0, 1, 2], [100, 101, 102])[order[:100]]
    assert np.bincount(files_of).min() > 15


@pytest.mark.slow  # test_engines.py starts processes too
def test_workers_write_the_same_store(whole, sections, tmp_path):
    script = (
        "import sys; from stformer_hf import CellStore; from stformer_hf.store import writer\n"
        "if __name__ == '__main__':\n"
        "    writer.write_piece = None  # nothing is read here\n"
        f"    settings = dict(workers=2, **{SMALL!r})\n"
        "    store = CellStore.build(sys.argv[1] + '/files', sys.argv[2:], **settings)\n"
        "    CellStore.build(sys.argv[1] + '/selection', store.select(slice(270, 30, -1)), **settings)\n"
    )
    (tmp_path / "build.py").write_text(script)
    subprocess.run([sys.executable, tmp_path / "build.py", tmp_path, *sections[0]], check=True)
    assert CellStore(tmp_path / "files").manifest["shards"] == whole.manifest["shards"]  # checksums and all
    selection = CellStore.build(tmp_path / "one", whole.select(slice(270, 30, -1)), **SMALL)
    assert CellStore(tmp_path / "selection").manifest["shards"] == selection.manifest["shards"]


@pytest.mark.parametrize("n_parts", [1, 4, 7])
def test_parts_of_any_machines_join_to_the_whole(whole, sections, tmp_path, n_parts):
    files, counts, graph = sections
    parts = [CellStore.build(tmp_path / f"{i}", files, part=(i, n_parts), **SMALL) for i in range(n_parts)]
    bounds = [i * 303 // n_parts for i in range(n_parts + 1)]
    for part, start, stop in zip(parts, bounds[:-1], bounds[1:], strict=True):
        np.testing.assert_array_equal(dense(part), counts[start:stop])
        np.testing.assert_array_equal(graph_of(part), graph[start:stop, start:stop])
    joined = CellStore.join(tmp_path / "joined", [part.path for part in parts[::-1]])
    np.testing.assert_array_equal(dense(joined), counts)
    np.testing.assert_array_equal(graph_of(joined), graph)
    pd.testing.assert_frame_equal(joined.obs, whole.obs)
    assert [source["n_cells"] for source in joined.manifest["sources"]] == [100, 101, 102]
    inodes = {os.stat(file).st_ino for part in parts for file in part.path.glob("*.arrow")}
    assert {os.stat(file).st_ino for file in joined.path.glob("*.arrow")} == inodes  # nothing is copied
    assert joined.dataset[200]["counts"] == whole.dataset[200]["counts"]
    joined.verify()
    own = joined.save(tmp_path / "own")
    np.testing.assert_array_equal(dense(own), counts)
    np.testing.assert_array_equal(graph_of(own), graph)


def test_a_part_that_is_missing_is_named(sections, tmp_path):
    for i in (0, 2):
        CellStore.build(tmp_path / f"{i}", sections[0], part=(i, 3), **SMALL)
    with pytest.raises(ValueError, match=r"0 of 3, 2 of 3.*\[1\] missing"):
        CellStore.join(tmp_path / "joined", [tmp_path / "0", tmp_path / "2"])
    with pytest.raises(ValueError, match="part=.3, 3."):
        CellStore.build(tmp_path / "x", sections[0], part=(3, 3))


def test_counts_of_other_types_join(tmp_path):
    a, b = make_adata(20, 10, seed=1), make_adata(20, 10, seed=2)
    b.X.data[5] = 70_000
    for name, adata in (("a", a), ("b", b)):
        CellStore.build(tmp_path / name, adata)
    joined = CellStore.join(tmp_path / "joined", [tmp_path / "a", tmp_path / "b"])
    np.testing.assert_array_equal(dense(joined), np.vstack([a.X.toarray(), b.X.toarray()]))
    assert joined.dataset.features["counts"].feature.dtype == "uint32" and len(joined.dataset) == 40
    assert CellStore(tmp_path / "a").manifest["count_type"] == "uint8"  # as it was
    joined.verify()


def test_stores_that_do_not_fit_do_not_join(tmp_path, store):
    CellStore.build(tmp_path / "genes", make_adata(10, 41))
    with pytest.raises(ValueError, match="has other genes"):
        CellStore.join(tmp_path / "j", [store.path, tmp_path / "genes"])
    CellStore.build(tmp_path / "obs", make_adata(10))
    with pytest.raises(ValueError, match="has other obs"):
        CellStore.join(tmp_path / "j", [store.path, tmp_path / "obs"])
    with pytest.raises(FileExistsError):
        CellStore.join(store.path, [store.path])
    assert not (tmp_path / "j").exists()


# ---------------------------------------------------------------------- append


def test_what_is_added_comes_behind(sections, tmp_path):
    files, counts, graph = sections
    store = CellStore.build(tmp_path / "s", files[0], **SMALL)
    before = store.rows(slice(None))
    other = make_section(20, 9)
    other.var_names = [f"new{i}" for i in range(30)]
    other.X = other.X * 1000
    other.obs["cell_type"] = other.obs["cell_type"].cat.rename_categories({"B cell": "NK cell"})
    inodes = {os.stat(store.path / shard["file"]).st_ino for shard in store.manifest["shards"]}
    store.append([files[1], other], neighbors="spatial_connectivities")
    assert len(store) == 221 and len(store.genes) == 60
    np.testing.assert_array_equal(dense(store)[:201, :30], counts[:201])
    np.testing.assert_array_equal(dense(store)[201:, 30:], other.X.toarray())
    assert dense(store)[:201, 30:].sum() == dense(store)[201:, :30].sum() == 0
    expected = sparse.block_diag([graph[:201, :201], other.obsp["spatial_connectivities"]]).toarray()
    np.testing.assert_array_equal(graph_of(store), expected)
    assert store.categories["cell_type"] == ["B cell", "T cell", "NK cell"]
    assert store.obs["cell_type"][201:].tolist() == other.obs["cell_type"].tolist()
    assert store.dataset[210]["counts"] == dense(store, [210])[dense(store, [210]) > 0].tolist()
    np.testing.assert_array_equal(before.toarray(), counts[:100])
    assert [source["n_cells"] for source in store.manifest["sources"]] == [100, 101, 20]
    assert not inodes & {os.stat(store.path / shard["file"]).st_ino for shard in store.manifest["shards"]}  # widened
    store.verify()


def test_shards_that_need_no_change_are_linked(store, tmp_path):
    inode = os.stat(store.path / store.manifest["shards"][0]["file"]).st_ino
    store.append(make_adata(10, seed=8))
    assert os.stat(store.path / store.manifest["shards"][0]["file"]).st_ino == inode
    assert len(CellStore(store.path)) == 70


def test_an_addition_that_fails_leaves_the_store(store, adata):
    bad = make_adata(10)
    bad.X = bad.X * -1
    with pytest.raises(ValueError, match="negative"):
        store.append(bad)
    older = make_adata(10)
    del older.obs["age"]
    with pytest.raises(ValueError, match="no obs column 'age'"):
        store.append(older)
    typed = make_adata(10)
    typed.obs["age"] = typed.obs["age"] + 0.5
    with pytest.raises(ValueError, match="'age'"):
        store.append(typed)
    with pytest.raises(ValueError, match="has no neighbours"):
        store.append(make_section(5, 1), neighbors="spatial_connectivities")
    np.testing.assert_array_equal(dense(CellStore(store.path)), adata.X.toarray())
    with pytest.raises(ValueError, match="selection"):
        store.select([0]).append(make_adata(5))


# ---------------------------------------------------------------------- select, split, save


def test_a_selection_is_a_store_of_its_cells(whole, sections, tmp_path):
    files, counts, graph = sections
    index = np.array([250, 3, 3, 99, 120])
    chosen = whole.select(index)
    assert len(chosen) == 5 and "5 of 303 cells" in repr(chosen)
    np.testing.assert_array_equal(dense(chosen), counts[index])
    np.testing.assert_array_equal(dense(chosen, [-1, 1]), counts[[120, 3]])
    np.testing.assert_array_equal(dense(chosen.select([4, 0])), counts[[120, 250]])
    assert chosen.obs.index.tolist() == whole.obs.index[index].tolist()
    assert chosen.lengths.tolist() == (counts[index] > 0).sum(1).tolist()
    assert chosen.__getitems__([0, 4]).cell_id.tolist() == [250, 120]
    assert chosen[1]["cell_id"] == 3 and chosen[1]["age"] == whole.obs["age"].iloc[3]
    assert chosen.dataset[0] == whole.dataset[250]
    with pytest.raises(IndexError):
        chosen.rows([5])
    copy = pickle.loads(pickle.dumps(chosen))
    np.testing.assert_array_equal(dense(copy), counts[index])
    mask = np.arange(303) % 2 == 0
    even = whole.select(mask)
    np.testing.assert_array_equal(graph_of(even), graph[mask][:, mask])
    saved = even.save(tmp_path / "even")
    np.testing.assert_array_equal(dense(saved), counts[mask])
    np.testing.assert_array_equal(graph_of(saved), graph[mask][:, mask])
    pd.testing.assert_frame_equal(saved.obs, even.obs)
    assert saved.categories == whole.categories


@pytest.mark.parametrize("by", [None, "donor"])
def test_cells_that_are_there_twice_are_on_one_side_of_a_split(tmp_path, by, caplog):
    adata = make_adata(100)
    adata.obs_names = ["ACGTACGTAC" + "".join("ACGT"[i // 4**k % 4] for k in range(4)) for i in range(100)]
    adata.obs["donor"] = [f"d{i % 10}" for i in range(100)]
    store = CellStore.build(tmp_path / "s", adata, obs=["donor"], report=False)
    assert np.array_equal(store.twins(), np.arange(100)) and "cells have the barcode" not in caplog.text
    twins = adata[10:40].copy()
    twins.obs_names = [f"run2_{name}-1" for name in twins.obs_names]
    other = adata[40:60].copy()  # barcodes of the list again, and other cells
    other.X = other.X + sparse.csr_matrix(np.eye(20, 40, dtype=np.float32))
    with pytest.raises(ValueError, match="allow_duplicates=True"):
        store.append(twins)
    store.append([twins, other], allow_duplicates=True)
    for seed in range(4):
        caplog.clear()
        split = store.train_test_split(0.2, by=by, seed=seed)
        barcodes = [{name.split("_")[-1].split("-")[0] for name in split[side].obs_names} for side in split]
        assert not barcodes[0] & barcodes[1] & set(adata.obs_names[10:40])
        assert len(split["train"]) + len(split["test"]) == 150 and 15 <= len(split["test"]) <= 50
        assert "30 of 150 cells have the barcode and counts of another cell" in caplog.text
    if by is None:
        assert barcodes[0] & barcodes[1]  # equal barcodes alone are no twins


def test_a_split_by_donor_divides_no_donor(tmp_path):
    adata = make_adata(200)
    adata.obs["donor"] = np.array([f"d{i}" for i in np.random.default_rng(0).integers(0, 10, 200)])
    store = CellStore.build(tmp_path / "s", adata, obs=["donor", "cell_type"])
    split = store.train_test_split(0.3, by="donor", seed=1)
    train, test = (set(split[side].obs["donor"]) for side in ("train", "test"))
    assert len(test) == 3 and not train & test and len(split["train"]) + len(split["test"]) == 200
    again = store.train_test_split(0.3, by="donor", seed=1)["test"]
    assert again.obs.index.tolist() == split["test"].obs.index.tolist()
    plain = store.train_test_split(0.25)
    assert (len(plain["train"]), len(plain["test"])) == (150, 50)
    assert not set(plain["train"].obs.index) & set(plain["test"].obs.index)
    with pytest.raises(ValueError, match=r"There is no obs\['batch'\]; obs has 'donor', 'cell_type'"):
        store.train_test_split(by="batch")
    with pytest.raises(ValueError, match="same 'donor'"):
        store.select(np.flatnonzero(store.obs["donor"] == "d1")).train_test_split(by="donor")


def test_every_column_of_any_source_is_kept_where_all_are_asked_for(tmp_path, caplog):
    a, b = make_adata(5), make_adata(4, seed=1)
    a.obs["batch"] = ["x", "x", "y", "y", "y"]
    b.obs["score"] = [0.5, np.nan, 1.5, 2.5]
    a.obs["odd"] = 3
    b.obs["odd"] = "three"
    b.obs["genes"] = 7
    store = CellStore.build(tmp_path / "s", [a, b], obs="all")
    assert list(store.obs) == ["cell_type", "age", "batch", "score"]
    assert (
        store.obs["batch"].astype(object).where(store.obs["batch"].notna(), None).tolist()[-5:] == ["y"] + [None] * 4
    )
    np.testing.assert_array_equal(store.obs["score"], [np.nan] * 5 + [0.5, np.nan, 1.5, 2.5])
    assert "'odd' has different types" in caplog.text and "genes is left out" in caplog.text


# ---------------------------------------------------------------------- batches


@pytest.mark.parametrize(("context", "n_workers"), [(None, 0), ("fork", 2), ("spawn", 1)])
def test_collated_batches_are_the_cells(whole, sections, context, n_workers):
    _, counts, _ = sections
    loader = DataLoader(
        whole,
        batch_size=32,
        collate_fn=collate_cells,
        num_workers=n_workers,
        multiprocessing_context=context,
    )
    seen = []
    for batch in loader:
        n = len(batch["cell_id"])
        rows = torch.sparse_csr_tensor(batch["indptr"].int(), batch["genes"].int(), batch["counts"].float(), (n, 30))
        np.testing.assert_array_equal(rows.to_dense(), counts[batch["cell_id"]])
        assert batch["genes"].dtype == torch.uint16 and batch["counts"].dtype == torch.uint8
        assert batch["obs_age"].tolist() == whole.obs["age"].iloc[batch["cell_id"].numpy()].tolist()
        assert (
            batch["obs_cell_type"].tolist()
            == whole.obs["cell_type"].cat.codes.to_numpy()[batch["cell_id"].numpy()].tolist()
        )
        seen += batch["cell_id"].tolist()
    assert seen == list(range(303))


def test_batches_that_are_kept_are_not_written_over(whole, sections):
    _, counts, _ = sections
    loader = DataLoader(whole, batch_size=8, collate_fn=collate_cells, num_workers=2, persistent_workers=True)
    kept = list(loader) + list(loader)  # all batches of two epochs live
    for batch in kept:
        rows = sparse.csr_matrix(
            (batch["counts"], batch["genes"].int(), batch["indptr"]), shape=(len(batch["cell_id"]), 30)
        )
        np.testing.assert_array_equal(rows.toarray(), counts[batch["cell_id"]])
    assert [row for batch in kept for row in batch["cell_id"].tolist()] == [*range(303), *range(303)]


def test_slots_of_batches_that_are_gone_are_used_again(whole):
    loader = DataLoader(whole, batch_size=8, collate_fn=collate_cells, num_workers=1, persistent_workers=True)
    for _ in range(3):
        for batch in loader:
            del batch
    worker = loader._iterator._workers[0].pid
    n_slots = sum(process == worker for process, _ in worker_slots._received)
    assert 1 <= n_slots <= 8  # of 114 batches


@given(n=st.integers(1, 40), batch_size=st.integers(1, 9), n_at_once=st.integers(1, 5))
def test_small_batches_are_those_of_a_small_loader(whole, n, batch_size, n_at_once):
    cells = whole.with_neighborhoods().select(np.random.default_rng(n).permutation(303)[:n])

    def loader(size):
        return DataLoader(cells, size, collate_fn=collate_cells)

    for batch, of in zip(small_batches(loader(batch_size * n_at_once), batch_size), loader(batch_size), strict=True):
        assert list(batch) == list(of)
        for name, values in of.items():
            assert torch.equal(batch[name], values) if torch.is_tensor(values) else batch[name] == values


def test_small_batches_of_workers_are_not_written_over(whole):
    loader = DataLoader(whole, 32, collate_fn=collate_cells, num_workers=2, persistent_workers=True)
    delivered = (batch for _ in range(3) for batch in small_batches(loader, 8))
    kept = [batch for i, batch in enumerate(delivered) if i % 9 == 5]
    expected = list(DataLoader(whole, 8, collate_fn=collate_cells)) * 3
    for batch, of in zip(kept, expected[5::9], strict=True):
        assert all(torch.equal(batch[name], of[name]) for name in of)
    with pytest.raises(ValueError, match="at least 1, got 0"):
        small_batches(loader, 0)


def test_a_batch_from_a_worker_brings_cells_not_names(whole):
    batch = whole.__getitems__([1, 2])
    copy = pickle.loads(pickle.dumps(batch))
    assert len(pickle.dumps(batch)) < 2_000
    assert copy.gene_ids.tolist() == whole.gene_ids.tolist() and copy.categories == whole.categories
    np.testing.assert_array_equal(copy.counts, batch.counts)
    tensors = collate_cells(batch)
    again = pickle.loads(pickle.dumps(tensors))
    assert again.keys() == tensors.keys() and torch.equal(again["counts"], tensors["counts"])


def test_pickled_stores_are_small_whatever_they_hold(tmp_path):
    big = CellStore.build(tmp_path / "s", make_adata(2000, 200), obs="all")
    big.rows([0]), big.obs, big.lengths
    assert len(pickle.dumps(big)) < 10_000


@given(st.integers(0, 70), st.integers(1, 20), st.integers(0, 5), st.integers(0, 5))
def test_block_order_keeps_blocks_together(n, block_size, seed, epoch):
    order = block_order(n, block_size, seed, epoch)
    assert sorted(order) == list(range(n))
    starts = [row for row in order if row % block_size == 0]
    expected = [row for start in starts for row in range(start, min(start + block_size, n))]
    assert order.tolist() == expected
    start, stop = sorted((seed * 7, epoch * 20))
    assert block_order(n, block_size, seed, epoch, start, stop).tolist() == order[start:stop].tolist()


def test_all_orders_of_blocks_are_equally_likely():
    orders = [tuple(block_order(4, 1, seed, 0)) for seed in range(4_800)]
    observed = np.unique([int("".join(map(str, order))) for order in orders], return_counts=True)[1]
    assert len(observed) == 24 and chisquare(observed).pvalue > 1e-4


@pytest.mark.parametrize("n", [100, 1_000, 4_097])
def test_a_row_comes_anywhere(n):
    orders = np.array([block_order(n, 1, seed, epoch) for seed in range(40) for epoch in range(5)])
    places = np.argsort(orders, axis=1)  # of each row
    for row in (0, 1, n // 2, n - 1):
        assert kstest(places[:, row] / n, "uniform").pvalue > 1e-4
    steps = np.abs(np.diff(orders, axis=1)).mean(axis=1) / n
    assert abs(steps.mean() - 1 / 3) < 0.01  # of random rows


def test_a_part_of_a_huge_order_takes_no_memory():
    n = 10**12
    rows = block_order(n, 16, 3, 1, n - 1_000, n)
    assert len(np.unique(rows)) == 1_000 and rows.min() >= 0 and rows.max() < n
    sampler = BlockShuffleSampler(range(n), 16)
    sampler.load_state_dict(sampler.state_after(n - 100))
    rows = iter(sampler)  # else `list` would ask for the length, and for memory
    assert list(rows) == block_order(n, 16, 0, 0, n - 100, n).tolist()


def test_blocks_are_mixed_anew_in_each_epoch(store):
    orders = {tuple(store.block_shuffle(4, seed=seed, epoch=epoch)) for seed in (0, 1) for epoch in (0, 1)}
    assert len(orders) == 4
    with pytest.raises(ValueError, match="at least one row"):
        store.block_shuffle(0)


# ---------------------------------------------------------------------- a disk that is full, memory that is small


@pytest.fixture
def small_disk(tmp_path):
    """A tmpfs of 1 MB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"a tmpfs cannot be mounted here: {mounted.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_a_full_disk_is_told_and_the_older_store_stays(small_disk, tmp_path):
    old = CellStore.build(small_disk / "s", make_adata())
    expected = dense(old)
    make_adata(3000, 2000).write_h5ad(tmp_path / "big.h5ad")
    with pytest.raises(OSError, match="no space for the store.*Free some space"):
        CellStore.build(small_disk / "s", tmp_path / "big.h5ad", overwrite=True)
    np.testing.assert_array_equal(dense(CellStore(small_disk / "s")), expected)
    CellStore(small_disk / "s").verify()


LIMITED = """
import resource, signal, sys
from stformer_hf import CellStore
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, 500_000))
try:
    CellStore.build(sys.argv[1], sys.argv[2], overwrite=True)
except OSError as error:
    print(error)
    sys.exit(3)
"""


@pytest.mark.slow
def test_a_file_that_may_not_grow_is_told_and_the_older_store_stays(tmp_path):
    """As above, with a limit of the process in place of a disk: where no tmpfs can be mounted."""
    old = CellStore.build(tmp_path / "s", make_adata())
    expected = dense(old)
    make_adata(3000, 2000).write_h5ad(tmp_path / "big.h5ad")
    run = subprocess.run(
        [sys.executable, "-c", LIMITED, tmp_path / "s", tmp_path / "big.h5ad"], capture_output=True, text=True
    )
    assert run.returncode == 3, run.stderr
    assert "no space for the store" in run.stdout
    np.testing.assert_array_equal(dense(CellStore(tmp_path / "s")), expected)


def test_the_manifest_tells_what_the_store_holds(whole):
    manifest = json.loads((whole.path / "manifest.json").read_text())
    assert manifest["complete"] and manifest["n_cells"] == 303 and manifest["n_genes"] == 30
    assert manifest["n_counts"] == whole.lengths.sum()
    assert sum(shard["rows"] for shard in manifest["shards"]) == 303
    assert all(len(shard["checksum"]) == 32 for shard in manifest["shards"])
