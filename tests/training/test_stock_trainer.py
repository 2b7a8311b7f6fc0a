"""transformers' own Trainer, collators and torch's own datasets, on the objects of this package."""

import math
import pickle

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import of_epoch
from datasets import Dataset
from torch.utils.data import ConcatDataset, random_split
from transformers import DataCollatorForLanguageModeling, Trainer, TrainingArguments

from stformer_hf import (
    CellStore,
    DataCollatorForCellClassification,
    DataCollatorForPhenotypicMLM,
    GeneBertConfig,
    GeneBertForClassification,
    GeneBertForPhenotypicMLM,
    GeneTokenizer,
    IterableAnnDataset,
)
from stformer_hf.batches.token_rows import TokenRows
from stformer_hf.training.callbacks import SetEpoch


def arguments(folder, **changes) -> TrainingArguments:
    settings = {"max_steps": 3, "save_strategy": "no", "use_cpu": True, "report_to": "none", "disable_tqdm": True}
    return TrainingArguments(str(folder), **{**settings, **changes})


def test_stock_mlm_predictions_meet_their_labels(tmp_path):
    """As transformers' run_mlm.py evaluates: predictions are gathered batch by batch, of all positions."""
    genes = [f"ENSG{i:011d}" for i in range(30)]
    tokenizer = GeneTokenizer(genes, scheme="rank", medians=[1.0] * 30)
    rows = Dataset.from_dict(dict(tokenizer(np.random.default_rng(0).poisson(1.0, (10, 30)).astype("float32"))))
    model = GeneBertForPhenotypicMLM(GeneBertConfig.from_tokenizer(tokenizer, size="tiny"))
    trainer = Trainer(
        model,
        arguments(tmp_path, per_device_eval_batch_size=4, seed=0),
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.3),
    )
    batches = []
    trainer.data_collator, collate = (
        lambda examples: batches.append(collate(examples)) or batches[-1],
        (trainer.data_collator),
    )
    output = trainer.predict(rows)
    assert output.predictions.shape == (*output.label_ids.shape, len(tokenizer))
    model.eval()
    first = 0
    for batch in batches:
        labels = batch.pop("labels").numpy()
        n_cells, length = labels.shape
        with torch.no_grad():
            logits = model(**batch).logits.numpy()
        at = labels != -100
        assert at.any()
        np.testing.assert_array_equal(output.label_ids[first : first + n_cells, :length], labels)
        np.testing.assert_allclose(output.predictions[first : first + n_cells, :length][at], logits[at], atol=1e-5)
        first += n_cells
    assert first == 10


# ---------------------------------------------------------------------- stores, and parts and chains of them


class Watch:
    """A collator that keeps what it makes."""

    def __init__(self, collator):
        self.collator, self.batches = collator, []

    def __call__(self, examples):
        self.batches.append(self.collator(examples))
        return dict(self.batches[-1])


def test_masks_of_stock_trainer_are_other_ones_in_each_epoch(store, tokenizer, config, tmp_path):
    """At random, as those of transformers' own collators; with SetEpoch, those of CellTrainer."""
    collator, batches = DataCollatorForPhenotypicMLM(tokenizer, mlm_probability=0.5), {}
    for name, callbacks in (("plain", []), ("set", [SetEpoch(collator)])):
        watch = Watch(collator)
        one_batch = {"per_device_train_batch_size": 60, "train_sampling_strategy": "sequential"}
        args = arguments(tmp_path / name, max_steps=-1, num_train_epochs=3, **one_batch)
        model = GeneBertForPhenotypicMLM(config)
        Trainer(model, args, train_dataset=store, data_collator=watch, callbacks=callbacks).train()
        batches[name] = [batch["labels"] for batch in watch.batches]
    for first, second in ((0, 1), (0, 2), (1, 2)):
        same = (batches["plain"][first] == batches["plain"][second]).all(1)
        assert same.sum() <= 3  # cells of few genes
    for epoch, labels in enumerate(batches["set"]):
        assert torch.equal(labels, of_epoch(collator, epoch)(store.__getitems__(range(60)))["labels"])


@pytest.mark.parametrize("keeps", [True, False])
@pytest.mark.parametrize("kind", ["tokens", "stream"])
def test_stock_trainer_takes_cell_ids_of_tokens_away(adata, store, tokenizer, config, tmp_path, kind, keeps):
    """Unless remove_unused_columns=False; the masks are then those of a checksum of the tokens."""
    rows = store.tokenize(tokenizer, tmp_path / "t") if kind == "tokens" else IterableAnnDataset(adata, tokenizer)
    watch = Watch(DataCollatorForPhenotypicMLM(tokenizer, mlm_probability=0.5))
    settings = {"per_device_train_batch_size": 60, "train_sampling_strategy": "sequential", "max_steps": 1}
    args = arguments(tmp_path / "run", remove_unused_columns=not keeps, **settings)
    model, epochs = GeneBertForPhenotypicMLM(config), [SetEpoch(watch.collator)]
    Trainer(model, args, train_dataset=rows, data_collator=watch, callbacks=epochs).train()
    cells, collator = list(rows), of_epoch(watch.collator, 0)
    of_cells = collator(cells)["labels"]
    of_tokens = collator([{name: cell[name] for name in cell if name != "cell_id"} for cell in cells])["labels"]
    assert torch.equal(watch.batches[0]["labels"], of_cells if keeps else of_tokens)
    assert not torch.equal(of_cells, of_tokens)


def halves(adata, folder):
    """Two stores of the halves of the cells; the second lists its types in another order."""
    first, second = adata[:30].copy(), adata[30:].copy()
    second.obs["cell_type"] = second.obs["cell_type"].cat.reorder_categories(["T cell", "B cell"])
    return [
        CellStore.build(folder / str(i), cells, obs=["cell_type"], report=False)
        for i, cells in enumerate((first, second))
    ]


@pytest.mark.parametrize("kind", ["store", "selection", "random_split", "chain"])
@pytest.mark.parametrize("keeps", [True, False])
def test_stock_trainer_reads_stores(adata, tmp_path, kind, keeps):
    adata.obs["cell_type"] = pd.Categorical(["B cell", "T cell"] * 30, ["B cell", "T cell"])
    store = CellStore.build(tmp_path / "s", adata, obs=["cell_type"], report=False)
    parts = halves(adata, tmp_path)
    dataset = {
        "store": lambda: store,
        "selection": lambda: store.select(range(0, 60, 2)),
        "random_split": lambda: random_split(store, [40, 20], torch.Generator().manual_seed(0))[0],
        "chain": lambda: ConcatDataset(parts),
    }[kind]()
    tokenizer = GeneTokenizer.from_store(store)
    label2id = {"B cell": 0, "T cell": 1}
    model = GeneBertForClassification(GeneBertConfig.from_tokenizer(tokenizer, size="tiny", num_labels=2))
    collate = DataCollatorForCellClassification(tokenizer, "cell_type", label2id=label2id)
    watch = Watch(collate)
    trainer = Trainer(
        model=model,
        args=arguments(tmp_path / "run", max_steps=2, remove_unused_columns=not keeps),
        train_dataset=dataset,
        eval_dataset=dataset,
        data_collator=watch,
    )
    trainer.train()
    assert len(watch.batches) >= 2 and {len(batch["labels"]) for batch in watch.batches[:2]} == {8}
    labels = trainer.predict(dataset).label_ids
    types = adata.obs["cell_type"].to_numpy()
    rows = {"store": range(60), "selection": range(0, 60, 2), "chain": range(60)}.get(kind) or dataset.indices
    np.testing.assert_array_equal(labels, [label2id[types[row]] for row in rows])
    expected = collate(store.__getitems__(list(rows)))
    found = [
        row for batch in watch.batches[len(watch.batches) - math.ceil(len(rows) / 8) :] for row in batch["input_ids"]
    ]
    pad = tokenizer.pad_token_id
    for row, of_store in zip(found, expected["input_ids"], strict=True):
        assert row[row != pad].tolist() == of_store[of_store != pad].tolist()


def test_chains_of_stores_that_differ_are_refused(adata, tmp_path):
    first, second = halves(adata, tmp_path)
    tokenizer = GeneTokenizer.from_store(first)
    chain = ConcatDataset([first, second])
    batch = [chain[29], chain[30]]
    with pytest.raises(ValueError, match="must hold categories or numbers"):  # which name is class 0?
        DataCollatorForCellClassification(tokenizer, "cell_type")(batch)
    fewer = CellStore.build(tmp_path / "fewer", adata[:, 1:].copy(), obs=["cell_type"], report=False)
    without = CellStore.build(tmp_path / "without", adata, report=False)
    for other, words in ((fewer, "differ in their genes"), (without, "differ in their obs columns")):
        with pytest.raises(ValueError, match=f"{words}: merge them"):
            DataCollatorForPhenotypicMLM(tokenizer)([first[0], other[0]])


@pytest.mark.parametrize("n_workers", [0, 1])
@pytest.mark.parametrize("kind", ["store", "tokens"])
def test_a_store_of_other_classes_is_not_numbered_by_its_own_codes(adata, tmp_path, kind, n_workers):
    adata.obs["cell_type"] = pd.Categorical(["B cell", "NK cell", "T cell"] * 20)
    fewer = adata[adata.obs["cell_type"] != "B cell"].copy()
    stores = [
        CellStore.build(tmp_path / name, of, obs=["cell_type"], report=False)
        for name, of in (("all", adata), ("fewer", fewer))
    ]
    tokenizer = GeneTokenizer.from_store(stores[0])
    rows = stores
    if kind == "tokens":
        rows = [TokenRows(of.tokenize(tokenizer, tmp_path / f"{i}", obs=["cell_type"])) for i, of in enumerate(stores)]
    label2id = {"B cell": 0, "NK cell": 1, "T cell": 2}
    model = GeneBertForClassification(
        GeneBertConfig.from_tokenizer(tokenizer, size="tiny", label2id=label2id, id2label=dict(enumerate(label2id)))
    )
    args = arguments(tmp_path / "run", max_steps=1, dataloader_num_workers=n_workers, remove_unused_columns=False)

    def trainer(**settings):
        collate = DataCollatorForCellClassification(tokenizer, "cell_type", **settings)
        return Trainer(model=model, args=args, train_dataset=rows[0], eval_dataset=rows[1], data_collator=collate)

    plain = trainer()
    plain.train()
    assert len(plain.predict(rows[0]).label_ids) == len(rows[0])
    with pytest.raises(ValueError, match=r"'NK cell', 'T cell'; those.*label2id=model.config.label2id"):
        plain.evaluate()
    with pytest.raises(ValueError, match="an earlier batch"):
        plain.data_collator.for_evaluation()(stores[1].__getitems__([0, 1]))
    numbered = trainer(label2id=model.config.label2id)
    numbered.train()
    expected = [label2id[name] for name in fewer.obs["cell_type"]]
    assert numbered.predict(rows[1]).label_ids.tolist() == expected


def test_a_cell_reads_as_a_dictionary_and_travels(store):
    cell = pickle.loads(pickle.dumps(store[7]))
    assert set(cell) >= {"genes", "counts", "cell_id", "obs_name", "cell_type"} and len(cell) == len(dict(cell))
    assert cell["cell_id"] == 7 and cell["genes"].tolist() == store.rows(7).indices.tolist()
    assert cell.batch.gene_ids.tolist() == store.gene_ids.tolist()


@pytest.mark.parametrize("kind", ["masks", "classes"])
def test_stock_trainer_keeps_the_columns_of_whole_cells_and_values(adata, store, tmp_path, kind):
    """They are named in the signatures of the models: it removes all others by default."""
    some = CellStore.build(tmp_path / "some", adata[:, 3:].copy(), obs=["cell_type"], report=False)
    tokenizer = GeneTokenizer.from_store(store, whole_cell=True, values=True, bin_edges=[0.5, 1.5, 3.5])
    rows = some.tokenize(tokenizer, tmp_path / "t", obs=["cell_type"]).rename_column("cell_type", "labels")
    config = GeneBertConfig.from_tokenizer(tokenizer, size="tiny", num_labels=2, wide_head=kind == "classes")
    if kind == "masks":
        model, collator = GeneBertForPhenotypicMLM(config), DataCollatorForPhenotypicMLM(tokenizer, mlm=False)
    else:
        model, collator = GeneBertForClassification(config), DataCollatorForCellClassification(tokenizer)
    watch = Watch(collator)
    one_batch = {"per_device_train_batch_size": 60, "train_sampling_strategy": "sequential", "max_steps": 1}
    Trainer(model, arguments(tmp_path / "run", **one_batch), train_dataset=rows, data_collator=watch).train()
    names = {"expression_values", "cell_genes", "cell_counts", "measured_genes"}
    assert names < watch.batches[0].keys()
    for name, expected in collator(list(rows)).items():
        assert torch.equal(watch.batches[0][name], expected), name


def test_a_column_that_stock_trainer_took_away_is_named(adata, store, tmp_path):
    tokenizer = GeneTokenizer.from_store(store)
    rows = store.tokenize(tokenizer, tmp_path / "t", obs=["cell_type"])
    model = GeneBertForClassification(GeneBertConfig.from_tokenizer(tokenizer, size="tiny", num_labels=3))
    trainer = Trainer(
        model=model,
        args=arguments(tmp_path / "run"),
        train_dataset=rows,
        data_collator=DataCollatorForCellClassification(tokenizer, "cell_type"),
    )
    with pytest.raises(ValueError, match="no 'cell_type'.*remove_unused_columns=False"):
        trainer.train()


def test_a_store_without_a_collator_is_told_which_to_pass(store, tmp_path):
    tokenizer = GeneTokenizer.from_store(store)
    model = GeneBertForPhenotypicMLM(GeneBertConfig.from_tokenizer(tokenizer, size="tiny"))
    trainer = Trainer(model, arguments(tmp_path), train_dataset=store, processing_class=tokenizer)
    with pytest.raises(ValueError, match=r"needs tokens \(input_ids\), but got CellBatch.*data_collator=DataCollator"):
        trainer.train()
    with pytest.raises(ValueError, match=r"needs tokens \(input_ids\), but got genes, counts"):
        tokenizer.pad([{"genes": [1], "counts": [2]}])
