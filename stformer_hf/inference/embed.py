"""Write embeddings of cells into `obsm`."""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any

import numpy as np
import torch
from anndata import AnnData
from transformers import AutoModel, PreTrainedModel

from .. import __version__
from ..batches.evaluating import length_to_read
from ..models.gene_bert.encoder_layers import first_tokens
from ..models.gene_bert.heads import pool
from ..models.gene_bert.tokenization_gene_bert import GeneTokenizer
from ..store.cell_store import CellStore
from ..training.loading import name_of
from .batches import check_hidden_layer, choose_pooling, load, run, table_of


def embed(
    adata: AnnData | CellStore,
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
    dtype: str | None = None,
    min_coverage: float | None = None,
    distributed: bool = False,
    workers: int = 1,
    engine: str = "local",
) -> AnnData | None:
    """Write an embedding of every cell into `adata.obsm[key_added]`.

    Parameters
    ----------
    adata : AnnData, MuData, SpatialData or CellStore
        Cells with raw counts in X, raw or a layer. The embedding is written to the gene modality of a MuData, or to
        the table of a SpatialData. A backed AnnData and a store are read in blocks.
    model : str or PreTrainedModel
        Checkpoint (its head, if any, is not used), or folder of a PEFT adapter, which is loaded with its base; or a
        model, possibly wrapped by PEFT or torch.
    tokenizer : GeneTokenizer, optional
        The checkpoint's own by default.
    key_added : str, default: "X_stformer"
        Key of `obsm` for the embedding, float32 (n_obs, hidden size); the settings are written to `uns["stformer"]`.
    hidden_layer : int, default: -1
        Number of the hidden state: 0 is the embedding layer, -1 the last layer.
    pooling : {"cls", "mean"}, optional
        The hidden state of `[CLS]`, or the mean over all tokens except the special ones. By default it depends on how
        the checkpoint was trained, see `GeneBertConfig.pooling`: an untrained `[CLS]` is never used.
    with_phenotypes : bool, default: False
        Let a model with phenotype tokens read those of the cells. By default they are masked, so that an embedding
        depends only on the counts: a label that the model reads could be recovered from it.
    layer : str, optional
        Location of the counts: X, raw or a layer; by default it is detected. For a MuData or SpatialData also the
        modality or table, such as `prot` or `prot:counts`.
    fractional : bool, default: False
        Accept fractional counts, such as estimates (alevin, RSEM, SoupX, CellBender).
    batch_size : int, default: 64
        Cells per batch.
    device : str, optional
        Device to run on; by default cuda if available, else cpu. The device and mode of a model object are restored
        afterwards.
    dtype : {"float32", "bfloat16", "float16"}, optional
        Precision of the computation (autocast); the result is float32. By default that of the weights.
    min_coverage : float, optional
        Minimum share of the model's genes, weighted as in `GeneTokenizer`, that the cells must have; by default the
        tokenizer's own.
    distributed : bool, default: False
        Divide the cells among the processes of `accelerate launch`. All of them must call the function, and each gets
        all results.
    workers : int, default: 1
        For a store: number of processes, each with a copy of the model. As always with multiprocessing, the main part
        of a script must be under `if __name__ == "__main__":`.
    engine : {"local", "ray"}, default: "local"
        Where these processes run; as in `CellStore.build`. With Ray and `device="cuda"`, each has one GPU.

    Returns
    -------
    AnnData or None
        For a store an AnnData with its obs and genes, without counts, that holds the embedding; otherwise None.

    Raises
    ------
    ValueError
        There are no counts, or too few of the model's genes; the tokenizer does not fit; a setting is invalid; the
        checkpoint lacks weights; embeddings are not finite.
    FileNotFoundError
        The checkpoint does not exist.
    TypeError
        `adata` does not hold cells, or `model` is not a model.
    """
    return embed_and_count(
        adata,
        model,
        tokenizer,
        key_added,
        hidden_layer,
        pooling,
        with_phenotypes,
        min_coverage,
        layer=layer,
        fractional=fractional,
        batch_size=batch_size,
        device=device,
        dtype=dtype,
        distributed=distributed,
        workers=workers,
        engine=engine,
    )[0]


def embed_and_count(
    adata: AnnData | CellStore,
    model: str | PreTrainedModel,
    tokenizer: GeneTokenizer | None = None,
    key_added: str = "X_stformer",
    hidden_layer: int = -1,
    pooling: str | None = None,
    with_phenotypes: bool = False,
    min_coverage: float | None = None,
    *,
    layer: str | None = None,
    **settings: Any,
) -> tuple[AnnData | None, np.ndarray]:
    """Do as `embed`, and return also the number of genes of each cell among its tokens: int64 array (n_cells,)."""
    table = table_of(adata, layer)
    name = name_of(model)
    encoder, tokenizer = load(model, tokenizer, AutoModel, min_coverage)
    pooling = choose_pooling(pooling, encoder, tokenizer)
    encoder = encoder.base_model
    check_hidden_layer(encoder, hidden_layer)
    embedding, n_genes, source = run(
        adata,
        encoder,
        tokenizer,
        partial(pooled_states, hidden_layer=hidden_layer, pooling=pooling),
        layer=layer,
        desc="embed",
        with_phenotypes=with_phenotypes,
        max_length=length_to_read(encoder, tokenizer, pooling),
        **settings,
    )
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
    return (table if isinstance(adata, CellStore) else None), n_genes


def pooled_states(
    encoder: PreTrainedModel, batch: dict[str, torch.Tensor], types: torch.Tensor, *, hidden_layer: int, pooling: str
) -> torch.Tensor:
    """Return the pooled hidden states of a batch, Tensor (n, hidden size)."""
    mask, boundaries = batch.get("attention_mask"), batch.get("cu_seq_lens_q")
    last_cls = hidden_layer == -1 and pooling == "cls"
    if last_cls and "tokens_to_keep" in inspect.signature(encoder.forward).parameters:
        first = first_tokens(types.shape, mask, boundaries, types.device)
        return encoder(**batch, tokens_to_keep=first).last_hidden_state[0]
    hidden = encoder(**batch, output_hidden_states=True).hidden_states[hidden_layer]
    return pool(hidden, types, mask, pooling, boundaries)
