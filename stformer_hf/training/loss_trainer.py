"""Losses: in an evaluation each label counts alike, and each class of tokens has a loss of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ..evaluation.metrics import preprocess_logits_for_metrics, preprocess_logits_with_nll
from .argument_checks import smoothing_field
from .eval_loss import SumOfLosses, filling_cells, sum_dtype, without_labels
from .throughput import MeasuredTrainer


class LossTrainer(MeasuredTrainer):
    """Trainer whose evaluation loss is the mean over all labels, and which logs a loss for each class of tokens."""

    label_smoother: Callable[..., torch.Tensor] | None  # set by Trainer
    # False for objectives that compare cells, whose loss is a mean over batches.
    _loss_is_a_mean_over_labels = True

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        # Sums over the batches of training (True) and of an evaluation (False) since the last log.
        self._statistics: dict[bool, torch.Tensor] = {}
        self._eval_losses = SumOfLosses()

    def _prepare_for_training(self, *args, **kwargs):
        self._statistics.clear()  # of an attempt that ran out of memory (auto_find_batch_size)
        return super()._prepare_for_training(*args, **kwargs)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Compute the loss as Trainer does, add up its parts, and smooth labels in the model.

        Trainer's own smoothing ignores class weights and loss weights, and takes the labels from the model.
        """
        with self._smoothed_labels():
            loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        statistics = getattr(outputs, "class_statistics", None)
        if statistics is not None:
            # Each replica returns its own rows.
            total = statistics.detach().to(sum_dtype(statistics.device)).view(-1, len(self._token_classes()), 3).sum(0)
            before = self._statistics.get(model.training)
            self._statistics[model.training] = total if before is None else before + total
        return (loss, outputs) if return_outputs else loss

    @contextmanager
    def _smoothed_labels(self) -> Iterator[None]:
        """Let the loss of the model apply `args.label_smoothing_factor`, if it is a model of this package."""
        field = smoothing_field(self.model) if self.args.label_smoothing_factor else None
        if field is None:
            yield
            return
        smoother, self.label_smoother = self.label_smoother, None
        config = self.model.config
        before = getattr(config, field)
        setattr(config, field, self.args.label_smoothing_factor)
        try:
            yield
        finally:
            setattr(config, field, before)
            self.label_smoother = smoother

    def log(self, logs, *args, **kwargs):
        """Log as Trainer does, with the training losses of the classes of tokens."""
        if "loss" in logs:
            logs = {**logs, **self._class_metrics(True)}
        super().log(logs, *args, **kwargs)

    def evaluation_loop(self, dataloader, *args, metric_key_prefix: str = "eval", **kwargs):
        """Evaluate as Trainer does; the loss is the mean over all labels, and each class of tokens has its own."""
        self._statistics.pop(False, None)
        self._eval_losses = SumOfLosses()
        output = super().evaluation_loop(dataloader, *args, metric_key_prefix=metric_key_prefix, **kwargs)
        loss = self._eval_losses.mean(self.accelerator)
        if loss is not None:
            output.metrics[f"{metric_key_prefix}_loss"] = loss
        output.metrics.update(self._class_metrics(False, f"{metric_key_prefix}_"))
        return output

    def _token_classes(self) -> list[str]:
        return self.model.config.token_classes or ["genes"]

    def _class_metrics(self, training: bool, prefix: str = "") -> dict[str, float]:
        """Return the losses and accuracies since the last call, over all processes."""
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
        """Predict as Trainer does; cells that fill the last batch of multiple processes have no labels.

        MLM logits that are not gathered cover only the labelled positions.
        """
        inputs = self._without_filling_cells(inputs)
        n_labels = self._get_num_items_in_batch([inputs], self.args.device)
        self._set_signature_columns_if_needed()
        reduced = self.preprocess_logits_for_metrics in (preprocess_logits_for_metrics, preprocess_logits_with_nll)
        if (prediction_loss_only or reduced) and "sparse_prediction" in self._signature_columns:
            inputs = {**inputs, "sparse_prediction": self.model.config.sparse_prediction}
        loss, logits, labels = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        if self._loss_is_a_mean_over_labels and loss is not None and n_labels is not None:
            self._eval_losses.add(loss, n_labels, only_finite=self.args.logging_nan_inf_filter)
        return loss, logits, labels

    def _without_filling_cells(self, inputs: dict[str, Any]) -> dict[str, Any]:
        names = [name for name in self.label_names if isinstance(inputs.get(name), torch.Tensor)]
        rows = filling_cells(self.accelerator, len(inputs[names[0]])) if names else None
        return inputs if rows is None else without_labels(inputs, names, rows)


__all__ = ["LossTrainer"]
