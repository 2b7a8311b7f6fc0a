"""`stformer-hf medians`: medians of files as a file, in one step or from parts."""

import json

import numpy as np
import pytest
from conftest import make_adata

from stformer_hf import GeneStatistics, estimate_gene_medians
from stformer_hf.cli import main


@pytest.fixture
def files(tmp_path):
    paths = []
    for i in range(2):
        paths.append(str(tmp_path / f"{i}.h5ad"))
        make_adata(seed=i).write_h5ad(paths[-1])
    return paths


def test_medians_of_files_in_one_step_and_from_parts(files, tmp_path, capsys):
    whole = tmp_path / "new" / "gene_medians.json"
    assert main(["medians", "--data", *files, "--output", str(whole), "--target_sum", "1e6"]) == 0
    assert "gene_medians.json: 40 medians; GeneStatistics(40 genes, 118 cells, exact)" in capsys.readouterr().out
    found = json.loads(whole.read_text())
    assert found["medians"] == estimate_gene_medians(files, 1e6).medians
    parts = [str(tmp_path / f"{i}.npz") for i in range(2)]
    for file, part in zip(files, parts, strict=True):
        assert main(["medians", "--data", file, "--output", part, "--target_sum", "1e6"]) == 0
    merged = tmp_path / "merged.json"
    assert main(["medians", "--data", *parts, "--output", str(merged)]) == 0
    assert json.loads(merged.read_text())["medians"] == found["medians"]


def test_flags_reach_the_estimate(files, tmp_path):
    output = tmp_path / "a.npz"
    flags = ["--method", "sketch", "--layer", "X", "--unify", "symbol", "--fractional", "true"]
    assert main(["medians", "--data", *files, "--output", str(output), *flags]) == 0
    assert GeneStatistics.load(output).method == "sketch"
    (tmp_path / "aliases.json").write_text(json.dumps({"ENSG00000000000": "ENSG00000000001"}))
    flags = ["--max_memory", "1e-7", "--aliases", str(tmp_path / "aliases.json"), "--overwrite"]
    assert main(["medians", "--data", *files, "--output", str(output), *flags]) == 0
    statistics = GeneStatistics.load(output)
    assert (statistics.method, len(statistics)) == ("sketch", 39)
    expected = estimate_gene_medians(files, method="exact", aliases={"ENSG00000000000": "ENSG00000000001"})
    np.testing.assert_allclose(statistics.table["median"], expected.table["median"], rtol=0.0075)


def test_what_is_there_is_kept_and_wrong_outputs_are_told_at_once(files, tmp_path, capsys):
    mine = tmp_path / "mine.json"
    mine.write_text("mine")
    for output, sources, words in [
        (mine, ["none.h5ad"], "mine.json exists"),
        (tmp_path / "a.csv", ["none.h5ad"], "pass a .json file for the results"),
        (tmp_path / "a.json", ["a.npz", files[0]], "parts (.npz) or cells, not both"),
        (tmp_path / "a.json", [str(tmp_path / "none.npz")], "none.npz"),
    ]:
        assert main(["medians", "--data", *sources, "--output", str(output)]) == 1
        assert words in capsys.readouterr().err
    assert mine.read_text() == "mine"
