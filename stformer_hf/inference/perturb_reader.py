"""A model that reads edited cells: their states, the probabilities of classes, and the states of genes."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from scipy import sparse
from transformers import AutoModel, AutoModelForSequenceClassification, PreTrainedModel

from ..batches.evaluating import length_to_read
from ..models.gene_bert.configuration_gene_bert import output_name
from ..models.gene_bert.heads import pool
from ..models.gene_bert.modeling_gene_bert import GeneBertModel
from ..models.gene_bert.tokenization_gene_bert import GeneTokenizer
from ..models.gene_bert.tokenized_cells import take
from ..models.remote_code import is_a
from ..training.cell_heads import check_finite, read_heads
from .batches import TokenBatch, check_hidden_layer, choose_pooling, is_classifier, load, make_batch, packs
from .embed import pooled_states
from .gene_shifts import unit_length

_TOKENS, _TOKENS_ON_CPU = 4096, 1024  # per batch; the caches of a CPU hold the states of few tokens
OfGenes = Callable[[np.ndarray, np.ndarray, torch.Tensor], None]


class Reader:
    """A model that reads cells: states of length 1, and probabilities of classes."""

    def __init__(
        self,
        model: str | PreTrainedModel,
        tokenizer: GeneTokenizer | None,
        hidden_layer: int,
        pooling: str | None,
        max_tokens: int | None,
        fractional: bool,
        min_coverage: float | None,
    ):
        of_cells = is_classifier(model)
        auto_class = AutoModelForSequenceClassification if of_cells else AutoModel
        self.model, self.tokenizer = load(model, tokenizer, auto_class, min_coverage)
        if self.tokenizer.neighborhood:
            raise ValueError("Models that read neighbourhoods cannot be perturbed.")
        self.heads = read_heads(self.model) if of_cells else []
        if self.heads and self.heads[0].kind != "single_label_classification":
            self.heads = []
        self.classes = [
            name if head.column is None else output_name(head.column, name)
            for head in self.heads
            for name in head.names
        ]
        self.encoder = self.model.base_model
        if not self.heads:
            self.model = self.encoder
        self.pooling = choose_pooling(pooling, self.model, self.tokenizer)
        check_hidden_layer(self.model, hidden_layer)
        self.hidden_layer, self.max_tokens, self.fractional = hidden_layer, max_tokens, fractional
        self.names: tuple[np.ndarray, np.ndarray] | None = None
        self.class_name: str | None = None
        pooled = {self.pooling, *[self.model.config.classifier_pooling] * bool(self.heads)}
        self.length = length_to_read(self.encoder, self.tokenizer, *pooled)

    def read_genes(self) -> None:
        """Read all tokens, for the states of genes; raise a ValueError if these do not depend on other genes."""
        if self.hidden_layer in (0, -self.model.config.num_hidden_layers - 1):
            raise ValueError(
                f"hidden_layer={self.hidden_layer} is before the first layer, where the state of a gene does not "
                "depend on other genes: choose another, or leave out gene_shifts."
            )
        if is_a(self.encoder, GeneBertModel) and self.encoder.adds_nothing():
            raise ValueError(
                "The layers of this model add nothing yet (a spectral start that was not trained), so the state of a "
                "gene does not depend on other genes: train the model, or leave out gene_shifts."
            )
        self.length = None

    def choose_class(self, predicted: str | None, goal: str | None, goal_key: str | None) -> None:
        """Choose the class whose probability is measured; with several label columns, one must be named."""
        names, several = self.classes, len(self.heads) > 1
        if predicted is not None and predicted not in names:
            raise ValueError(f"The model has no class {predicted!r}; its classes: {', '.join(names) or 'none'}.")
        of_goal = None if goal is None else output_name(str(goal_key), str(goal)) if several else str(goal)
        self.class_name = predicted or (of_goal if of_goal in names else None)
        if several and self.class_name is None:
            columns = ", ".join(str(head.column) for head in self.heads)
            raise ValueError(
                f"The model predicts a class in each of several label columns ({columns}): name the one whose "
                f"probability is measured, such as predicted={names[0]!r}."
            )

    def __call__(
        self, counts: sparse.csr_matrix, of_genes: OfGenes | None = None
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """Return the states of cells, float32 (n, d) of length 1, and the probabilities (n, n_classes), or None.

        The states of genes are given to `of_genes`, batch by batch: cells and genes, int64 arrays (k,), and states,
        Tensor (k, d).
        """
        tokens = self.tokenizer.encode_cells(
            counts, genes=self.names, fractional=self.fractional, for_inference=True, max_length=self.length
        )
        lengths = np.diff(tokens.indptr)
        of_cells, of_classes = [], []
        order = np.argsort(-lengths, kind="stable")
        packed = packs(self.model)
        on_cpu = self.model.device.type == "cpu"
        most = self.max_tokens or (_TOKENS_ON_CPU if on_cpu else _TOKENS)
        for cells in _cut(order, lengths, most, packed):
            batch = make_batch(take(tokens, cells), cells, self.tokenizer, packed).to(self.model.device)
            some, probabilities = self._forward(batch, of_genes)
            of_cells.append(some)
            if probabilities is not None:
                of_classes.append(probabilities)
        back = np.argsort(order)
        states = np.concatenate(of_cells)[back]
        check_finite(states, np.ones(len(states), bool))
        return states, np.concatenate(of_classes)[back] if of_classes else None

    def _forward(self, batch: TokenBatch, of_genes: OfGenes | None) -> tuple[np.ndarray, np.ndarray | None]:
        inputs, types = batch.inputs, batch.types
        if not self.heads and of_genes is None:
            pooled = pooled_states(self.model, inputs, types, hidden_layer=self.hidden_layer, pooling=self.pooling)
            return unit_length(pooled).cpu().numpy(), None
        outputs = self.model(**inputs, output_hidden_states=True)
        hidden, boundaries = outputs.hidden_states[self.hidden_layer], inputs.get("cu_seq_lens_q")
        pooled = pool(hidden, types, inputs.get("attention_mask"), self.pooling, boundaries)
        states = unit_length(pooled).cpu().numpy()
        if of_genes is not None:
            is_gene = batch.genes >= 0
            cells = np.repeat(batch.rows, batch.n_genes)
            of_genes(cells, batch.genes[is_gene], hidden[torch.from_numpy(is_gene).to(hidden.device)])
        if not self.heads:
            return states, None
        return states, torch.cat([head.predictions(outputs.logits) for head in self.heads], dim=1).cpu().numpy()


def _cut(order: np.ndarray, lengths: np.ndarray, max_tokens: int, packed: bool) -> Iterator[np.ndarray]:
    """Cut cells, the longest first, into batches within a number of tokens; a longer cell is a batch of its own."""
    first = 0
    while first < len(order):
        of = lengths[order[first:]]
        cost = np.cumsum(of) if packed else np.arange(1, len(of) + 1) * of[0]
        n = max(int(np.searchsorted(cost, max_tokens, side="right")), 1)
        yield order[first : first + n]
        first += n
