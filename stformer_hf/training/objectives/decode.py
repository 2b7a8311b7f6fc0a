"""Decoding: the counts of a cell that are not in a view, from the `[CLS]` of the view."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch.nn.functional import logsigmoid
from transformers import PreTrainedModel

from ...models.cell_neighborhood.count_likelihoods import nb_log_likelihood
from ...models.gene_bert.cell_decoder import CellDecoder
from ..starts.spectral_start import cell_embedding_of
from .contrast import mean_of


@torch.no_grad()
def add_decoder(model: PreTrainedModel) -> None:
    """Add a decoder that starts at the shares of the genes to a model with a cell embedding, unless it has one."""
    if model.config.cell_decoder:
        return
    model.config.cell_decoder = True
    shares = cell_embedding_of(model).statistics.shares
    decoder = CellDecoder(model.config)
    decoder.genes.weight.zero_()
    decoder.genes.bias.copy_(shares.clamp(min=1e-9).log())
    model.cell_decoder = decoder.to(shares.device, model.dtype)


def decode_loss(
    gene_logits: torch.Tensor,
    log_dispersion: torch.Tensor,
    batch: Mapping[str, torch.Tensor],
    known: torch.Tensor,
    usable: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    r"""Compute the negative log likelihood of the counts of the other view, under negative binomials.

    The other view has the genes that are absent from this one, or the counts that thinning removed. Its total is
    known, so that only the shares of its genes are predicted. Genes that are masked in it are not predicted.

    Parameters
    ----------
    gene_logits : Tensor (2n, n_genes), log_dispersion : float32 Tensor (n_genes,)
        Outputs of the model.
    batch : mapping
        `cell_genes`, `cell_counts`, and if present `cell_indptr` and `measured_genes`, of the first views of n cells,
        then of the second.
    known : bool Tensor (n_genes,)
        Genes that occur in the training cells.
    usable : bool Tensor (n,)
        Cells with counts in both views.

    Returns
    -------
    loss : float32 Tensor ()
        Loss in nats per count, the mean over views of cells; 0 if there are none.
    n_views : int64 Tensor ()
        Number of views that the mean is over.

    Notes
    -----
    The likelihood is that of scVI, Lopez et al. 2018, with the observed library size. Decoding whole cells from
    `[CLS]` helps more than masked genes: BMFM-RNA, Dandala et al. 2025.
    """
    n_rows, n_genes = gene_logits.shape
    genes, counts = batch["cell_genes"].reshape(-1), batch["cell_counts"].reshape(-1).float()
    at = torch.arange(len(genes), device=genes.device)
    if batch.get("cell_indptr") is None:
        rows = at.div(max(batch["cell_genes"].shape[1], 1), rounding_mode="floor")
    else:
        rows = torch.searchsorted(batch["cell_indptr"][1:].contiguous(), at, right=True)
    targets = known.expand(n_rows, -1)
    targets = targets & batch["measured_genes"] if batch.get("measured_genes") is not None else targets.clone()
    # No boolean index: it would wait for a GPU.
    masked = torch.zeros_like(targets, dtype=torch.int32).view(-1)
    targets &= masked.index_add(0, rows * n_genes + genes, (counts < 0).int()).view_as(targets) == 0
    counted = (counts > 0) & targets[rows, genes]
    counts = counts.masked_fill(~counted, 0)
    # The targets of a view are in the row of the other one.
    rows = (rows + n_rows // 2) % n_rows
    targets = targets.roll(n_rows // 2, 0)
    totals = counts.new_zeros(n_rows).index_add(0, rows, counts)
    scored = usable.repeat(2) & (totals > 0)
    log_means = (
        gene_logits.float().masked_fill(~targets, torch.finfo(torch.float32).min).log_softmax(-1)
        + totals.clamp(min=1).log()[:, None]
    )
    log_means = log_means.masked_fill(~targets, 0.0)
    of_zero = log_dispersion.exp() * logsigmoid(log_dispersion - log_means)
    log_likelihood = (of_zero * targets).sum(-1)
    # Most genes have no count: start from zeros everywhere, and replace the terms of the others (and 0 by itself).
    more = nb_log_likelihood(counts, log_means[rows, genes], log_dispersion[genes]) - of_zero[rows, genes]
    log_likelihood = log_likelihood.index_add(0, rows, more)
    return -mean_of(log_likelihood / totals.masked_fill(~scored, 1), scored), scored.sum()
