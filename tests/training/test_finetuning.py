"""Classifiers that start at linear models, and train on only where that helps."""

import copy
import json
import re

import anndata
import numpy as np
import pandas as pd
import pytest
import torch
from anndata import AnnData
from datasets import Dataset
from safetensors.numpy import load_file
from scipy import sparse
from scipy.special import log_softmax
from sklearn.linear_model import LogisticRegression
from transformers import AutoModelForSequenceClassification, TrainingArguments

import stformer_hf as sf
from stformer_hf import (
    CellNeighborhoodConfig,
    CellNeighborhoodModel,
    CellStore,
    CellTrainer,
    DataCollatorForCellClassification,
    GeneBertConfig,
    GeneBertForPhenotypicMLM,
    GeneTokenizer,
)
from stformer_hf.evaluation import cell_baselines
from stformer_hf.evaluation.cell_baselines import log_normalise
from stformer_hf.training import epoch_choice, finetuning, log_lines
from stformer_hf.training.calibration import load_out_of_fold
from stformer_hf.training.finetuning import finetune, predict, prepare_classifier
from stformer_hf.training.starts import cell_features, classifier_start
from stformer_hf.training.starts.cell_features import CellFeatures, cell_states, scaled
from stformer_hf.training.starts.labelled_cells import LabelledCells
from stformer_hf.training.starts.linear_readers import Problem
from stformer_hf.training.starts.spectral_start import count_blocks
from stformer_hf.training.starts.spectral_views import fit_spectral_views

pytestmark = pytest.mark.usefixtures("two_folds")


def make_cells(n: int = 240, n_genes: int = 60, n_types: int = 3, seed: int = 0) -> AnnData:
    """Types that differ in a few genes; one cell without counts, one without a type."""
    rng = np.random.default_rng(seed)
    types = np.arange(n) % n_types
    rates = np.random.default_rng(9).gamma(0.7, 1.0, n_genes) * np.ones((n_types, 1))
    for kind in range(n_types):
        rates[kind, kind * 6 : kind * 6 + 6] *= 4
    counts = rng.poisson(rates[types] * rng.gamma(4, 0.25, (n, 1)))
    counts[3] = 0
    obs = pd.DataFrame(
        {
            "type": pd.Categorical([f"T{i}" for i in types]),
            "copy": pd.Categorical([f"renamed {i}" for i in types]),
            "donor": pd.Categorical([f"d{i}" for i in np.arange(n) // (n // 6)]),
            "depth": counts[:, :6].sum(1) / np.maximum(counts.sum(1), 1),
            "a": (types == 0).astype(float),
            "b": (types != 1).astype(float),
        },
        index=[f"c{i}" for i in range(n)],
    )
    obs.loc["c5", "type"] = None
    var = pd.DataFrame(index=[f"ENSG{i:011d}" for i in range(n_genes)])
    return AnnData(sparse.csr_matrix(counts.astype(np.float32)), obs=obs, var=var)


@pytest.fixture(scope="module")
def labelled() -> AnnData:
    return make_cells()


@pytest.fixture(scope="module")
def unseen() -> AnnData:
    return make_cells(90, seed=1)


@pytest.fixture(scope="module")
def started(labelled):
    return finetune(labelled, "type", num_train_epochs=0)


def test_the_start_alone_classifies_unseen_cells(started, unseen):
    sf.annotate(unseen, started)
    found = unseen.obs["stformer_label"].astype(object)
    known = found.notna()
    assert known.sum() == 89 and (found == unseen.obs["type"].astype(str))[known].mean() > 0.85
    assert started.config.reader_weights and not started.training


def test_files_and_stores_are_read_by_their_path(labelled, started, unseen, tmp_path):
    """The cells in two files, and as a store, give the model of the AnnData."""
    labelled[:100].write_h5ad(tmp_path / "cells_1.h5ad")
    labelled[100:].write_h5ad(tmp_path / "cells_2.h5ad")
    CellStore.build(tmp_path / "store", labelled, obs=["type"])
    for cells in (str(tmp_path / "cells_*.h5ad"), tmp_path / "store"):
        found = finetune(cells, "type", num_train_epochs=0)
        sf.annotate(unseen, found, key_added="by_path")
        sf.annotate(unseen, started)
        np.testing.assert_allclose(
            unseen.obsm["by_path_probabilities"], unseen.obsm["stformer_probabilities"], atol=1e-5
        )
    unseen.write_h5ad(tmp_path / "unseen.h5ad")
    losses = []
    for i, cells in enumerate((unseen, tmp_path / "unseen.h5ad", _store_of(unseen))):
        finetune(labelled, "type", eval_cells=cells, output=tmp_path / str(i), num_train_epochs=1)
        (state,) = (tmp_path / str(i)).glob("checkpoint-*/trainer_state.json")
        history = json.loads(state.read_text())["log_history"]
        losses += [entry["eval_loss"] for entry in history if "eval_loss" in entry]
    assert len(losses) == 3 and len(set(losses)) == 1
    with pytest.raises(ValueError, match="no obs\\['kind'\\].*cells_1.h5ad"):
        finetune(str(tmp_path / "cells_*.h5ad"), "kind")


def test_cells_of_a_stream_are_read_as_the_stream_reads_them(labelled, unseen, started, tmp_path):
    """Files with counts in a layer, logarithms in X, and other ids: only the settings of the stream read them."""
    for i, part in enumerate((labelled[:100].copy(), labelled[100:].copy())):
        part.layers["raw_counts"], part.X = part.X, part.X.log1p()
        part.var_names = [f"old{name}" for name in part.var_names]
        part.write_h5ad(tmp_path / f"cells_{i}.h5ad")
    aliases = {f"old{name}": name for name in labelled.var_names}
    files = str(tmp_path / "cells_*.h5ad")
    stream = sf.IterableAnnDataset(
        *(files, started.tokenizer), layer="raw_counts", aliases=aliases, shuffle=True, rank=1, world_size=3
    )
    found = finetune(stream, "type", num_train_epochs=0)
    for name, model in (("stream", found), ("memory", started)):
        sf.annotate(unseen, model, key_added=name)
    np.testing.assert_allclose(unseen.obsm["stream_probabilities"], unseen.obsm["memory_probabilities"], atol=1e-5)
    with pytest.raises(ValueError, match="those of the stream"):
        finetune(stream, "type", layer="raw_counts")
    with pytest.raises(ValueError, match=r"no obs\['kind'\].*cells_0.h5ad"):
        finetune(stream, "kind")
    with pytest.raises(TypeError, match="pass its files"):
        finetune(Dataset.from_dict({"input_ids": [[1]]}).to_iterable_dataset(), "type")


def test_all_settings_of_a_stream_hold(labelled, unseen, tmp_path):
    """Estimates in two files whose genes have other ids, and one of the files twice; another layer for the others."""
    files = [tmp_path / "a.h5ad", tmp_path / "b.h5ad"]
    for i, file in enumerate(files):
        part = labelled[i::2].copy()
        part.X, part.var["gene_name"] = part.X / 2, [f"G{name}" for name in part.var_names]
        part.var_names = [f"ENSG{i + 1}{name[5:]}" for name in part.var_names]
        part.write_h5ad(file)
    settings = {"fractional": True, "unify": "symbol", "allow_duplicates": True}
    stream = sf.IterableAnnDataset([*files, files[0]], **settings)
    assert len(finetune(stream, "type", num_train_epochs=0).tokenizer.genes) == 60
    with pytest.raises(ValueError, match="The stream is a copy.*pass the stream itself, or its files"):
        finetune(copy.deepcopy(stream), "type")
    assert len(finetune(files[0], "type", fractional=True, num_train_epochs=0).tokenizer.genes) == 60
    unseen = unseen.copy()
    unseen.layers["own"], unseen.X = unseen.X, unseen.X.log1p()
    held_out = sf.IterableAnnDataset(unseen, layer="own")
    finetune(unseen, "type", layer="own", eval_cells=held_out, num_train_epochs=0)
    with pytest.raises(ValueError, match="those of the stream"):
        finetune(held_out, "type", layer="own", eval_cells=held_out)


def test_the_readers_choose_by_the_states_of_their_own_cells(labelled, started):
    """Of a pretrained model, whose encoder runs once on the cells of all label columns."""
    store = _store_of(labelled)
    features = CellFeatures(started, started.tokenizer, store, [np.arange(40, 60), np.arange(10, 30)])
    rows = np.array([12, 45, 20, 59])
    found = features.in_folds(rows, (None, None))(np.array([0, 2]), np.array([3, 1]))
    expected = cell_states(started, started.tokenizer, store.select(rows[[0, 2, 3, 1]]))
    np.testing.assert_allclose(np.concatenate(found), expected, atol=1e-5)


def test_the_wide_head_is_the_logistic_regression_that_was_fitted(labelled, started):
    """The model's logits, against the log values of the genes times the weights of the wide head, uncentred."""
    tokenizer = started.tokenizer
    batch = tokenizer(labelled[:20].copy(), padding=True, return_tensors="pt")
    statistics, head = started.gene_bert.cell_embedding.statistics, started.wide_head
    with torch.no_grad():
        found = head(started.gene_bert.read_cells(batch["cell_genes"], batch["cell_counts"]), statistics).numpy()
        weight = head.genes.weight.double().numpy()
        bias = (head.bias - statistics.means[0] @ head.genes.weight).double().numpy()
    expected = log_normalise(sparse.csr_array(labelled[:20].X.astype(float))) @ weight + bias
    full = labelled[:20].X.sum(axis=1).A1 > 0
    np.testing.assert_allclose(found[full], expected[full], atol=1e-4)


@pytest.fixture(scope="module")
def of_many(labelled, tmp_path_factory):
    """The start of 238 cells, of which 40 choose the regularisation."""
    folder = tmp_path_factory.mktemp("many")
    cells = CellStore.build(folder / "store", labelled, obs=["type", "donor"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(classifier_start, "MOST_CELLS_TO_CHOOSE", 40)
        arguments = TrainingArguments(folder / "model", report_to="none")
        return prepare_classifier(cells, "type", arguments, num_train_epochs=0)


def log_values_and_types(labelled):
    """Of the cells that have counts and a type, as `finetune` selects them."""
    has = labelled.obs["type"].notna().to_numpy() & (labelled.X.sum(axis=1).A1 > 0)
    return log_normalise(sparse.csr_array(labelled.X[has].astype(float))), labelled.obs["type"][
        has
    ].cat.codes.to_numpy()


def test_readers_are_fitted_to_all_cells_that_memory_allows(labelled, of_many, monkeypatch, caplog, tmp_path):
    """A few cells choose the regularisation, and all are fitted; with less memory a subset, and that is said."""
    expected = LogisticRegression(C=of_many.start[None].choice.wide, tol=1e-6, max_iter=5000)
    expected.fit(*log_values_and_types(labelled))
    weight = of_many.model.wide_head.genes.weight.detach().double().numpy()
    np.testing.assert_allclose(weight, expected.coef_.T, atol=0.01)
    arguments = TrainingArguments(tmp_path, report_to="none")
    monkeypatch.setattr(classifier_start, "MOST_CELLS_TO_CHOOSE", 40)
    monkeypatch.setattr(cell_baselines, "_FEW_CELLS", 50)
    for name, most in (("_MOST_VALUES", 100.5), ("_MOST_PRODUCTS", 301.5)):
        with monkeypatch.context() as patch:
            patch.setattr(cell_baselines, name, most * of_many.cells.lengths.mean())
            caplog.clear()
            prepare_classifier(of_many.cells, "type", arguments, num_train_epochs=0)
            assert "of genes is fitted to 100 of 238" in caplog.text
            assert "of [CLS] is fitted to 100 of 238" in caplog.text


def test_out_of_fold_predictions_are_of_readers_of_most_cells(labelled, of_many):
    """Not of readers of the few cells that choose the regularisation, whose temperature would be too low."""
    start = of_many.start[None]
    choice, tested = start.choice, start.out_of_fold.rows
    assert 40 < len(tested) < 238  # one of the two folds
    values, types = log_values_and_types(labelled)
    states = cell_states(of_many.model, of_many.tokenizer, of_many.cells)
    others = np.setdiff1d(np.arange(238), tested)
    outputs = sum(
        weight
        * LogisticRegression(C=c, tol=1e-6, max_iter=5000).fit(x[others], types[others]).predict_log_proba(x[tested])
        for x, c, weight in ((states, choice.head, choice.weights[0]), (values, choice.wide, choice.weights[1]))
    )
    expected = np.exp(log_softmax(outputs / choice.temperature, axis=1))
    np.testing.assert_allclose(np.exp(choice.out_of_fold), expected, atol=0.05)
    np.testing.assert_array_equal(start.out_of_fold.labels, types[tested])
    known = of_many.out_of_fold
    assert known.predictions.shape == (len(tested), 3) and known.distances.shape == (len(tested),)
    assert of_many.model.config.temperature == choice.temperature


@pytest.mark.filterwarnings("ignore:Observation names are not unique")
@pytest.mark.parametrize("split_by", [None, "donor"])
def test_copies_of_a_cell_are_in_one_fold_of_every_choice(labelled, monkeypatch, split_by):
    """Else out-of-fold predictions know the cell, and temperature and rejection are those of a model that is sure."""
    kept = labelled[_full(labelled) & labelled.obs["type"].notna().to_numpy()].copy()
    cells = anndata.concat([kept, kept[:150]])  # with the same names
    cells.obs["donor"] = pd.Categorical(np.repeat([f"d{i}" for i in range(8)], [40, 40, 40, 40, 40, 38, 75, 75]))
    folds = []
    for module in (classifier_start, epoch_choice):

        def seen(*args, of=module.inner_folds):
            folds.append(of(*args))
            return folds[-1]

        monkeypatch.setattr(module, "inner_folds", seen)
    model = finetune(cells, "type", split_by=split_by)
    assert len(folds) == 2  # of the linear models, and of the number of epochs
    names = cells.obs_names.to_numpy()
    for train, held_out, _ in [fold for of_choice in folds for fold in of_choice]:
        assert not set(names[train]) & set(names[held_out]) and len(train) + len(held_out) == len(cells)
    once = finetune(kept, "type", num_train_epochs=0)
    accuracy, of_once = (
        (of.predictions.argmax(1) == of.labels).mean() for of in (model.out_of_fold, once.out_of_fold)
    )
    assert abs(accuracy - of_once) < 0.1


@pytest.mark.filterwarnings("ignore:Observation names are not unique")
def test_groups_that_all_share_a_cell_are_refused(labelled):
    kept = labelled[_full(labelled) & labelled.obs["type"].notna().to_numpy()].copy()
    cells = anndata.concat([kept, kept[:1]])
    cells.obs["donor"] = pd.Categorical(np.repeat(["d0", "d1"], [100, len(cells) - 100]))
    with pytest.raises(ValueError, match="All groups of 'donor' share cells"):
        finetune(cells, "type", split_by="donor")


def test_groups_stay_whole_in_the_choice_by_many_cells(labelled, of_many, monkeypatch, tmp_path):
    """And all groups are predicted, with axes that are fitted without them."""
    monkeypatch.setattr(classifier_start, "MOST_CELLS_TO_CHOOSE", 40)
    arguments, folds, features = TrainingArguments(tmp_path, report_to="none"), [], []
    choose = classifier_start.choose_readers

    def kept(problem, labels, its_folds, *args, **kwargs):
        folds.append(its_folds)
        features.append(args[0])
        return choose(problem, labels, its_folds, *args, **kwargs)

    monkeypatch.setattr(classifier_start, "choose_readers", kept)
    found = prepare_classifier(of_many.cells, "type", arguments, num_train_epochs=0, split_by="donor")
    donors = found.cells.obs["donor"].to_numpy()
    assert len(folds) == 2 and len(found.start[None].out_of_fold.rows) == 238
    for train, held_out, _ in folds[1]:
        assert not set(donors[train]) & set(donors[held_out])
    train, held_out, _ = folds[1][0]
    known, others = (count_blocks(found.cells.select(rows), found.tokenizer) for rows in (train, held_out))
    axes = fit_spectral_views(known, 50)
    for of, blocks in zip(features[1](train, held_out), (known, others), strict=True):
        np.testing.assert_allclose(of, scaled(axes.transform(next(blocks())), of.shape[1] // 2), atol=1e-6)


def test_a_few_more_cells_than_choose(labelled, monkeypatch):
    """Fewer cells than classes are left out of the choice."""
    monkeypatch.setattr(classifier_start, "MOST_CELLS_TO_CHOOSE", 236)
    assert finetune(labelled, "type", num_train_epochs=0).out_of_fold.predictions.shape[1] == 3


def test_the_encoder_of_a_pretrained_model_runs_on_some_of_many_cells(labelled, started, monkeypatch, caplog):
    """The head is fitted to these, the genes to all; both choices leave the head a weight, as training needs it."""
    monkeypatch.setattr(classifier_start, "MOST_CELLS_TO_CHOOSE", 40)
    monkeypatch.setattr(classifier_start, "MOST_CELLS_TO_RUN", 100)
    states, choose, ran, needed = cell_features.cell_states, classifier_start.choose_readers, [], []

    def counted(model, tokenizer, cells):
        ran.append(len(cells))
        return states(model, tokenizer, cells)

    def kept(*args, needs_head, **kwargs):
        needed.append(needs_head)
        return choose(*args, needs_head=needs_head, **kwargs)

    monkeypatch.setattr(cell_features, "cell_states", counted)
    monkeypatch.setattr(classifier_start, "choose_readers", kept)
    finetune(labelled, "type", model=started, num_train_epochs=1, training={"max_steps": 1})
    assert "[CLS] is fitted to 100 of 238" in caplog.text and "of genes is fitted" not in caplog.text
    assert 100 <= ran[0] <= 140 and needed == [True, True]


@pytest.mark.parametrize("most", [40, 3000])
def test_long_waits_are_announced(labelled, monkeypatch, caplog, tmp_path, most):
    """Before the linear models are chosen, and before training is tried; also where few cells choose."""
    monkeypatch.setattr(classifier_start, "MOST_CELLS_TO_CHOOSE", most)
    monkeypatch.setattr(log_lines, "_SHORT", 0)
    monkeypatch.setattr(epoch_choice, "FEW_LABELS", 10)
    monkeypatch.setattr(epoch_choice, "_STEPS_TIMED", 2)
    arguments = TrainingArguments(tmp_path, report_to="none", per_device_train_batch_size=32)
    cells = CellStore.build(tmp_path / "store", labelled, obs=["type"])
    with caplog.at_level("INFO", "stformer_hf"):
        prepare_classifier(cells, "type", arguments)
    assert re.search(rf"Choosing linear models for {min(most, 238)} cells takes about \d+ s\.", caplog.text)
    assert re.search(r"Trying 3 epochs in one of 2 folds .* takes about \d+ s\.", caplog.text)


def test_the_model_says_what_its_readers_say_together(labelled, started):
    batch = started.tokenizer(labelled[:20].copy(), padding=True, return_tensors="pt")
    with torch.no_grad():
        logits = started(**batch).logits.double().numpy()
        hidden = started.gene_bert(**batch).last_hidden_state
        head = started.classifier(hidden[:, 0]).double().numpy()
        cells = started.gene_bert.read_cells(batch["cell_genes"], batch["cell_counts"])
        wide = started.wide_head(cells, started.gene_bert.cell_embedding.statistics).double().numpy()
    (a, b), temperature = started.config.reader_weights, started.config.temperature
    np.testing.assert_allclose(
        logits, (a * log_softmax(head, axis=1) + b * log_softmax(wide, axis=1)) / temperature, atol=1e-5
    )


def test_nothing_that_is_fitted_sees_other_cells(labelled, tmp_path):
    """Cells that are not in training may be anything."""
    store = CellStore.build(tmp_path / "store", labelled, obs=["type"], report=False)
    poisoned = labelled.copy()
    counts = poisoned.X.toarray()
    counts[120:] = 7
    poisoned.X = sparse.csr_matrix(counts)
    other = CellStore.build(tmp_path / "other", poisoned, obs=["type"], report=False)
    models = [finetune(cells.select(slice(0, 120)), "type", num_train_epochs=0) for cells in (store, other)]
    for (name, one), (_, two) in zip(*(model.state_dict().items() for model in models), strict=True):
        assert torch.equal(one, two), name


@pytest.mark.parametrize(("name", "parameter"), [("output_dir", "output"), ("num_train_epochs", "num_train_epochs")])
def test_settings_that_are_parameters_of_finetune_are_refused(name, parameter, labelled):
    with pytest.raises(ValueError, match=f"training: '{name}' is a parameter of finetune itself: pass {parameter}=…"):
        finetune(labelled, "type", training={name: 1})


def test_training_goes_on_for_the_epochs_asked_for_and_is_saved(labelled, unseen, tmp_path):
    model = finetune(labelled, "type", num_train_epochs=1, output=tmp_path / "m", training={"logging_steps": 5})
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "m").eval()
    batch = model.tokenizer(unseen, padding=True, return_tensors="pt")
    with torch.no_grad():
        assert torch.equal(loaded(**batch).logits, model(**batch).logits)
    sf.annotate(unseen, str(tmp_path / "m"))
    assert (unseen.obs["stformer_label"].astype(str) == unseen.obs["type"].astype(str)).mean() > 0.85


@pytest.mark.parametrize("epochs", [0, 1])
def test_the_folder_says_what_was_chosen(labelled, tmp_path, epochs):
    finetune(labelled, "type", num_train_epochs=epochs, output=tmp_path / "m")
    chosen = json.loads((tmp_path / "m" / "fine_tuning.json").read_text())
    assert (chosen["num_train_epochs"], chosen["label"]) == (epochs, "type") and "reader_weights" in chosen
    card = (tmp_path / "m" / "README.md").read_text()
    assert "inner_score_of_the_start" in card and "T1" in card and "masked genes" not in card


def test_training_reaches_the_encoder_although_the_genes_alone_are_better():
    """The class shows in many genes, all of them weakly, and in no component among the noise that genes share."""
    rng = np.random.default_rng(0)
    is_on = np.arange(200) % 2
    shared = np.exp(rng.normal(0, 1.2, (200, 30)) @ rng.normal(0, 0.5, (30, 400)))
    rates = shared * np.exp(np.outer(is_on - 0.5, rng.choice([-0.6, 0.6], 400)))
    obs = pd.DataFrame({"kind": pd.Categorical(np.take(["off", "on"], is_on))}).set_axis([f"c{i}" for i in range(200)])
    var = pd.DataFrame(index=[f"ENSG{i:011d}" for i in range(400)])
    cells = AnnData(sparse.csr_matrix(rng.poisson(rates).astype(np.float32)), obs=obs, var=var)
    assert finetune(cells, "kind", num_train_epochs=0).config.reader_weights == [0.0, 1.0]
    model = finetune(cells, "kind", num_train_epochs=1, max_length=32)
    assert model.config.reader_weights[0] > 0
    assert all(layer.attention.out_lin.weight.any() for layer in model.gene_bert.layers)


def test_out_of_fold_predictions_are_kept_only_of_models_trained_alike(labelled, unseen, tmp_path):
    model = finetune(labelled, "type", num_train_epochs=0, output=tmp_path / "m")
    calibration = load_file(tmp_path / "m" / "out_of_fold.safetensors")
    assert calibration["predictions"].shape == (238, 3) and len(calibration["labels"]) == 238
    assert (calibration["predictions"].argmax(1) == calibration["labels"]).mean() > 0.8
    np.testing.assert_array_equal(model.out_of_fold.predictions, calibration["predictions"])
    has_counts = np.asarray(labelled.X.sum(axis=1)).ravel() > 0
    kept = labelled[labelled.obs["type"].notna().to_numpy() & has_counts].copy()
    with torch.no_grad():
        batch = model.tokenizer(kept, padding=True, return_tensors="pt")
        states = model.base_model(**batch).last_hidden_state[:, 0].double().numpy()
    centroids = np.stack([states[(kept.obs["type"] == name).to_numpy()].mean(axis=0) for name in ("T0", "T1", "T2")])
    np.testing.assert_allclose(calibration["centroids"], centroids, atol=1e-4)
    of_training = np.linalg.norm(states[:, None] - centroids, axis=2).min(axis=1)
    assert np.corrcoef(of_training, calibration["distances"])[0, 1] > 0.7
    assert calibration["distances"].mean() == pytest.approx(of_training.mean(), rel=0.1)
    by_object, by_name = unseen.copy(), unseen.copy()
    sf.annotate(by_object, model, reject=0.1)
    sf.annotate(by_name, tmp_path / "m", reject=0.1)
    pd.testing.assert_frame_equal(by_object.obs, by_name.obs)
    model = finetune(labelled, "type", num_train_epochs=1, output=tmp_path / "m", training={"max_steps": 1})
    assert model.out_of_fold is None and not (tmp_path / "m" / "out_of_fold.safetensors").exists()
    for trained in (model, tmp_path / "m"):
        with pytest.raises(ValueError, match="no out-of-fold predictions"):
            sf.annotate(by_name, trained, reject=0.1)


def test_training_is_chosen_only_where_it_beats_the_start(labelled, monkeypatch):
    """The scores of inner folds decide; with few labels nothing is tried."""
    store_like = make_cells(180)
    monkeypatch.setattr(epoch_choice, "FEW_LABELS", 40)
    rng = np.random.default_rng(0)

    def outputs(better: float):
        def of(prepared, labels, train, held_out, arguments):
            base = rng.random(len(held_out)) < 0.8
            right = np.stack([base, base | (rng.random(len(held_out)) < better)])  # (epochs, cells)
            return np.eye(3)[np.where(right, labels[held_out], (labels[held_out] + 1) % 3)]

        return of

    for better, expected in ((0.0, 0), (0.9, 1)):
        tried, trained = [], []
        output = outputs(better)
        monkeypatch.setattr(
            epoch_choice, "_outputs_of_epochs", lambda *a, to=tried, of=output: to.append(a[3]) or of(*a)
        )
        monkeypatch.setattr(CellTrainer, "train", lambda self, to=trained, **_: to.append(self))
        model = finetune(store_like, "type")
        n_kept = len(np.concatenate(tried)) if expected else 178
        assert len(model.out_of_fold.labels) == n_kept, "the cells of the inner folds, or all"
        assert len(tried) == 1 + expected, "a second fold only after a gain in the first"
        assert len(trained) == expected and all(t.args.num_train_epochs == 1 for t in trained)
    monkeypatch.setattr(epoch_choice, "FEW_LABELS", 1000)
    monkeypatch.setattr(epoch_choice, "_outputs_of_epochs", None)
    finetune(store_like, "type")


@pytest.mark.usefixtures("two_folds")
def test_training_is_not_chosen_by_the_fold_that_it_is_judged_on(monkeypatch):
    """The first epoch is the best over all cells, but in neither fold is the best one of the other better."""
    shares = iter([(0.5, 1.0, 0.0), (0.5, 0.4, 1.0)])  # of cells that are right at the start and after each epoch

    def outputs(prepared, labels, train, held_out, arguments):
        right = np.arange(len(held_out)) < len(held_out) * np.array(next(shares))[:, None]
        return np.eye(3)[np.where(right, labels[held_out], (labels[held_out] + 1) % 3)]

    monkeypatch.setattr(epoch_choice, "FEW_LABELS", 40)
    monkeypatch.setattr(epoch_choice, "_outputs_of_epochs", outputs)
    monkeypatch.setattr(CellTrainer, "train", None)
    model = finetune(make_cells(180), "type")
    assert next(shares, None) is None and model.out_of_fold is not None


def test_the_gain_of_training_is_not_that_of_the_best_of_several_epochs():
    """With scores of chance the gain is 0 on average, and exceeds its standard error as often as it should."""
    rng = np.random.default_rng(0)
    draws = [[rng.random((40, 4)) for _ in range(2)] for _ in range(2000)]
    found = np.array([epoch_choice._gain_over_start(*folds) for folds in draws])
    best = np.array(
        [(np.concatenate(folds).mean(axis=0)[1:].max() - np.concatenate(folds)[:, 0].mean()) for folds in draws]
    )
    standard_error = found[:, 0].std() / np.sqrt(len(draws))
    assert abs(found[:, 0].mean()) < 4 * standard_error < best.mean(), "the best of three epochs would flatter"
    assert 0.10 < (found[:, 0] > found[:, 1]).mean() < 0.22, "16 % by chance"
    first, second = np.array([[0, 1, 0], [0, 1, 0.0]]), np.array([[0, 0, 1], [0, 1, 1.0], [1, 1, 1]])
    gain, error = epoch_choice._gain_over_start(first, second)  # epoch 2 in the first fold, and epoch 1 in the second
    np.testing.assert_allclose([gain, error], [1 / 5, np.std([0, 0, 0, 1, 0], ddof=1) / np.sqrt(5)])


def test_inner_outputs_are_those_of_cells_that_the_fold_has_not_seen(labelled, tmp_path):
    from transformers import TrainingArguments

    from stformer_hf.training.defaults import FINETUNING

    store = CellStore.build(tmp_path / "store", labelled, obs=["type"], report=False)
    arguments = TrainingArguments(str(tmp_path / "m"), **{**FINETUNING, "use_cpu": True})
    prepared = prepare_classifier(store, "type", arguments, num_train_epochs=0)
    labels = prepared.cells.obs["type"].cat.codes.to_numpy().astype(np.int64)
    before = {name: value.clone() for name, value in prepared.model.state_dict().items()}
    train, held_out = np.arange(0, 150), np.arange(150, 200)
    outputs = epoch_choice._outputs_of_epochs(prepared, labels, train, held_out, arguments)
    assert outputs.shape == (1 + epoch_choice.MOST_EPOCHS, 50, 3)
    assert (outputs[0].argmax(axis=1) == labels[held_out]).mean() > 0.7
    assert all(torch.equal(value, before[name]) for name, value in prepared.model.state_dict().items())


def test_a_checkpoint_keeps_its_embedding(labelled, tmp_path):
    tokenizer = GeneTokenizer(labelled.var_names.tolist(), whole_cell=True, max_length=16)
    model = GeneBertForPhenotypicMLM(GeneBertConfig.from_tokenizer(tokenizer, size="tiny"))
    sf.initialise_from_store(model, tokenizer, labelled)
    model.save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    weight = model.gene_bert.cell_embedding.genes.weight.detach()
    model.tokenizer = tokenizer
    few = labelled[: 3 * 8].copy()
    for pretrained in (str(tmp_path / "m"), model):
        found = finetune(few, "type", model=pretrained, num_train_epochs=0)
        assert torch.equal(found.gene_bert.cell_embedding.genes.weight, weight)
        cells = make_cells(90, seed=2)
        sf.annotate(cells, found)
        assert (cells.obs["stformer_label"].astype(str) == cells.obs["type"].astype(str)).mean() > 0.75


def test_phenotype_tokens_are_left_out_unless_named(labelled, tmp_path, caplog):
    """A phenotype may be the label by another name."""
    tokenizer = GeneTokenizer(
        labelled.var_names.tolist(), max_length=16, phenotypes={"copy": ["renamed 0", "renamed 1", "renamed 2"]}
    )
    model = GeneBertForPhenotypicMLM(GeneBertConfig.from_tokenizer(tokenizer, size="tiny"))
    model.save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    found = finetune(labelled, "type", model=str(tmp_path / "m"), num_train_epochs=0)
    assert found.tokenizer.included_phenotypes == [] and "copy are left out" in caplog.text
    found = finetune(labelled, "type", model=str(tmp_path / "m"), num_train_epochs=0, phenotypes=["copy"])
    assert found.tokenizer.included_phenotypes == ["copy"]


def test_numbers_several_labels_and_one_class(labelled, unseen):
    model = finetune(labelled, "depth", problem_type="regression", num_train_epochs=0)
    outputs = predict(model, model.tokenizer, _store_of(unseen))
    assert np.corrcoef(outputs[:, 0], unseen.obs["depth"].to_numpy()[_full(unseen)])[0, 1] > 0.9
    model = finetune(labelled, ["a", "b"], num_train_epochs=0)
    assert model.config.problem_type == "multi_label_classification"
    outputs = predict(model, model.tokenizer, _store_of(unseen))
    assert ((outputs > 0) == unseen.obs[["a", "b"]].to_numpy()[_full(unseen)]).mean() > 0.85
    store = _store_of(labelled)  # which knows three classes
    for cells in (store.select(store.obs["type"] == "T1"), labelled[labelled.obs["type"] == "T1"].copy()):
        with pytest.raises(ValueError, match="one class among the training cells, 'T1'"):
            finetune(cells, "type")


def test_annotate_writes_numbers_and_several_labels(labelled, unseen):
    sf.annotate(unseen, finetune(labelled, "depth", problem_type="regression", num_train_epochs=0))
    full = _full(unseen)
    assert np.corrcoef(unseen.obs["stformer_depth"][full], unseen.obs["depth"][full])[0, 1] > 0.9
    assert unseen.obs["stformer_depth"][~full].isna().all()
    sf.annotate(unseen, finetune(labelled, ["a", "b"], num_train_epochs=0), key_added="two")
    for name in ("a", "b"):
        assert ((unseen.obs[f"two_{name}"][full] > 0.5) == (unseen.obs[name][full] > 0)).mean() > 0.85


def test_the_wide_head_of_a_pretrained_model_reads_a_panel_as_the_model_does(labelled):
    """Readers are fitted on what the model reads, totals over the genes that it knows and the panel measures."""
    tokenizer = GeneTokenizer(labelled.var_names.tolist(), whole_cell=True, max_length=16)
    model = GeneBertForPhenotypicMLM(GeneBertConfig.from_tokenizer(tokenizer, size="tiny"))
    sf.initialise_from_store(model, tokenizer, labelled)
    model.tokenizer = tokenizer
    panel = labelled[:, :30].copy()
    found = finetune(panel, "type", model=model, num_train_epochs=0)
    batch = tokenizer(panel[:20].copy(), padding=True, return_tensors="pt")
    with torch.no_grad():
        cells = found.gene_bert.read_cells(batch["cell_genes"], batch["cell_counts"], None, batch["measured_genes"])
        values = np.zeros((20, 60))
        np.add.at(values, (np.arange(20)[:, None], batch["cell_genes"].numpy()), cells.log_values.view(20, -1).numpy())
    store = _store_of(panel)
    rows = store.select(np.arange(20 - (panel.X[:20].sum(axis=1).A1 == 0).sum()))
    expected = CellFeatures(found, tokenizer, store, []).log_values(next(count_blocks(rows, tokenizer, False)()))
    full = panel.X[:20].sum(axis=1).A1 > 0
    np.testing.assert_allclose(values[full], expected.toarray(), atol=1e-4)
    other = make_cells(90, seed=3)[:, :30].copy()
    sf.annotate(other, found)
    assert (other.obs["stformer_label"].astype(str) == other.obs["type"].astype(str)).mean() > 0.75


def _full(adata: AnnData) -> np.ndarray:
    return adata.X.sum(axis=1).A1 > 0


def _store_of(adata: AnnData) -> CellStore:
    import tempfile

    store = CellStore.build(f"{tempfile.mkdtemp()}/s", adata, obs=["type"], report=False)
    return store.select(store.lengths > 0)


def test_classes_of_one_group_leave_the_others_calibrated(labelled, caplog):
    """Of the cells of the first donor, half have a type that no other donor has, and no fold by donors can learn."""
    cells = labelled.copy()
    own = (cells.obs["donor"] == "d0").to_numpy() & (np.arange(cells.n_obs) % 2 == 0)
    cells.obs["type"] = cells.obs["type"].astype(object).mask(own, "of d0")
    model = finetune(cells, "type", split_by="donor", num_train_epochs=0)
    assert re.search(r"1 of 4 classes have cells of one 'donor' alone: .* these 20 cells", caplog.text)
    labels = model.out_of_fold.labels
    assert set(labels) == {0, 1, 2} and len(labels) == 238 - 20
    without = finetune(cells[~own].copy(), "type", split_by="donor", num_train_epochs=0)
    # 0.23 to 0.51, by version of torch
    assert abs(np.log(model.config.temperature / without.config.temperature)) < 0.7


def test_multiple_labels_are_zeros_and_ones(labelled):
    cells, settings = labelled.copy(), {"num_train_epochs": 0}
    cells.obs["is t0"] = cells.obs["type"] == "t0"
    for values in (np.arange(240) % 3, np.linspace(0, 1, 240), np.where(np.arange(240) % 2, 1, -1)):
        cells.obs["other"] = values
        with pytest.raises(ValueError, match="'other' holds .*, but multiple labels per cell are columns of 0 and 1"):
            finetune(cells, ["is t0", "other"], **settings)
    cells.obs["other"] = pd.array(np.where(np.arange(240) < 9, None, np.arange(240) % 2 == 0), dtype="boolean")
    model = finetune(cells, ["is t0", "other", "other"], num_train_epochs=1)  # missing for some, which are left out
    assert list(model.config.label2id) == ["is t0", "other"]


def test_of_multiple_labels_only_those_of_one_group_are_left_out(labelled, caplog):
    """All cells of d0 have a label that no other donor has: their other labels still choose and calibrate."""
    cells = labelled[labelled.obs["type"].notna().to_numpy() & (np.asarray(labelled.X.sum(axis=1)).ravel() > 0)].copy()
    for name in ("t0", "t1"):
        cells.obs[name] = (cells.obs["type"] == name).astype(int)
    cells.obs["of d0"] = (cells.obs["donor"] == "d0").astype(int)
    keys = ["t0", "t1", "of d0"]
    model = finetune(cells, keys, split_by="donor", num_train_epochs=0)
    own = (cells.obs["donor"] == "d0").to_numpy()
    assert (
        f"1 of 3 labels have cells of one 'donor' alone: no model that has not seen these {own.sum()}" in caplog.text
    )
    found = model.out_of_fold
    np.testing.assert_array_equal(found.rows, np.arange(len(own)))  # all cells count
    expected = cells.obs[keys].to_numpy(np.float32)
    expected[own, 2] = np.nan
    np.testing.assert_array_equal(found.labels, expected)
    np.testing.assert_array_equal(np.isnan(found.predictions), np.isnan(expected))
    assert 0.3 < model.config.temperature < 3
    cells.obs["t0"] = cells.obs["t1"] = cells.obs["of d0"]
    with pytest.raises(ValueError, match="Each of the 3 labels has cells of one 'donor' alone"):
        finetune(cells, keys, split_by="donor", num_train_epochs=0)


def test_training_is_calibrated_by_the_labels_that_its_folds_could_learn():
    column = LabelledCells(
        None, slice(None), Problem("multi_label_classification", 2), np.arange(4), np.eye(4, 2, dtype=np.float32)
    )
    outputs = np.arange(8.0).reshape(4, 2)
    folds = [(np.array([2, 3]), np.array([0, 1]), outputs[:2]), (np.array([0, 1]), np.array([2, 3]), outputs[2:])]
    found = epoch_choice._out_of_fold(column, folds)
    np.testing.assert_array_equal(found.labels, [[np.nan, 0], [0, np.nan], [0, 0], [0, 0]])
    np.testing.assert_array_equal(found.predictions, outputs)
    assert found.rows.tolist() == [0, 1, 2, 3]


def test_groups_stay_together_and_bad_input_is_refused(labelled, monkeypatch):
    seen = []
    original = finetuning.start_classifier
    monkeypatch.setattr(
        finetuning,
        "start_classifier",
        lambda *args, **kwargs: seen.append(kwargs["groups"]) or original(*args, **kwargs),
    )
    finetune(labelled, "type", split_by="donor", num_train_epochs=0)
    assert len(set(seen[0])) == 6
    with pytest.raises(ValueError, match=r"There is no obs\['nothing'\]"):
        finetune(labelled, "nothing")
    with pytest.raises(TypeError, match="label_key must be the name of an obs column, or a list of names; got 5"):
        finetune(labelled, 5)
    with pytest.raises(ValueError, match="Each of the 3 classes has cells of one 'copy' alone.*: leave out split_by"):
        finetune(labelled, "type", split_by="copy")
    one = labelled.copy()
    one.obs["site"] = np.where(one.obs["type"].isna() | (np.asarray(one.X.sum(axis=1)).ravel() == 0), "other", "here")
    with pytest.raises(
        ValueError, match="All usable cells have the same 'site', 'here', but validation needs another"
    ):
        finetune(one, "type", split_by="site")
    with pytest.raises(ValueError, match=r"There is no obs\['nobody'\]"):
        finetune(labelled, "type", split_by="nobody")
    with pytest.raises(ValueError, match="'depth' holds numbers, not categories. To predict numbers, pass"):
        finetune(labelled, "depth")
    nothing = labelled.copy()
    nothing.obs["type"] = np.nan
    with pytest.raises(ValueError, match="None of the 240 cells has a 'type'"):
        finetune(nothing, "type")
    with pytest.raises(ValueError, match="needs its tokenizer"):
        finetune(labelled, "type", model=GeneBertForPhenotypicMLM(GeneBertConfig.from_size("tiny")))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"init": "randon"}, "init='randon': must be one of 'spectral', 'random'"),
        ({"class_weights": "balance"}, "class_weights='balance': must be one of 'none', 'balanced'"),
        ({"problem_type": "regresion"}, "problem_type='regresion': must be one of"),
        ({"class_weights": "balanced", "label_key": ["a", "b"]}, "is for classes, and the problem is multi_label"),
    ],
)
def test_an_option_that_would_have_no_effect_is_refused(labelled, options, words):
    with pytest.raises(ValueError, match=words):
        finetune(labelled, **{"label_key": "type", "num_train_epochs": 0, **options})


def test_a_model_of_neighbourhoods_is_not_finetuned(labelled, started):
    config = CellNeighborhoodConfig.from_size("tiny", n_genes=60)
    with pytest.raises(ValueError, match="needs a GeneBert, but the model is a CellNeighborhoodModel"):
        finetune(labelled, "type", model=CellNeighborhoodModel(config), tokenizer=started.tokenizer)


def test_the_callers_tokenizer_keeps_its_phenotypes(labelled, tmp_path):
    store = CellStore.build(tmp_path / "store", labelled, obs=["type", "donor"], report=False)
    tokenizer = GeneTokenizer.from_store(store, phenotypes=["donor"], bin_edges=[0.5], max_length=16)
    GeneBertForPhenotypicMLM(GeneBertConfig.from_tokenizer(tokenizer, size="tiny")).save_pretrained(tmp_path / "m")
    prepared = prepare_classifier(
        store, "type", TrainingArguments(str(tmp_path / "run")), model=str(tmp_path / "m"), tokenizer=tokenizer
    )
    assert tokenizer.included_phenotypes == ["donor"] and prepared.tokenizer.included_phenotypes == []


def test_out_of_fold_predictions_do_not_outlive_their_model(labelled, tmp_path):
    model = finetune(labelled, "type", num_train_epochs=0, output=tmp_path / "m")
    assert model.out_of_fold is not None and load_out_of_fold(tmp_path / "m") is not None
    store = CellStore.build(tmp_path / "store", labelled, obs=["type"], report=False)
    trainer = CellTrainer(
        model=model,
        args=TrainingArguments(
            str(tmp_path / "m"), max_steps=1, save_strategy="no", report_to="none", disable_tqdm=True, use_cpu=True
        ),
        train_dataset=store.select(store.obs["type"].notna().to_numpy()),
        data_collator=DataCollatorForCellClassification(model.tokenizer, "type"),
        processing_class=model.tokenizer,
    )
    trainer.train()
    with pytest.raises(ValueError, match="not those of this model"):
        sf.annotate(labelled.copy(), model, reject=0.1)
    trainer.save_model()
    assert load_out_of_fold(tmp_path / "m") is None
