"""Diagnostics of an embedding: whether it has collapsed, and how well it predicts the total."""

from __future__ import annotations

import torch

from ..loss_trainer import sum_dtype

_PENALTIES = (1.0, 10.0, 100.0, 1e3, 1e4)


@torch.no_grad()
def effective_rank(states: torch.Tensor) -> float:
    """Compute the exponential of the entropy of the singular values, scaled to sum to 1: from 1 to min(n, hidden).

    `states` (n, hidden), the embedding of n cells, are not centred: a constant embedding has rank 1.

    Notes
    -----
    Roy and Vetterli 2007, "The effective rank"; Garrido et al. 2023 (RankMe), arXiv 2210.02885.
    """
    values = torch.linalg.svdvals(states.to(sum_dtype(states.device)))
    shares = values / values.sum().clamp(min=1e-300)
    return float(torch.special.entr(shares).sum().exp())


@torch.no_grad()
def total_r2(states: torch.Tensor, totals: torch.Tensor) -> float:
    """Compute how well a linear reader of an embedding predicts the log total of left-out cells, as :math:`R^2`.

    1 is perfect, 0 is as good as the mean of the other cells, negative is worse; NaN for fewer than 3 cells or equal
    totals. `states` (n, hidden) are the embedding of n cells, and `totals` (n,) their counts, above 0.

    Notes
    -----
    Ridge regression on standardised states, with the best of five penalties. Each cell is left out in turn; its
    residual is that of the fit to all cells, divided by 1 - leverage (Allen 1974, PRESS).
    """
    dtype = sum_dtype(states.device)
    x, y = states.to(dtype), totals.to(dtype).log()
    n = len(y)
    if n < 3 or not float(y.var()) > 0:
        return float("nan")
    x = (x - x.mean(0)) / x.std(0, correction=0).clamp(min=1e-6)
    u, values, _ = torch.linalg.svd(x, full_matrices=False)
    centred = y - y.mean()
    of_others = (centred * n / (n - 1)).square().sum()
    found = []
    for penalty in _PENALTIES:
        shrunk = values.square() / (values.square() + penalty)
        leverages = (u.square() * shrunk).sum(1) + 1 / n
        residuals = (centred - u @ (shrunk * (u.T @ centred))) / (1 - leverages).clamp(min=1e-12)
        found.append(float(1 - residuals.square().sum() / of_others))
    return max(found)
