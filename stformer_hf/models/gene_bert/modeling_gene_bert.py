"""GeneBert models: expression bins and phenotypes in, hidden states, masked-token logits or class logits out."""

from collections.abc import Callable

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutput, MaskedLMOutput, SequenceClassifierOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_gene_bert import GeneBertConfig
from .packed_attention import check_packing, packed_mask, packed_sdpa_attention_forward, segments_of


class PositionlessEmbeddings(nn.Module):
    """Sum of token and token-type embeddings, LayerNorm, dropout. The order of the genes carries no meaning."""

    def __init__(self, config: GeneBertConfig):
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size, padding_idx=config.pad_token_id)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Embed tokens.

        Parameters
        ----------
        input_ids, token_type_ids : LongTensor (batch, length)
            Token ids and types.
        inputs_embeds : Tensor (batch, length, hidden), optional
            In place of `input_ids`.

        Returns
        -------
        Tensor (batch, length, hidden)

        Raises
        ------
        ValueError
            `token_type_ids` are missing: without them a bin belongs to no gene.
        """
        if token_type_ids is None:
            raise ValueError("GeneBert needs token_type_ids: they say which gene each expression bin belongs to.")
        if inputs_embeds is None:
            inputs_embeds = self.word_embeddings(input_ids)
        return self.dropout(self.LayerNorm(inputs_embeds + self.token_type_embeddings(token_type_ids)))


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
    """Softmax attention written out; gives the attention weights as well."""
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

    def forward(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None, **kwargs: Unpack[TransformersKwargs]
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attend; returns the output (batch, length, hidden) and, on the eager backend, the weights."""
        batch_and_length = hidden_states.shape[:-1]
        heads = (*batch_and_length, -1, self.head_dim)
        query = self.q_lin(hidden_states).view(heads).transpose(1, 2)
        key = self.k_lin(hidden_states).view(heads).transpose(1, 2)
        value = self.v_lin(hidden_states).view(heads).transpose(1, 2)

        attention_interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        if kwargs.get("cu_seq_lens_q") is not None and attention_mask is None:
            if self.config._attn_implementation == "sdpa":
                attention_interface = packed_sdpa_attention_forward
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
        return self.out_lin(attended.reshape(*batch_and_length, -1)), weights


class GeneBertFeedForward(nn.Module):
    """Linear, activation, Linear, dropout."""

    def __init__(self, config: GeneBertConfig):
        super().__init__()
        self.lin1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.activation = ACT2FN[config.hidden_act]
        self.lin2 = nn.Linear(config.intermediate_size, config.hidden_size)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Transform each token on its own."""
        return self.dropout(self.lin2(self.activation(self.lin1(hidden_states))))


class GeneBertLayer(GradientCheckpointingLayer):
    """Attention and feed-forward block, each with a residual and a LayerNorm after it (DistilBERT's order)."""

    def __init__(self, config: GeneBertConfig):
        super().__init__()
        self.attention = GeneBertAttention(config)
        self.sa_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.ffn = GeneBertFeedForward(config)
        self.output_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None, **kwargs: Unpack[TransformersKwargs]
    ) -> torch.Tensor:
        """Apply the block to (batch, length, hidden)."""
        attended, _ = self.attention(hidden_states, attention_mask, **kwargs)
        hidden_states = self.sa_layer_norm(attended + hidden_states)
        return self.output_layer_norm(self.ffn(hidden_states) + hidden_states)


class GeneBertPreTrainedModel(PreTrainedModel):
    """What all GeneBert models share: configuration, initialisation, supported backends."""

    config: GeneBertConfig
    config_class = GeneBertConfig
    base_model_prefix = "gene_bert"
    supports_gradient_checkpointing = True
    _no_split_modules = ["GeneBertLayer"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_record_outputs = {"hidden_states": GeneBertLayer, "attentions": GeneBertAttention}
    # A checkpoint with another head, or with one where none is wanted, is no surprise. A head that is missing is told.
    _keys_to_ignore_on_load_unexpected = [r"^mlm_head\.", r"^pre_classifier\.", r"^classifier\."]


class GeneBertModel(GeneBertPreTrainedModel):
    """The encoder: embeddings and transformer layers, no head."""

    _auto_class = "AutoModel"

    def __init__(self, config: GeneBertConfig):
        super().__init__(config)
        self.embeddings = PositionlessEmbeddings(config)
        self.layers = nn.ModuleList([GeneBertLayer(config) for _ in range(config.num_hidden_layers)])
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        """Embedding of the token ids."""
        return self.embeddings.word_embeddings

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Replace the embedding of the token ids."""
        self.embeddings.word_embeddings = value

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        cu_seq_lens_q: torch.IntTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutput | tuple[torch.Tensor, ...]:
        """Encode cells.

        Parameters
        ----------
        input_ids, token_type_ids : LongTensor (batch, length)
            As `GeneTokenizer` gives them.
        attention_mask : Tensor (batch, length), optional
            1 where there is a token, 0 where there is padding.
        inputs_embeds : Tensor (batch, length, hidden), optional
            In place of `input_ids`.
        cu_seq_lens_q : int32 Tensor (n_cells + 1,), optional
            Of a packed batch, one row: where its cells begin and end. Beside it a packed batch has `cu_seq_lens_k`,
            `max_length_q`, `max_length_k` and `seq_idx`, for the backends that read them.

        Returns
        -------
        BaseModelOutput
            `last_hidden_state` (batch, length, hidden); `hidden_states` and `attentions` on request.

        Raises
        ------
        ValueError
            Neither or both of `input_ids` and `inputs_embeds`, or no `token_type_ids`; a packed batch on a backend
            that would mix its cells.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give either input_ids or inputs_embeds.")
        hidden_states = self.embeddings(input_ids, token_type_ids, inputs_embeds)
        check_packing(hidden_states.shape[:2], attention_mask, cu_seq_lens_q, kwargs)
        if cu_seq_lens_q is None:
            attention_mask = create_bidirectional_mask(
                config=self.config, inputs_embeds=hidden_states, attention_mask=attention_mask
            )
        else:
            attention_mask = packed_mask(self.config, hidden_states, cu_seq_lens_q)
            kwargs["cu_seq_lens_q"] = cu_seq_lens_q
        for layer in self.layers:
            hidden_states = layer(hidden_states, attention_mask, **kwargs)
        return BaseModelOutput(last_hidden_state=hidden_states)


class GeneBertMLMHead(nn.Module):
    """Linear, activation, LayerNorm, and a Linear layer to the vocabulary."""

    def __init__(self, config: GeneBertConfig):
        super().__init__()
        self.transform = nn.Linear(config.hidden_size, config.hidden_size)
        self.activation = ACT2FN[config.hidden_act]
        self.layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.decoder = nn.Linear(config.hidden_size, config.vocab_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Logits (…, vocab_size) of hidden states (…, hidden)."""
        return self.decoder(self.layer_norm(self.activation(self.transform(hidden_states))))


class GeneBertForPhenotypicMLM(GeneBertPreTrainedModel):
    """GeneBert that predicts the masked expression bins and phenotypes of a cell."""

    _auto_class = "AutoModelForMaskedLM"
    _tied_weights_keys = {"mlm_head.decoder.weight": "gene_bert.embeddings.word_embeddings.weight"}

    def __init__(self, config: GeneBertConfig):
        super().__init__(config)
        # transformers guesses the loss from the class name, and would take the shifted causal one for this name.
        self.loss_type = "ForMaskedLM"
        self.gene_bert = GeneBertModel(config)
        self.mlm_head = GeneBertMLMHead(config)
        self.post_init()

    def get_output_embeddings(self) -> nn.Linear:
        """Return the last layer of the MLM head."""
        return self.mlm_head.decoder

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        """Replace the last layer of the MLM head."""
        self.mlm_head.decoder = new_embeddings

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> MaskedLMOutput | tuple[torch.Tensor, ...]:
        """Predict masked tokens.

        Parameters
        ----------
        input_ids, attention_mask, token_type_ids, inputs_embeds
            As in `GeneBertModel.forward`.
        labels : LongTensor (batch, length), optional
            Ids to predict; -100 where there is nothing to predict.
        num_items_in_batch : int or Tensor, optional
            Number of labels over the whole accumulated batch; the loss is divided by it (Trainer gives it).

        Returns
        -------
        MaskedLMOutput
            `loss`: mean cross entropy in nats over the labelled positions, 0 if there are none. `logits`:
            (batch, length, vocab_size), or (n_labelled, vocab_size) with labels and `config.sparse_prediction`.
        """
        outputs = self.gene_bert(
            input_ids=input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            inputs_embeds=inputs_embeds,
            return_dict=True,
            **kwargs,
        )
        hidden_states = outputs.last_hidden_state
        if labels is not None and self.config.sparse_prediction:
            labelled = labels != -100
            hidden_states, labels = hidden_states[labelled], labels[labelled]
        logits = self.mlm_head(hidden_states)

        loss = None
        if labels is not None:
            loss = self._loss(logits, labels, num_items_in_batch)
        return MaskedLMOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )

    def _loss(
        self, logits: torch.Tensor, labels: torch.LongTensor, num_items_in_batch: torch.Tensor | int | None
    ) -> torch.Tensor:
        total = nn.functional.cross_entropy(
            logits.view(-1, self.config.vocab_size).float(),
            labels.view(-1).to(logits.device),
            ignore_index=-100,
            reduction="sum",
            label_smoothing=self.config.label_smoothing,
        )
        if num_items_in_batch is None:
            num_items_in_batch = (labels != -100).sum()
        # A batch of cells without counts has no label, and its loss is 0, not NaN.
        return total / torch.as_tensor(num_items_in_batch, device=logits.device).clamp(min=1)


def pool(
    hidden: torch.Tensor,
    token_type_ids: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
    pooling: str,
    cu_seq_lens: torch.Tensor | None = None,
) -> torch.Tensor:
    """Reduce the hidden states of a cell's tokens to one.

    Parameters
    ----------
    hidden : Tensor (batch, length, hidden_size)
        Hidden states.
    token_type_ids : Tensor (batch, length)
        Types of the tokens; special tokens and padding have type 0.
    attention_mask : Tensor (batch, length), optional
        1 for tokens, 0 for padding; `[CLS]` is the first token.
    pooling : {"cls", "mean"}
        The state of `[CLS]`, or the mean over all tokens but the special ones (0 for a cell that has no other).
    cu_seq_lens : int32 Tensor (n_cells + 1,), optional
        Of a packed batch: where its cells begin and end.

    Returns
    -------
    Tensor (batch or n_cells, hidden_size)

    Raises
    ------
    ValueError
        Another pooling; "mean" without token types.
    """
    if pooling == "cls":
        if cu_seq_lens is not None:
            return hidden[0, cu_seq_lens[:-1]]
        if attention_mask is None:
            return hidden[:, 0]
        return hidden[torch.arange(len(hidden), device=hidden.device), attention_mask.argmax(1)]
    if pooling != "mean":
        raise ValueError(f'pooling is "cls" or "mean", got {pooling!r}.')
    if token_type_ids is None:
        raise ValueError('pooling="mean" needs token_type_ids: they tell genes from special tokens.')
    content = (token_type_ids > 0).unsqueeze(-1)
    if cu_seq_lens is not None:
        cell = segments_of(cu_seq_lens, hidden.shape[1])[0]
        n_cells = len(cu_seq_lens) - 1
        total = hidden.new_zeros(n_cells, hidden.shape[-1]).index_add(0, cell, hidden[0] * content[0])
        return total / hidden.new_zeros(n_cells, 1).index_add(0, cell, content[0].to(hidden.dtype)).clamp(min=1)
    return (hidden * content).sum(1) / content.sum(1).clamp(min=1)


class GeneBertForClassification(GeneBertPreTrainedModel):
    """GeneBert that assigns each cell to a class, from hidden states pooled as `config.classifier_pooling` says."""

    _auto_class = "AutoModelForSequenceClassification"

    def __init__(self, config: GeneBertConfig):
        super().__init__(config)
        self.loss_type = "ForSequenceClassification"
        self.gene_bert = GeneBertModel(config)
        self.pre_classifier = nn.Linear(config.hidden_size, config.hidden_size)
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> SequenceClassifierOutput | tuple[torch.Tensor, ...]:
        """Classify cells.

        Parameters
        ----------
        input_ids, attention_mask, token_type_ids, inputs_embeds
            As in `GeneBertModel.forward`.
        labels : Tensor (batch,), optional
            Class of each cell.

        Returns
        -------
        SequenceClassifierOutput
            `loss`: as `transformers` computes it for `config.problem_type` (cross entropy in nats by default);
            `logits` (batch, num_labels).
        """
        # Trainer's count of labels is meant for the loss alone; the encoder would hand it to the attention backend.
        num_items_in_batch = kwargs.pop("num_items_in_batch", None)
        outputs = self.gene_bert(
            input_ids=input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            inputs_embeds=inputs_embeds,
            return_dict=True,
            **kwargs,
        )
        pooled = pool(
            outputs.last_hidden_state,
            token_type_ids,
            attention_mask,
            self.config.classifier_pooling,
            kwargs.get("cu_seq_lens_q"),
        )
        logits = self.classifier(self.dropout(nn.functional.relu(self.pre_classifier(pooled))))

        loss = None
        if labels is not None:
            loss = self.loss_function(
                labels=labels, pooled_logits=logits, config=self.config, num_items_in_batch=num_items_in_batch
            )
        return SequenceClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


__all__ = [
    "GeneBertForClassification",
    "GeneBertForPhenotypicMLM",
    "GeneBertModel",
    "GeneBertPreTrainedModel",
    "PositionlessEmbeddings",
    "pool",
]
