"""Formats: what a file holds comes out, whatever the layout, and what cannot be right is refused with a reason."""

import gc
import gzip
import os
import shutil
import tracemalloc
import zipfile

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
import zarr
from anndata import AnnData
from conftest import make_adata
from scipy import io, sparse

from stformer_hf import CellStore
from stformer_hf.sources import matrices, row_buckets, tenx_files
from stformer_hf.sources.formats import expand
from stformer_hf.sources.open_source import open_source
from stformer_hf.sources.read_anndata import read_anndata
from stformer_hf.sources.registry import FORMATS, find_format, reads


def read(source, rows=7) -> np.ndarray:
    return np.concatenate([np.zeros((0, source.shape[1])), *(block.toarray() for block in source.blocks(rows))])


@pytest.fixture
def small_buffers(monkeypatch):
    """Buffers of a few entries, so that small matrices need many of them."""
    monkeypatch.setattr(matrices, "_ENTRIES_AT_ONCE", 50)
    monkeypatch.setattr(matrices, "_VALUES_AT_ONCE", 100)
    monkeypatch.setattr(row_buckets, "_BUCKET_ENTRIES", 64)
    monkeypatch.setattr(row_buckets, "_ENTRIES_AT_ONCE", 30)


LAYOUTS = {"csr": sparse.csr_matrix, "csc": sparse.csc_matrix, "dense": lambda counts: counts}


@pytest.mark.parametrize("n_genes", [40, 60])  # 60: square, which the shape alone does not tell apart
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("suffix", ["h5ad", "zarr", "zarr.zip"])
def test_every_layout_is_read_by_rows(tmp_path, small_buffers, layout, suffix, n_genes):
    adata = make_adata(60, n_genes)
    counts = adata.X.toarray()
    adata.X = LAYOUTS[layout](counts)
    path = tmp_path / f"a.{suffix}"
    if suffix == "h5ad":
        adata.write_h5ad(path)
    else:
        adata.write_zarr(tmp_path / "a.zarr")
    if suffix == "zarr.zip":
        with zipfile.ZipFile(path, "w") as file:
            for inside in sorted((tmp_path / "a.zarr").rglob("*")):
                file.write(inside, inside.relative_to(tmp_path / "a.zarr"))
    source = open_source(path)
    np.testing.assert_array_equal(read(source), counts)
    np.testing.assert_array_equal(np.vstack([b.toarray() for b in source.blocks(9, 13, 41)]), counts[13:41])
    np.testing.assert_array_equal(source.matrix.take(np.array([9, 3, 3, 4, 59])).toarray(), counts[[9, 3, 3, 4, 59]])
    assert source.genes.gene_ids.tolist() == adata.var_names.tolist()
    assert source.obs["cell_type"].tolist() == adata.obs["cell_type"].tolist()


def test_columns_are_regrouped_in_bounded_memory(tmp_path, monkeypatch):
    """No array of entries is larger than a buffer, whatever the matrix holds."""
    monkeypatch.setattr(matrices, "_ENTRIES_AT_ONCE", 1000)
    monkeypatch.setattr(row_buckets, "_ENTRIES_AT_ONCE", 1000)
    monkeypatch.setattr(row_buckets, "_BUCKET_ENTRIES", 5000)
    counts = sparse.random(500, 300, 0.3, "csc", np.float32, np.random.default_rng(0), lambda n: np.ones(n))
    AnnData(counts, var=pd.DataFrame(index=[f"g{i}" for i in range(300)])).write_h5ad(tmp_path / "a.h5ad")
    sizes = []
    add = row_buckets.RowBuckets.add
    monkeypatch.setattr(
        row_buckets.RowBuckets, "add", lambda self, rows, *rest: sizes.append(len(rows)) or add(self, rows, *rest)
    )
    source = open_source(tmp_path / "a.h5ad")
    np.testing.assert_array_equal(read(source, 20), counts.toarray())
    assert max(sizes) <= 1000 and sum(sizes) == counts.nnz


def test_a_forked_process_leaves_the_files_of_its_parent(tmp_path):
    adata = make_adata()
    adata.X = adata.X.tocsc()
    adata.write_h5ad(tmp_path / "a.h5ad")
    matrix = open_source(tmp_path / "a.h5ad").matrix
    matrix.prepare(tmp_path)
    child = os.fork()
    if not child:
        matrix.close()
        gc.collect()
        os._exit(0)
    os.waitpid(child, 0)
    np.testing.assert_array_equal(matrix.rows(0, 60).toarray(), adata.X.toarray())
    matrix.close()
    assert [path.name for path in tmp_path.iterdir()] == ["a.h5ad"]


def test_tables_that_do_not_fit_the_matrix_raise(tmp_path):
    make_adata().write_h5ad(tmp_path / "a.h5ad")
    with h5py.File(tmp_path / "a.h5ad", "r+") as file:
        file["X"].attrs["shape"] = [60, 41]
    with pytest.raises(ValueError, match="damaged: X has the shape .60, 41., but there are 60 cells and 40 genes"):
        open_source(tmp_path / "a.h5ad")


def test_files_for_regrouping_go_with_the_build(tmp_path):
    adata = make_adata()
    adata.X = adata.X.tocsc()
    adata.write_h5ad(tmp_path / "a.h5ad")
    store = CellStore.build(tmp_path / "s", tmp_path / "a.h5ad")
    np.testing.assert_array_equal(store.rows(slice(None)).toarray(), adata.X.toarray())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.h5ad", "s"]
    assert not list(store.path.glob("by-row*"))


# ---------------------------------------------------------------------- 10x


def write_tenx_h5(path, adata, *, kinds=None, genomes=None):
    """A Cell Ranger file: v3, or v2 with a group a genome."""
    with h5py.File(path, "w") as file:
        for genome in genomes or ["matrix"]:
            group = file.create_group(genome)
            matrix = sparse.csr_matrix(adata.X)
            group["data"], group["indices"], group["indptr"] = matrix.data.astype(int), matrix.indices, matrix.indptr
            group["shape"] = matrix.shape[::-1]
            group["barcodes"] = adata.obs_names.to_numpy().astype("S")
            ids = adata.var_names.to_numpy().astype("S")
            if genomes:
                group["genes"] = group["gene_names"] = ids
            else:
                group["features/id"] = group["features/name"] = ids
                group["features/feature_type"] = np.array(kinds or ["Gene Expression"] * adata.n_vars, "S")
                group["features/genome"] = np.array(["GRCh38"] * adata.n_vars, "S")


def test_antibodies_are_kept_apart(tmp_path):
    adata = make_adata()
    write_tenx_h5(tmp_path / "a.h5", adata, kinds=["Gene Expression", "Antibody Capture"] * 20)
    genes = open_source(tmp_path / "a.h5")
    np.testing.assert_array_equal(read(genes), adata.X.toarray()[:, ::2])
    assert genes.genes.gene_ids.tolist() == adata.var_names[::2].tolist()
    proteins = open_source(tmp_path / "a.h5", layer="Antibody Capture")
    np.testing.assert_array_equal(read(proteins), adata.X.toarray()[:, 1::2])
    assert proteins.genes.gene_ids.tolist() == adata.var_names[1::2].tolist()


def test_counts_that_become_an_anndata_are_in_memory_once(tmp_path, monkeypatch):
    monkeypatch.setitem(read_anndata.__globals__, "_ROWS", 100)
    counts = sparse.random(2000, 300, 0.5, "csr", np.float32, np.random.default_rng(0), lambda n: np.arange(n) % 300)
    genes = pd.DataFrame(index=[f"g{i}" for i in range(300)])
    write_tenx_h5(tmp_path / "a.h5", AnnData(counts, var=genes))
    tracemalloc.start()
    cells, _ = read_anndata(tmp_path / "a.h5")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (cells.X != counts).nnz == 0 and cells.X.dtype == np.float32 and cells.X.indices.dtype == np.int32
    tracemalloc.start()
    np.empty(1_000_000, np.int8).resize(1_000_001, refcheck=False)
    counted_twice = tracemalloc.get_traced_memory()[1] > 1_500_000  # an array that grows in place, by newer versions
    tracemalloc.stop()
    assert peak < (1.8 if counted_twice else 1.5) * (cells.X.data.nbytes + cells.X.indices.nbytes)


def test_several_genomes_are_named(tmp_path):
    adata = make_adata()
    write_tenx_h5(tmp_path / "a.h5", adata, genomes=["hg19", "mm10"])
    with pytest.raises(ValueError, match="Counts are in 'hg19', 'mm10': pass layer='hg19'"):
        open_source(tmp_path / "a.h5")
    np.testing.assert_array_equal(read(open_source(tmp_path / "a.h5", layer="mm10")), adata.X.toarray())


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("zipped", [False, True])
def test_mtx_folders(tmp_path, small_buffers, version, zipped):
    adata = make_adata()
    folder = tmp_path / "sample"
    folder.mkdir()
    io.mmwrite(folder / "matrix.mtx", sparse.coo_matrix(adata.X.T.astype(int)))
    table = pd.DataFrame({0: adata.var_names, 1: [f"symbol{i}" for i in range(40)]})
    if version == 3:
        table[2] = ["Gene Expression"] * 30 + ["Antibody Capture"] * 10
    table.to_csv(folder / ("features.tsv" if version == 3 else "genes.tsv"), sep="\t", header=False, index=False)
    pd.Series(adata.obs_names).to_csv(folder / "barcodes.tsv", header=False, index=False)
    if zipped:
        for file in list(folder.iterdir()):
            with open(file, "rb") as plain, gzip.open(f"{file}.gz", "wb") as packed:
                shutil.copyfileobj(plain, packed)
            file.unlink()
    n_genes = 30 if version == 3 else 40
    source = open_source(folder)
    np.testing.assert_array_equal(read(source), adata.X.toarray()[:, :n_genes])
    assert source.genes.symbols.tolist() == [f"symbol{i}" for i in range(n_genes)]
    assert source.obs.index.tolist() == adata.obs_names.tolist()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda lines: lines[:-3], "truncated: .* entries of"),
        (lambda lines: [*lines[:-1], "99 1 3\n"], "entries outside the matrix"),
        (lambda lines: [*lines[:-1], "1 0 3\n"], "entries outside the matrix"),
        (lambda lines: [*lines[:-1], "1 one 3\n"], "is damaged"),
        (
            lambda lines: ["%%MatrixMarket matrix array integer general\n", *lines[1:]],
            "'%%matrixmarket matrix array integer general' is not supported",
        ),
        (lambda lines: ["hello\n", *lines[1:]], "not a Matrix Market file"),
        (lambda lines: [*lines, "1 1 3\n"], "is damaged: .* entries of"),
    ],
)
def test_a_damaged_mtx_raises(tmp_path, change, words):
    adata = make_adata()
    io.mmwrite(tmp_path / "matrix.mtx", sparse.coo_matrix(adata.X.T.astype(int)))
    pd.Series(adata.var_names).to_csv(tmp_path / "genes.tsv", header=False, index=False)
    pd.Series(adata.obs_names).to_csv(tmp_path / "barcodes.tsv", header=False, index=False)
    lines = (tmp_path / "matrix.mtx").read_text().splitlines(keepends=True)
    (tmp_path / "matrix.mtx").write_text("".join(change(lines)))
    with pytest.raises(ValueError, match=words):
        read(open_source(tmp_path))


def test_an_mtx_without_its_tables_raises(tmp_path):
    io.mmwrite(tmp_path / "matrix.mtx", sparse.coo_matrix(np.eye(3, dtype=int)))
    with pytest.raises(ValueError, match="has no features.tsv or genes.tsv beside it"):
        open_source(tmp_path)


@pytest.mark.parametrize("suffix", [".mtx", ".mtx.gz"])
@pytest.mark.parametrize("zipped", [False, True])
def test_gzip_is_told_by_what_a_file_holds(tmp_path, suffix, zipped):
    adata = make_adata()
    write_mtx_folder(tmp_path, adata)
    for file in list(tmp_path.iterdir()):
        content = file.read_bytes()
        file.unlink()
        name = file.name.replace(".mtx", suffix).replace(".tsv", suffix.replace("mtx", "tsv"))
        (tmp_path / name).write_bytes(gzip.compress(content) if zipped else content)
    np.testing.assert_array_equal(read(open_source(tmp_path)), adata.X.toarray())


def write_mtx_folder(folder, adata, features=None):
    """matrix.mtx and barcodes.tsv of some cells, with the lines of features.tsv, else their ids."""
    io.mmwrite(folder / "matrix.mtx", sparse.coo_matrix(adata.X.T.astype(int)))
    (folder / "features.tsv").write_text("".join(f"{line}\n" for line in features or adata.var_names))
    (folder / "barcodes.tsv").write_text("".join(f"{name}\n" for name in adata.obs_names))


def test_lines_of_features_may_have_any_number_of_fields(tmp_path):
    file = tmp_path / "features.tsv"
    file.write_text('g1\ng2\tS2\tGene Expression\tchr1\t5\ng3\tS3\n\ng4\t"4\t\n')
    genes = tenx_files._read_features(file)
    assert genes.index.tolist() == ["g1", "g2", "g3", "g4"]
    assert genes["gene_symbol"].tolist() == ["", "S2", "S3", '"4']
    assert genes["feature_type"].tolist() == ["", "Gene Expression", "", ""]
    file.write_text("g1\tS1\t\ng2\n")
    assert list(tenx_files._read_features(file)) == ["gene_symbol"]  # a third column that is empty is none
    file.write_text("g1\ng2\n")
    assert tenx_files._read_features(file).shape == (2, 0)


def test_tables_that_do_not_fit_an_mtx_say_why(tmp_path):
    adata = make_adata(5, 4)
    write_mtx_folder(tmp_path, adata)
    (tmp_path / "barcodes.tsv").write_text("barcode\n" + (tmp_path / "barcodes.tsv").read_text())
    with pytest.raises(ValueError, match="have 4 and 6. A table with one extra line may have a header"):
        open_source(tmp_path)
    write_mtx_folder(tmp_path, adata.T)
    (tmp_path / "features.tsv").write_text("\n".join(adata.var_names))
    (tmp_path / "barcodes.tsv").write_text("\n".join(adata.obs_names))
    with pytest.raises(ValueError, match="rows and columns are swapped: transpose it"):
        open_source(tmp_path)


# ---------------------------------------------------------------------- loom, stores, folders


def test_a_loom_of_scope_is_read_without_its_compound_attributes(tmp_path):
    """SCope keeps embeddings and regulons as arrays of several fields."""
    with h5py.File(tmp_path / "a.loom", "w") as file:
        file["matrix"] = np.arange(6).reshape(3, 2)
        rows, columns = file.create_group("row_attrs"), file.create_group("col_attrs")
        rows["Gene"] = np.array(["A", "B", "C"], "S")
        rows["Accession"] = rows["gene_ids"] = np.array([f"ENSG{i:011d}" for i in range(3)], "S")
        rows["Regulons"] = np.zeros(3, dtype=[("one", "i4"), ("two", "i4")])
        columns["CellID"] = np.array(["x", "y"], "S")
        columns["Embedding"] = np.zeros(2, dtype=[("_X", "f4"), ("_Y", "f4")])
    store = CellStore.build(tmp_path / "s", tmp_path / "a.loom")
    assert store.rows(slice(None)).toarray().tolist() == [[0, 2, 4], [1, 3, 5]]
    assert store.gene_ids.tolist() == [f"ENSG{i:011d}" for i in range(3)] and store.genes.symbols.tolist() == list(
        "ABC"
    )


def test_loom(tmp_path, small_buffers):
    adata = make_adata()
    with h5py.File(tmp_path / "a.loom", "w") as file:
        file["matrix"] = adata.X.toarray().T * 0.5
        file["layers/umi"] = adata.X.toarray().T.astype(int)
        file["row_attrs/Gene"] = np.array([f"symbol{i}" for i in range(40)], "S")
        file["row_attrs/Accession"] = adata.var_names.to_numpy().astype("S")
        file["col_attrs/CellID"] = adata.obs_names.to_numpy().astype("S")
        file["col_attrs/age"] = adata.obs["age"].to_numpy()
    with pytest.raises(ValueError, match="pass layer='umi'"):
        open_source(tmp_path / "a.loom")
    source = open_source(tmp_path / "a.loom", layer="umi")
    np.testing.assert_array_equal(read(source), adata.X.toarray())
    assert source.genes.gene_ids.tolist() == adata.var_names.tolist()
    assert source.genes.symbols.tolist() == [f"symbol{i}" for i in range(40)]
    assert source.obs["age"].tolist() == adata.obs["age"].tolist()
    assert source.obs.index.tolist() == adata.obs_names.tolist()


def test_a_store_and_a_selection_are_sources(store, adata, tmp_path):
    selection = store.select([5, 2, 30])
    united = CellStore.build(tmp_path / "u", [store.path, selection], obs=["cell_type", "age"], allow_duplicates=True)
    expected = np.vstack([adata.X.toarray(), adata.X.toarray()[[5, 2, 30]]])
    np.testing.assert_array_equal(united.rows(slice(None)).toarray(), expected)
    assert united.obs["age"].tolist() == [*adata.obs["age"], *adata.obs["age"].iloc[[5, 2, 30]]]


def test_folders_patterns_and_lists_are_expanded(tmp_path, adata, store, caplog):
    (tmp_path / "data" / "deep").mkdir(parents=True)
    adata.write_h5ad(tmp_path / "data" / "b.h5ad")
    adata.write_zarr(tmp_path / "data" / "deep" / "a.zarr")
    (tmp_path / "data" / "notes.txt").write_text("x")
    (tmp_path / "data" / "z.h5ad.gz").write_text("x")
    shutil.copytree(store.path, tmp_path / "data" / "c")
    found = expand([tmp_path / "data", adata, str(tmp_path / "data" / "*.h5ad")])
    names = ["b.h5ad", "c", "a.zarr", None, "b.h5ad"]
    assert [getattr(path, "name", None) for path in found] == names
    assert "z.h5ad.gz is left out: it is compressed" in caplog.text
    assert len(CellStore.build(tmp_path / "s", tmp_path / "data", allow_duplicates=True)) == 180
    with pytest.raises(FileNotFoundError, match="No such file"):
        expand([tmp_path / "data" / "*.loom"])
    with pytest.raises(ValueError, match="unsupported file format"):
        expand([tmp_path / "data" / "notes.txt"])


def test_what_is_no_source_is_not_taken_for_a_list_of_paths(tmp_path, adata):
    for wrong in (5, None, {"train": adata}, adata.to_df()):
        with pytest.raises(ValueError, match=f"A source must be a path, .* got {type(wrong).__name__}"):
            CellStore.build(tmp_path / "store", wrong)


def test_a_new_format_is_one_function(tmp_path, adata):
    before = list(FORMATS)

    @reads("npz", lambda path: path.suffix == ".npz")
    def read_npz(path):
        from stformer_hf.sources.anndata_files import anndata_layers

        return anndata_layers(AnnData(sparse.load_npz(path), var=adata.var))

    try:
        sparse.save_npz(tmp_path / "a.npz", adata.X)
        store = CellStore.build(tmp_path / "s", tmp_path / "a.npz")
        np.testing.assert_array_equal(store.rows(slice(None)).toarray(), adata.X.toarray())
    finally:
        FORMATS[:] = before


@pytest.mark.parametrize("name", ["indices", "data", "indptr"])
@pytest.mark.parametrize("layout", ["csr", "csc"])
def test_arrays_that_do_not_fit_each_other_raise(tmp_path, name, layout):
    adata = make_adata()
    adata.X = LAYOUTS[layout](adata.X.toarray())
    adata.write_h5ad(tmp_path / "a.h5ad")
    with h5py.File(tmp_path / "a.h5ad", "r+") as file:
        values = file[f"X/{name}"][:-4]
        del file[f"X/{name}"]
        file[f"X/{name}"] = values
    with pytest.raises(ValueError, match="X is damaged"):
        open_source(tmp_path / "a.h5ad")


# ---------------------------------------------------------------------- real files

# What each file of the shared data gives: the layer whose rows must equal anndata's own reading, or the error.
ODD = {
    "anndata_archive_v0.5.0.h5ad": "X holds negative values.*raw holds fractional values",
    "anndata_archive_v0.7.0.h5ad": "X",
    "anndata_archive_v0.7.8.h5ad": "X",
    "anndata_archive_v0.7.8.zarr.zip": "X",
    "categorical_int_nan.h5ad": "X holds negative values",
    "cellrank_adata_100.h5ad": "X holds fractional values",
    "cellxgene_1e4dfec4.h5ad": "named 0, 1, 2, …: these are row numbers",
    "cellxgene_nan.h5ad": "X holds .* NaN or infinite values",
    "example_invalid_CL.h5ad": "X",
    "krumsiek11.h5ad": "X holds negative values",
    "krumsiek11_augmented_v0-8.h5ad": "X holds negative values",
    "pbmc-small-x-csc.h5ad": "X holds negative values",
    "pbmc-small-x-csr.h5ad": "X holds negative values",
    "pbmc-small-x-dense.h5ad": "X holds negative values",
    "pbmc-small.h5ad": "X holds negative values.*raw holds fractional values",
    "scvi_pbmc_5k_protein_v3.h5ad": "X",
    "soma_multiome_100_100.h5ad": "X",
    "squidpy_test_data.h5ad": "X holds fractional values",
    "sympathetic.loom": "X",
    "xempty.h5ad": "X",
    "xnone.h5ad": "it has no X",
    "zellkonverter_example_anndata.h5ad": "counts",
}
TENX = {
    "1K_pbmc_citeseq.h5": "X",
    "seurat_visium_filtered_feature_bc_matrix.h5": "X",
    "v2_filtered_gene_bc_matrices_h5.h5": "X",
    "v2_multiple_genomes.h5": "Counts are in 'another_genome', 'hg19_chr21': pass layer='another_genome'",
    "v3_filtered_feature_bc_matrix.h5": "X",
    "visium_1.0.0_filtered_feature_bc_matrix.h5": "X",
    "v2_mtx": "X",
    "v3_mtx": "X",
}


def read_by_others(path) -> AnnData:
    """What anndata and scanpy make of a file."""
    sc = pytest.importorskip("scanpy")
    if path.suffix == ".h5":
        return sc.read_10x_h5(path, gex_only=True)
    if path.is_dir():
        return sc.read_10x_mtx(path, var_names="gene_ids")
    if path.suffix == ".loom":
        with h5py.File(path) as file:
            return AnnData(sparse.csr_matrix(file["matrix"][:].T))
    if path.suffix == ".zip":
        return anndata.read_zarr(zarr.storage.ZipStore(path, mode="r"))
    return anndata.read_h5ad(path)


def test_the_tables_name_every_file(shared_data):
    files = {path.name for path in (shared_data / "odd").iterdir()}
    assert files == set(ODD)
    assert {path.name for path in (shared_data / "tenx").iterdir() if path.suffix != ".csv"} == set(TENX)
    assert all(find_format(shared_data / "odd" / name) for name in ODD)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [*ODD, *TENX])
def test_odd_files_give_what_anndata_reads_or_an_error(shared_data, tmp_path, name):
    path = shared_data / ("odd" if name in ODD else "tenx") / name
    wanted = {**ODD, **TENX}[name]
    if wanted not in ("X", "counts"):
        with pytest.raises(ValueError, match=wanted):
            CellStore.build(tmp_path / "s", path)
        assert not (tmp_path / "s").exists()
        return
    adata = read_by_others(path)
    store = CellStore.build(tmp_path / "s", path)
    assert store.manifest["sources"][0]["counts_in"] == wanted
    expected = sparse.csr_matrix(adata.X if wanted == "X" else adata.layers[wanted])
    assert store.rows(slice(None)).shape == expected.shape
    assert (sparse.csr_matrix(store.rows(slice(None))) != expected).nnz == 0
    store.verify()


def test_chosen_genomes_and_antibodies_of_real_files(shared_data, tmp_path):
    sc = pytest.importorskip("scanpy")
    for genome in ("hg19_chr21", "another_genome"):
        store = CellStore.build(tmp_path / genome, shared_data / "tenx" / "v2_multiple_genomes.h5", layer=genome)
        expected = sc.read_10x_h5(shared_data / "tenx" / "v2_multiple_genomes.h5", genome=genome)
        assert (sparse.csr_matrix(store.rows(slice(None))) != expected.X).nnz == 0
    store = CellStore.build(tmp_path / "p", shared_data / "tenx" / "1K_pbmc_citeseq.h5", layer="Antibody Capture")
    everything = sc.read_10x_h5(shared_data / "tenx" / "1K_pbmc_citeseq.h5", gex_only=False)
    expected = everything[:, everything.var["feature_types"] == "Antibody Capture"].X
    assert (sparse.csr_matrix(store.rows(slice(None))) != expected).nnz == 0


@pytest.mark.filterwarnings("ignore:.*will be removed.*0.14:DeprecationWarning")  # of anndata 0.13
@pytest.mark.parametrize("version", [2, 3])
def test_zarr_of_both_versions_is_read(tmp_path, adata, version):
    with anndata.settings.override(zarr_write_format=version):
        adata.write_zarr(tmp_path / "a.zarr")
    assert zarr.open_group(str(tmp_path / "a.zarr"), mode="r").metadata.zarr_format == version
    np.testing.assert_array_equal(read(open_source(tmp_path / "a.zarr")), adata.X.toarray())


def test_an_anndata_of_any_format_has_its_counts_obs_and_genes(tmp_path):
    """The folder of Cell Ranger, with antibodies and a gene in two columns; and a store, which has obs."""
    counts = np.arange(12).reshape(3, 4)
    ids, kinds = ["ENSG1", "ENSG2", "ENSG1", "CD3"], ["Gene Expression"] * 3 + ["Antibody Capture"]
    folder = tmp_path / "filtered_feature_bc_matrix"
    folder.mkdir()
    io.mmwrite(folder / "matrix.mtx", sparse.coo_array(counts.T))
    (folder / "barcodes.tsv").write_text("a\nb\nc\n")
    rows = [f"{gene}\t{symbol}\t{kind}\n" for gene, symbol, kind in zip(ids, "XYXZ", kinds, strict=True)]
    (folder / "features.tsv").write_text("".join(rows))
    cells, layer = read_anndata(folder)
    assert layer is None and cells.obs_names.tolist() == ["a", "b", "c"]
    assert cells.var_names.is_unique and cells.var["gene_id"].tolist() == ids[:3]
    np.testing.assert_array_equal(cells.X.toarray(), counts[:, :3])
    antibodies, layer = read_anndata(folder, "Antibody Capture")
    np.testing.assert_array_equal(antibodies.X.toarray(), counts[:, 3:])
    np.testing.assert_array_equal(read(open_source(antibodies, layer)), counts[:, 3:])

    original = make_adata(6, 4)
    store = CellStore.build(tmp_path / "store", original, obs="all", report=False)
    found = read_anndata(store.path)[0]
    pd.testing.assert_frame_equal(found.obs, original.obs, check_dtype=False, check_index_type=False)
    np.testing.assert_array_equal(found.X.toarray(), original.X.toarray())


@pytest.mark.parametrize("name", ["collection", "collection.zarr"])
def test_a_collection_of_annbatch_is_a_folder_of_files(tmp_path, name):
    """Its zarr group holds one AnnData per data set, and nothing else."""
    group = zarr.open_group(str(tmp_path / name), mode="w", zarr_format=2)
    group.attrs.update({"encoding-type": "annbatch-preshuffled", "encoding-version": "0.1.0"})
    parts = [make_adata(20, 40), make_adata(15, 40)]
    for i, adata in enumerate(parts):
        adata.obs_names = [f"{i}-{cell}" for cell in adata.obs_names]
        adata.write_zarr(tmp_path / name / f"dataset_{i}")
    store = CellStore.build(tmp_path / "store", tmp_path / name)
    np.testing.assert_array_equal(
        store.rows(slice(None)).toarray(), np.concatenate([adata.X.toarray() for adata in parts])
    )
    assert store.obs_names.tolist() == [cell for adata in parts for cell in adata.obs_names]
    with pytest.raises(ValueError, match="is a folder of files, and one source is needed here: .*dataset_0, or build"):
        open_source(tmp_path / name)


def test_a_spatialdata_whose_table_is_named_obs_is_not_a_collection(tmp_path):
    adata = make_adata(5, 4)
    adata.write_zarr(tmp_path / "a.zarr" / "tables" / "obs")
    version = zarr.open_group(tmp_path / "a.zarr" / "tables" / "obs", mode="r").metadata.zarr_format
    for place in (tmp_path / "a.zarr", tmp_path / "a.zarr" / "tables"):
        zarr.open_group(place, mode="a", zarr_format=version)
    np.testing.assert_array_equal(read(open_source(tmp_path / "a.zarr")), adata.X.toarray())
