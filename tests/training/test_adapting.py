"""`finetune` with LoRA and with frozen layers, and what is loaded from the folder of the adapter."""

import json

import numpy as np
import pytest
import torch
from anndata import read_h5ad
from safetensors.torch import load_file

from stformer_hf import GeneBertConfig, GeneBertForPhenotypicMLM, GeneTokenizer, annotate, embed, finetune
from stformer_hf.cli import main
from stformer_hf.training.loading import unwrap

pytestmark = pytest.mark.usefixtures("two_folds")

SHORT = {"max_steps": 2, "use_cpu": True, "report_to": "none", "disable_tqdm": True, "learning_rate": 0.05}
FLAGS = ["--max_steps", "2", "--use_cpu", "true", "--disable_tqdm", "true", "--learning_rate", "0.05"]


@pytest.fixture(params=["tokens", "whole_cell"])
def base(request, store, tmp_path):
    """A pretrained checkpoint, whose [CLS] reads its tokens or the whole cell."""
    torch.manual_seed(0)
    tokenizer = GeneTokenizer.from_store(store, bin_edges=[0.5, 1.5], whole_cell=request.param == "whole_cell")
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 16, "intermediate_size": 32}
    sizes["residual_init"] = "normal"  # as after training: at zero, nothing before it has a gradient
    GeneBertForPhenotypicMLM(GeneBertConfig.from_tokenizer(tokenizer, **sizes)).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def test_an_adapter_folder_annotates_and_names_its_base(base, adata, tmp_path, capsys):
    pytest.importorskip("peft")
    adata.write_h5ad(tmp_path / "cells.h5ad")
    adapter, out = tmp_path / "adapter", tmp_path / "out.h5ad"
    data = ["--data", str(tmp_path / "cells.h5ad")]
    command = ["finetune", *data, "--label_key", "cell_type", "--output", str(adapter), *FLAGS]
    assert main([*command, "--model", str(base), "--lora"]) == 0
    assert "eval accuracy" in capsys.readouterr().out
    settings = json.loads((adapter / "adapter_config.json").read_text())
    assert (settings["r"], settings["base_model_name_or_path"]) == (8, str(base))
    assert not (adapter / "model.safetensors").exists()
    weights = load_file(adapter / "adapter_model.safetensors")
    layers = {name.split(".lora_")[0].rpartition(".")[2] for name in weights if ".lora_" in name}
    assert layers == {"q_lin", "v_lin"}
    assert all(weights[name].any() for name in weights if ".lora_B" in name)  # trained
    card = (adapter / "README.md").read_text()
    assert "LORA adapter of rank 8 with" in card and "loaded with its base, base." in card
    assert "| started from | base |" in card
    assert main(["annotate", *data, "--model", str(adapter), "--output", str(out)]) == 0
    assert read_h5ad(out).obs["stformer_label"].notna().sum() == 59
    assert main([*command, "--model", str(base), "--lora", "4"]) == 1
    assert "holds a model" in capsys.readouterr().err


def test_what_is_loaded_from_the_folder_is_what_was_trained(base, adata, tmp_path):
    pytest.importorskip("peft")
    trained = finetune(
        adata, "cell_type", model=base, output=tmp_path / "a", num_train_epochs=1, lora=3, freeze=1, training=SHORT
    )
    annotate(adata, trained)
    wanted = adata.obs["stformer_score"].to_numpy()
    annotate(adata, tmp_path / "a")
    np.testing.assert_allclose(adata.obs["stformer_score"], wanted, atol=1e-5)
    # The same without PEFT: the product of the adapter's matrices is added to the weights of the base.
    before, adapter = load_file(base / "model.safetensors"), load_file(tmp_path / "a" / "adapter_model.safetensors")
    now = unwrap(trained, merge=True).state_dict()
    stem = "gene_bert.layers.{}.attention.q_lin"
    low, high = (adapter[f"base_model.model.{stem.format(1)}.lora_{part}.weight"] for part in "AB")
    torch.testing.assert_close(now[stem.format(1) + ".weight"], before[stem.format(1) + ".weight"] + 2 * high @ low)
    assert not [name for name in adapter if "layers.0" in name]  # frozen
    assert torch.equal(now[stem.format(0) + ".weight"], before[stem.format(0) + ".weight"])
    embed(adata, tmp_path / "a")
    assert adata.obsm["X_stformer"].shape == (60, 16)


def test_frozen_layers_stay(base, adata):
    before = load_file(base / "model.safetensors")
    trained = finetune(adata, "cell_type", model=base, num_train_epochs=1, freeze=1, training=SHORT).state_dict()
    changed = {name for name, weight in before.items() if name in trained and not torch.equal(weight, trained[name])}
    assert changed and all(name.startswith(("gene_bert.layers.1.", "gene_bert.final_norm")) for name in changed)


def test_what_is_refused(base, adata):
    pytest.importorskip("peft")
    with pytest.raises(ValueError, match="model is not a checkpoint"):
        finetune(adata, "cell_type", lora=8)
    with pytest.raises(ValueError, match="freeze keeps the layers"):
        finetune(adata, "cell_type", freeze=1)
    with pytest.raises(ValueError, match="the model has 2 layers"):
        finetune(adata, "cell_type", model=base, freeze=3, num_train_epochs=1, training=SHORT)
    with pytest.raises(ValueError, match="and LoRA needs one"):
        finetune(adata, "cell_type", model=base, freeze=2, lora=2, num_train_epochs=1, training=SHORT)
    with pytest.raises(ValueError, match="rank of at least 1"):
        finetune(adata, "cell_type", model=base, lora=0)


@pytest.mark.parametrize("lora", [None, 2])
def test_each_layer_has_the_rate_of_the_one_above_it_times_the_decay(lora, base, adata):
    """A step of Adam changes some weight by about its learning rate, whatever the size of its gradient."""
    if lora:
        pytest.importorskip("peft")
    settings = {"model": base, "init": "random", "num_train_epochs": 1, "layer_decay": 0.25, "lora": lora, "seed": 0}
    steps = {"lr_scheduler_type": "constant", "warmup_steps": 0, "weight_decay": 0.0, "adam_epsilon": 1e-12}
    before, after = (
        dict(finetune(adata, "cell_type", training={**SHORT, **steps, "max_steps": n}, **settings).named_parameters())
        for n in (1, 2)
    )
    changed = {}
    for name, weight in after.items():
        part = next((f"layers.{i}" for i in range(2) if f"layers.{i}." in name), None)
        part = part or ("embeddings" if "embedding" in name else "heads")
        changed[part] = max(changed.get(part, 0.0), (weight - before[name]).abs().max().item())
    rates = {"heads": 0.05, "layers.1": 0.05 / 4, "layers.0": 0.05 / 16, "embeddings": 0.0 if lora else 0.05 / 64}
    assert changed == pytest.approx(rates, rel=0.5)


@pytest.mark.parametrize("layer_decay", [0.0, 1.5, -1.0, float("nan")])
def test_a_decay_out_of_range_or_without_a_checkpoint_is_refused(layer_decay, base, adata):
    with pytest.raises(ValueError, match="above 0, and at most 1"):
        finetune(adata, "cell_type", model=base, layer_decay=layer_decay)
    with pytest.raises(ValueError, match="pass model="):
        finetune(adata, "cell_type", layer_decay=0.5)
    with pytest.raises(ValueError, match="optim is sgd"):
        finetune(adata, "cell_type", model=base, init="random", layer_decay=0.5, training={**SHORT, "optim": "sgd"})
