"""Train a classifier in part: LoRA adapters, the last layers alone, or the first layers at lower learning rates."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, TrainingArguments

from .loading import is_adapter, is_model

_HEADS = ("classifier", "pre_classifier", "wide_head")  # trained in full, and saved with the adapter


def check_adapts(model: Any, lora: int | None, freeze: int, layer_decay: float = 1.0) -> None:
    """Raise a ValueError for settings that are out of range, or need a checkpoint, or an ImportError without PEFT."""
    if (lora is not None and lora < 1) or freeze < 0:
        raise ValueError(f"lora={lora}, freeze={freeze}: lora must be a rank of at least 1, and freeze at least 0.")
    if not 0 < layer_decay <= 1:
        raise ValueError(f"layer_decay={layer_decay}: must be above 0, and at most 1.")
    if layer_decay < 1 and model is None:
        raise ValueError("layer_decay keeps the first layers close to a checkpoint's: pass model=… (--model).")
    if freeze and model is None:
        raise ValueError("freeze keeps the layers of a checkpoint: pass model=… (--model).")
    if lora is None:
        return
    if model is None or is_model(model) or is_adapter(model):
        found = "an adapter" if model is not None and not is_model(model) else "not a checkpoint"
        raise ValueError(
            f"LoRA adapts a checkpoint, from which the adapter is loaded later, but model is {found}: pass the folder "
            "of a model, or its name on the Hub."
        )
    try:
        import peft  # noqa: F401
    except ImportError as error:
        raise ImportError("LoRA needs PEFT: pip install 'stformer_hf[lora]'") from error


def adapt(model: PreTrainedModel, lora: int | None, freeze: int) -> nn.Module:
    """Freeze layers of a classifier, and add LoRA (Hu et al. 2021) to the others.

    Parameters
    ----------
    model : PreTrainedModel
    lora : int or None
        Rank. Query and value projections (the layers that PEFT knows for the model) get adapters, whose outputs are
        scaled by 2; the encoder is frozen, and the heads are trained in full. The result is then a
        `peft.PeftModel` around the model; None returns the model itself.
    freeze : int
        Number of first layers to freeze, with the embeddings; 0 freezes nothing. Raise a ValueError if the model has
        fewer.
    """
    n_layers = model.config.num_hidden_layers
    if freeze > n_layers or (lora is not None and freeze == n_layers):
        raise ValueError(
            f"freeze={freeze}: the model has {n_layers} layers" + (", and LoRA needs one of them." if lora else ".")
        )
    if freeze:
        encoder = model.base_model
        for name, part in encoder.named_children():
            if name != "layers" and "embedding" in name:
                part.requires_grad_(False)
        for layer in encoder.layers[:freeze]:
            layer.requires_grad_(False)
    if lora is None:
        return model
    from peft import LoraConfig, get_peft_model

    settings = LoraConfig(
        task_type="SEQ_CLS",
        r=lora,
        lora_alpha=2 * lora,
        modules_to_save=[name for name in _HEADS if hasattr(model, name)],
        layers_to_transform=list(range(freeze, n_layers)),
        layers_pattern="layers",
    )
    return get_peft_model(model, settings)


def layer_rates(
    model: nn.Module, args: TrainingArguments, layer_decay: float
) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
    """Return AdamW with a learning rate per layer: Trainer's `optimizer_cls_and_kwargs`.

    What is above all layers, such as the heads, has the learning rate of `args`; each layer has `layer_decay` times
    the rate of the one above it, and the embeddings that of the first layer times `layer_decay`. As in Trainer, biases
    and norms have no weight decay. Raise a ValueError if `args.optim` is not AdamW.

    Notes
    -----
    Howard and Ruder 2018 (discriminative fine-tuning).
    """
    optimizer = getattr(args.optim, "value", args.optim)
    if not str(optimizer).startswith("adamw_torch"):
        raise ValueError(f"layer_decay needs torch's AdamW, but optim is {optimizer}: leave out one of them.")
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    numbers = {name: re.search(r"\blayers\.(\d+)\.", name) for name in trained}
    n_layers = 1 + max((int(number[1]) for number in numbers.values() if number), default=-1)
    groups: dict[tuple[int, bool], list[nn.Parameter]] = {}
    for name, weight in trained.items():
        number = numbers[name]
        below = n_layers - int(number[1]) if number else (n_layers + 1 if "embedding" in name else 0)
        groups.setdefault((below, weight.ndim > 1), []).append(weight)
    rate, decay = args.learning_rate, args.weight_decay
    params = [
        {"params": weights, "lr": rate * layer_decay**below, "weight_decay": decay if decays else 0.0}
        for (below, decays), weights in groups.items()
    ]
    betas = args.adam_beta1, args.adam_beta2
    return torch.optim.AdamW, {"params": params, "lr": rate, "betas": betas, "eps": args.adam_epsilon, "fused": True}
