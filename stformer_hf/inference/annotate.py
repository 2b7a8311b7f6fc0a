"""Labels of cells into `obs`."""

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
    """Write what a classifier or regression says of every cell into `adata.obs`.

    Parameters
    ----------
    adata : AnnData, MuData or SpatialData
        Cells with raw counts in X, raw or a layer. Of a MuData the modality of genes gets the labels, of a
        SpatialData the table.
    model : str or PreTrainedModel
        A checkpoint of a classifier, or an adapter folder of PEFT, which is loaded with its base; or a classifier,
        which PEFT or torch may have wrapped. What its head is, the configuration says (`problem_type`, `id2label`).
    tokenizer : GeneTokenizer, optional
        The checkpoint's own by default.
    key_added : str, default: "stformer"
        Of one class per cell: `obs[key_added + "_label"]` is the most probable one (categorical; missing for a cell
        without a known gene), and `obs[key_added + "_score"]` its probability (float32; NaN there). Of several labels
        per cell: `obs[key_added + "_" + label]`, the probability of each. Of numbers: `obs[key_added + "_" + name]`,
        the number (`_value` where the model does not name it). The names of the columns and the kind of head go to
        `uns[key_added + "_annotation"]`.
    layer, fractional, batch_size, device, min_coverage
        As for `embed`.

    Raises
    ------
    ValueError
        The model is no classifier of cells, or its head was not trained; no counts; too few of the model's genes; a
        tokenizer that does not fit; outputs that are not finite.
    FileNotFoundError
        No such checkpoint.
    TypeError
        Something that is not cells, or no model.
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
        with_phenotypes=True,  # those that it was trained with
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
