"""CellStore: what is written is what is read, and what is broken is not opened."""

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from conftest import make_adata, with_genes
from datasets import ClassLabel, load_from_disk
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import sparse
from torch.utils.data import DataLoader

from stformer_hf import CellStore
from stformer_hf.store import writer as store_writer


def dense(store, index) -> np.ndarray:
    return store.rows(index).toarray()


def test_rows_are_the_counts_in_the_order_asked_for(store, adata):
    index = [5, 0, 5, -1, 3]
    rows = store.rows(index)
    assert rows.shape == (5, adata.n_vars)
    np.testing.assert_array_equal(rows.toarray(), adata.X.toarray()[index])
    np.testing.assert_array_equal(dense(store, slice(2, 20, 3)), adata.X.toarray()[2:20:3])
    mask = adata.obs["age"].to_numpy() > 50
    np.testing.assert_array_equal(dense(store, mask), adata.X.toarray()[mask])
    assert store.rows([]).shape == (0, adata.n_vars)


@pytest.mark.parametrize("index", [[60], [-61], [0, 1000]])
def test_rows_outside_raise(store, index):
    with pytest.raises(IndexError, match="outside the store of 60 cells"):
        store.rows(index)


def test_a_mask_of_another_length_and_fractional_rows_raise(store):
    with pytest.raises(IndexError, match="mask has 3 values"):
        store.rows(np.array([True, False, True]))
    with pytest.raises(IndexError, match="integers"):
        store.rows([0.5])


def test_a_mask_that_is_a_series_is_that_of_the_cells_it_names(store):
    mask = store.obs["age"] > 50
    expected = store.obs_names[mask.to_numpy()]
    assert 0 < len(expected) < len(store)
    for same in (mask, mask.to_numpy(), mask.reset_index(drop=True), mask.astype("boolean")):
        assert store.select(same).obs_names.tolist() == expected.tolist()
    shuffled = mask.sample(frac=1, random_state=0)
    with pytest.raises(IndexError, match="another index than obs"):
        store.select(shuffled)
    assert store.select(shuffled.loc[store.obs.index]).obs_names.tolist() == expected.tolist()


def test_rows_are_copies(store, adata):
    rows = store.rows([0])
    rows.data[:] = 9
    np.testing.assert_array_equal(dense(store, [0]), adata.X.toarray()[[0]])
    with pytest.raises(TypeError, match="read-only"):
        store._rows._cells._values[1][0][0] = 1


def test_obs_and_lengths_and_genes(store, adata):
    assert store.obs["cell_type"].tolist() == adata.obs["cell_type"].tolist()
    assert store.obs["cell_type"].cat.categories.tolist() == ["B cell", "T cell"]
    assert store.obs["age"].tolist() == adata.obs["age"].tolist()
    assert store.obs.index.tolist() == adata.obs_names.tolist()
    assert store.lengths.tolist() == (adata.X.toarray() > 0).sum(1).tolist()
    assert store.gene_ids.tolist() == adata.var_names.tolist()
    assert len(store) == 60
    assert "60 cells, 40 genes, obs: cell_type, age" in repr(store)


def test_one_cell_is_a_dictionary(store, adata):
    cell = store[-2]
    values = adata.X.toarray()[58]
    assert cell["genes"].tolist() == np.flatnonzero(values).tolist()
    assert cell["counts"].tolist() == values[values > 0].tolist()
    assert cell["cell_id"] == 58
    assert cell["obs_name"] == "cell58"
    assert cell["cell_type"] == adata.obs["cell_type"].iloc[58]
    with pytest.raises(TypeError, match="row number"):
        store["cell58"]


def test_values_of_one_cell_keep_their_types(tmp_path, adata):
    adata.obs["score"] = 0.5
    cell = CellStore.build(tmp_path / "s", adata, obs=["age", "score"])[0]
    assert isinstance(cell["age"], np.integer) and isinstance(cell["score"], np.floating)


def test_hugging_face_opens_it(store, adata):
    dataset = load_from_disk(str(store.path))
    assert dataset.num_rows == 60
    assert isinstance(dataset.features["cell_type"], ClassLabel)
    assert dataset.features["cell_type"].names == ["B cell", "T cell"]
    assert dataset.features["counts"].feature.dtype == "uint8"
    row = dataset[7]
    values = adata.X.toarray()[7]
    assert row["genes"] == np.flatnonzero(values).tolist()
    assert row["counts"] == values[values > 0].tolist()
    assert store.dataset[7] == row


@pytest.mark.parametrize("n_workers", [0, 2])
def test_data_loader_gives_cell_batches(store, adata, n_workers):
    loader = DataLoader(store, batch_size=16, collate_fn=lambda batch: batch, num_workers=n_workers)
    batches = list(loader)
    assert [len(batch) for batch in batches] == [16, 16, 16, 12]
    batch = batches[1]
    assert batch.cell_id.tolist() == list(range(16, 32))
    rows = sparse.csr_matrix((batch.counts, batch.genes, batch.indptr), shape=(16, 40))
    np.testing.assert_array_equal(rows.toarray(), adata.X.toarray()[16:32])
    names = np.array(batch.categories["cell_type"])[batch.obs["cell_type"]]
    assert names.tolist() == adata.obs["cell_type"].tolist()[16:32]


def test_pickle_takes_the_path_only(store):
    pickled = pickle.dumps(store)
    assert len(pickled) < 5_000
    np.testing.assert_array_equal(dense(pickle.loads(pickled), [1, 2]), dense(store, [1, 2]))


@pytest.mark.parametrize(
    ("largest", "name"), [(255, "uint8"), (256, "uint16"), (65_536, "uint32"), (4_294_967_295, "uint32")]
)
def test_counts_take_the_narrowest_type_whenever_the_largest_comes(tmp_path, largest, name):
    # The large count comes last, when shards of a narrower type are written already.
    counts = np.ones((50, 3))
    counts[-1, 1] = largest
    store = CellStore.build(
        tmp_path / "s", with_genes(AnnData(sparse.csr_matrix(counts))), rows_per_batch=4, rows_per_shard=8
    )
    assert store.manifest["count_type"] == name
    assert load_from_disk(str(store.path)).features["counts"].feature.dtype == name
    assert len(store.manifest["shards"]) > 5
    np.testing.assert_array_equal(dense(store, slice(None)), counts)
    store.verify()


def test_counts_over_32_bits_raise(tmp_path):
    with pytest.raises(ValueError, match="does not fit into 32 bits"):
        CellStore.build(tmp_path / "s", with_genes(AnnData(sparse.csr_matrix(np.array([[2.0**33]])))))


def test_fractions_only_where_allowed(tmp_path, adata):
    adata.X = adata.X * 0.5
    with pytest.raises(ValueError, match="fractional values"):
        CellStore.build(tmp_path / "s", adata)
    store = CellStore.build(tmp_path / "s", adata, fractional=True)
    assert store.manifest["count_type"] == "float32"
    np.testing.assert_array_equal(dense(store, slice(None)), adata.X.toarray())


def test_whole_numbers_that_float32_does_not_hold_may_not_stand_beside_fractions(tmp_path):
    exact = with_genes(AnnData(sparse.csr_matrix(np.array([[0.5, 2.0**25]]))))
    assert dense(CellStore.build(tmp_path / "s", exact, fractional=True), [0]).tolist() == [[0.5, 2.0**25]]
    large, small = (with_genes(AnnData(sparse.csr_matrix(np.array([[value]])))) for value in (2.0**25 + 1, 0.5))
    for number, cells in enumerate(
        [with_genes(AnnData(np.array([[0.5, 2.0**25 + 1]]))), [large, small], [small, large]]
    ):
        with pytest.raises(ValueError, match="fractions.* float32 cannot hold"):
            CellStore.build(tmp_path / f"t{number}", cells, fractional=True)
        assert not (tmp_path / f"t{number}").exists()


def test_the_input_is_not_changed(tmp_path, adata):
    adata.X.data[::7] = 0  # explicit zeros
    adata.X.has_sorted_indices = False
    before = adata.X.copy()
    CellStore.build(tmp_path / "s", adata)
    for name in ("data", "indices", "indptr"):
        np.testing.assert_array_equal(getattr(adata.X, name), getattr(before, name))


def test_files_unite_by_gene_id(tmp_path):
    a, b = make_adata(10, 6, seed=1), make_adata(8, 6, seed=2)
    b.var_names = ["ENSG00000000005.2", "ENSG00000000003.1", *b.var_names[2:5].str.replace("ENSG", "ENSG9"), "other"]
    b.obs_names = [f"b{i}" for i in range(8)]
    a.write_h5ad(tmp_path / "a.h5ad")
    store = CellStore.build(tmp_path / "s", [tmp_path / "a.h5ad", b], obs=["cell_type"])
    frames = [x.to_df().rename(columns=lambda gene: gene.split(".")[0]) for x in (a, b)]
    expected = pd.concat(frames).fillna(0)
    np.testing.assert_array_equal(dense(store, slice(None)), expected[store.gene_ids].to_numpy())
    assert sorted(store.gene_ids) == sorted(expected.columns)


def test_repeated_gene_ids_are_summed_with_a_warning(tmp_path, adata, caplog):
    adata.var_names = [f"ENSG{i % 20:011d}" for i in range(40)]
    counts = adata.X.toarray()
    store = CellStore.build(tmp_path / "s", adata)
    np.testing.assert_array_equal(dense(store, slice(None)), counts[:, :20] + counts[:, 20:])
    assert "20 columns repeat the gene id" in caplog.text


def test_sums_of_repeated_genes_do_not_wrap(tmp_path):
    counts = AnnData(sparse.csr_matrix(np.array([[200, 100]], np.uint8)))
    counts.var_names = ["g", "g"]
    assert dense(CellStore.build(tmp_path / "s", counts), [0]).tolist() == [[300]]


def test_categories_unite_and_missing_ones_stay_missing(tmp_path):
    a, b = make_adata(5, 4, seed=1), make_adata(5, 4, seed=2)
    a.obs["kind"] = ["x", "y", None, "x", "y"]
    b.obs["kind"] = pd.Categorical(["z", "x", "z", None, "z"])
    store = CellStore.build(tmp_path / "s", [a, b], obs=["kind"])
    assert store.categories["kind"] == ["x", "y", "z"]
    kinds = store.obs["kind"].astype(object)
    assert kinds.where(kinds.notna(), None).tolist() == ["x", "y", None, "x", "y", "z", "x", "z", None, "z"]
    assert store.__getitems__([2, 5]).obs["kind"].tolist() == [-1, 2]
    assert load_from_disk(str(store.path))[2]["kind"] is None


@pytest.mark.parametrize("n_classes", [128, 129, 256, 257])
def test_classes_of_any_number_keep_their_codes(tmp_path, n_classes):
    """Codes of few bytes: 127 and 255 are the largest of one."""
    cells = make_adata(n_classes + 1, 4)
    cells.obs["clone"] = pd.Categorical([f"c{i:03}" for i in range(n_classes)] + [None])
    store = CellStore.build(tmp_path / "s", cells, obs=["clone"])
    assert store.obs["clone"].cat.codes.tolist() == [*range(n_classes), -1]
    assert store.__getitems__(range(n_classes + 1)).obs["clone"].tolist() == [*range(n_classes), -1]


def test_missing_and_clashing_obs_columns_raise(tmp_path, adata):
    with pytest.raises(ValueError, match="no obs column 'donor'; it has cell_type, age"):
        CellStore.build(tmp_path / "s", adata, obs=["donor"])
    adata.obs["genes"] = 1
    with pytest.raises(ValueError, match="the store uses this name"):
        CellStore.build(tmp_path / "s", adata, obs=["genes"])
    other = make_adata(seed=5)
    other.obs["age"] = "old"
    with pytest.raises(ValueError, match="'age' has different types"):
        CellStore.build(tmp_path / "s", [adata, other], obs=["age"])


def test_cells_without_counts_are_kept_and_told(tmp_path, adata, caplog):
    store = CellStore.build(tmp_path / "s", adata)
    assert len(store) == 60
    assert store.lengths[3] == 0
    assert "1 of 60 cells have no counts" in caplog.text


def test_nothing_that_was_there_is_lost(store, adata, tmp_path):
    with pytest.raises(FileExistsError, match="overwrite=True"):
        CellStore.build(store.path, adata)
    bad = adata.copy()
    bad.X = bad.X * 0.3
    with pytest.raises(ValueError):
        CellStore.build(store.path, bad, overwrite=True)
    np.testing.assert_array_equal(dense(CellStore(store.path), slice(None)), adata.X.toarray())
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1").write_text("dear")
    with pytest.raises(FileExistsError, match="not a store"):
        CellStore.build(tmp_path / "thesis", adata, overwrite=True)
    assert (tmp_path / "thesis" / "chapter1").read_text() == "dear"


def test_overwrite_replaces(store, adata):
    other = make_adata(7, 5, seed=3)
    assert len(CellStore.build(store.path, other, overwrite=True)) == 7
    assert [path.name for path in store.path.parent.iterdir()] == ["store"]


def test_a_cut_shard_and_a_flipped_bit_are_found(store):
    shard = store.path / store.manifest["shards"][0]["file"]
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    with pytest.raises(ValueError, match=f"{shard.name} is damaged"):
        CellStore(store.path).verify()
    shard.write_bytes(data[:-100])
    with pytest.raises(ValueError, match="truncated"):
        CellStore(store.path)


def test_no_store_and_a_newer_store_raise(store, tmp_path):
    with pytest.raises(FileNotFoundError, match="no CellStore"):
        CellStore(tmp_path / "nothing")
    manifest = json.loads((store.path / "manifest.json").read_text())
    manifest["format_version"] = 99
    (store.path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="store format 99.*Update stformer_hf"):
        CellStore(store.path)


def test_no_sources_raise(tmp_path):
    with pytest.raises(ValueError, match="No sources"):
        CellStore.build(tmp_path / "s", [])


BUILDS = """
import os, sys, time
import datasets
from stformer_hf import CellStore
from stformer_hf.store import shards, writer as store_writer

# Every block and checksum takes a moment, so that a build can be met in any phase of it.
write, checksum = shards.ShardWriter.write, store_writer.checksum
shards.ShardWriter.write = lambda *args: (time.sleep(0.02), write(*args))[1]
store_writer.checksum = lambda path: (time.sleep(0.06), checksum(path))[1]
for _ in sys.stdin:  # a build for every line, in a process of its own
    child = os.fork()
    if not child:
        CellStore.build(sys.argv[1], sys.argv[2:], rows_per_batch=10, rows_per_shard=30, shuffle=True)
        os._exit(0)
    print(child, flush=True)
    os.waitpid(child, 0)
    print("ended", flush=True)
"""


@pytest.mark.slow  # several seconds
def test_a_build_killed_at_ten_random_moments_leaves_no_store_and_goes_on(tmp_path, monkeypatch):
    files = []
    for i in range(3):
        files.append(tmp_path / f"{i}.h5ad")
        make_adata(100, 20, seed=i).write_h5ad(files[-1])
    path = tmp_path / "store"
    rng = np.random.default_rng(0)
    n_done = []
    command = [sys.executable, "-c", BUILDS, str(path), *map(str, files)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as builds:
        for i in range(10):
            builds.stdin.write("go\n")
            builds.stdin.flush()
            child = int(builds.stdout.readline())
            time.sleep(rng.uniform(0.05, 0.5))  # all blocks take 0.8 s, all checksums 0.7 s
            while i == 9 and not list((tmp_path / ".store.building").glob("source-*.json")):
                time.sleep(0.01)  # on a slow machine
            os.kill(child, signal.SIGKILL)
            assert builds.stdout.readline() == "ended\n"
            with pytest.raises(FileNotFoundError, match="its build was interrupted|no CellStore"):
                CellStore(path)
            n_done.append(len(list((tmp_path / ".store.building").glob("source-*.json"))))
        builds.stdin.close()
    assert n_done == sorted(n_done) and n_done[-1] > 0  # what is done stays done
    written = []
    write_piece = store_writer.write_piece
    monkeypatch.setattr(
        store_writer, "write_piece", lambda piece, *args: written.append(piece) or write_piece(piece, *args)
    )
    store = CellStore.build(path, files, rows_per_batch=10, rows_per_shard=30, shuffle=True)
    assert len(written) == 12 - n_done[-1]  # four pieces a file
    expected = np.concatenate([make_adata(100, 20, seed=i).X.toarray() for i in range(3)])
    assert sorted(map(tuple, dense(store, slice(None)))) == sorted(map(tuple, expected))
    store.verify()
    assert not (tmp_path / ".store.building").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.h5ad", "1.h5ad", "2.h5ad", "store"]


def test_an_interrupted_build_of_a_selection_resumes_with_these_cells_alone(store, tmp_path, monkeypatch):
    written, write_piece = [], store_writer.write_piece

    def stop_at_second(piece, *args):
        if len(written) == 1:
            raise KeyboardInterrupt
        written.append(piece.start)
        return write_piece(piece, *args)

    for resumed, pieces in ((store.select(range(40)), [20]), (store.select(range(20, 60)), [0, 20])):
        written.clear()
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(store_writer, "write_piece", stop_at_second)
            CellStore.build(tmp_path / "s", store.select(range(40)), rows_per_shard=20)
        written.clear()
        with monkeypatch.context() as patch:
            patch.setattr(
                store_writer, "write_piece", lambda piece, *a: written.append(piece.start) or write_piece(piece, *a)
            )
            built = CellStore.build(tmp_path / "s", resumed, rows_per_shard=20)
        assert written == pieces
        np.testing.assert_array_equal(dense(built, slice(None)), dense(resumed, slice(None)))
        shutil.rmtree(tmp_path / "s")


@pytest.fixture
def stop_while_finishing(monkeypatch):
    """Make the next build stop in its last phase, when some shards have their final names."""
    checksum, calls = store_writer.checksum, []

    def stop(path):
        calls.append(path)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return checksum(path)

    monkeypatch.setattr(store_writer, "checksum", stop)


def test_a_build_stopped_while_it_finished_goes_on(tmp_path, stop_while_finishing):
    make_adata(100, 20).write_h5ad(tmp_path / "a.h5ad")
    arguments = {"rows_per_batch": 10, "rows_per_shard": 20}
    with pytest.raises(KeyboardInterrupt):
        CellStore.build(tmp_path / "s", tmp_path / "a.h5ad", **arguments)
    store = CellStore.build(tmp_path / "s", tmp_path / "a.h5ad", **arguments)
    np.testing.assert_array_equal(dense(store, slice(None)), make_adata(100, 20).X.toarray())


@pytest.mark.parametrize("change", ["counts", "genes", "labels"])
def test_cells_in_memory_that_changed_since_a_build_was_stopped(tmp_path, stop_while_finishing, change):
    file, adata = tmp_path / "a.h5ad", make_adata(100, 20, seed=1)
    other = make_adata(30, 20)
    other.write_h5ad(file)
    arguments = {"obs": ["cell_type"], "rows_per_batch": 10, "rows_per_shard": 20}
    with pytest.raises(KeyboardInterrupt):
        CellStore.build(tmp_path / "s", [adata, file], **arguments)
    if change == "counts":
        adata.X = adata.X * 2
    elif change == "genes":
        adata.var_names = [f"{name}_new" for name in adata.var_names]
    else:
        adata.obs["cell_type"] = pd.Categorical(["new"] * 100)
    store = CellStore.build(tmp_path / "s", [adata, file], **arguments)
    table = pd.Index(store.gene_ids)
    for rows, cells in ((slice(0, 100), adata), (slice(100, 130), other)):
        counts = dense(store, rows)[:, table.get_indexer(cells.var_names)]
        np.testing.assert_array_equal(counts, cells.X.toarray())
        assert store.obs["cell_type"][rows].astype(str).tolist() == cells.obs["cell_type"].astype(str).tolist()


def test_a_changed_file_is_read_anew_after_a_killed_build(tmp_path):
    make_adata(30, 20, seed=1).write_h5ad(tmp_path / "a.h5ad")
    store = CellStore.build(tmp_path / "s", tmp_path / "a.h5ad")
    shutil.copytree(store.path, tmp_path / ".t.building")
    (tmp_path / ".t.building" / "source-00000-000000000.json").write_text("{}")
    (tmp_path / ".t.building" / "plan.json").write_text("{}")
    store = CellStore.build(tmp_path / "t", tmp_path / "a.h5ad")
    np.testing.assert_array_equal(dense(store, slice(None)), make_adata(30, 20, seed=1).X.toarray())


matrices = hnp.arrays(
    st.sampled_from([np.float32, np.float64, np.int32, np.uint16]),
    st.tuples(st.integers(0, 12), st.integers(1, 8)),
    elements=st.sampled_from([0, 0, 0, 1, 2, 254, 255, 256, 65_535]),
)


@given(
    counts=matrices, form=st.sampled_from(["csr", "csc", "dense", "unsorted"]), on_disk=st.booleans(), data=st.data()
)
def test_any_matrix_comes_back(tmp_path, counts, form, on_disk, data):
    names = data.draw(st.lists(st.sampled_from("abcdef"), min_size=counts.shape[1], max_size=counts.shape[1]))
    forms = {"csc": sparse.csc_matrix, "dense": np.array}
    matrix = forms.get(form, sparse.csr_matrix)(counts)
    if form == "unsorted" and matrix.nnz:
        for start, stop in zip(matrix.indptr, matrix.indptr[1:], strict=False):
            matrix.indices[start:stop] = matrix.indices[start:stop][::-1].copy()
            matrix.data[start:stop] = matrix.data[start:stop][::-1].copy()
        matrix.has_sorted_indices = False
    source = AnnData(matrix)
    source.var_names = names
    if on_disk:
        source.write_h5ad(tmp_path / "x.h5ad")
    given_source = tmp_path / "x.h5ad" if on_disk else source
    compact = data.draw(st.booleans())
    how = {"rows_per_batch": 5, "rows_per_shard": 5, "compact": compact, "overwrite": True}
    store = CellStore.build(tmp_path / "s", given_source, **how)
    expected = pd.DataFrame(counts.astype(np.float64), columns=source.var_names).T.groupby(level=0).sum().T
    assert sorted(store.gene_ids) == list(expected.columns)
    np.testing.assert_array_equal(dense(store, slice(None)), expected[store.gene_ids].to_numpy())
    picks = data.draw(st.lists(st.integers(0, max(len(counts) - 1, 0)), max_size=6)) if len(counts) else []
    np.testing.assert_array_equal(dense(store, picks), expected[store.gene_ids].to_numpy()[picks])


def test_pbmc_ifnb_equals_anndata(shared_data, tmp_path):
    from anndata import read_h5ad

    file = shared_data / "pbmc_ifnb.h5ad"
    store = CellStore.build(tmp_path / "s", file, obs=["condition"])
    adata = read_h5ad(file)
    assert store.gene_ids.tolist() == adata.var["ensembl_id"].tolist()
    repeated = adata.var["gene_symbol"].duplicated(keep=False)
    assert store.genes.symbols.tolist() == adata.var["gene_symbol"].where(~repeated, adata.var_names).tolist()
    assert (store.rows(slice(None)) != sparse.csr_array(adata.X)).nnz == 0
    assert store.obs["condition"].astype(str).tolist() == adata.obs["condition"].astype(str).tolist()


def test_obs_columns_of_other_types_come_back(tmp_path, adata):
    n = len(adata)
    adata.obs["barcode"] = [f"AAC{i}" for i in range(n)]
    adata.obs["doublet"] = adata.obs["age"] > 50
    adata.obs["score"] = np.where(np.arange(n) % 5, np.linspace(0, 1, n), np.nan)
    adata.obs["passage"] = pd.array([None if (i + 1) % 4 else i for i in range(n)], dtype="Int64")
    adata.obs["cluster"] = pd.Categorical(np.arange(n) % 3)
    names = ["barcode", "doublet", "score", "passage", "cluster"]
    for source in (adata, tmp_path / "a.h5ad"):
        if source is not adata:
            adata.write_h5ad(source)
        store = CellStore.build(tmp_path / "s", source, obs=names, overwrite=True)
        assert "barcode" not in store.categories and store.categories["cluster"] == ["0", "1", "2"]
        assert store.obs["barcode"].tolist() == adata.obs["barcode"].tolist()
        assert store.obs["doublet"].tolist() == adata.obs["doublet"].tolist()
        np.testing.assert_array_equal(store.obs["score"], adata.obs["score"])
        passage = store.obs["passage"].astype("Int64")
        assert passage.equals(adata.obs["passage"].astype("Int64"))
        assert store.obs["cluster"].astype(int).tolist() == adata.obs["cluster"].tolist()
        dataset = load_from_disk(str(store.path))
        assert dataset[3]["passage"] == 3 and dataset[4]["passage"] is None
        assert dataset[1]["doublet"] == bool(adata.obs["doublet"].iloc[1])


def test_overwrite_keeps_what_is_not_the_stores(store, adata):
    (store.path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="more than a store .notes.txt."):
        CellStore.build(store.path, adata, overwrite=True)
    assert (store.path / "notes.txt").read_text() == "mine"
    assert len(CellStore(store.path)) == 60


def test_a_changed_gene_table_is_noticed(store):
    table = store.path / "genes.parquet"
    frame = pd.read_parquet(table)
    content = bytearray(table.read_bytes())
    content[len(content) // 3] ^= 1
    table.write_bytes(content)
    with pytest.raises(ValueError, match="genes.parquet is damaged"):
        CellStore(store.path).verify()
    frame[:3].to_parquet(table)
    with pytest.raises(ValueError, match="genes.parquet has"):
        CellStore(store.path)


def test_explicit_zeros_are_not_stored(tmp_path):
    counts = sparse.csr_matrix((np.array([1.0, 0.0, 2.0, 0.0]), [0, 1, 1, 2], [0, 2, 4]), shape=(2, 3))
    store = CellStore.build(tmp_path / "s", with_genes(AnnData(counts)))
    assert store.lengths.tolist() == [1, 1]
    assert counts.nnz == 4  # the user's matrix is as it was


@pytest.mark.parametrize("setting", [{"obs": ["age"]}, {"fractional": True}, {"layer": "counts"}])
def test_an_interrupted_build_with_other_settings_begins_anew(tmp_path, stop_while_finishing, setting):
    adata = make_adata(100, 20)
    adata.layers["counts"] = adata.X * 2
    adata.write_h5ad(tmp_path / "a.h5ad")
    arguments = {"rows_per_batch": 10, "rows_per_shard": 20}
    with pytest.raises(KeyboardInterrupt):
        CellStore.build(tmp_path / "s", tmp_path / "a.h5ad", **arguments)
    (tmp_path / ".s.building" / "mark").touch()
    store = CellStore.build(tmp_path / "s", tmp_path / "a.h5ad", **arguments, **setting)
    assert not (store.path / "mark").exists()
    expected = adata.layers["counts"] if "layer" in setting else adata.X
    np.testing.assert_array_equal(dense(store, slice(None)), expected.toarray())
