"""Cross-correlation: each dimension equal in both views of a cell, and uncorrelated with the others."""

from __future__ import annotations

import torch

from .contrast import mean_of

OFF_DIAGONAL = 0.01
_EPSILON = 1e-4


def cross_correlation_loss(states: torch.Tensor, usable: torch.Tensor) -> torch.Tensor:
    r"""Compute the distance of the cross-correlation of two views from the identity: float32 Tensor ().

    .. math:: \frac{1}{d} \sum_i (1 - C_{ii})^2 + \frac{\lambda}{d} \sum_{i \ne j} C_{ij}^2

    with the correlations :math:`C` over the cells of the batch, and :math:`\lambda` = `OFF_DIAGONAL`; 0 for fewer than
    two cells. A dimension that does not vary has correlations of 0.

    Parameters
    ----------
    states : Tensor (2n, hidden)
        `[CLS]` of the first views of n cells, then of the second views.
    usable : bool Tensor (n,)
        Cells with counts in both views.

    Notes
    -----
    Zbontar et al. 2021 (Barlow Twins), arXiv 2103.03230; for cells, Svensson 2026, `JointEmbeddingSCVI` of scvi-tools
    1.5, from which :math:`\lambda` is taken.
    """
    n_cells = usable.sum()
    first, second = (_standardised(view, usable) for view in states.float().chunk(2))
    correlations = first.T @ second / n_cells.clamp(min=1)
    diagonal = correlations.diagonal()
    others = correlations.square().sum() - diagonal.square().sum()
    loss = ((1 - diagonal).square().sum() + OFF_DIAGONAL * others) / len(diagonal)
    return loss * (n_cells > 1)


def _standardised(values: torch.Tensor, usable: torch.Tensor) -> torch.Tensor:
    """Standardise by the mean and variance of the usable rows; the others become 0."""
    centred = (values - mean_of(values, usable)).masked_fill(~usable[:, None], 0)
    return centred / (mean_of(centred.square(), usable) + _EPSILON).sqrt()
