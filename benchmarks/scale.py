"""Stores from 10^4 to 10^7 cells, and stores larger than the memory allowed, read from a cold disk.

python -m benchmarks scale --folder scale --output benchmark_scale.json

"sizes": cost per cell of building, opening, lengths, one epoch's order, random and block-shuffled batches, and tokens,
on cells of about 300 expressed genes. One h5ad file of 100,000 cells is given as often as needed, so that only the
store grows. "copies" is what the memory itself takes for random batches: as many bytes, copied from as many places.

"larger than memory": cells of about 2,000 expressed genes. Each reader runs with a quarter of the plain store's size
as its memory, page cache included (in a control group; where none can be made, the table says that there was no
limit), and with a cold cache. Beside the speed stands the quality of the shuffle: the entropy of a label in batches of
64, where the store is sorted by 20 labels, and the mean distance in the store of cells that follow each other in the
epoch; both relative to random rows.

"workers": random cells of about 2,000 expressed genes through a DataLoader with 0, 1 and 2 workers: rows alone, in
batches of 64 (also read eight at a time), 256 and 1,024, and batches of 64 that are tokenized, masked, padded or
packed.

"codecs": such cells in Arrow files with and without compression, by rows per record batch, beside our rows, in memory.
A random cell needs the decompression of its whole record batch.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from anndata import AnnData
from scipy import sparse

from .data import BATCH, N_GENES, _make_cells, _make_memory_map, _n_cores, build_scdl
from .harness import clock, installed, take_turns

FILE = 100_000  # cells of the file that is given as often as needed
LABELS = 20
READ = 20_000  # cells that a reader reads
SECONDS = 30  # after which it stops, and those that it has read count
PARTS = ("build", "open", "lengths", "order", "random", "copies", "blocks", "tokens")


def run(arguments: list[str]) -> None:
    """Make the data, let all take turns, print the tables and write them as JSON."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks scale", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    measures = {"sizes": sizes, "memory": memory, "workers": workers, "codecs": codecs}
    parser.add_argument("--tables", nargs="+", choices=measures, default=list(measures))
    parser.add_argument("--cells", type=int, nargs="+", default=[10_000, 100_000, 1_000_000], help="of sizes")
    parser.add_argument("--memory_cells", type=int, default=256_000, help="cells of the table larger than memory")
    parser.add_argument("--loader_cells", type=int, default=100_000, help="cells of the tables workers and codecs")
    parser.add_argument("--turns", type=int, default=3, help="how often each is run")
    parser.add_argument("--folder", help="where the data are kept; a temporary folder by default")
    parser.add_argument("--output", default="benchmark_scale.json", help="JSON file to write")
    args = parser.parse_args(arguments)
    folder = Path(args.folder or tempfile.mkdtemp(prefix="benchmark-"))
    folder.mkdir(parents=True, exist_ok=True)
    about: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"),
        "cores": _n_cores(),
        "versions": {
            name: version(name)
            for name in ("stformer_hf", "torch", "datasets", *(["annbatch"] if installed("annbatch") else []))
        },
        "tables": {},
    }
    output = Path(args.output)
    if output.exists():
        about["tables"] = json.loads(output.read_text())["tables"]
    try:
        for table in args.tables:
            about["tables"][table] = measures[table](folder, args)
            output.write_text(json.dumps(about, indent=1))
    finally:
        if args.folder is None:
            shutil.rmtree(folder)
    print(f"\nwritten to {output}")


# ---------------------------------------------------------------------- sizes


def sizes(folder: Path, args: argparse.Namespace) -> dict:
    """Measure the cost per cell at each size."""
    found: dict[str, dict] = {}
    turns = args.turns
    for n_cells in args.cells:
        here = folder / f"sizes-{n_cells}"
        here.mkdir(exist_ok=True)
        _small_cells(here.parent / f"file-{min(n_cells, FILE)}.h5ad", min(n_cells, FILE))
        contenders = {part: (f"benchmarks.scale:{part}_part", {"n_cells": n_cells}) for part in PARTS}
        build = {"build": contenders.pop("build")}  # once, where it takes long
        results = take_turns(build, here, turns if n_cells < 5_000_000 else 1) | take_turns(contenders, here, turns)
        found[str(n_cells)] = {
            part: {
                "us_per_cell": 1e6 / result["cells_per_second"],
                "peak_mb": result["peak_mb"],
                "us_per_cell_of_runs": [1e6 * run["seconds"] / run["cells"] for run in result["runs"]],
            }
            for part, result in results.items()
        }
        bytes_on_disk = sum(file.stat().st_size for file in (here / "store").iterdir())
        found[str(n_cells)]["disk"] = {"bytes_per_cell": bytes_on_disk / n_cells}
        shutil.rmtree(here)
    print(f"\nmicroseconds per cell (peak private MB), medians of {turns} turns")
    print(f"{'cells':>12}" + "".join(f"{part:>18}" for part in PARTS))
    for n, row in found.items():
        shown = (f"{row[part]['us_per_cell']:.3f} ({row[part]['peak_mb']:.0f})" for part in PARTS)
        print(f"{int(n):>12,}" + "".join(f"{text:>18}" for text in shown))
    return found


def _small_cells(path: Path, n_cells: int) -> None:
    """Write a file of cells with about 300 expressed genes."""
    if path.exists():
        return
    rng = np.random.default_rng(0)
    lengths = rng.integers(150, 450, n_cells)
    indptr = np.concatenate([[0], np.cumsum(lengths)])
    gaps = np.repeat(N_GENES // lengths, lengths)
    within = np.arange(indptr[-1]) - np.repeat(indptr[:-1], lengths)
    indices = (within * gaps + rng.integers(0, 1 << 30, len(within)) % gaps).astype(np.int32)
    counts = np.minimum(rng.zipf(2.0, len(indices)), 4_000).astype(np.float32)
    adata = AnnData(sparse.csr_matrix((counts, indices, indptr), shape=(n_cells, N_GENES)))
    adata.obs_names = [f"cell{i}" for i in range(n_cells)]
    adata.var_names = [f"ENSG{i:011d}" for i in range(N_GENES)]
    adata.obs["label"] = np.array([f"type {i}" for i in range(LABELS)])[np.arange(n_cells) * LABELS // n_cells]
    adata.write_h5ad(path.with_suffix(".part"))
    path.with_suffix(".part").rename(path)


def build_part(folder: Path, n_cells: int) -> float:
    """Build a store."""
    from stformer_hf import CellStore

    files = [folder.parent / f"file-{min(n_cells, FILE)}.h5ad"] * max(1, n_cells // FILE)
    shutil.rmtree(folder / "store", ignore_errors=True)
    with clock():
        store = CellStore.build(folder / "store", files, obs=["label"], allow_duplicates=True, report=False)
    return len(store)


def open_part(folder: Path, n_cells: int) -> float:
    """Open a store."""
    from stformer_hf import CellStore

    with clock():
        store = CellStore(folder / "store")
    return len(store)


def lengths_part(folder: Path, n_cells: int) -> float:
    """Read the lengths of all cells."""
    from stformer_hf import CellStore

    store = CellStore(folder / "store")
    with clock():
        lengths = store.lengths
    return len(lengths)


def order_part(folder: Path, n_cells: int) -> float:
    """Go through one epoch's order in shuffled blocks."""
    from stformer_hf import BlockShuffleSampler, CellStore

    store = CellStore(folder / "store")
    with clock():
        n = sum(1 for _ in BlockShuffleSampler(store))
    return n


def random_part(folder: Path, n_cells: int, block_size: int = 1) -> float:
    """Read random batches from memory, or as much of the store as stays there."""
    from stformer_hf import BlockShuffleSampler, CellStore, collate_cells

    store = CellStore(folder / "store")
    rows = list(itertools.islice(BlockShuffleSampler(store, block_size), READ))
    batches = [rows[start : start + BATCH] for start in range(0, len(rows), BATCH)]
    for batch in batches * 2:  # into memory, and once more: for some batches after a wait, pages are asked for
        store.__getitems__(batch)
    with clock():
        for batch in batches:
            collate_cells(store.__getitems__(batch))
    return len(rows)


def copies_part(folder: Path, n_cells: int) -> float:
    """Copy as many bytes as random batches have, from random places of the store's files, genes and counts apart."""
    rng = np.random.default_rng(0)
    files = [np.memmap(file, np.uint8, "r").data for file in sorted((folder / "store").glob("data-*.arrow"))]
    size = sum(map(len, files)) // n_cells // 2  # of the genes, or the counts, of a cell
    places = [
        [files[file][start : start + size] for start in rng.integers(0, len(files[file]) - size, 2)]
        for file in rng.choice(len(files), READ, p=np.array([*map(len, files)]) / sum(map(len, files)))
    ]
    batches = [list(itertools.chain.from_iterable(places[at : at + BATCH])) for at in range(0, READ, BATCH)]
    for batch in batches:
        bytearray().join(batch)
    with clock():
        for batch in batches:
            bytearray().join(batch)
    return READ


def blocks_part(folder: Path, n_cells: int) -> float:
    """Read batches in shuffled blocks."""
    return random_part(folder, n_cells, 16)


def tokens_part(folder: Path, n_cells: int) -> float:
    """Tokenize cells from all over the store."""
    from stformer_hf import BlockShuffleSampler, CellStore, GeneTokenizer

    store = CellStore(folder / "store")
    tokenizer = GeneTokenizer(genes=store.gene_ids, scheme="binned", bin_edges=[0.5, 1.5, 3.5], max_length=512)
    rows = list(itertools.islice(BlockShuffleSampler(store), READ))
    with clock():
        for start in range(0, len(rows), 256):
            tokenizer(store.__getitems__(rows[start : start + 256]))
    return len(rows)


# ---------------------------------------------------------------------- workers


BATCHES = {
    "rows (collate_cells), batches of 64": ("rows", 64),
    "the same, read 8 at a time (small_batches)": ("small", 64),
    "rows, batches of 256": ("rows", 256),
    "rows, batches of 1,024": ("rows", 1024),
    "tokenized, masked and padded, batches of 64": ("padded", 64),
    "tokenized, masked and packed, batches of 64": ("packed", 64),
}
WORKERS = (0, 1, 2)


def workers(folder: Path, args: argparse.Namespace) -> dict:
    """Measure the same batches with 0, 1 and 2 workers."""
    folder = _loader_folder(folder, args.loader_cells)
    contenders = {
        (label, n): ("benchmarks.scale:load", {"kind": kind, "batch_size": batch_size, "n_workers": n})
        for label, (kind, batch_size) in BATCHES.items()
        for n in WORKERS
    }
    results = take_turns(contenders, folder, args.turns)
    found: dict[str, dict] = {label: {} for label in BATCHES}
    for (label, n), result in results.items():
        found[label][str(n)] = {
            "cells_per_second": result["cells_per_second"],
            "cells_per_second_of_runs": [run["cells"] / run["seconds"] for run in result["runs"]],
            "peak_mb": result["peak_mb"],
        }
    print(f"\ncells/s of a DataLoader, medians of {args.turns} turns")
    print(f"{'':<45}" + "".join(f"{n:>10} workers" for n in WORKERS))
    for label, row in found.items():
        print(f"{label:<45}" + "".join(f"{row[str(n)]['cells_per_second']:>18,.0f}" for n in WORKERS))
    return {"cells": args.loader_cells, "rows": found}


def _loader_folder(folder: Path, n_cells: int) -> Path:
    folder = folder / f"loader-{n_cells}"
    folder.mkdir(exist_ok=True)
    _make_cells(folder / "cells.h5ad", n_cells)
    _stores(folder, ["store", "compact"])
    return folder


def load(folder: Path, kind: str, batch_size: int, n_workers: int) -> float:
    """Read batches through a DataLoader, once to start the workers and warm up, and once timed."""
    from torch.utils.data import DataLoader

    from stformer_hf import CellStore, DataCollatorForPhenotypicMLM, GeneTokenizer, collate_cells, small_batches

    store = CellStore(folder / "store")
    collate, is_tokenized = collate_cells, kind in ("padded", "packed")
    if is_tokenized:
        tokenizer = GeneTokenizer(genes=store.gene_ids, scheme="binned", bin_edges=[0.5, 1.5, 3.5], max_length=2048)
        collate = DataCollatorForPhenotypicMLM(tokenizer, packing=kind == "packed")
    loader = DataLoader(
        store,
        8 * batch_size if kind == "small" else batch_size,
        sampler=store.block_shuffle(1)[: READ if is_tokenized else 5 * READ].tolist(),
        collate_fn=collate,
        num_workers=n_workers,
        persistent_workers=n_workers > 0,
    )

    def read() -> None:
        for _ in small_batches(loader, batch_size) if kind == "small" else loader:
            pass

    read()
    with clock():
        read()
    return len(loader.sampler)


# ---------------------------------------------------------------------- codecs


def codecs(folder: Path, args: argparse.Namespace) -> dict:
    """Measure bytes and reading of cells in Arrow files, by codec and rows per record batch."""
    folder = _loader_folder(folder, args.loader_cells)
    ways: dict[str, dict] = {
        "CellStore": {"store": "store"},
        "CellStore, compact=True": {"store": "compact"},
    }
    for codec in (None, "lz4", "zstd"):
        for n_rows in (1000, 100, 10):
            ways[f"Arrow, {codec or 'no codec'}, {n_rows:,} cells per record batch"] = {
                "codec": codec,
                "n_rows": n_rows,
            }
    sizes_of = {label: _write_codec(folder, **way) for label, way in ways.items()}
    contenders = {
        (label, order): ("benchmarks.scale:read_codec", {**way, "order": order})
        for label, way in ways.items()
        for order in ("random", "in order")
    }
    results = take_turns(contenders, folder, args.turns)
    found: dict[str, dict] = {label: {"bytes_per_cell": size} for label, size in sizes_of.items()}
    for (label, order), result in results.items():
        found[label][order] = {
            "cells_per_second": result["cells_per_second"],
            "cells_per_second_of_runs": [run["cells"] / run["seconds"] for run in result["runs"]],
        }
    print(f"\n{'':<50}{'bytes/cell':>12}{'random cells/s':>16}{'in order':>12}")
    for label, row in found.items():
        speeds = [row[order]["cells_per_second"] for order in ("random", "in order")]
        print(f"{label:<50}{row['bytes_per_cell']:>12,.0f}{speeds[0]:>16,.0f}{speeds[1]:>12,.0f}")
    return {"cells": READ, "rows": found}


def _codec_file(folder: Path, codec: str | None, n_rows: int) -> Path:
    return folder / f"{codec or 'none'}-{n_rows}.arrow"


def _write_codec(folder: Path, store: str = "store", codec: str | None = None, n_rows: int = 0) -> float:
    """Write the first cells of a store to an Arrow file, if it is not one of ours; return the bytes per cell."""
    import pyarrow as pa

    from stformer_hf import CellStore

    cells = CellStore(folder / store)
    if not n_rows:
        return sum(file.stat().st_size for file in (folder / store).glob("*.arrow")) / len(cells)
    path = _codec_file(folder, codec, n_rows)
    dataset = cells.dataset.select_columns(["genes", "counts"]).with_format("arrow")
    schema = dataset.features.arrow_schema.remove_metadata()
    options = pa.ipc.IpcWriteOptions(compression=codec)
    with pa.ipc.new_file(str(path), schema, options=options) as writer:
        for start in range(0, READ, n_rows):
            writer.write_table(dataset[start : start + n_rows].replace_schema_metadata().combine_chunks())
    return path.stat().st_size / READ


def read_codec(folder: Path, order: str, store: str | None = None, codec: str | None = None, n_rows: int = 0) -> float:
    """Read genes and counts of cells, in batches of random cells or in order, from memory."""
    rows = np.arange(READ) if order == "in order" else np.random.default_rng(0).permutation(READ)
    read = _read_store(folder / store) if store else _read_arrow(_codec_file(folder, codec, n_rows), n_rows)
    for batch in itertools.islice(_batches(rows), 10):  # starts what is started once
        read(batch)
    with clock():
        return sum(read(batch) for batch in _in_time(_batches(rows)))


def _read_store(path: Path) -> Callable[[np.ndarray], int]:
    from stformer_hf import CellStore

    store = CellStore(path)
    return lambda rows: len(store.__getitems__(rows))


def _read_arrow(path: Path, n_rows: int) -> Callable[[np.ndarray], int]:
    """Read rows; a record batch is decompressed once for all cells of a batch, and the last one is kept."""
    import pyarrow as pa

    reader = pa.ipc.open_file(pa.memory_map(str(path)))

    @lru_cache(1)
    def columns(number: int) -> list[tuple[np.ndarray, np.ndarray]]:
        batch = reader.get_batch(number)
        lists = [batch.column(name) for name in ("genes", "counts")]
        return [(of.offsets.to_numpy(), of.values.to_numpy()) for of in lists]

    def read(rows: np.ndarray) -> int:
        found: list[list[np.ndarray]] = [[], []]
        numbers, within = np.divmod(rows, n_rows)
        for i in np.argsort(numbers, kind="stable"):
            for (offsets, values), column in zip(columns(int(numbers[i])), found, strict=True):
                column.append(values[offsets[within[i]] : offsets[within[i] + 1]])
        for column in found:
            np.concatenate(column)
        return len(rows)

    return read


# ---------------------------------------------------------------------- larger than memory


def memory(folder: Path, args: argparse.Namespace) -> dict:
    """Measure readers of cells that the memory cannot hold."""
    folder = folder / f"memory-{args.memory_cells}"
    folder.mkdir(exist_ok=True)
    _make_cells(folder / "cells.h5ad", args.memory_cells)
    _stores(folder)
    _make_memory_map(folder)
    limit = sum(file.stat().st_size for file in (folder / "store").glob("*.arrow")) // 4
    readers: dict[str, dict] = {
        "CellStore, random": {"reader": "ours"},
        "CellStore, blocks of 16": {"reader": "ours", "block_size": 16},
        "CellStore, blocks of 16 in windows of 512": {"reader": "ours", "block_size": 16, "window": 512},
        "compact CellStore, random": {"reader": "ours", "store": "compact"},
        "compact CellStore, blocks of 16": {"reader": "ours", "store": "compact", "block_size": 16},
        "compact CellStore, blocks of 16 in windows of 512": {
            "reader": "ours",
            "store": "compact",
            "block_size": 16,
            "window": 512,
        },
        "shuffled CellStore, in order": {"reader": "ours", "store": "shuffled", "block_size": 0},
        "the same bytes, 16 threads, no cells made": {"reader": "bytes"},
        "bare int32 + float32 memory map, random": {"reader": "memory_map"},
    }
    if installed("scdataset"):
        readers["scDataset on backed AnnData, blocks of 16"] = {"reader": "sc_dataset"}
    if installed("annbatch"):
        if not (folder / "annbatch").exists():
            _make_collection(folder)
        readers["annbatch, chunks of 64 of a shuffled collection"] = {"reader": "annbatch", "store": "shuffled"}
    if installed("bionemo") and installed("bionemo.scdl"):
        if not (folder / "scdl").exists():
            build_scdl(folder)
        readers["bionemo-scdl, random"] = {"reader": "scdl"}
    contenders = {
        label: ("benchmarks.scale:read_cold", {**settings, "limit": limit}) for label, settings in readers.items()
    }
    results = take_turns(contenders, folder, args.turns)
    orders = {label: _order_of(settings, args.memory_cells) for label, settings in readers.items()}
    found = {
        label: {
            "cells_per_second": result["cells_per_second"],
            "cells_per_second_of_runs": [run["cells"] / run["seconds"] for run in result["runs"]],
            "entropy": None if (order := orders[label]) is None else _entropy(order, args.memory_cells),
            "distance": None if order is None else _distance(order, args.memory_cells),
            "peak_mb": result["peak_mb"],
        }
        for label, result in results.items()
    }
    limited = json.loads((folder / "limited.json").read_text())
    sizes_mb = {
        name: round(sum(file.stat().st_size for file in (folder / name).glob("*.arrow")) / 1e6)
        for name in ("store", "compact", "shuffled")
    }
    print(f"\n{args.memory_cells:,} cells, {sizes_mb} MB, memory of {limit / 1e6:.0f} MB: {limited}, cold")
    print(f"{'':<50}{'cells/s':>10}{'entropy':>9}{'distance':>10}{'peak MB':>9}")
    for label, row in found.items():
        quality = f"{'':>19}" if row["entropy"] is None else f"{row['entropy']:>9.3f}{row['distance']:>10.3f}"
        print(f"{label:<50}{row['cells_per_second']:>10,.0f}{quality}{row['peak_mb']:>9,.0f}")
    return {"cells": args.memory_cells, "limit_mb": limit / 1e6, "limited": limited, "mb": sizes_mb, "rows": found}


def _stores(folder: Path, names: Sequence[str] = ("store", "compact", "shuffled")) -> None:
    from stformer_hf import CellStore

    settings = {"store": {}, "compact": {"compact": True}, "shuffled": {"shuffle": True}}
    for name in names:
        if not (folder / name).exists():
            CellStore.build(folder / name, folder / "cells.h5ad", report=False, **settings[name])


def read_cold(
    folder: Path, reader: str, limit: int, store: str = "store", block_size: int = 1, window: int = 1
) -> float:
    """Read cells from a cold cache, in this process, whose memory is limited first."""
    limited = _limit_memory(limit)
    (folder / "limited.json").write_text(json.dumps(limited))
    try:
        if reader == "ours":  # imports, opening
            read = _ours(folder, store, block_size, window)
        else:
            read = _READERS[reader](folder, store, block_size)
        _drop_pages(folder)
        with clock():
            return read()
    finally:
        _drop_pages(folder)


def _rows(n_cells: int, block_size: int, window: int = 1) -> np.ndarray:
    """Return the rows to read: a part of a random order, or for block size 0 the first ones."""
    from stformer_hf.store.block_order import block_order

    return (
        np.arange(min(n_cells, READ))
        if block_size == 0
        else block_order(n_cells, block_size, 0, 0, 0, READ, window=window)
    )


def _batches(rows: np.ndarray) -> Iterator[np.ndarray]:
    return (rows[start : start + BATCH] for start in range(0, len(rows), BATCH))


def _in_time(batches: Iterable) -> Iterator:
    """Yield batches until the time is over."""
    end = time.perf_counter() + SECONDS
    for batch in batches:
        yield batch
        if time.perf_counter() > end:
            break


def _ours(folder: Path, store: str, block_size: int, window: int) -> Callable[[], int]:
    from torch.utils.data import BatchSampler

    from stformer_hf import BlockShuffleSampler, CellStore, collate_cells

    cells = CellStore(folder / store)
    order = BlockShuffleSampler(cells, block_size, window=window) if block_size else range(len(cells))
    batches = BatchSampler(itertools.islice(order, READ), BATCH, drop_last=False)
    return lambda: sum(len(collate_cells(cells.__getitems__(batch))["cell_id"]) for batch in _in_time(batches))


def _bytes(folder: Path, store: str, block_size: int) -> Callable[[], int]:
    """Read as many bytes as a random cell has, from random places, and make nothing of them."""
    files = [(os.open(file, os.O_RDONLY), file.stat().st_size) for file in (folder / store).glob("data-*.arrow")]
    n_cells = json.loads((folder / store / "manifest.json").read_text())["n_cells"]
    size = sum(n for _, n in files) // n_cells
    rng = np.random.default_rng(0)
    places = [(rng.integers(len(files)), rng.random()) for _ in range(READ)]

    def read(place: tuple[int, float]) -> int:
        file, n = files[place[0]]
        return len(os.pread(file, size, int(place[1] * (n - size)))) > 0

    def read_all() -> int:
        for file, _ in files:
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_RANDOM)
        with ThreadPoolExecutor(16) as pool:
            return sum(pool.map(read, places, chunksize=64))

    return read_all


def _memory_map(folder: Path, store: str, block_size: int) -> Callable[[], int]:
    from .data import MemoryMap

    cells = MemoryMap(folder)
    rows = _rows(len(cells), block_size)
    return lambda: sum(len(cells.__getitems__(batch)[0]) - 1 for batch in _in_time(_batches(rows)))


def _sc_dataset(folder: Path, store: str, block_size: int) -> Callable[[], int]:
    """Sixteen batches a fetch, as its authors advise at least."""
    from anndata import read_h5ad
    from scdataset import BlockShuffling, scDataset

    adata = read_h5ad(folder / "cells.h5ad", backed="r")
    data = scDataset(
        adata,
        BlockShuffling(block_size=16),
        batch_size=BATCH,
        fetch_factor=16,
        fetch_callback=lambda adata, rows: adata[rows].X,
        batch_callback=lambda fetched, rows: fetched[rows],
    )

    def read() -> int:
        n = 0
        for batch in _in_time(data):
            n += batch.shape[0]
            if n >= READ:
                break
        return n

    return read


def _make_collection(folder: Path) -> None:
    """Write the cells as annbatch does: shuffled, in sharded zarr."""
    from annbatch import DatasetCollection

    DatasetCollection(folder / "annbatch").add_adatas([folder / "cells.h5ad"], rng=np.random.default_rng(0))


def _annbatch(folder: Path, store: str, block_size: int) -> Callable[[], int]:
    """Sixteen chunks of 64 cells at a time, with the codecs of zarrs, as its authors advise.

    Its defaults, 32 chunks of 512 cells, do not fit into the memory allowed here.
    """
    import zarr
    from annbatch import DatasetCollection, Loader

    zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"})
    loader = Loader(
        batch_size=BATCH, chunk_size=64, preload_nchunks=16, shuffle=True, rng=np.random.default_rng(0)
    ).use_collection(DatasetCollection(folder / "annbatch", mode="r"))

    def read() -> int:
        n = 0
        for batch in _in_time(loader):
            n += batch["X"].shape[0]
            if n >= READ:
                break
        return n

    return read


def _scdl(folder: Path, store: str, block_size: int) -> Callable[[], int]:
    from bionemo.scdl.io.single_cell_memmap_dataset import SingleCellMemMapDataset
    from bionemo.scdl.util.torch_dataloader_utils import collate_sparse_matrix_batch

    data = SingleCellMemMapDataset(str(folder / "scdl"))
    rows = _rows(len(data), 1)
    return lambda: sum(
        collate_sparse_matrix_batch([data[int(row)] for row in batch]).shape[0] for batch in _in_time(_batches(rows))
    )


_READERS = {
    "bytes": _bytes,
    "memory_map": _memory_map,
    "sc_dataset": _sc_dataset,
    "annbatch": _annbatch,
    "scdl": _scdl,
}


def _drop_pages(folder: Path) -> None:
    """Drop the data from the page cache."""
    os.sync()
    for file in folder.rglob("*"):
        if file.is_file():
            opened = os.open(file, os.O_RDONLY)
            os.posix_fadvise(opened, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(opened)


def _limit_memory(limit: int) -> str:
    """Put this process into a control group of limited memory; return what was done."""
    for root, file in (("/sys/fs/cgroup/memory", "memory.limit_in_bytes"), ("/sys/fs/cgroup", "memory.max")):
        group = Path(root) / f"benchmark-{limit}"
        try:
            group.mkdir(exist_ok=True)
            (group / file).write_text(str(limit))
            (group / "cgroup.procs").write_text(str(os.getpid()))
            return "limited by a control group"
        except OSError:
            continue
    return "not limited: no control group could be made"


def _order_of(settings: dict, n_cells: int) -> np.ndarray | None:
    """Return the places in the original order of the cells that a reader reads."""
    if settings.get("store") == "shuffled":
        return np.random.default_rng([0, 0x5F1E]).permutation(n_cells)[:READ]  # as `CellStore.build(shuffle=True)`
    if settings["reader"] == "bytes":
        return None
    if settings["reader"] == "sc_dataset":  # blocks, shuffled within a fetch of 16 batches
        rows = _rows(n_cells, 16)
        fetch = 16 * BATCH
        rng = np.random.default_rng(0)
        return np.concatenate([rng.permutation(rows[start : start + fetch]) for start in range(0, READ, fetch)])
    return _rows(n_cells, settings.get("block_size", 1), settings.get("window", 1))


def _entropy(order: np.ndarray, n_cells: int) -> float:
    """Mean entropy of the label in a batch, relative to random rows."""
    random = np.random.default_rng(1).permutation(n_cells)[: len(order)]
    return _mean_entropy(_batches(order), n_cells) / _mean_entropy(_batches(random), n_cells)


def _mean_entropy(batches: Iterable[np.ndarray], n_cells: int) -> float:
    entropies = []
    for batch in batches:
        shares = np.bincount(batch * LABELS // n_cells, minlength=LABELS) / len(batch)
        shares = shares[shares > 0]
        entropies.append(-(shares * np.log(shares)).sum())
    return float(np.mean(entropies))


def _distance(order: np.ndarray, n_cells: int) -> float:
    """Mean distance between neighbours of the epoch in the store, relative to random rows."""
    random = np.random.default_rng(1).permutation(n_cells)[: len(order)]
    return float(np.abs(np.diff(order)).mean() / np.abs(np.diff(random)).mean())
