"""Models and tokenizers that transformers made of the code beside their weights, in a process with the plugin."""

import sys

import pytest
import torch
from transformers import AutoTokenizer, TrainingArguments, dynamic_module_utils
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from stformer_hf import GeneBertConfig, GeneBertForPhenotypicMLM, GeneTokenizer, STFormerPretrainer, embed
from stformer_hf.batches.evaluating import length_to_read
from stformer_hf.models.remote_code import is_a


@pytest.fixture(scope="module")
def modules(tmp_path_factory):
    """The folder where transformers keeps the code that it imports; one for all tests, as modules stay imported."""
    folder = tmp_path_factory.mktemp("modules")
    with pytest.MonkeyPatch.context() as patch:
        # Other tests may have imported from the usual folder.
        patch.setattr(sys, "path", [path for path in sys.path if path != dynamic_module_utils.HF_MODULES_CACHE])
        patch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(folder))
        for name in _imported():
            patch.delitem(sys.modules, name)
        yield folder
        for name in _imported():
            del sys.modules[name]


def _imported():
    return [name for name in sys.modules if name.partition(".")[0] == "transformers_modules"]


@pytest.fixture
def checkpoint(store, tmp_path, modules):
    """A masked model of whole cells whose layers add nothing yet."""
    tokenizer = GeneTokenizer.from_store(store, whole_cell=True, max_length=12)
    torch.manual_seed(0)
    small = {"num_hidden_layers": 1, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}
    GeneBertForPhenotypicMLM(GeneBertConfig.from_tokenizer(tokenizer, **small)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def copies(folder):
    """The tokenizer as any call with trust_remote_code=True loads it, and the model as one before the import does."""
    model_class = get_class_from_dynamic_module("modeling_gene_bert.GeneBertForPhenotypicMLM", folder)
    return model_class.from_pretrained(folder), AutoTokenizer.from_pretrained(folder, trust_remote_code=True)


def test_copies_are_known_by_their_class_and_file(checkpoint):
    model, tokenizer = copies(checkpoint)
    assert not isinstance(model, GeneBertForPhenotypicMLM) and not isinstance(tokenizer, GeneTokenizer)
    assert is_a(model, GeneBertForPhenotypicMLM) and is_a(tokenizer, GeneTokenizer)
    assert not is_a(tokenizer, GeneBertForPhenotypicMLM)
    assert not is_a(type("GeneTokenizer", (), {})(), GeneTokenizer)  # of another file


def test_copies_train_and_are_read_as_the_classes_themselves(checkpoint, store, tmp_path):
    arguments = TrainingArguments(
        tmp_path / "run", max_steps=2, use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True
    )
    results = []
    for model, tokenizer in (
        (GeneBertForPhenotypicMLM.from_pretrained(checkpoint), GeneTokenizer.from_pretrained(checkpoint)),
        copies(checkpoint),
    ):
        shortest = length_to_read(model.gene_bert, tokenizer, "cls")
        trainer = STFormerPretrainer(arguments, store, model=model, processing_class=tokenizer)
        loss = trainer.train().training_loss
        frozen = [name for name, weight in model.named_parameters() if not weight.requires_grad]
        results.append((shortest, loss, model.config.cls_state, frozen))
    assert results[0] == results[1]
    assert results[0][0] == 3 and results[0][2] == "fixed"


def test_a_copy_of_a_tokenizer_with_other_genes_is_refused(checkpoint, store, adata, tmp_path):
    model, tokenizer = copies(checkpoint)
    model.save_pretrained(tmp_path / "other")
    GeneTokenizer(tokenizer.genes[::-1], whole_cell=True, max_length=12).save_pretrained(tmp_path / "other")
    other = AutoTokenizer.from_pretrained(tmp_path / "other", trust_remote_code=True)
    assert not isinstance(other, GeneTokenizer)
    with pytest.raises(ValueError, match="does not fit the model"):
        embed(adata, model, tokenizer=other)
    arguments = TrainingArguments(tmp_path / "run", max_steps=2, use_cpu=True, report_to="none")
    with pytest.raises(ValueError, match="does not fit the model"):
        STFormerPretrainer(arguments, store, model=model, processing_class=other)
