"""A file that is larger than the memory allowed becomes a store, whatever its layout."""

import gc
import pickle
import subprocess
import sys
import tracemalloc

import h5py
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from anndata import AnnData
from conftest import with_genes
from scipy import sparse

from stformer_hf import CellStore
from stformer_hf.store import writer as store_writer

MB = 1_000_000
BUILD = """
import re, resource, sys
from pathlib import Path
import datasets
from stformer_hf import CellStore
# What importing took is not counted. The limit is on memory that is the process's own, not on mapped files.
taken = 1024 * int(re.search(r"VmData:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
limit = taken + int(sys.argv[3])
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
CellStore.build(sys.argv[1], sys.argv[2])
"""


def write_large(path, layout: str, n_cells: int, n_genes: int, n_bytes: int) -> np.ndarray:
    """Write random counts of 1 to 300, a block at a time; returns the sum of each cell."""
    n_major, n_minor = (n_cells, n_genes) if layout == "csr" else (n_genes, n_cells)
    per_major = n_bytes // 8 // n_major  # 4 bytes a value and 4 an index
    rng = np.random.default_rng(0)
    totals = np.zeros(n_cells)
    form = sparse.csr_matrix if layout == "csr" else sparse.csc_matrix
    with_genes(AnnData(form((n_cells, n_genes), dtype=np.float32))).write_h5ad(path)
    with h5py.File(path, "r+") as file:
        group = file["X"]
        for name in ("data", "indices", "indptr"):
            del group[name]
        data = group.create_dataset("data", (n_major * per_major,), np.float32, chunks=(1 << 18,))
        indices = group.create_dataset("indices", (n_major * per_major,), np.int32, chunks=(1 << 18,))
        group["indptr"] = np.arange(n_major + 1, dtype=np.int64) * per_major
        step = max(1, 4_000_000 // per_major)
        gap = n_minor // per_major
        for start in range(0, n_major, step):
            n = min(step, n_major - start)
            values = rng.integers(1, 300, (n, per_major)).astype(np.float32)
            minor = np.arange(per_major) * gap + rng.integers(0, gap, (n, per_major))
            entries = slice(start * per_major, (start + n) * per_major)
            data[entries], indices[entries] = values.ravel(), minor.ravel()
            if layout == "csr":
                totals[start : start + n] = values.sum(1)
            else:
                totals += np.bincount(minor.ravel(), values.ravel(), n_cells)
    return totals


def build_and_check(folder, layout: str, n_bytes: int, limit: int, shape: tuple[int, int]) -> None:
    totals = write_large(folder / "a.h5ad", layout, *shape, n_bytes)
    run = subprocess.run(
        [sys.executable, "-c", BUILD, folder / "s", folder / "a.h5ad", str(limit)], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr[-2000:]
    store = CellStore(folder / "s")
    found = np.concatenate([store.rows(slice(i, i + 1000)).sum(1) for i in range(0, len(store), 1000)])
    np.testing.assert_array_equal(found, totals)


def held_bytes(folder, n_files: int, monkeypatch) -> int:
    """Return the bytes that a build holds when its files are open, and when they are written; it is one file."""
    found = []

    def looked_at(call):
        def call_and_look(*args, **settings):
            gc.collect()
            found.append(tracemalloc.get_traced_memory()[0] + pa.total_allocated_bytes() - before)
            return call(*args, **settings)

        return call_and_look

    with monkeypatch.context() as patch:
        for name in ("unite", "_finish"):
            patch.setattr(store_writer, name, looked_at(getattr(store_writer, name)))
        tracemalloc.start()
        try:
            before = pa.total_allocated_bytes()
            CellStore.build(
                folder / f"s{n_files}",
                [folder / "a.h5ad"] * n_files,
                obs=["label", "score"],
                classes="cluster",
                allow_duplicates=True,
                report=False,
            )
        finally:
            tracemalloc.stop()
    return max(found)


def test_a_build_holds_few_bytes_per_cell_however_many_files(tmp_path, monkeypatch):
    n, n_genes = 5_000, 3_000
    adata = with_genes(AnnData(sparse.csr_matrix((np.ones(n), (range(n), [0] * n)), (n, n_genes), np.float32)))
    adata.obs_names = [f"AAACCTGAGAAACCAT-{i}" for i in range(n)]
    adata.obs["label"] = pd.Categorical.from_codes(np.arange(n) % 3, ["B", "T", "NK"])
    adata.obs["cluster"], adata.obs["score"] = (np.arange(n) % 7).astype(np.int8), np.arange(n, dtype=np.float32)
    for i in range(20):
        adata.obs[f"unused {i}"] = np.arange(n) / 7
    adata.write_h5ad(tmp_path / "a.h5ad")
    _, few, many = (held_bytes(tmp_path, n_files, monkeypatch) for n_files in (1, 2, 8))  # the first imports modules
    # A name takes 25 bytes, the two classes one each, and the score four.
    assert (many - few) / (6 * n) < 45


def test_a_process_is_sent_the_names_and_columns_of_its_own_piece(tmp_path, monkeypatch):
    n, sent = 4_000, []
    cells = with_genes(AnnData(sparse.csr_matrix((np.ones(n), (range(n), [0] * n)), (n, 3), np.float32)))
    cells.obs["score"] = np.arange(n, dtype=np.float64)
    cells.write_h5ad(tmp_path / "a.h5ad")

    def send(function, pieces, **_):
        sent.extend(len(pickle.dumps(piece)) for piece in pieces)
        raise KeyboardInterrupt

    monkeypatch.setattr(store_writer, "run_tasks", send)
    with pytest.raises(KeyboardInterrupt):
        CellStore.build(tmp_path / "s", tmp_path / "a.h5ad", obs="score", workers=2, rows_per_shard=100)
    # A name takes 4 bytes and its end 4, and a score 8: 32,000 for the names of all cells, and as much for the scores.
    assert len(sent) == 40 and max(sent) < 10_000


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["csr", "csc"])
def test_a_file_of_500_mb_in_half_of_that(tmp_path, layout):
    build_and_check(tmp_path, layout, 500 * MB, 250 * MB, (32_000, 10_000))


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["csr", "csc"])
def test_a_file_of_3_gb_in_a_third_of_that(tmp_path, layout):
    build_and_check(tmp_path, layout, 3_000 * MB, 1_000 * MB, (60_000, 20_000))
