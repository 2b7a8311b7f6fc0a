"""A file that is larger than the memory allowed becomes a store, whatever its layout."""

import subprocess
import sys

import h5py
import numpy as np
import pytest
from anndata import AnnData
from conftest import with_genes
from scipy import sparse

from stformer_hf import CellStore

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


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["csr", "csc"])
def test_a_file_of_500_mb_in_half_of_that(tmp_path, layout):
    build_and_check(tmp_path, layout, 500 * MB, 250 * MB, (32_000, 10_000))


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["csr", "csc"])
def test_a_file_of_3_gb_in_a_third_of_that(tmp_path, layout):
    build_and_check(tmp_path, layout, 3_000 * MB, 1_000 * MB, (60_000, 20_000))
