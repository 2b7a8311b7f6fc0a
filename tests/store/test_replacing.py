"""Two writers at one path: one folder, the first that is whole, or an error; nothing that was there is lost."""

import contextlib
import errno
import os
import sys
import tempfile
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import make_adata
from datasets import load_from_disk
from hypothesis import given, settings
from hypothesis import strategies as st

from stformer_hf import CellStore, GeneTokenizer
from stformer_hf.store import replacing

FILE_EVENTS = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.link", "fcntl.flock"}
at_file_event = None  # called with the path at each of them; audit hooks stay for ever, so there is one


def _hook(event, arguments):
    if at_file_event is not None and event in FILE_EVENTS:
        at_file_event(str(arguments[0]))


sys.addaudithook(_hook)


@contextlib.contextmanager
def calling(function):
    global at_file_event
    at_file_event = function
    try:
        yield
    finally:
        at_file_event = None


def interrupted(first, second, place):
    """Run `first`, and all of `second` just before the n-th file of the first is touched, for every n."""
    number, n_files = 0, 1
    while number < n_files:
        path = place / str(number)
        path.mkdir()
        done, refused = [], []
        n_files = 0

        def run(write, path=path, done=done, refused=refused):
            try:
                write(path / "out")
                done.append(write)
            except (FileExistsError, BlockingIOError) as error:
                refused.append(error)

        def interrupt(file, path=path, run=run, number=number):
            nonlocal n_files
            if str(path) in file or file.isdigit():  # a lock has the number of an open file
                if n_files == number:
                    n_files += 1
                    global at_file_event
                    kept, at_file_event = at_file_event, None
                    run(second)
                    at_file_event = kept
                else:
                    n_files += 1

        with calling(interrupt):
            run(first)
        assert len(done) == len(refused) == 1, (number, refused)
        assert [found.name for found in path.iterdir()] == ["out"]
        yield path / "out", done[0]
        number += 1


def test_builds_that_interrupt_each_other_make_one_store(tmp_path):
    cells = make_adata(9)
    counts = {}

    def first(path):
        CellStore.build(path, cells[:4], report=False)

    def second(path):
        CellStore.build(path, cells, report=False)

    for path, done in interrupted(first, second, tmp_path):
        store = CellStore(path)
        store.verify()
        assert len(store) == {first: 4, second: 9}[done]
        counts[done] = counts.get(done, 0) + 1
    assert counts[first] > 10 and counts[second] >= 3  # within the lock, and before it


def test_joins_and_tokens_that_are_interrupted_stay_whole(tmp_path, tokenizer):
    small, large = (CellStore.build(tmp_path / str(n), make_adata(n), report=False) for n in (4, 9))

    def join(path):
        CellStore.join(path, [small.path, small.path])

    def build(path):
        large.save(path)

    (tmp_path / "join").mkdir()
    for path, done in interrupted(join, build, tmp_path / "join"):
        store = CellStore(path)
        store.verify()
        assert len(store) == {join: 8, build: 9}[done]

    def tokenize(path):
        small.tokenize(tokenizer, path)

    def tokenize_more(path):
        large.tokenize(tokenizer, path)

    (tmp_path / "tokens").mkdir()
    for path, done in interrupted(tokenize, tokenize_more, tmp_path / "tokens"):
        assert len(load_from_disk(str(path))) == {tokenize: 4, tokenize_more: 9}[done]


class Turns:
    """Lets two threads touch files in a given order, as long as both run."""

    def __init__(self, order):
        self.order, self.running, self.changed = list(order), set(), threading.Condition()

    def __call__(self, file):
        me = threading.current_thread().name
        if me not in self.running:
            return
        with self.changed:
            self.changed.wait_for(lambda: not self.order or self.order[0] == me or len(self.running) == 1, timeout=20)
            if self.order and self.order[0] == me:
                self.order.pop(0)
            self.changed.notify_all()

    def leave(self):
        with self.changed:
            self.running.discard(threading.current_thread().name)
            self.changed.notify_all()


@settings(max_examples=15)
@given(st.lists(st.sampled_from(["4", "9"]), max_size=80))
def test_two_builds_in_step_make_one_store(order):
    turns, done, refused = Turns(order), [], []
    with tempfile.TemporaryDirectory() as folder:

        def build():
            n_cells = int(threading.current_thread().name)
            try:
                CellStore.build(Path(folder, "s"), make_adata(n_cells), report=False)
                done.append(n_cells)
            except (FileExistsError, BlockingIOError) as error:
                refused.append(error)
            finally:
                turns.leave()

        threads = [threading.Thread(target=build, name=name) for name in ("4", "9")]
        turns.running = {thread.name for thread in threads}
        with calling(turns):
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        assert len(done) == len(refused) == 1
        store = CellStore(Path(folder, "s"))
        store.verify()
        assert len(store) == done[0]


def test_overwrite_replaces_what_another_finished_meanwhile(tmp_path, monkeypatch):
    check_free, calls = replacing.check_free, []

    def slow(*arguments):
        check_free(*arguments)
        if not calls:
            calls.append(arguments)
            CellStore.build(tmp_path / "s", make_adata(9), report=False)

    monkeypatch.setattr("stformer_hf.store.writer.check_free", slow)
    assert len(CellStore.build(tmp_path / "s", make_adata(4), overwrite=True, report=False)) == 4


def test_what_was_added_meanwhile_is_not_lost(tmp_path, monkeypatch):
    CellStore.build(tmp_path / "s", make_adata(4), report=False)
    late, early = CellStore(tmp_path / "s"), CellStore(tmp_path / "s")
    unite_obs = "stformer_hf.store.writer.unite_obs"
    from stformer_hf.sources.obs_columns import unite_obs as unite

    def slow(*arguments, **settings):
        monkeypatch.setattr(unite_obs, unite)
        early.append(make_adata(9, seed=1))
        return unite(*arguments, **settings)

    monkeypatch.setattr(unite_obs, slow)
    with pytest.raises(ValueError, match="was replaced after"):
        late.append(make_adata(5, seed=2))
    assert len(CellStore(tmp_path / "s")) == 13
    CellStore(tmp_path / "s").verify()


def test_a_folder_that_is_being_replaced_is_not_given_back(tmp_path):
    store = CellStore.build(tmp_path / "s", make_adata(4), report=False)
    store.path.rename(tmp_path / ".s.old")
    with replacing.locked(tmp_path / "s"):  # between the two renames of another process
        replacing.recover(tmp_path / "s")
        assert not (tmp_path / "s").exists()
        with pytest.raises(BlockingIOError):
            CellStore.build(tmp_path / "s", make_adata(9), report=False)
    assert len(CellStore(tmp_path / "s")) == 4


def test_a_lock_on_a_file_that_its_holder_removed_is_no_lock(tmp_path):
    lock = tmp_path / ".s.lock"
    removed = []

    def remove(file):  # as the process before does, between the opening and the locking
        if file.isdigit() and not removed:
            removed.append(file)
            lock.unlink()

    with contextlib.ExitStack() as stack:
        with calling(remove):
            stack.enter_context(replacing.locked(tmp_path / "s"))
        assert removed
        with pytest.raises(BlockingIOError), replacing.locked(tmp_path / "s"):
            pass
    assert not lock.exists()


def test_locks_of_windows(tmp_path, monkeypatch):
    """As `msvcrt` makes them: another process that holds the lock is a PermissionError, and open files stay."""

    def locking(number, mode, n_bytes):
        assert (mode, n_bytes) == (2, 1)
        try:
            fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise PermissionError(13, "Permission denied") from error

    def unlink(file, missing_ok=False):
        if os.path.realpath(file) in (os.path.realpath(f"/proc/self/fd/{n}") for n in os.listdir("/proc/self/fd")):
            raise PermissionError(13, "Permission denied")
        os.unlink(file)

    fcntl = pytest.importorskip("fcntl")
    if not Path("/proc/self/fd").exists():
        pytest.skip("needs /proc")
    monkeypatch.setattr(replacing.sys, "platform", "win32")
    monkeypatch.setattr(replacing, "msvcrt", SimpleNamespace(LK_NBLCK=2, locking=locking), raising=False)
    monkeypatch.setattr(Path, "unlink", unlink)
    with replacing.locked(tmp_path / "s"), pytest.raises(BlockingIOError), replacing.locked(tmp_path / "s"):
        pass
    assert not list(tmp_path.iterdir())
    with replacing.locked(tmp_path / "s"):
        waiting = open(tmp_path / ".s.lock")  # the next process
    assert [path.name for path in tmp_path.iterdir()] == [".s.lock"]
    waiting.close()


def test_empty_folders_are_removed_after_an_error(tmp_path):
    """Those that were not there before; whatever the error, Ctrl-C too."""

    def fail(*made, error=ValueError):
        with pytest.raises(error), replacing.locked(tmp_path / "a" / "b" / "out"):
            for path in made:
                (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
                (tmp_path / path).touch() if path.endswith(".txt") else (tmp_path / path).mkdir()
            raise error
        return sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*"))

    assert fail() == fail("a/b/out") == fail("a/b/out", error=KeyboardInterrupt) == []
    assert fail("a/note.txt", "a/b/out") == ["a", "a/note.txt"]
    assert fail("a/b/out/model.txt") == ["a", "a/b", "a/b/out", "a/b/out/model.txt", "a/note.txt"]
    (tmp_path / "a/b/out/model.txt").unlink()
    assert fail() == ["a", "a/b", "a/b/out", "a/note.txt"]  # an empty folder that was there stays


def test_paths_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    for path in ("file/out", "file/a/out"):
        with pytest.raises(NotADirectoryError, match="file is a file: choose"), replacing.locked(tmp_path / path):
            pass
    with pytest.raises(IsADirectoryError, match="pass the path of"), replacing.locked(Path(tmp_path.anchor)):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_folder_without_locks_is_not_replaced_either(tmp_path, monkeypatch):
    def flock(file, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", flock)
    path = tmp_path / "s"
    with (
        pytest.raises(FileExistsError, match="in the meantime"),
        replacing.written_at(path, replacing.STORE, False) as building,
    ):
        building.mkdir()
        path.mkdir()
        (path / "theirs").touch()
    assert (path / "theirs").exists()


@pytest.mark.parametrize("of", ["store", "tokens"])
def test_harmless_files_neither_block_nor_are_lost(tmp_path, of):
    store = CellStore.build(tmp_path / "s", make_adata(9), report=False)
    path = store.path
    tokenizer = GeneTokenizer.from_store(store)
    if of == "tokens":
        store.tokenize(tokenizer, tmp_path / "t")
        path = tmp_path / "t"
    dataset = load_from_disk(str(path))
    dataset.map(lambda row: {"n": 1})  # leaves cache-….arrow in the folder
    caches = sorted(file.name for file in path.glob("cache-*.arrow"))
    assert caches
    (path / ".DS_Store").write_text("finder")
    (path / ".notes").mkdir()
    (path / ".notes" / "a.txt").write_text("mine")
    (path / ".link").symlink_to("nowhere")

    def assert_there():
        assert sorted(file.name for file in path.glob("cache-*.arrow")) == caches
        assert (path / ".DS_Store").read_text() == "finder" and (path / ".notes" / "a.txt").read_text() == "mine"
        assert (path / ".link").is_symlink()

    if of == "tokens":
        store.select([1]).tokenize(tokenizer, path, overwrite=True)
        assert_there()
        assert len(load_from_disk(str(path))) == 1
        return
    store.append(make_adata(5, seed=1))
    assert_there()
    assert len(CellStore(path)) == 14
    CellStore.build(path, make_adata(4), overwrite=True, report=False)
    assert_there()
    CellStore(path).verify()
    assert len(load_from_disk(str(path))) == 4
    (path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="notes.txt"):
        CellStore.build(path, make_adata(4), overwrite=True, report=False)


@pytest.mark.parametrize("content", ['{"name": "app"}', '{"na', "[]", '{"shards": [1]}'])
def test_a_manifest_that_is_no_store_s_is_left(tmp_path, content):
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "manifest.json").write_text(content)
    with pytest.raises(FileExistsError, match="was not replaced: its manifest.json is damaged, or is not that of"):
        CellStore.build(tmp_path / "s", make_adata(), overwrite=True, report=False)
    assert (tmp_path / "s" / "manifest.json").read_text() == content
