"""Train a part of a classifier: LoRA adapters in its attention, or its last layers."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedModel

from .loading import is_adapter, is_model

_HEADS = ("classifier", "pre_classifier", "wide_head")  # trained in full, and saved with the adapter


def check_adapts(model: Any, lora: int | None, freeze: int) -> None:
    """Refuse settings of `adapt` that do not fit the `model` argument of `finetune`.

    Raises
    ------
    ValueError
        There is no checkpoint whose weights the adapter, or the frozen layers, would keep; a number is negative.
    ImportError
        PEFT is not installed.
    """
    if (lora is not None and lora < 1) or freeze < 0:
        raise ValueError(f"lora={lora} must be a rank of at least 1, and freeze={freeze} a number of layers.")
    if freeze and model is None:
        raise ValueError("freeze keeps the layers of a checkpoint: pass model=… (--model).")
    if lora is None:
        return
    if model is None or is_model(model) or is_adapter(model):
        found = "an adapter" if model is not None and not is_model(model) else "no checkpoint"
        raise ValueError(
            f"LoRA adapts the weights of a checkpoint, which is loaded with the adapter later, and model is {found}: "
            "pass the folder of a model, or its name on the Hub."
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
        Classifier with an encoder at `base_model`.
    lora : int or None
        Rank. Query and value projections (the layers that PEFT knows for the model) get adapters, whose outputs are
        scaled by 2; the encoder is frozen, and the heads are trained in full.
    freeze : int
        Number of first layers to freeze, with the embeddings; 0 freezes nothing.

    Returns
    -------
    Module
        The model, or a `peft.PeftModel` around it.

    Raises
    ------
    ValueError
        The model has fewer layers.
    """
    n_layers = model.config.num_hidden_layers
    if freeze > n_layers or (lora is not None and freeze == n_layers):
        raise ValueError(
            f"freeze={freeze}: the model has {n_layers} layers" + (", and LoRA needs one." if lora else ".")
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


__all__ = ["adapt", "check_adapts"]
