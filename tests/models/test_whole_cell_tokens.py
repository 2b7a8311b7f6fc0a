"""Counts of whole cells from the tokenizer, from every way in that cells have."""

import json

import numpy as np
import pytest
import torch
from conftest import of_epoch
from datasets import concatenate_datasets, load_from_disk
from scipy import sparse
from transformers import AutoTokenizer, TrainingArguments

from stformer_hf import (
    CellStore,
    DataCollatorForCellClassification,
    DataCollatorForPhenotypicMLM,
    GeneBertConfig,
    GeneBertForClassification,
    GeneBertForPhenotypicMLM,
    GeneTokenizer,
    IterableAnnDataset,
    collate_fn_wrapper,
)
from stformer_hf.batches.collate import pad
from stformer_hf.batches.token_rows import TokenRows
from stformer_hf.training.cell_trainer import CellTrainer
from stformer_hf.training.identity import check_tokenizer_fits
from tests.conftest import make_adata

SCHEMES = {
    "binned": {"bin_edges": [0.5, 1.5]},
    "rank": {"scheme": "rank", "medians": np.arange(1.0, 41)},
    "neighbourhoods": {"scheme": "rank", "medians": np.arange(1.0, 41), "neighborhood": True},
}


def cells_of(encoded, i: int) -> dict[int, float]:
    """Counts of a cell by gene, padding left out."""
    pairs = zip(np.asarray(encoded["cell_genes"][i]).tolist(), np.asarray(encoded["cell_counts"][i]), strict=True)
    return {gene: float(count) for gene, count in pairs if count}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_all_known_genes_are_given_whatever_the_tokens_show(scheme, tmp_path):
    genes = [f"ENSG{i:011d}" for i in range(40)]
    tokenizer = GeneTokenizer(genes, whole_cell=True, max_length=8, **SCHEMES[scheme])
    assert tokenizer.model_input_names[-2:] == ["cell_genes", "cell_counts"]
    counts = make_adata().X
    around = {"neighborhood": counts[::-1]} if scheme == "neighbourhoods" else {}
    lists = tokenizer(counts, **around)
    assert max(map(len, lists["input_ids"])) <= 8
    assert "measured_genes" not in lists
    dense = counts.toarray()
    for i in range(len(dense)):
        expected = {int(g): float(dense[i, g]) for g in np.flatnonzero(dense[i])}
        assert cells_of(lists, i) == expected
        assert lists["cell_genes"][i] == sorted(expected)
    n_genes = int((dense > 0).sum(1).max())
    for kwargs in ({"padding": True}, {"padding": "max_length"}, {"padding": True, "pad_to_multiple_of": 16}):
        tensors = tokenizer(counts, return_tensors="pt", **around, **kwargs)
        assert tensors["cell_genes"].shape == tensors["cell_counts"].shape == (60, n_genes)
        assert (tensors["cell_genes"].dtype, tensors["cell_counts"].dtype) == (torch.int64, torch.float32)
        assert all(cells_of(tensors, i) == cells_of(lists, i) for i in range(60))
        padded = tokenizer(counts, **around, **kwargs)
        assert padded["cell_counts"] == tensors["cell_counts"].tolist()
        if kwargs["padding"] == "max_length":
            assert tensors["input_ids"].shape[1] == 8
    # Cells of one length need no padding, though their numbers of genes differ.
    one_length = [i for i in range(60) if len(lists["input_ids"][i]) == 8][:5]
    if scheme != "neighbourhoods":
        tensors = tokenizer(counts[one_length], return_tensors="np")
        assert [cells_of(tensors, i) for i in range(5)] == [cells_of(lists, i) for i in one_length]
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert (again.whole_cell, again.fingerprint) == (True, tokenizer.fingerprint)
    assert again.model_input_names == tokenizer.model_input_names
    assert again(counts[:5], **{n: m[:5] for n, m in around.items()}).keys() == lists.keys()


def test_columns_of_one_gene_are_summed_and_stored_zeros_left_out():
    tokenizer = GeneTokenizer(["ENSG00000000001", "ENSG00000000002"], whole_cell=True)
    matrix = sparse.csr_matrix((np.array([200, 100, 0], np.uint8), [0, 1, 2], [0, 3]), shape=(1, 3))
    found = tokenizer(matrix, genes=["ENSG00000000002.1", "ENSG00000000002.2", "ENSG00000000001"])
    assert (found["cell_genes"], found["cell_counts"]) == ([[1]], [[300.0]])


def test_measured_genes_are_those_of_the_input():
    genes = [f"ENSG{i:011d}" for i in range(5)]
    tokenizer = GeneTokenizer(genes, whole_cell=True, symbols={"CD3E": genes[3]}, min_coverage=0.0)
    counts = np.ones((2, 3), int)
    for return_tensors in (None, "np"):
        found = tokenizer(counts, genes=[genes[2], "CD3E", "unknown"], padding=True, return_tensors=return_tensors)
        assert np.array_equal(found["measured_genes"], [[False, False, True, True, False]] * 2)
    assert "measured_genes" not in tokenizer(np.ones((2, 5), int))
    without = GeneTokenizer(genes, min_coverage=0.0)(counts, genes=["unknown", *genes[:2]])
    assert not {"cell_genes", "cell_counts", "measured_genes"} & without.keys()


# ---------------------------------------------------------------------- totals


def test_a_normalised_value_does_not_depend_on_columns_that_the_tokenizer_does_not_know():
    adata = make_adata()
    panel = adata[:, 5:20].copy()
    settings = {"normalize": "log1p_cp10k", "values": True, "bin_edges": [1, 7, 7.5, 8, 8.5, 9], "min_coverage": 0.0}
    tokenizer = GeneTokenizer(list(panel.var_names), **settings)
    assert tokenizer.totals == "genes"
    whole, cut = tokenizer(adata), tokenizer(panel)
    for name in ("input_ids", "token_type_ids", "expression_values"):
        assert whole[name] == cut[name]
    dense = panel.X.toarray().astype(float)
    expected = np.log1p(dense[0] / dense[0].sum() * 1e4)
    np.testing.assert_allclose([x for x in cut["expression_values"][0] if x], expected[dense[0] > 0], rtol=1e-6)
    columns = GeneTokenizer(list(panel.var_names), totals="columns", **settings)
    assert columns(adata)["expression_values"] != columns(panel)["expression_values"]
    with pytest.raises(ValueError, match='totals must be "genes" or "columns"'):
        GeneTokenizer(["a"], totals="rows")


# As save_pretrained wrote them before there was a choice of totals, and whole cells.
_OLD = {
    "format_version": 2,
    "max_length": 2048,
    "included_phenotypes": [],
    "truncation": "top",
    "seed": 0,
    "min_coverage": 0.5,
    "scheme": "binned",
    "special_tokens": {"cls_token": "[CLS]", "eos_token": "[EOS]", "mask_token": "[MASK]", "pad_token": "[PAD]"},
    "token_ids": None,
    "phenotypes": {},
    "genes": ["ENSG00000000001", "ENSG00000000002", "ENSG00000000003"],
    "symbols": {},
    "bin_edges": [1.0, 2.0],
    "normalize": "log1p_cp10k",
}


def test_tokenizers_saved_before_keep_their_totals_and_all_old_fingerprints_stay(tmp_path):
    (tmp_path / "gene_vocabulary.json").write_text(json.dumps(_OLD))
    old = GeneTokenizer(vocab_file=tmp_path / "gene_vocabulary.json")
    assert (old.totals, old.whole_cell, old.fingerprint) == ("columns", False, "39280e717dfb51d1")
    old.save_pretrained(tmp_path / "again")
    again = AutoTokenizer.from_pretrained(tmp_path / "again")
    assert (again.totals, again.fingerprint) == ("columns", old.fingerprint)
    genes = _OLD["genes"]
    fingerprints = {
        "bb3e0c63f1b7850a": GeneTokenizer(genes, phenotypes={"t": ["x"]}),
        "39280e717dfb51d1": GeneTokenizer(genes, bin_edges=[1, 2], normalize="log1p_cp10k", totals="columns"),
        "a899268f34f626e1": GeneTokenizer(genes, values=True),
        "9cfbc2761d7a5e62": GeneTokenizer(genes, scheme="rank", medians=[1, 2, 3.5]),
    }
    assert all(tokenizer.fingerprint == known for known, tokenizer in fingerprints.items())
    by_genes = GeneTokenizer(genes, bin_edges=[1, 2], normalize="log1p_cp10k")
    assert by_genes.fingerprint != old.fingerprint
    by_genes.save_pretrained(tmp_path / "genes")
    assert AutoTokenizer.from_pretrained(tmp_path / "genes").totals == "genes"
    assert GeneTokenizer(genes, whole_cell=True).fingerprint != GeneTokenizer(genes).fingerprint


# ---------------------------------------------------------------------- tokenized datasets and streams


def whole_cell_tokenizer(store, lacking: int, **settings) -> GeneTokenizer:
    """Make a tokenizer with some genes that the store does not measure."""
    genes = [*store.gene_ids, *(f"ENSG9{i:010d}" for i in range(lacking))]
    settings = {"bin_edges": [0.5, 1.5], "phenotypes": {"cell_type": ["B cell", "T cell"]}, **settings}
    return GeneTokenizer(genes, whole_cell=True, **{"max_length": 12, "truncation": "head", **settings})


def same(one: dict, two: dict) -> None:
    assert one.keys() == two.keys()
    for name, value in one.items():
        assert torch.equal(torch.as_tensor(value), torch.as_tensor(two[name])), name


@pytest.mark.parametrize("lacking", [0, 3])
def test_a_tokenized_dataset_gives_the_batches_of_the_store(store, tmp_path, lacking):
    tokenizer = whole_cell_tokenizer(store, lacking)
    dataset = store.tokenize(tokenizer, tmp_path / "tokens", obs="cell_type", rows_per_shard=25)
    assert dataset.column_names[:5] == ["input_ids", "token_type_ids", "cell_genes", "cell_counts", "measured_genes"]
    dense = make_adata().X.toarray()
    for i in (0, 3, 26, 59):
        assert cells_of(dataset, i) == {int(g): float(dense[i, g]) for g in np.flatnonzero(dense[i])}
    rows = [7, 3, 40, 59, 1]
    for packing in (False, True):
        collate = DataCollatorForCellClassification(tokenizer_without(tokenizer), "cell_type", packing=packing)
        plain = collate_fn_wrapper(tokenizer, packing=packing)
        tokens = store.tokenize(tokenizer, tmp_path / f"plain{packing}", obs="cell_type")
        batch = collate(store.__getitems__(rows))
        assert ("measured_genes" in batch) == (lacking > 0)
        same(collate(TokenRows(tokens).__getitems__(rows)), batch)
        of_rows = plain([load_from_disk(tmp_path / f"plain{packing}")[row] for row in rows])
        same(of_rows, {name: value for name, value in batch.items() if name != "labels"})


def tokenizer_without(tokenizer):
    tokenizer.included_phenotypes = []
    return tokenizer


def test_tokenized_stores_that_measure_other_genes_in_one_dataset(store, tmp_path):
    tokenizer = tokenizer_without(whole_cell_tokenizer(store, 0))
    whole = store.tokenize(tokenizer, tmp_path / "whole")
    panel = CellStore.build(tmp_path / "panel", make_adata()[:, 10:30].copy())
    cut = panel.tokenize(tokenizer, tmp_path / "cut")
    both = TokenRows(concatenate_datasets([whole, cut]))
    batch = collate_fn_wrapper(tokenizer)([both[0], both[60], both[1]])
    assert batch["measured_genes"].sum(1).tolist() == [40, 20, 40]
    same(batch, pad_of(both.__getitems__([0, 60, 1]), tokenizer))


def pad_of(table, tokenizer):
    from stformer_hf.batches.collate import read_tokens

    return pad(read_tokens(table, tokenizer), tokenizer)


def test_masks_hide_the_same_genes_of_a_tokenized_dataset(store, tmp_path):
    tokenizer = whole_cell_tokenizer(store, 2, max_length=100)
    dataset = TokenRows(store.tokenize(tokenizer, tmp_path / "tokens"))
    collate = of_epoch(DataCollatorForPhenotypicMLM(tokenizer, mlm_probability=0.5, gene_dropout=0.2))
    one, two = collate(store.__getitems__(range(20))), collate(dataset.__getitems__(range(20)))
    same(one, two)
    labelled = one["labels"] != -100
    genes = one["token_type_ids"] - tokenizer.gene_token_type_offset
    assert (one["labels"] == tokenizer.first_bin_id).any()
    for cell in range(20):
        asked = set(genes[cell][labelled[cell] & (genes[cell] >= 0)].tolist())
        assert asked <= set(range(40))  # what is not measured is not swapped in
        counts = one["cell_counts"][cell]
        assert asked <= set(one["cell_genes"][cell][counts < 0].tolist())
        assert not asked & set(one["cell_genes"][cell][counts > 0].tolist())


@pytest.mark.parametrize("lacking", [0, 3])
@pytest.mark.parametrize("workers", [0, 1])
def test_a_stream_gives_the_batches_of_the_store(store, adata, lacking, workers):
    tokenizer = tokenizer_without(whole_cell_tokenizer(store, lacking))
    stream = IterableAnnDataset(adata, tokenizer, obs=["cell_type"])
    collate = DataCollatorForCellClassification(tokenizer, "cell_type")
    loader = torch.utils.data.DataLoader(stream, 16, collate_fn=collate, num_workers=workers)
    for number, batch in enumerate(loader):
        rows = range(16 * number, min(16 * number + 16, 60))
        same(batch, collate(store.__getitems__(rows)))


def test_examples_without_counts_are_refused_by_name(store, tmp_path):
    tokenizer = whole_cell_tokenizer(store, 0)
    without = GeneTokenizer(tokenizer.genes, bin_edges=[0.5, 1.5], phenotypes=tokenizer.phenotypes)
    dataset = TokenRows(store.tokenize(without, tmp_path / "tokens"))
    with pytest.raises(ValueError, match="reads whole cells, but the examples have no cell_genes and cell_counts"):
        collate_fn_wrapper(tokenizer)(dataset.__getitems__([0, 1]))
    lists = tokenizer(store.__getitems__(range(3)))
    with pytest.raises(ValueError, match="cannot handle cell_counts: use DataCollatorForPhenotypicMLM"):
        tokenizer.pad({name: lists[name] for name in lists})


def test_training_is_the_same_from_a_tokenized_dataset(store, tmp_path):
    tokenizer = tokenizer_without(whole_cell_tokenizer(store, 2))
    store = store.select(store.lengths > 0)
    tokens = store.tokenize(tokenizer, tmp_path / "tokens", obs="cell_type")
    losses = []
    for number, data in enumerate((store, tokens)):
        torch.manual_seed(0)
        config = GeneBertConfig.from_tokenizer(tokenizer, "tiny", num_labels=2, wide_head=True)
        arguments = TrainingArguments(
            tmp_path / f"run{number}",
            max_steps=3,
            per_device_train_batch_size=10,
            train_sampling_strategy="sequential",
            logging_steps=1,
            learning_rate=1e-3,
            report_to=[],
            save_strategy="no",
            use_cpu=True,
        )
        trainer = CellTrainer(
            model=GeneBertForClassification(config),
            args=arguments,
            train_dataset=data,
            processing_class=tokenizer,
            data_collator=DataCollatorForCellClassification(tokenizer, "cell_type"),
        )
        trainer.train()
        losses.append([row["loss"] for row in trainer.state.log_history if "loss" in row])
    assert len(losses[0]) == 3
    assert losses[0] == losses[1]


def test_a_trainer_refuses_what_would_cut_packed_batches(store, tmp_path):
    tokenizer = tokenizer_without(whole_cell_tokenizer(store, 0))
    model = GeneBertForClassification(GeneBertConfig.from_tokenizer(tokenizer, "tiny", num_labels=2))
    for name in ("dispatch_batches", "split_batches"):
        arguments = TrainingArguments(tmp_path, report_to=[], use_cpu=True, accelerator_config={name: True})
        settings = {"model": model, "args": arguments, "train_dataset": store, "processing_class": tokenizer}
        with pytest.raises(ValueError, match=f"{name} would split a packed batch"):
            CellTrainer(
                **settings, data_collator=DataCollatorForCellClassification(tokenizer, "cell_type", packing=True)
            )
        CellTrainer(**settings, data_collator=DataCollatorForCellClassification(tokenizer, "cell_type"))


# ---------------------------------------------------------------------- does it fit the model


def test_a_tokenizer_and_a_model_of_which_one_is_for_whole_cells_do_not_fit(store):
    whole, plain = (
        GeneTokenizer(list(store.gene_ids), bin_edges=[0.5, 1.5], whole_cell=whole_cell)
        for whole_cell in (True, False)
    )
    model = GeneBertForPhenotypicMLM(GeneBertConfig.from_tokenizer(whole, "tiny"))
    check_tokenizer_fits(model, whole)
    with pytest.raises(ValueError, match="the tokenizer does not return them: make it with whole_cell=True"):
        check_tokenizer_fits(model, plain)
    reference = GeneBertForPhenotypicMLM(GeneBertConfig.from_tokenizer(plain, "tiny"))
    check_tokenizer_fits(reference, plain)
    with pytest.raises(ValueError, match="returns whole cells .* but the model does not read them"):
        check_tokenizer_fits(reference, whole)
    model.config.num_genes = 39
    with pytest.raises(ValueError, match="40 genes, where the model has 39"):
        check_tokenizer_fits(model, whole)
