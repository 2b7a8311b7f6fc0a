"""STFormerPretrainer: `transformers.Trainer` for masked pretraining on cells."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset
from transformers import PreTrainedModel, TrainingArguments
from transformers.trainer_utils import EvalLoopOutput

from ..batches.collators import DataCollatorForGeneRankMLM, DataCollatorForPhenotypicMLM
from ..batches.parts import as_selection
from ..batches.precollator import STFormerPreCollator
from ..batches.token_rows import TokenRows
from ..evaluation.context_swap import context_swap
from ..evaluation.gene_baselines import masked_gene_baselines, masked_genes
from ..evaluation.metrics import preprocess_logits_with_nll
from ..models.gene_bert.tokenization_gene_bert import GeneTokenizer
from .loss_trainer import sum_dtype
from .objective_trainer import ObjectiveTrainer
from .objectives import check_objectives

_CELLS_FOR_FREQUENCIES = 100_000
_CELLS_TO_SWAP = 512


class STFormerPretrainer(ObjectiveTrainer):
    """Trainer for masked pretraining on a `CellStore` or a tokenized dataset.

    Masks are a function of (args.seed, epoch, cell); evaluation always masks as in epoch 0. See `CellTrainer` for the
    order of the cells, `get_train_sampler`, and resumption, and `ObjectiveTrainer` for objectives that train `[CLS]`.

    Parameters
    ----------
    args : TrainingArguments
        As for Trainer; `train_sampling_strategy="group_by_length"` groups the cells by length.
    train_dataset : CellStore, datasets.Dataset or torch Dataset
        Cells; or rows with `input_ids` (and preferably `token_type_ids` and `cell_id`).
    token_dictionary : dict of str to int, or path of a .json or .pkl, optional
        STFormer's vocabulary, for rows of token ids and a model without token types, such as BERT; instead of
        `processing_class`.
    example_lengths_file : path of a .json or .pkl, or sequence of int, optional
        Number of tokens of each row of `train_dataset`; see `lengths` of `CellTrainer`.
    model : PreTrainedModel, optional
        Model to train.
    model_init : callable, optional
        Function that returns a new model, for hyperparameter search.
    mlm_probability, phenotype_mask_prob, gene_dropout : float, default: 0.15, 0.5, 0.0
        Shares of genes and of phenotypes to mask, and of genes to drop (see `DataCollatorForPhenotypicMLM`).
    baselines : bool, default: False
        Add baselines to the metrics of each evaluation: `genes_nll`, the mean negative log likelihood in nats of the
        masked genes; the same of simple baselines at the same positions (`masked_gene_baselines`, estimated once from
        at most 100,000 training cells); and how the loss changes with the genes of another cell (`context_swap`, on
        at most 512 cells).
    objectives, view, batch_key, ema
        As for `ObjectiveTrainer`. Without `mlm`, no gene is masked. With objectives that train `[CLS]`, every
        phenotype is masked, since both views of a cell would show it.
    packing : bool, default: False
        Train on packed batches: the cells of a batch in one row, without padding.
    max_tokens_per_batch : int, optional
        Fill batches up to this many tokens, instead of a number of cells.
    sampling : mapping, optional
        Which cells an epoch reads, such as {"by": "cell_type"}; see `CellTrainer`.
    processing_class : GeneTokenizer
        Tokenizer of the cells; saved beside the model.
    data_collator : callable, optional
        Replaces the `DataCollatorForPhenotypicMLM` or `DataCollatorForGeneRankMLM` made from the parameters above.
    **kwargs
        All other arguments of Trainer.

    Raises
    ------
    ValueError
        Neither `model` nor `model_init` is given; neither tokenizer, dictionary nor collator is given, or both of the
        first two; the tokenizer does not fit the model; the lengths do not fit the dataset; baselines are requested,
        but the cells are a stream or the collator masks no genes.
    """

    def __init__(
        self,
        args: TrainingArguments | None = None,
        train_dataset: Any = None,
        token_dictionary: Mapping[str, int] | str | Path | None = None,
        example_lengths_file: str | Path | Sequence[int] | None = None,
        model: PreTrainedModel | None = None,
        model_init: Callable[..., PreTrainedModel] | None = None,
        mlm_probability: float = 0.15,
        *,
        phenotype_mask_prob: float = 0.5,
        gene_dropout: float = 0.0,
        baselines: bool = False,
        objectives: Mapping[str, float] | None = None,
        packing: bool = False,
        processing_class: GeneTokenizer | None = None,
        data_collator: Callable | None = None,
        **kwargs: Any,
    ):
        if model is None and model_init is None:
            raise ValueError("STFormerPretrainer needs a model, or a model_init that makes one.")
        if token_dictionary is not None:
            if processing_class is not None:
                raise ValueError("token_dictionary and processing_class both define the tokens: pass one of them.")
            # It has what the rank collator, the baselines and Trainer read of a tokenizer.
            processing_class = cast(GeneTokenizer, STFormerPreCollator(token_dictionary))
        train_dataset = as_selection(train_dataset)
        held_out = kwargs.get("eval_dataset")
        eval_datasets = list(map(as_selection, held_out.values() if isinstance(held_out, dict) else [held_out]))
        if data_collator is None:
            if processing_class is None:
                raise ValueError(
                    "STFormerPretrainer needs processing_class=tokenizer (or a data_collator). For neighbourhoods of "
                    "cells use NeighborhoodTrainer."
                )
            chosen = check_objectives(objectives)
            ranks = processing_class.scheme == "rank"
            data_collator = (DataCollatorForGeneRankMLM if ranks else DataCollatorForPhenotypicMLM)(
                processing_class,
                mlm_probability=mlm_probability if "mlm" in chosen else 0.0,
                phenotype_mask_prob=phenotype_mask_prob if set(chosen) == {"mlm"} else 1.0,
                gene_dropout=gene_dropout,
                seed=0 if args is None else args.seed,
                packing=packing,
            )
        if baselines:
            if set(check_objectives(objectives)) != {"mlm"}:
                raise ValueError(
                    "baselines=True masks whole cells, but objectives on [CLS] train on two views of each cell: leave "
                    "one out."
                )
            _check_baselines(train_dataset, eval_datasets, data_collator)
        self.baselines = baselines
        self._baselines: list[tuple[Any, dict[str, float]]] = []  # one entry per evaluation dataset
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator,
            objectives=objectives,
            train_dataset=train_dataset,
            lengths=example_lengths_file,
            processing_class=processing_class,
            model_init=model_init,
            **kwargs,
        )

    def evaluation_loop(
        self, dataloader: DataLoader, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any
    ) -> EvalLoopOutput:
        """Evaluate as Trainer does, with the baselines if they are requested."""
        output = super().evaluation_loop(dataloader, *args, metric_key_prefix=metric_key_prefix, **kwargs)
        if f"{metric_key_prefix}_genes_nll" in output.metrics:
            dataset = dataloader.dataset
            dataset = dataset.dataset if isinstance(dataset, TokenRows) else dataset
            found = {**self._baselines_on(dataset), **self._context_swap(dataset)}
            output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in found.items()})
        return output

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, Any]:
        """Compute the loss as Trainer does, and add up the losses of masked genes if there are baselines."""
        labels = inputs.get("labels")
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if self.baselines and not model.training and labels is not None:
            batch = {"input_ids": inputs["input_ids"].cpu().numpy(), "labels": labels.cpu().numpy()}
            scored = torch.from_numpy(masked_genes(batch, self.data_collator.tokenizer).scored).to(labels.device)
            _, nll = preprocess_logits_with_nll(outputs.logits.detach(), labels)
            of_cells = torch.stack([(nll * scored).sum(1), scored.float().sum(1)])
            self._add(False, "genes_nll", of_cells.to(sum_dtype(labels.device)).sum(1))
        return (loss, outputs) if return_outputs else loss

    def _baselines_on(self, dataset: Any) -> dict[str, float]:
        """Return the baselines, computed once in each process; they do not depend on the model."""
        for known, metrics in self._baselines:
            if known is dataset:
                return metrics
        metrics = masked_gene_baselines(
            self.train_dataset,
            dataset,
            self.data_collator,
            max_train_cells=_CELLS_FOR_FREQUENCIES,
            whole_cells=self.data_collator.tokenizer.whole_cell,
        )
        self._baselines.append((dataset, metrics))
        return metrics

    def _context_swap(self, dataset: Any) -> dict[str, float]:
        """Swap the contexts of the same cells in every process, so that sharded models stay in step."""
        if len(dataset) < 2:
            return {}
        with self.compute_loss_context_manager():
            return context_swap(
                self.model_wrapped,
                dataset,
                self.data_collator,
                batch_size=self.args.per_device_eval_batch_size,
                max_cells=_CELLS_TO_SWAP,
                seed=self.args.seed,
            )


def _check_baselines(train_dataset: Any, eval_datasets: Sequence[Any], collator: Callable) -> None:
    if train_dataset is None:
        raise ValueError("baselines=True needs training cells, but train_dataset is None.")
    for which, cells in (*(("held-out", cells) for cells in eval_datasets), ("training", train_dataset)):
        if cells is not None and (isinstance(cells, IterableDataset) or not hasattr(cells, "__len__")):
            raise ValueError(
                f"baselines=True needs {which} cells that can be read by number, but a {type(cells).__name__} is a "
                "stream."
            )
    if not isinstance(collator, (DataCollatorForGeneRankMLM, DataCollatorForPhenotypicMLM)):
        raise ValueError(
            f"baselines=True needs DataCollatorForGeneRankMLM or DataCollatorForPhenotypicMLM, got "
            f"{type(collator).__name__}."
        )
