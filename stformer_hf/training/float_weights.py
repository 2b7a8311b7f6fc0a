"""Train half-precision weights in float32, since small updates to them would be rounded away."""

from __future__ import annotations

import logging

import torch
from torch import nn

logger = logging.getLogger(__name__)


def keep_in_float32(model: nn.Module, autocast: bool) -> None:
    """Convert a model whose trainable weights are in half precision, with a warning.

    A bfloat16 number has 8 significant bits: an update below 1/512 of a weight does not change it, and at usual
    learning rates most updates are smaller. transformers loads a checkpoint in the precision in which it was saved.
    Frozen and quantized weights beside an adapter are not converted. `autocast` says whether the training computes in
    half precision (`bf16`, `fp16` of TrainingArguments); raise a ValueError if it does not, but the attention has to.
    """
    half = (torch.bfloat16, torch.float16)
    weights = list(model.parameters())
    found = {weight.dtype for weight in weights if weight.requires_grad and weight.dtype in half}
    if not found:
        return
    name = str(found.pop()).removeprefix("torch.")
    attention = str(getattr(getattr(model, "config", None), "_attn_implementation", None))
    if "flash" in attention and not autocast:
        raise ValueError(
            f"The {name} weights are trained in float32, which {attention} does not support: pass bf16=True to "
            "TrainingArguments."
        )
    speed = "" if autocast else " For speed, pass bf16=True to TrainingArguments."
    logger.warning(
        f"The weights are {name}, in which small updates are rounded away: they are trained and saved in float32. "
        f"Load them with dtype=torch.float32 to avoid this warning.{speed}"
    )
    has_frozen = any(weight.is_floating_point() and not weight.requires_grad for weight in weights)
    if not has_frozen or not hasattr(model, "peft_config"):
        model.float()
    else:
        for weight in weights:
            if weight.requires_grad:
                weight.data = weight.data.float()
