"""Folds that keep twins and groups on one side."""

import numpy as np
import pytest
from scipy import sparse

from stformer_hf.evaluation.splits import draw_labelled, find_twins, make_folds


def counts_of(*rows) -> sparse.csr_array:
    return sparse.csr_array(np.array(rows))


def test_twins_have_equal_barcodes_and_equal_counts():
    names = ["AAACCTGAGA-1", "sample2_AAACCTGAGA-1-1", "AAACCTGAGA-2", "TTTGGTGAGA-1", "cell7", "cell7-1"]
    one, other = [1, 0, 2], [1, 1, 2]
    twins = find_twins(names, counts_of(one, one, other, one, one, one))
    assert twins[0] == twins[1]
    assert twins[4] == twins[5]
    assert len(set(twins[[0, 2, 3, 4]])) == 4  # other counts, another barcode, another name
    # Where a count stands matters, not only how large it is.
    assert len(set(find_twins(["a", "a-1"], counts_of([1, 0, 2], [0, 1, 2])))) == 2


@pytest.mark.parametrize("grouped", [False, True])
def test_twins_and_groups_stay_on_one_side(grouped):
    rng = np.random.default_rng(0)
    labels = rng.choice(["a", "b", "c"], 300, p=[0.6, 0.3, 0.1])
    twins = np.arange(300)
    twins[150:200] = np.arange(50)  # fifty pairs
    groups = rng.integers(0, 12, 300)
    groups[150:200] = groups[:50]
    groups[150] += 1  # of the one pair that is of two donors
    folds = make_folds(labels, twins, n_splits=4, n_repeats=3, seed=0, groups=groups if grouped else None)
    assert [(fold.repeat, fold.number) for fold in folds] == [(r, f) for r in range(3) for f in range(4)]
    for repeat in range(3):
        tested = np.concatenate([fold.test for fold in folds if fold.repeat == repeat])
        assert np.array_equal(np.sort(tested), np.arange(300))
    for fold in folds:
        assert np.array_equal(np.union1d(fold.train, fold.test), np.arange(300))
        assert not set(twins[fold.train]) & set(twins[fold.test])
        if grouped:
            assert not set(groups[fold.train]) & set(groups[fold.test])
        else:
            assert np.mean(labels[fold.test] == "c") == pytest.approx(np.mean(labels == "c"), abs=0.06)
    assert not np.array_equal(folds[0].test, folds[4].test)


def test_groups_that_share_twins_count_as_one():
    labels = np.array(["a", "b"] * 6)
    groups = np.repeat(["p", "q", "r"], 4)
    twins = np.arange(12)
    twins[4] = 0  # of q and of p
    folds = make_folds(labels, twins, n_splits=2, n_repeats=1, seed=0, groups=groups)
    assert {frozenset(groups[fold.test]) for fold in folds} == {frozenset("pq"), frozenset("r")}
    with pytest.raises(ValueError, match="2 groups of cells cannot make 3 folds"):
        make_folds(labels, twins, n_splits=3, n_repeats=1, seed=0, groups=groups)
    with pytest.raises(ValueError, match="pass n_repeats=1, not 2"):
        make_folds(labels, twins, n_splits=2, n_repeats=2, seed=0, groups=groups)


def test_groups_are_spread_so_that_classes_are_even():
    labels = np.concatenate([np.repeat([name], 10) for name in "aaaabbbbcccc"])
    groups = np.repeat(np.arange(12), 10)
    for fold in make_folds(labels, np.arange(120), n_splits=4, n_repeats=2, seed=0, groups=groups):
        assert sorted(labels[fold.test]) == sorted(np.repeat(["a", "b", "c"], 10))


def test_labelled_cells_are_drawn_from_the_training_cells_of_each_class():
    labels = np.repeat(["a", "b", "c"], 30)
    train = np.arange(0, 90, 2)
    drawn = draw_labelled(labels, train, ["a", "c"], 5, np.random.default_rng(0))
    assert labels[drawn].tolist() == ["a"] * 5 + ["c"] * 5
    assert len(set(drawn)) == 10 and set(drawn) <= set(train)
