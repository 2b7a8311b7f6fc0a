"""Experiments of TileDB-SOMA: any cells and genes of any query are those that tiledbsoma itself returns."""

import gc
import pickle
import shutil
import subprocess
import sys

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from anndata import AnnData, read_h5ad
from conftest import make_adata
from hypothesis import given
from hypothesis import strategies as st
from scipy import sparse

import stformer_hf
from stformer_hf import CellStore
from stformer_hf.sources.open_source import open_source
from stformer_hf.sources.read_anndata import read_anndata
from stformer_hf.sources.soma import SomaPlace, soma_key
from stformer_hf.store import writer

N_CELLS, N_GENES = 60, 25


@pytest.fixture(scope="module")
def soma():
    return pytest.importorskip("tiledbsoma", reason="experiments need the extra soma")


@pytest.fixture(scope="module")
def path(soma, tmp_path_factory):
    """Write an experiment of two measurements as tiledbsoma.io does, and add a second matrix."""
    import tiledbsoma.io

    rng = np.random.default_rng(0)
    counts = sparse.csr_matrix(rng.poisson(0.4, (N_CELLS, N_GENES)).astype(np.float32))
    names = [f"c{i}" for i in rng.permutation(N_CELLS)]
    obs = pd.DataFrame(
        {"cell_type": pd.Categorical(rng.choice(["B", "T", "NK"], N_CELLS)), "n": range(N_CELLS)}, names
    )
    var = pd.DataFrame({"feature_name": [f"g{i}" for i in range(N_GENES)]}, [f"ENSG{i:011d}" for i in range(N_GENES)])
    adata = AnnData(np.log1p(counts), obs=obs, var=var)
    adata.obsp["connectivities"] = sparse.random(N_CELLS, N_CELLS, 0.1, "csr", rng=rng)
    path = str(tmp_path_factory.mktemp("soma") / "experiment")
    tiledbsoma.io.from_anndata(path, adata, measurement_name="RNA")
    with soma.Experiment.open(path, "w") as experiment:
        tiledbsoma.io.add_X_layer(experiment, "RNA", "raw", counts)
        proteins = experiment.ms.add_new_collection("ADT", soma.Measurement)
        names = pa.table(
            {"soma_joinid": pa.array([0, 1], pa.int64()), "var_id": pa.array(["CD3", "CD19"], pa.large_string())}
        )
        proteins.add_new_dataframe(
            "var", schema=names.schema, index_column_names=["soma_joinid"], domain=[[0, 1]]
        ).write(names)
        entries = counts[:, :2].tocoo()
        proteins.add_new_collection("X", soma.Collection).add_new_sparse_ndarray(
            "data", type=pa.float32(), shape=(N_CELLS, 2)
        ).write(
            pa.table(
                {
                    "soma_dim_0": entries.row.astype(np.int64),
                    "soma_dim_1": entries.col.astype(np.int64),
                    "soma_data": entries.data,
                }
            )
        )
    return path


def read(source, rows: int = 7) -> np.ndarray:
    return np.concatenate([np.zeros((0, source.shape[1])), *(block.toarray() for block in source.blocks(rows))])


def test_an_experiment_is_read_by_path_and_as_an_object(path, soma, tmp_path):
    with soma.Experiment.open(path) as experiment:
        expected = experiment.axis_query("RNA").to_anndata("raw")
        stores = [
            CellStore.build(tmp_path / f"{i}", source, obs="all", workers=workers)
            for i, (source, workers) in enumerate([(path, 1), (experiment, 1), (experiment, 2)])
        ]
        assert open_source(path).key["path"] == path
    for store in stores:
        np.testing.assert_array_equal(store.rows(slice(None)).toarray(), expected.X.toarray())
        assert store.obs_names.tolist() == expected.obs_names.tolist()
        assert store.obs["cell_type"].tolist() == expected.obs["cell_type"].tolist()
        assert store.gene_ids.tolist() == expected.var_names.tolist()
        assert store.genes.symbols.tolist() == expected.var["feature_name"].tolist()
        assert store.obs.columns.tolist() == ["cell_type", "n"]


def test_layers_and_measurements_are_chosen_by_name(path, soma):
    """Counts are found behind a matrix of logarithms, as in an AnnData; X is that which tiledbsoma.io calls `data`."""
    assert open_source(path).counts_in == "raw"
    with pytest.raises(ValueError, match="X holds fractional values"):
        read(open_source(path, "X"))
    assert open_source(path, "X", fractional=True).counts_in == "X"
    assert read_anndata(path)[0].X.max() == read(open_source(path)).max(), "the same counts as of a build"
    proteins = open_source(path, "ADT")
    assert proteins.shape == (N_CELLS, 2)
    np.testing.assert_array_equal(read(proteins), read(open_source(path))[:, :2])
    with pytest.raises(ValueError, match="'nothing'"):
        open_source(path, "nothing")


@given(data=st.data())
def test_a_query_holds_its_cells_and_genes(path, soma, data):
    cells = data.draw(st.lists(st.integers(0, N_CELLS - 1), min_size=1, unique=True))
    genes = data.draw(st.lists(st.integers(0, N_GENES - 1), min_size=1, unique=True))
    with soma.Experiment.open(path) as experiment:
        query = experiment.axis_query(
            "RNA",
            obs_query=soma.AxisQuery(coords=(sorted(cells),)),
            var_query=soma.AxisQuery(coords=(sorted(genes),)),
        )
        expected = query.to_anndata("raw")
        source = open_source(query, "raw")
    # The query and its experiment are closed: the source opens its own.
    np.testing.assert_array_equal(read(source, data.draw(st.integers(1, 9))), expected.X.toarray())
    assert source.obs.index.tolist() == expected.obs_names.tolist()
    assert source.genes.gene_ids.tolist() == expected.var_names.tolist()
    some = np.array(data.draw(st.lists(st.integers(0, len(cells) - 1), max_size=5)), int)
    np.testing.assert_array_equal(source.matrix.take(some).toarray(), expected.X.toarray()[some])
    matrix = pickle.loads(pickle.dumps(source.matrix))
    np.testing.assert_array_equal(matrix.rows(0, len(cells)).toarray(), expected.X.toarray())


def test_a_query_by_a_label(path, soma):
    with soma.Experiment.open(path) as experiment:
        query = experiment.axis_query("RNA", obs_query=soma.AxisQuery(value_filter="cell_type == 'B'"))
        source = open_source(query)
        graph = query.obsp("connectivities").coos().concat().to_scipy().tocsr()
        ids = query.obs_joinids().to_numpy()
    assert source.obs["cell_type"].cat.categories.tolist() == ["B"], "without the labels of other cells"
    found = source.neighbors("connectivities").rows(0, len(ids))
    np.testing.assert_allclose(found.toarray(), graph[ids][:, ids].toarray())
    with pytest.raises(ValueError, match="no obsp\\['distances'\\]"):
        source.neighbors("distances")


def test_tables_without_names(path, soma, tmp_path):
    """The Census has no names of cells, and calls those of genes `feature_id`; its rows may come in any order."""
    from stformer_hf.sources.soma import _named

    table = pd.DataFrame({"soma_joinid": [5, 2, 9], "feature_id": ["x", "y", "z"], "n": [1, 2, 3]})
    cells, genes = _named(table.drop(columns="feature_id"), ("obs_id",)), _named(table, ("var_id", "feature_id"))
    assert cells.index.tolist() == ["2", "5", "9"] and cells["n"].tolist() == [2, 1, 3]
    assert genes.index.tolist() == ["y", "x", "z"] and genes.columns.tolist() == ["soma_joinid", "n"]


def test_what_is_not_read_is_named(path, soma, tmp_path):
    import tiledbsoma.io

    dense = AnnData(np.ones((3, 2)), var=pd.DataFrame(index=["a", "b"]))
    tiledbsoma.io.from_anndata(str(tmp_path / "e"), dense, measurement_name="RNA", X_kind=soma.DenseNDArray)
    with pytest.raises(ValueError, match="ms/RNA/X/data is a dense array, and only sparse ones are read"):
        open_source(tmp_path / "e")
    with pytest.raises(ValueError, match="ms: unsupported file format"):
        open_source(f"{path}/ms")
    for read_it in (open_source, CellStore, lambda address: CellStore.build(tmp_path / "s", address)):
        with pytest.raises(ValueError, match=r"pass the experiment that tiledbsoma.Experiment.open\('tiledb://a/b'\)"):
            read_it("tiledb://a/b")


def test_groups_that_are_no_experiments_are_read_as_folders(path, soma, tmp_path):
    """A build of a folder finds the experiments in a collection, as in the Census, and passes other groups by."""
    expected = read(open_source(path))
    with soma.Collection.create(str(tmp_path / "data")) as census:
        census.add_new_collection("empty")
        shutil.copytree(path, tmp_path / "data" / "human")
        census.set("human", soma.open(str(tmp_path / "data" / "human")))
    make_adata(5, N_GENES).write_h5ad(tmp_path / "data" / "other.h5ad")
    store = CellStore.build(tmp_path / "s", tmp_path / "data", report=False)
    assert len(store) == N_CELLS + 5
    np.testing.assert_array_equal(store.rows(range(N_CELLS))[:, :N_GENES].toarray(), expected)


def test_matrices_named_data_and_x_are_told_apart(path, soma, tmp_path):
    import tiledbsoma.io

    both = shutil.copytree(path, tmp_path / "e")
    other = sparse.random(N_CELLS, N_GENES, 0.5, "csr", np.float32, random_state=1)
    with soma.Experiment.open(str(both), "w") as experiment:
        tiledbsoma.io.add_X_layer(experiment, "RNA", "X", other)
    np.testing.assert_array_equal(read(open_source(both, "X", fractional=True)), other.toarray())
    found = read(open_source(both, "data", fractional=True))
    np.testing.assert_array_equal(found, read(open_source(path, "X", fractional=True)))


def test_a_build_of_an_experiment_resumes_if_it_is_opened_at_the_same_time(path, soma, tmp_path, monkeypatch):
    written = []
    write_piece = writer.write_piece

    def counted(piece, *args):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(piece)
        return write_piece(piece, *args)

    def n_written(chosen=slice(None), **when) -> int:
        written.clear()
        with soma.Experiment.open(path, **when) as experiment:
            query = experiment.axis_query("RNA", obs_query=soma.AxisQuery(coords=(chosen,)))
            CellStore.build(tmp_path / "s", query, rows_per_shard=16, rows_per_batch=16, report=False, overwrite=True)
        return len(written)

    with soma.Experiment.open(path) as experiment:
        now = experiment.tiledb_timestamp_ms
    for later, n in (
        ({"tiledb_timestamp": now}, 2),
        ({"tiledb_timestamp": now + 1}, 4),
        ({"tiledb_timestamp": now, "chosen": slice(0, 55)}, 4),
    ):
        monkeypatch.setattr(writer, "write_piece", counted)
        with pytest.raises(KeyboardInterrupt):
            n_written(tiledb_timestamp=now)
        monkeypatch.setattr(writer, "write_piece", lambda *args: (written.append(args), write_piece(*args))[1])
        assert n_written(**later) == n
        assert len(CellStore(tmp_path / "s")) == (N_CELLS if "chosen" not in later else 56)


def test_measurements_with_the_same_genes_are_told_apart_by_a_build(path, soma):
    with soma.Experiment.open(path) as experiment:
        both = soma.AxisQuery(coords=(slice(0, 1),))
        queries = [experiment.axis_query(name, var_query=both) for name in ("RNA", "ADT")]
        assert soma_key(queries[0]) != soma_key(queries[1])
        assert open_source(experiment, "RNA:raw").key != open_source(experiment, "ADT").key


def test_an_open_experiment_leaves_obs_on_disk(path, soma):
    def tables() -> int:
        gc.collect()
        return sum(isinstance(found, pd.DataFrame) and "cell_type" in found for found in gc.get_objects())

    before = tables()
    source = open_source(path)
    assert source.obs["n"].size == N_CELLS and tables() > before
    source.keep_obs([])
    assert tables() == before
    with soma.Experiment.open(path, context=soma.SOMATileDBContext({"vfs.s3.aws_secret_access_key": "pw"})) as found:
        assert "pw" not in repr(SomaPlace.of(found)) and "pw" in SomaPlace.of(found).config.values()


def test_streams_and_commands_read_experiments(path, tmp_path):
    from stformer_hf.cli import main

    store = CellStore.build(tmp_path / "s", path, obs=["cell_type"])
    model = stformer_hf.finetune(store, "cell_type", num_train_epochs=0, output=str(tmp_path / "m"))
    stream = stformer_hf.IterableAnnDataset([path], model.tokenizer)
    assert sum(1 for _ in stream) == N_CELLS
    adata = AnnData(store.rows(slice(None)), var=store.genes.frame.set_index("gene_id"))
    stformer_hf.annotate(adata, model)
    main(["annotate", "--data", path, "--model", str(tmp_path / "m"), "--output", str(tmp_path / "a.h5ad")])
    found = read_h5ad(tmp_path / "a.h5ad").obs
    assert found["stformer_label"].tolist() == adata.obs["stformer_label"].tolist()
    assert found.index.tolist() == store.obs_names.tolist()


def test_tiledbsoma_is_imported_for_experiments_alone(path, tmp_path):
    code = (
        "import sys; sys.modules['tiledbsoma'] = None\n"
        "from stformer_hf.sources.open_source import open_source\n"
        f"open_source({path!r})"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert 'pip install "stformer_hf[soma]"' in found.stderr
