"""Start a model at the principal components of its training cells."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from scipy import sparse
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ...genes.wrong_names import must_have
from ...models.gene_bert.tokenization_gene_bert import GeneTokenizer
from ...models.gene_bert.whole_cell import CellEmbedding
from ...sources.open_source import open_source
from ...store.cell_store import CellStore
from ..loading import unwrap
from .spectral_views import SpectralViews, fit_spectral_views

N_COMPONENTS = 50  # per view, the usual number of PCA
_ROWS_PER_BLOCK = 4096


def initialise_from_store(
    model: PreTrainedModel,
    tokenizer: GeneTokenizer,
    store: CellStore | AnnData,
    *,
    n_components: int | None = None,
    batch_key: str | None = None,
) -> SpectralViews:
    """Start `[CLS]` of a model with `cell_embedding` at the principal components of cells.

    Parameters
    ----------
    model : PreTrainedModel
        GeneBert with any head; changed in place. Only its cell embedding changes.
    tokenizer : GeneTokenizer
        Tokenizer of the model, with `whole_cell=True`.
    store : CellStore or AnnData
        Training cells, read three times in blocks; cells without counts are left out.
    n_components : int, optional
        Number of components of each of the two views, at most half of the hidden size; by default 50, or the maximum
        if that is less. The remaining dimensions start at 0.
    batch_key : str, optional
        Categorical obs column: the components are those of the variance within its batches.

    Returns
    -------
    SpectralViews
        The views that the embedding was set to.

    Raises
    ------
    ValueError
        The model has no `cell_embedding`; the tokenizer does not fit; there are too many components, or fewer than two
        cells; the column is missing, cells have no batch, or each cell is the only one of its batch.

    Notes
    -----
    See `fit_spectral_views`. The result is deterministic. For two cells whose files measure the same genes, the dot
    product of either half of `[CLS]` is the cosine of their scores on the components.
    """
    model = unwrap(model)
    embedding = cell_embedding_of(model)
    n_genes, hidden = embedding.genes.weight.shape
    if not getattr(tokenizer, "whole_cell", False) or len(tokenizer.genes) != n_genes:
        raise ValueError(
            f"The tokenizer does not fit the model: a spectral start needs whole_cell=True and {n_genes} genes, got "
            f"whole_cell={getattr(tokenizer, 'whole_cell', False)} and {len(tokenizer.genes)} genes."
        )
    n_components = min(N_COMPONENTS, hidden // 2) if n_components is None else n_components
    if not 1 <= n_components <= hidden // 2:
        raise ValueError(f"n_components must be 1 to {hidden // 2}, half of the hidden size; got {n_components}.")
    views = fit_views(store, tokenizer, n_components, batch_key=batch_key)
    set_views(embedding, views, model.config.initializer_range)
    return views


def fit_views(
    cells: CellStore | AnnData,
    tokenizer: GeneTokenizer,
    n_components: int = N_COMPONENTS,
    *,
    batch_key: str | None = None,
) -> SpectralViews:
    """Fit the spectral views of cells over a tokenizer's genes; parameters as in `initialise_from_store`."""
    batches = None if batch_key is None else _batches(cells, batch_key)
    return fit_spectral_views(count_blocks(cells, tokenizer), n_components, batches=batches)


def cell_embedding_of(model: nn.Module) -> CellEmbedding:
    """Return the cell embedding of a model; raise a ValueError if it has none."""
    found = getattr(getattr(model, "base_model", model), "cell_embedding", None)
    if found is None:
        raise ValueError(
            "The model has no cell embedding: make it for a tokenizer with whole_cell=True (from_tokenizer)."
        )
    return found


@torch.no_grad()
def set_views(embedding: CellEmbedding, views: SpectralViews, scale: float) -> None:
    """Write views, of which at most hidden size / 2 leading axes are used, into a cell embedding of the same genes.

    `scale` is the root mean square of the embeddings of the chosen genes. `[CLS]` does not depend on it, since its
    halves are scaled, but the steps of an optimiser do.
    """
    statistics, weight = embedding.statistics, embedding.genes.weight
    statistics.shares.copy_(torch.from_numpy(views.shares))
    statistics.means.copy_(torch.from_numpy(views.means))
    statistics.n_cells.fill_(views.n_cells)
    weight.zero_()
    half = weight.shape[1] // 2
    for view, loadings in enumerate(views.loadings):
        loadings = loadings[:, :half]
        used = loadings[loadings.any(axis=1)]
        size = np.sqrt((used**2).mean()) if used.size else 1.0
        part = weight[:, view * half : view * half + loadings.shape[1]]
        part.copy_(torch.from_numpy(loadings * (scale / size)))


def count_blocks(
    cells: CellStore | AnnData, tokenizer: GeneTokenizer, progress: bool = True
) -> Callable[[], Iterator[sparse.csr_array]]:
    """Return a function that reads cells over a tokenizer's genes, in blocks of thousands: csr_arrays (n, n_genes).

    Columns of one gene are summed, unknown ones left out. Each pass shows a progress bar, unless `progress` is False.
    """
    source = cells if isinstance(cells, CellStore) else open_source(cells)
    n_cells, genes = len(cells), source.genes
    found = tokenizer.find_genes(genes.gene_ids, genes.symbols)
    known = np.flatnonzero(found >= 0)
    if not len(known):
        sample = ", ".join(genes.gene_ids[:3])
        raise ValueError(f"The tokenizer knows none of the genes of the cells, such as {sample}.")
    to_genes = sparse.csr_array((np.ones(len(known)), (known, found[known])), shape=(len(found), len(tokenizer.genes)))
    same = np.array_equal(found, np.arange(len(tokenizer.genes)))

    def blocks() -> Iterator[sparse.csr_array]:
        if isinstance(source, CellStore):
            starts = range(0, n_cells, _ROWS_PER_BLOCK)
            read: Iterator[Any] = (source.rows(slice(start, start + _ROWS_PER_BLOCK)) for start in starts)
        else:
            read = source.blocks(_ROWS_PER_BLOCK)
        with tqdm(total=n_cells, desc="spectral start", unit="cell", disable=None if progress else True) as bar:
            for rows in read:
                rows = sparse.csr_array(rows, dtype=np.float64)
                yield rows if same else rows @ to_genes
                bar.update(rows.shape[0])

    return blocks


def _batches(cells: CellStore | AnnData, key: str) -> np.ndarray:
    """Return the batch of each cell, int array (n_cells,) numbered from 0; each cell must have one."""
    obs = cells.obs
    must_have(obs, "obs", key)
    codes, _ = pd.factorize(obs[key])
    if (codes < 0).any():
        raise ValueError(f"{(codes < 0).sum()} cells have no {key!r}: remove them, or fill it in.")
    return codes
