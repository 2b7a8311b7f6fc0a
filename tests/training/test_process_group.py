"""Leaving the group of processes before Python ends."""

import subprocess
import sys

from torch import distributed, nn
from transformers import TrainingArguments

from stformer_hf.training import process_group
from stformer_hf.training.process_group import leave_gloo_at_exit
from stformer_hf.training.resumable_trainer import ResumableTrainer


def test_trainers_leave_the_group_at_the_end(tmp_path):
    leave_gloo_at_exit.cache_clear()
    ResumableTrainer(nn.Linear(2, 2), TrainingArguments(str(tmp_path), use_cpu=True, report_to="none"))
    assert leave_gloo_at_exit.cache_info().currsize == 1


def test_threads_of_gloo_get_a_moment_before_the_group_is_destroyed(monkeypatch):
    done = []
    monkeypatch.setattr(process_group.time, "sleep", lambda seconds: done.append(seconds > 0.1))
    monkeypatch.setattr(distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed, "destroy_process_group", lambda: done.append("destroyed"))
    process_group.leave_process_group()
    assert done == [True, "destroyed"]


def test_a_script_leaves_its_group_at_the_end(tmp_path):
    """Python's lock changes hands only while this thread waits, which without an end like this aborts now and then."""
    script = f"""
import atexit, sys
import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel
from stformer_hf.training.process_group import leave_gloo_at_exit
atexit.register(lambda: print("at the end", distributed.is_initialized()))  # runs last
leave_gloo_at_exit()
distributed.init_process_group("gloo", init_method="file://{tmp_path}/group", rank=0, world_size=1)
sys.setswitchinterval(1000)
trainer = [DistributedDataParallel(torch.nn.Linear(2, 2))]
trainer.append(trainer)
trainer[0](torch.ones(1, 2)).sum().backward()
del trainer
print("before", distributed.is_initialized())
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert (run.returncode, run.stdout) == (0, "before True\nat the end False\n"), run.stderr
