"""`CellTrainer` with objectives that train `[CLS]` beside masked genes, and a moving average of the weights."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, Sampler
from transformers import PreTrainedModel
from transformers.trainer_utils import EvalLoopOutput

from ..batches.samplers import SameSourceSampler
from ..models.gene_bert.configuration_gene_bert import IGNORE
from ..models.gene_bert.heads import pool
from ..store.cell_store import CellStore
from .cell_trainer import CellTrainer
from .loss_trainer import filling_cells, sum_dtype, without_labels
from .objectives import check_objectives
from .objectives.contrast import cells_with_negatives, comparable_cells, contrast_loss, contrast_of_totals
from .objectives.cross_correlation import cross_correlation_loss
from .objectives.decode import add_decoder, decode_loss
from .objectives.views import OF_PAIRS, ViewCollator, sources_of
from .objectives.watch import effective_rank, total_r2
from .starts.spectral_start import cell_embedding_of
from .weight_average import AverageWeights, WeightAverage

_CELLS_TO_WATCH = 1024


class ObjectiveTrainer(CellTrainer):
    """Trainer for a weighted sum of objectives.

    All objectives except `mlm` train `[CLS]` on two views of each cell (`ViewCollator`). With them, `config.pooling`
    is set to "cls", and batches have two rows per cell. Each objective is computed on the batch of one process, and
    averaged over processes and accumulated batches, so that it depends only on the batches.

    In evaluation, the losses of `mlm` and `decode` are means over all masked tokens and all views, regardless of the
    batches. Those of `contrast` and `cross_correlation` compare the cells of a batch: their means over cells depend on
    `per_device_eval_batch_size` and on the number of processes, and are comparable only if these are equal.

    With such objectives, the loss of each (`<objective>_loss`) is logged for training and evaluation, together with
    `contrast_of_totals`, the contrast loss of a reader that knows only the totals of the views. For the `[CLS]` of the
    first views of up to 1,024 cells of one process since the last log, `effective_rank`, which falls if the embedding
    collapses, and `total_r2`, how well it predicts the log total of the view, are logged too.

    Parameters
    ----------
    objectives : mapping of str to float, optional
        Weights of `mlm` (masked genes and phenotypes), `contrast` (InfoNCE), `decode` (negative binomials of the
        counts that are not in the view) and `cross_correlation`; {"mlm": 1.0} by default.
    view : {"disjoint", "thinning"}, default: "disjoint"
        How a cell is divided into two views; see `ViewCollator`.
    batch_key : str, optional
        Categorical obs column: the negatives of `contrast` are cells with the same value, and batches are filled with
        cells of one value (`SameSourceSampler`). By default, the file that each cell comes from.
    ema : float, optional
        Decay of a moving average of the weights, such as 0.999. The average is evaluated instead of the weights,
        replaces them after training, and is saved beside them in checkpoints.
    **kwargs
        All other arguments of CellTrainer.

    Raises
    ------
    ValueError
        An objective, view or column is unknown; objectives on `[CLS]` are used with a model without `cell_embedding`,
        with cells that are not in a store, or on multiple GPUs in one process; batches by length are combined with
        `batch_key`; `ema` is used with a sharded model.
    """

    def __init__(
        self,
        *,
        objectives: Mapping[str, float] | None = None,
        view: str = "disjoint",
        batch_key: str | None = None,
        ema: float | None = None,
        model: PreTrainedModel | None = None,
        data_collator: Any = None,
        **kwargs: Any,
    ):
        self.objectives = check_objectives(objectives)
        self._trains_cls = any(name != "mlm" for name in self.objectives)
        self.batch_key = batch_key
        if batch_key is not None and not self._trains_cls:
            raise ValueError("batch_key needs objectives that train [CLS]: it chooses the negatives of contrast.")
        if self._trains_cls:
            data_collator = ViewCollator(data_collator, view, batch_key)
            if model is not None:
                self._prepare_model(model)
        self._watched: dict[bool, list[tuple[torch.Tensor, ...]]] = {True: [], False: []}  # states, totals, usable
        self._average = None if ema is None else WeightAverage(ema)
        super().__init__(model=model, data_collator=data_collator, **kwargs)
        self._loss_is_a_mean_over_labels = not self._trains_cls
        if self._trains_cls:
            self._check_cells()
        if self._average is not None:
            if self.is_fsdp_enabled or self.is_deepspeed_enabled:
                raise ValueError("ema averages whole weights, but FSDP and DeepSpeed shard them: leave it out.")
            self.add_callback(AverageWeights(self, self._average))

    def _prepare_model(self, model: PreTrainedModel) -> None:
        """Set the pooling of a model to `[CLS]`, and add the decoder if an objective needs it."""
        if not getattr(model.config, "cell_embedding", False):
            raise ValueError(
                f"The objectives {', '.join(name for name in self.objectives if name != 'mlm')} train [CLS] as the "
                "whole cell, but the model has no cell_embedding. Make it for a tokenizer with whole_cell=True "
                "(GeneBertConfig.from_tokenizer)."
            )
        if model.config.cls_state == "fixed":
            raise ValueError(
                'The model keeps [CLS] fixed, and objectives would not train it: create it with cls_state="layers", '
                'or load it with from_pretrained(…, cls_state="gated").'
            )
        model.config.pooling = "cls"
        if "decode" in self.objectives:
            add_decoder(model)

    def call_model_init(self, trial: Any = None) -> PreTrainedModel:
        """Make the model of a trial as CellTrainer does, and prepare it for the objectives."""
        model = super().call_model_init(trial)
        if self._trains_cls:
            self._prepare_model(model)
        return model

    def _uses_every_parameter(self) -> bool:
        return super()._uses_every_parameter() and not self._trains_cls  # whose loss may leave out the MLM head

    def _check_cells(self) -> None:
        args = self.args
        if getattr(self.data_collator.collator, "pad_packed_to", None) is not None:
            raise ValueError("pad_packed_to is not supported with objectives that train [CLS]: leave it out.")
        if args.n_gpu > 1:
            raise ValueError(
                "torch.nn.DataParallel would separate the two views of a cell: start one process per GPU with "
                "accelerate launch, or make only one GPU visible (CUDA_VISIBLE_DEVICES=0)."
            )
        for cells in self._own_datasets():
            if cells is None:
                continue
            if not isinstance(cells, CellStore):
                raise ValueError(
                    f"Two views of a cell are made from its counts: objectives on [CLS] need a CellStore, got "
                    f"{type(cells).__name__}."
                )
            if self.batch_key is not None:
                sources_of(cells, self.batch_key)
        by_length = self.max_tokens_per_batch is not None or args.train_sampling_strategy != "random"
        if self.batch_key is not None and by_length:
            raise ValueError(
                "batch_key fills batches with cells of one value, in a random order: leave max_tokens_per_batch and "
                "train_sampling_strategy out."
            )

    # ------------------------------------------------------------------ batches

    def get_train_sampler(self) -> Sampler | None:
        """Return the sampler of CellTrainer; for objectives on `[CLS]`, in a random order, a SameSourceSampler."""
        dataset = self.train_dataset
        in_random_order = self.max_tokens_per_batch is None and self.args.train_sampling_strategy == "random"
        if not self._trains_cls or not in_random_order or isinstance(dataset, IterableDataset) or dataset is None:
            return super().get_train_sampler()
        sources = sources_of(dataset, self.batch_key)
        return SameSourceSampler(sources, self._train_batch_size, self.seed_of_order, draw=self._draw(dataset))

    def _n_tokens(self, dataset: Any) -> np.ndarray:
        """Return the number of tokens of each row; two views have at most twice those of a cell."""
        return super()._n_tokens(dataset) * (2 if self._trains_cls else 1)

    def _order(self) -> dict[str, Any]:
        order = super()._order()
        return {**order, "batch_key": self.batch_key, "two views": True} if self._trains_cls else order

    def _without_filling_cells(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Remove the labels and counts of filling cells, which excludes them from all objectives."""
        if not self._trains_cls:
            return super()._without_filling_cells(inputs)
        totals = inputs["view_totals"]
        rows = filling_cells(self.accelerator, len(totals) // 2)
        if rows is None:
            return inputs
        rows = rows.repeat(2)
        totals = totals.masked_fill(rows.to(totals.device), 0)
        return {**without_labels(inputs, self.label_names, rows), "view_totals": totals}

    # ------------------------------------------------------------------ losses

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, Any]:
        """Compute the weighted sum of the objectives."""
        if not self._trains_cls:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        totals, twins, sources = (inputs[name] for name in OF_PAIRS)
        inputs = {name: value for name, value in inputs.items() if name not in OF_PAIRS}
        mlm, outputs = super().compute_loss(model, {**inputs, "output_hidden_states": True}, True, num_items_in_batch)
        states = pool(
            outputs.hidden_states[-1], None, inputs.get("attention_mask"), "cls", inputs.get("cu_seq_lens_q")
        )
        usable = (totals > 0).view(2, -1).all(0)
        n_accumulated = self.current_gradient_accumulation_steps if model.training else 1
        # For mlm, the contribution of this batch to the mean over the labels of all accumulated batches.
        losses = {"mlm": mlm * n_accumulated}
        n_labels = (inputs["labels"] != IGNORE).sum() if num_items_in_batch is None else num_items_in_batch
        n_terms = {"mlm": torch.as_tensor(n_labels, device=mlm.device)}  # what its mean is over, of all processes
        if "contrast" in self.objectives:
            comparable = comparable_cells(twins, sources, usable)
            losses["contrast"] = contrast_loss(states, comparable)
            n_terms["contrast"] = cells_with_negatives(comparable).sum()
            of_totals = contrast_of_totals(totals, comparable)
            self._add_loss(model.training, "contrast_of_totals", of_totals, n_terms["contrast"])
        if "cross_correlation" in self.objectives:
            losses["cross_correlation"] = cross_correlation_loss(states, usable)
            n_terms["cross_correlation"] = usable.sum()
        if "decode" in self.objectives:
            known = cell_embedding_of(self.accelerator.unwrap_model(model)).statistics.shares > 0
            losses["decode"], n_terms["decode"] = decode_loss(
                outputs.gene_logits, outputs.log_dispersion, inputs, known, usable
            )
        for name in self.objectives:
            self._add_loss(model.training, f"{name}_loss", losses[name], n_terms[name])
        self._watch(model.training, states, totals, usable)
        # Trainer does not divide the loss of a model that counts its labels, so the mean over batches is taken here.
        loss = sum(weight * losses[name] for name, weight in self.objectives.items()) / n_accumulated
        if not return_outputs:
            return loss
        return loss, {name: value for name, value in outputs.items() if name != "hidden_states"}  # no predictions

    def _add_loss(self, training: bool, name: str, loss: torch.Tensor, n_terms: torch.Tensor) -> None:
        """Add the loss of a batch: in training each batch counts alike, in evaluation each term of its mean."""
        n_terms = (torch.ones_like(n_terms) if training else n_terms).to(sum_dtype(loss.device))
        self._add(training, name, torch.stack([loss * n_terms, n_terms]))

    def _watch(self, training: bool, states: torch.Tensor, totals: torch.Tensor, usable: torch.Tensor) -> None:
        watched = self._watched[training]
        n_cells = len(usable)
        watched.append((states[:n_cells].detach().float(), totals[:n_cells], usable))
        while sum(len(of) for _, _, of in watched[1:]) >= _CELLS_TO_WATCH:
            watched.pop(0)

    def _means(self, training: bool, prefix: str = "") -> dict[str, float]:
        """Return the means of LossTrainer and the diagnostics since the last call."""
        if not self._trains_cls:
            return super()._means(training, prefix)
        # The loss of an objective is 0 if no cell had a loss.
        nothing = {prefix + name: 0.0 for name in self._sums[training] if name != "classes"}
        means = nothing | super()._means(training, prefix)
        watched, self._watched[training] = self._watched[training], []
        if watched:
            states, totals, usable = map(torch.cat, zip(*watched, strict=True))
            states, totals = states[usable][-_CELLS_TO_WATCH:], totals[usable][-_CELLS_TO_WATCH:]
            if len(states):
                means[f"{prefix}effective_rank"] = effective_rank(states)
            r2 = total_r2(states, totals)
            if r2 == r2:
                means[f"{prefix}total_r2"] = r2
        losses = {name: f"{prefix}{name}_loss" for name in self.objectives}
        if not training and set(losses.values()) <= means.keys():
            means[f"{prefix}loss"] = sum(weight * means[losses[name]] for name, weight in self.objectives.items())
        return means

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """Evaluate as CellTrainer does, on the averaged weights if `ema` is set."""
        self._watched[False] = []
        average = self._average if self.is_in_train else None
        with nullcontext() if average is None else average.in_place_of_weights(self.model):
            return super().evaluation_loop(*args, **kwargs)

    # ------------------------------------------------------------------ checkpoints

    def _save_more(self, checkpoint: Path) -> None:
        if self._average is not None:
            self._average.save(checkpoint)

    def _prepare_for_training(
        self, max_steps: int, train_dataloader: DataLoader, resume_from_checkpoint: str | None
    ) -> tuple[nn.Module, DataLoader]:
        self._watched[True] = []  # forget an attempt that ran out of memory
        prepared = super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        if self._average is not None:
            if resume_from_checkpoint is None:
                self._average.begin(self.model)
            else:
                self._average.load(Path(resume_from_checkpoint), self.model)
        return prepared
