"""Masking of ranked genes: rates, what may stand in the place of a gene, and what the masks depend on."""

import numpy as np
import pytest
import torch
from conftest import make_adata, of_epoch
from scipy import stats
from torch.utils.data import DataLoader
from transformers import DataCollatorForLanguageModeling

from stformer_hf import (
    CellStore,
    DataCollatorForGeneRankMLM,
    DataCollatorForPhenotypicMLM,
    GeneBertConfig,
    GeneBertForPhenotypicMLM,
    GeneTokenizer,
    collate_fn_wrapper,
)
from tests.batches.test_collators import within


def tokenizer_of(store, **kwargs):
    medians = np.random.default_rng(0).lognormal(0, 1, len(store.gene_ids))
    return GeneTokenizer.from_store(store, scheme="rank", medians=medians, phenotypes=["cell_type"], **kwargs)


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """2,500 cells of 200 genes, more than 100,000 tokens; a store and its tokenizer."""
    adata = make_adata(2500, 200, seed=1, density=0.5)
    store = CellStore.build(tmp_path_factory.mktemp("many") / "store", adata, obs=["cell_type"])
    return store, tokenizer_of(store)


def test_rates_and_replacements(many):
    store, tokenizer = many
    cells = store.__getitems__(range(len(store)))
    plain = collate_fn_wrapper(tokenizer)(cells)
    batch = DataCollatorForGeneRankMLM(tokenizer, mlm_probability=0.2, phenotype_mask_prob=0.4, seed=3)(cells)
    before, after, labels = plain["input_ids"], batch["input_ids"], batch["labels"]
    gene = tokenizer.get_gene_tokens_mask(before)
    chosen = gene & (labels != -100)
    assert gene.sum() > 100_000
    assert within(chosen.sum(), gene.sum(), 0.2)
    assert torch.equal(labels[chosen], before[chosen])
    masked = chosen & (after == tokenizer.mask_token_id)
    kept = chosen & (after == before)
    replaced = chosen & ~masked & ~kept
    n_genes = len(tokenizer.genes)
    assert within(masked.sum(), chosen.sum(), 0.8)
    # A random gene is the gene itself now and then.
    assert within(kept.sum(), chosen.sum(), 0.1 + 0.1 / n_genes)
    assert within(replaced.sum(), chosen.sum(), 0.1 * (1 - 1 / n_genes))
    assert tokenizer.get_gene_tokens_mask(after[replaced]).all()
    counts = torch.bincount(after[replaced], minlength=len(tokenizer))[tokenizer.gene_token_ids].numpy()
    assert stats.chisquare(counts).pvalue > 1e-4

    phenotype = tokenizer.get_phenotypic_tokens_mask(before)
    hidden = phenotype & (after == tokenizer.mask_token_id)
    dropped = phenotype & (after == tokenizer.pad_token_id)
    assert within((hidden | dropped).sum(), phenotype.sum(), 0.4)
    assert within(dropped.sum(), (hidden | dropped).sum(), 0.1)
    assert torch.equal(labels[hidden], before[hidden])
    assert (batch["attention_mask"][dropped] == 0).all() and (batch["token_type_ids"][dropped] == 0).all()
    # All else is as it was: special tokens are neither chosen nor changed.
    rest = ~chosen & ~hidden & ~dropped
    assert torch.equal(after[rest], before[rest]) and (labels[rest] == -100).all()
    kept_types = ~dropped
    assert torch.equal(batch["token_type_ids"][kept_types], plain["token_type_ids"][kept_types])


def by_cell(batches):
    """Unpadded ids and labels of every cell, in order."""
    cells = []
    for batch in batches:
        rows = zip(batch["input_ids"], batch["labels"], batch["attention_mask"].bool(), strict=True)
        cells += [(ids[attended].tolist(), labels[attended].tolist()) for ids, labels, attended in rows]
    return cells


@pytest.mark.parametrize("n_workers", [0, 1, 3])
def test_masks_are_a_function_of_seed_epoch_and_cell(store, n_workers):
    tokenizer = tokenizer_of(store)
    collator = of_epoch(DataCollatorForGeneRankMLM(tokenizer, seed=5, gene_dropout=0.1))
    expected = by_cell([collator(store.__getitems__([i])) for i in range(len(store))])
    loader = DataLoader(store, 7, collate_fn=collator, num_workers=n_workers)
    assert by_cell(loader) == expected
    if n_workers == 0:
        collator.set_epoch(1)
        assert by_cell(loader) != expected
        evaluated = by_cell(DataLoader(store, 7, collate_fn=collator.for_evaluation()))
        assert sum(len(ids) for ids, _ in evaluated) > sum(len(ids) for ids, _ in expected)  # no gene is left out
        other = of_epoch(DataCollatorForGeneRankMLM(tokenizer, seed=6, gene_dropout=0.1))
        assert by_cell(DataLoader(store, 7, collate_fn=other)) != expected


def test_a_packed_row_holds_the_attended_tokens(store):
    tokenizer = tokenizer_of(store)
    settings = {"phenotype_mask_prob": 1.0, "seed": 1, "mlm_probability": 0.4}
    padded = of_epoch(DataCollatorForGeneRankMLM(tokenizer, **settings))(store.__getitems__(range(30)))
    packed = of_epoch(DataCollatorForGeneRankMLM(tokenizer, packing=True, **settings))(store.__getitems__(range(30)))
    attended = padded["attention_mask"].bool()
    assert (padded["input_ids"] == tokenizer.pad_token_id)[:, 1].any()
    for name in ("input_ids", "token_type_ids", "labels"):
        assert torch.equal(packed[name][0], padded[name][attended])
    torch.manual_seed(0)
    config = GeneBertConfig.from_tokenizer(tokenizer, size="tiny", hidden_dropout_prob=0.0)
    model = GeneBertForPhenotypicMLM(config)
    assert config.position_embedding_type == "learned"
    torch.testing.assert_close(model(**packed).loss, model(**padded).loss, atol=1e-5, rtol=0)


def test_a_gene_of_cell_and_neighbourhood_is_chosen_apart_in_each(many):
    store, _ = many
    counts = store.rows(range(400))
    tokenizer = GeneTokenizer(store.gene_ids, scheme="rank", medians=np.ones(200), neighborhood=True)
    tokens = tokenizer(counts, neighborhood=counts)
    examples = [dict(zip(tokens, one, strict=True)) for one in zip(*tokens.values(), strict=True)]
    labels = DataCollatorForGeneRankMLM(tokenizer, mlm_probability=0.5)(examples)["labels"]
    first = second = both = total = 0
    for example, of in zip(examples, labels.tolist(), strict=True):
        n = example["input_ids"].index(tokenizer.sep_token_id)
        cell, around = of[1:n], of[n + 1 : 2 * n]
        first += sum(a != -100 for a in cell)
        second += sum(b != -100 for b in around)
        both += sum(a != -100 and b != -100 for a, b in zip(cell, around, strict=True))
        total += len(cell)
        assert of[n] == -100
    assert within(first, total, 0.5) and within(second, total, 0.5) and within(both, total, 0.25)


def test_no_genes_no_labels_no_error():
    tokenizer = GeneTokenizer(["a", "b"], scheme="rank", medians=[1.0, 2.0])
    batch = DataCollatorForGeneRankMLM(tokenizer)([{"input_ids": [0, 1], "token_type_ids": [0, 0]}])
    assert batch["labels"].tolist() == [[-100, -100]]


@pytest.mark.parametrize("scheme", ["binned", "rank"])
def test_the_stock_collator_takes_our_tokens(store, scheme):
    tokenizer = tokenizer_of(store) if scheme == "rank" else GeneTokenizer.from_store(store, phenotypes=["cell_type"])
    tokens = tokenizer(store.rows(range(20)), obs={"cell_type": ["B cell"] * 20})
    examples = [dict(zip(tokens, one, strict=True)) for one in zip(*tokens.values(), strict=True)]
    torch.manual_seed(0)
    batch = DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.3)(examples)
    plain = collate_fn_wrapper(tokenizer)(examples)
    assert torch.equal(batch["token_type_ids"], plain["token_type_ids"])
    special = tokenizer.get_special_tokens_mask(plain["input_ids"], already_has_special_tokens=True)
    assert (batch["labels"][special] == -100).all()
    model = GeneBertForPhenotypicMLM(GeneBertConfig.from_tokenizer(tokenizer, size="tiny"))
    assert model(**batch).loss.isfinite()


def test_the_wrong_scheme_and_probability_are_told(store, tokenizer):
    with pytest.raises(ValueError, match="use DataCollatorForPhenotypicMLM"):
        DataCollatorForGeneRankMLM(tokenizer)
    ranks = tokenizer_of(store)
    with pytest.raises(ValueError, match="use DataCollatorForGeneRankMLM"):
        DataCollatorForPhenotypicMLM(ranks)
    with pytest.raises(ValueError, match="mlm_probability must be a probability, got 15"):
        DataCollatorForGeneRankMLM(ranks, mlm_probability=15)
