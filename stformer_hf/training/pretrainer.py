"""`transformers.Trainer` on cells: CellTrainer for any task, STFormerPretrainer for masked pretraining."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.data import Subset
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments

from ..data.cell_store import CellStore
from ..models.gene_bert.tokenization_gene_bert import GeneTokenizer
from .collators import DataCollatorForGeneRankMLM, DataCollatorForPhenotypicMLM


class CellTrainer(Trainer):
    """Trainer for stores of cells and the collators of this package.

    Every column reaches the collator; the collator is told the epoch; evaluation and prediction use the collator's
    `for_evaluation()`, so that their losses can be compared; cells without counts are left out of training. Of a
    masked model the log also has `<class>_loss` and `<class>_accuracy`, a class of tokens (genes, and each phenotype
    category): mean cross entropy in nats, without smoothing and weights, and share predicted right.

    Parameters
    ----------
    **kwargs
        As for Trainer; datasets may be a `CellStore` or a `torch.utils.data.Subset` of one.

    Raises
    ------
    ValueError
        A tokenizer (`processing_class`) that does not fit the model; packed batches for several GPUs in one process.
    """

    def __init__(self, *, train_dataset: Any = None, eval_dataset: Any = None, **kwargs):
        if isinstance(eval_dataset, dict):
            eval_dataset = {name: without_empty_cells(dataset) for name, dataset in eval_dataset.items()}
        else:
            eval_dataset = without_empty_cells(eval_dataset)
        super().__init__(train_dataset=without_empty_cells(train_dataset), eval_dataset=eval_dataset, **kwargs)
        if self.processing_class is not None:
            check_tokenizer_fits(self.model, self.processing_class)
        collator = self._eval_collator = self.data_collator
        self._statistics: dict[bool, torch.Tensor] = {}
        if getattr(collator, "packing", False) and self.args.n_gpu > 1:
            raise ValueError(
                "torch.nn.DataParallel would cut a packed batch across cells: start one process a GPU with "
                "accelerate launch, or let one GPU be seen (CUDA_VISIBLE_DEVICES=0)."
            )
        label2id = getattr(getattr(self.model, "config", None), "label2id", None) or {}
        if getattr(collator, "label2id", 0) is None and not all(name.startswith("LABEL_") for name in label2id):
            collator.label2id = label2id  # the store may list its classes in another order than the model
        if hasattr(collator, "set_epoch"):
            self.add_callback(_SetEpoch(collator))
        if hasattr(collator, "for_evaluation"):
            self._eval_collator = collator.for_evaluation()

    def _remove_unused_columns(self, dataset, description=None):
        return dataset  # the collator takes what it needs, such as cell_id

    def _get_collator_with_removed_columns(self, data_collator, description=None):
        return data_collator

    def _get_dataloader(self, *args, is_training: bool = False, **kwargs):
        training_collator = self.data_collator
        if not is_training:
            self.data_collator = self._eval_collator
        try:
            return super()._get_dataloader(*args, is_training=is_training, **kwargs)
        finally:
            self.data_collator = training_collator

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """As in Trainer; adds up what the loss is made of."""
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        statistics = getattr(outputs, "class_statistics", None)
        if statistics is not None:
            # A replica gives its own rows.
            total = statistics.detach().double().view(-1, len(self._token_classes()), 3).sum(0)
            before = self._statistics.get(model.training)
            self._statistics[model.training] = total if before is None else before + total
        return (loss, outputs) if return_outputs else loss

    def log(self, logs, *args, **kwargs):
        """As in Trainer; with the training losses of the classes of tokens."""
        if "loss" in logs:
            logs = {**logs, **self._class_metrics(True)}
        super().log(logs, *args, **kwargs)

    def evaluation_loop(self, *args, metric_key_prefix: str = "eval", **kwargs):
        """As in Trainer; with the losses of the classes of tokens."""
        self._statistics.pop(False, None)
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        output.metrics.update(self._class_metrics(False, f"{metric_key_prefix}_"))
        return output

    def _token_classes(self) -> list[str]:
        return self.accelerator.unwrap_model(self.model).config.token_classes or ["genes"]

    def _class_metrics(self, training: bool, prefix: str = "") -> dict[str, float]:
        """Give the losses and accuracies since the last time, of all processes."""
        statistics = self._statistics.pop(training, None)
        if statistics is None:
            return {}
        rows = self.accelerator.reduce(statistics, "sum").tolist()
        metrics = {}
        for name, (nll, n_right, n_labels) in zip(self._token_classes(), rows, strict=True):
            if n_labels:
                metrics[f"{prefix}{name}_loss"] = nll / n_labels
                metrics[f"{prefix}{name}_accuracy"] = n_right / n_labels
        return metrics

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """As in Trainer; where predictions are wanted, MLM logits are of all positions, so that they meet labels."""
        config = getattr(self.accelerator.unwrap_model(model), "config", None)
        sparse = getattr(config, "sparse_prediction", False) and not prediction_loss_only
        if not sparse:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        config.sparse_prediction = False
        try:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        finally:
            config.sparse_prediction = True


class STFormerPretrainer(CellTrainer):
    """Trainer that masks cells of a `CellStore`, or of a tokenized dataset, while it trains.

    Masks are a function of (args.seed, epoch, cell); evaluation always masks as in epoch 0, so that its losses can
    be compared. Cells without counts are left out.

    Parameters
    ----------
    args : TrainingArguments
        As for Trainer.
    train_dataset : CellStore, datasets.Dataset or torch Dataset
        Cells; or rows with `input_ids` and `token_type_ids` (and, better, `cell_id`).
    model : PreTrainedModel, optional
        What to train.
    model_init : callable, optional
        Makes the model, for hyperparameter search.
    mlm_probability, phenotype_mask_prob, gene_dropout : float, default: 0.15, 0.5, 0.0
        Shares to mask, and of genes to leave out (see `DataCollatorForPhenotypicMLM`).
    packing : bool, default: False
        Train on packed batches: the cells of a batch in one row, without padding.
    processing_class : GeneTokenizer
        Tokenizes the cells; saved beside the model.
    data_collator : callable, optional
        In place of a `DataCollatorForPhenotypicMLM`, or `DataCollatorForGeneRankMLM`, of the above.
    **kwargs
        All other arguments of Trainer.

    Raises
    ------
    ValueError
        Neither `model` nor `model_init`; no tokenizer and no collator; a tokenizer that does not fit the model.
    """

    def __init__(
        self,
        args: TrainingArguments | None = None,
        train_dataset: Any = None,
        *,
        model: PreTrainedModel | None = None,
        model_init: Callable[..., PreTrainedModel] | None = None,
        mlm_probability: float = 0.15,
        phenotype_mask_prob: float = 0.5,
        gene_dropout: float = 0.0,
        packing: bool = False,
        processing_class: GeneTokenizer | None = None,
        data_collator: Callable | None = None,
        eval_dataset: Any = None,
        **kwargs,
    ):
        if model is None and model_init is None:
            raise ValueError("STFormerPretrainer needs a model, or a model_init that makes one.")
        if data_collator is None:
            if processing_class is None:
                raise ValueError("STFormerPretrainer needs processing_class=tokenizer (or a data_collator).")
            ranks = processing_class.scheme == "rank"
            data_collator = (DataCollatorForGeneRankMLM if ranks else DataCollatorForPhenotypicMLM)(
                processing_class,
                mlm_probability=mlm_probability,
                phenotype_mask_prob=phenotype_mask_prob,
                gene_dropout=gene_dropout,
                seed=0 if args is None else args.seed,
                packing=packing,
            )
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            model_init=model_init,
            **kwargs,
        )


class _SetEpoch(TrainerCallback):
    """Tells the collator which epoch begins, before the epoch's batches are read."""

    def __init__(self, collator):
        self.collator = collator

    def on_epoch_begin(self, args, state, control, **kwargs):
        """Set the epoch; after a resumption `state.epoch` is a fraction into the epoch that goes on."""
        self.collator.set_epoch(math.floor(state.epoch + 1e-9))


def without_empty_cells(dataset: Any) -> Any:
    """Leave the cells without counts out of a store, or of a subset of one; other datasets are returned as they are.

    Parameters
    ----------
    dataset : CellStore, torch.utils.data.Subset of one, or anything else
        What to train on.

    Returns
    -------
    The dataset itself, if it has no empty cell or is no store, else a selection of the store.
    """
    if isinstance(dataset, Subset) and isinstance(dataset.dataset, CellStore):
        dataset = dataset.dataset.select(dataset.indices)
    if not isinstance(dataset, CellStore):
        return dataset
    full = dataset.lengths > 0
    return dataset if full.all() else dataset.select(full)


def check_tokenizer_fits(model: PreTrainedModel, tokenizer: GeneTokenizer) -> None:
    """Compare a model's vocabulary with a tokenizer's.

    Raises
    ------
    ValueError
        The sizes, or the genes, bins or phenotypes themselves, differ.
    """
    config = getattr(model, "config", None)
    if getattr(config, "model_type", None) != "gene_bert" or not isinstance(tokenizer, GeneTokenizer):
        return
    sizes = (config.vocab_size, config.type_vocab_size)
    if sizes != (len(tokenizer), tokenizer.type_vocab_size):
        raise ValueError(
            f"The tokenizer does not fit the model: {len(tokenizer)} ids and {tokenizer.type_vocab_size} types, where "
            f"the model has {sizes[0]} and {sizes[1]}. Load both from one checkpoint, or make the model with "
            "GeneBertConfig.from_tokenizer(tokenizer)."
        )
    if config.vocabulary_fingerprint not in (None, tokenizer.fingerprint):
        raise ValueError(
            "The tokenizer does not fit the model: as many ids and types, but other genes, bins or phenotypes, or "
            "another order. Load both from one checkpoint."
        )


__all__ = ["CellTrainer", "STFormerPretrainer", "check_tokenizer_fits", "without_empty_cells"]
