"""benchmarks annotate and network: what is kept of several runs, and what is compared between models."""

import json

import numpy as np

from benchmarks.annotate import _add
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
