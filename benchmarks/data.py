"""Cells at rest and in motion: building a store and reading batches of it, against the loaders that people use.

Made once and kept in `--folder`: an h5ad file of synthetic cells (100,000 x 20,000, about 2,000 counts a cell), whose
counts are mostly small, as real ones are.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import h5py
import numpy as np
from anndata import AnnData
from scipy import sparse
from torch.utils.data import DataLoader

from .harness import clock, installed, print_table, take_turns

if TYPE_CHECKING:
    import torch

BATCH = 64
N_GENES = 20_000
PEERS = {"bionemo-scdl": "bionemo.scdl", "scDataset": "scdataset"}


def run(arguments: list[str]) -> None:
    """Make the data, let all take turns, print the tables and write them as JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks data", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="10,000 cells instead of 100,000, and one turn")
    parser.add_argument("--turns", type=int, default=3, help="how often each is run")
    parser.add_argument("--folder", help="where the data are kept; a temporary folder by default")
    parser.add_argument("--output", default="benchmark_data.json", help="JSON file to write")
    args = parser.parse_args(arguments)
    n_cells, turns = (10_000, 1) if args.quick else (100_000, args.turns)
    folder = Path(args.folder or tempfile.mkdtemp(prefix="benchmark-"))
    folder = folder / f"{n_cells}-cells"
    folder.mkdir(parents=True, exist_ok=True)
    try:
        _make_cells(folder / "cells.h5ad", n_cells)
        here = {name for name, module in PEERS.items() if installed(module)}
        for name in sorted(PEERS.keys() - here):
            print(f"{name} is not installed: left out")
        building = take_turns(_builders(here), folder, turns)
        for label, name in (("CellStore.build", "store"), ("bionemo-scdl, paged", "scdl")):
            if label in building:
                building[label]["disk MB"] = round(_size(folder / name) / 1e6)
        _make_memory_map(folder)
        reading = take_turns(_readers(here), folder, turns)
        blocks = take_turns(_block_readers(here), folder, turns)
    finally:
        if args.folder is None:
            shutil.rmtree(folder.parent)
    about = {
        "cells": n_cells,
        "genes": N_GENES,
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{platform.processor() or platform.machine()}, {_n_cores()} cores",
        "versions": {name: version(name) for name in ("stformer_hf", "torch", "datasets", *sorted(here))},
    }
    print(f"\n{n_cells:,} cells x {N_GENES:,} genes, medians of {turns} turns, {about['machine']}, {about['date']}")
    print_table("Building from h5ad", building, "CellStore.build", ["disk MB"])
    print_table(f"Batches of {BATCH} random rows, DataLoader", reading, "CellStore, DataLoader")
    print_table(f"Batches of {BATCH} rows in shuffled blocks of 16", blocks, "CellStore, BlockShuffleSampler")
    tables = {"building": building, "random rows": reading, "blocks of 16": blocks}
    Path(args.output).write_text(json.dumps({**about, "tables": tables}, indent=1))
    print(f"\nwritten to {args.output}")


def _n_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _size(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


# ---------------------------------------------------------------------- the data


def _blocks(n_cells: int, rows: int = 5_000) -> Iterator[sparse.csr_matrix]:
    """Cells of 1,000 to 3,000 expressed genes; three in five counts are 1, one in 420 is over 255."""
    rng = np.random.default_rng(0)
    for start in range(0, n_cells, rows):
        lengths = rng.integers(1_000, 3_000, min(rows, n_cells - start))
        indptr = np.concatenate([[0], np.cumsum(lengths)])
        # Each cell expresses every k-th gene from a random one on, shifted here and there: sorted and distinct.
        gaps = np.repeat(N_GENES // lengths, lengths)
        within = np.arange(indptr[-1]) - np.repeat(indptr[:-1], lengths)
        indices = within * gaps + rng.integers(0, 1 << 30, len(within)) % gaps
        counts = np.minimum(rng.zipf(2.0, len(indices)), 4_000).astype(np.float32)
        yield sparse.csr_matrix((counts, indices.astype(np.int32), indptr), shape=(len(lengths), N_GENES))


def _make_cells(path: Path, n_cells: int) -> None:
    """Write the h5ad file, block by block."""
    if path.exists():
        return
    part = path.with_suffix(".part")
    obs_names = np.array([f"cell{i}" for i in range(n_cells)])
    empty = AnnData(sparse.csr_matrix((n_cells, N_GENES), dtype=np.float32))
    empty.obs_names = obs_names
    empty.var_names = [f"ENSG{i:011d}" for i in range(N_GENES)]
    empty.write_h5ad(part)
    with h5py.File(part, "r+") as file:
        group = file["X"]
        for name, dtype in (("data", np.float32), ("indices", np.int32)):
            del group[name]
            group.create_dataset(name, (0,), dtype, maxshape=(None,), chunks=(1 << 16,))
        indptr = [np.zeros(1, np.int64)]
        for block in _blocks(n_cells):
            for name in ("data", "indices"):
                group[name].resize(group[name].shape[0] + block.nnz, axis=0)
                group[name][-block.nnz :] = getattr(block, name)
            indptr.append(indptr[-1][-1] + block.indptr[1:].astype(np.int64))
        del group["indptr"]
        group["indptr"] = np.concatenate(indptr)
    part.rename(path)


def _make_memory_map(folder: Path) -> None:
    """Write what a bare memory map is: indptr, int32 columns and float32 values in plain files."""
    if (folder / "map_indptr.npy").exists():
        return
    with h5py.File(folder / "cells.h5ad") as file:
        group, step = file["X"], 1 << 24
        for name, dtype in (("indices", np.int32), ("data", np.float32)):
            n = group[name].shape[0]
            target = np.memmap(folder / f"map_{name}", dtype, "w+", shape=(n,))
            for start in range(0, n, step):
                target[start : start + step] = group[name][start : start + step]
            target.flush()
        np.save(folder / "map_indptr.npy", group["indptr"][:])


# ---------------------------------------------------------------------- building


def _builders(here: set[str]) -> dict:
    ours = {
        "CellStore.build": ("benchmarks.data:build_ours", {}),
        "CellStore.build, 2 workers": ("benchmarks.data:build_ours", {"workers": 2}),
    }
    return {**ours, **({"bionemo-scdl, paged": ("benchmarks.data:build_scdl", {})} if "bionemo-scdl" in here else {})}


def build_ours(folder: Path, workers: int = 1) -> float:
    """Build our store."""
    from stformer_hf import CellStore

    shutil.rmtree(folder / "store", ignore_errors=True)
    with clock():
        store = CellStore.build(folder / "store", folder / "cells.h5ad", workers=workers)
    return len(store)


def build_scdl(folder: Path) -> float:
    """Convert with bionemo-scdl, page by page, as its documents advise for large files."""
    from bionemo.scdl.io.single_cell_memmap_dataset import SingleCellMemMapDataset

    shutil.rmtree(folder / "scdl", ignore_errors=True)
    with clock():
        data = SingleCellMemMapDataset(
            str(folder / "scdl"),
            str(folder / "cells.h5ad"),
            paginated_load_cutoff=0,
            load_block_row_size=10_000,
            use_X_not_raw=True,
        )
        data.save()
    return data.number_of_rows()


# ---------------------------------------------------------------------- reading


def _readers(here: set[str]) -> dict:
    readers = {
        "CellStore, DataLoader": ("benchmarks.data:read_ours", {}),
        "CellStore, DataLoader, 2 workers": ("benchmarks.data:read_ours", {"workers": 2}),
        "bare int32 + float32 memory map, DataLoader": ("benchmarks.data:read_memory_map", {}),
        "bare memory map, DataLoader, 2 workers": ("benchmarks.data:read_memory_map", {"workers": 2}),
        "Hugging Face dataset, numpy format": ("benchmarks.data:read_hugging_face", {}),
        "backed AnnData, a sorted read a batch": ("benchmarks.data:read_backed", {}),
    }
    if "bionemo-scdl" in here:
        readers["bionemo-scdl, DataLoader"] = ("benchmarks.data:read_scdl", {})
        readers["bionemo-scdl, DataLoader, 2 workers"] = ("benchmarks.data:read_scdl", {"workers": 2})
    if "scDataset" in here:
        readers["scDataset on backed AnnData"] = ("benchmarks.data:read_sc_dataset", {"block_size": 1})
    return readers


def _block_readers(here: set[str]) -> dict:
    readers = {"CellStore, BlockShuffleSampler": ("benchmarks.data:read_ours", {"block_size": 16})}
    if "scDataset" in here:
        readers["scDataset on backed AnnData"] = ("benchmarks.data:read_sc_dataset", {"block_size": 16})
    return readers


def _pass(loader: Iterable[Any], size: Callable, n_batches: int | None = None) -> float:
    """Read an epoch (or some batches) to map the files, and time another; `size` gives the cells of a batch."""
    for _ in itertools.islice(loader, n_batches):
        pass
    with clock():
        return sum(size(batch) for batch in itertools.islice(loader, n_batches))


class _Rows:
    """Reads the same batches in every pass."""

    def __init__(self, read: Callable, order: np.ndarray):
        self._read, self._order = read, order

    def __iter__(self) -> Iterator:
        return map(self._read, self._order)


def _warm(*files: Path) -> None:
    """Bring files into the page cache, so that all read from memory."""
    for file in files:
        with open(file, "rb") as opened:
            while opened.read(1 << 24):
                pass


def read_ours(folder: Path, workers: int = 0, block_size: int = 1) -> float:
    """Read through our store's `__getitems__` and `collate_cells`."""
    from stformer_hf import BlockShuffleSampler, CellStore, collate_cells

    store = CellStore(folder / "store")
    _warm(*store.path.glob("*.arrow"))
    loader = DataLoader(
        store,
        batch_size=BATCH,
        sampler=BlockShuffleSampler(store, block_size=block_size, seed=0),
        collate_fn=collate_cells,
        num_workers=workers,
        persistent_workers=workers > 0,
    )
    return _pass(loader, lambda batch: len(batch["cell_id"]))


class MemoryMap:
    """A bare memory map of CSR: the least that a loader has to do."""

    def __init__(self, folder: Path):
        self.indptr = np.load(folder / "map_indptr.npy")
        self.indices = np.memmap(folder / "map_indices", np.int32, "r")
        self.data = np.memmap(folder / "map_data", np.float32, "r")

    def __len__(self) -> int:
        return len(self.indptr) - 1

    def __getitems__(self, rows: Sequence[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Copy rows out, flat."""
        numbers = np.asarray(rows)
        starts, stops = self.indptr[numbers], self.indptr[numbers + 1]
        runs = list(zip(starts.tolist(), stops.tolist(), strict=True))
        indptr = np.concatenate([[0], np.cumsum(stops - starts)])
        indices = np.concatenate([self.indices[start:stop] for start, stop in runs])
        return indptr, indices, np.concatenate([self.data[start:stop] for start, stop in runs])


def read_memory_map(folder: Path, workers: int = 0) -> float:
    """Read int32 and float32 through the same DataLoader."""
    _warm(folder / "map_indices", folder / "map_data")
    loader = DataLoader(
        MemoryMap(folder),
        batch_size=BATCH,
        shuffle=True,
        collate_fn=tensors_of,
        num_workers=workers,
        persistent_workers=workers > 0,
    )
    return _pass(loader, lambda batch: len(batch[0]) - 1)


def tensors_of(arrays: Iterable[np.ndarray]) -> list[torch.Tensor]:
    """Make tensors of arrays."""
    import torch

    return [torch.from_numpy(array) for array in arrays]


def read_hugging_face(folder: Path) -> float:
    """Read our store as a plain Hugging Face dataset in numpy format."""
    from datasets import load_from_disk

    dataset = load_from_disk(str(folder / "store")).with_format("numpy", columns=["genes", "counts"])
    _warm(*(folder / "store").glob("*.arrow"))
    order = np.random.default_rng(0).permutation(len(dataset))[: 200 * BATCH].reshape(-1, BATCH)
    return _pass(_Rows(dataset.__getitem__, order), lambda batch: len(batch["genes"]))


def read_backed(folder: Path) -> float:
    """Read a backed AnnData, the rows of a batch at once and in order."""
    from anndata import read_h5ad

    _warm(folder / "cells.h5ad")
    adata = read_h5ad(folder / "cells.h5ad", backed="r")
    order = np.random.default_rng(0).permutation(adata.n_obs)[: 20 * BATCH].reshape(-1, BATCH)
    return _pass(_Rows(lambda rows: adata.X[np.sort(rows)], order), lambda batch: batch.shape[0])


def read_scdl(folder: Path, workers: int = 0) -> float:
    """Read with bionemo-scdl and its collate function."""
    from bionemo.scdl.io.single_cell_memmap_dataset import SingleCellMemMapDataset
    from bionemo.scdl.util.torch_dataloader_utils import collate_sparse_matrix_batch

    _warm(*(file for file in (folder / "scdl").iterdir() if file.is_file()))
    data = SingleCellMemMapDataset(str(folder / "scdl"))
    loader = DataLoader(
        data,
        batch_size=BATCH,
        shuffle=True,
        collate_fn=collate_sparse_matrix_batch,
        num_workers=workers,
        persistent_workers=workers > 0,
    )
    return _pass(loader, lambda batch: batch.shape[0])


def read_sc_dataset(folder: Path, block_size: int) -> float:
    """Read with scDataset, 16 batches a fetch."""
    from anndata import read_h5ad
    from scdataset import BlockShuffling, scDataset

    _warm(folder / "cells.h5ad")
    adata = read_h5ad(folder / "cells.h5ad", backed="r")
    data = scDataset(
        adata,
        BlockShuffling(block_size=block_size),
        batch_size=BATCH,
        fetch_factor=16,
        fetch_callback=lambda adata, rows: adata[rows].X,
        batch_callback=lambda fetched, rows: fetched[rows],
    )
    return _pass(DataLoader(data, batch_size=None), lambda batch: batch.shape[0], 64 if block_size > 1 else 16)
