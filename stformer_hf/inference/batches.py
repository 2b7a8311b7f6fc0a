"""Runs a model over the cells of an AnnData, in batches of like length."""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from anndata import AnnData
from scipy import sparse
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..batches.collate import pad, take
from ..batches.evaluating import evaluating
from ..models.gene_bert.cell_counts import NEIGHBORS, pad_ragged, sum_of_neighbors
from ..models.gene_bert.cell_tables import is_mudata, is_spatialdata
from ..models.gene_bert.tokenization_gene_bert import GeneTokenizer, TokenizedCells
from ..sources.open_source import Source, open_source
from ..store.cell_store import CellStore
from ..training.cell_heads import check_finite
from ..training.cell_trainer import check_tokenizer_fits
from ..training.loading import is_model, load_config, load_model, load_tokenizer, unwrap

logger = logging.getLogger(__name__)

_ROWS_PER_BLOCK = 4096


def load(model: str | PreTrainedModel, tokenizer: GeneTokenizer | None, auto_class, min_coverage: float | None = None):
    """Load a checkpoint, or take a model out of its wrappings; returns model and tokenizer.

    With `min_coverage` the tokenizer is a copy of that setting.

    Raises
    ------
    ValueError
        A model object without a tokenizer; a tokenizer that does not fit; a model of neighbourhoods; weights that the
        checkpoint does not hold.
    FileNotFoundError
        No such checkpoint.
    TypeError
        Something that is no model.
    """
    of_object = is_model(model)
    config = unwrap(model).config if of_object else load_config(model)
    if config.model_type == "cell_neighborhood":
        raise ValueError(
            f"{'The model' if of_object else model} reads the cells around a cell: use embed_neighborhoods, or "
            "stformer-hf embed --kind neighborhood."
        )
    if of_object:
        model = unwrap(model)
        tokenizer = tokenizer or getattr(model, "tokenizer", None)
        if tokenizer is None:
            raise ValueError(
                "A model object needs its tokenizer: pass tokenizer=…, or the checkpoint's path as model."
            )
    else:
        tokenizer = tokenizer or load_tokenizer(model)
        model = load_model(model, auto_class)
    check_tokenizer_fits(model, tokenizer)
    if min_coverage is not None:
        tokenizer = copy.copy(tokenizer)
        tokenizer.min_coverage = min_coverage
    return model, tokenizer


@contextmanager
def at_work(model: PreTrainedModel, device: str | None) -> Iterator[None]:
    """Put a model into evaluation mode on a device, by default a GPU if there is one; afterwards all is as it was."""
    with evaluating(model, device or ("cuda" if torch.cuda.is_available() else "cpu")), torch.inference_mode():
        yield


def run(
    adata: AnnData,
    model: PreTrainedModel,
    tokenizer: GeneTokenizer,
    forward: Callable[[dict[str, torch.Tensor], torch.Tensor], torch.Tensor],
    *,
    layer: str | None,
    fractional: bool,
    batch_size: int,
    device: str | None,
    desc: str,
    with_phenotypes: bool,
) -> tuple[np.ndarray, np.ndarray, Source]:
    """Apply a function to every cell.

    Parameters
    ----------
    adata : AnnData
        Cells.
    model : PreTrainedModel
        What `forward` calls; its mode and its device are the same afterwards.
    tokenizer : GeneTokenizer
        Makes their tokens.
    forward : callable
        Batch of tensors (n, length) that the model reads, and the token types -> Tensor (n, d).
    layer : str, optional
        Where the counts are.
    fractional : bool
        Whether counts may be fractions.
    batch_size : int
        Cells a batch.
    device : str, optional
        Where the model runs; see `at_work`.
    desc : str
        Of the progress bar.
    with_phenotypes : bool
        Whether the model sees the phenotypes that obs has; masked otherwise.

    Returns
    -------
    results : float32 array (n_cells, d)
        In the order of the cells.
    n_tokens : int64 array (n_cells,)
        Number of genes that each cell gave to the model.
    source : Source
        What was read.

    Raises
    ------
    ValueError
        A batch size below 1; no cells; outputs that are NaN or infinite.
    TypeError
        Something that is not an AnnData, MuData or SpatialData, such as a store.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size}: at least 1 is needed.")
    check_cells(adata)
    source = open_source(adata, layer, fractional)
    names = (source.genes.gene_ids, source.genes.symbols)
    results, n_genes = [], []
    start, around = 0, None
    if tokenizer.neighborhood:
        graph = source.neighbors(NEIGHBORS).rows(0, source.shape[0])
        around = sum_of_neighbors(graph, sparse.vstack(list(source.blocks(_ROWS_PER_BLOCK)), format="csr"))
    with at_work(model, device), tqdm(total=source.shape[0], desc=desc, unit="cell", disable=None) as bar:
        for block in source.blocks(_ROWS_PER_BLOCK):
            obs = source.obs.iloc[start : start + block.shape[0]]
            stop = start + block.shape[0]
            nearby = None if around is None else around[start:stop]
            tokens = tokenizer.encode_cells(
                block,
                genes=names,
                obs=obs,
                fractional=fractional,
                neighborhood=nearby,
                for_inference=not with_phenotypes,
            )
            start = stop
            lengths = np.diff(tokens.indptr)
            order = np.argsort(-lengths, kind="stable")
            done = []
            for first in range(0, len(order), batch_size):
                cells = order[first : first + batch_size]
                done.append(forward(*_batch(tokens, cells, tokenizer, model.device)).float().cpu().numpy())
                bar.update(len(cells))
            block_results = np.concatenate(done)
            results.append(np.empty_like(block_results))
            results[-1][order] = block_results
            is_gene = np.concatenate([[0], np.cumsum(tokenizer.get_gene_tokens_mask(tokens.input_ids))])
            n_genes.append(is_gene[tokens.indptr[1:]] - is_gene[tokens.indptr[:-1]])
    if not results:
        raise ValueError("The AnnData has no cells.")
    n_genes = np.concatenate(n_genes)
    results = np.concatenate(results)
    check_finite(results, n_genes > 0)
    if (n_genes == 0).any():
        logger.warning(f"{(n_genes == 0).sum()} cells have no counts in genes that the model knows.")
    return results, n_genes, source


def check_cells(cells) -> None:
    """Refuse what results cannot be written into.

    Raises
    ------
    TypeError
        A store, a path, or anything else that is not an AnnData, MuData or SpatialData.
    """
    if isinstance(cells, AnnData) or is_mudata(cells) or is_spatialdata(cells):
        return
    found = type(cells).__name__
    if isinstance(cells, str | os.PathLike):
        raise TypeError(f"Results are written into an AnnData, got the path {os.fspath(cells)!r}: read it first.")
    if isinstance(cells, CellStore):
        raise TypeError(
            f"Results are written into an AnnData, and a {found} is not changed. Make one of its cells: "
            "AnnData(store.rows(slice(None)), obs=store.obs, var=store.genes.frame.set_index('gene_id'))."
        )
    raise TypeError(f"Results are written into an AnnData, MuData or SpatialData, got {found}.")


def _batch(
    tokens: TokenizedCells, cells: np.ndarray, tokenizer: GeneTokenizer, device: torch.device
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Give what the model reads of some cells, and the token types, which not every model reads."""
    chosen = take(tokens, cells)
    batch = {name: tensor.to(device) for name, tensor in pad(chosen, tokenizer).items()}
    types = pad_ragged(chosen.token_type_ids, chosen.indptr, batch["input_ids"].shape[1], 0, tokenizer.padding_side)
    return batch, torch.from_numpy(types).to(device)
