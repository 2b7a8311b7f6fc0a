"""Pretrain a GeneBert: predict masked genes (and phenotypes) of cells.

stformer-hf pretrain --data atlas --output model --size tiny --max_steps 200
stformer-hf pretrain --config recipes/pretrain_tiny_cpu.yaml --data a.h5ad --output model
accelerate launch -m stformer_hf.cli pretrain --data atlas --output model
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from .arguments import parse

TRAINING_DEFAULTS = {
    "learning_rate": 1e-3,
    "weight_decay": 0.05,
    "warmup_steps": 0.1,
    "per_device_train_batch_size": 32,
    "per_device_eval_batch_size": 64,
    "logging_steps": 10,
    "eval_strategy": "epoch",
    "save_total_limit": 2,
    "report_to": "none",
}


@dataclass
class PretrainArguments:
    """Flags of `pretrain`."""

    data: list[str] = field(metadata={"help": "a store, or h5ad files (a store of them is made in OUTPUT/store)"})
    output: str = field(metadata={"help": "folder for the checkpoint"})
    model: str | None = field(default=None, metadata={"help": "checkpoint to go on from, with its tokenizer"})
    size: str = field(default="tiny", metadata={"help": "tiny, small, base or large"})
    phenotypes: list[str] | None = field(default=None, metadata={"help": "columns of obs that become tokens"})
    bin_edges: list[float] = field(default_factory=lambda: [0.1], metadata={"help": "edges of the expression bins"})
    max_length: int = field(default=2048, metadata={"help": "most tokens a cell"})
    mlm_probability: float = field(default=0.15, metadata={"help": "share of the genes to mask"})
    phenotype_mask_prob: float = field(default=0.5, metadata={"help": "share of the phenotypes to mask"})
    gene_dropout: float = field(
        default=0.0, metadata={"help": "share of a cell's genes to leave out, anew each epoch"}
    )
    gene_embeddings: str | None = field(
        default=None, metadata={"help": "table of genes and vectors that the model's embeddings of genes begin with"}
    )
    packing: bool = field(default=False, metadata={"help": "train on packed batches, without padding"})
    max_tokens_per_batch: int | None = field(
        default=None, metadata={"help": "fill batches up to so many tokens, in place of a number of cells"}
    )
    label_smoothing: float = field(default=0.0, metadata={"help": "of the MLM loss (PerturbGene: 0.5)"})
    layer: str | None = field(default=None, metadata={"help": "where the counts are: X, raw or a layer"})
    held_out: float = field(default=0.05, metadata={"help": "share of the cells kept for evaluation"})
    overwrite: bool = field(default=False, metadata={"help": "replace a model that is in OUTPUT"})


def main(argv: list[str]) -> None:
    """Parse and run."""
    args, training = parse(argv, PretrainArguments, verb="pretrain", description=__doc__, training=TRAINING_DEFAULTS)
    from .runs import print_figures

    print_figures(args.output, run(args, training))


def run(args: PretrainArguments, training: dict) -> dict[str, float]:
    """Pretrain and save; returns the figures of the run."""
    from transformers import AutoModelForMaskedLM, AutoTokenizer, set_seed

    from ..models.gene_bert.configuration_gene_bert import GeneBertConfig
    from ..models.gene_bert.modeling_gene_bert import GeneBertForPhenotypicMLM
    from ..models.gene_bert.tokenization_gene_bert import GeneTokenizer
    from ..training.gene_embeddings import load_gene_embeddings
    from ..training.model_card import write_model_card
    from ..training.pretrainer import STFormerPretrainer
    from .runs import finish, open_cells, refuse_flags_of_a_new_model, split, training_arguments

    output = Path(args.output)
    refuse_flags_of_a_new_model(
        args, ("size", "phenotypes", "bin_edges", "max_length", "label_smoothing", "gene_embeddings")
    )
    arguments = training_arguments(output, training, args.overwrite)
    tokenizer = AutoTokenizer.from_pretrained(args.model) if args.model else None
    phenotypes = tokenizer.included_phenotypes if tokenizer else args.phenotypes
    store = open_cells(args.data, arguments, phenotypes, args.layer, args.overwrite)
    set_seed(arguments.seed)
    if args.model:
        model = AutoModelForMaskedLM.from_pretrained(args.model)
    else:
        tokenizer = GeneTokenizer.from_store(
            store, phenotypes=args.phenotypes, bin_edges=args.bin_edges, max_length=args.max_length
        )
        config = GeneBertConfig.from_tokenizer(tokenizer, size=args.size, label_smoothing=args.label_smoothing)
        model = GeneBertForPhenotypicMLM(config)
        if args.gene_embeddings:
            load_gene_embeddings(model, tokenizer, args.gene_embeddings)
    train_cells, held_out_cells = split(store, args.held_out, arguments.seed)
    if held_out_cells is None:
        arguments.eval_strategy = "no"

    trainer = STFormerPretrainer(
        arguments,
        train_cells,
        model=model,
        processing_class=tokenizer,
        mlm_probability=args.mlm_probability,
        phenotype_mask_prob=args.phenotype_mask_prob,
        gene_dropout=args.gene_dropout,
        packing=args.packing,
        max_tokens_per_batch=args.max_tokens_per_batch,
        eval_dataset=held_out_cells,
    )
    metrics = finish(trainer)
    if not trainer.is_world_process_zero():
        return metrics
    write_model_card(
        output,
        model=model,
        tokenizer=tokenizer,
        store=store,
        settings={
            "masked genes": args.mlm_probability,
            "masked phenotypes": args.phenotype_mask_prob,
            "gene dropout": args.gene_dropout,
            "cells in training": len(train_cells),
            "cells held out": 0 if held_out_cells is None else len(held_out_cells),
            "steps": trainer.state.global_step,
            "batch": arguments.train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size,
            "learning rate": arguments.learning_rate,
            "seed": arguments.seed,
        },
        metrics=metrics,
        base_model=args.model,
    )
    return metrics
