"""Model cards: facts collected by the program, rendered by a template; nothing is typed by hand."""

from __future__ import annotations

import hashlib
import json
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
from transformers import PreTrainedConfig, PreTrainedModel

from .. import __version__
from ..genes.whole_files import whole_file
from ..models.gene_bert.tokenization_gene_bert import GeneTokenizer
from ..models.remote_code import is_a
from ..store.cell_store import CellStore
from .card_facts import compare, figures_of, gene_coverage, is_of_baseline, last_metrics, run_of, settings_of
from .cell_heads import predicts_cells, read_heads
from .loading import is_hub_id, unwrap

logger = logging.getLogger(__name__)

_LONGEST = 200  # characters of a text that came with the data
_MARK = re.compile(r"<!-- Written by stformer_hf; unchanged as long as its digest is ([0-9a-f]{16}). -->\n?\Z")
_METRIC_TYPES = {"macro_f1": "f1"}  # the Hub's names, where they differ


def write_model_card(
    folder: str | Path,
    *,
    model: Any,
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
    """Write `README.md` of a checkpoint, with metadata for the Hub, and return its path.

    A card that was edited, or written by another program, is kept; the new one is then `README.new.md`.

    Parameters
    ----------
    folder, model, tokenizer
        Folder of the checkpoint, its PreTrainedModel, and its GeneTokenizer, if it has one.
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
    """
    path = Path(folder) / "README.md"
    settings = {**({} if trainer is None else settings_of(trainer)), **(settings or {})}
    metrics = {**({} if trainer is None else last_metrics(trainer)), **(metrics or {})}
    adapter, model = _adapter(model), unwrap(model)
    config, kind = model.config, _kind(model)
    heads = read_heads(model) if kind == "cells" else []
    head = heads[0] if heads else None
    (comparisons, compared), figures = compare(metrics), figures_of(metrics)
    name = _plain(name or path.parent.resolve().name) or "unnamed"
    datasets = [of for of in ([datasets] if isinstance(datasets, str) else datasets) if is_hub_id(of)]
    sources = [] if store is None else [source["name"] for source in store.manifest["sources"]]
    of_cells = "tabular-regression" if head is not None and head.kind == "regression" else "tabular-classification"
    task = {"masked": "fill-mask", "cells": of_cells, "genes": "token-classification"}.get(kind, "feature-extraction")
    data = "held-out cells of " + (", ".join(sources) or "the training data")
    results = _results(figures, task, datasets[0] if datasets else "cells", data)
    spatial = ["spatial-transcriptomics"] if kind == "neighborhoods" else []
    own_tags = [_plain(tag) for tag in (config.model_type, *([tags] if isinstance(tags, str) else tags))]
    metadata = ModelCardData(
        library_name="transformers",
        license=None if license is None else _plain(license),
        language=language if language is None or isinstance(language, str) else list(language),
        tags=list(dict.fromkeys(["stformer_hf", "biology", "single-cell", "transcriptomics", *spatial, *own_tags])),
        pipeline_tag={"cells": of_cells, "genes": None}.get(kind, "feature-extraction"),
        base_model=base_model if is_hub_id(base_model) else None,
        **({"base_model_relation": "adapter"} if adapter and is_hub_id(base_model) else {}),
        datasets=datasets or None,
        model_name=name if results else None,
        eval_results=results or None,
    )
    tokenizer = tokenizer if is_a(tokenizer, GeneTokenizer) else None
    body = _template().render(
        name=name,
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
        tokenizer=tokenizer,
        store=store,
        coverage=gene_coverage(store, tokenizer) if tokenizer is not None and store else None,
        settings={key: of for key, of in settings.items() if of is not None and not isinstance(of, Mapping)},
        run={} if trainer is None else run_of(trainer),
        comparisons=comparisons,
        others={key: value for key, value in figures.items() if key not in compared},
        base_model=_hub_or_file(base_model),
        license=license,
        intended_use=intended_use,
        limits=limits,
        versions={
            "python": platform.python_version(),
            "stformer_hf": __version__,
            **{name: version(name) for name in ("transformers", "torch", "datasets", "accelerate")},
            "torch": torch.__version__,  # with its CUDA
        },
    )
    text = f"---\n{metadata.to_yaml(line_break=chr(10))}\n---\n\n{body.strip()}\n\n"
    if path.exists() and not is_unchanged_card(path):
        logger.warning(f"{path} was edited and is kept; the card of this run is README.new.md.")
        path = path.with_name("README.new.md")
    with whole_file(path) as part:
        mark = f"<!-- Written by stformer_hf; unchanged as long as its digest is {_digest(text)}. -->\n"
        part.write_text(text + mark, encoding="utf-8", newline="\n")
    return path


def _results(figures: Mapping[str, Any], task: str, dataset: str, data: str) -> list[EvalResult]:
    """Return the figures of evaluations for the metadata, without those of baselines."""
    evaluated = {key.removeprefix("eval_"): value for key, value in figures.items() if key.startswith("eval_")}
    return [
        EvalResult(
            task_type=task,
            dataset_type=dataset,
            dataset_name=_plain(data),
            metric_type=_METRIC_TYPES.get(key, _plain(key)),
            metric_name=_plain(key.replace("_", " ")),
            metric_value=round(float(value), 6),
        )
        for key, value in evaluated.items()
        if math.isfinite(value) and not is_of_baseline(key)
    ]


def is_unchanged_card(path: str | Path) -> bool:
    """Return whether a file was written by `write_model_card` and not edited since."""
    text = Path(path).read_bytes().decode("utf-8", errors="replace").replace("\r\n", "\n")
    found = _MARK.search(text)
    return found is not None and _digest(text[: found.start()]) == found[1]


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@cache
def _template() -> Any:
    """Return the template; it is compiled once."""
    import jinja2

    blocks: dict[str, Any] = {"trim_blocks": True, "lstrip_blocks": True, "keep_trailing_newline": True}
    environment = jinja2.Environment(**blocks, undefined=jinja2.StrictUndefined, finalize=_escape)
    environment.filters |= {
        "python": lambda text: _Markdown(json.dumps(_plain(text), ensure_ascii=False)),
        "shell": lambda text: _Markdown(shlex.quote(_plain(text))),
        "number": _number,
        "listed": _listed,
    }
    text = files("stformer_hf.training").joinpath("model_card_template.md").read_text(encoding="utf-8")
    return environment.from_string(text)


# ---------------------------------------------------------------------- the model


def _kind(model: PreTrainedModel) -> str:
    name = type(model).__name__
    if "TokenClassification" in name:
        return "genes"
    if predicts_cells([name]):
        return "cells"
    if model.config.model_type == "cell_neighborhood":
        return "neighborhoods"
    return "masked" if "MLM" in name or "MaskedLM" in name else "encoder"


def _shape(config: PreTrainedConfig) -> str:
    parts = {"num_hidden_layers": "{} layers", "num_attention_heads": "{} heads", "hidden_size": "hidden size {}"}
    if hasattr(config, "decoder_layers"):
        parts["num_hidden_layers"] = f"{{}} encoder and {config.decoder_layers} decoder layers"
    return ", ".join(text.format(getattr(config, name)) for name, text in parts.items() if hasattr(config, name))


def _adapter(model: Any) -> dict[str, Any] | None:
    """Return the type, rank, base and number of trained parameters of a PEFT model; None for another model."""
    config = getattr(model, "active_peft_config", None)
    if config is None:
        return None
    return {
        "type": getattr(config.peft_type, "value", str(config.peft_type)),
        "rank": getattr(config, "r", None),
        "base": _hub_or_file(config.base_model_name_or_path),
        "n_trained": sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
    }


def _hub_or_file(name: str | None) -> str | None:
    """Return the name of a model without the folders that lead to it on this machine."""
    return name if not name or is_hub_id(name) else Path(name).name or name


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


def _listed(names: Sequence[object]) -> str:
    """Return the first 50 names, those that hold a comma in quotes."""
    shown = [f'"{name}"' if "," in str(name) else str(name) for name in names[:50]]
    return ", ".join([*shown, "…"] if len(names) > 50 else shown)


def _number(value: Any) -> Any:
    if isinstance(value, (float, np.floating)):
        value = float(value)
        return f"{value:.4f}" if abs(value) < 1000 else f"{value:,.0f}"
    return value
