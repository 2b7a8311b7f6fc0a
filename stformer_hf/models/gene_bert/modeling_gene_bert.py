"""GeneBert models: hidden states, masked-token logits and class logits from expression bins and phenotypes."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_outputs import (
    BaseModelOutput,
    MaskedLMOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, logging
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .cell_decoder import CellDecoder
from .configuration_gene_bert import IGNORE, GeneBertConfig
from .encoder_layers import (
    GeneBertLayer,
    PositionlessEmbeddings,
    first_tokens,
    keep,
    make_norm,
    places_in_cells,
    put_first,
    rotary_angles,
)
from .heads import GeneBertMLMHead, PreClassifier, classification_loss, combine_readers, masked_lm_loss, pool
from .packed_attention import check_packing, lengths_for, packed_mask, packing_of
from .pretrained_gene_bert import GeneBertPreTrainedModel
from .whole_cell import CellEmbedding, CellValues, WideHead

logger = logging.get_logger(__name__)


@dataclass
class GeneBertMaskedLMOutput(MaskedLMOutput):
    """`MaskedLMOutput` with statistics of the loss, and the outputs of the cell decoder.

    Attributes
    ----------
    class_statistics : Tensor (n_classes, 3)
        For each class of tokens (`config.token_classes`): sum of the labels' cross entropies in nats, without
        smoothing and weights; number of correctly predicted labels; number of labels.
    gene_logits : Tensor (n_cells, n_genes)
        With `config.cell_decoder`, log shares of the genes in each cell's counts, up to a constant per cell.
    log_dispersion : float32 Tensor (n_genes,)
        With `config.cell_decoder`, log of the dispersion of each gene's counts.
    """

    class_statistics: torch.Tensor | None = None
    gene_logits: torch.Tensor | None = None
    log_dispersion: torch.Tensor | None = None


def _returns_states(config: GeneBertConfig, kwargs: Mapping) -> bool:
    """Return whether a forward pass with these arguments returns all hidden states."""
    asked = kwargs.get("output_hidden_states")
    return config.output_hidden_states if asked is None else asked


class GeneBertModel(GeneBertPreTrainedModel):
    """The encoder: embeddings and transformer layers without a head."""

    _auto_class = "AutoModel"

    def __init__(self, config: GeneBertConfig):
        super().__init__(config)
        self.embeddings = PositionlessEmbeddings(config)
        if config.cell_embedding:
            self.cell_embedding = CellEmbedding(config)
        self.layers = nn.ModuleList([GeneBertLayer(config) for _ in range(config.num_hidden_layers)])
        if config.pre_norm:
            self.final_norm = make_norm(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        """Return the embedding of the token ids."""
        return self.embeddings.word_embeddings

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Replace the embedding of the token ids."""
        self.embeddings.word_embeddings = value

    def adds_nothing(self) -> bool:
        """Return whether the residual branches of all layers are 0, as at a start that was not trained.

        Weights that are not plain tensors count as different from 0, such as quantised ones, and so do those that are
        not parameters or are on disk.
        """
        last = [linear for layer in self.layers for linear in (layer.attention.out_lin, layer.ffn.lin2)]
        if not all(isinstance(getattr(linear, "weight", None), nn.Parameter) for linear in last):
            return False
        weights = [parameter.data for linear in last for parameter in linear.parameters()]
        return not any(type(weight) is not torch.Tensor or weight.is_meta or bool(weight.any()) for weight in weights)

    def reads_cls_alone(self) -> bool:
        """Return whether the states of `[CLS]` are functions of the whole cell alone, whatever the other tokens are.

        They are if `[CLS]` is fixed (or its gates are 0), and if no layer adds anything.
        """
        if not self.config.cell_embedding:
            return False
        gates = [layer.cls_gate for layer in self.layers if hasattr(layer, "cls_gate")]
        closed = bool(gates) and not any(bool(gate.any()) for gate in gates)
        return self.config.cls_state == "fixed" or closed or self.adds_nothing()

    def _apply_final_norm(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Apply the last norm; that of a fixed `[CLS]` is not trained, and the head can scale the other tokens."""
        norm = self.final_norm
        if self.config.cls_state == "fixed" and self.training and norm.weight.requires_grad:
            weights = {name: weight.detach() for name, weight in norm.named_parameters()}
            return torch.func.functional_call(norm, weights, hidden_states)
        return norm(hidden_states)

    def read_cells(
        self,
        cell_genes: torch.LongTensor | None,
        cell_counts: torch.Tensor | None,
        cell_indptr: torch.LongTensor | None = None,
        measured_genes: torch.Tensor | None = None,
    ) -> CellValues:
        """Read the counts of whole cells; parameters as in `GeneStatistics.forward`."""
        if cell_genes is None or cell_counts is None:
            raise ValueError("The model needs cell_genes and cell_counts: tokenize with whole_cell=True.")
        return self.cell_embedding.statistics(cell_genes, cell_counts, cell_indptr, measured_genes)

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        expression_values: torch.Tensor | None = None,
        cu_seq_lens_q: torch.IntTensor | None = None,
        cell_genes: torch.LongTensor | None = None,
        cell_counts: torch.Tensor | None = None,
        cell_indptr: torch.LongTensor | None = None,
        measured_genes: torch.Tensor | None = None,
        tokens_to_keep: torch.LongTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutput | tuple[torch.Tensor, ...]:
        """Encode cells.

        Parameters
        ----------
        input_ids, token_type_ids : LongTensor (batch, length)
            Ids and types as `GeneTokenizer` returns them.
        attention_mask : Tensor (batch, length), optional
            1 for tokens, 0 for padding.
        inputs_embeds : Tensor (batch, length, hidden), optional
            Used instead of `input_ids`.
        position_ids : LongTensor (batch, length), optional
            Position of each token in its cell, for a model with positions; by default counted from each cell's first
            token, without tokens that are not attended to.
        expression_values : Tensor (batch, length), optional
            Value of each gene, for a model with `value_embedding`; 0 for other tokens and for masked ones.
        cu_seq_lens_q : int32 Tensor (n_cells + 1,), optional
            Boundaries of the cells of a packed batch, which is one row. Other inputs of backends (`cu_seq_lens_k`,
            `max_length_q`, `max_length_k`) are derived from it if the batch does not have them.
        cell_genes, cell_counts, cell_indptr, measured_genes : Tensor, optional
            Counts of the whole cells, for a model with `cell_embedding`; see `GeneStatistics.forward`.
        tokens_to_keep : LongTensor (k,), optional
            Positions in the flattened batch of the tokens whose last states are needed. What follows the attention of
            the last layer is computed for these alone, which saves most of that layer.

        Returns
        -------
        BaseModelOutput
            `last_hidden_state` (batch, length, hidden), or (1, k, hidden) with `tokens_to_keep`; on request
            `attentions` and `hidden_states`, the last of which has that shape, too.

        Raises
        ------
        ValueError
            Neither or both of `input_ids` and `inputs_embeds` are given, or `token_type_ids` are missing; the backend
            would mix the cells of a packed batch.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Pass either input_ids or inputs_embeds.")
        given = input_ids if inputs_embeds is None else inputs_embeds
        assert given is not None  # checked above
        shape = given.shape[:2]
        check_packing(shape, attention_mask, cu_seq_lens_q, {**kwargs, "position_ids": position_ids})
        positions = self.config.position_embedding_type
        if positions != "none" and position_ids is None:
            position_ids = places_in_cells(shape, attention_mask, cu_seq_lens_q, given.device)
        hidden_states = self.embeddings(
            input_ids, token_type_ids, inputs_embeds, position_ids, expression_values, kwargs.get("max_length_q")
        )
        if hasattr(self, "cell_embedding"):
            n_cells = shape[0] if cu_seq_lens_q is None else cu_seq_lens_q.shape[0] - 1
            n_counted = n_cells if cell_genes is None else cell_genes.shape[0]
            if cell_indptr is not None:
                n_counted = cell_indptr.shape[0] - 1
            if n_counted != n_cells:
                raise ValueError(
                    f"There are counts of {n_counted} cells, but tokens of {n_cells}. A packed batch needs "
                    "cell_indptr, and cannot be split along the first dimension, as torch.nn.DataParallel, "
                    "dispatch_batches and split_batches do: pad it."
                )
            cells = self.read_cells(cell_genes, cell_counts, cell_indptr, measured_genes)
            whole = self.cell_embedding(cells)
            whole = whole.detach() if self.config.cls_state == "fixed" else whole
            hidden_states = put_first(hidden_states, whole, attention_mask, cu_seq_lens_q)
        elif cell_genes is not None:
            raise ValueError("The model does not read whole cells: create it with cell_embedding=True.")
        is_cls = None
        if self.config.cls_state in ("fixed", "gated"):
            firsts = first_tokens(shape, attention_mask, cu_seq_lens_q, given.device)
            is_cls = torch.zeros(shape[0] * shape[1], dtype=torch.bool, device=given.device).scatter(0, firsts, True)
            is_cls = is_cls.view(shape)
        if positions == "rotary":
            head_dim = self.config.hidden_size // self.config.num_attention_heads
            kwargs["rotary"] = rotary_angles(position_ids, head_dim, self.config.rotary_base, hidden_states.dtype)
        if cu_seq_lens_q is None:
            attention_mask = create_bidirectional_mask(
                config=self.config, inputs_embeds=hidden_states, attention_mask=attention_mask
            )
        else:
            attention_mask = packed_mask(self.config, hidden_states, cu_seq_lens_q)
            kwargs.update(packing_of(cu_seq_lens_q, kwargs))
            kwargs.update(lengths_for(self.config, hidden_states, cu_seq_lens_q, self.training))
        for number, layer in enumerate(self.layers, start=1):
            kept = tokens_to_keep if number == len(self.layers) else None
            hidden_states = layer(hidden_states, attention_mask, tokens_to_keep=kept, is_cls=is_cls, **kwargs)
        if not self.layers:
            hidden_states = keep(hidden_states, tokens_to_keep)
        if self.config.pre_norm:
            hidden_states = self._apply_final_norm(hidden_states)
        return BaseModelOutput(last_hidden_state=hidden_states)


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
        if config.cell_decoder:
            self.cell_decoder = CellDecoder(config)
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
        sparse_prediction: bool | None = None,
        skip_logits: bool | None = None,
        predicted_positions: torch.LongTensor | None = None,
        expression_values: torch.Tensor | None = None,
        cell_genes: torch.LongTensor | None = None,
        cell_counts: torch.Tensor | None = None,
        measured_genes: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> GeneBertMaskedLMOutput | tuple[torch.Tensor, ...]:
        """Predict masked tokens.

        Parameters
        ----------
        input_ids, attention_mask, token_type_ids, inputs_embeds
            As in `GeneBertModel.forward`.
        expression_values, cell_genes, cell_counts, measured_genes
            As in `GeneBertModel.forward`; named, since Trainer removes the columns of a dataset that are not.
        labels : LongTensor (batch, length), optional
            Ids to predict; -100 where there is nothing to predict.
        num_items_in_batch : int or Tensor, optional
            Number of labels over the whole accumulated batch; the loss is divided by it (Trainer passes it).
        sparse_prediction : bool, optional
            With labels, compute logits at the labelled positions only. By default `config.sparse_prediction` in
            training mode, and False in evaluation mode, where logits are gathered and compared with the labels.
        skip_logits : bool, optional
            With labels and `use_liger_kernel` of Trainer, compute the loss without logits, and return none; by default
            in training mode. Without Liger it has no effect.
        predicted_positions : LongTensor (k,), optional
            All positions with a label in the flattened batch, ascending, and any without one; by default they are
            found from the labels, which waits for a GPU. (Trainer takes every argument with "label" in its name for
            labels, which each batch must have.)

        Returns
        -------
        GeneBertMaskedLMOutput
            `loss`: mean cross entropy in nats over the labelled positions, 0 if there are none, smoothed and weighted
            according to the configuration. `logits`: (batch, length, vocab_size), or (n_labelled, vocab_size) with
            labels and `sparse_prediction` (in a compiled model only if `predicted_positions` are given, or the
            vocabulary is larger than `config.intermediate_size`). `class_statistics`, `gene_logits` and
            `log_dispersion`: see the class.
        """
        labelled, sparse, fused = None, False, False
        if labels is not None:
            labelled, sparse = self._where_to_predict(labels, predicted_positions, sparse_prediction)
            fused = self._is_fused(labelled, skip_logits)
        sparse = sparse or fused
        alone = sparse and not self.config.cell_decoder and not _returns_states(self.config, kwargs)
        outputs = self.gene_bert(
            input_ids=input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            inputs_embeds=inputs_embeds,
            return_dict=True,
            expression_values=expression_values,
            cell_genes=cell_genes,
            cell_counts=cell_counts,
            measured_genes=measured_genes,
            tokens_to_keep=labelled if alone else None,
            **kwargs,
        )
        hidden_states = outputs.last_hidden_state
        gene_logits = log_dispersion = None
        if self.config.cell_decoder:
            states = pool(hidden_states, token_type_ids, attention_mask, "cls", kwargs.get("cu_seq_lens_q"))
            gene_logits, log_dispersion = self.cell_decoder(states)
        logits = loss = statistics = None
        order = (input_ids, token_type_ids, attention_mask, kwargs.get("cu_seq_lens_q"))
        if sparse:
            hidden_states = (hidden_states if alone else keep(hidden_states, labelled))[0]
        if not fused:
            logits = self._predict(hidden_states, order, labelled if sparse else None)
        if labels is not None:
            assert token_type_ids is not None  # the embeddings need them
            targets = keep(labels, labelled).flatten(), keep(token_type_ids, labelled).flatten(), self.config
            if logits is None:
                loss, statistics = self.mlm_head.fused_loss(hidden_states, *targets, num_items_in_batch)
            else:
                at_labels = logits if sparse else keep(logits, labelled).flatten(0, 1)
                loss, statistics = masked_lm_loss(at_labels, *targets, num_items_in_batch)
        return GeneBertMaskedLMOutput(
            loss=loss,
            logits=logits,
            class_statistics=statistics,
            gene_logits=gene_logits,
            log_dispersion=log_dispersion,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _where_to_predict(
        self,
        labels: torch.LongTensor,
        predicted_positions: torch.LongTensor | None,
        sparse_prediction: bool | None,
    ) -> tuple[torch.LongTensor | None, bool]:
        """Return the labelled positions, None for all, and whether logits are computed there alone."""
        if sparse_prediction is None:
            sparse_prediction = self.training and self.config.sparse_prediction
        if predicted_positions is not None:
            return predicted_positions, sparse_prediction
        # The number of labels is known only after a GPU has counted them, which breaks a compiled graph. There, with
        # a small vocabulary, logits of all positions cost little.
        if torch.compiler.is_compiling() and self.config.vocab_size <= self.config.intermediate_size:
            return None, False
        return (labels != IGNORE).flatten().nonzero().squeeze(1), sparse_prediction

    def _is_fused(self, labelled: torch.LongTensor | None, skip_logits: bool | None) -> bool:
        """Return whether Liger computes the loss, without logits; it does not take a batch without labels."""
        if self.mlm_head.fused_cross_entropy is None or labelled is None:
            return False
        return (self.training if skip_logits is None else skip_logits) and labelled.shape[0] > 0

    def _predict(self, states: torch.Tensor, order: tuple, labelled: torch.Tensor | None = None) -> torch.Tensor:
        """Compute logits of states, with the prior from the order of the genes, if the head has one."""
        logits = self.mlm_head(states)
        return self.mlm_head.rank_prior(logits, *order, labelled) if self.config.rank_prior_sizes else logits


class GeneBertForClassification(GeneBertPreTrainedModel):
    """GeneBert that assigns each cell to a class, from hidden states pooled by `config.classifier_pooling`."""

    _auto_class = "AutoModelForSequenceClassification"

    def __init__(self, config: GeneBertConfig):
        super().__init__(config)
        self.loss_type = "ForSequenceClassification"
        self.gene_bert = GeneBertModel(config)
        if config.classifier_head == "mlp":
            self.pre_classifier = PreClassifier(config.hidden_size)
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        if config.wide_head:
            self.wide_head = WideHead(config)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        expression_values: torch.Tensor | None = None,
        cell_genes: torch.LongTensor | None = None,
        cell_counts: torch.Tensor | None = None,
        measured_genes: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> SequenceClassifierOutput | tuple[torch.Tensor, ...]:
        """Classify cells.

        Parameters
        ----------
        input_ids, attention_mask, token_type_ids, inputs_embeds
            As in `GeneBertModel.forward`.
        expression_values, cell_genes, cell_counts, measured_genes
            As in `GeneBertModel.forward`; named, since Trainer removes the columns of a dataset that are not.
        labels : Tensor (batch,), optional
            Class of each cell; for multiple labels per cell and for regression, see `classification_loss`.
        num_items_in_batch : int or Tensor, optional
            As in `GeneBertForPhenotypicMLM.forward`.

        Returns
        -------
        SequenceClassifierOutput
            `loss` for `config.problem_type` (cross entropy in nats by default); `logits` (batch, num_labels).
        """
        boundaries, first = kwargs.get("cu_seq_lens_q"), None
        reads_cls = self.config.classifier_pooling == "cls"
        given = input_ids if inputs_embeds is None else inputs_embeds
        if reads_cls and given is not None and not _returns_states(self.config, kwargs):
            first = first_tokens(given.shape[:2], attention_mask, boundaries, given.device)
        outputs = self.gene_bert(
            input_ids=input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            inputs_embeds=inputs_embeds,
            return_dict=True,
            expression_values=expression_values,
            cell_genes=cell_genes,
            cell_counts=cell_counts,
            measured_genes=measured_genes,
            tokens_to_keep=first,
            **kwargs,
        )
        hidden_states = outputs.last_hidden_state
        if first is None:
            pooled = self.pool(hidden_states, token_type_ids, attention_mask, boundaries)
        else:
            pooled = hidden_states[0]
        if self.config.classifier_head == "mlp":
            pooled = nn.functional.relu(self.pre_classifier(pooled))
        logits = self.classifier(self.dropout(pooled))
        if self.config.wide_head:
            cells = self.gene_bert.read_cells(cell_genes, cell_counts, kwargs.get("cell_indptr"), measured_genes)
            wide = self.wide_head(cells, self.gene_bert.cell_embedding.statistics)
            logits = combine_readers(logits, wide, self.config)

        loss = None
        if labels is not None:
            if reads_cls and self.training and self.config.cls_state == "fixed" and not torch.compiler.is_compiling():
                logger.warning_once(
                    'The model keeps [CLS] fixed, so that its heads alone are trained: load it with cls_state="gated" '
                    "(as finetune does) to train its layers too."
                )
            loss = classification_loss(logits, labels, self.config, num_items_in_batch)
        return SequenceClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )

    def pool(
        self,
        hidden_states: torch.Tensor,
        token_type_ids: torch.LongTensor | None,
        attention_mask: torch.Tensor | None = None,
        cu_seq_lens: torch.IntTensor | None = None,
    ) -> torch.Tensor:
        """Pool the hidden states of each cell's tokens into the input of the head, Tensor (n_cells, hidden)."""
        return pool(hidden_states, token_type_ids, attention_mask, self.config.classifier_pooling, cu_seq_lens)


class GeneBertForTokenClassification(GeneBertPreTrainedModel):
    """GeneBert that assigns each gene of a cell to a class, such as dosage-sensitive or not."""

    _auto_class = "AutoModelForTokenClassification"

    def __init__(self, config: GeneBertConfig):
        super().__init__(config)
        self.loss_type = "ForTokenClassification"
        self.gene_bert = GeneBertModel(config)
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
        labels: torch.LongTensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        expression_values: torch.Tensor | None = None,
        cell_genes: torch.LongTensor | None = None,
        cell_counts: torch.Tensor | None = None,
        measured_genes: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> TokenClassifierOutput | tuple[torch.Tensor, ...]:
        """Classify genes.

        Parameters
        ----------
        input_ids, attention_mask, token_type_ids, inputs_embeds
            As in `GeneBertModel.forward`.
        expression_values, cell_genes, cell_counts, measured_genes
            As in `GeneBertModel.forward`; named, since Trainer removes the columns of a dataset that are not.
        labels : LongTensor (batch, length), optional
            Class of each token; -100 for those without one.
        num_items_in_batch : int or Tensor, optional
            As in `GeneBertForPhenotypicMLM.forward`.

        Returns
        -------
        TokenClassifierOutput
            `loss`: mean cross entropy in nats over the labelled tokens; `logits` (batch, length, num_labels).
        """
        outputs = self.gene_bert(
            input_ids=input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            inputs_embeds=inputs_embeds,
            return_dict=True,
            expression_values=expression_values,
            cell_genes=cell_genes,
            cell_counts=cell_counts,
            measured_genes=measured_genes,
            **kwargs,
        )
        logits = self.classifier(self.dropout(outputs.last_hidden_state))
        loss = None
        if labels is not None:
            loss = classification_loss(logits.flatten(0, 1), labels.flatten(), self.config, num_items_in_batch)
        return TokenClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


__all__ = [
    "GeneBertForClassification",
    "GeneBertForPhenotypicMLM",
    "GeneBertForTokenClassification",
    "GeneBertMaskedLMOutput",
    "GeneBertModel",
    "GeneBertPreTrainedModel",
    "PositionlessEmbeddings",
    "pool",
]
