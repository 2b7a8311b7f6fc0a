"""A stream that is split: each process reads its own part, in as many batches as the others, from any point on."""

import json
import math
from itertools import accumulate

import numpy as np
import pytest
from accelerate.data_loader import BatchSamplerShard
from conftest import make_adata
from datasets import Dataset
from datasets.distributed import split_dataset_by_node
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import ChainDataset
from transformers import TrainingArguments

from stformer_hf import CellTrainer, GeneBertConfig, GeneBertForPhenotypicMLM, GeneTokenizer, IterableAnnDataset
from stformer_hf.batches.stream_batches import TokenBudgetBuffer
from stformer_hf.training.streams import read_stream

ADATA = make_adata(64)  # the cell number 3 has no counts
TOKENIZER = GeneTokenizer.from_store(IterableAnnDataset(ADATA), bin_edges=[0.5, 1.5, 3.5])


class ArgumentsOf(TrainingArguments):
    """Arguments of one of several processes, of which there is only this one."""

    process = (0, 1)
    process_index = property(lambda self: self.process[0])
    world_size = property(lambda self: self.process[1])


class CellIds:
    """Collates nothing."""

    packing = False

    def __call__(self, cells):
        return {"cells": [int(cell["cell_id"]) for cell in cells]}


class Counted(IterableAnnDataset):
    """Counts the cells that are read from the files."""

    n_read = 0

    def _read(self, pieces):
        self.n_read += sum(stop - start for _, start, stop in pieces)
        return super()._read(pieces)


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    config = GeneBertConfig.from_tokenizer(TOKENIZER, size="tiny", num_hidden_layers=1)
    arguments = ArgumentsOf(str(tmp_path_factory.mktemp("run")), report_to="none", use_cpu=True)
    made = CellTrainer(GeneBertForPhenotypicMLM(config), arguments, CellIds(), processing_class=TOKENIZER)
    made.data_collator = CellIds()
    return made


def batches_of(trainer, stream, process, epochs=1, mark=None, skip=0, batch_size=8, **settings):
    """The cells of each batch of a process, a list per epoch, and the marks; as the trainer's loader reads them."""
    order = {"max_tokens_per_batch": None, "packing": False, "accumulation": 1, "max_steps": -1, "by_length": False}
    order |= settings
    trainer.train_dataset, trainer._stream_mark, trainer._train_batch_size = stream, mark, batch_size
    args = trainer.args
    args.process, args.per_device_train_batch_size, args.max_steps = process, batch_size, order["max_steps"]
    args.gradient_accumulation_steps = order["accumulation"]
    args.train_sampling_strategy = "group_by_length" if order["by_length"] else "random"
    batches, numbers = read_stream(
        stream,
        args,
        batch_size,
        trainer.data_collator,
        max_tokens_per_batch=order["max_tokens_per_batch"],
        packing=order["packing"],
        max_cells=None,
        seed=trainer.seed_of_order,
        tokenizer=TOKENIZER,
        mark=mark,
    )
    cells, marks = [], []
    for epoch in range(epochs):
        numbers.set_epoch(epoch)
        of_process = list(BatchSamplerShard(numbers, process[1], process[0]))[skip if epoch == 0 else 0 :]
        read = [batches[number] for (number,) in of_process]
        cells.append([batch["cells"] for batch in read])
        marks += [batch["stream_mark"] for batch in read]
    return cells, marks


def ids(stream, epoch=0) -> list[int]:
    stream.set_epoch(epoch)
    return [int(cell["cell_id"]) for cell in stream]


def passes(batches, part) -> list[list[int]]:
    """Batches as passes over a part: the cells of each pass, which must end with a batch."""
    cells = sum(batches, [])
    n_whole = len(cells) // len(part)
    assert set(range(len(part), n_whole * len(part) + 1, len(part))) <= set(accumulate(map(len, batches)))
    return [sorted(cells[first : first + len(part)]) for first in range(0, n_whole * len(part), len(part))]


SPLIT = {
    "n_cells": st.integers(4, 60),
    "world_size": st.integers(2, 4),
    "batch_size": st.integers(1, 9),
    "accumulation": st.integers(1, 3),
    "buffer_size": st.integers(1, 20),
    "shuffle": st.booleans(),
    "by_length": st.booleans(),
}


@given(**SPLIT)
def test_processes_read_their_parts_in_equally_many_batches(
    trainer, n_cells, world_size, batch_size, accumulation, buffer_size, shuffle, by_length
):
    adata = ADATA[4 : 4 + n_cells]
    files = [adata[: n_cells // 3], adata[n_cells // 3 :]]
    ranks = []
    for rank in range(world_size):
        settings = {"shuffle": shuffle, "buffer_size": buffer_size, "rank": rank, "world_size": world_size}
        stream = Counted(files, TOKENIZER, **settings)
        order = {"batch_size": batch_size, "accumulation": accumulation, "by_length": by_length}
        epochs, _ = batches_of(trainer, stream, (rank, world_size), 3, **order)
        assert stream.n_read <= 3 * len(stream) + (batch_size == 1) * buffer_size
        ranks.append(epochs)
        for epoch, batches in enumerate(epochs):
            assert all(0 < len(batch) <= batch_size for batch in batches)
            if not by_length and batch_size > 1:  # the plain way: the part in its order, cut
                part = ids(IterableAnnDataset(files, TOKENIZER, **settings), epoch)
                assert sorted(sum(batches, [])) == sorted(part)
                whole = len(part) // batch_size - 1  # the last may be split; within a batch, the longest is first
                cut = [part[i * batch_size : (i + 1) * batch_size] for i in range(whole)]
                assert [sorted(batch) for batch in batches[:whole]] == [sorted(batch) for batch in cut]
    for epoch in range(3):
        assert len({len(epochs[epoch]) for epochs in ranks}) == 1
        seen = sum((sum(epochs[epoch], []) for epochs in ranks), [])
        assert set(seen) == set(range(n_cells))
        # One process has a cell less; with one cell per batch it has to take one twice.
        assert len(seen) == n_cells or (batch_size == 1 and len(seen) == -(-n_cells // world_size) * world_size)


@given(
    packing=st.booleans(), n_cells=st.integers(12, 40), world_size=st.integers(2, 4), accumulation=st.integers(1, 3)
)
def test_with_a_budget_each_process_begins_its_part_again(trainer, packing, n_cells, world_size, accumulation):
    lengths = np.diff(TOKENIZER.encode_cells(Counted(ADATA, TOKENIZER).first_cells(0, 64)).indptr)
    adata, ranks = ADATA[4 : 4 + n_cells], []
    for rank in range(world_size):
        stream = IterableAnnDataset(adata, TOKENIZER, buffer_size=7, rank=rank, world_size=world_size)
        order = {"max_tokens_per_batch": 60, "packing": packing, "accumulation": accumulation, "max_steps": 24}
        ((batches,), _) = batches_of(trainer, stream, (rank, world_size), **order)
        ranks.append(batches)
        for batch in batches:
            of = lengths[4:][batch]
            assert (of.sum() if packing else len(of) * of.max()) <= 60
        whole = passes(batches, ids(stream))
        assert len(whole) >= 2 and whole == [sorted(ids(stream))] * len(whole)
    assert {len(batches) for batches in ranks} == {24 * accumulation}


@pytest.mark.parametrize("world_size", [2, 3, 4])
@pytest.mark.parametrize("batch_size", [2, 3, 9])
@pytest.mark.parametrize("by_length", [False, True])
def test_parts_with_cells_without_counts_are_begun_again_too(trainer, by_length, world_size, batch_size):
    adata = ADATA.copy()
    adata.X.data[adata.X.indptr[20] : adata.X.indptr[30]] = 0
    filled = np.flatnonzero(adata.X.sum(1) > 0)
    settings = {"batch_size": batch_size, "by_length": by_length}
    for rank in range(world_size):
        stream = IterableAnnDataset(adata, TOKENIZER, rank=rank, world_size=world_size)
        part = sorted(set(ids(stream)) & set(filled.tolist()))
        epochs, _ = batches_of(trainer, stream, (rank, world_size), 8, **settings)
        assert {len(batches) for batches in epochs} == {math.ceil(math.ceil(64 / world_size) / batch_size)}
        assert set(map(tuple, passes(sum(epochs, []), part))) == {tuple(part)}


@given(data=st.data(), packing=st.booleans(), budget=st.booleans(), **SPLIT)
def test_each_process_goes_on_where_it_stopped(
    trainer, data, packing, budget, n_cells, world_size, batch_size, accumulation, buffer_size, shuffle, by_length
):
    rank = data.draw(st.integers(0, world_size - 1))
    settings = {"shuffle": shuffle, "buffer_size": buffer_size, "rank": rank, "world_size": world_size}
    order = {"batch_size": batch_size, "accumulation": accumulation, "by_length": by_length}
    order |= {"max_tokens_per_batch": 60, "packing": packing, "max_steps": 20} if budget else {}

    def stream():
        return Counted(ADATA[4 : 4 + n_cells], TOKENIZER, **settings)

    whole, marks = batches_of(trainer, stream(), (rank, world_size), 2, **order)
    n = len(whole[0])
    n_used = data.draw(st.integers(1, n))
    mark = json.loads(marks[n_used - 1])
    assert mark["next"] == n_used
    again, _ = batches_of(trainer, stream(), (rank, world_size), 2, mark=mark, skip=n_used, **order)
    assert again == [whole[0][n_used:], whole[1]]
    slowly, _ = batches_of(trainer, stream(), (rank, world_size), 2, mark=None, skip=n_used, **order)
    assert slowly == again  # without the mark, what was used is read again


@pytest.mark.parametrize("world_size", [2, 3])
def test_streams_of_datasets_are_split_by_node(trainer, world_size):
    """Two processes have two of four shards each; three take one cell of three."""
    tokens = TOKENIZER.encode_cells(Counted(ADATA, TOKENIZER).first_cells(0, 64))
    cells = [ids_of.tolist() for ids_of in np.split(tokens.input_ids, tokens.indptr[1:-1])]
    rows = Dataset.from_dict({"cell_id": range(4, 64), "input_ids": cells[4:]}).to_iterable_dataset(num_shards=4)
    seen = []
    for rank in range(world_size):
        part = split_dataset_by_node(rows, rank, world_size)
        with pytest.raises(ValueError, match="pass max_steps"):
            batches_of(trainer, part, (rank, world_size))
        (batches,), marks = batches_of(trainer, part, (rank, world_size), max_steps=20)
        seen += passes(batches, range(60 // world_size))[0]
        mark = json.loads(marks[4])
        again, _ = batches_of(trainer, part, (rank, world_size), mark=mark, skip=5, max_steps=20)
        assert again == [batches[5:]]
    assert sorted(seen) == list(range(4, 64))


def test_parts_that_do_not_fit_the_processes_are_refused(trainer):
    part = IterableAnnDataset(ADATA, TOKENIZER, rank=1, world_size=2)
    for process in ((0, 1), (0, 2), (1, 3)):
        with pytest.raises(ValueError, match=rf"part 1 of 2, .* process {process[0]} of {process[1]}: split it with"):
            batches_of(trainer, part, process)
    rows = split_dataset_by_node(Dataset.from_dict({"input_ids": [[1]]}).to_iterable_dataset(), 0, 2)
    with pytest.raises(ValueError, match="part 0 of 2"):  # of which half of the cells would never be seen
        batches_of(trainer, rows, (1, 2), max_steps=1)
    with pytest.raises(ValueError, match="part 1 of 2, .* process 0 of 2"):  # which only a chain's parts know
        batches_of(trainer, ChainDataset([part, part]), (0, 2), max_steps=1)
    with pytest.raises(ValueError, match="split in different ways"):
        batches_of(trainer, ChainDataset([part, rows]), (1, 2), max_steps=1)
    few = IterableAnnDataset(ADATA[:2].copy(), TOKENIZER, rank=2, world_size=3)
    with pytest.raises(ValueError, match="has 2 cells for 3 processes"):
        batches_of(trainer, few, (2, 3))
    trainer.args.accelerator_config.dispatch_batches = True
    with pytest.raises(ValueError, match="only the first process reads"):
        batches_of(trainer, part, (1, 2))
    trainer.args.accelerator_config.dispatch_batches = None


def test_a_run_is_not_resumed_by_another_number_of_processes(trainer, tmp_path):
    def order(world_size, split=True, batch_size=6):
        parts = {"world_size": world_size} if split else {}
        batches_of(trainer, IterableAnnDataset(ADATA, TOKENIZER, **parts), (0, world_size), batch_size=batch_size)
        return trainer._order()

    of_two = {"CellOrder": order(2)}
    trainer._check_order("checkpoint-3", of_two)
    order(3, batch_size=4)  # as many cells per step
    with pytest.raises(ValueError, match="checkpoint-3: parts of the stream was 2 and is 3.*resume with the same"):
        trainer._check_order("checkpoint-3", of_two)
    order(2, split=False)
    with pytest.raises(ValueError, match="parts of the stream was 2 and is None"):
        trainer._check_order("checkpoint-3", of_two)


def test_a_part_with_one_cell_less_has_as_many_batches():
    def part(n_batches, max_cells=4):
        cells = [{"cell_id": i, "length": 1} for i in range(8)]
        return TokenBudgetBuffer(cells, 9, max_cells=max_cells, buffer_size=max_cells, n_batches=n_batches)

    def sizes(*args, **settings):
        return [len(batch) for batch in part(*args, **settings)]

    assert sizes(None) == sizes(2) == sizes(4) == [4, 4]  # more than one batch less is not made up for
    assert sizes(3) == [4, 2, 2]
    assert sizes(9, max_cells=1) == [1] * 9  # one cell comes twice
    with pytest.raises(ValueError, match="n_batches 3 instead of 2"):
        part(2).load_state_dict(part(3).state_dict())
