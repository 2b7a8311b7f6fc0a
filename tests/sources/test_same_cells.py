"""Sources that hold the same cells are refused with both names; lanes and sections whose barcodes collide are not."""

import gzip
import subprocess
import sys
import tempfile
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from anndata import AnnData, concat
from hypothesis import given
from hypothesis import strategies as st
from scipy import sparse
from scipy.io import mmwrite

from stformer_hf import CellStore, IterableAnnDataset
from stformer_hf.cli.build import main as build
from stformer_hf.sources import same_cells
from stformer_hf.sources.same_cells import row_totals
from stformer_hf.store import shards
from stformer_hf.store import writer as store_writer

N_GENES = 60


@pytest.fixture(scope="module", autouse=True)
def few_names_at_a_time():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(same_cells, "_NAMES_AT_A_TIME", 16)
        yield


def barcodes(n: int, seed: int = 0) -> list[str]:
    rng = np.random.default_rng([seed, 1])
    return ["".join(letters) + "-1" for letters in rng.choice(list("ACGT"), (n, 16))]


def lane(n_cells: int = 40, seed: int = 0, names=None, mean: float = 1.0) -> AnnData:
    """Cells of one lane; other seeds are other cells, with the same barcodes."""
    counts = np.random.default_rng(seed).poisson(mean, (n_cells, N_GENES)).astype(np.float32)
    obs = pd.DataFrame(index=barcodes(n_cells) if names is None else names)
    var = pd.DataFrame(index=[f"ENSG{i:011d}" for i in range(N_GENES)])
    return AnnData(sparse.csr_matrix(counts), obs, var)


def dense(store) -> np.ndarray:
    return store.rows(slice(None)).toarray()


def write_mtx(folder: Path, adata: AnnData) -> Path:
    folder.mkdir(parents=True)
    with gzip.open(folder / "matrix.mtx.gz", "wb") as file:
        mmwrite(file, adata.X.T.astype(int))
    for name, lines in (
        ("barcodes", adata.obs_names),
        ("features", [f"{i}\t{i}\tGene Expression" for i in adata.var_names]),
    ):
        with gzip.open(folder / f"{name}.tsv.gz", "wt") as file:
            file.write("\n".join(lines) + "\n")
    return folder


def write_h5(path: Path, adata: AnnData) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        group = file.create_group("matrix")
        for name in ("data", "indices", "indptr"):
            group[name] = getattr(adata.X, name).astype(np.int64)
        group["shape"] = np.array(adata.shape[::-1])
        group["barcodes"] = adata.obs_names.to_numpy("S")
        for name in ("id", "name"):
            group[f"features/{name}"] = adata.var_names.to_numpy("S")
        group["features/feature_type"] = np.full(N_GENES, b"Gene Expression")
    return path


# ---------------------------------------------------------------------- by their names


@pytest.mark.parametrize(
    "names",
    [
        ("outs/raw_feature_bc_matrix", "outs/filtered_feature_bc_matrix"),
        ("outs/raw_feature_bc_matrix.h5", "outs/filtered_feature_bc_matrix.h5"),
        ("outs/raw_feature_bc_matrix.h5", "outs/filtered_feature_bc_matrix"),
        ("GSM1_raw_feature_bc_matrix.h5", "GSM1_filtered_feature_bc_matrix.h5"),
        ("raw_gene_bc_matrices/GRCh38", "filtered_gene_bc_matrices/GRCh38"),
        ("Solo.out/Gene/raw", "Solo.out/Gene/filtered"),
        ("Solo.out/GeneFull/filtered", "Solo.out/Gene/filtered"),
        ("square_016um/filtered_feature_bc_matrix.h5", "square_008um/filtered_feature_bc_matrix.h5"),
        ("counts_unfiltered/cells", "counts_filtered/cells"),
    ],
)
def test_raw_and_filtered_files_of_a_run_are_refused(tmp_path, names):
    raw, filtered = (tmp_path / "run" / name for name in names)
    for path, n_cells in ((raw, 40), (filtered, 30)):
        write = write_h5 if path.suffix == ".h5" else write_mtx
        write(path, lane(40, seed=n_cells)[:n_cells])  # so that only their names tell
    for sources in (tmp_path / "run", [raw, filtered], [str(filtered), str(raw)]):
        with pytest.raises(ValueError, match="allow_duplicates=True") as error:
            CellStore.build(tmp_path / "s", sources, report=False)
        assert str(raw) in str(error.value) and f"such as {filtered}," in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    assert len(CellStore.build(tmp_path / "s", tmp_path / "run", allow_duplicates=True, report=False)) == 70
    assert len(CellStore.build(tmp_path / "t", filtered, report=False)) == 30


def test_names_that_only_look_alike_are_not_refused(tmp_path):
    names = (
        "raw/a.h5",
        "raw/b.h5",
        "filtered/c.h5",
        "drawraw.h5",
        "drawfiltered.h5",
        "a/filtered_feature_bc_matrix.h5",
    )
    for seed, name in enumerate((*names, "b/filtered_feature_bc_matrix.h5")):
        write_h5(tmp_path / "in" / name, lane(20, seed))
    assert len(CellStore.build(tmp_path / "s", tmp_path / "in", report=False)) == 140


def test_a_file_given_twice_is_refused(tmp_path):
    lane().write_h5ad(tmp_path / "a.h5ad")
    with pytest.raises(ValueError, match="a.h5ad is repeated"):
        CellStore.build(tmp_path / "s", [tmp_path / "a.h5ad", tmp_path / "." / "a.h5ad"], report=False)
    assert len(CellStore.build(tmp_path / "s", [tmp_path / "a.h5ad"] * 2, allow_duplicates=True, report=False)) == 80


# ---------------------------------------------------------------------- by their cells


def test_the_same_cells_in_another_dress_are_refused(tmp_path):
    cells = lane()
    cells.write_h5ad(tmp_path / "deposited.h5ad")
    order = np.random.default_rng(0).permutation(40)[:36]
    other = cells[order].copy()[:, cells.var_names[::-1]].copy()  # fewer, in another order, their genes too
    other.obs_names = [f"donor1_{name.removesuffix('-1')}" for name in other.obs_names]
    write_h5(tmp_path / "run.h5", other)
    store = CellStore.build(tmp_path / "s", lane(5, 9), report=False)
    for sources in ([tmp_path / "deposited.h5ad", tmp_path / "run.h5"], [tmp_path / "run.h5", cells]):
        with pytest.raises(ValueError, match="run.h5 holds the same cells as .*: 100% of .*allow_duplicates=True"):
            CellStore.build(tmp_path / "s", sources, overwrite=True, report=False)
        assert dense(CellStore(store.path)).tolist() == lane(5, 9).X.toarray().tolist()  # what was there stays
    both = CellStore.build(tmp_path / "s", sources, overwrite=True, allow_duplicates=True, report=False)
    assert len(both) == 76
    assert {path.name for path in tmp_path.iterdir()} == {"deposited.h5ad", "run.h5", "s"}


@given(st.integers(70, 100), st.booleans())
def test_nine_in_ten_cells_that_agree_are_the_same(n_same, swap):
    a, b = lane(100, names=barcodes(100)), lane(150, 1, barcodes(150))
    b.X = sparse.vstack([a.X[:n_same], b.X[n_same:]], "csr")
    sources = [b, a] if swap else [a, b]
    with tempfile.TemporaryDirectory() as folder:
        try:
            CellStore.build(Path(folder, "s"), sources, report=False)
        except ValueError as error:
            refused = f"AnnData (source {1 + swap}) holds the same cells as AnnData (source {2 - swap})" in str(error)
        else:
            refused = False
    first, second = (np.stack([of.X.sum(axis=1).A1, of.X.getnnz(axis=1)]) for of in (a, b[:100]))
    assert refused == ((first == second).all(axis=0).mean() >= 0.9)


@pytest.mark.parametrize("n_same", [0, 3, 30])
def test_cells_that_two_sources_share_are_counted(tmp_path, caplog, n_same):
    """Once per build, also when they come to a store later; lanes whose barcodes collide are not counted."""
    names = barcodes(170)
    first = lane(60, 1, names[:60], mean=9.0)
    own = lane(60 - n_same, 2, names[110:][: 60 - n_same], mean=9.0)
    second = concat([first[60 - n_same :], own]) if n_same else own
    second.obs_names = names[60 - n_same : 120 - n_same]
    others = [lane(60, 3, [*names[:10], *names[120:]], mean=9.0)]  # ten barcodes of `first` by chance
    message = f"{n_same} cells of AnnData (source 1) have the barcode, the total and the number of genes of a cell"
    if n_same == 0:
        second.obs_names = names[60:120]
    CellStore.build(tmp_path / "s", [first, second, *others], report=False)
    assert (message in caplog.text) == (n_same > 0) and caplog.text.count("in the store twice") == (n_same > 0)
    caplog.clear()
    store = CellStore.build(tmp_path / "t", [first, *others], report=False)
    assert "in the store twice" not in caplog.text
    store.append(second)
    assert (f"{n_same} cells of " in caplog.text) == (n_same > 0)
    caplog.clear()
    CellStore.build(tmp_path / "u", [first, second], allow_duplicates=True, report=False)
    assert "in the store twice" not in caplog.text


@pytest.mark.parametrize(("n_alike", "expected"), [(1, []), (2, []), (3, [(3, 0, 1)])])
def test_as_many_cells_as_match_by_chance_are_not_counted(n_alike, expected):
    """A barcode in both sources has the same counts by chance 1/20; of two pairs of sources, 2/20**2 is over 1e-3."""
    first, second = barcodes(20, 1), barcodes(20, 2)
    found = same_cells.SameCells([pa.array(first), pa.array([*first[:n_alike], *second[n_alike:]])])
    cells = np.stack([np.arange(20) + 5, np.arange(20) + 1], axis=1).astype(np.float32)  # 20 kinds
    assert found.add(0, cells) is found.add(1, cells) is None
    assert found.shared() == expected


def test_a_matrix_without_its_ambient_counts_is_the_same_cells(tmp_path):
    """As CellBender leaves it; cells of different sizes, whose totals go together."""
    adata = lane(200, mean=5.0)
    sizes = np.random.default_rng(1).lognormal(0, 0.5, (200, 1))
    adata.X = sparse.csr_matrix(np.round(adata.X.toarray() * sizes))
    clean = adata.copy()
    clean.X.data = np.maximum(clean.X.data - (np.random.default_rng(2).random(clean.X.nnz) < 0.2), 1)
    with pytest.raises(ValueError, match="100% of its cells have the barcode and .nearly. the counts"):
        CellStore.build(tmp_path / "s", [adata, clean], report=False)
    others = adata[np.random.default_rng(3).permutation(200)].copy()  # other cells, of as many counts
    others.obs_names = adata.obs_names
    assert len(CellStore.build(tmp_path / "t", [adata, others], report=False)) == 400


def test_streams_look_at_names_too(tmp_path):
    files = [write_h5(tmp_path / f"{kind}_feature_bc_matrix.h5", lane()) for kind in ("raw", "filtered")]
    with pytest.raises(ValueError, match="hold the same cells of one run"):
        IterableAnnDataset(files)
    assert sum(1 for _ in IterableAnnDataset(files, allow_duplicates=True)) == 80


def test_barcodes_that_collide_are_not_the_same_cells(tmp_path):
    lanes = [lane(200, seed) for seed in range(3)]  # spots of sections, wells of plates
    assert len(CellStore.build(tmp_path / "s", lanes, report=False)) == 600
    # Raw matrices: nearly all droplets hold nothing, or a molecule.
    raw = [lane(5000, seed, mean=0.005) for seed in range(2)]
    assert len(CellStore.build(tmp_path / "raw", raw, report=False)) == 10_000
    with pytest.raises(ValueError, match="100% of its cells"):
        CellStore.build(tmp_path / "t", [raw[0], raw[1], raw[0].copy()], report=False)
    drops = [lane(1000, seed) for seed in range(2)]
    for seed, adata in enumerate(drops):  # one molecule each, in one of fifty two
        rng = np.random.default_rng(seed)
        genes = np.where(np.arange(2000) < 1000, 0, 1 + rng.integers(0, N_GENES - 1, 2000))
        molecules = np.concatenate([np.ones(1000), rng.random(1000) < 0.02])
        cells = np.tile(np.arange(1000), 2)
        adata.X = sparse.csr_matrix((molecules, (cells, genes)), shape=adata.shape, dtype=np.float32)
        adata.X.eliminate_zeros()
    assert len(CellStore.build(tmp_path / "drops", drops, report=False)) == 2000
    assert len(CellStore.build(tmp_path / "u", [lane(3), lane(3)], report=False)) == 6  # too few to tell


def test_what_tells_cells_apart_is_kept_only_where_barcodes_are_alike(tmp_path, monkeypatch):
    described = []
    describe = shards.describe
    monkeypatch.setattr(shards, "describe", lambda *cells: described.append(cells) or describe(*cells))
    CellStore.build(tmp_path / "s", [lane(40, 0), lane(40, 1, barcodes(40, 1))], report=False)
    assert not described
    CellStore.build(tmp_path / "t", [lane(40, 0), lane(40, 1), lane(40, 2, barcodes(40, 1))], report=False)
    assert len(described) == 2
    assert not [path for path in (tmp_path / "t").iterdir() if path.suffix == ".npy"]


def test_a_refusal_comes_early_and_what_is_written_is_kept(tmp_path, monkeypatch):
    sources = [tmp_path / f"{i}.h5ad" for i in range(3)]
    for path, seed in zip(sources, (0, 0, 2), strict=True):
        lane(40, seed, barcodes(40, seed)).write_h5ad(path)
    written = []
    write_piece = store_writer.write_piece
    monkeypatch.setattr(
        store_writer, "write_piece", lambda piece, *args: written.append(piece.source) or write_piece(piece, *args)
    )
    with pytest.raises(ValueError, match="same cells"):
        CellStore.build(tmp_path / "s", sources, rows_per_shard=16, report=False)
    assert written == [0] * 3 + [1] * 3 and not (tmp_path / "s").exists()
    with pytest.raises(ValueError, match="same cells"):  # again, without reading again
        CellStore.build(tmp_path / "s", sources, rows_per_shard=16, report=False)
    assert len(written) == 6
    store = CellStore.build(tmp_path / "s", sources, rows_per_shard=16, allow_duplicates=True, report=False)
    assert written == [0] * 3 + [1] * 3 + [2] * 3
    store.verify()


def test_a_build_that_allowed_them_and_was_stopped_goes_on_as_one_that_does_not(tmp_path, monkeypatch):
    for i in range(2):
        lane().write_h5ad(tmp_path / f"{i}.h5ad")
    sources = [tmp_path / "0.h5ad", tmp_path / "1.h5ad"]

    def stop(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(store_writer, "_finish", stop)
        with pytest.raises(KeyboardInterrupt):
            CellStore.build(tmp_path / "s", sources, allow_duplicates=True, report=False)
    with pytest.raises(ValueError, match="same cells"):
        CellStore.build(tmp_path / "s", sources, report=False)


@pytest.mark.slow
def test_workers_find_them_too(tmp_path):
    for i in range(2):
        lane().write_h5ad(tmp_path / f"{i}.h5ad")
    script = (
        "import sys; from stformer_hf import CellStore\n"
        "if __name__ == '__main__':\n"
        "    CellStore.build(sys.argv[1], sys.argv[2:], workers=2, rows_per_shard=16)\n"
    )
    (tmp_path / "build.py").write_text(script)
    command = [sys.executable, tmp_path / "build.py", tmp_path / "s", tmp_path / "0.h5ad", tmp_path / "1.h5ad"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert "holds the same cells as" in run.stderr and not (tmp_path / "s").exists()


@pytest.mark.parametrize("dtype", ["bool", "uint8", "uint16", "uint32", "int64", "float32", "float64"])
def test_totals_are_those_of_scipy(dtype):
    block = sparse.random(50, N_GENES, 0.05, "csr", random_state=0)
    block.data = (block.data * 255).astype(dtype)
    assert (np.diff(block.indptr) == 0).any()
    np.testing.assert_allclose(row_totals(block), block.astype(np.float64).sum(axis=1).A1, rtol=1e-6)
    assert not row_totals(block[:0]).size and row_totals(sparse.csr_matrix((3, 2), dtype=dtype)).tolist() == [0, 0, 0]


# ---------------------------------------------------------------------- added, in parts, by command


def test_cells_that_are_there_are_not_added_again(tmp_path):
    store = CellStore.build(tmp_path / "s", [lane(40, 0), lane(40, 1, barcodes(40, 1))], report=False)
    expected = dense(store)
    with pytest.raises(ValueError, match=f"AnnData holds the same cells as {store.path}: 100%"):
        store.append(lane(40, 1, barcodes(40, 1)))
    np.testing.assert_array_equal(dense(CellStore(store.path)), expected)
    store.append(lane(40, 2))  # another lane
    store.append(lane(40, 1, barcodes(40, 1)), allow_duplicates=True)
    assert len(store) == 160
    store.verify()


def test_a_part_says_that_it_cannot_tell(tmp_path, caplog):
    CellStore.build(tmp_path / "s", [lane(), lane()], part=(0, 2), report=False)
    assert "AnnData (source 1) and AnnData (source 2) have the same barcodes" in caplog.text


def test_the_command_has_the_flag(tmp_path):
    for i in range(2):
        lane().write_h5ad(tmp_path / f"{i}.h5ad")
    arguments = ["--data", str(tmp_path / "0.h5ad"), str(tmp_path / "1.h5ad"), "--output", str(tmp_path / "s")]
    with pytest.raises(ValueError, match="same cells"):
        build(arguments)
    build([*arguments, "--allow_duplicates"])
    assert len(CellStore(tmp_path / "s")) == 80
