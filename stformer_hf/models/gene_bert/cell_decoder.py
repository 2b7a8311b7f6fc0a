"""Decode `[CLS]` to the counts of all genes."""

import torch
from torch import nn

from .configuration_gene_bert import GeneBertConfig

_MAX_LOG_DISPERSION = 12.0  # beyond it a count is practically Poisson, or practically 0


class CellDecoder(nn.Module):
    """Negative binomials of all genes from the state of a cell, by one linear layer.

    The mean of a gene is its share of the counts, a softmax over the decoded genes, times the given total of these
    genes in the cell. The dispersion of a gene is the same in all cells. The weights start at zero, so that an
    untrained decoder predicts the shares of the bias for every cell.

    Notes
    -----
    The decoder of linearly decoded scVI: Svensson et al. 2020, Bioinformatics 36:3418. Lopez et al. 2018, Nature
    Methods 15:1053, for the likelihood.
    """

    def __init__(self, config: GeneBertConfig):
        super().__init__()
        self.genes = nn.Linear(config.hidden_size, config.num_genes)
        self.genes.begins_at_zero = True
        self.log_dispersion = nn.Parameter(torch.zeros(config.num_genes))

    def forward(self, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Decode states (n_cells, hidden) to logits (n_cells, n_genes) and log dispersions, float32 (n_genes,)."""
        return self.genes(states), self.log_dispersion.float().clamp(-_MAX_LOG_DISPERSION, _MAX_LOG_DISPERSION)
