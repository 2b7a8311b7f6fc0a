"""Cells per second of `embed`, with packed and with padded batches.

python -m benchmarks embed --h5ad pbmc_ifnb.h5ad --output benchmark_embed.json

The models have random weights, and read the cells of the file in batches of 64 of similar length, on one thread (or a
GPU, in bfloat16). The clock includes reading the counts and tokenizing. Both ways return the same embedding, whose
largest difference is printed. Cells per second of processor time are less noisy where other processes run.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from anndata import read_h5ad

from .data import _n_cores
from .harness import clock, print_table, take_turns


def run(arguments: list[str]) -> None:
    """Let packed and padded batches take turns, print the tables and write them as JSON."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks embed", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--h5ad", required=True, help="file of counts")
    parser.add_argument("--cells", type=int, default=1000, help="number of cells, drawn at random")
    parser.add_argument("--sizes", nargs="+", default=["tiny", "small"], help="of the models")
    parser.add_argument("--schemes", nargs="+", default=["rank", "binned"], help="of the tokens")
    parser.add_argument("--lengths", nargs="+", type=int, default=[256, 1024], help="most tokens per cell")
    parser.add_argument("--turns", type=int, default=3, help="how often each is run")
    parser.add_argument("--output", default="benchmark_embed.json", help="JSON file to write")
    args = parser.parse_args(arguments)
    found: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{os.uname().machine}, {_n_cores()} cores, 1 thread",
        "versions": {name: version(name) for name in ("stformer_hf", "numpy", "torch", "transformers")},
        "cells": f"{args.cells} of {Path(args.h5ad).name}",
        "rows": [],
    }
    for size in args.sizes:
        for scheme in args.schemes:
            for length in args.lengths:
                about = {"size": size, "scheme": scheme, "max_length": length}
                found["rows"].append({**about, **_measure(args.h5ad, args.cells, args.turns, about)})
                Path(args.output).write_text(json.dumps(found, indent=1))
    print(f"\nwritten to {args.output}")


def _measure(h5ad: str, n_cells: int, turns: int, about: dict[str, Any]) -> dict[str, Any]:
    folder = Path(tempfile.mkdtemp(prefix="benchmark-"))
    try:
        _prepare(folder, h5ad, n_cells, **about)
        contenders = {way: ("benchmarks.embed:embed_cells", {"way": way}) for way in ("packed", "padded")}
        results = take_turns(contenders, folder, turns)
        for way, result in results.items():
            result["cells/cpu s"] = round(n_cells / float(np.median(np.loadtxt(folder / f"{way}.txt"))), 1)
        packed, padded = (np.load(folder / f"{way}.npy") for way in contenders)
    finally:
        shutil.rmtree(folder)
    print_table(", ".join(map(str, about.values())), results, "packed", ["cells/cpu s"])
    difference = float(np.abs(packed - padded).max())
    print(f"largest difference: {difference:.1e} (values up to {np.abs(padded).max():.1f})")
    return {"ways": results, "largest_difference": difference}


def _prepare(folder: Path, h5ad: str, n_cells: int, size: str, scheme: str, max_length: int) -> None:
    """Write the cells, and a model with its tokenizer."""
    import torch

    from stformer_hf import CellStore, GeneBertConfig, GeneBertModel, GeneTokenizer, estimate_gene_medians

    cells = read_h5ad(h5ad)
    store = CellStore.build(folder / "store", h5ad, report=False)
    own = {"medians": estimate_gene_medians(store)} if scheme == "rank" else {}
    tokenizer = GeneTokenizer.from_store(store, scheme=scheme, max_length=max_length, **own)
    rows = np.random.default_rng(0).choice(len(cells), min(n_cells, len(cells)), replace=False)
    cells[np.sort(rows)].write_h5ad(folder / "cells.h5ad")
    torch.manual_seed(0)
    GeneBertModel(GeneBertConfig.from_tokenizer(tokenizer, size=size)).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")


def embed_cells(folder: Path, way: str) -> float:
    """Embed the cells with packed or padded batches; return their number."""
    import torch
    from transformers import AutoModel

    from stformer_hf import embed
    from stformer_hf.inference import batches

    torch.set_num_threads(1)
    batches.packs = lambda model: way == "packed"  # instead of the default of the device
    cells = read_h5ad(folder / "cells.h5ad")
    model, tokenizer = batches.load(str(folder / "model"), None, AutoModel)
    dtype = "bfloat16" if torch.cuda.is_available() else None
    embed(cells[:4].copy(), model, tokenizer=tokenizer, dtype=dtype)  # what is done once is not timed
    began = time.process_time()
    with clock():
        embed(cells, model, tokenizer=tokenizer, dtype=dtype)
    with open(folder / f"{way}.txt", "a") as file:
        file.write(f"{time.process_time() - began}\n")
    np.save(folder / f"{way}.npy", cells.obsm["X_stformer"])
    return float(len(cells))
