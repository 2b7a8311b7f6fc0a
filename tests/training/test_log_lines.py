"""What a run writes to the screen: a line per log, no dicts."""

import math
import re
from types import SimpleNamespace

from transformers import TrainerControl, TrainerState

from stformer_hf.training.log_lines import LogLines, describe_logs

LOGS = {"loss": 1.23456, "grad_norm": 2.0, "learning_rate": 1e-3, "cells_per_second": 1234.5, "padding_share": 0.125}


def test_a_log_is_one_line(capsys):
    callback, control = LogLines(), TrainerControl()
    args, state = SimpleNamespace(disable_tqdm=True), TrainerState(max_steps=300)
    callback.on_log(args, state, control, logs={"eval_loss": 2.0})  # an evaluation before the training
    callback.on_train_begin(args, state, control)
    state.global_step = 20
    callback.on_step_end(args, state, control)
    callback.on_log(args, state, control, logs={**LOGS, "epoch": 0.5})
    state.global_step = 300
    callback.on_log(args, state, control, logs={"eval_loss": 1.0, "eval_accuracy": 0.5, "eval_runtime": 3.0})
    callback.on_train_end(args, state, control)
    before, first, last = capsys.readouterr().out.splitlines()
    assert before == "step 0/300 | eval loss 2"
    expected = "step 20/300 | loss 1.235 | learning rate 0.001 | 1,234 cells/s | padding share 12.5%"
    assert first.startswith(expected) and re.fullmatch(r" \| \d+ (s|min) left", first[len(expected) :])
    assert last == "step 300/300 | eval loss 1 | eval accuracy 50.0%"


def test_the_bar_writes_the_same_line_and_other_processes_write_none(capsys):
    callback, control = LogLines(), TrainerControl()
    args, state = SimpleNamespace(disable_tqdm=False), TrainerState(max_steps=2)
    callback.on_train_begin(args, state, control)
    state.global_step = 2
    callback.on_step_end(args, state, control)
    callback.on_log(args, state, control, logs=LOGS)
    assert callback.training_bar.n == 2
    callback.on_train_end(args, state, control)
    assert callback.training_bar is None
    assert f"step 2/2 | {' | '.join(describe_logs(LOGS))}" in capsys.readouterr().out
    callback.on_log(args, TrainerState(is_world_process_zero=False), control, logs=LOGS)
    assert capsys.readouterr().out == ""


def test_what_nobody_looks_at_is_left_out_also_at_the_end_of_a_run():
    assert describe_logs({"peak_memory_gb": 0.8, "train_peak_memory_gb": 0.8, "train_loss": 1.5}) == ["train loss 1.5"]


def test_the_loss_of_a_single_class_of_tokens_and_small_shares_are_left_out():
    one = {"loss": 1.6, "genes_loss": 1.601, "genes_nll": 1.599, "genes_accuracy": 0.25, "padding_share": 0.04}
    assert describe_logs(one) == ["loss 1.6", "genes accuracy 25.0%"]
    assert describe_logs({**one, "padding_share": 0.05})[-1] == "padding share 5.0%"
    assert describe_logs({"loss": 2.6, "genes_loss": 1.6}) == ["loss 2.6", "genes loss 1.6"]  # of two objectives
    two = {"loss": 1.6, "genes_loss": 1.5, "phenotypes_loss": 1.7}
    assert describe_logs(two) == ["loss 1.6", "genes loss 1.5", "phenotypes loss 1.7"]
    of_a_dataset = {"eval_blood_loss": 1.5}
    assert describe_logs(of_a_dataset) == ["eval blood loss 1.5"]
    baselines = {"eval_loss": 1.5, "eval_genes_nll": 1.5, "eval_gene_marginal_nll": 1.07, "eval_uniform_nll": 1.8}
    assert describe_logs(baselines) == ["eval loss 1.5", "eval gene marginal nll 1.07"]
    assert describe_logs({"padding_share": 0.01, "data_wait_share": 0.04, "mfu": 0.01}) == ["mfu 1.0%"]
    swaps = {
        "eval_loss": 2.0,
        "eval_own_context_nll": 1.8,
        "eval_swapped_context_nll": 1.9,
        "eval_context_swap_gap": 0.1,
    }
    assert describe_logs(swaps) == ["eval loss 2", "eval context swap gap 0.1"]


def test_the_loss_of_one_of_two_classes_is_shown_if_it_is_also_the_loss():
    two = {"loss": 1.6, "genes_loss": 1.6, "phenotypes_loss": 1.6}
    assert describe_logs(two) == ["loss 1.6", "genes loss 1.6", "phenotypes loss 1.6"]


def test_what_is_no_number_is_written_as_it_is():
    logs = {"loss": 1.0, "genes_loss": None, "padding_share": None, "wait_share": "4%", "cells_per_second": None}
    assert describe_logs(logs) == ["loss 1", "genes loss None", "padding share None", "wait share 4%", "cells None"]
    assert describe_logs({"loss": math.nan, "genes_loss": math.nan}) == ["loss nan", "genes loss nan"]
    assert describe_logs({"cells_per_second": "unknown", "step": 3}) == ["cells unknown", "step 3"]


def test_a_training_without_steps_has_no_bar_and_the_bar_of_an_evaluation_writes_its_lines(capsys):
    callback, control, written = LogLines(), TrainerControl(), []
    args, state = SimpleNamespace(disable_tqdm=False), TrainerState(max_steps=0)
    callback.on_train_begin(args, state, control)
    assert callback.training_bar is None
    callback.prediction_bar = SimpleNamespace(write=written.append)
    callback.on_log(args, state, control, logs={"eval_loss": 1.0})
    assert written == ["eval loss 1"] and capsys.readouterr().out == ""
