"""BlockShuffleSampler: blocks stay together, and any position gives the rest."""

import json
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from stformer_hf import EvenBatchSampler
from stformer_hf.batches.samplers import BlockShuffleSampler, SameSourceSampler
from stformer_hf.store.block_order import block_order
from stformer_hf.store.read_ahead import MappedFile


def test_blocks_stay_together_in_the_order_of_the_store(store):
    sampler = BlockShuffleSampler(store, 8, seed=3)
    sampler.set_epoch(2)
    rows = list(sampler)
    assert rows == store.block_shuffle(8, seed=3, epoch=2).tolist()
    assert sorted(rows) == list(range(60)) and len(sampler) == 60
    starts = [row for row in rows if row % 8 == 0]
    assert rows == [row for start in starts for row in range(start, min(start + 8, 60))]


def test_the_order_is_a_function_of_seed_and_epoch(store):
    def order(seed, epoch):
        sampler = BlockShuffleSampler(store, 4, seed)
        sampler.set_epoch(epoch)
        return tuple(sampler)

    assert order(1, 1) == order(1, 1)
    assert len({order(seed, epoch) for seed in range(3) for epoch in range(3)}) == 9


def test_a_loader_reads_the_rows(store):
    sampler = BlockShuffleSampler(store, 4)
    loader = DataLoader(store, batch_size=16, sampler=sampler, collate_fn=lambda batch: batch.cell_id.tolist())
    assert len(loader) == 4
    assert sum(loader, []) == store.block_shuffle(4).tolist()


class Asked(Sequence):
    """Rows that are also asked for beforehand, as those of a store on a disk."""

    def __init__(self, n):
        self.n, self.asked = n, []

    def __len__(self):
        return self.n

    def __getitem__(self, row):
        return row

    def read_ahead(self, rows):
        self.asked += rows.tolist()


@given(
    n=st.integers(0, 90),
    block_size=st.integers(1, 6),
    window=st.integers(2, 5),
    world_size=st.integers(1, 3),
    data=st.data(),
)
def test_the_rows_of_a_window_are_asked_for_before_they_are_read(n, block_size, window, world_size, data):
    rank = data.draw(st.integers(0, world_size - 1))
    store = Asked(n)
    sampler = BlockShuffleSampler(store, block_size, 7, window=window, rank=rank, world_size=world_size)
    order = block_order(n, block_size, 7, 0, window=window).tolist()
    expected = order[rank * n // world_size : (rank + 1) * n // world_size]
    n_taken = data.draw(st.integers(0, len(expected)))
    sampler.load_state_dict(sampler.state_after(n_taken))
    rows = []
    for row in sampler:
        assert row in store.asked
        rows.append(row)
    assert rows == expected[n_taken:]
    size = window * block_size
    assert len(set(store.asked)) == len(store.asked) <= len(rows) + 2 * size, "each once, and not the whole store"


def test_a_store_is_asked_for_the_bytes_of_the_next_window(store, monkeypatch):
    ranges = []
    monkeypatch.setattr(MappedFile, "ask_for", lambda file, start, stop: ranges.append((start, stop)))
    rows = list(BlockShuffleSampler(store, 4, window=3))
    assert sorted(rows) == list(range(len(store)))
    asked = sum(stop - start for start, stop in ranges)
    one = ranges.copy()
    ranges.clear()
    store.read_ahead(slice(None))
    assert asked == sum(stop - start for start, stop in ranges) > 0
    assert len(one) > len(ranges), "block after block"


@given(
    n=st.integers(0, 50),
    block_size=st.integers(1, 9),
    world_size=st.integers(1, 4),
    epoch=st.integers(0, 3),
    data=st.data(),
)
def test_a_state_at_any_position_gives_the_rest(n, block_size, world_size, epoch, data):
    rank = data.draw(st.integers(0, world_size - 1))

    def make():
        return BlockShuffleSampler(range(n), block_size, seed=5, rank=rank, world_size=world_size)

    sampler = make()
    sampler.set_epoch(epoch)
    n_taken = data.draw(st.integers(0, len(sampler)))
    rows = iter(sampler)
    taken = [next(rows) for _ in range(n_taken)]
    state = json.loads(json.dumps(sampler.state_dict()))
    assert state == sampler.state_after(n_taken)
    whole = list(sampler)
    assert len(whole) == len(sampler)

    other = make()
    other.load_state_dict(state)
    other.set_epoch(epoch)  # as Trainer does when it goes on
    assert other.state_dict() == state
    assert taken + list(other) == whole
    assert list(other) == whole  # a state is for one iteration
    other.load_state_dict(state)
    other.set_epoch(epoch + 1)
    assert len(list(other)) == len(whole)


def test_ranks_divide_the_rows():
    for world_size in range(1, 6):
        parts = [
            list(BlockShuffleSampler(range(37), 4, rank=rank, world_size=world_size)) for rank in range(world_size)
        ]
        assert sum(parts, []) == list(BlockShuffleSampler(range(37), 4))
        assert np.ptp([len(part) for part in parts]) <= 1


def test_a_loader_that_was_stopped_goes_on(store):
    """A loader with workers draws rows ahead; what it delivered is known by its batches."""

    def loader(sampler):
        return DataLoader(store, 8, sampler=sampler, num_workers=2, collate_fn=lambda batch: batch.cell_id.tolist())

    batches = list(loader(BlockShuffleSampler(store, 4)))
    stopped = BlockShuffleSampler(store, 4)
    started = iter(loader(stopped))
    delivered = [next(started) for _ in range(2)]
    assert stopped.state_dict()["taken"] > 16
    other = BlockShuffleSampler(store, 4)
    other.load_state_dict(stopped.state_after(16))
    assert delivered + list(loader(other)) == batches


def test_other_states_and_arguments_that_cannot_be_raise(store):
    sampler = BlockShuffleSampler(store, 4)
    for other in (
        BlockShuffleSampler(range(59), 4),
        BlockShuffleSampler(store, 5),
        BlockShuffleSampler(store, 4, seed=1),
        BlockShuffleSampler(store, 4, world_size=2),
        BlockShuffleSampler(store, 4, window=2),
    ):
        with pytest.raises(ValueError, match="another sampler: .* instead of"):
            other.load_state_dict(sampler.state_dict())
    state = sampler.state_dict()
    del state["settings"]["order"]  # as versions wrote it whose order was another one
    with pytest.raises(ValueError, match=r"order None instead of 'by position \(new in version 0.2\)'"):
        sampler.load_state_dict(state)
    with pytest.raises(ValueError, match="n_drawn=61, but an epoch has 60"):
        sampler.state_after(61)
    with pytest.raises(ValueError, match="rank=1 of world_size=1"):
        BlockShuffleSampler(store, rank=1)
    with pytest.raises(ValueError, match="at least one row"):
        BlockShuffleSampler(store, 0)
    with pytest.raises(ValueError, match="at least one block"):
        BlockShuffleSampler(store, window=0)


@given(
    sizes=st.lists(st.integers(0, 40), min_size=1, max_size=5),
    batch_size=st.integers(1, 9),
    world_size=st.integers(1, 3),
    epoch=st.integers(0, 2),
)
def test_batches_of_one_source(sizes, batch_size, world_size, epoch):
    sources = np.random.default_rng(0).permutation(np.repeat(np.arange(len(sizes)), sizes))
    sampler = SameSourceSampler(sources, batch_size, seed=4)
    sampler.set_epoch(epoch)
    rows = list(sampler)
    assert sorted(rows) == list(range(len(sources))) and len(sampler) == len(rows)
    n_full = sum(size // batch_size for size in sizes)
    for start in range(0, n_full * batch_size, batch_size):
        assert len(set(sources[rows[start : start + batch_size]])) == 1
    rest = sources[rows[n_full * batch_size :]]
    assert (np.diff(rest) >= 0).all() and all((rest == of).sum() < batch_size for of in set(rest))
    if len(rows) >= world_size * -(-len(rows) // (batch_size * world_size)):  # else some come twice
        batches = list(EvenBatchSampler(sampler, batch_size, world_size=world_size))
        assert len(batches) % world_size == 0 and sorted(sum(batches, [])) == sorted(rows)
        mixed = sum(len(set(sources[batch])) > 1 for batch in batches)
        assert mixed <= len(batches) - n_full
        # Any position gives the rest.
        whole = SameSourceSampler(sources, batch_size, seed=4)
        whole.load_state_dict(json.loads(json.dumps(sampler.state_after(len(rows) // 2))))
        assert list(whole) == rows[len(rows) // 2 :]


def test_batches_of_one_source_come_in_another_order_each_epoch():
    sampler = SameSourceSampler(np.repeat([0, 1], 50), 10)
    orders = set()
    for epoch in range(3):
        sampler.set_epoch(epoch)
        orders.add(tuple(sampler))
    assert len(orders) == 3
    with pytest.raises(ValueError, match="batch_size=0"):
        SameSourceSampler(np.zeros(3), 0)
