"""Read-ahead asks for the bytes of a batch, all of them and no others, and only where reading waits for a disk."""

import mmap
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import make_adata

from stformer_hf import CellStore
from stformer_hf.store import read_ahead
from stformer_hf.store.read_ahead import MappedFile, ReadAhead


@pytest.mark.parametrize("compact", [False, True])
def test_the_ranges_are_the_bytes_of_the_rows(tmp_path, compact):
    store = CellStore.build(tmp_path / "s", make_adata(90, 40), compact=compact, rows_per_batch=20, rows_per_shard=40)
    rows = [[41], [7, 8, 9], [3], [89]]  # rows that follow each other are asked for together; 3 has no counts
    lists = [(store._rows._cells, ["cell_codes"]), (store._rows._large, ["large_counts"])]
    for of, names in lists if compact else [(store._rows._cells, ["genes", "counts"])]:
        types = [store.dataset.features[name].feature.dtype for name in names]
        expected = []
        for run in rows:
            for name, kind in zip(names, types, strict=True):
                expected.append(np.concatenate([store.dataset[row][name] for row in run]).astype(kind).tobytes())
        ranges = of.ranges(of.find(np.concatenate(rows))[1])
        assert [file.buffer.to_pybytes()[start:stop] for file, start, stop in ranges] == expected


@pytest.mark.parametrize("compact", [False, True])
def test_rows_are_the_same_with_it(tmp_path, compact):
    store = CellStore.build(tmp_path / "s", make_adata(90, 40), compact=compact, rows_per_batch=20, rows_per_shard=40)
    rows = np.random.default_rng(0).integers(0, 90, 50)
    expected = store.rows(rows).toarray()
    store._rows._ahead._left = 2
    np.testing.assert_array_equal(store.rows(rows).toarray(), expected)
    assert store._rows._ahead._left == 1


@pytest.mark.parametrize("compact", [False, True])
def test_rows_of_a_selection_are_asked_for_by_their_numbers_in_it(tmp_path, compact, monkeypatch):
    adata = make_adata(90, 40)
    adata.X.data[::3] = 1000  # compact rows hold large counts apart
    store = CellStore.build(tmp_path / "s", adata, compact=compact, rows_per_batch=20, rows_per_shard=40)
    asked: list[bytes] = []
    monkeypatch.setattr(MappedFile, "ask_for", lambda file, *of: asked.append(file.buffer.to_pybytes()[slice(*of)]))
    store.select([50, 8, 77]).read_ahead(np.array([2, 0]))
    both = (store._rows._cells, store._rows._large) if compact else (store._rows._cells,)
    ranges = [found for lists in both for found in lists.ranges(lists.find(np.array([77, 50]))[1])]
    assert asked == [file.buffer.to_pybytes()[start:stop] for file, start, stop in ranges]
    assert len(asked) == 4 and all(asked)
    with pytest.raises(IndexError, match="outside the store of 3 cells"):
        store.select([50, 8, 77]).read_ahead([3])


@pytest.mark.parametrize("compact", [False, True])
def test_batches_without_values_are_read_with_it(tmp_path, compact):
    """Cells without counts, and compact ones without large counts."""
    adata = make_adata(30, 40)
    adata.X.data[:] = 1
    adata.X.data[adata.X.indptr[10] : adata.X.indptr[20]] = 0
    adata.X.eliminate_zeros()
    store = CellStore.build(tmp_path / "s", adata, compact=compact, rows_per_batch=10, report=False)
    for row in range(30):
        store._rows._ahead._left = 2
        np.testing.assert_array_equal(store.rows([row]).toarray(), adata.X[[row]].toarray())


def test_it_turns_off_when_batches_no_longer_wait(monkeypatch):
    ahead, waits = ReadAhead(), [0]
    ahead._works = True
    monkeypatch.setattr(read_ahead, "_waits", lambda: waits[0])
    is_on = []
    for batch in range(400):
        ahead.ask_for(list)
        waits[0] += batch == 8
        is_on.append(ahead._left > 0)
        ahead.look()
    assert is_on == [False] * 9 + [True] * 128 + [False] * 263


def test_a_thread_may_look_while_another_does(monkeypatch):
    ahead, counted = ReadAhead(), []
    ahead._works = True

    def waits():
        counted.append(None)
        if len(counted) == 2:  # of `look`: the other thread looks now, to its end
            ahead.look()
        return 0

    monkeypatch.setattr(read_ahead, "_waits", waits)
    ahead.ask_for(list)
    ahead.look()
    assert len(counted) == 2 and ahead._left <= 0


@pytest.mark.skipif(sys.platform != "linux", reason="pages are dropped from the cache by a call of Linux")
def test_it_is_on_after_a_wait_for_the_disk_and_else_off(tmp_path):
    import resource

    store = CellStore.build(tmp_path / "s", make_adata(600, 4000), rows_per_batch=100)
    ahead = store._rows._ahead
    store.rows([5])
    store.rows([5])  # in memory now
    assert ahead._left <= 0
    file = tmp_path / "s" / store.manifest["shards"][0]["file"]

    def drop():
        with open(file, "rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    del store
    drop()
    before = resource.getrusage(resource.RUSAGE_THREAD).ru_majflt
    np.memmap(file, np.uint8, "r").sum()
    if resource.getrusage(resource.RUSAGE_THREAD).ru_majflt == before:
        pytest.skip("this file system does not drop pages from its cache")
    store = CellStore(tmp_path / "s")
    drop()
    store.rows([350])  # its pages are far from those that opening read
    assert store._rows._ahead._left == 1 + 128


def test_nothing_is_asked_while_it_is_off():
    def never():
        raise AssertionError

    ahead = ReadAhead()
    for _ in range(9):
        ahead.ask_for(never)
        ahead.look()
    ahead._left = 2
    with pytest.raises(AssertionError):
        ahead.ask_for(never)


@pytest.mark.skipif(not hasattr(mmap, "MADV_WILLNEED"), reason="the system has no madvise")
def test_the_system_accepts_what_it_is_asked(tmp_path, monkeypatch):
    store = CellStore.build(tmp_path / "s", make_adata(50, 40))
    answers, system = [], read_ahead._libc
    recorder = SimpleNamespace(madvise=lambda *of: answers.append(system.madvise(*of)))
    monkeypatch.setattr(read_ahead, "_libc", recorder)
    store.read_ahead([3, 4, 20])
    assert answers == [0] * 4  # two runs of rows, in genes and in counts


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="only Linux lists open files")
def test_an_open_store_keeps_no_file_open(tmp_path):
    CellStore.build(tmp_path / "s", make_adata(50, 40))
    before = os.listdir("/proc/self/fd")
    store = CellStore(tmp_path / "s")
    assert len(os.listdir("/proc/self/fd")) == len(before) and store.rows([1]).nnz
