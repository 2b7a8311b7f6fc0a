"""What stands between users and lost or mixed-up cells: replaced, interrupted, concurrent and odd builds."""

import os
import pickle
import subprocess
import sys

import h5py
import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from conftest import make_adata, with_genes
from scipy import sparse

from stformer_hf import CellStore
from stformer_hf.store import replacing


def named(names: str, seed: int = 0, n_cells: int = 20) -> AnnData:
    adata = make_adata(n_cells, len(names), seed=seed)
    adata.var_names = list(names)
    return adata


def dense(store) -> np.ndarray:
    return store.rows(slice(None)).toarray()


def test_joining_onto_a_part_loses_nothing(tmp_path):
    a, b = (CellStore.build(tmp_path / name, named("abcde", seed)) for seed, name in enumerate("ab"))
    expected = np.vstack([dense(a), dense(b)])
    joined = CellStore.join(tmp_path / "a", [tmp_path / "a", tmp_path / "b"], overwrite=True)
    np.testing.assert_array_equal(dense(joined), expected)
    joined.verify()
    CellStore.build(tmp_path / "b", named("abcde", 7), overwrite=True)  # the joined store keeps the old cells
    np.testing.assert_array_equal(dense(CellStore(tmp_path / "a")), expected)


def test_a_stop_between_the_two_renames_loses_nothing(tmp_path, monkeypatch):
    store = CellStore.build(tmp_path / "s", named("abcde", n_cells=30))
    expected = dense(store)
    rename, calls = replacing.Path.rename, []

    def stop(self, target):
        calls.append(self)
        if self.name == ".s.building":
            raise KeyboardInterrupt
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(replacing.Path, "rename", stop)
        with pytest.raises(KeyboardInterrupt):
            store.append(named("abcde", 3))
    assert not (tmp_path / "s").exists() and (tmp_path / ".s.old").exists()
    np.testing.assert_array_equal(dense(CellStore(tmp_path / "s")), expected)
    with pytest.raises(FileExistsError):
        CellStore.build(tmp_path / "s", named("abcde", 3))


@pytest.mark.parametrize("renaming", [{"aliases": {"a": "b"}}, {"aliases": {"a": "z"}}])
def test_an_addition_does_not_rename_genes_that_are_there(tmp_path, renaming):
    store = CellStore.build(tmp_path / "s", named("abcde"))
    expected = dense(store)
    with pytest.raises(ValueError, match="would rename genes"):
        store.append(named("bcdef", 4), **renaming)
    np.testing.assert_array_equal(dense(CellStore(tmp_path / "s")), expected)
    store.append(named("Abcde", 4), aliases={"A": "a"})
    np.testing.assert_array_equal(dense(store), np.vstack([expected, named("Abcde", 4).X.toarray()]))


def test_an_open_store_is_not_mixed_with_one_that_replaces_it(tmp_path):
    store = CellStore.build(tmp_path / "s", named("abcde"))
    expected, batch = dense(store), store.__getitems__([0])
    pickle.loads(pickle.dumps(batch))  # its names are kept for the next batch
    other = CellStore.build(tmp_path / "s", named("vwxyz", 5), overwrite=True)
    assert store.gene_ids.tolist() == list("abcde")
    np.testing.assert_array_equal(dense(store), expected)
    for use in (lambda: store.dataset, lambda: store.append(named("abcde", 6))):
        with pytest.raises(ValueError, match="was replaced after"):
            use()
    copy = pickle.loads(pickle.dumps(other.__getitems__([0])))
    assert copy.gene_ids.tolist() == list("vwxyz")


def test_a_pickled_store_is_not_read_from_one_that_replaced_it(tmp_path):
    adata = make_adata()
    store = CellStore.build(tmp_path / "s", adata, report=False)
    pickled = pickle.dumps(store.select([3, 4]))
    adata.X.data[:] = adata.X.data[::-1].copy()
    other = CellStore.build(tmp_path / "s", adata, overwrite=True, report=False)
    assert [shard["bytes"] for shard in other.manifest["shards"]] == [s["bytes"] for s in store.manifest["shards"]]
    with pytest.raises(ValueError, match="was replaced after this object opened it"):
        pickle.loads(pickled)


def test_a_store_in_the_folder_of_its_sources_is_not_a_source(tmp_path):
    make_adata(20).write_h5ad(tmp_path / "x.h5ad")
    for _ in range(3):
        assert len(CellStore.build(tmp_path / "store", tmp_path, overwrite=True)) == 20


def test_links_in_a_circle_end(tmp_path):
    make_adata(20).write_h5ad(tmp_path / "x.H5AD")
    (tmp_path / "self").symlink_to(tmp_path, target_is_directory=True)
    assert len(CellStore.build(tmp_path / "store", tmp_path)) == 20


def test_a_store_behind_a_link_is_replaced_where_it_is(tmp_path):
    CellStore.build(tmp_path / "real", named("abcde"))
    (tmp_path / "link").symlink_to(tmp_path / "real", target_is_directory=True)
    for seed in (1, 2):
        CellStore.build(tmp_path / "link", named("abcde", seed), overwrite=True)
        np.testing.assert_array_equal(dense(CellStore(tmp_path / "real")), named("abcde", seed).X.toarray())
    assert (tmp_path / "link").is_symlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "real"]


def test_parts_of_two_builds_do_not_join(tmp_path):
    CellStore.build(tmp_path / "a", named("abcde"), part=(0, 2))
    CellStore.build(tmp_path / "b", named("abcde", n_cells=40), part=(1, 2))
    CellStore.build(tmp_path / "c", named("abcde"))
    for other in ("b", "c"):
        with pytest.raises(ValueError, match="not parts of one build"):
            CellStore.join(tmp_path / "j", [tmp_path / "a", tmp_path / other])


def test_entries_of_csc_that_come_twice_do_not_wrap(tmp_path):
    with_genes(AnnData(sparse.csc_matrix((3, 2), dtype=np.uint8))).write_h5ad(tmp_path / "a.h5ad")
    with h5py.File(tmp_path / "a.h5ad", "r+") as file:
        for name, values in (("data", [200, 100, 7]), ("indices", [1, 1, 2]), ("indptr", [0, 2, 3])):
            dtype = file[f"X/{name}"].dtype
            del file[f"X/{name}"]
            file[f"X/{name}"] = np.array(values, dtype)
    assert dense(CellStore.build(tmp_path / "s", tmp_path / "a.h5ad")).tolist() == [[0, 0], [300, 0], [0, 7]]


@pytest.mark.parametrize("dtype", ["<f2", ">f4", ">f8", ">i4", "?", "<u8"])
@pytest.mark.parametrize("where", ["memory", "dense file", "csr file", "csc file"])
def test_values_of_any_type(tmp_path, dtype, where):
    counts = (np.arange(12).reshape(4, 3) % 5).astype(bool).astype(dtype)
    path = tmp_path / "a.h5ad"
    if where == "memory":
        path = with_genes(AnnData(counts))
    elif where == "dense file":
        with_genes(AnnData(counts)).write_h5ad(path)
    else:
        form = sparse.csr_matrix if where == "csr file" else sparse.csc_matrix
        with_genes(AnnData(form(counts.astype(np.float32)))).write_h5ad(path)
        with h5py.File(path, "r+") as file:
            values = file["X/data"][:].astype(dtype)
            del file["X/data"]
            file["X/data"] = values
    np.testing.assert_array_equal(dense(CellStore.build(tmp_path / "s", path)), counts.astype(float))


def test_odd_obs_columns_are_named_or_left_out(tmp_path, adata, caplog):
    n = len(adata)
    odd = {
        "date": pd.Series([pd.Timestamp("2026-01-01").date()] * n, dtype=object),
        "half": np.ones(n, np.float16),
        "lists": [[1]] * n,
        "alike": pd.Categorical([1, "1"] * (n // 2)),
        "cell_id": ["x"] * n,
    }
    for name, values in odd.items():
        adata.obs[name] = np.asarray(values, dtype=object) if name in ("date",) else values
    adata.obs[7] = 1.5
    store = CellStore.build(tmp_path / "s", adata, obs="all")
    assert list(store.obs) == ["cell_type", "age", "7"]
    for name in odd:
        assert name in caplog.text
        with pytest.raises(ValueError, match=name):
            CellStore.build(tmp_path / "t", adata, obs=[name])
    adata.obs = pd.concat([adata.obs[["age"]], adata.obs[["age"]]], axis=1)
    with pytest.raises(ValueError, match="two obs columns 'age'"):
        CellStore.build(tmp_path / "t", adata, obs=["age"])


def test_labels_that_a_gap_made_floats_are_the_same(tmp_path):
    a, b = make_adata(6), make_adata(6, seed=1)
    a.obs["cluster"] = pd.Categorical([1, 2, 1, 2, 1, 2])
    b.obs["cluster"] = pd.Categorical([1.0, 2.0, np.nan, 2.0, 1.0, 2.0])
    assert CellStore.build(tmp_path / "s", [a, b], obs=["cluster"]).categories["cluster"] == ["1", "2"]


def test_genes_without_names_raise(tmp_path, adata):
    adata.var_names = ["", "", *adata.var_names[2:]]
    with pytest.raises(ValueError, match="2 columns have no gene name"):
        CellStore.build(tmp_path / "t", adata)


def test_odd_row_numbers_raise(store):
    with pytest.raises(IndexError, match="outside"):
        store.rows(np.array([2**64 - 1], np.uint64))
    with pytest.raises(IndexError, match="one-dimensional"):
        store.rows(np.zeros((2, 2), int))


def test_a_flipped_bit_in_a_header_names_the_shard(store):
    file = store.path / store.manifest["shards"][0]["file"]
    whole = file.read_bytes()
    for place in range(0, 1200, 7):
        data = bytearray(whole)
        data[place] ^= 1
        file.write_bytes(data)
        with pytest.raises(ValueError, match=file.name):
            CellStore(store.path).verify()


@pytest.mark.slow
def test_many_files_with_neighbours_need_few_descriptors(tmp_path):
    for i in range(80):
        adata = make_adata(5, 3, seed=i)
        adata.obsp["graph"] = sparse.eye(5, format="csr")
        adata.write_h5ad(tmp_path / f"{i:03d}.h5ad")
    code = (
        "import resource, sys; from stformer_hf import CellStore; import datasets\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (60, 60))\n"
        "print(len(CellStore.build(sys.argv[1] + '/s', sys.argv[1], neighbors='graph', report=False)))"
    )
    run = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True)
    assert run.stdout == "400\n", run.stderr[-1500:]


def test_one_build_at_a_time(tmp_path, adata):
    with replacing.locked(tmp_path / "s"), pytest.raises(BlockingIOError, match="Another process is writing"):
        CellStore.build(tmp_path / "s", adata)
    assert len(CellStore.build(tmp_path / "s", adata)) == 60
    assert [path.name for path in tmp_path.iterdir()] == ["s"]


def test_paths_hold_when_the_folder_changes(tmp_path, adata, monkeypatch):
    monkeypatch.chdir(tmp_path)
    CellStore.build("s", adata)
    store = CellStore("s")
    monkeypatch.chdir(os.sep)
    assert store.dataset.num_rows == 60 and len(pickle.loads(pickle.dumps(store))) == 60


def test_no_cells_are_a_dataset_too(tmp_path):
    store = CellStore.build(tmp_path / "s", make_adata(5)[:0].copy(), obs=["age"])
    assert len(store) == 0 and store.dataset.num_rows == 0 and dense(store).shape == (0, 40)
    assert len(CellStore.build(tmp_path / "t", make_adata(5)).select([]).save(tmp_path / "u")) == 0


@pytest.mark.parametrize(
    "wrong", [{"rows_per_batch": 0}, {"rows_per_shard": 0}, {"workers": 0}, {"seed": -1}, {"part": (2, 2)}]
)
def test_settings_that_cannot_be_leave_nothing(tmp_path, adata, wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        CellStore.build(tmp_path / "s", adata, **wrong)
    assert not list(tmp_path.iterdir())


def test_odd_columns_of_var_do_not_end_a_build(tmp_path, adata):
    adata.var["complex"] = 1j
    adata.var["swapped"] = np.ones(40, ">f8")
    assert len(CellStore.build(tmp_path / "s", adata).genes) == 40
