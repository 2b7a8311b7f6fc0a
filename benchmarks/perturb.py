"""Perturbation in silico: speed, memory, drivers of a simulation, interferon genes of PBMC, groups without an effect.

Speed and memory: simulated cells, a GeneBert of size small with a whole-cell `[CLS]` and 256 attended tokens. One at a
time means: edit the counts of one cell, call `embed` on it. Its residual branches are random in the rows that read
tokens, and 0 (the spectral start) in the rows that need `[CLS]` alone.
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
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from anndata import AnnData, read_h5ad
from scipy import sparse
from scipy.stats import spearmanr

from .data import _n_cores
from .harness import clock, print_table, take_turns

if TYPE_CHECKING:
    from stformer_hf import GeneBertModel, GeneTokenizer

# Genes that interferon induces in blood cells; chosen before any result was seen, from the hallmark of the response
# to interferon alpha (Liberzon et al. 2015).
INTERFERON = (
    *("ISG15", "ISG20", "IFI6", "IFIT1", "IFIT2", "IFIT3", "MX1", "MX2", "OAS1", "OASL", "LY6E", "IFITM1", "IFITM2"),
    *("IFITM3", "IRF7", "IFI35", "IFI44L", "B2M", "BST2", "TRIM22", "STAT1", "STAT2", "SP110", "UBE2L6", "PSMB9"),
)
N_GENES, MAX_LENGTH = 2000, 256


def run(arguments: list[str]) -> None:
    """Measure, print the tables and write them as JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks perturb", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="5 genes x 10 cells, and one simulation")
    parser.add_argument("--turns", type=int, default=1, help="how often each is run")
    parser.add_argument("--interferon", help="pbmc_ifnb.h5ad; left out by default")
    parser.add_argument("--parts", nargs="+", default=["speed", "simulation", "interferon", "no_effect"])
    parser.add_argument("--output", default="benchmark_perturb.json", help="JSON file to write")
    args = parser.parse_args(arguments)
    found = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{os.uname().machine}, {_n_cores()} cores",
        "versions": {name: version(name) for name in ("stformer_hf", "numpy", "torch", "transformers")},
    }
    if Path(args.output).exists():
        found = {**json.loads(Path(args.output).read_text()), **found}
    parts = {
        "speed": lambda: _speed(args.quick, args.turns),
        "simulation": lambda: _simulations(1 if args.quick else 3),
        "interferon": lambda: _interferon(args.interferon),
        "no_effect": lambda: _no_effect(args.interferon),
    }
    for part in args.parts:
        if part in ("interferon", "no_effect") and not args.interferon:
            continue
        found[part] = parts[part]()
        Path(args.output).write_text(json.dumps(found, indent=1))
    print(f"\nwritten to {args.output}")


# ---------------------------------------------------------------------- speed


def _speed(quick: bool, turns: int) -> dict:
    folder = Path(tempfile.mkdtemp(prefix="benchmark-"))
    n_genes, n_cells = (5, 10) if quick else (20, 50)
    most, fewer, many = (20, 5, 20) if quick else (200, 50, 1000)
    size = {"n_genes": n_genes, "n_cells": n_cells}
    contenders = {
        "grid, packed": ("benchmarks.perturb:grid", {**size, "start": "random"}),
        "grid, packed, bfloat16": ("benchmarks.perturb:grid", {**size, "start": "random", "dtype": "bfloat16"}),
        "one at a time": ("benchmarks.perturb:one_at_a_time", {**size, "start": "random"}),
        "one at a time, bfloat16": (
            "benchmarks.perturb:one_at_a_time",
            {**size, "start": "random", "dtype": "bfloat16"},
        ),
        "grid, [CLS] alone": ("benchmarks.perturb:grid", {**size, "start": "zero"}),
        f"grid, [CLS] alone, {fewer} genes": ("benchmarks.perturb:grid", {**size, "n_genes": fewer, "start": "zero"}),
        f"grid, [CLS] alone, {most} genes": ("benchmarks.perturb:grid", {**size, "n_genes": most, "start": "zero"}),
        f"grid, [CLS] alone, {most} genes x {many:,} cells": (
            "benchmarks.perturb:grid",
            {"n_genes": most, "n_cells": many, "start": "zero"},
        ),
    }
    try:
        _prepare(folder)
        results = take_turns(contenders, folder, turns)
        exact, half, one = (
            np.load(folder / f"{way}_random_{n_genes}.npy") for way in ("grid_float32", "grid_bfloat16", "one_float32")
        )
    finally:
        shutil.rmtree(folder)
    print_table(f"{n_genes} genes x {n_cells} cells: edited cells a second", results, "grid, packed")
    found = {
        "largest_difference": float(np.abs(exact - one).max()),
        "largest_difference_bfloat16": float(np.abs(half - exact).max()),
        "rank_correlation_bfloat16": float(spearmanr(half, exact).statistic),
        "largest_shift": float(exact.max()),
        "smallest_shift": float(exact.min()),
    }
    print("mean shifts of the genes: " + ", ".join(f"{name} {value:.2g}" for name, value in found.items()))
    return {"rows": results, **found}


def _prepare(folder: Path) -> None:
    """Write cells and a checkpoint whose residual branches are random, and one where they are 0."""
    import torch

    from stformer_hf import GeneBertConfig, GeneBertModel, GeneTokenizer, initialise_from_store
    from stformer_hf.models.gene_bert.configuration_gene_bert import WHOLE_CELL

    rng = np.random.default_rng(0)
    rates = rng.lognormal(-1.5, 1.2, N_GENES)[None] * rng.lognormal(0, 0.4, (1000, N_GENES))
    counts = sparse.csr_matrix(rng.poisson(rates).astype(np.float32))
    cells = AnnData(counts, var=pd.DataFrame(index=[f"ENSG{i:011d}" for i in range(N_GENES)]))
    cells.obs_names = [f"c{i}" for i in range(1000)]
    cells.write_h5ad(folder / "cells.h5ad")
    tokenizer = GeneTokenizer(
        cells.var_names.tolist(), bin_edges=[0.5, 1.5, 2.5, 4.5, 8.5], max_length=MAX_LENGTH, whole_cell=True
    )
    for start in ("zero", "random"):
        torch.manual_seed(0)
        fields = {**WHOLE_CELL, "pooling": "cls"} | ({"residual_init": "normal"} if start == "random" else {})
        model = GeneBertModel(GeneBertConfig.from_tokenizer(tokenizer, size="small", **fields))
        initialise_from_store(model, tokenizer, cells)
        model.save_pretrained(folder / start)
        tokenizer.save_pretrained(folder / start)


def _cells_and_genes(folder: Path, n_genes: int, n_cells: int) -> tuple[AnnData, list[str]]:
    """Return cells, and genes that many of them express."""
    cells = read_h5ad(folder / "cells.h5ad")[:n_cells].copy()
    often = np.argsort(-np.diff(cells.X.tocsc().indptr), kind="stable")
    return cells, cells.var_names[often[:n_genes]].tolist()


def grid(folder: Path, n_genes: int, n_cells: int, start: str, dtype: str = "float32") -> float:
    """Perturb with the grid; return the number of edited cells."""
    from stformer_hf import GeneTokenizer, perturb
    from stformer_hf.training.loading import load_model

    cells, genes = _cells_and_genes(folder, n_genes, n_cells)
    model, tokenizer = load_model(folder / start), GeneTokenizer.from_pretrained(folder / start)
    with clock():
        table = perturb(cells, model, genes, tokenizer=tokenizer, n_null=0, dtype=dtype)
    np.save(folder / f"grid_{dtype}_{start}_{n_genes}.npy", table["shift"].to_numpy())
    return float(table["n_changed"].sum())


def one_at_a_time(folder: Path, n_genes: int, n_cells: int, start: str, dtype: str = "float32") -> float:
    """Edit and embed one cell after the other, with the same outputs; return the number of edited cells."""
    from stformer_hf import GeneTokenizer, embed
    from stformer_hf.training.loading import load_model

    cells, genes = _cells_and_genes(folder, n_genes, n_cells)
    model, tokenizer = load_model(folder / start), GeneTokenizer.from_pretrained(folder / start)
    shifts, n_edited = np.zeros((len(genes), n_cells)), 0

    def state(cell: AnnData) -> np.ndarray:
        embed(cell, model, tokenizer=tokenizer, dtype=dtype)
        found = cell.obsm["X_stformer"][0].astype(np.float64)
        return found / np.linalg.norm(found)

    with clock():
        before = [state(cells[i].copy()) for i in range(n_cells)]
        for i, gene in enumerate(genes):
            column = cells.var_names.get_loc(gene)
            for j in range(n_cells):
                if cells.X[j, column]:
                    cell = cells[j].copy()
                    counts = cell.X.toarray()
                    counts[0, column] = 0
                    cell.X = sparse.csr_matrix(counts)
                    shifts[i, j] = 1 - state(cell) @ before[j]
                    n_edited += 1
    np.save(folder / f"one_{dtype}_{start}_{n_genes}.npy", shifts.mean(axis=1))
    return float(n_edited)


# ---------------------------------------------------------------------- drivers by construction


def simulate(n_donors: int, n_cells: int, n_genes: int, n_drivers: int, donor_sd: float, seed: int) -> AnnData:
    """Simulate cells of sick and healthy donors.

    Drivers are three times as high in the sick; with `donor_sd`, all genes differ among donors by that standard
    deviation of the log rate.
    """
    rng = np.random.default_rng(seed)
    donors = np.repeat(np.arange(n_donors), n_cells)
    sick = donors % 2 == 0
    rates = rng.lognormal(-1.0, 1.0, n_genes)[None] * np.exp(rng.normal(0, donor_sd, (n_donors, n_genes)))[donors]
    drivers = np.isin(np.arange(n_genes), rng.choice(n_genes, n_drivers, replace=False))
    rates[np.ix_(sick, drivers)] *= 3
    counts = rng.poisson(rates * rng.lognormal(0, 0.3, len(donors))[:, None])
    obs = pd.DataFrame({"state": np.where(sick, "sick", "healthy"), "donor": [f"d{donor}" for donor in donors]})
    obs.index = [f"c{i}" for i in range(len(donors))]
    var = pd.DataFrame({"driver": drivers}, index=[f"ENSG{i:011d}" for i in range(n_genes)])
    return AnnData(sparse.csr_matrix(counts.astype(np.float32)), obs=obs, var=var)


def _started(cells: AnnData) -> tuple[GeneBertModel, GeneTokenizer]:
    """Return a tiny model at its spectral start, and its tokenizer."""
    from stformer_hf import GeneBertConfig, GeneBertModel, GeneTokenizer, initialise_from_store
    from stformer_hf.models.gene_bert.configuration_gene_bert import WHOLE_CELL

    tokenizer = GeneTokenizer(_ids(cells), bin_edges=[0.5, 1.5, 2.5, 4.5, 8.5], max_length=MAX_LENGTH, whole_cell=True)
    model = GeneBertModel(GeneBertConfig.from_tokenizer(tokenizer, size="tiny", **WHOLE_CELL, pooling="cls"))
    initialise_from_store(model, tokenizer, cells)
    return model, tokenizer


def _ids(cells: AnnData) -> list[str]:
    from stformer_hf.sources.open_source import open_source

    return open_source(cells).genes.gene_ids.tolist()


def _simulations(n_draws: int) -> list[dict]:
    """Recall and false positives, over draws, with and without drivers and donor effects."""
    from stformer_hf import perturb

    rows = []
    for n_drivers, donor_sd in ((25, 0.0), (25, 0.2), (25, 0.4), (0, 0.0), (0, 0.4)):
        for seed in range(n_draws):
            cells = simulate(16, 25, 500, n_drivers, donor_sd, seed)
            model, tokenizer = _started(cells)
            donor_key = "donor" if donor_sd else None
            table = perturb(
                cells, model, tokenizer=tokenizer, goal_key="state", goal="healthy", donor_key=donor_key, seed=seed
            )
            driver = cells.var.loc[table.index, "driver"].to_numpy()
            row: dict[str, float | None] = {
                "drivers": n_drivers,
                "donor_sd": donor_sd,
                "seed": seed,
                "genes": len(table),
            }
            for name, fdr in (
                ("model", "fdr"),
                ("pca", "pca_goal_shift_fdr"),
                ("linear", "linear_probability_fdr"),
            ):
                called = (table[fdr] < 0.05).to_numpy()
                row[f"{name}_recall"] = float(called[driver].mean()) if n_drivers else None
                row[f"{name}_false"] = int(called[~driver].sum())
            row["share_p_05"] = float((table["p"][~driver] < 0.05).mean())
            rows.append(row)
            print(row, flush=True)
    return rows


# ---------------------------------------------------------------------- interferon


def _interferon(path: str, n_cells: int = 300) -> dict:
    """Delete interferon genes in stimulated PBMC, together and alone; the goal is the unstimulated cells."""
    from stformer_hf import perturb

    cells = read_h5ad(path)
    rng = np.random.default_rng(0)
    rows = [rng.choice(np.flatnonzero(cells.obs["condition"] == name), n_cells, False) for name in ("stim", "ctrl")]
    cells = cells[np.concatenate(rows)].copy()
    model, tokenizer = _started(cells)
    found = {}
    stimulated = cells[cells.obs["condition"] == "stim"]
    detected = np.diff(stimulated.X.tocsc().indptr)
    there = [gene for gene in INTERFERON if detected[stimulated.var_names == gene].sum()]
    settings = {"tokenizer": tokenizer, "goal_key": "condition", "goal": "ctrl", "n_null": 25}
    table = perturb(cells, model, {**{gene: [gene] for gene in there}, "all": there}, **settings)
    for name, of, fdr in (
        ("model", "goal_shift", "fdr"),
        ("pca", "pca_goal_shift", "pca_goal_shift_fdr"),
        ("linear", "linear_probability", "linear_probability_fdr"),
    ):
        z = "z" if name == "model" else f"{of}_z"
        single = table.drop(index="all")
        found[name] = {
            "all_genes": [float(table.loc["all", column]) for column in (of, f"{of}_low", f"{of}_high", z)],
            "to_control": int((single[of] > 0).sum()),
            "below_fdr_05": int(((single[fdr] < 0.05) & (single[of] > 0)).sum()),
            "below_fdr_10": int(((single[fdr] < 0.1) & (single[of] > 0)).sum()),
            "genes": len(single),
            "median_z": float(single[z].median()),
        }
    found["single"] = json.loads(table[["n_changed", "goal_shift", "z", "fdr"]].to_json(orient="index"))
    print(json.dumps({name: of for name, of in found.items() if name != "single"}, indent=1))
    return found


def _no_effect(path: str, n_splits: int = 10, n_cells: int = 300, n_genes: int = 150, least: int = 15) -> list[dict]:
    """Split unstimulated PBMC at random into perturbed cells and goal, so that no gene can move them to the goal."""
    from stformer_hf import perturb

    cells = read_h5ad(path)
    rng = np.random.default_rng(0)
    cells = cells[rng.choice(np.flatnonzero(cells.obs["condition"] == "ctrl"), n_cells, False)].copy()
    model, tokenizer = _started(cells)
    rows = []
    for split in range(n_splits):
        cells.obs["half"] = np.where(rng.random(n_cells) < 0.5, "start", "goal")
        expressed = np.diff(cells[cells.obs["half"] == "start"].X.tocsc().indptr)
        expressed = cells.var_names[expressed >= least].tolist()
        for way, genes, n_null in (
            ("genes drawn for the null", rng.choice(expressed, n_genes, False).tolist(), 25),
            ("all genes", expressed, 0),
        ):
            table = perturb(cells, model, genes, tokenizer=tokenizer, goal_key="half", goal="goal", n_null=n_null)
            row: dict[str, str | int | float] = {"split": split, "compared": way, "genes": len(table)}
            for name in (
                "p",
                "p_matched",
                "p_cells",
                "fdr",
                "shift_fdr",
                "pca_goal_shift_fdr",
                "linear_probability_fdr",
            ):
                row[name] = float((table[name] < 0.05).mean())
            rows.append(row)
            print(row, flush=True)
    return rows
