"""Models, tokenizers and cells from whatever names or holds them."""

import re
import shutil

import numpy as np
import pytest
import torch
from anndata import AnnData
from safetensors.torch import load_file, save_file
from torch import nn
from torch.optim.swa_utils import AveragedModel
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    TrainingArguments,
)

from stformer_hf import (
    CellTrainer,
    DataCollatorForCellClassification,
    GeneBertConfig,
    GeneBertForClassification,
    GeneBertForPhenotypicMLM,
    GeneBertModel,
    GeneTokenizer,
    annotate,
    embed,
    finetune,
)
from stformer_hf.inference.gene_states import gene_embeddings
from stformer_hf.training.loading import load_config, load_model, load_tokenizer, name_of, unwrap

SIZE = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 16, "intermediate_size": 32}
NAMES = {"id2label": {0: "B cell", 1: "T cell"}, "label2id": {"B cell": 0, "T cell": 1}}


@pytest.fixture
def lora():
    peft = pytest.importorskip("peft")

    def wrap(model, **settings):
        torch.manual_seed(1)
        settings = {"r": 2, "target_modules": ["q_lin", "v_lin"], "init_lora_weights": False, **settings}
        return peft.get_peft_model(model, peft.LoraConfig(**settings))

    return wrap


@pytest.fixture
def base(config, tokenizer, tmp_path):
    """A pretrained checkpoint."""
    torch.manual_seed(0)
    tokenizer.included_phenotypes = []
    GeneBertForPhenotypicMLM(config).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def embedding(adata, model, tokenizer=None):
    embed(adata, model, tokenizer=tokenizer, pooling="cls")
    return adata.obsm.pop("X_stformer")


WRAPPINGS = {
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "parallel": nn.DataParallel,
    "averaged": AveragedModel,
    "nested": lambda model: AveragedModel(torch.compile(nn.DataParallel(model), backend="eager")),
}


@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_a_wrapped_model_is_the_model(config, tokenizer, adata, wrapping):
    model = GeneBertModel(config)
    wrapped = WRAPPINGS[wrapping](model)
    wanted = embedding(adata, model, tokenizer)
    np.testing.assert_array_equal(embedding(adata, wrapped, tokenizer), wanted)
    assert name_of(wrapped) == "GeneBertModel" and type(unwrap(wrapped)) is GeneBertModel


def test_adapters_stay_at_work_in_what_they_are_taken_out_of(config, tokenizer, adata, lora):
    model = GeneBertModel(config)
    wanted = embedding(adata, model, tokenizer)
    adapted = lora(model)
    found = embedding(adata, adapted, tokenizer)
    assert np.abs(found - wanted).max() > 1e-3
    np.testing.assert_array_equal(embedding(adata, torch.compile(adapted, backend="eager"), tokenizer), found)
    merged = unwrap(adapted, merge=True)
    assert not any("lora" in name for name in merged.state_dict())
    np.testing.assert_allclose(embedding(adata, merged, tokenizer), found, atol=1e-5)
    np.testing.assert_array_equal(embedding(adata, adapted, tokenizer), found)  # merging was done in a copy


def test_the_folder_of_an_adapter_is_loaded_with_its_base(base, tokenizer, adata, lora, tmp_path):
    adapted = lora(AutoModel.from_pretrained(base))
    adapted.save_pretrained(tmp_path / "adapter")
    wanted = embedding(adata, adapted, tokenizer)
    np.testing.assert_allclose(embedding(adata, tmp_path / "adapter"), wanted, atol=1e-5)  # its base's tokenizer
    assert adata.uns["stformer"]["model"] == str(tmp_path / "adapter")
    (tmp_path / "elsewhere").mkdir()
    for folder in ("base", "adapter"):  # moved together
        shutil.move(tmp_path / folder, tmp_path / "elsewhere" / folder)
    np.testing.assert_allclose(embedding(adata, tmp_path / "elsewhere" / "adapter"), wanted, atol=1e-5)
    shutil.rmtree(tmp_path / "elsewhere" / "base")
    with pytest.raises(FileNotFoundError, match="The base of the adapter .* does not exist"):
        embed(adata, tmp_path / "elsewhere" / "adapter")


@pytest.mark.parametrize(
    ("layer", "in_full"), [("word_embeddings", None), ("decoder", None), ("word_embeddings", ["decoder"])]
)
def test_an_adapter_of_one_of_two_tied_layers_is_not_merged_into_both(
    base, adata, tokenizer, lora, layer, in_full, tmp_path
):
    settings = {"target_modules": ["q_lin", layer], "modules_to_save": in_full}
    adapted = lora(AutoModelForMaskedLM.from_pretrained(base), **settings).eval()
    adapted.save_pretrained(tmp_path / "adapter")
    batch = tokenizer(adata[4:8], padding=True, return_tensors="pt")
    wanted, of_cells = adapted(**batch).logits, embedding(adata, adapted, tokenizer)
    unwrap(adapted, merge=True).save_pretrained(tmp_path / "merged")
    for merged in (
        unwrap(adapted, merge=True),
        load_model(tmp_path / "adapter", AutoModelForMaskedLM),
        load_model(tmp_path / "merged", AutoModelForMaskedLM),
    ):
        torch.testing.assert_close(merged.eval()(**batch).logits, wanted, atol=1e-4, rtol=1e-4)
    np.testing.assert_allclose(embedding(adata, tmp_path / "adapter"), of_cells, atol=1e-5)
    torch.testing.assert_close(adapted(**batch).logits, wanted)  # merging was done in a copy


def test_adapters_that_cannot_be_merged_are_refused_by_name(base, adata, tokenizer):
    peft = pytest.importorskip("peft")
    model = AutoModelForMaskedLM.from_pretrained(base)
    model = peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["q_lin"]), model)  # as model.add_adapter
    embed(adata, model, tokenizer=tokenizer)
    with pytest.raises(ValueError, match=r"has adapters in its layers .* load them with peft.PeftModel"):
        finetune(adata, "cell_type", model=model, tokenizer=tokenizer)


def test_a_trained_adapter_knows_its_classes(base, tokenizer, adata, store, lora, tmp_path):
    classifier = AutoModelForSequenceClassification.from_pretrained(base, **NAMES)
    adapted = lora(classifier, task_type="SEQ_CLS", init_lora_weights=True)
    arguments = TrainingArguments(
        tmp_path / "run", max_steps=3, learning_rate=0.02, report_to="none", save_strategy="no", use_cpu=True
    )
    trainer = CellTrainer(
        model=adapted,
        args=arguments,
        train_dataset=store,
        data_collator=DataCollatorForCellClassification(tokenizer, "cell_type"),
        processing_class=tokenizer,
    )
    trainer.train()
    trainer.save_model(tmp_path / "adapter")
    annotate(adata, adapted, tokenizer=tokenizer)
    wanted = adata.obs[["stformer_label", "stformer_score"]].copy()
    annotate(adata, tmp_path / "adapter")
    assert adata.obs["stformer_label"].tolist() == wanted["stformer_label"].tolist()
    assert adata.obs["stformer_label"].cat.categories.tolist() == ["B cell", "T cell"]
    np.testing.assert_allclose(adata.obs["stformer_score"], wanted["stformer_score"], atol=1e-5)
    again = finetune(adata, "cell_type", model=tmp_path / "adapter", num_train_epochs=0)
    weights = unwrap(adapted, merge=True).gene_bert.state_dict()
    for name, weight in again.gene_bert.state_dict().items():
        torch.testing.assert_close(weight, weights[name])
    (tmp_path / "adapter" / "model_config.json").unlink()
    with pytest.raises(ValueError, match="names its outputs. Load it with peft"):
        annotate(adata, tmp_path / "adapter")
    stock = AutoModelForSequenceClassification.from_pretrained(tmp_path / "adapter", num_labels=2)
    assert stock.config.num_labels == 2  # what transformers reads of such a folder, it still reads


def test_an_adapter_without_the_head_that_it_was_trained_with_is_refused(base, adata, lora, tmp_path):
    for folder, task in (("whole", "SEQ_CLS"), ("without", None)):  # of no task: PEFT keeps no head
        classifier = AutoModelForSequenceClassification.from_pretrained(base, **NAMES)
        lora(classifier, task_type=task).save_pretrained(tmp_path / folder)
        classifier.config.to_json_file(tmp_path / folder / "model_config.json", use_diff=False)
    annotate(adata, tmp_path / "whole")
    with pytest.raises(ValueError, match="without does not hold the weights classifier.bias, classifier.weight, pre_"):
        annotate(adata, tmp_path / "without")
    weights = load_file(tmp_path / "whole" / "adapter_model.safetensors")
    kept = {name: weight for name, weight in weights.items() if "pre_classifier" not in name}
    save_file(kept, tmp_path / "whole" / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="whole does not fit its base .*pre_classifier"):
        annotate(adata, tmp_path / "whole")


def test_what_an_adapter_knows_is_compared_as_that_of_a_model(base, tokenizer, adata, store, lora, tmp_path):
    classifier = AutoModelForSequenceClassification.from_pretrained(base, **NAMES)
    adapted = lora(classifier, task_type="SEQ_CLS")
    other = GeneTokenizer(list(tokenizer.genes)[::-1], bin_edges=[0.5, 1.5, 3.5], phenotypes=tokenizer.phenotypes)
    other.included_phenotypes = []

    def trainer(tokenizer=tokenizer, **options):
        return CellTrainer(
            model=adapted,
            args=TrainingArguments(tmp_path / "run", max_steps=1, report_to="none", use_cpu=True),
            train_dataset=store,
            data_collator=DataCollatorForCellClassification(tokenizer, "cell_type", **options),
            processing_class=tokenizer,
        )

    with pytest.raises(
        ValueError, match="processing_class does not fit the model: the same number of ids and types, but other"
    ):
        trainer(other)
    with pytest.raises(ValueError, match="1 'B cell', but the model's is 0 'B cell', 1 'T cell'"):
        trainer(label2id={"T cell": 0, "B cell": 1})
    trainer().save_model(tmp_path / "adapter")
    annotate(adata, tmp_path / "adapter")
    with pytest.raises(ValueError, match="does not fit the model"):
        annotate(adata, tmp_path / "adapter", tokenizer=other)
    with pytest.raises(ValueError, match="does not fit the model"):
        annotate(adata, adapted, tokenizer=other)
    GeneBertForPhenotypicMLM(GeneBertConfig.from_tokenizer(other, **SIZE)).save_pretrained(base)
    with pytest.raises(ValueError, match="was trained on a model with other genes, .* than its base .*base"):
        annotate(adata, tmp_path / "adapter")


@pytest.mark.parametrize("load", [load_config, load_tokenizer, load_model])
def test_a_wrong_name_is_told_with_the_closest_folder(base, load, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    shutil.copytree(base, tmp_path / "runs" / "checkpoint-10")
    for name, words in {
        "./bese": "There is no folder './bese'; the closest is base.",
        str(tmp_path / "bose"): f"the closest is {tmp_path / 'base'}.",
        "runs/checkpoint-11": "There is no folder 'runs/checkpoint-11'; the closest is runs/checkpoint-10.",
        "base/x/y": "There is no folder 'base/x/y'.",
        "a b": "There is no folder 'a b'.",
        "bese": "There is no folder 'bese'; the closest is base.",
        "pretrained": "There is no folder 'pretrained'.",
        "file": "file is a file; pass the folder of a checkpoint.",
        "empty": "The folder empty holds no checkpoint",
        "runs": "The folder runs holds no checkpoint .* It contains: runs/checkpoint-10.",
    }.items():
        with pytest.raises(FileNotFoundError, match=words) as found:
            load(name)
        assert not re.search("Repo id|on the Hub", str(found.value))  # refused at once


def test_a_name_that_the_hub_does_not_know_may_be_that_of_a_folder(base, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)

    def not_there(name, *_, **__):
        raise OSError(f"{name} is not a local folder and is not a valid model identifier\nmore lines")

    monkeypatch.setattr(AutoConfig, "from_pretrained", not_there)
    with pytest.raises(
        FileNotFoundError,
        match="no folder 'bases/bose'; the closest is base. It was not found on the Hub either: .* identifier$",
    ):
        load_config("bases/bose")


def test_a_folder_without_a_tokenizer_is_told(base, adata):
    (base / "tokenizer_config.json").unlink()
    with pytest.raises(FileNotFoundError, match="base holds no tokenizer .tokenizer_config.json.: save it beside"):
        embed(adata, base)


@pytest.mark.parametrize("call", [embed, annotate])
def test_what_is_no_model_is_refused_by_its_type(adata, tokenizer, call):
    for thing in (None, {"a": 1}, nn.Linear(2, 2), GeneBertModel, nn.DataParallel(nn.Linear(2, 2))):
        with pytest.raises(TypeError, match=f"or a PreTrainedModel .*; got {type(thing).__name__}"):
            call(adata, thing, tokenizer=tokenizer)


@pytest.mark.parametrize("call", [embed, annotate])
def test_what_results_cannot_be_written_into_is_refused(config, adata, tokenizer, call):
    model = GeneBertForClassification(config)
    with pytest.raises(TypeError, match="got the path 'cells.h5ad': read it first"):
        call("cells.h5ad", model, tokenizer=tokenizer)
    with pytest.raises(TypeError, match="got ndarray"):
        call(np.ones((2, 2)), model, tokenizer=tokenizer)
    for size in (0, -1):
        with pytest.raises(ValueError, match=f"batch_size={size}: must be at least 1"):
            call(adata, model, tokenizer=tokenizer, batch_size=size)


def test_a_store_is_refused_where_its_counts_are_needed_at_once(config, store, tokenizer):
    model = GeneBertForClassification(config)
    with pytest.raises(TypeError, match="not into a CellStore. Make an AnnData of its cells: AnnData"):
        gene_embeddings(model, tokenizer, store)
    of_store = AnnData(store.rows(slice(None)), obs=store.obs, var=store.genes.frame.set_index("gene_id"))
    gene_embeddings(model, tokenizer, of_store)  # as the error says
