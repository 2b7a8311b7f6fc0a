"""Liger's fused linear cross entropy (Hsu et al. 2024, arXiv:2410.10989) for the MLM head of a GeneBert."""

from __future__ import annotations

import os

import torch
from torch import nn
from transformers import Trainer
from transformers.trainer_utils import unwrap_peft_model
from transformers.utils.versions import require_version


def prepare_liger(trainer: Trainer) -> None:
    """Let `use_liger_kernel` of Trainer fuse the last layer of the MLM head with the cross entropy of the labels.

    Raises
    ------
    ValueError
        The model, the arguments or the machine do not allow it.
    ImportError
        liger-kernel is missing, or too old.
    """
    _check(unwrap_peft_model(trainer.model))
    args, refused = trainer.args, None
    if args.liger_kernel_config:
        refused = "there is nothing to choose in liger_kernel_config"
    elif args.label_smoothing_factor:
        refused = "it does not support label_smoothing_factor"
    elif trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        refused = "it reads weights of the last layer that FSDP and DeepSpeed may have taken away"
    elif args.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        refused = "there is no GPU"
    if refused:
        raise ValueError(f"use_liger_kernel: {refused}. Leave it out.")
    # Before, gradients of losses per token were wrong.
    require_version("liger-kernel>=0.8.2", "pip install 'stformer_hf[liger]'")
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    MODEL_TYPE_TO_APPLY_LIGER_FN["gene_bert"] = _fuse  # which Trainer.train calls


def _check(model: nn.Module) -> None:
    """Raise a ValueError for a model whose loss Liger would not compute, or not in full."""
    head = getattr(model, "mlm_head", None)
    if head is None:
        refused = f"Liger has no kernel for {type(model).__name__}"
    elif hasattr(head, "rank_prior"):
        refused = "the model adds a prior from the order of the genes to its logits, which Liger never holds"
    elif model.config.label_smoothing:
        refused = "it does not support label_smoothing of the model"
    elif type(head.decoder) is not nn.Linear:
        refused = f"the last layer of the MLM head is a {type(head.decoder).__name__}, no plain Linear"
    else:
        return
    raise ValueError(f"use_liger_kernel: {refused}. Leave it out.")


def _fuse(model: nn.Module) -> None:
    _check(model)
    for module in model.mlm_head.modules():
        if hasattr(module, "fused_cross_entropy"):  # the head, or PEFT's wrapper and copies of it (modules_to_save)
            module.fused_cross_entropy = _cross_entropies


@torch.compiler.disable  # it counts the labels
def _cross_entropies(
    states: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, bias: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    found = liger_fused_linear_cross_entropy(
        states, weight, labels, bias=bias, reduction="none", return_predicted_tokens=True
    )
    return found.loss, found.predicted_tokens
