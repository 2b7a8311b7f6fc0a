"""Every field of the installed TrainingArguments works on cells, is mapped to what does, or is refused."""

import dataclasses
import signal

import numpy as np
import pytest
import torch
from transformers import Trainer, TrainingArguments
from transformers.trainer_pt_utils import LabelSmoother

from stformer_hf import (
    CellTrainer,
    DataCollatorForCellClassification,
    GeneBertConfig,
    GeneBertForClassification,
    GeneBertForPhenotypicMLM,
    NeighborhoodTrainer,
    STFormerPretrainer,
)
from stformer_hf.models.gene_bert import packed_attention
from stformer_hf.training import argument_checks

DEFAULTS = {field.name: field.default for field in dataclasses.fields(TrainingArguments)}
_NEW_NAMES = {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": False}}

# Fields that work as transformers documents them: each group is one run, with values other than the defaults.
RUNS = {
    "steps": {
        "max_steps": 3,
        "num_train_epochs": 2.0,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "cosine_with_restarts",
        "lr_scheduler_kwargs": {"num_cycles": 2},
        "warmup_steps": 1,
        "optim": "rmsprop",
        "optim_args": "momentum=0.5",
        "weight_decay": 0.1,
        "adam_beta1": 0.8,
        "adam_beta2": 0.9,
        "adam_epsilon": 1e-6,
        "max_grad_norm": 0.5,
        "gradient_accumulation_steps": 2,
        "average_tokens_across_devices": False,
    },
    "precision and memory": {
        "bf16": True,
        "bf16_full_eval": True,
        **(_NEW_NAMES if "activation_checkpointing" in DEFAULTS else {}),  # transformers 5.15 has the old ones only
        "torch_empty_cache_steps": 1,
        "neftune_noise_alpha": 5.0,
        "use_cache": True,
        "skip_memory_metrics": False,
    },
    "activations, by their old name": {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
    },
    "compiled": {"torch_compile": True, "torch_compile_backend": "eager", "torch_compile_mode": "default"},
    "logs": {
        "logging_strategy": "epoch",
        "logging_steps": 3,
        "logging_first_step": True,
        "log_on_each_node": False,
        "logging_nan_inf_filter": False,
        "include_num_input_tokens_seen": "non_padding",
        "log_level": "error",
        "log_level_replica": "error",
        "disable_tqdm": True,
        "report_to": [],
        "run_name": "run",
        "project": "cells",
    },
    "evaluation": {
        "eval_strategy": "steps",
        "eval_steps": 1,
        "eval_delay": 1,
        "per_device_eval_batch_size": 3,
        "prediction_loss_only": True,
        "eval_on_start": True,
        "eval_do_concat_batches": False,
        "eval_use_gather_object": True,
        "eval_accumulation_steps": 1,
        "include_for_metrics": ["loss"],
        "batch_eval_metrics": True,
    },
    "checkpoints": {
        "eval_strategy": "steps",
        "eval_steps": 1,
        "save_strategy": "best",
        "save_steps": 1,
        "save_only_model": True,
        "save_on_each_node": True,
        "save_total_limit": 1,
        "load_best_model_at_end": True,
        "metric_for_best_model": "genes_accuracy",
        "greater_is_better": True,
        "ignore_data_skip": True,
        "restore_callback_states_from_checkpoint": True,
    },
    "data": {
        "seed": 1,
        "data_seed": 2,
        "dataloader_num_workers": 1,
        "dataloader_pin_memory": False,
        "dataloader_persistent_workers": True,
        "dataloader_prefetch_factor": 1,
        "dataloader_multiprocessing_context": "fork",
        "dataloader_in_order": False,
        "remove_unused_columns": False,
        "label_names": ["labels"],
        "train_sampling_strategy": "sequential",
        "accelerator_config": {"non_blocking": True},
    },
    "the rest": {
        "do_train": True,
        "do_eval": True,
        "do_predict": True,
        "resume_from_checkpoint": "read by scripts, not by Trainer",
        "full_determinism": True,
    },
}

_SLOW = ("compiled", "the rest")

# Fields that do something else than in Trainer, each with its test.
MAPPED = {
    "label_smoothing_factor": "test_smoothed_labels_keep_their_weights",
    "auto_find_batch_size": "test_running_out_of_memory_lowers_a_token_budget",
    "dataloader_drop_last": "test_no_cell_is_dropped_from_an_evaluation",
    "length_column_name": "test_lengths_are_of_the_column_that_is_named",
    "enable_jit_checkpoint": "test_one_handler_saves_on_a_signal",
}

REFUSED = {
    "debug": ({"debug": "underflow_overflow"}, 'debug="underflow_overflow"'),
    "use_liger_kernel": ({"use_liger_kernel": True}, "use_liger_kernel"),
    "liger_kernel_config": ({"use_liger_kernel": True, "liger_kernel_config": {"rope": True}}, "use_liger_kernel"),
}

# Fields of other machines and services; those with a test elsewhere name its file.
ELSEWHERE = {
    "output_dir": "here",
    "use_cpu": "here",
    **dict.fromkeys(("fp16", "fp16_full_eval", "tf32"), "a GPU"),
    "optim_target_modules": "a further package",
    **dict.fromkeys(
        ("push_to_hub", "hub_token", "hub_private_repo", "hub_model_id", "hub_strategy", "hub_always_push"),
        "test_push_to_hub.py",
    ),
    "hub_revision": "test_push_to_hub.py",
    **dict.fromkeys(("trackio_space_id", "trackio_bucket_id", "trackio_static_space_id"), "test_throughput.py"),
    **dict.fromkeys(
        ("ddp_find_unused_parameters", "ddp_bucket_cap_mb", "ddp_broadcast_buffers"), "test_several_processes.py"
    ),
    **dict.fromkeys(("ddp_static_graph", "ddp_backend", "ddp_timeout", "local_rank"), "several processes"),
    **dict.fromkeys(("fsdp", "fsdp_config", "deepspeed", "parallelism_config"), "several GPUs"),
}


def pretrainer(folder, store, tokenizer, model=None, own=None, **arguments):
    settings = {"max_steps": 2, "save_strategy": "no", "report_to": "none", "disable_tqdm": True, "logging_steps": 1}
    torch.manual_seed(0)
    if model is None:
        config = GeneBertConfig.from_tokenizer(
            tokenizer, num_hidden_layers=1, num_attention_heads=2, hidden_size=8, intermediate_size=64
        )
        model = GeneBertForPhenotypicMLM(config)
    return STFormerPretrainer(
        TrainingArguments(str(folder), use_cpu=True, **{**settings, **arguments}),
        store,
        model=model,
        processing_class=tokenizer,
        eval_dataset=store.select(np.arange(10)),
        **(own or {}),
    )


def classifier(store, tokenizer, folder, settings=None, label="cell_type", **arguments):
    torch.manual_seed(0)
    names = {"id2label": {0: "B cell", 1: "T cell"}, "label2id": {"B cell": 0, "T cell": 1}}
    config = GeneBertConfig.from_tokenizer(
        tokenizer,
        num_hidden_layers=1,
        num_attention_heads=2,
        hidden_size=8,
        intermediate_size=16,
        **{**names, **(settings or {})},
    )
    tokenizer.included_phenotypes = []
    return CellTrainer(
        model=GeneBertForClassification(config).eval(),
        args=TrainingArguments(str(folder), use_cpu=True, report_to="none", disable_tqdm=True, **arguments),
        train_dataset=store,
        eval_dataset=store,
        data_collator=DataCollatorForCellClassification(tokenizer, label),
        processing_class=tokenizer,
    )


def test_the_table_has_every_field():
    parts = [*RUNS.values(), MAPPED, REFUSED, ELSEWHERE]
    assert set().union(*parts) == set(DEFAULTS)
    assert set(MAPPED.values()) <= set(globals())
    assert not [name for values in RUNS.values() for name, value in values.items() if value == DEFAULTS[name]]


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of the old name
@pytest.mark.parametrize(
    "group", [pytest.param(name, marks=[pytest.mark.slow] if name in _SLOW else []) for name in RUNS]
)
def test_it_works_as_documented(store, tokenizer, tmp_path, group):
    try:
        trainer = pretrainer(tmp_path, store, tokenizer, **RUNS[group])
        trainer.train()
        loss = trainer.evaluate()["eval_loss"]
    finally:
        torch.use_deterministic_algorithms(False)
    assert trainer.state.global_step == trainer.state.max_steps and np.isfinite(loss)


@pytest.mark.parametrize("field", REFUSED)
def test_what_cannot_work_is_refused(store, tokenizer, tmp_path, field):
    arguments, words = REFUSED[field]
    with pytest.raises(ValueError, match=words):
        pretrainer(tmp_path, store, tokenizer, **arguments)


@pytest.mark.parametrize("config", [{"split_batches": True}, {"even_batches": False}])
def test_batches_that_processes_would_divide_unevenly_are_refused(store, tokenizer, tmp_path, monkeypatch, config):
    trainer = pretrainer(tmp_path, store, tokenizer, accelerator_config=config)  # no harm in one process
    monkeypatch.setattr(TrainingArguments, "world_size", 2)
    from stformer_hf.training.argument_checks import check_arguments

    with pytest.raises(ValueError, match=f"{next(iter(config))}=.* is not supported on multiple processes"):
        check_arguments(trainer)


@pytest.mark.parametrize("name", ["dispatch_batches", "split_batches"])
def test_packed_batches_are_not_cut(store, tokenizer, tmp_path, name):
    with pytest.raises(ValueError, match=f"{name} would split a packed batch within cells"):
        pretrainer(tmp_path, store, tokenizer, own={"packing": True}, accelerator_config={name: True})


@pytest.mark.parametrize(
    ("changes", "cause"),
    [
        ({}, None),
        ({"bf16": False}, "needs half precision (bf16=True"),
        ({"bf16": False, "torch_compile": False}, None),
        ({"dropout": 0.1}, "needs attention_probs_dropout_prob=0"),
        ({"has_varlen": False}, "needs torch 2.10"),
        ({"capability": (7, 5)}, "needs a GPU of compute capability 8.0"),
        ({"has_varlen": False, "backend": "eager"}, None),
        ({"has_varlen": False, "packing": False}, None),
    ],
)
def test_compiled_attention_with_a_large_mask_is_warned_of(
    store, tokenizer, tmp_path, monkeypatch, caplog, changes, cause
):
    usual = {"bf16": True, "dropout": 0.0, "has_varlen": True, "capability": (9, 0), "backend": "sdpa"}
    having = {**usual, "packing": True, "torch_compile": True, **changes}
    shape = {"num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 16, "intermediate_size": 32}
    config = GeneBertConfig.from_tokenizer(tokenizer, **shape, attention_probs_dropout_prob=having["dropout"])
    config._attn_implementation = having["backend"]
    model = GeneBertForPhenotypicMLM(config)
    settings = {name: having[name] for name in ("bf16", "torch_compile")}
    trainer = pretrainer(tmp_path, store, tokenizer, model, own={"packing": having["packing"]}, **settings)
    assert "mask" not in caplog.text  # on a CPU
    monkeypatch.setattr(packed_attention, "HAS_VARLEN", having["has_varlen"])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: having["capability"])
    monkeypatch.setattr(type(trainer.args), "device", torch.device("cuda"))
    argument_checks.check_arguments(trainer)
    assert ("a mask of all pairs" in caplog.text) == (cause is not None)
    assert cause is None or cause in caplog.text


# ---------------------------------------------------------------------- label_smoothing_factor


def test_smoothed_labels_keep_their_weights(store, tokenizer, tmp_path):
    weights = [0.5, 4.0]
    trainer = classifier(
        store, tokenizer, tmp_path, {"class_weights": weights}, label_smoothing_factor=0.2, max_steps=1
    )
    found = trainer.evaluate()["eval_loss"]
    predicted = trainer.predict(trainer.eval_dataset)
    logits, labels = torch.tensor(predicted.predictions), torch.tensor(predicted.label_ids)
    expected = torch.nn.functional.cross_entropy(
        logits, labels, weight=torch.tensor(weights), label_smoothing=0.2, reduction="sum"
    ) / len(labels)
    assert found == pytest.approx(expected.item(), rel=1e-5)
    plain = LabelSmoother(epsilon=0.2)({"logits": logits}, labels).item()  # Trainer's own has no weights
    assert found != pytest.approx(plain, rel=0.05)
    trainer.train()
    assert trainer.model.config.classifier_label_smoothing == 0  # it is of the run, not of the model


def test_smoothed_tokens_are_those_of_a_model_made_with_smoothing(store, tokenizer, tmp_path):
    def losses(factor, smoothing):
        torch.manual_seed(0)
        config = GeneBertConfig.from_tokenizer(
            tokenizer,
            num_hidden_layers=1,
            num_attention_heads=2,
            hidden_size=8,
            intermediate_size=16,
            label_smoothing=smoothing,
            loss_weights={"genes": 3.0},
        )
        model = GeneBertForPhenotypicMLM(config)
        trainer = pretrainer(tmp_path, store, tokenizer, model, label_smoothing_factor=factor)
        trainer.train()
        return [entry[name] for entry in trainer.state.log_history for name in ("loss", "genes_loss") if name in entry]

    mapped = losses(0.3, 0.0)
    assert len(mapped) == 4 and mapped == losses(0.0, 0.3) == losses(0.3, 0.3)
    assert mapped != losses(0.0, 0.0)


def test_smoothing_without_classes_and_twice_is_refused(store, tokenizer, tmp_path):
    age = {"problem_type": "regression", "id2label": {0: "age"}, "label2id": {"age": 0}}
    with pytest.raises(ValueError, match="is 'regression'"):
        classifier(store, tokenizer, tmp_path, age, label="age", label_smoothing_factor=0.1)
    with pytest.raises(ValueError, match="classifier_label_smoothing=0.3 of the model: leave one of them out"):
        settings = {"classifier_label_smoothing": 0.3}
        classifier(store, tokenizer, tmp_path, settings, label_smoothing_factor=0.1)


# ---------------------------------------------------------------------- sizes and lengths


def test_running_out_of_memory_lowers_a_token_budget(store, tokenizer, tmp_path):
    trainer = pretrainer(tmp_path, store, tokenizer, own={"max_tokens_per_batch": 240}, auto_find_batch_size=True)
    forward, sizes, most = trainer.model.forward, [], 190

    def limited(*args, **kwargs):
        sizes.append(kwargs["input_ids"].numel())
        if sizes[-1] > most:
            raise RuntimeError("CUDA out of memory. Tried to allocate")
        return forward(*args, **kwargs)

    trainer.model.forward = limited
    trainer.train()
    assert trainer.state.global_step == 2 and most / 2 < max(sizes[-2:]) <= most < sizes[0] <= 240


def test_no_cell_is_dropped_from_an_evaluation(store, tokenizer, tmp_path):
    dropping = pretrainer(
        tmp_path,
        store,
        tokenizer,
        dataloader_drop_last=True,
        max_steps=-1,
        num_train_epochs=1,
        prediction_loss_only=True,
    )
    whole = pretrainer(tmp_path, store, tokenizer, prediction_loss_only=True)
    assert dropping.evaluate()["eval_loss"] == whole.evaluate()["eval_loss"]  # 10 cells in batches of 8
    classes = classifier(store, tokenizer, tmp_path, dataloader_drop_last=True)
    assert len(classes.predict(classes.eval_dataset).predictions) == 59
    dropping.train()
    assert dropping.state.global_step == 59 // 8


def test_a_subclass_may_choose_the_cells_to_evaluate(store, tokenizer, tmp_path):
    class First(STFormerPretrainer):
        def _get_eval_sampler(self, eval_dataset):
            return range(3)

    arguments = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True)
    model = GeneBertForPhenotypicMLM(GeneBertConfig.from_tokenizer(tokenizer, size="tiny"))
    trainer = First(arguments, store, model=model, eval_dataset=store, processing_class=tokenizer)
    assert [len(batch["input_ids"]) for batch in trainer.get_eval_dataloader()] == [3]


def test_lengths_are_of_the_column_that_is_named(store, tokenizer, tmp_path):
    tokens = store.tokenize(tokenizer, tmp_path / "tokens")
    tokens = tokens.rename_column("length", "n_tokens")

    def order(**arguments):
        trainer = pretrainer(tmp_path, store, tokenizer, train_sampling_strategy="group_by_length", **arguments)
        trainer.train_dataset = tokens
        return list(trainer.get_train_sampler())

    assert sorted(order(length_column_name="n_tokens")) == list(range(len(tokens)))
    with pytest.raises(ValueError, match="no column `length`"):
        order()


def test_one_handler_saves_on_a_signal(store, tokenizer, tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    trainer = pretrainer(tmp_path, store, tokenizer, enable_jit_checkpoint=True)
    assert signal.getsignal(signal.SIGTERM) is before  # transformers would listen from here on
    trainer.train()
    assert signal.getsignal(signal.SIGTERM) is before


# Private methods of Trainer that the trainers here override, because no public one or callback does the same.
OVERRIDDEN = {
    "_get_dataloader": "the samplers, collators and streams of this package",
    "_get_num_items_in_batch": "masked cells of neighbourhoods are the items",
    "_issue_warnings_after_load": "tied weights are not missing",
    "_load_optimizer_and_scheduler": "an error says what to do if other parameters are trained",
    "_maybe_log_save_evaluate": "the clock stops for it",
    "_prepare_for_training": "the clock and all sums start again, and the average starts or is loaded; the order is "
    "checked once more, since auto_find_batch_size may lower the batch size again",
    "_prepare_inputs": "DeepSpeed must not cast counts",
    "_run_epoch": "a finished run makes no step",
    "_save": "out-of-fold predictions, and cards that PEFT would overwrite",
    "_save_checkpoint": "an unfinished checkpoint is marked, and the order is saved",
    "_save_rng_state": "the first process waits for the others",
}


def test_a_sampler_that_is_not_asked_is_refused(store, tokenizer, tmp_path):
    """Trainer's own hook."""

    class Other(STFormerPretrainer):
        def _get_train_sampler(self, train_dataset=None):
            return range(3)

    arguments = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True)
    model = GeneBertForPhenotypicMLM(GeneBertConfig.from_tokenizer(tokenizer, size="tiny"))
    with pytest.raises(ValueError, match="Other overrides _get_train_sampler, .*: override get_train_sampler"):
        Other(arguments, store, model=model, processing_class=tokenizer)


def test_private_methods_that_are_overridden_exist_and_are_listed():
    ours = [kind for kind in (STFormerPretrainer, NeighborhoodTrainer) for kind in kind.__mro__]
    ours = {name for kind in ours if kind.__module__.startswith("stformer_hf") for name in vars(kind)}
    of_trainer = {name for name in dir(Trainer) if name.startswith("_") and not name.startswith("__")}
    assert ours & of_trainer == set(OVERRIDDEN)
