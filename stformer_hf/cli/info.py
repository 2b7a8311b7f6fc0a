"""Describe a file of cells, a store or a model, and say how well cells and a model fit.

stformer-hf info cells.h5ad
stformer-hf info cells.h5ad --model classifier
stformer-hf info classifier
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..genes.wrong_names import some_of
from . import as_flags
from .arguments import flag, parse

if TYPE_CHECKING:
    import pandas as pd

    from ..genes.gene_table import GeneTable
    from ..sources.open_source import Source

_N_SAMPLE = 1_000  # cells whose counts are summarised
_N_TIMED = 64  # cells that are embedded, and trained on, to estimate the time for all of them
_BATCH = 32  # cells of a training step
_WIDTH = 17


@dataclass
class InfoArguments:
    """Flags of `info`."""

    path: str = flag("file of cells, store (path or address), or model; the flag's name may be left out")
    model: str | None = flag(
        "compare cells with this model: genes they share; time and memory to embed them, and to train on them", None
    )
    layer: str | None = None


def main(argv: list[str]) -> None:
    """Parse and run."""
    if argv and not argv[0].startswith("-"):
        argv = ["--path", *argv]
    args = parse(argv, InfoArguments)
    print_facts(run(args))


def print_facts(facts: dict[str, Any]) -> None:
    """Print one fact per line."""
    for name, value in facts.items():
        print(f"{name:<{_WIDTH}}  {value}")


def run(args: InfoArguments) -> dict[str, Any]:
    """Return the facts about a path, by name."""
    from ..sources.formats import remote_folder
    from ..training.loading import find_installed, is_adapter

    path, is_address = Path(find_installed(args.path) or args.path), remote_folder(args.path) is not None
    is_model = (path / "config.json").exists() or is_adapter(path)
    # A name with a slash may be a model on the Hub.
    if is_model or (not path.exists() and "/" in args.path and not path.suffix and not is_address):
        if args.model or args.layer:
            raise ValueError(f"{args.path} is a model: --model and --layer are for files of cells.")
        return {"what": "model", **model_facts(str(path))}
    facts, source = cell_facts(args.path, args.layer)
    if args.model:
        facts |= _fit_facts(source, facts.get("counts"), args)
    return facts


# ---------------------------------------------------------------------- cells


def cell_facts(path: str, layer: str | None = None) -> tuple[dict[str, Any], Any]:
    """Return the facts about cells, and their `Source` (None if there are no counts)."""
    from ..genes.gene_table import GeneTable
    from ..sources.formats import find_layers, local_path, remote_folder
    from ..sources.open_source import open_source
    from ..sources.read_anndata import read_anndata
    from ..sources.registry import find_format

    layers = find_layers(path, layer).layers
    if not layers:  # an AnnData may have none
        adata, _ = read_anndata(path, backed=True)
        return {
            "what": "cells (AnnData)",
            "cells": f"{adata.n_obs:,}",
            "genes": _genes(GeneTable.from_var(adata.var)),
            "counts": "none: the file has no matrix in X, raw or a layer",
            "obs": _columns(adata.obs),
        }, None
    try:
        source = open_source(path, layer)
    except ValueError as error:
        source, why = None, as_flags(str(error), {"layer", "fractional"}).split("no counts found: ")[-1]
    dtypes = {one.name: next(iter(one.matrix.sample()), np.empty(0)).dtype for one in layers}
    first, known = layers[0], find_format(remote_folder(path) or local_path(path))
    assert known is not None  # its layers were found
    genes, obs = (first.genes(), first.obs()) if source is None else (source.genes, source.obs)
    facts: dict[str, Any] = {
        "what": f"cells ({known.name})",
        "cells": f"{len(obs):,}",
        "genes": _genes(genes),
        "species": genes.species or "not shown by the ids",
        "matrices": ", ".join(f"{name} ({dtype})" for name, dtype in dtypes.items()),
    }
    if source is None:
        facts["counts"] = f"none: {why}"
    else:
        facts["counts"] = f"in {source.counts_in}"
        facts |= _count_facts(source)
    facts["obs"] = _columns(obs)
    for one in layers:
        one.matrix.close()
    return facts, source


def _genes(genes: GeneTable) -> str:
    from ..models.gene_bert.gene_columns import describe

    return f"{len(genes):,}, such as {describe(genes.gene_ids)}"


def _columns(obs: pd.DataFrame) -> str:
    kinds = {
        name: f"{len(column.cat.categories)} categories" if hasattr(column, "cat") else column.dtype
        for name, column in obs.items()
    }
    return "; ".join(f"{name} ({kind})" for name, kind in kinds.items()) or "no columns"


def _count_facts(source: Any) -> dict[str, str]:
    block = next(source.blocks(_N_SAMPLE, stop=min(_N_SAMPLE, source.shape[0])), None)
    if block is None:
        return {}
    of = "all" if block.shape[0] == source.shape[0] else f"the first {block.shape[0]:,}"
    totals = np.asarray(block.sum(axis=1)).ravel()
    return {
        "per cell": f"{np.median(np.diff(block.indptr)):,.0f} genes and {np.median(totals):,.0f} counts "
        f"(median of {of} cells), {(totals == 0).sum()} without counts"
    }


# ---------------------------------------------------------------------- models


def model_facts(name: str) -> dict[str, Any]:
    """Return the facts about a checkpoint or an adapter."""
    from ..models.gene_bert.gene_columns import describe, guess_species
    from ..models.gene_bert.heads import label_columns_of, output_names
    from ..training.cell_heads import predicts_cells
    from ..training.loading import is_adapter, load_config, load_tokenizer

    config = load_config(name)
    architectures = config.architectures or []
    facts: dict[str, Any] = {"type": ", ".join([config.model_type, *architectures])}
    if is_adapter(name):
        adapter = json.loads((Path(name) / "adapter_config.json").read_text(encoding="utf-8"))
        facts["adapter"] = f"{adapter['peft_type']} of {adapter.get('base_model_name_or_path')}"
    n_weights = _n_weights(Path(name))
    if n_weights is not None:
        facts["weights"] = f"{n_weights:,} numbers in the folder"
    if config.model_type == "cell_neighborhood":
        return facts | _neighborhood_facts(config)
    if config.model_type != "gene_bert":
        return facts
    facts["size"] = f"{config.num_hidden_layers} layers of {config.hidden_size}"
    if predicts_cells(architectures):
        found = []
        for column in label_columns_of(config):
            names = output_names(config, column)
            of = "" if column.name is None else f" of {column.name}"
            found.append(f"{len(names)} outputs{of}: {some_of(names, 8)}")
        facts["predicts"] = "; ".join(found)
    tokenizer = load_tokenizer(name)
    facts["genes"] = f"{len(tokenizer.genes):,}, such as {describe(tokenizer.genes)}"
    facts["species"] = guess_species(tokenizer.genes) or "not shown by the ids"
    facts["tokens"] = f"{tokenizer.scheme}, at most {tokenizer.max_length} per cell"
    if tokenizer.whole_cell:
        facts["tokens"] += "; [CLS] reads all genes"
    facts["phenotypes"] = ", ".join(tokenizer.included_phenotypes) or "none"
    return facts


def _neighborhood_facts(config: Any) -> dict[str, str]:
    from ..models.gene_bert.gene_columns import describe, guess_species

    facts = {"size": f"{config.encoder_layers} + {config.decoder_layers} layers of {config.hidden_size}"}
    facts["genes"] = f"{config.n_genes:,}"
    if config.gene_ids is not None:
        facts["genes"] += f", such as {describe(config.gene_ids)}"
        facts["species"] = guess_species(config.gene_ids) or "not shown by the ids"
    facts["cell types"] = f"{config.n_cell_types}"
    if config.cell_types is not None:
        facts["cell types"] += f": {some_of(config.cell_types, 8)}"
    facts["neighbours"] = ", ".join(f"{name} {value}" for name, value in (config.neighborhood or {}).items())
    facts["neighbours"] = facts["neighbours"] or "not recorded"
    facts["sections"] = "none" if config.section_key is None else f"by obs[{config.section_key!r}]"
    return facts


def _n_weights(folder: Path) -> int | None:
    """Count the numbers in the safetensors files of a local folder, from their headers."""
    from safetensors import safe_open

    files = sorted(folder.glob("*model*.safetensors"))
    if not files:
        return None
    total = 0
    for file in files:
        with safe_open(file, framework="numpy") as weights:
            total += sum(math.prod(weights.get_slice(key).get_shape()) for key in weights.keys())  # noqa: SIM118
    return total


def _fit_facts(source: Any, counts: str | None, args: InfoArguments) -> dict[str, str]:
    """Compare cells with a model: the genes they share, and what it takes to embed and to train, measured on a few."""
    from ..models.gene_bert.gene_matcher import coverage_of
    from ..training.loading import is_adapter, load_tokenizer

    if source is None:
        raise ValueError(f"{args.path} has no counts, so --model cannot be compared with it ({counts}).")
    assert args.model is not None  # else nothing is compared
    tokenizer = load_tokenizer(args.model)
    found = tokenizer.find_genes(source.genes.gene_ids, source.genes.symbols)
    known = np.unique(found[found >= 0])
    share = coverage_of(known, len(tokenizer.genes), tokenizer.gene_weights)
    facts = {
        "model's genes": f"{len(known):,} of {len(tokenizer.genes):,} are in the file ({share['vocabulary']:.1%}; "
        f"{share['weight']:.1%} weighted by expression; at least {tokenizer.min_coverage:.0%} are needed)",
        "file's genes": f"{(found >= 0).mean():.1%} are known to the model",
    }
    if share["weight"] >= tokenizer.min_coverage and not tokenizer.neighborhood:
        rows = np.unique(np.linspace(0, source.shape[0] - 1, min(_N_TIMED, source.shape[0])).astype(np.int64))
        works = [("embed", _embedding)]
        if not is_adapter(args.model):  # whose base would be trained on masked genes, without it
            works.append(("train an epoch", _training))
        for name, work in works if len(rows) else ():
            facts[f"to {name}"] = _cost(work(source, rows, args.model), len(rows), source.shape[0])
    return facts


def _cost(work: Callable[[], None], n: int, n_cells: int) -> str:
    """Do some work on n cells twice; describe what the second time says about all cells, and the memory it took."""
    from ..training.throughput import peak_resident_memory

    seconds = 0.0
    for _ in range(2):
        began = time.perf_counter()
        work()
        seconds = time.perf_counter() - began
    total, peak = seconds / n * n_cells, peak_resident_memory() / 2**20
    memory = f", with {peak:,.0f} MB of memory" if peak else ""
    return f"about {total:,.1f} s for {n_cells:,} cells: {n} of them took {seconds:.2f} s on this machine{memory}"


def _embedding(source: Source, rows: np.ndarray, name: str) -> Callable[[], None]:
    """Return a function that embeds some cells."""
    from anndata import AnnData
    from transformers import AutoModel

    from ..inference.batches import load
    from ..inference.embed import embed

    model, tokenizer = load(name, None, AutoModel)
    cells = AnnData(source.matrix.take(rows), obs=source.obs.iloc[rows], var=source.genes.frame.set_index("gene_id"))
    return lambda: embed(cells, model, tokenizer=tokenizer, layer="X", fractional=True)


def _training(source: Source, rows: np.ndarray, name: str) -> Callable[[], None]:
    """Return a function that makes training steps on masked genes of some cells, without their phenotypes."""
    import torch
    from transformers import AutoModelForMaskedLM

    from ..batches.collators import DataCollatorForPhenotypicMLM
    from ..training.loading import load_model, load_tokenizer

    tokenizer = load_tokenizer(name)
    tokenizer.included_phenotypes = []
    model = load_model(name, AutoModelForMaskedLM, new_head=True, dtype=torch.float32).train()
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    optimizer = torch.optim.AdamW(model.parameters())
    counts, names = source.matrix.take(rows), (source.genes.gene_ids, source.genes.symbols)
    collator = DataCollatorForPhenotypicMLM(tokenizer)

    def steps() -> None:
        for first in range(0, len(rows), _BATCH):
            tokens = tokenizer(counts[first : first + _BATCH], genes=names, fractional=True)
            examples = [dict(zip(tokens, one, strict=True)) for one in zip(*tokens.values(), strict=True)]
            batch = collator([{**example, "cell_id": first + i} for i, example in enumerate(examples)])
            batch = {key: of if isinstance(of, int) else of.to(model.device) for key, of in batch.items()}
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    return steps
