"""Training on packed batches, on a CPU and, with `-m gpu`, on a GPU: precision, compilation, resuming, waiting."""

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import TrainerCallback, TrainingArguments

from stformer_hf import GeneBertConfig, GeneBertForPhenotypicMLM, STFormerPretrainer

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
needs_compiler = pytest.mark.skipif(
    not hasattr(torch.compiler, "is_exporting"), reason="torch 2.6 cannot compile this"
)
EXACT, ROUNDED = {"rel": 1e-3}, {"rel": 2e-2}


@pytest.fixture
def train(store, tokenizer, tmp_path):
    """Train a model, and return the losses of its steps."""

    def run(device, resume=None, callbacks=None, **settings):
        settings = {
            "max_steps": 6,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "use_cpu": device == "cpu",
            "learning_rate": 1e-2,
            "logging_nan_inf_filter": False,
            **settings,
        }
        torch.manual_seed(0)
        shape = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 64, "intermediate_size": 64}
        no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        config = GeneBertConfig.from_tokenizer(tokenizer, **shape, **no_dropout)
        trainer = STFormerPretrainer(
            TrainingArguments(str(tmp_path), **settings),
            store,
            model=GeneBertForPhenotypicMLM(config),
            processing_class=tokenizer,
            packing=True,
            max_tokens_per_batch=200,
            callbacks=callbacks,
        )
        trainer.train(resume_from_checkpoint=resume)
        assert trainer.args.device.type == device and trainer.state.global_step == settings["max_steps"]
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    return run


@pytest.mark.parametrize("device", DEVICES)
def test_losses_are_those_of_float32_on_a_cpu(train, device):
    expected = train("cpu")
    assert expected[-1] < 0.9 * expected[0]
    found = train(device)
    assert found[0] == pytest.approx(expected[0], rel=1e-5) and found == pytest.approx(expected, **EXACT)
    assert train(device, bf16=True) == pytest.approx(expected, **ROUNDED)


@needs_compiler
@pytest.mark.parametrize("device", DEVICES)
def test_one_compilation_changes_no_loss(train, device):
    torch._dynamo.reset()
    counters.clear()
    backend = "eager" if device == "cpu" else "inductor"
    compiled = train(device, bf16=True, torch_compile=True, torch_compile_backend=backend)
    assert counters["stats"]["unique_graphs"] == 1
    assert compiled == pytest.approx(train(device, bf16=True), **ROUNDED)


@pytest.mark.parametrize("device", DEVICES)
def test_a_resumed_run_is_the_uninterrupted_one(train, tmp_path, device):
    saving = {"bf16": True, "save_strategy": "steps", "save_steps": 3}
    whole = train(device, **saving)
    resumed = train(device, resume=str(tmp_path / "checkpoint-3"), **saving)
    assert len(resumed) == 6 and resumed == pytest.approx(whole, rel=1e-3)


class RefuseToWait(TrainerCallback):
    """Raises an error if a step between the second and the last waits for the GPU."""

    def on_step_end(self, args, state, control, **kwargs):
        if args.device.type == "cuda":
            torch.cuda.set_sync_debug_mode("error" if 2 <= state.global_step < state.max_steps - 1 else "default")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=needs_compiler)])
def test_no_step_waits_for_the_gpu(train, device, compiled):
    """On a CPU, test_a_step_of_the_trainer_reads_no_value counts what would wait."""
    compiling = {"torch_compile": True, "torch_compile_backend": "eager" if device == "cpu" else "inductor"}
    settings = {"max_steps": 12, "logging_steps": 100, "bf16": True, **(compiling if compiled else {})}
    try:
        train(device, callbacks=[RefuseToWait()], **settings)
    finally:
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("default")
