"""Training in other processes: two against one, and one that is killed while it saves."""

import json
import multiprocessing
import os
import shutil
import socket
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import train_cells
from accelerate.state import AcceleratorState
from packaging.version import Version

from stformer_hf import CellStore
from stformer_hf.training.checkpoints import last_whole_checkpoint

SCRIPT = Path(__file__).with_name("train_cells.py")


def run_script(store, folder, n_processes=1, **settings):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(SCRIPT), str(store.path), str(folder), json.dumps(settings)]
    if n_processes > 1:
        command[1:1] = ["-m", "torch.distributed.run", f"--nproc_per_node={n_processes}", "--standalone"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)


def finished(process) -> str:
    try:
        printed, _ = process.communicate(timeout=300)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    assert process.returncode == 0, printed
    return printed


def run_rank(environment, arguments) -> None:
    """Train as one of the processes that torchrun starts, in a fork of this one, where all is imported."""
    os.environ.update(environment)
    AcceleratorState._reset_state(reset_partial_state=True)  # of the trainers of other tests
    sys.argv = arguments
    train_cells.main()


def run_forks(store, folder, n_processes, **settings) -> list[multiprocessing.Process]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = [str(SCRIPT), str(store.path), str(folder), json.dumps(settings)]
    folder.mkdir(exist_ok=True)
    processes = []
    for rank in map(str, range(n_processes)):
        environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": str(n_processes), "HF_HUB_OFFLINE": "1"}
        environment |= {"LOCAL_WORLD_SIZE": str(n_processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        fork = multiprocessing.get_context("fork")
        # A daemon: if its peer fails, it ends with the tests.
        processes.append(fork.Process(target=run_rank, args=(environment, arguments), daemon=True))
        processes[-1].start()
    return processes


_slow = pytest.mark.slow


@pytest.mark.parametrize(
    ("order", "launched"),
    [
        pytest.param("grouped", True, marks=_slow),
        pytest.param("objectives", True, marks=_slow),
        pytest.param("packed", True, marks=_slow),
        pytest.param("stream", True, marks=_slow),
        pytest.param("packed stream", True, marks=_slow),
        ("packed stream", False),
        ("random", False),
    ],
)
def test_two_processes_share_an_epoch_and_learn_what_one_does(store, tmp_path, monkeypatch, order, launched):
    n_passes = {"epochs": 3} if order != "packed stream" else {"epochs": 3, "steps": 24}
    two = {"order": order, "accumulation": 1, **n_passes}
    if launched:
        finished(run_script(store, tmp_path / "two", 2, **two))
    else:
        for process in run_forks(store, tmp_path / "two", 2, **two):
            process.join(300)
            process.kill()
            assert process.exitcode == 0
    one = {"order": order, "accumulation": 2, **n_passes}
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), str(store.path), str(tmp_path / "one"), json.dumps(one)])
    train_cells.main()  # here, where all is imported
    cells = np.flatnonzero(store.lengths > 0).tolist()
    ranks = [json.loads((tmp_path / "two" / f"seen-{rank}.json").read_text()) for rank in (0, 1)]
    assert [rank["world_size"] for rank in ranks] == [2, 2]
    n_steps = {len(rank["batches"]) for rank in ranks}
    assert len(n_steps) == 1
    if order == "packed stream":  # which has passes, and no epochs
        seen = sum((sum(rank["batches"][:2], []) for rank in ranks), [])
        assert len(seen) == len(set(seen)) and set(seen) <= set(cells)
    else:
        assert (steps := n_steps.pop()) % 3 == 0
        for epoch in range(3):
            part = slice(epoch * steps // 3, (epoch + 1) * steps // 3)
            seen = sum((sum(rank["batches"][part], []) for rank in ranks), [])
            assert sorted(seen) == cells
    alone = json.loads((tmp_path / "one" / "seen-0.json").read_text())
    assert alone["world_size"] == 1
    np.testing.assert_allclose(ranks[0]["losses"], alone["losses"], atol=1e-5, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("order", ["random", "objectives"])
def test_two_processes_evaluate_each_cell_once(store, tmp_path, order):
    # 59 cells: five of the last eight fill up the batches of two processes.
    ddp = {"ddp_find_unused_parameters": False, "ddp_bucket_cap_mb": 1, "ddp_broadcast_buffers": False}
    settings = {"order": order, "accumulation": 1, "epochs": 1, "steps": 1, "evaluate": True}
    two = run_script(store, tmp_path / "two", 2, **settings, arguments=ddp if order == "random" else {})
    one = run_script(store, tmp_path / "one", 1, **settings)
    finished(two), finished(one)
    alone = json.loads((tmp_path / "one" / "seen-0.json").read_text())["evaluated"]
    names = ["eval_genes_loss", "eval_genes_accuracy", "eval_cell_type_loss", "eval_cell_type_accuracy"]
    names += ["eval_loss"] if order == "random" else ["eval_mlm_loss", "eval_decode_loss"]
    for rank in (0, 1):
        seen = json.loads((tmp_path / "two" / f"seen-{rank}.json").read_text())
        assert seen["world_size"] == 2
        assert [seen["evaluated"][name] for name in names] == pytest.approx([alone[name] for name in names], rel=1e-5)


@pytest.mark.slow
def test_two_processes_learn_of_neighborhoods_what_one_does(store, tmp_path):
    two = run_script(store, tmp_path / "two", 2, order="neighborhoods", accumulation=1, epochs=3)
    one = run_script(store, tmp_path / "one", 1, order="neighborhoods", accumulation=2, epochs=3)
    finished(two), finished(one)
    two, one = (json.loads((tmp_path / name / "seen-0.json").read_text()) for name in ("two", "one"))
    assert (two["world_size"], one["world_size"]) == (2, 1) and len(one["losses"]) == 12
    np.testing.assert_allclose(two["losses"], one["losses"], atol=1e-5, rtol=0)
    for name in ("eval_loss", "eval_pearson_r"):
        assert two["evaluated"][name] == pytest.approx(one["evaluated"][name], rel=1e-5)


@pytest.mark.parametrize("order", ["labels", "labels stream"])
def test_two_processes_learn_of_label_columns_what_one_does(adata, tmp_path, monkeypatch, order):
    """The labels that are missing are not spread evenly over the processes, and are not counted."""
    adata.obs["level"] = pd.Categorical(np.take(["high", "low", "mid"], np.arange(60) % 3))
    adata.obs.loc[adata.obs_names[:40], "level"] = None
    adata.obs.loc[adata.obs_names[41::5], "cell_type"] = None
    store = CellStore.build(tmp_path / "store", adata, obs=["cell_type", "level"], report=False)
    settings = {"order": order, "epochs": 3, "steps": 12}
    for process in run_forks(store, tmp_path / "two", 2, accumulation=1, **settings):
        process.join(300)
        process.kill()
        assert process.exitcode == 0
    arguments = json.dumps({"accumulation": 2, **settings})
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), str(store.path), str(tmp_path / "one"), arguments])
    train_cells.main()
    two, one = (json.loads((tmp_path / name / "seen-0.json").read_text()) for name in ("two", "one"))
    assert (two["world_size"], one["world_size"]) == (2, 1) and len(one["losses"]) == 12
    np.testing.assert_allclose(two["losses"], one["losses"], atol=1e-5, rtol=0)
    for name in ("eval_loss", "eval_cell_type_accuracy", "eval_level_accuracy"):
        assert two["evaluated"][name] == pytest.approx(one["evaluated"][name], rel=1e-5)


def run_two(store, folder, launched, **settings) -> list[dict]:
    if launched:
        finished(run_script(store, folder, 2, **settings))
    else:
        for process in run_forks(store, folder, 2, **settings):
            process.join(300)
            process.kill()
            assert process.exitcode == 0
    return [json.loads((folder / f"seen-{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.skipif(
    Version(version("transformers")) < Version("5.18"), reason="transformers loads the optimizer onto cpu:0"
)
@pytest.mark.parametrize(
    ("order", "workers"),
    [
        ("stream", 0),
        ("packed stream", 0),
        pytest.param("grouped stream", 0, marks=_slow),
        pytest.param("labels stream", 1, marks=_slow),
    ],
)
def test_two_processes_read_a_split_stream_and_resume_it(adata, tmp_path, order, workers):
    """One has 16 cells and the other 17, of 8 per batch; a run resumed within the second epoch ends bit-equal."""
    adata.obs["level"] = pd.Categorical(np.take(["high", "low", "mid"], np.arange(60) % 3))
    store = CellStore.build(tmp_path / "store", adata[:33], obs=["cell_type", "level"], report=False)
    settings = {"order": order, "split": True, "epochs": 3, "steps": 8 if order == "packed stream" else -1}
    settings |= {"accumulation": 2, "save": True, "keep": 10, "arguments": {"dataloader_num_workers": workers}}
    whole = run_two(store, tmp_path / "run", workers > 0, **settings)
    assert [rank["world_size"] for rank in whole] == [2, 2]
    n_steps = len(whole[0]["losses"])
    assert n_steps == (8 if order == "packed stream" else 6) and whole[0]["weights"] == whole[1]["weights"]
    parts = [0, 1, 2, *range(4, 16)], [*range(16, 33)]  # the cell without counts is left out
    if order in ("stream", "grouped stream"):
        assert [rank["n_read"] for rank in whole] == [3 * 16 + 8, 3 * 17]  # 8 for the checksum of the cells
        for rank, part in zip(whole, parts, strict=True):
            epochs = [sum(rank["batches"][first : first + 3], []) for first in (0, 3, 6)]
            assert len(rank["batches"]) == 9 and [sorted(epoch) for epoch in epochs] == [part] * 3
    checkpoint = tmp_path / "run" / "checkpoint-3"  # after two batches of the second epoch
    assert {file.name for file in checkpoint.glob("stream_*")} == {"stream_mark_0.json", "stream_mark_1.json"}
    (tmp_path / "resumed").mkdir()
    shutil.copytree(checkpoint, tmp_path / "resumed" / checkpoint.name)
    resumed = run_two(store, tmp_path / "resumed", workers > 0, **settings, resume=3)
    assert [rank["weights"] for rank in resumed] == [rank["weights"] for rank in whole]
    assert resumed[0]["losses"] == whole[0]["losses"]
    if order in ("stream", "grouped stream"):
        for rank, again in zip(whole, resumed, strict=True):
            assert again["batches"] == rank["batches"][5:]
        assert [rank["n_read"] <= 8 + 2 * n for rank, n in zip(resumed, (16, 17), strict=True)] == [True, True]


@pytest.mark.slow
def test_a_run_killed_ten_times_while_it_saves_is_the_uninterrupted_one(store, tmp_path):
    settings = {"order": "random", "epochs": 4, "accumulation": 1, "save": True, "hidden_size": 512}
    finished(run_script(store, tmp_path / "whole", **settings))
    expected = json.loads((tmp_path / "whole" / "seen-0.json").read_text())["losses"]
    rng = np.random.default_rng(0)
    n_killed = 0
    for _ in range(40):
        process = run_script(store, tmp_path / "killed", **settings)
        target = None
        while process.poll() is None and target is None:  # wait for the writing of a checkpoint to begin
            done = last_whole_checkpoint(tmp_path / "killed")
            folders = {path for path in (tmp_path / "killed").glob("checkpoint-*")}
            target = next((path for path in folders if not (path / "trainer_state.json").exists()), None)
            del done
        if process.poll() is not None:
            break
        time.sleep(rng.uniform(0, 0.05))
        process.kill()
        process.communicate()
        n_killed += 1
        if n_killed == 10:
            break
    assert n_killed == 10
    finished(run_script(store, tmp_path / "killed", **settings))
    assert json.loads((tmp_path / "killed" / "seen-0.json").read_text())["losses"] == expected
