"""CellNeighborhood: against the same model written plainly, masked and packed, saved, loaded and trained."""

import json
import subprocess
import sys

import pytest
import torch
from conftest import checkpoint_activations
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModel, AutoModelForPreTraining, Trainer, TrainingArguments

from stformer_hf.models.cell_neighborhood.configuration_cell_neighborhood import CellNeighborhoodConfig
from stformer_hf.models.cell_neighborhood.count_likelihoods import pearson_r
from stformer_hf.models.cell_neighborhood.modeling_cell_neighborhood import (
    CellNeighborhoodForMaskedCell,
    CellNeighborhoodModel,
)
from stformer_hf.models.cell_neighborhood.sparse_expression import SparseRows, _SparseProduct

G, TYPES, EMBEDDING = 7, 5, 6
LENGTHS = [3, 0, 5, 3, 1, 0, 8]
FORMS = ["masked", "packed"]
ALL_FORMS = [*FORMS, "sparse"]  # packed, with sparse expression
EMBEDDINGS = ["neighborhood_embedding", "typed_neighborhood_embedding"]


def make_config(**kwargs) -> CellNeighborhoodConfig:
    small = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24, "initializer_range": 0.3}
    return CellNeighborhoodConfig.from_size("tiny", **{"n_genes": G, "n_cell_types": TYPES, **small, **kwargs})


def make_model(model_class=CellNeighborhoodForMaskedCell, backend="sdpa", seed=0, **kwargs):
    torch.manual_seed(seed)
    return model_class._from_config(make_config(**kwargs), attn_implementation=backend).eval()


def make_batch(lengths, form, seed=0) -> dict:
    """A random batch in one of its forms, from the definitions of its keys."""
    generator = torch.Generator().manual_seed(seed)
    n, b = sum(lengths), len(lengths)
    batch = {
        "observed_expression": torch.poisson(torch.full((n, G), 2.0), generator=generator),
        "masked_expression": torch.poisson(torch.full((b, G), 2.0), generator=generator),
        "observed_cell_type": torch.randint(TYPES, (n,), generator=generator),
        "masked_cell_type": torch.randint(TYPES, (b,), generator=generator),
        "cell_embeds": torch.randn((n, EMBEDDING), generator=generator),
    }
    of_cell = [i for i, length in enumerate(lengths) for _ in range(length)]
    if form == "sparse":
        expression = batch.pop("observed_expression")
        batch["observed_indptr"] = torch.tensor([0, *(expression > 0).sum(1)]).cumsum(0).to(torch.int32)
        batch["observed_genes"] = expression.nonzero()[:, 1].to(torch.int32)
        batch["observed_values"] = expression[expression > 0]
        batch["n_genes"] = G
    if form != "masked":
        batch["cu_seq_lens"] = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
        batch["seq_idx"] = torch.tensor(of_cell, dtype=torch.int64)
        return batch
    segments = [*of_cell, *range(b), *range(b)]
    full = [[one != other for other in segments] for one in segments]
    pooling = [[j >= n or segments[j] != i for j in range(n + b)] for i in range(b)]
    decoder = [[abs(i - j) != b for j in range(2 * b)] for i in range(2 * b)]
    batch["full_mask"] = torch.tensor(full)
    batch["encoder_mask"] = batch["full_mask"][: n + b, : n + b]
    batch["pooling_mask"] = torch.tensor(pooling)
    batch["decoder_mask"] = torch.tensor(decoder)
    batch["observed_neighboorhood_lens"] = list(lengths)
    batch["bs"] = b
    return batch


def gradients_of(model) -> torch.Tensor:
    return torch.cat([parameter.grad.ravel() for parameter in model.parameters()])


# ---------------------------------------------------------------------- the numbers


def plain_model(model: CellNeighborhoodForMaskedCell, batch: dict, cells: slice, i: int) -> dict:
    """One neighbourhood through the weights of a model, in double precision and without its code."""
    config = model.config
    weights = {name.removeprefix("cell_neighborhood."): w.double() for name, w in model.state_dict().items()}

    def linear(name, x):
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def norm(name, x):
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + config.layer_norm_eps).sqrt()
        return x * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    def attend(name, x, y):
        size = config.hidden_size // config.num_attention_heads
        query, key, value = (linear(f"{name}.{part}_lin", z) for part, z in (("q", x), ("k", y), ("v", y)))
        heads = []
        for h in range(config.num_attention_heads):
            cut = slice(h * size, (h + 1) * size)
            heads.append(torch.softmax(query[:, cut] @ key[:, cut].T / size**0.5, -1) @ value[:, cut])
        return linear(f"{name}.out_lin", torch.cat(heads, -1))

    def transform(name, x):
        return x + linear(f"{name}.lin2", F.gelu(linear(f"{name}.lin1", norm(f"{name}.feed_forward_norm", x))))

    types = weights["tokens.cell_type_embeddings.weight"]
    known = batch["observed_expression"][cells].double().log1p()
    known = linear("tokens.expression.2", F.gelu(linear("tokens.expression.0", known)))
    if config.cell_embedding_size:
        known = known + linear("tokens.cell_embedding", batch["cell_embeds"][cells].double())
    x = torch.cat([types[batch["observed_cell_type"][cells]], known], -1)
    x = torch.cat([x, weights["cls_token"][None]])
    for layer in range(config.encoder_layers):
        y = norm(f"encoder.{layer}.attention_norm", x)
        x = transform(f"encoder.{layer}", x + attend(f"encoder.{layer}.attention", y, y))
    x = norm("encoder_norm", x)
    if len(x) > 1:
        pooled = attend("pooling.attention", weights["pooling.query"][None], x[:-1])[0]
    else:
        pooled = weights["pooling.attention.out_lin.bias"]
    pooled = norm("pooling.norm", x[-1] + pooled)
    masked = torch.cat([types[batch["masked_cell_type"][i]], weights["tokens.masked_expression"]])
    pair = torch.stack([pooled, masked])
    for layer in range(config.decoder_layers):
        y = norm(f"decoder.{layer}.attention_norm", pair)
        swapped = torch.cat([attend(f"decoder.{layer}.attention", y[[j]], y[[1 - j]]) for j in range(2)])
        pair = transform(f"decoder.{layer}", pair + swapped)
    typed = norm("decoder_norm", pair[1])
    mean = linear("count_head.log_mean", typed).exp()
    gate = torch.sigmoid(linear("count_head.gate_logits", typed))
    dispersion = linear("count_head.log_dispersion", typed).exp()
    theta, x = dispersion, batch["masked_expression"][i].double()
    nb = torch.lgamma(x + theta) - torch.lgamma(theta) - torch.lgamma(x + 1)
    nb = nb + theta * torch.log(theta / (theta + mean)) + x * torch.log(mean / (theta + mean))
    likelihood = torch.log(gate * (x == 0) + (1 - gate) * nb.exp())
    return {
        "neighborhood_embedding": pooled,
        "typed_neighborhood_embedding": typed,
        "mean": mean,
        "dispersion": dispersion,
        "gate": gate,
        "expected_counts": mean * (1 - gate),
        "loss": -likelihood.mean(),
    }


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("backend", ["sdpa", "eager"])
@pytest.mark.parametrize("cell_embedding_size", [0, EMBEDDING])
def test_every_output_is_that_of_the_plain_model_on_each_neighborhood_alone(form, backend, cell_embedding_size):
    model = make_model(backend=backend, cell_embedding_size=cell_embedding_size)
    batch = make_batch(LENGTHS, form)
    with torch.no_grad():
        outputs = model(**batch)
    assert model.config._attn_implementation == backend
    ends = torch.tensor(LENGTHS).cumsum(0).tolist()
    plain = [
        plain_model(model, batch, slice(end - n, end), i) for i, (n, end) in enumerate(zip(LENGTHS, ends, strict=True))
    ]
    for name in plain[0]:
        expected = torch.stack([one[name] for one in plain])
        expected = expected.mean() if name == "loss" else expected
        torch.testing.assert_close(outputs[name].double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
@pytest.mark.parametrize("likelihood", ["nb", "zinb"])
@pytest.mark.parametrize("lengths", [LENGTHS, [4], [0], [0, 0, 0], [2, 2, 2], [1, 30, 1]])
def test_packed_and_masked_batches_give_the_same_outputs_and_gradients(backend, likelihood, lengths):
    model, results = make_model(backend=backend, likelihood=likelihood), []
    for form in ALL_FORMS:
        model.zero_grad()
        outputs = model(**make_batch(lengths, form), output_hidden_states=True)
        outputs.loss.backward()
        results.append((outputs, gradients_of(model)))
    (masked, gradients), *others = results
    assert len(masked.hidden_states) == model.config.encoder_layers + 1
    for name in masked:
        assert all(
            torch.isfinite(part).all() for part in (masked[name] if name == "hidden_states" else [masked[name]])
        )
    assert torch.isfinite(gradients).all() and gradients.abs().max() > 1e-3
    for packed, packed_gradients in others:
        assert set(masked) == set(packed)
        for name in masked:
            torch.testing.assert_close(packed[name], masked[name], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(packed_gradients, gradients, atol=1e-5, rtol=1e-5)


@settings(max_examples=15)
@given(st.lists(st.integers(0, 6), min_size=1, max_size=6), st.integers(0, 1000))
def test_any_lengths_packed_equal_masked_and_alone(lengths, seed):
    model = make_model()
    with torch.no_grad():
        masked, packed, sparse = (model(**make_batch(lengths, form, seed)) for form in ALL_FORMS)
        for name in masked:
            torch.testing.assert_close(packed[name], masked[name], atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(sparse[name], masked[name], atol=1e-5, rtol=1e-5)
        batch, start = make_batch(lengths, "packed", seed), 0
        for i, length in enumerate(lengths):
            cells = slice(start, start + length)
            start += length
            alone = {name: batch[name][cells] for name in ("observed_expression", "observed_cell_type")}
            alone |= {name: batch[name][i : i + 1] for name in ("masked_expression", "masked_cell_type")}
            outputs = model(**alone, cu_seq_lens=torch.tensor([0, length], dtype=torch.int32))
            for name in EMBEDDINGS:
                torch.testing.assert_close(outputs[name][0], masked[name][i], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_lonely_cells_get_one_state_of_their_own(form):
    model = make_model()
    with torch.no_grad():
        mixed = model(**make_batch(LENGTHS, form)).neighborhood_embedding
        lonely = model(**make_batch([0, 0, 0], form, seed=1)).neighborhood_embedding
    assert torch.isfinite(mixed).all()
    for state in (mixed[5], *lonely):
        torch.testing.assert_close(state, mixed[1], atol=1e-6, rtol=0)
    assert (mixed[0] - mixed[1]).abs().max() > 0.1


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
def test_wholly_closed_rows_give_no_nan_and_do_not_touch_the_others(backend):
    model, batch = make_model(backend=backend), make_batch(LENGTHS, "masked")
    with torch.no_grad():
        before = model(**batch)
    n, b = sum(LENGTHS), len(LENGTHS)
    closed = {name: batch[name].clone() for name in ("encoder_mask", "pooling_mask", "decoder_mask")}
    last = slice(n - LENGTHS[-1], n)  # the last neighbourhood's cells attend to nothing, and are not pooled
    closed["encoder_mask"][last] = True
    closed["pooling_mask"][-1] = True
    closed["decoder_mask"][[b - 1, 2 * b - 1]] = True
    after = model(**{**batch, **closed})
    after.loss.backward()
    assert torch.isfinite(gradients_of(model)).all()
    for name in (*EMBEDDINGS, "expected_counts", "last_hidden_state"):
        assert torch.isfinite(after[name]).all()
        own = slice(0, n - LENGTHS[-1]) if name == "last_hidden_state" else slice(0, b - 1)
        torch.testing.assert_close(after[name][own], before[name][own], atol=1e-5, rtol=1e-5)
        assert (after[name][own.stop :] - before[name][own.stop :]).abs().max() > 1e-3


@pytest.mark.parametrize("form", FORMS)
def test_the_order_of_cells_carries_no_meaning(form):
    model, batch = make_model(), make_batch([6, 2, 4], form)
    order = torch.tensor([3, 0, 5, 1, 4, 2, 7, 6, 9, 11, 8, 10])
    shuffled = batch | {name: batch[name][order] for name in ("observed_expression", "observed_cell_type")}
    with torch.no_grad():
        before, after = model(**batch), model(**shuffled)
    for name in EMBEDDINGS:
        torch.testing.assert_close(after[name], before[name], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(after.last_hidden_state, before.last_hidden_state[order], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_only_the_typed_embedding_has_seen_the_type_and_none_has_seen_the_counts(form):
    model, batch = make_model(), make_batch(LENGTHS, form)
    other = batch | {"masked_cell_type": (batch["masked_cell_type"] + 1) % TYPES}
    with torch.no_grad():
        outputs, retyped = model(**batch), model(**other)
        recounted = model(**batch | {"masked_expression": batch["masked_expression"] + 1})
        untyped = model.cell_neighborhood(**{k: v for k, v in batch.items() if k != "masked_cell_type"})
    assert torch.equal(outputs.neighborhood_embedding, retyped.neighborhood_embedding)
    assert torch.equal(outputs.neighborhood_embedding, untyped.neighborhood_embedding)
    assert untyped.typed_neighborhood_embedding is None
    moved = (outputs.typed_neighborhood_embedding - retyped.typed_neighborhood_embedding).abs().amax(-1)
    assert (moved > 1e-2).all()
    for name in (*EMBEDDINGS, "expected_counts"):
        assert torch.equal(outputs[name], recounted[name])
    assert recounted.loss != outputs.loss


def test_the_cells_of_a_neighborhood_matter_and_those_of_others_do_not():
    model, batch = make_model(), make_batch(LENGTHS, "packed")
    changed = batch | {"observed_expression": batch["observed_expression"].clone()}
    changed["observed_expression"][4] += 3  # a cell of neighbourhood 2
    with torch.no_grad():
        moved = (model(**batch).neighborhood_embedding - model(**changed).neighborhood_embedding).abs().amax(-1)
    assert moved[2] > 1e-3
    assert moved[[0, 1, 3, 4, 5, 6]].max() < 1e-6


# ---------------------------------------------------------------------- inputs


@pytest.mark.parametrize(("form", "name"), [("packed", "observed_expression"), ("sparse", "observed_values")])
def test_the_model_takes_log1p_or_is_given_it(form, name):
    batch = make_batch(LENGTHS, form)
    logged = batch | {name: batch[name].log1p()}
    with torch.no_grad():
        counts, given = make_model()(**batch), make_model(apply_log1p=False)(**logged)
    torch.testing.assert_close(given.expected_counts, counts.expected_counts)
    torch.testing.assert_close(given.loss, counts.loss)


def test_a_loss_is_the_mean_over_the_cells_of_its_mask():
    model, batch = make_model(), make_batch(LENGTHS, "packed")
    each = [model(**batch, loss_mask=torch.arange(len(LENGTHS)) == i).loss for i in range(len(LENGTHS))]
    chosen = torch.tensor([True, False, True, True, False, False, False])
    torch.testing.assert_close(model(**batch, loss_mask=chosen).loss, torch.stack(each)[chosen].mean())
    torch.testing.assert_close(model(**batch).loss, torch.stack(each).mean())
    assert model(**batch, loss_mask=torch.zeros(len(LENGTHS), dtype=torch.bool)).loss == 0


def test_labels_that_are_no_counts_raise():
    batch = make_batch(LENGTHS, "packed")
    batch["masked_expression"] = batch["masked_expression"].log1p()
    with pytest.raises(ValueError, match="masked_expression holds fractional values.*normalize=None"):
        make_model(apply_log1p=False)(**batch)
    assert make_model()(**batch, return_loss=False).loss is None


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("use_expression", [True, False])
def test_cell_embeddings_are_read_beside_or_in_place_of_expression_and_get_gradients(form, use_expression):
    model = make_model(cell_embedding_size=EMBEDDING, use_expression=use_expression)
    batch = make_batch(LENGTHS, form)
    batch["cell_embeds"].requires_grad_()
    outputs = model(**batch)
    outputs.loss.backward()
    assert (batch["cell_embeds"].grad.abs().amax(-1) > 0).all()
    with torch.no_grad():
        other = model(**batch | {"observed_expression": batch["observed_expression"] + 2})
    assert torch.equal(other.expected_counts, outputs.expected_counts) != use_expression
    if not use_expression:
        batch.pop("observed_expression")
        assert torch.equal(model(**batch).expected_counts, outputs.expected_counts)
    with pytest.raises(ValueError, match="cell_embeds must be a tensor .*cell_embedding_size.*got nothing"):
        model(**{name: value for name, value in batch.items() if name != "cell_embeds"})


def test_batches_that_do_not_fit_raise():
    model = make_model()
    masked, packed, sparse = (make_batch(LENGTHS, form) for form in ALL_FORMS)

    def without(batch, *names):
        return {name: value for name, value in batch.items() if name not in names}

    cases = [
        (masked | packed, "neither, both or only a part"),
        (without(packed, "cu_seq_lens"), "neither, both or only a part"),
        (without(masked, "pooling_mask"), "neither, both or only a part"),
        (packed | {"cu_seq_lens": packed["cu_seq_lens"][:-1]}, "has 6 neighbourhoods, .* add up to 12 cells"),
        (packed | {"observed_neighboorhood_lens": [*LENGTHS[:-1], 7]}, "the batch has 20 cells"),
        (packed | {"observed_neighboorhood_lens": LENGTHS[::-1]}, "increase by the lengths"),
        (packed | {"cu_seq_lens": packed["cu_seq_lens"] + 1}, "begin with 0"),
        (packed | {"masked_cell_type": packed["masked_cell_type"][:3]}, "3 masked cells for 7 neighbourhoods"),
        (packed | {"observed_expression": packed["observed_expression"][:, :5]}, r"\(20, 7\).*got \(20, 5\)"),
        (packed | sparse, "either observed_expression or observed_values"),
        (without(sparse, "observed_genes"), r"tensors \(21,\), \(E,\) and .* got \(21,\), nothing, "),
        (sparse | {"observed_indptr": sparse["observed_indptr"][1:]}, r"\(21,\), .* for 20 cells, got \(20,\)"),
        (sparse | {"observed_genes": sparse["observed_genes"][1:]}, "observed_genes and observed_values must be"),
        (sparse | {"observed_indptr": sparse["observed_indptr"] - 1}, "observed_indptr ends at .*cannot be split"),
        (sparse | {"n_genes": 8}, "observed cells have 8 genes, but the model has 7"),
        (packed | {"masked_expression": packed["masked_expression"][:, :5]}, r"\(7, 7\), got \(7, 5\)"),
        (packed | {"observed_cell_type": packed["observed_cell_type"] + 1}, "observed_cell_type holds types from"),
        (packed | {"masked_cell_type": packed["masked_cell_type"] - 1}, "masked_cell_type holds types from -1"),
        (without(packed, "masked_cell_type"), "masked_cell_type is missing"),
        (without(packed, "observed_cell_type"), "observed_cell_type is missing"),
        (masked | {"encoder_mask": masked["full_mask"]}, r"encoder_mask must be a bool tensor \(27, 27\).*\(34, 34\)"),
        (masked | {"decoder_mask": masked["decoder_mask"].float()}, "decoder_mask must be a bool.*float32"),
        (packed | {"output_attentions": True}, "Attentions need a batch with masks"),
        (make_batch([], "packed") | {"masked_cell_type": torch.zeros(0, dtype=torch.long)}, "no neighbourhoods"),
    ]
    for batch, message in cases:
        with pytest.raises(ValueError, match=message):
            model(**batch)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"likelihood": "poisson"}, '"nb" or "zinb", got \'poisson\''),
        ({"hidden_size": 15}, "even and a multiple"),
        ({"hidden_size": 18, "num_attention_heads": 4}, "even and a multiple"),
        ({"n_genes": 0}, "n_genes must be at least 1, got 0"),
        ({"use_expression": False}, "or both"),
        ({"gene_ids": ["a"]}, "1 gene_ids, but the model has 7"),
        ({"n_cell_types": "many"}, "n_cell_types"),
    ],
)
def test_bad_settings_raise(fields, message):
    with pytest.raises(Exception, match=message):
        make_config(**fields)


def test_sizes():
    with pytest.raises(ValueError, match="tiny, base, got 'huge'"):
        CellNeighborhoodConfig.from_size("huge")
    base = CellNeighborhoodConfig.from_size("base", n_genes=500, n_cell_types=338)
    paper = (384, 8, 4, 4, "zinb")
    for config in (base, CellNeighborhoodConfig()):
        shape = (config.hidden_size, config.num_attention_heads, config.encoder_layers, config.decoder_layers)
        assert (*shape, config.likelihood) == paper
    assert (base.n_genes, base.n_cell_types, base.num_hidden_layers) == (500, 338, 4)


# ---------------------------------------------------------------------- attentions, memory, precision


def test_attentions_on_request_are_those_of_the_masks():
    model, batch = make_model(backend="eager"), make_batch(LENGTHS, "masked")
    with torch.no_grad():
        attentions = model(**batch, output_attentions=True).attentions
    assert len(attentions) == model.config.encoder_layers
    tokens = sum(LENGTHS) + len(LENGTHS)
    for attention in attentions:
        assert attention.shape == (2, tokens, tokens)
        assert attention[:, batch["encoder_mask"]].abs().max() == 0
        torch.testing.assert_close(attention.sum(-1), torch.ones(2, tokens))
    with pytest.raises(ValueError, match="set_attn_implementation"):
        make_model()(**batch, output_attentions=True)


def test_gradients_reach_the_attentions():
    model, batch = make_model(backend="eager"), make_batch(LENGTHS, "masked")
    outputs = model(**batch, output_attentions=True)
    for attention in outputs.attentions:
        attention.retain_grad()
    outputs.neighborhood_embedding.pow(2).sum().backward()
    for attention in outputs.attentions:
        assert attention.grad is not None and attention.grad.abs().max() > 0


class LargestTensor(TorchDispatchMode):
    """Records the number of values of the largest tensor that is made."""

    largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.numel())
        return result


def test_the_memory_of_a_packed_batch_grows_with_its_cells_alone():
    model = make_model()
    largest = []
    for times in (1, 8):
        batch = make_batch([3, 0, 5, 8, 12] * 20 * times, "packed")
        with LargestTensor() as recorder:
            model(**batch).loss.backward()
        largest.append(recorder.largest)
    assert largest[0] < largest[1] <= 8 * largest[0]


def test_sparse_expression_is_never_dense_and_sums_in_float32():
    model = make_model(n_genes=3000)
    expression = torch.zeros(400, 3000)
    expression[:, ::100] = torch.poisson(torch.full((400, 30), 300.0))
    rows = SparseRows(torch.arange(0, 12_001, 30).int(), torch.arange(0, 3000, 100).int().repeat(400), torch.empty(0))
    rows = rows._replace(values=expression[:, ::100].reshape(-1))
    assert torch.equal(rows.to_dense(3000), expression)
    types, tokens = torch.zeros(400, dtype=torch.long), model.cell_neighborhood.tokens
    first = tokens.expression[0]
    with torch.autocast("cpu", torch.bfloat16), LargestTensor() as recorder:
        tokens(types, rows, None).sum().backward()
    assert recorder.largest < expression.numel() / 10
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(first(rows), (first.double()(expression.double())).float(), atol=1e-2, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_gradients_of_the_sparse_product_are_the_numeric_ones(dtype):
    table, values = (torch.rand(shape, dtype=torch.float64).requires_grad_() for shape in ((6, 3), (5,)))
    indptr, genes = (torch.tensor(part, dtype=dtype) for part in ([0, 2, 2, 5], [1, 4, 0, 5, 4]))

    def product(table, values):
        return _SparseProduct.apply(table, indptr, genes, values)

    torch.testing.assert_close(product(table, values), SparseRows(indptr, genes, values).to_dense(6) @ table)
    assert torch.autograd.gradcheck(product, (table, values))


def test_tokens_of_sparse_expression_compile_whole_and_once():
    model, counter = make_model(), CompileCounterWithBackend("aot_eager")
    tokens = model.cell_neighborhood.tokens
    compiled, counts = torch.compile(tokens, fullgraph=True, dynamic=True, backend=counter), []
    for lengths in (LENGTHS, [4, 9], [30]):
        batch, found = make_batch(lengths, "sparse"), []
        rows = SparseRows(*(batch[f"observed_{name}"] for name in SparseRows._fields))
        for of in (tokens, compiled):
            model.zero_grad()
            of(batch["observed_cell_type"], rows, None).square().sum().backward()
            found.append([parameter.grad for parameter in tokens.parameters() if parameter.grad is not None])
        torch.testing.assert_close(*found, atol=1e-4, rtol=1e-4)
        counts.append(counter.frame_count)
    assert counts[0] == counts[-1]


def test_adapters_of_the_first_layer_read_sparse_expression_too():
    peft = pytest.importorskip("peft")
    settings = peft.LoraConfig(target_modules=["expression.0"], r=2, init_lora_weights=False)
    model = peft.get_peft_model(make_model(), settings)
    with torch.no_grad():
        packed, sparse = (model(**make_batch(LENGTHS, form)) for form in ALL_FORMS[1:])
    torch.testing.assert_close(sparse.expected_counts, packed.expected_counts)


class OnlyLinear(torch.Tensor):
    """A weight that has products with dense matrices alone, as those of torchao."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func in (torch.Tensor.t, F.embedding_bag):
            raise NotImplementedError(func.__name__)
        return super().__torch_function__(func, types, args, kwargs)


def test_quantised_weights_read_sparse_expression_too():
    model = make_model()
    first = model.cell_neighborhood.tokens.expression[0]
    first.weight = torch.nn.Parameter(first.weight.detach().as_subclass(OnlyLinear))
    with torch.no_grad():
        packed, sparse = (model(**make_batch(LENGTHS, form)) for form in ALL_FORMS[1:])
    torch.testing.assert_close(sparse.expected_counts, packed.expected_counts)


@pytest.mark.parametrize("form", ALL_FORMS)
def test_half_precision_stays_near_and_trains(form):
    batch = make_batch(LENGTHS, form)
    whole = make_model(CellNeighborhoodForMaskedCell, initializer_range=0.05)
    with torch.no_grad():
        expected = whole(**batch)
    half = make_model(CellNeighborhoodForMaskedCell, initializer_range=0.05).to(torch.bfloat16)
    outputs = half(**batch)
    outputs.loss.backward()
    assert outputs.neighborhood_embedding.dtype == torch.bfloat16
    assert outputs.loss.dtype == outputs.expected_counts.dtype == torch.float32
    assert outputs.loss.item() == pytest.approx(expected.loss.item(), abs=0.02)
    torch.testing.assert_close(outputs.expected_counts, expected.expected_counts, rtol=0.05, atol=0.05)
    assert torch.isfinite(gradients_of(half)).all()
    with torch.autocast("cpu", torch.bfloat16):
        mixed = whole(**batch)
    mixed.loss.backward()
    assert mixed.loss.item() == pytest.approx(expected.loss.item(), abs=0.02)
    assert torch.isfinite(gradients_of(whole)).all()


# ---------------------------------------------------------------------- training


@pytest.mark.parametrize("form", ALL_FORMS)
@pytest.mark.parametrize("lengths", [LENGTHS, [0, 0], [4]])
def test_every_parameter_gets_a_gradient(form, lengths):
    model = make_model(cell_embedding_size=EMBEDDING)
    model(**make_batch(lengths, form)).loss.backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


@pytest.mark.parametrize("form", ALL_FORMS)
@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_changes_nothing(form, reentrant):
    model, batch, results = make_model().train(), make_batch(LENGTHS, form), []
    for checkpointing in (False, True):
        if checkpointing:
            checkpoint_activations(model)({"use_reentrant": reentrant})
            assert model.cell_neighborhood.encoder[0].gradient_checkpointing
        model.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        results.append((loss, gradients_of(model)))
    torch.testing.assert_close(results[1], results[0], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("dropout", ["hidden_dropout_prob", "attention_probs_dropout_prob"])
def test_each_dropout_is_there_in_training(dropout):
    model, batch = make_model(**{dropout: 0.5}).train(), make_batch(LENGTHS, "packed")
    assert not torch.equal(model(**batch).expected_counts, model(**batch).expected_counts)
    model.eval()
    assert torch.equal(model(**batch).expected_counts, model(**batch).expected_counts)


@pytest.mark.parametrize("likelihood", [pytest.param("nb", marks=pytest.mark.slow), "zinb"])
def test_training_learns_what_the_neighbors_tell(likelihood):
    """The counts of a masked cell are those of its neighbours, and its type tells nothing."""
    batch = make_batch([4] * 16, "packed", seed=3)
    generator = torch.Generator().manual_seed(0)
    programs = torch.poisson(torch.full((16, G), 0.6), generator=generator) * 12
    batch["masked_expression"] = programs
    batch["observed_expression"] = programs.repeat_interleave(4, 0)
    batch["masked_cell_type"][:] = 0
    torch.manual_seed(0)
    config = CellNeighborhoodConfig.from_size("tiny", n_genes=G, n_cell_types=TYPES, likelihood=likelihood)
    model = CellNeighborhoodForMaskedCell(config).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(100):
        optimizer.zero_grad()
        outputs = model(**batch)
        outputs.loss.backward()
        optimizer.step()
        losses.append(outputs.loss.item())
    r = pearson_r(outputs.expected_counts.detach(), programs)
    assert losses[-1] < 0.6 * losses[0]
    assert r.nanmean() > 0.95
    # Without its neighbours a cell cannot be told from another.
    lonely = make_batch([0] * 16, "packed") | {name: batch[name] for name in ("masked_expression", "masked_cell_type")}
    with torch.no_grad():
        assert model(**lonely).loss > 1.5 * losses[-1]


def test_trainer_trains_and_evaluates_it(tmp_path):
    model = make_model()
    before = model.count_head.log_mean.weight.detach().clone()
    metrics = []

    def compute_metrics(prediction):
        metrics.append(pearson_r(*map(torch.as_tensor, (prediction.predictions, prediction.label_ids))))
        return {"pearson": metrics[-1].nanmean().item()}

    arguments = TrainingArguments(
        tmp_path,
        max_steps=3,
        report_to="none",
        use_cpu=True,
        remove_unused_columns=False,
        per_device_train_batch_size=4,
        per_device_eval_batch_size=8,
        label_names=["masked_expression"],
        disable_tqdm=True,
    )
    trainer = Trainer(
        model,
        arguments,
        train_dataset=[3, 0, 2, 5, 1, 0, 0, 9],
        eval_dataset=[3, 0, 2, 5, 1, 0, 0, 9],
        data_collator=lambda lengths: make_batch(lengths, "packed"),
        compute_metrics=compute_metrics,
    )
    trainer.train()
    assert not torch.equal(model.count_head.log_mean.weight, before)
    evaluated = trainer.evaluate()
    with torch.no_grad():
        expected = model.eval()(**make_batch([3, 0, 2, 5, 1, 0, 0, 9], "packed"))
    assert evaluated["eval_loss"] == pytest.approx(expected.loss.item(), abs=1e-5)
    assert metrics[0].shape == (8,) and -1 <= evaluated["eval_pearson"] <= 1
    arguments.label_names = None  # also without being told where the labels are
    trainer = Trainer(model, arguments, eval_dataset=[3, 0, 2, 5, 1, 0, 0, 9], data_collator=trainer.data_collator)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected.loss.item(), abs=1e-5)


# ---------------------------------------------------------------------- checkpoints


def test_auto_classes_load_what_was_saved(tmp_path):
    model = make_model(gene_ids=[f"g{i}" for i in range(G)], cell_types=[f"t{i}" for i in range(TYPES)])
    model.save_pretrained(tmp_path)
    names = {"configuration_cell_neighborhood.py", "modeling_cell_neighborhood.py", "count_likelihoods.py"}
    names |= {"neighborhood_attention.py", "sparse_expression.py"}
    assert {path.name for path in tmp_path.glob("*.py")} == names
    config = AutoConfig.from_pretrained(tmp_path)
    assert type(config) is CellNeighborhoodConfig
    assert config.gene_ids == [f"g{i}" for i in range(G)]
    assert set(config.auto_map) == {"AutoConfig", "AutoModel", "AutoModelForPreTraining"}
    loaded = AutoModelForPreTraining.from_pretrained(tmp_path).eval()
    assert type(loaded) is CellNeighborhoodForMaskedCell
    encoder, told = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert type(encoder) is CellNeighborhoodModel
    assert not told["missing_keys"] and not told["unexpected_keys"]
    batch = make_batch(LENGTHS, "packed")
    with torch.no_grad():
        expected = model(**batch)
        torch.testing.assert_close(loaded(**batch).loss, expected.loss)
        for name in EMBEDDINGS:
            torch.testing.assert_close(encoder.eval()(**batch)[name], expected[name])


def test_a_head_that_is_missing_is_told_and_made(tmp_path):
    make_model(CellNeighborhoodModel).save_pretrained(tmp_path)
    model, told = CellNeighborhoodForMaskedCell.from_pretrained(tmp_path, output_loading_info=True)
    assert {key.split(".")[0] for key in told["missing_keys"]} == {"count_head"}
    assert torch.isfinite(model(**make_batch(LENGTHS, "packed")).loss)


def test_every_parameter_is_initialised():
    """Learnt vectors are made empty: what is not initialised is whatever the memory held."""
    config = make_config(initializer_range=0.5)
    model = CellNeighborhoodForMaskedCell(config)
    encoder = model.cell_neighborhood
    for vector in (encoder.cls_token, encoder.pooling.query, encoder.tokens.masked_expression):
        assert 0.15 < vector.std() < 1
        torch.nn.init.constant_(vector, 1e9)
    model.apply(lambda module: setattr(module, "_is_hf_initialized", False))
    model.init_weights()
    for vector in (encoder.cls_token, encoder.pooling.query, encoder.tokens.masked_expression):
        assert vector.abs().max() < 5


PROCESS = """
import json, sys

class NoPlugin:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "stformer_hf":
            raise ModuleNotFoundError("the plugin is not installed here")

sys.meta_path.insert(0, NoPlugin())
import torch
from transformers import AutoConfig, AutoModel, AutoModelForPreTraining

path = sys.argv[1]
assert AutoConfig.from_pretrained(path, trust_remote_code=True).model_type == "cell_neighborhood"
batch = torch.load(path + "/batch.pt", weights_only=True)
results = []
with torch.no_grad():
    for auto in (AutoModel, AutoModelForPreTraining):
        outputs = auto.from_pretrained(path, trust_remote_code=True).eval()(**batch)
        results.append(outputs["typed_neighborhood_embedding"].double().tolist())
assert "stformer_hf" not in sys.modules
print(json.dumps([*results, outputs.loss.item()]))
"""


@pytest.mark.slow  # several seconds
def test_a_checkpoint_gives_the_same_numbers_without_the_plugin(tmp_path):
    model, batch = make_model(), make_batch(LENGTHS, "packed")
    model.save_pretrained(tmp_path / "checkpoint")
    torch.save(batch, tmp_path / "checkpoint" / "batch.pt")
    environment = {"PATH": "", "HF_HOME": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1", "HOME": str(tmp_path)}
    process = subprocess.run(
        [sys.executable, "-c", PROCESS, str(tmp_path / "checkpoint")], capture_output=True, text=True, env=environment
    )
    assert process.returncode == 0, process.stderr
    encoded, with_head, loss = json.loads(process.stdout.splitlines()[-1])
    with torch.no_grad():
        expected = model(**batch)
    for result in (encoded, with_head):
        torch.testing.assert_close(
            torch.tensor(result), expected.typed_neighborhood_embedding, atol=1e-6, rtol=1e-6, check_dtype=False
        )
    assert loss == pytest.approx(expected.loss.item(), abs=1e-6)
