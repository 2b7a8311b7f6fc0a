"""`stformer-hf tokenize`, as a user types it."""

import json

import pytest
from datasets import load_from_disk
from scipy import sparse

from stformer_hf import CellStore, GeneTokenizer
from stformer_hf.cli import main


@pytest.fixture
def run(store, tmp_path, capsys):
    """Tokenize the store to a folder; gives the dataset, or the error's text."""

    def run(*flags, output=tmp_path / "tokens"):
        capsys.readouterr()
        status = main(["tokenize", "--data", str(store.path), "--output", str(output), *map(str, flags)])
        printed = capsys.readouterr()
        if status:
            assert status == 1 and "Traceback" not in printed.err
            return printed.err
        dataset = load_from_disk(str(output))
        assert printed.out == f"{output}: 60 cells, columns: {', '.join(dataset.column_names)}\n"
        return dataset

    return run


def own(folder) -> GeneTokenizer:
    """Load the tokenizer that was saved beside the tokens."""
    return GeneTokenizer.from_pretrained(folder / "tokenizer")


def assert_holds(dataset, store, tokenizer):
    tokens = [tokenizer.encode_cells(store.__getitems__([row]), epoch=0) for row in range(len(store))]
    assert dataset["input_ids"][:] == [cell.input_ids.tolist() for cell in tokens]
    assert dataset["token_type_ids"][:] == [cell.token_type_ids.tolist() for cell in tokens]


def test_with_a_saved_tokenizer(store, tokenizer, tmp_path, run):
    tokenizer.save_pretrained(tmp_path / "model")
    dataset = run("--tokenizer", tmp_path / "model", "--obs", "cell_type")
    assert dataset.column_names == ["input_ids", "token_type_ids", "length", "cell_id", "cell_type"]
    assert_holds(dataset, store, tokenizer)
    assert own(tmp_path / "tokens").fingerprint == tokenizer.fingerprint
    dataset = run(
        *("--tokenizer", tmp_path / "model", "--obs", "all", "--rows_per_shard", "20", "--overwrite"),
    )
    assert dataset.column_names[4:] == ["cell_type", "age"]
    assert len(list((tmp_path / "tokens").glob("*.arrow"))) == 3
    assert_holds(dataset, store, tokenizer)


def test_a_new_binned_tokenizer(store, tmp_path, run):
    dataset = run(
        *("--bin_edges", "0.5", "2.5", "--phenotypes", "cell_type", "--max_length", "9", "--truncation", "head")
    )
    tokenizer = own(tmp_path / "tokens")
    assert (tokenizer.scheme, tokenizer.bin_edges, tokenizer.included_phenotypes) == (
        "binned",
        [0.5, 2.5],
        ["cell_type"],
    )
    assert (tokenizer.max_length, tokenizer.truncation) == (9, "head")
    assert max(dataset["length"]) == 9
    expected = GeneTokenizer.from_store(
        store, phenotypes=["cell_type"], bin_edges=[0.5, 2.5], max_length=9, truncation="head"
    )
    assert_holds(dataset, store, expected)
    assert_holds(run(output=tmp_path / "default"), store, GeneTokenizer.from_store(store))


@pytest.mark.parametrize("form", ["plain", "with settings"])
def test_a_new_rank_tokenizer(store, tmp_path, run, form):
    medians = {gene: 0.5 + i * 7 % 11 for i, gene in enumerate(store.gene_ids)}
    medians[store.gene_ids[3]] = None  # never seen
    content = medians if form == "plain" else {"target_sum": 1000.0, "n_cells": 60, "medians": medians}
    (tmp_path / "gene_medians.json").write_text(json.dumps(content))
    dataset = run("--scheme", "rank", "--medians", tmp_path / "gene_medians.json")
    assert dataset.column_names == ["input_ids", "token_type_ids", "length", "cell_id"]
    target_sum = 1e4 if form == "plain" else 1e3
    assert own(tmp_path / "tokens").target_sum == target_sum
    assert_holds(dataset, store, GeneTokenizer.from_store(store, "rank", medians=medians, target_sum=target_sum))


def test_a_tokenizer_of_neighbourhoods_gets_them(adata, tmp_path):
    adata.obsp["graph"] = sparse.eye(60, format="csr", k=1)
    store = CellStore.build(tmp_path / "s", adata, neighbors="graph")
    medians = dict.fromkeys(store.gene_ids, 1.0)
    tokenizer = GeneTokenizer.from_store(store, "rank", medians=medians, neighborhood=True)
    tokenizer.save_pretrained(tmp_path / "model")
    flags = ["--data", store.path, "--tokenizer", tmp_path / "model", "--output", tmp_path / "t"]
    assert main(["tokenize", *map(str, flags)]) == 0
    assert_holds(load_from_disk(str(tmp_path / "t")), store.with_neighborhoods(), tokenizer)


def test_the_config_gives_values_and_flags_override_it(store, tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text(f"data: {store.path}\noutput: {tmp_path / 'a'}\nbin_edges: [0.5, 2]\nmax_length: 20\nobs: all\n")
    assert main(["tokenize", "--config", str(config), "--output", str(tmp_path / "b"), "--max_length", "10"]) == 0
    assert not (tmp_path / "a").exists()
    assert (own(tmp_path / "b").bin_edges, own(tmp_path / "b").max_length) == ([0.5, 2], 10)
    assert load_from_disk(str(tmp_path / "b")).column_names[4:] == ["cell_type", "age"]


@pytest.mark.slow
def test_two_workers(store, tokenizer, tmp_path, run):
    tokenizer.save_pretrained(tmp_path / "model")
    assert_holds(run("--tokenizer", tmp_path / "model", "--workers", "2", "--rows_per_shard", "20"), store, tokenizer)


def test_what_cannot_be_is_told(store, tokenizer, adata, tmp_path, run, capsys):
    adata.write_h5ad(tmp_path / "cells.h5ad")
    assert main(["tokenize", "--data", str(tmp_path / "cells.h5ad"), "--output", str(tmp_path / "t")]) == 1
    assert "stformer-hf build --data" in capsys.readouterr().err
    assert main(["tokenize", "--data", str(tmp_path / "none"), "--output", str(tmp_path / "t")]) == 1
    assert "no CellStore at" in capsys.readouterr().err
    tokenizer.save_pretrained(tmp_path / "model")
    assert "--scheme, --max_length: only for a new tokenizer" in run(
        *("--tokenizer", tmp_path / "model", "--max_length", "9", "--scheme", "binned")
    )
    assert "needs medians" in run("--scheme", "rank")
    assert "'binned' or" in run("--scheme", "ranks").replace('"', "'")
    assert "There is no obs['donor']" in run("--obs", "donor")
    for text, words in (
        ("{", "is not JSON"),
        ("[1]", "holds a list"),
        ('{"a": "b"}', "Medians must be numbers, got 'b'"),
    ):
        (tmp_path / "medians.json").write_text(text)
        assert words in run("--scheme", "rank", "--medians", tmp_path / "medians.json")
    (tmp_path / "medians.json").write_text(json.dumps(dict.fromkeys(store.gene_ids, 1.0)))
    assert "only for the rank scheme" in run("--medians", tmp_path / "medians.json")
    assert "No such file" in run("--scheme", "rank", "--medians", tmp_path / "none.json")
    assert not (tmp_path / "tokens").exists()
    run()
    assert "exists" in run()
    assert len(load_from_disk(str(tmp_path / "tokens"))) == 60
    CellStore(store.path).verify()
