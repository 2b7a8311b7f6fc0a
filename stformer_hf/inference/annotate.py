"""Write predictions for cells into `obs`."""

from __future__ import annotations

import torch
from anndata import AnnData
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from .. import __version__
from ..models.gene_bert.cell_tables import find_table
from ..models.gene_bert.tokenization_gene_bert import GeneTokenizer
from ..training.cell_heads import read_head
from ..training.loading import is_model, name_of, unwrap
from .batches import check_cells, load, run


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
    min_coverage: float | None = None,
) -> None:
    """Write the predictions of a classifier or regression model for every cell into `adata.obs`.

    Parameters
    ----------
    adata : AnnData, MuData or SpatialData
        Cells with raw counts in X, raw or a layer. Labels are written to the gene modality of a MuData, or to the
        table of a SpatialData.
    model : str or PreTrainedModel
        Checkpoint of a classifier, or folder of a PEFT adapter, which is loaded with its base; or a classifier,
        possibly wrapped by PEFT or torch. Its configuration defines the head (`problem_type`, `id2label`).
    tokenizer : GeneTokenizer, optional
        The checkpoint's own by default.
    key_added : str, default: "stformer"
        Prefix of the columns. For one class per cell, `obs[key_added + "_label"]` is the most probable one
        (categorical; missing for a cell without a known gene), and `obs[key_added + "_score"]` its probability
        (float32; NaN for such a cell). For multiple labels per cell, `obs[key_added + "_" + label]` is the probability
        of each. For numbers, `obs[key_added + "_" + name]` is the number (`_value` if the model does not name it). The
        names of the columns and the kind of head are written to `uns[key_added + "_annotation"]`.
    layer, fractional, batch_size, device, min_coverage
        As for `embed`.

    Raises
    ------
    ValueError
        The model is not a classifier of cells, or its head was not trained; there are no counts, or too few of the
        model's genes; the tokenizer does not fit; outputs are not finite.
    FileNotFoundError
        The checkpoint does not exist.
    TypeError
        `adata` does not hold cells, or `model` is not a model.
    """
    check_cells(adata)
    if is_model(model):
        read_head(unwrap(model))  # before the cells are read
    name = name_of(model)
    classifier, tokenizer = load(model, tokenizer, AutoModelForSequenceClassification, min_coverage)
    head = read_head(classifier)

    def forward(batch: dict[str, torch.Tensor], types: torch.Tensor) -> torch.Tensor:
        return head.predictions(classifier(**batch).logits)

    predictions, n_genes, _ = run(
        adata,
        classifier,
        tokenizer,
        forward,
        layer=layer,
        fractional=fractional,
        batch_size=batch_size,
        device=device,
        desc="annotate",
        with_phenotypes=True,  # as in training
    )
    table = find_table(adata, layer).table
    columns = head.columns(predictions, n_genes > 0, key_added)
    for column, values in columns.items():
        table.obs[column] = values
    table.uns[f"{key_added}_annotation"] = {
        "model": name,
        "problem_type": head.kind,
        "columns": list(columns),
        "version": __version__,
        "vocabulary_fingerprint": tokenizer.fingerprint,
    }


__all__ = ["annotate"]
