"""Token budgets: every batch within, every cell once, as many batches on each rank and in each epoch, exact states."""

import json
import logging

import h5py
import numpy as np
import pytest
from accelerate.data_loader import BatchSamplerShard, prepare_data_loader
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from stformer_hf import IterableAnnDataset
from stformer_hf.batches.length_sampler import EvenBatchSampler, LengthGroupedSampler, padding_share
from stformer_hf.batches.repeats import NumberedRepeats
from stformer_hf.batches.samplers import BlockShuffleSampler
from stformer_hf.batches.stream_batches import TokenBudgetBuffer
from stformer_hf.batches.token_budget import TokenBudgetBatchSampler, cut_batches

BUDGET = 30
LENGTHS = (
    st.lists(st.integers(0, BUDGET), max_size=60)
    | st.lists(st.integers(1, 4), max_size=60)
    | st.builds(lambda n, length: [length] * n, st.integers(0, 40), st.sampled_from([1, 7, BUDGET]))
)


def cost(lengths, packing: bool) -> int:
    lengths = [max(length, 1) for length in lengths]
    return sum(lengths) if packing else len(lengths) * max(lengths)


def check_batches(lengths, batches, packing, max_cells) -> None:
    for batch in batches:
        assert batch and cost([lengths[row] for row in batch], packing) <= BUDGET
        assert max_cells is None or len(batch) <= max_cells


# ---------------------------------------------------------------------- cutting


def fewest_batches(lengths, budget, packing, max_cells) -> int:
    """Try all divisions of the cells."""

    def place(i, batches):
        if i == len(lengths):
            return len(batches)
        best = len(lengths)
        for batch in [*batches, []]:
            if cost(batch + [lengths[i]], packing) <= budget and (max_cells is None or len(batch) < max_cells):
                rest = [other for other in batches if other is not batch]
                best = min(best, place(i + 1, [*rest, batch + [lengths[i]]]))
        return best

    return place(0, [])


@given(lengths=st.lists(st.integers(0, 12), max_size=6), max_cells=st.none() | st.integers(1, 3))
def test_padded_batches_are_the_fewest(lengths, max_cells):
    _, cuts = cut_batches(np.array(lengths, np.int64), 12, False, max_cells)
    assert len(cuts) - 1 == fewest_batches(lengths, 12, False, max_cells)


def first_fit_decreasing(lengths, budget, max_cells) -> list[list[int]]:
    bins = []
    for cell in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        for batch in bins:
            if cost([lengths[i] for i in [*batch, cell]], True) <= budget and len(batch) != max_cells:
                batch.append(cell)
                break
        else:
            bins.append([cell])
    return bins


@given(lengths=LENGTHS, n_windows=st.integers(1, 5), max_cells=st.none() | st.integers(1, 4))
def test_packed_batches_are_those_of_first_fit_decreasing(lengths, n_windows, max_cells):
    order, cuts = cut_batches(np.array(lengths, np.int64), BUDGET, True, max_cells, n_windows)
    batches = [order[a:b].tolist() for a, b in zip(cuts, cuts[1:], strict=False)]
    n = len(lengths)
    expected = []
    for window in range(n_windows):
        cells = [i for i in range(n) if i * n_windows // n == window]
        expected += [
            [cells[i] for i in batch] for batch in first_fit_decreasing([lengths[i] for i in cells], BUDGET, max_cells)
        ]
    assert batches == expected


# ---------------------------------------------------------------------- batch sampler


@given(
    lengths=LENGTHS,
    packing=st.booleans(),
    max_cells=st.none() | st.integers(1, 4),
    mega_batch=st.integers(1, 6),
    world_size=st.integers(1, 4),
    drop_last=st.booleans(),
    seed=st.integers(0, 5),
)
def test_every_row_once_within_the_budget_and_as_many_for_each_rank(
    lengths, packing, max_cells, mega_batch, world_size, drop_last, seed
):
    def make(rank, epoch):
        sampler = TokenBudgetBatchSampler(
            lengths,
            BUDGET,
            packing=packing,
            max_cells=max_cells,
            mega_batch=mega_batch,
            seed=seed,
            rank=rank,
            world_size=world_size,
            drop_last=drop_last,
        )
        sampler.set_epoch(epoch)
        return sampler

    n_of_epochs = set()
    for epoch in range(4):
        ranks = [list(make(rank, epoch)) for rank in range(world_size)]
        n_of_epochs |= {len(batches) for batches in ranks} | {len(make(rank, epoch)) for rank in range(world_size)}
        for batches in ranks:
            check_batches(lengths, batches, packing, max_cells)
        rows = sorted(row for batches in ranks for batch in batches for row in batch)
        if drop_last:
            assert len(set(rows)) == len(rows)
        elif world_size * len(ranks[0]) > len(lengths):  # more batches than rows
            assert set(rows) == set(range(len(lengths))) and len(rows) == world_size * len(ranks[0])
            assert len(rows) - len(lengths) < world_size
        else:
            assert rows == list(range(len(lengths)))
        if lengths and ranks[0]:
            assert max(lengths[row] for row in ranks[0][0]) == max(lengths) or len(lengths) < 2 * world_size
            for rank in range(world_size):  # accelerate divides the same batches
                shard = BatchSamplerShard(make(None, epoch), world_size, rank)
                assert list(shard) == ranks[rank] and len(shard) == len(ranks[rank])
    assert len(n_of_epochs) == 1


@given(lengths=LENGTHS, packing=st.booleans(), world_size=st.integers(2, 4))
def test_a_step_has_the_same_rows_on_any_number_of_ranks(lengths, packing, world_size):
    one = list(TokenBudgetBatchSampler(lengths, BUDGET, packing=packing))
    many = list(TokenBudgetBatchSampler(lengths, BUDGET, packing=packing, world_size=world_size))
    n_whole = len(one) // world_size * world_size
    if sum(map(len, one[n_whole:])) >= world_size or len(one) == n_whole:
        assert many[:n_whole] == one[:n_whole]
        assert sum(many[n_whole:], []) == sum(one[n_whole:], [])


def test_batches_are_a_function_of_seed_and_epoch_and_lengths_vary_little_within():
    lengths = np.random.default_rng(0).integers(1, 200, 3000)
    for packing in (False, True):

        def batches(seed, epoch, packing=packing):
            sampler = TokenBudgetBatchSampler(lengths, 1000, packing=packing, seed=seed)
            sampler.set_epoch(epoch)
            return list(sampler)

        assert batches(1, 1) == batches(1, 1)
        assert len({str(batches(seed, epoch)) for seed in range(2) for epoch in range(3)}) == 6
        of_batch = [sorted(batch) for batch in batches(0, 0)]
        assert sum(sorted(batch) in of_batch for batch in batches(0, 1)) < 0.1 * len(
            of_batch
        )  # new company each epoch
    grouped = TokenBudgetBatchSampler(lengths, 1000, mega_batch=50)
    assert padding_share(lengths, grouped) < 0.1
    full = lengths.sum() / (1000 * len(TokenBudgetBatchSampler(lengths, 1000, packing=True)))
    assert full > 0.95


def test_epochs_have_the_same_number_of_batches_where_draws_differ():
    """Lengths for which a draw decides how many batches are needed."""
    lengths = np.random.default_rng(1).choice([3, 5, 7, 11, 13, 30], 400)
    for packing in (False, True):
        sampler = TokenBudgetBatchSampler(lengths, BUDGET, packing=packing, mega_batch=2)
        drawn = {len(sampler._draw(np.random.default_rng(seed))[1]) for seed in range(20)}
        assert len(drawn) > 1
        counts = set()
        for epoch in range(20):
            sampler.set_epoch(epoch)
            batches = list(sampler)
            check_batches(lengths, batches, packing, None)
            assert sorted(sum(batches, [])) == list(range(400))
            counts.add(len(batches))
        assert counts == {len(sampler)}


@given(lengths=LENGTHS, packing=st.booleans(), world_size=st.integers(1, 3), epoch=st.integers(0, 2), data=st.data())
def test_a_state_at_any_batch_gives_the_rest(lengths, packing, world_size, epoch, data):
    rank = data.draw(st.none() | st.integers(0, world_size - 1))

    def make():
        return TokenBudgetBatchSampler(
            lengths, BUDGET, packing=packing, mega_batch=3, seed=5, rank=rank, world_size=world_size
        )

    sampler = make()
    sampler.set_epoch(epoch)
    n_taken = data.draw(st.integers(0, len(sampler)))
    batches = iter(sampler)
    taken = [next(batches) for _ in range(n_taken)]
    state = json.loads(json.dumps(sampler.state_dict()))
    assert state == sampler.state_after(n_taken)
    whole = list(sampler)

    other = make()
    other.load_state_dict(state)
    other.set_epoch(epoch)
    assert other.state_dict() == state
    assert taken + list(other) == whole
    assert list(other) == whole
    other.load_state_dict(state)
    other.set_epoch(epoch + 1)
    assert len(list(other)) == len(whole)


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("packing", [False, True])
def test_a_loader_that_was_stopped_goes_on(store, packing, num_workers):
    lengths = store.lengths + 2

    def make():
        return TokenBudgetBatchSampler(lengths, 80, packing=packing, mega_batch=4)

    def loader(sampler):
        return DataLoader(
            store, batch_sampler=sampler, num_workers=num_workers, collate_fn=lambda batch: batch.cell_id.tolist()
        )

    whole = make()
    whole.set_epoch(1)
    batches = list(loader(whole))
    assert len(loader(whole)) == len(batches) > 8
    for n_delivered in range(0, len(batches), 3):
        stopped = make()
        stopped.set_epoch(1)
        started = iter(loader(stopped))
        delivered = [next(started) for _ in range(n_delivered)]
        other = make()
        other.load_state_dict(stopped.state_after(n_delivered))
        assert delivered + list(loader(other)) == batches


def test_a_cell_over_the_budget_and_other_impossible_arguments_raise():
    with pytest.raises(ValueError, match=r"Row 1 \(one of 2 such\) has 31 tokens, .*max_tokens_per_batch=30: raise"):
        TokenBudgetBatchSampler([3, 31, 5, 40], BUDGET)
    assert list(TokenBudgetBatchSampler([30], BUDGET)) == [[0]]
    wrongs = [{"max_cells": 0}, {"mega_batch": 0}, {"rank": 1}, {"world_size": 0}, {"seed": -1}]
    for wrong in [*wrongs, {"max_tokens_per_batch": 0}]:
        with pytest.raises(ValueError):
            TokenBudgetBatchSampler([], **{"max_tokens_per_batch": BUDGET, **wrong})
    state = TokenBudgetBatchSampler([3, 5], BUDGET).state_dict()
    for other in (
        TokenBudgetBatchSampler([5, 3], BUDGET),
        TokenBudgetBatchSampler([3, 5], BUDGET + 1),
        TokenBudgetBatchSampler([3, 5], BUDGET, packing=True),
        TokenBudgetBatchSampler([3, 5], BUDGET, max_cells=2),
        TokenBudgetBatchSampler([3, 5], BUDGET, seed=1),
        TokenBudgetBatchSampler([3, 5], BUDGET, world_size=2),
    ):
        with pytest.raises(ValueError, match="another sampler: .* instead of"):
            other.load_state_dict(state)


def test_rows_that_come_twice_are_told(caplog):
    with caplog.at_level(logging.WARNING):
        assert len(list(TokenBudgetBatchSampler([30] * 4, BUDGET, world_size=2))) == 4
        assert len(list(TokenBudgetBatchSampler([30] * 3, BUDGET, world_size=2, drop_last=True))) == 2
        assert not caplog.records
        assert len(list(TokenBudgetBatchSampler([30] * 3, BUDGET, world_size=2))) == 4
    assert "1 rows come twice" in caplog.text


def test_batches_of_real_cells_are_full(shared_data):
    with h5py.File(shared_data / "pbmc_ifnb.h5ad") as file:
        lengths = np.diff(file["X/indptr"][:])
    budget = int(16 * lengths.mean())
    padded = TokenBudgetBatchSampler(lengths, budget)
    packed = TokenBudgetBatchSampler(lengths, budget, packing=True)
    random = list(BlockShuffleSampler(lengths, 1))
    assert padding_share(lengths, [random[i : i + 16] for i in range(0, len(random), 16)]) > 0.25
    assert 1 - padding_share(lengths, padded) >= 0.9
    assert lengths.sum() / (len(padded) * budget) >= 0.88
    assert lengths.sum() / (len(packed) * budget) >= 0.97
    grouped = list(LengthGroupedSampler(lengths, 16))
    n_tokens = [16 * lengths[grouped[i]] for i in range(0, len(grouped), 16)]
    assert max(n_tokens) > 2 * budget  # batches of 16 cells differ in size; those of a budget do not


# ---------------------------------------------------------------------- streams


class Cells:
    """Cells of given lengths, without a state."""

    def __init__(self, lengths):
        self.lengths, self.epoch = lengths, 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        order = np.random.default_rng([7, self.epoch]).permutation(len(self.lengths)).tolist()
        return ({"cell_id": i, "length": self.lengths[i]} for i in order)


class CellsWithState(Cells):
    """Cells of given lengths; counts those that are read."""

    n_read = 0

    def __init__(self, lengths):
        super().__init__(lengths)
        self.taken, self.start = 0, 0

    def __iter__(self):
        start, self.start = self.start, 0
        for self.taken, cell in enumerate(list(super().__iter__())[start:], start + 1):
            CellsWithState.n_read += 1
            yield cell

    def state_dict(self):
        return {"taken": self.taken}

    def load_state_dict(self, state):
        self.start = state["taken"]


def ids(batches) -> list[list[int]]:
    return [[cell["cell_id"] for cell in batch] for batch in batches]


@given(
    lengths=LENGTHS,
    packing=st.booleans(),
    max_cells=st.none() | st.integers(1, 4),
    buffer_size=st.integers(1, 25),
    world_size=st.integers(1, 4),
    epoch=st.integers(0, 2),
)
def test_a_stream_gives_every_cell_once_within_the_budget(lengths, packing, max_cells, buffer_size, world_size, epoch):
    def batches(rank):
        buffer = TokenBudgetBuffer(
            Cells(lengths),
            BUDGET,
            packing=packing,
            max_cells=max_cells,
            buffer_size=buffer_size,
            rank=rank,
            world_size=world_size,
        )
        buffer.set_epoch(epoch)
        return ids(buffer)

    ranks = [batches(rank) for rank in range(world_size)]
    whole = batches(None)
    assert ranks == [whole[rank::world_size] for rank in range(world_size)]
    assert len(whole) % world_size == 0
    check_batches(lengths, whole, packing, max_cells)
    rows = sorted(sum(whole, []))
    assert set(rows) == set(range(len(lengths)))
    n_in_last_window = (len(lengths) - 1) % buffer_size + 1
    if n_in_last_window >= world_size * 2 or world_size == 1:
        assert len(rows) == len(lengths) or len(rows) - len(lengths) < world_size
    if (
        world_size == 1
        or n_in_last_window >= 2 * world_size
        and max(lengths, default=0) * 2 <= BUDGET
        and not max_cells
    ):
        assert len(rows) == len(lengths)
    if whole and len(lengths) <= buffer_size and len(lengths) >= 2 * world_size:
        assert max(lengths[row] for row in whole[0]) == max(lengths)


@given(
    lengths=LENGTHS,
    packing=st.booleans(),
    buffer_size=st.integers(1, 25),
    world_size=st.integers(1, 3),
    epoch=st.integers(0, 2),
    stream=st.sampled_from([Cells, CellsWithState]),
    data=st.data(),
)
def test_a_stream_goes_on_at_any_batch(lengths, packing, buffer_size, world_size, epoch, stream, data):
    rank = data.draw(st.none() | st.integers(0, world_size - 1))

    def make():
        return TokenBudgetBuffer(
            stream(lengths), BUDGET, packing=packing, buffer_size=buffer_size, rank=rank, world_size=world_size
        )

    buffer, uninterrupted = make(), make()
    buffer.set_epoch(epoch)
    uninterrupted.set_epoch(epoch)
    whole = ids(uninterrupted)
    n_taken = data.draw(st.integers(0, len(whole)))
    batches = iter(buffer)
    taken = [next(batches) for _ in range(n_taken)]
    state = json.loads(json.dumps(buffer.state_dict()))
    n_before = data.draw(st.integers(0, n_taken))
    earlier = json.loads(json.dumps(buffer.state_after(n_before)))

    other = make()
    other.load_state_dict(state)
    other.set_epoch(epoch)
    assert other.state_dict() == state
    rest = iter(other)
    n_more = data.draw(st.integers(0, len(whole) - n_taken))
    more = ids([next(rest) for _ in range(n_more)])
    third = make()  # stopped and resumed twice
    third.load_state_dict(other.state_dict())
    assert ids(taken) + more + ids(third) == whole
    assert ids(third) == whole  # a state is for one iteration
    third.load_state_dict(earlier)
    assert whole[:n_before] + ids(third) == whole
    third.load_state_dict(earlier)
    third.set_epoch(epoch + 1)
    uninterrupted.set_epoch(epoch + 1)
    assert ids(third) == ids(uninterrupted)


def test_a_stream_with_a_state_is_not_read_again():
    buffer = TokenBudgetBuffer(CellsWithState([10] * 90), BUDGET, buffer_size=9)
    whole = ids(buffer)
    state = buffer.state_after(26)
    assert len(json.dumps(state)) < 1000
    CellsWithState.n_read = 0
    buffer.load_state_dict(state)
    assert ids(buffer) == whole[26:]
    assert CellsWithState.n_read == 18


def test_streams_of_files_and_of_datasets_go_on(adata, store, tokenizer, tmp_path):
    table = Dataset.from_dict(
        {
            "cell_id": range(60),
            "input_ids": [[1] * max(length, 1) for length in store.lengths],
            "length": np.maximum(store.lengths, 1),
        }
    )
    streams = {
        "files": lambda: IterableAnnDataset(adata, tokenizer, shuffle=True, buffer_size=16, seed=3),
        "dataset": lambda: table.to_iterable_dataset(num_shards=4),
        "dataset, formatted": lambda: table.to_iterable_dataset(num_shards=4).with_format("numpy"),
        "dataset, mapped": lambda: table.to_iterable_dataset(num_shards=4).map(
            lambda cell: {"twice": 2 * cell["cell_id"]}
        ),
        "dataset, shards shuffled": lambda: table.to_iterable_dataset(num_shards=4).shuffle(seed=1, buffer_size=1),
        "dataset, shuffled": lambda: table.to_iterable_dataset(num_shards=4).shuffle(seed=1, buffer_size=20),
        "dataset, shuffled and mapped": lambda: (
            table.to_iterable_dataset(num_shards=4).shuffle(seed=1, buffer_size=20).map(lambda cell: {"one": 1})
        ),
    }
    for name, stream in streams.items():
        for epoch in (0, 2):
            buffer = TokenBudgetBuffer(stream(), 120, buffer_size=13)
            buffer.set_epoch(epoch)
            whole = ids(buffer)
            assert sorted(sum(whole, [])) == list(range(60)), name
            assert ids(buffer) == whole, name  # the same epoch again
            for n_taken in range(0, len(whole) + 1, 3):
                stopped = TokenBudgetBuffer(stream(), 120, buffer_size=13)
                stopped.set_epoch(epoch)
                batches = iter(stopped)
                taken = ids([next(batches) for _ in range(n_taken)])
                other = TokenBudgetBuffer(stream(), 120, buffer_size=13)
                other.load_state_dict(json.loads(json.dumps(stopped.state_dict())))
                assert taken + ids(other) == whole, (name, epoch, n_taken)
                assert ids(other) == whole, (name, epoch, n_taken)


def test_workers_divide_a_stream(adata, tokenizer):
    """Each batches what it reads; the loader cannot know where they are."""
    stream = IterableAnnDataset(adata, tokenizer, shuffle=True)
    for world_size in (1, 2):
        buffer = TokenBudgetBuffer(stream, 120, buffer_size=20, world_size=world_size)
        loader = DataLoader(
            buffer, batch_size=None, num_workers=2, collate_fn=lambda batch: batch, persistent_workers=True
        )
        epochs = []
        for epoch in range(2):
            buffer.set_epoch(epoch)
            epochs.append(ids(loader))
            assert sorted(sum(epochs[-1], [])) == list(range(60))
            assert len(epochs[-1]) % world_size == 0
        assert epochs[0] != epochs[1]
        with pytest.raises(RuntimeError, match="num_workers=0"):
            buffer.state_dict()
        buffer.set_epoch(2)
        buffer.load_state_dict(buffer.state_dict())
        with pytest.raises(RuntimeError, match="num_workers=0"):
            next(iter(DataLoader(buffer, batch_size=None, num_workers=2, collate_fn=lambda batch: batch)))


def test_streams_that_cannot_be_batched_raise(adata):
    with pytest.raises(TypeError, match="generator can be read only once"):
        TokenBudgetBuffer((cell for cell in Cells([1])), BUDGET)
    with pytest.raises(ValueError, match="Cell 1 has 31 tokens, more than max_tokens_per_batch=30"):
        list(TokenBudgetBuffer(Cells([3, 31, 4]), BUDGET))
    with pytest.raises(ValueError, match="Cell number 12 of the stream has 31 tokens"):
        list(TokenBudgetBuffer([{"length": 30 + (i == 12)} for i in range(15)], BUDGET, buffer_size=10))
    with pytest.raises(ValueError, match="neither length nor input_ids; it has genes, counts, .*n_tokens"):
        list(TokenBudgetBuffer(IterableAnnDataset(adata), 100))
    whole = ids(TokenBudgetBuffer(IterableAnnDataset(adata), 100, n_tokens=lambda cell: len(cell["genes"])))
    assert sorted(sum(whole, [])) == list(range(60))
    for wrong in ({"max_tokens_per_batch": 0}, {"buffer_size": 0}, {"rank": 1}, {"seed": -1}, {"max_cells": 0}):
        with pytest.raises(ValueError):
            TokenBudgetBuffer([], **{"max_tokens_per_batch": BUDGET, **wrong})
    buffer = TokenBudgetBuffer(Cells([10] * 9), BUDGET)
    next(iter(buffer))
    with pytest.raises(ValueError, match="n_batches=2: 1 were returned"):
        buffer.state_after(2)
    with pytest.raises(ValueError, match="another buffer: buffer_size 2048 instead of 9"):
        TokenBudgetBuffer(Cells([10] * 9), BUDGET, buffer_size=9).load_state_dict(buffer.state_dict())


@pytest.mark.parametrize("n_processes", [1, 2])
@pytest.mark.parametrize("kind", ["budget", "even", "repeats"])
def test_accelerate_sets_the_epoch(kind, n_processes):
    lengths = np.random.default_rng(0).integers(5, 40, 80)
    batches = {
        "budget": lambda: TokenBudgetBatchSampler(lengths, 200),
        "even": lambda: EvenBatchSampler(LengthGroupedSampler(lengths, 8), 8),
        "repeats": lambda: NumberedRepeats(TokenBudgetBatchSampler(lengths, 200), len(lengths)),
    }[kind]
    plain = batches()
    loaders = [
        prepare_data_loader(
            DataLoader(range(80), batch_sampler=batches(), collate_fn=list),
            num_processes=n_processes,
            process_index=i,
            put_on_device=False,
        )
        for i in range(n_processes)
    ]
    epochs = []
    for epoch in range(3):
        plain.set_epoch(epoch)
        for loader in loaders:
            loader.set_epoch(epoch)
        of_processes = [list(loader) for loader in loaders]
        found = [batch for step in zip(*of_processes, strict=True) for batch in step]
        epochs.append(list(plain))
        assert found[: len(epochs[-1])] == epochs[-1]  # the first again, so that all processes have as many
    assert epochs[0] != epochs[1] != epochs[2]
