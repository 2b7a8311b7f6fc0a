"""benchmarks annotate and network: what is kept of several runs, and what is compared between models."""

import json

import numpy as np
import pandas as pd
from anndata import AnnData
from scipy import sparse

from benchmarks.annotate import _add, mix, mixing_table
from benchmarks.network import _compare


def test_rows_of_an_earlier_run_are_kept_unless_they_are_measured_again(tmp_path):
    def row(left_out, auroc, name="demo", method="lr"):
        return {"set": name, "left_out": left_out, "method": method, "auroc": auroc}

    kept = [row("B", 0.1), row("T", 0.2), row("B", 0.3, "citeseq"), row("B", 0.4, method="annotate")]
    found = {"rejection": list(kept), "mapping": []}
    _add(tmp_path / "a.json", found, "rejection", [row("B", 0.9)])
    assert json.loads((tmp_path / "a.json").read_text())["rejection"] == [*kept[1:], row("B", 0.9)]
    mapped = [{"set": "demo", "seed": seed, "method": "lr"} for seed in (0, 1)]
    _add(tmp_path / "a.json", found, "mapping", mapped)
    _add(tmp_path / "a.json", found, "mapping", mapped[:1])
    assert found["mapping"] == mapped[::-1]


def test_cells_of_a_condition_are_mapped_onto_the_others(tmp_path):
    """Those that differ are rejected and do not mix; those that do not differ mix."""
    rng = np.random.default_rng(0)
    rates = rng.lognormal(0, 1, 300)
    changed = rates * np.where(np.arange(300) < 60, 6, 1)
    conditions = np.repeat(["ctrl", "stim"], [1600, 810])
    counts = rng.poisson(np.where((conditions == "stim")[:, None], changed, rates)).astype(np.float32)
    obs = pd.DataFrame({"label": pd.Categorical(conditions)}, index=[f"c{i}" for i in range(2410)])
    var = pd.DataFrame(index=[f"ENSG{i:011d}" for i in range(300)])
    records = mix(AnnData(sparse.csr_matrix(counts), obs=obs, var=var), 0, tmp_path / "mixing.png")
    assert (tmp_path / "mixing.png").exists() and len(records) == 4
    stim, ctrl = (one for one in records if one["method"] == "map_to_reference, no labels")
    assert stim["n"] == ctrl["n"] == 800
    assert stim["ilisi"] < 0.1 and stim["rejected"] > 0.5
    assert ctrl["ilisi"] > 0.5 and ctrl["rejected"] < 0.15
    table = mixing_table(records).splitlines()
    assert len(table) == 6 and table[2].startswith("| stim onto ctrl | map_to_reference, no labels | 0.0")


def test_networks_are_compared_pair_by_pair_of_models(tmp_path):
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(40, 40))
    scores[3, 5] = scores[5, 3] = np.nan
    edges = np.array([f"g{i} h{i}" for i in range(1000)])
    single = dict.fromkeys(("n_pairs", "spearman", "top_share", "of_edges", "of_all", "cpu_seconds"), 1.0)
    others = (scores, edges), (2 * scores, np.roll(edges, 30)), (-scores, edges[::-1])
    for seed, (of, names) in enumerate(others):
        np.savez(tmp_path / f"attention_{seed}.npz", scores=of, edges=names, **single)
    found = _compare(tmp_path, "attention", [0, 1, 2])
    assert found["cpu_seconds"] == [1.0, 1.0, 1.0]
    np.testing.assert_allclose(found["stability_spearman"], [1, -1, -1])
    assert found["stability_top_share"] == [1, 0, 0]
    assert found["stability_same_edges"] == [70, 0, 30]  # of the 100 strongest
