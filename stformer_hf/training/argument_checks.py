"""Refuse TrainingArguments that a trainer of cells does not support, with a remedy for each."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn
from transformers import Trainer
from transformers.debug_utils import DebugOption

from ..models.gene_bert.packed_attention import varlen_lacks
from .liger import prepare_liger

logger = logging.getLogger(__name__)
_OURS = ("gene_bert", "cell_neighborhood")


def check_arguments(trainer: Trainer) -> None:
    """Raise a ValueError for arguments, or a method, that would have no effect, or one other than documented."""
    if type(trainer)._get_train_sampler is not Trainer._get_train_sampler:
        raise ValueError(
            f"{type(trainer).__name__} overrides _get_train_sampler, which has no effect: override get_train_sampler."
        )
    args, config = trainer.args, getattr(trainer.model, "config", None)
    model_type = getattr(config, "model_type", None)
    if getattr(trainer.data_collator, "packing", False) and model_type != "gene_bert":
        raise ValueError(f"A model of type {model_type!r} would mix the cells of a packed batch: use padded batches.")
    if trainer._is_packed():
        _check_packed(trainer)
    cuts = getattr(args.accelerator_config, "split_batches", None)
    even = getattr(args.accelerator_config, "even_batches", None)
    if args.world_size > 1 and (cuts or even is False):
        raise ValueError(
            f"accelerator_config: {'split_batches=True' if cuts else 'even_batches=False'} is not supported on "
            "multiple processes: each has the same number of batches, of per_device_train_batch_size cells. "
            "Leave it out."
        )
    if args.train_sampling_strategy == "batch_rebalance":
        raise ValueError('train_sampling_strategy="batch_rebalance" is not supported: use max_tokens_per_batch.')
    if trainer.sampling is not None and args.train_sampling_strategy == "sequential":
        raise ValueError(
            'train_sampling_strategy="sequential" reads the cells as they are, and sampling draws them: leave one out.'
        )
    if args.use_liger_kernel and model_type in _OURS:
        prepare_liger(trainer)
    backend = getattr(config, "_attn_implementation", "eager")
    if DebugOption.UNDERFLOW_OVERFLOW in args.debug and model_type in _OURS and backend != "eager":
        raise ValueError(
            f'debug="underflow_overflow" does not support the boolean masks of {backend} attention. Load the model '
            'with attn_implementation="eager".'
        )
    if args.neftune_noise_alpha is not None and model_type == "cell_neighborhood":
        raise ValueError("neftune_noise_alpha needs token embeddings, and the model has none: leave it out.")
    if args.label_smoothing_factor:
        _check_smoothing(trainer.model, args.label_smoothing_factor)


def _check_packed(trainer: Trainer) -> None:
    args = trainer.args
    if args.n_gpu > 1:
        raise ValueError(
            "torch.nn.DataParallel would split a packed batch within cells: start one process per GPU with "
            "accelerate launch, or make only one GPU visible (CUDA_VISIBLE_DEVICES=0)."
        )
    cuts = [of for of in ("dispatch_batches", "split_batches") if getattr(args.accelerator_config, of, None)]
    if cuts:
        raise ValueError(f"{cuts[0]} would split a packed batch within cells: leave it out of accelerator_config.")
    if args.neftune_noise_alpha is not None:
        raise ValueError(
            "neftune_noise_alpha: the noise depends on the length of a row, and a packed row holds many cells. Train "
            "with padded batches, or leave it out."
        )
    config: Any = getattr(trainer.model, "config", None)
    is_ours = getattr(config, "model_type", None) == "gene_bert" and config._attn_implementation == "sdpa"
    if is_ours and args.torch_compile and args.device.type == "cuda":
        dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16}
        dtype = dtypes.get(trainer.accelerator.mixed_precision, torch.float32)
        if lacks := varlen_lacks(args.device, dtype, config.attention_probs_dropout_prob):
            logger.warning(
                "Compiled attention on packed batches takes a mask of all pairs of tokens, which is slow and large. "
                f"Without a mask, it needs {' and '.join(lacks)}."
            )


def smoothing_field(model: nn.Module) -> str | None:
    """Return the configuration field that sets the label smoothing of a GeneBert; None for other models."""
    if getattr(getattr(model, "config", None), "model_type", None) != "gene_bert":
        return None
    return "label_smoothing" if hasattr(model, "mlm_head") else "classifier_label_smoothing"


def _check_smoothing(model: nn.Module, factor: float) -> None:
    config: Any = getattr(model, "config", None)
    field = smoothing_field(model)
    if field is None:
        if getattr(config, "model_type", None) == "cell_neighborhood":
            raise ValueError("label_smoothing_factor: the model predicts counts, not classes. Leave it out.")
        return
    of_classes = field == "label_smoothing" or (
        config.problem_type in (None, "single_label_classification") and config.num_labels > 1
    )
    if not of_classes:
        raise ValueError(
            f"label_smoothing_factor needs one class per cell, but the model's problem_type is "
            f"{config.problem_type or 'regression'!r}. Leave it out."
        )
    if getattr(config, field) not in (0, factor):
        raise ValueError(
            f"label_smoothing_factor={factor} contradicts {field}={getattr(config, field)} of the model: leave one of "
            "them out."
        )
