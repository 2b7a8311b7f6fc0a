"""The tests that transformers has for each of its own models, run on ours: `make test-transformers`.

Not run are the mixins that its source distribution lacks, of exports and of generation, and that of pipelines, which
tests models on the Hub with files that the distribution lacks.
"""

import contextlib
import importlib
import os
import re
import sys
import tempfile
import types
import unittest
from pathlib import Path
from unittest import mock

import pytest
import torch
import transformers

from stformer_hf import (
    GeneBertConfig,
    GeneBertForClassification,
    GeneBertForPhenotypicMLM,
    GeneBertForTokenClassification,
    GeneBertModel,
    GeneTokenizer,
)
from stformer_hf.models.cell_neighborhood.modeling_cell_neighborhood import (
    CellNeighborhoodForMaskedCell,
    CellNeighborhoodModel,
)
from stformer_hf.models.gene_bert.configuration_gene_bert import WHOLE_CELL
from tests.models.test_cell_neighborhood import make_batch, make_config

pytestmark = pytest.mark.slow
SOURCES = os.environ.get("TRANSFORMERS_SOURCES")
if SOURCES is None:
    pytest.skip(
        "TRANSFORMERS_SOURCES names no folder of transformers' source distribution: run make test-transformers",
        allow_module_level=True,
    )


def _import_mixins():
    """Import transformers' tests, whose source distribution lacks some of the files that they import."""
    package = types.ModuleType("transformers_tests")
    package.__path__ = [str(Path(SOURCES) / "tests")]
    stand_ins = {"": package}
    for name, attributes in STAND_INS.items():
        folder, _, _ = name.rpartition(".")
        stand_ins[folder] = types.ModuleType(f"transformers_tests.{folder}")
        stand_ins[name] = types.ModuleType(f"transformers_tests.{name}")
        vars(stand_ins[name]).update(attributes)
    sys.modules.update({f"transformers_tests.{name}".rstrip("."): module for name, module in stand_ins.items()})
    # ConfigTester reads transformers from a folder beside it, which is not where it is installed.
    with mock.patch("transformers.utils.direct_transformers_import", lambda *args: transformers):
        names = "modeling_common", "configuration_common", "training_mixin", "tokenization_common"
        return [importlib.import_module(f"transformers_tests.test_{name}") for name in names]


STAND_INS = {
    "exporters.test_export": {"ExportTesterMixin": object},
    "generation.test_utils": {"GenerationTesterMixin": type("GenerationTesterMixin", (), {})},
    "utils.test_configuration_utils": {
        "config_common_kwargs": {
            "return_dict": False,
            "output_hidden_states": True,
            "output_attentions": True,
            "dtype": "float16",
            "chunk_size_feed_forward": 5,
            "architectures": ["GeneBertModel"],
            "id2label": {0: "B cell", 1: "T cell"},
            "label2id": {"B cell": 0, "T cell": 1},
            "problem_type": "regression",
        }
    },
}
modeling, configuration, training, tokenization = _import_mixins()

# By what name transformers' tests look up which class is a base model and which labels a head takes.
AUTO_NAMES = {
    "MODEL": {"gene_bert": "GeneBertModel", "cell_neighborhood": "CellNeighborhoodModel"},
    "MODEL_FOR_MASKED_LM": {"gene_bert": "GeneBertForPhenotypicMLM"},
    "MODEL_FOR_SEQUENCE_CLASSIFICATION": {"gene_bert": "GeneBertForClassification"},
    "MODEL_FOR_TOKEN_CLASSIFICATION": {"gene_bert": "GeneBertForTokenClassification"},
}
# Why each test that fails has to. A name stands for all values of a parameter.
NO_TYPES = "calls the model with input_ids alone, and a bin without its gene is refused"
NOT_CELLS = "calls the tokenizer on text, and it takes cells"
NO_STATISTICS = "the float32 statistics are those of models with cell_embedding alone"
NOT_FITTING = {
    "TestGeneBertOfBins": {
        "test_keep_in_fp32_modules_exist": NO_STATISTICS,
        "test_load_with_mismatched_shapes": NO_TYPES,
    },
    "TestGeneBertOfRanks": {
        "test_keep_in_fp32_modules_exist": NO_STATISTICS,
        "test_load_with_mismatched_shapes": NO_TYPES,
    },
    "TestGeneBertOfValues": {
        "test_keep_in_fp32_modules_exist": NO_STATISTICS,
        "test_load_with_mismatched_shapes": NO_TYPES,
    },
    "TestGeneBertOfWholeCells": {
        "test_can_load_ignoring_mismatched_shapes": "the bias of the wide head is of another size too",
        "test_load_with_mismatched_shapes": NO_TYPES,
        "test_torch_save_load": "n_cells of a new model is infinite, and inf - inf is not a number",
    },
    "TestGeneTokenizer": {
        "test_batch_encode_dynamic_overflowing": NOT_CELLS,
        "test_batch_encode_plus_batch_sequence_length": NOT_CELLS,
        "test_batch_encode_plus_padding": NOT_CELLS,
        "test_bos_token_with_add_bos_token_false": NOT_CELLS,
        "test_bos_token_with_add_bos_token_true": NOT_CELLS,
        "test_call": NOT_CELLS,
        "test_chat_template": NOT_CELLS,
        "test_chat_template_batched": NOT_CELLS,
        "test_empty_input_string": NOT_CELLS,
        "test_encode_plus_with_padding": NOT_CELLS,
        "test_mask_output": NOT_CELLS,
        "test_maximum_encoding_length_pair_input": "encodes two texts, and a cell is one sequence",
        "test_maximum_encoding_length_single_input": NOT_CELLS,
        "test_number_of_added_tokens": "encodes two texts, and a cell is one sequence",
        "test_pad_token_initialization": NOT_CELLS,
        "test_padding_to_multiple_of": NOT_CELLS,
        "test_prepare_seq2seq_batch": NOT_CELLS,
        "test_pretokenized_inputs": NOT_CELLS,
        "test_special_tokens_mask": NOT_CELLS,
        "test_special_tokens_mask_input_pairs": "encodes two texts, and a cell is one sequence",
        "test_token_type_ids": NOT_CELLS,
        "test_tokenizer_store_full_signature": "genes, bins and medians are saved in the vocabulary's file alone",
    },
    "TestCellNeighborhood": {
        "test_batching_equivalence": "cuts each tensor along its rows: cells, neighbourhoods and masks differ in them",
        "test_eager_matches_sdpa_inference": "cuts each tensor along its rows: see test_batching_equivalence",
        "test_model_outputs_equivalence": "asks sdpa for attentions, which are refused; transformers returns none",
    },
}


@pytest.fixture(autouse=True)
def known_to_transformers(monkeypatch):
    for task, names in AUTO_NAMES.items():
        for model_type, name in names.items():
            monkeypatch.setitem(getattr(modeling, f"{task}_MAPPING_NAMES"), model_type, name)


@pytest.fixture(autouse=True)
def not_fitting(request, monkeypatch):
    for name, reason in NOT_FITTING[request.cls.__name__].items():
        if re.fullmatch(rf"{name}(_\d.*)?", request.node.name):
            request.node.add_marker(pytest.mark.xfail(reason=reason, strict=True))
            # A test passes though its subtests failed: here the first that fails is to be the test's failure.
            monkeypatch.setattr(request.cls, "subTest", lambda *args, **kwargs: contextlib.nullcontext())


class ModelTester:
    """What the mixins ask of a model's test: sizes, a configuration and a batch."""

    is_training = True
    batch_size, seq_length = 7, 9
    hidden_size, num_hidden_layers, num_attention_heads = 32, 2, 4

    def __init__(self, **fields):
        self.fields = {"hidden_size": self.hidden_size, "num_attention_heads": 4, "intermediate_size": 37, **fields}


class GeneBertTester(ModelTester):
    vocab_size = 40
    causal_lm_class = GeneBertForPhenotypicMLM  # which TrainingTesterMixin trains

    def get_config(self):
        return GeneBertConfig(vocab_size=self.vocab_size, type_vocab_size=11, num_hidden_layers=2, **self.fields)

    def make_inputs(self, n_cells, length):
        """Make a batch, but for its attention mask."""
        config = self.get_config()
        inputs = {
            "input_ids": torch.randint(4, config.vocab_size, (n_cells, length)),
            "token_type_ids": torch.randint(config.type_vocab_size, (n_cells, length)),
        }
        if config.value_embedding:
            inputs["expression_values"] = torch.rand(n_cells, length)
        if config.cell_embedding:
            inputs["cell_genes"] = torch.rand(n_cells, config.num_genes).argsort()[:, :6]
            inputs["cell_counts"] = torch.randint(1, 5, (n_cells, 6)).float()
        return inputs

    def prepare_config_and_inputs_for_common(self):
        lengths = torch.randint(5, self.seq_length + 1, (self.batch_size, 1))
        mask = (torch.arange(self.seq_length) < lengths).long()
        return self.get_config(), {**self.make_inputs(self.batch_size, self.seq_length), "attention_mask": mask}


class CellNeighborhoodTester(ModelTester):
    lengths = [2, 1, 3, 0, 2, 4, 1]
    seq_length = 20  # of the encoder: all cells, and one token more for each neighbourhood

    def get_config(self):
        return make_config(**self.fields)

    def prepare_config_and_inputs_for_common(self):
        return self.get_config(), make_batch(self.lengths, "masked")


class OfOneModel(modeling.ModelTesterMixin):
    """Tests of one configuration of a model, on all of its classes."""

    made_by = None
    fields = {}
    test_can_init_all_missing_weights_before_2023 = True  # our files name no year

    def setUp(self):
        torch.manual_seed(0)
        self.model_tester = self.made_by(**self.fields)
        config_class = type(self.model_tester.get_config())
        self.config_tester = configuration.ConfigTester(
            self, config_class, has_text_modality=config_class is GeneBertConfig, **self.model_tester.fields
        )

    def test_config(self):
        self.config_tester.run_common_tests()


class OfGeneBert(OfOneModel, training.TrainingTesterMixin):
    made_by = GeneBertTester
    all_model_classes = (
        GeneBertModel,
        GeneBertForPhenotypicMLM,
        GeneBertForClassification,
        GeneBertForTokenClassification,
    )
    additional_model_inputs = ["token_type_ids", "expression_values", "cell_genes", "cell_counts"]

    def _create_text_training_batch(self, batch_size, seq_length, vocab_size):
        batch = super()._create_text_training_batch(batch_size, seq_length, vocab_size)
        return {**self.model_tester.make_inputs(batch_size, seq_length), **batch}


class TestGeneBertOfBins(OfGeneBert, unittest.TestCase):
    pass


class TestGeneBertOfRanks(OfGeneBert, unittest.TestCase):
    fields = {"position_embedding_type": "learned", "max_position_embeddings": 64}
    test_resize_position_embeddings = True


class TestGeneBertOfValues(OfGeneBert, unittest.TestCase):
    fields = {
        "value_embedding": True,
        "position_embedding_type": "rotary",
        "gated_feed_forward": True,
        "pre_norm": True,
        "norm_type": "rms_norm",
    }


class TestGeneBertOfSoftBins(OfGeneBert, unittest.TestCase):
    fields = {"value_embedding": "soft_bins"}


class TestGeneBertOfWholeCells(OfGeneBert, unittest.TestCase):
    fields = {"num_genes": 10, **WHOLE_CELL, "cell_decoder": True, "wide_head": True}
    test_all_params_have_gradient = False  # the loss of the cell decoder is the trainer's


class TestGeneTokenizer(tokenization.TokenizerTesterMixin, unittest.TestCase):
    """Of ranked cells, which can be written as text; its genes have the names of the words that the tests encode."""

    tokenizer_class = GeneTokenizer

    @classmethod
    def setUpClass(cls):
        cls.tmpdirname = tempfile.mkdtemp()
        genes = "He is very happy, UNwant\u00e9d,running This a test sequence Sequence Encode this.".split()
        phenotypes = {"cell_type": ["B cell", "T cell"]}
        tokenizer = GeneTokenizer(genes, scheme="rank", medians=[1.0] * len(genes), phenotypes=phenotypes)
        tokenizer.save_pretrained(cls.tmpdirname)
        cls.tokenizers_list = [(GeneTokenizer, cls.tmpdirname, {})]


class TestCellNeighborhood(OfOneModel, unittest.TestCase):
    made_by = CellNeighborhoodTester
    all_model_classes = (CellNeighborhoodModel, CellNeighborhoodForMaskedCell)
    test_resize_embeddings = False  # its ids are cell types
