"""`use_liger_kernel`: the loss of the MLM head without its logits, by Liger or by a stand-in for it in plain torch."""

import os
import sys
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import TrainingArguments
from transformers.integrations import liger as of_transformers

from stformer_hf import (
    CellTrainer,
    DataCollatorForCellClassification,
    DataCollatorForPhenotypicMLM,
    GeneBertConfig,
    GeneBertForClassification,
    GeneBertForPhenotypicMLM,
)
from stformer_hf.training import liger as of_this_package

EXACT = {"atol": 1e-5, "rtol": 1e-5}


def _fused(states, weight, labels, bias, reduction, return_predicted_tokens):
    """Compute what Liger documents; like it, refuse a batch without rows."""
    assert reduction == "none" and return_predicted_tokens and len(states)
    logits = states @ weight.T + bias
    loss = nn.functional.cross_entropy(logits, labels, reduction="none")
    return SimpleNamespace(loss=loss, predicted_tokens=logits.argmax(-1))


@pytest.fixture(params=["stand-in", "liger"])
def liger(request, monkeypatch):
    """Liger, on a CPU through Triton's interpreter if it is installed, or a stand-in."""
    if request.param == "liger":
        if find_spec("liger_kernel") is None:
            pytest.skip("liger-kernel is not installed")
        if os.environ.get("TRITON_INTERPRET") != "1":
            pytest.skip("Triton reads TRITON_INTERPRET when it is imported: set it to 1")
        return
    table = {}

    def apply(model, **kwargs):
        table[model.config.model_type](model=model)

    modules = {
        "liger_kernel": SimpleNamespace(),
        "liger_kernel.transformers": SimpleNamespace(_apply_liger_kernel_to_instance=apply),
        "liger_kernel.transformers.monkey_patch": SimpleNamespace(MODEL_TYPE_TO_APPLY_LIGER_FN=table),
        "liger_kernel.transformers.functional": SimpleNamespace(liger_fused_linear_cross_entropy=_fused),
    }
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(of_transformers, "is_liger_kernel_available", lambda: True)
    monkeypatch.setattr(of_this_package, "require_version", lambda *args: None)


def model_of(tokenizer, **fields) -> GeneBertForPhenotypicMLM:
    torch.manual_seed(0)
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 8, "intermediate_size": 16}
    config = GeneBertConfig.from_tokenizer(tokenizer, **sizes, **fields)
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.0
    return GeneBertForPhenotypicMLM(config)


def trainer_of(folder, store, tokenizer, model, collator=None, **arguments) -> CellTrainer:
    settings = {"use_cpu": True, "max_steps": 2, "report_to": "none", "disable_tqdm": True, "save_strategy": "no"}
    settings |= {"logging_steps": 1, "optim": "sgd", "learning_rate": 0.5}
    return CellTrainer(
        model,
        TrainingArguments(str(folder), **{**settings, **arguments}),
        collator or DataCollatorForPhenotypicMLM(tokenizer, mlm_probability=0.3),
        store,
        store,
        processing_class=tokenizer,
    )


def test_training_is_that_without_liger(liger, store, tokenizer, tmp_path):
    runs, logits = {}, {}
    for uses in (False, True):
        model = model_of(tokenizer, loss_weights={"genes": 3.0})
        trainer = trainer_of(tmp_path, store, tokenizer, model, use_liger_kernel=uses, gradient_accumulation_steps=2)
        found = logits[uses] = []
        hook = model.register_forward_hook(lambda module, args, out, found=found: found.append(out.logits))
        trainer.train()
        hook.remove()
        losses = [{k: v for k, v in entry.items() if "loss" in k or "acc" in k} for entry in trainer.state.log_history]
        runs[uses] = losses[:2], trainer.evaluate()["eval_loss"], [p.detach() for p in model.parameters()]
    assert logits[True] == [None] * 4 and None not in logits[False]
    for found, expected in zip(*(runs[uses][0] for uses in (True, False)), strict=True):
        assert found == pytest.approx(expected, abs=1e-5) and {"genes_loss", "cell_type_accuracy"} <= set(found)
    assert runs[True][1] == pytest.approx(runs[False][1], abs=1e-5)
    torch.testing.assert_close(runs[True][2], runs[False][2], **EXACT)


@pytest.mark.parametrize("packing", [False, True])
def test_loss_statistics_and_gradients(liger, store, tokenizer, tmp_path, packing):
    collator = DataCollatorForPhenotypicMLM(tokenizer, mlm_probability=0.3, packing=packing)
    batch = collator(store.__getitems__(range(9)))
    plain, fused = model_of(tokenizer), model_of(tokenizer)
    trainer_of(tmp_path, store, tokenizer, fused, use_liger_kernel=True, max_steps=1, learning_rate=0.0).train()
    unlabelled = {**batch, "labels": torch.full_like(batch["labels"], -100)}
    others = {"num_items_in_batch": torch.tensor(7), "output_hidden_states": True}
    for inputs in (batch, {**batch, **others}, unlabelled):
        outputs = []
        for model in (plain.train(), fused.train()):
            model.zero_grad()
            outputs.append(model(**inputs))
            outputs[-1].loss.backward()
        torch.testing.assert_close(outputs[1].loss, outputs[0].loss, **EXACT)
        torch.testing.assert_close(outputs[1].class_statistics, outputs[0].class_statistics, **EXACT)
        for (name, one), other in zip(plain.named_parameters(), fused.parameters(), strict=True):
            torch.testing.assert_close(other.grad, one.grad, **EXACT, msg=lambda text, name=name: f"{name}: {text}")
    assert fused.eval()(**batch).logits.shape[-1] == tokenizer.vocab_size  # unless it is told to skip them
    assert fused(**batch, skip_logits=True).logits is None


def test_a_head_that_an_adapter_trains_in_full(liger, store, tokenizer, tmp_path):
    """PEFT wraps the head, and trains a copy of it (modules_to_save)."""
    peft = pytest.importorskip("peft")
    runs = {}
    for uses in (False, True):
        settings = peft.LoraConfig(r=2, target_modules=["q_lin"], modules_to_save=["mlm_head"])
        model = peft.get_peft_model(model_of(tokenizer), settings)
        trainer_of(tmp_path, store, tokenizer, model, use_liger_kernel=uses).train()
        runs[uses] = {name: of.detach() for name, of in model.named_parameters() if "mlm_head.modules" in name}
    assert len(runs[True]) == 6
    torch.testing.assert_close(runs[True], runs[False], **EXACT)


def test_what_liger_would_compute_wrongly_is_refused(liger, store, tokenizer, tmp_path, monkeypatch):
    def refused(words, model=None, collator=None, **arguments):
        with pytest.raises(ValueError, match=f"use_liger_kernel: .*{words}.* Leave it out"):
            trainer_of(
                tmp_path, store, tokenizer, model or model_of(tokenizer), collator, use_liger_kernel=True, **arguments
            )

    refused("label_smoothing of the model", model_of(tokenizer, label_smoothing=0.1))
    refused("label_smoothing_factor", label_smoothing_factor=0.1)
    refused("liger_kernel_config", liger_kernel_config={"rope": True})
    refused("order of the genes", model_of(tokenizer, rank_prior_sizes=[4, 3, 2]))
    adapted = model_of(tokenizer)
    adapted.mlm_head.decoder = nn.Sequential(adapted.mlm_head.decoder)
    refused("is a Sequential", adapted)
    sharded = trainer_of(tmp_path, store, tokenizer, model_of(tokenizer), use_liger_kernel=True)
    sharded.is_fsdp_enabled = True
    with pytest.raises(ValueError, match="use_liger_kernel: .*FSDP and DeepSpeed"):
        of_this_package.prepare_liger(sharded)
    monkeypatch.delenv("TRITON_INTERPRET")
    refused("there is no GPU")
    tokenizer.included_phenotypes = []
    classes = GeneBertConfig.from_tokenizer(tokenizer, hidden_size=8, num_attention_heads=2, intermediate_size=16)
    collator = DataCollatorForCellClassification(tokenizer, "cell_type")
    refused("no kernel for GeneBertForClassification", GeneBertForClassification(classes), collator)


@pytest.mark.gpu
def test_no_logits_are_held_on_a_gpu():
    pytest.importorskip("liger_kernel")
    n_labels, n_genes, width = 8192, 30_000, 128
    torch.manual_seed(0)
    # Logits of about 1, as models have them: rounded to bfloat16, larger ones change losses and gradients by percents.
    states, weight, bias = (
        scale * torch.randn(shape, device="cuda")
        for scale, shape in ((width**-0.5, (n_labels, width)), (1, (n_genes, width)), (0.1, n_genes))
    )
    labels, found = torch.randint(n_genes, (n_labels,), device="cuda"), []
    for fused in (False, True):
        parts = [part.clone().requires_grad_() for part in (states, weight, bias)]
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        with torch.autocast("cuda", torch.bfloat16):
            if fused:
                losses, predicted = of_this_package._cross_entropies(parts[0], parts[1], labels, parts[2])
            else:
                logits = nn.functional.linear(*parts).float()
                losses, predicted = nn.functional.cross_entropy(logits, labels, reduction="none"), logits.argmax(-1)
                del logits
        losses.sum().backward()
        found.append((losses, predicted, *(part.grad for part in parts)))
        peak = torch.cuda.max_memory_allocated() - before
        assert (peak < 4 * n_labels * n_genes) == fused
    torch.testing.assert_close(found[1][0], found[0][0], atol=1e-2, rtol=1e-2)
    exact = nn.functional.linear(states, weight, bias)
    for _, predicted, *_ in found:  # the highest logit, as far as bfloat16 tells
        assert (exact.max(-1).values - exact.gather(1, predicted[:, None])[:, 0]).max() < 0.1
    for fused, plain in zip(found[1][2:], found[0][2:], strict=True):
        assert (fused - plain).norm() < 1e-2 * plain.norm()
