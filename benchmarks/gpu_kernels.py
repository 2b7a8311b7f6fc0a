"""Kernels of a GPU that `python -m benchmarks gpu` sets beside those of the package."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available, is_flash_attn_4_available

from stformer_hf.models.gene_bert.encoder_layers import GeneBertAttention
from stformer_hf.models.gene_bert.packed_attention import PACKED_SDPA, packed_sdpa_attention_forward

_AVAILABLE = {
    "flash_attention_2": is_flash_attn_2_available,
    "flash_attention_3": is_flash_attn_3_available,
    "flash_attention_4": is_flash_attn_4_available,
}


def missing(kernel: str | None, on_gpu: bool) -> str | None:
    """Return why a kernel cannot run here, None if it can."""
    if kernel == "cuDNN" and not (on_gpu and hasattr(torch.ops.aten, "_cudnn_attention_forward")):
        return "cuDNN needs a GPU and a recent torch"
    if kernel in _AVAILABLE and not (on_gpu and _AVAILABLE[kernel]()):
        return f"{kernel} is not installed"
    if kernel == "Liger" and not (on_gpu and find_spec("liger_kernel")):
        return "Liger is not installed"
    return None


def attention_kernels(on_gpu: bool) -> dict[str, Callable[..., torch.Tensor]]:
    """Return functions of queries, keys and values (1, heads, length, head_dim), by the name of their kernel."""
    kernels: dict[str, Callable[..., tuple]] = {
        "sdpa": packed_sdpa_attention_forward,
        "cuDNN": cudnn_attention_forward,
        "one call per cell, float32": partial(_in_float32, packed_sdpa_attention_forward),
        "nested tensors, float32": partial(_in_float32, nested_attention_forward),
    }
    there: dict[str, Callable[..., torch.Tensor]] = {}
    for name, kernel in kernels.items():
        if not missing(name, on_gpu):
            there[name] = partial(_attend, kernel)
    for name in _AVAILABLE:
        if not missing(name, on_gpu):
            there[name] = partial(_attend, ALL_ATTENTION_FUNCTIONS[name], backend=name)
    return there


def _attend(
    kernel: Callable[..., tuple], *states: torch.Tensor, backend: str = "sdpa", **packing: Any
) -> torch.Tensor:
    """Attend by a kernel as a layer of GeneBert does."""
    from stformer_hf import GeneBertConfig

    heads, size = states[0].shape[1], states[0].shape[-1]
    config = GeneBertConfig(hidden_size=heads * size, num_attention_heads=heads, attn_implementation=backend)
    return kernel(GeneBertAttention(config), *states, None, scaling=size**-0.5, dropout=0.0, **packing)[0]


def _in_float32(kernel: Callable[..., tuple], module: nn.Module, *states: Any, **how: Any) -> tuple:
    return kernel(module, *(part if part is None else part.float() for part in states), **how)


def nested_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attend within each cell of a packed row by sdpa of torch's nested tensors, which also takes float32 and dropout.

    As `packed_sdpa_attention_forward`.
    """
    where = {"offsets": kwargs["cu_seq_lens_q"].long(), "min_seqlen": 1, "max_seqlen": kwargs["max_length_q"]}
    packed = [part.squeeze(0).transpose(0, 1).contiguous() for part in (query, key, value)]
    nested = [torch.nested.nested_tensor_from_jagged(part, **where).transpose(1, 2) for part in packed]
    attended = nn.functional.scaled_dot_product_attention(*nested, dropout_p=dropout, scale=scaling)
    return attended.transpose(1, 2).values()[None], None


@torch.compiler.disable  # torch cannot trace it
def cudnn_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attend within each cell of a packed row by cuDNN, which torch's varlen attention does not call.

    As `packed_sdpa_attention_forward`.
    """
    packed = [part.squeeze(0).transpose(0, 1).to(value.dtype) for part in (query, key, value)]
    cuts, longest = kwargs["cu_seq_lens_q"], kwargs["max_length_q"]
    # no bias, the boundaries, the log sums of the backward pass, no dropout, not causal, no mask for debugging
    found = torch.ops.aten._cudnn_attention_forward(
        *packed, None, cuts, cuts, longest, longest, True, dropout, False, False, scale=scaling
    )
    return found[0][None], None


@contextmanager
def packed_attention_by(kernel: str | None) -> Iterator[None]:
    """Let packed batches of sdpa attend by cuDNN in the context, if that is the kernel."""
    if kernel == "cuDNN":
        AttentionInterface.register(PACKED_SDPA, cudnn_attention_forward)
    try:
        yield
    finally:
        AttentionInterface.register(PACKED_SDPA, packed_sdpa_attention_forward)


def norms_in_half_precision(model: PreTrainedModel) -> None:
    """Let the norms of a model read and return the dtype of autocast, so that the residuals have it too."""
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.forward = partial(_half_norm, module)


def _half_norm(norm: nn.LayerNorm, x: torch.Tensor) -> torch.Tensor:
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    with torch.autocast(kind, enabled=False):
        return nn.functional.layer_norm(
            x.to(dtype), norm.normalized_shape, norm.weight.to(dtype), norm.bias.to(dtype), norm.eps
        )


def fuse_loss(model: PreTrainedModel) -> None:
    """Let Liger compute the loss, as `use_liger_kernel` of Trainer does."""
    from stformer_hf.training.liger import _fuse

    _fuse(model)
