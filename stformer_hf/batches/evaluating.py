"""A model in evaluation mode, where it is to run, for as long as it is used."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def evaluating(model: nn.Module, device: str | torch.device | None = None) -> Iterator[nn.Module]:
    """Put a model into evaluation mode, and on a device; afterwards all is as it was.

    Parameters
    ----------
    model : nn.Module
        The mode of each of its modules is restored: a part that is kept in evaluation mode while the rest is trained
        stays so.
    device : str or torch.device, optional
        Where the model runs; where it is by default. A model whose parts are on several devices stays where it is.

    Yields
    ------
    nn.Module
        The model itself.
    """
    training = {module: module.training for module in model.modules()}
    before = {parameter.device for parameter in model.parameters()}
    moves = device is not None and len(before) == 1
    try:
        model.eval()
        if moves:
            model.to(device)
        yield model
    finally:
        for module, mode in training.items():
            module.training = mode
        if moves:
            model.to(before.pop())


__all__ = ["evaluating"]
