"""Folders of other pipelines, as their programs write them, give the same cells and genes; others are told."""

import gzip
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec
import numpy as np
import pandas as pd
import pytest
from anndata.io import read_zarr
from conftest import make_adata
from scipy import io, sparse

from stformer_hf import AnnDataset, CellStore
from stformer_hf.sources.formats import expand, read_layers
from stformer_hf.sources.open_source import open_source
from stformer_hf.sources.registry import find_format


@pytest.fixture
def cells():
    adata = make_adata(20, 9)
    adata.var["symbol"] = [f"S{i}" for i in range(8)] + [""]  # genes without a symbol have none in these files
    return adata


def write_mtx(path, matrix, zipped=False):
    """Cells by genes, as all of these but Cell Ranger write it."""
    io.mmwrite(path, sparse.coo_matrix(matrix).astype(int), field="integer")
    if zipped:
        Path(f"{path}.gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()


def write_lines(path, lines):
    path.write_text("".join(f"{line}\n" for line in lines))


def check(store, adata):
    np.testing.assert_array_equal(store.rows(slice(None)).toarray(), adata.X.toarray())
    assert store.gene_ids.tolist() == adata.var_names.tolist()
    assert store.obs.index.tolist() == adata.obs_names.tolist()


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("name", ["count_matrix.mtx", "DGE.mtx"])
def test_parse(tmp_path, cells, name, zipped):
    folder = tmp_path / "sample" / "DGE_filtered"
    folder.mkdir(parents=True)
    write_mtx(folder / name, cells.X, zipped)
    genes = pd.DataFrame({"gene_id": cells.var_names, "gene_name": cells.var["symbol"].to_numpy(), "genome": "hg38"})
    genes.to_csv(folder / "all_genes.csv", index=False)
    obs = pd.DataFrame({"bc_wells": cells.obs_names, "sample": ["NA", "1e5"] * 10, "gene_count": range(20)})
    obs["well"] = [f"{i:02d}" for i in range(20)]
    obs.to_csv(folder / "cell_metadata.csv", index=False)
    store = CellStore.build(tmp_path / "store", tmp_path / "sample", obs="all", report=False)
    check(store, cells)
    assert store.genes.symbols.tolist() == [*cells.var["symbol"][:8], cells.var_names[8]]
    assert store.obs["sample"].tolist() == obs["sample"].tolist()
    assert store.obs["well"].tolist() == obs["well"].tolist()
    assert store.obs["gene_count"].tolist() == list(range(20)) and store.manifest["obs"]["gene_count"] == "int64"
    assert len(AnnDataset(folder)) == 20
    genes.rename(columns={"gene_id": "id"}).to_csv(folder / "all_genes.csv", index=False)
    with pytest.raises(
        ValueError, match="all_genes.csv beside .* has no column gene_id; it has id, gene_name, genome"
    ):
        open_source(folder)
    (folder / "cell_metadata.csv").unlink()
    genes.to_csv(folder / "all_genes.csv", index=False)
    with pytest.raises(ValueError, match="has no cell_metadata.csv beside it"):
        open_source(folder)


def write_kb(folder, adata, *kinds):
    for kind in kinds:
        write_mtx(folder / f"cells_x_genes{kind}.mtx", adata.X)
    write_lines(folder / "cells_x_genes.genes.txt", adata.var_names)
    write_lines(folder / "cells_x_genes.barcodes.txt", adata.obs_names)


def test_kb_python(tmp_path, cells):
    write_kb(tmp_path, cells, "")
    check(CellStore.build(tmp_path / "ids", tmp_path / "cells_x_genes.mtx", report=False), cells)
    write_lines(tmp_path / "cells_x_genes.genes.names.txt", [*cells.var["symbol"][:8], "S8"])
    assert open_source(tmp_path).genes.symbols.tolist() == [f"S{i}" for i in range(9)]
    write_lines(tmp_path / "cells_x_genes.genes.names.txt", ["S0"])
    with pytest.raises(ValueError, match="cells_x_genes.genes.names.txt has 1 lines, but there are 9 genes"):
        open_source(tmp_path)


def test_kb_python_of_nascent_and_mature_molecules(tmp_path, cells):
    write_kb(tmp_path, cells, ".mature", ".nascent", ".ambiguous")
    with pytest.raises(ValueError, match="'ambiguous', 'mature', 'nascent': each is a part of the counts"):
        open_source(tmp_path)
    check(CellStore.build(tmp_path / "s", tmp_path, layer="mature", report=False), cells)


def write_alevin_fry(folder, matrix, genes, adata):
    folder.mkdir(parents=True)
    write_mtx(folder / "quants_mat.mtx", matrix)
    write_lines(folder / "quants_mat_cols.txt", genes)
    write_lines(folder / "quants_mat_rows.txt", adata.obs_names)


def test_alevin_fry(tmp_path, cells):
    write_alevin_fry(tmp_path / "quant" / "alevin", cells.X, cells.var_names, cells)
    check(CellStore.build(tmp_path / "s", tmp_path / "quant", report=False), cells)


def test_alevin_fry_in_usa_mode_lets_one_choose(tmp_path, cells):
    counts = cells.X.toarray()
    names = [f"{gene}{end}" for end in ("", "-U", "-A") for gene in cells.var_names]
    write_alevin_fry(tmp_path / "alevin", np.hstack([counts, 10 * counts, 100 * counts]), names, cells)
    with pytest.raises(
        ValueError, match=r"no counts found: it has no X\. Counts are in 'spliced\+ambiguous', 'spliced\+unspliced"
    ):
        open_source(tmp_path / "alevin")
    factors = {"spliced": 1, "unspliced": 10, "ambiguous": 100, "spliced+ambiguous": 101}
    for layer, factor in {**factors, "spliced+unspliced+ambiguous": 111}.items():
        store = CellStore.build(tmp_path / layer, tmp_path / "alevin", layer=layer, report=False)
        np.testing.assert_array_equal(store.rows(slice(None)).toarray(), factor * counts)
        assert store.gene_ids.tolist() == cells.var_names.tolist()


def write_rhapsody(path, adata, names):
    table = pd.DataFrame(adata.X.toarray().astype(int), index=adata.obs_names, columns=names).rename_axis("Cell_Index")
    text = "####################\n## BD Targeted Multiplex Rhapsody Analysis\n\n" + table.to_csv()
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())


@pytest.mark.parametrize("name", ["a_RSEC_MolsPerCell.csv", "a_DBEC_MolsPerCell.csv.gz"])
def test_rhapsody(tmp_path, cells, name):
    names = ["1-Mar", "SEPT2|NM_001|Reference_end", *(f"G{i}" for i in range(5)), "CD3|CD3E|AHS1|pAbO", "CD4|x|pAbO"]
    write_rhapsody(tmp_path / name, cells, names)
    store = CellStore.build(tmp_path / "s", tmp_path, report=False)
    np.testing.assert_array_equal(store.rows(slice(None)).toarray(), cells.X.toarray()[:, :7])
    assert store.gene_ids.tolist() == ["1-Mar", "SEPT2", *(f"G{i}" for i in range(5))]
    assert store.obs.index.tolist() == cells.obs_names.tolist()
    proteins = open_source(tmp_path / name, layer="Antibody Capture")
    assert proteins.genes.gene_ids.tolist() == names[7:]
    counts = np.vstack([block.toarray() for block in proteins.blocks(7)])
    np.testing.assert_array_equal(counts, cells.X.toarray()[:, 7:])


@pytest.mark.parametrize(
    ("line", "match"),
    [("9,1,2,3", "line 4 has 3 values, but there are 2 genes"), ("9,1", "line 4 has 1 values"), ("9,1,x", "convert")],
)
def test_rhapsody_that_is_damaged_names_the_file(tmp_path, line, match):
    path = tmp_path / "a_RSEC_MolsPerCell.csv"
    path.write_text(f"## BD\nCell_Index,A,B\n8,1,2\n{line}\n")
    with pytest.raises(ValueError, match=match) as raised:
        open_source(path)
    assert str(path) in str(raised.value)


def test_other_files_say_how_they_can_be_read(tmp_path):
    (tmp_path / "counts.csv").write_text("cell,A\nx,1\n")
    with pytest.raises(ValueError, match="Parse, kb-python, alevin-fry, .*10x mtx.*anndata.io.read_mtx.*h5ad"):
        expand([tmp_path])
    (tmp_path / "count_matrix.mtx").write_text("")  # another program's: it has no all_genes.csv
    assert find_format(tmp_path / "count_matrix.mtx").name == "10x mtx"


@pytest.mark.parametrize("door", [open_source, read_layers, AnnDataset, lambda source: expand([source])])
@pytest.mark.parametrize("make", [str, Path])
def test_addresses_say_what_is_possible(door, make):
    match = r"^s3://bucket/a\.h5ad: only local files can be read.*open_local\('simplecache::s3://bucket/a\.h5ad'"
    with pytest.raises(ValueError, match=match):
        door(make("s3://bucket/a.h5ad"))
    with pytest.raises(ValueError, match=r"pass the AnnData that anndata\.io\.read_zarr\('https://host/a\.zarr'\)"):
        door(make("https://host/a.zarr"))
    with pytest.raises(ValueError, match="pass the path alone, without file://"):
        door(make("file:///data/a.h5ad"))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # older fsspec leaves its file open
def test_what_is_said_of_addresses_works(tmp_path, cells):
    cells.write_h5ad(tmp_path / "a.h5ad")
    cells.write_zarr(tmp_path / "a.zarr")

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(tmp_path))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        local = fsspec.open_local(f"simplecache::{address}/a.h5ad", simplecache={"same_names": True})
        check(CellStore.build(tmp_path / "s", local, report=False), cells)
        check(CellStore.build(tmp_path / "z", read_zarr(f"{address}/a.zarr"), report=False), cells)
        server.shutdown()
