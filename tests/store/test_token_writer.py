"""Tokens on disk: the same as the tokenizer's, cell by cell, whatever is stopped, killed, full or there before."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc

import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from conftest import make_adata
from datasets import ClassLabel, load_from_disk
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import sparse

from stformer_hf import CellStore, GeneTokenizer, collate_fn_wrapper
from stformer_hf.store import replacing, token_writer
from stformer_hf.store.shards import checksum

MEDIANS = {f"ENSG{i:011d}": 0.5 + (i * 7 % 11) for i in range(40)}
SCHEMES = {
    "bins": {"bin_edges": [0.5, 1.5, 3.5]},
    "bins and phenotypes": {"phenotypes": ["cell_type"], "bin_edges": [0.5, 1.5, 3.5]},
    "a random part of them": {"max_length": 9, "truncation": "random", "seed": 5},
    "ranks": {"scheme": "rank", "medians": MEDIANS},
    "the first ranks": {"scheme": "rank", "medians": MEDIANS, "max_length": 6},
    "ranks and phenotypes": {"scheme": "rank", "medians": MEDIANS, "phenotypes": ["cell_type"]},
    "bare ranks": {
        "scheme": "rank",
        "medians": MEDIANS,
        "special_tokens": {"pad_token": "<pad>", "mask_token": "<mask>"},
    },
}


@pytest.fixture
def batches_of_seven(monkeypatch):
    monkeypatch.setattr(token_writer, "ROWS_PER_BATCH", 7)


def one_by_one(store, tokenizer):
    """Tokens and token types of every cell, encoded alone."""
    tokens = [tokenizer.encode_cells(store.__getitems__([row]), epoch=0) for row in range(len(store))]
    return [cell.input_ids.tolist() for cell in tokens], [cell.token_type_ids.tolist() for cell in tokens]


def assert_holds(dataset, store, tokenizer):
    """The dataset's rows are the cells', in their order."""
    ids, types = one_by_one(store, tokenizer)
    assert dataset["input_ids"][:] == ids
    assert dataset["token_type_ids"][:] == types
    assert dataset["length"][:] == list(map(len, ids))
    assert dataset["cell_id"][:] == [store[row]["cell_id"] for row in range(len(store))]


def type_of(dataset, name):
    return dataset.features[name].feature.dtype


@pytest.fixture
def n_tokenized(monkeypatch):
    """Numbers of cells that are tokenized, a batch each."""
    tokenized, calls = token_writer.TokenShards._tokenized, []
    monkeypatch.setattr(
        token_writer.TokenShards, "_tokenized", lambda self, rows: calls.append(len(rows)) or tokenized(self, rows)
    )
    return calls


@pytest.mark.parametrize("scheme", SCHEMES)
def test_rows_are_the_tokens_of_the_cells(store, adata, tmp_path, batches_of_seven, scheme):
    tokenizer = GeneTokenizer.from_store(store, **SCHEMES[scheme])
    returned = store.tokenize(tokenizer, tmp_path / "t", rows_per_shard=16)
    dataset = load_from_disk(str(tmp_path / "t"))
    assert returned.features == dataset.features and len(returned) == len(dataset) == 60
    assert_holds(dataset, store, tokenizer)
    if "seed" not in SCHEMES[scheme]:  # by which cells of an AnnData are drawn in the same way
        assert dataset["input_ids"][:] == tokenizer(adata)["input_ids"]
    assert dataset.column_names == ["input_ids", "token_type_ids", "length", "cell_id"]
    batch = collate_fn_wrapper(tokenizer)([dataset[row] for row in (7, 3)])
    wanted = tokenizer(store.__getitems__([7, 3]), padding=True, return_tensors="pt")
    if "seed" not in SCHEMES[scheme]:
        assert all((batch[name] == wanted[name]).all() for name in wanted)
    assert type_of(dataset, "input_ids") == "uint16"
    assert [dataset.features[name].dtype for name in ("length", "cell_id")] == ["int32", "int64"]
    assert json.loads((tmp_path / "t" / "lengths.json").read_text()) == dataset["length"][:]
    again = GeneTokenizer.from_pretrained(tmp_path / "t" / "tokenizer")
    assert again.fingerprint == tokenizer.fingerprint
    assert one_by_one(store, again)[0] == dataset["input_ids"][:]


def test_the_manifest_tells_what_the_folder_holds(store, tokenizer, tmp_path):
    tokenizer.truncation, tokenizer.seed = "random", 3
    dataset = store.tokenize(tokenizer, tmp_path / "t", obs=["age"], rows_per_shard=16)
    manifest = json.loads((tmp_path / "t" / "manifest.json").read_text())
    assert manifest["complete"] and manifest["store"] == "store" and manifest["n_cells"] == 60
    assert manifest["n_tokens"] == sum(dataset["length"]) and manifest["obs"] == ["age"]
    assert manifest["tokenizer"] == {
        "fingerprint": tokenizer.fingerprint,
        "scheme": "binned",
        "max_length": 2048,
        "truncation": "random",
        "seed": 3,
    }
    assert [shard["rows"] for shard in manifest["shards"]] == [16, 16, 16, 12]
    for shard in manifest["shards"]:
        file = tmp_path / "t" / shard["file"]
        assert (file.stat().st_size, checksum(file)) == (shard["bytes"], shard["checksum"])
    assert str(tmp_path) not in (tmp_path / "t" / "manifest.json").read_text()
    files = {"lengths.json", "tokenizer", "manifest.json", "dataset_info.json", "state.json"}
    assert {path.name for path in (tmp_path / "t").iterdir()} == files | {
        f"data-{i:05d}-of-00004.arrow" for i in range(4)
    }
    assert {path.name for path in tmp_path.iterdir()} == {"store", "t"}


@pytest.mark.parametrize(
    ("n_genes", "scheme", "column", "expected"),
    [
        (255, "binned", "token_type_ids", "uint8"),  # and type 0
        (256, "binned", "token_type_ids", "uint16"),
        (65_535, "binned", "token_type_ids", "uint16"),
        (65_536, "binned", "token_type_ids", "uint32"),
        (65_532, "rank", "input_ids", "uint16"),  # and four special tokens
        (65_533, "rank", "input_ids", "uint32"),
    ],
)
def test_types_are_as_narrow_as_the_vocabulary_allows(tmp_path, n_genes, scheme, column, expected):
    adata = AnnData(sparse.csr_matrix(([3.0, 1.0], ([0, 1], [n_genes - 1, 0])), shape=(2, n_genes), dtype=np.float32))
    adata.var_names = [f"ENSG{i:011d}" for i in range(n_genes)]
    store = CellStore.build(tmp_path / "s", adata)
    medians = dict.fromkeys(adata.var_names, 1.0) if scheme == "rank" else None
    tokenizer = GeneTokenizer.from_store(store, scheme, medians=medians)
    dataset = store.tokenize(tokenizer, tmp_path / "t")
    assert type_of(dataset, column) == expected
    assert_holds(dataset, store, tokenizer)  # the last gene's id, or type, is the largest


# ---------------------------------------------------------------------- obs


def test_obs_columns_are_those_of_the_store(tmp_path, batches_of_seven):
    a, b = make_adata(20), make_adata(20, seed=1)
    a.obs["big"] = 2**60 + np.arange(20)  # float64 does not hold them, and cells of b have none
    a.obs["score"] = np.where(np.arange(20) % 3, np.linspace(0, 1, 20), np.nan)
    a.obs["flag"] = np.arange(20) % 2 == 0
    b.obs["date"] = pd.date_range("2026-01-01", periods=20)
    b.obs["name"] = [f"note {i}" for i in range(20)]
    b.obs.loc[b.obs_names[4], "cell_type"] = None
    store = CellStore.build(tmp_path / "s", [a, b], obs="all")
    tokenizer = GeneTokenizer.from_store(store)
    dataset = store.tokenize(tokenizer, tmp_path / "t", obs="all", rows_per_shard=16)
    assert dataset.column_names[4:] == ["cell_type", "age", "big", "score", "flag", "date", "name"]
    for name in dataset.column_names[4:]:
        assert dataset.features[name] == store.dataset.features[name]
        assert dataset[name][:] == store.dataset[name][:]
    assert isinstance(dataset.features["cell_type"], ClassLabel)
    assert dataset.features["cell_type"].names == ["B cell", "T cell"]
    assert dataset["cell_type"][24] is None and dataset["big"][1] == 2**60 + 1 and dataset["big"][30] is None
    chosen = store.tokenize(tokenizer, tmp_path / "u", obs="age")
    assert chosen.column_names[4:] == ["age"]
    chosen = store.tokenize(tokenizer, tmp_path / "v", obs=["age", "cell_type"])
    assert chosen.column_names[4:] == ["age", "cell_type"]


def test_obs_columns_that_cannot_be_copied(tmp_path, adata, caplog):
    adata.obs["length"] = 1.5
    store = CellStore.build(tmp_path / "s", adata, obs="all")
    tokenizer = GeneTokenizer.from_store(store)
    with pytest.raises(ValueError, match=r"There is no obs\['donor'\]; obs has 'cell_type', 'age', 'length'"):
        store.tokenize(tokenizer, tmp_path / "t", obs=["donor"])
    with pytest.raises(ValueError, match="'length': the tokens use this name"):
        store.tokenize(tokenizer, tmp_path / "t", obs=["length"])
    assert not (tmp_path / "t").exists() and not (tmp_path / ".t.building").exists()
    dataset = store.tokenize(tokenizer, tmp_path / "t", obs="all")
    assert dataset.column_names[4:] == ["cell_type", "age"] and "length is not copied" in caplog.text
    assert_holds(dataset, store, tokenizer)


# ---------------------------------------------------------------------- selections


def test_a_selection_keeps_its_order_and_the_row_numbers(store, tokenizer, tmp_path, batches_of_seven):
    index = [50, 3, 3, *range(20, 40), 0, 59]
    chosen = store.select(index)
    dataset = chosen.tokenize(tokenizer, tmp_path / "t", obs="all", rows_per_shard=10)
    assert dataset["cell_id"][:] == index
    assert_holds(dataset, chosen, tokenizer)
    for name in ("cell_type", "age"):
        assert dataset[name][:] == [store.dataset[row][name] for row in index]


def test_neighbourhoods_follow_the_cells(tmp_path, adata, batches_of_seven):
    adata.obsp["graph"] = sparse.random(60, 60, 0.1, "csr", np.float32, np.random.default_rng(0))
    store = CellStore.build(tmp_path / "s", adata, neighbors="graph")
    tokenizer = GeneTokenizer.from_store(store, "rank", medians=MEDIANS, neighborhood=True)
    around = store.with_neighborhoods()
    dataset = around.tokenize(tokenizer, tmp_path / "t", rows_per_shard=16)
    assert type_of(dataset, "token_type_ids") == "uint8"
    assert {kind for cell in dataset["token_type_ids"] for kind in cell} == {0, 1, 2}
    assert_holds(dataset, around, tokenizer)
    few = around.select([5, 40, 41, 7, 59])
    assert_holds(few.tokenize(tokenizer, tmp_path / "u"), few, tokenizer)
    with pytest.raises(ValueError, match="with_neighborhoods"):
        store.tokenize(tokenizer, tmp_path / "v")
    assert not (tmp_path / "v").exists()


matrices = hnp.arrays(
    np.int64,
    st.tuples(st.integers(0, 10), st.integers(1, 6)),
    elements=st.sampled_from([0, 0, 0, 1, 2, 3, 7, 300, 70_000, 2**32 - 1]),
)


@given(counts=matrices, rank=st.booleans(), data=st.data())
def test_any_cells_come_back(tmp_path, monkeypatch, counts, rank, data):
    """Against a loop over a dense matrix."""
    n_cells, n_genes = counts.shape
    names = [f"g{i}" for i in range(n_genes)]
    adata = AnnData(sparse.csr_matrix(counts), var=pd.DataFrame(index=names))
    rows = data.draw(st.none() | (st.lists(st.integers(0, n_cells - 1), max_size=8) if n_cells else st.just([])))
    rows_per_shard = data.draw(st.integers(1, 5))
    monkeypatch.setattr(token_writer, "ROWS_PER_BATCH", data.draw(st.integers(1, 4)))
    for name in ("s", "t"):
        shutil.rmtree(tmp_path / name, ignore_errors=True)
    store = CellStore.build(tmp_path / "s", adata, report=False)
    medians = {name: 1.0 + i % 3 for i, name in enumerate(names)}
    if rank:
        tokenizer = GeneTokenizer(names, scheme="rank", medians=medians)
    else:
        tokenizer = GeneTokenizer(names, bin_edges=[0.5, 2.5, 100])
    cells = store if rows is None else store.select(rows)
    dataset = cells.tokenize(tokenizer, tmp_path / "t", rows_per_shard=rows_per_shard)

    expected = []
    for cell in range(n_cells) if rows is None else rows:
        expressed = [gene for gene in range(n_genes) if counts[cell, gene] > 0]
        if rank:
            total = sum(map(int, counts[cell]))
            score = {gene: counts[cell, gene] / total * 1e4 / medians[names[gene]] for gene in expressed}
            ids = [4 + gene for gene in sorted(expressed, key=lambda gene, score=score: (-score[gene], gene))]
            types = [0] * len(expressed)
        else:  # ids of [CLS], [EOS], [MASK], [PAD], bin_0 … are 0, 1, 2, 3, 4 …
            ids = [4 + sum(counts[cell, gene] >= edge for edge in (0.5, 2.5, 100)) for gene in expressed]
            types = [1 + gene for gene in expressed]
        expected.append({"cell_id": cell, "input_ids": [0, *ids, 1], "token_type_ids": [0, *types, 0]})
    found = [{name: row[name] for name in ("cell_id", "input_ids")} for row in dataset]
    assert found == [{name: row[name] for name in ("cell_id", "input_ids")} for row in expected]
    if not rank:
        assert dataset["token_type_ids"][:] == [row["token_type_ids"] for row in expected]
    lengths = [len(row["input_ids"]) for row in expected]
    assert dataset["length"][:] == json.loads((tmp_path / "t" / "lengths.json").read_text()) == lengths
    n_rows = len(expected)
    assert len(list((tmp_path / "t").glob("*.arrow"))) == max(1, -(-n_rows // rows_per_shard))


def test_no_cells_are_a_dataset_too(tmp_path):
    store = CellStore.build(tmp_path / "s", make_adata(5)[:0].copy(), obs=["cell_type"])
    tokenizer = GeneTokenizer.from_store(store)
    dataset = store.tokenize(tokenizer, tmp_path / "t", obs="all")
    assert len(dataset) == 0 and dataset.column_names[-1] == "cell_type"
    assert dataset.features["input_ids"].feature.dtype == "uint16"
    assert json.loads((tmp_path / "t" / "lengths.json").read_text()) == []


# ---------------------------------------------------------------------- workers


@pytest.mark.slow
def test_workers_write_the_same_bytes(store, tokenizer, tmp_path):
    backwards = store.select(range(59, -1, -1))
    for name, workers in (("one", 1), ("two", 2)):
        dataset = backwards.tokenize(tokenizer, tmp_path / name, obs="all", rows_per_shard=10, workers=workers)
        assert_holds(dataset, backwards, tokenizer)
    files = sorted(path.name for path in (tmp_path / "one").iterdir() if path.is_file())
    assert len(files) == 6 + 4
    assert files == sorted(path.name for path in (tmp_path / "two").iterdir() if path.is_file())
    for name in files:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name


TOKENIZES = """
import sys, time
from stformer_hf import CellStore, GeneTokenizer
from stformer_hf.store import token_writer

token_writer.ROWS_PER_BATCH = 7
tokenized = token_writer.TokenShards._tokenized
token_writer.TokenShards._tokenized = lambda *args: (time.sleep(0.3), tokenized(*args))[1]

if __name__ == "__main__":
    store = CellStore(sys.argv[1]).select(range(59, -1, -1))
    tokenizer = GeneTokenizer.from_pretrained(sys.argv[2])
    store.tokenize(tokenizer, sys.argv[3], obs="all", workers=2, rows_per_shard=10)
"""


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="the processes are found in /proc")
def test_workers_of_a_killed_process_end_too(store, tokenizer, tmp_path, n_tokenized):
    """Else they would write into the folder of the next call."""
    (tmp_path / "tokenizes.py").write_text(TOKENIZES)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    process = subprocess.Popen(
        [sys.executable, tmp_path / "tokenizes.py", store.path, tmp_path / "tokenizer", tmp_path / "t"]
    )
    building = tmp_path / ".t.building"
    while not list(building.glob("*.arrow")):
        assert process.poll() is None
        time.sleep(0.01)
    with open(f"/proc/{process.pid}/task/{process.pid}/children") as file:
        workers = file.read().split()
    assert len(workers) >= 2
    process.kill()
    process.wait()
    waited_until = time.monotonic() + 60
    while running := [pid for pid in workers if is_running(pid)]:
        assert time.monotonic() < waited_until, f"{running} go on"
        time.sleep(0.01)
    n_done = len(list(building.glob("*.arrow")))
    assert n_done < 6 and not (tmp_path / "t").exists()
    backwards = store.select(range(59, -1, -1))
    again = GeneTokenizer.from_pretrained(tmp_path / "tokenizer")
    dataset = backwards.tokenize(again, tmp_path / "t", obs="all", rows_per_shard=10)
    assert_holds(dataset, backwards, tokenizer)
    assert sum(n_tokenized) == 60 - 10 * n_done


def is_running(pid: str) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


# ---------------------------------------------------------------------- stopped, killed, changed

KILLED = """
import os, sys, time
import datasets
from stformer_hf import CellStore, GeneTokenizer
from stformer_hf.store import replacing, token_writer

# Every batch, checksum and file of the end is told, and takes a moment, so that a call can be met in any of them.
def slow(owner, name):
    function = getattr(owner, name)

    def told(*args, **kwargs):
        print(name, flush=True)
        time.sleep(0.06)
        return function(*args, **kwargs)

    setattr(owner, name, told)

token_writer.ROWS_PER_BATCH = 7
slow(token_writer.TokenShards, "_tokenized")
for name in ("checksum", "write_dataset_files", "_write_lengths", "write_json"):
    slow(token_writer, name)
slow(replacing, "replace_folder")
store, tokenizer = CellStore(sys.argv[1]), GeneTokenizer.from_pretrained(sys.argv[2])
for _ in sys.stdin:  # a call for every line, in a process of its own
    child = os.fork()
    if not child:
        print(os.getpid(), flush=True)
        store.tokenize(tokenizer, sys.argv[3], obs="all", rows_per_shard=10)
        os._exit(0)
    os.waitpid(child, 0)
    print("ended", flush=True)
"""


@pytest.mark.slow
def test_a_call_killed_at_any_moment_leaves_nothing_that_opens_and_goes_on(store, tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    path, building = tmp_path / "t", tmp_path / ".t.building"
    rng = np.random.default_rng(0)
    # After so many things told, then in each part of the end.
    moments = [*rng.integers(1, 9, 8), "_write_lengths", "write_dataset_files", "write_json", "replace_folder"]
    n_done = []
    command = [sys.executable, "-c", KILLED, store.path, tmp_path / "tokenizer", path]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as calls:

        def call() -> int:
            calls.stdin.write("go\n")
            calls.stdin.flush()
            return int(calls.stdout.readline())

        for moment in moments:
            child = call()
            n_told, told = 0, ""
            while moment not in (n_told, told):
                n_told, told = n_told + 1, calls.stdout.readline().strip()
                assert told != "ended"
            time.sleep(rng.uniform(0, 0.05))
            os.kill(child, signal.SIGKILL)
            while calls.stdout.readline() != "ended\n":
                pass
            n_done.append(len(list(building.glob("*.arrow"))))
            with pytest.raises(FileNotFoundError):
                load_from_disk(str(path))
        call()
        told = "".join(iter(calls.stdout.readline, "ended\n"))
        calls.stdin.close()
    assert n_done == sorted(n_done) and 0 < n_done[7] < 6 == n_done[8]  # what is done stays done
    assert "_tokenized" not in told
    assert_holds(load_from_disk(str(path)), store, tokenizer)
    manifest = json.loads((path / "manifest.json").read_text())
    assert all(checksum(path / shard["file"]) == shard["checksum"] for shard in manifest["shards"])
    assert not list(path.glob("*.part")) and not (path / "plan.json").exists()
    assert {found.name for found in tmp_path.iterdir()} - {".t.lock"} == {"store", "t", "tokenizer"}


@pytest.fixture
def stopped(store, tokenizer, tmp_path, monkeypatch):
    """A call that was stopped when 2 of 6 shards were done."""
    tokenized = token_writer.TokenShards._tokenized

    def stop(self, rows):
        if rows[0] >= 25:
            raise KeyboardInterrupt
        return tokenized(self, rows)

    with monkeypatch.context() as patch:
        patch.setattr(token_writer, "ROWS_PER_BATCH", 7)
        patch.setattr(token_writer.TokenShards, "_tokenized", stop)
        with pytest.raises(KeyboardInterrupt):
            store.tokenize(tokenizer, tmp_path / "t", rows_per_shard=10)
    assert len(list((tmp_path / ".t.building").glob("*.arrow"))) == 2
    return tmp_path / "t"


def test_a_call_that_was_stopped_goes_on(stopped, store, tokenizer, n_tokenized):
    assert_holds(store.tokenize(tokenizer, stopped, rows_per_shard=10), store, tokenizer)
    assert sum(n_tokenized) == 40


@pytest.mark.parametrize(
    "change",
    [
        {"bin_edges": [0.5, 2.5]},
        {"max_length": 9},
        {"max_length": 9, "truncation": "head"},
        {"included_phenotypes": []},
        {"symbols": {"x": "ENSG00000000000"}},
        {"scheme": "rank", "medians": MEDIANS, "bin_edges": None},
    ],
)
def test_another_tokenizer_starts_anew(stopped, store, n_tokenized, change):
    other = GeneTokenizer.from_store(
        store, **{"phenotypes": ["cell_type"], "bin_edges": [0.5, 1.5, 3.5], "symbols": None, **change}
    )
    assert_holds(store.tokenize(other, stopped, rows_per_shard=10), store, other)
    assert sum(n_tokenized) == 60


def test_other_cells_columns_and_shards_start_anew(stopped, store, tokenizer, tmp_path, n_tokenized):
    shutil.copytree(tmp_path / ".t.building", tmp_path / "copy")

    def again(cells, **settings):
        shutil.rmtree(stopped, ignore_errors=True)
        shutil.copytree(tmp_path / "copy", tmp_path / ".t.building", dirs_exist_ok=True)
        n_tokenized.clear()
        dataset = cells.tokenize(tokenizer, stopped, **{"rows_per_shard": 10, **settings})
        assert_holds(dataset, cells, tokenizer)
        return sum(n_tokenized), dataset

    assert again(store)[0] == 40
    assert again(store.select(range(60)))[0] == 60  # the same cells, but that is not looked into
    assert again(store.select(range(59, -1, -1)))[0] == 60
    assert again(store, rows_per_shard=12)[0] == 60
    n, dataset = again(store, obs=["age"])
    assert n == 60 and dataset["age"][:] == store.obs["age"].tolist()
    other = make_adata(seed=9)
    assert again(CellStore.build(store.path, other, obs=["cell_type", "age"], overwrite=True))[0] == 60


def test_a_stop_between_the_two_renames_loses_nothing(store, tokenizer, tmp_path, monkeypatch):
    store.tokenize(tokenizer, tmp_path / "t")
    rename = replacing.Path.rename

    def stop(self, target):
        if self.name == ".t.building":
            raise KeyboardInterrupt
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(replacing.Path, "rename", stop)
        with pytest.raises(KeyboardInterrupt):
            store.select([1]).tokenize(tokenizer, tmp_path / "t", overwrite=True)
    assert not (tmp_path / "t").exists()
    with pytest.raises(FileExistsError):
        store.tokenize(tokenizer, tmp_path / "t")
    assert_holds(load_from_disk(str(tmp_path / "t")), store, tokenizer)


def test_one_call_at_a_time(store, tokenizer, tmp_path):
    with replacing.locked(tmp_path / "t"), pytest.raises(BlockingIOError, match="Another process"):
        store.tokenize(tokenizer, tmp_path / "t")


# ---------------------------------------------------------------------- what is there, what cannot be


def test_what_is_there_is_replaced_only_if_asked(store, tokenizer, tmp_path):
    store.tokenize(tokenizer, tmp_path / "t")
    with pytest.raises(FileExistsError, match=r"datasets.load_from_disk.*overwrite=True"):
        store.select([0]).tokenize(tokenizer, tmp_path / "t")
    assert_holds(load_from_disk(str(tmp_path / "t")), store, tokenizer)
    few = store.select([5, 6])
    few.tokenize(tokenizer, tmp_path / "t", overwrite=True)
    assert_holds(load_from_disk(str(tmp_path / "t")), few, tokenizer)
    (tmp_path / "t" / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="notes.txt"):
        store.tokenize(tokenizer, tmp_path / "t", overwrite=True)
    assert (tmp_path / "t" / "notes.txt").read_text() == "mine"


def test_what_is_no_tokenized_dataset_is_never_replaced(store, tokenizer, tmp_path, adata):
    with pytest.raises(FileExistsError, match="more than a tokenized dataset .genes.parquet"):
        store.tokenize(tokenizer, store.path, overwrite=True)
    CellStore(store.path).verify()
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("mine")
    for name in ("folder", "file"):
        with pytest.raises(FileExistsError, match="is not a tokenized dataset"):
            store.tokenize(tokenizer, tmp_path / name, overwrite=True)
    store.tokenize(tokenizer, tmp_path / "t")
    with pytest.raises(FileExistsError):
        CellStore.build(tmp_path / "t", adata, overwrite=True)
    assert len(load_from_disk(str(tmp_path / "t"))) == 60


@pytest.mark.parametrize("wrong", [{"workers": 0}, {"rows_per_shard": 0}])
def test_settings_that_cannot_be_leave_nothing(store, tokenizer, tmp_path, wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        store.tokenize(tokenizer, tmp_path / "t", **wrong)
    with pytest.raises(TypeError, match="GeneTokenizer is needed, got dict"):
        store.tokenize({}, tmp_path / "t")
    assert {path.name for path in tmp_path.iterdir()} == {"store"}


def test_a_tokenizer_of_other_genes_is_told(store, tmp_path):
    tokenizer = GeneTokenizer(["ENSG00000990000", "ENSG00000990001"])
    with pytest.raises(ValueError, match="has 0 of the model's 2 genes"):
        store.tokenize(tokenizer, tmp_path / "t")
    assert not (tmp_path / "t").exists()


def test_a_store_that_was_replaced_is_told(store, tokenizer, tmp_path, adata):
    CellStore.build(store.path, adata[:30].copy(), overwrite=True)
    with pytest.raises(ValueError, match="was replaced after"):
        store.tokenize(tokenizer, tmp_path / "t")


# ---------------------------------------------------------------------- a disk that is full, memory that is small

LIMITED = """
import resource, signal, sys
from stformer_hf import CellStore, GeneTokenizer
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, 500_000))
try:
    CellStore(sys.argv[1]).tokenize(GeneTokenizer.from_pretrained(sys.argv[2]), sys.argv[3], overwrite=True)
except OSError as error:
    print(error)
    sys.exit(3)
"""


@pytest.mark.parametrize("limit", ["disk", pytest.param("file", marks=pytest.mark.slow)])
def test_a_full_disk_is_told_and_the_older_dataset_stays(store, tokenizer, tmp_path, limit):
    folder = tmp_path / "small"
    folder.mkdir()
    if limit == "disk":
        mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True)
        if mounted.returncode:
            pytest.skip(f"a tmpfs cannot be mounted here: {mounted.stderr.decode().strip()}")
    try:
        store.tokenize(tokenizer, folder / "t")
        big = CellStore.build(tmp_path / "big", make_adata(40_000), obs=["cell_type"])
        if limit == "disk":
            with pytest.raises(OSError) as raised:
                big.tokenize(tokenizer, folder / "t", overwrite=True)
            told = str(raised.value)
        else:  # a limit of the process in place of a disk: where no tmpfs can be mounted
            command = [sys.executable, "-c", LIMITED, big.path, folder / "t" / "tokenizer", folder / "t"]
            run = subprocess.run(command, capture_output=True, text=True)
            assert run.returncode == 3, run.stderr
            told = run.stdout
        assert "no space for the tokens" in told
        assert f"left at {folder / '.t.building'}. Free some space and call tokenize again" in told
        assert_holds(load_from_disk(str(folder / "t")), store, tokenizer)
    finally:
        if limit == "disk":
            subprocess.run(["umount", "-l", folder], check=True)


def test_memory_does_not_grow_with_the_cells(tmp_path, monkeypatch):
    monkeypatch.setattr(token_writer, "ROWS_PER_BATCH", 128)
    store = CellStore.build(tmp_path / "s", make_adata(8000, 100))
    tokenizer = GeneTokenizer.from_store(store)
    peaks = []
    for n_cells in (100, 1000, 8000):  # the first imports what is needed
        cells = store.select(slice(n_cells))
        tracemalloc.start()
        cells.tokenize(tokenizer, tmp_path / str(n_cells), rows_per_shard=500)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[2] < 1.3 * peaks[1]


def test_real_cells(shared_data, tmp_path):
    store = CellStore.build(tmp_path / "s", shared_data / "geact_fetal.h5ad", obs="all")
    cells = store.select(np.random.default_rng(0).permutation(len(store))[:300])
    for scheme, medians in (("binned", None), ("rank", dict.fromkeys(store.gene_ids.tolist(), 1.0))):
        tokenizer = GeneTokenizer.from_store(store, scheme, medians=medians, max_length=1024)
        assert_holds(cells.tokenize(tokenizer, tmp_path / scheme, obs="all"), cells, tokenizer)
