"""LengthGroupedSampler: like lengths together, every row once, equal shares for ranks, and any position resumes."""

import json
import logging

import h5py
import numpy as np
import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader, Subset

from stformer_hf.batches.length_sampler import (
    EvenBatchSampler,
    LengthGroupedSampler,
    batches_of_rank,
    even_out,
    known_lengths,
    padding_share,
)
from stformer_hf.batches.samplers import BlockShuffleSampler

LENGTHS = st.lists(st.integers(0, 30), max_size=70) | st.builds(lambda n: [7] * n, st.integers(0, 40))


def grouped(*args, epoch=0, **kwargs) -> LengthGroupedSampler:
    sampler = LengthGroupedSampler(*args, **kwargs)
    sampler.set_epoch(epoch)
    return sampler


def in_batches(rows, batch_size) -> list[list[int]]:
    rows = list(rows)
    return [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]


def rows_of_mega_batch(lengths, in_step, mega_batch) -> int:
    """At most `mega_batch` batches; a quarter of all, if that is less."""
    return in_step * max(1, min(mega_batch, len(lengths) // (4 * in_step)))


def plain_order(lengths, in_mega_batch, seed, epoch) -> list[int]:
    """The documented order, without numpy's sort."""
    order = np.random.default_rng([seed, epoch]).permutation(len(lengths)).tolist()
    if order:
        at = max(range(len(order)), key=lambda i: lengths[order[i]])
        order[0], order[at] = order[at], order[0]
    return [
        row
        for mega_batch in in_batches(order, in_mega_batch)
        for row in sorted(mega_batch, key=lambda row: -lengths[row])
    ]


@given(
    lengths=LENGTHS,
    batch_size=st.integers(1, 6),
    mega_batch=st.integers(1, 5),
    seed=st.integers(0, 9),
    epoch=st.integers(0, 3),
)
def test_mega_batches_of_a_permutation_are_sorted(lengths, batch_size, mega_batch, seed, epoch):
    sampler = grouped(lengths, batch_size, mega_batch=mega_batch, seed=seed, epoch=epoch)
    in_mega_batch = rows_of_mega_batch(lengths, batch_size, mega_batch)
    rows = list(sampler)
    assert rows == plain_order(lengths, in_mega_batch, seed, epoch)
    assert sorted(rows) == list(range(len(lengths))) and len(sampler) == len(lengths)
    for mega in in_batches(rows, in_mega_batch):
        assert [lengths[row] for row in mega] == sorted((lengths[row] for row in mega), reverse=True)
    if lengths:
        assert lengths[rows[0]] == max(lengths)


def test_the_order_is_a_function_of_seed_and_epoch():
    lengths = np.arange(40) % 7
    orders = {
        (seed, epoch): tuple(grouped(lengths, 4, seed=seed, epoch=epoch)) for seed in range(3) for epoch in range(3)
    }
    assert len(set(orders.values())) == 9
    assert all(tuple(grouped(lengths, 4, seed=seed, epoch=epoch)) == rows for (seed, epoch), rows in orders.items())
    sampler = LengthGroupedSampler(lengths, 4)
    assert list(sampler) == list(sampler)


@given(lengths=LENGTHS, batch_size=st.integers(1, 6), world_size=st.integers(1, 5), drop_last=st.booleans())
def test_ranks_have_rows_of_their_own_and_equally_many_batches(lengths, batch_size, world_size, drop_last):
    samplers = [
        grouped(lengths, batch_size, mega_batch=2, rank=rank, world_size=world_size, drop_last=drop_last, epoch=1)
        for rank in range(world_size)
    ]
    ranks = [list(sampler) for sampler in samplers]
    assert [len(sampler) for sampler in samplers] == [len(rows) for rows in ranks]
    batches = [in_batches(rows, batch_size) for rows in ranks]
    assert len({len(of_rank) for of_rank in batches}) == 1
    n, rows = len(lengths), sorted(sum(ranks, []))
    n_left = n % (batch_size * world_size)
    if drop_last:
        assert len(rows) == n - n_left and len(set(rows)) == len(rows)
    elif n_left and n_left < world_size:
        assert len(rows) == n - n_left + world_size and set(rows) == set(range(n))
    else:
        assert rows == list(range(n))
    # The batches of a step are neighbours in the order of all rows.
    whole = plain_order(lengths, rows_of_mega_batch(lengths, batch_size * world_size, 2), 0, 1)
    for step in range(n // (batch_size * world_size)):
        in_step = slice(step * batch_size * world_size, (step + 1) * batch_size * world_size)
        assert sum((of_rank[step] for of_rank in batches), []) == whole[in_step]


def test_rows_that_come_twice_are_told(caplog):
    with caplog.at_level(logging.WARNING):
        LengthGroupedSampler([1] * 10, 2, world_size=2)
        LengthGroupedSampler([1] * 9, 2, world_size=2, drop_last=True)
        assert not caplog.records
        LengthGroupedSampler([1] * 9, 2, world_size=2)
    assert "1 rows come twice" in caplog.text and "drop_last" in caplog.text


@given(lengths=LENGTHS, world_size=st.integers(1, 3), epoch=st.integers(0, 3), data=st.data())
def test_a_state_at_any_position_gives_the_rest(lengths, world_size, epoch, data):
    rank = data.draw(st.integers(0, world_size - 1))

    def make():
        return LengthGroupedSampler(lengths, 3, mega_batch=2, seed=5, rank=rank, world_size=world_size)

    sampler = make()
    sampler.set_epoch(epoch)
    n_taken = data.draw(st.integers(0, len(sampler)))
    rows = iter(sampler)
    taken = [next(rows) for _ in range(n_taken)]
    state = json.loads(json.dumps(sampler.state_dict()))
    assert state == sampler.state_after(n_taken)
    whole = list(sampler)

    other = make()
    other.load_state_dict(state)
    other.set_epoch(epoch)  # as Trainer does when it goes on
    assert other.state_dict() == state
    assert taken + list(other) == whole
    assert list(other) == whole  # a state is for one iteration
    other.load_state_dict(state)
    other.set_epoch(epoch + 1)
    assert len(list(other)) == len(whole)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_loader_that_was_stopped_goes_on(store, num_workers):
    def loader(sampler):
        return DataLoader(
            store, 8, sampler=sampler, num_workers=num_workers, collate_fn=lambda batch: batch.cell_id.tolist()
        )

    batches = list(loader(grouped(store, 8, mega_batch=3, epoch=1)))
    assert len(batches) == 8
    for n_delivered in (1, 4, 7):
        stopped = grouped(store, 8, mega_batch=3, epoch=1)
        started = iter(loader(stopped))
        delivered = [next(started) for _ in range(n_delivered)]
        other = LengthGroupedSampler(store, 8, mega_batch=3)
        other.load_state_dict(stopped.state_after(8 * n_delivered))
        assert delivered + list(loader(other)) == batches


def test_other_states_and_arguments_that_cannot_be_raise():
    sampler = LengthGroupedSampler([3, 1, 2], 2)
    for other in (
        LengthGroupedSampler([3, 2, 1], 2),
        LengthGroupedSampler([3, 1, 2], 3),
        LengthGroupedSampler([3, 1, 2], 2, seed=1),
        LengthGroupedSampler([3, 1, 2], 2, mega_batch=1),
        LengthGroupedSampler([3, 1, 2], 2, world_size=2),
    ):
        with pytest.raises(ValueError, match="another sampler: .* instead of"):
            other.load_state_dict(sampler.state_dict())
    with pytest.raises(ValueError, match="n_drawn=4, but an epoch has 3"):
        sampler.state_after(4)
    for wrong in ({"batch_size": 0}, {"mega_batch": 0}, {"rank": 1}, {"rank": -1}, {"world_size": 0}, {"seed": -1}):
        with pytest.raises(ValueError):
            LengthGroupedSampler([3, 1, 2], **{"batch_size": 2, **wrong})


# ---------------------------------------------------------------------- even batches


@given(n=st.integers(0, 50), batch_size=st.integers(1, 6), world_size=st.integers(1, 5), drop_last=st.booleans())
def test_even_batches_give_each_rank_as_many_and_every_row_once(n, batch_size, world_size, drop_last):
    def make(rank):
        return EvenBatchSampler(
            BlockShuffleSampler(range(n), 1), batch_size, rank=rank, world_size=world_size, drop_last=drop_last
        )

    ranks = [list(make(rank)) for rank in range(world_size)]
    assert [len(make(rank)) for rank in range(world_size)] == [len(batches) for batches in ranks]
    assert len({len(batches) for batches in ranks}) == 1
    sizes = [len(batch) for batches in ranks for batch in batches]
    assert all(1 <= size <= batch_size for size in sizes)
    rows = sorted(row for batches in ranks for batch in batches for row in batch)
    n_batches = -(-n // batch_size)
    if drop_last:
        assert len(rows) == n // (batch_size * world_size) * batch_size * world_size and len(set(rows)) == len(rows)
    elif -(-n_batches // world_size) * world_size > n:  # more batches than rows
        assert set(rows) == set(range(n)) and set(sizes) <= {1}
    else:
        assert rows == list(range(n))
    # What accelerate divides is the same.
    whole = make(None)
    assert len(whole) == world_size * len(ranks[0])
    if n:
        for rank in range(world_size):
            shard = BatchSamplerShard(make(None), world_size, rank)
            assert list(shard) == ranks[rank] and len(shard) == len(ranks[rank])


@given(n=st.integers(0, 60), batch_size=st.integers(1, 5), world_size=st.integers(1, 5))
def test_even_batches_are_drawn_as_needed_and_are_those_of_the_whole_epoch(n, batch_size, world_size):
    drawn = []

    class Rows:
        def __iter__(self):
            for row in range(n):
                drawn.append(row)
                yield row

    found = []
    for batch in EvenBatchSampler(Rows(), batch_size, world_size=world_size):
        found.append(batch)
        n_steps = -(-len(found) // world_size)
        assert len(drawn) <= (n_steps + 2) * batch_size * world_size
    cuts = np.append(np.arange(0, n, batch_size), n)
    assert found == list(batches_of_rank(*even_out(np.arange(n), cuts, world_size), None, world_size))


@given(n=st.integers(0, 60), batch_size=st.integers(1, 6), world_size=st.integers(1, 4))
def test_a_step_has_the_same_rows_on_any_number_of_ranks(n, batch_size, world_size):
    sampler = LengthGroupedSampler(np.arange(n) % 9, batch_size * world_size, mega_batch=2)
    one = list(EvenBatchSampler(sampler, batch_size))
    many = list(EvenBatchSampler(sampler, batch_size, world_size=world_size))
    n_in_last = n % (batch_size * world_size)
    if n_in_last == 0 or n_in_last >= world_size:
        for step in range(-(-n // (batch_size * world_size))):
            in_step = slice(step * world_size, (step + 1) * world_size)
            assert sum(one[in_step], []) == sum(many[in_step], [])


def test_even_batches_follow_the_epoch_of_their_sampler():
    sampler = LengthGroupedSampler(np.arange(20), 4)
    batches = EvenBatchSampler(sampler, 4)
    before = list(batches)
    batches.set_epoch(1)
    assert sampler.epoch == 1 and list(batches) != before
    EvenBatchSampler(range(5), 2).set_epoch(1)  # has no epochs
    with pytest.raises(ValueError, match="batch_size=0: must be at least 1"):
        EvenBatchSampler(range(5), 0)
    with pytest.raises(ValueError, match="rank=2 of world_size=2"):
        EvenBatchSampler(range(5), 2, rank=2, world_size=2)


# ---------------------------------------------------------------------- lengths


def test_lengths_are_taken_from_where_they_are_known(store):
    lengths = store.lengths.tolist()
    dataset = Dataset.from_dict({"input_ids": [[0]] * 60, "length": lengths})  # the tokens themselves are not read
    for source in (
        lengths,
        np.array(lengths, np.uint16),
        torch.tensor(lengths),
        store,
        dataset,
        Subset(store, range(60)),
    ):
        known = known_lengths(source)
        assert known.dtype == np.int64 and known.tolist() == lengths
    some = [5, 3, 3, 59]
    for source in (store.select(some), dataset.select(some), Subset(dataset, some), Subset(store, some)):
        assert known_lengths(source).tolist() == [lengths[row] for row in some]
    assert known_lengths([]).shape == (0,) and known_lengths([]).dtype == np.int64


def test_lengths_that_are_not_known_raise(store):
    tokens = Dataset.from_dict({"input_ids": [[1, 2], [3]]})
    with pytest.raises(ValueError, match="no column `length`; it has input_ids.*load_example_lengths"):
        LengthGroupedSampler(tokens, 2)
    with pytest.raises(ValueError, match="TokenBudgetBuffer"):
        known_lengths(Dataset.from_dict({"length": [1]}).to_iterable_dataset())
    for wrong in ([1, -2], [1.5], [[1, 2]], [[1], [1, 2]], "abc", 5, None, {"a": 1}):
        with pytest.raises(ValueError, match="non-negative integers"):
            known_lengths(wrong)


@given(lengths=st.lists(st.integers(0, 9), min_size=1, max_size=20), data=st.data())
def test_padding_share_counts_positions(lengths, data):
    batches = data.draw(st.lists(st.lists(st.integers(0, len(lengths) - 1), max_size=5), max_size=5))
    padded = [
        [token < lengths[row] for row in batch for token in range(max(lengths[r] for r in batch))]
        for batch in batches
        if batch
    ]
    positions = sum(padded, [])
    share = padding_share(lengths, batches)
    assert share == pytest.approx(1 - np.mean(positions) if positions else 0)


def test_grouped_batches_of_real_cells_are_useful_tokens(shared_data):
    with h5py.File(shared_data / "pbmc_ifnb.h5ad") as file:
        lengths = np.diff(file["X/indptr"][:])
    shares = {
        name: 1 - padding_share(lengths, in_batches(sampler, 16))
        for name, sampler in {
            "random": BlockShuffleSampler(lengths, 1),
            "grouped": LengthGroupedSampler(lengths, 16),
            "grouped, 4 ranks": LengthGroupedSampler(lengths, 64),
        }.items()
    }
    assert shares["random"] < 0.75
    assert min(shares["grouped"], shares["grouped, 4 ranks"]) >= 0.9
