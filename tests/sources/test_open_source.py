"""Sources: where counts are found, and what is said where there are none."""

import itertools

import h5py
import numpy as np
import pandas as pd
import pytest
from anndata import AnnData, read_h5ad
from conftest import make_adata
from hypothesis import given
from hypothesis import strategies as st
from scipy import sparse

from stformer_hf import AnnDataset, CellStore
from stformer_hf.sources.open_source import open_source


def read(source) -> np.ndarray:
    return np.concatenate([block.toarray() for block in source.blocks(7)])


@pytest.fixture
def counts(adata):
    return adata.X.toarray()


@pytest.mark.parametrize("on_disk", [False, True])
@pytest.mark.parametrize("where", ["X", "raw", "counts"])
def test_counts_are_found_in_x_raw_or_the_layer_counts(adata, counts, where, on_disk, tmp_path):
    normalised = adata.X.copy()
    normalised.data = np.log1p(normalised.data)
    if where == "raw":
        adata.raw = adata.copy()
    if where == "counts":
        adata.layers["counts"] = adata.X.copy()
    if where != "X":
        adata.X = normalised
    if on_disk:
        adata.write_h5ad(tmp_path / "a.h5ad")
    source = open_source(tmp_path / "a.h5ad" if on_disk else adata)
    assert source.counts_in == where
    assert source.shape == counts.shape
    np.testing.assert_array_equal(read(source), counts)
    assert source.obs["cell_type"].tolist() == adata.obs["cell_type"].tolist()


def test_raw_brings_its_own_genes(adata):
    adata.raw = adata.copy()
    small = adata[:, :5].copy()
    small.X = small.X * 0.5
    assert len(open_source(small).genes) == 40


def test_a_layer_that_holds_counts_is_named(adata):
    adata.layers["umi"] = adata.X.copy()
    adata.X = adata.X * 0.5
    with pytest.raises(ValueError, match=r"X holds fractional values \(such as 0.5\).*pass layer='umi'"):
        open_source(adata)
    assert open_source(adata, layer="umi").counts_in == "umi"


@pytest.mark.parametrize(
    ("value", "words"), [(-1, "negative values"), (np.nan, "NaN or infinite"), (np.inf, "NaN or infinite")]
)
def test_values_that_are_no_counts_are_told(adata, value, words):
    adata.X.data[4] = value
    with pytest.raises(ValueError, match=f"X holds .*{words}"):
        open_source(adata)


def test_a_bad_value_beyond_the_probe_is_found_while_reading(tmp_path):
    values = np.ones((400_000, 2), np.float32)
    values[140_000, 1] = 0.5
    source = open_source(AnnData(values, var=pd.DataFrame(index=["a", "b"])))
    with pytest.raises(ValueError, match="X holds fractional values .* in cells 140000 to 141999"):
        list(source.blocks(2000))


def test_unknown_layer_missing_file_and_other_files(adata, tmp_path):
    with pytest.raises(ValueError, match="no layer 'umi'; available: X"):
        open_source(adata, layer="umi")
    with pytest.raises(FileNotFoundError, match="No such file"):
        open_source(tmp_path / "none.h5ad")
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(ValueError, match="unsupported file format .supported: h5ad, h5mu, zarr, loom"):
        open_source(tmp_path / "a.txt")
    (tmp_path / "a.h5ad").write_text("x")
    with pytest.raises(ValueError, match="not a readable HDF5 file"):
        open_source(tmp_path / "a.h5ad")


def test_a_truncated_file_raises(adata, tmp_path):
    adata.write_h5ad(tmp_path / "a.h5ad")
    whole = (tmp_path / "a.h5ad").read_bytes()
    (tmp_path / "a.h5ad").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="truncated"):
        open_source(tmp_path / "a.h5ad")


DAMAGES = {  # what is changed in an h5ad, and the error that its reading raises
    "the names of the cells": ("obs/_index", None, "KeyError"),
    "the name of the index": ("var", "_index", "KeyError"),
    "row ends": ("X/indptr", None, "KeyError"),
}


@pytest.mark.parametrize("what", DAMAGES)
def test_every_error_of_a_damaged_file_names_it(adata, tmp_path, what):
    key, attribute, error = DAMAGES[what]
    path = tmp_path / "a.h5ad"
    adata.write_h5ad(path)
    with h5py.File(path, "r+") as file:
        if attribute is None:
            del file[key]
        else:
            del file[key].attrs[attribute]
    for door in (open_source, AnnDataset):
        if what != "the name of the index" or door is open_source:  # an AnnDataset reads no var
            with pytest.raises(ValueError, match=f"^{path} cannot be read: {error}: .*download it again"):
                door(path)


def damage(path):
    """Overwrite the first chunk of the indices, whose place depends on the version of zarr's format."""
    chunk = next(path / "X/indices" / name for name in ("0", "c/0") if (path / "X/indices" / name).exists())
    chunk.write_bytes(b"junk")


def test_errors_while_blocks_are_read_name_the_file(adata, tmp_path):
    adata.write_zarr(tmp_path / "a.zarr")
    damage(tmp_path / "a.zarr")
    source = open_source(tmp_path / "a.zarr")
    with pytest.raises(ValueError, match=r"a\.zarr( cannot be read: RuntimeError|: The stored shard is)"):
        list(source.blocks(10))
    with pytest.raises(ValueError, match=r"a\.zarr( cannot be read: RuntimeError|: The stored shard is)"):
        _ = AnnDataset(tmp_path / "a.zarr")[0]
    with pytest.raises(ValueError, match=r"a\.zarr( cannot be read: RuntimeError|: The stored shard is)"):
        CellStore.build(tmp_path / "s", tmp_path / "a.zarr")
    adata.X = adata.X.tocsc()
    adata.write_zarr(tmp_path / "c.zarr")
    damage(tmp_path / "c.zarr")
    with pytest.raises(ValueError, match=r"c\.zarr( cannot be read: RuntimeError|: The stored shard is)"):
        CellStore.build(tmp_path / "s", tmp_path / "c.zarr")


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("a.h5ad", b"\x1f\x8b\x08", "compressed with gzip: unpack it"),
        ("a.h5", b"\n<!DOCTYPE html>", "It is a web page"),
        ("a.h5ad", b"version https://git-lfs.github.com/spec/v1", "git lfs pull"),
        ("a.loom", b"PK\x03\x04", "zip archive"),
        ("a.zarr.zip", b"junk", "cannot be read: BadZipFile"),
    ],
)
def test_other_files_under_a_known_name_are_told(tmp_path, name, content, match):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=match) as raised:
        open_source(tmp_path / name)
    assert str(tmp_path / name) in str(raised.value)


def test_views_and_backed_files(adata, counts, tmp_path):
    view = adata[::-2, 5:30]
    np.testing.assert_array_equal(read(open_source(view)), counts[::-2, 5:30])
    adata.write_h5ad(tmp_path / "a.h5ad")
    backed = read_h5ad(tmp_path / "a.h5ad", backed="r")
    np.testing.assert_array_equal(read(open_source(backed)), counts)
    for rows, columns in [
        (slice(None, None, -2), slice(5, 30)),
        ([7, 2, 55, 2], slice(None)),
        (adata.obs["age"] > 50, [3, 1]),
    ]:
        view = backed[rows, columns]
        expected = adata[rows, columns]
        source = open_source(view)
        np.testing.assert_array_equal(read(source), expected.X.toarray())
        assert source.genes.gene_ids.tolist() == expected.var_names.tolist()
        assert source.obs.index.tolist() == expected.obs_names.tolist()


def test_a_view_of_a_backed_file_reads_raw_and_layers_too(adata, counts, tmp_path):
    adata.raw = adata.copy()
    adata.layers["counts"] = adata.X.copy()
    adata.X = adata.X * 0.5
    adata.write_h5ad(tmp_path / "a.h5ad")
    view = read_h5ad(tmp_path / "a.h5ad", backed="r")[20:5:-1, 10:]
    np.testing.assert_array_equal(read(open_source(view, layer="counts")), counts[20:5:-1, 10:])
    raw = open_source(view, layer="raw")
    np.testing.assert_array_equal(read(raw), counts[20:5:-1])
    assert len(raw.genes) == 40


def test_no_x(adata):
    with pytest.raises(ValueError, match="it has no X"):
        open_source(AnnData(obs=adata.obs, var=adata.var))


def test_a_backed_anndata_is_read_with_its_own_tables(tmp_path):
    make_adata().write_h5ad(tmp_path / "a.h5ad")
    backed = read_h5ad(tmp_path / "a.h5ad", backed="r")
    backed.obs["age"] = 7
    backed.var_names = [f"other{i}" for i in range(backed.n_vars)]
    source = open_source(backed)
    assert (source.obs["age"] == 7).all()
    assert source.genes.gene_ids[0] == "other0"


def test_counts_in_a_layer_beside_an_empty_x():
    adata = make_adata()
    adata.layers["counts"] = adata.X.copy()
    adata.X = adata.X * 0
    assert open_source(adata).counts_in == "counts"
    del adata.layers["counts"]
    assert open_source(adata).counts_in == "X"


@pytest.mark.parametrize("column", [-1, 40])
def test_columns_beyond_the_genes_are_told(tmp_path, column):
    make_adata().write_h5ad(tmp_path / "a.h5ad")
    with h5py.File(tmp_path / "a.h5ad", "r+") as file:
        file["X/indices"][5] = column
    with pytest.raises(ValueError, match="columns outside its 40 genes"):
        list(open_source(tmp_path / "a.h5ad").blocks(100))


@given(
    st.lists(st.tuples(st.integers(0, 4), st.integers(0, 5), st.integers(0, 200)), max_size=40),
    st.sampled_from(["uint8", "int32", "float32", "float64"]),
    st.sampled_from(["csr", "csc"]),
)
def test_repeated_entries_of_a_cell_and_gene_are_summed(entries, dtype, layout):
    """A matrix is the sum of its entries, in any order; sums of narrow counts do not overflow."""
    rows, columns, values = np.array(entries, np.int64).reshape(-1, 3).T
    order = np.argsort(rows if layout == "csr" else columns, kind="stable")
    major, minor = (rows, columns) if layout == "csr" else (columns, rows)
    indptr = np.concatenate([[0], np.cumsum(np.bincount(major, minlength=5 if layout == "csr" else 6))])
    parts = (values[order].astype(dtype), minor[order], indptr)
    matrix = getattr(sparse, f"{layout}_matrix")(parts, shape=(5, 6))
    expected = np.zeros((5, 6), np.int64)
    np.add.at(expected, (rows, columns), values)
    adata = AnnData(matrix, var=pd.DataFrame(index=[f"ENSG{i:011d}" for i in range(6)]))
    before = matrix.data.copy()
    blocks = list(open_source(adata).blocks(2))
    np.testing.assert_array_equal(sparse.vstack(blocks).toarray(), expected)
    for block in blocks:  # one entry per cell and gene, columns ascending, none of them 0
        assert block.data.all()
        for start, stop in itertools.pairwise(block.indptr):
            assert (np.diff(block.indices[start:stop]) > 0).all()
    np.testing.assert_array_equal(matrix.data, before)  # the user's matrix is left as it is
