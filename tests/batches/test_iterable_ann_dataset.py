"""IterableAnnDataset: each cell once an epoch, in an order of seed and epoch alone, and from any point on."""

import copy
import json
import pickle
import random
from types import SimpleNamespace

import h5py
import numpy as np
import pandas as pd
import pytest
import torch
from anndata import AnnData
from anndata.io import write_elem
from conftest import make_adata, with_genes
from hypothesis import given
from hypothesis import strategies as st
from scipy import sparse
from torch.utils.data import DataLoader

from stformer_hf import CellStore, DataCollatorForCellClassification, DataCollatorForPhenotypicMLM, GeneTokenizer
from stformer_hf.batches import iterable_ann_dataset
from stformer_hf.batches.iterable_ann_dataset import IterableAnnDataset

SIZES = [5, 0, 9, 1, 12, 4, 7, 20, 2, 6, 11]  # cells of each shard
COMBINATIONS = [(shards, workers, world) for shards in range(1, 12) for workers in range(16) for world in range(1, 9)]


class CellIds(IterableAnnDataset):
    """Goes the whole way of the iteration but for reading, and gives numbers of cells."""

    def _examples(self, pieces, order):
        yield from self._cell_ids(pieces)[order].tolist()


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Files of `SIZES` cells with the same ten genes, cells numbered throughout."""
    folder = tmp_path_factory.mktemp("shards")
    names = iter(range(sum(SIZES)))
    files = []
    for i, n in enumerate(SIZES):
        adata = make_adata(max(n, 4), 10, seed=i)[:n].copy()
        adata.obs_names = [f"cell{next(names)}" for _ in range(n)]
        files.append(folder / f"{i:02d}.h5ad")
        adata.write_h5ad(files[-1])
    return files


def small_cells(sizes) -> list[AnnData]:
    """Cells in memory: one count each, which is the number of the cell."""
    first = np.cumsum(sizes) - sizes
    return [
        with_genes(AnnData(sparse.csr_matrix(np.arange(start, start + n, dtype=np.float32)[:, None])))
        for start, n in zip(first, sizes, strict=True)
    ]


def numbers(examples) -> list[int]:
    return [example["cell_id"] for example in examples]


@pytest.fixture
def in_worker(monkeypatch):
    """Make the next iterations those of a worker of a DataLoader; None for the main process."""

    def enter(worker: int | None = None, n_workers: int = 0, loader: int = 1) -> None:
        info = None if worker is None else SimpleNamespace(id=worker, num_workers=n_workers, seed=loader + worker)
        monkeypatch.setattr(iterable_ann_dataset, "get_worker_info", lambda: info)

    return enter


def deliver(dataset, in_worker, batch_size, n_workers, drop_last=False, loader=1) -> list[list]:
    """Batches of a DataLoader, without processes: a batch of each worker in turn."""
    of_worker = []
    for worker in range(max(1, n_workers)):
        in_worker(*((worker, n_workers, loader) if n_workers else ()))
        cells = list(copy.copy(dataset))  # a worker has a copy, but for what is in shared memory
        of_worker.append([cells[i : i + batch_size] for i in range(0, len(cells), batch_size)])
    in_worker()
    rounds = range(max(map(len, of_worker)))
    batches = [batches[i] for i in rounds for batches in of_worker if i < len(batches)]
    return [batch for batch in batches if len(batch) == batch_size or not drop_last]


# ---------------------------------------------------------------------- every cell once


@pytest.mark.parametrize("step", [5, pytest.param(1, marks=pytest.mark.slow)])
def test_each_cell_once_for_any_number_of_shards_workers_and_ranks(shards, in_worker, step):
    whole = {
        (n, shuffle): CellIds(shards[:n], shuffle=shuffle, buffer_size=7) for n in range(1, 12) for shuffle in (0, 1)
    }
    for n_shards, n_workers, world_size in COMBINATIONS[::step]:
        found, sizes = [], []
        for rank in range(world_size):
            dataset = copy.copy(whole[n_shards, (n_shards + n_workers + world_size) % 2])
            dataset.rank, dataset.world_size = rank, world_size
            n_before = len(found)
            for worker in range(max(1, n_workers)):
                in_worker(*((worker, n_workers) if n_workers else ()))
                cells = list(dataset)
                sizes.append(len(cells))
                found += cells
            assert len(found) - n_before == len(dataset)
        n_cells = sum(SIZES[:n_shards])
        assert sorted(found) == list(range(n_cells)), (n_shards, n_workers, world_size)
        assert max(sizes) - min(sizes) <= 1
    assert len(COMBINATIONS) == 1408


def test_each_cell_is_read_once_and_is_itself(shards, in_worker):
    counts = np.concatenate([make_adata(max(n, 4), 10, seed=i).X.toarray()[:n] for i, n in enumerate(SIZES)])
    whole = {n: IterableAnnDataset(shards[:n], shuffle=True, buffer_size=7) for n in range(1, 12)}
    for n_shards, n_workers, world_size in random.Random(0).sample(COMBINATIONS, 20):
        cells = []
        for rank in range(world_size):
            dataset = copy.copy(whole[n_shards])
            dataset.rank, dataset.world_size = rank, world_size
            cells += [cell for batch in deliver(dataset, in_worker, 4, n_workers) for cell in batch]
        assert sorted(numbers(cells)) == list(range(sum(SIZES[:n_shards])))
        for cell in cells:
            row = np.zeros(10)
            row[cell["genes"]] = cell["counts"]
            np.testing.assert_array_equal(row, counts[cell["cell_id"]])
            assert cell["obs_name"] == f"cell{cell['cell_id']}"


@pytest.mark.parametrize(
    "options", [{}, {"num_workers": 2, "multiprocessing_context": "fork"}, {"num_workers": 13}], ids=str
)
def test_real_loaders_give_each_cell_once(shards, in_worker, options):
    dataset = IterableAnnDataset(shards, shuffle=True, buffer_size=7)
    begun = iter(dataset)  # a file is open when the workers start
    first = next(begun)
    loader = DataLoader(dataset, batch_size=4, collate_fn=numbers, **options)
    batches = list(loader)
    assert sorted(sum(batches, [])) == list(range(sum(SIZES)))
    expected = deliver(dataset, in_worker, 4, options.get("num_workers", 0), loader=2)
    assert batches == [numbers(batch) for batch in expected]
    assert numbers([first, *begun]) == numbers(dataset)


@pytest.mark.parametrize("context", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_workers_that_outlive_an_epoch_see_the_next(shards, in_worker, context):
    dataset = IterableAnnDataset(shards, shuffle=True, buffer_size=7)
    loader = DataLoader(
        dataset,
        batch_size=4,
        collate_fn=numbers,
        num_workers=2,
        multiprocessing_context=context,
        persistent_workers=True,
    )
    epochs = []
    for epoch in (0, 1):
        dataset.set_epoch(epoch)
        epochs.append(list(loader))
        assert epochs[-1] == [numbers(batch) for batch in deliver(dataset, in_worker, 4, 2)]
    assert epochs[0] != epochs[1]


def test_length_is_that_of_a_rank(shards):
    lengths = [len(IterableAnnDataset(shards, rank=rank, world_size=4)) for rank in range(4)]
    assert lengths == [19, 19, 19, 20]
    assert len(DataLoader(IterableAnnDataset(shards), batch_size=10)) == 8


# ---------------------------------------------------------------------- the order


def test_without_shuffle_cells_come_in_the_order_of_the_files(shards):
    assert numbers(IterableAnnDataset(shards, buffer_size=7)) == list(range(sum(SIZES)))
    assert [cell["obs_name"] for cell in IterableAnnDataset(shards)] == [f"cell{i}" for i in range(sum(SIZES))]


def test_the_shuffled_order_is_a_function_of_seed_and_epoch(shards):
    def order(seed=0, epoch=0):
        dataset = IterableAnnDataset(shards, shuffle=True, buffer_size=32, seed=seed)
        dataset.set_epoch(epoch)
        return numbers(dataset)

    first = order()
    assert sorted(first) == list(range(sum(SIZES))) != first
    assert first == order()
    assert len({tuple(order(seed, epoch)) for seed in range(3) for epoch in range(3)}) == 9


def test_a_window_mixes_its_cells_evenly():
    dataset = CellIds(small_cells([8]), shuffle=True, buffer_size=8)
    seen = np.zeros((8, 8))
    for epoch in range(2000):
        dataset.set_epoch(epoch)
        seen[np.arange(8), list(dataset)] += 1
    assert np.abs(seen - 250).max() < 80  # five standard deviations


def test_files_are_permuted_independently_of_the_first_window():
    """The first window's order must not be that of the files, which would pair file i with row i in every epoch."""
    dataset = CellIds(small_cells([1] * 6), shuffle=True, buffer_size=6)
    seen = set()
    for epoch in range(200):
        dataset.set_epoch(epoch)
        seen.add(tuple(dataset))
    assert len(seen) > 150


# ---------------------------------------------------------------------- state

sizes_strategy = st.lists(st.integers(0, 9), min_size=1, max_size=5)


@given(sizes=sizes_strategy, buffer_size=st.integers(1, 12), shuffle=st.booleans(), data=st.data())
def test_a_state_at_any_position_gives_the_rest(sizes, buffer_size, shuffle, data):
    options = {"buffer_size": buffer_size, "shuffle": shuffle}
    dataset = IterableAnnDataset(small_cells(sizes), **options)
    other = copy.deepcopy(dataset)
    dataset.set_epoch(3)
    n = data.draw(st.integers(0, len(dataset)))
    cells = iter(dataset)
    taken = [next(cells)["cell_id"] for _ in range(n)]
    state = json.loads(json.dumps(dataset.state_dict()))
    whole = numbers(dataset)

    other.load_state_dict(state)
    assert other.epoch == 3
    assert other.state_dict() == state
    rest = list(other)
    assert taken + numbers(rest) == whole
    assert [cell["counts"].sum() for cell in rest] == numbers(rest)
    assert numbers(other) == whole  # a state is for one iteration


@given(
    sizes=sizes_strategy,
    buffer_size=st.integers(1, 12),
    shuffle=st.booleans(),
    batch_size=st.integers(1, 6),
    n_workers=st.integers(0, 5),
    drop_last=st.booleans(),
    world_size=st.integers(1, 3),
    data=st.data(),
)
def test_the_state_after_any_batch_gives_the_remaining_batches(
    sizes, buffer_size, shuffle, batch_size, n_workers, drop_last, world_size, data
):
    with pytest.MonkeyPatch.context() as patch:

        def in_worker(worker=None, n_workers=0, loader=1):
            info = None if worker is None else SimpleNamespace(id=worker, num_workers=n_workers, seed=loader + worker)
            patch.setattr(iterable_ann_dataset, "get_worker_info", lambda: info)

        rank = data.draw(st.integers(0, world_size - 1))
        dataset = CellIds(
            small_cells(sizes), buffer_size=buffer_size, shuffle=shuffle, rank=rank, world_size=world_size
        )
        dataset.set_epoch(2)
        batches = deliver(dataset, in_worker, batch_size, n_workers, drop_last)
        n = data.draw(st.integers(0, len(batches)))
        other = copy.copy(dataset)
        other.load_state_dict(dataset.state_after(n, batch_size, n_workers, drop_last))
        assert deliver(other, in_worker, batch_size, n_workers, drop_last) == batches[n:]
        assert deliver(other, in_worker, batch_size, n_workers, drop_last, loader=2) == batches
        with pytest.raises(ValueError, match=f"an epoch has {len(batches)} batches"):
            dataset.state_after(len(batches) + 1, batch_size, n_workers, drop_last)


@pytest.mark.parametrize("n_workers", [0, 1, 2, 3])
def test_a_real_loader_goes_on_where_another_was_stopped(shards, n_workers):
    def loader(dataset):
        return DataLoader(dataset, batch_size=6, collate_fn=numbers, num_workers=n_workers)

    dataset = IterableAnnDataset(shards[:9], shuffle=True, buffer_size=7, seed=4)
    dataset.set_epoch(1)
    batches = list(loader(dataset))
    for n in (1, len(batches) - 2):
        other = IterableAnnDataset(shards[:9], shuffle=True, buffer_size=7, seed=4)
        other.load_state_dict(dataset.state_after(n, 6, n_workers))
        assert list(loader(other)) == batches[n:]
        if n == 1:
            assert list(loader(other)) == batches  # the next epoch is whole, though nobody set it


def test_a_worker_can_save_and_load_its_own_state(shards, in_worker):
    """What torchdata's StatefulDataLoader does in each worker."""
    dataset = CellIds(shards, shuffle=True, buffer_size=7)
    for worker in range(3):
        in_worker(worker, 3)
        mine = copy.copy(dataset)
        cells = iter(mine)
        taken = [next(cells) for _ in range(worker * 5)]
        other = copy.copy(dataset)
        other.load_state_dict(mine.state_dict())
        assert taken + list(other) == list(dataset)


def test_a_state_is_for_one_loader_though_not_all_of_its_workers_began(shards, in_worker):
    dataset = CellIds(shards, shuffle=True, buffer_size=7)
    batches = deliver(dataset, in_worker, 4, 2)
    dataset.load_state_dict(dataset.state_after(3, 4, 2))
    in_worker(0, 2, loader=1)
    next(iter(copy.copy(dataset)))
    assert deliver(dataset, in_worker, 4, 2, loader=2) == batches


def test_states_of_other_datasets_and_workers_raise(shards, in_worker):
    dataset = IterableAnnDataset(shards, shuffle=True, buffer_size=7)
    state = dataset.state_dict()
    for other in (
        IterableAnnDataset(shards[1:], shuffle=True, buffer_size=7),
        IterableAnnDataset(shards, shuffle=True, buffer_size=8),
        IterableAnnDataset(shards, shuffle=True, buffer_size=7, seed=1),
        IterableAnnDataset(shards, buffer_size=7),
        IterableAnnDataset(shards, shuffle=True, buffer_size=7, world_size=2),
    ):
        with pytest.raises(ValueError, match="another dataset: .* instead of"):
            other.load_state_dict(state)
    with pytest.raises(ValueError, match="another dataset"):
        dataset.load_state_dict({})
    dataset.load_state_dict(dataset.state_after(2, 4, num_workers=2))
    in_worker(0, 3)
    with pytest.raises(ValueError, match="with 2 workers, but now there are 3"):
        next(iter(dataset))


def test_the_main_process_does_not_guess_what_workers_delivered(shards):
    dataset = IterableAnnDataset(shards)
    loader = DataLoader(dataset, batch_size=4, collate_fn=numbers, num_workers=1)
    next(iter(loader))
    with pytest.raises(RuntimeError, match="state_after"):
        dataset.state_dict()
    dataset.set_epoch(1)
    assert dataset.state_dict()["taken"] == [0]


def test_setting_another_epoch_forgets_the_position(shards):
    dataset = IterableAnnDataset(shards)
    cells = iter(dataset)
    next(cells)
    state = dataset.state_dict()
    assert state["taken"] == [1]
    dataset.set_epoch(0)  # as Trainer does when it goes on
    assert dataset.state_dict() == state
    dataset.load_state_dict(state)
    dataset.set_epoch(1)
    assert dataset.state_dict()["taken"] == [0]
    assert len(list(dataset)) == sum(SIZES)


# ---------------------------------------------------------------------- genes and obs


def test_cells_are_those_of_a_store(tmp_path, adata):
    adata.obs["score"] = np.where(np.arange(60) % 5, np.linspace(0, 1, 60), np.nan)
    adata.obs["kind"] = pd.Categorical(np.array(["x", "y", None], object)[np.arange(60) % 3])
    adata.obs["barcode"] = [f"AAC{i}" for i in range(60)]
    adata[:25].write_h5ad(tmp_path / "a.h5ad")
    obs = ["cell_type", "age", "score", "kind", "barcode"]
    sources = [tmp_path / "a.h5ad", adata[25:].copy()]
    store = CellStore.build(tmp_path / "s", sources, obs=obs)
    cells = list(IterableAnnDataset(sources, obs=obs, buffer_size=16))
    for cell, expected in zip(cells, (store[i] for i in range(60)), strict=True):
        assert list(cell) == list(expected)
        for name, value in expected.items():
            np.testing.assert_array_equal(cell[name], value)
    assert cells[0]["genes"].dtype == np.uint16 and cells[0]["counts"].dtype == np.uint32
    again = IterableAnnDataset(store, obs="age")
    assert [cell["age"] for cell in again] == adata.obs["age"].tolist()


def test_files_unite_by_gene_id(tmp_path):
    """Other genes, other orders, suffixes of versions, a gene twice, other layouts: as pandas joins them."""
    rng = np.random.default_rng(0)
    frames, files = [], []
    for i, layout in enumerate([sparse.csr_matrix, sparse.csc_matrix, np.array]):
        adata = make_adata(9 + i, 12, seed=i)
        genes = [f"ENSG{gene:011d}" for gene in rng.choice(20, 12, replace=False)]
        if i == 1:
            genes[7] = genes[2]
        frame = pd.DataFrame(adata.X.toarray(), columns=genes).T.groupby(level=0).sum().T
        frames.append(frame)
        adata.var_names = [f"{gene}.{rng.integers(1, 9)}" for gene in genes]
        adata.var_names_make_unique()
        if i == 1:  # anndata makes names unique; the ids are in a column
            adata.var["gene_ids"] = genes
            adata.var_names = [f"name{j}" for j in range(12)]
        adata.X = layout(adata.X.toarray())
        files.append(tmp_path / f"{i}.h5ad")
        adata.write_h5ad(files[-1])
    expected = pd.concat(frames, ignore_index=True).fillna(0)
    dataset = IterableAnnDataset(files, shuffle=True, buffer_size=8)
    assert sorted(dataset.gene_ids) == sorted(expected.columns)
    found = np.zeros((len(expected), len(dataset.genes)))
    for cell in dataset:
        assert (np.diff(cell["genes"].astype(int)) > 0).all() and (cell["counts"] > 0).all()
        found[cell["cell_id"], cell["genes"]] = cell["counts"]
    np.testing.assert_array_equal(found, expected[dataset.gene_ids].to_numpy())


def test_aliases_and_symbols_unite_genes():
    cells = [with_genes(AnnData(sparse.csr_matrix(np.ones((2, 2), np.float32)))) for _ in range(2)]
    cells[0].var = pd.DataFrame({"symbol": ["A", "B"]}, index=["ENSG00000000001", "ENSG00000000002"])
    cells[1].var = pd.DataFrame({"symbol": ["A", "C"]}, index=["ENSG00000000011", "ENSG00000000003"])
    assert len(IterableAnnDataset(cells).genes) == 4
    assert len(IterableAnnDataset(cells, unify="symbol").genes) == 3
    assert len(IterableAnnDataset(cells, aliases={"ENSG00000000011": "ENSG00000000001"}).genes) == 3


def test_labels_of_a_test_set_are_numbered_as_those_of_the_training_set(adata, tokenizer):
    train = IterableAnnDataset(adata, obs=["cell_type"])
    other = adata[adata.obs["cell_type"] == "T cell"].copy()
    other.obs["cell_type"] = other.obs["cell_type"].cat.remove_unused_categories()
    other.obs.loc[other.obs_names[0], "cell_type"] = None
    test = IterableAnnDataset(other, tokenizer, obs=["cell_type"], categories=train.categories)
    assert test.categories == train.categories == {"cell_type": ["B cell", "T cell"]}
    assert [cell["cell_type"] for cell in test] == [-1] + [1] * (len(other) - 1)


# ---------------------------------------------------------------------- tokens


def test_tokens_are_those_of_the_stores_cells(tmp_path, adata, store):
    adata.obs["batch"] = np.arange(60) % 3  # numbers as phenotype
    adata[:25].write_h5ad(tmp_path / "a.h5ad")
    other = adata[25:].copy()
    other.obs["cell_type"] = other.obs["cell_type"].astype(object)
    other.obs.loc[other.obs_names[4], "cell_type"] = None
    tokenizer = GeneTokenizer(
        adata.var_names[::-1].tolist(),
        bin_edges=[0.5, 1.5],
        phenotypes={"cell_type": ["T cell", "B cell"], "batch": [0, 1, 2]},
        max_length=15,
    )
    expected = tokenizer(adata[:25]), tokenizer(other)
    dataset = IterableAnnDataset([tmp_path / "a.h5ad", other], tokenizer, obs=["age"], buffer_size=16)
    examples = list(dataset)
    assert list(examples[0]) == ["input_ids", "token_type_ids", "cell_id", "age"]
    for name in ("input_ids", "token_type_ids"):
        assert [example[name].tolist() for example in examples] == expected[0][name] + expected[1][name]
        assert examples[0][name].dtype == np.int64
    assert [example["age"] for example in examples] == adata.obs["age"].tolist()


def test_batches_are_those_of_a_store_whatever_the_workers(tmp_path, adata, store, tokenizer):
    collator = DataCollatorForPhenotypicMLM(tokenizer, seed=5)
    collator.set_epoch(2)
    dataset = IterableAnnDataset(adata, tokenizer, shuffle=True, buffer_size=16)
    for n_workers in (0, 2):
        n_cells = 0
        for cells in DataLoader(dataset, batch_size=8, collate_fn=list, num_workers=n_workers):
            found, expected = collator(cells), collator(store.__getitems__(numbers(cells)))
            assert all((found[name] == expected[name]).all() for name in expected)
            n_cells += len(cells)
        assert n_cells == 60


def test_classes_reach_the_collator(adata, store):
    tokenizer = GeneTokenizer.from_store(IterableAnnDataset(adata, obs=["cell_type"]), phenotypes=["cell_type"])
    assert tokenizer.phenotypes == {"cell_type": ["B cell", "T cell"]}
    tokenizer.included_phenotypes = []
    collator = DataCollatorForCellClassification(tokenizer, label="cell_type")
    loader = DataLoader(IterableAnnDataset(adata, tokenizer, obs="cell_type"), batch_size=60, collate_fn=collator)
    (batch,) = loader
    expected = collator(store.__getitems__(range(60)))
    assert all((batch[name] == expected[name]).all() for name in expected)


@pytest.mark.parametrize("settings", [{"values": True}, {"whole_cell": True}, {"normalize": "log1p_cp10k"}], ids=str)
def test_an_epoch_of_a_stream_is_that_of_a_store(tmp_path, adata, settings):
    """Values, counts, the genes that each epoch draws, labels and dates."""
    adata.obs["day"] = pd.to_datetime("2024-01-01") + pd.to_timedelta(np.arange(60), "D")
    store = CellStore.build(tmp_path / "s", adata, obs=["cell_type", "age", "day"], report=False)
    tokenizer = GeneTokenizer(
        adata.var_names.tolist(), bin_edges=[0.5, 1.5], max_length=7, truncation="random", **settings
    )
    collator = DataCollatorForPhenotypicMLM(tokenizer, mlm=False)
    stream = IterableAnnDataset(adata, tokenizer, obs=["cell_type", "age", "day"])
    seen = []
    for epoch in (0, 1, 5):
        stream.set_epoch(epoch)
        collator.set_epoch(epoch)
        cells = list(stream)
        found, expected = collator(cells), collator(store.__getitems__(range(60)))
        assert found.keys() == expected.keys() and ("expression_values" in found) == ("values" in settings)
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        seen.append(found["token_type_ids"].tolist())
        for cell, row in zip(cells, range(60), strict=True):
            whole = store[row]
            assert (cell["cell_type"].name, cell["age"], cell["day"]) == tuple(
                whole[name] for name in ("cell_type", "age", "day")
            )
            assert isinstance(cell["day"], pd.Timestamp)
    assert seen[0] != seen[1] != seen[2]


def test_a_phenotype_without_its_column_is_told_at_once(adata, tokenizer):
    other = adata.copy()
    del other.obs["cell_type"]
    with pytest.raises(ValueError, match="no obs column 'cell_type'; it has age"):
        IterableAnnDataset([adata, other], tokenizer)


# ---------------------------------------------------------------------- bad input


def test_no_files_a_missing_file_and_arguments_that_cannot_be(adata, tmp_path):
    with pytest.raises(ValueError, match="No files"):
        IterableAnnDataset([])
    with pytest.raises(FileNotFoundError, match="none.h5ad"):
        IterableAnnDataset([adata, tmp_path / "none.h5ad"])
    with pytest.raises(FileNotFoundError):
        IterableAnnDataset(str(tmp_path / "*.h5ad"))
    with pytest.raises(ValueError, match="rank=2 of world_size=2"):
        IterableAnnDataset(adata, rank=2, world_size=2)
    with pytest.raises(ValueError, match="buffer_size=0"):
        IterableAnnDataset(adata, buffer_size=0)
    with pytest.raises(ValueError, match="no obs column 'donor'"):
        IterableAnnDataset(adata, obs=["donor"])
    adata.obs["cell_id"] = 1
    with pytest.raises(ValueError, match="cell_id: the dataset uses this name"):
        IterableAnnDataset(adata, obs=["cell_id"])


@pytest.mark.parametrize("sizes", [[0], [0, 0], [0, 3, 0, 0, 2, 0], [1]])
def test_files_without_cells(sizes, in_worker):
    for shuffle in (False, True):
        dataset = IterableAnnDataset(small_cells(sizes), shuffle=shuffle, buffer_size=2)
        assert len(dataset) == sum(sizes)
        assert sorted(numbers(dataset)) == list(range(sum(sizes)))
        batches = deliver(dataset, in_worker, 2, 4)
        assert sorted(numbers(sum(batches, []))) == list(range(sum(sizes)))


def test_values_that_are_no_counts_are_told_while_reading(tmp_path):
    values = np.zeros((2000, 300), np.float32)  # more than is looked at when the file is opened
    values[:, :2] = 1
    values[700, 1] = 0.5
    with_genes(AnnData(values)).write_h5ad(tmp_path / "a.h5ad")
    dataset = IterableAnnDataset(tmp_path / "a.h5ad", buffer_size=100)
    with pytest.raises(ValueError, match="a.h5ad: .*X holds fractional values .* in cells 700 to 799"):
        list(dataset)
    cells = list(IterableAnnDataset(tmp_path / "a.h5ad", fractional=True))
    assert cells[700]["counts"].tolist() == [1.0, 0.5]
    with pytest.raises(ValueError, match="does not fit into 32 bits"):
        list(IterableAnnDataset(with_genes(AnnData(sparse.csr_matrix(np.array([[2.0**33]]))))))


def test_a_table_that_does_not_fit_the_matrix_is_told(tmp_path):
    cells = make_adata(20)
    del cells.obs["cell_type"]
    cells.write_h5ad(tmp_path / "a.h5ad")
    with h5py.File(tmp_path / "a.h5ad", "r+") as file:
        attributes = dict(file["obs"].attrs)
        del file["obs"]
        write_elem(file, "obs", cells.obs[:15])
        file["obs"].attrs.update(attributes)
    with pytest.raises(ValueError, match="15 cells and 40 genes"):
        IterableAnnDataset(tmp_path / "a.h5ad")


def test_it_pickles_without_what_is_open(shards):
    dataset = IterableAnnDataset(shards, shuffle=True)
    expected = numbers(dataset)
    cells = iter(dataset)
    next(cells)
    pickled = pickle.dumps(dataset)
    assert numbers(pickle.loads(pickled)) == expected


def test_one_file_is_open_at_a_time(shards):
    dataset = IterableAnnDataset(shards, shuffle=True, buffer_size=3)
    handles = [file.matrix._handle for file in dataset._files]
    for _ in dataset:
        assert sum(handle._file is not None for handle in handles) <= 1
    assert not any(handle._file for handle in handles)
    cells = iter(dataset)
    next(cells)
    cells.close()
    assert not any(handle._file for handle in handles)
