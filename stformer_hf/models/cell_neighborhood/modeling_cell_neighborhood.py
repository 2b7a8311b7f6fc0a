"""CellNeighborhood models: embeddings of a neighbourhood, and a masked cell's counts, from the cells around it.

An encoder over the cells of each neighbourhood, attention pooling, and a decoder on the pooled state and the type of
the masked cell.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, TransformersKwargs
from transformers.utils.generic import can_return_tuple

from .configuration_cell_neighborhood import CellNeighborhoodConfig
from .count_likelihoods import CountHead, check_counts
from .neighborhood_attention import Block, CellNeighborhoodAttention, Routes, routes_of_masks, routes_of_packing
from .sparse_expression import ExpressionLinear, SparseRows


@dataclass
class CellNeighborhoodModelOutput(ModelOutput):
    """Output of `CellNeighborhoodModel` for N cells in B neighbourhoods.

    Attributes
    ----------
    neighborhood_embedding : Tensor (B, hidden)
        The pooled neighbourhood, computed from the cells around the masked cell, without the masked cell itself.
    typed_neighborhood_embedding : Tensor (B, hidden), optional
        The decoder's state of the masked cell, computed from its type and its neighbourhood; its counts are predicted
        from this state. None if no type was given.
    last_hidden_state : Tensor (N, hidden)
        The encoder's state of each cell.
    hidden_states : tuple of Tensor (N + B, hidden), optional
        Tokens before the encoder and after each of its layers: cells, then the cls token of each neighbourhood.
    attentions : tuple of Tensor (heads, N + B, N + B), optional
        Attention weights of each encoder layer.
    """

    neighborhood_embedding: torch.Tensor | None = None
    typed_neighborhood_embedding: torch.Tensor | None = None
    last_hidden_state: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


@dataclass
class CellNeighborhoodForMaskedCellOutput(ModelOutput):
    """Output of `CellNeighborhoodForMaskedCell` for B masked cells and G genes.

    Attributes
    ----------
    loss : Tensor ()
        Mean negative log likelihood of the masked cells' counts, in nats per gene.
    expected_counts : float32 Tensor (B, G)
        Expected counts: the mean times the probability of no excess zero.
    mean, dispersion : float32 Tensor (B, G)
        Parameters of the negative binomials; the variance is mean + mean ** 2 / dispersion.
    gate : float32 Tensor (B, G), optional
        Probability of an excess zero; None with `likelihood="nb"`.
    neighborhood_embedding, typed_neighborhood_embedding, last_hidden_state, hidden_states, attentions
        As in `CellNeighborhoodModelOutput`.
    """

    loss: torch.Tensor | None = None
    expected_counts: torch.Tensor | None = None
    mean: torch.Tensor | None = None
    dispersion: torch.Tensor | None = None
    gate: torch.Tensor | None = None
    neighborhood_embedding: torch.Tensor | None = None
    typed_neighborhood_embedding: torch.Tensor | None = None
    last_hidden_state: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


# ---------------------------------------------------------------------- layers


class CellNeighborhoodLayer(GradientCheckpointingLayer):
    """Attention and feed-forward block, each with a LayerNorm before it and a residual around it."""

    def __init__(self, config: CellNeighborhoodConfig):
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attention = CellNeighborhoodAttention(config)
        self.feed_forward_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.lin1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.activation = ACT2FN[config.hidden_act]
        self.lin2 = nn.Linear(config.intermediate_size, config.hidden_size)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(
        self, hidden_states: torch.Tensor, blocks: list[Block], partners: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Apply the layer to tokens (T, hidden); `partners` (T,) are the keys of the queries, if not the tokens."""
        normed = self.attention_norm(hidden_states)
        attended, weights = self.attention(normed, normed if partners is None else normed[partners], blocks)
        hidden_states = hidden_states + self.dropout(attended)
        transformed = self.lin2(self.activation(self.lin1(self.feed_forward_norm(hidden_states))))
        return hidden_states + self.dropout(transformed), weights


class CellTokens(nn.Module):
    """Tokens of cells: one half is the embedding of the cell's type, the other encodes its expression.

    The second half is an MLP of the expression, a linear layer on a given embedding of the cell, or the sum of both.
    For a masked cell it is a learnt vector.
    """

    def __init__(self, config: CellNeighborhoodConfig):
        super().__init__()
        self.config = config
        half = config.hidden_size // 2
        self.cell_type_embeddings = nn.Embedding(config.n_cell_types, half)
        self.expression = None
        if config.use_expression:
            self.expression = nn.Sequential(
                ExpressionLinear(config.n_genes, half), ACT2FN[config.hidden_act], nn.Linear(half, half)
            )
        self.cell_embedding = nn.Linear(config.cell_embedding_size, half) if config.cell_embedding_size else None
        self.masked_expression = nn.Parameter(torch.empty(half))

    def forward(
        self,
        cell_types: torch.LongTensor,
        expression: torch.Tensor | SparseRows | None,
        cell_embeds: torch.Tensor | None,
    ) -> torch.Tensor:
        """Return tokens (N, hidden) of observed cells; see `CellNeighborhoodModel.forward`."""
        parts = []
        if self.expression is not None:
            shape = (len(cell_types), self.config.n_genes)
            if not isinstance(expression, SparseRows):
                expression = self._checked("observed_expression", expression, shape, "n_genes").float()
            elif not isinstance(self.expression[0], ExpressionLinear):  # replaced, as by PEFT
                expression = expression.to_dense(shape[1])
            if self.config.apply_log1p:
                expression = expression.log1p()
            if isinstance(expression, torch.Tensor):
                expression = expression.to(self.masked_expression.dtype)
            parts.append(self.expression(expression))
        if self.cell_embedding is not None:
            shape = (len(cell_types), self.config.cell_embedding_size)
            cell_embeds = self._checked("cell_embeds", cell_embeds, shape, "cell_embedding_size")
            parts.append(self.cell_embedding(cell_embeds.to(self.masked_expression.dtype)))
        return torch.cat([self._embed_types(cell_types, "observed_cell_type"), sum(parts)], dim=-1)

    def masked(self, cell_types: torch.LongTensor) -> torch.Tensor:
        """Return tokens (B, hidden) of masked cells with types (B,)."""
        types = self._embed_types(cell_types, "masked_cell_type")
        return torch.cat([types, self.masked_expression.expand(len(types), -1)], dim=-1)

    def _embed_types(self, cell_types: torch.LongTensor, name: str) -> torch.Tensor:
        known = self.config.n_cell_types
        if cell_types.device.type == "cpu" and not torch.compiler.is_compiling() and len(cell_types):
            least, most = int(cell_types.min()), int(cell_types.max())
            if least < 0 or most >= known:
                raise ValueError(
                    f"{name} holds types from {least} to {most}, but the model has 0 to {known - 1} (n_cell_types)."
                )
        return self.cell_type_embeddings(cell_types)

    @staticmethod
    def _checked(name: str, tensor: torch.Tensor | None, shape: tuple[int, int], field: str) -> torch.Tensor:
        if tensor is None or tuple(tensor.shape) != shape:
            found = "nothing" if tensor is None else tuple(tensor.shape)
            raise ValueError(f"{name} must be a tensor {shape} (cells, config.{field}), got {found}.")
        return tensor


class NeighborhoodPooling(nn.Module):
    """Attention of a learnt query over the cells of a neighbourhood, added to the state of its cls token.

    A masked cell without neighbours has only the cls token, which has seen nothing, so all such cells get the same
    learnt state.
    """

    def __init__(self, config: CellNeighborhoodConfig):
        super().__init__()
        self.query = nn.Parameter(torch.empty(config.hidden_size))
        self.attention = CellNeighborhoodAttention(config)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, tokens: torch.Tensor, cls: torch.Tensor, routes: Routes) -> torch.Tensor:
        """Pool encoded tokens (N + B, hidden), of which the last B are the cls tokens, to (B, hidden)."""
        cells = tokens if routes.pooled_cells is None else tokens[routes.pooled_cells]
        attended, _ = self.attention(self.query.expand(len(cls), -1), cells, routes.pooling)
        if routes.pooled_place is not None:
            attended = attended[routes.pooled_place]
        return self.norm(cls + attended)


# ---------------------------------------------------------------------- models


class CellNeighborhoodPreTrainedModel(PreTrainedModel):
    """Base class of the CellNeighborhood models: configuration, initialisation, supported backends."""

    config: CellNeighborhoodConfig
    config_class = CellNeighborhoodConfig
    base_model_prefix = "cell_neighborhood"
    main_input_name = "observed_cell_type"  # Trainer counts its elements as tokens
    supports_gradient_checkpointing = True
    _no_split_modules = ["CellNeighborhoodLayer"]
    _supports_sdpa = True
    # A checkpoint may have a head that the model lacks, without a warning; a missing head is reported.
    _keys_to_ignore_on_load_unexpected = [r"^count_head\."]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, CellTokens):
            init.normal_(module.masked_expression, mean=0.0, std=std)
        elif isinstance(module, NeighborhoodPooling):
            init.normal_(module.query, mean=0.0, std=std)
        elif isinstance(module, CellNeighborhoodModel):
            init.normal_(module.cls_token, mean=0.0, std=std)


class CellNeighborhoodModel(CellNeighborhoodPreTrainedModel):
    """Encoder, pooling and decoder without a head: embeddings of neighbourhoods."""

    _auto_class = "AutoModel"

    def __init__(self, config: CellNeighborhoodConfig):
        super().__init__(config)
        self.tokens = CellTokens(config)
        self.cls_token = nn.Parameter(torch.empty(config.hidden_size))
        self.encoder = nn.ModuleList([CellNeighborhoodLayer(config) for _ in range(config.encoder_layers)])
        self.encoder_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.pooling = NeighborhoodPooling(config)
        self.decoder = nn.ModuleList([CellNeighborhoodLayer(config) for _ in range(config.decoder_layers)])
        self.decoder_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        """Return the embedding of the cell types."""
        return self.tokens.cell_type_embeddings

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Replace the embedding of the cell types."""
        self.tokens.cell_type_embeddings = value

    @can_return_tuple
    def forward(
        self,
        observed_expression: torch.Tensor | None = None,
        observed_cell_type: torch.LongTensor | None = None,
        masked_cell_type: torch.LongTensor | None = None,
        cu_seq_lens: torch.IntTensor | None = None,
        encoder_mask: torch.BoolTensor | None = None,
        pooling_mask: torch.BoolTensor | None = None,
        decoder_mask: torch.BoolTensor | None = None,
        observed_neighboorhood_lens: Sequence[int] | None = None,
        cell_embeds: torch.Tensor | None = None,
        observed_indptr: torch.IntTensor | None = None,
        observed_genes: torch.IntTensor | None = None,
        observed_values: torch.Tensor | None = None,
        n_genes: int | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> CellNeighborhoodModelOutput | tuple[torch.Tensor, ...]:
        """Embed B neighbourhoods with N cells in total.

        A batch has either dense masks or packed sequences; the results are the same. Masks take (N + B) ** 2 memory,
        the packed form N.

        Parameters
        ----------
        observed_expression : Tensor (N, G)
            Expression of the cells around the masked ones, neighbourhood after neighbourhood: counts, or log1p values
            with `config.apply_log1p=False`.
        observed_cell_type : LongTensor (N,)
        masked_cell_type : LongTensor (B,), optional
            Without it the decoder does not run, and there is no typed embedding.
        cu_seq_lens : int32 Tensor (B + 1,), optional
            Packed batches: neighbourhood i has the cells `cu_seq_lens[i]:cu_seq_lens[i + 1]`.
        encoder_mask : bool Tensor (N + B, N + B), optional
            Masked batches: True = may not attend. Tokens are the cells, then the cls token of each neighbourhood.
        pooling_mask : bool Tensor (B, N + B), optional
            Masked batches: True for tokens that are not pooled into a neighbourhood. A row of all True (a cell without
            neighbours) uses only its cls token.
        decoder_mask : bool Tensor (2B, 2B), optional
            Masked batches: tokens are the pooled neighbourhoods, then the masked cells. As collated, a neighbourhood
            and its masked cell attend only to each other, with weight 1.
        observed_neighboorhood_lens : list of int (B,), optional
            Lengths of the neighbourhoods; avoids a synchronisation with the GPU for a packed batch.
        cell_embeds : Tensor (N, cell_embedding_size), optional
            An embedding of each observed cell, for a model with `config.cell_embedding_size`. Gradients flow into it
            if it has a graph; embeddings computed beforehand are frozen.
        observed_indptr, observed_genes, observed_values : int32 (N + 1,), int32 (E,) and float32 (E,) Tensor, optional
            The observed expression without its zeros, in place of `observed_expression`: cell i has the values
            `observed_indptr[i]:observed_indptr[i + 1]`. It is embedded without ever being dense.
        n_genes : int, optional
            Number of genes G of the sparse expression, to be compared with the configuration.
        output_hidden_states, output_attentions : bool, optional
            Attentions need the eager backend and a masked batch.
        **kwargs
            Other keys of a batch, such as `segment_ids`, `seq_idx`, `full_mask` and `bs`, are ignored.

        Raises
        ------
        ValueError
            Both forms are given, or neither; shapes, types or lengths of tensors do not match each other or the
            configuration; cell types are unknown to the model (checked on a CPU only); attentions are not available.
        """
        if observed_cell_type is None:
            raise ValueError("observed_cell_type is missing.")
        n_cells = len(observed_cell_type)
        masks = (encoder_mask, pooling_mask, decoder_mask)
        if (cu_seq_lens is None) == (encoder_mask is None) or any(
            (mask is None) != (masks[0] is None) for mask in masks
        ):
            raise ValueError(
                "A batch needs either cu_seq_lens (packed) or encoder_mask, pooling_mask and decoder_mask; "
                "got neither, both or only a part of them."
            )
        if cu_seq_lens is not None:
            routes = routes_of_packing(cu_seq_lens, observed_neighboorhood_lens, n_cells)
            n_neighborhoods = len(cu_seq_lens) - 1
        else:
            assert pooling_mask is not None  # checked above
            routes = routes_of_masks(*masks, n_cells)
            n_neighborhoods = len(pooling_mask)
        if not n_neighborhoods:
            raise ValueError("The batch has no neighbourhoods.")
        if masked_cell_type is not None and len(masked_cell_type) != n_neighborhoods:
            raise ValueError(f"There are {len(masked_cell_type)} masked cells for {n_neighborhoods} neighbourhoods.")
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        if output_attentions is None:
            output_attentions = self.config.output_attentions
        if output_attentions and (cu_seq_lens is not None or self.config._attn_implementation != "eager"):
            raise ValueError('Attentions need a batch with masks and model.set_attn_implementation("eager").')

        expression = observed_expression
        if observed_values is not None:
            if observed_expression is not None:
                raise ValueError("Pass either observed_expression or observed_values, not both.")
            expression = self._sparse_rows(observed_indptr, observed_genes, observed_values, n_cells, n_genes)
        cells = self.tokens(observed_cell_type, expression, cell_embeds)
        tokens = torch.cat([cells, self.cls_token.expand(n_neighborhoods, -1)])
        tokens, hidden_states, attentions = self._encode(tokens, routes, output_hidden_states, output_attentions)
        cells, cls = tokens.split([n_cells, n_neighborhoods])
        pooled = self.pooling(tokens, cls, routes)
        typed = None
        if masked_cell_type is not None:
            typed = torch.cat([pooled, self.tokens.masked(masked_cell_type)])
            for layer in self.decoder:
                typed, _ = layer(typed, routes.decoder, routes.partners)
            typed = self.decoder_norm(typed[n_neighborhoods:])
        return CellNeighborhoodModelOutput(
            neighborhood_embedding=pooled,
            typed_neighborhood_embedding=typed,
            last_hidden_state=cells,
            hidden_states=hidden_states,
            attentions=attentions,
        )

    def _sparse_rows(
        self,
        indptr: torch.Tensor | None,
        genes: torch.Tensor | None,
        values: torch.Tensor,
        n_cells: int,
        n_genes: int | None,
    ) -> SparseRows:
        """Check the arrays of sparse expression; their contents on a CPU only."""
        if indptr is None or genes is None or len(indptr) != n_cells + 1 or len(genes) != len(values):
            found = ["nothing" if part is None else tuple(part.shape) for part in (indptr, genes, values)]
            raise ValueError(
                f"observed_indptr, observed_genes and observed_values must be tensors ({n_cells + 1},), (E,) and (E,) "
                f"for {n_cells} cells, got {', '.join(map(str, found))}."
            )
        if n_genes not in (None, self.config.n_genes):
            raise ValueError(f"The observed cells have {n_genes} genes, but the model has {self.config.n_genes}.")
        if indptr.device.type == "cpu" and not torch.compiler.is_compiling() and int(indptr[-1]) != len(genes):
            raise ValueError(
                f"observed_indptr ends at {int(indptr[-1])}, but there are {len(genes)} values. A packed batch cannot "
                "be split along the first dimension."
            )
        return SparseRows(indptr, genes, values.float())

    def _encode(
        self, tokens: torch.Tensor, routes: Routes, output_hidden_states: bool, output_attentions: bool
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...] | None, tuple[torch.Tensor, ...] | None]:
        """Encode tokens (N + B, hidden); return them in their original order."""

        def in_order(tokens: torch.Tensor) -> torch.Tensor:
            return tokens if routes.place is None else tokens[routes.place]

        hidden_states, attentions = [tokens], []
        if routes.order is not None:
            tokens = tokens[routes.order]
        for layer in self.encoder:
            tokens, weights = layer(tokens, routes.encoder)
            if output_hidden_states:
                hidden_states.append(in_order(tokens))
            attentions.append(weights)
        return (
            in_order(self.encoder_norm(tokens)),
            tuple(hidden_states) if output_hidden_states else None,
            tuple(attentions) if output_attentions else None,
        )


class CellNeighborhoodForMaskedCell(CellNeighborhoodPreTrainedModel):
    """CellNeighborhood that predicts the counts of the masked cell from its type and the cells around it."""

    _auto_class = "AutoModelForPreTraining"

    def __init__(self, config: CellNeighborhoodConfig):
        super().__init__(config)
        self.cell_neighborhood = CellNeighborhoodModel(config)
        self.count_head = CountHead(config.hidden_size, config.n_genes, config.likelihood)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        observed_expression: torch.Tensor | None = None,
        observed_cell_type: torch.LongTensor | None = None,
        masked_cell_type: torch.LongTensor | None = None,
        masked_expression: torch.Tensor | None = None,
        return_loss: bool = True,
        num_items_in_batch: int | torch.Tensor | None = None,
        loss_mask: torch.BoolTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> CellNeighborhoodForMaskedCellOutput | tuple[torch.Tensor, ...]:
        """Predict the counts of B masked cells.

        Parameters
        ----------
        observed_expression, observed_cell_type
            As in `CellNeighborhoodModel.forward`; sparse expression is among `kwargs`.
        masked_cell_type : LongTensor (B,)
        masked_expression : Tensor (B, G), optional
            Counts of the masked cells, to predict: non-negative integers, regardless of `config.apply_log1p`.
        return_loss : bool, default: True
            Whether to compute the loss, if there are counts.
        num_items_in_batch : int or Tensor (), optional
            Number of masked cells of the whole step, by which the loss is divided; those of `loss_mask` by default.
            `Trainer` passes it.
        loss_mask : BoolTensor (B,), optional
            Masked cells that count in the loss; all by default.
        **kwargs
            `cu_seq_lens`, or `encoder_mask`, `pooling_mask` and `decoder_mask`, and other arguments of
            `CellNeighborhoodModel.forward`.

        Raises
        ------
        ValueError
            The type of the masked cells is missing; the masked expression is not counts (checked on a CPU only), or
            has another shape; and the errors of `CellNeighborhoodModel.forward`.
        """
        if masked_cell_type is None:
            raise ValueError("masked_cell_type is missing: a masked cell's type is needed to predict its counts.")
        outputs = self.cell_neighborhood(
            observed_expression=observed_expression,
            observed_cell_type=observed_cell_type,
            masked_cell_type=masked_cell_type,
            return_dict=True,
            **kwargs,
        )
        counts = self.count_head(outputs.typed_neighborhood_embedding)
        loss = None
        if masked_expression is not None and return_loss:
            if masked_expression.shape != counts.log_mean.shape:
                shape = tuple(counts.log_mean.shape)
                raise ValueError(f"masked_expression must be a tensor {shape}, got {tuple(masked_expression.shape)}.")
            check_counts(masked_expression, "masked_expression")
            of_cells = -counts.log_likelihood(masked_expression).mean(-1)
            if loss_mask is not None:
                of_cells = of_cells[loss_mask]
            loss = of_cells.sum() / (max(len(of_cells), 1) if num_items_in_batch is None else num_items_in_batch)
        return CellNeighborhoodForMaskedCellOutput(
            loss=loss,
            expected_counts=counts.expected(),
            mean=counts.log_mean.exp(),
            dispersion=counts.log_dispersion.exp(),
            gate=None if counts.gate_logits is None else counts.gate_logits.sigmoid(),
            **outputs,
        )
