"""random_split, Subset and ConcatDataset of stores, tokenized cells and neighbourhoods: as the plain cells."""

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import make_adata
from torch.utils.data import ConcatDataset, Subset, random_split
from transformers import TrainingArguments

from stformer_hf import (
    CellStore,
    CellTrainer,
    DataCollatorForCellClassification,
    GeneBertConfig,
    GeneBertForClassification,
    GeneBertForPhenotypicMLM,
    GeneTokenizer,
    IterableAnnDataset,
    STFormerPretrainer,
    finetune,
)
from tests.space.test_neighborhood_trainer import make_trainer, sampler, section

pytestmark = pytest.mark.usefixtures("two_folds")

ROWS = np.random.default_rng(0).permutation(60)[:50]  # one of them, cell 3, has no counts


def put_together(cells):
    """The cells of ROWS, of two parts that are put together, the second one divided once more."""
    second = Subset(Subset(cells, range(20, 60)), range(0, 40))
    return Subset(ConcatDataset([Subset(cells, range(20)), second]), ROWS.tolist())


def arguments(folder, **changes) -> TrainingArguments:
    settings = {"max_steps": 3, "logging_steps": 1, "save_strategy": "no", "report_to": "none", "use_cpu": True}
    return TrainingArguments(str(folder), disable_tqdm=True, **{**settings, **changes})


# ---------------------------------------------------------------------- cells


@pytest.mark.parametrize(
    ("order", "tokenized"),
    [("random", False), ("group_by_length", True), ("group_by_length", False), ("budget", False)],
)
def test_training_and_evaluation_are_those_of_the_plain_cells(store, tokenizer, config, tmp_path, order, tokenized):
    cells = store.tokenize(tokenizer, tmp_path / "tokens") if tokenized else store
    options = {"max_tokens_per_batch": 150} if order == "budget" else {}
    strategy = {"train_sampling_strategy": order} if order == "group_by_length" else {}
    found = []
    for dataset in (cells.select(ROWS), put_together(cells)):
        torch.manual_seed(0)
        trainer = STFormerPretrainer(
            arguments(tmp_path / "run", per_device_train_batch_size=4, **strategy),
            dataset,
            model=GeneBertForPhenotypicMLM(config),
            processing_class=tokenizer,
            eval_dataset=dataset,
            baselines=order == "random" or tokenized,
            **options,
        )
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        metrics = {name: value for name, value in trainer.evaluate().items() if not name.endswith("_second")}
        assert (
            "eval_genes_loss" in metrics and len(trainer.train_dataset) == len(trainer.eval_dataset) == 49 + tokenized
        )
        found.append([*losses, *(metrics[name] for name in sorted(metrics) if name != "eval_runtime")])
    assert len(losses) == 3 and found[0] == pytest.approx(found[1])


def test_finetuning_on_a_part_is_that_on_the_selection(store):
    models = [
        finetune(cells, "cell_type", num_train_epochs=0, max_length=16)
        for cells in (store.select(ROWS), Subset(store, ROWS.tolist()))
    ]
    for one, other in zip(*(model.state_dict().values() for model in models), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_stores_that_do_not_belong_together_are_refused_before_training(adata, store, tokenizer, config, tmp_path):
    fewer = CellStore.build(tmp_path / "fewer", adata[:, 1:].copy(), obs=["cell_type", "age"], report=False)
    without = CellStore.build(tmp_path / "without", adata, obs=["age"], report=False)
    for other, what in ((fewer, "genes"), (without, "obs columns")):
        with pytest.raises(ValueError, match=f"differ in their {what}: merge them"):
            STFormerPretrainer(
                arguments(tmp_path / "run"),
                random_split(ConcatDataset([store, other]), [100, 20])[0],
                model=GeneBertForPhenotypicMLM(config),
                processing_class=tokenizer,
            )


# ---------------------------------------------------------------------- labels


@pytest.fixture
def two_stores(tmp_path):
    """Two stores whose types are in other orders, and of whose clusters one is a category."""
    stores = []
    for seed, types in ((0, ["B cell", "T cell"]), (1, ["T cell", "B cell"])):
        cells = make_adata(seed=seed)
        cells.obs["cell_type"] = cells.obs["cell_type"].cat.reorder_categories(types)
        cells.obs["cluster"] = pd.Categorical(cells.obs["age"]) if seed else cells.obs["age"]
        stores.append(CellStore.build(tmp_path / str(seed), cells, obs=["cell_type", "cluster"], report=False))
    return stores


def classifier(dataset, folder, label="cell_type", numbers=None, tokenizer=None, **head) -> CellTrainer:
    genes = [f"ENSG{i:011d}" for i in range(40)]
    tokenizer = tokenizer or GeneTokenizer(genes, bin_edges=[0.5, 1.5], max_length=50)
    torch.manual_seed(0)
    return CellTrainer(
        model=GeneBertForClassification(GeneBertConfig.from_tokenizer(tokenizer, size="tiny", **head)),
        args=arguments(folder),
        train_dataset=dataset,
        data_collator=DataCollatorForCellClassification(tokenizer, label, label2id=numbers),
        processing_class=tokenizer,
    )


NAMED = {"id2label": {0: "B cell", 1: "T cell"}, "label2id": {"B cell": 0, "T cell": 1}}
UNKNOWN = {"id2label": {0: "B cell", 1: "NK cell"}, "label2id": {"B cell": 0, "NK cell": 1}}


def test_labels_of_stores_that_are_put_together_go_by_name(two_stores, tmp_path):
    chain = ConcatDataset(two_stores)
    with pytest.raises(ValueError, match="in different ways: 'B cell', 'T cell', and 'T cell', 'B cell'.*label2id"):
        classifier(chain, tmp_path, num_labels=2)
    with pytest.raises(ValueError, match="does not know: 'T cell'; the head has 2 classes"):
        classifier(random_split(chain, [60, 60])[0], tmp_path, **UNKNOWN)
    with pytest.raises(ValueError, match="'cluster' holds classes .* in one of the combined datasets, and whole"):
        classifier(chain, tmp_path, "cluster", num_labels=2)
    types = np.concatenate([of.obs["cell_type"].astype(str) for of in two_stores])
    classifier(Subset(chain, np.flatnonzero(types == "B cell")), tmp_path, **UNKNOWN)  # of T cells there is none
    for options in (NAMED, {"num_labels": 2, "numbers": {"B cell": 0, "T cell": 1}}):
        trainer = classifier(chain, tmp_path, **options)
        found = trainer.predict(trainer.train_dataset).label_ids
        names = np.concatenate([of.obs["cell_type"].astype(str)[of.lengths > 0] for of in two_stores])
        assert [NAMED["id2label"][i] for i in found] == list(names)


def test_labels_of_a_stream_are_looked_at_before_training(adata, tmp_path):
    tokenizer = GeneTokenizer(list(adata.var_names), bin_edges=[0.5, 1.5], max_length=50)
    stream = IterableAnnDataset(adata, tokenizer, obs=["cell_type", "age"])
    for label, head, words in (
        ("cell_type", UNKNOWN, r"does not know: 'T cell'; the head has 2 classes \('B cell', 'NK cell'\)"),
        ("cell_type", {"num_labels": 1}, "'cell_type' holds 2 classes .* predicts 1 numbers"),
        ("donor", {"num_labels": 3}, "The stream has no obs column 'donor'; it has cell_type, age. Name it"),
        ("age", {"num_labels": 3}, "'age' goes up to 79, but the head has 3 classes: .*num_labels=80"),
    ):
        with pytest.raises(ValueError, match=words):
            classifier(stream, tmp_path, label, tokenizer=tokenizer, **head)
    trainer = classifier(stream, tmp_path, "age", tokenizer=tokenizer, num_labels=1)
    assert trainer.model.config.problem_type == "regression"


# ---------------------------------------------------------------------- neighbourhoods


@pytest.mark.slow
def test_a_random_split_of_neighbourhoods_is_that_of_their_indices(tmp_path):
    cells = section(40)
    options = {"max_num_cells": 2, "min_neighbors": 1}
    whole = sampler(cells, **options)
    parts = random_split(whole, [len(whole) - 10, 10], torch.Generator().manual_seed(0))
    given = [sampler(cells, indices=whole.indices[np.asarray(part.indices)], **options) for part in parts]
    found = []
    for train, evaluated in (parts, given, [ConcatDataset([part]) for part in parts]):
        trainer = make_trainer(
            tmp_path,
            train,
            eval_dataset=evaluated,
            baselines=not isinstance(train, ConcatDataset),
            train_sampling_strategy="group_by_length",
        )
        before = trainer.evaluate()
        trainer.train()
        found.append([before["eval_loss"], before["eval_pearson_r"], trainer.evaluate()["eval_loss"]])
        found[-1] += [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        assert trainer._order()["neighbourhoods"] == given[0].description
    assert found[0] == pytest.approx(found[1], rel=1e-5) and found[2] == pytest.approx(found[1], rel=1e-5)
    with pytest.raises(ValueError, match="one CenterMaskSampler, but a ConcatDataset combines several"):
        make_trainer(tmp_path, train, baselines=True)
    assert whole.epoch == 0  # each part has its own


def test_parts_of_neighbourhoods_are_compared_with_the_model(tmp_path):
    trainer = make_trainer(tmp_path, Subset(sampler(), range(30)))
    assert (
        trainer.model.config.cell_types == ["0", "1", "2"] and trainer.model.config.neighborhood["patch_size"] == 0.3
    )
    for other in (Subset(sampler(patch_size=0.5), [1]), ConcatDataset([sampler(), sampler(patch_size=0.5)])):
        with pytest.raises(ValueError, match="eval_dataset has other neighbourhoods"):
            make_trainer(tmp_path, None, model=trainer.model, eval_dataset=other)


def test_a_run_is_not_resumed_on_neighbourhoods_of_other_cells(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    make_trainer(tmp_path, sampler(), **settings).train()
    other = make_trainer(tmp_path, sampler(section(seed=1)), **settings)
    with pytest.raises(ValueError, match=r"train_dataset was 40 cells \(checksum .* and is 40 cells"):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
