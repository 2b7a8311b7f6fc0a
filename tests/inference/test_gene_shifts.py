"""Shifts of the states of genes by perturbations, against cells that are edited and read one by one."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import make_adata
from edited_cells import edit, make_cells, make_model, make_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse

from stformer_hf import GeneBertForClassification, GeneBertModel, initialise_from_store, perturb
from stformer_hf.batches.collate import pad
from stformer_hf.cli import main
from stformer_hf.inference.gene_edits import Perturbation
from stformer_hf.inference.gene_shifts import ShardGenes, ShiftSums, make_gene_table


@pytest.fixture
def cells():
    return make_cells()


def read_shifts(folder) -> pd.DataFrame:
    return pd.read_csv(folder / "gene_shifts.csv", keep_default_na=True).set_index(["perturbation", "gene_id"])


def states_of_genes(counts, names, model, tokenizer) -> dict[str, np.ndarray]:
    """The state of each gene of one cell, read alone."""
    tokens = tokenizer.encode_cells(sparse.csr_matrix(counts), genes=names, for_inference=True)
    with torch.inference_mode():
        hidden = (
            model.base_model(**pad(tokens, tokenizer), output_hidden_states=True).hidden_states[-1][0].double().numpy()
        )
    found = {}
    for place in np.flatnonzero(tokenizer.get_gene_tokens_mask(tokens.input_ids)):
        of = slice(place, place + 1)
        gene = tokenizer.genes_of(tokens.input_ids[of], tokens.token_type_ids[of])[0]
        found[tokenizer.genes[gene]] = hidden[place] / np.linalg.norm(hidden[place])
    return found


@pytest.mark.parametrize(
    ("scheme", "kind"),
    [("binned", "delete"), ("rank", "overexpress"), ("whole", "activate"), ("fixed", "activate")],
)
def test_shifts_are_those_of_cells_read_one_by_one(cells, scheme, kind, tmp_path):
    """`fixed`: where the state of the cell is that of the whole-cell `[CLS]` alone."""
    tokenizer = make_tokenizer(cells, "whole" if scheme == "fixed" else scheme)
    kind_of_model = GeneBertForClassification if scheme == "binned" else GeneBertModel
    fields = {"residual_init": "normal"} if tokenizer.whole_cell else {}
    fields |= {"cls_state": "fixed", "pooling": "cls"} if scheme == "fixed" else {}
    model = make_model(tokenizer, kind_of_model, initializer_range=0.5, **fields)
    groups = [[1], [5], [10, 13]]
    genes = [cells.var_names[of].tolist() for of in groups]
    options = {"kind": kind, "tokenizer": tokenizer, "n_null": 0, "max_tokens": 40, "gene_shifts": 30}
    perturb(cells, model, genes, output=tmp_path / "p", **options)
    found = read_shifts(tmp_path / "p")
    names, n_rows = cells.var_names.tolist(), 0
    for of in groups:
        counts = edit(cells, of, kind)
        shifts: dict[str, list[float]] = {}
        for cell in np.flatnonzero((counts != cells.X).sum(1)):
            before, after = (states_of_genes(each[cell], names, model, tokenizer) for each in (cells.X, counts))
            for gene in before.keys() & after.keys() - {names[column] for column in of}:
                shifts.setdefault(gene, []).append(1 - before[gene] @ after[gene])
        expected = {gene: values for gene, values in shifts.items() if len(values) >= 3}
        rows = found.loc["+".join(names[column] for column in of)]
        assert set(rows.index) == set(expected)
        for gene, values in expected.items():
            assert rows.loc[gene, "n_cells"] == len(values)
            np.testing.assert_allclose(rows.loc[gene, "shift"], np.mean(values), atol=1e-6)
        assert (np.diff(rows["shift"]) <= 0).all()  # without a reference, the largest shift comes first
        n_rows += len(rows)
    assert n_rows == len(found) and found["shift"].max() > 1e-3 and found["z"].isna().all()


def test_a_killed_run_resumes_to_the_same_shifts(tmp_path):
    cells = make_adata(80, 30, seed=2)
    tokenizer = make_tokenizer(cells, "binned")
    model = make_model(tokenizer)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    cells.write_h5ad(tmp_path / "cells.h5ad")
    command = ["perturb", "--data", str(tmp_path / "cells.h5ad"), "--model", str(tmp_path / "model"), "--genes"]
    command += [*cells.var_names[:3], "--gene_shifts", "4", "--shard_size", "40", "--output", str(tmp_path / "p")]
    assert main(command) == 0
    shards = sorted((tmp_path / "p").glob("shard_*"))
    table = (tmp_path / "p" / "gene_shifts.csv").read_text()
    assert len(shards) > 3
    rows = read_shifts(tmp_path / "p")
    assert rows.groupby("perturbation").size().tolist() == [4, 4, 4] and rows["z"].notna().any()
    for gone in (*shards[::2], tmp_path / "p" / "gene_shifts.csv"):
        gone.unlink()
    assert main(command) == 0
    assert (tmp_path / "p" / "gene_shifts.csv").read_text() == table
    assert json.loads((tmp_path / "p" / "perturb.json").read_text())["gene_shifts"] == 4


def test_errors_at_the_door(cells, tmp_path):
    tokenizer = make_tokenizer(cells, "whole")
    genes, model = cells.var_names[:2].tolist(), make_model(tokenizer)
    with pytest.raises(ValueError, match="pass output="):
        perturb(cells, model, genes, tokenizer=tokenizer, gene_shifts=3)
    with pytest.raises(ValueError, match="gene_shifts=-1: must be at least 0"):
        perturb(cells, model, genes, tokenizer=tokenizer, gene_shifts=-1, output=tmp_path / "p")
    started = make_model(tokenizer, residual_init="zero", pooling="cls")
    initialise_from_store(started, tokenizer, cells)
    with pytest.raises(ValueError, match="does not depend on other genes"):
        perturb(cells, started, genes, tokenizer=tokenizer, gene_shifts=3, output=tmp_path / "p")
    with pytest.raises(ValueError, match="hidden_layer=0 is before the first layer"):
        perturb(cells, model, genes, tokenizer=tokenizer, gene_shifts=3, hidden_layer=0, output=tmp_path / "p")
    assert not (tmp_path / "p").exists()


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_the_table_is_that_of_plain_loops(data):
    n_genes, n_most = 5, data.draw(st.integers(1, 5))
    matched = data.draw(st.lists(st.sampled_from("ab"), min_size=1, max_size=50))
    is_null = data.draw(st.lists(st.booleans(), min_size=len(matched), max_size=len(matched)))
    without = data.draw(st.sampled_from(["", "a", "ab"]))  # of these values no null was drawn
    is_null = [null and of not in without for null, of in zip(is_null, matched, strict=True)]
    is_null[0] = False
    perturbations = [
        Perturbation(f"p{i}", (i,), of, null) for i, (of, null) in enumerate(zip(matched, is_null, strict=True))
    ]
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    edited = [rng.choice(n_genes, 1) for _ in perturbations]
    each = [(pair, gene, rng.random()) for pair in range(len(matched)) for gene in range(n_genes) for _ in range(4)]
    each = [row for row in each if rng.random() < 0.8]
    cuts = [0, data.draw(st.integers(0, len(matched))), len(matched)]
    shards: list[ShardGenes] = []
    for first, stop in zip(cuts, cuts[1:], strict=False):
        sums = ShiftSums(range(first, stop), n_genes, edited[first:stop] or [np.zeros(0, np.int64)])
        for part in range(3):
            rows = [row for i, row in enumerate(each) if first <= row[0] < stop and i % 3 == part]
            pairs, genes, shifts = (np.array([row[k] for row in rows]) for k in range(3))
            sums.add(pairs.astype(np.int64) - first, genes.astype(np.int64), shifts)
            if part == 1 and sums._parts:
                sums._sum()
        shards.append(sums.means())
    names = np.array([f"g{i}" for i in range(n_genes)], object)
    found = make_gene_table(perturbations, lambda: iter(shards), names, names, n_most)

    means: dict[tuple[int, int], float] = {}
    for pair in range(len(matched)):
        for gene in range(n_genes):
            values = [shift for p, g, shift in each if (p, g) == (pair, gene)]
            if len(values) >= 3 and gene != edited[pair][0]:
                means[pair, gene] = float(np.mean(values))
    expected = []
    for pair, of in enumerate(matched):
        if is_null[pair]:
            continue
        of_bin = [i for i in range(len(matched)) if matched[i] == of]
        reference = [i for i in of_bin if is_null[i]] or of_bin
        rows = []
        for gene in range(n_genes):
            if (pair, gene) in means:
                others = [means[i, gene] for i in reference if (i, gene) in means]
                mean, sd = (np.mean(others), np.std(others, ddof=1)) if len(others) >= 10 else (np.nan, np.nan)
                rows.append((f"p{pair}", f"g{gene}", means[pair, gene], mean, (means[pair, gene] - mean) / sd))
        rows.sort(key=lambda row: (np.isnan(row[4]), -np.nan_to_num(row[4]), -row[2]))
        expected += rows[:n_most]
    assert found[["perturbation", "gene_id"]].to_numpy().tolist() == [list(row[:2]) for row in expected]
    values = np.array([row[2:] for row in expected]).reshape(-1, 3)
    np.testing.assert_allclose(found[["shift", "matched_shift", "z"]].to_numpy(float), values, rtol=1e-6, atol=1e-9)


def test_equal_shifts_have_no_z():
    """Their standard deviation is a rounding error."""
    perturbations = [Perturbation(f"p{i}", (i,), "a", False) for i in range(12)]
    rows = np.arange(12)
    shard = ShardGenes(rows, np.zeros(12, np.int64), np.full(12, 3), np.where(rows, 0.1, 0.1 + 1e-12))
    names = np.array(["g0"], object)
    found = make_gene_table(perturbations, lambda: iter([shard]), names, names, 1)
    np.testing.assert_allclose(found["matched_shift"], 0.1)
    assert len(found) == 12 and found["z"].isna().all()
