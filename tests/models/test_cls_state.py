"""`[CLS]` that the layers leave as it is, or change by learned factors, against layers that are applied one by one."""

import json

import numpy as np
import pytest
import torch
from conftest import make_adata
from scipy import sparse
from torch import nn

from stformer_hf import (
    CellStore,
    GeneBertConfig,
    GeneBertForClassification,
    GeneBertForPhenotypicMLM,
    GeneBertModel,
    GeneTokenizer,
    annotate,
    collate_fn_wrapper,
    embed,
    finetune,
)
from stformer_hf.batches.evaluating import length_to_read
from stformer_hf.cli import main
from stformer_hf.inference import annotate as annotate_module
from stformer_hf.inference import embed as embed_module
from stformer_hf.models.gene_bert import modeling_gene_bert
from stformer_hf.training.starts import cell_features
from stformer_hf.training.starts.cell_features import cell_states


@pytest.fixture
def cells():
    return make_adata(40, 30, seed=3)


@pytest.fixture
def tokenizer(cells):
    return GeneTokenizer(cells.var_names.tolist(), bin_edges=[0.5, 1.5], whole_cell=True, max_length=12)


def make(tokenizer, kind=GeneBertModel, **fields):
    torch.manual_seed(0)
    settings = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 16, "intermediate_size": 24}
    settings |= {"residual_init": "normal", "initializer_range": 0.5, "hidden_dropout_prob": 0.0, "pooling": "cls"}
    return kind(GeneBertConfig.from_tokenizer(tokenizer, **{**settings, **fields})).eval()


def batch_of(cells, tokenizer, side: str):
    tokenizer.padding_side = "left" if side == "left" else "right"
    tokens = tokenizer(cells.X.toarray())
    examples = [dict(zip(tokens, one, strict=True)) for one in zip(*tokens.values(), strict=True)]
    return collate_fn_wrapper(tokenizer, packing=side == "packed")(examples)


@pytest.mark.parametrize("side", ["right", "left", "packed"])
@pytest.mark.parametrize("state", ["fixed", "gated"])
def test_states_are_those_of_layers_applied_one_by_one(cells, tokenizer, state, side):
    model, plain = make(tokenizer, cls_state=state), make(tokenizer)
    plain.load_state_dict({name: value for name, value in model.state_dict().items() if "cls_gate" not in name})
    gates = [torch.zeros(16), torch.zeros(16)]
    if state == "gated":
        assert not any(layer.cls_gate.any() for layer in model.layers)  # begins as "fixed"
        for layer, gate in zip(model.layers, gates, strict=True):
            nn.init.normal_(gate)
            layer.cls_gate.data.copy_(gate)
    with torch.no_grad():
        found = model(**batch_of(cells, tokenizer, side), output_hidden_states=True)
        for i in range(0, len(cells), 7):
            alone = batch_of(cells[i : i + 1], tokenizer, "right")
            x = plain(**alone, output_hidden_states=True).hidden_states[0]
            for layer, gate in zip(plain.layers, gates, strict=True):
                after = layer(x, None)
                after[:, 0] = x[:, 0] + gate * (after[:, 0] - x[:, 0])
                x = after
            expected = plain.final_norm(x)[0]
            if side == "packed":
                boundaries = batch_of(cells, tokenizer, side)["cu_seq_lens_q"].tolist()
                got = found.last_hidden_state[0, boundaries[i] : boundaries[i + 1]]
            else:
                mask = batch_of(cells, tokenizer, side)["attention_mask"][i].bool()
                got = found.last_hidden_state[i][mask]
            torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)
    kept = torch.tensor([0, 3, 13])
    with torch.no_grad():
        some = model(**batch_of(cells, tokenizer, side), tokens_to_keep=kept).last_hidden_state[0]
    torch.testing.assert_close(some, found.last_hidden_state.flatten(0, 1)[kept], atol=1e-5, rtol=1e-4)


def test_masked_genes_train_all_but_a_fixed_cls(cells, tokenizer):
    model = make(tokenizer, GeneBertForPhenotypicMLM, cls_state="fixed").train()
    batch = batch_of(cells, tokenizer, "right")
    labels = torch.where(torch.rand(batch["input_ids"].shape) < 0.3, batch["input_ids"], -100)
    model(**batch, labels=labels).loss.backward()
    without = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert without == ["gene_bert.cell_embedding.genes.weight", "gene_bert.final_norm.weight"]
    with pytest.raises(ValueError, match='cls_state="fixed" needs cell_embedding=True'):
        GeneBertConfig(cls_state="fixed")


@pytest.mark.parametrize("as_path", [True, False])
def test_fine_tuning_begins_at_the_fixed_cls_and_opens_the_gates(cells, tokenizer, as_path, tmp_path):
    pretrained = make(tokenizer, GeneBertForPhenotypicMLM, cls_state="fixed")
    pretrained.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    pretrained.tokenizer = tokenizer
    model = str(tmp_path) if as_path else pretrained
    started = finetune(cells, "cell_type", model=model, num_train_epochs=0)
    assert isinstance(started, GeneBertForClassification) and started.config.cls_state == "gated"
    assert not any(layer.cls_gate.any() for layer in started.gene_bert.layers)
    states = []
    for of in (pretrained, started):
        embed(cells, of.base_model, tokenizer=tokenizer)
        states.append(cells.obsm["X_stformer"].copy())
    np.testing.assert_allclose(*states, atol=1e-6)
    trained = finetune(cells, "cell_type", model=model, num_train_epochs=2)
    assert all(layer.cls_gate.any() for layer in trained.gene_bert.layers)
    again = finetune(cells, "cell_type", model=trained, num_train_epochs=0)
    assert again.config.cls_state == "gated"
    assert torch.equal(again.gene_bert.layers[0].cls_gate, trained.gene_bert.layers[0].cls_gate)


@pytest.mark.parametrize("state", ["fixed", "gated", "layers"])
def test_few_tokens_are_read_where_cls_alone_counts(cells, tokenizer, state, monkeypatch, tmp_path):
    store = CellStore.build(tmp_path / "store", cells)
    model = make(tokenizer, GeneBertForClassification, cls_state=state, num_labels=3)
    lengths: list[int] = []
    of_layer = model.gene_bert.layers[0].forward

    def watch(hidden, *args, **kwargs):
        lengths.append(int(kwargs.get("max_length_q") or hidden.shape[1]))  # packed, or of one length
        return of_layer(hidden, *args, **kwargs)

    monkeypatch.setattr(model.gene_bert.layers[0], "forward", watch)
    found = []
    for _ in range(2):
        embed(cells, model, tokenizer=tokenizer)
        annotate(cells, model, tokenizer=tokenizer)
        states = cell_states(model, tokenizer, store)
        found.append((cells.obsm["X_stformer"], cells.obsm["stformer_probabilities"], states, set(lengths)))
        lengths.clear()
        for module in (embed_module, annotate_module, cell_features):
            monkeypatch.setattr(module, "length_to_read", lambda *_: None)
    for few, every in zip(found[0][:3], found[1][:3], strict=True):
        np.testing.assert_allclose(few, every, atol=1e-6)
    assert [read for *_, read in found] == [{12} if state == "layers" else {3}, {12}]


def test_the_fewest_tokens_have_all_parts_of_a_cell(cells, tokenizer, tmp_path, monkeypatch):
    model = make(tokenizer, cls_state="fixed")
    found = [length_to_read(model, tokenizer, *poolings) for poolings in (["cls"], ["cls", "mean"], ["mean"])]
    assert found == [3, None, None]
    genes = cells.var_names.tolist()
    tokenizer = GeneTokenizer(genes, bin_edges=[0.5], whole_cell=True, phenotypes={"sex": ["m", "f"]}, max_length=12)
    cells.obs["sex"] = ["m", "f"] * 20
    assert length_to_read(make(tokenizer, cls_state="fixed"), tokenizer, "cls") == 4
    tokenizer.included_phenotypes = []
    assert length_to_read(make(tokenizer, cls_state="fixed"), tokenizer, "cls") == 3

    cells.obsp["near"] = sparse.csr_matrix(np.eye(40, k=1) + np.eye(40, k=-1))
    store = CellStore.build(tmp_path / "store", cells, neighbors="near", report=False).with_neighborhoods()
    settings = {"scheme": "rank", "medians": dict.fromkeys(genes, 1.0), "neighborhood": True}
    tokenizer = GeneTokenizer(genes, whole_cell=True, max_length=12, **settings)
    model = make(tokenizer, GeneBertForClassification, cls_state="fixed", num_labels=3)
    few = cell_states(model, tokenizer, store)
    assert embed(store, model, tokenizer=tokenizer) is not None
    monkeypatch.setattr(cell_features, "length_to_read", lambda *_: None)
    np.testing.assert_array_equal(few, cell_states(model, tokenizer, store))


class Quantised(torch.Tensor):
    """A weight that has products alone, as those of torchao."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is torch.Tensor.any:
            raise NotImplementedError(func.__name__)
        return super().__torch_function__(func, types, args, kwargs)


class OfBuffers(nn.Module):
    """A layer whose weights are not parameters, as after torch's dynamic quantisation and GPTQ."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.register_buffer("qweight", linear.weight.detach())
        self.register_buffer("qbias", linear.bias.detach())

    def forward(self, states):
        return nn.functional.linear(states, self.qweight, self.qbias)


def of_subclass(linear: nn.Linear) -> nn.Linear:
    linear.weight = nn.Parameter(linear.weight.detach().as_subclass(Quantised), requires_grad=False)
    return linear


@pytest.mark.parametrize("quantise", [of_subclass, OfBuffers])
@pytest.mark.parametrize("start", ["zero", "normal"])
def test_quantised_layers_read_all_tokens(cells, tokenizer, quantise, start):
    model = make(tokenizer, initializer_range=0.1, residual_init=start)
    assert model.reads_cls_alone() == (start == "zero")
    embed(cells, model, tokenizer=tokenizer)
    expected = cells.obsm["X_stformer"].copy()
    for layer in model.layers:
        layer.attention.out_lin, layer.ffn.lin2 = quantise(layer.attention.out_lin), quantise(layer.ffn.lin2)
    assert not model.reads_cls_alone()
    embed(cells, model, tokenizer=tokenizer)
    np.testing.assert_allclose(cells.obsm["X_stformer"], expected, atol=1e-6)


def test_layers_on_disk_read_all_tokens(cells, tokenizer, tmp_path):
    model = make(tokenizer, initializer_range=0.1)
    model.save_pretrained(tmp_path / "model")
    embed(cells, model, tokenizer=tokenizer)
    expected = cells.obsm["X_stformer"].copy()
    places = {"embeddings": "cpu", "cell_embedding": "cpu", "final_norm": "cpu", "layers": "disk"}
    settings = {"device_map": places, "offload_folder": tmp_path / "disk"}
    on_disk = GeneBertModel.from_pretrained(tmp_path / "model", **settings).eval()
    embed(cells, on_disk, tokenizer=tokenizer)
    np.testing.assert_allclose(cells.obsm["X_stformer"], expected, atol=1e-6)


def test_a_classifier_by_hand_is_told_that_its_layers_are_not_trained(cells, tokenizer, caplog):
    modeling_gene_bert.logger.warning_once.cache_clear()
    batch, labels = batch_of(cells, tokenizer, "right"), torch.zeros(len(cells), dtype=torch.long)
    for state in ("gated", "fixed"):
        model = make(tokenizer, GeneBertForClassification, cls_state=state)
        model(**batch, labels=labels)  # an evaluation
        assert "[CLS]" not in caplog.text
        model.train()(**batch, labels=labels)
    assert 'load it with cls_state="gated"' in caplog.text


def test_adapters_train_the_layers_of_a_fixed_cls(cells, tokenizer, tmp_path):
    pytest.importorskip("peft")
    pretrained = make(tokenizer, GeneBertForPhenotypicMLM, cls_state="fixed")
    pretrained.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    model = finetune(cells, "cell_type", model=str(tmp_path / "model"), num_train_epochs=1, lora=2)
    assert model.config.cls_state == "layers"


def test_pretraining_fixes_cls_unless_an_objective_trains_it(cells, tmp_path):
    CellStore.build(tmp_path / "store", cells, report=False)
    fields = "{num_hidden_layers: 2, hidden_size: 16, num_attention_heads: 2, intermediate_size: 24}"
    command = ["pretrain", "--data", str(tmp_path / "store"), "--max_steps", "2", "--held_out", "0"]
    command += ["--per_device_train_batch_size", "8", "--learning_rate", "0.1"]
    contrast = ["--objectives", "{mlm: 1, contrast: 1}"]
    runs = {
        "masked": ["--model_config", fields],
        "contrast": ["--model_config", fields, *contrast],
        "on": ["--model", str(tmp_path / "masked"), *contrast],
        "still": ["--model", str(tmp_path / "masked")],
    }
    states = {"masked": "fixed", "contrast": None, "on": "gated", "still": "fixed"}
    for name, flags in runs.items():
        assert main([*command, *flags, "--output", str(tmp_path / name)]) == 0
        assert GeneBertConfig.from_pretrained(tmp_path / name).cls_state == states[name]
    embeddings = {name: GeneBertModel.from_pretrained(tmp_path / name).cell_embedding.genes.weight for name in runs}
    assert torch.equal(embeddings["masked"], embeddings["still"])
    assert not torch.equal(embeddings["masked"], embeddings["on"])
    states_of = []
    for name in ("masked", "still"):
        embed(cells, str(tmp_path / name))
        states_of.append(cells.obsm["X_stformer"].copy())
    np.testing.assert_array_equal(*states_of)


def test_a_run_that_moved_cls_is_resumed_as_it_was(cells, tmp_path):
    """So is one with layers that are not 0 at its start, and one whose `[CLS]` was fixed."""
    CellStore.build(tmp_path / "store", cells, report=False)
    fields = {"num_hidden_layers": 2, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24}
    command = ["pretrain", "--data", str(tmp_path / "store"), "--held_out", "0", "--per_device_train_batch_size", "8"]
    command += ["--save_steps", "2", "--overwrite"]

    def state_after(steps: int, name: str, **more) -> str | None:
        of_model = json.dumps({**fields, **more})
        flags = ["--model_config", of_model, "--max_steps", str(steps), "--output", str(tmp_path / name)]
        assert main([*command, *flags, *["--resume_from_checkpoint", "True"] * (steps > 2)]) == 0
        return GeneBertConfig.from_pretrained(tmp_path / name).cls_state

    assert state_after(2, "new") == state_after(4, "new") == "fixed"
    assert state_after(2, "old", cls_state="layers") == "layers"
    file = tmp_path / "old" / "checkpoint-2" / "config.json"
    config = json.loads(file.read_text())
    del config["cls_state"]  # as it was before there was a choice
    file.write_text(json.dumps(config))
    assert state_after(4, "old") == "layers"
    assert state_after(2, "random", residual_init="normal") is None


@pytest.mark.parametrize("of_trial", [False, True])
def test_a_trainer_fixes_cls_and_trains_nothing_that_it_is_made_of(cells, tokenizer, of_trial, tmp_path):
    from transformers import TrainingArguments

    from stformer_hf import STFormerPretrainer

    def make_model():
        return make(tokenizer, GeneBertForPhenotypicMLM, residual_init="zero")

    store = CellStore.build(tmp_path / "store", cells, report=False)
    arguments = TrainingArguments(str(tmp_path / "run"), report_to="none", use_cpu=True, max_steps=1)
    model = {"model_init": make_model} if of_trial else {"model": make_model()}
    trainer = STFormerPretrainer(arguments, store, processing_class=tokenizer, **model)
    trainer.train()
    assert trainer.model.config.cls_state == "fixed"
    kept = [name for name, weight in trainer.model.named_parameters() if not weight.requires_grad]
    assert kept == ["gene_bert.cell_embedding.genes.weight", "gene_bert.final_norm.weight"]


def test_objectives_refuse_a_fixed_cls(cells, tokenizer, tmp_path):
    from transformers import TrainingArguments

    from stformer_hf import STFormerPretrainer

    store = CellStore.build(tmp_path / "store", cells, report=False)
    model = make(tokenizer, GeneBertForPhenotypicMLM, cls_state="fixed")
    arguments = TrainingArguments(str(tmp_path / "run"), report_to="none", use_cpu=True)
    with pytest.raises(ValueError, match=r'from_pretrained\(…, cls_state="gated"\)'):
        STFormerPretrainer(arguments, store, model=model, processing_class=tokenizer, objectives={"decode": 1.0})
