"""Trainers that draw cells by groups or weights: frequencies, steps, resumption, processes, and what is refused."""

import json
import logging

import numpy as np
import pytest
import torch
from conftest import make_adata
from scipy.stats import chisquare
from torch.utils.data import ConcatDataset
from transformers import TrainingArguments

from stformer_hf import (
    CellStore,
    GeneBertConfig,
    GeneBertForPhenotypicMLM,
    GeneTokenizer,
    IterableAnnDataset,
    NeighborhoodTrainer,
    STFormerPretrainer,
    WeightedDraw,
)
from stformer_hf.store.cell_batch import REPEAT
from stformer_hf.training.epoch_choice import _outputs_of_epochs
from stformer_hf.training.finetuning import prepare_classifier
from tests.space.test_neighborhood_trainer import make_model, sampler
from tests.training.test_cell_trainer import SeenCells, losses, make_trainer, tokenized
from tests.training.test_several_processes import finished, run_script

BALANCED = {"by": "cell_type"}


@pytest.fixture
def rare(tmp_path) -> CellStore:
    """60 cells, of which one has no counts, and few are T cells."""
    cells = make_adata()
    types = np.array(["B cell"] * 52 + ["T cell"] * 8, object)
    cells.obs["cell_type"] = types
    cells.obs["quality"] = np.linspace(0, 1, 60)
    return CellStore.build(tmp_path / "rare", cells, obs=["cell_type", "quality"], report=False)


def epochs_of(seen, n_epochs) -> list[list[int]]:
    """The rows of the store that each epoch reads, in its order."""
    n = len(seen.batches) // n_epochs
    return [[cell % REPEAT for batch in seen.batches[i * n : (i + 1) * n] for cell in batch] for i in range(n_epochs)]


@pytest.mark.parametrize("order", ["random", "grouped", "packed"])
def test_types_are_balanced_in_any_order(rare, tokenizer, tmp_path, order):
    trainer = make_trainer(tmp_path / "run", rare, tokenizer, order, sampling=BALANCED, num_train_epochs=4)
    seen = SeenCells(trainer)
    trainer.train()
    assert len(seen.batches) == trainer.state.global_step == trainer.state.max_steps
    cells = trainer.train_dataset
    epochs = epochs_of(seen, 4)
    for epoch, rows in enumerate(epochs):
        drawn = WeightedDraw.from_dataset(cells, **BALANCED)(np.random.default_rng([42, epoch]))
        assert sorted(rows) == sorted(cells.cell_ids[drawn].tolist())
    n_rare = sum(row >= 52 for rows in epochs for row in rows)
    assert chisquare([n_rare, 4 * 59 - n_rare]).pvalue > 1e-3
    # Each time a cell comes in an epoch, it has another id, from which masks are drawn.
    n = len(seen.batches) // 4
    ids = sum(seen.batches[:n], [])
    assert len(set(ids)) == len(ids) == 59 > len(set(epochs[0]))


@pytest.mark.parametrize(
    ("order", "source"), [("random", "store"), pytest.param("packed", "dataset", marks=pytest.mark.slow)]
)
def test_a_run_resumed_is_the_uninterrupted_one(rare, tokenizer, tmp_path, order, source):
    cells, sampling = rare, {**BALANCED, "temperature": 3}
    if source == "dataset":
        cells, sampling = tokenized(rare, tokenizer), {"weights": np.arange(59) % 4}
    settings = {"save_strategy": "steps", "save_steps": 1, "sampling": sampling}
    whole = make_trainer(tmp_path / "run", cells, tokenizer, order, **settings)
    whole_seen = SeenCells(whole)
    whole.train()
    expected, settings["save_strategy"] = losses(whole), "no"
    middle = len(expected) // 2 + 1  # in the second epoch
    for n_workers in (0, 2):
        again = make_trainer(tmp_path / "run", cells, tokenizer, order, **settings, dataloader_num_workers=n_workers)
        seen = SeenCells(again)
        again.train(resume_from_checkpoint=str(tmp_path / "run" / f"checkpoint-{middle}"))
        assert losses(again) == expected
        torch.testing.assert_close(list(again.model.parameters()), list(whole.model.parameters()), rtol=0, atol=0)
        if n_workers == 0:
            assert seen.batches == whole_seen.batches[-len(seen.batches) :] and len(seen.batches) < middle
    for other in ({**sampling, "n_draws": 58}, None):
        resumed = make_trainer(tmp_path / "run", cells, tokenizer, order, **{**settings, "sampling": other})
        with pytest.raises(ValueError, match="sampling was .*checksum .* and is .*be repeated or skipped"):
            resumed.train(resume_from_checkpoint=str(tmp_path / "run" / f"checkpoint-{middle}"))


def test_epochs_can_have_any_number_of_cells_without_replacement(rare, tokenizer, tmp_path, caplog):
    trainer = make_trainer(
        tmp_path / "run", rare, tokenizer, sampling={**BALANCED, "n_draws": 12, "replacement": False}
    )
    seen = SeenCells(trainer)
    with caplog.at_level(logging.INFO, "transformers.trainer"):
        trainer.train()
    assert trainer.state.max_steps == trainer.state.global_step == 2 * 2  # 12 cells in batches of 8
    assert trainer.num_examples(trainer.get_train_dataloader()) == 12
    for rows in epochs_of(seen, 2):
        assert len(set(rows)) == len(rows) == 12
        assert 2 < sum(row >= 52 for row in rows) <= 8  # 1.6 without weights


def test_an_array_of_weights_is_of_the_cells_that_were_passed(rare, tokenizer, tmp_path):
    weights = np.zeros(60)
    weights[[3, 7, 20]] = 1  # cell 3 has no counts, and is left out
    trainer = make_trainer(tmp_path / "run", rare, tokenizer, sampling={"weights": weights}, num_train_epochs=1)
    seen = SeenCells(trainer)
    trainer.train()
    assert set(epochs_of(seen, 1)[0]) == {7, 20}


def test_stores_are_mixed_by_shares(rare, store, tokenizer, tmp_path):
    store = CellStore.build(tmp_path / "second", make_adata(30, seed=2), obs=["cell_type"], report=False)
    rare = CellStore.build(tmp_path / "first", rare, obs=["cell_type"], report=False)
    trainer = make_trainer(
        tmp_path / "run", ConcatDataset([rare, store]), tokenizer, sampling={"shares": {"first": 0.1, "second": 0.9}}
    )
    rows = np.array(list(trainer.get_train_sampler()))
    n_first = int((rows < 59).sum())
    assert chisquare([n_first, len(rows) - n_first], [0.1 * len(rows), 0.9 * len(rows)]).pvalue > 1e-3
    trainer.args.max_steps = 2
    trainer.train()


def test_objectives_fill_batches_from_the_cells_that_are_drawn(rare, tmp_path):
    whole = GeneTokenizer.from_store(rare, bin_edges=[0.5, 1.5], whole_cell=True)
    trainer = make_objectives(tmp_path / "run", rare, whole)
    rows = list(trainer.get_train_sampler())
    drawn = WeightedDraw.from_dataset(trainer.train_dataset, **BALANCED)(np.random.default_rng([42, 0]))
    assert sorted(rows) == sorted(drawn.tolist())
    types = trainer.train_dataset.obs["cell_type"].to_numpy()[rows]
    full = [types[i : i + 8] for i in range(0, len(rows) - 16, 8)]
    assert all(len(set(batch)) == 1 for batch in full)
    trainer.train()
    assert trainer.state.global_step == 1


def make_objectives(folder, cells, tokenizer):
    return STFormerPretrainer(
        TrainingArguments(
            str(folder), max_steps=1, use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True
        ),
        cells,
        model=GeneBertForPhenotypicMLM(GeneBertConfig.from_tokenizer(tokenizer, size="tiny", num_hidden_layers=1)),
        processing_class=tokenizer,
        objectives={"contrast": 1.0},
        batch_key="cell_type",
        sampling=BALANCED,
    )


def test_a_classifier_is_trained_on_the_cells_that_are_drawn(rare, tmp_path):
    arguments = TrainingArguments(str(tmp_path / "run"), use_cpu=True, report_to="none", save_strategy="no")
    labels = rare.obs["cell_type"].cat.codes.to_numpy()[rare.lengths > 0].astype(np.int64)
    options = {"num_train_epochs": 1, "max_length": 8}
    prepared = prepare_classifier(rare, "cell_type", arguments, sampling=BALANCED, **options)
    rows = np.array(list(prepared.trainer(arguments).get_train_sampler()))
    assert chisquare(np.bincount(labels[rows])).pvalue > 1e-3 > chisquare(np.bincount(labels)).pvalue
    # The number of epochs is chosen with the same sampling.
    prepared.sampling = {"by": "donor"}
    with pytest.raises(ValueError, match="no column 'donor'"):
        _outputs_of_epochs(prepared, labels, np.arange(0, 59, 2), np.arange(1, 59, 2), arguments)


def test_neighbourhoods_are_drawn_too(tmp_path):
    cells = sampler()
    arguments = TrainingArguments(str(tmp_path), max_steps=1, report_to="none", use_cpu=True, save_strategy="no")
    weights = np.arange(len(cells)) % 2
    trainer = NeighborhoodTrainer(arguments, cells, model=make_model(), sampling={"weights": weights})
    assert set(trainer.get_train_sampler()) <= set(np.flatnonzero(weights).tolist())
    trainer.train()
    assert trainer.state.global_step == 1


def test_sampling_that_cannot_be_raises_when_the_trainer_is_made(rare, adata, tokenizer, tmp_path):
    stream = IterableAnnDataset(adata, tokenizer)
    for cells, sampling, changes, message in (
        (rare, {"bye": "cell_type"}, {}, "unknown name 'bye'; the closest known one is by"),
        (rare, {"by": "donor"}, {}, "no column 'donor'"),
        (rare, {"weights": [1, 2]}, {}, "2 weights for 60 rows"),
        (rare, {"weights": -np.ones(60)}, {}, "59 of 59 are negative"),
        (rare, {**BALANCED, "shares": {"B cell": 1}}, {}, r"none for T cell \(8 rows\)"),
        (stream, BALANCED, {"max_steps": 2}, "a stream is read in its own order"),
        (stream, {"weights": np.ones(60)}, {"max_steps": 2}, "a stream is read in its own order"),
        (rare, BALANCED, {"train_sampling_strategy": "sequential"}, "leave one out"),
    ):
        with pytest.raises(ValueError, match=message):
            make_trainer(tmp_path / "run", cells, tokenizer, sampling=sampling, **changes)


@pytest.mark.slow
def test_two_processes_draw_what_one_does(store, tmp_path):
    settings = {"order": "balanced", "epochs": 2}
    two = run_script(store, tmp_path / "two", 2, accumulation=1, **settings)
    one = run_script(store, tmp_path / "one", 1, accumulation=2, **settings)
    finished(two), finished(one)
    ranks = [json.loads((tmp_path / "two" / f"seen-{rank}.json").read_text()) for rank in (0, 1)]
    alone = json.loads((tmp_path / "one" / "seen-0.json").read_text())
    assert [rank["world_size"] for rank in ranks] == [2, 2] and alone["world_size"] == 1
    seen = [sorted(sum(sum((rank["batches"] for rank in run), []), [])) for run in (ranks, [alone])]
    assert seen[0] == seen[1] and max(seen[0]) > REPEAT
    np.testing.assert_allclose(ranks[0]["losses"], alone["losses"], atol=1e-5, rtol=0)
