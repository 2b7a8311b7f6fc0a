"""block_order: every order is about as likely as any other, and any part of it needs memory for that part alone."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from stformer_hf.batches import samplers
from stformer_hf.batches.samplers import BlockShuffleSampler
from stformer_hf.store import block_order as block_order_module
from stformer_hf.store.block_order import block_order


@pytest.mark.parametrize("of", ["seeds", "epochs"])
def test_each_row_is_at_each_place_equally_often_and_followed_by_any(of, monkeypatch):
    monkeypatch.setattr(block_order_module, "_FEW", 0)
    n, n_orders = 37, 1000
    keys = [(i, 0) if of == "seeds" else (0, i) for i in range(n_orders)]
    orders = np.stack([block_order(n, 1, *key) for key in keys])
    assert (np.sort(orders, axis=1) == np.arange(n)).all()
    places = np.stack([np.bincount(orders[:, place], minlength=n) for place in range(n)])
    pairs = np.zeros((n, n))
    np.add.at(pairs, (orders[:, :-1].ravel(), orders[:, 1:].ravel()), 1)
    for counts, dof in ((places, (n - 1) ** 2), (pairs[~np.eye(n, dtype=bool)], n * (n - 1) - 1)):
        chi_square = ((counts - counts.mean()) ** 2).sum() / counts.mean()
        assert abs(chi_square - dof) < 5 * (2 * dof) ** 0.5


@pytest.mark.parametrize("n", [16, 64, 8192])
def test_two_rows_differ_by_any_number_whatever_the_places_between_them(n):
    """With five rounds of the Feistel network, pairs that differ in one half of the bits fail at 8,192 blocks."""
    n_low = (n - 1).bit_length() // 2 + (n - 1).bit_length() % 2
    places, n_orders = np.arange(n), min(160_000 // n, 2000)
    orders = np.stack([block_order(n, 1, seed, 0) for seed in range(n_orders)])
    for apart in (np.arange(1, 1 << n_low), np.arange(1, n >> n_low) << n_low):
        counts = np.zeros((len(apart), n >> n_low))
        for of, distance in zip(counts, apart, strict=True):
            differences = (orders ^ orders[:, places ^ distance]) >> n_low
            of += np.bincount(differences.ravel(), minlength=n >> n_low) / 2
        expected = np.full(n >> n_low, n_orders * n / 2 * (1 << n_low) / (n - 1))
        expected[0] *= 1 - 1 / (1 << n_low)  # two rows are not the same
        chi_square, dof = ((counts - expected) ** 2 / expected).sum(), counts.size - len(apart)
        assert abs(chi_square - dof) < 4.5 * (2 * dof) ** 0.5


def test_the_incomplete_block_may_be_anywhere():
    places = [np.flatnonzero(block_order(10, 4, seed, 0) == 8)[0] for seed in range(300)]
    found, counts = np.unique(places, return_counts=True)
    assert found.tolist() == [0, 4, 8] and counts.min() > 60


def test_a_part_of_a_large_order_takes_no_memory_for_the_rest():
    tracemalloc.start()
    try:
        rows = block_order(10**9 + 5, 16, 0, 3, 5 * 10**8 - 7, 5 * 10**8 + 1000)
        taken = next(iter(BlockShuffleSampler(range(10**9 + 5), 16)))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(set(rows.tolist())) == 1007 and 0 <= min(rows) and max(rows) < 10**9 + 5
    assert taken == block_order(10**9 + 5, 16, 0, 0, 0, 1)[0]
    assert peak < 20e6


def test_a_sampler_joins_the_parts_that_it_computes(monkeypatch):
    monkeypatch.setattr(samplers, "_AT_ONCE", 7)
    sampler = BlockShuffleSampler(range(50), 4, seed=1, rank=1, world_size=2)
    whole = block_order(50, 4, 1, 0)
    assert list(sampler) == whole[25:].tolist()
    sampler.load_state_dict(sampler.state_after(9))
    assert list(sampler) == whole[34:].tolist()


@given(
    n=st.integers(0, 60),
    block_size=st.integers(1, 7),
    window=st.integers(1, 8),
    seed=st.integers(0, 5),
    data=st.data(),
)
def test_a_window_shuffles_the_rows_of_its_blocks(n, block_size, window, seed, data):
    whole = block_order(n, block_size, seed, 1, window=window)
    blocks, size = block_order(n, block_size, seed, 1), window * block_size
    for first in range(0, n, size):
        assert sorted(whole[first : first + size]) == sorted(blocks[first : first + size])
    start = data.draw(st.integers(0, n))
    stop = data.draw(st.integers(start, n))
    np.testing.assert_array_equal(block_order(n, block_size, seed, 1, start, stop, window=window), whole[start:stop])


def test_rows_of_a_window_are_at_each_place_equally_often():
    orders = np.stack([block_order(12, 3, seed, 0, window=4) for seed in range(400)])
    counts = np.stack([np.bincount(places, minlength=12) for places in orders.T])
    expected = len(orders) / 12
    assert ((counts - expected) ** 2 / expected).sum() < stats.chi2.ppf(0.999, 11 * 11)
    assert len({tuple(block_order(12, 3, 0, epoch, window=4)) for epoch in range(9)}) == 9
