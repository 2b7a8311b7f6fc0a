"""A class in each of several label columns: one model says what one per column says, and cells may lack labels."""

import json
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import TrainingArguments

from stformer_hf import (
    CellStore,
    CellTrainer,
    DataCollatorForCellClassification,
    GeneBertConfig,
    GeneBertForPhenotypicMLM,
    GeneTokenizer,
    annotate,
    finetune,
    initialise_from_store,
)
from stformer_hf.models.gene_bert.heads import IGNORE
from stformer_hf.training import epoch_choice, finetuning
from stformer_hf.training.calibration import load_out_of_fold
from stformer_hf.training.finetuning import prepare_classifier
from stformer_hf.training.label_fit import fit_head_to_labels
from stformer_hf.training.prepared_classifier import SetTemperature
from stformer_hf.training.starts.labelled_cells import LabelledCells
from stformer_hf.training.starts.linear_readers import Problem
from tests.conftest import make_adata

COLUMNS = {"cell_type": slice(0, 2), "level": slice(2, 5)}  # and their outputs
SHORT = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "max_steps": 1}


@pytest.fixture(scope="module")
def cells():
    """Cells with a type and a level of expression, both of them known for every cell."""
    cells = make_adata()
    level = pd.qcut(np.asarray(cells.X[:, :10].sum(axis=1)).ravel(), 3, labels=["low", "mid", "high"])
    cells.obs["level"] = pd.Categorical(level.astype(str))
    return cells


@pytest.fixture(scope="module")
def partly(cells):
    """The same cells, of which some have no type, some no level, and five neither."""
    cells = cells.copy()
    cells.obs.loc[cells.obs_names[::3], "cell_type"] = None
    cells.obs.loc[cells.obs_names[1::4], "level"] = None
    return cells


@pytest.fixture(scope="module")
def started(cells, tmp_path_factory):
    """The folder of a model of both columns, and the models of one."""
    folder = tmp_path_factory.mktemp("joint")
    settings = {"num_train_epochs": 0, "class_weights": "balanced"}
    joint = finetune(cells, ["level", "cell_type"], output=folder, **settings)
    return joint, folder, {name: finetune(cells, name, **settings) for name in COLUMNS}


@pytest.fixture
def pretrained(cells):
    """An encoder with an embedding of its own."""
    tokenizer = GeneTokenizer(cells.var_names.tolist(), whole_cell=True, max_length=8)
    torch.manual_seed(0)
    model = GeneBertForPhenotypicMLM(GeneBertConfig.from_tokenizer(tokenizer, size="tiny"))
    initialise_from_store(model, tokenizer, cells)
    model.tokenizer = tokenizer
    return model


def log_probabilities(model, cells, outputs=slice(None)):
    batch = model.tokenizer(cells, padding=True, return_tensors="pt")
    with torch.no_grad():
        return model(**batch).logits[:, outputs].log_softmax(-1)


def test_the_start_of_each_column_is_that_of_a_model_of_its_own(cells, started):
    joint, _, alone = started
    assert joint.config.label_columns == {"cell_type": 2, "level": 3}
    for name, outputs in COLUMNS.items():
        found = log_probabilities(joint, cells, outputs)
        torch.testing.assert_close(found, log_probabilities(alone[name], cells), atol=1e-5, rtol=0)
        np.testing.assert_allclose(joint.out_of_fold[name].predictions, alone[name].out_of_fold.predictions, atol=1e-5)
    assert joint.config.class_weights == [weight for own in alone.values() for weight in own.config.class_weights]


def test_a_column_is_learnt_from_the_cells_that_have_it(partly, cells, pretrained):
    """With an embedding that is given, nothing of a column depends on cells without it."""
    joint = finetune(partly, list(COLUMNS), model=pretrained, num_train_epochs=0)
    kept = (partly.obs[list(COLUMNS)].notna().any(axis=1) & (np.arange(60) != 3)).to_numpy()
    for name, outputs in COLUMNS.items():
        own = finetune(partly, name, model=pretrained, num_train_epochs=0)
        found = log_probabilities(joint, cells, outputs)
        torch.testing.assert_close(found, log_probabilities(own, cells), atol=1e-5, rtol=0)
        part = joint.out_of_fold[name]
        assert part.rows.tolist() == np.flatnonzero(partly.obs[name].notna().to_numpy()[kept]).tolist()
        np.testing.assert_allclose(part.predictions, own.out_of_fold.predictions, atol=1e-5)


def test_annotate_writes_each_column_as_a_model_of_its_own(cells, started):
    _, folder, alone = started
    options = {"reject": 0.3, "top_k": 2, "over": "age"}
    parents = {"low": "some", "mid": "some"}
    together = cells.copy()
    annotate(together, folder, parents=parents, **options)
    assert list(together.uns["stformer_annotation"]["classes"]) == list(COLUMNS)
    for name in COLUMNS:
        own = cells.copy()
        annotate(own, alone[name], parents=parents if name == "level" else None, **options)
        columns = [column for column in own.obs if column.startswith("stformer_")]
        assert {"stformer_label", "stformer_score_2", "stformer_typicality", "stformer_majority"} <= set(columns)
        renamed = own.obs[columns].rename(columns=lambda of, name=name: of.replace("former_", f"former_{name}_", 1))
        pd.testing.assert_frame_equal(together.obs[list(renamed)], renamed, atol=1e-4)
        assert 0 < (own.obs["stformer_label"] == "unknown").sum() < 59
        found = together.obsm[f"stformer_{name}_probabilities"]
        np.testing.assert_allclose(found, own.obsm["stformer_probabilities"], atol=1e-5)
    assert "some" in set(together.obs["stformer_level_label"])
    with pytest.raises(ValueError, match="None of the model's classes has a parent"):
        annotate(together, folder, reject=0.3, parents={"x": "y"})


def test_training_reads_the_labels_that_are_there(partly, cells, tmp_path):
    store = CellStore.build(tmp_path / "store", partly, obs=list(COLUMNS), report=False)
    arguments = TrainingArguments(str(tmp_path / "m"), **{**SHORT, "max_steps": 20, "learning_rate": 1e-3})
    prepared = prepare_classifier(store, ["level", "cell_type"], arguments, num_train_epochs=2, init="random")
    other = cells.copy()
    other.obs["level"] = other.obs["level"].cat.rename_categories({"mid": "huge"})
    others = CellStore.build(tmp_path / "other", other, obs=list(COLUMNS), report=False)
    held_out = prepared.known(others)
    assert set(held_out.obs["level"]) == {"low", "high"}, "without cells of a class that no training cell has"
    other.obs["level"] = np.arange(other.n_obs) % 3
    with pytest.raises(ValueError, match="'level' of the held-out cells is not categorical, but the model predicts"):
        prepared.known(CellStore.build(tmp_path / "numbers", other, obs=list(COLUMNS), report=False))
    trainer = prepared.trainer(arguments, held_out)
    labels = trainer.data_collator(prepared.cells.__getitems__(range(len(prepared.cells))))["labels"].numpy()
    for of_column, (name, classes) in zip(
        labels.T, {"cell_type": ["B cell", "T cell"], "level": ["high", "low", "mid"]}.items(), strict=True
    ):
        found = [classes[label] if label != IGNORE else None for label in of_column]
        assert found == [None if pd.isna(of) else of for of in prepared.cells.obs[name]]
    assert labels.dtype == np.int64 and 0 < (labels == IGNORE).sum()
    before = trainer.evaluate(prepared.cells)["eval_loss"]
    trainer.train()
    assert trainer.evaluate(prepared.cells)["eval_loss"] < before
    predicted = trainer.predict(held_out)
    assert predicted.predictions.shape == (len(held_out), 5) and predicted.label_ids.shape == (len(held_out), 2)

    without = store.select(store.obs["level"].isna().to_numpy() & store.obs["cell_type"].isna().to_numpy())
    with pytest.raises(ValueError, match="5 of 5 cells have none of 'cell_type', 'level'"):
        fit_head_to_labels(trainer.model, trainer.data_collator, without)
    with pytest.raises(ValueError, match="a class in each of 'cell_type', 'level', but got 'cell_type'"):
        CellTrainer(
            model=trainer.model,
            args=arguments,
            train_dataset=prepared.cells,
            data_collator=DataCollatorForCellClassification(prepared.tokenizer, "cell_type"),
            processing_class=prepared.tokenizer,
        )


def test_a_fold_without_a_column_predicts_the_others(partly, tmp_path, monkeypatch):
    monkeypatch.setattr(epoch_choice, "MOST_EPOCHS", 1)
    store = CellStore.build(tmp_path / "store", partly, obs=list(COLUMNS), report=False)
    arguments = TrainingArguments(str(tmp_path / "m"), use_cpu=True, report_to="none")
    prepared = prepare_classifier(store, list(COLUMNS), arguments, num_train_epochs=0)
    codes = [prepared.cells.obs[name].cat.codes.to_numpy(np.int64) for name in COLUMNS]
    labels = np.stack([np.where(of < 0, IGNORE, of) for of in codes], axis=1)
    train = np.flatnonzero(labels[:, 1] == IGNORE)
    held_out = np.setdiff1d(np.arange(len(labels)), train)
    outputs = epoch_choice._outputs_of_epochs(prepared, labels, train, held_out, arguments)
    assert outputs.shape == (2, len(held_out), 5) and np.isfinite(outputs).all()
    np.testing.assert_allclose(outputs[0, :, COLUMNS["level"]], np.log(1 / 3), atol=1e-5)
    assert np.ptp(outputs[0, :, 0]) > 0.1


def test_a_fold_starts_with_a_class_of_one_cell(cells, tmp_path, monkeypatch):
    """The cell has no out-of-fold prediction, but its genes are rotated like those of the others."""
    monkeypatch.setattr(epoch_choice, "MOST_EPOCHS", 1)
    cells = cells.copy()
    cells.obs["level"] = cells.obs["level"].astype(object).mask(np.arange(60) == 7, "own")
    store = CellStore.build(tmp_path / "store", cells, obs=["level"], report=False).select(cells.X.sum(1).A1 > 0)
    arguments = TrainingArguments(str(tmp_path / "m"), use_cpu=True, report_to="none")
    prepared = prepare_classifier(store, "level", arguments, num_train_epochs=0)
    assert len(prepared.start[None].out_of_fold.rows) == len(store) - 1
    labels, (train, held_out) = store.obs["level"].cat.codes.to_numpy(np.int64), np.arange(58).reshape(2, 29)
    outputs = epoch_choice._outputs_of_epochs(prepared, labels, train, held_out, arguments)
    assert outputs.shape == (2, 29, 4) and np.isfinite(outputs).all()


def test_training_is_chosen_by_all_columns_and_calibrated_for_each(partly, monkeypatch):
    rng, calls = np.random.default_rng(0), []

    def outputs_of_epochs(prepared, labels, train, held_out, arguments):
        """Return the types of nine of ten cells at logits of 1; at the start one level, then those of nine, at 9."""
        calls.append((prepared, labels, arguments, list(prepared.model.config.temperature)))
        outputs = np.zeros((2, len(held_out), 5))
        for epoch, (i, size) in ((0, (0, 1.0)), (1, (0, 1.0)), (1, (1, 9.0))):
            right = np.where((rng.random(len(held_out)) < 0.9) & (labels[held_out, i] >= 0), labels[held_out, i], 0)
            outputs[epoch][:, list(COLUMNS.values())[i]] = size * np.eye(2 + i)[right]
        return outputs

    def train(self, **_):
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, SetTemperature):
                callback.on_train_end(self.args, self.state, self.control, model=self.model)

    monkeypatch.setattr(epoch_choice, "FEW_LABELS", 5)
    monkeypatch.setattr(epoch_choice, "_outputs_of_epochs", outputs_of_epochs)
    monkeypatch.setattr(CellTrainer, "train", train)
    model = finetune(partly, list(COLUMNS))
    (prepared, labels, arguments, before), _ = calls
    of_type, of_level = np.array(model.config.temperature) / before
    assert of_type < 0.7 < 1.5 < of_level
    for name, part in model.out_of_fold.items():
        assert len(part.rows) == len(part.labels) == len(part.predictions) and (part.labels >= 0).all()
        assert (part.predictions.argmax(1) == part.labels).mean() > 0.8, name
        np.testing.assert_allclose(np.exp(part.predictions.astype(float)).sum(1), 1, atol=1e-5)
    monkeypatch.setattr(epoch_choice, "FEW_LABELS", 17)  # more than a level has, and fewer than a type
    epochs, facts, _ = epoch_choice.choose_epochs(prepared, labels, None, arguments)
    assert epochs == 0 and "the median class of level has 16 cells, fewer than 17" in facts["fine_tuning"]


def test_training_is_calibrated_without_labels_in_the_folds_that_choose_it(cells, monkeypatch):
    """A column with the labels of some donors keeps the temperature of its start if no fold tests it."""
    cells, tried = cells.copy(), []
    cells.obs["donor"] = pd.Categorical([f"d{i % 5}" for i in range(60)])

    def outputs_of_epochs(prepared, labels, train, held_out, arguments):
        tried.append(prepared.cells.obs["donor"].iloc[held_out[0]])
        of_type = np.eye(2)[labels[held_out, 0]]
        return np.stack([np.pad(of, [(0, 0), (0, 3)]) for of in (1 - of_type, of_type)])

    monkeypatch.setattr(epoch_choice, "FEW_LABELS", 5)
    monkeypatch.setattr(epoch_choice, "_outputs_of_epochs", outputs_of_epochs)
    monkeypatch.setattr(CellTrainer, "train", lambda self, **_: None)
    for n_untested in range(3):
        cells.obs["some"] = cells.obs["level"].astype(object).mask(cells.obs["donor"].isin(tried[:n_untested]))
        model = finetune(cells, ["cell_type", "some"], split_by="donor")
        assert len(model.out_of_fold["some"].rows) == 12 * (2 - n_untested)
        assert np.isfinite(model.config.temperature).all()
    own = cells.obs_names == cells.obs_names[cells.obs["donor"] == tried[0]][1]  # the only cell of a class
    cells.obs["some"] = cells.obs["level"].astype(object).mask(own, "own")
    assert len(finetune(cells, ["cell_type", "some"], split_by="donor").out_of_fold["some"].rows) == 23


def test_which_columns_are_classes(cells, tmp_path):
    cells = cells.copy()
    obs = cells.obs
    obs["is_low"], obs["flag"], obs["n"] = obs["level"] == "low", obs["age"] % 2, obs["age"] % 3
    obs["one"] = pd.Categorical(["B cell"] * 60)
    settings = {"init": "random", "num_train_epochs": 0}
    config = finetune(cells, ["is_low", "flag"], **settings).config
    assert (config.problem_type, config.label_columns) == ("multi_label_classification", None)
    with pytest.raises(ValueError, match="'cell_type' of the label columns hold categories, and 'flag', 'n' numbers"):
        finetune(cells, ["cell_type", "flag", "n"], **settings)
    config = finetune(cells, ["n", "is_low"], problem_type="single_label_classification", **settings).config
    assert list(config.id2label.values()) == ["is_low: False", "is_low: True", "n: 0", "n: 1", "n: 2"]
    with pytest.raises(ValueError, match="'one' has only one class among the training cells"):
        finetune(cells, ["cell_type", "one"], **settings)
    config = finetune(cells, ["cell_type"], **settings).config
    assert (config.label_columns, config.id2label) == (None, {0: "B cell", 1: "T cell"})


def test_columns_with_few_labels(cells, tmp_path):
    """One label per class, and folds of one cell."""
    cells = cells.copy()
    cells.obs["two"] = pd.Categorical(["u", "v"] + [None] * 58)
    cells.obs["three"] = pd.Categorical(["u", "v", "v"] + [None] * 57)
    model = finetune(cells, ["cell_type", "two", "three"], num_train_epochs=0, output=tmp_path / "several")
    assert [len(of.rows) for of in model.out_of_fold.values()] == [59, 2, 0]
    finetune(cells, "two", num_train_epochs=0, output=tmp_path / "one")
    several, one = (json.loads((tmp_path / of / "fine_tuning.json").read_text()) for of in ("several", "one"))
    assert "chosen by" in several["start"] and "three_inner_score_of_the_start" in several
    assert "two_reader_weights" in several and "two_inner_score_of_the_start" not in several
    assert one["start"] == "linear models of [CLS] and of all genes" and "inner_score_of_the_start" not in one
    annotated = cells.copy()
    annotate(annotated, model, reject=0.05)
    assert not (annotated.obs["stformer_two_label"] == "unknown").any()  # there is nothing to compare with
    cells.obs["donor"] = pd.Categorical(["d1"] * 20 + ["d2"] * 40)
    with pytest.raises(ValueError, match="All cells with a 'two' have the same 'donor', 'd1'"):
        finetune(cells, ["cell_type", "two"], split_by="donor", num_train_epochs=0)


def test_columns_that_are_refused(cells, tmp_path):
    cells = cells.copy()
    cells.obs["type/level"] = cells.obs["level"]
    settings = {"init": "random", "num_train_epochs": 1, "training": SHORT}
    with pytest.raises(ValueError, match="Rename the label column 'type/level'"):
        finetune(cells, ["cell_type", "type/level"], **settings)
    with pytest.raises(ValueError, match="label_key is empty"):
        finetune(cells, [], **settings)
    store = CellStore.build(tmp_path / "all", cells, obs=list(COLUMNS), report=False)
    CellStore.build(tmp_path / "types", store, obs="cell_type", report=False)
    with pytest.raises(ValueError, match=r"There is no obs\['level'\].*held-out cells"):
        finetune(store, list(COLUMNS), eval_cells=tmp_path / "types", **settings)


def test_a_checkpoint_of_several_columns_becomes_one_of_one_column_and_back(cells, started, tmp_path):
    cells, folder = cells.copy(), started[1]
    assert set(load_out_of_fold(folder)) == set(COLUMNS)
    for columns, path in (("level", "one"), (["level", "cell_type"], "two")):
        settings = {"num_train_epochs": 1, "init": "random", "training": SHORT}
        finetune(cells, columns, model=folder, output=tmp_path / path, **settings)
        folder = tmp_path / path
        config = GeneBertConfig.from_pretrained(folder)
        assert config.label_columns == (None if path == "one" else {"cell_type": 2, "level": 3})
        assert config.reader_weights is None and config.temperature == 1.0, "those of a new head"
        annotate(cells, folder, key_added=path)
    assert {"one_label", "two_level_label", "two_cell_type_label"} <= set(cells.obs)
    assert load_out_of_fold(folder) is None
    annotate(cells, tmp_path / "one", key_added="two")
    assert "two_probabilities" in cells.obsm and not [key for key in cells.obsm if key.startswith("two_level")]


def test_adapters_of_several_columns(cells, pretrained, tmp_path):
    pytest.importorskip("peft")
    pretrained.save_pretrained(tmp_path / "base")
    pretrained.tokenizer.save_pretrained(tmp_path / "base")
    settings = {"output": tmp_path / "a", "num_train_epochs": 1, "init": "random", "training": SHORT}
    of_level = {**settings, "output": tmp_path / "base"}  # the base then has a head of one column
    finetune(cells, "level", model=tmp_path / "base", **of_level)
    trained = finetune(cells, list(COLUMNS), model=tmp_path / "base", lora=2, **settings)
    by_object, by_name = cells.copy(), cells.copy()
    annotate(by_object, trained)
    annotate(by_name, tmp_path / "a")
    pd.testing.assert_frame_equal(by_object.obs, by_name.obs, atol=1e-5)
    fields = json.loads((tmp_path / "a" / "model_config.json").read_text())
    assert fields["label_columns"] == {"cell_type": 2, "level": 3}


def test_classes_of_one_donor_are_those_of_the_cells_with_a_label(caplog):
    cells = SimpleNamespace(obs=pd.DataFrame({"donor": ["d0"] * 4 + ["d1"] * 4}))
    problem = Problem("single_label_classification", 3)
    columns = [LabelledCells("a", slice(3), problem, np.arange(2, 8), np.array([0, 1, 0, 1, 2, 2]))]
    assert finetuning._groups(cells, "donor", columns).tolist() == cells.obs["donor"].tolist()
    assert "1 of 3 classes of 'a' have cells of one 'donor' alone" in caplog.text and "these 2 cells" in caplog.text
