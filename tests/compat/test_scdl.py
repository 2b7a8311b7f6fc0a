"""The interface of BioNeMo-SCDL: what it gives is what is in the files."""

import os
import pickle
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from anndata import AnnData
from conftest import make_adata, with_genes
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import sparse
from torch.utils.data import DataLoader, Dataset

from stformer_hf import CellStore
from stformer_hf.compat.scdl import NeighborSamplingStrategy, SingleCellMemMapDataset
from stformer_hf.compat.scdl_batches import collate_neighbor_sparse_matrix_batch, collate_sparse_matrix_batch
from stformer_hf.compat.scdl_collection import SingleCellCollection


def write(folder: Path, name: str = "cells", **arguments) -> Path:
    """Write random cells with a graph of neighbours to a file."""
    adata = make_adata(**arguments)
    adata.obsp["next_cell_ids"] = graph(adata.n_obs)
    file = folder / f"{name}.h5ad"
    file.parent.mkdir(parents=True, exist_ok=True)
    adata.write_h5ad(file)
    return file


def graph(n_cells: int) -> sparse.csr_matrix:
    """Each cell but the first has the two behind it, in a ring; one weight is an explicit zero."""
    cells = np.repeat(np.arange(1, n_cells), 2)
    others = (cells + np.tile([1, 2], n_cells - 1)) % n_cells
    weights = np.arange(len(cells), dtype=np.float32)
    return sparse.csr_matrix((weights, (cells, others)), shape=(n_cells, n_cells))


def dense(data) -> np.ndarray:
    return np.array([data.get_row_padded(i)[0] for i in range(len(data))])


def rewrite_x(file: Path, x) -> None:
    AnnData(x, var=pd.DataFrame(index=[f"g{i}" for i in range(x.shape[1])])).write_h5ad(file)


@pytest.fixture
def file(tmp_path) -> Path:
    return write(tmp_path)


@pytest.fixture
def counts() -> np.ndarray:
    return make_adata().X.toarray()


@pytest.fixture
def data(file, tmp_path) -> SingleCellMemMapDataset:
    return SingleCellMemMapDataset(tmp_path / "data", file)


@pytest.fixture
def linked(file, tmp_path) -> SingleCellMemMapDataset:
    return SingleCellMemMapDataset(tmp_path / "linked", file, load_neighbors=True, seed=0)


# ---------------------------------------------------------------------- documented code


def test_the_documented_code_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    adata = make_adata()
    counts = adata.X.toarray()
    adata.obs["pseudotime"] = np.linspace(0, 1, adata.n_obs)

    def create_pseudotime_neighbors(pseudotime):
        return sparse.csr_matrix(np.diag(np.full(len(pseudotime) - 1, 0.5), 1))

    adata.obsp["next_cell_ids"] = create_pseudotime_neighbors(adata.obs["pseudotime"])
    os.mkdir("hdf5s")
    adata.write_h5ad("hdf5s/97e96fb1-8caf-4f08-9174-27308eabd4ea.h5ad")

    data = SingleCellMemMapDataset("97e_scmm", "hdf5s/97e96fb1-8caf-4f08-9174-27308eabd4ea.h5ad")
    assert data.number_of_rows() == len(data) == 60
    assert data.number_of_variables() == [40]
    assert data.number_of_values() == 2400
    assert data.number_nonzero_values() == np.count_nonzero(counts)

    data.save()
    reloaded_data = SingleCellMemMapDataset("97e_scmm")
    np.testing.assert_array_equal(dense(reloaded_data), counts)

    ds = SingleCellMemMapDataset("97e_scmm")
    index = 0
    values, feature_ids = ds.get_row(index, return_features=True, feature_vars=["feature_id"])
    assert len(feature_ids) == 1
    gene_data, col_idxs = np.array(values[0]), np.array(values[1])
    assert gene_data.tolist() == counts[0][counts[0] > 0].tolist()
    assert feature_ids[0][col_idxs].tolist() == adata.var_names[counts[0] > 0].tolist()

    seen = []
    dataloader = DataLoader(data, batch_size=8, shuffle=True, collate_fn=collate_sparse_matrix_batch)
    for _ in range(2):
        seen += [batch.sum().item() for batch in dataloader]
    assert sum(seen) == 2 * counts.sum()

    for index in range(len(data)):
        _, features = data.get_row(index, return_features=True, feature_vars=["feature_id", "symbol"])
        assert [len(feature) for feature in features] == [40, 40]

    data = SingleCellMemMapDataset(
        "dataset_path",
        "hdf5s/97e96fb1-8caf-4f08-9174-27308eabd4ea.h5ad",
        load_neighbors=True,
        neighbor_key="next_cell_ids",
        neighbor_sampling_strategy=NeighborSamplingStrategy.RANDOM,
        fallback_to_identity=True,
    )
    assert data.get_neighbor_indices_for_cell(7).tolist() == [8]
    assert data.get_neighbor_weights_for_cell(7).tolist() == [0.5]
    assert data.sample_neighbor_index(7) == 8
    for cell_index in range(len(data)):
        current_cell_data, _ = data.get_row(cell_index)
        neighbor_index = data.sample_neighbor_index(cell_index)
        neighbor_cell_data, _ = data.get_row(neighbor_index)
        assert current_cell_data[0].sum() == counts[cell_index].sum()
        assert neighbor_cell_data[0].sum() == counts[min(cell_index + 1, 59)].sum()


# ---------------------------------------------------------------------- rows


def test_rows_are_those_of_the_file(data, counts):
    for index in (0, 3, 59, -1, -60, np.int64(5), torch.tensor(6)):
        (values, columns), features = data.get_row(index)
        assert features is None
        assert values.dtype == np.float32 and columns.dtype == np.int32
        assert columns.tolist() == np.flatnonzero(counts[int(index)]).tolist()
        assert values.tolist() == counts[int(index)][columns].tolist()
        np.testing.assert_array_equal(data[index].numpy(), np.stack([values, columns]))
        padded, _ = data.get_row_padded(index)
        np.testing.assert_array_equal(padded, counts[int(index)])
        assert data[index].dtype == torch.float32 and padded.dtype == np.float32


def test_rows_and_columns_outside_raise(data):
    calls = [data.get_row, data.get_row_padded, data.get_neighbor_indices_for_cell, data.sample_neighbor_index]
    calls += [data.get_neighbor_weights_for_cell, data.get_row_with_neighbor, data.__getitem__]
    for call in [*calls, lambda index: data.get_row_column(index, 0)]:
        for index in (60, -61):
            with pytest.raises(IndexError, match=f"{index} is outside"):
                call(index)
        with pytest.raises(TypeError):
            call(0.5)
    for column in (40, -41):
        with pytest.raises(IndexError, match=f"{column} is outside the 40 variables"):
            data.get_row_column(0, column)


def test_single_values(data, counts):
    for column in (*range(40), -1):
        value = data.get_row_column(5, column)
        assert isinstance(value, float) and value == counts[5, column]
        assert data.get_row_column(5, column, impute_missing_zeros=False) == (value or None)


def test_rows_cannot_be_written_through(data, counts):
    for _ in range(2):
        (values, columns), features = data.get_row(0, return_features=True, feature_vars=["gene_id"])
        assert values.tolist() == counts[0][counts[0] > 0].tolist()
        values[:], columns[:] = 9, 9
        data[0].fill_(9)
        data.__getitems__([0, 1])[0].fill_(9)
        genes, cells = data.features(), data.obs_features()
        genes["gene_id"], cells["age"] = "x", 0
        with pytest.raises(ValueError, match="read-only"):
            features[0][0] = "x"
    data.store.verify()


def test_counters(data, counts):
    assert data.shape() == (60, [40])
    assert data.sparsity() == pytest.approx((counts == 0).mean())
    assert data.version() == data.store.manifest["written_by"]
    assert repr(data).endswith("data': 60 rows, 40 variables)")


def test_gene_and_cell_tables(file, tmp_path):
    adata = make_adata()
    adata.var["length"] = np.arange(40) * 10
    adata.write_h5ad(file)
    data = SingleCellMemMapDataset(tmp_path / "data", file)
    for table in (data.features(), data.var_features()):
        assert table["gene_id"].tolist() == adata.var_names.tolist()
        assert table["length"].tolist() == adata.var["length"].tolist()
    assert data.obs_features().index.tolist() == adata.obs_names.tolist()
    assert data.obs_features()["cell_type"].tolist() == adata.obs["cell_type"].tolist()
    _, (lengths, names) = data.get_row(4, return_features=True, feature_vars=["length", "gene_id"])
    assert lengths.tolist() == adata.var["length"].tolist() and names.tolist() == adata.var_names.tolist()
    _, (lengths,) = data.get_row_padded(4, return_features=True)  # the columns of var, as SCDL
    assert lengths.tolist() == adata.var["length"].tolist()
    with pytest.raises(ValueError, match="No gene variable 'biotype'; variables are .*gene_id, symbol, length"):
        data.get_row(4, return_features=True, feature_vars=["gene_id", "biotype"])


values = st.sampled_from([0, 0, 0, 0, 1, 2, 255, 256, 65_536]) | st.sampled_from([0, 0.25, 1.5])


@given(
    matrix=hnp.arrays(np.float64, st.tuples(st.integers(1, 7), st.integers(1, 7)), elements=values),
    form=st.sampled_from([sparse.csr_matrix, sparse.csc_matrix, np.array]),
    data=st.data(),
)
def test_any_matrix_comes_back(matrix, form, data):
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "x.h5ad")
        rewrite_x(file, form(matrix))
        cells = SingleCellMemMapDataset(Path(folder, "d"), file, load_block_row_size=3)
        np.testing.assert_array_equal(dense(cells), matrix)
        assert cells.number_nonzero_values() == np.count_nonzero(matrix)
        index = data.draw(st.lists(st.integers(-len(matrix), len(matrix) - 1), min_size=1, max_size=5))
        batch = collate_sparse_matrix_batch(cells.__getitems__(index)).to_dense().numpy()
        columns = np.flatnonzero(matrix[index].any(0))
        assert batch.shape == (len(index), columns.max() + 1 if len(columns) else 0)
        np.testing.assert_array_equal(batch, matrix[index][:, : batch.shape[1]])


@pytest.mark.parametrize("form", [sparse.csr_matrix, sparse.csc_matrix, np.array])
@pytest.mark.parametrize("largest", [0, 1])
def test_square_and_empty_matrices(tmp_path, form, largest):
    matrix = np.triu(np.arange(49.0).reshape(7, 7)) * largest
    rewrite_x(tmp_path / "x.h5ad", form(matrix))
    data = SingleCellMemMapDataset(tmp_path / "d", tmp_path / "x.h5ad")
    np.testing.assert_array_equal(dense(data), matrix)
    assert data.sparsity() == pytest.approx((matrix == 0).mean())


@pytest.mark.parametrize("bad", [-1.0, np.nan, np.inf])
def test_values_that_are_no_counts_raise_and_the_conversion_can_be_tried_again(tmp_path, bad):
    file, matrix = tmp_path / "x.h5ad", np.eye(4)
    matrix[2, 1] = bad
    rewrite_x(file, sparse.csr_matrix(matrix))
    with pytest.raises(ValueError, match="x.h5ad: counts are needed, but X holds"):
        SingleCellMemMapDataset(tmp_path / "d", file)
    with pytest.raises(FileNotFoundError, match="no dataset at .*conversion was stopped"):
        SingleCellMemMapDataset(tmp_path / "d")
    rewrite_x(file, sparse.csr_matrix(np.eye(4)))
    np.testing.assert_array_equal(dense(SingleCellMemMapDataset(tmp_path / "d", file)), np.eye(4))


def test_paths_that_do_not_fit_raise(data, file, tmp_path, counts):
    with pytest.raises(FileExistsError, match="Open it without h5ad_path"):
        SingleCellMemMapDataset(data.data_path, file)
    with pytest.raises(FileNotFoundError, match="No such file: .*nothing.h5ad"):
        SingleCellMemMapDataset(tmp_path / "new", tmp_path / "nothing.h5ad")
    with pytest.raises(FileNotFoundError, match="There is no dataset at"):
        SingleCellMemMapDataset(tmp_path / "new")
    with pytest.raises(ValueError, match="for a folder of files use SingleCellCollection"):
        SingleCellMemMapDataset(tmp_path / "new", tmp_path)
    with pytest.raises(ValueError, match="load_block_row_size=0"):
        SingleCellMemMapDataset(tmp_path / "new", file, load_block_row_size=0)
    assert not (tmp_path / "new").exists()
    np.testing.assert_array_equal(dense(data), counts)


def test_damaged_files_are_found(data, file, tmp_path):
    (tmp_path / "cut.h5ad").write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(ValueError, match="truncated"):
        SingleCellMemMapDataset(tmp_path / "new", tmp_path / "cut.h5ad")
    shard = data.data_path / data.store.manifest["shards"][0]["file"]
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    with pytest.raises(ValueError, match="is damaged"):
        SingleCellMemMapDataset(data.data_path).store.verify()
    shard.write_bytes(content[:-8])
    with pytest.raises(ValueError, match="truncated"):
        SingleCellMemMapDataset(data.data_path)


def test_raw_is_preferred_and_that_can_be_reversed(tmp_path):
    adata = make_adata(20, 10)
    raw = adata.X.toarray()
    adata.raw = adata
    adata = adata[:, :6].copy()
    adata.X = sparse.csr_matrix(np.log1p(adata.X.toarray()))
    adata.write_h5ad(tmp_path / "x.h5ad")
    np.testing.assert_array_equal(dense(SingleCellMemMapDataset(tmp_path / "raw", tmp_path / "x.h5ad")), raw)
    data = SingleCellMemMapDataset(tmp_path / "x", tmp_path / "x.h5ad", use_X_not_raw=True)
    np.testing.assert_array_equal(dense(data), adata.X.toarray())
    del adata.raw
    adata.write_h5ad(tmp_path / "x.h5ad")
    data = SingleCellMemMapDataset(tmp_path / "only_x", tmp_path / "x.h5ad")
    np.testing.assert_array_equal(dense(data), adata.X.toarray())


@pytest.mark.parametrize("dtype", ["uint8", "int16", "uint32", "int64", "float16", "float64", np.float32])
def test_rows_come_in_the_type_asked_for(file, tmp_path, counts, dtype):
    SingleCellMemMapDataset(tmp_path / "d", file, data_dtype=dtype)
    data = SingleCellMemMapDataset(tmp_path / "d", data_dtype=dtype)
    assert data.get_row(0)[0][0].dtype == data.get_row_padded(0)[0].dtype == np.dtype(dtype)
    np.testing.assert_array_equal(dense(data), counts)
    assert data[0].dtype == torch.float32


@pytest.mark.parametrize(
    ("value", "dtype", "other"),
    [(300, "uint8", "uint16"), (200, "int8", "uint8"), (0.1, "int32", "float32"), (0.1, "float16", "float32")]
    + [(2**24 + 1, None, "uint32"), (2049, "float16", "uint16")],
)
def test_values_that_do_not_fit_the_type_raise(tmp_path, value, dtype, other):
    file, matrix = tmp_path / "x.h5ad", np.eye(3)
    matrix[2, 1] = value
    rewrite_x(file, sparse.csr_matrix(matrix))
    message = f"The value {str(value)[:4]}.* does not fit {dtype or 'float32'} exactly. Use data_dtype='{other}'"
    with pytest.raises(ValueError, match=f"x.h5ad: {message}"):
        SingleCellMemMapDataset(tmp_path / "d", file, data_dtype=dtype)
    assert not (tmp_path / "d").exists()
    data = SingleCellMemMapDataset(tmp_path / "d", file, data_dtype=other)
    np.testing.assert_array_equal(dense(data), matrix.astype(other))
    with pytest.raises(ValueError, match=message):  # also where a dataset is there already
        SingleCellMemMapDataset(tmp_path / "d", data_dtype=dtype).get_row(2)


@pytest.mark.parametrize("dtype", ["counts", "object", "complex64", "str", "bool"])
def test_types_that_are_none_of_numbers_raise(file, tmp_path, dtype):
    with pytest.raises(ValueError, match=f"data_dtype={dtype!r}: use a numeric type"):
        SingleCellMemMapDataset(tmp_path / "d", file, data_dtype=dtype)


def test_a_copy_is_saved_and_what_is_there_is_kept(linked, tmp_path):
    linked.save(tmp_path / "copy")
    copy = SingleCellMemMapDataset(tmp_path / "copy", load_neighbors=True)
    np.testing.assert_array_equal(dense(copy), dense(linked))
    assert (copy.store.neighbors(slice(None)) != linked.store.neighbors(slice(None))).nnz == 0
    with pytest.raises(FileExistsError, match="copy exists. Choose another path"):
        linked.save(tmp_path / "copy")
    copy.load(linked.data_path)
    assert copy.data_path == linked.data_path


def test_it_is_valid_on_disk_without_save(file, tmp_path, counts):
    unsaved = SingleCellMemMapDataset(tmp_path / "d", file)
    data = SingleCellMemMapDataset(unsaved.data_path)
    data.store.verify()
    np.testing.assert_array_equal(dense(data), counts)
    assert [path.name for path in tmp_path.iterdir()] == ["cells.h5ad", "d"]  # nothing is to be finished


def test_pickle_takes_the_path_only(data, counts):
    pickled = pickle.dumps(data)
    assert len(pickled) < 5_000
    data.get_row(0, return_features=True)
    data.obs_features()
    assert len(pickle.dumps(data)) == len(pickled)
    np.testing.assert_array_equal(dense(pickle.loads(pickled)), counts)


@pytest.mark.parametrize("n_workers", [0, 2])
def test_batches_of_a_data_loader(data, counts, n_workers):
    loader = DataLoader(data, batch_size=16, collate_fn=collate_sparse_matrix_batch, num_workers=n_workers)
    batches = [batch.to_dense().numpy() for batch in loader]
    assert [len(batch) for batch in batches] == [16, 16, 16, 12]
    batches = [np.pad(batch, [(0, 0), (0, 40 - batch.shape[1])]) for batch in batches]
    np.testing.assert_array_equal(np.concatenate(batches), counts)


def test_batches_of_one_need_no_collate_function(data, counts):
    for row, batch in zip(counts, DataLoader(data, batch_size=1), strict=True):
        np.testing.assert_array_equal(batch[0, 0].numpy(), row[row > 0])
        assert batch.shape == (1, 2, np.count_nonzero(row))


# ---------------------------------------------------------------------- neighbours


def test_neighbors_are_those_of_the_file(linked):
    expected = graph(60)
    assert linked.get_neighbor_indices_for_cell(0).tolist() == []
    for cell in (1, 30, -1):
        indices, weights = linked.get_neighbor_indices_for_cell(cell), linked.get_neighbor_weights_for_cell(cell)
        order = np.argsort(expected[cell].indices)
        assert indices.tolist() == expected[cell].indices[order].tolist() and len(indices) == 2
        assert weights.tolist() == expected[cell].data[order].tolist() and weights.dtype == np.float32
    assert 0 in linked.get_neighbor_weights_for_cell(1)  # a weight of zero is a neighbour's too
    assert linked.get_neighbor_stats() == {
        "has_neighbors": True,
        "total_connections": 118,
        "min_neighbors_per_cell": 0,
        "max_neighbors_per_cell": 2,
        "avg_neighbors_per_cell": 118 / 60,
        "cells_with_no_neighbors": 1,
    }


def test_sampling_follows_the_strategy(file, linked, tmp_path):
    drawn = [linked.sample_neighbor_index(-1) for _ in range(40)]
    assert set(drawn) == {0, 1} and type(drawn[0]) is int
    again = SingleCellMemMapDataset(linked.data_path, load_neighbors=True, seed=0)
    assert [again.sample_neighbor_index(59) for _ in range(40)] == drawn
    assert again.sample_neighbor_index(0) == 0
    options = {"neighbor_sampling_strategy": "first", "fallback_to_identity": False}
    first = SingleCellMemMapDataset(linked.data_path, load_neighbors=True, **options)
    assert {first.sample_neighbor_index(30) for _ in range(10)} == {31}
    with pytest.raises(ValueError, match="Cell 0 has no neighbours"):
        first.sample_neighbor_index(0)
    with pytest.raises(ValueError, match="neighbor_sampling_strategy='last': use one of 'random', 'first'"):
        SingleCellMemMapDataset(linked.data_path, neighbor_sampling_strategy="last")


class Drawn(Dataset):
    """Neighbours that are drawn of one cell."""

    def __init__(self, data, cell):
        self.data, self.cell = data, cell

    def __len__(self):
        return 64

    def __getitem__(self, index):
        return torch.utils.data.get_worker_info().id, self.data.sample_neighbor_index(self.cell)


@pytest.mark.parametrize("seed", [None, 3])
def test_workers_and_epochs_draw_different_neighbors(tmp_path, seed):
    adata = with_genes(AnnData(np.ones((200, 1), np.float32)))
    adata.obsp["next_cell_ids"] = sparse.csr_matrix(np.ones((200, 200)))
    adata.write_h5ad(tmp_path / "x.h5ad")
    data = SingleCellMemMapDataset(tmp_path / "d", tmp_path / "x.h5ad", load_neighbors=True, seed=seed)
    data.sample_neighbor_index(0)  # a generator that workers must not go on with
    loader = DataLoader(Drawn(data, 0), batch_size=None, num_workers=2, multiprocessing_context="fork")

    def epoch():
        drawn = list(loader)
        return [tuple(neighbor for worker, neighbor in drawn if worker == wanted) for wanted in (0, 1)]

    torch.manual_seed(0)
    streams = epoch() + epoch()
    assert len(set(streams)) == 4
    torch.manual_seed(0)
    assert epoch() + epoch() == streams  # and the same ones in the next run


def test_rows_with_neighbors(linked, counts):
    linked.neighbor_sampling_strategy = NeighborSamplingStrategy.FIRST
    cells = linked.get_row_with_neighbor(-30, return_features=True, feature_vars=["symbol"])
    assert (cells["current_cell_index"], cells["next_cell_index"]) == (30, 31)
    assert len(cells["features"]) == 1
    for name, row in (("current_cell", 30), ("next_cell", 31)):
        found, columns = cells[name]
        assert columns.tolist() == np.flatnonzero(counts[row]).tolist()
        assert found.tolist() == counts[row][columns].tolist()
    padded = linked.get_row_padded_with_neighbor(30)
    np.testing.assert_array_equal(padded["current_cell"], counts[30])
    np.testing.assert_array_equal(padded["next_cell"], counts[31])
    assert padded["next_cell_index"] == 31 and padded["features"] is None


def test_neighbors_that_are_not_loaded_or_not_there(file, data, linked, tmp_path):
    for without in (data, SingleCellMemMapDataset(linked.data_path)):
        assert without.get_neighbor_indices_for_cell(1).tolist() == []
        assert without.get_neighbor_weights_for_cell(1).tolist() == []
        assert without.sample_neighbor_index(-1) == 59
        assert without.get_neighbor_stats() == {"has_neighbors": False}
        for read in (without.get_row_with_neighbor, without.get_row_padded_with_neighbor):
            with pytest.raises(ValueError, match="load_neighbors=True"):
                read(1)
    absent = SingleCellMemMapDataset(data.data_path, load_neighbors=True)
    assert absent.get_neighbor_stats() == {"has_neighbors": False}
    for read in (absent.get_neighbor_indices_for_cell, absent.get_row_with_neighbor, absent.sample_neighbor_index):
        with pytest.raises(ValueError, match="built without neighbours"):
            read(1)
    with pytest.raises(ValueError, match="has no obsp.'other'"):
        SingleCellMemMapDataset(tmp_path / "d", file, load_neighbors=True, neighbor_key="other")


# ---------------------------------------------------------------------- together


def united(parts: list[AnnData], gene_ids) -> np.ndarray:
    return pd.concat([part.to_df() for part in parts]).fillna(0)[list(gene_ids)].to_numpy()


@pytest.fixture
def parts() -> list[AnnData]:
    """Cells with genes in another order, and with others."""
    parts = [make_adata(10, 6, seed=1), make_adata(8, 6, seed=2), make_adata(7, 5, seed=3)]
    parts[1] = parts[1][:, ::-1].copy()
    parts[2].var_names = ["other", *parts[2].var_names[1:]]
    for i, part in enumerate(parts):
        part.obs_names = [f"{i}-{name}" for name in part.obs_names]
        part.obsp["next_cell_ids"] = graph(part.n_obs)
    return parts


@pytest.fixture
def datasets(parts, tmp_path) -> list[SingleCellMemMapDataset]:
    for i, part in enumerate(parts):
        part.write_h5ad(tmp_path / f"{i}.h5ad")
    return [
        SingleCellMemMapDataset(tmp_path / f"part{i}", tmp_path / f"{i}.h5ad", load_neighbors=True) for i in range(3)
    ]


@pytest.mark.parametrize("in_place", [True, False])
def test_concat_aligns_genes_and_keeps_neighbors(datasets, parts, tmp_path, in_place):
    first = datasets[0]
    first.get_row(0, return_features=True)
    first.concat(datasets[1:], output_path=None if in_place else tmp_path / "all")
    assert first.data_path == (tmp_path / "part0" if in_place else tmp_path / "all")
    for data in (first, SingleCellMemMapDataset(first.data_path, load_neighbors=True)):
        np.testing.assert_array_equal(dense(data), united(parts, data.store.gene_ids))
        assert data.shape() == (25, [7])
        assert data.number_nonzero_values() == sum(part.X.nnz for part in parts)
        expected = sparse.block_diag([part.obsp["next_cell_ids"] + 0 for part in parts]).toarray()
        np.testing.assert_array_equal(data.store.neighbors(slice(None)).toarray(), expected)
        assert data.get_neighbor_stats()["total_connections"] == sum(2 * (part.n_obs - 1) for part in parts)
        assert data.get_neighbor_indices_for_cell(10).tolist() == []
        assert data.get_neighbor_indices_for_cell(11).tolist() == [12, 13]
        names = data.get_row(24, return_features=True, feature_vars=["feature_id"])[1][0]
        assert names.tolist() == data.store.gene_ids.tolist()
        for name in ("age", "cell_type"):
            assert data.obs_features()[name].tolist() == [value for part in parts for value in part.obs[name]]
    if not in_place:
        np.testing.assert_array_equal(dense(SingleCellMemMapDataset(tmp_path / "part0")), parts[0].X.toarray())
    np.testing.assert_array_equal(dense(datasets[1]), parts[1].X.toarray())


def test_concat_with_itself_and_with_nothing(datasets, parts):
    data = datasets[0]
    data.concat([])
    assert len(data) == 10
    data.concat(data)
    np.testing.assert_array_equal(dense(data), np.tile(parts[0].X.toarray(), (2, 1)))
    assert data.get_neighbor_indices_for_cell(11).tolist() == [12, 13]


def test_concat_of_what_does_not_fit_changes_nothing(data, linked, tmp_path, counts):
    with pytest.raises(ValueError, match="linked has neighbours but .*data has none"):
        data.concat(linked)
    with pytest.raises(ValueError, match="has neighbours but"):
        linked.concat(data, output_path=tmp_path / "all")
    with pytest.raises(ValueError, match="SingleCellMemMapDataset, got PosixPath"):
        data.concat(linked.data_path)
    with pytest.raises(FileExistsError, match="linked exists"):
        data.concat(data, output_path=linked.data_path)
    rewrite_x(tmp_path / "x.h5ad", np.full((2, 3), 300.0))
    other = SingleCellMemMapDataset(tmp_path / "other", tmp_path / "x.h5ad")
    with pytest.raises(ValueError, match="other lacks obs columns that .*data has .cell_type, age."):
        data.concat(other)
    with pytest.raises(ValueError, match="300 does not fit uint8"):
        SingleCellMemMapDataset(data.data_path, data_dtype="uint8").concat(other, output_path=tmp_path / "all")
    np.testing.assert_array_equal(dense(SingleCellMemMapDataset(data.data_path)), counts)
    data.concat(other, output_path=tmp_path / "all")
    assert data.shape() == (62, [43])
    assert data.obs_features()["age"].isna().sum() == 2


# ---------------------------------------------------------------------- collections


@pytest.fixture
def folder(parts, tmp_path) -> Path:
    """Two files of one name, and one in a folder of its own; a hidden file that is none."""
    for part, name in zip(parts, ["b/cells", "c/cells", "a/deep/er"], strict=True):
        (tmp_path / "h5ads" / name).parent.mkdir(parents=True)
        part.write_h5ad(tmp_path / "h5ads" / f"{name}.h5ad")
    (tmp_path / "h5ads" / "._cells.h5ad").write_bytes(b"resource fork")
    return tmp_path / "h5ads"


@pytest.mark.parametrize(
    "options", [{}, pytest.param({"max_workers": 1, "use_processes": True}, marks=pytest.mark.slow)]
)
def test_a_collection_of_a_folder(folder, parts, tmp_path, options):
    collection = SingleCellCollection(tmp_path / "collection")
    assert collection.shape() == (0, [0])
    collection.load_h5ad_multi(folder, load_neighbors=True, **options)
    parts = [parts[2], parts[0], parts[1]]
    assert [len(data) for data in collection.datasets.values()] == [7, 10, 8]  # from a process, where they are pickled
    assert len({data.data_path for data in collection.datasets.values()}) == 3
    assert collection.shape() == (25, [5, 6, 6])
    assert collection.number_of_values() == 7 * 5 + 10 * 6 + 8 * 6
    assert collection.number_nonzero_values() == sum(part.X.nnz for part in parts)
    assert collection.version() == next(iter(collection.datasets.values())).version()
    collection.flatten(tmp_path / "all")
    data = SingleCellMemMapDataset(tmp_path / "all", load_neighbors=True)
    np.testing.assert_array_equal(dense(data), united(parts, data.store.gene_ids))
    assert data.obs_features().index.tolist() == [name for part in parts for name in part.obs_names]
    assert data.get_neighbor_indices_for_cell(8).tolist() == [9, 10]
    with pytest.raises(FileExistsError, match="all exists"):
        collection.flatten(tmp_path / "all", destroy_on_copy=True)
    assert collection.number_of_rows() == 25
    (tmp_path / "collection" / "notes.txt").write_text("mine")
    collection.flatten(tmp_path / "again", destroy_on_copy=True)
    assert collection.number_of_rows() == 0
    assert sorted(path.name for path in (tmp_path / "collection").iterdir()) == ["collection.json", "notes.txt"]


def test_a_collection_counts_blocks_of_rows_with_the_same_genes(tmp_path):
    (tmp_path / "collection" / "a").mkdir(parents=True)  # someone else's
    collection = SingleCellCollection(tmp_path / "collection")
    for name, n_genes in (("y/d", 6), ("c", 5), ("y/e", 6), ("b", 6), ("a", 6)):
        file = write(tmp_path / "h5ads", name, n_cells=9, n_genes=n_genes)
        if name[0] != "y":
            collection.load_h5ad(file)
    collection.load_h5ad_multi(tmp_path / "h5ads" / "y")
    assert collection.shape() == (45, [6, 5, 6])
    assert not any((tmp_path / "collection" / "a").iterdir())


def test_a_file_that_fails_is_named_and_the_others_are_not_converted_again(folder, tmp_path, monkeypatch):
    bad = folder / "b" / "cells.h5ad"
    good = bad.read_bytes()
    bad.write_bytes(good[:1000])
    collection = SingleCellCollection(tmp_path / "collection")
    with pytest.raises(RuntimeError, match="b/cells.h5ad could not be converted: .*truncated") as raised:
        collection.load_h5ad_multi(folder, max_workers=1)
    assert isinstance(raised.value.__cause__, ValueError)
    assert collection.number_of_rows() == 0
    bad.write_bytes(good)
    built, build = [], CellStore.build
    monkeypatch.setattr(
        CellStore, "build", lambda path, *args, **rest: built.append(path) or build(path, *args, **rest)
    )
    collection = SingleCellCollection(tmp_path / "collection")
    collection.load_h5ad_multi(folder)
    assert collection.number_of_rows() == 25
    assert {path.name for path in built} - {"cells-1"} == {"cells"}  # the third may have been reached before
    built.clear()
    collection.load_h5ad_multi(folder)
    assert built == []
    write(folder / "b", n_cells=30)  # a file that changed
    collection.load_h5ad_multi(folder)
    assert collection.number_of_rows() == 45 and len(built) == 1
    collection.load_h5ad_multi(folder, data_dtype="uint16")  # other options
    assert len(built) == 4
    assert {data.data_dtype for data in collection.datasets.values()} == {np.dtype("uint16")}


def test_collections_of_nothing_raise(tmp_path):
    collection = SingleCellCollection(tmp_path / "collection")
    with pytest.raises(FileNotFoundError, match="no h5ad files in .*nowhere"):
        collection.load_h5ad_multi(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="is empty: load files first"):
        collection.flatten(tmp_path / "all")
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------- batches


def test_rows_become_a_sparse_matrix():
    rows = [torch.tensor([[1, 2, 3], [2, 3, 5]]), torch.tensor([[4, 5, 6, 7], [1, 2, 5, 6]])]
    batch = collate_sparse_matrix_batch(rows)
    assert batch.layout == torch.sparse_csr
    assert batch.to_dense().tolist() == [[0, 0, 1, 2, 0, 3, 0], [0, 4, 5, 0, 0, 6, 7]]
    empty = torch.empty(2, 0)
    assert collate_sparse_matrix_batch([empty, rows[0], empty]).to_dense().tolist() == [
        [0] * 6,
        [0, 0, 1, 2, 0, 3],
        [0] * 6,
    ]
    assert collate_sparse_matrix_batch([empty, empty]).to_dense().shape == (2, 0)


def test_the_last_columns_that_float32_holds_are_exact():
    batch = collate_sparse_matrix_batch([torch.tensor([[1.0, 1.0], [2**24 - 1, 2**24]])])
    assert batch.col_indices().tolist() == [2**24 - 1, 2**24]
    assert batch.shape == (1, 2**24 + 1)


def test_cells_and_neighbors_become_sparse_matrices_of_the_same_columns(linked, counts):
    linked.neighbor_sampling_strategy = NeighborSamplingStrategy.FIRST
    rows = [30, 2, 0]  # whose neighbours are 31; 3, a cell without counts; itself
    batch = collate_neighbor_sparse_matrix_batch([linked.get_row_with_neighbor(row) for row in rows])
    assert batch["current_cell_indices"] == rows and batch["next_cell_indices"] == [31, 3, 0]
    assert batch["batch_size"] == 3
    assert batch["current_cells"].shape == batch["next_cells"].shape
    for name, cells in (("current_cells", rows), ("next_cells", [31, 3, 0])):
        assert batch[name].layout == torch.sparse_csr and batch[name].dtype == torch.float32
        n_columns = batch[name].shape[1]
        np.testing.assert_array_equal(batch[name].to_dense().numpy(), counts[cells][:, :n_columns])
        assert not counts[cells][:, n_columns:].any()
    nothing = {"current_cell": ([], []), "next_cell": ([], []), "current_cell_index": 0, "next_cell_index": 1}
    assert collate_neighbor_sparse_matrix_batch([nothing])["next_cells"].shape == (1, 0)


# ---------------------------------------------------------------------- the interface of 0.1.3


def test_calls_of_013_get_three_results(file, tmp_path, counts):
    old = SingleCellMemMapDataset(tmp_path / "data", file)
    new = SingleCellMemMapDataset(tmp_path / "data", use_X_not_raw=True)
    assert (old.interface, new.interface) == ("0.1.2", "0.1.3")
    assert SingleCellMemMapDataset(tmp_path / "data", interface="0.1.3").interface == "0.1.3"
    assert len(old.get_row(0)) == len(old.get_row_padded(0, True)) == 2
    assert len(new.get_row(0)) == len(new.get_row_padded(0, True)) == 3
    obs = old.obs_features()
    for data in (old, new):
        (_, columns), genes, cell = data.get_row(
            5,
            return_var_features=True,
            var_feature_names=["feature_id"],
            return_obs_features=True,
            obs_feature_names=["cell_type", "obs_feature_id"],
        )
        assert columns.tolist() == np.flatnonzero(counts[5]).tolist()
        assert genes[0].tolist() == data.features()["gene_id"].tolist()
        assert cell == [obs["cell_type"].iloc[5], obs.index[5]]
        row, genes, cell = data.get_row_padded(-1, return_obs_features=True)
        assert row.tolist() == counts[-1].tolist() and genes is None and len(cell) == obs.shape[1]
        assert data.get_row_column(5, columns[0]) == counts[5, columns[0]]
        with pytest.raises(ValueError, match="No cell variable 'weight'"):
            data.get_row(0, return_obs_features=True, obs_feature_names=["weight"])
    with pytest.raises(ValueError, match='interface must be "0.1.2" or "0.1.3"'):
        SingleCellMemMapDataset(tmp_path / "data", interface="1")


def test_neighbours_come_with_features_of_the_cell(linked):
    cells = linked.get_row_with_neighbor(3, return_var_features=True, return_obs_features=True)
    assert cells["features"] is cells["var_features"]
    assert cells["obs_features"] == linked.obs_features().iloc[3].tolist()
    assert linked.get_row_padded_with_neighbor(3)["obs_features"] is None


def test_types_are_cast_within_a_tolerance(tmp_path):
    rewrite_x(tmp_path / "x.h5ad", np.array([[1.0, 2.25, 300.0]], np.float32))
    data = SingleCellMemMapDataset(tmp_path / "x", tmp_path / "x.h5ad", use_X_not_raw=True)
    for dtype, value in (("uint16", 2.25), ("uint8", 2.25)):
        with pytest.raises(ValueError, match=f"{value} does not fit {dtype}"):
            data.cast_data_to_dtype(dtype)
    assert data.get_row(0)[0][0].dtype == np.float32
    data.data_dtype_tolerance = 0.3
    data.cast_data_to_dtype("uint16")
    assert data.get_row(0)[0][0].tolist() == [1, 2, 300] and data.get_row(0)[0][0].dtype == np.uint16
    with pytest.raises(ValueError, match="300.0 does not fit uint8"):
        data.cast_data_to_dtype("uint8")
    wide = SingleCellMemMapDataset(tmp_path / "y", tmp_path / "x.h5ad", data_dtype="uint16", data_dtype_tolerance=0.25)
    assert wide.get_row(0)[0][0].tolist() == [1, 2, 300]


def test_raw_is_never_taken_in_place_of_x(tmp_path):
    adata = AnnData(np.ones((3, 2), np.float32), var=pd.DataFrame(index=["g0", "g1"]))
    adata.raw = adata
    del adata.X
    adata.write_h5ad(tmp_path / "raw.h5ad")
    with pytest.raises(ValueError, match="no X, only raw"):
        SingleCellMemMapDataset(tmp_path / "a", tmp_path / "raw.h5ad", use_X_not_raw=True)
    assert len(SingleCellMemMapDataset(tmp_path / "a", tmp_path / "raw.h5ad")) == 3


def test_sparsity_of_a_collection_is_that_of_its_values(tmp_path):
    collection = SingleCellCollection(tmp_path / "c")
    assert collection.sparsity() == 0
    dense_values = [make_adata(seed=seed, n_cells=20 * seed).X.toarray() for seed in (1, 2)]
    for seed in (1, 2):
        collection.load_h5ad(write(tmp_path, f"f{seed}", seed=seed, n_cells=20 * seed), use_X_not_raw=True)
    n_zeros = sum((values == 0).sum() for values in dense_values)
    assert collection.sparsity() == pytest.approx(n_zeros / sum(values.size for values in dense_values))


def test_concat_removes_what_it_copied_where_asked(file, tmp_path):
    for out in (None, tmp_path / "out"):
        first, second = (SingleCellMemMapDataset(tmp_path / f"{name}{out is None}", file) for name in "ab")
        paths = [data.data_path for data in (first, second)]
        first.concat(second, output_path=out, extend_copy_size=1024, destroy_on_copy=True)
        assert len(first) == 120 and [path.exists() for path in paths] == [out is None, False]


@pytest.mark.parametrize("kinds", [("unique", "unique"), ("unique", "repeated"), ("repeated", "unique")])
def test_strings_of_a_second_lane_are_added(tmp_path, kinds):
    """Strings that are unique in one lane are no labels; those of another lane are added behind them."""
    files, expected = [], []
    for lane, kind in enumerate(kinds):
        barcodes = [f"{base}{lane}" for base in "ACGT"] if kind == "unique" else [f"A{lane}"] * 4
        obs = pd.DataFrame({"barcode": barcodes}, index=[f"{lane}_{i}" for i in range(4)])
        files.append(tmp_path / f"{lane}.h5ad")
        AnnData(np.full((4, 2), lane + 1.0, np.float32), obs, pd.DataFrame(index=["g0", "g1"])).write_h5ad(files[-1])
        expected += barcodes
    for out in (None, tmp_path / "out"):
        first, second = (
            SingleCellMemMapDataset(tmp_path / f"{i}{out is None}", files[i], use_X_not_raw=True) for i in range(2)
        )
        first.concat(second, output_path=out)
        assert first.obs_features()["barcode"].astype(str).tolist() == expected
    store = CellStore.build(tmp_path / "s", files[0], obs="all", report=False)
    store.append(files[1])
    assert store.obs["barcode"].astype(str).tolist() == expected
