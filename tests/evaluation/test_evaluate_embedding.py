"""Embeddings against baselines: what the figures are, and that nothing fitted sees a held-out cell."""

import json
import logging
import sys
from importlib import import_module
from importlib.util import find_spec
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from scipy import sparse
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold
from sklearn.neighbors import KNeighborsClassifier

from stformer_hf import evaluate_embedding
from stformer_hf.evaluation.evaluation_result import CEILING, METRICS

module = import_module("stformer_hf.evaluation.evaluate_embedding")
PCA, GENES = "PCA of genes", "LR on genes"


def make_cells(sizes=(60, 60, 30, 30), seed: int = 0) -> AnnData:
    """Cells of four types that differ in 12 genes each, with a good, a worse and a random embedding."""
    rng = np.random.default_rng(seed)
    types = np.repeat(np.arange(len(sizes)), sizes)
    types = rng.permutation(types)
    means = np.full((len(types), 60), 0.6)
    for cell, kind in enumerate(types):
        means[cell, 12 * kind : 12 * kind + 12] = 1.3
    obs = pd.DataFrame(
        {
            "type": pd.Categorical.from_codes(types, [f"type {i}" for i in range(len(sizes))]),
            "batch": rng.choice(["p", "q"], len(types)),
            "donor": rng.integers(0, 8, len(types)).astype(str),
        },
        index=[f"cell{i}" for i in range(len(types))],
    )
    adata = AnnData(sparse.csr_matrix(rng.poisson(means).astype(np.float32)), obs=obs)
    adata.var_names = [f"ENSG{i:011d}" for i in range(60)]
    adata.obsm["good"] = np.eye(8)[types] + rng.normal(0, 0.3, (len(types), 8))
    adata.obsm["worse"] = (np.eye(8)[types] + rng.normal(0, 0.7, (len(types), 8))).astype(np.float32)
    adata.obsm["noise"] = rng.normal(size=(len(types), 8))
    return adata


@pytest.fixture(scope="module")
def cells() -> AnnData:
    return make_cells()


@pytest.fixture(scope="module")
def found(cells):
    before = cells.copy()
    result = evaluate_embedding(cells, ["good", "worse", "noise"], label_key="type", batch_key="batch", n_splits=4)
    assert list(cells.uns) == [] and list(cells.obsm) == list(before.obsm)
    pd.testing.assert_frame_equal(cells.obs, before.obs)
    return result


def test_good_embeddings_come_before_worse_ones_and_noise(found):
    pytest.importorskip("igraph", reason="igraph, which Leiden clusters need, is not installed")
    table = found.table
    assert table.index.tolist() == ["good", "worse", "noise", PCA, GENES, CEILING]
    absent = {"probe_50"} | (set() if find_spec("scib_metrics") else {"batch_kbet"})
    assert [metric for metric in METRICS if metric in table] == [of for of in METRICS if of not in absent]
    judged = [metric for metric in METRICS[:11] if metric in table]
    for metric in judged:
        assert table.loc["good", metric] > table.loc["worse", metric] > table.loc["noise", metric], metric
    assert table.loc["good", "knn_accuracy"] > 0.9 > 0.6 > table.loc["noise", "knn_accuracy"]
    assert abs(table.loc["noise", "leiden_ari"]) < 0.1
    assert table.loc["noise", "batch_ilisi"] > 0.8  # batches that mean nothing are mixed
    assert table.loc[GENES, ["probe_all", "probe_20"]].notna().all()
    assert table.loc[GENES, ["knn_accuracy", "silhouette", "batch_pcr"]].isna().all()
    assert table.loc[CEILING, ["knn_accuracy", "probe_all", "leiden_ari"]].notna().all()


def test_figures_of_given_embeddings_are_those_of_scikit_learn(cells, found):
    labels, embedding = cells.obs["type"].astype(str).to_numpy(), cells.obsm["worse"].astype(np.float64)
    knn, probe = [], []
    for train, test in StratifiedKFold(4, shuffle=True, random_state=0).split(labels, labels):
        knn.append(KNeighborsClassifier(15).fit(embedding[train], labels[train]).score(embedding[test], labels[test]))
        centred = embedding - embedding[train].mean(axis=0)
        scaled = centred / np.sqrt((centred[train] ** 2).mean())
        probe.append(
            LogisticRegression(max_iter=2000).fit(scaled[train], labels[train]).score(scaled[test], labels[test])
        )
    for metric, expected in (("knn_accuracy", knn), ("probe_all", probe)):
        values = found.values.query("row == 'worse' and metric == @metric")
        assert values["value"].tolist() == pytest.approx(expected)
        line = found.summary.set_index(["row", "metric"]).loc["worse", metric]
        assert line["value"] == pytest.approx(np.mean(expected)) and line["sd"] == pytest.approx(
            np.std(expected, ddof=1)
        )
        assert line["low"] < line["value"] < line["high"]


def test_few_labels_are_of_classes_with_enough_cells_and_the_draws_are_the_same_for_all_rows(cells, monkeypatch):
    drawn = []

    def recorded(*args):
        drawn.append(tuple(draw(*args)))
        return np.array(drawn[-1])

    draw = module.draw_labelled
    monkeypatch.setattr(module, "draw_labelled", recorded)
    found = evaluate_embedding(
        make_cells((60, 60, 30, 24)), ["good", "noise"], label_key="type", baselines=[], n_splits=2, n_draws=3
    )
    assert found.settings["classes_of_few_labels"] == {
        "5": [f"type {i}" for i in range(3)],
        "20": ["type 0", "type 1"],
    }
    assert found.table["classes_5"].tolist() == [3] * 3
    assert "probe_50" not in found.table and any("No column for 50 labels" in note for note in found.notes)
    of_row = len(drawn) // 2
    assert of_row == 2 * 3 * 2  # folds, draws, numbers of labels
    assert drawn[:of_row] == drawn[of_row:]
    assert len(set(drawn[:of_row])) == of_row


def test_what_is_fitted_does_not_change_with_held_out_cells(cells, monkeypatch):
    """Held-out cells of the first fold get wild counts: what that fold fits must stay the same to the last bit."""
    names = ("fit_pca", "fit_scaler", "fit_probe", "fit_knn")
    fitted: list = []

    def record(name, fit):
        def recorded(*args):
            fitted.append((name, fit(*args)))
            return fitted[-1][1]

        return recorded

    for name in names:
        monkeypatch.setattr(module, name, record(name, getattr(module, name)))
    in_order = []
    monkeypatch.setattr(module, "_compare_cells", lambda *args: {})
    monkeypatch.setattr(module, "measure_ceiling", lambda *args: SimpleNamespace(halves=[np.zeros((180, 1))] * 2))
    monkeypatch.setattr(module, "_read_ceiling", lambda *args: {"probe_all": 1.0})
    monkeypatch.setattr(module, "cluster_agreement", lambda *args: {})
    represent = module.Row.represent

    def marked(row, train):  # where each row is asked for the cells of a fold
        fitted.append(("fold", row.name))
        return represent(row, train)

    monkeypatch.setattr(module.Row, "represent", marked)
    clean = cells.copy()
    clean.obsm["X"] = clean.X.toarray()  # an embedding that is poisoned with the counts
    labels = clean.obs["type"].astype(str).to_numpy()
    test = next(StratifiedKFold(3, shuffle=True, random_state=0).split(labels, labels))[1]
    poisoned = clean.copy()
    wild = clean.X.toarray()
    wild[test] = np.random.default_rng(9).poisson(200, wild[test].shape)
    poisoned.X = sparse.csr_matrix(wild)
    poisoned.obsm["X"] = wild
    for adata in (clean, poisoned):
        fitted.clear()
        evaluate_embedding(adata, ["X"], label_key="type", n_splits=3)
        in_order.append([(name, _numbers(what)) for name, what in _of_first_fold(fitted)])
    kinds = [name for name, _ in in_order[0]]
    assert kinds.count("fit_knn") == 2 and kinds.count("fit_scaler") == 2 and kinds.count("fit_pca") == 1
    assert kinds.count("fit_probe") == 3 * (1 + 2 * 4)  # all labels, and four draws of 5 and of 20
    assert kinds == [name for name, _ in in_order[1]]
    for (name, before), (_, after) in zip(*in_order, strict=True):
        for one, other in zip(before, after, strict=True):
            assert np.array_equal(one, other), name


def _of_first_fold(fitted):
    """What each row fitted between its first mark and its second."""
    seen: dict[str, int] = {}
    row = None
    for name, what in fitted:
        if name == "fold":
            row = what
            seen[row] = seen.get(row, 0) + 1
        elif row is not None and seen[row] == 1:
            yield name, what


def _numbers(what) -> list[np.ndarray]:
    """All that a fitted object has learnt, as arrays."""
    if hasattr(what, "classifier"):
        return [what.train.toarray(), what.basis, *_numbers(what.classifier)]
    if hasattr(what, "coef_"):
        return [what.coef_, what.intercept_]
    if hasattr(what, "_fit_X"):
        return [what._fit_X, what._y]
    if hasattr(what, "pca"):
        return [what.genes, what.pca.components_, what.pca.mean_]
    return [what.mean, np.array(what.scale)]


def test_twins_are_not_on_both_sides(monkeypatch):
    adata = make_cells((40, 40))
    other = adata[:40].copy()
    other.obs_names = [f"{name}-1" for name in other.obs_names]
    both = AnnData(
        sparse.vstack([adata.X, other.X]).tocsr(),
        obs=pd.concat([adata.obs, other.obs]),
        var=adata.var,
        obsm={"noise": np.vstack([adata.obsm["noise"], other.obsm["noise"]])},
    )
    folds = []
    make = module.make_folds
    monkeypatch.setattr(module, "make_folds", lambda *args, **kwargs: folds.extend(make(*args, **kwargs)) or folds)
    found = evaluate_embedding(both, ["noise"], label_key="type", baselines=[], n_splits=4)
    assert len(folds) == 4
    for fold in folds:
        assert not {i % 80 for i in fold.train} & {i % 80 for i in fold.test}
    assert any(note.startswith("40 cells are copies of others") for note in found.notes)


@pytest.mark.slow
def test_the_same_seed_gives_the_same_figures_and_another_seed_others(cells):
    def run(seed):
        return evaluate_embedding(cells, ["worse"], label_key="type", n_splits=3, n_repeats=2, seed=seed)

    first, again, other = run(0), run(0), run(1)
    pd.testing.assert_frame_equal(first.values, again.values)
    assert not first.values["value"].equals(other.values["value"])
    folds = first.values.query("row == 'worse' and metric == 'probe_all'")
    assert folds[["repeat", "fold"]].to_numpy().tolist() == [[r, f] for r in range(2) for f in range(3)]


@pytest.mark.parametrize("engine", ["local", pytest.param("ray", marks=pytest.mark.slow)])
def test_figures_do_not_depend_on_the_workers(engine):
    if engine == "ray":
        pytest.importorskip("ray", reason="the engine ray needs its extra")
    cells = make_cells((30, 30))
    options = {"label_key": "type", "batch_key": "batch", "n_splits": 2}
    alone = evaluate_embedding(cells, ["good"], **options)
    shared = evaluate_embedding(cells, ["good"], **options, workers=2, engine=engine)
    pd.testing.assert_frame_equal(shared.values, alone.values, check_exact=True)
    assert (shared.settings, shared.notes) == (alone.settings, alone.notes)


def test_groups_are_held_out_whole_and_classes_without_training_cells_are_not_scored(cells, monkeypatch):
    adata = cells.copy()
    adata.obs["donor"] = np.where(adata.obs["type"] == "type 3", "alone", adata.obs["donor"])
    scored = []
    read = module._read_labels
    monkeypatch.setattr(module, "_read_labels", lambda *args: scored.append(args[2]) or read(*args))
    found = evaluate_embedding(adata, ["good"], label_key="type", split_by="donor", baselines=[], n_splits=3)
    donors = adata.obs["donor"].to_numpy()
    assert len(scored) == 3
    for fold in scored:
        assert not set(donors[fold.train]) & set(donors[fold.test])
        assert "type 3" not in adata.obs["type"].iloc[fold.test].tolist()
    assert any(
        "30 held-out cells are not scored, as their classes have no training cell (type 3)" in note
        for note in found.notes
    )
    assert found.settings["classes_of_few_labels"]["5"] == [
        f"type {i}" for i in range(4)
    ]  # type 3 in two of the folds
    with pytest.raises(ValueError, match="9 groups of cells cannot make 10 folds"):
        evaluate_embedding(adata, ["good"], label_key="type", split_by="donor", n_splits=10)


def test_cells_without_labels_and_rare_classes_are_left_out(cells):
    adata = cells.copy()
    types = adata.obs["type"].astype(object)
    types.iloc[:7] = np.nan
    types.iloc[7:10] = "rare"
    adata.obs["type"] = types
    found = evaluate_embedding(adata, ["good"], label_key="type", baselines=[], n_splits=4)
    assert found.settings["n_cells"] == 170 and "rare" not in found.settings["classes"]
    assert "7 cells without a label are left out." in found.notes
    assert "Classes with fewer than 4 cells are left out (1): rare." in found.notes
    more = evaluate_embedding(adata, ["good"], label_key="type", baselines=[], n_splits=4, min_cells=40)
    assert more.settings["n_classes"] == 2


def test_cells_without_counts_are_noted(cells):
    empty = cells.copy()
    counts = empty.X.toarray()
    counts[:7] = 0
    empty.X = sparse.csr_matrix(counts)
    found = evaluate_embedding(empty, [], label_key="type", baselines=["pca"], n_splits=2, n_draws=1)
    assert any("7 cells have no counts" in note for note in found.notes)
    assert "7 cells have no counts" in str(found)


def test_paired_differences_are_of_the_same_folds(found):
    pairs = found.comparisons.set_index(["row", "other", "metric"])
    values = found.values.set_index(["row", "metric"]).sort_index()["value"]
    difference = values.loc["good", "probe_all"].to_numpy() - values.loc["worse", "probe_all"].to_numpy()
    line = pairs.loc["good", "worse", "probe_all"]
    assert line["difference"] == pytest.approx(difference.mean())
    se = np.sqrt(difference.var(ddof=1) * (1 / 4 + found.settings["test_to_train"]))
    assert line["high"] - line["difference"] == pytest.approx(3.182446 * se, rel=1e-5)
    assert pairs.loc["good", "noise", "knn_accuracy"]["p"] < 0.01
    assert CEILING not in set(found.comparisons["row"]) | set(found.comparisons["other"])


def test_text_and_files_mark_the_best_and_say_what_was_done(found, tmp_path):
    pytest.importorskip("matplotlib").use("agg")
    text, markdown = str(found), found.to_markdown()
    best = found.table.drop(index=CEILING)["knn_accuracy"].max()
    assert f"{best:.3f}* ±" in text and f"**{best:.3f}** ±" in markdown
    lines = [line for line in text.split("\n") if line.startswith(CEILING)]
    assert lines and not any("*" in line for line in lines)
    assert "180 cells, 4 classes of type (the most frequent has 0.333 of the cells); 4 folds" in text
    assert "Nadeau & Bengio 2003" in text and "kBET" in text and f"good - {PCA}" in text
    assert markdown.startswith("## Evaluation of embeddings\n") and "| good |" in markdown
    found.to_json(tmp_path / "a.json")
    read = json.loads((tmp_path / "a.json").read_text())
    assert read["settings"]["n_cells"] == 180 and len(read["values"]) == len(found.values)
    assert {"row", "metric", "value", "sd", "se", "low", "high"} == set(read["summary"][0])
    found.to_csv(tmp_path / "a.csv")
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "a.csv"), found.summary)
    found.plot(save=tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_a_constant_embedding_is_scored_and_never_best(cells, tmp_path):
    adata = cells.copy()
    adata.obsm["constant"] = np.ones((180, 3))
    found = evaluate_embedding(adata, ["constant", "good"], label_key="type", batch_key="batch", n_splits=3)
    assert found.table.loc["constant", "probe_all"] < 0.4 and np.isnan(found.table.loc["constant", "batch_pcr"])
    found.to_json(tmp_path / "a.json")
    values = pd.DataFrame(json.loads((tmp_path / "a.json").read_text())["values"])
    assert values.query("row == 'constant' and metric == 'batch_pcr'")["value"].isna().all()
    assert "NaN" in str(found)


def test_without_igraph_clusters_are_left_out_with_a_reason(cells, monkeypatch, caplog):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with caplog.at_level(logging.WARNING):
        found = evaluate_embedding(cells, ["good"], label_key="type", baselines=[], n_splits=3)
    assert "silhouette" in found.table and "leiden_ari" not in found.table
    assert "they need igraph" in caplog.text and any("igraph" in note for note in found.notes)


def test_scvi_without_its_extra_names_it(cells, monkeypatch):
    monkeypatch.setitem(sys.modules, "scvi", None)
    with pytest.raises(ImportError, match=r"stformer_hf\[scvi\]"):
        evaluate_embedding(cells, ["good"], label_key="type", baselines=["scvi"])


def test_wrong_input_is_refused_at_the_door(cells):
    with pytest.raises(ValueError, match='engine=.slurm.: must be "local" or "ray"'):
        evaluate_embedding(cells, ["good"], label_key="type", engine="slurm")

    def refused(match, keys=("good",), adata=cells, **kwargs):
        with pytest.raises(ValueError, match=match):
            evaluate_embedding(adata, list(keys), **{"label_key": "type", **kwargs})

    refused(r"no obsm\['X_pca'\]; obsm has 'good', 'worse', 'noise'", ["X_pca"])
    refused("keys contains a key twice", ["good", "good"])
    refused("Nothing to evaluate", [], baselines=[])
    refused(r"no obs\['fate'\]; obs has 'type'", label_key="fate")
    refused(r"no obs\['site'\]", batch_key="site")
    refused(r"no obs\['site'\]", split_by="site")
    refused("baselines must be a list of pca", baselines=["umap"])
    refused("baselines must be a list of pca", baselines="pca")
    refused("n_splits=1: must be at least 2", n_splits=1)
    refused("min_cells=3: a class needs a cell in each of the 5 folds", min_cells=3)
    refused("two classes with at least 500 cells; there is none", min_cells=500)
    adata = cells.copy()
    adata.obs["one"] = "same"
    refused("two classes with at least 5 cells; there is one", label_key="one", adata=adata)
    refused("has only one batch among the evaluated cells", batch_key="one", adata=adata)
    adata.obs["some"] = np.where(np.arange(180) < 3, None, "a")
    refused(r"no value in obs\['some'\]", batch_key="some", adata=adata)
    adata.obsm["nan"] = adata.obsm["good"].copy()
    adata.obsm["nan"][4, 2] = np.nan
    refused(r"obsm\['nan'\] is NaN or infinite for 1 of 180 cells, such as cell4", ["nan"], adata)
    adata.obsm["flat"] = np.ones((180, 0))
    refused(r"has the shape \(180, 0\)", ["flat"], adata)
    adata.obsm[PCA] = adata.obsm["good"]
    refused("has the name of a baseline", [PCA], adata)
    adata.X = adata.X * 0.5
    refused("fractional", adata=adata)
    refused("no cells", adata=cells[:0])


@pytest.mark.slow
def test_pbmc_of_the_demo():
    pytest.importorskip("scanpy")
    from sklearn.decomposition import PCA as Components

    from stformer_hf.cli.demo import LABEL, load_cells
    from stformer_hf.evaluation.cell_baselines import log_normalise

    adata, _ = load_cells()
    adata.obsm["pca"] = Components(50, random_state=0).fit_transform(log_normalise(adata.X).toarray())
    adata.obsm["noise"] = np.random.default_rng(0).normal(size=(700, 50))
    table = evaluate_embedding(adata, ["pca", "noise"], label_key=LABEL).table
    assert table.loc["pca", "knn_accuracy"] == pytest.approx(0.81, abs=0.02)
    assert table.loc["noise", "knn_accuracy"] < 0.36
    assert table.loc[GENES, "probe_all"] == pytest.approx(0.83, abs=0.03)


@pytest.mark.slow
def test_fetal_cells_by_batch(shared_data):
    from anndata import read_h5ad

    adata = read_h5ad(shared_data / "geact_fetal.h5ad")
    adata.obsm["noise"] = np.random.default_rng(0).normal(size=(adata.n_obs, 10))
    found = evaluate_embedding(
        adata,
        ["noise"],
        label_key="tissue",
        batch_key="big_batch",
        split_by="big_batch",
        baselines=["pca"],
        n_splits=3,
    )
    assert found.table.loc[PCA, "knn_accuracy"] > found.table.loc["noise", "knn_accuracy"]
    assert found.table.loc["noise", "batch_ilisi"] > found.table.loc[PCA, "batch_ilisi"]
