"""Contrast: recognise the other view of a cell among those of the other cells in its batch."""

from __future__ import annotations

import torch
from torch import nn

TEMPERATURE = 0.1


def contrast_loss(states: torch.Tensor, comparable: torch.Tensor) -> torch.Tensor:
    """Compute InfoNCE between two views of cells: float32 Tensor (), in nats.

    Parameters
    ----------
    states : Tensor (2n, hidden)
        `[CLS]` of the first views of n cells, then of the second views; their cosines are divided by `TEMPERATURE`.
    comparable : bool Tensor (n, n)
        See `comparable_cells`.

    Notes
    -----
    van den Oord et al. 2018, arXiv 1807.03748; in both directions, as Radford et al. 2021 (CLIP). Negatives come from
    the batch of one process, so that the loss depends only on the batch, not on the number of processes.
    """
    first, second = nn.functional.normalize(states.float(), dim=-1).chunk(2)
    return info_nce(first @ second.T / TEMPERATURE, comparable)


def comparable_cells(twins: torch.Tensor, sources: torch.Tensor, usable: torch.Tensor) -> torch.Tensor:
    """Return which cells are negatives of which, and on the diagonal which are usable: bool Tensor (n, n).

    Negatives are cells of the same source (equal numbers in `sources`, (n,)), except cells with equal counts (equal
    numbers in `twins`, (n,)). `usable`, bool (n,), are the cells with counts in both views.
    """
    others = (sources[:, None] == sources) & (twins[:, None] != twins)
    own = torch.eye(len(twins), dtype=torch.bool, device=twins.device)
    return (others | own) & usable & usable[:, None]


def cells_with_negatives(comparable: torch.Tensor) -> torch.Tensor:
    """Return which cells have a negative, and so a loss: bool Tensor (n,)."""
    return comparable.diagonal() & (comparable.sum(1) > 1)


def info_nce(logits: torch.Tensor, comparable: torch.Tensor) -> torch.Tensor:
    """Compute the cross entropy of each cell among those it is compared with, in both directions: float32 Tensor ().

    `logits` (n, n) say how well the second view of cell k fits the first view of cell j. The mean is over the cells on
    the diagonal of `comparable`, which is symmetric, with at least one negative; 0 without any.
    """
    counting = cells_with_negatives(comparable)
    own = torch.arange(len(logits), device=logits.device)
    logits = logits.float().masked_fill(~comparable, -torch.inf)
    losses = sum(
        nn.functional.cross_entropy(fits.masked_fill(~counting[:, None], 0), own, reduction="none")
        for fits in (logits, logits.T)
    )
    return mean_of(losses / 2, counting)


def mean_of(values: torch.Tensor, counted: torch.Tensor) -> torch.Tensor:
    """Compute the mean over the first dimension of the values that are counted, bool Tensor (n,); 0 without any.

    Unlike `values[counted].mean(0)`, it does not wait for a GPU.
    """
    counted = counted.view(-1, *[1] * (values.ndim - 1))
    return values.masked_fill(~counted, 0).sum(0) / counted.sum().clamp(min=1)


@torch.no_grad()
def contrast_of_totals(totals: torch.Tensor, comparable: torch.Tensor) -> torch.Tensor:
    """Compute the loss, in nats, of a reader that knows only the totals of the views: a baseline for `contrast_loss`.

    The log totals of the two views of a cell are taken to differ by a normal variable with the mean and variance
    observed in the batch. The reader takes these two numbers from the pairs themselves, so its loss is slightly
    optimistic. `totals` (2n,) are those of the first views, then of the second.
    """
    first, second = totals.float().clamp(min=1).log().chunk(2)
    usable, differences = comparable.diagonal(), first - second
    mean = mean_of(differences, usable)
    variance = mean_of((differences - mean).square(), usable)
    residuals = first[:, None] - second - mean
    return info_nce(-residuals.square() / (2 * variance.clamp(min=1e-6)), comparable)
