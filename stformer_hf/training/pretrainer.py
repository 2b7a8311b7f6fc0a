"""STFormerPretrainer: `transformers.Trainer` for masked pretraining on cells."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, TrainingArguments

from ..models.gene_bert.tokenization_gene_bert import GeneTokenizer
from .cell_trainer import CellTrainer
from .collators import DataCollatorForGeneRankMLM, DataCollatorForPhenotypicMLM
from .precollator import STFormerPreCollator


class STFormerPretrainer(CellTrainer):
    """Trainer that masks cells of a `CellStore`, or of a tokenized dataset, while it trains.

    Masks are a function of (args.seed, epoch, cell); evaluation always masks as in epoch 0. See `CellTrainer` for the
    order of the cells, `get_train_sampler`, and resumption.

    Parameters
    ----------
    args : TrainingArguments
        As for Trainer; `train_sampling_strategy="group_by_length"` groups the cells by length.
    train_dataset : CellStore, datasets.Dataset or torch Dataset
        Cells; or rows with `input_ids` (and, better, `token_type_ids` and `cell_id`).
    token_dictionary : dict of str to int, or path of a .json or .pkl, optional
        STFormer's vocabulary, for rows of token ids and a model that reads no token types, such as BERT; in place of
        `processing_class`.
    example_lengths_file : path of a .json or .pkl, or sequence of int, optional
        Tokens of each row of `train_dataset`; see `lengths` of `CellTrainer`.
    model : PreTrainedModel, optional
        What to train.
    model_init : callable, optional
        Makes the model, for hyperparameter search.
    mlm_probability, phenotype_mask_prob, gene_dropout : float, default: 0.15, 0.5, 0.0
        Shares to mask, and of genes to leave out (see `DataCollatorForPhenotypicMLM`).
    packing : bool, default: False
        Train on packed batches: the cells of a batch in one row, without padding.
    max_tokens_per_batch : int, optional
        Fill batches up to so many tokens, in place of a number of cells.
    processing_class : GeneTokenizer
        Tokenizes the cells; saved beside the model.
    data_collator : callable, optional
        In place of a `DataCollatorForPhenotypicMLM`, or `DataCollatorForGeneRankMLM`, of the above.
    **kwargs
        All other arguments of Trainer.

    Raises
    ------
    ValueError
        Neither `model` nor `model_init`; no tokenizer, dictionary or collator, or both of the first two; a tokenizer
        that does not fit the model; lengths that do not fit the dataset.
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
        packing: bool = False,
        processing_class: GeneTokenizer | None = None,
        data_collator: Callable | None = None,
        **kwargs,
    ):
        if model is None and model_init is None:
            raise ValueError("STFormerPretrainer needs a model, or a model_init that makes one.")
        if token_dictionary is not None:
            if processing_class is not None:
                raise ValueError("token_dictionary and processing_class both name the tokens: give one of them.")
            processing_class = STFormerPreCollator(token_dictionary)
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
            lengths=example_lengths_file,
            processing_class=processing_class,
            model_init=model_init,
            **kwargs,
        )


__all__ = ["STFormerPretrainer"]
