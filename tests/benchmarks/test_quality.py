"""benchmarks quality: splits, intervals, what fitted parts see, results that are kept, and the printed tables."""

import json

import numpy as np
import pytest
from anndata import AnnData
from scipy import sparse, stats

from benchmarks import quality, quality_data, quality_models
from benchmarks.quality_baselines import Baselines, LogView, ResidualView, log_normalise
from benchmarks.quality_data import GROUP, LABEL, few_splits, full_splits, load, simulate
from benchmarks.quality_statistics import interval, scores

BASELINES = ("majority", "lr", "pca50_lr", "trial_k30", "trial_k50")


@pytest.fixture(scope="module")
def cells() -> AnnData:
    """300 cells of three types, of 120, 90 and 90 cells."""
    found = simulate(n_cells=300, n_types=3, n_genes=400)
    names = np.repeat(["a", "b", "c"], [120, 90, 90])
    found.obs[LABEL] = names
    found.obs[LABEL] = found.obs[LABEL].astype("category")
    counts = found.X.toarray()
    for i, name in enumerate("abc"):
        counts[names == name, i * 30 : i * 30 + 30] += 3
    found.X = sparse.csr_matrix(counts)
    return found


def with_groups(cells: AnnData) -> AnnData:
    """15 groups of 20 cells; type c is in the last group only."""
    found = cells.copy()
    labels = np.where(np.arange(300) < 280, np.where(np.arange(300) % 2, "a", "b"), "c")
    found.obs[LABEL] = labels
    found.obs[GROUP] = [f"plate {i // 20}" for i in range(300)]
    for column in (LABEL, GROUP):
        found.obs[column] = found.obs[column].astype("category")
    return found


# ---------------------------------------------------------------------- splits


def test_folds_hold_each_cell_out_once_with_like_shares_of_types(cells):
    splits = full_splits(cells)
    assert len(splits) == 5
    assert sorted(np.concatenate([split.test for split in splits])) == list(range(300))
    labels = cells.obs[LABEL].to_numpy()
    for split in splits:
        assert sorted([*split.labelled, *split.test]) == list(range(300))
        assert [np.sum(labels[split.test] == name) for name in "abc"] == [24, 18, 18]


def test_groups_are_held_out_whole_and_absent_types_are_counted_apart(cells):
    cells = with_groups(cells)
    labels, groups = cells.obs[LABEL].to_numpy(), cells.obs[GROUP].to_numpy()
    splits = full_splits(cells)
    assert len(splits) == 3
    for split in splits:
        assert not set(groups[split.labelled]) & set(groups[split.test])
        assert set(labels[split.test]) <= set(labels[split.labelled])
        assert len(split.test) + split.n_absent == 60  # a fifth of 15 groups of 20 cells
        assert split.n_absent == (0 if "c" in labels[split.labelled] else 20)
    assert {split.n_absent for split in splits} == {0, 20}, "other seeds are needed for both cases"


@pytest.mark.parametrize(("n_labels", "n_types"), [(5, 3), (70, 3), (71, 0)])
def test_draws_have_the_same_number_of_labels_per_type_and_no_cell_twice(cells, n_labels, n_types):
    splits = few_splits(cells, n_labels)
    assert len(splits) == (20 if n_types else 0)  # with 71 labels, one type is left of those with 20 cells more
    labels = cells.obs[LABEL].to_numpy()
    for split in splits:
        names, counts = np.unique(labels[split.labelled], return_counts=True)
        assert list(counts) == [n_labels] * n_types
        used = np.concatenate([split.labelled, split.unlabelled, split.test])
        assert len(set(used)) == len(used) == np.isin(labels, names).sum()
        assert abs(len(split.unlabelled) - len(split.test)) <= 1
    assert len({tuple(split.labelled) for split in splits}) == len(splits)


def test_a_type_with_too_few_cells_takes_no_part_in_a_draw(cells):
    split = few_splits(cells[:200], 65)
    assert split == []  # 80 cells of b are too few for 65 + 20
    assert set(cells.obs[LABEL].to_numpy()[few_splits(cells[:270], 50)[0].test]) == {"a", "b"}


def test_draws_are_the_same_in_each_run(cells):
    first, again = few_splits(cells, 5), few_splits(cells, 5)
    for one, other in zip(first, again, strict=True):
        assert np.array_equal(one.labelled, other.labelled) and np.array_equal(one.test, other.test)


# ---------------------------------------------------------------------- loading


def test_a_set_whose_file_is_absent_says_which(tmp_path):
    with pytest.raises(FileNotFoundError, match="geact needs geact_fetal.h5ad"):
        load("geact", tmp_path)
    with pytest.raises(FileNotFoundError, match="--data_folder is not given: ifnb needs"):
        load("ifnb", None)


def test_real_sets_have_their_types_and_genes_only(shared_data):
    n_types = {"demo": 10, "citeseq": 5, "starmap": 10, "sympathetic": 8, "geact_plates": 36}
    for name, n in n_types.items():
        found = load(name, shared_data)
        counts = found.obs[LABEL].value_counts()
        assert len(counts) == n and counts.min() >= quality_data.SETS[name].min_cells
        assert (GROUP in found.obs) == (name == "geact_plates")
        if name == "citeseq":  # of 10 antibodies and 36,601 genes in the file
            assert found.n_vars == 36_601 and all(gene.startswith("ENSG") for gene in found.var_names)
    assert load("ifnb", shared_data).n_obs == 3_000


# ---------------------------------------------------------------------- statistics


def test_macro_f1_is_over_the_classes_of_the_true_labels():
    true = np.array(["a", "a", "b", "b"])
    assert scores(true, np.array(["a", "a", "b", "z"])) == {
        "accuracy": 0.75,
        "macro_f1": pytest.approx((1 + 2 / 3) / 2),  # z, which is no class of these cells, does not count as a third
    }


def test_the_plain_interval_is_that_of_a_paired_t_test():
    ours, theirs = np.array([0.9, 0.8, 0.85, 0.7]), np.array([0.85, 0.82, 0.8, 0.6])
    expected = stats.ttest_rel(ours, theirs).confidence_interval(0.95)
    assert interval(ours - theirs)[1:] == pytest.approx((expected.low, expected.high))
    assert interval(ours - theirs)[0] == pytest.approx(0.045)


def test_the_corrected_interval_is_wider_by_the_ratio_of_test_to_training_cells():
    differences = [0.01, 0.03, 0.02, 0.0, 0.04]
    mean, low, high = interval(differences)
    _, wide_low, wide_high = interval(differences, 0.25)
    assert (wide_high - wide_low) / (high - low) == pytest.approx(np.sqrt((0.2 + 0.25) / 0.2))
    assert (wide_high + wide_low) / 2 == pytest.approx(mean)
    with pytest.raises(ValueError, match="at least two splits, not 1"):
        interval([0.1])


# ---------------------------------------------------------------------- what is fitted


def test_residuals_are_those_of_the_formula_with_shares_of_the_fitted_cells(cells):
    fitted, others = cells.X[:200], cells.X[200:]
    view = ResidualView(fitted)
    dense, shares = others.toarray().astype(np.float64), np.asarray(fitted.sum(axis=0)).ravel() / fitted.sum()
    mu = dense.sum(axis=1, keepdims=True) * shares
    with np.errstate(divide="ignore", invalid="ignore"):
        expected = np.clip((dense - mu) / np.sqrt(mu + mu**2 / 100), -np.sqrt(200), np.sqrt(200))
    assert np.allclose(view._residuals(others), expected[:, view.genes], atol=1e-4)


def test_components_of_fitted_cells_are_their_principal_components(cells):
    view = LogView(cells.X)
    rows = log_normalise(cells.X)[:, view.genes].toarray().astype(np.float64)
    singular = np.linalg.svd(rows - rows.mean(axis=0), compute_uv=False)[:5]
    assert np.allclose(np.linalg.norm(view.project(cells.X)[:, :5], axis=0), singular, rtol=0.02)


@pytest.mark.parametrize("row", BASELINES)
def test_a_baseline_does_not_see_the_cells_that_it_predicts(cells, row):
    rng = np.random.default_rng(0)
    order = rng.permutation(300)
    labelled, unlabelled, test = np.split(order, [100, 200])
    labels = cells.obs[LABEL].astype(str).to_numpy()
    poison = sparse.csr_matrix(rng.poisson(500, (90, cells.n_vars)).astype(np.float32))
    clean = Baselines(cells.X[labelled], labels[labelled], cells.X[unlabelled])
    poisoned = Baselines(cells.X[labelled], labels[labelled], cells.X[unlabelled])
    expected = clean.log_probabilities(row, cells.X[test])
    # Other cells, predicted before them or with them, change nothing.
    poisoned.predict(row, poison)
    found = poisoned.log_probabilities(row, sparse.vstack([cells.X[test[:10]], poison], format="csr"))
    assert np.allclose(found[:10], expected[:10], atol=1e-3)
    if row != "majority":
        assert np.mean(clean.predict(row, cells.X[test]) == labels[test]) > 0.8


def test_components_are_fitted_on_cells_without_labels_too(cells):
    labels = cells.obs[LABEL].astype(str).to_numpy()[::10]
    some, all_cells = (Baselines(cells.X[::10], labels, cells.X[1::2][:n]) for n in (10, 150))
    for row, same in (("lr", True), ("pca50_lr", False), ("trial_k30", False)):
        found = [fitted.log_probabilities(row, cells.X[1::2]) for fitted in (some, all_cells)]
        assert np.allclose(*found) == same


def test_the_trial_is_the_sum_of_two_readers(cells):
    labels = cells.obs[LABEL].astype(str).to_numpy()
    fitted = Baselines(cells.X[::2], labels[::2], cells.X[:0])
    genes = fitted.log_probabilities("lr", cells.X[1::2])
    views = fitted._views(cells.X[1::2], 30)
    assert views.shape == (150, 60)
    assert np.allclose(np.linalg.norm(views[:, :30], axis=1), np.sqrt(30), rtol=1e-4)
    both = genes + fitted._on_views(30).predict_log_proba(views)
    assert list(fitted.predict("trial_k30", cells.X[1::2])) == list(np.array(["a", "b", "c"])[both.argmax(axis=1)])


# ---------------------------------------------------------------------- runs


@pytest.fixture
def only_these(cells, monkeypatch):
    """Both sets of a run are these cells; one has groups."""
    sets = {
        "cells": quality_data.DataSet(lambda path: cells, LABEL),
        "plates": quality_data.DataSet(lambda path: with_groups(cells), LABEL, groups=GROUP, few=False),
    }
    for module in (quality_data, quality):
        monkeypatch.setattr(module, "SETS", sets)
    monkeypatch.setattr(quality, "LABELS_PER_CLASS", (5,))
    monkeypatch.setattr(quality_data, "N_DRAWS", 2)


@pytest.mark.slow
def test_models_get_no_label_and_no_test_cell(cells, only_these, monkeypatch, tmp_path):
    seen = []

    def classify(row, *parts, seed, folder=None):
        *training, test = parts
        names = [set(part.obs_names) for part in parts]
        assert sum(map(len, names)) == len(set.union(*names)), "a cell is in two parts"
        assert list(test.obs.columns) == [] and not test.uns and not test.obsm
        assert all(list(part.obs.columns) == [] for part in training[1:])
        assert list(training[0].obs.columns)[:1] == [LABEL]
        assert len(training[0].obs[LABEL].cat.categories) == training[0].obs[LABEL].nunique()
        seen.append((row, len(training), GROUP in training[0].obs, seed))
        return np.full(test.n_obs, "a")

    def embed(these, seed):
        assert list(these.obs.columns) == []
        return these.X.toarray()

    monkeypatch.setattr(quality_models, "classify", classify)
    monkeypatch.setattr(quality_models, "classify_few", classify)
    monkeypatch.setattr(quality_models, "embed", embed)
    quality.run(["--rows", "start", "--sets", "cells", "plates", "--output", str(tmp_path / "q.json")])
    assert [entry for entry in seen if entry[1] == 1 and not entry[2]] == [("start", 1, False, i) for i in range(5)]
    assert [entry for entry in seen if entry[1] == 1 and entry[2]] == [("start", 1, True, i) for i in range(3)]
    assert [entry for entry in seen if entry[1] == 2] == [("start", 2, False, i) for i in range(2)]


def test_results_are_kept_and_only_missing_ones_are_computed(only_these, monkeypatch, tmp_path, capsys):
    output = tmp_path / "q.json"
    flags = ["--sets", "cells", "--tables", "full", "--output", str(output)]
    quality.run([*flags, "--rows", "lr"])
    first = json.loads(output.read_text())["results"]
    assert [record["split"] for record in first] == list(range(5))
    for record in first:
        record["accuracy"] = 0.125
    output.write_text(json.dumps({"results": first}))
    quality.run([*flags, "--rows", "lr", "pca50_lr", "trial_k30"])
    held = json.loads(output.read_text())["results"]
    assert len(held) == 15
    assert {record["accuracy"] for record in held if record["row"] == "lr"} == {0.125}
    printed = capsys.readouterr().out
    assert "| cells | 300 cells, 3 types | lr | 0.125 ± 0.000 |" in printed
    assert "] pca50_lr |" in printed  # the better one
    quality.run([*flags, "--rows", "lr", "--overwrite"])
    held = json.loads(output.read_text())["results"]
    assert len(held) == 15 and min(record["accuracy"] for record in held) > 0.5


def test_the_printed_difference_is_that_of_the_same_splits(only_these, tmp_path, capsys):
    results = quality.Results(tmp_path / "q.json")
    sizes = {"n_train": 80, "n_test": 20, "n_cells": 100, "n_classes": 2, "n_absent": 0}
    figures = {"lr": [0.5, 0.7, 0.6], "pca50_lr": [0.4, 0.5, 0.6], "start": [0.6, 0.9]}  # start has no third split yet
    for row, values in figures.items():
        for split, value in enumerate(values):
            results.add(("full", "x", 0, split, row), {"accuracy": value, "macro_f1": value, **sizes})
            results.add(("few", "x", 5, split, row), {"accuracy": value, "macro_f1": value, **sizes})
    full, few = results.tables().split("### Few labels")
    mean, low, high = interval([0.1, 0.2], 0.25)
    assert f"{mean:+.3f} [{low:+.3f}, {high:+.3f}] lr" in full
    mean, low, high = interval([0.1, 0.2])
    assert f"{mean:+.3f} [{low:+.3f}, {high:+.3f}] lr | no |" in few
    assert "**0.750 ± 0.212**" in full


@pytest.mark.slow  # several seconds
def test_embeddings_are_scored_by_cells_whose_labels_nothing_learned(cells):
    labels = cells.obs[LABEL].astype(str).to_numpy()
    split, rng = full_splits(cells)[0], np.random.default_rng(0)
    states = np.eye(3)[np.searchsorted(["a", "b", "c"], labels)] + rng.normal(0, 0.05, (300, 3))
    clusterings = quality.cluster(states)
    assert {resolution: len(found) for resolution, found in clusterings.items()} == dict.fromkeys(
        quality.RESOLUTIONS, 5
    )
    good = quality.score_embedding(states, labels, split, clusterings)
    assert good["knn"] == good["probe"] == good["ari_best"] == 1 and 0.3 < good["ari"] <= 1
    noise = quality.score_embedding(rng.normal(size=(300, 3)), labels, split, {1.0: [rng.integers(0, 3, 300)]})
    assert noise["knn"] < 0.6 and noise["probe"] < 0.6 and abs(noise["ari"]) < 0.15
    # Labels of test cells reach nothing that is fitted; with one label among them, no cluster says more than chance.
    other = labels.copy()
    other[split.test] = "z"
    poisoned = quality.score_embedding(states, other, split, clusterings)
    assert poisoned["knn"] == poisoned["probe"] == poisoned["ari"] == 0


@pytest.mark.slow
def test_simulated_cells_are_of_the_size_that_is_promised():
    found = simulate()
    assert found.shape[0] == 2_100 and found.obs[LABEL].nunique() == 9
    assert 800 < found.X.nnz / found.n_obs < 900
    assert (found.X != simulate().X).nnz == 0


@pytest.mark.slow
def test_training_is_chosen_where_no_linear_model_tells_the_classes():
    found = quality_data.simulate_interaction()
    assert abs(found.obs[LABEL].value_counts(normalize=True)["one"] - 0.5) < 0.05
    train, test = found[:1_600].copy(), found[1_600:].copy()
    predicted = {row: quality_models.classify(row, train, test, seed=0) for row in ("start", "finetuned")}
    baseline = Baselines(train.X, train.obs[LABEL].to_numpy(), found.X[:0]).predict("lr", test.X)
    true = test.obs[LABEL].astype(str).to_numpy()
    right = {row: (of == true).mean() for row, of in {**predicted, "lr": baseline}.items()}
    assert right["lr"] < 0.6 and right["start"] < 0.75 and right["finetuned"] > 0.95


@pytest.mark.slow  # starts the command with all that it imports
def test_the_fine_tuning_of_simulated_cells_is_a_process_that_is_timed():
    flags = ["--max_steps", "1", "--size", "tiny", "--held_out", "0"]
    found = quality.time_simulated(flags, n_cells=60, n_types=2, n_genes=200)
    assert found["cells"] == 60 and found["types"] == 2
    assert found["finetune seconds"] > 0 and found["finetune peak MB"] > 50
    assert "stformer-hf finetune" in quality.simulated_table(found)


@pytest.mark.slow  # starts processes
def test_the_start_of_simulated_cells_is_timed_beside_that_of_fewer(tmp_path, capsys):
    quality.run(["--start", "3000", "--output", str(tmp_path / "found.json")])
    found = json.loads((tmp_path / "found.json").read_text())["start"]
    assert [row["runs"][0]["cells"] for row in found.values()] == [300, 3000]
    assert all(row["cells_per_second"] > 0 and row["peak_mb"] > 50 for row in found.values())
    assert "3,000 cells" in capsys.readouterr().out


@pytest.mark.slow
def test_a_fine_tuning_that_fails_shows_its_output():
    with pytest.raises(RuntimeError, match="no_such_flag"):
        quality.time_simulated(["--no_such_flag", "1"], n_cells=60, n_types=2, n_genes=200)
