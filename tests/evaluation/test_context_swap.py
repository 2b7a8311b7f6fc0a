"""Swapped contexts against a plain loop; models that read their context, and models that do not."""

import numpy as np
import pandas as pd
import pytest
import torch
from anndata import AnnData
from conftest import of_epoch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from scipy import sparse
from transformers import TrainingArguments

from stformer_hf import (
    CellStore,
    DataCollatorForGeneRankMLM,
    DataCollatorForPhenotypicMLM,
    GeneBertConfig,
    GeneBertForPhenotypicMLM,
    GeneTokenizer,
    STFormerPretrainer,
)
from stformer_hf.evaluation import context_swap as swaps
from stformer_hf.evaluation.context_swap import context_swap
from stformer_hf.evaluation.metrics import masked_nll


def rank_tokenizer(n_genes: int, **kwargs) -> GeneTokenizer:
    medians = np.random.default_rng(0).lognormal(0, 1, n_genes)
    return GeneTokenizer([f"g{i}" for i in range(n_genes)], scheme="rank", medians=medians, **kwargs)


def partners(lengths) -> list[int]:
    """Cells two by two in the order of their lengths; the last of an odd number takes the one before it."""
    order = sorted(range(len(lengths)), key=lambda cell: lengths[cell])
    of = {}
    for place, cell in enumerate(order):
        other = place + 1 if place % 2 == 0 else place - 1
        of[cell] = order[other if other < len(order) else place - 1]
    return [of[cell] for cell in range(len(lengths))]


def plain_ranks(batch, cells, tokenizer):
    """The swap, token by token: ids in the other context, whether attended to, whether scored."""
    genes = set(tokenizer.gene_token_ids.tolist())
    other_of = partners([len(cell["input_ids"]) for cell in cells])
    ids, attended, scored = (batch["input_ids"].tolist() for _ in range(3))
    for i, cell in enumerate(cells):
        other = cells[other_of[i]]
        theirs = {}
        for token, kind in zip(other["input_ids"], other["token_type_ids"], strict=True):
            if token in genes:
                theirs.setdefault(kind, []).append(token)
        rank, shown, chosen = {}, set(), {}
        for at in range(len(ids[i])):
            here = ids[i][at]
            attended[i][at] = int(here != tokenizer.pad_token_id)
            kind = cell["token_type_ids"][at] if at < len(cell["input_ids"]) else 0
            if at < len(cell["input_ids"]) and cell["input_ids"][at] in genes:
                r = rank[kind] = rank.get(kind, -1) + 1
                inside = r < len(theirs.get(kind, []))
                attended[i][at] = int(inside)
                if here == tokenizer.mask_token_id:
                    chosen[at] = (kind, cell["input_ids"][at], inside)
                elif inside:
                    ids[i][at] = theirs[kind][r]
                    shown.add((kind, theirs[kind][r]))
            scored[i][at] = False
        for at, (kind, label, inside) in chosen.items():
            scored[i][at] = inside and (kind, label) not in shown
    return ids, attended, scored


@given(
    st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=2, max_size=6),
    st.booleans(),
    st.integers(0, 1000),
)
def test_swapped_ranks_equal_a_plain_loop(sizes, neighborhood, seed):
    tokenizer = rank_tokenizer(12, neighborhood=neighborhood)
    collator = of_epoch(DataCollatorForGeneRankMLM(tokenizer, mlm_probability=0.4, seed=seed))
    rng, cells = np.random.default_rng(seed), []
    for own, around in sizes:
        draw = [rng.permutation(tokenizer.gene_token_ids)[:size].tolist() for size in (own, around)]
        ids, types = [tokenizer.cls_token_id, *draw[0]], [0, *[1] * own]
        if neighborhood:
            ids, types = [*ids, tokenizer.sep_token_id, *draw[1]], [*types, 0, *[2] * around]
        cells.append({"input_ids": [*ids, 1], "token_type_ids": [*types, 0], "cell_id": len(cells)})
    before = collator(cells)
    own, swapped = swaps._own_and_swapped(cells, collator, swaps._swap_ranks)
    ids, attended, scored = plain_ranks(before, cells, tokenizer)
    assert swapped["input_ids"].tolist() == np.where(attended, ids, swapped["input_ids"]).tolist()
    assert own["input_ids"].tolist() == before["input_ids"].tolist()
    labels = np.where(scored, before["labels"], -100).tolist()
    for batch in (own, swapped):
        assert batch["attention_mask"].tolist() == attended
        assert batch["labels"].tolist() == labels


@pytest.mark.parametrize("values", [False, True])
def test_swapped_bins_equal_a_plain_loop(store, values):
    tokenizer = GeneTokenizer.from_store(store, phenotypes=["cell_type"], bin_edges=[0.5, 1.5, 3.5], values=values)
    collator = of_epoch(DataCollatorForPhenotypicMLM(tokenizer, mlm_probability=0.3))
    cells = store.__getitems__([i for i in range(24) if i != 3])  # an odd number
    before, plain = collator(cells), tokenizer(cells)
    own, swapped = swaps._own_and_swapped(cells, collator, swaps._swap_bins)
    lengths = [len(ids) for ids in plain["input_ids"]]
    n_changed = n_hidden = 0
    for i, other in enumerate(partners(lengths)):
        theirs = dict(zip(plain["token_type_ids"][other], plain["input_ids"][other], strict=True))
        for at in range(before["input_ids"].shape[1]):
            token, kind = before["input_ids"][i, at].item(), before["token_type_ids"][i, at].item()
            label, attended = before["labels"][i, at].item(), before["attention_mask"][i, at].item()
            gene = token >= tokenizer.first_bin_id
            if gene and kind in theirs:
                n_changed += theirs[kind] != token
                token = theirs[kind]
            elif gene:
                attended, n_hidden = 0, n_hidden + 1
            if label < tokenizer.first_bin_id:  # phenotypes are not scored
                label = -100
            for batch, expected in ((own, before["input_ids"][i, at]), (swapped, token)):
                assert batch["attention_mask"][i, at] == attended
                assert batch["labels"][i, at] == label
                assert batch["token_type_ids"][i, at] == kind
                assert not attended or batch["input_ids"][i, at] == expected
            if values and gene and attended:
                place = plain["token_type_ids"][other].index(kind)
                assert swapped["expression_values"][i, at] == plain["expression_values"][other][place]
    assert n_changed > 20 and n_hidden > 20


def two_kinds_of_cells(n_cells: int = 120) -> AnnData:
    """Cells whose genes tell of each other: of each kind other genes are on, and each cell is rich or poor."""
    rng = np.random.default_rng(0)
    kinds, rich = rng.integers(0, 2, (2, n_cells))
    on = (rng.random((n_cells, 40)) < 0.8) & ((np.arange(40) % 2) == kinds[:, None])
    counts = on * np.where(rich, 5, 1)[:, None]
    return AnnData(sparse.csr_matrix(counts.astype(np.float32)), var=pd.DataFrame(index=[f"g{i}" for i in range(40)]))


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["rank", "binned"])
def test_a_model_that_reads_has_a_gap_and_a_deaf_one_has_none(tmp_path, scheme):
    store = CellStore.build(tmp_path / "store", two_kinds_of_cells())
    settings = {"medians": np.ones(40)} if scheme == "rank" else {"bin_edges": [0.5, 3]}
    tokenizer = GeneTokenizer.from_store(store, scheme=scheme, **settings)
    torch.manual_seed(0)
    config = GeneBertConfig.from_tokenizer(
        tokenizer, num_hidden_layers=1, num_attention_heads=2, hidden_size=32, intermediate_size=32
    )
    model = GeneBertForPhenotypicMLM(config)
    trainer = STFormerPretrainer(
        TrainingArguments(
            str(tmp_path / "m"),
            num_train_epochs=40,
            per_device_train_batch_size=16,
            learning_rate=3e-3,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            use_cpu=True,
        ),
        store,
        model=model,
        processing_class=tokenizer,
    )
    trainer.train()
    collator = trainer.data_collator
    found = context_swap(model, store, collator)
    assert found["context_swap_gap"] > 0.3
    assert found["context_swap_gap"] == found["swapped_context_nll"] - found["own_context_nll"]
    assert model.training  # as it was
    filled = Dataset.from_dict({**tokenizer(store.__getitems__(range(120))), "cell_id": range(120)})
    assert context_swap(model, filled, collator) == pytest.approx(found, rel=1e-5)
    fewer = context_swap(model, store, collator, max_cells=50, seed=1)
    assert fewer["context_swap_gap"] > 0.2 and fewer != found
    config.sparse_prediction = False  # whole logits, as other models give them
    assert context_swap(model, store, collator) == pytest.approx(found, rel=1e-4)
    for layer in model.gene_bert.layers:
        torch.nn.init.zeros_(layer.attention.out_lin.weight)
        torch.nn.init.zeros_(layer.attention.out_lin.bias)
    deaf = context_swap(model, store, collator)
    assert deaf["context_swap_gap"] == pytest.approx(0, abs=1e-6)
    assert deaf["own_context_nll"] > found["own_context_nll"] + 0.1


def test_there_may_be_nothing_to_swap(store, tmp_path):
    tokenizer = GeneTokenizer.from_store(store)
    model = GeneBertForPhenotypicMLM(GeneBertConfig.from_tokenizer(tokenizer, size="tiny"))
    assert context_swap(model, store, DataCollatorForPhenotypicMLM(tokenizer)) == {}
    with pytest.raises(ValueError, match="needs at least two cells, got 1"):
        context_swap(model, store.select([0]), DataCollatorForPhenotypicMLM(tokenizer))
    tokenizer = GeneTokenizer.from_store(store, bin_edges=[0.5, 1.5])
    model = GeneBertForPhenotypicMLM(GeneBertConfig.from_tokenizer(tokenizer, size="tiny"))
    assert context_swap(model, store, DataCollatorForPhenotypicMLM(tokenizer, mlm_probability=0.0)) == {}


def test_masked_nll_is_the_same_of_whole_and_of_sparse_logits():
    logits = torch.randn(3, 5, 7)
    labels = torch.randint(0, 7, (3, 5))
    labels[logits[..., 0] > 0] = -100
    at = labels != -100
    plain = -logits.double().log_softmax(-1)[at][torch.arange(int(at.sum())), labels[at]]
    for given_ in (logits, logits[at]):
        assert torch.allclose(masked_nll(given_, labels).double(), plain)
