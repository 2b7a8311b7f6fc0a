"""Packed batches against padded ones and against each cell alone."""

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
from stformer_hf.models.gene_bert import packed_attention
from stformer_hf.models.gene_bert.heads import pool

BACKENDS = ["eager", "sdpa", "flex_attention"]


@pytest.fixture(scope="module")
def tokenizer():
    return GeneTokenizer([f"g{i}" for i in range(60)], bin_edges=[1, 2], phenotypes={"t": ["x", "y"]})


@pytest.fixture(scope="module")
def examples(tokenizer):
    """Cells of many lengths, one without counts."""
    rng = np.random.default_rng(0)
    counts = rng.poisson(rng.uniform(0.1, 2, (7, 1)), (7, 60))
    counts[2] = 0
    tokens = tokenizer(counts, obs={"t": ["x", "y", "x", "x", "y", "y", "x"]})
    columns = zip(tokens["input_ids"], tokens["token_type_ids"], strict=True)
    return [
        {"input_ids": ids, "token_type_ids": types, "cell_id": i, "labels": i % 3}
        for i, (ids, types) in enumerate(columns)
    ]


def model_of(model_class, tokenizer, backend):
    torch.manual_seed(0)
    config = GeneBertConfig.from_tokenizer(tokenizer, size="tiny", num_labels=3, classifier_pooling="mean")
    model = model_class(config).eval()
    model.set_attn_implementation(backend)
    return model


@pytest.mark.parametrize("backend", BACKENDS)
def test_loss_logits_and_gradients_are_those_of_the_padded_batch(tokenizer, examples, backend):
    results = []
    for packing in (False, True):
        batch = of_epoch(DataCollatorForPhenotypicMLM(tokenizer, packing=packing, mlm_probability=0.4))(examples)
        model = model_of(GeneBertForPhenotypicMLM, tokenizer, "eager" if not packing else backend)
        if backend == "flex_attention" and packing:  # has no backward on a CPU
            with torch.no_grad():
                output = model(**batch, sparse_prediction=True)
            results.append((output.loss, output.logits, None))
            continue
        output = model(**batch, sparse_prediction=True)
        output.loss.backward()
        results.append((output.loss, output.logits, torch.cat([p.grad.ravel() for p in model.parameters()])))
    (loss, logits, gradients), (packed_loss, packed_logits, packed_gradients) = results
    torch.testing.assert_close(packed_loss, loss, atol=1e-5, rtol=0)
    torch.testing.assert_close(packed_logits, logits, atol=1e-5, rtol=0)
    if packed_gradients is not None:
        torch.testing.assert_close(packed_gradients, gradients, atol=1e-5, rtol=0)


@pytest.mark.parametrize("backend", ["eager", "sdpa"])  # flex is compiled anew for every length
def test_a_cell_is_the_same_alone_and_beside_other_cells(tokenizer, examples, backend):
    model = model_of(GeneBertModel, tokenizer, backend)
    collator = DataCollatorForPhenotypicMLM(tokenizer, mlm=False, packing=True)

    def hidden_of_the_first(cells):
        batch = collator(cells)
        batch.pop("labels")
        with torch.no_grad():
            return model(**batch).last_hidden_state[0, : batch["cu_seq_lens_q"][1]]

    alone = hidden_of_the_first(examples[:1])
    for others in (examples[1:3], examples[4:]):
        torch.testing.assert_close(hidden_of_the_first([examples[0], *others]), alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_classes_are_those_of_the_padded_batch(tokenizer, examples, pooling):
    model = model_of(GeneBertForClassification, tokenizer, "sdpa")
    model.config.classifier_pooling = pooling
    logits = []
    for packing in (False, True):
        with torch.no_grad():
            logits.append(model(**DataCollatorForCellClassification(tokenizer, packing=packing)(examples)).logits)
    torch.testing.assert_close(logits[1], logits[0], atol=1e-5, rtol=0)


def test_dropped_phenotypes_are_no_tokens_of_a_packed_row(tokenizer, examples):
    padded, packed = (
        of_epoch(DataCollatorForPhenotypicMLM(tokenizer, phenotype_mask_prob=1.0, seed=seed, packing=packing))(
            examples * 9
        )
        for seed in [5]
        for packing in (False, True)
    )
    attended = padded["attention_mask"].bool()
    assert (padded["input_ids"][:, 1] == tokenizer.pad_token_id).any()
    for name in ("input_ids", "token_type_ids", "labels"):
        assert packed[name][0].tolist() == padded[name][attended].tolist()
    assert packed["cu_seq_lens_q"].diff().tolist() == attended.sum(1).tolist()
    assert packed["max_length_q"] == attended.sum(1).max()
    assert packed["seq_idx"][0].bincount().tolist() == attended.sum(1).tolist()


def test_what_would_mix_cells_raises(tokenizer, examples):
    batch = DataCollatorForPhenotypicMLM(tokenizer, packing=True)(examples)
    model = model_of(GeneBertForPhenotypicMLM, tokenizer, "sdpa")
    model.config._attn_implementation = "sage_attention"
    with pytest.raises(ValueError, match="would mix the cells"):
        model(**batch)
    model.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match="without cu_seq_lens_q"):
        model(**{name: value for name, value in batch.items() if name != "cu_seq_lens_q"})
    with pytest.raises(ValueError, match="ends at"):
        model(**{**batch, "cu_seq_lens_q": batch["cu_seq_lens_q"][:-1]})
    with pytest.raises(ValueError, match="more than max_tokens=50"):
        DataCollatorForPhenotypicMLM(tokenizer, packing=True, max_tokens=50)(examples)
    with pytest.raises(ValueError, match="not padded"):
        DataCollatorForPhenotypicMLM(tokenizer, packing=True, pad_to_multiple_of=8)


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_half_precision_agrees_padded_and_packed(tokenizer, examples, backend):
    exact = model_of(GeneBertForPhenotypicMLM, tokenizer, "eager")
    model = model_of(GeneBertForPhenotypicMLM, tokenizer, backend).bfloat16()
    wanted = exact(**of_epoch(DataCollatorForPhenotypicMLM(tokenizer, mlm_probability=0.4))(examples)).loss
    hidden = []
    for packing in (False, True):
        batch = of_epoch(DataCollatorForPhenotypicMLM(tokenizer, packing=packing, mlm_probability=0.4))(examples)
        labels = batch.pop("labels")
        with torch.no_grad():
            states = model.gene_bert(**batch).last_hidden_state.float()
            loss = model(**batch, labels=labels).loss
        torch.testing.assert_close(loss.float(), wanted, atol=1e-2, rtol=1e-2)
        hidden.append(states[batch["attention_mask"].bool()] if not packing else states[0])
    # bfloat16 has 8 bits: single values differ by its steps, 2**-7 of those near 2; all together by less.
    difference = (hidden[0] - hidden[1]).norm() / hidden[0].norm()
    assert difference < 1e-2


def test_the_order_of_the_cells_changes_nothing(tokenizer, examples):
    model = model_of(GeneBertForPhenotypicMLM, tokenizer, "sdpa")
    states = {}
    for packing in (False, True):
        for cells in (examples, examples[::-1], examples[3:] + examples[:3]):
            batch = of_epoch(DataCollatorForPhenotypicMLM(tokenizer, packing=packing, mlm_probability=0.4))(cells)
            batch.pop("labels")
            with torch.no_grad():
                hidden = model.gene_bert(**batch).last_hidden_state
            lengths = batch["cu_seq_lens_q"].diff() if packing else batch["attention_mask"].sum(1)
            attended = hidden[0] if packing else hidden[batch["attention_mask"].bool()]
            for cell, found in zip(cells, attended.split(lengths.tolist()), strict=True):
                torch.testing.assert_close(found, states.setdefault(cell["cell_id"], found), atol=1e-5, rtol=0)


class OnGpu(torch.Tensor):
    """A tensor that says that it is on a GPU."""

    is_cuda = True


@pytest.mark.parametrize(
    ("dtype", "dropout", "has_varlen", "capability", "named"),
    [
        (torch.float32, 0.0, True, (9, 0), "needs half precision (bf16=True of TrainingArguments)."),
        (torch.bfloat16, 0.1, True, (9, 0), "needs attention_probs_dropout_prob=0."),
        (torch.float32, 0.1, False, (9, 0), "needs torch 2.10 or later and half precision"),
        (torch.float16, 0.0, True, (7, 5), "needs a GPU of compute capability 8.0 or higher."),
    ],
)
def test_a_call_per_cell_on_a_gpu_is_logged_with_its_remedy(
    dtype, dropout, has_varlen, capability, named, monkeypatch, caplog
):
    monkeypatch.setattr(packed_attention, "HAS_VARLEN", has_varlen)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    packed_attention.logger.warning_once.cache_clear()
    states = torch.zeros(1, 2, 11, 8, dtype=dtype).as_subclass(OnGpu)
    how = {"cu_seq_lens_q": torch.tensor([0, 3, 10, 11], dtype=torch.int32), "max_length_q": 7}
    attended, _ = packed_attention.packed_sdpa_attention_forward(
        torch.nn.Identity(), states, states, states, None, 1.0, dropout, **how
    )
    assert attended.shape == (1, 11, 2, 8)
    assert named in caplog.text


def test_one_call_serves_all_cells_in_half_precision_and_autocast(monkeypatch):
    monkeypatch.setattr(packed_attention, "HAS_VARLEN", True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    states = torch.zeros(1, 2, 11, 8).as_subclass(OnGpu)
    assert packed_attention._varlen_serves(states.bfloat16(), 0.0)
    assert not packed_attention._varlen_serves(states, 0.0)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: kind == "cuda")
    assert packed_attention._varlen_serves(states, 0.0)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("backend", "dtype", "tolerance"),
    [
        *(
            (name, torch.bfloat16, 1e-2)
            for name in ("sdpa", "flex_attention", "flash_attention_2", "flash_attention_3")
        ),
        *((name, torch.float32, 1e-5) for name in ("sdpa", "flex_attention")),
    ],
)
def test_packed_and_padded_agree_on_a_gpu(tokenizer, examples, backend, dtype, tolerance):
    """In half precision sdpa runs `torch.nn.attention.varlen` on packed batches."""
    exact = model_of(GeneBertForPhenotypicMLM, tokenizer, "eager")
    expected = exact(
        **of_epoch(DataCollatorForPhenotypicMLM(tokenizer, mlm_probability=0.4))(examples), sparse_prediction=True
    )
    expected.loss.backward()
    try:
        model = model_of(GeneBertForPhenotypicMLM, tokenizer, backend)
    except ImportError as error:
        pytest.skip(str(error))
    model = model.to("cuda", dtype)
    for packing in (False, True):
        batch = of_epoch(DataCollatorForPhenotypicMLM(tokenizer, packing=packing, mlm_probability=0.4))(examples)
        model.zero_grad()
        sparse = {"sparse_prediction": True}
        found = model(**sparse, **{k: v.to("cuda") if isinstance(v, torch.Tensor) else v for k, v in batch.items()})
        found.loss.backward()
        torch.testing.assert_close(found.loss.float().cpu(), expected.loss, atol=tolerance, rtol=tolerance)
        difference = found.logits.float().cpu() - expected.logits
        assert difference.norm() < 2 * tolerance * expected.logits.norm()
        gradients = [torch.cat([p.grad.float().cpu().ravel() for p in one.parameters()]) for one in (model, exact)]
        assert (gradients[0] - gradients[1]).norm() < 5 * tolerance * gradients[1].norm()


def test_cu_seq_lens_alone_is_enough_and_flash_is_told_all(tokenizer, examples, monkeypatch):
    from transformers import AttentionInterface

    batch = DataCollatorForPhenotypicMLM(tokenizer, packing=True)(examples)
    names = ("input_ids", "token_type_ids", "labels", "cu_seq_lens_q")
    alone = {name: batch[name] for name in names}
    model = model_of(GeneBertForPhenotypicMLM, tokenizer, "sdpa")
    with torch.no_grad():
        torch.testing.assert_close(model(**alone).loss, model(**batch).loss)
    # What a flash backend is given, and needs all of: without one part transformers attends to the whole row.
    told = {}

    def flash(module, query, key, value, attention_mask, **kwargs):
        told.update(kwargs)
        return query.transpose(1, 2), None

    AttentionInterface.register("flash_of_the_test", flash)
    model.config._attn_implementation = "flash_of_the_test"
    model(**alone)
    for name in ("cu_seq_lens_k", "max_length_q", "max_length_k"):
        assert torch.equal(torch.as_tensor(told[name]), torch.as_tensor(batch[name])), name


def test_the_lengths_of_the_cells_are_read_once_for_all_layers(tokenizer, examples, monkeypatch):
    batch = DataCollatorForPhenotypicMLM(tokenizer, packing=True)(examples)
    model, reads = model_of(GeneBertForPhenotypicMLM, tokenizer, "sdpa"), []
    assert model.config.num_hidden_layers > 1
    tolist = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: reads.append(self) or tolist(self))
    model(**batch)
    assert len(reads) == 1


def test_positions_that_begin_anew_need_cu_seq_lens(tokenizer, examples):
    model = model_of(GeneBertForPhenotypicMLM, tokenizer, "sdpa")
    ids = torch.tensor([[0, 5, 6, 0, 5]])
    with pytest.raises(ValueError, match="restart within a row"):
        model(input_ids=ids, token_type_ids=ids, position_ids=torch.tensor([[0, 1, 2, 0, 1]]))


def test_long_cells_are_pooled_in_bfloat16_too():
    """A sum of ones in bfloat16 stops at 256."""
    torch.manual_seed(0)
    lengths = [2000, 700, 1]
    hidden, types = torch.randn(1, 2701, 4) + 1, torch.ones(1, 2701, dtype=torch.long)
    types[0, 5] = 0
    cuts = torch.tensor([0, 2000, 2700, 2701], dtype=torch.int32)
    found = pool(hidden.bfloat16(), types, None, "mean", cuts)
    parts = zip(hidden[0].split(lengths), types[0].split(lengths), strict=True)
    expected = torch.stack([states[of > 0].mean(0) for states, of in parts])
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), expected, atol=2e-2, rtol=1e-2)
    padded = torch.zeros(2, 2000, 4)
    padded[0], padded[1, :700] = hidden[0, :2000], hidden[0, 2000:2700]
    mask = torch.zeros(2, 2000, dtype=torch.bool)
    mask[0], mask[1, :700] = True, True
    of = torch.ones(2, 2000, dtype=torch.long)  # padding of type 1, told apart by the mask alone
    of[0, 5] = 0
    torch.testing.assert_close(pool(padded, of, mask, "mean"), expected[:2])
    torch.testing.assert_close(pool(padded, of, mask, "cls"), padded[:, 0])


def test_the_card_is_asked_while_compiling_too(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))

    @torch.compile(backend="eager", fullgraph=True)
    def recent(x):
        return x + 1 if packed_attention._is_ampere(x.device.index) else x

    assert recent(torch.zeros(2)).tolist() == [1, 1]
