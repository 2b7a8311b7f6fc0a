"""Heads of the GeneBert models: the MLM head, pooling of cells, and the losses of all heads."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN

from .configuration_gene_bert import IGNORE, GeneBertConfig, output_name
from .encoder_layers import make_norm
from .packed_attention import segments_of
from .rank_prior import RankPrior


def linear_filled_up(states: torch.Tensor, linear: nn.Module) -> torch.Tensor:
    """Apply a linear layer, which in half precision on a GPU is filled up to a multiple of 8 outputs.

    cuBLAS has no kernel of a recent GPU for other numbers. The result (…, n_outputs) is without these columns. A layer
    that is not plain, or whose weight is elsewhere (offloaded, or in parts), is applied as it is.
    """
    if not _is_plain(linear):
        return linear(states)
    weight, n, missing = linear.weight, linear.out_features, -linear.out_features % 8
    dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else weight.dtype
    is_here = weight.is_cuda and weight.device == states.device and weight.shape[0] == n
    if not missing or not is_here or dtype not in (torch.bfloat16, torch.float16):
        return linear(states)
    return _linear_with_columns(states, weight, linear.bias, missing)[..., :n]


def _is_plain(linear: nn.Module) -> bool:
    """Return whether a layer computes its weight and bias alone: no adapter, quantization or pruning, and no hooks."""
    if type(linear) is not nn.Linear or "forward" in vars(linear):  # accelerate's hooks are in `forward`
        return False
    hooks = (linear._forward_hooks, linear._forward_pre_hooks, linear._backward_hooks, linear._backward_pre_hooks)
    return not any(hooks) and all(type(of) is nn.Parameter for of in (linear.weight, linear.bias))


def _linear_with_columns(states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, n: int) -> torch.Tensor:
    """Apply a linear layer with n more outputs, which are 0."""
    return nn.functional.linear(states, nn.functional.pad(weight, (0, 0, 0, n)), nn.functional.pad(bias, (0, n)))


class GeneBertMLMHead(nn.Module):
    """Head for masked tokens: Linear, activation, LayerNorm, and a Linear layer to the vocabulary.

    `fused_cross_entropy`, which Trainer's `use_liger_kernel` sets, computes the last layer and the cross entropy at
    once: from states (k, hidden), weight, labels (k,) and bias, the cross entropies in nats, float32 (k,), and the
    predictions (k,).
    """

    fused_cross_entropy: Callable[..., tuple[torch.Tensor, torch.Tensor]] | None = None

    def __init__(self, config: GeneBertConfig):
        super().__init__()
        self.transform = nn.Linear(config.hidden_size, config.hidden_size)
        self.activation = ACT2FN[config.hidden_act]
        self.layer_norm = make_norm(config)
        self.decoder = nn.Linear(config.hidden_size, config.vocab_size)
        if config.rank_prior_sizes:
            self.rank_prior = RankPrior(config)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Return logits (…, vocab_size) of hidden states (…, hidden)."""
        states = self.before_decoder(hidden_states)
        return linear_filled_up(states, self.decoder) if self.training else self.decoder(states)

    def before_decoder(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Return the input of the last layer (…, hidden)."""
        return self.layer_norm(self.activation(self.transform(hidden_states)))

    def fused_loss(
        self,
        hidden_states: torch.Tensor,
        labels: torch.LongTensor,
        token_types: torch.LongTensor,
        config: GeneBertConfig,
        num_items_in_batch: torch.Tensor | int | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return what `masked_lm_loss` does, for hidden states (k, hidden) in place of their logits."""
        assert self.fused_cross_entropy is not None
        states, decoder, labels = self.before_decoder(hidden_states), self.decoder, labels.to(hidden_states.device)
        nll, predicted = self.fused_cross_entropy(states, decoder.weight, labels, decoder.bias)
        return weighted_loss(nll, nll, predicted, labels, token_types, config, num_items_in_batch)


class PreClassifier(nn.Module):
    """Linear layer (hidden, hidden) before the classifier, a part of the head.

    It is not an `nn.Linear`, so that PEFT's `target_modules="all-linear"` skips it, and `modules_to_save`, which finds
    it by the end of its name, trains it in full with the classifier: a LoRA on a random layer learns nothing.
    """

    def __init__(self, hidden_size: int):
        super().__init__()
        layer = nn.Linear(hidden_size, hidden_size)
        self.weight, self.bias = layer.weight, layer.bias

    def forward(self, pooled: torch.Tensor) -> torch.Tensor:
        """Transform pooled states (n, hidden)."""
        return nn.functional.linear(pooled, self.weight, self.bias)


def masked_lm_loss(
    logits: torch.Tensor,
    labels: torch.LongTensor,
    token_types: torch.LongTensor,
    config: GeneBertConfig,
    num_items_in_batch: torch.Tensor | int | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the cross entropy of masked tokens, and statistics per class of tokens.

    Parameters
    ----------
    logits : Tensor (k, vocab_size)
        Logits of all positions, or of the labelled ones.
    labels, token_types : LongTensor (k,)
        Labels and types of the same positions; labels are -100 where there is nothing to predict.
    config : GeneBertConfig
        `label_smoothing`, `token_classes` and `loss_weights` are read.
    num_items_in_batch : int or Tensor, optional
        Divisor of the sum; the number of labels by default.

    Returns
    -------
    loss : Tensor ()
        Weighted sum of the smoothed cross entropies, in nats, divided by `num_items_in_batch`; 0 without labels.
    statistics : Tensor (n_classes, 3)
        For each class of tokens: sum of the plain cross entropies in nats, number of correct predictions, number of
        labels.
    """
    logits = logits.float()
    labels = labels.to(logits.device)
    nll = nn.functional.cross_entropy(logits, labels, reduction="none", ignore_index=IGNORE)
    losses, smoothing = nll, config.label_smoothing
    if smoothing:
        spread = logits.logsumexp(-1) - logits.mean(-1)
        losses = (1 - smoothing) * nll + smoothing * (labels != IGNORE) * spread
    return weighted_loss(losses, nll, logits.argmax(-1), labels, token_types, config, num_items_in_batch)


def weighted_loss(
    losses: torch.Tensor,
    nll: torch.Tensor,
    predicted: torch.Tensor,
    labels: torch.LongTensor,
    token_types: torch.LongTensor,
    config: GeneBertConfig,
    num_items_in_batch: torch.Tensor | int | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the loss and the statistics of `masked_lm_loss`.

    They are computed from the smoothed and the plain cross entropy, the prediction and the label of each position, and
    its token type, (k,).
    """
    labelled = (labels != IGNORE).float()
    names = config.token_classes or ["genes"]
    # Categories have the types 1, 2, …; all types after them are genes.
    classes = token_types.to(losses.device).clamp(1, len(names)) - 1
    if config.loss_weights:
        # Filled on the device: copying a list to a GPU waits for it.
        weights = torch.stack([losses.new_full((), config.loss_weights.get(name, 1.0)) for name in names])
        losses = losses * weights[classes]
    if num_items_in_batch is None:
        num_items_in_batch = labelled.sum()
    # A batch of cells without counts has no label, and its loss is 0, not NaN.
    loss = losses.sum() / torch.as_tensor(num_items_in_batch, device=losses.device).clamp(min=1)
    with torch.no_grad():
        columns = torch.stack([nll.detach(), (predicted == labels).float(), labelled], dim=1)
        statistics = columns.new_zeros(len(names), 3).index_add(0, classes, columns)
    return loss, statistics


def problem_of(config: GeneBertConfig) -> str:
    """Return the problem type of a head with one row of outputs per cell: `config.problem_type`, or its default.

    By default, a head with a single output is a regression, and any other a single-label classification.
    """
    return config.problem_type or ("regression" if config.num_labels == 1 else "single_label_classification")


class LabelColumn(NamedTuple):
    """One of the label columns of a head of classes, each of which has a softmax of its own."""

    name: str | None  # None if the head has one column
    outputs: slice
    reader_weights: tuple[float, float]  # of the head and of the wide head
    temperature: float


def label_columns_of(config: PreTrainedConfig) -> list[LabelColumn]:
    """Return the label columns of a head; a single one with all outputs if `config.label_columns` is not set."""
    columns = getattr(config, "label_columns", None)
    weights, temperature = getattr(config, "reader_weights", None), getattr(config, "temperature", 1.0)
    weights = weights or [1.0, 1.0] * len(columns or [None])
    if columns is None:
        return [LabelColumn(None, slice(None), (weights[0], weights[1]), temperature)]
    found, first = [], 0
    for i, (name, n_classes) in enumerate(columns.items()):
        of_head, of_wide = weights[2 * i : 2 * i + 2]
        own = temperature[i] if isinstance(temperature, list) else temperature
        found.append(LabelColumn(name, slice(first, first + n_classes), (of_head, of_wide), own))
        first += n_classes
    return found


def output_names(config: PreTrainedConfig, column: LabelColumn) -> list[str]:
    """Return the names of the outputs of a column: of its classes, without the name of the column."""
    names = [str(config.id2label[i]) for i in range(config.num_labels)[column.outputs]]
    return names if column.name is None else [name.removeprefix(output_name(column.name, "")) for name in names]


def fields_of_columns(classes: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """Return `label_columns`, `id2label` and `label2id` of a configuration for the classes of each label column."""
    wrong = [column for column in classes if "/" in column]
    if wrong:
        raise ValueError(f'Rename the label column {wrong[0]!r}: files of predictions cannot hold names with "/".')
    names = [output_name(column, name) for column in sorted(classes) for name in classes[column]]
    return {
        "label_columns": {column: len(classes[column]) for column in sorted(classes)},
        "id2label": dict(enumerate(names)),
        "label2id": {name: i for i, name in enumerate(names)},
    }


def classification_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    config: GeneBertConfig,
    num_items_in_batch: torch.Tensor | int | None = None,
) -> torch.Tensor:
    """Compute the loss of a classification or regression head, according to `config.problem_type`.

    Parameters
    ----------
    logits : Tensor (n, num_labels)
    labels : Tensor
        Classes, int64 (n,), or (n, n_columns) with `config.label_columns`; 0 or 1 for multiple labels per cell, float
        (n, num_labels); numbers for regression, float (n,) or (n, num_labels). -100 where there is none.
    config : GeneBertConfig
        `problem_type` (derived from the labels and num_labels if it is None), `label_columns`, `class_weights` and
        `classifier_label_smoothing` are read.
    num_items_in_batch : int or Tensor, optional
        Divisor of the sum; the number of labels by default.

    Returns
    -------
    Tensor ()
        Cross entropy or binary cross entropy, in nats, or squared error: the mean over labels. Class weights scale the
        labels' losses; the mean is over labels, not weights, so that it does not depend on how batches are split.

    Raises
    ------
    ValueError
        The labels do not match the problem type.
    """
    labels = labels.to(logits.device)
    problem = problem_of(config)
    if config.problem_type is None and config.num_labels > 1 and labels.is_floating_point():
        problem = "multi_label_classification"
    if problem == "single_label_classification" and labels.is_floating_point():
        raise ValueError(f"Classes must be integers, got labels of {labels.dtype}; see config.problem_type.")
    if problem != "single_label_classification" and labels.numel() != logits.numel():
        raise ValueError(
            f"Labels of shape {tuple(labels.shape)} do not fit a {problem} head with {config.num_labels} outputs per "
            "cell; see config.problem_type and config.num_labels."
        )
    if config.label_columns and labels.shape != (logits.shape[0], len(config.label_columns)):
        raise ValueError(
            f"Labels of shape {tuple(labels.shape)} do not fit a head of {len(config.label_columns)} label columns "
            f"({', '.join(config.label_columns)}): pass one class per cell and column, -100 where there is none."
        )
    logits = logits.float()
    weights = None if config.class_weights is None else logits.new_tensor(config.class_weights)
    if problem == "single_label_classification":
        n_labels = (labels != IGNORE).sum()
        columns = label_columns_of(config)
        total = sum(
            nn.functional.cross_entropy(
                logits[:, column.outputs],
                of_column,
                weight=None if weights is None else weights[column.outputs],
                reduction="sum",
                ignore_index=IGNORE,
                label_smoothing=config.classifier_label_smoothing,
            )
            for column, of_column in zip(columns, labels.reshape(logits.shape[0], -1).unbind(1), strict=True)
        )
    else:
        labels = labels.float().view_as(logits)
        known = labels != IGNORE
        n_labels = known.sum()
        if problem == "regression":
            losses = nn.functional.mse_loss(logits, labels, reduction="none")
        else:
            losses = nn.functional.binary_cross_entropy_with_logits(logits, labels, weight=weights, reduction="none")
        total = losses.where(known, 0.0).sum()  # no index, whose size a GPU would have to count first
    if num_items_in_batch is not None:
        n_labels = torch.as_tensor(num_items_in_batch, device=logits.device)
    return total / n_labels.clamp(min=1)


def combine_readers(logits: torch.Tensor, wide: torch.Tensor, config: GeneBertConfig) -> torch.Tensor:
    """Combine the outputs of the head and the wide head for each cell, (n, num_labels); see `config.wide_head`.

    Returns float32 logits of the same shape; for classes, weighted log probabilities.
    """
    problem, found = problem_of(config), []
    for column in label_columns_of(config):
        of_head, of_wide = column.reader_weights
        head, genes = logits[:, column.outputs].float(), wide[:, column.outputs].float()
        if problem == "regression":
            found.append((of_head * head + of_wide * genes) / (of_head + of_wide))
            continue
        if problem != "multi_label_classification":
            head, genes = head.log_softmax(-1), genes.log_softmax(-1)
        found.append((of_head * head + of_wide * genes) / column.temperature)
    return torch.cat(found, dim=-1)


def default_pooling(config: PreTrainedConfig) -> str:
    """Return the default pooling of a model: "cls" or "mean", see `GeneBertConfig.pooling`."""
    if getattr(config, "pooling", None):
        return config.pooling
    if any("SequenceClassification" in name or "ForClassification" in name for name in config.architectures or []):
        return getattr(config, "classifier_pooling", "cls")
    return "cls" if getattr(config, "cell_embedding", False) else "mean"


def pool(
    hidden: torch.Tensor,
    token_type_ids: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
    pooling: str,
    cu_seq_lens: torch.Tensor | None = None,
) -> torch.Tensor:
    """Pool the hidden states of a cell's tokens into one vector.

    Parameters
    ----------
    hidden : Tensor (batch, length, hidden_size)
        Hidden states.
    token_type_ids : Tensor (batch, length)
        Types of the tokens; special tokens and padding have type 0.
    attention_mask : Tensor (batch, length), optional
        1 for tokens, 0 for padding; `[CLS]` is the first token.
    pooling : {"cls", "mean"}
        The state of `[CLS]`, or the mean over all tokens but the special ones (0 for a cell without others).
    cu_seq_lens : int32 Tensor (n_cells + 1,), optional
        Boundaries of the cells of a packed batch.

    Returns
    -------
    Tensor (batch or n_cells, hidden_size)

    Raises
    ------
    ValueError
        The pooling is unknown, or "mean" without token types.
    """
    if pooling == "cls":
        if cu_seq_lens is not None:
            return hidden[0, cu_seq_lens[:-1].clamp(max=hidden.shape[1] - 1)]  # a last segment may be empty
        if attention_mask is None:
            return hidden[:, 0]
        first = attention_mask.to(hidden.device).long().argmax(1)
        # No indexing by row numbers: an exported model would keep those of the batch it was exported with.
        return hidden.gather(1, first[:, None, None].expand(-1, 1, hidden.shape[-1])).squeeze(1)
    if pooling != "mean":
        raise ValueError(f'pooling must be "cls" or "mean", got {pooling!r}.')
    if token_type_ids is None:
        raise ValueError('pooling="mean" needs token_type_ids, to separate genes from special tokens.')
    content = token_type_ids.to(hidden.device) > 0
    if attention_mask is not None:
        content = content & attention_mask.to(hidden.device).bool()
    # In float32: a sum of ones in bfloat16 stops at 256.
    values, content = hidden.float() * content.unsqueeze(-1), content.float().unsqueeze(-1)
    if cu_seq_lens is None:
        total, n_tokens = values.sum(1), content.sum(1)
    else:
        cell = segments_of(cu_seq_lens.to(hidden.device), hidden.shape[1])[0]
        n_cells = cu_seq_lens.shape[0] - 1
        total = values.new_zeros(n_cells, values.shape[-1]).index_add(0, cell, values[0])
        n_tokens = values.new_zeros(n_cells, 1).index_add(0, cell, content[0])
    return (total / n_tokens.clamp(min=1)).to(hidden.dtype)
