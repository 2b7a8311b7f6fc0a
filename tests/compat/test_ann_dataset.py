"""AnnDataset: the same cells as numpy finds them, from anything that holds an X, read once a batch."""

import os
import pickle
from collections import Counter

import h5py
import numpy as np
import pandas as pd
import pytest
import torch
from anndata import AnnData, read_h5ad
from conftest import make_adata
from hypothesis import given
from hypothesis import strategies as st
from scipy import sparse
from sklearn.preprocessing import LabelEncoder
from torch.utils.data import ConcatDataset, DataLoader, random_split

from stformer_hf.compat.ann_dataset import AnnDataset
from stformer_hf.compat.transforms import Compose, EncodeLabels, LogTransform, NormalizeRowSum, Transform
from stformer_hf.sources.matrices import ColumnMatrix, CompressedMatrix

pytestmark = pytest.mark.filterwarnings("ignore:Writing zarr v2 data")
N_CELLS, N_GENES = 31, 12
EVERY_OTHER, BACKWARDS = slice(3, None, 2), slice(None, None, -2)  # rows of views
SOURCES = [
    "csr",
    "csc",
    "dense",
    "csr view",
    "dense view",
    "csr file",
    "csc file",
    "dense file",
    "zarr",
    "backed",
    "backed view",
    "backed csc view",
]


def cells() -> AnnData:
    """Cells whose X is no counts: fractions, and numbers below 0; obs with a label, a number and a gap."""
    adata = make_adata(N_CELLS, N_GENES, seed=1)
    noise = np.random.default_rng(0).normal(size=(N_CELLS, N_GENES))
    adata.X = sparse.csr_matrix((adata.X.toarray() * noise).astype(np.float32))
    adata.obs["note"] = pd.Categorical([None if i % 5 == 0 else f"note {i % 3}" for i in range(N_CELLS)])
    return adata


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Return what a dataset is made of, its X as a dense array, and its obs, by the name of the source."""
    folder = tmp_path_factory.mktemp("sources")
    csr = cells()
    csc, dense = csr.copy(), csr.copy()
    csc.X, dense.X = sparse.csc_matrix(csr.X), csr.X.toarray()
    csr.write_h5ad(folder / "csr.h5ad")
    csc.write_h5ad(folder / "csc.h5ad")
    dense.write_h5ad(folder / "dense.h5ad")
    csr.write_zarr(folder / "csr.zarr")
    backed, backed_csc = read_h5ad(folder / "csr.h5ad", backed="r"), read_h5ad(folder / "csc.h5ad", backed="r")
    chosen = [20, 4, 9, 5, 30, 0, 4]
    values, obs = csr.X.toarray(), csr.obs

    def of(source, rows=slice(None), columns=slice(None)):
        return source, values[rows][:, columns], obs.iloc[rows]

    found = {
        "csr": of(csr),
        "csc": of(csc),
        "dense": of(dense),
        "csr view": of(csr[EVERY_OTHER, 2:9], EVERY_OTHER, slice(2, 9)),
        "dense view": of(dense[BACKWARDS], BACKWARDS),
        "csr file": of(folder / "csr.h5ad"),
        "csc file": of(str(folder / "csc.h5ad")),
        "dense file": of(folder / "dense.h5ad"),
        "zarr": of(folder / "csr.zarr"),
        "backed": of(backed),
        "backed view": of(backed[chosen, ::-3], chosen, slice(None, None, -3)),
        "backed csc view": of(backed_csc[BACKWARDS, [5, 1]], BACKWARDS, [5, 1]),
    }
    assert list(found) == SOURCES
    return found.__getitem__  # a function is short to print where a test fails


def assert_same(items, values: np.ndarray, obs: pd.DataFrame, index) -> None:
    """Compare items with rows of a dense array and of obs, one by one."""
    assert len(items) == len(index)
    for item, i in zip(items, index, strict=True):
        assert list(item) == ["X", "obs_cell_type", "obs_age", "obs_note"]
        assert item["X"].dtype == torch.float32
        np.testing.assert_array_equal(item["X"].numpy(), values[i])
        assert item["obs_cell_type"] == obs["cell_type"].iloc[i]
        assert item["obs_age"].item() == obs["age"].iloc[i]
        assert item["obs_note"] == ("" if pd.isna(obs["note"].iloc[i]) else obs["note"].iloc[i])


def items_of(batches) -> list[dict]:
    """Take batches apart again."""
    return [{key: batch[key][i] for key in batch} for batch in batches for i in range(len(batch["X"]))]


class Reads:
    """Counts what is read of CSR files: rows asked for at once, and first rows of the ranges read."""

    def __init__(self, monkeypatch):
        self.takes, self.firsts = [], []
        take, rows = CompressedMatrix.take, CompressedMatrix.rows

        def spy_take(matrix, wanted):
            self.takes.append(list(wanted))
            return take(matrix, wanted)

        def spy_rows(matrix, start, stop):
            self.firsts.append(start)
            return rows(matrix, start, stop)

        monkeypatch.setattr(CompressedMatrix, "take", spy_take)
        monkeypatch.setattr(CompressedMatrix, "rows", spy_rows)


@pytest.fixture
def reads(monkeypatch) -> Reads:
    return Reads(monkeypatch)


# ---------------------------------------------------------------------- rows


@given(st.data())
def test_any_rows_of_any_source_are_those_of_numpy(sources, data):
    source, values, obs = sources(data.draw(st.sampled_from(SOURCES)))
    dataset = AnnDataset(source, chunk_size=data.draw(st.integers(1, 40)))
    assert dataset.shape == values.shape
    index = data.draw(st.lists(st.integers(-len(values), len(values) - 1), max_size=40))
    assert_same(dataset.__getitems__(index), values, obs, index)


@pytest.mark.parametrize("name", SOURCES)
def test_all_rows_one_by_one_and_after_a_pickle(sources, name):
    source, values, obs = sources(name)
    dataset = AnnDataset(source)
    assert len(dataset) == len(values)
    assert_same(list(dataset), values, obs, range(len(values)))  # ends by the IndexError of the first row beyond
    assert_same([dataset[-1], dataset[np.int64(2)], dataset[torch.tensor(1)]], values, obs, [-1, 2, 1])
    assert_same(list(pickle.loads(pickle.dumps(dataset))), values, obs, range(len(values)))


subsets = st.one_of(
    st.lists(st.integers(-N_CELLS, N_CELLS - 1), max_size=40),
    st.lists(st.booleans(), min_size=N_CELLS, max_size=N_CELLS).map(np.array),
    st.slices(N_CELLS),
)


@given(subsets)
def test_a_subset_is_what_numpy_takes_of_all_rows(sources, subset):
    adata, values, obs = sources("csr")
    rows = np.arange(N_CELLS)[subset] if len(np.atleast_1d(subset)) else np.arange(0)
    dataset = AnnDataset(adata, obs_subset=subset)
    assert dataset.shape == (len(rows), N_GENES)
    assert_same(dataset.__getitems__(range(len(rows))), values, obs, rows)


def test_a_mask_and_the_numbers_of_its_rows_are_the_same_subset(sources):
    adata, values, obs = sources("csr file")
    mask = np.zeros(N_CELLS, bool)
    mask[[5, 7, 30]] = True
    for subset in (mask, mask.tolist(), pd.Series(mask), np.flatnonzero(mask), torch.tensor([5, 7, -1])):
        assert_same(list(AnnDataset(adata, obs_subset=subset)), values, obs, [5, 7, 30])


def test_a_subset_of_a_backed_view_counts_in_the_view(sources):
    view, values, obs = sources("backed view")
    assert_same(list(AnnDataset(view, obs_subset=[-1, 0])), values, obs, [-1, 0])


@pytest.mark.parametrize(
    ("subset", "words"),
    [
        ([0, 31], "Row 31 is outside the dataset of 31 cells"),
        ([-32], "Row -32 is outside"),
        (np.array([2**64 - 1], np.uint64), "Row 18446744073709551615 is outside"),
        ([True, False], "mask has 2 values, but the dataset has 31 cells"),
        ([0.0, 1.5], "must be integers"),
        (["cell1"], "must be integers"),
        ([[0, 1]], "must be one-dimensional"),
    ],
)
def test_a_subset_that_there_is_not_raises(sources, subset, words):
    with pytest.raises(IndexError, match=words):
        AnnDataset(sources("csr")[0], obs_subset=subset)


def test_cells_beyond_the_dataset_and_other_things_than_integers_raise(sources):
    dataset = AnnDataset(sources("csr")[0], obs_subset=slice(5))
    for index in (5, -6):
        with pytest.raises(IndexError, match=f"Cell {index} is outside the dataset of 5 cells"):
            dataset[index]
        with pytest.raises(IndexError, match="outside"):
            dataset.__getitems__([0, index])
    for index in (1.0, "1", None, slice(2), [1], True):
        with pytest.raises(TypeError, match="A cell index must be an integer"):
            dataset[index]
    with pytest.raises(IndexError, match="dataset of 0 cells"):
        AnnDataset(sources("csr")[0], obs_subset=[])[0]


# ---------------------------------------------------------------------- reading


def test_a_batch_is_one_read_in_ascending_order(sources, reads):
    path, values, obs = sources("csr file")
    loader = AnnDataset(path).get_optimized_dataloader(batch_size=8, shuffle=True, seed=3)
    reads.firsts.clear()
    for n_batches, batch in enumerate(loader, start=1):
        assert len(reads.takes) == n_batches
        assert len(reads.takes[-1]) == len(batch["X"])
        assert reads.takes[-1] == sorted(reads.takes[-1])
        assert reads.firsts == sorted(reads.firsts)
        assert len(reads.firsts) <= len(batch["X"])
        reads.firsts.clear()
    assert n_batches == 4
    assert sorted(sum(reads.takes, [])) == list(range(N_CELLS))


def test_the_file_is_opened_once_and_closed_between(sources, monkeypatch):
    opened = []
    monkeypatch.setattr(h5py, "File", lambda *args, File=h5py.File, **kw: opened.append(args) or File(*args, **kw))
    dataset = AnnDataset(sources("csr file")[0])
    assert len(opened) == 1
    assert dataset._matrix._handle._file is None  # so that others may write to it until cells are read
    list(dataset)
    list(DataLoader(dataset, batch_size=4))
    assert len(opened) == 2


def test_a_forked_process_opens_the_file_for_itself(sources, monkeypatch):
    dataset = AnnDataset(sources("csr file")[0])
    dataset[0]
    inherited = dataset._matrix._handle.file
    monkeypatch.setattr(os, "getpid", lambda: -1)
    assert dataset._matrix._handle.file is not inherited


def test_what_is_stored_by_columns_is_regrouped_once(sources, monkeypatch):
    passes = []
    entries = ColumnMatrix.entries
    monkeypatch.setattr(ColumnMatrix, "entries", lambda matrix: passes.append(1) or entries(matrix))
    dataset = AnnDataset(sources("csc file")[0])
    assert len(passes) == 1  # before workers are forked
    list(dataset)
    assert len(passes) == 1


@pytest.mark.parametrize(("chunk_size", "sizes"), [(1, [1] * 10), (4, [4, 4, 2]), (10, [10]), (6000, [10])])
def test_no_more_than_a_chunk_is_read_at_a_time(sources, reads, chunk_size, sizes):
    path, values, obs = sources("csr file")
    index = [9, 30, 2, 2, 17, 0, 25, 11, 4, 29]
    assert_same(AnnDataset(path, chunk_size=chunk_size).__getitems__(index), values, obs, index)
    assert [len(rows) for rows in reads.takes] == sizes
    assert reads.firsts == sorted(reads.firsts)  # one pass, whatever the chunks


@pytest.mark.parametrize("chunk_size", [0, -5])
def test_a_chunk_has_a_row(sources, chunk_size):
    with pytest.raises(ValueError, match="must be at least 1"):
        AnnDataset(sources("csr")[0], chunk_size=chunk_size)


@pytest.mark.filterwarnings("ignore")  # that the files are old
def test_real_files_are_read_as_anndata_reads_them(shared_data):
    for name in ("anndata_archive_v0.5.0.h5ad", "categorical_int_nan.h5ad", "pbmc-small-x-csc.h5ad"):
        adata, dataset = read_h5ad(shared_data / "odd" / name), AnnDataset(shared_data / "odd" / name)
        values = adata.X.toarray() if sparse.issparse(adata.X) else np.asarray(adata.X)
        items = dataset.__getitems__(range(len(dataset)))
        np.testing.assert_array_equal(torch.stack([item["X"] for item in items]), values.astype(np.float32))
        assert list(items[0]) == ["X", *(f"obs_{column}" for column in adata.obs)]


# ---------------------------------------------------------------------- obs


@pytest.mark.parametrize(
    ("column", "type_", "values"),
    [
        (pd.Series([1, 2, 3], dtype="int32"), torch.int32, [1, 2, 3]),
        (pd.Series([1.5, np.nan, 3], dtype="float32"), torch.float32, [1.5, np.nan, 3]),
        (pd.Series([True, False, True]), torch.bool, [True, False, True]),
        (pd.Series([1, 2, 3], dtype="Int8"), torch.int8, [1, 2, 3]),
        (pd.Series([1, None, 3], dtype="Int8"), torch.float64, [1, np.nan, 3]),
        (pd.Series([True, False, True], dtype="boolean"), torch.bool, [True, False, True]),
        (pd.Series([True, None, False], dtype="boolean"), torch.float64, [1, np.nan, 0]),
        (pd.Series([1, None, 3], dtype=object), torch.float64, [1, np.nan, 3]),
        (pd.Series(np.array([1, 2, 3], ">i4")), torch.int32, [1, 2, 3]),
        (pd.Series(np.array([1, 2, 3], np.longdouble)), torch.float64, [1, 2, 3]),
        (pd.Series([7, 3, 7], dtype="category"), torch.int64, [7, 3, 7]),
        (pd.Series([7, None, 3], dtype="category"), torch.float64, [7, np.nan, 3]),
        (pd.Series([True, False, True], dtype="category"), torch.bool, [True, False, True]),
        (pd.Series(["a", None, "b"]), str, ["a", "", "b"]),
        (pd.Series(["a", np.nan, "b"]), str, ["a", "", "b"]),
        (pd.Series(["a", None, "b"], dtype="string"), str, ["a", "", "b"]),
        (pd.Series(["b", None, "a"], dtype="category"), str, ["b", "", "a"]),
        (pd.Series([None, None, None], dtype=object), str, ["", "", ""]),
        (pd.Series(["3", "1", "2"], dtype="category"), str, ["3", "1", "2"]),
        (pd.Series([1, "a", None]), str, ["1", "a", ""]),
        (pd.Series([2**70, 1, 2], dtype=object), str, [str(2**70), "1", "2"]),
        (pd.Series(pd.to_datetime(["2020-01-02 03:04", None, "2021"], format="ISO8601")), str,
            ["2020-01-02 03:04:00", "", "2021-01-01 00:00:00"]),
        (pd.Series(pd.cut([1, 2, 3], [0, 2, 4])), str, ["(0, 2]", "(0, 2]", "(2, 4]"]),
    ],
)  # fmt: skip
def test_obs_columns_are_tensors_or_strings(column, type_, values):
    names = ["cell0", "cell1", "cell2"]
    adata = AnnData(np.zeros((3, 2), np.float32), obs=pd.DataFrame({"it": column.set_axis(names)}))
    dataset = AnnDataset(adata)
    found = [dataset[i]["obs_it"] for i in range(3)]
    if type_ is str:
        assert found == values
        assert {type(value) for value in found} == {str}
        assert next(iter(DataLoader(dataset, batch_size=3)))["obs_it"] == values
    else:
        assert {(value.dtype, value.shape) for value in found} == {(type_, torch.Size([]))}
        np.testing.assert_array_equal([value.item() for value in found], values)
        batch = next(iter(DataLoader(dataset, batch_size=3)))["obs_it"]
        assert batch.dtype == type_
        np.testing.assert_array_equal(batch.numpy(), values)


def test_missing_strings_are_empty_in_files_too(adata, tmp_path):
    adata.obs["donor"] = [None if i % 2 else f"donor {i}" for i in range(60)]
    adata.write_h5ad(tmp_path / "a.h5ad")
    for source in (adata, tmp_path / "a.h5ad", read_h5ad(tmp_path / "a.h5ad", backed="r")):
        assert [item["obs_donor"] for item in AnnDataset(source, obs_subset=[1, 2])] == ["", "donor 2"]


def test_subsets_have_the_types_of_the_whole():
    obs = pd.DataFrame({"age": pd.array([1, None, 3, 4], "Int64")}, index=list("abcd"))
    adata = AnnData(np.zeros((4, 1), np.float32), obs=obs)
    for rows in ([0, 1], [2, 3]):
        assert {item["obs_age"].dtype for item in AnnDataset(adata, obs_subset=rows)} == {torch.float64}


def test_no_obs_and_obs_columns_that_occur_twice(adata):
    assert list(AnnDataset(AnnData(adata.X))[0]) == ["X"]
    adata.obs = pd.concat([adata.obs, adata.obs[["age"]]], axis=1)
    with pytest.raises(ValueError, match="'age' occurs twice"):
        AnnDataset(adata)


# ---------------------------------------------------------------------- transforms


class Spoil(Transform):
    """Changes in place whatever can be."""

    def __call__(self, data_dict):
        data_dict["X"].fill_(-1)
        data_dict["obs_age"].zero_()
        data_dict["obs_cell_type"] = "spoilt"
        return data_dict


@pytest.mark.parametrize("name", ["csr", "dense", "csr view", "dense view"])
def test_nothing_done_to_an_item_changes_the_anndata_or_another_item(sources, name):
    adata, values, obs = sources(name)
    spoilt = AnnDataset(adata, transform=Spoil()).__getitems__([0, 1, 1])
    assert all((item["X"] == -1).all() and item["obs_age"] == 0 for item in spoilt)
    for part in ([0, 1, 1], range(len(values))):
        items = AnnDataset(adata).__getitems__(part)
        items[0]["X"].add_(1000)
        items[0]["obs_age"].add_(1000)
        assert_same(items[1:], values, obs, part[1:])
    assert_same(list(AnnDataset(adata)), values, obs, range(len(values)))
    np.testing.assert_array_equal(adata.X.toarray() if sparse.issparse(adata.X) else adata.X, values)
    pd.testing.assert_frame_equal(adata.obs, obs)


class OnlySome(Transform):
    """Adds a key to cells of one type only."""

    def __call__(self, data_dict):
        if data_dict["obs_cell_type"] == "B cell":
            data_dict["score"] = torch.tensor(0.5)
        return data_dict


def test_items_of_different_keys_are_no_batch(sources):
    dataset = AnnDataset(sources("csr")[0], transform=OnlySome())
    with pytest.raises(ValueError, match="'score' is missing in some cells of a batch"):
        next(iter(dataset.get_optimized_dataloader(batch_size=N_CELLS)))
    assert next(iter(dataset.get_optimized_dataloader(batch_size=1))).keys() <= {
        *AnnDataset(sources("csr")[0])[0],
        "score",
    }


class Forgets(Transform):
    def __call__(self, data_dict):
        data_dict["X"] = data_dict["X"] * 2


def test_what_is_no_transform_is_refused(sources):
    for transform in (torch.log1p, LogTransform, [LogTransform()]):
        with pytest.raises(TypeError, match="subclass of Transform"):
            AnnDataset(sources("csr")[0], transform=transform)
    with pytest.raises(TypeError, match=r"Forgets\(\) returned NoneType instead of the dictionary"):
        AnnDataset(sources("csr")[0], transform=Forgets())[0]


# ---------------------------------------------------------------------- loaders


@pytest.mark.parametrize("name", ["csr", "dense view", "csr file", "csc file", "dense file", "zarr", "backed view"])
def test_forked_workers_give_what_numpy_gives(sources, name):
    source, values, obs = sources(name)
    dataset = AnnDataset(source, chunk_size=3)
    first = dataset[0]  # the file is open, and so is that of a backed AnnData, while the workers are forked
    np.testing.assert_array_equal(first["X"].numpy(), values[0])
    for n_workers, own in ((0, True), (0, False), (2, True)):
        settings = {"batch_size": 4, "num_workers": n_workers}
        if n_workers:
            settings["multiprocessing_context"] = "fork"
        loader = dataset.get_optimized_dataloader(**settings) if own else DataLoader(dataset, **settings)
        batches = list(loader)
        assert isinstance(batches[0]["obs_note"], list)
        assert batches[0]["X"].shape == (4, values.shape[1])
        assert_same(items_of(batches), values, obs, range(len(values)))


@pytest.mark.slow
def test_spawned_workers_give_what_numpy_gives(sources):
    names = ["backed view", "csc file", "csr view"]
    datasets = [AnnDataset(sources(name)[0], obs_subset=slice(4)) for name in names]
    loader = DataLoader(
        ConcatDataset(datasets),  # one start of workers for all of them, a batch each
        batch_size=4,
        num_workers=2,
        multiprocessing_context="spawn",
        collate_fn=datasets[0].get_collate_fn(),
    )
    for name, batch in zip(names, loader, strict=True):
        _, values, obs = sources(name)
        assert_same(items_of([batch]), values, obs, range(4))


def shuffled(dataset, **settings) -> list[float]:
    return [
        age for batch in dataset.get_optimized_dataloader(batch_size=4, **settings) for age in batch["obs_n"].tolist()
    ]


def test_the_seed_is_that_of_the_shuffle(adata, tmp_path):
    adata.obs["n"] = range(60)
    adata.write_h5ad(tmp_path / "a.h5ad")
    dataset = AnnDataset(tmp_path / "a.h5ad")
    first = shuffled(dataset, shuffle=True, seed=0)
    assert sorted(first) == list(range(60)) != first
    torch.manual_seed(123)  # has no part in it
    assert shuffled(dataset, shuffle=True, seed=0) == first
    assert shuffled(dataset, shuffle=True, seed=0, num_workers=2) == first
    assert shuffled(dataset, shuffle=True, seed=1) != first
    assert shuffled(dataset, shuffle=True, generator=torch.Generator().manual_seed(0)) == first
    loader = dataset.get_optimized_dataloader(batch_size=60, shuffle=True, seed=0)
    epochs = [next(iter(loader))["obs_n"].tolist() for _ in range(2)]
    assert epochs[0] != epochs[1]
    assert shuffled(dataset) == list(range(60))
    with pytest.raises(ValueError, match="a seed or a generator"):
        dataset.get_optimized_dataloader(seed=0, generator=torch.Generator())


def test_the_collate_function_is_pickled_and_may_be_replaced(sources):
    dataset = AnnDataset(sources("csr")[0])
    collate = pickle.loads(pickle.dumps(dataset.get_collate_fn()))
    batch = collate(dataset.__getitems__([3, 1]))
    np.testing.assert_array_equal(batch["X"].numpy(), sources("csr")[1][[3, 1]])
    assert batch["obs_age"].tolist() == sources("csr")[2]["age"].iloc[[3, 1]].tolist()
    assert next(iter(dataset.get_optimized_dataloader(batch_size=5, collate_fn=len))) == 5


def test_the_documented_way_from_labels_to_batches(adata):
    values = adata.X.toarray().astype(np.float64)
    encoder = LabelEncoder().fit(adata.obs["cell_type"].values)
    transform = Compose([NormalizeRowSum(target_sum=1e4), LogTransform(), EncodeLabels(label_encoder=encoder)])
    dataset = AnnDataset(adata, transform=transform, chunk_size=1000)
    train, test = random_split(dataset, [40, 20], generator=torch.Generator().manual_seed(0))
    seen = Counter()
    for part in (train, test):
        for batch in DataLoader(part, batch_size=8, collate_fn=dataset.get_collate_fn()):
            assert batch["obs_cell_type_encoded"].tolist() == [
                ["B cell", "T cell"].index(v) for v in batch["obs_cell_type"]
            ]
            seen.update(map(tuple, batch["X"].round(decimals=3).tolist()))
    expected = np.log1p(values * 1e4 / np.maximum(values.sum(1, keepdims=True), 1e-8))
    assert seen == Counter(map(tuple, torch.tensor(expected, dtype=torch.float32).round(decimals=3).tolist()))


# ---------------------------------------------------------------------- what cannot be opened


def test_sources_without_x_say_what_they_have(adata, tmp_path):
    bare = AnnData(obs=adata.obs, var=adata.var, layers={"counts": adata.X, "scaled": adata.X})
    bare.write_h5ad(tmp_path / "a.h5ad")
    for source in (bare, tmp_path / "a.h5ad"):
        with pytest.raises(ValueError, match="has no X; it has counts, scaled"):
            AnnDataset(source)
    with pytest.raises(ValueError, match="AnnData has no X; it has no matrix"):
        AnnDataset(AnnData(obs=adata.obs))


def test_other_things_than_sources_raise(adata, tmp_path):
    with pytest.raises(FileNotFoundError, match="No such file"):
        AnnDataset(tmp_path / "none.h5ad")
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(ValueError, match="unsupported file format"):
        AnnDataset(tmp_path / "a.txt")
    (tmp_path / "a.h5ad").write_text("x")
    with pytest.raises(ValueError, match="not a readable HDF5 file"):
        AnnDataset(tmp_path / "a.h5ad")
    with pytest.raises(TypeError, match="an AnnData or a path, got csr_matrix"):
        AnnDataset(adata.X)


def test_obs_of_another_length_than_x_is_damage(adata, tmp_path):
    adata.write_h5ad(tmp_path / "a.h5ad")
    adata[:50].copy().write_h5ad(tmp_path / "b.h5ad")
    with h5py.File(tmp_path / "a.h5ad", "r+") as file, h5py.File(tmp_path / "b.h5ad") as other:
        del file["obs"]
        other.copy("obs", file)
    with pytest.raises(ValueError, match="is damaged: X has 60 rows, obs has 50"):
        AnnDataset(tmp_path / "a.h5ad")


def test_a_dataset_is_shown_by_its_size(sources):
    path = sources("csr file")[0]
    assert repr(AnnDataset(path, obs_subset=slice(7))) == (
        f"AnnDataset({path}: 7 cells, 12 genes, obs: cell_type, age, note)"
    )
    assert repr(AnnDataset(AnnData(np.ones((2000, 1))))) == "AnnDataset(AnnData: 2,000 cells, 1 genes, obs: none)"
