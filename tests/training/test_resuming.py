"""A checkpoint is tied to the run that made it: its cells, its optimizer, its batch size, the precision of weights."""

import copy
import logging
import os
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import make_adata
from torch.utils.data import ConcatDataset, Subset
from transformers import AutoModelForMaskedLM, TrainerCallback, TrainerControl, TrainingArguments

from stformer_hf import (
    CellStore,
    CellTrainer,
    DataCollatorForCellClassification,
    GeneBertConfig,
    GeneBertForClassification,
    GeneBertForPhenotypicMLM,
    GeneTokenizer,
    IterableAnnDataset,
    STFormerPretrainer,
)
from stformer_hf.training.cell_checksum import describe_cells
from stformer_hf.training.checkpoints import checkpoint_to_resume


def make_trainer(folder, cells, tokenizer, config, model=None, callbacks=None, **changes):
    settings = {
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "logging_steps": 1,
        "save_strategy": "steps",
        "save_steps": 2,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    torch.manual_seed(0)
    return STFormerPretrainer(
        TrainingArguments(str(folder), **{**settings, **changes}),
        cells,
        model=model or GeneBertForPhenotypicMLM(config),
        processing_class=tokenizer,
        callbacks=callbacks,
    )


# ---------------------------------------------------------------------- cells


def as_kind(kind, store, tokenizer, folder):
    """The cells of a store as another kind of dataset, in the order of the store."""
    if kind == "store":
        return store
    if kind == "subset":
        return Subset(store, range(len(store)))
    if kind == "several":
        half = len(store) // 2
        return ConcatDataset([Subset(store, range(half)), Subset(store, range(half, len(store)))])
    if kind == "stream":
        return IterableAnnDataset(store, tokenizer)
    return store.tokenize(tokenizer, folder)


@pytest.mark.parametrize("kind", ["store", "subset", "several", "stream", "tokens"])
def test_a_description_is_of_the_cells_and_not_of_their_place(tokenizer, tmp_path, kind):
    def describe(name, cells):
        store = CellStore.build(tmp_path / name, cells, obs=["cell_type"], report=False)
        return describe_cells(as_kind(kind, store, tokenizer, tmp_path / f"{name}_tokens"))

    cells, one_count = make_adata(), make_adata()
    one_count.X.data[np.flatnonzero(one_count.X.data[: one_count.X.indptr[1]] == 1)[0]] = 9  # as many genes expressed
    first = describe("first", cells)
    assert first == describe("copy", cells)
    for name, other in (("others", make_adata(seed=1)), ("fewer", cells[:59].copy()), ("count", one_count)):
        assert describe(name, other) != first


def test_selections_of_one_store_differ(store):
    cells = [store, store.select(np.arange(50)), store.select(np.arange(10, 60)), store.select(np.arange(60)[::-1])]
    assert len({describe_cells(of) for of in cells}) == 4
    assert describe_cells(store.select(np.arange(60))) == describe_cells(store)
    assert describe_cells([1, 2]) == "2 rows" and describe_cells(None) is None


@pytest.mark.parametrize("kind", ["store", "tokens", "stream"])
def test_a_run_is_not_resumed_on_other_cells(store, tokenizer, config, tmp_path, kind):
    other = CellStore.build(tmp_path / "other", make_adata(seed=1), obs=["cell_type", "age"], report=False)
    cells, others = (as_kind(kind, of, tokenizer, tmp_path / f"{of.path.name}_tokens") for of in (store, other))
    make_trainer(tmp_path / "run", cells, tokenizer, config).train()
    checkpoint = str(tmp_path / "run" / "checkpoint-2")
    resumed = make_trainer(tmp_path / "run", others, tokenizer, config)
    with pytest.raises(
        ValueError, match=r"train_dataset was .* cells.* \(checksum .* and is .*be repeated or skipped"
    ):
        resumed.train(resume_from_checkpoint=checkpoint)
    assert resumed.state.global_step == 0
    make_trainer(tmp_path / "run", others, tokenizer, config, ignore_data_skip=True).train(
        resume_from_checkpoint=checkpoint if kind != "stream" else None
    )


def test_a_run_is_not_resumed_with_genes_in_another_order(store, tokenizer, config, tmp_path):
    make_trainer(tmp_path, store, tokenizer, config).train()
    other = GeneTokenizer.from_store(
        store, genes=tokenizer.genes[::-1], phenotypes=["cell_type"], bin_edges=[0.5, 1.5, 3.5]
    )
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 16, "intermediate_size": 32}
    resumed = make_trainer(
        tmp_path, store, other, GeneBertConfig.from_tokenizer(other, **sizes), ignore_data_skip=True
    )
    with pytest.raises(ValueError, match="checkpoint-2 and the model differ in vocabulary_fingerprint"):
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


@pytest.mark.parametrize("adapter", [False, True])
def test_a_run_is_not_resumed_with_classes_in_another_order(store, tokenizer, config, tmp_path, adapter):
    """The model has no names before it is trained, and takes those of the cells that it meets."""
    tokenizer.included_phenotypes = []
    renumbered = make_adata()
    renumbered.obs["cell_type"] = renumbered.obs["cell_type"].cat.reorder_categories(["T cell", "B cell"])
    renumbered = CellStore.build(tmp_path / "other", renumbered, obs=["cell_type", "age"], report=False)

    def trainer(cells, steps):
        model = GeneBertForClassification(copy.deepcopy(config))
        if adapter:
            peft = pytest.importorskip("peft")
            settings = peft.LoraConfig(task_type="SEQ_CLS", r=1, modules_to_save=["classifier", "pre_classifier"])
            model = peft.get_peft_model(model, settings)
        return CellTrainer(
            model=model,
            args=TrainingArguments(
                str(tmp_path / "run"), max_steps=steps, save_steps=1, report_to="none", disable_tqdm=True, use_cpu=True
            ),
            train_dataset=cells,
            data_collator=DataCollatorForCellClassification(tokenizer, "cell_type"),
            processing_class=tokenizer,
        )

    trainer(store, 1).train()
    with pytest.raises(ValueError, match="and the model differ in label2id: {'B cell': 0.*{'T cell': 0"):
        trainer(renumbered, 2).train(resume_from_checkpoint=True)
    trainer(store, 2).train(resume_from_checkpoint=True)


# ---------------------------------------------------------------------- what a checkpoint must have


@pytest.mark.parametrize("missing", ["optimizer.pt", "scheduler.pt", "trainer_state.json"])
def test_a_checkpoint_without_a_part_is_refused(store, tokenizer, config, tmp_path, missing):
    make_trainer(tmp_path, store, tokenizer, config).train()
    (tmp_path / "checkpoint-2" / missing).unlink()
    with pytest.raises(ValueError, match=f"checkpoint-2 has no {missing} .*load its weights with from_pretrained"):
        make_trainer(tmp_path, store, tokenizer, config).train(str(tmp_path / "checkpoint-2"))


def test_weights_alone_are_no_checkpoint_to_resume(store, tokenizer, config, tmp_path):
    make_trainer(tmp_path, store, tokenizer, config, save_only_model=True).train()
    with pytest.raises(ValueError, match=r"checkpoint-4 has no optimizer.pt, scheduler.pt \(save_only_model"):
        make_trainer(tmp_path, store, tokenizer, config).train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match="checkpoint-9 is not a checkpoint folder"):
        make_trainer(tmp_path, store, tokenizer, config).train(str(tmp_path / "checkpoint-9"))


def test_an_optimizer_of_other_parameters_is_refused(store, tokenizer, config, tmp_path):
    make_trainer(tmp_path, store, tokenizer, config).train()
    trainer = make_trainer(tmp_path, store, tokenizer, config)
    trainer.model.gene_bert.embeddings.requires_grad_(False)
    with pytest.raises(ValueError, match="checkpoint-2: its run trained other parameters .* Resume with"):
        trainer.train(str(tmp_path / "checkpoint-2"))


def test_a_finished_model_is_not_replaced_by_a_resumption(store, tokenizer, config, tmp_path):
    assert checkpoint_to_resume(tmp_path) is None  # nothing there: the run begins
    trainer = make_trainer(tmp_path, store, tokenizer, config, save_strategy="no")
    trainer.train(resume_from_checkpoint=True)
    trainer.save_model()
    with pytest.raises(FileExistsError, match="holds a model but no checkpoint"):
        make_trainer(tmp_path, store, tokenizer, config).train(resume_from_checkpoint=True)
    (tmp_path / "config.json").rename(tmp_path / "adapter_config.json")  # as an adapter is saved
    with pytest.raises(FileExistsError, match="holds a model but no checkpoint"):
        checkpoint_to_resume(tmp_path)


@pytest.mark.slow
def test_a_batch_size_that_was_found_is_resumed_with(store, tokenizer, config, tmp_path):
    def trainer(most):
        made = make_trainer(tmp_path, store, tokenizer, config, auto_find_batch_size=True)
        forward = made.model.forward

        def limited(*args, **kwargs):
            if len(kwargs["input_ids"]) > most:
                raise RuntimeError("CUDA out of memory. Tried to allocate")
            return forward(*args, **kwargs)

        made.model.forward = limited
        return made

    trainer(3).train()
    resumed = trainer(3)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert resumed.state.global_step == 4 and resumed.state.train_batch_size == 3
    with pytest.raises(ValueError, match="processes was 3 and is 2"):  # there is less memory than there was
        trainer(2).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


# ---------------------------------------------------------------------- signals


class Send(TrainerCallback):
    def __init__(self, number, times=1):
        self.number, self.times = number, times

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 1:
            for _ in range(self.times):
                os.kill(os.getpid(), self.number)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_after_the_step(store, tokenizer, config, tmp_path, number):
    before = signal.getsignal(number)
    trainer = make_trainer(tmp_path, store, tokenizer, config, callbacks=[Send(number)], save_strategy="no")
    trainer.train()
    assert trainer.interrupted is number and trainer.state.global_step == 2
    assert checkpoint_to_resume(tmp_path) == tmp_path / "checkpoint-2"
    assert signal.getsignal(number) is before


def test_several_processes_stop_one_step_after_the_signal(store, tokenizer, config, tmp_path):
    """What they tell each other is read in the next step, so that no step waits for the GPU."""
    callback = make_trainer(tmp_path, store, tokenizer, config)._on_signal
    args, control = SimpleNamespace(world_size=2, device=torch.device("cpu")), TrainerControl()
    stops = []
    for step in range(4):
        if step == 1:
            callback._come(signal.SIGTERM, None)
        callback.on_step_end(args, None, control)
        stops.append(control.should_training_stop and control.should_save)
    assert stops == [False, False, True, True]
    assert callback.trainer.interrupted is signal.SIGTERM


def test_a_second_ctrl_c_interrupts_at_once(store, tokenizer, config, tmp_path):
    before = signal.getsignal(signal.SIGINT)
    trainer = make_trainer(tmp_path, store, tokenizer, config, callbacks=[Send(signal.SIGINT, 2)])
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert trainer.state.global_step == 1 and signal.getsignal(signal.SIGINT) is before


# ---------------------------------------------------------------------- precision


def test_weights_in_half_precision_are_trained_in_float32(store, tokenizer, config, tmp_path, caplog):
    GeneBertForPhenotypicMLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "half")
    model = AutoModelForMaskedLM.from_pretrained(tmp_path / "half")
    assert model.dtype == torch.bfloat16
    trainer = make_trainer(tmp_path, store, tokenizer, config, model, learning_rate=1e-6, save_strategy="no")
    trainer.evaluate(store)
    assert model.dtype == torch.bfloat16  # only training needs more
    before = torch.cat([weight.detach().float().flatten() for weight in model.parameters()])
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert "The weights are bfloat16" in caplog.text and "dtype=torch.float32" in caplog.text
    after = torch.cat([weight.detach().flatten() for weight in model.parameters()])
    assert after.dtype == torch.float32 and (before != after).float().mean() > 0.5
    trainer.save_model(str(tmp_path / "trained"))
    assert AutoModelForMaskedLM.from_pretrained(tmp_path / "trained").dtype == torch.float32


@pytest.mark.parametrize("attention", ["flash_attention_2", "kernels-community/flash-attn2"])
def test_attention_that_needs_half_precision_is_refused(config, attention):
    from stformer_hf.training.float_weights import keep_in_float32

    model = GeneBertForPhenotypicMLM(config).to(torch.bfloat16)
    model.config._attn_implementation_internal = attention
    with pytest.raises(ValueError, match=f"{attention} does not support: pass bf16=True"):
        keep_in_float32(model, autocast=False)
    model.requires_grad_(False)
    keep_in_float32(model, autocast=False)
    assert model.dtype == torch.bfloat16
