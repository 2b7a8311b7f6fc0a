"""Model cards: facts collected by the program, rendered by a template; nothing is typed by hand."""

from __future__ import annotations

import hashlib
import logging
import math
import platform
import re
import shlex
import unicodedata
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import EvalResult, ModelCardData

from ..genes.whole_files import whole_file
from ..models.gene_bert.tokenization_gene_bert import GeneTokenizer
from ..store.cell_store import CellStore
from .cell_heads import predicts_cells, read_heads
from .loading import is_hub_id, unwrap

logger = logging.getLogger(__name__)

_CELLS_FOR_COVERAGE = 1_000
_LONGEST = 200  # characters of a text that came with the data
_MARK = re.compile(r"<!-- Written by stformer_hf; unchanged as long as its digest is ([0-9a-f]{16}). -->\n?\Z")
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
_METRIC_TYPES = {"macro_f1": "f1"}  # the Hub's names, where they differ


def write_model_card(
    folder: str | Path,
    *,
    model,
    tokenizer: GeneTokenizer | None = None,
    store: CellStore | None = None,
    settings: Mapping[str, Any] | None = None,
    metrics: Mapping[str, Any] | None = None,
    base_model: str | None = None,
    trainer: Any = None,
    name: str | None = None,
    license: str | None = None,
    language: str | Sequence[str] | None = None,
    tags: str | Sequence[str] = (),
    datasets: str | Sequence[str] = (),
    intended_use: str | None = None,
    limits: str | None = None,
) -> Path:
    """Write `README.md` of a checkpoint, with metadata for the Hub.

    A card that was edited, or written by another program, is kept; the new one is then `README.new.md`.

    Parameters
    ----------
    folder : str or Path
        Folder of the checkpoint.
    model : PreTrainedModel
        Model in the checkpoint.
    tokenizer : GeneTokenizer, optional
        Its tokenizer.
    store : CellStore, optional
        Training cells.
    settings : dict, optional
        Settings of training beyond those that the trainer knows, one row of the table per entry.
    metrics : dict, optional
        Results. Those of baselines (`eval_b1_nll`, `eval_majority_accuracy`, …) are shown beside the model's.
    base_model : str, optional
        Checkpoint that training started from.
    trainer : CellTrainer, optional
        Trainer of the model: knows settings, steps, tokens, time, hardware, and figures that `metrics` lacks.
    name : str, optional
        Name to load the model by; the name of the folder by default.
    license, language, tags, datasets : str or sequence of str, optional
        Metadata that the program cannot know; licence and datasets are ids of the Hub.
    intended_use, limits : str, optional
        Paragraphs to add.

    Returns
    -------
    Path
        The card.
    """
    folder = Path(folder)
    text = _render(
        model=model,
        tokenizer=tokenizer,
        store=store,
        settings={**({} if trainer is None else _settings(trainer)), **(settings or {})},
        metrics={**({} if trainer is None else _logged_metrics(trainer)), **(metrics or {})},
        base_model=base_model,
        run={} if trainer is None else _run(trainer),
        name=_plain(name or folder.resolve().name),
        license=license,
        language=language,
        tags=[tags] if isinstance(tags, str) else list(tags),
        datasets=[datasets] if isinstance(datasets, str) else list(datasets),
        intended_use=intended_use,
        limits=limits,
    )
    path = folder / "README.md"
    if path.exists() and not is_unchanged_card(path):
        path = folder / "README.new.md"
        logger.warning(f"{folder / 'README.md'} was edited and is kept; the card of this run is {path.name}.")
    with whole_file(path) as part:
        part.write_text(text, encoding="utf-8", newline="\n")
    return path


def is_unchanged_card(path: str | Path) -> bool:
    """Return whether a file was written by `write_model_card` and not edited since."""
    text = Path(path).read_bytes().decode("utf-8", errors="replace").replace("\r\n", "\n")
    found = _MARK.search(text)
    return found is not None and _digest(text[: found.start()]) == found[1]


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


# ---------------------------------------------------------------------- text


class _Markdown(str):
    """Text that is Markdown already."""


def _one_line(text: Any) -> str:
    kept = "".join(" " if unicodedata.category(char)[0] in "CZ" else char for char in str(text))
    return re.sub(" +", " ", kept)


def _plain(text: Any) -> str:
    """Return a text as one short line without control characters, for code and metadata."""
    kept = _one_line(text).strip()
    return kept if len(kept) <= _LONGEST else kept[: _LONGEST - 1] + "…"


def _escape(value: Any) -> str:
    """Escape characters that Markdown, a table or HTML would interpret within a line."""
    if isinstance(value, _Markdown):
        return value
    text = re.sub(r"[\\|<>&]", lambda found: f"&#{ord(found[0])};", _one_line(value))
    # An underscore within a word does not mark emphasis.
    return re.sub(r"[*`\[\]~$@]|(?<![a-zA-Z0-9])_|_(?![a-zA-Z0-9])", r"\\\g<0>", text)


def _file_name(path: str) -> str:
    return Path(path).name or str(path)


def _number(value: Any) -> Any:
    if isinstance(value, (float, np.floating)):
        value = float(value)
        return f"{value:.4f}" if abs(value) < 1000 else f"{value:,.0f}"
    return value


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s"


# ---------------------------------------------------------------------- facts


def _settings(trainer: Any) -> dict[str, Any]:
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
    settings |= {
        "epochs": round(trainer.state.epoch or 0, 2),
        "steps": trainer.state.global_step,
        "batch": args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
    }
    if trainer.max_tokens_per_batch is not None:
        settings["batch"] = (
            f"up to {trainer.max_tokens_per_batch * args.gradient_accumulation_steps * args.world_size} tokens"
        )
    precision = "bf16" if args.bf16 else "fp16" if args.fp16 else "fp32"
    weights = str(next(trainer.model.parameters()).dtype).removeprefix("torch.")
    if weights != "float32":
        precision = f"{precision}, weights in {weights}" if args.bf16 or args.fp16 else weights
    return settings | {
        "order of the cells": str(getattr(args.train_sampling_strategy, "value", args.train_sampling_strategy)),
        "optimizer": str(getattr(args.optim, "value", args.optim)),
        "learning rate": args.learning_rate,
        "schedule": str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)),
        "weight decay": args.weight_decay,
        "precision": precision,
        "seed": args.seed,
        "seed of the order": args.seed if args.data_seed is None else args.data_seed,
    }


def _run(trainer: Any) -> dict[str, str]:
    """Return the tokens, cells, time, speed and hardware of the training, including the runs that it resumed."""
    args, totals = trainer.args, trainer.throughput.totals
    run = {"tokens seen": f"{totals['tokens']:,}", "cells seen": f"{totals['cells']:,}"}
    if totals["seconds"]:
        run["training time"] = _duration(totals["seconds"])
        run["tokens per second"] = f"{totals['tokens'] / totals['seconds']:,.0f}"
        run["cells per second"] = f"{totals['cells'] / totals['seconds']:,.1f}"
    last: dict[str, Any] = next(
        (entry for entry in reversed(trainer.state.log_history) if "train_runtime" in entry), {}
    )
    for key, name in (("padding_share", "share of padding"), ("mfu", "model FLOPs utilisation, of dense bf16")):
        if f"train_{key}" in last:
            run[name] = f"{last[f'train_{key}']:.1%}"
    if "train_peak_memory_gb" in last:
        run["peak memory per process"] = f"{last['train_peak_memory_gb']:.2f} GB"
    if args.device.type == "cuda":
        run["hardware"] = f"{max(args.n_gpu, 1) * args.world_size} x {torch.cuda.get_device_name(args.device)}"
    else:
        run["hardware"] = (
            f"{args.world_size} x {_cpu()} ({args.device.type}, {torch.get_num_threads()} threads per process)"
        )
    return run


def _cpu() -> str:
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1] if found else platform.processor() or platform.machine()


def _logged_metrics(trainer: Any) -> dict[str, Any]:
    """Return the last metrics of evaluation, those of the weights that are kept."""
    history, state = trainer.state.log_history, trainer.state
    ends = [number for number, entry in enumerate(history) if "train_runtime" in entry]
    end = ends[-1] if ends else len(history)
    during, after = history[:end], history[end:]
    if trainer.args.load_best_model_at_end and state.best_global_step:
        during = [entry for entry in during if entry["step"] == state.best_global_step]
    found = {name: value for entry in during + after for name, value in entry.items() if name.startswith("eval_")}
    return {"train_loss": history[end]["train_loss"], **found} if ends else found


def _figures(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Keep the figures of the model, without those of its speed."""
    numbers = (int, float, np.integer, np.floating)
    return {
        name: value
        for name, value in metrics.items()
        if isinstance(value, numbers) and not isinstance(value, bool) and not _NOT_OF_THE_MODEL.search(name)
    }


def _comparisons(metrics: Mapping[str, Any]) -> tuple[list[dict[str, Any]], set[str]]:
    """Pair each figure of the model with those of its baselines.

    Returns
    -------
    list of dict
        `figure`, `better` ("lower" or "higher"), `model` (value), `baselines` (name -> value), `key` of the figure.
    set of str
        Names of the metrics used in the list.
    """
    figures = _figures(metrics)
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
        entry = found.setdefault(
            key,
            {
                "figure": ": ".join(filter(None, [what, _FIGURES.get(figure, figure.replace("_", " "))])),
                "better": "lower" if figure in ("nll", "loss") else "higher",
                "key": key,
                "model": figures[key],
                "baselines": {},
            },
        )
        entry["baselines"][_BASELINES[of["baseline"]]] = value
        used |= {name, key}
    return list(found.values()), used


def _unbeaten(comparisons: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Find the baselines that the model does not beat."""
    return [
        {"figure": entry["figure"], "baseline": name, "value": value, "model": entry["model"]}
        for entry in comparisons
        for name, value in entry["baselines"].items()
        if not (entry["model"] < value if entry["better"] == "lower" else entry["model"] > value)
    ]


def gene_coverage(store: CellStore, tokenizer: GeneTokenizer) -> dict[str, float]:
    """Compute how many of the genes of a store a tokenizer knows.

    Returns
    -------
    dict of str to float
        `genes`: share of the store's genes; `vocabulary`: share of the tokenizer's genes; `counts`: share of the
        counts, in at most 1,000 evenly spaced cells.
    """
    found = tokenizer.find_genes(store.gene_ids, store.genes.symbols)
    rows = np.unique(np.linspace(0, len(store) - 1, min(len(store), _CELLS_FOR_COVERAGE), dtype=np.int64))
    counts = np.asarray(store.rows(rows).sum(axis=0), np.float64).ravel()
    return {
        "genes": float((found >= 0).mean()),
        "vocabulary": len(np.unique(found[found >= 0])) / len(tokenizer.genes),
        "counts": float(counts[found >= 0].sum() / counts.sum()) if counts.sum() else 0.0,
    }


# ---------------------------------------------------------------------- the card


def _kind(model) -> str:
    name = type(model).__name__
    if "TokenClassification" in name:
        return "genes"
    if predicts_cells([name]):
        return "cells"
    if model.config.model_type == "cell_neighborhood":
        return "neighborhoods"
    return "masked" if "MLM" in name or "MaskedLM" in name else "encoder"


def _shape(config) -> str:
    parts = []
    if hasattr(config, "encoder_layers") and hasattr(config, "decoder_layers"):
        parts.append(f"{config.encoder_layers} encoder and {config.decoder_layers} decoder layers")
    elif hasattr(config, "num_hidden_layers"):
        parts.append(f"{config.num_hidden_layers} layers")
    for name, attribute in (("heads", "num_attention_heads"), ("hidden size", "hidden_size")):
        if hasattr(config, attribute):
            value = getattr(config, attribute)
            parts.append(f"{value} {name}" if name == "heads" else f"{name} {value}")
    return ", ".join(parts)


def _adapter(model: Any) -> dict[str, Any] | None:
    """Return the type, rank, base and number of trained parameters of a PEFT model; None for another model."""
    config = getattr(model, "active_peft_config", None)
    if config is None:
        return None
    base = config.base_model_name_or_path
    return {
        "type": getattr(config.peft_type, "value", str(config.peft_type)),
        "rank": getattr(config, "r", None),
        "base": base if not base or is_hub_id(base) else _file_name(base),
        "n_trained": sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
    }


def _metadata(
    *, model, kind, head, name, license, language, tags, datasets, base_model, adapter, figures, sources
) -> ModelCardData:
    """Make the metadata that the Hub reads."""
    spatial = ["spatial-transcriptomics"] if kind == "neighborhoods" else []
    of_cells = "tabular-regression" if head is not None and head.kind == "regression" else "tabular-classification"
    task = {"masked": "fill-mask", "cells": of_cells, "genes": "token-classification"}
    dataset_name = _plain("held-out cells of " + (", ".join(sources) or "the training data"))
    results = [
        EvalResult(
            task_type=task.get(kind, "feature-extraction"),
            dataset_type=datasets[0] if datasets else "cells",
            dataset_name=dataset_name,
            metric_type=_METRIC_TYPES.get(key, _plain(key)),
            metric_name=_plain(key.replace("_", " ")),
            metric_value=round(float(value), 6),
        )
        for key, value in figures.items()
        if math.isfinite(value)
    ]
    return ModelCardData(
        library_name="transformers",
        license=None if license is None else _plain(license),
        language=language,
        tags=list(
            dict.fromkeys(
                ["stformer_hf", "biology", "single-cell", "transcriptomics", *spatial]
                + [_plain(tag) for tag in (model.config.model_type, *tags)]
            )
        ),
        pipeline_tag={"cells": of_cells, "genes": None}.get(kind, "feature-extraction"),
        base_model=base_model if is_hub_id(base_model) else None,
        **({"base_model_relation": "adapter"} if adapter and is_hub_id(base_model) else {}),
        datasets=list(datasets) or None,
        model_name=name if results else None,
        eval_results=results or None,
    )


@cache
def _template() -> Any:
    """Return the template; it is compiled once."""
    import jinja2

    environment = jinja2.Environment(
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=jinja2.StrictUndefined,
        finalize=_escape,
    )
    environment.filters |= {
        "python": lambda text: _Markdown(repr(_plain(text))),
        "shell": lambda text: _Markdown(shlex.quote(_plain(text))),
        "number": _number,
    }
    text = files("stformer_hf.training").joinpath("model_card_template.md").read_text(encoding="utf-8")
    return environment.from_string(text)


def _render(
    *, model, tokenizer, store, settings, metrics, base_model, run, name, license, language, tags, datasets, **texts
) -> str:
    adapter = _adapter(model)
    model = unwrap(model)
    config, kind = model.config, _kind(model)
    heads = read_heads(model) if kind == "cells" else []
    head = heads[0] if heads else None
    comparisons, compared = _comparisons(metrics)
    baseline_names = compared - {entry["key"] for entry in comparisons}
    figures = _figures(metrics)
    sources = [] if store is None else [source["name"] for source in store.manifest["sources"]]
    data = _metadata(
        model=model,
        kind=kind,
        head=head,
        name=name,
        license=license,
        language=language,
        tags=tags,
        datasets=[dataset for dataset in datasets if is_hub_id(dataset)],
        base_model=base_model,
        adapter=adapter,
        figures={
            key.removeprefix("eval_"): value
            for key, value in figures.items()
            if key.startswith("eval_") and key not in baseline_names and not _BASELINE.fullmatch(key[5:])
        },
        sources=sources,
    )
    is_gene_tokenizer = isinstance(tokenizer, GeneTokenizer)
    body = _template().render(
        name=name or "unnamed",
        kind=kind,
        model_class=type(model).__name__,
        auto_class=getattr(type(model), "_auto_class", None),
        n_parameters=sum(parameter.numel() for parameter in model.parameters()),
        shape=_shape(config),
        adapter=adapter,
        config=config,
        head=head,
        heads=heads,
        classes=head.names if head is not None else list(config.id2label.values()) if kind == "genes" else [],
        is_calibrated=any(key.endswith("calibration_error") for key in settings),
        tokenizer=tokenizer if is_gene_tokenizer else None,
        store=store,
        coverage=gene_coverage(store, tokenizer) if is_gene_tokenizer and store is not None and len(store) else None,
        settings={
            key: value for key, value in settings.items() if value is not None and not isinstance(value, Mapping)
        },
        run=run,
        comparisons=comparisons,
        unbeaten=_unbeaten(comparisons),
        others={key: value for key, value in figures.items() if key not in compared},
        base_model=base_model if base_model is None or is_hub_id(base_model) else _file_name(base_model),
        license=license,
        versions={
            "python": platform.python_version(),
            **{name: version(name) for name in ("stformer_hf", "transformers", "torch", "datasets", "accelerate")},
            "torch": torch.__version__,  # with its CUDA
        },
        **texts,
    )
    text = f"---\n{data.to_yaml(line_break=chr(10))}\n---\n\n{body.strip()}\n\n"
    return f"{text}<!-- Written by stformer_hf; unchanged as long as its digest is {_digest(text)}. -->\n"


__all__ = ["gene_coverage", "is_unchanged_card", "write_model_card"]
