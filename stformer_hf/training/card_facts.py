"""Facts for the card of a model: the settings and figures of its training, and how they compare with baselines."""

from __future__ import annotations

import platform
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..evaluation.gene_baselines import spread_rows
from ..models.gene_bert.tokenization_gene_bert import GeneTokenizer
from ..store.cell_store import CellStore

_CELLS_FOR_COVERAGE = 1_000
_NOT_OF_THE_MODEL = re.compile(
    r"runtime|_per_second$|^epoch$|preparation_time|^peak_memory|^padding_share$|^data_wait_share$|^mfu$"
)
_BASELINES = {
    "b0": "B0: all genes equally likely",
    "b1": "B1: frequency of the gene in the training cells",
    "b2": "B2: B1 without the visible genes of the cell",
    "b3": "B3: B2 weighted by how close the gene's median is to those at the nearest ranks",
    "uniform": "all bins equally likely",
    "gene_marginal": "distribution of the gene's bins in the training cells",
    "cell_marginal": "distribution of the cell's bins",
    "majority": "most frequent class",
    "logistic_regression": "logistic regression",
    "overall_mean": "mean of the training cells",
    "type_mean": "mean of the cell type in the training cells",
    "neighbor_mean": "mean of the neighbours",
}
_BASELINE = re.compile(rf"(?:(?P<subject>.+)_)?(?P<baseline>{'|'.join(_BASELINES)})_(?P<figure>[a-z0-9_]+)", re.DOTALL)
_FIGURES = {
    "nll": "negative log likelihood, nats",
    "loss": "loss",
    "accuracy": "accuracy",
    "macro_f1": "macro F1",
    "pearson_r": "Pearson r per cell",
}


# ---------------------------------------------------------------------- training


def settings_of(trainer: Any) -> dict[str, Any]:
    """Return the settings of a trainer, by their name on the card."""
    args, collator = trainer.args, trainer.data_collator
    collator = getattr(collator, "collator", collator)  # of a collator of views
    names = {
        "masked genes": "mlm_probability",
        "masked phenotypes": "phenotype_mask_prob",
        "gene dropout": "gene_dropout",
        "label": "label",
        "packed": "packing",
    }
    settings = {key: getattr(collator, name) for key, name in names.items() if hasattr(collator, name)}
    if not (settings.get("masked genes") or settings.get("masked phenotypes")):  # it masks nothing
        settings = {key: value for key, value in settings.items() if not key.startswith("masked ")}
    if getattr(trainer, "objectives", {"mlm": 1.0}) != {"mlm": 1.0}:
        settings["objectives"] = ", ".join(f"{name} {weight:g}" for name, weight in trainer.objectives.items())
    if trainer.sampling is not None:
        settings["sampling"] = ", ".join(
            f"{name} {value if isinstance(value, (str, int, float, dict)) else 'as given'}"
            for name, value in trainer.sampling.items()
        )
    for key, dataset in (("cells in training", trainer.train_dataset), ("cells held out", trainer.eval_dataset)):
        if hasattr(dataset, "__len__") and not isinstance(dataset, dict):
            settings[key] = len(dataset)
    n_batches, budget = args.gradient_accumulation_steps * args.world_size, trainer.max_tokens_per_batch
    precision = "bf16" if args.bf16 else "fp16" if args.fp16 else "fp32"
    weights = str(next(trainer.model.parameters()).dtype).removeprefix("torch.")
    if weights != "float32":
        precision = f"{precision}, weights in {weights}" if args.bf16 or args.fp16 else weights
    return settings | {
        "epochs": round(trainer.state.epoch or 0, 2),
        "steps": trainer.state.global_step,
        "batch": args.train_batch_size * n_batches if budget is None else f"up to {budget * n_batches} tokens",
        "order of the cells": str(getattr(args.train_sampling_strategy, "value", args.train_sampling_strategy)),
        "optimizer": str(getattr(args.optim, "value", args.optim)),
        "learning rate": args.learning_rate,
        "schedule": str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)),
        "weight decay": args.weight_decay,
        "precision": precision,
        "seed": args.seed,
        "seed of the order": trainer.seed_of_order,
    }


def run_of(trainer: Any) -> dict[str, str]:
    """Return the tokens, cells, time, speed and hardware of the training, including the runs that it resumed."""
    args, totals = trainer.args, trainer.throughput.totals
    run = {"tokens seen": f"{totals['tokens']:,}", "cells seen": f"{totals['cells']:,}"}
    if totals["seconds"]:
        run["training time"] = _duration(totals["seconds"])
        run["tokens per second"] = f"{totals['tokens'] / totals['seconds']:,.0f}"
        run["cells per second"] = f"{totals['cells'] / totals['seconds']:,.1f}"
    ends = [entry for entry in trainer.state.log_history if "train_runtime" in entry]
    last: dict[str, Any] = ends[-1] if ends else {}
    for key, name in (("padding_share", "share of padding"), ("mfu", "model FLOPs utilisation, of dense bf16")):
        if f"train_{key}" in last:
            run[name] = f"{last[f'train_{key}']:.1%}"
    if "train_peak_memory_gb" in last:
        run["peak memory per process"] = f"{last['train_peak_memory_gb']:.2f} GB"
    if args.device.type == "cuda":
        run["hardware"] = f"{max(args.n_gpu, 1) * args.world_size} x {torch.cuda.get_device_name(args.device)}"
    else:
        threads = f"{args.device.type}, threads per process: {torch.get_num_threads()}"
        run["hardware"] = f"{args.world_size} x {_cpu()} ({threads})"
    return run


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s"


def _cpu() -> str:
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1] if found else platform.processor() or platform.machine()


def last_metrics(trainer: Any) -> dict[str, Any]:
    """Return the last metrics of evaluation, those of the weights that are kept."""
    history, state = trainer.state.log_history, trainer.state
    ends = [number for number, entry in enumerate(history) if "train_runtime" in entry]
    end = ends[-1] if ends else len(history)
    during, after = history[:end], history[end:]
    if trainer.args.load_best_model_at_end and state.best_global_step:
        during = [entry for entry in during if entry["step"] == state.best_global_step]
    found = {name: value for entry in during + after for name, value in entry.items() if name.startswith("eval_")}
    trained = bool(ends and history[end]["step"])  # a classifier may be left at its start
    return {"train_loss": history[end]["train_loss"], **found} if trained else found


# ---------------------------------------------------------------------- figures


def figures_of(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Keep the figures of the model, without those of its speed."""
    numbers = (int, float, np.integer, np.floating)
    return {
        name: value
        for name, value in metrics.items()
        if isinstance(value, numbers) and not isinstance(value, bool) and not _NOT_OF_THE_MODEL.search(name)
    }


def is_of_baseline(name: str) -> bool:
    """Return whether a metric is that of a baseline."""
    return _BASELINE.fullmatch(name.removeprefix("eval_")) is not None


def compare(metrics: Mapping[str, Any]) -> tuple[list[dict[str, Any]], set[str]]:
    """Pair each figure of the model with those of its baselines; return also the names of the metrics used.

    A dict has `figure`, `better` ("lower" or "higher"), `model` (value), `baselines` (name -> value), and those of
    them that the model does not beat, `unbeaten`.
    """
    figures = figures_of(metrics)
    found: dict[str, dict[str, Any]] = {}
    used = set()
    for name, value in figures.items():
        of = _BASELINE.fullmatch(name.removeprefix("eval_"))
        if of is None:
            continue
        subject, figure = of["subject"], of["figure"]
        own = [f"{subject}_{figure}" if subject else figure]
        if figure == "nll":
            own += [f"{subject or 'genes'}_nll", f"{subject or 'genes'}_loss", *([] if subject else ["loss"])]
        prefix = "eval_" if name.startswith("eval_") else ""
        key = next((prefix + key for key in own if prefix + key in figures), None)
        if key is None:
            continue
        what = (subject or "").replace("_", " ")
        if key.endswith("loss") and subject is None and not key.endswith("genes_loss"):
            what = "counts of masked cells, per gene"
        elif figure == "nll" and subject in (None, "genes"):
            what = "masked genes"
        title = ": ".join(filter(None, [what, _FIGURES.get(figure, figure.replace("_", " "))]))
        better = "lower" if figure in ("nll", "loss") else "higher"
        entry = {"figure": title, "better": better, "model": figures[key], "baselines": {}, "unbeaten": {}}
        entry, baseline = found.setdefault(key, entry), _BASELINES[of["baseline"]]
        entry["baselines"][baseline] = value
        if not (figures[key] < value if entry["better"] == "lower" else figures[key] > value):
            entry["unbeaten"][baseline] = value
        used |= {name, key}
    return list(found.values()), used


def gene_coverage(store: CellStore, tokenizer: GeneTokenizer) -> dict[str, float]:
    """Compute how many of the genes of a store a tokenizer knows.

    Return the shares of the store's `genes`, of the tokenizer's (`vocabulary`), and of the `counts` in at most 1,000
    evenly spaced cells.
    """
    found = tokenizer.find_genes(store.gene_ids, store.genes.symbols)
    rows = spread_rows(len(store), _CELLS_FOR_COVERAGE)
    counts = np.asarray(store.rows(rows).sum(axis=0), np.float64).ravel()
    return {
        "genes": float((found >= 0).mean()),
        "vocabulary": len(np.unique(found[found >= 0])) / len(tokenizer.genes),
        "counts": float(counts[found >= 0].sum() / counts.sum()) if counts.sum() else 0.0,
    }
