"""Losses: in an evaluation each label counts alike, and each class of tokens has a loss of its own."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader
from transformers.trainer_utils import EvalLoopOutput

from ..evaluation.metrics import preprocess_logits_for_metrics, preprocess_logits_with_nll
from ..models.gene_bert.configuration_gene_bert import IGNORE
from .argument_checks import smoothing_field
from .throughput import MeasuredTrainer

logger = logging.getLogger(__name__)


class LossTrainer(MeasuredTrainer):
    """Trainer whose evaluation loss is the mean over all labels, and which logs a loss for each class of tokens."""

    label_smoother: Callable[..., torch.Tensor] | None  # set by Trainer
    _tr_loss: torch.Tensor  # set by Trainer
    # False for objectives that compare cells, whose loss is a mean over batches.
    _loss_is_a_mean_over_labels = True

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        # Sums over batches since the last log, by name: those of training (True), and of an evaluation (False).
        self._sums: dict[bool, dict[str, torch.Tensor]] = {True: {}, False: {}}

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> tuple[nn.Module, DataLoader]:
        self._sums[True] = {}  # forget an attempt that ran out of memory (auto_find_batch_size)
        self._was_finite = True
        return super()._prepare_for_training(*args, **kwargs)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, Any]:
        """Compute the loss as Trainer does, add up its parts, and smooth labels in the model.

        Trainer's own smoothing ignores class weights and loss weights, and takes the labels from the model.
        """
        with self._smoothed_labels():
            loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        statistics = getattr(outputs, "class_statistics", None)
        if statistics is not None:
            statistics = statistics.to(sum_dtype(statistics.device))
            # Each replica returns its own rows.
            self._add(model.training, "classes", statistics.view(-1, len(self._token_classes()), 3).sum(0))
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

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
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
            self._add(False, "loss", loss_of_batch(loss, n_labels, self.args.logging_nan_inf_filter))
        return loss, logits, labels

    def _without_filling_cells(self, inputs: dict[str, Any]) -> dict[str, Any]:
        names = [name for name in self.label_names if isinstance(inputs.get(name), torch.Tensor)]
        rows = filling_cells(self.accelerator, len(inputs[names[0]])) if names else None
        return inputs if rows is None else without_labels(inputs, names, rows)

    # ------------------------------------------------------------------ figures

    def _token_classes(self) -> list[str]:
        return self.model.config.token_classes or ["genes"]

    def _add(self, training: bool, name: str, sums: torch.Tensor) -> None:
        """Add the sum of a loss and the number of its terms in a batch; they stay on their device until a log."""
        sums, before = sums.detach(), self._sums[training].get(name)
        self._sums[training][name] = sums if before is None else before + sums

    def _means(self, training: bool, prefix: str = "") -> dict[str, float]:
        """Return the mean losses and accuracies since the last call, over all processes."""
        sums, self._sums[training] = self._sums[training], {}
        rows = {name: self.accelerator.reduce(of, "sum").tolist() for name, of in sums.items()}
        means = {}
        classes = self._token_classes() if "classes" in rows else []
        for name, (nll, n_right, n_labels) in zip(classes, rows.pop("classes", []), strict=True):
            if n_labels:
                means[f"{prefix}{name}_loss"] = nll / n_labels
                means[f"{prefix}{name}_accuracy"] = n_right / n_labels
        return means | {prefix + name: total / n for name, (total, n) in rows.items() if n}

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log as Trainer does, with the training losses of the classes of tokens; warn of one that is not finite."""
        if "loss" in logs:
            logs = {**logs, **self._means(True)}
            if self.is_in_train and not math.isfinite(logs["loss"]):
                self._tr_loss.zero_()  # Trainer subtracts it from itself, after which all later losses would be NaN
                self._warn_once_of_loss(logs["loss"])
        super().log(logs, *args, **kwargs)

    def _warn_once_of_loss(self, loss: float) -> None:
        if self._was_finite:
            logger.warning(
                f"The loss is {loss} in step {self.state.global_step} or shortly before. Training continues, but if "
                "the loss stays so, the weights are useless: stop, and start again, or resume from an earlier "
                "checkpoint, with a lower learning rate or max_grad_norm."
            )
        self._was_finite = False

    def evaluation_loop(
        self, dataloader: DataLoader, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any
    ) -> EvalLoopOutput:
        """Evaluate as Trainer does; the loss is the mean over all labels, and each class of tokens has its own."""
        self._sums[False] = {}
        output = super().evaluation_loop(dataloader, *args, metric_key_prefix=metric_key_prefix, **kwargs)
        output.metrics.update(self._means(False, f"{metric_key_prefix}_"))
        return output


def sum_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype of sums over many batches on a device: float64, or float32 on MPS, which has no other."""
    return torch.float32 if device.type == "mps" else torch.float64


def loss_of_batch(loss: torch.Tensor, n_labels: torch.Tensor | int, only_finite: bool) -> torch.Tensor:
    """Return the sum of the loss over the labels of a batch, and their number, for a mean over batches: Tensor (2,).

    Both are 0 for a batch without labels, or, with `only_finite`, whose loss is infinite or NaN. `loss` (), the mean
    over the labels, has the device of the result; `n_labels` may be repeated, (n_gpu, 1).
    """
    loss = loss.detach().to(sum_dtype(loss.device))
    # With DataParallel, Trainer repeats the number for each GPU.
    n_labels = torch.as_tensor(n_labels, device=loss.device).to(loss.dtype).reshape(-1)[0]
    counts = (n_labels > 0) & loss.isfinite() if only_finite else n_labels > 0
    return torch.where(counts, torch.stack([loss * n_labels, n_labels]), 0.0)


def filling_cells(accelerator: Accelerator, n_cells: int) -> torch.Tensor | None:
    """Return which of the `n_cells` in this process's batch are repeats: bool Tensor (n_cells,), or None without any.

    accelerate repeats cells from the beginning of the data, so that all processes have equally many. In the last batch
    of all processes, they are the cells after the remainder; `gather_for_metrics` leaves them out.
    """
    state = accelerator.gradient_state
    if accelerator.num_processes == 1 or not state.end_of_dataloader or state.remainder <= 0:
        return None
    number = accelerator.process_index * n_cells + torch.arange(n_cells)
    return number >= state.remainder


def without_labels(inputs: dict[str, Any], names: list[str], rows: torch.Tensor) -> dict[str, Any]:
    """Return a copy of a batch in which some rows, bool Tensor (n,), have none of the labels `names`."""
    hidden = {name: inputs[name].clone() for name in names if inputs.get(name) is not None}
    for labels in hidden.values():
        labels[rows.to(labels.device)] = IGNORE
    return {**inputs, **hidden}
