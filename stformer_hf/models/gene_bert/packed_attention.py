"""Attention on packed batches: the tokens of many cells in one row, where each cell attends only to itself."""

from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn
from torch.nn.attention.flex_attention import BlockMask
from transformers import AttentionInterface, PreTrainedConfig
from transformers.masking_utils import create_bidirectional_mask, packed_sequence_mask_function
from transformers.utils import logging

logger = logging.get_logger(__name__)

HAS_VARLEN = find_spec("torch.nn.attention.varlen") is not None  # torch 2.10


def segments_of(cu_seq_lens: torch.Tensor, length: int) -> torch.Tensor:
    """Return the cell of each token, int32 Tensor (1, length)."""
    at = torch.arange(length, device=cu_seq_lens.device)
    return torch.searchsorted(cu_seq_lens[1:].contiguous(), at, right=True).to(torch.int32)[None]


def check_packing(
    shape: torch.Size,
    attention_mask: torch.Tensor | None,
    cu_seq_lens: torch.Tensor | None,
    kwargs: Mapping[str, Any],
) -> None:
    """Raise ValueError for packing arguments of a forward pass that do not fit its tokens, of this shape.

    There must be one row, without an attention mask, and all of the packing arguments. On a CPU, lengths must add up
    to that of the row, and positions must not show multiple cells in a row without packing arguments.
    """
    if cu_seq_lens is None:
        half = [name for name in ("seq_idx", "cu_seq_lens_k", "max_length_q") if kwargs.get(name) is not None]
        if half:
            raise ValueError(f"{half[0]} without cu_seq_lens_q: the cells of a packed row would mix.")
        places = kwargs.get("position_ids")
        if places is not None and attention_mask is None and places.device.type == "cpu":
            if not torch.compiler.is_compiling() and (places[:, 1:] < places[:, :-1]).any():
                raise ValueError("position_ids restart within a row: pass cu_seq_lens_q, or an attention_mask.")
        return
    if shape[0] != 1:
        raise ValueError(f"A packed batch must be one row of tokens, got {shape[0]} rows.")
    if attention_mask is not None:
        raise ValueError("A packed batch has no padding: attention_mask must be None.")
    if cu_seq_lens.device.type == "cpu" and not torch.compiler.is_compiling() and int(cu_seq_lens[-1]) != shape[1]:
        raise ValueError(
            f"cu_seq_lens_q ends at {int(cu_seq_lens[-1])}, but there are {shape[1]} tokens. A packed batch cannot be "
            "split along the first dimension, as torch.nn.DataParallel, dispatch_batches and split_batches do: pad it."
        )


def packing_of(cu_seq_lens: torch.Tensor, kwargs: Mapping) -> dict:
    """Return all arguments of backends for packed sequences: flash attention ignores them if one is missing."""
    given = {name: kwargs[name] for name in ("max_length_q", "max_length_k") if kwargs.get(name) is not None}
    if len(given) < 2:
        if torch.compiler.is_compiling():
            return {"cu_seq_lens_q": cu_seq_lens}
        longest = int(cu_seq_lens.diff().max()) if cu_seq_lens.shape[0] > 1 else 0
        given = {"max_length_q": longest, "max_length_k": longest}
    other = kwargs.get("cu_seq_lens_k")
    return {**given, "cu_seq_lens_q": cu_seq_lens, "cu_seq_lens_k": cu_seq_lens if other is None else other}


def takes_boundaries(config: PreTrainedConfig, states: torch.Tensor, dropout: float = 0.0) -> bool:
    """Return whether attention separates the cells of a packed batch by their boundaries: in one call, without a mask.

    Flash attention does, and sdpa where `torch.nn.attention.varlen` works: on a GPU, in half precision.
    """
    backend = config._attn_implementation
    return "flash" in backend or (backend == "sdpa" and _varlen_serves(states, dropout))


def lengths_for(
    config: PreTrainedConfig, states: torch.Tensor, cu_seq_lens: torch.Tensor, training: bool
) -> dict[str, list[int]]:
    """Return the lengths of the cells if attention runs one call per cell: read once, not in each layer."""
    dropout = config.attention_probs_dropout_prob if training else 0.0
    of_cells = config._attn_implementation == "sdpa" and not takes_boundaries(config, states, dropout)
    if not of_cells or torch.compiler.is_compiling():
        return {}
    return {"cell_lengths": cu_seq_lens.diff().tolist()}


def packed_mask(
    config: PreTrainedConfig, hidden_states: torch.Tensor, cu_seq_lens: torch.Tensor
) -> torch.Tensor | BlockMask | None:
    """Return the mask that separates the cells; None for backends that take the boundaries of cells.

    Raises a ValueError if the backend would mix the cells.
    """
    backend = config._attn_implementation
    # A compiled step cannot loop over cells: it uses a mask where torch's varlen attention is not available.
    apart = not torch.compiler.is_compiling() or _varlen_serves(hidden_states, config.attention_probs_dropout_prob)
    if "flash" in backend or (backend == "sdpa" and apart):
        return None
    if backend not in ("eager", "sdpa", "flex_attention"):
        raise ValueError(
            f"The attention backend {backend!r} would mix the cells of a packed batch: use sdpa, eager, "
            "flex_attention or flash attention, or pad the batch."
        )
    segments = segments_of(cu_seq_lens, hidden_states.shape[1])
    return create_bidirectional_mask(
        config=config,
        inputs_embeds=hidden_states,
        attention_mask=None,
        and_mask_function=packed_sequence_mask_function(segments),
    )


def _varlen_serves(states: torch.Tensor, dropout: float) -> bool:
    """Return whether `torch.nn.attention.varlen` works: on a GPU, in half precision, without attention dropout."""
    return states.is_cuda and not varlen_lacks(states.device, _computed_dtype(states), dropout)


def _computed_dtype(states: torch.Tensor) -> torch.dtype:
    return torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else states.dtype


def varlen_lacks(device: torch.device, dtype: torch.dtype, dropout: float) -> list[str]:
    """Return what `torch.nn.attention.varlen` needs on a GPU that is not there: an empty list if it works."""
    needs = {
        "torch 2.10 or later": HAS_VARLEN,
        "a GPU of compute capability 8.0 or higher": _is_ampere(device.index),
        "half precision (bf16=True of TrainingArguments)": dtype in (torch.float16, torch.bfloat16),
        "attention_probs_dropout_prob=0": not dropout,
    }
    return [need for need, is_there in needs.items() if not is_there]


@torch.compiler.assume_constant_result
def _is_ampere(index: int | None) -> bool:
    """Return whether a GPU is as recent as torch's flash attention needs."""
    return torch.cuda.get_device_capability(index) >= (8, 0)


def packed_sdpa_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attend within each cell of a packed row.

    Uses `torch.nn.attention.varlen` on a GPU in half precision, else one call of scaled_dot_product_attention per
    cell, whose cost is that of the cells: a mask would cost the square of the row. Query, key and value are Tensors
    (1, heads, length, head_dim), the result is (1, length, heads, head_dim). `kwargs` have `cu_seq_lens_q`, int32
    (n_cells + 1,), and maybe `cell_lengths`, a list of the numbers of tokens.
    """
    cu_seq_lens = kwargs["cu_seq_lens_q"]
    if _varlen_serves(query, dropout):
        from torch.nn.attention.varlen import varlen_attn

        # In backward, too, `squeeze` is a view, where an index would copy.
        packed = [part.squeeze(0).transpose(0, 1).to(value.dtype) for part in (query, key, value)]
        longest = kwargs.get("max_length_q")
        if longest is None:  # an upper bound is enough
            longest = query.shape[2] if torch.compiler.is_compiling() else int(cu_seq_lens.diff().max())
        cuts = cu_seq_lens.to(torch.int32)
        return varlen_attn(*packed, cuts, cuts, longest, longest, scale=scaling)[None], None
    if torch.compiler.is_compiling():  # a layer that is compiled alone
        cells = segments_of(cu_seq_lens, query.shape[2])
        same = cells[:, :, None] == cells[:, None, :]
        attended = nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=same[:, None], dropout_p=dropout, scale=scaling
        )
        return attended.transpose(1, 2), None
    if query.is_cuda:
        logger.warning_once(
            "On this GPU, packed batches take one attention call per cell, which is slow for short cells. One "
            f"call for all needs {' and '.join(varlen_lacks(query.device, _computed_dtype(query), dropout))}."
        )
    lengths = kwargs.get("cell_lengths") or cu_seq_lens.diff().tolist()
    lengths = [length for length in lengths if length]
    attended = [
        nn.functional.scaled_dot_product_attention(*parts, dropout_p=dropout, scale=scaling)
        for parts in zip(*(part.split(lengths, dim=2) for part in (query, key, value)), strict=True)
    ]
    return torch.cat(attended, dim=2).transpose(1, 2), None


# Attention layers find it by this name, like all other backends.
PACKED_SDPA = "sdpa_packed"
AttentionInterface.register(PACKED_SDPA, packed_sdpa_attention_forward)
