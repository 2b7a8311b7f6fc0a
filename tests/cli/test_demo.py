"""The demo, with few steps: its figures are there, of the right cells, and the same for the same seed."""

import json
import re

import numpy as np
import pytest

pytest.importorskip("scanpy")

from anndata import read_h5ad  # noqa: E402
from transformers import AutoModel, AutoModelForMaskedLM, AutoModelForSequenceClassification, AutoTokenizer  # noqa: E402

from stformer_hf.cli import demo, main  # noqa: E402


def run_demo(folder, seed):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "STEPS", {**demo.STEPS, "logging_steps": 1})
        patch.setattr(demo, "PRETRAINING_STEPS", {**demo.PRETRAINING_STEPS, "max_steps": 3})
        patch.setattr(demo, "FINETUNING_STEPS", {**demo.FINETUNING_STEPS, "num_train_epochs": 0.2})
        assert main(["demo", "--output", str(folder), "--seed", str(seed)]) == 0
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return run_demo(tmp_path_factory.mktemp("demo") / "out", 5)


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


def test_the_report_is_one_page_with_pictures_and_the_table(folder):
    report = (folder / "report.html").read_text()
    assert report.count('src="data:image/png;base64,') == 5
    assert not re.search(r'(src|href)="(?!data:)', report)
    table = json.loads((folder / "demo.json").read_text())["table"]
    assert len(table) == 4
    for name, row in table.items():
        assert name in report and f"{row['accuracy']:.3f}" in report and f"{row['macro_f1']:.3f}" in report
    for picture in ("pretraining", "fine_tuning", "confusion", "umap", "umap_before"):
        assert (folder / "plots" / f"{picture}.png").stat().st_size > 5_000


def test_the_table_is_of_the_held_out_cells(folder):
    table = json.loads((folder / "demo.json").read_text())["table"]
    annotated = read_h5ad(folder / "held_out_by_classifier.h5ad")
    held_out = demo.split_cells(demo.load_cells()[0], 5)[1]
    assert annotated.obs_names.tolist() == held_out.obs_names.tolist()
    right = annotated.obs["stformer_label"].astype(str) == held_out.obs["bulk_labels"].astype(str)
    assert table["GeneBert, pretrained and fine-tuned"]["accuracy"] == pytest.approx(right.mean())
    store = read_h5ad(folder / "train.h5ad")
    assert not set(store.obs_names) & set(held_out.obs_names)


def test_embeddings_and_checkpoints_are_there(folder):
    embedded = read_h5ad(folder / "cells_embedded_by_classifier.h5ad")
    assert embedded.obsm["X_stformer"].shape == (700, 128)
    tokenizer = AutoTokenizer.from_pretrained(folder / "classifier")
    batch = tokenizer(embedded[:3], padding=True, return_tensors="pt")
    for auto, name in (
        (AutoModel, "pretrained"),
        (AutoModelForMaskedLM, "pretrained"),
        (AutoModelForSequenceClassification, "classifier"),
    ):
        assert auto.from_pretrained(folder / name)(**batch)[0].shape[0] == 3
        assert "## Training" in (folder / name / "README.md").read_text()


def test_the_same_seed_gives_the_same_figures(folder, tmp_path):
    again = run_demo(tmp_path / "again", 5)
    for name in ("pretrained", "classifier", "classifier_from_scratch"):
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
