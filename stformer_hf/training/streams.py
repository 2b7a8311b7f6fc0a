"""Batches of a stream for Trainer's loop, which takes them for rows of a dataset."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
from torch.utils.data import IterableDataset
from transformers import TrainingArguments

from ..batches.stream_batches import StreamBatches, StreamOrder, TokenBudgetBuffer, cells_of_largest_part, part_of
from ..models.gene_bert.tokenization_gene_bert import GeneTokenizer
from ..models.remote_code import is_a

_NO_BUDGET = 2**48  # tokens


def read_stream(
    stream: IterableDataset,
    args: TrainingArguments,
    batch_size: int,
    collator: Callable,
    *,
    max_tokens_per_batch: int | None,
    packing: bool,
    max_cells: int | None,
    seed: int,
    tokenizer: Any,
    mark: Mapping[str, Any] | None,
) -> tuple[StreamBatches, StreamOrder]:
    """Return the batches of a stream, indexed by number, and the batch numbers of an epoch.

    The processes take turns at the batches of the whole stream, or, if it is split, each has those of its part. If
    the number of batches is unknown, Trainer takes `max_steps` steps as one epoch. Batches have `batch_size` cells, or
    with `max_tokens_per_batch` at most `max_cells`; other parameters are those of `TokenBudgetBuffer` and
    `StreamBatches`. A ValueError says which arguments do not fit the stream.
    """
    rank, n_parts = part_of(stream)
    if n_parts > 1 and (rank, n_parts) != (args.process_index, args.world_size):
        raise ValueError(
            f"The stream is part {rank} of {n_parts}, but this is process {args.process_index} of "
            f"{args.world_size}: split it with rank=args.process_index and world_size=args.world_size, so that "
            "each process reads its own part, or not at all."
        )
    if n_parts > 1 and args.accelerator_config.dispatch_batches:
        raise ValueError(
            "accelerator_config: with dispatch_batches=True only the first process reads, and the stream is "
            "split: leave one out."
        )
    if getattr(stream, "tokenizer", stream) is None:
        raise ValueError("The stream yields counts: pass it the tokenizer, IterableAnnDataset(files, tokenizer).")
    if args.dataloader_drop_last:
        raise ValueError("dataloader_drop_last is not supported for a stream.")
    in_turn = args.world_size // n_parts  # number of processes that share what one of them reads
    budget, in_a_step = max_tokens_per_batch, in_turn * args.gradient_accumulation_steps
    n_cells = cells_of_largest_part(stream) if budget is None else None
    window: dict[str, Any]
    if budget is not None:
        window = {"max_tokens_per_batch": budget, "packing": packing, "max_cells": max_cells}
    else:  # without grouping by length, a window is a batch, in the order of the stream
        cells = batch_size * in_a_step
        by_length = args.train_sampling_strategy == "group_by_length"
        size = cells * max(1, 2048 // cells) if by_length else batch_size
        window = {"max_tokens_per_batch": _NO_BUDGET, "max_cells": batch_size, "buffer_size": size}
    if n_cells is not None:
        n_batches = math.ceil(n_cells / (batch_size * in_turn)) * in_turn
    elif args.max_steps > 0:
        n_batches = args.max_steps * in_a_step
    else:
        raise ValueError("The number of batches of a stream is unknown until it has been read: pass max_steps.")
    batches = TokenBudgetBuffer(
        stream,
        n_tokens=partial(_tokens_of, tokenizer),
        seed=seed,
        # Trainer takes a stream of unknown length as one epoch, so a step could span two passes over the files.
        # With a whole number of steps per pass, the order is the same on any number of processes.
        world_size=in_turn if n_cells is not None else in_a_step,
        n_batches=n_batches if n_parts > 1 and n_cells is not None else None,
        **window,
    )
    return StreamBatches(batches, collator, mark), StreamOrder(n_batches, n_parts)


def _tokens_of(tokenizer: Any, cell: Mapping[str, Any]) -> int | None:
    """Return the number of tokens of a cell of a stream; None if it has no genes, so that it is left out."""
    n_tokens = len(cell["input_ids"])
    may_be_empty = is_a(tokenizer, GeneTokenizer) and n_tokens <= 2 + len(tokenizer.included_phenotypes)
    if may_be_empty and not tokenizer.get_gene_tokens_mask(np.asarray(cell["input_ids"], np.int64)).any():
        return None
    return n_tokens
