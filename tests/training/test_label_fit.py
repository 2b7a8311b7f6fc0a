"""Labels that do not fit the head are refused before the first step, and a head says what it predicts."""

import numpy as np
import pytest
from datasets import ClassLabel
from datasets import Dataset as HuggingFaceDataset
from torch.utils.data import Subset
from transformers import TrainingArguments

import stformer_hf as sf
from stformer_hf import (
    CellStore,
    CellTrainer,
    DataCollatorForCellClassification,
    GeneBertConfig,
    GeneBertForClassification,
    GeneTokenizer,
)

TWO = {"id2label": {0: "B cell", 1: "T cell"}, "label2id": {"B cell": 0, "T cell": 1}}
ONE_UNKNOWN = {"id2label": {0: "B cell", 1: "NK cell"}, "label2id": {"B cell": 0, "NK cell": 1}}
SEVERAL = {"problem_type": "multi_label_classification", "num_labels": 2}
KINDS = ("multi_label_classification", "regression")


@pytest.fixture
def cells(adata, tmp_path):
    """Cells with labels of every kind."""
    obs = adata.obs
    obs["is_b"] = obs["cell_type"] == "B cell"
    obs["is_t"] = (~obs["is_b"]).astype(int)
    obs["depth"] = obs["age"] / 7
    obs["cluster"] = obs["age"] % 5
    obs["five"] = obs["cluster"].astype(str).astype("category")
    return CellStore.build(tmp_path / "labelled", adata, obs="all", report=False)


def trainer_of(cells, label, tmp_path, eval_dataset=None, sampling=None, **head):
    tokenizer = GeneTokenizer(list(CellStore(tmp_path / "labelled").gene_ids), bin_edges=[0.5, 1.5], max_length=50)
    return CellTrainer(
        model=GeneBertForClassification(GeneBertConfig.from_tokenizer(tokenizer, size="tiny", **head)),
        args=TrainingArguments(tmp_path / "run", report_to="none", use_cpu=True, max_steps=1, save_strategy="no"),
        train_dataset=cells,
        eval_dataset=eval_dataset,
        data_collator=DataCollatorForCellClassification(tokenizer, label),
        processing_class=tokenizer,
        sampling=sampling,
    )


@pytest.mark.parametrize(
    ("label", "head", "words"),
    [
        (
            "five",
            {"num_labels": 2},
            r"'five' has 5 classes \('0', '1', '2', '3', '4'\), but the head has 2 classes: .*=5",
        ),
        ("cell_type", ONE_UNKNOWN, r"does not know: 'T cell'; the head has 2 classes \('B cell', 'NK cell'\)"),
        ("depth", {"num_labels": 2}, "'depth' holds numbers, but the head has 2 classes"),
        (
            "is_b",
            {"num_labels": 2},
            r"'is_b' holds booleans, but the head has 2.*CellStore.build\(…, classes=\['is_b'\]",
        ),
        ("cluster", {"num_labels": 5}, "'cluster' holds whole numbers, but the head has 5 classes"),
        (
            "cell_type",
            {"num_labels": 1},
            r"'cell_type' holds 2 classes .* predicts 1 numbers per cell \(regression\).*=2",
        ),
        (
            "depth",
            {"problem_type": "regression", "num_labels": 3},
            "1 columns of labels .*, but the head predicts 3 num",
        ),
        (["is_b", "is_t"], {"num_labels": 3}, "2 columns .*, but the head predicts 3 labels"),
        (
            ["is_b", "is_t"],
            {"problem_type": "single_label_classification"},
            "predicts one of 2 classes, but 2 label columns",
        ),
        (["is_b", "depth"], SEVERAL, "'depth' holds numbers from .* to .*, each 0 or 1"),
        (["is_t", "five"], SEVERAL, "'five' holds classes .* from 0 to 4, .*, each 0 or 1"),
    ],
)
def test_labels_that_do_not_fit_the_head_are_refused_with_both_named(cells, label, head, words, tmp_path):
    datasets = {"whole": cells, "selected": cells.select(range(40)), "subset": Subset(cells, range(40))}
    for dataset in datasets.values():
        with pytest.raises(ValueError, match=words):
            trainer_of(dataset, label, tmp_path, **head)


@pytest.mark.parametrize(
    ("label", "head", "kind", "names"),
    [
        ("cell_type", TWO, "single_label_classification", ["B cell", "T cell"]),
        ("five", {"num_labels": 5}, "single_label_classification", None),
        ("five", {"num_labels": 9}, "single_label_classification", None),  # there is room
        ("depth", {"num_labels": 1}, "regression", ["depth"]),
        ("cluster", {"num_labels": 1}, "regression", ["cluster"]),
        (["is_b", "is_t"], {"num_labels": 2}, "multi_label_classification", ["is_b", "is_t"]),
        (["depth", "age"], {"num_labels": 2, "problem_type": "regression"}, "regression", ["depth", "age"]),
    ],
)
def test_a_head_says_what_it_predicts_once_it_has_labels(cells, label, head, kind, names, tmp_path):
    trainer = trainer_of(cells, label, tmp_path, **head)
    trainer.train()
    config = trainer.model.config
    assert config.problem_type == kind
    if names is not None:
        assert list(config.id2label.values()) == names and list(config.label2id) == names


def test_a_class_that_no_chosen_cell_has_need_not_be_known(cells, tmp_path):
    of_b = cells.select((cells.obs["cell_type"] == "B cell").to_numpy())
    trainer_of(of_b, "cell_type", tmp_path, **ONE_UNKNOWN)
    with pytest.raises(ValueError, match="does not know: 'T cell'"):
        trainer_of(of_b, "cell_type", tmp_path, eval_dataset=cells, **ONE_UNKNOWN)


def test_labels_of_a_dataset_are_looked_at(cells, tmp_path):
    tokenizer = GeneTokenizer(list(cells.gene_ids), bin_edges=[0.5, 1.5], max_length=50)
    tokens = cells.tokenize(tokenizer, tmp_path / "tokens", obs=["cluster", "cell_type", "depth"])
    assert isinstance(tokens, HuggingFaceDataset) and isinstance(tokens.features["cell_type"], ClassLabel)
    trainer_of(tokens, "cluster", tmp_path, num_labels=5)  # there whole numbers are classes
    for label, head, words in (
        ("cluster", {"num_labels": 4}, "'cluster' goes up to 4, but the head has 4 classes"),
        ("cell_type", ONE_UNKNOWN, "does not know: 'T cell'"),
        ("depth", {"num_labels": 4}, "'depth' holds numbers, but the head has 4 classes"),
    ):
        with pytest.raises(ValueError, match=words):
            trainer_of(tokens, label, tmp_path, **head)


def test_minus_100_is_no_number_to_predict(adata, cells, tmp_path):
    """It marks cells without a label in transformers, so their losses would be left out."""
    adata.obs.loc[adata.obs_names[:3], "depth"] = -100.0
    cells = CellStore.build(tmp_path / "degrees", adata, obs=["depth"], report=False)
    with pytest.raises(ValueError, match="'depth' is -100 for 3 cells"):
        trainer_of(cells, "depth", tmp_path, num_labels=1)


def test_labels_given_to_evaluate_are_looked_at(cells, adata, tmp_path):
    trainer = trainer_of(cells, "depth", tmp_path, num_labels=1)
    adata.obs["depth"] = adata.obs["five"]
    with pytest.raises(ValueError, match="'depth' holds 5 classes"):
        trainer.evaluate(CellStore.build(tmp_path / "classes", adata, obs=["depth"], report=False))


@pytest.mark.parametrize(
    ("label", "n_outputs", "kind"),
    [
        ("five", 5, "single_label_classification"),
        ("depth", 1, "regression"),
        (["is_b", "is_t"], 2, "multi_label_classification"),
    ],
)
def test_the_model_of_a_trial_says_what_it_predicts(cells, label, n_outputs, kind, tmp_path):
    """It is made anew when training begins, without what the first one has learnt."""
    trainer = trainer_of(cells, label, tmp_path, num_labels=n_outputs)
    expected = trainer.model.config
    trainer.model_init = lambda: GeneBertForClassification(
        GeneBertConfig.from_tokenizer(trainer.processing_class, size="tiny", num_labels=n_outputs)
    )
    config = trainer.call_model_init().config
    assert config.problem_type == kind and config.id2label == expected.id2label


@pytest.mark.parametrize("label", ["cell_type", "depth"])
def test_cells_without_a_label_are_refused_before_the_first_step(adata, cells, tmp_path, label):
    adata.obs.loc[adata.obs_names[:2], label] = None
    some = CellStore.build(tmp_path / "some", adata, obs=["cell_type", "depth"], report=False)
    head = {"num_labels": 2 if label == "cell_type" else 1}
    with pytest.raises(ValueError, match=f"2 of 59 cells have no '{label}': leave them out"):
        trainer_of(some, label, tmp_path, **head)
    with pytest.raises(ValueError, match=f"2 of 59 cells have no '{label}'"):
        trainer_of(cells, label, tmp_path, eval_dataset={"held out": some}, **head)
    trainer_of(some.select(some.obs[label].notna()), label, tmp_path, **head)


def test_a_draw_may_leave_unlabelled_cells_out(adata, cells, tmp_path):
    adata.obs.loc[adata.obs_names[:2], "cell_type"] = None
    some = CellStore.build(tmp_path / "some", adata, obs=["cell_type"], report=False)
    trainer_of(some, "cell_type", tmp_path, sampling={"by": "cell_type"}, num_labels=2).train()


def test_text_that_names_cells_is_not_a_label(adata, caplog):
    adata.obs["barcode"] = [f"barcode {i}" for i in range(60)]
    with pytest.raises(ValueError, match="'barcode' is text with a different value for each cell"):
        sf.finetune(adata, "barcode", num_train_epochs=0)
    adata.obs["mixed"] = np.where(np.arange(60) % 3 == 0, "nan", adata.obs["cell_type"].astype(str))
    sf.finetune(adata, "mixed", num_train_epochs=0, init="random")
    assert "'mixed' has the class 'nan', like any other class" in caplog.text
