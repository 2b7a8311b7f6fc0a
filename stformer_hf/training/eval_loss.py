"""Evaluation loss: the mean over all labels, each counted once, whatever the batches and processes."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator

from ..batches.collate import IGNORE


def sum_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype of sums over many batches on a device: float64, or float32 on MPS, which has no other."""
    return torch.float32 if device.type == "mps" else torch.float64


class SumOfLosses:
    """Sum of the losses of batches, each a mean over its labels; the sums stay on their device."""

    def __init__(self) -> None:
        self._sums: torch.Tensor | None = None

    def add(self, loss: torch.Tensor, n_labels: torch.Tensor | int, only_finite: bool) -> None:
        """Add the mean loss of a batch, and its number of labels.

        Parameters
        ----------
        loss : Tensor ()
        n_labels : int or Tensor ()
        only_finite : bool
            Whether to leave out a batch whose loss is infinite or NaN.
        """
        loss = loss.detach().to(sum_dtype(loss.device))
        n_labels = torch.as_tensor(n_labels, device=loss.device).to(loss.dtype)
        pair = torch.stack([torch.where(n_labels > 0, loss * n_labels, 0.0), n_labels])
        if only_finite:
            pair = torch.where(loss.isfinite(), pair, 0.0)
        self._sums = pair if self._sums is None else self._sums + pair

    def mean(self, accelerator: Accelerator) -> float | None:
        """Return the mean over the labels of all processes; None if there were none."""
        if self._sums is None:
            return None
        total, n_labels = accelerator.reduce(self._sums, "sum").tolist()
        return total / n_labels if n_labels else None


def filling_cells(accelerator: Accelerator, n_cells: int) -> torch.Tensor | None:
    """Return which cells of this process's batch are repeats, added so that all processes have equally many.

    accelerate repeats cells from the beginning of the data, and `gather_for_metrics` leaves them out: in the last
    batch of all processes, they are the cells after the remainder.

    Parameters
    ----------
    accelerator : Accelerator
    n_cells : int
        Cells in the batch of this process.

    Returns
    -------
    bool Tensor (n_cells,) or None
        None if there are no such cells.
    """
    state = accelerator.gradient_state
    if accelerator.num_processes == 1 or not state.end_of_dataloader or state.remainder <= 0:
        return None
    number = accelerator.process_index * n_cells + torch.arange(n_cells)
    return number >= state.remainder


def without_labels(inputs: dict[str, Any], names: list[str], rows: torch.Tensor) -> dict[str, Any]:
    """Return a copy of a batch in which some rows have no labels.

    Parameters
    ----------
    inputs : dict of str to Tensor (n, …)
    names : list of str
        Names of the labels.
    rows : bool Tensor (n,)
    """
    hidden = {name: inputs[name].clone() for name in names if inputs.get(name) is not None}
    for labels in hidden.values():
        labels[rows.to(labels.device)] = IGNORE
    return {**inputs, **hidden}


__all__ = ["SumOfLosses", "filling_cells", "sum_dtype", "without_labels"]
