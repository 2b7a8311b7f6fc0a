"""Stores on a server: what is fetched, kept, retried and refused, over http on the loopback."""

import multiprocessing
import pickle
import re
import shutil
import sys
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import pytest
import torch
from anndata import read_h5ad
from conftest import make_adata
from hypothesis import given
from hypothesis import strategies as st
from range_server import RangeServer
from torch.utils.data import DataLoader

from stformer_hf import (
    CellStore,
    GeneBertConfig,
    GeneBertForPhenotypicMLM,
    GeneTokenizer,
    collate_cells,
    estimate_gene_medians,
)
from stformer_hf.cli import main
from stformer_hf.cli.files import read
from stformer_hf.cli.runs import open_cells
from stformer_hf.store import block_cache, remote_files
from stformer_hf.store.block_cache import BlockCache
from stformer_hf.store.remote_files import Range, RemoteFolder

N_CELLS = 230
SHARD = "data-00002-of-00004.arrow"  # of cells 128 to 191
SEGMENT = 4096 + 8 * 512  # bytes of a segment of the cache, see `small_blocks_and_short_waits`


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder with a store of shards of 64 cells."""
    folder = tmp_path_factory.mktemp("served")
    adata = make_adata(N_CELLS, 400)
    adata.obs["score"] = np.where(np.arange(N_CELLS) % 7, np.linspace(0, 1, N_CELLS), np.nan)
    adata.obs["note"] = [None if i % 5 == 0 else f"note {i}" for i in range(N_CELLS)]
    adata.obs["is_new"] = np.arange(N_CELLS) % 3 == 0
    adata.obsp["near"] = adata.X[:, :1] @ adata.X[:, :1].T
    settings = {"rows_per_batch": 32, "rows_per_shard": 64, "neighbors": "near", "report": False}
    CellStore.build(folder / "store", adata, obs="all", **settings)
    CellStore.build(folder / "compact", adata, obs="all", compact=True, **settings)
    return folder


@pytest.fixture
def local(files):
    return CellStore(files / "store")


@pytest.fixture
def server(files, tmp_path):
    """A server of a copy of the folder."""
    with RangeServer(shutil.copytree(files, tmp_path / "files")) as server:
        yield server


@pytest.fixture
def remote(server, tmp_path):
    """Open the store on the server; blocks are as small as a few cells."""
    return CellStore(RemoteFolder(f"{server.address}/store", cache_dir=tmp_path / "cache"))


@pytest.fixture(autouse=True)
def small_blocks_and_short_waits(monkeypatch):
    monkeypatch.setattr(block_cache, "BLOCK_BYTES", 512)
    monkeypatch.setattr(block_cache, "SEGMENT_BLOCKS", 8)
    monkeypatch.setattr(block_cache, "_SECONDS", 0.0)
    monkeypatch.setattr(remote_files, "WAITS", (0.01,) * 3)


def same_cells(one: CellStore, other: CellStore, rows=slice(None)) -> bool:
    one, other = one.rows(rows), other.rows(rows)
    return one.dtype == other.dtype and np.array_equal(one.toarray(), other.toarray())


# ---------------------------------------------------------------------- reading


def test_a_remote_store_is_read_as_a_local_one(remote, local):
    assert len(remote) == len(local) == N_CELLS and remote.is_remote and not local.is_remote
    assert remote.gene_ids.tolist() == local.gene_ids.tolist()
    assert same_cells(remote, local)
    assert remote.obs.equals(local.obs) and remote.obs.dtypes.equals(local.obs.dtypes)
    assert remote.obs["note"].isna().sum() == N_CELLS / 5
    np.testing.assert_array_equal(remote.lengths, local.lengths)
    np.testing.assert_array_equal(remote.neighbors([5, 200]).toarray(), local.neighbors([5, 200]).toarray())
    assert {**remote[7]}.keys() == {**local[7]}.keys() and remote[7]["note"] == local[7]["note"]
    for side, cells in remote.train_test_split(0.2, by="is_new").items():
        assert same_cells(cells, local.train_test_split(0.2, by="is_new")[side])
    remote.verify()
    assert "http://127.0.0.1" in repr(remote)


def test_compact_rows_are_read_by_ranges_too(server, local, tmp_path):
    compact = CellStore(RemoteFolder(f"{server.address}/compact", cache_dir=tmp_path / "cache"))
    assert compact.is_compact and same_cells(compact, local)
    rows = np.random.default_rng(0).integers(0, N_CELLS, 50)
    assert same_cells(compact, local, rows)
    np.testing.assert_array_equal(compact.lengths, local.lengths)


@given(rows=st.lists(st.integers(-N_CELLS, N_CELLS - 1), max_size=40))
def test_any_rows_in_any_order_equal_the_local_ones(rows, remote, local):
    assert same_cells(remote, local, rows)
    batch, own = remote.__getitems__(rows), local.__getitems__(rows)
    for name in ("indptr", "genes", "counts", "cell_id"):
        np.testing.assert_array_equal(getattr(batch, name), getattr(own, name))
        assert getattr(batch, name).dtype == getattr(own, name).dtype
    for name in own.obs:
        assert [*map(repr, batch.obs[name])] == [*map(repr, own.obs[name])]


def test_opening_reads_headers_and_offsets_only(files, tmp_path, monkeypatch):
    big = make_adata(2000, 300)
    CellStore.build(tmp_path / "big", big, rows_per_batch=1000, report=False)
    size = (tmp_path / "big" / "data-00000-of-00001.arrow").stat().st_size
    monkeypatch.setattr(block_cache, "BLOCK_BYTES", 4096)
    with RangeServer(tmp_path) as server:
        store = CellStore(RemoteFolder(f"{server.address}/big", cache_dir=tmp_path / "cache"))
        fetched = sum(stop - start for _, _, start, stop in server.gets(".arrow"))
        assert fetched < 0.15 * size
        assert store.lengths.sum() == big.X.nnz
        assert sum(stop - start for _, _, start, stop in server.gets(".arrow")) == fetched  # nothing more
        server.forget()
        store.rows([700])
        assert 0 < sum(stop - start for _, _, start, stop in server.gets(".arrow")) <= 4 * 4096


def test_the_blocks_of_a_batch_are_fetched_at_once_and_kept(server, remote, local):
    rows = [3, 60, 150, 220]
    server.forget()
    assert same_cells(remote, local, rows)
    starts = [(name, start) for _, name, start, _ in server.gets()]
    assert starts and len(set(starts)) == len(starts)
    heads = [name for method, name, _, _ in server.requests if method == "HEAD"]
    assert sorted(heads) == sorted({name for name, _ in starts})  # one for each file, after its blocks
    server.forget()
    assert same_cells(remote, local, rows[::-1])
    assert same_cells(CellStore(remote.path.now()), local, rows)
    assert not server.gets(".arrow")  # also for another object, or process


def test_adjacent_blocks_are_one_request(server, remote, local):
    server.forget()
    assert same_cells(remote, local, slice(0, 32))
    assert max(stop - start for _, _, start, stop in server.gets()) > 2 * 512


def test_workers_read_a_remote_store(remote, local):
    def batches(store, workers: int) -> list:
        loader = DataLoader(store.select(range(60)), 20, collate_fn=collate_cells, num_workers=workers)
        return [{name: np.asarray(batch[name]).tolist() for name in sorted(batch)} for batch in loader]

    expected = batches(local, 0)
    assert repr(batches(remote, 0)) == repr(expected)
    assert repr(batches(remote, 2)) == repr(expected)


def test_a_forked_process_fetches_over_connections_of_its_own(server, remote, local):
    """Threads and connections do not survive a fork."""
    remote.rows([150])
    server.forget()
    forked = multiprocessing.get_context("fork").Process(
        target=lambda: sys.exit(0 if same_cells(remote, local, [3, 60, 220]) else 1)
    )
    forked.start()
    forked.join(20)
    forked.kill()  # if it hangs
    assert forked.exitcode == 0
    assert server.gets(".arrow")


def test_a_pickled_store_opens_from_the_cache_alone(server, remote, local):
    selection = remote.select([5, 150])
    selection.rows([0, 1])
    pickled = pickle.dumps(selection)
    server.forget()
    copy = pickle.loads(pickled)
    assert same_cells(copy, local.select([5, 150]))
    assert not server.requests


def test_a_remote_store_is_a_source(server, remote, local, tmp_path):
    address = f"{server.address}/store"
    copy = CellStore.build(tmp_path / "copy", [remote, local], obs="all", neighbors="neighbors", allow_duplicates=True)
    assert len(copy) == 2 * N_CELLS and same_cells(copy.select(range(N_CELLS)), local)
    copy = CellStore.build(tmp_path / "of_address", address, obs="all")
    assert same_cells(copy, local)
    assert same_cells(remote.select([9, 8]).save(tmp_path / "saved"), local.select([9, 8]))
    medians, expected = estimate_gene_medians(address), estimate_gene_medians(local)
    assert medians.medians == expected.medians


def test_tokens_of_a_remote_store(remote, local, tmp_path):
    tokenizer, rows = GeneTokenizer.from_store(local, bin_edges=[0.5, 1.5]), [150, 3, 9]
    tokens = remote.select(rows).tokenize(tokenizer, tmp_path / "tokens", obs=["cell_type", "note"])
    expected = local.select(rows).tokenize(tokenizer, tmp_path / "expected", obs=["cell_type", "note"])
    assert tokens[:] == expected[:] and tokens.features == expected.features
    notes = local.obs["note"].iloc[rows]
    assert tokens["note"][:] == notes.astype(object).where(notes.notna(), None).tolist()


def test_a_batch_reads_its_names_where_it_arrives(server, remote, local):
    pickled, folder = pickle.dumps(remote.__getitems__([3, 150])), server.folder / "store"
    folder.rename(server.folder / "aside")
    CellStore.build(folder, make_adata(N_CELLS, 300), report=False)
    with pytest.raises(ValueError, match="store was replaced after its cells were read"):
        pickle.loads(pickled)
    shutil.rmtree(folder)
    (server.folder / "aside").rename(folder)
    batch = pickle.loads(pickled)
    assert batch.gene_ids.tolist() == local.gene_ids.tolist() and batch.categories == local.categories


# ---------------------------------------------------------------------- the cache


def disk_bytes(folder) -> int:
    return sum(file.stat().st_blocks * 512 for file in folder.iterdir())


def test_the_cache_keeps_its_limit(server, local, tmp_path):
    cache, limit = tmp_path / "cache", 10 * SEGMENT
    remote = CellStore(RemoteFolder(f"{server.address}/store", cache_dir=cache, cache_bytes=limit))
    sizes = []
    for start in range(0, N_CELLS, 10):
        assert same_cells(remote, local, slice(start, start + 10))
        sizes.append(disk_bytes(cache))
    assert max(sizes) <= limit < 2 * min(sizes[5:])


def test_what_was_not_used_for_longest_is_removed(tmp_path):
    cache = BlockCache(tmp_path, 10 * SEGMENT)
    for number in range(11):
        cache.add(f"{number:032x}", 0, bytes(512))
        assert cache.read(f"{0:032x}", 0, 512) == bytes(512)
    kept = [number for number in range(11) if cache.read(f"{number:032x}", 0, 1) is not None]
    assert kept == [0, *range(3, 11)]


def test_files_of_others_in_the_folder_are_left_alone(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "thesis.txt").write_bytes(bytes(10 * SEGMENT))
    cache = BlockCache(tmp_path, 2 * SEGMENT)
    for number in range(5):
        cache.add(f"{number:032x}", 0, bytes(512))
    assert len(list(tmp_path.iterdir())) == 3 and cache.read(f"{4:032x}", 0, 1) is not None
    assert (tmp_path / "thesis.txt").stat().st_size == 10 * SEGMENT and (tmp_path / "data").is_dir()


def test_a_range_of_several_blocks_and_segments(tmp_path):
    cache, content = BlockCache(tmp_path, 10**9), bytes(range(256)) * 24
    for block in (0, 1, 7, 8, 11):
        cache.add("file", block, content[block * 512 : (block + 1) * 512])
    assert cache.read("file", 100, 1000) == content[100:1000]
    assert cache.read("file", 5700, 5704) == content[5700:5704]
    for missing in ((1000, 1025), (2000, 2001), (8 * 512 - 1, 8 * 512 + 1)):  # the last in two segments
        assert cache.read("file", *missing) is None
    assert cache.read("other", 0, 1) is None


def test_a_damaged_block_is_fetched_again(server, remote, local, tmp_path):
    assert same_cells(remote, local)
    for file in (tmp_path / "cache").iterdir():
        with open(file, "r+b") as segment:
            segment.seek(4096 + 700)
            segment.write(bytes(300))  # as after a power failure
    server.forget()
    assert same_cells(CellStore(remote.path.now()), local)
    assert server.gets(".arrow")
    server.forget()
    assert same_cells(CellStore(remote.path.now()), local)
    assert not server.gets(".arrow")


def reads_equal_cells(address: str, path, cache, seed: int) -> bool:
    local = CellStore(path)
    remote = CellStore(RemoteFolder(address, cache_dir=cache, cache_bytes=10 * SEGMENT))
    rng = np.random.default_rng(seed)
    return all(same_cells(remote, local, rng.integers(0, len(local), 12)) for _ in range(30))


def test_processes_share_a_cache_that_is_too_small(server, files, tmp_path):
    shared = (f"{server.address}/store", files / "store", tmp_path / "cache")
    with ProcessPoolExecutor(2, multiprocessing.get_context("fork")) as pool:
        running = [pool.submit(reads_equal_cells, *shared, seed) for seed in (1, 2)]
        assert [process.result() for process in running] == [True, True]
    assert disk_bytes(tmp_path / "cache") <= 11 * SEGMENT


# ---------------------------------------------------------------------- failures


def test_a_lost_connection_is_tried_again(server, remote, local, caplog):
    server.drop.update({SHARD: 2})
    server.forget()
    assert same_cells(remote, local, [150])
    assert sum("trying again in" in message for message in caplog.messages) == 2
    assert SHARD in caplog.text


def test_a_busy_server_is_asked_again_and_then_named(server, remote):
    server.status[SHARD] = 503
    with pytest.raises(ConnectionError, match=r"store/data-00002.*lost 4 times.*503.*try again"):
        remote.rows([150])
    assert len(server.gets(SHARD)) >= 4
    del server.status[SHARD]
    remote.rows([150])


def test_refused_and_missing_files_are_not_asked_for_again(server, remote, tmp_path):
    server.forget()
    server.status[SHARD] = 403
    with pytest.raises(PermissionError, match="data-00002.*refuses access.*storage_options"):
        remote.rows([150])
    with pytest.raises(FileNotFoundError, match=r"no CellStore at http.*/nothing"):
        CellStore(RemoteFolder(f"{server.address}/nothing", cache_dir=tmp_path / "cache"))
    assert len(server.gets("manifest.json")) == 1
    server.status.clear()
    (server.folder / "store" / SHARD).unlink()
    with pytest.raises(FileNotFoundError, match="data-00002"):
        CellStore(remote.path.now())


@pytest.mark.parametrize("change", ["same size", "shorter"])
def test_a_shard_that_was_replaced_is_noticed(server, remote, local, change, tmp_path):
    rows = [150, 151]
    assert same_cells(remote, local, rows)
    shard = server.folder / "store" / SHARD
    content = bytearray(shard.read_bytes())
    content[-6000:-3000] = bytes(3000)
    shard.write_bytes(content if change == "same size" else content[:3000])
    assert same_cells(remote, local, rows)  # from the cache
    kept = {file: file.read_bytes() for file in tmp_path.joinpath("cache").iterdir()}
    for _ in range(2):
        with pytest.raises(ValueError, match=r"data-00002-of-00004.arrow was replaced .*open the store again"):
            remote.rows(slice(128, 192))
    assert kept == {file: file.read_bytes() for file in tmp_path.joinpath("cache").iterdir()}
    if change == "shorter":
        with pytest.raises(ValueError, match="has 3000 bytes instead of"):
            CellStore(remote.path.now())
    else:
        with pytest.raises(ValueError, match="damaged: its checksum"):
            CellStore(remote.path.now()).verify()


def test_a_store_that_was_replaced_is_noticed_and_opens_with_its_new_cells(server, remote, local, tmp_path):
    assert same_cells(remote, local)
    remote.must_be_unchanged()
    shutil.rmtree(server.folder / "store")
    new = CellStore.build(server.folder / "store", make_adata(N_CELLS, 400, seed=5), rows_per_shard=64, report=False)
    with pytest.raises(ValueError, match="was replaced after this object opened it"):
        remote.must_be_unchanged()
    assert same_cells(CellStore(remote.path.now()), new)


def test_without_etags_the_manifest_tells_versions_apart(server, tmp_path):
    server.etags = False
    adata, folder = make_adata(N_CELLS, 400), server.folder / "store"
    old = CellStore.build(folder, adata, overwrite=True, report=False)
    remote = RemoteFolder(f"{server.address}/store", cache_dir=tmp_path / "cache")
    assert same_cells(CellStore(remote), old)
    sizes = [shard["bytes"] for shard in old.manifest["shards"]]
    adata.X.data[:] = adata.X.data[::-1].copy()
    new = CellStore.build(folder, adata, overwrite=True, report=False)
    assert [shard["bytes"] for shard in new.manifest["shards"]] == sizes  # nor does the size tell
    assert same_cells(CellStore(remote.now()), new)


def test_a_server_that_reads_no_ranges_is_refused(server, tmp_path):
    server.ranges = False
    with pytest.raises(ValueError, match="^(?!.*damaged).*does not support range requests"):
        CellStore(RemoteFolder(f"{server.address}/store", cache_dir=tmp_path / "cache"))


def test_what_writes_is_refused(remote, server, adata, tmp_path):
    with pytest.raises(ValueError, match=r"on a server and cannot be changed: copy it first"):
        remote.append(adata)
    with pytest.raises(ValueError, match=r"on a server and cannot be joined"):
        CellStore.join(tmp_path / "joined", [remote.path])
    with pytest.raises(ValueError, match=r"on a server and cannot be opened as a datasets\.Dataset"):
        _ = remote.dataset
    with pytest.raises(ValueError, match="s3://bucket/new"):
        CellStore.build("s3://bucket/new", adata)


def test_missing_packages_are_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(ImportError, match=r"s3://bucket/store: .*pip install s3fs"):
        CellStore("s3://bucket/store")
    with pytest.raises(ValueError, match="nothing://bucket/store cannot be read: Protocol not known"):
        CellStore("nothing://bucket/store")
    with pytest.raises(ValueError, match=r"s3://bucket/a\.h5ad: only local files"):
        CellStore("s3://bucket/a.h5ad")


def test_ranges_of_any_shape(server, files, tmp_path):
    content = (files / "store" / "genes.parquet").read_bytes()
    folder = RemoteFolder(f"{server.address}/store", cache_dir=tmp_path / "cache")
    folder.pin([{"file": "genes.parquet", "bytes": len(content), "checksum": ""}])
    spans = [(0, 0), (5, 5), (0, len(content)), (511, 513), (512, 1024), (700, 701), (100, 1500), (0, 1)]
    file = folder / "genes.parquet"
    assert folder.read([Range(file, *span) for span in spans]) == [content[slice(*span)] for span in spans]


# ---------------------------------------------------------------------- commands


def test_commands_take_an_address(server, local, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("STFORMER_HF_CACHE", str(tmp_path / "cache"))
    address = f"{server.address}/store"
    assert main(["info", address]) == 0
    assert re.search(r"cells \(CellStore\)\ncells +230", capsys.readouterr().out)
    tokenizer = GeneTokenizer.from_store(local, phenotypes=["cell_type"], bin_edges=[0.5, 1.5])
    torch.manual_seed(0)
    config = GeneBertConfig.from_tokenizer(tokenizer, num_hidden_layers=1, num_attention_heads=2, hidden_size=16)
    model = GeneBertForPhenotypicMLM(config)
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "model")
    for data in (address, str(local.path)):
        output = tmp_path / f"{data == address}.h5ad"
        assert main(["embed", "--data", data, "--model", str(tmp_path / "model"), "--output", str(output)]) == 0
    embedded, expected = read_h5ad(tmp_path / "True.h5ad"), read_h5ad(tmp_path / "False.h5ad")
    np.testing.assert_array_equal(embedded.obsm["X_stformer"], expected.obsm["X_stformer"])
    store = open_cells([address], None, None, None, False)  # of pretrain and finetune
    assert store.is_remote and same_cells(store, local)
    assert any((tmp_path / "cache").iterdir())
    with pytest.raises(ValueError, match=r"copy it with CellStore\('http.*/store'\)\.save"):
        read(address)  # for the commands that take no store
