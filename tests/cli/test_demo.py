"""The demo, with few steps: its figures are there, of the right cells, and the same for the same seed."""

import json
import re

import numpy as np
import pytest

pytest.importorskip("scanpy")

from anndata import read_h5ad  # noqa: E402
from sklearn.metrics import f1_score  # noqa: E402
from transformers import AutoModel, AutoModelForMaskedLM, AutoModelForSequenceClassification, AutoTokenizer  # noqa: E402

from stformer_hf.cli import demo, main  # noqa: E402
from stformer_hf.training.starts import linear_readers  # noqa: E402

PICTURES = ("pretraining", "fine_tuning", "few_labels", "confusion", "umap")


def run_demo(folder, seed):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "STEPS", {**demo.STEPS, "logging_steps": 1})
        patch.setattr(demo, "PRETRAINING", {**demo.PRETRAINING, "max_length": 48})  # most of the time
        patch.setattr(demo, "PRETRAINING_STEPS", {**demo.PRETRAINING_STEPS, "max_steps": 3})
        patch.setattr(demo, "EPOCHS", 0.2)
        patch.setattr(linear_readers, "N_FOLDS", 2)  # of the inner cross-validation
        patch.setattr(demo, "N_LABELS", (5, 10))
        patch.setattr(demo, "N_DRAWS", 2)
        assert main(["demo", "--output", str(folder), "--seed", str(seed), "--debug"]) == 0
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory, compiled_umap):
    return run_demo(tmp_path_factory.mktemp("demo") / "out", 5)


@pytest.fixture(scope="module")
def found(folder):
    return json.loads((folder / "demo.json").read_text())


def test_recovered_counts_are_whole_and_of_ten_types():
    cells, residual = demo.load_cells()
    assert cells.shape == (700, 765)
    assert residual < 0.09
    assert len(cells.obs["bulk_labels"].cat.categories) == 10
    assert (cells.X.data == np.rint(cells.X.data)).all() and cells.X.data.min() == 1
    train, held_out = demo.split_cells(cells, 5)
    assert (len(train), len(held_out)) == (525, 175)
    assert not set(train.obs_names) & set(held_out.obs_names)
    assert list(demo.split_cells(cells, 5)[1].obs_names) == list(held_out.obs_names)
    assert list(demo.split_cells(cells, 6)[1].obs_names) != list(held_out.obs_names)


def test_the_report_is_one_page_with_pictures_and_the_table(folder, found):
    report = (folder / "report.html").read_text()
    assert report.count('src="data:image/png;base64,') == len(PICTURES)
    assert not re.search(r'(src|href)="(?!data:)', report)
    assert list(found["table"]) == [demo.MAJORITY, demo.GENES, demo.PCA, demo.START, demo.TRAINED]
    for name, row in found["table"].items():
        assert name in report and f"{row['accuracy']:.3f}" in report and f"{row['macro_f1']:.3f}" in report
        assert row["accuracy_low"] < row["accuracy"] < row["accuracy_high"]
        assert row["macro_f1_low"] <= row["macro_f1"] <= row["macro_f1_high"]
    for picture in PICTURES:
        assert (folder / "plots" / f"{picture}.png").stat().st_size > 5_000
    assert "white-space: pre-wrap" in report  # long commands wrap


def test_the_best_row_is_bold_whichever_it_is(folder, found):
    (bold,) = re.findall(r'<tr class="[^"]*best"><td>([^<]*)</td>', (folder / "report.html").read_text())
    accuracy = {name: row["accuracy"] for name, row in found["table"].items()}
    assert bold == found["best"] and accuracy[bold] == max(accuracy.values())


def test_the_table_is_of_the_held_out_cells_and_of_the_same_classes(folder, found):
    cells = demo.load_cells()[0]
    held_out = demo.split_cells(cells, 5)[1]
    true = held_out.obs["bulk_labels"].astype(str)
    for name, model in ((demo.START, "classifier"), (demo.TRAINED, "classifier_trained")):
        annotated = read_h5ad(folder / f"held_out_by_{model}.h5ad")
        assert annotated.obs_names.tolist() == held_out.obs_names.tolist()
        labels = annotated.obs["stformer_label"].astype(str)
        row = found["table"][name]
        assert row["accuracy"] == pytest.approx((labels == true).mean())
        f1 = f1_score(true, labels, labels=list(cells.obs["bulk_labels"].cat.categories), average="macro")
        assert row["macro_f1"] == pytest.approx(f1)
    assert not set(read_h5ad(folder / "train.h5ad").obs_names) & set(held_out.obs_names)
    per_class = {row["name"]: row for row in found["per_class"]}
    assert {name: row["n_cells"] for name, row in per_class.items()} == true.value_counts().to_dict()
    labels = read_h5ad(folder / "held_out_by_classifier.h5ad").obs["stformer_label"].astype(str)
    assert sum(row["n_right"] for row in per_class.values()) == (labels == true).sum()


def test_the_classifier_says_what_it_chose(folder, found):
    chosen = json.loads((folder / "classifier" / "fine_tuning.json").read_text())
    assert found["classifier"] == chosen
    assert 0.5 < chosen["inner_score_of_the_start"] < 1
    report = (folder / "report.html").read_text()
    # The median type has 36 training cells: too few to fine-tune, and the other classifier shows it all the same.
    assert chosen["num_train_epochs"] == 0 and "36 cells, fewer than 50" in chosen["fine_tuning"]
    assert chosen["fine_tuning"] in report
    steps = {
        name: json.loads((folder / name / "trainer_state.json").read_text())["global_step"]
        for name in ("classifier", "classifier_trained")
    }
    assert steps == {"classifier": 0, "classifier_trained": 4}


def test_a_classifier_that_chose_to_train_has_its_start_beside_it(tmp_path, monkeypatch):
    made = []

    def run(args, training):
        made.append((args.output, training.get("num_train_epochs")))
        (tmp_path / "classifier").mkdir(exist_ok=True)
        (tmp_path / "classifier" / "fine_tuning.json").write_text('{"num_train_epochs": 3}')
        return {}

    monkeypatch.setattr("stformer_hf.cli.finetune.run", run)
    found = demo._finetune(tmp_path, 0)
    assert made == [(str(tmp_path / "classifier"), None), (str(tmp_path / "classifier_start"), 0)]
    assert (found.start, found.trained, found.epochs) == ("classifier_start", "classifier", 3)


def test_few_labels_are_of_classes_that_have_them(folder, found):
    train = read_h5ad(folder / "train.h5ad")
    sizes = train.obs["bulk_labels"].value_counts()
    assert found["few_classes"] == sorted(sizes.index[sizes >= 10])
    assert list(found["few"]) == [demo.START, demo.GENES, demo.PCA]
    for row in found["few"].values():
        assert list(row) == ["5", "10"]
        assert all(0.3 < mean < 1 and sd >= 0 for mean, sd in row.values())


def test_embeddings_and_checkpoints_are_there(folder):
    embedded = read_h5ad(folder / "cells_embedded_by_pretrained.h5ad")
    assert embedded.obsm["X_stformer"].shape == (700, 128)
    assert embedded.uns["stformer"]["pooling"] == "cls"
    tokenizer = AutoTokenizer.from_pretrained(folder / "classifier")
    batch = tokenizer(embedded[:3], padding=True, return_tensors="pt")
    for auto, name in (
        (AutoModel, "pretrained"),
        (AutoModelForMaskedLM, "pretrained"),
        (AutoModelForSequenceClassification, "classifier"),
    ):
        assert auto.from_pretrained(folder / name)(**batch)[0].shape[0] == 3
        assert "## Training" in (folder / name / "README.md").read_text()


@pytest.mark.slow
def test_the_same_seed_gives_the_same_figures(folder, tmp_path):
    again = run_demo(tmp_path / "again", 5)
    for name in ("pretrained", "classifier_trained"):
        first, second = (
            [entry.get("loss", entry.get("eval_loss")) for entry in json.loads(file.read_text())["log_history"]]
            for file in (folder / name / "trainer_state.json", again / name / "trainer_state.json")
        )
        assert first == second and len(first) > 3 and None not in first[:-1]
    assert (again / "demo.json").read_text() == (folder / "demo.json").read_text()
    for picture in folder.glob("plots/*.png"):
        assert (again / "plots" / picture.name).read_bytes() == picture.read_bytes()


def test_a_folder_of_something_else_is_not_replaced(folder, tmp_path, capsys):
    (tmp_path / "thesis.txt").write_text("dear")
    assert main(["demo", "--output", str(tmp_path), "--overwrite"]) == 1
    assert "something other than a demo" in capsys.readouterr().err
    assert main(["demo", "--output", str(folder)]) == 1
    assert (tmp_path / "thesis.txt").read_text() == "dear"
    assert (folder / "report.html").exists()
