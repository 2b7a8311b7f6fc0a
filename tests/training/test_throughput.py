"""What the log says of speed: counts against the batches themselves, of padded and packed ones; never seconds."""

import json
import os
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import TrainerCallback, TrainingArguments

from stformer_hf import (
    CellNeighborhoodConfig,
    CellNeighborhoodModel,
    CellTrainer,
    GeneBertConfig,
    GeneBertForClassification,
    GeneBertForPhenotypicMLM,
    STFormerPretrainer,
)
from stformer_hf.training import throughput
from stformer_hf.training.throughput import BF16_PEAKS, ModelFlops, Throughput

FIGURES = {"tokens_per_second", "cells_per_second", "padding_share", "data_wait_share", "peak_memory_gb"}


def make_trainer(folder, store, tokenizer, packing=False, callbacks=None, **changes):
    settings = {
        "per_device_train_batch_size": 5,
        "num_train_epochs": 2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        **changes,
    }
    torch.manual_seed(0)
    config = GeneBertConfig.from_tokenizer(
        tokenizer, num_hidden_layers=1, num_attention_heads=2, hidden_size=16, intermediate_size=32
    )
    return STFormerPretrainer(
        TrainingArguments(str(folder), **settings),
        store,
        model=GeneBertForPhenotypicMLM(config),
        processing_class=tokenizer,
        packing=packing,
        eval_dataset=store,
        callbacks=callbacks,
    )


class Collated:
    """Keeps the batches that a collator makes, as lists of the lengths of their cells and numbers of positions."""

    def __init__(self, trainer):
        self.lengths, self.positions, self.labels = [], [], []
        self.collator = trainer.data_collator
        trainer.data_collator = self

    def __getattr__(self, name):
        return getattr(self.collator, name)

    def __call__(self, examples):
        batch = self.collator(examples)
        if "seq_idx" in batch:
            of = np.bincount(batch["seq_idx"][0].numpy()).tolist()
        else:
            of = [sum(row) for row in batch["attention_mask"].tolist()]
        self.lengths.append(of)
        self.positions.append(np.prod(batch["input_ids"].shape).item())
        self.labels.append(sum(label != -100 for row in batch["labels"].tolist() for label in row))
        return batch


@pytest.fixture
def seen(monkeypatch):
    """What each log was made of: the gathered sums since the last log."""
    calls, figures = [], Throughput.figures

    def watch(self, of_run=False):
        before = dict.fromkeys(self._at_last_log, 0) if of_run else self._at_last_log
        result = figures(self, of_run)
        calls.append({name: self._at_last_log[name] - before[name] for name in before})
        return result

    monkeypatch.setattr(Throughput, "figures", watch)
    return calls


@pytest.mark.parametrize(("packing", "accumulation"), [(False, 1), (True, 3)])
def test_counts_are_those_of_the_batches(store, tokenizer, tmp_path, seen, packing, accumulation):
    trainer = make_trainer(tmp_path, store, tokenizer, packing, gradient_accumulation_steps=accumulation)
    batches = Collated(trainer)
    result = trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    in_epoch = len(batches.lengths) // 2
    steps = [
        range(start, min(start + accumulation, epoch + in_epoch))
        for epoch in (0, in_epoch)
        for start in range(epoch, epoch + in_epoch, accumulation)
    ]
    assert len(steps) == len(logs) == len(seen) - 1
    for step, log, counted in zip(steps, logs, seen, strict=False):
        lengths = [length for batch in step for length in batches.lengths[batch]]
        n_positions = sum(batches.positions[batch] for batch in step)
        assert (counted["tokens"], counted["cells"]) == (sum(lengths), len(lengths))
        assert counted["positions"] == n_positions
        assert counted["squares"] == sum(length**2 for length in lengths)
        assert counted["predictions"] == sum(batches.labels[batch] for batch in step)
        assert log["padding_share"] == pytest.approx(1 - sum(lengths) / n_positions)
        assert log.keys() >= FIGURES and "mfu" not in log
        assert 0 <= log["data_wait_share"] <= 1
        assert log["tokens_per_second"] / log["cells_per_second"] == pytest.approx(sum(lengths) / len(lengths))
    n_tokens = sum(map(sum, batches.lengths))
    assert seen[-1]["tokens"] == trainer.throughput.totals["tokens"] == n_tokens
    assert seen[-1]["cells"] == trainer.throughput.totals["cells"] == 2 * 59
    assert packing == (logs[0]["padding_share"] == 0)
    assert result.metrics["train_padding_share"] == pytest.approx(1 - n_tokens / sum(batches.positions))
    assert result.metrics.keys() >= {f"train_{name}" for name in FIGURES}
    assert result.metrics.keys() <= trainer.state.log_history[-1].keys() | {"epoch"}


@pytest.mark.slow
def test_a_resumed_run_counts_what_it_trains_on_and_remembers_the_rest(store, tokenizer, tmp_path, seen):
    whole = make_trainer(tmp_path / "whole", store, tokenizer)
    whole.train()
    at_end, whole_steps = whole.throughput.totals, list(seen)
    seen.clear()
    settings = {"save_strategy": "steps", "save_steps": 5}
    first = make_trainer(tmp_path / "cut", store, tokenizer, callbacks=[StopAfter(7)], **settings)
    first.train()
    state = json.loads((tmp_path / "cut" / "checkpoint-5" / "trainer_state.json").read_text())
    assert state["stateful_callbacks"]["Throughput"]["cells"] == 25
    seen.clear()
    again = make_trainer(tmp_path / "cut", store, tokenizer, **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-5"))
    names = ("tokens", "cells", "positions", "squares")
    assert [[step[name] for name in names] for step in seen[:-1]] == [
        [step[name] for name in names] for step in whole_steps[5:-1]
    ]
    assert seen[-1]["cells"] == 2 * 59 - 25
    assert [again.throughput.totals[name] for name in ("tokens", "cells")] == [at_end["tokens"], at_end["cells"]]


class StopAfter(TrainerCallback):
    def __init__(self, n_steps):
        self.n_steps = n_steps

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop |= state.global_step == self.n_steps


@pytest.mark.slow
def test_a_checkpoint_of_before_the_figures_resumes(store, tokenizer, tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 5, "max_steps": 10}
    make_trainer(tmp_path, store, tokenizer, **settings).train()
    path = tmp_path / "checkpoint-5" / "trainer_state.json"
    state = json.loads(path.read_text())
    del state["stateful_callbacks"]["Throughput"]
    path.write_text(json.dumps(state))
    again = make_trainer(tmp_path, store, tokenizer, **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    assert again.throughput.totals["cells"] == 25


def test_the_clock_stands_still_while_the_trainer_evaluates_and_saves(store, tokenizer, tmp_path, monkeypatch):
    clock = {"now": 0.0}
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: clock["now"])
    trainer = make_trainer(
        tmp_path,
        store,
        tokenizer,
        max_steps=4,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
    )
    loop, step, save = trainer.evaluation_loop, trainer.training_step, trainer._save_checkpoint

    def slowly(function, seconds):
        def slow(*args, **kwargs):
            clock["now"] += seconds
            return function(*args, **kwargs)

        return slow

    collator = trainer.data_collator
    trainer.evaluation_loop, trainer._save_checkpoint = slowly(loop, 1000), slowly(save, 500)
    trainer.training_step, trainer.data_collator = slowly(step, 3), slowly(collator, 1)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    # accelerate reads a batch ahead: two are waited for at first.
    assert [log["cells_per_second"] for log in logs] == pytest.approx([5 / 5, 5 / 4, 5 / 4, 5 / 4])
    assert [log["data_wait_share"] for log in logs] == pytest.approx([2 / 5, 1 / 4, 1 / 4, 1 / 4])
    assert trainer.throughput.totals["seconds"] == pytest.approx(17)
    last = trainer.state.log_history[-1]
    assert last["train_cells_per_second"] == pytest.approx(20 / 17)
    assert clock["now"] > 3000


def test_the_first_wait_of_a_resumed_run_is_not_the_datas(store, tokenizer, tmp_path):
    trainer = make_trainer(tmp_path, store, tokenizer)

    def batches():
        time.sleep(0.05)  # skips
        yield {}
        yield {}

    for resumed in (False, True):
        trainer.state.global_step = int(resumed)
        trainer.throughput.begin()
        trainer.throughput.start()
        assert list(trainer.throughput.timed(batches())) == [{}, {}]
        sums, _ = trainer.throughput._gather()
        assert (sums["wait"] < 50_000) == (sums["elapsed"] < 50_000) == resumed


def test_neighbourhoods_are_counted(tmp_path):
    trainer = CellTrainer(
        model=CellNeighborhoodModel(CellNeighborhoodConfig.from_size("tiny", n_genes=4, n_cell_types=2)),
        args=TrainingArguments(str(tmp_path), report_to="none", use_cpu=True),
        data_collator=list,
    )
    trainer.throughput.count({"observed_cell_type": torch.zeros(7), "masked_cell_type": torch.zeros(3), "bs": 3})
    trainer.throughput.count({"something": torch.zeros(7)})
    sums, _ = trainer.throughput._gather()
    assert (sums["tokens"], sums["positions"], sums["cells"]) == (10, 10, 3)


def test_operations_are_those_that_torch_counts(tokenizer):
    """Of an encoder without embeddings 6 N T + 12 L d s^2 is what its matrix products do, forward and backward."""
    from torch.utils.flop_counter import FlopCounterMode

    config = GeneBertConfig.from_tokenizer(
        tokenizer, num_hidden_layers=2, num_attention_heads=2, hidden_size=64, intermediate_size=256
    )
    config._attn_implementation = "eager"
    model = GeneBertForPhenotypicMLM(config)
    ids = torch.full((2, 200), 5)
    labels = torch.full((2, 200), -100)
    labels[:, :4] = 5
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, token_type_ids=ids, attention_mask=torch.ones_like(ids), labels=labels).loss.backward()
    flops = ModelFlops(model)
    assert flops(400, 2 * 200**2, 8) == pytest.approx(counter.get_total_flops(), rel=0.02)  # biases, norms: no product
    last = 64 * 64 + 64 + 2 * 64 * 256 + 256 + 64 + 2 * 64  # at labelled tokens alone, as the head
    by_hand = 2 * (4 * 64 * 64 + 4 * 64 + 2 * 64 * 256 + 256 + 64 + 4 * 64) - last
    assert flops.encoder - by_hand in (0, 2 * 64)  # with or without a norm after the embeddings
    assert flops.attention == 2 * 64


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_operations_of_a_classifier_are_those_that_torch_counts(tokenizer, pooling):
    """What follows the attention of the last layer is computed for [CLS] alone, or for all tokens."""
    from torch.utils.flop_counter import FlopCounterMode

    sizes = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 64, "intermediate_size": 256}
    config = GeneBertConfig.from_tokenizer(tokenizer, num_labels=3, classifier_pooling=pooling, **sizes)
    config._attn_implementation = "eager"
    model = GeneBertForClassification(config)
    ids = torch.full((2, 200), 5)
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, token_type_ids=ids, labels=torch.tensor([0, 1])).loss.backward()
    assert ModelFlops(model)(400, 2 * 200**2, 2) == pytest.approx(counter.get_total_flops(), rel=0.02)


def test_a_decoder_of_cells_reads_all_states(tokenizer):
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 64, "intermediate_size": 256}
    fields = {"cell_embedding": True, "pooling": "cls", "num_genes": 9}
    plain, decodes = (
        ModelFlops(GeneBertForPhenotypicMLM(GeneBertConfig.from_tokenizer(tokenizer, **sizes, **fields, **more)))
        for more in ({}, {"cell_decoder": True})
    )
    assert decodes.encoder - plain.encoder == 64 * 64 + 64 + 2 * 64 * 256 + 256 + 64 + 2 * 64


@pytest.mark.parametrize("name", ["NVIDIA H200", "NVIDIA GeForce RTX 4090 Laptop GPU", "AMD"])
@pytest.mark.parametrize("trained", ["all", "no embeddings", "no first layer", "no norms"])
def test_share_of_the_peak_of_known_gpus_if_the_whole_encoder_is_trained(
    store, tokenizer, tmp_path, monkeypatch, name, trained
):
    trainer = make_trainer(tmp_path, store, tokenizer)
    encoder = trainer.model.base_model
    encoder.get_input_embeddings().requires_grad_(trained != "no embeddings")
    encoder.layers[0].requires_grad_(trained != "no first layer")
    for part in encoder.modules():  # as of a fixed [CLS]
        if isinstance(part, torch.nn.LayerNorm):
            part.requires_grad_(trained not in ("no norms", "no first layer"))
    meter = trainer.throughput
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    with monkeypatch.context() as patch:  # a GPU there is not; what it is asked is
        patch.setattr(type(trainer.args), "device", torch.device("cuda"))
        meter.look_at(trainer.model)
    meter.count({"input_ids": torch.ones(2, 6), "attention_mask": torch.tensor([[1] * 6, [1] * 4 + [0] * 2])})
    meter._elapsed = 2.0
    figures = meter.figures()
    assert ("mfu" in figures) == (name == "NVIDIA H200" and trained != "no first layer")
    if "mfu" in figures:
        assert figures["mfu"] == pytest.approx(ModelFlops(trainer.model)(10, 36 + 16, 2) / 2 / BF16_PEAKS[name])


@pytest.mark.slow
def test_two_processes_are_counted_together(store, tmp_path):
    script = Path(__file__).with_name("train_cells.py")
    told = json.dumps({"order": "random", "epochs": 1, "accumulation": 1, "save": True})
    run = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
        + [str(script), str(store.path), str(tmp_path), told],
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    ranks = [json.loads((tmp_path / f"seen-{rank}.json").read_text()) for rank in (0, 1)]
    assert [rank["world_size"] for rank in ranks] == [2, 2]
    last = max(tmp_path.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    totals = json.loads((last / "trainer_state.json").read_text())["stateful_callbacks"]["Throughput"]
    assert totals["cells"] == sum(len(batch) for rank in ranks for batch in rank["batches"]) == 59


@pytest.mark.gpu
def test_counting_does_not_wait_for_the_gpu(store, tokenizer, tmp_path):
    trainer = make_trainer(tmp_path, store, tokenizer, use_cpu=False, max_steps=2)
    trainer.train()
    batch = trainer._prepare_inputs(trainer.data_collator(store.__getitems__([0, 1])))
    torch.cuda.set_sync_debug_mode("error")
    try:
        trainer.throughput.count(batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.slow
def test_trackio_has_the_figures_without_a_network(store, tokenizer, tmp_path):
    pytest.importorskip("trackio")
    code = (
        "import sys, torch; sys.path.insert(0, sys.argv[1]); from conftest import make_adata; "
        "from test_throughput import make_trainer; from stformer_hf import CellStore, GeneTokenizer; "
        "store = CellStore(sys.argv[2]); tokenizer = GeneTokenizer.from_store(store); "
        "make_trainer(sys.argv[3], store, tokenizer, report_to='trackio', project='cells', max_steps=3).train()"
    )
    here = Path(__file__).parent
    run = subprocess.run(
        [sys.executable, "-c", code, str(here), str(store.path), str(tmp_path / "m")],
        env={
            **os.environ,
            "PYTHONPATH": str(here.parent),
            "TRACKIO_DIR": str(tmp_path / "trackio"),
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
        },
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    with sqlite3.connect(next((tmp_path / "trackio").glob("*.db"))) as database:
        logged = [json.loads(row[0]) for row in database.execute("SELECT metrics FROM metrics ORDER BY step")]
    steps = [entry for entry in logged if "train/loss" in entry]
    assert len(steps) == 3 and all(entry.keys() >= {f"train/{name}" for name in FIGURES} for entry in steps)


def test_tensorboard_has_the_figures(store, tokenizer, tmp_path, monkeypatch):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "runs"))
    trainer = make_trainer(tmp_path, store, tokenizer, report_to="tensorboard", max_steps=3)
    trainer.train()
    events = accumulator.EventAccumulator(str(tmp_path / "runs")).Reload()
    for name in FIGURES:
        logged = [entry[name] for entry in trainer.state.log_history if name in entry]
        assert [event.value for event in events.Scalars(f"train/{name}")] == pytest.approx(logged)
        assert len(logged) == 3
