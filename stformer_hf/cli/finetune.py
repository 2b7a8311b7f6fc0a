"""Fine-tune a classifier of cells.

stformer-hf finetune --data labelled.h5ad --label_key cell_type --output classifier
stformer-hf finetune --data labelled.h5ad --label_key cell_type --output classifier --model pretrained --split_by donor
stformer-hf finetune --data labelled.h5ad --label_key cell_type --output adapter --model pretrained --lora
stformer-hf finetune --data labelled.h5ad --label_key cell_type condition --output classifier

A new model starts at linear models of the cells, chosen by cross-validation within the training cells, and is trained
further only if that helps in the cross-validation; OUTPUT/fine_tuning.json records the choice and the reason.
--num_train_epochs N trains it for N epochs in any case; 0 keeps the start.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ..genes.wrong_names import some_of
from ..training.defaults import FINETUNING, FINETUNING_REFERENCE, MAX_LENGTH
from .arguments import flag, parse_training, refuse_flags_of_new, some_flags

if TYPE_CHECKING:
    from transformers import TrainingArguments
    from transformers.trainer_utils import PredictionOutput

    from ..models.gene_bert.tokenization_gene_bert import GeneTokenizer
    from ..store.cell_store import CellStore
    from ..training.cell_heads import CellHead

_OF_A_NEW_MODEL = ("size", "bin_edges", "max_length", "whole_cell")
_NUMBER = re.compile(r"-?\d+(\.\d+)?")


@dataclass
class FinetuneArguments:
    """Flags of `finetune`."""

    data: list[str] = flag("a store (path or address), or files of cells (built into a store in OUTPUT/store)")
    label_key: list[str] = flag(
        "column of obs with the classes: categories, strings, integers or booleans; or numbers. With several "
        "columns, a class in each is predicted, and a cell may lack some of them",
        aliases=["--label"],
    )
    output: str = flag("folder for the checkpoint")
    problem_type: Literal["single_label_classification", "regression"] = flag(
        "regression: the label is a number, such as an age, and is predicted as one", "single_label_classification"
    )
    model: str | None = flag("pretrained checkpoint (default: a new model)", None)
    lora: int | None = flag(
        "with --model: train LoRA adapters of this rank (8 without a number), and the heads; OUTPUT then holds an "
        "adapter of the model",
        None,
        nargs="?",
        const=8,
    )
    freeze: int = flag("with --model: freeze the embeddings and this many first layers", 0)
    layer_decay: float = flag(
        "with --model: learning rate of a layer, relative to that of the one above it, such as 0.8", 1.0
    )
    size: str = flag("new model: tiny, small, base or large", "tiny")
    whole_cell: bool = flag("new model: [CLS] reads the whole cell; false: PerturbGene's reference model", True)
    init: Literal["spectral", "random"] = flag(
        "start of a classifier that reads whole cells: spectral, at linear models of the cells (for a new model, of "
        "their principal components); or random weights, which are trained for 10 epochs by default",
        "spectral",
    )
    bin_edges: list[float] = flag("new model: bin edges", [0.1])
    max_length: int | None = flag(
        "new model: maximum number of tokens per cell (default: 8; 2048 without whole_cell)", None
    )
    pooling: Literal["cls", "mean"] | None = flag(
        "input of the classifier: cls, or mean over the genes (default: the model's)", None
    )
    phenotypes: list[str] = flag("phenotype tokens of the checkpoint that the classifier may read (default: none)", [])
    gene_dropout: float = 0.0
    packing: bool = False
    max_tokens_per_batch: int | None = None
    sampling: dict | None = None
    class_weights: Literal["none", "balanced"] = flag(
        "balanced: weight classes in the loss by 1 / frequency (PerturbGene)", "none"
    )
    label_smoothing: float = flag("label smoothing of the loss (PerturbGene: 0.1)", 0.0)
    layer: str | None = None
    fractional: bool = False
    held_out: float = 0.1
    split_by: str | None = flag(
        "column of obs, such as the donor: splits and cross-validation keep its groups whole", None
    )
    eval_data: list[str] | None = None
    overwrite: bool = flag("replace an existing model in OUTPUT", False)


def main(argv: list[str]) -> None:
    """Parse and run."""
    args, training = parse_training(argv, FinetuneArguments, FINETUNING)
    from .runs import run_and_print

    run_and_print(args.output, lambda: run(args, training))


def run(args: FinetuneArguments, training: dict) -> dict[str, float]:
    """Fine-tune and save; return the metrics of the run."""
    from ..batches.draws import check_sampling
    from ..evaluation.metrics import compute_classification_metrics, compute_column_metrics, compute_regression_metrics
    from ..training.cell_heads import read_heads
    from ..training.finetuning import prepare_classifier
    from ..training.loading import load_tokenizer
    from .runs import finish, genes_of_training, removing_store, split, training_arguments

    output = Path(args.output)
    of_numbers = args.problem_type == "regression"
    labels = list(dict.fromkeys(args.label_key))
    if of_numbers and (args.class_weights != "none" or args.label_smoothing):
        raise ValueError("--class_weights and --label_smoothing apply to classes: leave them out for a regression.")
    refuse_flags_of_new("model", args, _OF_A_NEW_MODEL)
    check_sampling(args.sampling)
    tokenizer = load_tokenizer(args.model) if args.model else None
    whole_cell = args.whole_cell if tokenizer is None else getattr(tokenizer, "whole_cell", False)
    reference = {} if whole_cell else FINETUNING_REFERENCE
    settings = {
        "eval_strategy": "epoch",
        **training,
        **{k: v for k, v in reference.items() if training[k] == FINETUNING[k]},
    }
    arguments = training_arguments(output, settings, args.overwrite)
    with removing_store(arguments):
        classes = () if of_numbers else tuple(labels)
        store = _open_store(args, arguments, labels, classes, tokenizer)
        train_cells, held_out_cells = split(
            store, args.held_out, arguments.seed, classes, args.eval_data, args.split_by
        )
        if held_out_cells is None:
            arguments.eval_strategy = "no"
        given = "num_train_epochs" in training or arguments.max_steps > 0
        prepared = prepare_classifier(
            train_cells,
            labels if len(labels) > 1 else labels[0],
            arguments,
            model=args.model,
            num_train_epochs=arguments.num_train_epochs if given else None,
            max_length=args.max_length or (MAX_LENGTH if whole_cell else 2048),
            model_config={
                "classifier_label_smoothing": args.label_smoothing,
                **({"classifier_pooling": args.pooling} if args.pooling else {}),
            },
            tokenizer_config={
                "whole_cell": whole_cell,
                "bin_edges": args.bin_edges,
                "genes": genes_of_training(store, args.eval_data),
            },
            **some_flags(args, "split_by", "phenotypes", "class_weights", "problem_type", "size", "init"),
            **some_flags(args, "lora", "freeze", "layer_decay", "sampling"),
        )
        heads = read_heads(prepared.model)
        if arguments.process_index == 0:
            print(_what_is_read(len(prepared.cells), 0 if held_out_cells is None else len(held_out_cells), args))
            for head in heads:
                print(_what_is_learnt(head.column or ", ".join(labels), head))
        compute_metrics: Callable = compute_regression_metrics if of_numbers else compute_classification_metrics
        if len(heads) > 1:
            compute_metrics = compute_column_metrics({str(head.column): head.outputs for head in heads})
        if held_out_cells is not None:
            held_out_cells = prepared.known(held_out_cells)
        trainer = prepared.trainer(
            arguments,
            held_out_cells,
            compute_metrics=compute_metrics,
            **some_flags(args, "gene_dropout", "packing", "max_tokens_per_batch"),
        )
    baselines: dict[str, float] = {}
    if held_out_cells is not None and not of_numbers:  # before training, so that a pushed card includes them
        baselines = _baselines(prepared.cells, held_out_cells, heads, labels[0], arguments.seed)
    card = {"store": store, "base_model": args.model, "metrics": baselines}
    prepared.save_choice(trainer)
    if arguments.process_index == 0 and "fine_tuning" in prepared.facts:
        chosen, _, why = prepared.facts["fine_tuning"].partition(": ")
        print(f"Training beyond the start: {chosen} ({why}).")
    metrics = {**finish(trainer, card=card), **baselines}
    predicted = None if held_out_cells is None or of_numbers else trainer.predict(held_out_cells)
    if predicted is not None and trainer.is_world_process_zero():
        _draw_confusion(output, predicted, heads)
    return metrics


def _open_store(
    args: FinetuneArguments,
    arguments: TrainingArguments,
    labels: list[str],
    classes: tuple[str, ...],
    tokenizer: GeneTokenizer | None,
) -> CellStore:
    """Open or build the store; the columns in `classes` must be categorical."""
    from ..batches.draws import sampling_columns
    from .runs import open_cells

    split_by = [args.split_by] if args.split_by else []
    store = open_cells(
        args.data,
        arguments,
        list(dict.fromkeys([*labels, *args.phenotypes, *split_by, *sampling_columns(args.sampling)])),
        args.layer,
        args.overwrite,
        fractional=args.fractional,
        neighbors="spatial_connectivities" if tokenizer is not None and tokenizer.neighborhood else None,
        eval_data=args.eval_data,
        classes=classes,
    )
    others = [name for name in classes if name not in store.categories]
    if others:
        there = ", ".join(store.categories) or "none"
        raise ValueError(
            f"The store has no categorical column {others[0]!r}; those are {there}. To use integers or "
            f"booleans as classes, build the store with stformer-hf build --classes {others[0]}, or pass the "
            "files as --data. To predict numbers: --problem_type regression."
        )
    return store


def _baselines(
    cells: CellStore, held_out_cells: CellStore, heads: list[CellHead], label: str, seed: int
) -> dict[str, float]:
    """Compute the baselines of each head; `label` is the column of a single one."""
    from ..evaluation.cell_baselines import classification_baselines

    baselines: dict[str, float] = {}
    for head in heads:
        column, prefix = head.column or label, head.named("eval")
        if held_out_cells.obs[column].notna().any():
            found = classification_baselines(cells, held_out_cells, column, seed=seed)
            baselines |= {f"{prefix}_{name}": value for name, value in found.items()}
    return baselines


def _what_is_read(n_training: int, n_held_out: int, args: FinetuneArguments) -> str:
    if args.eval_data:
        return f"{n_training:,} cells for training, {n_held_out:,} of --eval_data for evaluation."
    all_of_them = " (--held_out 0 trains on all)" if n_held_out else ""
    return f"{n_training:,} cells for training, {n_held_out:,} held out{all_of_them}."


def _what_is_learnt(label: str, head: CellHead) -> str:
    if head.kind == "regression":
        return f"{label!r} is predicted as a number (--problem_type regression)."
    numbers = all(_NUMBER.fullmatch(name) for name in head.names)
    return f"{label!r} is learnt as {len(head.names)} classes: {some_of(head.names)}." + (
        " To predict numbers: --problem_type regression." if numbers else ""
    )


def _draw_confusion(output: Path, found: PredictionOutput, heads: list[CellHead]) -> None:
    """Plot the confusion matrix of held-out cells to `confusion.png`, if matplotlib is installed.

    Those of several label columns are plotted to `confusion_COLUMN.png`.
    """
    if find_spec("matplotlib") is None:
        return
    from ..inference import plots

    for head, true in zip(heads, found.label_ids.reshape(len(found.label_ids), -1).T, strict=True):
        known = true >= 0
        if known.any():
            plots.confusion(
                [head.names[i] for i in true[known]],
                [head.names[i] for i in found.predictions[known, head.outputs].argmax(axis=-1)],
                head.names,
                title=f"{known.sum()} held-out cells",
                save=output / f"{head.named('confusion')}.png",
            )
