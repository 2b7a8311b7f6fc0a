"""Networks of gene pairs: agreement with co-expression, stability over seeds, time and memory.

python -m benchmarks network --h5ad pbmc_ifnb.h5ad --output benchmark_network.json

For each seed, a model of the recipe `cell_tiny_cpu` is pretrained on the cells of the file. It scores the pairs of the
genes that most cells express, in all cells, on one thread, in a process of its own. Agreement is with the absolute
correlation of log-normalised counts; stability is that between two models.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
import time
from importlib.metadata import version
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import spearmanr

from .data import _n_cores
from .harness import clock, print_table, take_turns

METHODS = ("attention", "gradient")
MANY_EDGES, FEW_EDGES = 1000, 100


def run(arguments: list[str]) -> None:
    """Pretrain, score, print the tables and write them as JSON."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks network", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--h5ad", required=True, type=Path, help="file of counts")
    parser.add_argument("--steps", type=int, default=100, help="of pretraining")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="one model for each")
    parser.add_argument("--genes", type=int, default=300, help="of the network: those that most cells express")
    parser.add_argument("--targets", type=int, default=1, help="gradient: reading genes per cell")
    parser.add_argument("--output", default="benchmark_network.json", help="JSON file to write")
    args = parser.parse_args(arguments)
    folder = Path(tempfile.mkdtemp(prefix="benchmark-"))
    settings = {"genes": args.genes, "targets": args.targets}
    h5ad = str(args.h5ad.resolve())
    try:
        models = {
            f"pretrain, seed {seed}": (
                "benchmarks.network:pretrain",
                {"h5ad": h5ad, "seed": seed, "steps": args.steps},
            )
            for seed in args.seeds
        }
        pretrained = take_turns(models, folder, 1)
        contenders = {
            f"{method}, seed {seed}": (
                "benchmarks.network:score",
                {"h5ad": h5ad, "seed": seed, "method": method, **settings},
            )
            for method in METHODS
            for seed in args.seeds
        }
        scored = take_turns(contenders, folder, 1)
        found: dict[str, Any] = {
            "date": time.strftime("%Y-%m-%d"),
            "machine": f"{os.uname().machine}, {_n_cores()} cores, 1 thread",
            "versions": {name: version(name) for name in ("stformer_hf", "numpy", "torch", "transformers")},
            "settings": {"cells": args.h5ad.name, "steps": args.steps, "seeds": args.seeds, **settings},
            "pretrained": pretrained,
            "scored": scored,
            "methods": {method: _compare(folder, method, args.seeds) for method in METHODS},
        }
    finally:
        shutil.rmtree(folder)
    print_table(f"networks of {args.genes} genes", scored, next(iter(scored)))
    print(pd.DataFrame(found["methods"]).to_string())
    Path(args.output).write_text(json.dumps(found, indent=1))
    print(f"\nwritten to {args.output}")


def pretrain(folder: Path, h5ad: str, seed: int, steps: int) -> float:
    """Pretrain a model; return the number of cells that it read."""
    import torch

    from stformer_hf.cli import main

    torch.set_num_threads(1)
    words = ["--config", "cell_tiny_cpu", "--data", h5ad, "--max_steps", steps, "--seed", seed]
    with clock():
        failed = main(
            ["pretrain", *map(str, words), "--baselines", "false", "--output", str(folder / f"model_{seed}")]
        )
    if failed:
        raise RuntimeError("pretraining failed")
    return steps * 32.0


def score(folder: Path, h5ad: str, seed: int, method: str, genes: int, targets: int) -> float:
    """Make a network and keep it; return the number of cells."""
    import torch
    from anndata import read_h5ad

    from stformer_hf import gene_network

    torch.set_num_threads(1)
    cells = read_h5ad(h5ad, backed="r")
    began = time.process_time()
    with clock():
        network = gene_network(str(folder / f"model_{seed}"), cells, genes=genes, method=method, n_targets=targets)
    seconds = time.process_time() - began
    edges, (coexpression,) = network.edges(MANY_EDGES), network.coexpression.values()
    np.savez(
        folder / f"{method}_{seed}.npz",
        scores=network.scores["all"],
        edges=(edges["source"] + " " + edges["target"]).to_numpy(str),
        of_edges=edges["coexpression"].abs().median(),
        of_all=np.nanmedian(np.abs(coexpression[np.triu_indices(len(coexpression), 1)])),
        cpu_seconds=seconds,
        **network.agreement().iloc[0].drop("group").astype(float),
    )
    return float(cells.n_obs)


def _compare(folder: Path, method: str, seeds: list[int]) -> dict[str, Any]:
    """Return the figures of each model, and those of all pairs of models."""
    from stformer_hf.inference.gene_states import symmetric

    kept = [dict(np.load(folder / f"{method}_{seed}.npz")) for seed in seeds]
    figures: dict[str, Any] = {
        name: [float(one[name]) for one in kept]
        for name in ("n_pairs", "spearman", "top_share", "of_edges", "of_all", "cpu_seconds")
    }
    stability: dict[str, list[float]] = {"spearman": [], "top_share": [], "same_edges": []}
    for one, other in combinations(kept, 2):
        scores = [symmetric(of["scores"]) for of in (one, other)]
        known = np.isfinite(scores).all(axis=0)
        scores = [of[known] for of in scores]
        n_top = len(scores[0]) // 100
        first, second = (np.argsort(-of, kind="stable")[:n_top] for of in scores)
        stability["spearman"].append(float(spearmanr(*scores).statistic))
        stability["top_share"].append(len(np.intersect1d(first, second)) / n_top)
        stability["same_edges"].append(float(len(np.intersect1d(*(of["edges"][:FEW_EDGES] for of in (one, other))))))
    return {**figures, **{f"stability_{name}": of for name, of in stability.items()}}
