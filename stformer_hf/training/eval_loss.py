"""The loss of an evaluation: the mean over all labels, each counted once, whatever the batches and processes."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator

from ..batches.collate import IGNORE


class SumOfLosses:
    """Adds up the losses of batches, each the mean over its labels; the sums stay on their device."""

    def __init__(self) -> None:
        self._sums: torch.Tensor | None = None

    def add(self, loss: torch.Tensor, n_labels: torch.Tensor | int, only_finite: bool) -> None:
        """Add a batch: its mean loss, and the number of labels that the mean is over.

        Parameters
        ----------
        loss : Tensor ()
        n_labels : int or Tensor ()
        only_finite : bool
            Whether to leave out a batch whose loss is infinite or NaN.
        """
        loss = loss.detach().double()
        n_labels = torch.as_tensor(n_labels, device=loss.device).double()
        pair = torch.stack([torch.where(n_labels > 0, loss * n_labels, 0.0), n_labels])
        if only_finite:
            pair = torch.where(loss.isfinite(), pair, 0.0)
        self._sums = pair if self._sums is None else self._sums + pair

    def mean(self, accelerator: Accelerator) -> float | None:
        """Return the mean over the labels of all processes; None where none was added."""
        if self._sums is None:
            return None
        total, n_labels = accelerator.reduce(self._sums, "sum").tolist()
        return total / n_labels if n_labels else None


def filling_cells(accelerator: Accelerator, n_cells: int) -> torch.Tensor | None:
    """Tell which cells of this process's batch only fill it up, so that every process has as many.

    accelerate takes them from the beginning of the data, and `gather_for_metrics` leaves them out: of the last batch
    of all processes, those after the remainder.

    Parameters
    ----------
    accelerator : Accelerator
    n_cells : int
        Cells in the batch of this process.

    Returns
    -------
    bool Tensor (n_cells,) or None
        None where there are none.
    """
    state = accelerator.gradient_state
    if accelerator.num_processes == 1 or not state.end_of_dataloader or state.remainder <= 0:
        return None
    number = accelerator.process_index * n_cells + torch.arange(n_cells)
    return number >= state.remainder


def without_labels(inputs: dict[str, Any], names: list[str], rows: torch.Tensor) -> dict[str, Any]:
    """Take the labels from some rows of a batch; returns another batch.

    Parameters
    ----------
    inputs : dict of str to Tensor (n, …)
    names : list of str
        Of the labels.
    rows : bool Tensor (n,)
    """
    hidden = {name: inputs[name].clone() for name in names if inputs.get(name) is not None}
    for labels in hidden.values():
        labels[rows.to(labels.device)] = IGNORE
    return {**inputs, **hidden}


__all__ = ["SumOfLosses", "filling_cells", "without_labels"]
