"""benchmarks objectives: the archives of embeddings, and what is told of several seeds."""

import numpy as np
import pytest

from benchmarks import objectives


def _record(name: str, seed: int, knn: list[float], ari: float) -> dict:
    scores = {"knn": knn, "probe": knn, "ari": [ari], "effective_rank": 3.0}
    return {"run": name, "seed": seed, "steps": 10, "scores": {"cells": scores}}


def test_archives_of_several_folders_are_read_in_the_order_of_the_runs(tmp_path):
    states = np.random.default_rng(0).normal(size=(4, 2)).astype(np.float32)
    for folder, names in (("a", ["mlm", "contrast:disjoint"]), ("b", [objectives.START])):
        (tmp_path / folder).mkdir()
        runs = [
            ({"run": name, "seed": 1}, {"cells": states, "labels/cells": np.array(list("xyxy"))}) for name in names
        ]
        objectives._save(tmp_path / folder / "wave.zip", runs)
    found = objectives._load([str(tmp_path / "a"), str(tmp_path / "b")])
    assert [record["run"] for record, _ in found] == [objectives.START, "contrast:disjoint", "mlm"]
    assert found[0][1]["cells"].dtype == np.float16 and found[0][1]["labels/cells"].tolist() == list("xyxy")
    np.testing.assert_allclose(found[0][1]["cells"], states, atol=2e-3)
    assert not list(tmp_path.rglob("*.new"))


def test_differences_to_step_0_are_paired_by_fold():
    before = _record(objectives.START, 0, [0.2, 0.5, 0.8], 0.4)
    runs = [before, _record("mlm", 0, [0.3, 0.6, 0.9], 0.5), _record("mlm", 1, [0.5, 0.8, 1.1], 0.7)]
    start, mlm = objectives.summary(runs)
    assert start["sets"]["cells"]["knn"]["difference"] == 0 and start["sets"]["cells"]["knn"]["sd"] is None
    knn, ari = (mlm["sets"]["cells"][kind] for kind in ("knn", "ari"))
    assert knn["mean"] == pytest.approx(0.7) and knn["sd"] == pytest.approx(np.sqrt(0.02))
    assert knn["difference"] == pytest.approx(0.2) and knn["error"] == pytest.approx(0)  # the same in each fold
    assert ari["difference"] == pytest.approx(0.2) and ari["error"] == pytest.approx(0.1)
    scores, differences = objectives.table(runs).split("\n\n")
    assert "**0.700** ± 0.141" in scores and "step 0" in scores
    assert "+0.200 ± 0.000" in differences and "step 0" not in differences


def test_every_run_has_a_view_if_it_trains_the_cell():
    assert all((view is None) == (list(of) == ["mlm"]) for of, view in objectives.RUNS.values())
