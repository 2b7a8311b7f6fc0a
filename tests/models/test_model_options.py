"""Every option of GeneBert: against the plain model, padded on both sides and packed, with gradients."""

import numpy as np
import pytest
import torch
from conftest import of_epoch
from plain_gene_bert import plain_encoder
from transformers import (
    AttentionInterface,
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    DataCollatorForTokenClassification,
)

from stformer_hf import (
    CellNeighborhoodConfig,
    DataCollatorForPhenotypicMLM,
    GeneBertConfig,
    GeneBertForClassification,
    GeneBertForPhenotypicMLM,
    GeneBertForTokenClassification,
    GeneBertModel,
    GeneTokenizer,
    collate_fn_wrapper,
)
from stformer_hf.models.gene_bert.encoder_layers import make_norm

OPTIONS = {
    "pre_norm": {"pre_norm": True},
    "rms_norm": {"norm_type": "rms_norm", "layer_norm_eps": 1e-6},
    "geglu": {"gated_feed_forward": True},
    "swiglu": {"gated_feed_forward": True, "hidden_act": "silu"},
    "learned": {"position_embedding_type": "learned", "max_position_embeddings": 70},
    "rotary": {"position_embedding_type": "rotary"},
    "values": {"value_embedding": True},
    "soft bins": {"value_embedding": "soft_bins"},
    "all": {
        "pre_norm": True,
        "norm_type": "rms_norm",
        "layer_norm_eps": 1e-6,
        "gated_feed_forward": True,
        "hidden_act": "silu",
        "position_embedding_type": "rotary",
        "value_embedding": True,
    },
}
GENES = [f"g{i}" for i in range(60)]


def cells():
    """Cells of many lengths, one of them without counts."""
    rng = np.random.default_rng(0)
    counts = rng.poisson(rng.uniform(0.1, 2, (6, 1)), (6, 60))
    counts[2] = 0
    return counts, {"t": ["x", "y", "x", "x", "y", "y"]}


def make(option, **kwargs):
    options = OPTIONS[option]
    tokenizer = GeneTokenizer(
        GENES, bin_edges=[1, 2], phenotypes={"t": ["x", "y"]}, values=bool(options.get("value_embedding"))
    )
    torch.manual_seed(0)
    config = GeneBertConfig.from_tokenizer(
        tokenizer,
        num_hidden_layers=2,
        num_attention_heads=2,
        hidden_size=16,
        intermediate_size=24,
        initializer_range=0.3,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        **{**options, **kwargs},
    )
    return tokenizer, config


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@pytest.mark.parametrize("option", OPTIONS)
def test_padded_left_padded_and_packed_cells_are_those_of_the_plain_model(option, backend):
    tokenizer, config = make(option)
    model = GeneBertModel._from_config(config, attn_implementation=backend).eval()
    for parameter in model.parameters():  # also biases and norms
        parameter.data += 0.1 * torch.randn_like(parameter)
    counts, obs = cells()
    tokens = tokenizer(counts, obs=obs)
    columns = ["input_ids", "token_type_ids"] + ["expression_values"] * bool(config.value_embedding)
    plain = [plain_encoder(model, *one) for one in zip(*(tokens[name] for name in columns), strict=True)]
    examples = [dict(zip(columns, one, strict=True)) for one in zip(*(tokens[name] for name in columns), strict=True)]
    for side in ("right", "left", "packed"):
        tokenizer.padding_side = "left" if side == "left" else "right"
        batch = collate_fn_wrapper(tokenizer, packing=side == "packed")(examples)
        with torch.no_grad():
            hidden = model(**batch).last_hidden_state
        found = hidden[0] if side == "packed" else hidden[batch["attention_mask"].bool()]
        torch.testing.assert_close(found.double(), torch.cat(plain), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("option", OPTIONS)
def test_loss_and_gradients_are_those_of_the_packed_batch_and_survive_saving(option, tmp_path):
    tokenizer, config = make(option)
    model = GeneBertForPhenotypicMLM(config)
    counts, obs = cells()
    tokens = tokenizer(counts, obs=obs)
    examples = [dict(zip(tokens, one, strict=True)) for one in zip(*tokens.values(), strict=True)]
    results = []
    for packing in (False, True):
        collator = of_epoch(DataCollatorForPhenotypicMLM(tokenizer, packing=packing, mlm_probability=0.5))
        model.zero_grad()
        output = model(**collator(examples))
        output.loss.backward()
        assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []
        results.append([output.loss, output.logits, *(parameter.grad.clone() for parameter in model.parameters())])
    for padded, packed in zip(*results, strict=True):
        torch.testing.assert_close(packed, padded, atol=1e-5, rtol=1e-4)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again = GeneBertForPhenotypicMLM.from_pretrained(tmp_path)
    collator = of_epoch(DataCollatorForPhenotypicMLM(GeneTokenizer.from_pretrained(tmp_path), mlm_probability=0.5))
    torch.testing.assert_close(again(**collator(examples)).loss, results[0][0])


def test_values_are_log_counts_hidden_where_masked_and_cut_with_their_genes():
    tokenizer, _ = make("values")
    counts, obs = cells()
    for scheme in (tokenizer, GeneTokenizer(GENES, bin_edges=[1], values=True, normalize="log1p_cp10k", max_length=9)):
        tokens = scheme(counts, obs=obs)
        for row, types, values in zip(counts, tokens["token_type_ids"], tokens["expression_values"], strict=True):
            x = np.log1p(row) if scheme is tokenizer else np.log1p(row / max(row.sum(), 1) * 1e4)
            offset = scheme.gene_token_type_offset
            expected = [x[of - offset] if of >= offset else 0.0 for of in types]
            np.testing.assert_allclose(values, expected, rtol=1e-6)
    examples = [dict(zip(tokens, one, strict=True)) for one in zip(*tokens.values(), strict=True)]
    batch = DataCollatorForPhenotypicMLM(scheme, mlm_probability=0.5, gene_dropout=0.2)(examples)
    masked = batch["input_ids"] == scheme.mask_token_id
    genes = scheme.get_gene_tokens_mask(batch["input_ids"])
    assert masked.any() and (batch["expression_values"][masked] == 0).all()
    assert genes.any() and (batch["expression_values"][genes] > 0).all()
    assert batch["expression_values"].dtype == torch.float32


def test_soft_bins_begin_as_normal_densities_in_place_of_the_bin():
    tokenizer, config = make("soft bins")
    model = GeneBertModel(config).eval()
    soft = model.embeddings.value_embeddings
    values = torch.tensor([[0.0, np.log(2), 1.7, 6.0, 9.0]])
    centres = np.linspace(np.log(2), np.log(1000), 16)
    density = np.exp(-((values.numpy()[..., None] - centres) ** 2) / (2 * (centres[1] - centres[0]) ** 2))
    expected = torch.tensor(density / density.sum(axis=-1, keepdims=True)).float() @ soft.bins.weight
    torch.testing.assert_close(soft(values), expected, atol=1e-5, rtol=1e-4)
    inputs = {"token_type_ids": torch.full((1, 5), 3), "expression_values": values}
    with torch.no_grad():
        one, other = (model(input_ids=torch.full((1, 5), token), **inputs) for token in (5, 6))
        masked = model(input_ids=torch.tensor([[tokenizer.mask_token_id, 6, 6, 6, 6]]), **inputs)
    first = model.embeddings.word_embeddings.weight[5:7]
    assert not torch.equal(*first)
    embedded = [model.embeddings(torch.full((1, 5), token), **inputs) for token in (5, 6)]
    assert torch.equal(embedded[0][:, 1:], embedded[1][:, 1:])  # the value, not the bin
    assert not torch.equal(embedded[0][:, 0], embedded[1][:, 0])  # a token without a value, such as a masked one
    assert not torch.equal(masked.last_hidden_state, other.last_hidden_state)
    assert one.last_hidden_state.isfinite().all()


def test_what_a_model_cannot_read_is_told():
    tokenizer, config = make("values")
    counts, obs = cells()
    batch = dict(tokenizer(counts, obs=obs, padding=True, return_tensors="pt"))
    values = batch.pop("expression_values")
    with pytest.raises(ValueError, match="tokenize with values=True"):
        GeneBertModel(config)(**batch)
    config.value_embedding = False
    with pytest.raises(ValueError, match="does not read expression_values"):
        GeneBertModel(config)(**batch, expression_values=values)
    with pytest.raises(ValueError, match="values: only for the binned scheme"):
        GeneTokenizer(["a"], scheme="rank", medians=[1.0], values=True)
    config.position_embedding_type, config.max_position_embeddings = "learned", 20
    with pytest.raises(ValueError, match="A cell has .* tokens, but the model has 20 positions"):
        GeneBertModel(config)(**batch)
    for wrong, said in (
        ({"value_embedding": "hard_bins"}, "value_embedding must be False or True or 'soft_bins'"),
        ({"norm_type": "batch_norm"}, "norm_type must be 'layer_norm' or 'rms_norm'"),
        ({"position_embedding_type": "absolute"}, "'none' or 'learned' or 'rotary'"),
        ({"position_embedding_type": "rotary", "hidden_size": 6, "num_attention_heads": 2}, "even size"),
        ({"loss_weights": {"cell_type": 2.0}}, "loss_weights has unknown classes cell_type; token_classes are genes"),
        ({"class_weights": [1.0, 2.0, 3.0]}, "3 class_weights for 2 labels"),
    ):
        with pytest.raises(ValueError, match=said):
            GeneBertConfig(**wrong)


def test_a_rank_model_has_learned_positions_unless_told_otherwise():
    tokenizer = GeneTokenizer(GENES, scheme="rank", medians=np.ones(60), max_length=50, add_cls=False)
    config = GeneBertConfig.from_tokenizer(tokenizer, size="tiny")
    assert (config.position_embedding_type, config.max_position_embeddings) == ("learned", 50)
    assert config.classifier_pooling == "mean"
    ids = torch.tensor([[5, 6, 7], [7, 6, 5]])
    types = torch.ones_like(ids)

    def gene_5(**options):
        torch.manual_seed(0)
        config = GeneBertConfig.from_tokenizer(tokenizer, size="tiny", **options)
        with torch.no_grad():
            hidden = GeneBertModel(config).eval()(input_ids=ids, token_type_ids=types).last_hidden_state
        return (hidden[0, 0] - hidden[1, 2]).abs().max().item()

    assert gene_5() > 0.1
    assert gene_5(position_embedding_type="none") < 1e-5


# ---------------------------------------------------------------------- losses


def labelled_batch():
    tokenizer, config = make("pre_norm")
    counts, obs = cells()
    tokens = tokenizer(counts, obs=obs)
    examples = [dict(zip(tokens, one, strict=True)) for one in zip(*tokens.values(), strict=True)]
    collator = DataCollatorForPhenotypicMLM(tokenizer, mlm_probability=0.5, phenotype_mask_prob=0.9)
    return config, collator(examples)


@pytest.mark.parametrize("sparse", [True, False])
def test_losses_are_weighted_and_reported_a_class_of_tokens(sparse):
    config, batch = labelled_batch()
    assert config.token_classes == ["t", "genes"]
    model = GeneBertForPhenotypicMLM(config).eval()
    config.loss_weights, config.label_smoothing = {"t": 3.0}, 0.1
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    with torch.no_grad():
        log_p = model(**inputs).logits.double().log_softmax(-1)
    with torch.no_grad():
        outputs = model(**batch, sparse_prediction=sparse)
    total, expected = 0.0, torch.zeros(2, 3, dtype=torch.float64)
    for row, column in (batch["labels"] != -100).nonzero().tolist():
        label, here = batch["labels"][row, column], log_p[row, column]
        of = 0 if batch["token_type_ids"][row, column] == 1 else 1
        total += (3.0 if of == 0 else 1.0) * (-0.9 * here[label] - 0.1 * here.mean())
        expected[of] += torch.tensor([-here[label], here.argmax() == label, 1])
    assert expected[:, 2].min() > 0
    torch.testing.assert_close(outputs.class_statistics.double(), expected, atol=1e-4, rtol=1e-5)
    assert outputs.loss.item() == pytest.approx(total.item() / expected[:, 2].sum().item(), rel=1e-5)


def test_class_weights_regression_and_several_labels_per_cell():
    tokenizer, config = make("pre_norm")
    counts, obs = cells()
    batch = dict(tokenizer(counts, obs=obs, padding=True, return_tensors="pt"))

    def loss_and_logits(labels, **settings):
        for name, value in settings.items():
            setattr(config, name, value)
        torch.manual_seed(1)
        model = GeneBertForClassification(config).eval()
        with torch.no_grad():
            outputs = model(**batch, labels=labels)
            half = model(**batch, labels=labels, num_items_in_batch=2 * labels.numel()).loss
        assert half.item() == pytest.approx(outputs.loss.item() / 2, rel=1e-6)
        return outputs.loss.item(), outputs.logits.double()

    classes = torch.tensor([0, 1, 2, 0, 1, 2])
    weights = [0.5, 1.0, 4.0]
    loss, logits = loss_and_logits(classes, num_labels=3, class_weights=weights)
    nll = -logits.log_softmax(-1)[range(6), classes]
    assert loss == pytest.approx((nll * torch.tensor(weights)[classes]).mean().item(), rel=1e-5)
    several = torch.randint(0, 2, (6, 3)).float()
    loss, logits = loss_and_logits(several, problem_type="multi_label_classification")
    p = logits.sigmoid()
    bce = -(several * p.log() + (1 - several) * (1 - p).log()) * torch.tensor(weights)
    assert loss == pytest.approx(bce.mean().item(), rel=1e-5)
    numbers = torch.randn(6)
    loss, logits = loss_and_logits(numbers, problem_type="regression", num_labels=1, class_weights=None)
    assert loss == pytest.approx((logits[:, 0] - numbers).square().mean().item(), rel=1e-5)
    with pytest.raises(ValueError, match="must be integers, got labels of torch.float32"):
        loss_and_logits(numbers, problem_type="single_label_classification", num_labels=3)


@pytest.mark.parametrize("packing", [False, True])
def test_a_label_a_gene(packing, tmp_path):
    tokenizer, config = make("pre_norm", num_labels=3)
    counts, obs = cells()
    tokens = tokenizer(counts, obs=obs)
    rng = np.random.default_rng(0)
    examples = [
        {
            "input_ids": ids,
            "token_type_ids": types,
            "labels": [int(rng.integers(3)) if of >= 2 and rng.random() < 0.5 else -100 for of in types],
        }
        for ids, types in zip(tokens["input_ids"], tokens["token_type_ids"], strict=True)
    ]
    GeneBertForTokenClassification(config).save_pretrained(tmp_path)
    model = AutoModelForTokenClassification.from_pretrained(tmp_path).eval()
    assert type(model) is GeneBertForTokenClassification
    batch = collate_fn_wrapper(tokenizer, packing=packing)(examples)
    if not packing:
        stock = DataCollatorForTokenClassification(tokenizer)(examples)
        assert {name: tensor.tolist() for name, tensor in stock.items()} == {
            name: tensor.tolist() for name, tensor in batch.items()
        }
    with torch.no_grad():
        outputs = model(**batch)
        hidden = [
            model.gene_bert(
                input_ids=torch.tensor([one["input_ids"]]), token_type_ids=torch.tensor([one["token_type_ids"]])
            ).last_hidden_state[0]
            for one in examples
        ]
        log_p = model.classifier(torch.cat(hidden)).double().log_softmax(-1)
    labels = torch.tensor(sum((one["labels"] for one in examples), []))
    known = labels != -100
    assert outputs.loss.item() == pytest.approx(-log_p[known, labels[known]].mean().item(), rel=1e-5)


def test_rms_norm_in_autocast_is_that_of_float32_within_rounding(recwarn):
    """Without a warning that torch leaves its fused kernel; in float32, without the change of a bit."""
    norm, plain = make_norm(GeneBertConfig(hidden_size=36, norm_type="rms_norm")), torch.nn.RMSNorm(36, eps=1e-12)
    with torch.no_grad():
        norm.weight.normal_()
    plain.load_state_dict(norm.state_dict())
    states = torch.randn(50, 36) * 3
    assert torch.equal(norm(states), plain(states))
    torch.set_warn_always(True)  # not once per process
    with torch.autocast("cpu", torch.bfloat16):
        found = norm(states.bfloat16())
    torch.set_warn_always(False)
    assert found.dtype == torch.bfloat16 and not recwarn.list
    torch.testing.assert_close(found.float(), plain(states.bfloat16().float()), atol=1e-6, rtol=2**-6)
    found.float().sum().backward()
    assert norm.weight.grad.dtype == torch.float32


def test_rotated_queries_and_keys_are_in_half_precision_in_autocast():
    """As values are: flash attention needs it."""
    found = []

    def attention(module, query, key, value, attention_mask, **kwargs):
        found.append({query.dtype, key.dtype, value.dtype})
        return query.transpose(1, 2), None

    AttentionInterface.register("attention_of_the_test", attention)
    tokenizer, config = make("rotary")
    model = GeneBertModel(config)
    model.config._attn_implementation = "attention_of_the_test"
    tokens = tokenizer(cells()[0], obs=cells()[1], padding=True, return_tensors="pt")
    with torch.autocast("cpu", torch.bfloat16):
        model(**{name: tokens[name] for name in ("input_ids", "token_type_ids")})
    assert found == [{torch.bfloat16}] * len(model.layers)


def test_fields_given_to_from_pretrained_are_checked_as_those_of_the_constructor(tmp_path):
    fields = {"hidden_size": 16, "num_attention_heads": 2, "cell_embedding": True, "num_genes": 9, "wide_head": True}
    GeneBertConfig(**fields).save_pretrained(tmp_path)
    for given in (
        {"cls_state": "gatd"},
        {"norm_type": "batch_norm"},
        {"temperature": 0.0},
        {"class_weights": [1.0, 2.0, 3.0]},
        {"loss_weights": {"gene": 2.0}},
        {"cell_embedding": False},
        {"num_attention_heads": 3},
    ):
        with pytest.raises(ValueError) as wanted:
            GeneBertConfig(**{**fields, **given})
        with pytest.raises(ValueError) as found:
            AutoConfig.from_pretrained(tmp_path, **given)
        assert str(found.value) == str(wanted.value)
    together = {"cell_embedding": False, "wide_head": False, "cls_state": "layers"}  # valid together alone
    config, unused = AutoConfig.from_pretrained(tmp_path, **together, other=1, return_unused_kwargs=True)
    assert (config.cell_embedding, config.cls_state, unused) == (False, "layers", {"other": 1})
    assert AutoConfig.from_pretrained(tmp_path, dtype="auto").hidden_size == 16
    CellNeighborhoodConfig(n_genes=3, n_cell_types=2).save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path, dtype="auto").n_genes == 3
    with pytest.raises(ValueError, match="likelihood must be"):
        AutoConfig.from_pretrained(tmp_path, likelihood="poisson")


@pytest.mark.parametrize("names", [{"id2label": {0: "T", 1: "B"}}, {"label2id": {"T": 0, "B": 1}}], ids=str)
def test_names_in_one_direction_are_names_in_both(names, tmp_path):
    GeneBertConfig(id2label={0: "B", 1: "T"}, label2id={"B": 0, "T": 1}).save_pretrained(tmp_path)
    for config in (AutoConfig.from_pretrained(tmp_path, **names), GeneBertConfig(**names)):
        assert (config.id2label, config.label2id) == ({0: "T", 1: "B"}, {"T": 0, "B": 1})
    with pytest.raises(ValueError, match=r"number the outputs from 0 on, got \[1, 2\]"):  # else label 2 has no output
        GeneBertConfig(label2id={"T": 1, "B": 2})


def test_names_saved_in_one_direction_are_kept():
    config = GeneBertConfig(label2id={"T": 0, "B": 1, "NK": 2}).to_dict()
    del config["id2label"]
    assert GeneBertConfig.from_dict(config, num_labels=3).id2label == {0: "T", 1: "B", 2: "NK"}


@pytest.mark.parametrize("outputs", [{"num_labels": 3}, {"id2label": dict(enumerate("abc"))}], ids=str)
def test_a_head_of_other_outputs_has_no_readers_of_the_saved_one(outputs, tmp_path):
    fields = {"hidden_size": 16, "num_attention_heads": 2, "cell_embedding": True, "num_genes": 9, "wide_head": True}
    of_saved = {"reader_weights": [0.0, 1.5], "temperature": 0.5, "class_weights": [1.0, 3.0]}
    config = GeneBertConfig(**fields, **of_saved)
    GeneBertForClassification(config).save_pretrained(tmp_path)
    found = AutoModelForSequenceClassification.from_pretrained(tmp_path, **outputs, ignore_mismatched_sizes=True)
    defaults = {name: getattr(GeneBertConfig(), name) for name in of_saved}
    assert found.config.num_labels == 3 and {name: getattr(found.config, name) for name in of_saved} == defaults
    given = AutoConfig.from_pretrained(tmp_path, **outputs, temperature=2.0)
    assert (given.temperature, given.reader_weights) == (2.0, None)
    renamed = AutoConfig.from_pretrained(tmp_path, id2label={0: "a", 1: "b"}, label2id={"a": 0, "b": 1})
    assert {name: getattr(renamed, name) for name in of_saved} == of_saved  # the weights are loaded, too
