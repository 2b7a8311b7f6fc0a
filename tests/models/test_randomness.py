"""Numbers that are a function: uniform, independent of each other, equal wherever they are drawn."""

import numpy as np
import pytest
from scipy import stats

from stformer_hf.models.gene_bert.randomness import uniforms


def test_equal_keys_give_equal_numbers_in_any_company():
    ids = np.arange(1000)
    whole = uniforms(3, 1, 0, ids, ids % 7)
    np.testing.assert_array_equal(uniforms(3, 1, 0, ids[500:600], ids[500:600] % 7), whole[500:600])


@pytest.mark.parametrize(
    "draw",
    [
        lambda: uniforms(0, 0, 0, np.arange(100_000)),
        lambda: uniforms(0, 0, 0, np.zeros(100_000, int), np.arange(100_000)),
        lambda: np.concatenate([uniforms(seed, 0, 0, np.array([5])) for seed in range(5_000)]),
        lambda: np.concatenate([uniforms(0, epoch, 0, np.array([5])) for epoch in range(5_000)]),
        lambda: np.concatenate([uniforms(0, 0, stream, np.array([5])) for stream in range(5_000)]),
    ],
    ids=["cells", "counters", "seeds", "epochs", "streams"],
)
def test_numbers_are_uniform_and_not_correlated(draw):
    numbers = draw()
    assert 0 <= numbers.min() and numbers.max() < 1
    assert stats.kstest(numbers, "uniform").pvalue > 1e-4
    for lag in (1, 2, 17):
        assert abs(np.corrcoef(numbers[lag:], numbers[:-lag])[0, 1]) < 4 / len(numbers) ** 0.5


def test_parts_of_the_key_cannot_be_traded():
    values = {
        float(uniforms(seed, epoch, stream, np.array([cell]), np.array([counter]))[0])
        for seed in range(4)
        for epoch in range(4)
        for stream in range(4)
        for cell in range(4)
        for counter in range(4)
    }
    assert len(values) == 4**5


def test_negative_and_huge_ids():
    numbers = uniforms(-1, 0, 0, np.array([-5, 2**62]))
    assert ((numbers >= 0) & (numbers < 1)).all()
