"""The order of the cells in training: by length, by a budget of tokens, as a stream, resumed, told to end."""

import json
import os
import signal

import numpy as np
import pytest
import torch
import transformers
from datasets import Dataset
from transformers import BertConfig, BertForMaskedLM, TrainerCallback, TrainingArguments

import stformer_hf as sf
from stformer_hf import (
    GeneBertConfig,
    GeneBertForPhenotypicMLM,
    GeneTokenizer,
    IterableAnnDataset,
    LengthGroupedSampler,
    STFormerPretrainer,
    TokenBudgetBatchSampler,
    padding_share,
    write_example_lengths,
)
from stformer_hf.training.checkpoints import last_whole_checkpoint

ORDERS = {
    "random": {},
    "grouped": {"train_sampling_strategy": "group_by_length"},
    "budget": {"max_tokens_per_batch": 300},
    "packed": {"max_tokens_per_batch": 200, "packing": True},
}


def make_trainer(folder, cells, tokenizer, order="random", model=None, **changes):
    settings = {
        "num_train_epochs": 2,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        **{name: value for name, value in ORDERS[order].items() if name.startswith("train_")},
    }
    own = {name: value for name, value in ORDERS[order].items() if not name.startswith("train_")}
    trainer_settings = {name: changes.pop(name) for name in ("callbacks", "lengths", "sampling") if name in changes}
    if "lengths" in trainer_settings:
        trainer_settings["example_lengths_file"] = trainer_settings.pop("lengths")
    torch.manual_seed(0)
    if model is None:
        model = GeneBertForPhenotypicMLM(GeneBertConfig.from_tokenizer(tokenizer, size="tiny", num_hidden_layers=1))
    return STFormerPretrainer(
        TrainingArguments(str(folder), **{**settings, **changes}),
        cells,
        model=model,
        processing_class=tokenizer,
        **own,
        **trainer_settings,
    )


def tokenized(store, tokenizer) -> Dataset:
    filled = np.flatnonzero(store.lengths > 0)
    cells = store.__getitems__(filled)
    tokens = tokenizer.encode_cells(cells)
    cuts = tokens.indptr.tolist()
    columns = {
        name: [getattr(tokens, name)[a:b] for a, b in zip(cuts, cuts[1:], strict=False)]
        for name in ("input_ids", "token_type_ids")
    }
    return Dataset.from_dict({**columns, "cell_id": filled, "length": np.diff(tokens.indptr)})


def losses(trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


class SeenCells(TrainerCallback):
    """Writes down which cells the collator is given, a list a batch, and for which epoch."""

    def __init__(self, trainer):
        self.batches, self.epochs = [], []
        collator, read = trainer.data_collator, type(trainer.data_collator)._tokens

        def watch(examples):
            tokens, cell_ids = read(collator, examples)
            self.batches.append(cell_ids.tolist())
            self.epochs.append(collator.epoch)
            return tokens, cell_ids

        collator._tokens = watch


def as_source(source, store, adata, tokenizer):
    """The same cells, four ways."""
    if source == "store":
        return store
    if source == "dataset":
        return tokenized(store, tokenizer)
    if source == "rows":
        return tokenized(store, tokenizer).to_iterable_dataset(num_shards=4)
    return IterableAnnDataset([adata[:20], adata[20:35], adata[35:]], tokenizer, shuffle=True, buffer_size=16)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("source", ["store", "dataset"])
def test_every_cell_comes_once_an_epoch_in_another_order_each(store, tokenizer, tmp_path, order, source):
    cells = store if source == "store" else tokenized(store, tokenizer)
    trainer = make_trainer(tmp_path, cells, tokenizer, order, per_device_train_batch_size=3)
    seen = SeenCells(trainer)
    trainer.train()
    filled = sorted(np.flatnonzero(store.lengths > 0).tolist())
    n = len(seen.batches) // 2
    epochs = [sum(part, []) for part in (seen.batches[:n], seen.batches[n:])]
    assert [sorted(epoch) for epoch in epochs] == [filled, filled]
    assert epochs[0] != epochs[1]
    tokens = tokenizer.encode_cells(store.__getitems__(np.arange(len(store))))
    lengths = np.diff(tokens.indptr)
    for batch in seen.batches:
        of = lengths[batch]
        if order == "budget":
            assert len(batch) * of.max() <= 300
        elif order == "packed":
            assert of.sum() <= 200
    if order == "grouped":
        shuffled = np.random.default_rng(0).permutation(filled)
        at_random = [shuffled[i : i + 3].tolist() for i in range(0, len(shuffled), 3)]
        assert padding_share(lengths, seen.batches) < 0.75 * padding_share(lengths, at_random)
        assert max(lengths) in lengths[seen.batches[0]]  # the longest comes first, so that memory fails at once


def test_the_sampler_is_public_and_takes_lengths_from_where_they_are(store, tokenizer, tmp_path):
    trainer = make_trainer(tmp_path, store, tokenizer, "grouped")
    assert isinstance(trainer.get_train_sampler(), LengthGroupedSampler)
    assert isinstance(make_trainer(tmp_path, store, tokenizer, "budget").get_train_sampler(), TokenBudgetBatchSampler)
    dataset = tokenized(store, tokenizer)
    orders = [list(make_trainer(tmp_path, dataset, tokenizer, "grouped").get_train_sampler())]
    lengths = list(dataset["length"])
    write_example_lengths(lengths, tmp_path / "lengths.json")
    bare = dataset.remove_columns("length")
    for given in (lengths, tmp_path / "lengths.json"):
        orders.append(list(make_trainer(tmp_path, bare, tokenizer, "grouped", lengths=given).get_train_sampler()))
    assert orders[0] == orders[1] == orders[2]
    with pytest.raises(ValueError, match="length"):  # never by reading all tokens
        make_trainer(tmp_path, bare, tokenizer, "grouped").get_train_sampler()
    with pytest.raises(ValueError, match="3 lengths for 59 rows"):
        make_trainer(tmp_path, bare, tokenizer, "grouped", lengths=[1, 2, 3]).get_train_sampler()
    with pytest.raises(ValueError, match="use max_tokens_per_batch"):
        make_trainer(tmp_path, store, tokenizer, train_sampling_strategy="batch_rebalance")


@pytest.mark.parametrize(
    ("source", "order"),
    [
        ("store", "random"),
        pytest.param("store", "grouped", marks=pytest.mark.slow),
        ("dataset", "grouped"),
        ("store", "packed"),
        pytest.param("dataset", "budget", marks=pytest.mark.slow),
    ],
)
def test_a_run_resumed_anywhere_is_the_uninterrupted_one(store, tokenizer, tmp_path, source, order):
    cells = store if source == "store" else tokenized(store, tokenizer)
    settings = {"save_strategy": "steps", "save_steps": 1, "gradient_accumulation_steps": 2, "warmup_steps": 2}
    whole = make_trainer(tmp_path, cells, tokenizer, order, **settings)
    whole.train()
    expected = losses(whole)
    assert len(expected) >= 4 and len(set(expected)) == len(expected)
    middle = len(expected) // 2
    for step in sorted({1, middle - 1, middle, middle + 1, len(expected) - 1}):
        again = make_trainer(tmp_path, cells, tokenizer, order, **{**settings, "save_strategy": "no"})
        again.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert losses(again) == expected, step
        torch.testing.assert_close(list(again.model.parameters()), list(whole.model.parameters()), rtol=0, atol=0)
    workers = make_trainer(
        tmp_path, cells, tokenizer, order, **{**settings, "save_strategy": "no", "dataloader_num_workers": 2}
    )
    workers.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{middle}"))
    assert losses(workers) == expected


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("source", ["files", "rows"])
def test_a_stream_gives_every_cell_once_an_epoch(store, adata, tokenizer, tmp_path, source, order):
    cells = as_source(source, store, adata, tokenizer)
    finite = source == "files" and order in ("random", "grouped")
    trainer = make_trainer(tmp_path, cells, tokenizer, order, **({} if finite else {"max_steps": 40}))
    seen = SeenCells(trainer)
    trainer.train()
    n_cells = 59  # the cell without counts is left out
    epochs, epoch = [], []
    for batch, number in zip(seen.batches, seen.epochs, strict=True):
        epoch += batch
        assert number == len(epochs)  # which the masks depend on
        if len(epoch) == n_cells:
            epochs.append(epoch)
            epoch = []
    assert not epoch or not finite
    assert [len(set(epoch)) for epoch in epochs] == [n_cells] * len(epochs) and len(epochs) >= 2
    assert len(epochs) == 2 or not finite
    assert epochs[0] != epochs[1] or (source, order) == ("rows", "random")  # which nobody shuffles
    lengths = np.diff(tokenizer.encode_cells(store.__getitems__(np.arange(len(store)))).indptr)
    for batch in seen.batches:
        of = lengths[batch]
        if order == "budget":
            assert len(batch) * of.max() <= 300
        elif order == "packed":
            assert of.sum() <= 200
        else:
            assert len(batch) <= 8
    if order == "grouped":
        of_an_epoch = seen.batches[: len(seen.batches) // len(epochs)]
        shuffled = np.random.default_rng(0).permutation(epochs[0])
        at_random = [shuffled[i : i + 8].tolist() for i in range(0, n_cells, 8)]
        assert padding_share(lengths, of_an_epoch) < 0.75 * padding_share(lengths, at_random)


@pytest.mark.parametrize(
    ("source", "order"),
    [("files", "random"), ("rows", "random"), ("files", "grouped"), ("files", "packed"), ("rows", "budget")],
)
def test_a_stream_is_resumed_anywhere(store, adata, tokenizer, tmp_path, source, order):
    settings = {"save_strategy": "steps", "save_steps": 1, "gradient_accumulation_steps": 2, "warmup_steps": 2}
    if source == "rows" or order == "packed":
        settings["max_steps"] = 12

    def trainer(**changes):
        cells = as_source(source, store, adata, tokenizer)
        return make_trainer(tmp_path, cells, tokenizer, order, **{**settings, **changes})

    whole = trainer()
    seen = SeenCells(whole)
    whole.train()
    expected = losses(whole)
    assert len(expected) >= 8 and len(set(expected)) == len(expected)
    assert sum(map(len, seen.batches)) > 70  # into the second epoch
    for step, n_workers in [(1, 0), (5, 2), (len(expected) - 1, 0)]:
        again = trainer(save_strategy="no", dataloader_num_workers=n_workers)
        seen = SeenCells(again)
        again.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert losses(again) == expected, step
    mark = json.loads((tmp_path / "checkpoint-5" / "stream_mark.json").read_text())
    assert mark["next"] == 10
    if order == "random":  # elsewhere the epoch is one window
        assert mark["state"]["stream"] is not None  # what was used is not read again


def test_streams_that_cannot_be_divided_are_refused(store, adata, tokenizer, tmp_path):
    rows = as_source("rows", store, adata, tokenizer)
    with pytest.raises(ValueError, match="max_steps"):
        make_trainer(tmp_path, rows, tokenizer).train()
    cells = as_source("files", store, adata, tokenizer)
    with pytest.raises(ValueError, match="pass max_steps"):
        make_trainer(tmp_path, cells, tokenizer, "budget").train()
    with pytest.raises(ValueError, match="not supported for a stream"):
        make_trainer(tmp_path, cells, tokenizer, dataloader_drop_last=True).train()
    with pytest.raises(ValueError, match="pass it the tokenizer"):
        make_trainer(tmp_path, IterableAnnDataset(adata), tokenizer).train()
    part = IterableAnnDataset(adata, tokenizer, rank=0, world_size=2)
    with pytest.raises(ValueError, match="part 0 of 2, but this is process 0 of 1"):
        make_trainer(tmp_path, part, tokenizer).train()


def test_workers_that_live_on_change_nothing(store, tokenizer, tmp_path):
    """Dropout draws from torch's generator, of which a loader must not take anything."""
    workers = {"dataloader_num_workers": 1, "dataloader_persistent_workers": True}
    settings = {"save_strategy": "steps", "save_steps": 3}
    whole = make_trainer(tmp_path, store, tokenizer, **settings, **workers)
    whole.train()
    for kept in (workers, {}):
        again = make_trainer(tmp_path, store, tokenizer, **kept)
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
        assert losses(again) == losses(whole)


def test_a_run_that_is_done_makes_no_step_more(store, tokenizer, tmp_path, monkeypatch):
    settings = {"max_steps": 5, "save_strategy": "steps", "save_steps": 5, "lr_scheduler_type": "constant"}
    whole = make_trainer(tmp_path, store, tokenizer, **settings)
    whole.train()
    again = make_trainer(tmp_path, store, tokenizer, **settings)
    told = []
    monkeypatch.setattr(transformers.trainer.logger, "warning", told.append)
    again.train(resume_from_checkpoint=True)
    assert not any("missing keys" in text for text in told)  # tied weights are not
    assert again.state.global_step == 5 and losses(again) == losses(whole)
    torch.testing.assert_close(list(again.model.parameters()), list(whole.model.parameters()), rtol=0, atol=0)


def test_a_checkpoint_of_another_order_is_refused(store, tokenizer, tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 3, "max_steps": 4}
    make_trainer(tmp_path, store, tokenizer, **settings).train()
    for changes in (
        {"gradient_accumulation_steps": 2},
        {"seed": 1},
        {"train_sampling_strategy": "group_by_length"},
        {"per_device_train_batch_size": 4},
    ):
        other = make_trainer(tmp_path, store, tokenizer, **settings, **changes)
        with pytest.raises(ValueError, match="was .* and is .*be repeated or skipped"):
            other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    halves = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4}  # the same cells a step
    again = make_trainer(tmp_path, store, tokenizer, **settings, **halves)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    make_trainer(tmp_path, store, tokenizer, **settings, seed=1, ignore_data_skip=True).train(
        resume_from_checkpoint=str(tmp_path / "checkpoint-3")
    )


@pytest.mark.parametrize("strategy", ["random", "group_by_length"])
def test_a_checkpoint_of_an_earlier_version_is_refused_if_its_order_was_another_one(
    store, tokenizer, tmp_path, strategy
):
    settings = {"save_strategy": "steps", "save_steps": 3, "max_steps": 4, "train_sampling_strategy": strategy}
    make_trainer(tmp_path, store, tokenizer, **settings).train()
    file = tmp_path / "checkpoint-3" / "trainer_state.json"
    state = json.loads(file.read_text())
    state["stateful_callbacks"]["CellOrder"].pop("random order", None)  # earlier versions did not write it
    file.write_text(json.dumps(state))
    resumed = make_trainer(tmp_path, store, tokenizer, **settings)
    if strategy == "group_by_length":
        resumed.train(resume_from_checkpoint=str(file.parent))
        return
    with pytest.raises(ValueError, match=r"random order was None and is .*new in version 0.2.*repeated or skipped"):
        resumed.train(resume_from_checkpoint=str(file.parent))


@pytest.mark.slow
@pytest.mark.parametrize("source", ["store", "dataset", "files", "rows"])
def test_ten_stops_in_two_epochs(store, adata, tokenizer, tmp_path, source):
    settings = {"save_strategy": "steps", "save_steps": 1, "per_device_train_batch_size": 6}
    if source == "rows":
        settings["max_steps"] = 20
    whole = make_trainer(tmp_path, as_source(source, store, adata, tokenizer), tokenizer, **settings)
    whole.train()
    expected = losses(whole)
    assert len(expected) == 20
    for step in range(1, 20, 2):
        for n_workers in (0, 2):
            again = make_trainer(
                tmp_path,
                as_source(source, store, adata, tokenizer),
                tokenizer,
                **{**settings, "save_strategy": "no", "dataloader_num_workers": n_workers},
            )
            again.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
            assert losses(again) == expected, (step, n_workers)


def test_evaluation_and_prediction_go_by_the_order_of_the_data(store, tokenizer, tmp_path):
    trainer = make_trainer(tmp_path, store, tokenizer, "grouped", per_device_eval_batch_size=7)
    filled = np.flatnonzero(store.lengths > 0)
    for cells, rows in ((store, np.arange(len(store))), (tokenized(store, tokenizer), filled)):
        labels = trainer.predict(cells).label_ids
        expected = trainer.data_collator.for_evaluation()(store.__getitems__(rows))["labels"].numpy()
        for row, of in zip(labels, expected, strict=True):
            assert row[row != -100].tolist() == of[of != -100].tolist()


def test_a_checkpoint_that_is_not_whole_is_passed_over(store, tokenizer, tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 2}
    whole = make_trainer(tmp_path, store, tokenizer, **settings)
    whole.train()
    newest = last_whole_checkpoint(tmp_path)
    assert newest.name == f"checkpoint-{whole.state.global_step}"
    (newest / "trainer_state.json").write_text('{"epoch": 1.')  # a disk that ran full
    assert last_whole_checkpoint(tmp_path).name == f"checkpoint-{whole.state.global_step - 2}"
    (newest / "trainer_state.json").unlink()
    again = make_trainer(tmp_path, store, tokenizer, **settings)
    again.train(resume_from_checkpoint=True)
    assert losses(again) == losses(whole)
    assert last_whole_checkpoint(tmp_path) == newest
    assert last_whole_checkpoint(tmp_path / "nothing") is None
    # Where nothing was saved, the run begins.
    first = make_trainer(tmp_path / "new", store, tokenizer)
    first.train(resume_from_checkpoint=True)
    assert losses(first) == losses(whole)


def test_a_checkpoint_written_anew_is_not_whole_before_its_end(store, tokenizer, tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, store, tokenizer, save_strategy="steps", save_steps=4)
    trainer.train()
    newest = last_whole_checkpoint(tmp_path)
    monkeypatch.setattr(trainer, "_save_optimizer_and_scheduler", lambda folder: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        trainer._save_checkpoint(trainer.model, None)
    assert last_whole_checkpoint(tmp_path) != newest


def test_token_ids_of_stformer_train_bert(store, tmp_path):
    """The documented way: a dictionary, a tokenized dataset, a file of lengths."""
    tokens = {"<pad>": 0, "<mask>": 1, **{f"g{i}": i + 2 for i in range(40)}}
    rng = np.random.default_rng(0)
    rows = [rng.permutation(40)[: rng.integers(3, 30)] + 2 for _ in range(64)]
    rows = [np.sort(row) for row in rows]
    dataset = Dataset.from_dict({"input_ids": rows})
    write_example_lengths([len(row) for row in rows], tmp_path / "lengths.json")
    torch.manual_seed(0)
    model = BertForMaskedLM(
        BertConfig(
            vocab_size=42,
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=64,
            pad_token_id=0,
        )
    )
    arguments = TrainingArguments(
        str(tmp_path),
        num_train_epochs=30,
        per_device_train_batch_size=16,
        learning_rate=1e-2,
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        train_sampling_strategy="group_by_length",
    )
    trainer = STFormerPretrainer(arguments, dataset, tokens, tmp_path / "lengths.json", model, mlm_probability=0.3)
    trainer.train()
    curve = losses(trainer)
    assert np.mean(curve[-8:]) < np.mean(curve[:8]) - 0.3
    trainer.save_model()
    assert json.loads((tmp_path / "token_dictionary.json").read_text()) == tokens
    with pytest.raises(ValueError, match="'bert' would mix the cells of a packed batch"):
        STFormerPretrainer(arguments, dataset, tokens, model=model, packing=True)
    with pytest.raises(ValueError, match="pass one of them"):
        STFormerPretrainer(arguments, dataset, tokens, model=model, processing_class=GeneTokenizer(["a"]))


def test_an_exception_in_training_leaves_no_handler(store, tokenizer, tmp_path):
    class Fail(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            raise ZeroDivisionError

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(ZeroDivisionError):
        make_trainer(tmp_path, store, tokenizer, callbacks=[Fail()]).train()
    assert signal.getsignal(signal.SIGTERM) is before


def test_sigterm_saves_and_ends_the_run(store, tokenizer, tmp_path):
    class Terminate(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 4:
                os.kill(os.getpid(), signal.SIGTERM)

    whole = make_trainer(tmp_path / "whole", store, tokenizer)
    whole.train()
    before = signal.getsignal(signal.SIGTERM)
    stopped = make_trainer(tmp_path, store, tokenizer, callbacks=[Terminate()])
    stopped.train()
    assert stopped.interrupted and not whole.interrupted
    assert stopped.state.global_step == 5
    assert signal.getsignal(signal.SIGTERM) is before
    stopped.remove_callback(Terminate)
    stopped.train(resume_from_checkpoint=True)  # the same trainer goes on
    assert not stopped.interrupted and losses(stopped) == losses(whole)
    again = make_trainer(tmp_path, store, tokenizer)
    again.train(resume_from_checkpoint=True)
    assert losses(again) == losses(whole)


def test_arguments_are_those_of_trainer_in_its_order(config, tokenizer, store, tmp_path):
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    collator, model = sf.DataCollatorForPhenotypicMLM(tokenizer), sf.GeneBertForPhenotypicMLM(config)
    trainer = sf.CellTrainer(model, arguments, collator, store, store.select(range(9)), processing_class=tokenizer)
    assert trainer.model is model and trainer.args is arguments
    assert trainer.data_collator.epoch == 0, "of batches that are read before training"
    assert (len(trainer.train_dataset), len(trainer.eval_dataset)) == (59, 8)
    with pytest.raises(ValueError, match="A store needs a data_collator: DataCollatorForPhenotypicMLM"):
        sf.CellTrainer(model, arguments, train_dataset=store, processing_class=tokenizer)
