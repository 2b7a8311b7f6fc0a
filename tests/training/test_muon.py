"""Muon for the matrices of the layers: against the two optimizers of torch, and in a run that resumes."""

import pytest
import torch
from transformers import TrainingArguments

from stformer_hf import GeneBertForPhenotypicMLM, STFormerPretrainer
from stformer_hf.training.muon import MuonAndAdamW, muon_for_matrices

pytestmark = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="Muon came with torch 2.9")


def make_trainer(folder, store, tokenizer, config, max_steps=4):
    torch.manual_seed(0)
    model = GeneBertForPhenotypicMLM(config)
    settings = {"save_steps": 2, "logging_steps": 1, "report_to": "none", "disable_tqdm": True, "use_cpu": True}
    args = TrainingArguments(str(folder), max_steps=max_steps, learning_rate=0.01, weight_decay=0.1, **settings)
    chosen = muon_for_matrices(model, args)
    return STFormerPretrainer(args, store, model=model, processing_class=tokenizer, optimizer_cls_and_kwargs=chosen)


def test_a_resumed_run_is_the_uninterrupted_one(store, tokenizer, config, tmp_path):
    whole = make_trainer(tmp_path / "a", store, tokenizer, config)
    whole.train()
    of_muon = {id(p) for group in whole.optimizer.param_groups if group["muon"] for p in group["params"]}
    names = {name for name, parameter in whole.model.named_parameters() if id(parameter) in of_muon}
    layers = ["attention.q_lin", "attention.k_lin", "attention.v_lin", "attention.out_lin", "ffn.lin1", "ffn.lin2"]
    assert names == {f"gene_bert.layers.{i}.{part}.weight" for i in (0, 1) for part in layers}
    decays = {group["weight_decay"] for group in whole.optimizer.param_groups if not group["muon"]}
    assert decays == {0.1, 0.0}
    resumed = make_trainer(tmp_path / "b", store, tokenizer, config)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, resumed.model.state_dict()[name]), name


def test_each_part_steps_as_its_optimizer_alone():
    torch.manual_seed(0)
    start = {"matrix": torch.randn(6, 4), "vector": torch.randn(4)}

    def steps(make):
        parameters = {name: torch.nn.Parameter(value.clone()) for name, value in start.items()}
        optimizers = make(parameters)
        for factor in (1.0, -2.0, 0.5):
            for parameter in parameters.values():
                parameter.grad = factor * parameter.detach().sin()
            for optimizer in optimizers:
                optimizer.step()
        return parameters

    found = steps(lambda p: [MuonAndAdamW(p.values(), [p["matrix"]], lr=0.01, weight_decay=0.1)])
    muon = {"lr": 0.01, "weight_decay": 0.1, "adjust_lr_fn": "match_rms_adamw"}
    expected = steps(
        lambda p: [torch.optim.Muon([p["matrix"]], **muon), torch.optim.AdamW([p["vector"]], 0.01, weight_decay=0.1)]
    )
    for name, parameter in expected.items():
        torch.testing.assert_close(found[name], parameter)


def test_what_muon_cannot_train_raises(config, tmp_path, monkeypatch):
    model, args = GeneBertForPhenotypicMLM(config), TrainingArguments(str(tmp_path), use_cpu=True)
    other = GeneBertForPhenotypicMLM(config)
    chosen, settings = muon_for_matrices(model, args)
    with pytest.raises(ValueError, match="not among the parameters"):
        chosen(other.parameters(), **settings)
    with pytest.raises(ValueError, match="no matrices to train"):
        muon_for_matrices(model.requires_grad_(False), args)
    monkeypatch.delattr(torch.optim, "Muon")
    with pytest.raises(ImportError, match="has no Muon"):
        muon_for_matrices(model, args)
