"""Pretrain a GeneBert to predict masked genes (and phenotypes) of cells.

stformer-hf pretrain --data atlas --output model --size tiny --max_steps 200
stformer-hf pretrain --config cell_tiny_cpu --data a.h5ad --output model
stformer-hf pretrain --data a.h5ad --output model --scheme rank --model_config '{position_embedding_type: rotary}'
accelerate launch -m stformer_hf.cli pretrain --data atlas --output model
stformer-hf pretrain --kind neighborhood --help    # models of cells among their neighbours
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, fields
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from .arguments import PRETRAINING, check_names, flag, parse_training, refuse_flags_of_new, some_flags

if TYPE_CHECKING:
    from transformers import PreTrainedModel, TrainingArguments

    from ..models.gene_bert.tokenization_gene_bert import GeneTokenizer
    from ..store.cell_store import CellStore
    from ..training.pretrainer import STFormerPretrainer
    from ..training.starts.spectral_views import SpectralViews

TRAINING_DEFAULTS = {**PRETRAINING, "weight_decay": 0.05}

_OF_A_NEW_MODEL = (
    *("size", "model_config", "whole_cell", "init", "scheme", "phenotypes", "bin_edges", "medians", "neighborhood"),
    *("tokenizer_config", "max_length", "label_smoothing", "gene_embeddings"),
)


@dataclass
class PretrainArguments:
    """Flags of `pretrain`."""

    data: list[str] = flag("a store (path or address), or files of cells (built into a store in OUTPUT/store)")
    output: str = flag("folder for the checkpoint")
    model: str | None = flag("checkpoint to continue from, with its tokenizer", None)
    size: str = flag("tiny, small, base or large", "tiny")
    model_config: dict | None = flag(
        "fields of GeneBertConfig, such as '{hidden_act: relu}', that override those of the size", None
    )
    whole_cell: bool | None = flag(
        "[CLS] reads the whole cell (default, except with neighborhood or without [CLS]); false: the reference "
        "models of PerturbGene and STFormer",
        None,
    )
    init: Literal["spectral", "random"] | None = flag(
        "start of a new model: spectral, at the principal components of the training cells and the frequencies and "
        "order of their genes (default with whole_cell), or random weights",
        None,
    )
    batch_key: str | None = flag(
        "column of obs with batches: a spectral start ignores differences between them, and contrast compares cells "
        "within each batch",
        None,
    )
    scheme: Literal["binned", "rank"] = flag("tokens of counts: bins (PerturbGene) or ranks (STFormer)", "binned")
    phenotypes: list[str] | None = flag("columns of obs that become tokens", None)
    bin_edges: list[float] | None = flag("edges of the expression bins (default: 0.1)", None)
    medians: str | None = flag(
        "ranks: json or pkl file of genes and medians (default: those of the training cells)", None
    )
    neighborhood: bool = flag("ranks: append the genes of a spot's neighbours to its own (STFormer)", False)
    neighbors: str = flag(
        "graph in obsp; if missing, a Delaunay graph is built from obsm['spatial']", "spatial_connectivities"
    )
    section_key: str | None = flag(
        "column of obs with sections: cells of different sections are not neighbours", None, aliases=["--section"]
    )
    tokenizer_config: dict | None = flag(
        "further settings of GeneTokenizer, such as '{add_cls: false, truncation: random}'", None
    )
    max_length: int = flag("maximum number of tokens per cell", 2048)
    mlm_probability: float = flag("share of the genes to mask", 0.15)
    phenotype_mask_prob: float = flag("share of the phenotypes to mask", 0.5)
    gene_dropout: float = 0.0
    gene_embeddings: str | None = flag("table of genes and vectors to initialise the gene embeddings with", None)
    objectives: dict | None = flag(
        "objectives and their weights (default: masked genes), such as '{mlm: 1.0, contrast: 0.5}'; also decode, "
        "cross_correlation",
        None,
    )
    view: Literal["disjoint", "thinning"] = flag(
        "objectives on [CLS]: how a cell is divided into two views", "disjoint"
    )
    ema: float | None = flag("decay of a moving average of the weights, such as 0.999", None)
    packing: bool = False
    max_tokens_per_batch: int | None = None
    sampling: dict | None = None
    label_smoothing: float = flag("label smoothing of the MLM loss (PerturbGene: 0.5)", 0.0)
    layer: str | None = None
    fractional: bool = False
    held_out: float = 0.05
    eval_data: list[str] | None = None
    baselines: bool = flag("compute baselines for the loss on held-out cells", False)
    overwrite: bool = flag("replace an existing model in OUTPUT", False)


def main(argv: list[str]) -> None:
    """Parse and run."""
    kind, argv = split_kind(argv)
    if kind == "neighborhood":
        from . import pretrain_neighborhood

        return pretrain_neighborhood.main(argv)
    args, training = parse_training(argv, PretrainArguments, TRAINING_DEFAULTS)
    from .runs import run_and_print

    run_and_print(args.output, lambda: run(args, training))


def split_kind(argv: list[str]) -> tuple[str, list[str]]:
    """Return `--kind`, "cells" by default, and the other arguments: each kind of model has flags of its own."""
    parser = argparse.ArgumentParser(prog="stformer-hf pretrain", add_help=False, allow_abbrev=False)
    parser.add_argument("--kind", choices=("cells", "neighborhood"), default="cells")
    known, rest = parser.parse_known_args(argv)
    return known.kind, rest


class PretrainRun(NamedTuple):
    """Cells and tokenizer of a run."""

    store: CellStore  # all cells
    train_cells: CellStore
    held_out_cells: CellStore | None
    tokenizer: GeneTokenizer
    views: SpectralViews | None  # of the training cells, if a new model starts at them


def run(args: PretrainArguments, training: dict) -> dict[str, float]:
    """Pretrain and save; return the metrics of the run."""
    from transformers import set_seed

    from .runs import finish, training_arguments

    arguments = training_arguments(Path(args.output), training, args.overwrite)
    prepared = prepare(args, arguments)
    set_seed(arguments.seed)
    model = make_model(args, prepared)
    trainer = make_trainer(args, arguments, prepared, model=model)
    return finish(trainer, card={"store": prepared.store, "base_model": args.model})


def prepare(args: PretrainArguments, arguments: TrainingArguments) -> PretrainRun:
    """Open (or build) the store, make (or load) the tokenizer, split the cells.

    If no cells are held out, `arguments.eval_strategy` is set to "no".
    """
    from ..batches.draws import sampling_columns
    from ..training.loading import load_tokenizer
    from .runs import genes_of_training, open_cells, removing_store, split

    refuse_flags_of_new("model", args, _OF_A_NEW_MODEL)
    _check_settings(args)
    tokenizer = load_tokenizer(args.model) if args.model else None
    phenotypes = tokenizer.included_phenotypes if tokenizer else args.phenotypes
    batch_key = [args.batch_key] if args.batch_key else []
    columns = list(dict.fromkeys([*(phenotypes or []), *batch_key, *sampling_columns(args.sampling)]))
    neighborhood = tokenizer.neighborhood if tokenizer else args.neighborhood
    graph: dict[str, Any] = {"neighbors": args.neighbors, "section": args.section_key} if neighborhood else {}
    with removing_store(arguments):
        store = open_cells(
            args.data,
            arguments,
            columns or None,
            args.layer,
            args.overwrite,
            fractional=args.fractional,
            **graph,
            eval_data=args.eval_data,
        )
        train_cells, held_out_cells = split(store, args.held_out, arguments.seed, eval_data=args.eval_data)
        if tokenizer is None:
            tokenizer = _make_tokenizer(args, train_cells, genes_of_training(store, args.eval_data))
        if held_out_cells is None:
            arguments.eval_strategy = "no"
        views = None
        if tokenizer.whole_cell and _starts_at_cells(args):
            from ..training.starts.spectral_start import fit_views

            views = fit_views(train_cells, tokenizer, batch_key=args.batch_key)
    return PretrainRun(store, train_cells, held_out_cells, tokenizer, views)


def _check_settings(args: PretrainArguments) -> None:
    """Refuse unknown settings of tokenizer, model and sampling, before any data are read."""
    from ..batches.draws import check_sampling
    from ..models.gene_bert.configuration_gene_bert import GeneBertConfig
    from ..models.gene_bert.tokenization_gene_bert import GeneTokenizer

    tokenizer_names = {*signature(GeneTokenizer).parameters, *signature(GeneTokenizer.from_store).parameters}
    # These have flags of their own. Edges are allowed too: they may be "quantile", or differ between genes.
    tokenizer_names -= {"genes", "scheme", "medians", "neighborhood", "phenotypes", "max_length", "vocab_file"}
    tokenizer_names -= {"store", "kwargs"}
    check_names("tokenizer_config", args.tokenizer_config, tokenizer_names)
    check_names("model_config", args.model_config, {option.name for option in fields(GeneBertConfig)})
    check_sampling(args.sampling)
    if args.bin_edges is not None and "bin_edges" in (args.tokenizer_config or {}):
        raise ValueError("bin_edges and tokenizer_config both set the edges of the bins: pass one of them.")


def _make_tokenizer(args: PretrainArguments, train_cells: CellStore, genes: list[str]) -> GeneTokenizer:
    """Make a tokenizer of some of the store's genes; missing medians and quantiles come from the training cells."""
    from ..models.gene_bert.tokenization_gene_bert import GeneTokenizer
    from ..store.gene_medians import estimate_gene_medians

    settings = dict(args.tokenizer_config or {})
    if args.bin_edges is not None:
        settings["bin_edges"] = args.bin_edges
    medians: Any = args.medians
    if args.scheme == "rank" and medians is None:
        medians = estimate_gene_medians(train_cells, settings.get("target_sum") or 1e4)
    return GeneTokenizer.from_store(
        train_cells,
        args.scheme,
        phenotypes=args.phenotypes,
        medians=medians,
        genes=genes,
        neighborhood=args.neighborhood or None,
        max_length=args.max_length,
        **{"whole_cell": _reads_whole_cells(args), **settings},
    )


def _reads_whole_cells(args: PretrainArguments) -> bool:
    if args.whole_cell is not None:
        return args.whole_cell
    return not args.neighborhood and (args.tokenizer_config or {}).get("add_cls") is not False


def _starts_at_cells(args: PretrainArguments) -> bool:
    init = args.init or ("spectral" if _reads_whole_cells(args) else "random")
    return init == "spectral" and not args.model


def make_model(args: PretrainArguments, run: PretrainRun, **settings: Any) -> PreTrainedModel:
    """Make a new model for the tokenizer of a prepared run, or load the one of `args.model`.

    Its weights are drawn from torch's generator: call `transformers.set_seed` first. Depending on `args.init`, it
    starts at the views and training cells of `run`. `settings`, fields of `GeneBertConfig` (and `size` of a new
    model), override those of `args`.
    """
    import torch
    from transformers import AutoModelForMaskedLM

    from ..models.gene_bert.configuration_gene_bert import GeneBertConfig
    from ..models.gene_bert.modeling_gene_bert import GeneBertForPhenotypicMLM
    from ..training.loading import let_cls_learn, load_config, load_model
    from ..training.starts.gene_embeddings import load_gene_embeddings
    from ..training.starts.masked_gene_start import start_mlm_bias, start_rank_model
    from ..training.starts.spectral_start import cell_embedding_of, set_views

    settings = {**(args.model_config or {}), **settings}
    if args.model:
        if set(args.objectives or {}) - {"mlm"}:
            settings = {**let_cls_learn(load_config(args.model)), **settings}
        return load_model(args.model, AutoModelForMaskedLM, new_head=True, dtype=torch.float32, **settings)
    settings = {"size": args.size, "label_smoothing": args.label_smoothing, **settings}
    model = GeneBertForPhenotypicMLM(GeneBertConfig.from_tokenizer(run.tokenizer, **settings))
    if run.views is not None:
        set_views(cell_embedding_of(model), run.views, model.config.initializer_range)
    if _starts_at_cells(args):
        start = start_rank_model if run.tokenizer.scheme == "rank" else start_mlm_bias
        start(model, run.tokenizer, run.train_cells)
    if args.gene_embeddings:
        load_gene_embeddings(model, run.tokenizer, args.gene_embeddings)
    return model


def make_trainer(
    args: PretrainArguments,
    arguments: TrainingArguments,
    run: PretrainRun,
    *,
    model: PreTrainedModel | None = None,
    model_init: Callable[..., PreTrainedModel] | None = None,
    **kwargs: Any,
) -> STFormerPretrainer:
    """Make the trainer of a prepared run, for `model` or `model_init`; `kwargs` are passed to `STFormerPretrainer`."""
    from ..training.pretrainer import STFormerPretrainer

    names = ("mlm_probability", "phenotype_mask_prob", "gene_dropout", "objectives", "view", "ema", "baselines")
    return STFormerPretrainer(
        arguments,
        run.train_cells,
        model=model,
        model_init=model_init,
        processing_class=run.tokenizer,
        batch_key=args.batch_key if set(args.objectives or {}) - {"mlm"} else None,
        eval_dataset=run.held_out_cells,
        **some_flags(args, *names, "packing", "max_tokens_per_batch", "sampling"),
        **kwargs,
    )
