"""The last layer for some tokens alone, against the states of all tokens."""

import numpy as np
import pytest
import torch
from conftest import of_epoch

from stformer_hf import (
    DataCollatorForCellClassification,
    DataCollatorForPhenotypicMLM,
    GeneBertConfig,
    GeneBertForClassification,
    GeneBertForPhenotypicMLM,
    GeneBertModel,
    GeneTokenizer,
)
from stformer_hf.models.gene_bert.encoder_layers import first_tokens
from stformer_hf.models.gene_bert.heads import pool

NORMS = {"after": {}, "before": {"pre_norm": True, "norm_type": "rms_norm", "gated_feed_forward": True}}
LAYERS = {"two layers": {"num_hidden_layers": 2}, "no layers": {"num_hidden_layers": 0}}


@pytest.fixture(scope="module", params=["left", "right"])
def tokenizer(request):
    return GeneTokenizer([f"g{i}" for i in range(50)], bin_edges=[1, 2], padding_side=request.param)


@pytest.fixture(scope="module")
def examples(tokenizer):
    """Cells of many lengths, one without counts."""
    rng = np.random.default_rng(0)
    counts = rng.poisson(rng.uniform(0.1, 2, (7, 1)), (7, 50))
    counts[2] = 0
    tokens = tokenizer(counts)
    columns = zip(tokens["input_ids"], tokens["token_type_ids"], strict=True)
    return [
        {"input_ids": ids, "token_type_ids": types, "cell_id": i, "labels": i % 3}
        for i, (ids, types) in enumerate(columns)
    ]


def make_model(model_class, tokenizer, **settings):
    torch.manual_seed(0)
    settings = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "num_labels": 3, **settings}
    return model_class(GeneBertConfig.from_tokenizer(tokenizer, size="tiny", **settings))


def masked(tokenizer, examples, packing):
    return of_epoch(DataCollatorForPhenotypicMLM(tokenizer, packing=packing, mlm_probability=0.3))(examples)


def gradients_of(model):
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


def rows_of_last_feed_forward(model):
    """Return a list that gets the number of tokens of each call of the last feed-forward block."""
    seen = []
    model.base_model.layers[-1].ffn.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[:-1].numel()))
    return seen


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("layers", LAYERS)
@pytest.mark.parametrize("norms", NORMS)
def test_states_are_those_of_all_tokens(tokenizer, examples, packing, layers, norms):
    batch = masked(tokenizer, examples, packing)
    del batch["labels"]
    model = make_model(GeneBertModel, tokenizer, **LAYERS[layers], **NORMS[norms]).eval()
    some = torch.randperm(batch["input_ids"].numel())[:9]
    expected = model(**batch).last_hidden_state.flatten(0, 1)[some][None]
    torch.testing.assert_close(model(**batch, tokens_to_keep=some).last_hidden_state, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_a_training_step_on_masked_tokens_is_that_of_all_tokens(tokenizer, examples, packing, backend):
    batch = masked(tokenizer, examples, packing)
    n_labels, n_tokens = int((batch["labels"] != -100).sum()), batch["input_ids"].numel()
    results = []
    for whole in (False, True):
        model = make_model(GeneBertForPhenotypicMLM, tokenizer).train()
        model.set_attn_implementation(backend)
        rows = rows_of_last_feed_forward(model)
        outputs = model(**batch, output_hidden_states=whole)
        outputs.loss.backward()
        assert rows == [n_tokens if whole else n_labels] and n_labels < n_tokens
        assert outputs.logits.shape[0] == n_labels
        results.append([outputs.loss, outputs.logits, outputs.class_statistics, *gradients_of(model)])
        if whole:
            assert {len(states.flatten(0, 1)) for states in outputs.hidden_states} == {n_tokens}
    assert len(results[0]) == len(results[1])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("settings", [{"cell_decoder": True, "pooling": "cls"}, {"sparse_prediction": False}])
def test_models_that_read_other_states_compute_all_of_them(tokenizer, examples, settings):
    if "cell_decoder" in settings:
        tokenizer = GeneTokenizer(tokenizer.genes, bin_edges=[1, 2], whole_cell=True)
        counts = np.random.default_rng(0).poisson(1.0, (3, 50))
        tokens = tokenizer(counts)
        examples = [{name: column[i] for name, column in tokens.items()} for i in range(3)]
        settings = {**settings, "cell_embedding": True}
    batch = masked(tokenizer, examples, True)
    model = make_model(GeneBertForPhenotypicMLM, tokenizer, **settings).train()
    rows = rows_of_last_feed_forward(model)
    model(**batch)
    assert rows == [batch["input_ids"].numel()]


@pytest.mark.parametrize("packing", [False, True])
def test_a_training_step_on_classes_is_that_of_all_tokens(tokenizer, examples, packing):
    batch = DataCollatorForCellClassification(tokenizer, packing=packing)(examples)
    n_tokens = batch["input_ids"].numel()
    results = []
    for whole in (False, True):
        model = make_model(GeneBertForClassification, tokenizer, classifier_pooling="cls", classifier_dropout=0.0)
        rows = rows_of_last_feed_forward(model.train())
        outputs = model(**batch, output_hidden_states=whole)
        outputs.loss.backward()
        assert rows == [n_tokens if whole else len(examples)]
        results.append([outputs.loss, outputs.logits, *gradients_of(model)])
    assert len(results[0]) == len(results[1])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_cells_may_share_one_row_of_types(tokenizer):
    model = make_model(GeneBertForClassification, tokenizer, classifier_pooling="cls").eval()
    ids, types = torch.randint(5, 7, (4, 9)), torch.arange(9)[None]
    mask = torch.ones(4, 9, dtype=torch.long)
    mask[2, :3] = 0
    for inputs in ({"input_ids": ids}, {"inputs_embeds": torch.rand(4, 9, model.config.hidden_size)}):
        for masks in ({}, {"attention_mask": mask}):
            found = model(**inputs, **masks, token_type_ids=types).logits
            expected = model(**inputs, **masks, token_type_ids=types.expand(4, 9), output_hidden_states=True).logits
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_a_configuration_that_asks_for_states_gets_all(tokenizer, examples):
    batch = DataCollatorForCellClassification(tokenizer)(examples)
    model = make_model(GeneBertForClassification, tokenizer, classifier_pooling="cls").eval()
    expected = model(**batch, output_hidden_states=True)
    model.config.output_hidden_states = True
    found = model(**batch)
    assert found.hidden_states[-1].shape[:2] == batch["input_ids"].shape
    torch.testing.assert_close(found.logits, expected.logits)
    assert model(**batch, output_hidden_states=False).hidden_states is None


def test_first_tokens_are_those_that_pooling_reads(tokenizer, examples):
    for packing in (False, True):
        batch = DataCollatorForCellClassification(tokenizer, packing=packing)(examples)
        shape, mask, bounds = batch["input_ids"].shape, batch.get("attention_mask"), batch.get("cu_seq_lens_q")
        states = torch.rand(*shape, 4)
        expected = pool(states, None, mask, "cls", bounds)
        first = first_tokens(shape, mask, bounds, states.device)
        assert torch.equal(states.flatten(0, 1)[first], expected)
    assert first_tokens((3, 5), None, None, states.device).tolist() == [0, 5, 10]
    assert first_tokens((1, 5), None, torch.tensor([0, 3, 5, 5]), states.device).tolist() == [0, 3, 4]
