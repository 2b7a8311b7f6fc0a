"""perturb against edited counts that `embed` and `annotate` read, cell by cell."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from edited_cells import N, edit, make_cells, make_model, make_tokenizer
from scipy import sparse
from sklearn.linear_model import LogisticRegression

import stformer_hf as sf
from stformer_hf import (
    GeneBertForClassification,
    GeneTokenizer,
    embed,
    initialise_from_store,
    perturb,
)
from stformer_hf.cli import main
from stformer_hf.evaluation.cell_baselines import log_normalise
from stformer_hf.evaluation.readers import fit_pca
from stformer_hf.inference import perturb_grid, perturb_reader
from stformer_hf.inference.gene_edits import GeneEdits, Panel
from stformer_hf.models.gene_bert.heads import fields_of_columns


@pytest.fixture
def cells():
    return make_cells()


def unit(states: np.ndarray) -> np.ndarray:
    return states / np.linalg.norm(states, axis=1, keepdims=True)


def states_of(cells, model, tokenizer, counts=None) -> np.ndarray:
    """Unit states of each cell embedded alone."""
    found = []
    for i in range(len(cells)):
        one = cells[i].copy()
        if counts is not None:
            one.X = counts[i]
        embed(one, model, tokenizer=tokenizer)
        found.append(one.obsm["X_stformer"])
    return unit(np.concatenate(found).astype(float))


@pytest.mark.parametrize("kind", ["delete", "inhibit", "activate", "overexpress"])
@pytest.mark.parametrize("scheme", ["binned", "rank", "whole"])
def test_shifts_are_those_of_edited_counts_read_one_by_one(cells, scheme, kind):
    cells = cells[np.arange(N) != 3].copy()
    tokenizer = make_tokenizer(cells, scheme)
    model = make_model(tokenizer)
    asked = [[1], [5], [10, 13]]
    genes = [cells.var_names[of].tolist() for of in asked]
    start, goal = (cells[cells.obs["cell_type"] == name].copy() for name in ("T cell", "B cell"))
    table = perturb(
        cells,
        model,
        genes,
        kind=kind,
        tokenizer=tokenizer,
        goal_key="cell_type",
        goal="B cell",
        n_null=0,
        max_tokens=40,
    )
    before = states_of(start, model, tokenizer)
    target = states_of(goal, model, tokenizer).mean(0)
    target /= np.linalg.norm(target)
    for of, (name, row) in zip(asked, table.iterrows(), strict=True):
        assert name == "+".join(cells.var_names[of])
        counts = edit(start, of, kind)
        after = states_of(start, model, tokenizer, counts)
        assert row["n_changed"] == ((counts != start.X).sum(1) > 0).sum() > 0
        np.testing.assert_allclose(row["shift"], (1 - (before * after).sum(1)).mean(), atol=2e-6)
        np.testing.assert_allclose(row["goal_shift"], ((after - before) @ target).mean(), atol=2e-6)
    assert np.abs(table["goal_shift"]).max() > 1e-4


@pytest.mark.parametrize("n_null", [0, 1])
def test_missing_p_values_are_explained(cells, n_null, caplog):
    tokenizer = make_tokenizer(cells, "binned")
    table = perturb(cells, make_model(tokenizer), cells.var_names[1:3].tolist(), tokenizer=tokenizer, n_null=n_null)
    assert table["p"].isna().all()
    assert "2 perturbations have no p-value" in caplog.text and ("n_null=0" in caplog.text) == (n_null > 0)


@pytest.mark.parametrize(("given", "most"), [(None, 1024), (40, 40)])
def test_batches_are_of_max_tokens(cells, given, most, monkeypatch):
    """And on a CPU of 1,024 by default."""
    sizes, make_batch = [], perturb_reader.make_batch

    def watch(tokens, *args):
        sizes.append(len(tokens.input_ids))
        return make_batch(tokens, *args)

    monkeypatch.setattr(perturb_reader, "make_batch", watch)
    tokenizer = make_tokenizer(cells, "binned")
    perturb(cells, make_model(tokenizer), tokenizer=tokenizer, n_null=0, max_tokens=given)
    assert most - 12 <= max(sizes) <= most


def test_the_probability_is_that_of_annotate(cells):
    cells = cells[np.arange(N) != 3].copy()
    tokenizer = make_tokenizer(cells, "binned")
    model = make_model(tokenizer, GeneBertForClassification, id2label={0: "B cell", 1: "T cell", 2: "other"})
    gene = cells.var_names[1]
    with torch.no_grad():
        model.classifier.weight *= 200  # so that a gene changes a probability

    def probabilities(counts):
        other = cells.copy()
        other.X = counts
        tokens = tokenizer(other, return_tensors="pt", padding=True)
        return model(**tokens).logits.softmax(-1).detach().numpy()

    before, after = probabilities(cells.X), probabilities(edit(cells, [1], "delete"))
    own = before.argmax(1)
    at = np.arange(len(cells))
    table = perturb(cells, model, [gene], tokenizer=tokenizer, n_null=0)
    np.testing.assert_allclose(table["probability"], [(after - before)[at, own].mean()], atol=1e-6)
    states = [states_of(cells, model, tokenizer, counts) for counts in (cells.X, edit(cells, [1], "delete"))]
    np.testing.assert_allclose(table["shift"], [1 - np.prod(states, axis=0).sum(axis=1).mean()], atol=1e-6)
    table = perturb(cells, model, [gene], tokenizer=tokenizer, n_null=0, predicted="other")
    np.testing.assert_allclose(table["probability"], [(after - before)[:, 2].mean()], atol=1e-6)
    assert table.columns[1] == "probability" and abs(table["probability"].iloc[0]) > 1e-5
    table = perturb(
        cells, model, [gene], tokenizer=tokenizer, n_null=0, goal_key="cell_type", goal="B cell", predicted=None
    )
    of_t = (cells.obs["cell_type"] == "T cell").to_numpy()
    np.testing.assert_allclose(table["probability"], [(after - before)[of_t, 0].mean()], atol=1e-6)


def test_the_probability_of_one_of_several_label_columns(cells):
    cells = cells[np.arange(N) != 3].copy()
    tokenizer = make_tokenizer(cells, "binned")
    head = fields_of_columns({"cell_type": ["B cell", "T cell"], "state": ["B cell", "low", "mid"]})
    model = make_model(tokenizer, GeneBertForClassification, **head)
    gene, options = cells.var_names[1], {"tokenizer": tokenizer, "n_null": 0}
    with torch.no_grad():
        model.classifier.weight *= 200

    def probabilities(counts):
        other = cells.copy()
        other.X = counts
        with torch.no_grad():
            logits = model(**tokenizer(other, return_tensors="pt", padding=True)).logits
        return torch.cat([logits[:, :2].softmax(-1), logits[:, 2:].softmax(-1)], dim=1).numpy()

    change = probabilities(edit(cells, [1], "delete")) - probabilities(cells.X)
    with pytest.raises(
        ValueError, match=r"several label columns \(cell_type, state\): name the one .*'cell_type: B cell'"
    ):
        perturb(cells, model, [gene], **options)
    table = perturb(cells, model, [gene], predicted="state: low", **options)
    np.testing.assert_allclose(table["probability"], [change[:, 3].mean()], atol=1e-6)
    assert abs(change[:, 3].mean()) > 1e-5
    table = perturb(cells, model, [gene], goal_key="cell_type", goal="B cell", **options)
    of_t = (cells.obs["cell_type"] == "T cell").to_numpy()
    np.testing.assert_allclose(table["probability"], [change[of_t, 0].mean()], atol=1e-6)


@pytest.fixture(params=["zero", "fixed", "gated"])
def started(cells, request):
    """A spectral start: residual branches are 0, or `[CLS]` is fixed, or its gates are 0."""
    tokenizer = make_tokenizer(cells, "whole")
    state = {"residual_init": "zero"} if request.param == "zero" else {"cls_state": request.param}
    state = {"residual_init": "normal", "initializer_range": 0.5, **state}
    model = make_model(tokenizer, pre_norm=True, norm_type="rms_norm", pooling="cls", **state)
    initialise_from_store(model, tokenizer, cells, n_components=8)
    return model, tokenizer


@pytest.mark.parametrize("kind", ["delete", "overexpress"])
def test_only_cls_is_read_where_no_token_reads_another(cells, started, kind, monkeypatch):
    """The fast path equals the path of all tokens, and is left once a residual branch, or a gate, is not 0."""
    model, tokenizer = started
    lengths = []
    forward = model.forward

    def watch(*args, **kwargs):
        lengths.append(int(kwargs.get("max_length_q", kwargs["input_ids"].shape[1])))  # packed, or of one length
        return forward(*args, **kwargs)

    monkeypatch.setattr(model, "forward", watch)
    settings = {"kind": kind, "tokenizer": tokenizer, "goal_key": "cell_type", "goal": "B cell", "n_null": 0}
    genes = cells.var_names[1:7].tolist()
    fast = perturb(cells, model, genes, **settings)
    assert max(lengths) == 3  # [CLS], one gene, [EOS]
    monkeypatch.setattr(perturb_reader, "length_to_read", lambda *_: None)
    plain = perturb(cells, model, genes, **settings)
    assert max(lengths) == 12
    pd.testing.assert_frame_equal(fast, plain, rtol=1e-4, atol=1e-7)
    assert fast["shift"].min() > 1e-6
    monkeypatch.undo()
    with torch.no_grad():
        model.layers[1].ffn.lin2.bias += 1e-3
        if model.config.cls_state == "gated":
            model.layers[1].cls_gate[3] = 1e-3
    reader = perturb_reader.Reader(model, tokenizer, -1, None, 100, False, None)
    assert (reader.length == 3) == (model.config.cls_state == "fixed")
    assert perturb_reader.Reader(model, tokenizer, -1, "mean", 100, False, None).length is None


def settings_of(cells):
    return {"goal_key": "cell_type", "goal": "B cell", "donor_key": "donor", "n_null": 3, "shard_size": 5}


@pytest.mark.parametrize("fails_at", [0, 1, 3, 5, 7])
def test_a_killed_run_resumes_to_the_same_table(cells, tmp_path, fails_at, monkeypatch):
    tokenizer = make_tokenizer(cells, "binned")
    model, genes = make_model(tokenizer), cells.var_names[1:7].tolist()
    settings = {"tokenizer": tokenizer, **settings_of(cells)}
    whole = perturb(cells, model, genes, **settings)
    written, write = [], perturb_grid.Grid._write_shard

    def fail(self, file, numbers, bar):
        if len(written) == fails_at:
            Path(file).with_name(f".{file.name}.part").write_bytes(b"half")
            raise KeyboardInterrupt
        written.append(file)
        write(self, file, numbers, bar)

    monkeypatch.setattr(perturb_grid.Grid, "_write_shard", fail)
    with pytest.raises(KeyboardInterrupt):
        perturb(cells, model, genes, output=tmp_path / "p", **settings)
    assert not (tmp_path / "p" / "table.csv").exists()
    done = {file: file.stat().st_mtime_ns for file in written}
    monkeypatch.setattr(perturb_grid.Grid, "_write_shard", write)
    resumed = perturb(cells, model, genes, output=tmp_path / "p", **settings)
    pd.testing.assert_frame_equal(resumed, whole, check_exact=True)
    assert len(done) == fails_at and all(file.stat().st_mtime_ns == at for file, at in done.items())
    saved = pd.read_csv(tmp_path / "p" / "table.csv", index_col=0)
    np.testing.assert_allclose(saved["goal_shift"], whole["goal_shift"])
    with torch.no_grad():
        model.embeddings.word_embeddings.weight += 0.1
    with pytest.raises(ValueError, match="holds results of other settings: weights was"):
        perturb(cells, model, genes, output=tmp_path / "p", **settings)


def test_a_folder_of_another_tokenizer_or_of_other_genes_is_not_resumed(cells, tmp_path):
    tokenizer = make_tokenizer(cells, "binned")
    model, genes = make_model(tokenizer), cells.var_names[1:3].tolist()
    settings = {"n_null": 0, "output": tmp_path / "p"}
    perturb(cells, model, genes, tokenizer=tokenizer, **settings)
    for name, value in (("dtype", "bfloat16"), ("gene_shifts", 2)):
        with pytest.raises(ValueError, match=f"holds results of other settings: {name} was None"):
            perturb(cells, model, genes, tokenizer=tokenizer, **settings, **{name: value})
    shorter = make_tokenizer(cells, "binned")
    shorter.max_length = 9
    with pytest.raises(ValueError, match="holds results of other settings: tokenizer was"):
        perturb(cells, model, genes, tokenizer=shorter, **settings)
    renamed = cells.copy()
    renamed.var_names = [*cells.var_names[:3], *cells.var_names[:2:-1]]
    with pytest.raises(ValueError, match="holds results of other settings: genes was"):
        perturb(renamed, model, genes, tokenizer=tokenizer, **settings)


def test_cells_without_a_group_are_left_out(cells, caplog):
    tokenizer = make_tokenizer(cells, "binned")
    model, gene = make_model(tokenizer), cells.var_names[1]
    settings = {"tokenizer": tokenizer, "goal_key": "cell_type", "goal": "B cell", "n_null": 0}
    unknown = cells.copy()
    types = unknown.obs["cell_type"].astype(object).where(~np.isin(np.arange(len(unknown)), [0, 1, 8]))
    unknown.obs["cell_type"] = types.astype("category")
    found = perturb(unknown, model, [gene], **settings)
    assert "3 of 24 cells have no value in obs['cell_type']" in caplog.text
    pd.testing.assert_frame_equal(found, perturb(cells[unknown.obs["cell_type"].notna()], model, [gene], **settings))
    with pytest.raises(ValueError, match="No cell is in the goal group: obs\\['cell_type'\\] has 'B cell', 'T cell'"):
        perturb(unknown, model, [gene], **{**settings, "goal": "nan"})


def test_groups_may_be_numbers_of_numpy(cells, tmp_path):
    tokenizer = make_tokenizer(cells, "binned")
    model, gene = make_model(tokenizer), cells.var_names[1]
    settings = {"tokenizer": tokenizer, "goal_key": "group", "n_null": 0, "output": tmp_path / "p"}
    cells.obs["group"] = np.arange(len(cells)) % 2
    found = perturb(cells, model, [gene], goal=cells.obs["group"].iloc[0], **settings)
    pd.testing.assert_frame_equal(found, perturb(cells, model, [gene], goal=0, **settings))  # resumed


def test_the_null_has_no_gene_that_was_asked_for(cells, tmp_path):
    tokenizer = make_tokenizer(cells, "binned")
    genes = cells.var_names[1:5].tolist()
    perturb(cells, make_model(tokenizer), genes, tokenizer=tokenizer, n_null=99, output=tmp_path / "p")
    null = pd.read_csv(tmp_path / "p" / "null.csv", index_col=0)
    assert sorted(null.index) == sorted({*cells.var_names[cells.X.sum(axis=0).A1 > 0]} - {*genes})


def test_phenotypes_are_masked(cells):
    tokenizer = make_tokenizer(cells, "binned", phenotypes={"cell_type": ["B cell", "T cell"]})
    model, genes = make_model(tokenizer), cells.var_names[1:3].tolist()
    cells = cells[np.arange(N) != 3].copy()
    table = perturb(cells, model, genes, tokenizer=tokenizer, n_null=0)
    before, after = (states_of(cells, model, tokenizer, of) for of in (None, edit(cells, [1], "delete")))  # by embed
    np.testing.assert_allclose(table["shift"].iloc[0], (1 - (before * after).sum(1)).mean(), atol=2e-6)


def test_the_baselines_are_components_and_a_regression_of_log_counts(cells):
    cells = cells[np.arange(N) != 3].copy()
    tokenizer = make_tokenizer(cells, "binned")
    settings = {"tokenizer": tokenizer, "goal_key": "cell_type", "goal": "B cell", "n_null": 0}
    table = perturb(cells, make_model(tokenizer), [cells.var_names[1]], **settings)
    start, goal = (cells[cells.obs["cell_type"] == name].copy() for name in ("T cell", "B cell"))
    before, after, others = (log_normalise(of) for of in (start.X, edit(start, [1], "delete"), goal.X))
    every = sparse.vstack([before, others], format="csr")
    components = fit_pca(every, 0)
    regression = LogisticRegression(max_iter=2000).fit(every, np.repeat([0, 1], [start.n_obs, goal.n_obs]))
    states, moved, target = (unit(components(of)) for of in (before, after, others))
    target = unit(target.mean(axis=0)[None])[0]
    change = regression.predict_proba(after)[:, 1] - regression.predict_proba(before)[:, 1]
    wanted = [(1 - (states * moved).sum(1)).mean(), ((moved - states) @ target).mean(), change.mean()]
    found = table[["pca_shift", "pca_goal_shift", "linear_probability"]].iloc[0]
    np.testing.assert_allclose(found, wanted, rtol=1e-3)
    assert np.abs(wanted).min() > 1e-5


def test_the_order_of_cells_and_genes_does_not_matter(cells):
    tokenizer = make_tokenizer(cells, "rank")
    model, genes = make_model(tokenizer), cells.var_names[1:6].tolist()
    settings = {"tokenizer": tokenizer, **settings_of(cells), "n_null": 24}
    table = perturb(cells, model, genes, **settings)
    assert table["p"].notna().all()
    rng = np.random.default_rng(0)
    mixed = cells[rng.permutation(N), rng.permutation(30)].copy()
    other = perturb(mixed, model, genes[::-1], **settings)
    # p_wilcoxon has ties, which rounding breaks
    columns = table.columns.drop("p_wilcoxon")
    pd.testing.assert_frame_equal(other.loc[table.index, columns], table[columns], rtol=2e-3, atol=1e-6)


def test_repeated_columns_are_one_gene(cells):
    """Counts of one gene in two columns are edited together."""
    tokenizer = make_tokenizer(cells, "binned")
    model, gene = make_model(tokenizer), cells.var_names[1]
    wanted = perturb(cells, model, [gene], kind="activate", tokenizer=tokenizer, n_null=0)
    rng = np.random.default_rng(0)
    counts = cells.X.toarray()
    part = rng.binomial(counts[:, 1].astype(int), 0.5)
    counts[:, 1] -= part
    names = [*cells.var_names, f"{gene}.7"]
    split = type(cells)(sparse.csr_matrix(np.c_[counts, part]), obs=cells.obs, var=pd.DataFrame(index=names))
    found = perturb(split, model, [gene], kind="activate", tokenizer=tokenizer, n_null=0)
    np.testing.assert_allclose(found["shift"], wanted["shift"], rtol=1e-4)


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
@pytest.mark.parametrize("kind", ["delete", "inhibit"])
def test_repeated_entries_are_one_count(cells, kind, dtype):
    tokenizer = make_tokenizer(cells, "binned")
    model, genes = make_model(tokenizer), cells.var_names[[1, 4]].tolist()
    settings = {"tokenizer": tokenizer, "kind": kind, "n_null": 0, "fractional": dtype == np.float32}
    cells.X = (cells.X * (1.5 if dtype == np.float32 else 1)).astype(dtype)
    expected, X = perturb(cells, model, genes, **settings), cells.X.tocsr()
    ones = np.ones(X.nnz, dtype) / (4 if dtype == np.float32 else 1)
    values = np.stack([ones, X.data - ones], axis=1).ravel()  # a count of 1 is 1 + 0
    repeated = cells.copy()
    repeated.X = sparse.csr_matrix((values.astype(dtype), np.repeat(X.indices, 2), X.indptr * 2), X.shape)
    before = repeated.X.copy()
    pd.testing.assert_frame_equal(perturb(repeated, model, genes, **settings), expected)
    for name in ("data", "indices", "indptr"):  # the user's matrix stays as it is
        np.testing.assert_array_equal(getattr(repeated.X, name), getattr(before, name))


def test_a_count_may_outgrow_the_type_of_the_file(cells):
    genes = cells.var_names[:2].to_numpy(object)
    panel = Panel(genes, genes, make_tokenizer(cells, "binned"))
    counts = panel.merge(sparse.csr_matrix(np.array([[200, 50], [1, 250], [1, 255]], np.uint8)))
    doubled = sparse.csr_matrix(counts.multiply([[1], [1], [4]]).astype(counts.dtype))
    rows, values = GeneEdits(doubled, np.arange(3), "overexpress", 1.0).change(0)
    assert rows.tolist() == [1, 2] and values.tolist() == [round(251 * 0.8), round(1024 * 0.8)]


def test_genes_that_no_perturbed_cell_expresses(cells):
    """They are raised to their level in the other cells; there is nothing to delete, and no test."""
    counts = cells.X.toarray()
    is_goal = (cells.obs["cell_type"] == "B cell").to_numpy()
    counts[~is_goal, 1] = 0
    counts[:, 2] = 0
    cells.X = sparse.csr_matrix(counts)
    tokenizer, (elsewhere, nowhere) = make_tokenizer(cells, "binned"), cells.var_names[1:3]
    settings = {"tokenizer": tokenizer, "goal_key": "cell_type", "goal": "B cell"}
    model = make_model(tokenizer)
    deleted = perturb(cells, model, [elsewhere, nowhere], **settings)
    assert (deleted[["n_changed", "shift"]] == 0).all(axis=None) and deleted[["p", "fdr"]].isna().all(axis=None)
    raised = perturb(cells, model, [elsewhere, nowhere], kind="overexpress", **settings)
    assert (raised["n_changed"] > 0).tolist() == [True, False]

    totals = counts.sum(axis=1)
    shares = (counts[:, 1] / np.maximum(totals, 1))[counts[:, 1] > 0]
    edited = cells.copy()
    counts[~is_goal, 1] = np.where(totals > 0, np.maximum(np.rint(np.quantile(shares, 0.99) * totals), 1), 0)[~is_goal]
    edited.X = sparse.csr_matrix(counts)
    states = []
    for each in (cells, edited):
        embed(each, model, tokenizer=tokenizer)
        found = each.obsm["X_stformer"][~is_goal & (totals > 0)]
        states.append(found / np.linalg.norm(found, axis=1, keepdims=True))
    moved = 1 - (states[0] * states[1]).sum(axis=1)
    assert raised.loc[elsewhere, "shift"] == pytest.approx(moved.mean(), rel=1e-3)


def test_the_command_line_writes_the_table_and_the_plot(cells, tmp_path, capsys):
    tokenizer = make_tokenizer(cells, "binned")
    model = make_model(tokenizer)
    for each in (model, tokenizer):
        each.save_pretrained(tmp_path / "model")
    cells.write_h5ad(tmp_path / "cells.h5ad")
    genes = cells.var_names[1:4].tolist()
    flags = ["--data", tmp_path / "cells.h5ad", "--model", tmp_path / "model", "--output", tmp_path / "out"]
    flags += ["--genes", *genes, "--pairs", "--kind", "activate", "--n_null", "12", "--plot", tmp_path / "plot.png"]
    assert main(["perturb", *map(str, flags), "--debug"]) == 0
    table = pd.read_csv(tmp_path / "out" / "table.csv", index_col=0)
    assert table.index.tolist() == [f"{a}+{b}" for a, b in ((genes[0], genes[1]), (genes[0], genes[2]), genes[1:])]
    wanted = perturb(cells, model, [genes[:2], genes[::2], genes[1:]], kind="activate", tokenizer=tokenizer, n_null=12)
    np.testing.assert_allclose(table["shift"], wanted["shift"], rtol=1e-4)
    assert (tmp_path / "plot.png").exists() and "3 perturbations of 23 cells" in capsys.readouterr().out


def test_all_genes_of_a_panel(cells):
    tokenizer = make_tokenizer(cells, "binned")
    table = perturb(cells, make_model(tokenizer), tokenizer=tokenizer)
    expressed = np.asarray(cells.X.sum(0)).ravel() > 0
    assert table.index.tolist() == cells.var_names[expressed].tolist()
    assert table["fdr"].notna().all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"genes": ["ENSG0000000001"]}, "does not know the gene 'ENSG0000000001'; the closest known one is ENSG"),
        ({"genes": ["ENSG00000000028"]}, "the cells have no column for it"),
        ({"genes": "ENSG00000000001"}, "must be a list"),
        ({"genes": []}, "There are no genes"),
        ({"genes": ["ENSG00000000001"] * 2}, "is repeated"),
        ({"genes": ["ENSG00000000001", ["ENSG00000000001"] * 2]}, "edit the same genes"),
        ({"hidden_layer": 3}, "hidden_layer 3 does not exist in a model of 2 layers"),
        ({"kind": "remove"}, "kind must be one of delete"),
        ({"quantile": 0.5}, "is not for kind='delete'"),
        ({"goal": "B cell"}, "goal_key and goal belong together"),
        ({"goal_key": "cell_type", "goal": "NK"}, "No cell is in the goal group: obs\\['cell_type'\\] has 'B cell'"),
        ({"donor_key": "person"}, "There is no obs\\['person'\\]"),
        ({"predicted": "B cell"}, "no class 'B cell'"),
        ({"n_null": -1}, "n_null=-1"),
    ],
)
def test_errors_at_the_door(cells, change, message):
    cells = cells[:, :30].copy()
    counts = cells.X.toarray()
    counts[:, 29] = 0
    cells.X = sparse.csr_matrix(counts)
    tokenizer = make_tokenizer(cells, "binned")
    model = make_model(tokenizer)
    cells = cells[:, np.arange(30) != 28].copy()
    with pytest.raises(ValueError, match=message):
        perturb(cells, model, **{"genes": ["ENSG00000000001"], "tokenizer": tokenizer, "n_null": 0, **change})


def test_a_folder_with_other_files_is_left_alone(cells, tmp_path):
    (tmp_path / "mine.txt").write_text("kept")
    tokenizer = make_tokenizer(cells, "binned")
    with pytest.raises(ValueError, match="holds other files"):
        perturb(cells, make_model(tokenizer), tokenizer=tokenizer, output=tmp_path)
    assert os.listdir(tmp_path) == ["mine.txt"]


@pytest.mark.slow
def test_two_processes_write_the_table_of_one(cells, tmp_path):
    tokenizer = make_tokenizer(cells, "binned")
    model = make_model(tokenizer)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    cells.write_h5ad(tmp_path / "cells.h5ad")
    flags = "--goal_key cell_type --goal B_cell --donor_key donor --n_null 3 --shard_size 5 --gene_shifts 4"
    genes = cells.var_names[1:7].tolist()
    tables = []
    for n in (1, 2):
        command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", str(n)]
        command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
        command += [] if n == 1 else ["--main_process_port", "0"]
        command += ["-m", "stformer_hf.cli", "perturb", "--data", str(tmp_path / "cells.h5ad")]
        command += ["--model", str(tmp_path / "model"), "--output", str(tmp_path / str(n)), "--genes", *genes]
        command += [word.replace("_", " ") if word == "B_cell" else word for word in flags.split()]
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
        assert not done.returncode, done.stderr[-3000:]
        assert done.stdout.count("table.csv") == 1
        tables.append(pd.read_csv(tmp_path / str(n) / "table.csv", index_col=0))
    pd.testing.assert_frame_equal(*tables, check_exact=True)
    of_genes = [pd.read_csv(tmp_path / str(n) / "gene_shifts.csv") for n in (1, 2)]
    pd.testing.assert_frame_equal(*of_genes, check_exact=True)
    assert tables[0].index.tolist() == genes
    assert json.loads((tmp_path / "2" / "perturb.json").read_text())["kind"] == "delete"


def test_it_is_a_public_name():
    assert "perturb" in sf.__all__ and sf.perturb is perturb


def test_genes_are_found_by_the_names_of_the_index_too(cells):
    cells.var["gene_id"], cells.var["gene_symbol"] = cells.var_names, [f"S{i}" for i in range(30)]
    cells.var_names = [f"S{i}.1" for i in range(30)]
    tokenizer = GeneTokenizer(cells.var["gene_id"].tolist(), bin_edges=[0.5], max_length=12)
    model = make_model(tokenizer)
    names = ("S7", "S7.1", cells.var["gene_id"].iloc[7])
    found = [perturb(cells, model, [name], tokenizer=tokenizer, n_null=0)["shift"].iloc[0] for name in names]
    assert found[0] > 0 and len(set(found)) == 1


def test_a_goal_of_one_cell_has_no_p_value(cells, caplog):
    cells.obs["cell_type"] = np.where(np.arange(N) == 5, "B cell", "T cell")
    tokenizer = make_tokenizer(cells, "binned")
    settings = {"tokenizer": tokenizer, "goal_key": "cell_type", "goal": "B cell"}
    table = perturb(cells, make_model(tokenizer), cells.var_names[1:4].tolist(), **settings)
    assert table["p_matched"].notna().all() and table[["p_cells", "p", "fdr"]].isna().all(axis=None)
    assert "No p-values: the goal group or the start group is a single cell" in caplog.text
