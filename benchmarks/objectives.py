"""What each objective adds to a whole-cell model that begins at the spectral start, at equal CPU time.

A tiny whole-cell GeneBert is started at the principal components of about 15,000 cells of blood and of fetal tissues
(their genes united by Ensembl id), and trained on them with each objective alone and with pairs, each time from the
same start, for as many minutes of CPU on one thread. The embedding of cells that no run has seen is scored by the
accuracy of 15 nearest neighbours and of a linear probe (logistic regression), each by the same five folds, and by the
adjusted Rand index of Leiden clusters at resolution 1. One seed: differences of about a standard error say nothing.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

SETTINGS = {
    "size": "tiny",
    "max_length": 34,  # [CLS], 32 genes, [EOS]; [CLS] has the whole cell
    "learning_rate": 3e-4,
    "warmup_steps": 20,
    "batch": 64,  # cells
    "held_out_plates": 0.25,
    "least_cells": 20,  # of a fetal cell type, among the cells held out
    "resolution": 1.0,
}
# In this order, so that a run that is cut short has the objectives alone.
RUNS = [
    ({"contrast": 1.0}, "disjoint"),
    ({"decode": 1.0}, "disjoint"),
    ({"cross_correlation": 1.0}, "thinning"),
    ({"mlm": 1.0}, "-"),
    ({"contrast": 1.0}, "thinning"),
    ({"decode": 1.0}, "thinning"),
    ({"cross_correlation": 1.0}, "disjoint"),
    ({"mlm": 1.0, "contrast": 1.0}, "disjoint"),
    ({"mlm": 1.0, "decode": 1.0}, "disjoint"),
    ({"contrast": 1.0, "decode": 1.0}, "disjoint"),
    ({"decode": 1.0, "cross_correlation": 1.0}, "thinning"),
    ({"mlm": 1.0, "cross_correlation": 1.0}, "thinning"),
    ({"contrast": 1.0, "cross_correlation": 1.0}, "thinning"),
]


def run(arguments: list[str]) -> None:
    """Train with each objective, score, print the table and write it as JSON and Markdown after each run."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks objectives",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--blood", required=True, help="h5ad of blood cells, var with ensembl_id (pbmc_ifnb.h5ad)")
    parser.add_argument("--fetal", required=True, help="h5ad of fetal cells, obs with batch and cell_type")
    parser.add_argument("--citeseq", help="10x h5 of genes and antibodies, for recipes/citeseq_types.py")
    parser.add_argument("--minutes", type=float, default=15.0, help="of CPU, for each run")
    parser.add_argument("--seed", type=int, default=0, help="of the split, the order, the masks and the views")
    parser.add_argument("--runs", type=int, default=len(RUNS), help="how many of the runs, from the first on")
    parser.add_argument(
        "--output", default="benchmark_objectives.json", help="JSON file; the table goes to .md beside"
    )
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        _run(args, Path(folder))


def _run(args: argparse.Namespace, folder: Path) -> None:
    from transformers import set_seed

    from stformer_hf import GeneBertConfig, GeneBertForPhenotypicMLM, GeneTokenizer
    from stformer_hf.training.spectral_start import initialise_from_store

    store, sets = _cells(args, folder)
    tokenizer = GeneTokenizer.from_store(store, whole_cell=True, max_length=SETTINGS["max_length"])
    set_seed(args.seed)
    config = GeneBertConfig.from_tokenizer(tokenizer, size=SETTINGS["size"], hidden_dropout_prob=0.0)
    start = GeneBertForPhenotypicMLM(config)
    initialise_from_store(start, tokenizer, store)
    about = {
        "cells": len(store),
        "genes": len(tokenizer.genes),
        "evaluated": {name: cells.n_obs for name, cells in sets.items()},
        "cpu_minutes": args.minutes,
        "seed": args.seed,
        **SETTINGS,
        "date": time.strftime("%Y-%m-%d"),
        "versions": {name: version(name) for name in ("stformer_hf", "torch", "transformers")},
    }
    rows = [{"objectives": "step 0", "view": "-", "scores": score(start, tokenizer, sets, args.seed)}]
    _write(args.output, about, rows)
    for objectives, view in RUNS[: args.runs]:
        model = copy.deepcopy(start)
        figures = _train(model, tokenizer, store, objectives, view, args, folder)
        scores = score(model, tokenizer, sets, args.seed)
        rows.append({"objectives": " + ".join(objectives), "view": view, **figures, "scores": scores})
        _write(args.output, about, rows)
    print(table(rows))


def _cells(args: argparse.Namespace, folder: Path) -> tuple:
    """Make the store of the training cells, and the labelled cells to score on."""
    import anndata

    from stformer_hf import CellStore
    from stformer_hf.cli.demo import load_cells

    blood, fetal = anndata.read_h5ad(args.blood), anndata.read_h5ad(args.fetal)
    plates = np.unique(fetal.obs["batch"])
    n_out = round(len(plates) * SETTINGS["held_out_plates"])
    held_out = fetal.obs["batch"].isin(np.random.default_rng(args.seed).permutation(plates)[:n_out]).to_numpy()
    parts = []
    for cells in (blood, fetal[~held_out].copy()):
        cells.var_names = cells.var["ensembl_id"].astype(str)
        cells.obs = cells.obs[[]]
        parts.append(cells[:, ~cells.var_names.duplicated()].copy())
    store = CellStore.build(folder / "store", parts)
    demo = load_cells()[0]
    demo.obs["cell_type"] = demo.obs["bulk_labels"]
    sets = {"demo": demo, "fetal, plates held out": _of_common_types(fetal[held_out].copy())}
    if args.citeseq:
        sys.path.insert(0, str(Path(__file__).parents[1] / "recipes"))
        from citeseq_types import labelled_cells

        sets["citeseq"] = labelled_cells(args.citeseq, folder)
    return store, sets


def _of_common_types(cells):
    """Choose the cells of types that are not too rare, by their Ensembl ids."""
    cells.var_names = cells.var["ensembl_id"].astype(str)
    cells = cells[:, ~cells.var_names.duplicated()]
    sizes = cells.obs["cell_type"].value_counts()
    return cells[cells.obs["cell_type"].isin(sizes[sizes >= SETTINGS["least_cells"]].index)].copy()


def _train(model, tokenizer, store, objectives: dict, view: str, args: argparse.Namespace, folder: Path) -> dict:
    """Train for the minutes of CPU; returns what the last log and the clock say."""
    from transformers import TrainerCallback, TrainingArguments

    from stformer_hf import STFormerPretrainer

    class StopInTime(TrainerCallback):
        """Ends the training when its CPU time is used up."""

        def on_train_begin(self, args_, state, control, **kwargs):
            self.end = time.process_time() + 60 * args.minutes

        def on_step_end(self, args_, state, control, **kwargs):
            control.should_training_stop = time.process_time() > self.end

    settings = TrainingArguments(
        str(folder / "run"),
        max_steps=10**6,
        per_device_train_batch_size=SETTINGS["batch"],
        learning_rate=SETTINGS["learning_rate"],
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=SETTINGS["warmup_steps"],
        weight_decay=0.0,
        logging_steps=10,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
        seed=args.seed,
    )
    trainer = STFormerPretrainer(
        settings,
        store,
        model=model,
        processing_class=tokenizer,
        objectives=objectives,
        **({} if view == "-" else {"view": view}),
        callbacks=[StopInTime()],
    )
    trainer.train()
    if trainer.interrupted:
        raise SystemExit("Told to end (SIGTERM): the run has not had its time, and is left out.")
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    told = [name for name in logs[0] if name.endswith("_loss") or name in _FIGURES]
    return {
        "steps": trainer.state.global_step,
        "epochs": round(trainer.state.epoch, 2),
        "first": {name: logs[0][name] for name in told},
        "last": {name: logs[-1][name] for name in told if name in logs[-1]},
    }


_FIGURES = ("contrast_of_totals", "effective_rank", "total_r2")


def score(model, tokenizer, sets: dict, seed: int) -> dict[str, dict[str, float]]:
    """Score the embeddings of labelled cells."""
    import scanpy as sc
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import adjusted_rand_score
    from sklearn.model_selection import StratifiedKFold, cross_val_score
    from sklearn.neighbors import KNeighborsClassifier

    from stformer_hf import embed
    from stformer_hf.training.objectives.watch import effective_rank

    scores = {}
    for name, cells in sets.items():
        embed(cells, model, tokenizer=tokenizer, key_added="X", device="cpu")
        states, types = cells.obsm["X"], cells.obs["cell_type"].astype(str).to_numpy()
        folds = StratifiedKFold(5, shuffle=True, random_state=seed)
        sc.pp.neighbors(cells, n_neighbors=15, use_rep="X", random_state=seed)
        sc.tl.leiden(
            cells,
            SETTINGS["resolution"],
            flavor="igraph",
            n_iterations=2,
            directed=False,
            random_state=seed,
            key_added="found",
        )
        scores[name] = {
            "knn": float(cross_val_score(KNeighborsClassifier(15), states, types, cv=folds).mean()),
            "probe": float(cross_val_score(LogisticRegression(max_iter=2000), states, types, cv=folds).mean()),
            "ari": float(adjusted_rand_score(types, cells.obs["found"])),
            "effective_rank": effective_rank(torch.from_numpy(states)),
        }
    return scores


def table(rows: list[dict]) -> str:
    """Write the table in Markdown: 15-NN / linear probe / ARI of each run, and the largest of each column in bold."""
    sets = list(rows[0]["scores"])
    names = ("knn", "probe", "ari")
    best = {(of, name): max(row["scores"][of][name] for row in rows) for of in sets for name in names}

    def cell(row: dict, of: str) -> str:
        figures = [(name, row["scores"][of][name]) for name in names]
        told = [f"**{value:.3f}**" if value == best[of, name] else f"{value:.3f}" for name, value in figures]
        return f"{' / '.join(told)} ({row['scores'][of]['effective_rank']:.0f})"

    lines = [
        f"| objectives | views | steps | {' | '.join(sets)} |",
        "|---" * (3 + len(sets)) + "|",
        *(
            f"| {row['objectives']} | {row['view']} | {row.get('steps', 0)} | "
            + " | ".join(cell(row, of) for of in sets)
            + " |"
            for row in rows
        ),
    ]
    return "\n".join(lines)


def _write(output: str, about: dict, rows: list[dict]) -> None:
    Path(output).write_text(json.dumps({**about, "rows": rows}, indent=1))
    note = "15-NN / linear probe / ARI (effective rank) of cells that no run has seen; "
    note += f"{about['cpu_minutes']:g} minutes of CPU per run, one thread, seed {about['seed']}."
    Path(output).with_suffix(".md").write_text(f"{note}\n\n{table(rows)}\n")
    print(json.dumps(rows[-1]), flush=True)
