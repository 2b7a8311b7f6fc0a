"""The files that the verbs read and write: larger than memory, and nothing of the input lost."""

import os
import re
import subprocess
import sys
import warnings

import h5py
import numpy as np
import pandas as pd
import pytest
from anndata import read_h5ad, read_zarr
from scipy import sparse
from scipy.io import mmwrite
from transformers import set_seed

from stformer_hf import CellStore, GeneBertForClassification, annotate, embed
from stformer_hf.cli import files, main
from stformer_hf.cli.annotate import summary


@pytest.fixture
def model(config, tokenizer, tmp_path) -> str:
    set_seed(0)
    config.id2label = {0: "B cell", 1: "T cell"}
    GeneBertForClassification(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


@pytest.fixture
def file(adata, tmp_path) -> str:
    """An h5ad file with everything that an AnnData can hold."""
    adata.layers["spliced"] = adata.X.copy()
    adata.raw = adata.copy()
    adata.obsm["X_pca"], adata.varm["PCs"] = np.ones((60, 2)), np.ones((40, 2))
    adata.obsp["connectivities"] = sparse.eye(60, format="csr")
    adata.uns["params"] = {"n": 3, "name": "x"}
    adata.write_h5ad(tmp_path / "cells.h5ad")
    return str(tmp_path / "cells.h5ad")


def run(verb: str, *argv) -> None:
    assert main([verb, *map(str, argv)]) == 0


@pytest.mark.parametrize("verb", ["embed", "annotate"])
def test_the_matrices_of_a_file_stay_on_disk_and_are_copied(verb, file, model, adata, tmp_path, monkeypatch):
    """The file that is written is the input with the results, as if it had been read whole."""
    seen, write = [], files.write

    def see(found, *of):
        seen.append((found.isbacked, type(found.layers["spliced"])))
        write(found, *of)

    monkeypatch.setattr(files, "write", see)
    before, output = read_h5ad(file), tmp_path / "out.h5ad"
    run(verb, "--data", file, "--model", model, "--output", output)
    is_backed, of_layer = seen[0]
    assert is_backed and not issubclass(of_layer, (sparse.spmatrix, sparse.sparray, np.ndarray))
    (embed if verb == "embed" else annotate)(before, model)
    found = read_h5ad(output)
    for part in ("obsm", "varm", "obsp", "layers", "uns", "obs", "var"):
        assert set(getattr(found, part)) == set(getattr(before, part)), part
    assert (found.X != before.X).nnz == 0 and (found.raw.X != before.raw.X).nnz == 0
    assert found.uns["params"] == {"n": 3, "name": "x"}
    if verb == "embed":
        np.testing.assert_allclose(found.obsm["X_stformer"], before.obsm["X_stformer"], atol=1e-5)
    else:
        assert found.obs["stformer_label"].astype(str).equals(before.obs["stformer_label"].astype(str))
    assert [path.name for path in tmp_path.glob(".*.part")] == []
    run(verb, "--data", output, "--model", model, "--output", tmp_path / "again.h5ad")  # results are replaced


def test_a_store_becomes_a_file_of_its_obs_and_the_results(store, model, tmp_path, capsys):
    for verb in ("embed", "annotate"):
        run(verb, "--data", store.path, "--model", model, "--output", tmp_path / f"{verb}.h5ad")
    embedded, labelled = read_h5ad(tmp_path / "embed.h5ad"), read_h5ad(tmp_path / "annotate.h5ad")
    expected = embed(store, model)
    np.testing.assert_allclose(embedded.obsm["X_stformer"], expected.obsm["X_stformer"], atol=1e-5)
    assert embedded.X is None and embedded.obs["cell_type"].equals(store.obs["cell_type"])
    assert labelled.obs["stformer_label"].notna().sum() == 59
    capsys.readouterr()
    words = ["--data", str(store.path), "--model", model, "--output", str(tmp_path / "c.h5ad")]
    assert main(["embed", *words, "--layer", "raw"]) == 1
    assert "is a store, which holds the counts of one layer" in capsys.readouterr().err


def test_the_suffix_says_what_is_written(file, store, model, tmp_path):
    """A zarr is a zarr, a csv has the columns that annotate added, and both replace their former selves."""
    labelled = read_h5ad(file)
    annotate(labelled, model)
    for data in (file, store.path):
        for flags in ([], ["--overwrite"]):
            run("annotate", "--data", data, "--model", model, "--output", tmp_path / "out.zarr", *flags)
            run("annotate", "--data", data, "--model", model, "--output", tmp_path / "out.csv", *flags)
        found, table = read_zarr(tmp_path / "out.zarr"), pd.read_csv(tmp_path / "out.csv", index_col=0)
        assert list(table.columns) == ["stformer_label", "stformer_score", "stformer_margin"]
        for obs in (found.obs, table):
            assert list(obs.index) == list(labelled.obs_names)
            assert list(obs["stformer_label"].astype(object).fillna("")) == [
                "" if label is np.nan else label for label in labelled.obs["stformer_label"].astype(object)
            ]
            np.testing.assert_allclose(obs["stformer_score"], labelled.obs["stformer_score"], rtol=1e-5)
        assert (found.X is None) == (data != file)
        for name in ("out.zarr", "out.csv"):
            other = tmp_path / f"{'store' if data != file else 'file'}_{name}"
            (tmp_path / name).rename(other)
    assert [path.name for path in tmp_path.glob(".*")] == []


def test_names_that_the_output_cannot_hold_are_named_before_the_work(adata, model, tmp_path, capsys, monkeypatch):
    """Here those of a store, since anndata writes none from 0.13 on."""
    adata.obs["x/y"] = 1
    CellStore.build(tmp_path / "slashed", adata, obs=["x/y"], report=False)
    words = ["embed", "--data", str(tmp_path / "slashed"), "--model", model, "--output"]
    with monkeypatch.context() as patch:
        patch.setattr("stformer_hf.inference.embed.load", None)
        assert main([*words, str(tmp_path / "out.zarr")]) == 1
        assert "out.zarr: zarr cannot hold names with a slash, obs['x/y']. Rename" in capsys.readouterr().err
        patch.setattr(files, "_OF_ANNDATA_0_13", True)
        assert main([*words, str(tmp_path / "out.h5ad")]) == 1
        assert "out.h5ad: h5ad cannot hold names with a slash, obs['x/y']. Rename" in capsys.readouterr().err
    if not files._OF_ANNDATA_0_13:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            assert main([*words, str(tmp_path / "out.h5ad")]) == 0
    inner = {"scores": pd.DataFrame({"p/q": range(3)}), "settings": {"a": {"b": 1}}}
    files.check_names(inner, "obsm", "out.csv")
    with pytest.raises(ValueError, match=r"a slash, obsm\['scores'\]\['p/q'\]"):
        files.check_names(inner, "obsm", "out.zarr")


@pytest.mark.parametrize(
    "where", ["obs.index.name 'i/d'", "var.index.name 'i/d'", "uns['t'].index.name 'i/d'", "raw.var['x/y']"]
)
def test_nor_can_it_hold_the_name_of_an_index_or_a_column_of_raw(where, adata):
    adata.raw, adata.uns["t"] = adata, pd.DataFrame({"a": range(3)})
    if where.startswith("raw"):
        adata.raw.var["x/y"] = 1
    else:
        (adata.uns["t"] if where.startswith("uns") else getattr(adata, where[:3])).index.name = "i/d"
    files._check_names(adata, "out.csv")
    with pytest.raises(ValueError, match=f"zarr cannot hold names with a slash, {re.escape(where)}. Rename it"):
        files._check_names(adata, "out.zarr")


@pytest.mark.skipif(files._OF_ANNDATA_0_13, reason="this anndata writes no such file")
def test_names_that_are_copied_with_a_file_may_have_a_slash(adata, model, tmp_path, monkeypatch):
    adata.var["x/y"] = 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        adata.write_h5ad(tmp_path / "in.h5ad")
    monkeypatch.setattr(files, "_OF_ANNDATA_0_13", True)
    words = ["embed", "--data", str(tmp_path / "in.h5ad"), "--model", model, "--output"]
    assert main([*words, str(tmp_path / "out.h5ad")]) == 0
    assert (read_h5ad(tmp_path / "out.h5ad").var["x/y"] == 1).all()
    for output, blockwise in (("other.h5ad", False), ("other.zarr", True)):
        with pytest.raises(ValueError, match=r"cannot hold names with a slash, var\['x/y'\]"):
            files.read(str(tmp_path / "in.h5ad"), str(tmp_path / output), blockwise=blockwise)


def test_nor_can_it_hold_the_labels_of_a_model(adata, config, tokenizer, tmp_path, capsys, monkeypatch):
    config.id2label, config.problem_type = {0: "B", 1: "CD4/CD8"}, "multi_label_classification"
    GeneBertForClassification(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    adata.write_h5ad(tmp_path / "a.h5ad")
    words = ["--data", tmp_path / "a.h5ad", "--model", tmp_path / "model"]
    run("annotate", *words, "--output", tmp_path / "out.csv")
    assert list(pd.read_csv(tmp_path / "out.csv", index_col=0)) == ["stformer_B", "stformer_CD4/CD8"]
    monkeypatch.setattr("stformer_hf.inference.annotate.load", None)
    capsys.readouterr()
    assert main(["annotate", *map(str, words), "--output", str(tmp_path / "out.zarr")]) == 1
    assert "names with a slash, obs['stformer_CD4/CD8']. Write .csv." in capsys.readouterr().err


@pytest.mark.parametrize(
    ("kind", "legacy"), [("csr", False), ("csr", True), ("csc", False), ("dense", False), ("none", False)]
)
def test_matrices_are_copied_to_a_zarr_in_blocks(kind, legacy, adata, model, tmp_path, monkeypatch):
    """Here of at most 20 values, or one column; what is written is as if read whole."""
    monkeypatch.setattr(files, "_CHUNK", 20)
    monkeypatch.setattr(files, "_CHUNKS", 1)
    matrix = adata.X.toarray() if kind == "dense" else adata.X.asformat("csc" if kind == "csc" else "csr")
    adata.X, adata.layers["ints"] = matrix, matrix.astype(np.uint16)
    adata.raw = adata.copy()
    adata.obsm["of_table"] = pd.DataFrame({"a": range(60)}, index=adata.obs_names)
    adata.obs["text"], adata.uns["params"] = [f"t{i}" for i in range(60)], {"n": 3, "inner": {"x": np.arange(3)}}
    adata.write_h5ad(tmp_path / "in.h5ad")
    with h5py.File(tmp_path / "in.h5ad", "r+") as file:
        if legacy:  # the encoding of the file is not named
            del file.attrs["encoding-type"], file.attrs["encoding-version"], file["layers"]["ints"]
        if kind == "none":
            del file["X"]
    expected = read_h5ad(tmp_path / "in.h5ad")
    embed(expected, model)
    monkeypatch.setattr(type(adata), "to_memory", None)
    run("embed", "--data", tmp_path / "in.h5ad", "--model", model, "--output", tmp_path / "out.zarr")
    found = read_zarr(tmp_path / "out.zarr")
    assert (found.X is None) == (kind == "none")
    pairs = [(found.raw.X, expected.raw.X)] + [(found.X, expected.X)] * (kind != "none")
    pairs += [(found.layers[name], expected.layers[name]) for name in ("ints",) if not legacy]
    for one, other in pairs:
        assert type(one) is type(other) and one.dtype == other.dtype
        one, other = (of if kind == "dense" else of.toarray() for of in (one, other))
        np.testing.assert_array_equal(one, other)
    for part in ("obs", "var", "obsm", "varm", "obsp", "layers", "uns"):
        assert set(getattr(found, part)) == set(getattr(expected, part)), part
    pd.testing.assert_frame_equal(found.obs, expected.obs, check_categorical=False)
    pd.testing.assert_frame_equal(found.raw.var, expected.raw.var)
    assert found.uns["params"]["inner"]["x"].tolist() == [0, 1, 2]
    np.testing.assert_allclose(found.obsm["X_stformer"], expected.obsm["X_stformer"], atol=1e-5)


def test_what_annotate_prints(adata):
    labels = np.array(["a"] * 50 + ["unknown"] * 6 + [None] * 4, dtype=object)
    adata.obs["stformer_label"], adata.obs["stformer_kind_label"] = pd.Categorical(labels), pd.Categorical(["b"] * 60)
    facts = {"problem_type": "single_label_classification", "columns": ["stformer_label", "stformer_score"]}
    adata.uns["stformer_annotation"] = facts
    of_all = "obs['stformer_label']: 56 of 60 cells labelled, 4 without a known gene"
    assert summary(adata) == [of_all]  # "unknown" is a class
    facts["reject"] = 0.05
    facts["columns"] = np.array(["stformer_label", "stformer_kind_label", "stformer_kind_score"])
    assert summary(adata) == [
        "obs['stformer_label']: 50 of 60 cells labelled, 6 unknown, 4 without a known gene",
        "obs['stformer_kind_label']: 60 of 60 cells labelled, 0 unknown",
    ]
    adata.uns["stformer_annotation"] = {"problem_type": "regression", "columns": ["stformer_label"]}
    assert summary(adata) == ["60 cells, obs: stformer_label"]


def test_other_suffixes_are_refused_before_any_work(file, tmp_path, capsys):
    """The model does not exist, which would be noticed next."""
    lists = {"annotate": ".h5ad, .zarr or .csv", "embed": ".h5ad or .zarr", "map": ".h5ad or .zarr"}
    for verb, suffixes in lists.items():
        for name in ("out.h5", "out", "out.txt", *(["out.csv"] if verb != "annotate" else [])):
            words = ["--data", file, "--model", "none", "--output", str(tmp_path / name)]
            assert main([verb, *words, *(["--reference", file] if verb == "map" else [])]) == 1
            assert f"pass a name that ends in {suffixes}." in capsys.readouterr().err
    words = ["annotate", "--data", file, "--model", "none", "--overwrite", "--output"]
    for name, why in (("a.zarr", "is a folder that is not a zarr"), ("a.csv", "a.csv is a folder; choose")):
        (tmp_path / name).mkdir()
        assert main([*words, str(tmp_path / name)]) == 1
        assert why in capsys.readouterr().err
    (tmp_path / "b.zarr").write_text("")
    assert main([*words, str(tmp_path / "b.zarr")]) == 1
    assert "is a file, and a zarr is a folder" in capsys.readouterr().err


@pytest.mark.parametrize("suffix", [".h5ad", ".zarr", ".csv"])
def test_nothing_is_left_of_a_file_that_cannot_be_written(adata, tmp_path, monkeypatch, suffix):
    """What was there before stays."""
    output = tmp_path / f"out{suffix}"
    files.write(adata, str(output), ["cell_type"])
    before = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*"))

    def fail(self, path, *args, **kwargs):
        if suffix == ".zarr":
            path.mkdir()
            path /= "X"
        path.write_text("half")
        raise OSError("No space left on device")

    for name in ("write_h5ad", "write_zarr"):
        monkeypatch.setattr(type(adata), name, fail)
    monkeypatch.setattr(pd.DataFrame, "to_csv", fail)
    with pytest.raises(OSError, match="No space left"):
        files.write(adata, str(output), ["cell_type"])
    assert sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*")) == before


@pytest.mark.slow
@pytest.mark.parametrize("verb", ["embed", "annotate"])
def test_two_processes_write_what_one_does(file, model, tmp_path, verb):
    run(verb, "--data", file, "--model", model, "--output", tmp_path / "one.h5ad")
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"]
    words = ["-m", "stformer_hf.cli", verb, "--data", file, "--model", model, "--output", str(tmp_path / "two.h5ad")]
    done = subprocess.run(
        [*launch, *words], capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-2000:]
    one, two = (read_h5ad(tmp_path / f"{name}.h5ad") for name in ("one", "two"))
    if verb == "embed":
        np.testing.assert_allclose(two.obsm["X_stformer"], one.obsm["X_stformer"], atol=1e-6)
        assert done.stdout.count("X_stformer") == 1
    else:
        assert two.obs["stformer_label"].equals(one.obs["stformer_label"])


@pytest.mark.parametrize("fractional", [False, True])
def test_cells_of_any_format_are_embedded_as_those_of_an_h5ad(fractional, model, adata, tmp_path):
    """Here the folder of mtx, features and barcodes that Cell Ranger writes; counts are checked as ever."""
    counts = adata.X.tocsr().astype(np.float64)
    counts.data[0] += 0.5 * fractional
    adata.X = counts
    folder = tmp_path / "filtered_feature_bc_matrix"
    folder.mkdir()
    mmwrite(folder / "matrix.mtx", counts.T.tocoo())
    (folder / "barcodes.tsv").write_text("".join(f"{name}\n" for name in adata.obs_names))
    (folder / "features.tsv").write_text("".join(f"{gene}\t{gene}\tGene Expression\n" for gene in adata.var_names))
    flags = ["--data", folder, "--model", model, "--output", tmp_path / "out.h5ad"]
    if fractional:
        assert main(["embed", *map(str, flags)]) == 1
        flags.append("--fractional")
    run("embed", *flags)
    embed(adata, model, fractional=fractional)
    found = read_h5ad(tmp_path / "out.h5ad")
    np.testing.assert_allclose(found.obsm["X_stformer"], adata.obsm["X_stformer"], atol=1e-5)
    assert list(found.obs_names) == list(adata.obs_names) and list(found.var_names) == list(adata.var_names)
    assert (found.X != counts.astype(np.float32)).nnz == 0


def test_an_empty_path_is_not_the_current_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="is empty"), files.writing(""):
        pass
    assert not list(tmp_path.iterdir())
