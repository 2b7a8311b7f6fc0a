"""Neighbourhoods of cells, and batches of them, against a way of working in pandas.

brainformr is in no package index, so it is reimplemented here from its description: for each cell a scan of
the table for the cells of its section in its box, expression by their labels from the AnnData, and masks by products
of the positions of each neighbourhood. Cells are 500 genes wide, 60 of them expressed; sections have at most 50,000
cells, one in a unit of area. Before the clock starts, both are seen to give the same batches.

A training step of CellTransformer's model (base) takes packed batches, and the same batches with dense masks. Then
packed batches of 64 cells with 100 neighbours and 5,000 genes, 400 of them expressed, are collated and trained on with
sparse expression and with the same expression made dense.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from scipy import sparse

from .data import _n_cores
from .harness import clock, print_table, take_turns

if TYPE_CHECKING:
    from stformer_hf.space.center_mask_sampler import CenterMaskSampler

SECTION, BATCH = 50_000, 32
N_GENES, WIDE_GENES = 500, 5_000
N_EXPRESSED = {N_GENES: 60, WIDE_GENES: 400}
WIDE_NEIGHBORS, WIDE_BATCH = 100, 64
_BATCHES = {"ours": 100, "pandas": 4}  # that are timed
_STEPS = 3


def run(arguments: list[str]) -> None:
    """Make the data, let all take turns, print the tables and write them as JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks space", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="10,000 cells only, 10 and 50 neighbours, and one turn")
    parser.add_argument("--turns", type=int, default=3, help="how often each is run")
    parser.add_argument("--folder", help="where the data are kept; a temporary folder by default")
    parser.add_argument("--output", default="benchmark_space.json", help="JSON file to write")
    args = parser.parse_args(arguments)
    sizes, neighbors, turns = (
        ([10_000], [10, 50], 1) if args.quick else ([10**4, 10**5, 10**6], [10, 50, 250], args.turns)
    )
    folder = Path(args.folder or tempfile.mkdtemp(prefix="benchmark-"))
    folder.mkdir(parents=True, exist_ok=True)
    tables: dict[str, dict] = {}
    try:
        for n_cells in sizes:
            _make_cells(folder, n_cells)
            for k in neighbors:
                tables[f"{n_cells} cells, {k} neighbours"] = _results(folder, n_cells, k, turns)
        steps = {k: _steps(folder, sizes[0], k, turns) for k in neighbors}
        wide = _wide(folder, sizes[0], turns)
    finally:
        if args.folder is None:
            shutil.rmtree(folder)
    about = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{os.uname().machine}, {_n_cores()} cores",
        "versions": {name: version(name) for name in ("stformer_hf", "numpy", "scipy", "pandas", "anndata", "torch")},
    }
    print(f"\nNeighbourhoods a second, medians of {turns} turns, {about['machine']}, {about['date']}")
    for title, results in tables.items():
        for kind, ours in (("items", "items: batches"), ("collate", "collate: packed")):
            print_table(title, {name: found for name, found in results.items() if name.startswith(kind)}, ours)
    for k, results in steps.items():
        print_table(f"Training steps, base model, {BATCH} cells a batch, {k} neighbours", results, "packed")
    for kind, ours in (("collate", "collate: sparse"), ("step", "step: sparse")):
        title = f"{WIDE_BATCH} cells a batch, {WIDE_NEIGHBORS} neighbours, {WIDE_GENES:,} genes"
        print_table(title, {name: found for name, found in wide.items() if name.startswith(kind)}, ours, ["batch MB"])
    growth = {k: _growth(tables, sizes, k) for k in neighbors}
    for k, factor in growth.items():
        print(
            f"{k} neighbours: an item takes {factor:.2f} times as long among {sizes[-1]:,} cells as among {sizes[0]:,}"
        )
    Path(args.output).write_text(
        json.dumps({**about, "tables": tables, "steps": steps, "wide": wide, "growth": growth}, indent=1)
    )
    print(f"\nwritten to {args.output}")


def _results(folder: Path, n_cells: int, k: int, turns: int) -> dict[str, dict]:
    settings = {"n_cells": n_cells, "k": k}
    return take_turns(
        {
            "items: batches": ("benchmarks.space:items_ours", settings),
            "items: one by one": ("benchmarks.space:items_ours", {**settings, "one_by_one": True}),
            "items: pandas": ("benchmarks.space:items_pandas", settings),
            "collate: packed": ("benchmarks.space:collate_ours", {**settings, "packed": True}),
            "collate: masks": ("benchmarks.space:collate_ours", {**settings, "packed": False}),
            "collate: masks, pandas items": ("benchmarks.space:collate_pandas", settings),
        },
        folder,
        turns,
    )


def _steps(folder: Path, n_cells: int, k: int, turns: int) -> dict[str, dict]:
    return take_turns(
        {
            name: ("benchmarks.space:step", {"n_cells": n_cells, "k": k, "packed": name == "packed"})
            for name in ("packed", "masks")
        },
        folder,
        turns,
    )


def _wide(folder: Path, n_cells: int, turns: int) -> dict[str, dict]:
    _make_cells(folder, n_cells, WIDE_GENES)
    kinds = {"sparse": False, "dense": True}
    results = take_turns(
        {
            f"{work}: {kind}": (f"benchmarks.space:{work}_wide", {"n_cells": n_cells, "dense": dense})
            for work in ("collate", "step")
            for kind, dense in kinds.items()
        },
        folder,
        turns,
    )
    for kind, dense in kinds.items():
        (batch,) = _wide_batches(folder, n_cells, 1)
        values = _collate_wide(batch, dense).values()
        size = sum(value.nbytes for value in values if isinstance(value, torch.Tensor))
        for work in ("collate", "step"):
            results[f"{work}: {kind}"]["batch MB"] = round(size / 1e6, 1)
    return results


def _growth(tables: dict[str, dict], sizes: list[int], k: int) -> float:
    few, many = (
        tables[f"{n} cells, {k} neighbours"]["items: batches"]["cells_per_second"] for n in (sizes[0], sizes[-1])
    )
    return few / many


# ---------------------------------------------------------------------- the data


def _make_cells(folder: Path, n_cells: int, n_genes: int = N_GENES) -> None:
    """Write cells as plain arrays."""
    path, n_expressed = folder / f"space-{n_cells}-{n_genes}.npz", N_EXPRESSED[n_genes]
    if path.exists():
        return
    rng = np.random.default_rng(0)
    step = n_genes // n_expressed
    genes = np.arange(n_expressed) * step + rng.integers(0, step, (n_cells, n_expressed))
    sections = np.arange(n_cells) // SECTION
    sides = np.bincount(sections)[sections] ** 0.5
    order = rng.permutation(n_cells)  # sections lie anywhere in the table
    part = path.with_suffix(".part.npz")
    np.savez(
        part,
        genes=genes.astype(np.int32).ravel(),
        counts=rng.geometric(0.4, n_cells * n_expressed).astype(np.float32),
        types=rng.integers(0, 20, n_cells),
        sections=sections[order],
        points=(rng.random((n_cells, 2)) * sides[:, None])[order],
    )
    part.rename(path)


def _tables(folder: Path, n_cells: int, n_genes: int = N_GENES) -> tuple[pd.DataFrame, AnnData]:
    with np.load(folder / f"space-{n_cells}-{n_genes}.npz") as arrays:
        indptr = np.arange(n_cells + 1) * N_EXPRESSED[n_genes]
        counts = sparse.csr_matrix((arrays["counts"], arrays["genes"], indptr), shape=(n_cells, n_genes))
        names = pd.Index([f"cell{i}" for i in range(n_cells)])
        metadata = pd.DataFrame(
            {
                "cell_label": names,
                "cell_type": arrays["types"],
                "x": arrays["points"][:, 0],
                "y": arrays["points"][:, 1],
                "brain_section_label": pd.Categorical(np.char.add("section", arrays["sections"].astype(str))),
            }
        )
    return metadata, AnnData(counts, obs=pd.DataFrame(index=names))


def _batches(n_cells: int, n_batches: int, size: int = BATCH) -> list[list[int]]:
    """Choose the cells of batches at random, as a shuffled `DataLoader` does."""
    cells = np.random.default_rng(1).permutation(n_cells)[: n_batches * size]
    return cells.reshape(-1, size).tolist()


def _time(work: Callable, batches: list, size: int = BATCH) -> float:
    for batch in batches[: max(1, len(batches) // 10)]:
        work(batch)
    with clock():
        for batch in batches:
            work(batch)
    return len(batches) * size


# ---------------------------------------------------------------------- ours


def _sampler(folder: Path, n_cells: int, k: int, n_genes: int = N_GENES) -> CenterMaskSampler:
    from stformer_hf.space.center_mask_sampler import CenterMaskSampler

    return CenterMaskSampler(*_tables(folder, n_cells, n_genes), (k**0.5, k**0.5))


def items_ours(folder: Path, n_cells: int, k: int, one_by_one: bool = False) -> float:
    """Read neighbourhoods, a batch at once or one by one."""
    torch.set_num_threads(1)
    sampler = _sampler(folder, n_cells, k)

    def read_one_by_one(batch: list[int]) -> list:
        return [sampler[item] for item in batch]

    return _time(read_one_by_one if one_by_one else sampler.__getitems__, _batches(n_cells, _BATCHES["ours"]))


def collate_ours(folder: Path, n_cells: int, k: int, packed: bool) -> float:
    """Collate batches that were read before, a few of them many times."""
    from stformer_hf.space.neighborhood_collator import collate_neighborhoods

    torch.set_num_threads(1)
    sampler = _sampler(folder, n_cells, k)
    batches = [sampler.__getitems__(batch) for batch in _batches(n_cells, 10)]
    return _time(lambda batch: collate_neighborhoods(batch, packed=packed), batches * (5 if packed or k < 100 else 1))


def step(folder: Path, n_cells: int, k: int, packed: bool) -> float:
    """Forward, backward and step of the optimizer, on batches that were collated before."""
    from stformer_hf.space.neighborhood_collator import collate_neighborhoods

    sampler = _sampler(folder, n_cells, k)
    batches = [
        collate_neighborhoods(sampler.__getitems__(batch), packed=packed) for batch in _batches(n_cells, _STEPS)
    ]
    return _time(_learner(N_GENES, sampler.n_cell_types), batches)


def _learner(n_genes: int, n_cell_types: int) -> Callable:
    from stformer_hf import CellNeighborhoodConfig, CellNeighborhoodForMaskedCell

    torch.set_num_threads(2)
    torch.manual_seed(0)
    model = CellNeighborhoodForMaskedCell(
        CellNeighborhoodConfig.from_size("base", n_genes=n_genes, n_cell_types=n_cell_types)
    )
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4)

    def learn(batch: dict) -> None:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return learn


def _wide_batches(folder: Path, n_cells: int, n_batches: int) -> list:
    sampler = _sampler(folder, n_cells, WIDE_NEIGHBORS, WIDE_GENES)
    return [sampler.__getitems__(batch) for batch in _batches(n_cells, n_batches, WIDE_BATCH)]


def _collate_wide(batch: Any, dense: bool) -> dict:
    from stformer_hf.space.neighborhood_collator import collate_neighborhoods

    if dense:
        batch = dataclasses.replace(batch, expression=batch.expression.toarray())
    return collate_neighborhoods(batch, packed=True)


def collate_wide(folder: Path, n_cells: int, dense: bool) -> float:
    """Collate batches that were read before."""
    torch.set_num_threads(1)
    batches = _wide_batches(folder, n_cells, 10)
    return _time(lambda batch: _collate_wide(batch, dense), batches, WIDE_BATCH)


def step_wide(folder: Path, n_cells: int, dense: bool) -> float:
    """Collate, forward, backward and step of the optimizer."""
    batches = _wide_batches(folder, n_cells, _STEPS)
    learn = _learner(WIDE_GENES, 20)
    return _time(lambda batch: learn(_collate_wide(batch, dense)), batches, WIDE_BATCH)


# ---------------------------------------------------------------------- pandas


class _PandasSampler:
    """Neighbourhoods by a scan of the table and by labels."""

    def __init__(self, metadata: pd.DataFrame, adata: AnnData, side: float):
        self._metadata, self._adata, self._half = metadata, adata, side / 2

    def __getitem__(self, item: int) -> tuple:
        metadata = self._metadata
        cell = metadata.iloc[item]
        section = metadata[metadata["brain_section_label"] == cell["brain_section_label"]]
        inside = section["x"].between(cell["x"] - self._half, cell["x"] + self._half)
        inside &= section["y"].between(cell["y"] - self._half, cell["y"] + self._half)
        observed = section[inside]
        observed = observed[observed["cell_label"] != cell["cell_label"]]
        expression = self._adata[[*observed["cell_label"], cell["cell_label"]]].X.toarray()
        types = observed["cell_type"].to_numpy()
        return expression[:-1], expression[-1:], types, np.array([cell["cell_type"]])


def _collate_pandas(items: list[tuple]) -> dict:
    """Stack items, and open masks at the products of the positions of each neighbourhood."""
    lengths = [len(item[2]) for item in items]
    n_cells, n_items = sum(lengths), len(items)
    cells = torch.arange(n_cells).split(lengths)
    full = torch.ones((n_cells + 2 * n_items, n_cells + 2 * n_items), dtype=torch.bool)
    pooling = torch.ones((n_items, n_cells + n_items), dtype=torch.bool)
    decoder = torch.ones((2 * n_items, 2 * n_items), dtype=torch.bool)
    for item, own in enumerate(cells):
        tokens = torch.cat([own, torch.tensor([n_cells + item, n_cells + n_items + item])])
        pairs = torch.cartesian_prod(tokens, tokens)
        full[pairs[:, 0], pairs[:, 1]] = False
        pooling[item, own] = False
        decoder[item, n_items + item] = decoder[n_items + item, item] = False
    return {
        "observed_expression": torch.from_numpy(np.concatenate([item[0] for item in items])),
        "masked_expression": torch.from_numpy(np.concatenate([item[1] for item in items])),
        "observed_cell_type": torch.from_numpy(np.concatenate([item[2] for item in items])),
        "masked_cell_type": torch.from_numpy(np.concatenate([item[3] for item in items])),
        "full_mask": full,
        "encoder_mask": full[: n_cells + n_items, : n_cells + n_items],
        "pooling_mask": pooling,
        "decoder_mask": decoder,
    }


def _checked_pandas(folder: Path, n_cells: int, k: int) -> _PandasSampler:
    """Return the sampler of pandas, seen to give our batches."""
    from stformer_hf.space.neighborhood_collator import collate

    torch.set_num_threads(1)
    peer, (batch,) = _PandasSampler(*_tables(folder, n_cells), k**0.5), _batches(n_cells, 1)
    ours = collate(_sampler(folder, n_cells, k).__getitems__(batch))
    for name, values in _collate_pandas([peer[item] for item in batch]).items():
        if not torch.equal(values, ours[name]):
            raise RuntimeError(f"pandas gives another {name} than ours.")
    return peer


def items_pandas(folder: Path, n_cells: int, k: int) -> float:
    """Read neighbourhoods one by one."""
    peer = _checked_pandas(folder, n_cells, k)
    return _time(lambda batch: [peer[item] for item in batch], _batches(n_cells, _BATCHES["pandas"]))


def collate_pandas(folder: Path, n_cells: int, k: int) -> float:
    """Collate items that were read before."""
    peer = _checked_pandas(folder, n_cells, k)
    return _time(_collate_pandas, [[peer[item] for item in batch] for batch in _batches(n_cells, 3)])
