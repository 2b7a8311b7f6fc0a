"""Leaving the group of processes before Python ends."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import distributed, nn
from transformers import TrainingArguments

from stformer_hf.training.process_group import leave_gloo_at_exit, leave_process_group
from stformer_hf.training.resumable_trainer import ResumableTrainer

needs_proc = pytest.mark.skipif(
    not Path("/proc/self/task").exists(), reason="threads have names in /proc on Linux only"
)


def threads_of_gloo() -> list[str]:
    names = [(task / "comm").read_text().strip() for task in Path("/proc/self/task").iterdir()]
    return [name for name in names if "gloo" in name]


@needs_proc
def test_no_thread_of_gloo_outlives_the_group(tmp_path):
    """Else it may free a tensor while Python ends, which aborts the process."""
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    trainer = {"model": nn.parallel.DistributedDataParallel(nn.Linear(2, 2))}
    trainer["itself"] = trainer
    trainer["model"](torch.ones(1, 2)).sum().backward()
    assert threads_of_gloo()
    del trainer
    leave_process_group()
    assert not distributed.is_initialized() and not threads_of_gloo()
    leave_process_group()  # without a group, it does nothing


def test_trainers_leave_the_group_at_the_end(tmp_path):
    leave_gloo_at_exit.cache_clear()
    ResumableTrainer(nn.Linear(2, 2), TrainingArguments(str(tmp_path), use_cpu=True, report_to="none"))
    assert leave_gloo_at_exit.cache_info().currsize == 1


@needs_proc
def test_a_script_leaves_the_group_at_its_end(tmp_path):
    script = f"""
import atexit
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_process_group import threads_of_gloo
atexit.register(lambda: print("at the end", threads_of_gloo()))  # runs last
from torch import distributed
from stformer_hf.training.process_group import leave_gloo_at_exit
leave_gloo_at_exit()
distributed.init_process_group("gloo", init_method="file://{tmp_path}/group", rank=0, world_size=1)
print("before", len(threads_of_gloo()) > 0)
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout == "before True\nat the end []\n", run.stderr
