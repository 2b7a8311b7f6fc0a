"""Figures that tell of a collapsed embedding, and of one that is the total."""

import numpy as np
import pytest
import torch

from stformer_hf.training.objectives.watch import effective_rank, total_r2


def test_effective_rank_is_the_number_of_equal_directions():
    assert effective_rank(torch.eye(6)[:4] * 3) == pytest.approx(4)
    assert effective_rank(torch.ones(50, 8)) == pytest.approx(1)
    values = np.array([3.0, 1.0])
    shares = values / values.sum()
    expected = np.exp(-(shares * np.log(shares)).sum())
    assert effective_rank(torch.diag(torch.tensor(values))) == pytest.approx(expected)


def test_total_r2_is_that_of_cells_left_out():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(40, 6))
    y = np.exp(x[:, 0] + 0.5 * rng.normal(size=40) + 5)
    standard = (x - x.mean(0)) / x.std(0)
    found = []
    for penalty in (1.0, 10.0, 100.0, 1e3, 1e4):
        errors, around = [], []
        for out in range(40):
            # The intercept is the mean of all, as centring makes it: leave the cell out of the fit of both.
            kept = np.arange(40) != out
            design = np.column_stack([np.ones(40), standard])
            ridge = np.diag([0.0, *[penalty] * 6])
            weights = np.linalg.solve(design[kept].T @ design[kept] + ridge, design[kept].T @ np.log(y[kept]))
            errors.append(np.log(y[out]) - design[out] @ weights)
            around.append(np.log(y[out]) - np.log(y[kept]).mean())
        found.append(1 - np.square(errors).sum() / np.square(around).sum())
    assert total_r2(torch.from_numpy(x), torch.from_numpy(y)) == pytest.approx(max(found), abs=1e-9)
    assert max(found) > 0.5


def test_an_embedding_without_the_total_does_not_tell_it():
    rng = np.random.default_rng(0)
    states, totals = torch.from_numpy(rng.normal(size=(60, 50))), torch.from_numpy(rng.uniform(1, 9, 60))
    assert total_r2(states, totals) < 0.1
    assert np.isnan(total_r2(states[:2], totals[:2])) and np.isnan(total_r2(states, torch.ones(60)))
