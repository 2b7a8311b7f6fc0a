"""Labels of cells into `obs`."""

from __future__ import annotations

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from ..models.gene_bert.cell_tables import find_table
from ..models.gene_bert.tokenization_gene_bert import GeneTokenizer
from .batches import load, run


def annotate(
    adata: AnnData,
    model: str | PreTrainedModel,
    *,
    tokenizer: GeneTokenizer | None = None,
    key_added: str = "stformer",
    layer: str | None = None,
    fractional: bool = False,
    batch_size: int = 64,
    device: str | None = None,
) -> None:
    """Write the most probable class of every cell into `adata.obs`.

    Parameters
    ----------
    adata : AnnData, MuData or SpatialData
        Cells with raw counts in X, raw or a layer. Of a MuData the modality of genes gets the labels, of a
        SpatialData the table.
    model : str or PreTrainedModel
        A checkpoint of a classifier, or a classifier.
    tokenizer : GeneTokenizer, optional
        The checkpoint's own by default.
    key_added : str, default: "stformer"
        `obs[key_added + "_label"]` is the class (categorical; missing for a cell without a known gene), and
        `obs[key_added + "_score"]` its probability (float32; NaN there). Of several labels per cell, or numbers:
        `obs[key_added + "_" + label]`, the probability of each label, or the number.
    layer, fractional, batch_size, device
        As for `embed`.

    Raises
    ------
    ValueError
        The checkpoint is no classifier; no counts; too few known genes; a tokenizer that does not fit.
    """
    if not isinstance(model, PreTrainedModel):
        _check_is_classifier(str(model))
    classifier, tokenizer = load(model, tokenizer, AutoModelForSequenceClassification)

    problem = classifier.config.problem_type
    if problem is None and classifier.config.num_labels == 1:
        problem = "regression"

    def forward(batch: dict[str, torch.Tensor], types: torch.Tensor) -> torch.Tensor:
        logits = classifier(**batch).logits.float()
        if problem == "regression":
            return logits
        return logits.sigmoid() if problem == "multi_label_classification" else logits.softmax(-1)

    probabilities, n_genes, _ = run(
        adata,
        classifier,
        tokenizer,
        forward,
        layer=layer,
        fractional=fractional,
        batch_size=batch_size,
        device=device,
        desc="annotate",
        with_phenotypes=True,  # those that it was trained with
    )
    table = find_table(adata, layer).table
    if problem in ("regression", "multi_label_classification"):
        for i in range(classifier.config.num_labels):
            values = np.where(n_genes > 0, probabilities[:, i], np.nan)
            table.obs[f"{key_added}_{classifier.config.id2label[i]}"] = values.astype(np.float32)
        return
    names = [classifier.config.id2label[i] for i in range(classifier.config.num_labels)]
    codes = np.where(n_genes > 0, probabilities.argmax(1), -1)
    scores = np.where(n_genes > 0, probabilities.max(1), np.nan).astype(np.float32)
    table.obs[f"{key_added}_label"] = pd.Categorical.from_codes(codes, names)
    table.obs[f"{key_added}_score"] = scores


def _check_is_classifier(model: str) -> None:
    from transformers import AutoConfig

    architectures = AutoConfig.from_pretrained(model).architectures or []
    if not any("Classification" in name for name in architectures):
        raise ValueError(
            f"{model} holds {', '.join(architectures) or 'no model'}, not a classifier; make one with "
            "stformer-hf finetune, or embed the cells with stformer-hf embed."
        )


__all__ = ["annotate"]
