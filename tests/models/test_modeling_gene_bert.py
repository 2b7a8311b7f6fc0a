"""GeneBert: against the same model written from torch parts, on each backend, saved and loaded."""

import pytest
import torch
from conftest import checkpoint_activations
from plain_gene_bert import plain_encoder
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize, prune
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForPreTraining,
    AutoModelForSequenceClassification,
)

from stformer_hf import (
    GeneBertConfig,
    GeneBertForClassification,
    GeneBertForPhenotypicMLM,
    GeneBertModel,
    GeneTokenizer,
    PositionlessEmbeddings,
)
from stformer_hf.models.gene_bert import heads


@pytest.fixture
def batch(tokenizer, adata):
    return dict(tokenizer(adata[:8], padding=True, return_tensors="pt"))


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
def test_padded_cells_equal_the_plain_model_on_each_cell_alone(config, tokenizer, adata, batch, backend):
    model = GeneBertModel._from_config(config, attn_implementation=backend).eval()
    assert model.config._attn_implementation == backend
    with torch.no_grad():
        hidden = model(**batch).last_hidden_state
    tokens = tokenizer(adata[:8])
    assert len({len(ids) for ids in tokens["input_ids"]}) > 1
    for i, (ids, types) in enumerate(zip(tokens["input_ids"], tokens["token_type_ids"], strict=True)):
        plain = plain_encoder(model, ids, types)
        torch.testing.assert_close(hidden[i, : len(ids)].double(), plain, atol=1e-5, rtol=0)


def test_the_order_of_genes_carries_no_meaning(config, batch):
    model = GeneBertModel(config).eval()
    one = {name: tensor[:1, : int(batch["attention_mask"][0].sum())] for name, tensor in batch.items()}
    order = torch.randperm(one["input_ids"].shape[1])
    shuffled = {name: tensor[:, order] for name, tensor in one.items()}
    with torch.no_grad():
        a, b = model(**one).last_hidden_state[:, order], model(**shuffled).last_hidden_state
    torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


@pytest.mark.parametrize("sparse", [True, False])
@pytest.mark.parametrize("smoothing", [0.0, 0.5])
def test_mlm_loss_is_the_cross_entropy_of_the_masked_positions(config, batch, sparse, smoothing):
    config.label_smoothing = smoothing
    model = GeneBertForPhenotypicMLM(config).eval()
    labels = torch.where(torch.rand(batch["input_ids"].shape) < 0.3, batch["input_ids"], -100)
    labels[batch["attention_mask"] == 0] = -100
    with torch.no_grad():
        logits = model(**batch).logits
        outputs = model(**batch, labels=labels, sparse_prediction=sparse)
    assert logits.shape == (*labels.shape, config.vocab_size)
    losses = []
    for row, column in (labels != -100).nonzero():
        log_probability = logits[row, column].double().log_softmax(-1)
        own, mean = log_probability[labels[row, column]], log_probability.mean()
        losses.append(-(1 - smoothing) * own - smoothing * mean)
    assert outputs.loss.item() == pytest.approx(torch.stack(losses).mean().item(), abs=1e-6)
    expected = logits[labels != -100] if sparse else logits
    torch.testing.assert_close(outputs.logits, expected)
    # Trainer divides by the labels of all accumulated batches.
    with torch.no_grad():
        halved = model(**batch, labels=labels, num_items_in_batch=torch.tensor(2 * len(losses))).loss
    assert halved.item() == pytest.approx(outputs.loss.item() / 2, rel=1e-6)


def test_logits_are_of_the_labelled_positions_in_training_alone(config, batch):
    labels = torch.where(torch.rand(batch["input_ids"].shape) < 0.3, batch["input_ids"], -100)
    whole, labelled = (*labels.shape, config.vocab_size), (int((labels != -100).sum()), config.vocab_size)
    for sparse in (True, False):
        config.sparse_prediction = sparse
        model = GeneBertForPhenotypicMLM(config)
        assert model.train()(**batch, labels=labels).logits.shape == (labelled if sparse else whole)
        assert model.eval()(**batch, labels=labels).logits.shape == whole
    assert model.loss_type == "ForMaskedLM"


def test_a_batch_without_labels_has_loss_zero_and_a_gradient(config, batch):
    model = GeneBertForPhenotypicMLM(config)
    loss = model(**batch, labels=torch.full_like(batch["input_ids"], -100)).loss
    loss.backward()
    assert loss.item() == 0


def test_classification_loss_and_head(config, batch):
    config.num_labels = 3
    model = GeneBertForClassification(config).eval()
    labels = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1])
    with torch.no_grad():
        outputs = model(**batch, labels=labels)
        cls = model.gene_bert(**batch).last_hidden_state[:, 0]
    logits = model.classifier(F.relu(model.pre_classifier(cls)))
    torch.testing.assert_close(outputs.logits, logits)
    log_probabilities = logits.double().log_softmax(-1)
    expected = -sum(log_probabilities[i, label] for i, label in enumerate(labels)) / len(labels)
    assert outputs.loss.item() == pytest.approx(expected.item(), abs=1e-6)
    assert model.loss_type == "ForSequenceClassification"


def test_mean_pooling_is_the_mean_over_the_genes_of_each_cell_alone(config, tokenizer, adata, batch):
    config.classifier_pooling = "mean"
    model = GeneBertForClassification(config).eval()
    with torch.no_grad():
        logits = model(**batch).logits
    tokens = tokenizer(adata[:8])
    for i, (ids, types) in enumerate(zip(tokens["input_ids"], tokens["token_type_ids"], strict=True)):
        hidden = plain_encoder(model.gene_bert, ids, types)
        mean = sum(hidden[j] for j in range(len(ids)) if types[j] > 0) / sum(types[j] > 0 for j in range(len(ids)))
        with torch.no_grad():
            expected = model.classifier(F.relu(model.pre_classifier(mean.float())))
        torch.testing.assert_close(logits[i], expected, atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="needs token_type_ids"):
        model(input_ids=batch["input_ids"])
    with pytest.raises(ValueError, match="'cls' or 'mean', got 'max'"):
        GeneBertConfig(classifier_pooling="max")


@pytest.mark.parametrize("tie", [True, False])
def test_the_head_is_tied_or_not_also_after_training_and_loading(config, batch, tmp_path, tie):
    config.tie_word_embeddings = tie
    model = GeneBertForPhenotypicMLM(config)
    model(**batch, labels=batch["input_ids"]).loss.backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    model.save_pretrained(tmp_path)
    for one in (model, GeneBertForPhenotypicMLM.from_pretrained(tmp_path)):
        head, embedding = one.mlm_head.decoder.weight, one.gene_bert.embeddings.word_embeddings.weight
        assert (head is embedding) == tie
        assert torch.equal(head, embedding) == tie


def test_auto_classes_load_what_was_saved(config, tokenizer, batch, tmp_path):
    mlm = GeneBertForPhenotypicMLM(config).eval()
    mlm.save_pretrained(tmp_path)
    assert type(AutoConfig.from_pretrained(tmp_path)) is GeneBertConfig
    assert AutoConfig.from_pretrained(tmp_path).vocabulary_fingerprint == tokenizer.fingerprint
    loaded = AutoModelForMaskedLM.from_pretrained(tmp_path).eval()
    assert type(loaded) is type(AutoModelForPreTraining.from_pretrained(tmp_path)) is GeneBertForPhenotypicMLM
    encoder = AutoModel.from_pretrained(tmp_path).eval()
    assert type(encoder) is GeneBertModel
    classifier = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=4).eval()
    assert type(classifier) is GeneBertForClassification
    with torch.no_grad():
        torch.testing.assert_close(loaded(**batch).logits, mlm(**batch).logits, atol=1e-6, rtol=0)
        hidden = mlm.gene_bert(**batch).last_hidden_state
        for model in (encoder, classifier.gene_bert):  # pretrained weights are really loaded
            torch.testing.assert_close(model(**batch).last_hidden_state, hidden, atol=1e-6, rtol=0)


def test_position_embeddings_are_resized(config, tmp_path):
    config.position_embedding_type, config.max_position_embeddings = "learned", 8
    ids = torch.arange(12)[None] % config.vocab_size
    batch = {"input_ids": ids, "token_type_ids": torch.ones_like(ids)}
    for model_class in (GeneBertModel, GeneBertForPhenotypicMLM, GeneBertForClassification):
        config.max_position_embeddings = 8
        model = model_class(config).eval()
        short = {name: tensor[:, :8] for name, tensor in batch.items()}
        with torch.no_grad():
            before = model(**short)[0]
            with pytest.raises(ValueError, match="the model has 8 positions"):
                model(**batch)
            model.resize_position_embeddings(12)
            torch.testing.assert_close(model(**short)[0], before)
            model.save_pretrained(tmp_path)
            again = model_class.from_pretrained(tmp_path)
            assert again.get_position_embeddings().num_embeddings == again.config.max_position_embeddings == 12
            torch.testing.assert_close(again(**batch)[0], model(**batch)[0])
            model.resize_position_embeddings(8)
            torch.testing.assert_close(model(**short)[0], before)
    config.position_embedding_type = "none"
    with pytest.raises(ValueError, match="no position embeddings"):
        GeneBertModel(config).resize_position_embeddings(12)


def test_a_new_head_is_told_and_an_unused_one_is_not(config, tmp_path):
    GeneBertForPhenotypicMLM(config).save_pretrained(tmp_path)
    _, told = GeneBertModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not told["unexpected_keys"] and not told["missing_keys"]
    _, told = GeneBertForClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not told["unexpected_keys"]
    assert {key.split(".")[0] for key in told["missing_keys"]} == {"pre_classifier", "classifier"}


def test_every_parameter_gets_a_gradient(config, batch):
    for model, labels in (
        (GeneBertForPhenotypicMLM(config), batch["input_ids"]),
        (GeneBertForClassification(config), torch.zeros(8, dtype=torch.long)),
    ):
        model(**batch, labels=labels).loss.backward()
        assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


def test_hidden_states_and_attentions_on_request(config, batch):
    model = GeneBertModel._from_config(config, attn_implementation="eager").eval()
    outputs = model(**batch, output_hidden_states=True, output_attentions=True)
    assert len(outputs.hidden_states) == config.num_hidden_layers + 1
    assert torch.equal(outputs.hidden_states[-1], outputs.last_hidden_state)
    torch.testing.assert_close(outputs.hidden_states[0], model.embeddings(batch["input_ids"], batch["token_type_ids"]))
    attention = outputs.attentions[0]
    assert attention.shape == (8, 2, *[batch["input_ids"].shape[1]] * 2)
    padding = batch["attention_mask"][:, None, None] == 0
    assert attention.masked_select(padding.expand_as(attention)).max() == 0


def test_activation_checkpointing_changes_nothing(config, batch):
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.0
    model = GeneBertForPhenotypicMLM(config).train()
    loss = model(**batch, labels=batch["input_ids"]).loss
    checkpoint_activations(model)()
    again = model(**batch, labels=batch["input_ids"]).loss
    again.backward()
    assert again.item() == pytest.approx(loss.item(), abs=1e-6)


def test_resizing_the_vocabulary_keeps_old_embeddings(config):
    model = GeneBertForPhenotypicMLM(config)
    old = model.get_input_embeddings().weight.detach().clone()
    model.resize_token_embeddings(config.vocab_size + 2)
    assert torch.equal(model.get_input_embeddings().weight[:-2], old)
    assert model.mlm_head.decoder.weight is model.get_input_embeddings().weight


@pytest.mark.parametrize(
    ("size", "layers", "hidden"), [("tiny", 2, 128), ("small", 6, 256), ("base", 12, 768), ("large", 24, 1024)]
)
def test_sizes(tokenizer, size, layers, hidden):
    config = GeneBertConfig.from_tokenizer(tokenizer, size=size)
    assert (config.num_hidden_layers, config.hidden_size) == (layers, hidden)
    assert (config.vocab_size, config.type_vocab_size) == (len(tokenizer), tokenizer.type_vocab_size)
    assert config.pad_token_id == tokenizer.pad_token_id


def test_bad_settings_and_input_raise(tokenizer, config, batch):
    with pytest.raises(ValueError, match="tiny, small, base, large, got 'huge'"):
        GeneBertConfig.from_tokenizer(tokenizer, size="huge")
    with pytest.raises(ValueError, match="not a multiple"):
        GeneBertConfig(hidden_size=10, num_attention_heads=3)
    with pytest.raises(Exception, match="vocab_size"):
        GeneBertConfig(vocab_size="many")
    model = GeneBertModel(config)
    with pytest.raises(ValueError, match="token_type_ids"):
        model(input_ids=batch["input_ids"])
    with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
        model(token_type_ids=batch["token_type_ids"])


def test_embeddings_have_no_positions(config):
    names = {name for name, _ in PositionlessEmbeddings(config).named_parameters()}
    assert names == {"word_embeddings.weight", "token_type_embeddings.weight", "LayerNorm.weight", "LayerNorm.bias"}
    assert isinstance(PositionlessEmbeddings(config), nn.Module)


def test_a_config_without_tokenizer_can_be_made():
    assert GeneBertConfig().hidden_size == 768
    assert GeneTokenizer(["a"]).fingerprint


def test_padding_on_the_left_changes_nothing(config, tokenizer, adata):
    model = GeneBertForClassification(config).eval()
    with torch.no_grad():
        right = model(**tokenizer(adata[:8], padding=True, return_tensors="pt")).logits
        tokenizer.padding_side = "left"
        left = model(**tokenizer(adata[:8], padding=True, return_tensors="pt")).logits
    torch.testing.assert_close(left, right, atol=1e-5, rtol=0)


@pytest.mark.parametrize("dropout", ["hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout"])
def test_each_dropout_is_there_in_training(config, batch, dropout):
    for name in ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout"):
        setattr(config, name, 0.5 if name == dropout else 0.0)
    model = GeneBertForClassification(config).train()
    assert not torch.equal(model(**batch).logits, model(**batch).logits)
    model.eval()
    assert torch.equal(model(**batch).logits, model(**batch).logits)


@pytest.mark.parametrize("n_outputs", [8, 13])
def test_more_outputs_change_nothing_of_the_others(n_outputs):
    linear, states = nn.Linear(6, n_outputs), torch.randn(2, 5, 6)
    upstream = torch.randn(2, 5, n_outputs)
    found = []
    for filled_up in (False, True):
        leaves = [states.clone().requires_grad_(), *(p.detach().clone().requires_grad_() for p in linear.parameters())]
        outputs = heads._linear_with_columns(*leaves, 3) if filled_up else nn.functional.linear(*leaves)
        assert outputs.shape[-1] == n_outputs + 3 * filled_up
        outputs[..., n_outputs:].sum().backward(retain_graph=True)  # which no weight has a part in
        outputs[..., :n_outputs].backward(upstream)
        found.append([outputs[..., :n_outputs], *(leaf.grad for leaf in leaves)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_a_last_layer_that_is_not_plain_is_applied_as_it_is():
    states, linear = torch.randn(4, 6), nn.Linear(6, 13)
    for layer in (linear, nn.Sequential(linear), nn.Linear(6, 13, bias=False)):
        assert torch.equal(heads.linear_filled_up(states, layer), layer(states))


def test_only_a_layer_of_weight_and_bias_alone_is_filled_up():
    def is_plain(change=None, **settings) -> bool:
        linear = nn.Linear(6, 13, **settings)
        if change is not None:
            change(linear)
        return heads._is_plain(linear)

    def double(module, *inputs_and_outputs):
        return inputs_and_outputs[-1] * 2

    assert is_plain()
    assert not is_plain(bias=False) and not heads._is_plain(nn.Sequential(nn.Linear(6, 13)))
    for register in ("forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook"):
        assert not is_plain(lambda linear, name=f"register_{register}": getattr(linear, name)(double)), register
    assert not is_plain(lambda linear: setattr(linear, "forward", lambda states: states))  # as accelerate does
    for name in ("weight", "bias"):  # computed before each call
        assert not is_plain(lambda linear, name=name: prune.random_unstructured(linear, name, 2)), name
        assert not is_plain(lambda linear, name=name: parametrize.register_parametrization(linear, name, nn.Tanh()))


@pytest.mark.gpu
@pytest.mark.parametrize("n_outputs", [16, 13])
def test_the_last_layer_is_filled_up_on_a_gpu(n_outputs, monkeypatch):
    calls = []
    plain = heads._linear_with_columns
    monkeypatch.setattr(heads, "_linear_with_columns", lambda *args: calls.append(args[-1]) or plain(*args))
    linear, states = nn.Linear(8, n_outputs).cuda(), torch.randn(4, 8, device="cuda")
    torch.testing.assert_close(heads.linear_filled_up(states, linear), linear(states))
    assert not calls  # float32
    with torch.autocast("cuda", torch.bfloat16):
        found, expected = heads.linear_filled_up(states, linear), linear(states)
    assert calls == ([3] if n_outputs == 13 else []) and found.shape == expected.shape
    torch.testing.assert_close(found, expected, atol=2e-2, rtol=2e-2)
