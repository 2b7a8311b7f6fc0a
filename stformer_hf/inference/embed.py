"""Embeddings of cells into `obsm`."""

from __future__ import annotations

import torch
from anndata import AnnData
from transformers import AutoModel, PreTrainedConfig, PreTrainedModel

from .. import __version__
from ..models.gene_bert.cell_tables import find_table
from ..models.gene_bert.heads import pool
from ..models.gene_bert.tokenization_gene_bert import GeneTokenizer
from ..training.loading import name_of
from .batches import check_cells, load, run


def embed(
    adata: AnnData,
    model: str | PreTrainedModel,
    *,
    tokenizer: GeneTokenizer | None = None,
    key_added: str = "X_stformer",
    hidden_layer: int = -1,
    pooling: str | None = None,
    with_phenotypes: bool = False,
    layer: str | None = None,
    fractional: bool = False,
    batch_size: int = 64,
    device: str | None = None,
    min_coverage: float | None = None,
) -> None:
    """Write an embedding of every cell into `adata.obsm[key_added]`.

    Parameters
    ----------
    adata : AnnData, MuData or SpatialData
        Cells with raw counts in X, raw or a layer. Of a MuData the modality of genes gets the embedding, of a
        SpatialData the table.
    model : str or PreTrainedModel
        A checkpoint (its head, if any, is not used) or an adapter folder of PEFT, which is loaded with its base; or a
        model, which PEFT or torch may have wrapped.
    tokenizer : GeneTokenizer, optional
        The checkpoint's own by default.
    key_added : str, default: "X_stformer"
        Where in `obsm` the embedding goes, float32 (n_obs, hidden size); the settings go to `uns["stformer"]`.
    hidden_layer : int, default: -1
        Which hidden state: 0 is the embedding layer, -1 the last layer.
    pooling : {"cls", "mean"}, optional
        The hidden state of `[CLS]`, or the mean over all tokens but the special ones. By default what the
        checkpoint's training made useful, see `GeneBertConfig.pooling`: never a `[CLS]` that no loss has trained.
    with_phenotypes : bool, default: False
        Whether a model with phenotype tokens sees those of the cells. By default they are masked, so that an embedding
        depends on the counts alone: a label that the model was shown would be found in it.
    layer : str, optional
        Where the counts are: X, raw or a layer. Found by itself by default. In a MuData or SpatialData also the
        modality or table, as `prot` or `prot:counts`.
    fractional : bool, default: False
        Whether counts may be fractions, as estimates are (alevin, RSEM, SoupX, CellBender).
    batch_size : int, default: 64
        Cells a batch.
    device : str, optional
        cuda where there is one, else cpu. A model object is where it was, and in the mode that it was in, afterwards.
    min_coverage : float, optional
        In place of the tokenizer's own: the least share of the model's genes, weighted as in `GeneTokenizer`, that the
        cells must have.

    Raises
    ------
    ValueError
        No counts; too few of the model's genes; a tokenizer that does not fit; a wrong setting; weights that the
        checkpoint does not hold; embeddings that are not finite.
    FileNotFoundError
        No such checkpoint.
    TypeError
        Something that is not cells, or no model.
    """
    if pooling not in (None, "cls", "mean"):
        raise ValueError(f'pooling is "cls" or "mean", got {pooling!r}.')
    check_cells(adata)
    name = name_of(model)
    encoder, tokenizer = load(model, tokenizer, AutoModel, min_coverage)
    pooling = pooling or default_pooling(encoder.config)
    if pooling == "cls" and not tokenizer.add_cls:
        raise ValueError('The tokenizer begins cells with no [CLS]: use pooling="mean".')
    encoder = getattr(encoder, encoder.base_model_prefix, encoder)
    n_layers = encoder.config.num_hidden_layers
    if not -n_layers - 1 <= hidden_layer <= n_layers:
        raise ValueError(
            f"hidden_layer {hidden_layer} of a model with {n_layers} layers: give 0 to {n_layers}, or -1."
        )

    def forward(batch: dict[str, torch.Tensor], types: torch.Tensor) -> torch.Tensor:
        hidden = encoder(**batch, output_hidden_states=True).hidden_states[hidden_layer]
        return pool(hidden, types, batch["attention_mask"], pooling)

    embedding, _, source = run(
        adata,
        encoder,
        tokenizer,
        forward,
        layer=layer,
        fractional=fractional,
        batch_size=batch_size,
        device=device,
        desc="embed",
        with_phenotypes=with_phenotypes,
    )
    table = find_table(adata, layer).table
    table.obsm[key_added] = embedding
    table.uns["stformer"] = {
        "model": str(name),
        "layer": hidden_layer,
        "pooling": pooling,
        "with_phenotypes": with_phenotypes,
        "version": __version__,
        "counts_in": source.counts_in,
        "vocabulary_fingerprint": tokenizer.fingerprint,
    }


def default_pooling(config: PreTrainedConfig) -> str:
    """Return what a model is embedded by: "cls" or "mean", see `GeneBertConfig.pooling`."""
    if getattr(config, "pooling", None):
        return config.pooling
    if any("SequenceClassification" in name or "ForClassification" in name for name in config.architectures or []):
        return getattr(config, "classifier_pooling", "cls")
    return "cls" if getattr(config, "cell_embedding", False) else "mean"


__all__ = ["default_pooling", "embed"]
