"""Another commit against this tree."""

import json

import pytest

from benchmarks import commits


@pytest.mark.slow
def test_each_part_is_measured_with_the_code_of_both(tmp_path, monkeypatch):
    monkeypatch.setattr(commits, "N_CELLS", 60)
    trees, measured = [], commits._measured
    monkeypatch.setattr(commits, "_measured", lambda tree, cells: trees.append(tree) or measured(tree, cells))
    commits.run(["HEAD", "--turns", "2", "--output", str(tmp_path / "found.json")])
    found = json.loads((tmp_path / "found.json").read_text())
    old = trees[1]
    assert trees == [commits.REPOSITORY, old, old, commits.REPOSITORY] and old != commits.REPOSITORY
    assert found["new"].startswith(found["old"]) and set(found["parts"]) == {"build", "load", "tokenize", "train"}
    assert all(part["range"][0] <= part["ratio"] for part in found["parts"].values())


def test_code_that_is_not_first_on_the_path_is_refused(tmp_path):
    with pytest.raises(RuntimeError, match="was imported, not the code in"):
        commits.measure(str(tmp_path), "cells.h5ad")


def test_the_ratio_is_that_of_the_medians_and_the_range_that_of_the_turns():
    found = commits._compared([1.0, 2.0, 4.0], [2.0, 3.0, 12.0])
    assert found == {"old": 2.0, "new": 3.0, "ratio": 1.5, "range": [1.5, 3.0]}
