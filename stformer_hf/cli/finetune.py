"""Fine-tune a classifier of cells.

stformer-hf finetune --data labelled.h5ad --label cell_type --output classifier --model pretrained
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from .arguments import parse

TRAINING_DEFAULTS = {
    "learning_rate": 5e-4,
    "weight_decay": 0.05,
    "warmup_steps": 0.1,
    "num_train_epochs": 10,
    "per_device_train_batch_size": 32,
    "per_device_eval_batch_size": 64,
    "logging_steps": 10,
    "eval_strategy": "epoch",
    "save_total_limit": 2,
    "report_to": "none",
}


@dataclass
class FinetuneArguments:
    """Flags of `finetune`."""

    data: list[str] = field(metadata={"help": "a store, or h5ad files (a store of them is made in OUTPUT/store)"})
    label: str = field(metadata={"help": "column of obs that holds the classes"})
    output: str = field(metadata={"help": "folder for the checkpoint"})
    model: str | None = field(default=None, metadata={"help": "pretrained checkpoint; a new model by default"})
    size: str = field(default="tiny", metadata={"help": "of a new model: tiny, small, base or large"})
    bin_edges: list[float] = field(default_factory=lambda: [0.1], metadata={"help": "of a new model's tokenizer"})
    max_length: int = field(default=2048, metadata={"help": "of a new model's tokenizer: most tokens a cell"})
    pooling: Literal["cls", "mean"] | None = field(
        default=None, metadata={"help": "what the classifier reads: cls, or mean over the genes; the model's own"}
    )
    gene_dropout: float = field(
        default=0.0, metadata={"help": "share of a cell's genes to leave out, anew each epoch"}
    )
    packing: bool = field(default=False, metadata={"help": "train on packed batches, without padding"})
    max_tokens_per_batch: int | None = field(
        default=None, metadata={"help": "fill batches up to so many tokens, in place of a number of cells"}
    )
    class_weights: Literal["none", "balanced"] = field(
        default="none", metadata={"help": "balanced: a class counts in the loss by 1 / frequency (PerturbGene)"}
    )
    label_smoothing: float = field(default=0.0, metadata={"help": "of the loss (PerturbGene: 0.1)"})
    layer: str | None = field(default=None, metadata={"help": "where the counts are: X, raw or a layer"})
    held_out: float = field(default=0.1, metadata={"help": "share of the cells kept for evaluation"})
    eval_data: list[str] | None = field(
        default=None, metadata={"help": "files or stores to evaluate on, in place of held-out cells of the data"}
    )
    overwrite: bool = field(default=False, metadata={"help": "replace a model that is in OUTPUT"})


def main(argv: list[str]) -> None:
    """Parse and run."""
    args, training = parse(argv, FinetuneArguments, verb="finetune", description=__doc__, training=TRAINING_DEFAULTS)
    from .runs import print_figures

    print_figures(args.output, run(args, training))


def run(args: FinetuneArguments, training: dict) -> dict[str, float]:
    """Fine-tune and save; returns the figures of the run."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, set_seed

    from ..evaluation.cell_baselines import classification_baselines
    from ..evaluation.metrics import balanced_class_weights, compute_classification_metrics
    from ..models.gene_bert.configuration_gene_bert import GeneBertConfig
    from ..models.gene_bert.modeling_gene_bert import GeneBertForClassification
    from ..models.gene_bert.tokenization_gene_bert import GeneTokenizer
    from ..training.cell_trainer import CellTrainer
    from ..training.collators import DataCollatorForCellClassification
    from .runs import finish, open_cells, refuse_flags_of_a_new_model, split, training_arguments

    output = Path(args.output)
    refuse_flags_of_a_new_model(args, ("size", "bin_edges", "max_length"))
    arguments = training_arguments(output, training, args.overwrite)
    tokenizer = AutoTokenizer.from_pretrained(args.model) if args.model else None
    phenotypes = [] if tokenizer is None else [name for name in tokenizer.included_phenotypes if name != args.label]
    store = open_cells(
        args.data,
        arguments,
        list(dict.fromkeys([args.label, *phenotypes])),
        args.layer,
        args.overwrite,
        neighbors="spatial_connectivities" if tokenizer is not None and tokenizer.neighborhood else None,
        eval_data=args.eval_data,
    )
    if args.label not in store.categories:
        raise ValueError(f"No categorical column {args.label!r}; there are {', '.join(store.categories) or 'none'}.")
    classes = store.categories[args.label]
    head = {
        "id2label": dict(enumerate(classes)),
        "label2id": {name: i for i, name in enumerate(classes)},
        **({"classifier_pooling": args.pooling} if args.pooling else {}),
        "problem_type": "single_label_classification",
        "classifier_label_smoothing": args.label_smoothing,
        "class_weights": None,  # a checkpoint may bring those of other classes
    }
    set_seed(arguments.seed)
    if tokenizer is None:
        tokenizer = GeneTokenizer.from_store(store, bin_edges=args.bin_edges, max_length=args.max_length)
        model = GeneBertForClassification(GeneBertConfig.from_tokenizer(tokenizer, size=args.size, **head))
    else:
        tokenizer.included_phenotypes = phenotypes
        model = AutoModelForSequenceClassification.from_pretrained(args.model, ignore_mismatched_sizes=True, **head)
    if model.config.classifier_pooling == "cls" and not tokenizer.add_cls:
        raise ValueError("The tokenizer begins cells with no [CLS]: use --pooling mean.")
    train_cells, held_out_cells = split(store, args.held_out, arguments.seed, args.label, args.eval_data)
    if held_out_cells is None:
        arguments.eval_strategy = "no"

    if args.class_weights == "balanced":
        model.config.class_weights = balanced_class_weights(train_cells.obs[args.label], classes)

    trainer = CellTrainer(
        model=model,
        args=arguments,
        data_collator=DataCollatorForCellClassification(
            tokenizer, args.label, seed=arguments.seed, gene_dropout=args.gene_dropout, packing=args.packing
        ),
        train_dataset=train_cells,
        eval_dataset=held_out_cells,
        max_tokens_per_batch=args.max_tokens_per_batch,
        processing_class=tokenizer,
        compute_metrics=compute_classification_metrics,
    )
    baselines = {}
    if held_out_cells is not None:  # before the training, so that they are in a card that is pushed
        found = classification_baselines(train_cells, held_out_cells, args.label, seed=arguments.seed)
        baselines = {f"eval_{name}": value for name, value in found.items()}
    facts = {"label": args.label, "pooling": model.config.classifier_pooling}
    card = {"store": store, "base_model": args.model, "metrics": baselines, "settings": facts}
    metrics = {**finish(trainer, card=card), **baselines}
    predicted = None if held_out_cells is None else trainer.predict(held_out_cells)
    if predicted is not None and trainer.is_world_process_zero():
        _draw_confusion(output, predicted, model.config.id2label)
    return metrics


def _draw_confusion(output: Path, found, id2label: dict[int, str]) -> None:
    """Draw `confusion.png` of predicted held-out cells, where matplotlib is installed."""
    from importlib.util import find_spec

    if find_spec("matplotlib") is None:
        return
    from ..inference import plots

    classes = [id2label[i] for i in range(len(id2label))]
    plots.confusion(
        [classes[i] for i in found.label_ids],
        [classes[i] for i in found.predictions.argmax(axis=-1)],
        classes,
        title=f"{len(found.label_ids)} held-out cells",
        save=output / "confusion.png",
    )
