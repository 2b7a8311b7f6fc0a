"""Columns of labels that are no categories, and commands that fail: what the user is told, and what is left."""

import json
import re

import pandas as pd
import pytest

from stformer_hf import CellStore, GeneBertConfig, annotate, finetune
from stformer_hf.cli import main

pytestmark = pytest.mark.usefixtures("two_folds")

FILES = ("json", "csv", "md", "png")
SHORT = ["--max_steps", "1", "--per_device_train_batch_size", "8", "--disable_tqdm", "true", "--use_cpu", "true"]


@pytest.fixture
def labelled(adata):
    """Cells with labels of every kind."""
    obs = adata.obs
    obs["cluster"] = obs["age"] % 3 + 7
    obs["is_b"] = obs["cell_type"] == "B cell"
    obs["depth"] = obs["age"] / 7
    obs["partly"] = obs["cluster"].where(obs["age"] > 35)  # missing values make floats of integers
    obs["one"] = pd.Categorical(["B cell"] * 60)
    return adata


@pytest.fixture
def run(labelled, tmp_path, capsys):
    labelled.write_h5ad(tmp_path / "cells.h5ad")

    def finetune_it(label, *flags, data=None, output=None):
        output = output or tmp_path / f"of_{label}"
        argv = ["finetune", "--data", str(data or tmp_path / "cells.h5ad"), "--label_key", *label.split()]
        argv += ["--output", str(output)]
        code = main([*argv, *SHORT, *flags])
        return code, capsys.readouterr().err, output

    return finetune_it


@pytest.mark.parametrize(
    ("label", "names"),
    [
        ("cluster", ["7", "8", "9"]),
        ("is_b", ["False", "True"]),
        pytest.param("partly", ["7", "8", "9"], marks=pytest.mark.slow),
    ],
)
def test_integers_and_booleans_are_classes(run, labelled, label, names, caplog):
    code, err, output = run(label)
    assert code == 0, err
    assert CellStore(output / "store").categories == {label: names}
    annotate(labelled, output)
    assert labelled.obs["stformer_label"].cat.categories.tolist() == names
    missing = int(labelled.obs[label].isna().sum())
    told = f"{missing - labelled.obs[label].isna().iloc[3]} of 60 cells have no label {label!r}: they are left out."
    assert (told in caplog.text) == (label == "partly")


def test_a_class_in_each_of_two_columns(run, labelled, tmp_path, capsys):
    code, err, output = run("partly cell_type", "--held_out", "0.3", "--num_train_epochs", "1")
    assert code == 0, err
    assert GeneBertConfig.from_pretrained(output).label_columns == {"cell_type": 2, "partly": 3}
    figures = json.loads((output / "trainer_state.json").read_text())["log_history"]
    figures = {name: value for entry in figures for name, value in entry.items()}
    assert {"eval_cell_type_accuracy", "eval_partly_macro_f1", "eval_accuracy"} <= set(figures)
    card = (output / "README.md").read_text()
    assert "one class in each of 2 label columns" in card and "| partly | 3 | 7, 8, 9 |" in card
    assert "| cell type: accuracy (higher is better) | this model |" in card and "logistic regression" in card
    facts = json.loads((output / "fine_tuning.json").read_text())
    assert facts["label"] == ["cell_type", "partly"] and {"partly_reader_weights", "num_train_epochs"} <= set(facts)
    assert {path.name for path in output.glob("*.png")} <= {"confusion_cell_type.png", "confusion_partly.png"}
    assert main(["info", str(output)]) == 0
    assert "2 outputs of cell_type: B cell, T cell; 3 outputs of partly: 7, 8, 9" in capsys.readouterr().out
    out = tmp_path / "out.h5ad"
    assert (
        main(["annotate", "--data", str(tmp_path / "cells.h5ad"), "--model", str(output), "--output", str(out)]) == 0
    )
    assert "stformer_partly_label" in capsys.readouterr().out
    kept = CellStore(output / "store").obs[["cell_type", "partly"]]
    assert 0 < kept["partly"].isna().sum() < 60 and kept["cell_type"].notna().all()


def test_numbers_are_predicted_where_it_is_asked_for(run, labelled, tmp_path, caplog):
    labelled.obs["depth"] = labelled.obs["depth"].where(labelled.obs["age"] > 24)  # of the others it is not known
    labelled.write_h5ad(tmp_path / "cells.h5ad")
    code, err, output = run("depth", "--problem_type", "regression", "--held_out", "0.5")
    assert code == 0, err
    config = GeneBertConfig.from_pretrained(output)
    assert (config.problem_type, config.id2label) == ("regression", {0: "depth"})
    n_known = int((labelled.obs["depth"].notna() & (labelled.X.sum(1).A1 > 0)).sum())
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    figures = {name: value for entry in history for name, value in entry.items()}
    assert {"eval_mae", "eval_r2"} <= set(figures) and "eval_accuracy" not in figures
    assert "held-out cells are not evaluated: they have no 'depth'" in caplog.text and 0 < n_known < 59
    annotate(labelled, output)
    assert labelled.obs["stformer_depth"].dtype.kind == "f"
    code, err, _ = run("cluster", "--problem_type", "regression", "--class_weights", "balanced")
    assert code == 1 and "apply to classes" in err


@pytest.mark.parametrize(
    ("label", "words"),
    [
        ("depth", "'depth' holds numbers such as .*, which are not classes. If they are codes, convert them"),
        ("one", "'one' has only one class among the training cells, 'B cell': at least two are needed"),
        ("cel_type", "no obs column 'cel_type'; it has cell_type, age"),
    ],
)
def test_a_label_that_is_no_class_is_told_and_leaves_nothing_in_the_way(run, label, words, tmp_path):
    code, err, output = run(label, output=tmp_path / "run")
    assert code == 1 and re.search(words, err), err
    assert not (output / "store").exists()
    code, err, _ = run("cell_type", output=output)  # the corrected command
    assert code == 0, err


def test_a_store_that_was_there_before_a_failed_command_stays(run, labelled, tmp_path):
    store = CellStore.build(tmp_path / "run" / "store", labelled, obs=["one"], classes="cluster", report=False)
    assert run("one", output=tmp_path / "run")[0] == 1
    assert run("one", data=store.path, output=tmp_path / "run")[0] == 1
    assert CellStore(store.path).categories == {"one": ["B cell"], "cluster": ["7", "8", "9"]}
    code, err, _ = run("is_b", data=store.path, output=tmp_path / "other")
    assert code == 1 and "no categorical column 'is_b'; those are one, cluster. To use integers" in err
    assert run("cluster", data=store.path, output=tmp_path / "other")[0] == 0


def test_a_failed_pretraining_leaves_no_store(labelled, tmp_path, capsys):
    labelled.obsm["spatial"] = labelled.obs[["age", "depth"]].to_numpy()
    labelled.write_h5ad(tmp_path / "cells.h5ad")
    for verb, flags in (
        ("pretrain", ["--held_out", "2"]),
        ("pretrain_neighborhood", ["--held_out", "2", "--patch_size", "9"]),
    ):
        output = tmp_path / verb
        assert main([verb, "--data", str(tmp_path / "cells.h5ad"), "--output", str(output), *SHORT, *flags]) == 1
        assert "held_out must be a share" in capsys.readouterr().err
        assert not (output / "store").exists()


def test_a_wrong_model_is_told_with_the_closest_folder(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pretrained").mkdir()
    code, err, output = run("cell_type", "--model", "./pretraned")
    assert code == 1 and "There is no folder './pretraned'; the closest is pretrained." in err
    assert not output.exists()


def test_integers_of_finetune_are_classes_where_it_is_said(labelled):
    with pytest.raises(ValueError, match=r"holds whole numbers.*problem_type='regression'.*single_label_classif"):
        finetune(labelled, "cluster")
    model = finetune(labelled, "cluster", problem_type="single_label_classification", num_train_epochs=0)
    assert list(model.config.id2label.values()) == ["7", "8", "9"]
    model = finetune(labelled, "is_b", num_train_epochs=0)
    assert list(model.config.id2label.values()) == ["False", "True"]
    model = finetune(labelled, "cluster", problem_type="regression", num_train_epochs=0)
    assert (model.config.problem_type, model.config.id2label) == ("regression", {0: "cluster"})


def test_a_classifier_from_random_weights(run):
    code, err, output = run("cell_type", "--init", "random", "--held_out", "0")
    assert code == 0, err
    facts = json.loads((output / "fine_tuning.json").read_text())
    assert "start" not in facts and not (output / "out_of_fold.safetensors").exists()
    assert GeneBertConfig.from_pretrained(output).reader_weights is None
    code, err, output = run("cell_type", "--held_out", "0", output=output.parent / "started")
    assert code == 0, err
    assert "start" in json.loads((output / "fine_tuning.json").read_text())


def test_names_of_paths_are_names_of_columns_and_classes(adata, tmp_path):
    """No file is named by them: all are in the folders that were asked for."""
    named = adata.obs["cell_type"].map({"T cell": "T/NK", "B cell": "../B"}).astype(object).fillna("C:\\D")
    adata.obs["cell/type"], adata.obs["../donor"] = pd.Categorical(named), pd.Categorical(["/d1", "/d2", ".."] * 20)
    columns = ["cell/type", "../donor"]
    CellStore.build(tmp_path / "store", adata, obs=columns, report=False)
    store, output, evaluation = (str(tmp_path / name) for name in ("store", "model", "evaluation"))
    words = ["--data", store, "--label_key", "cell/type"]
    assert main(["finetune", *words, "--output", output, "--split_by", "../donor", *SHORT]) == 0
    assert main(["annotate", "--data", store, "--model", output, "--output", str(tmp_path / "found.csv")]) == 0
    assert main(["evaluate", *words, "--model", output, "--output", evaluation, "--n_splits", "2"]) == 0
    assert set(pd.read_csv(tmp_path / "found.csv")["stformer_label"].dropna()) <= set(named)
    assert {path.name for path in tmp_path.iterdir()} == {"store", "model", "evaluation", "found.csv"}
    assert {path.name for path in (tmp_path / "evaluation").iterdir()} == {f"evaluation.{of}" for of in FILES}
    assert (tmp_path / "model" / "confusion.png").exists()
