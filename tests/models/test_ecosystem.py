"""GeneBert in the hands of others: torch.compile, PEFT, ONNX, device maps, autocast, activation checkpointing."""

import inspect
import re

import numpy as np
import pytest
import torch
from conftest import checkpoint_activations
from torch import nn
from transformers import AutoModel, AutoModelForMaskedLM, modeling_utils
from transformers.modeling_flash_attention_utils import FLASH_ATTN_KERNEL_FALLBACK

from stformer_hf import (
    CellNeighborhoodConfig,
    DataCollatorForCellClassification,
    DataCollatorForPhenotypicMLM,
    GeneBertConfig,
    GeneBertForClassification,
    GeneBertForPhenotypicMLM,
    GeneBertForTokenClassification,
    GeneBertModel,
)
from stformer_hf.models.gene_bert import pretrained_gene_bert
from stformer_hf.training.calibration import changed_weight, sketch_of

CLASSES = [GeneBertModel, GeneBertForPhenotypicMLM, GeneBertForClassification, GeneBertForTokenClassification]


@pytest.fixture
def batches(tokenizer, store):
    """The same cells, padded and packed."""
    return [
        DataCollatorForPhenotypicMLM(tokenizer, packing=packing)(store.__getitems__(range(9)))
        for packing in (False, True)
    ]


@pytest.fixture
def plain_config(config):
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.0
    return config


# ---------------------------------------------------------------------- what transformers asks of every model


@pytest.mark.parametrize("model_class", CLASSES)
def test_what_every_model_of_transformers_does(model_class, plain_config, batches, tmp_path):
    """The checks of transformers' own model tests that fit an encoder of cells; its package does not carry them."""
    batch = {name: tensor for name, tensor in batches[0].items() if name != "labels"}
    torch.manual_seed(0)
    model = model_class(plain_config).eval()
    assert list(inspect.signature(model.forward).parameters)[:3] == ["input_ids", "attention_mask", "token_type_ids"]
    with torch.no_grad():
        outputs = model(**batch, output_hidden_states=True)
        assert torch.equal(model(**batch, output_hidden_states=True)[0], outputs[0])  # the same twice
        # Without all hidden states, the last layer may be computed for fewer tokens, which may change last digits.
        alone = model(**batch)[0]
        assert torch.equal(model(**batch, return_dict=False)[0], alone)
        torch.testing.assert_close(alone, outputs[0], atol=1e-6, rtol=0)
        embeds = model.get_input_embeddings()(batch["input_ids"])
        others = {name: tensor for name, tensor in batch.items() if name != "input_ids"}
        torch.testing.assert_close(model(inputs_embeds=embeds, **others)[0], outputs[0])
    assert len(outputs.hidden_states) == plain_config.num_hidden_layers + 1
    # Saved and loaded: the same numbers, whatever stood in memory before, also of a half-precision copy.
    model.save_pretrained(tmp_path)
    again = model_class.from_pretrained(tmp_path)
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    half = model_class.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    with torch.no_grad():
        torch.testing.assert_close(half(**batch)[0].float(), outputs[0], atol=0.1, rtol=0.1)
    # Every weight is initialised by `_init_weights`: on the meta device first, as from_pretrained does it.
    with torch.device("meta"):
        empty = model_class(plain_config)
    empty.to_empty(device="cpu")
    for parameter in empty.parameters():
        parameter.data.fill_(torch.nan)
    empty.init_weights()
    assert not [name for name, parameter in empty.named_parameters() if parameter.isnan().any()]
    # Another size of the vocabulary.
    model.resize_token_embeddings(plain_config.vocab_size + 3)
    with torch.no_grad():
        torch.testing.assert_close(
            model(**batch, output_hidden_states=True).hidden_states[-1], outputs.hidden_states[-1]
        )


def test_attention_chosen_by_itself(plain_config, batches, tmp_path, caplog):
    GeneBertForPhenotypicMLM(plain_config).save_pretrained(tmp_path)
    pretrained_gene_bert.logger.warning_once.cache_clear()
    auto = AutoModelForMaskedLM.from_pretrained(tmp_path, attn_implementation="auto").eval()
    assert "'sdpa'" in caplog.text
    assert auto.config._attn_implementation == "sdpa"
    plain = AutoModelForMaskedLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    with torch.no_grad():
        for batch in batches:
            torch.testing.assert_close(auto(**batch).loss, plain(**batch).loss)
    plain.set_attn_implementation("auto")
    assert plain.config._attn_implementation == plain.gene_bert.config._attn_implementation == "sdpa"


@pytest.mark.gpu
def test_attention_chosen_by_itself_on_a_gpu(plain_config):
    model = GeneBertModel._from_config(plain_config, attn_implementation="auto", dtype=torch.bfloat16)
    assert re.fullmatch(r"sdpa|flash_attention_[234]|[\w-]+/[\w-]+", model.config._attn_implementation)


@pytest.mark.parametrize(
    ("capability", "installed", "expected"),
    [
        ((8, 0), (2, 3, 4), "flash_attention_3"),
        ((9, 0), (2, 4), "flash_attention_2"),
        ((10, 0), (2, 3, 4), "flash_attention_4"),
        ((12, 0), (2, 3), "flash_attention_2"),
        ((10, 0), (3,), "sdpa"),
        ((9, 0), (), "sdpa"),
        ((7, 5), (2,), "sdpa"),
    ],
)
def test_version_of_flash_attention_by_card(capability, installed, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    for number in (2, 3, 4):
        monkeypatch.setattr(pretrained_gene_bert, f"is_flash_attn_{number}_available", lambda n=number: n in installed)
    monkeypatch.setattr(pretrained_gene_bert, "HAS_VARLEN", True)
    assert pretrained_gene_bert.best_attention(torch.bfloat16)[0] == expected
    assert pretrained_gene_bert.best_attention(torch.float32)[0] == "sdpa"
    # The others ignore attention dropout.
    with_dropout, reason = pretrained_gene_bert.best_attention(torch.bfloat16, 0.1)
    assert (with_dropout == "flash_attention_2") == (2 in installed and capability >= (8, 0))
    assert ("compute capability" in reason) == (capability < (8, 0))


@pytest.mark.parametrize("failure", [None, ValueError("no build for this torch"), "no kernels"])
@pytest.mark.parametrize(("has_varlen", "dropout"), [(True, 0.1), (False, 0.0), (True, 0.0)])
def test_the_kernel_of_the_hub_serves_where_torch_does_not(
    plain_config, has_varlen, dropout, failure, monkeypatch, caplog
):
    """`kernels` and the Hub are replaced here: the kernel computes the attention of sdpa."""
    kernel, asked = FLASH_ATTN_KERNEL_FALLBACK["flash_attention_2"], []

    def load(name, *args, **kwargs):
        asked.append(name)
        if isinstance(failure, Exception):
            raise failure

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    for number in (2, 3, 4):
        monkeypatch.setattr(pretrained_gene_bert, f"is_flash_attn_{number}_available", lambda: False)
    monkeypatch.setattr(pretrained_gene_bert, "is_kernels_available", lambda: failure != "no kernels")
    monkeypatch.setattr(pretrained_gene_bert, "HAS_VARLEN", has_varlen)
    monkeypatch.setattr(pretrained_gene_bert, "load_and_register_attn_kernel", load)
    monkeypatch.setattr(modeling_utils, "lazy_import_flash_attention", lambda *args, **kwargs: None)
    pretrained_gene_bert.logger.warning_once.cache_clear()
    pretrained_gene_bert._load_from_hub.cache_clear()
    plain_config.attention_probs_dropout_prob = dropout
    model = GeneBertModel._from_config(plain_config, attn_implementation="auto", dtype=torch.bfloat16)
    if has_varlen and not dropout:
        assert (model.config._attn_implementation, asked) == ("sdpa", [])
        assert "torch has varlen attention" in caplog.text
    elif failure == "no kernels":
        assert (model.config._attn_implementation, asked) == ("sdpa", [])
        assert "neither flash-attn nor kernels is installed" in caplog.text
    elif failure:
        assert (model.config._attn_implementation, asked) == ("sdpa", [kernel])
        assert f"'sdpa' here: {kernel} cannot be loaded (no build for this torch)" in caplog.text
    else:
        assert model.config._attn_implementation == kernel and asked == [kernel]
        assert f"{kernel!r} here: flash-attn is not installed" in caplog.text
    assert ("HF_HUB_OFFLINE=1" in caplog.text) == bool(asked)
    again = pretrained_gene_bert.best_attention(torch.bfloat16, dropout)[0]
    assert again == model.config._attn_implementation and len(asked) < 2
    pretrained_gene_bert._load_from_hub.cache_clear()


# ---------------------------------------------------------------------- precision, placement, memory


@pytest.mark.parametrize("packing", [False, True])
def test_bfloat16_autocast_is_near(plain_config, batches, packing):
    model = GeneBertForPhenotypicMLM(plain_config)
    batch = batches[packing]
    exact = model(**batch)
    with torch.autocast("cpu", torch.bfloat16):
        near = model(**batch)
    near.loss.backward()
    assert near.loss.dtype == torch.float32
    torch.testing.assert_close(near.loss, exact.loss, atol=1e-2, rtol=1e-2)
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_a_device_map_with_layers_on_disk(plain_config, batches, tmp_path):
    model = GeneBertForPhenotypicMLM(plain_config).eval()
    model.save_pretrained(tmp_path / "model")
    places = {
        "gene_bert.embeddings": "cpu",
        "gene_bert.layers.0": "cpu",
        "gene_bert.layers.1": "disk",
        "mlm_head": "cpu",
    }
    parts = GeneBertForPhenotypicMLM.from_pretrained(
        tmp_path / "model", device_map=places, offload_folder=tmp_path / "offload"
    )
    assert parts.hf_device_map == places
    with torch.no_grad():
        torch.testing.assert_close(parts(**batches[0]).loss, model(**batches[0]).loss)


@pytest.mark.parametrize("packing", [False, True])
def test_activation_checkpointing_gives_the_same_gradients(plain_config, batches, packing):
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = GeneBertForPhenotypicMLM(plain_config).train()
        if checkpointing:
            checkpoint_activations(model)()
        model(**batches[packing]).loss.backward()
        gradients.append(torch.cat([parameter.grad.ravel() for parameter in model.parameters()]))
    torch.testing.assert_close(*gradients)


# ---------------------------------------------------------------------- torch.compile, ONNX, PEFT


@pytest.mark.parametrize(
    ("packing", "vocabulary"),
    [
        pytest.param(False, "small", marks=pytest.mark.slow),  # training/test_one_size.py compiles too
        pytest.param(True, "small", marks=pytest.mark.slow),
        pytest.param(False, "large", marks=pytest.mark.slow),
    ],
)
def test_compiles_without_a_graph_break(plain_config, batches, packing, vocabulary):
    torch._dynamo.reset()
    plain_config.loss_weights = {"genes": 2.0}
    if vocabulary == "small":
        plain_config.label_smoothing = 0.1
    else:  # larger than a layer: logits of the labelled positions alone
        plain_config.intermediate_size = plain_config.vocab_size - 1
    model = GeneBertForPhenotypicMLM(plain_config)
    batch = batches[packing]
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    results = []
    for one in (model, compiled):
        model.zero_grad()
        # The number of labels is not known before they are read: dynamo takes it as a size of its own.
        with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=vocabulary == "large"):
            outputs = one(**batch)
        outputs.loss.backward()
        results.append(
            [outputs.loss, outputs.class_statistics, *(parameter.grad.clone() for parameter in model.parameters())]
        )
    for plain, fused in zip(*results, strict=True):
        torch.testing.assert_close(fused, plain, atol=1e-5, rtol=1e-4)


@pytest.mark.slow
def test_the_encoder_runs_as_onnx_on_other_batches(plain_config, tokenizer, store, tmp_path):
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    model = GeneBertModel(plain_config).eval()

    class Encoder(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, input_ids, attention_mask, token_type_ids):
            return self.model(input_ids, attention_mask, token_type_ids).last_hidden_state

    collate = DataCollatorForCellClassification(tokenizer_without_phenotypes(tokenizer), label="cell_type")
    names = ["input_ids", "attention_mask", "token_type_ids"]
    batch = collate(store.__getitems__(range(5)))
    sizes = {0: torch.export.Dim("cells", min=2), 1: torch.export.Dim("length", min=2)}
    path = tmp_path / "encoder.onnx"
    program = torch.onnx.export(
        Encoder().eval(), tuple(batch[name] for name in names), dynamo=True, dynamic_shapes=[sizes] * 3, verbose=False
    )
    program.save(path)
    session = onnxruntime.InferenceSession(path)
    for cells in (store.__getitems__(range(5)), store.__getitems__(range(10, 30))):
        batch = collate(cells)
        with torch.no_grad():
            expected = model(**{name: batch[name] for name in names}).last_hidden_state.numpy()
        given = zip((one.name for one in session.get_inputs()), names, strict=True)
        (found,) = session.run(None, {name: batch[of].numpy() for name, of in given})
        attended = batch["attention_mask"].bool().numpy()
        np.testing.assert_allclose(found[attended], expected[attended], atol=1e-5)


def tokenizer_without_phenotypes(tokenizer):
    tokenizer.included_phenotypes = []
    return tokenizer


@pytest.mark.skipif(not hasattr(torch.ops.aten, "_grouped_mm"), reason="transformers' exporters need a newer torch")
@pytest.mark.parametrize("pooling", ["cls", pytest.param("mean", marks=pytest.mark.slow)])
def test_a_classifier_runs_as_onnx_on_any_number_of_cells(plain_config, tokenizer, store, pooling):
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter

    plain_config.classifier_pooling = pooling
    model = GeneBertForClassification(plain_config).eval()
    collate = DataCollatorForCellClassification(tokenizer_without_phenotypes(tokenizer), label="cell_type")

    def batch(cells):
        return {name: value for name, value in collate(store.__getitems__(cells)).items() if name != "labels"}

    exported = OnnxExporter().export(model, batch(range(5)), config=OnnxConfig(dynamic=True))
    for cells in (range(5), range(30, 32), range(20, 40)):
        found = exported(**batch(cells))  # transformers 5.15 returns a tuple, later ones a dict
        (logits,) = found if isinstance(found, tuple) else [found["logits"]]
        with torch.no_grad():
            torch.testing.assert_close(logits, model(**batch(cells)).logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("settings", [{"target_modules": "all-linear"}, {}])
def test_lora_needs_no_names_of_layers(plain_config, tokenizer, store, settings):
    peft = pytest.importorskip("peft")
    collate = DataCollatorForCellClassification(tokenizer_without_phenotypes(tokenizer), label="cell_type")
    batch = collate(store.__getitems__(range(20)))
    tuned = peft.get_peft_model(GeneBertForClassification(plain_config), peft.LoraConfig("SEQ_CLS", **settings))
    tuned(**batch).loss.backward()
    learnt = {name.removeprefix("base_model.model.") for name, p in tuned.named_parameters() if p.grad is not None}
    layers = {name.split(".lora_")[0] for name in learnt if ".lora_" in name}
    parts = ["q_lin", "v_lin"] if not settings else ["q_lin", "k_lin", "v_lin", "out_lin", "lin1", "lin2"]
    assert {name.rpartition(".")[2] for name in layers} == set(parts)
    assert len(layers) == len(parts) * plain_config.num_hidden_layers
    # The new head is learnt in full.
    head = {name for name in learnt if "classifier" in name}
    assert {name.split(".")[0] for name in head} == {"pre_classifier", "classifier"} and len(head) == 4


def test_every_default_of_peft_knows_both_models(plain_config):
    constants = pytest.importorskip("peft.utils.constants")
    CellNeighborhoodConfig(n_genes=3, n_cell_types=2)
    modules = {name for name, _ in GeneBertModel(plain_config).named_modules()}
    ends = {name.rpartition(".")[2] for name in modules}
    known = {name: of for name, of in vars(constants).items() if name.endswith("_MODULES_MAPPING") and "bert" in of}
    assert len(known) > 5
    for name, of in known.items():
        for model_type in ("gene_bert", "cell_neighborhood"):
            assert of[model_type] and set(of[model_type]) <= ends, (name, model_type)


def test_lora_trains_and_merges(plain_config, tokenizer, store):
    peft = pytest.importorskip("peft")
    collate = DataCollatorForCellClassification(tokenizer_without_phenotypes(tokenizer), label="cell_type")
    batch = collate(store.__getitems__(range(20)))
    model = GeneBertForClassification(plain_config)
    settings = peft.LoraConfig(
        task_type="SEQ_CLS", r=4, target_modules=["q_lin", "v_lin"], modules_to_save=["pre_classifier", "classifier"]
    )
    tuned = peft.get_peft_model(model, settings)
    frozen = {name: p.detach().clone() for name, p in tuned.named_parameters() if not p.requires_grad}
    assert any("embeddings" in name for name in frozen)
    optimizer = torch.optim.Adam([p for p in tuned.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        losses.append(tuned(**batch).loss)
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.8 * losses[0]
    assert all(torch.equal(p, frozen[name]) for name, p in tuned.named_parameters() if name in frozen)
    tuned.eval()
    with torch.no_grad():
        logits = tuned(**batch).logits
        merged = tuned.merge_and_unload()
        torch.testing.assert_close(merged(**batch).logits, logits, atol=1e-5, rtol=1e-5)
    assert type(merged) is GeneBertForClassification


def test_every_embedding_takes_an_adapter_or_refuses_it(plain_config, batches):
    peft = pytest.importorskip("peft")
    plain_config.position_embedding_type, plain_config.value_embedding = "learned", "soft_bins"
    batch = dict(batches[0], expression_values=(batches[0]["token_type_ids"] > 1).float())
    for layer in ("word_embeddings", "token_type_embeddings", "position_embeddings"):
        settings = peft.LoraConfig(r=2, target_modules=[layer])
        tuned = peft.get_peft_model(GeneBertForClassification(plain_config), settings)
        tuned(**{**batch, "labels": torch.zeros(9, dtype=torch.int64)}).loss.backward()
        learnt = [p.grad.abs().sum() > 0 for name, p in tuned.named_parameters() if "lora_embedding_A" in name]
        assert learnt == [True]  # A begins at 0, so that B has no gradient yet
    settings = peft.LoraConfig(r=2, target_modules=["q_lin", "bins"])
    with pytest.raises(ValueError, match="no effect on the embeddings .* value_embeddings.bins"):
        peft.get_peft_model(GeneBertForClassification(plain_config), settings)(**batch)


def test_auto_model_takes_all_that_a_config_says(plain_config, tmp_path):
    plain_config.save_pretrained(tmp_path)
    assert GeneBertConfig.from_pretrained(tmp_path).to_dict() == plain_config.to_dict()
    assert type(AutoModel.from_config(plain_config)) is GeneBertModel


@pytest.mark.parametrize("library", ["torchao", "bitsandbytes"])
def test_linear_layers_are_quantised_on_loading_but_for_the_head(library, config, tokenizer, store, tmp_path):
    pytest.importorskip(library, reason=f"needs {library}")
    from transformers import BitsAndBytesConfig, TorchAoConfig

    model = GeneBertForClassification(config).eval()
    model.save_pretrained(tmp_path / "model")
    if library == "torchao":
        from torchao.quantization import Int8WeightOnlyConfig

        settings = TorchAoConfig(Int8WeightOnlyConfig(), modules_to_not_convert=["classifier"])
    else:
        settings = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=["classifier"])
    quantised = GeneBertForClassification.from_pretrained(tmp_path / "model", quantization_config=settings).eval()
    kinds = {name: type(module.weight) for name, module in quantised.named_modules() if isinstance(module, nn.Linear)}
    assert kinds.pop("classifier") is nn.Parameter and nn.Parameter not in kinds.values() and len(kinds) > 4
    assert changed_weight(sketch_of(model), quantised) is None, "out-of-fold predictions stay valid"
    collate = DataCollatorForCellClassification(tokenizer_without_phenotypes(tokenizer), label="cell_type")
    batch = collate(store.__getitems__(range(9)))
    with torch.no_grad():
        found, exact = quantised(**batch).logits, model(**batch).logits
    assert 0 < (found - exact).abs().max() < 0.02 * exact.abs().max()
