"""Engines: local processes and Ray run the same tasks, and what they write is what one process writes."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tasks
import torch
from conftest import make_adata

from stformer_hf import CellStore, GeneBertConfig, GeneBertModel, GeneTokenizer, embed, estimate_gene_medians
from stformer_hf.inference import batches
from stformer_hf.store import engines, gene_medians
from stformer_hf.store.engines import check_engine, run_tasks


def test_tasks_run_in_other_processes_and_errors_arrive_as_they_were_raised():
    results_of: dict[int, tuple[int, int]] = {}
    with (
        pytest.raises(ValueError, match=r"^-1 is negative\.$"),
        run_tasks(tasks.times, [1, 2, 3, -1], shared=3) as results,
    ):
        results_of.update(results)
    assert {number: value for number, (value, _) in results_of.items()} == {0: 3, 1: 6, 2: 9}
    assert os.getpid() not in {process for _, process in results_of.values()}


@pytest.mark.parametrize(("most", "ahead", "begun"), [(2, 100, 2), (100, 4, 4), (100, 100, 20)])
def test_tasks_that_begin_while_the_first_one_runs_are_limited(most, ahead, begun):
    """By the number that runs at once, and by the distance to the oldest unfinished one."""
    go, seen = threading.Event(), []

    def task(number):
        seen.append(number)
        if number == 0 or most == 2:
            go.wait()
        return -number

    with ThreadPoolExecutor(20) as pool:
        results = engines._as_completed(lambda number: pool.submit(task, number), range(20), most, ahead)
        threading.Timer(0.2, lambda: (seen.append("go"), go.set())).start()
        assert dict(results) == {number: -number for number in range(20)}
    assert sorted(seen[: seen.index("go")]) == list(range(begun))


def test_engines_that_do_not_exist_and_workers_that_cannot_be(tmp_path, adata, store, tokenizer, config, monkeypatch):
    model = GeneBertModel(config)
    for call in (
        lambda **options: CellStore.build(tmp_path / "new", adata, **options),
        lambda **options: store.append(adata, **options),
        lambda **options: store.tokenize(tokenizer, tmp_path / "new", **options),
        lambda **options: estimate_gene_medians(adata, **options),
        lambda **options: embed(store, model, tokenizer=tokenizer, **options),
    ):
        with pytest.raises(ValueError, match='engine=\'dask\': must be "local" or "ray"'):
            call(engine="dask")
        with pytest.raises(ValueError, match="workers=0: must be at least 1"):
            call(workers=0)
    with pytest.raises(ValueError, match="need a CellStore"):
        embed(adata, model, tokenizer=tokenizer, workers=2)
    monkeypatch.setattr(engines.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=re.escape('pip install "stformer_hf[ray]"')):
        check_engine("ray", 2)


def test_workers_refuse_a_model_that_its_configuration_does_not_describe(store, tokenizer, config):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    model = peft.get_peft_model(GeneBertModel(config), peft.LoraConfig(target_modules="all-linear"))
    with pytest.raises(ValueError, match="this one has other weights, such as .*merge_and_unload"):
        embed(store, model, tokenizer=tokenizer, workers=2)


# ---------------------------------------------------------------------- what is written is what one process writes


@pytest.fixture(scope="module")
def ray():
    """A cluster of two CPUs on this machine."""
    ray = pytest.importorskip("ray", reason="ray is not installed")
    try:
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=100 * 2**20)
    except Exception as error:
        pytest.skip(f"ray cannot start here: {error}")
    ray.cloudpickle.register_pickle_by_value(tasks)  # a file that its workers do not find
    yield ray
    ray.shutdown()


@pytest.fixture(params=["local", "ray"])
def engine(request):
    """Each engine; Ray's cluster is started if needed."""
    if request.param == "ray":
        request.getfixturevalue("ray")
    return {"engine": request.param, "workers": 2}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Files of 2,000, 2,001 and 2,002 cells."""
    folder = tmp_path_factory.mktemp("files")
    for i in range(3):
        make_adata(2000 + i, 30, seed=i).write_h5ad(folder / f"{i}.h5ad")
    return sorted(folder.iterdir())


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def workers_of_ray() -> list[int]:
    """Processes of this test's cluster that run a task now."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = (folder / "stat").read_text().rpartition(")")[2].split()[1]
            of_us = Path(f"/proc/{parent}/stat").read_text().rpartition(")")[2].split()[1] == str(os.getpid())
            if of_us and (folder / "cmdline").read_bytes().startswith(b"ray::_call"):
                found.append(int(folder.name))
        except OSError:  # a process that has ended
            continue
    return found


@pytest.mark.slow  # processes import for seconds, and those of Ray for more
def test_stores_medians_tokens_and_embeddings_are_those_of_one_process(files, engine, tmp_path, monkeypatch):
    settings = {"obs": "all", "rows_per_shard": 500, "rows_per_batch": 100, "report": False}
    one = CellStore.build(tmp_path / "one" / "store", files, **settings)
    two = CellStore.build(tmp_path / "two" / "store", files, **settings, **engine)
    assert contents(one.path) == contents(two.path)

    tokenizer = GeneTokenizer.from_store(one, bin_edges=[0.5, 1.5, 3.5])
    for store, options in ((one, {}), (two, engine)):
        store.tokenize(tokenizer, store.path.with_name("tokens"), obs="all", rows_per_shard=500, **options)
    assert contents(tmp_path / "one" / "tokens") == contents(tmp_path / "two" / "tokens")

    monkeypatch.setattr(gene_medians, "_CELLS_OF_PART", 700)
    sources = [files[0], make_adata(1500, 40, seed=5), one, files[1]]  # one in memory, and other genes
    tables = [
        estimate_gene_medians(sources, 1234.5, method=method, **options).table
        for method in ("exact", "sketch")
        for options in ({}, engine)
    ]
    pd.testing.assert_frame_equal(tables[0], tables[1], check_exact=True)
    pd.testing.assert_frame_equal(tables[2], tables[3], check_exact=True)

    monkeypatch.setattr(batches, "_BLOCKS_PER_TASK", 1)
    torch.manual_seed(0)
    config = GeneBertConfig.from_tokenizer(
        tokenizer, num_hidden_layers=1, num_attention_heads=2, hidden_size=8, intermediate_size=16
    )
    model = GeneBertModel(config)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as Ray's workers
    try:
        found = [embed(two, model, tokenizer=tokenizer, **options).obsm["X_stformer"] for options in ({}, engine)]
    finally:
        torch.set_num_threads(threads)
    np.testing.assert_array_equal(*found)


def test_a_killed_local_worker_is_an_error_that_says_what_to_do(tmp_path):
    with (
        pytest.raises(RuntimeError, match="killed, probably because memory ran out: use fewer workers"),
        run_tasks(tasks.die_once, range(20), shared=tmp_path, workers=2) as results,
    ):
        list(results)


def test_a_script_that_its_workers_run_again_is_an_error_that_says_so(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "from operator import mul\nfrom stformer_hf.store.engines import run_tasks\n"
        "with run_tasks(mul, range(4), shared=2, workers=2) as results:\n    list(results)\n"
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True)
    assert "memory" not in done.stderr
    assert re.search('RuntimeError: No worker could start.* below `if __name__ == "__main__":`', done.stderr)


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="the workers are found in /proc")
def test_a_killed_worker_of_ray_is_replaced_and_the_result_is_the_same(ray, files, tmp_path):
    with run_tasks(tasks.die_once, range(4), shared=tmp_path, workers=2, engine="ray") as results:
        assert dict(results) == {number: number for number in range(4)} and (tmp_path / "killed").exists()

    settings = {"obs": "all", "rows_per_shard": 40, "rows_per_batch": 20, "report": False}
    one = CellStore.build(tmp_path / "one" / "store", files, **settings)
    tokenizer = GeneTokenizer.from_store(one, bin_edges=[0.5, 1.5, 3.5])
    one.tokenize(tokenizer, tmp_path / "one" / "tokens", rows_per_shard=40)
    killed: dict[str, int] = {}

    def kill(name: str, made: str) -> None:
        """Kill a worker after the first and before the last file."""
        building = tmp_path / "two" / f".{name}.building"
        while not list(building.glob(made)):
            time.sleep(0.01)
        while not (busy := workers_of_ray()):
            time.sleep(0.001)
        os.kill(busy[0], signal.SIGKILL)
        killed[name] = len(list(building.glob(made)))

    def call(name: str, made: str, function) -> None:
        killer = threading.Thread(target=kill, args=(name, made), daemon=True)
        killer.start()
        function()
        killer.join(10)
        assert 0 < killed[name] < 150
        assert contents(tmp_path / "one" / name) == contents(tmp_path / "two" / name)

    ray_of_two = {"workers": 2, "engine": "ray"}
    call(
        "store", "source-*.json", lambda: CellStore.build(tmp_path / "two" / "store", files, **settings, **ray_of_two)
    )
    two = CellStore(tmp_path / "two" / "store")
    tokens = {"rows_per_shard": 40, **ray_of_two}
    call("tokens", "data-*.arrow", lambda: two.tokenize(tokenizer, tmp_path / "two" / "tokens", **tokens))


@pytest.mark.slow
def test_errors_of_ray_are_those_of_the_task_and_the_cluster_stays(ray, files, tmp_path):
    with (
        pytest.raises(ValueError, match=r"^-1 is negative\.$"),
        run_tasks(tasks.times, [1, -1, 2], shared=3, workers=2, engine="ray") as results,
    ):
        list(results)
    assert ray.is_initialized()  # it was there before
