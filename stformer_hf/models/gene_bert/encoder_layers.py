"""Layers of the GeneBert encoder: embeddings, attention, feed-forward block, transformer layer."""

import math
from collections.abc import Callable

import torch
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs

from .configuration_gene_bert import GeneBertConfig
from .packed_attention import PACKED_SDPA, segments_of


class RMSNorm(nn.RMSNorm):
    """RMSNorm (Zhang and Sennrich 2019) with its weight in the dtype of the input, as torch's fused kernel needs."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise the last dimension."""
        return nn.functional.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


def make_norm(config: GeneBertConfig) -> nn.Module:
    """Return a LayerNorm, or RMSNorm, over the hidden dimension."""
    norm = RMSNorm if config.norm_type == "rms_norm" else nn.LayerNorm
    return norm(config.hidden_size, eps=config.layer_norm_eps)


class PositionlessEmbeddings(nn.Module):
    """Sum of token and token-type embeddings, LayerNorm, dropout. The order of the genes has no meaning.

    The configuration can add two embeddings: that of the position of a token in its cell
    (`position_embedding_type="learned"`, for ranks), and that of the value of a gene (`value_embedding`).
    """

    def __init__(self, config: GeneBertConfig):
        super().__init__()
        self.config = config
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size, padding_idx=config.pad_token_id)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, config.hidden_size)
        if config.position_embedding_type == "learned":
            self.position_embeddings = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.soft_bins = config.value_embedding == "soft_bins"
        if config.value_embedding:
            self.value_embeddings = (SoftBins if self.soft_bins else ValueEmbedding)(config)
        self.LayerNorm = make_norm(config)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        expression_values: torch.Tensor | None = None,
        longest: int | None = None,
    ) -> torch.Tensor:
        """Embed tokens.

        Parameters
        ----------
        input_ids, token_type_ids : LongTensor (batch, length)
            Token ids and types.
        inputs_embeds : Tensor (batch, length, hidden), optional
            Used instead of `input_ids`.
        position_ids : LongTensor (batch, length), optional
            Position of each token in its cell, from 0; used with learned positions.
        expression_values : Tensor (batch, length), optional
            Value of each gene, 0 for tokens without one; used with `value_embedding`.
        longest : int, optional
            Number of tokens of the longest cell, if known without synchronising with a GPU; `length` by default.

        Returns
        -------
        Tensor (batch, length, hidden)

        Raises
        ------
        ValueError
            `token_type_ids` are missing, without which the gene of a bin is unknown; values are missing, or passed to
            a model that does not read them; a cell has more tokens than there are positions.
        """
        if token_type_ids is None:
            raise ValueError("GeneBert needs token_type_ids: they are the genes of the expression bins.")
        if inputs_embeds is None:
            inputs_embeds = self.word_embeddings(input_ids)
        if hasattr(self, "value_embeddings") != (expression_values is not None):
            raise ValueError(
                "A model with value_embedding needs expression_values: tokenize with values=True."
                if expression_values is None
                else "The model does not read expression_values: create it with value_embedding=True."
            )
        if expression_values is not None:
            of_values = self.value_embeddings(expression_values)
            if self.soft_bins:
                inputs_embeds = torch.where((expression_values != 0)[..., None], of_values, inputs_embeds)
            else:
                inputs_embeds = inputs_embeds + of_values
        embedded = inputs_embeds + self.token_type_embeddings(token_type_ids)
        if hasattr(self, "position_embeddings"):
            assert position_ids is not None
            most = self.config.max_position_embeddings
            bound = position_ids.shape[1] if longest is None else longest
            if bound > most and not torch.compiler.is_compiling() and int(position_ids.max()) >= most:
                raise ValueError(
                    f"A cell has {int(position_ids.max()) + 1} tokens, but the model has {most} positions: truncate "
                    "cells (tokenizer.model_max_length), or create the model with more max_position_embeddings."
                )
            embedded = embedded + self.position_embeddings(position_ids)
        return self.dropout(self.LayerNorm(embedded))


class ValueEmbedding(nn.Module):
    """Embedding of a number: Linear, activation, Linear; 0 if the number is 0 (scGPT's continuous values)."""

    def __init__(self, config: GeneBertConfig):
        super().__init__()
        self.lin1 = nn.Linear(1, config.hidden_size)
        self.activation = ACT2FN[config.hidden_act]
        self.lin2 = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """Embed values (batch, length) into (batch, length, hidden)."""
        values = values.to(self.lin1.weight.dtype).unsqueeze(-1)
        return self.lin2(self.activation(self.lin1(values))) * (values != 0)


class SoftBins(nn.Module):
    """Mixture of the embeddings of 16 bins, whose weights are a softmax over linear functions of the value.

    It begins as normal densities around centres from ln 2 (a count of 1) to ln 1000, as wide as their distance: the
    softmax of (c v - c ** 2 / 2) / width ** 2 over the centres c. So neighbouring values share bins, and both the
    centres and the widths are learned (after the soft bins of xTrimoGene, Gong et al. 2023, which scFoundation uses).
    """

    n_bins = 16

    def __init__(self, config: GeneBertConfig):
        super().__init__()
        self.slope, self.offset = nn.Parameter(torch.empty(self.n_bins)), nn.Parameter(torch.empty(self.n_bins))
        self.bins = nn.Embedding(self.n_bins, config.hidden_size)

    def reset_weights(self) -> None:
        """Start the weights at normal densities."""
        centres = torch.linspace(math.log(2), math.log(1000), self.n_bins, device=self.slope.device)
        width = math.log(500) / (self.n_bins - 1)
        init.copy_(self.slope, centres / width**2)
        init.copy_(self.offset, -(centres**2) / (2 * width**2))

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """Embed values (batch, length) into (batch, length, hidden)."""
        logits = values.to(self.slope.dtype).unsqueeze(-1) * self.slope + self.offset
        return logits.softmax(dim=-1) @ weight_of(self.bins)


def weight_of(table: nn.Embedding) -> torch.Tensor:
    """Return the weight of an embedding that is read whole, instead of row by row in its forward pass.

    Raise a ValueError if something is to happen in that forward pass: adapters are added there, and accelerate loads
    there what a `device_map` keeps on disk.
    """
    if hasattr(table, "base_layer"):
        raise ValueError(
            "An adapter has no effect on the embeddings cell_embedding.genes, wide_head.genes and "
            "value_embeddings.bins: leave them out of target_modules, or train them in full (modules_to_save)."
        )
    if table.weight.is_meta and hasattr(table, "_hf_hook"):
        raise ValueError(
            "The embeddings cell_embedding.genes, wide_head.genes and value_embeddings.bins cannot be offloaded: keep "
            "them on a device, such as device_map={'gene_bert.cell_embedding': 'cpu', …}."
        )
    return table.weight


def places_in_cells(
    shape: tuple[int, int], attention_mask: torch.Tensor | None, cu_seq_lens: torch.Tensor | None, device: torch.device
) -> torch.LongTensor:
    """Return the position of each token in its cell, LongTensor (batch, length).

    Padding, on either side, and tokens that are not attended to are not counted; in a packed row each cell starts
    at 0.
    """
    if cu_seq_lens is not None:
        at = torch.arange(shape[1], device=device)
        return (at - cu_seq_lens.long()[segments_of(cu_seq_lens, shape[1])[0]])[None]
    if attention_mask is None:
        return torch.arange(shape[1], device=device).expand(shape)
    return (attention_mask.long().cumsum(1) - 1).clamp(min=0)


def put_first(
    hidden: torch.Tensor,
    cells: torch.Tensor,
    attention_mask: torch.Tensor | None,
    cu_seq_lens: torch.Tensor | None,
) -> torch.Tensor:
    """Replace the first token of each cell in (batch, length, hidden) by its vector in `cells` (n_cells, hidden).

    A padded batch may have its padding on either side. If the last cells of a packed batch are empty, no cell may have
    its last token.
    """
    cells = cells.to(hidden.dtype)
    if cu_seq_lens is not None:
        # An empty segment at the end of a row writes into its last token, which is dead.
        return hidden.index_copy(1, cu_seq_lens[:-1].long().clamp(max=hidden.shape[1] - 1), cells[None])
    at = torch.arange(hidden.shape[1], device=hidden.device)
    first = 0 if attention_mask is None else attention_mask.to(hidden.device).long().argmax(1, keepdim=True)
    return torch.where((at == first).unsqueeze(-1), cells.unsqueeze(1), hidden)


def first_tokens(
    shape: tuple[int, int], attention_mask: torch.Tensor | None, cu_seq_lens: torch.Tensor | None, device: torch.device
) -> torch.LongTensor:
    """Return the position of each cell's first token in the flattened batch, LongTensor (n_cells,)."""
    if cu_seq_lens is not None:
        return cu_seq_lens[:-1].long().clamp(max=shape[1] - 1)  # last segments may be empty
    rows = torch.arange(shape[0], device=device) * shape[1]
    return rows if attention_mask is None else rows + attention_mask.to(device).long().argmax(1)


def keep(states: torch.Tensor, tokens: torch.LongTensor | None) -> torch.Tensor:
    """Select tokens of (batch, length, hidden) by their positions in the flattened batch, (1, k, hidden)."""
    return states if tokens is None else states.flatten(0, 1)[tokens.to(states.device)][None]


def rotary_angles(
    position_ids: torch.LongTensor, head_dim: int, base: float, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return cosine and sine of the rotary embedding (Su et al. 2021), each a Tensor (batch, 1, length, head_dim)."""
    steps = torch.arange(0, head_dim, 2, device=position_ids.device, dtype=torch.float32)
    angles = position_ids.unsqueeze(-1).float() * base ** (-steps / head_dim)
    angles = torch.cat([angles, angles], dim=-1).unsqueeze(1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(heads: torch.Tensor, angles: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Rotate queries or keys (batch, heads, length, head_dim) by their positions."""
    cos, sin = angles
    first, second = heads.chunk(2, dim=-1)
    return (heads * cos + torch.cat([-second, first], dim=-1) * sin).to(heads.dtype)  # angles are float32 in autocast


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Unpack[TransformersKwargs],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute softmax attention explicitly; also return the attention weights."""
    weights = torch.matmul(query, key.transpose(2, 3)) * scaling
    if attention_mask is not None:
        weights = weights + attention_mask
    weights = nn.functional.softmax(weights, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


class GeneBertAttention(nn.Module):
    """Multi-head self-attention, on the backend that `config._attn_implementation` names."""

    def __init__(self, config: GeneBertConfig):
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
        self.out_lin.begins_at_zero = config.residual_init == "zero"

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None,
        rotary: tuple[torch.Tensor, torch.Tensor] | None = None,
        tokens_to_keep: torch.LongTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attend; return the output, (batch, length, hidden) or (1, k, hidden), and the weights if eager."""
        batch_and_length = hidden_states.shape[:-1]
        heads = (*batch_and_length, -1, self.head_dim)
        query = self.q_lin(hidden_states).view(heads).transpose(1, 2)
        key = self.k_lin(hidden_states).view(heads).transpose(1, 2)
        value = self.v_lin(hidden_states).view(heads).transpose(1, 2)
        if rotary is not None:
            query, key = rotate(query, rotary), rotate(key, rotary)

        backend = self.config._attn_implementation
        if backend == "sdpa" and kwargs.get("cu_seq_lens_q") is not None and attention_mask is None:
            backend = PACKED_SDPA
        attention_interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(backend, eager_attention_forward)
        attended, weights = attention_interface(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        return self.out_lin(keep(attended.reshape(*batch_and_length, -1), tokens_to_keep)), weights


class GeneBertFeedForward(nn.Module):
    """Linear, activation, Linear, dropout; gated, the activation of one half scales the other (Shazeer 2020)."""

    def __init__(self, config: GeneBertConfig):
        super().__init__()
        self.gated = config.gated_feed_forward
        self.lin1 = nn.Linear(config.hidden_size, config.intermediate_size * (1 + self.gated))
        self.activation = ACT2FN[config.hidden_act]
        self.lin2 = nn.Linear(config.intermediate_size, config.hidden_size)
        self.lin2.begins_at_zero = config.residual_init == "zero"
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Transform each token separately."""
        inner = self.lin1(hidden_states)
        if self.gated:
            inner, gate = inner.chunk(2, dim=-1)
            return self.dropout(self.lin2(self.activation(inner) * gate))
        return self.dropout(self.lin2(self.activation(inner)))


class GeneBertLayer(GradientCheckpointingLayer):
    """Attention and feed-forward block, each with a residual.

    The norm comes after each residual (DistilBERT's order), or before each block (`pre_norm`; Xiong et al. 2020).
    """

    def __init__(self, config: GeneBertConfig):
        super().__init__()
        self.config, self.pre_norm = config, config.pre_norm
        if config.cls_state == "gated":
            self.cls_gate = nn.Parameter(torch.zeros(config.hidden_size))
        self.attention = GeneBertAttention(config)
        self.sa_layer_norm = make_norm(config)
        self.ffn = GeneBertFeedForward(config)
        self.output_layer_norm = make_norm(config)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None,
        tokens_to_keep: torch.LongTensor | None = None,
        is_cls: torch.BoolTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        """Apply the layer to hidden states (batch, length, hidden).

        With `tokens_to_keep`, positions (k,) in the flattened batch, all tokens are attended to, but what follows is
        computed for these alone: the result is (1, k, hidden). `is_cls` (batch, length) are the tokens that
        `config.cls_state` is for.
        """
        normed = self.sa_layer_norm(hidden_states) if self.pre_norm else hidden_states
        attended, _ = self.attention(normed, attention_mask, tokens_to_keep=tokens_to_keep, **kwargs)
        before = keep(hidden_states, tokens_to_keep)
        after = attended + before
        if self.pre_norm:
            after = self.ffn(self.output_layer_norm(after)) + after
        else:
            after = self.sa_layer_norm(after)
            after = self.output_layer_norm(self.ffn(after) + after)
        if is_cls is None:
            return after
        of_cls = before if self.config.cls_state == "fixed" else before + self.cls_gate * (after - before)
        return torch.where(keep(is_cls.unsqueeze(-1), tokens_to_keep), of_cls, after)
