"""Attention within neighbourhoods: which tokens attend to which, from dense masks or packed lengths."""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs

from .configuration_cell_neighborhood import CellNeighborhoodConfig


class Block(NamedTuple):
    """Sequences of one length, side by side in a row of tokens; each attends only to itself."""

    n_sequences: int
    queries: int  # of each sequence
    keys: int  # of each sequence
    mask: torch.Tensor | None = None  # bool (1, 1, queries, keys), True = may attend, at least once in every row
    closed: torch.Tensor | None = None  # bool (queries, 1): queries that may attend to nothing; their output is 0


class Routes(NamedTuple):
    """Which token attends to which, with the tokens in the order that makes attention cheapest.

    The LongTensors are None if tokens keep their order, and the decoder's block says what attends to what.
    """

    encoder: list[Block]
    pooling: list[Block]
    decoder: list[Block]
    order: torch.Tensor | None = None  # (N + B,), the token (cells, then cls) at each position of the encoder
    place: torch.Tensor | None = None  # (N + B,), the position of each token: the inverse of `order`
    pooled_cells: torch.Tensor | None = None  # (N,), the cells to pool, block after block
    pooled_place: torch.Tensor | None = None  # (B,), the position of each neighbourhood among the pooled ones
    partners: torch.Tensor | None = None  # (2 * B,), the token that each decoder token attends to


def _block_of(mask: torch.Tensor) -> Block:
    """Make a block from a mask where True = may not attend; rows that are all True are opened, and marked closed."""
    closed = mask.all(-1, keepdim=True)
    queries, keys = mask.shape
    return Block(1, queries, keys, (~mask | closed)[None, None], closed)


def routes_of_masks(
    encoder_mask: torch.Tensor, pooling_mask: torch.Tensor, decoder_mask: torch.Tensor, n_cells: int
) -> Routes:
    """Convert the masks of a batch to routes; raise ValueError for other types or shapes than the model documents."""
    n_neighborhoods = len(pooling_mask)
    tokens = n_cells + n_neighborhoods
    shapes = {
        "encoder_mask": (encoder_mask, (tokens, tokens)),
        "pooling_mask": (pooling_mask, (n_neighborhoods, tokens)),
        "decoder_mask": (decoder_mask, (2 * n_neighborhoods, 2 * n_neighborhoods)),
    }
    for name, (mask, shape) in shapes.items():
        if mask.dtype != torch.bool or tuple(mask.shape) != shape:
            raise ValueError(
                f"{name} must be a bool tensor {shape} for {n_cells} cells in {n_neighborhoods} neighbourhoods, "
                f"True = may not attend; got {mask.dtype} {tuple(mask.shape)}."
            )
    return Routes(*([_block_of(mask)] for mask, _ in shapes.values()))


def routes_of_packing(cu_seq_lens: torch.Tensor, lengths: Sequence[int] | None, n_cells: int) -> Routes:
    """Group neighbourhoods by length, so that attention takes one call per length and needs no mask.

    Neighbourhood i has the cells `cu_seq_lens[i]:cu_seq_lens[i + 1]`. The same as `lengths` (B,) on the host avoids a
    synchronisation with the GPU. Raises a ValueError if they do not match each other, or the number of cells.
    """
    if lengths is None:
        lengths = cu_seq_lens.diff().tolist()
    n_neighborhoods = len(lengths)
    if len(cu_seq_lens) != n_neighborhoods + 1 or sum(lengths) != n_cells or min(lengths, default=0) < 0:
        raise ValueError(
            f"cu_seq_lens has {len(cu_seq_lens) - 1} neighbourhoods, the {n_neighborhoods} lengths add up to "
            f"{sum(lengths)} cells, but the batch has {n_cells} cells."
        )
    if cu_seq_lens.device.type == "cpu" and not torch.compiler.is_compiling():
        if int(cu_seq_lens[0]) != 0 or cu_seq_lens.diff().tolist() != list(lengths):
            raise ValueError("cu_seq_lens must begin with 0 and increase by the lengths of the neighbourhoods.")
    own = torch.arange(n_neighborhoods, device=cu_seq_lens.device)
    by_length = cu_seq_lens.diff().argsort(stable=True)
    rank = by_length.argsort()
    rank_of_cell = torch.repeat_interleave(rank, cu_seq_lens.diff().long(), output_size=n_cells)
    order = torch.cat([rank_of_cell, rank]).argsort(stable=True)
    groups = sorted(Counter(lengths).items())
    return Routes(
        encoder=[Block(count, length + 1, length + 1) for length, count in groups],
        pooling=[Block(count, 1, length) for length, count in groups],
        decoder=[Block(2 * n_neighborhoods, 1, 1)],
        order=order,
        place=order.argsort(),
        pooled_cells=rank_of_cell.argsort(stable=True),
        pooled_place=rank,
        partners=torch.cat([own + n_neighborhoods, own]),
    )


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    closed: torch.Tensor | None = None,
    **kwargs: Unpack[TransformersKwargs],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute softmax attention explicitly; also return the attention weights.

    The mask is bool, True = may attend. With `closed` (queries, 1) there is one sequence, whose weights are returned
    as (heads, queries, keys); those of closed queries are 0. The output is computed from the returned weights, so that
    gradients reach them.
    """
    weights = torch.matmul(query, key.transpose(2, 3)) * scaling
    if attention_mask is not None:
        weights = weights.masked_fill(~attention_mask, torch.finfo(weights.dtype).min)
    weights = nn.functional.softmax(weights, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    if closed is not None:
        weights = weights.squeeze(0).masked_fill(closed, 0)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


class CellNeighborhoodAttention(nn.Module):
    """Multi-head attention within blocks of tokens, on the backend that `config._attn_implementation` names."""

    def __init__(self, config: CellNeighborhoodConfig):
        super().__init__()
        self.config = config
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_probs_dropout_prob
        self.is_causal = False
        self.q_lin = nn.Linear(config.hidden_size, config.hidden_size)
        self.k_lin = nn.Linear(config.hidden_size, config.hidden_size)
        self.v_lin = nn.Linear(config.hidden_size, config.hidden_size)
        self.out_lin = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(
        self, queries: torch.Tensor, keys: torch.Tensor, blocks: list[Block]
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attend from queries (n_queries, hidden) to keys (n_keys, hidden) within consecutive blocks of both.

        Returns the output (n_queries, hidden), which is the bias of the last layer for a query that may attend to
        nothing, and on the eager backend, for a single block with a mask, the weights (heads, n_queries, n_keys).
        """
        heads = (self.config.num_attention_heads, self.head_dim)
        query = self.q_lin(queries).view(-1, *heads)
        key = self.k_lin(keys).view(-1, *heads)
        value = self.v_lin(keys).view(-1, *heads)
        attention_interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        parts = zip(
            blocks,
            query.split([block.n_sequences * block.queries for block in blocks]),
            key.split([block.n_sequences * block.keys for block in blocks]),
            value.split([block.n_sequences * block.keys for block in blocks]),
            strict=True,
        )
        attended, weights = [], None
        for block, *part in parts:
            if not block.keys:
                # Zeros that depend on all three, so that every parameter gets a gradient, as with masks.
                attended.append((0 * (part[0] + part[1].sum() + part[2].sum())).flatten(1))
                continue
            shapes = [(block.n_sequences, length, *heads) for length in (block.queries, block.keys, block.keys)]
            out, weights = attention_interface(
                self,
                *(tensor.view(shape).transpose(1, 2) for tensor, shape in zip(part, shapes, strict=True)),
                block.mask,
                dropout=self.attention_dropout if self.training else 0.0,
                scaling=self.scaling,
                closed=block.closed,
            )
            out = out.reshape(block.n_sequences * block.queries, -1)
            attended.append(out if block.closed is None else out.masked_fill(block.closed, 0))
        return self.out_lin(torch.cat(attended)), weights
