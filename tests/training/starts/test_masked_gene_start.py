"""Starts of masked genes: at the frequencies, and of ranks at what their order and the genes beside them tell."""

import itertools
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from anndata import read_h5ad
from conftest import make_adata, of_epoch
from datasets import Dataset

from stformer_hf import (
    CellStore,
    DataCollatorForGeneRankMLM,
    DataCollatorForPhenotypicMLM,
    GeneBertConfig,
    GeneBertForClassification,
    GeneBertForPhenotypicMLM,
    GeneTokenizer,
    estimate_gene_medians,
)
from stformer_hf.evaluation.gene_baselines import masked_gene_baselines, masked_genes
from stformer_hf.evaluation.metrics import masked_nll
from stformer_hf.models.gene_bert import rank_prior
from stformer_hf.models.gene_bert.rank_prior import LEVEL_UNIT, N_BINS, RankPrior
from stformer_hf.training.extension import extend_vocabulary
from stformer_hf.training.starts.masked_gene_start import start_mlm_bias, start_rank_model


@pytest.fixture
def cells(tmp_path) -> CellStore:
    return CellStore.build(tmp_path / "cells", make_adata(300, 60, seed=1), obs=["cell_type"])


def rank_tokenizer(store: CellStore, **kwargs) -> GeneTokenizer:
    return GeneTokenizer.from_store(store, "rank", medians=estimate_gene_medians(store), **kwargs)


def make_model(tokenizer: GeneTokenizer, **kwargs) -> GeneBertForPhenotypicMLM:
    torch.manual_seed(0)
    small = {"num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 16, "intermediate_size": 32}
    return GeneBertForPhenotypicMLM(GeneBertConfig.from_tokenizer(tokenizer, **small, **kwargs)).eval()


@torch.no_grad()
def genes_nll(model, store, collator) -> float:
    """Mean loss of the masked genes of all cells."""
    batch = collator.for_evaluation()(store.__getitems__(np.flatnonzero(store.lengths > 0)))
    arrays = {name: tensor.numpy() for name, tensor in batch.items()}
    scored = torch.from_numpy(masked_genes(arrays, collator.tokenizer).scored)[batch["labels"] != -100]
    return masked_nll(model(**batch).logits, batch["labels"])[scored].mean().item()


# ---------------------------------------------------------------------- frequencies


def test_a_rank_model_starts_at_the_frequencies_of_genes(cells):
    train, held_out = cells.select(np.arange(200)), cells.select(np.arange(200, 300))
    tokenizer = rank_tokenizer(train)
    collator = DataCollatorForGeneRankMLM(tokenizer)
    model = make_model(tokenizer)
    b1 = masked_gene_baselines(train, held_out, collator)["b1_nll"]
    assert abs(genes_nll(model, held_out, collator) - b1) > 0.02
    start_mlm_bias(model, tokenizer, train)
    assert genes_nll(model, held_out, collator) == pytest.approx(b1, abs=0.01)


def test_a_binned_model_starts_at_the_shares_of_the_labels(cells):
    tokenizer = GeneTokenizer.from_store(cells, bin_edges=[0.5, 1.5, 3.5])
    collator = DataCollatorForPhenotypicMLM(tokenizer, mlm_probability=0.4)
    model = make_model(tokenizer)
    start_mlm_bias(model, tokenizer, cells)
    labels = collator(cells.__getitems__(np.flatnonzero(cells.lengths > 0)))["labels"]
    shares = labels[labels != -100].bincount(minlength=len(tokenizer)) / (labels != -100).sum()
    bins = torch.arange(tokenizer.n_bins) + tokenizer.first_bin_id
    started = model.mlm_head.decoder.bias.softmax(0)
    torch.testing.assert_close(started[bins], shares[bins], atol=0.03, rtol=0)
    entropy = -(shares[bins] * shares[bins].log()).sum().item()
    assert genes_nll(model, cells, collator) == pytest.approx(entropy, abs=0.01)


def test_what_training_adds_has_a_gradient(cells):
    tokenizer = rank_tokenizer(cells)
    model = make_model(tokenizer).train()
    start_rank_model(model, tokenizer, cells)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    batch = DataCollatorForGeneRankMLM(tokenizer)(cells.__getitems__(range(20, 40)))
    for _ in range(2):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    assert model.mlm_head.rank_prior.axes.grad.abs().sum() > 0
    layer = model.gene_bert.layers[0]
    assert layer.attention.q_lin.weight.grad.abs().sum() > 0 and layer.ffn.lin1.weight.grad.abs().sum() > 0


# ---------------------------------------------------------------------- the prior, written out


def plain_side(tokens, levels) -> dict[int, float]:
    """Weights of the last level of tokens, far to near, over all ways to give each a count or to pass it over.

    Levels are those on the left: descending; the key None is that of no level.
    """
    choices = [[None, *levels.get(token, [])] for token in tokens]
    weights = {}
    for path in itertools.product(*choices):
        weight, last = 1.0, None
        for token, choice in zip(tokens, path, strict=True):
            if choice is None:
                weight *= 1 - sum(share for _, share, _ in levels.get(token, [])) + 1e-3
                continue
            level, share, bin_ = choice
            weight *= share * (last is None or last[0] >= level - 10)
            last = choice
        weights[None if last is None else last[2]] = weights.get(None if last is None else last[2], 0) + weight
    total = sum(weights.values())
    return {bin_: weight / total for bin_, weight in weights.items()}


def test_the_prior_equals_a_sum_over_all_counts():
    rng = np.random.default_rng(0)
    n_tokens, known = 12, range(4, 10)  # tokens 10 and 11 have no levels
    rows = [(token, count) for token in known for count in (1, 2, 3)]
    level = [int(np.rint(np.log(count * (0.5 + 0.1 * token)) / LEVEL_UNIT)) for token, count in rows]
    share = rng.dirichlet(np.ones(3), len(known)).ravel() * 0.9
    bins = rng.permutation(N_BINS)[: len(rows)]
    bins = np.sort(bins)[np.argsort(np.argsort(-np.array(level)))]
    axes = rng.normal(size=(n_tokens, 2)) * (np.arange(n_tokens)[:, None] >= 4)
    prior = RankPrior(
        GeneBertConfig(vocab_size=n_tokens, type_vocab_size=2, rank_prior_sizes=[len(rows), n_tokens, 2])
    )
    arrays = {"token": [token for token, _ in rows], "level": level, "bin": bins, "share": share, "axes": axes}
    for name, values in arrays.items():
        getattr(prior, name).data.copy_(torch.as_tensor(values))
    of = {
        token: [(level[i], share[i], int(bins[i])) for i, row in enumerate(rows) if row[0] == token] for token in known
    }

    ids, place = [0, 9, 5, 2, 7, 4, 10, 1], 3
    types = torch.tensor([[0, 1, 1, 1, 1, 1, 1, 0]])
    labelled = torch.tensor([place])
    found = prior(torch.zeros(1, n_tokens), torch.tensor([ids]), types, labelled=labelled)[0]

    turned = {token: [(-lev, sh, bin_) for lev, sh, bin_ in rows_] for token, rows_ in of.items()}
    left, right = plain_side([9, 5], of), plain_side([10, 4, 7], turned)
    likely = np.array(
        [
            sum(weight for bin_, weight in left.items() if bin_ is None or bin_ <= b)
            * sum(weight for bin_, weight in right.items() if bin_ is None or bin_ >= b)
            for b in range(N_BINS)
        ]
    )
    shown = [9, 5, 7, 4]
    point = (axes[shown].sum(0) + axes[10]) / len(shown)
    for token in range(n_tokens):
        levels = of.get(token, [])
        r = sum(sh * likely[bin_] for _, sh, bin_ in levels) / likely.mean() + 1 - sum(sh for _, sh, _ in levels)
        expected = np.log(0.97 * r + 0.03) + np.log(max(1 + axes[token] @ point, 0.05))
        expected += np.log(0.02) * (token in [*shown, 10])
        assert found[token].item() == pytest.approx(expected, abs=2e-4), token


@pytest.mark.parametrize("rows_at_a_time", [pytest.param(3, marks=pytest.mark.slow), 512])
def test_padded_packed_and_all_positions_give_the_same(cells, rows_at_a_time, monkeypatch):
    monkeypatch.setattr(rank_prior, "_PLACES_AT_A_TIME", rows_at_a_time)
    tokenizer = rank_tokenizer(cells, phenotypes=["cell_type"])
    model = make_model(tokenizer)
    start_rank_model(model, tokenizer, cells)
    torch.nn.init.ones_(model.mlm_head.layer_norm.weight)
    examples = cells.__getitems__(range(10, 18))
    padded = of_epoch(DataCollatorForGeneRankMLM(tokenizer, phenotype_mask_prob=1.0))(examples)
    packed = of_epoch(DataCollatorForGeneRankMLM(tokenizer, phenotype_mask_prob=1.0, packing=True))(examples)
    tokenizer.padding_side = "left"
    left = of_epoch(DataCollatorForGeneRankMLM(tokenizer, phenotype_mask_prob=1.0))(examples)
    with torch.no_grad():
        expected = model(**padded, sparse_prediction=True).logits
        assert expected.isfinite().all()
        torch.testing.assert_close(model(**packed, sparse_prediction=True).logits, expected, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(model(**left, sparse_prediction=True).logits, expected, atol=1e-4, rtol=1e-4)
        labels = padded.pop("labels")
        everywhere = model(**padded).logits
        torch.testing.assert_close(everywhere[labels != -100], expected, atol=1e-4, rtol=1e-4)
        model.config.sparse_prediction = False
        torch.testing.assert_close(model(**padded, labels=labels).logits, everywhere)


def test_what_is_not_attended_to_is_not_read_and_phenotypes_are_left_alone(cells):
    tokenizer = rank_tokenizer(cells, phenotypes=["cell_type"])
    model = make_model(tokenizer)
    start_rank_model(model, tokenizer, cells)
    batch = dict(DataCollatorForGeneRankMLM(tokenizer, phenotype_mask_prob=0.0)(cells.__getitems__(range(10, 18))))
    batch.pop("labels")
    hidden = batch["input_ids"].clone()
    batch["attention_mask"][:, 6:9] = 0
    hidden[:, 6:9] = tokenizer.gene_token_ids[7]
    with torch.no_grad():
        logits, other = model(**batch).logits, model(**{**batch, "input_ids": hidden}).logits
        keep = batch["attention_mask"].bool()
        assert torch.equal(logits[keep], other[keep])
        assert not torch.equal(model(**{**batch, "attention_mask": keep | True}).logits[keep], logits[keep])
        batch["input_ids"][:, 1] = tokenizer.mask_token_id  # the phenotype
        at = model(**batch).logits[:, 1]
    bias = model.mlm_head.decoder.bias.expand_as(at)
    torch.testing.assert_close(at, bias, atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="pass input_ids"):
        model(inputs_embeds=torch.zeros(1, 4, 16), token_type_ids=torch.zeros(1, 4, dtype=torch.long))


# ---------------------------------------------------------------------- checkpoints

PROCESS = """
import json, sys

class NoPlugin:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "stformer_hf":
            raise ModuleNotFoundError("the plugin is not installed here")

sys.meta_path.insert(0, NoPlugin())
import torch
from transformers import AutoModelForMaskedLM

batch = torch.load(sys.argv[1], weights_only=True)
model = AutoModelForMaskedLM.from_pretrained(sys.argv[2], trust_remote_code=True).eval()
with torch.no_grad():
    torch.save(model(**batch).logits, sys.argv[3])
assert "stformer_hf" not in sys.modules
"""


@pytest.mark.slow
def test_a_started_model_is_saved_and_runs_without_the_plugin(cells, tmp_path):
    tokenizer = rank_tokenizer(cells)
    model = make_model(tokenizer)
    start_rank_model(model, tokenizer, cells)
    batch = DataCollatorForGeneRankMLM(tokenizer)(cells.__getitems__(range(10, 18)))
    with torch.no_grad():
        expected = model(**batch).logits
    model.save_pretrained(tmp_path / "model")
    loaded = GeneBertForPhenotypicMLM.from_pretrained(tmp_path / "model").eval()
    with torch.no_grad():
        assert torch.equal(loaded(**batch).logits, expected)
        half = GeneBertForPhenotypicMLM.from_pretrained(tmp_path / "model", dtype=torch.bfloat16).eval()
        assert torch.equal(half.mlm_head.rank_prior.level, model.mlm_head.rank_prior.level)
        assert (half(**batch).logits.float() - expected).abs().mean() < 0.03
    _, info = GeneBertForClassification.from_pretrained(tmp_path / "model", num_labels=2, output_loading_info=True)
    assert not [name for name in info["unexpected_keys"] if "rank_prior" in name]

    torch.save(dict(batch), tmp_path / "batch.pt")
    paths = [str(tmp_path / name) for name in ("batch.pt", "model", "logits.pt")]
    environment = {"PATH": "", "HF_HOME": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1", "HOME": str(tmp_path)}
    process = subprocess.run([sys.executable, "-c", PROCESS, *paths], capture_output=True, text=True, env=environment)
    assert process.returncode == 0, process.stderr
    torch.testing.assert_close(torch.load(paths[2], weights_only=True), expected, atol=1e-5, rtol=1e-5)


def test_new_genes_are_neither_near_nor_far(cells):
    tokenizer = rank_tokenizer(cells)
    model = make_model(tokenizer)
    start_rank_model(model, tokenizer, cells)
    batch = DataCollatorForGeneRankMLM(tokenizer)(cells.__getitems__(range(10, 18)))
    with torch.no_grad():
        expected = model(**batch, sparse_prediction=True).logits
        model, extended = extend_vocabulary(model, tokenizer, ["ENSG99999999999"], medians={"ENSG99999999999": 1.0})
        logits = model(**batch, sparse_prediction=True).logits
    torch.testing.assert_close(logits[:, : len(tokenizer)], expected)
    torch.testing.assert_close(logits[:, -1], model.mlm_head.decoder.bias[-1].expand(len(logits)))


def test_models_without_a_start_have_no_prior(cells):
    model = make_model(rank_tokenizer(cells))
    assert model.config.rank_prior_sizes is None
    assert not [name for name in model.state_dict() if "prior" in name]


# ---------------------------------------------------------------------- what cannot be


def test_what_cannot_be_started_is_refused(cells, tmp_path):
    bins = GeneTokenizer.from_store(cells)
    with pytest.raises(ValueError, match="this one has bins"):
        start_rank_model(make_model(bins), bins, cells)
    tokenizer = rank_tokenizer(cells)
    tokens = tokenizer.encode_cells(cells.__getitems__([1, 2]))
    rows = [tokens.input_ids[a:b].tolist() for a, b in itertools.pairwise(tokens.indptr)]
    dataset = Dataset.from_dict({"input_ids": rows, "token_type_ids": [[1] * len(row) for row in rows]})
    with pytest.raises(ValueError, match="pass a CellStore"):
        start_rank_model(make_model(tokenizer), tokenizer, dataset)
    adata = make_adata()
    adata.X = adata.X * 0.5
    with pytest.raises(ValueError, match="fractions"):
        start_rank_model(
            make_model(tokenizer), tokenizer, CellStore.build(tmp_path / "halves", adata, fractional=True)
        )


# ---------------------------------------------------------------------- real cells


@pytest.mark.slow
def test_blood_cells_start_below_the_medians_of_their_neighbours(shared_data, tmp_path):
    adata = read_h5ad(shared_data / "pbmc_ifnb.h5ad")[::13].copy()
    store = CellStore.build(tmp_path / "blood", adata)
    order = np.random.default_rng(0).permutation(len(store))
    train, held_out = store.select(np.sort(order[80:])), store.select(np.sort(order[:80]))
    tokenizer = GeneTokenizer.from_store(store, "rank", medians=estimate_gene_medians(train), max_length=256)
    collator = DataCollatorForGeneRankMLM(tokenizer)
    baselines = masked_gene_baselines(train, held_out, collator)
    model = make_model(tokenizer)
    start_rank_model(model, tokenizer, train)
    nll = genes_nll(model, held_out, collator)
    print(json.dumps({**baselines, "start": nll}))
    assert nll < baselines["b3_nll"] + 0.02
    again = make_model(tokenizer)
    start_rank_model(again, tokenizer, train)
    assert all(
        torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True)
    )
