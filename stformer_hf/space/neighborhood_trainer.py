"""NeighborhoodTrainer: `CellTrainer` for models of cell neighbourhoods."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers.trainer_utils import EvalLoopOutput

from ..batches.parts import as_selection, bases
from ..models.cell_neighborhood.count_likelihoods import pearson_r
from ..models.gene_bert.configuration_gene_bert import IGNORE
from ..training.cell_trainer import CellTrainer
from ..training.loss_trainer import filling_cells
from .center_mask_sampler import CenterMaskSampler
from .neighborhood_baselines import mean_of_defined, neighborhood_baselines
from .neighborhood_collator import collate_neighborhoods


class NeighborhoodTrainer(CellTrainer):
    """Trainer of a `CellNeighborhoodForMaskedCell` on the neighbourhoods of a `CenterMaskSampler`.

    Batches are packed. Evaluations include `pearson_r`: the mean over cells of Pearson's r, over genes, between log1p
    of the expected and of the true counts. See `CellTrainer` for the order of the cells and for resumption.

    Parameters
    ----------
    args : TrainingArguments
    train_dataset : CenterMaskSampler
        Its genes, cell types, options and section key are written to the model's configuration if that has none, and
        compared with it otherwise.
    model : CellNeighborhoodForMaskedCell, optional
        The model to train; for hyperparameter search, pass `model_init` instead.
    baselines : bool, default: False
        Add `neighborhood_baselines` to the metrics of each evaluation.
    data_collator : callable, default: `collate_neighborhoods` with `packed=True`
    **kwargs
        All other arguments of `CellTrainer`.

    Raises
    ------
    ValueError
        The cells do not fit the model; see `CenterMaskSampler.fit_model`. Baselines are requested, and the cells are
        not those of one `CenterMaskSampler`.
    """

    def __init__(
        self,
        args: Any = None,
        train_dataset: Any = None,
        *,
        baselines: bool = False,
        data_collator: Callable[..., Any] | None = None,
        **kwargs: Any,
    ):
        train_dataset = as_selection(train_dataset)
        if baselines:
            _check_baselines(train_dataset, kwargs.get("eval_dataset"))
        self.baselines = baselines
        self._baselines: list[tuple[Any, dict[str, float]]] = []  # one entry per evaluation dataset
        self._pearson_r: list[np.ndarray] = []  # of masked cells in the current evaluation
        super().__init__(
            args=args,
            train_dataset=train_dataset,
            data_collator=data_collator or partial(collate_neighborhoods, packed=True),
            **kwargs,
        )

    def _is_packed(self) -> bool:
        return True

    def _uses_every_parameter(self) -> bool:
        return True  # also the loss of cells without neighbours

    def _order(self) -> dict[str, Any]:
        descriptions = "; ".join(sampler.description for sampler in bases(self.train_dataset))
        return {**super()._order(), "neighbourhoods": descriptions}

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Any:
        """Count the items as Trainer does; they are the masked cells, without those that fill up a batch."""
        masks = [batch.get("loss_mask", torch.ones_like(batch["masked_cell_type"])) for batch in batch_samples]
        return super()._get_num_items_in_batch(
            [{"labels": torch.where(mask.bool(), 0, IGNORE)} for mask in masks], device
        )

    def _without_filling_cells(self, inputs: dict[str, Any]) -> dict[str, Any]:
        rows = filling_cells(self.accelerator, len(inputs["masked_cell_type"]))
        return inputs if rows is None else {**inputs, "loss_mask": ~rows.to(self.args.device)}

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, Any]:
        """Compute the loss as Trainer does, and keep Pearson's r of masked cells during an evaluation."""
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if not model.training and "expected_counts" in outputs and "masked_expression" in inputs:
            r = pearson_r(outputs["expected_counts"].detach().log1p(), inputs["masked_expression"].log1p())
            self._pearson_r.append(self.accelerator.gather_for_metrics(r).cpu().numpy())
        return (loss, outputs) if return_outputs else loss

    def evaluation_loop(
        self, dataloader: DataLoader, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any
    ) -> EvalLoopOutput:
        """Evaluate as Trainer does, with `pearson_r`, and the baselines if they are requested."""
        self._pearson_r = []
        output = super().evaluation_loop(dataloader, *args, metric_key_prefix=metric_key_prefix, **kwargs)
        if self._pearson_r:
            metrics = {"pearson_r": mean_of_defined(np.concatenate(self._pearson_r))}
            if self.baselines:
                metrics |= self._baselines_on(dataloader.dataset)
            output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in metrics.items()})
        return output

    def _baselines_on(self, dataset: Any) -> dict[str, float]:
        """Return the baselines, computed once in each process: they do not depend on the model."""
        for known, metrics in self._baselines:
            if known is dataset:
                return metrics
        metrics = neighborhood_baselines(self.train_dataset, dataset, seed=self.args.seed)
        self._baselines.append((dataset, metrics))
        return metrics


def _check_baselines(train_dataset: Any, eval_dataset: Any) -> None:
    others = eval_dataset.values() if isinstance(eval_dataset, dict) else [eval_dataset]
    for cells in (train_dataset, *map(as_selection, others)):
        if cells is not None and not isinstance(cells, CenterMaskSampler):
            raise ValueError(
                f"baselines=True needs one CenterMaskSampler, but a {type(cells).__name__} combines several: make one "
                "of all cells, with a section_key."
            )
